/*
 * config.json of a Hugging Face model: what transformers' LlamaConfig, Qwen2Config and Qwen3Config
 * mean by it, defaults included. What would change the result and has no counterpart is refused by
 * name.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "shared/model/convert_internal.h"

#define WIDTH_MAX 65536u
#define FFN_MAX   (1u << 20)
#define HEADS_MAX 1024u

typedef struct {
    const json_t *json;
    const char *file;
} source;

/* ---- what is refused ---- */

static sh_status refuse(const source *s, const char *key, const char *why, sh_error *err)
{
    return sh_fail(err, SH_ERR_UNSUPPORTED, "%s: '%s': %s", s->file, key, why);
}

static sh_status refuse_settings(const source *s, sh_error *err)
{
    const char *activation = "silu";
    bool sliding = false, mlp_bias = false;
    double rotary = 1;
    SH_TRY(sh_hf_get_string(s->json, s->file, "hidden_act", &activation, err));
    if (strcmp(activation, "silu") != 0 && strcmp(activation, "swish") != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: 'hidden_act' is '%.32s', only silu is supported", s->file, activation);
    SH_TRY(sh_hf_get_bool(s->json, s->file, "use_sliding_window", &sliding, err));
    if (sliding)
        return refuse(s, "use_sliding_window", "attention in a window is not supported", err);
    const json_t *types = json_object_get(s->json, "layer_types"), *type;
    size_t i;
    json_array_foreach(types, i, type)
    {
        const char *text = json_string_value(type);
        if (text == NULL || strcmp(text, "full_attention") != 0)
            return refuse(s, "layer_types", "only full_attention is supported", err);
    }
    SH_TRY(sh_hf_get_bool(s->json, s->file, "mlp_bias", &mlp_bias, err));
    if (mlp_bias)
        return refuse(s, "mlp_bias", "biases of the feed-forward part are not supported", err);
    SH_TRY(sh_hf_get_real(s->json, s->file, "partial_rotary_factor", &rotary, err));
    if (rotary != 1)
        return refuse(s, "partial_rotary_factor", "RoPE over a part of a head is not supported",
                      err);
    if (sh_hf_has(s->json, "quantization_config"))
        return refuse(s, "quantization_config",
                      "the weights are quantized in another form; convert the original", err);
    return SH_OK;
}

/* ---- architecture and shapes ---- */

static sh_status read_architecture(const source *s, sh_hf_config *c, sh_error *err)
{
    static const struct {
        const char *name;
        sh_arch arch;
    } known[] = {
        {"LlamaForCausalLM", SH_ARCH_LLAMA},
        {"Qwen2ForCausalLM", SH_ARCH_QWEN2},
        {"Qwen3ForCausalLM", SH_ARCH_QWEN3},
    };
    const char *name =
        json_string_value(json_array_get(json_object_get(s->json, "architectures"), 0));
    if (name == NULL)
        return sh_fail(err, SH_ERR_INVALID, "%s: 'architectures' names none", s->file);
    for (size_t i = 0; i < SH_COUNT(known); i++) {
        if (strcmp(known[i].name, name) == 0) {
            c->arch = known[i].arch;
            return SH_OK;
        }
    }
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "%s: the architecture '%.64s' is not supported (LlamaForCausalLM, "
                   "Qwen2ForCausalLM and Qwen3ForCausalLM are)",
                   s->file, name);
}

static sh_status need_u32(const source *s, const char *key, uint32_t max, uint32_t *out,
                          sh_error *err)
{
    if (!sh_hf_has(s->json, key))
        return sh_fail(err, SH_ERR_INVALID, "%s: '%s' is missing", s->file, key);
    return sh_hf_get_u32(s->json, s->file, key, max, out, err);
}

static sh_status read_shapes(const source *s, sh_hf_config *c, sh_error *err)
{
    SH_TRY(need_u32(s, "num_hidden_layers", SH_MODEL_LAYERS_MAX, &c->n_layers, err));
    SH_TRY(need_u32(s, "hidden_size", WIDTH_MAX, &c->width, err));
    SH_TRY(need_u32(s, "intermediate_size", FFN_MAX, &c->ffn, err));
    SH_TRY(need_u32(s, "num_attention_heads", HEADS_MAX, &c->n_heads, err));
    SH_TRY(need_u32(s, "vocab_size", SH_VOCAB_MAX, &c->vocab, err));
    SH_TRY(need_u32(s, "max_position_embeddings", UINT32_MAX, &c->context, err));
    c->n_kv_heads = c->n_heads;
    SH_TRY(sh_hf_get_u32(s->json, s->file, "num_key_value_heads", HEADS_MAX, &c->n_kv_heads, err));
    c->head_size_stated = sh_hf_has(s->json, "head_dim");
    if (c->arch == SH_ARCH_QWEN3 && !c->head_size_stated) { /* Qwen3Config's default */
        c->head_size = 128;
        c->head_size_stated = true;
    } else if (!c->head_size_stated) {
        if (c->width % c->n_heads != 0)
            return sh_fail(err, SH_ERR_INVALID,
                           "%s: 'hidden_size' %u is not a multiple of 'num_attention_heads' %u",
                           s->file, c->width, c->n_heads);
        c->head_size = c->width / c->n_heads;
    }
    SH_TRY(sh_hf_get_u32(s->json, s->file, "head_dim", WIDTH_MAX, &c->head_size, err));
    if (c->head_size % 2 != 0 || (uint64_t)c->head_size * c->n_heads > WIDTH_MAX)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: heads of %u values (%u heads) are odd or too large", s->file,
                       c->head_size, c->n_heads);
    if (c->n_heads % c->n_kv_heads != 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: 'num_attention_heads' %u is not a multiple of 'num_key_value_heads' %u",
                       s->file, c->n_heads, c->n_kv_heads);
    c->norm_eps = 1e-6;
    SH_TRY(sh_hf_get_real(s->json, s->file, "rms_norm_eps", &c->norm_eps, err));
    return sh_hf_get_bool(s->json, s->file, "tie_word_embeddings", &c->tied, err);
}

/* ---- RoPE ---- */

static sh_status read_llama3(const source *scaling, sh_hf_config *c, sh_error *err)
{
    c->rope = SH_HF_ROPE_LLAMA3;
    c->low_freq_factor = 1;
    c->high_freq_factor = 4;
    const json_t *json = scaling->json;
    SH_TRY(sh_hf_get_real(json, scaling->file, "low_freq_factor", &c->low_freq_factor, err));
    SH_TRY(sh_hf_get_real(json, scaling->file, "high_freq_factor", &c->high_freq_factor, err));
    if (c->high_freq_factor <= c->low_freq_factor)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: 'high_freq_factor' %g is not over 'low_freq_factor' %g", scaling->file,
                       c->high_freq_factor, c->low_freq_factor);
    return SH_OK;
}

static sh_status read_yarn(const source *scaling, sh_hf_config *c, sh_error *err)
{
    bool truncate = true;
    c->rope = SH_HF_ROPE_YARN;
    const json_t *json = scaling->json;
    SH_TRY(sh_hf_get_real(json, scaling->file, "attention_factor", &c->attention_factor, err));
    SH_TRY(sh_hf_get_real(json, scaling->file, "beta_fast", &c->beta_fast, err));
    SH_TRY(sh_hf_get_real(json, scaling->file, "beta_slow", &c->beta_slow, err));
    SH_TRY(sh_hf_get_bool(json, scaling->file, "truncate", &truncate, err));
    if (!truncate)
        return refuse(scaling, "truncate", "YaRN without rounding its range is not supported", err);
    if (sh_hf_has(json, "mscale") || sh_hf_has(json, "mscale_all_dim"))
        return refuse(scaling, "mscale", "this form of YaRN is not supported", err);
    return SH_OK;
}

/* rope_scaling and rope_theta, or rope_parameters, which has both (transformers 5). */
static sh_status read_rope(const source *s, sh_hf_config *c, sh_error *err)
{
    const char *type = "default";
    source scaling = {json_object_get(s->json, "rope_scaling"), s->file};
    c->rope_base = 10000;
    c->rope_factor = 1;
    if (sh_hf_has(s->json, "rope_parameters"))
        scaling.json = json_object_get(s->json, "rope_parameters");
    SH_TRY(sh_hf_get_real(s->json, s->file, "rope_theta", &c->rope_base, err));
    if (scaling.json == NULL || json_is_null(scaling.json))
        return SH_OK;
    if (!json_is_object(scaling.json))
        return sh_fail(err, SH_ERR_INVALID, "%s: 'rope_scaling' is no object", s->file);
    SH_TRY(sh_hf_get_real(scaling.json, s->file, "rope_theta", &c->rope_base, err));
    SH_TRY(sh_hf_get_string(scaling.json, s->file, "type", &type, err)); /* the older name */
    SH_TRY(sh_hf_get_string(scaling.json, s->file, "rope_type", &type, err));
    if (strcmp(type, "default") == 0)
        return SH_OK;
    if (!sh_hf_has(scaling.json, "factor"))
        return sh_fail(err, SH_ERR_INVALID, "%s: RoPE scaling '%.32s' has no 'factor'", s->file,
                       type);
    SH_TRY(sh_hf_get_real(scaling.json, s->file, "factor", &c->rope_factor, err));
    c->rope_original = strcmp(type, "llama3") == 0 ? 8192 : c->context;
    SH_TRY(sh_hf_get_u32(s->json, s->file, "original_max_position_embeddings", UINT32_MAX,
                         &c->rope_original, err));
    SH_TRY(sh_hf_get_u32(scaling.json, s->file, "original_max_position_embeddings", UINT32_MAX,
                         &c->rope_original, err));
    if (strcmp(type, "llama3") == 0 && c->arch != SH_ARCH_LLAMA)
        return refuse(&scaling, "rope_scaling", "llama3 is for LlamaForCausalLM only", err);
    if (strcmp(type, "llama3") == 0)
        return read_llama3(&scaling, c, err);
    if (strcmp(type, "yarn") == 0)
        return read_yarn(&scaling, c, err);
    if (strcmp(type, "linear") != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: RoPE scaling '%.32s' is not supported (linear, llama3 and yarn are)",
                       s->file, type);
    c->rope = SH_HF_ROPE_LINEAR;
    return SH_OK;
}

sh_status sh_hf_config_read(const json_t *config, const char *file, sh_hf_config *out,
                            sh_error *err)
{
    sh_hf_config c = {0};
    const source s = {config, file};
    SH_TRY(read_architecture(&s, &c, err));
    SH_TRY(refuse_settings(&s, err));
    SH_TRY(read_shapes(&s, &c, err));
    SH_TRY(read_rope(&s, &c, err));
    *out = c;
    return SH_OK;
}

/* A pair whose wave fits the old context high_freq_factor times stays, one that does not fit
 * low_freq_factor times is slowed by the whole factor, with a ramp between. In single precision, as
 * transformers and llama.cpp's converter do. */
void sh_hf_rope_factors(const sh_hf_config *c, float *out)
{
    const double low = c->rope_original / c->low_freq_factor;
    const double high = c->rope_original / c->high_freq_factor;
    for (uint32_t j = 0; j < c->head_size / 2; j++) {
        const float f = 1.0f / powf((float)c->rope_base, (float)(2 * j) / (float)c->head_size);
        const double wave = (double)(float)(2 * M_PI / (double)f);
        if (wave < high) {
            out[j] = 1;
        } else if (wave > low) {
            out[j] = (float)c->rope_factor;
        } else {
            const double smooth = (c->rope_original / wave - c->low_freq_factor) /
                                  (c->high_freq_factor - c->low_freq_factor);
            out[j] = (float)(1 / ((1 - smooth) / c->rope_factor + smooth));
        }
    }
}

/* ---- keys of GGUF ---- */

typedef struct {
    sh_gguf_writer *w;
    sh_arch arch;
    sh_status status; /* the first that failed */
} key_writer;

typedef struct {
    char text[64];
} key_name;

static key_name name_of(const key_writer *k, const char *suffix)
{
    key_name key;
    snprintf(key.text, sizeof key.text, "%s.%s", sh_arch_name(k->arch), suffix);
    return key;
}

static void put_u32(key_writer *k, const char *suffix, uint32_t v)
{
    if (k->status == SH_OK)
        k->status = sh_gguf_writer_set_u32(k->w, name_of(k, suffix).text, v);
}

static void put_f32(key_writer *k, const char *suffix, double v)
{
    if (k->status == SH_OK)
        k->status = sh_gguf_writer_set_f32(k->w, name_of(k, suffix).text, (float)v);
}

static void put_rope_type(key_writer *k, const char *type)
{
    if (k->status == SH_OK)
        k->status = sh_gguf_writer_set_string(k->w, name_of(k, "rope.scaling.type").text, type);
}

/* llama.cpp multiplies its attn_factor with 1 + 0.1 ln(factor), transformers takes its
 * attention_factor in place of both. */
static void put_yarn(key_writer *k, const sh_hf_config *c)
{
    put_rope_type(k, "yarn");
    put_f32(k, "rope.scaling.factor", c->rope_factor);
    put_u32(k, "rope.scaling.original_context_length", c->rope_original);
    const double usual = c->rope_factor > 1 ? 1 + 0.1 * log(c->rope_factor) : 1;
    const double wanted = c->attention_factor != 0 ? c->attention_factor : usual;
    const double ours = 1 + 0.1 * log(c->rope_factor);
    if (fabs(wanted - ours) > 1e-6)
        put_f32(k, "rope.scaling.attn_factor", wanted / ours);
    if (c->beta_fast != 0 && c->beta_fast != 32)
        put_f32(k, "rope.scaling.yarn_beta_fast", c->beta_fast);
    if (c->beta_slow != 0 && c->beta_slow != 1)
        put_f32(k, "rope.scaling.yarn_beta_slow", c->beta_slow);
}

sh_status sh_hf_config_write(const sh_hf_config *c, sh_gguf_writer *w, sh_error *err)
{
    key_writer k = {.w = w, .arch = c->arch};
    put_u32(&k, "block_count", c->n_layers);
    put_u32(&k, "context_length", c->context);
    put_u32(&k, "embedding_length", c->width);
    put_u32(&k, "feed_forward_length", c->ffn);
    put_u32(&k, "attention.head_count", c->n_heads);
    put_u32(&k, "attention.head_count_kv", c->n_kv_heads);
    put_f32(&k, "attention.layer_norm_rms_epsilon", c->norm_eps);
    put_f32(&k, "rope.freq_base", c->rope_base);
    put_u32(&k, "rope.dimension_count", c->head_size);
    if (c->head_size_stated) {
        put_u32(&k, "attention.key_length", c->head_size);
        put_u32(&k, "attention.value_length", c->head_size);
    }
    put_u32(&k, "vocab_size", c->vocab);
    if (c->rope == SH_HF_ROPE_LINEAR) {
        put_rope_type(&k, "linear");
        put_f32(&k, "rope.scaling.factor", c->rope_factor);
    } else if (c->rope == SH_HF_ROPE_YARN) {
        put_yarn(&k, c);
    }
    if (k.status != SH_OK)
        return sh_fail(err, k.status, "cannot write the keys of the model: %s",
                       sh_status_name(k.status));
    return SH_OK;
}
