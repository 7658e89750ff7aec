/*
 * Gradients of every weight against PyTorch in float64. A float32 run of PyTorch is within 6e-6 of
 * it by matrix (Euclidean norm); ours adds in another order: ten times that.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden/golden.h"
#include "trainer/trainer.h"

#define RELATIVE      6e-5
#define LOSS_RELATIVE 1e-6

static bool ends_with(const char *name, const char *suffix, size_t *stem)
{
    size_t n = strlen(name), m = strlen(suffix);
    if (n <= m || strcmp(name + n - m, suffix) != 0)
        return false;
    *stem = n - m;
    return true;
}

/* `every`: the file holds each every-th value. */
static sh_status check_tensor(golden *g, const sh_full *full, const safetensor *t, size_t stem,
                              size_t every, sh_error *err)
{
    char name[256];
    size_t n = 0;
    if (stem >= sizeof(name) - sizeof(".weight"))
        return sh_fail(err, SH_ERR_INVALID, "a tensor name of %zu bytes", stem);
    snprintf(name, sizeof(name), "%.*s.weight", (int)stem, t->name);
    const float *grad = sh_full_grad(full, name, &n);
    if (!golden_check(g, grad && (n + every - 1) / every == t->n,
                      "%s: %zu gradients, the file has %zu (one of %zu)", name, n, t->n, every))
        return SH_OK;
    float *ours = sh_calloc(t->n, sizeof(*ours));
    if (!ours)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory");
    for (size_t i = 0; i < t->n; i++)
        ours[i] = grad[i * every];
    golden_close_norm(g, t->name, ours, t->data, t->n, RELATIVE);
    free(ours);
    return SH_OK;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status = SH_OK;
    safetensors file = {0};
    sh_model *model = NULL;
    sh_full *full = NULL;
    const safetensor *tokens;
    const char *path, *model_path;
    double loss = 0, expected = 0;
    size_t every = (size_t)json_integer_value(json_object_get(c, "sample_every")), checked = 0;
    char suffix[48] = ".grad";
    if (every == 0)
        every = 1;
    if (every > 1)
        snprintf(suffix, sizeof(suffix), ".grad_every_%zu", every);

    SH_GOTO(golden_file(g, c, "model", &model_path, err));
    SH_GOTO(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(sh_model_open(model_path, &model, err));
    SH_GOTO(safetensors_need(&file, "tokens", SAFE_I32, &tokens, err));
    SH_GOTO(safetensors_scalar(&file, "loss", &expected, err));
    SH_GOTO(sh_full_from_model(model, &full, err));
    sh_train_data data = {
        .tokens = tokens->data, .n = tokens->shape[0], .length = (uint32_t)tokens->shape[1]};
    SH_GOTO(sh_full_gradient(full, &data, &loss, err));
    golden_close_f64(g, "loss", loss, expected, 0, LOSS_RELATIVE);
    for (size_t i = 0; i < file.n; i++) {
        size_t stem;
        if (!ends_with(file.tensors[i].name, suffix, &stem))
            continue;
        SH_GOTO(check_tensor(g, full, &file.tensors[i], stem, every, err));
        checked++;
    }
    golden_check(g, checked > 0, "the file has no tensor named *%s", suffix);
    golden_note(g, "%zu tensors, loss %.7f", checked, loss);
cleanup:
    sh_full_destroy(&full);
    sh_model_close(&model);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("full_gradients", run);
}
