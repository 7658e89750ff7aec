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
 * Two pairs never make the same text. A stretch of a word whose ends no symbol crosses has been
 * merged like any other stretch of the same text, since merges only grow symbols: so at any time
 * all of them are cut in the same way, and when they become a token, all do. Therefore a pair is as
 * good as its text, a merge makes no pair that was merged before, and a tokenizer by pairs (gpt2)
 * or by texts (llama) comes to the same symbols as the trainer.
 */
#ifndef SH_TRAINER_TOKENIZER_PAIRS_H
#define SH_TRAINER_TOKENIZER_PAIRS_H

#include "trainer/tokenizer_words.h"

#define TR_NO_TOKEN (-1)

/* What a token stands for. */
typedef struct {
    uint32_t at;
    uint16_t n;     /* bytes */
    uint16_t marks; /* "▁" at its beginning */
} tr_token;

typedef struct {
    int32_t left, right;
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
    bool changed;     /* its count, since it was put into the heap */
} tr_candidate;

typedef struct {
    uint64_t count, prefix; /* prefix: the text's first bytes, to compare by */
    uint32_t candidate, n;  /* n: bytes of the text */
} tr_heap_item;

typedef struct {
    const tr_word *words;
    bool marks;      /* "▁" is a space: in front of a token's text at most once, or all of it */
    uint64_t n_live; /* symbols that there are, by their words' multiplicity; gaps are none */

    uint8_t *texts;
    size_t n_texts, texts_cap;
    tr_token *tokens; /* the alphabet, then the merges */
    size_t n_tokens, tokens_cap;
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

/* Has to be released even after an error. All errors: no memory. */
SH_MUST_USE sh_status tr_pairs_init(tr_pairs *p, bool marks, const tr_word *words);
void tr_pairs_release(tr_pairs *p);
/* A token of the alphabet, before there are merges; *out is its index. */
SH_MUST_USE sh_status tr_pairs_add_token(tr_pairs *p, const uint8_t *text, size_t n, int32_t *out);
/* The next symbol: of a word, or a gap (TR_NO_TOKEN). The first and the last are gaps. */
SH_MUST_USE sh_status tr_pairs_push(tr_pairs *p, int32_t token, uint32_t word);
/* Counts the pairs, once all symbols are there. */
SH_MUST_USE sh_status tr_pairs_count(tr_pairs *p);
/* Makes the most frequent pair a token and merges it everywhere; *found is false when there is
 * none.
 */
SH_MUST_USE sh_status tr_pairs_merge(tr_pairs *p, bool *found);

const uint8_t *tr_pairs_text(const tr_pairs *p, int32_t token, size_t *n);

#endif
