/*
 * Rows of a node's store; keys are a sequence (8, big-endian), of the ledger class (1) and
 * sequence.
 *   FEEDBACK  version (1), flags (1: accepted, 2: target), session (8), offset (4), n (4), user
 *             (8), at_ms (8), n tokens (4 each); little-endian. Version 1 has neither user nor
 * at_ms LEDGER    version (1), state (1), made_ms (8), settled_ms (8), sha256 (32), epoch (8),
 * sequence on the wire (8); little-endian. An owed row's two are not read: a renewal may change
 *             them. Version 1 ends before them: the store's first epoch, and its own sequence
 *   RECORD    shared/stats/record.h; WINDOW shared/stats/window.h, whole
 */
#include "edge-node/node_internal.h"

#include <stdlib.h>
#include <string.h>

#define FEEDBACK_VERSION 2
#define FEEDBACK_HEAD    34
#define FEEDBACK_HEAD_1  18
#define FLAG_ACCEPTED    1u
#define FLAG_TARGET      2u
#define LEDGER_VERSION   2
#define LEDGER_BYTES     66
#define LEDGER_BYTES_1   50
#define LEDGER_KEY       9

#define RECORD_ROW_BYTES (8 + SH_RECORD_BYTES)

sh_status node_row_put(node_step *s, unsigned table, uint64_t seq, const void *value, size_t n)
{
    uint8_t key[8];
    sh_key_put_u64(key, seq);
    return sh_txn_put(s->txn, table, key, sizeof(key), value, n, s->err);
}

sh_status node_row_del(node_step *s, unsigned table, uint64_t seq)
{
    uint8_t key[8];
    sh_key_put_u64(key, seq);
    return sh_txn_del(s->txn, table, key, sizeof(key), s->err);
}

sh_status node_row_next(node_step *s, unsigned table, uint64_t from, uint64_t *seq, sh_slice *value)
{
    uint8_t from_key[8];
    sh_cursor *cursor = NULL;
    sh_slice key;
    sh_key_put_u64(from_key, from);
    SH_TRY(sh_cursor_open(s->txn, table, &cursor, s->err));
    sh_status status = sh_cursor_seek(cursor, from_key, sizeof(from_key), &key, value);
    sh_cursor_close(&cursor);
    if (status == SH_ERR_NOT_FOUND)
        return status;
    if (status != SH_OK || key.n != sizeof(from_key))
        return sh_fail(s->err, status != SH_OK ? status : SH_ERR_CORRUPT,
                       "node: table %u cannot be read", table);
    *seq = sh_key_get_u64(key.data);
    return SH_OK;
}

uint64_t node_records_max(const sh_node *n)
{
    uint64_t bytes = n->options.records_bytes_max;
    uint64_t rows = bytes == 0 ? UINT64_MAX : SH_MAX(bytes / RECORD_ROW_BYTES, (uint64_t)1);
    return SH_MIN(rows, n->options.records_max);
}

sh_status node_record_put(node_step *s, const sh_record *record)
{
    node_state *st = &s->n->state;
    uint8_t bytes[SH_RECORD_BYTES];
    SH_ASSERT(record->seq == st->record_next);
    sh_record_encode(record, bytes);
    SH_TRY(node_row_put(s, SH_NODE_T_RECORD, record->seq, bytes, sizeof(bytes)));
    st->record_next++;
    node_retain_from(s, s->n->options.records_age_ms_max);
    while (st->record_next - st->record_first > node_records_max(s->n))
        SH_TRY(node_row_del(s, SH_NODE_T_RECORD, st->record_first++));
    return SH_OK;
}

sh_status node_window_put(node_step *s, const sh_window *window)
{
    node_state *st = &s->n->state;
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
    sh_status status = sh_window_encode(window, true, &bytes);
    if (status == SH_OK)
        status = node_row_put(s, SH_NODE_T_WINDOW, window->index, bytes.data, bytes.len);
    else
        status = sh_fail(s->err, status, "node: a window cannot be encoded");
    sh_buf_release(&bytes);
    if (status != SH_OK)
        return status;
    st->window_next = window->index + 1;
    while (st->window_next - st->window_first > s->n->options.windows_max)
        SH_TRY(node_row_del(s, SH_NODE_T_WINDOW, st->window_first++));
    return SH_OK;
}

/* ---- feedback ---- */

static size_t feedback_head_bytes(uint8_t version)
{
    return version == 1 ? FEEDBACK_HEAD_1 : FEEDBACK_HEAD;
}

static const uint8_t *feedback_tokens(sh_slice value)
{
    const uint8_t *p = value.data;
    return p + feedback_head_bytes(p[0]);
}

sh_status node_feedback_head(sh_slice value, sh_feedback *out, sh_error *err)
{
    const uint8_t *p = value.data;
    if (value.n < FEEDBACK_HEAD_1 || p[0] == 0 || p[0] > FEEDBACK_VERSION ||
        value.n < feedback_head_bytes(p[0]))
        return sh_fail(err, SH_ERR_CORRUPT, "feedback row: %zu bytes of an unknown layout",
                       value.n);
    sh_feedback row = {
        .accepted = (p[1] & FLAG_ACCEPTED) != 0,
        .target = (p[1] & FLAG_TARGET) != 0,
        .session = node_get_le(p + 2, 8),
        .offset = (uint32_t)node_get_le(p + 10, 4),
        .n = (uint32_t)node_get_le(p + 14, 4),
    };
    if (p[0] > 1) {
        row.user = node_get_le(p + 18, 8);
        row.at_ms = node_get_le(p + 26, 8);
    }
    if (row.n == 0 || row.n > SH_NODE_FEEDBACK_ROW_MAX ||
        value.n != feedback_head_bytes(p[0]) + (size_t)row.n * 4)
        return sh_fail(err, SH_ERR_CORRUPT, "feedback row: %u tokens in %zu bytes", row.n, value.n);
    *out = row;
    return SH_OK;
}

sh_status node_feedback_last(node_step *s, sh_feedback *out)
{
    sh_cursor *cursor = NULL;
    sh_slice value;
    SH_TRY(sh_cursor_open(s->txn, SH_NODE_T_FEEDBACK, &cursor, s->err));
    sh_status status = sh_cursor_last(cursor, NULL, &value);
    sh_cursor_close(&cursor);
    if (status == SH_OK)
        return node_feedback_head(value, out, s->err);
    return status == SH_ERR_NOT_FOUND ? status
                                      : sh_fail(s->err, status, "node: feedback cannot be read");
}

sh_status node_feedback_del(node_step *s, uint64_t seq, const sh_feedback *row)
{
    node_state *st = &s->n->state;
    SH_TRY(node_row_del(s, SH_NODE_T_FEEDBACK, seq));
    st->feedback_all_tokens -= SH_MIN(row->n, st->feedback_all_tokens);
    if (row->target) {
        st->feedback_tokens -= SH_MIN(row->n, st->feedback_tokens);
        st->feedback_rows -= SH_MIN(1, st->feedback_rows);
    }
    s->n->dirty = true;
    return SH_OK;
}

static sh_status feedback_trim(node_step *s)
{
    node_state *st = &s->n->state;
    uint64_t max = s->n->options.feedback_tokens_max;
    while (st->feedback_tokens > max || st->feedback_all_tokens / NODE_CONTEXT_FACTOR > max) {
        sh_slice value;
        sh_feedback old;
        uint64_t seq;
        sh_status status = node_row_next(s, SH_NODE_T_FEEDBACK, st->feedback_first, &seq, &value);
        if (status == SH_ERR_NOT_FOUND)
            return sh_fail(s->err, SH_ERR_CORRUPT, "feedback: %llu tokens counted, and no row",
                           (unsigned long long)st->feedback_all_tokens);
        SH_TRY(status);
        SH_TRY(node_feedback_head(value, &old, s->err));
        SH_TRY(node_feedback_del(s, seq, &old));
        st->feedback_first = seq + 1;
    }
    return SH_OK;
}

sh_status node_feedback_put(node_step *s, const sh_feedback *feedback)
{
    node_state *st = &s->n->state;
    SH_ASSERT(feedback->n > 0 && feedback->n <= SH_NODE_FEEDBACK_ROW_MAX);
    size_t bytes = FEEDBACK_HEAD + (size_t)feedback->n * 4;
    uint8_t *value = sh_calloc(1, bytes);
    if (value == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: feedback of %u tokens", feedback->n);
    value[0] = FEEDBACK_VERSION;
    value[1] =
        (uint8_t)((feedback->accepted ? FLAG_ACCEPTED : 0) | (feedback->target ? FLAG_TARGET : 0));
    node_put_le(value + 2, feedback->session, 8);
    node_put_le(value + 10, feedback->offset, 4);
    node_put_le(value + 14, feedback->n, 4);
    node_put_le(value + 18, feedback->user, 8);
    node_put_le(value + 26, s->row_ms, 8);
    for (uint32_t i = 0; i < feedback->n; i++)
        node_put_le(value + FEEDBACK_HEAD + 4 * (size_t)i, (uint32_t)feedback->tokens[i], 4);
    sh_status status = node_row_put(s, SH_NODE_T_FEEDBACK, st->feedback_next, value, bytes);
    free(value);
    if (status != SH_OK)
        return status;
    st->feedback_next++;
    st->feedback_all_tokens += feedback->n;
    if (feedback->target) {
        st->feedback_tokens += feedback->n;
        st->feedback_rows++;
    }
    s->n->dirty = true;
    node_retain_from(s, s->n->options.feedback_age_ms_max);
    return feedback_trim(s);
}

sh_status node_feedback_migrate(node_step *s, uint64_t seq)
{
    sh_slice value;
    sh_feedback row;
    uint64_t at;
    SH_TRY(node_row_next(s, SH_NODE_T_FEEDBACK, seq, &at, &value));
    SH_TRY(node_feedback_head(value, &row, s->err));
    size_t bytes = FEEDBACK_HEAD + (size_t)row.n * 4;
    uint8_t *now = sh_calloc(1, bytes);
    if (now == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: feedback of %u tokens", row.n);
    memcpy(now, value.data, FEEDBACK_HEAD_1);
    now[0] = FEEDBACK_VERSION;
    node_put_le(now + 18, row.user, 8);
    node_put_le(now + 26, s->row_ms, 8);
    memcpy(now + FEEDBACK_HEAD, feedback_tokens(value), (size_t)row.n * 4);
    sh_status status = node_row_put(s, SH_NODE_T_FEEDBACK, at, now, bytes);
    free(now);
    return status;
}

/* Calls visit for every row of a table. */
static sh_status each_row(sh_txn *txn, unsigned table,
                          sh_status (*visit)(void *arg, sh_slice key, sh_slice value,
                                             sh_error *err),
                          void *arg, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    sh_status status = sh_cursor_open(txn, table, &cursor, err);
    if (status != SH_OK)
        return status;
    status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    while (status == SH_OK) {
        status = visit(arg, key, value, err);
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
        else
            goto cleanup;
    }
    if (status == SH_ERR_NOT_FOUND)
        status = SH_OK;
    else
        status = sh_fail(err, status, "node: table %u cannot be read", table);
cleanup:
    sh_cursor_close(&cursor);
    return status;
}

typedef struct {
    sh_status (*fn)(void *arg, const sh_feedback *row);
    void *arg;
    int32_t *tokens; /* [SH_NODE_FEEDBACK_ROW_MAX]: stored ones are not aligned */
} feedback_visit;

static sh_status visit_feedback(void *arg, sh_slice key, sh_slice value, sh_error *err)
{
    (void)key;
    feedback_visit *v = arg;
    sh_feedback row;
    SH_TRY(node_feedback_head(value, &row, err));
    const uint8_t *tokens = feedback_tokens(value);
    for (uint32_t i = 0; i < row.n; i++)
        v->tokens[i] = (int32_t)node_get_le(tokens + 4 * (size_t)i, 4);
    row.tokens = v->tokens;
    return v->fn(v->arg, &row);
}

sh_status sh_node_each_feedback(sh_txn *txn, sh_status (*fn)(void *arg, const sh_feedback *row),
                                void *arg, sh_error *err)
{
    feedback_visit v = {fn, arg, sh_calloc(SH_NODE_FEEDBACK_ROW_MAX, sizeof(int32_t))};
    if (v.tokens == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "feedback: no memory for a row");
    sh_status status = each_row(txn, SH_NODE_T_FEEDBACK, visit_feedback, &v, err);
    free(v.tokens);
    return status;
}

/* ---- ledger ---- */

static void ledger_key(uint8_t key[LEDGER_KEY], uint8_t cls, uint64_t seq)
{
    key[0] = cls;
    sh_key_put_u64(key + 1, seq);
}

static sh_status ledger_decode(sh_slice key, sh_slice value, sh_ledger_row *out, sh_error *err)
{
    const uint8_t *k = key.data, *p = value.data;
    bool known = key.n == LEDGER_KEY && value.n >= 2 &&
                 ((p[0] == LEDGER_VERSION && value.n == LEDGER_BYTES) ||
                  (p[0] == 1 && value.n == LEDGER_BYTES_1));
    if (!known || p[1] > SH_LEDGER_DROPPED)
        return sh_fail(err, SH_ERR_CORRUPT, "ledger row: %zu bytes of an unknown layout", value.n);
    *out = (sh_ledger_row){
        .cls = k[0],
        .seq = sh_key_get_u64(k + 1),
        .state = (sh_ledger_state)p[1],
        .made_ms = node_get_le(p + 2, 8),
        .settled_ms = node_get_le(p + 10, 8),
    };
    memcpy(out->sha256.b, p + 18, sizeof(out->sha256.b));
    if (p[0] > 1)
        out->id = (sh_wire_id){node_get_le(p + 50, 8), node_get_le(p + 58, 8)};
    return SH_OK;
}

static sh_status ledger_put(node_step *s, const sh_ledger_row *row)
{
    uint8_t key[LEDGER_KEY], value[LEDGER_BYTES];
    ledger_key(key, row->cls, row->seq);
    value[0] = LEDGER_VERSION;
    value[1] = (uint8_t)row->state;
    node_put_le(value + 2, row->made_ms, 8);
    node_put_le(value + 10, row->settled_ms, 8);
    memcpy(value + 18, row->sha256.b, sizeof(row->sha256.b));
    sh_wire_id id = sh_link_wire_id(&s->n->link.segments, row->cls, row->seq);
    node_put_le(value + 50, id.epoch, 8);
    node_put_le(value + 58, id.seq, 8);
    return sh_txn_put(s->txn, SH_NODE_T_LEDGER, key, sizeof(key), value, sizeof(value), s->err);
}

sh_status node_ledger_add(node_step *s, sh_class cls, uint64_t seq, const sh_hash *sha256)
{
    sh_ledger_row row = {.cls = (uint8_t)cls, .seq = seq, .sha256 = *sha256, .made_ms = s->wall_ms};
    SH_TRY(ledger_put(s, &row));
    if (seq > SH_NODE_LEDGER_MAX) { /* one row a sequence: this one is the oldest */
        uint8_t key[LEDGER_KEY];
        ledger_key(key, (uint8_t)cls, seq - SH_NODE_LEDGER_MAX);
        SH_TRY(sh_txn_del(s->txn, SH_NODE_T_LEDGER, key, sizeof(key), s->err));
    }
    return SH_OK;
}

sh_status node_ledger_settle(node_step *s, sh_class cls, uint64_t seq, sh_ledger_state how)
{
    uint8_t key[LEDGER_KEY];
    sh_slice value;
    sh_ledger_row row;
    ledger_key(key, (uint8_t)cls, seq);
    sh_status status = sh_txn_get(s->txn, SH_NODE_T_LEDGER, key, sizeof(key), &value);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK; /* so old that the ring has passed it */
    if (status != SH_OK)
        return sh_fail(s->err, status, "ledger: cannot be read");
    SH_TRY(ledger_decode((sh_slice){key, sizeof(key)}, value, &row, s->err));
    row.state = how;
    row.settled_ms = s->wall_ms;
    return ledger_put(s, &row);
}

typedef struct {
    sh_status (*fn)(void *arg, const sh_ledger_row *row);
    void *arg;
    sh_link_segments segments;
    uint64_t origin;
} ledger_visit;

static sh_status visit_ledger(void *arg, sh_slice key, sh_slice value, sh_error *err)
{
    ledger_visit *v = arg;
    sh_ledger_row row;
    SH_TRY(ledger_decode(key, value, &row, err));
    if (row.state == SH_LEDGER_OWED)
        row.id = sh_link_wire_id(&v->segments, row.cls, row.seq);
    else if (row.id.epoch == 0)
        row.id = (sh_wire_id){v->origin, row.seq};
    return v->fn(v->arg, &row);
}

sh_status sh_node_each_ledger(sh_txn *txn, sh_status (*fn)(void *arg, const sh_ledger_row *row),
                              void *arg, sh_error *err)
{
    const sh_outbox outbox = {.table = SH_NODE_T_OUTBOX, .meta_table = SH_NODE_T_META};
    ledger_visit v = {.fn = fn, .arg = arg};
    SH_TRY(sh_node_stored_origin(txn, &v.origin, err));
    SH_TRY(sh_link_stored_segments(txn, &outbox, &v.segments, err));
    return each_row(txn, SH_NODE_T_LEDGER, visit_ledger, &v, err);
}
