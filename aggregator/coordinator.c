/* The coordinator's frame: create from the store, step, actions, status. */
#include "aggregator/coordinator.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define PURPOSE_EPOCH 0x65706f63u /* stream of rng that a new store's epoch comes from */

const char *const sh_coord_tables[SH_COORD_TABLES] = {
    [SH_COORD_T_META] = "meta",   [SH_COORD_T_NODE] = "node",
    [SH_COORD_T_INBOX] = "inbox", [SH_COORD_T_UPDATE] = "update",
    [SH_COORD_T_ALARM] = "alarm", [SH_COORD_T_WINDOW] = "window",
    [SH_COORD_T_CHUNK] = "chunk", [SH_COORD_T_RELEASE] = "release",
    [SH_COORD_T_AUDIT] = "audit", [SH_COORD_T_EVALUATION] = "evaluation",
    [SH_COORD_T_EPOCH] = "epoch", [SH_COORD_T_ACCESS] = "access",
    [SH_COORD_T_PART] = "part",   [SH_COORD_T_OUTBOX] = "outbox",
};

const char *sh_reason_name(sh_reason reason)
{
    static const char *const names[SH_REASONS] = {
        [SH_REASON_NONE] = "none",
        [SH_REASON_NORM] = "norm",
        [SH_REASON_DIRECTION] = "direction",
        [SH_REASON_STALE] = "stale",
        [SH_REASON_BASE] = "base",
        [SH_REASON_BAD_BLOB] = "bad-blob",
        [SH_REASON_NOT_FINITE] = "not-finite",
        [SH_REASON_GATE] = "gate",
        [SH_REASON_CLOSED] = "closed",
        [SH_REASON_REVOKED] = "revoked",
        [SH_REASON_TWICE] = "twice",
        [SH_REASON_RELAY] = "not-a-relay",
    };
    return (unsigned)reason < SH_REASONS ? names[reason] : "unknown";
}

/* ---- actions ---- */

void sh_coord_actions_clear(sh_coord_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++) {
        sh_buf_release(&actions->items[i].message);
        free(actions->items[i].job.inputs);
    }
    actions->n = 0;
}

static sh_coord_action *add_action(coord_step *s, sh_coord_action_kind kind)
{
    SH_ASSERT(s->actions->n < SH_COORD_ACTIONS_MAX); /* every path is bounded below this */
    sh_coord_action *action = &s->actions->items[s->actions->n++];
    *action = (sh_coord_action){.kind = kind};
    return action;
}

void coord_note(coord_step *s, sh_coord_note note, const sh_hash *node, uint64_t number)
{
    if (s->notes >= COORD_NOTES_MAX) /* notes are for the log; rows and counters have it all */
        return;
    s->notes++;
    sh_coord_action *action = add_action(s, SH_COORD_NOTE);
    action->note = note;
    action->number = number;
    if (node != NULL)
        action->node = *node;
}

sh_status coord_send(coord_step *s, const sh_hash *node, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_msg versioned = *msg; /* its texts are not in its own storage: nothing of it was decoded */
    versioned.version = s->version;
    sh_status status = sh_msg_encode(&versioned, &bytes, s->err);
    if (status != SH_OK) {
        sh_buf_release(&bytes);
        return status;
    }
    sh_coord_action *action = add_action(s, SH_COORD_SEND);
    action->node = sh_hash_equal(node, &s->node) ? s->from : *node;
    action->message = bytes;
    action->early = msg->type == SH_MSG_WANT;
    return SH_OK;
}

sh_status coord_send_error(coord_step *s, const sh_hash *node, sh_status code, const char *text)
{
    return coord_send_retry(s, node, code, text, s->c->options.checkin_ms);
}

sh_status coord_send_retry(coord_step *s, const sh_hash *node, sh_status code, const char *text,
                           uint64_t retry_after_ms)
{
    char cut[SH_WIRE_TEXT_MAX];
    size_t n = strnlen(text, sizeof cut - 1);
    memcpy(cut, text, n);
    cut[n] = '\0';
    sh_msg msg = {
        .type = SH_MSG_ERROR,
        .error = {.code = sh_status_name(code), .text = cut, .retry_after_ms = retry_after_ms}};
    return coord_send(s, node, &msg);
}

void coord_send_up(coord_step *s, sh_buf *message)
{
    sh_coord_action *action = add_action(s, SH_COORD_SEND_UP);
    action->message = *message;
    *message = (sh_buf){0};
}

void coord_set_key(coord_step *s, const sh_hash *key, sh_key_access access)
{
    sh_coord_action *action = add_action(s, SH_COORD_KEY);
    action->node = *key;
    action->access = access;
}

void coord_drop_peer(coord_step *s, const sh_hash *key)
{
    add_action(s, SH_COORD_DROP)->node = *key;
}

void coord_drop_others(coord_step *s)
{
    sh_coord_action *action = add_action(s, SH_COORD_DROP_OTHERS);
    action->node = s->from;
    action->connection = s->connection;
}

sh_status coord_set_timer(coord_step *s, uint64_t at_ms)
{
    add_action(s, SH_COORD_SET_TIMER)->at_ms = at_ms;
    return SH_OK;
}

sh_status coord_start_job(coord_step *s)
{
    sh_coord *c = s->c;
    const coord_candidate *candidate = &c->candidate;
    bool merge = c->state.phase == PHASE_MERGING;
    sh_coord_job job = {.id = c->state.next_job++,
                        .kind = merge ? SH_COORD_MERGE : SH_COORD_GATE,
                        .candidate = candidate->number,
                        .parent_version = candidate->parent_version,
                        .parent_model = c->kept[0].manifest.model.sha256,
                        .master = c->kept[0].master,
                        .server_scale = candidate->scale,
                        .norm_factor_max = c->options.norm_factor_max,
                        .cosine_min = c->options.cosine_min};
    if (merge) {
        job.n_inputs = candidate->n_inputs;
        job.inputs = sh_calloc(candidate->n_inputs, sizeof *job.inputs);
        if (job.inputs == NULL)
            return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a job");
        memcpy(job.inputs, candidate->inputs, candidate->n_inputs * sizeof *job.inputs);
    } else {
        job.candidate_model = candidate->sha256;
    }
    if (c->relay != NULL)
        coord_relay_job(c, &job);
    add_action(s, SH_COORD_START_JOB)->job = job;
    c->job_id = job.id;
    c->retry_at_ms = 0;
    c->dirty = true;
    return SH_OK;
}

/* ---- create ---- */

static sh_status check_options(const sh_coord_options *o, sh_error *err)
{
    if (o->buffer == 0 || o->buffer > SH_COORD_BUFFER_MAX)
        return sh_fail(err, SH_ERR_INVALID, "coordinator: a buffer of %u updates is not in 1 to %u",
                       o->buffer, SH_COORD_BUFFER_MAX);
    if (!(o->staleness_discount > 0 && o->staleness_discount <= 1))
        return sh_fail(err, SH_ERR_INVALID,
                       "coordinator: a staleness discount of %g is not in "
                       "(0, 1]",
                       (double)o->staleness_discount);
    if (!isfinite(o->server_scale) || o->server_scale <= 0)
        return sh_fail(err, SH_ERR_INVALID, "coordinator: a server scale of %g is not above 0",
                       (double)o->server_scale);
    if (o->chunk_budget == 0 || o->checkin_ms == 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "coordinator: the chunk budget and the time between "
                       "check-ins must be above 0");
    if (o->relay && (o->relay_retry_min_ms == 0 || o->relay_retry_max_ms < o->relay_retry_min_ms))
        return sh_fail(
            err, SH_ERR_INVALID, "coordinator: a relay's retries of %llu to %llu ms are no range",
            (unsigned long long)o->relay_retry_min_ms, (unsigned long long)o->relay_retry_max_ms);
    if (!(o->load_share >= 0 && o->load_share <= 1))
        return sh_fail(err, SH_ERR_INVALID, "coordinator: a load share of %g is not in [0, 1]",
                       o->load_share);
    if (isnan(o->gate_overall_max) || isnan(o->gate_slice_max))
        return sh_fail(err, SH_ERR_INVALID, "coordinator: the gate's limits are not numbers");
    if (o->canary_nodes_min > COORD_EVALUATIONS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "coordinator: %u canary nodes are not in 0 to %u",
                       o->canary_nodes_min, COORD_EVALUATIONS_MAX);
    if (o->canary_nodes_min > 0 && !(o->canary_share > 0 && o->canary_share <= 1))
        return sh_fail(err, SH_ERR_INVALID, "coordinator: a canary share of %g is not in (0, 1]",
                       o->canary_share);
    if (o->canary_nodes_min > 0 && o->canary_ms_max == 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "coordinator: the time that canary nodes have must be above 0");
    return coord_limit_check(o, err);
}

typedef struct {
    sh_coord *c;
    sh_txn *txn;
    uint64_t now_ms;
    sh_error *err;
} loading;

static sh_status load_node(void *arg, const sh_node_row *row)
{
    const loading *l = arg;
    sh_coord *c = l->c;
    uint32_t drifting = 0;
    if (row->revoked)
        return SH_OK;
    coord_admit_load(c, row->last_ms, l->now_ms);
    SH_TRY(coord_drifting(l->txn, &row->key, &row->checkin, &drifting, l->err));
    c->enrolled++;
    c->drifting += drifting;
    return SH_OK;
}

static sh_status load_update(void *arg, const sh_update_row *row)
{
    loading *l = arg;
    sh_coord *c = l->c;
    if (row->verdict != SH_VERDICT_PENDING)
        return SH_OK;
    if (sh_array_reserve((void **)&c->pending, &c->pending_cap, c->n_pending + 1,
                         sizeof *c->pending, SH_COORD_BUFFER_MAX) != SH_OK)
        return sh_fail(l->err, SH_ERR_NO_MEMORY, "coordinator: no memory for the buffer");
    c->parts += coord_parts_of(&row->meta);
    c->pending[c->n_pending++] = row->id; /* rows come in the order of their keys */
    return coord_chunks_hold(c, row->meta.blob.chunk_hashes, row->meta.blob.n_chunks, l->err);
}

static sh_status load_all(coord_step *s, const sh_genesis *genesis)
{
    sh_coord *c = s->c;
    sh_txn *txn = s->txn;
    sh_error *err = s->err;
    loading l = {.c = c, .txn = txn, .now_ms = s->now_ms, .err = err};
    SH_TRY(coord_releases_load(c, txn, err));
    if (genesis != NULL) {
        sh_release_row row;
        SH_TRY(coord_candidate_row_get(txn, 0, &row, err));
        free(row.merged);
        sh_hash sha256 = sh_sha256(genesis->model.data, genesis->model.n);
        if (!sh_hash_equal(&sha256, &row.sha256))
            return sh_fail(err, SH_ERR_MISMATCH,
                           "coordinator: the store began with another model "
                           "than this genesis release");
    }
    SH_TRY(coord_waiting_load(c, txn, s->now_ms, err));
    SH_TRY(coord_relays_count(c, txn, err));
    c->n_evaluations = (uint32_t)sh_txn_count(txn, SH_COORD_T_EVALUATION);
    SH_TRY(sh_coord_each_node(txn, load_node, &l, err));
    SH_TRY(coord_tokens_load(c, txn, err));
    return sh_coord_each_update(txn, load_update, &l, err);
}

static sh_status begin_new(coord_step *s, const sh_genesis *genesis)
{
    sh_coord *c = s->c;
    sh_rng rng;
    if (genesis == NULL)
        return sh_fail(s->err, SH_ERR_NOT_FOUND,
                       "coordinator: the store is empty and no genesis release is given");
    c->state.seed = sh_rng_u64(&c->rng);
    sh_rng_init(&rng, c->state.seed, 0, PURPOSE_EPOCH);
    c->state.epoch = sh_rng_u64(&rng);
    c->state.next_candidate = 1;
    c->state.next_job = 1;
    c->state.server_scale = c->options.server_scale;
    SH_TRY(coord_schema_put(s->txn, s->err));
    return coord_genesis(s, genesis);
}

/* A store of version 1 or 2 has rows that are read as they are, but for the epochs of its nodes,
 * which get rows of their own at once; its state is written anew, with what was added since. Other
 * rows follow as they change. `from` 0: version 1, which had no row that says so. */
static sh_status migrate(coord_step *s, uint32_t from)
{
    sh_coord *c = s->c;
    if (from == 0)
        c->state.epoch = sh_rng_u64(&c->rng);
    SH_TRY(coord_schema_put(s->txn, s->err));
    if (c->state.phase != PHASE_IDLE)
        SH_TRY(coord_candidate_save(s));
    SH_TRY(coord_epochs_migrate(s));
    return coord_audit(s, "schema from=%u to=%u", SH_MAX(from, 1u), COORD_SCHEMA);
}

/* A clock that was set back stretches nothing. */
static void check_times(coord_step *s)
{
    sh_coord *c = s->c;
    coord_state *state = &c->state;
    state->round_at_ms = SH_MIN(state->round_at_ms, s->now_ms);
    state->held_until_ms = SH_MIN(state->held_until_ms, s->now_ms + c->options.round_ms_max);
    c->candidate.until_ms = SH_MIN(c->candidate.until_ms, s->now_ms + c->options.canary_ms_max);
}

static sh_status begin(coord_step *s, const sh_genesis *genesis)
{
    sh_coord *c = s->c;
    bool found = false;
    uint32_t schema = 0;
    uint64_t backup_ms = 0;
    SH_TRY(coord_schema_get(s->txn, &schema, s->err));
    SH_TRY(coord_state_load(c, s->txn, &found, s->err));
    if (found) {
        SH_TRY(load_all(s, genesis));
        if (schema < COORD_SCHEMA)
            SH_TRY(migrate(s, schema));
        check_times(s);
        SH_TRY(coord_backup_mark_take(s->txn, &backup_ms, s->err));
        if (backup_ms != 0)
            SH_TRY(coord_restored(s, backup_ms));
    } else {
        SH_TRY(begin_new(s, genesis));
    }
    SH_TRY(coord_relay_open(s, !found));
    SH_TRY(coord_begin_rounds(s));
    if (c->state.phase == PHASE_EVALUATING)
        SH_TRY(coord_canary_consider(s));
    else if (c->state.phase != PHASE_IDLE)
        SH_TRY(coord_start_job(s)); /* what a crash forgot */
    else
        SH_TRY(coord_advance(s));
    if (c->relay != NULL)
        SH_TRY(coord_relay_end(s));
    return c->dirty ? coord_state_save(c, s->txn, s->err) : SH_OK;
}

sh_status sh_coord_create(const sh_coord_options *options, const sh_genesis *genesis,
                          uint64_t now_ms, const sh_rng *rng, sh_txn *txn,
                          sh_coord_actions *actions, sh_coord **out, sh_error *err)
{
    SH_TRY(check_options(options, err));
    sh_coord *c = sh_calloc(1, sizeof *c);
    if (c == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory");
    c->options = *options;
    c->rng = *rng;
    coord_step s = {.c = c, .txn = txn, .actions = actions, .now_ms = now_ms, .err = err};
    sh_status status = coord_limit_init(c, err);
    if (status == SH_OK)
        status = begin(&s, genesis);
    if (status != SH_OK) {
        sh_coord_destroy(&c);
        return status;
    }
    *out = c;
    return SH_OK;
}

void sh_coord_destroy(sh_coord **coord)
{
    sh_coord *c = *coord;
    if (c == NULL)
        return;
    coord_relay_close(c);
    coord_candidate_release(&c->candidate);
    for (size_t i = 0; i < COORD_RELEASES_KEPT; i++)
        coord_release_release(&c->kept[i]);
    coord_waiting_release(c);
    coord_chunks_release(&c->chunks);
    coord_admit_release(&c->admission);
    free(c->pending);
    free(c->buckets);
    free(c);
    *coord = NULL;
}

/* ---- step ---- */

static sh_status on_timer(coord_step *s)
{
    sh_coord *c = s->c;
    if (c->state.phase == PHASE_EVALUATING)
        return coord_canary_consider(s);
    if (c->state.phase == PHASE_IDLE)
        return c->state.held ? coord_advance(s) : SH_OK;
    if (c->retry_at_ms == 0 || c->job_id != 0)
        return SH_OK;
    if (s->now_ms < c->retry_at_ms)
        return coord_set_timer(s, c->retry_at_ms);
    return coord_start_job(s);
}

sh_status sh_coord_step(sh_coord *coord, const sh_coord_event *event, sh_txn *txn,
                        sh_coord_actions *actions, sh_error *err)
{
    coord_step s = {
        .c = coord, .txn = txn, .actions = actions, .now_ms = event->now_ms, .err = err};
    switch (event->kind) {
    case SH_COORD_TIMER:
        SH_TRY(on_timer(&s));
        break;
    case SH_COORD_MESSAGE:
        s.connection = event->connection;
        SH_TRY(coord_on_message(&s, &event->node, event->message, event->checked));
        break;
    case SH_COORD_GONE:
        SH_TRY(coord_sender_find(&s, &event->node));
        coord_on_gone(coord, &s.node);
        break;
    case SH_COORD_JOB_DONE:
        SH_TRY(coord_on_job(&s, &event->result));
        break;
    case SH_COORD_COMMAND:
        SH_TRY(coord_on_command(&s, event));
        break;
    case SH_COORD_PARENT_UP:
    case SH_COORD_PARENT_DOWN:
    case SH_COORD_PARENT_MESSAGE:
        SH_TRY(coord_relay_event(&s, event));
        break;
    }
    if (coord->relay != NULL)
        SH_TRY(coord_relay_end(&s));
    return coord->dirty ? coord_state_save(coord, txn, err) : SH_OK;
}

sh_coord_status sh_coord_get_status(const sh_coord *c)
{
    const coord_state *state = &c->state;
    sh_coord_status status = {.version = state->version,
                              .releases = state->releases,
                              .candidates_refused = state->candidates_refused,
                              .candidates_inconclusive = state->candidates_inconclusive,
                              .enrolled = c->enrolled,
                              .round = state->round,
                              .buffered = (uint32_t)c->n_pending,
                              .updates_in = state->updates_in,
                              .updates_merged = state->updates_merged,
                              .merging = state->phase == PHASE_MERGING,
                              .gating = state->phase == PHASE_GATING,
                              .evaluating = state->phase == PHASE_EVALUATING,
                              .candidate = c->candidate.number,
                              .evaluations = c->n_evaluations,
                              .epoch = state->epoch,
                              .rounds_begun = state->rounds_begun,
                              .paused = state->paused,
                              .closing = state->closing,
                              .closed = state->closed,
                              .drifting = c->drifting,
                              .server_scale = state->server_scale,
                              .bad_messages = state->bad_messages,
                              .clones = state->clones,
                              .waiting = (uint32_t)c->n_waiting,
                              .asked_bytes = c->asked_bytes,
                              .chunk_names = c->chunks.n,
                              .told_later = c->admission.told,
                              .return_ms = coord_admit_return_ms(c),
                              .parts = c->parts,
                              .relays = c->relays,
                              .rotations = state->rotations,
                              .token_enrolments = state->token_enrolments,
                              .tokens_refused = state->tokens_refused,
                              .tokens = c->n_tokens,
                              .tokens_until_ms = c->tokens_until_ms,
                              .commands_refused = c->commands_refused,
                              .limited = c->limited,
                              .disconnected = c->disconnected};
    memcpy(status.updates_refused, state->updates_refused, sizeof status.updates_refused);
    if (c->relay != NULL)
        coord_relay_status(c, &status);
    return status;
}
