/*
 * A trained tokenizer as GGUF keys (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
 * "Tokenizer"). A file without weights: general.architecture is there because llama.cpp asks for it
 * before it reads a vocabulary.
 */
#include "trainer/tokenizer_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/gguf.h"

#define BYTES          256u
#define BYTE_TEXT_SIZE 8 /* "<0xAB>" */
#define TEXTS_MAX      ((size_t)1 << 30)

enum { KIND_NORMAL = 1, KIND_UNKNOWN = 2, KIND_CONTROL = 3, KIND_BYTE = 6 };

/* The arrays of a file: texts lie one after another in `texts`. */
typedef struct {
    sh_buf texts;
    size_t *offsets; /* [n_tokens + n_merges + 1] */
    const char **pointers;
    uint32_t *lengths;
    float *scores; /* [n_tokens], and so kinds */
    int32_t *kinds;
    size_t n, n_tokens;
} keys;

static void keys_release(keys *k)
{
    sh_buf_release(&k->texts);
    free(k->offsets);
    free(k->pointers);
    free(k->lengths);
    free(k->scores);
    free(k->kinds);
}

static bool is_spm(const tr_tokenizer *t)
{
    return t->options->kind == SH_TOKENIZER_SPM;
}

/* Appends a token's text as the vocabulary spells it. */
static sh_status append_spelling(const tr_tokenizer *t, int32_t token, sh_buf *out)
{
    size_t n;
    const uint8_t *text = tr_pairs_text(t->pairs, token, &n);
    if (is_spm(t))
        return sh_buf_append(out, text, n);
    for (size_t i = 0; i < n; i++) {
        uint8_t spelt[4];
        SH_TRY(sh_buf_append(out, spelt, sh_char_encode(sh_char_of_byte(text[i]), spelt)));
    }
    return SH_OK;
}

/* The text appended since the last call is one of the array's. */
static void end_text(keys *k)
{
    k->offsets[++k->n] = k->texts.len;
}

static sh_status add_control(keys *k, const char *text, int32_t kind)
{
    SH_TRY(sh_buf_append(&k->texts, text, strlen(text)));
    k->kinds[k->n] = kind;
    end_text(k);
    return SH_OK;
}

static sh_status add_token(const tr_tokenizer *t, keys *k, int32_t token, float score)
{
    SH_TRY(append_spelling(t, token, &k->texts));
    k->scores[k->n] = score;
    k->kinds[k->n] = KIND_NORMAL;
    end_text(k);
    return SH_OK;
}

static sh_status add_byte(keys *k, unsigned byte)
{
    char text[BYTE_TEXT_SIZE];
    snprintf(text, sizeof text, "<0x%02X>", byte);
    return add_control(k, text, KIND_BYTE);
}

/* In the order of ids. */
static sh_status add_tokens(const tr_tokenizer *t, keys *k)
{
    const size_t n = t->pairs->n_tokens;
    for (size_t i = 0; i < t->n_controls; i++)
        SH_TRY(add_control(k, t->controls[i], is_spm(t) && i == 0 ? KIND_UNKNOWN : KIND_CONTROL));
    if (!is_spm(t)) {
        for (size_t i = 0; i < n; i++)
            SH_TRY(add_token(t, k, (int32_t)i, 0));
        return SH_OK;
    }
    for (unsigned b = 0; b < BYTES; b++)
        SH_TRY(add_byte(k, b));
    size_t rank = 0;
    for (size_t i = t->n_alphabet; i < n; i++, rank++)
        SH_TRY(add_token(t, k, (int32_t)i, -(float)rank));
    for (size_t i = 0; i < t->n_alphabet; i++, rank++)
        SH_TRY(add_token(t, k, (int32_t)i, -(float)rank));
    return SH_OK;
}

static sh_status add_merges(const tr_tokenizer *t, keys *k)
{
    for (size_t i = 0; i < t->pairs->n_merges; i++) {
        const tr_merge *m = &t->pairs->merges[i];
        SH_TRY(append_spelling(t, m->left, &k->texts));
        SH_TRY(sh_buf_append(&k->texts, " ", 1));
        SH_TRY(append_spelling(t, m->right, &k->texts));
        end_text(k);
    }
    return SH_OK;
}

static sh_status make_keys(const tr_tokenizer *t, keys *k, sh_error *err)
{
    const size_t n = t->options->vocab + (is_spm(t) ? 0 : t->pairs->n_merges);
    sh_buf_init(&k->texts, TEXTS_MAX);
    k->n_tokens = t->options->vocab;
    k->offsets = sh_calloc(n + 1, sizeof *k->offsets);
    k->pointers = sh_calloc(n, sizeof *k->pointers);
    k->lengths = sh_calloc(n, sizeof *k->lengths);
    k->scores = sh_calloc(k->n_tokens, sizeof *k->scores);
    k->kinds = sh_calloc(k->n_tokens, sizeof *k->kinds);
    sh_status status = k->offsets == NULL || k->pointers == NULL || k->lengths == NULL ||
                               k->scores == NULL || k->kinds == NULL
                           ? SH_ERR_NO_MEMORY
                           : add_tokens(t, k);
    if (status == SH_OK && !is_spm(t))
        status = add_merges(t, k);
    if (status != SH_OK)
        return sh_fail(err, status, "no memory for a vocabulary of %zu tokens", k->n_tokens);
    SH_ASSERT(k->n == n);
    for (size_t i = 0; i < n; i++) {
        k->pointers[i] = (const char *)k->texts.data + k->offsets[i];
        k->lengths[i] = (uint32_t)(k->offsets[i + 1] - k->offsets[i]);
    }
    return SH_OK;
}

/* Trained tokens and bytes differ among themselves: special tokens' texts are anybody's. */
static sh_status check_controls(const tr_tokenizer *t, const keys *k, sh_error *err)
{
    for (size_t c = 0; c < t->n_controls; c++)
        for (size_t i = t->n_controls; i < k->n_tokens; i++)
            if (k->lengths[i] == k->lengths[c] &&
                memcmp(k->pointers[i], k->pointers[c], k->lengths[c]) == 0)
                return sh_fail(err, SH_ERR_INVALID,
                               "special token '%.80s' is spelt like token %zu, which is learnt "
                               "from text: choose another spelling",
                               t->controls[c], i);
    return SH_OK;
}

static uint32_t id_of(const tr_tokenizer *t, const char *control)
{
    uint32_t id = 0;
    while (strcmp(t->controls[id], control) != 0)
        id++;
    return id;
}

static sh_status set_keys(const tr_tokenizer *t, const keys *k, sh_gguf_writer *w)
{
    const sh_tokenizer_train_options *o = t->options;
    SH_TRY(sh_gguf_writer_set_string(w, "general.architecture", "llama"));
    SH_TRY(sh_gguf_writer_set_string(w, "tokenizer.ggml.model", is_spm(t) ? "llama" : "gpt2"));
    SH_TRY(sh_gguf_writer_set_string(w, "tokenizer.ggml.pre", is_spm(t) ? "default" : o->pre));
    SH_TRY(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", k->pointers, k->lengths,
                                      k->n_tokens));
    SH_TRY(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", k->kinds, k->n_tokens));
    if (is_spm(t))
        SH_TRY(sh_gguf_writer_set_f32s(w, "tokenizer.ggml.scores", k->scores, k->n_tokens));
    else
        SH_TRY(sh_gguf_writer_set_strings(w, "tokenizer.ggml.merges", k->pointers + k->n_tokens,
                                          k->lengths + k->n_tokens, k->n - k->n_tokens));
    SH_TRY(sh_gguf_writer_set_u32(w, "tokenizer.ggml.bos_token_id", id_of(t, o->bos)));
    SH_TRY(sh_gguf_writer_set_u32(w, "tokenizer.ggml.eos_token_id", id_of(t, o->eos)));
    if (is_spm(t)) {
        SH_TRY(sh_gguf_writer_set_u32(w, "tokenizer.ggml.unknown_token_id", 0));
        SH_TRY(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_space_prefix", o->add_space_prefix));
    }
    SH_TRY(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_bos_token", o->add_bos));
    return sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_eos_token", o->add_eos);
}

sh_status tr_tokenizer_save(const tr_tokenizer *t, const char *path, sh_error *err)
{
    sh_status status;
    keys k = {0};
    sh_gguf_writer *w = NULL;
    SH_GOTO(make_keys(t, &k, err));
    SH_GOTO(check_controls(t, &k, err));
    SH_GOTO(sh_gguf_writer_create(&w, err));
    status = set_keys(t, &k, w);
    if (status != SH_OK) {
        sh_fail(err, status, "no memory for a vocabulary of %zu tokens", k.n_tokens);
        goto cleanup;
    }
    SH_GOTO(sh_gguf_writer_save(w, path, err));
cleanup:
    sh_gguf_writer_destroy(&w);
    keys_release(&k);
    return status;
}
