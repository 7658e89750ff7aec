/*
 * Pairs of adjacent symbols, the best first: of the highest score, the leftmost on ties. A pair is
 * queued when its two sides come to be neighbours; one whose sides have grown since is stale.
 */
#include "shared/model/tokenizer_internal.h"

sh_status sh_token_emit(sh_token_work *w, int32_t token)
{
    if (w->n_out == w->out_cap)
        SH_TRY(sh_array_reserve((void **)&w->out, &w->out_cap, w->n_out + 1, sizeof *w->out,
                                SH_TOKEN_WORK_MAX));
    w->out[w->n_out++] = token;
    return SH_OK;
}

sh_status sh_token_push(sh_token_work *w, sh_symbol s)
{
    if (w->n_symbols == w->symbols_cap)
        SH_TRY(sh_array_reserve((void **)&w->symbols, &w->symbols_cap, w->n_symbols + 1,
                                sizeof *w->symbols, SH_TOKEN_WORK_MAX));
    w->symbols[w->n_symbols++] = s;
    return SH_OK;
}

static bool comes_before(const sh_pair *a, const sh_pair *b)
{
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static sh_status heap_push(sh_token_work *w, sh_pair p)
{
    if (w->n_heap == w->heap_cap)
        SH_TRY(sh_array_reserve((void **)&w->heap, &w->heap_cap, w->n_heap + 1, sizeof *w->heap,
                                2 * SH_TOKEN_WORK_MAX));
    size_t i = w->n_heap++;
    while (i > 0 && comes_before(&p, &w->heap[(i - 1) / 2])) {
        w->heap[i] = w->heap[(i - 1) / 2];
        i = (i - 1) / 2;
        w->steps++;
    }
    w->heap[i] = p;
    return SH_OK;
}

static sh_pair heap_pop(sh_token_work *w)
{
    const sh_pair top = w->heap[0], last = w->heap[--w->n_heap];
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
        w->steps++;
    }
    w->heap[i] = last;
    return top;
}

static sh_status try_pair(sh_token_work *w, int32_t left, int32_t right)
{
    if (left < 0 || right < 0)
        return SH_OK;
    const sh_tokenizer *t = w->t;
    const sh_symbol *l = &w->symbols[left], *r = &w->symbols[right];
    const uint32_t n = l->n + r->n;
    w->steps++;
    if (t->pre != NULL) {
        const int32_t rank = sh_bpe_find_merge(t, l->id, r->id);
        return rank < 0 ? SH_OK : heap_push(w, (sh_pair){-(float)rank, left, right, n});
    }
    const int32_t token = sh_token_find(t, l->text, n);
    return token < 0 ? SH_OK : heap_push(w, (sh_pair){t->scores[token], left, right, n});
}

sh_status sh_token_merge(sh_token_work *w)
{
    const sh_tokenizer *t = w->t;
    sh_symbol *const s = w->symbols;
    const int32_t n = (int32_t)w->n_symbols;
    for (int32_t i = 0; i < n; i++) {
        s[i].prev = i - 1;
        s[i].next = i + 1 < n ? i + 1 : -1;
    }
    w->n_heap = 0;
    for (int32_t i = 1; i < n; i++)
        SH_TRY(try_pair(w, i - 1, i));
    while (w->n_heap > 0) {
        const sh_pair p = heap_pop(w);
        sh_symbol *l = &s[p.left], *r = &s[p.right];
        if (l->n == 0 || r->n == 0 || l->n + r->n != p.n)
            continue;
        if (t->pre != NULL)
            l->id = t->merges[(uint32_t)-p.score].result;
        l->n += r->n;
        r->n = 0;
        l->next = r->next;
        if (r->next >= 0)
            s[r->next].prev = p.left;
        SH_TRY(try_pair(w, l->prev, p.left));
        SH_TRY(try_pair(w, p.left, l->next));
    }
    return SH_OK;
}
