/*
 * META "lease": version (1), renewals (4), number of starts (1), of segments (1); for each start
 * its lease (32) and next sequences (8 a class), newest first; for each segment epoch (8) and base
 * (8 a class), oldest first; integers little-endian. A store of before leases has no such row: one
 * segment, no start. META "epoch" is the last segment's.
 */
#include <string.h>

#include "shared/sync/codec.h"
#include "shared/sync/link_internal.h"

#define ROW_VERSION   1
#define HEAD_BYTES    7
#define START_BYTES   (sizeof(sh_hash) + 8 * SH_CLASSES)
#define SEGMENT_BYTES (8 + 8 * SH_CLASSES)
#define ROW_MAX                                                                                    \
    (HEAD_BYTES + SH_WIRE_LEASES_MAX * START_BYTES + SH_LINK_SEGMENTS_MAX * SEGMENT_BYTES)

static const char meta_lease[] = "lease";

/* ---- the row ---- */

static uint8_t *put_sequences(uint8_t *p, const uint64_t seq[SH_CLASSES])
{
    for (int c = 0; c < SH_CLASSES; c++, p += 8)
        sh_put_le64(p, seq[c]);
    return p;
}

static const uint8_t *get_sequences(const uint8_t *p, uint64_t seq[SH_CLASSES])
{
    for (int c = 0; c < SH_CLASSES; c++, p += 8)
        seq[c] = sh_get_le64(p);
    return p;
}

static sh_status row_put(const sh_link_step *s, const link_starts *starts)
{
    const sh_link *l = s->link;
    uint8_t row[ROW_MAX], *p = row + HEAD_BYTES;
    row[0] = ROW_VERSION;
    for (int i = 0; i < 4; i++)
        row[1 + i] = (uint8_t)(l->renewals >> (8 * i));
    row[5] = (uint8_t)starts->n;
    row[6] = (uint8_t)l->segments.n;
    for (uint32_t i = 0; i < starts->n; i++) {
        memcpy(p, starts->items[i].lease, sizeof(sh_hash));
        p = put_sequences(p + sizeof(sh_hash), starts->items[i].next_seq);
    }
    for (uint32_t i = 0; i < l->segments.n; i++) {
        sh_put_le64(p, l->segments.items[i].epoch);
        p = put_sequences(p + 8, l->segments.items[i].base);
    }
    return sh_txn_put(s->txn, l->options.outbox.meta_table, meta_lease, sizeof(meta_lease) - 1, row,
                      (size_t)(p - row), s->err);
}

static bool segments_hold(const sh_link *l)
{
    for (uint32_t i = 0; i < l->segments.n; i++)
        for (int c = 0; c < SH_CLASSES; c++)
            if (l->segments.items[i].base[c] >= l->counts.next_seq[c] ||
                (i > 0 && l->segments.items[i].base[c] < l->segments.items[i - 1].base[c]))
                return false;
    return l->segments.n > 0 && l->segments.items[l->segments.n - 1].epoch == l->epoch;
}

/* SH_ERR_NOT_FOUND without text. Fills in the link's part and *starts. */
static sh_status row_get(const sh_link_step *s, link_starts *starts)
{
    sh_link *l = s->link;
    sh_slice value;
    sh_status status = sh_txn_get(s->txn, l->options.outbox.meta_table, meta_lease,
                                  sizeof(meta_lease) - 1, &value);
    if (status == SH_ERR_NOT_FOUND)
        return status;
    if (status != SH_OK)
        return sh_fail(s->err, status, "link: the leases cannot be read");
    const uint8_t *p = value.data;
    if (value.n < HEAD_BYTES || p[0] != ROW_VERSION || p[5] > SH_WIRE_LEASES_MAX ||
        p[6] > SH_LINK_SEGMENTS_MAX ||
        value.n != HEAD_BYTES + p[5] * START_BYTES + p[6] * SEGMENT_BYTES)
        return sh_fail(s->err, SH_ERR_CORRUPT, "link: leases of %zu bytes of an unknown layout",
                       value.n);
    l->renewals =
        (uint32_t)p[1] | (uint32_t)p[2] << 8 | (uint32_t)p[3] << 16 | (uint32_t)p[4] << 24;
    starts->n = p[5];
    l->segments.n = p[6];
    p += HEAD_BYTES;
    for (uint32_t i = 0; i < starts->n; i++) {
        memcpy(starts->items[i].lease, p, sizeof(sh_hash));
        p = get_sequences(p + sizeof(sh_hash), starts->items[i].next_seq);
    }
    for (uint32_t i = 0; i < l->segments.n; i++) {
        l->segments.items[i].epoch = sh_get_le64(p);
        p = get_sequences(p + 8, l->segments.items[i].base);
    }
    return SH_OK;
}

sh_status link_starts_load(const sh_link_step *s, link_starts *out)
{
    sh_status status = row_get(s, out);
    return status == SH_ERR_NOT_FOUND ? sh_fail(s->err, SH_ERR_CORRUPT, "link: the leases are gone")
                                      : status;
}

/* ---- epoch ---- */

sh_status sh_link_stored_epoch(sh_txn *txn, unsigned meta_table, uint64_t *epoch, sh_error *err)
{
    sh_slice value;
    sh_status status =
        sh_txn_get(txn, meta_table, SH_LINK_META_EPOCH, sizeof(SH_LINK_META_EPOCH) - 1, &value);
    if (status == SH_ERR_NOT_FOUND)
        return status;
    if (status != SH_OK)
        return sh_fail(err, status, "link: the epoch cannot be read");
    if (value.n != 8)
        return sh_fail(err, SH_ERR_CORRUPT, "link: an epoch of %zu bytes, not 8", value.n);
    *epoch = sh_key_get_u64(value.data);
    return SH_OK;
}

static sh_status put_epoch(const sh_link_step *s, uint64_t epoch)
{
    uint8_t value[8];
    s->link->epoch = epoch;
    sh_key_put_u64(value, epoch);
    return sh_txn_put(s->txn, s->link->options.outbox.meta_table, SH_LINK_META_EPOCH,
                      sizeof(SH_LINK_META_EPOCH) - 1, value, sizeof(value), s->err);
}

static uint64_t draw_epoch(const sh_link_step *s)
{
    uint64_t epoch;
    do
        epoch = sh_rng_u64(s->rng);
    while (epoch == 0);
    return epoch;
}

static uint64_t epoch_of(const void *bytes, size_t n)
{
    sh_hash hash = sh_blake2b(bytes, n);
    uint64_t epoch = sh_get_le64(hash.b);
    return epoch != 0 ? epoch : 1;
}

/* ---- segments ---- */

static uint32_t segment_at(const sh_link_segments *segments, uint8_t cls, uint64_t seq)
{
    uint32_t i = segments->n - 1;
    while (i > 0 && seq <= segments->items[i].base[cls])
        i--;
    return i;
}

sh_wire_id sh_link_wire_id(const sh_link_segments *segments, uint8_t cls, uint64_t seq)
{
    const sh_link_segment *segment = &segments->items[segment_at(segments, cls, seq)];
    return (sh_wire_id){segment->epoch, seq - segment->base[cls]};
}

uint64_t link_segment_last(const sh_link *l, uint32_t i, uint8_t cls)
{
    return i + 1 == l->segments.n ? SH_SEQ_MAX : l->segments.items[i + 1].base[cls];
}

uint64_t link_range_last(const sh_link *l, uint8_t cls, uint64_t seq)
{
    return link_segment_last(l, segment_at(&l->segments, cls, seq), cls);
}

/* Forgets segments of which nothing is owed. While the core runs they stay: acknowledgements of
 * them may still be on their way. */
static sh_status prune(const sh_link_step *s)
{
    sh_link *l = s->link;
    const sh_outbox *outbox = &l->options.outbox;
    uint32_t gone = 0;
    for (; gone + 1 < l->segments.n; gone++)
        for (uint8_t c = 0; c < SH_CLASSES; c++) {
            sh_msg_item item;
            sh_status status = sh_outbox_next(outbox, s->txn, (sh_class)c, 0, &item);
            if (status != SH_OK && status != SH_ERR_NOT_FOUND)
                return sh_fail(s->err, status, "outbox: cannot be read");
            if (status == SH_OK && item.seq <= link_segment_last(l, gone, c))
                goto done;
        }
done:
    l->segments.n -= gone;
    memmove(l->segments.items, l->segments.items + gone,
            l->segments.n * sizeof(l->segments.items[0]));
    return SH_OK;
}

/* ---- leases ---- */

static bool same_sequences(const link_start *a, const link_start *b)
{
    return memcmp(a->next_seq, b->next_seq, sizeof(a->next_seq)) == 0;
}

/* Makes room for one more: the last one, which the aggregator has, stays. A start that made nothing
 * tells nothing that the next one does not tell. */
static void make_room(link_starts *starts)
{
    if (starts->n < SH_WIRE_LEASES_MAX)
        return;
    uint32_t out = starts->n - 2;
    for (uint32_t i = starts->n - 2; i >= 1; i--)
        if (same_sequences(&starts->items[i], &starts->items[i - 1])) {
            out = i;
            break;
        }
    starts->n--;
    memmove(&starts->items[out], &starts->items[out + 1],
            (starts->n - out) * sizeof(starts->items[0]));
}

static void draw_lease(const sh_link_step *s, link_start *start)
{
    for (size_t i = 0; i < sizeof(start->lease); i += 8)
        sh_put_le64(start->lease + i, sh_rng_u64(s->rng));
}

sh_status link_identity_open(const sh_link_step *s)
{
    sh_link *l = s->link;
    link_starts starts = {0};
    sh_status status =
        sh_link_stored_epoch(s->txn, l->options.outbox.meta_table, &l->epoch, s->err);
    if (status == SH_ERR_NOT_FOUND)
        status = put_epoch(s, draw_epoch(s));
    SH_TRY(status);
    status = row_get(s, &starts);
    if (status == SH_ERR_NOT_FOUND) {
        l->segments.n = 1;
        l->segments.items[0] = (sh_link_segment){.epoch = l->epoch};
    } else {
        SH_TRY(status);
    }
    if (!segments_hold(l))
        return sh_fail(s->err, SH_ERR_CORRUPT, "link: epochs and outbox do not fit together");
    SH_TRY(prune(s));
    make_room(&starts);
    memmove(&starts.items[1], &starts.items[0], starts.n++ * sizeof(starts.items[0]));
    draw_lease(s, &starts.items[0]);
    l->lease = sh_lease_name(starts.items[0].lease);
    memcpy(starts.items[0].next_seq, l->counts.next_seq, sizeof(l->counts.next_seq));
    return row_put(s, &starts);
}

sh_status link_welcomed(const sh_link_step *s)
{
    link_starts starts;
    SH_TRY(link_starts_load(s, &starts));
    if (starts.n == 1)
        return SH_OK;
    starts.n = 1;
    return row_put(s, &starts);
}

void link_start_sequences(const sh_link *l, const link_start *start, uint64_t out[SH_CLASSES])
{
    const sh_link_segment *last = &l->segments.items[l->segments.n - 1];
    for (int c = 0; c < SH_CLASSES; c++)
        out[c] = SH_MAX(start->next_seq[c], last->base[c] + 1) - last->base[c];
}

/* ---- renewal ---- */

/* Where this store and the other copy parted. */
typedef struct {
    uint64_t next_seq[SH_CLASSES]; /* the first that they have not in common */
    uint64_t epoch;                /* of that and what follows */
    uint32_t starts;               /* that made any of it */
} fork;

/* Our next start came first: what it and those after it made is this store's and of copies that
 * were made since, which come to the same epoch by its lease. */
static fork fork_at_start(const link_start *starts, uint32_t common)
{
    const link_start *first = &starts[common - 1];
    fork f = {.epoch = epoch_of(first->lease, sizeof(first->lease)), .starts = common};
    memcpy(f.next_seq, first->next_seq, sizeof(f.next_seq));
    return f;
}

/* The other one was copied from a program that went on, while start `common` made more: what it
 * made since is this store's and of copies that were made later, which are told the same. */
static fork fork_within(const sh_link_step *s, const link_starts *starts, uint32_t common,
                        const uint64_t parted[SH_CLASSES])
{
    const sh_link *l = s->link;
    const sh_link_segment *last = &l->segments.items[l->segments.n - 1];
    const uint64_t *end = common > 0 ? starts->items[common - 1].next_seq : l->counts.next_seq;
    fork f = {.starts = common + 1};
    bool before = true, after = true;
    for (int c = 0; c < SH_CLASSES; c++) {
        uint64_t theirs = last->base[c] + parted[c];
        before = before && theirs <= end[c];
        after = after && theirs >= end[c];
        f.next_seq[c] = SH_MIN(theirs, end[c]);
    }
    if (after && common > 0)
        return fork_at_start(starts->items, common);
    uint8_t name[sizeof(sh_hash) + 8 + SH_WIRE_START_BYTES];
    memcpy(name, starts->items[common].lease, sizeof(sh_hash));
    sh_key_put_u64(name + sizeof(sh_hash), l->epoch);
    sh_start_put(name + sizeof(sh_hash) + 8, parted);
    /* No moment of that start: one of the two was set back. It shares nothing with others. */
    f.epoch = before ? epoch_of(name, sizeof(name)) : draw_epoch(s);
    return f;
}

static fork find_fork(const sh_link_step *s, const link_starts *starts, uint32_t common,
                      const uint64_t *parted)
{
    if (common < starts->n && parted != NULL)
        return fork_within(s, starts, common, parted);
    /* None in common, as far as the other side remembers: the last welcomed one most likely was. */
    common = SH_MIN(common, starts->n - 1);
    if (common > 0)
        return fork_at_start(starts->items, common);
    fork f = {.epoch = draw_epoch(s), .starts = 1};
    memcpy(f.next_seq, starts->items[0].next_seq, sizeof(f.next_seq));
    return f;
}

sh_status link_renew(const sh_link_step *s, uint32_t common, const uint64_t parted[SH_CLASSES])
{
    sh_link *l = s->link;
    link_starts starts;
    SH_TRY(link_starts_load(s, &starts));
    SH_TRY(prune(s));
    fork f = find_fork(s, &starts, common, parted);
    sh_link_segment *last = &l->segments.items[l->segments.n - 1];
    sh_link_segment next = {.epoch = f.epoch};
    bool older = false; /* some of what the epoch has is older than that */
    for (int c = 0; c < SH_CLASSES; c++) {
        next.base[c] = SH_MAX(f.next_seq[c] - 1, last->base[c]);
        older = older || next.base[c] > last->base[c];
    }
    if (older && l->segments.n < SH_LINK_SEGMENTS_MAX)
        l->segments.items[l->segments.n++] = next;
    else
        last->epoch = next.epoch; /* nothing is, or so many epochs are owed that no more fit */
    l->renewals++;
    starts.n = f.starts;
    SH_TRY(row_put(s, &starts));
    return put_epoch(s, next.epoch);
}

/* ---- for readers of a store ---- */

sh_status sh_link_stored_segments(sh_txn *txn, const sh_outbox *outbox, sh_link_segments *out,
                                  sh_error *err)
{
    sh_link link = {.options = {.outbox = *outbox}};
    sh_link_step s = {.link = &link, .txn = txn, .err = err};
    link_starts starts;
    SH_TRY(sh_link_stored_epoch(txn, outbox->meta_table, &link.epoch, err));
    SH_TRY(sh_outbox_get_counts(outbox, txn, &link.counts, err));
    sh_status status = row_get(&s, &starts);
    if (status == SH_ERR_NOT_FOUND) {
        link.segments.n = 1;
        link.segments.items[0] = (sh_link_segment){.epoch = link.epoch};
    } else {
        SH_TRY(status);
    }
    if (!segments_hold(&link))
        return sh_fail(err, SH_ERR_CORRUPT, "link: epochs and outbox do not fit together");
    *out = link.segments;
    return SH_OK;
}

sh_status sh_link_forget_identity(sh_txn *txn, unsigned meta_table, sh_error *err)
{
    SH_TRY(sh_txn_del(txn, meta_table, meta_lease, strlen(meta_lease), err));
    return sh_txn_del(txn, meta_table, SH_LINK_META_EPOCH, strlen(SH_LINK_META_EPOCH), err);
}
