/*
 * Inside the tokenizers: the vocabulary, the buffers of a call, and who does what.
 *
 *   tokenizer_load.c   the vocabulary from GGUF: texts, kinds, special tokens
 *   tokenizer.c        a text to fragments at special tokens, tokens to text, questions
 *   tokenizer_merge.c  the queue of pairs, which both kinds of tokenizer share
 *   tokenizer_spm.c    `llama`: symbols of characters, pairs by score, bytes for the rest
 *   tokenizer_bpe.c    `gpt2`: words by a rule of tokenizer_pre.h, symbols of bytes, pairs by rank
 */
#ifndef SH_MODEL_TOKENIZER_INTERNAL_H
#define SH_MODEL_TOKENIZER_INTERNAL_H

#include "shared/model/tokenizer.h"
#include "shared/model/tokenizer_pre.h"

#define SH_MERGES_MAX     (1u << 21) /* ranks are exact as floats */
#define SH_TOKEN_ENDS_MAX 16
#define SH_TOKEN_WORK_MAX ((size_t)3 * SH_TOKENIZE_BYTES_MAX + 16)

typedef enum {
    SH_TOKEN_UNDEFINED,
    SH_TOKEN_NORMAL,
    SH_TOKEN_UNKNOWN,
    SH_TOKEN_CONTROL,
    SH_TOKEN_USER,
    SH_TOKEN_UNUSED,
    SH_TOKEN_BYTE
} sh_token_kind;

/* A merge of gpt2; its index is its rank. */
typedef struct {
    int32_t left, right, result;
} sh_merge;

struct sh_tokenizer {
    uint32_t n;
    char *texts;       /* all texts, one after another */
    uint32_t *offsets; /* [n + 1] */
    float *scores;     /* [n]; llama only */
    uint8_t *kinds;    /* [n], sh_token_kind */
    uint32_t *slots;   /* hash table of id + 1 by text, 0 is empty; slot_mask + 1 of them */
    uint32_t slot_mask;
    uint32_t text_max;      /* bytes of the longest text */
    int32_t bytes[256];     /* the token of each byte; -1: none (gpt2 only) */
    const sh_pre_rule *pre; /* gpt2; NULL: llama */
    sh_merge *merges;
    uint32_t n_merges;
    uint32_t *merge_slots; /* hash table of rank + 1 by pair, 0 is empty */
    uint32_t merge_mask;
    int32_t *specials; /* control, user-defined and unknown tokens, longest text first */
    size_t n_specials;
    int32_t bos, eos, eot;
    int32_t ends[SH_TOKEN_ENDS_MAX]; /* what ends a generation */
    size_t n_ends;
    bool add_bos, add_eos, add_space_prefix;
    bool has_user;           /* some token is user-defined: cut out of every text */
    bool crosses_words;      /* llama: some text has "▁" after another character */
    bool strip_after;        /* special tokens swallow white space after them (Phi-3) ... */
    int32_t strip_before_id; /* ... and this one before it (Jina's "<mask>"); -1: none */
};

const char *sh_token_text(const sh_tokenizer *t, uint32_t id, uint32_t *n);
/* The id of a text, or -1. */
int32_t sh_token_find(const sh_tokenizer *t, const char *text, uint32_t n);
/* The value of "<0xAB>", or -1. */
int sh_token_parse_byte(const char *text, uint32_t n);

/* What is kind's own to load, after texts and kinds: merges, byte tokens, rule. */
SH_MUST_USE sh_status sh_bpe_load(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err);
SH_MUST_USE sh_status sh_spm_load(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err);

/* ---- the buffers of a call, used again for each fragment ---- */

typedef struct {
    const char *text; /* llama: what it stands for */
    uint32_t n;       /* its bytes of the input; 0: merged into the one before */
    int32_t id;       /* gpt2: its token */
    int32_t prev, next;
} sh_symbol;

typedef struct {
    float score; /* the highest is merged first; gpt2: minus the rank */
    int32_t left, right;
    uint32_t n; /* bytes of both when it was queued; another sum now: stale */
} sh_pair;

typedef struct {
    const sh_tokenizer *t;
    sh_symbol *symbols;
    size_t n_symbols, symbols_cap;
    sh_pair *heap;
    size_t n_heap, heap_cap;
    sh_pre_char *chars; /* gpt2: the fragment, decoded */
    size_t n_chars, chars_cap;
    int32_t *out;
    size_t n_out, out_cap;
    sh_buf escaped;
    uint64_t steps; /* of the heap and of the scanners: what tests measure time by */
} sh_token_work;

SH_MUST_USE sh_status sh_token_emit(sh_token_work *w, int32_t token);
/* Appends to the symbols that wait to be merged. */
SH_MUST_USE sh_status sh_token_push(sh_token_work *w, sh_symbol s);
/* Merges the symbols gathered so far until no pair is a token; they stay, linked by next. */
SH_MUST_USE sh_status sh_token_merge(sh_token_work *w);

/* The tokens of a fragment without special ones. */
SH_MUST_USE sh_status sh_spm_tokenize(sh_token_work *w, const char *text, size_t bytes,
                                      bool prefix);
SH_MUST_USE sh_status sh_bpe_tokenize(sh_token_work *w, const char *text, size_t bytes);

/* The merge of two tokens, or -1. */
int32_t sh_bpe_find_merge(const sh_tokenizer *t, int32_t left, int32_t right);
/* Appends the bytes that a gpt2 text stands for; a character that stands for none is itself. */
SH_MUST_USE sh_status sh_bpe_decode(const char *text, uint32_t n, sh_buf *out);

/* sh_tokenize with the number of steps that it took. */
typedef struct {
    int32_t *ids;
    size_t n;
    uint64_t steps;
} sh_token_result;
SH_MUST_USE sh_status sh_tokenize_counted(const sh_tokenizer *t, const char *text, size_t bytes,
                                          unsigned flags, sh_token_result *out, sh_error *err);

#endif
