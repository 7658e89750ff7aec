/*
 * What a transformer block does beside its matrix products: normalization, rotation, attention,
 * gate, the low-rank addition and the loss. Internal to model.
 *
 * Every function is compiled for each level of shared/math/kernel.h and chosen by sh_kernel_level.
 * All work in lanes of 16 floats whatever the level, and add in one fixed order, so a row's result
 * depends neither on how many rows a call has nor on what lies beyond its keys; levels with fused
 * multiply-add agree bit for bit among themselves, and with the portable one within float rounding.
 * exp is a polynomial of relative error below 2e-7, clamped to e^±86.
 *
 * Threads: pure functions.
 */
#ifndef SH_MODEL_TRANSFORM_H
#define SH_MODEL_TRANSFORM_H

#include "shared/base/status.h"

#define SH_LANES 16
/* Smallest multiple of SH_LANES that holds n. */
#define SH_LANES_UP(n) (((size_t)(n) + SH_LANES - 1) / SH_LANES * SH_LANES)

/* Keys and values of one key-value head, 64-byte aligned. k is transposed: lanes are positions. */
typedef struct {
    const float *k;     /* [head_size, stride] */
    const float *v;     /* [stride, head_padded], what is past head_size is 0 */
    size_t stride;      /* positions, a multiple of SH_LANES */
    uint32_t head_size; /* and padded to SH_LANES: */
    uint32_t head_padded;
} sh_head_cache;

typedef struct {
    /* out[n] = x[n] / rms(x) * weight[n] (Zhang & Sennrich 2019, arXiv:1910.07467) */
    void (*rms_norm)(const float *x, const float *weight, float eps, uint32_t n, float *out);
    /* Rotates n adjacent pairs of x by angles[n]: {cos, sin} of each. */
    void (*rotate)(float *x, const float *angles, uint32_t n);
    /* out[head_size] = softmax(q·K / sqrt(head_size))·V over the first n_keys (>= 1) positions.
     * scores: scratch of SH_LANES_UP(n_keys) floats. */
    void (*attend)(const sh_head_cache *cache, const float *q, uint32_t n_keys, float *scores,
                   float *out);
    /* gate[n] = silu(gate) * up (Shazeer 2020, arXiv:2002.05202) */
    void (*swiglu)(float *gate, const float *up, size_t n);
    /* y[out] += Σ t[r] * rows[r, out], r < rank: the second half of a low-rank product. */
    void (*add_rows)(float *y, const float *t, const float *rows, uint32_t rank, uint32_t out);
    /* ln Σ exp(x[n]), the sum in double. */
    double (*log_sum_exp)(const float *x, uint32_t n);
} sh_transform;

/* The functions of the level in use. */
const sh_transform *sh_transform_get(void);

#endif
