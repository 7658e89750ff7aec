/*
 * The messages' tables, the envelope around them, and the payloads. docs/protocol.md says the same
 * in words.
 *
 * Envelope:  array [version, type, bin16 hash, bin body], hash = BLAKE2b-256(body)[0..16)
 * Manifest:  array of its fields, then 64 bytes of Ed25519 signature over the array's bytes
 */
#include "shared/wire/wire.h"

#include <stdlib.h>
#include <string.h>

#include "shared/wire/codec.h"

#define HASH_BYTES      16 /* of the body, in the envelope */
#define ENVELOPE_MAX    32 /* bytes around a body */
#define BODY_MAX        (SH_WIRE_MESSAGE_MAX - ENVELOPE_MAX)
#define PAYLOAD_VERSION 1
#define RELAYED_VERSION 2 /* of an update's payload that has parts */
#define PART_ID_BYTES   48

/* Shorthands of the tables below. FIELD: what has no range; RANGE: what has one. */
#define NAMED(label, T, member, how) .name = label, .kind = how, .offset = offsetof(T, member)
#define FIELD(T, member, how)                                                                      \
    {                                                                                              \
        NAMED(#member, T, member, how)                                                             \
    }
#define RANGE(T, member, how, from, to)                                                            \
    {                                                                                              \
        NAMED(#member, T, member, how), .min = from, .max = to                                     \
    }
#define MSG_FIELD(m, member, how)                                                                  \
    {                                                                                              \
        NAMED(#member, sh_msg, m.member, how)                                                      \
    }
#define MSG_RANGE(m, member, how, from, to)                                                        \
    {                                                                                              \
        NAMED(#member, sh_msg, m.member, how), .min = from, .max = to                              \
    }
#define MSG_TEXT(m, member, slot) MSG_TEXT_MAX(m, member, slot, SH_WIRE_TEXT_MAX)
#define MSG_TEXT_MAX(m, member, slot, to)                                                          \
    {                                                                                              \
        NAMED(#member, sh_msg, m.member, WIRE_TEXT), .max = to,                                    \
                                                     .storage = offsetof(sh_msg, text[slot])       \
    }
#define U64(T, member)     RANGE(T, member, WIRE_U64, 0, UINT64_MAX)
#define U32(T, member)     RANGE(T, member, WIRE_U32, 0, UINT32_MAX)
#define MSG_U64(m, member) MSG_RANGE(m, member, WIRE_U64, 0, UINT64_MAX)
#define MSG_U32(m, member) MSG_RANGE(m, member, WIRE_U32, 0, UINT32_MAX)
#define VERSION_FIELD                                                                              \
    {                                                                                              \
        .name = "payload version", .kind = WIRE_CONST, .min = PAYLOAD_VERSION                      \
    }

/* ---- messages ---- */

/* A version's fields are the first ones of the next version's: FIELDS_n of them. */
#define ENROL_FIELDS_2 5
static const wire_field enrol_fields[] = {
    MSG_U64(enrol, epoch),
    MSG_TEXT(enrol, agent, 0),
    MSG_TEXT(enrol, kernel, 1),
    MSG_U32(enrol, cores),
    MSG_U64(enrol, memory_bytes),
    MSG_TEXT_MAX(enrol, device_class, 2, SH_WIRE_CLASS_MAX),
    MSG_U64(enrol, disk_bytes),
    MSG_U32(enrol, slots),
    MSG_RANGE(enrol, token, WIRE_BYTES, 0, SH_WIRE_TOKEN_MAX),
    MSG_RANGE(enrol, leases, WIRE_HASHES, 0, SH_WIRE_LEASES_MAX),
    MSG_RANGE(enrol, starts, WIRE_BYTES, 0, SH_WIRE_LEASES_MAX *SH_WIRE_START_BYTES),
};

static sh_status check_enrol(const void *record, sh_error *err)
{
    const sh_msg_enrol *enrol = &((const sh_msg *)record)->enrol;
    if (enrol->starts.n > 0 && enrol->starts.n != (size_t)enrol->leases.n * SH_WIRE_START_BYTES)
        return sh_fail(err, SH_ERR_INVALID,
                       "message enrol: field starts has %zu bytes, not %u for each of %u leases",
                       enrol->starts.n, SH_WIRE_START_BYTES, enrol->leases.n);
    return SH_OK;
}

#define WELCOME_FIELDS_2 2
static const wire_field welcome_fields[] = {
    MSG_FIELD(welcome, accepted, WIRE_BOOL),
    MSG_TEXT(welcome, text, 0),
    MSG_FIELD(welcome, renew, WIRE_BOOL),
    MSG_U64(welcome, retry_after_ms),
    MSG_U64(welcome, epoch),
    MSG_U32(welcome, common),
    MSG_U64(welcome, lease),
    MSG_RANGE(welcome, parted, WIRE_BYTES, 0, SH_WIRE_START_BYTES),
};

static sh_status check_welcome(const void *record, sh_error *err)
{
    const sh_msg_welcome *welcome = &((const sh_msg *)record)->welcome;
    if (welcome->parted.n > 0 && welcome->parted.n != SH_WIRE_START_BYTES)
        return sh_fail(err, SH_ERR_INVALID,
                       "message welcome: field parted has %zu bytes, must be none or %u",
                       welcome->parted.n, SH_WIRE_START_BYTES);
    return SH_OK;
}

#define CHECKIN_FIELDS_2 17
static const wire_field checkin_fields[] = {
    MSG_U64(checkin, epoch),
    MSG_U64(checkin, now_ms),
    MSG_U64(checkin, active_version),
    MSG_U64(checkin, confirmed_version),
    MSG_U64(checkin, installing_version),
    MSG_U32(checkin, training_round),
    MSG_U64(checkin, examples),
    MSG_U64(checkin, example_tokens),
    MSG_U64(checkin, outbox_items),
    MSG_U64(checkin, outbox_bytes),
    MSG_U64(checkin, dropped[SH_CLASS_UPDATE]),
    MSG_U64(checkin, dropped[SH_CLASS_ALARM]),
    MSG_U64(checkin, dropped[SH_CLASS_WINDOW]),
    MSG_U64(checkin, dropped[SH_CLASS_RECORD]),
    MSG_U64(checkin, inferences),
    MSG_U64(checkin, windows),
    MSG_FIELD(checkin, drifting, WIRE_BOOL),
    MSG_U64(checkin, disk_free),
    MSG_U64(checkin, store_bytes),
    MSG_U64(checkin, store_bytes_max),
    MSG_U64(checkin, refused_full),
    MSG_U32(checkin, stores_lost),
    MSG_RANGE(checkin, conditions, WIRE_U32, 0, SH_CONDITIONS_ALL),
    MSG_U64(checkin, bytes_up_day),
    MSG_U64(checkin, bytes_down_day),
    MSG_U32(checkin, nodes),
    MSG_U32(checkin, nodes_drifting),
};
_Static_assert(SH_CLASSES == 4, "a class more is a field more");

static const wire_field train_fields[] = {
    U32(sh_train_plan, round),
    U64(sh_train_plan, base_version),
    FIELD(sh_train_plan, base_sha256, WIRE_HASH),
    U64(sh_train_plan, a_seed),
    U32(sh_train_plan, rank),
    FIELD(sh_train_plan, alpha, WIRE_F32),
    FIELD(sh_train_plan, lr, WIRE_F32),
    FIELD(sh_train_plan, lr_final, WIRE_F32),
    FIELD(sh_train_plan, clip, WIRE_F32),
    U32(sh_train_plan, batch),
    U32(sh_train_plan, context),
    U32(sh_train_plan, passes_milli),
    U32(sh_train_plan, steps_max),
    U32(sh_train_plan, warmup),
    U32(sh_train_plan, tokens_min),
};
static const wire_schema train_schema = WIRE_SCHEMA("message plan.train", train_fields, NULL);

static const wire_field evaluate_fields[] = {
    RANGE(sh_evaluate_plan, candidate, WIRE_U64, 1, UINT64_MAX),
    U64(sh_evaluate_plan, parent_version),
    FIELD(sh_evaluate_plan, model, WIRE_BLOB),
};
static const wire_schema evaluate_schema =
    WIRE_SCHEMA("message plan.evaluate", evaluate_fields, NULL);

#define PLAN_FIELDS_1 3
#define PLAN_FIELDS_2 4
static const wire_field plan_fields[] = {
    MSG_U64(plan, return_after_ms),
    {NAMED("train", sh_msg, plan.train, WIRE_PLAN), .sub = &train_schema},
    MSG_RANGE(plan, manifest, WIRE_BYTES, 0, SH_WIRE_MANIFEST_MAX),
    {NAMED("evaluate", sh_msg, plan.evaluate, WIRE_EVALUATE), .sub = &evaluate_schema},
    MSG_RANGE(plan, time, WIRE_BYTES, 0, SH_WIRE_TIME_MAX),
};

#define ITEM_FIELDS(last_kind)                                                                     \
    MSG_U64(item, epoch), MSG_RANGE(item, cls, WIRE_U8, 0, SH_CLASSES - 1),                        \
        MSG_RANGE(item, seq, WIRE_U64, 1, UINT64_MAX),                                             \
        MSG_RANGE(item, kind, WIRE_U8, SH_ITEM_UPDATE, last_kind),                                 \
        MSG_RANGE(item, last_seq, WIRE_U64, 1, UINT64_MAX),                                        \
        MSG_RANGE(item, payload, WIRE_BYTES, 0, SH_WIRE_ITEM_MAX)
#define ITEM_FIELDS_2 6
static const wire_field item_fields[] = {ITEM_FIELDS(SH_ITEM_EVALUATION), MSG_U64(item, lease)};
static const wire_field item_fields_1[] = {ITEM_FIELDS(SH_ITEM_TOMBSTONE)};

static sh_status check_item(const void *record, sh_error *err)
{
    const sh_msg_item *item = &((const sh_msg *)record)->item;
    bool tombstone = item->kind == SH_ITEM_TOMBSTONE;
    if (item->last_seq < item->seq || (!tombstone && item->last_seq != item->seq))
        return sh_fail(err, SH_ERR_INVALID,
                       "message item: field last_seq is %llu, must be %s seq %llu",
                       (unsigned long long)item->last_seq, tombstone ? "at least" : "equal to",
                       (unsigned long long)item->seq);
    if (tombstone && item->payload.n > 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "message item: field payload has %zu bytes, a tombstone has none",
                       item->payload.n);
    return SH_OK;
}

#define ACK_FIELDS_2 4
static const wire_field ack_fields[] = {
    MSG_U64(ack, epoch),      MSG_RANGE(ack, cls, WIRE_U8, 0, SH_CLASSES - 1),
    MSG_U64(ack, high_water), MSG_FIELD(ack, bitmap, WIRE_BITMAP),
    MSG_U64(ack, lease),
};

static const wire_field want_fields[] = {
    {NAMED("chunk_hashes", sh_msg, want, WIRE_HASHES), .min = 1, .max = SH_WIRE_WANT_MAX},
};

static const wire_field chunk_fields[] = {
    MSG_FIELD(chunk, hash, WIRE_HASH),
    MSG_RANGE(chunk, bytes, WIRE_BYTES, 1, SH_CHUNK_BYTES),
};

static const wire_field error_fields[] = {
    MSG_TEXT(error, code, 0),
    MSG_TEXT(error, text, 1),
    MSG_U64(error, retry_after_ms),
};

static const wire_field rotate_fields[] = {
    MSG_FIELD(rotate, key, WIRE_HASH),
    MSG_RANGE(rotate, token, WIRE_BYTES, 0, SH_WIRE_TOKEN_MAX),
};

static const wire_schema messages[] = {
    [SH_MSG_ENROL] = WIRE_SCHEMA("message enrol", enrol_fields, check_enrol),
    [SH_MSG_WELCOME] = WIRE_SCHEMA("message welcome", welcome_fields, check_welcome),
    [SH_MSG_CHECKIN] = WIRE_SCHEMA("message checkin", checkin_fields, NULL),
    [SH_MSG_PLAN] = WIRE_SCHEMA("message plan", plan_fields, NULL),
    [SH_MSG_ITEM] = WIRE_SCHEMA("message item", item_fields, check_item),
    [SH_MSG_ACK] = WIRE_SCHEMA("message ack", ack_fields, NULL),
    [SH_MSG_WANT] = WIRE_SCHEMA("message want", want_fields, NULL),
    [SH_MSG_CHUNK] = WIRE_SCHEMA("message chunk", chunk_fields, NULL),
    [SH_MSG_ERROR] = WIRE_SCHEMA("message error", error_fields, NULL),
    [SH_MSG_ROTATE] = WIRE_SCHEMA("message rotate", rotate_fields, NULL),
};

/* What earlier versions had differently: fewer fields, fewer kinds of items. */
static const wire_schema plan_schema_1 = {"message plan", plan_fields, PLAN_FIELDS_1, NULL};
static const wire_schema item_schema_1 = WIRE_SCHEMA("message item", item_fields_1, check_item);
static const wire_schema messages_2[] = {
    [SH_MSG_ENROL] = {"message enrol", enrol_fields, ENROL_FIELDS_2, NULL},
    [SH_MSG_WELCOME] = {"message welcome", welcome_fields, WELCOME_FIELDS_2, NULL},
    [SH_MSG_CHECKIN] = {"message checkin", checkin_fields, CHECKIN_FIELDS_2, NULL},
    [SH_MSG_PLAN] = {"message plan", plan_fields, PLAN_FIELDS_2, NULL},
    [SH_MSG_ITEM] = {"message item", item_fields, ITEM_FIELDS_2, check_item},
    [SH_MSG_ACK] = {"message ack", ack_fields, ACK_FIELDS_2, NULL},
};

static sh_msg_type last_type(uint32_t version)
{
    return version < 3 ? SH_MSG_ERROR : SH_MSG_ROTATE;
}

static const wire_schema *schema_of(sh_msg_type type, uint32_t version)
{
    if (version == 1 && type == SH_MSG_PLAN)
        return &plan_schema_1;
    if (version == 1 && type == SH_MSG_ITEM)
        return &item_schema_1;
    if (version < 3 && type <= SH_MSG_ACK)
        return &messages_2[type];
    return &messages[type];
}

const char *sh_msg_type_name(sh_msg_type type)
{
    if (type < SH_MSG_ENROL || type > SH_MSG_ROTATE)
        return "unknown";
    return messages[type].name + strlen("message ");
}

void sh_start_put(uint8_t out[SH_WIRE_START_BYTES], const uint64_t next_seq[SH_CLASSES])
{
    for (int i = 0; i < SH_WIRE_START_BYTES; i++)
        out[i] = (uint8_t)(next_seq[i / 8] >> (56 - 8 * (i % 8)));
}

void sh_start_get(const uint8_t in[SH_WIRE_START_BYTES], uint64_t next_seq[SH_CLASSES])
{
    memset(next_seq, 0, SH_CLASSES * sizeof(next_seq[0]));
    for (int i = 0; i < SH_WIRE_START_BYTES; i++)
        next_seq[i / 8] = next_seq[i / 8] << 8 | in[i];
}

uint64_t sh_lease_name(const uint8_t lease[sizeof(sh_hash)])
{
    uint64_t name = 0;
    for (int i = 0; i < 8; i++)
        name = name << 8 | lease[i];
    return name != 0 ? name : 1;
}

/* ---- envelope ---- */

typedef struct {
    uint32_t version;
    uint8_t type;
    sh_bytes hash, body;
} envelope;

static const wire_field envelope_fields[] = {
    RANGE(envelope, version, WIRE_U32, SH_WIRE_VERSION_MIN, SH_WIRE_VERSION),
    RANGE(envelope, type, WIRE_U8, SH_MSG_ENROL, SH_MSG_ROTATE),
    RANGE(envelope, hash, WIRE_BYTES, HASH_BYTES, HASH_BYTES),
    RANGE(envelope, body, WIRE_BYTES, 0, BODY_MAX),
};
static const wire_schema envelope_schema = WIRE_SCHEMA("message", envelope_fields, NULL);

sh_status sh_msg_encode(const sh_msg *msg, sh_buf *out, sh_error *err)
{
    uint32_t version = msg->version != 0 ? msg->version : SH_WIRE_VERSION;
    SH_ASSERT(version >= SH_WIRE_VERSION_MIN && version <= SH_WIRE_VERSION);
    SH_ASSERT(msg->type >= SH_MSG_ENROL && msg->type <= last_type(version));
    sh_buf body;
    sh_buf_init(&body, BODY_MAX);
    sh_status status;
    SH_GOTO(sh_wire_encode(schema_of(msg->type, version), msg, &body, err));
    sh_hash hash = sh_blake2b(body.data, body.len);
    envelope e = {version, (uint8_t)msg->type, {hash.b, HASH_BYTES}, {body.data, body.len}};
    status = sh_wire_encode(&envelope_schema, &e, out, err);
cleanup:
    sh_buf_release(&body);
    return status;
}

/* See sh_msg_check. */
static sh_status check_hashes(const envelope *e, sh_msg_check check, sh_msg *msg, sh_error *err)
{
    bool named = msg->type == SH_MSG_CHUNK && check != SH_CHECK_ENVELOPE;
    if (named)
        msg->chunk.checked = true;
    if (check == SH_CHECK_DONE)
        return SH_OK;
    sh_hash hash = named ? sh_blake2b(msg->chunk.bytes.data, msg->chunk.bytes.n)
                         : sh_blake2b(e->body.data, e->body.n);
    if (named && !sh_hash_equal(&hash, &msg->chunk.hash))
        return sh_fail(err, SH_ERR_CORRUPT, "chunk: its bytes do not match its hash");
    if (!named && memcmp(hash.b, e->hash.data, HASH_BYTES) != 0)
        return sh_fail(err, SH_ERR_CORRUPT, "%s: the body's hash is not the one in the envelope",
                       messages[e->type].name);
    return SH_OK;
}

sh_status sh_msg_decode(const void *bytes, size_t n, sh_msg *out, sh_error *err)
{
    return sh_msg_decode_checked(bytes, n, SH_CHECK_ENVELOPE, out, err);
}

sh_status sh_msg_decode_checked(const void *bytes, size_t n, sh_msg_check check, sh_msg *out,
                                sh_error *err)
{
    if (n > SH_WIRE_MESSAGE_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "message: %zu bytes, at most %u", n, SH_WIRE_MESSAGE_MAX);
    /* First of all the version: another one may have another envelope. */
    uint64_t version = 0;
    SH_TRY(sh_wire_peek_number("message", bytes, n, &version, err));
    if (version < SH_WIRE_VERSION_MIN || version > SH_WIRE_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "message: protocol version %llu is not known here, only %d to %d",
                       (unsigned long long)version, SH_WIRE_VERSION_MIN, SH_WIRE_VERSION);
    envelope e;
    SH_TRY(sh_wire_decode(&envelope_schema, bytes, n, &e, err));
    if (e.type > last_type(e.version))
        return sh_fail(err, SH_ERR_LIMIT, "message: field type is %u, version %u ends at %d",
                       e.type, e.version, (int)last_type(e.version));
    sh_msg msg = {.version = e.version, .type = e.type};
    if (e.type != SH_MSG_CHUNK)
        SH_TRY(check_hashes(&e, check, &msg, err));
    SH_TRY(sh_wire_decode(schema_of(msg.type, e.version), e.body.data, e.body.n, &msg, err));
    if (e.type == SH_MSG_CHUNK)
        SH_TRY(check_hashes(&e, check, &msg, err));
    *out = msg;
    sh_wire_rebase_texts(&messages[e.type], out);
    return SH_OK;
}

/* ---- payloads ---- */

#define UPDATE_FIELDS                                                                              \
    FIELD(sh_update_meta, blob, WIRE_BLOB), U32(sh_update_meta, round),                            \
        U64(sh_update_meta, base_version), FIELD(sh_update_meta, base_sha256, WIRE_HASH),          \
        U64(sh_update_meta, a_seed), U32(sh_update_meta, rank),                                    \
        FIELD(sh_update_meta, alpha, WIRE_F32), U64(sh_update_meta, samples),                      \
        U64(sh_update_meta, tokens_seen), FIELD(sh_update_meta, heldout_before, WIRE_F64),         \
        FIELD(sh_update_meta, heldout_after, WIRE_F64)
static const wire_field update_fields[] = {VERSION_FIELD, UPDATE_FIELDS};
static const wire_field relayed_fields[] = {
    {.name = "payload version", .kind = WIRE_CONST, .min = RELAYED_VERSION},
    UPDATE_FIELDS,
    RANGE(sh_update_meta, parts, WIRE_BYTES, SH_UPDATE_PART_BYTES,
          SH_UPDATE_PARTS_MAX *SH_UPDATE_PART_BYTES),
};

void sh_update_part_put(uint8_t out[SH_UPDATE_PART_BYTES], const sh_update_part *part)
{
    const uint64_t numbers[] = {part->epoch, part->seq, part->samples};
    memcpy(out, part->node.b, sizeof part->node.b);
    for (size_t i = 0; i < SH_COUNT(numbers) * 8; i++)
        out[32 + i] = (uint8_t)(numbers[i / 8] >> (56 - 8 * (i % 8)));
}

sh_update_part sh_update_part_get(const uint8_t in[SH_UPDATE_PART_BYTES])
{
    sh_update_part part;
    uint64_t numbers[3] = {0};
    memcpy(part.node.b, in, sizeof part.node.b);
    for (size_t i = 0; i < SH_COUNT(numbers) * 8; i++)
        numbers[i / 8] = numbers[i / 8] << 8 | in[32 + i];
    part.epoch = numbers[0];
    part.seq = numbers[1];
    part.samples = numbers[2];
    return part;
}

static sh_status check_relayed(const void *record, sh_error *err)
{
    const sh_update_meta *meta = record;
    const uint8_t *parts = meta->parts.data;
    uint64_t samples = 0;
    if (meta->parts.n % SH_UPDATE_PART_BYTES != 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "payload update: field parts has %zu bytes, must be a multiple of %u",
                       meta->parts.n, SH_UPDATE_PART_BYTES);
    for (size_t at = 0; at < meta->parts.n; at += SH_UPDATE_PART_BYTES) {
        sh_update_part part = sh_update_part_get(parts + at);
        if (part.seq == 0 || part.samples == 0 || samples + part.samples < samples)
            return sh_fail(err, SH_ERR_INVALID,
                           "payload update: field parts has a part without sequence or samples");
        if (at > 0 && memcmp(parts + at - SH_UPDATE_PART_BYTES, parts + at, PART_ID_BYTES) >= 0)
            return sh_fail(err, SH_ERR_INVALID, "payload update: field parts is not sorted");
        samples += part.samples;
    }
    if (samples != meta->samples)
        return sh_fail(err, SH_ERR_INVALID,
                       "payload update: field samples is %llu, its parts have %llu",
                       (unsigned long long)meta->samples, (unsigned long long)samples);
    return SH_OK;
}

static const wire_schema update_schema = WIRE_SCHEMA("payload update", update_fields, NULL);
static const wire_schema relayed_schema =
    WIRE_SCHEMA("payload update", relayed_fields, check_relayed);

sh_status sh_update_meta_encode(const sh_update_meta *meta, sh_buf *out, sh_error *err)
{
    return sh_wire_encode(meta->parts.n > 0 ? &relayed_schema : &update_schema, meta, out, err);
}

sh_status sh_update_meta_decode(const void *bytes, size_t n, sh_update_meta *out, sh_error *err)
{
    sh_update_meta meta = {0};
    uint64_t version = 0;
    SH_TRY(sh_wire_peek_number("payload update", bytes, n, &version, err));
    SH_TRY(sh_wire_decode(version == RELAYED_VERSION ? &relayed_schema : &update_schema, bytes, n,
                          &meta, err));
    *out = meta;
    return SH_OK;
}

static const wire_field alarm_fields[] = {
    VERSION_FIELD,
    U64(sh_alarm, window),
    U64(sh_alarm, release_version),
    U64(sh_alarm, inferences),
    U32(sh_alarm, metric),
    FIELD(sh_alarm, log_evalue, WIRE_F64),
    FIELD(sh_alarm, effect, WIRE_F64),
    U64(sh_alarm, at_ms),
};
static const wire_schema alarm_schema = WIRE_SCHEMA("payload alarm", alarm_fields, NULL);

sh_status sh_alarm_encode(const sh_alarm *alarm, sh_buf *out, sh_error *err)
{
    return sh_wire_encode(&alarm_schema, alarm, out, err);
}

sh_status sh_alarm_decode(const void *bytes, size_t n, sh_alarm *out, sh_error *err)
{
    sh_alarm alarm = {0};
    SH_TRY(sh_wire_decode(&alarm_schema, bytes, n, &alarm, err));
    *out = alarm;
    return SH_OK;
}

static const wire_field slice_fields[] = {
    RANGE(sh_slice_score, slice, WIRE_U32, 0, SH_SLICES - 1),
    U64(sh_slice_score, tokens),
    FIELD(sh_slice_score, nll_parent, WIRE_F64),
    FIELD(sh_slice_score, nll_candidate, WIRE_F64),
};
static const wire_schema slice_schema = WIRE_SCHEMA("payload evaluation.slice", slice_fields, NULL);

static const wire_field evaluation_fields[] = {
    VERSION_FIELD,
    RANGE(sh_evaluation, candidate, WIRE_U64, 1, UINT64_MAX),
    U64(sh_evaluation, parent_version),
    FIELD(sh_evaluation, candidate_sha256, WIRE_HASH),
    {NAMED("slices", sh_evaluation, slices, WIRE_LIST), .max = SH_EVALUATION_SLICES_MAX,
     .storage = offsetof(sh_evaluation, n), .sub = &slice_schema, .size = sizeof(sh_slice_score)},
};

static sh_status check_evaluation(const void *record, sh_error *err)
{
    const sh_evaluation *evaluation = record;
    for (uint32_t i = 1; i < SH_MIN(evaluation->n, (uint32_t)SH_EVALUATION_SLICES_MAX); i++)
        if (evaluation->slices[i].slice <= evaluation->slices[i - 1].slice)
            return sh_fail(err, SH_ERR_INVALID,
                           "payload evaluation: field slices has slice %u after %u, must grow",
                           evaluation->slices[i].slice, evaluation->slices[i - 1].slice);
    return SH_OK;
}

static const wire_schema evaluation_schema =
    WIRE_SCHEMA("payload evaluation", evaluation_fields, check_evaluation);

sh_status sh_evaluation_encode(const sh_evaluation *evaluation, sh_buf *out, sh_error *err)
{
    return sh_wire_encode(&evaluation_schema, evaluation, out, err);
}

sh_status sh_evaluation_decode(const void *bytes, size_t n, sh_evaluation *out, sh_error *err)
{
    sh_evaluation evaluation = {0};
    SH_TRY(sh_wire_decode(&evaluation_schema, bytes, n, &evaluation, err));
    *out = evaluation;
    return SH_OK;
}

static const wire_field manifest_fields[] = {
    {.name = "shoal-manifest", .kind = WIRE_MAGIC}, /* no other signed bytes begin with it */
    VERSION_FIELD,
    RANGE(sh_manifest, version, WIRE_U64, 1, UINT64_MAX),
    U64(sh_manifest, parent),
    U64(sh_manifest, created_ms),
    FIELD(sh_manifest, model, WIRE_BLOB),
    {NAMED("format", sh_manifest, format, WIRE_TEXT), .min = 1, .max = SH_WIRE_FORMAT_MAX,
     .storage = offsetof(sh_manifest, format_text)},
    FIELD(sh_manifest, suite_sha256, WIRE_HASH),
    FIELD(sh_manifest, gate_loss_parent, WIRE_F64),
    FIELD(sh_manifest, gate_loss, WIRE_F64),
    U32(sh_manifest, updates_merged),
};

static sh_status check_manifest(const void *record, sh_error *err)
{
    const sh_manifest *manifest = record;
    if (manifest->parent < manifest->version)
        return SH_OK;
    return sh_fail(err, SH_ERR_INVALID,
                   "manifest: field parent is %llu, must be below version %llu",
                   (unsigned long long)manifest->parent, (unsigned long long)manifest->version);
}

static const wire_schema manifest_schema = WIRE_SCHEMA("manifest", manifest_fields, check_manifest);

/* What is signed: the record's bytes, then the signature over them. */
static sh_status sign_record(const wire_schema *schema, const void *record,
                             const sh_sign_secret_key *sk, sh_buf *out, sh_error *err)
{
    size_t start = out->len;
    SH_TRY(sh_wire_encode(schema, record, out, err));
    sh_signature sig = sh_sign(out->data + start, out->len - start, sk);
    sh_status status = sh_buf_append(out, sig.b, sizeof(sig.b));
    if (status != SH_OK) {
        out->len = start;
        return sh_fail(err, status, "%s: no room in its buffer of at most %zu bytes", schema->name,
                       out->max);
    }
    return SH_OK;
}

static sh_status check_signed_size(const wire_schema *schema, sh_bytes bytes, size_t max,
                                   sh_error *err)
{
    if (bytes.n > max)
        return sh_fail(err, SH_ERR_LIMIT, "%s: %zu bytes, at most %zu", schema->name, bytes.n, max);
    if (bytes.n <= sizeof(sh_signature))
        return sh_fail(err, SH_ERR_INVALID, "%s: %zu bytes are too few for a signature",
                       schema->name, bytes.n);
    return SH_OK;
}

/* Nothing is read before the signature holds. */
static sh_status verify_record(const wire_schema *schema, sh_bytes bytes, size_t max,
                               const sh_sign_public_key *pk, void *record, sh_error *err)
{
    sh_signature sig;
    SH_TRY(check_signed_size(schema, bytes, max, err));
    size_t signed_n = bytes.n - sizeof(sig.b);
    memcpy(sig.b, (const uint8_t *)bytes.data + signed_n, sizeof(sig.b));
    sh_status status = sh_sign_verify(bytes.data, signed_n, &sig, pk, err);
    if (status != SH_OK) {
        (void)sh_fail_in(err, "%s", schema->name);
        return status;
    }
    return sh_wire_decode(schema, bytes.data, signed_n, record, err);
}

sh_status sh_manifest_sign(const sh_manifest *manifest, const sh_sign_secret_key *sk, sh_buf *out,
                           sh_error *err)
{
    return sign_record(&manifest_schema, manifest, sk, out, err);
}

sh_status sh_manifest_verify(const void *bytes, size_t n, const sh_sign_public_key *pk,
                             sh_manifest *out, sh_error *err)
{
    sh_manifest manifest = {0};
    SH_TRY(verify_record(&manifest_schema, (sh_bytes){bytes, n}, SH_WIRE_MANIFEST_MAX, pk,
                         &manifest, err));
    *out = manifest;
    sh_wire_rebase_texts(&manifest_schema, out);
    return SH_OK;
}

sh_status sh_manifest_decode(const void *bytes, size_t n, sh_manifest *out, sh_error *err)
{
    sh_manifest manifest = {0};
    SH_TRY(check_signed_size(&manifest_schema, (sh_bytes){bytes, n}, SH_WIRE_MANIFEST_MAX, err));
    SH_TRY(sh_wire_decode(&manifest_schema, bytes, n - sizeof(sh_signature), &manifest, err));
    *out = manifest;
    sh_wire_rebase_texts(&manifest_schema, out);
    return SH_OK;
}

/* ---- time ---- */

typedef struct {
    uint64_t now_ms;
} time_stamp;
static const wire_field time_fields[] = {
    {.name = "shoal-time", .kind = WIRE_MAGIC},
    VERSION_FIELD,
    U64(time_stamp, now_ms),
};
static const wire_schema time_schema = WIRE_SCHEMA("signed time", time_fields, NULL);

sh_status sh_time_sign(uint64_t now_ms, const sh_sign_secret_key *sk, sh_buf *out, sh_error *err)
{
    time_stamp stamp = {now_ms};
    return sign_record(&time_schema, &stamp, sk, out, err);
}

sh_status sh_time_verify(sh_bytes stamp, const sh_sign_public_key *pk, uint64_t *now_ms,
                         sh_error *err)
{
    time_stamp got = {0};
    SH_TRY(verify_record(&time_schema, stamp, SH_WIRE_TIME_MAX, pk, &got, err));
    *now_ms = got.now_ms;
    return SH_OK;
}

sh_status sh_time_peek(sh_bytes stamp, uint64_t *now_ms, sh_error *err)
{
    time_stamp got = {0};
    if (stamp.n <= sizeof(sh_signature) || stamp.n > SH_WIRE_TIME_MAX)
        return sh_fail(err, SH_ERR_INVALID, "signed time: %zu bytes", stamp.n);
    SH_TRY(sh_wire_decode(&time_schema, stamp.data, stamp.n - sizeof(sh_signature), &got, err));
    *now_ms = got.now_ms;
    return SH_OK;
}

sh_status sh_blob_describe(const void *bytes, size_t n, sh_blob *out, uint8_t **chunk_hashes,
                           sh_error *err)
{
    size_t chunks = n / SH_CHUNK_BYTES + (n % SH_CHUNK_BYTES != 0);
    if (chunks > SH_BLOB_CHUNKS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "blob: %zu bytes, at most %llu", n,
                       (unsigned long long)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES);
    uint8_t *hashes = sh_calloc(chunks, sizeof(sh_hash));
    if (!hashes)
        return sh_fail(err, SH_ERR_NO_MEMORY, "blob: no memory for %zu chunk hashes", chunks);
    for (size_t i = 0; i < chunks; i++) {
        size_t from = i * SH_CHUNK_BYTES;
        sh_hash hash =
            sh_blake2b((const uint8_t *)bytes + from, SH_MIN(n - from, (size_t)SH_CHUNK_BYTES));
        memcpy(hashes + i * sizeof(hash), hash.b, sizeof(hash));
    }
    *out = (sh_blob){sh_sha256(bytes, n), n, (uint32_t)chunks, hashes};
    *chunk_hashes = hashes;
    return SH_OK;
}
