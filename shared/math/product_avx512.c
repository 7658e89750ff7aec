/*
 * Quantized products with AVX512-VNNI: a vector has four neighbouring columns of 16 rows of W, so
 * that vpdpbusd with four values of x, broadcast, adds to the 16 outputs at once.
 *
 * A tile is one group times 1 to 16 rows of x. Its sums stay in registers; the 8 vectors of a block
 * are made unsigned bytes once, and used for each of the rows.
 */
#include "shared/math/kernel_internal.h"
#include "shared/math/product_internal.h"

#if SH_X86
#include <immintrin.h>
#include <math.h>

/* Few rows of x: the weights come from memory, and a core reads several streams half as fast again
 * as one, because its prefetchers follow each. So groups pass FEW_GROUPS at a time, and what is
 * this far ahead in each of them is fetched. */
#define FEW_ROWS       8
#define FEW_GROUPS     8 /* of one row; fewer of more, so that the sums fit the registers */
#define PREFETCH_BYTES 1536

typedef struct {
    __m512i v[8]; /* unsigned */
} weights512;

SH_TARGET_AVX512 SH_INLINE __m512i load(const uint8_t *at)
{
    return _mm512_loadu_si512((const void *)at);
}

/* The 4 bits of nibbles or top bits in `from`, `shift` to the left (or, negative, to the right). */
SH_TARGET_AVX512 SH_INLINE __m512i bits_at(__m512i from, int mask, int shift)
{
    __m512i bits = _mm512_and_si512(from, _mm512_set1_epi8((char)mask));
    return shift >= 0 ? _mm512_slli_epi16(bits, (unsigned)shift)
                      : _mm512_srli_epi16(bits, (unsigned)-shift);
}

SH_TARGET_AVX512 SH_INLINE void unpack512(sh_type type, const uint8_t *at, weights512 *w)
{
    const int bits = sh_code_bits(type);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        if (bits == 8) {
            const __m512i top = _mm512_set1_epi8((char)0x80);
            w->v[v] = _mm512_xor_si512(load(at + 64 * v), top);
            w->v[v + 4] = _mm512_xor_si512(load(at + 64 * v + 256), top);
        } else {
            const __m512i low = _mm512_set1_epi8(15);
            __m512i both = load(at + 64 * v);
            w->v[v] = _mm512_and_si512(both, low);
            w->v[v + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
    }
    if (bits == 5) {
        __m512i high = load(at + 256);
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            w->v[v] = _mm512_or_si512(w->v[v], bits_at(high, 1 << v, 4 - v));
    } else if (bits == 6) {
        __m512i high[2] = {load(at + 256), load(at + 320)};
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            w->v[v] = _mm512_or_si512(w->v[v], bits_at(high[v / 4], 3 << v % 4 * 2, 4 - v % 4 * 2));
    }
}

typedef struct {
    __m512 d[2], m; /* value = d * code + m; d[1] of the second half, of Q6_K only */
} scales512;

SH_TARGET_AVX512 SH_INLINE __m512 load_halves(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)at));
}

SH_TARGET_AVX512 SH_INLINE __m512 load_bytes(const uint8_t *at, bool is_signed)
{
    __m128i bytes = _mm_loadu_si128((const void *)at);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes)
                                        : _mm512_cvtepu8_epi32(bytes));
}

SH_TARGET_AVX512 SH_INLINE scales512 load_scales512(sh_type type, const uint8_t *scales, size_t b)
{
    scales512 s = {0};
    if (type == SH_TYPE_Q6_K) {
        const uint8_t *at = scales + b / 8 * SH_Q6_K_SCALE_BYTES, *of_block = at + 32 + b % 8 * 32;
        __m512 d = load_halves(at);
        s.d[0] = _mm512_mul_ps(d, load_bytes(of_block, true));
        s.d[1] = _mm512_mul_ps(d, load_bytes(of_block + 16, true));
    } else if (sh_is_k_quant(type)) {
        const uint8_t *at = scales + b / 8 * SH_K_SCALE_BYTES, *of_block = at + 64 + b % 8 * 32;
        __m512i dmin = _mm512_castps_si512(load_halves(at + 32)); /* times -1: a sign's bit */
        dmin = _mm512_xor_si512(dmin, _mm512_set1_epi32(INT32_MIN));
        s.d[0] = _mm512_mul_ps(load_halves(at), load_bytes(of_block, false));
        s.m = _mm512_mul_ps(_mm512_castsi512_ps(dmin), load_bytes(of_block + 16, false));
    } else if (sh_has_minima(type)) {
        s.d[0] = load_halves(scales + b * 64);
        s.m = load_halves(scales + b * 64 + 32);
    } else {
        s.d[0] = load_halves(scales + b * 32);
    }
    return s;
}

SH_TARGET_AVX512 SH_INLINE __m512i four512(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

/* start + vectors first .. first + count - 1 of w times x. Two sums: a chain of eight is so long
 * that too few rows fit the processor's window. */
SH_TARGET_AVX512 SH_INLINE __m512 dot512(const weights512 *w, const int8_t *q, int32_t start,
                                         int first, int count)
{
    __m512i even = _mm512_set1_epi32(start), odd = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int v = first; v < first + count; v += 2) {
        even = _mm512_dpbusd_epi32(even, w->v[v], four512(q + 4 * v));
        odd = _mm512_dpbusd_epi32(odd, w->v[v + 1], four512(q + 4 * v + 4));
    }
    return _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
}

SH_TARGET_AVX512 SH_INLINE __m512 block_add512(sh_type type, const weights512 *w,
                                               const scales512 *s, const sh_x_block *x, __m512 sum)
{
    const __m512 d = _mm512_set1_ps(x->d);
    if (type == SH_TYPE_Q6_K) {
        sum = _mm512_fmadd_ps(dot512(w, x->q, x->start32[0], 0, 4), _mm512_mul_ps(s->d[0], d), sum);
        return _mm512_fmadd_ps(dot512(w, x->q, x->start32[1], 4, 4), _mm512_mul_ps(s->d[1], d),
                               sum);
    }
    __m512 dot = dot512(w, x->q, *sh_x_start(x, type), 0, 8);
    sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(s->d[0], d), sum);
    return sh_has_minima(type) ? _mm512_fmadd_ps(s->m, _mm512_set1_ps(x->d_sum), sum) : sum;
}

/* What a tile is of. */
typedef struct {
    const uint8_t *group;
    const sh_x_block *x; /* row stride x_stride */
    float *y;
    size_t outs; /* 1 to 16 a group */
    bool last;   /* nothing of the panel comes after it */
} tile512;

SH_TARGET_AVX512 SH_INLINE void store_row512(float *y, size_t outs, bool add, __m512 sum)
{
    __mmask16 mask = outs >= 16 ? 0xffff : (__mmask16)((1u << outs) - 1);
    if (add)
        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
    _mm512_mask_storeu_ps(y, mask, sum);
}

SH_TARGET_AVX512 SH_INLINE void tile_run512(const sh_panel *p, const tile512 *t, sh_type type,
                                            int rows)
{
    const size_t n_blocks = p->n_blocks, block_bytes = sh_group_block_bytes(type);
    const uint8_t *quants = t->group + sh_group_scales_bytes(type, n_blocks * 32);
    const sh_x_block *x = t->x;
    __m512 sums[SH_X_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++, quants += block_bytes, x++) {
        weights512 w;
        scales512 s = load_scales512(type, t->group, b);
        unpack512(type, quants, &w);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            sums[r] = block_add512(type, &w, &s, x + (size_t)r * p->x_stride, sums[r]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        store_row512(t->y + (size_t)r * p->ldy, t->outs, p->add, sums[r]);
}

/* ---- few rows of x ---- */

/* A block of x, ready for one row. */
typedef struct {
    __m512i q[8], start[2];
    __m512 d, d_sum;
} x512;

SH_TARGET_AVX512 SH_INLINE x512 load_x512(sh_type type, const sh_x_block *x)
{
    x512 v;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        v.q[i] = four512(x->q + 4 * i);
    v.start[0] = _mm512_set1_epi32(type == SH_TYPE_Q6_K ? x->start32[0] : *sh_x_start(x, type));
    v.start[1] = _mm512_set1_epi32(type == SH_TYPE_Q6_K ? x->start32[1] : 0);
    v.d = _mm512_set1_ps(x->d);
    v.d_sum = _mm512_set1_ps(x->d_sum);
    return v;
}

/* As block_add512 for one row, from the bytes of the block. High nibbles are multiplied where they
 * are, 16 times too large: the exact sum is shifted. */
SH_TARGET_AVX512 SH_INLINE __m512 block_add_one512(sh_type type, const uint8_t *at,
                                                   const scales512 *s, const x512 *x, __m512 sum)
{
    __m512i first = x->start[0], second = x->start[1];
    if (sh_code_bits(type) == 4) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512i high = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            __m512i both = load(at + 64 * v);
            first = _mm512_dpbusd_epi32(first, _mm512_and_si512(both, low), x->q[v]);
            high = _mm512_dpbusd_epi32(high, _mm512_andnot_si512(low, both), x->q[v + 4]);
        }
        second = _mm512_srai_epi32(high, 4);
    } else {
        weights512 w;
        unpack512(type, at, &w);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            first = _mm512_dpbusd_epi32(first, w.v[v], x->q[v]);
            second = _mm512_dpbusd_epi32(second, w.v[v + 4], x->q[v + 4]);
        }
    }
    if (type == SH_TYPE_Q6_K) {
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), _mm512_mul_ps(s->d[0], x->d), sum);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), _mm512_mul_ps(s->d[1], x->d), sum);
    }
    __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
    sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(s->d[0], x->d), sum);
    return sh_has_minima(type) ? _mm512_fmadd_ps(s->m, x->d_sum, sum) : sum;
}

/* `groups` groups times `rows` (1 to 4, 8) rows of x; all but the last group are whole. */
SH_TARGET_AVX512 SH_INLINE void few_run512(const sh_panel *p, const tile512 *t, sh_type type,
                                           int groups, int rows)
{
    const size_t n_blocks = p->n_blocks, block_bytes = sh_group_block_bytes(type);
    const size_t group_bytes = sh_group_bytes(type, n_blocks * 32);
    const size_t scales_bytes = sh_group_scales_bytes(type, n_blocks * 32);
    const size_t scale_bytes = scales_bytes / n_blocks; /* of a block */
    const size_t ahead = (PREFETCH_BYTES + block_bytes - 1) / block_bytes;
    const uint8_t *quants = t->group + scales_bytes;
    __m512 sums[FEW_GROUPS][FEW_ROWS];
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            sums[g][r] = _mm512_setzero_ps();
    for (size_t b = 0; b < n_blocks; b++, quants += block_bytes) {
        /* Past a group's end its two streams, quants and scales, go on in the next pass's group;
         * what follows the panel may be another thread's. */
        const bool ends = b + ahead >= n_blocks;
        const size_t next = !ends ? 0 : (size_t)groups * group_bytes;
        const size_t skip =
            ends && t->last ? 0 : ahead * block_bytes + next - (ends ? n_blocks * block_bytes : 0);
        const uint8_t *scales =
            t->group + (b + ahead) * scale_bytes + next - (ends ? scales_bytes : 0);
        if (ends && t->last)
            scales = t->group;
        x512 x;
        if (rows == 1)
            x = load_x512(type, t->x + b);
#pragma GCC unroll 8
        for (int g = 0; g < groups; g++) {
            const uint8_t *at = quants + (size_t)g * group_bytes;
            const scales512 s = load_scales512(type, t->group + (size_t)g * group_bytes, b);
            for (size_t i = 0; i < block_bytes; i += 64)
                _mm_prefetch((const void *)(at + skip + i), _MM_HINT_T0);
            _mm_prefetch((const void *)(scales + (size_t)g * group_bytes), _MM_HINT_T0);
            if (rows == 1) {
                sums[g][0] = block_add_one512(type, at, &s, &x, sums[g][0]);
                continue;
            }
            weights512 w;
            unpack512(type, at, &w);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                sums[g][r] =
                    block_add512(type, &w, &s, t->x + (size_t)r * p->x_stride + b, sums[g][r]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
            store_row512(t->y + (size_t)r * p->ldy + g * SH_GROUP_ROWS,
                         g == groups - 1 ? t->outs : SH_GROUP_ROWS, p->add, sums[g][r]);
}

/* rows rows of x from row r on, all groups: `groups` at a time, then the rest. */
SH_TARGET_AVX512 SH_INLINE void few512(const sh_panel *p, size_t r, sh_type type, int rows)
{
    const int groups = rows == 1 ? FEW_GROUPS : rows <= 4 ? FEW_GROUPS / 2 : FEW_GROUPS / 4;
    const size_t group_bytes = sh_group_bytes(type, p->n_blocks * 32);
    size_t left = (p->outs + SH_GROUP_ROWS - 1) / SH_GROUP_ROWS;
    const size_t last = p->outs - (left - 1) * SH_GROUP_ROWS; /* columns of the last group */
    tile512 t = {p->groups, p->x + r * p->x_stride, p->y + r * p->ldy, SH_GROUP_ROWS, false};
    while (left > 0) {
        size_t n = left >= (size_t)groups ? (size_t)groups : (left >= 2 ? 2 : 1);
        t.outs = n == left ? last : SH_GROUP_ROWS;
        t.last = n == left;
        if (n == (size_t)groups)
            few_run512(p, &t, type, groups, rows);
        else if (n == 2)
            few_run512(p, &t, type, 2, rows);
        else
            few_run512(p, &t, type, 1, rows);
        t.group += n * group_bytes;
        t.y += n * SH_GROUP_ROWS;
        left -= n;
    }
}

/* ---- any number ---- */

/* rows rows of x from row r on, all groups. */
SH_TARGET_AVX512 SH_INLINE void pass512(const sh_panel *p, size_t r, sh_type type, int rows)
{
    const size_t group_bytes = sh_group_bytes(type, p->n_blocks * 32);
    tile512 t = {p->groups, p->x + r * p->x_stride, p->y + r * p->ldy, SH_GROUP_ROWS, false};
    for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS) {
        t.outs = SH_MIN(p->outs - o, (size_t)SH_GROUP_ROWS);
        tile_run512(p, &t, type, rows);
        t.group += group_bytes;
        t.y += SH_GROUP_ROWS;
    }
}

SH_TARGET_AVX512 SH_INLINE void panel512(const sh_panel *p, sh_type type)
{
    size_t r = 0;
    for (; r + 16 <= p->n; r += 16)
        pass512(p, r, type, 16);
    if (p->n - r >= 8) {
        few512(p, r, type, 8);
        r += 8;
    }
    for (; p->n - r >= 4; r += 4)
        few512(p, r, type, 4);
    switch (p->n - r) {
    case 3:
        few512(p, r, type, 3);
        break;
    case 2:
        few512(p, r, type, 2);
        break;
    case 1:
        few512(p, r, type, 1);
        break;
    default:
        break;
    }
}

SH_PANELS(SH_TARGET_AVX512, panel512)

void sh_panel_avx512(const sh_panel *p){
#define PANEL(TYPE) panel_##TYPE(p)
    SH_EACH_BLOCK_TYPE(p->type, PANEL)
#undef PANEL
}

/* ---- activations ---- */

/* As sh_x_quantize_body. */
SH_TARGET_AVX512 void sh_x_quantize_avx512(const float *x, size_t n_blocks, sh_x_block *blocks)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (size_t b = 0; b < n_blocks; b++, x += SH_X_VALUES, blocks++) {
        __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
        __m512i both = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                        _mm512_and_si512(_mm512_castps_si512(high), magnitude));
        uint32_t bits = _mm512_reduce_max_epu32(both);
        float largest = sh_bits_to_f32(bits);
        bool finite = bits < 0x7f800000u, scaled = finite && largest >= SH_LARGEST_MIN;
        float d = scaled ? largest / 127.0f : (finite ? 0 : sh_bits_to_f32(0x7fc00000u));
        __mmask16 mask = scaled ? 0xffff : 0; /* NaN times 0 is no number */
        __m512 inverse = _mm512_set1_ps(scaled ? 127.0f / largest : 0);
        __m512i q[2] = {_mm512_cvtps_epi32(_mm512_maskz_mul_ps(mask, low, inverse)),
                        _mm512_cvtps_epi32(_mm512_maskz_mul_ps(mask, high, inverse))};
        _mm_storeu_si128((void *)blocks->q, _mm512_cvtepi32_epi8(q[0]));
        _mm_storeu_si128((void *)(blocks->q + 16), _mm512_cvtepi32_epi8(q[1]));
        sh_x_block_finish(blocks, d, _mm512_reduce_add_epi32(q[0]), _mm512_reduce_add_epi32(q[1]));
    }
}

/* ---- packing ---- */

/* 16 bytes of each of 16 rows, turned: out[v] has bytes 4v .. 4v + 3 of rows 0, 1, ... 15. */
SH_TARGET_AVX512 SH_INLINE void turn512(const uint8_t *rows, size_t row_bytes, __m512i out[4])
{
    __m512i a[4]; /* 128-bit lane l: row i + 4l */
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        const uint8_t *at = rows + i * row_bytes;
        const __m128i *lane[4];
        for (size_t l = 0; l < 4; l++)
            lane[l] = (const void *)(at + 4 * l * row_bytes);
        a[i] = _mm512_castsi128_si512(_mm_loadu_si128(lane[0]));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, _mm_loadu_si128(lane[1]));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, _mm_loadu_si128(lane[2]));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, _mm_loadu_si128(lane[3]));
    }
    __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpacklo_epi32(a[2], a[3]);
    __m512i t2 = _mm512_unpackhi_epi32(a[0], a[1]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(t0, t1);
    out[1] = _mm512_unpackhi_epi64(t0, t1);
    out[2] = _mm512_unpacklo_epi64(t2, t3);
    out[3] = _mm512_unpackhi_epi64(t2, t3);
}

SH_TARGET_AVX512 SH_INLINE void store4(uint8_t *at, const __m512i v[4])
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        _mm512_storeu_si512((void *)(at + 64 * i), v[i]);
}

/* The scale at the head of a block of each of 16 rows. */
SH_TARGET_AVX512 SH_INLINE void turn_scales(const uint8_t *rows, size_t row_bytes, uint8_t *to)
{
#pragma GCC unroll 4
    for (size_t i = 0; i < 16; i += 4, rows += 4 * row_bytes) {
        memcpy(to + 2 * i, rows, 2);
        memcpy(to + 2 * i + 2, rows + row_bytes, 2);
        memcpy(to + 2 * i + 4, rows + 2 * row_bytes, 2);
        memcpy(to + 2 * i + 6, rows + 3 * row_bytes, 2);
    }
}

/* The next group of rows lies behind this one: fetched while this one is packed. */
SH_TARGET_AVX512 SH_INLINE void prefetch_group(const uint8_t *rows, size_t row_bytes, size_t b,
                                               size_t bytes)
{
    const uint8_t *at = rows + SH_GROUP_ROWS * row_bytes + b * bytes;
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const void *)(at + i), _MM_HINT_T1);
}

SH_TARGET_AVX512 static void pack_q8_0(const uint8_t *rows, size_t row_bytes, size_t n_blocks,
                                       uint8_t *group)
{
    uint8_t *quants = group + sh_group_scales_bytes(SH_TYPE_Q8_0, n_blocks * 32);
    for (size_t b = 0; b < n_blocks; b++, quants += 512) {
        const uint8_t *at = rows + b * sizeof(sh_block_q8_0);
        __m512i v[4];
        prefetch_group(rows, row_bytes, b, SH_GROUP_ROWS * sizeof(sh_block_q8_0));
        turn_scales(at, row_bytes, group + 32 * b);
        turn512(at + offsetof(sh_block_q8_0, qs), row_bytes, v);
        store4(quants, v);
        turn512(at + offsetof(sh_block_q8_0, qs) + 16, row_bytes, v);
        store4(quants + 256, v);
    }
}

SH_TARGET_AVX512 static void pack_q4_0(const uint8_t *rows, size_t row_bytes, size_t n_blocks,
                                       uint8_t *group)
{
    uint8_t *quants = group + sh_group_scales_bytes(SH_TYPE_Q4_0, n_blocks * 32);
    for (size_t b = 0; b < n_blocks; b++, quants += 256) {
        const uint8_t *at = rows + b * sizeof(sh_block_q4_0);
        __m512i v[4];
        prefetch_group(rows, row_bytes, b, SH_GROUP_ROWS * sizeof(sh_block_q4_0));
        turn_scales(at, row_bytes, group + 32 * b);
        turn512(at + offsetof(sh_block_q4_0, qs), row_bytes, v);
        store4(quants, v);
    }
}

/* The file has two neighbouring blocks in the nibbles of 32 bytes, a group the two halves of one
 * block in those of 16. */
SH_TARGET_AVX512 static void pack_q4_k(const uint8_t *rows, size_t row_bytes, size_t n_blocks,
                                       uint8_t *quants)
{
    const __m512i low = _mm512_set1_epi8(15);
    for (size_t b = 0; b < n_blocks; b += 2, quants += 512) {
        const uint8_t *at =
            rows + b / 8 * sizeof(sh_block_q4_k) + offsetof(sh_block_q4_k, qs) + b % 8 * 16;
        __m512i first[4], second[4], v[4];
        turn512(at, row_bytes, first);
        turn512(at + 16, row_bytes, second);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512i top = _mm512_slli_epi16(_mm512_and_si512(second[i], low), 4);
            v[i] = _mm512_or_si512(_mm512_and_si512(first[i], low), top);
            first[i] = _mm512_and_si512(_mm512_srli_epi16(first[i], 4), low);
            first[i] = _mm512_or_si512(first[i], _mm512_andnot_si512(low, second[i]));
        }
        store4(quants, v);
        store4(quants + 256, first);
    }
}

/* Vectors 4 h .. 4 h + 3 of a quarter (a block of 32) of half a super-block of Q6_K: low nibbles to
 * the place of h in `both`, the top bits as a vector. */
SH_TARGET_AVX512 SH_INLINE __m512i q6_k_part(const uint8_t *ql, const uint8_t *qh, size_t row_bytes,
                                             int quarter, __m512i nibbles[4])
{
    const __m512i low = _mm512_set1_epi8(15), two = _mm512_set1_epi8(3);
    __m512i high[4], top = _mm512_setzero_si512();
    turn512(ql, row_bytes, nibbles);
    turn512(qh, row_bytes, high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i bits = _mm512_srl_epi16(high[i], _mm_cvtsi32_si128(2 * quarter));
        bits = _mm512_and_si512(bits, two);
        top = _mm512_or_si512(top, _mm512_slli_epi16(bits, (unsigned)(2 * i)));
        nibbles[i] = _mm512_srl_epi16(nibbles[i], _mm_cvtsi32_si128(quarter / 2 * 4));
        nibbles[i] = _mm512_and_si512(nibbles[i], low);
    }
    return top;
}

SH_TARGET_AVX512 static void pack_q6_k(const uint8_t *rows, size_t row_bytes, size_t n_blocks,
                                       uint8_t *quants)
{
    for (size_t b = 0; b < n_blocks; b++, quants += 384) {
        const uint8_t *block = rows + b / 8 * sizeof(sh_block_q6_k);
        int quarter = (int)(b % 4);
        const uint8_t *ql = block + offsetof(sh_block_q6_k, ql) + b % 8 / 4 * 64 + b % 2 * 32;
        const uint8_t *qh = block + offsetof(sh_block_q6_k, qh) + b % 8 / 4 * 32;
        __m512i first[4], second[4];
        __m512i top = q6_k_part(ql, qh, row_bytes, quarter, first);
        _mm512_storeu_si512((void *)(quants + 256), top);
        top = q6_k_part(ql + 16, qh + 16, row_bytes, quarter, second);
        _mm512_storeu_si512((void *)(quants + 320), top);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            first[i] = _mm512_or_si512(first[i], _mm512_slli_epi16(second[i], 4));
        store4(quants, first);
    }
}

void sh_pack_group_avx512(sh_type type, const uint8_t *rows, size_t n_rows, size_t in,
                          uint8_t *group)
{
    size_t row_bytes = sh_type_row_bytes(type, in), n_blocks = in / 32;
    uint8_t *quants = group + sh_group_scales_bytes(type, in);
    if (n_rows < SH_GROUP_ROWS) {
        sh_pack_group_portable(type, rows, n_rows, in, group);
        return;
    }
    switch (type) {
    case SH_TYPE_Q8_0:
        pack_q8_0(rows, row_bytes, n_blocks, group);
        /* what rounds the scales up to a line is as the portable level has it */
        memset(group + 32 * n_blocks, 0, (size_t)(quants - group) - 32 * n_blocks);
        return;
    case SH_TYPE_Q4_0:
        pack_q4_0(rows, row_bytes, n_blocks, group);
        memset(group + 32 * n_blocks, 0, (size_t)(quants - group) - 32 * n_blocks);
        return;
    case SH_TYPE_Q4_K:
        sh_pack_scales(type, rows, n_rows, in, group);
        pack_q4_k(rows, row_bytes, n_blocks, quants);
        return;
    case SH_TYPE_Q6_K:
        sh_pack_scales(type, rows, n_rows, in, group);
        pack_q6_k(rows, row_bytes, n_blocks, quants);
        return;
    default:
        sh_pack_group_portable(type, rows, n_rows, in, group);
    }
}

#endif
