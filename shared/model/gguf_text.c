/* Metadata as text, for `shoal model inspect`: one line a key, whatever bytes the file has. */
#include <inttypes.h>
#include <string.h>

#include "shared/model/gguf_internal.h"

#define TEXT_STRING_BYTES 120 /* shown of a string */
#define TEXT_ELEMENTS     8   /* shown of an array */

/* Control bytes and backslashes are escaped, so that a value stays on its line. */
static sh_status append_text(sh_buf *out, const uint8_t *text, uint64_t n, bool quoted)
{
    uint64_t shown = SH_MIN(n, (uint64_t)TEXT_STRING_BYTES);
    while (shown > 0 && shown < n && (text[shown] & 0xc0) == 0x80)
        shown--; /* not through a UTF-8 character */
    if (quoted)
        SH_TRY(sh_buf_append(out, "\"", 1));
    for (uint64_t i = 0; i < shown; i++) {
        if (text[i] == '\n')
            SH_TRY(sh_buf_append(out, "\\n", 2));
        else if (text[i] == '\\' || (quoted && text[i] == '"'))
            SH_TRY(sh_buf_printf(out, "\\%c", text[i]));
        else if (text[i] < 0x20 || text[i] == 0x7f)
            SH_TRY(sh_buf_printf(out, "\\x%02x", text[i]));
        else
            SH_TRY(sh_buf_append(out, &text[i], 1));
    }
    if (quoted)
        SH_TRY(sh_buf_append(out, "\"", 1));
    if (shown < n)
        SH_TRY(sh_buf_printf(out, "... (%" PRIu64 " bytes)", n));
    return SH_OK;
}

static sh_status append_unsigned(sh_buf *out, const uint8_t *at, size_t bytes)
{
    uint64_t v = 0;
    memcpy(&v, at, bytes); /* little-endian, as the file */
    return sh_buf_printf(out, "%" PRIu64, v);
}

static sh_status append_signed(sh_buf *out, const uint8_t *at, size_t bytes)
{
    uint64_t v = 0;
    memcpy(&v, at, bytes);
    unsigned unused = 64 - 8 * (unsigned)bytes;
    return sh_buf_printf(out, "%" PRId64, (int64_t)(v << unused) >> unused);
}

static sh_status append_float(sh_buf *out, const uint8_t *at, size_t bytes)
{
    float single = 0;
    double value = 0;
    if (bytes == sizeof single)
        memcpy(&single, at, sizeof single);
    else
        memcpy(&value, at, sizeof value);
    return bytes == sizeof single ? sh_buf_printf(out, "%.9g", (double)single)
                                  : sh_buf_printf(out, "%.17g", value);
}

/* Appends the value at *at and moves *at past it. */
static sh_status append_value(sh_buf *out, gguf_value_type type, const uint8_t **at, bool quoted)
{
    const uint8_t *value = *at;
    size_t bytes = sh_gguf_value_bytes(type);
    uint64_t n;
    *at += bytes;
    switch (type) {
    case GGUF_U8:
    case GGUF_U16:
    case GGUF_U32:
    case GGUF_U64:
        return append_unsigned(out, value, bytes);
    case GGUF_I8:
    case GGUF_I16:
    case GGUF_I32:
    case GGUF_I64:
        return append_signed(out, value, bytes);
    case GGUF_F32:
    case GGUF_F64:
        return append_float(out, value, bytes);
    case GGUF_BOOL:
        return sh_buf_printf(out, "%s", *value != 0 ? "true" : "false");
    case GGUF_STRING:
        memcpy(&n, value, sizeof n);
        *at = value + sizeof n + n;
        return append_text(out, value + sizeof n, n, quoted);
    case GGUF_ARRAY:
    case GGUF_VALUE_TYPES:
        break;
    }
    SH_ASSERT(!"a type that an open file can have");
    return SH_ERR_INVALID;
}

static sh_status append_key_value(sh_buf *out, const gguf_key *key)
{
    const uint8_t *at = key->value;
    if (key->type != GGUF_ARRAY)
        return append_value(out, key->type, &at, false);
    SH_TRY(sh_buf_append(out, "[", 1));
    for (uint64_t i = 0; i < SH_MIN(key->n, (uint64_t)TEXT_ELEMENTS); i++) {
        if (i > 0)
            SH_TRY(sh_buf_append(out, ", ", 2));
        SH_TRY(append_value(out, key->element, &at, true));
    }
    if (key->n > TEXT_ELEMENTS)
        SH_TRY(sh_buf_printf(out, ", ... (%" PRIu64 " elements)", key->n));
    return sh_buf_append(out, "]", 1);
}

sh_status sh_gguf_key_text(const sh_gguf *gguf, size_t i, sh_buf *key, sh_buf *type, sh_buf *value)
{
    const gguf_key *k = sh_gguf_key_at(gguf, i);
    SH_TRY(append_text(key, (const uint8_t *)k->name, k->name_bytes, false));
    if (k->type == GGUF_ARRAY)
        SH_TRY(sh_buf_printf(type, "array of %s", sh_gguf_value_type_name(k->element)));
    else
        SH_TRY(sh_buf_printf(type, "%s", sh_gguf_value_type_name(k->type)));
    return append_key_value(value, k);
}
