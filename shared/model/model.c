/*
 * sh_model_open: from GGUF metadata and tensors to a checked sh_model. Everything that the forward
 * pass relies on (shapes, whole blocks, divisibility) is proved here, so that it need not look
 * again; nothing reads the matrices themselves (sh_model_pack does). A tensor that we would not use
 * is refused by name: it means another computation.
 */
#include "shared/model/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/math/pack.h"
#include "shared/model/blame.h"
#include "shared/model/finite.h"
#include "shared/model/model_internal.h"

const char *const sh_layer_matrix_names[SH_LAYER_MATRICES] = {
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
};

/* The model while it is being opened, with the storage behind its names. */
typedef struct {
    sh_model *model;
    const sh_gguf *gguf;
    char (*names)[SH_GGUF_NAME_MAX]; /* one a matrix */
    size_t n_names, n_used;          /* tensors of the file that we know what to do with */
} loader;

static sh_status find_tensor(loader *l, const char *full, const sh_gguf_tensor **out, sh_error *err)
{
    const sh_gguf_tensor *t = sh_gguf_tensor_find(l->gguf, full);
    if (t == NULL)
        return sh_fail(err, SH_ERR_INVALID, "tensor %s is missing", full);
    *out = t;
    return SH_OK;
}

static sh_status load_matrix(loader *l, const char *name, uint32_t out, uint32_t in, sh_matrix *m,
                             sh_error *err)
{
    char full[SH_GGUF_NAME_MAX + 8];
    const sh_gguf_tensor *t = NULL;
    snprintf(full, sizeof full, "%s.weight", name);
    SH_TRY(find_tensor(l, full, &t, err));
    if (t->n_dims != 2 || t->ne[0] != in || t->ne[1] != out)
        return sh_fail(err, SH_ERR_INVALID,
                       "tensor %s is %" PRIu64 " x %" PRIu64 " (%u dimensions), not %u x %u",
                       t->name, t->ne[1], t->ne[0], t->n_dims, out, in);
    size_t row = sh_type_row_bytes(t->type, in);
    if (row == 0 || t->bytes != (uint64_t)row * out)
        return sh_fail(err, SH_ERR_INVALID, "tensor %s: rows of %u values are no whole blocks",
                       t->name, in);
    char *kept = l->names[l->n_names++];
    snprintf(kept, SH_GGUF_NAME_MAX, "%s", name);
    *m = (sh_matrix){.type = t->type, .out = out, .in = in, .data = t->data, .name = kept};
    l->n_used++;
    return SH_OK;
}

/* full: with ".weight" or ".bias". */
static sh_status load_vector(loader *l, const char *full, uint32_t n, const float **out,
                             sh_error *err)
{
    const sh_gguf_tensor *t = NULL;
    SH_TRY(find_tensor(l, full, &t, err));
    if (t->type != SH_TYPE_F32)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "tensor %s is not F32", t->name);
    if (t->n_dims != 1 || t->ne[0] != n)
        return sh_fail(err, SH_ERR_INVALID, "tensor %s has %" PRIu64 " values, not %u", t->name,
                       t->ne[0], n);
    if (!sh_row_is_finite(SH_TYPE_F32, t->data, n))
        return sh_fail(err, SH_ERR_INVALID, "tensor %s holds a NaN or an infinity", t->name);
    *out = t->data;
    l->n_used++;
    return SH_OK;
}

static sh_status load_layer_vector(loader *l, uint32_t layer, const char *part, uint32_t n,
                                   const float **out, sh_error *err)
{
    char full[SH_GGUF_NAME_MAX];
    snprintf(full, sizeof full, "blk.%u.%s", layer, part);
    return load_vector(l, full, n, out, err);
}

/* Biases of q, k and v: qwen2 has them, llama may. */
static sh_status load_biases(loader *l, uint32_t i, sh_error *err)
{
    sh_layer *layer = &l->model->layers[i];
    const sh_arch arch = l->model->config.arch;
    if (arch == SH_ARCH_QWEN3)
        return SH_OK;
    for (int m = SH_ATTN_Q; m <= SH_ATTN_V; m++) {
        char full[SH_GGUF_NAME_MAX];
        snprintf(full, sizeof full, "blk.%u.%s.bias", i, sh_layer_matrix_names[m]);
        if (arch == SH_ARCH_LLAMA && sh_gguf_tensor_find(l->gguf, full) == NULL)
            continue;
        SH_TRY(load_vector(l, full, layer->m[m].out, &layer->bias[m], err));
    }
    return SH_OK;
}

static sh_status load_layer(loader *l, uint32_t i, sh_error *err)
{
    const sh_model_config *c = &l->model->config;
    sh_layer *layer = &l->model->layers[i];
    const uint32_t q = c->n_heads * c->head_size, kv = c->n_kv_heads * c->head_size;
    const uint32_t shapes[SH_LAYER_MATRICES][2] = {
        {q, c->width},      {kv, c->width},     {kv, c->width},    {c->width, q},
        {c->ffn, c->width}, {c->ffn, c->width}, {c->width, c->ffn}};
    char name[SH_GGUF_NAME_MAX];
    for (int m = 0; m < SH_LAYER_MATRICES; m++) {
        snprintf(name, sizeof name, "blk.%u.%s", i, sh_layer_matrix_names[m]);
        SH_TRY(load_matrix(l, name, shapes[m][0], shapes[m][1], &layer->m[m], err));
    }
    SH_TRY(load_layer_vector(l, i, "attn_norm.weight", c->width, &layer->attn_norm, err));
    SH_TRY(load_layer_vector(l, i, "ffn_norm.weight", c->width, &layer->ffn_norm, err));
    if (c->arch == SH_ARCH_QWEN3) {
        SH_TRY(load_layer_vector(l, i, "attn_q_norm.weight", c->head_size, &layer->q_norm, err));
        SH_TRY(load_layer_vector(l, i, "attn_k_norm.weight", c->head_size, &layer->k_norm, err));
    }
    return load_biases(l, i, err);
}

/* Whether load_layer, or load_tensors, has a use for this tensor. */
static bool is_known_tensor(const sh_model *model, const char *name)
{
    static const char *const globals[] = {"token_embd.weight", "output.weight",
                                          "output_norm.weight", "rope_freqs.weight"};
    const sh_arch arch = model->config.arch;
    for (size_t i = 0; i < SH_COUNT(globals); i++)
        if (strcmp(name, globals[i]) == 0)
            return i < 3 || arch == SH_ARCH_LLAMA;
    unsigned layer;
    char part[SH_GGUF_NAME_MAX];
    if (sscanf(name, "blk.%u.%63s", &layer, part) != 2 || layer >= model->config.n_layers)
        return false;
    if (strcmp(part, "attn_norm.weight") == 0 || strcmp(part, "ffn_norm.weight") == 0)
        return true;
    if (strcmp(part, "attn_q_norm.weight") == 0 || strcmp(part, "attn_k_norm.weight") == 0)
        return arch == SH_ARCH_QWEN3;
    for (int m = 0; m < SH_LAYER_MATRICES; m++) {
        size_t n = strlen(sh_layer_matrix_names[m]);
        if (strncmp(part, sh_layer_matrix_names[m], n) != 0)
            continue;
        if (strcmp(part + n, ".weight") == 0)
            return true;
        if (strcmp(part + n, ".bias") == 0)
            return m <= SH_ATTN_V && arch != SH_ARCH_QWEN3;
    }
    return false;
}

static sh_status refuse_other_tensors(const loader *l, sh_error *err)
{
    size_t n = sh_gguf_n_tensors(l->gguf);
    if (n == l->n_used)
        return SH_OK;
    for (size_t i = 0; i < n; i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(l->gguf, i);
        if (!is_known_tensor(l->model, t->name))
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "tensor %s is none that this architecture is known to have", t->name);
    }
    return SH_OK;
}

/* The vocabulary of the model is the embedding's rows: files pad it past the tokenizer's tokens. */
static sh_status load_embedding(loader *l, sh_error *err)
{
    sh_model *model = l->model;
    sh_model_config *c = &model->config;
    const uint32_t n_tokens = sh_tokenizer_size(model->tokenizer);
    const sh_gguf_tensor *t = NULL;
    SH_TRY(find_tensor(l, "token_embd.weight", &t, err));
    if (t->ne[1] > SH_VOCAB_MAX)
        return sh_fail(err, SH_ERR_LIMIT,
                       "a vocabulary of %" PRIu64 " tokens is over the limit of %u", t->ne[1],
                       SH_VOCAB_MAX);
    if (t->ne[1] < n_tokens)
        return sh_fail(err, SH_ERR_INVALID,
                       "tensor token_embd.weight has %" PRIu64
                       " rows, but the tokenizer has %u tokens",
                       t->ne[1], n_tokens);
    c->vocab = (uint32_t)t->ne[1];
    uint32_t stated = c->vocab;
    SH_TRY(sh_model_read_vocab_size(l->gguf, c, &stated, err));
    if (stated != c->vocab && stated != n_tokens)
        return sh_fail(err, SH_ERR_INVALID,
                       "vocab_size is %u, but token_embd.weight has %u rows and the tokenizer %u "
                       "tokens",
                       stated, c->vocab, n_tokens);
    return load_matrix(l, "token_embd", c->vocab, c->width, &model->token_embd, err);
}

static sh_status load_rope(loader *l, sh_error *err)
{
    sh_model *model = l->model;
    const uint32_t n = model->config.head_size / 2;
    const float *factors = NULL;
    if (model->config.arch == SH_ARCH_LLAMA &&
        sh_gguf_tensor_find(l->gguf, "rope_freqs.weight") != NULL)
        SH_TRY(load_vector(l, "rope_freqs.weight", n, &factors, err));
    for (uint32_t j = 0; factors != NULL && j < n; j++)
        if (!(factors[j] > 0) || !isfinite(factors[j]))
            return sh_fail(err, SH_ERR_INVALID,
                           "tensor rope_freqs.weight: factor %u is %g, not a positive number", j,
                           (double)factors[j]);
    model->rope_factors = factors != NULL;
    return sh_model_resolve_rope(model, factors, err);
}

static sh_status load_tensors(loader *l, sh_error *err)
{
    sh_model *model = l->model;
    sh_model_config *c = &model->config;
    SH_TRY(load_embedding(l, err));
    SH_TRY(load_vector(l, "output_norm.weight", c->width, &model->output_norm, err));
    c->tied_output = sh_gguf_tensor_find(l->gguf, "output.weight") == NULL;
    if (c->tied_output)
        model->output = model->token_embd;
    else
        SH_TRY(load_matrix(l, "output", c->vocab, c->width, &model->output, err));
    SH_TRY(load_rope(l, err));
    for (uint32_t i = 0; i < c->n_layers; i++)
        SH_TRY(load_layer(l, i, err));
    return refuse_other_tensors(l, err);
}

sh_status sh_model_open(const char *path, sh_model **out, sh_error *err)
{
    sh_status status;
    sh_model_block *block = sh_calloc(1, sizeof *block);
    if (block == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", path);
    sh_model *model = &block->model;
    loader l = {.model = model};

    sh_model_identify(path, &block->file);
    SH_GOTO(sh_gguf_open(path, &model->gguf, err)); /* names the path itself */
    l.gguf = model->gguf;
    SH_GOTO(sh_model_read_config(model->gguf, &model->config, err));
    SH_GOTO(sh_tokenizer_load(model->gguf, &model->tokenizer, err));
    const uint32_t n_layers = model->config.n_layers;
    model->layers = sh_calloc(n_layers, sizeof *model->layers);
    block->names = sh_calloc((size_t)n_layers * SH_LAYER_MATRICES + 2, sizeof *block->names);
    l.names = block->names;
    if (model->layers == NULL || block->names == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    SH_GOTO(load_tensors(&l, err));
    size_t bytes;
    (void)sh_gguf_bytes(model->gguf, &bytes);
    model->file_bytes = bytes;
    *out = model;
    block = NULL;

cleanup:
    if (status != SH_OK && model->gguf != NULL)
        sh_blame_file(model->gguf, err);
    if (block != NULL)
        sh_model_close(&model);
    return status;
}

void sh_model_close(sh_model **model)
{
    if (*model == NULL)
        return;
    sh_model_block *block = (sh_model_block *)*model;
    sh_packed_release(&block->model.pack);
    sh_tokenizer_destroy(&block->model.tokenizer);
    sh_gguf_close(&block->model.gguf);
    free(block->model.layers);
    free(block->model.rope_frequency);
    free(block->names);
    free(block);
    *model = NULL;
}

sh_hash sh_model_hash(const sh_model *model)
{
    size_t n;
    const uint8_t *bytes = sh_gguf_bytes(model->gguf, &n);
    return sh_sha256(bytes, n);
}

void sh_matrix_row(const sh_matrix *m, uint32_t row, float *values)
{
    SH_ASSERT(row < m->out);
    if (m->packed != NULL) {
        sh_packed_row(m->type, m->packed, m->in, row, values);
        return;
    }
    const size_t bytes = sh_type_row_bytes(m->type, m->in);
    sh_row_dequantize(m->type, (const uint8_t *)m->data + row * bytes, values, m->in);
}
