/*
 * Tensor types and the block formats of ggml: what the bytes mean, to and from float.
 * Source: ggml-quants.c and ggml-common.h of llama.cpp (block layouts), restated here by us.
 * A row of n values takes n / block_values blocks; n must be a multiple of block_values.
 */
#ifndef SH_MATH_QUANT_H
#define SH_MATH_QUANT_H

#include "shared/base/status.h"

typedef enum { /* values are GGUF's */
               SH_TYPE_F32 = 0,
               SH_TYPE_F16 = 1,
               SH_TYPE_Q4_0 = 2,
               SH_TYPE_Q4_1 = 3,
               SH_TYPE_Q5_0 = 6,
               SH_TYPE_Q5_1 = 7,
               SH_TYPE_Q8_0 = 8,
               SH_TYPE_Q4_K = 12,
               SH_TYPE_Q5_K = 13,
               SH_TYPE_Q6_K = 14,
               SH_TYPE_BF16 = 30,
} sh_type;

#define SH_Q8_0_VALUES 32
typedef struct {
    uint16_t d;    /* scale, IEEE half */
    int8_t qs[32]; /* value = d * qs */
} sh_block_q8_0;
#define SH_Q4_0_VALUES 32
typedef struct {
    uint16_t d;
    uint8_t qs[16]; /* value j = d * (low nibble - 8), value j + 16 = d * (high nibble - 8) */
} sh_block_q4_0;

typedef struct {
    const char *name;      /* "Q8_0" */
    uint32_t block_values; /* 1 for floats */
    uint32_t block_bytes;
    bool can_write; /* F32, F16, BF16, Q8_0, Q4_0 */
} sh_type_info;

/* NULL for a type that we do not know. */
const sh_type_info *sh_type_get(uint32_t type);
SH_MUST_USE sh_status sh_type_parse(const char *name, sh_type *out, sh_error *err);
/* Bytes of a row of n values; 0 when n is no multiple of the block. */
size_t sh_type_row_bytes(sh_type type, size_t n);

float sh_f16_to_f32(uint16_t h);
uint16_t sh_f32_to_f16(float x); /* round to nearest even */

/* out[n] from a row of any readable type. n a multiple of the type's block. */
void sh_row_dequantize(sh_type type, const void *row, float *out, size_t n);
/* row of a writable type from x[n]. Rounding as llama.cpp's reference quantizer: Q8_0 and Q4_0
 * bytes are equal to llama-quantize's. */
void sh_row_quantize(sh_type type, const float *x, void *row, size_t n);

#endif
