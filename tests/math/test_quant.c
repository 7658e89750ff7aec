/* Types, half floats and block formats. Run once for each level (SHOAL_KERNEL). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/rng.h"
#include "shared/math/quant.h"

#define SEED 20260201

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static void test_types(void **state)
{
    (void)state;
    static const char *const names[] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                        "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};
    static const size_t bytes_of_256[] = {1024, 512, 512, 272, 144, 160, 176, 192, 144, 176, 210};
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        sh_type type;
        assert_int_equal(sh_type_parse(names[i], &type, NULL), SH_OK);
        assert_string_equal(sh_type_get((uint32_t)type)->name, names[i]);
        assert_int_equal(sh_type_row_bytes(type, 256), bytes_of_256[i]);
    }
    sh_type type = SH_TYPE_F32;
    sh_error err = {0};
    assert_int_equal(sh_type_parse("q8_0", &type, NULL), SH_OK);
    assert_int_equal(type, SH_TYPE_Q8_0);
    assert_int_equal(sh_type_parse("Q8", &type, &err), SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "Q8"));
    assert_int_equal(type, SH_TYPE_Q8_0); /* untouched on error */
    assert_null(sh_type_get(10));
    assert_int_equal(sh_type_row_bytes(SH_TYPE_Q8_0, 172), 0);
    assert_int_equal(sh_type_row_bytes(SH_TYPE_F32, SIZE_MAX), 0);
}

/* Every half there is survives the way to float and back. */
static void test_half_round_trip(void **state)
{
    (void)state;
    for (uint32_t h = 0; h <= 0xffff; h++) {
        float x = sh_f16_to_f32((uint16_t)h);
        uint16_t back = sh_f32_to_f16(x);
        if (isnan(x)) {
            assert_true((h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0);
            assert_int_equal(back, h | 0x200);
            continue;
        }
        assert_int_equal(back, h);
        if ((h & 0x7c00) != 0x7c00) { /* the value itself, by its definition */
            int exponent = (int)(h >> 10 & 31);
            double mantissa = (double)(h & 0x3ff) / 1024 + (exponent != 0);
            double value = ldexp(mantissa, (exponent == 0 ? 1 : exponent) - 15);
            assert_true((double)fabsf(x) == value);
        }
    }
    assert_true(isinf(sh_f16_to_f32(0x7c00)) && sh_f16_to_f32(0xfc00) < 0);
}

/* Between two halves the nearer is taken, and the even one in the middle. */
static void test_half_rounding(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7bff; h++) {
        double low = (double)sh_f16_to_f32((uint16_t)h);
        double high = (double)sh_f16_to_f32((uint16_t)(h + 1));
        float middle = (float)((low + high) / 2); /* exact in float */
        uint32_t even = h % 2 == 0 ? h : h + 1;
        assert_int_equal(sh_f32_to_f16(middle), even);
        assert_int_equal(sh_f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(sh_f32_to_f16(nextafterf(middle, INFINITY)), h + 1);
        assert_int_equal(sh_f32_to_f16(-middle), even | 0x8000);
    }
    assert_int_equal(sh_f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(sh_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(sh_f32_to_f16(1e30f), 0x7c00);
    assert_int_equal(sh_f32_to_f16(-INFINITY), 0xfc00);
    assert_int_equal(sh_f32_to_f16(1e-30f), 0);
    assert_int_equal(sh_f32_to_f16(-0.0f), 0x8000);
}

static void fill_normal(sh_rng *rng, float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(rng) * scale;
}

/* Reading back what was written is within the format's step. */
static void test_round_trip(void **state)
{
    (void)state;
    enum { N = 96 };
    static const float scales[] = {1e-4f, 0.05f, 1, 300};
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 1);
    for (int round = 0; round < 200; round++) {
        float x[N], y[N];
        uint8_t row[N * 4];
        fill_normal(&rng, x, N, scales[round % 4]);
        sh_row_quantize(SH_TYPE_F32, x, row, N);
        sh_row_dequantize(SH_TYPE_F32, row, y, N);
        assert_memory_equal(x, y, sizeof x);
        sh_row_quantize(SH_TYPE_F16, x, row, N - 3); /* with a tail */
        sh_row_dequantize(SH_TYPE_F16, row, y, N - 3);
        for (size_t i = 0; i < N - 3; i++)
            assert_true(y[i] == sh_f16_to_f32(sh_f32_to_f16(x[i])));
        for (size_t t = 0; t < 2; t++) {
            sh_type type = t == 0 ? SH_TYPE_Q8_0 : SH_TYPE_Q4_0;
            sh_row_quantize(type, x, row, N);
            sh_row_dequantize(type, row, y, N);
            for (size_t b = 0; b < N; b += 32) {
                float largest = 0;
                for (size_t i = b; i < b + 32; i++)
                    largest = fmaxf(largest, fabsf(x[i]));
                /* half a step; Q4_0 clips +8 to +7, a whole step. 2^-11 of the half scale, and its
                 * absolute 2^-25 below the least normal half, count for each of the steps. */
                float step = largest / (t == 0 ? 127 : 8), steps = t == 0 ? 127 : 8;
                float bound = step * (t == 0 ? 0.5f : 1) + largest * 0x1p-11f + steps * 0x1p-25f;
                for (size_t i = b; i < b + 32; i++)
                    if (fabsf(x[i] - y[i]) > bound * 1.0001f)
                        fail_msg("type %d value %zu: %g became %g, allowed %g", (int)type, i,
                                 (double)x[i], (double)y[i], (double)bound);
            }
        }
    }
}

/* Q8_0 rounds half away from zero, as roundf does. */
static void test_q8_0_rounding(void **state)
{
    (void)state;
    float x[32] = {127, 0.5f, -0.5f, 1.5f, -1.5f, 2.5f, 0.49999997f, -0.49999997f, 126.5f, -126.5f};
    static const int8_t expected[] = {127, 1, -1, 2, -2, 3, 0, 0, 127, -127};
    sh_block_q8_0 block;
    sh_row_quantize(SH_TYPE_Q8_0, x, &block, 32);
    assert_true(sh_f16_to_f32(block.d) == 1);
    for (size_t i = 0; i < SH_COUNT(expected); i++)
        assert_int_equal(block.qs[i], expected[i]);
}

/* Blocks of zeros, of subnormals, of huge values, of NaN. */
static void test_extremes(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        uint8_t row[34];
        float x[32] = {0}, y[32];
        sh_row_quantize(types[t], x, row, 32);
        sh_row_dequantize(types[t], row, y, 32);
        for (size_t i = 0; i < 32; i++)
            assert_true(y[i] == 0);
        for (size_t i = 0; i < 32; i++)
            x[i] = i % 2 == 0 ? 1e-40f : -1e-42f;
        sh_row_quantize(types[t], x, row, 32);
        sh_row_dequantize(types[t], row, y, 32);
        for (size_t i = 0; i < 32; i++)
            assert_true(y[i] == 0);
        for (size_t i = 0; i < 32; i++) /* the half scale overflows to infinity: no crash */
            x[i] = 3e38f;
        sh_row_quantize(types[t], x, row, 32);
        for (size_t bad = 0; bad < 2; bad++) {
            memset(x, 0, sizeof x);
            x[17] = bad == 0 ? NAN : -INFINITY;
            sh_row_quantize(types[t], x, row, 32);
            sh_row_dequantize(types[t], row, y, 32);
            for (size_t i = 0; i < 32; i++)
                assert_true(isnan(y[i]));
        }
    }
}

static void test_bf16(void **state)
{
    (void)state;
    static const uint16_t halves[] = {0x3f80, 0xc000, 0x0001, 0x7f80};
    float y[4];
    sh_row_dequantize(SH_TYPE_BF16, halves, y, 4);
    assert_true(y[0] == 1 && y[1] == -2 && isinf(y[3]));
    assert_int_equal(bits_of(y[2]), 0x10000);
}

/* To nearest even; what is written is read back; NaN stays NaN. */
static void test_bf16_rounding(void **state)
{
    (void)state;
    static const struct {
        uint32_t bits;
        uint16_t expected;
    } cases[] = {
        {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}, {0x3f807fff, 0x3f80},
        {0xbf818000, 0xbf82}, {0x7f7fffff, 0x7f80}, {0x00008000, 0x0000}, {0x00018000, 0x0002},
        {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0xffc12345, 0xffc1}, {0x80000000, 0x8000},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        float x;
        uint16_t h;
        memcpy(&x, &cases[i].bits, sizeof x);
        sh_row_quantize(SH_TYPE_BF16, &x, &h, 1);
        assert_int_equal(h, cases[i].expected);
    }
    for (uint32_t h = 0; h <= 0xffff; h++) {
        uint16_t half = (uint16_t)h, back;
        float x;
        sh_row_dequantize(SH_TYPE_BF16, &half, &x, 1);
        sh_row_quantize(SH_TYPE_BF16, &x, &back, 1);
        assert_int_equal(back, isnan(x) ? h | 64 : h);
    }
}

/* Q4_1, Q5_0 and Q5_1 against their definition, one value at a time, bit for bit. */
static void test_q4_1_q5(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_Q4_1, SH_TYPE_Q5_0, SH_TYPE_Q5_1};
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 3);
    for (int round = 0; round < 150; round++) {
        sh_type type = types[round % 3];
        size_t at = type == SH_TYPE_Q5_0 ? 2 : 4, high = type == SH_TYPE_Q4_1 ? 0 : 4;
        uint8_t b[24];
        float y[32];
        for (size_t i = 0; i < sizeof b; i++)
            b[i] = (uint8_t)sh_rng_u32(&rng);
        uint16_t d = sh_f32_to_f16(0.01f), m = sh_f32_to_f16(-0.07f);
        memcpy(b, &d, 2);
        if (type != SH_TYPE_Q5_0)
            memcpy(b + 2, &m, 2);
        sh_row_dequantize(type, b, y, 32);
        for (size_t i = 0; i < 32; i++) {
            uint8_t both = b[at + high + i % 16];
            int q = i < 16 ? both & 15 : both >> 4;
            if (high > 0)
                q |= (b[at + i / 8] >> i % 8 & 1) << 4;
            float product = sh_f16_to_f32(d) * (float)(type == SH_TYPE_Q5_0 ? q - 16 : q);
            float sum = product + sh_f16_to_f32(m);
            assert_int_equal(bits_of(y[i]), bits_of(type == SH_TYPE_Q5_0 ? product : sum));
        }
    }
}

/* K-quants against their definition, one value at a time. */
static void test_k_quants(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 2);
    for (int round = 0; round < 50; round++) {
        uint8_t b[210];
        float y[256];
        for (size_t i = 0; i < sizeof b; i++)
            b[i] = (uint8_t)sh_rng_u32(&rng);
        uint16_t d = sh_f32_to_f16(0.01f), dmin = sh_f32_to_f16(0.02f);
        memcpy(b, &d, 2);
        memcpy(b + 2, &dmin, 2);
        sh_row_dequantize(SH_TYPE_Q4_K, b, y, 256);
        for (size_t i = 0; i < 256; i++) {
            size_t j = i / 32;
            const uint8_t *s = b + 4;
            int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
            int min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4;
            uint8_t both = b[16 + i / 64 * 32 + i % 32];
            int q = j % 2 == 0 ? both & 15 : both >> 4;
            double value = (double)sh_f16_to_f32(d) * scale * q - (double)sh_f16_to_f32(dmin) * min;
            assert_true(fabs((double)y[i] - value) <= 1e-6);
        }
        /* Q5_K: the same with 32 bytes of high bits before the low ones */
        uint8_t b5[176];
        memcpy(b5, b, sizeof b5);
        sh_row_dequantize(SH_TYPE_Q5_K, b5, y, 256);
        for (size_t i = 0; i < 256; i++) {
            size_t j = i / 32;
            const uint8_t *s = b5 + 4;
            int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
            int min = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | (s[j] >> 6) << 4;
            uint8_t both = b5[48 + i / 64 * 32 + i % 32];
            int q = (j % 2 == 0 ? both & 15 : both >> 4) | (b5[16 + i % 32] >> j & 1) << 4;
            double value = (double)sh_f16_to_f32(d) * scale * q - (double)sh_f16_to_f32(dmin) * min;
            assert_true(fabs((double)y[i] - value) <= 2e-6);
        }
        memcpy(b + 208, &d, 2);
        sh_row_dequantize(SH_TYPE_Q6_K, b, y, 256);
        for (size_t i = 0; i < 256; i++) {
            size_t half = i / 128, in_half = i % 128, quarter = in_half / 32, l = in_half % 32;
            uint8_t low = b[half * 64 + (quarter % 2) * 32 + l];
            int q = (quarter < 2 ? low & 15 : low >> 4) |
                    (b[128 + half * 32 + l] >> 2 * quarter & 3) << 4;
            double value =
                (double)sh_f16_to_f32(d) * (double)(int8_t)b[192 + i / 16] * (double)(q - 32);
            assert_true(fabs((double)y[i] - value) <= 1e-5);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_types),         cmocka_unit_test(test_half_round_trip),
        cmocka_unit_test(test_half_rounding), cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_q8_0_rounding), cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_bf16),          cmocka_unit_test(test_bf16_rounding),
        cmocka_unit_test(test_q4_1_q5),       cmocka_unit_test(test_k_quants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
