/*
 * Byte pair encoding over distinct words: which two neighbours are the most frequent, and what is
 * left when they are merged. Internal to trainer/.
 *
 * Symbols of all words lie in one array, with a gap (no token) before, between and after words.
 * Every pair of adjacent symbols is at one place (that of its left symbol) and belongs to one
 * candidate, which counts it by its word's multiplicity; the places of a candidate are a list
 * through the symbols. A merge changes the counts of the pairs next to its places only, and the
 * candidates wait in a heap: the time of all merges is that of sorting their places.
 *
 * A candidate is a pair of tokens or, by_text, the text of a pair, whichever tokens make it.
 * Wherever a merge makes a pair that was merged before, it is merged at once, lower ranks first:
 * so would it be by who tokenizes with the result.
 */
#ifndef SH_TRAINER_TOKENIZER_PAIRS_H
#define SH_TRAINER_TOKENIZER_PAIRS_H

#include "trainer/tokenizer_words.h"

#define TR_NO_TOKEN (-1)

/* What a token stands for. */
typedef struct {
    uint32_t at;
    uint16_t n;     /* bytes */
    uint16_t marks; /* "▁" at its beginning; counted by_text only */
} tr_token;

typedef struct {
    int32_t left, right, token; /* by_text: left and right are one of the pairs that make it */
} tr_merge;

typedef struct {
    int32_t token;
    uint32_t prev, next, word;
    uint32_t candidate;              /* of it and the next one: index + 1; 0: none */
    uint32_t place_prev, place_next; /* of the candidate's list; 0: none */
} tr_pair_symbol;

typedef struct {
    int32_t left, right;
    uint64_t count;
    uint32_t place;   /* the first; 0: none (symbol 0 is a gap) */
    uint32_t chain;   /* in its bucket, or among the free: index + 1; 0: the last */
    uint32_t heap_at; /* + 1; 0: not there */
    int32_t merge;    /* that it has become; -1: none yet */
    bool changed;     /* its count, since it was put into the heap */
} tr_candidate;

typedef struct {
    uint64_t count, prefix; /* prefix: the text's first bytes, to compare by */
    uint32_t candidate, n;  /* n: bytes of the text */
} tr_heap_item;

typedef struct {
    bool by_text;
    const tr_word *words;
    uint64_t n_live; /* symbols that there are, by their words' multiplicity; gaps are none */

    uint8_t *texts;
    size_t n_texts, texts_cap;
    tr_token *tokens;
    size_t n_tokens, tokens_cap;
    uint32_t *token_slots; /* hash table of index + 1 by text; tokens_max is at most half of it */
    uint32_t token_mask, tokens_max;
    tr_merge *merges;
    size_t n_merges, merges_cap;

    tr_pair_symbol *symbols;
    size_t n_symbols, symbols_cap;
    tr_candidate *candidates;
    size_t n_candidates, candidates_cap;
    uint32_t n_used, free_candidate;
    uint32_t *buckets; /* a power of two, at least one */
    size_t n_buckets;
    uint32_t *changed;
    size_t n_changed, changed_cap;
    uint32_t *places; /* of one candidate, in order */
    size_t places_cap;
    tr_heap_item *heap;
    size_t n_heap, heap_cap;
} tr_pairs;

/* Takes a zeroed one, and has to be released even after an error. All errors: no memory. */
SH_MUST_USE sh_status tr_pairs_init(tr_pairs *p, bool by_text, uint32_t tokens_max,
                                    const tr_word *words);
void tr_pairs_release(tr_pairs *p);
/* A token of the alphabet; *out is its index. There must be none of its text. */
SH_MUST_USE sh_status tr_pairs_add_token(tr_pairs *p, const uint8_t *text, size_t n, int32_t *out);
/* The next symbol: of a word, or a gap (TR_NO_TOKEN). The first and the last are gaps. */
SH_MUST_USE sh_status tr_pairs_push(tr_pairs *p, int32_t token, uint32_t word);
/* Counts the pairs, once all symbols are there. */
SH_MUST_USE sh_status tr_pairs_count(tr_pairs *p);
/* Merges the most frequent pair everywhere; *found is false when there is none. It is a new token
 * but where (by pairs) another pair has made one of the same text. Needs n_tokens < tokens_max. */
SH_MUST_USE sh_status tr_pairs_merge(tr_pairs *p, bool *found);

const uint8_t *tr_pairs_text(const tr_pairs *p, int32_t token, size_t *n);

#endif
