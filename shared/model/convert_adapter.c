/*
 * PEFT's LoRA folders, read and written.
 *
 * PEFT applies scale * B·A with scale = alpha / r, or alpha / sqrt(r) (rsLoRA: Kalajdzievski 2023,
 * arXiv:2312.03732), alpha and r of a module replaced by those of the first key of alpha_pattern
 * and rank_pattern that is the module's name or its end. An sh_adapter has one alpha; where a
 * module's scale is another, the ratio goes into its B. Which modules and layers are adapted is
 * told by the tensors, not by target_modules.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/model/convert_internal.h"
#include "shared/model/safetensors.h"

#define MODULE_BYTES 96
#define CONFIG_FILE  "adapter_config.json"
#define TENSORS_FILE "adapter_model.safetensors"

#define OUTPUT_MODULE "lm_head"
#define BASE_TENSOR   "base_model.model." OUTPUT_MODULE ".base_layer.weight"

/* In the order of SH_ATTN_Q ... */
static const char *const modules[SH_LAYER_MATRICES] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj",
};

typedef struct {
    const char *file; /* of settings, for errors */
    const sh_safetensors *tensors;
    const json_t *ranks, *alphas; /* patterns; may be NULL */
    double alpha;
    uint32_t r;
    bool rslora;
    const sh_model_config *config;
} peft;

/* ---- adapter_config.json ---- */

static bool is_empty(const json_t *value)
{
    return value == NULL || json_is_null(value) || json_is_false(value) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

/* What changes the result and is not computed here. */
static sh_status refuse_settings(const json_t *settings, const char *file, sh_error *err)
{
    static const struct {
        const char *key, *why;
    } refused[] = {
        {"use_dora", "DoRA's magnitudes are not supported"},
        {"modules_to_save", "whole modules beside the adapter are not supported"},
        {"fan_in_fan_out", "transposed matrices are not supported"},
        {"lora_bias", "biases are not supported"},
        {"trainable_token_indices", "changed embeddings are not supported"},
        {"layer_replication", "replicated layers are not supported"},
        {"use_qalora", "QALoRA is not supported"},
        {"alora_invocation_tokens", "adapters that begin within a text are not supported"},
    };
    static const char *const base_changing[] = {"pissa", "olora", "corda", "loftq"};
    const char *type = NULL, *bias = "none", *init = NULL;
    SH_TRY(sh_hf_get_string(settings, file, "peft_type", &type, err));
    if (type == NULL || strcmp(type, "LORA") != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: 'peft_type' is '%.32s', only LORA is supported", file,
                       type != NULL ? type : "(none)");
    SH_TRY(sh_hf_get_string(settings, file, "bias", &bias, err));
    if (strcmp(bias, "none") != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "%s: 'bias' is '%.32s': biases are not supported",
                       file, bias);
    for (size_t i = 0; i < SH_COUNT(refused); i++)
        if (!is_empty(json_object_get(settings, refused[i].key)))
            return sh_fail(err, SH_ERR_UNSUPPORTED, "%s: '%s' is set: %s", file, refused[i].key,
                           refused[i].why);
    init = json_string_value(json_object_get(settings, "init_lora_weights"));
    for (size_t i = 0; init != NULL && i < SH_COUNT(base_changing); i++)
        if (strncmp(init, base_changing[i], strlen(base_changing[i])) == 0)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s: 'init_lora_weights' is '%.32s', which changes the base; convert it "
                           "to a plain adapter with PEFT first",
                           file, init);
    return SH_OK;
}

/* Patterns may be regular expressions; names and ends of names are what people write. */
static sh_status read_pattern(const json_t *settings, const char *file, const char *key,
                              const json_t **out, sh_error *err)
{
    const json_t *pattern = json_object_get(settings, key);
    const char *name;
    json_t *value;
    if (is_empty(pattern))
        return SH_OK;
    if (!json_is_object(pattern))
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is no object", file, key);
    json_object_foreach((json_t *)(uintptr_t)pattern, name, value)
    {
        const char *body = name[0] == '^' ? name + 1 : name;
        if (body[0] == '\0' || strspn(body, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                            "0123456789_.") != strlen(body))
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s: '%s' has '%.64s', a regular expression; only names and ends of "
                           "names are supported",
                           file, key, name);
        if (!json_is_number(value) || !(json_number_value(value) > 0))
            return sh_fail(err, SH_ERR_INVALID, "%s: '%s' of '%s' is no positive number", file,
                           name, key);
    }
    *out = pattern;
    return SH_OK;
}

static sh_status read_settings(const json_t *settings, peft *p, sh_error *err)
{
    SH_TRY(refuse_settings(settings, p->file, err));
    p->r = 8; /* PEFT's defaults */
    p->alpha = 8;
    SH_TRY(sh_hf_get_u32(settings, p->file, "r", SH_ADAPTER_RANK_MAX, &p->r, err));
    SH_TRY(sh_hf_get_real(settings, p->file, "lora_alpha", &p->alpha, err));
    SH_TRY(sh_hf_get_bool(settings, p->file, "use_rslora", &p->rslora, err));
    SH_TRY(read_pattern(settings, p->file, "rank_pattern", &p->ranks, err));
    return read_pattern(settings, p->file, "alpha_pattern", &p->alphas, err);
}

/* The value of the first key that is the module's name, or its end after a dot. */
static double pattern_value(const json_t *pattern, const char *module, double otherwise)
{
    const char *key;
    json_t *value;
    const size_t n = strlen(module);
    json_object_foreach((json_t *)(uintptr_t)pattern, key, value)
    {
        const bool whole = key[0] == '^';
        const char *body = whole ? key + 1 : key;
        const size_t k = strlen(body);
        if (strcmp(body, module) == 0 ||
            (!whole && k < n && module[n - k - 1] == '.' && strcmp(module + n - k, body) == 0))
            return json_number_value(value);
    }
    return otherwise;
}

/* ---- tensors ---- */

static void module_name(uint32_t n_layers, size_t pair, char out[MODULE_BYTES])
{
    if (pair == sh_lora_output_pair(n_layers))
        snprintf(out, MODULE_BYTES, OUTPUT_MODULE);
    else
        snprintf(out, MODULE_BYTES, "model.layers.%zu.%s", pair / SH_LAYER_MATRICES,
                 modules[pair % SH_LAYER_MATRICES]);
}

static void tensor_name(uint32_t n_layers, size_t pair, char side,
                        char out[SH_SAFETENSORS_NAME_MAX])
{
    char module[MODULE_BYTES];
    module_name(n_layers, pair, module);
    snprintf(out, SH_SAFETENSORS_NAME_MAX, "base_model.model.%s.lora_%c.weight", module, side);
}

static bool is_permuted(const sh_model_config *config, size_t pair)
{
    const size_t matrix = pair % SH_LAYER_MATRICES;
    return config->arch == SH_ARCH_LLAMA && pair != sh_lora_output_pair(config->n_layers) &&
           (matrix == SH_ATTN_Q || matrix == SH_ATTN_K);
}

static sh_status check_tensor(const peft *p, const sh_safetensor *t, uint64_t rows,
                              uint64_t columns, sh_error *err)
{
    const char *file = sh_safetensors_path(p->tensors);
    if (!t->is_float)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: the tensor '%s' is %s; F32, F16 and BF16 are supported", file, t->name,
                       t->dtype);
    if (t->n_dims != 2 || t->shape[0] != rows || t->shape[1] != columns)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: the tensor '%s' is %" PRIu64 " x %" PRIu64 " in %u dimensions, %" PRIu64
                       " x %" PRIu64
                       " is expected from the base and the rank; is it for another base?",
                       file, t->name, t->shape[0], t->shape[1], t->n_dims, rows, columns);
    return SH_OK;
}

/* values [rows, columns] times scale, row i from the file's row i or its permuted place. */
static sh_status read_values(const peft *p, const sh_safetensor *t, bool permuted, float scale,
                             float **out, sh_error *err)
{
    const size_t rows = t->shape[0], columns = t->shape[1];
    float *values = sh_alloc_aligned(rows * columns * sizeof *values);
    if (values == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory for '%s'",
                       sh_safetensors_path(p->tensors), t->name);
    for (size_t i = 0; i < rows; i++) {
        const size_t from = permuted ? sh_hf_row((uint32_t)i, p->config->head_size) : i;
        sh_safetensor_floats(t, from * columns, columns, values + i * columns);
    }
    for (size_t i = 0; i < rows * columns; i++) {
        values[i] *= scale;
        if (isfinite(values[i]))
            continue;
        free(values);
        return sh_fail(err, SH_ERR_INVALID, "%s: a value of the tensor '%s' is not finite",
                       sh_safetensors_path(p->tensors), t->name);
    }
    *out = values;
    return SH_OK;
}

static sh_status read_pair(const peft *p, size_t i, sh_adapter *a, size_t *n_read, sh_error *err)
{
    char name_a[SH_SAFETENSORS_NAME_MAX], name_b[SH_SAFETENSORS_NAME_MAX], module[MODULE_BYTES];
    tensor_name(a->n_layers, i, 'A', name_a);
    tensor_name(a->n_layers, i, 'B', name_b);
    module_name(a->n_layers, i, module);
    const sh_safetensor *ta = sh_safetensors_find(p->tensors, name_a);
    const sh_safetensor *tb = sh_safetensors_find(p->tensors, name_b);
    if (ta == NULL && tb == NULL)
        return SH_OK;
    if (ta == NULL || tb == NULL)
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is there and '%s' is missing",
                       sh_safetensors_path(p->tensors), ta == NULL ? name_b : name_a,
                       ta == NULL ? name_a : name_b);
    if (i == sh_lora_output_pair(a->n_layers) && p->config->tied_output)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "%s: the tensor '%s' is for a model with an output matrix of its own, and "
                       "this model's is tied to its embedding; is it for another base?",
                       sh_safetensors_path(p->tensors), name_a);
    sh_lora_pair *pair = &a->pairs[i];
    const double rank = pattern_value(p->ranks, module, p->r);
    const double alpha = pattern_value(p->alphas, module, p->alpha);
    if (rank != floor(rank) || rank > SH_ADAPTER_RANK_MAX)
        return sh_fail(err, SH_ERR_INVALID, "%s: the rank of '%s' is %g, no integer in 1..%u",
                       p->file, module, rank, SH_ADAPTER_RANK_MAX);
    SH_TRY(check_tensor(p, ta, (uint64_t)rank, pair->in, err));
    SH_TRY(check_tensor(p, tb, pair->out, (uint64_t)rank, err));
    const double scale = alpha / (p->rslora ? sqrt(rank) : rank);
    const float share = (float)(scale / ((double)a->alpha / rank)); /* 1 in the plain case */
    pair->rank = (uint32_t)rank;
    a->rank = SH_MAX(a->rank, pair->rank);
    SH_TRY(read_values(p, ta, false, 1, &pair->a, err));
    SH_TRY(read_values(p, tb, is_permuted(p->config, i), share, &pair->b, err));
    *n_read += 2;
    return SH_OK;
}

/* PEFT saves the base's own matrix beside the factors of lm_head; it is not read. */
static sh_status skip_base_layer(const peft *p, const sh_adapter *a, size_t *n_read, sh_error *err)
{
    const sh_lora_pair *output = &a->pairs[sh_lora_output_pair(a->n_layers)];
    const sh_safetensor *t = sh_safetensors_find(p->tensors, BASE_TENSOR);
    if (t == NULL || output->a == NULL)
        return SH_OK;
    *n_read += 1;
    return check_tensor(p, t, output->out, output->in, err);
}

/* Names the first tensor that no pair has. */
static sh_status refuse_unknown(const peft *p, const sh_adapter *a, sh_error *err)
{
    for (size_t i = 0; i < sh_safetensors_count(p->tensors); i++) {
        const char *name = sh_safetensors_at(p->tensors, i)->name;
        uint32_t layer = 0;
        int end = 0;
        if (sscanf(name, "base_model.model.model.layers.%6u.%n", &layer, &end) == 1 && end > 0 &&
            layer >= a->n_layers)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "%s: the tensor '%s' is for a model of more than %u layers; is it for "
                           "another base?",
                           sh_safetensors_path(p->tensors), name, a->n_layers);
        bool known = false;
        const size_t first = (size_t)layer * SH_LAYER_MATRICES;
        for (size_t m = 0; !known && m < 2 * (SH_LAYER_MATRICES + 1); m++) {
            const size_t pair =
                m / 2 < SH_LAYER_MATRICES ? first + m / 2 : sh_lora_output_pair(a->n_layers);
            char wanted[SH_SAFETENSORS_NAME_MAX];
            tensor_name(a->n_layers, pair, m % 2 == 0 ? 'A' : 'B', wanted);
            known = strcmp(name, wanted) == 0;
        }
        if (!known)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s: the tensor '%s' is no LoRA factor of the seven matrices of a "
                           "layer or of the output matrix, the only ones that are supported",
                           sh_safetensors_path(p->tensors), name);
    }
    return sh_fail(err, SH_ERR_INVALID, "%s: the adapter has no tensors",
                   sh_safetensors_path(p->tensors));
}

sh_status sh_peft_decode(const json_t *settings, const char *settings_name,
                         const sh_safetensors *tensors, const sh_model_config *config,
                         sh_adapter **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *a = NULL;
    size_t n_read = 0;
    peft p = {.file = settings_name, .tensors = tensors, .config = config};
    SH_TRY(read_settings(settings, &p, err));
    const double alpha = p.rslora ? p.alpha * sqrt((double)p.r) : p.alpha;
    SH_GOTO(sh_adapter_create_empty(config, (float)alpha, &a, err));
    for (size_t i = 0; i < sh_lora_pair_count(a->n_layers); i++)
        SH_GOTO(read_pair(&p, i, a, &n_read, err));
    SH_GOTO(skip_base_layer(&p, a, &n_read, err));
    if (n_read == 0 || n_read != sh_safetensors_count(tensors))
        SH_GOTO(refuse_unknown(&p, a, err));
    *out = a;
    a = NULL;

cleanup:
    sh_adapter_destroy(&a);
    return status;
}

static sh_status open_peft(const char *folder, const sh_model_config *config, sh_adapter **out,
                           sh_error *err)
{
    sh_status status = SH_OK;
    char path[SH_PATH_BYTES], tensors_path[SH_PATH_BYTES];
    json_t *settings = NULL;
    sh_safetensors *tensors = NULL;
    SH_GOTO(sh_path_join(path, sizeof path, folder, CONFIG_FILE, err));
    SH_GOTO(sh_path_join(tensors_path, sizeof tensors_path, folder, TENSORS_FILE, err));
    if (!sh_file_exists(path))
        SH_GOTO(sh_fail(err, SH_ERR_NOT_FOUND,
                        "%s: a folder without " CONFIG_FILE ", so no adapter of PEFT's", folder));
    if (!sh_file_exists(tensors_path))
        SH_GOTO(sh_fail(err, SH_ERR_NOT_FOUND,
                        "%s: " TENSORS_FILE " is missing (a pickled adapter_model.bin is not read; "
                        "save it as safetensors)",
                        folder));
    SH_GOTO(sh_hf_load_settings(path, &settings, err));
    SH_GOTO(sh_safetensors_open(tensors_path, &tensors, err));
    SH_GOTO(sh_peft_decode(settings, path, tensors, config, out, err));

cleanup:
    json_decref(settings);
    sh_safetensors_close(&tensors);
    return status;
}

sh_status sh_adapter_open_any(const char *path, const sh_model_config *config, sh_adapter **out,
                              sh_error *err)
{
    struct stat info;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        return open_peft(path, config, out, err);
    const char *slash = strrchr(path, '/'), *name = slash != NULL ? slash + 1 : path;
    if (strcmp(name, CONFIG_FILE) == 0 || strcmp(name, TENSORS_FILE) == 0)
        return sh_fail(err, SH_ERR_USAGE, "%s: an adapter of PEFT's is named by its folder", path);
    return sh_adapter_open(path, config, out, err);
}

/* ---- to PEFT ---- */

/* Named by the end that all layers share where all have it, else one by one. */
static json_t *target_modules(const sh_adapter *a)
{
    json_t *names = json_array();
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++) {
        uint32_t n = 0;
        for (uint32_t layer = 0; layer < a->n_layers; layer++)
            n += a->pairs[(size_t)layer * SH_LAYER_MATRICES + m].a != NULL;
        if (n == a->n_layers) {
            json_array_append_new(names, json_string(strchr(modules[m], '.') + 1));
            continue;
        }
        for (uint32_t layer = 0; layer < a->n_layers; layer++) {
            char module[MODULE_BYTES];
            const size_t i = (size_t)layer * SH_LAYER_MATRICES + m;
            module_name(a->n_layers, i, module);
            if (a->pairs[i].a != NULL)
                json_array_append_new(names, json_string(module));
        }
    }
    if (a->pairs[sh_lora_output_pair(a->n_layers)].a != NULL)
        json_array_append_new(names, json_string(OUTPUT_MODULE));
    return names;
}

static json_t *make_settings(const sh_adapter *a, const char *base_name)
{
    const double alpha = (double)a->alpha;
    json_t *o = json_object(), *ranks = json_object();
    for (size_t i = 0; i < sh_lora_pair_count(a->n_layers); i++) {
        char module[MODULE_BYTES];
        module_name(a->n_layers, i, module);
        if (a->pairs[i].a != NULL && a->pairs[i].rank != a->rank)
            sh_json_set(ranks, module, json_integer(a->pairs[i].rank));
    }
    sh_json_set(o, "alpha_pattern", json_object());
    sh_json_set(o, "base_model_name_or_path", json_string(base_name));
    sh_json_set(o, "bias", json_string("none"));
    sh_json_set(o, "fan_in_fan_out", json_false());
    sh_json_set(o, "inference_mode", json_true());
    sh_json_set(o, "init_lora_weights", json_true());
    const bool whole = alpha == floor(alpha) && fabs(alpha) < 1e9;
    sh_json_set(o, "lora_alpha", whole ? json_integer((json_int_t)alpha) : json_real(alpha));
    sh_json_set(o, "lora_dropout", json_real(0));
    sh_json_set(o, "modules_to_save", json_null());
    sh_json_set(o, "peft_type", json_string("LORA"));
    sh_json_set(o, "r", json_integer(a->rank));
    sh_json_set(o, "rank_pattern", ranks);
    sh_json_set(o, "target_modules", target_modules(a));
    sh_json_set(o, "task_type", json_string("CAUSAL_LM"));
    sh_json_set(o, "use_dora", json_false());
    sh_json_set(o, "use_rslora", json_false());
    return o;
}

typedef struct {
    sh_safetensor *tensors;
    char (*names)[SH_SAFETENSORS_NAME_MAX];
    float **rows; /* B in Hugging Face's order, where that is another */
    size_t n;
} peft_tensors;

static void release_tensors(peft_tensors *t)
{
    for (size_t i = 0; t->rows != NULL && i < t->n; i++)
        free(t->rows[i]);
    free(t->tensors);
    free(t->names);
    free(t->rows);
}

/* Its name is in place already. */
static void add_tensor(peft_tensors *t, uint64_t rows, uint64_t columns, const float *values)
{
    t->tensors[t->n] = (sh_safetensor){.name = t->names[t->n],
                                       .type = SH_TYPE_F32,
                                       .is_float = true,
                                       .n_dims = 2,
                                       .shape = {rows, columns, 1, 1},
                                       .bytes = rows * columns * sizeof(float),
                                       .data = values};
    t->n++;
}

static sh_status add_pair(peft_tensors *t, const sh_adapter *a, size_t i,
                          const sh_model_config *config, sh_error *err)
{
    const sh_lora_pair *p = &a->pairs[i];
    tensor_name(a->n_layers, i, 'A', t->names[t->n]);
    add_tensor(t, p->rank, p->in, p->a);
    tensor_name(a->n_layers, i, 'B', t->names[t->n]);
    add_tensor(t, p->out, p->rank, p->b);
    if (!is_permuted(config, i))
        return SH_OK;
    float *rows = sh_calloc((size_t)p->out * p->rank, sizeof *rows);
    if (rows == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of rank %u", a->rank);
    for (uint32_t row = 0; row < p->out; row++)
        memcpy(rows + (size_t)sh_hf_row(row, config->head_size) * p->rank,
               p->b + (size_t)row * p->rank, p->rank * sizeof *rows);
    t->tensors[t->n - 1].data = t->rows[t->n - 1] = rows;
    return SH_OK;
}

sh_status sh_adapter_save_peft(const sh_adapter *adapter, const sh_model_config *config,
                               const char *folder, const char *base_name, sh_error *err)
{
    sh_status status = SH_OK;
    char path[SH_PATH_BYTES];
    peft_tensors t = {0};
    json_t *settings = NULL;
    const size_t n_pairs = sh_lora_pair_count(adapter->n_layers);
    SH_ASSERT(adapter->n_layers == config->n_layers);
    SH_TRY(sh_adapter_check_output(adapter, config, err));
    if (!(adapter->alpha > 0))
        return sh_fail(err, SH_ERR_UNSUPPORTED, "an adapter of alpha %g has no form in PEFT",
                       (double)adapter->alpha);
    t.tensors = sh_calloc(2 * n_pairs, sizeof *t.tensors);
    t.names = sh_calloc(2 * n_pairs, sizeof *t.names);
    t.rows = sh_calloc(2 * n_pairs, sizeof *t.rows);
    if (t.tensors == NULL || t.names == NULL || t.rows == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for an adapter of %u layers",
                        adapter->n_layers));
    for (size_t i = 0; i < n_pairs; i++)
        if (adapter->pairs[i].a != NULL)
            SH_GOTO(add_pair(&t, adapter, i, config, err));
    SH_GOTO(sh_dir_make(folder, err));
    SH_GOTO(sh_path_join(path, sizeof path, folder, TENSORS_FILE, err));
    SH_GOTO(sh_safetensors_save(path, t.tensors, t.n, err));
    SH_GOTO(sh_path_join(path, sizeof path, folder, CONFIG_FILE, err));
    settings = make_settings(adapter, base_name);
    SH_GOTO(sh_json_save(path, settings, err));

cleanup:
    json_decref(settings);
    release_tensors(&t);
    return status;
}
