/*
 * Gradients against central differences of an independent double-precision forward pass. The
 * differences themselves are good to about 1e-9; what is measured is float32 rounding.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/trainer/small.h"
#include "tests/trainer/util.h"

#define STEP 1e-5
/* Against the largest gradient of the tensor: float32 sums over some 100 rows with 2^-24 each. */
#define RELATIVE 1e-5
#define ABSOLUTE 5e-8 /* gradients of the residual stream are sums of terms of about 0.1 */

static sh_error err;

/* Compares every stride-th value of a tensor's gradient. */
static void compare(reference *r, const sh_train_data *data, const char *name, double *values,
                    const float *grad, size_t n, size_t stride)
{
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i += stride) {
        double kept = values[i];
        values[i] = kept + STEP;
        double above = reference_loss(r, data);
        values[i] = kept - STEP;
        double below = reference_loss(r, data);
        values[i] = kept;
        double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + RELATIVE * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", name, worst, most);
}

static void check_full_model(const sh_model_config *config, const sh_train_data *data,
                             size_t stride)
{
    sh_model *model = small_model(config, SH_TYPE_F32, 7);
    sh_full *full = NULL;
    reference r;
    double loss = 0;
    reference_init(&r, model);
    must_be_ok(sh_full_from_model(model, &full, &err));
    must_be_ok(sh_full_gradient(full, data, &loss, &err));
    double expected = reference_loss(&r, data);
    if (!(fabs(loss - expected) <= 1e-6 * expected))
        fail_msg("loss is %.9g, expected %.9g", loss, expected);
    for (size_t i = 0; i < r.n_tensors; i++) {
        size_t count = 0;
        const float *grad = sh_full_grad(full, r.tensors[i].name, &count);
        if (!grad || count != r.tensors[i].n)
            fail_msg("%s: %zu values, expected %zu", r.tensors[i].name, count, r.tensors[i].n);
        compare(&r, data, r.tensors[i].name, r.tensors[i].values, grad, count, stride);
    }
    reference_release(&r);
    sh_full_destroy(&full);
    small_model_free(&model);
}

static void check_full(bool tied, size_t n, uint32_t length, bool masked, size_t stride)
{
    const sh_model_config config = small_config(tied);
    sh_train_data data = small_data(&config, n, length, masked, 11);
    check_full_model(&config, &data, stride);
    small_data_free(&data);
}

/* Biases, norms of heads, RoPE with its pairs a half apart and scaled. */
static void test_full_architectures(void **state)
{
    (void)state;
    for (sh_arch arch = SH_ARCH_QWEN2; arch <= SH_ARCH_QWEN3; arch++) {
        const sh_model_config config = small_config_of(arch);
        sh_train_data data = small_data(&config, 2, 7, false, 11);
        check_full_model(&config, &data, 1);
        small_data_free(&data);
    }
}

/* Documents in one sequence, their borders at, before and behind a block of queries. */
static void test_full_documents(void **state)
{
    (void)state;
    static const uint32_t borders[] = {1, 2, 30, 64, 71, 90};
    const sh_model_config config = small_config(true);
    sh_train_data data = small_data(&config, 2, 91, true, 11);
    for (size_t i = 0; i < SH_COUNT(borders); i++)
        ((uint8_t *)(uintptr_t)data.mask)[(i % 2) * 91 + borders[i]] |= SH_TRAIN_BEGINS;
    check_full_model(&config, &data, 37);
    small_data_free(&data);
}

static void test_full_tied(void **state)
{
    (void)state;
    check_full(true, 3, 7, false, 1);
}

static void test_full_untied_masked(void **state)
{
    (void)state;
    check_full(false, 3, 7, true, 1);
}

/* More positions than a block of attention queries has. */
static void test_full_long(void **state)
{
    (void)state;
    check_full(true, 1, 91, false, 37);
}

/* The reference's weights are W + scale·B·A: perturbing A or B means forming them again. */
typedef struct {
    const sh_model *model;
    const sh_adapter *adapter;
    const sh_train_data *data;
    double **a, **b;
} lora_case;

static double lora_loss(const lora_case *c)
{
    reference r;
    reference_init(&r, c->model);
    reference_adapt(&r, c->adapter, c->a, c->b);
    double loss = reference_loss(&r, c->data);
    reference_release(&r);
    return loss;
}

static double *to_double(const float *x, size_t n)
{
    double *y = sh_calloc(n, sizeof(*y));
    assert_non_null(y);
    for (size_t i = 0; i < n; i++)
        y[i] = (double)x[i];
    return y;
}

static void compare_lora(const lora_case *c, const char *name, double *values, const float *grad,
                         size_t n)
{
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        double kept = values[i];
        values[i] = kept + STEP;
        double above = lora_loss(c);
        values[i] = kept - STEP;
        double below = lora_loss(c);
        values[i] = kept;
        double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + RELATIVE * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", name, worst, most);
}

static void check_lora(const uint32_t *ranks, size_t n_ranks, bool tied)
{
    sh_model_config config = small_config(tied);
    sh_model *model = small_model(&config, SH_TYPE_F32, 3);
    sh_train_data data = small_data(&config, 2, 6, true, 5);
    sh_adapter *adapter = small_adapter(&config, ranks, n_ranks, 13);
    sh_adapter *grad = small_adapter(&config, ranks, n_ranks, 14);
    double *a[2 * SH_LAYER_MATRICES] = {0}, *b[2 * SH_LAYER_MATRICES] = {0}, loss = 0;
    lora_case c = {model, adapter, &data, a, b};
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        if (!pair->a)
            continue;
        a[i] = to_double(pair->a, (size_t)pair->rank * pair->in);
        b[i] = to_double(pair->b, (size_t)pair->rank * pair->out);
    }
    must_be_ok(sh_lora_gradient(model, adapter, &data, grad, &loss, &err));
    double expected = lora_loss(&c);
    if (!(fabs(loss - expected) <= 1e-6 * expected))
        fail_msg("loss is %.9g, expected %.9g", loss, expected);
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        const sh_lora_pair *g = &grad->pairs[i];
        char name[64];
        if (!g->a)
            continue;
        snprintf(name, sizeof(name), "pair %zu lora_a", i);
        compare_lora(&c, name, a[i], g->a, (size_t)g->rank * g->in);
        snprintf(name, sizeof(name), "pair %zu lora_b", i);
        compare_lora(&c, name, b[i], g->b, (size_t)g->rank * g->out);
    }
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        free(a[i]);
        free(b[i]);
    }
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&grad);
    small_data_free(&data);
    small_model_free(&model);
}

static void test_lora(void **state)
{
    (void)state;
    check_lora((const uint32_t[]){3}, 1, true);
}

/* Ranks that differ between matrices of one GEMM, and matrices that are not adapted. */
static void test_lora_mixed_ranks(void **state)
{
    (void)state;
    check_lora((const uint32_t[]){2, 0, 5, 1, 0}, 5, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_tied),        cmocka_unit_test(test_full_untied_masked),
        cmocka_unit_test(test_full_long),        cmocka_unit_test(test_full_architectures),
        cmocka_unit_test(test_full_documents),   cmocka_unit_test(test_lora),
        cmocka_unit_test(test_lora_mixed_ranks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
