/*
 * Quantized models against exact arithmetic on the dequantized weights: the difference is what
 * quantizing the activations costs. As a measure, llama.cpp's logits on the same tokens are held
 * against the same reference: ours may have 3 times its mean Kullback-Leibler divergence, which
 * leaves room for another rounding of the activations and none for a wrong scale.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"
#include "tests/golden/golden.h"

#define KL_TIMES   3.0
#define NAME_BYTES 256

/* Σ p (ln p - ln q), p and q the softmax of two rows of logits; in double. */
static double row_kl(const float *p, const float *q, uint32_t vocab)
{
    double p_top = p[0], q_top = q[0], p_sum = 0, q_sum = 0, kl = 0;
    for (uint32_t i = 1; i < vocab; i++) {
        p_top = fmax(p_top, p[i]);
        q_top = fmax(q_top, q[i]);
    }
    for (uint32_t i = 0; i < vocab; i++) {
        p_sum += exp(p[i] - p_top);
        q_sum += exp(q[i] - q_top);
    }
    const double offset = q_top + log(q_sum) - p_top - log(p_sum);
    for (uint32_t i = 0; i < vocab; i++)
        kl += exp(p[i] - p_top) / p_sum * (p[i] - q[i] + offset);
    return kl;
}

static double mean_kl(const safetensor *reference, const float *logits)
{
    const uint32_t vocab = (uint32_t)reference->shape[1];
    const float *p = reference->data;
    double sum = 0;
    for (size_t i = 0; i < reference->shape[0]; i++)
        sum += row_kl(p + i * vocab, logits + i * vocab, vocab);
    return sum / (double)reference->shape[0];
}

static sh_status check_model(golden *g, const char *key, const char *path, const safetensors *file,
                             const safetensors *llamacpp, sh_error *err)
{
    sh_status status;
    sh_model *model = NULL;
    sh_context *context = NULL;
    float *logits = NULL;
    char name[NAME_BYTES];
    const safetensor *tokens, *reference, *theirs;
    double first;
    SH_TRY(safetensors_need(file, "tokens", SAFE_I32, &tokens, err));
    SH_TRY(safetensors_scalar(file, "first_position", &first, err));
    snprintf(name, sizeof name, "%s.logits", key);
    SH_TRY(safetensors_need(file, name, SAFE_F32, &reference, err));
    SH_TRY(safetensors_need(llamacpp, name, SAFE_F32, &theirs, err));
    SH_GOTO(sh_model_open(path, &model, err));
    const uint32_t vocab = model->config.vocab;
    if (reference->shape[1] != vocab || theirs->n != reference->n || first < 0 ||
        (size_t)first + reference->shape[0] > tokens->n) {
        status = sh_fail(err, SH_ERR_INVALID, "%s does not fit the model", name);
        goto cleanup;
    }
    const sh_context_options options = {.n_tokens_max = model->config.context};
    SH_GOTO(sh_context_create(model, &options, &context, err));
    logits = sh_calloc(tokens->n * vocab, sizeof *logits);
    if (logits == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    SH_GOTO(
        sh_context_decode(context, tokens->data, (uint32_t)tokens->n, SH_LOGITS_ALL, logits, err));
    const double ours = mean_kl(reference, logits + (size_t)first * vocab);
    const double limit = KL_TIMES * mean_kl(reference, theirs->data);
    golden_note(g, "%s: mean KL %.3g, llama.cpp's %.3g", key, ours, limit / KL_TIMES);
    golden_check(g, ours <= limit, "%s: mean KL %.3g is over %.3g", key, ours, limit);

cleanup:
    free(logits);
    sh_context_destroy(&context);
    sh_model_close(&model);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status;
    safetensors file = {0}, llamacpp = {0};
    const char *path, *key;
    json_t *models = json_object_get(c, "models"), *value;
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(golden_file(g, c, "llamacpp", &path, err));
    SH_GOTO(safetensors_open(path, &llamacpp, err));
    json_object_foreach(models, key, value)
    {
        status = golden_file(g, models, key, &path, err);
        if (status == SH_OK)
            status = check_model(g, key, path, &file, &llamacpp, err);
        if (status == SH_ERR_UNSUPPORTED || status == SH_ERR_NOT_FOUND)
            golden_skip(g, "%s: %s", key, err->text);
        else if (status != SH_OK)
            goto cleanup;
    }
    status = SH_OK;

cleanup:
    safetensors_release(&file);
    safetensors_release(&llamacpp);
    return status;
}

int main(void)
{
    return golden_main("forward_quantized", run);
}
