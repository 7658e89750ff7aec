/*
 * A text to tokens: tokens of special kinds are cut out of it, longest text first, and what is left
 * goes to the tokenizer of the vocabulary's kind. Tokens to text, and questions about tokens.
 */
#include "shared/model/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "shared/model/tokenizer_internal.h"

/* ---- special tokens ---- */

/* A stretch of the input: text, or a special token (token >= 0). */
typedef struct {
    const char *text;
    size_t bytes;
    int32_t token;
} fragment;

typedef struct {
    fragment *items;
    size_t n, cap;
} fragments;

static sh_status add_fragment(fragments *f, fragment item)
{
    if (f->n == f->cap)
        SH_TRY(sh_array_reserve((void **)&f->items, &f->cap, f->n + 1, sizeof *f->items,
                                2 * (size_t)SH_TOKENIZE_BYTES_MAX + 1));
    f->items[f->n++] = item;
    return SH_OK;
}

static bool is_c_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Whether a token takes the white space after it along. */
static bool strips_after(const sh_tokenizer *t, int32_t token)
{
    static const char *const not_these[] = {"<unk>", "<s>", "<|endoftext|>"};
    if (!t->strip_after)
        return false;
    uint32_t n;
    const char *text = sh_token_text(t, (uint32_t)token, &n);
    for (size_t i = 0; i < SH_COUNT(not_these); i++)
        if (n == strlen(not_these[i]) && memcmp(text, not_these[i], n) == 0)
            return false;
    return true;
}

/* Cuts every occurrence of one special token out of the text fragments of in, into out. */
static sh_status split_at(const sh_tokenizer *t, int32_t token, const fragments *in, fragments *out)
{
    uint32_t n;
    const char *needle = sh_token_text(t, (uint32_t)token, &n);
    const bool strip_after = strips_after(t, token), strip_before = token == t->strip_before_id;
    out->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        fragment rest = in->items[i];
        while (rest.token < 0) {
            const char *match = memmem(rest.text, rest.bytes, needle, n);
            if (match == NULL)
                break;
            size_t before = (size_t)(match - rest.text);
            rest.bytes -= before + n;
            while (strip_before && before > 0 && is_c_space(rest.text[before - 1]))
                before--;
            if (before > 0)
                SH_TRY(add_fragment(out, (fragment){rest.text, before, -1}));
            SH_TRY(add_fragment(out, (fragment){NULL, 0, token}));
            rest.text = match + n;
            while (strip_after && rest.bytes > 0 && is_c_space(*rest.text)) {
                rest.text++;
                rest.bytes--;
            }
        }
        if (rest.token >= 0 || rest.bytes > 0)
            SH_TRY(add_fragment(out, rest));
    }
    return SH_OK;
}

/* *f holds the fragments at the end. */
static sh_status split_specials(const sh_tokenizer *t, bool parse_special, fragments *f)
{
    fragments other = {0};
    sh_status status = SH_OK;
    for (size_t i = 0; i < t->n_specials; i++) {
        const int32_t token = t->specials[i];
        if (!parse_special && t->kinds[token] != SH_TOKEN_USER)
            continue;
        SH_GOTO(split_at(t, token, f, &other));
        const fragments swap = *f;
        *f = other;
        other = swap;
    }

cleanup:
    free(other.items);
    return status;
}

/* ---- text to tokens ---- */

static sh_status tokenize_fragments(sh_token_work *w, const fragments *f, unsigned flags)
{
    bool prefix = (flags & SH_TOKENIZE_CONTINUE) == 0;
    for (size_t i = 0; i < f->n; i++) {
        const fragment *item = &f->items[i];
        if (item->token >= 0)
            SH_TRY(sh_token_emit(w, item->token));
        else if (w->t->pre != NULL)
            SH_TRY(sh_bpe_tokenize(w, item->text, item->bytes));
        else
            SH_TRY(sh_spm_tokenize(w, item->text, item->bytes, prefix && w->t->add_space_prefix));
        prefix = item->token >= 0;
    }
    return SH_OK;
}

static void work_release(sh_token_work *w)
{
    free(w->out);
    free(w->symbols);
    free(w->heap);
    free(w->chars);
    sh_buf_release(&w->escaped);
}

sh_status sh_tokenize_counted(const sh_tokenizer *t, const char *text, size_t bytes, unsigned flags,
                              sh_token_result *out, sh_error *err)
{
    if (bytes > SH_TOKENIZE_BYTES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a text of %zu bytes is over the limit of %u", bytes,
                       SH_TOKENIZE_BYTES_MAX);
    sh_status status;
    sh_token_work w = {.t = t};
    fragments f = {0};
    sh_buf_init(&w.escaped, SH_TOKEN_WORK_MAX);
    /* malloc(0) may be NULL: reserve, so that *out of an empty text is memory too */
    SH_GOTO(sh_array_reserve((void **)&w.out, &w.out_cap, 16, sizeof *w.out, SH_TOKEN_WORK_MAX));
    if (bytes > 0)
        SH_GOTO(add_fragment(&f, (fragment){text, bytes, -1}));
    const bool parse_special = (flags & SH_TOKENIZE_SPECIAL) != 0;
    if (parse_special || t->has_user)
        SH_GOTO(split_specials(t, parse_special, &f));
    if ((flags & SH_TOKENIZE_BOS) != 0 && t->add_bos)
        SH_GOTO(sh_token_emit(&w, t->bos));
    SH_GOTO(tokenize_fragments(&w, &f, flags));
    if ((flags & SH_TOKENIZE_EOS) != 0 && t->add_eos)
        SH_GOTO(sh_token_emit(&w, t->eos));
    *out = (sh_token_result){.ids = w.out, .n = w.n_out, .steps = w.steps};
    w.out = NULL;

cleanup:
    if (status != SH_OK)
        sh_fail(err, status, "tokenizing %zu bytes: out of memory", bytes);
    work_release(&w);
    free(f.items);
    return status;
}

sh_status sh_tokenize(const sh_tokenizer *tokenizer, const char *text, size_t bytes, unsigned flags,
                      int32_t **out, size_t *n, sh_error *err)
{
    sh_token_result result;
    SH_TRY(sh_tokenize_counted(tokenizer, text, bytes, flags, &result, err));
    *out = result.ids;
    *n = result.n;
    return SH_OK;
}

/* ---- tokens to text, and questions ---- */

static bool is_token(const sh_tokenizer *t, int32_t token)
{
    return token >= 0 && (uint32_t)token < t->n;
}

/* A text of llama: "▁" is a space. */
static sh_status append_unmarked(const char *text, uint32_t n, sh_buf *out)
{
    while (n > 0) {
        const char *mark = memmem(text, n, SH_SPACE_MARK, SH_SPACE_MARK_SIZE);
        const uint32_t before = mark != NULL ? (uint32_t)(mark - text) : n;
        SH_TRY(sh_buf_append(out, text, before));
        if (mark == NULL)
            break;
        SH_TRY(sh_buf_append(out, " ", 1));
        text += before + SH_SPACE_MARK_SIZE;
        n -= before + SH_SPACE_MARK_SIZE;
    }
    return SH_OK;
}

sh_status sh_detokenize(const sh_tokenizer *tokenizer, int32_t token, sh_buf *out)
{
    if (!is_token(tokenizer, token))
        return SH_ERR_INVALID;
    uint32_t n;
    const char *text = sh_token_text(tokenizer, (uint32_t)token, &n);
    const uint8_t kind = tokenizer->kinds[token];
    if (kind == SH_TOKEN_USER)
        return sh_buf_append(out, text, n);
    if (kind == SH_TOKEN_BYTE && tokenizer->pre == NULL) {
        const uint8_t byte = (uint8_t)sh_token_parse_byte(text, n);
        return sh_buf_append(out, &byte, 1);
    }
    if (kind != SH_TOKEN_NORMAL)
        return SH_OK;
    return tokenizer->pre != NULL ? sh_bpe_decode(text, n, out) : append_unmarked(text, n, out);
}

uint32_t sh_tokenizer_size(const sh_tokenizer *tokenizer)
{
    return tokenizer->n;
}

int32_t sh_tokenizer_bos(const sh_tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t sh_tokenizer_eos(const sh_tokenizer *tokenizer)
{
    return tokenizer->eos;
}

int32_t sh_tokenizer_eot(const sh_tokenizer *tokenizer)
{
    return tokenizer->eot;
}

bool sh_tokenizer_adds_bos(const sh_tokenizer *tokenizer)
{
    return tokenizer->add_bos;
}

bool sh_tokenizer_adds_eos(const sh_tokenizer *tokenizer)
{
    return tokenizer->add_eos;
}

bool sh_tokenizer_is_end(const sh_tokenizer *tokenizer, int32_t token)
{
    for (size_t i = 0; i < tokenizer->n_ends; i++)
        if (tokenizer->ends[i] == token)
            return true;
    return false;
}

bool sh_tokenizer_is_byte(const sh_tokenizer *tokenizer, int32_t token)
{
    if (!is_token(tokenizer, token))
        return false;
    if (tokenizer->pre == NULL)
        return tokenizer->kinds[token] == SH_TOKEN_BYTE;
    for (unsigned b = 0x80; b < 256; b++)
        if (tokenizer->bytes[b] == token)
            return true;
    return false;
}

bool sh_tokenizer_is_special(const sh_tokenizer *tokenizer, int32_t token)
{
    return is_token(tokenizer, token) && (tokenizer->kinds[token] == SH_TOKEN_CONTROL ||
                                          tokenizer->kinds[token] == SH_TOKEN_UNKNOWN);
}

bool sh_tokenizer_starts_word(const sh_tokenizer *tokenizer, int32_t token)
{
    if (!is_token(tokenizer, token))
        return false;
    const char *mark = tokenizer->pre != NULL ? "\xc4\xa0" : SH_SPACE_MARK;
    uint32_t n;
    const char *text = sh_token_text(tokenizer, (uint32_t)token, &n);
    return n >= strlen(mark) && memcmp(text, mark, strlen(mark)) == 0;
}

const char *sh_tokenizer_text(const sh_tokenizer *tokenizer, int32_t token, size_t *bytes)
{
    if (!is_token(tokenizer, token))
        return NULL;
    uint32_t n;
    const char *text = sh_token_text(tokenizer, (uint32_t)token, &n);
    *bytes = n;
    return text;
}

int32_t sh_tokenizer_find(const sh_tokenizer *tokenizer, const char *text, size_t bytes)
{
    return bytes > tokenizer->text_max ? -1 : sh_token_find(tokenizer, text, (uint32_t)bytes);
}
