#include "shared/stats/edetector.h"

#include <math.h>

#define BOUND_MIN 0.001
#define BOUND_MAX 0.999
/* The largest lambda is this share of 1 / bound: L_t >= 1 - 0.9 then. Each next one is half. */
#define LAMBDA_SHARE 0.9
/* Scales of the batch means: 16, 32, ... 256 observations, each with at least this many batches. */
#define BATCH_MERGE_MAX 16
#define BATCHES_MIN     8
#define LOG_FLOOR       -20.723265836946411 /* log 1e-9 */

void sh_edetector_init(sh_edetector *detector, double bound, double excess_variance)
{
    detector->bound = fmin(fmax(bound, BOUND_MIN), BOUND_MAX);
    detector->excess_variance =
        excess_variance > 0 && isfinite(excess_variance) ? excess_variance : 0;
    sh_edetector_reset(detector);
}

void sh_edetector_reset(sh_edetector *detector)
{
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++)
        detector->log_m[k] = -INFINITY;
}

void sh_edetector_update(sh_edetector *detector, double x)
{
    if (isnan(x))
        return;
    double over = fmin(fmax(x, 0), 1) - detector->bound;
    double lambda = LAMBDA_SHARE / detector->bound;
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++, lambda *= 0.5) {
        double log_l = log1p(lambda * over) - 0.5 * lambda * lambda * detector->excess_variance;
        double m = detector->log_m[k];
        /* log(M + 1), without overflow for large M. */
        double log_next = m > 0 ? m + log1p(exp(-m)) : log1p(exp(m));
        detector->log_m[k] = fmin(log_l + log_next, SH_EDETECTOR_LOG_MAX);
    }
}

double sh_edetector_log_value(const sh_edetector *detector)
{
    double top = LOG_FLOOR, sum = 0;
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++)
        top = fmax(top, detector->log_m[k]);
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++)
        sum += exp(detector->log_m[k] - top);
    return sum > 0 ? fmax(top + log(sum / SH_EDETECTOR_LAMBDAS), LOG_FLOOR) : LOG_FLOOR;
}

void sh_reference_add(sh_reference *reference, double x)
{
    if (reference->n >= SH_REFERENCE_MAX || !isfinite(x))
        return;
    reference->sum += x;
    reference->square_sum += x * x;
    reference->batch_sum += x;
    reference->n++;
    if (reference->n % SH_REFERENCE_BATCH == 0) {
        reference->batch[reference->n / SH_REFERENCE_BATCH - 1] = (float)reference->batch_sum;
        reference->batch_sum = 0;
    }
}

/* Long-run variance by means of batches of `merge` x SH_REFERENCE_BATCH observations:
 * batch length x variance of the batch means. *batches is how many there were. */
static double batch_variance(const sh_reference *reference, uint32_t merge, uint32_t *batches)
{
    uint32_t n = reference->n / SH_REFERENCE_BATCH / merge;
    *batches = n;
    if (n < 2)
        return 0;
    double length = (double)merge * SH_REFERENCE_BATCH, mean = 0, squares = 0;
    for (uint32_t i = 0; i < n * merge; i++)
        mean += reference->batch[i];
    mean /= length * n;
    for (uint32_t b = 0; b < n; b++) {
        double sum = 0;
        for (uint32_t i = 0; i < merge; i++)
            sum += reference->batch[b * merge + i];
        squares += (sum / length - mean) * (sum / length - mean);
    }
    return length * squares / (n - 1);
}

sh_reference_stats sh_reference_get(const sh_reference *reference, bool independent)
{
    sh_reference_stats stats = {0};
    if (reference->n < 2)
        return stats;
    double n = reference->n;
    stats.mean = reference->sum / n;
    double centred = reference->square_sum - n * stats.mean * stats.mean;
    stats.variance = centred > 0 ? centred / (n - 1) : 0;
    /* The largest long-run variance over the scales that have enough batches. The variance of n
     * normal means has a relative deviation of sqrt(2 / (n - 1)); one is added, because too small
     * an excess costs false alarms and too large a one only time. */
    for (uint32_t merge = 1; !independent && merge <= BATCH_MERGE_MAX; merge *= 2) {
        uint32_t batches;
        double long_run = batch_variance(reference, merge, &batches);
        if (batches < BATCHES_MIN)
            break;
        long_run *= 1 + sqrt(2.0 / (batches - 1));
        stats.excess_variance = fmax(stats.excess_variance, long_run - stats.variance);
    }
    stats.mean_error = sqrt((stats.variance + stats.excess_variance) / n);
    return stats;
}
