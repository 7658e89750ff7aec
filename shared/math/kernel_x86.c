/*
 * Kernels for AVX2 and for AVX512-VNNI. Functions are compiled for their level by attribute; the
 * rest of the program stays at the baseline, and the dispatcher calls only what the CPU has.
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

static uint16_t load_half(const uint8_t *at)
{
    uint16_t h;
    memcpy(&h, at, sizeof h);
    return h;
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
                                           int rows)
{
    float folded[16];
    _mm512_storeu_ps(folded, fold16(sums));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        memcpy(y + (size_t)r * ldy, folded + r * outs, (size_t)outs * sizeof *y);
}

/* Scales of two blocks, each in its 8 lanes. */
SH_TARGET_AVX512 SH_INLINE __m512 two_scales(uint16_t even, uint16_t odd)
{
    __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi16((short)even)),
                                             _mm_set1_epi16((short)odd), 1);
    return _mm512_cvtph_ps(halves);
}

typedef struct {
    __m512i q; /* unsigned: weight + offset */
    __m512 d;
} weights512;

/* Two blocks at `at`; with `single` the second is not there and its lanes are 0. */
SH_TARGET_AVX512 SH_INLINE weights512 load_q8_0(const uint8_t *at, bool single)
{
    __m512i q = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)(at + 2)));
    uint16_t odd = 0;
    if (!single) {
        q = _mm512_inserti64x4(q, _mm256_loadu_si256((const void *)(at + 36)), 1);
        odd = load_half(at + 34);
    } else {
        q = _mm512_inserti64x4(q, _mm256_setzero_si256(), 1);
    }
    return (weights512){_mm512_xor_si512(q, _mm512_set1_epi8((char)0x80)),
                        two_scales(load_half(at), odd)};
}

SH_TARGET_AVX512 SH_INLINE weights512 load_q4_0(const uint8_t *at, bool single)
{
    const __m512i shifts = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0,
                                            0x0004000400040004, 0x0004000400040004, 0, 0);
    __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(at + 2)));
    uint16_t odd = 0;
    if (!single) {
        q = _mm512_mask_broadcast_i32x4(q, 0xff00, _mm_loadu_si128((const void *)(at + 20)));
        odd = load_half(at + 18);
    }
    q = _mm512_and_si512(_mm512_srlv_epi16(q, shifts), _mm512_set1_epi8(15));
    return (weights512){q, two_scales(load_half(at), odd)};
}

SH_TARGET_AVX512 SH_INLINE void quant_add512(__m512 *sum, weights512 w, const sh_x_pair *x)
{
    __m512i dot = _mm512_dpbusd_epi32(_mm512_load_si512(x->start), w.q, _mm512_load_si512(x->q));
    __m512 scale = _mm512_mul_ps(w.d, _mm512_load_ps(x->d));
    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, *sum);
}

/* sums += outs rows of W times rows rows of x, over one pair of blocks. */
SH_TARGET_AVX512 SH_INLINE void quant_step512(__m512 sums[16], const uint8_t *w, size_t row_bytes,
                                              const sh_x_pair *x, size_t n_pairs, int outs,
                                              int rows, bool is_q8_0, bool single)
{
    weights512 weights[16];
#pragma GCC unroll 16
    for (int o = 0; o < outs; o++) {
        const uint8_t *at = w + (size_t)o * row_bytes;
        weights[o] = is_q8_0 ? load_q8_0(at, single) : load_q4_0(at, single);
        if (rows > 2)
            continue; /* few rows of x stay in registers while W streams past, many do not */
#pragma GCC unroll 2
        for (int r = 0; r < SH_MIN(rows, 2); r++)
            quant_add512(&sums[PLACE(r, o, outs)], weights[o], x + (size_t)r * n_pairs);
    }
    if (rows <= 2)
        return;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 16
        for (int o = 0; o < outs; o++)
            quant_add512(&sums[PLACE(r, o, outs)], weights[o], x + (size_t)r * n_pairs);
    }
}

SH_TARGET_AVX512 SH_INLINE void quant_tile512(const sh_quant_product *p, size_t o, size_t r,
                                              int outs, int rows, bool is_q8_0)
{
    const size_t pair_bytes = 2 * (is_q8_0 ? sizeof(sh_block_q8_0) : sizeof(sh_block_q4_0));
    const uint8_t *w = p->w + o * p->row_bytes;
    const sh_x_pair *x = p->x + r * p->n_pairs;
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        sums[i] = _mm512_setzero_ps();
    size_t i = 0;
    for (; i < p->n_blocks / 2; i++)
        quant_step512(sums, w + i * pair_bytes, p->row_bytes, x + i, p->n_pairs, outs, rows,
                      is_q8_0, false);
    if (p->n_blocks % 2 != 0)
        quant_step512(sums, w + i * pair_bytes, p->row_bytes, x + i, p->n_pairs, outs, rows,
                      is_q8_0, true);
    store_tile(sums, p->y + r * p->ldy + o, p->ldy, outs, rows);
}

/* count rows of x from row r on, a multiple of `rows`, against the whole of W. */
SH_TARGET_AVX512 SH_INLINE void quant_pass512(const sh_quant_product *p, size_t r, size_t count,
                                              int outs, int rows, bool is_q8_0)
{
    size_t o = 0;
    for (; o + (size_t)outs <= p->out; o += (size_t)outs)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            quant_tile512(p, o, i, outs, rows, is_q8_0);
    for (; o < p->out; o++)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            quant_tile512(p, o, i, 1, rows, is_q8_0);
}

SH_TARGET_AVX512 SH_INLINE void quant_product512(const sh_quant_product *p, bool is_q8_0)
{
    size_t chunk = chunk_rows(p->n_pairs * sizeof(sh_x_pair)), r = 0;
    for (size_t count; p->n - r >= ROWS_MAX; r += count) {
        count = SH_MIN(chunk, (p->n - r) / ROWS_MAX * ROWS_MAX);
        quant_pass512(p, r, count, 2, 8, is_q8_0);
    }
#define QUANT_REST(OUTS, ROWS) quant_pass512(p, r, ROWS, OUTS, ROWS, is_q8_0)
    ROWS_SWITCH(p->n - r, QUANT_REST)
#undef QUANT_REST
}

SH_TARGET_AVX512 static void q8_0_avx512(const sh_quant_product *p)
{
    quant_product512(p, true);
}

SH_TARGET_AVX512 static void q4_0_avx512(const sh_quant_product *p)
{
    quant_product512(p, false);
}

SH_TARGET_AVX512 SH_INLINE void f32_tile512(const sh_float_product *p, size_t o, size_t r, int outs,
                                            int rows)
{
    const float *w = p->w + o * p->in, *x = p->x + r * p->in;
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
            part[o_in] = _mm512_maskz_loadu_ps(mask, w + (size_t)o_in * p->in + i);
#pragma GCC unroll 8
        for (int r_in = 0; r_in < rows; r_in++) {
            __m512 values = _mm512_maskz_loadu_ps(mask, x + (size_t)r_in * p->in + i);
#pragma GCC unroll 16
            for (int o_in = 0; o_in < outs; o_in++)
                sums[PLACE(r_in, o_in, outs)] =
                    _mm512_fmadd_ps(part[o_in], values, sums[PLACE(r_in, o_in, outs)]);
        }
    }
    store_tile(sums, p->y + r * p->ldy + o, p->ldy, outs, rows);
}

SH_TARGET_AVX512 SH_INLINE void f32_pass512(const sh_float_product *p, size_t r, size_t count,
                                            int outs, int rows)
{
    size_t o = 0;
    for (; o + (size_t)outs <= p->out; o += (size_t)outs)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            f32_tile512(p, o, i, outs, rows);
    for (; o < p->out; o++)
        for (size_t i = r; i < r + count; i += (size_t)rows)
            f32_tile512(p, o, i, 1, rows);
}

SH_TARGET_AVX512 static void f32_avx512(const sh_float_product *p)
{
    size_t chunk = chunk_rows(p->in * sizeof *p->x), r = 0;
    for (size_t count; p->n - r >= ROWS_MAX; r += count) {
        count = SH_MIN(chunk, (p->n - r) / ROWS_MAX * ROWS_MAX);
        f32_pass512(p, r, count, 2, 8);
    }
#define F32_REST(OUTS, ROWS) f32_pass512(p, r, ROWS, OUTS, ROWS)
    ROWS_SWITCH(p->n - r, F32_REST)
#undef F32_REST
}

/* The larger of the 8 lanes of each half, in all lanes of that half: largest magnitudes as bits. */
SH_TARGET_AVX512 SH_INLINE __m512i largest_of_blocks(const __m512 x[4])
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i even = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(x[0]), magnitude),
                                    _mm512_and_si512(_mm512_castps_si512(x[1]), magnitude));
    __m512i odd = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(x[2]), magnitude),
                                   _mm512_and_si512(_mm512_castps_si512(x[3]), magnitude));
    __m512i m = _mm512_max_epu32(_mm512_shuffle_i32x4(even, odd, 0x44),
                                 _mm512_shuffle_i32x4(even, odd, 0xee));
    m = _mm512_max_epu32(m, _mm512_shuffle_i32x4(m, m, 0xb1));
    m = _mm512_max_epu32(m, _mm512_shuffle_epi32(m, _MM_PERM_BADC));
    return _mm512_max_epu32(m, _mm512_shuffle_epi32(m, _MM_PERM_CDAB));
}

/* As quantize_block of the portable kernels, two blocks at once. */
SH_TARGET_AVX512 static void quantize_row_avx512(const float *x, size_t n_blocks, int32_t offset,
                                                 sh_x_pair *pairs)
{
    const __m512 range = _mm512_set1_ps(127.0f);
    for (size_t b = 0; b < n_blocks; b += 2, x += SH_PAIR_VALUES, pairs++) {
        __m512 v[4] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16), _mm512_setzero_ps(),
                       _mm512_setzero_ps()};
        if (b + 1 < n_blocks) {
            v[2] = _mm512_loadu_ps(x + 32);
            v[3] = _mm512_loadu_ps(x + 48);
        }
        __m512 largest = _mm512_castsi512_ps(largest_of_blocks(v));
        __mmask16 finite = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
        __mmask16 scaled =
            _mm512_mask_cmp_ps_mask(finite, largest, _mm512_set1_ps(SH_LARGEST_MIN), _CMP_GE_OQ);
        __m512 inverse = _mm512_maskz_div_ps(scaled, range, largest);
        __m512 d = _mm512_maskz_div_ps(scaled, largest, range);
        _mm512_store_ps(pairs->d, _mm512_mask_mov_ps(_mm512_set1_ps(NAN), finite, d));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512 of_block = i < 2 ? _mm512_shuffle_f32x4(inverse, inverse, 0x00)
                                    : _mm512_shuffle_f32x4(inverse, inverse, 0xaa);
            bool good = (finite >> (i < 2 ? 0 : 8) & 1) != 0; /* NaN times 0 is no number */
            __m512 q = _mm512_maskz_mul_ps(good ? 0xffff : 0, v[i], of_block);
            _mm_store_si128((__m128i *)(void *)(pairs->q + 16 * i),
                            _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q)));
        }
        __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1),
                                           _mm512_load_si512(pairs->q));
        _mm512_store_si512(pairs->start, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)));
    }
}

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

const sh_kernels sh_kernels_avx512 = {quantize_row_avx512, q8_0_avx512, q4_0_avx512, f32_avx512,
                                      axpy_avx512};

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

/* One block's 32 weights: signed for Q8_0, 0..15 for Q4_0. */
SH_TARGET_AVX2 SH_INLINE __m256i load_block256(const uint8_t *at, bool is_q8_0)
{
    if (is_q8_0)
        return _mm256_loadu_si256((const void *)(at + 2));
    __m128i both = _mm_loadu_si128((const void *)(at + 2));
    __m256i q = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    return _mm256_and_si256(q, _mm256_set1_epi8(15));
}

/* sum += block half (0 or 1) of a pair. Sums of two products fit 16 bits: 2 * 128 * 127 < 2^15. */
SH_TARGET_AVX2 SH_INLINE __m256 quant_add256(__m256 sum, __m256i w, __m256 d, const sh_x_pair *x,
                                             int half, bool is_q8_0)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i q = _mm256_loadu_si256((const void *)(x->q + half * 32)), dot;
    if (is_q8_0) { /* |w| * (x with w's sign) */
        dot = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
        dot = _mm256_madd_epi16(dot, ones);
    } else {
        __m256i start = _mm256_loadu_si256((const void *)(x->start + half * 8));
        dot = _mm256_madd_epi16(_mm256_maddubs_epi16(w, q), ones);
        dot = _mm256_add_epi32(dot, start);
    }
    __m256 scale = _mm256_mul_ps(d, _mm256_loadu_ps(x->d + half * 8));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum);
}

SH_TARGET_AVX2 SH_INLINE void quant_tile256(const sh_quant_product *p, size_t o, size_t r, int rows,
                                            bool is_q8_0)
{
    const size_t block_bytes = is_q8_0 ? sizeof(sh_block_q8_0) : sizeof(sh_block_q4_0);
    const uint8_t *at = p->w + o * p->row_bytes;
    const sh_x_pair *x = p->x + r * p->n_pairs;
    lanes256 sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        sums[i] = (lanes256){_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t b = 0; b < p->n_blocks; b++, at += block_bytes) {
        __m256i w = load_block256(at, is_q8_0);
        __m256 d = _mm256_cvtph_ps(_mm_set1_epi16((short)load_half(at)));
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            const sh_x_pair *pair = x + (size_t)i * p->n_pairs + b / 2;
            if (b % 2 == 0)
                sums[i].low = quant_add256(sums[i].low, w, d, pair, 0, is_q8_0);
            else
                sums[i].high = quant_add256(sums[i].high, w, d, pair, 1, is_q8_0);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        p->y[(r + (size_t)i) * p->ldy + o] = fold256(sums[i]);
}

SH_TARGET_AVX2 SH_INLINE void quant_product256(const sh_quant_product *p, bool is_q8_0)
{
    size_t chunk = chunk_rows(p->n_pairs * sizeof(sh_x_pair));
    for (size_t begin = 0; begin < p->n; begin += chunk) {
        size_t end = SH_MIN(p->n, begin + chunk);
        for (size_t o = 0; o < p->out; o++) {
            size_t r = begin;
            for (; r + 4 <= end; r += 4)
                quant_tile256(p, o, r, 4, is_q8_0);
            for (; r < end; r++)
                quant_tile256(p, o, r, 1, is_q8_0);
        }
    }
}

SH_TARGET_AVX2 static void q8_0_avx2(const sh_quant_product *p)
{
    quant_product256(p, true);
}

SH_TARGET_AVX2 static void q4_0_avx2(const sh_quant_product *p)
{
    quant_product256(p, false);
}

SH_TARGET_AVX2 SH_INLINE void f32_tile256(const sh_float_product *p, size_t o, size_t r, int rows)
{
    const float *w = p->w + o * p->in, *x = p->x + r * p->in;
    lanes256 sums[4];
    size_t i = 0;
#pragma GCC unroll 4
    for (int k = 0; k < rows; k++)
        sums[k] = (lanes256){_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (; i + SH_LANES <= p->in; i += SH_LANES) {
        __m256 low = _mm256_loadu_ps(w + i), high = _mm256_loadu_ps(w + i + 8);
#pragma GCC unroll 4
        for (int k = 0; k < rows; k++) {
            const float *values = x + (size_t)k * p->in + i;
            sums[k].low = _mm256_fmadd_ps(low, _mm256_loadu_ps(values), sums[k].low);
            sums[k].high = _mm256_fmadd_ps(high, _mm256_loadu_ps(values + 8), sums[k].high);
        }
    }
    for (int k = 0; k < rows; k++) {
        float lanes[SH_LANES];
        _mm256_storeu_ps(lanes, sums[k].low);
        _mm256_storeu_ps(lanes + 8, sums[k].high);
        for (size_t l = 0; i + l < p->in; l++)
            lanes[l] = __builtin_fmaf(w[i + l], x[(size_t)k * p->in + i + l], lanes[l]);
        lanes256 sum = {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
        p->y[(r + (size_t)k) * p->ldy + o] = fold256(sum);
    }
}

SH_TARGET_AVX2 static void f32_avx2(const sh_float_product *p)
{
    size_t chunk = chunk_rows(p->in * sizeof *p->x);
    for (size_t begin = 0; begin < p->n; begin += chunk) {
        size_t end = SH_MIN(p->n, begin + chunk);
        for (size_t o = 0; o < p->out; o++) {
            size_t r = begin;
            for (; r + 4 <= end; r += 4)
                f32_tile256(p, o, r, 4);
            for (; r < end; r++)
                f32_tile256(p, o, r, 1);
        }
    }
}

SH_TARGET_AVX2 static void quantize_row_avx2(const float *x, size_t n_blocks, int32_t offset,
                                             sh_x_pair *pairs)
{
    sh_quantize_row_body(x, n_blocks, offset, pairs);
}

SH_TARGET_AVX2 static void axpy_avx2(float *y, float s, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = __builtin_fmaf(s, x[i], y[i]);
}

const sh_kernels sh_kernels_avx2 = {quantize_row_avx2, q8_0_avx2, q4_0_avx2, f32_avx2, axpy_avx2};

#endif
