/*
 * Rows of a node's store; keys are a sequence (8, big-endian), of the ledger class (1) and
 * sequence. FEEDBACK  version (1), flags (1: accepted, 2: target), session (8), offset (4), n (4),
 *             n tokens (4 each); little-endian
 *   LEDGER    version (1), state (1), made_ms (8), settled_ms (8), sha256 (32); little-endian
 *   RECORD    shared/stats/record.h; WINDOW shared/stats/window.h, whole
 */
#include "edge-node/node_internal.h"

#include <stdlib.h>
#include <string.h>

#define FEEDBACK_VERSION 1
#define FEEDBACK_HEAD    18
#define FLAG_ACCEPTED    1u
#define FLAG_TARGET      2u
#define LEDGER_VERSION   1
#define LEDGER_BYTES     50
#define LEDGER_KEY       9

static void put_le(uint8_t *out, uint64_t x, size_t width)
{
    for (size_t i = 0; i < width; i++)
        out[i] = (uint8_t)(x >> (8 * i));
}

static uint64_t get_le(const uint8_t *in, size_t width)
{
    uint64_t x = 0;
    for (size_t i = 0; i < width; i++)
        x |= (uint64_t)in[i] << (8 * i);
    return x;
}

static sh_status put_row(node_step *s, unsigned table, uint64_t seq, const void *value, size_t n)
{
    uint8_t key[8];
    sh_key_put_u64(key, seq);
    return sh_txn_put(s->txn, table, key, sizeof(key), value, n, s->err);
}

static sh_status del_row(node_step *s, unsigned table, uint64_t seq)
{
    uint8_t key[8];
    sh_key_put_u64(key, seq);
    return sh_txn_del(s->txn, table, key, sizeof(key), s->err);
}

sh_status node_record_put(node_step *s, const sh_record *record)
{
    node_state *st = &s->n->state;
    uint8_t bytes[SH_RECORD_BYTES];
    SH_ASSERT(record->seq == st->record_next);
    sh_record_encode(record, bytes);
    SH_TRY(put_row(s, SH_NODE_T_RECORD, record->seq, bytes, sizeof(bytes)));
    st->record_next++;
    while (st->record_next - st->record_first > s->n->options.records_max)
        SH_TRY(del_row(s, SH_NODE_T_RECORD, st->record_first++));
    return SH_OK;
}

sh_status node_window_put(node_step *s, const sh_window *window)
{
    node_state *st = &s->n->state;
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
    sh_status status = sh_window_encode(window, true, &bytes);
    if (status == SH_OK)
        status = put_row(s, SH_NODE_T_WINDOW, window->index, bytes.data, bytes.len);
    else
        status = sh_fail(s->err, status, "node: a window cannot be encoded");
    sh_buf_release(&bytes);
    if (status != SH_OK)
        return status;
    st->window_next = window->index + 1;
    while (st->window_next - st->window_first > s->n->options.windows_max)
        SH_TRY(del_row(s, SH_NODE_T_WINDOW, st->window_first++));
    return SH_OK;
}

/* ---- feedback ---- */

typedef struct {
    sh_feedback row; /* tokens NULL */
    const uint8_t *tokens;
} feedback_row;

static sh_status feedback_decode(sh_slice value, feedback_row *out, sh_error *err)
{
    const uint8_t *p = value.data;
    if (value.n < FEEDBACK_HEAD || p[0] != FEEDBACK_VERSION)
        return sh_fail(err, SH_ERR_CORRUPT, "feedback row: %zu bytes of an unknown layout",
                       value.n);
    sh_feedback row = {
        .accepted = (p[1] & FLAG_ACCEPTED) != 0,
        .target = (p[1] & FLAG_TARGET) != 0,
        .session = get_le(p + 2, 8),
        .offset = (uint32_t)get_le(p + 10, 4),
        .n = (uint32_t)get_le(p + 14, 4),
    };
    if (row.n == 0 || row.n > SH_NODE_FEEDBACK_ROW_MAX ||
        value.n != FEEDBACK_HEAD + (size_t)row.n * 4)
        return sh_fail(err, SH_ERR_CORRUPT, "feedback row: %u tokens in %zu bytes", row.n, value.n);
    *out = (feedback_row){row, p + FEEDBACK_HEAD};
    return SH_OK;
}

static sh_status feedback_trim(node_step *s)
{
    node_state *st = &s->n->state;
    uint64_t max = s->n->options.feedback_tokens_max;
    while (st->feedback_first < st->feedback_next &&
           (st->feedback_tokens > max || st->feedback_all_tokens / NODE_CONTEXT_FACTOR > max)) {
        uint8_t key[8];
        sh_slice value;
        feedback_row old;
        sh_key_put_u64(key, st->feedback_first);
        if (sh_txn_get(s->txn, SH_NODE_T_FEEDBACK, key, sizeof(key), &value) != SH_OK)
            return sh_fail(s->err, SH_ERR_CORRUPT, "feedback row %llu is missing",
                           (unsigned long long)st->feedback_first);
        SH_TRY(feedback_decode(value, &old, s->err));
        SH_TRY(del_row(s, SH_NODE_T_FEEDBACK, st->feedback_first));
        st->feedback_first++;
        st->feedback_all_tokens -= old.row.n;
        if (old.row.target) {
            st->feedback_tokens -= old.row.n;
            st->feedback_rows--;
        }
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
    put_le(value + 2, feedback->session, 8);
    put_le(value + 10, feedback->offset, 4);
    put_le(value + 14, feedback->n, 4);
    for (uint32_t i = 0; i < feedback->n; i++)
        put_le(value + FEEDBACK_HEAD + 4 * (size_t)i, (uint32_t)feedback->tokens[i], 4);
    sh_status status = put_row(s, SH_NODE_T_FEEDBACK, st->feedback_next, value, bytes);
    free(value);
    if (status != SH_OK)
        return status;
    st->feedback_next++;
    st->feedback_all_tokens += feedback->n;
    if (feedback->target) {
        st->feedback_tokens += feedback->n;
        st->feedback_rows++;
    }
    return feedback_trim(s);
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
    feedback_row row;
    SH_TRY(feedback_decode(value, &row, err));
    for (uint32_t i = 0; i < row.row.n; i++)
        v->tokens[i] = (int32_t)get_le(row.tokens + 4 * (size_t)i, 4);
    row.row.tokens = v->tokens;
    return v->fn(v->arg, &row.row);
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
    if (key.n != LEDGER_KEY || value.n != LEDGER_BYTES || p[0] != LEDGER_VERSION ||
        p[1] > SH_LEDGER_DROPPED)
        return sh_fail(err, SH_ERR_CORRUPT, "ledger row: %zu bytes of an unknown layout", value.n);
    *out = (sh_ledger_row){
        .cls = k[0],
        .seq = sh_key_get_u64(k + 1),
        .state = (sh_ledger_state)p[1],
        .made_ms = get_le(p + 2, 8),
        .settled_ms = get_le(p + 10, 8),
    };
    memcpy(out->sha256.b, p + 18, sizeof(out->sha256.b));
    return SH_OK;
}

static sh_status ledger_put(node_step *s, const sh_ledger_row *row)
{
    uint8_t key[LEDGER_KEY], value[LEDGER_BYTES];
    ledger_key(key, row->cls, row->seq);
    value[0] = LEDGER_VERSION;
    value[1] = (uint8_t)row->state;
    put_le(value + 2, row->made_ms, 8);
    put_le(value + 10, row->settled_ms, 8);
    memcpy(value + 18, row->sha256.b, sizeof(row->sha256.b));
    return sh_txn_put(s->txn, SH_NODE_T_LEDGER, key, sizeof(key), value, sizeof(value), s->err);
}

sh_status node_ledger_add(node_step *s, sh_class cls, uint64_t seq, const sh_hash *sha256)
{
    sh_ledger_row row = {.cls = (uint8_t)cls, .seq = seq, .sha256 = *sha256, .made_ms = s->now_ms};
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
    row.settled_ms = s->now_ms;
    return ledger_put(s, &row);
}

typedef struct {
    sh_status (*fn)(void *arg, const sh_ledger_row *row);
    void *arg;
} ledger_visit;

static sh_status visit_ledger(void *arg, sh_slice key, sh_slice value, sh_error *err)
{
    ledger_visit *v = arg;
    sh_ledger_row row;
    SH_TRY(ledger_decode(key, value, &row, err));
    return v->fn(v->arg, &row);
}

sh_status sh_node_each_ledger(sh_txn *txn, sh_status (*fn)(void *arg, const sh_ledger_row *row),
                              void *arg, sh_error *err)
{
    ledger_visit v = {fn, arg};
    return each_row(txn, SH_NODE_T_LEDGER, visit_ledger, &v, err);
}
