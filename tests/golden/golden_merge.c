/*
 * Merging against NumPy in float64: the exact sum, its best low-rank forms, products compared
 * through their factors, and the factor average that Flower-style averaging computes. Names of the
 * matrices are read from the file: "<out>x<in>.A0" and so on.
 *
 * Tolerances: relative to the Frobenius norm of the whole, 1e-5 (ours are float32 GEMMs and SVDs:
 * measured about 1e-7 to 5e-7).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/merge.h"
#include "shared/base/buf.h"
#include "shared/math/blas.h"
#include "tests/golden/golden.h"

#define UPDATES_MAX 64
#define TOLERANCE   1e-5

typedef struct {
    golden *g;
    const safetensors *file;
    char name[32]; /* "96x64" */
    uint32_t out, in;
    size_t n;
    sh_factor factors[UPDATES_MAX]; /* scale: weight * alpha / rank */
    sh_factor plain[UPDATES_MAX];   /* scale: alpha / rank */
} matrix;

static sh_status need(const matrix *m, const char *what, safetensors_type type,
                      const safetensor **out, sh_error *err)
{
    char name[96];
    (void)snprintf(name, sizeof name, "%s.%s", m->name, what);
    return safetensors_need(m->file, name, type, out, err);
}

static double norm(const float *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

static void product(const float *a, const float *b, double scale, const matrix *m, uint32_t rank,
                    float *out)
{
    for (size_t i = 0; i < m->out; i++)
        for (size_t j = 0; j < m->in; j++) {
            double sum = 0;
            for (size_t k = 0; k < rank; k++)
                sum += (double)b[i * rank + k] * (double)a[k * m->in + j];
            out[i * m->in + j] = (float)(scale * sum);
        }
}

static sh_status load(matrix *m, sh_error *err)
{
    const safetensor *ranks, *alphas, *weights;
    SH_TRY(safetensors_need(m->file, "ranks", SAFE_I32, &ranks, err));
    SH_TRY(safetensors_need(m->file, "alphas", SAFE_F64, &alphas, err));
    SH_TRY(safetensors_need(m->file, "weights", SAFE_F64, &weights, err));
    m->n = ranks->n;
    if (m->n > UPDATES_MAX || alphas->n != m->n || weights->n != m->n)
        return sh_fail(err, SH_ERR_INVALID, "%zu updates, %zu alphas", m->n, alphas->n);
    for (size_t i = 0; i < m->n; i++) {
        char what[32];
        const safetensor *a, *b;
        (void)snprintf(what, sizeof what, "A%zu", i);
        SH_TRY(need(m, what, SAFE_F32, &a, err));
        what[0] = 'B';
        SH_TRY(need(m, what, SAFE_F32, &b, err));
        uint32_t rank = (uint32_t)((const int32_t *)ranks->data)[i];
        if (a->shape[0] != rank || b->shape[1] != rank || a->shape[1] != m->in ||
            b->shape[0] != m->out)
            return sh_fail(err, SH_ERR_INVALID, "%s.%s: shapes do not fit", m->name, what);
        double scale = ((const double *)alphas->data)[i] / rank;
        m->plain[i] = (sh_factor){.a = a->data, .b = b->data, .rank = rank, .scale = scale};
        m->factors[i] = m->plain[i];
        m->factors[i].scale = scale * ((const double *)weights->data)[i];
    }
    return SH_OK;
}

static sh_status check_sum(const matrix *m, float *scratch, sh_error *err)
{
    const safetensor *exact;
    SH_TRY(need(m, "exact_sum", SAFE_F32, &exact, err));
    SH_TRY(sh_merge_sum(m->factors, m->n, m->out, m->in, scratch, err));
    golden_close_norm(m->g, "exact sum", scratch, exact->data, exact->n, TOLERANCE);
    return SH_OK;
}

/* Every k: the error of our best rank k is the golden one, within 1e-5 of the whole norm. */
static sh_status check_truncation(const matrix *m, float *scratch, sh_error *err)
{
    const safetensor *exact, *errors, *best8, *shares;
    SH_TRY(need(m, "exact_sum", SAFE_F32, &exact, err));
    SH_TRY(need(m, "best_rank_k_error_frobenius", SAFE_F64, &errors, err));
    SH_TRY(need(m, "best_rank_8", SAFE_F32, &best8, err));
    SH_TRY(need(m, "smallest_rank_for_energy_0.90_0.95_0.99_0.999", SAFE_I32, &shares, err));
    double whole = norm(exact->data, exact->n);
    for (uint32_t k = 1; k < errors->n; k++) {
        sh_truncation options = {.energy = 1, .rank_max = k};
        sh_truncated t;
        SH_TRY(sh_merge_truncate(m->factors, m->n, m->out, m->in, &options, &t, err));
        product(t.a, t.b, 1, m, t.rank, scratch);
        if (k == 8)
            golden_close_norm(m->g, "best rank 8", scratch, best8->data, best8->n, TOLERANCE);
        for (size_t i = 0; i < exact->n; i++)
            scratch[i] -= ((const float *)exact->data)[i];
        double theirs = ((const double *)errors->data)[k];
        golden_close_f64(m->g, "error of the best rank k", norm(scratch, exact->n), theirs,
                         TOLERANCE * whole, 0);
        golden_close_f64(m->g, "discarded energy", sqrt(t.discarded), theirs, TOLERANCE * whole, 0);
        free(t.a);
        free(t.b);
    }
    const double share[] = {0.90, 0.95, 0.99, 0.999};
    for (size_t i = 0; i < SH_COUNT(share); i++) {
        sh_truncation options = {.energy = share[i]};
        sh_truncated t;
        SH_TRY(sh_merge_truncate(m->factors, m->n, m->out, m->in, &options, &t, err));
        golden_check(m->g, (int32_t)t.rank == ((const int32_t *)shares->data)[i],
                     "%s: rank %u holds %g of the energy, theirs %d", m->name, t.rank, share[i],
                     ((const int32_t *)shares->data)[i]);
        free(t.a);
        free(t.b);
    }
    return SH_OK;
}

static sh_status check_products(const matrix *m, sh_error *err)
{
    const safetensor *inner, *cosines, *distances;
    double gram[UPDATES_MAX * UPDATES_MAX];
    SH_TRY(need(m, "product_inner_products", SAFE_F64, &inner, err));
    SH_TRY(need(m, "product_cosines", SAFE_F64, &cosines, err));
    SH_TRY(need(m, "product_distances_squared", SAFE_F64, &distances, err));
    SH_TRY(sh_merge_gram(m->plain, m->n, m->out, m->in, gram, err));
    for (size_t i = 0; i < m->n; i++)
        for (size_t j = 0; j < m->n; j++) {
            double ii = gram[i * m->n + i], jj = gram[j * m->n + j], ij = gram[i * m->n + j];
            double size = sqrt(ii * jj);
            golden_close_f64(m->g, "inner product", ij, ((const double *)inner->data)[i * m->n + j],
                             TOLERANCE * size, 0);
            golden_close_f64(m->g, "cosine", ij / size,
                             ((const double *)cosines->data)[i * m->n + j], TOLERANCE, 0);
            golden_close_f64(m->g, "squared distance", ii + jj - 2 * ij,
                             ((const double *)distances->data)[i * m->n + j], TOLERANCE * (ii + jj),
                             0);
        }
    return SH_OK;
}

static sh_status check_fedit(const matrix *m, float *scratch, sh_error *err)
{
    const safetensor *subset, *weights, *a, *b, *their_product, *exact, *relative;
    SH_TRY(safetensors_need(m->file, "fedit.subset", SAFE_I32, &subset, err));
    SH_TRY(safetensors_need(m->file, "fedit.weights", SAFE_F64, &weights, err));
    SH_TRY(need(m, "fedit.A", SAFE_F32, &a, err));
    SH_TRY(need(m, "fedit.B", SAFE_F32, &b, err));
    SH_TRY(need(m, "fedit.product", SAFE_F32, &their_product, err));
    SH_TRY(need(m, "fedit.exact_sum_of_subset", SAFE_F32, &exact, err));
    SH_TRY(need(m, "fedit.relative_error", SAFE_F64, &relative, err));
    sh_factor factors[UPDATES_MAX], summed[UPDATES_MAX];
    for (size_t i = 0; i < subset->n; i++) {
        int32_t which = ((const int32_t *)subset->data)[i];
        if (which < 0 || (size_t)which >= m->n)
            return sh_fail(err, SH_ERR_INVALID, "fedit.subset names update %d", which);
        factors[i] = summed[i] = m->plain[which];
        summed[i].scale *= ((const double *)weights->data)[i];
    }
    float *ours = sh_calloc(a->n + b->n + their_product->n, sizeof *ours);
    if (ours == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory");
    sh_status status =
        sh_merge_fedit(factors, weights->data, subset->n, m->out, m->in, ours, ours + a->n, err);
    if (status == SH_OK)
        status = sh_merge_sum(summed, subset->n, m->out, m->in, scratch, err);
    if (status == SH_OK) {
        golden_close_norm(m->g, "fedit A", ours, a->data, a->n, TOLERANCE);
        golden_close_norm(m->g, "fedit B", ours + a->n, b->data, b->n, TOLERANCE);
        golden_close_norm(m->g, "exact sum of the subset", scratch, exact->data, exact->n,
                          TOLERANCE);
        float *p = ours + a->n + b->n;
        product(ours, ours + a->n, factors[0].scale, m, factors[0].rank, p);
        golden_close_norm(m->g, "fedit product", p, their_product->data, their_product->n,
                          TOLERANCE);
        double whole = norm(scratch, exact->n);
        for (size_t i = 0; i < exact->n; i++)
            p[i] -= scratch[i];
        golden_close_f64(m->g, "relative error of fedit", norm(p, exact->n) / whole,
                         ((const double *)relative->data)[0], TOLERANCE, 0);
    }
    free(ours);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    safetensors file = {0};
    const char *path;
    sh_status status = SH_OK;
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_TRY(safetensors_open(path, &file, err));
    size_t matrices = 0;
    for (size_t i = 0; i < file.n && status == SH_OK; i++) {
        const safetensor *t = &file.tensors[i];
        const char *ending = strstr(t->name, ".exact_sum");
        if (ending == NULL || strcmp(ending, ".exact_sum") != 0 || t->n_dims != 2)
            continue;
        matrix m = {.g = g, .file = &file};
        (void)snprintf(m.name, sizeof m.name, "%.*s", (int)(ending - t->name), t->name);
        m.out = (uint32_t)t->shape[0];
        m.in = (uint32_t)t->shape[1];
        float *scratch = sh_calloc(t->n, sizeof *scratch);
        status = scratch == NULL ? sh_fail(err, SH_ERR_NO_MEMORY, "no memory") : load(&m, err);
        if (status == SH_OK)
            status = check_sum(&m, scratch, err);
        if (status == SH_OK)
            status = check_truncation(&m, scratch, err);
        if (status == SH_OK)
            status = check_products(&m, err);
        if (status == SH_OK)
            status = check_fedit(&m, scratch, err);
        free(scratch);
        matrices++;
    }
    if (status == SH_OK)
        golden_check(g, matrices > 0, "the file has no matrix");
    golden_note(g, "%zu matrices", matrices);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    sh_blas_init();
    return golden_main("merge", run);
}
