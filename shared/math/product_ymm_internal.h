/*
 * Quantized products with vectors of 32 bytes: included once by each level that has them, after it
 * defined
 *
 *     YMM_TARGET     the attribute of its functions
 *     YMM_SIGNED_8   whether dot_ymm wants the codes of Q8_0 signed, or with 128 added
 *     static YMM_TARGET SH_INLINE __m256i dot_ymm(sh_type type, const __m256i *w, int count,
 *                                                 const int8_t *q, int32_t start);
 *                    start + count vectors of codes times 4 * count values of x
 *
 * A vector of a group is worked on in halves of 8 rows. A tile is one or both halves of a group
 * times 1, 2 or 4 rows of x.
 */
#ifndef SH_MATH_PRODUCT_YMM_INTERNAL_H
#define SH_MATH_PRODUCT_YMM_INTERNAL_H

#include <immintrin.h>

#include "shared/math/product_internal.h"

YMM_TARGET SH_INLINE __m256i load_ymm(const uint8_t *at)
{
    return _mm256_loadu_si256((const void *)at);
}

YMM_TARGET SH_INLINE __m256i bits_at_ymm(__m256i from, int mask, int shift)
{
    __m256i bits = _mm256_and_si256(from, _mm256_set1_epi8((char)mask));
    return shift >= 0 ? _mm256_slli_epi16(bits, shift) : _mm256_srli_epi16(bits, -shift);
}

/* One half of a block's vectors; `at` is the block, or the block + 32. */
YMM_TARGET SH_INLINE void unpack_ymm(sh_type type, const uint8_t *at, __m256i w[8])
{
    const int bits = sh_code_bits(type);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        if (bits == 8) {
            const __m256i top = _mm256_set1_epi8(YMM_SIGNED_8 ? 0 : (char)0x80);
            w[v] = _mm256_xor_si256(load_ymm(at + 64 * v), top);
            w[v + 4] = _mm256_xor_si256(load_ymm(at + 64 * v + 256), top);
        } else {
            const __m256i low = _mm256_set1_epi8(15);
            __m256i both = load_ymm(at + 64 * v);
            w[v] = _mm256_and_si256(both, low);
            w[v + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
    }
    if (bits == 5) {
        __m256i high = load_ymm(at + 256);
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            w[v] = _mm256_or_si256(w[v], bits_at_ymm(high, 1 << v, 4 - v));
    } else if (bits == 6) {
        __m256i high[2] = {load_ymm(at + 256), load_ymm(at + 320)};
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            w[v] = _mm256_or_si256(w[v], bits_at_ymm(high[v / 4], 3 << v % 4 * 2, 4 - v % 4 * 2));
    }
}

typedef struct {
    __m256 d[2], m; /* value = d * code + m; d[1] of the second 16 columns, of Q6_K only */
} scales_ymm;

YMM_TARGET SH_INLINE __m256 halves_ymm(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)at));
}

YMM_TARGET SH_INLINE __m256 bytes_ymm(const uint8_t *at, bool is_signed)
{
    __m128i bytes = _mm_loadl_epi64((const void *)at);
    return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes)
                                        : _mm256_cvtepu8_epi32(bytes));
}

/* Of rows 8 * half .. 8 * half + 7. */
YMM_TARGET SH_INLINE scales_ymm scales_load_ymm(sh_type type, const uint8_t *scales, size_t b,
                                                size_t half)
{
    scales_ymm s = {0};
    const size_t skip = 16 * half;
    if (type == SH_TYPE_Q6_K) {
        const uint8_t *at = scales + b / 8 * SH_Q6_K_SCALE_BYTES;
        const uint8_t *of_block = at + 32 + b % 8 * 32 + 8 * half;
        __m256 d = halves_ymm(at + skip);
        s.d[0] = _mm256_mul_ps(d, bytes_ymm(of_block, true));
        s.d[1] = _mm256_mul_ps(d, bytes_ymm(of_block + 16, true));
    } else if (sh_is_k_quant(type)) {
        const uint8_t *at = scales + b / 8 * SH_K_SCALE_BYTES;
        const uint8_t *of_block = at + 64 + b % 8 * 32 + 8 * half;
        __m256 m = _mm256_mul_ps(halves_ymm(at + 32 + skip), bytes_ymm(of_block + 16, false));
        s.d[0] = _mm256_mul_ps(halves_ymm(at + skip), bytes_ymm(of_block, false));
        s.m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
    } else if (sh_has_minima(type)) {
        s.d[0] = halves_ymm(scales + b * 64 + skip);
        s.m = halves_ymm(scales + b * 64 + 32 + skip);
    } else {
        s.d[0] = halves_ymm(scales + b * 32 + skip);
    }
    return s;
}

YMM_TARGET SH_INLINE __m256 block_add_ymm(sh_type type, const __m256i w[8], const scales_ymm *s,
                                          const sh_x_block *x, __m256 sum)
{
    const __m256 d = _mm256_set1_ps(x->d);
    if (type == SH_TYPE_Q6_K) {
        __m256 dot = _mm256_cvtepi32_ps(dot_ymm(type, w, 4, x->q, x->start32[0]));
        sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(s->d[0], d), sum);
        dot = _mm256_cvtepi32_ps(dot_ymm(type, w + 4, 4, x->q + 16, x->start32[1]));
        return _mm256_fmadd_ps(dot, _mm256_mul_ps(s->d[1], d), sum);
    }
    int32_t start = YMM_SIGNED_8 && type == SH_TYPE_Q8_0 ? 0 : *sh_x_start(x, type);
    __m256 dot = _mm256_cvtepi32_ps(dot_ymm(type, w, 8, x->q, start));
    sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(s->d[0], d), sum);
    return sh_has_minima(type) ? _mm256_fmadd_ps(s->m, _mm256_set1_ps(x->d_sum), sum) : sum;
}

/* What a tile is of. */
typedef struct {
    const uint8_t *group;
    const sh_x_block *x; /* row stride x_stride */
    float *y;
    size_t outs; /* 1 to 16 */
} tile_ymm;

YMM_TARGET SH_INLINE void tile_store_ymm(float *y, size_t outs, bool add, __m256 sum)
{
    float values[8];
    if (outs == 0)
        return;
    if (outs >= 8) {
        _mm256_storeu_ps(y, add ? _mm256_add_ps(_mm256_loadu_ps(y), sum) : sum);
        return;
    }
    _mm256_storeu_ps(values, sum);
    for (size_t i = 0; i < outs; i++)
        y[i] = add ? y[i] + values[i] : values[i];
}

/* Both halves of a group, or, with more than two rows of x, half `first`. */
YMM_TARGET SH_INLINE void tile_run_ymm(const sh_panel *p, const tile_ymm *t, sh_type type, int rows,
                                       size_t first)
{
    const size_t n_blocks = p->n_blocks, block_bytes = sh_group_block_bytes(type);
    const size_t halves = rows > 2 ? 1 : 2; /* as many sums as there are registers */
    const uint8_t *quants = t->group + sh_group_scales_bytes(type, n_blocks * 32);
    const sh_x_block *x = t->x;
    __m256 sums[2][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sums[0][r] = sums[1][r] = _mm256_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++, quants += block_bytes, x++) {
#pragma GCC unroll 2
        for (size_t h = 0; h < halves; h++) {
            __m256i w[8];
            scales_ymm s = scales_load_ymm(type, t->group, b, first + h);
            unpack_ymm(type, quants + 32 * (first + h), w);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[h][r] = block_add_ymm(type, w, &s, x + (size_t)r * p->x_stride, sums[h][r]);
        }
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < halves; h++) {
        size_t skip = 8 * (first + h);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            tile_store_ymm(t->y + (size_t)r * p->ldy + skip, t->outs - SH_MIN(skip, t->outs),
                           p->add, sums[h][r]);
    }
}

/* rows rows of x from row r on, all groups. */
YMM_TARGET SH_INLINE void pass_ymm(const sh_panel *p, size_t r, sh_type type, int rows)
{
    const size_t group_bytes = sh_group_bytes(type, p->n_blocks * 32);
    tile_ymm t = {p->groups, p->x + r * p->x_stride, p->y + r * p->ldy, SH_GROUP_ROWS};
    for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS) {
        t.outs = SH_MIN(p->outs - o, (size_t)SH_GROUP_ROWS);
        tile_run_ymm(p, &t, type, rows, 0);
        if (rows > 2 && t.outs > 8)
            tile_run_ymm(p, &t, type, rows, 1);
        t.group += group_bytes;
        t.y += SH_GROUP_ROWS;
    }
}

YMM_TARGET SH_INLINE void panel_ymm(const sh_panel *p, sh_type type)
{
    size_t r = 0;
    for (; p->n - r >= 4; r += 4)
        pass_ymm(p, r, type, 4);
    if (p->n - r >= 2) {
        pass_ymm(p, r, type, 2);
        r += 2;
    }
    if (p->n > r)
        pass_ymm(p, r, type, 1);
}

SH_PANELS(YMM_TARGET, panel_ymm)

#endif
