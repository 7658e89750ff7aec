#include "trainer/tokenizer_words.h"

#include <stdlib.h>
#include <string.h>

#include "shared/model/tokenizer.h"
#include "trainer/tokenizer_train.h"

#define SLOTS_FIRST 1024
#define ESCAPED_MAX ((size_t)SH_SPACE_MARK_SIZE * SH_TOKENIZE_BYTES_MAX + SH_SPACE_MARK_SIZE)

void tr_words_release(tr_words *words)
{
    free(words->bytes);
    free(words->items);
    free(words->slots);
    free(words->chars);
    sh_buf_release(&words->scratch);
    *words = (tr_words){0};
}

/* ---- the table ---- */

static uint32_t hash_bytes(const uint8_t *s, size_t n)
{
    uint32_t h = 2166136261u; /* FNV-1a, then a mix, since slots are its low bits */
    for (size_t i = 0; i < n; i++)
        h = (h ^ s[i]) * 16777619u;
    h ^= h >> 15;
    h *= 0x2c1b3c6du;
    return h ^ (h >> 12);
}

/* The slot of a word, or the empty one where it belongs. */
static uint32_t *find_slot(const tr_words *w, const uint8_t *bytes, size_t n)
{
    for (size_t i = hash_bytes(bytes, n) & (w->n_slots - 1);; i = (i + 1) & (w->n_slots - 1)) {
        if (w->slots[i] == 0)
            return &w->slots[i];
        const tr_word *word = &w->items[w->slots[i] - 1];
        if (word->n == n && memcmp(w->bytes + word->at, bytes, n) == 0)
            return &w->slots[i];
    }
}

static sh_status grow_slots(tr_words *w)
{
    const size_t n = w->n_slots == 0 ? SLOTS_FIRST : 2 * w->n_slots;
    uint32_t *slots = sh_calloc(n, sizeof *slots);
    if (slots == NULL)
        return SH_ERR_NO_MEMORY;
    free(w->slots);
    w->slots = slots;
    w->n_slots = n;
    for (size_t i = 0; i < w->n; i++)
        *find_slot(w, w->bytes + w->items[i].at, w->items[i].n) = (uint32_t)i + 1;
    return SH_OK;
}

sh_status tr_words_add(tr_words *w, const uint8_t *bytes, size_t n)
{
    if (2 * w->n >= w->n_slots)
        SH_TRY(grow_slots(w));
    uint32_t *slot = find_slot(w, bytes, n);
    if (*slot == 0) {
        if (n > SH_TOKENIZER_TRAIN_WORDS_MAX - w->n_bytes)
            return SH_ERR_LIMIT;
        SH_TRY(sh_array_reserve((void **)&w->bytes, &w->bytes_cap, w->n_bytes + n, 1,
                                SH_TOKENIZER_TRAIN_WORDS_MAX));
        SH_TRY(sh_array_reserve((void **)&w->items, &w->cap, w->n + 1, sizeof *w->items,
                                SH_TOKENIZER_TRAIN_WORDS_MAX));
        memcpy(w->bytes + w->n_bytes, bytes, n);
        w->items[w->n++] = (tr_word){.at = (uint32_t)w->n_bytes, .n = (uint32_t)n};
        w->n_bytes += n;
        *slot = (uint32_t)w->n;
    }
    w->items[*slot - 1].count++;
    return SH_OK;
}

/* ---- byte-level ---- */

static sh_status add_chars(void *arg, const sh_pre_char *c, size_t n)
{
    tr_words *w = arg;
    sh_buf_clear(&w->scratch);
    uint8_t *bytes = sh_buf_reserve(&w->scratch, 4 * n);
    if (bytes == NULL)
        return SH_ERR_NO_MEMORY;
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        at += sh_char_encode(sh_pre_code(c[i]), bytes + at);
    return tr_words_add(w, bytes, at);
}

sh_status tr_words_add_bpe(tr_words *w, const sh_pre_rule *rule, const char *text, size_t bytes)
{
    w->scratch.max = 4 * (size_t)SH_TOKENIZE_BYTES_MAX;
    SH_TRY(
        sh_pre_decode(text, bytes, SH_TOKENIZE_BYTES_MAX, &w->chars, &w->chars_cap, &w->n_chars));
    return sh_pre_split(rule, w->chars, w->n_chars, add_chars, w);
}

/* ---- SentencePiece ---- */

unsigned tr_symbol(const uint8_t *text, size_t n, int32_t *code)
{
    const unsigned bytes = (unsigned)SH_MIN(sh_char_bytes(text[0]), n);
    unsigned used;
    uint8_t again[4];
    const uint32_t c = sh_char_decode(text, bytes, &used);
    const bool sound = (c < 0xD800 || c > 0xDFFF) && sh_char_encode(c, again) == bytes &&
                       memcmp(text, again, bytes) == 0;
    *code = sound ? (int32_t)c : -1;
    return bytes;
}

typedef enum { SYMBOL_MARK, SYMBOL_LETTER, SYMBOL_NUMBER, SYMBOL_SIGN, SYMBOL_ALONE } symbol_kind;

static symbol_kind kind_of(int32_t code, bool split_digits)
{
    if (code == 0x2581)
        return SYMBOL_MARK;
    if (code < 0x20 || code == 0x7F)
        return SYMBOL_ALONE;
    switch (sh_char_class_of((uint32_t)code)) {
    case SH_CLASS_SPACE:
        return SYMBOL_ALONE;
    case SH_CLASS_NUMBER:
        return split_digits ? SYMBOL_ALONE : SYMBOL_NUMBER;
    case SH_CLASS_LETTER:
    case SH_CLASS_MARK:
        return SYMBOL_LETTER;
    default:
        return SYMBOL_SIGN;
    }
}

/* Goes by the two neighbours alone: then no piece that one word has can be found across the border
 * of two others. */
static bool is_border(symbol_kind left, symbol_kind right)
{
    if (left == SYMBOL_ALONE || right == SYMBOL_ALONE)
        return true;
    return left != SYMBOL_MARK && left != right;
}

sh_status tr_words_add_spm(tr_words *w, bool space_prefix, bool split_digits, const char *text,
                           size_t bytes)
{
    w->scratch.max = ESCAPED_MAX;
    sh_buf_clear(&w->scratch);
    SH_TRY(sh_spm_escape(text, bytes, space_prefix, &w->scratch));
    const uint8_t *s = w->scratch.data;
    const size_t n = w->scratch.len;
    symbol_kind last = SYMBOL_ALONE;
    size_t begin = 0;
    for (size_t at = 0; at < n;) {
        int32_t code;
        const unsigned used = tr_symbol(s + at, n - at, &code);
        const symbol_kind kind = kind_of(code, split_digits);
        if (at > begin && is_border(last, kind)) {
            SH_TRY(tr_words_add(w, s + begin, at - begin));
            begin = at;
        }
        last = kind;
        at += used;
    }
    return n > begin ? tr_words_add(w, s + begin, n - begin) : SH_OK;
}
