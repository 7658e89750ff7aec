/*
 * Quantized products with NEON's dot products (Armv8.2 dotprod): a vector of a group is worked on
 * in quarters of 4 rows; `sdot` by lane takes four values of x for all of them. Codes of Q8_0 are
 * signed here, those of 4, 5 and 6 bits are small enough to be taken as signed.
 */
#include "shared/math/kernel_internal.h"

#ifdef SH_TARGET_NEON
#include <arm_neon.h>

#define QUARTERS 4

SH_TARGET_NEON SH_INLINE uint8x16_t low_bits(uint8x16_t from, int mask)
{
    return vandq_u8(from, vdupq_n_u8((uint8_t)mask));
}

/* The bits of `mask` at `shift` places higher (lower, when it is negative). */
SH_TARGET_NEON SH_INLINE uint8x16_t bits_at(uint8x16_t from, int mask, int shift)
{
    return vshlq_u8(low_bits(from, mask), vdupq_n_s8((int8_t)shift));
}

/* One quarter of a block's vectors; `at` is the block, plus 16 a quarter. */
SH_TARGET_NEON SH_INLINE void unpack_neon(sh_type type, const uint8_t *at, int8x16_t w[8])
{
    const int bits = sh_code_bits(type);
    uint8x16_t u[8];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        uint8x16_t both = vld1q_u8(at + 64 * v);
        u[v] = bits == 8 ? both : low_bits(both, 15);
        u[v + 4] = bits == 8 ? vld1q_u8(at + 64 * v + 256) : vshrq_n_u8(both, 4);
    }
    if (bits == 5) {
        uint8x16_t high = vld1q_u8(at + 256);
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            u[v] = vorrq_u8(u[v], bits_at(high, 1 << v, 4 - v));
    } else if (bits == 6) {
        uint8x16_t high[2] = {vld1q_u8(at + 256), vld1q_u8(at + 320)};
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            u[v] = vorrq_u8(u[v], bits_at(high[v / 4], 3 << v % 4 * 2, 4 - v % 4 * 2));
    }
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++)
        w[v] = vreinterpretq_s8_u8(u[v]);
}

typedef struct {
    float32x4_t d[2], m; /* value = d * code + m; d[1] of the second 16 columns, of Q6_K only */
} scales_neon;

SH_TARGET_NEON SH_INLINE float32x4_t halves_neon(const uint8_t *at)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
}

SH_TARGET_NEON SH_INLINE float32x4_t bytes_neon(const uint8_t *at, bool is_signed)
{
    uint32_t four;
    memcpy(&four, at, sizeof four);
    uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    if (is_signed)
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes)))));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}

/* Of rows 4 * quarter .. 4 * quarter + 3. */
SH_TARGET_NEON SH_INLINE scales_neon scales_load_neon(sh_type type, const uint8_t *scales, size_t b,
                                                      size_t quarter)
{
    const float32x4_t none = vdupq_n_f32(0);
    scales_neon s = {{none, none}, none};
    const size_t skip = 8 * quarter;
    if (type == SH_TYPE_Q6_K) {
        const uint8_t *at = scales + b / 8 * SH_Q6_K_SCALE_BYTES;
        const uint8_t *of_block = at + 32 + b % 8 * 32 + 4 * quarter;
        float32x4_t d = halves_neon(at + skip);
        s.d[0] = vmulq_f32(d, bytes_neon(of_block, true));
        s.d[1] = vmulq_f32(d, bytes_neon(of_block + 16, true));
    } else if (sh_is_k_quant(type)) {
        const uint8_t *at = scales + b / 8 * SH_K_SCALE_BYTES;
        const uint8_t *of_block = at + 64 + b % 8 * 32 + 4 * quarter;
        s.d[0] = vmulq_f32(halves_neon(at + skip), bytes_neon(of_block, false));
        s.m = vnegq_f32(vmulq_f32(halves_neon(at + 32 + skip), bytes_neon(of_block + 16, false)));
    } else if (sh_has_minima(type)) {
        s.d[0] = halves_neon(scales + b * 64 + skip);
        s.m = halves_neon(scales + b * 64 + 32 + skip);
    } else {
        s.d[0] = halves_neon(scales + b * 32 + skip);
    }
    return s;
}

/* start + four vectors of codes times 16 values of x. */
SH_TARGET_NEON SH_INLINE int32x4_t dot_neon(int32x4_t sum, const int8x16_t w[4], int8x16_t x)
{
    sum = vdotq_laneq_s32(sum, w[0], x, 0);
    sum = vdotq_laneq_s32(sum, w[1], x, 1);
    sum = vdotq_laneq_s32(sum, w[2], x, 2);
    return vdotq_laneq_s32(sum, w[3], x, 3);
}

SH_TARGET_NEON SH_INLINE float32x4_t block_add_neon(sh_type type, const int8x16_t w[8],
                                                    const scales_neon *s, const sh_x_block *x,
                                                    float32x4_t sum)
{
    const int8x16_t first = vld1q_s8(x->q), second = vld1q_s8(x->q + 16);
    if (type == SH_TYPE_Q6_K) {
        int32x4_t dot = dot_neon(vdupq_n_s32(x->start32[0]), w, first);
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(s->d[0], x->d));
        dot = dot_neon(vdupq_n_s32(x->start32[1]), w + 4, second);
        return vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(s->d[1], x->d));
    }
    int32x4_t dot = vdupq_n_s32(type == SH_TYPE_Q8_0 ? 0 : *sh_x_start(x, type));
    dot = dot_neon(dot_neon(dot, w, first), w + 4, second);
    sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(s->d[0], x->d));
    return sh_has_minima(type) ? vfmaq_f32(sum, s->m, vdupq_n_f32(x->d_sum)) : sum;
}

/* One group times `rows` (1, 2 or 4) rows of x. */
SH_TARGET_NEON SH_INLINE void tile_neon(const sh_panel *p, size_t o, size_t r, sh_type type,
                                        int rows)
{
    const size_t n_blocks = p->n_blocks, block_bytes = sh_group_block_bytes(type);
    const size_t outs = SH_MIN(p->outs - o, (size_t)SH_GROUP_ROWS);
    const uint8_t *group = p->groups + o / SH_GROUP_ROWS * sh_group_bytes(type, n_blocks * 32);
    const uint8_t *quants = group + sh_group_scales_bytes(type, n_blocks * 32);
    const sh_x_block *x = p->x + r * p->x_stride;
    float32x4_t sums[QUARTERS][4];
    float values[4][SH_GROUP_ROWS];
#pragma GCC unroll 4 /* every loop over sums, or they live in memory */
    for (size_t q = 0; q < QUARTERS; q++)
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
            sums[q][i] = vdupq_n_f32(0);
    for (size_t b = 0; b < n_blocks; b++, quants += block_bytes, x++) {
#pragma GCC unroll 4
        for (size_t q = 0; q < QUARTERS; q++) {
            int8x16_t w[8];
            const scales_neon s = scales_load_neon(type, group, b, q);
            unpack_neon(type, quants + 16 * q, w);
            __asm__ volatile("" ::: "memory"); /* no loads ahead: registers are few */
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++)
                sums[q][i] = block_add_neon(type, w, &s, x + (size_t)i * p->x_stride, sums[q][i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (size_t q = 0; q < QUARTERS; q++)
            vst1q_f32(values[i] + 4 * q, sums[q][i]);
    for (int i = 0; i < rows; i++) {
        float *y = p->y + (r + (size_t)i) * p->ldy + o;
        for (size_t l = 0; l < outs; l++)
            y[l] = p->add ? y[l] + values[i][l] : values[i][l];
    }
}

SH_TARGET_NEON SH_INLINE void panel_neon(const sh_panel *p, sh_type type)
{
    size_t r = 0;
    for (; p->n - r >= 4; r += 4)
        for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS)
            tile_neon(p, o, r, type, 4);
    for (; p->n - r >= 2; r += 2)
        for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS)
            tile_neon(p, o, r, type, 2);
    for (; r < p->n; r++)
        for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS)
            tile_neon(p, o, r, type, 1);
}

SH_TARGET_NEON void sh_panel_neon(const sh_panel *p)
{
#define PANEL(TYPE) panel_neon(p, TYPE)
    SH_EACH_BLOCK_TYPE(p->type, PANEL)
#undef PANEL
}

#endif
