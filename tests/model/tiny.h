/*
 * A tiny llama model with random weights and a working vocabulary, for tests that need a model and
 * no data: written as GGUF by this file alone, byte by byte, so that it checks the reader too.
 *
 * Vocabulary: <unk>, <s>, </s>, the 256 byte tokens, "▁", a..z, some words and pieces in merge
 * order, and the user-defined "<|user|>" last. Same options, same bytes.
 */
#ifndef SH_TESTS_TINY_H
#define SH_TESTS_TINY_H

#include "shared/base/buf.h"
#include "shared/math/quant.h"

typedef struct {
    uint64_t seed;
    uint32_t layers, width, heads, kv_heads, ffn, context;
    uint32_t version; /* of GGUF: 2 or 3 */
    sh_type type;     /* of every matrix: F32, F16, BF16, Q8_0, Q4_0 */
    bool untied;      /* an output matrix of its own */
    bool add_bos;
    /* What a test wants wrong: NULL or 0 for a sound file. */
    const char *architecture;              /* NULL: "llama" */
    const char *tokenizer;                 /* NULL: "llama" */
    const char *string_key, *string_value; /* one more key */
    const char *u32_key;                   /* one more key, of u32_value, before the others */
    uint32_t u32_value;
    const char *skip_key;     /* a key to leave out */
    const char *extra_tensor; /* one more F32 tensor of [width] */
    const char *skip_tensor;
    const char *token_from, *token_to; /* a token to spell otherwise */
} tiny_options;

/* width 64, 2 layers, 4 heads on 2 key-value heads, ffn 96, context 64, F32, tied, no BOS. */
tiny_options tiny_defaults(uint64_t seed);
SH_MUST_USE sh_status tiny_encode(const tiny_options *options, sh_buf *out);
SH_MUST_USE sh_status tiny_write(const tiny_options *options, const char *path, sh_error *err);
uint32_t tiny_vocab(void);

#endif
