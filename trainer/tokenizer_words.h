/*
 * Distinct words of a text with how often each is there, and how the two kinds of tokenizer cut a
 * text into them. Internal to trainer/.
 */
#ifndef SH_TRAINER_TOKENIZER_WORDS_H
#define SH_TRAINER_TOKENIZER_WORDS_H

#include "shared/model/tokenizer_pre.h"

typedef struct {
    uint32_t at, n; /* in bytes */
    uint64_t count;
} tr_word;

/* Valid when zeroed. Errors are SH_ERR_NO_MEMORY and, of words, SH_ERR_LIMIT. */
typedef struct {
    uint8_t *bytes; /* all words, one after another */
    size_t n_bytes, bytes_cap;
    tr_word *items;
    size_t n, cap;
    uint32_t *slots; /* hash table of index + 1, 0 is empty; n_slots, a power of two, or none yet */
    size_t n_slots;
    sh_pre_char *chars; /* of one text */
    size_t n_chars, chars_cap;
    sh_buf scratch;
} tr_words;

void tr_words_release(tr_words *words);
SH_MUST_USE sh_status tr_words_add(tr_words *words, const uint8_t *bytes, size_t n);
/* The words of a text; of those of SPM, a symbol that is no UTF-8 is one. */
SH_MUST_USE sh_status tr_words_add_bpe(tr_words *words, const sh_pre_rule *rule, const char *text,
                                       size_t bytes);
SH_MUST_USE sh_status tr_words_add_spm(tr_words *words, bool space_prefix, bool split_digits,
                                       const char *text, size_t bytes);

/* The symbol of SPM at text[0] of n > 0 bytes: its bytes, and the code point, or -1 when it is no
 * well-formed character. */
unsigned tr_symbol(const uint8_t *text, size_t n, int32_t *code);

#endif
