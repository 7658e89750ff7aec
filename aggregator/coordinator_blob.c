/*
 * Chunks: updates on their way up, releases on their way down, and which chunks are alive.
 *
 * An update whose chunks are not all here waits, in META and in memory; a node is asked for what is
 * missing, a bounded number of chunks at a time, and sends the item again when it hears nothing,
 * which asks again. Only wanted chunks are put. A chunk is deleted when no kept release, no
 * undecided update and no waiting one has it: nodes may name each other's chunks.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

static int hash_compare(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(sh_hash));
}

static sh_status no_memory(coord_step *s)
{
    return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for chunk names");
}

static sh_status add_names(coord_step *s, sh_buf *out, const sh_blob *blob)
{
    if (blob->n_chunks == 0)
        return SH_OK;
    if (sh_buf_append(out, blob->chunk_hashes, blob->n_chunks * sizeof(sh_hash)) != SH_OK)
        return no_memory(s);
    return SH_OK;
}

/* The sorted names of all chunks that somebody needs. */
static sh_status live_names(coord_step *s, sh_buf *out)
{
    sh_coord *c = s->c;
    for (size_t i = 0; i < COORD_RELEASES_KEPT; i++)
        SH_TRY(add_names(s, out, &c->kept[i].manifest.model));
    sh_blob candidate = {.n_chunks = c->candidate.n_chunks, .chunk_hashes = c->candidate.chunks};
    SH_TRY(add_names(s, out, &candidate));
    for (size_t i = 0; i < c->n_waiting; i++)
        SH_TRY(add_names(s, out, &c->waiting[i].meta.blob));
    for (size_t i = 0; i < c->n_pending; i++) {
        sh_update_row row;
        SH_TRY(coord_update_get(s->txn, &c->pending[i], &row, s->err));
        SH_TRY(add_names(s, out, &row.meta.blob));
    }
    if (c->relay != NULL)
        SH_TRY(coord_relay_blobs(s, add_names, out));
    if (out->len > 0)
        qsort(out->data, out->len / sizeof(sh_hash), sizeof(sh_hash), hash_compare);
    return SH_OK;
}

sh_status coord_chunks_drop(coord_step *s, const uint8_t *hashes, size_t n)
{
    sh_buf live, dead;
    sh_buf_init(&live, SIZE_MAX);
    sh_buf_init(&dead, SIZE_MAX);
    sh_status status = live_names(s, &live);
    for (size_t i = 0; i < n && status == SH_OK; i++) {
        const uint8_t *hash = hashes + i * sizeof(sh_hash);
        if (live.len > 0 && bsearch(hash, live.data, live.len / sizeof(sh_hash), sizeof(sh_hash),
                                    hash_compare) != NULL)
            continue;
        if (sh_buf_append(&dead, hash, sizeof(sh_hash)) != SH_OK)
            status = no_memory(s);
    }
    if (status == SH_OK && dead.len > 0) {
        sh_blob blob = {.n_chunks = (uint32_t)(dead.len / sizeof(sh_hash)),
                        .chunk_hashes = dead.data};
        status = sh_blob_delete(s->txn, SH_COORD_T_CHUNK, &blob, NULL, 0, s->err);
    }
    sh_buf_release(&live);
    sh_buf_release(&dead);
    return status;
}

sh_status coord_candidate_drop_chunks(coord_step *s)
{
    coord_candidate *candidate = &s->c->candidate;
    uint8_t *chunks = candidate->chunks;
    uint32_t n = candidate->n_chunks;
    candidate->chunks = NULL;
    candidate->n_chunks = 0;
    sh_status status = n == 0 ? SH_OK : coord_chunks_drop(s, chunks, n);
    free(chunks);
    return status;
}

sh_status coord_candidate_put_chunks(coord_step *s, sh_bytes bytes, const sh_hash *sha256)
{
    sh_blob blob;
    uint8_t *chunks = NULL;
    SH_TRY(coord_candidate_drop_chunks(s));
    SH_TRY(sh_blob_describe(bytes.data, bytes.n, &blob, &chunks, s->err));
    sh_status status = SH_OK;
    if (!sh_hash_equal(&blob.sha256, sha256))
        status = sh_fail(s->err, SH_ERR_MISMATCH, "the bytes are not the candidate's");
    if (status == SH_OK)
        status = sh_blob_put(s->txn, SH_COORD_T_CHUNK, bytes.data, bytes.n, s->err);
    if (status != SH_OK) {
        free(chunks);
        return status;
    }
    s->c->candidate.chunks = chunks;
    s->c->candidate.n_chunks = blob.n_chunks;
    return SH_OK;
}

/* ---- the waiting list ---- */

static coord_waiting *waiting_find(sh_coord *c, const sh_update_id *id)
{
    for (size_t i = 0; i < c->n_waiting; i++)
        if (coord_id_compare(&c->waiting[i].id, id) == 0)
            return &c->waiting[i];
    return NULL;
}

/* Takes entry i off the list and its row out of META; its names go to `names` (may be NULL). */
static sh_status waiting_remove(coord_step *s, size_t i, sh_buf *names)
{
    sh_coord *c = s->c;
    coord_waiting w = c->waiting[i];
    memmove(&c->waiting[i], &c->waiting[i + 1], (c->n_waiting - i - 1) * sizeof w);
    c->n_waiting--;
    sh_status status = coord_waiting_delete(s, &w.id);
    if (status == SH_OK && names != NULL)
        status = add_names(s, names, &w.meta.blob);
    free(w.payload);
    return status;
}

static sh_status drop_names(coord_step *s, sh_buf *names, sh_status status)
{
    if (status == SH_OK && names->len > 0)
        status = coord_chunks_drop(s, names->data, names->len / sizeof(sh_hash));
    sh_buf_release(names);
    return status;
}

sh_status coord_waiting_forget(coord_step *s, const sh_hash *node, uint64_t epoch, uint64_t first,
                               uint64_t last)
{
    sh_coord *c = s->c;
    sh_status status = SH_OK;
    sh_buf names;
    sh_buf_init(&names, SIZE_MAX);
    for (size_t i = c->n_waiting; i-- > 0 && status == SH_OK;) {
        const sh_update_id *id = &c->waiting[i].id;
        if (sh_hash_equal(&id->node, node) && id->epoch == epoch && id->seq >= first &&
            id->seq <= last)
            status = waiting_remove(s, i, &names);
    }
    return drop_names(s, &names, status);
}

sh_status coord_waiting_refuse(coord_step *s, const sh_hash *node, sh_reason reason)
{
    sh_coord *c = s->c;
    sh_status status = SH_OK;
    sh_buf names;
    sh_buf_init(&names, SIZE_MAX);
    for (size_t i = c->n_waiting; i-- > 0 && status == SH_OK;) {
        const coord_waiting *w = &c->waiting[i];
        if (node != NULL && !sh_hash_equal(&w->id.node, node))
            continue;
        sh_msg_item item = {.epoch = w->id.epoch,
                            .cls = SH_CLASS_UPDATE,
                            .seq = w->id.seq,
                            .kind = SH_ITEM_UPDATE,
                            .last_seq = w->id.seq};
        status = coord_refuse(s, &w->id, (sh_bytes){w->payload, w->payload_n}, reason);
        if (status == SH_OK)
            status = coord_mark(s, &w->id.node, &item, false);
        if (status == SH_OK)
            status = waiting_remove(s, i, &names);
    }
    return drop_names(s, &names, status);
}

/* Makes room: a node has few places, and the oldest of all gives way when the list is full. */
static sh_status waiting_make_room(coord_step *s, const sh_hash *node)
{
    sh_coord *c = s->c;
    size_t own = 0, oldest = c->n_waiting, own_oldest = c->n_waiting;
    for (size_t i = 0; i < c->n_waiting; i++) {
        const coord_waiting *w = &c->waiting[i];
        if (oldest == c->n_waiting || w->order < c->waiting[oldest].order)
            oldest = i;
        if (!sh_hash_equal(&w->id.node, node))
            continue;
        own++;
        if (own_oldest == c->n_waiting || w->order < c->waiting[own_oldest].order)
            own_oldest = i;
    }
    size_t victim = own >= COORD_WAITING_NODE_MAX       ? own_oldest
                    : c->n_waiting >= COORD_WAITING_MAX ? oldest
                                                        : c->n_waiting;
    if (victim == c->n_waiting)
        return SH_OK;
    sh_buf names;
    sh_buf_init(&names, SIZE_MAX);
    return drop_names(s, &names, waiting_remove(s, victim, &names));
}

static sh_status waiting_add(coord_step *s, const sh_update_id *id, sh_bytes payload,
                             coord_waiting **out)
{
    sh_coord *c = s->c;
    SH_TRY(waiting_make_room(s, &id->node));
    if (sh_array_reserve((void **)&c->waiting, &c->waiting_cap, c->n_waiting + 1,
                         sizeof *c->waiting, COORD_WAITING_MAX) != SH_OK)
        return no_memory(s);
    coord_waiting w = {.id = *id, .payload = sh_calloc(payload.n, 1), .payload_n = payload.n};
    if (w.payload == NULL)
        return no_memory(s);
    memcpy(w.payload, payload.data, payload.n);
    w.order = c->waiting_order++;
    sh_status status = sh_update_meta_decode(w.payload, w.payload_n, &w.meta, s->err);
    if (status == SH_OK)
        status = coord_waiting_save(s, &w);
    if (status != SH_OK) {
        free(w.payload);
        return status;
    }
    c->waiting[c->n_waiting] = w;
    *out = &c->waiting[c->n_waiting++];
    return SH_OK;
}

/* ---- updates up ---- */

static bool meta_is_sane(const coord_step *s, const sh_update_meta *meta)
{
    uint64_t model = s->c->kept[0].manifest.model.bytes;
    uint64_t bytes_max = SH_MAX((uint64_t)COORD_UPDATE_BYTES_MIN, model * COORD_UPDATE_FACTOR_MAX);
    /* Of a relay: that of its parts, in one blob. */
    if (meta->parts.n > 0)
        bytes_max =
            SH_MIN(bytes_max * coord_parts_of(meta), (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES);
    return meta->samples > 0 && meta->samples <= COORD_SAMPLES_MAX && meta->blob.bytes > 0 &&
           meta->blob.bytes <= bytes_max &&
           meta->blob.n_chunks == (meta->blob.bytes + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES;
}

/* Asks for the first missing chunks; *whole when there are none. */
static sh_status ask(coord_step *s, const sh_update_id *id, sh_bytes payload,
                     const sh_update_meta *meta, bool *whole)
{
    uint8_t hashes[SH_WIRE_WANT_MAX * sizeof(sh_hash)];
    uint32_t max = (uint32_t)SH_MIN(s->c->options.chunk_budget, (uint64_t)SH_WIRE_WANT_MAX);
    uint32_t n = 0;
    SH_TRY(sh_blob_missing(s->txn, SH_COORD_T_CHUNK, &meta->blob, hashes, max, &n, s->err));
    *whole = n == 0;
    if (n == 0)
        return SH_OK;
    coord_waiting *w = waiting_find(s->c, id);
    if (w != NULL && (w->payload_n != payload.n || memcmp(w->payload, payload.data, payload.n))) {
        /* The same identity with other content: a node's bug or a lie. The last word counts. */
        SH_TRY(coord_waiting_forget(s, &id->node, id->epoch, id->seq, id->seq));
        w = NULL;
    }
    if (w == NULL)
        SH_TRY(waiting_add(s, id, payload, &w));
    w->outstanding = n;
    sh_msg msg = {.type = SH_MSG_WANT, .want = {.n = n, .hashes = hashes}};
    return coord_send(s, &id->node, &msg);
}

sh_status coord_on_update(coord_step *s, const sh_update_id *id, sh_bytes payload)
{
    sh_coord *c = s->c;
    sh_update_meta meta = {0};
    sh_reason reason = SH_REASON_NONE;
    sh_msg_item item = {.epoch = id->epoch,
                        .cls = SH_CLASS_UPDATE,
                        .seq = id->seq,
                        .kind = SH_ITEM_UPDATE,
                        .last_seq = id->seq};
    if (sh_update_meta_decode(payload.data, payload.n, &meta, NULL) != SH_OK) {
        payload = (sh_bytes){0};
        reason = SH_REASON_BAD_BLOB;
    } else if (c->state.closing) {
        reason = SH_REASON_CLOSED;
    } else if (!meta_is_sane(s, &meta)) {
        reason = SH_REASON_BAD_BLOB;
    } else {
        SH_TRY(coord_base_reason(s, &meta, &reason));
        if (reason == SH_REASON_NONE)
            SH_TRY(coord_parts_reason(s, id, &meta, &reason));
    }
    if (reason != SH_REASON_NONE) {
        SH_TRY(coord_refuse(s, id, payload, reason));
        SH_TRY(coord_mark(s, &id->node, &item, true));
        return coord_waiting_forget(s, &id->node, id->epoch, id->seq, id->seq);
    }
    if (c->n_pending >= SH_COORD_BUFFER_MAX)
        return coord_send_error(s, &id->node, SH_ERR_FULL,
                                "the buffer is full: send the update again later");
    bool whole = false;
    SH_TRY(ask(s, id, payload, &meta, &whole));
    if (!whole)
        return SH_OK;
    SH_TRY(coord_take(s, id, payload));
    SH_TRY(coord_mark(s, &id->node, &item, true));
    /* Its chunks are the pending row's now, so forgetting deletes none of them. */
    SH_TRY(coord_waiting_forget(s, &id->node, id->epoch, id->seq, id->seq));
    return coord_advance(s);
}

sh_status coord_on_chunk(coord_step *s, const sh_hash *node, const sh_msg_chunk *chunk)
{
    sh_coord *c = s->c;
    coord_waiting *wanted = NULL;
    for (size_t i = 0; i < c->n_waiting && wanted == NULL; i++) {
        coord_waiting *w = &c->waiting[i];
        if (!sh_hash_equal(&w->id.node, node))
            continue;
        for (uint32_t k = 0; k < w->meta.blob.n_chunks && wanted == NULL; k++)
            if (hash_compare(w->meta.blob.chunk_hashes + k * sizeof(sh_hash), chunk->hash.b) == 0)
                wanted = w;
    }
    if (wanted == NULL) /* late, or never asked for */
        return SH_OK;
    uint32_t missing = 0;
    sh_blob one = {.n_chunks = 1, .chunk_hashes = chunk->hash.b};
    sh_hash name;
    SH_TRY(sh_blob_missing(s->txn, SH_COORD_T_CHUNK, &one, name.b, 1, &missing, s->err));
    if (missing == 0)
        return SH_OK;
    sh_status status = sh_chunk_put(s->txn, SH_COORD_T_CHUNK, chunk, s->err);
    if (status == SH_ERR_CORRUPT || status == SH_ERR_INVALID || status == SH_ERR_LIMIT)
        return coord_bad_message(s, node, status, "the chunk does not match its hash");
    SH_TRY(status);
    if (wanted->outstanding > 0)
        wanted->outstanding--;
    if (wanted->outstanding > 0)
        return SH_OK;
    /* All that was asked for is here: the update is whole, or the next chunks are wanted. The
     * payload is the list's, which taking the update changes: work on a copy. */
    sh_update_id id = wanted->id;
    size_t n = wanted->payload_n;
    uint8_t *payload = sh_calloc(n, 1);
    if (payload == NULL)
        return no_memory(s);
    memcpy(payload, wanted->payload, n);
    status = coord_on_update(s, &id, (sh_bytes){payload, n});
    free(payload);
    return status;
}

void coord_on_gone(sh_coord *c, const sh_hash *node)
{
    for (size_t i = 0; i < c->n_waiting; i++)
        if (sh_hash_equal(&c->waiting[i].id.node, node))
            c->waiting[i].outstanding = 0;
}

/* ---- releases down ---- */

/* Of a release that is kept, or of the candidate that nodes evaluate. */
static bool is_public(const sh_coord *c, const uint8_t *hash)
{
    for (size_t i = 0; i < COORD_RELEASES_KEPT; i++) {
        const sh_blob *model = &c->kept[i].manifest.model;
        for (uint32_t k = 0; k < model->n_chunks; k++)
            if (hash_compare(model->chunk_hashes + k * sizeof(sh_hash), hash) == 0)
                return true;
    }
    if (c->state.phase != PHASE_EVALUATING)
        return false;
    for (uint32_t k = 0; k < c->candidate.n_chunks; k++)
        if (hash_compare(c->candidate.chunks + k * sizeof(sh_hash), hash) == 0)
            return true;
    return false;
}

sh_status coord_on_want(coord_step *s, const sh_hash *node, const sh_hash_list *want)
{
    uint32_t sent = 0;
    uint32_t max = (uint32_t)SH_MIN(s->c->options.chunk_budget, (uint64_t)SH_WIRE_WANT_MAX);
    for (uint32_t i = 0; i < want->n && sent < max; i++) {
        const uint8_t *hash = want->hashes + i * sizeof(sh_hash);
        /* Only models are served: another node's update is nobody else's business. */
        if (!is_public(s->c, hash))
            continue;
        sh_slice bytes;
        sh_status status = sh_txn_get(s->txn, SH_COORD_T_CHUNK, hash, sizeof(sh_hash), &bytes);
        if (status != SH_OK)
            return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: a release's chunk is missing");
        sh_msg msg = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {bytes.data, bytes.n}}};
        memcpy(msg.chunk.hash.b, hash, sizeof(sh_hash));
        SH_TRY(coord_send(s, node, &msg));
        sent++;
    }
    if (sent == 0)
        return coord_send_error(s, node, SH_ERR_NOT_FOUND,
                                "none of these chunks is of a current release: check in again");
    return SH_OK;
}
