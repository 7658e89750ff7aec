/*
 * Tokenizers from GGUF metadata. Now: `llama` (SentencePiece-style BPE by score, byte fallback).
 * Same ids as llama.cpp on every byte string, invalid UTF-8 included.
 * Immutable after load; may be shared by threads.
 */
#ifndef SH_MODEL_TOKENIZER_H
#define SH_MODEL_TOKENIZER_H

#include "shared/base/buf.h"
#include "shared/model/gguf.h"

typedef struct sh_tokenizer sh_tokenizer;

/* SH_ERR_UNSUPPORTED names an unknown tokenizer model; SH_ERR_INVALID a vocabulary without its 256
 * byte tokens. */
SH_MUST_USE sh_status sh_tokenizer_load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err);
void sh_tokenizer_destroy(sh_tokenizer **tokenizer);

enum {
    SH_TOKENIZE_BOS = 1 /* add BOS if the model says so */,
    SH_TOKENIZE_SPECIAL = 2 /* parse
special tokens' text */
    ,
    SH_TOKENIZE_CONTINUE = 4 /* no space is put before the text: it
goes on after other tokens */
};
/* *out is malloc'ed; *n tokens. SH_ERR_LIMIT over SH_TOKENIZE_BYTES_MAX. */
#define SH_TOKENIZE_BYTES_MAX (256u << 20)
SH_MUST_USE sh_status sh_tokenize(const sh_tokenizer *tokenizer, const char *text, size_t bytes,
                                  unsigned flags, int32_t **out, size_t *n, sh_error *err);
/* Appends the text of one token ("▁" is a space; byte tokens their byte; control tokens nothing).
 */
SH_MUST_USE sh_status sh_detokenize(const sh_tokenizer *tokenizer, int32_t token, sh_buf *out);

uint32_t sh_tokenizer_size(const sh_tokenizer *tokenizer);
int32_t sh_tokenizer_bos(const sh_tokenizer *tokenizer); /* -1: none */
int32_t sh_tokenizer_eos(const sh_tokenizer *tokenizer);
bool sh_tokenizer_adds_bos(const sh_tokenizer *tokenizer); /* the model says that BOS is added */
bool sh_tokenizer_is_byte(const sh_tokenizer *tokenizer, int32_t token);
bool sh_tokenizer_starts_word(const sh_tokenizer *tokenizer, int32_t token); /* begins with "▁" */

#endif
