/*
 * What the node core's files share: its state, and who does what.
 *   node.c          create, step, actions, timer, status
 *   node_state.c    META rows: state, monitor, manifests
 *   node_rows.c     FEEDBACK, LEDGER, RECORD rows and the readers of them
 *   node_monitor.c  inference records, windows, alarms, feedback
 *   node_sync.c     messages, check-in, outbox, chunks up
 *   node_release.c  manifests, chunks down, install, smoke, activate, confirm, fall back
 *   node_train.c    training plans and what training made
 *
 * node_state is what META "state" holds; the rest of sh_node is volatile: what a crash forgets of
 * it is sent or asked for again.
 */
#ifndef SH_EDGE_NODE_INTERNAL_H
#define SH_EDGE_NODE_INTERNAL_H

#include "edge-node/node.h"
#include "shared/sync/sync.h"

#define NODE_NEVER           UINT64_MAX
#define NODE_SLOTS           2
#define NODE_REFUSED_MAX     16u /* refused versions that are remembered */
#define NODE_JOB_TRIES_MAX   3u  /* of one installation, of one round's training */
#define NODE_IN_FLIGHT_MAX   16u /* items sent and not acknowledged */
#define NODE_SERVE_MAX       (2 * SH_WIRE_WANT_MAX) /* chunks asked of us and not yet sent */
#define NODE_SERVE_STEP_MAX  16u                    /* chunks sent a step: 1 MiB */
#define NODE_WANT_MIN        8u  /* chunks asked for at a time, after the peer sent fewer */
#define NODE_NOTES_MAX       24u /* actions from which on notes are left out */
#define NODE_RETURN_MIN_MS   100u
#define NODE_RETURN_MAX_MS   (7u * 24 * 3600 * 1000)
#define NODE_MONITOR_SAVE    64u  /* inferences between two saves of the monitor */
#define NODE_HEALTHY_NLL_MAX 50.0 /* nats a token: e^50 is past any vocabulary */
#define NODE_CONTEXT_FACTOR  4u   /* all feedback tokens : target tokens */
#define NODE_MANIFEST_MAX    SH_WIRE_MANIFEST_MAX

typedef struct {
    uint64_t version; /* 0: none */
    sh_hash sha256;
    uint64_t bytes;
} node_release;

typedef enum { TAKE_NONE, TAKE_DOWNLOAD, TAKE_INSTALL, TAKE_SMOKE } node_take;

typedef struct {
    uint64_t epoch;
    uint32_t active_slot;
    node_release slots[NODE_SLOTS];
    uint64_t confirmed_version;
    uint32_t healthy; /* inferences of the active release, until it is confirmed */
    uint32_t take;    /* node_take: what becomes of `taking`, whose manifest is META "take" */
    uint32_t take_tries;
    node_release taking;
    uint64_t refused[NODE_REFUSED_MAX]; /* a ring */
    uint32_t refused_at;
    uint32_t trained_round, try_round, tries;
    uint64_t next_job;
    uint64_t record_first, record_next; /* sequences: [first, next) are stored */
    uint64_t feedback_first, feedback_next;
    uint64_t feedback_rows, feedback_tokens; /* targets */
    uint64_t feedback_all_tokens;
    uint64_t window_first, window_next; /* indices stored */
    uint64_t monitor_seq;               /* records up to this one are in META "monitor" */
    uint64_t window_open_ms;            /* first record of the open window; 0: none */
    uint32_t alarm_mask;                /* metrics whose alarm was told for this release */
    bool drifting;
    uint64_t inferences, windows, alarms, first_alarm_window;
    uint64_t updates_made, updates_acked, bad_messages;
} node_state;

typedef struct {
    uint64_t due_ms; /* NODE_NEVER: nothing is to be sent */
    uint32_t attempt;
} node_retry;

typedef enum {
    LINK_DOWN,
    LINK_TRYING /* enrolment sent, the rest goes on */,
    LINK_WELCOME,
    LINK_REJECTED
} node_link;

typedef struct {
    bool used;
    uint8_t cls;
    uint64_t seq;
    node_retry retry;
} node_in_flight;

struct sh_node {
    sh_node_options options;
    sh_rng rng;
    node_state state;
    sh_monitor *monitor;
    bool dirty, monitor_dirty;
    sh_outbox_counts counts;

    node_link link;
    uint64_t armed_ms; /* of the last SET_TIMER */
    uint64_t hold_ms;  /* the aggregator asked for quiet until then */
    node_retry enrol, checkin, want;
    node_in_flight in_flight[NODE_IN_FLIGHT_MAX];
    uint64_t send_from[SH_CLASSES]; /* lower sequences were sent since the link came up */
    uint8_t serve[NODE_SERVE_MAX * sizeof(sh_hash)];
    uint32_t n_serve;
    uint8_t asked[SH_WIRE_WANT_MAX * sizeof(sh_hash)];
    uint32_t n_asked, asked_got, want_size;

    uint64_t take_job; /* id of the running INSTALL or SMOKE; 0: none */
    uint64_t take_retry_ms;
    uint64_t train_job;     /* id of the running TRAIN; 0: none */
    sh_train_plan training; /* what it runs */
    sh_train_plan plan;     /* the last one that came; train is false when it is done with */
};

typedef struct {
    sh_node *n;
    sh_txn *txn;
    sh_node_actions *actions;
    uint64_t now_ms;
    sh_error *err;
} node_step;

/* ---- node.c ---- */
sh_node_action *node_act(node_step *s, sh_node_action_kind kind); /* NULL: the list is full */
void node_note(node_step *s, sh_node_note note, uint64_t number);
sh_status node_send(node_step *s, const sh_msg *msg);
bool node_may_send(const node_step *s); /* there is a link and room in the list */
/* Sets the time of the next try: retry_min, which an answer may take, and full jitter. */
void node_retry_arm(node_step *s, node_retry *retry);
static inline const node_release *node_active(const sh_node *n)
{
    return &n->state.slots[n->state.active_slot];
}

/* ---- node_state.c ---- */
sh_status node_state_load(sh_txn *txn, node_state *state, sh_error *err); /* SH_ERR_NOT_FOUND */
sh_status node_state_save(node_step *s);
sh_status node_monitor_load(node_step *s);
sh_status node_epoch_save(node_step *s);
extern const char node_meta_take[], node_meta_slot0[], node_meta_slot1[];
sh_status node_manifest_put(node_step *s, const char *key, sh_bytes manifest);
sh_status node_manifest_del(node_step *s, const char *key);
/* The manifest being taken; *copy holds its bytes (the caller's to release). */
sh_status node_manifest_take(node_step *s, sh_buf *copy, sh_manifest *out);

/* ---- node_rows.c ---- */
sh_status node_record_put(node_step *s, const sh_record *record);
sh_status node_feedback_put(node_step *s, const sh_feedback *feedback);
sh_status node_window_put(node_step *s, const sh_window *window);
sh_status node_ledger_add(node_step *s, sh_class cls, uint64_t seq, const sh_hash *sha256);
sh_status node_ledger_settle(node_step *s, sh_class cls, uint64_t seq, sh_ledger_state how);

/* ---- node_monitor.c ---- */
sh_status node_on_inference(node_step *s, const sh_record *record);
sh_status node_on_feedback(node_step *s, const sh_feedback *feedback);
sh_status node_take_window(node_step *s, const sh_window_result *closed);
sh_status node_monitor_timer(node_step *s);
uint64_t node_monitor_due(const sh_node *n);
void node_monitor_release(node_step *s); /* the active release has changed */

/* ---- node_sync.c ---- */
sh_status node_on_message(node_step *s, sh_bytes message);
void node_on_link(node_step *s, bool up);
sh_status node_pump(node_step *s);
uint64_t node_sync_due(const sh_node *n);
void node_checkin_soon(node_step *s);
sh_status node_outbox_put(node_step *s, sh_class cls, sh_item_kind kind, sh_bytes payload);
/* Deletes those chunks of blob that neither `keep` (may be NULL) nor the release being taken nor an
 * owed update other than `except` (a sequence, 0: none) needs. */
sh_status node_chunks_delete(node_step *s, const sh_blob *blob, uint64_t except,
                             const sh_blob *keep);

/* ---- node_release.c ---- */
sh_status node_on_manifest(node_step *s, sh_bytes manifest);
sh_status node_on_chunk(node_step *s, const sh_msg_chunk *chunk);
sh_status node_want(node_step *s);
sh_status node_take_advance(node_step *s);
sh_status node_take_done(node_step *s, const sh_node_job_result *result);
sh_status node_activate(node_step *s);
sh_status node_judge_health(node_step *s, const sh_record *record);

/* ---- node_train.c ---- */
void node_on_train_plan(node_step *s, const sh_train_plan *plan);
void node_train_consider(node_step *s);
void node_train_cancel(node_step *s);
sh_status node_train_done(node_step *s, const sh_node_job_result *result);

#endif
