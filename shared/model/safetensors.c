/*
 * Safetensors: see safetensors.h. The header's size, depth and number of values are limited before
 * it is parsed; then, as the format wants, the tensors must fill the data without a hole and
 * without sharing a byte.
 */
#include "shared/model/safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/json.h"

#define LENGTH_BYTES   8u
#define DEPTH_MAX      4u
#define VALUES_MAX     ((size_t)SH_SAFETENSORS_TENSORS_MAX * 16)
#define HEADER_ALIGNED 8u  /* ours: data begins at a multiple of it */
#define FLOATS_A_STEP  512 /* from bytes of any alignment */

struct sh_safetensors {
    sh_map map;
    char *name; /* the file's, for errors */
    json_t *header;
    sh_safetensor *tensors; /* by name */
    size_t n;
};

static const struct {
    const char *name;
    uint32_t bytes;
    bool is_float; /* of a type that we read */
    sh_type type;
} dtypes[] = {
    {"F32", 4, true, SH_TYPE_F32},      {"F16", 2, true, SH_TYPE_F16},
    {"BF16", 2, true, SH_TYPE_BF16},    {"F64", 8, false, SH_TYPE_F32},
    {"I64", 8, false, SH_TYPE_F32},     {"U64", 8, false, SH_TYPE_F32},
    {"I32", 4, false, SH_TYPE_F32},     {"U32", 4, false, SH_TYPE_F32},
    {"I16", 2, false, SH_TYPE_F32},     {"U16", 2, false, SH_TYPE_F32},
    {"I8", 1, false, SH_TYPE_F32},      {"U8", 1, false, SH_TYPE_F32},
    {"BOOL", 1, false, SH_TYPE_F32},    {"F8_E4M3", 1, false, SH_TYPE_F32},
    {"F8_E5M2", 1, false, SH_TYPE_F32},
};

/* ---- reading ---- */

static sh_status read_dtype(const char *file, const json_t *entry, sh_safetensor *t,
                            uint64_t *value_bytes, sh_error *err)
{
    const char *text = json_string_value(json_object_get(entry, "dtype"));
    if (text == NULL)
        return sh_fail(err, SH_ERR_INVALID, "%s: the tensor '%s' has no dtype", file, t->name);
    for (size_t i = 0; i < SH_COUNT(dtypes); i++) {
        if (strcmp(dtypes[i].name, text) != 0)
            continue;
        t->type = dtypes[i].type;
        t->is_float = dtypes[i].is_float;
        memcpy(t->dtype, text, strlen(text) + 1);
        *value_bytes = dtypes[i].bytes;
        return SH_OK;
    }
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "%s: the tensor '%s' has the dtype '%.32s', which is not known", file, t->name,
                   text);
}

static sh_status read_shape(const char *file, const json_t *entry, sh_safetensor *t,
                            uint64_t value_bytes, sh_error *err)
{
    const json_t *shape = json_object_get(entry, "shape"), *side;
    size_t d;
    if (!json_is_array(shape))
        return sh_fail(err, SH_ERR_INVALID, "%s: the tensor '%s' has no shape", file, t->name);
    if (json_array_size(shape) > SH_SAFETENSORS_DIMS_MAX)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: the tensor '%s' has %zu dimensions, at most %d are supported", file,
                       t->name, json_array_size(shape), SH_SAFETENSORS_DIMS_MAX);
    t->n_dims = (uint32_t)json_array_size(shape);
    t->bytes = value_bytes;
    for (d = 0; d < SH_SAFETENSORS_DIMS_MAX; d++)
        t->shape[d] = 1;
    json_array_foreach(shape, d, side)
    {
        json_int_t v = json_integer_value(side);
        if (!json_is_integer(side) || v < 0 ||
            __builtin_mul_overflow(t->bytes, (uint64_t)v, &t->bytes))
            return sh_fail(err, SH_ERR_INVALID,
                           "%s: the shape of the tensor '%s' is negative, too large or no integers",
                           file, t->name);
        t->shape[d] = (uint64_t)v;
    }
    return SH_OK;
}

static sh_status read_offsets(const char *file, const json_t *entry, const uint8_t *data,
                              size_t data_bytes, sh_safetensor *t, sh_error *err)
{
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *second = json_array_get(offsets, 1);
    json_int_t begin = json_integer_value(first), end = json_integer_value(second);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(second) ||
        begin < 0 || end < begin || (uint64_t)end > data_bytes)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: the data_offsets of the tensor '%s' are not a range in the %zu bytes "
                       "of data",
                       file, t->name, data_bytes);
    if ((uint64_t)(end - begin) != t->bytes)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: the tensor '%s' has %" PRIu64 " bytes by its shape and %" PRIu64
                       " by its data_offsets",
                       file, t->name, t->bytes, (uint64_t)(end - begin));
    t->data = data + begin;
    return SH_OK;
}

static bool name_is_printable(const char *name)
{
    for (const unsigned char *p = (const unsigned char *)name; *p != '\0'; p++)
        if (*p < 0x20 || *p == 0x7f)
            return false;
    return true;
}

static sh_status read_tensor(const sh_safetensors *f, const char *name, const json_t *entry,
                             const sh_map *data, sh_safetensor *t, sh_error *err)
{
    uint64_t value_bytes = 0;
    if (strlen(name) >= SH_SAFETENSORS_NAME_MAX || !name_is_printable(name))
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: a tensor's name has control characters or more than %d bytes", f->name,
                       SH_SAFETENSORS_NAME_MAX - 1);
    t->name = name;
    SH_TRY(read_dtype(f->name, entry, t, &value_bytes, err));
    SH_TRY(read_shape(f->name, entry, t, value_bytes, err));
    return read_offsets(f->name, entry, data->data, data->bytes, t, err);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const sh_safetensor *)a)->name, ((const sh_safetensor *)b)->name);
}

static int by_place(const void *a, const void *b)
{
    const sh_safetensor *x = a, *y = b;
    if (x->data != y->data)
        return (const uint8_t *)x->data < (const uint8_t *)y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; /* empty ones first */
}

/* Each begins where the one before it ends, and the last ends with the file. */
static sh_status check_cover(sh_safetensors *f, const sh_map *data, sh_error *err)
{
    const uint8_t *at = data->data;
    qsort(f->tensors, f->n, sizeof *f->tensors, by_place);
    for (size_t i = 0; i < f->n; i++) {
        const sh_safetensor *t = &f->tensors[i];
        if ((const uint8_t *)t->data != at)
            return sh_fail(err, SH_ERR_INVALID, "%s: the tensor '%s' %s", f->name, t->name,
                           (const uint8_t *)t->data < at ? "overlaps another one"
                                                         : "comes after bytes of no tensor");
        at += t->bytes;
    }
    if (at != data->data + data->bytes)
        return sh_fail(err, SH_ERR_INVALID, "%s: %zu bytes after the last tensor", f->name,
                       (size_t)(data->data + data->bytes - at));
    return SH_OK;
}

static sh_status parse_header(sh_safetensors *f, const uint8_t *bytes, size_t n, sh_map *data,
                              sh_error *err)
{
    static const sh_json_limits limits = {SH_SAFETENSORS_HEADER_MAX, VALUES_MAX, DEPTH_MAX};
    uint64_t length;
    if (n < LENGTH_BYTES)
        return sh_fail(err, SH_ERR_INVALID, "%s: truncated, it has %zu bytes", f->name, n);
    memcpy(&length, bytes, sizeof length);
    if (length > SH_SAFETENSORS_HEADER_MAX || length > n - LENGTH_BYTES)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: a header of %" PRIu64
                       " bytes in a file of %zu; is it a safetensors file?",
                       f->name, length, n);
    const char *text = (const char *)bytes + LENGTH_BYTES;
    if (length == 0 || text[0] != '{')
        return sh_fail(err, SH_ERR_INVALID, "%s: the header is no JSON object", f->name);
    *data = (sh_map){.data = bytes + LENGTH_BYTES + length, .bytes = n - LENGTH_BYTES - length};
    return sh_json_decode(text, (size_t)length, f->name, &limits, &f->header, err);
}

static sh_status parse(sh_safetensors *f, const uint8_t *bytes, size_t n, sh_error *err)
{
    sh_map data = {0};
    SH_TRY(parse_header(f, bytes, n, &data, err));
    const size_t n_entries = json_object_size(f->header);
    if (n_entries > SH_SAFETENSORS_TENSORS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%s: %zu tensors, at most %d are read", f->name,
                       n_entries, SH_SAFETENSORS_TENSORS_MAX);
    f->tensors = sh_calloc(SH_MAX(n_entries, 1), sizeof *f->tensors);
    if (f->tensors == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", f->name);
    const char *name;
    json_t *entry;
    json_object_foreach(f->header, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        SH_TRY(read_tensor(f, name, entry, &data, &f->tensors[f->n], err));
        f->n++;
    }
    SH_TRY(check_cover(f, &data, err));
    qsort(f->tensors, f->n, sizeof *f->tensors, by_name);
    return SH_OK;
}

static sh_status create(const char *name, sh_safetensors **out, sh_error *err)
{
    const size_t n = strlen(name) + 1;
    sh_safetensors *f = sh_calloc(1, sizeof *f);
    if (f == NULL || (f->name = sh_calloc(n, 1)) == NULL) {
        free(f);
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    memcpy(f->name, name, n);
    *out = f;
    return SH_OK;
}

sh_status sh_safetensors_open(const char *path, sh_safetensors **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_safetensors *f = NULL;
    SH_GOTO(create(path, &f, err));
    SH_GOTO(sh_map_open(path, &f->map, err));
    SH_GOTO(parse(f, f->map.data, f->map.bytes, err));
    *out = f;
    f = NULL;

cleanup:
    sh_safetensors_close(&f);
    return status;
}

sh_status sh_safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                     sh_safetensors **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_safetensors *f = NULL;
    SH_GOTO(create(name, &f, err));
    SH_GOTO(parse(f, bytes, n, err));
    *out = f;
    f = NULL;

cleanup:
    sh_safetensors_close(&f);
    return status;
}

void sh_safetensors_close(sh_safetensors **file)
{
    sh_safetensors *f = *file;
    if (f == NULL)
        return;
    sh_map_release(&f->map);
    json_decref(f->header);
    free(f->tensors);
    free(f->name);
    free(f);
    *file = NULL;
}

const char *sh_safetensors_path(const sh_safetensors *file)
{
    return file->name;
}

size_t sh_safetensors_count(const sh_safetensors *file)
{
    return file->n;
}

const sh_safetensor *sh_safetensors_at(const sh_safetensors *file, size_t i)
{
    SH_ASSERT(i < file->n);
    return &file->tensors[i];
}

const sh_safetensor *sh_safetensors_find(const sh_safetensors *file, const char *name)
{
    const sh_safetensor wanted = {.name = name};
    if (file->n == 0)
        return NULL;
    return bsearch(&wanted, file->tensors, file->n, sizeof *file->tensors, by_name);
}

void sh_safetensor_floats(const sh_safetensor *tensor, size_t first, size_t n, float *out)
{
    uint32_t step[FLOATS_A_STEP];
    const size_t width = sh_type_row_bytes(tensor->type, 1);
    const uint8_t *at = (const uint8_t *)tensor->data + first * width;
    SH_ASSERT(tensor->is_float && (first + n) * width <= tensor->bytes);
    for (size_t done = 0; done < n; done += FLOATS_A_STEP) {
        const size_t part = SH_MIN(n - done, (size_t)FLOATS_A_STEP);
        memcpy(step, at + done * width, part * width);
        sh_row_dequantize(tensor->type, step, out + done, part);
    }
}

/* ---- writing ---- */

static sh_status make_header(const char *path, const sh_safetensor *tensors, size_t n,
                             sh_buf *header, sh_error *err)
{
    uint64_t at = 0;
    json_t *object = json_object(), *metadata = json_object();
    sh_json_set(metadata, "format", json_string("pt"));
    sh_json_set(object, "__metadata__", metadata);
    for (size_t i = 0; i < n; i++) {
        json_t *entry = json_object(), *shape = json_array(), *offsets = json_array();
        for (uint32_t d = 0; d < tensors[i].n_dims; d++)
            json_array_append_new(shape, json_integer((json_int_t)tensors[i].shape[d]));
        json_array_append_new(offsets, json_integer((json_int_t)at));
        at += tensors[i].bytes;
        json_array_append_new(offsets, json_integer((json_int_t)at));
        sh_json_set(entry, "dtype", json_string(sh_type_get((uint32_t)tensors[i].type)->name));
        sh_json_set(entry, "shape", shape);
        sh_json_set(entry, "data_offsets", offsets);
        SH_ASSERT(json_object_get(object, tensors[i].name) == NULL);
        sh_json_set(object, tensors[i].name, entry);
    }
    char *text = json_dumps(object, JSON_COMPACT);
    json_decref(object);
    sh_status status = text == NULL ? SH_ERR_NO_MEMORY : SH_OK;
    if (status == SH_OK) {
        const size_t length = strlen(text), padding = (HEADER_ALIGNED - length) % HEADER_ALIGNED;
        const uint64_t written = length + padding;
        status = sh_buf_append(header, &written, sizeof written);
        if (status == SH_OK)
            status = sh_buf_append(header, text, length);
        if (status == SH_OK)
            status = sh_buf_append(header, "        ", padding);
    }
    free(text);
    if (status != SH_OK)
        return sh_fail(err, status, "cannot write the header of '%s': %s", path,
                       sh_status_name(status));
    return SH_OK;
}

sh_status sh_safetensors_save(const char *path, const sh_safetensor *tensors, size_t n,
                              sh_error *err)
{
    sh_status status = SH_OK;
    sh_file_writer w = {0};
    sh_buf header;
    sh_buf_init(&header, SH_SAFETENSORS_HEADER_MAX);
    for (size_t i = 0; i < n; i++) {
        uint64_t values = 1;
        for (uint32_t d = 0; d < tensors[i].n_dims; d++)
            values *= tensors[i].shape[d];
        SH_ASSERT(tensors[i].bytes == values * sh_type_row_bytes(tensors[i].type, 1));
        SH_ASSERT(tensors[i].type == SH_TYPE_F32 || tensors[i].type == SH_TYPE_F16 ||
                  tensors[i].type == SH_TYPE_BF16);
    }
    SH_GOTO(make_header(path, tensors, n, &header, err));
    SH_GOTO(sh_file_writer_open(path, &w, err));
    SH_GOTO(sh_file_writer_append(&w, header.data, header.len, err));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(sh_file_writer_append(&w, tensors[i].data, tensors[i].bytes, err));
    SH_GOTO(sh_file_writer_commit(&w, err));

cleanup:
    sh_file_writer_abandon(&w);
    sh_buf_release(&header);
    return status;
}
