/*
 * The node core: a state machine that decides what a device records, learns, sends and runs. It
 * does no I/O: it reads no clock, opens no socket, starts no thread. A shell (the daemon, or the
 * simulator) feeds it events and carries out its actions.
 *
 * Contract with the shell
 *   - One sh_node_step is one write transaction: the shell begins it, calls step, commits it, and
 *     only then (that is the event `committed`) carries out the step's actions. If the commit
 *     fails, the actions are dropped, the core is destroyed and made again from the store.
 *   - Jobs run beside the core; each ends in exactly one SH_NODE_JOB_DONE with its id, or is
 *     forgotten when the process dies: sh_node_create emits the actions that start again what was
 *     owed.
 *   - At most SH_NODE_ACTIONS_MAX actions a step; create and step clear the list first. Notes are
 *     left out when a step has much to do.
 *   - SH_ERR_FULL from a step or its commit: abort, make the core again, and begin the step's
 *     transaction with SH_TXN_RESERVE if the event is a message (acknowledgements free space);
 *     otherwise the event did not happen.
 *   - An inference's record carries the version that it ran on; a request that began before an
 *     ACTIVATE says nothing about the release after it.
 *
 * Releases: a release waits in its chunks until the active one is confirmed, because it is
 * installed over the slot that the node would fall back to. An unhealthy inference (a likelihood
 * that is not finite) of an unconfirmed release brings the other slot back.
 * Threads: one at a time. Determinism: same store, events and rng, same actions.
 */
#ifndef SH_EDGE_NODE_H
#define SH_EDGE_NODE_H

#include "shared/base/rng.h"
#include "shared/stats/monitor.h"
#include "shared/store/store.h"
#include "shared/wire/wire.h"

#define SH_NODE_ACTIONS_MAX      64
#define SH_NODE_LEDGER_MAX       4096u /* ledger rows of a class; the oldest go */
#define SH_NODE_FEEDBACK_ROW_MAX 4096u /* tokens of one sh_feedback */

/* Tables of a node's store; the audit and the reports read them by these numbers. */
enum {
    SH_NODE_T_META,     /* "state" (node_state.c), "epoch", "monitor", "slot0", "slot1" and "take"
                           (signed manifests), "outbox" (shared/sync) */
    SH_NODE_T_RECORD,   /* seq -> sh_record, a ring */
    SH_NODE_T_FEEDBACK, /* seq -> sh_feedback, a ring */
    SH_NODE_T_WINDOW,   /* index -> encoded window, a ring */
    SH_NODE_T_OUTBOX,   /* (class, seq) -> item; see shared/sync */
    SH_NODE_T_CHUNK,    /* BLAKE2b -> bytes: blobs on their way up or down */
    SH_NODE_T_LEDGER,   /* (class, seq) -> what was made and whether it was acknowledged */
    SH_NODE_TABLES
};
extern const char *const sh_node_tables[SH_NODE_TABLES];

typedef struct {
    sh_sign_public_key release_key; /* manifests must be signed by it */
    const char *agent, *kernel;     /* borrowed for the node's life */
    uint32_t cores;
    uint64_t memory_bytes;
    sh_monitor_options monitor;
    uint64_t records_max, feedback_tokens_max, windows_max; /* rings */
    uint64_t outbox_quota_bytes[SH_CLASSES];
    uint64_t retry_min_ms, retry_max_ms; /* exponential, full jitter */
    uint32_t confirm_inferences;         /* healthy inferences that confirm a release */
    bool send_only_if_better;            /* own held-out loss must improve (design section 5) */
} sh_node_options;

typedef enum {
    SH_NODE_TIMER,   /* the time that a SET_TIMER asked for has come */
    SH_NODE_LINK_UP, /* the network is there and policy allows it */
    SH_NODE_LINK_DOWN,
    SH_NODE_MESSAGE,   /* bytes from the aggregator */
    SH_NODE_INFERENCE, /* a finished request's record */
    SH_NODE_FEEDBACK,  /* what the user did with it */
    SH_NODE_JOB_DONE,
} sh_node_event_kind;

/* What a user's correction teaches: the tokens that the author really wrote after the context.
 * Rows of one session are consecutive pieces of one text. */
typedef struct {
    uint64_t session;
    uint32_t offset; /* of tokens[0] in the session's text */
    bool accepted;   /* the completion was taken; else it was corrected */
    uint32_t n;
    const int32_t *tokens;
    bool target; /* false: context only (the start of a text) */
} sh_feedback;

typedef enum { SH_JOB_TRAIN = 1, SH_JOB_INSTALL, SH_JOB_SMOKE } sh_node_job_kind;

/* SH_JOB_TRAIN: train an adapter on the feedback that the shell reads from the store (a snapshot),
 * against the active model. SH_JOB_INSTALL: put the chunks together in a slot, check the SHA-256,
 * fsync. SH_JOB_SMOKE: open the slot's model and run a few prompts. */
typedef struct {
    uint64_t id;
    sh_node_job_kind kind;
    sh_train_plan train;
    uint64_t version; /* INSTALL, SMOKE */
    uint32_t slot;    /* 0 or 1 */
    sh_blob blob;     /* INSTALL; chunk_hashes valid during the action */
} sh_node_job;

typedef struct {
    uint64_t id;
    sh_status status;
    const char *text; /* of a failure */
    /* TRAIN */
    sh_bytes update; /* encoded adapter (GGUF LoRA) */
    uint64_t samples, tokens_seen;
    double heldout_before, heldout_after;
    /* SMOKE */
    double nll;
} sh_node_job_result;

typedef struct {
    sh_node_event_kind kind;
    uint64_t now_ms;
    sh_bytes message;
    sh_record record;
    sh_feedback feedback;
    sh_node_job_result result;
} sh_node_event;

typedef enum {
    SH_NODE_SEND = 1,  /* message to the aggregator */
    SH_NODE_SET_TIMER, /* call TIMER at at_ms (replaces the earlier one) */
    SH_NODE_START_JOB,
    SH_NODE_CANCEL_JOB,
    SH_NODE_ACTIVATE, /* requests that begin from now on use this slot's model */
    SH_NODE_NOTE,     /* for the log: code and a number */
} sh_node_action_kind;

typedef enum {
    SH_NOTE_ALARM = 1,
    SH_NOTE_WINDOW,
    SH_NOTE_UPDATE_MADE,
    SH_NOTE_UPDATE_NOT_BETTER,
    SH_NOTE_UPDATE_ACKED,
    SH_NOTE_RELEASE_ACTIVE,
    SH_NOTE_RELEASE_CONFIRMED,
    SH_NOTE_RELEASE_REFUSED,
    SH_NOTE_DROPPED,
    SH_NOTE_TRAIN_STARTED,
    SH_NOTE_JOB_FAILED,
} sh_node_note;

typedef struct {
    sh_node_action_kind kind;
    sh_buf message; /* SEND; owned by the list */
    uint64_t at_ms; /* SET_TIMER */
    sh_node_job job;
    sh_buf job_chunks; /* storage of job.blob.chunk_hashes */
    uint64_t version;  /* ACTIVATE */
    uint32_t slot;
    sh_node_note note;
    uint64_t number;
} sh_node_action;

typedef struct {
    sh_node_action items[SH_NODE_ACTIONS_MAX];
    size_t n;
} sh_node_actions;
void sh_node_actions_clear(sh_node_actions *actions); /* frees messages; takes zeroed */

typedef struct sh_node sh_node;

/* Makes the core from what the store holds. An empty store is a new node: the epoch is drawn from
 * rng, the genesis release (manifest, already in slot 0) becomes active and confirmed.
 * txn is a write transaction that the shell commits afterwards, then carries out actions. */
SH_MUST_USE sh_status sh_node_create(const sh_node_options *options, sh_bytes genesis_manifest,
                                     uint64_t now_ms, const sh_rng *rng, sh_txn *txn,
                                     sh_node_actions *actions, sh_node **out, sh_error *err);
void sh_node_destroy(sh_node **node);
/* An error is a broken store or our own bug, never a bad message (those are answered, counted and
 * noted). After an error the transaction must be aborted and the core made again. */
SH_MUST_USE sh_status sh_node_step(sh_node *node, const sh_node_event *event, sh_txn *txn,
                                   sh_node_actions *actions, sh_error *err);

typedef struct {
    uint64_t epoch, active_version, confirmed_version;
    uint32_t active_slot, training_round;
    uint64_t updates_made, updates_acked, inferences, windows, alarms;
    uint64_t first_alarm_window; /* 0: none */
    uint64_t feedback_tokens, outbox_items;
    uint64_t bad_messages;
    bool link_up, drifting;
} sh_node_status;
sh_node_status sh_node_get_status(const sh_node *node);

/* ---- what reports and the audit read of a node's store ---- */
typedef enum { SH_LEDGER_OWED, SH_LEDGER_ACKED, SH_LEDGER_DROPPED } sh_ledger_state;
/* What became of one update or alarm; kept after the outbox has forgotten it. */
typedef struct {
    uint8_t cls; /* SH_CLASS_UPDATE, SH_CLASS_ALARM */
    uint64_t seq;
    sh_ledger_state state;
    sh_hash sha256;               /* of the update's blob, of the alarm's payload */
    uint64_t made_ms, settled_ms; /* settled: acknowledged or dropped */
} sh_ledger_row;
SH_MUST_USE sh_status sh_node_each_ledger(sh_txn *txn,
                                          sh_status (*fn)(void *arg, const sh_ledger_row *row),
                                          void *arg, sh_error *err);
/* The epoch of a node's store. SH_ERR_NOT_FOUND when no node was ever made in it. */
SH_MUST_USE sh_status sh_node_stored_epoch(sh_txn *txn, uint64_t *epoch, sh_error *err);

/* Feedback rows in the store, oldest first, for the training snapshot: fn is called for each. */
SH_MUST_USE sh_status sh_node_each_feedback(sh_txn *txn,
                                            sh_status (*fn)(void *arg, const sh_feedback *row),
                                            void *arg, sh_error *err);

#endif
