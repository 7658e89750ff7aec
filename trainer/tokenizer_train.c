/*
 * From documents to a vocabulary: options, special tokens cut out, the alphabet, merges until the
 * vocabulary is full.
 */
#include "trainer/tokenizer_train.h"

#include <stdlib.h>
#include <string.h>

#include "shared/model/tokenizer.h"
#include "trainer/tokenizer_model.h"

#define BYTES 256u
#define CODES (SH_CHAR_MAX + 1)

struct sh_tokenizer_trainer {
    sh_tokenizer_train_options options;
    const sh_pre_rule *rule;
    const char **controls; /* by id */
    size_t *ends;          /* scratch: where each control token is next in a document */
    size_t n_controls;
    tr_words words;
    tr_pairs pairs;
    size_t n_alphabet;
    uint64_t documents, text_bytes;
    bool done;
};

sh_tokenizer_train_options sh_tokenizer_train_defaults(sh_tokenizer_kind kind, uint32_t vocab)
{
    if (kind == SH_TOKENIZER_SPM)
        return (sh_tokenizer_train_options){.kind = kind,
                                            .vocab = vocab,
                                            .bos = "<s>",
                                            .eos = "</s>",
                                            .add_bos = true,
                                            .add_space_prefix = true,
                                            .split_digits = true,
                                            .coverage = 0.9995};
    return (sh_tokenizer_train_options){.kind = kind,
                                        .vocab = vocab,
                                        .bos = "<|endoftext|>",
                                        .eos = "<|endoftext|>",
                                        .pre = "smollm"};
}

/* ---- special tokens ---- */

static bool is_utf8(const char *text, size_t n)
{
    int32_t code = 0;
    for (size_t at = 0; at < n && code >= 0;)
        at += tr_symbol((const uint8_t *)text + at, n - at, &code);
    return code >= 0;
}

static sh_status add_control(sh_tokenizer_trainer *t, const char *text, sh_error *err)
{
    const size_t n = text != NULL ? strlen(text) : 0;
    if (n == 0 || n > SH_TOKENIZER_SPECIAL_BYTES_MAX || !is_utf8(text, n))
        return sh_fail(err, SH_ERR_INVALID,
                       "special token %zu, '%.40s', is not UTF-8 of 1 to %d bytes", t->n_controls,
                       n > 0 ? text : "", SH_TOKENIZER_SPECIAL_BYTES_MAX);
    for (size_t i = 0; i < t->n_controls; i++)
        if (strcmp(t->controls[i], text) == 0)
            return sh_fail(err, SH_ERR_INVALID, "special token '%.80s' is there twice", text);
    t->controls[t->n_controls++] = text;
    return SH_OK;
}

static sh_status add_controls(sh_tokenizer_trainer *t, sh_error *err)
{
    const sh_tokenizer_train_options *o = &t->options;
    if (o->n_specials > SH_TOKENIZER_SPECIALS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%zu special tokens are over %d", o->n_specials,
                       SH_TOKENIZER_SPECIALS_MAX);
    t->controls = sh_calloc(o->n_specials + 3, sizeof *t->controls);
    t->ends = sh_calloc(o->n_specials + 3, sizeof *t->ends);
    if (t->controls == NULL || t->ends == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for special tokens");
    if (o->kind == SH_TOKENIZER_SPM)
        SH_TRY(add_control(t, TR_UNKNOWN, err));
    SH_TRY(add_control(t, o->bos, err));
    if (o->eos == NULL || strcmp(o->bos, o->eos) != 0)
        SH_TRY(add_control(t, o->eos, err));
    for (size_t i = 0; i < o->n_specials; i++)
        SH_TRY(add_control(t, o->specials[i], err));
    return SH_OK;
}

/* ---- options ---- */

static sh_status check_options(sh_tokenizer_trainer *t, sh_error *err)
{
    const sh_tokenizer_train_options *o = &t->options;
    if (o->vocab > SH_VOCAB_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a vocabulary of %u tokens is over %u", o->vocab,
                       SH_VOCAB_MAX);
    if (o->vocab < BYTES + t->n_controls)
        return sh_fail(err, SH_ERR_INVALID,
                       "a vocabulary of %u tokens has no room for %u bytes and %zu special tokens: "
                       "it needs at least %zu",
                       o->vocab, BYTES, t->n_controls, BYTES + t->n_controls);
    if (o->kind == SH_TOKENIZER_SPM) {
        if (!(o->coverage > 0 && o->coverage <= 1))
            return sh_fail(err, SH_ERR_INVALID, "a coverage of %g is not in (0, 1]", o->coverage);
        return SH_OK;
    }
    t->rule = o->pre != NULL ? sh_pre_find(o->pre, strlen(o->pre)) : NULL;
    if (t->rule == NULL)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "pre-tokenizer '%.40s' is none of those that tokenizer_pre.c lists (smollm, "
                       "gpt-2, llama-bpe, qwen2, ...)",
                       o->pre != NULL ? o->pre : "");
    return SH_OK;
}

sh_status sh_tokenizer_trainer_create(const sh_tokenizer_train_options *options,
                                      sh_tokenizer_trainer **out, sh_error *err)
{
    sh_status status;
    sh_tokenizer_trainer *t = sh_calloc(1, sizeof *t);
    if (t == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a tokenizer's trainer");
    t->options = *options;
    SH_GOTO(add_controls(t, err));
    SH_GOTO(check_options(t, err));
    *out = t;
    t = NULL;
cleanup:
    sh_tokenizer_trainer_destroy(&t);
    return status;
}

void sh_tokenizer_trainer_destroy(sh_tokenizer_trainer **trainer)
{
    sh_tokenizer_trainer *t = *trainer;
    if (t == NULL)
        return;
    tr_words_release(&t->words);
    tr_pairs_release(&t->pairs);
    free(t->controls);
    free(t->ends);
    free(t);
    *trainer = NULL;
}

/* ---- documents ---- */

/* The first control token in text from `at` on, the longest of those that begin there; *n is its
 * length, 0 at the end of the text. t->ends[i] is where control i was found last, or `bytes`. */
static size_t next_control(sh_tokenizer_trainer *t, const char *text, size_t bytes, size_t at,
                           size_t *n)
{
    size_t first = bytes;
    *n = 0;
    for (size_t i = 0; i < t->n_controls; i++) {
        const size_t length = strlen(t->controls[i]);
        if (t->ends[i] < at || at == 0) {
            const char *match = memmem(text + at, bytes - at, t->controls[i], length);
            t->ends[i] = match != NULL ? (size_t)(match - text) : bytes;
        }
        if (t->ends[i] < first || (t->ends[i] == first && first < bytes && length > *n)) {
            first = t->ends[i];
            *n = length;
        }
    }
    return first;
}

static sh_status add_words(sh_tokenizer_trainer *t, const char *text, size_t bytes)
{
    const sh_tokenizer_train_options *o = &t->options;
    if (bytes == 0)
        return SH_OK;
    return t->rule != NULL
               ? tr_words_add_bpe(&t->words, t->rule, text, bytes)
               : tr_words_add_spm(&t->words, o->add_space_prefix, o->split_digits, text, bytes);
}

sh_status sh_tokenizer_trainer_add(sh_tokenizer_trainer *t, const void *text, size_t bytes,
                                   sh_error *err)
{
    SH_ASSERT(!t->done);
    if (bytes > SH_TOKENIZE_BYTES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a document of %zu bytes is over %u: cut it", bytes,
                       SH_TOKENIZE_BYTES_MAX);
    if (bytes > SH_TOKENIZER_TRAIN_BYTES_MAX - t->text_bytes)
        return sh_fail(err, SH_ERR_LIMIT, "the documents have over %llu bytes",
                       (unsigned long long)SH_TOKENIZER_TRAIN_BYTES_MAX);
    sh_status status = SH_OK;
    for (size_t at = 0, n; at < bytes && status == SH_OK;) {
        const size_t stop = next_control(t, text, bytes, at, &n);
        status = add_words(t, (const char *)text + at, stop - at);
        t->text_bytes += stop - at;
        at = stop + n;
    }
    t->documents++;
    if (status == SH_ERR_LIMIT)
        return sh_fail(err, status,
                       "the text has over %u bytes of distinct words: train on a part of it",
                       SH_TOKENIZER_TRAIN_WORDS_MAX);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "no memory for the text's words");
}

/* ---- the alphabet of SPM ---- */

typedef struct {
    uint32_t code;
    uint64_t count;
} counted;

static int compare_counts(const void *a, const void *b)
{
    const counted *x = a, *y = b;
    if (x->count != y->count)
        return x->count > y->count ? -1 : 1;
    return (x->code > y->code) - (x->code < y->code);
}

/* ASCII's control characters have their byte tokens, which cost as little. */
static bool has_byte_token(int32_t code)
{
    return code < 0x20 || code == 0x7F;
}

/* How often each character is there; "▁" always is. */
static size_t count_characters(const tr_words *words, uint64_t *counts, uint64_t *total)
{
    size_t distinct = 0;
    *total = 0;
    for (size_t i = 0; i < words->n; i++) {
        const tr_word *w = &words->items[i];
        for (uint32_t at = 0; at < w->n;) {
            int32_t code;
            at += tr_symbol(words->bytes + w->at + at, w->n - at, &code);
            if (has_byte_token(code))
                continue;
            distinct += counts[code] == 0;
            counts[code] += w->count;
            *total += w->count;
        }
    }
    return distinct;
}

static sh_status add_character(sh_tokenizer_trainer *t, uint32_t code, int32_t *ids)
{
    uint8_t text[4];
    int32_t token;
    SH_TRY(tr_pairs_add_token(&t->pairs, text, sh_char_encode(code, text), &token));
    ids[code] = token + 1;
    return SH_OK;
}

/* The most frequent characters until they are enough of the text, and "▁", without which a space
 * could not be written. ids[code] is the token + 1, or 0. */
static sh_status choose_characters(sh_tokenizer_trainer *t, const counted *sorted, size_t n,
                                   uint64_t total, int32_t *ids, sh_error *err)
{
    const uint32_t mark = 0x2581;
    const size_t fixed = BYTES + t->n_controls;
    uint64_t covered = 0;
    size_t chosen = 0;
    bool has_mark = false;
    for (; chosen < n && (double)covered < t->options.coverage * (double)total; chosen++) {
        covered += sorted[chosen].count;
        has_mark = has_mark || sorted[chosen].code == mark;
    }
    t->n_alphabet = chosen + !has_mark;
    if (fixed + t->n_alphabet > t->options.vocab)
        return sh_fail(err, SH_ERR_INVALID,
                       "a vocabulary of %u tokens has no room for the text's %zu characters, %u "
                       "bytes and %zu special tokens: it needs at least %zu, or a lower coverage",
                       t->options.vocab, t->n_alphabet, BYTES, t->n_controls,
                       fixed + t->n_alphabet);
    sh_status status = SH_OK;
    for (size_t i = 0; i < chosen && status == SH_OK; i++)
        status = add_character(t, sorted[i].code, ids);
    if (status == SH_OK && !has_mark)
        status = add_character(t, mark, ids);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "no memory for characters");
}

static sh_status make_alphabet(sh_tokenizer_trainer *t, int32_t *ids, sh_error *err)
{
    sh_status status;
    uint64_t total;
    counted *sorted = NULL;
    uint64_t *counts = sh_calloc(CODES, sizeof *counts);
    size_t n = counts != NULL ? count_characters(&t->words, counts, &total) : 0, at = 0;
    sorted = sh_calloc(n, sizeof *sorted);
    if (counts == NULL || sorted == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory to count characters");
        goto cleanup;
    }
    for (uint32_t code = 0; code < CODES; code++)
        if (counts[code] > 0)
            sorted[at++] = (counted){code, counts[code]};
    qsort(sorted, n, sizeof *sorted, compare_counts);
    SH_GOTO(choose_characters(t, sorted, n, total, ids, err));
cleanup:
    free(sorted);
    free(counts);
    return status;
}

/* ---- words to symbols ---- */

/* What has no token is a gap, and as many byte tokens as it has bytes. */
static sh_status push_characters(sh_tokenizer_trainer *t, uint32_t word, const int32_t *ids,
                                 uint64_t *byte_tokens)
{
    const tr_word *w = &t->words.items[word];
    for (uint32_t at = 0; at < w->n;) {
        int32_t code;
        const unsigned used = tr_symbol(t->words.bytes + w->at + at, w->n - at, &code);
        const int32_t token = code >= 0 ? ids[code] - 1 : TR_NO_TOKEN;
        at += used;
        if (token < 0)
            *byte_tokens += used * w->count;
        SH_TRY(tr_pairs_push(&t->pairs, token, word));
    }
    return SH_OK;
}

static sh_status push_bytes(sh_tokenizer_trainer *t, uint32_t word)
{
    const tr_word *w = &t->words.items[word];
    for (uint32_t at = 0; at < w->n; at++)
        SH_TRY(tr_pairs_push(&t->pairs, t->words.bytes[w->at + at], word));
    return SH_OK;
}

static sh_status push_words(sh_tokenizer_trainer *t, const int32_t *ids, uint64_t *byte_tokens)
{
    SH_TRY(tr_pairs_push(&t->pairs, TR_NO_TOKEN, 0));
    for (uint32_t i = 0; i < t->words.n; i++) {
        SH_TRY(ids != NULL ? push_characters(t, i, ids, byte_tokens) : push_bytes(t, i));
        SH_TRY(tr_pairs_push(&t->pairs, TR_NO_TOKEN, i));
    }
    return tr_pairs_count(&t->pairs);
}

static sh_status start(sh_tokenizer_trainer *t, uint64_t *byte_tokens, sh_error *err)
{
    const bool spm = t->options.kind == SH_TOKENIZER_SPM;
    sh_status status;
    int32_t *ids = NULL, token;
    SH_GOTO(tr_pairs_init(&t->pairs, spm, t->words.items));
    if (spm) {
        ids = sh_calloc(CODES, sizeof *ids);
        status = ids != NULL ? make_alphabet(t, ids, err) : SH_ERR_NO_MEMORY;
        if (status == SH_ERR_INVALID)
            goto cleanup;
        SH_GOTO(status);
    } else {
        t->n_alphabet = BYTES;
        for (unsigned b = 0; b < BYTES; b++)
            SH_GOTO(tr_pairs_add_token(&t->pairs, &(uint8_t){(uint8_t)b}, 1, &token));
    }
    SH_GOTO(push_words(t, ids, byte_tokens));
cleanup:
    free(ids);
    if (status == SH_ERR_NO_MEMORY || status == SH_ERR_LIMIT)
        return sh_fail(err, status, "no memory for the pairs of %zu distinct words", t->words.n);
    return status;
}

/* ---- training ---- */

/* Tokens that are neither of the alphabet nor merges. */
static size_t n_fixed(const sh_tokenizer_trainer *t)
{
    return t->n_controls + (t->options.kind == SH_TOKENIZER_SPM ? BYTES : 0);
}

static sh_status merge_all(sh_tokenizer_trainer *t, sh_error *err)
{
    const sh_tokenizer_train_options *o = &t->options;
    for (size_t n = n_fixed(t) + t->pairs.n_tokens; n < o->vocab; n++) {
        bool found;
        if (tr_pairs_merge(&t->pairs, &found) != SH_OK)
            return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for merge %zu", t->pairs.n_merges);
        if (!found)
            return sh_fail(err, SH_ERR_INVALID,
                           "the text is too short for a vocabulary of %u tokens: it allows %zu at "
                           "most",
                           o->vocab, n);
        if (o->progress != NULL && !o->progress(o->progress_arg, (uint32_t)n + 1))
            return sh_fail(err, SH_ERR_CANCELLED, "cancelled at %zu of %u tokens", n + 1, o->vocab);
    }
    return SH_OK;
}

sh_status sh_tokenizer_trainer_run(sh_tokenizer_trainer *t, sh_tokenizer_train_result *result,
                                   sh_error *err)
{
    uint64_t byte_tokens = 0;
    SH_ASSERT(!t->done);
    t->done = true;
    SH_TRY(start(t, &byte_tokens, err));
    SH_TRY(merge_all(t, err));
    *result = (sh_tokenizer_train_result){
        .vocab = t->options.vocab,
        .merges = (uint32_t)t->pairs.n_merges,
        .characters = t->options.kind == SH_TOKENIZER_SPM ? (uint32_t)t->n_alphabet : 0,
        .documents = t->documents,
        .words = t->words.n,
        .text_bytes = t->text_bytes,
        .text_tokens = t->pairs.n_live + byte_tokens};
    return SH_OK;
}

sh_status sh_tokenizer_trainer_save(const sh_tokenizer_trainer *t, const char *path, sh_error *err)
{
    SH_ASSERT(t->done && n_fixed(t) + t->pairs.n_tokens == t->options.vocab);
    return tr_tokenizer_save(&(tr_tokenizer){.options = &t->options,
                                             .controls = t->controls,
                                             .n_controls = t->n_controls,
                                             .pairs = &t->pairs,
                                             .n_alphabet = t->n_alphabet},
                             path, err);
}
