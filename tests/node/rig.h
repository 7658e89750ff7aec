/*
 * A node core between a store in memory and an aggregator that is played by hand (its inbox is
 * the real one of shared/sync). Virtual time; a network that may lose, repeat and reorder; a crash
 * at any step, before the commit or after it.
 */
#ifndef SH_TEST_NODE_RIG_H
#define SH_TEST_NODE_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "edge-node/node.h"
#include "shared/sync/sync.h"

#define RIG_PACKETS    1024u
#define RIG_JOBS       8u
#define RIG_SEQS       4096u
#define RIG_PENDING    64u
#define RIG_NOTES      32u
#define RIG_EPOCHS     256u
#define RIG_RELEASES   8u
#define RIG_TIMER_NONE UINT64_MAX

enum { AGG_T_INBOX, AGG_T_CHUNK, AGG_TABLES };

typedef enum { CRASH_NEVER, CRASH_BEFORE_COMMIT, CRASH_AFTER_COMMIT } rig_crash;

typedef struct {
    bool to_node;
    sh_buf bytes;
} rig_packet;

typedef struct {
    sh_node_job job;
    sh_buf chunks;
} rig_job;

typedef struct {
    sh_buf manifest, model;
    uint8_t *hashes;
} rig_release;

typedef struct { /* of the aggregator: who sends under it */
    uint64_t epoch;
    uint32_t n;
    uint8_t leases[SH_WIRE_LEASES_MAX * sizeof(sh_hash)];
    uint8_t starts[SH_WIRE_LEASES_MAX * SH_WIRE_START_BYTES];
} rig_epoch;

/* What belongs to one copy of the node. */
typedef struct {
    sh_store *store;
    sh_node *node;
    uint64_t timer;
    bool link;
    rig_packet packets[RIG_PACKETS];
    size_t n_packets;
} rig_copy;

typedef struct {
    sh_store *store, *agg;
    sh_node *node;
    sh_node_options options;
    sh_node_actions actions;
    sh_sign_secret_key sk;
    rig_release releases[RIG_RELEASES]; /* by version - 1; manifest empty: not made */
    sh_rng net;
    uint64_t seed, now, timer;
    bool link;
    bool has_wall;        /* the device has a clock of its own: now + wall_offset */
    uint64_t wall_offset; /* modulo 2^64 */
    bool coarse;          /* rig_run goes from timer to timer: for days */

    rig_packet packets[RIG_PACKETS];
    size_t n_packets;
    unsigned lose, repeat; /* of 100 */
    unsigned starve;       /* of 100 steps: one of its allocations fails */
    unsigned starved;      /* steps that failed for it */
    bool reorder;

    rig_job jobs[RIG_JOBS];
    size_t n_jobs;
    sh_hash slots[2];
    uint64_t active_version;
    uint32_t active_slot;
    bool drop_cancelled; /* cancelled jobs end without a result; else they did not notice */
    unsigned notes[RIG_NOTES], cancelled, sent[SH_MSG_ROTATE + 1];
    uint64_t note_number[RIG_NOTES];

    /* jobs' results */
    sh_status install_status, smoke_status, train_status;
    double smoke_nll, heldout_before, heldout_after;
    size_t update_bytes;
    sh_status evaluate_status;
    uint32_t n_slices;
    sh_slice_score slices[SH_EVALUATION_SLICES_MAX];
    sh_node_job evaluated; /* the last EVALUATE that was finished */

    /* aggregator */
    uint32_t speaks; /* the highest version that it knows */
    rig_epoch epochs[RIG_EPOCHS];
    size_t n_epochs;
    sh_buf rotate_token; /* of the last ROTATE */
    size_t token_bytes;  /* in the last ENROL */
    unsigned switched;   /* SWITCH_KEY actions */
    sh_hash switch_key;
    unsigned renewed; /* ENROLs that were told to renew */
    unsigned evicted; /* items of starts that it is not any more */
    void (*on_taken)(void *arg, const sh_msg_item *item); /* NULL: none; not of tombstones */
    void (*on_answer)(void *arg, const sh_buf *message);  /* NULL: none; of what it sends */
    void *arg;
    unsigned n_evaluations;
    sh_evaluation evaluation; /* the last one */
    sh_msg_plan plan;
    uint64_t offer;        /* version offered to nodes below it; 0: none */
    bool reject, mute;     /* refuses enrolment; never answers */
    uint32_t chunk_budget; /* chunks served a WANT */
    bool stamps;           /* plans carry the true time, now + true_offset */
    uint64_t true_offset;
    uint64_t chunks_served, bytes_up, bytes_down; /* bytes of messages that the node sent and got */
    unsigned taken[SH_CLASSES][RIG_SEQS], buried[SH_CLASSES][RIG_SEQS];
    unsigned n_taken[SH_CLASSES];
    sh_msg_checkin checkin;           /* the last one */
    sh_msg_item pending[RIG_PENDING]; /* updates whose chunks are on their way */
    sh_buf pending_payload[RIG_PENDING];
    size_t n_pending;

    uint64_t starts, steps, crash_at;
    rig_crash crash;
    bool crashed; /* the last step crashed before its commit: its event did not happen */
    uint64_t fed; /* inferences that were committed */
} rig;

#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), test_err.text);              \
    } while (0)
#define SAME(a, b)                                                                                 \
    do {                                                                                           \
        unsigned long long same_a_ = (a), same_b_ = (b);                                           \
        if (same_a_ != same_b_)                                                                    \
            fail_msg("%s is %llu, %s is %llu", #a, same_a_, #b, same_b_);                          \
    } while (0)
extern sh_error test_err;

rig *rig_open(uint64_t seed); /* genesis made, node not started: options may be changed */
void rig_start(rig *r);
void rig_close(rig **r);

/* A copy of the store as it is, as of a disk of a device that is off: not started. */
sh_store *rig_copy_store(const rig *r);
/* Another copy of the node runs from now on, against the same aggregator; the one that ran is put
 * into *copy as it stands, its network with it. copy->node NULL: it is off, and is started. */
void rig_swap(rig *r, rig_copy *copy);
void rig_copy_release(rig_copy *copy);
/* Names the lease of the start that sends in the epoch, as acknowledgements do; 0: none enrolled.
 */
uint64_t rig_lease_name(rig *r, uint64_t epoch);
/* A packet that is meant for the present copy comes to another one as well, if its link is up: they
 * have one key. */
void rig_copy_packet(rig_copy *copy, const void *bytes, size_t n);

/* One step of the node: transaction, commit, actions. False: it crashed before the commit. */
bool rig_step(rig *r, const sh_node_event *event);
void rig_restart(rig *r); /* the process dies and comes back; the link is down */
void rig_link(rig *r, bool up);
void rig_signals(rig *r, const sh_node_signals *signals);
/* i seeds the record; with options.completions_max its completion is kept as i + 1. */
bool rig_infer(rig *r, unsigned i, bool shifted);
bool rig_rate(rig *r, uint64_t id, sh_feedback_kind kind,
              uint32_t n); /* n tokens of the author's */
bool rig_erase(rig *r, uint64_t user);
void rig_teach(rig *r, uint64_t session, uint32_t offset, uint32_t n, bool target);
void rig_message(rig *r, const sh_msg *msg); /* straight to the node, no network */
void rig_bytes(rig *r, const void *bytes, size_t n);
bool rig_job_waits(const rig *r, sh_node_job_kind kind);
bool rig_finish_job(rig *r, sh_node_job_kind kind); /* runs the first of that kind */
/* Signs a release of n random bytes; its chunks are put into the aggregator's store. */
void rig_make_release(rig *r, uint64_t version, size_t n);
sh_bytes rig_manifest(const rig *r, uint64_t version);
/* A plan that asks to score release `candidate` beside its parent. */
sh_evaluate_plan rig_evaluate_plan(const rig *r, uint64_t candidate, uint64_t parent);
/* A plan that asks for training on release `version`. */
sh_train_plan rig_train_plan(const rig *r, uint32_t round, uint64_t version);

/* Carries packets, timers and jobs until nothing moves or ms of virtual time are over. */
void rig_run(rig *r, uint64_t ms, bool with_jobs);
uint64_t rig_count(rig *r, unsigned table);
sh_node_status rig_status(const rig *r);

typedef struct {
    unsigned n[SH_CLASSES][SH_LEDGER_DROPPED + 1];
} rig_ledger;
rig_ledger rig_read_ledger(rig *r);

#endif
