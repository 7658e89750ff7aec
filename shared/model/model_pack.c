/*
 * sh_model_pack: the packed form of every quantized matrix (math/pack.h), one after another in one
 * block, which is memory or a map of a cache file:
 *
 *   8 bytes    "SHOALPK" and a 0
 *   u32        version of the layout (SH_PACK_VERSION)
 *   u32        0x01020304 in the byte order of who wrote it
 *   u64        bytes of the model file
 *   i64, i64   its time of change, seconds and nanoseconds
 *   32 bytes   BLAKE2b-256 of its keys and tensor table
 *   u64, u64   matrices; bytes of the packed forms
 *   matrices   u32 type, u32 out, u32 in, u32 0, u64 offset, u64 bytes (offsets count from the
 * data) 32 bytes   BLAKE2b-256 of what is before zeros      up to a multiple of 4,096; then the
 * data
 *
 * All of it follows from the model file, so a cache is never parsed: what the header must be is
 * made and compared with what is there. Weights in a cache are trusted as those in a model file
 * are: what the numbers are is no matter of safety, where they are is.
 *
 * The rows' pages are given back matrix by matrix while packing goes on, so that not more than one
 * copy of the weights and one matrix are in memory at any time.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/math/pack.h"
#include "shared/model/blame.h"
#include "shared/model/finite.h"
#include "shared/model/model_internal.h"

#define MAGIC           "SHOALPK" /* with its 0: 8 bytes */
#define MAGIC_BYTES     8u
#define BYTE_ORDER_MARK 0x01020304u
#define DATA_ALIGN      4096u
#define HUGE_PAGE       (2u << 20)
#define GROUPS_AT_ONCE  4u
#define WRITE_BYTES     (8u << 20)
#define NOTHING_BAD     UINT64_MAX

struct sh_packed {
    uint8_t *memory; /* anonymous, memory_bytes; NULL: in map */
    size_t memory_bytes;
    sh_map map;
};

typedef struct {
    sh_matrix *m;
    size_t offset, bytes;
} placed;

typedef struct {
    sh_model *model;
    placed *placed;
    size_t n, bytes; /* of all */
    uint8_t *data;   /* where the packed forms go */
    /* The first bad row, as matrix << 32 | row: the same whoever finds it. */
    atomic_uint_least64_t bad;
} packing;

void sh_packed_release(struct sh_packed **pack)
{
    struct sh_packed *p = *pack;
    if (p == NULL)
        return;
    if (p->memory != NULL)
        munmap(p->memory, p->memory_bytes);
    sh_map_release(&p->map);
    free(p);
    *pack = NULL;
}

void sh_model_identify(const char *path, sh_file_identity *out)
{
    struct stat info;
    *out = (sh_file_identity){0};
    if (stat(path, &info) == 0)
        *out = (sh_file_identity){.device = info.st_dev,
                                  .inode = info.st_ino,
                                  .bytes = (uint64_t)info.st_size,
                                  .seconds = info.st_mtim.tv_sec,
                                  .nanoseconds = info.st_mtim.tv_nsec};
}

/* ---- what goes where ---- */

static void place(packing *k, sh_matrix *m)
{
    const size_t bytes = sh_pack_bytes(m->type, m->out, m->in);
    if (bytes == 0) /* floats stay where they are */
        return;
    k->placed[k->n++] = (placed){m, k->bytes, bytes};
    k->bytes += bytes;
}

static sh_status place_all(packing *k, sh_error *err)
{
    sh_model *model = k->model;
    const uint32_t n_layers = model->config.n_layers;
    k->placed = sh_calloc((size_t)n_layers * SH_LAYER_MATRICES + 2, sizeof *k->placed);
    if (k->placed == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    place(k, &model->token_embd);
    if (!model->config.tied_output)
        place(k, &model->output);
    for (uint32_t i = 0; i < n_layers; i++)
        for (int m = 0; m < SH_LAYER_MATRICES; m++)
            place(k, &model->layers[i].m[m]);
    return SH_OK;
}

static void use(packing *k, const uint8_t *data)
{
    for (size_t i = 0; i < k->n; i++)
        k->placed[i].m->packed = data + k->placed[i].offset;
    if (k->model->config.tied_output)
        k->model->output.packed = k->model->token_embd.packed;
}

/* ---- packing ---- */

static void note_bad(packing *k, size_t matrix, size_t row)
{
    const uint64_t found = (uint64_t)matrix << 32 | row;
    uint64_t before = atomic_load(&k->bad);
    while (found < before && !atomic_compare_exchange_weak(&k->bad, &before, found)) {
    }
}

static void check_rows(packing *k, size_t matrix, size_t begin, size_t end)
{
    const sh_matrix *m = k->placed[matrix].m;
    const size_t row_bytes = sh_type_row_bytes(m->type, m->in);
    for (size_t row = begin; row < SH_MIN(end, m->out); row++)
        if (!sh_row_is_finite(m->type, (const uint8_t *)m->data + row * row_bytes, m->in))
            note_bad(k, matrix, row);
}

static void pack_all(void *arg, const sh_member *me)
{
    packing *k = arg;
    for (size_t i = 0; i < k->n; i++) {
        const sh_matrix *m = k->placed[i].m;
        const size_t n_groups = (m->out + SH_GROUP_ROWS - 1) / SH_GROUP_ROWS;
        size_t begin, end;
        while (sh_team_take(me, n_groups, GROUPS_AT_ONCE, &begin, &end)) {
            check_rows(k, i, begin * SH_GROUP_ROWS, end * SH_GROUP_ROWS);
            sh_pack_groups(m->type, m->data, m->out, m->in, begin, end,
                           k->data + k->placed[i].offset);
        }
        sh_team_barrier(me);
        if (me->index == 0)
            sh_gguf_forget(k->model->gguf, m->data, sh_type_row_bytes(m->type, m->in) * m->out);
    }
}

static sh_status pack_into_memory(packing *k, struct sh_packed *pack, sh_team *team, sh_error *err)
{
    const size_t bytes = k->bytes + HUGE_PAGE;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for %zu bytes of packed weights",
                       k->bytes);
    pack->memory = memory;
    pack->memory_bytes = bytes;
    k->data = (uint8_t *)(((uintptr_t)memory + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    (void)!madvise(k->data, k->bytes, MADV_HUGEPAGE); /* a hint: fewer TLB misses */
    atomic_init(&k->bad, NOTHING_BAD);
    sh_team_run(team, pack_all, k);
    const uint64_t bad = atomic_load(&k->bad);
    if (bad != NOTHING_BAD)
        return sh_fail(err, SH_ERR_INVALID,
                       "tensor %s.weight: row %u holds a scale that is a NaN or an infinity",
                       k->placed[bad >> 32].m->name, (unsigned)(bad & UINT32_MAX));
    return SH_OK;
}

/* ---- the cache ---- */

static sh_status put(sh_buf *out, const void *bytes, size_t n, sh_error *err)
{
    sh_status status = sh_buf_append(out, bytes, n);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "out of memory");
}

static sh_status put_u32(sh_buf *out, uint32_t v, sh_error *err)
{
    return put(out, &v, sizeof v, err);
}

static sh_status put_u64(sh_buf *out, uint64_t v, sh_error *err)
{
    return put(out, &v, sizeof v, err);
}

static sh_status put_matrices(const packing *k, sh_buf *out, sh_error *err)
{
    SH_TRY(put_u64(out, k->n, err));
    SH_TRY(put_u64(out, k->bytes, err));
    for (size_t i = 0; i < k->n; i++) {
        const placed *p = &k->placed[i];
        SH_TRY(put_u32(out, (uint32_t)p->m->type, err));
        SH_TRY(put_u32(out, p->m->out, err));
        SH_TRY(put_u32(out, p->m->in, err));
        SH_TRY(put_u32(out, 0, err));
        SH_TRY(put_u64(out, p->offset, err));
        SH_TRY(put_u64(out, p->bytes, err));
    }
    return SH_OK;
}

/* What the cache of this model begins with. */
static sh_status make_header(const packing *k, const sh_file_identity *file, sh_buf *out,
                             sh_error *err)
{
    static const uint8_t zeros[DATA_ALIGN];
    const sh_gguf *gguf = k->model->gguf;
    size_t n;
    const uint8_t *bytes = sh_gguf_bytes(gguf, &n);
    const sh_hash named = sh_blake2b(bytes, sh_gguf_header_bytes(gguf));
    SH_TRY(put(out, MAGIC, MAGIC_BYTES, err));
    SH_TRY(put_u32(out, SH_PACK_VERSION, err));
    SH_TRY(put_u32(out, BYTE_ORDER_MARK, err));
    SH_TRY(put_u64(out, n, err));
    SH_TRY(put_u64(out, (uint64_t)file->seconds, err));
    SH_TRY(put_u64(out, (uint64_t)file->nanoseconds, err));
    SH_TRY(put(out, named.b, sizeof named.b, err));
    SH_TRY(put_matrices(k, out, err));
    const sh_hash checksum = sh_blake2b(out->data, out->len);
    SH_TRY(put(out, checksum.b, sizeof checksum.b, err));
    return put(out, zeros, (DATA_ALIGN - out->len % DATA_ALIGN) % DATA_ALIGN, err);
}

/* Maps the cache when it is the one of this model; false: it is not, or there is none. */
static bool map_cache(const packing *k, const char *path, const sh_buf *header, sh_map *out)
{
    sh_map map = {0};
    if (sh_map_open(path, &map, NULL) != SH_OK)
        return false;
    const bool good =
        map.bytes == header->len + k->bytes && memcmp(map.data, header->data, header->len) == 0;
    if (good)
        *out = map;
    else
        sh_map_release(&map);
    return good;
}

/* Nothing but a cache is overwritten. */
static sh_status check_path(const char *path, sh_error *err)
{
    sh_map map = {0};
    if (!sh_file_exists(path))
        return SH_OK;
    SH_TRY(sh_map_open(path, &map, err));
    const size_t n = SH_MIN(map.bytes, MAGIC_BYTES);
    const bool ours = memcmp(map.data, MAGIC, n) == 0;
    sh_map_release(&map);
    if (ours)
        return SH_OK;
    return sh_fail(err, SH_ERR_EXISTS,
                   "%s: exists and is no cache of packed weights; remove it or name another file",
                   path);
}

static sh_status write_cache(const packing *k, const char *path, const sh_buf *header,
                             sh_error *err)
{
    sh_status status;
    sh_file_writer w = {0};
    SH_GOTO(sh_file_writer_open(path, &w, err));
    SH_GOTO(sh_file_writer_append(&w, header->data, header->len, err));
    for (size_t at = 0; at < k->bytes; at += WRITE_BYTES)
        SH_GOTO(sh_file_writer_append(&w, k->data + at, SH_MIN(WRITE_BYTES, k->bytes - at), err));
    SH_GOTO(sh_file_writer_commit(&w, err));

cleanup:
    sh_file_writer_abandon(&w);
    return status;
}

/* Moves what was packed from memory to the cache; it stays in memory when that fails. */
static void move_to_cache(packing *k, struct sh_packed *pack, const char *path,
                          const sh_buf *header)
{
    sh_error local = {0};
    if (write_cache(k, path, header, &local) != SH_OK) {
        sh_log(SH_LOG_WARN, "pack_cache", "written=no reason=%s", sh_status_name(local.code));
        return;
    }
    if (!map_cache(k, path, header, &pack->map))
        return;
    munmap(pack->memory, pack->memory_bytes);
    pack->memory = NULL;
    k->data = NULL;
}

/* ---- the whole ---- */

static sh_status pack_with_cache(packing *k, struct sh_packed *pack, const sh_pack_options *o,
                                 sh_error *err)
{
    sh_status status;
    sh_file_identity now;
    const sh_file_identity *then = &((const sh_model_block *)k->model)->file;
    sh_buf header;
    const char *path = sh_gguf_path(k->model->gguf);
    sh_buf_init(&header, SIZE_MAX);
    SH_GOTO(check_path(o->cache, err));
    sh_model_identify(path, &now);
    if (now.inode == 0 || memcmp(&now, then, sizeof now) != 0) {
        /* The path leads to another file than the one that was opened, or to none. */
        status = pack_into_memory(k, pack, o->team, err);
        goto cleanup;
    }
    SH_GOTO(make_header(k, then, &header, err));
    if (map_cache(k, o->cache, &header, &pack->map))
        goto cleanup;
    SH_GOTO(pack_into_memory(k, pack, o->team, err));
    move_to_cache(k, pack, o->cache, &header);

cleanup:
    if (status == SH_OK)
        use(k, pack->memory != NULL ? k->data : pack->map.data + header.len);
    sh_buf_release(&header);
    return status;
}

sh_status sh_model_pack(sh_model *model, const sh_pack_options *options, bool *cached,
                        sh_error *err)
{
    sh_status status;
    packing k = {.model = model};
    struct sh_packed *pack = sh_calloc(1, sizeof *pack);
    SH_ASSERT(model->pack == NULL);
    if (pack == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", sh_gguf_path(model->gguf));
    SH_GOTO(place_all(&k, err));
    if (k.n > 0 && options->cache != NULL) {
        SH_GOTO(pack_with_cache(&k, pack, options, err));
    } else if (k.n > 0) {
        SH_GOTO(pack_into_memory(&k, pack, options->team, err));
        use(&k, k.data);
    }
    if (cached != NULL)
        *cached = pack->map.data != NULL;
    model->pack = pack;
    pack = NULL;

cleanup:
    if (status != SH_OK && status != SH_ERR_EXISTS)
        sh_blame_file(model->gguf, err);
    sh_packed_release(&pack);
    free(k.placed);
    return status;
}
