#include "tests/sync/fixture.h"

#include <stdlib.h>
#include <string.h>

static uint8_t *random_bytes(sh_rng *rng, size_t n)
{
    uint8_t *bytes = malloc(n + 1);
    assert_non_null(bytes);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)sh_rng_u32(rng);
    return bytes;
}

static void describe(const void *bytes, size_t n, sh_blob *blob, uint8_t **hashes)
{
    OK(sh_blob_describe(bytes, n, blob, hashes, &test_err));
}

static uint32_t count_missing(fixture *f, const sh_blob *blob)
{
    uint8_t hashes[64 * 32];
    uint32_t n = 99;
    OK(sh_blob_missing(f->txn, T_CHUNK, blob, hashes, 64, &n, &test_err));
    return n;
}

/* In one store, out of the other chunk by chunk, in the order in which they are missed. */
static void travels_in_chunks(void **state)
{
    (void)state;
    const size_t sizes[] = {1,
                            SH_CHUNK_BYTES - 1,
                            SH_CHUNK_BYTES,
                            SH_CHUNK_BYTES + 1,
                            5 * SH_CHUNK_BYTES,
                            7 * SH_CHUNK_BYTES + 12345};
    for (size_t i = 0; i < SH_COUNT(sizes); i++) {
        fixture a, b;
        sh_rng rng;
        sh_blob blob;
        uint8_t *hashes = NULL;
        sh_buf out;
        fixture_open(&a);
        fixture_open(&b);
        sh_rng_init(&rng, i, 0, 3);
        uint8_t *bytes = random_bytes(&rng, sizes[i]);
        describe(bytes, sizes[i], &blob, &hashes);
        OK(sh_blob_put(a.txn, T_CHUNK, bytes, sizes[i], &test_err));
        assert_int_equal(count_missing(&a, &blob), 0);
        assert_int_equal(count_missing(&b, &blob), blob.n_chunks);
        for (;;) {
            uint8_t want[2 * 32];
            uint32_t n;
            OK(sh_blob_missing(b.txn, T_CHUNK, &blob, want, 2, &n, &test_err));
            if (n == 0)
                break;
            sh_msg_chunk chunk = {0};
            sh_slice value;
            memcpy(chunk.hash.b, want, 32);
            OK(sh_txn_get(a.txn, T_CHUNK, want, 32, &value));
            chunk.bytes = (sh_bytes){value.data, value.n};
            OK(sh_chunk_put(b.txn, T_CHUNK, &chunk, &test_err));
        }
        sh_buf_init(&out, sizes[i] + 5);
        OK(sh_buf_append(&out, "start", 5));
        OK(sh_blob_get(b.txn, T_CHUNK, &blob, &out, &test_err));
        assert_int_equal(out.len, sizes[i] + 5);
        assert_memory_equal(out.data + 5, bytes, sizes[i]);
        sh_buf_release(&out);
        free(bytes);
        free(hashes);
        fixture_close(&a);
        fixture_close(&b);
    }
}

static void same_chunk_twice(void **state)
{
    (void)state;
    fixture f;
    sh_blob blob;
    uint8_t *hashes = NULL;
    size_t n = 4 * SH_CHUNK_BYTES;
    uint8_t *zeros = calloc(1, n);
    assert_non_null(zeros);
    fixture_open(&f);
    describe(zeros, n, &blob, &hashes);
    assert_int_equal(count_missing(&f, &blob), 1); /* asked for once */
    OK(sh_blob_put(f.txn, T_CHUNK, zeros, n, &test_err));
    assert_int_equal(sh_txn_count(f.txn, T_CHUNK), 1);
    sh_buf out;
    sh_buf_init(&out, n);
    OK(sh_blob_get(f.txn, T_CHUNK, &blob, &out, &test_err));
    assert_int_equal(out.len, n);
    sh_buf_release(&out);
    free(zeros);
    free(hashes);
    fixture_close(&f);
}

static void delete_keeps_what_is_shared(void **state)
{
    (void)state;
    fixture f;
    sh_rng rng;
    sh_blob one, two;
    uint8_t *h1 = NULL, *h2 = NULL;
    size_t n = 3 * SH_CHUNK_BYTES;
    sh_rng_init(&rng, 5, 0, 4);
    uint8_t *bytes = random_bytes(&rng, n);
    fixture_open(&f);
    describe(bytes, n, &one, &h1);
    OK(sh_blob_put(f.txn, T_CHUNK, bytes, n, &test_err));
    bytes[2 * SH_CHUNK_BYTES]++; /* the last chunk differs */
    describe(bytes, n, &two, &h2);
    OK(sh_blob_put(f.txn, T_CHUNK, bytes, n, &test_err));
    assert_int_equal(sh_txn_count(f.txn, T_CHUNK), 4);
    OK(sh_blob_delete(f.txn, T_CHUNK, &one, &two, 1, &test_err));
    assert_int_equal(count_missing(&f, &two), 0);
    assert_int_equal(count_missing(&f, &one), 1);
    OK(sh_blob_delete(f.txn, T_CHUNK, &two, NULL, 0, &test_err));
    assert_int_equal(sh_txn_count(f.txn, T_CHUNK), 0);
    free(bytes);
    free(h1);
    free(h2);
    fixture_close(&f);
}

static void what_does_not_match_is_refused(void **state)
{
    (void)state;
    fixture f;
    sh_rng rng;
    sh_blob blob;
    uint8_t *hashes = NULL;
    size_t n = SH_CHUNK_BYTES + 100;
    sh_rng_init(&rng, 6, 0, 5);
    uint8_t *bytes = random_bytes(&rng, n);
    fixture_open(&f);
    describe(bytes, n, &blob, &hashes);
    sh_msg_chunk chunk = {.bytes = {bytes, SH_CHUNK_BYTES}};
    memcpy(chunk.hash.b, hashes, 32);
    bytes[17] ^= 1;
    assert_int_equal(sh_chunk_put(f.txn, T_CHUNK, &chunk, &test_err), SH_ERR_CORRUPT);
    bytes[17] ^= 1;
    chunk.bytes.n = 0;
    assert_int_equal(sh_chunk_put(f.txn, T_CHUNK, &chunk, &test_err), SH_ERR_CORRUPT);
    assert_int_equal(sh_txn_count(f.txn, T_CHUNK), 0);

    sh_buf out;
    sh_buf_init(&out, n);
    assert_int_equal(sh_blob_get(f.txn, T_CHUNK, &blob, &out, &test_err), SH_ERR_NOT_FOUND);
    OK(sh_blob_put(f.txn, T_CHUNK, bytes, n, &test_err));
    sh_blob wrong = blob;
    wrong.sha256.b[0] ^= 1;
    assert_int_equal(sh_blob_get(f.txn, T_CHUNK, &wrong, &out, &test_err), SH_ERR_CORRUPT);
    wrong = blob;
    wrong.bytes--;
    assert_int_equal(sh_blob_get(f.txn, T_CHUNK, &wrong, &out, &test_err), SH_ERR_CORRUPT);
    wrong = blob;
    wrong.bytes += SH_CHUNK_BYTES;
    assert_int_equal(sh_blob_get(f.txn, T_CHUNK, &wrong, &out, &test_err), SH_ERR_CORRUPT);
    assert_int_equal(out.len, 0);
    out.max = n - 1;
    assert_int_equal(sh_blob_get(f.txn, T_CHUNK, &blob, &out, &test_err), SH_ERR_LIMIT);
    assert_int_equal(out.len, 0);
    sh_buf_release(&out);
    free(bytes);
    free(hashes);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(travels_in_chunks),
        cmocka_unit_test(same_chunk_twice),
        cmocka_unit_test(delete_keeps_what_is_shared),
        cmocka_unit_test(what_does_not_match_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
