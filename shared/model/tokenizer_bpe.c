/*
 * Byte-level BPE (`tokenizer.ggml.model` = "gpt2"; Radford et al. 2019), as llama.cpp runs it. A
 * text without special tokens
 *
 *   1. is decoded to code points, what is no UTF-8 to U+FFFD (so the ids of such a text are those
 *      of another one), and cut into words by the rule that tokenizer.ggml.pre names;
 *   2. each word, as UTF-8, is split into bytes; each byte has a token, spelt as the character that
 *      stands for it: itself where it is printable in Latin-1, else U+0100 and on, in order;
 *   3. the adjacent pair that the merges name first (leftmost on ties) is merged, until the merges
 *      name none. By some rules a word that is a token as a whole is that token.
 *
 * Merges are looked up by the ids of their two sides: at load every merge is checked to be of two
 * tokens that make one.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/base/log.h"
#include "shared/model/tokenizer_internal.h"

/* ---- tokens' texts to bytes ---- */

sh_status sh_bpe_decode(const char *text, uint32_t n, sh_buf *out)
{
    for (uint32_t at = 0; at < n;) {
        unsigned used;
        const uint32_t code = sh_char_decode((const uint8_t *)text + at, n - at, &used);
        const int byte = sh_byte_of_char(code);
        const uint8_t one = (uint8_t)byte;
        SH_TRY(byte >= 0 ? sh_buf_append(out, &one, 1) : sh_buf_append(out, text + at, used));
        at += used;
    }
    return SH_OK;
}

/* ---- loading ---- */

/* Bytes without a token have none in a text either. Printable ASCII, space and newline must. */
static sh_status find_bytes(sh_tokenizer *t, const char *path, sh_error *err)
{
    unsigned missing = 0, first = 0;
    for (unsigned b = 0; b < 256; b++) {
        uint8_t text[4];
        t->bytes[b] =
            sh_token_find(t, (const char *)text, sh_char_encode(sh_char_of_byte((uint8_t)b), text));
        if (t->bytes[b] >= 0)
            continue;
        if ((b >= ' ' && b <= '~') || b == '\n')
            return sh_fail(err, SH_ERR_INVALID,
                           "the vocabulary has no token of the byte 0x%02X: common text would have "
                           "no tokens",
                           b);
        /* These are no part of UTF-8: no word has them. */
        if (b == 0xC0 || b == 0xC1 || b >= 0xF5)
            continue;
        first = missing == 0 ? b : first;
        missing++;
    }
    if (missing > 0)
        sh_log(SH_LOG_INFO, "tokenizer-bytes",
               "file=%s bytes_without_token=%u first=0x%02X effect=left-out-of-texts", path,
               missing, first);
    return SH_OK;
}

static uint32_t hash_pair(int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32);
}

int32_t sh_bpe_find_merge(const sh_tokenizer *t, int32_t left, int32_t right)
{
    for (uint32_t i = hash_pair(left, right) & t->merge_mask;; i = (i + 1) & t->merge_mask) {
        if (t->merge_slots[i] == 0)
            return -1;
        const uint32_t rank = t->merge_slots[i] - 1;
        if (t->merges[rank].left == left && t->merges[rank].right == right)
            return (int32_t)rank;
    }
}

/* "left right" to ids; joined is scratch for text_max bytes. */
static sh_status parse_merge(sh_tokenizer *t, uint32_t rank, const char *text, uint32_t n,
                             char *joined, sh_error *err)
{
    const int shown = (int)SH_MIN(n, 64);
    /* A space at the very beginning would be a part of the left side, as in llama.cpp. */
    const char *space = n > 1 ? memchr(text + 1, ' ', n - 1) : NULL;
    if (space == NULL)
        return sh_fail(err, SH_ERR_INVALID, "tokenizer.ggml.merges: merge %u, '%.*s', is no pair",
                       rank, shown, text);
    const uint32_t n_left = (uint32_t)(space - text), n_right = n - n_left - 1;
    sh_merge *m = &t->merges[rank];
    m->left = sh_token_find(t, text, n_left);
    m->right = sh_token_find(t, space + 1, n_right);
    m->result = -1;
    if (n_left + n_right <= t->text_max) {
        memcpy(joined, text, n_left);
        memcpy(joined + n_left, space + 1, n_right);
        m->result = sh_token_find(t, joined, n_left + n_right);
    }
    if (m->left < 0 || m->right < 0 || m->result < 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "tokenizer.ggml.merges: merge %u, '%.*s': its %s is no token", rank, shown,
                       text,
                       m->left < 0    ? "left side"
                       : m->right < 0 ? "right side"
                                      : "result");
    return SH_OK;
}

/* A pair that is there twice keeps its first rank. */
static void index_merge(sh_tokenizer *t, uint32_t rank)
{
    const sh_merge *m = &t->merges[rank];
    if (sh_bpe_find_merge(t, m->left, m->right) >= 0)
        return;
    uint32_t i = hash_pair(m->left, m->right) & t->merge_mask;
    while (t->merge_slots[i] != 0)
        i = (i + 1) & t->merge_mask;
    t->merge_slots[i] = rank + 1;
}

static sh_status load_merges(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.merges";
    sh_status status;
    size_t n;
    uint32_t size = 16;
    const char **texts = NULL;
    uint32_t *lengths = NULL;
    char *joined = NULL;
    SH_TRY(sh_gguf_get_array_count(gguf, key, &n, err));
    if (n > SH_MERGES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%s has %zu merges, over %u", key, n, SH_MERGES_MAX);
    while (size < n + n / 2)
        size *= 2;
    t->n_merges = (uint32_t)n;
    t->merge_mask = size - 1;
    t->merges = sh_calloc(n + 1, sizeof *t->merges);
    t->merge_slots = sh_calloc(size, sizeof *t->merge_slots);
    texts = sh_calloc(n + 1, sizeof *texts);
    lengths = sh_calloc(n + 1, sizeof *lengths);
    joined = sh_calloc((size_t)t->text_max + 1, 1);
    if (t->merges == NULL || t->merge_slots == NULL || texts == NULL || lengths == NULL ||
        joined == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
        goto cleanup;
    }
    SH_GOTO(sh_gguf_get_strings(gguf, key, texts, lengths, n, err));
    for (uint32_t rank = 0; rank < n; rank++) {
        SH_GOTO(parse_merge(t, rank, texts[rank], lengths[rank], joined, err));
        index_merge(t, rank);
    }
    status = SH_OK;

cleanup:
    free(texts);
    free(lengths);
    free(joined);
    return status;
}

/* The rule "default" only where the file names none: by another rule than a model was trained with
 * it answers worse, and nothing says so. */
static sh_status load_rule(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.pre";
    const char *name = "default";
    size_t n = strlen(name);
    sh_error local = {0};
    const sh_status status = sh_gguf_get_string(gguf, key, &name, &n, &local);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "%s", local.text);
    if (status == SH_ERR_NOT_FOUND || n == 0) {
        name = "default";
        n = strlen(name);
        sh_log(SH_LOG_WARN, "tokenizer-pre", "file=%s key=%s state=absent using=default",
               sh_gguf_path(gguf), key);
    }
    t->pre = sh_pre_find(name, n);
    if (t->pre == NULL)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "pre-tokenizer '%.*s' (%s) is not supported",
                       (int)SH_MIN(n, 64), name, key);
    return SH_OK;
}

sh_status sh_bpe_load(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    SH_TRY(load_rule(t, gguf, err));
    SH_TRY(find_bytes(t, sh_gguf_path(gguf), err));
    return load_merges(t, gguf, err);
}

/* ---- text to tokens ---- */

/* The token that a word is as a whole, or -1. Its text is put together in w->escaped. */
static sh_status find_word(sh_token_work *w, const sh_pre_char *c, size_t n, int32_t *token)
{
    *token = -1;
    if (n > w->t->text_max)
        return SH_OK;
    sh_buf_clear(&w->escaped);
    for (size_t i = 0; i < n; i++) {
        uint8_t bytes[4], text[4];
        const unsigned n_bytes = sh_char_encode(sh_pre_code(c[i]), bytes);
        for (unsigned b = 0; b < n_bytes; b++)
            SH_TRY(
                sh_buf_append(&w->escaped, text, sh_char_encode(sh_char_of_byte(bytes[b]), text)));
    }
    if (w->escaped.len <= w->t->text_max)
        *token = sh_token_find(w->t, (const char *)w->escaped.data, (uint32_t)w->escaped.len);
    return SH_OK;
}

static sh_status tokenize_word(void *arg, const sh_pre_char *c, size_t n)
{
    sh_token_work *w = arg;
    w->steps += n;
    if (w->t->pre->whole_words) {
        int32_t token;
        SH_TRY(find_word(w, c, n, &token));
        if (token >= 0)
            return sh_token_emit(w, token);
    }
    w->n_symbols = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t bytes[4];
        const unsigned n_bytes = sh_char_encode(sh_pre_code(c[i]), bytes);
        for (unsigned b = 0; b < n_bytes; b++)
            SH_TRY(sh_token_push(w, (sh_symbol){.n = 1, .id = w->t->bytes[bytes[b]]}));
    }
    SH_TRY(sh_token_merge(w));
    for (int32_t i = 0; i >= 0 && i < (int32_t)w->n_symbols; i = w->symbols[i].next)
        if (w->symbols[i].id >= 0)
            SH_TRY(sh_token_emit(w, w->symbols[i].id));
    return SH_OK;
}

sh_status sh_bpe_tokenize(sh_token_work *w, const char *text, size_t bytes)
{
    SH_TRY(
        sh_pre_decode(text, bytes, SH_TOKENIZE_BYTES_MAX, &w->chars, &w->chars_cap, &w->n_chars));
    w->steps += bytes;
    return sh_pre_split(w->t->pre, w->chars, w->n_chars, tokenize_word, w);
}
