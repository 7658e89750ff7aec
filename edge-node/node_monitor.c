/* What the node measures of itself: records in, windows and alarms out. */
#include "edge-node/node_internal.h"

#include <math.h>

#include "shared/base/canary.h"

/* An alarm is told when a metric enters it, not for every window that it stays there: a shift of
 * the inputs that no release can undo would otherwise be told for ever. */
static sh_status raise_alarm(node_step *s, const sh_window_result *closed, unsigned metric)
{
    node_state *st = &s->n->state;
    const sh_metric_result *m = &closed->metric[metric];
    sh_alarm alarm = {
        .window = closed->window.index,
        .release_version = closed->window.release_version,
        .inferences = st->inferences,
        .metric = metric,
        .log_evalue = m->log_evalue,
        .effect = m->effect,
        .at_ms = s->wall_ms,
    };
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    sh_status status = SH_OK;
    SH_GOTO(sh_alarm_encode(&alarm, &payload, s->err));
    SH_GOTO(
        node_outbox_put(s, SH_CLASS_ALARM, SH_ITEM_ALARM, (sh_bytes){payload.data, payload.len}));
    st->alarms++;
    if (st->first_alarm_window == 0)
        st->first_alarm_window = closed->window.index;
    node_note(s, SH_NOTE_ALARM, metric);
    node_checkin_soon(s);
cleanup:
    sh_buf_release(&payload);
    return status;
}

sh_status node_take_window(node_step *s, sh_window_result *closed)
{
    node_state *st = &s->n->state;
    closed->window.start_ms += s->wall_ms - s->row_ms; /* records are on the rows' clock */
    closed->window.end_ms += s->wall_ms - s->row_ms;
    sh_buf payload;
    sh_buf_init(&payload, SH_WINDOW_BYTES_MAX);
    sh_status status = SH_OK;
    st->windows++;
    st->window_open_ms = 0;
    s->n->monitor_dirty = true;
    SH_GOTO(node_window_put(s, &closed->window));
    status = sh_window_encode(&closed->window, false, &payload);
    if (status != SH_OK) {
        status = sh_fail(s->err, status, "node: a window cannot be encoded");
        goto cleanup;
    }
    SH_GOTO(
        node_outbox_put(s, SH_CLASS_WINDOW, SH_ITEM_WINDOW, (sh_bytes){payload.data, payload.len}));
    node_note(s, SH_NOTE_WINDOW, closed->window.index);
    if (closed->window.release_version != node_active(s->n)->version)
        goto cleanup; /* closed by the change of release: what it says is about the old one */
    for (unsigned metric = 0; metric < SH_METRICS; metric++) {
        if (!closed->metric[metric].alarm)
            continue;
        st->drifting = true;
        if (st->alarm_mask >> metric & 1)
            continue;
        st->alarm_mask |= 1u << metric;
        SH_GOTO(raise_alarm(s, closed, metric));
    }
cleanup:
    sh_buf_release(&payload);
    return status;
}

sh_status node_on_inference(node_step *s, const sh_record *record,
                            const sh_completion_row *completion)
{
    sh_node *n = s->n;
    sh_record mine = *record;
    sh_window_result closed;
    if (SH_CANARY(LOSE_REQUEST) && n->train_job != 0)
        return SH_OK;
    mine.seq = n->state.record_next;
    mine.at_ms += n->clock.row_offset;
    n->dirty = true;
    SH_TRY(node_record_put(s, &mine));
    if (completion->id != 0) {
        sh_completion_row row = *completion;
        row.at_ms = s->row_ms;
        row.record = mine.seq;
        row.release_version = mine.release_version;
        row.rated = SH_FEEDBACK_NONE;
        SH_TRY(node_completion_put(s, &row));
    }
    n->state.inferences++;
    bool was_closed = sh_monitor_add(n->monitor, &mine, &closed);
    if (was_closed)
        SH_TRY(node_take_window(s, &closed));
    /* A window that this record filled has it; one that it closed by being late has not. */
    bool holds_it = was_closed && closed.window.last_seq >= mine.seq;
    if (n->state.window_open_ms == 0 && !holds_it)
        n->state.window_open_ms = s->row_ms;
    return node_judge_health(s, &mine);
}

sh_status node_on_feedback(node_step *s, const sh_feedback *feedback)
{
    sh_node *n = s->n;
    if (feedback->n == 0)
        return SH_OK;
    n->dirty = true;
    if (feedback->n > SH_NODE_FEEDBACK_ROW_MAX) {
        sh_monitor_note_drop(n->monitor, SH_DROP_FEEDBACK, 1);
        n->monitor_dirty = true;
        node_note(s, SH_NOTE_DROPPED, feedback->n);
        return SH_OK;
    }
    SH_TRY(node_feedback_put(s, feedback));
    return node_train_consider(s);
}

uint64_t node_monitor_due(const sh_node *n)
{
    uint64_t age = n->options.monitor.window_ms_max;
    if (age == 0 || n->state.window_open_ms == 0 || n->state.window_open_ms > NODE_NEVER - age)
        return NODE_NEVER;
    return node_clock_steady(n, n->state.window_open_ms + age);
}

sh_status node_monitor_timer(node_step *s)
{
    sh_window_result closed;
    if (node_monitor_due(s->n) > s->now_ms)
        return SH_OK;
    s->n->dirty = s->n->monitor_dirty = true;
    s->n->state.window_open_ms = 0;
    if (sh_monitor_tick(s->n->monitor, s->row_ms, &closed))
        return node_take_window(s, &closed);
    return SH_OK;
}

void node_monitor_release(node_step *s)
{
    sh_node *n = s->n;
    sh_monitor_set_release(n->monitor, (uint32_t)node_active(n)->version);
    n->state.drifting = false;
    n->state.alarm_mask = 0;
    n->dirty = n->monitor_dirty = true;
}
