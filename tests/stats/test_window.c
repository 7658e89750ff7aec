/* Records and windows: round trips, laws of merging, what is refused. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "shared/stats/window.h"
#include "tests/stats/traffic.h"

static void make_window(sh_window *out, uint64_t seed, uint64_t index, unsigned n)
{
    traffic t;
    traffic_init(&t, &traffic_default, seed);
    t.seq = index * 1000;
    sh_window_init(out, seed, index, 1);
    for (unsigned i = 0; i < n; i++) {
        sh_record r = traffic_next(&t);
        sh_window_add(out, &r);
        sh_window_add_metric(out, SH_METRIC_NLL, r.prompt_nll);
        sh_window_add_metric(out, SH_METRIC_LENGTH, log2(1.0 + r.prompt_tokens));
        out->feedback[r.feedback]++;
    }
    out->drops[SH_DROP_RECORD] = seed;
}

static void records_come_back(void **state)
{
    (void)state;
    traffic t;
    traffic_init(&t, &traffic_default, 3);
    for (int i = 0; i < 100; i++) {
        sh_record r = traffic_next(&t), back;
        uint8_t bytes[SH_RECORD_BYTES], again[SH_RECORD_BYTES];
        r.stop = (uint8_t)(i % 8);
        sh_record_encode(&r, bytes);
        assert_int_equal(sh_record_decode(bytes, sizeof(bytes), &back, NULL), SH_OK);
        sh_record_encode(&back, again);
        assert_memory_equal(bytes, again, sizeof(bytes));
        assert_int_equal(back.seq, r.seq);
        assert_memory_equal(&back.prompt_nll, &r.prompt_nll, sizeof(float));
        assert_memory_equal(back.projection, r.projection, sizeof(r.projection));
        assert_memory_equal(back.bucket, r.bucket, sizeof(r.bucket));
        bytes[i] ^= 0x10;
        assert_int_not_equal(sh_record_decode(bytes, sizeof(bytes), &back, NULL), SH_OK);
        assert_int_equal(sh_record_decode(again, (size_t)i, &back, NULL), SH_ERR_INVALID);
    }
}

static void token_counts_saturate(void **state)
{
    (void)state;
    sh_record r = {0};
    for (int i = 0; i < 40; i++)
        sh_record_count_token(&r, 17);
    unsigned sum = 0;
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
        sum += sh_record_bucket(&r, b);
    assert_int_equal(sum, SH_BUCKET_MAX);
}

static void windows_come_back(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        sh_window window, back;
        make_window(&window, seed, seed + 1, (unsigned)(seed * 40));
        sh_buf bytes, again;
        sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
        sh_buf_init(&again, SH_WINDOW_BYTES_MAX);
        assert_int_equal(sh_window_encode(&window, true, &bytes), SH_OK);
        assert_int_equal(sh_window_decode(bytes.data, bytes.len, &back, NULL), SH_OK);
        assert_int_equal(sh_window_encode(&back, true, &again), SH_OK);
        assert_int_equal(bytes.len, again.len);
        assert_memory_equal(bytes.data, again.data, bytes.len);
        assert_true(sh_window_same(&window, &back));
        assert_memory_equal(back.covariance_sum, window.covariance_sum,
                            sizeof(window.covariance_sum));
        assert_float_equal(sh_window_mean(&back, SH_METRIC_NLL),
                           sh_window_mean(&window, SH_METRIC_NLL), 0);
        assert_true(bytes.len < 4096); /* one node's window: well under the limit */
        sh_buf_release(&bytes);
        sh_buf_release(&again);
    }
}

/* Every number at its most bytes, as no real window has them all at once. */
static void the_largest_window_fits(void **state)
{
    (void)state;
    sh_window w;
    make_window(&w, 1, UINT64_MAX, 1);
    w.origin = w.first_seq = w.start_ms = UINT64_MAX / 2;
    w.last_seq = w.end_ms = UINT64_MAX;
    w.prompt_tokens = w.output_tokens = w.edit_distance = UINT64_MAX;
    for (size_t m = 0; m < SH_METRICS; m++) {
        w.metric[m].n = UINT32_MAX;
        w.metric[m].sum = INT64_MIN;
        w.metric[m].square_sum = INT64_MAX;
        for (size_t b = 0; b < SH_HISTOGRAM_BINS; b++)
            w.metric[m].histogram[b] = UINT32_MAX / SH_HISTOGRAM_BINS;
    }
    for (size_t k = 0; k < SH_QUANTILE_BUCKETS; k++)
        w.ttft_us.count[k] = w.token_us.count[k] = UINT32_MAX / SH_QUANTILE_BUCKETS;
    for (size_t b = 0; b < SH_TOKEN_BUCKETS; b++)
        w.bucket[b] = UINT64_MAX;
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        w.projection_sum[i] = INT64_MIN >> 1;
    for (size_t i = 0; i < SH_COVARIANCES; i++)
        w.covariance_sum[i] = INT64_MIN >> 8; /* 2^32 inferences of 127^2 are far below it */
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
    assert_int_equal(sh_window_encode(&w, true, &bytes), SH_OK);
    print_message("the largest window takes %zu of %d bytes\n", bytes.len, SH_WINDOW_BYTES_MAX);
    sh_buf_release(&bytes);
}

static void small_token_counts_stay_home(void **state)
{
    (void)state;
    sh_window window, back;
    make_window(&window, 5, 1, 10);
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
        window.bucket[b] = b;
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
    assert_int_equal(sh_window_encode(&window, false, &bytes), SH_OK);
    assert_int_equal(sh_window_decode(bytes.data, bytes.len, &back, NULL), SH_OK);
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
        assert_int_equal(back.bucket[b], b < SH_TOKEN_COUNT_LEAST ? 0 : b);
    sh_buf_release(&bytes);
}

static void assert_same_bytes(const sh_window *a, const sh_window *b)
{
    sh_buf x, y;
    sh_buf_init(&x, SH_WINDOW_BYTES_MAX);
    sh_buf_init(&y, SH_WINDOW_BYTES_MAX);
    assert_int_equal(sh_window_encode(a, true, &x), SH_OK);
    assert_int_equal(sh_window_encode(b, true, &y), SH_OK);
    assert_int_equal(x.len, y.len);
    assert_memory_equal(x.data, y.data, x.len);
    sh_buf_release(&x);
    sh_buf_release(&y);
}

static void windows_merge_in_any_order(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 50; seed++) {
        sh_window a, b, c;
        make_window(&a, 3 * seed, 1, (unsigned)(seed % 7) * 20);
        make_window(&b, 3 * seed + 1, 2, 64);
        make_window(&c, 3 * seed + 2, 1, 100);
        sh_window ab = a, ba = b, bc = b;
        assert_int_equal(sh_window_merge(&ab, &b, NULL), SH_OK);
        assert_int_equal(sh_window_merge(&ba, &a, NULL), SH_OK);
        assert_same_bytes(&ab, &ba);
        assert_int_equal(sh_window_merge(&bc, &c, NULL), SH_OK);
        assert_int_equal(sh_window_merge(&ab, &c, NULL), SH_OK);
        assert_int_equal(sh_window_merge(&a, &bc, NULL), SH_OK);
        assert_same_bytes(&ab, &a);
        assert_int_equal(a.windows, 3);
        assert_int_equal(a.inferences, (seed % 7) * 20 + 164);
    }
}

static void merging_refuses_what_does_not_belong(void **state)
{
    (void)state;
    sh_window a, b, before;
    sh_error err = {0};
    make_window(&a, 1, 1, 50);
    b = a;
    before = a;
    assert_int_equal(sh_window_merge(&a, &b, &err), SH_ERR_EXISTS);
    b.index = 2;
    b.release_version = 9;
    assert_int_equal(sh_window_merge(&a, &b, &err), SH_ERR_MISMATCH);
    b.release_version = 1;
    b.bucket[3] = UINT64_MAX;
    assert_int_equal(sh_window_merge(&a, &b, &err), SH_ERR_LIMIT);
    assert_memory_equal(&a, &before, sizeof(a));
}

static void decoding_refuses_other_schemas_and_broken_bytes(void **state)
{
    (void)state;
    sh_window window, out;
    make_window(&window, 2, 4, 128);
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WINDOW_BYTES_MAX);
    assert_int_equal(sh_window_encode(&window, true, &bytes), SH_OK);
    bytes.data[4] ^= 3; /* version */
    assert_int_equal(sh_window_decode(bytes.data, bytes.len, &out, NULL), SH_ERR_UNSUPPORTED);
    bytes.data[4] ^= 3;
    bytes.data[7]++; /* number of metrics */
    assert_int_equal(sh_window_decode(bytes.data, bytes.len, &out, NULL), SH_ERR_UNSUPPORTED);
    bytes.data[7]--;
    for (size_t n = 0; n < bytes.len; n++)
        assert_int_not_equal(sh_window_decode(bytes.data, n, &out, NULL), SH_OK);
    for (size_t i = 0; i < bytes.len; i++) {
        bytes.data[i] ^= 0x40;
        assert_int_not_equal(sh_window_decode(bytes.data, bytes.len, &out, NULL), SH_OK);
        bytes.data[i] ^= 0x40;
    }
    assert_int_equal(sh_window_decode(bytes.data, bytes.len, &out, NULL), SH_OK);
    sh_buf_release(&bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(records_come_back),
        cmocka_unit_test(token_counts_saturate),
        cmocka_unit_test(windows_come_back),
        cmocka_unit_test(the_largest_window_fits),
        cmocka_unit_test(small_token_counts_stay_home),
        cmocka_unit_test(windows_merge_in_any_order),
        cmocka_unit_test(merging_refuses_what_does_not_belong),
        cmocka_unit_test(decoding_refuses_other_schemas_and_broken_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
