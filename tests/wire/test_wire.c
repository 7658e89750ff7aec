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
#include "tests/wire/equal.h"
#include "tests/wire/sample.h"

#define ROUNDS 150

static sample s; /* large: not on a stack */

static void assert_text(const char *got, const char *want)
{
    assert_non_null(got);
    assert_string_equal(got, want ? want : ""); /* NULL says the same as "" */
}

static void assert_enrol(const sh_msg_enrol *a, const sh_msg_enrol *b)
{
    assert_int_equal(a->epoch, b->epoch);
    assert_text(a->agent, b->agent);
    assert_text(a->kernel, b->kernel);
    assert_int_equal(a->cores, b->cores);
    assert_int_equal(a->memory_bytes, b->memory_bytes);
    assert_text(a->device_class, b->device_class);
    assert_int_equal(a->disk_bytes, b->disk_bytes);
    assert_int_equal(a->slots, b->slots);
    assert_bytes(a->token, b->token);
    assert_int_equal(a->leases.n, b->leases.n);
    if (b->leases.n)
        assert_memory_equal(a->leases.hashes, b->leases.hashes, (size_t)b->leases.n * 32);
    assert_bytes(a->starts, b->starts);
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
    assert_int_equal(a->disk_free, b->disk_free);
    assert_int_equal(a->store_bytes, b->store_bytes);
    assert_int_equal(a->store_bytes_max, b->store_bytes_max);
    assert_int_equal(a->refused_full, b->refused_full);
    assert_int_equal(a->stores_lost, b->stores_lost);
    assert_int_equal(a->conditions, b->conditions);
    assert_int_equal(a->bytes_up_day, b->bytes_up_day);
    assert_int_equal(a->bytes_down_day, b->bytes_down_day);
    assert_int_equal(a->nodes, b->nodes);
    assert_int_equal(a->nodes_drifting, b->nodes_drifting);
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

static void assert_msg(const sh_msg *a, const sh_msg *b)
{
    assert_int_equal(a->version, b->version ? b->version : SH_WIRE_VERSION);
    assert_int_equal(a->type, b->type);
    switch (b->type) {
    case SH_MSG_ENROL:
        assert_enrol(&a->enrol, &b->enrol);
        break;
    case SH_MSG_WELCOME:
        assert_int_equal(a->welcome.accepted, b->welcome.accepted);
        assert_text(a->welcome.text, b->welcome.text);
        assert_int_equal(a->welcome.renew, b->welcome.renew);
        assert_int_equal(a->welcome.retry_after_ms, b->welcome.retry_after_ms);
        assert_int_equal(a->welcome.epoch, b->welcome.epoch);
        assert_int_equal(a->welcome.common, b->welcome.common);
        assert_int_equal(a->welcome.lease, b->welcome.lease);
        assert_bytes(a->welcome.parted, b->welcome.parted);
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
        assert_bytes(a->plan.time, b->plan.time);
        break;
    case SH_MSG_ITEM:
        assert_int_equal(a->item.epoch, b->item.epoch);
        assert_int_equal(a->item.cls, b->item.cls);
        assert_int_equal(a->item.seq, b->item.seq);
        assert_int_equal(a->item.kind, b->item.kind);
        assert_int_equal(a->item.last_seq, b->item.last_seq);
        assert_bytes(a->item.payload, b->item.payload);
        assert_int_equal(a->item.lease, b->item.lease);
        break;
    case SH_MSG_ACK:
        assert_int_equal(a->ack.epoch, b->ack.epoch);
        assert_int_equal(a->ack.cls, b->ack.cls);
        assert_int_equal(a->ack.high_water, b->ack.high_water);
        assert_memory_equal(a->ack.bitmap, b->ack.bitmap, sizeof(a->ack.bitmap));
        assert_int_equal(a->ack.lease, b->ack.lease);
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

/* A message of any version that has the type. */
static void sample_any(sh_rng *rng, sh_msg_type type, uint32_t version, size_t size_max)
{
    sample_msg(rng, type, size_max, &s);
    if (version >= 2)
        sample_msg_2(rng, &s);
    if (version >= 3)
        sample_msg_3(rng, &s);
    assert_int_equal(s.msg.version, version);
}

static uint32_t first_version(int type)
{
    return type == SH_MSG_ROTATE ? 3 : SH_WIRE_VERSION_MIN;
}

/* One of those that have the type, in turn. */
static uint32_t version_of(int type, uint64_t turn)
{
    uint32_t first = first_version(type);
    return first + (uint32_t)(turn % (SH_WIRE_VERSION - first + 1));
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
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ROTATE; type++)
        for (uint64_t seed = 0; seed < ROUNDS; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 1);
            sample_any(&rng, (sh_msg_type)type, version_of(type, seed),
                       seed % 16 ? 1000 : SIZE_MAX);
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

typedef struct {
    const sh_msg *msg;
    const uint8_t *body;
    size_t n;
} pinned_body;

static void assert_pinned(const pinned_body *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        sh_buf got = encoded(cases[i].msg), want;
        uint32_t version = cases[i].msg->version ? cases[i].msg->version : SH_WIRE_VERSION;
        sh_buf_init(&want, 1000);
        sample_wrap(version, (uint8_t)cases[i].msg->type, cases[i].body, cases[i].n, &want);
        assert_int_equal(got.len, want.len);
        assert_memory_equal(got.data, want.data, want.len);
        sh_buf_release(&got);
        sh_buf_release(&want);
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
                          .bitmap = {0x0101, 0},
                          .lease = 9}};
    static const uint8_t ack_body[] = {0x95, 0xcf, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88,
                                       0x02, 0xcd, 0x01, 0x2c, 0xc4, 0x02, 0x01, 0x01, 0x09};
    sh_msg ack_2 = ack;
    ack_2.version = 2;
    uint8_t ack_2_body[sizeof(ack_body) - 1];
    memcpy(ack_2_body, ack_body, sizeof(ack_2_body));
    ack_2_body[0] = 0x94;
    sh_msg plan = {.type = SH_MSG_PLAN,
                   .plan = {.return_after_ms = 60000, .manifest = {"\xde\xad", 2}}};
    static const uint8_t plan_body[] = {0x95, 0xcd, 0xea, 0x60, 0xc0, 0xc4,
                                        0x02, 0xde, 0xad, 0xc0, 0xc4, 0x00};
    /* In earlier versions, and what they have not is left out. */
    sh_msg plan_2 = plan, plan_1 = plan;
    plan_2.version = 2;
    plan_2.plan.time = (sh_bytes){"time", 4};
    static const uint8_t plan_2_body[] = {0x94, 0xcd, 0xea, 0x60, 0xc0, 0xc4, 2, 0xde, 0xad, 0xc0};
    plan_1.version = 1;
    plan_1.plan.evaluate = (sh_evaluate_plan){.candidate = 7};
    static const uint8_t plan_1_body[] = {0x93, 0xcd, 0xea, 0x60, 0xc0, 0xc4, 0x02, 0xde, 0xad};
    sh_msg item = {
        .type = SH_MSG_ITEM,
        .item = {5, .seq = 1, .kind = 1, .last_seq = 1, .payload = {"xyz", 3}, .lease = 6}};
    static const uint8_t item_body[] = {0x97, 5, 0, 1, 1, 1, 0xc4, 3, 'x', 'y', 'z', 6};
    sh_msg item_2 = item;
    item_2.version = 2;
    static const uint8_t item_2_body[] = {0x96, 5, 0, 1, 1, 1, 0xc4, 3, 'x', 'y', 'z'};
    sh_msg error = {.type = SH_MSG_ERROR,
                    .error = {.code = "limit", .text = "", .retry_after_ms = 200}};
    static const uint8_t error_body[] = {0x93, 0xa5, 'l', 'i', 'm', 'i', 't', 0xa0, 0xcc, 200};
    const pinned_body cases[] = {
        {&ack, ack_body, sizeof(ack_body)},          {&plan, plan_body, sizeof(plan_body)},
        {&plan_2, plan_2_body, sizeof(plan_2_body)}, {&plan_1, plan_1_body, sizeof(plan_1_body)},
        {&item, item_body, sizeof(item_body)},       {&error, error_body, sizeof(error_body)},
        {&item_2, item_2_body, sizeof(item_2_body)}, {&ack_2, ack_2_body, sizeof(ack_2_body)},
    };
    assert_pinned(cases, SH_COUNT(cases));
    static const uint8_t example[] = {0x94, 0x03, 0x04, 0xc4, 0x10, 0xbe, 0xdd, 0xd3, 0x4a,
                                      0xe8, 0x7b, 0x10, 0x7f, 0x64, 0xa0, 0xf2, 0x14, 0x99,
                                      0x38, 0xd4, 0x41, 0xc4, 0x0c, 0x95, 0xcd, 0xea, 0x60,
                                      0xc0, 0xc4, 0x02, 0xde, 0xad, 0xc0, 0xc4, 0x00};
    sh_buf whole = encoded(&plan);
    assert_int_equal(whole.len, sizeof(example));
    assert_memory_equal(whole.data, example, sizeof(example));
    sh_buf_release(&whole);
}

/* What is new in version 3, and what of it version 2 has. */
static void test_pinned_bytes_3(void **state)
{
    (void)state;
    static uint8_t leases[64] = {[0] = 0xa0, [31] = 0xa1, [32] = 0xb0, [63] = 0xb1};
    static uint8_t starts[64] = {[0] = 0xc0, [63] = 0xc1};
    sh_msg enrol = {.type = SH_MSG_ENROL,
                    .enrol = {.epoch = 7,
                              .agent = "x 1",
                              .kernel = "avx2",
                              .cores = 4,
                              .memory_bytes = 256,
                              .device_class = "phone",
                              .disk_bytes = 65536,
                              .slots = 2,
                              .token = {"t0k", 3},
                              .leases = {2, leases},
                              .starts = {starts, 64}}};
    static uint8_t enrol_body[166] = {0x9b, 7, 0xa3, 'x',  ' ', '1', 0xa4, 'a', 'v',  'x',  '2', 4,
                                      0xcd, 1, 0,    0xa5, 'p', 'h', 'o',  'n', 'e',  0xce, 0,   1,
                                      0,    0, 2,    0xc4, 3,   't', '0',  'k', 0xc4, 64};
    size_t enrol_n = 34 + sizeof(leases);
    memcpy(enrol_body + 34, leases, sizeof(leases));
    enrol_body[enrol_n++] = 0xc4;
    enrol_body[enrol_n++] = 64;
    memcpy(enrol_body + enrol_n, starts, sizeof(starts));
    enrol_n += sizeof(starts);
    sh_msg enrol_2 = enrol;
    enrol_2.version = 2;
    uint8_t enrol_2_body[15];
    memcpy(enrol_2_body, enrol_body, sizeof(enrol_2_body));
    enrol_2_body[0] = 0x95;
    sh_msg bare = {.type = SH_MSG_ENROL, .enrol = {.epoch = 1}}; /* no text, token, leases */
    static const uint8_t bare_body[] = {0x9b, 1,    0xa0, 0xa0, 0, 0,    0xa0, 0,
                                        0,    0xc4, 0,    0xc4, 0, 0xc4, 0};
    sh_msg welcome = {
        .type = SH_MSG_WELCOME,
        .welcome = {true, "ok", .renew = true, 128, .epoch = 7, .common = 3, 4, {starts, 32}}};
    static const uint8_t welcome_body[45] = {0x98, 0xc3, 0xa2, 'o', 'k',  0xc3, 0xcc,
                                             128,  7,    3,    4,   0xc4, 32,   0xc0};
    sh_msg welcome_2 = welcome;
    welcome_2.version = 2;
    static const uint8_t welcome_2_body[] = {0x92, 0xc3, 0xa2, 'o', 'k'};
    sh_msg checkin = {.type = SH_MSG_CHECKIN,
                      .checkin = {.epoch = 1,
                                  .now_ms = 2,
                                  .active_version = 3,
                                  .confirmed_version = 4,
                                  .installing_version = 5,
                                  .training_round = 6,
                                  .examples = 7,
                                  .example_tokens = 8,
                                  .outbox_items = 9,
                                  .outbox_bytes = 10,
                                  .dropped = {11, 12, 13, 14},
                                  .inferences = 15,
                                  .windows = 16,
                                  .drifting = true,
                                  .disk_free = 17,
                                  .store_bytes = 18,
                                  .store_bytes_max = 19,
                                  .refused_full = 20,
                                  .stores_lost = 21,
                                  .conditions = SH_CONDITION_METERED | SH_CONDITION_CLOCK,
                                  .bytes_up_day = 22,
                                  .bytes_down_day = 23,
                                  .nodes = 24,
                                  .nodes_drifting = 25}};
    static const uint8_t checkin_body[] = {0xdc, 0,  27, 1,    2,    3,  4,  5,  6,    7,  8,
                                           9,    10, 11, 12,   13,   14, 15, 16, 0xc3, 17, 18,
                                           19,   20, 21, 0xcc, 0x82, 22, 23, 24, 25};
    sh_msg checkin_2 = checkin;
    checkin_2.version = 2;
    uint8_t checkin_2_body[20];
    memcpy(checkin_2_body, checkin_body, sizeof(checkin_2_body));
    checkin_2_body[2] = 17;
    sh_msg plan = {.type = SH_MSG_PLAN, .plan = {.time = {"\x01\x02", 2}}};
    static const uint8_t plan_body[] = {0x95, 0, 0xc0, 0xc4, 0, 0xc0, 0xc4, 2, 1, 2};
    sh_msg rotate = {.type = SH_MSG_ROTATE, .rotate = {.token = {"0123456789abcdef", 16}}};
    rotate.rotate.key.b[0] = 0xcc;
    rotate.rotate.key.b[31] = 0xcd;
    static uint8_t rotate_body[53] = {
        [0] = 0x92, [1] = 0xc4, [2] = 32, [3] = 0xcc, [34] = 0xcd, [35] = 0xc4, [36] = 16};
    memcpy(rotate_body + 37, "0123456789abcdef", 16);
    sh_msg answer = {.type = SH_MSG_ROTATE, .rotate = {.key = rotate.rotate.key}};
    uint8_t answer_body[37];
    memcpy(answer_body, rotate_body, sizeof(answer_body));
    answer_body[36] = 0;
    const pinned_body cases[] = {
        {&enrol, enrol_body, enrol_n},
        {&enrol_2, enrol_2_body, sizeof(enrol_2_body)},
        {&bare, bare_body, sizeof(bare_body)},
        {&welcome, welcome_body, sizeof(welcome_body)},
        {&welcome_2, welcome_2_body, sizeof(welcome_2_body)},
        {&checkin, checkin_body, sizeof(checkin_body)},
        {&checkin_2, checkin_2_body, sizeof(checkin_2_body)},
        {&plan, plan_body, sizeof(plan_body)},
        {&rotate, rotate_body, sizeof(rotate_body)},
        {&answer, answer_body, sizeof(answer_body)},
    };
    assert_pinned(cases, SH_COUNT(cases));
}

/* A flip in the byte may make it another message: the hash is of the body alone. Of the version:
 * test_versions_apart; of the type: a small chunk reads like a rotation, a hash and a bin. */
static bool flip_is_message(size_t at, int type)
{
    return at == 1 || (at == 2 && (type == SH_MSG_CHUNK || type == SH_MSG_ROTATE));
}

/* Any prefix, and any other flip of a bit, of any message. */
static void test_truncated_and_flipped(void **state)
{
    (void)state;
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ROTATE; type++)
        for (uint64_t seed = 0; seed < 6; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 2);
            sample_any(&rng, (sh_msg_type)type, version_of(type, seed), 300);
            sh_buf bytes = encoded(&s.msg);
            sh_error err;
            for (size_t n = 0; n < bytes.len; n++)
                (void)assert_refused(bytes.data, n, &err);
            for (size_t i = 0; i < bytes.len; i++)
                for (int bit = 0; bit < 8 && !flip_is_message(i, type); bit++) {
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
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ROTATE; type++)
        for (uint64_t seed = 0; seed < 400; seed++) {
            sh_rng rng;
            sh_rng_init(&rng, seed, (uint64_t)type, 3);
            sample_any(&rng, (sh_msg_type)type, version_of(type, seed), 200);
            sh_buf bytes = encoded(&s.msg), wrapped;
            size_t head = bytes.len - 23 > 0xff ? 24 : 23; /* samples are below 64 KiB */
            uint8_t *body = bytes.data + head;
            size_t n = bytes.len - head;
            for (uint64_t k = 1 + sh_rng_below(&rng, 3); k > 0; k--)
                body[sh_rng_below(&rng, n)] = (uint8_t)sh_rng_u32(&rng);
            n -= sh_rng_below(&rng, 4) ? 0 : sh_rng_below(&rng, n);
            sh_buf_init(&wrapped, SH_WIRE_MESSAGE_MAX);
            sample_wrap(s.msg.version, (uint8_t)type, body, n, &wrapped);
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

static void assert_body_in(uint32_t version, sh_msg_type type, sh_bytes body, sh_status want,
                           const char *word)
{
    sh_buf bytes;
    sh_buf_init(&bytes, 2 * SH_WIRE_MESSAGE_MAX);
    sample_wrap(version, (uint8_t)type, body.data, body.n, &bytes);
    sh_error err;
    sh_status got = assert_refused(bytes.data, bytes.len, &err);
    if (got != want || !strstr(err.text, word) || !strstr(err.text, sh_msg_type_name(type)))
        fail_msg("body of %s: got %s '%s', want %s with '%s' in it", sh_msg_type_name(type),
                 sh_status_name(got), err.text, sh_status_name(want), word);
    sh_buf_release(&bytes);
}
static void assert_body(sh_msg_type type, const char *body, size_t n, sh_status want,
                        const char *word)
{
    assert_body_in(1, type, (sh_bytes){body, n}, want, word);
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

/* A body of version 3 with one thing wrong at a place. */
static void broken_3(const sh_msg *msg, size_t at, uint8_t byte, sh_status want, const char *word)
{
    sh_buf bytes = encoded(msg);
    size_t head = bytes.len - 23 > 0xff ? 24 : 23;
    bytes.data[head + at] = byte;
    assert_body_in(3, msg->type, (sh_bytes){bytes.data + head, bytes.len - head}, want, word);
    sh_buf_release(&bytes);
}

static void test_hostile_bodies_3(void **state)
{
    (void)state;
    static uint8_t bytes[(SH_WIRE_LEASES_MAX + 1) * 32];
    sh_msg enrol = {.type = SH_MSG_ENROL,
                    .enrol = {.device_class = "c", .token = {bytes, 2}, .leases = {1, bytes}}};
    /* 9b 0 a0 a0 0 0 a1 'c' 0 0 c4 2 . . c4 32 ... */
    broken_3(&enrol, 7, 0x07, SH_ERR_INVALID, "device_class");
    broken_3(&enrol, 11, 3, SH_ERR_INVALID, "leases");
    broken_3(&enrol, 11, 65, SH_ERR_INVALID, "token");
    broken_3(&enrol, 15, 31, SH_ERR_INVALID, "leases");
    enrol.enrol.token.n = SH_WIRE_TOKEN_MAX;
    broken_3(&enrol, 11, SH_WIRE_TOKEN_MAX + 1, SH_ERR_LIMIT, "token");
    static const uint8_t leases[] = {0x9b, 0, 0xa0, 0xa0, 0, 0, 0xa0, 0, 0, 0xc4, 0, 0xc5, 4, 32};
    uint8_t too_many[sizeof(leases) + sizeof(bytes)] = {0};
    memcpy(too_many, leases, sizeof(leases));
    assert_body_in(3, SH_MSG_ENROL, (sh_bytes){too_many, sizeof(too_many)}, SH_ERR_LIMIT, "leases");
    enrol.enrol.token.n = 2;
    enrol.enrol.starts = (sh_bytes){bytes, 32};
    /* ... c4 32 ... c4 32 ... */
    broken_3(&enrol, 15, 0, SH_ERR_INVALID, "starts");
    broken_3(&enrol, 49, 31, SH_ERR_INVALID, "starts");
    sh_msg welcome = {.type = SH_MSG_WELCOME};
    broken_3(&welcome, 3, 0, SH_ERR_INVALID, "renew");
    broken_3(&welcome, 4, 0xc0, SH_ERR_INVALID, "retry_after_ms");
    broken_3(&welcome, 5, 0xc0, SH_ERR_INVALID, "epoch");
    broken_3(&welcome, 6, 0xc0, SH_ERR_INVALID, "common");
    broken_3(&welcome, 7, 0xc0, SH_ERR_INVALID, "lease");
    static const uint8_t parted[] = {0x98, 0xc3, 0xa0, 0xc3, 0, 0, 0, 0, 0xc4, 1, 0};
    assert_body_in(3, SH_MSG_WELCOME, (sh_bytes){parted, sizeof(parted)}, SH_ERR_INVALID, "parted");
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin.conditions = SH_CONDITIONS_ALL};
    broken_3(&checkin, 25, 0xcd, SH_ERR_LIMIT, "conditions"); /* cd ff 00 */
    sh_msg plan = {.type = SH_MSG_PLAN};
    broken_3(&plan, 6, 0xc0, SH_ERR_INVALID, "time");
    sh_msg rotate = {.type = SH_MSG_ROTATE, .rotate.token = {bytes, SH_WIRE_TOKEN_MAX}};
    broken_3(&rotate, 2, 33, SH_ERR_INVALID, "key");
    broken_3(&rotate, 36, SH_WIRE_TOKEN_MAX + 1, SH_ERR_INVALID, "token");
    broken_3(&rotate, 0, 0x91, SH_ERR_INVALID, "1 fields");
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

    for (unsigned version = SH_WIRE_VERSION_MIN; version <= SH_WIRE_VERSION; version++)
        for (unsigned type = 0; type < 128; type++)
            if (type < SH_MSG_ENROL || type > (version < 3 ? SH_MSG_ERROR : SH_MSG_ROTATE)) {
                sh_buf_clear(&bytes);
                sample_wrap(version, (uint8_t)type, body, 3, &bytes);
                sh_status status = assert_refused(bytes.data, bytes.len, &err);
                assert_int_equal(status, type ? SH_ERR_LIMIT : SH_ERR_INVALID);
                assert_non_null(strstr(err.text, "type"));
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
    *m = (sh_msg){.type = SH_MSG_WELCOME, .welcome.text = long_text};
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
    *m = (sh_msg){.type = SH_MSG_ENROL, .enrol.device_class = long_text};
    assert_unsendable(SH_ERR_LIMIT, "device_class is 257 bytes");
    m->enrol.device_class = long_text + SH_WIRE_TEXT_MAX + 1 - SH_WIRE_CLASS_MAX; /* the longest */
    m->enrol.token = (sh_bytes){s.bytes, SH_WIRE_TOKEN_MAX + 1};
    assert_unsendable(SH_ERR_LIMIT, "token is 65 bytes");
    m->enrol.token.n = SH_WIRE_TOKEN_MAX;
    m->enrol.leases = (sh_hash_list){SH_WIRE_LEASES_MAX + 1, s.hashes};
    assert_unsendable(SH_ERR_LIMIT, "leases is 33");
    *m = (sh_msg){.type = SH_MSG_CHECKIN, .checkin.conditions = SH_CONDITIONS_ALL + 1};
    assert_unsendable(SH_ERR_LIMIT, "conditions is 256");
    *m = (sh_msg){.type = SH_MSG_PLAN, .plan.time = {s.bytes, SH_WIRE_TIME_MAX + 1}};
    assert_unsendable(SH_ERR_LIMIT, "time is 97 bytes");
    *m = (sh_msg){.type = SH_MSG_ROTATE, .rotate.token = {s.bytes, SH_WIRE_TOKEN_MAX + 1}};
    assert_unsendable(SH_ERR_LIMIT, "token is 65 bytes");
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

/* A body as another version has it is refused by its count of fields; one that both have alike is
 * the same message in both. */
static void test_versions_apart(void **state)
{
    (void)state;
    static const int counts[][SH_MSG_ROTATE + 1] = {
        [1] = {[SH_MSG_ENROL] = 5,
               [SH_MSG_WELCOME] = 2,
               [SH_MSG_CHECKIN] = 17,
               [SH_MSG_PLAN] = 3,
               [SH_MSG_ITEM] = 6,
               [SH_MSG_ACK] = 4},
        [2] = {[SH_MSG_ENROL] = 5,
               [SH_MSG_WELCOME] = 2,
               [SH_MSG_CHECKIN] = 17,
               [SH_MSG_PLAN] = 4,
               [SH_MSG_ITEM] = 6,
               [SH_MSG_ACK] = 4},
        [3] = {[SH_MSG_ENROL] = 11,
               [SH_MSG_WELCOME] = 8,
               [SH_MSG_CHECKIN] = 27,
               [SH_MSG_PLAN] = 5,
               [SH_MSG_ITEM] = 7,
               [SH_MSG_ACK] = 5},
    };
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (uint32_t from = 1; from <= 3; from++)
            for (uint32_t to = 1; to <= 3; to++) {
                sh_rng rng;
                sh_rng_init(&rng, from, (uint64_t)type, 12);
                sample_any(&rng, (sh_msg_type)type, from, 100);
                if (type == SH_MSG_ITEM)
                    s.msg.item.kind = SH_ITEM_UPDATE;
                if (type == SH_MSG_ITEM)
                    s.msg.item.last_seq = s.msg.item.seq;
                sh_buf bytes = encoded(&s.msg);
                bytes.data[1] = (uint8_t)to;
                sh_error err;
                if (counts[from][type] != counts[to][type]) {
                    char want[64];
                    snprintf(want, sizeof(want), "%s: %d fields, must be %d",
                             sh_msg_type_name((sh_msg_type)type), counts[from][type],
                             counts[to][type]);
                    assert_int_equal(assert_refused(bytes.data, bytes.len, &err), SH_ERR_INVALID);
                    assert_non_null(strstr(err.text, want));
                } else {
                    sh_msg got;
                    assert_int_equal(sh_msg_decode(bytes.data, bytes.len, &got, &err), SH_OK);
                    s.msg.version = to;
                    assert_msg(&got, &s.msg);
                }
                sh_buf_release(&bytes);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),       cmocka_unit_test(test_pinned_bytes),
        cmocka_unit_test(test_pinned_bytes_3),   cmocka_unit_test(test_truncated_and_flipped),
        cmocka_unit_test(test_mutated_bodies),   cmocka_unit_test(test_hostile_bodies),
        cmocka_unit_test(test_hostile_bodies_3), cmocka_unit_test(test_large_bodies),
        cmocka_unit_test(test_envelope),         cmocka_unit_test(test_unsendable),
        cmocka_unit_test(test_version_1),        cmocka_unit_test(test_versions_apart),
        cmocka_unit_test(test_no_memory),
    };
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
