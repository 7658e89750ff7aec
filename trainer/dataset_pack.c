/*
 * Documents to sequences. Texts are one stream, of which sequence r holds the positions
 * [r * context, r * context + context]; in a shuffled pass the stream begins later in the first
 * sequence (bare texts: earlier, before it), by an offset of the pass's own. Samples, or their
 * pieces, go whole into sequences of their own, best fit decreasing: the longest first, each to
 * the sequence with the least room that is enough (Johnson, Demers, Ullman, Garey & Graham 1974).
 */
#include <stdlib.h>
#include <string.h>

#include "trainer/dataset_internal.h"

#define PURPOSE_CHUNKS    0x63686e6bu /* cuts and order of a pass; names a use of the generator */
#define PURPOSE_DOCUMENTS 0x646f6373u /* order of documents before they are cut */

#define NONE UINT32_MAX

typedef struct {
    size_t at; /* of its first token in the dataset */
    uint32_t n;
} piece;

typedef struct {
    const sh_dataset *d;
    size_t context, length;
    bool bare; /* one plain text: neither padding nor mask */

    uint32_t *texts; /* [n_texts], documents in the pass's order */
    size_t *begins;  /* [n_texts + 1], where they begin in the stream */
    size_t n_texts, stream;
    int64_t lead; /* what of the first sequence is before the stream */

    piece *pieces; /* of samples */
    size_t n_pieces, pieces_cap, skipped;
    uint32_t *order, *sorted; /* [n_pieces] */
    uint32_t *next, *first;   /* of a piece in its sequence; of a sequence */
    uint32_t *open, *below;   /* by room: a sequence with it [length + 1]; the next with as much */
    uint64_t *rooms;          /* bits: rooms that an open sequence has */
    uint32_t *counts;         /* [length + 1], of pieces by length */
    size_t n_packed;          /* sequences of samples */
} packing;

/* ---- what there is to pack ---- */

static bool has_target(const uint8_t *mask, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if (mask[i])
            return true;
    return false;
}

static sh_status add_piece(packing *k, size_t at, size_t n, sh_error *err)
{
    const sh_status status = sh_array_reserve((void **)&k->pieces, &k->pieces_cap, k->n_pieces + 1,
                                              sizeof *k->pieces, SH_DATASET_TOKENS_MAX);
    if (status != SH_OK)
        return sh_fail(err, status, "no memory for %zu samples", k->n_pieces);
    k->pieces[k->n_pieces++] = (piece){at, (uint32_t)n};
    return SH_OK;
}

static sh_status add_sample(packing *k, const tr_document *document, sh_long_samples long_samples,
                            sh_error *err)
{
    const sh_dataset *d = k->d;
    if (document->n <= k->length)
        return add_piece(k, document->at, document->n, err);
    if (long_samples == SH_LONG_REFUSE)
        return sh_fail(err, SH_ERR_LIMIT,
                       "%s:%u: a sample of %u tokens is longer than the %zu of a sequence with a "
                       "context of %zu: shorten it, raise the context, or have long samples "
                       "skipped or split",
                       d->files[document->file], document->line, document->n, k->length,
                       k->context);
    if (long_samples == SH_LONG_SKIP) {
        k->skipped++;
        return SH_OK;
    }
    for (size_t from = 0; from + 1 < document->n; from += k->context) {
        const size_t n = SH_MIN(k->length, document->n - from);
        if (has_target(d->mask + document->at + from, n))
            SH_TRY(add_piece(k, document->at + from, n, err));
    }
    return SH_OK;
}

static sh_status collect(packing *k, sh_long_samples long_samples, sh_error *err)
{
    for (size_t i = 0; i < k->d->n_documents; i++) {
        const tr_document *document = &k->d->documents[i];
        if (tr_is_sample(document)) {
            SH_TRY(add_sample(k, document, long_samples, err));
        } else {
            k->texts[k->n_texts++] = (uint32_t)i;
            k->stream += document->n;
        }
    }
    return SH_OK;
}

/* ---- the stream of texts ---- */

/* Sequences of the stream when it begins offset tokens late, or, bare, without its first offset. */
static size_t stream_rows(const packing *k, size_t offset)
{
    if (k->bare)
        return k->stream > offset + k->context ? (k->stream - offset - 1) / k->context : 0;
    return k->stream > 0 ? (offset + k->stream - 2) / k->context + 1 : 0;
}

static void lay_stream(packing *k, size_t offset)
{
    size_t at = 0;
    for (size_t i = 0; i < k->n_texts; i++) {
        k->begins[i] = at;
        at += k->d->documents[k->texts[i]].n;
    }
    k->begins[k->n_texts] = at;
    k->lead = k->bare ? -(int64_t)offset : (int64_t)offset;
}

/* The text that a position of the stream lies in. */
static size_t text_at(const packing *k, size_t at)
{
    size_t low = 0, high = k->n_texts;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (k->begins[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* A sequence that is being written. */
typedef struct {
    int32_t *tokens; /* [length] */
    uint8_t *mask;   /* [length]; NULL: bare */
    size_t n;        /* of its tokens that are there */
    uint64_t padding;
} row;

static void put_padding(const packing *k, row *out, size_t n)
{
    for (size_t i = out->n; i < out->n + n; i++) {
        out->tokens[i] = k->d->pad;
        out->mask[i] = SH_TRAIN_BEGINS;
    }
    out->n += n;
    out->padding += n;
}

static void put_tokens(const packing *k, row *out, size_t at, size_t n, bool begins)
{
    memcpy(out->tokens + out->n, k->d->tokens + at, n * sizeof *out->tokens);
    if (out->mask) {
        memcpy(out->mask + out->n, k->d->mask + at, n);
        if (begins || out->n == 0) /* nothing before it is there to predict it */
            out->mask[out->n] = begins ? SH_TRAIN_BEGINS : 0;
    }
    out->n += n;
}

static void write_stream_row(const packing *k, size_t r, row *out)
{
    int64_t from = (int64_t)(r * k->context) - k->lead;
    if (from < 0) {
        put_padding(k, out, SH_MIN((size_t)-from, k->length));
        from = 0;
    }
    for (size_t at = (size_t)from; out->n < k->length && at < k->stream;) {
        const size_t text = text_at(k, at), within = at - k->begins[text];
        const tr_document *document = &k->d->documents[k->texts[text]];
        const size_t n = SH_MIN(k->length - out->n, document->n - within);
        put_tokens(k, out, document->at + within, n, within == 0);
        at += n;
    }
    put_padding(k, out, k->length - out->n);
}

/* ---- samples ---- */

/* Longest first; those of one length in the pass's order. */
static void sort_pieces(packing *k)
{
    memset(k->counts, 0, (k->length + 1) * sizeof *k->counts);
    for (size_t i = 0; i < k->n_pieces; i++)
        k->counts[k->pieces[i].n]++;
    uint32_t at = 0;
    for (size_t n = k->length + 1; n-- > 0;) {
        const uint32_t count = k->counts[n];
        k->counts[n] = at;
        at += count;
    }
    for (size_t i = 0; i < k->n_pieces; i++)
        k->sorted[k->counts[k->pieces[k->order[i]].n]++] = k->order[i];
}

static size_t room_words(const packing *k)
{
    return k->length / 64 + 1;
}

/* The least room of at least n that a sequence has; length + 1: none has. */
static size_t find_room(const packing *k, size_t n)
{
    uint64_t bits = k->rooms[n / 64] & UINT64_MAX << n % 64;
    for (size_t word = n / 64;;) {
        if (bits)
            return word * 64 + (size_t)__builtin_ctzll(bits);
        if (++word == room_words(k))
            return k->length + 1;
        bits = k->rooms[word];
    }
}

static uint32_t take_row(packing *k, size_t room)
{
    const uint32_t r = k->open[room];
    k->open[room] = k->below[r];
    if (k->open[room] == NONE)
        k->rooms[room / 64] &= ~(1ull << room % 64);
    return r;
}

static void give_row(packing *k, uint32_t r, size_t room)
{
    k->below[r] = k->open[room];
    k->open[room] = r;
    k->rooms[room / 64] |= 1ull << room % 64;
}

static void pack_samples(packing *k)
{
    sort_pieces(k);
    memset(k->rooms, 0, room_words(k) * sizeof *k->rooms);
    for (size_t i = 0; i <= k->length; i++)
        k->open[i] = NONE;
    k->n_packed = 0;
    for (size_t i = 0; i < k->n_pieces; i++) {
        const uint32_t p = k->sorted[i], n = k->pieces[p].n;
        size_t room = find_room(k, n);
        uint32_t r;
        if (room > k->length) {
            room = k->length;
            r = (uint32_t)k->n_packed++;
            k->first[r] = NONE;
        } else {
            r = take_row(k, room);
        }
        k->next[p] = k->first[r];
        k->first[r] = p;
        give_row(k, r, room - n);
    }
}

static void write_sample_row(const packing *k, size_t r, row *out)
{
    for (uint32_t p = k->first[r]; p != NONE; p = k->next[p])
        put_tokens(k, out, k->pieces[p].at, k->pieces[p].n, true);
    put_padding(k, out, k->length - out->n);
}

/* ---- setting up ---- */

static void packing_release(packing *k)
{
    free(k->texts);
    free(k->begins);
    free(k->pieces);
    free(k->order);
    free(k->sorted);
    free(k->next);
    free(k->first);
    free(k->open);
    free(k->below);
    free(k->rooms);
    free(k->counts);
}

static bool allocate_samples(packing *k)
{
    k->order = sh_calloc(k->n_pieces, sizeof *k->order);
    k->sorted = sh_calloc(k->n_pieces, sizeof *k->sorted);
    k->next = sh_calloc(k->n_pieces, sizeof *k->next);
    k->first = sh_calloc(k->n_pieces, sizeof *k->first);
    k->below = sh_calloc(k->n_pieces, sizeof *k->below);
    k->open = sh_calloc(k->length + 1, sizeof *k->open);
    k->rooms = sh_calloc(room_words(k), sizeof *k->rooms);
    k->counts = sh_calloc(k->length + 1, sizeof *k->counts);
    return k->order && k->sorted && k->next && k->first && k->below && k->open && k->rooms &&
           k->counts;
}

static sh_status check_options(const sh_dataset_packing *o, sh_error *err)
{
    if (o->context == 0 || o->context > SH_CONTEXT_MAX)
        return sh_fail(err, SH_ERR_USAGE, "a context of %u tokens: give 1 to %u", o->context,
                       SH_CONTEXT_MAX);
    return SH_OK;
}

/* offset_most: of the shuffled passes; 0 in order. */
static sh_status packing_init(const sh_dataset *d, const sh_dataset_packing *o, size_t offset_most,
                              packing *k, sh_error *err)
{
    SH_TRY(check_options(o, err));
    *k = (packing){.d = d, .context = o->context, .length = (size_t)o->context + 1};
    k->bare = d->one_text;
    k->texts = sh_calloc(d->n_documents, sizeof *k->texts);
    k->begins = sh_calloc(d->n_documents + 1, sizeof *k->begins);
    sh_status status = SH_OK;
    if (!k->texts || !k->begins)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu documents", d->n_documents));
    SH_GOTO(collect(k, o->long_samples, err));
    if (!allocate_samples(k))
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu samples", k->n_pieces));
    for (size_t i = 0; i < k->n_pieces; i++)
        k->order[i] = (uint32_t)i;
    lay_stream(k, 0);
    pack_samples(k);
    if (k->bare && stream_rows(k, offset_most) == 0)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "%s: %zu tokens are too few for %s of %zu: give a longer text or a shorter "
                        "context",
                        d->name, k->stream, offset_most ? "shuffled sequences" : "one sequence",
                        k->context));
    if (k->stream == 0 && k->n_packed == 0)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "%s: every sample is longer than a sequence of %zu tokens: raise the "
                        "context",
                        d->name, k->length));
cleanup:
    if (status != SH_OK)
        packing_release(k);
    return status;
}

/* ---- passes ---- */

static sh_status rows_allocate(const packing *k, size_t n, sh_dataset_rows *out, sh_error *err)
{
    if (n > SH_DATASET_SEQUENCES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "%zu sequences at once: at most %u are made", n,
                       SH_DATASET_SEQUENCES_MAX);
    int32_t *tokens = sh_calloc(n, k->length * sizeof *tokens);
    uint8_t *mask = k->bare ? NULL : sh_calloc(n, k->length);
    if (!tokens || (!mask && !k->bare)) {
        free(tokens);
        free(mask);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", n);
    }
    *out = (sh_dataset_rows){
        .data = {.tokens = tokens, .mask = mask, .n = n, .length = (uint32_t)k->length},
        .skipped = k->skipped};
    return SH_OK;
}

/* Row r of the pass becomes sequence `to` of out. */
static void write_row(const packing *k, size_t r, size_t to, size_t n_stream, sh_dataset_rows *out)
{
    const size_t at = to * k->length;
    row w = {.tokens = (int32_t *)(uintptr_t)out->data.tokens + at,
             .mask = out->data.mask ? (uint8_t *)(uintptr_t)out->data.mask + at : NULL};
    if (r < n_stream)
        write_stream_row(k, r, &w);
    else
        write_sample_row(k, r - n_stream, &w);
    out->padding += w.padding;
    for (size_t i = 1; i < k->length; i++)
        out->targets += !w.mask || (w.mask[i] & SH_TRAIN_TARGET) != 0;
}

sh_status sh_dataset_pack(const sh_dataset *d, const sh_dataset_packing *options,
                          sh_dataset_rows *out, sh_error *err)
{
    packing k;
    sh_dataset_rows packed = {0};
    SH_TRY(packing_init(d, options, 0, &k, err));
    const size_t n_stream = stream_rows(&k, 0), n = n_stream + k.n_packed;
    const sh_status status = rows_allocate(&k, n, &packed, err);
    for (size_t r = 0; status == SH_OK && r < n; r++)
        write_row(&k, r, r, n_stream, &packed);
    packing_release(&k);
    if (status == SH_OK)
        *out = packed;
    return status;
}

typedef struct {
    sh_rng rng; /* what is drawn next is the order */
    size_t offset, n_stream, n;
} pass;

static pass pass_of(const packing *k, uint64_t seed, uint64_t number)
{
    pass p;
    sh_rng_init(&p.rng, seed, number, PURPOSE_CHUNKS);
    p.offset = (size_t)sh_rng_below(&p.rng, k->context);
    p.n_stream = stream_rows(k, p.offset);
    p.n = p.n_stream + k->n_packed; /* which the order of the samples does not change */
    return p;
}

static void lay_pass(packing *k, uint64_t seed, uint64_t number, const pass *p)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, number, PURPOSE_DOCUMENTS);
    for (size_t i = 0, n = 0; i < k->d->n_documents; i++)
        if (!tr_is_sample(&k->d->documents[i]))
            k->texts[n++] = (uint32_t)i;
    for (size_t i = 0; i < k->n_pieces; i++)
        k->order[i] = (uint32_t)i;
    sh_rng_shuffle(&rng, k->texts, k->n_texts);
    sh_rng_shuffle(&rng, k->order, k->n_pieces);
    lay_stream(k, p->offset);
    pack_samples(k);
}

static void write_passes(packing *k, const sh_dataset_range *range, uint32_t *rows,
                         sh_dataset_rows *out)
{
    uint64_t skip = range->first;
    for (uint64_t number = 0, at = 0; at < range->want; number++) {
        pass p = pass_of(k, range->seed, number);
        if (skip >= p.n) {
            skip -= p.n;
            continue;
        }
        lay_pass(k, range->seed, number, &p);
        for (size_t i = 0; i < p.n; i++)
            rows[i] = (uint32_t)i;
        sh_rng_shuffle(&p.rng, rows, p.n);
        for (size_t i = (size_t)skip; i < p.n && at < range->want; i++, at++)
            write_row(k, rows[i], at, p.n_stream, out);
        skip = 0;
    }
}

sh_status sh_dataset_pack_shuffled(const sh_dataset *d, const sh_dataset_packing *options,
                                   const sh_dataset_range *range, sh_dataset_rows *out,
                                   sh_error *err)
{
    packing k;
    sh_dataset_rows packed = {0};
    if (range->want == 0)
        return sh_fail(err, SH_ERR_USAGE, "no sequence is wanted");
    SH_TRY(packing_init(d, options, options->context - 1, &k, err));
    const size_t most = SH_MAX(stream_rows(&k, 0), stream_rows(&k, k.context - 1)) + k.n_packed;
    uint32_t *rows = sh_calloc(most, sizeof *rows);
    sh_status status = rows ? rows_allocate(&k, range->want, &packed, err)
                            : sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", most);
    if (status == SH_OK) {
        write_passes(&k, range, rows, &packed);
        *out = packed;
    }
    free(rows);
    packing_release(&k);
    return status;
}

void sh_dataset_rows_release(sh_dataset_rows *rows)
{
    free((void *)(uintptr_t)rows->data.tokens);
    free((void *)(uintptr_t)rows->data.mask);
    *rows = (sh_dataset_rows){0};
}

double sh_dataset_rows_padding(const sh_dataset_rows *rows)
{
    const uint64_t all = (uint64_t)rows->data.n * rows->data.length;
    return all > 0 ? (double)rows->padding / (double)all : 0;
}
