/*
 * Element-wise loops of the trainer, forward beside backward, one row a call. All in float32;
 * sums run in 16 fixed lanes, so a result depends on the row alone. The loops are compiled for
 * AVX-512, AVX2 and the baseline and chosen when the program starts: same bits on one machine.
 *
 * Threads: pure functions. Rows need no alignment.
 */
#ifndef SH_TRAINER_KERNELS_H
#define SH_TRAINER_KERNELS_H

#include "shared/base/status.h"

/* e^x with a relative error below 2e-7 (two units in the last place); x is clamped to
 * [-87.3, 88.3], NaN stays NaN. n values, in place. */
void tr_exp(float *x, size_t n);

/* y += x; y *= s */
void tr_add(float *y, const float *x, size_t n);
void tr_scale(float *y, float s, size_t n);
double tr_sum_squares(const float *x, size_t n);

/* RMSNorm: y = x * r * w, r = 1 / sqrt(mean(x^2) + eps), which is returned. */
float tr_rmsnorm(const float *x, const float *w, float eps, size_t n, float *y);
/* dx += what dy gives for x; r as returned by the forward pass. */
void tr_rmsnorm_backward(float *dx, const float *dy, const float *x, const float *w, float r,
                         size_t n);
/* dw += dy * x * r */
void tr_rmsnorm_backward_weight(float *dw, const float *dy, const float *x, float r, size_t n);

/* RoPE on adjacent pairs of `heads` heads of 2 * half values: (a, b) -> (a c - b s, a s + b c).
 * direction 1 turns forward, -1 back, which is the gradient. */
void tr_rope(float *x, const float *cosines, const float *sines, size_t half, size_t heads,
             float direction);

/* x[0, n) = softmax(x[0, n)), x[n, width) = 0. */
void tr_softmax(float *x, size_t n, size_t width);
/* dp becomes the gradient of the scores: p * (dp - sum(p * dp)). */
void tr_softmax_backward(float *dp, const float *p, size_t n);

/* h = silu(gate) * up */
void tr_swiglu(const float *gate, const float *up, size_t n, float *h);
/* gate and up are replaced by their gradients, dh is read. */
void tr_swiglu_backward(float *gate, float *up, const float *dh, size_t n);

/* Returns -ln softmax(z)[target]; z becomes scale * (softmax(z) - onehot(target)). */
double tr_cross_entropy(float *z, size_t n, size_t target, float scale);

/* out = w + sum over k of b[k] * a[k, :], a is [rank, n]. out may be w. */
void tr_fold_row(float *out, const float *w, const float *b, const float *a, size_t rank, size_t n);

/* One AdamW update of n values (Loshchilov & Hutter 2019, as PyTorch's torch.optim.AdamW). */
typedef struct {
    float beta1, beta2, eps;
    float step_size;       /* lr / (1 - beta1^t) */
    float sqrt_correction; /* sqrt(1 - beta2^t) */
    float decay;           /* 1 - lr * weight_decay */
} tr_adamw;
void tr_adamw_update(const tr_adamw *c, float *p, const float *g, float *m, float *v, size_t n);

#endif
