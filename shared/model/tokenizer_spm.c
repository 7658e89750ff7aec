/*
 * SentencePiece-style tokenizer (`tokenizer.ggml.model` = "llama"), as llama.cpp runs it. A text
 * without special tokens
 *
 *   1. gets a space in front (if the model says so and it follows no other text), its spaces become
 *      "▁" (U+2581), and it is split into symbols of one UTF-8 character; the length comes from the
 *      first byte alone, so invalid bytes make symbols of their own;
 *   2. the adjacent pair whose text is the token of the highest score (leftmost on ties) is merged,
 *      until no pair is a token;
 *   3. a symbol that is no token is written as its bytes' tokens.
 *
 * A merge can cross from one word to the next only when some token does; where none does (checked
 * at load) each word is a queue of its own, which makes the time linear in the text.
 * tokenizer.ggml.remove_extra_whitespaces is not looked at: llama.cpp heeds it for other kinds of
 * tokenizers only.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/tokenizer_internal.h"

static sh_status load_scores(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.scores";
    size_t n;
    t->scores = sh_calloc(t->n, sizeof *t->scores);
    if (t->scores == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    sh_error local = {0};
    sh_status status = sh_gguf_get_array_count(gguf, key, &n, &local);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK; /* all zero: then the leftmost pair is merged first */
    if (status != SH_OK)
        return sh_fail(err, status, "%s", local.text);
    if (n != t->n)
        return sh_fail(err, SH_ERR_INVALID, "%s has %zu elements for %u tokens", key, n, t->n);
    SH_TRY(sh_gguf_get_f32s(gguf, key, t->scores, n, err));
    for (uint32_t i = 0; i < t->n; i++)
        if (isnan(t->scores[i]))
            return sh_fail(err, SH_ERR_INVALID, "%s: the score of token %u is not a number", key,
                           i);
    return SH_OK;
}

static sh_status find_bytes(sh_tokenizer *t, sh_error *err)
{
    char text[8];
    for (unsigned b = 0; b < 256; b++) {
        snprintf(text, sizeof text, "<0x%02X>", b);
        t->bytes[b] = sh_token_find(t, text, 6);
        if (t->bytes[b] < 0)
            return sh_fail(err, SH_ERR_INVALID,
                           "the vocabulary has no byte token %s: not every text has tokens", text);
    }
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t n;
        const char *s = sh_token_text(t, i, &n);
        if (t->kinds[i] == SH_TOKEN_BYTE && sh_token_parse_byte(s, n) < 0)
            return sh_fail(err, SH_ERR_INVALID, "token %u is a byte token without a byte", i);
    }
    return SH_OK;
}

static bool text_crosses_words(const char *s, uint32_t n)
{
    for (uint32_t i = 1; i + SH_SPACE_MARK_SIZE <= n; i++) {
        if (memcmp(s + i, SH_SPACE_MARK, SH_SPACE_MARK_SIZE) != 0)
            continue;
        if (i < SH_SPACE_MARK_SIZE ||
            memcmp(s + i - SH_SPACE_MARK_SIZE, SH_SPACE_MARK, SH_SPACE_MARK_SIZE) != 0)
            return true;
    }
    return false;
}

sh_status sh_spm_load(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    SH_TRY(load_scores(t, gguf, err));
    SH_TRY(find_bytes(t, err));
    for (uint32_t i = 0; i < t->n && !t->crosses_words; i++) {
        uint32_t n;
        const char *text = sh_token_text(t, i, &n);
        t->crosses_words = text_crosses_words(text, n);
    }
    return SH_OK;
}

/* ---- text to tokens ---- */

static sh_status emit_symbol(sh_token_work *w, const sh_symbol *s)
{
    const int32_t token = sh_token_find(w->t, s->text, s->n);
    if (token >= 0)
        return sh_token_emit(w, token);
    for (uint32_t i = 0; i < s->n; i++)
        SH_TRY(sh_token_emit(w, w->t->bytes[(uint8_t)s->text[i]]));
    return SH_OK;
}

/* Steps 2 and 3 for the symbols gathered so far; empties them. */
static sh_status merge_symbols(sh_token_work *w)
{
    SH_TRY(sh_token_merge(w));
    for (int32_t i = 0; i >= 0 && i < (int32_t)w->n_symbols; i = w->symbols[i].next)
        SH_TRY(emit_symbol(w, &w->symbols[i]));
    w->n_symbols = 0;
    return SH_OK;
}

static bool is_space_mark(const sh_symbol *s)
{
    return s->n == SH_SPACE_MARK_SIZE && memcmp(s->text, SH_SPACE_MARK, SH_SPACE_MARK_SIZE) == 0;
}

/* A text in which spaces are "▁" already. */
static sh_status tokenize_escaped(sh_token_work *w, const char *text, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        const uint32_t n = (uint32_t)SH_MIN(sh_char_bytes((uint8_t)text[at]), bytes - at);
        const sh_symbol s = {.text = text + at, .n = n};
        at += n;
        w->steps++;
        if (!w->t->crosses_words && w->n_symbols > 0 && is_space_mark(&s) &&
            !is_space_mark(&w->symbols[w->n_symbols - 1]))
            SH_TRY(merge_symbols(w));
        SH_TRY(sh_token_push(w, s));
    }
    return merge_symbols(w);
}

sh_status sh_spm_escape(const char *text, size_t bytes, bool prefix, sh_buf *out)
{
    if (prefix)
        SH_TRY(sh_buf_append(out, SH_SPACE_MARK, SH_SPACE_MARK_SIZE));
    const char *end = text + bytes;
    while (text < end) {
        const char *space = memchr(text, ' ', (size_t)(end - text));
        const char *stop = space != NULL ? space : end;
        SH_TRY(sh_buf_append(out, text, (size_t)(stop - text)));
        if (space != NULL)
            SH_TRY(sh_buf_append(out, SH_SPACE_MARK, SH_SPACE_MARK_SIZE));
        text = space != NULL ? space + 1 : end;
    }
    return SH_OK;
}

sh_status sh_spm_tokenize(sh_token_work *w, const char *text, size_t bytes, bool prefix)
{
    sh_buf_clear(&w->escaped);
    SH_TRY(sh_spm_escape(text, bytes, prefix, &w->escaped));
    return tokenize_escaped(w, (const char *)w->escaped.data, w->escaped.len);
}
