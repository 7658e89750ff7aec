/* Products of bf16 operands at every level that is here, against sums in double of the operands as
 * they are rounded by the definition. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/bf16.h"

static const char *const levels[] = {"portable", "avx512-bf16", "amx-bf16"};

/* To nearest, ties to even. */
static double rounded(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rest = bits & 0xffff;
    bits &= 0xffff0000u;
    if (rest > 0x8000 || (rest == 0x8000 && bits >> 16 & 1))
        bits += 0x10000;
    memcpy(&x, &bits, sizeof x);
    return (double)x;
}

static float *random_floats(size_t n, uint64_t seed)
{
    float *x = sh_alloc_aligned(n * sizeof *x);
    sh_rng rng;
    assert_non_null(x);
    sh_rng_init(&rng, seed, 0, 1);
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(&rng);
    return x;
}

typedef struct {
    size_t m, n, k;
    float *x, *w;  /* [m, k], [n, k] */
    float *turned; /* [k, n] */
} operands;

static void check_product(const operands *o, bool by_rows, bool add)
{
    const size_t ldc = o->n + 3;
    sh_bf16 *a = sh_alloc_aligned(sh_bf16_a_values(o->m, o->k) * sizeof *a);
    sh_bf16 *b = sh_alloc_aligned(sh_bf16_b_values(o->n, o->k) * sizeof *b);
    float *c = random_floats(o->m * ldc, 3), *before = random_floats(o->m * ldc, 3);
    assert_true(a && b);
    sh_bf16_pack_a(o->x, o->k, o->m, o->k, a);
    if (by_rows) /* in two parts where it is long enough */
        for (size_t at = 0; at < o->k; at += SH_BF16_K)
            sh_bf16_pack_rows(o->turned + at * o->n, o->n, at, SH_MIN(o->k - at, (size_t)SH_BF16_K),
                              o->n, o->k, b);
    else
        for (size_t at = 0; at < o->n; at += SH_BF16_N)
            sh_bf16_pack_columns(o->w + at * o->k, o->k, at, SH_MIN(o->n - at, (size_t)SH_BF16_N),
                                 o->k, b);
    sh_bf16_run(&(sh_bf16_product){
        .a = a, .b = b, .m = o->m, .n = o->n, .k = o->k, .c = c, .ldc = ldc, .add = add});
    for (size_t i = 0; i < o->m; i++)
        for (size_t j = 0; j < ldc; j++) {
            double sum = j >= o->n || add ? (double)before[i * ldc + j] : 0, terms = 1;
            for (size_t k = 0; k < o->k && j < o->n; k++) {
                const double term = rounded(o->x[i * o->k + k]) * rounded(o->w[j * o->k + k]);
                sum += term;
                terms += fabs(term);
            }
            if (!(fabs(sum - (double)c[i * ldc + j]) <= 1e-6 * terms))
                fail_msg("%s: %zu x %zu x %zu at %zu, %zu: %g, expected %g", sh_bf16_level(), o->m,
                         o->n, o->k, i, j, (double)c[i * ldc + j], sum);
        }
    free(a);
    free(b);
    free(c);
    free(before);
}

static void check_size(size_t m, size_t n, size_t k)
{
    operands o = {m,
                  n,
                  k,
                  random_floats(m * k, 1),
                  random_floats(n * k, 2),
                  sh_alloc_aligned(n * k * sizeof(float))};
    assert_non_null(o.turned);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < k; i++)
            o.turned[i * n + j] = o.w[j * k + i];
    for (int by_rows = 0; by_rows < 2; by_rows++)
        for (int add = 0; add < 2; add++)
            check_product(&o, by_rows, add);
    free(o.x);
    free(o.w);
    free(o.turned);
}

static void test_levels(void **state)
{
    (void)state;
    static const size_t sizes[] = {1, 7, 16, 17, 32, 33, 70}, ks[] = {1, 2, 31, 32, 33, 64, 97};
    for (size_t l = 0; l < SH_COUNT(levels); l++) {
        if (!sh_bf16_force(levels[l])) {
            print_message("SKIP: no %s here\n", levels[l]);
            continue;
        }
        for (size_t m = 0; m < SH_COUNT(sizes); m++)
            for (size_t n = 0; n < SH_COUNT(sizes); n++)
                for (size_t k = 0; k < SH_COUNT(ks); k++)
                    check_size(sizes[m], sizes[n], ks[k]);
    }
    assert_false(sh_bf16_force("none such"));
}

/* A NaN or an infinity spoils its row and no other. */
static void test_not_finite(void **state)
{
    (void)state;
    for (size_t l = 0; l < SH_COUNT(levels); l++) {
        if (!sh_bf16_force(levels[l]))
            continue;
        float x[3 * 40], w[5 * 40], c[3 * 5];
        for (size_t i = 0; i < SH_COUNT(x); i++)
            x[i] = 1;
        for (size_t i = 0; i < SH_COUNT(w); i++)
            w[i] = 1;
        x[40 + 7] = NAN;
        x[80 + 39] = INFINITY;
        sh_bf16 *a = sh_alloc_aligned(sh_bf16_a_values(3, 40) * sizeof *a);
        sh_bf16 *b = sh_alloc_aligned(sh_bf16_b_values(5, 40) * sizeof *b);
        assert_true(a && b);
        sh_bf16_pack_a(x, 40, 3, 40, a);
        sh_bf16_pack_columns(w, 40, 0, 5, 40, b);
        sh_bf16_run(&(sh_bf16_product){.a = a, .b = b, .m = 3, .n = 5, .k = 40, .c = c, .ldc = 5});
        for (size_t j = 0; j < 5; j++) {
            assert_true(c[j] == 40);
            assert_true(isnan(c[5 + j]));
            assert_true(isinf(c[10 + j]));
        }
        free(a);
        free(b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
