/*
 * From a file's keys to an sh_model_config and the angles of RoPE. A key that would change the
 * result and that we do not compute is refused by name: a wrong answer is worse than none.
 *
 * RoPE (Su et al. 2021): pair j of a head turns by p * base^(-2j / head_size) at position p.
 * Factors (Llama 3's rope_freqs) divide that frequency. Linear scaling divides it by a factor s.
 * YaRN (Peng et al. 2023, section 3.2) divides only the low frequencies: those that turn fewer than
 * beta_slow times in the original context wholly, those that turn more than beta_fast times not
 * at all, with a ramp between in j; and it stretches the attention's logits, by multiplying cos and
 * sin with 1 + 0.1 ln s. The ramp's ends are rounded as llama.cpp does.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model_internal.h"

#define WIDTH_MAX 65536u
#define FFN_MAX   (1u << 20)
#define HEADS_MAX 1024u

static const struct {
    const char *name;
    bool rope_halves;
} architectures[] = {
    [SH_ARCH_LLAMA] = {"llama", false},
    [SH_ARCH_QWEN2] = {"qwen2", true},
    [SH_ARCH_QWEN3] = {"qwen3", true},
};

const char *sh_arch_name(sh_arch arch)
{
    SH_ASSERT((size_t)arch < SH_COUNT(architectures));
    return architectures[arch].name;
}

bool sh_arch_rope_halves(sh_arch arch)
{
    SH_ASSERT((size_t)arch < SH_COUNT(architectures));
    return architectures[arch].rope_halves;
}

typedef struct {
    char text[64];
} key_name;

static key_name name_of(const sh_model_config *c, const char *suffix)
{
    key_name key;
    snprintf(key.text, sizeof key.text, "%s.%s", architectures[c->arch].name, suffix);
    return key;
}

/* ---- single keys; the optional ones leave *out as it is when the key is absent ---- */

static sh_status get_u32(const sh_gguf *gguf, key_name key, uint32_t max, uint32_t *out,
                         sh_error *err)
{
    uint64_t v;
    SH_TRY(sh_gguf_get_u64(gguf, key.text, &v, err));
    if (v == 0 || v > max)
        return sh_fail(err, SH_ERR_INVALID, "%s is %" PRIu64 ", not in 1..%" PRIu32, key.text, v,
                       max);
    *out = (uint32_t)v;
    return SH_OK;
}

static sh_status get_u32_optional(const sh_gguf *gguf, key_name key, uint32_t max, uint32_t *out,
                                  sh_error *err)
{
    uint64_t v;
    if (sh_gguf_get_u64(gguf, key.text, &v, NULL) == SH_ERR_NOT_FOUND)
        return SH_OK;
    return get_u32(gguf, key, max, out, err);
}

static sh_status get_f64_optional(const sh_gguf *gguf, key_name key, double *out, sh_error *err)
{
    double v;
    sh_error local = {0};
    sh_status status = sh_gguf_get_f64(gguf, key.text, &v, &local);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    if (status != SH_OK)
        return sh_fail(err, status, "%s", local.text);
    if (!(v > 0) || !isfinite((float)v))
        return sh_fail(err, SH_ERR_INVALID, "%s is %g, not a positive number", key.text, v);
    *out = v;
    return SH_OK;
}

static sh_status get_f32_optional(const sh_gguf *gguf, key_name key, float *out, sh_error *err)
{
    double v = 0;
    SH_TRY(get_f64_optional(gguf, key, &v, err));
    if (v != 0)
        *out = (float)v;
    return SH_OK;
}

static bool string_is(const char *text, size_t n, const char *expected)
{
    return n == strlen(expected) && memcmp(text, expected, n) == 0;
}

/* ---- what is refused ---- */

/* Keys that change what the model computes unless they have the value that says "no". */
static sh_status refuse_unsupported_keys(const sh_gguf *gguf, const sh_model_config *c,
                                         sh_error *err)
{
    static const struct {
        const char *key;
        double neutral;
        const char *what;
    } numbers[] = {
        {"expert_count", 0, "mixtures of experts are not supported"},
        {"expert_used_count", 0, "mixtures of experts are not supported"},
        {"attn_logit_softcapping", 0, "capped logits are not supported"},
        {"final_logit_softcapping", 0, "capped logits are not supported"},
        {"logit_scale", 0, "scaled logits are not supported"},
        {"residual_scale", 0, "scaled residuals are not supported"},
        {"embedding_scale", 0, "scaled embeddings are not supported"},
        {"attention.scale", 0, "another scale of attention is not supported"},
        {"attention.clamp_kqv", 0, "clamped attention is not supported"},
        {"attention.max_alibi_bias", 0, "ALiBi is not supported"},
        {"rope.scaling.yarn_log_multiplier", 0, "this form of YaRN is not supported"},
        {"rope.scaling.yarn_ext_factor", 1, "this form of YaRN is not supported"},
        {"rope.scaling.yarn_attn_factor", 1, "this form of YaRN is not supported"},
    };
    for (size_t i = 0; i < SH_COUNT(numbers); i++) {
        key_name key = name_of(c, numbers[i].key);
        uint64_t whole;
        double v;
        if (sh_gguf_get_u64(gguf, key.text, &whole, NULL) == SH_OK)
            v = (double)whole;
        else if (sh_gguf_get_f64(gguf, key.text, &v, NULL) != SH_OK)
            continue;
        if (v != numbers[i].neutral)
            return sh_fail(err, SH_ERR_UNSUPPORTED, "%s is %g: %s", key.text, v, numbers[i].what);
    }
    static const struct {
        const char *key;
        bool neutral;
        const char *what;
    } flags[] = {
        {"attention.causal", true, "only causal models are supported"},
        {"use_parallel_residual", false, "parallel residuals are not supported"},
    };
    for (size_t i = 0; i < SH_COUNT(flags); i++) {
        key_name key = name_of(c, flags[i].key);
        bool v;
        if (sh_gguf_get_bool(gguf, key.text, &v, NULL) == SH_OK && v != flags[i].neutral)
            return sh_fail(err, SH_ERR_UNSUPPORTED, "%s is %s: %s", key.text, v ? "true" : "false",
                           flags[i].what);
    }
    return SH_OK;
}

static sh_status read_architecture(const sh_gguf *gguf, sh_model_config *c, sh_error *err)
{
    const char *text;
    size_t n;
    if (sh_gguf_get_string(gguf, "general.type", &text, &n, NULL) == SH_OK &&
        string_is(text, n, "adapter"))
        return sh_fail(err, SH_ERR_MISMATCH, "it is an adapter, not a model");
    SH_TRY(sh_gguf_get_string(gguf, "general.architecture", &text, &n, err));
    for (size_t i = 0; i < SH_COUNT(architectures); i++) {
        if (!string_is(text, n, architectures[i].name))
            continue;
        c->arch = (sh_arch)i;
        c->rope_halves = architectures[i].rope_halves;
        return SH_OK;
    }
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "architecture '%.*s' is not supported (llama, qwen2 and qwen3 are)",
                   (int)SH_MIN(n, 64), text);
}

/* ---- shapes ---- */

static sh_status read_heads(const sh_gguf *gguf, sh_model_config *c, sh_error *err)
{
    SH_TRY(get_u32(gguf, name_of(c, "attention.head_count"), HEADS_MAX, &c->n_heads, err));
    c->n_kv_heads = c->n_heads;
    SH_TRY(get_u32_optional(gguf, name_of(c, "attention.head_count_kv"), HEADS_MAX, &c->n_kv_heads,
                            err));
    if (c->n_heads % c->n_kv_heads != 0)
        return sh_fail(err, SH_ERR_INVALID, "%u heads are not a multiple of %u key-value heads",
                       c->n_heads, c->n_kv_heads);
    uint32_t key_length = 0;
    SH_TRY(get_u32_optional(gguf, name_of(c, "attention.key_length"), WIDTH_MAX, &key_length, err));
    if (key_length == 0 && c->width % c->n_heads != 0)
        return sh_fail(err, SH_ERR_INVALID, "width %u is not a multiple of %u heads", c->width,
                       c->n_heads);
    c->head_size = key_length != 0 ? key_length : c->width / c->n_heads;
    uint32_t value_length = c->head_size, rope_dims = c->head_size;
    SH_TRY(get_u32_optional(gguf, name_of(c, "attention.value_length"), WIDTH_MAX, &value_length,
                            err));
    SH_TRY(get_u32_optional(gguf, name_of(c, "rope.dimension_count"), WIDTH_MAX, &rope_dims, err));
    if (value_length != c->head_size || rope_dims != c->head_size)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "head size %u with values of %u and RoPE over %u is not supported (they "
                       "must be equal)",
                       c->head_size, value_length, rope_dims);
    if (c->head_size % 2 != 0 || (uint64_t)c->head_size * c->n_heads > WIDTH_MAX)
        return sh_fail(err, SH_ERR_INVALID, "head size %u (%u heads) is odd or too large",
                       c->head_size, c->n_heads);
    return SH_OK;
}

static sh_status read_context(const sh_gguf *gguf, sh_model_config *c, sh_error *err)
{
    uint32_t window = UINT32_MAX;
    key_name key = name_of(c, "attention.sliding_window");
    uint64_t v;
    SH_TRY(get_u32(gguf, name_of(c, "context_length"), UINT32_MAX, &c->context, err));
    if (sh_gguf_get_u64(gguf, key.text, &v, NULL) == SH_OK && v != 0 && v < UINT32_MAX)
        window = (uint32_t)v; /* up to its size it is no other than the whole */
    c->context = SH_MIN(c->context, SH_CONTEXT_MAX); /* a longer one is used up to our limit */
    c->context = SH_MIN(c->context, window);
    return SH_OK;
}

static sh_status read_rope_type(const sh_gguf *gguf, sh_model_config *c, sh_error *err)
{
    const char *text;
    size_t n;
    double factor = 1;
    key_name key = name_of(c, "rope.scaling.type");
    sh_status status = sh_gguf_get_string(gguf, key.text, &text, &n, NULL);
    SH_TRY(get_f32_optional(gguf, name_of(c, "rope.freq_base"), &c->rope_base, err));
    if (status == SH_ERR_NOT_FOUND) {
        text = "linear"; /* as the old key scale_linear means it */
        n = strlen(text);
    } else if (status != SH_OK) {
        return sh_gguf_get_string(gguf, key.text, &text, &n, err);
    }
    if (string_is(text, n, "none")) {
        c->rope_scaling = SH_ROPE_PLAIN;
    } else if (string_is(text, n, "yarn")) {
        c->rope_scaling = SH_ROPE_YARN;
    } else if (string_is(text, n, "linear")) {
        double v;
        bool stated = false;
        static const char *const keys[] = {"rope.scaling.factor", "rope.scale_linear"};
        for (size_t i = 0; i < SH_COUNT(keys) && !stated; i++) {
            stated = sh_gguf_get_f64(gguf, name_of(c, keys[i]).text, &v, NULL) == SH_OK;
            factor = stated && v != 0 ? v : 1;
        }
        c->rope_scaling = factor != 1 ? SH_ROPE_LINEAR : SH_ROPE_PLAIN;
    } else {
        return sh_fail(err, SH_ERR_UNSUPPORTED, "%s is '%.*s': none, linear and yarn are supported",
                       key.text, (int)SH_MIN(n, 32), text);
    }
    return SH_OK;
}

sh_status sh_model_read_config(const sh_gguf *gguf, sh_model_config *out, sh_error *err)
{
    sh_model_config c = {.rope_base = 10000.0f};
    SH_TRY(read_architecture(gguf, &c, err));
    SH_TRY(refuse_unsupported_keys(gguf, &c, err));
    SH_TRY(get_u32(gguf, name_of(&c, "block_count"), SH_MODEL_LAYERS_MAX, &c.n_layers, err));
    SH_TRY(get_u32(gguf, name_of(&c, "embedding_length"), WIDTH_MAX, &c.width, err));
    SH_TRY(get_u32(gguf, name_of(&c, "feed_forward_length"), FFN_MAX, &c.ffn, err));
    SH_TRY(read_context(gguf, &c, err));
    SH_TRY(read_heads(gguf, &c, err));
    key_name eps = name_of(&c, "attention.layer_norm_rms_epsilon");
    SH_TRY(get_f32_optional(gguf, eps, &c.norm_eps, err));
    if (c.norm_eps == 0)
        return sh_fail(err, SH_ERR_INVALID, "%s is missing", eps.text);
    SH_TRY(read_rope_type(gguf, &c, err));
    *out = c;
    return SH_OK;
}

sh_status sh_model_read_vocab_size(const sh_gguf *gguf, const sh_model_config *config,
                                   uint32_t *out, sh_error *err)
{
    return get_u32_optional(gguf, name_of(config, "vocab_size"), UINT32_MAX, out, err);
}

/* ---- RoPE ---- */

typedef struct {
    double factor, attn_factor, beta_fast, beta_slow;
    uint32_t context; /* that the model was first trained with */
} scaling;

static sh_status read_scaling(const sh_gguf *gguf, const sh_model_config *c, scaling *out,
                              sh_error *err)
{
    scaling s = {.attn_factor = 1, .beta_fast = 32, .beta_slow = 1};
    if (c->rope_scaling != SH_ROPE_PLAIN) {
        double stated = 0; /* 0 means 1, as in old files */
        key_name key = name_of(c, "rope.scaling.factor");
        if (sh_gguf_get_f64(gguf, key.text, &stated, NULL) == SH_ERR_NOT_FOUND)
            key = name_of(c, "rope.scale_linear");
        if (sh_gguf_get_f64(gguf, key.text, &stated, NULL) == SH_OK && stated != 0)
            SH_TRY(get_f64_optional(gguf, key, &s.factor, err));
    }
    if (s.factor == 0)
        s.factor = 1;
    SH_TRY(get_f64_optional(gguf, name_of(c, "rope.scaling.attn_factor"), &s.attn_factor, err));
    SH_TRY(get_f64_optional(gguf, name_of(c, "rope.scaling.yarn_beta_fast"), &s.beta_fast, err));
    SH_TRY(get_f64_optional(gguf, name_of(c, "rope.scaling.yarn_beta_slow"), &s.beta_slow, err));
    SH_TRY(get_u32(gguf, name_of(c, "context_length"), UINT32_MAX, &s.context, err));
    SH_TRY(get_u32_optional(gguf, name_of(c, "rope.scaling.original_context_length"), UINT32_MAX,
                            &s.context, err));
    *out = s;
    return SH_OK;
}

/* The pair that turns so many times in the original context. */
static double pair_of_turns(const sh_model_config *c, const scaling *s, double turns)
{
    return c->head_size * log((double)s->context / (turns * 2 * M_PI)) /
           (2 * log((double)c->rope_base));
}

/* How much of pair j's frequency stays unscaled, 0 to 1. */
static double yarn_share(uint32_t j, double low, double high)
{
    const double y = ((double)j - low) / fmax(0.001, high - low);
    return 1 - fmin(1, fmax(0, y));
}

sh_status sh_model_resolve_rope(sh_model *model, const float *factors, sh_error *err)
{
    const sh_model_config *c = &model->config;
    const uint32_t n = c->head_size / 2;
    scaling s = {0};
    SH_TRY(read_scaling(model->gguf, c, &s, err));
    if (c->rope_base <= 1)
        return sh_fail(err, SH_ERR_INVALID, "the base of RoPE is %g, not over 1",
                       (double)c->rope_base);
    double *frequency = sh_calloc(n, sizeof *frequency);
    if (frequency == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    const bool yarn = c->rope_scaling == SH_ROPE_YARN;
    const double low = fmax(0, floor(pair_of_turns(c, &s, s.beta_fast)));
    const double high = fmin(c->head_size - 1, ceil(pair_of_turns(c, &s, s.beta_slow)));
    for (uint32_t j = 0; j < n; j++) {
        double f = pow((double)c->rope_base, -2.0 * j / c->head_size);
        if (factors != NULL)
            f /= (double)factors[j];
        const double share = yarn ? yarn_share(j, low, high) : 0;
        frequency[j] = f / s.factor * (1 - share) + f * share;
    }
    model->rope_frequency = frequency;
    model->rope_magnitude = (float)(s.attn_factor * (yarn ? 1 + 0.1 * log(s.factor) : 1));
    return SH_OK;
}

/* ---- writing ---- */

sh_status sh_model_config_write(const sh_model_config *c, sh_gguf_writer *w, sh_error *err)
{
    const struct {
        const char *suffix;
        uint32_t value;
    } numbers[] = {
        {"context_length", c->context},         {"embedding_length", c->width},
        {"block_count", c->n_layers},           {"feed_forward_length", c->ffn},
        {"attention.head_count", c->n_heads},   {"attention.head_count_kv", c->n_kv_heads},
        {"rope.dimension_count", c->head_size}, {"vocab_size", c->vocab},
        {"attention.key_length", c->head_size}, {"attention.value_length", c->head_size},
    };
    /* The last two only where the width does not say it. */
    const bool usual = c->head_size * c->n_heads == c->width;
    sh_status status = sh_gguf_writer_set_string(w, "general.architecture", sh_arch_name(c->arch));
    for (size_t i = 0; status == SH_OK && i < SH_COUNT(numbers) - (usual ? 2 : 0); i++)
        status = sh_gguf_writer_set_u32(w, name_of(c, numbers[i].suffix).text, numbers[i].value);
    if (status == SH_OK)
        status = sh_gguf_writer_set_f32(w, name_of(c, "attention.layer_norm_rms_epsilon").text,
                                        c->norm_eps);
    if (status == SH_OK)
        status = sh_gguf_writer_set_f32(w, name_of(c, "rope.freq_base").text, c->rope_base);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "no memory for the keys of a model");
}
