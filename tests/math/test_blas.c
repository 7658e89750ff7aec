/* The BLAS wrapper against loops in double; QR and SVD by their properties. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/blas.h"

#define SEED 20260203

static float *random_matrix(sh_rng *rng, size_t n)
{
    float *a = sh_alloc_aligned(n * sizeof *a);
    assert_non_null(a);
    for (size_t i = 0; i < n; i++)
        a[i] = sh_rng_normal(rng);
    return a;
}

static void check_gemm(sh_rng *rng, bool trans_a, bool trans_b, size_t m, size_t n, size_t k)
{
    /* leading dimensions larger than the rows: what is between must stay untouched */
    size_t lda = (trans_a ? m : k) + 3, ldb = (trans_b ? k : n) + 2, ldc = n + 1;
    float *a = random_matrix(rng, (trans_a ? k : m) * lda);
    float *b = random_matrix(rng, (trans_b ? n : k) * ldb);
    float *c = random_matrix(rng, m * ldc), *before = random_matrix(rng, m * ldc);
    memcpy(before, c, m * ldc * sizeof *c);
    sh_gemm g = {trans_a, trans_b, m, n, k, 1.5f, -0.5f, a, b, c, lda, ldb, ldc};
    sh_sgemm(&g);
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t p = 0; p < k; p++)
                sum += (double)(trans_a ? a[p * lda + i] : a[i * lda + p]) *
                       (double)(trans_b ? b[j * ldb + p] : b[p * ldb + j]);
            double expected = 1.5 * sum - 0.5 * (double)before[i * ldc + j];
            if (fabs((double)c[i * ldc + j] - expected) > 1e-4)
                fail_msg("%d%d %zux%zux%zu: C[%zu, %zu] is %g, expected %g", trans_a, trans_b, m, n,
                         k, i, j, (double)c[i * ldc + j], expected);
        }
        assert_true(c[i * ldc + n] == before[i * ldc + n]);
    }
    free(a);
    free(b);
    free(c);
    free(before);
}

static void test_gemm(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 1);
    for (int trans = 0; trans < 4; trans++) {
        check_gemm(&rng, trans & 1, trans & 2, 1, 1, 1);
        check_gemm(&rng, trans & 1, trans & 2, 17, 5, 33);
        check_gemm(&rng, trans & 1, trans & 2, 40, 64, 8);
    }
    sh_gemm nothing = {0};
    sh_sgemm(&nothing);
}

/* QᵀQ = I, R upper triangular, Q·R = A. */
static void check_qr(sh_rng *rng, size_t m, size_t n, bool deficient)
{
    float *a = random_matrix(rng, m * n), *q = random_matrix(rng, m * n),
          *r = random_matrix(rng, n * n);
    for (size_t i = 0; deficient && i < m; i++) /* equal columns */
        a[i * n + n - 1] = a[i * n];
    memcpy(q, a, m * n * sizeof *a);
    assert_int_equal(sh_sqr(q, m, n, r, NULL), SH_OK);
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < n; j++) {
            double dot = 0;
            for (size_t p = 0; p < m; p++)
                dot += (double)q[p * n + i] * (double)q[p * n + j];
            assert_true(fabs(dot - (i == j)) < 1e-5);
            if (i > j)
                assert_true(r[i * n + j] == 0);
        }
    }
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t p = 0; p < n; p++)
                sum += (double)q[i * n + p] * (double)r[p * n + j];
            assert_true(fabs(sum - (double)a[i * n + j]) < 1e-4);
        }
    }
    free(a);
    free(q);
    free(r);
}

static void test_qr(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 2);
    check_qr(&rng, 1, 1, false);
    check_qr(&rng, 7, 7, false);
    check_qr(&rng, 96, 40, false);
    check_qr(&rng, 50, 3, true);
}

/* U and V orthonormal, s descending, U·S·Vt = A. */
static void check_svd(sh_rng *rng, size_t m, size_t n, size_t rank)
{
    size_t k = SH_MIN(m, n);
    float *left = random_matrix(rng, m * rank), *right = random_matrix(rng, rank * n);
    float *a = random_matrix(rng, m * n), *copy = random_matrix(rng, m * n);
    float *u = random_matrix(rng, m * k), *s = random_matrix(rng, k),
          *vt = random_matrix(rng, k * n);
    sh_gemm g = {false, false, m, n, rank, 1, 0, left, right, a, rank, n, n};
    sh_sgemm(&g);
    memcpy(copy, a, m * n * sizeof *a);
    assert_int_equal(sh_ssvd(copy, m, n, u, s, vt, NULL), SH_OK);
    for (size_t i = 0; i < k; i++) {
        assert_true(s[i] >= 0 && (i == 0 || s[i] <= s[i - 1]));
        if (i >= rank)
            assert_true(s[i] < 1e-4f * s[0]);
        for (size_t j = 0; j < k; j++) {
            double of_u = 0, of_v = 0;
            for (size_t p = 0; p < m; p++)
                of_u += (double)u[p * k + i] * (double)u[p * k + j];
            for (size_t p = 0; p < n; p++)
                of_v += (double)vt[i * n + p] * (double)vt[j * n + p];
            assert_true(fabs(of_u - (i == j)) < 1e-4 && fabs(of_v - (i == j)) < 1e-4);
        }
    }
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t p = 0; p < k; p++)
                sum += (double)u[i * k + p] * (double)s[p] * (double)vt[p * n + j];
            if (fabs(sum - (double)a[i * n + j]) > 2e-5 * (double)s[0] + 1e-6)
                fail_msg("%zux%zu: A[%zu, %zu] is %g, rebuilt %g", m, n, i, j, (double)a[i * n + j],
                         sum);
        }
    }
    free(left);
    free(right);
    free(a);
    free(copy);
    free(u);
    free(s);
    free(vt);
}

static void test_svd(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 3);
    check_svd(&rng, 1, 1, 1);
    check_svd(&rng, 24, 24, 24);
    check_svd(&rng, 96, 40, 8);
    check_svd(&rng, 40, 96, 40);
}

static void test_not_finite(void **state)
{
    (void)state;
    float a[4] = {1, 2, NAN, 4}, u[4], s[2], vt[4];
    sh_error err = {0};
    assert_int_equal(sh_sqr(a, 2, 2, u, &err), SH_ERR_INVALID);
    assert_int_equal(sh_ssvd(a, 2, 2, u, s, vt, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "not finite"));
}

static void test_no_memory(void **state)
{
    (void)state;
    for (size_t n = 1; n <= 3; n++) {
        float a[6] = {1, 2, 3, 4, 5, 7}, r[4];
        sh_alloc_fail_after(n);
        assert_int_equal(sh_sqr(a, 3, 2, r, NULL), SH_ERR_NO_MEMORY);
    }
    for (size_t n = 1; n <= 2; n++) {
        float a[6] = {1, 2, 3, 4, 5, 7}, u[6], s[2], vt[4];
        sh_alloc_fail_after(n);
        assert_int_equal(sh_ssvd(a, 3, 2, u, s, vt, NULL), SH_ERR_NO_MEMORY);
    }
    sh_alloc_fail_after(0);
}

int main(void)
{
    sh_blas_init();
    print_message("BLAS core %s\n", sh_blas_core());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gemm),      cmocka_unit_test(test_qr),
        cmocka_unit_test(test_svd),       cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
