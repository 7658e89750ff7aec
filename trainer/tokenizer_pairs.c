#include "trainer/tokenizer_pairs.h"

#include <stdlib.h>
#include <string.h>

#include "trainer/tokenizer_train.h"

#define BUCKETS_FIRST 1024

sh_status tr_pairs_init(tr_pairs *p, bool marks, const tr_word *words)
{
    *p = (tr_pairs){.marks = marks, .words = words, .n_buckets = BUCKETS_FIRST};
    p->buckets = sh_calloc(p->n_buckets, sizeof *p->buckets);
    return p->buckets == NULL ? SH_ERR_NO_MEMORY : SH_OK;
}

void tr_pairs_release(tr_pairs *p)
{
    free(p->texts);
    free(p->tokens);
    free(p->merges);
    free(p->symbols);
    free(p->candidates);
    free(p->buckets);
    free(p->changed);
    free(p->places);
    free(p->heap);
    *p = (tr_pairs){0};
}

/* ---- tokens ---- */

const uint8_t *tr_pairs_text(const tr_pairs *p, int32_t token, size_t *n)
{
    *n = p->tokens[token].n;
    return p->texts + p->tokens[token].at;
}

/* The text of a pair, in out; its bytes. */
static size_t join_texts(const tr_pairs *p, int32_t left, int32_t right,
                         uint8_t out[SH_TOKENIZER_TOKEN_BYTES_MAX])
{
    size_t n_left, n_right;
    const uint8_t *l = tr_pairs_text(p, left, &n_left), *r = tr_pairs_text(p, right, &n_right);
    SH_ASSERT(n_left + n_right <= SH_TOKENIZER_TOKEN_BYTES_MAX);
    memcpy(out, l, n_left);
    memcpy(out + n_left, r, n_right);
    return n_left + n_right;
}

static uint16_t count_marks(const uint8_t *text, size_t n)
{
    uint16_t marks = 0;
    for (size_t i = 0; i + SH_SPACE_MARK_SIZE <= n; i += SH_SPACE_MARK_SIZE, marks++)
        if (memcmp(text + i, SH_SPACE_MARK, SH_SPACE_MARK_SIZE) != 0)
            break;
    return marks;
}

sh_status tr_pairs_add_token(tr_pairs *p, const uint8_t *text, size_t n, int32_t *out)
{
    SH_ASSERT(n <= SH_TOKENIZER_TOKEN_BYTES_MAX);
    SH_TRY(sh_array_reserve((void **)&p->texts, &p->texts_cap, p->n_texts + n, 1, UINT32_MAX));
    SH_TRY(sh_array_reserve((void **)&p->tokens, &p->tokens_cap, p->n_tokens + 1, sizeof *p->tokens,
                            INT32_MAX));
    memcpy(p->texts + p->n_texts, text, n);
    p->tokens[p->n_tokens] = (tr_token){
        .at = (uint32_t)p->n_texts, .n = (uint16_t)n, .marks = p->marks ? count_marks(text, n) : 0};
    p->n_texts += n;
    *out = (int32_t)p->n_tokens++;
    return SH_OK;
}

/* ---- candidates ---- */

/* "▁" in front of a text at most once, or nothing else. */
static bool can_merge(const tr_pairs *p, int32_t left, int32_t right)
{
    const tr_token *l = &p->tokens[left], *r = &p->tokens[right];
    if (l->n + r->n > SH_TOKENIZER_TOKEN_BYTES_MAX)
        return false;
    const unsigned marks = (unsigned)l->marks + r->marks;
    return marks <= 1 || marks * SH_SPACE_MARK_SIZE == (unsigned)l->n + r->n;
}

static uint32_t *bucket_of(const tr_pairs *p, int32_t left, int32_t right)
{
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
    return &p->buckets[(h ^ h >> 29) & (p->n_buckets - 1)];
}

static sh_status grow_buckets(tr_pairs *p)
{
    const size_t n_old = p->n_buckets;
    uint32_t *old = p->buckets, *buckets = sh_calloc(2 * n_old, sizeof *buckets);
    if (buckets == NULL)
        return SH_ERR_NO_MEMORY;
    p->buckets = buckets;
    p->n_buckets = 2 * n_old;
    for (size_t i = 0; i < n_old; i++) {
        for (uint32_t at = old[i], next; at != 0; at = next) {
            tr_candidate *c = &p->candidates[at - 1];
            uint32_t *bucket = bucket_of(p, c->left, c->right);
            next = c->chain;
            c->chain = *bucket;
            *bucket = at;
        }
    }
    free(old);
    return SH_OK;
}

/* The candidate of a pair, which may be new; *out is its index + 1. */
static sh_status find_candidate(tr_pairs *p, int32_t left, int32_t right, uint32_t *out)
{
    uint32_t *bucket = bucket_of(p, left, right);
    for (uint32_t at = *bucket; at != 0; at = p->candidates[at - 1].chain) {
        const tr_candidate *c = &p->candidates[at - 1];
        if (c->left == left && c->right == right) {
            *out = at;
            return SH_OK;
        }
    }
    if (p->n_used >= p->n_buckets) {
        SH_TRY(grow_buckets(p));
        bucket = bucket_of(p, left, right);
    }
    uint32_t at = p->free_candidate;
    if (at != 0) {
        p->free_candidate = p->candidates[at - 1].chain;
    } else {
        SH_TRY(sh_array_reserve((void **)&p->candidates, &p->candidates_cap, p->n_candidates + 1,
                                sizeof *p->candidates, UINT32_MAX - 1));
        at = (uint32_t)++p->n_candidates;
    }
    p->candidates[at - 1] = (tr_candidate){.left = left, .right = right, .chain = *bucket};
    *bucket = at;
    p->n_used++;
    *out = at;
    return SH_OK;
}

static void drop_candidate(tr_pairs *p, uint32_t at)
{
    tr_candidate *c = &p->candidates[at - 1];
    uint32_t *link = bucket_of(p, c->left, c->right);
    while (*link != at)
        link = &p->candidates[*link - 1].chain;
    *link = c->chain;
    c->chain = p->free_candidate;
    p->free_candidate = at;
    p->n_used--;
}

/* ---- the heap: the most frequent candidate first ---- */

static bool comes_before(const tr_pairs *p, const tr_heap_item *a, const tr_heap_item *b)
{
    if (a->count != b->count)
        return a->count > b->count;
    if (a->n != b->n)
        return a->n < b->n;
    if (a->prefix != b->prefix)
        return a->prefix < b->prefix;
    const tr_candidate *x = &p->candidates[a->candidate - 1], *y = &p->candidates[b->candidate - 1];
    uint8_t s[SH_TOKENIZER_TOKEN_BYTES_MAX], t[SH_TOKENIZER_TOKEN_BYTES_MAX];
    join_texts(p, x->left, x->right, s);
    join_texts(p, y->left, y->right, t);
    return memcmp(s, t, a->n) < 0;
}

static void heap_put(tr_pairs *p, size_t i, tr_heap_item item)
{
    p->heap[i] = item;
    p->candidates[item.candidate - 1].heap_at = (uint32_t)i + 1;
}

/* Puts an item in or below place i, or above it. */
static void heap_sift(tr_pairs *p, size_t i, tr_heap_item item)
{
    for (; i > 0 && comes_before(p, &item, &p->heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap_put(p, i, p->heap[(i - 1) / 2]);
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= p->n_heap)
            break;
        if (child + 1 < p->n_heap && comes_before(p, &p->heap[child + 1], &p->heap[child]))
            child++;
        if (!comes_before(p, &p->heap[child], &item))
            break;
        heap_put(p, i, p->heap[child]);
        i = child;
    }
    heap_put(p, i, item);
}

static void heap_remove(tr_pairs *p, tr_candidate *c)
{
    const size_t i = c->heap_at - 1;
    c->heap_at = 0;
    const tr_heap_item last = p->heap[--p->n_heap];
    if (i < p->n_heap)
        heap_sift(p, i, last);
}

static sh_status heap_add(tr_pairs *p, uint32_t at)
{
    uint8_t text[SH_TOKENIZER_TOKEN_BYTES_MAX] = {0};
    const tr_candidate *c = &p->candidates[at - 1];
    SH_TRY(sh_array_reserve((void **)&p->heap, &p->heap_cap, p->n_heap + 1, sizeof *p->heap,
                            UINT32_MAX - 1));
    tr_heap_item item = {.count = c->count, .candidate = at};
    item.n = (uint32_t)join_texts(p, c->left, c->right, text);
    for (size_t i = 0; i < 8; i++)
        item.prefix = item.prefix << 8 | text[i];
    heap_sift(p, p->n_heap++, item);
    return SH_OK;
}

/* Brings the heap to the counts of the candidates that have changed, one after another: between
 * two of them it is a heap. */
static sh_status settle(tr_pairs *p)
{
    for (size_t i = 0; i < p->n_changed; i++) {
        tr_candidate *c = &p->candidates[p->changed[i] - 1];
        c->changed = false;
        if (c->count == 0) {
            if (c->heap_at != 0)
                heap_remove(p, c);
            drop_candidate(p, p->changed[i]);
        } else if (c->heap_at != 0) {
            tr_heap_item item = p->heap[c->heap_at - 1];
            item.count = c->count;
            heap_sift(p, c->heap_at - 1, item);
        } else {
            SH_TRY(heap_add(p, p->changed[i]));
        }
    }
    p->n_changed = 0;
    return SH_OK;
}

/* ---- pairs at their places ---- */

static sh_status note_change(tr_pairs *p, uint32_t at)
{
    if (p->candidates[at - 1].changed)
        return SH_OK;
    SH_TRY(sh_array_reserve((void **)&p->changed, &p->changed_cap, p->n_changed + 1,
                            sizeof *p->changed, UINT32_MAX));
    p->candidates[at - 1].changed = true;
    p->changed[p->n_changed++] = at;
    return SH_OK;
}

/* The symbol at i and the next one become a pair of their candidate. */
static sh_status attach(tr_pairs *p, uint32_t i)
{
    tr_pair_symbol *s = &p->symbols[i];
    const int32_t right = p->symbols[s->next].token;
    uint32_t at;
    if (s->token < 0 || right < 0 || !can_merge(p, s->token, right))
        return SH_OK;
    SH_TRY(find_candidate(p, s->token, right, &at));
    tr_candidate *c = &p->candidates[at - 1];
    c->count += p->words[s->word].count;
    s->candidate = at;
    s->place_prev = 0;
    s->place_next = c->place;
    if (c->place != 0)
        p->symbols[c->place].place_prev = i;
    c->place = i;
    return note_change(p, at);
}

static sh_status detach(tr_pairs *p, uint32_t i)
{
    tr_pair_symbol *s = &p->symbols[i];
    const uint32_t at = s->candidate;
    if (at == 0)
        return SH_OK;
    tr_candidate *c = &p->candidates[at - 1];
    c->count -= p->words[s->word].count;
    if (s->place_prev != 0)
        p->symbols[s->place_prev].place_next = s->place_next;
    else
        c->place = s->place_next;
    if (s->place_next != 0)
        p->symbols[s->place_next].place_prev = s->place_prev;
    s->candidate = 0;
    return note_change(p, at);
}

/* Merges the pair at i to a token. */
static sh_status join(tr_pairs *p, uint32_t i, int32_t token)
{
    tr_pair_symbol *s = &p->symbols[i], *gone = &p->symbols[s->next];
    SH_TRY(detach(p, s->prev));
    SH_TRY(detach(p, i));
    SH_TRY(detach(p, s->next));
    s->token = token;
    gone->token = TR_NO_TOKEN;
    s->next = gone->next;
    p->symbols[s->next].prev = i;
    p->n_live -= p->words[s->word].count;
    SH_TRY(attach(p, s->prev));
    return attach(p, i);
}

sh_status tr_pairs_push(tr_pairs *p, int32_t token, uint32_t word)
{
    SH_TRY(sh_array_reserve((void **)&p->symbols, &p->symbols_cap, p->n_symbols + 1,
                            sizeof *p->symbols, UINT32_MAX));
    const uint32_t i = (uint32_t)p->n_symbols++;
    p->symbols[i] =
        (tr_pair_symbol){.token = token, .prev = i > 0 ? i - 1 : 0, .next = i + 1, .word = word};
    if (token >= 0)
        p->n_live += p->words[word].count;
    return SH_OK;
}

sh_status tr_pairs_count(tr_pairs *p)
{
    SH_ASSERT(p->n_symbols > 0 && p->symbols[0].token < 0 &&
              p->symbols[p->n_symbols - 1].token < 0);
    p->symbols[p->n_symbols - 1].next = 0;
    for (uint32_t i = 0; i < p->n_symbols; i++)
        SH_TRY(attach(p, i));
    return settle(p);
}

/* ---- a merge ---- */

static int compare_places(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* All places of a candidate, from left to right. */
static sh_status list_places(tr_pairs *p, const tr_candidate *c, size_t *n)
{
    *n = 0;
    for (uint32_t i = c->place; i != 0; i = p->symbols[i].place_next) {
        SH_TRY(sh_array_reserve((void **)&p->places, &p->places_cap, *n + 1, sizeof *p->places,
                                UINT32_MAX));
        p->places[(*n)++] = i;
    }
    qsort(p->places, *n, sizeof *p->places, compare_places);
    return SH_OK;
}

static sh_status add_merge(tr_pairs *p, const tr_candidate *c, int32_t *token)
{
    uint8_t text[SH_TOKENIZER_TOKEN_BYTES_MAX];
    SH_TRY(sh_array_reserve((void **)&p->merges, &p->merges_cap, p->n_merges + 1, sizeof *p->merges,
                            INT32_MAX));
    SH_TRY(tr_pairs_add_token(p, text, join_texts(p, c->left, c->right, text), token));
    p->merges[p->n_merges++] = (tr_merge){c->left, c->right};
    return SH_OK;
}

sh_status tr_pairs_merge(tr_pairs *p, bool *found)
{
    *found = p->n_heap > 0;
    if (!*found)
        return SH_OK;
    const uint32_t at = p->heap[0].candidate;
    tr_candidate *c = &p->candidates[at - 1];
    int32_t token;
    size_t n;
    heap_remove(p, c);
    SH_TRY(add_merge(p, c, &token));
    SH_TRY(list_places(p, c, &n));
    for (size_t i = 0; i < n; i++)
        if (p->symbols[p->places[i]].candidate == at) /* not of "aaa" the second "aa" */
            SH_TRY(join(p, p->places[i], token));
    return settle(p);
}
