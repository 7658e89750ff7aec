/*
 * Any bytes are tokenized, with every flag, and come back: the tokens' text is a space and the
 * input, but that "▁" in the input is a space too. The first byte chooses the flags.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/tokenizer.h"
#include "tests/model/tiny.h"

#define MARK "\xe2\x96\x81"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static sh_tokenizer *load(void)
{
    static sh_buf bytes; /* lives as long as the process, as the tokenizer does */
    sh_gguf *gguf = NULL;
    sh_tokenizer *tokenizer = NULL;
    const tiny_options o = tiny_defaults(1);
    sh_buf_init(&bytes, 16u << 20);
    if (tiny_encode(&o, &bytes) != SH_OK ||
        sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, NULL) != SH_OK ||
        sh_tokenizer_load(gguf, &tokenizer, NULL) != SH_OK)
        abort();
    sh_gguf_close(&gguf);
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

static void check_round_trip(const sh_tokenizer *t, const char *text, size_t n, const int32_t *ids,
                             size_t n_ids, bool prefix)
{
    sh_buf out;
    sh_buf_init(&out, 64u << 20);
    for (size_t i = 0; i < n_ids; i++)
        if (sh_detokenize(t, ids[i], &out) != SH_OK)
            abort();
    char *expected = malloc(n + 2);
    if (expected == NULL)
        abort();
    expected[0] = ' ';
    memcpy(expected + prefix, text, n);
    const size_t n_expected = unmark(expected, n == 0 ? 0 : n + prefix);
    const size_t n_ours = unmark((char *)out.data, out.len);
    if (n_ours != n_expected || (n_ours > 0 && memcmp(out.data, expected, n_ours) != 0)) {
        fprintf(stderr, "a text of %zu bytes comes back as %zu, expected %zu\n", n, n_ours,
                n_expected);
        abort();
    }
    free(expected);
    sh_buf_release(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static sh_tokenizer *tokenizer;
    if (tokenizer == NULL)
        tokenizer = load();
    if (size == 0)
        return 0;
    const unsigned flags = data[0] & 7u;
    const char *text = (const char *)data + 1;
    int32_t *ids = NULL;
    size_t n = 0;
    if (sh_tokenize(tokenizer, text, size - 1, flags, &ids, &n, NULL) != SH_OK)
        abort();
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (uint32_t)ids[i] >= sh_tokenizer_size(tokenizer))
            abort();
    /* A special token has no text, and the one that the user defines starts a text anew. */
    if ((flags & SH_TOKENIZE_SPECIAL) == 0 && memmem(text, size - 1, "<|user|>", 8) == NULL)
        check_round_trip(tokenizer, text, size - 1, ids, n, (flags & SH_TOKENIZE_CONTINUE) == 0);
    free(ids);
    return 0;
}
