/* Typed keys of Hugging Face's JSON files. */
#include <math.h>
#include <stdlib.h>

#include "shared/base/file.h"
#include "shared/model/convert_internal.h"

/* Vocabularies have up to some 300,000 tokens and as many merges, of three values each. */
const sh_json_limits sh_hf_settings_limits = {4u << 20, 200000, 64};
const sh_json_limits sh_hf_vocabulary_limits = {64u << 20, 8u << 20, 64};

static sh_status load(const char *path, const sh_json_limits *limits, json_t **out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    json_t *value = NULL;
    SH_TRY(sh_file_read(path, limits->bytes_max, &text, &n, err));
    sh_status status = sh_json_decode(text, n, path, limits, &value, err);
    free(text);
    if (status != SH_OK)
        return status;
    if (!json_is_object(value)) {
        json_decref(value);
        return sh_fail(err, SH_ERR_INVALID, "%s: it is no JSON object", path);
    }
    *out = value;
    return SH_OK;
}

sh_status sh_hf_load_settings(const char *path, json_t **out, sh_error *err)
{
    return load(path, &sh_hf_settings_limits, out, err);
}

sh_status sh_hf_load_vocabulary(const char *path, json_t **out, sh_error *err)
{
    return load(path, &sh_hf_vocabulary_limits, out, err);
}

bool sh_hf_has(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value != NULL && !json_is_null(value);
}

sh_status sh_hf_get_u32(const json_t *object, const char *file, const char *key, uint32_t max,
                        uint32_t *out, sh_error *err)
{
    const json_t *value = json_object_get(object, key);
    if (value == NULL || json_is_null(value))
        return SH_OK;
    const json_int_t v = json_integer_value(value);
    if (!json_is_integer(value) || v < 1 || (uint64_t)v > max)
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is no integer in 1..%u", file, key, max);
    *out = (uint32_t)v;
    return SH_OK;
}

sh_status sh_hf_get_real(const json_t *object, const char *file, const char *key, double *out,
                         sh_error *err)
{
    const json_t *value = json_object_get(object, key);
    if (value == NULL || json_is_null(value))
        return SH_OK;
    const double v = json_number_value(value);
    if (!json_is_number(value) || !(v > 0) || !isfinite((float)v))
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is no positive number", file, key);
    *out = v;
    return SH_OK;
}

sh_status sh_hf_get_bool(const json_t *object, const char *file, const char *key, bool *out,
                         sh_error *err)
{
    const json_t *value = json_object_get(object, key);
    if (value == NULL || json_is_null(value))
        return SH_OK;
    if (!json_is_boolean(value))
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is neither true nor false", file, key);
    *out = json_is_true(value);
    return SH_OK;
}

sh_status sh_hf_get_string(const json_t *object, const char *file, const char *key,
                           const char **out, sh_error *err)
{
    const json_t *value = json_object_get(object, key);
    if (value == NULL || json_is_null(value))
        return SH_OK;
    if (!json_is_string(value))
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is no string", file, key);
    *out = json_string_value(value);
    return SH_OK;
}
