/*
 * A fault schedule: what happens to whom, when, for how long. The engine carries it out; a seed
 * makes one, a file holds one, and the schedule of a failing run is shrunk to the few faults that
 * it needs.
 *
 * Everything that a run draws beside it comes from (seed, node, purpose), so a script of fewer
 * faults changes nothing else in the run, and replays.
 *
 * Text form, one line a fault, in order of time; `#` begins a comment:
 *
 *     shoal-faults 1
 *     seed 7 nodes 20 days 2
 *     at 3600000 for 60000 drop node 3 rate 0.25 number 0
 *     at 7200000 for 30000 crash-aggregator aggregator rate 0 number 12
 *     at 7300000 for 90000 reorder all rate 0.5 number 400
 *
 * Ownership: a script owns its faults; release takes a zeroed one. Threads: plain data.
 */
#ifndef WORLD_SCRIPT_H
#define WORLD_SCRIPT_H

#include "shared/base/buf.h"

#define WORLD_AGGREGATOR       UINT32_MAX       /* targets beside the indices of nodes */
#define WORLD_ALL              (UINT32_MAX - 1) /* every node, and the aggregator's end of links */
#define WORLD_FAULTS_MAX       (1u << 20)       /* of a script */
#define WORLD_SCRIPT_BYTES_MAX (256u << 20)
#define WORLD_NODES_MAX        100000u
#define WORLD_DAYS_MAX         3660u

/* The faults of links take effect on both directions of the target's link, with `rate` the chance
 * a message; `number` is what is said beside each. A point fault has for_ms 0, or its down time. */
typedef enum {
    WORLD_DROP,       /* link: the message is lost */
    WORLD_DUPLICATE,  /* link: it comes twice, the second time after up to `number` ms */
    WORLD_REORDER,    /* link: it is held back for up to `number` ms, others overtake it */
    WORLD_DELAY,      /* link: every message takes `number` ms longer, in order */
    WORLD_ONE_WAY_UP, /* link: what the node sends is lost, what is sent to it arrives */
    WORLD_ONE_WAY_DOWN,
    WORLD_PARTITION,        /* link: nothing passes and the ends do not notice */
    WORLD_SLOW,             /* link: `number` bytes a second */
    WORLD_CORRUPT_MESSAGE,  /* link: byte `number` modulo its length is changed */
    WORLD_CRASH,            /* node: at once, back after for_ms */
    WORLD_CRASH_AGGREGATOR, /* at the `number`-th put, del or commit from then on; for_ms: down */
    WORLD_TORN, /* node or aggregator: dies in a commit. number: the write of the transaction at
                   which it dies (see sh_store_simulate_crash); rate >= 0.5: dies just after the
                   commit became durable and before anything of it was sent; for_ms: down time */
    WORLD_DISK_FULL,     /* store: nothing more than it holds plus `number` bytes, for for_ms */
    WORLD_CLOCK_SKEW,    /* node: wall clock runs `rate` faster (0.01: 1 %), negative: slower */
    WORLD_CLOCK_JUMP,    /* node: wall clock moves by (int64_t)number ms */
    WORLD_CORRUPT_CHUNK, /* node: a byte of an installed slot file (number even) or of a chunk on
                            its way down (odd; the link's message is re-hashed) is changed */
    WORLD_LIE_HASH,      /* node: its chunks do not match their names, its metas not their blobs */
    WORLD_LIE_REPLAY,    /* node: sends earlier items again, under their sequence and under others'
                            epochs, with other content */
    WORLD_LIE_VERSION,   /* node: checks in with forged versions, base versions of updates too */
    WORLD_LIE_POISON,    /* node: its updates are poisoned: scaled, or not finite */
    WORLD_CLONE,         /* node: its store as it is then is started as node `number`'s, too, under
                            the same key, for for_ms; then that copy is switched off */
    WORLD_RESTORE,       /* node: its store goes back to what it was `number` ms earlier */
    WORLD_CORRUPT_STORE, /* node: its environment cannot be read any more */
    WORLD_FAULT_KINDS
} world_fault_kind;

const char *world_fault_name(world_fault_kind kind); /* "drop", "one-way-up", "crash-aggregator" */
bool world_fault_is_lie(world_fault_kind kind);      /* its target is not an honest node */
bool world_fault_is_link(world_fault_kind kind);

typedef struct {
    world_fault_kind kind;
    uint32_t target;
    uint64_t at_ms, for_ms; /* since the run's start */
    double rate;
    uint64_t number;
} world_fault;

typedef struct {
    uint64_t seed;
    uint32_t nodes, days;
    world_fault *faults; /* [n], by at_ms; owned */
    size_t n, cap;
} world_script;

void world_script_release(world_script *script);
/* A schedule from a seed: each kind of fault at least once (lies need 4 nodes), more by nodes x
 * days, none after world_script_quiet_ms so that the fleet comes to rest. At most one node in four
 * lies; a liar is never cloned or set back. By faults of its own no node spends more than half of
 * its time cut off or down. */
SH_MUST_USE sh_status world_script_make(uint64_t seed, uint32_t nodes, uint32_t days,
                                        world_script *out, sh_error *err);
/* When a made script's last fault has ended at the latest. */
uint64_t world_script_quiet_ms(uint32_t days);
SH_MUST_USE sh_status world_script_add(world_script *script, const world_fault *fault,
                                       sh_error *err);
SH_MUST_USE sh_status world_script_copy(const world_script *script, world_script *out,
                                        sh_error *err);

/* SH_ERR_INVALID names the line and what is wrong with it. */
SH_MUST_USE sh_status world_script_parse(const char *text, size_t n, world_script *out,
                                         sh_error *err);
SH_MUST_USE sh_status world_script_read(const char *path, world_script *out, sh_error *err);
SH_MUST_USE sh_status world_script_print(const world_script *script, sh_buf *out, sh_error *err);

/* Runs a script; *fails: it shows the violation that is looked for. */
typedef sh_status (*world_run_fn)(void *arg, const world_script *script, bool *fails,
                                  sh_error *err);
/* Makes a failing script small: delta debugging over its faults (Zeller and Hildebrandt,
 * "Simplifying and Isolating Failure-Inducing Input", 2002), then shorter durations. At most
 * runs_max runs; *out is the smallest that failed, in the worst case a copy. *runs (may be NULL):
 * how many there were. */
SH_MUST_USE sh_status world_script_shrink(const world_script *script, world_run_fn run, void *arg,
                                          uint32_t runs_max, world_script *out, uint32_t *runs,
                                          sh_error *err);

#endif
