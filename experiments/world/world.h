/*
 * The engine of `shoal-sim faults`: a fleet of the shipping node cores and the shipping coordinator
 * core under virtual time, with faults from a script (script.h) and an oracle that watches
 * (oracle.h). Learning is a cost model (cost.c).
 *
 * Parallel and deterministic. The nodes are divided into shards; each shard and the aggregator is a
 * partition with an event queue of its own. A message between a node and the aggregator takes at
 * least the fleet's shortest link delay, so within a window of virtual time of that length no
 * partition can touch another (conservative parallel simulation; Chandy and Misra, 1979). What a
 * partition sends in a window the receiver takes at the beginning of its next one. Since nodes talk
 * to the aggregator alone, a shard's window needs no more than the aggregator's window before, and
 * the aggregator's needs those of all shards before: threads take whatever may run, and meet only
 * where the oracle joins. Events are ordered by (time, receiver, sender, the sender's number), all
 * random numbers come from (seed, node, purpose, number), and no partition reads what another one
 * writes; so nothing depends on the number of threads, nor on where windows begin.
 *
 * Faults of links take effect in the node's partition, for both directions: on what the node sends
 * when it sends it, on what is sent to it when it comes.
 *
 * Files
 *   options.c  command line          devices.c  classes of devices
 *   run.c      one run: windows, end threads.c  who runs which partition
 *   faults.c   seeds, scripts, shrinking
 *   node.c     shell of a node       node_life.c  boot, crash, links, faults of a node
 *   center.c   shell of the aggregator
 *   link.c     the network           lie.c      what a lying node sends
 *   cost.c     learning              report.c   result as JSON and as text
 */
#ifndef WORLD_WORLD_H
#define WORLD_WORLD_H

#include "aggregator/coordinator.h"
#include "edge-node/node.h"
#include "experiments/sim/events.h"
#include "experiments/world/oracle.h"
#include "experiments/world/script.h"
#include "shared/base/json.h"
#include "shared/base/option.h"

#define WORLD_SHARDS      32u
#define WORLD_THREADS_MAX 64u
#define WORLD_CLASSES_MAX 16u
#define WORLD_SEEDS_MAX   10000000
#define WORLD_START_MS    1700000000000ull /* what the clocks show when a run starts, Unix time */
#define WORLD_HOUR_MS     3600000ull
#define WORLD_DAY_MS      86400000ull
/* After the last fault, until every node has confirmed the newest release. */
#define WORLD_SETTLE_MS_MAX (7 * WORLD_DAY_MS)
/* A full store is tried again after so long, doubled up to the most: more seldom than the daemon
 * does, whose device is not full for hours. */
#define WORLD_FULL_PAUSE_MS     300000ull
#define WORLD_FULL_PAUSE_MAX_MS 1200000ull
#define WORLD_REMAKE_MS         1000u /* a core is made again so long after another error */
#define WORLD_ACTIVE_MAX        64u   /* faults that one node has at a time */

typedef struct {
    int64_t seed, seeds, nodes, days, threads;
    const char *canary, *script, *faults;
    sh_option_list devices;
    bool shrink, json;
    bool share_all; /* tests: the threads share also what has too little work */
} world_options;
extern const sh_command world_faults_command;

/* ---- devices.c ---- */
#define WORLD_HOURS    24
#define WORLD_WEEKDAYS 7
typedef struct { /* a class of devices; one YAML file */
    char name[32];
    double share;
    double train_ms_per_token;
    uint64_t train_pause_ms; /* from a training to the next quiet hours */
    int64_t memory_bytes, cores;
    int64_t bytes_up_s, bytes_down_s, delay_ms, jitter_ms;
    double loss;
    double online_hour[WORLD_HOURS], online_weekday[WORLD_WEEKDAYS]; /* multiplied */
    double inferences_hour, corrections; /* corrections: share of inferences that teach */
    double leave_day;                    /* chance that it goes away on a day */
    int64_t away_ms;
} world_class;
typedef struct {
    world_class classes[WORLD_CLASSES_MAX];
    size_t n;
    uint64_t delay_ms_min; /* of all classes: how far partitions may run apart */
} world_fleet;
/* The classes of the files; none given: the three that are shipped. */
SH_MUST_USE sh_status world_fleet_read(const sh_option_list *files, world_fleet *out,
                                       sh_error *err);

/* ---- counts: of a partition, summed up at the end ---- */
typedef struct {
    uint64_t events, node_steps, coord_steps, commits, boots;
    uint64_t inferences, inferences_full, feedback, checkins, windows, alarms;
    uint64_t updates, updates_acked, activations, confirmations, rejected;
    uint64_t messages_up, messages_down, bytes_up, bytes_down, acks;
    uint64_t releases, candidates_refused, merges;
    uint64_t told_later;                /* nodes that heard so */
    uint64_t faults[WORLD_FAULT_KINDS]; /* how often each took effect */
} world_counts;

typedef struct world world;
typedef struct world_part world_part;

typedef struct {      /* what a node's shell does with a job of its core */
    sh_node_job job;  /* without chunk hashes */
    sh_status status; /* INSTALL: as the bytes were found */
    sh_hash sha256;
    uint64_t targets; /* TRAIN, EVALUATE: tokens of feedback */
    bool poisoned;
} world_job;

typedef struct { /* a file that a slot's model is read from */
    sh_hash sha256;
    bool there;
} world_file;

/* What a fault that lasts is to one node now. Points into the script. */
typedef struct {
    const world_fault *fault;
} world_active;

typedef struct {
    sh_node *core;
    sh_store *store;
    sh_store *backup; /* RESTORE: as the store was; owned */
    world_file backup_files[2];
    sh_hash key;
    sh_rng rng;                            /* user and presence */
    uint64_t sequence;                     /* events that it made */
    uint64_t messages[2];                  /* up, down */
    uint64_t busy_ms[2];                   /* the link sends until then: up, down */
    uint64_t timer, restart;               /* generations */
    uint64_t hash;                         /* of all that it did */
    uint64_t version;                      /* active */
    uint64_t full_until_ms, full_pause_ms; /* its store counts as full until then */
    uint64_t session, train_due_ms, away_until_ms;
    double clock_rate;                 /* of skews, 0: none */
    int64_t clock_ms;                  /* wall clock - true time */
    uint64_t clock_from_ms, steady_ms; /* steady: steady clock - virtual time */
    uint64_t replay_n;
    sh_buf replay; /* LIE_REPLAY: an item that it sent before */
    world_file files[2];
    world_active *active;
    uint32_t n_active;
    uint32_t life, connection, slot, down_ms, key_of; /* key_of: whose key it has */
    uint32_t offset;                                  /* of the feedback in its session */
    uint8_t cls;
    bool up, online, wanted, server_up;
    bool off;            /* for good, or not yet begun */
    bool store_bad;      /* its environment cannot be read */
    bool dies_after;     /* the next commit */
    uint32_t chunks_bad; /* of those to come, so many are damaged on their way */
} world_node;

/* Events of a window that are for another partition, which takes them at its next one. Their
 * messages are copied in and out: what a thread allocates it frees, so that no two threads want an
 * allocator's lock. */
typedef struct {
    sim_event *items; /* of .message only .len and .max are said */
    size_t n, cap;
    sh_buf bytes; /* the messages, one behind the other */
} world_mail_box;

struct world_part {
    world *w;
    sim_queue queue;
    uint64_t numbers;                  /* of the aggregator's events; a node counts its own */
    uint64_t now_ms, next_ms, mail_ms; /* next_ms: of its queue; mail_ms: earliest that it sent */
    uint64_t window, window_end_ms;    /* that it is in, or was in */
    world_mail_box *out[2];            /* [window & 1][receiver: shard, or 0 the aggregator] */
    sh_node_actions *actions;
    world_counts counts;
    sh_status status; /* after an error it does nothing more */
    sh_error err;
};

typedef struct { /* where the aggregator finds the sender of a key */
    uint32_t node, connection;
} world_route;

typedef struct world_center world_center; /* center.c */

struct world {
    const world_options *options;
    const world_fleet *fleet;
    uint64_t seed;
    world_script script; /* owned */
    world_oracle *oracle;
    world_node *nodes;
    uint32_t n_nodes, n_clones;          /* clones are nodes[n_nodes ...] */
    uint64_t end_ms, settle_ms, rest_ms; /* end of the days; when it came to rest, 0: not */
    uint64_t window_ms, windows_run;
    bool begun; /* the nodes are there */
    bool settling;
    bool busy; /* the last stretch had work for more than one thread */
    sh_node_options node_options;
    sh_coord_options coord_options;
    sh_buf genesis_manifest, genesis_model;
    sh_hash genesis_sha, genesis_master;
    sh_sign_secret_key other_sk; /* a forger's */
    world_part shards[WORLD_SHARDS];
    uint32_t n_shards;
    world_part center_part;
    world_center *center;
    double candidates_day; /* merges that come about on a day */
    bool progress;
};

typedef struct {
    uint64_t seed, violations, hash, simulated_ms, rested_ms;
    world_counts counts;
    world_oracle_counts oracle;
    uint64_t nodes, days, coord_version, store_bytes_node_max;
    uint64_t rss_before, rss_peak, resting_bytes;
    size_t n_kept;
    world_violation kept[8];
} world_result;

/* ---- run.c ---- */
/* Takes over *script (zeroed afterwards). threads: of this run. */
SH_MUST_USE sh_status world_run(const world_options *options, const world_fleet *fleet,
                                world_script *script, uint32_t threads, world_result *out,
                                sh_error *err);
/* The script of a seed: from the file, or made; kinds that --faults leaves out are left out. */
SH_MUST_USE sh_status world_script_of(const world_options *options, uint64_t seed,
                                      world_script *out, sh_error *err);
/* All that the command line asks for. *failed: there were violations. */
SH_MUST_USE sh_status world_faults(const world_options *options, bool *failed, sh_error *err);
/* Puts an event of `by` (a node, or the aggregator) into its own partition's queue. */
SH_MUST_USE sh_status world_push(world_part *p, sim_event event, sh_error *err);
/* Sends it to another partition, at the earliest a link's shortest delay from now. */
SH_MUST_USE sh_status world_mail(world_part *p, sim_event event, sh_error *err);
/* All that the partition does before end_ms; what came for it is of the window before. Before the
 * nodes are there: makes its own. */
void world_part_run(world_part *p, uint64_t window, uint64_t end_ms);
world_part *world_part_of(world *w, uint32_t node);
uint32_t world_shard_of(const world *w, uint32_t node);
/* 64 random bits of (seed, node, purpose, number). */
uint64_t world_draw(const world *w, uint32_t node, uint32_t purpose, uint64_t number);
double world_unit(uint64_t draw); /* in [0, 1) */
uint64_t world_mix(uint64_t hash, uint64_t x);

/* ---- threads.c ---- */
typedef struct world_team world_team;
SH_MUST_USE sh_status world_team_create(uint32_t threads, world_team **out, sh_error *err);
/* Runs the windows of all partitions from one time to the other. */
void world_team_run(world_team *team, world *w, uint64_t from_ms, uint64_t until_ms);
uint32_t world_team_threads(const world_team *team);
void world_team_destroy(world_team **team);

/* ---- node.c ---- */
SH_MUST_USE sh_status world_node_event(world_part *p, sim_event *event, sh_error *err);
SH_MUST_USE sh_status world_node_step(world_part *p, uint32_t i, sh_node_event *event,
                                      sh_error *err);
SH_MUST_USE sh_status world_node_carry_out(world_part *p, uint32_t i, sh_node_actions *actions,
                                           sh_error *err);
/* The steady clock, which began with the process at what the device's clock said. */
uint64_t world_node_now(const world_node *n, uint64_t now_ms);
void world_node_start_clock(world_node *n, uint64_t now_ms);

/* ---- node_life.c ---- */
SH_MUST_USE sh_status world_node_begin(world_part *p, uint32_t i, sh_error *err);
SH_MUST_USE sh_status world_node_boot(world_part *p, uint32_t i, sh_error *err);
/* As the daemon opens a slot's file: false when it is not what the slot's manifest says. */
bool world_node_file_holds(const world_node *n, sh_txn *txn, uint32_t slot);
/* Its store was found full: it counts as full for a pause. */
void world_node_full(const world_part *p, world_node *n);
static inline bool world_node_is_full(const world_part *p, const world_node *n)
{
    return p->now_ms < n->full_until_ms;
}
/* Boots it after so long; an earlier call's time is void. */
SH_MUST_USE sh_status world_node_restart_in(world_part *p, uint32_t i, uint64_t ms, sh_error *err);
/* The process dies; it is back after n->down_ms. */
SH_MUST_USE sh_status world_node_die(world_part *p, uint32_t i, sh_error *err);
SH_MUST_USE sh_status world_node_presence(world_part *p, uint32_t i, sh_error *err);
SH_MUST_USE sh_status world_node_relink(world_part *p, uint32_t i, sh_error *err);
SH_MUST_USE sh_status world_node_fault(world_part *p, const sim_event *event, sh_error *err);
const world_fault *world_node_active(const world_node *n, world_fault_kind kind);
void world_node_release(world_node *n);

/* ---- link.c ---- */
/* Takes over *message. */
SH_MUST_USE sh_status world_send_up(world_part *p, uint32_t i, sh_buf *message, sh_error *err);
SH_MUST_USE sh_status world_send_down(world_part *p, const sh_hash *key, sh_buf *message,
                                      sh_error *err);
SH_MUST_USE sh_status world_copy(const sh_buf *message, sh_buf *copy, sh_error *err);
/* What becomes of a message that has come to the node's end of the link: *now, it is delivered. */
SH_MUST_USE sh_status world_arrive(world_part *p, sim_event *event, bool *now, sh_error *err);

/* ---- lie.c ---- */
/* What the node sends instead of *message, and perhaps another one behind it (empty: none). */
SH_MUST_USE sh_status world_lie(world_part *p, uint32_t i, sh_buf *message, sh_buf *more,
                                sh_error *err);
/* What a lying device's core hears instead: releases that were, or that another has signed. */
SH_MUST_USE sh_status world_lie_down(world_part *p, uint32_t i, sh_buf *message, sh_error *err);
SH_MUST_USE sh_status world_corrupt_chunk(sh_buf *message, uint64_t draw, bool *done,
                                          sh_error *err);

/* ---- center.c ---- */
SH_MUST_USE sh_status world_center_create(world *w, sh_error *err);
void world_center_destroy(world *w);
SH_MUST_USE sh_status world_center_event(world_part *p, sim_event *event, sh_error *err);
SH_MUST_USE sh_status world_center_close(world *w, sh_error *err);
const sh_coord *world_center_core(const world *w);
sh_store *world_center_store(const world *w);
uint64_t world_center_hash(const world *w);
world_route world_center_route(const world *w, uint32_t key_of);

/* ---- cost.c ---- */
SH_MUST_USE sh_status world_make_genesis(world *w, sh_error *err);
/* Fills the result of a job of a node; *bytes holds the update. */
SH_MUST_USE sh_status world_learn(const world *w, uint32_t i, const world_job *job, sh_buf *bytes,
                                  sh_node_job_result *out, sh_error *err);
uint64_t world_learn_ms(const world *w, uint32_t i, const sh_node_job *job);
void world_make_record(const world *w, uint32_t i, uint64_t number, uint64_t now_ms,
                       sh_record *out);
/* An update's bytes that a merge must refuse. */
bool world_is_poison(const uint8_t *bytes, size_t n);
SH_MUST_USE sh_status world_make_candidate(const world *w, uint64_t candidate, sh_buf *out,
                                           sh_error *err);
bool world_gate_passes(const world *w, uint64_t candidate);

/* ---- report.c ---- */
typedef struct {
    uint64_t seeds_run, violations, first_failing_seed;
    bool failing;
    double wall_seconds, simulated_seconds, rss_bytes_per_node, node_days;
    sh_hash hash;
    world_counts counts;
    world_result first; /* failing, or the last run */
    sh_buf script;      /* of the failing seed, shrunk when asked for; empty: none */
} world_summary;
void world_report(const world_options *options, const world_summary *summary);

#endif
