/*
 * What the oracle's files share.
 *   oracle.c         life, violations, joins, the end
 *   oracle_node.c    what a node's thread sees
 *   oracle_limit.c   what a node uses: requests, rows, bytes of a day
 *   oracle_center.c  what the aggregator's thread sees
 *   oracle_rows.c    what its audits look at
 *   oracle_map.c     numbers to numbers
 *
 * An item is known by its content: the class and 64 bits of a hash of its payload, which the engine
 * makes different for each. So nothing here depends on how the product numbers items, and an item
 * that comes again under another number is found.
 */
#ifndef WORLD_ORACLE_INTERNAL_H
#define WORLD_ORACLE_INTERNAL_H

#include "experiments/world/oracle.h"
#include "experiments/world/script.h"
#include "shared/base/buf.h"
#include "shared/sync/sync.h"

#define ORACLE_JOIN_MS       600000u /* virtual time between two joins that look at every node */
#define ORACLE_ARRIVALS_MAX  4096u   /* items of one key that came and are not committed */
#define ORACLE_RANGES_MAX    1024u   /* ranges of one line that tombstones named */
#define ORACLE_ITEMS_KEPT    1024u   /* of one (node, epoch), when the options say 0 */
#define ORACLE_NOTED_MAX     64u /* violations of one party between two joins; more are counted */
#define ORACLE_ROWS_MAX      (1u << 24)
#define ORACLE_ANY           UINT64_MAX
#define ORACLE_ROW_KEY       48u /* of an update, alarm or window: node, epoch, sequence */
#define ORACLE_TOMBSTONE_MAX 64u /* bytes that a class may hold over its quota: one tombstone */

/* ---- oracle_map.c: a hash table of 64-bit keys; a zeroed one is empty ---- */
typedef struct {
    uint64_t *keys, *values; /* key 0: free */
    size_t n, cap;
} oracle_map;
uint64_t *oracle_map_find(const oracle_map *map, uint64_t key); /* NULL: not there */
void oracle_map_put(oracle_map *map, uint64_t key, uint64_t value);
void oracle_map_release(oracle_map *map);
uint64_t oracle_hash(const void *bytes, size_t n); /* 64 bits, never 0 */
/* What an item is known by. */
uint64_t oracle_item_hash(uint8_t cls, const void *payload, size_t n);
/* A message that its maker has just made, so that its hashes need no look; or one whose type is
 * asked for before they get it. */
bool oracle_read(const void *bytes, size_t n, sh_msg *msg);
/* Grows *array for one more item. Without memory nothing can be said: the program ends. */
void oracle_grow(void **array, size_t *cap, size_t n, size_t size);

typedef struct {
    world_violation *items; /* [n], at most ORACLE_NOTED_MAX; owned */
    size_t n, cap;
    uint64_t more; /* that had no place */
} oracle_notes;
void oracle_note(oracle_notes *notes, world_rule rule, uint64_t at_ms, uint32_t target,
                 const char *format, ...) __attribute__((format(printf, 5, 6)));

/* ---- a node ---- */
typedef struct {
    uint64_t seq, last_seq, hash; /* seq: in the outbox */
    uint8_t cls, kind;
} oracle_owed;

typedef struct { /* left the outbox, without a count as dropped */
    uint64_t hash, at_ms;
} oracle_gone;

typedef struct { /* went active, with this manifest */
    uint64_t version, manifest, at_ms;
} oracle_active;

typedef struct {
    bool known; /* inferences is */
    uint64_t inferences, quiets;
    uint64_t quiet_until_ms;    /* the aggregator has asked for it */
    uint64_t day, up, down;     /* of its rows' clock; bytes of messages on it */
    uint64_t row_ms, row_at_ms; /* that clock, when it was last seen */
    /* The release that the last job is of, that job when it is a SMOKE, and the release that one
     * has opened in this step. */
    uint64_t trying, trying_job, tried;
} oracle_use;

typedef struct {
    bool watched, lies;
    bool begun;          /* a core was made from the present store */
    uint32_t replaced;   /* how often its store was not what it was */
    uint32_t watch;      /* its key's, UINT32_MAX: none */
    sh_hash slot[2];     /* what its files hold; zero: not said */
    uint8_t counts[256]; /* the outbox's counters as they were, as bytes */
    size_t counts_n;
    sh_outbox_counts now; /* the same, decoded */
    oracle_owed *owed;    /* [n_owed], by class and sequence */
    size_t n_owed, owed_cap;
    oracle_gone *gone; /* since the last join, and those that no commit explains yet */
    size_t n_gone, gone_cap;
    oracle_active *active;
    size_t n_active, active_cap;
    oracle_map made; /* every item that it ever made -> how often: a copy closes its window again */
    oracle_map dropped; /* items that a tombstone took, and that are counted */
    uint64_t version;
    sh_hash version_sha; /* of the active release, as its manifest says */
    uint32_t version_slot;
    oracle_use use;
    oracle_notes notes;
    world_oracle_counts seen;
} oracle_node;

/* ---- a key, at the aggregator ---- */
typedef struct {
    uint64_t first, last;
} oracle_range;

typedef struct {
    uint64_t epoch;
    uint8_t cls;
    sh_msg_ack promised, rows; /* what was sent; what was in the store at the last look */
    /* What tombstones named, whether they were taken or not. An item that came before and was not
     * taken (its node was not to be heard then) is marked by its tombstone, and leaves no row. */
    oracle_range *ranges;
    size_t n_ranges, ranges_cap;
} oracle_line;

typedef struct { /* came, and is not committed */
    uint64_t epoch, seq, hash;
    uint64_t blob; /* of an update: hash of its blob's SHA-256 */
    uint8_t cls, kind;
} oracle_arrival;

typedef struct {
    sh_hash key; /* that its rows are filed under */
    bool watched, lies;
    oracle_line *lines;
    size_t n_lines, lines_cap;
    oracle_arrival *arrivals;
    size_t n_arrivals, arrivals_cap;
    oracle_arrival *stored; /* committed, and its row is there until others take its place */
    size_t n_stored, stored_cap;
    oracle_map committed; /* item -> when at first, relative to the run's start, + 1 */
    oracle_map times;     /* item -> how often, as of the last join */
    uint32_t *nodes;      /* that send under it */
    size_t n_nodes, nodes_cap;
} oracle_watch;

typedef struct { /* since the last join */
    uint32_t watch;
    uint64_t at_ms;
    oracle_arrival item;
} oracle_commit;

struct world_oracle {
    world_oracle_options options;
    oracle_node *nodes;
    oracle_watch *watches;
    size_t n_watches, watches_cap;
    oracle_map keys; /* hash of a key -> its watch */
    oracle_commit *commits;
    size_t n_commits, commits_cap;
    oracle_map published; /* version -> hash of its signed manifest, which was verified */
    uint64_t coord_version, join_due_ms;
    uint32_t buffered; /* updates that the core says wait, at the last look */
    bool finished;
    oracle_notes center;
    world_violation *kept; /* [n_kept] */
    size_t n_kept, kept_cap;
    uint64_t violations;
    world_oracle_counts seen; /* the aggregator's and the joins' */
};

/* ---- oracle.c ---- */
/* How often nodes of the key have made it. */
uint64_t oracle_times_made(const world_oracle *o, const oracle_watch *w, uint64_t hash);

/* What nodes of the key have made or answered, another copy of a store may make again. */
bool oracle_has_copies(const world_oracle *o, const oracle_watch *w);

/* ---- oracle_limit.c ---- */
/* event NULL: a boot. */
void oracle_check_use(const world_oracle *o, uint32_t i, uint64_t at_ms, const sh_node_event *event,
                      const sh_node_actions *actions, const sh_node *core);
void oracle_check_rings(const world_oracle *o, oracle_node *w, uint32_t i, uint64_t at_ms,
                        sh_txn *txn);

/* Before the step's releases are looked at: which one a job has opened. */
void oracle_see_jobs(oracle_use *use, const sh_node_event *event, const sh_node_actions *actions);

/* ---- oracle_rows.c ---- */
/* contents: of updates' rows, by oracle_id_hash. */
void oracle_check_rows(world_oracle *o, uint64_t at_ms, const oracle_map *contents, sh_txn *txn);
void oracle_check_verdict(world_oracle *o, uint64_t at_ms, const sh_update_row *row);

/* ---- oracle_node.c ---- */
/* Looks at the whole outbox: what is new, what is gone. */
void oracle_node_scan(world_oracle *o, uint32_t node, uint64_t at_ms, sh_store *store, bool full);

/* ---- oracle_center.c ---- */
oracle_watch *oracle_watch_of(world_oracle *o, const sh_hash *key); /* NULL: nobody's */
void oracle_row_key(uint8_t key[ORACLE_ROW_KEY], const sh_update_id *id);
uint64_t oracle_id_hash(const sh_update_id *id);
bool oracle_covers(const sh_msg_ack *ack, uint64_t seq);
/* All that was promised is in the store. boot: it may hold more than was shown. */
void oracle_check_promises(world_oracle *o, uint64_t at_ms, sh_txn *txn);

#endif
