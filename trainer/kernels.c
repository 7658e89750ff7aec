#include "trainer/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Sanitizers instrument the resolvers that choose a clone, which run before the sanitizer does:
 * such builds, and other compilers, take the baseline. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) &&                             \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* 16 lanes of any alignment. Not every compiler vectorises a float sum that must keep its order;
 * with explicit lanes the order is ours and the same for every width of the machine's vectors. */
#define LANES 16
typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));

INLINE float lanes_sum(const lanes *v)
{
    float s[LANES];
    memcpy(s, v, sizeof(s));
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t i = 0; i < width; i++)
            s[i] += s[i + width];
    return s[0];
}

/* Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, then n into the exponent. */
INLINE float exp_one(float x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float clamped = x < -87.3f ? -87.3f : x;
    clamped = clamped > 88.3f ? 88.3f : clamped;
    float shifted = clamped * 1.44269504f + round;
    float n = shifted - round;
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4B400000u + 127u) << 23; /* the bits of 2^n; 0x4B400000 are those of round */
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

CLONES void tr_exp(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = exp_one(x[i]);
}

CLONES void tr_add(float *restrict y, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

CLONES void tr_scale(float *y, float s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] *= s;
}

CLONES void tr_blend(float *restrict y, float a, const float *restrict x, float b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = a * y[i] + b * x[i];
}

INLINE float dot(const float *a, const float *b, size_t n)
{
    lanes sum = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += *(const lanes *)(a + i) * *(const lanes *)(b + i);
    float s = lanes_sum(&sum);
    for (; i < n; i++)
        s += a[i] * b[i];
    return s;
}

#define SUM_BLOCK 4096 /* values summed in float before the sum goes on in double */

CLONES double tr_sum_squares(const float *x, size_t n)
{
    double s = 0;
    for (size_t i = 0; i < n; i += SUM_BLOCK)
        s += (double)dot(x + i, x + i, SH_MIN(n - i, (size_t)SUM_BLOCK));
    return s;
}

CLONES float tr_rms_scale(const float *x, float eps, size_t n)
{
    return 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
}

CLONES void tr_rmsnorm(const float *restrict x, const float *restrict w, float r, size_t n,
                       float *restrict y)
{
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * r * w[i];
}

/* With y_i = x_i r w_i and dr/dx_j = -r^3 x_j / n:
 * dx_j = r w_j dy_j - x_j r^3 / n * sum_i(dy_i w_i x_i). Returns the factor of x_j. */
INLINE float rms_along(const float *dy, const float *x, const float *w, float r, size_t n)
{
    lanes sum = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += *(const lanes *)(dy + i) * *(const lanes *)(w + i) * *(const lanes *)(x + i);
    float s = lanes_sum(&sum);
    for (; i < n; i++)
        s += dy[i] * w[i] * x[i];
    return r * r * r / (float)n * s;
}

CLONES void tr_rmsnorm_backward(float *restrict dx, const float *restrict dy,
                                const float *restrict x, const float *restrict w, float r, size_t n)
{
    const float along = rms_along(dy, x, w, r, n);
    for (size_t j = 0; j < n; j++)
        dx[j] += r * w[j] * dy[j] - along * x[j];
}

CLONES void tr_rmsnorm_backward_in_place(float *restrict dy, const float *restrict x,
                                         const float *restrict w, float r, size_t n)
{
    const float along = rms_along(dy, x, w, r, n);
    for (size_t j = 0; j < n; j++)
        dy[j] = r * w[j] * dy[j] - along * x[j];
}

CLONES void tr_rmsnorm_backward_weight(float *restrict dw, const float *restrict dy,
                                       const float *restrict x, float r, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dw[i] += dy[i] * x[i] * r;
}

CLONES void tr_rope(float *restrict x, const tr_angles *angles, size_t heads, float direction)
{
    const float *restrict cosines = angles->cosines, *restrict sines = angles->sines;
    const size_t half = angles->half;
    for (size_t h = 0; h < heads; h++, x += 2 * half) {
        if (angles->halves) {
            for (size_t i = 0; i < half; i++) {
                float a = x[i], b = x[half + i], c = cosines[i], s = direction * sines[i];
                x[i] = a * c - b * s;
                x[half + i] = a * s + b * c;
            }
            continue;
        }
        for (size_t i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1], c = cosines[i], s = direction * sines[i];
            x[2 * i] = a * c - b * s;
            x[2 * i + 1] = a * s + b * c;
        }
    }
}

INLINE float maximum(const float *x, size_t n)
{
    float most[LANES];
    for (size_t l = 0; l < LANES; l++)
        most[l] = x[0];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            most[l] = x[i + l] > most[l] ? x[i + l] : most[l];
    float m = most[0];
    for (size_t l = 1; l < LANES; l++)
        m = most[l] > m ? most[l] : m;
    for (; i < n; i++)
        m = x[i] > m ? x[i] : m;
    return m;
}

INLINE float sum_of(const float *x, size_t n)
{
    lanes sum = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        sum += *(const lanes *)(x + i);
    float s = lanes_sum(&sum);
    for (; i < n; i++)
        s += x[i];
    return s;
}

/* x = exp(x - most); returns the sum. */
INLINE float exp_all(float *x, size_t n, float most)
{
    for (size_t i = 0; i < n; i++)
        x[i] = exp_one(x[i] - most);
    return sum_of(x, n);
}

CLONES void tr_softmax(float *x, size_t n, size_t width)
{
    float inverse = 1.0f / exp_all(x, n, maximum(x, n));
    for (size_t i = 0; i < n; i++)
        x[i] *= inverse;
    memset(x + n, 0, (width - n) * sizeof(*x));
}

CLONES void tr_softmax_backward(float *restrict dp, const float *restrict p, size_t n)
{
    float s = dot(dp, p, n);
    for (size_t i = 0; i < n; i++)
        dp[i] = p[i] * (dp[i] - s);
}

/* e^-g goes through memory: in one loop gcc 12 turns exp_one's clamps into paths, divides on each
 * for every lane, and on those that are thrown away meets denormals, which are slow. */
#define SIGMOID_BLOCK 256

/* silu(g) = g q, q = 1 / (1 + e^-g). */
CLONES void tr_swiglu(const float *restrict gate, const float *restrict up, size_t n,
                      float *restrict h)
{
    for (size_t i = 0; i < n; i++)
        h[i] = exp_one(-gate[i]);
    for (size_t i = 0; i < n; i++)
        h[i] = gate[i] / (1.0f + h[i]) * up[i];
}

/* silu'(g) = q (1 + g (1 - q)). */
CLONES void tr_swiglu_backward(float *restrict gate, float *restrict up, const float *restrict dh,
                               size_t n)
{
    float e[SIGMOID_BLOCK];
    for (size_t at = 0; at < n; at += SIGMOID_BLOCK) {
        size_t m = SH_MIN(n - at, (size_t)SIGMOID_BLOCK);
        for (size_t i = 0; i < m; i++)
            e[i] = exp_one(-gate[at + i]);
        for (size_t i = 0; i < m; i++) {
            float g = gate[at + i], q = 1.0f / (1.0f + e[i]), d = dh[at + i];
            gate[at + i] = d * up[at + i] * q * (1.0f + g * (1.0f - q));
            up[at + i] = d * g * q;
        }
    }
}

CLONES double tr_cross_entropy(float *z, size_t n, size_t target, float scale)
{
    float most = maximum(z, n);
    double of_target = (double)z[target] - (double)most;
    float sum = exp_all(z, n, most);
    float factor = scale / sum;
    for (size_t i = 0; i < n; i++)
        z[i] *= factor;
    z[target] -= scale;
    return log((double)sum) - of_target;
}

#define DISTILL_BLOCK 1024 /* logits; sums of blocks are added in double */

/* y = e^((x - most) / T). Both networks' logits, and each pass over them, take this way: equal
 * logits give equal bits. */
INLINE void soften(const float *x, float most, float inverse_t, size_t n, float *y)
{
    for (size_t i = 0; i < n; i++)
        y[i] = (x[i] - most) * inverse_t;
    tr_exp(y, n);
}

/* With p = e_v / sum_v and q = e_z / sum_z: KL = sum(p (v - z)) / T + ln sum_z - ln sum_v. What is
 * subtracted from each other goes through memory first, since a fused product would keep more
 * digits of one side. */
CLONES tr_losses tr_distill(const tr_mixture *mixture, float *restrict z, float *restrict v,
                            size_t n, size_t target)
{
    const float t = mixture->temperature, inverse_t = 1.0f / t;
    const float z_most = maximum(z, n), v_most = maximum(v, n);
    const double of_target = (double)z[target] - (double)z_most;
    double sum = 0, z_sum = 0, v_sum = 0, apart = 0;
    float e[DISTILL_BLOCK], d[DISTILL_BLOCK];
    for (size_t at = 0; at < n; at += DISTILL_BLOCK) {
        const size_t m = SH_MIN(n - at, (size_t)DISTILL_BLOCK);
        soften(z + at, z_most, 1.0f, m, e);
        sum += (double)sum_of(e, m);
        soften(z + at, z_most, inverse_t, m, e);
        z_sum += (double)sum_of(e, m);
        soften(v + at, v_most, inverse_t, m, e);
        v_sum += (double)sum_of(e, m);
        for (size_t i = 0; i < m; i++)
            d[i] = ((v[at + i] - v_most) - (z[at + i] - z_most)) * inverse_t;
        apart += (double)dot(e, d, m);
        memcpy(v + at, e, m * sizeof(*e));
    }
    const float own = mixture->scale * (1.0f - mixture->weight);
    const float factor = own / (float)sum, softened = mixture->scale * mixture->weight * t;
    tr_scale(v, 1.0f / (float)v_sum, n);
    for (size_t at = 0; at < n; at += DISTILL_BLOCK) {
        const size_t m = SH_MIN(n - at, (size_t)DISTILL_BLOCK);
        soften(z + at, z_most, inverse_t, m, d);
        tr_scale(d, 1.0f / (float)z_sum, m);
        soften(z + at, z_most, 1.0f, m, e);
        for (size_t i = 0; i < m; i++)
            z[at + i] = factor * e[i] + softened * (d[i] - v[at + i]);
    }
    z[target] -= own;
    return (tr_losses){.cross_entropy = log(sum) - of_target,
                       .kl = apart / v_sum + log(z_sum) - log(v_sum)};
}

/* ---- products with a short side ---- */

#define AT(p) (*(const lanes *)(p))

/* rows x of stride ld times `ranks` rows of p. */
INLINE void dots_block(const tr_skinny *s, const float *x, const float *p, float *narrow,
                       size_t rows, size_t ranks)
{
    lanes sums[4][4];
    size_t j = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < ranks; k++)
            sums[r][k] = (lanes){0};
    for (; j + LANES <= s->n; j += LANES)
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < ranks; k++)
                sums[r][k] += AT(x + r * s->ld + j) * AT(p + k * s->n + j);
    for (size_t r = 0; r < rows; r++)
        for (size_t k = 0; k < ranks; k++) {
            float sum = lanes_sum(&sums[r][k]);
            for (size_t i = j; i < s->n; i++)
                sum += x[r * s->ld + i] * p[k * s->n + i];
            narrow[r * s->ld_narrow + k] = sum;
        }
}

CLONES void tr_dots(const tr_skinny *s, const float *wide, const float *p, float *narrow)
{
    for (size_t i = 0; i < s->rows;) {
        const size_t rows = s->rows - i >= 4 ? 4 : 1;
        const float *x = wide + i * s->ld;
        float *out = narrow + i * s->ld_narrow;
        size_t k = 0;
        for (; k + 4 <= s->rank; k += 4)
            if (rows == 4)
                dots_block(s, x, p + k * s->n, out + k, 4, 4);
            else
                dots_block(s, x, p + k * s->n, out + k, 1, 4);
        for (; k < s->rank; k++)
            if (rows == 4)
                dots_block(s, x, p + k * s->n, out + k, 4, 1);
            else
                dots_block(s, x, p + k * s->n, out + k, 1, 1);
        i += rows;
    }
}

/* `vectors` vectors of columns of `rows` rows. */
INLINE void rank_add_block(const tr_skinny *s, float *y, const float *narrow, const float *p,
                           size_t rows, size_t vectors)
{
    lanes sums[4][2];
    for (size_t r = 0; r < rows; r++)
        for (size_t v = 0; v < vectors; v++)
            sums[r][v] = AT(y + r * s->ld + v * LANES);
    for (size_t k = 0; k < s->rank; k++)
        for (size_t r = 0; r < rows; r++)
            for (size_t v = 0; v < vectors; v++)
                sums[r][v] += narrow[r * s->ld_narrow + k] * AT(p + k * s->n + v * LANES);
    for (size_t r = 0; r < rows; r++)
        for (size_t v = 0; v < vectors; v++)
            *(lanes *)(y + r * s->ld + v * LANES) = sums[r][v];
}

INLINE void rank_add_rows(const tr_skinny *s, float *y, const float *narrow, const float *p,
                          size_t rows)
{
    size_t j = 0;
    for (; j + 2 * LANES <= s->n; j += 2 * LANES)
        rank_add_block(s, y + j, narrow, p + j, rows, 2);
    for (; j + LANES <= s->n; j += LANES)
        rank_add_block(s, y + j, narrow, p + j, rows, 1);
    for (; j < s->n; j++)
        for (size_t r = 0; r < rows; r++) {
            float sum = y[r * s->ld + j];
            for (size_t k = 0; k < s->rank; k++)
                sum += narrow[r * s->ld_narrow + k] * p[k * s->n + j];
            y[r * s->ld + j] = sum;
        }
}

CLONES void tr_rank_add(const tr_skinny *s, float *wide, const float *narrow, const float *p)
{
    size_t i = 0;
    for (; i + 4 <= s->rows; i += 4)
        rank_add_rows(s, wide + i * s->ld, narrow + i * s->ld_narrow, p, 4);
    for (; i < s->rows; i++)
        rank_add_rows(s, wide + i * s->ld, narrow + i * s->ld_narrow, p, 1);
}

INLINE void outer_block(const tr_skinny *s, const float *x, const float *narrow, float *p,
                        size_t ranks, size_t vectors)
{
    lanes sums[4][4];
    for (size_t k = 0; k < ranks; k++)
        for (size_t v = 0; v < vectors; v++)
            sums[k][v] = (lanes){0};
    for (size_t i = 0; i < s->rows; i++)
        for (size_t k = 0; k < ranks; k++)
            for (size_t v = 0; v < vectors; v++)
                sums[k][v] += narrow[i * s->ld_narrow + k] * AT(x + i * s->ld + v * LANES);
    for (size_t k = 0; k < ranks; k++)
        for (size_t v = 0; v < vectors; v++)
            *(lanes *)(p + k * s->n + v * LANES) = sums[k][v];
}

INLINE void outer_ranks(const tr_skinny *s, const float *wide, const float *narrow, float *p,
                        size_t ranks)
{
    size_t j = 0;
    for (; j + 4 * LANES <= s->n; j += 4 * LANES)
        outer_block(s, wide + j, narrow, p + j, ranks, 4);
    for (; j + LANES <= s->n; j += LANES)
        outer_block(s, wide + j, narrow, p + j, ranks, 1);
    for (; j < s->n; j++)
        for (size_t k = 0; k < ranks; k++) {
            float sum = 0;
            for (size_t i = 0; i < s->rows; i++)
                sum += narrow[i * s->ld_narrow + k] * wide[i * s->ld + j];
            p[k * s->n + j] = sum;
        }
}

CLONES void tr_outer(const tr_skinny *s, const float *wide, const float *narrow, float *p)
{
    size_t k = 0;
    for (; k + 4 <= s->rank; k += 4)
        outer_ranks(s, wide, narrow + k, p + k * s->n, 4);
    for (; k < s->rank; k++)
        outer_ranks(s, wide, narrow + k, p + k * s->n, 1);
}

CLONES void tr_adamw_update(const tr_adamw *c, float *restrict p, const float *restrict g,
                            float *restrict m, float *restrict v, size_t n)
{
    const tr_adamw k = *c;
    for (size_t i = 0; i < n; i++) {
        m[i] = k.beta1 * m[i] + (1.0f - k.beta1) * g[i];
        v[i] = k.beta2 * v[i] + (1.0f - k.beta2) * g[i] * g[i];
        float step = m[i] / (sqrtf(v[i]) / k.sqrt_correction + k.eps);
        p[i] = p[i] * k.decay - k.step_size * step;
    }
}

CLONES void tr_sgd_update(const tr_sgd *c, float *restrict p, const float *restrict g,
                          float *restrict m, size_t n)
{
    const tr_sgd k = *c;
    for (size_t i = 0; i < n; i++) {
        m[i] = k.momentum * m[i] + g[i];
        p[i] = p[i] * k.decay - k.lr * m[i];
    }
}

/* ---- moments in 8 bits ---- */

#define BITS_FIRST   7 /* beside the sign */
#define BITS_SECOND  8
#define ROOT_LEAST   2.0f   /* code of 1e-7 */
#define SCALE_LEAST  1e-30f /* a block of smaller values counts as zero: 1 / scale stays finite */
#define ENCODED_MOST (0.99f * FLT_MAX) /* so that the scale is finite */

static const float ten_to[BITS_SECOND + 1] = {1, 1e1f, 1e2f, 1e3f, 1e4f, 1e5f, 1e6f, 1e7f, 1e8f};

/* Codes are a function of values that is linear in each decade, with a slope that grows from decade
 * to decade downward: the least of all those lines. In decade k it is
 * 2^k (8/9 + y 10^(bits - 1 - k) / 0.9), and below the last one 10^bits y. */
INLINE float line_at_0(size_t k)
{
    return (float)(1u << k) * (8.0f / 9.0f);
}

INLINE float line_slope(size_t k, size_t bits)
{
    return (float)(1u << k) * ten_to[bits - 1 - k] * (10.0f / 9.0f);
}

/* y[TR_BLOCK] in [0, 1) becomes codes that are not rounded yet. */
INLINE void to_codes(float *restrict y, size_t bits)
{
    float t[TR_BLOCK];
    for (size_t i = 0; i < TR_BLOCK; i++)
        t[i] = y[i] * ten_to[bits];
    for (size_t k = 0; k < bits; k++) {
        const float at_0 = line_at_0(k), slope = line_slope(k, bits);
        for (size_t i = 0; i < TR_BLOCK; i++) {
            const float line = at_0 + slope * y[i];
            t[i] = line < t[i] ? line : t[i];
        }
    }
    memcpy(y, t, sizeof(t));
}

/* And back: the largest of the inverse lines. */
INLINE void from_codes(float *restrict t, size_t bits)
{
    float y[TR_BLOCK];
    for (size_t i = 0; i < TR_BLOCK; i++)
        y[i] = t[i] * (1.0f / ten_to[bits]);
    for (size_t k = 0; k < bits; k++) {
        const float at_0 = line_at_0(k), inverse = 1.0f / line_slope(k, bits);
        for (size_t i = 0; i < TR_BLOCK; i++) {
            const float line = (t[i] - at_0) * inverse;
            y[i] = line > y[i] ? line : y[i];
        }
    }
    memcpy(t, y, sizeof(y));
}

/* Uniform in [0, 1) from a hash of 32 bits (Wellons' lowbias32, in the public domain). */
INLINE float chance(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

INLINE float block_maximum(const float *y)
{
    float most[LANES] = {0}, m = 0;
    for (size_t i = 0; i < TR_BLOCK; i += LANES)
        for (size_t l = 0; l < LANES; l++)
            most[l] = y[i + l] > most[l] ? y[i + l] : most[l];
    for (size_t l = 0; l < LANES; l++)
        m = most[l] > m ? most[l] : m;
    return m;
}

/* Codes of y[TR_BLOCK], not negative; y is lost. Returns the scale. */
INLINE float encode(float *restrict y, float least, uint32_t key, size_t bits,
                    uint8_t *restrict codes)
{
    const float top = (float)((1u << bits) - 1);
    const float of_top = 0.1f + 0.9f * (1.0f - 1.0f / (float)(1u << (bits - 1)));
    /* A second moment of infinity gives no step, as it does in floats. */
    const float largest = block_maximum(y), most = largest < ENCODED_MOST ? largest : ENCODED_MOST;
    const float scale = most / of_top;
    if (most < SCALE_LEAST) {
        memset(codes, 0, TR_BLOCK);
        return 0;
    }
    const float inverse = 1.0f / scale;
    for (size_t i = 0; i < TR_BLOCK; i++)
        y[i] *= inverse;
    to_codes(y, bits);
    for (size_t i = 0; i < TR_BLOCK; i++) {
        float t = y[i] > least ? y[i] : least;
        t += chance(key + (uint32_t)i);
        codes[i] = (uint8_t)(int32_t)(t < top ? t : top);
    }
    return scale;
}

CLONES float tr_encode_first(const float *m, uint32_t key, size_t n, uint8_t *codes)
{
    float y[TR_BLOCK] = {0};
    uint8_t magnitude[TR_BLOCK];
    for (size_t i = 0; i < n; i++)
        y[i] = fabsf(m[i]);
    const float scale = encode(y, 0.0f, key, BITS_FIRST, magnitude);
    for (size_t i = 0; i < n; i++)
        codes[i] = (uint8_t)(magnitude[i] | (m[i] < 0 ? 0x80u : 0u));
    return scale;
}

CLONES float tr_encode_second(const float *v, uint32_t key, size_t n, uint8_t *codes)
{
    float y[TR_BLOCK] = {0};
    uint8_t all[TR_BLOCK];
    for (size_t i = 0; i < n; i++)
        y[i] = sqrtf(v[i]);
    const float scale = encode(y, ROOT_LEAST, key, BITS_SECOND, all);
    memcpy(codes, all, n);
    return scale;
}

CLONES void tr_decode_first(const uint8_t *codes, float scale, size_t n, float *m)
{
    float t[TR_BLOCK] = {0};
    for (size_t i = 0; i < n; i++)
        t[i] = (float)(codes[i] & 0x7f);
    from_codes(t, BITS_FIRST);
    for (size_t i = 0; i < n; i++)
        m[i] = codes[i] & 0x80 ? -scale * t[i] : scale * t[i];
}

CLONES void tr_decode_second(const uint8_t *codes, float scale, size_t n, float *v)
{
    float t[TR_BLOCK] = {0};
    for (size_t i = 0; i < n; i++)
        t[i] = (float)codes[i];
    from_codes(t, BITS_SECOND);
    for (size_t i = 0; i < n; i++)
        v[i] = scale * t[i] * (scale * t[i]);
}

CLONES void tr_proximal(float *restrict g, const float *restrict p, const float *restrict start,
                        float mu, size_t n)
{
    for (size_t i = 0; i < n; i++)
        g[i] += mu * (p[i] - start[i]);
}
