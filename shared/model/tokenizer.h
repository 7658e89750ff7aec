/*
 * Tokenizers from GGUF metadata: `llama` (SentencePiece-style BPE by score, byte fallback) and
 * `gpt2` (byte-level BPE by merge ranks, words cut by the rule that tokenizer.ggml.pre names).
 *
 * Same ids as llama.cpp on every byte string, invalid UTF-8 included, but where llama.cpp itself
 * has a defect or leaves it to chance (docs/decisions/0010-tokenizers.md lists these).
 * Threads: immutable after load; may be shared. Owner: sh_tokenizer_destroy.
 *
 *     SH_GOTO(sh_tokenizer_load(gguf, &tokenizer, err));
 *     SH_GOTO(sh_tokenize(tokenizer, text, bytes, SH_TOKENIZE_BOS, &ids, &n, err));
 */
#ifndef SH_MODEL_TOKENIZER_H
#define SH_MODEL_TOKENIZER_H

#include "shared/base/buf.h"
#include "shared/model/gguf.h"

#define SH_VOCAB_MAX (1u << 20)

typedef struct sh_tokenizer sh_tokenizer;

/* SH_ERR_UNSUPPORTED names an unknown tokenizer model or pre-tokenizer; SH_ERR_INVALID what a
 * vocabulary lacks: the 256 byte tokens of llama, the merges of gpt2, a merge's tokens, tokens of
 * printable ASCII. (Published gpt2 vocabularies lack tokens of rare bytes: such bytes have no
 * tokens, as in llama.cpp, which the log says at load.) */
SH_MUST_USE sh_status sh_tokenizer_load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err);
void sh_tokenizer_destroy(sh_tokenizer **tokenizer);

enum {
    SH_TOKENIZE_BOS = 1,     /* add BOS if the model says so */
    SH_TOKENIZE_SPECIAL = 2, /* parse special tokens' text; user-defined tokens are always parsed */
    SH_TOKENIZE_CONTINUE = 4, /* no space is put before the text: it goes on after other tokens */
    SH_TOKENIZE_EOS = 8,      /* add EOS if the model says so */
};
/* *out is malloc'ed; *n tokens. SH_ERR_LIMIT over SH_TOKENIZE_BYTES_MAX. Time O(n log n) at worst,
 * linear where words are short. */
#define SH_TOKENIZE_BYTES_MAX (256u << 20)
SH_MUST_USE sh_status sh_tokenize(const sh_tokenizer *tokenizer, const char *text, size_t bytes,
                                  unsigned flags, int32_t **out, size_t *n, sh_error *err);
/* Appends the text of one token, which may be a part of a character. Control, unknown and unused
 * tokens have none. */
SH_MUST_USE sh_status sh_detokenize(const sh_tokenizer *tokenizer, int32_t token, sh_buf *out);

uint32_t sh_tokenizer_size(const sh_tokenizer *tokenizer);
int32_t sh_tokenizer_bos(const sh_tokenizer *tokenizer); /* -1: none; so for the others */
int32_t sh_tokenizer_eos(const sh_tokenizer *tokenizer);
int32_t sh_tokenizer_eot(const sh_tokenizer *tokenizer);   /* end of a turn */
bool sh_tokenizer_adds_bos(const sh_tokenizer *tokenizer); /* the model says that BOS is added */
bool sh_tokenizer_adds_eos(const sh_tokenizer *tokenizer);
/* Whether a token ends a generation: EOS, the ends of a turn or message, and what else llama.cpp
 * takes for one by its text. */
bool sh_tokenizer_is_end(const sh_tokenizer *tokenizer, int32_t token);
/* A part of a character: a byte token of llama; for gpt2 a token of one byte that is no ASCII. */
bool sh_tokenizer_is_byte(const sh_tokenizer *tokenizer, int32_t token);
/* Control or unknown: not made from text unless SH_TOKENIZE_SPECIAL is given. */
bool sh_tokenizer_is_special(const sh_tokenizer *tokenizer, int32_t token);
bool sh_tokenizer_starts_word(const sh_tokenizer *tokenizer, int32_t token); /* "▁..." or "Ġ..." */
/* A token as the vocabulary spells it (*bytes of them, not 0-terminated); NULL: no such token. */
const char *sh_tokenizer_text(const sh_tokenizer *tokenizer, int32_t token, size_t *bytes);
/* The token that the vocabulary spells so, or -1. */
int32_t sh_tokenizer_find(const sh_tokenizer *tokenizer, const char *text, size_t bytes);

#endif
