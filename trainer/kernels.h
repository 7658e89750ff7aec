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

/* y += x; y *= s; y = a y + b x */
void tr_add(float *y, const float *x, size_t n);
void tr_scale(float *y, float s, size_t n);
void tr_blend(float *y, float a, const float *x, float b, size_t n);
double tr_sum_squares(const float *x, size_t n);

/* RMSNorm: y = x * r * w, r = 1 / sqrt(mean(x^2) + eps). */
float tr_rms_scale(const float *x, float eps, size_t n);
void tr_rmsnorm(const float *x, const float *w, float r, size_t n, float *y);
/* dx += what dy gives for x; and with dy replaced by it. */
void tr_rmsnorm_backward(float *dx, const float *dy, const float *x, const float *w, float r,
                         size_t n);
void tr_rmsnorm_backward_in_place(float *dy, const float *x, const float *w, float r, size_t n);
/* dw += dy * x * r */
void tr_rmsnorm_backward_weight(float *dw, const float *dy, const float *x, float r, size_t n);

/* RoPE on pairs of `heads` heads of 2 * half values: (a, b) -> (a c - b s, a s + b c). */
typedef struct {
    const float *cosines, *sines; /* [half] */
    size_t half;
    bool halves; /* pairs are (j, j + half); else (2j, 2j + 1) */
} tr_angles;
/* direction 1 turns forward, -1 back, which is the gradient. */
void tr_rope(float *x, const tr_angles *angles, size_t heads, float direction);

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

/* The loss of a position that has a teacher (Hinton et al. 2015, arXiv:1503.02531):
 *     (1 - w) * -ln softmax(z)[target] + w T^2 KL(softmax(v / T) || softmax(z / T))
 * z are the student's n logits and become scale times its gradient,
 *     (1 - w) (softmax(z) - onehot(target)) + w T (softmax(z / T) - softmax(v / T)),
 * v are the teacher's and become softmax(v / T). Equal logits: KL and its gradient are 0 exactly.
 */
typedef struct {
    float weight, temperature, scale; /* w, T */
} tr_mixture;
typedef struct {
    double cross_entropy, kl; /* neither is weighted */
} tr_losses;
tr_losses tr_distill(const tr_mixture *mixture, float *restrict z, float *restrict v, size_t n,
                     size_t target);

/* Products of wide [rows, n] (row stride ld), narrow [rows, rank] (row stride ld_narrow) and
 * p [rank, n]. Each value is summed in an order that depends on n alone, or on rank, or on rows. */
typedef struct {
    size_t rows, n, ld, rank, ld_narrow;
} tr_skinny;
void tr_dots(const tr_skinny *s, const float *wide, const float *p, float *narrow); /* = wide·pᵀ */
void tr_rank_add(const tr_skinny *s, float *wide, const float *narrow, const float *p); /* += n·p */
void tr_outer(const tr_skinny *s, const float *wide, const float *narrow, float *p); /* = nᵀ·wide */

/* One AdamW update of n values (Loshchilov & Hutter 2019, as PyTorch's torch.optim.AdamW). */
typedef struct {
    float beta1, beta2, eps;
    float step_size;       /* lr / (1 - beta1^t) */
    float sqrt_correction; /* sqrt(1 - beta2^t) */
    float decay;           /* 1 - lr * weight_decay */
} tr_adamw;
void tr_adamw_update(const tr_adamw *c, float *p, const float *g, float *m, float *v, size_t n);
/* One of SGD: m = momentum m + g; p = decay p - lr m. */
typedef struct {
    float momentum, lr, decay;
} tr_sgd;
void tr_sgd_update(const tr_sgd *c, float *p, const float *g, float *m, size_t n);
/*
 * Moments in 8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861). The
 * leading 1 of a code of b bits chooses a decade below the block's largest value, the bits after it
 * a place in the decade: c = 2^k + j stands for scale * 10^(k + 1 - b) (0.1 + 0.9 j / 2^k), 0 for
 * 0. A first moment has a sign and b = 7; of a second moment the root is kept, b = 8, which is what
 * AdamW divides by: it spans twice the decades.
 *
 * A moment moves by less a step than codes are apart, and rounding to the nearest would hold it
 * where it is: it is rounded up or down by chance, right in the mean, from a hash of key and index.
 * A root is never coded below 1e-7 of the block's largest, the least that a first moment is: it is
 * divided by, and what is lost of it to rounding would make that step too long.
 */
#define TR_BLOCK 256 /* values of a block, at most */
/* Return the block's scale. */
float tr_encode_first(const float *m, uint32_t key, size_t n, uint8_t *codes);
float tr_encode_second(const float *v, uint32_t key, size_t n, uint8_t *codes);
void tr_decode_first(const uint8_t *codes, float scale, size_t n, float *m);
void tr_decode_second(const uint8_t *codes, float scale, size_t n, float *v);

/* g += mu * (p - start) */
void tr_proximal(float *g, const float *p, const float *start, float mu, size_t n);

#endif
