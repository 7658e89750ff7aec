/*
 * Opportunistic mode: what the node may do now, by the device's signals, the hour and the budgets.
 * What may not be sent stays where it is, due as before; the link passes it over (sh_link_closed),
 * and the step that finds that its policy holds again sends it. Inference asks nothing of this.
 */
#include "edge-node/node_internal.h"

#define MINUTE_MS        60000u
#define MINUTES_OF_A_DAY 1440u

void node_policy_init(node_step *s)
{
    node_policy *p = &s->n->policy;
    p->signals =
        (sh_node_signals){.idle_ms = SH_IDLE_UNKNOWN, .temperature_mc = SH_TEMPERATURE_UNKNOWN};
    p->used_ms = s->now_ms;
    p->plan_ms = p->due_ms = NODE_NEVER;
    for (int i = 0; i < SH_POLICIES; i++)
        p->holds[i] = true;
}

bool node_policy_holds(const sh_node *n, sh_policy_kind kind)
{
    return n->policy.holds[kind];
}

static bool has(sh_signal signal, sh_signal wanted, bool unknown_allowed)
{
    return signal == wanted || (signal == SH_SIGNAL_UNKNOWN && unknown_allowed);
}

static uint32_t local_minute(const node_step *s)
{
    int64_t day = MINUTES_OF_A_DAY;
    int64_t minute = (int64_t)(s->wall_ms / MINUTE_MS) + s->n->options.utc_offset_min;
    return (uint32_t)(((minute % day) + day) % day);
}

static bool in_hours(const sh_node_policy *o, uint32_t minute)
{
    if (o->from_min == o->to_min)
        return true;
    if (o->from_min < o->to_min)
        return minute >= o->from_min && minute < o->to_min;
    return minute >= o->from_min || minute < o->to_min; /* over midnight */
}

/* Steady time at which the hours begin or end next. */
static uint64_t hours_due(const node_step *s, const sh_node_policy *o, uint32_t minute)
{
    if (o->from_min == o->to_min)
        return NODE_NEVER;
    uint32_t to_from = (o->from_min + MINUTES_OF_A_DAY - minute - 1) % MINUTES_OF_A_DAY;
    uint32_t to_to = (o->to_min + MINUTES_OF_A_DAY - minute - 1) % MINUTES_OF_A_DAY;
    uint64_t into_minute = s->wall_ms % MINUTE_MS;
    return s->now_ms + (uint64_t)SH_MIN(to_from, to_to) * MINUTE_MS + (MINUTE_MS - into_minute);
}

/* The SH_CONDITION_ bits that keep the policy from holding; *blocked: also where one is unknown. */
static uint32_t failing(node_step *s, const sh_node_policy *o, bool *blocked)
{
    node_policy *p = &s->n->policy;
    const sh_node_signals *g = &p->signals;
    uint32_t minute = local_minute(s), bits = 0;
    uint64_t idle_from = SH_MAX(p->used_ms, p->user_ms);
    if (o->idle_ms_min > 0 && s->now_ms - idle_from < o->idle_ms_min) {
        bits |= SH_CONDITION_BUSY;
        p->due_ms = SH_MIN(p->due_ms, idle_from + o->idle_ms_min);
    }
    if (!in_hours(o, minute))
        bits |= SH_CONDITION_HOURS;
    p->due_ms = SH_MIN(p->due_ms, hours_due(s, o, minute));
    bool hot_known = g->temperature_mc != SH_TEMPERATURE_UNKNOWN;
    if (o->temperature_mc_max != 0 && hot_known && g->temperature_mc >= o->temperature_mc_max)
        bits |= SH_CONDITION_HOT;
    bool metered_ok = !o->unmetered || has(g->metered, SH_SIGNAL_NO, o->unknown_allowed);
    bool power_ok = !o->power || has(g->power, SH_SIGNAL_YES, o->unknown_allowed);
    bool heat_ok = o->temperature_mc_max == 0 || hot_known || o->unknown_allowed;
    *blocked = bits != 0 || !metered_ok || !power_ok || !heat_ok;
    return bits;
}

static void take_in(node_step *s, const sh_node_event *event)
{
    node_policy *p = &s->n->policy;
    if (event->kind == SH_NODE_INFERENCE)
        p->used_ms = s->now_ms;
    if (event->kind != SH_NODE_SIGNALS)
        return;
    p->signals = event->signals;
    if (event->signals.idle_ms == SH_IDLE_UNKNOWN)
        p->user_ms = 0;
    else
        p->user_ms = s->now_ms - SH_MIN(event->signals.idle_ms, s->now_ms);
    if (event->signals.refused_full > 0) {
        s->n->budget.refused_full += event->signals.refused_full;
        s->n->budget.dirty = s->n->budget.now = true;
    }
}

/* A training whose policy no longer holds costs its own progress; the plan stays, so that it begins
 * again when the policy holds. */
static void stop_training(node_step *s)
{
    sh_node *n = s->n;
    if (n->evaluate_job != 0) {
        node_evaluate_stop(s);
        n->evaluate = true;
    }
    if (n->train_job == 0)
        return;
    node_note(s, SH_NOTE_TRAIN_STOPPED, n->training.round);
    node_train_cancel(s);
    n->state.tries -= SH_MIN(1u, n->state.tries); /* that was no failure */
    n->dirty = true;
    if (!n->plan.train || n->plan.round <= n->training.round) {
        n->plan = n->training;
        n->plan.train = true;
    }
}

sh_status node_policy_update(node_step *s, const sh_node_event *event)
{
    sh_node *n = s->n;
    node_policy *p = &n->policy;
    bool trained = p->holds[SH_POLICY_TRAIN];
    if (event != NULL)
        take_in(s, event);
    p->conditions = 0;
    p->due_ms = NODE_NEVER;
    for (int i = 0; i < SH_POLICIES; i++) {
        bool blocked = false;
        p->conditions |= failing(s, &n->options.policies[i], &blocked);
        p->holds[i] = !blocked;
    }
    node_policy_gates(n);
    if (p->holds[SH_POLICY_TRAIN] && !trained) {
        SH_TRY(node_train_consider(s));
        return node_evaluate_advance(s);
    }
    bool ended = event != NULL && event->kind == SH_NODE_JOB_DONE; /* its work is not thrown away */
    if (!p->holds[SH_POLICY_TRAIN] && !ended)
        stop_training(s);
    return SH_OK;
}

/* ---- gates ---- */

static bool has_network(const sh_node *n)
{
    return n->policy.signals.network != SH_SIGNAL_NO; /* unknown: the link says it itself */
}

static bool may_send(const sh_node *n, uint8_t cls)
{
    bool is_window = cls == SH_CLASS_WINDOW || cls == SH_CLASS_RECORD;
    if (!has_network(n) || !n->policy.holds[is_window ? SH_POLICY_WINDOWS : SH_POLICY_FEEDBACK])
        return false;
    return cls == SH_CLASS_ALARM ? node_budget_small_up(n) : node_budget_bulk_up(n);
}

void node_policy_gates(sh_node *n)
{
    sh_link_closed *closed = &n->link.closed;
    uint32_t chunks = node_budget_chunks_down(n);
    bool small = has_network(n) && node_budget_small_up(n);
    for (unsigned cls = 0; cls < SH_CLASSES; cls++)
        closed->items[cls] = !may_send(n, (uint8_t)cls);
    closed->chunks = closed->items[SH_CLASS_UPDATE];
    closed->want = !small || !n->policy.holds[SH_POLICY_DOWNLOAD] || chunks == 0;
    closed->want_max = chunks;
    closed->enrol_ms = closed->contact_ms = 0;
    if (!small)
        closed->contact_ms = NODE_NEVER;
    else if (!n->policy.holds[SH_POLICY_FEEDBACK] && n->policy.plan_ms != NODE_NEVER)
        closed->contact_ms = n->policy.plan_ms + n->options.checkin_blocked_ms;
    if (!may_send(n, SH_CLASS_WINDOW) && closed->want) /* these need a WELCOME, too */
        closed->enrol_ms = closed->contact_ms;
}

uint32_t node_policy_conditions(const sh_node *n)
{
    const sh_node_signals *g = &n->policy.signals;
    uint32_t bits = n->policy.conditions;
    if (g->store_full)
        bits |= SH_CONDITION_STORE_FULL;
    if (g->metered == SH_SIGNAL_YES)
        bits |= SH_CONDITION_METERED;
    if (g->power == SH_SIGNAL_NO)
        bits |= SH_CONDITION_BATTERY;
    if (node_budget_is_used_up(n))
        bits |= SH_CONDITION_BUDGET;
    if (node_clock_is_off(n))
        bits |= SH_CONDITION_CLOCK;
    return bits;
}

void node_policy_fill(const sh_node *n, sh_msg_checkin *c)
{
    const sh_node_signals *g = &n->policy.signals;
    c->disk_free = g->disk_free;
    c->store_bytes = g->store_bytes;
    c->store_bytes_max = g->store_bytes_max;
    c->stores_lost = g->stores_lost;
    c->refused_full = n->budget.refused_full;
    c->conditions = node_policy_conditions(n);
    c->bytes_up_day = n->budget.up_day;
    c->bytes_down_day = n->budget.down_day;
}
