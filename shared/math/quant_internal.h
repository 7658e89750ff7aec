/*
 * Half and bfloat16 conversion, and the block layouts that only math reads: internal to math.
 */
#ifndef SH_MATH_QUANT_INTERNAL_H
#define SH_MATH_QUANT_INTERNAL_H

#include <string.h>

#include "shared/math/dispatch.h"
#include "shared/math/quant.h"

/* Value j < 16 from the low nibble of qs[j], value j + 16 from the high one; qh: bit j is value j's
 * fifth. */
typedef struct {
    uint16_t d, m; /* value = d * q + m */
    uint8_t qs[16];
} sh_block_q4_1;
typedef struct {
    uint16_t d; /* value = d * (q - 16) */
    uint8_t qh[4], qs[16];
} sh_block_q5_0;
typedef struct {
    uint16_t d, m; /* value = d * q + m */
    uint8_t qh[4], qs[16];
} sh_block_q5_1;

#define SH_K_VALUES 256 /* a super-block of the K-quants */

/* 8 sub-blocks of 32: value = d * scale * q - dmin * min; scales and mins are 6 bits each. */
typedef struct {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128];
} sh_block_q4_k;

/* The same with a fifth bit: that of value l of sub-block j is bit j of qh[l]. */
typedef struct {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
} sh_block_q5_k;

/* 16 sub-blocks of 16: value = d * scale * (q - 32), q of 6 bits: 4 in ql, 2 in qh. */
typedef struct {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
} sh_block_q6_k;

SH_INLINE float sh_bits_to_f32(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

SH_INLINE uint32_t sh_f32_to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Shifting a half's bits into a float's place leaves the exponent 112 too small, for subnormals
 * too; infinity and NaN have to be put back. */
SH_INLINE float sh_half_to_float(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t bits = sh_f32_to_bits(sh_bits_to_f32(magnitude) * 0x1p112f);
    bits |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    return sh_bits_to_f32(bits | (uint32_t)(h & 0x8000u) << 16);
}

SH_INLINE float sh_bf16_to_float(uint16_t h)
{
    return sh_bits_to_f32((uint32_t)h << 16);
}

/* Scale and min of sub-block j of Q4_K and Q5_K: 6 bits each; those of 4..7 have their top bits in
 * the bytes of 0..3. */
SH_INLINE void sh_k_scale(const uint8_t s[12], size_t j, uint8_t *scale, uint8_t *min)
{
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (uint8_t)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (uint8_t)(s[j + 4] >> 4 | (s[j] >> 6) << 4);
    }
}

#endif
