/*
 * What leaves a node's store before its ring is full: rows past their age, and what a user wrote
 * when that is to be erased. Both go in bounded steps, the rest with timer events; where an erasure
 * is, the state says, so that a crash does not end it.
 */
#include "edge-node/node_internal.h"

/* ---- age ---- */

void node_retain_from(node_step *s, uint64_t age_ms)
{
    if (age_ms > 0 && age_ms < NODE_NEVER - s->row_ms)
        s->n->retain_ms = SH_MIN(s->n->retain_ms, s->row_ms + age_ms);
}

/* When row `at_ms` is too old; NODE_NEVER for an age of 0. */
static uint64_t end_of(uint64_t at_ms, uint64_t age_ms)
{
    return age_ms == 0 || at_ms > NODE_NEVER - age_ms ? NODE_NEVER : at_ms + age_ms;
}

static sh_status drop_old(node_step *s, unsigned table, uint64_t seq, sh_slice value, uint64_t *due)
{
    sh_node *n = s->n;
    sh_feedback feedback;
    sh_completion_row completion;
    sh_record record;
    if (table == SH_NODE_T_FEEDBACK) {
        SH_TRY(node_feedback_head(value, &feedback, s->err));
        *due = end_of(node_clock_row(s, feedback.at_ms), n->options.feedback_age_ms_max);
        if (*due > s->row_ms)
            return SH_OK;
        n->state.feedback_first = seq + 1;
        return node_feedback_del(s, seq, &feedback);
    }
    if (table == SH_NODE_T_COMPLETION) {
        SH_TRY(node_completion_head(seq, value, &completion, s->err));
        *due = end_of(node_clock_row(s, completion.at_ms), n->options.completions_age_ms_max);
        return *due > s->row_ms ? SH_OK : node_completion_del(s, seq, value.n);
    }
    SH_TRY(sh_record_decode(value.data, value.n, &record, s->err));
    *due = end_of(node_clock_row(s, record.at_ms), n->options.records_age_ms_max);
    if (*due > s->row_ms)
        return SH_OK;
    n->state.record_first = seq + 1;
    n->dirty = true;
    if (seq > n->state.monitor_seq)
        n->monitor_dirty = true; /* it cannot be counted again */
    return node_row_del(s, SH_NODE_T_RECORD, seq);
}

static sh_status retain(node_step *s, unsigned table, uint64_t age_ms)
{
    uint64_t due = s->row_ms;
    if (age_ms == 0)
        return SH_OK;
    for (unsigned i = 0; i < NODE_RETAIN_STEP_MAX; i++) {
        uint64_t seq;
        sh_slice value;
        sh_status status = node_row_next(s, table, 0, &seq, &value);
        if (status == SH_ERR_NOT_FOUND)
            return SH_OK;
        SH_TRY(status);
        SH_TRY(drop_old(s, table, seq, value, &due));
        if (due > s->row_ms)
            break;
    }
    s->n->retain_ms = SH_MIN(s->n->retain_ms, SH_MAX(due, s->row_ms));
    return SH_OK;
}

sh_status node_retain(node_step *s)
{
    const sh_node_options *o = &s->n->options;
    if (s->n->retain_ms > s->row_ms)
        return SH_OK;
    s->n->retain_ms = NODE_NEVER;
    SH_TRY(retain(s, SH_NODE_T_RECORD, o->records_age_ms_max));
    SH_TRY(retain(s, SH_NODE_T_FEEDBACK, o->feedback_age_ms_max));
    return retain(s, SH_NODE_T_COMPLETION, o->completions_age_ms_max);
}

/* ---- erasure ---- */

/* Looks at one row of feedback. SH_ERR_NOT_FOUND: there is none left to look at. */
static sh_status erase_feedback(node_step *s)
{
    node_state *st = &s->n->state;
    uint64_t seq;
    sh_slice value;
    sh_feedback row;
    SH_TRY(node_row_next(s, SH_NODE_T_FEEDBACK, st->erase_feedback_at, &seq, &value));
    if (seq >= st->erase_feedback_end)
        return SH_ERR_NOT_FOUND;
    st->erase_feedback_at = seq + 1;
    SH_TRY(node_feedback_head(value, &row, s->err));
    if (st->erase_user != 0 && row.user != st->erase_user)
        return SH_OK;
    st->erased_rows++;
    return node_feedback_del(s, seq, &row);
}

static sh_status erase_completion(node_step *s)
{
    node_state *st = &s->n->state;
    uint64_t id;
    sh_slice value;
    sh_completion_row row;
    SH_TRY(node_row_next(s, SH_NODE_T_COMPLETION, st->erase_completion_at, &id, &value));
    if (id >= st->erase_completion_end)
        return SH_ERR_NOT_FOUND;
    st->erase_completion_at = id + 1;
    SH_TRY(node_completion_head(id, value, &row, s->err));
    if (st->erase_user != 0 && row.user != st->erase_user)
        return SH_OK;
    st->erased_rows++;
    return node_completion_del(s, id, value.n);
}

static sh_status erase_rows(node_step *s, uint64_t rows_max)
{
    node_state *st = &s->n->state;
    sh_status status = SH_OK;
    s->n->dirty = true;
    for (; rows_max > 0 && status == SH_OK; rows_max--) {
        status = erase_feedback(s);
        if (status == SH_ERR_NOT_FOUND)
            status = erase_completion(s);
    }
    if (status != SH_ERR_NOT_FOUND)
        return status;
    st->erasing = false;
    node_note(s, SH_NOTE_ERASED, st->erased_rows);
    node_checkin_soon(s); /* the plan to train or to evaluate comes again */
    return SH_OK;
}

sh_status node_erase_advance(node_step *s)
{
    return s->n->state.erasing ? erase_rows(s, NODE_ERASE_STEP_MAX) : SH_OK;
}

sh_status node_on_erase(node_step *s, uint64_t user)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    if (st->erasing) /* of another user: one at a time, so it ends here, however long it is */
        SH_TRY(erase_rows(s, UINT64_MAX));
    if (n->train_job != 0) {
        node_train_cancel(s);
        st->tries -= SH_MIN(1u, st->tries); /* that was no failure */
    }
    node_evaluate_stop(s);
    st->erasing = true;
    st->erase_user = user;
    st->erase_feedback_at = st->erase_completion_at = 0;
    st->erase_feedback_end = st->feedback_next;
    st->erase_completion_end = st->last_completion + 1;
    st->erased_rows = 0;
    return node_erase_advance(s);
}
