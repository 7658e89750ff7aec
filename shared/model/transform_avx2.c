/* transform.h with AVX2, FMA and F16C: 16 lanes are two registers. */
#include "shared/model/transform_internal.h"

#if SH_X86
#include <immintrin.h>
#include <string.h>

#define TARGET SH_TARGET_AVX2
#define OP     SH_TARGET_AVX2 SH_LANES_INLINE
/* What fits 16 registers. */
#define SCORE_STEP(q)     ((q) == 1 ? 4 : (q) <= 2 ? 2 : 1)
#define MIX_STEP(q)       SCORE_STEP(q)
#define LORA_DOWN_COLUMNS 1
#define LORA_UP_VECTORS   4
#define TABLE             sh_transform_avx2

typedef struct {
    __m256 a, b;
} v16;
typedef struct {
    __m256d part[4];
} v16d;

OP v16 lanes_load(const float *p)
{
    return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

OP void lanes_store(float *p, v16 v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}

OP v16 lanes_load_part(const float *p, size_t n)
{
    float all[SH_LANES] = {0};
    memcpy(all, p, n * sizeof *p);
    return lanes_load(all);
}

OP void lanes_store_part(float *p, v16 v, size_t n)
{
    float all[SH_LANES];
    lanes_store(all, v);
    memcpy(p, all, n * sizeof *p);
}

OP v16 lanes_load_halves(const uint16_t *p)
{
    return (v16){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

/* Four lanes' four codes at w times x, as four pairs of sums. */
OP __m256i dot_pairs(__m256i sums, const int8_t *w, __m256i x)
{
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(codes, x));
}

OP __m256 sum_pairs(__m256i a, __m256i b)
{
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8));
}

/* Σ of 16 lanes of 4 codes at a time, w [n, 16, 4], times x [n, 4]. */
OP v16 lanes_dot(const int8_t *w, const int8_t *x, uint32_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (uint32_t i = 0; i < n; i++, w += 64) {
        int32_t four;
        memcpy(&four, x + 4 * (size_t)i, sizeof four);
        const __m256i x4 = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
        a = dot_pairs(a, w, x4);
        b = dot_pairs(b, w + 16, x4);
        c = dot_pairs(c, w + 32, x4);
        d = dot_pairs(d, w + 48, x4);
    }
    return (v16){sum_pairs(a, b), sum_pairs(c, d)};
}

OP void lanes_store_halves(uint16_t *p, v16 v)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

OP v16 lanes_zero(void)
{
    return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

OP v16 lanes_splat(float x)
{
    const __m256 v = _mm256_set1_ps(x);
    return (v16){v, v};
}

OP v16 lanes_add(v16 x, v16 y)
{
    return (v16){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}

OP v16 lanes_sub(v16 x, v16 y)
{
    return (v16){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}

OP v16 lanes_mul(v16 x, v16 y)
{
    return (v16){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}

OP v16 lanes_div(v16 x, v16 y)
{
    return (v16){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}

/* x * y + z, and z - x * y. */
OP v16 lanes_fma(v16 x, v16 y, v16 z)
{
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

OP v16 lanes_fnma(v16 x, v16 y, v16 z)
{
    return (v16){_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}

/* x > y ? x : y, and x < y ? x : y: y where one is NaN. */
OP v16 lanes_max(v16 x, v16 y)
{
    return (v16){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}

OP v16 lanes_min(v16 x, v16 y)
{
    return (v16){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}

/* The first n lanes, the others filled up. */
OP v16 lanes_first(v16 v, size_t n, v16 fill)
{
    const __m256i places = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const int count = (int)SH_MIN(n, SH_LANES);
    const __m256i a = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), places);
    const __m256i b = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), places);
    return (v16){_mm256_blendv_ps(fill.a, v.a, _mm256_castsi256_ps(a)),
                 _mm256_blendv_ps(fill.b, v.b, _mm256_castsi256_ps(b))};
}

/* v * 2^k, k in the low bits of `shifted` (see lanes_exp). */
OP __m256 power(__m256 v, __m256 shifted)
{
    const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_mul_ps(v,
                         _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23))));
}

OP v16 lanes_power(v16 v, v16 shifted)
{
    return (v16){power(v.a, shifted.a), power(v.b, shifted.b)};
}

OP float lanes_sum(v16 v)
{
    const __m256 a = _mm256_add_ps(v.a, v.b);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

OP float lanes_largest(v16 v)
{
    const __m256 a = _mm256_max_ps(v.a, v.b);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

OP __m256 rotated(__m256 x, __m256 angles)
{
    const __m256 c = _mm256_moveldup_ps(angles), s = _mm256_movehdup_ps(angles);
    return _mm256_fmaddsub_ps(x, c, _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), s));
}

/* Pairs (2j, 2j + 1) of x turned by {cos, sin}. */
OP v16 lanes_rotate(v16 x, v16 angles)
{
    return (v16){rotated(x.a, angles.a), rotated(x.b, angles.b)};
}

OP __m256 ordered(__m256 v)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

/* p[32]: the lanes with even and with odd places. */
OP void lanes_load_pairs(const float *p, v16 *even, v16 *odd)
{
    const v16 x = lanes_load(p), y = lanes_load(p + SH_LANES);
    *even = (v16){ordered(_mm256_shuffle_ps(x.a, x.b, 0x88)),
                  ordered(_mm256_shuffle_ps(y.a, y.b, 0x88))};
    *odd = (v16){ordered(_mm256_shuffle_ps(x.a, x.b, 0xdd)),
                 ordered(_mm256_shuffle_ps(y.a, y.b, 0xdd))};
}

OP void lanes_add_double(v16d *sums, v16 v)
{
    const __m128 part[4] = {_mm256_castps256_ps128(v.a), _mm256_extractf128_ps(v.a, 1),
                            _mm256_castps256_ps128(v.b), _mm256_extractf128_ps(v.b, 1)};
    for (int i = 0; i < 4; i++)
        sums->part[i] = _mm256_add_pd(sums->part[i], _mm256_cvtps_pd(part[i]));
}

#include "shared/model/transform_body.h"
#endif
