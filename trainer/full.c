/*
 * Full training: every weight in F32, GGUF in and out.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/train.h"

#define PURPOSE_WEIGHTS 0x66756c6cu /* names this use of the generator */
#define INIT_STD        0.02f       /* Radford et al. 2019 (GPT-2), also for the scaled outputs */

struct sh_full {
    tr_net *net;
    float *grad;         /* layout.n; of the last sh_full_gradient, NULL before it */
    const sh_gguf *keys; /* tokenizer and other keys to write */
    sh_gguf *owned;      /* keys, when they are ours to close */
};

static sh_status full_create(const sh_model_config *config, const sh_model *model, sh_full **out,
                             sh_error *err)
{
    sh_status status = SH_OK;
    sh_full *full = sh_calloc(1, sizeof(*full));
    if (!full)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a model to train");
    if (config->context < 2 || config->context > SH_CONTEXT_MAX) {
        status = sh_fail(err, SH_ERR_INVALID, "model shape: a context of %u is not in [2, %d]",
                         config->context, SH_CONTEXT_MAX);
        goto cleanup;
    }
    SH_GOTO(tr_net_create(config, model, UINT64_MAX, config->context, &full->net, err));
    *out = full;
    full = NULL;
cleanup:
    sh_full_destroy(&full);
    return status;
}

void sh_full_destroy(sh_full **full)
{
    if (!*full)
        return;
    tr_net_destroy(&(*full)->net);
    free((*full)->grad);
    sh_gguf_close(&(*full)->owned);
    free(*full);
    *full = NULL;
}

sh_status sh_full_from_model(const sh_model *model, sh_full **out, sh_error *err)
{
    sh_full *full = NULL;
    SH_TRY(full_create(&model->config, model, &full, err));
    full->keys = model->gguf;
    *out = full;
    return SH_OK;
}

static void randomize(tr_net *net, uint64_t seed)
{
    float out_std = INIT_STD / sqrtf(2.0f * (float)net->config.n_layers);
    for (size_t i = 0; i < tr_tensor_count(net); i++) {
        tr_tensor t = tr_tensor_at(net, i);
        const bool is_bias = strstr(t.name, ".bias") != NULL;
        bool to_residual = strstr(t.name, ".attn_output.") || strstr(t.name, ".ffn_down.");
        sh_rng rng;
        sh_rng_init(&rng, seed, i, PURPOSE_WEIGHTS);
        for (size_t j = 0; j < t.rows * t.row; j++)
            net->weights[t.at + j] = is_bias ? 0.0f
                                     : t.is_vector
                                         ? 1.0f
                                         : (to_residual ? out_std : INIT_STD) * sh_rng_normal(&rng);
    }
}

sh_status sh_full_random(const sh_model_config *config, const char *vocab_gguf, uint64_t seed,
                         sh_full **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_full *full = NULL;
    size_t n_tokens = 0;
    SH_GOTO(full_create(config, NULL, &full, err));
    SH_GOTO(sh_gguf_open(vocab_gguf, &full->owned, err));
    full->keys = full->owned;
    SH_GOTO(sh_gguf_get_array_count(full->keys, "tokenizer.ggml.tokens", &n_tokens, err));
    if (n_tokens != config->vocab) {
        status =
            sh_fail(err, SH_ERR_MISMATCH, "model shape: a vocabulary of %u, but %s has %zu tokens",
                    config->vocab, vocab_gguf, n_tokens);
        goto cleanup;
    }
    randomize(full->net, seed);
    *out = full;
    full = NULL;
cleanup:
    sh_full_destroy(&full);
    return status;
}

sh_status sh_full_gradient(sh_full *full, const sh_train_data *data, double *loss, sh_error *err)
{
    SH_TRY(tr_data_check(&full->net->config, data, err));
    if (!full->grad && !(full->grad = sh_alloc_aligned(full->net->layout.n * sizeof(float))))
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for gradients");
    return tr_gradient(full->net, data, TR_GRAD_FULL, full->grad, loss, err);
}

const float *sh_full_grad(const sh_full *full, const char *tensor, size_t *n)
{
    for (size_t i = 0; full->grad && i < tr_tensor_count(full->net); i++) {
        tr_tensor t = tr_tensor_at(full->net, i);
        if (strcmp(t.name, tensor) != 0)
            continue;
        *n = t.rows * t.row;
        return full->grad + t.at;
    }
    return NULL;
}

static sh_status lora_options_refuse(const sh_train_options *o, sh_error *err)
{
    bool any = o->dropout != 0 || o->rslora || o->freeze != SH_FREEZE_NONE || o->alternate != 0;
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++)
        any = any || o->alphas[m] != 0;
    return any ? sh_fail(err, SH_ERR_INVALID,
                         "training options: dropout, rslora, alphas, freeze and alternate are of "
                         "LoRA; full training has none")
               : SH_OK;
}

sh_status sh_full_train(sh_full *full, const sh_train_data *data, const sh_train_options *options,
                        sh_train_result *result, sh_error *err)
{
    tr_net view = *full->net, *teacher = NULL; /* view: the same weights */
    SH_TRY(tr_data_check(&view.config, data, err));
    SH_TRY(lora_options_refuse(options, err));
    SH_TRY(tr_net_quantize(&view, options->quantize_aware, err));
    view.bf16 = options->bf16;
    SH_TRY(tr_teacher_open(options, &view.config, full->keys, data, &teacher, err));
    const sh_status status = tr_train(&(tr_trainee){.net = &view,
                                                    .params = view.weights,
                                                    .mode = TR_GRAD_FULL,
                                                    .teacher = tr_teacher_of(teacher, options)},
                                      data, options, result, err);
    tr_net_destroy(&teacher);
    return status;
}

sh_status sh_full_evaluate(const sh_full *full, const sh_train_data *data,
                           const sh_train_limits *limits, double *mean_nll, sh_error *err)
{
    tr_net view = *full->net;
    const sh_train_limits none = {0}, *l = limits ? limits : &none;
    SH_TRY(tr_data_check(&view.config, data, err));
    SH_TRY(tr_net_quantize(&view, l->quantize_aware, err));
    return tr_evaluate(&view, data, l, mean_nll, err);
}

/* ---- GGUF ---- */

/* A model's own keys. */
static sh_status copy_keys(const sh_full *full, sh_gguf_writer *w, sh_error *err)
{
    static const char *const of_type[] = {"general.file_type", "general.quantization_version",
                                          NULL};
    return sh_gguf_writer_copy_keys(w, full->keys, of_type, err);
}

/* Of a vocabulary's file the tokenizer alone: what else it says is of another model. */
static sh_status copy_tokenizer(const sh_full *full, sh_gguf_writer *w, sh_error *err)
{
    static const char prefix[] = "tokenizer.";
    sh_status status = SH_OK;
    const size_t n = sh_gguf_n_keys(full->keys);
    char **others = sh_calloc(n + 1, sizeof *others);
    sh_buf key, type, value;
    size_t n_others = 0;
    sh_buf_init(&key, SIZE_MAX);
    sh_buf_init(&type, SIZE_MAX);
    sh_buf_init(&value, SIZE_MAX);
    for (size_t i = 0; others && status == SH_OK && i < n; i++) {
        key.len = type.len = value.len = 0;
        status = sh_gguf_key_text(full->keys, i, &key, &type, &value);
        if (status != SH_OK ||
            (key.len >= sizeof prefix - 1 && memcmp(key.data, prefix, sizeof prefix - 1) == 0))
            continue;
        others[n_others] = strndup((const char *)key.data, key.len);
        status = others[n_others++] ? SH_OK : SH_ERR_NO_MEMORY;
    }
    if (!others || status != SH_OK)
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the keys of %zu", n);
    else
        status = sh_gguf_writer_copy_keys(w, full->keys, (const char *const *)others, err);
    for (size_t i = 0; i < n_others; i++)
        free(others[i]);
    free(others);
    sh_buf_release(&key);
    sh_buf_release(&type);
    sh_buf_release(&value);
    return status;
}

static sh_status write_keys(const sh_full *full, sh_type type, sh_gguf_writer *w, sh_error *err)
{
    SH_TRY(sh_gguf_writer_set_type(w, type));
    if (full->net->model)
        return copy_keys(full, w, err);
    SH_TRY(sh_model_config_write(&full->net->config, w, err));
    return copy_tokenizer(full, w, err);
}

/* What a model has beside what is trained: Llama 3's factors of RoPE. */
static sh_status add_factors(const sh_full *full, sh_gguf_writer *w, sh_error *err)
{
    const sh_gguf_tensor *t =
        full->net->model ? sh_gguf_tensor_find(full->keys, "rope_freqs.weight") : NULL;
    return t ? sh_gguf_writer_add_tensor(w, t->name, t->type, t->ne, t->n_dims, t->data, err)
             : SH_OK;
}

/* Encodes tensor t at bytes, which has room, and adds it. */
static sh_status add_tensor(const sh_full *full, const tr_tensor *t, sh_type type, uint8_t *bytes,
                            sh_gguf_writer *w, sh_error *err)
{
    const uint64_t ne[2] = {t->row, t->rows};
    const float *values = full->net->weights + t->at;
    if (t->is_vector)
        return sh_gguf_writer_add_tensor(w, t->name, SH_TYPE_F32, ne, 1, values, err);
    size_t row_bytes = sh_type_row_bytes(type, t->row);
    for (size_t r = 0; r < t->rows; r++)
        sh_row_quantize(type, values + r * t->row, bytes + r * row_bytes, t->row);
    return sh_gguf_writer_add_tensor(w, t->name, type, ne, 2, bytes, err);
}

sh_status sh_full_check_save(const sh_full *full, sh_type type, sh_error *err)
{
    const sh_type_info *info = sh_type_get(type);
    if (!info || !info->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "cannot write weights of type %s",
                       info ? info->name : "unknown");
    if (!full->keys)
        return sh_fail(err, SH_ERR_INVALID, "a model without a GGUF file has no keys to save");
    return tr_rows_check(full->net, type, err);
}

sh_status sh_full_save(const sh_full *full, sh_type type, const char *path, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_writer *w = NULL;
    uint8_t *bytes = NULL;
    size_t total = 0;
    SH_TRY(sh_full_check_save(full, type, err));
    for (size_t i = 0; i < tr_tensor_count(full->net); i++) {
        tr_tensor t = tr_tensor_at(full->net, i);
        total += t.is_vector ? 0 : t.rows * sh_type_row_bytes(type, t.row);
    }
    bytes = sh_alloc_aligned(total);
    if (!bytes) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory to encode %zu bytes of weights", total);
        goto cleanup;
    }
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(write_keys(full, type, w, err));
    SH_GOTO(add_factors(full, w, err));
    total = 0;
    for (size_t i = 0; i < tr_tensor_count(full->net); i++) {
        tr_tensor t = tr_tensor_at(full->net, i);
        SH_GOTO(add_tensor(full, &t, type, bytes + total, w, err));
        total += t.is_vector ? 0 : t.rows * sh_type_row_bytes(type, t.row);
    }
    SH_GOTO(sh_gguf_writer_save(w, path, err));
cleanup:
    sh_gguf_writer_destroy(&w);
    free(bytes);
    return status;
}
