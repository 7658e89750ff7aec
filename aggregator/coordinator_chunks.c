/*
 * Which chunks are alive: how many lists name each one. Kept releases, the candidate in progress,
 * updates in the buffer and updates on their way up, of a relay also the release that comes and
 * what it owes, each hold the chunks that they name, as often as they name them; a chunk that
 * nobody holds any more is deleted in the step that let it go. The counts are in memory only:
 * create makes them again from the rows, and a step that fails takes the core with it, so that they
 * are never other than what the store says.
 *
 * Open addressing with linear probing, at most half full. Nodes choose the names that they send, so
 * their places depend on the store's secret seed.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define CAP_MIN 256u

struct coord_chunk {
    sh_hash name;
    uint32_t holds; /* 0: a free place */
};

static size_t home(const coord_chunks *chunks, const uint8_t *name)
{
    uint64_t h = chunks->seed;
    for (size_t i = 0; i < sizeof(sh_hash); i += 8) {
        uint64_t word;
        memcpy(&word, name + i, sizeof word);
        h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        h ^= h >> 32;
    }
    return (size_t)h & (chunks->cap - 1);
}

/* The place of name, or the free one where it would go. */
static size_t find(const coord_chunks *chunks, const uint8_t *name)
{
    size_t i = home(chunks, name);
    while (chunks->places[i].holds != 0 &&
           memcmp(chunks->places[i].name.b, name, sizeof(sh_hash)) != 0)
        i = (i + 1) & (chunks->cap - 1);
    return i;
}

static sh_status grow(coord_chunks *chunks)
{
    coord_chunks bigger = *chunks;
    bigger.cap = SH_MAX(chunks->cap * 2, (size_t)CAP_MIN);
    bigger.places = sh_calloc(bigger.cap, sizeof *bigger.places);
    if (bigger.places == NULL)
        return SH_ERR_NO_MEMORY;
    for (size_t i = 0; i < chunks->cap; i++)
        if (chunks->places[i].holds != 0)
            bigger.places[find(&bigger, chunks->places[i].name.b)] = chunks->places[i];
    free(chunks->places);
    *chunks = bigger;
    return SH_OK;
}

static sh_status add(coord_chunks *chunks, const uint8_t *name)
{
    if ((chunks->n + 1) * 2 > chunks->cap)
        SH_TRY(grow(chunks));
    struct coord_chunk *place = &chunks->places[find(chunks, name)];
    if (place->holds == 0) {
        memcpy(place->name.b, name, sizeof place->name);
        chunks->n++;
    }
    place->holds++;
    return SH_OK;
}

/* True: nobody holds it any more. */
static bool take(coord_chunks *chunks, const uint8_t *name)
{
    SH_ASSERT(chunks->n > 0);
    size_t mask = chunks->cap - 1, hole = find(chunks, name);
    SH_ASSERT(chunks->places[hole].holds > 0); /* what is let go was held */
    if (--chunks->places[hole].holds > 0)
        return false;
    chunks->n--;
    /* What stands behind the hole moves into it if its search would pass there. */
    for (size_t i = (hole + 1) & mask; chunks->places[i].holds != 0; i = (i + 1) & mask) {
        size_t from = home(chunks, chunks->places[i].name.b);
        if (((i - from) & mask) >= ((i - hole) & mask)) {
            chunks->places[hole] = chunks->places[i];
            chunks->places[i].holds = 0;
            hole = i;
        }
    }
    return true;
}

sh_status coord_chunks_hold(sh_coord *c, const uint8_t *names, size_t n, sh_error *err)
{
    if (c->chunks.cap == 0)
        c->chunks.seed = c->state.seed;
    for (size_t i = 0; i < n; i++)
        if (add(&c->chunks, names + i * sizeof(sh_hash)) != SH_OK)
            return sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for chunk names");
    return SH_OK;
}

sh_status coord_chunks_drop(coord_step *s, const uint8_t *names, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint8_t *name = names + i * sizeof(sh_hash);
        if (take(&s->c->chunks, name))
            SH_TRY(sh_txn_del(s->txn, SH_COORD_T_CHUNK, name, sizeof(sh_hash), s->err));
    }
    return SH_OK;
}

sh_status coord_chunks_sweep(coord_step *s)
{
    const coord_chunks *chunks = &s->c->chunks;
    sh_cursor *cursor = NULL;
    sh_slice key;
    SH_TRY(sh_cursor_open(s->txn, SH_COORD_T_CHUNK, &cursor, s->err));
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, NULL);
    while (status == SH_OK) {
        sh_hash name;
        if (key.n != sizeof name) {
            status =
                sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: a chunk's key of %zu bytes", key.n);
            break;
        }
        memcpy(&name, key.data, sizeof name);
        if (chunks->cap == 0 || chunks->places[find(chunks, name.b)].holds == 0)
            status = sh_txn_del(s->txn, SH_COORD_T_CHUNK, name.b, sizeof name, s->err);
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, NULL);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

bool coord_chunks_have_room(const sh_coord *c, uint32_t n)
{
    return c->chunks.n + n <= COORD_CHUNKS_MAX;
}

void coord_chunks_release(coord_chunks *chunks)
{
    free(chunks->places);
    *chunks = (coord_chunks){0};
}

/* ---- the candidate's ---- */

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
    if (status == SH_OK)
        status = coord_chunks_hold(s->c, chunks, blob.n_chunks, s->err);
    if (status != SH_OK) {
        free(chunks);
        return status;
    }
    s->c->candidate.chunks = chunks;
    s->c->candidate.n_chunks = blob.n_chunks;
    return SH_OK;
}
