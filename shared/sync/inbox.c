/*
 * The inbox's bytes: key = node key (32), epoch (8, big-endian), class (1); value = version (1),
 * high-water mark (8, little-endian), bitmap (SH_ACK_BITMAP_WORDS words of 8, little-endian) whose
 * bit i says that high-water + 1 + i is committed. Bit 0 is never set at rest: the mark moves up.
 */
#include "shared/base/canary.h"
#include "shared/sync/codec.h"
#include "shared/sync/sync.h"

#define INBOX_VERSION 1
#define KEY_BYTES     41
#define VALUE_BYTES   (1 + 8 + 8 * SH_ACK_BITMAP_WORDS)
#define BITMAP_BITS   (64u * SH_ACK_BITMAP_WORDS)

static void make_key(uint8_t key[KEY_BYTES], const sh_hash *node, uint64_t epoch, uint8_t cls)
{
    memcpy(key, node->b, sizeof(node->b));
    sh_key_put_u64(key + 32, epoch);
    key[40] = cls;
}

sh_status sh_inbox_get_ack(sh_txn *txn, unsigned table, const sh_hash *node, uint64_t epoch,
                           uint8_t cls, sh_msg_ack *ack, sh_error *err)
{
    uint8_t key[KEY_BYTES];
    sh_slice value;
    if (cls >= SH_CLASSES)
        return sh_fail(err, SH_ERR_INVALID, "inbox: class %u does not exist", cls);
    make_key(key, node, epoch, cls);
    sh_status status = sh_txn_get(txn, table, key, sizeof(key), &value);
    sh_msg_ack got = {.epoch = epoch, .cls = cls};
    if (status == SH_ERR_NOT_FOUND) {
        *ack = got;
        return SH_OK;
    }
    if (status != SH_OK)
        return sh_fail(err, status, "inbox: a row cannot be read");
    const uint8_t *p = value.data;
    if (value.n != VALUE_BYTES || p[0] != INBOX_VERSION)
        return sh_fail(err, SH_ERR_CORRUPT, "inbox: a row of %zu bytes has an unknown layout",
                       value.n);
    got.high_water = sh_get_le64(p + 1);
    for (unsigned w = 0; w < SH_ACK_BITMAP_WORDS; w++)
        got.bitmap[w] = sh_get_le64(p + 9 + 8 * w);
    *ack = got;
    return SH_OK;
}

static bool bit_get(const sh_msg_ack *ack, uint64_t bit)
{
    return ack->bitmap[bit / 64] >> (bit % 64) & 1;
}

sh_status sh_inbox_highest(sh_txn *txn, unsigned table, const sh_hash *node, uint64_t epoch,
                           uint8_t cls, uint64_t *highest, sh_error *err)
{
    sh_msg_ack ack;
    SH_TRY(sh_inbox_get_ack(txn, table, node, epoch, cls, &ack, err));
    *highest = ack.high_water;
    for (uint64_t bit = BITMAP_BITS; bit-- > 0;)
        if (bit_get(&ack, bit)) {
            *highest += bit + 1;
            break;
        }
    return SH_OK;
}

/* Drops the lowest n bits: bit i becomes bit i - n. */
static void bitmap_shift(uint64_t bitmap[SH_ACK_BITMAP_WORDS], uint64_t n)
{
    if (n >= BITMAP_BITS) {
        memset(bitmap, 0, SH_ACK_BITMAP_WORDS * sizeof(bitmap[0]));
        return;
    }
    unsigned words = (unsigned)(n / 64), bits = (unsigned)(n % 64);
    for (unsigned w = 0; w < SH_ACK_BITMAP_WORDS; w++) {
        uint64_t low = w + words < SH_ACK_BITMAP_WORDS ? bitmap[w + words] : 0;
        uint64_t high = w + words + 1 < SH_ACK_BITMAP_WORDS ? bitmap[w + words + 1] : 0;
        bitmap[w] = bits == 0 ? low : low >> bits | high << (64 - bits);
    }
}

static sh_status check_item(const sh_msg_item *item, sh_error *err)
{
    if (item->cls >= SH_CLASSES)
        return sh_fail(err, SH_ERR_INVALID, "item: class %u does not exist", item->cls);
    bool range = item->kind == SH_ITEM_TOMBSTONE;
    if (item->seq == 0 || item->last_seq < item->seq || item->last_seq > SH_SEQ_MAX ||
        (!range && item->last_seq != item->seq))
        return sh_fail(err, SH_ERR_INVALID, "item: sequences %llu to %llu are no range",
                       (unsigned long long)item->seq, (unsigned long long)item->last_seq);
    return SH_OK;
}

static sh_inbox_verdict judge(const sh_msg_ack *ack, const sh_msg_item *item)
{
    if (item->last_seq <= ack->high_water)
        return SH_INBOX_DUPLICATE;
    if (item->seq <= ack->high_water + 1)
        return SH_INBOX_NEW; /* high_water + 1 is not committed, or the mark would be higher */
    if (item->last_seq - ack->high_water > BITMAP_BITS)
        return SH_INBOX_AHEAD;
    for (uint64_t seq = item->seq; seq <= item->last_seq; seq++)
        if (!bit_get(ack, seq - ack->high_water - 1))
            return SH_INBOX_NEW;
    return SH_INBOX_DUPLICATE;
}

sh_status sh_inbox_check(sh_txn *txn, unsigned table, const sh_hash *node, const sh_msg_item *item,
                         sh_inbox_verdict *verdict, sh_error *err)
{
    sh_msg_ack ack;
    SH_TRY(check_item(item, err));
    SH_TRY(sh_inbox_get_ack(txn, table, node, item->epoch, item->cls, &ack, err));
    *verdict = judge(&ack, item);
    return SH_OK;
}

sh_status sh_inbox_mark(sh_txn *txn, unsigned table, const sh_hash *node, const sh_msg_item *item,
                        sh_msg_ack *ack, sh_error *err)
{
    sh_msg_ack now;
    SH_TRY(check_item(item, err));
    SH_TRY(sh_inbox_get_ack(txn, table, node, item->epoch, item->cls, &now, err));
    if (judge(&now, item) == SH_INBOX_AHEAD)
        return sh_fail(err, SH_ERR_LIMIT, "inbox: sequence %llu is beyond the bitmap of %llu",
                       (unsigned long long)item->last_seq, (unsigned long long)now.high_water);
    if (item->seq <= now.high_water + 1) {
        if (item->last_seq > now.high_water) {
            bitmap_shift(now.bitmap, item->last_seq - now.high_water);
            now.high_water = item->last_seq;
            if (SH_CANARY(FORGET_GAP))
                memset(now.bitmap, 0, sizeof(now.bitmap));
        }
    } else {
        for (uint64_t seq = item->seq; seq <= item->last_seq; seq++) {
            uint64_t bit = seq - now.high_water - 1;
            now.bitmap[bit / 64] |= UINT64_C(1) << (bit % 64);
        }
    }
    while (bit_get(&now, 0)) {
        bitmap_shift(now.bitmap, 1);
        now.high_water++;
    }
    uint8_t key[KEY_BYTES], value[VALUE_BYTES];
    make_key(key, node, item->epoch, item->cls);
    value[0] = INBOX_VERSION;
    sh_put_le64(value + 1, now.high_water);
    for (unsigned w = 0; w < SH_ACK_BITMAP_WORDS; w++)
        sh_put_le64(value + 9 + 8 * w, now.bitmap[w]);
    SH_TRY(sh_txn_put(txn, table, key, sizeof(key), value, sizeof(value), err));
    *ack = now;
    return SH_OK;
}
