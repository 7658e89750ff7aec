/*
 * Completions that are kept for a while, so that what the user did with one can be said by its id.
 * COMPLETION: id (8, big-endian) -> version (1), rated (1: sh_feedback_kind), release (4), user
 * (8), session (8), offset (4), n_context (4), n (4), at_ms (8), record (8), n_context + n tokens
 * (4 each); little-endian.
 */
#include "edge-node/node_internal.h"

#include <stdlib.h>

#define COMPLETION_VERSION 1
#define COMPLETION_HEAD    50
#define KEY_BYTES          8

sh_status node_completion_head(uint64_t id, sh_slice value, sh_completion_row *out, sh_error *err)
{
    const uint8_t *p = value.data;
    if (value.n < COMPLETION_HEAD || p[0] != COMPLETION_VERSION || p[1] >= SH_FEEDBACK_KINDS)
        return sh_fail(err, SH_ERR_CORRUPT, "completion row: %zu bytes of an unknown layout",
                       value.n);
    sh_completion_row row = {
        .id = id,
        .rated = p[1],
        .release_version = (uint32_t)node_get_le(p + 2, 4),
        .user = node_get_le(p + 6, 8),
        .session = node_get_le(p + 14, 8),
        .offset = (uint32_t)node_get_le(p + 22, 4),
        .n_context = (uint32_t)node_get_le(p + 26, 4),
        .n = (uint32_t)node_get_le(p + 30, 4),
        .at_ms = node_get_le(p + 34, 8),
        .record = node_get_le(p + 42, 8),
    };
    uint64_t tokens = (uint64_t)row.n_context + row.n;
    if (tokens > SH_NODE_COMPLETION_TOKENS_MAX || value.n != COMPLETION_HEAD + tokens * 4)
        return sh_fail(err, SH_ERR_CORRUPT, "completion row: %llu tokens in %zu bytes",
                       (unsigned long long)tokens, value.n);
    *out = row;
    return SH_OK;
}

sh_status node_completion_del(node_step *s, uint64_t id, size_t bytes)
{
    node_state *st = &s->n->state;
    SH_TRY(node_row_del(s, SH_NODE_T_COMPLETION, id));
    st->completion_rows -= SH_MIN(1, st->completion_rows);
    st->completion_bytes -= SH_MIN(KEY_BYTES + bytes, st->completion_bytes);
    s->n->dirty = true;
    return SH_OK;
}

static sh_status trim(node_step *s)
{
    const sh_node_options *o = &s->n->options;
    node_state *st = &s->n->state;
    while (st->completion_rows > o->completions_max ||
           (o->completions_bytes_max > 0 && st->completion_bytes > o->completions_bytes_max)) {
        uint64_t id;
        sh_slice value;
        sh_status status = node_row_next(s, SH_NODE_T_COMPLETION, 0, &id, &value);
        if (status == SH_ERR_NOT_FOUND)
            return sh_fail(s->err, SH_ERR_CORRUPT, "completions: %llu rows counted, and none there",
                           (unsigned long long)st->completion_rows);
        SH_TRY(status);
        SH_TRY(node_completion_del(s, id, value.n));
    }
    return SH_OK;
}

static sh_status write_row(node_step *s, const sh_completion_row *row)
{
    uint32_t tokens = row->n_context + row->n;
    size_t bytes = COMPLETION_HEAD + (size_t)tokens * 4;
    uint8_t *value = sh_calloc(1, bytes);
    if (value == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: a completion of %u tokens", tokens);
    value[0] = COMPLETION_VERSION;
    value[1] = row->rated;
    node_put_le(value + 2, row->release_version, 4);
    node_put_le(value + 6, row->user, 8);
    node_put_le(value + 14, row->session, 8);
    node_put_le(value + 22, row->offset, 4);
    node_put_le(value + 26, row->n_context, 4);
    node_put_le(value + 30, row->n, 4);
    node_put_le(value + 34, row->at_ms, 8);
    node_put_le(value + 42, row->record, 8);
    for (uint32_t i = 0; i < tokens; i++)
        node_put_le(value + COMPLETION_HEAD + 4 * (size_t)i, (uint32_t)row->tokens[i], 4);
    sh_status status = node_row_put(s, SH_NODE_T_COMPLETION, row->id, value, bytes);
    free(value);
    return status;
}

sh_status node_completion_put(node_step *s, const sh_completion_row *row)
{
    node_state *st = &s->n->state;
    uint64_t tokens = (uint64_t)row->n_context + row->n;
    if (s->n->options.completions_max == 0)
        return SH_OK;
    uint8_t key[KEY_BYTES];
    sh_slice there;
    sh_key_put_u64(key, row->id);
    /* Requests that run side by side end in another order than they began: only an id that is there
     * already is wrong. */
    sh_status found = row->id <= st->last_completion
                          ? sh_txn_get(s->txn, SH_NODE_T_COMPLETION, key, sizeof(key), &there)
                          : SH_ERR_NOT_FOUND;
    if (found != SH_OK && found != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, found, "completion %llu cannot be read",
                       (unsigned long long)row->id);
    if (tokens > SH_NODE_COMPLETION_TOKENS_MAX || row->id == 0 || found == SH_OK) {
        node_note(s, SH_NOTE_DROPPED, row->id);
        return SH_OK;
    }
    SH_TRY(write_row(s, row));
    st->last_completion = SH_MAX(st->last_completion, row->id);
    st->completion_rows++;
    st->completion_bytes += KEY_BYTES + COMPLETION_HEAD + tokens * 4;
    s->n->dirty = true;
    node_retain_from(s, s->n->options.completions_age_ms_max);
    return trim(s);
}

sh_status sh_node_get_completion(sh_txn *txn, uint64_t id, sh_buf *copy, sh_completion_row *out,
                                 sh_error *err)
{
    uint8_t key[KEY_BYTES];
    sh_slice value;
    sh_completion_row row;
    sh_key_put_u64(key, id);
    sh_status status = sh_txn_get(txn, SH_NODE_T_COMPLETION, key, sizeof(key), &value);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "completion %llu is not kept", (unsigned long long)id);
    if (status != SH_OK)
        return sh_fail(err, status, "completion %llu cannot be read", (unsigned long long)id);
    SH_TRY(node_completion_head(id, value, &row, err));
    size_t tokens = (size_t)row.n_context + row.n;
    sh_buf_clear(copy);
    int32_t *to = (int32_t *)(void *)sh_buf_reserve(copy, SH_MAX(tokens, (size_t)1) * 4);
    if (to == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a completion of %zu tokens", tokens);
    const uint8_t *from = (const uint8_t *)value.data + COMPLETION_HEAD;
    for (size_t i = 0; i < tokens; i++)
        to[i] = (int32_t)node_get_le(from + 4 * i, 4);
    copy->len = tokens * 4;
    row.tokens = to;
    *out = row;
    return SH_OK;
}

/* ---- what the user did with it ---- */

/* What of the context the text before the target lacks. The readers of feedback take up a session
 * where the row before left it, so only the last row of all can spare some. */
static sh_status put_context(node_step *s, const sh_completion_row *row, bool accepted)
{
    sh_feedback last = {0};
    uint32_t lacks = row->n_context;
    sh_status status = node_feedback_last(s, &last);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    uint64_t end = (uint64_t)last.offset + last.n;
    bool same = status == SH_OK && last.session == row->session && last.user == row->user;
    if (same && end <= row->offset && row->offset - end < lacks)
        lacks = (uint32_t)(row->offset - end);
    if (lacks == 0)
        return SH_OK;
    sh_feedback context = {
        .session = row->session,
        .user = row->user,
        .accepted = accepted,
        .offset = row->offset - SH_MIN(lacks, row->offset),
        .n = lacks,
        .tokens = row->tokens + (row->n_context - lacks),
    };
    return node_feedback_put(s, &context);
}

static sh_status put_target(node_step *s, const sh_completion_row *row, const sh_rating *rating)
{
    bool accepted = rating->kind == SH_FEEDBACK_ACCEPT;
    sh_feedback target = {
        .session = row->session,
        .user = row->user,
        .offset = row->offset,
        .accepted = accepted,
        .target = true,
        .n = rating->n,
        .tokens = rating->tokens,
    };
    if (rating->n == 0 && accepted) { /* the proposal is what the author means */
        target.n = row->n;
        target.tokens = row->tokens + row->n_context;
    }
    if (target.n == 0)
        return SH_OK;
    SH_TRY(put_context(s, row, accepted));
    return node_feedback_put(s, &target);
}

/* A record that the monitor in the store does not have yet is counted again from its row after a
 * crash, this feedback included; for an older one the monitor must be saved now. */
static sh_status rate_record(node_step *s, const sh_completion_row *row, const sh_rating *rating)
{
    sh_node *n = s->n;
    uint64_t seq;
    sh_slice value;
    sh_record record;
    if (row->record <= n->state.monitor_seq)
        n->monitor_dirty = true;
    sh_status status = node_row_next(s, SH_NODE_T_RECORD, row->record, &seq, &value);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    if (status == SH_OK && seq == row->record) {
        uint8_t bytes[SH_RECORD_BYTES];
        SH_TRY(sh_record_decode(value.data, value.n, &record, s->err));
        record.feedback = (uint8_t)rating->kind;
        record.edit_distance = rating->edit_distance;
        sh_record_encode(&record, bytes);
        SH_TRY(node_row_put(s, SH_NODE_T_RECORD, seq, bytes, sizeof(bytes)));
    }
    sh_monitor_feedback(n->monitor, row->release_version, rating->kind, rating->edit_distance);
    return SH_OK;
}

static sh_status rate(node_step *s, sh_completion_row *row, const sh_rating *rating)
{
    SH_TRY(put_target(s, row, rating));
    SH_TRY(rate_record(s, row, rating));
    row->rated = (uint8_t)rating->kind;
    SH_TRY(write_row(s, row));
    s->n->dirty = true;
    return node_train_consider(s);
}

sh_status node_on_rating(node_step *s, const sh_rating *rating)
{
    sh_buf copy;
    sh_completion_row row;
    sh_error local = {0};
    sh_buf_init(&copy, SH_NODE_COMPLETION_TOKENS_MAX * sizeof(int32_t));
    sh_status status = sh_node_get_completion(s->txn, rating->id, &copy, &row, &local);
    bool sound = rating->kind > SH_FEEDBACK_NONE && rating->kind < SH_FEEDBACK_KINDS &&
                 rating->n <= SH_NODE_FEEDBACK_ROW_MAX;
    if (status == SH_OK && sound && row.rated == SH_FEEDBACK_NONE) {
        status = rate(s, &row, rating);
    } else if (status == SH_ERR_NOT_FOUND || (status == SH_OK && row.rated != rating->kind)) {
        node_note(s, SH_NOTE_DROPPED, rating->id);
        status = SH_OK;
    } else if (status != SH_OK && s->err != NULL) {
        *s->err = local;
    }
    sh_buf_release(&copy);
    return status;
}
