/*
 * OpenBLAS: sgemm by CBLAS; QR and SVD by the LAPACK that OpenBLAS carries, through its Fortran
 * interface (column-major). A row-major matrix is the column-major one of its transpose:
 *
 *   SVD  A = U·S·Vt row-major is Aᵀ = V·S·Uᵀ column-major, so sgesdd gives Vt first, then U.
 *   QR   has no such turn (it would be LQ): A is transposed by copying.
 */
#include "shared/math/blas.h"

#include <cblas.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "shared/base/buf.h"
#include "shared/math/dispatch.h"

/* Fortran LAPACK, as in https://netlib.org/lapack/explore-html. */
void sgeqrf_(const int *m, const int *n, float *a, const int *lda, float *tau, float *work,
             const int *lwork, int *info);
void sorgqr_(const int *m, const int *n, const int *k, float *a, const int *lda, const float *tau,
             float *work, const int *lwork, int *info);
void sgesdd_(const char *jobz, const int *m, const int *n, float *a, const int *lda, float *s,
             float *u, const int *ldu, float *vt, const int *ldvt, float *work, const int *lwork,
             int *iwork, int *info, size_t jobz_length);

/* Not in its header; a build without it keeps its threads. */
int blas_thread_shutdown_(void) __attribute__((weak));

/* OpenBLAS starts a thread for each other processor when it is loaded, which turns in a loop for a
 * tenth of a second before it sleeps. Nobody gives them work here. */
void sh_blas_init(void)
{
    if (openblas_get_num_threads() == 1)
        return;
    openblas_set_num_threads(1);
    if (blas_thread_shutdown_ != NULL)
        (void)blas_thread_shutdown_();
}

const char *sh_blas_core(void)
{
    return openblas_get_corename();
}

const char *sh_blas_advice(void)
{
#if SH_X86
    static const char *const full[] = {"SkylakeX", "Cooperlake", "SapphireRapids", "Zen4", "Zen5"};
    if (!__builtin_cpu_supports("avx512f"))
        return NULL;
    for (size_t i = 0; i < SH_COUNT(full); i++)
        if (strcasecmp(sh_blas_core(), full[i]) == 0)
            return NULL;
    return "OpenBLAS does not use AVX-512 here, and runs at about half of what this processor can "
           "do; unset OPENBLAS_CORETYPE if the environment has it";
#else
    return NULL;
#endif
}

static bool fits_int(size_t n)
{
    return n <= INT_MAX;
}

void sh_sgemm(const sh_gemm *g)
{
    SH_ASSERT(fits_int(g->m) && fits_int(g->n) && fits_int(g->k) && fits_int(g->lda) &&
              fits_int(g->ldb) && fits_int(g->ldc));
    if (g->m == 0 || g->n == 0)
        return;
    cblas_sgemm(CblasRowMajor, g->trans_a ? CblasTrans : CblasNoTrans,
                g->trans_b ? CblasTrans : CblasNoTrans, (int)g->m, (int)g->n, (int)g->k, g->alpha,
                g->a, (int)g->lda, g->b, (int)g->ldb, g->beta, g->c, (int)g->ldc);
}

/* LAPACK reads and writes without regard for NaN; some of its loops do not end on them. */
static sh_status check_matrix(const float *a, size_t m, size_t n, const char *what, sh_error *err)
{
    SH_ASSERT(m > 0 && n > 0);
    if (!fits_int(m) || !fits_int(n) || n > (size_t)INT_MAX / m)
        return sh_fail(err, SH_ERR_LIMIT, "%s of a matrix of %zu x %zu", what, m, n);
    for (size_t i = 0; i < m * n; i++)
        if (!__builtin_isfinite(a[i]))
            return sh_fail(err, SH_ERR_INVALID,
                           "%s of a matrix of %zu x %zu whose value %zu is not finite", what, m, n,
                           i);
    return SH_OK;
}

static sh_status fail_memory(sh_error *err, const char *what, size_t m, size_t n)
{
    return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the %s of a matrix of %zu x %zu", what,
                   m, n);
}

static void transpose(const float *in, float *out, size_t rows, size_t columns)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++)
            out[j * rows + i] = in[i * columns + j];
}

sh_status sh_sqr(float *a, size_t m, size_t n, float *r, sh_error *err)
{
    sh_status status = SH_OK;
    float *columns = NULL, *tau = NULL, *work = NULL, size_qr, size_q;
    SH_ASSERT(m >= n);
    SH_TRY(check_matrix(a, m, n, "QR", err));
    int rows = (int)m, cols = (int)n, query = -1, info = 0;
    sgeqrf_(&rows, &cols, NULL, &rows, NULL, &size_qr, &query, &info);
    SH_ASSERT(info == 0);
    sorgqr_(&rows, &cols, &cols, NULL, &rows, NULL, &size_q, &query, &info);
    SH_ASSERT(info == 0);
    int work_size = (int)SH_MAX(size_qr, size_q);
    columns = sh_alloc_aligned(m * n * sizeof *columns);
    tau = sh_alloc_aligned(n * sizeof *tau);
    work = sh_alloc_aligned((size_t)work_size * sizeof *work);
    if (columns == NULL || tau == NULL || work == NULL) {
        status = fail_memory(err, "QR", m, n);
        goto cleanup;
    }
    transpose(a, columns, m, n);
    sgeqrf_(&rows, &cols, columns, &rows, tau, work, &work_size, &info);
    SH_ASSERT(info == 0); /* arguments were checked; the algorithm cannot fail */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            r[i * n + j] = i <= j ? columns[j * m + i] : 0;
    sorgqr_(&rows, &cols, &cols, columns, &rows, tau, work, &work_size, &info);
    SH_ASSERT(info == 0);
    transpose(columns, a, n, m);

cleanup:
    free(columns);
    free(tau);
    free(work);
    return status;
}

sh_status sh_ssvd(float *a, size_t m, size_t n, float *u, float *s, float *vt, sh_error *err)
{
    sh_status status = SH_OK;
    float *work = NULL, size;
    int *iwork = NULL;
    SH_TRY(check_matrix(a, m, n, "SVD", err));
    /* of Aᵀ, n x m column-major: its left vectors are our Vt, its right ones our U */
    int rows = (int)n, cols = (int)m, k = (int)SH_MIN(m, n), query = -1, info = 0, any;
    sgesdd_("S", &rows, &cols, NULL, &rows, NULL, NULL, &rows, NULL, &k, &size, &query, &any, &info,
            1);
    SH_ASSERT(info == 0);
    int work_size = (int)size;
    work = sh_alloc_aligned((size_t)work_size * sizeof *work);
    iwork = sh_calloc(8 * (size_t)k, sizeof *iwork);
    if (work == NULL || iwork == NULL) {
        status = fail_memory(err, "SVD", m, n);
        goto cleanup;
    }
    sgesdd_("S", &rows, &cols, a, &rows, s, vt, &rows, u, &k, work, &work_size, iwork, &info, 1);
    SH_ASSERT(info >= 0);
    if (info > 0)
        status =
            sh_fail(err, SH_ERR_INVALID, "the SVD of a matrix of %zu x %zu did not converge", m, n);

cleanup:
    free(work);
    free(iwork);
    return status;
}
