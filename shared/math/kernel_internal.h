/*
 * One table of kernels a level: internal to math and its tests.
 *
 * Every kernel keeps 16 float sums an output ("lanes") and folds them in one order, so that the
 * levels that have FMA give the same bits, and so that a row's result does not depend on the rows
 * beside it. Lane l of a quantized product holds values 4l..4l+3 of each pair of blocks (l < 8 the
 * even block, l >= 8 the odd one); lane l of a float product holds the values i with i % 16 == l.
 */
#ifndef SH_MATH_KERNEL_INTERNAL_H
#define SH_MATH_KERNEL_INTERNAL_H

#include "shared/math/dispatch.h"
#include "shared/math/kernel.h"
#include "shared/math/quant_internal.h"

#define SH_LANES       16
#define SH_PAIR_VALUES 64 /* two blocks of Q8_0 or Q4_0 */

/* Activations of two blocks. An odd last block is filled up with zeros. */
typedef struct {
    int8_t q[SH_PAIR_VALUES];
    /* -offset * the sum of the lane's q: kernels multiply with weights that were made unsigned by
     * adding the offset (128 for Q8_0, 8 for Q4_0), and start their sums here. */
    int32_t start[SH_LANES];
    float d[SH_LANES]; /* the block's scale, in each of its lanes */
} sh_x_pair;

#define SH_Q8_0_OFFSET 128
#define SH_Q4_0_OFFSET 8

/* A product y [n, out] = x [n, in]·Wᵀ on quantized x: pairs [n, n_pairs]. */
typedef struct {
    const uint8_t *w;
    size_t row_bytes, n_blocks, out;
    const sh_x_pair *x;
    size_t n_pairs, n;
    float *y;
    size_t ldy;
} sh_quant_product;

/* The same on floats. */
typedef struct {
    const float *w;
    size_t in, out;
    const float *x;
    size_t n;
    float *y;
    size_t ldy;
} sh_float_product;

typedef struct {
    /* x [n_blocks * 32] to pairs. A block with a NaN or an infinity gets the scale NaN. */
    void (*quantize_row)(const float *x, size_t n_blocks, int32_t offset, sh_x_pair *pairs);
    void (*q8_0)(const sh_quant_product *p);
    void (*q4_0)(const sh_quant_product *p);
    void (*f32)(const sh_float_product *p);
    void (*axpy)(float *y, float s, const float *x, size_t n);
} sh_kernels;

extern const sh_kernels sh_kernels_portable;
#if SH_X86
extern const sh_kernels sh_kernels_avx2;
extern const sh_kernels sh_kernels_avx512;
#endif

/* The table of a level that is available. */
const sh_kernels *sh_kernels_of(sh_level level);
/* sh_matmul with the kernels of one level. */
void sh_matmul_with(const sh_kernels *kernels, sh_type type, const sh_float_product *p,
                    const void *w, void *scratch);

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

SH_INLINE void sh_quantize_block(const float *x, int32_t offset, int8_t *q, int32_t *start,
                                 float *d)
{
    uint32_t bits = 0; /* of the largest magnitude: as integers they order like the floats */
    for (size_t i = 0; i < 32; i++) {
        uint32_t magnitude = sh_f32_to_bits(x[i]) & 0x7fffffffu;
        bits = SH_MAX(bits, magnitude);
    }
    bool finite = bits < 0x7f800000u;
    float largest = sh_bits_to_f32(bits);
    bool zero = !finite || largest < SH_LARGEST_MIN;
    float inverse = zero ? 0 : 127.0f / largest;
    float scale = finite ? (zero ? 0 : largest / 127.0f) : sh_bits_to_f32(0x7fc00000u);
    for (size_t i = 0; i < 32; i++) { /* adding 1.5 * 2^23 rounds to nearest even */
        float rounded = (finite ? x[i] : 0) * inverse + 0x1.8p23f;
        q[i] = (int8_t)(int32_t)(rounded - 0x1.8p23f);
    }
    for (size_t l = 0; l < 8; l++) {
        start[l] = -offset * (q[4 * l] + q[4 * l + 1] + q[4 * l + 2] + q[4 * l + 3]);
        d[l] = scale;
    }
}

SH_INLINE void sh_quantize_row_body(const float *x, size_t n_blocks, int32_t offset,
                                    sh_x_pair *pairs)
{
    if (n_blocks % 2 != 0)
        pairs[n_blocks / 2] = (sh_x_pair){0};
    for (size_t b = 0; b < n_blocks; b++) {
        sh_x_pair *pair = &pairs[b / 2];
        size_t half = b % 2;
        sh_quantize_block(x + b * 32, offset, pair->q + half * 32, pair->start + half * 8,
                          pair->d + half * 8);
    }
}

#endif
