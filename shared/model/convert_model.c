/*
 * A Hugging Face folder to GGUF: keys from its JSON files, then every tensor of the model by its
 * name there, converted row by row into the stream, so that memory holds a row and not a model.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/model/convert_internal.h"

#define WHOLE_FILE         "model.safetensors"
#define INDEX_FILE         "model.safetensors.index.json"
#define TEMPLATE_BYTES_MAX (1u << 20)

typedef struct {
    char name[SH_GGUF_NAME_MAX];
    const sh_safetensor *source; /* NULL: rope_freqs */
    const char *file;
    sh_type type;
    uint32_t rows, columns; /* rows 0: a vector */
    bool permuted;
} planned;

typedef struct {
    const char *folder;
    const sh_convert_options *options;
    sh_hf_config config;
    json_t *config_json, *tokenizer, *settings, *index;
    char *template;
    sh_safetensors *shards[SH_CONVERT_SHARDS_MAX];
    char *shard_names[SH_CONVERT_SHARDS_MAX];
    size_t n_shards;
    planned *plan;
    size_t n_plan, cap_plan;
    float *rope_factors;
    sh_gguf_writer *writer;
} conversion;

static void release(conversion *c)
{
    json_decref(c->config_json);
    json_decref(c->tokenizer);
    json_decref(c->settings);
    json_decref(c->index);
    free(c->template);
    for (size_t i = 0; i < c->n_shards; i++) {
        sh_safetensors_close(&c->shards[i]);
        free(c->shard_names[i]);
    }
    free(c->plan);
    free(c->rope_factors);
    sh_gguf_writer_destroy(&c->writer);
}

/* ---- files ---- */

static sh_status open_shard(conversion *c, const char *name, sh_error *err)
{
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < c->n_shards; i++)
        if (strcmp(c->shard_names[i], name) == 0)
            return SH_OK;
    if (c->n_shards == SH_CONVERT_SHARDS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%s: more than %d files of tensors", c->folder,
                       SH_CONVERT_SHARDS_MAX);
    if (strchr(name, '/') != NULL || name[0] == '.' || name[0] == '\0')
        return sh_fail(err, SH_ERR_INVALID,
                       "%s/" INDEX_FILE ": '%.64s' is no name of a file in the folder", c->folder,
                       name);
    SH_TRY(sh_path_join(path, sizeof path, c->folder, name, err));
    char *copy = sh_calloc(strlen(name) + 1, 1);
    if (copy == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", c->folder);
    memcpy(copy, name, strlen(name) + 1);
    c->shard_names[c->n_shards++] = copy; /* closed by release, with or without its file */
    return sh_safetensors_open(path, &c->shards[c->n_shards - 1], err);
}

static sh_status open_shards(conversion *c, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, c->folder, INDEX_FILE, err));
    if (!sh_file_exists(path)) {
        char whole[SH_PATH_BYTES];
        SH_TRY(sh_path_join(whole, sizeof whole, c->folder, WHOLE_FILE, err));
        if (!sh_file_exists(whole))
            return sh_fail(err, SH_ERR_NOT_FOUND,
                           "%s: neither " WHOLE_FILE " nor " INDEX_FILE
                           " is there (pickled weights are not read; save them as safetensors)",
                           c->folder);
        return open_shard(c, WHOLE_FILE, err);
    }
    SH_TRY(sh_hf_load_settings(path, &c->index, err));
    const json_t *map = json_object_get(c->index, "weight_map");
    const char *tensor;
    json_t *file;
    if (!json_is_object(map) || json_object_size(map) == 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: 'weight_map' is no object, or empty", path);
    json_object_foreach((json_t *)(uintptr_t)map, tensor, file)
    {
        if (!json_is_string(file))
            return sh_fail(err, SH_ERR_INVALID, "%s: the file of '%.128s' is no string", path,
                           tensor);
        SH_TRY(open_shard(c, json_string_value(file), err));
    }
    return SH_OK;
}

static sh_status load_optional(const conversion *c, const char *name, json_t **out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, c->folder, name, err));
    return sh_file_exists(path) ? sh_hf_load_settings(path, out, err) : SH_OK;
}

static sh_status load_files(conversion *c, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, c->folder, "config.json", err));
    SH_TRY(sh_hf_load_settings(path, &c->config_json, err));
    SH_TRY(sh_hf_config_read(c->config_json, path, &c->config, err));
    SH_TRY(sh_path_join(path, sizeof path, c->folder, "tokenizer.json", err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s: tokenizer.json is missing (a tokenizer.model alone is not read; save "
                       "the tokenizer in its fast form)",
                       c->folder);
    SH_TRY(sh_hf_load_vocabulary(path, &c->tokenizer, err));
    SH_TRY(load_optional(c, "tokenizer_config.json", &c->settings, err));
    SH_TRY(sh_path_join(path, sizeof path, c->folder, "chat_template.jinja", err));
    if (sh_file_exists(path)) {
        size_t n = 0;
        SH_TRY(sh_file_read(path, TEMPLATE_BYTES_MAX, (uint8_t **)&c->template, &n, err));
        if (memchr(c->template, '\0', n) != NULL)
            return sh_fail(err, SH_ERR_INVALID, "%s: the template has a zero byte", path);
    }
    return open_shards(c, err);
}

/* ---- the plan: every tensor of the result, in order, with where it comes from ---- */

static sh_status find_source(const conversion *c, const char *name, const sh_safetensor **out,
                             const char **file, sh_error *err)
{
    *out = NULL;
    for (size_t i = 0; i < c->n_shards; i++) {
        const sh_safetensor *t = sh_safetensors_find(c->shards[i], name);
        if (t == NULL)
            continue;
        if (*out != NULL)
            return sh_fail(err, SH_ERR_INVALID, "%s: the tensor '%s' is in %s as well", *file, name,
                           c->shard_names[i]);
        *out = t;
        *file = sh_safetensors_path(c->shards[i]);
    }
    return SH_OK;
}

static sh_status check_source(const char *file, const sh_safetensor *t, uint32_t rows,
                              uint32_t columns, sh_error *err)
{
    if (!t->is_float)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: the tensor '%s' is %s; F32, F16 and BF16 are supported", file, t->name,
                       t->dtype);
    const bool fits = rows == 0 ? t->n_dims == 1 && t->shape[0] == columns
                                : t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == columns;
    if (!fits)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: the tensor '%s' is %" PRIu64 " x %" PRIu64
                       " in %u dimensions, config.json means %u x %u",
                       file, t->name, t->shape[0], t->shape[1], t->n_dims, SH_MAX(rows, 1),
                       columns);
    return SH_OK;
}

static sh_type type_for(const conversion *c, uint32_t rows, uint32_t columns)
{
    if (rows == 0)
        return SH_TYPE_F32;
    return sh_type_row_bytes(c->options->type, columns) > 0 ? c->options->type : SH_TYPE_F16;
}

typedef struct {
    const char *from, *to; /* without a layer's prefix */
    uint32_t rows, columns;
    bool permuted, optional;
} wanted;

/* layer < 0: outside the layers. */
static sh_status plan_tensor(conversion *c, int64_t layer, const wanted *t, sh_error *err)
{
    planned p = {.rows = t->rows, .columns = t->columns, .permuted = t->permuted};
    char from[SH_SAFETENSORS_NAME_MAX];
    if (layer < 0) {
        snprintf(from, sizeof from, "%s", t->from);
        snprintf(p.name, sizeof p.name, "%s", t->to);
    } else {
        snprintf(from, sizeof from, "model.layers.%" PRId64 ".%s", layer, t->from);
        snprintf(p.name, sizeof p.name, "blk.%" PRId64 ".%s", layer, t->to);
    }
    SH_TRY(find_source(c, from, &p.source, &p.file, err));
    if (p.source == NULL && t->optional)
        return SH_OK;
    if (p.source == NULL)
        return sh_fail(err, SH_ERR_INVALID, "%s: the tensor '%s' is missing", c->folder, from);
    SH_TRY(check_source(p.file, p.source, t->rows, t->columns, err));
    p.type = type_for(c, t->rows, t->columns);
    sh_status status = sh_array_reserve((void **)&c->plan, &c->cap_plan, c->n_plan + 1, sizeof p,
                                        SH_GGUF_TENSORS_MAX);
    if (status != SH_OK)
        return sh_fail(err, status, "%s: no room for the tensor '%s'", c->folder, from);
    c->plan[c->n_plan++] = p;
    return SH_OK;
}

/* Biases of q, k and v are qwen2's; llama may have them, too. (Its attention_bias is refused: it
 * has one of the output as well, which is not run.) */
static sh_status plan_layer(conversion *c, uint32_t layer, sh_error *err)
{
    const sh_hf_config *f = &c->config;
    const uint32_t q = f->n_heads * f->head_size, kv = f->n_kv_heads * f->head_size, w = f->width;
    const bool halves = f->arch == SH_ARCH_LLAMA, bias = f->arch == SH_ARCH_QWEN2;
    const bool norms = f->arch == SH_ARCH_QWEN3;
    const wanted list[] = {
        {"input_layernorm.weight", "attn_norm.weight", 0, w, false, false},
        {"self_attn.q_proj.weight", "attn_q.weight", q, w, halves, false},
        {"self_attn.q_proj.bias", "attn_q.bias", 0, q, halves, !bias},
        {"self_attn.k_proj.weight", "attn_k.weight", kv, w, halves, false},
        {"self_attn.k_proj.bias", "attn_k.bias", 0, kv, halves, !bias},
        {"self_attn.v_proj.weight", "attn_v.weight", kv, w, false, false},
        {"self_attn.v_proj.bias", "attn_v.bias", 0, kv, false, !bias},
        {"self_attn.o_proj.weight", "attn_output.weight", w, q, false, false},
        {"self_attn.q_norm.weight", "attn_q_norm.weight", 0, f->head_size, false, false},
        {"self_attn.k_norm.weight", "attn_k_norm.weight", 0, f->head_size, false, false},
        {"post_attention_layernorm.weight", "ffn_norm.weight", 0, w, false, false},
        {"mlp.gate_proj.weight", "ffn_gate.weight", f->ffn, w, false, false},
        {"mlp.up_proj.weight", "ffn_up.weight", f->ffn, w, false, false},
        {"mlp.down_proj.weight", "ffn_down.weight", w, f->ffn, false, false},
    };
    for (size_t i = 0; i < SH_COUNT(list); i++) {
        const bool bias_of_qwen3 = norms && strstr(list[i].from, ".bias") != NULL;
        const bool norm_of_others = !norms && strstr(list[i].from, "_norm.") != NULL;
        if (!bias_of_qwen3 && !norm_of_others)
            SH_TRY(plan_tensor(c, layer, &list[i], err));
    }
    return SH_OK;
}

static sh_status plan_rope(conversion *c, sh_error *err)
{
    const uint32_t n = c->config.head_size / 2;
    if (c->config.rope != SH_HF_ROPE_LLAMA3)
        return SH_OK;
    c->rope_factors = sh_calloc(n, sizeof *c->rope_factors);
    if (c->rope_factors == NULL || sh_array_reserve((void **)&c->plan, &c->cap_plan, c->n_plan + 1,
                                                    sizeof *c->plan, SH_GGUF_TENSORS_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: out of memory", c->folder);
    sh_hf_rope_factors(&c->config, c->rope_factors);
    c->plan[c->n_plan++] =
        (planned){.name = "rope_freqs.weight", .type = SH_TYPE_F32, .columns = n};
    return SH_OK;
}

/* Whether a tensor of the folder is in the plan, or may be left out. */
static bool is_used(const conversion *c, const sh_safetensor *t)
{
    static const char buffer[] = ".rotary_emb.inv_freq";
    const size_t n = strlen(t->name), k = sizeof buffer - 1;
    if (n > k && strcmp(t->name + n - k, buffer) == 0)
        return true;
    if (c->config.tied && strcmp(t->name, "lm_head.weight") == 0)
        return true;
    for (size_t i = 0; i < c->n_plan; i++)
        if (c->plan[i].source == t)
            return true;
    return false;
}

static sh_status make_plan(conversion *c, sh_error *err)
{
    const sh_hf_config *f = &c->config;
    const wanted first = {
        "model.embed_tokens.weight", "token_embd.weight", f->vocab, f->width, false, false};
    const wanted norm = {"model.norm.weight", "output_norm.weight", 0, f->width, false, false};
    const wanted head = {"lm_head.weight", "output.weight", f->vocab, f->width, false, false};
    SH_TRY(plan_rope(c, err));
    SH_TRY(plan_tensor(c, -1, &first, err));
    for (uint32_t i = 0; i < f->n_layers; i++)
        SH_TRY(plan_layer(c, i, err));
    SH_TRY(plan_tensor(c, -1, &norm, err));
    if (!f->tied)
        SH_TRY(plan_tensor(c, -1, &head, err));
    for (size_t s = 0; s < c->n_shards; s++) {
        for (size_t i = 0; i < sh_safetensors_count(c->shards[s]); i++) {
            const sh_safetensor *t = sh_safetensors_at(c->shards[s], i);
            if (!is_used(c, t))
                return sh_fail(err, SH_ERR_UNSUPPORTED,
                               "%s: the tensor '%s' has no place in a %s of %u layers",
                               sh_safetensors_path(c->shards[s]), t->name, sh_arch_name(f->arch),
                               f->n_layers);
        }
    }
    return SH_OK;
}

/* ---- writing ---- */

/* The last part of the folder's name. */
static void model_name(const char *folder, char *out, size_t bytes)
{
    size_t end = strlen(folder);
    while (end > 1 && folder[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && folder[start - 1] != '/')
        start--;
    snprintf(out, bytes, "%.*s", (int)SH_MIN(end - start, bytes - 1), folder + start);
}

static sh_status put_general(const conversion *c, sh_gguf_writer *w)
{
    char name[256];
    model_name(c->folder, name, sizeof name);
    SH_TRY(sh_gguf_writer_set_string(w, "general.architecture", sh_arch_name(c->config.arch)));
    SH_TRY(sh_gguf_writer_set_string(w, "general.type", "model"));
    SH_TRY(sh_gguf_writer_set_string(w, "general.name", name));
    return sh_gguf_writer_set_type(w, c->options->type);
}

static sh_status put_keys(conversion *c, sh_error *err)
{
    const sh_hf_tokenizer tokenizer = {.tokenizer = c->tokenizer,
                                       .settings = c->settings,
                                       .config = c->config_json,
                                       .template = c->template,
                                       .folder = c->folder,
                                       .pre = c->options->pre,
                                       .vocab = c->config.vocab};
    SH_TRY(sh_gguf_writer_create(&c->writer, err));
    sh_status status = put_general(c, c->writer);
    if (status != SH_OK)
        return sh_fail(err, status, "cannot write the keys of the model: %s",
                       sh_status_name(status));
    SH_TRY(sh_hf_config_write(&c->config, c->writer, err));
    SH_TRY(sh_hf_tokenizer_write(&tokenizer, c->writer, err));
    for (size_t i = 0; i < c->n_plan; i++) {
        const planned *p = &c->plan[i];
        const uint64_t ne[] = {p->columns, p->rows};
        SH_TRY(sh_gguf_writer_add_tensor(c->writer, p->name, p->type, ne, p->rows == 0 ? 1 : 2,
                                         NULL, err));
    }
    return SH_OK;
}

/* The largest value that the type (or the scale of its blocks) can say. */
static float largest_of(sh_type type)
{
    const float half = 65504;
    return type == SH_TYPE_F16    ? half
           : type == SH_TYPE_Q8_0 ? half * 127
           : type == SH_TYPE_Q4_0 ? half * 8
                                  : INFINITY;
}

static sh_status check_values(const planned *p, const float *values, sh_error *err)
{
    const float largest = largest_of(p->type);
    for (uint32_t i = 0; i < p->columns; i++) {
        if (!isfinite(values[i]))
            return sh_fail(err, SH_ERR_INVALID, "%s: a value of the tensor '%s' is not finite",
                           p->file, p->source->name);
        if (fabsf(values[i]) > largest)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s: a value of the tensor '%s' is %g, too large for %s; try BF16",
                           p->file, p->source->name, (double)values[i],
                           sh_type_get((uint32_t)p->type)->name);
    }
    return SH_OK;
}

/* A bias is a matrix of one column here, so that its values are permuted like rows. */
static void read_vector(const conversion *c, const planned *p, float *values)
{
    if (!p->permuted) {
        sh_safetensor_floats(p->source, 0, p->columns, values);
        return;
    }
    for (uint32_t i = 0; i < p->columns; i++)
        sh_safetensor_floats(p->source, sh_hf_row(i, c->config.head_size), 1, values + i);
}

static sh_status write_tensor(const conversion *c, const planned *p, sh_gguf_stream *stream,
                              sh_error *err)
{
    sh_status status = SH_OK;
    const size_t row_bytes = sh_type_row_bytes(p->type, p->columns);
    if (p->source == NULL)
        return sh_gguf_stream_write(stream, c->rope_factors, row_bytes, err);
    float *values = sh_alloc_aligned(p->columns * sizeof *values);
    uint8_t *row = sh_alloc_aligned(row_bytes);
    if (values == NULL || row == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", p->name));
    for (uint32_t i = 0; i < SH_MAX(p->rows, 1); i++) {
        const uint32_t from = p->permuted ? sh_hf_row(i, c->config.head_size) : i;
        if (p->rows == 0)
            read_vector(c, p, values);
        else
            sh_safetensor_floats(p->source, (size_t)from * p->columns, p->columns, values);
        SH_GOTO(check_values(p, values, err));
        sh_row_quantize(p->type, values, row, p->columns);
        SH_GOTO(sh_gguf_stream_write(stream, row, row_bytes, err));
    }

cleanup:
    free(values);
    free(row);
    return status;
}

static sh_status write_file(const conversion *c, const char *path, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_stream *stream = NULL;
    const sh_convert_options *o = c->options;
    SH_GOTO(sh_gguf_stream_begin(c->writer, path, &stream, err));
    for (size_t i = 0; i < c->n_plan; i++) {
        if (o->progress != NULL)
            o->progress(o->arg, i, c->n_plan, c->plan[i].name);
        SH_GOTO(write_tensor(c, &c->plan[i], stream, err));
    }
    SH_GOTO(sh_gguf_stream_finish(&stream, err));
    if (o->progress != NULL)
        o->progress(o->arg, c->n_plan, c->n_plan, "");

cleanup:
    sh_gguf_stream_cancel(&stream);
    return status;
}

sh_status sh_convert_model(const char *folder, const char *out_path,
                           const sh_convert_options *options, sh_error *err)
{
    sh_status status = SH_OK;
    const sh_type_info *info = sh_type_get((uint32_t)options->type);
    if (info == NULL || !info->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "cannot convert to %s; F32, F16, BF16, Q8_0 and Q4_0 can be written",
                       info == NULL ? "an unknown type" : info->name);
    conversion *c = sh_calloc(1, sizeof *c);
    if (c == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory to convert '%s'", folder);
    c->folder = folder;
    c->options = options;
    SH_GOTO(load_files(c, err));
    SH_GOTO(make_plan(c, err));
    SH_GOTO(put_keys(c, err));
    SH_GOTO(write_file(c, out_path, err));

cleanup:
    release(c);
    free(c);
    return status;
}
