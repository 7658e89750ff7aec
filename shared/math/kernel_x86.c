/*
 * Kernels on floats for AVX2 and for AVX512. Functions are compiled for their level by attribute;
 * the rest of the program stays at the baseline, and the dispatcher calls only what the CPU has.
 *
 * A tile is a few rows of W times up to 8 rows of x: what is loaded of W is used for each row of x.
 * Tiles differ in nothing but how many sums they keep, never in how a sum is made.
 */
#include "shared/math/kernel_internal.h"

#if SH_X86
#include <immintrin.h>
#include <math.h>

#include "shared/math/quant_internal.h"

#define ROWS_MAX    8          /* rows of x in a tile */
#define CHUNK_BYTES (24 << 10) /* of x that a pass over W works on: half of a first-level cache */

/* Rows of x for a pass: whole tiles that fit the cache, at least one. */
static size_t chunk_rows(size_t row_bytes)
{
    size_t rows = CHUNK_BYTES / SH_MAX(row_bytes, (size_t)1) / ROWS_MAX * ROWS_MAX;
    return SH_MAX(rows, (size_t)ROWS_MAX);
}

/* CALL(outs, rows) for the 0 to 7 rows of x that are left, as constants, so that the sums of a tile
 * stay in registers. */
#define ROWS_SWITCH(rows, CALL)                                                                    \
    switch (rows) {                                                                                \
    case 1:                                                                                        \
        CALL(16, 1);                                                                               \
        break;                                                                                     \
    case 2:                                                                                        \
        CALL(8, 2);                                                                                \
        break;                                                                                     \
    case 3:                                                                                        \
        CALL(4, 3);                                                                                \
        break;                                                                                     \
    case 4:                                                                                        \
        CALL(4, 4);                                                                                \
        break;                                                                                     \
    case 5:                                                                                        \
        CALL(2, 5);                                                                                \
        break;                                                                                     \
    case 6:                                                                                        \
        CALL(2, 6);                                                                                \
        break;                                                                                     \
    case 7:                                                                                        \
        CALL(2, 7);                                                                                \
        break;                                                                                     \
    default:                                                                                       \
        break;                                                                                     \
    }

/* ---- AVX512-VNNI ---- */

/* Folds 16 sums of 16 lanes in the order of sh_lanes_fold, all at once: sum i of the 16 comes out
 * at place 4 * (i % 4) + i / 4. */
SH_TARGET_AVX512 SH_INLINE __m512 fold16(const __m512 s[16])
{
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) /* [first's 8 lanes | second's 8 lanes] */
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) /* four sums of 4 lanes */
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) /* eight sums of 2 lanes */
        c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
}

/* Sum of output o and row r of a tile: the place that fold16 turns into r * outs + o. */
#define PLACE(r, o, outs) ((((r) * (outs) + (o)) >> 2) + 4 * (((r) * (outs) + (o)) & 3))

SH_TARGET_AVX512 SH_INLINE void store_tile(const __m512 sums[16], float *y, size_t ldy, int outs,
                                           int rows, bool add)
{
    float folded[16];
    _mm512_storeu_ps(folded, fold16(sums));
    for (int i = 0; i < outs * rows && add; i++)
        folded[i] = y[(size_t)(i / outs) * ldy + (size_t)(i % outs)] + folded[i];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        memcpy(y + (size_t)r * ldy, folded + r * outs, (size_t)outs * sizeof *y);
}

/* Up to 16 weights as floats. */
SH_TARGET_AVX512 SH_INLINE __m512 load_floats512(sh_type type, const void *w, size_t i,
                                                 __mmask16 mask)
{
    if (type == SH_TYPE_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)w + i);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + i);
    if (type == SH_TYPE_F16)
        return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

SH_TARGET_AVX512 SH_INLINE void floats_tile512(const sh_float_product *p, size_t o, size_t r,
                                               int outs, int rows, sh_type type)
{
    const size_t row_bytes = p->in * (type == SH_TYPE_F32 ? 4 : 2);
    const uint8_t *w = (const uint8_t *)p->w + o * row_bytes;
    const float *x = p->x + r * p->ldx;
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        sums[i] = _mm512_setzero_ps();
    for (size_t i = 0; i < p->in; i += SH_LANES) {
        size_t left = p->in - i;
        __mmask16 mask = left >= SH_LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 part[16];
#pragma GCC unroll 16
        for (int o_in = 0; o_in < outs; o_in++)
            part[o_in] = load_floats512(type, w + (size_t)o_in * row_bytes, i, mask);
#pragma GCC unroll 8
        for (int r_in = 0; r_in < rows; r_in++) {
            __m512 values = _mm512_maskz_loadu_ps(mask, x + (size_t)r_in * p->ldx + i);
#pragma GCC unroll 16
            for (int o_in = 0; o_in < outs; o_in++)
                sums[PLACE(r_in, o_in, outs)] =
                    _mm512_fmadd_ps(part[o_in], values, sums[PLACE(r_in, o_in, outs)]);
        }
    }
    store_tile(sums, p->y + r * p->ldy + o, p->ldy, outs, rows, p->add);
}

/* count rows of x from row r on, a multiple of `rows`, against the whole of W. */
SH_TARGET_AVX512 SH_INLINE void floats_pass512(const sh_float_product *p, size_t r, size_t count,
                                               int outs, int rows, sh_type type)
{
    size_t o = 0;
    for (; o + (size_t)outs <= p->out; o += (size_t)outs)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            floats_tile512(p, o, i, outs, rows, type);
    for (; o < p->out; o++)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            floats_tile512(p, o, i, 1, rows, type);
}

SH_TARGET_AVX512 SH_INLINE void floats_product512(const sh_float_product *p, sh_type type)
{
    size_t chunk = chunk_rows(p->in * sizeof *p->x), r = 0;
    for (size_t count; p->n - r >= ROWS_MAX; r += count) {
        count = SH_MIN(chunk, (p->n - r) / ROWS_MAX * ROWS_MAX);
        floats_pass512(p, r, count, 2, 8, type);
    }
#define FLOATS_REST(OUTS, ROWS) floats_pass512(p, r, ROWS, OUTS, ROWS, type)
    ROWS_SWITCH(p->n - r, FLOATS_REST)
#undef FLOATS_REST
}

SH_TARGET_AVX512 static void floats_avx512(const sh_float_product *p){
    SH_EACH_FLOAT_TYPE(p, floats_product512)}

SH_TARGET_AVX512 static void axpy_avx512(float *y, float s, const float *x, size_t n)
{
    __m512 factor = _mm512_set1_ps(s);
    for (size_t i = 0; i < n; i += SH_LANES) {
        __mmask16 mask = n - i >= SH_LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        __m512 sum = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask, x + i),
                                     _mm512_maskz_loadu_ps(mask, y + i));
        _mm512_mask_storeu_ps(y + i, mask, sum);
    }
}

const sh_kernels sh_kernels_avx512 = {
    .x_quantize = sh_x_quantize_avx512,
    .panel = sh_panel_avx512,
    .pack_group = sh_pack_group_avx512,
    .floats = floats_avx512,
    .axpy = axpy_avx512,
};

/* ---- AVX2 ---- */

/* The 16 lanes of a sum. */
typedef struct {
    __m256 low, high;
} lanes256;

SH_TARGET_AVX2 SH_INLINE float fold256(lanes256 s)
{
    __m256 eight = _mm256_add_ps(s.low, s.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* 8 weights as floats. */
SH_TARGET_AVX2 SH_INLINE __m256 load_floats256(sh_type type, const void *w, size_t i)
{
    if (type == SH_TYPE_F32)
        return _mm256_loadu_ps((const float *)w + i);
    __m128i halves = _mm_loadu_si128((const void *)((const uint16_t *)w + i));
    if (type == SH_TYPE_F16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

SH_TARGET_AVX2 SH_INLINE void floats_tile256(const sh_float_product *p, size_t o, size_t r,
                                             int rows, sh_type type)
{
    const uint8_t *w = (const uint8_t *)p->w + o * p->in * (type == SH_TYPE_F32 ? 4 : 2);
    const float *x = p->x + r * p->ldx;
    lanes256 sums[4];
    size_t i = 0;
#pragma GCC unroll 4
    for (int k = 0; k < rows; k++)
        sums[k] = (lanes256){_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (; i + SH_LANES <= p->in; i += SH_LANES) {
        __m256 low = load_floats256(type, w, i), high = load_floats256(type, w, i + 8);
#pragma GCC unroll 4
        for (int k = 0; k < rows; k++) {
            const float *values = x + (size_t)k * p->ldx + i;
            sums[k].low = _mm256_fmadd_ps(low, _mm256_loadu_ps(values), sums[k].low);
            sums[k].high = _mm256_fmadd_ps(high, _mm256_loadu_ps(values + 8), sums[k].high);
        }
    }
    for (int k = 0; k < rows; k++) {
        float lanes[SH_LANES], *y = p->y + (r + (size_t)k) * p->ldy + o;
        _mm256_storeu_ps(lanes, sums[k].low);
        _mm256_storeu_ps(lanes + 8, sums[k].high);
        for (size_t l = 0; i + l < p->in; l++)
            lanes[l] = __builtin_fmaf(sh_weight_at(type, w, i + l), x[(size_t)k * p->ldx + i + l],
                                      lanes[l]);
        lanes256 sum = {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
        *y = p->add ? *y + fold256(sum) : fold256(sum);
    }
}

SH_TARGET_AVX2 SH_INLINE void floats_product256(const sh_float_product *p, sh_type type)
{
    size_t chunk = chunk_rows(p->in * sizeof *p->x);
    for (size_t begin = 0; begin < p->n; begin += chunk) {
        size_t end = SH_MIN(p->n, begin + chunk);
        for (size_t o = 0; o < p->out; o++) {
            size_t r = begin;
            for (; r + 4 <= end; r += 4)
                floats_tile256(p, o, r, 4, type);
            for (; r < end; r++)
                floats_tile256(p, o, r, 1, type);
        }
    }
}

SH_TARGET_AVX2 static void floats_avx2(const sh_float_product *p){
    SH_EACH_FLOAT_TYPE(p, floats_product256)}

SH_TARGET_AVX2 static void axpy_avx2(float *y, float s, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = __builtin_fmaf(s, x[i], y[i]);
}

const sh_kernels sh_kernels_avx2 = {
    .x_quantize = sh_x_quantize_avx2,
    .panel = sh_panel_avx2,
    .pack_group = sh_pack_group_portable,
    .floats = floats_avx2,
    .axpy = axpy_avx2,
};
const sh_kernels sh_kernels_avx_vnni = {
    .x_quantize = sh_x_quantize_avx2,
    .panel = sh_panel_avx_vnni,
    .pack_group = sh_pack_group_portable,
    .floats = floats_avx2,
    .axpy = axpy_avx2,
};

#endif
