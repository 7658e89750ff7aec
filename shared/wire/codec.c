#include "shared/wire/codec.h"

#include <math.h>
#include <msgpack.h>
#include <string.h>

/* First bytes of the MessagePack forms that the protocol uses (the specification's "Formats"). */
enum {
    MP_NIL = 0xc0,
    MP_FALSE = 0xc2,
    MP_TRUE = 0xc3,
    MP_BIN8 = 0xc4,
    MP_BIN16,
    MP_BIN32,
    MP_FLOAT32 = 0xca,
    MP_FLOAT64,
    MP_UINT8,
    MP_UINT16,
    MP_UINT32,
    MP_UINT64,
    MP_STR8 = 0xd9,
    MP_STR16,
    MP_STR32,
    MP_FIXINT_MAX = 0x7f,
    MP_FIXARRAY = 0x90, /* | count < 16 */
    MP_FIXSTR = 0xa0,   /* | bytes < 32 */
    MP_ARRAY16 = 0xdc,
};

/* Well-formed UTF-8 (RFC 3629) without control characters: texts end up in logs and terminals. */
static bool text_is_clean(const uint8_t *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        uint8_t c = s[i++];
        if (c < 0x20 || c == 0x7f)
            return false;
        if (c < 0x80)
            continue;
        unsigned more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
        if (c < 0xc2 || c > 0xf4 || n - i < more)
            return false;
        uint32_t code = c & (0x3fu >> more);
        for (unsigned k = 0; k < more; k++) {
            if ((s[i] & 0xc0) != 0x80)
                return false;
            code = code << 6 | (s[i++] & 0x3f);
        }
        static const uint32_t least[] = {0, 0xa0, 0x800, 0x10000}; /* 0x80 to 0x9f: controls */
        if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
            return false;
    }
    return true;
}

static sh_status check_range(const wire_schema *schema, const wire_field *field, uint64_t x,
                             const char *unit, sh_error *err)
{
    if (x >= field->min && x <= field->max)
        return SH_OK;
    return sh_fail(err, x > field->max ? SH_ERR_LIMIT : SH_ERR_INVALID,
                   "%s: field %s is %llu%s, must be %llu to %llu", schema->name, field->name,
                   (unsigned long long)x, unit, (unsigned long long)field->min,
                   (unsigned long long)field->max);
}

/* NULL says the same as "". */
static const char *text_of(const void *at)
{
    const char *text = *(const char *const *)at;
    return text != NULL ? text : "";
}

static sh_status bad_text(const wire_schema *schema, const wire_field *field, sh_error *err)
{
    return sh_fail(err, SH_ERR_INVALID, "%s: field %s is not UTF-8 text without control characters",
                   schema->name, field->name);
}

static sh_status check_finite(const wire_schema *schema, const wire_field *field, double x,
                              sh_error *err)
{
    if (isfinite(x))
        return SH_OK;
    return sh_fail(err, SH_ERR_INVALID, "%s: field %s is %s, must be a finite number", schema->name,
                   field->name, isnan(x) ? "NaN" : "infinite");
}

static sh_status check_blob(const wire_schema *schema, const wire_field *field, const sh_blob *blob,
                            sh_error *err)
{
    uint64_t limit = (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES;
    if (blob->bytes > limit)
        return sh_fail(err, SH_ERR_LIMIT, "%s: field %s has %llu bytes, at most %llu", schema->name,
                       field->name, (unsigned long long)blob->bytes, (unsigned long long)limit);
    uint64_t chunks = (blob->bytes + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES;
    if (blob->n_chunks != chunks)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: field %s has %u chunk hashes, must be %llu for %llu bytes",
                       schema->name, field->name, blob->n_chunks, (unsigned long long)chunks,
                       (unsigned long long)blob->bytes);
    return SH_OK;
}

/* ---- encoding ---- */

typedef struct {
    sh_buf *out;
    sh_status status; /* of the append that failed */
} writer;

static int write_to_buf(void *arg, const char *bytes, size_t n)
{
    writer *w = arg;
    w->status = sh_buf_append(w->out, bytes, n);
    return w->status == SH_OK ? 0 : -1;
}

static int pack_bytes(msgpack_packer *pk, const void *bytes, size_t n)
{
    int failed = msgpack_pack_bin(pk, n);
    return failed || n == 0 ? failed : msgpack_pack_bin_body(pk, bytes, n);
}

static int pack_text(msgpack_packer *pk, const char *text)
{
    size_t n = strlen(text);
    return msgpack_pack_str(pk, n) || msgpack_pack_str_body(pk, text, n);
}

static int pack_blob(msgpack_packer *pk, const sh_blob *blob)
{
    return msgpack_pack_array(pk, 3) || pack_bytes(pk, blob->sha256.b, sizeof(blob->sha256.b)) ||
           msgpack_pack_uint64(pk, blob->bytes) ||
           pack_bytes(pk, blob->chunk_hashes, (size_t)blob->n_chunks * sizeof(sh_hash));
}

static int pack_bitmap(msgpack_packer *pk, const uint64_t *words)
{
    uint8_t bytes[SH_ACK_BITMAP_WORDS * 8];
    size_t n = 0;
    for (size_t i = 0; i < sizeof(bytes); i++) {
        bytes[i] = (uint8_t)(words[i / 8] >> (i % 8 * 8));
        if (bytes[i])
            n = i + 1;
    }
    return pack_bytes(pk, bytes, n);
}

/* What encoding checks of a field before it is packed: the same as decoding. */
static sh_status check_field(const wire_schema *schema, const wire_field *field, const void *at,
                             sh_error *err)
{
    switch (field->kind) {
    case WIRE_U8:
        return check_range(schema, field, *(const uint8_t *)at, "", err);
    case WIRE_U32:
        return check_range(schema, field, *(const uint32_t *)at, "", err);
    case WIRE_U64:
        return check_range(schema, field, *(const uint64_t *)at, "", err);
    case WIRE_F32:
        return check_finite(schema, field, (double)*(const float *)at, err);
    case WIRE_F64:
        return check_finite(schema, field, *(const double *)at, err);
    case WIRE_TEXT: {
        const char *text = text_of(at);
        SH_TRY(check_range(schema, field, strlen(text), " bytes", err));
        return text_is_clean((const uint8_t *)text, strlen(text)) ? SH_OK
                                                                  : bad_text(schema, field, err);
    }
    case WIRE_BYTES:
        return check_range(schema, field, ((const sh_bytes *)at)->n, " bytes", err);
    case WIRE_BLOB:
        return check_blob(schema, field, at, err);
    case WIRE_HASHES:
        return check_range(schema, field, ((const sh_hash_list *)at)->n, "", err);
    default:
        return SH_OK; /* WIRE_LIST: its count is not at its offset, and checked with it */
    }
}

static int pack_field(msgpack_packer *pk, const wire_field *field, const void *at)
{
    switch (field->kind) {
    case WIRE_U8:
        return msgpack_pack_uint8(pk, *(const uint8_t *)at);
    case WIRE_U32:
        return msgpack_pack_uint32(pk, *(const uint32_t *)at);
    case WIRE_U64:
        return msgpack_pack_uint64(pk, *(const uint64_t *)at);
    case WIRE_BOOL:
        return *(const bool *)at ? msgpack_pack_true(pk) : msgpack_pack_false(pk);
    case WIRE_F32:
        return msgpack_pack_float(pk, *(const float *)at);
    case WIRE_F64:
        return msgpack_pack_double(pk, *(const double *)at);
    case WIRE_TEXT:
        return pack_text(pk, text_of(at));
    case WIRE_HASH:
        return pack_bytes(pk, at, sizeof(sh_hash));
    case WIRE_BYTES:
        return pack_bytes(pk, ((const sh_bytes *)at)->data, ((const sh_bytes *)at)->n);
    case WIRE_BLOB:
        return pack_blob(pk, at);
    case WIRE_HASHES:
        return pack_bytes(pk, ((const sh_hash_list *)at)->hashes,
                          ((const sh_hash_list *)at)->n * sizeof(sh_hash));
    case WIRE_BITMAP:
        return pack_bitmap(pk, at);
    case WIRE_PLAN:
    case WIRE_EVALUATE:
        return msgpack_pack_nil(pk); /* one that says something has been dealt with */
    case WIRE_LIST:
        break; /* has been dealt with */
    case WIRE_CONST:
        return msgpack_pack_uint64(pk, field->min);
    case WIRE_MAGIC:
        return pack_text(pk, field->name);
    }
    return -1;
}

static sh_status no_room(const wire_schema *schema, const msgpack_packer *pk, sh_error *err)
{
    const writer *w = pk->data;
    return sh_fail(err, w->status, "%s: no room in its buffer of at most %zu bytes", schema->name,
                   w->out->max);
}

static sh_status encode_record(const wire_schema *schema, const void *record, msgpack_packer *pk,
                               sh_error *err);

/* A field that is an array of its own: a plan that says something. */
static bool is_record(const wire_field *field, const void *at)
{
    if (field->kind == WIRE_PLAN)
        return ((const sh_train_plan *)at)->train;
    return field->kind == WIRE_EVALUATE && ((const sh_evaluate_plan *)at)->candidate != 0;
}

static sh_status encode_list(const wire_schema *schema, const wire_field *field, const void *record,
                             msgpack_packer *pk, sh_error *err)
{
    const uint8_t *at = (const uint8_t *)record + field->offset;
    uint32_t n = *(const uint32_t *)((const uint8_t *)record + field->storage);
    SH_TRY(check_range(schema, field, n, " records", err));
    if (msgpack_pack_array(pk, n))
        return no_room(schema, pk, err);
    for (uint32_t i = 0; i < n; i++)
        SH_TRY(encode_record(field->sub, at + i * field->size, pk, err));
    return SH_OK;
}

static sh_status encode_record(const wire_schema *schema, const void *record, msgpack_packer *pk,
                               sh_error *err)
{
    if (schema->check)
        SH_TRY(schema->check(record, err));
    int failed = msgpack_pack_array(pk, schema->n_fields);
    for (size_t i = 0; i < schema->n_fields && !failed; i++) {
        const wire_field *field = &schema->fields[i];
        const void *at = (const uint8_t *)record + field->offset;
        SH_TRY(check_field(schema, field, at, err));
        if (field->kind == WIRE_LIST)
            SH_TRY(encode_list(schema, field, record, pk, err));
        else if (is_record(field, at))
            SH_TRY(encode_record(field->sub, at, pk, err));
        else
            failed = pack_field(pk, field, at);
    }
    return failed ? no_room(schema, pk, err) : SH_OK;
}

sh_status sh_wire_encode(const wire_schema *schema, const void *record, sh_buf *out, sh_error *err)
{
    size_t before = out->len;
    msgpack_packer pk;
    writer w = {out, SH_OK};
    msgpack_packer_init(&pk, &w, write_to_buf);
    sh_status status = encode_record(schema, record, &pk, err);
    if (status != SH_OK)
        out->len = before;
    return status;
}

/* ---- decoding ---- */

/* A pull decoder. The first error sticks: later reads give zeros. */
typedef struct {
    const uint8_t *at;
    size_t left;
    const wire_schema *schema;
    const char *field;
    sh_error *err;
    sh_status status;
} reader;

static void refuse(reader *r, const char *want)
{
    if (r->status == SH_OK)
        r->status =
            sh_fail(r->err, SH_ERR_INVALID, "%s: field %s: %s", r->schema->name, r->field, want);
}

static const uint8_t *take(reader *r, size_t n)
{
    if (r->status == SH_OK && n > r->left)
        refuse(r, "the bytes end before it does");
    if (r->status != SH_OK)
        return NULL;
    const uint8_t *at = r->at;
    r->at += n;
    r->left -= n;
    return at;
}

static uint8_t take_byte(reader *r)
{
    const uint8_t *at = take(r, 1);
    return at ? *at : MP_NIL;
}

static uint64_t take_big_endian(reader *r, size_t n)
{
    const uint8_t *at = take(r, n);
    uint64_t x = 0;
    for (size_t i = 0; at && i < n; i++)
        x = x << 8 | at[i];
    return x;
}

/* A number in a form of `n` bytes that must need it: x >= least. */
static uint64_t take_wide(reader *r, size_t n, uint64_t least)
{
    uint64_t x = take_big_endian(r, n);
    if (r->status == SH_OK && x < least)
        refuse(r, "not in its shortest form");
    return x;
}

static uint64_t take_uint(reader *r)
{
    uint8_t form = take_byte(r);
    if (form <= MP_FIXINT_MAX)
        return form;
    switch (form) {
    case MP_UINT8:
        return take_wide(r, 1, 0x80);
    case MP_UINT16:
        return take_wide(r, 2, 0x100);
    case MP_UINT32:
        return take_wide(r, 4, 0x10000);
    case MP_UINT64:
        return take_wide(r, 8, (uint64_t)1 << 32);
    default:
        refuse(r, "must be an unsigned integer");
        return 0;
    }
}

static uint64_t take_array(reader *r)
{
    uint8_t form = take_byte(r);
    if ((form & 0xf0) == MP_FIXARRAY)
        return form & 0x0f;
    if (form == MP_ARRAY16) /* longer ones are no message of ours */
        return take_wide(r, 2, 16);
    refuse(r, "must be an array");
    return 0;
}

static sh_bytes take_body(reader *r, uint64_t n)
{
    if (r->status == SH_OK && n > r->left)
        refuse(r, "the bytes end before it does");
    if (r->status != SH_OK)
        return (sh_bytes){0};
    const uint8_t *at = take(r, (size_t)n);
    return (sh_bytes){at, (size_t)n};
}

static sh_bytes take_bin(reader *r)
{
    switch (take_byte(r)) {
    case MP_BIN8:
        return take_body(r, take_wide(r, 1, 0));
    case MP_BIN16:
        return take_body(r, take_wide(r, 2, 0x100));
    case MP_BIN32:
        return take_body(r, take_wide(r, 4, 0x10000));
    default:
        refuse(r, "must be a bin");
        return (sh_bytes){0};
    }
}

static sh_bytes take_str(reader *r)
{
    uint8_t form = take_byte(r);
    if ((form & 0xe0) == MP_FIXSTR)
        return take_body(r, form & 0x1f);
    switch (form) {
    case MP_STR8:
        return take_body(r, take_wide(r, 1, 32));
    case MP_STR16:
        return take_body(r, take_wide(r, 2, 0x100));
    case MP_STR32:
        return take_body(r, take_wide(r, 4, 0x10000));
    default:
        refuse(r, "must be a string");
        return (sh_bytes){0};
    }
}

static bool take_bool(reader *r)
{
    uint8_t form = take_byte(r);
    if (form != MP_TRUE && form != MP_FALSE)
        refuse(r, "must be true or false");
    return form == MP_TRUE;
}

static float take_float32(reader *r)
{
    if (take_byte(r) != MP_FLOAT32)
        refuse(r, "must be a float32");
    uint32_t bits = (uint32_t)take_big_endian(r, 4);
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static double take_float64(reader *r)
{
    if (take_byte(r) != MP_FLOAT64)
        refuse(r, "must be a float64");
    uint64_t bits = take_big_endian(r, 8);
    double x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static sh_hash take_hash(reader *r)
{
    sh_bytes bin = take_bin(r);
    sh_hash hash = {0};
    if (r->status == SH_OK && bin.n != sizeof(hash.b))
        refuse(r, "must be a bin of 32 bytes");
    if (r->status == SH_OK)
        memcpy(hash.b, bin.data, sizeof(hash.b));
    return hash;
}

/* A bin of whole hashes; *n how many, at most max. */
static const uint8_t *take_hashes(reader *r, uint32_t max, uint32_t *n)
{
    sh_bytes bin = take_bin(r);
    if (r->status == SH_OK && bin.n % sizeof(sh_hash) != 0)
        refuse(r, "must be a bin of 32-byte hashes");
    if (r->status == SH_OK && bin.n / sizeof(sh_hash) > max)
        r->status = sh_fail(r->err, SH_ERR_LIMIT, "%s: field %s has %zu hashes, at most %u",
                            r->schema->name, r->field, bin.n / sizeof(sh_hash), max);
    *n = r->status == SH_OK ? (uint32_t)(bin.n / sizeof(sh_hash)) : 0;
    return bin.data;
}

static void take_blob(reader *r, sh_blob *blob)
{
    if (take_array(r) != 3)
        refuse(r, "must be an array of 3");
    blob->sha256 = take_hash(r);
    blob->bytes = take_uint(r);
    blob->chunk_hashes = take_hashes(r, SH_BLOB_CHUNKS_MAX, &blob->n_chunks);
}

static void take_bitmap(reader *r, uint64_t *words)
{
    memset(words, 0, SH_ACK_BITMAP_WORDS * sizeof(*words));
    sh_bytes bin = take_bin(r);
    const uint8_t *bytes = bin.data;
    if (r->status == SH_OK && bin.n > SH_ACK_BITMAP_WORDS * 8)
        r->status = sh_fail(r->err, SH_ERR_LIMIT, "%s: field %s has %zu bytes, at most %u",
                            r->schema->name, r->field, bin.n, SH_ACK_BITMAP_WORDS * 8);
    if (r->status == SH_OK && bin.n > 0 && bytes[bin.n - 1] == 0)
        refuse(r, "must not end with a zero byte");
    for (size_t i = 0; r->status == SH_OK && i < bin.n; i++)
        words[i / 8] |= (uint64_t)bytes[i] << (i % 8 * 8);
}

static void take_text(reader *r, const wire_field *field, void *record)
{
    sh_bytes text = take_str(r);
    if (r->status == SH_OK)
        r->status = check_range(r->schema, field, text.n, " bytes", r->err);
    if (r->status == SH_OK && !text_is_clean(text.data, text.n))
        r->status = bad_text(r->schema, field, r->err);
    char *to = (char *)record + field->storage;
    if (r->status == SH_OK) {
        if (text.n)
            memcpy(to, text.data, text.n);
        to[text.n] = 0;
        *(const char **)((uint8_t *)record + field->offset) = to;
    }
}

static void take_number(reader *r, const wire_field *field, uint8_t *at)
{
    uint64_t x = take_uint(r);
    if (r->status == SH_OK)
        r->status = check_range(r->schema, field, x, "", r->err);
    if (r->status != SH_OK)
        return;
    if (field->kind == WIRE_U8)
        *at = (uint8_t)x;
    else if (field->kind == WIRE_U32)
        *(uint32_t *)at = (uint32_t)x;
    else
        *(uint64_t *)at = x;
}

static void take_constant(reader *r, const wire_field *field)
{
    uint64_t x = take_uint(r);
    if (r->status == SH_OK && x != field->min)
        r->status = sh_fail(r->err, SH_ERR_UNSUPPORTED, "%s: %s %llu is not known here, only %llu",
                            r->schema->name, field->name, (unsigned long long)x,
                            (unsigned long long)field->min);
}

static void take_magic(reader *r, const wire_field *field)
{
    sh_bytes text = take_str(r);
    if (r->status == SH_OK &&
        (text.n != strlen(field->name) || memcmp(text.data, field->name, text.n) != 0))
        refuse(r, "must be that text");
}

static void read_record(reader *r, const wire_schema *schema, void *record);

static bool take_nil(reader *r)
{
    if (r->status != SH_OK || r->left == 0 || *r->at != MP_NIL)
        return false;
    (void)take_byte(r);
    return true;
}

static void take_plan(reader *r, const wire_field *field, sh_train_plan *plan)
{
    *plan = (sh_train_plan){0};
    if (take_nil(r))
        return;
    plan->train = true;
    read_record(r, field->sub, plan);
}

static void take_evaluate(reader *r, const wire_field *field, sh_evaluate_plan *plan)
{
    *plan = (sh_evaluate_plan){0};
    if (!take_nil(r))
        read_record(r, field->sub, plan);
}

static void take_list(reader *r, const wire_field *field, uint8_t *record)
{
    uint64_t n = take_array(r);
    if (r->status == SH_OK)
        r->status = check_range(r->schema, field, n, " records", r->err);
    for (uint64_t i = 0; i < n && r->status == SH_OK; i++)
        read_record(r, field->sub, record + field->offset + i * field->size);
    if (r->status == SH_OK)
        *(uint32_t *)(record + field->storage) = (uint32_t)n;
}

static void read_field(reader *r, const wire_field *field, void *record)
{
    uint8_t *at = (uint8_t *)record + field->offset;
    r->field = field->name;
    switch (field->kind) {
    case WIRE_U8:
    case WIRE_U32:
    case WIRE_U64:
        take_number(r, field, at);
        break;
    case WIRE_BOOL:
        *(bool *)at = take_bool(r);
        break;
    case WIRE_F32:
        *(float *)at = take_float32(r);
        break;
    case WIRE_F64:
        *(double *)at = take_float64(r);
        break;
    case WIRE_TEXT:
        take_text(r, field, record);
        return; /* checked there: the record's pointer is set only when all is well */
    case WIRE_HASH:
        *(sh_hash *)at = take_hash(r);
        break;
    case WIRE_BYTES:
        *(sh_bytes *)at = take_bin(r);
        break;
    case WIRE_BLOB:
        take_blob(r, (sh_blob *)at);
        break;
    case WIRE_HASHES: {
        sh_hash_list *want = (sh_hash_list *)at;
        want->hashes = take_hashes(r, (uint32_t)field->max, &want->n);
        break;
    }
    case WIRE_BITMAP:
        take_bitmap(r, (uint64_t *)at);
        break;
    case WIRE_PLAN:
        take_plan(r, field, (sh_train_plan *)at);
        break;
    case WIRE_EVALUATE:
        take_evaluate(r, field, (sh_evaluate_plan *)at);
        break;
    case WIRE_LIST:
        take_list(r, field, record);
        break;
    case WIRE_CONST:
        take_constant(r, field);
        break;
    case WIRE_MAGIC:
        take_magic(r, field);
        break;
    }
    if (r->status == SH_OK)
        r->status = check_field(r->schema, field, at, r->err);
}

static void read_record(reader *r, const wire_schema *schema, void *record)
{
    const wire_schema *outer = r->schema;
    r->schema = schema;
    uint64_t n = take_array(r);
    if (r->status == SH_OK && n != schema->n_fields)
        r->status = sh_fail(r->err, SH_ERR_INVALID, "%s: %llu fields, must be %zu", schema->name,
                            (unsigned long long)n, schema->n_fields);
    for (size_t i = 0; i < schema->n_fields && r->status == SH_OK; i++)
        read_field(r, &schema->fields[i], record);
    if (r->status == SH_OK && schema->check)
        r->status = schema->check(record, r->err);
    r->schema = outer;
}

sh_status sh_wire_decode(const wire_schema *schema, const void *bytes, size_t n, void *record,
                         sh_error *err)
{
    reader r = {bytes, n, schema, "(all)", err, SH_OK};
    read_record(&r, schema, record);
    if (r.status == SH_OK && r.left > 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: %zu bytes after its end", schema->name, r.left);
    return r.status;
}

sh_status sh_wire_peek_number(const char *what, const void *bytes, size_t n, uint64_t *out,
                              sh_error *err)
{
    wire_schema schema = {.name = what};
    reader r = {bytes, n, &schema, "version", err, SH_OK};
    if (take_array(&r) == 0)
        refuse(&r, "the array is empty");
    uint64_t x = take_uint(&r);
    if (r.status == SH_OK)
        *out = x;
    return r.status;
}

void sh_wire_rebase_texts(const wire_schema *schema, void *record)
{
    for (size_t i = 0; i < schema->n_fields; i++) {
        const wire_field *field = &schema->fields[i];
        if (field->kind == WIRE_TEXT)
            *(const char **)((uint8_t *)record + field->offset) = (char *)record + field->storage;
    }
}
