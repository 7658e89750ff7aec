/*
 * A sequential change detector for a bounded mean: an e-detector in Shiryaev-Roberts form (Shin,
 * Ramdas, Rinaldo, "E-detectors: a nonparametric framework for sequential change detection",
 * arXiv:2203.03532, 2022).
 *
 * For x in [0, 1] and the null hypothesis "given the past, the mean of the next x is at most b",
 *     L_t(l) = 1 + l (x_t - b),   0 <= l < 1 / b,
 * has conditional mean <= 1. One statistic is kept for each l of a grid,
 *     M_t(l) = L_t(l) (M_{t-1}(l) + 1),   M_0 = 0,
 * and their mean is the detector's value: M_t - t is a supermartingale under the null, so stopping
 * at the first M_t >= A gives an average run length of at least A observations to a false alarm.
 * No distribution is assumed and no change point is guessed.
 *
 * Dependence. A user's inferences come in passages, and within one the conditional mean is not the
 * long-run mean. sh_reference bounds the long-run variance s2_long of the reference from above by
 * batch means at several scales, and each step is multiplied by exp(-l^2 (s2_long - s2) / 2), the
 * cost of the excess over the variance s2 to second order. With excess 0 (independent data) the
 * guarantee above is exact; for weakly dependent data it is an approximation, which tests/stats
 * measures.
 *
 * Threads: plain data. Ownership: by value. Nothing here allocates.
 *
 *     sh_reference ref = {0};
 *     for (i = 0; i < 2000; i++) sh_reference_add(&ref, x[i]);
 *     sh_edetector d;
 *     sh_reference_stats s = sh_reference_get(&ref, false);
 *     sh_edetector_init(&d, s.mean + 2 * s.mean_error, s.excess_variance);
 *     sh_edetector_update(&d, x[i]);
 *     if (sh_edetector_log_value(&d) >= log(100000.0)) ... alarm
 */
#ifndef SH_STATS_EDETECTOR_H
#define SH_STATS_EDETECTOR_H

#include "shared/base/status.h"

#define SH_EDETECTOR_LAMBDAS 6
/* log M is held at or below this, so that a detector comes down again within some hundred
 * observations once a change has gone; far above any threshold. */
#define SH_EDETECTOR_LOG_MAX 100.0

typedef struct {
    double bound;                       /* b, within (0, 1) */
    double excess_variance;             /* s2_long - s2, 0 for independent data */
    double log_m[SH_EDETECTOR_LAMBDAS]; /* -INFINITY is M = 0 */
} sh_edetector;

/* bound is clamped to [0.001, 0.999], a negative or non-finite excess is 0. M = 0. */
void sh_edetector_init(sh_edetector *detector, double bound, double excess_variance);
void sh_edetector_reset(sh_edetector *detector); /* M = 0, as after an alarm was handled */
void sh_edetector_update(sh_edetector *detector,
                         double x); /* x is clipped to [0, 1]; NaN: ignored */
double sh_edetector_log_value(const sh_edetector *detector); /* natural log of M, >= log of 1e-9 */

/* The reference: mean, variance and long-run variance of the first observations. */
#define SH_REFERENCE_MAX     2000
#define SH_REFERENCE_BATCH   16 /* observations of the finest batch */
#define SH_REFERENCE_BATCHES (SH_REFERENCE_MAX / SH_REFERENCE_BATCH)

typedef struct {
    uint32_t n;
    double sum, square_sum;
    double batch_sum;                  /* of the open batch: n % SH_REFERENCE_BATCH observations */
    float batch[SH_REFERENCE_BATCHES]; /* sums of the full ones */
} sh_reference;

typedef struct {
    double mean, variance;
    double excess_variance; /* upper bound of long-run variance minus variance, >= 0 */
    double mean_error;      /* standard error of mean, from the long-run variance */
} sh_reference_stats;

void sh_reference_add(sh_reference *reference, double x); /* ignored past SH_REFERENCE_MAX, NaN */
/* All 0 when n < 2. independent: the caller knows that neighbours are not alike; no excess then. */
sh_reference_stats sh_reference_get(const sh_reference *reference, bool independent);

#endif
