/*
 * The check against poison: which updates of a round may be merged. Everything is measured on the
 * whole model's product ΔW = {Bᵢ·Aᵢ of every matrix}, because factors have no direction of their
 * own. With S = Σ wⱼcⱼΔⱼ over those that are left (cⱼ clips a norm to the median),
 *     ⟨Δᵢ, S − wᵢcᵢΔᵢ⟩ = ⟨Δᵢ,S⟩ − wᵢcᵢ|Δᵢ|²  and  |S − wᵢcᵢΔᵢ|² = |S|² − 2wᵢcᵢ⟨Δᵢ,S⟩ + wᵢ²cᵢ²|Δᵢ|²,
 * so that a leave-one-out cosine costs a dense S a matrix and no pair of updates; when one is taken
 * out, only the products with that one are needed.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/merge.h"
#include "shared/base/buf.h"
#include "shared/math/blas.h"

typedef struct {
    sh_merge_source *sources;
    size_t n;
    size_t *order; /* indices of those that are left */
    size_t n_left;
    double *coefficient; /* wᵢcᵢ */
    double *dot;         /* ⟨Δᵢ, S⟩ */
    double s_squared;    /* |S|² */
    size_t matrices;
} judge;

static sh_status no_memory(sh_error *err)
{
    return sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory to judge the updates");
}

static sh_factor factor_of(const sh_merge_source *source, size_t m, double scale)
{
    const sh_lora_pair *pair = &source->adapter->pairs[m];
    if (pair->a == NULL || pair->b == NULL || pair->rank == 0)
        return (sh_factor){0};
    return (sh_factor){.a = pair->a,
                       .b = pair->b,
                       .rank = pair->rank,
                       .scale = scale * (double)source->adapter->alpha / (double)pair->rank};
}

static size_t matrices_of(const sh_merge_source *source)
{
    return sh_lora_pair_count(source->adapter->n_layers);
}

size_t sh_merge_factors(const sh_merge_source *sources, size_t n, double factor, size_t m,
                        sh_factor *factors)
{
    double weights = 0;
    size_t good = 0;
    for (size_t i = 0; i < n; i++)
        if (sources[i].reason == SH_REASON_NONE) {
            weights += sources[i].weight;
            good++;
        }
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (sources[i].reason != SH_REASON_NONE)
            continue;
        /* All so stale that their weights are 0: they are equals. */
        double share = weights > 0 ? sources[i].weight / weights : 1.0 / (double)good;
        sh_factor f = factor_of(&sources[i], m, factor * share);
        if (f.rank > 0)
            factors[count++] = f;
    }
    return count;
}

/* ---- norms ---- */

static bool values_are_finite(const sh_adapter *adapter)
{
    for (size_t m = 0; m < sh_lora_pair_count(adapter->n_layers); m++) {
        const sh_lora_pair *pair = &adapter->pairs[m];
        if (pair->a == NULL || pair->b == NULL)
            continue;
        for (size_t i = 0; i < (size_t)pair->rank * pair->in; i++)
            if (!isfinite(pair->a[i]))
                return false;
        for (size_t i = 0; i < (size_t)pair->rank * pair->out; i++)
            if (!isfinite(pair->b[i]))
                return false;
    }
    return isfinite(adapter->alpha);
}

/* ⟨ΔW_x, ΔW_y⟩ over the whole model. */
static sh_status model_inner(const sh_merge_source *x, const sh_merge_source *y, double *inner,
                             sh_error *err)
{
    double sum = 0;
    for (size_t m = 0; m < matrices_of(x); m++) {
        const sh_lora_pair *pair = &x->adapter->pairs[m];
        sh_factor fx = factor_of(x, m, 1), fy = factor_of(y, m, 1);
        double one = 0;
        SH_TRY(sh_merge_inner(&fx, &fy, pair->out, pair->in, &one, err));
        sum += one;
    }
    *inner = sum;
    return SH_OK;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static bool counts(const sh_merge_source *source)
{
    return source->reason == SH_REASON_NONE && source->norm > 0;
}

/* The lower median of the non-zero norms of those without a reason, of single nodes' ones where
 * there are any; 0 when there are none. */
static sh_status median_norm(const sh_merge_source *sources, size_t n, double *median,
                             sh_error *err)
{
    double *norms = sh_calloc(SH_MAX(n, (size_t)1), sizeof *norms);
    if (norms == NULL)
        return no_memory(err);
    size_t count = 0;
    bool single = false;
    for (size_t i = 0; i < n; i++)
        single |= counts(&sources[i]) && !sources[i].relayed;
    for (size_t i = 0; i < n; i++)
        if (counts(&sources[i]) && !(single && sources[i].relayed))
            norms[count++] = sources[i].norm;
    qsort(norms, count, sizeof *norms, compare_double);
    *median = count == 0 ? 0 : norms[(count - 1) / 2];
    free(norms);
    return SH_OK;
}

static sh_status judge_norms(sh_merge_source *sources, size_t n, float factor_max, sh_error *err)
{
    for (size_t i = 0; i < n; i++) {
        sh_merge_source *source = &sources[i];
        source->norm = source->cosine = 0;
        if (source->reason != SH_REASON_NONE)
            continue;
        double squared = NAN;
        if (values_are_finite(source->adapter))
            SH_TRY(model_inner(source, source, &squared, err));
        source->norm = isnan(squared) ? squared : sqrt(fmax(squared, 0));
        if (!isfinite(source->norm))
            source->reason = SH_REASON_NOT_FINITE;
    }
    if (factor_max <= 0)
        return SH_OK;
    double median = 0;
    SH_TRY(median_norm(sources, n, &median, err));
    for (size_t i = 0; i < n; i++)
        if (sources[i].reason == SH_REASON_NONE && median > 0 &&
            sources[i].norm > (double)factor_max * median)
            sources[i].reason = SH_REASON_NORM;
    return SH_OK;
}

/* ---- directions ---- */

/* Adds matrix m's part of ⟨Δᵢ, S⟩ and |S|²: S dense, then P = S·Aᵢᵀ and ⟨Bᵢ, P⟩. */
static sh_status add_matrix(judge *j, size_t m, sh_error *err)
{
    uint32_t out = 0, in = 0, rank_max = 0;
    sh_factor *factors = sh_calloc(j->n_left, sizeof *factors);
    float *s = NULL, *p = NULL;
    sh_status status = SH_OK;
    if (factors == NULL)
        return no_memory(err);
    for (size_t k = 0; k < j->n_left; k++) {
        const sh_merge_source *source = &j->sources[j->order[k]];
        factors[k] = factor_of(source, m, j->coefficient[j->order[k]]);
        if (factors[k].rank > 0) {
            out = source->adapter->pairs[m].out;
            in = source->adapter->pairs[m].in;
            rank_max = SH_MAX(rank_max, factors[k].rank);
        }
    }
    if (rank_max == 0)
        goto cleanup;
    s = sh_alloc_aligned((size_t)out * in * sizeof(float));
    p = sh_alloc_aligned((size_t)out * rank_max * sizeof(float));
    if (s == NULL || p == NULL) {
        status = no_memory(err);
        goto cleanup;
    }
    SH_GOTO(sh_merge_sum(factors, j->n_left, out, in, s, err));
    for (size_t i = 0; i < (size_t)out * in; i++)
        j->s_squared += (double)s[i] * (double)s[i];
    for (size_t k = 0; k < j->n_left; k++) {
        sh_factor f = factor_of(&j->sources[j->order[k]], m, 1);
        if (f.rank == 0)
            continue;
        sh_sgemm(&(sh_gemm){.trans_b = true,
                            .m = out,
                            .n = f.rank,
                            .k = in,
                            .alpha = 1,
                            .a = s,
                            .b = f.a,
                            .c = p,
                            .lda = in,
                            .ldb = in,
                            .ldc = f.rank});
        double sum = 0;
        for (size_t i = 0; i < (size_t)out * f.rank; i++)
            sum += (double)p[i] * (double)f.b[i];
        j->dot[j->order[k]] += f.scale * sum;
    }
cleanup:
    free(factors);
    free(s);
    free(p);
    return status;
}

/* Takes the k-th that is left out of S. */
static sh_status take_out(judge *j, size_t k, sh_error *err)
{
    size_t gone = j->order[k];
    double c = j->coefficient[gone], norm = j->sources[gone].norm;
    j->s_squared += c * c * norm * norm - 2 * c * j->dot[gone];
    memmove(&j->order[k], &j->order[k + 1], (j->n_left - k - 1) * sizeof *j->order);
    j->n_left--;
    for (size_t i = 0; i < j->n_left; i++) {
        double inner = 0;
        SH_TRY(model_inner(&j->sources[j->order[i]], &j->sources[gone], &inner, err));
        j->dot[j->order[i]] -= c * inner;
    }
    return SH_OK;
}

/* Cosine of i to the sum of the others; 0 for a zero update, or when the others are nothing. */
static double cosine_of(const judge *j, size_t i)
{
    double norm = j->sources[i].norm, c = j->coefficient[i];
    double inner = j->dot[i] - c * norm * norm;
    double others = j->s_squared - 2 * c * j->dot[i] + c * c * norm * norm;
    /* Below this the difference is rounding of f32 sums, not a direction. */
    if (norm == 0 || others <= 1e-10 * (j->s_squared + c * c * norm * norm))
        return 0;
    return fmax(-1.0, fmin(1.0, inner / (norm * sqrt(others))));
}

static sh_status judge_directions(judge *j, float cosine_min, sh_error *err)
{
    for (size_t m = 0; m < j->matrices; m++)
        SH_TRY(add_matrix(j, m, err));
    for (;;) {
        size_t worst = j->n_left;
        for (size_t k = 0; k < j->n_left; k++) {
            sh_merge_source *source = &j->sources[j->order[k]];
            source->cosine = cosine_of(j, j->order[k]);
            if (j->n_left > 1 && source->norm > 0 && source->cosine < (double)cosine_min &&
                (worst == j->n_left || source->cosine < j->sources[j->order[worst]].cosine))
                worst = k;
        }
        if (worst == j->n_left)
            return SH_OK;
        j->sources[j->order[worst]].reason = SH_REASON_DIRECTION;
        if (j->n_left == 2) { /* one against one */
            sh_merge_source *other = &j->sources[j->order[1 - worst]];
            if (other->norm > 0)
                other->reason = SH_REASON_DIRECTION;
            return SH_OK;
        }
        SH_TRY(take_out(j, worst, err));
    }
}

sh_status sh_merge_judge(sh_merge_source *sources, size_t n, const sh_judge_options *options,
                         sh_error *err)
{
    SH_TRY(judge_norms(sources, n, options->norm_factor_max, err));
    double median = 0;
    SH_TRY(median_norm(sources, n, &median, err));
    judge j = {.sources = sources, .n = n};
    j.order = sh_calloc(SH_MAX(n, (size_t)1), sizeof *j.order);
    j.coefficient = sh_calloc(SH_MAX(n, (size_t)1), sizeof *j.coefficient);
    j.dot = sh_calloc(SH_MAX(n, (size_t)1), sizeof *j.dot);
    sh_status status = SH_OK;
    if (j.order == NULL || j.coefficient == NULL || j.dot == NULL) {
        status = no_memory(err);
        goto cleanup;
    }
    double weights = 0;
    for (size_t i = 0; i < n; i++) {
        if (sources[i].reason != SH_REASON_NONE)
            continue;
        j.order[j.n_left++] = i;
        weights += sources[i].weight;
        j.matrices = matrices_of(&sources[i]);
    }
    if (j.n_left < 2 || weights <= 0)
        goto cleanup;
    for (size_t k = 0; k < j.n_left; k++) {
        size_t i = j.order[k];
        double clip = sources[i].norm > median ? median / sources[i].norm : 1;
        j.coefficient[i] = clip * sources[i].weight / weights;
    }
    status = judge_directions(&j, options->cosine_min, err);
cleanup:
    free(j.order);
    free(j.coefficient);
    free(j.dot);
    return status;
}
