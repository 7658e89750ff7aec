/* Safetensors reader: see golden.h. Offsets, shapes and types are checked against each other. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "tests/golden/golden.h"

static const struct {
    const char *name;
    size_t bytes;
} types[] = {
    [SAFE_F32] = {"F32", 4}, [SAFE_F64] = {"F64", 8}, [SAFE_F16] = {"F16", 2},
    [SAFE_I32] = {"I32", 4}, [SAFE_I64] = {"I64", 8}, [SAFE_U8] = {"U8", 1},
    [SAFE_U32] = {"U32", 4},
};

static sh_status read_type(const char *name, safetensors_type *out)
{
    for (size_t i = 0; name != NULL && i < SH_COUNT(types); i++) {
        if (strcmp(types[i].name, name) == 0) {
            *out = (safetensors_type)i;
            return SH_OK;
        }
    }
    return SH_ERR_UNSUPPORTED;
}

/* Shape and number of values; false when they make no sense. */
static bool read_shape(const json_t *shape, safetensor *t)
{
    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_DIMS_MAX)
        return false;
    t->n_dims = (uint32_t)json_array_size(shape);
    t->n = 1;
    for (size_t d = 0; d < SAFETENSORS_DIMS_MAX; d++) {
        t->shape[d] = 1;
        if (d >= t->n_dims)
            continue;
        json_int_t size = json_integer_value(json_array_get(shape, d));
        if (size < 0 || __builtin_mul_overflow(t->n, (size_t)size, &t->n))
            return false;
        t->shape[d] = (size_t)size;
    }
    return true;
}

static sh_status read_tensor(const char *path, const json_t *entry, const uint8_t *data,
                             size_t data_bytes, safetensor *t, sh_error *err)
{
    const char *type = json_string_value(json_object_get(entry, "dtype"));
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (read_type(type, &t->type) != SH_OK)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "%s: '%s' has the type %s", path, t->name,
                       type == NULL ? "(none)" : type);
    json_int_t begin = json_integer_value(json_array_get(offsets, 0));
    json_int_t end = json_integer_value(json_array_get(offsets, 1));
    size_t bytes;
    if (!read_shape(json_object_get(entry, "shape"), t) ||
        __builtin_mul_overflow(t->n, types[t->type].bytes, &bytes) || begin < 0 || end < begin ||
        (uint64_t)end > data_bytes || (uint64_t)(end - begin) != bytes)
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' has a shape or offsets that do not fit", path,
                       t->name);
    t->data = data + begin;
    if ((uintptr_t)t->data % types[t->type].bytes != 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is not aligned", path, t->name);
    return SH_OK;
}

static int name_compare(const void *a, const void *b)
{
    return strcmp(((const safetensor *)a)->name, ((const safetensor *)b)->name);
}

static sh_status read_header(const char *path, safetensors *file, sh_error *err)
{
    uint64_t n;
    if (file->map.bytes < sizeof n)
        return sh_fail(err, SH_ERR_INVALID, "%s: truncated, it has %zu bytes", path,
                       file->map.bytes);
    memcpy(&n, file->map.data, sizeof n);
    if (n > file->map.bytes - sizeof n || n > SAFETENSORS_HEADER_MAX)
        return sh_fail(err, SH_ERR_INVALID, "%s: a header of %" PRIu64 " bytes in a file of %zu",
                       path, n, file->map.bytes);
    json_error_t reason;
    file->header = json_loadb((const char *)file->map.data + sizeof n, (size_t)n,
                              JSON_REJECT_DUPLICATES, &reason);
    if (!json_is_object(file->header) || json_object_size(file->header) > SAFETENSORS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "%s: the header is no JSON object (%s)", path,
                       reason.text);
    file->tensors = sh_calloc(json_object_size(file->header), sizeof *file->tensors);
    if (file->tensors == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", path);
    const uint8_t *data = file->map.data + sizeof n + n;
    const char *name;
    json_t *entry;
    json_object_foreach(file->header, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        safetensor *t = &file->tensors[file->n++];
        t->name = name;
        SH_TRY(read_tensor(path, entry, data, file->map.bytes - sizeof n - n, t, err));
    }
    qsort(file->tensors, file->n, sizeof *file->tensors, name_compare);
    return SH_OK;
}

sh_status safetensors_open(const char *path, safetensors *out, sh_error *err)
{
    safetensors file = {0};
    sh_status status = SH_OK;
    SH_GOTO(sh_map_open(path, &file.map, err));
    SH_GOTO(read_header(path, &file, err));
    *out = file;
    return SH_OK;

cleanup:
    safetensors_release(&file);
    return status;
}

void safetensors_release(safetensors *file)
{
    free(file->tensors);
    json_decref(file->header);
    sh_map_release(&file->map);
    *file = (safetensors){0};
}

const safetensor *safetensors_find(const safetensors *file, const char *name)
{
    safetensor wanted = {.name = name};
    if (file->n == 0)
        return NULL;
    return bsearch(&wanted, file->tensors, file->n, sizeof *file->tensors, name_compare);
}

sh_status safetensors_need(const safetensors *file, const char *name, safetensors_type type,
                           const safetensor **out, sh_error *err)
{
    const safetensor *t = safetensors_find(file, name);
    if (t == NULL)
        return sh_fail(err, SH_ERR_INVALID, "the golden file has no '%s'", name);
    if (t->type != type)
        return sh_fail(err, SH_ERR_INVALID, "'%s' of the golden file is %s, not %s", name,
                       types[t->type].name, types[type].name);
    *out = t;
    return SH_OK;
}

sh_status safetensors_scalar(const safetensors *file, const char *name, double *out, sh_error *err)
{
    const safetensor *t = safetensors_find(file, name);
    if (t == NULL || t->n == 0)
        return sh_fail(err, SH_ERR_INVALID, "the golden file has no value '%s'", name);
    switch (t->type) {
    case SAFE_F32:
        *out = (double)*(const float *)t->data;
        return SH_OK;
    case SAFE_F64:
        *out = *(const double *)t->data;
        return SH_OK;
    case SAFE_I32:
        *out = (double)*(const int32_t *)t->data;
        return SH_OK;
    case SAFE_I64:
        *out = (double)*(const int64_t *)t->data;
        return SH_OK;
    case SAFE_U32:
        *out = (double)*(const uint32_t *)t->data;
        return SH_OK;
    case SAFE_F16:
    case SAFE_U8:
        break;
    }
    return sh_fail(err, SH_ERR_INVALID, "'%s' of the golden file is %s, no number", name,
                   types[t->type].name);
}
