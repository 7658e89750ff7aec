/*
 * Rows of the tables UPDATE, RELEASE, EVALUATION and AUDIT, and the readers that reports use.
 *
 * Integers little-endian; each value but an evaluation begins with a version byte: ROW_VERSION, or
 * 1 where ROW_VERSION_2 is written, which is read without what 2 added.
 * UPDATE   id 48 -> version, verdict, reason, 0, candidate 8, version 8, norm f64, cosine f64,
 *          sh_update_meta as it was sent (nothing when it was not readable)
 * RELEASE  'c' + candidate 8 (big-endian) -> the decided candidate; from version 2 on what canary
 *          nodes found comes before the updates merged
 *          'v' + version 8 (big-endian) -> version byte, candidate 8, signed manifest
 * EVALUATION  candidate 8 (big-endian), id 48 -> sh_evaluation as it was sent
 * AUDIT    seq 8 (big-endian) -> version, hash of the entry before 32, at_ms 8, text; an entry's
 *          hash is BLAKE2b-256 of its value, so none can be changed or left out unseen
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define ROW_VERSION         1
#define ROW_VERSION_2       2 /* of candidates */
#define UPDATE_HEADER_BYTES 36
#define AUDIT_HEADER_BYTES  41
#define TAG_CANDIDATE       'c'
#define TAG_VERSION         'v'

sh_status coord_row_put(sh_txn *txn, unsigned table, sh_slice key, coord_writer *w, sh_error *err)
{
    sh_status status;
    if (w->bad)
        status = sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for a row of table %s",
                         sh_coord_tables[table]);
    else
        status = sh_txn_put(txn, table, key.data, key.n, w->buf.data, w->buf.len, err);
    sh_buf_release(&w->buf);
    return status;
}

sh_status coord_row_corrupt(sh_error *err, unsigned table)
{
    return sh_fail(err, SH_ERR_CORRUPT,
                   "coordinator: a row of table %s does not have this program's form",
                   sh_coord_tables[table]);
}

/* ---- update identity ---- */

void coord_id_put(uint8_t out[COORD_ID_BYTES], const sh_update_id *id)
{
    memcpy(out, id->node.b, 32);
    sh_key_put_u64(out + 32, id->epoch);
    sh_key_put_u64(out + 40, id->seq);
}

bool coord_id_get(sh_slice key, sh_update_id *id)
{
    if (key.n != COORD_ID_BYTES)
        return false;
    const uint8_t *p = key.data;
    memcpy(id->node.b, p, 32);
    id->epoch = sh_key_get_u64(p + 32);
    id->seq = sh_key_get_u64(p + 40);
    return true;
}

int coord_id_compare(const void *a, const void *b)
{
    const sh_update_id *x = a, *y = b;
    int c = memcmp(x->node.b, y->node.b, 32);
    if (c != 0)
        return c;
    if (x->epoch != y->epoch)
        return x->epoch < y->epoch ? -1 : 1;
    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/* ---- UPDATE ---- */

static void update_header(uint8_t h[UPDATE_HEADER_BYTES], const sh_update_row *row)
{
    uint64_t numbers[4] = {row->candidate, row->version, 0, 0};
    memcpy(&numbers[2], &row->norm, 8);
    memcpy(&numbers[3], &row->cosine, 8);
    h[0] = ROW_VERSION;
    h[1] = (uint8_t)row->verdict;
    h[2] = (uint8_t)row->reason;
    h[3] = 0;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++)
            h[4 + 8 * i + j] = (uint8_t)(numbers[i] >> (8 * j));
}

sh_status coord_update_put(sh_txn *txn, const sh_update_row *row, sh_bytes meta_bytes,
                           sh_error *err)
{
    uint8_t key[COORD_ID_BYTES], header[UPDATE_HEADER_BYTES];
    coord_id_put(key, &row->id);
    update_header(header, row);
    coord_writer w;
    coord_writer_init(&w);
    coord_put_bytes(&w, header, sizeof header);
    coord_put_bytes(&w, meta_bytes.data, meta_bytes.n);
    return coord_row_put(txn, SH_COORD_T_UPDATE, (sh_slice){key, sizeof key}, &w, err);
}

static sh_status update_decode(const sh_update_id *id, sh_slice value, sh_update_row *row,
                               sh_error *err)
{
    sh_update_row out = {.id = *id};
    coord_reader r = coord_reader_of(value);
    bool good = coord_get_uint(&r, 1) == ROW_VERSION;
    unsigned verdict = (unsigned)coord_get_uint(&r, 1), reason = (unsigned)coord_get_uint(&r, 1);
    (void)coord_get_uint(&r, 1);
    out.candidate = coord_get_uint(&r, 8);
    out.version = coord_get_uint(&r, 8);
    out.norm = coord_get_f64(&r);
    out.cosine = coord_get_f64(&r);
    if (!good || r.bad || verdict > SH_VERDICT_RELAYED || reason >= SH_REASONS)
        return coord_row_corrupt(err, SH_COORD_T_UPDATE);
    out.verdict = (sh_verdict)verdict;
    out.reason = (sh_reason)reason;
    /* What could not be read when it came cannot be read now. */
    if (r.p != r.end && sh_update_meta_decode(r.p, (size_t)(r.end - r.p), &out.meta, NULL) != SH_OK)
        return coord_row_corrupt(err, SH_COORD_T_UPDATE);
    *row = out;
    return SH_OK;
}

sh_status coord_update_get(sh_txn *txn, const sh_update_id *id, sh_update_row *row, sh_error *err)
{
    uint8_t key[COORD_ID_BYTES];
    coord_id_put(key, id);
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_COORD_T_UPDATE, key, sizeof key, &value);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, SH_ERR_NOT_FOUND, "coordinator: no such update");
    SH_TRY(status);
    return update_decode(id, value, row, err);
}

sh_status coord_update_set(sh_txn *txn, const sh_update_row *row, sh_error *err)
{
    uint8_t key[COORD_ID_BYTES], header[UPDATE_HEADER_BYTES];
    coord_id_put(key, &row->id);
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_COORD_T_UPDATE, key, sizeof key, &value);
    if (status != SH_OK || value.n < sizeof header)
        return coord_row_corrupt(err, SH_COORD_T_UPDATE);
    update_header(header, row);
    coord_writer w;
    coord_writer_init(&w);
    coord_put_bytes(&w, header, sizeof header);
    coord_put_bytes(&w, (const uint8_t *)value.data + sizeof header, value.n - sizeof header);
    return coord_row_put(txn, SH_COORD_T_UPDATE, (sh_slice){key, sizeof key}, &w, err);
}

/* ---- RELEASE ---- */

static void release_key(uint8_t key[9], char tag, uint64_t number)
{
    key[0] = (uint8_t)tag;
    sh_key_put_u64(key + 1, number);
}

sh_status coord_candidate_row_put(sh_txn *txn, const sh_release_row *row, sh_error *err)
{
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, ROW_VERSION_2, 1);
    const uint64_t numbers[] = {row->version, row->parent,       row->at_ms,   row->bytes,
                                row->updates, row->adapter_rank, row->n_merged};
    for (size_t i = 0; i < SH_COUNT(numbers); i++)
        coord_put_uint(&w, numbers[i], 8);
    const double reals[] = {row->loss_parent, row->loss_candidate,    row->loss_adapter_form,
                            row->worst_slice, row->adapter_discarded, (double)row->server_scale};
    for (size_t i = 0; i < SH_COUNT(reals); i++)
        coord_put_f64(&w, reals[i]);
    coord_put_hash(&w, &row->sha256);
    coord_put_hash(&w, &row->new_master);
    coord_put_hash(&w, &row->suite);
    coord_put_text(&w, row->format);
    coord_put_text(&w, row->verdict);
    coord_put_uint(&w, row->canary_nodes, 4);
    coord_put_uint(&w, row->canary_tokens, 8);
    coord_put_f64(&w, row->canary_parent);
    coord_put_f64(&w, row->canary_candidate);
    for (uint32_t i = 0; i < row->n_merged; i++) {
        uint8_t id[COORD_ID_BYTES];
        coord_id_put(id, &row->merged[i]);
        coord_put_bytes(&w, id, sizeof id);
    }
    uint8_t key[9];
    release_key(key, TAG_CANDIDATE, row->candidate);
    return coord_row_put(txn, SH_COORD_T_RELEASE, (sh_slice){key, sizeof key}, &w, err);
}

static sh_status release_decode(uint64_t candidate, sh_slice value, sh_release_row *row,
                                sh_error *err)
{
    sh_release_row out = {.candidate = candidate};
    coord_reader r = coord_reader_of(value);
    uint64_t version = coord_get_uint(&r, 1);
    bool good = version >= 1 && version <= ROW_VERSION_2;
    out.version = coord_get_uint(&r, 8);
    out.parent = coord_get_uint(&r, 8);
    out.at_ms = coord_get_uint(&r, 8);
    out.bytes = coord_get_uint(&r, 8);
    out.updates = (uint32_t)coord_get_uint(&r, 8);
    out.adapter_rank = (uint32_t)coord_get_uint(&r, 8);
    uint64_t n_merged = coord_get_uint(&r, 8);
    out.loss_parent = coord_get_f64(&r);
    out.loss_candidate = coord_get_f64(&r);
    out.loss_adapter_form = coord_get_f64(&r);
    out.worst_slice = coord_get_f64(&r);
    out.adapter_discarded = coord_get_f64(&r);
    out.server_scale = (float)coord_get_f64(&r);
    out.sha256 = coord_get_hash(&r);
    out.new_master = coord_get_hash(&r);
    out.suite = coord_get_hash(&r);
    coord_get_text(&r, out.format, sizeof out.format);
    coord_get_text(&r, out.verdict, sizeof out.verdict);
    if (version >= 2) {
        out.canary_nodes = (uint32_t)coord_get_uint(&r, 4);
        out.canary_tokens = coord_get_uint(&r, 8);
        out.canary_parent = coord_get_f64(&r);
        out.canary_candidate = coord_get_f64(&r);
    }
    if (!good || r.bad || n_merged > SH_COORD_BUFFER_MAX ||
        (size_t)(r.end - r.p) != n_merged * COORD_ID_BYTES)
        return coord_row_corrupt(err, SH_COORD_T_RELEASE);
    if (n_merged > 0) {
        out.merged = sh_calloc((size_t)n_merged, sizeof *out.merged);
        if (out.merged == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for a release row");
        out.n_merged = (uint32_t)n_merged;
        for (uint32_t i = 0; i < out.n_merged; i++, r.p += COORD_ID_BYTES)
            (void)coord_id_get((sh_slice){r.p, COORD_ID_BYTES}, &out.merged[i]);
    }
    *row = out;
    return SH_OK;
}

sh_status coord_candidate_row_get(sh_txn *txn, uint64_t candidate, sh_release_row *row,
                                  sh_error *err)
{
    uint8_t key[9];
    release_key(key, TAG_CANDIDATE, candidate);
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_COORD_T_RELEASE, key, sizeof key, &value);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: no candidate %llu",
                       (unsigned long long)candidate);
    SH_TRY(status);
    return release_decode(candidate, value, row, err);
}

sh_status coord_manifest_put(sh_txn *txn, uint64_t version, uint64_t candidate, sh_bytes manifest,
                             sh_error *err)
{
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, ROW_VERSION, 1);
    coord_put_uint(&w, candidate, 8);
    coord_put_bytes(&w, manifest.data, manifest.n);
    uint8_t key[9];
    release_key(key, TAG_VERSION, version);
    return coord_row_put(txn, SH_COORD_T_RELEASE, (sh_slice){key, sizeof key}, &w, err);
}

sh_status coord_manifest_get(sh_txn *txn, uint64_t version, uint64_t *candidate, sh_slice *manifest,
                             sh_error *err)
{
    uint8_t key[9];
    release_key(key, TAG_VERSION, version);
    sh_slice value;
    SH_TRY(sh_txn_get(txn, SH_COORD_T_RELEASE, key, sizeof key, &value));
    coord_reader r = coord_reader_of(value);
    bool good = coord_get_uint(&r, 1) == ROW_VERSION;
    uint64_t number = coord_get_uint(&r, 8);
    if (!good || r.bad)
        return coord_row_corrupt(err, SH_COORD_T_RELEASE);
    *candidate = number;
    *manifest = (sh_slice){r.p, (size_t)(r.end - r.p)};
    return SH_OK;
}

sh_status coord_releases_since(sh_txn *txn, uint64_t version, uint64_t max, uint64_t *n,
                               sh_error *err)
{
    uint8_t from[9];
    sh_cursor *cursor = NULL;
    sh_slice key;
    uint64_t count = 0;
    release_key(from, TAG_VERSION, version + 1);
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_RELEASE, &cursor, err));
    sh_status status = count < max ? sh_cursor_seek(cursor, from, sizeof from, &key, NULL) : SH_OK;
    while (status == SH_OK && count < max) {
        count++; /* versions are the table's last rows */
        status = sh_cursor_next(cursor, &key, NULL);
    }
    sh_cursor_close(&cursor);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: the releases cannot be read");
    *n = count;
    return SH_OK;
}

/* ---- EVALUATION ---- */

#define EVALUATION_KEY_BYTES (8 + COORD_ID_BYTES)

static void evaluation_key(uint8_t key[EVALUATION_KEY_BYTES], uint64_t candidate,
                           const sh_update_id *id)
{
    sh_key_put_u64(key, candidate);
    coord_id_put(key + 8, id);
}

sh_status coord_evaluation_put(sh_txn *txn, uint64_t candidate, const sh_update_id *id,
                               sh_bytes payload, sh_error *err)
{
    uint8_t key[EVALUATION_KEY_BYTES];
    evaluation_key(key, candidate, id);
    return sh_txn_put(txn, SH_COORD_T_EVALUATION, key, sizeof key, payload.data, payload.n, err);
}

sh_status coord_evaluation_delete(sh_txn *txn, uint64_t candidate, const sh_update_id *id,
                                  sh_error *err)
{
    uint8_t key[EVALUATION_KEY_BYTES];
    evaluation_key(key, candidate, id);
    return sh_txn_del(txn, SH_COORD_T_EVALUATION, key, sizeof key, err);
}

sh_status coord_evaluation_has(sh_txn *txn, uint64_t candidate, const sh_hash *node, bool *has,
                               sh_error *err)
{
    uint8_t key[EVALUATION_KEY_BYTES];
    sh_cursor *cursor = NULL;
    sh_slice found;
    evaluation_key(key, candidate, &(sh_update_id){.node = *node});
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_EVALUATION, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, key, sizeof key, &found, NULL);
    bool same = status == SH_OK && found.n == sizeof key &&
                memcmp(found.data, key, 8 + sizeof(sh_hash)) == 0;
    sh_cursor_close(&cursor);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: the evaluations cannot be read");
    *has = same;
    return SH_OK;
}

sh_status coord_each_evaluation(sh_txn *txn, uint64_t candidate,
                                sh_status (*fn)(void *arg, const sh_update_id *id,
                                                sh_bytes payload),
                                void *arg, sh_error *err)
{
    uint8_t from[8];
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    sh_key_put_u64(from, candidate);
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_EVALUATION, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, from, sizeof from, &key, &value);
    while (status == SH_OK && key.n == EVALUATION_KEY_BYTES && memcmp(key.data, from, 8) == 0) {
        sh_update_id id = {0};
        (void)coord_id_get((sh_slice){(const uint8_t *)key.data + 8, COORD_ID_BYTES}, &id);
        status = fn(arg, &id, (sh_bytes){value.data, value.n});
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

/* ---- AUDIT ---- */

sh_status coord_audit(coord_step *s, const char *format, ...)
{
    char text[COORD_AUDIT_TEXT_MAX];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    SH_ASSERT(n >= 0);
    coord_state *state = &s->c->state;
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, ROW_VERSION, 1);
    coord_put_hash(&w, &state->audit_head);
    coord_put_uint(&w, s->now_ms, 8);
    coord_put_bytes(&w, text, strlen(text));
    sh_hash head = sh_blake2b(w.buf.data, w.buf.len);
    uint8_t key[8];
    sh_key_put_u64(key, state->audit_seq + 1);
    SH_TRY(coord_row_put(s->txn, SH_COORD_T_AUDIT, (sh_slice){key, sizeof key}, &w, s->err));
    state->audit_seq++;
    state->audit_head = head;
    s->c->dirty = true;
    return SH_OK;
}

/* ---- readers ---- */

sh_status coord_each_row(sh_txn *txn, unsigned table,
                         sh_status (*fn)(void *arg, sh_slice key, sh_slice value), void *arg,
                         sh_error *err)
{
    sh_cursor *cursor = NULL;
    SH_TRY(sh_cursor_open(txn, table, &cursor, err));
    sh_slice key, value;
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    while (status == SH_OK) {
        status = fn(arg, key, value);
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
        else if (status == SH_ERR_NOT_FOUND) /* the caller's, not the end */
            status = sh_fail(err, SH_ERR_CORRUPT, "coordinator: a row names what is not there");
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

typedef struct {
    void *arg;
    sh_status (*update)(void *arg, const sh_update_row *row);
    sh_status (*candidate)(void *arg, const sh_release_row *row);
    sh_status (*item)(void *arg, const sh_update_id *id, sh_bytes payload);
    sh_status (*audit)(void *arg, uint64_t seq, uint64_t at_ms, const char *text);
    unsigned table;
    uint64_t seq;
    sh_hash head;
    sh_error *err;
} reader;

static sh_status read_update(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    sh_update_id id;
    sh_update_row row;
    if (!coord_id_get(key, &id))
        return coord_row_corrupt(r->err, SH_COORD_T_UPDATE);
    SH_TRY(update_decode(&id, value, &row, r->err));
    return r->update(r->arg, &row);
}

sh_status sh_coord_each_update(sh_txn *txn, sh_status (*fn)(void *arg, const sh_update_row *row),
                               void *arg, sh_error *err)
{
    reader r = {.arg = arg, .update = fn, .err = err};
    return coord_each_row(txn, SH_COORD_T_UPDATE, read_update, &r, err);
}

static sh_status read_candidate(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    const uint8_t *k = key.data;
    if (key.n != 9 || (k[0] != TAG_CANDIDATE && k[0] != TAG_VERSION))
        return coord_row_corrupt(r->err, SH_COORD_T_RELEASE);
    if (k[0] == TAG_VERSION)
        return SH_OK;
    sh_release_row row;
    SH_TRY(release_decode(sh_key_get_u64(k + 1), value, &row, r->err));
    sh_status status = r->candidate(r->arg, &row);
    free(row.merged);
    return status;
}

sh_status sh_coord_each_candidate(sh_txn *txn,
                                  sh_status (*fn)(void *arg, const sh_release_row *row), void *arg,
                                  sh_error *err)
{
    reader r = {.arg = arg, .candidate = fn, .err = err};
    return coord_each_row(txn, SH_COORD_T_RELEASE, read_candidate, &r, err);
}

static sh_status read_item(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    sh_update_id id;
    if (!coord_id_get(key, &id))
        return coord_row_corrupt(r->err, r->table);
    return r->item(r->arg, &id, (sh_bytes){value.data, value.n});
}

sh_status sh_coord_each_item(sh_txn *txn, unsigned table,
                             sh_status (*fn)(void *arg, const sh_update_id *id, sh_bytes payload),
                             void *arg, sh_error *err)
{
    SH_ASSERT(table == SH_COORD_T_ALARM || table == SH_COORD_T_WINDOW);
    reader r = {.arg = arg, .item = fn, .table = table, .err = err};
    return coord_each_row(txn, table, read_item, &r, err);
}

static sh_status read_audit(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    coord_reader bytes = coord_reader_of(value);
    bool good = coord_get_uint(&bytes, 1) == ROW_VERSION;
    sh_hash before = coord_get_hash(&bytes);
    uint64_t at_ms = coord_get_uint(&bytes, 8);
    if (!good || bytes.bad || key.n != 8 || sh_key_get_u64(key.data) != r->seq + 1 ||
        !sh_hash_equal(&before, &r->head))
        return sh_fail(r->err, SH_ERR_CORRUPT, "audit log: the chain is broken at entry %llu",
                       (unsigned long long)(r->seq + 1));
    char text[COORD_AUDIT_TEXT_MAX + 1];
    size_t n = SH_MIN((size_t)(bytes.end - bytes.p), sizeof text - 1);
    memcpy(text, bytes.p, n);
    text[n] = '\0';
    r->seq++;
    r->head = sh_blake2b(value.data, value.n);
    return r->audit == NULL ? SH_OK : r->audit(r->arg, r->seq, at_ms, text);
}

sh_status sh_coord_each_audit(sh_txn *txn,
                              sh_status (*fn)(void *arg, uint64_t seq, uint64_t at_ms,
                                              const char *text),
                              void *arg, sh_error *err)
{
    reader r = {.arg = arg, .audit = fn, .err = err};
    SH_TRY(coord_each_row(txn, SH_COORD_T_AUDIT, read_audit, &r, err));
    /* The head in the state tells a log that was cut at its end from a whole one. */
    sh_coord c = {0};
    bool found = false;
    SH_TRY(coord_state_load(&c, txn, &found, err));
    if (found && (c.state.audit_seq != r.seq || !sh_hash_equal(&c.state.audit_head, &r.head)))
        return sh_fail(err, SH_ERR_CORRUPT, "audit log: ends at entry %llu, should at %llu",
                       (unsigned long long)r.seq, (unsigned long long)c.state.audit_seq);
    return SH_OK;
}

sh_status sh_coord_get_manifest(sh_txn *txn, uint64_t version, sh_bytes *manifest, sh_error *err)
{
    uint64_t candidate = 0;
    sh_slice bytes = {0};
    sh_status status = coord_manifest_get(txn, version, &candidate, &bytes, err);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: no release %llu", (unsigned long long)version);
    SH_TRY(status);
    *manifest = (sh_bytes){bytes.data, bytes.n};
    return SH_OK;
}

sh_status sh_coord_read_update(sh_txn *txn, const sh_update_id *id, sh_buf *out, sh_error *err)
{
    sh_update_row row;
    SH_TRY(coord_update_get(txn, id, &row, err));
    return sh_blob_get(txn, SH_COORD_T_CHUNK, &row.meta.blob, out, err);
}
