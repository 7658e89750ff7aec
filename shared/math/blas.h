/*
 * OpenBLAS behind three calls: the only file that knows its header. One BLAS thread a calling
 * thread: parallelism lives above (workers), so results do not depend on the thread count.
 */
#ifndef SH_MATH_BLAS_H
#define SH_MATH_BLAS_H

#include "shared/base/status.h"

/* Sets one BLAS thread, and ends those that OpenBLAS has started; call before any worker starts. */
void sh_blas_init(void);
/* The core that OpenBLAS chose ("SkylakeX", "Haswell", …); part of every result hash. */
const char *sh_blas_core(void);

/* NULL; or what to do when the core that was chosen leaves a good part of the processor unused, as
 * OPENBLAS_CORETYPE in the environment can make it. */
const char *sh_blas_advice(void);

/* C [m, n] = alpha * op(A)·op(B) + beta * C, row-major, with leading dimensions. */
typedef struct {
    bool trans_a, trans_b;
    size_t m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
    size_t lda, ldb, ldc;
} sh_gemm;
void sh_sgemm(const sh_gemm *g);

/* Thin QR of A [m, n] (m >= n), in place: A becomes Q, R [n, n] upper triangular. */
SH_MUST_USE sh_status sh_sqr(float *a, size_t m, size_t n, float *r, sh_error *err);
/* A [m, n] = U [m, k] · diag(s) · Vt [k, n], k = min(m, n), s descending. A is destroyed. */
SH_MUST_USE sh_status sh_ssvd(float *a, size_t m, size_t n, float *u, float *s, float *vt,
                              sh_error *err);

#endif
