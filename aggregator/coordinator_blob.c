/*
 * Chunks: updates on their way up, releases on their way down.
 *
 * An update whose chunks are not all here waits, in META and in memory; a node is asked for what is
 * missing, a bounded number of chunks at a time, and sends the item again when it hears nothing,
 * which asks again. Only chunks that were asked for are put, each as it comes: what a connection
 * holds of an update is one chunk. All that is asked for and has not come yet is at most
 * asked_bytes_max; an update beyond it is told to come later, unless another's node has been silent
 * for COORD_ASKED_MS and loses its place. Nodes may name each other's chunks.
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

static const uint8_t *name_of(const sh_blob *blob, uint32_t i)
{
    return blob->chunk_hashes + (size_t)i * sizeof(sh_hash);
}

/* ---- the waiting ---- */

static void line_remove(coord_line *line, coord_waiting *w)
{
    *(w->before != NULL ? &w->before->after : &line->first) = w->after;
    *(w->after != NULL ? &w->after->before : &line->last) = w->before;
    w->before = w->after = NULL;
}

static void line_append(coord_line *line, coord_waiting *w)
{
    w->before = line->last;
    *(line->last != NULL ? &line->last->after : &line->first) = w;
    line->last = w;
}

/* Where id is, or belongs. */
static size_t place_of(const sh_coord *c, const sh_update_id *id)
{
    size_t low = 0, high = c->n_waiting;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (coord_id_compare(&c->waiting[middle]->id, id) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static coord_waiting *waiting_find(const sh_coord *c, const sh_update_id *id)
{
    size_t at = place_of(c, id);
    bool there = at < c->n_waiting && coord_id_compare(&c->waiting[at]->id, id) == 0;
    return there ? c->waiting[at] : NULL;
}

/* The first of a node's, which stand together; *n how many there are. */
static coord_waiting **waiting_of(const sh_coord *c, const sh_hash *node, size_t *n)
{
    size_t at = place_of(c, &(sh_update_id){.node = *node});
    *n = 0;
    while (at + *n < c->n_waiting && sh_hash_equal(&c->waiting[at + *n]->id.node, node))
        ++*n;
    return *n > 0 ? c->waiting + at : NULL;
}

/* What was asked for is not expected any more. */
static void stop_asking(sh_coord *c, coord_waiting *w)
{
    if (w->asked_bytes == 0)
        return;
    c->asked_bytes -= w->asked_bytes;
    w->asked_bytes = 0;
    w->n_asked = 0;
    line_remove(&c->asking, w);
    line_append(&c->idle, w);
}

static void waiting_free(coord_waiting *w)
{
    free(w->payload);
    free(w);
}

void coord_waiting_release(sh_coord *c)
{
    for (size_t i = 0; i < c->n_waiting; i++)
        waiting_free(c->waiting[i]);
    free(c->waiting);
    c->waiting = NULL;
    c->n_waiting = 0;
}

/* Takes it off the list and its row out of META, and drops its chunks. */
static sh_status waiting_remove(coord_step *s, coord_waiting *w)
{
    sh_coord *c = s->c;
    size_t at = place_of(c, &w->id);
    SH_ASSERT(at < c->n_waiting && c->waiting[at] == w);
    stop_asking(c, w);
    line_remove(&c->idle, w);
    memmove(&c->waiting[at], &c->waiting[at + 1], (c->n_waiting - at - 1) * sizeof w);
    c->n_waiting--;
    c->waiting_bytes -= w->payload_n;
    sh_status status = coord_waiting_delete(s, &w->id);
    if (status == SH_OK)
        status = coord_chunks_drop(s, w->meta.blob.chunk_hashes, w->meta.blob.n_chunks);
    waiting_free(w);
    return status;
}

sh_status coord_waiting_restore(sh_coord *c, const sh_update_id *id, sh_slice payload,
                                uint64_t now_ms, sh_error *err)
{
    static const char cannot[] = "coordinator: no memory for an update on its way";
    if (sh_array_reserve((void **)&c->waiting, &c->waiting_cap, c->n_waiting + 1,
                         sizeof(coord_waiting *), COORD_WAITING_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, cannot);
    coord_waiting *w = sh_calloc(1, sizeof *w);
    uint8_t *bytes = sh_calloc(SH_MAX(payload.n, (size_t)1), 1);
    sh_status status = SH_OK;
    if (w == NULL || bytes == NULL)
        status = sh_fail(err, SH_ERR_NO_MEMORY, cannot);
    if (status == SH_OK) {
        memcpy(bytes, payload.data, payload.n);
        if (sh_update_meta_decode(bytes, payload.n, &w->meta, NULL) != SH_OK)
            status =
                sh_fail(err, SH_ERR_CORRUPT, "coordinator: an update on its way has no good row");
    }
    if (status == SH_OK)
        status = coord_chunks_hold(c, w->meta.blob.chunk_hashes, w->meta.blob.n_chunks, err);
    if (status != SH_OK) {
        free(w);
        free(bytes);
        return status;
    }
    w->id = *id;
    w->payload = bytes;
    w->payload_n = payload.n;
    w->active_ms = now_ms;
    size_t at = place_of(c, id);
    memmove(&c->waiting[at + 1], &c->waiting[at], (c->n_waiting - at) * sizeof(coord_waiting *));
    c->waiting[at] = w;
    c->n_waiting++;
    c->waiting_bytes += payload.n;
    line_append(&c->idle, w);
    return SH_OK;
}

sh_status coord_waiting_forget(coord_step *s, const sh_hash *node, uint64_t epoch, uint64_t first,
                               uint64_t last)
{
    size_t n;
    coord_waiting **of_node = waiting_of(s->c, node, &n);
    for (size_t i = n; i-- > 0;) {
        const sh_update_id *id = &of_node[i]->id;
        if (id->epoch == epoch && id->seq >= first && id->seq <= last)
            SH_TRY(waiting_remove(s, of_node[i]));
    }
    return SH_OK;
}

sh_status coord_waiting_refuse(coord_step *s, const sh_hash *node, sh_reason reason)
{
    sh_coord *c = s->c;
    for (size_t i = c->n_waiting; i-- > 0;) {
        coord_waiting *w = c->waiting[i];
        if (node != NULL && !sh_hash_equal(&w->id.node, node))
            continue;
        sh_msg ack; /* nobody waits for it any more */
        sh_msg_item item = {.epoch = w->id.epoch,
                            .cls = SH_CLASS_UPDATE,
                            .seq = w->id.seq,
                            .kind = SH_ITEM_UPDATE,
                            .last_seq = w->id.seq};
        SH_TRY(coord_refuse(s, &w->id, (sh_bytes){w->payload, w->payload_n}, reason));
        SH_TRY(coord_mark(s, &w->id.node, &item, &ack));
        SH_TRY(waiting_remove(s, w));
    }
    return SH_OK;
}

/* Those whose nodes have been silent for too long are asked anew when they speak. */
static void expire(coord_step *s)
{
    sh_coord *c = s->c;
    while (c->asking.first != NULL && c->asking.first->active_ms + COORD_ASKED_MS <= s->now_ms)
        stop_asking(c, c->asking.first);
}

static bool list_is_full(const sh_coord *c, size_t payload_n)
{
    return c->n_waiting >= COORD_WAITING_MAX ||
           c->waiting_bytes + payload_n > COORD_WAITING_BYTES_MAX;
}

/* Makes room on the list: a node has few places, of which its own oldest gives way, and of all the
 * one that nothing was heard of for longest. *room false: all others are coming in. */
static sh_status make_room(coord_step *s, const sh_update_id *id, size_t payload_n, bool *room)
{
    sh_coord *c = s->c;
    size_t n;
    coord_waiting **own = waiting_of(c, &id->node, &n);
    if (n >= COORD_WAITING_NODE_MAX) {
        coord_waiting *oldest = own[0];
        for (size_t i = 1; i < n; i++)
            if (own[i]->active_ms < oldest->active_ms)
                oldest = own[i];
        SH_TRY(waiting_remove(s, oldest));
    }
    if (list_is_full(c, payload_n))
        expire(s);
    while (list_is_full(c, payload_n) && c->idle.first != NULL)
        SH_TRY(waiting_remove(s, c->idle.first));
    *room = !list_is_full(c, payload_n);
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

typedef struct {         /* the next chunks to ask for */
    uint32_t first, end; /* before `first` none is missing; of [first, end) those in `index` are */
    uint32_t n;
    uint16_t index[SH_WIRE_WANT_MAX];
    uint64_t bytes;
} question;

static sh_status find_missing(coord_step *s, const sh_blob *blob, uint32_t from, question *q)
{
    uint32_t max = (uint32_t)SH_MIN(s->c->options.chunk_budget, (uint64_t)SH_WIRE_WANT_MAX);
    *q = (question){.first = blob->n_chunks, .end = from};
    for (; q->end < blob->n_chunks && q->n < max; q->end++) {
        const uint8_t *name = name_of(blob, q->end);
        sh_slice there;
        sh_status status = sh_txn_get(s->txn, SH_COORD_T_CHUNK, name, sizeof(sh_hash), &there);
        if (status == SH_OK)
            continue;
        if (status != SH_ERR_NOT_FOUND)
            return sh_fail(s->err, status, "coordinator: the chunks cannot be read");
        bool twice = false; /* a blob may hold the same chunk twice */
        for (uint32_t i = 0; i < q->n && !twice; i++)
            twice = hash_compare(name_of(blob, q->index[i]), name) == 0;
        if (twice)
            continue;
        q->first = SH_MIN(q->first, q->end);
        q->index[q->n++] = (uint16_t)q->end;
        q->bytes += SH_MIN(blob->bytes - (uint64_t)q->end * SH_CHUNK_BYTES, SH_CHUNK_BYTES);
    }
    return SH_OK;
}

static bool may_ask(coord_step *s, uint64_t bytes)
{
    sh_coord *c = s->c;
    uint64_t most = c->options.asked_bytes_max;
    if (most == 0)
        most = COORD_ASKED_BYTES;
    if (c->asked_bytes + bytes > most)
        expire(s);
    return c->asked_bytes == 0 || c->asked_bytes + bytes <= most;
}

/* The list's entry for id, which is new on it; NULL: no room, which its node has been told. */
static sh_status waiting_enter(coord_step *s, const sh_update_id *id, sh_bytes payload,
                               const question *q, uint32_t n_chunks, coord_waiting **out)
{
    sh_coord *c = s->c;
    bool room = false;
    *out = NULL;
    SH_TRY(make_room(s, id, payload.n, &room));
    if (!room || !may_ask(s, q->bytes) || !coord_chunks_have_room(c, n_chunks))
        return coord_later(s, &id->node, COORD_RATE_UPLOAD, 0,
                           "many updates are coming in: send this one again later");
    SH_TRY(coord_waiting_restore(c, id, (sh_slice){payload.data, payload.n}, s->now_ms, s->err));
    *out = waiting_find(c, id);
    return coord_waiting_save(s, *out);
}

/* Asks for the first missing chunks; *whole when there are none. */
static sh_status ask(coord_step *s, const sh_update_id *id, sh_bytes payload,
                     const sh_update_meta *meta, bool *whole)
{
    sh_coord *c = s->c;
    uint8_t names[SH_WIRE_WANT_MAX * sizeof(sh_hash)];
    question q;
    coord_waiting *w = waiting_find(c, id);
    if (w != NULL && (w->payload_n != payload.n || memcmp(w->payload, payload.data, payload.n))) {
        /* The same identity with other content: a node's bug or a lie. The last word counts. */
        SH_TRY(waiting_remove(s, w));
        w = NULL;
    }
    SH_TRY(find_missing(s, &meta->blob, w != NULL ? w->scanned : 0, &q));
    *whole = q.n == 0;
    if (*whole)
        return SH_OK;
    if (w != NULL)
        stop_asking(c, w);
    if (w == NULL)
        SH_TRY(waiting_enter(s, id, payload, &q, meta->blob.n_chunks, &w));
    else if (!may_ask(s, q.bytes))
        return coord_later(s, &id->node, COORD_RATE_UPLOAD, 0,
                           "many updates are coming in: send this one again later");
    if (w == NULL)
        return SH_OK;
    w->scanned = q.first;
    w->asked_end = q.end;
    w->n_asked = q.n;
    memcpy(w->asked, q.index, sizeof w->asked);
    w->active_ms = s->now_ms;
    w->asked_bytes = q.bytes;
    c->asked_bytes += q.bytes;
    line_remove(&c->idle, w);
    line_append(&c->asking, w);
    for (uint32_t i = 0; i < q.n; i++)
        memcpy(names + i * sizeof(sh_hash), name_of(&w->meta.blob, q.index[i]), sizeof(sh_hash));
    sh_msg msg = {.type = SH_MSG_WANT, .want = {.n = q.n, .hashes = names}};
    return coord_send(s, &id->node, &msg);
}

/* Its chunks may have come long after it: the epoch may be another start's since. */
static sh_status mark_update(coord_step *s, const sh_update_id *id, sh_msg_item *item)
{
    sh_msg ack;
    SH_TRY(coord_epoch_lease(s, &id->node, id->epoch, &item->lease));
    SH_TRY(coord_mark(s, &id->node, item, &ack));
    return coord_send(s, &id->node, &ack);
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
        SH_TRY(mark_update(s, id, &item));
        return coord_waiting_forget(s, &id->node, id->epoch, id->seq, id->seq);
    }
    if (c->n_pending >= SH_COORD_BUFFER_MAX)
        return coord_later(s, &id->node, COORD_RATE_UPLOAD, c->options.checkin_ms,
                           "the buffer is full: send the update again later");
    bool whole = false;
    SH_TRY(ask(s, id, payload, &meta, &whole));
    if (!whole)
        return SH_OK;
    SH_TRY(coord_take(s, id, payload));
    SH_TRY(mark_update(s, id, &item));
    /* Its chunks are the pending row's as well, so forgetting deletes none of them. */
    SH_TRY(coord_waiting_forget(s, &id->node, id->epoch, id->seq, id->seq));
    return coord_advance(s);
}

/* The waiting update of this node that asked for the chunk; *at: where in what it asked for. */
static coord_waiting *asked_for(const sh_coord *c, const sh_hash *node, const uint8_t *name,
                                uint32_t *at)
{
    size_t n;
    coord_waiting **of_node = waiting_of(c, node, &n);
    for (size_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < of_node[i]->n_asked; k++)
            if (hash_compare(name_of(&of_node[i]->meta.blob, of_node[i]->asked[k]), name) == 0) {
                *at = k;
                return of_node[i];
            }
    return NULL;
}

/* The next question, or the end: the payload is the list's, which both change: work on a copy. */
static sh_status go_on(coord_step *s, coord_waiting *w)
{
    sh_update_id id = w->id;
    size_t n = w->payload_n;
    uint8_t *payload = sh_calloc(n, 1);
    if (payload == NULL)
        return no_memory(s);
    memcpy(payload, w->payload, n);
    w->scanned = w->asked_end;
    sh_status status = coord_on_update(s, &id, (sh_bytes){payload, n});
    free(payload);
    return status;
}

sh_status coord_on_chunk(coord_step *s, const sh_hash *node, const sh_msg_chunk *chunk)
{
    sh_coord *c = s->c;
    uint32_t at = 0;
    coord_waiting *w = asked_for(c, node, chunk->hash.b, &at);
    if (w == NULL) /* late, or never asked for */
        return SH_OK;
    sh_slice there;
    sh_status status = sh_txn_get(s->txn, SH_COORD_T_CHUNK, chunk->hash.b, sizeof(sh_hash), &there);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "coordinator: the chunks cannot be read");
    if (status == SH_ERR_NOT_FOUND) { /* else another node has sent the same one */
        status = sh_chunk_put(s->txn, SH_COORD_T_CHUNK, chunk, s->err);
        if (status == SH_ERR_CORRUPT || status == SH_ERR_INVALID || status == SH_ERR_LIMIT)
            return coord_bad_message(s, node, status, "the chunk does not match its hash");
        SH_TRY(status);
    }
    w->asked[at] = w->asked[--w->n_asked];
    w->active_ms = s->now_ms;
    line_remove(&c->asking, w);
    line_append(&c->asking, w);
    return w->n_asked > 0 ? SH_OK : go_on(s, w);
}

void coord_on_gone(sh_coord *c, const sh_hash *node)
{
    size_t n;
    coord_waiting **of_node = waiting_of(c, node, &n);
    for (size_t i = 0; i < n; i++)
        stop_asking(c, of_node[i]);
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
