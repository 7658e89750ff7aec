/*
 * transform.h in GCC's and Clang's generic vectors: 16 lanes are four vectors of four, which every
 * processor with 16-byte registers has. On aarch64 the multiply-add is fused, as it is on the x86
 * levels, and halves are converted by the processor.
 */
#include <string.h>

#include "shared/math/quant.h"
#include "shared/model/transform_internal.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TARGET
#define OP SH_LANES_INLINE
#if defined(__aarch64__) /* 32 registers */
#define SCORE_STEP(q) ((q) <= 2 ? 2 : 1)
#else
#define SCORE_STEP(q) 1
#endif
#define MIX_STEP(q)       SCORE_STEP(q)
#define LORA_DOWN_COLUMNS 1
#define LORA_UP_VECTORS   2
#define TABLE             sh_transform_portable

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef uint16_t v4h __attribute__((vector_size(8)));
typedef struct {
    v4 part[4];
} v16;
typedef struct {
    double sums[SH_LANES];
} v16d;

/* One lane-wise operation on all four parts. */
#define EACH(expression)                                                                           \
    v16 out;                                                                                       \
    SH_UNROLL                                                                                      \
    for (int i = 0; i < 4; i++)                                                                    \
        out.part[i] = (expression);                                                                \
    return out

OP v4 v4_select(v4i mask, v4 yes, v4 no)
{
    return (v4)((mask & (v4i)yes) | (~mask & (v4i)no));
}

OP v4 v4_splat(float x)
{
    return (v4){x, x, x, x};
}

OP v4 v4_fma(v4 a, v4 b, v4 c)
{
#if defined(__aarch64__)
    return (v4)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

OP v4 v4_load(const float *p)
{
    v4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Shifted to a float's place a half's exponent is 112 too small, a subnormal's too; infinity and
 * NaN are put back. */
OP v4 v4_load_halves(const uint16_t *p)
{
    v4h h;
    memcpy(&h, p, sizeof h);
#if defined(__aarch64__)
    return (v4)vcvt_f32_f16((float16x4_t)h);
#else
    const v4u bits = __builtin_convertvector(h, v4u);
    const v4 x = (v4)((bits & 0x7fffu) << 13) * 0x1p112f;
    const v4u special = (v4u)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (v4)((v4u)x | special | (bits & 0x8000u) << 16);
#endif
}

OP v16 lanes_load(const float *p)
{
    EACH(v4_load(p + 4 * i));
}

OP void lanes_store(float *p, v16 v)
{
    memcpy(p, v.part, sizeof v.part);
}

OP v16 lanes_load_part(const float *p, size_t n)
{
    float all[SH_LANES] = {0};
    memcpy(all, p, n * sizeof *p);
    return lanes_load(all);
}

OP void lanes_store_part(float *p, v16 v, size_t n)
{
    memcpy(p, v.part, n * sizeof *p);
}

OP v16 lanes_load_halves(const uint16_t *p)
{
    EACH(v4_load_halves(p + 4 * i));
}

/* Σ of 16 lanes of 4 codes at a time, w [n, 16, 4], times x [n, 4]. */
OP v16 lanes_dot(const int8_t *w, const int8_t *x, uint32_t n)
{
    int32_t sums[SH_LANES] = {0};
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t l = 0; l < SH_LANES; l++)
            for (uint32_t k = 0; k < 4; k++)
                sums[l] += w[(i * SH_LANES + l) * 4 + k] * x[4 * i + k];
    v16 out;
    for (size_t l = 0; l < SH_LANES; l++)
        out.part[l / 4][l % 4] = (float)sums[l];
    return out;
}

OP void lanes_store_halves(uint16_t *p, v16 v)
{
#if defined(__aarch64__)
    for (int i = 0; i < 4; i++)
        vst1_f16((void *)(p + 4 * i), vcvt_f16_f32((float32x4_t)v.part[i]));
#else
    for (int i = 0; i < SH_LANES; i++)
        p[i] = sh_f32_to_f16(v.part[i / 4][i % 4]);
#endif
}

OP v16 lanes_splat(float x)
{
    EACH(v4_splat(x));
}

OP v16 lanes_zero(void)
{
    return lanes_splat(0);
}

OP v16 lanes_add(v16 a, v16 b)
{
    EACH(a.part[i] + b.part[i]);
}

OP v16 lanes_sub(v16 a, v16 b)
{
    EACH(a.part[i] - b.part[i]);
}

OP v16 lanes_mul(v16 a, v16 b)
{
    EACH(a.part[i] * b.part[i]);
}

OP v16 lanes_div(v16 a, v16 b)
{
    EACH(a.part[i] / b.part[i]);
}

/* a * b + c, and c - a * b. */
OP v16 lanes_fma(v16 a, v16 b, v16 c)
{
    EACH(v4_fma(a.part[i], b.part[i], c.part[i]));
}

OP v16 lanes_fnma(v16 a, v16 b, v16 c)
{
    EACH(v4_fma(-a.part[i], b.part[i], c.part[i]));
}

/* a > b ? a : b, and a < b ? a : b: b where one is NaN. */
OP v16 lanes_max(v16 a, v16 b)
{
    EACH(v4_select(a.part[i] > b.part[i], a.part[i], b.part[i]));
}

OP v16 lanes_min(v16 a, v16 b)
{
    EACH(v4_select(a.part[i] < b.part[i], a.part[i], b.part[i]));
}

/* The first n lanes, the others filled up. */
OP v16 lanes_first(v16 v, size_t n, v16 fill)
{
    const v4i places = {0, 1, 2, 3};
    const int32_t count = (int32_t)SH_MIN(n, SH_LANES);
    EACH(v4_select(places < count - 4 * i, v.part[i], fill.part[i]));
}

/* v * 2^k, k in the low bits of `shifted` (see lanes_exp). */
OP v16 lanes_power(v16 v, v16 shifted)
{
    EACH(v.part[i] * (v4)(((v4u)shifted.part[i] << 23) + (127u << 23)));
}

OP float lanes_sum(v16 v)
{
    const v4 a = (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

OP float lanes_largest(v16 v)
{
    float m = v.part[0][0];
    for (int i = 1; i < SH_LANES; i++)
        m = v.part[i / 4][i % 4] > m ? v.part[i / 4][i % 4] : m;
    return m;
}

OP v4 v4_rotate(v4 x, v4 angles)
{
    const v4 c = {angles[0], angles[0], angles[2], angles[2]};
    const v4 s = {-angles[1], angles[1], -angles[3], angles[3]};
    const v4 swapped = {x[1], x[0], x[3], x[2]};
    return v4_fma(x, c, swapped * s);
}

/* Pairs (2j, 2j + 1) of x turned by {cos, sin}. */
OP v16 lanes_rotate(v16 x, v16 angles)
{
    EACH(v4_rotate(x.part[i], angles.part[i]));
}

/* p[32]: the lanes with even and with odd places. */
OP void lanes_load_pairs(const float *p, v16 *even, v16 *odd)
{
    SH_UNROLL
    for (int i = 0; i < 4; i++, p += 8) {
        even->part[i] = (v4){p[0], p[2], p[4], p[6]};
        odd->part[i] = (v4){p[1], p[3], p[5], p[7]};
    }
}

OP void lanes_add_double(v16d *sums, v16 v)
{
    for (int i = 0; i < SH_LANES; i++)
        sums->sums[i] += (double)v.part[i / 4][i % 4];
}

#include "shared/model/transform_body.h"
