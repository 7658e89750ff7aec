/*
 * Thirty steps of AdamW against PyTorch in float64: the loss before each update, and A and B at
 * the end. A float32 run of PyTorch stays within 6e-7 of the losses, 5e-5 of A and 1.5e-4 of B:
 * AdamW divides by sqrt(v), so values with tiny gradients follow their rounding. Four times that.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden/golden.h"
#include "trainer/trainer.h"

#define LOSS_ABSOLUTE 3e-6
#define A_RELATIVE    2e-4
#define B_RELATIVE    6e-4

typedef struct {
    double *losses;
    size_t n;
} trace;

static bool on_step(void *arg, const sh_train_progress *p)
{
    trace *t = arg;
    if (p->step <= t->n)
        t->losses[p->step - 1] = p->loss;
    return true;
}

/* The file's tensor "<matrix of pair i><suffix>". */
static sh_status pair_tensor(const safetensors *file, size_t i, const char *suffix,
                             const safetensor **out, sh_error *err)
{
    char name[96];
    snprintf(name, sizeof(name), "blk.%zu.%s%s", i / SH_LAYER_MATRICES,
             sh_layer_matrix_names[i % SH_LAYER_MATRICES], suffix);
    return safetensors_need(file, name, SAFE_F32, out, err);
}

static sh_status load_initial(const safetensors *file, const sh_model_config *config, float alpha,
                              sh_adapter **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *adapter = NULL;
    const safetensor *a;
    SH_GOTO(pair_tensor(file, 0, ".A_initial", &a, err));
    SH_GOTO(sh_adapter_create(config, (uint32_t)a->shape[0], alpha, &adapter, err));
    for (size_t i = 0; i < (size_t)config->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        SH_GOTO(pair_tensor(file, i, ".A_initial", &a, err));
        if (a->n != (size_t)pair->rank * pair->in) {
            status = sh_fail(err, SH_ERR_INVALID, "'%s' has %zu values", a->name, a->n);
            goto cleanup;
        }
        memcpy(pair->a, a->data, a->n * sizeof(float));
    }
    *out = adapter;
    adapter = NULL;
cleanup:
    sh_adapter_destroy(&adapter);
    return status;
}

static sh_status check_final(golden *g, const safetensors *file, const sh_adapter *adapter,
                             sh_error *err)
{
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        const safetensor *a, *b;
        SH_TRY(pair_tensor(file, i, ".A_final", &a, err));
        SH_TRY(pair_tensor(file, i, ".B_final", &b, err));
        if (!golden_check(
                g, a->n == (size_t)pair->rank * pair->in && b->n == (size_t)pair->rank * pair->out,
                "%s: %zu values, %s: %zu", a->name, a->n, b->name, b->n))
            continue;
        golden_close_norm(g, a->name, pair->a, a->data, a->n, A_RELATIVE);
        golden_close_norm(g, b->name, pair->b, b->data, b->n, B_RELATIVE);
    }
    return SH_OK;
}

static double value_at(const safetensor *t, size_t i)
{
    return t->type == SAFE_F64 ? ((const double *)t->data)[i] : (double)((const float *)t->data)[i];
}

static float real_of(const json_t *object, const char *key)
{
    return (float)json_number_value(json_object_get(object, key));
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status = SH_OK;
    safetensors file = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    const safetensor *tokens, *losses;
    const char *path, *model_path;
    const json_t *adamw = json_object_get(c, "adamw");
    double alpha = 16;
    sh_train_result result = {0};
    trace t = {0};

    SH_GOTO(golden_file(g, c, "model", &model_path, err));
    SH_GOTO(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(sh_model_open(model_path, &model, err));
    SH_GOTO(safetensors_need(&file, "tokens", SAFE_I32, &tokens, err));
    losses = safetensors_find(&file, "loss");
    if (!losses || (losses->type != SAFE_F64 && losses->type != SAFE_F32)) {
        status = sh_fail(err, SH_ERR_INVALID, "%s: no losses", path);
        goto cleanup;
    }
    if (safetensors_find(&file, "alpha"))
        SH_GOTO(safetensors_scalar(&file, "alpha", &alpha, err));
    SH_GOTO(load_initial(&file, &model->config, (float)alpha, &adapter, err));
    t = (trace){.losses = sh_calloc(losses->n, sizeof(*t.losses)), .n = losses->n};
    if (!t.losses) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory");
        goto cleanup;
    }
    /* Batch by batch in the file's order: one pass that is not shuffled. */
    sh_train_data data = {.tokens = tokens->data,
                          .n = tokens->shape[0] * tokens->shape[1],
                          .length = (uint32_t)tokens->shape[2]};
    sh_train_options options = {.lr = real_of(adamw, "lr"),
                                .beta1 = real_of(adamw, "beta1"),
                                .beta2 = real_of(adamw, "beta2"),
                                .eps = real_of(adamw, "eps"),
                                .weight_decay = real_of(adamw, "weight_decay"),
                                .batch = (uint32_t)tokens->shape[1],
                                .steps = (uint32_t)losses->n,
                                .lr_final = 1.0f,
                                .progress = on_step,
                                .progress_arg = &t};
    SH_GOTO(sh_lora_train(model, adapter, &data, &options, &result, err));
    for (size_t i = 0; i < losses->n; i++) {
        char what[40];
        snprintf(what, sizeof(what), "loss of step %zu", i + 1);
        golden_close_f64(g, what, t.losses[i], value_at(losses, i), LOSS_ABSOLUTE, 0);
    }
    SH_GOTO(check_final(g, &file, adapter, err));
    golden_note(g, "%zu steps, loss %.7f at the last", losses->n, result.loss_last);
cleanup:
    free(t.losses);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("lora_trajectory", run);
}
