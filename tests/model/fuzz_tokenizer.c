/*
 * Any bytes are tokenized, with every flag, and come back. The first byte's low half chooses the
 * flags, its high half the tokenizer:
 *   0       llama: the tokens' text is a space and the input, but that "▁" in it is a space too;
 *   1..11   gpt2 by one rule each: the tokens' text is the input with U+FFFD for what is no UTF-8;
 *   12..15  gpt2 with the input as one more merge, and as the rule's name: loaded or refused.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/tokenizer.h"
#include "shared/model/tokenizer_unicode.h"
#include "tests/model/tiny.h"
#include "tests/model/tiny_bpe.h"

#define MARK "\xe2\x96\x81"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const rules[] = {"default",        "gpt-2",  "llama-bpe",  "qwen2",
                                    "smollm",         "falcon", "bloom",      "viking",
                                    "deepseek-coder", "tekken", "deepseek-v3"};
enum { LLAMA, FIRST_BROKEN = 12 };

static sh_status encode(const char *rule, sh_buf *out)
{
    const tiny_options llama = tiny_defaults(1);
    const tiny_bpe_options bpe = {.pre = rule, .add_eos = true};
    return rule == NULL ? tiny_encode(&llama, out) : tiny_bpe_encode(&bpe, out);
}

static sh_tokenizer *load(const char *rule)
{
    sh_buf bytes;
    sh_gguf *gguf = NULL;
    sh_tokenizer *tokenizer = NULL;
    sh_buf_init(&bytes, 16u << 20);
    if (encode(rule, &bytes) != SH_OK ||
        sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, NULL) != SH_OK ||
        sh_tokenizer_load(gguf, &tokenizer, NULL) != SH_OK)
        abort();
    sh_gguf_close(&gguf);
    sh_buf_release(&bytes);
    return tokenizer;
}

/* Spaces for "▁", in place; returns the new length. */
static size_t unmark(char *text, size_t n)
{
    size_t to = 0;
    for (size_t from = 0; from < n;) {
        if (n - from >= 3 && memcmp(text + from, MARK, 3) == 0) {
            text[to++] = ' ';
            from += 3;
        } else {
            text[to++] = text[from++];
        }
    }
    return to;
}

/* The input as the tokens of llama have it; expected holds n + 1 bytes. */
static size_t expect_llama(const char *text, size_t n, bool prefix, char *expected)
{
    expected[0] = ' ';
    memcpy(expected + prefix, text, n);
    return unmark(expected, n == 0 ? 0 : n + prefix);
}

/* The same of gpt2; expected holds 3 n bytes. */
static size_t expect_bpe(const char *text, size_t n, char *expected)
{
    size_t to = 0;
    for (size_t at = 0; at < n;) {
        unsigned used;
        const uint32_t code = sh_char_decode((const uint8_t *)text + at, n - at, &used);
        to += sh_char_encode(code, (uint8_t *)expected + to);
        at += used;
    }
    return to;
}

static void check_round_trip(const sh_tokenizer *t, const int32_t *ids, size_t n_ids, bool llama,
                             const char *expected, size_t n_expected)
{
    sh_buf out;
    sh_buf_init(&out, 64u << 20);
    for (size_t i = 0; i < n_ids; i++)
        if (sh_detokenize(t, ids[i], &out) != SH_OK)
            abort();
    const size_t n_ours = llama ? unmark((char *)out.data, out.len) : out.len;
    if (n_ours != n_expected || (n_ours > 0 && memcmp(out.data, expected, n_ours) != 0)) {
        fprintf(stderr, "a text comes back as %zu bytes, expected %zu\n", n_ours, n_expected);
        abort();
    }
    sh_buf_release(&out);
}

static void tokenize(size_t which, unsigned flags, const char *text, size_t n)
{
    static sh_tokenizer *tokenizers[FIRST_BROKEN]; /* as long as the process */
    if (tokenizers[which] == NULL)
        tokenizers[which] = load(which == LLAMA ? NULL : rules[which - 1]);
    const sh_tokenizer *t = tokenizers[which];
    int32_t *ids = NULL;
    size_t n_ids = 0;
    if (sh_tokenize(t, text, n, flags, &ids, &n_ids, NULL) != SH_OK)
        abort();
    for (size_t i = 0; i < n_ids; i++)
        if (ids[i] < 0 || (uint32_t)ids[i] >= sh_tokenizer_size(t))
            abort();
    /* A special token has no text, and the one that the user defines starts a text anew. */
    if ((flags & SH_TOKENIZE_SPECIAL) == 0 && memmem(text, n, "<|user|>", 8) == NULL) {
        char *expected = malloc(3 * n + 4);
        if (expected == NULL)
            abort();
        const size_t n_expected =
            which == LLAMA ? expect_llama(text, n, (flags & SH_TOKENIZE_CONTINUE) == 0, expected)
                           : expect_bpe(text, n, expected);
        check_round_trip(t, ids, n_ids, which == LLAMA, expected, n_expected);
        free(expected);
    }
    free(ids);
}

static void load_broken(const char *text, size_t n)
{
    sh_buf bytes;
    sh_gguf *gguf = NULL;
    sh_tokenizer *t = NULL;
    char *merge = strndup(text, n);
    if (merge == NULL)
        abort();
    tiny_bpe_options o = {.pre = "gpt-2", .merge = merge};
    if (n > 0 && text[0] == 'p')
        o = (tiny_bpe_options){.pre = merge + 1};
    sh_buf_init(&bytes, 16u << 20);
    sh_error err = {0};
    if (tiny_bpe_encode(&o, &bytes) != SH_OK ||
        sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, NULL) != SH_OK)
        abort();
    if (sh_tokenizer_load(gguf, &t, &err) != SH_OK && err.text[0] == '\0')
        abort();
    sh_tokenizer_destroy(&t);
    sh_gguf_close(&gguf);
    sh_buf_release(&bytes);
    free(merge);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    const size_t which = data[0] >> 4;
    const char *text = (const char *)data + 1;
    if (which >= FIRST_BROKEN)
        load_broken(text, size - 1);
    else
        tokenize(which, data[0] & 15u, text, size - 1);
    return 0;
}
