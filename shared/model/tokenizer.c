/*
 * SentencePiece-style tokenizer (`tokenizer.ggml.model` = "llama"), as llama.cpp runs it:
 *
 *   1. tokens of special kinds are cut out of the text, longest text first;
 *   2. what is left gets a space in front (if the model says so and it follows no other text),
 *      spaces become "▁" (U+2581), and is split into symbols of one UTF-8 character; the length
 *      comes from the first byte alone, so invalid bytes make symbols of their own;
 *   3. the adjacent pair whose text is the token of the highest score (leftmost on ties) is
 *      merged, until no pair is a token;
 *   4. a symbol that is no token is written as its bytes' tokens.
 *
 * A merge can cross from one word to the next only when some token does; where none does (checked
 * at load) each word is a queue of its own, which makes the time linear in the text.
 */
#include "shared/model/tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/blame.h"

#define VOCAB_MAX       (1u << 20)
#define TEXT_BYTES_MAX  (64u << 20) /* all tokens' texts together */
#define EMPTY_TEXT_MAX  24          /* "[EMPTY_1048576]" */
#define SPACE_MARK      "\xe2\x96\x81"
#define SPACE_MARK_SIZE 3

enum { KIND_UNDEFINED, KIND_NORMAL, KIND_UNKNOWN, KIND_CONTROL, KIND_USER, KIND_UNUSED, KIND_BYTE };

struct sh_tokenizer {
    uint32_t n;
    char *texts;       /* all texts, one after another */
    uint32_t *offsets; /* [n + 1] */
    float *scores;
    uint8_t *kinds;
    uint32_t *slots; /* hash table of id + 1 by text, 0 is empty; slot_mask + 1 of them */
    uint32_t slot_mask;
    uint32_t text_max; /* bytes of the longest text */
    int32_t bytes[256];
    int32_t *specials; /* control, user-defined and unknown tokens, longest text first */
    size_t n_specials;
    int32_t bos, eos;
    bool add_bos, add_space_prefix;
    bool has_user;      /* some token is user-defined: cut out of every text */
    bool crosses_words; /* some text has "▁" after another character */
};

static const char *token_text(const sh_tokenizer *t, uint32_t id, uint32_t *n)
{
    *n = t->offsets[id + 1] - t->offsets[id];
    return t->texts + t->offsets[id];
}

static uint32_t hash_text(const char *s, uint32_t n)
{
    uint32_t h = 2166136261u; /* FNV-1a, then a mix, since slots are its low bits */
    for (uint32_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)s[i]) * 16777619u;
    h ^= h >> 15;
    h *= 0x2c1b3c6du;
    return h ^ (h >> 12);
}

/* The id of a text, or -1. */
static int32_t find_text(const sh_tokenizer *t, const char *s, uint32_t n)
{
    if (n > t->text_max)
        return -1;
    for (uint32_t i = hash_text(s, n) & t->slot_mask;; i = (i + 1) & t->slot_mask) {
        if (t->slots[i] == 0)
            return -1;
        uint32_t id = t->slots[i] - 1, m;
        const char *text = token_text(t, id, &m);
        if (m == n && memcmp(text, s, n) == 0)
            return (int32_t)id;
    }
}

/* ---- loading ---- */

static sh_status index_texts(sh_tokenizer *t, sh_error *err)
{
    uint32_t size = 16;
    while (size < 2 * t->n)
        size *= 2;
    t->slots = sh_calloc(size, sizeof *t->slots);
    if (t->slots == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    t->slot_mask = size - 1;
    for (uint32_t id = 0; id < t->n; id++) {
        uint32_t n;
        const char *text = token_text(t, id, &n);
        t->text_max = SH_MAX(t->text_max, n);
        if (find_text(t, text, n) >= 0)
            return sh_fail(err, SH_ERR_INVALID, "tokenizer.ggml.tokens: token %u is there twice",
                           id);
        uint32_t i = hash_text(text, n) & t->slot_mask;
        while (t->slots[i] != 0)
            i = (i + 1) & t->slot_mask;
        t->slots[i] = id + 1;
    }
    return SH_OK;
}

/* Copies the texts out of the file; an empty one gets the name that llama.cpp gives it. */
static sh_status copy_texts(sh_tokenizer *t, const char **texts, const uint32_t *lengths,
                            sh_error *err)
{
    size_t total = 0;
    for (uint32_t i = 0; i < t->n; i++)
        total += lengths[i] != 0 ? lengths[i] : EMPTY_TEXT_MAX;
    if (total > TEXT_BYTES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "tokenizer.ggml.tokens: over %u bytes of text",
                       TEXT_BYTES_MAX);
    t->texts = sh_calloc(total + 1, 1);
    t->offsets = sh_calloc((size_t)t->n + 1, sizeof *t->offsets);
    if (t->texts == NULL || t->offsets == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    uint32_t at = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t n = lengths[i];
        if (n != 0)
            memcpy(t->texts + at, texts[i], n);
        else
            n = (uint32_t)snprintf(t->texts + at, EMPTY_TEXT_MAX, "[EMPTY_%u]", i);
        at += n;
        t->offsets[i + 1] = at;
    }
    return SH_OK;
}

static sh_status load_texts(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    sh_status status;
    const char **texts = sh_calloc(t->n, sizeof *texts);
    uint32_t *lengths = sh_calloc(t->n, sizeof *lengths);
    if (texts == NULL || lengths == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
        goto cleanup;
    }
    SH_GOTO(sh_gguf_get_strings(gguf, "tokenizer.ggml.tokens", texts, lengths, t->n, err));
    SH_GOTO(copy_texts(t, texts, lengths, err));
    SH_GOTO(index_texts(t, err));

cleanup:
    free(texts);
    free(lengths);
    return status;
}

static sh_status load_scores(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.scores";
    size_t n;
    t->scores = sh_calloc(t->n, sizeof *t->scores);
    if (t->scores == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    sh_error local = {0};
    sh_status status = sh_gguf_get_array_count(gguf, key, &n, &local);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK; /* all zero: then the leftmost pair is merged first */
    if (status != SH_OK)
        return sh_fail(err, status, "%s", local.text);
    if (n != t->n)
        return sh_fail(err, SH_ERR_INVALID, "%s has %zu elements for %u tokens", key, n, t->n);
    SH_TRY(sh_gguf_get_f32s(gguf, key, t->scores, n, err));
    for (uint32_t i = 0; i < t->n; i++)
        if (isnan(t->scores[i]))
            return sh_fail(err, SH_ERR_INVALID, "%s: the score of token %u is not a number", key,
                           i);
    return SH_OK;
}

/* The value of "<0xAB>", or -1. */
static int parse_byte_text(const char *s, uint32_t n)
{
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    const char *high = memchr(digits, s[3], 16), *low = memchr(digits, s[4], 16);
    return high == NULL || low == NULL ? -1 : (int)((high - digits) * 16 + (low - digits));
}

static sh_status load_kinds(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.token_type";
    size_t n;
    sh_status status;
    sh_error local = {0};
    int32_t *types = sh_calloc(t->n, sizeof *types);
    t->kinds = sh_calloc(t->n, 1);
    if (types == NULL || t->kinds == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
        goto cleanup;
    }
    status = sh_gguf_get_array_count(gguf, key, &n, &local);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND) {
        status = sh_fail(err, status, "%s", local.text);
        goto cleanup;
    }
    const bool stated = status == SH_OK;
    if (stated && n != t->n) {
        status = sh_fail(err, SH_ERR_INVALID, "%s has %zu elements for %u tokens", key, n, t->n);
        goto cleanup;
    }
    status = SH_OK;
    if (stated)
        SH_GOTO(sh_gguf_get_i32s(gguf, key, types, n, err));
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t length;
        const char *text = token_text(t, i, &length);
        const int byte = parse_byte_text(text, length);
        if (stated)
            t->kinds[i] = types[i] >= KIND_NORMAL && types[i] <= KIND_BYTE ? (uint8_t)types[i]
                                                                           : KIND_UNDEFINED;
        else
            t->kinds[i] = byte >= 0 ? KIND_BYTE : KIND_NORMAL;
        if (t->kinds[i] == KIND_BYTE && byte < 0) {
            status = sh_fail(err, SH_ERR_INVALID, "token %u is a byte token without a byte", i);
            goto cleanup;
        }
    }

cleanup:
    free(types);
    return status;
}

static sh_status find_bytes(sh_tokenizer *t, sh_error *err)
{
    char text[8];
    for (unsigned b = 0; b < 256; b++) {
        snprintf(text, sizeof text, "<0x%02X>", b);
        t->bytes[b] = find_text(t, text, 6);
        if (t->bytes[b] < 0)
            return sh_fail(err, SH_ERR_INVALID,
                           "the vocabulary has no byte token %s: not every text has tokens", text);
    }
    return SH_OK;
}

/* llama.cpp takes tokens of these texts for control tokens whatever the file says, those with a
 * key only where the file does not name another token for the purpose. */
static void override_kinds(sh_tokenizer *t, const sh_gguf *gguf)
{
    static const struct {
        const char *text, *unless_key;
    } table[] = {
        {"<|eot_id|>", NULL},
        {"<|im_end|>", NULL},
        {"<|end|>", NULL},
        {"<end_of_turn>", NULL},
        {"<|endoftext|>", NULL},
        {"<|eom_id|>", NULL},
        {"<EOT>", NULL},
        {"<PRE>", "tokenizer.ggml.fim_pre_token_id"},
        {"<|fim_prefix|>", "tokenizer.ggml.fim_pre_token_id"},
        {"<SUF>", "tokenizer.ggml.fim_suf_token_id"},
        {"<|fim_suffix|>", "tokenizer.ggml.fim_suf_token_id"},
        {"<MID>", "tokenizer.ggml.fim_mid_token_id"},
        {"<|fim_middle|>", "tokenizer.ggml.fim_mid_token_id"},
        {"<PAD>", "tokenizer.ggml.fim_pad_token_id"},
        {"<|fim_pad|>", "tokenizer.ggml.fim_pad_token_id"},
        {"<REPO>", "tokenizer.ggml.fim_rep_token_id"},
        {"<|fim_repo|>", "tokenizer.ggml.fim_rep_token_id"},
        {"<|file_sep|>", "tokenizer.ggml.fim_sep_token_id"},
    };
    for (size_t i = 0; i < SH_COUNT(table); i++) {
        uint64_t id;
        if (table[i].unless_key != NULL &&
            sh_gguf_get_u64(gguf, table[i].unless_key, &id, NULL) == SH_OK && id < t->n)
            continue;
        int32_t token = find_text(t, table[i].text, (uint32_t)strlen(table[i].text));
        if (token >= 0)
            t->kinds[token] = KIND_CONTROL;
    }
}

static int compare_specials(const void *a, const void *b, void *arg)
{
    const sh_tokenizer *t = arg;
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    uint32_t nx, ny;
    token_text(t, (uint32_t)x, &nx);
    token_text(t, (uint32_t)y, &ny);
    if (nx != ny)
        return nx > ny ? -1 : 1;
    return x < y ? -1 : x > y;
}

static sh_status collect_specials(sh_tokenizer *t, sh_error *err)
{
    t->specials = sh_calloc(t->n, sizeof *t->specials);
    if (t->specials == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    for (uint32_t i = 0; i < t->n; i++) {
        const uint8_t kind = t->kinds[i];
        if (kind == KIND_CONTROL || kind == KIND_USER || kind == KIND_UNKNOWN)
            t->specials[t->n_specials++] = (int32_t)i;
        t->has_user = t->has_user || kind == KIND_USER;
    }
    qsort_r(t->specials, t->n_specials, sizeof *t->specials, compare_specials, t);
    return SH_OK;
}

static bool text_crosses_words(const char *s, uint32_t n)
{
    for (uint32_t i = 1; i + SPACE_MARK_SIZE <= n; i++) {
        if (memcmp(s + i, SPACE_MARK, SPACE_MARK_SIZE) != 0)
            continue;
        if (i < SPACE_MARK_SIZE ||
            memcmp(s + i - SPACE_MARK_SIZE, SPACE_MARK, SPACE_MARK_SIZE) != 0)
            return true;
    }
    return false;
}

static int32_t get_token_id(const sh_tokenizer *t, const sh_gguf *gguf, const char *key,
                            int32_t standard)
{
    uint64_t id;
    if (sh_gguf_get_u64(gguf, key, &id, NULL) == SH_OK && id < t->n)
        return (int32_t)id;
    return (uint32_t)standard < t->n ? standard : -1;
}

static sh_status load_settings(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    t->bos = get_token_id(t, gguf, "tokenizer.ggml.bos_token_id", 1);
    t->eos = get_token_id(t, gguf, "tokenizer.ggml.eos_token_id", 2);
    bool v;
    t->add_bos = true;
    if (sh_gguf_get_bool(gguf, "tokenizer.ggml.add_bos_token", &v, NULL) == SH_OK)
        t->add_bos = v;
    t->add_space_prefix = true;
    if (sh_gguf_get_bool(gguf, "tokenizer.ggml.add_space_prefix", &v, NULL) == SH_OK)
        t->add_space_prefix = v;
    if (t->add_bos && t->bos < 0)
        return sh_fail(err, SH_ERR_INVALID, "tokenizer: BOS is to be added, but there is none");
    for (uint32_t i = 0; i < t->n && !t->crosses_words; i++) {
        uint32_t n;
        const char *text = token_text(t, i, &n);
        t->crosses_words = text_crosses_words(text, n);
    }
    return SH_OK;
}

static sh_status load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err)
{
    const char *model;
    size_t model_bytes, n;
    SH_TRY(sh_gguf_get_string(gguf, "tokenizer.ggml.model", &model, &model_bytes, err));
    if (model_bytes != strlen("llama") || memcmp(model, "llama", model_bytes) != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "tokenizer '%.*s' is not supported yet (only 'llama' is)",
                       (int)SH_MIN(model_bytes, 64), model);
    SH_TRY(sh_gguf_get_array_count(gguf, "tokenizer.ggml.tokens", &n, err));
    if (n == 0 || n > VOCAB_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "tokenizer.ggml.tokens has %zu tokens, not 1..%u", n,
                       VOCAB_MAX);
    sh_status status;
    sh_tokenizer *t = sh_calloc(1, sizeof *t);
    if (t == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    t->n = (uint32_t)n;
    SH_GOTO(load_texts(t, gguf, err));
    SH_GOTO(load_scores(t, gguf, err));
    SH_GOTO(find_bytes(t, err));
    SH_GOTO(load_kinds(t, gguf, err));
    override_kinds(t, gguf);
    SH_GOTO(collect_specials(t, err));
    SH_GOTO(load_settings(t, gguf, err));
    *out = t;
    t = NULL;

cleanup:
    sh_tokenizer_destroy(&t);
    return status;
}

sh_status sh_tokenizer_load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err)
{
    const sh_status status = load(gguf, out, err);
    if (status != SH_OK)
        sh_blame_file(gguf, err);
    return status;
}

void sh_tokenizer_destroy(sh_tokenizer **tokenizer)
{
    sh_tokenizer *t = *tokenizer;
    if (t == NULL)
        return;
    free(t->texts);
    free(t->offsets);
    free(t->scores);
    free(t->kinds);
    free(t->slots);
    free(t->specials);
    free(t);
    *tokenizer = NULL;
}

/* ---- text to tokens ---- */

typedef struct {
    const char *text;
    uint32_t n; /* 0: merged into the one before */
    int32_t prev, next;
} symbol;

typedef struct {
    float score;
    int32_t left, right;
    uint32_t n; /* bytes of both when it was queued; another sum now: stale */
} pair;

/* Buffers of one sh_tokenize call, used again for each piece of text. */
typedef struct {
    const sh_tokenizer *t;
    symbol *symbols;
    size_t n_symbols, symbols_cap;
    pair *heap;
    size_t n_heap, heap_cap;
    int32_t *out;
    size_t n_out, out_cap;
    sh_buf escaped;
} work;

#define WORK_ITEMS_MAX ((size_t)3 * SH_TOKENIZE_BYTES_MAX + 16)

static sh_status emit(work *w, int32_t token)
{
    if (w->n_out == w->out_cap)
        SH_TRY(sh_array_reserve((void **)&w->out, &w->out_cap, w->n_out + 1, sizeof *w->out,
                                WORK_ITEMS_MAX));
    w->out[w->n_out++] = token;
    return SH_OK;
}

static bool comes_before(const pair *a, const pair *b)
{
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static sh_status heap_push(work *w, pair p)
{
    if (w->n_heap == w->heap_cap)
        SH_TRY(sh_array_reserve((void **)&w->heap, &w->heap_cap, w->n_heap + 1, sizeof *w->heap,
                                2 * WORK_ITEMS_MAX));
    size_t i = w->n_heap++;
    while (i > 0 && comes_before(&p, &w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    w->heap[i] = p;
    return SH_OK;
}

static pair heap_pop(work *w)
{
    const pair top = w->heap[0], last = w->heap[--w->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= w->n_heap)
            break;
        if (child + 1 < w->n_heap && comes_before(&w->heap[child + 1], &w->heap[child]))
            child++;
        if (!comes_before(&w->heap[child], &last))
            break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return top;
}

static sh_status try_pair(work *w, int32_t left, int32_t right)
{
    if (left < 0 || right < 0)
        return SH_OK;
    const symbol *l = &w->symbols[left], *r = &w->symbols[right];
    const int32_t token = find_text(w->t, l->text, l->n + r->n);
    if (token < 0)
        return SH_OK;
    return heap_push(w, (pair){w->t->scores[token], left, right, l->n + r->n});
}

static sh_status emit_symbol(work *w, const symbol *s)
{
    const int32_t token = find_text(w->t, s->text, s->n);
    if (token >= 0)
        return emit(w, token);
    for (uint32_t i = 0; i < s->n; i++)
        SH_TRY(emit(w, w->t->bytes[(uint8_t)s->text[i]]));
    return SH_OK;
}

/* Steps 3 and 4 for the symbols gathered so far; empties them. */
static sh_status merge_symbols(work *w)
{
    symbol *const s = w->symbols;
    const int32_t n = (int32_t)w->n_symbols;
    for (int32_t i = 0; i < n; i++) {
        s[i].prev = i - 1;
        s[i].next = i + 1 < n ? i + 1 : -1;
    }
    w->n_heap = 0;
    for (int32_t i = 1; i < n; i++)
        SH_TRY(try_pair(w, i - 1, i));
    while (w->n_heap > 0) {
        const pair p = heap_pop(w);
        symbol *l = &s[p.left], *r = &s[p.right];
        if (l->n == 0 || r->n == 0 || l->n + r->n != p.n)
            continue;
        l->n += r->n;
        r->n = 0;
        l->next = r->next;
        if (r->next >= 0)
            s[r->next].prev = p.left;
        SH_TRY(try_pair(w, l->prev, p.left));
        SH_TRY(try_pair(w, p.left, l->next));
    }
    for (int32_t i = 0; i >= 0 && i < n; i = s[i].next)
        SH_TRY(emit_symbol(w, &s[i]));
    w->n_symbols = 0;
    return SH_OK;
}

/* Bytes of a UTF-8 character by its first byte, as llama.cpp has it: stray bytes count as one. */
static uint32_t character_bytes(char first)
{
    static const uint8_t by_high_nibble[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
    return by_high_nibble[(uint8_t)first >> 4];
}

static bool is_space_mark(const symbol *s)
{
    return s->n == SPACE_MARK_SIZE && memcmp(s->text, SPACE_MARK, SPACE_MARK_SIZE) == 0;
}

/* Steps 2 to 4 for a text in which spaces are "▁" already. */
static sh_status tokenize_escaped(work *w, const char *text, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        const uint32_t n = (uint32_t)SH_MIN(character_bytes(text[at]), bytes - at);
        const symbol s = {.text = text + at, .n = n};
        at += n;
        if (!w->t->crosses_words && w->n_symbols > 0 && is_space_mark(&s) &&
            !is_space_mark(&w->symbols[w->n_symbols - 1]))
            SH_TRY(merge_symbols(w));
        if (w->n_symbols == w->symbols_cap)
            SH_TRY(sh_array_reserve((void **)&w->symbols, &w->symbols_cap, w->n_symbols + 1,
                                    sizeof *w->symbols, WORK_ITEMS_MAX));
        w->symbols[w->n_symbols++] = s;
    }
    return merge_symbols(w);
}

static sh_status tokenize_text(work *w, const char *text, size_t bytes, bool prefix)
{
    sh_buf_clear(&w->escaped);
    if (prefix)
        SH_TRY(sh_buf_append(&w->escaped, SPACE_MARK, SPACE_MARK_SIZE));
    const char *end = text + bytes;
    while (text < end) {
        const char *space = memchr(text, ' ', (size_t)(end - text));
        const char *stop = space != NULL ? space : end;
        SH_TRY(sh_buf_append(&w->escaped, text, (size_t)(stop - text)));
        if (space != NULL)
            SH_TRY(sh_buf_append(&w->escaped, SPACE_MARK, SPACE_MARK_SIZE));
        text = space != NULL ? space + 1 : end;
    }
    return tokenize_escaped(w, (const char *)w->escaped.data, w->escaped.len);
}

/* A stretch of the input: text, or a special token (token >= 0). */
typedef struct {
    const char *text;
    size_t bytes;
    int32_t token;
} fragment;

typedef struct {
    fragment *items;
    size_t n, cap;
} fragments;

static sh_status add_fragment(fragments *f, fragment item)
{
    if (f->n == f->cap)
        SH_TRY(sh_array_reserve((void **)&f->items, &f->cap, f->n + 1, sizeof *f->items,
                                2 * (size_t)SH_TOKENIZE_BYTES_MAX + 1));
    f->items[f->n++] = item;
    return SH_OK;
}

/* Cuts every occurrence of one special token out of the text fragments of in, into out. */
static sh_status split_at(const sh_tokenizer *t, int32_t token, const fragments *in, fragments *out)
{
    uint32_t n;
    const char *needle = token_text(t, (uint32_t)token, &n);
    out->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        fragment rest = in->items[i];
        while (rest.token < 0) {
            const char *match = memmem(rest.text, rest.bytes, needle, n);
            if (match == NULL)
                break;
            const size_t before = (size_t)(match - rest.text);
            if (before > 0)
                SH_TRY(add_fragment(out, (fragment){rest.text, before, -1}));
            SH_TRY(add_fragment(out, (fragment){NULL, 0, token}));
            rest.text = match + n;
            rest.bytes -= before + n;
        }
        if (rest.token >= 0 || rest.bytes > 0)
            SH_TRY(add_fragment(out, rest));
    }
    return SH_OK;
}

/* Step 1: *f holds the fragments at the end. */
static sh_status split_specials(const sh_tokenizer *t, bool parse_special, fragments *f)
{
    fragments other = {0};
    sh_status status = SH_OK;
    for (size_t i = 0; i < t->n_specials; i++) {
        const int32_t token = t->specials[i];
        if (!parse_special && t->kinds[token] != KIND_USER)
            continue;
        SH_GOTO(split_at(t, token, f, &other));
        const fragments swap = *f;
        *f = other;
        other = swap;
    }

cleanup:
    free(other.items);
    return status;
}

static sh_status tokenize_fragments(work *w, const fragments *f, unsigned flags)
{
    bool prefix = (flags & SH_TOKENIZE_CONTINUE) == 0;
    for (size_t i = 0; i < f->n; i++) {
        const fragment *item = &f->items[i];
        if (item->token >= 0)
            SH_TRY(emit(w, item->token));
        else
            SH_TRY(tokenize_text(w, item->text, item->bytes, prefix && w->t->add_space_prefix));
        prefix = item->token >= 0;
    }
    return SH_OK;
}

sh_status sh_tokenize(const sh_tokenizer *tokenizer, const char *text, size_t bytes, unsigned flags,
                      int32_t **out, size_t *n, sh_error *err)
{
    if (bytes > SH_TOKENIZE_BYTES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a text of %zu bytes is over the limit of %u", bytes,
                       SH_TOKENIZE_BYTES_MAX);
    sh_status status;
    work w = {.t = tokenizer};
    fragments f = {0};
    sh_buf_init(&w.escaped, WORK_ITEMS_MAX);
    /* malloc(0) may be NULL: reserve, so that *out of an empty text is memory too */
    SH_GOTO(sh_array_reserve((void **)&w.out, &w.out_cap, 16, sizeof *w.out, WORK_ITEMS_MAX));
    if (bytes > 0)
        SH_GOTO(add_fragment(&f, (fragment){text, bytes, -1}));
    const bool parse_special = (flags & SH_TOKENIZE_SPECIAL) != 0;
    if (parse_special || tokenizer->has_user)
        SH_GOTO(split_specials(tokenizer, parse_special, &f));
    if ((flags & SH_TOKENIZE_BOS) != 0 && tokenizer->add_bos)
        SH_GOTO(emit(&w, tokenizer->bos));
    SH_GOTO(tokenize_fragments(&w, &f, flags));
    *out = w.out;
    *n = w.n_out;
    w.out = NULL;

cleanup:
    if (status != SH_OK)
        sh_fail(err, status, "tokenizing %zu bytes: out of memory", bytes);
    free(w.out);
    free(w.symbols);
    free(w.heap);
    sh_buf_release(&w.escaped);
    free(f.items);
    return status;
}

/* ---- tokens to text, and questions ---- */

sh_status sh_detokenize(const sh_tokenizer *tokenizer, int32_t token, sh_buf *out)
{
    if (token < 0 || (uint32_t)token >= tokenizer->n)
        return SH_ERR_INVALID;
    uint32_t n;
    const char *text = token_text(tokenizer, (uint32_t)token, &n);
    if (tokenizer->kinds[token] == KIND_BYTE) {
        const uint8_t byte = (uint8_t)parse_byte_text(text, n);
        return sh_buf_append(out, &byte, 1);
    }
    if (tokenizer->kinds[token] == KIND_USER)
        return sh_buf_append(out, text, n);
    if (tokenizer->kinds[token] != KIND_NORMAL)
        return SH_OK;
    while (n > 0) {
        const char *mark = memmem(text, n, SPACE_MARK, SPACE_MARK_SIZE);
        const uint32_t before = mark != NULL ? (uint32_t)(mark - text) : n;
        SH_TRY(sh_buf_append(out, text, before));
        if (mark == NULL)
            break;
        SH_TRY(sh_buf_append(out, " ", 1));
        text += before + SPACE_MARK_SIZE;
        n -= before + SPACE_MARK_SIZE;
    }
    return SH_OK;
}

uint32_t sh_tokenizer_size(const sh_tokenizer *tokenizer)
{
    return tokenizer->n;
}

int32_t sh_tokenizer_bos(const sh_tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t sh_tokenizer_eos(const sh_tokenizer *tokenizer)
{
    return tokenizer->eos;
}

bool sh_tokenizer_adds_bos(const sh_tokenizer *tokenizer)
{
    return tokenizer->add_bos;
}

bool sh_tokenizer_is_byte(const sh_tokenizer *tokenizer, int32_t token)
{
    return token >= 0 && (uint32_t)token < tokenizer->n && tokenizer->kinds[token] == KIND_BYTE;
}

bool sh_tokenizer_starts_word(const sh_tokenizer *tokenizer, int32_t token)
{
    if (token < 0 || (uint32_t)token >= tokenizer->n)
        return false;
    uint32_t n;
    const char *text = token_text(tokenizer, (uint32_t)token, &n);
    return n >= SPACE_MARK_SIZE && memcmp(text, SPACE_MARK, SPACE_MARK_SIZE) == 0;
}
