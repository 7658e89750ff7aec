#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "tests/wire/sample.h"

#define ROUNDS 150

static sample s; /* large: not on a stack */

static sh_buf encoded(const sh_msg *msg)
{
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_MESSAGE_MAX);
    sh_error err = {0};
    if (sh_msg_encode(msg, &out, &err) != SH_OK)
        fail_msg("encode %s: %s", sh_msg_type_name(msg->type), err.text);
    return out;
}

static void assert_bytes(sh_bytes got, sh_bytes want)
{
    assert_int_equal(got.n, want.n);
    if (want.n)
        assert_memory_equal(got.data, want.data, want.n);
}

static void assert_checkin(const sh_msg_checkin *a, const sh_msg_checkin *b)
{
    assert_int_equal(a->epoch, b->epoch);
    assert_int_equal(a->now_ms, b->now_ms);
    assert_int_equal(a->active_version, b->active_version);
    assert_int_equal(a->confirmed_version, b->confirmed_version);
    assert_int_equal(a->installing_version, b->installing_version);
    assert_int_equal(a->training_round, b->training_round);
    assert_int_equal(a->examples, b->examples);
    assert_int_equal(a->example_tokens, b->example_tokens);
    assert_int_equal(a->outbox_items, b->outbox_items);
    assert_int_equal(a->outbox_bytes, b->outbox_bytes);
    assert_memory_equal(a->dropped, b->dropped, sizeof(a->dropped));
    assert_int_equal(a->inferences, b->inferences);
    assert_int_equal(a->windows, b->windows);
    assert_int_equal(a->drifting, b->drifting);
}

static void assert_plan(const sh_train_plan *a, const sh_train_plan *b)
{
    assert_int_equal(a->train, b->train);
    assert_int_equal(a->round, b->round);
    assert_int_equal(a->base_version, b->base_version);
    assert_memory_equal(&a->base_sha256, &b->base_sha256, sizeof(sh_hash));
    assert_int_equal(a->a_seed, b->a_seed);
    assert_int_equal(a->rank, b->rank);
    assert_memory_equal(&a->alpha, &b->alpha, sizeof(float));
    assert_memory_equal(&a->lr, &b->lr, sizeof(float));
    assert_memory_equal(&a->lr_final, &b->lr_final, sizeof(float));
    assert_memory_equal(&a->clip, &b->clip, sizeof(float));
    assert_int_equal(a->batch, b->batch);
    assert_int_equal(a->context, b->context);
    assert_int_equal(a->passes_milli, b->passes_milli);
    assert_int_equal(a->steps_max, b->steps_max);
    assert_int_equal(a->warmup, b->warmup);
    assert_int_equal(a->tokens_min, b->tokens_min);
}

static void assert_blob(const sh_blob *a, const sh_blob *b)
{
    assert_memory_equal(&a->sha256, &b->sha256, sizeof(sh_hash));
    assert_int_equal(a->bytes, b->bytes);
    assert_int_equal(a->n_chunks, b->n_chunks);
    if (b->n_chunks)
        assert_memory_equal(a->chunk_hashes, b->chunk_hashes, (size_t)b->n_chunks * 32);
}

static void assert_msg(const sh_msg *a, const sh_msg *b)
{
    assert_int_equal(a->version, b->version ? b->version : SH_WIRE_VERSION);
    assert_int_equal(a->type, b->type);
    switch (b->type) {
    case SH_MSG_ENROL:
        assert_int_equal(a->enrol.epoch, b->enrol.epoch);
        assert_string_equal(a->enrol.agent, b->enrol.agent);
        assert_string_equal(a->enrol.kernel, b->enrol.kernel);
        assert_int_equal(a->enrol.cores, b->enrol.cores);
        assert_int_equal(a->enrol.memory_bytes, b->enrol.memory_bytes);
        break;
    case SH_MSG_WELCOME:
        assert_int_equal(a->welcome.accepted, b->welcome.accepted);
        assert_string_equal(a->welcome.text, b->welcome.text);
        break;
    case SH_MSG_CHECKIN:
        assert_checkin(&a->checkin, &b->checkin);
        break;
    case SH_MSG_PLAN:
        assert_int_equal(a->plan.return_after_ms, b->plan.return_after_ms);
        assert_plan(&a->plan.train, &b->plan.train);
        assert_bytes(a->plan.manifest, b->plan.manifest);
        assert_int_equal(a->plan.evaluate.candidate, b->plan.evaluate.candidate);
        assert_int_equal(a->plan.evaluate.parent_version, b->plan.evaluate.parent_version);
        assert_blob(&a->plan.evaluate.model, &b->plan.evaluate.model);
        break;
    case SH_MSG_ITEM:
        assert_int_equal(a->item.epoch, b->item.epoch);
        assert_int_equal(a->item.cls, b->item.cls);
        assert_int_equal(a->item.seq, b->item.seq);
        assert_int_equal(a->item.kind, b->item.kind);
        assert_int_equal(a->item.last_seq, b->item.last_seq);
        assert_bytes(a->item.payload, b->item.payload);
        break;
    case SH_MSG_ACK:
        assert_int_equal(a->ack.epoch, b->ack.epoch);
        assert_int_equal(a->ack.cls, b->ack.cls);
        assert_int_equal(a->ack.high_water, b->ack.high_water);
        assert_memory_equal(a->ack.bitmap, b->ack.bitmap, sizeof(a->ack.bitmap));
        break;
    case SH_MSG_WANT:
        assert_int_equal(a->want.n, b->want.n);
        assert_memory_equal(a->want.hashes, b->want.hashes, (size_t)b->want.n * 32);
        break;
    case SH_MSG_CHUNK:
        assert_memory_equal(&a->chunk.hash, &b->chunk.hash, sizeof(sh_hash));
        assert_bytes(a->chunk.bytes, b->chunk.bytes);
        break;
    case SH_MSG_ERROR:
        assert_string_equal(a->error.code, b->error.code);
        assert_string_equal(a->error.text, b->error.text);
        assert_int_equal(a->error.retry_after_ms, b->error.retry_after_ms);
        break;
    case SH_MSG_ROTATE:
        assert_memory_equal(&a->rotate.key, &b->rotate.key, sizeof(sh_hash));
        assert_bytes(a->rotate.token, b->rotate.token);
        break;
    }
}

/* Decoding must fail, say why and leave its out-parameter alone. */
static sh_status assert_refused(const void *bytes, size_t n, sh_error *err)
{
    static sh_msg out, before;
    memset(&out, 0xa5, sizeof(out));
    memset(&before, 0xa5, sizeof(before));
    *err = (sh_error){0};
    sh_status status = sh_msg_decode(bytes, n, &out, err);
    if (status == SH_OK)
        fail_msg("accepted %zu bytes that are no message", n);
    assert_int_equal(err->code, status);
    assert_true(err->text[0] != 0);
    assert_memory_equal(&out, &before, sizeof(out));
    return status;
}

static void test_round_trip(void **state)
{
    (void)state;
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (uint64_t seed = 0; seed < ROUNDS; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 1);
            sample_msg(&rng, (sh_msg_type)type, seed % 16 ? 1000 : SIZE_MAX, &s);
            if (seed % 3 > 0)
                sample_msg_2(&rng, &s);
            sh_buf bytes = encoded(&s.msg);
            sh_msg got;
            sh_error err = {0};
            if (sh_msg_decode(bytes.data, bytes.len, &got, &err) != SH_OK)
                fail_msg("type %d seed %d: %s", type, (int)seed, err.text);
            assert_msg(&got, &s.msg);
            sh_buf again = encoded(&got);
            assert_int_equal(again.len, bytes.len);
            assert_memory_equal(again.data, bytes.data, bytes.len);
            sh_buf_release(&again);
            sh_buf_release(&bytes);
        }
}

/* Whole bytes of docs/protocol.md's example, and other bodies, so that both ends changing together
 * is noticed. */
static void test_pinned_bytes(void **state)
{
    (void)state;
    sh_msg ack = {.type = SH_MSG_ACK,
                  .ack = {.epoch = 0x1122334455667788,
                          .cls = SH_CLASS_WINDOW,
                          .high_water = 300,
                          .bitmap = {0x0101, 0}}};
    static const uint8_t ack_body[] = {0x94, 0xcf, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
                                       0x88, 0x02, 0xcd, 0x01, 0x2c, 0xc4, 0x02, 0x01, 0x01};
    sh_msg plan = {.type = SH_MSG_PLAN,
                   .plan = {.return_after_ms = 60000, .manifest = {"\xde\xad", 2}}};
    static const uint8_t plan_body[] = {0x94, 0xcd, 0xea, 0x60, 0xc0, 0xc4, 0x02, 0xde, 0xad, 0xc0};
    sh_msg plan_1 = plan; /* in version 1, and what that has not is left out */
    plan_1.version = 1;
    plan_1.plan.evaluate = (sh_evaluate_plan){.candidate = 7};
    static const uint8_t plan_1_body[] = {0x93, 0xcd, 0xea, 0x60, 0xc0, 0xc4, 0x02, 0xde, 0xad};
    sh_msg item = {
        .type = SH_MSG_ITEM,
        .item = {.epoch = 5, .cls = 0, .seq = 1, .kind = 1, .last_seq = 1, .payload = {"xyz", 3}}};
    static const uint8_t item_body[] = {0x96, 5, 0, 1, 1, 1, 0xc4, 3, 'x', 'y', 'z'};
    sh_msg error = {.type = SH_MSG_ERROR,
                    .error = {.code = "limit", .text = "", .retry_after_ms = 200}};
    static const uint8_t error_body[] = {0x93, 0xa5, 'l', 'i', 'm', 'i', 't', 0xa0, 0xcc, 200};
    const struct {
        const sh_msg *msg;
        const uint8_t *body;
        size_t n;
    } cases[] = {
        {&ack, ack_body, sizeof(ack_body)},          {&plan, plan_body, sizeof(plan_body)},
        {&plan_1, plan_1_body, sizeof(plan_1_body)}, {&item, item_body, sizeof(item_body)},
        {&error, error_body, sizeof(error_body)},
    };
    static const uint8_t example[] = {0x94, 0x02, 0x04, 0xc4, 0x10, 0x27, 0x06, 0x2b, 0x5b,
                                      0x53, 0xa2, 0xd1, 0xe0, 0x1a, 0x79, 0x24, 0xd5, 0x2a,
                                      0xcb, 0xcf, 0xcf, 0xc4, 0x0a, 0x94, 0xcd, 0xea, 0x60,
                                      0xc0, 0xc4, 0x02, 0xde, 0xad, 0xc0};
    sh_buf whole = encoded(&plan);
    assert_int_equal(whole.len, sizeof(example));
    assert_memory_equal(whole.data, example, sizeof(example));
    sh_buf_release(&whole);
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_buf got = encoded(cases[i].msg), want;
        sh_buf_init(&want, 1000);
        sample_wrap(cases[i].msg->version ? 1 : 2, (uint8_t)cases[i].msg->type, cases[i].body,
                    cases[i].n, &want);
        assert_int_equal(got.len, want.len);
        assert_memory_equal(got.data, want.data, want.len);
        sh_buf_release(&got);
        sh_buf_release(&want);
    }
}

/* Any prefix, and any flip of a bit, of any message. */
static void test_truncated_and_flipped(void **state)
{
    (void)state;
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (uint64_t seed = 0; seed < 4; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 2);
            sample_msg(&rng, (sh_msg_type)type, 300, &s);
            if (seed % 2)
                sample_msg_2(&rng, &s);
            sh_buf bytes = encoded(&s.msg);
            sh_error err;
            for (size_t n = 0; n < bytes.len; n++)
                (void)assert_refused(bytes.data, n, &err);
            for (size_t i = 0; i < bytes.len; i++)
                for (int bit = 0; bit < 8; bit++) {
                    bytes.data[i] ^= (uint8_t)(1 << bit);
                    (void)assert_refused(bytes.data, bytes.len, &err);
                    bytes.data[i] ^= (uint8_t)(1 << bit);
                }
            sh_buf_release(&bytes);
        }
}

/* Broken bodies behind a right hash: refused, or a message that encodes to the same bytes. */
static void test_mutated_bodies(void **state)
{
    (void)state;
    unsigned refused = 0, accepted = 0;
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (uint64_t seed = 0; seed < 400; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 3);
            sample_msg(&rng, (sh_msg_type)type, 200, &s);
            if (seed % 2)
                sample_msg_2(&rng, &s);
            sh_buf bytes = encoded(&s.msg), wrapped;
            size_t head = bytes.len - 23 > 0xff ? 24 : 23; /* samples are below 64 KiB */
            uint8_t *body = bytes.data + head;
            size_t n = bytes.len - head;
            for (uint64_t k = 1 + sh_rng_below(&rng, 3); k > 0; k--)
                body[sh_rng_below(&rng, n)] = (uint8_t)sh_rng_u32(&rng);
            n -= sh_rng_below(&rng, 4) ? 0 : sh_rng_below(&rng, n);
            sh_buf_init(&wrapped, SH_WIRE_MESSAGE_MAX);
            sample_wrap(1 + seed % 2, (uint8_t)type, body, n, &wrapped);
            sh_msg got;
            if (sh_msg_decode(wrapped.data, wrapped.len, &got, NULL) == SH_OK) {
                sh_buf again = encoded(&got);
                assert_int_equal(again.len, wrapped.len);
                assert_memory_equal(again.data, wrapped.data, wrapped.len);
                sh_buf_release(&again);
                accepted++;
            } else {
                refused++;
            }
            sh_buf_release(&wrapped);
            sh_buf_release(&bytes);
        }
    print_message("mutated bodies: %u refused, %u still messages\n", refused, accepted);
    assert_true(refused > 0);
    assert_true(accepted > 0);
}

static void assert_body(sh_msg_type type, const char *body, size_t n, sh_status want,
                        const char *word)
{
    sh_buf bytes;
    sh_buf_init(&bytes, 2 * SH_WIRE_MESSAGE_MAX);
    sample_wrap(1, (uint8_t)type, body, n, &bytes);
    sh_error err;
    sh_status got = assert_refused(bytes.data, bytes.len, &err);
    if (got != want || !strstr(err.text, word) || !strstr(err.text, sh_msg_type_name(type)))
        fail_msg("body of %s: got %s '%s', want %s with '%s' in it", sh_msg_type_name(type),
                 sh_status_name(got), err.text, sh_status_name(want), word);
    sh_buf_release(&bytes);
}
#define BODY(type, literal, want, word) assert_body(type, literal, sizeof(literal) - 1, want, word)

static void test_hostile_bodies(void **state)
{
    (void)state;
    /* Five bytes that claim four thousand million elements, as an array, a bin, a string. */
    BODY(SH_MSG_ACK, "\xdd\xff\xff\xff\xff", SH_ERR_INVALID, "array");
    BODY(SH_MSG_ACK, "\xdc\xff\xff", SH_ERR_INVALID, "65535");
    BODY(SH_MSG_PLAN, "\x93\x01\xc0\xc6\xff\xff\xff\xff", SH_ERR_INVALID, "manifest");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xdb\xff\xff\xff\xff", SH_ERR_INVALID, "text");
    /* Types that are not the field's, and numbers longer than they need to be. */
    BODY(SH_MSG_ACK, "\x94\xd0\x05\x00\x00\xc4\x00", SH_ERR_INVALID, "epoch");
    BODY(SH_MSG_ACK, "\x94\xff\x00\x00\xc4\x00", SH_ERR_INVALID, "unsigned");
    BODY(SH_MSG_ACK, "\x94\xca\x00\x00\x00\x00\x00\x00\xc4\x00", SH_ERR_INVALID, "epoch");
    BODY(SH_MSG_ACK, "\x94\xcc\x05\x00\x00\xc4\x00", SH_ERR_INVALID, "shortest");
    BODY(SH_MSG_ACK, "\x94\xcf\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\xc4\x00", SH_ERR_INVALID,
         "shortest");
    BODY(SH_MSG_ACK, "\x94\x05\x00\x00\xc5\x00\x01\x01", SH_ERR_INVALID, "shortest");
    BODY(SH_MSG_ACK, "\x84\x05\x00\x00\xc4\x00", SH_ERR_INVALID, "array");
    BODY(SH_MSG_WELCOME, "\x92\x01\xa0", SH_ERR_INVALID, "true or false");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xc4\x00", SH_ERR_INVALID, "string");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xd9\x01z", SH_ERR_INVALID, "shortest");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xc0", SH_ERR_INVALID, "string");
    /* Too few, too many, more after the end. */
    BODY(SH_MSG_WELCOME, "", SH_ERR_INVALID, "end");
    BODY(SH_MSG_WELCOME, "\x91\xc3", SH_ERR_INVALID, "1 fields");
    BODY(SH_MSG_WELCOME, "\x93\xc3\xa0\x00", SH_ERR_INVALID, "3 fields");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa0\x00", SH_ERR_INVALID, "after its end");
    /* Out of range. */
    BODY(SH_MSG_ACK, "\x94\x05\x04\x00\xc4\x00", SH_ERR_LIMIT, "cls");
    BODY(SH_MSG_ACK, "\x94\x05\x00\x00\xc4\x02\x01\x00", SH_ERR_INVALID, "bitmap");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x00\x01\x01\xc4\x00", SH_ERR_INVALID, "seq");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x01\x00\x01\xc4\x00", SH_ERR_INVALID, "kind");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x01\x05\x01\xc4\x00", SH_ERR_LIMIT, "kind");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x02\x01\x03\xc4\x00", SH_ERR_INVALID, "last_seq");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x02\x04\x01\xc4\x00", SH_ERR_INVALID, "last_seq");
    BODY(SH_MSG_ITEM, "\x96\x05\x00\x02\x04\x03\xc4\x01z", SH_ERR_INVALID, "tombstone");
    BODY(SH_MSG_WANT, "\x91\xc4\x00", SH_ERR_INVALID, "chunk_hashes");
    BODY(SH_MSG_WANT, "\x91\xc4\x03xyz", SH_ERR_INVALID, "32-byte");
    /* Texts: broken, overlong and surrogate UTF-8, controls, zero bytes. */
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa1\xff", SH_ERR_INVALID, "UTF-8");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa2\xc0\xaf", SH_ERR_INVALID, "UTF-8");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa3\xed\xa0\x80", SH_ERR_INVALID, "UTF-8");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa4\xf4\x90\x80\x80", SH_ERR_INVALID, "UTF-8");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa2\xe6\xbc", SH_ERR_INVALID, "UTF-8");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa1\x1b", SH_ERR_INVALID, "control");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa2\xc2\x9b", SH_ERR_INVALID, "control");
    BODY(SH_MSG_WELCOME, "\x92\xc3\xa1\x00", SH_ERR_INVALID, "control");
}

static void test_large_bodies(void **state)
{
    (void)state;
    static char body[SH_WIRE_ITEM_MAX + 100];
    /* A text, a bitmap, a WANT, a chunk, an item, each one over its limit. */
    memcpy(body, "\x92\xc3\xda\x01\x01", 5);
    memset(body + 5, 'x', 257);
    assert_body(SH_MSG_WELCOME, body, 5 + 257, SH_ERR_LIMIT, "256");
    memcpy(body, "\x94\x05\x00\x00\xc4\x81", 6);
    memset(body + 6, 1, 129);
    assert_body(SH_MSG_ACK, body, 6 + 129, SH_ERR_LIMIT, "128");
    memcpy(body, "\x91\xc5\x08\x20", 4);
    assert_body(SH_MSG_WANT, body, 4 + 65 * 32, SH_ERR_LIMIT, "64");
    memcpy(body, "\x92\xc4\x20", 3);
    memset(body + 3, 1, 32);
    memcpy(body + 35, "\xc6\x00\x01\x00\x01", 5);
    assert_body(SH_MSG_CHUNK, body, 40 + 65537, SH_ERR_LIMIT, "65536");
    memcpy(body + 35, "\xc4\x00", 2);
    assert_body(SH_MSG_CHUNK, body, 37, SH_ERR_INVALID, "bytes");
    memcpy(body, "\x96\x05\x00\x01\x01\x01\xc6\x00\x04\x00\x01", 11);
    assert_body(SH_MSG_ITEM, body, 11 + SH_WIRE_ITEM_MAX + 1, SH_ERR_LIMIT, "262144");
}

static void test_envelope(void **state)
{
    (void)state;
    sh_error err;
    sh_buf bytes;
    sh_buf_init(&bytes, 2 * SH_WIRE_MESSAGE_MAX);
    static const char body[] = "\x92\xc3\xa0"; /* a WELCOME's */
    sample_wrap(1, SH_MSG_WELCOME, body, 3, &bytes);
    sh_msg msg;
    assert_int_equal(sh_msg_decode(bytes.data, bytes.len, &msg, NULL), SH_OK);
    assert_true(msg.welcome.accepted);

    assert_int_equal(sh_buf_append(&bytes, "", 1), SH_OK);
    assert_int_equal(assert_refused(bytes.data, bytes.len, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "1 bytes after its end"));

    bytes.data[bytes.len - 2] ^= 1;
    assert_int_equal(assert_refused(bytes.data, bytes.len - 1, &err), SH_ERR_CORRUPT);
    assert_non_null(strstr(err.text, "welcome"));

    for (unsigned type = 0; type < 128; type++)
        if (type < SH_MSG_ENROL || type > SH_MSG_ERROR) {
            sh_buf_clear(&bytes);
            sample_wrap(1, (uint8_t)type, body, 3, &bytes);
            sh_status status = assert_refused(bytes.data, bytes.len, &err);
            assert_int_equal(status, type ? SH_ERR_LIMIT : SH_ERR_INVALID);
        }
    for (unsigned version = 0; version < 128; version++)
        if (version < SH_WIRE_VERSION_MIN || version > SH_WIRE_VERSION) {
            sh_buf_clear(&bytes);
            sample_wrap(version, SH_MSG_WELCOME, body, 3, &bytes);
            assert_int_equal(assert_refused(bytes.data, bytes.len, &err), SH_ERR_UNSUPPORTED);
            assert_non_null(strstr(err.text, "version"));
        }
    /* A later version may have another envelope: it is still recognised by its number. */
    assert_int_equal(assert_refused("\x92\xcd\x01\x00\xc0", 5, &err), SH_ERR_UNSUPPORTED);

    sh_buf_clear(&bytes);
    uint8_t *room = sh_buf_reserve(&bytes, SH_WIRE_MESSAGE_MAX + 1);
    assert_non_null(room);
    memset(room, 0x94, SH_WIRE_MESSAGE_MAX + 1);
    assert_int_equal(assert_refused(room, SH_WIRE_MESSAGE_MAX + 1, &err), SH_ERR_LIMIT);
    sh_buf_release(&bytes);
}

/* The encoder holds the same rules: we never send what a peer must refuse. */
static void assert_unsendable(sh_status want, const char *word)
{
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_MESSAGE_MAX);
    assert_int_equal(sh_buf_append(&out, "kept", 4), SH_OK);
    sh_error err = {0};
    sh_status got = sh_msg_encode(&s.msg, &out, &err);
    if (got != want || !strstr(err.text, word) || !strstr(err.text, sh_msg_type_name(s.msg.type)))
        fail_msg("encode %s: got %s '%s', want %s with '%s' in it", sh_msg_type_name(s.msg.type),
                 sh_status_name(got), err.text, sh_status_name(want), word);
    assert_int_equal(out.len, 4);
    assert_memory_equal(out.data, "kept", 4);
    sh_buf_release(&out);
}

static void test_unsendable(void **state)
{
    (void)state;
    static char long_text[SH_WIRE_TEXT_MAX + 2];
    memset(long_text, 'x', SH_WIRE_TEXT_MAX + 1);
    sh_msg *m = &s.msg;
    *m = (sh_msg){.type = SH_MSG_WELCOME, .welcome = {true, long_text}};
    assert_unsendable(SH_ERR_LIMIT, "text is 257 bytes");
    m->welcome.text = "a\nb";
    assert_unsendable(SH_ERR_INVALID, "control");
    *m = (sh_msg){.type = SH_MSG_ITEM, .item = {.seq = 1, .last_seq = 1, .kind = 1, .cls = 4}};
    assert_unsendable(SH_ERR_LIMIT, "cls");
    m->item.cls = 0;
    m->item.payload = (sh_bytes){s.bytes, SH_WIRE_ITEM_MAX + 1};
    assert_unsendable(SH_ERR_LIMIT, "payload");
    m->item.payload.n = 0;
    m->item.seq = 0;
    assert_unsendable(SH_ERR_INVALID, "seq");
    m->item.seq = 2;
    assert_unsendable(SH_ERR_INVALID, "last_seq");
    *m = (sh_msg){.type = SH_MSG_WANT, .want = {65, s.hashes}};
    assert_unsendable(SH_ERR_LIMIT, "64");
    m->want.n = 0;
    assert_unsendable(SH_ERR_INVALID, "chunk_hashes");
    *m = (sh_msg){.type = SH_MSG_CHUNK, .chunk = {.bytes = {s.bytes, SH_CHUNK_BYTES + 1}}};
    assert_unsendable(SH_ERR_LIMIT, "bytes");
    *m = (sh_msg){.type = SH_MSG_PLAN, .plan = {.manifest = {s.bytes, SH_WIRE_MANIFEST_MAX + 1}}};
    assert_unsendable(SH_ERR_LIMIT, "manifest");
    m->plan.manifest.n = 0;
    m->plan.train.train = true;
    m->plan.train.lr = NAN;
    assert_unsendable(SH_ERR_INVALID, "lr is NaN");
    m->plan.train.lr = 1;
    m->plan.train.clip = INFINITY;
    assert_unsendable(SH_ERR_INVALID, "clip is infinite");
    m->plan.train.clip = 1;
    m->plan.evaluate = (sh_evaluate_plan){.candidate = 9, .model = {.bytes = 1}};
    assert_unsendable(SH_ERR_INVALID, "model has 0 chunk hashes");
    *m = (sh_msg){.version = 1,
                  .type = SH_MSG_ITEM,
                  .item = {.seq = 1, .last_seq = 1, .kind = SH_ITEM_EVALUATION, .cls = 1}};
    assert_unsendable(SH_ERR_LIMIT, "kind is 5");
    m->version = 2;
    m->item.kind = SH_ITEM_EVALUATION + 1;
    assert_unsendable(SH_ERR_LIMIT, "kind is 6");
}

static sh_buf corpus_file(const char *name)
{
    char path[512];
    sh_buf bytes;
    sh_error err = {0};
    uint8_t *read = NULL;
    size_t n = 0;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    snprintf(path, sizeof(path), SHOAL_SOURCE_DIR "/tests/fuzz/corpus/wire_msg/%s", name);
    if (sh_file_read(path, SH_WIRE_MESSAGE_MAX, &read, &n, &err) != SH_OK)
        fail_msg("%s", err.text);
    assert_int_equal(sh_buf_append(&bytes, read, n), SH_OK);
    free(read);
    return bytes;
}

/* What version 1 of the program wrote is read, and answered in its own bytes; the body of a PLAN is
 * another one in version 2, and neither is taken for the other. */
static void test_version_1(void **state)
{
    (void)state;
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (int i = 0; i < 3; i++) {
            char name[64];
            snprintf(name, sizeof(name), "%s-%d", sh_msg_type_name((sh_msg_type)type), i);
            sh_buf recorded = corpus_file(name);
            sh_msg msg;
            sh_error err = {0};
            if (sh_msg_decode(recorded.data, recorded.len, &msg, &err) != SH_OK)
                fail_msg("%s: %s", name, err.text);
            assert_int_equal(msg.version, 1);
            assert_int_equal(msg.type, type);
            if (type == SH_MSG_PLAN)
                assert_int_equal(msg.plan.evaluate.candidate, 0);
            sh_buf again = encoded(&msg);
            assert_int_equal(again.len, recorded.len);
            assert_memory_equal(again.data, recorded.data, recorded.len);
            sh_buf_clear(&again);
            if (type == SH_MSG_PLAN) {
                size_t head = recorded.len - 23 > 0xff ? 24 : 23;
                sample_wrap(2, SH_MSG_PLAN, recorded.data + head, recorded.len - head, &again);
                assert_int_equal(assert_refused(again.data, again.len, &err), SH_ERR_INVALID);
                assert_non_null(strstr(err.text, "3 fields, must be 4"));
            }
            sh_buf_release(&again);
            sh_buf_release(&recorded);
        }
}

static void test_no_memory(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 1, 1, 4);
    sample_msg(&rng, SH_MSG_ITEM, 3000, &s);
    for (size_t n = 1;; n++) {
        sh_buf out;
        sh_buf_init(&out, SH_WIRE_MESSAGE_MAX);
        sh_error err = {0};
        (void)sh_alloc_fail_after(n);
        sh_status status = sh_msg_encode(&s.msg, &out, &err);
        size_t made = sh_alloc_fail_after(0);
        size_t length = out.len;
        sh_buf_release(&out);
        if (status == SH_OK) {
            assert_true(made < n); /* the n-th allocation never came */
            assert_true(n > 2);
            break;
        }
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_int_equal(length, 0);
    }
}

/* ---- payloads ---- */

static void assert_update(const sh_update_meta *a, const sh_update_meta *b)
{
    assert_blob(&a->blob, &b->blob);
    assert_int_equal(a->round, b->round);
    assert_int_equal(a->base_version, b->base_version);
    assert_memory_equal(&a->base_sha256, &b->base_sha256, sizeof(sh_hash));
    assert_int_equal(a->a_seed, b->a_seed);
    assert_int_equal(a->rank, b->rank);
    assert_memory_equal(&a->alpha, &b->alpha, sizeof(float));
    assert_int_equal(a->samples, b->samples);
    assert_int_equal(a->tokens_seen, b->tokens_seen);
    assert_memory_equal(&a->heldout_before, &b->heldout_before, sizeof(double));
    assert_memory_equal(&a->heldout_after, &b->heldout_after, sizeof(double));
}

static void assert_alarm(const sh_alarm *a, const sh_alarm *b)
{
    assert_int_equal(a->window, b->window);
    assert_int_equal(a->release_version, b->release_version);
    assert_int_equal(a->inferences, b->inferences);
    assert_int_equal(a->metric, b->metric);
    assert_memory_equal(&a->log_evalue, &b->log_evalue, sizeof(double));
    assert_memory_equal(&a->effect, &b->effect, sizeof(double));
    assert_int_equal(a->at_ms, b->at_ms);
}

static void assert_evaluation(const sh_evaluation *a, const sh_evaluation *b)
{
    assert_int_equal(a->candidate, b->candidate);
    assert_int_equal(a->parent_version, b->parent_version);
    assert_memory_equal(&a->candidate_sha256, &b->candidate_sha256, sizeof(sh_hash));
    assert_int_equal(a->n, b->n);
    for (uint32_t i = 0; i < b->n; i++) {
        assert_int_equal(a->slices[i].slice, b->slices[i].slice);
        assert_int_equal(a->slices[i].tokens, b->slices[i].tokens);
        assert_true(a->slices[i].nll_parent == b->slices[i].nll_parent);
        assert_true(a->slices[i].nll_candidate == b->slices[i].nll_candidate);
    }
}

static void test_evaluation_rules(void **state)
{
    (void)state;
    static const uint8_t pinned[] = {
        0x95, 1,   5,    4,    0xc4, 32, 0, 0, 0, 0, 0, 0,    0,    0,    0, 0, 0, 0, 0,    0,
        0,    0,   0,    0,    0,    0,  0, 0, 0, 0, 0, 0,    0,    0,    0, 0, 0, 0, 0x91, 0x94,
        1,    100, 0xcb, 0x3f, 0xf0, 0,  0, 0, 0, 0, 0, 0xcb, 0x3f, 0xe0, 0, 0, 0, 0, 0,    0};
    sh_evaluation e = {.candidate = 5,
                       .parent_version = 4,
                       .n = 1,
                       .slices = {{SH_SLICE_CORRECTED, 100, 1.0, 0.5}}};
    sh_buf out;
    sh_error err = {0};
    sh_buf_init(&out, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_evaluation_encode(&e, &out, &err), SH_OK);
    assert_int_equal(out.len, sizeof(pinned));
    assert_memory_equal(out.data, pinned, sizeof(pinned));
    sh_evaluation got;
    out.data[40] = SH_SLICES; /* a slice that is not known */
    assert_int_equal(sh_evaluation_decode(out.data, out.len, &got, &err), SH_ERR_LIMIT);
    out.data[38] = 0x99; /* more than there may be */
    assert_int_equal(sh_evaluation_decode(out.data, out.len, &got, &err), SH_ERR_LIMIT);
    sh_buf_clear(&out);
    e.n = 2;
    e.slices[1] = e.slices[0]; /* the same slice twice */
    assert_int_equal(sh_evaluation_encode(&e, &out, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "must grow"));
    e.n = SH_EVALUATION_SLICES_MAX + 1;
    assert_int_not_equal(sh_evaluation_encode(&e, &out, &err), SH_OK);
    e.n = 1;
    e.slices[0].nll_parent = NAN;
    assert_int_equal(sh_evaluation_encode(&e, &out, &err), SH_ERR_INVALID);
    e.slices[0].nll_parent = 1;
    e.candidate = 0;
    assert_int_equal(sh_evaluation_encode(&e, &out, &err), SH_ERR_INVALID);
    assert_int_equal(out.len, 0);
    sh_buf_release(&out);
}

static void test_payloads(void **state)
{
    (void)state;
    static sample_payloads p;
    for (uint64_t seed = 0; seed < ROUNDS; seed++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 5);
        sample_payload(&rng, &p);
        sh_buf out;
        sh_buf_init(&out, SH_WIRE_ITEM_MAX);
        assert_int_equal(sh_update_meta_encode(&p.update, &out, NULL), SH_OK);
        sh_update_meta update, no_update = {.rank = 77};
        assert_int_equal(sh_update_meta_decode(out.data, out.len, &update, NULL), SH_OK);
        assert_update(&update, &p.update);
        for (size_t n = 0; n < out.len; n++)
            assert_int_not_equal(sh_update_meta_decode(out.data, n, &no_update, NULL), SH_OK);
        assert_int_equal(no_update.rank, 77);
        sh_buf_clear(&out);
        assert_int_equal(sh_alarm_encode(&p.alarm, &out, NULL), SH_OK);
        sh_alarm alarm, no_alarm;
        assert_int_equal(sh_alarm_decode(out.data, out.len, &alarm, NULL), SH_OK);
        assert_alarm(&alarm, &p.alarm);
        for (size_t n = 0; n < out.len; n++)
            assert_int_not_equal(sh_alarm_decode(out.data, n, &no_alarm, NULL), SH_OK);
        sh_buf_clear(&out);
        assert_int_equal(sh_evaluation_encode(&p.evaluation, &out, NULL), SH_OK);
        sh_evaluation evaluation, no_evaluation = {.n = 77};
        assert_int_equal(sh_evaluation_decode(out.data, out.len, &evaluation, NULL), SH_OK);
        assert_evaluation(&evaluation, &p.evaluation);
        for (size_t n = 0; n < out.len; n++)
            assert_int_not_equal(sh_evaluation_decode(out.data, n, &no_evaluation, NULL), SH_OK);
        assert_int_equal(no_evaluation.n, 77);
        sh_buf_release(&out);
    }
}

static void test_payload_rules(void **state)
{
    (void)state;
    static sample_payloads p;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 6);
    sample_payload(&rng, &p);
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_ITEM_MAX);
    sh_error err;
    p.update.blob = (sh_blob){.bytes = SH_CHUNK_BYTES + 1, .n_chunks = 1, .chunk_hashes = p.hashes};
    assert_int_equal(sh_update_meta_encode(&p.update, &out, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "must be 2"));
    p.update.blob.bytes = (uint64_t)SH_CHUNK_BYTES * SH_BLOB_CHUNKS_MAX + 1;
    assert_int_equal(sh_update_meta_encode(&p.update, &out, &err), SH_ERR_LIMIT);
    p.update.blob.bytes = 1;
    p.update.heldout_after = NAN;
    assert_int_equal(sh_update_meta_encode(&p.update, &out, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "heldout_after"));
    p.alarm.log_evalue = INFINITY;
    assert_int_equal(sh_alarm_encode(&p.alarm, &out, &err), SH_ERR_INVALID);
    assert_int_equal(out.len, 0);
    /* NaN on the wire, and another payload version. */
    p.alarm.log_evalue = 0.5;
    assert_int_equal(sh_alarm_encode(&p.alarm, &out, NULL), SH_OK);
    sh_alarm alarm;
    out.data[1] = 2;
    assert_int_equal(sh_alarm_decode(out.data, out.len, &alarm, &err), SH_ERR_UNSUPPORTED);
    out.data[1] = 1;
    static const uint8_t half[] = {0xcb, 0x3f, 0xe0, 0, 0, 0, 0, 0, 0};
    uint8_t *at = memmem(out.data, out.len, half, sizeof(half));
    assert_non_null(at);
    at[1] = 0x7f;
    at[2] = 0xf8;
    assert_int_equal(sh_alarm_decode(out.data, out.len, &alarm, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "log_evalue is NaN"));
    sh_buf_release(&out);
}

static void keys(uint8_t first, sh_sign_public_key *pk, sh_sign_secret_key *sk)
{
    uint8_t seed[32] = {first};
    sh_sign_keypair(seed, pk, sk);
}

static void test_manifest(void **state)
{
    (void)state;
    static sample_payloads p;
    sh_sign_public_key pk, other_pk;
    sh_sign_secret_key sk, other_sk;
    keys(1, &pk, &sk);
    keys(2, &other_pk, &other_sk);
    for (uint64_t seed = 0; seed < 20; seed++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 7);
        sample_payload(&rng, &p);
        sh_buf out;
        sh_buf_init(&out, SH_WIRE_MANIFEST_MAX);
        assert_int_equal(sh_manifest_sign(&p.manifest, &sk, &out, NULL), SH_OK);
        sh_manifest got;
        assert_int_equal(sh_manifest_verify(out.data, out.len, &pk, &got, NULL), SH_OK);
        assert_int_equal(got.version, p.manifest.version);
        assert_int_equal(got.parent, p.manifest.parent);
        assert_int_equal(got.created_ms, p.manifest.created_ms);
        assert_blob(&got.model, &p.manifest.model);
        assert_string_equal(got.format, "Q8_0");
        assert_ptr_equal(got.format, got.format_text);
        assert_memory_equal(&got.suite_sha256, &p.manifest.suite_sha256, sizeof(sh_hash));
        assert_true(got.gate_loss_parent == p.manifest.gate_loss_parent);
        assert_true(got.gate_loss == p.manifest.gate_loss);
        assert_int_equal(got.updates_merged, p.manifest.updates_merged);

        assert_int_equal(sh_manifest_verify(out.data, out.len, &other_pk, &got, NULL), SH_ERR_AUTH);
        for (size_t i = 0; i < out.len; i++) {
            out.data[i] ^= 0x10;
            assert_int_equal(sh_manifest_verify(out.data, out.len, &pk, &got, NULL), SH_ERR_AUTH);
            out.data[i] ^= 0x10;
        }
        for (size_t n = 0; n < out.len; n++)
            assert_int_not_equal(sh_manifest_verify(out.data, n, &pk, &got, NULL), SH_OK);
        sh_buf_release(&out);
    }
}

/* The right key's signature over something that is no manifest. */
static void test_manifest_signed_rubbish(void **state)
{
    (void)state;
    static sample_payloads p;
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    keys(1, &pk, &sk);
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 8);
    sample_payload(&rng, &p);
    sh_buf out;
    sh_buf_init(&out, 2 * SH_WIRE_MANIFEST_MAX);
    sh_error err;
    assert_int_equal(sh_manifest_sign(&p.manifest, &sk, &out, NULL), SH_OK);
    size_t n = out.len - sizeof(sh_signature);
    sh_manifest got = {0};
    for (size_t i = 0; i < n; i++) { /* the longest is the manifest itself */
        sh_signature sig = sh_sign(out.data, i, &sk);
        uint8_t kept[sizeof(sig)];
        memcpy(kept, out.data + i, sizeof(kept));
        memcpy(out.data + i, sig.b, sizeof(sig.b));
        assert_int_not_equal(sh_manifest_verify(out.data, i + sizeof(sig), &pk, &got, &err), SH_OK);
        assert_int_not_equal(err.code, SH_ERR_AUTH);
        memcpy(out.data + i, kept, sizeof(kept));
    }
    assert_int_equal(got.version, 0);
    p.manifest.parent = p.manifest.version;
    assert_int_equal(sh_manifest_sign(&p.manifest, &sk, &out, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "parent"));
    p.manifest.parent = 0;
    p.manifest.format = "a name that is too long";
    assert_int_equal(sh_manifest_sign(&p.manifest, &sk, &out, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_manifest_verify(out.data, SH_WIRE_MANIFEST_MAX + 1, &pk, &got, &err),
                     SH_ERR_LIMIT);
    sh_buf_release(&out);
}

/* The largest manifest and update still fit the messages that carry them. */
static void test_largest_blob_fits(void **state)
{
    (void)state;
    static uint8_t hashes[SH_BLOB_CHUNKS_MAX * 32];
    sh_blob blob = {.bytes = (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES,
                    .n_chunks = SH_BLOB_CHUNKS_MAX,
                    .chunk_hashes = hashes};
    sh_manifest manifest = {.version = UINT64_MAX, .model = blob, .format = "Q8_0"};
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    keys(1, &pk, &sk);
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_MESSAGE_MAX);
    assert_int_equal(sh_manifest_sign(&manifest, &sk, &payload, NULL), SH_OK);
    sh_msg plan = {.type = SH_MSG_PLAN, .plan.manifest = {payload.data, payload.len}};
    sh_buf bytes = encoded(&plan);
    sh_buf_release(&bytes);
    sh_buf_clear(&payload);
    sh_update_meta update = {.blob = blob};
    assert_int_equal(sh_update_meta_encode(&update, &payload, NULL), SH_OK);
    sh_msg item = {.type = SH_MSG_ITEM,
                   .item = {.seq = 1,
                            .last_seq = 1,
                            .kind = SH_ITEM_UPDATE,
                            .payload = {payload.data, payload.len}}};
    bytes = encoded(&item);
    sh_buf_release(&bytes);
    sh_buf_release(&payload);
}

static void test_blob_describe(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 65535, 65536, 65537, 200000};
    uint8_t *bytes = malloc(200000);
    assert_non_null(bytes);
    for (size_t i = 0; i < 200000; i++)
        bytes[i] = (uint8_t)(i * i >> 3);
    for (size_t k = 0; k < SH_COUNT(sizes); k++) {
        sh_blob blob;
        uint8_t *hashes = NULL;
        assert_int_equal(sh_blob_describe(bytes, sizes[k], &blob, &hashes, NULL), SH_OK);
        sh_hash whole = sh_sha256(bytes, sizes[k]);
        assert_memory_equal(&blob.sha256, &whole, sizeof(whole));
        assert_int_equal(blob.bytes, sizes[k]);
        assert_int_equal(blob.n_chunks, (sizes[k] + 65535) / 65536);
        for (size_t c = 0; c < blob.n_chunks; c++) {
            size_t n = SH_MIN(sizes[k] - c * 65536, (size_t)65536);
            sh_hash hash = sh_blake2b(bytes + c * 65536, n);
            assert_memory_equal(blob.chunk_hashes + c * 32, &hash, 32);
        }
        free(hashes);
    }
    sh_blob blob = {.bytes = 7};
    uint8_t *hashes = NULL;
    size_t over = (size_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES + 1;
    assert_int_equal(sh_blob_describe(bytes, over, &blob, &hashes, NULL), SH_ERR_LIMIT);
    (void)sh_alloc_fail_after(1);
    assert_int_equal(sh_blob_describe(bytes, 10, &blob, &hashes, NULL), SH_ERR_NO_MEMORY);
    (void)sh_alloc_fail_after(0);
    assert_int_equal(blob.bytes, 7);
    assert_null(hashes);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_pinned_bytes),
        cmocka_unit_test(test_truncated_and_flipped),
        cmocka_unit_test(test_mutated_bodies),
        cmocka_unit_test(test_hostile_bodies),
        cmocka_unit_test(test_large_bodies),
        cmocka_unit_test(test_envelope),
        cmocka_unit_test(test_unsendable),
        cmocka_unit_test(test_version_1),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_payloads),
        cmocka_unit_test(test_payload_rules),
        cmocka_unit_test(test_evaluation_rules),
        cmocka_unit_test(test_manifest),
        cmocka_unit_test(test_manifest_signed_rubbish),
        cmocka_unit_test(test_largest_blob_fits),
        cmocka_unit_test(test_blob_describe),
    };
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
