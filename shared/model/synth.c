/*
 * Made-up models. Each row of each tensor has a random stream of its own, named by (seed, tensor,
 * row), so that the bytes do not depend on the order in which rows are made.
 */
#include "shared/model/synth.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/rng.h"

#define PURPOSE_TABLE    0x7379u
#define PURPOSE_ADAPTER  0x7361u
#define NORMALS          65536u /* one for each 16 bits */
#define VECTOR_SIGMA     0.1f
#define WRITE_BYTES      (256u << 10)
#define TOKEN_BYTES_MAX  16
#define FIRST_BYTE_TOKEN 3
#define FIRST_WORD       (FIRST_BYTE_TOKEN + 256)

static const sh_synth_shape shapes[] = {
    {"2.6m", SH_ARCH_LLAMA, 4, 256, 4, 2, 64, 512, 1024, 512, true, 10000},
    {"15m", SH_ARCH_LLAMA, 6, 288, 6, 6, 48, 768, 32000, 2048, true, 10000},
    {"135m", SH_ARCH_LLAMA, 30, 576, 9, 3, 64, 1536, 49152, 8192, true, 100000},
    {"1.1b", SH_ARCH_LLAMA, 22, 2048, 32, 4, 64, 5632, 32000, 2048, false, 10000},
    {"0.5b", SH_ARCH_QWEN2, 24, 896, 14, 2, 64, 4864, 151936, 32768, true, 1e6f},
    {"0.6b", SH_ARCH_QWEN3, 28, 1024, 16, 8, 128, 3072, 151936, 32768, true, 1e6f},
    {"tiny-llama", SH_ARCH_LLAMA, 2, 64, 4, 2, 16, 96, 320, 512, false, 10000},
    {"tiny-qwen2", SH_ARCH_QWEN2, 2, 64, 4, 2, 16, 96, 320, 512, true, 10000},
    {"tiny-qwen3", SH_ARCH_QWEN3, 2, 64, 4, 2, 32, 96, 320, 512, true, 10000},
};

sh_status sh_synth_find(const char *name, const sh_synth_shape **out, sh_error *err)
{
    char names[256] = "";
    for (size_t i = 0; i < SH_COUNT(shapes); i++) {
        if (strcmp(name, shapes[i].name) == 0) {
            *out = &shapes[i];
            return SH_OK;
        }
        const size_t at = strlen(names);
        snprintf(names + at, sizeof names - at, "%s%s", i > 0 ? ", " : "", shapes[i].name);
    }
    return sh_fail(err, SH_ERR_USAGE, "no shape '%.32s'; there are %s", name, names);
}

/* ---- random rows ---- */

static uint64_t mix(uint64_t z) /* splitmix64's finalizer (Steele et al. 2014) */
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void fill_table(float *normals, uint64_t seed)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, PURPOSE_TABLE);
    for (size_t i = 0; i < NORMALS; i++)
        normals[i] = sh_rng_normal(&rng);
}

static void fill_row(const float *normals, uint64_t stream, float mean, float sigma, float *x,
                     size_t n)
{
    uint64_t state = stream;
    for (size_t i = 0; i < n; i += 4) {
        state += 0x9e3779b97f4a7c15u;
        const uint64_t r = mix(state);
        for (size_t k = 0; k < 4 && i + k < n; k++)
            x[i + k] = mean + sigma * normals[r >> (16 * k) & (NORMALS - 1)];
    }
}

/* ---- the plan: what tensors there are ---- */

typedef enum { DRAW_MATRIX, DRAW_NORM, DRAW_BIAS, DRAW_FREQS } draw_kind;
typedef struct {
    char name[SH_GGUF_NAME_MAX];
    draw_kind kind;
    uint32_t rows, columns; /* rows 1: a vector */
} planned;

typedef struct {
    const sh_synth_options *o;
    sh_gguf_writer *writer;
    sh_gguf_stream *stream;
    planned *tensors;
    size_t n, cap;
    float *normals; /* [NORMALS] */
} synth;

static sh_type type_of(const synth *s, const planned *p)
{
    if (p->kind != DRAW_MATRIX)
        return SH_TYPE_F32;
    return sh_type_row_bytes(s->o->type, p->columns) > 0 ? s->o->type : SH_TYPE_F16;
}

static sh_status plan(synth *s, const char *name, draw_kind kind, uint32_t rows, uint32_t columns,
                      sh_error *err)
{
    planned p = {.kind = kind, .rows = rows, .columns = columns};
    const uint64_t ne[] = {columns, rows};
    snprintf(p.name, sizeof p.name, "%s", name);
    SH_TRY(sh_gguf_writer_add_tensor(s->writer, name, type_of(s, &p), ne,
                                     kind == DRAW_MATRIX ? 2 : 1, NULL, err));
    sh_status status =
        sh_array_reserve((void **)&s->tensors, &s->cap, s->n + 1, sizeof p, SH_GGUF_TENSORS_MAX);
    if (status != SH_OK)
        return sh_fail(err, status, "no room for the tensor '%s'", name);
    s->tensors[s->n++] = p;
    return SH_OK;
}

static sh_status plan_layer(synth *s, uint32_t layer, sh_error *err)
{
    const sh_synth_shape *c = s->o->shape;
    const uint32_t q = c->n_heads * c->head_size, kv = c->n_kv_heads * c->head_size;
    const struct {
        const char *name;
        draw_kind kind;
        uint32_t rows, columns;
        int only; /* an sh_arch, -1: all */
    } parts[] = {
        {"attn_norm.weight", DRAW_NORM, 1, c->width, -1},
        {"ffn_norm.weight", DRAW_NORM, 1, c->width, -1},
        {"attn_q.weight", DRAW_MATRIX, q, c->width, -1},
        {"attn_k.weight", DRAW_MATRIX, kv, c->width, -1},
        {"attn_v.weight", DRAW_MATRIX, kv, c->width, -1},
        {"attn_output.weight", DRAW_MATRIX, c->width, q, -1},
        {"ffn_gate.weight", DRAW_MATRIX, c->ffn, c->width, -1},
        {"ffn_up.weight", DRAW_MATRIX, c->ffn, c->width, -1},
        {"ffn_down.weight", DRAW_MATRIX, c->width, c->ffn, -1},
        {"attn_q.bias", DRAW_BIAS, 1, q, SH_ARCH_QWEN2},
        {"attn_k.bias", DRAW_BIAS, 1, kv, SH_ARCH_QWEN2},
        {"attn_v.bias", DRAW_BIAS, 1, kv, SH_ARCH_QWEN2},
        {"attn_q_norm.weight", DRAW_NORM, 1, c->head_size, SH_ARCH_QWEN3},
        {"attn_k_norm.weight", DRAW_NORM, 1, c->head_size, SH_ARCH_QWEN3},
    };
    for (size_t i = 0; i < SH_COUNT(parts); i++) {
        char name[SH_GGUF_NAME_MAX];
        if (parts[i].only >= 0 && parts[i].only != (int)c->arch)
            continue;
        snprintf(name, sizeof name, "blk.%u.%s", layer, parts[i].name);
        SH_TRY(plan(s, name, parts[i].kind, parts[i].rows, parts[i].columns, err));
    }
    return SH_OK;
}

static sh_status plan_all(synth *s, sh_error *err)
{
    const sh_synth_shape *c = s->o->shape;
    SH_TRY(plan(s, "token_embd.weight", DRAW_MATRIX, c->vocab, c->width, err));
    SH_TRY(plan(s, "output_norm.weight", DRAW_NORM, 1, c->width, err));
    if (!c->tied_output)
        SH_TRY(plan(s, "output.weight", DRAW_MATRIX, c->vocab, c->width, err));
    if (s->o->rope_freqs)
        SH_TRY(plan(s, "rope_freqs.weight", DRAW_FREQS, 1, c->head_size / 2, err));
    for (uint32_t i = 0; i < c->n_layers; i++)
        SH_TRY(plan_layer(s, i, err));
    return SH_OK;
}

/* ---- keys ---- */

static sh_status set_shape_keys(sh_gguf_writer *w, const sh_synth_options *o)
{
    const sh_synth_shape *c = o->shape;
    const sh_model_config config = {.arch = c->arch,
                                    .n_layers = c->n_layers,
                                    .width = c->width,
                                    .n_heads = c->n_heads,
                                    .n_kv_heads = c->n_kv_heads,
                                    .head_size = c->head_size,
                                    .ffn = c->ffn,
                                    .vocab = c->vocab,
                                    .context = c->context,
                                    .rope_base = c->rope_base,
                                    .norm_eps = 1e-5f};
    char key[96], text[64];
    snprintf(text, sizeof text, "synth-%s", c->name);
    SH_TRY(sh_model_config_write(&config, w, NULL));
    SH_TRY(sh_gguf_writer_set_string(w, "general.name", text));
    SH_TRY(sh_gguf_writer_set_type(w, o->type));
    if (o->rope == SH_ROPE_PLAIN)
        return SH_OK;
    snprintf(key, sizeof key, "%s.rope.scaling.type", sh_arch_name(c->arch));
    SH_TRY(sh_gguf_writer_set_string(w, key, o->rope == SH_ROPE_YARN ? "yarn" : "linear"));
    snprintf(key, sizeof key, "%s.rope.scaling.factor", sh_arch_name(c->arch));
    SH_TRY(sh_gguf_writer_set_f32(w, key, o->rope_factor));
    snprintf(key, sizeof key, "%s.rope.scaling.original_context_length", sh_arch_name(c->arch));
    return sh_gguf_writer_set_u32(w, key, (uint32_t)((float)c->context / o->rope_factor));
}

static void spell_token(uint32_t id, char text[TOKEN_BYTES_MAX])
{
    static const char *const first[FIRST_BYTE_TOKEN] = {"<unk>", "<s>", "</s>"};
    if (id < FIRST_BYTE_TOKEN)
        snprintf(text, TOKEN_BYTES_MAX, "%s", first[id]);
    else if (id < FIRST_WORD)
        snprintf(text, TOKEN_BYTES_MAX, "<0x%02X>", id - FIRST_BYTE_TOKEN);
    else
        snprintf(text, TOKEN_BYTES_MAX, "\xe2\x96\x81w%u", id - FIRST_WORD);
}

static sh_status set_vocabulary(sh_gguf_writer *w, uint32_t n)
{
    enum { KIND_NORMAL = 1, KIND_UNKNOWN, KIND_CONTROL, KIND_BYTE = 6 };
    sh_status status = SH_ERR_NO_MEMORY;
    char(*texts)[TOKEN_BYTES_MAX] = sh_calloc(n, sizeof *texts);
    const char **pointers = sh_calloc(n, sizeof *pointers);
    uint32_t *lengths = sh_calloc(n, sizeof *lengths);
    float *scores = sh_calloc(n, sizeof *scores);
    int32_t *kinds = sh_calloc(n, sizeof *kinds);
    if (texts == NULL || pointers == NULL || lengths == NULL || scores == NULL || kinds == NULL)
        goto cleanup;
    for (uint32_t i = 0; i < n; i++) {
        spell_token(i, texts[i]);
        pointers[i] = texts[i];
        lengths[i] = (uint32_t)strlen(texts[i]);
        scores[i] = i < FIRST_WORD ? 0.0f : -(float)(i - FIRST_WORD);
        kinds[i] = i < FIRST_WORD ? KIND_BYTE : KIND_NORMAL;
        if (i < FIRST_BYTE_TOKEN)
            kinds[i] = i == 0 ? KIND_UNKNOWN : KIND_CONTROL;
    }
    SH_GOTO(sh_gguf_writer_set_string(w, "tokenizer.ggml.model", "llama"));
    SH_GOTO(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", pointers, lengths, n));
    SH_GOTO(sh_gguf_writer_set_f32s(w, "tokenizer.ggml.scores", scores, n));
    SH_GOTO(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", kinds, n));
    SH_GOTO(sh_gguf_writer_set_u32(w, "tokenizer.ggml.bos_token_id", 1));
    SH_GOTO(sh_gguf_writer_set_u32(w, "tokenizer.ggml.eos_token_id", 2));
    SH_GOTO(sh_gguf_writer_set_u32(w, "tokenizer.ggml.unknown_token_id", 0));
    SH_GOTO(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_bos_token", true));

cleanup:
    free(texts);
    free(pointers);
    free(lengths);
    free(scores);
    free(kinds);
    return status;
}

/* ---- values ---- */

/* Llama 3.2's: high frequencies as they are, low ones an eighth, or something between. */
static void fill_freqs(float *x, size_t n)
{
    for (size_t j = 0; j < n; j++) {
        const double share = (double)j / (double)n;
        x[j] = (float)(share < 0.4 ? 1 : share < 0.7 ? 1 + (share - 0.4) / 0.3 * 7 : 8);
    }
}

static void draw_row(const synth *s, const planned *p, uint64_t stream, float *x)
{
    const float sigma = s->o->sigma > 0 ? s->o->sigma : SH_SYNTH_SIGMA;
    switch (p->kind) {
    case DRAW_MATRIX:
        fill_row(s->normals, stream, 0, sigma, x, p->columns);
        break;
    case DRAW_NORM:
        fill_row(s->normals, stream, 1, VECTOR_SIGMA, x, p->columns);
        break;
    case DRAW_BIAS:
        fill_row(s->normals, stream, 0, VECTOR_SIGMA, x, p->columns);
        break;
    case DRAW_FREQS:
        fill_freqs(x, p->columns);
        break;
    }
}

static sh_status write_tensor(synth *s, size_t index, sh_error *err)
{
    sh_status status = SH_OK;
    const planned *p = &s->tensors[index];
    const sh_type type = type_of(s, p);
    const size_t row_bytes = sh_type_row_bytes(type, p->columns);
    const size_t at_once = SH_MIN(SH_MAX(WRITE_BYTES / row_bytes, 1), p->rows);
    const uint64_t tensor_seed = mix(mix(s->o->seed) + index);
    float *x = sh_calloc(p->columns, sizeof *x);
    uint8_t *rows = sh_alloc_aligned(at_once * row_bytes);
    if (x == NULL || rows == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", p->name);
        goto cleanup;
    }
    for (size_t i = 0; i < p->rows; i += at_once) {
        const size_t end = SH_MIN(i + at_once, p->rows);
        for (size_t r = i; r < end; r++) {
            draw_row(s, p, mix(tensor_seed + r), x);
            sh_row_quantize(type, x, rows + (r - i) * row_bytes, p->columns);
        }
        SH_GOTO(sh_gguf_stream_write(s->stream, rows, (end - i) * row_bytes, err));
    }

cleanup:
    free(x);
    free(rows);
    return status;
}

static sh_status check_options(const sh_synth_options *o, sh_error *err)
{
    const sh_type_info *info = sh_type_get((uint32_t)o->type);
    if (info == NULL || !info->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "cannot write %s; F32, F16, BF16, Q8_0 and Q4_0 can be written",
                       info == NULL ? "an unknown type" : info->name);
    if (o->rope_freqs && o->shape->arch != SH_ARCH_LLAMA)
        return sh_fail(err, SH_ERR_USAGE, "only llama has factors of RoPE");
    if (o->rope != SH_ROPE_PLAIN && !(o->rope_factor >= 1 && o->rope_factor <= 64))
        return sh_fail(err, SH_ERR_USAGE, "a factor of RoPE of %g is not in 1..64",
                       (double)o->rope_factor);
    return SH_OK;
}

sh_status sh_synth_model(const sh_synth_options *options, const char *out_path, sh_error *err)
{
    sh_status status;
    synth s = {.o = options};
    SH_TRY(check_options(options, err));
    s.normals = sh_calloc(NORMALS, sizeof *s.normals);
    if (s.normals == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    fill_table(s.normals, options->seed);
    SH_GOTO(sh_gguf_writer_create(&s.writer, err));
    status = set_shape_keys(s.writer, options);
    if (status == SH_OK)
        status = set_vocabulary(s.writer, options->shape->vocab);
    if (status != SH_OK)
        SH_GOTO(sh_fail(err, status, "out of memory for the keys"));
    SH_GOTO(plan_all(&s, err));
    SH_GOTO(sh_gguf_stream_begin(s.writer, out_path, &s.stream, err));
    for (size_t i = 0; i < s.n; i++) {
        SH_GOTO(write_tensor(&s, i, err));
        if (options->progress != NULL)
            options->progress(options->arg, i + 1, s.n);
    }
    SH_GOTO(sh_gguf_stream_finish(&s.stream, err));

cleanup:
    sh_gguf_stream_cancel(&s.stream);
    sh_gguf_writer_destroy(&s.writer);
    free(s.tensors);
    free(s.normals);
    return status;
}

/* ---- adapter ---- */

static void fill_pairs(sh_adapter *adapter, uint64_t seed, const float *normals)
{
    const size_t n = (size_t)adapter->n_layers * SH_LAYER_MATRICES;
    for (size_t i = 0; i < n; i++) {
        sh_lora_pair *p = &adapter->pairs[i];
        const float a = 1 / sqrtf((float)p->in), b = 0.01f;
        fill_row(normals, mix(mix(seed) + 2 * i), 0, a, p->a, (size_t)p->rank * p->in);
        fill_row(normals, mix(mix(seed) + 2 * i + 1), 0, b, p->b, (size_t)p->rank * p->out);
    }
}

sh_status sh_synth_adapter(const sh_synth_shape *shape, uint32_t rank, uint64_t seed,
                           const char *out_path, sh_error *err)
{
    sh_status status;
    sh_adapter *adapter = NULL;
    sh_buf bytes;
    const sh_model_config config = {
        .arch = shape->arch,
        .n_layers = shape->n_layers,
        .width = shape->width,
        .n_heads = shape->n_heads,
        .n_kv_heads = shape->n_kv_heads,
        .head_size = shape->head_size,
        .ffn = shape->ffn,
        .vocab = shape->vocab,
        .context = shape->context,
        .tied_output = shape->tied_output,
    };
    if (rank == 0 || rank > SH_ADAPTER_RANK_MAX)
        return sh_fail(err, SH_ERR_USAGE, "rank %u is not in 1..%d", rank, SH_ADAPTER_RANK_MAX);
    sh_buf_init(&bytes, SIZE_MAX);
    float *normals = sh_calloc(NORMALS, sizeof *normals);
    if (normals == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    fill_table(normals, seed ^ PURPOSE_ADAPTER);
    SH_GOTO(sh_adapter_create(&config, rank, 2.0f * (float)rank, &adapter, err));
    fill_pairs(adapter, seed, normals);
    SH_GOTO(sh_adapter_encode(adapter, &bytes, err));
    SH_GOTO(sh_file_write_atomic(out_path, bytes.data, bytes.len, err));

cleanup:
    sh_adapter_destroy(&adapter);
    sh_buf_release(&bytes);
    free(normals);
    return status;
}
