/*
 * sh_model_open: from GGUF metadata and tensors to a checked sh_model. Everything that the forward
 * pass relies on (shapes, whole blocks, divisibility) is proved here, so that it need not look
 * again. A key or tensor that would change the result and that we do not compute is refused by
 * name: a wrong answer is worse than none.
 */
#include "shared/model/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/blame.h"

#define WIDTH_MAX 65536u
#define FFN_MAX   (1u << 20)
#define HEADS_MAX 1024u
#define VOCAB_MAX (1u << 20)

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

/* sh_model is embedded first, so that sh_model_close finds the names again. */
typedef struct {
    sh_model model;
    char (*names)[SH_GGUF_NAME_MAX];
} model_block;

static sh_status get_u32(const sh_gguf *gguf, const char *key, uint32_t max, uint32_t *out,
                         sh_error *err)
{
    uint64_t v;
    SH_TRY(sh_gguf_get_u64(gguf, key, &v, err));
    if (v == 0 || v > max)
        return sh_fail(err, SH_ERR_INVALID, "%s is %" PRIu64 ", not in 1..%" PRIu32, key, v, max);
    *out = (uint32_t)v;
    return SH_OK;
}

/* Leaves *out as it is when the key is absent. */
static sh_status get_u32_optional(const sh_gguf *gguf, const char *key, uint32_t max, uint32_t *out,
                                  sh_error *err)
{
    uint64_t v;
    sh_error local = {0};
    sh_status status = sh_gguf_get_u64(gguf, key, &v, &local);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    return get_u32(gguf, key, max, out, err);
}

static sh_status get_f32_optional(const sh_gguf *gguf, const char *key, float *out, sh_error *err)
{
    double v;
    sh_error local = {0};
    sh_status status = sh_gguf_get_f64(gguf, key, &v, &local);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    if (status != SH_OK)
        return sh_fail(err, status, "%s", local.text);
    if (!(v > 0) || !isfinite(v) || !isfinite((float)v))
        return sh_fail(err, SH_ERR_INVALID, "%s is %g, not a positive number", key, v);
    *out = (float)v;
    return SH_OK;
}

/* Keys that change what the model computes, and that we have no code for. */
static sh_status refuse_unsupported_keys(const sh_gguf *gguf, sh_error *err)
{
    static const char *const must_be_zero[] = {"llama.expert_count", "llama.expert_used_count"};
    for (size_t i = 0; i < SH_COUNT(must_be_zero); i++) {
        uint64_t v;
        if (sh_gguf_get_u64(gguf, must_be_zero[i], &v, NULL) == SH_OK && v != 0)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s is %" PRIu64 ": mixtures of experts are not supported",
                           must_be_zero[i], v);
    }
    const char *text;
    size_t n;
    sh_status status = sh_gguf_get_string(gguf, "llama.rope.scaling.type", &text, &n, NULL);
    if (status != SH_ERR_NOT_FOUND &&
        (status != SH_OK || n != strlen("none") || memcmp(text, "none", n) != 0))
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "llama.rope.scaling.type is '%.*s': only 'none' is supported",
                       status == SH_OK ? (int)SH_MIN(n, 32) : 1, status == SH_OK ? text : "?");
    static const char *const must_be_one[] = {"llama.rope.scale_linear",
                                              "llama.rope.scaling.factor"};
    for (size_t i = 0; i < SH_COUNT(must_be_one); i++) {
        double v;
        status = sh_gguf_get_f64(gguf, must_be_one[i], &v, NULL);
        if (status == SH_OK && v != 1.0 && v != 0.0)
            return sh_fail(err, SH_ERR_UNSUPPORTED, "%s is %g: RoPE scaling is not supported",
                           must_be_one[i], v);
    }
    bool causal;
    if (sh_gguf_get_bool(gguf, "llama.attention.causal", &causal, NULL) == SH_OK && !causal)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "llama.attention.causal is false: only causal models are supported");
    return SH_OK;
}

static bool string_is(const char *text, size_t n, const char *expected)
{
    return n == strlen(expected) && memcmp(text, expected, n) == 0;
}

static sh_status check_architecture(const sh_gguf *gguf, sh_error *err)
{
    const char *text;
    size_t n;
    if (sh_gguf_get_string(gguf, "general.type", &text, &n, NULL) == SH_OK &&
        string_is(text, n, "adapter"))
        return sh_fail(err, SH_ERR_MISMATCH, "it is an adapter, not a model");
    SH_TRY(sh_gguf_get_string(gguf, "general.architecture", &text, &n, err));
    if (!string_is(text, n, "llama"))
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "architecture '%.*s' is not supported (only 'llama' is)", (int)SH_MIN(n, 64),
                       text);
    return SH_OK;
}

static sh_status read_config(const sh_gguf *gguf, sh_model_config *out, sh_error *err)
{
    sh_model_config c = {.rope_base = 10000.0f, .norm_eps = 0};
    SH_TRY(check_architecture(gguf, err));
    SH_TRY(refuse_unsupported_keys(gguf, err));
    SH_TRY(get_u32(gguf, "llama.block_count", SH_MODEL_LAYERS_MAX, &c.n_layers, err));
    SH_TRY(get_u32(gguf, "llama.embedding_length", WIDTH_MAX, &c.width, err));
    SH_TRY(get_u32(gguf, "llama.feed_forward_length", FFN_MAX, &c.ffn, err));
    SH_TRY(get_u32(gguf, "llama.attention.head_count", HEADS_MAX, &c.n_heads, err));
    SH_TRY(get_u32(gguf, "llama.context_length", UINT32_MAX, &c.context, err));
    c.context = SH_MIN(c.context, SH_CONTEXT_MAX); /* a longer one is used up to our limit */
    c.n_kv_heads = c.n_heads;
    SH_TRY(get_u32_optional(gguf, "llama.attention.head_count_kv", HEADS_MAX, &c.n_kv_heads, err));
    if (c.n_heads % c.n_kv_heads != 0)
        return sh_fail(err, SH_ERR_INVALID, "%u heads are not a multiple of %u key-value heads",
                       c.n_heads, c.n_kv_heads);
    c.head_size = c.width / c.n_heads;
    uint32_t key_length = 0;
    SH_TRY(get_u32_optional(gguf, "llama.attention.key_length", WIDTH_MAX, &key_length, err));
    if (key_length == 0 && c.width % c.n_heads != 0)
        return sh_fail(err, SH_ERR_INVALID, "width %u is not a multiple of %u heads", c.width,
                       c.n_heads);
    if (key_length != 0)
        c.head_size = key_length;
    uint32_t value_length = c.head_size, rope_dims = c.head_size;
    SH_TRY(get_u32_optional(gguf, "llama.attention.value_length", WIDTH_MAX, &value_length, err));
    SH_TRY(get_u32_optional(gguf, "llama.rope.dimension_count", WIDTH_MAX, &rope_dims, err));
    if (value_length != c.head_size || rope_dims != c.head_size)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "head size %u with values of %u and RoPE over %u is not supported (they "
                       "must be equal)",
                       c.head_size, value_length, rope_dims);
    if (c.head_size % 2 != 0 || (uint64_t)c.head_size * c.n_heads > WIDTH_MAX)
        return sh_fail(err, SH_ERR_INVALID, "head size %u (%u heads) is odd or too large",
                       c.head_size, c.n_heads);
    SH_TRY(get_f32_optional(gguf, "llama.attention.layer_norm_rms_epsilon", &c.norm_eps, err));
    if (c.norm_eps == 0)
        return sh_fail(err, SH_ERR_INVALID, "llama.attention.layer_norm_rms_epsilon is missing");
    SH_TRY(get_f32_optional(gguf, "llama.rope.freq_base", &c.rope_base, err));
    *out = c;
    return SH_OK;
}

static sh_status find_tensor(loader *l, const char *name, const sh_gguf_tensor **out, sh_error *err)
{
    char full[SH_GGUF_NAME_MAX + 8];
    snprintf(full, sizeof full, "%s.weight", name);
    const sh_gguf_tensor *t = sh_gguf_tensor_find(l->gguf, full);
    if (t == NULL)
        return sh_fail(err, SH_ERR_INVALID, "tensor %s is missing", full);
    *out = t;
    return SH_OK;
}

static sh_status load_matrix(loader *l, const char *name, uint32_t out, uint32_t in, sh_matrix *m,
                             sh_error *err)
{
    const sh_gguf_tensor *t = NULL;
    SH_TRY(find_tensor(l, name, &t, err));
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

static sh_status load_norm(loader *l, const char *name, uint32_t n, const float **out,
                           sh_error *err)
{
    const sh_gguf_tensor *t = NULL;
    SH_TRY(find_tensor(l, name, &t, err));
    if (t->type != SH_TYPE_F32)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "tensor %s is not F32", t->name);
    if (t->n_dims != 1 || t->ne[0] != n)
        return sh_fail(err, SH_ERR_INVALID, "tensor %s has %" PRIu64 " values, not %u", t->name,
                       t->ne[0], n);
    *out = t->data;
    l->n_used++;
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
    snprintf(name, sizeof name, "blk.%u.attn_norm", i);
    SH_TRY(load_norm(l, name, c->width, &layer->attn_norm, err));
    snprintf(name, sizeof name, "blk.%u.ffn_norm", i);
    return load_norm(l, name, c->width, &layer->ffn_norm, err);
}

static bool is_known_tensor(const sh_model *model, const char *name)
{
    static const char *const globals[] = {"token_embd.weight", "output.weight",
                                          "output_norm.weight"};
    for (size_t i = 0; i < SH_COUNT(globals); i++)
        if (strcmp(name, globals[i]) == 0)
            return true;
    unsigned layer;
    char part[SH_GGUF_NAME_MAX];
    if (sscanf(name, "blk.%u.%63s", &layer, part) != 2 || layer >= model->config.n_layers)
        return false;
    if (strcmp(part, "attn_norm.weight") == 0 || strcmp(part, "ffn_norm.weight") == 0)
        return true;
    for (int m = 0; m < SH_LAYER_MATRICES; m++) {
        size_t n = strlen(sh_layer_matrix_names[m]);
        if (strncmp(part, sh_layer_matrix_names[m], n) == 0 && strcmp(part + n, ".weight") == 0)
            return true;
    }
    return false;
}

/* A tensor that we would not use (a bias, RoPE factors, experts) means another computation. */
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

static sh_status load_tensors(loader *l, sh_error *err)
{
    sh_model *model = l->model;
    sh_model_config *c = &model->config;
    c->vocab = sh_tokenizer_size(model->tokenizer);
    if (c->vocab > VOCAB_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a vocabulary of %u tokens is over the limit of %u",
                       c->vocab, VOCAB_MAX);
    uint32_t stated = c->vocab;
    SH_TRY(get_u32_optional(l->gguf, "llama.vocab_size", UINT32_MAX, &stated, err));
    if (stated != c->vocab)
        return sh_fail(err, SH_ERR_INVALID, "llama.vocab_size is %u, but the tokenizer has %u",
                       stated, c->vocab);
    SH_TRY(load_matrix(l, "token_embd", c->vocab, c->width, &model->token_embd, err));
    SH_TRY(load_norm(l, "output_norm", c->width, &model->output_norm, err));
    c->tied_output = sh_gguf_tensor_find(l->gguf, "output.weight") == NULL;
    if (c->tied_output)
        model->output = model->token_embd;
    else
        SH_TRY(load_matrix(l, "output", c->vocab, c->width, &model->output, err));
    for (uint32_t i = 0; i < c->n_layers; i++)
        SH_TRY(load_layer(l, i, err));
    return refuse_other_tensors(l, err);
}

sh_status sh_model_open(const char *path, sh_model **out, sh_error *err)
{
    sh_status status;
    model_block *block = sh_calloc(1, sizeof *block);
    if (block == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", path);
    sh_model *model = &block->model;
    loader l = {.model = model};

    SH_GOTO(sh_gguf_open(path, &model->gguf, err)); /* names the path itself */
    l.gguf = model->gguf;
    SH_GOTO(read_config(model->gguf, &model->config, err));
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
    SH_GOTO(sh_sha256_file(path, &model->sha256, &model->file_bytes, err));
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
    model_block *block = (model_block *)*model;
    sh_tokenizer_destroy(&block->model.tokenizer);
    sh_gguf_close(&block->model.gguf);
    free(block->model.layers);
    free(block->names);
    free(block);
    *model = NULL;
}
