/* Payloads of items, and what the release key signs. test_wire.c has the messages. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/wire/equal.h"
#include "tests/wire/sample.h"

#define ROUNDS 150

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
    assert_bytes(a->parts, b->parts);
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

static void test_parts(void **state)
{
    (void)state;
    static sample_payloads p;
    for (uint32_t n = 1; n <= SAMPLE_PARTS; n++) {
        sh_rng rng;
        sh_rng_init(&rng, n, 0, 13);
        sample_payload(&rng, &p);
        sample_relayed(n, n, &p);
        sh_buf out;
        sh_error err = {0};
        sh_buf_init(&out, SH_WIRE_ITEM_MAX);
        assert_int_equal(sh_update_meta_encode(&p.update, &out, &err), SH_OK);
        assert_int_equal(out.data[1], 2); /* the payload's version */
        sh_update_meta got, no = {.rank = 77};
        assert_int_equal(sh_update_meta_decode(out.data, out.len, &got, &err), SH_OK);
        assert_update(&got, &p.update);
        uint64_t samples = 0;
        for (uint32_t i = 0; i < n; i++)
            samples +=
                sh_update_part_get((const uint8_t *)got.parts.data + i * SH_UPDATE_PART_BYTES)
                    .samples;
        assert_int_equal(samples, got.samples);
        for (size_t k = 0; k < out.len; k++)
            assert_int_not_equal(sh_update_meta_decode(out.data, k, &no, &err), SH_OK);
        assert_int_equal(no.rank, 77);
        out.data[1] = 1; /* a field too many for version 1 */
        assert_int_equal(sh_update_meta_decode(out.data, out.len, &no, &err), SH_ERR_INVALID);
        out.data[1] = 3;
        assert_int_not_equal(sh_update_meta_decode(out.data, out.len, &no, &err), SH_OK);
        sh_buf_release(&out);
    }
}

/* The encoder refuses it, and so does the decoder when another program wrote it. */
static void assert_parts_refused(sh_update_meta *meta, sh_status want, const char *word)
{
    sh_buf out;
    sh_error err = {0};
    sh_buf_init(&out, SH_WIRE_ITEM_MAX);
    sh_status status = sh_update_meta_encode(meta, &out, &err);
    if (status != want || !strstr(err.text, word))
        fail_msg("parts: got %s '%s', want '%s'", sh_status_name(status), err.text, word);
    assert_int_equal(out.len, 0);
    /* The same behind a payload of one good part, which is the last field. */
    uint8_t good[SH_UPDATE_PART_BYTES];
    sh_update_part_put(good, &(sh_update_part){.seq = 1, .samples = meta->samples});
    sh_update_meta one = *meta, got = {.rank = 77};
    one.parts = (sh_bytes){good, sizeof(good)};
    assert_int_equal(sh_update_meta_encode(&one, &out, &err), SH_OK);
    out.len -= 2 + sizeof(good);
    size_t n = meta->parts.n;
    const uint8_t head[] = {n < 256 ? 0xc4 : 0xc5, (uint8_t)(n < 256 ? n : n >> 8), (uint8_t)n};
    assert_int_equal(sh_buf_append(&out, head, n < 256 ? 2 : 3), SH_OK);
    assert_int_equal(sh_buf_append(&out, meta->parts.data, n), SH_OK);
    status = sh_update_meta_decode(out.data, out.len, &got, &err);
    if (status != want || !strstr(err.text, word))
        fail_msg("parts: got %s '%s', want '%s'", sh_status_name(status), err.text, word);
    assert_int_equal(got.rank, 77);
    sh_buf_release(&out);
}

static void test_parts_rules(void **state)
{
    (void)state;
    static uint8_t bytes[(SH_UPDATE_PARTS_MAX + 1) * SH_UPDATE_PART_BYTES];
    static uint8_t hashes[SH_BLOB_CHUNKS_MAX * 32];
    sh_update_part part = {
        .node = {{1, 2, 3}}, .epoch = 0x0102030405060708, .seq = 9, .samples = 10};
    uint8_t pinned_part[SH_UPDATE_PART_BYTES] = {1, 2, 3, [32] = 1, 2,        3,        4,
                                                 5, 6, 7, 8,        [47] = 9, [55] = 10};
    sh_update_part_put(bytes, &part);
    assert_memory_equal(bytes, pinned_part, sizeof(pinned_part));
    sh_update_part back = sh_update_part_get(bytes);
    assert_memory_equal(&back, &part, sizeof(part));
    sh_update_meta meta = {.samples = 30, .parts = {bytes, 2 * SH_UPDATE_PART_BYTES}};
    /* Not sorted: the same again, and a smaller one of each field. */
    part.samples = 20;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    assert_parts_refused(&meta, SH_ERR_INVALID, "not sorted");
    part.seq = 8;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    assert_parts_refused(&meta, SH_ERR_INVALID, "not sorted");
    part.seq = 10, part.epoch--;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    assert_parts_refused(&meta, SH_ERR_INVALID, "not sorted");
    part.epoch += 2, part.node.b[2]--;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    assert_parts_refused(&meta, SH_ERR_INVALID, "not sorted");
    /* Sums, overflow of the sum too. */
    part.node.b[2] += 2;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    meta.samples = 31;
    assert_parts_refused(&meta, SH_ERR_INVALID, "samples is 31, its parts have 30");
    part.samples = UINT64_MAX - 9;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    meta.samples = 1;
    assert_parts_refused(&meta, SH_ERR_INVALID, "without sequence or samples");
    part.samples = 0;
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    meta.samples = 10;
    assert_parts_refused(&meta, SH_ERR_INVALID, "without sequence or samples");
    part = (sh_update_part){.node = {{2}}, .seq = 0, .samples = 20};
    sh_update_part_put(bytes + SH_UPDATE_PART_BYTES, &part);
    meta.samples = 30;
    assert_parts_refused(&meta, SH_ERR_INVALID, "without sequence or samples");
    meta.parts.n--;
    assert_parts_refused(&meta, SH_ERR_INVALID, "multiple of 56");
    /* As many as there may be, of the largest blob, fit an item; one more is refused. */
    for (uint32_t i = 0; i <= SH_UPDATE_PARTS_MAX; i++)
        sh_update_part_put(bytes + (size_t)i * SH_UPDATE_PART_BYTES,
                           &(sh_update_part){.epoch = i, .seq = 1, .samples = 1});
    meta.blob = (sh_blob){.bytes = (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES,
                          .n_chunks = SH_BLOB_CHUNKS_MAX,
                          .chunk_hashes = hashes};
    meta.parts.n = SH_UPDATE_PARTS_MAX * SH_UPDATE_PART_BYTES;
    meta.samples = SH_UPDATE_PARTS_MAX;
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_update_meta_encode(&meta, &out, NULL), SH_OK);
    sh_buf_release(&out);
    meta.parts.n += SH_UPDATE_PART_BYTES;
    meta.samples++;
    assert_parts_refused(&meta, SH_ERR_LIMIT, "parts is 57400 bytes");
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

static void test_time(void **state)
{
    (void)state;
    sh_sign_public_key pk, other_pk;
    sh_sign_secret_key sk, other_sk;
    keys(1, &pk, &sk);
    keys(2, &other_pk, &other_sk);
    static const uint8_t head[] = {0x93, 0xaa, 's', 'h', 'o', 'a', 'l', '-', 't', 'i', 'm', 'e', 1};
    static const uint64_t times[] = {0, 127, 1767225600000, UINT64_MAX};
    sh_error err = {0};
    for (size_t k = 0; k < SH_COUNT(times); k++) {
        sh_buf out;
        sh_buf_init(&out, SH_WIRE_TIME_MAX);
        assert_int_equal(sh_time_sign(times[k], &sk, &out, &err), SH_OK);
        assert_memory_equal(out.data, head, sizeof(head));
        uint64_t got = 77;
        sh_bytes stamp = {out.data, out.len};
        assert_int_equal(sh_time_verify(stamp, &other_pk, &got, &err), SH_ERR_AUTH);
        for (size_t i = 0; i < out.len; i++) {
            out.data[i] ^= 0x10;
            assert_int_equal(sh_time_verify(stamp, &pk, &got, &err), SH_ERR_AUTH);
            out.data[i] ^= 0x10;
        }
        for (stamp.n = 0; stamp.n < out.len; stamp.n++)
            assert_int_not_equal(sh_time_verify(stamp, &pk, &got, &err), SH_OK);
        assert_int_equal(got, 77);
        assert_int_equal(sh_time_verify(stamp, &pk, &got, &err), SH_OK);
        assert_int_equal(got, times[k]);
        sh_buf_release(&out);
    }
}

/* The release key's signature over what is no time: a manifest, a longer array, too many bytes. And
 * a time is no manifest. */
static void test_time_signed_rubbish(void **state)
{
    (void)state;
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    keys(1, &pk, &sk);
    sh_error err = {0};
    uint64_t got = 77;
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_MANIFEST_MAX);
    sh_manifest manifest = {.version = 1, .format = "Q8_0"}, no_manifest = {0};
    assert_int_equal(sh_manifest_sign(&manifest, &sk, &out, &err), SH_OK);
    assert_int_equal(sh_time_verify((sh_bytes){out.data, out.len}, &pk, &got, &err), SH_ERR_LIMIT);
    static const struct {
        const char *bytes;
        size_t n;
        sh_status want;
    } cases[] = {
        {"\x93\xaashoal-tim", 11, SH_ERR_INVALID},
        {"\x93\xaashoal-timf\x01\x05", 14, SH_ERR_INVALID},
        {"\x93\xaashoal-time\x02\x05", 14, SH_ERR_UNSUPPORTED},
        {"\x94\xaashoal-time\x01\x05\x05", 15, SH_ERR_INVALID},
        {"\x93\xaashoal-time\x01\x05\x05", 15, SH_ERR_INVALID},
        {"\x93\xaashoal-time\x01\xcc\x05", 15, SH_ERR_INVALID},
        {"", 0, SH_ERR_INVALID},
        {"0123456789abcdef0123456789abcdef0", 33, SH_ERR_LIMIT}, /* 97 with the signature */
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_signature sig = sh_sign(cases[i].bytes, cases[i].n, &sk);
        sh_buf_clear(&out);
        assert_int_equal(sh_buf_append(&out, cases[i].bytes, cases[i].n), SH_OK);
        assert_int_equal(sh_buf_append(&out, sig.b, sizeof(sig.b)), SH_OK);
        assert_int_equal(sh_time_verify((sh_bytes){out.data, out.len}, &pk, &got, &err),
                         cases[i].want);
    }
    assert_int_equal(got, 77);
    sh_buf_clear(&out);
    assert_int_equal(sh_time_sign(5, &sk, &out, &err), SH_OK);
    assert_int_equal(sh_manifest_verify(out.data, out.len, &pk, &no_manifest, &err),
                     SH_ERR_INVALID);
    assert_int_equal(no_manifest.version, 0);
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
        cmocka_unit_test(test_payloads),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_parts_rules),
        cmocka_unit_test(test_payload_rules),
        cmocka_unit_test(test_evaluation_rules),
        cmocka_unit_test(test_manifest),
        cmocka_unit_test(test_manifest_signed_rubbish),
        cmocka_unit_test(test_time),
        cmocka_unit_test(test_time_signed_rubbish),
        cmocka_unit_test(test_largest_blob_fits),
        cmocka_unit_test(test_blob_describe),
    };
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
