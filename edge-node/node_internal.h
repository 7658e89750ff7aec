/*
 * What the node core's files share: its state, and who does what.
 *   node.c          create, step, actions, timer, status
 *   node_state.c    META rows: state, monitor, manifests
 *   node_schema.c   a store of an earlier version becomes one of this
 *   node_rows.c     FEEDBACK, LEDGER, RECORD rows and the readers of them
 *   node_rating.c   COMPLETION rows, and feedback by the id of one
 *   node_erase.c    what leaves by age, and what a user wrote
 *   node_monitor.c  inference records, windows, alarms, feedback
 *   node_sync.c     what the link (shared/sync/link.h) asks: check-in, outbox, chunks
 *   node_release.c  manifests, chunks down, install, smoke, activate, confirm, fall back
 *   node_slots.c    releases whose files are gone
 *   node_clock.c    wall clock, rows' clock, the aggregator's signed time
 *   node_policy.c   what may be done now, by the device's signals
 *   node_budget.c   bytes of a day and a month
 *   node_train.c    training plans and what training made
 *   node_evaluate.c a candidate to score: chunks, job, what it found out
 *
 * node_state is what META "state" holds; the rest of sh_node is volatile: what a crash forgets of
 * it is sent or asked for again.
 */
#ifndef SH_EDGE_NODE_INTERNAL_H
#define SH_EDGE_NODE_INTERNAL_H

#include "edge-node/node.h"
#include "shared/sync/link.h"

#define NODE_NEVER           SH_LINK_NEVER
#define NODE_SLOTS           2
#define NODE_REFUSED_MAX     16u  /* refused versions that are remembered */
#define NODE_JOB_TRIES_MAX   3u   /* of one installation, of one round's training */
#define NODE_NOTES_MAX       24u  /* actions from which on notes are left out */
#define NODE_MONITOR_SAVE    64u  /* inferences between two saves of the monitor */
#define NODE_HEALTHY_NLL_MAX 50.0 /* nats a token: e^50 is past any vocabulary */
#define NODE_CONTEXT_FACTOR  4u   /* all feedback tokens : target tokens */
#define NODE_MANIFEST_MAX    SH_WIRE_MANIFEST_MAX
#define NODE_RETAIN_STEP_MAX 64u   /* rows of a ring that leave by age in a step */
#define NODE_ERASE_STEP_MAX  1024u /* rows that an erasure looks at in a step */
#define NODE_SWEEP_CHUNKS    4096u /* chunks whose use is looked up together */

typedef struct {
    uint64_t version; /* 0: none */
    sh_hash sha256;
    uint64_t bytes;
} node_release;

typedef enum { TAKE_NONE, TAKE_DOWNLOAD, TAKE_INSTALL, TAKE_SMOKE } node_take;

typedef struct {
    uint64_t epoch; /* the first that the store had; the link knows the present one */
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
    /* From version 2 on: */
    uint64_t completion_rows, completion_bytes, last_completion;
    uint64_t last_sync_ms;
    bool erasing; /* of erase_user (0: all), the rows from `at` on and below `end` */
    uint64_t erase_user, erase_feedback_at, erase_feedback_end;
    uint64_t erase_completion_at, erase_completion_end, erased_rows;
    node_release candidate; /* whose chunks are here, or on their way: META "candidate" */
    uint64_t evaluated;     /* the last candidate that was answered */
    uint32_t evaluate_tries;
} node_state;

/* See node_clock.c. Offsets are added to now_ms, modulo 2^64. */
typedef struct {
    uint64_t floor_ms, floor_now_ms;        /* the true time is not before it; that was at */
    uint64_t skew;                          /* the core's wall clock less the device's */
    uint64_t seen_row_ms, seen_wall_ms;     /* both clocks at one moment of the past */
    uint64_t anchor_row_ms, anchor_wall_ms; /* at the last one whose wall clock was signed */
    uint64_t since_ms;                      /* rows' clock when it was first kept */
    uint64_t shell_offset, wall_offset, row_offset;
    uint64_t wall_ms, row_ms;    /* at the last step */
    uint64_t start_ms, off_ms;   /* steady; time off that is not in the rows' clock yet */
    uint64_t saved_ms, asked_ms; /* steady; the last check-in was sent */
    bool trusted, dirty;
} node_clock;

typedef struct {
    sh_node_signals signals;
    uint64_t used_ms, user_ms; /* steady: the last request; what the source of idleness says */
    bool holds[SH_POLICIES];
    uint32_t conditions;
    uint64_t due_ms;  /* when time alone changes it */
    uint64_t plan_ms; /* steady: the last plan came; NODE_NEVER: none since the start */
} node_policy;

typedef struct {
    uint64_t day, month; /* of the rows' clock, local */
    uint64_t up_day, up_month, down_day, down_month;
    uint64_t refused_full;
    bool dirty, told_up, told_down;
    bool now; /* what changed must not be lost: it is saved with this step */
    uint64_t saved_ms;
} node_budget;

struct sh_node {
    sh_node_options options;
    sh_rng rng;
    node_state state;
    sh_monitor *monitor;
    bool dirty, monitor_dirty;

    sh_link link;
    char rejected[SH_WIRE_TEXT_MAX + 1]; /* why, from a refusal to a welcome */
    uint64_t armed_ms;                   /* of the last SET_TIMER */

    uint64_t retain_ms;    /* when a row may be too old (rows' clock) */
    uint64_t evaluate_job; /* id of the running EVALUATE; 0: none */
    bool evaluate;         /* the last plan asked for the candidate */

    sh_hash verified;  /* BLAKE2b-256 of the last manifest whose signature held */
    uint64_t take_job; /* id of the running INSTALL or SMOKE; 0: none */
    uint64_t take_retry_ms;
    uint64_t train_job;     /* id of the running TRAIN; 0: none */
    sh_train_plan training; /* what it runs */
    sh_train_plan plan;     /* the last one that came; train is false when it is done with */

    node_clock clock;
    node_policy policy;
    node_budget budget;
};

typedef struct {
    sh_node *n;
    sh_txn *txn;
    sh_node_actions *actions;
    uint64_t now_ms; /* intervals */
    sh_error *err;
    uint64_t wall_ms, row_ms; /* dates; ages of rows */
} node_step;

/* ---- node.c ---- */
sh_node_action *node_act(node_step *s, sh_node_action_kind kind); /* NULL: the list is full */
void node_note(node_step *s, sh_node_note note, uint64_t number);
static inline const node_release *node_active(const sh_node *n)
{
    return &n->state.slots[n->state.active_slot];
}

/* ---- node_state.c ---- */
sh_status node_state_load(sh_txn *txn, node_state *state, sh_error *err); /* SH_ERR_NOT_FOUND */
sh_status node_state_save(node_step *s);
sh_status node_monitor_load(node_step *s);
extern const char node_meta_take[], node_meta_slot0[], node_meta_slot1[];
sh_status node_manifest_put(node_step *s, const char *key, sh_bytes manifest);
sh_status node_manifest_del(node_step *s, const char *key);
/* sh_manifest_verify with the release key, which is spared what it passed last: every plan brings
 * the same manifest again. */
sh_status node_manifest_verify(sh_node *n, sh_bytes bytes, sh_manifest *out, sh_error *err);
/* The manifest being taken; *copy holds its bytes (the caller's to release). SH_ERR_NOT_FOUND
 * without an error's text: what the store has is not that, for it was damaged; node_take_lost. */
sh_status node_manifest_take(node_step *s, sh_buf *copy, sh_manifest *out);

/* The plan of META "candidate"; *copy holds its chunks' hashes (initialized here, the caller's). */
sh_status node_candidate_load(node_step *s, sh_buf *copy, sh_evaluate_plan *out);
sh_status node_candidate_put(node_step *s, const sh_evaluate_plan *plan);
sh_status node_candidate_del(node_step *s);

/* ---- node_schema.c ---- */
/* Makes the store one of this version, or fails: a newer one is not for us. */
sh_status node_schema_open(node_step *s);

/* ---- node_rows.c ---- */
static inline void node_put_le(uint8_t *out, uint64_t x, size_t width)
{
    for (size_t i = 0; i < width; i++)
        out[i] = (uint8_t)(x >> (8 * i));
}
static inline uint64_t node_get_le(const uint8_t *in, size_t width)
{
    uint64_t x = 0;
    for (size_t i = 0; i < width; i++)
        x |= (uint64_t)in[i] << (8 * i);
    return x;
}
sh_status node_row_put(node_step *s, unsigned table, uint64_t seq, const void *value, size_t n);
sh_status node_row_del(node_step *s, unsigned table, uint64_t seq);
/* The first row of a table with a sequence >= from. SH_ERR_NOT_FOUND without an error's text. */
sh_status node_row_next(node_step *s, unsigned table, uint64_t from, uint64_t *seq,
                        sh_slice *value);
uint64_t node_records_max(const sh_node *n); /* by count and by bytes */
/* Tokens stay NULL. */
sh_status node_feedback_head(sh_slice value, sh_feedback *out, sh_error *err);
/* The last row of all. SH_ERR_NOT_FOUND when there is none. */
sh_status node_feedback_last(node_step *s, sh_feedback *out);
sh_status node_feedback_del(node_step *s, uint64_t seq, const sh_feedback *row);
/* Rewrites row `seq` as the present version, as if taken in now. */
sh_status node_feedback_migrate(node_step *s, uint64_t seq);
sh_status node_record_put(node_step *s, const sh_record *record);
sh_status node_feedback_put(node_step *s, const sh_feedback *feedback);
sh_status node_window_put(node_step *s, const sh_window *window);
sh_status node_ledger_add(node_step *s, sh_class cls, uint64_t seq, const sh_hash *sha256);
sh_status node_ledger_settle(node_step *s, sh_class cls, uint64_t seq, sh_ledger_state how);

/* ---- node_rating.c ---- */
sh_status node_completion_put(node_step *s, const sh_completion_row *row);
/* Tokens stay NULL. */
sh_status node_completion_head(uint64_t id, sh_slice value, sh_completion_row *out, sh_error *err);
sh_status node_completion_del(node_step *s, uint64_t id, size_t bytes);
sh_status node_on_rating(node_step *s, const sh_rating *rating);

/* ---- node_erase.c ---- */
sh_status node_on_erase(node_step *s, uint64_t user);
sh_status node_erase_advance(node_step *s);
/* A row that is too old after age_ms (0: never) was put. */
void node_retain_from(node_step *s, uint64_t age_ms);
sh_status node_retain(node_step *s);

/* ---- node_monitor.c ---- */
sh_status node_on_inference(node_step *s, const sh_record *record,
                            const sh_completion_row *completion);
sh_status node_on_feedback(node_step *s, const sh_feedback *feedback);
sh_status node_take_window(node_step *s, sh_window_result *closed);
sh_status node_monitor_timer(node_step *s);
uint64_t node_monitor_due(const sh_node *n);
void node_monitor_release(node_step *s); /* the active release has changed */

/* ---- node_sync.c ---- */
sh_status node_on_message(node_step *s, sh_bytes message);
void node_on_link(node_step *s, bool up);
void node_on_rotate(node_step *s, const sh_hash *key, sh_bytes token);
sh_status node_pump(node_step *s);
sh_link_step node_link(node_step *s);
sh_status node_link_open(node_step *s);
void node_checkin_soon(node_step *s);
sh_status node_outbox_put(node_step *s, sh_class cls, sh_item_kind kind, sh_bytes payload);
/* Deletes those chunks of blob that neither `keep` (may be NULL) nor the release being taken nor
 * the candidate nor an owed update other than `except` (a sequence, 0: none) needs. */
sh_status node_chunks_delete(node_step *s, const sh_blob *blob, uint64_t except,
                             const sh_blob *keep);
sh_status node_chunks_sweep(node_step *s, const sh_blob *keep); /* the same of all that are here */

/* ---- node_release.c ---- */
sh_status node_on_manifest(node_step *s, sh_bytes manifest);
/* Chunks that the release being taken lacks, or else the candidate; see sh_link_callbacks. */
sh_status node_missing(node_step *s, uint8_t *hashes, uint32_t max, uint32_t *n);
/* The manifest being taken is lost: forgets that release, and every chunk that nothing else needs;
 * the next plan brings its manifest again. `next`, whose chunks stay, may be NULL. */
sh_status node_take_lost(node_step *s, const sh_blob *next);
sh_status node_take_advance(node_step *s);
sh_status node_take_done(node_step *s, const sh_node_job_result *result);
sh_status node_activate(node_step *s);
sh_status node_slots_lost(node_step *s, sh_bytes genesis); /* options.lost_slots */
sh_status node_judge_health(node_step *s, const sh_record *record);

/* ---- node_train.c ---- */
void node_on_train_plan(node_step *s, const sh_train_plan *plan);
SH_MUST_USE sh_status node_train_consider(node_step *s);
void node_train_cancel(node_step *s);
sh_status node_train_done(node_step *s, const sh_node_job_result *result);

/* ---- node_clock.c ---- */
sh_status node_clock_open(node_step *s);                       /* of create: fills s's dates */
void node_clock_step(node_step *s, uint64_t wall_ms);          /* of an event: the same */
sh_status node_clock_stamp(node_step *s, sh_bytes stamp);      /* SH_ERR_AUTH, SH_ERR_INVALID */
uint64_t node_clock_steady(const sh_node *n, uint64_t row_ms); /* when the rows' clock says so */
/* When a row was made: one that a clock that was wrong put into the future counts from the day that
 * this was seen. */
uint64_t node_clock_row(const node_step *s, uint64_t at_ms);
bool node_clock_is_off(const sh_node *n);
sh_status node_clock_save(node_step *s);

/* ---- node_policy.c ---- */
void node_policy_init(node_step *s);
/* Takes in what the event says of the device, finds what holds now, stops and wakes by it. */
sh_status node_policy_update(node_step *s, const sh_node_event *event);
bool node_policy_holds(const sh_node *n, sh_policy_kind kind);
void node_policy_gates(sh_node *n);                /* tells the link what may go out now */
uint32_t node_policy_conditions(const sh_node *n); /* SH_CONDITION_ bits */
void node_policy_fill(const sh_node *n, sh_msg_checkin *checkin);

/* ---- node_budget.c ---- */
sh_status node_budget_open(node_step *s);
void node_budget_roll(node_step *s); /* a new day or month */
void node_budget_count(node_step *s, bool up, size_t bytes);
bool node_budget_bulk_up(const sh_node *n);
bool node_budget_small_up(const sh_node *n);
uint32_t node_budget_chunks_down(const sh_node *n); /* that fit */
bool node_budget_is_used_up(const sh_node *n);
uint64_t node_budget_due(const sh_node *n); /* the next period, when something waits for it */
sh_status node_budget_save(node_step *s);

/* ---- node_evaluate.c ---- */
sh_status node_on_evaluate_plan(node_step *s, const sh_evaluate_plan *plan);
sh_status node_evaluate_advance(node_step *s);
sh_status node_evaluate_done(node_step *s, const sh_node_job_result *result);
void node_evaluate_stop(node_step *s); /* cancels; until a plan asks for it again */
/* Forgets the candidate and those of its chunks that `next` (may be NULL) does not share. */
sh_status node_candidate_drop(node_step *s, const sh_blob *next);

#endif
