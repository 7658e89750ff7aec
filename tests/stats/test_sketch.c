/* Sketches: their stated errors against exact answers, and that order of merging does not matter.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "shared/base/rng.h"
#include "shared/stats/sketch.h"

#define VALUES 4000

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Log-normal latencies around 10 ms: three decades. */
static uint32_t latency(sh_rng *rng)
{
    return (uint32_t)(10000 * exp(0.8 * sh_rng_normal(rng)));
}

static void quantiles_are_within_one_percent(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 20; seed++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 0);
        sh_quantiles sketch = {0};
        uint32_t values[VALUES];
        for (size_t i = 0; i < VALUES; i++) {
            values[i] = latency(&rng);
            sh_quantiles_add(&sketch, values[i]);
        }
        qsort(values, VALUES, sizeof(values[0]), by_value);
        const double ranks[] = {0, 0.01, 0.25, 0.5, 0.9, 0.99, 1};
        for (size_t i = 0; i < SH_COUNT(ranks); i++) {
            double exact = values[(size_t)(ranks[i] * (VALUES - 1))];
            double ours = sh_quantiles_get(&sketch, ranks[i]);
            /* a hair over 1 %, for the rounding of log and exp */
            if (fabs(ours - exact) > 0.0100001 * exact)
                fail_msg("seed %llu, quantile %g: %.3f, exact %.0f", (unsigned long long)seed,
                         ranks[i], ours, exact);
        }
    }
}

static void extreme_values_count(void **state)
{
    (void)state;
    sh_quantiles sketch = {0};
    assert_float_equal(sh_quantiles_get(&sketch, 0.5), 0, 0);
    sh_quantiles_add(&sketch, 0);
    assert_float_equal(sh_quantiles_get(&sketch, 0.5), 1, 0.011);
    sh_quantiles_add(&sketch, UINT32_MAX);
    assert_true(sketch.top <= SH_QUANTILE_INDEX_MAX);
    assert_true(fabs(sh_quantiles_get(&sketch, 1) / (double)UINT32_MAX - 1) <= 0.0100001);
    assert_int_equal(sketch.n, 2);
}

/* Parts of very different ranges, so that buckets collapse on the way. */
static void fill(sh_quantiles *sketch, sh_rng *rng, double scale)
{
    size_t n = (size_t)sh_rng_below(rng, 60);
    for (size_t i = 0; i < n; i++)
        sh_quantiles_add(sketch, (uint32_t)(scale * exp(2 * sh_rng_normal(rng))));
}

static void merged(sh_quantiles *out, const sh_quantiles *a, const sh_quantiles *b)
{
    *out = *a;
    assert_int_equal(sh_quantiles_merge(out, b), SH_OK);
}

static bool same(const sh_quantiles *a, const sh_quantiles *b)
{
    return a->n == b->n &&
           (a->n == 0 || (a->top == b->top && memcmp(a->count, b->count, sizeof(a->count)) == 0));
}

static void quantiles_merge_in_any_order(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 200; seed++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 0);
        sh_quantiles a = {0}, b = {0}, c = {0}, ab, ba, bc, ab_c, a_bc;
        fill(&a, &rng, 10);
        fill(&b, &rng, 100000);
        fill(&c, &rng, 3000000);
        merged(&ab, &a, &b);
        merged(&ba, &b, &a);
        merged(&bc, &b, &c);
        merged(&ab_c, &ab, &c);
        merged(&a_bc, &a, &bc);
        if (!same(&ab, &ba) || !same(&ab_c, &a_bc))
            fail_msg("seed %llu: order of merging shows", (unsigned long long)seed);
        uint64_t counted = 0;
        for (size_t k = 0; k < SH_QUANTILE_BUCKETS; k++)
            counted += ab_c.count[k];
        assert_int_equal(counted, a.n + b.n + c.n);
    }
}

static void quantiles_refuse_an_overflow(void **state)
{
    (void)state;
    sh_quantiles a = {.n = UINT32_MAX, .top = 5, .count = {UINT32_MAX}}, b = {0};
    sh_quantiles_add(&b, 100);
    sh_quantiles before = a;
    assert_int_equal(sh_quantiles_merge(&a, &b), SH_ERR_LIMIT);
    assert_memory_equal(&a, &before, sizeof(a));
}

static void distinct_is_within_four_standard_errors(void **state)
{
    (void)state;
    const unsigned sizes[] = {0, 1, 10, 100, 1000, 20000};
    for (size_t s = 0; s < SH_COUNT(sizes); s++) {
        sh_distinct a = {0}, b = {0};
        for (unsigned i = 0; i < sizes[s]; i++) {
            sh_distinct_add(i % 2 ? &a : &b, sh_mix64(7 * i + 1));
            sh_distinct_add(&a, sh_mix64(7 * (i / 2) + 1)); /* seen again: no change */
        }
        sh_distinct_merge(&a, &b);
        double ours = sh_distinct_get(&a);
        if (fabs(ours - sizes[s]) > 4 * 0.065 * sizes[s])
            fail_msg("%u distinct things counted as %.1f", sizes[s], ours);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantiles_are_within_one_percent),
        cmocka_unit_test(extreme_values_count),
        cmocka_unit_test(quantiles_merge_in_any_order),
        cmocka_unit_test(quantiles_refuse_an_overflow),
        cmocka_unit_test(distinct_is_within_four_standard_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
