/*
 * Merging of low-rank updates: the exact average of the products, its truncation to adapter form,
 * geometry in product space, and the check against poison.
 *
 * An update of a matrix W [out, in] is scale * B·A with A [rank, in], B [out, rank]. What is merged
 * is Σ wᵢ·Bᵢ·Aᵢ, never the product of the averages: mean(B)·mean(A) drops the covariance term
 * Σ wᵢ(Bᵢ−B̄)(Aᵢ−Ā) (sh_merge_fedit is that baseline, for comparison). Factors are defined only up
 * to an invertible r×r transform, so everything is compared as a product:
 * ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), which needs no dense matrix.
 *
 * Order: sums go in the order given; callers sort by (node, epoch, sequence). Same order, same
 * bits, for any number of pool threads. Threads: no globals, any number of calls at once.
 * Ownership: inputs are borrowed, outputs are the caller's.
 */
#ifndef SH_AGGREGATOR_MERGE_H
#define SH_AGGREGATOR_MERGE_H

#include "aggregator/coordinator.h"
#include "shared/math/pool.h"
#include "shared/model/model.h"

/* ---- one matrix ---- */
typedef struct {
    const float *a, *b; /* [rank, in], [out, rank]; NULL, NULL with rank 0: a zero update */
    uint32_t rank;
    double scale; /* weight * alpha / rank */
} sh_factor;

/* delta [out, in] = Σ scaleᵢ·Bᵢ·Aᵢ: one GEMM of the stacked factors while Σr <= min(out, in), a sum
 * of such GEMMs into the dense matrix otherwise. SH_ERR_NO_MEMORY. */
SH_MUST_USE sh_status sh_merge_sum(const sh_factor *factors, size_t n, uint32_t out, uint32_t in,
                                   float *delta, sh_error *err);

/* scale₁·scale₂·⟨B₁A₁, B₂A₂⟩. */
SH_MUST_USE sh_status sh_merge_inner(const sh_factor *x, const sh_factor *y, uint32_t out,
                                     uint32_t in, double *inner, sh_error *err);
/* gram [n, n] of all pairs. */
SH_MUST_USE sh_status sh_merge_gram(const sh_factor *factors, size_t n, uint32_t out, uint32_t in,
                                    double *gram, sh_error *err);

typedef struct {
    double energy;     /* share of ‖ΔW‖² to hold, (0, 1] */
    uint32_t rank_max; /* 0: no limit */
} sh_truncation;

typedef struct {
    uint32_t rank; /* 0 for a zero sum: a and b are NULL */
    float *a, *b;  /* [rank, in], [out, rank]; malloc'ed; b·a is the truncated sum itself */
    double energy, discarded; /* ‖ΔW‖² of the whole sum; what the truncation lost of it */
} sh_truncated;

/* The smallest rank that holds the share: QR of both stacks and the SVD of the small core while
 * Σr <= min(out, in), a dense SVD otherwise (Eckart-Young: the best of its rank either way). */
SH_MUST_USE sh_status sh_merge_truncate(const sh_factor *factors, size_t n, uint32_t out,
                                        uint32_t in, const sh_truncation *options,
                                        sh_truncated *result, sh_error *err);

/* Baseline "fedit" (Zhang et al. 2023, arXiv:2305.05644): a = Σ wᵢ·Aᵢ, b = Σ wᵢ·Bᵢ with weights[n]
 * as given; all ranks must be equal (SH_ERR_MISMATCH). factors' scales are not used. */
SH_MUST_USE sh_status sh_merge_fedit(const sh_factor *factors, const double *weights, size_t n,
                                     uint32_t out, uint32_t in, float *a, float *b, sh_error *err);

/* ---- whole models ---- */
typedef struct {
    const sh_adapter *adapter;
    double weight; /* not normalized */
    bool relayed;  /* an average of several already: shorter than they, as noise cancels out */
    /* filled by sh_merge_judge */
    double norm;   /* ‖ΔW‖ over the whole model, alpha included, weight not */
    double cosine; /* to the weighted sum of the others that were left when it was looked at */
    sh_reason reason;
} sh_merge_source;

typedef struct {
    float norm_factor_max; /* <= 0: no check */
    float cosine_min;      /* <= -1: no check */
} sh_judge_options;

/* Fills norm, cosine and reason of each source. In order:
 *   not finite: a value, or the norm, is NaN or infinite                      SH_REASON_NOT_FINITE
 *   norm over norm_factor_max times the (lower) median of the non-zero norms, of those that are
 *   not relayed where there are such: averages set no measure for one          SH_REASON_NORM
 *   cosine to the sum of the others below cosine_min; the worst goes first and the rest is looked
 *   at again without it, so that two bad ones of ten do not hide behind each other. In the sum,
 *   norms are clipped to the median, so that a large update does not decide what "the others" are.
 *   Two that contradict each other are both refused: neither can be believed. SH_REASON_DIRECTION
 * A source that comes with another reason is left out. All adapters fit one model. */
SH_MUST_USE sh_status sh_merge_judge(sh_merge_source *sources, size_t n,
                                     const sh_judge_options *options, sh_error *err);

/* The merged form as one adapter: for each matrix the truncation of factor · Σ wᵢ/Σw · ΔWᵢ over the
 * sources with reason NONE. *rank is the largest rank, *discarded the share of energy lost over all
 * matrices. pool may be NULL. SH_ERR_INVALID when no source is good. */
SH_MUST_USE sh_status sh_merge_adapter(const sh_merge_source *sources, size_t n, double factor,
                                       const sh_model_config *config, const sh_truncation *options,
                                       sh_pool *pool, sh_adapter **out, double *discarded,
                                       sh_error *err);

/* The same sum over sources with reason NONE, whole and exact: Σ wᵢ/Σw · ΔWᵢ as one adapter of
 * stacked factors, [A₁; A₂; …] and [s₁B₁ s₂B₂ …]; a matrix has the ranks of those that adapt it.
 * Merged with weight Σw it counts as its sources would have. SH_ERR_INVALID when none is good,
 * SH_ERR_LIMIT when the ranks are over SH_ADAPTER_RANK_MAX together. */
SH_MUST_USE sh_status sh_merge_stack(const sh_merge_source *sources, size_t n,
                                     const sh_model_config *config, sh_adapter **out,
                                     sh_error *err);

/* Factors of matrix m (an index of sh_adapter's pairs) of the good sources, scaled by factor and
 * the normalized weights; factors [n]. Returns how many. */
size_t sh_merge_factors(const sh_merge_source *sources, size_t n, double factor, size_t m,
                        sh_factor *factors);

#endif
