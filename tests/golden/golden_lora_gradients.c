/*
 * Gradients of A and B on a frozen base against PyTorch in float64. A float32 run of PyTorch is
 * within 2e-6 of it by matrix (Euclidean norm); ours adds in another order and folds scale * B·A
 * into W before the products: ten times that.
 */
#include <stdio.h>
#include <string.h>

#include "tests/golden/golden.h"
#include "trainer/trainer.h"

#define RELATIVE      2e-5
#define LOSS_RELATIVE 1e-6

static sh_status check_pair(golden *g, const safetensors *file, const sh_adapter *grad, size_t i,
                            sh_error *err)
{
    const sh_lora_pair *pair = &grad->pairs[i];
    const safetensor *a, *b;
    char name[96];
    int stem = snprintf(name, sizeof(name), "blk.%zu.%s", i / SH_LAYER_MATRICES,
                        sh_layer_matrix_names[i % SH_LAYER_MATRICES]);
    if (!pair->a)
        return SH_OK;
    snprintf(name + stem, sizeof(name) - (size_t)stem, ".dA");
    SH_TRY(safetensors_need(file, name, SAFE_F32, &a, err));
    if (golden_check(g, a->n == (size_t)pair->rank * pair->in, "%s: %zu values", name, a->n))
        golden_close_norm(g, name, pair->a, a->data, a->n, RELATIVE);
    snprintf(name + stem, sizeof(name) - (size_t)stem, ".dB");
    SH_TRY(safetensors_need(file, name, SAFE_F32, &b, err));
    if (golden_check(g, b->n == (size_t)pair->rank * pair->out, "%s: %zu values", name, b->n))
        golden_close_norm(g, name, pair->b, b->data, b->n, RELATIVE);
    return SH_OK;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status = SH_OK;
    safetensors file = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL, *grad = NULL;
    const safetensor *tokens;
    const char *path, *model_path, *adapter_path;
    double loss = 0, expected = 0;

    SH_GOTO(golden_file(g, c, "model", &model_path, err));
    SH_GOTO(golden_file(g, c, "adapter", &adapter_path, err));
    SH_GOTO(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(sh_model_open(model_path, &model, err));
    SH_GOTO(sh_adapter_open(adapter_path, &model->config, &adapter, err));
    SH_GOTO(sh_adapter_open(adapter_path, &model->config, &grad, err)); /* for its shapes */
    SH_GOTO(safetensors_need(&file, "tokens", SAFE_I32, &tokens, err));
    SH_GOTO(safetensors_scalar(&file, "loss", &expected, err));
    sh_train_data data = {
        .tokens = tokens->data, .n = tokens->shape[0], .length = (uint32_t)tokens->shape[1]};
    SH_GOTO(sh_lora_gradient(model, adapter, &data, grad, &loss, err));
    golden_close_f64(g, "loss", loss, expected, 0, LOSS_RELATIVE);
    for (size_t i = 0; i < (size_t)grad->n_layers * SH_LAYER_MATRICES; i++)
        SH_GOTO(check_pair(g, &file, grad, i, err));
    golden_note(g, "loss %.7f", loss);
cleanup:
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&grad);
    sh_model_close(&model);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("lora_gradients", run);
}
