/*
 * The level of the kernels (what the CPU has, chosen once), and the small products on floats. The
 * products with weights are in product.h.
 */
#ifndef SH_MATH_KERNEL_H
#define SH_MATH_KERNEL_H

#include "shared/base/status.h"

/* "avx512-vnni", "avx-vnni", "avx2", "neon-dotprod" or "portable" (plain C, vectorized by the
 * compiler). SHOAL_KERNEL in the environment forces one; a name that is not available here is
 * logged and passed over. What levels may differ in: product.h. */
const char *sh_kernel_level(void);
/* Forces a level by its name before anything has used one. SH_ERR_USAGE: no such name (the text
 * lists them), or not on this machine; SH_ERR_INVALID: another is in use already. NULL: nothing. */
SH_MUST_USE sh_status sh_kernel_force(const char *name, sh_error *err);

float sh_dot(const float *a, const float *b, size_t n);
/* y += s * x */
void sh_axpy(float *y, float s, const float *x, size_t n);

#endif
