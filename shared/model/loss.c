/*
 * Likelihood of texts. Chunks are evaluated alone and their sums added in chunk order, so the
 * result does not depend on how many workers share them.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"
#include "shared/model/transform.h"

/* Rows of logits held at once: bounds the memory of a large vocabulary. */
#define LOGIT_ROWS_MAX 64

double sh_nll(const float *logits, uint32_t vocab, int32_t token)
{
    SH_ASSERT(token >= 0 && (uint32_t)token < vocab);
    return sh_transform_get()->log_sum_exp(logits, vocab) - (double)logits[token];
}

/* What the workers of one call share. */
typedef struct {
    const sh_model *model;
    const sh_loss_text *text;
    size_t n_chunks, n_workers;
    double *sums;     /* [n_chunks] */
    uint32_t *scored; /* [n_chunks] */
    sh_error *errors; /* [n_workers] */
} loss_job;

static uint32_t chunk_length(const loss_job *job, size_t i)
{
    const size_t left = job->text->n_tokens - i * job->text->chunk;
    return (uint32_t)SH_MIN(left, job->text->chunk);
}

/* Scores the targets of positions first + 1 .. n - 1, given those before. chunk is [n]. */
static sh_status score_chunk(sh_context *context, const loss_job *job, const int32_t *chunk,
                             uint32_t n, float *logits, double *sum, sh_error *err)
{
    const uint32_t vocab = job->model->config.vocab;
    const uint32_t first = job->text->half ? n / 2 : 0;
    sh_context_truncate(context, 0);
    if (first > 0)
        SH_TRY(sh_context_decode(context, chunk, first, SH_LOGITS_NONE, NULL, err));
    double total = 0;
    for (uint32_t at = first; at + 1 < n;) {
        const uint32_t rows = SH_MIN(LOGIT_ROWS_MAX, n - 1 - at);
        SH_TRY(sh_context_decode(context, chunk + at, rows, SH_LOGITS_ALL, logits, err));
        for (uint32_t i = 0; i < rows; i++)
            total += sh_nll(logits + (size_t)i * vocab, vocab, chunk[at + i + 1]);
        at += rows;
    }
    *sum = total;
    return SH_OK;
}

static sh_status run_worker(loss_job *job, size_t worker, sh_error *err)
{
    sh_status status;
    const sh_loss_text *text = job->text;
    const sh_tokenizer *tokenizer = job->model->tokenizer;
    const bool bos = text->half && sh_tokenizer_adds_bos(tokenizer);
    sh_context *context = NULL;
    const sh_context_options options = {.n_tokens_max = text->chunk};
    float *logits =
        sh_alloc_aligned((size_t)LOGIT_ROWS_MAX * job->model->config.vocab * sizeof *logits);
    int32_t *chunk = sh_calloc(text->chunk, sizeof *chunk);
    if (logits == NULL || chunk == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "loss: out of memory");
        goto cleanup;
    }
    SH_GOTO(sh_context_create(job->model, &options, &context, err));
    SH_GOTO(sh_context_set_adapters(context, text->adapters, text->scales, text->n_adapters, err));
    for (size_t i = worker; i < job->n_chunks; i += job->n_workers) {
        const uint32_t n = chunk_length(job, i);
        memcpy(chunk, text->tokens + i * text->chunk, n * sizeof *chunk);
        if (bos)
            chunk[0] = sh_tokenizer_bos(tokenizer);
        SH_GOTO(score_chunk(context, job, chunk, n, logits, &job->sums[i], err));
        job->scored[i] = n - 1 - (text->half ? n / 2 : 0);
    }

cleanup:
    free(logits);
    free(chunk);
    sh_context_destroy(&context);
    return status;
}

static void run_worker_item(void *arg, size_t i)
{
    loss_job *job = arg;
    sh_error err = {0};
    job->errors[i].code = run_worker(job, i, &err);
    if (job->errors[i].code != SH_OK)
        job->errors[i] = err;
}

static sh_status check_text(const sh_model *model, const sh_loss_text *text, sh_error *err)
{
    const uint32_t least = text->half ? 4 : 2;
    if (text->chunk < least || text->chunk > model->config.context)
        return sh_fail(err, SH_ERR_LIMIT, "chunks of %u tokens are not in %u..%u of the model",
                       text->chunk, least, model->config.context);
    if (text->n_tokens < (text->half ? text->chunk : 2))
        return sh_fail(err, SH_ERR_INVALID,
                       "the text has %zu tokens, which is too short for chunks of %u",
                       text->n_tokens, text->chunk);
    return SH_OK;
}

sh_status sh_model_loss_pool(const sh_model *model, const sh_loss_text *text, sh_pool *pool,
                             sh_loss *out, sh_error *err)
{
    SH_TRY(check_text(model, text, err));
    sh_status status = SH_OK;
    loss_job job = {.model = model, .text = text};
    job.n_chunks = text->n_tokens / text->chunk;
    if (!text->half && text->n_tokens % text->chunk >= 2)
        job.n_chunks++;
    job.n_workers = SH_MIN(pool != NULL ? sh_pool_threads(pool) : 1, job.n_chunks);
    job.sums = sh_calloc(job.n_chunks, sizeof *job.sums);
    job.scored = sh_calloc(job.n_chunks, sizeof *job.scored);
    job.errors = sh_calloc(job.n_workers, sizeof *job.errors);
    if (job.sums == NULL || job.scored == NULL || job.errors == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "loss: out of memory");
        goto cleanup;
    }
    if (job.n_workers > 1)
        sh_pool_for(pool, run_worker_item, &job, job.n_workers);
    else
        run_worker_item(&job, 0);
    for (size_t i = 0; i < job.n_workers; i++)
        if (job.errors[i].code != SH_OK) {
            status = sh_fail(err, job.errors[i].code, "%s", job.errors[i].text);
            goto cleanup;
        }
    sh_loss loss = {0};
    for (size_t i = 0; i < job.n_chunks; i++) {
        loss.nll_sum += job.sums[i];
        loss.n_scored += job.scored[i];
        loss.n_tokens += chunk_length(&job, i);
    }
    *out = loss;

cleanup:
    free(job.sums);
    free(job.scored);
    free(job.errors);
    return status;
}

sh_status sh_model_loss(const sh_model *model, const sh_adapter *adapter, const int32_t *tokens,
                        size_t n_tokens, uint32_t chunk, bool half, sh_loss *out, sh_error *err)
{
    const sh_loss_text text = {.tokens = tokens,
                               .n_tokens = n_tokens,
                               .chunk = chunk,
                               .half = half,
                               .adapters = &adapter,
                               .n_adapters = adapter != NULL};
    return sh_model_loss_pool(model, &text, NULL, out, err);
}
