/*
 * Matrix products with quantized weights: y [n, out] (+)= x [n, in]·Wᵀ, W [out, in].
 *
 * Weights stay quantized. Activations are quantized a block of 32 at a time to int8 (sh_x_block);
 * F32, F16 and BF16 weights take them as floats. Rows of W are worked on in groups of
 * SH_GROUP_ROWS, either from a packed copy (pack.h: the rows of a group interleaved, so that lanes
 * are rows), or from the file's rows, which are then interleaved on the way, a group at a time.
 * Both give the same bits.
 *
 * One value y[r, o] is made as follows, whatever the level, n, or the range of a call: the dot
 * product of each block (of each half block, where the type has a scale a 16 values) is an exact
 * integer; sum = fma(float(dot), d_w * d_x, sum) over the blocks in order, from 0; where the type
 * has minima, sum = fma(-m_w, d_sum_x, sum) after each block. So levels with FMA give the same
 * bits; "portable" without FMA differs by at most in/16 + 8 roundings of 2^-24 of Σ|terms|. Float
 * weights: 16 sums (value i to sum i % 16), folded as kernel_internal.h says.
 * A row of x with a NaN or an infinity gives NaN, and spoils no other row.
 *
 * Threads: pure functions; ranges of one product may run on several threads.
 */
#ifndef SH_MATH_PRODUCT_H
#define SH_MATH_PRODUCT_H

#include "shared/math/quant.h"

#define SH_GROUP_ROWS 16
#define SH_X_VALUES   32

/* 32 activations, one cache line: x ≈ d * q. The starts undo the offsets that kernels add to make
 * weights unsigned. A block with a NaN or an infinity has d = d_sum = NaN. */
typedef struct {
    int8_t q[SH_X_VALUES];
    float d, d_sum;                    /* d_sum = d * Σq */
    int32_t start8, start16, start128; /* -8, -16, -128 * Σq */
    int32_t start32[2];                /* -32 * Σ of each half of q */
    int32_t zero;
} sh_x_block;

/* Row stride of blocks: in / 32, or one more, so that it is odd. Rows whose blocks lay a power of
 * two apart would share the sets of a cache. */
static inline size_t sh_x_stride(size_t in)
{
    return in / SH_X_VALUES | 1;
}
/* blocks [n, in / 32], row stride sh_x_stride(in), of x [n, in], row stride ldx. in is a multiple
 * of 32. */
void sh_x_quantize(const float *x, size_t ldx, size_t n, size_t in, sh_x_block *blocks);

typedef struct {
    sh_type type;
    uint32_t out, in;
    const void *rows;   /* as in the file */
    const void *packed; /* pack.h; NULL: rows are used in place. Float types have none. */
} sh_weights;

/* Whether products with this type take blocks (every quantized type) or floats. */
bool sh_product_takes_blocks(sh_type type);

typedef struct {
    const sh_weights *w;
    const float *x; /* [n, in], row stride ldx; for float types */
    size_t ldx;
    const sh_x_block *blocks; /* [n, in / 32], row stride sh_x_stride(in); for the others */
    size_t n;
    float *y; /* [n, out], row stride ldy */
    size_t ldy;
    bool add; /* y += instead of y = */
} sh_product;

/* Columns begin .. end - 1 of y. begin is a multiple of SH_GROUP_ROWS. scratch: a thread's own,
 * 64-byte aligned, of sh_product_scratch_bytes (the same for any n). */
size_t sh_product_scratch_bytes(uint32_t in);
void sh_product_run(const sh_product *p, size_t begin, size_t end, void *scratch);

#endif
