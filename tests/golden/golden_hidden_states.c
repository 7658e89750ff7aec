/*
 * The residual stream after each half layer against PyTorch in float64: finds the place of an error
 * that golden_forward only sees at the end.
 *
 * Tolerance: as golden_forward's; the values are of the same size (up to some tens).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/context_internal.h"
#include "tests/golden/golden.h"

#define ABSOLUTE   2e-4
#define RELATIVE   1e-5
#define NAME_BYTES 256

typedef struct {
    golden *g;
    const safetensors *file;
    uint32_t width;
    sh_status status;
    sh_error *err;
} trace_state;

static void check_stage(void *arg, sh_stage stage, uint32_t layer, const float *x, uint32_t n)
{
    trace_state *s = arg;
    char name[NAME_BYTES];
    const safetensor *expected;
    if (s->status != SH_OK)
        return;
    switch (stage) {
    case SH_STAGE_EMBEDDING:
        snprintf(name, sizeof name, "embedding");
        break;
    case SH_STAGE_AFTER_ATTENTION:
        snprintf(name, sizeof name, "blk.%u.after_attention", layer);
        break;
    case SH_STAGE_LAYER_OUTPUT:
        snprintf(name, sizeof name, "blk.%u.output", layer);
        break;
    case SH_STAGE_FINAL_NORM:
        snprintf(name, sizeof name, "final_norm");
        break;
    }
    s->status = safetensors_need(s->file, name, SAFE_F32, &expected, s->err);
    if (s->status == SH_OK && expected->n != (size_t)n * s->width)
        s->status = sh_fail(s->err, SH_ERR_INVALID, "%s has another shape than ours", name);
    if (s->status == SH_OK)
        golden_close(s->g, name, x, expected->data, expected->n, ABSOLUTE, RELATIVE);
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status;
    safetensors file = {0};
    sh_model *model = NULL;
    sh_context *context = NULL;
    float *logits = NULL;
    const char *path, *model_path;
    const safetensor *tokens;
    SH_TRY(golden_file(g, c, "model", &model_path, err));
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    SH_GOTO(sh_model_open(model_path, &model, err));
    SH_GOTO(safetensors_need(&file, "tokens", SAFE_I32, &tokens, err));
    const sh_context_options options = {.n_tokens_max = model->config.context,
                                        .batch_max = (uint32_t)tokens->n};
    SH_GOTO(sh_context_create(model, &options, &context, err));
    logits = sh_calloc(tokens->n * model->config.vocab, sizeof *logits);
    if (logits == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    trace_state state = {g, &file, model->config.width, SH_OK, err};
    sh_context_trace(context, check_stage, &state);
    SH_GOTO(
        sh_context_decode(context, tokens->data, (uint32_t)tokens->n, SH_LOGITS_ALL, logits, err));
    status = state.status;

cleanup:
    free(logits);
    sh_context_destroy(&context);
    sh_model_close(&model);
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("hidden_states", run);
}
