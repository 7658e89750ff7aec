/*
 * Rows of META. All integers little-endian.
 *   "schema"     version of the whole store, 4; absent: it is empty, or of version 1
 *   "state"      magic "SHCO", version 3, the fields of coord_state in the order of
 *                coord_state_save, the first 8 bytes of BLAKE2b-256 of all that
 *   "candidate"  magic "SHCA", version 3, the candidate in progress with its inputs, checksum as
 *                above; absent when nothing is merged, gated or evaluated
 *   "backup"     magic "SHCB", version 3, time 8, checksum: this store is a copy
 *   "w" + id     payload of an update item whose chunks are on their way up
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define STATE_MAGIC     0x4f434853u /* "SHCO" */
#define CANDIDATE_MAGIC 0x41434853u /* "SHCA" */
#define BACKUP_MAGIC    0x42434853u /* "SHCB" */
#define META_VERSION    3 /* rows of 1 and 2, which end before the fields added since, are read */
#define CHECKSUM_BYTES  8

static const char state_key[] = "state";
static const char candidate_key[] = "candidate";
static const char schema_key[] = "schema";
static const char backup_key[] = "backup";

static sh_status save(sh_txn *txn, const char *key, coord_writer *w, sh_error *err)
{
    sh_hash sum = sh_blake2b(w->buf.data, w->buf.len);
    coord_put_bytes(w, sum.b, CHECKSUM_BYTES);
    sh_status status;
    if (w->bad)
        status = sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for row \"%s\"", key);
    else
        status = sh_txn_put(txn, SH_COORD_T_META, key, strlen(key), w->buf.data, w->buf.len, err);
    sh_buf_release(&w->buf);
    return status;
}

/* SH_ERR_NOT_FOUND without text when the row is absent. */
static sh_status load(sh_txn *txn, const char *key, uint32_t magic, coord_reader *r,
                      unsigned *version, sh_error *err)
{
    sh_slice value;
    SH_TRY(sh_txn_get(txn, SH_COORD_T_META, key, strlen(key), &value));
    bool good = value.n > CHECKSUM_BYTES;
    if (good) {
        size_t n = value.n - CHECKSUM_BYTES;
        sh_hash sum = sh_blake2b(value.data, n);
        good = memcmp((const uint8_t *)value.data + n, sum.b, CHECKSUM_BYTES) == 0;
        *r = coord_reader_of((sh_slice){value.data, n});
        good = good && coord_get_uint(r, 4) == magic;
    }
    if (!good)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: row \"%s\" fails its checksum", key);
    unsigned number = (unsigned)coord_get_uint(r, 2);
    if (number == 0 || number > META_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "coordinator: row \"%s\" has version %u, this program knows 1 to %d", key,
                       number, META_VERSION);
    *version = number;
    return SH_OK;
}

sh_status coord_state_save(sh_coord *c, sh_txn *txn, sh_error *err)
{
    const coord_state *s = &c->state;
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, STATE_MAGIC, 4);
    coord_put_uint(&w, META_VERSION, 2);
    coord_put_uint(&w, s->seed, 8);
    coord_put_uint(&w, s->version, 8);
    coord_put_uint(&w, s->next_candidate, 8);
    coord_put_uint(&w, s->next_job, 8);
    coord_put_uint(&w, s->round, 4);
    coord_put_uint(&w, s->round_at_ms, 8);
    coord_put_uint(&w, s->rounds_begun, 1);
    coord_put_uint(&w, s->paused, 1);
    coord_put_uint(&w, s->closing, 1);
    coord_put_uint(&w, s->closed, 1);
    coord_put_f64(&w, (double)s->server_scale);
    coord_put_uint(&w, (uint64_t)s->phase, 1);
    coord_put_uint(&w, s->releases, 8);
    coord_put_uint(&w, s->candidates_refused, 8);
    coord_put_uint(&w, s->bad_messages, 8);
    coord_put_uint(&w, s->updates_in, 8);
    coord_put_uint(&w, s->updates_merged, 8);
    coord_put_uint(&w, SH_REASONS, 1);
    for (int i = 0; i < SH_REASONS; i++)
        coord_put_uint(&w, s->updates_refused[i], 8);
    coord_put_uint(&w, s->audit_seq, 8);
    coord_put_hash(&w, &s->audit_head);
    coord_put_uint(&w, s->epoch, 8);
    coord_put_uint(&w, s->previous, 8);
    coord_put_uint(&w, s->version_floor, 8);
    coord_put_uint(&w, s->round_base, 4);
    coord_put_uint(&w, s->held, 1);
    coord_put_uint(&w, s->held_until_ms, 8);
    coord_put_uint(&w, s->restored, 1);
    coord_put_uint(&w, s->lifts, 4);
    coord_put_uint(&w, s->candidates_inconclusive, 8);
    coord_put_uint(&w, s->restores, 4);
    coord_put_uint(&w, s->clones, 8);
    coord_put_uint(&w, s->rotations, 8);
    coord_put_uint(&w, s->token_enrolments, 8);
    coord_put_uint(&w, s->tokens_refused, 8);
    SH_TRY(save(txn, state_key, &w, err));
    c->dirty = false;
    return SH_OK;
}

static void candidate_save_bytes(coord_writer *w, const coord_candidate *candidate)
{
    coord_put_uint(w, CANDIDATE_MAGIC, 4);
    coord_put_uint(w, META_VERSION, 2);
    coord_put_uint(w, candidate->number, 8);
    coord_put_uint(w, candidate->parent_version, 8);
    coord_put_f64(w, (double)candidate->scale);
    coord_put_hash(w, &candidate->new_master);
    coord_put_hash(w, &candidate->sha256);
    coord_put_uint(w, candidate->bytes, 8);
    coord_put_text(w, candidate->format);
    coord_put_uint(w, candidate->rank, 4);
    coord_put_f64(w, candidate->discarded);
    coord_put_uint(w, candidate->n_chunks, 4);
    coord_put_bytes(w, candidate->chunks, (size_t)candidate->n_chunks * sizeof(sh_hash));
    coord_put_hash(w, &candidate->suite);
    coord_put_f64(w, candidate->loss_parent);
    coord_put_f64(w, candidate->loss_candidate);
    coord_put_f64(w, candidate->loss_adapter_form);
    coord_put_f64(w, candidate->worst_slice);
    coord_put_uint(w, candidate->until_ms, 8);
    coord_put_uint(w, candidate->n_inputs, 4);
    for (uint32_t i = 0; i < candidate->n_inputs; i++) {
        const sh_merge_input *in = &candidate->inputs[i];
        uint8_t id[COORD_ID_BYTES];
        coord_id_put(id, &in->id);
        coord_put_bytes(w, id, sizeof id);
        coord_put_hash(w, &in->sha256);
        coord_put_f64(w, in->weight);
        coord_put_f64(w, in->norm);
        coord_put_f64(w, in->cosine);
        coord_put_uint(w, (uint64_t)in->reason, 1);
    }
}

sh_status coord_candidate_save(coord_step *s)
{
    coord_writer w;
    coord_writer_init(&w);
    candidate_save_bytes(&w, &s->c->candidate);
    return save(s->txn, candidate_key, &w, s->err);
}

sh_status coord_candidate_drop(coord_step *s)
{
    SH_TRY(coord_candidate_drop_chunks(s));
    coord_candidate_release(&s->c->candidate);
    return sh_txn_del(s->txn, SH_COORD_T_META, candidate_key, strlen(candidate_key), s->err);
}

void coord_candidate_release(coord_candidate *candidate)
{
    free(candidate->inputs);
    free(candidate->chunks);
    *candidate = (coord_candidate){0};
}

static sh_status read_inputs(coord_reader *r, coord_candidate *out)
{
    out->n_inputs = (uint32_t)coord_get_uint(r, 4);
    if (r->bad || out->n_inputs > SH_COORD_BUFFER_MAX)
        return SH_ERR_CORRUPT;
    out->inputs = sh_calloc(out->n_inputs, sizeof *out->inputs);
    if (out->inputs == NULL)
        return SH_ERR_NO_MEMORY;
    for (uint32_t i = 0; i < out->n_inputs; i++) {
        sh_merge_input *in = &out->inputs[i];
        uint8_t id[COORD_ID_BYTES];
        coord_get_bytes(r, id, sizeof id);
        (void)coord_id_get((sh_slice){id, sizeof id}, &in->id);
        in->sha256 = coord_get_hash(r);
        in->weight = coord_get_f64(r);
        in->norm = coord_get_f64(r);
        in->cosine = coord_get_f64(r);
        in->reason = (sh_reason)coord_get_uint(r, 1);
        r->bad = r->bad || (unsigned)in->reason >= SH_REASONS;
    }
    return r->bad || r->p != r->end ? SH_ERR_CORRUPT : SH_OK;
}

static sh_status read_chunks(coord_reader *r, coord_candidate *out)
{
    out->n_chunks = (uint32_t)coord_get_uint(r, 4);
    if (r->bad || out->n_chunks > SH_BLOB_CHUNKS_MAX)
        return SH_ERR_CORRUPT;
    out->chunks = sh_calloc(out->n_chunks, sizeof(sh_hash));
    if (out->chunks == NULL)
        return SH_ERR_NO_MEMORY;
    coord_get_bytes(r, out->chunks, (size_t)out->n_chunks * sizeof(sh_hash));
    return SH_OK;
}

static void read_gate(coord_reader *r, coord_candidate *out)
{
    out->suite = coord_get_hash(r);
    out->loss_parent = coord_get_f64(r);
    out->loss_candidate = coord_get_f64(r);
    out->loss_adapter_form = coord_get_f64(r);
    out->worst_slice = coord_get_f64(r);
    out->until_ms = coord_get_uint(r, 8);
}

static sh_status candidate_load(sh_coord *c, sh_txn *txn, sh_error *err)
{
    coord_reader r = {0};
    unsigned version = 0;
    sh_status status = load(txn, candidate_key, CANDIDATE_MAGIC, &r, &version, err);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: a merge is under way without its row");
    SH_TRY(status);
    coord_candidate out = {0};
    out.number = coord_get_uint(&r, 8);
    out.parent_version = coord_get_uint(&r, 8);
    out.scale = (float)coord_get_f64(&r);
    out.new_master = coord_get_hash(&r);
    out.sha256 = coord_get_hash(&r);
    out.bytes = coord_get_uint(&r, 8);
    coord_get_text(&r, out.format, sizeof out.format);
    out.rank = (uint32_t)coord_get_uint(&r, 4);
    out.discarded = coord_get_f64(&r);
    status = read_chunks(&r, &out);
    if (version >= 2)
        read_gate(&r, &out);
    if (status == SH_OK)
        status = read_inputs(&r, &out);
    if (status != SH_OK) {
        coord_candidate_release(&out);
        return sh_fail(err, status, "coordinator: row \"candidate\" cannot be read");
    }
    c->candidate = out;
    return coord_chunks_hold(c, out.chunks, out.n_chunks, err);
}

/* What version 3 added. */
static void read_state_3(coord_reader *r, coord_state *s, unsigned version)
{
    if (version < 3) {
        s->restores = s->restored;
        return;
    }
    s->restores = (uint32_t)coord_get_uint(r, 4);
    s->clones = coord_get_uint(r, 8);
    s->rotations = coord_get_uint(r, 8);
    s->token_enrolments = coord_get_uint(r, 8);
    s->tokens_refused = coord_get_uint(r, 8);
}

/* What version 2 added; a store of version 1 has all versions from 1 on, without gaps. */
static void read_state_2(coord_reader *r, coord_state *s, unsigned version)
{
    if (version < 2) {
        s->previous = s->version > 0 ? s->version - 1 : 0;
        return;
    }
    s->epoch = coord_get_uint(r, 8);
    s->previous = coord_get_uint(r, 8);
    s->version_floor = coord_get_uint(r, 8);
    s->round_base = (uint32_t)coord_get_uint(r, 4);
    s->held = coord_get_uint(r, 1) != 0;
    s->held_until_ms = coord_get_uint(r, 8);
    s->restored = coord_get_uint(r, 1) != 0;
    s->lifts = (uint32_t)coord_get_uint(r, 4);
    s->candidates_inconclusive = coord_get_uint(r, 8);
}

sh_status coord_state_load(sh_coord *c, sh_txn *txn, bool *found, sh_error *err)
{
    coord_reader r = {0};
    unsigned version = 0;
    sh_status status = load(txn, state_key, STATE_MAGIC, &r, &version, err);
    if (status == SH_ERR_NOT_FOUND) {
        *found = false;
        return SH_OK;
    }
    SH_TRY(status);
    coord_state s = {0};
    s.seed = coord_get_uint(&r, 8);
    s.version = coord_get_uint(&r, 8);
    s.next_candidate = coord_get_uint(&r, 8);
    s.next_job = coord_get_uint(&r, 8);
    s.round = (uint32_t)coord_get_uint(&r, 4);
    s.round_at_ms = coord_get_uint(&r, 8);
    s.rounds_begun = coord_get_uint(&r, 1) != 0;
    s.paused = coord_get_uint(&r, 1) != 0;
    s.closing = coord_get_uint(&r, 1) != 0;
    s.closed = coord_get_uint(&r, 1) != 0;
    s.server_scale = (float)coord_get_f64(&r);
    unsigned phase = (unsigned)coord_get_uint(&r, 1);
    s.releases = coord_get_uint(&r, 8);
    s.candidates_refused = coord_get_uint(&r, 8);
    s.bad_messages = coord_get_uint(&r, 8);
    s.updates_in = coord_get_uint(&r, 8);
    s.updates_merged = coord_get_uint(&r, 8);
    unsigned reasons = (unsigned)coord_get_uint(&r, 1);
    r.bad = r.bad || reasons > SH_REASONS || phase > PHASE_EVALUATING;
    for (unsigned i = 0; i < reasons && !r.bad; i++)
        s.updates_refused[i] = coord_get_uint(&r, 8);
    s.audit_seq = coord_get_uint(&r, 8);
    s.audit_head = coord_get_hash(&r);
    read_state_2(&r, &s, version);
    read_state_3(&r, &s, version);
    if (r.bad || r.p != r.end)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: row \"state\" is cut short");
    s.phase = (coord_phase)phase;
    c->state = s;
    *found = true;
    return SH_OK;
}

/* ---- the store as a whole ---- */

sh_status coord_schema_get(sh_txn *txn, uint32_t *schema, sh_error *err)
{
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_COORD_T_META, schema_key, strlen(schema_key), &value);
    if (status == SH_ERR_NOT_FOUND) {
        *schema = 0;
        return SH_OK;
    }
    SH_TRY(status);
    coord_reader r = coord_reader_of(value);
    uint32_t number = (uint32_t)coord_get_uint(&r, 4);
    if (r.bad || r.p != r.end || number < 2)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: row \"schema\" cannot be read");
    if (number > COORD_SCHEMA)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "coordinator: the store has schema %u, this program knows up to %u: use the "
                       "program that wrote it, or a newer one",
                       number, COORD_SCHEMA);
    *schema = number;
    return SH_OK;
}

sh_status coord_schema_put(sh_txn *txn, sh_error *err)
{
    uint8_t value[4] = {COORD_SCHEMA};
    return sh_txn_put(txn, SH_COORD_T_META, schema_key, strlen(schema_key), value, sizeof value,
                      err);
}

sh_status sh_coord_mark_backup(sh_txn *txn, uint64_t now_ms, sh_error *err)
{
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_COORD_T_META, state_key, strlen(state_key), &value);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: this is no aggregator's store");
    SH_TRY(status);
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, BACKUP_MAGIC, 4);
    coord_put_uint(&w, META_VERSION, 2);
    coord_put_uint(&w, SH_MAX(now_ms, UINT64_C(1)), 8);
    return save(txn, backup_key, &w, err);
}

sh_status coord_backup_mark_take(sh_txn *txn, uint64_t *made_ms, sh_error *err)
{
    coord_reader r = {0};
    unsigned version = 0;
    sh_status status = load(txn, backup_key, BACKUP_MAGIC, &r, &version, err);
    if (status == SH_ERR_NOT_FOUND) {
        *made_ms = 0;
        return SH_OK;
    }
    SH_TRY(status);
    uint64_t at_ms = coord_get_uint(&r, 8);
    if (r.bad || r.p != r.end || at_ms == 0)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: row \"backup\" cannot be read");
    *made_ms = at_ms;
    return sh_txn_del(txn, SH_COORD_T_META, backup_key, strlen(backup_key), err);
}

/* ---- updates on their way up ---- */

static void waiting_key(uint8_t key[1 + COORD_ID_BYTES], const sh_update_id *id)
{
    key[0] = 'w';
    coord_id_put(key + 1, id);
}

sh_status coord_waiting_save(coord_step *s, const coord_waiting *w)
{
    uint8_t key[1 + COORD_ID_BYTES];
    waiting_key(key, &w->id);
    return sh_txn_put(s->txn, SH_COORD_T_META, key, sizeof key, w->payload, w->payload_n, s->err);
}

sh_status coord_waiting_delete(coord_step *s, const sh_update_id *id)
{
    uint8_t key[1 + COORD_ID_BYTES];
    waiting_key(key, id);
    return sh_txn_del(s->txn, SH_COORD_T_META, key, sizeof key, s->err);
}

sh_status coord_waiting_load(sh_coord *c, sh_txn *txn, uint64_t now_ms, sh_error *err)
{
    sh_update_id id;
    if (c->state.phase != PHASE_IDLE)
        SH_TRY(candidate_load(c, txn, err));
    sh_cursor *cursor = NULL;
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_META, &cursor, err));
    sh_slice key, value;
    sh_status status = sh_cursor_seek(cursor, "w", 1, &key, &value);
    while (status == SH_OK && ((const uint8_t *)key.data)[0] == 'w') {
        if (coord_id_get((sh_slice){(const uint8_t *)key.data + 1, key.n - 1}, &id))
            status = coord_waiting_restore(c, &id, value, now_ms, err);
        else
            status =
                sh_fail(err, SH_ERR_CORRUPT, "coordinator: an update on its way has no good key");
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}
