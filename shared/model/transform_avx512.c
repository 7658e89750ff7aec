/* transform.h with AVX512: 16 lanes are one register. */
#include "shared/model/transform_internal.h"

#if SH_X86
#include <immintrin.h>
#include <string.h>

#define TARGET            SH_TARGET_AVX512
#define OP                SH_TARGET_AVX512 SH_LANES_INLINE
#define SCORE_STEP(q)     4
#define MIX_STEP(q)       4
#define LORA_DOWN_COLUMNS 4
#define LORA_UP_VECTORS   8
#define TABLE             sh_transform_avx512

typedef __m512 v16;
typedef struct {
    __m512d low, high;
} v16d;

OP __mmask16 first_mask(size_t n)
{
    return n >= SH_LANES ? 0xffff : (__mmask16)((1u << n) - 1);
}

OP v16 lanes_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

OP void lanes_store(float *p, v16 v)
{
    _mm512_storeu_ps(p, v);
}

OP v16 lanes_load_part(const float *p, size_t n)
{
    return _mm512_maskz_loadu_ps(first_mask(n), p);
}

OP void lanes_store_part(float *p, v16 v, size_t n)
{
    _mm512_mask_storeu_ps(p, first_mask(n), v);
}

OP v16 lanes_load_halves(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* Σ of 16 lanes of 4 codes at a time, w [n, 16, 4], times x [n, 4]. The instruction wants one of
 * them unsigned. */
OP v16 lanes_dot(const int8_t *w, const int8_t *x, uint32_t n)
{
    const __m512i flip = _mm512_set1_epi8(-128);
    __m512i sums = _mm512_setzero_si512(), start = sums;
    for (uint32_t i = 0; i < n; i++) {
        int32_t four;
        memcpy(&four, x + 4 * (size_t)i, sizeof four);
        const __m512i v = _mm512_loadu_si512(w + 64 * (size_t)i), x4 = _mm512_set1_epi32(four);
        sums = _mm512_dpbusd_epi32(sums, _mm512_xor_si512(v, flip), x4);
        start = _mm512_dpbusd_epi32(start, flip, x4);
    }
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, start));
}

OP void lanes_store_halves(uint16_t *p, v16 v)
{
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

OP v16 lanes_zero(void)
{
    return _mm512_setzero_ps();
}

OP v16 lanes_splat(float x)
{
    return _mm512_set1_ps(x);
}

OP v16 lanes_add(v16 a, v16 b)
{
    return _mm512_add_ps(a, b);
}

OP v16 lanes_sub(v16 a, v16 b)
{
    return _mm512_sub_ps(a, b);
}

OP v16 lanes_mul(v16 a, v16 b)
{
    return _mm512_mul_ps(a, b);
}

OP v16 lanes_div(v16 a, v16 b)
{
    return _mm512_div_ps(a, b);
}

/* a * b + c, and c - a * b. */
OP v16 lanes_fma(v16 a, v16 b, v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}

OP v16 lanes_fnma(v16 a, v16 b, v16 c)
{
    return _mm512_fnmadd_ps(a, b, c);
}

/* a > b ? a : b, and a < b ? a : b: b where one is NaN. */
OP v16 lanes_max(v16 a, v16 b)
{
    return _mm512_max_ps(a, b);
}

OP v16 lanes_min(v16 a, v16 b)
{
    return _mm512_min_ps(a, b);
}

/* The first n lanes, the others filled up. */
OP v16 lanes_first(v16 v, size_t n, v16 fill)
{
    return _mm512_mask_blend_ps(first_mask(n), fill, v);
}

/* v * 2^k, k in the low bits of `shifted` (see lanes_exp). */
OP v16 lanes_power(v16 v, v16 shifted)
{
    const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_mul_ps(v,
                         _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(127 << 23))));
}

OP float lanes_sum(v16 v)
{
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), high);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

OP float lanes_largest(v16 v)
{
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), high);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

/* Pairs (2j, 2j + 1) of x turned by {cos, sin}. */
OP v16 lanes_rotate(v16 x, v16 angles)
{
    const __m512 c = _mm512_moveldup_ps(angles), s = _mm512_movehdup_ps(angles);
    return _mm512_fmaddsub_ps(x, c, _mm512_mul_ps(_mm512_permute_ps(x, 0xb1), s));
}

/* p[32]: the lanes with even and with odd places. */
OP void lanes_load_pairs(const float *p, v16 *even, v16 *odd)
{
    const __m512i places =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + SH_LANES);
    *even = _mm512_permutex2var_ps(a, places, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b);
}

OP void lanes_add_double(v16d *sums, v16 v)
{
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    sums->low = _mm512_add_pd(sums->low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    sums->high = _mm512_add_pd(sums->high, _mm512_cvtps_pd(high));
}

#include "shared/model/transform_body.h"
#endif
