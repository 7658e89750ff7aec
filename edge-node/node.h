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
 *     transaction with SH_TXN_RESERVE if the event is a message, a timer or an erasure (they free
 *     space); otherwise the event did not happen. A job's end without an update begins with
 *     SH_TXN_RESERVE: a core that is made again knows the job by another id.
 *   - An inference's record carries the version that it ran on; a request that began before an
 *     ACTIVATE says nothing about the release after it.
 *
 * Clocks. event.now_ms is steady: it never jumps, whatever is done to the device's clock, and it
 * began, with the process, at what that clock said. event.wall_ms is the device's clock now. The
 * core makes the dates that it needs of both and of the aggregator's signed time (node_clock.c).
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
#include "shared/sync/link.h"
#include "shared/wire/wire.h"

#define SH_NODE_ACTIONS_MAX      64
#define SH_NODE_LEDGER_MAX       4096u /* ledger rows of a class; the oldest go */
#define SH_NODE_FEEDBACK_ROW_MAX 4096u /* tokens of one sh_feedback */

/* Tables of a node's store; the audit and the reports read them by these numbers. */
enum {
    SH_NODE_T_META,       /* "schema" (node_schema.c), "state", "candidate" (node_state.c), "epoch",
                             "clock" (node_clock.c), "budget" (node_budget.c),
                             "monitor", "slot0", "slot1" and "take" (signed manifests), "outbox"
                             and "lease" (shared/sync) */
    SH_NODE_T_RECORD,     /* seq -> sh_record, a ring */
    SH_NODE_T_FEEDBACK,   /* seq -> sh_feedback, a ring */
    SH_NODE_T_WINDOW,     /* index -> encoded window, a ring */
    SH_NODE_T_OUTBOX,     /* (class, seq) -> item; see shared/sync */
    SH_NODE_T_CHUNK,      /* BLAKE2b -> bytes: blobs on their way up or down */
    SH_NODE_T_LEDGER,     /* (class, seq) -> what was made and whether it was acknowledged */
    SH_NODE_T_COMPLETION, /* id -> sh_completion_row, a ring: what feedback by id needs */
    SH_NODE_TABLES
};
extern const char *const sh_node_tables[SH_NODE_TABLES];

/* ---- when the node does what ---- */

typedef enum { SH_SIGNAL_UNKNOWN, SH_SIGNAL_NO, SH_SIGNAL_YES } sh_signal;
#define SH_IDLE_UNKNOWN        UINT64_MAX
#define SH_TEMPERATURE_UNKNOWN INT32_MIN

/* What the shell sees of its device. Zeroed but for idle_ms and temperature_mc: nothing is known.
 */
typedef struct {
    sh_signal network, metered, power; /* power: external */
    uint64_t idle_ms;       /* since the device's user did something, or UNKNOWN; the node's
                               own requests count besides */
    int32_t temperature_mc; /* thousandths of a degree Celsius, or UNKNOWN */
    uint64_t disk_free, store_bytes, store_bytes_max;
    bool store_full;
    uint32_t stores_lost; /* environments set aside as corrupt, so far */
    uint64_t
        refused_full; /* what a full store did not take since the last SIGNALS that was committed */
} sh_node_signals;

typedef enum {
    SH_POLICY_FEEDBACK, /* updates, alarms and evaluations up; check-ins */
    SH_POLICY_WINDOWS,  /* windows and records up */
    SH_POLICY_DOWNLOAD, /* chunks of releases and candidates down */
    SH_POLICY_TRAIN,    /* training and evaluating candidates */
    SH_POLICIES
} sh_policy_kind;

/* Zeroed: no condition. Inference waits for none of it. */
typedef struct {
    bool unmetered, power;
    bool unknown_allowed; /* a signal that is needed and not known counts as well */
    uint64_t idle_ms_min;
    uint32_t from_min, to_min;  /* minutes of the local day, [from, to); equal: the whole day */
    int32_t temperature_mc_max; /* 0: any */
} sh_node_policy;

/* Bytes of messages; 0: no limit. */
typedef struct {
    uint64_t up_day, up_month, down_day, down_month;
} sh_node_budgets;

typedef struct {
    sh_sign_public_key release_key; /* manifests must be signed by it */
    const char *agent, *kernel;     /* borrowed for the node's life */
    uint32_t cores;
    uint64_t memory_bytes, disk_bytes; /* disk: that the store may take */
    const char *device_class;          /* as its owner names it; NULL: not said. Borrowed, too */
    sh_bytes token; /* one-time token of the enrolment, borrowed; goes into ENROL until a WELCOME */
    sh_monitor_options monitor;
    /* Rings: the oldest go when one of its limits is passed. 0 is no limit of that kind, but for
     * the counts. */
    uint64_t records_max, feedback_tokens_max, windows_max, completions_max;
    uint64_t records_bytes_max, completions_bytes_max;
    uint64_t records_age_ms_max, feedback_age_ms_max, completions_age_ms_max;
    uint64_t outbox_quota_bytes[SH_CLASSES];
    uint64_t retry_min_ms, retry_max_ms; /* exponential, full jitter */
    sh_node_policy policies[SH_POLICIES];
    uint64_t checkin_blocked_ms; /* between check-ins while the policy FEEDBACK does not hold; 0: as
                                    the aggregator says */
    sh_node_budgets budgets;
    int32_t utc_offset_min;       /* of the hours of policies and the days of budgets */
    uint32_t confirm_inferences;  /* healthy inferences that confirm a release */
    bool send_only_if_better;     /* own held-out loss must improve (design section 5) */
    bool evaluate;                /* take part in federated evaluation when a plan asks for it */
    uint64_t evaluate_tokens_min; /* target tokens of feedback below which it has nothing to say */
    /* For a store that is new where there was one before: the signed manifest of a release, newer
     * than the genesis, whose file lies in kept_slot and is sound: it is active and confirmed. */
    sh_bytes kept_manifest; /* borrowed for create */
    uint32_t kept_slot;
    /* Bit i: the file of slot i is not what its manifest says. Create forgets that release, without
     * refusing it; where it was the active one, the other slot's is active, or else the genesis
     * release in slot 0. */
    uint32_t lost_slots;
    /* While the shell is connected by the key of a SWITCH_KEY: the token of its ROTATE. Borrowed.
     */
    sh_bytes rotate_token;
} sh_node_options;

typedef enum {
    SH_NODE_TIMER,   /* the time that a SET_TIMER asked for has come */
    SH_NODE_LINK_UP, /* the network is there and policy allows it */
    SH_NODE_LINK_DOWN,
    SH_NODE_MESSAGE,   /* bytes from the aggregator */
    SH_NODE_INFERENCE, /* a finished request's record */
    SH_NODE_FEEDBACK,  /* what the user did with it */
    SH_NODE_RATING,    /* the same, by the id of a completion that the store still has */
    SH_NODE_ERASE, /* everything that a user (0: anyone) wrote; a running training is cancelled */
    SH_NODE_JOB_DONE,
    SH_NODE_SIGNALS, /* what the shell sees of its device; the last one counts */
    SH_NODE_ROTATE, /* tell the aggregator the node's next key, until it answers or the core ends */
} sh_node_event_kind;

/* What a user's correction teaches: the tokens that the author really wrote after the context.
 * Rows of one session are consecutive pieces of one text. */
typedef struct {
    uint64_t session;
    uint32_t offset; /* of tokens[0] in the session's text */
    bool accepted;   /* the completion was taken; else it was corrected */
    uint32_t n;
    const int32_t *tokens;
    bool target;    /* false: context only (the start of a text) */
    uint64_t user;  /* hash of the user's name, 0: not said; what SH_NODE_ERASE finds it by */
    uint64_t at_ms; /* when it was taken in; the core's to set */
} sh_feedback;

/* The text of one finished request, kept on the device, within retention, so that feedback by its
 * id can be taken. Ids grow; the shell makes them (above sh_node_status.last_completion). */
#define SH_NODE_COMPLETION_TOKENS_MAX 4096u /* context and proposal together */
typedef struct {
    uint64_t id; /* 0: none is kept */
    uint64_t user, session;
    uint32_t offset;        /* in the session's text, of the end of the prompt */
    uint32_t n_context;     /* the last tokens of the prompt; the core stores those that the last
                               feedback row, if it is of this session, does not reach */
    uint32_t n;             /* what the model proposed */
    const int32_t *tokens;  /* [n_context + n] */
    uint64_t at_ms, record; /* the core's to set: time, sequence of the record */
    uint32_t release_version;
    uint8_t rated; /* sh_feedback_kind */
} sh_completion_row;

/* What the user did with completion `id`. The author's text begins where the prompt ended; without
 * one an accepted completion stands for itself, and a rejected one teaches nothing. */
typedef struct {
    uint64_t id;
    sh_feedback_kind kind; /* accept, edit, reject */
    uint16_t edit_distance;
    uint32_t n;
    const int32_t *tokens;
} sh_rating;

typedef enum { SH_JOB_TRAIN = 1, SH_JOB_INSTALL, SH_JOB_SMOKE, SH_JOB_EVALUATE } sh_node_job_kind;

/* SH_JOB_TRAIN: train an adapter on the feedback that the shell reads from the store (a snapshot),
 * against the active model. SH_JOB_INSTALL: put the chunks together in a slot, check the SHA-256,
 * fsync. SH_JOB_SMOKE: open the slot's model and run a few prompts. SH_JOB_EVALUATE: put the
 * candidate's chunks together in a temporary file, score it and the active model on the held-out
 * sessions of the feedback (sh_learn_evaluate), delete the file. */
typedef struct {
    uint64_t id;
    sh_node_job_kind kind;
    sh_train_plan train;
    uint64_t version;   /* INSTALL, SMOKE */
    uint32_t slot;      /* 0 or 1 */
    sh_blob blob;       /* INSTALL, EVALUATE; chunk_hashes valid during the action */
    uint64_t candidate; /* EVALUATE */
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
    /* EVALUATE */
    uint32_t n_slices;
    sh_slice_score slices[SH_EVALUATION_SLICES_MAX];
} sh_node_job_result;

typedef struct {
    sh_node_event_kind kind;
    uint64_t now_ms;  /* steady */
    uint64_t wall_ms; /* the device's clock; 0: as now_ms */
    sh_bytes message;
    sh_record record;             /* at_ms on the clock of now_ms */
    sh_completion_row completion; /* INFERENCE: id 0 when feedback by id is not wanted */
    sh_feedback feedback;
    sh_rating rating; /* RATING; an id that is not there, or was rated otherwise, is noted and
                         changes nothing: look first (sh_node_get_completion) */
    uint64_t user;    /* ERASE */
    sh_hash key;      /* ROTATE: public half of the next pair, */
    sh_bytes token;   /* and 16 to SH_WIRE_TOKEN_MAX random bytes that prove it later */
    sh_node_job_result result;
    sh_node_signals signals;
} sh_node_event;

typedef enum {
    SH_NODE_SEND = 1,  /* message to the aggregator */
    SH_NODE_SET_TIMER, /* call TIMER at at_ms (replaces the earlier one) */
    SH_NODE_START_JOB,
    SH_NODE_CANCEL_JOB,
    SH_NODE_ACTIVATE,   /* requests that begin from now on use this slot's model */
    SH_NODE_NOTE,       /* for the log: code and a number */
    SH_NODE_SWITCH_KEY, /* the aggregator awaits `key`: make the core again with rotate_token and
                           connect with it. When it is welcomed the old key is no more */
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
    SH_NOTE_CHECKED_IN,    /* a plan came */
    SH_NOTE_EVALUATED,     /* number: candidate */
    SH_NOTE_ERASED,        /* number: rows */
    SH_NOTE_REJECTED,      /* the aggregator does not know this node's key */
    SH_NOTE_TRAIN_STOPPED, /* its policy no longer holds; number: round */
    SH_NOTE_CLOCK_SET,     /* by the aggregator's signed time; number: seconds that it was off */
    SH_NOTE_BUDGET,        /* a byte budget is used up; number: 0 up, 1 down */
    SH_NOTE_MANIFEST_LOST, /* of the release on its way, in the store; number: version */
    SH_NOTE_RENEWED, /* another sender had this epoch, a copy of the store; number: renewals */
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
    sh_hash key; /* SWITCH_KEY */
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
    uint64_t feedback_tokens, outbox_items, outbox_bytes;
    uint64_t dropped[SH_CLASSES];
    uint64_t bad_messages;
    uint64_t last_sync_ms;    /* when the last plan came (wall clock), 0: never */
    uint64_t wall_ms, row_ms; /* the core's wall clock and its rows' at the last step */
    bool clock_trusted;       /* the aggregator's signed time was seen since the start */
    bool holds[SH_POLICIES];
    uint32_t conditions; /* SH_CONDITION_ bits */
    uint64_t bytes_up_day, bytes_up_month, bytes_down_day, bytes_down_month;
    uint64_t refused_full;         /* inferences and items that a full store did not take */
    uint32_t stores_lost;          /* environments set aside as corrupt */
    uint64_t last_completion;      /* the largest id that was ever stored */
    double log_evalue[SH_METRICS]; /* of each detector now */
    uint32_t renewals;             /* new epochs that this store had to take */
    bool link_up, drifting, welcome;
    bool erasing; /* SH_NODE_ERASE goes on with timer events */
} sh_node_status;
sh_node_status sh_node_get_status(const sh_node *node);
/* Why the aggregator did not let this node in when it last asked, in its words; NULL: it did, or
 * has not answered since the start. Until the node's next step. */
const char *sh_node_rejected(const sh_node *node);

/* ---- what reports and the audit read of a node's store ---- */
typedef enum { SH_LEDGER_OWED, SH_LEDGER_ACKED, SH_LEDGER_DROPPED } sh_ledger_state;
/* What became of one update, alarm or evaluation; kept after the outbox has forgotten it. */
typedef struct {
    uint8_t cls;   /* SH_CLASS_UPDATE, SH_CLASS_ALARM */
    uint64_t seq;  /* in this store: without gaps */
    sh_wire_id id; /* on the wire, and at the aggregator */
    sh_ledger_state state;
    sh_hash sha256;               /* of the update's blob, the alarm's payload; evaluation: 0 */
    uint64_t made_ms, settled_ms; /* settled: acknowledged or dropped */
} sh_ledger_row;
SH_MUST_USE sh_status sh_node_each_ledger(sh_txn *txn,
                                          sh_status (*fn)(void *arg, const sh_ledger_row *row),
                                          void *arg, sh_error *err);
/* The epoch of a node's store. SH_ERR_NOT_FOUND when no node was ever made in it. */
SH_MUST_USE sh_status sh_node_stored_epoch(sh_txn *txn, uint64_t *epoch, sh_error *err);
/* The first epoch that it had. Another one than the present: copies of the store may have sent
 * under it, and under those between the two. */
SH_MUST_USE sh_status sh_node_stored_origin(sh_txn *txn, uint64_t *epoch, sh_error *err);

/* The release that was active, and the slot of its file. SH_ERR_NOT_FOUND as above. */
SH_MUST_USE sh_status sh_node_stored_active(sh_txn *txn, uint64_t *version, uint32_t *slot,
                                            sh_error *err);

/* The row of a completion; tokens borrowed from the transaction or `copy` (initialized by the
 * caller). SH_ERR_NOT_FOUND: never there, or past its retention. */
SH_MUST_USE sh_status sh_node_get_completion(sh_txn *txn, uint64_t id, sh_buf *copy,
                                             sh_completion_row *out, sh_error *err);
/* Signed manifest of a slot (0 or 1), in the store's memory: which release lies in it.
 * SH_ERR_NOT_FOUND. */
SH_MUST_USE sh_status sh_node_get_slot(sh_txn *txn, uint32_t slot, sh_bytes *manifest,
                                       sh_error *err);

/* Feedback rows in the store, oldest first, for the training snapshot: fn is called for each. */
SH_MUST_USE sh_status sh_node_each_feedback(sh_txn *txn,
                                            sh_status (*fn)(void *arg, const sh_feedback *row),
                                            void *arg, sh_error *err);

#endif
