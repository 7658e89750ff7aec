/*
 * What a node uses, seen from outside of its core: users' requests, rows that it keeps, bytes of a
 * day, and the time that it was asked to be quiet for.
 */
#include "experiments/world/oracle_internal.h"

#define DAY_MS                    86400000u
#define NOTE(w, i, rule, at, ...) oracle_note(&(w)->notes, rule, at, i, __VA_ARGS__)

/* ---- rows ---- */

static sh_status sum_targets(void *arg, const sh_feedback *row)
{
    *(uint64_t *)arg += row->target ? row->n : 0;
    return SH_OK;
}

void oracle_check_rings(const world_oracle *o, oracle_node *w, uint32_t i, uint64_t at_ms,
                        sh_txn *txn)
{
    const sh_node_options *limits = o->options.node;
    uint64_t targets = 0;
    if (!limits)
        return;
    const struct {
        const char *name;
        uint64_t n, max;
    } rings[] = {
        {"records", sh_txn_count(txn, SH_NODE_T_RECORD), limits->records_max},
        {"windows", sh_txn_count(txn, SH_NODE_T_WINDOW), limits->windows_max},
        {"completions", sh_txn_count(txn, SH_NODE_T_COMPLETION), limits->completions_max},
    };
    for (size_t k = 0; k < SH_COUNT(rings); k++)
        if (rings[k].n > rings[k].max)
            NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "it keeps %llu %s, at most %llu",
                 (unsigned long long)rings[k].n, rings[k].name, (unsigned long long)rings[k].max);
    if (sh_node_each_feedback(txn, sum_targets, &targets, NULL) == SH_OK &&
        targets > limits->feedback_tokens_max)
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "it keeps feedback of %llu tokens, at most %llu",
             (unsigned long long)targets, (unsigned long long)limits->feedback_tokens_max);
}

/* ---- requests ---- */

/* event NULL: a boot. Each request that was taken counts, and none is lost with the process. */
static void check_inferences(oracle_node *w, uint32_t i, uint64_t at_ms, const sh_node_event *event,
                             uint64_t inferences)
{
    oracle_use *use = &w->use;
    bool one = event && event->kind == SH_NODE_INFERENCE;
    if (use->known && one && inferences != use->inferences + 1)
        NOTE(w, i, WORLD_RULE_INFERENCE, at_ms, "a request was taken and does not count");
    if (use->known && inferences < use->inferences)
        NOTE(w, i, WORLD_RULE_DURABLE, at_ms, "of %llu requests that it took %llu are left",
             (unsigned long long)use->inferences, (unsigned long long)inferences);
    use->inferences = inferences;
    use->known = true;
}

/* ---- messages ---- */

static void hear(oracle_use *use, const sh_node_options *limits, uint64_t at_ms, sh_bytes message)
{
    sh_msg msg;
    if (!oracle_read(message.data, message.n, &msg) || msg.type != SH_MSG_ERROR ||
        sh_msg_decode(message.data, message.n, &msg, NULL) != SH_OK ||
        msg.error.retry_after_ms == 0)
        return;
    use->quiet_until_ms = at_ms + SH_MIN(msg.error.retry_after_ms, limits->retry_max_ms);
    use->quiets++;
}

static bool is_bulk(const sh_msg *msg)
{
    return msg->type == SH_MSG_CHUNK ||
           (msg->type == SH_MSG_ITEM && msg->item.kind != SH_ITEM_TOMBSTONE &&
            msg->item.cls != SH_CLASS_ALARM);
}

/* A tombstone may answer an acknowledgement, and an ERROR what cannot be read, at any time. */
static bool is_own_will(const sh_msg *msg)
{
    return msg->type == SH_MSG_ENROL || msg->type == SH_MSG_CHECKIN || msg->type == SH_MSG_WANT ||
           is_bulk(msg) || (msg->type == SH_MSG_ITEM && msg->item.kind != SH_ITEM_TOMBSTONE);
}

static void check_message(const world_oracle *o, oracle_node *w, uint32_t i, uint64_t at_ms,
                          const sh_buf *message)
{
    const sh_node_budgets *budgets = &o->options.node->budgets;
    const oracle_use *use = &w->use;
    bool quiet = at_ms < use->quiet_until_ms;
    bool up = budgets->up_day && use->up >= budgets->up_day;
    sh_msg msg;
    if ((!quiet && !up && !budgets->down_day) || !oracle_read(message->data, message->len, &msg))
        return;
    if (quiet && is_own_will(&msg))
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "a message of type %d, %llu ms before it may speak",
             (int)msg.type, (unsigned long long)(use->quiet_until_ms - at_ms));
    if (up && is_bulk(&msg))
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "%llu bytes went up on this day, of %llu, and more",
             (unsigned long long)use->up, (unsigned long long)budgets->up_day);
    if (budgets->down_day && msg.type == SH_MSG_WANT &&
        use->down + (uint64_t)(msg.want.n - 1) * SH_CHUNK_BYTES > budgets->down_day)
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms,
             "%llu bytes came down on this day, of %llu, and it asks for %u chunks",
             (unsigned long long)use->down, (unsigned long long)budgets->down_day, msg.want.n);
}

/* What a check-in says that was dropped is what the outbox counts. */
static void check_checkin(oracle_node *w, uint32_t i, uint64_t at_ms, const sh_buf *message)
{
    sh_msg msg;
    if (!oracle_read(message->data, message->len, &msg) || msg.type != SH_MSG_CHECKIN)
        return;
    for (int cls = 0; cls < SH_CLASSES; cls++)
        if (msg.checkin.dropped[cls] != w->now.dropped[cls])
            NOTE(w, i, WORLD_RULE_OUTBOX, at_ms, "class %d: it says that %llu of %llu were dropped",
                 cls, (unsigned long long)msg.checkin.dropped[cls],
                 (unsigned long long)w->now.dropped[cls]);
}

void oracle_see_jobs(oracle_use *use, const sh_node_event *event, const sh_node_actions *actions)
{
    bool done = event->kind == SH_NODE_JOB_DONE && event->result.status == SH_OK;
    use->tried = 0;
    if (done && use->trying_job == ORACLE_ANY)
        use->tried = ORACLE_ANY;
    else if (done && event->result.id == use->trying_job)
        use->tried = use->trying;
    for (size_t k = 0; k < actions->n; k++) {
        const sh_node_job *job = &actions->items[k].job;
        if (actions->items[k].kind != SH_NODE_START_JOB ||
            (job->kind != SH_JOB_SMOKE && job->kind != SH_JOB_INSTALL))
            continue;
        use->trying = job->version;
        use->trying_job = job->kind == SH_JOB_SMOKE ? job->id : 0;
    }
}

void oracle_check_use(const world_oracle *o, uint32_t i, uint64_t at_ms, const sh_node_event *event,
                      const sh_node_actions *actions, const sh_node *core)
{
    oracle_node *w = &o->nodes[i];
    oracle_use *use = &w->use;
    const sh_node_options *limits = o->options.node;
    bool counts = !event || event->kind == SH_NODE_INFERENCE;
    bool budgets = limits && (limits->budgets.up_day || limits->budgets.down_day);
    if (!event)
        use->trying_job = ORACLE_ANY; /* what create has started is not seen */
    if (!event || event->kind == SH_NODE_LINK_UP || event->kind == SH_NODE_LINK_DOWN)
        use->quiet_until_ms = 0; /* another connection */
    for (size_t k = 0; actions && o->options.stride <= 1 && k < actions->n; k++)
        if (actions->items[k].kind == SH_NODE_SEND)
            check_checkin(w, i, at_ms, &actions->items[k].message);
    if (!counts && !budgets && !o->options.says_later)
        return;
    sh_node_status status = sh_node_get_status(core);
    if (counts)
        check_inferences(w, i, at_ms, event, status.inferences);
    /* Its rows' clock goes back at a start only, whose day may have begun with the step that the
     * process died with, and that was not seen. What goes by in the step in which a day begins is
     * counted for none: the plan that it took in may have set the clock in its midst. */
    uint64_t latest = event ? 0 : use->row_ms + (at_ms - use->row_at_ms);
    bool begins = SH_MAX(status.row_ms, latest) / DAY_MS > use->day;
    if (begins) {
        use->day = SH_MAX(use->day, status.row_ms / DAY_MS);
        use->up = use->down = 0;
    }
    use->row_ms = status.row_ms;
    use->row_at_ms = at_ms;
    if (event && event->kind == SH_NODE_MESSAGE) {
        use->down += begins ? 0 : event->message.n;
        if (o->options.says_later)
            hear(use, limits, at_ms, event->message);
    }
    uint64_t up = 0;
    for (size_t k = 0; actions && limits && k < actions->n; k++) {
        if (actions->items[k].kind != SH_NODE_SEND)
            continue;
        check_message(o, w, i, at_ms, &actions->items[k].message);
        up += actions->items[k].message.len;
    }
    use->up += begins ? 0 : up;
}
