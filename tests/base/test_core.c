/* status, buf, rng, failpoint */
#include "shared/base/buf.h"
#include "shared/base/failpoint.h"
#include "shared/base/rng.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- status ---- */

static void test_fail_fills_code_and_text(void **state)
{
    (void)state;
    sh_error err = {0};
    assert_int_equal(sh_fail(&err, SH_ERR_IO, "cannot read '%s' (%d)", "x", 7), SH_ERR_IO);
    assert_int_equal(err.code, SH_ERR_IO);
    assert_string_equal(err.text, "cannot read 'x' (7)");
    assert_int_equal(sh_fail_in(&err, "round %d", 3), SH_ERR_IO);
    assert_string_equal(err.text, "round 3: cannot read 'x' (7)");
    /* The arguments may lie in the text that is replaced. */
    sh_fail(&err, SH_ERR_LIMIT, "again: %s", err.text);
    assert_string_equal(err.text, "again: round 3: cannot read 'x' (7)");
    assert_int_equal(sh_fail(NULL, SH_ERR_FULL, "nobody listens"), SH_ERR_FULL);
}

static void test_error_text_is_one_bounded_line(void **state)
{
    (void)state;
    sh_error err = {0};
    sh_fail(&err, SH_ERR_INVALID, "a\nb\tc\x1b[31m%s", "d\r\n");
    assert_string_equal(err.text, "a b c [31md  ");
    char longer[2 * SH_ERROR_TEXT_BYTES];
    memset(longer, 'x', sizeof longer);
    longer[sizeof longer - 1] = 0;
    sh_fail(&err, SH_ERR_INVALID, "%s", longer);
    assert_int_equal(strlen(err.text), SH_ERROR_TEXT_BYTES - 1);
    sh_fail_in(&err, "%s", longer);
    assert_int_equal(strlen(err.text), SH_ERROR_TEXT_BYTES - 1);
}

static void test_status_names_and_exit_codes(void **state)
{
    (void)state;
    for (int s = SH_OK; s <= SH_ERR_CRASHED; s++) {
        assert_string_not_equal(sh_status_name((sh_status)s), "unknown");
        for (int t = SH_OK; t < s; t++)
            assert_string_not_equal(sh_status_name((sh_status)s), sh_status_name((sh_status)t));
        int code = sh_status_exit_code((sh_status)s);
        assert_true(s == SH_OK ? code == 0 : code == 1 || code == 2);
    }
    assert_string_equal(sh_status_name(SH_ERR_NOT_FOUND), "not-found");
    assert_string_equal(sh_status_name((sh_status)999), "unknown");
    assert_int_equal(sh_status_exit_code(SH_ERR_USAGE), 2);
    assert_int_equal(sh_status_exit_code(SH_ERR_INVALID), 2);
    assert_int_equal(sh_status_exit_code(SH_ERR_IO), 1);
}

/* ---- buf ---- */

static void test_buf_appends_up_to_its_limit(void **state)
{
    (void)state;
    sh_buf buf;
    sh_buf_init(&buf, 100);
    for (int i = 0; i < 10; i++)
        assert_int_equal(sh_buf_append(&buf, "0123456789", 10), SH_OK);
    assert_int_equal(buf.len, 100);
    assert_int_equal(sh_buf_append(&buf, "x", 1), SH_ERR_LIMIT);
    assert_int_equal(sh_buf_append(&buf, "x", SIZE_MAX), SH_ERR_LIMIT);
    assert_int_equal(sh_buf_append(&buf, NULL, 0), SH_OK);
    assert_int_equal(buf.len, 100);
    assert_memory_equal(buf.data + 90, "0123456789", 10);
    assert_null(sh_buf_reserve(&buf, 1));
    sh_buf_clear(&buf);
    assert_int_equal(buf.len, 0);
    assert_non_null(sh_buf_reserve(&buf, 100));
    assert_null(sh_buf_reserve(&buf, 101));
    assert_true(buf.cap <= buf.max);
    sh_buf_release(&buf);
    assert_null(buf.data);
    assert_int_equal(buf.max, 100); /* still usable */
    assert_int_equal(sh_buf_append(&buf, "abc", 3), SH_OK);
    sh_buf_release(&buf);

    sh_buf zeroed = {0};
    assert_int_equal(sh_buf_append(&zeroed, "a", 1), SH_ERR_LIMIT);
    sh_buf_release(&zeroed);
}

static void test_buf_printf_fills_exactly(void **state)
{
    (void)state;
    sh_buf buf;
    sh_buf_init(&buf, 600);
    char text[601];
    memset(text, 'y', sizeof text);
    text[600] = 0;
    assert_int_equal(sh_buf_printf(&buf, "%s", text), SH_OK); /* no room for a final 0 needed */
    assert_int_equal(buf.len, 600);
    assert_memory_equal(buf.data, text, 600);
    assert_int_equal(sh_buf_printf(&buf, "%d", 1), SH_ERR_LIMIT);
    sh_buf_clear(&buf);
    assert_int_equal(sh_buf_printf(&buf, "%s%d", text, 1), SH_ERR_LIMIT);
    assert_int_equal(buf.len, 0);
    assert_int_equal(sh_buf_printf(&buf, "%d-%s", 42, "z"), SH_OK);
    assert_int_equal(buf.len, 4);
    assert_memory_equal(buf.data, "42-z", 4);
    assert_int_equal(sh_buf_printf(&buf, "%s", ""), SH_OK);
    assert_int_equal(buf.len, 4);
    sh_buf_release(&buf);
}

static void test_each_failed_allocation_leaves_the_buffer_whole(void **state)
{
    (void)state;
    size_t failures = 0;
    for (size_t n = 1;; n++) {
        sh_buf buf;
        sh_buf_init(&buf, 10000);
        sh_alloc_fail_after(n);
        size_t before = 0;
        sh_status status = SH_OK;
        for (int i = 0; i < 100 && status == SH_OK; i++) {
            before = buf.len;
            status = i % 2 ? sh_buf_append(&buf, "0123456789", 10)
                           : sh_buf_printf(&buf, "%0300d", i); /* over the small block */
            if (buf.len > 9000)
                break;
        }
        sh_alloc_fail_after(0);
        if (status != SH_OK) {
            assert_int_equal(status, SH_ERR_NO_MEMORY);
            assert_int_equal(buf.len, before);
            assert_int_equal(sh_buf_append(&buf, "after", 5), SH_OK); /* it goes on */
            failures++;
        }
        sh_buf_release(&buf);
        if (status == SH_OK)
            break;
    }
    assert_true(failures >= 10);
}

static void test_calloc_checks_and_counts(void **state)
{
    (void)state;
    sh_alloc_fail_after(0);
    assert_null(sh_calloc(SIZE_MAX / 4, 8));
    assert_null(sh_calloc(2, SIZE_MAX / 2 + 1));
    uint8_t *none = sh_calloc(0, 8);
    assert_non_null(none);
    free(none);
    assert_int_equal(sh_alloc_fail_after(2), 3);
    uint8_t *first = sh_calloc(3, 5), *second = sh_calloc(3, 5), *third = sh_calloc(3, 5);
    assert_non_null(first);
    assert_null(second);
    assert_non_null(third);
    for (int i = 0; i < 15; i++)
        assert_int_equal(first[i], 0);
    free(first);
    free(third);
    assert_int_equal(sh_alloc_fail_after(0), 3);
}

static void test_aligned_allocation(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 63, 64, 65, 100000};
    for (size_t i = 0; i < SH_COUNT(sizes); i++) {
        uint8_t *memory = sh_alloc_aligned(sizes[i]);
        assert_non_null(memory);
        assert_int_equal((uintptr_t)memory % 64, 0);
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(memory[j], 0);
        free(memory);
    }
    assert_null(sh_alloc_aligned(SIZE_MAX));
    sh_alloc_fail_after(1);
    assert_null(sh_alloc_aligned(64));
    sh_alloc_fail_after(0);
}

static void test_array_reserve_doubles_up_to_max(void **state)
{
    (void)state;
    uint32_t *items = NULL;
    size_t cap = 0, grown = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        size_t before = cap;
        assert_int_equal(sh_array_reserve((void **)&items, &cap, i + 1, sizeof *items, 1000),
                         SH_OK);
        grown += cap != before;
        assert_true(cap > i && cap <= 1000);
        items[i] = i;
    }
    assert_true(grown <= 9); /* 8, 16, ... 512, 1000 */
    for (uint32_t i = 0; i < 1000; i++)
        assert_int_equal(items[i], i);
    assert_int_equal(sh_array_reserve((void **)&items, &cap, 1001, sizeof *items, 1000),
                     SH_ERR_LIMIT);
    assert_int_equal(sh_array_reserve((void **)&items, &cap, SIZE_MAX, sizeof *items, SIZE_MAX),
                     SH_ERR_LIMIT);
    uint32_t *kept = items;
    sh_alloc_fail_after(1);
    assert_int_equal(sh_array_reserve((void **)&items, &cap, 2000, sizeof *items, 4000),
                     SH_ERR_NO_MEMORY);
    sh_alloc_fail_after(0);
    assert_ptr_equal(items, kept);
    assert_int_equal(cap, 1000);
    free(items);
}

/* ---- rng ---- */

/* Random123's kat_vectors, "philox4x32 10". */
static void test_philox_known_answers(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < SH_COUNT(vectors); i++) {
        uint32_t out[4];
        sh_philox4x32(vectors[i].counter, vectors[i].key, out);
        for (int j = 0; j < 4; j++)
            assert_int_equal(out[j], vectors[i].out[j]);
    }
    sh_rng rng;
    sh_rng_init(&rng, 0, 0, 0);
    assert_int_equal(sh_rng_u32(&rng), 0x6627e8d5);
    assert_int_equal(sh_rng_u32(&rng), 0xe169c58d);
    assert_true(sh_rng_u64(&rng) == 0x9b00dbd8bc57ac4c);
}

static void test_generators_differ_by_each_name_part(void **state)
{
    (void)state;
    sh_rng generators[6];
    sh_rng_init(&generators[0], 1, 2, 3);
    sh_rng_init(&generators[1], 2, 2, 3);
    sh_rng_init(&generators[2], 1, 3, 3);
    sh_rng_init(&generators[3], 1, 2, 4);
    sh_rng_init(&generators[4], 1 | 1ull << 40, 2, 3);
    sh_rng_init(&generators[5], 1, 2 | 1ull << 40, 3);
    uint64_t first[6];
    for (int i = 0; i < 6; i++) {
        first[i] = sh_rng_u64(&generators[i]);
        for (int j = 0; j < i; j++)
            assert_true(first[i] != first[j]);
    }
    sh_rng again, fork;
    sh_rng_init(&again, 1, 2, 3);
    assert_true(sh_rng_u64(&again) == first[0]);
    fork = again;
    for (int i = 0; i < 100; i++)
        assert_int_equal(sh_rng_u32(&fork), sh_rng_u32(&again));
}

static void test_below_is_uniform_and_in_range(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 42, 0, 0);
    enum { BINS = 7, DRAWS = 70000 };
    uint32_t counts[BINS] = {0};
    for (int i = 0; i < DRAWS; i++) {
        uint64_t x = sh_rng_below(&rng, BINS);
        assert_true(x < BINS);
        counts[x]++;
    }
    double chi2 = 0;
    for (int i = 0; i < BINS; i++)
        chi2 += pow(counts[i] - DRAWS / (double)BINS, 2) / (DRAWS / (double)BINS);
    if (chi2 > 22.5) /* 6 degrees of freedom, p = 0.001; the seed is fixed */
        fail_msg("chi2 %g, at most 22.5 expected", chi2);
    for (int i = 0; i < 100; i++) {
        assert_true(sh_rng_below(&rng, 1) == 0);
        assert_true(sh_rng_below(&rng, (1ull << 63) + 1) <= 1ull << 63);
    }
}

static void test_unit_and_normal_have_their_moments(void **state)
{
    (void)state;
    enum { DRAWS = 200000 };
    sh_rng rng;
    sh_rng_init(&rng, 7, 0, 0);
    double sum = 0, sum2 = 0, n_sum = 0, n_sum2 = 0, n_sum4 = 0;
    for (int i = 0; i < DRAWS; i++) {
        double u = sh_rng_unit(&rng), z = (double)sh_rng_normal(&rng);
        assert_true(u >= 0 && u < 1 && isfinite(z));
        sum += u;
        sum2 += u * u;
        n_sum += z;
        n_sum2 += z * z;
        n_sum4 += z * z * z * z;
    }
    const struct {
        const char *name;
        double got, want, tolerance; /* 4.5 standard errors */
    } moments[] = {
        {"unit mean", sum / DRAWS, 0.5, 4.5 * 0.2887 / sqrt(DRAWS)},
        {"unit square", sum2 / DRAWS, 1.0 / 3, 4.5 * 0.298 / sqrt(DRAWS)},
        {"normal mean", n_sum / DRAWS, 0, 4.5 / sqrt(DRAWS)},
        {"normal square", n_sum2 / DRAWS, 1, 4.5 * sqrt(2) / sqrt(DRAWS)},
        {"normal fourth", n_sum4 / DRAWS, 3, 4.5 * sqrt(96) / sqrt(DRAWS)},
    };
    for (size_t i = 0; i < SH_COUNT(moments); i++)
        if (fabs(moments[i].got - moments[i].want) > moments[i].tolerance)
            fail_msg("%s: %g, expected %g within %g", moments[i].name, moments[i].got,
                     moments[i].want, moments[i].tolerance);
}

static void test_shuffle_is_a_uniform_permutation(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 3, 0, 0);
    uint32_t seen[6] = {0};
    for (int i = 0; i < 6000; i++) {
        uint32_t items[3] = {0, 1, 2};
        sh_rng_shuffle(&rng, items, 3);
        assert_int_equal(items[0] + items[1] + items[2], 3);
        assert_int_equal(items[0] * items[1] * items[2], 0);
        seen[items[0] * 2 + (items[1] > items[2])]++;
    }
    for (int i = 0; i < 6; i++)
        if (seen[i] < 870 || seen[i] > 1130) /* 1000 +- 4.5 standard deviations */
            fail_msg("order %d came %u times, about 1000 expected", i, seen[i]);
    sh_rng before = rng;
    sh_rng_shuffle(&rng, NULL, 0);
    assert_memory_equal(&before, &rng, sizeof rng);
}

/* ---- failpoint ---- */

static void test_failpoint_fires_once_after_its_passes(void **state)
{
    (void)state;
    sh_failpoints set = {0};
    assert_int_equal(sh_failpoint_arm(&set, "store.commit", 2, NULL), SH_OK);
    assert_false(sh_failpoint_hit(&set, "other"));
    assert_false(sh_failpoint_hit(NULL, "store.commit"));
    assert_false(sh_failpoint_hit(&set, "store.commit"));
    assert_false(sh_failpoint_hit(&set, "store.commit"));
    assert_true(sh_failpoint_hit(&set, "store.commit"));
    assert_false(sh_failpoint_hit(&set, "store.commit"));
    assert_int_equal(set.points[0].hits, 1);
    assert_int_equal(sh_failpoint_arm(&set, "store.commit", 0, NULL), SH_OK); /* again */
    assert_true(sh_failpoint_hit(&set, "store.commit"));
    assert_int_equal(set.points[0].hits, 2);
    assert_int_equal(set.n, 1);
}

static void test_failpoint_limits(void **state)
{
    (void)state;
    sh_failpoints set = {0};
    sh_error err = {0};
    char name[SH_FAILPOINT_NAME_MAX + 1];
    memset(name, 'n', sizeof name);
    name[SH_FAILPOINT_NAME_MAX] = 0;
    assert_int_equal(sh_failpoint_arm(&set, name, 0, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_failpoint_arm(&set, "", 0, &err), SH_ERR_LIMIT);
    name[SH_FAILPOINT_NAME_MAX - 1] = 0;
    assert_int_equal(sh_failpoint_arm(&set, name, 0, &err), SH_OK);
    for (int i = 1; i < SH_FAILPOINTS_MAX; i++) {
        snprintf(name, sizeof name, "p%d", i);
        assert_int_equal(sh_failpoint_arm(&set, name, 0, &err), SH_OK);
    }
    assert_int_equal(sh_failpoint_arm(&set, "one-more", 0, &err), SH_ERR_LIMIT);
    assert_int_equal(set.n, SH_FAILPOINTS_MAX);
}

static void test_failpoint_list(void **state)
{
    (void)state;
    sh_failpoints set = {0};
    sh_error err = {0};
    assert_int_equal(sh_failpoint_arm_list(&set, "a.b:1,c", &err), SH_OK);
    assert_int_equal(set.n, 2);
    assert_int_equal(set.points[0].skip, 1);
    assert_true(sh_failpoint_hit(&set, "c"));
    assert_false(sh_failpoint_hit(&set, "a.b"));
    assert_true(sh_failpoint_hit(&set, "a.b"));
    assert_int_equal(sh_failpoint_arm_list(&set, "", &err), SH_OK);
    static const char *const bad[] = {
        ":1", "a:", "a:x", "a:4294967296", "a:99999999999999999999", "a,,b", "z:1x"};
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        assert_int_not_equal(sh_failpoint_arm_list(&set, bad[i], &err), SH_OK);
        assert_int_equal(set.n, 2); /* nothing of it was armed */
        assert_false(sh_failpoint_hit(&set, "a"));
    }
    assert_int_equal(sh_failpoint_arm_list(&set, "a:4294967295", &err), SH_OK);
    assert_true(set.points[2].skip == UINT32_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fail_fills_code_and_text),
        cmocka_unit_test(test_error_text_is_one_bounded_line),
        cmocka_unit_test(test_status_names_and_exit_codes),
        cmocka_unit_test(test_buf_appends_up_to_its_limit),
        cmocka_unit_test(test_buf_printf_fills_exactly),
        cmocka_unit_test(test_each_failed_allocation_leaves_the_buffer_whole),
        cmocka_unit_test(test_calloc_checks_and_counts),
        cmocka_unit_test(test_aligned_allocation),
        cmocka_unit_test(test_array_reserve_doubles_up_to_max),
        cmocka_unit_test(test_philox_known_answers),
        cmocka_unit_test(test_generators_differ_by_each_name_part),
        cmocka_unit_test(test_below_is_uniform_and_in_range),
        cmocka_unit_test(test_unit_and_normal_have_their_moments),
        cmocka_unit_test(test_shuffle_is_a_uniform_permutation),
        cmocka_unit_test(test_failpoint_fires_once_after_its_passes),
        cmocka_unit_test(test_failpoint_limits),
        cmocka_unit_test(test_failpoint_list),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
