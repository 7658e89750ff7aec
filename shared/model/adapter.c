/*
 * LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in llama.cpp's GGUF form:
 *
 *   general.type = "adapter", general.architecture = the base's, adapter.type = "lora",
 *   adapter.lora.alpha (f32)
 *   shoal.base.sha256: of the base's file, in hexadecimal; only where it is known
 *   blk.<layer>.<matrix>.weight.lora_a  ne = {in, rank}: A [rank, in], row-major
 *   blk.<layer>.<matrix>.weight.lora_b  ne = {rank, out}: B [out, rank], row-major
 *   output.weight.lora_a, .lora_b       of the output matrix, if the base's is not tied
 *
 * ΔW = alpha / rank * B·A, each pair with its own rank.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"

#define KEY_BASE "shoal.base.sha256"

void sh_lora_pair_name(uint32_t n_layers, size_t pair, char out[SH_GGUF_NAME_MAX])
{
    if (pair == sh_lora_output_pair(n_layers))
        snprintf(out, SH_GGUF_NAME_MAX, "output");
    else
        snprintf(out, SH_GGUF_NAME_MAX, "blk.%zu.%s", pair / SH_LAYER_MATRICES,
                 sh_layer_matrix_names[pair % SH_LAYER_MATRICES]);
}

const sh_matrix *sh_lora_pair_matrix(const sh_model *model, size_t pair)
{
    return pair == sh_lora_output_pair(model->config.n_layers)
               ? &model->output
               : &model->layers[pair / SH_LAYER_MATRICES].m[pair % SH_LAYER_MATRICES];
}

sh_status sh_adapter_check_base(const sh_adapter *adapter, const sh_model *model, const char *name,
                                sh_error *err)
{
    char wanted[SH_HASH_HEX_BYTES], found[SH_HASH_HEX_BYTES];
    if (sh_hash_is_zero(&adapter->base))
        return SH_OK;
    const sh_hash hash = sh_model_hash(model);
    if (sh_hash_equal(&hash, &adapter->base))
        return SH_OK;
    sh_hex(adapter->base.b, sizeof adapter->base.b, wanted);
    sh_hex(hash.b, sizeof hash.b, found);
    return sh_fail(err, SH_ERR_MISMATCH,
                   "%s is an adapter of another base: of the file with SHA-256 %.16s..., and %s "
                   "has %.16s...",
                   name, wanted, sh_gguf_path(model->gguf), found);
}

sh_status sh_adapter_check_output(const sh_adapter *adapter, const sh_model_config *config,
                                  sh_error *err)
{
    const sh_lora_pair *output = &adapter->pairs[sh_lora_output_pair(adapter->n_layers)];
    if ((output->a != NULL || output->b != NULL) && config->tied_output)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "the adapter changes output.weight, and the model's output is tied to its "
                       "embedding; is it for another base?");
    return SH_OK;
}

/* W [out, in] of a pair's matrix in this model. */
static void pair_shape(const sh_model_config *config, size_t pair, uint32_t *out, uint32_t *in)
{
    uint32_t q = config->n_heads * config->head_size, kv = config->n_kv_heads * config->head_size;
    const uint32_t shapes[SH_LAYER_MATRICES][2] = {
        [SH_ATTN_Q] = {q, config->width},
        [SH_ATTN_K] = {kv, config->width},
        [SH_ATTN_V] = {kv, config->width},
        [SH_ATTN_OUTPUT] = {config->width, q},
        [SH_FFN_GATE] = {config->ffn, config->width},
        [SH_FFN_UP] = {config->ffn, config->width},
        [SH_FFN_DOWN] = {config->width, config->ffn},
    };
    const bool is_output = pair == sh_lora_output_pair(config->n_layers);
    *out = is_output ? config->vocab : shapes[pair % SH_LAYER_MATRICES][0];
    *in = is_output ? config->width : shapes[pair % SH_LAYER_MATRICES][1];
}

void sh_adapter_destroy(sh_adapter **adapter)
{
    sh_adapter *a = *adapter;
    if (a == NULL)
        return;
    for (size_t i = 0; a->pairs != NULL && i < sh_lora_pair_count(a->n_layers); i++) {
        free(a->pairs[i].a);
        free(a->pairs[i].b);
    }
    free(a->pairs);
    free(a);
    *adapter = NULL;
}

sh_status sh_adapter_create_empty(const sh_model_config *config, float alpha, sh_adapter **out,
                                  sh_error *err)
{
    SH_ASSERT(config->n_layers > 0 && config->n_layers <= SH_MODEL_LAYERS_MAX);
    size_t n = sh_lora_pair_count(config->n_layers);
    sh_adapter *a = sh_calloc(1, sizeof *a);
    sh_lora_pair *pairs = sh_calloc(n, sizeof *pairs);
    if (a == NULL || pairs == NULL) {
        free(a);
        free(pairs);
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of %" PRIu32 " layers",
                       config->n_layers);
    }
    for (size_t i = 0; i < n; i++)
        pair_shape(config, i, &pairs[i].out, &pairs[i].in);
    *a = (sh_adapter){
        .arch = config->arch, .n_layers = config->n_layers, .alpha = alpha, .pairs = pairs};
    *out = a;
    return SH_OK;
}

/* The pair's factors; on error it is as before. */
static sh_status make_zeros(sh_lora_pair *pair, uint32_t rank, sh_error *err)
{
    float *a = sh_alloc_aligned((size_t)rank * pair->in * sizeof *a);
    float *b = sh_alloc_aligned((size_t)rank * pair->out * sizeof *b);
    if (a == NULL || b == NULL) {
        free(a);
        free(b);
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of rank %" PRIu32,
                       rank);
    }
    pair->rank = rank;
    pair->a = a;
    pair->b = b;
    return SH_OK;
}

static sh_status check_rank(uint32_t rank, sh_error *err)
{
    if (rank < 1 || rank > SH_ADAPTER_RANK_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "an adapter of rank %" PRIu32 "; 1 to %u are allowed",
                       rank, SH_ADAPTER_RANK_MAX);
    return SH_OK;
}

sh_status sh_adapter_add_output(sh_adapter *adapter, const sh_model_config *config, uint32_t rank,
                                sh_error *err)
{
    sh_lora_pair *pair = &adapter->pairs[sh_lora_output_pair(adapter->n_layers)];
    SH_ASSERT(adapter->n_layers == config->n_layers && pair->in == config->width &&
              pair->out == config->vocab);
    if (config->tied_output)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "output.weight cannot be adapted: this model's output is tied to its "
                       "embedding, token_embd.weight");
    if (pair->a != NULL)
        return sh_fail(err, SH_ERR_INVALID, "output.weight is adapted already");
    SH_TRY(check_rank(rank, err));
    SH_TRY(make_zeros(pair, rank, err));
    adapter->rank = SH_MAX(adapter->rank, rank);
    return SH_OK;
}

sh_status sh_adapter_create(const sh_model_config *config, uint32_t rank, float alpha,
                            sh_adapter **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *a = NULL;
    SH_TRY(check_rank(rank, err));
    SH_GOTO(sh_adapter_create_empty(config, alpha, &a, err));
    a->rank = rank;
    for (size_t i = 0; i < sh_lora_output_pair(a->n_layers); i++)
        SH_GOTO(make_zeros(&a->pairs[i], rank, err));
    *out = a;
    a = NULL;

cleanup:
    sh_adapter_destroy(&a);
    return status;
}

/* ---- from GGUF ---- */

static sh_status need_string(const sh_gguf *g, const char *key, const char *wanted, sh_error *err)
{
    const char *text = NULL;
    size_t n = 0;
    SH_TRY(sh_gguf_get_string(g, key, &text, &n, err));
    if (n != strlen(wanted) || memcmp(text, wanted, n) != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "%s: %s is '%.*s', an adapter needs '%s'",
                       sh_gguf_path(g), key, (int)SH_MIN(n, (size_t)40), text, wanted);
    return SH_OK;
}

/* The adapter's architecture must be the model's. */
static sh_status need_architecture(const sh_gguf *g, sh_arch arch, sh_error *err)
{
    const char *text = NULL, *wanted = sh_arch_name(arch);
    size_t n = 0;
    SH_TRY(sh_gguf_get_string(g, "general.architecture", &text, &n, err));
    if (n != strlen(wanted) || memcmp(text, wanted, n) != 0)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: the adapter is for the architecture '%.*s', the model's is '%s'; is it "
                       "for another base?",
                       sh_gguf_path(g), (int)SH_MIN(n, (size_t)40), text, wanted);
    return SH_OK;
}

/* "blk.<layer>.<matrix>.weight.lora_<a or b>", or "output...", as a pair's index, which is over the
 * last one's where the layer is; false for any other name. Only the one spelling that we write is
 * taken ("blk.01" is not), so that no two names are the same matrix. */
static bool parse_name(const char *name, uint32_t n_layers, size_t *pair, bool *is_b)
{
    static const char *const of_output[] = {"output.weight.lora_a", "output.weight.lora_b"};
    unsigned number;
    char matrix_name[16], side, again[SH_GGUF_NAME_MAX];
    for (size_t i = 0; i < SH_COUNT(of_output); i++) {
        if (strcmp(name, of_output[i]) == 0) {
            *pair = sh_lora_output_pair(n_layers);
            *is_b = i == 1;
            return true;
        }
    }
    if (sscanf(name, "blk.%3u.%15[a-z_].weight.lora_%c", &number, matrix_name, &side) != 3)
        return false;
    snprintf(again, sizeof again, "blk.%u.%s.weight.lora_%c", number, matrix_name, side);
    if (strcmp(again, name) != 0 || (side != 'a' && side != 'b'))
        return false;
    for (size_t i = 0; i < SH_LAYER_MATRICES; i++) {
        if (strcmp(matrix_name, sh_layer_matrix_names[i]) == 0) {
            *pair = number < n_layers ? (size_t)number * SH_LAYER_MATRICES + i : SIZE_MAX;
            *is_b = side == 'b';
            return true;
        }
    }
    return false;
}

/* Reads a tensor of n values as floats; *out is malloc'ed. */
static sh_status read_values(const sh_gguf *g, const sh_gguf_tensor *t, float **out, sh_error *err)
{
    size_t n = t->ne[0] * t->ne[1]; /* checked against the model's shape by the caller */
    float *values = sh_alloc_aligned(n * sizeof *values);
    if (values == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory for '%s'", sh_gguf_path(g),
                       t->name);
    size_t row_bytes = sh_type_row_bytes(t->type, t->ne[0]);
    for (size_t i = 0; i < t->ne[1]; i++)
        sh_row_dequantize(t->type, (const uint8_t *)t->data + i * row_bytes, values + i * t->ne[0],
                          t->ne[0]);
    for (size_t i = 0; i < n; i++) {
        if (!__builtin_isfinite(
                values[i])) { /* one NaN would spread over whatever it is merged into */
            free(values);
            return sh_fail(err, SH_ERR_INVALID, "%s: value %zu of tensor '%s' is not finite",
                           sh_gguf_path(g), i, t->name);
        }
    }
    *out = values;
    return SH_OK;
}

static sh_status read_tensor(const sh_gguf *g, const sh_gguf_tensor *t,
                             const sh_model_config *config, sh_adapter *a, sh_error *err)
{
    size_t index = 0;
    bool is_b = false;
    if (!parse_name(t->name, a->n_layers, &index, &is_b))
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: tensor '%s' is neither of the seven matrices of a layer nor of the "
                       "output matrix, the only ones that an adapter may change",
                       sh_gguf_path(g), t->name);
    if (index >= sh_lora_pair_count(a->n_layers))
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: tensor '%s' is for a model of more than %" PRIu32 " layers",
                       sh_gguf_path(g), t->name, a->n_layers);
    if (index == sh_lora_output_pair(a->n_layers) && config->tied_output)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: tensor '%s' is for a model with an output matrix of its own, and this "
                       "model's is tied to its embedding; is it for another base?",
                       sh_gguf_path(g), t->name);
    sh_lora_pair *pair = &a->pairs[index];
    uint64_t rank = is_b ? t->ne[0] : t->ne[1], side = is_b ? t->ne[1] : t->ne[0];
    uint32_t side_wanted = is_b ? pair->out : pair->in;
    if (t->n_dims > 2 || side != side_wanted)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: tensor '%s' is for a matrix with a side of %" PRIu64
                       ", the model's has %" PRIu32 "; is it for another base?",
                       sh_gguf_path(g), t->name, side, side_wanted);
    if (rank > SH_ADAPTER_RANK_MAX || (pair->rank != 0 && pair->rank != rank))
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: tensor '%s' has rank %" PRIu64 ", its pair %" PRIu32 " (at most %u)",
                       sh_gguf_path(g), t->name, rank, pair->rank, SH_ADAPTER_RANK_MAX);
    pair->rank = (uint32_t)rank;
    a->rank = SH_MAX(a->rank, pair->rank);
    return read_values(g, t, is_b ? &pair->b : &pair->a, err);
}

static sh_status check_pairs(const sh_gguf *g, const sh_adapter *a, sh_error *err)
{
    char name[SH_GGUF_NAME_MAX];
    for (size_t i = 0; i < sh_lora_pair_count(a->n_layers); i++) {
        sh_lora_pair_name(a->n_layers, i, name);
        if ((a->pairs[i].a == NULL) != (a->pairs[i].b == NULL))
            return sh_fail(err, SH_ERR_INVALID, "%s: %s has one of lora_a and lora_b only",
                           sh_gguf_path(g), name);
    }
    if (a->rank == 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: the adapter has no tensors", sh_gguf_path(g));
    return SH_OK;
}

static sh_status read_base(const sh_gguf *g, sh_adapter *a, sh_error *err)
{
    const char *text = NULL;
    char hex[SH_HASH_HEX_BYTES];
    size_t n = 0;
    const sh_status status = sh_gguf_get_string(g, KEY_BASE, &text, &n, NULL);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    snprintf(hex, sizeof hex, "%.*s", (int)SH_MIN(n, sizeof hex - 1), text ? text : "");
    if (status != SH_OK || n != sizeof hex - 1 || sh_hash_parse(hex, &a->base, NULL) != SH_OK)
        return sh_fail(err, SH_ERR_INVALID, "%s: " KEY_BASE " is no SHA-256", sh_gguf_path(g));
    return SH_OK;
}

static sh_status from_gguf(const sh_gguf *g, const sh_model_config *config, sh_adapter **out,
                           sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *a = NULL;
    double alpha = 0;
    const char *text;
    size_t n;
    if (sh_gguf_get_string(g, "general.type", &text, &n, NULL) == SH_ERR_NOT_FOUND)
        return sh_fail(err, SH_ERR_INVALID, "%s: not an adapter: the key 'general.type' is missing",
                       sh_gguf_path(g));
    SH_TRY(need_string(g, "general.type", "adapter", err));
    SH_TRY(need_architecture(g, config->arch, err));
    SH_TRY(need_string(g, "adapter.type", "lora", err));
    SH_TRY(sh_gguf_get_f64(g, "adapter.lora.alpha", &alpha, err));
    if (!__builtin_isfinite((float)alpha))
        return sh_fail(err, SH_ERR_INVALID, "%s: adapter.lora.alpha is not finite",
                       sh_gguf_path(g));
    SH_TRY(sh_adapter_create_empty(config, (float)alpha, &a, err));
    SH_GOTO(read_base(g, a, err));
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++)
        SH_GOTO(read_tensor(g, sh_gguf_tensor_at(g, i), config, a, err));
    SH_GOTO(check_pairs(g, a, err));
    *out = a;
    a = NULL;

cleanup:
    sh_adapter_destroy(&a);
    return status;
}

sh_status sh_adapter_open(const char *path, const sh_model_config *config, sh_adapter **out,
                          sh_error *err)
{
    sh_gguf *g = NULL;
    SH_TRY(sh_gguf_open(path, &g, err));
    sh_status status = from_gguf(g, config, out, err);
    sh_gguf_close(&g);
    return status;
}

sh_status sh_adapter_decode(const void *bytes, size_t n, const char *name,
                            const sh_model_config *config, sh_adapter **out, sh_error *err)
{
    sh_gguf *g = NULL;
    SH_TRY(sh_gguf_open_memory(bytes, n, name, &g, err));
    sh_status status = from_gguf(g, config, out, err);
    sh_gguf_close(&g);
    return status;
}

/* ---- to GGUF ---- */

static sh_status add_pair(sh_gguf_writer *w, const sh_adapter *adapter, size_t i, sh_error *err)
{
    const sh_lora_pair *pair = &adapter->pairs[i];
    char matrix[SH_GGUF_NAME_MAX], name[SH_GGUF_NAME_MAX + 16];
    const uint64_t ne_a[] = {pair->in, pair->rank}, ne_b[] = {pair->rank, pair->out};
    sh_lora_pair_name(adapter->n_layers, i, matrix);
    snprintf(name, sizeof name, "%s.weight.lora_a", matrix);
    SH_TRY(sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, ne_a, 2, pair->a, err));
    snprintf(name, sizeof name, "%s.weight.lora_b", matrix);
    return sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, ne_b, 2, pair->b, err);
}

sh_status sh_adapter_encode(const sh_adapter *adapter, sh_buf *out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_writer *w = NULL;
    char base[SH_HASH_HEX_BYTES];
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.architecture", sh_arch_name(adapter->arch)));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.type", "adapter"));
    SH_GOTO(sh_gguf_writer_set_string(w, "adapter.type", "lora"));
    SH_GOTO(sh_gguf_writer_set_f32(w, "adapter.lora.alpha", adapter->alpha));
    if (!sh_hash_is_zero(&adapter->base)) {
        sh_hex(adapter->base.b, sizeof adapter->base.b, base);
        SH_GOTO(sh_gguf_writer_set_string(w, KEY_BASE, base));
    }
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++)
        if (adapter->pairs[i].a != NULL)
            SH_GOTO(add_pair(w, adapter, i, err));
    SH_GOTO(sh_gguf_writer_encode(w, out, err));

cleanup:
    sh_gguf_writer_destroy(&w);
    return status;
}
