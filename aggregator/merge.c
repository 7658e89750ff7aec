/* Exact sums of low-rank products, their truncation, and products compared without dense matrices.
 * Stacking: Σ sᵢ·Bᵢ·Aᵢ = [s₁B₁ s₂B₂ …]·[A₁; A₂; …], one GEMM with inner size Σr. */
#include "aggregator/merge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/merge_internal.h"
#include "shared/base/buf.h"
#include "shared/math/blas.h"

#define ENERGY_DEFAULT 1.0

static sh_status no_memory(sh_error *err)
{
    return sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory for a matrix");
}

static size_t sum_of_ranks(const sh_factor *factors, size_t n)
{
    size_t ranks = 0;
    for (size_t i = 0; i < n; i++)
        ranks += factors[i].rank;
    return ranks;
}

void merge_stack_b(const sh_factor *factors, size_t n, uint32_t out, size_t ranks, float *b_stack)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const sh_factor *f = &factors[i];
        for (uint32_t row = 0; row < out; row++)
            for (uint32_t k = 0; k < f->rank; k++)
                b_stack[row * ranks + at + k] =
                    (float)(f->scale * (double)f->b[(size_t)row * f->rank + k]);
        at += f->rank;
    }
}

void merge_stack_a(const sh_factor *factors, size_t n, uint32_t in, float *a_stack)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t values = (size_t)factors[i].rank * in;
        if (values > 0)
            memcpy(a_stack + at, factors[i].a, values * sizeof(float));
        at += values;
    }
}

/* at_stack [in, ranks] = [A₁ᵀ A₂ᵀ …]. */
static void stack_at(const sh_factor *factors, size_t n, uint32_t in, size_t ranks, float *at_stack)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const sh_factor *f = &factors[i];
        for (uint32_t k = 0; k < f->rank; k++)
            for (uint32_t col = 0; col < in; col++)
                at_stack[col * ranks + at + k] = f->a[(size_t)k * in + col];
        at += f->rank;
    }
}

sh_status sh_merge_sum(const sh_factor *factors, size_t n, uint32_t out, uint32_t in, float *delta,
                       sh_error *err)
{
    /* Ranks a GEMM: all of them while they are few, else as many as a dense matrix is worth. */
    size_t block_max = SH_MIN(out, in);
    for (size_t i = 0; i < n; i++)
        block_max = SH_MAX(block_max, (size_t)factors[i].rank);
    block_max = SH_MIN(block_max, sum_of_ranks(factors, n));
    memset(delta, 0, (size_t)out * in * sizeof *delta);
    if (block_max == 0)
        return SH_OK;
    float *a_stack = sh_alloc_aligned(block_max * in * sizeof(float));
    float *b_stack = sh_alloc_aligned(block_max * out * sizeof(float));
    if (a_stack == NULL || b_stack == NULL) {
        free(a_stack);
        free(b_stack);
        return no_memory(err);
    }
    for (size_t first = 0; first < n;) {
        size_t last = first, ranks = 0;
        while (last < n && ranks + factors[last].rank <= block_max)
            ranks += factors[last++].rank;
        merge_stack_a(factors + first, last - first, in, a_stack);
        merge_stack_b(factors + first, last - first, out, ranks, b_stack);
        if (ranks > 0)
            sh_sgemm(&(sh_gemm){.m = out,
                                .n = in,
                                .k = ranks,
                                .alpha = 1,
                                .beta = 1,
                                .a = b_stack,
                                .b = a_stack,
                                .c = delta,
                                .lda = ranks,
                                .ldb = in,
                                .ldc = in});
        first = last;
    }
    free(a_stack);
    free(b_stack);
    return SH_OK;
}

/* ---- products compared ---- */

sh_status sh_merge_inner(const sh_factor *x, const sh_factor *y, uint32_t out, uint32_t in,
                         double *inner, sh_error *err)
{
    size_t values = (size_t)x->rank * y->rank;
    if (values == 0) {
        *inner = 0;
        return SH_OK;
    }
    float *b = sh_alloc_aligned(values * sizeof(float)); /* B₁ᵀB₂ [r₁, r₂] */
    float *a = sh_alloc_aligned(values * sizeof(float)); /* A₁A₂ᵀ [r₁, r₂] */
    if (a == NULL || b == NULL) {
        free(a);
        free(b);
        return no_memory(err);
    }
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = x->rank,
                        .n = y->rank,
                        .k = out,
                        .alpha = 1,
                        .a = x->b,
                        .b = y->b,
                        .c = b,
                        .lda = x->rank,
                        .ldb = y->rank,
                        .ldc = y->rank});
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = x->rank,
                        .n = y->rank,
                        .k = in,
                        .alpha = 1,
                        .a = x->a,
                        .b = y->a,
                        .c = a,
                        .lda = in,
                        .ldb = in,
                        .ldc = y->rank});
    double sum = 0;
    for (size_t i = 0; i < values; i++)
        sum += (double)a[i] * (double)b[i];
    free(a);
    free(b);
    *inner = sum * x->scale * y->scale;
    return SH_OK;
}

sh_status sh_merge_gram(const sh_factor *factors, size_t n, uint32_t out, uint32_t in, double *gram,
                        sh_error *err)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            double inner = 0;
            SH_TRY(sh_merge_inner(&factors[i], &factors[j], out, in, &inner, err));
            gram[i * n + j] = gram[j * n + i] = inner;
        }
    return SH_OK;
}

/* ---- truncation ---- */

/* U·diag(s)·Vt of the sum: left [out, k_max] and right [k_max, in], k_max values in s. */
typedef struct {
    float *left, *right, *s;
    size_t k_max, left_columns; /* row length of left */
} decomposition;

static void decomposition_release(decomposition *d)
{
    free(d->left);
    free(d->right);
    free(d->s);
}

static sh_status decompose_dense(const sh_factor *factors, size_t n, uint32_t out, uint32_t in,
                                 decomposition *d, sh_error *err)
{
    size_t k = SH_MIN(out, in);
    float *delta = sh_alloc_aligned((size_t)out * in * sizeof(float));
    d->left = sh_alloc_aligned((size_t)out * k * sizeof(float));
    d->right = sh_alloc_aligned(k * in * sizeof(float));
    d->s = sh_alloc_aligned(k * sizeof(float));
    d->k_max = d->left_columns = k;
    sh_status status = SH_OK;
    if (delta == NULL || d->left == NULL || d->right == NULL || d->s == NULL) {
        status = no_memory(err);
        goto cleanup;
    }
    SH_GOTO(sh_merge_sum(factors, n, out, in, delta, err));
    SH_GOTO(sh_ssvd(delta, out, in, d->left, d->s, d->right, err));
cleanup:
    free(delta);
    return status;
}

/* [B]·[A] = Q_b·(R_b·R_aᵀ)·Q_aᵀ, and the SVD of the small core in the middle. */
static sh_status decompose_stacked(const sh_factor *factors, size_t n, uint32_t out, uint32_t in,
                                   decomposition *d, sh_error *err)
{
    size_t r = sum_of_ranks(factors, n), square = r * r * sizeof(float);
    float *qb = sh_alloc_aligned(out * r * sizeof(float)), *rb = sh_alloc_aligned(square);
    float *qa = sh_alloc_aligned(in * r * sizeof(float)), *ra = sh_alloc_aligned(square);
    float *core = sh_alloc_aligned(square), *u = sh_alloc_aligned(square);
    float *vt = sh_alloc_aligned(square);
    d->left = sh_alloc_aligned(out * r * sizeof(float));
    d->right = sh_alloc_aligned(r * in * sizeof(float));
    d->s = sh_alloc_aligned(r * sizeof(float));
    d->k_max = d->left_columns = r;
    sh_status status = SH_OK;
    if (qb == NULL || rb == NULL || qa == NULL || ra == NULL || core == NULL || u == NULL ||
        vt == NULL || d->left == NULL || d->right == NULL || d->s == NULL) {
        status = no_memory(err);
        goto cleanup;
    }
    merge_stack_b(factors, n, out, r, qb);
    stack_at(factors, n, in, r, qa);
    SH_GOTO(sh_sqr(qb, out, r, rb, err));
    SH_GOTO(sh_sqr(qa, in, r, ra, err));
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = r,
                        .n = r,
                        .k = r,
                        .alpha = 1,
                        .a = rb,
                        .b = ra,
                        .c = core,
                        .lda = r,
                        .ldb = r,
                        .ldc = r});
    SH_GOTO(sh_ssvd(core, r, r, u, d->s, vt, err));
    sh_sgemm(&(sh_gemm){.m = out,
                        .n = r,
                        .k = r,
                        .alpha = 1,
                        .a = qb,
                        .b = u,
                        .c = d->left,
                        .lda = r,
                        .ldb = r,
                        .ldc = r});
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = r,
                        .n = in,
                        .k = r,
                        .alpha = 1,
                        .a = vt,
                        .b = qa,
                        .c = d->right,
                        .lda = r,
                        .ldb = r,
                        .ldc = in});
cleanup:
    free(qb);
    free(rb);
    free(qa);
    free(ra);
    free(core);
    free(u);
    free(vt);
    return status;
}

/* The first `rank` directions, the singular values split evenly between the two factors. */
static sh_status keep_rank(const decomposition *d, size_t rank, uint32_t out, uint32_t in,
                           sh_truncated *result, sh_error *err)
{
    float *a = sh_calloc(rank * in, sizeof *a), *b = sh_calloc(rank * out, sizeof *b);
    if (a == NULL || b == NULL) {
        free(a);
        free(b);
        return no_memory(err);
    }
    for (size_t k = 0; k < rank; k++) {
        float root = sqrtf(d->s[k]);
        for (size_t col = 0; col < in; col++)
            a[k * in + col] = root * d->right[k * in + col];
        for (size_t row = 0; row < out; row++)
            b[row * rank + k] = root * d->left[row * d->left_columns + k];
    }
    result->rank = (uint32_t)rank;
    result->a = a;
    result->b = b;
    return SH_OK;
}

sh_status sh_merge_truncate(const sh_factor *factors, size_t n, uint32_t out, uint32_t in,
                            const sh_truncation *options, sh_truncated *result, sh_error *err)
{
    size_t ranks = sum_of_ranks(factors, n);
    sh_truncated done = {0};
    decomposition d = {0};
    sh_status status = SH_OK;
    if (ranks == 0) {
        *result = done;
        return SH_OK;
    }
    if (ranks <= SH_MIN(out, in))
        SH_GOTO(decompose_stacked(factors, n, out, in, &d, err));
    else
        SH_GOTO(decompose_dense(factors, n, out, in, &d, err));
    double share = options->energy > 0 && options->energy <= 1 ? options->energy : ENERGY_DEFAULT;
    for (size_t k = 0; k < d.k_max; k++)
        done.energy += (double)d.s[k] * (double)d.s[k];
    if (!isfinite(done.energy)) {
        status = sh_fail(err, SH_ERR_INVALID, "merge: the sum of the updates is not finite");
        goto cleanup;
    }
    size_t rank_max = options->rank_max == 0 ? d.k_max : SH_MIN(d.k_max, options->rank_max);
    size_t rank = 0;
    double held = 0;
    while (rank < rank_max && d.s[rank] > 0 && held < share * done.energy) {
        held += (double)d.s[rank] * (double)d.s[rank];
        rank++;
    }
    for (size_t k = rank; k < d.k_max; k++) /* summed, not subtracted: it may be tiny */
        done.discarded += (double)d.s[k] * (double)d.s[k];
    if (rank > 0)
        SH_GOTO(keep_rank(&d, rank, out, in, &done, err));
    *result = done;
cleanup:
    decomposition_release(&d);
    return status;
}

/* ---- baseline ---- */

sh_status sh_merge_fedit(const sh_factor *factors, const double *weights, size_t n, uint32_t out,
                         uint32_t in, float *a, float *b, sh_error *err)
{
    if (n == 0)
        return sh_fail(err, SH_ERR_INVALID, "merge: no update to average");
    uint32_t rank = factors[0].rank;
    for (size_t i = 1; i < n; i++)
        if (factors[i].rank != rank)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "merge: factors of rank %u and %u cannot be averaged", rank,
                           factors[i].rank);
    for (size_t k = 0; k < (size_t)rank * in; k++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += weights[i] * (double)factors[i].a[k];
        a[k] = (float)sum;
    }
    for (size_t k = 0; k < (size_t)rank * out; k++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += weights[i] * (double)factors[i].b[k];
        b[k] = (float)sum;
    }
    return SH_OK;
}
