/*
 * A coordinator on a bench: the core over a real store, with nodes and jobs played by hand. Each
 * event is one transaction; a rig can be told to crash around the n-th commit, or to fail
 * allocations, and then makes the core again from the store, as a shell would.
 */
#ifndef SH_TESTS_AGGREGATOR_RIG_H
#define SH_TESTS_AGGREGATOR_RIG_H

#include "aggregator/coordinator.h"
#include "shared/sync/sync.h"

#define RIG_MODEL_BYTES  150000u /* three chunks */
#define RIG_UPDATE_BYTES 100000u /* two chunks */
#define RIG_MAIL_MAX     4096
#define RIG_NOTES        32
#define RIG_UP_MAX       512
#define RIG_KEYS_MAX     512

enum { RIG_SOUND, RIG_CRASH_BEFORE, RIG_CRASH_AFTER };

typedef struct {
    sh_hash to;
    sh_buf bytes;
} rig_mail;

typedef struct {
    const char *dir; /* of an LMDB store; NULL: in memory */
    sh_store *store;
    sh_coord *coord;
    sh_coord_options options;
    uint8_t genesis[RIG_MODEL_BYTES];
    sh_hash master;
    uint64_t now_ms, life, timer_ms; /* timer_ms 0: none */
    rig_mail mail[RIG_MAIL_MAX];     /* to nodes, in order */
    size_t n_mail;
    sh_buf manifest;       /* of a relay: its parent's genesis manifest */
    sh_buf up[RIG_UP_MAX]; /* of a relay: messages to its parent, in order */
    size_t n_up;
    sh_coord_job job; /* id 0: none */
    uint32_t jobs;    /* started */
    uint32_t notes[RIG_NOTES];
    uint64_t last_number[RIG_NOTES];
    sh_hash keys[RIG_KEYS_MAX], dropped; /* keys that were allowed or shut; dropped last */
    bool key_allowed[RIG_KEYS_MAX];
    size_t n_keys;
    uint32_t drops, others_drops, connection, spared; /* connection: of what nodes send */
    uint32_t common; /* of the last rig_renews, and its windows' `parted`; 0: not said */
    uint64_t parted;
    /* faults */
    size_t commits, crash_at; /* the commit to crash around, from 1 */
    int crash_mode;
    bool jumps;    /* versions may have gaps: the store was a backup */
    uint32_t wire; /* the protocol's version that nodes speak; 0: ours */
    bool torture;  /* a random allocation of each step fails, if it has so many */
    sh_rng torture_rng;
    size_t failures;
} rig;

void rig_init(rig *r, const char *dir); /* sets options; change them, then */
void rig_boot(rig *r);
void rig_release(rig *r);
void rig_reboot(rig *r); /* kill and start again; messages and jobs under way are lost */
/* True when the step was committed and its actions carried out. */
bool rig_step(rig *r, sh_coord_event *event);
bool rig_may_connect(const rig *r, unsigned node); /* as the actions said */
sh_coord_status rig_status(const rig *r);

sh_hash rig_key(unsigned node);
bool rig_send(rig *r, unsigned node, const sh_msg *msg);
bool rig_send_bytes(rig *r, unsigned node, const void *bytes, size_t n);
/* Takes the oldest message to the node off the queue; false when there is none. msg points into
 * the rig until the next take. */
bool rig_take(rig *r, unsigned node, sh_msg *msg);
void rig_drop_mail(rig *r);
bool rig_command(rig *r, sh_coord_command command, uint64_t number, double real, unsigned node);

void rig_enrol(rig *r, unsigned node);
/* Checks in and gives the plan back; the manifest is verified. */
typedef struct {
    sh_train_plan train;
    uint64_t return_after_ms;
    uint64_t manifest_version; /* 0: none */
    sh_hash manifest;          /* of its bytes */
    uint32_t wire;             /* the version that it is written in */
    sh_evaluate_plan evaluate; /* without the chunks' names */
} rig_plan;
rig_plan rig_checkin(rig *r, unsigned node, uint64_t active_version, bool drifting);

/* An update made against `base` (bytes of a release), as a node would describe it. */
typedef struct {
    uint64_t epoch, seq, base_version, samples;
    sh_hash base_sha256;
    uint64_t content; /* what the bytes are made from */
    double heldout;   /* loss, before and after; 0: those of a node that has learnt */
} rig_update;
rig_update rig_make(const rig *r, unsigned node, uint64_t seq); /* on the current release */
void rig_fill(uint8_t *bytes, size_t n, uint64_t content);
/* Sends the item and serves chunks until nothing more is asked for; true when it was acknowledged.
 */
bool rig_offer(rig *r, unsigned node, const rig_update *u);
bool rig_item(rig *r, unsigned node, const sh_msg_item *item);

/* The answer of a canary node to `plan`: tokens in slice 0, and the losses a token. True when it
 * was acknowledged. tokens 0: it has nothing to say. */
bool rig_evaluate(rig *r, unsigned node, uint64_t seq, const sh_evaluate_plan *plan,
                  const double tokens_parent_candidate[3]);
bool rig_send_evaluation(rig *r, unsigned node, uint64_t seq, const sh_evaluation *evaluation);
bool rig_timer(rig *r); /* brings the clock to the timer, and the event */

/* A copy of the store, marked as a backup. rig_restore kills the aggregator, and starts it again on
 * a copy of that. In memory only. */
sh_store *rig_backup(rig *r);
void rig_restore(rig *r, sh_store *backup);

/* Ends the running job. reasons may be NULL (all good). */
bool rig_end_merge(rig *r, const sh_reason *reasons);
bool rig_end_gate(rig *r, double parent, double candidate);
bool rig_fail_job(rig *r, sh_status status);
void rig_candidate_bytes(uint8_t *bytes, uint64_t candidate);

/* Rows. */
sh_update_row rig_row(rig *r, unsigned node, uint64_t epoch, uint64_t seq, bool *found);
sh_release_row rig_candidate(rig *r, uint64_t candidate, bool *found); /* merged is NULL */
uint64_t rig_count(rig *r, unsigned table);
/* Every invariant that must hold between any two steps; thorough: hashes the releases, too. */
void rig_check(rig *r, bool thorough);

/* The answer to an ENROL with these leases, each with the sequence of windows that its start began
 * at (NULL: not said): whether the node has to take a new epoch. */
bool rig_renews(rig *r, unsigned node, uint64_t epoch, const char *leases, const uint64_t *windows);

#endif
