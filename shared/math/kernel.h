/*
 * Dense kernels of the forward pass, chosen once by what the CPU has.
 *
 * Weights stay quantized; activations of quantized products are quantized a block at a time to
 * int8 for Q8_0 and Q4_0 (other types are dequantized a few rows at a time). The result for a row
 * of x does not depend on how many rows a call has: integer block dot products are exact, floats
 * are added in one order. A row with a NaN or an infinity gives NaN, and spoils no other row.
 */
#ifndef SH_MATH_KERNEL_H
#define SH_MATH_KERNEL_H

#include "shared/math/quant.h"

/* "avx512-vnni", "avx2" or "portable" (plain C, on ARM vectorized by the compiler). SHOAL_KERNEL in
 * the environment forces one; a name that is not available here is logged and passed over. The
 * first two give the same bits; "portable" differs from them by at most in/16 + 8 roundings of
 * 2^-24 of the sum of |terms|. */
const char *sh_kernel_level(void);

/* y [n, out] = x [n, in] · Wᵀ, W [out, in] of any readable type; scratch of
 * sh_matmul_scratch_bytes(n, in) bytes, 64-byte aligned. One thread. */
size_t sh_matmul_scratch_bytes(size_t n, size_t in);
void sh_matmul(sh_type type, const void *w, size_t out, size_t in, const float *x, size_t n,
               float *y, void *scratch);
float sh_dot(const float *a, const float *b, size_t n);
/* y += s * x */
void sh_axpy(float *y, float s, const float *x, size_t n);

#endif
