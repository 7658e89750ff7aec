#include "tests/model/tiny.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/rng.h"

#define TINY_BYTES_MAX (64u << 20)
#define ALIGNMENT      32
#define PURPOSE_TINY   0x7469
#define BYTE_TOKENS    256
#define FIRST_BYTE     3
#define FIRST_PIECE    (FIRST_BYTE + BYTE_TOKENS)

enum { GGUF_U32 = 4, GGUF_I32 = 5, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };
enum { KIND_NORMAL = 1, KIND_UNKNOWN, KIND_CONTROL, KIND_USER, KIND_UNUSED, KIND_BYTE };

#define MARK "\xe2\x96\x81"

/* In merge order: an earlier piece has the higher score. */
static const char *const pieces[] = {
    MARK,      MARK "t",  "he",      MARK "a",   "in",       "er",     "on",      "re",
    "an",      "nd",      "at",      MARK "the", MARK "s",   MARK "w", "is",      "it",
    "en",      "ou",      MARK "an", MARK "and", MARK "c",   MARK "o", MARK "of", "ing",
    MARK "to", MARK "in", "ed",      MARK "b",   MARK "f",   MARK "h", "or",      "ar",
    "es",      MARK "he", MARK "it", MARK "is",  "ll",       "al",     "st",      "le",
    "ve",      MARK MARK, "a",       "b",        "c",        "d",      "e",       "f",
    "g",       "h",       "i",       "j",        "k",        "l",      "m",       "n",
    "o",       "p",       "q",       "r",        "s",        "t",      "u",       "v",
    "w",       "x",       "y",       "z",        "<|user|>",
};

typedef struct {
    const tiny_options *o;
    sh_buf keys, infos, data;
    uint64_t n_keys, n_tensors;
    sh_rng rng;
    bool failed;
} writer;

static void put(writer *w, sh_buf *buf, const void *bytes, size_t n)
{
    if (sh_buf_append(buf, bytes, n) != SH_OK)
        w->failed = true;
}

static void put_u32(writer *w, sh_buf *buf, uint32_t v)
{
    put(w, buf, &v, sizeof v);
}

static void put_u64(writer *w, sh_buf *buf, uint64_t v)
{
    put(w, buf, &v, sizeof v);
}

static void put_string(writer *w, sh_buf *buf, const char *text)
{
    put_u64(w, buf, strlen(text));
    put(w, buf, text, strlen(text));
}

static bool start_key(writer *w, const char *key, uint32_t type)
{
    if (w->o->skip_key != NULL && strcmp(key, w->o->skip_key) == 0)
        return false;
    w->n_keys++;
    put_string(w, &w->keys, key);
    put_u32(w, &w->keys, type);
    return true;
}

static void key_u32(writer *w, const char *key, uint32_t v)
{
    if (w->o->u32_key != NULL && strcmp(key, w->o->u32_key) == 0)
        v = w->o->u32_value;
    if (start_key(w, key, GGUF_U32))
        put_u32(w, &w->keys, v);
}

static void key_f32(writer *w, const char *key, float v)
{
    if (start_key(w, key, GGUF_F32))
        put(w, &w->keys, &v, sizeof v);
}

static void key_bool(writer *w, const char *key, bool v)
{
    const uint8_t byte = v;
    if (start_key(w, key, GGUF_BOOL))
        put(w, &w->keys, &byte, 1);
}

static void key_string(writer *w, const char *key, const char *v)
{
    if (start_key(w, key, GGUF_STRING))
        put_string(w, &w->keys, v);
}

static void key_array(writer *w, const char *key, uint32_t element)
{
    w->n_keys++;
    put_string(w, &w->keys, key);
    put_u32(w, &w->keys, GGUF_ARRAY);
    put_u32(w, &w->keys, element);
    put_u64(w, &w->keys, tiny_vocab());
}

static uint32_t token_kind(uint32_t id)
{
    if (id == 0)
        return KIND_UNKNOWN;
    if (id < FIRST_BYTE)
        return KIND_CONTROL;
    if (id < FIRST_PIECE)
        return KIND_BYTE;
    return id + 1 == tiny_vocab() ? KIND_USER : KIND_NORMAL;
}

static void put_vocabulary(writer *w)
{
    static const char *const first[FIRST_BYTE] = {"<unk>", "<s>", "</s>"};
    const uint32_t n = tiny_vocab();
    key_array(w, "tokenizer.ggml.tokens", GGUF_STRING);
    for (uint32_t i = 0; i < n; i++) {
        char text[16];
        snprintf(text, sizeof text, "<0x%02X>", (unsigned)(i - FIRST_BYTE) & 255u);
        const char *piece = text;
        if (i < FIRST_BYTE)
            piece = first[i];
        else if (i >= FIRST_PIECE)
            piece = pieces[i - FIRST_PIECE];
        if (w->o->token_from != NULL && strcmp(piece, w->o->token_from) == 0)
            piece = w->o->token_to;
        put_string(w, &w->keys, piece);
    }
    key_array(w, "tokenizer.ggml.scores", GGUF_F32);
    for (uint32_t i = 0; i < n; i++) {
        const float score = i < FIRST_PIECE ? 0.0f : -(float)(i - FIRST_PIECE);
        put(w, &w->keys, &score, sizeof score);
    }
    key_array(w, "tokenizer.ggml.token_type", GGUF_I32);
    for (uint32_t i = 0; i < n; i++)
        put_u32(w, &w->keys, token_kind(i));
}

static void put_keys(writer *w)
{
    const tiny_options *o = w->o;
    key_string(w, "general.architecture", o->architecture != NULL ? o->architecture : "llama");
    key_string(w, "general.name", "tiny");
    key_u32(w, "llama.block_count", o->layers);
    key_u32(w, "llama.context_length", o->context);
    key_u32(w, "llama.embedding_length", o->width);
    key_u32(w, "llama.feed_forward_length", o->ffn);
    key_u32(w, "llama.attention.head_count", o->heads);
    key_u32(w, "llama.attention.head_count_kv", o->kv_heads);
    key_f32(w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    key_u32(w, "llama.rope.dimension_count", o->width / o->heads);
    key_f32(w, "llama.rope.freq_base", 10000.0f);
    key_u32(w, "llama.vocab_size", tiny_vocab());
    if (o->u32_key != NULL && strcmp(o->u32_key, "llama.expert_count") == 0)
        key_u32(w, "llama.expert_count", o->u32_value);
    if (o->string_key != NULL)
        key_string(w, o->string_key, o->string_value);
    key_string(w, "tokenizer.ggml.model", o->tokenizer != NULL ? o->tokenizer : "llama");
    put_vocabulary(w);
    key_u32(w, "tokenizer.ggml.bos_token_id", 1);
    key_u32(w, "tokenizer.ggml.eos_token_id", 2);
    key_u32(w, "tokenizer.ggml.unknown_token_id", 0);
    key_bool(w, "tokenizer.ggml.add_bos_token", o->add_bos);
}

static void put_row(writer *w, sh_type type, const float *x, uint32_t n)
{
    const size_t bytes = sh_type_row_bytes(type, n);
    uint8_t *row = calloc(1, bytes + 1);
    if (row == NULL || bytes == 0) {
        w->failed = true;
    } else if (type == SH_TYPE_BF16) { /* cut: good enough for random numbers */
        for (uint32_t i = 0; i < n; i++)
            memcpy(row + 2 * i, (const uint8_t *)&x[i] + 2, 2);
        put(w, &w->data, row, bytes);
    } else {
        sh_row_quantize(type, x, row, n);
        put(w, &w->data, row, bytes);
    }
    free(row);
}

/* rows == 0: a vector of values around `mean`. */
static void put_tensor(writer *w, const char *name, uint32_t rows, uint32_t columns, float std,
                       float mean)
{
    static const uint8_t zeros[ALIGNMENT];
    const sh_type type = rows == 0 ? SH_TYPE_F32 : w->o->type;
    float *x = calloc(columns, sizeof *x);
    if (x == NULL) {
        w->failed = true;
        return;
    }
    const bool skip = w->o->skip_tensor != NULL && strcmp(name, w->o->skip_tensor) == 0;
    if (!skip) {
        put(w, &w->data, zeros, (ALIGNMENT - w->data.len % ALIGNMENT) % ALIGNMENT);
        put_string(w, &w->infos, name);
        put_u32(w, &w->infos, rows == 0 ? 1 : 2);
        put_u64(w, &w->infos, columns);
        if (rows != 0)
            put_u64(w, &w->infos, rows);
        put_u32(w, &w->infos, type);
        put_u64(w, &w->infos, w->data.len);
        w->n_tensors++;
    }
    for (uint32_t r = 0; r < SH_MAX(rows, 1); r++) {
        for (uint32_t i = 0; i < columns; i++)
            x[i] = mean + std * sh_rng_normal(&w->rng);
        if (!skip)
            put_row(w, type, x, columns);
    }
    free(x);
}

static void put_layer(writer *w, uint32_t layer)
{
    const tiny_options *o = w->o;
    const uint32_t kv = o->width / o->heads * o->kv_heads;
    const struct {
        const char *name;
        uint32_t out, in;
    } matrices[] = {
        {"attn_q", o->width, o->width}, {"attn_k", kv, o->width},
        {"attn_v", kv, o->width},       {"attn_output", o->width, o->width},
        {"ffn_gate", o->ffn, o->width}, {"ffn_up", o->ffn, o->width},
        {"ffn_down", o->width, o->ffn},
    };
    char name[64];
    snprintf(name, sizeof name, "blk.%u.attn_norm.weight", layer);
    put_tensor(w, name, 0, o->width, 0.1f, 1.0f);
    snprintf(name, sizeof name, "blk.%u.ffn_norm.weight", layer);
    put_tensor(w, name, 0, o->width, 0.1f, 1.0f);
    for (size_t i = 0; i < SH_COUNT(matrices); i++) {
        snprintf(name, sizeof name, "blk.%u.%s.weight", layer, matrices[i].name);
        put_tensor(w, name, matrices[i].out, matrices[i].in, 1.0f / sqrtf((float)matrices[i].in),
                   0);
    }
}

static void put_file(writer *w, sh_buf *out)
{
    static const uint8_t zeros[ALIGNMENT];
    put(w, out, "GGUF", 4);
    put_u32(w, out, w->o->version);
    put_u64(w, out, w->n_tensors);
    put_u64(w, out, w->n_keys);
    put(w, out, w->keys.data, w->keys.len);
    put(w, out, w->infos.data, w->infos.len);
    put(w, out, zeros, (ALIGNMENT - out->len % ALIGNMENT) % ALIGNMENT);
    put(w, out, w->data.data, w->data.len);
}

tiny_options tiny_defaults(uint64_t seed)
{
    return (tiny_options){.seed = seed,
                          .layers = 2,
                          .width = 64,
                          .heads = 4,
                          .kv_heads = 2,
                          .ffn = 96,
                          .context = 64,
                          .version = 3,
                          .type = SH_TYPE_F32};
}

uint32_t tiny_vocab(void)
{
    return FIRST_PIECE + (uint32_t)SH_COUNT(pieces);
}

sh_status tiny_encode(const tiny_options *options, sh_buf *out)
{
    writer w = {.o = options};
    sh_buf_init(&w.keys, TINY_BYTES_MAX);
    sh_buf_init(&w.infos, TINY_BYTES_MAX);
    sh_buf_init(&w.data, TINY_BYTES_MAX);
    sh_rng_init(&w.rng, options->seed, 0, PURPOSE_TINY);
    put_keys(&w);
    put_tensor(&w, "token_embd.weight", tiny_vocab(), options->width, 1.0f, 0);
    put_tensor(&w, "output_norm.weight", 0, options->width, 0.1f, 1.0f);
    if (options->untied)
        put_tensor(&w, "output.weight", tiny_vocab(), options->width, 0.3f, 0);
    for (uint32_t i = 0; i < options->layers; i++)
        put_layer(&w, i);
    if (options->extra_tensor != NULL)
        put_tensor(&w, options->extra_tensor, 0, options->width, 1.0f, 0);
    put_file(&w, out);
    sh_buf_release(&w.keys);
    sh_buf_release(&w.infos);
    sh_buf_release(&w.data);
    return w.failed ? SH_ERR_NO_MEMORY : SH_OK;
}

sh_status tiny_write(const tiny_options *options, const char *path, sh_error *err)
{
    sh_buf bytes;
    sh_buf_init(&bytes, TINY_BYTES_MAX);
    sh_status status = tiny_encode(options, &bytes);
    if (status == SH_OK)
        status = sh_file_write_atomic(path, bytes.data, bytes.len, err);
    else
        sh_fail(err, status, "tiny model: out of memory");
    sh_buf_release(&bytes);
    return status;
}
