#include "shared/base/json.h"

#include "shared/base/buf.h"
#include "shared/base/file.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* line: of the text's first in its file. */
static sh_status decode(const char *text, size_t n, const char *name, size_t line, json_t **out,
                        sh_error *err)
{
    json_error_t problem;
    json_t *value = json_loadb(text, n, JSON_REJECT_DUPLICATES, &problem);
    if (!value) {
        sh_status code = json_error_code(&problem) == json_error_out_of_memory ? SH_ERR_NO_MEMORY
                                                                               : SH_ERR_INVALID;
        return sh_fail(err, code, "%s:%zu:%d: %s", name, line + (size_t)problem.line - 1,
                       problem.column, problem.text);
    }
    *out = value;
    return SH_OK;
}

sh_status sh_json_load(const char *path, json_t **out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, SH_JSON_BYTES_MAX, &text, &n, err));
    sh_status status = decode((const char *)text, n, path, 1, out, err);
    free(text);
    return status;
}

/* Brackets and commas outside strings; no other rule of the grammar is looked at. */
static void measure(const char *text, size_t n, size_t *values, size_t *depth_max)
{
    size_t depth = 0;
    bool in_string = false;
    *values = *depth_max = 0;
    for (size_t i = 0; i < n; i++) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\';
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            depth++;
            (*values)++;
            *depth_max = SH_MAX(*depth_max, depth);
        } else if (c == ',') {
            (*values)++;
        } else if ((c == ']' || c == '}') && depth > 0) {
            depth--;
        }
    }
}

/* where: the name and what of it is known of the place. */
static sh_status check_limits(const char *text, size_t n, const char *where,
                              const sh_json_limits *limits, sh_error *err)
{
    size_t values = 0, depth = 0;
    if (n > limits->bytes_max)
        return sh_fail(err, SH_ERR_LIMIT, "%s: JSON of %zu bytes, at most %zu are read", where, n,
                       limits->bytes_max);
    measure(text, n, &values, &depth);
    if (values > limits->values_max)
        return sh_fail(err, SH_ERR_LIMIT, "%s: JSON of %zu values, at most %zu are read", where,
                       values, limits->values_max);
    if (depth > limits->depth_max)
        return sh_fail(err, SH_ERR_LIMIT, "%s: JSON of %zu levels, at most %u are read", where,
                       depth, limits->depth_max);
    return SH_OK;
}

sh_status sh_json_decode(const void *text, size_t n, const char *name, const sh_json_limits *limits,
                         json_t **out, sh_error *err)
{
    SH_TRY(check_limits(text, n, name, limits, err));
    return decode(text, n, name, 1, out, err);
}

sh_status sh_json_decode_line(const sh_json_line *line, const sh_json_limits *limits, json_t **out,
                              sh_error *err)
{
    char where[SH_ERROR_TEXT_BYTES];
    snprintf(where, sizeof where, "%s:%zu", line->name, line->number);
    SH_TRY(check_limits(line->text, line->bytes, where, limits, err));
    return decode(line->text, line->bytes, line->name, line->number, out, err);
}

static int append_text(const char *text, size_t n, void *data)
{
    return sh_buf_append(data, text, n) == SH_OK ? 0 : -1;
}

sh_status sh_json_save(const char *path, const json_t *value, sh_error *err)
{
    sh_buf buf;
    sh_buf_init(&buf, SH_JSON_BYTES_MAX);
    sh_status status = SH_OK;
    if (json_dump_callback(value, append_text, &buf, JSON_INDENT(2) | JSON_ENCODE_ANY) != 0 ||
        sh_buf_append(&buf, "\n", 1) != SH_OK)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory to write '%s'", path));
    SH_GOTO(sh_file_write_atomic(path, buf.data, buf.len, err));

cleanup:
    sh_buf_release(&buf);
    return status;
}

void sh_json_set(json_t *object, const char *key, json_t *value)
{
    int failed = json_object_set_new(object, key, value);
    SH_ASSERT(!failed);
}

json_t *sh_json_uint(uint64_t x)
{
    return json_integer((json_int_t)SH_MIN(x, (uint64_t)INT64_MAX));
}

json_t *sh_json_hash(const sh_hash *hash)
{
    char text[SH_HASH_HEX_BYTES];
    sh_hex(hash->b, sizeof hash->b, text);
    return json_string(text);
}

json_t *sh_json_number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}
