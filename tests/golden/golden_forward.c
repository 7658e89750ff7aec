/*
 * Logits, losses and greedy continuations against PyTorch in float64, with and without an adapter.
 *
 * Tolerance: a float32 PyTorch run is within 2.2e-5 of the reference on logits of up to 23
 * (summary.json), llama.cpp within 1e-5. Ours may be 10 times as far, which is still 50 times less
 * than the smallest gap between the first and the second token of the greedy run (0.012).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"
#include "shared/model/sampler.h"
#include "tests/golden/golden.h"

#define LOGIT_ABSOLUTE 2e-4
#define LOGIT_RELATIVE 1e-5
/* A loss is a difference of two logits (one a smooth maximum). */
#define NLL_ABSOLUTE 4e-4
#define NAME_BYTES   256

typedef struct {
    golden *g;
    const safetensors *file;
    const sh_model *model;
    sh_context *context;
} run_state;

static sh_status decode_all(const run_state *s, const safetensor *tokens, float **logits,
                            sh_error *err)
{
    *logits = sh_calloc(tokens->n * s->model->config.vocab, sizeof **logits);
    if (*logits == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    sh_context_truncate(s->context, 0);
    return sh_context_decode(s->context, tokens->data, (uint32_t)tokens->n, SH_LOGITS_ALL, *logits,
                             err);
}

static sh_status check_nll(const run_state *s, const char *prefix, const safetensor *tokens,
                           const float *logits, sh_error *err)
{
    char name[NAME_BYTES + 32];
    const uint32_t vocab = s->model->config.vocab;
    const safetensor *nll;
    snprintf(name, sizeof name, "%s.nll", prefix);
    if (tokens->n < 2)
        return SH_OK;
    SH_TRY(safetensors_need(s->file, name, SAFE_F32, &nll, err));
    if (nll->n != tokens->n - 1)
        return sh_fail(err, SH_ERR_INVALID, "%s has %zu values for %zu tokens", name, nll->n,
                       tokens->n);
    float *ours = sh_calloc(nll->n, sizeof *ours);
    if (ours == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    const int32_t *ids = tokens->data;
    for (size_t i = 0; i < nll->n; i++)
        ours[i] = (float)sh_nll(logits + i * vocab, vocab, ids[i + 1]);
    golden_close(s->g, name, ours, nll->data, nll->n, NLL_ABSOLUTE, 0);
    free(ours);
    return SH_OK;
}

static sh_status check_sequence(const run_state *s, const char *prefix, const safetensor *tokens,
                                sh_error *err)
{
    sh_status status;
    char name[NAME_BYTES + 32];
    const uint32_t vocab = s->model->config.vocab;
    const safetensor *expected;
    float *logits = NULL;
    double first = 0;
    snprintf(name, sizeof name, "%s.first_position", prefix);
    if (safetensors_find(s->file, name) != NULL)
        SH_TRY(safetensors_scalar(s->file, name, &first, err));
    snprintf(name, sizeof name, "%s.logits", prefix);
    SH_TRY(safetensors_need(s->file, name, SAFE_F32, &expected, err));
    if (expected->shape[1] != vocab || tokens->n > s->model->config.context || first < 0 ||
        (size_t)first + expected->shape[0] > tokens->n)
        return sh_fail(err, SH_ERR_INVALID, "%s does not fit the model", name);
    SH_GOTO(decode_all(s, tokens, &logits, err));
    golden_close(s->g, name, logits + (size_t)first * vocab, expected->data, expected->n,
                 LOGIT_ABSOLUTE, LOGIT_RELATIVE);
    SH_GOTO(check_nll(s, prefix, tokens, logits, err));

cleanup:
    free(logits);
    return status;
}

static sh_status check_greedy(const run_state *s, sh_error *err)
{
    sh_status status = SH_OK;
    const uint32_t vocab = s->model->config.vocab;
    const safetensor *prompt, *expected;
    if (safetensors_find(s->file, "greedy.prompt") == NULL)
        return SH_OK;
    SH_TRY(safetensors_need(s->file, "greedy.prompt", SAFE_I32, &prompt, err));
    SH_TRY(safetensors_need(s->file, "greedy.tokens", SAFE_I32, &expected, err));
    float *logits = sh_calloc(vocab, sizeof *logits);
    int32_t *ours = sh_calloc(expected->n, sizeof *ours);
    if (logits == NULL || ours == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    sh_context_truncate(s->context, 0);
    SH_GOTO(sh_context_decode(s->context, prompt->data, (uint32_t)prompt->n, SH_LOGITS_LAST, logits,
                              err));
    for (size_t i = 0; i < expected->n; i++) {
        ours[i] = sh_argmax(logits, vocab);
        if (i + 1 < expected->n)
            SH_GOTO(sh_context_decode(s->context, &ours[i], 1, SH_LOGITS_LAST, logits, err));
    }
    golden_equal_i32(s->g, "greedy.tokens", ours, expected->data, expected->n);

cleanup:
    free(logits);
    free(ours);
    return status;
}

/* Every "<prefix>.tokens" of the file but the greedy run's. */
static sh_status check_sequences(const run_state *s, sh_error *err)
{
    static const char suffix[] = ".tokens";
    for (size_t i = 0; i < s->file->n; i++) {
        const char *name = s->file->tensors[i].name;
        const size_t n = strlen(name), m = strlen(suffix);
        char prefix[NAME_BYTES / 2];
        if (n <= m || n - m >= sizeof prefix || strcmp(name + n - m, suffix) != 0)
            continue;
        memcpy(prefix, name, n - m);
        prefix[n - m] = '\0';
        if (strcmp(prefix, "greedy") == 0)
            continue;
        const safetensor *tokens;
        SH_TRY(safetensors_need(s->file, name, SAFE_I32, &tokens, err));
        SH_TRY(check_sequence(s, prefix, tokens, err));
    }
    return SH_OK;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status;
    safetensors file = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    sh_context *context = NULL;
    const char *path, *model_path;
    SH_TRY(golden_file(g, c, "model", &model_path, err));
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(sh_model_open(model_path, &model, err));
    const sh_context_options options = {.n_tokens_max = model->config.context};
    SH_GOTO(sh_context_create(model, &options, &context, err));
    if (json_object_get(c, "adapter") != NULL) {
        SH_GOTO(golden_file(g, c, "adapter", &path, err));
        SH_GOTO(sh_adapter_open(path, &model->config, &adapter, err));
        const sh_adapter *one = adapter;
        SH_GOTO(sh_context_set_adapters(context, &one, NULL, 1, err));
    }
    const run_state state = {g, &file, model, context};
    SH_GOTO(check_sequences(&state, err));
    SH_GOTO(check_greedy(&state, err));

cleanup:
    sh_context_destroy(&context);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("forward", run);
}
