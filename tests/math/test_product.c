/*
 * Products with quantized weights: every level that the CPU has against the definition in double,
 * against each other, packed against in place, and whatever way a call is cut.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/kernel_internal.h"

#define SEED 20261101

static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0, SH_TYPE_Q4_1, SH_TYPE_Q5_0,
                                SH_TYPE_Q5_1, SH_TYPE_Q4_K, SH_TYPE_Q5_K, SH_TYPE_Q6_K};

/* Exactly the size needed, so that a sanitizer sees what is read or written past it. */
static void *exact(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

static void *aligned(size_t bytes)
{
    void *memory = sh_alloc_aligned(bytes);
    assert_non_null(memory);
    return memory;
}

/* Places of a block's halves (scales). */
static size_t half_places(sh_type type, size_t at[2])
{
    at[0] = type == SH_TYPE_Q6_K ? 208 : 0;
    at[1] = 2;
    return sh_has_minima(type) ? 2 : 1;
}

/* Rows of random bytes; scales by `scale_of`. */
static uint8_t *random_rows(sh_rng *rng, sh_type type, size_t out, size_t in,
                            uint16_t (*scale_of)(sh_rng *rng))
{
    size_t block = sh_type_get((uint32_t)type)->block_bytes, at[2];
    size_t bytes = out * sh_type_row_bytes(type, in), n_halves = half_places(type, at);
    uint8_t *rows = exact(bytes);
    for (size_t i = 0; i < bytes; i++) /* many of the least and the largest codes */
        rows[i] = sh_rng_u32(rng) % 4 == 0 ? (sh_rng_u32(rng) % 2 == 0 ? 0x80 : 0xff)
                                           : (uint8_t)sh_rng_u32(rng);
    for (size_t b = 0; b < bytes; b += block) {
        for (size_t i = 0; i < n_halves; i++) {
            uint16_t scale = scale_of(rng);
            memcpy(rows + b + at[i], &scale, 2);
        }
    }
    return rows;
}

static uint16_t usual_scale(sh_rng *rng)
{
    float sign = sh_rng_u32(rng) % 8 == 0 ? -1 : 1;
    return sh_f32_to_f16(sign * (0.001f + 0.01f * (float)sh_rng_unit(rng)));
}

/* Zeros, the least subnormal, the largest number, both signs. */
static uint16_t extreme_scale(sh_rng *rng)
{
    static const uint16_t scales[] = {0, 0x8000, 1, 0x8001, 0x03ff, 0x7bff, 0xfbff, 0x3c00};
    return scales[sh_rng_below(rng, SH_COUNT(scales))];
}

static uint16_t any_scale(sh_rng *rng) /* infinities and NaN, too */
{
    return (uint16_t)(sh_rng_u32(rng) % 3 == 0 ? 0x7c00 | sh_rng_u32(rng) : sh_rng_u32(rng));
}

static float *random_x(sh_rng *rng, size_t n)
{
    float *x = exact(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(rng);
    return x;
}

/* One case: W, x and its blocks. */
typedef struct {
    sh_type type;
    size_t out, in, n;
    uint8_t *rows;
    sh_x_block *blocks;
} problem;

static problem problem_make(sh_rng *rng, sh_type type, size_t out, size_t in, size_t n,
                            uint16_t (*scale_of)(sh_rng *rng))
{
    problem p = {.type = type, .out = out, .in = in, .n = n};
    p.rows = random_rows(rng, type, out, in, scale_of);
    float *x = random_x(rng, n * in);
    p.blocks = exact(n * sh_x_stride(in) * sizeof *p.blocks);
    sh_x_quantize_with(&sh_kernels_portable, x, in, n, in, p.blocks);
    free(x);
    return p;
}

static void problem_release(problem *p)
{
    free(p->rows);
    free(p->blocks);
}

/* As sh_pack_groups, by one level. */
static void *pack_with(sh_level level, const problem *p)
{
    size_t row_bytes = sh_type_row_bytes(p->type, p->in);
    size_t bytes = sh_pack_bytes(p->type, (uint32_t)p->out, (uint32_t)p->in);
    uint8_t *packed = aligned(bytes);
    memset(packed, 0xa5, bytes);
    for (size_t o = 0; o < p->out; o += SH_GROUP_ROWS)
        sh_kernels_of(level)->pack_group(
            p->type, p->rows + o * row_bytes, SH_MIN(p->out - o, (size_t)SH_GROUP_ROWS), p->in,
            packed + o / SH_GROUP_ROWS * sh_group_bytes(p->type, p->in));
    return packed;
}

/* y [n, out]; packed may be NULL. */
static float *product(sh_level level, const problem *p, const void *packed)
{
    float *y = exact(p->n * p->out * sizeof *y);
    void *scratch = aligned(sh_product_scratch_bytes((uint32_t)p->in));
    sh_weights w = {p->type, (uint32_t)p->out, (uint32_t)p->in, packed == NULL ? p->rows : NULL,
                    packed};
    sh_product call = {
        .w = &w, .blocks = p->blocks, .n = p->n, .y = y, .ldy = p->out, .add = false};
    for (size_t i = 0; i < p->n * p->out; i++)
        y[i] = 12345.0f;
    sh_product_run_with(sh_kernels_of(level), &call, 0, p->out, scratch);
    free(scratch);
    return y;
}

static bool same_value(float a, float b)
{
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

static void check_same(const problem *p, const float *a, const float *b, const char *what)
{
    for (size_t i = 0; i < p->n * p->out; i++)
        if (!same_value(a[i], b[i]))
            fail_msg("%s: %s in %zu out %zu n %zu: row %zu output %zu is %.9g and %.9g", what,
                     sh_type_get((uint32_t)p->type)->name, p->in, p->out, p->n, i / p->out,
                     i % p->out, (double)a[i], (double)b[i]);
}

/* The sum in double over what the floats of W's rows and x's blocks are. */
static void check_value(sh_level level, const problem *p, const float *y)
{
    float *values = exact(p->out * p->in * sizeof *values);
    sh_row_dequantize(p->type, p->rows, values, p->out * p->in);
    for (size_t r = 0; r < p->n; r++) {
        for (size_t o = 0; o < p->out; o++) {
            double sum = 0, magnitude = 0;
            for (size_t i = 0; i < p->in; i++) {
                const sh_x_block *x = &p->blocks[r * sh_x_stride(p->in) + i / 32];
                double w = (double)values[o * p->in + i], term = w * (double)x->d * x->q[i % 32];
                /* d * code and the minimum are rounded apart: count both, not their difference */
                double range = sh_has_minima(p->type) ? 64 * fabs((double)x->d * x->q[i % 32]) : 0;
                sum += term;
                magnitude += fabs(term) + range;
            }
            double allowed = ((double)p->in / 16 + 8) * 0x1p-24 * magnitude + 1e-30;
            double got = (double)y[r * p->out + o];
            if (!(fabs(got - sum) <= allowed))
                fail_msg("%s %s in %zu out %zu n %zu: row %zu output %zu is %.9g, not %.9g +- %.3g",
                         sh_level_name(level), sh_type_get((uint32_t)p->type)->name, p->in, p->out,
                         p->n, r, o, got, sum, allowed);
        }
    }
    free(values);
}

/* All levels, packed and in place; values against the definition when they are all finite. */
static void check_levels(const problem *p, bool finite)
{
    float *of_fma = NULL;
    for (unsigned i = 0; i < SH_LEVELS; i++) {
        sh_level level = (sh_level)i;
        if (!sh_level_available(level))
            continue;
        void *packed = pack_with(level, p), *plain = pack_with(SH_LEVEL_PORTABLE, p);
        assert_memory_equal(packed, plain,
                            sh_pack_bytes(p->type, (uint32_t)p->out, (uint32_t)p->in));
        free(plain);
        float *y = product(level, p, packed), *in_place = product(level, p, NULL);
        check_same(p, y, in_place, sh_level_name(level));
        free(in_place);
        free(packed);
        if (finite)
            check_value(level, p, y);
        if (of_fma != NULL)
            check_same(p, of_fma, y, "two levels with FMA");
        if (of_fma == NULL && (level != SH_LEVEL_PORTABLE || SH_PORTABLE_FMA))
            of_fma = y;
        else
            free(y);
    }
    free(of_fma);
}

static size_t in_of(sh_type type, size_t k)
{
    return sh_type_get((uint32_t)type)->block_values * k;
}

/* Every number of rows of x, every number of rows of W, a few lengths. */
static void test_shapes(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 1);
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        for (size_t i = 1; i <= 50; i++) {
            size_t n = i <= 40 ? i : 1 + i % 3;
            problem p = problem_make(&rng, types[t], i, in_of(types[t], 1 + i % 7), n, usual_scale);
            check_levels(&p, true);
            problem_release(&p);
        }
    }
}

static void test_extreme_scales(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 2);
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        for (size_t n = 1; n <= 17; n++) {
            problem p = problem_make(&rng, types[t], 33, in_of(types[t], 3), n, extreme_scale);
            check_levels(&p, false);
            problem_release(&p);
            p = problem_make(&rng, types[t], 17, in_of(types[t], 2), n, any_scale);
            check_levels(&p, false);
            problem_release(&p);
        }
    }
}

/* Whole numbers all the way: the exact sum, at every level, with the largest codes and x. */
static void test_exact(void **state)
{
    (void)state;
    enum { OUT = 19, N = 18 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 3);
    for (unsigned l = 0; l < SH_LEVELS; l++) {
        for (size_t t = 0; t < 2 && sh_level_available((sh_level)l); t++) {
            size_t in = 32 * (1 + t + l), at[2], row_bytes = sh_type_row_bytes(types[t], in);
            problem p = problem_make(&rng, types[t], OUT, in, N, usual_scale);
            float *values = exact(OUT * in * sizeof *values);
            half_places(types[t], at);
            for (size_t b = 0; b < OUT * row_bytes;
                 b += sh_type_get((uint32_t)types[t])->block_bytes)
                memcpy(p.rows + b, &(uint16_t){0x3c00}, 2);
            sh_row_dequantize(types[t], p.rows, values, OUT * in);
            for (size_t b = 0; b < N * sh_x_stride(in); b++) {
                float x[32];
                for (size_t i = 0; i < 32; i++)
                    x[i] = i == 0 || sh_rng_u32(&rng) % 2 == 0
                               ? (sh_rng_u32(&rng) % 2 == 0 ? 127 : -127)
                               : (float)((int)sh_rng_below(&rng, 255) - 127);
                sh_x_quantize_with(sh_kernels_of((sh_level)l), x, 32, 1, 32, &p.blocks[b]);
                assert_true(p.blocks[b].d == 1);
            }
            float *y = product((sh_level)l, &p, NULL);
            for (size_t i = 0; i < (size_t)OUT * N; i++) {
                double sum = 0;
                for (size_t k = 0; k < in; k++)
                    sum += (double)values[i % OUT * in + k] *
                           p.blocks[i / OUT * sh_x_stride(in) + k / 32].q[k % 32];
                assert_true((double)y[i] == sum);
            }
            free(y);
            free(values);
            problem_release(&p);
        }
    }
}

/* Any ranges, a wider y, and y += give the bits of the whole; nothing else is written. */
static void test_ranges_and_add(void **state)
{
    (void)state;
    enum { OUT = 83, N = 21, LDY = 90 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 4);
    for (size_t round = 0; round < 3 * SH_COUNT(types); round++) {
        sh_type type = types[round % SH_COUNT(types)];
        problem p =
            problem_make(&rng, type, OUT, in_of(type, 2), 1 + sh_rng_below(&rng, N), usual_scale);
        void *scratch = aligned(sh_product_scratch_bytes((uint32_t)p.in));
        for (unsigned l = 0; l < SH_LEVELS; l++) {
            if (!sh_level_available((sh_level)l))
                continue;
            float *whole = product((sh_level)l, &p, NULL), y[N * LDY];
            void *packed = round % 2 == 0 ? pack_with((sh_level)l, &p) : NULL;
            sh_weights w = {type, OUT, (uint32_t)p.in, p.rows, packed};
            sh_product call = {
                .w = &w, .blocks = p.blocks, .n = p.n, .y = y, .ldy = LDY, .add = true};
            for (size_t i = 0; i < (size_t)N * LDY; i++)
                y[i] = (float)i;
            for (size_t begin = 0, end; begin < OUT; begin = end) {
                size_t step = 16 * (1 + (size_t)sh_rng_below(&rng, 3));
                end = SH_MIN((size_t)OUT, begin + step);
                sh_product_run_with(sh_kernels_of((sh_level)l), &call, begin, end, scratch);
            }
            for (size_t i = 0; i < (size_t)N * LDY; i++) {
                bool of_y = i / LDY < p.n && i % LDY < OUT;
                float expected = (float)i + (of_y ? whole[i / LDY * OUT + i % LDY] : 0);
                if (!same_value(y[i], expected))
                    fail_msg("%s %s: y[%zu] is %.9g, not %.9g", sh_level_name((sh_level)l),
                             sh_type_get((uint32_t)type)->name, i, (double)y[i], (double)expected);
            }
            free(whole);
            free(packed);
        }
        free(scratch);
        problem_release(&p);
    }
}

/* More than a panel of groups: a second level cache's worth. */
static void test_panels(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 5);
    problem p = problem_make(&rng, SH_TYPE_Q8_0, 70, 16384, 17, usual_scale);
    assert_true(sh_pack_bytes(p.type, 70, 16384) > 2 * SH_PANEL_BYTES);
    check_levels(&p, false); /* the definition in double would take long */
    problem_release(&p);
}

/* A row's result is the same bits whatever rows are with it; NaN stays in its own row. */
static void test_row_independence(void **state)
{
    (void)state;
    enum { N = 37, OUT = 17 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 6);
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        problem p = problem_make(&rng, types[t], OUT, in_of(types[t], 2), N, usual_scale);
        float *bad = random_x(&rng, p.in);
        bad[p.in / 2] = t % 2 == 0 ? NAN : -INFINITY;
        sh_x_quantize_with(&sh_kernels_portable, bad, p.in, 1, p.in,
                           p.blocks + 5 * sh_x_stride(p.in));
        free(bad);
        for (unsigned l = 0; l < SH_LEVELS; l++) {
            if (!sh_level_available((sh_level)l))
                continue;
            float *whole = product((sh_level)l, &p, NULL);
            for (size_t i = 0; i < (size_t)N * OUT; i++)
                assert_int_equal(isnan(whole[i]) != 0, i / OUT == 5);
            for (size_t r = 0; r < N; r++) {
                problem one = p;
                one.n = 1;
                one.blocks = p.blocks + r * sh_x_stride(p.in);
                float *y = product((sh_level)l, &one, NULL);
                check_same(&one, y, whole + r * OUT, "a row alone");
                free(y);
            }
            free(whole);
        }
        problem_release(&p);
    }
}

/* A NaN scale in W spoils its own output only; x of zeros gives zero, of 1e30 no infinity. */
static void test_extremes(void **state)
{
    (void)state;
    enum { OUT = 21, BAD = 9 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 8);
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        size_t in = in_of(types[t], 2), at[2];
        problem p = problem_make(&rng, types[t], OUT, in, 2, usual_scale);
        float *x = exact(in * sizeof *x);
        half_places(types[t], at);
        memcpy(p.rows + BAD * sh_type_row_bytes(types[t], in) + at[0], &(uint16_t){0x7e00}, 2);
        for (size_t i = 0; i < in; i++)
            x[i] = i % 2 == 0 ? 1e30f : -3e29f;
        sh_x_quantize_with(&sh_kernels_portable, x, in, 1, in, p.blocks);
        memset(x, 0, in * sizeof *x);
        sh_x_quantize_with(&sh_kernels_portable, x, in, 1, in, p.blocks + sh_x_stride(in));
        free(x);
        for (unsigned l = 0; l < SH_LEVELS; l++) {
            if (!sh_level_available((sh_level)l))
                continue;
            float *y = product((sh_level)l, &p, NULL);
            for (size_t o = 0; o < OUT; o++) {
                assert_int_equal(isfinite(y[o]) != 0, o != BAD);
                assert_int_equal(y[OUT + o] == 0, o != BAD);
            }
            free(y);
        }
        problem_release(&p);
    }
}

/* All levels make the same blocks, of what is at hand and of what is at the edges. */
static void test_x_quantize(void **state)
{
    (void)state;
    enum { ROWS = 400, IN = 96, LDX = 101 };
    static const float edges[] = {0, -0.0f, 1e-40f, -1e-36f, 1e-35f, 3e38f, -3e38f, 0.5f, 1e-30f};
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 7);
    float *x = random_x(&rng, (size_t)ROWS * LDX);
    for (size_t r = 0; r < ROWS; r++) {
        float scale = powf(10, (float)sh_rng_below(&rng, 60) - 30);
        for (size_t i = 0; i < IN; i++) {
            x[r * LDX + i] *= scale;
            if (r % 4 == 0)
                x[r * LDX + i] = edges[sh_rng_below(&rng, SH_COUNT(edges))];
            if (r % 8 == 1) /* halves: to the even one */
                x[r * LDX + i] = i % 32 == 0 ? 127 : (float)sh_rng_below(&rng, 254) * 0.5f - 63;
        }
        if (r % 16 == 2)
            x[r * LDX + sh_rng_below(&rng, IN)] = r % 32 == 2 ? NAN : INFINITY;
    }
    sh_x_block *first = exact(ROWS * IN / 32 * sizeof *first), *other = exact(ROWS * IN / 32 * 64);
    sh_x_quantize_with(&sh_kernels_portable, x, LDX, ROWS, IN, first);
    for (size_t i = 0; i < ROWS * IN / 32; i++) {
        const float *of_block = x + i / 3 * LDX + i % 3 * 32;
        int sums[2] = {0, 0};
        for (size_t k = 0; k < 32; k++)
            sums[k / 16] += first[i].q[k];
        assert_int_equal(first[i].start8, -8 * (sums[0] + sums[1]));
        assert_int_equal(first[i].start16, -16 * (sums[0] + sums[1]));
        assert_int_equal(first[i].start128, -128 * (sums[0] + sums[1]));
        assert_int_equal(first[i].start32[0], -32 * sums[0]);
        assert_int_equal(first[i].start32[1], -32 * sums[1]);
        assert_int_equal(first[i].zero, 0);
        assert_true(same_value(first[i].d_sum, first[i].d * (float)(sums[0] + sums[1])));
        for (size_t k = 0; k < 32 && isfinite(first[i].d); k++) /* within half a step */
            assert_true(fabs((double)of_block[k] - (double)first[i].d * first[i].q[k]) <=
                        0.50001 * (double)first[i].d + 1e-35);
    }
    for (unsigned l = 0; l < SH_LEVELS; l++) {
        if (!sh_level_available((sh_level)l))
            continue;
        memset(other, 0xa5, ROWS * IN / 32 * sizeof *other);
        sh_x_quantize_with(sh_kernels_of((sh_level)l), x, LDX, ROWS, IN, other);
        for (size_t i = 0; i < ROWS * IN / 32; i++)
            if (memcmp(&first[i], &other[i], sizeof *first) != 0)
                fail_msg("%s: block %zu: d %.9g, not %.9g", sh_level_name((sh_level)l), i,
                         (double)other[i].d, (double)first[i].d);
    }
    free(x);
    free(first);
    free(other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_extreme_scales),
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_ranges_and_add),
        cmocka_unit_test(test_row_independence),
        cmocka_unit_test(test_panels),
        cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_x_quantize),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
