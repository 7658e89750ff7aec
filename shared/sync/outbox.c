/*
 * The outbox's bytes.
 *   item:     key   class (1), sequence (8, big-endian)
 *             value kind (1), last sequence (8, little-endian), payload
 *   counters: key   SH_OUTBOX_META_KEY in the meta table
 *             value version (1), then for each class next sequence, items, bytes, dropped
 *                   (8 each, little-endian)
 * An item's bytes are its key, its value and what weigh says that it holds elsewhere. At most one
 * tombstone a class, and it is the class's oldest item: dropping always begins at the oldest.
 * It may span several epochs' sequences; then it is acknowledged epoch by epoch, from its start.
 */
#include "shared/sync/codec.h"
#include "shared/sync/sync.h"

#define OUTBOX_VERSION  1
#define KEY_BYTES       9
#define HEAD_BYTES      9 /* of a value, before the payload */
#define CLASS_BYTES     32
#define COUNTS_BYTES    (1 + SH_CLASSES * CLASS_BYTES)
#define ACK_BITMAP_BITS (64u * SH_ACK_BITMAP_WORDS)

static void make_key(uint8_t key[KEY_BYTES], sh_class cls, uint64_t seq)
{
    key[0] = (uint8_t)cls;
    sh_key_put_u64(key + 1, seq);
}

static uint64_t item_bytes(const sh_outbox *outbox, const sh_msg_item *item)
{
    uint64_t bytes = KEY_BYTES + HEAD_BYTES + item->payload.n;
    if (outbox->weigh != NULL)
        bytes += outbox->weigh(outbox->arg, item);
    return bytes;
}

sh_status sh_outbox_get_counts(const sh_outbox *outbox, sh_txn *txn, sh_outbox_counts *out,
                               sh_error *err)
{
    sh_slice value;
    sh_status status = sh_txn_get(txn, outbox->meta_table, SH_OUTBOX_META_KEY,
                                  sizeof(SH_OUTBOX_META_KEY) - 1, &value);
    sh_outbox_counts counts = {0};
    if (status == SH_ERR_NOT_FOUND) {
        for (int c = 0; c < SH_CLASSES; c++)
            counts.next_seq[c] = 1;
        *out = counts;
        return SH_OK;
    }
    if (status != SH_OK)
        return sh_fail(err, status, "outbox counters: cannot be read");
    const uint8_t *p = value.data;
    if (value.n != COUNTS_BYTES || p[0] != OUTBOX_VERSION)
        return sh_fail(err, SH_ERR_CORRUPT, "outbox counters: %zu bytes of an unknown layout",
                       value.n);
    p++;
    for (int c = 0; c < SH_CLASSES; c++, p += CLASS_BYTES) {
        counts.next_seq[c] = sh_get_le64(p);
        counts.items[c] = sh_get_le64(p + 8);
        counts.bytes[c] = sh_get_le64(p + 16);
        counts.dropped[c] = sh_get_le64(p + 24);
    }
    *out = counts;
    return SH_OK;
}

static sh_status put_counts(const sh_outbox *outbox, sh_txn *txn, const sh_outbox_counts *counts,
                            sh_error *err)
{
    uint8_t bytes[COUNTS_BYTES];
    uint8_t *p = bytes;
    *p++ = OUTBOX_VERSION;
    for (int c = 0; c < SH_CLASSES; c++, p += CLASS_BYTES) {
        sh_put_le64(p, counts->next_seq[c]);
        sh_put_le64(p + 8, counts->items[c]);
        sh_put_le64(p + 16, counts->bytes[c]);
        sh_put_le64(p + 24, counts->dropped[c]);
    }
    return sh_txn_put(txn, outbox->meta_table, SH_OUTBOX_META_KEY, sizeof(SH_OUTBOX_META_KEY) - 1,
                      bytes, sizeof(bytes), err);
}

static sh_status put_item(const sh_outbox *outbox, sh_txn *txn, const sh_msg_item *item,
                          sh_error *err)
{
    uint8_t key[KEY_BYTES], head[HEAD_BYTES];
    make_key(key, item->cls, item->seq);
    head[0] = item->kind;
    sh_put_le64(head + 1, item->last_seq);
    sh_buf value;
    sh_buf_init(&value, HEAD_BYTES + SH_WIRE_ITEM_MAX);
    sh_status status = sh_buf_append(&value, head, sizeof(head));
    if (status == SH_OK && item->payload.n > 0)
        status = sh_buf_append(&value, item->payload.data, item->payload.n);
    if (status == SH_OK)
        status = sh_txn_put(txn, outbox->table, key, sizeof(key), value.data, value.len, err);
    else
        status = sh_fail(err, status, "outbox: item of %zu bytes", item->payload.n);
    sh_buf_release(&value);
    return status;
}

sh_status sh_outbox_next(const sh_outbox *outbox, sh_txn *txn, sh_class cls, uint64_t from,
                         sh_msg_item *item)
{
    uint8_t key[KEY_BYTES];
    make_key(key, cls, from);
    sh_cursor *cursor = NULL;
    sh_slice k, v;
    SH_TRY(sh_cursor_open(txn, outbox->table, &cursor, NULL));
    sh_status status = sh_cursor_seek(cursor, key, sizeof(key), &k, &v);
    sh_cursor_close(&cursor);
    if (status != SH_OK)
        return status;
    const uint8_t *kb = k.data, *vb = v.data;
    if (k.n != KEY_BYTES || v.n < HEAD_BYTES)
        return SH_ERR_CORRUPT;
    if (kb[0] != (uint8_t)cls)
        return SH_ERR_NOT_FOUND;
    *item = (sh_msg_item){
        .cls = kb[0],
        .seq = sh_key_get_u64(kb + 1),
        .kind = vb[0],
        .last_seq = sh_get_le64(vb + 1),
        .payload = {vb + HEAD_BYTES, v.n - HEAD_BYTES},
    };
    return SH_OK;
}

/* Takes one item out: tells fn with a copy of the payload (fn may write to other tables, which
 * ends the life of borrowed slices), then deletes the row and counts it out. */
static sh_status take_out(const sh_outbox *outbox, sh_txn *txn, const sh_msg_item *item,
                          sh_outbox_counts *counts, sh_outbox_fn fn, void *arg, sh_error *err)
{
    sh_buf copy;
    sh_buf_init(&copy, SH_WIRE_ITEM_MAX);
    sh_msg_item mine = *item;
    sh_status status = SH_OK;
    uint8_t key[KEY_BYTES];
    uint64_t bytes = item_bytes(outbox, item);
    make_key(key, item->cls, item->seq);
    if (fn != NULL) {
        if (mine.payload.n > 0)
            SH_GOTO(sh_buf_append(&copy, mine.payload.data, mine.payload.n));
        mine.payload.data = copy.data;
        SH_GOTO(fn(arg, &mine));
    }
    SH_GOTO(sh_txn_del(txn, outbox->table, key, sizeof(key), err));
    counts->items[mine.cls]--;
    counts->bytes[mine.cls] -= SH_MIN(bytes, counts->bytes[mine.cls]);
cleanup:
    sh_buf_release(&copy);
    return status;
}

/* Replaces the oldest items of cls by one tombstone until the class fits its quota. */
static sh_status enforce_quota(const sh_outbox *outbox, sh_txn *txn, sh_class cls,
                               sh_outbox_counts *counts, sh_error *err)
{
    sh_msg_item tombstone = {.cls = (uint8_t)cls, .kind = SH_ITEM_TOMBSTONE};
    uint64_t cost = item_bytes(outbox, &tombstone);
    bool dropped = false;
    while (counts->items[cls] > 0 &&
           counts->bytes[cls] + (dropped ? cost : 0) > outbox->quota_bytes[cls]) {
        sh_msg_item item;
        sh_status status = sh_outbox_next(outbox, txn, cls, 0, &item);
        if (status != SH_OK)
            return sh_fail(err, SH_ERR_CORRUPT, "outbox: class %d counts %llu items but has none",
                           (int)cls, (unsigned long long)counts->items[cls]);
        bool is_tombstone = item.kind == SH_ITEM_TOMBSTONE;
        if (is_tombstone && counts->items[cls] == 1)
            break; /* nothing but the tombstone is left; it stays whatever the quota */
        if (!dropped)
            tombstone.seq = item.seq;
        tombstone.last_seq = item.last_seq;
        dropped = true;
        if (!is_tombstone)
            counts->dropped[cls]++;
        SH_TRY(take_out(outbox, txn, &item, counts, is_tombstone ? NULL : outbox->on_drop,
                        outbox->arg, err));
    }
    if (!dropped)
        return SH_OK;
    counts->items[cls]++;
    counts->bytes[cls] += cost;
    return put_item(outbox, txn, &tombstone, err);
}

sh_status sh_outbox_put(const sh_outbox *outbox, sh_txn *txn, sh_class cls, sh_item_kind kind,
                        sh_bytes payload, uint64_t *seq, sh_error *err)
{
    SH_ASSERT(cls < SH_CLASSES && kind != SH_ITEM_TOMBSTONE);
    if (payload.n > SH_WIRE_ITEM_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "outbox: item of %zu bytes, the most is %u", payload.n,
                       SH_WIRE_ITEM_MAX);
    sh_outbox_counts counts;
    SH_TRY(sh_outbox_get_counts(outbox, txn, &counts, err));
    sh_msg_item item = {
        .cls = (uint8_t)cls,
        .seq = counts.next_seq[cls],
        .kind = (uint8_t)kind,
        .last_seq = counts.next_seq[cls],
        .payload = payload,
    };
    if (item.seq > SH_SEQ_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "outbox: class %d has used up its sequences", (int)cls);
    SH_TRY(put_item(outbox, txn, &item, err));
    counts.next_seq[cls]++;
    counts.items[cls]++;
    counts.bytes[cls] += item_bytes(outbox, &item);
    SH_TRY(enforce_quota(outbox, txn, cls, &counts, err));
    SH_TRY(put_counts(outbox, txn, &counts, err));
    *seq = item.seq;
    return SH_OK;
}

bool sh_ack_covers(const sh_msg_ack *ack, uint64_t first, uint64_t last)
{
    if (last <= ack->high_water)
        return true;
    first = SH_MAX(first, ack->high_water + 1);
    if (last - ack->high_water > ACK_BITMAP_BITS)
        return false;
    for (uint64_t seq = first; seq <= last; seq++) {
        uint64_t bit = seq - ack->high_water - 1;
        if ((ack->bitmap[bit / 64] >> (bit % 64) & 1) == 0)
            return false;
    }
    return true;
}

/* The last sequence that the acknowledgement speaks of. */
static uint64_t ack_last(const sh_msg_ack *ack)
{
    for (unsigned word = ACK_BITMAP_BITS / 64; word-- > 0;)
        if (ack->bitmap[word] != 0)
            return ack->high_water + 64 * (word + 1) - (unsigned)__builtin_clzll(ack->bitmap[word]);
    return ack->high_water;
}

/* What is left of a tombstone of which the sequences up to `last` were acknowledged. */
static sh_status put_rest(const sh_outbox *outbox, sh_txn *txn, const sh_msg_item *item,
                          uint64_t last, sh_outbox_counts *counts, sh_error *err)
{
    sh_msg_item rest = *item;
    rest.seq = last + 1;
    rest.payload = (sh_bytes){0};
    counts->items[item->cls]++;
    counts->bytes[item->cls] += item_bytes(outbox, &rest);
    return put_item(outbox, txn, &rest, err);
}

sh_status sh_outbox_ack(const sh_outbox *outbox, sh_txn *txn, const sh_outbox_acked *acked,
                        sh_outbox_fn fn, void *arg, sh_error *err)
{
    const sh_msg_ack *ack = acked->ack;
    if (ack->cls >= SH_CLASSES || ack->high_water > SH_SEQ_MAX)
        return sh_fail(err, SH_ERR_INVALID, "acknowledgement of class %u up to %llu: no such",
                       ack->cls, (unsigned long long)ack->high_water);
    sh_outbox_counts counts;
    SH_TRY(sh_outbox_get_counts(outbox, txn, &counts, err));
    uint64_t base = acked->base, made = counts.next_seq[ack->cls] - 1;
    if (acked->last == 0 && ack_last(ack) > made - base)
        return sh_fail(err, SH_ERR_INVALID,
                       "acknowledgement of class %u up to %llu: only %llu were ever made", ack->cls,
                       (unsigned long long)ack_last(ack), (unsigned long long)(made - base));
    uint64_t last = acked->last == 0 ? made : acked->last;
    bool changed = false;
    for (uint64_t from = base + 1; from <= last;) {
        sh_msg_item item;
        sh_status status = sh_outbox_next(outbox, txn, ack->cls, from, &item);
        if (status == SH_ERR_NOT_FOUND)
            break;
        if (status != SH_OK)
            return sh_fail(err, status, "outbox: class %u cannot be read", ack->cls);
        if (item.seq > last || item.seq - base > ack_last(ack))
            break;
        from = item.last_seq + 1;
        if (!sh_ack_covers(ack, item.seq - base, SH_MIN(item.last_seq, last) - base))
            continue;
        bool tombstone = item.kind == SH_ITEM_TOMBSTONE;
        SH_TRY(take_out(outbox, txn, &item, &counts, fn, arg, err));
        if (tombstone && item.last_seq > last)
            SH_TRY(put_rest(outbox, txn, &item, last, &counts, err));
        changed = true;
    }
    return changed ? put_counts(outbox, txn, &counts, err) : SH_OK;
}
