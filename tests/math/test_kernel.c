/* Products with weights of floats, and small ones: every level that the CPU has against the sum in
 * double, and against each other. Also the choice of a level. */
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

static const sh_type all_types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16};

/* Exactly the size needed, so that a sanitizer sees what is read past them. */
static void *exact(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    assert_non_null(memory);
    return memory;
}

static void *random_weights(sh_rng *rng, sh_type type, size_t out, size_t in)
{
    size_t n = out * in;
    uint8_t *w = exact(out * sh_type_row_bytes(type, in));
    float *x = exact(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(rng) * 0.1f;
    sh_row_quantize(type, x, w, n);
    free(x);
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
    sh_weights weights = {.type = type, .out = (uint32_t)out, .in = (uint32_t)in, .rows = w};
    sh_product p = {.w = &weights, .x = x, .ldx = in, .n = n, .y = y, .ldy = out};
    for (size_t i = 0; i < n * out; i++)
        y[i] = 12345.0f;
    sh_product_run_with(sh_kernels_of(level), &p, 0, out, NULL);
    return y;
}

/* The product in double, and the sum of magnitudes, to which rounding errors are proportional. */
static void reference(sh_type type, const void *w, size_t out, size_t in, const float *x, size_t n,
                      double *y, double *magnitude)
{
    float *values = exact(out * in * sizeof *values);
    sh_row_dequantize(type, w, values, out * in);
    for (size_t r = 0; r < n; r++) {
        for (size_t o = 0; o < out; o++) {
            y[r * out + o] = magnitude[r * out + o] = 0;
            for (size_t i = 0; i < in; i++) {
                double term = (double)values[o * in + i] * (double)x[r * in + i];
                y[r * out + o] += term;
                magnitude[r * out + o] += fabs(term);
            }
        }
    }
    free(values);
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
    const float *of_fma = SH_PORTABLE_FMA ? y[SH_LEVEL_PORTABLE] : NULL;
    for (unsigned level = SH_LEVEL_PORTABLE + 1; level < SH_LEVELS; level++) {
        if (of_fma != NULL && y[level] != NULL)
            assert_memory_equal(of_fma, y[level], n * out * sizeof *of_fma);
        if (of_fma == NULL)
            of_fma = y[level];
    }
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
        for (size_t n = 1; n <= 18; n++)
            check_random(&rng, all_types[t], 1 + (n * 11) % 40, 1 + (n * 29) % 300, n);
        check_random(&rng, all_types[t], 5, 20000, 9); /* rows larger than a chunk of the cache */
        check_random(&rng, all_types[t], 7, 64, 150);  /* several chunks of rows */
        for (size_t in = 1; in <= 70; in++)            /* every tail */
            check_random(&rng, all_types[t], 3, in, 1 + in % 9);
    }
}

/* Ranges of columns, strides of x and y, and y += give the bits of the whole; nothing else is
 * written. */
static void test_ranges_and_add(void **state)
{
    (void)state;
    enum { OUT = 53, IN = 77, N = 19, LDX = 80, LDY = 60 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 6);
    for (size_t t = 0; t < SH_COUNT(all_types); t++) {
        void *w = random_weights(&rng, all_types[t], OUT, IN);
        float *x = random_rows(&rng, N, IN), *wide = random_rows(&rng, N, LDX), y[N * LDY];
        sh_weights weights = {.type = all_types[t], .out = OUT, .in = IN, .rows = w};
        sh_product p = {
            .w = &weights, .x = wide, .ldx = LDX, .n = N, .y = y, .ldy = LDY, .add = true};
        for (size_t r = 0; r < N; r++)
            memcpy(wide + r * LDX, x + r * IN, IN * sizeof *x);
        for (unsigned l = 0; l < SH_LEVELS; l++) {
            if (!sh_level_available((sh_level)l))
                continue;
            float *whole = product((sh_level)l, all_types[t], w, OUT, IN, x, N);
            for (size_t i = 0; i < (size_t)N * LDY; i++)
                y[i] = (float)i;
            for (size_t begin = 0; begin < OUT; begin += 32)
                sh_product_run_with(sh_kernels_of((sh_level)l), &p, begin,
                                    SH_MIN((size_t)OUT, begin + 32), NULL);
            for (size_t i = 0; i < (size_t)N * LDY; i++) {
                float more = i % LDY < OUT ? whole[i / LDY * OUT + i % LDY] : 0;
                assert_true(y[i] == (float)i + more);
            }
            free(whole);
        }
        free(w);
        free(x);
        free(wide);
    }
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
        size_t in = 77;
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

/* NaN spoils its own row of x only, and its own row of W; zeros and subnormals are numbers. */
static void test_extremes(void **state)
{
    (void)state;
    enum { ROWS = 4, IN = 45, OUT = 9 };
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 4);
    for (size_t t = 0; t < SH_COUNT(all_types); t++) {
        uint8_t *w = random_weights(&rng, all_types[t], OUT, IN);
        float *x = random_rows(&rng, ROWS, IN), nan[IN] = {[7] = NAN};
        size_t row_bytes = sh_type_row_bytes(all_types[t], IN);
        sh_row_quantize(all_types[t], nan, w + 4 * row_bytes, IN);
        x[0 * IN + 40] = NAN;
        for (size_t i = 0; i < IN; i++) {
            x[1 * IN + i] = 0;
            x[2 * IN + i] = i % 3 == 0 ? 1e-40f : -3e-39f;
        }
        for (unsigned level = 0; level < SH_LEVELS; level++) {
            if (!sh_level_available((sh_level)level))
                continue;
            float *y = product((sh_level)level, all_types[t], w, OUT, IN, x, ROWS);
            for (size_t i = 0; i < (size_t)ROWS * OUT; i++) {
                assert_int_equal(isnan(y[i]) != 0, i / OUT == 0 || i % OUT == 4);
                assert_true(i / OUT != 1 || i % OUT == 4 || y[i] == 0);
                assert_true(y[i] != 12345.0f);
            }
            free(y);
        }
        free(w);
        free(x);
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

/* Once a level is in use, it stays; a name that is none is refused with those that are. */
static void test_force(void **state)
{
    (void)state;
    sh_error err = {0};
    const char *in_use = sh_kernel_level();
    assert_int_equal(sh_kernel_force(NULL, &err), SH_OK);
    assert_int_equal(sh_kernel_force(in_use, &err), SH_OK);
    assert_int_equal(sh_kernel_force("sse9", &err), SH_ERR_USAGE);
    assert_non_null(strstr(err.text, "sse9"));
    assert_non_null(strstr(err.text, "portable"));
    for (unsigned l = 0; l < SH_LEVELS; l++) {
        const char *name = sh_level_name((sh_level)l);
        sh_status expected = !sh_level_available((sh_level)l) ? SH_ERR_USAGE : SH_ERR_INVALID;
        if (strcmp(name, in_use) != 0)
            assert_int_equal(sh_kernel_force(name, NULL), expected);
    }
    assert_string_equal(sh_kernel_level(), in_use);
}

/* With an argument: forced before anything has used a level, whatever the environment says. */
int main(int argc, char **argv)
{
    if (argc > 1) {
        bool ok = sh_kernel_force(argv[1], NULL) == SH_OK;
        return ok && strcmp(sh_kernel_level(), argv[1]) == 0 ? 0 : 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_level),          cmocka_unit_test(test_random),
        cmocka_unit_test(test_ranges_and_add), cmocka_unit_test(test_row_independence),
        cmocka_unit_test(test_extremes),       cmocka_unit_test(test_dot_axpy),
        cmocka_unit_test(test_force),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
