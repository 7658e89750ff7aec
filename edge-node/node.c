#include "edge-node/node_internal.h"

#include <stdlib.h>

const char *const sh_node_tables[SH_NODE_TABLES] = {"meta",   "record", "feedback", "window",
                                                    "outbox", "chunk",  "ledger",   "completion"};

void sh_node_actions_clear(sh_node_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++) {
        sh_buf_release(&actions->items[i].message);
        sh_buf_release(&actions->items[i].job_chunks);
        actions->items[i] = (sh_node_action){0};
    }
    actions->n = 0;
}

sh_node_action *node_act(node_step *s, sh_node_action_kind kind)
{
    if (s->actions->n >= SH_NODE_ACTIONS_MAX)
        return NULL;
    sh_node_action *action = &s->actions->items[s->actions->n++];
    *action = (sh_node_action){.kind = kind};
    return action;
}

void node_note(node_step *s, sh_node_note note, uint64_t number)
{
    if (s->actions->n >= NODE_NOTES_MAX)
        return; /* notes are for the log; the rest of the list is for what must happen */
    sh_node_action *action = node_act(s, SH_NODE_NOTE);
    action->note = note;
    action->number = number;
}

/* Asks for the next TIMER where that has changed. */
static void set_timer(node_step *s)
{
    sh_node *n = s->n;
    uint64_t due = SH_MIN(sh_link_due(&n->link), node_monitor_due(n));
    due = SH_MIN(due, SH_MIN(n->take_retry_ms, node_clock_steady(n, n->retain_ms)));
    due = SH_MIN(due, SH_MIN(n->policy.due_ms, node_budget_due(n)));
    if (n->state.erasing)
        due = s->now_ms;
    if (due == NODE_NEVER || due == n->armed_ms)
        return;
    sh_node_action *action = node_act(s, SH_NODE_SET_TIMER);
    SH_ASSERT(action != NULL);
    action->at_ms = SH_MAX(due, s->now_ms);
    n->armed_ms = due;
}

static sh_status finish(node_step *s)
{
    SH_TRY(node_retain(s));
    SH_TRY(node_pump(s));
    set_timer(s);
    SH_TRY(node_clock_save(s));
    SH_TRY(node_budget_save(s));
    return node_state_save(s);
}

static sh_status check_options(const sh_node_options *o, sh_error *err)
{
    if (o->retry_min_ms == 0 || o->retry_max_ms < o->retry_min_ms ||
        o->retry_max_ms > SH_LINK_RETURN_MAX_MS)
        return sh_fail(err, SH_ERR_USAGE,
                       "node: retry from %llu to %llu ms, it must be 1 <= least <= most <= %u",
                       (unsigned long long)o->retry_min_ms, (unsigned long long)o->retry_max_ms,
                       SH_LINK_RETURN_MAX_MS);
    if (o->records_max == 0 || o->windows_max == 0 || o->feedback_tokens_max == 0)
        return sh_fail(err, SH_ERR_USAGE, "node: a ring of size 0 holds nothing");
    if (o->agent == NULL || o->kernel == NULL)
        return sh_fail(err, SH_ERR_USAGE, "node: agent and kernel must be named");
    return SH_OK;
}

/* Begins with the release of options.kept_manifest in place of the genesis. */
static sh_status keep_release(node_step *s)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    sh_bytes kept = n->options.kept_manifest;
    uint32_t slot = n->options.kept_slot;
    sh_manifest manifest;
    n->options.kept_manifest = (sh_bytes){NULL, 0};
    if (kept.n == 0)
        return SH_OK;
    SH_ASSERT(slot < NODE_SLOTS);
    if (sh_manifest_verify(kept.data, kept.n, &n->options.release_key, &manifest, s->err) != SH_OK)
        return sh_fail_in(s->err, "the manifest of the release that is kept");
    if (manifest.version <= st->confirmed_version)
        return SH_OK;
    st->slots[slot] = (node_release){manifest.version, manifest.model.sha256, manifest.model.bytes};
    st->active_slot = slot;
    st->confirmed_version = manifest.version;
    return node_manifest_put(s, slot == 0 ? node_meta_slot0 : node_meta_slot1, kept);
}

/* A store without state: a new epoch, the genesis release active and confirmed. */
static sh_status make_new(node_step *s, sh_bytes genesis)
{
    sh_node *n = s->n;
    sh_manifest manifest;
    if (sh_manifest_verify(genesis.data, genesis.n, &n->options.release_key, &manifest, s->err) !=
        SH_OK)
        return sh_fail_in(s->err, "genesis manifest");
    n->state = (node_state){
        .epoch = n->link.epoch,
        .next_job = 1,
        .record_first = 1,
        .record_next = 1,
        .feedback_first = 1,
        .feedback_next = 1,
        .window_first = 1,
        .window_next = 1,
        .confirmed_version = manifest.version,
        .slots[0] = {manifest.version, manifest.model.sha256, manifest.model.bytes},
    };
    SH_TRY(node_manifest_put(s, node_meta_slot0, genesis));
    SH_TRY(keep_release(s));
    n->options.monitor.origin = n->link.epoch;
    SH_TRY(sh_monitor_create(&n->options.monitor, &n->monitor, s->err));
    sh_monitor_set_release(n->monitor, (uint32_t)node_active(n)->version);
    n->dirty = n->monitor_dirty = true;
    return SH_OK;
}

static sh_status load_or_make(node_step *s, sh_bytes genesis)
{
    sh_node *n = s->n;
    SH_TRY(node_schema_open(s));
    SH_TRY(node_link_open(s));
    sh_status status = node_state_load(s->txn, &n->state, s->err);
    if (status == SH_ERR_NOT_FOUND)
        return make_new(s, genesis);
    if (status != SH_OK)
        return status;
    n->options.monitor.origin = n->link.epoch;
    return node_monitor_load(s);
}

sh_status sh_node_create(const sh_node_options *options, sh_bytes genesis_manifest, uint64_t now_ms,
                         const sh_rng *rng, sh_txn *txn, sh_node_actions *actions, sh_node **out,
                         sh_error *err)
{
    sh_node_actions_clear(actions);
    SH_TRY(check_options(options, err));
    sh_node *n = sh_calloc(1, sizeof(*n));
    if (n == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "node: no memory");
    n->options = *options;
    n->rng = *rng;
    n->armed_ms = n->take_retry_ms = NODE_NEVER;
    node_step s = {.n = n, .txn = txn, .actions = actions, .now_ms = now_ms, .err = err};
    sh_status status = SH_OK;
    SH_GOTO(node_clock_open(&s));
    SH_GOTO(node_budget_open(&s));
    node_policy_init(&s);
    n->retain_ms = s.row_ms; /* looks once what has become too old */
    SH_GOTO(load_or_make(&s, genesis_manifest));
    SH_GOTO(node_policy_update(&s, NULL));
    SH_GOTO(node_slots_lost(&s, genesis_manifest));
    sh_node_action *activate = node_act(&s, SH_NODE_ACTIVATE);
    activate->version = node_active(n)->version;
    activate->slot = n->state.active_slot;
    SH_GOTO(node_take_advance(&s)); /* the job that a crash forgot */
    SH_GOTO(finish(&s));
    *out = n;
    return SH_OK;
cleanup:
    sh_node_actions_clear(actions);
    sh_node_destroy(&n);
    return status;
}

void sh_node_destroy(sh_node **node)
{
    if (*node == NULL)
        return;
    sh_monitor_destroy(&(*node)->monitor);
    free(*node);
    *node = NULL;
}

static sh_status on_timer(node_step *s)
{
    sh_node *n = s->n;
    n->armed_ms = NODE_NEVER;
    SH_TRY(node_monitor_timer(s));
    SH_TRY(node_erase_advance(s));
    if (n->take_retry_ms <= s->now_ms) {
        n->take_retry_ms = NODE_NEVER;
        SH_TRY(node_take_advance(s));
    }
    return SH_OK; /* what is due on the link, the pump finds */
}

static sh_status on_job(node_step *s, const sh_node_job_result *result)
{
    sh_node *n = s->n;
    if (result->id != 0 && result->id == n->train_job)
        return node_train_done(s, result);
    if (result->id != 0 && result->id == n->take_job)
        return node_take_done(s, result);
    if (result->id != 0 && result->id == n->evaluate_job)
        return node_evaluate_done(s, result);
    return SH_OK; /* cancelled, and it did not notice in time */
}

static sh_status dispatch(node_step *s, const sh_node_event *event)
{
    switch (event->kind) {
    case SH_NODE_TIMER:
        return on_timer(s);
    case SH_NODE_LINK_UP:
        node_on_link(s, true);
        return SH_OK;
    case SH_NODE_LINK_DOWN:
        node_on_link(s, false);
        return SH_OK;
    case SH_NODE_MESSAGE:
        node_budget_count(s, false, event->message.n);
        node_policy_gates(s->n);
        return node_on_message(s, event->message);
    case SH_NODE_INFERENCE:
        return node_on_inference(s, &event->record, &event->completion);
    case SH_NODE_FEEDBACK:
        return node_on_feedback(s, &event->feedback);
    case SH_NODE_RATING:
        return node_on_rating(s, &event->rating);
    case SH_NODE_ERASE:
        return node_on_erase(s, event->user);
    case SH_NODE_ROTATE:
        node_on_rotate(s, &event->key, event->token);
        return SH_OK;
    case SH_NODE_JOB_DONE:
        return on_job(s, &event->result);
    case SH_NODE_SIGNALS: /* node_policy_update has it */
        return SH_OK;
    }
    return SH_OK;
}

sh_status sh_node_step(sh_node *node, const sh_node_event *event, sh_txn *txn,
                       sh_node_actions *actions, sh_error *err)
{
    sh_node_actions_clear(actions);
    node_step s = {.n = node, .txn = txn, .actions = actions, .now_ms = event->now_ms, .err = err};
    node_clock_step(&s, event->wall_ms);
    node_budget_roll(&s);
    sh_status status = node_policy_update(&s, event);
    if (status == SH_OK)
        status = dispatch(&s, event);
    if (status == SH_OK)
        status = finish(&s);
    if (status != SH_OK)
        sh_node_actions_clear(actions);
    return status;
}

const char *sh_node_rejected(const sh_node *node)
{
    return node->rejected[0] ? node->rejected : NULL;
}

sh_node_status sh_node_get_status(const sh_node *node)
{
    const node_state *st = &node->state;
    sh_node_status status = {
        .epoch = node->link.epoch,
        .renewals = node->link.renewals,
        .active_version = node_active(node)->version,
        .confirmed_version = st->confirmed_version,
        .active_slot = st->active_slot,
        .training_round = node->train_job != 0 ? node->training.round : 0,
        .updates_made = st->updates_made,
        .updates_acked = st->updates_acked,
        .inferences = st->inferences,
        .windows = st->windows,
        .alarms = st->alarms,
        .first_alarm_window = st->first_alarm_window,
        .feedback_tokens = st->feedback_tokens,
        .bad_messages = st->bad_messages,
        .last_sync_ms = st->last_sync_ms,
        .clock_trusted = node->clock.trusted,
        .wall_ms = node->clock.wall_ms,
        .row_ms = node->clock.row_ms,
        .bytes_up_day = node->budget.up_day,
        .bytes_up_month = node->budget.up_month,
        .bytes_down_day = node->budget.down_day,
        .bytes_down_month = node->budget.down_month,
        .refused_full = node->budget.refused_full,
        .stores_lost = node->policy.signals.stores_lost,
        .conditions = node_policy_conditions(node),
        .last_completion = st->last_completion,
        .link_up = node->link.state != SH_LINK_DOWN,
        .drifting = st->drifting,
        .erasing = st->erasing,
        .welcome = node->link.state == SH_LINK_WELCOME,
    };
    for (int c = 0; c < SH_CLASSES; c++) {
        status.outbox_items += node->link.counts.items[c];
        status.outbox_bytes += node->link.counts.bytes[c];
        status.dropped[c] = node->link.counts.dropped[c];
    }
    for (int i = 0; i < SH_POLICIES; i++)
        status.holds[i] = node->policy.holds[i];
    for (int m = 0; m < SH_METRICS; m++)
        status.log_evalue[m] = sh_monitor_log_evalue(node->monitor, (sh_metric)m);
    return status;
}
