/*
 * Kernels on floats for the NEON level, and its table. They need no more than every aarch64 has;
 * the products of int8 (product_neon.c) are what the level asks of the processor.
 */
#include "shared/math/kernel_internal.h"

#ifdef SH_TARGET_NEON
#include <arm_neon.h>

/* ---- quantizing x ---- */

/* As sh_x_quantize_body, bit for bit: rounding to nearest even is one instruction here. */
static void x_block_neon(const float *x, sh_x_block *block)
{
    float32x4_t values[8];
    uint32x4_t bits = vdupq_n_u32(0);
    for (int v = 0; v < 8; v++) {
        values[v] = vld1q_f32(x + 4 * v);
        bits = vmaxq_u32(bits, vreinterpretq_u32_f32(vabsq_f32(values[v])));
    }
    const uint32_t largest_bits = vmaxvq_u32(bits);
    const float largest = sh_bits_to_f32(largest_bits);
    if (largest_bits >= 0x7f800000u || largest < SH_LARGEST_MIN) {
        memset(block->q, 0, sizeof block->q);
        sh_x_block_finish(block, largest_bits >= 0x7f800000u ? sh_bits_to_f32(0x7fc00000u) : 0, 0,
                          0);
        return;
    }
    const float inverse = 127.0f / largest;
    int16x4_t four[8];
    for (int v = 0; v < 8; v++)
        four[v] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(values[v], inverse)));
    int8x16_t q[2];
    for (int h = 0; h < 2; h++) {
        const int16x4_t *of_half = four + 4 * h;
        q[h] = vcombine_s8(vmovn_s16(vcombine_s16(of_half[0], of_half[1])),
                           vmovn_s16(vcombine_s16(of_half[2], of_half[3])));
        vst1q_s8(block->q + 16 * h, q[h]);
    }
    sh_x_block_finish(block, largest / 127.0f, vaddlvq_s8(q[0]), vaddlvq_s8(q[1]));
}

static void x_quantize_neon(const float *x, size_t n_blocks, sh_x_block *blocks)
{
    for (size_t b = 0; b < n_blocks; b++)
        x_block_neon(x + b * SH_X_VALUES, &blocks[b]);
}

/* ---- products of floats ---- */

/* The 16 lanes of a sum, or 16 values. */
typedef struct {
    float32x4_t part[4];
} lanes;

SH_INLINE lanes lanes_load(sh_type type, const void *w, size_t i)
{
    lanes out;
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; k++) {
        if (type == SH_TYPE_F32) {
            out.part[k] = vld1q_f32((const float *)w + i + 4 * k);
        } else {
            const uint16x4_t h = vld1_u16((const uint16_t *)w + i + 4 * k);
            out.part[k] = type == SH_TYPE_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(h))
                                              : vreinterpretq_f32_u32(vshll_n_u16(h, 16));
        }
    }
    return out;
}

/* The order of sh_lanes_fold. */
SH_INLINE float fold_neon(lanes s)
{
    const float32x4_t four =
        vaddq_f32(vaddq_f32(s.part[0], s.part[2]), vaddq_f32(s.part[1], s.part[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

/* The last, fewer than 16, values of a row. */
static lanes tail_neon(lanes sum, sh_type type, const void *w, const float *x, size_t i, size_t in)
{
    float all[SH_LANES];
    memcpy(all, sum.part, sizeof all);
    for (size_t l = 0; i + l < in; l++)
        all[l] = __builtin_fmaf(sh_weight_at(type, w, i + l), x[i + l], all[l]);
    memcpy(sum.part, all, sizeof all);
    return sum;
}

/* `outs` rows of W times `rows` rows of x: no more than four of them, or sums leave registers. */
SH_INLINE void floats_tile_neon(const sh_float_product *p, size_t o, size_t r, int outs, int rows,
                                sh_type type)
{
    const size_t row_bytes = p->in * (type == SH_TYPE_F32 ? 4 : 2);
    const uint8_t *w = (const uint8_t *)p->w + o * row_bytes;
    const float *x = p->x + r * p->ldx;
    lanes sums[4];
    size_t i = 0;
#pragma GCC unroll 4
    for (int s = 0; s < outs * rows; s++)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            sums[s].part[k] = vdupq_n_f32(0);
    for (; i + SH_LANES <= p->in; i += SH_LANES) {
#pragma GCC unroll 4
        for (int s = 0; s < outs * rows; s++) { /* outs or rows is 1: loads are the compiler's */
            const lanes a = lanes_load(type, w + (size_t)(s / rows) * row_bytes, i);
            const lanes b = lanes_load(SH_TYPE_F32, x + (size_t)(s % rows) * p->ldx, i);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                sums[s].part[k] = vfmaq_f32(sums[s].part[k], a.part[k], b.part[k]);
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < outs * rows; s++) {
        if (i < p->in)
            sums[s] = tail_neon(sums[s], type, w + (size_t)(s / rows) * row_bytes,
                                x + (size_t)(s % rows) * p->ldx, i, p->in);
        float *y = p->y + (r + (size_t)(s % rows)) * p->ldy + o + (size_t)(s / rows);
        *y = p->add ? *y + fold_neon(sums[s]) : fold_neon(sums[s]);
    }
}

SH_INLINE void floats_product_neon(const sh_float_product *p, sh_type type)
{
    size_t r = 0;
    for (; r + 4 <= p->n; r += 4)
        for (size_t o = 0; o < p->out; o++)
            floats_tile_neon(p, o, r, 1, 4, type);
    for (; r < p->n; r++) {
        size_t o = 0;
        for (; o + 4 <= p->out; o += 4)
            floats_tile_neon(p, o, r, 4, 1, type);
        for (; o < p->out; o++)
            floats_tile_neon(p, o, r, 1, 1, type);
    }
}

static void floats_neon(const sh_float_product *p)
{
    SH_EACH_FLOAT_TYPE(p, floats_product_neon)
}

static void axpy_neon(float *y, float s, const float *x, size_t n)
{
    size_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), vld1q_f32(x + i), s));
    for (; i < n; i++)
        y[i] = __builtin_fmaf(s, x[i], y[i]);
}

const sh_kernels sh_kernels_neon = {
    .x_quantize = x_quantize_neon,
    .panel = sh_panel_neon,
    .pack_group = sh_pack_group_portable,
    .floats = floats_neon,
    .axpy = axpy_neon,
};

#endif
