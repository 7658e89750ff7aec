/*
 * KV caches. A context is one allocation, of which only what was used becomes resident: for each
 * layer and key-value head the tiles of transform.h, then the angles of every position, which are
 * filled in when a position is first reached.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/model/context_internal.h"

/* ---- memory ---- */

void *sh_carve(sh_carver *c, size_t bytes)
{
    void *p = c->block != NULL ? c->block + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return p;
}

size_t sh_physical_memory(void)
{
    const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
    return pages > 0 && bytes > 0 ? (size_t)pages * (size_t)bytes : SIZE_MAX;
}

static size_t head_bytes(const sh_model_config *c, const sh_context_options *options)
{
    const size_t tiles = ((size_t)options->n_tokens_max + SH_KV_TILE - 1) / SH_KV_TILE;
    return tiles * sh_kv_tile_bytes(c->head_size, options->kv == SH_KV_F16);
}

static size_t cache_bytes(const sh_model_config *c, const sh_context_options *options)
{
    return (size_t)c->n_layers * c->n_kv_heads * head_bytes(c, options);
}

/* Cache, angles, and what it takes to begin at a multiple of 64. */
static size_t block_bytes(const sh_model_config *c, const sh_context_options *options)
{
    return cache_bytes(c, options) + (size_t)options->n_tokens_max * c->head_size * sizeof(float) +
           64;
}

static sh_runner_options own_runner(const sh_context_options *options)
{
    const uint32_t rows = options->batch_max != 0 ? options->batch_max : SH_PASS_ROWS_DEFAULT;
    return (sh_runner_options){.rows_max = SH_MIN(rows, options->n_tokens_max)};
}

size_t sh_context_bytes(const sh_model *model, const sh_context_options *options)
{
    const sh_runner_options runner = own_runner(options);
    return sizeof(sh_context) + block_bytes(&model->config, options) +
           (options->runner == NULL ? sh_runner_bytes(model, &runner) : 0);
}

/* ---- contexts ---- */

static sh_status check_options(const sh_model *model, const sh_context_options *options,
                               sh_error *err)
{
    if (options->n_tokens_max == 0 || options->n_tokens_max > model->config.context)
        return sh_fail(err, SH_ERR_LIMIT, "a context of %u tokens is not in 1..%u of the model",
                       options->n_tokens_max, model->config.context);
    if (options->batch_max > SH_PASS_ROWS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a batch of %u tokens is over the limit of %u",
                       options->batch_max, SH_PASS_ROWS_MAX);
    /* The kernel would grant more than there is, and kill us when it is used. */
    const size_t bytes = sh_context_bytes(model, options), there = sh_physical_memory();
    if (bytes > there)
        return sh_fail(err, SH_ERR_NO_MEMORY,
                       "a context of %u tokens takes %zu MiB, and this machine has %zu: ask for a "
                       "shorter one",
                       options->n_tokens_max, bytes >> 20, there >> 20);
    return SH_OK;
}

sh_status sh_context_create(const sh_model *model, const sh_context_options *options,
                            sh_context **out, sh_error *err)
{
    sh_status status;
    SH_TRY(check_options(model, options, err));
    SH_ASSERT(options->runner == NULL || options->batch_max == 0);
    const size_t bytes = block_bytes(&model->config, options);
    const sh_runner_options runner = own_runner(options);
    sh_context *ctx = sh_calloc(1, sizeof *ctx);
    if (ctx == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "context: out of memory");
    ctx->model = model;
    ctx->ops = sh_transform_get();
    ctx->n_max = options->n_tokens_max;
    ctx->halves = options->kv == SH_KV_F16;
    ctx->tile_bytes = sh_kv_tile_bytes(model->config.head_size, ctx->halves);
    ctx->head_bytes = head_bytes(&model->config, options);
    ctx->block = sh_calloc(1, bytes); /* fresh pages, which are not touched */
    if (ctx->block == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "context: no memory for %zu bytes", bytes);
        goto cleanup;
    }
    ctx->cache = (uint8_t *)(((uintptr_t)ctx->block + 63) / 64 * 64);
    ctx->angles = (float *)(ctx->cache + cache_bytes(&model->config, options));
    ctx->runner = options->runner;
    if (ctx->runner == NULL) {
        SH_GOTO(sh_runner_create(model, &runner, &ctx->runner, err));
        ctx->owns_runner = true;
    }
    SH_ASSERT(ctx->runner->model == model);
    *out = ctx;
    return SH_OK;

cleanup:
    sh_context_destroy(&ctx);
    return status;
}

void sh_context_destroy(sh_context **context)
{
    sh_context *ctx = *context;
    if (ctx == NULL)
        return;
    if (ctx->owns_runner)
        sh_runner_destroy(&ctx->runner);
    sh_lora_destroy(&ctx->lora);
    free(ctx->block);
    free(ctx);
    *context = NULL;
}

uint32_t sh_context_length(const sh_context *context)
{
    return context->length;
}

void sh_context_truncate(sh_context *context, uint32_t n_tokens)
{
    context->length = SH_MIN(context->length, n_tokens);
}

void sh_context_trace(sh_context *context, sh_trace_fn fn, void *arg)
{
    context->trace = fn;
    context->trace_arg = arg;
}

sh_head_cache sh_context_head(const sh_context *context, uint32_t layer, uint32_t head)
{
    const sh_model_config *c = &context->model->config;
    const size_t i = (size_t)layer * c->n_kv_heads + head;
    return (sh_head_cache){.tiles = context->cache + i * context->head_bytes,
                           .tile_bytes = context->tile_bytes,
                           .head_size = c->head_size,
                           .head_padded = (uint32_t)SH_LANES_UP(c->head_size),
                           .halves = context->halves};
}

void sh_context_fill_angles(sh_context *context, uint32_t n)
{
    const sh_model *model = context->model;
    const uint32_t pairs = model->config.head_size / 2;
    for (; context->n_angles < n; context->n_angles++) {
        float *angles = context->angles + (size_t)context->n_angles * model->config.head_size;
        for (uint32_t j = 0; j < pairs; j++) {
            const double angle = context->n_angles * model->rope_frequency[j];
            angles[2 * j] = (float)(cos(angle) * model->rope_magnitude);
            angles[2 * j + 1] = (float)(sin(angle) * model->rope_magnitude);
        }
    }
}

sh_status sh_context_set_adapters(sh_context *context, const sh_adapter *const *adapters,
                                  const float *scales, size_t n, sh_error *err)
{
    if (n > SH_ADAPTERS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%zu adapters are over the limit of %d", n,
                       SH_ADAPTERS_MAX);
    if (n == 0 && context->lora == NULL)
        return SH_OK;
    sh_lora *lora = NULL;
    if (n > 0) {
        SH_TRY(sh_lora_create(context->model, adapters, scales, n, &lora, err));
        const sh_status status = sh_runner_reserve_t(context->runner, lora->rank_max, err);
        if (status != SH_OK) {
            sh_lora_destroy(&lora);
            return status;
        }
    }
    sh_lora_destroy(&context->lora);
    context->lora = lora;
    context->length = 0;
    return SH_OK;
}

sh_status sh_context_decode(sh_context *context, const int32_t *tokens, uint32_t n,
                            int logits_wanted, float *logits, sh_error *err)
{
    const sh_run_item item = {.context = context,
                              .tokens = tokens,
                              .n = n,
                              .logits_wanted = logits_wanted,
                              .logits = logits};
    return sh_runner_run(context->runner, &item, 1, err);
}

sh_status sh_context_copy_prefix(sh_context *context, const sh_context *from, uint32_t n,
                                 sh_error *err)
{
    SH_ASSERT(context != from && context->model == from->model && context->halves == from->halves);
    if (n > from->length || n > context->n_max)
        return sh_fail(err, SH_ERR_LIMIT, "a prefix of %u tokens: %u are there, %u fit", n,
                       from->length, context->n_max);
    if (context->lora != NULL || from->lora != NULL) /* a cache is of its adapters */
        return sh_fail(err, SH_ERR_MISMATCH, "a prefix is not copied where adapters are in use");
    const size_t bytes = ((size_t)n + SH_KV_TILE - 1) / SH_KV_TILE * context->tile_bytes;
    const sh_model_config *c = &context->model->config;
    for (uint32_t layer = 0; layer < c->n_layers; layer++)
        for (uint32_t head = 0; head < c->n_kv_heads; head++)
            memcpy(sh_context_head(context, layer, head).tiles,
                   sh_context_head(from, layer, head).tiles, bytes);
    context->length = n;
    return SH_OK;
}
