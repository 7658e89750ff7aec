/*
 * GGUF writer, version 3, alignment 32. What it writes, llama.cpp loads: names are shorter than 64
 * bytes, tensors follow each other in order with zeros between them. The form is in gguf.c.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/model/gguf_internal.h"

#define QUANTIZATION_VERSION 2 /* of the block formats, GGML_QNT_VERSION */

typedef struct {
    char *name;
    uint32_t name_bytes;
    sh_buf value; /* u32 type and what follows, as in the file */
} written_key;

typedef struct {
    char name[SH_GGUF_NAME_MAX]; /* 0-terminated: llama.cpp refuses 64 bytes */
    sh_type type;
    uint32_t n_dims;
    uint64_t ne[SH_GGUF_DIMS_MAX], bytes;
    const void *data;
} written_tensor;

struct sh_gguf_writer {
    written_key *keys;
    written_tensor *tensors;
    size_t n_keys, cap_keys, n_tensors, cap_tensors;
};

sh_status sh_gguf_writer_create(sh_gguf_writer **out, sh_error *err)
{
    sh_gguf_writer *w = sh_calloc(1, sizeof *w);
    if (w == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for a GGUF writer");
    *out = w;
    return SH_OK;
}

void sh_gguf_writer_destroy(sh_gguf_writer **writer)
{
    sh_gguf_writer *w = *writer;
    if (w == NULL)
        return;
    for (size_t i = 0; i < w->n_keys; i++) {
        free(w->keys[i].name);
        sh_buf_release(&w->keys[i].value);
    }
    free(w->keys);
    free(w->tensors);
    free(w);
    *writer = NULL;
}

/* ---- keys ---- */

static written_key *find_key(sh_gguf_writer *w, const char *name, size_t bytes)
{
    for (size_t i = 0; i < w->n_keys; i++)
        if (w->keys[i].name_bytes == bytes && memcmp(w->keys[i].name, name, bytes) == 0)
            return &w->keys[i];
    return NULL;
}

/* Takes over value, also on error. */
static sh_status put_key(sh_gguf_writer *w, const char *name, size_t name_bytes, sh_buf *value)
{
    sh_status status = SH_OK;
    SH_ASSERT(name_bytes > 0 && name_bytes <= SH_GGUF_KEY_BYTES_MAX);
    written_key *key = find_key(w, name, name_bytes);
    if (key == NULL) {
        char *copy = NULL;
        SH_GOTO(sh_array_reserve((void **)&w->keys, &w->cap_keys, w->n_keys + 1, sizeof *w->keys,
                                 SH_GGUF_KEYS_MAX));
        copy = sh_calloc(name_bytes, 1);
        if (copy == NULL) {
            status = SH_ERR_NO_MEMORY;
            goto cleanup;
        }
        memcpy(copy, name, name_bytes);
        key = &w->keys[w->n_keys++];
        *key = (written_key){.name = copy, .name_bytes = (uint32_t)name_bytes};
    }
    sh_buf_release(&key->value);
    key->value = *value;
    *value = (sh_buf){0};

cleanup:
    sh_buf_release(value);
    return status;
}

static sh_status append_u32(sh_buf *out, uint32_t v)
{
    return sh_buf_append(out, &v, sizeof v);
}

static sh_status append_u64(sh_buf *out, uint64_t v)
{
    return sh_buf_append(out, &v, sizeof v);
}

static sh_status set_fixed(sh_gguf_writer *w, const char *name, gguf_value_type type,
                           const void *bytes)
{
    sh_status status = SH_OK;
    sh_buf value;
    sh_buf_init(&value, sizeof(uint32_t) + sizeof(uint64_t));
    SH_GOTO(append_u32(&value, type));
    SH_GOTO(sh_buf_append(&value, bytes, sh_gguf_value_bytes(type)));
    return put_key(w, name, strlen(name), &value);

cleanup:
    sh_buf_release(&value);
    return status;
}

sh_status sh_gguf_writer_set_u32(sh_gguf_writer *w, const char *key, uint32_t v)
{
    return set_fixed(w, key, GGUF_U32, &v);
}

sh_status sh_gguf_writer_set_type(sh_gguf_writer *w, sh_type type)
{
    static const struct {
        sh_type type;
        uint32_t file_type; /* llama_ftype of llama.cpp */
    } known[] = {{SH_TYPE_F32, 0},
                 {SH_TYPE_F16, 1},
                 {SH_TYPE_Q4_0, 2},
                 {SH_TYPE_Q8_0, 7},
                 {SH_TYPE_BF16, 32}};
    size_t i = 0;
    while (i < SH_COUNT(known) && known[i].type != type)
        i++;
    SH_ASSERT(i < SH_COUNT(known));
    SH_TRY(sh_gguf_writer_set_u32(w, "general.quantization_version", QUANTIZATION_VERSION));
    return sh_gguf_writer_set_u32(w, "general.file_type", known[i].file_type);
}

sh_status sh_gguf_writer_set_u64(sh_gguf_writer *w, const char *key, uint64_t v)
{
    return set_fixed(w, key, GGUF_U64, &v);
}

sh_status sh_gguf_writer_set_f32(sh_gguf_writer *w, const char *key, float v)
{
    return set_fixed(w, key, GGUF_F32, &v);
}

sh_status sh_gguf_writer_set_bool(sh_gguf_writer *w, const char *key, bool v)
{
    uint8_t byte = v;
    return set_fixed(w, key, GGUF_BOOL, &byte);
}

static sh_status append_string(sh_buf *out, const char *text, size_t n)
{
    if (n > SH_GGUF_STRING_MAX)
        return SH_ERR_LIMIT;
    SH_TRY(append_u64(out, n));
    return sh_buf_append(out, text, n);
}

sh_status sh_gguf_writer_set_string(sh_gguf_writer *w, const char *key, const char *v)
{
    sh_status status = SH_OK;
    sh_buf value;
    sh_buf_init(&value, (size_t)SH_GGUF_STRING_MAX + 16);
    SH_GOTO(append_u32(&value, GGUF_STRING));
    SH_GOTO(append_string(&value, v, strlen(v)));
    return put_key(w, key, strlen(key), &value);

cleanup:
    sh_buf_release(&value);
    return status;
}

static sh_status begin_array(sh_buf *value, gguf_value_type element, size_t n)
{
    sh_buf_init(value, SIZE_MAX);
    if (n > SH_GGUF_ARRAY_MAX)
        return SH_ERR_LIMIT;
    SH_TRY(append_u32(value, GGUF_ARRAY));
    SH_TRY(append_u32(value, element));
    return append_u64(value, n);
}

sh_status sh_gguf_writer_set_strings(sh_gguf_writer *w, const char *key, const char *const *texts,
                                     const uint32_t *lengths, size_t n)
{
    sh_status status = SH_OK;
    sh_buf value;
    SH_GOTO(begin_array(&value, GGUF_STRING, n));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(append_string(&value, texts[i], lengths[i]));
    return put_key(w, key, strlen(key), &value);

cleanup:
    sh_buf_release(&value);
    return status;
}

static sh_status set_numbers(sh_gguf_writer *w, const char *key, gguf_value_type element,
                             const void *v, size_t n)
{
    sh_status status = SH_OK;
    sh_buf value;
    SH_GOTO(begin_array(&value, element, n));
    SH_GOTO(sh_buf_append(&value, v, n * sh_gguf_value_bytes(element)));
    return put_key(w, key, strlen(key), &value);

cleanup:
    sh_buf_release(&value);
    return status;
}

sh_status sh_gguf_writer_set_f32s(sh_gguf_writer *w, const char *key, const float *v, size_t n)
{
    return set_numbers(w, key, GGUF_F32, v, n);
}

sh_status sh_gguf_writer_set_i32s(sh_gguf_writer *w, const char *key, const int32_t *v, size_t n)
{
    return set_numbers(w, key, GGUF_I32, v, n);
}

static bool is_skipped(const gguf_key *key, const char *const *skip)
{
    static const char *const ours[] = {"general.alignment", NULL};
    const char *const *lists[] = {ours, skip};
    for (size_t l = 0; l < SH_COUNT(lists); l++)
        for (size_t i = 0; lists[l] != NULL && lists[l][i] != NULL; i++)
            if (strlen(lists[l][i]) == key->name_bytes &&
                memcmp(lists[l][i], key->name, key->name_bytes) == 0)
                return true;
    return false;
}

static sh_status copy_key(sh_gguf_writer *w, const gguf_key *key)
{
    sh_status status = SH_OK;
    sh_buf value;
    if (key->type == GGUF_ARRAY) {
        SH_GOTO(begin_array(&value, key->element, key->n));
    } else {
        sh_buf_init(&value, SIZE_MAX);
        SH_GOTO(append_u32(&value, key->type));
    }
    SH_GOTO(sh_buf_append(&value, key->value, key->value_bytes));
    return put_key(w, key->name, key->name_bytes, &value);

cleanup:
    sh_buf_release(&value);
    return status;
}

sh_status sh_gguf_writer_copy_keys(sh_gguf_writer *w, const sh_gguf *src, const char *const *skip,
                                   sh_error *err)
{
    for (size_t i = 0; i < sh_gguf_n_keys(src); i++) {
        const gguf_key *key = sh_gguf_key_at(src, i);
        if (is_skipped(key, skip))
            continue;
        sh_status status = copy_key(w, key);
        if (status != SH_OK)
            return sh_fail(err, status, "cannot copy the keys of %s: %s", sh_gguf_path(src),
                           sh_status_name(status));
    }
    return SH_OK;
}

/* ---- tensors ---- */

sh_status sh_gguf_writer_add_tensor(sh_gguf_writer *w, const char *name, sh_type type,
                                    const uint64_t *ne, uint32_t n_dims, const void *data,
                                    sh_error *err)
{
    written_tensor t = {.type = type, .n_dims = n_dims, .data = data};
    size_t name_bytes = strlen(name);
    SH_ASSERT(n_dims >= 1 && n_dims <= SH_GGUF_DIMS_MAX);
    if (name_bytes == 0 || name_bytes >= sizeof t.name)
        return sh_fail(err, SH_ERR_LIMIT, "the tensor name '%.64s' does not have 1 to %zu bytes",
                       name, sizeof t.name - 1);
    memcpy(t.name, name, name_bytes + 1);
    for (size_t i = 0; i < w->n_tensors; i++)
        if (strcmp(w->tensors[i].name, name) == 0)
            return sh_fail(err, SH_ERR_EXISTS, "the tensor '%s' is added twice", name);
    t.bytes = sh_type_row_bytes(type, ne[0]);
    bool overflow = false;
    for (uint32_t d = 0; d < n_dims; d++) {
        t.ne[d] = ne[d];
        if (d > 0)
            overflow |= __builtin_mul_overflow(t.bytes, ne[d], &t.bytes);
    }
    if (overflow || t.bytes == 0 || t.bytes > INT64_MAX / 8)
        return sh_fail(err, SH_ERR_INVALID,
                       "the tensor '%s' is empty, too large, or its rows are no whole blocks",
                       name);
    sh_status status = sh_array_reserve((void **)&w->tensors, &w->cap_tensors, w->n_tensors + 1,
                                        sizeof t, SH_GGUF_TENSORS_MAX);
    if (status != SH_OK)
        return sh_fail(err, status, "no room for the tensor '%s': %s", name,
                       sh_status_name(status));
    w->tensors[w->n_tensors++] = t;
    return SH_OK;
}

/* ---- output ---- */

/* Zeros up to the alignment, counted from `start` of out. */
static sh_status append_padding(sh_buf *out, size_t start)
{
    static const uint8_t zeros[SH_GGUF_ALIGNMENT];
    size_t past = (out->len - start) % SH_GGUF_ALIGNMENT;
    return past == 0 ? SH_OK : sh_buf_append(out, zeros, SH_GGUF_ALIGNMENT - past);
}

static sh_status append_tensor_info(sh_buf *out, const written_tensor *t, uint64_t offset)
{
    SH_TRY(append_string(out, t->name, strlen(t->name)));
    SH_TRY(append_u32(out, t->n_dims));
    for (uint32_t d = 0; d < t->n_dims; d++)
        SH_TRY(append_u64(out, t->ne[d]));
    SH_TRY(append_u32(out, (uint32_t)t->type));
    return append_u64(out, offset);
}

sh_status sh_gguf_writer_head(const sh_gguf_writer *w, sh_buf *out)
{
    size_t start = out->len;
    uint64_t offset = 0;
    SH_TRY(sh_buf_append(out, "GGUF", 4));
    SH_TRY(append_u32(out, SH_GGUF_VERSION));
    SH_TRY(append_u64(out, w->n_tensors));
    SH_TRY(append_u64(out, w->n_keys));
    for (size_t i = 0; i < w->n_keys; i++) {
        SH_TRY(append_string(out, w->keys[i].name, w->keys[i].name_bytes));
        SH_TRY(sh_buf_append(out, w->keys[i].value.data, w->keys[i].value.len));
    }
    for (size_t i = 0; i < w->n_tensors; i++) {
        SH_TRY(append_tensor_info(out, &w->tensors[i], offset));
        uint64_t bytes = w->tensors[i].bytes;
        offset += (bytes + SH_GGUF_ALIGNMENT - 1) / SH_GGUF_ALIGNMENT * SH_GGUF_ALIGNMENT;
    }
    return append_padding(out, start);
}

size_t sh_gguf_writer_n_tensors(const sh_gguf_writer *w)
{
    return w->n_tensors;
}

uint64_t sh_gguf_writer_tensor_bytes(const sh_gguf_writer *w, size_t i)
{
    SH_ASSERT(i < w->n_tensors);
    return w->tensors[i].bytes;
}

static sh_status append_all(const sh_gguf_writer *w, sh_buf *out)
{
    size_t start = out->len;
    SH_TRY(sh_gguf_writer_head(w, out));
    for (size_t i = 0; i < w->n_tensors; i++) {
        SH_ASSERT(w->tensors[i].data != NULL);
        SH_TRY(sh_buf_append(out, w->tensors[i].data, w->tensors[i].bytes));
        SH_TRY(append_padding(out, start));
    }
    return SH_OK;
}

sh_status sh_gguf_writer_encode(const sh_gguf_writer *w, sh_buf *out, sh_error *err)
{
    size_t before = out->len;
    sh_status status = append_all(w, out);
    if (status == SH_OK)
        return SH_OK;
    out->len = before;
    return sh_fail(err, status, "cannot encode a GGUF of %zu tensors: %s", w->n_tensors,
                   sh_status_name(status));
}

sh_status sh_gguf_writer_save(const sh_gguf_writer *w, const char *path, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf bytes;
    sh_buf_init(&bytes, SIZE_MAX);
    SH_GOTO(sh_gguf_writer_encode(w, &bytes, err));
    SH_GOTO(sh_file_write_atomic(path, bytes.data, bytes.len, err));

cleanup:
    sh_buf_release(&bytes);
    return status;
}
