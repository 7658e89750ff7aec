/*
 * shoal-fleet: a real fleet on this machine. One shoal-aggregator and N shoal-node processes on
 * loopback, each with its own folder, LMDB environment and CURVE key; users that drive the nodes
 * over HTTP; a network that is cut and restored; processes that are killed. What is measured
 * afterwards, the summary and the display are the simulator's (experiments/sim): this program
 * fills a `sim` from what it sees of the processes, and from their stores once they have stopped.
 *
 *     OUT/aggregator/       the aggregator's folder        OUT/logs/       stderr of each process
 *     OUT/nodes/node-00000/ a node's folder                OUT/suites/     the gate's texts
 *     OUT/objects/          models that were measured      OUT/summary.json, OUT/audit.json
 *
 * Threads. The main thread starts and stops processes, reads their logs, decides phases and owns
 * the sim. The forwarder has a thread (forward.h). Each node has a user's thread and
 * FLEET_STREAMERS more that stream while releases are swapped; they meet the main thread in the
 * atomics of fleet_node and read the texts, which do not change.
 */
#ifndef FLEET_FLEET_H
#define FLEET_FLEET_H

#include <pthread.h>
#include <stdatomic.h>

#include "experiments/fleet/forward.h"
#include "experiments/fleet/process.h"
#include "experiments/sim/sim.h"

#define FLEET_NODES_MAX 64
#define FLEET_STREAMERS 2 /* threads a node */

typedef struct {
    sim_options sim; /* first: the sim's table works on it */
    int64_t pace_ms, phase_s_max, checkin_ms, offline_ms_max;
    bool offline;
} fleet_options;
extern const sh_command fleet_run_command;

/* What a node's users do. */
typedef enum {
    FLEET_IDLE,
    FLEET_OLD,  /* type the old kind of text, as fast as it goes */
    FLEET_NEW,  /* the new kind */
    FLEET_SLOW, /* the new kind, at a person's pace */
    FLEET_STOP,
} fleet_mode;

typedef struct fleet fleet;

typedef struct { /* sums of the users' threads */
    atomic_uint_fast64_t asked, accepted, edited, rejected;
    atomic_uint_fast64_t feedback_gone; /* 404: the completion went with a killed process */
    atomic_uint_fast64_t refused;       /* 503 and the like: asked again */
    atomic_uint_fast64_t broken;        /* connections that a killed process broke */
    atomic_uint_fast64_t unexpected;    /* any other answer: a failure of the run */
    atomic_uint_fast64_t streams, streams_changed, streams_cut, streams_over_swap;
    atomic_uint_fast64_t swapped; /* bit v: release v came while a stream ran on an older one */
} fleet_traffic;

typedef struct {
    fleet *fleet;
    uint32_t index;
    char name[32], dir[SH_PATH_BYTES], log[SH_PATH_BYTES];
    fleet_process process;
    uint64_t pending_tokens; /* of the training that ended last */
    bool cut, stopped;
    uint64_t confirmed, offline_since_ms, offline_ms;
    bool training;
    /* the main thread's to the users' threads */
    atomic_int mode;
    atomic_uint port; /* 0: down */
    atomic_uint life; /* times that it was killed */
    atomic_bool streaming;
    /* theirs to the main thread and to each other */
    atomic_bool typing;
    atomic_uint_fast64_t newest; /* release that answered last */
    pthread_t threads[1 + FLEET_STREAMERS];
    size_t n_threads;
} fleet_node;

struct fleet {
    fleet_options options;
    sim *sim;
    fleet_node *nodes;
    uint32_t n_nodes;
    fleet_forward *forward;
    fleet_process aggregator;
    char aggregator_dir[SH_PATH_BYTES], aggregator_log[SH_PATH_BYTES], tools_log[SH_PATH_BYTES];
    char shoal[SH_PATH_BYTES], shoal_node[SH_PATH_BYTES], shoal_aggregator[SH_PATH_BYTES];
    uint16_t aggregator_port;
    bool aggregator_up, rounds_begun, closed, scale_set, close_sent;
    uint64_t canaries; /* candidates that nodes evaluated */
    uint64_t evaluations, offline_version;
    uint32_t exits_bad; /* processes that did not stop with status 0 */
    fleet_traffic traffic;
    atomic_bool failed; /* a user saw something that must not be */
    char failure[200];  /* the first one; written once, under failure_mutex */
    pthread_mutex_t failure_mutex;
};

/* ---- setup.c: folders, keys, command lines ---- */
SH_MUST_USE sh_status fleet_create(const fleet_options *options, fleet **out, sh_error *err);
void fleet_destroy(fleet **fleet);
SH_MUST_USE sh_status fleet_start_aggregator(fleet *f, const char *failpoints, sh_error *err);
SH_MUST_USE sh_status fleet_start_node(fleet *f, uint32_t i, const char *failpoints, sh_error *err);
/* All nodes' keys, over the admin socket of the running aggregator. */
SH_MUST_USE sh_status fleet_enrol(fleet *f, sh_error *err);
/* `shoal aggregator WORD --dir … [more]` */
SH_MUST_USE sh_status fleet_command(fleet *f, const char *word, const char *more, sh_error *err);

/* ---- watch.c: what the logs say ---- */
/* Reads what is new, notices what ended, starts again what was killed on purpose. */
SH_MUST_USE sh_status fleet_watch(fleet *f, sh_error *err);

/* ---- users.c ---- */
SH_MUST_USE sh_status fleet_users_start(fleet *f, sh_error *err);
void fleet_users_stop(fleet *f);
void fleet_fail(fleet *f, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- run.c: phases and faults ---- */
/* To the end of SETTLE, with all processes stopped. What was started is stopped in any case. */
SH_MUST_USE sh_status fleet_run(fleet *f, sh_error *err);
void fleet_interrupt(int signal); /* a signal handler: the run ends early */

/* ---- collect.c: what the stores say, once everything has stopped ---- */
SH_MUST_USE sh_status fleet_collect(fleet *f, sh_error *err);
/* The summary's own fields and checks of a real fleet, into the sim. */
void fleet_extra(fleet *f);

#endif
