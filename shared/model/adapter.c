/*
 * LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in llama.cpp's GGUF form:
 *
 *   general.type = "adapter", general.architecture = the base's, adapter.type = "lora",
 *   adapter.lora.alpha (f32)
 *   blk.<layer>.<matrix>.weight.lora_a  ne = {in, rank}: A [rank, in], row-major
 *   blk.<layer>.<matrix>.weight.lora_b  ne = {rank, out}: B [out, rank], row-major
 *
 * ΔW = alpha / rank * B·A, each pair with its own rank.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"

/* W [out, in] of a matrix of this model. */
static void matrix_shape(const sh_model_config *config, size_t matrix, uint32_t *out, uint32_t *in)
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
    *out = shapes[matrix][0];
    *in = shapes[matrix][1];
}

void sh_adapter_destroy(sh_adapter **adapter)
{
    sh_adapter *a = *adapter;
    if (a == NULL)
        return;
    for (size_t i = 0; a->pairs != NULL && i < (size_t)a->n_layers * SH_LAYER_MATRICES; i++) {
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
    size_t n = (size_t)config->n_layers * SH_LAYER_MATRICES;
    sh_adapter *a = sh_calloc(1, sizeof *a);
    sh_lora_pair *pairs = sh_calloc(n, sizeof *pairs);
    if (a == NULL || pairs == NULL) {
        free(a);
        free(pairs);
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of %" PRIu32 " layers",
                       config->n_layers);
    }
    for (size_t i = 0; i < n; i++)
        matrix_shape(config, i % SH_LAYER_MATRICES, &pairs[i].out, &pairs[i].in);
    *a = (sh_adapter){
        .arch = config->arch, .n_layers = config->n_layers, .alpha = alpha, .pairs = pairs};
    *out = a;
    return SH_OK;
}

sh_status sh_adapter_create(const sh_model_config *config, uint32_t rank, float alpha,
                            sh_adapter **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *a = NULL;
    if (rank < 1 || rank > SH_ADAPTER_RANK_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "an adapter of rank %" PRIu32 "; 1 to %u are allowed",
                       rank, SH_ADAPTER_RANK_MAX);
    SH_GOTO(sh_adapter_create_empty(config, alpha, &a, err));
    a->rank = rank;
    for (size_t i = 0; i < (size_t)a->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &a->pairs[i];
        pair->rank = rank;
        pair->a = sh_alloc_aligned((size_t)rank * pair->in * sizeof *pair->a);
        pair->b = sh_alloc_aligned((size_t)rank * pair->out * sizeof *pair->b);
        if (pair->a == NULL || pair->b == NULL) {
            status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of rank %" PRIu32,
                             rank);
            goto cleanup;
        }
    }
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

/* "blk.<layer>.<matrix>.weight.lora_<a or b>" apart; false for any other name. Only the one
 * spelling that we write is taken ("blk.01" is not), so that no two names are the same matrix. */
static bool parse_name(const char *name, uint32_t *layer, size_t *matrix, bool *is_b)
{
    unsigned number;
    char matrix_name[16], side, again[SH_GGUF_NAME_MAX];
    if (sscanf(name, "blk.%3u.%15[a-z_].weight.lora_%c", &number, matrix_name, &side) != 3)
        return false;
    snprintf(again, sizeof again, "blk.%u.%s.weight.lora_%c", number, matrix_name, side);
    if (strcmp(again, name) != 0 || (side != 'a' && side != 'b'))
        return false;
    for (size_t i = 0; i < SH_LAYER_MATRICES; i++) {
        if (strcmp(matrix_name, sh_layer_matrix_names[i]) == 0) {
            *layer = number;
            *matrix = i;
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

static sh_status read_tensor(const sh_gguf *g, const sh_gguf_tensor *t, sh_adapter *a,
                             sh_error *err)
{
    uint32_t layer = 0;
    size_t matrix = 0;
    bool is_b = false;
    if (!parse_name(t->name, &layer, &matrix, &is_b))
        return sh_fail(
            err, SH_ERR_UNSUPPORTED,
            "%s: tensor '%s' is none of the seven matrices of a layer, the only ones that "
            "an adapter may change",
            sh_gguf_path(g), t->name);
    if (layer >= a->n_layers)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: tensor '%s' is for a model of more than %" PRIu32 " layers",
                       sh_gguf_path(g), t->name, a->n_layers);
    sh_lora_pair *pair = &a->pairs[(size_t)layer * SH_LAYER_MATRICES + matrix];
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
    for (size_t i = 0; i < (size_t)a->n_layers * SH_LAYER_MATRICES; i++)
        if ((a->pairs[i].a == NULL) != (a->pairs[i].b == NULL))
            return sh_fail(err, SH_ERR_INVALID, "%s: blk.%zu.%s has one of lora_a and lora_b only",
                           sh_gguf_path(g), i / SH_LAYER_MATRICES,
                           sh_layer_matrix_names[i % SH_LAYER_MATRICES]);
    if (a->rank == 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: the adapter has no tensors", sh_gguf_path(g));
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
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++)
        SH_GOTO(read_tensor(g, sh_gguf_tensor_at(g, i), a, err));
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

static sh_status add_pair(sh_gguf_writer *w, const sh_lora_pair *pair, size_t i, sh_error *err)
{
    char name[SH_GGUF_NAME_MAX];
    const uint64_t ne_a[] = {pair->in, pair->rank}, ne_b[] = {pair->rank, pair->out};
    const char *matrix = sh_layer_matrix_names[i % SH_LAYER_MATRICES];
    size_t layer = i / SH_LAYER_MATRICES;
    snprintf(name, sizeof name, "blk.%zu.%s.weight.lora_a", layer, matrix);
    SH_TRY(sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, ne_a, 2, pair->a, err));
    snprintf(name, sizeof name, "blk.%zu.%s.weight.lora_b", layer, matrix);
    return sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, ne_b, 2, pair->b, err);
}

sh_status sh_adapter_encode(const sh_adapter *adapter, sh_buf *out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_writer *w = NULL;
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.architecture", sh_arch_name(adapter->arch)));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.type", "adapter"));
    SH_GOTO(sh_gguf_writer_set_string(w, "adapter.type", "lora"));
    SH_GOTO(sh_gguf_writer_set_f32(w, "adapter.lora.alpha", adapter->alpha));
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++)
        if (adapter->pairs[i].a != NULL)
            SH_GOTO(add_pair(w, &adapter->pairs[i], i, err));
    SH_GOTO(sh_gguf_writer_encode(w, out, err));

cleanup:
    sh_gguf_writer_destroy(&w);
    return status;
}
