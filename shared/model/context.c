/*
 * The forward pass. B is the tokens of a batch, C width, H heads of size S, G key-value heads,
 * F ffn, V vocabulary, N cache length. All activations are float, rows are tokens.
 *
 *   x (B,C)   residual stream            q (B,H*S), k and v (B,G*S)
 *   norm (B,C) input of the products     att (B,H*S)   gate, up (B,F)
 *
 * The cache holds, for each layer and key-value head, keys as (S,N) and values as (N,S'), S' = S
 * rounded up to whole lanes: see transform.h. One allocation holds cache and scratch; a second one
 * holds what the adapters need, made when they are set.
 *
 * A position's result depends only on the tokens before it: products and attention work row by
 * row in a fixed order (kernel.h, transform.h promise it), so calls may be split anywhere. Rows
 * whose logits nobody wants end after the last layer's keys and values.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/math/kernel.h"
#include "shared/model/context_internal.h"
#include "shared/model/transform.h"

#define BATCH_DEFAULT 128
#define BATCH_LIMIT   4096
#define RANK_MAX      65536u

/* One matrix's pair, ready to be added: y += Σ_r (A·x)[r] * rows[r]. */
typedef struct {
    uint32_t rank;
    const float *a;    /* [rank, in], the adapter's own */
    const float *rows; /* [rank, out]: scale * B, transposed */
} lora_use;

struct sh_context {
    const sh_model *model;
    const sh_transform *ops;
    uint32_t n_max, batch_max, length;
    size_t stride, head_padded; /* of the cache */
    void *block;
    float *keys, *values, *angles;
    float *x, *norm, *q, *k, *v, *att, *gate, *up, *scores;
    void *scratch; /* of sh_matmul */

    size_t n_adapters;
    void *lora_block;
    lora_use *lora; /* [n_adapters, n_layers, SH_LAYER_MATRICES] */
    float *lora_t;  /* (B, largest rank) */

    sh_trace_fn trace;
    void *trace_arg;
};

/* ---- memory ---- */

/* Two passes over the same list of reservations: the first (block NULL) adds up, the second hands
 * out. */
typedef struct {
    uint8_t *block;
    size_t used;
} carver;

static void *carve(carver *c, size_t bytes)
{
    void *p = c->block != NULL ? c->block + c->used : NULL;
    c->used += (bytes + 63) / 64 * 64;
    return p;
}

static float *carve_floats(carver *c, size_t rows, size_t columns)
{
    return carve(c, rows * columns * sizeof(float));
}

static void carve_all(sh_context *ctx, carver *c)
{
    const sh_model_config *m = &ctx->model->config;
    const size_t b = ctx->batch_max, heads = (size_t)m->n_layers * m->n_kv_heads;
    const size_t q = (size_t)m->n_heads * m->head_size, kv = (size_t)m->n_kv_heads * m->head_size;
    ctx->keys = carve_floats(c, heads * m->head_size, ctx->stride);
    ctx->values = carve_floats(c, heads * ctx->stride, ctx->head_padded);
    ctx->angles = carve_floats(c, ctx->n_max, m->head_size);
    ctx->x = carve_floats(c, b, m->width);
    ctx->norm = carve_floats(c, b, m->width);
    ctx->q = carve_floats(c, b, q);
    ctx->k = carve_floats(c, b, kv);
    ctx->v = carve_floats(c, b, kv);
    ctx->att = carve_floats(c, b, q);
    ctx->gate = carve_floats(c, b, m->ffn);
    ctx->up = carve_floats(c, b, m->ffn);
    ctx->scores = carve_floats(c, 1, ctx->stride);
    const size_t in_max = SH_MAX(SH_MAX((size_t)m->width, q), m->ffn);
    ctx->scratch = carve(c, sh_matmul_scratch_bytes(b, in_max));
}

/* angles[position][j] = {cos, sin} of position * base^(-2j / head_size), in double until stored. */
static void fill_angles(sh_context *ctx)
{
    const uint32_t size = ctx->model->config.head_size;
    const double base = ctx->model->config.rope_base;
    for (uint32_t j = 0; j < size / 2; j++) {
        const double frequency = pow(base, -2.0 * j / size);
        for (uint32_t p = 0; p < ctx->n_max; p++) {
            float *pair = ctx->angles + (size_t)p * size + 2 * j;
            pair[0] = (float)cos(p * frequency);
            pair[1] = (float)sin(p * frequency);
        }
    }
}

sh_status sh_context_create(const sh_model *model, const sh_context_options *options,
                            sh_context **out, sh_error *err)
{
    if (options->n_tokens_max == 0 || options->n_tokens_max > model->config.context)
        return sh_fail(err, SH_ERR_LIMIT, "a context of %u tokens is not in 1..%u of the model",
                       options->n_tokens_max, model->config.context);
    if (options->batch_max > BATCH_LIMIT)
        return sh_fail(err, SH_ERR_LIMIT, "a batch of %u tokens is over the limit of %u",
                       options->batch_max, BATCH_LIMIT);
    sh_context *ctx = sh_calloc(1, sizeof *ctx);
    if (ctx == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "context: out of memory");
    ctx->model = model;
    ctx->ops = sh_transform_get();
    ctx->n_max = options->n_tokens_max;
    ctx->batch_max = options->batch_max != 0 ? options->batch_max : BATCH_DEFAULT;
    ctx->batch_max = SH_MIN(ctx->batch_max, ctx->n_max);
    ctx->stride = SH_LANES_UP(ctx->n_max);
    ctx->head_padded = SH_LANES_UP(model->config.head_size);
    carver c = {0};
    carve_all(ctx, &c);
    const size_t bytes = c.used;
    ctx->block = sh_alloc_aligned(bytes);
    if (ctx->block == NULL) {
        free(ctx);
        return sh_fail(err, SH_ERR_NO_MEMORY, "context: no memory for %zu bytes", bytes);
    }
    c = (carver){.block = ctx->block};
    carve_all(ctx, &c);
    fill_angles(ctx);
    *out = ctx;
    return SH_OK;
}

void sh_context_destroy(sh_context **context)
{
    if (*context == NULL)
        return;
    free((*context)->block);
    free((*context)->lora_block);
    free(*context);
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

static void trace(const sh_context *ctx, sh_stage stage, uint32_t layer, const float *x, uint32_t n)
{
    if (ctx->trace != NULL)
        ctx->trace(ctx->trace_arg, stage, layer, x, n);
}

/* ---- adapters ---- */

static const sh_matrix *layer_matrix(const sh_model *model, size_t i)
{
    return &model->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES];
}

static sh_status check_adapter(const sh_model *model, const sh_adapter *adapter, sh_error *err)
{
    if (adapter->n_layers != model->config.n_layers)
        return sh_fail(err, SH_ERR_MISMATCH, "the adapter is for %u layers, the model has %u",
                       adapter->n_layers, model->config.n_layers);
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        const sh_matrix *m = layer_matrix(model, i);
        if (p->a == NULL || p->b == NULL)
            continue;
        if (p->in != m->in || p->out != m->out || p->rank == 0 || p->rank > RANK_MAX)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "the adapter's pair for %s is %u x %u of rank %u, the matrix %u x %u",
                           m->name, p->out, p->in, p->rank, m->out, m->in);
    }
    return SH_OK;
}

/* Reserves (first pass) or fills (second) what one pair needs. */
static void prepare_pair(const sh_adapter *adapter, size_t i, carver *c, lora_use *use)
{
    const sh_lora_pair *p = &adapter->pairs[i];
    if (p->a == NULL || p->b == NULL)
        return;
    float *rows = carve_floats(c, p->rank, p->out);
    if (rows == NULL)
        return;
    const float scale = adapter->alpha / (float)p->rank;
    for (uint32_t o = 0; o < p->out; o++)
        for (uint32_t r = 0; r < p->rank; r++)
            rows[(size_t)r * p->out + o] = scale * p->b[(size_t)o * p->rank + r];
    *use = (lora_use){.rank = p->rank, .a = p->a, .rows = rows};
}

static void prepare_adapters(sh_context *ctx, const sh_adapter *const *adapters, size_t n,
                             carver *c)
{
    const size_t n_matrices = (size_t)ctx->model->config.n_layers * SH_LAYER_MATRICES;
    uint32_t rank_max = 0;
    for (size_t a = 0; a < n; a++)
        for (size_t i = 0; i < n_matrices; i++)
            if (adapters[a]->pairs[i].a != NULL)
                rank_max = SH_MAX(rank_max, adapters[a]->pairs[i].rank);
    lora_use *uses = carve(c, n * n_matrices * sizeof *uses);
    float *t = carve_floats(c, ctx->batch_max, rank_max);
    for (size_t a = 0; a < n; a++)
        for (size_t i = 0; i < n_matrices; i++)
            prepare_pair(adapters[a], i, c, uses != NULL ? &uses[a * n_matrices + i] : NULL);
    if (c->block != NULL) {
        ctx->lora = uses;
        ctx->lora_t = t;
    }
}

sh_status sh_context_set_adapters(sh_context *context, const sh_adapter *const *adapters, size_t n,
                                  sh_error *err)
{
    if (n > SH_ADAPTERS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%zu adapters are over the limit of %d", n,
                       SH_ADAPTERS_MAX);
    for (size_t i = 0; i < n; i++)
        SH_TRY(check_adapter(context->model, adapters[i], err));
    if (n == 0 && context->n_adapters == 0)
        return SH_OK;
    void *block = NULL;
    if (n > 0) {
        carver c = {0};
        prepare_adapters(context, adapters, n, &c);
        block = sh_alloc_aligned(c.used);
        if (block == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "adapters: no memory for %zu bytes", c.used);
        c = (carver){.block = block};
        prepare_adapters(context, adapters, n, &c);
    }
    free(context->lora_block);
    context->lora_block = block;
    context->n_adapters = n;
    context->length = 0;
    return SH_OK;
}

/* ---- the forward pass ---- */

/* y (n,out) = x (n,in)·Wᵀ of one layer's matrix, with what the adapters add. */
static void project(sh_context *ctx, uint32_t layer, int which, const float *x, uint32_t n,
                    float *y)
{
    const sh_model *model = ctx->model;
    const sh_matrix *m = &model->layers[layer].m[which];
    sh_matmul(m->type, m->data, m->out, m->in, x, n, y, ctx->scratch);
    const size_t n_matrices = (size_t)model->config.n_layers * SH_LAYER_MATRICES;
    for (size_t a = 0; a < ctx->n_adapters; a++) {
        const lora_use *use =
            &ctx->lora[a * n_matrices + (size_t)layer * SH_LAYER_MATRICES + (size_t)which];
        if (use->rank == 0)
            continue;
        sh_matmul(SH_TYPE_F32, use->a, use->rank, m->in, x, n, ctx->lora_t, ctx->scratch);
        for (uint32_t i = 0; i < n; i++)
            ctx->ops->add_rows(y + (size_t)i * m->out, ctx->lora_t + (size_t)i * use->rank,
                               use->rows, use->rank, m->out);
    }
}

static void normalize(const sh_context *ctx, const float *x, const float *weight, uint32_t n,
                      float *out)
{
    const sh_model_config *c = &ctx->model->config;
    for (uint32_t i = 0; i < n; i++)
        ctx->ops->rms_norm(x + (size_t)i * c->width, weight, c->norm_eps, c->width,
                           out + (size_t)i * c->width);
}

static void add_to(float *restrict x, const float *restrict y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

static sh_head_cache head_cache(const sh_context *ctx, uint32_t layer, uint32_t head)
{
    const sh_model_config *c = &ctx->model->config;
    const size_t i = (size_t)layer * c->n_kv_heads + head;
    return (sh_head_cache){.k = ctx->keys + i * c->head_size * ctx->stride,
                           .v = ctx->values + i * ctx->stride * ctx->head_padded,
                           .stride = ctx->stride,
                           .head_size = c->head_size,
                           .head_padded = (uint32_t)ctx->head_padded};
}

/* Rotates the batch's keys and puts keys and values into the cache at ctx->length. */
static void store_keys_values(sh_context *ctx, uint32_t layer, uint32_t n)
{
    const sh_model_config *c = &ctx->model->config;
    const uint32_t size = c->head_size;
    for (uint32_t head = 0; head < c->n_kv_heads; head++) {
        const sh_head_cache cache = head_cache(ctx, layer, head);
        float *keys = ctx->keys + (cache.k - ctx->keys);
        float *values = ctx->values + (cache.v - ctx->values);
        for (uint32_t i = 0; i < n; i++) {
            const size_t position = (size_t)ctx->length + i;
            float *k = ctx->k + ((size_t)i * c->n_kv_heads + head) * size;
            const float *v = ctx->v + ((size_t)i * c->n_kv_heads + head) * size;
            ctx->ops->rotate(k, ctx->angles + position * size, size / 2);
            for (uint32_t d = 0; d < size; d++)
                keys[d * ctx->stride + position] = k[d];
            memcpy(values + position * ctx->head_padded, v, size * sizeof *v);
        }
    }
}

/* att (n,H*S) of the rows first .. first + n - 1 of the batch, whose q are rows 0 .. n - 1. */
static void attend(sh_context *ctx, uint32_t layer, uint32_t first, uint32_t n)
{
    const sh_model_config *c = &ctx->model->config;
    const uint32_t group = c->n_heads / c->n_kv_heads, size = c->head_size;
    for (uint32_t head = 0; head < c->n_heads; head++) {
        const sh_head_cache cache = head_cache(ctx, layer, head / group);
        for (uint32_t i = 0; i < n; i++) {
            const size_t position = (size_t)ctx->length + first + i;
            float *q = ctx->q + ((size_t)i * c->n_heads + head) * size;
            ctx->ops->rotate(q, ctx->angles + position * size, size / 2);
            ctx->ops->attend(&cache, q, (uint32_t)position + 1, ctx->scores,
                             ctx->att + ((size_t)i * c->n_heads + head) * size);
        }
    }
}

/* One layer over the n rows of x; only rows from `first` on leave it (0: all). */
static void run_layer(sh_context *ctx, uint32_t layer, uint32_t n, uint32_t first)
{
    const sh_model_config *c = &ctx->model->config;
    const sh_layer *l = &ctx->model->layers[layer];
    normalize(ctx, ctx->x, l->attn_norm, n, ctx->norm);
    project(ctx, layer, SH_ATTN_K, ctx->norm, n, ctx->k);
    project(ctx, layer, SH_ATTN_V, ctx->norm, n, ctx->v);
    store_keys_values(ctx, layer, n);
    if (first == n)
        return;
    const uint32_t rows = n - first;
    const size_t values = (size_t)rows * c->width;
    float *x = ctx->x + (size_t)first * c->width;
    project(ctx, layer, SH_ATTN_Q, ctx->norm + (size_t)first * c->width, rows, ctx->q);
    attend(ctx, layer, first, rows);
    project(ctx, layer, SH_ATTN_OUTPUT, ctx->att, rows, ctx->norm);
    add_to(x, ctx->norm, values);
    trace(ctx, SH_STAGE_AFTER_ATTENTION, layer, x, rows);
    normalize(ctx, x, l->ffn_norm, rows, ctx->norm);
    project(ctx, layer, SH_FFN_GATE, ctx->norm, rows, ctx->gate);
    project(ctx, layer, SH_FFN_UP, ctx->norm, rows, ctx->up);
    ctx->ops->swiglu(ctx->gate, ctx->up, (size_t)rows * c->ffn);
    project(ctx, layer, SH_FFN_DOWN, ctx->gate, rows, ctx->norm);
    add_to(x, ctx->norm, values);
    trace(ctx, SH_STAGE_LAYER_OUTPUT, layer, x, rows);
}

/* At most batch_max tokens; logits of the last n_logits rows to logits. */
static void run_batch(sh_context *ctx, const int32_t *tokens, uint32_t n, uint32_t n_logits,
                      float *logits)
{
    const sh_model *model = ctx->model;
    const sh_model_config *c = &model->config;
    const sh_matrix *embd = &model->token_embd, *output = &model->output;
    const size_t row_bytes = sh_type_row_bytes(embd->type, embd->in);
    for (uint32_t i = 0; i < n; i++)
        sh_row_dequantize(embd->type, (const uint8_t *)embd->data + (size_t)tokens[i] * row_bytes,
                          ctx->x + (size_t)i * c->width, c->width);
    trace(ctx, SH_STAGE_EMBEDDING, 0, ctx->x, n);
    for (uint32_t layer = 0; layer < c->n_layers; layer++)
        run_layer(ctx, layer, n, layer + 1 < c->n_layers ? 0 : n - n_logits);
    if (n_logits > 0) {
        normalize(ctx, ctx->x + (size_t)(n - n_logits) * c->width, model->output_norm, n_logits,
                  ctx->norm);
        trace(ctx, SH_STAGE_FINAL_NORM, c->n_layers, ctx->norm, n_logits);
        sh_matmul(output->type, output->data, output->out, output->in, ctx->norm, n_logits, logits,
                  ctx->scratch);
    }
    ctx->length += n;
}

sh_status sh_context_decode(sh_context *context, const int32_t *tokens, uint32_t n,
                            int logits_wanted, float *logits, sh_error *err)
{
    const sh_model_config *c = &context->model->config;
    if (n == 0)
        return sh_fail(err, SH_ERR_INVALID, "no tokens to decode");
    if (n > context->n_max - context->length)
        return sh_fail(err, SH_ERR_LIMIT, "%u tokens do not fit: %u of %u places are taken", n,
                       context->length, context->n_max);
    for (uint32_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= c->vocab)
            return sh_fail(err, SH_ERR_INVALID, "token %d is not in the vocabulary of %u",
                           tokens[i], c->vocab);
    SH_ASSERT(logits_wanted == SH_LOGITS_NONE || logits != NULL);
    for (uint32_t done = 0; done < n;) {
        const uint32_t batch = SH_MIN(context->batch_max, n - done);
        uint32_t n_logits = 0;
        if (logits_wanted == SH_LOGITS_ALL)
            n_logits = batch;
        else if (logits_wanted == SH_LOGITS_LAST && done + batch == n)
            n_logits = 1;
        run_batch(context, tokens + done, batch, n_logits, logits);
        if (logits_wanted == SH_LOGITS_ALL)
            logits += (size_t)batch * c->vocab;
        done += batch;
    }
    return SH_OK;
}
