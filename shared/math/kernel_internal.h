/*
 * One table of kernels a level: internal to math and its tests.
 *
 * Quantized products: product.h says how a value is made. Float products keep 16 sums an output
 * ("lanes", value i in lane i % 16) and fold them in one order, so that the levels that have FMA
 * give the same bits, and so that a row's result does not depend on the rows beside it.
 */
#ifndef SH_MATH_KERNEL_INTERNAL_H
#define SH_MATH_KERNEL_INTERNAL_H

#include "shared/math/dispatch.h"
#include "shared/math/kernel.h"
#include "shared/math/product_internal.h"
#include "shared/math/quant_internal.h"

/* Whether "portable" is one of the levels with FMA: where the baseline has it. */
#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
#define SH_PORTABLE_FMA          1
#define SH_MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define SH_PORTABLE_FMA          0
#define SH_MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

#define SH_LANES 16
/* y [n, out] (+)= x [n, in]·Wᵀ on floats. */
typedef struct {
    sh_type type; /* F32, F16 or BF16 */
    const void *w;
    size_t in, out;
    const float *x;
    size_t ldx, n;
    float *y;
    size_t ldy;
    bool add;
} sh_float_product;

/* BODY(product, type) for the product's type, as a constant. */
#define SH_EACH_FLOAT_TYPE(p, BODY)                                                                \
    switch ((p)->type) {                                                                           \
    case SH_TYPE_F32:                                                                              \
        BODY(p, SH_TYPE_F32);                                                                      \
        break;                                                                                     \
    case SH_TYPE_F16:                                                                              \
        BODY(p, SH_TYPE_F16);                                                                      \
        break;                                                                                     \
    case SH_TYPE_BF16:                                                                             \
        BODY(p, SH_TYPE_BF16);                                                                     \
        break;                                                                                     \
    default:                                                                                       \
        SH_ASSERT(!"a float type");                                                                \
    }

/* Value i of a row of weights. */
SH_INLINE float sh_weight_at(sh_type type, const void *w, size_t i)
{
    if (type == SH_TYPE_F32)
        return ((const float *)w)[i];
    uint16_t h = ((const uint16_t *)w)[i];
    return type == SH_TYPE_F16 ? sh_half_to_float(h) : sh_bf16_to_float(h);
}

typedef struct {
    sh_x_quantize_fn *x_quantize;
    sh_panel_fn *panel;
    sh_pack_group_fn *pack_group;
    void (*floats)(const sh_float_product *p);
    void (*axpy)(float *y, float s, const float *x, size_t n);
} sh_kernels;

extern const sh_kernels sh_kernels_portable;
#if SH_X86
extern const sh_kernels sh_kernels_avx2;
extern const sh_kernels sh_kernels_avx_vnni;
extern const sh_kernels sh_kernels_avx512;
#endif
#ifdef SH_TARGET_NEON
extern const sh_kernels sh_kernels_neon;
#endif

/* The table of a level that is available. */
const sh_kernels *sh_kernels_of(sh_level level);
/* sh_x_quantize and sh_product_run with the kernels of one level. */
void sh_x_quantize_with(const sh_kernels *kernels, const float *x, size_t ldx, size_t n, size_t in,
                        sh_x_block *blocks);
void sh_product_run_with(const sh_kernels *kernels, const sh_product *p, size_t begin, size_t end,
                         void *scratch);
/* The one order in which lanes are added. */
SH_INLINE float sh_lanes_fold(const float lanes[SH_LANES])
{
    float t[SH_LANES / 2];
    for (size_t l = 0; l < 8; l++)
        t[l] = lanes[l] + lanes[l + 8];
    for (size_t l = 0; l < 4; l++)
        t[l] = t[l] + t[l + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
}

/* Below this a block counts as zero: 127 / largest would overflow. */
#define SH_LARGEST_MIN 1e-35f

/* What follows from the scale and the sums of q's halves. */
SH_INLINE void sh_x_block_finish(sh_x_block *block, float d, int32_t first, int32_t second)
{
    int32_t sum = first + second;
    block->d = d;
    block->d_sum = d * (float)sum;
    block->start8 = -8 * sum;
    block->start16 = -16 * sum;
    block->start128 = -128 * sum;
    block->start32[0] = -32 * first;
    block->start32[1] = -32 * second;
    block->zero = 0;
}

/* One block of the portable level, and of the levels that the compiler vectorizes it for. */
SH_INLINE void sh_x_quantize_body(const float *x, sh_x_block *block)
{
    uint32_t bits = 0; /* of the largest magnitude: as integers they order like the floats */
    for (size_t i = 0; i < SH_X_VALUES; i++) {
        uint32_t magnitude = sh_f32_to_bits(x[i]) & 0x7fffffffu;
        bits = SH_MAX(bits, magnitude);
    }
    bool finite = bits < 0x7f800000u;
    float largest = sh_bits_to_f32(bits);
    bool zero = !finite || largest < SH_LARGEST_MIN;
    float inverse = zero ? 0 : 127.0f / largest;
    float d = finite ? (zero ? 0 : largest / 127.0f) : sh_bits_to_f32(0x7fc00000u);
    int32_t sums[2] = {0, 0};
    for (size_t i = 0; i < SH_X_VALUES; i++) { /* adding 1.5 * 2^23 rounds to nearest even */
        float rounded = (finite ? x[i] : 0) * inverse + 0x1.8p23f;
        block->q[i] = (int8_t)(int32_t)(rounded - 0x1.8p23f);
    }
    for (size_t i = 0; i < SH_X_VALUES / 2; i++) {
        sums[0] += block->q[i];
        sums[1] += block->q[i + SH_X_VALUES / 2];
    }
    sh_x_block_finish(block, d, sums[0], sums[1]);
}

#endif
