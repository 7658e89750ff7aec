#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/model/safetensors.h"
#include "tests/model/hf_small.h"
#include "tests/model/util.h"

#define POSITIONS_MAX 64
#define MARK          "\xe2\x96\x81"

/* ---- weights ---- */

static void add(hf_model *m, sh_rng *rng, const char *name, uint32_t rows, uint32_t columns)
{
    hf_tensor *t = &m->tensors[m->n++];
    const size_t n = (size_t)SH_MAX(rows, 1) * columns;
    assert_true(m->n <= HF_TENSORS_MAX);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows;
    t->columns = columns;
    t->values = calloc(n, sizeof *t->values);
    uint8_t *row = calloc(n, sizeof(float));
    assert_non_null(t->values);
    assert_non_null(row);
    const bool norm = strstr(name, "norm") != NULL;
    const float spread = norm ? 0.1f : rows == 0 ? 0.5f : 1.0f / sqrtf((float)columns);
    for (size_t i = 0; i < n; i++)
        t->values[i] = (norm ? 1.0f : 0) + spread * sh_rng_normal(rng);
    sh_row_quantize(m->o.type, t->values, row, n);
    sh_row_dequantize(m->o.type, row, t->values, n);
    free(row);
}

static void add_layer(hf_model *m, sh_rng *rng, uint32_t layer)
{
    const uint32_t q = m->n_heads * m->head_size, kv = m->n_kv_heads * m->head_size;
    const bool bias = strncmp(m->o.architecture, "Qwen2", 5) == 0 || m->o.bias;
    const bool norms = strncmp(m->o.architecture, "Qwen3", 5) == 0;
    const struct {
        const char *name;
        uint32_t rows, columns;
        bool wanted;
    } list[] = {
        {"input_layernorm.weight", 0, m->width, true},
        {"post_attention_layernorm.weight", 0, m->width, true},
        {"self_attn.q_proj.weight", q, m->width, true},
        {"self_attn.k_proj.weight", kv, m->width, true},
        {"self_attn.v_proj.weight", kv, m->width, true},
        {"self_attn.o_proj.weight", m->width, q, true},
        {"self_attn.q_proj.bias", 0, q, bias},
        {"self_attn.k_proj.bias", 0, kv, bias},
        {"self_attn.v_proj.bias", 0, kv, bias},
        {"self_attn.q_norm.weight", 0, m->head_size, norms},
        {"self_attn.k_norm.weight", 0, m->head_size, norms},
        {"mlp.gate_proj.weight", m->ffn, m->width, true},
        {"mlp.up_proj.weight", m->ffn, m->width, true},
        {"mlp.down_proj.weight", m->width, m->ffn, true},
    };
    for (size_t i = 0; i < SH_COUNT(list); i++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%u.%s", layer, list[i].name);
        if (list[i].wanted)
            add(m, rng, name, list[i].rows, list[i].columns);
    }
}

/* ---- files ---- */

static void write_file(const char *folder, const char *name, const void *bytes, size_t n)
{
    char path[SH_PATH_BYTES];
    CHECK_OK(sh_path_join(path, sizeof path, folder, name, err));
    CHECK_OK(sh_file_write_atomic(path, bytes, n, err));
}

static void write_json(const char *folder, const char *name, const json_t *value)
{
    char path[SH_PATH_BYTES];
    CHECK_OK(sh_path_join(path, sizeof path, folder, name, err));
    CHECK_OK(sh_json_save(path, value, err));
}

/* Bytes as GPT-2's byte-level alphabet has them, in UTF-8. */
static void byte_symbol(unsigned byte, char out[4])
{
    unsigned next = 256, code = byte;
    for (unsigned b = 0; b < 256; b++) {
        const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (!printable && b == byte)
            code = next;
        next += !printable;
    }
    memset(out, 0, 4);
    if (code < 128) {
        out[0] = (char)code;
    } else {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
    }
}

static json_t *byte_level_tokenizer(void)
{
    json_error_t where;
    json_t *o = json_loads(
        "{\"added_tokens\": [{\"id\": 261, \"content\": \"<|end|>\", \"special\": true},"
        "  {\"id\": 262, \"content\": \"<note>\", \"special\": false}],"
        " \"normalizer\": null,"
        " \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false,"
        "  \"use_regex\": true},"
        " \"decoder\": {\"type\": \"ByteLevel\"},"
        " \"model\": {\"type\": \"BPE\", \"vocab\": {\"th\": 256, \"the\": 257, \"\\u0120a\": 258,"
        "   \"in\": 259, \"\\u0120the\": 260},"
        "  \"merges\": [\"t h\", \"th e\", [\"\\u0120\", \"a\"], \"i n\", \"\\u0120 the\"]}}",
        0, &where);
    assert_non_null(o);
    json_t *vocab = json_object_get(json_object_get(o, "model"), "vocab");
    for (unsigned b = 0; b < 256; b++) {
        char text[4];
        byte_symbol(b, text);
        sh_json_set(vocab, text, json_integer(b));
    }
    return o;
}

static json_t *sentencepiece_tokenizer(void)
{
    static const char *const pieces[] = {MARK, "t",   "h",        "e",     "a",
                                         "th", "the", MARK "the", MARK "a"};
    json_error_t where;
    json_t *o = json_loads(
        "{\"added_tokens\": [{\"id\": 0, \"content\": \"<unk>\", \"special\": true},"
        "  {\"id\": 1, \"content\": \"<s>\", \"special\": true},"
        "  {\"id\": 2, \"content\": \"</s>\", \"special\": true}],"
        " \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": ["
        "  {\"type\": \"Prepend\", \"prepend\": \"\\u2581\"},"
        "  {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"}, \"content\": \"\\u2581\"}]},"
        " \"pre_tokenizer\": null,"
        " \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": ["
        "  {\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}},"
        "  {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}]},"
        " \"model\": {\"type\": \"BPE\", \"byte_fallback\": true, \"unk_token\": \"<unk>\","
        "  \"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2},"
        "  \"merges\": [\"t h\", \"th e\", \"\\u2581 the\", \"\\u2581 a\"]}}",
        0, &where);
    assert_non_null(o);
    json_t *vocab = json_object_get(json_object_get(o, "model"), "vocab");
    for (unsigned b = 0; b < 256; b++) {
        char text[8];
        snprintf(text, sizeof text, "<0x%02X>", b);
        sh_json_set(vocab, text, json_integer(3 + b));
    }
    for (size_t i = 0; i < SH_COUNT(pieces); i++)
        sh_json_set(vocab, pieces[i], json_integer((json_int_t)(259 + i)));
    return o;
}

static void make_config(hf_model *m)
{
    json_t *o = json_object(), *names = json_array();
    json_array_append_new(names, json_string(m->o.architecture));
    sh_json_set(o, "architectures", names);
    sh_json_set(o, "num_hidden_layers", json_integer(m->n_layers));
    sh_json_set(o, "hidden_size", json_integer(m->width));
    sh_json_set(o, "intermediate_size", json_integer(m->ffn));
    sh_json_set(o, "num_attention_heads", json_integer(m->n_heads));
    sh_json_set(o, "num_key_value_heads", json_integer(m->n_kv_heads));
    sh_json_set(o, "vocab_size", json_integer(m->vocab));
    sh_json_set(o, "max_position_embeddings", json_integer(POSITIONS_MAX));
    sh_json_set(o, "rms_norm_eps", json_real(1e-5));
    sh_json_set(o, "rope_theta", json_real(m->rope_base));
    sh_json_set(o, "hidden_act", json_string("silu"));
    sh_json_set(o, "tie_word_embeddings", json_boolean(m->o.tied));
    sh_json_set(o, "bos_token_id", json_integer(1));
    sh_json_set(o, "eos_token_id", json_integer(2));
    if (m->head_size != m->width / m->n_heads)
        sh_json_set(o, "head_dim", json_integer(m->head_size));
    if (m->o.config != NULL) {
        json_t *more = json_loads(m->o.config, 0, NULL);
        assert_non_null(more);
        assert_int_equal(json_object_update(o, more), 0);
        json_decref(more);
    }
    m->config = o;
}

static void write_tensors(const hf_model *m, const char *folder)
{
    const unsigned shards = SH_MAX(m->o.shards, 1u);
    json_t *index = json_object(), *map = json_object();
    sh_json_set(index, "weight_map", map);
    for (unsigned s = 0; s < shards; s++) {
        sh_safetensor list[HF_TENSORS_MAX];
        uint8_t *bytes[HF_TENSORS_MAX];
        size_t n = 0;
        char name[64] = "model.safetensors", path[SH_PATH_BYTES];
        if (m->o.shards > 0)
            snprintf(name, sizeof name, "model-%05u-of-%05u.safetensors", s + 1, shards);
        for (size_t i = s; i < m->n; i += shards) {
            const hf_tensor *t = &m->tensors[i];
            const size_t values = (size_t)SH_MAX(t->rows, 1) * t->columns;
            bytes[n] = calloc(values, sizeof(float));
            assert_non_null(bytes[n]);
            sh_row_quantize(m->o.type, t->values, bytes[n], values);
            list[n] = (sh_safetensor){.name = t->name,
                                      .type = m->o.type,
                                      .is_float = true,
                                      .n_dims = t->rows == 0 ? 1 : 2,
                                      .shape = {t->rows == 0 ? t->columns : t->rows, t->columns},
                                      .data = bytes[n],
                                      .bytes = sh_type_row_bytes(m->o.type, values)};
            n++;
            sh_json_set(map, t->name, json_string(name));
        }
        CHECK_OK(sh_path_join(path, sizeof path, folder, name, err));
        CHECK_OK(sh_safetensors_save(path, list, n, err));
        for (size_t i = 0; i < n; i++)
            free(bytes[i]);
    }
    if (m->o.shards > 0)
        write_json(folder, "model.safetensors.index.json", index);
    json_decref(index);
}

hf_model *hf_make(const char *folder, const hf_options *options)
{
    sh_rng rng;
    hf_model *m = calloc(1, sizeof *m);
    assert_non_null(m);
    const bool qwen3 = strncmp(options->architecture, "Qwen3", 5) == 0;
    *m = (hf_model){.o = *options,
                    .n_layers = 2,
                    .width = 32,
                    .n_heads = 4,
                    .n_kv_heads = 2,
                    .head_size = qwen3 ? 16 : 8,
                    .ffn = 64,
                    .vocab = 280,
                    .rope_base = 5000};
    sh_rng_init(&rng, options->seed, 0, 1);
    add(m, &rng, "model.embed_tokens.weight", m->vocab, m->width);
    for (uint32_t i = 0; i < m->n_layers; i++)
        add_layer(m, &rng, i);
    add(m, &rng, "model.norm.weight", 0, m->width);
    if (!m->o.tied)
        add(m, &rng, "lm_head.weight", m->vocab, m->width);
    make_config(m);
    write_json(folder, "config.json", m->config);
    json_t *tokenizer = m->o.sentencepiece ? sentencepiece_tokenizer() : byte_level_tokenizer();
    write_json(folder, "tokenizer.json", tokenizer);
    json_decref(tokenizer);
    if (m->o.tokenizer_config != NULL)
        write_file(folder, "tokenizer_config.json", m->o.tokenizer_config,
                   strlen(m->o.tokenizer_config));
    write_tensors(m, folder);
    return m;
}

void hf_destroy(hf_model **model)
{
    hf_model *m = *model;
    for (size_t i = 0; i < m->n; i++)
        free(m->tensors[i].values);
    json_decref(m->config);
    free(m);
    *model = NULL;
}

void hf_remove(const char *folder)
{
    DIR *dir = opendir(folder);
    if (dir == NULL)
        return;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        if (entry->d_name[0] != '.')
            unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
    rmdir(folder);
}

static const hf_tensor *find(const hf_model *m, const char *name)
{
    for (size_t i = 0; i < m->n; i++)
        if (strcmp(m->tensors[i].name, name) == 0)
            return &m->tensors[i];
    return NULL;
}

const hf_tensor *hf_find(const hf_model *m, const char *name)
{
    const hf_tensor *t = find(m, name);
    if (t == NULL)
        fail_msg("no tensor '%s'", name);
    return t;
}

/* ---- forward ---- */

static const hf_tensor *of_layer(const hf_model *m, uint32_t layer, const char *name)
{
    char full[96];
    snprintf(full, sizeof full, "model.layers.%u.%s", layer, name);
    return find(m, full);
}

static void norm(const hf_tensor *w, const double *x, double *out)
{
    double sum = 0;
    for (uint32_t i = 0; i < w->columns; i++)
        sum += x[i] * x[i];
    const double scale = 1 / sqrt(sum / w->columns + 1e-5);
    for (uint32_t i = 0; i < w->columns; i++)
        out[i] = x[i] * scale * (double)w->values[i];
}

static void product(const hf_tensor *w, const hf_tensor *bias, const double *x, double *out)
{
    for (uint32_t r = 0; r < w->rows; r++) {
        out[r] = bias != NULL ? (double)bias->values[r] : 0;
        for (uint32_t c = 0; c < w->columns; c++)
            out[r] += (double)w->values[(size_t)r * w->columns + c] * x[c];
    }
}

/* The frequency of pair j, with what `rope_scaling` makes of it. */
static double frequency(const hf_model *m, uint32_t j)
{
    const json_t *s = json_object_get(m->config, "rope_scaling");
    const double f = pow(m->rope_base, -2.0 * j / m->head_size);
    const char *type = json_string_value(json_object_get(s, "rope_type"));
    if (type == NULL)
        return f;
    const double factor = json_number_value(json_object_get(s, "factor"));
    if (strcmp(type, "linear") == 0)
        return f / factor;
    assert_string_equal(type, "llama3");
    const double low = json_number_value(json_object_get(s, "low_freq_factor"));
    const double high = json_number_value(json_object_get(s, "high_freq_factor"));
    const double old = json_number_value(json_object_get(s, "original_max_position_embeddings"));
    const double wave = 2 * M_PI / f;
    if (wave < old / high)
        return f;
    if (wave > old / low)
        return f / factor;
    const double smooth = (old / wave - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
}

/* transformers' rotate_half. */
static void rotate(const hf_model *m, double *head, uint32_t position)
{
    const uint32_t half = m->head_size / 2;
    for (uint32_t j = 0; j < half; j++) {
        const double angle = position * frequency(m, j), a = head[j], b = head[j + half];
        head[j] = a * cos(angle) - b * sin(angle);
        head[j + half] = b * cos(angle) + a * sin(angle);
    }
}

static void heads(const hf_model *m, const hf_tensor *w, uint32_t n, uint32_t position, double *x)
{
    for (uint32_t h = 0; h < n; h++) {
        if (w != NULL)
            norm(w, x + (size_t)h * m->head_size, x + (size_t)h * m->head_size);
        rotate(m, x + (size_t)h * m->head_size, position);
    }
}

static void attend(const hf_model *m, const double *q, const double *k, const double *v, uint32_t n,
                   double *out)
{
    const uint32_t hd = m->head_size, kv = m->n_kv_heads * hd;
    double weights[POSITIONS_MAX];
    for (uint32_t h = 0; h < m->n_heads; h++) {
        const uint32_t at = h / (m->n_heads / m->n_kv_heads) * hd;
        double sum = 0;
        for (uint32_t p = 0; p < n; p++) {
            double dot = 0;
            for (uint32_t i = 0; i < hd; i++)
                dot += q[h * hd + i] * k[p * kv + at + i];
            weights[p] = exp(dot / sqrt(hd));
            sum += weights[p];
        }
        for (uint32_t i = 0; i < hd; i++) {
            out[h * hd + i] = 0;
            for (uint32_t p = 0; p < n; p++)
                out[h * hd + i] += weights[p] / sum * v[p * kv + at + i];
        }
    }
}

typedef struct {
    double x[64], h[64], q[64], o[64], gate[64], up[64];
    double k[2][POSITIONS_MAX * 64], v[2][POSITIONS_MAX * 64];
} scratch;

static void run_layer(const hf_model *m, uint32_t l, uint32_t position, scratch *s)
{
    const uint32_t kv = m->n_kv_heads * m->head_size;
    double *k = s->k[l] + (size_t)position * kv, *v = s->v[l] + (size_t)position * kv;
    norm(of_layer(m, l, "input_layernorm.weight"), s->x, s->h);
    product(of_layer(m, l, "self_attn.q_proj.weight"), of_layer(m, l, "self_attn.q_proj.bias"),
            s->h, s->q);
    product(of_layer(m, l, "self_attn.k_proj.weight"), of_layer(m, l, "self_attn.k_proj.bias"),
            s->h, k);
    product(of_layer(m, l, "self_attn.v_proj.weight"), of_layer(m, l, "self_attn.v_proj.bias"),
            s->h, v);
    heads(m, of_layer(m, l, "self_attn.q_norm.weight"), m->n_heads, position, s->q);
    heads(m, of_layer(m, l, "self_attn.k_norm.weight"), m->n_kv_heads, position, k);
    attend(m, s->q, s->k[l], s->v[l], position + 1, s->o);
    product(of_layer(m, l, "self_attn.o_proj.weight"), NULL, s->o, s->h);
    for (uint32_t i = 0; i < m->width; i++)
        s->x[i] += s->h[i];
    norm(of_layer(m, l, "post_attention_layernorm.weight"), s->x, s->h);
    product(of_layer(m, l, "mlp.gate_proj.weight"), NULL, s->h, s->gate);
    product(of_layer(m, l, "mlp.up_proj.weight"), NULL, s->h, s->up);
    for (uint32_t i = 0; i < m->ffn; i++)
        s->gate[i] = s->gate[i] / (1 + exp(-s->gate[i])) * s->up[i];
    product(of_layer(m, l, "mlp.down_proj.weight"), NULL, s->gate, s->h);
    for (uint32_t i = 0; i < m->width; i++)
        s->x[i] += s->h[i];
}

void hf_forward(const hf_model *m, const int32_t *tokens, uint32_t n, double *logits)
{
    const hf_tensor *embed = hf_find(m, "model.embed_tokens.weight");
    const hf_tensor *head = m->o.tied ? embed : hf_find(m, "lm_head.weight");
    scratch *s = calloc(1, sizeof *s);
    assert_non_null(s);
    assert_true(n <= POSITIONS_MAX);
    for (uint32_t p = 0; p < n; p++) {
        for (uint32_t i = 0; i < m->width; i++)
            s->x[i] = (double)embed->values[(size_t)tokens[p] * m->width + i];
        for (uint32_t l = 0; l < m->n_layers; l++)
            run_layer(m, l, p, s);
        norm(hf_find(m, "model.norm.weight"), s->x, s->h);
        product(head, NULL, s->h, logits + (size_t)p * m->vocab);
    }
    free(s);
}
