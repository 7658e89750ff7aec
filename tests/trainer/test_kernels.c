/*
 * The element-wise loops against double precision, at lengths around the width of the vectors.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "shared/base/rng.h"
#include "tests/trainer/util.h"
#include "trainer/kernels.h"

#define MOST 70

static void fill(float *x, size_t n, float std, uint64_t seed)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 3);
    for (size_t i = 0; i < n; i++)
        x[i] = std * sh_rng_normal(&rng);
}

static void test_exp(void **state)
{
    (void)state;
    enum { N = 1000 };
    double worst = 0;
    for (int block = 0; block < 175; block++) {
        float x[N], y[N];
        for (int i = 0; i < N; i++)
            y[i] = x[i] = -87.3f + (float)block + (float)i / N;
        tr_exp(y, N);
        for (int i = 0; i < N; i++)
            worst = fmax(worst, fabs((double)y[i] / exp((double)x[i]) - 1));
    }
    if (!(worst < 2e-7))
        fail_msg("the relative error is %g, expected below 2e-7", worst);
    float ends[] = {-INFINITY, -1000.0f, 1000.0f, INFINITY, NAN, 0.0f};
    tr_exp(ends, SH_COUNT(ends));
    must_be_near((double)ends[0], 0, 2e-38);
    must_be_near((double)ends[1], 0, 2e-38);
    assert_true(ends[2] > 1e38f && ends[3] > 1e38f);
    assert_true(isnan(ends[4]));
    assert_true(ends[5] == 1.0f);
}

static void test_softmax_and_cross_entropy(void **state)
{
    (void)state;
    for (size_t n = 1; n <= MOST; n++) {
        float x[MOST], p[MOST + 3], z[MOST];
        double sum = 0, most = -1e9;
        fill(x, n, 5.0f, n);
        memcpy(p, x, sizeof(x));
        memcpy(z, x, sizeof(x));
        for (size_t i = 0; i < n; i++)
            most = fmax(most, (double)x[i]);
        for (size_t i = 0; i < n; i++)
            sum += exp((double)x[i] - most);
        tr_softmax(p, n, n + 3);
        size_t target = n / 2;
        double nll = tr_cross_entropy(z, n, target, 0.5f);
        must_be_near(nll, log(sum) + most - (double)x[target], 1e-6);
        for (size_t i = 0; i < n; i++) {
            double expected = exp((double)x[i] - most) / sum;
            must_be_near((double)p[i], expected, 1e-6);
            must_be_near((double)z[i], 0.5 * (expected - (i == target)), 1e-6);
        }
        for (size_t i = n; i < n + 3; i++)
            assert_true(p[i] == 0.0f);
    }
}

#define VOCABULARY 2500 /* more than the kernel works on at once */

static double softmax_of(const float *x, double t, size_t n, double *p)
{
    double sum = 0, most = -1e9;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, (double)x[i] / t);
    for (size_t i = 0; i < n; i++)
        sum += p[i] = exp((double)x[i] / t - most);
    for (size_t i = 0; i < n; i++)
        p[i] /= sum;
    return log(sum) + most;
}

static void check_distill(const tr_mixture *m, size_t n)
{
    static float x[VOCABULARY], y[VOCABULARY], z[VOCABULARY], v[VOCABULARY];
    static double one[VOCABULARY], p[VOCABULARY], q[VOCABULARY];
    const double t = (double)m->temperature, w = (double)m->weight, scale = (double)m->scale;
    const size_t target = n / 3;
    double kl = 0;
    fill(x, n, 3.0f, n);
    fill(y, n, 3.0f, n + 1);
    memcpy(z, x, sizeof(x));
    memcpy(v, y, sizeof(y));
    const tr_losses losses = tr_distill(m, z, v, n, target);
    const double norm = softmax_of(x, 1, n, one), z_norm = softmax_of(x, t, n, q);
    const double v_norm = softmax_of(y, t, n, p);
    for (size_t i = 0; i < n; i++)
        kl += p[i] * (((double)y[i] - (double)x[i]) / t - v_norm + z_norm);
    must_be_near(losses.cross_entropy, norm - (double)x[target], 2e-6);
    must_be_near(losses.kl, kl, 1e-5);
    for (size_t i = 0; i < n; i++) {
        must_be_near((double)v[i], p[i], 1e-6);
        must_be_near((double)z[i],
                     scale * ((1 - w) * (one[i] - (i == target)) + w * t * (q[i] - p[i])), 3e-6);
    }
}

/* Weights and temperatures, at lengths around that of the vectors and of a vocabulary. */
static void test_distill(void **state)
{
    (void)state;
    static const float temperatures[] = {0.5f, 1.0f, 4.0f};
    for (size_t n = 1; n <= VOCABULARY; n += n < MOST ? 1 : 810)
        for (size_t i = 0; i < SH_COUNT(temperatures); i++)
            check_distill(&(tr_mixture){0.25f * (float)(n % 5), temperatures[i], 0.5f}, n);
}

/* Equal logits teach nothing, exactly; those of a high temperature are matched themselves: the
 * gradient goes to (z - v) / n, both without their means (Hinton et al. 2015, section 2.1). */
static void test_distill_limits(void **state)
{
    (void)state;
    enum { N = 1500 };
    static float x[N], y[N], z[N], v[N];
    double x_mean = 0, y_mean = 0;
    for (float t = 0.25f; t <= 64; t *= 1.7f) {
        fill(x, N, 3.0f, 1);
        memcpy(y, x, sizeof(x));
        const tr_losses losses = tr_distill(&(tr_mixture){1.0f, t, 1.0f}, x, y, N, 7);
        must_be_near(losses.kl, 0, 0);
        for (size_t i = 0; i < N; i++)
            assert_true(x[i] == 0);
    }
    fill(x, N, 1.0f, 1);
    fill(y, N, 1.0f, 2);
    for (size_t i = 0; i < N; i++) {
        x_mean += (double)x[i] / N;
        y_mean += (double)y[i] / N;
    }
    memcpy(z, x, sizeof(x));
    memcpy(v, y, sizeof(y));
    (void)tr_distill(&(tr_mixture){1.0f, 100.0f, (float)N}, z, v, N, 7);
    for (size_t i = 0; i < N; i++)
        must_be_near((double)z[i], (double)x[i] - x_mean - (double)y[i] + y_mean, 0.1);
}

static void test_swiglu(void **state)
{
    (void)state;
    for (size_t n = 1; n <= MOST; n++) {
        float g[MOST], u[MOST], h[MOST], d[MOST], dg[MOST], du[MOST];
        fill(g, n, 4.0f, n);
        fill(u, n, 1.0f, n + 100);
        fill(d, n, 1.0f, n + 200);
        g[0] = n % 2 ? 200.0f : -200.0f; /* beyond the range of the exponential */
        memcpy(dg, g, sizeof(g));
        memcpy(du, u, sizeof(u));
        tr_swiglu(g, u, n, h);
        tr_swiglu_backward(dg, du, d, n);
        for (size_t i = 0; i < n; i++) {
            double x = (double)g[i], q = 1 / (1 + exp(-x));
            must_be_near((double)h[i], x * q * (double)u[i], 3e-6 + 1e-6 * fabs(x));
            must_be_near((double)dg[i], (double)d[i] * (double)u[i] * q * (1 + x * (1 - q)), 1e-5);
            must_be_near((double)du[i], (double)d[i] * x * q, 3e-6 + 1e-6 * fabs(x));
        }
    }
}

static void test_rope_turns_back(void **state)
{
    (void)state;
    enum { HALF = 5, HEADS = 3 };
    float x[2 * HALF * HEADS], y[2 * HALF * HEADS], c[HALF], s[HALF];
    fill(x, SH_COUNT(x), 1.0f, 1);
    for (size_t i = 0; i < HALF; i++) {
        c[i] = cosf((float)i + 1.0f);
        s[i] = sinf((float)i + 1.0f);
    }
    for (size_t halves = 0; halves < 2; halves++) {
        const tr_angles angles = {c, s, HALF, halves == 1};
        const size_t a = halves ? 1 : 2, b = halves ? 1 + HALF : 3; /* the second pair */
        memcpy(y, x, sizeof(x));
        tr_rope(y, &angles, HEADS, 1.0f);
        must_be_near((double)y[a], (double)(x[a] * c[1] - x[b] * s[1]), 1e-6);
        must_be_near((double)y[b], (double)(x[a] * s[1] + x[b] * c[1]), 1e-6);
        tr_rope(y, &angles, HEADS, -1.0f);
        for (size_t i = 0; i < SH_COUNT(x); i++)
            must_be_near((double)y[i], (double)x[i], 1e-6);
    }
}

/* Every length of the ends of their loops, against plain sums in double. */
static void check_skinny(size_t rows, size_t n, size_t rank)
{
    enum { LD = MOST + 3, LDN = 7 };
    float wide[6 * LD], narrow[6 * LDN], p[LDN * MOST], dots[6 * LDN], outer[LDN * MOST];
    float added[6 * LD];
    const tr_skinny s = {rows, n, LD, rank, LDN};
    fill(wide, SH_COUNT(wide), 1.0f, n);
    fill(narrow, SH_COUNT(narrow), 1.0f, n + 1);
    fill(p, SH_COUNT(p), 1.0f, n + 2);
    memcpy(added, wide, sizeof(wide));
    memcpy(dots, narrow, sizeof(narrow));
    tr_dots(&s, wide, p, dots);
    tr_rank_add(&s, added, narrow, p);
    tr_outer(&s, wide, narrow, outer);
    for (size_t i = 0; i < 6; i++) {
        for (size_t k = 0; k < LDN; k++) {
            double sum = 0;
            for (size_t j = 0; j < n; j++)
                sum += (double)wide[i * LD + j] * (double)p[k * n + j];
            if (i < rows && k < rank)
                must_be_near((double)dots[i * LDN + k], sum, 1e-4);
            else
                assert_true(dots[i * LDN + k] == narrow[i * LDN + k]);
        }
        for (size_t j = 0; j < LD; j++) {
            double sum = (double)wide[i * LD + j];
            for (size_t k = 0; i < rows && j < n && k < rank; k++)
                sum += (double)narrow[i * LDN + k] * (double)p[k * n + j];
            must_be_near((double)added[i * LD + j], sum, 1e-5);
        }
    }
    for (size_t k = 0; k < rank; k++)
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t i = 0; i < rows; i++)
                sum += (double)narrow[i * LDN + k] * (double)wide[i * LD + j];
            must_be_near((double)outer[k * n + j], sum, 1e-5);
        }
}

static void test_skinny(void **state)
{
    (void)state;
    for (size_t n = 1; n <= MOST; n++)
        for (size_t rows = 1; rows <= 6; rows++)
            check_skinny(rows, n, 1 + (n + rows) % 6);
}

static void test_sums(void **state)
{
    (void)state;
    static float x[10007];
    double expected = 0;
    fill(x, SH_COUNT(x), 1.0f, 9);
    for (size_t i = 0; i < SH_COUNT(x); i++)
        expected += (double)x[i] * (double)x[i];
    must_be_near(tr_sum_squares(x, SH_COUNT(x)), expected, 1e-6 * expected);
    x[5000] = NAN;
    assert_true(isnan(tr_sum_squares(x, SH_COUNT(x))));
}

/* ---- moments in 8 bits ---- */

/* What code c of `bits` bits stands for, of a block whose scale is 1. */
static double code_value(unsigned c, int bits)
{
    int k = 0;
    if (c == 0)
        return 0;
    while (c >> (k + 1))
        k++;
    return pow(10, k + 1 - bits) * (0.1 + 0.9 * (c - (1u << k)) / (1u << k));
}

static void test_codes(void **state)
{
    (void)state;
    uint8_t codes[TR_BLOCK];
    float first[TR_BLOCK], second[TR_BLOCK];
    for (size_t i = 0; i < TR_BLOCK; i++)
        codes[i] = (uint8_t)i;
    tr_decode_first(codes, 2.0f, TR_BLOCK, first);
    tr_decode_second(codes, 2.0f, TR_BLOCK, second);
    for (unsigned i = 0; i < TR_BLOCK; i++) {
        const double m = 2 * code_value(i % 128, 7) * (i < 128 ? 1 : -1);
        const double v = pow(2 * code_value(i, 8), 2);
        must_be_near((double)first[i], m, 1e-6 * fabs(m));
        must_be_near((double)second[i], v, 1e-6 * v);
    }
}

/* The code below y >= 0 of a block whose scale is 1. */
static unsigned code_below(double y, int bits)
{
    unsigned c = 0;
    while (c + 1 < 1u << bits && code_value(c + 1, bits) <= y)
        c++;
    return c;
}

/* ours must be of a code beside theirs; relative rounding of floats apart. */
static void must_be_beside(double ours, double theirs, double scale, int bits, double least)
{
    const double y = fmax(fabs(theirs) / scale, least);
    const unsigned below = code_below(y * (1 - 1e-5), bits),
                   above = code_below(y * (1 + 1e-5), bits);
    const double low = scale * code_value(below, bits) * (1 - 1e-5);
    const unsigned next = SH_MIN(above + 1, (1u << bits) - 1);
    const double high = scale * code_value(next, bits) * (1 + 1e-5);
    if (!(fabs(ours) >= low && fabs(ours) <= high))
        fail_msg("%.9g became %.9g, expected from %.9g to %.9g", theirs, ours, low, high);
}

/* Of every size and of values over ten decades, a value becomes one of the two codes beside it, the
 * largest itself. */
static void test_coding_error(void **state)
{
    (void)state;
    for (size_t n = 1; n <= TR_BLOCK; n++) {
        float m[TR_BLOCK], v[TR_BLOCK], back_m[TR_BLOCK], back_v[TR_BLOCK], most_m = 0, most_v = 0;
        uint8_t codes[TR_BLOCK];
        fill(m, n, 3e-4f, n);
        for (size_t i = 0; i < n; i++) {
            m[i] *= powf(10.0f, -(float)(i % 11));
            v[i] = m[i] * m[i] * 0.3f;
            most_m = fmaxf(most_m, fabsf(m[i]));
            most_v = fmaxf(most_v, v[i]);
        }
        const double scale_m = (double)tr_encode_first(m, (uint32_t)n, n, codes);
        tr_decode_first(codes, (float)scale_m, n, back_m);
        const double scale_v = (double)tr_encode_second(v, (uint32_t)n, n, codes);
        tr_decode_second(codes, (float)scale_v, n, back_v);
        for (size_t i = 0; i < n; i++) {
            must_be_beside((double)back_m[i], (double)m[i], scale_m, 7, 0);
            assert_true(back_m[i] == 0 || (back_m[i] < 0) == (m[i] < 0));
            must_be_beside(sqrt((double)back_v[i]), sqrt((double)v[i]), scale_v, 8, 1e-7);
            if (fabsf(m[i]) == most_m)
                must_be_near((double)back_m[i], (double)m[i], 0.008 * (double)most_m);
            if (v[i] == most_v)
                must_be_near((double)back_v[i], (double)v[i], 0.016 * (double)most_v);
        }
    }
}

/* The mean over many keys is the value; the same key gives the same codes. */
static void test_coding_mean(void **state)
{
    (void)state;
    enum { KEYS = 4000 };
    float m[TR_BLOCK], v[TR_BLOCK], back[TR_BLOCK];
    double sum_m[TR_BLOCK] = {0}, sum_v[TR_BLOCK] = {0}, scale_m = 0, scale_v = 0;
    uint8_t codes[TR_BLOCK], again[TR_BLOCK];
    sh_rng rng;
    fill(m, TR_BLOCK, 1.0f, 5);
    sh_rng_init(&rng, 1, 2, 3);
    for (size_t i = 0; i < TR_BLOCK; i++) {
        m[i] *= powf(10.0f, -(float)(i % 6));
        v[i] = m[i] * m[i];
    }
    for (size_t k = 0; k < KEYS; k++) {
        const uint32_t key = sh_rng_u32(&rng);
        scale_m = (double)tr_encode_first(m, key, TR_BLOCK, codes);
        (void)tr_encode_first(m, key, TR_BLOCK, again);
        assert_memory_equal(codes, again, TR_BLOCK);
        tr_decode_first(codes, (float)scale_m, TR_BLOCK, back);
        for (size_t i = 0; i < TR_BLOCK; i++)
            sum_m[i] += (double)back[i] / KEYS;
        scale_v = (double)tr_encode_second(v, key, TR_BLOCK, codes);
        tr_decode_second(codes, (float)scale_v, TR_BLOCK, back);
        for (size_t i = 0; i < TR_BLOCK; i++)
            sum_v[i] += sqrt((double)back[i]) / KEYS;
    }
    for (size_t i = 0; i < TR_BLOCK; i++) {
        /* Of two values a gap apart the standard deviation is half a gap at most; 5 of the mean's.
         */
        const double y = fabs((double)m[i]);
        const unsigned c = SH_MIN(code_below(y / scale_m, 7), 126u);
        const unsigned d = SH_MIN(code_below(y / scale_v, 8), 254u);
        const double gap_m = scale_m * (code_value(c + 1, 7) - code_value(c, 7));
        const double gap_v = scale_v * (code_value(d + 1, 8) - code_value(d, 8));
        must_be_near(sum_m[i], (double)m[i], 2.5 * gap_m / sqrt(KEYS) + 1e-6 * y);
        must_be_near(sum_v[i], y, 2.5 * gap_v / sqrt(KEYS) + 1e-6 * y);
    }
}

static void test_coding_ends(void **state)
{
    (void)state;
    float x[4] = {0}, back[4];
    uint8_t codes[4] = {1, 1, 1, 1};
    assert_true(tr_encode_first(x, 1, 4, codes) == 0.0f);
    tr_decode_first(codes, 0, 4, back);
    assert_memory_equal(back, x, sizeof(x));
    assert_true(tr_encode_second(x, 1, 4, codes) == 0.0f);
    tr_decode_second(codes, 0, 4, back);
    assert_memory_equal(back, x, sizeof(x));

    x[1] = 4.0f; /* the others keep a root of at least 1e-7 of the largest: they are divided by */
    float scale = tr_encode_second(x, 1, 4, codes);
    tr_decode_second(codes, scale, 4, back);
    must_be_near(sqrt((double)back[0]), 2e-7, 3e-8);
    must_be_near((double)back[1], 4, 0.05);
    x[2] = INFINITY;
    scale = tr_encode_second(x, 1, 4, codes);
    tr_decode_second(codes, scale, 4, back);
    assert_true(back[2] == INFINITY && isfinite(scale));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exp),         cmocka_unit_test(test_softmax_and_cross_entropy),
        cmocka_unit_test(test_swiglu),      cmocka_unit_test(test_rope_turns_back),
        cmocka_unit_test(test_skinny),      cmocka_unit_test(test_sums),
        cmocka_unit_test(test_distill),     cmocka_unit_test(test_distill_limits),
        cmocka_unit_test(test_codes),       cmocka_unit_test(test_coding_error),
        cmocka_unit_test(test_coding_mean), cmocka_unit_test(test_coding_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
