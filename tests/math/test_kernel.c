/* Every level that the CPU has against an exact or a double reference, and against each other. */
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

#define SEED 20260202

static const sh_type all_types[] = {SH_TYPE_F32,  SH_TYPE_F16,  SH_TYPE_BF16, SH_TYPE_Q8_0,
                                    SH_TYPE_Q4_0, SH_TYPE_Q4_K, SH_TYPE_Q6_K};

/* Blocks of exactly the size needed, so that a sanitizer sees what is read past them. */
static void *exact(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

/* W of the type with random blocks: random bytes where they mean something, sane scales. */
static void *random_weights(sh_rng *rng, sh_type type, size_t out, size_t in)
{
    const sh_type_info *info = sh_type_get((uint32_t)type);
    size_t n = out * in, bytes = out * sh_type_row_bytes(type, in);
    uint8_t *w = exact(bytes);
    if (info->can_write) {
        float *x = exact(n * sizeof *x);
        for (size_t i = 0; i < n; i++)
            x[i] = sh_rng_normal(rng) * 0.1f;
        sh_row_quantize(type, x, w, n);
        free(x);
        return w;
    }
    for (size_t i = 0; i < bytes; i++)
        w[i] = (uint8_t)sh_rng_u32(rng);
    for (size_t b = 0; b < bytes; b += info->block_bytes) {
        uint16_t scale = type == SH_TYPE_BF16
                             ? (uint16_t)(0x3d00 | (sh_rng_u32(rng) & 0x80ffu)) /* about ±0.03 */
                             : sh_f32_to_f16(0.001f + 0.001f * (float)sh_rng_unit(rng));
        memcpy(w + b + (type == SH_TYPE_Q6_K ? 208 : 0), &scale, 2);
        if (type == SH_TYPE_Q4_K)
            memcpy(w + b + 2, &scale, 2);
    }
    return w;
}

static float *random_rows(sh_rng *rng, size_t n, size_t in)
{
    float *x = exact(n * in * sizeof *x);
    for (size_t i = 0; i < n * in; i++)
        x[i] = sh_rng_normal(rng);
    return x;
}

/* y [n, out], malloc'ed. */
static float *product(sh_level level, sh_type type, const void *w, size_t out, size_t in,
                      const float *x, size_t n)
{
    float *y = exact(n * out * sizeof *y);
    void *scratch = sh_alloc_aligned(sh_matmul_scratch_bytes(n, in));
    assert_non_null(scratch);
    sh_float_product p = {.in = in, .out = out, .x = x, .n = n, .y = y, .ldy = out};
    for (size_t i = 0; i < n * out; i++)
        y[i] = 12345.0f;
    sh_matmul_with(sh_kernels_of(level), type, &p, w, scratch);
    free(scratch);
    return y;
}

static bool is_integer_type(sh_type type)
{
    return type == SH_TYPE_Q8_0 || type == SH_TYPE_Q4_0;
}

/* Scales of 1 and whole numbers everywhere: every level has to give the exact sum. */
static void check_exact(sh_level level, sh_rng *rng, sh_type type, size_t out, size_t in, size_t n)
{
    size_t row_bytes = sh_type_row_bytes(type, in),
           block = sh_type_get((uint32_t)type)->block_bytes;
    uint8_t *w = exact(out * row_bytes);
    float *x = exact(n * in * sizeof *x), *values = exact(out * in * sizeof *values);
    const uint16_t one = sh_f32_to_f16(1);
    for (size_t i = 0; i < out * row_bytes; i++)
        w[i] = sh_rng_u32(rng) % 4 == 0 ? 0x80 : (uint8_t)sh_rng_u32(rng); /* many -128 */
    for (size_t b = 0; b < out * row_bytes; b += block)
        memcpy(w + b, &one, 2);
    for (size_t i = 0; i < n * in; i++) /* the first of a block is the largest: its scale is 1 */
        x[i] = i % 32 == 0 || sh_rng_u32(rng) % 4 == 0 ? (sh_rng_u32(rng) % 2 == 0 ? 127 : -127)
                                                       : (float)((int)sh_rng_below(rng, 255) - 127);
    sh_row_dequantize(type, w, values, out * in);
    float *y = product(level, type, w, out, in, x, n);
    for (size_t r = 0; r < n; r++) {
        for (size_t o = 0; o < out; o++) {
            double sum = 0;
            for (size_t i = 0; i < in; i++)
                sum += (double)values[o * in + i] * (double)x[r * in + i];
            if ((double)y[r * out + o] != sum)
                fail_msg("%s type %d in %zu out %zu n %zu: row %zu output %zu is %.9g, not %.9g",
                         sh_level_name(level), (int)type, in, out, n, r, o, (double)y[r * out + o],
                         sum);
        }
    }
    free(w);
    free(x);
    free(values);
    free(y);
}

static void test_integer_exact(void **state)
{
    (void)state;
    static const size_t ins[] = {32, 64, 96, 160, 256, 480};
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 1);
    for (unsigned level = 0; level < SH_LEVELS; level++) {
        if (!sh_level_available((sh_level)level))
            continue;
        for (size_t i = 0; i < SH_COUNT(ins); i++)
            for (size_t n = 1; n <= 19; n++)
                for (size_t t = 0; t < 2; t++)
                    check_exact((sh_level)level, &rng, t == 0 ? SH_TYPE_Q8_0 : SH_TYPE_Q4_0,
                                1 + (n * 7 + i) % 37, ins[i], n);
    }
}

/* The product in double, with x as the kernel sees it (quantized where it does that), and the sum
 * of magnitudes, to which rounding errors are proportional. */
static void reference(sh_type type, const void *w, size_t out, size_t in, const float *x, size_t n,
                      double *y, double *magnitude)
{
    float *values = exact(out * in * sizeof *values);
    double *seen = exact(n * in * sizeof *seen);
    sh_row_dequantize(type, w, values, out * in);
    for (size_t i = 0; i < n * in; i++)
        seen[i] = (double)x[i];
    for (size_t b = 0; is_integer_type(type) && b < n * in; b += 32) {
        float largest = 0;
        for (size_t i = b; i < b + 32; i++)
            largest = fmaxf(largest, fabsf(x[i]));
        for (size_t i = b; i < b + 32; i++)
            seen[i] = (double)(largest / 127.0f) * (double)rintf(x[i] * (127.0f / largest));
    }
    for (size_t r = 0; r < n; r++) {
        for (size_t o = 0; o < out; o++) {
            y[r * out + o] = magnitude[r * out + o] = 0;
            for (size_t i = 0; i < in; i++) {
                double term = (double)values[o * in + i] * seen[r * in + i];
                y[r * out + o] += term;
                magnitude[r * out + o] += fabs(term);
            }
        }
    }
    free(values);
    free(seen);
}

static void check_random(sh_rng *rng, sh_type type, size_t out, size_t in, size_t n)
{
    void *w = random_weights(rng, type, out, in);
    float *x = random_rows(rng, n, in), *y[SH_LEVELS] = {0};
    double *expected = exact(n * out * sizeof *expected),
           *magnitude = exact(n * out * sizeof *expected);
    reference(type, w, out, in, x, n, expected, magnitude);
    for (unsigned level = 0; level < SH_LEVELS; level++) {
        if (!sh_level_available((sh_level)level))
            continue;
        y[level] = product((sh_level)level, type, w, out, in, x, n);
        for (size_t i = 0; i < n * out; i++) {
            double allowed = ((double)in / 16 + 8) * 0x1p-24 * magnitude[i] + 1e-30;
            if (!(fabs((double)y[level][i] - expected[i]) <= allowed))
                fail_msg(
                    "%s type %d in %zu out %zu n %zu: value %zu is %.9g, expected %.9g +- %.3g",
                    sh_level_name((sh_level)level), (int)type, in, out, n, i, (double)y[level][i],
                    expected[i], allowed);
        }
    }
    if (y[SH_LEVEL_AVX2] != NULL && y[SH_LEVEL_AVX512_VNNI] != NULL)
        assert_memory_equal(y[SH_LEVEL_AVX2], y[SH_LEVEL_AVX512_VNNI], n * out * sizeof **y);
    for (unsigned level = 0; level < SH_LEVELS; level++)
        free(y[level]);
    free(w);
    free(x);
    free(expected);
    free(magnitude);
}

static void test_random(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 2);
    for (size_t t = 0; t < SH_COUNT(all_types); t++) {
        size_t block = sh_type_get((uint32_t)all_types[t])->block_values;
        for (size_t n = 1; n <= 18; n++)
            check_random(&rng, all_types[t], 1 + (n * 11) % 40,
                         block == 1 ? 1 + (n * 29) % 300 : block * (1 + n % 5), n);
    }
    check_random(&rng, SH_TYPE_Q8_0, 33, 8192, 9); /* rows larger than a chunk of the cache */
    check_random(&rng, SH_TYPE_F32, 5, 20000, 9);
    check_random(&rng, SH_TYPE_Q8_0, 7, 64, 150); /* several chunks of rows */
    for (size_t in = 1; in <= 70; in++)           /* every tail */
        check_random(&rng, SH_TYPE_F32, 3, in, 1 + in % 9);
}

/* A row's result is the same bits whatever rows are with it. */
static void test_row_independence(void **state)
{
    (void)state;
    enum { ROWS = 21, OUT = 37 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 3);
    for (size_t t = 0; t < SH_COUNT(all_types); t++) {
        sh_type type = all_types[t];
        size_t block = sh_type_get((uint32_t)type)->block_values;
        size_t in = block == 1 ? 77 : block == 32 ? 96 : 512;
        void *w = random_weights(&rng, type, OUT, in);
        float *x = random_rows(&rng, ROWS, in);
        for (unsigned level = 0; level < SH_LEVELS; level++) {
            if (!sh_level_available((sh_level)level))
                continue;
            float *whole = product((sh_level)level, type, w, OUT, in, x, ROWS);
            for (size_t n = 1; n <= 9; n++) {
                for (size_t r = 0; r + n <= ROWS; r += n) {
                    float *part = product((sh_level)level, type, w, OUT, in, x + r * in, n);
                    if (memcmp(part, whole + r * OUT, n * OUT * sizeof *part) != 0)
                        fail_msg("%s type %d: rows %zu to %zu differ when they are alone",
                                 sh_level_name((sh_level)level), (int)type, r, r + n - 1);
                    free(part);
                }
            }
            free(whole);
        }
        free(w);
        free(x);
    }
}

/* NaN and infinity spoil their own row only; zeros and subnormals are numbers. */
static void test_extremes(void **state)
{
    (void)state;
    enum { ROWS = 5, IN = 96, OUT = 9 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 4);
    for (size_t t = 0; t < 2; t++) {
        sh_type type = t == 0 ? SH_TYPE_Q8_0 : SH_TYPE_Q4_0;
        uint8_t *w = random_weights(&rng, type, OUT, IN);
        float *x = random_rows(&rng, ROWS, IN);
        x[0 * IN + 70] = NAN;
        x[1 * IN + 3] = INFINITY;
        for (size_t i = 0; i < IN; i++) {
            x[2 * IN + i] = 0;
            x[3 * IN + i] = i % 3 == 0 ? 1e-40f : -3e-39f;
        }
        for (unsigned level = 0; level < SH_LEVELS; level++) {
            if (!sh_level_available((sh_level)level))
                continue;
            float *y = product((sh_level)level, type, w, OUT, IN, x, ROWS);
            for (size_t o = 0; o < OUT; o++) {
                assert_true(isnan(y[0 * OUT + o]) && isnan(y[1 * OUT + o]));
                assert_true(y[2 * OUT + o] == 0 && y[3 * OUT + o] == 0);
                assert_true(isfinite(y[4 * OUT + o]) && y[4 * OUT + o] != 12345.0f);
            }
            free(y);
        }
        uint16_t nan = 0x7e00; /* a broken scale in W spoils its own output only */
        memcpy(w + 4 * sh_type_row_bytes(type, IN), &nan, 2);
        for (unsigned level = 0; level < SH_LEVELS; level++) {
            if (!sh_level_available((sh_level)level))
                continue;
            float *y = product((sh_level)level, type, w, OUT, IN, x, ROWS);
            for (size_t o = 0; o < OUT; o++)
                assert_int_equal(isnan(y[4 * OUT + o]), o == 4);
            free(y);
        }
        free(w);
        free(x);
    }
}

/* Activations of 1e30 do not overflow a half on the way. */
static void test_large_activations(void **state)
{
    (void)state;
    enum { IN = 64 };
    float w[IN], x[IN];
    sh_block_q8_0 blocks[IN / 32];
    for (size_t i = 0; i < IN; i++) {
        w[i] = 1;
        x[i] = 1e30f;
    }
    sh_row_quantize(SH_TYPE_Q8_0, w, blocks, IN);
    for (unsigned level = 0; level < SH_LEVELS; level++) {
        if (!sh_level_available((sh_level)level))
            continue;
        float *y = product((sh_level)level, SH_TYPE_Q8_0, blocks, 1, IN, x, 1);
        assert_true(fabsf(y[0] / (IN * 1e30f) - 1) < 1e-3f);
        free(y);
    }
}

static void test_dot_axpy(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 5);
    for (size_t n = 0; n < 70; n++) {
        float *a = random_rows(&rng, 1, n), *b = random_rows(&rng, 1, n), *y = exact(n * sizeof *y);
        double sum = 0, magnitude = 0;
        for (size_t i = 0; i < n; i++) {
            sum += (double)a[i] * (double)b[i];
            magnitude += fabs((double)a[i] * (double)b[i]);
        }
        assert_true(fabs((double)sh_dot(a, b, n) - sum) <= 16 * 0x1p-24 * magnitude);
        for (unsigned level = 0; level < SH_LEVELS; level++) {
            if (!sh_level_available((sh_level)level))
                continue;
            memcpy(y, b, n * sizeof *y);
            sh_kernels_of((sh_level)level)->axpy(y, 0.75f, a, n);
            for (size_t i = 0; i < n; i++)
                assert_true(fabs((double)y[i] - ((double)b[i] + 0.75 * (double)a[i])) <=
                            0x1p-23 * (fabs((double)b[i]) + fabs((double)a[i])));
        }
        free(a);
        free(b);
        free(y);
    }
}

static void test_level(void **state)
{
    (void)state;
    const char *wanted = getenv("SHOAL_KERNEL");
    print_message("level %s\n", sh_kernel_level());
    assert_string_equal(sh_kernel_level(), sh_level_name(sh_level_get()));
    assert_true(sh_level_available(SH_LEVEL_PORTABLE));
    if (wanted != NULL && strcmp(wanted, "portable") == 0)
        assert_string_equal(sh_kernel_level(), "portable");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_level),    cmocka_unit_test(test_integer_exact),
        cmocka_unit_test(test_random),   cmocka_unit_test(test_row_independence),
        cmocka_unit_test(test_extremes), cmocka_unit_test(test_large_activations),
        cmocka_unit_test(test_dot_axpy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
