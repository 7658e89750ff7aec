/*
 * What a transformer block does beside its matrix products: normalization, rotation, attention,
 * gate, the low-rank addition and the loss. Internal to model.
 *
 * Every function is compiled for three kinds of processor (portable, AVX2, AVX512) and chosen by
 * the level of shared/math/dispatch.h. All work in lanes of 16 floats whatever the level, and add
 * in one fixed order, so a row's result depends neither on how many rows a call has nor on what
 * lies beyond its keys; levels with fused multiply-add agree bit for bit among themselves, and with
 * the portable one within float rounding. Halves are converted exactly by every level. exp is a
 * polynomial of relative error below 2e-7, clamped to e^±86.
 *
 * Threads: pure functions.
 */
#ifndef SH_MODEL_TRANSFORM_H
#define SH_MODEL_TRANSFORM_H

#include "shared/base/status.h"
#include "shared/math/dispatch.h"

#define SH_LANES 16
/* Smallest multiple of SH_LANES that holds n. */
#define SH_LANES_UP(n) (((size_t)(n) + SH_LANES - 1) / SH_LANES * SH_LANES)

/* Keys and values of one key-value head: tiles of SH_KV_TILE positions, one after another, each
 * first the keys [head_size, SH_KV_TILE] (lanes are positions), then the values
 * [SH_KV_TILE, head_padded], floats or IEEE halves; 64-byte aligned. What was never stored is never
 * used, whatever its bits. */
#define SH_KV_TILE SH_LANES
typedef struct {
    void *tiles;
    size_t tile_bytes;    /* sh_kv_tile_bytes */
    uint32_t head_size;   /* and padded to SH_LANES: */
    uint32_t head_padded; /* values past head_size are 0 */
    bool halves;
} sh_head_cache;
size_t sh_kv_tile_bytes(uint32_t head_size, bool halves);

/* `rows` x `heads` queries that share one key-value head: row r stands at position first + r and
 * sees the positions up to its own. Query (r, h) is q + r * ldq + h * head_size, its result is put
 * at out + r * ldout + h * head_size. */
typedef struct {
    const sh_head_cache *cache;
    const float *q;
    size_t ldq;
    uint32_t rows, heads, first;
    float *out;
    size_t ldout;
    float *scratch; /* a thread's own, 64-byte aligned, of sh_attend_scratch_bytes */
    /* What is read from memory after this, which is idle meanwhile: as much of it as there is time
     * for is fetched into the second-level cache. NULL, 0: nothing. */
    const uint8_t *next;
    size_t next_bytes;
} sh_attend;
size_t sh_attend_scratch_bytes(uint32_t head_size);

/* Adapters' factors as the kernels use them, in one of three forms: the most exact that a base
 * matrix of the input needs, so that an adapter takes its share of the base's bytes. */
typedef enum {
    SH_FACTOR_F32,  /* of F32 matrices */
    SH_FACTOR_F16,  /* of F16 and BF16 ones */
    SH_FACTOR_INT8, /* of quantized ones, with scales */
} sh_factor;

/* The A of all matrices that read the same x, ranks side by side. F32, F16: A transposed, [in,
 * rank], rank a multiple of SH_LANES (filled up with zeros). INT8: a Q8_0 matrix [rank, in], packed
 * (pack.h), for sh_product_run. */
typedef struct {
    const void *a;
    uint32_t in, rank;
    sh_factor form;
} sh_lora_a;
/* One matrix's B, alpha / rank and the caller's scale in it: groups of SH_LANES outputs one after
 * another, the last filled up with zeros. A group of F32 and F16 is [rank, SH_LANES] values; of
 * INT8 SH_LANES halves, the outputs' scales, and [rank / 4, SH_LANES, 4] codes, the last ranks
 * filled up. */
typedef struct {
    const void *b;
    uint32_t rank;
    sh_factor form;
} sh_lora_b;
static inline size_t sh_factor_bytes(sh_factor form)
{
    return form == SH_FACTOR_F32 ? 4 : form == SH_FACTOR_F16 ? 2 : 1;
}
static inline size_t sh_lora_b_group_bytes(sh_factor form, uint32_t rank)
{
    if (form == SH_FACTOR_INT8)
        return SH_LANES * (sizeof(uint16_t) + (size_t)(rank + 3) / 4 * 4);
    return SH_LANES * rank * sh_factor_bytes(form);
}

typedef struct {
    /* out[n] = x[n] / rms(x) * weight[n] (Zhang & Sennrich 2019, arXiv:1910.07467) */
    void (*rms_norm)(const float *x, const float *weight, float eps, uint32_t n, float *out);
    /* Rotates n pairs of x by angles[n]: {cos, sin} of each. Pairs (2j, 2j + 1), and (j, j + n). */
    void (*rotate)(float *x, const float *angles, uint32_t n);
    void (*rotate_halves)(float *x, const float *angles, uint32_t n);
    /* k[head_size], v[head_size] to their place in the cache. */
    void (*store)(const sh_head_cache *cache, uint32_t position, const float *k, const float *v);
    /* softmax(q·K / sqrt(head_size))·V of all queries, by blocks of positions with a running
     * maximum (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). A
     * query's bits depend on itself and its positions alone, not on what is computed beside it. */
    void (*attend)(const sh_attend *a);
    /* gate[n] = silu(gate) * up (Shazeer 2020, arXiv:2002.05202) */
    void (*swiglu)(float *gate, const float *up, size_t n);
    /* y[n] += x[n] */
    void (*add)(float *y, const float *x, size_t n);
    /* t[begin .. end) of t = x·Aᵀ, A of floats; begin and end are multiples of SH_LANES. */
    void (*lora_down)(const sh_lora_a *a, const float *x, uint32_t begin, uint32_t end, float *t);
    /* y[begin .. end) += t·Bᵀ, t [rank] from the matrix's own first rank on; begin a multiple of
     * SH_LANES. y is [out], indexed from 0. */
    void (*lora_up)(const sh_lora_b *b, const float *t, uint32_t begin, uint32_t end, float *y);
    /* ln Σ exp(x[n]), the sum in double. */
    double (*log_sum_exp)(const float *x, uint32_t n);
    /* The same, and *mean = Σ p·x with p = softmax(x): the entropy is the difference. */
    double (*log_sum_exp_mean)(const float *x, uint32_t n, double *mean);
} sh_transform;

/* The functions of the level in use, and of any level that this CPU can run. */
const sh_transform *sh_transform_get(void);
const sh_transform *sh_transform_at(sh_level level);

#endif
