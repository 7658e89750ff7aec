/*
 * GGUF reader. The bytes of a file, little-endian
 * (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
 *
 *   "GGUF"  u32 version  u64 tensor count  u64 key count
 *   keys:     u64 length, name; u32 value type; value
 *             (string: u64 length, bytes; array: u32 element type, u64 count, elements)
 *   tensors:  u64 length, name; u32 dimensions; u64 ne[dimensions]; u32 type; u64 offset
 *   padding to general.alignment, then the data section, to which offsets refer
 *
 * Everything is checked at open, so that the getters and the users of a tensor's data need not.
 * There is no checksum in the format: who needs one hashes the file.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/model/gguf_internal.h"

#define PRINTABLE_BYTES 80

typedef struct {
    const char *text;
    uint32_t bytes, i;
} name_entry;

struct sh_gguf {
    sh_map map;    /* of the file, or */
    uint8_t *copy; /* of bytes that were not aligned, or neither */
    const uint8_t *bytes;
    size_t n, header_bytes;
    char *path; /* for errors */
    uint32_t version, alignment;
    gguf_key *keys;
    sh_gguf_tensor *tensors;
    size_t n_keys, n_tensors;
    name_entry *key_index, *tensor_index; /* sorted by name */
    char (*tensor_names)[SH_GGUF_NAME_MAX + 1];
};

/* Where parsing is. `what` names the part that is being read, for the error of a truncated file. */
typedef struct {
    const uint8_t *bytes;
    size_t n, at;
    const char *path;
    char what[PRINTABLE_BYTES + 32];
    sh_error *err;
} cursor;

/* A name from a file as one line that a terminal and a log can take. */
static const char *printable(char out[PRINTABLE_BYTES], const void *text, size_t n)
{
    const uint8_t *bytes = text;
    size_t shown = SH_MIN(n, (size_t)PRINTABLE_BYTES - 1);
    for (size_t i = 0; i < shown; i++)
        out[i] = bytes[i] < 0x20 || bytes[i] == 0x7f ? '?' : (char)bytes[i];
    out[shown] = '\0';
    return out;
}

static sh_status need(cursor *c, uint64_t n)
{
    if (n <= c->n - c->at)
        return SH_OK;
    return sh_fail(c->err, SH_ERR_INVALID,
                   "%s: truncated: %s needs %" PRIu64 " bytes at byte %zu, the file has %zu",
                   c->path, c->what, n, c->at, c->n);
}

static sh_status read_u32(cursor *c, uint32_t *out)
{
    SH_TRY(need(c, sizeof *out));
    memcpy(out, c->bytes + c->at, sizeof *out);
    c->at += sizeof *out;
    return SH_OK;
}

static sh_status read_u64(cursor *c, uint64_t *out)
{
    SH_TRY(need(c, sizeof *out));
    memcpy(out, c->bytes + c->at, sizeof *out);
    c->at += sizeof *out;
    return SH_OK;
}

/* A string of 0 to max bytes; *text points into the file. */
static sh_status read_string(cursor *c, uint64_t max, const char **text, uint32_t *bytes)
{
    uint64_t n;
    SH_TRY(read_u64(c, &n));
    if (n > max)
        return sh_fail(c->err, SH_ERR_INVALID,
                       "%s: %s has a string of %" PRIu64 " bytes, at most %" PRIu64 " are allowed",
                       c->path, c->what, n, max);
    SH_TRY(need(c, n));
    *text = (const char *)c->bytes + c->at;
    *bytes = (uint32_t)n;
    c->at += n;
    return SH_OK;
}

static sh_status read_name(cursor *c, uint64_t max, const char **text, uint32_t *bytes)
{
    SH_TRY(read_string(c, max, text, bytes));
    if (*bytes == 0 || memchr(*text, '\0', *bytes) != NULL)
        return sh_fail(c->err, SH_ERR_INVALID, "%s: %s has a name that is empty or holds a 0 byte",
                       c->path, c->what);
    return SH_OK;
}

/* ---- header ---- */

static sh_status fail_foreign(const cursor *c)
{
    static const struct {
        const char *magic, *what;
    } known[] = {
        {"tjgg", "an old llama.cpp file (GGJT)"},   {"fmgg", "an old llama.cpp file (GGMF)"},
        {"lmgg", "an old llama.cpp file (GGML)"},   {"FUGG", "a big-endian GGUF file"},
        {"PK\x03\x04", "a zip archive (PyTorch?)"},
    };
    for (size_t i = 0; i < SH_COUNT(known); i++)
        if (memcmp(c->bytes, known[i].magic, 4) == 0)
            return sh_fail(c->err, SH_ERR_INVALID, "%s: not GGUF but %s; convert it first", c->path,
                           known[i].what);
    return sh_fail(c->err, SH_ERR_INVALID,
                   "%s: not a GGUF file (it begins with the bytes %02x %02x %02x %02x)", c->path,
                   c->bytes[0], c->bytes[1], c->bytes[2], c->bytes[3]);
}

static sh_status check_count(const cursor *c, const char *what, uint64_t n, uint64_t max,
                             uint64_t bytes_each)
{
    if (n <= max && n <= (c->n - c->at) / bytes_each)
        return SH_OK;
    return sh_fail(c->err, SH_ERR_INVALID,
                   "%s: truncated or broken: it claims %" PRIu64 " %s, the limit is %" PRIu64
                   " and %zu bytes are left",
                   c->path, n, what, max, c->n - c->at);
}

static sh_status read_header(cursor *c, sh_gguf *g)
{
    uint64_t n_tensors, n_keys;
    snprintf(c->what, sizeof c->what, "the header");
    SH_TRY(need(c, 4));
    if (memcmp(c->bytes, "GGUF", 4) != 0)
        return fail_foreign(c);
    c->at = 4;
    SH_TRY(read_u32(c, &g->version));
    if (g->version > 0xffffu && (g->version & 0xffffu) == 0)
        return sh_fail(c->err, SH_ERR_UNSUPPORTED,
                       "%s: a big-endian GGUF file; only little-endian ones are read", c->path);
    if (g->version < 2 || g->version > SH_GGUF_VERSION)
        return sh_fail(c->err, SH_ERR_UNSUPPORTED,
                       "%s: GGUF version %" PRIu32 "; versions 2 and 3 are read", c->path,
                       g->version);
    SH_TRY(read_u64(c, &n_tensors));
    SH_TRY(read_u64(c, &n_keys));
    SH_TRY(check_count(c, "keys", n_keys, SH_GGUF_KEYS_MAX, SH_GGUF_KEY_BYTES_MIN));
    SH_TRY(check_count(c, "tensors", n_tensors, SH_GGUF_TENSORS_MAX, SH_GGUF_TENSOR_BYTES_MIN));
    g->keys = sh_calloc(n_keys, sizeof *g->keys);
    g->key_index = sh_calloc(n_keys, sizeof *g->key_index);
    g->tensors = sh_calloc(n_tensors, sizeof *g->tensors);
    g->tensor_index = sh_calloc(n_tensors, sizeof *g->tensor_index);
    g->tensor_names = sh_calloc(n_tensors, sizeof *g->tensor_names);
    if (!g->keys || !g->key_index || !g->tensors || !g->tensor_index || !g->tensor_names)
        return sh_fail(c->err, SH_ERR_NO_MEMORY, "%s: out of memory", c->path);
    g->n_keys = n_keys;
    g->n_tensors = n_tensors;
    return SH_OK;
}

/* ---- names ---- */

static int name_compare(const void *a, const void *b)
{
    const name_entry *x = a, *y = b;
    int order = memcmp(x->text, y->text, SH_MIN(x->bytes, y->bytes));
    return order != 0 ? order : (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static sh_status index_names(const cursor *c, name_entry *index, size_t n, const char *what)
{
    char shown[PRINTABLE_BYTES];
    qsort(index, n, sizeof *index, name_compare);
    for (size_t i = 1; i < n; i++)
        if (name_compare(&index[i - 1], &index[i]) == 0)
            return sh_fail(c->err, SH_ERR_INVALID, "%s: the %s '%s' is there twice", c->path, what,
                           printable(shown, index[i].text, index[i].bytes));
    return SH_OK;
}

static const name_entry *index_find(const name_entry *index, size_t n, const char *name)
{
    size_t bytes = strlen(name);
    if (n == 0 || bytes > UINT32_MAX)
        return NULL;
    name_entry wanted = {.text = name, .bytes = (uint32_t)bytes};
    return bsearch(&wanted, index, n, sizeof *index, name_compare);
}

/* ---- keys ---- */

size_t sh_gguf_value_bytes(gguf_value_type type)
{
    static const uint8_t bytes[GGUF_VALUE_TYPES] = {
        [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_BOOL] = 1, [GGUF_U16] = 2,
        [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4,  [GGUF_F32] = 4,
        [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8,
    };
    SH_ASSERT(type < GGUF_VALUE_TYPES);
    return bytes[type];
}

const char *sh_gguf_value_type_name(gguf_value_type type)
{
    static const char *const names[GGUF_VALUE_TYPES] = {
        [GGUF_U8] = "u8",         [GGUF_I8] = "i8",       [GGUF_U16] = "u16", [GGUF_I16] = "i16",
        [GGUF_U32] = "u32",       [GGUF_I32] = "i32",     [GGUF_F32] = "f32", [GGUF_BOOL] = "bool",
        [GGUF_STRING] = "string", [GGUF_ARRAY] = "array", [GGUF_U64] = "u64", [GGUF_I64] = "i64",
        [GGUF_F64] = "f64",
    };
    SH_ASSERT(type < GGUF_VALUE_TYPES);
    return names[type];
}

static sh_status read_value_type(cursor *c, gguf_value_type *out)
{
    uint32_t type;
    SH_TRY(read_u32(c, &type));
    if (type >= GGUF_VALUE_TYPES)
        return sh_fail(c->err, SH_ERR_INVALID, "%s: %s has the unknown value type %" PRIu32,
                       c->path, c->what, type);
    *out = (gguf_value_type)type;
    return SH_OK;
}

/* Passes over the n elements of a key's value. */
static sh_status skip_values(cursor *c, gguf_value_type type, uint64_t n)
{
    if (type == GGUF_STRING) {
        for (uint64_t i = 0; i < n; i++) {
            const char *text;
            uint32_t bytes;
            SH_TRY(read_string(c, SH_GGUF_STRING_MAX, &text, &bytes));
        }
        return SH_OK;
    }
    uint64_t bytes = n * sh_gguf_value_bytes(type); /* n is at most SH_GGUF_ARRAY_MAX */
    SH_TRY(need(c, bytes));
    for (uint64_t i = 0; type == GGUF_BOOL && i < n; i++)
        if (c->bytes[c->at + i] > 1)
            return sh_fail(c->err, SH_ERR_INVALID, "%s: %s has a bool that is %u", c->path, c->what,
                           c->bytes[c->at + i]);
    c->at += bytes;
    return SH_OK;
}

static sh_status read_key(cursor *c, size_t i, gguf_key *key)
{
    char shown[PRINTABLE_BYTES];
    snprintf(c->what, sizeof c->what, "key %zu", i);
    SH_TRY(read_name(c, SH_GGUF_KEY_BYTES_MAX, &key->name, &key->name_bytes));
    snprintf(c->what, sizeof c->what, "key '%s'", printable(shown, key->name, key->name_bytes));
    SH_TRY(read_value_type(c, &key->type));
    key->element = key->type;
    key->n = 1;
    if (key->type == GGUF_ARRAY) {
        SH_TRY(read_value_type(c, &key->element));
        SH_TRY(read_u64(c, &key->n));
        if (key->element == GGUF_ARRAY)
            return sh_fail(c->err, SH_ERR_UNSUPPORTED, "%s: %s is an array of arrays", c->path,
                           c->what);
        if (key->n > SH_GGUF_ARRAY_MAX)
            return sh_fail(c->err, SH_ERR_INVALID,
                           "%s: %s has %" PRIu64 " elements, at most %u are allowed", c->path,
                           c->what, key->n, SH_GGUF_ARRAY_MAX);
    }
    key->value = c->bytes + c->at;
    SH_TRY(skip_values(c, key->element, key->n));
    key->value_bytes = (uint64_t)(c->bytes + c->at - key->value);
    return SH_OK;
}

static sh_status read_keys(cursor *c, sh_gguf *g)
{
    for (size_t i = 0; i < g->n_keys; i++) {
        gguf_key *key = &g->keys[i];
        SH_TRY(read_key(c, i, key));
        g->key_index[i] = (name_entry){key->name, key->name_bytes, (uint32_t)i};
    }
    return index_names(c, g->key_index, g->n_keys, "key");
}

static sh_status read_alignment(const cursor *c, sh_gguf *g)
{
    uint64_t alignment;
    sh_error local = {0};
    sh_status status = sh_gguf_get_u64(g, "general.alignment", &alignment, &local);
    g->alignment = SH_GGUF_ALIGNMENT;
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    if (status != SH_OK)
        return sh_fail(c->err, status, "%s", local.text);
    if (alignment < 8 || alignment > SH_GGUF_ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0)
        return sh_fail(c->err, SH_ERR_INVALID,
                       "%s: general.alignment is %" PRIu64 ", not a power of two from 8 to %u",
                       c->path, alignment, SH_GGUF_ALIGNMENT_MAX);
    g->alignment = (uint32_t)alignment;
    return SH_OK;
}

/* ---- tensors ---- */

static const char *foreign_type_name(uint32_t type)
{
    static const char *const names[] = {
        [9] = "Q8_1",    [10] = "Q2_K",    [11] = "Q3_K",  [15] = "Q8_K",   [16] = "IQ2_XXS",
        [17] = "IQ2_XS", [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",
        [22] = "IQ2_S",  [23] = "IQ4_XS",  [24] = "I8",    [25] = "I16",    [26] = "I32",
        [27] = "I64",    [28] = "F64",     [29] = "IQ1_M", [34] = "TQ1_0",  [35] = "TQ2_0",
        [39] = "MXFP4",
    };
    return type < SH_COUNT(names) && names[type] != NULL ? names[type] : "unknown";
}

/* Bytes of a tensor whose shape and type are read; every product is checked. */
static sh_status tensor_bytes(const cursor *c, sh_gguf_tensor *t, uint64_t *out)
{
    const sh_type_info *info = sh_type_get((uint32_t)t->type);
    uint64_t rows = 1, bytes;
    bool overflow = false;
    for (uint32_t d = 0; d < t->n_dims; d++) {
        if (t->ne[d] == 0)
            return sh_fail(c->err, SH_ERR_INVALID, "%s: %s has a dimension of 0", c->path, c->what);
        if (d > 0)
            overflow |= __builtin_mul_overflow(rows, t->ne[d], &rows);
    }
    if (t->ne[0] % info->block_values != 0)
        return sh_fail(c->err, SH_ERR_INVALID,
                       "%s: %s has rows of %" PRIu64
                       " values, no multiple of %s's block of %" PRIu32,
                       c->path, c->what, t->ne[0], info->name, info->block_values);
    overflow |= __builtin_mul_overflow(t->ne[0] / info->block_values, info->block_bytes, &bytes);
    overflow |= __builtin_mul_overflow(bytes, rows, &bytes);
    if (overflow || bytes > INT64_MAX / 8)
        return sh_fail(c->err, SH_ERR_INVALID, "%s: %s is larger than any file", c->path, c->what);
    *out = bytes;
    return SH_OK;
}

/* Reads one tensor; its offset in the data section goes to *offset. */
static sh_status read_tensor(cursor *c, sh_gguf *g, size_t i, uint64_t *offset)
{
    sh_gguf_tensor *t = &g->tensors[i];
    char shown[PRINTABLE_BYTES];
    const char *name = NULL;
    uint32_t name_bytes = 0, type;
    snprintf(c->what, sizeof c->what, "tensor %zu", i);
    SH_TRY(read_name(c, SH_GGUF_NAME_MAX, &name, &name_bytes));
    memcpy(g->tensor_names[i], name, name_bytes);
    t->name = g->tensor_names[i];
    snprintf(c->what, sizeof c->what, "tensor '%s'", printable(shown, name, name_bytes));
    SH_TRY(read_u32(c, &t->n_dims));
    if (t->n_dims < 1 || t->n_dims > SH_GGUF_DIMS_MAX)
        return sh_fail(c->err, SH_ERR_INVALID, "%s: %s has %" PRIu32 " dimensions, not 1 to %d",
                       c->path, c->what, t->n_dims, SH_GGUF_DIMS_MAX);
    for (uint32_t d = 0; d < SH_GGUF_DIMS_MAX; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims)
            SH_TRY(read_u64(c, &t->ne[d]));
    }
    SH_TRY(read_u32(c, &type));
    if (sh_type_get(type) == NULL)
        return sh_fail(c->err, SH_ERR_UNSUPPORTED,
                       "%s: %s has type %" PRIu32 " (%s); read are F32, F16, BF16, Q8_0, Q4_0, "
                       "Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K",
                       c->path, c->what, type, foreign_type_name(type));
    t->type = (sh_type)type;
    SH_TRY(read_u64(c, offset));
    if (*offset % g->alignment != 0)
        return sh_fail(c->err, SH_ERR_INVALID,
                       "%s: %s is at offset %" PRIu64 ", no multiple of the alignment %" PRIu32,
                       c->path, c->what, *offset, g->alignment);
    g->tensor_index[i] = (name_entry){t->name, name_bytes, (uint32_t)i};
    return tensor_bytes(c, t, &t->bytes);
}

typedef struct {
    uint64_t offset, bytes;
    const char *name;
} extent;

static int extent_compare(const void *a, const void *b)
{
    const extent *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* Every tensor inside the data section, no two of them over each other. */
static sh_status check_extents(const cursor *c, extent *extents, size_t n, uint64_t section_bytes)
{
    char one[PRINTABLE_BYTES], two[PRINTABLE_BYTES];
    for (size_t i = 0; i < n; i++) {
        const extent *e = &extents[i];
        if (e->offset > section_bytes || e->bytes > section_bytes - e->offset)
            return sh_fail(c->err, SH_ERR_INVALID,
                           "%s: truncated: tensor '%s' needs %" PRIu64 " bytes at %" PRIu64
                           " of the data section, which has %" PRIu64,
                           c->path, printable(one, e->name, strlen(e->name)), e->bytes, e->offset,
                           section_bytes);
    }
    qsort(extents, n, sizeof *extents, extent_compare);
    for (size_t i = 1; i < n; i++)
        if (extents[i].offset - extents[i - 1].offset < extents[i - 1].bytes)
            return sh_fail(c->err, SH_ERR_INVALID, "%s: the tensors '%s' and '%s' overlap", c->path,
                           printable(one, extents[i - 1].name, strlen(extents[i - 1].name)),
                           printable(two, extents[i].name, strlen(extents[i].name)));
    return SH_OK;
}

static sh_status read_tensors(cursor *c, sh_gguf *g)
{
    sh_status status = SH_OK;
    extent *extents = sh_calloc(g->n_tensors, sizeof *extents);
    if (extents == NULL)
        return sh_fail(c->err, SH_ERR_NO_MEMORY, "%s: out of memory", c->path);
    for (size_t i = 0; i < g->n_tensors; i++) {
        SH_GOTO(read_tensor(c, g, i, &extents[i].offset));
        extents[i].bytes = g->tensors[i].bytes;
        extents[i].name = g->tensors[i].name;
    }
    SH_GOTO(index_names(c, g->tensor_index, g->n_tensors, "tensor"));
    g->header_bytes = c->at;
    uint64_t start = ((uint64_t)c->at + g->alignment - 1) / g->alignment * g->alignment;
    uint64_t section_bytes = start <= c->n ? c->n - start : 0;
    for (size_t i = 0; i < g->n_tensors && start <= c->n; i++)
        if (extents[i].offset <= section_bytes)
            g->tensors[i].data = c->bytes + start + extents[i].offset;
    SH_GOTO(check_extents(c, extents, g->n_tensors, section_bytes));

cleanup:
    free(extents);
    return status;
}

/* ---- open and close ---- */

/* Takes over map and copy. */
static sh_status gguf_open(sh_map *map, uint8_t **copy, const uint8_t *bytes, size_t n,
                           const char *name, sh_gguf **out, sh_error *err)
{
    sh_status status = SH_OK;
    cursor c = {.bytes = bytes, .n = n, .path = name, .err = err};
    sh_gguf *g = sh_calloc(1, sizeof *g);
    if (g == NULL) {
        sh_map_release(map);
        free(*copy);
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    g->map = *map;
    g->copy = *copy;
    g->bytes = bytes;
    g->n = n;
    *map = (sh_map){0};
    *copy = NULL;
    g->path = sh_calloc(strlen(name) + 1, 1);
    if (g->path == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", name);
        goto cleanup;
    }
    memcpy(g->path, name, strlen(name) + 1);
    SH_GOTO(read_header(&c, g));
    SH_GOTO(read_keys(&c, g));
    SH_GOTO(read_alignment(&c, g));
    SH_GOTO(read_tensors(&c, g));
    *out = g;
    g = NULL;

cleanup:
    sh_gguf_close(&g);
    return status;
}

sh_status sh_gguf_open(const char *path, sh_gguf **out, sh_error *err)
{
    sh_map map = {0};
    uint8_t *copy = NULL;
    SH_TRY(sh_map_open(path, &map, err));
    return gguf_open(&map, &copy, map.data, map.bytes, path, out, err);
}

sh_status sh_gguf_open_memory(const void *bytes, size_t n, const char *name, sh_gguf **out,
                              sh_error *err)
{
    sh_map map = {0};
    uint8_t *copy = NULL;
    const uint8_t *aligned = bytes;
    if ((uintptr_t)bytes % sizeof(uint64_t) != 0) { /* tensors are used in place as floats */
        copy = sh_alloc_aligned(n);
        if (copy == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", name);
        memcpy(copy, bytes, n);
        aligned = copy;
    }
    return gguf_open(&map, &copy, aligned, n, name, out, err);
}

void sh_gguf_close(sh_gguf **gguf)
{
    sh_gguf *g = *gguf;
    if (g == NULL)
        return;
    sh_map_release(&g->map);
    free(g->copy);
    free(g->path);
    free(g->keys);
    free(g->key_index);
    free(g->tensors);
    free(g->tensor_index);
    free(g->tensor_names);
    free(g);
    *gguf = NULL;
}

uint32_t sh_gguf_version(const sh_gguf *gguf)
{
    return gguf->version;
}

const char *sh_gguf_path(const sh_gguf *gguf)
{
    return gguf->path;
}

const uint8_t *sh_gguf_bytes(const sh_gguf *gguf, size_t *n)
{
    *n = gguf->n;
    return gguf->bytes;
}

size_t sh_gguf_header_bytes(const sh_gguf *gguf)
{
    return gguf->header_bytes;
}

void sh_gguf_forget(const sh_gguf *gguf, const void *bytes, size_t n)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)bytes + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)bytes + n) & ~(page - 1);
    if (gguf->map.data == NULL || begin >= end) /* of memory it would lose what is there */
        return;
    SH_ASSERT(begin >= (uintptr_t)gguf->map.data &&
              end <= (uintptr_t)gguf->map.data + gguf->map.bytes);
    (void)!madvise((void *)begin, end - begin, MADV_DONTNEED);
}

size_t sh_gguf_n_tensors(const sh_gguf *gguf)
{
    return gguf->n_tensors;
}

const sh_gguf_tensor *sh_gguf_tensor_at(const sh_gguf *gguf, size_t i)
{
    SH_ASSERT(i < gguf->n_tensors);
    return &gguf->tensors[i];
}

const sh_gguf_tensor *sh_gguf_tensor_find(const sh_gguf *gguf, const char *name)
{
    const name_entry *found = index_find(gguf->tensor_index, gguf->n_tensors, name);
    return found == NULL ? NULL : &gguf->tensors[found->i];
}

size_t sh_gguf_n_keys(const sh_gguf *gguf)
{
    return gguf->n_keys;
}

const gguf_key *sh_gguf_key_at(const sh_gguf *gguf, size_t i)
{
    SH_ASSERT(i < gguf->n_keys);
    return &gguf->keys[i];
}

/* ---- metadata ---- */

static sh_status find_key(const sh_gguf *g, const char *name, const gguf_key **out, sh_error *err)
{
    const name_entry *found = index_find(g->key_index, g->n_keys, name);
    if (found == NULL)
        return sh_fail(err, SH_ERR_NOT_FOUND, "%s: the key '%s' is missing", g->path, name);
    *out = &g->keys[found->i];
    return SH_OK;
}

static sh_status fail_type(const sh_gguf *g, const gguf_key *key, const char *name,
                           const char *wanted, sh_error *err)
{
    return sh_fail(err, SH_ERR_INVALID, "%s: the key '%s' is of type %s, not %s", g->path, name,
                   sh_gguf_value_type_name(key->type), wanted);
}

/* Reads a value of a fixed width into *out. */
#define VALUE(T, bytes)                                                                            \
    __extension__({                                                                                \
        T value_;                                                                                  \
        memcpy(&value_, bytes, sizeof value_);                                                     \
        value_;                                                                                    \
    })

sh_status sh_gguf_get_u64(const sh_gguf *g, const char *name, uint64_t *out, sh_error *err)
{
    const gguf_key *key = NULL;
    int64_t value;
    SH_TRY(find_key(g, name, &key, err));
    switch (key->type) {
    case GGUF_U8:
        value = VALUE(uint8_t, key->value);
        break;
    case GGUF_I8:
        value = VALUE(int8_t, key->value);
        break;
    case GGUF_U16:
        value = VALUE(uint16_t, key->value);
        break;
    case GGUF_I16:
        value = VALUE(int16_t, key->value);
        break;
    case GGUF_U32:
        value = VALUE(uint32_t, key->value);
        break;
    case GGUF_I32:
        value = VALUE(int32_t, key->value);
        break;
    case GGUF_U64:
        *out = VALUE(uint64_t, key->value);
        return SH_OK;
    case GGUF_I64:
        value = VALUE(int64_t, key->value);
        break;
    default:
        return fail_type(g, key, name, "an integer", err);
    }
    if (value < 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: the key '%s' is negative (%" PRId64 ")", g->path,
                       name, value);
    *out = (uint64_t)value;
    return SH_OK;
}

sh_status sh_gguf_get_f64(const sh_gguf *g, const char *name, double *out, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_key(g, name, &key, err));
    if (key->type != GGUF_F32 && key->type != GGUF_F64)
        return fail_type(g, key, name, "a float", err);
    *out = key->type == GGUF_F32 ? (double)VALUE(float, key->value) : VALUE(double, key->value);
    return SH_OK;
}

sh_status sh_gguf_get_bool(const sh_gguf *g, const char *name, bool *out, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_key(g, name, &key, err));
    if (key->type != GGUF_BOOL)
        return fail_type(g, key, name, "a bool", err);
    *out = key->value[0] != 0;
    return SH_OK;
}

sh_status sh_gguf_get_string(const sh_gguf *g, const char *name, const char **text, size_t *n,
                             sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_key(g, name, &key, err));
    if (key->type != GGUF_STRING)
        return fail_type(g, key, name, "a string", err);
    *n = key->value_bytes - sizeof(uint64_t);
    *text = (const char *)key->value + sizeof(uint64_t);
    return SH_OK;
}

sh_status sh_gguf_get_array_count(const sh_gguf *g, const char *name, size_t *n, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_key(g, name, &key, err));
    if (key->type != GGUF_ARRAY)
        return fail_type(g, key, name, "an array", err);
    *n = key->n;
    return SH_OK;
}

static sh_status find_array(const sh_gguf *g, const char *name, gguf_value_type element, size_t n,
                            const gguf_key **out, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_key(g, name, &key, err));
    if (key->type != GGUF_ARRAY)
        return fail_type(g, key, name, "an array", err);
    if (key->element != element)
        return sh_fail(err, SH_ERR_INVALID, "%s: the key '%s' is an array of %s, not of %s",
                       g->path, name, sh_gguf_value_type_name(key->element),
                       sh_gguf_value_type_name(element));
    if (key->n != n)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: the key '%s' has %" PRIu64 " elements, %zu are wanted", g->path, name,
                       key->n, n);
    *out = key;
    return SH_OK;
}

sh_status sh_gguf_get_strings(const sh_gguf *g, const char *name, const char **texts,
                              uint32_t *lengths, size_t n, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_array(g, name, GGUF_STRING, n, &key, err));
    const uint8_t *at = key->value;
    for (size_t i = 0; i < n; i++) {
        lengths[i] = (uint32_t)VALUE(uint64_t, at);
        texts[i] = (const char *)at + sizeof(uint64_t);
        at += sizeof(uint64_t) + lengths[i];
    }
    return SH_OK;
}

sh_status sh_gguf_get_f32s(const sh_gguf *g, const char *name, float *out, size_t n, sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_array(g, name, GGUF_F32, n, &key, err));
    memcpy(out, key->value, n * sizeof *out);
    return SH_OK;
}

sh_status sh_gguf_get_i32s(const sh_gguf *g, const char *name, int32_t *out, size_t n,
                           sh_error *err)
{
    const gguf_key *key = NULL;
    SH_TRY(find_array(g, name, GGUF_I32, n, &key, err));
    memcpy(out, key->value, n * sizeof *out);
    return SH_OK;
}
