/*
 * Updates that stand for several: which keys may send them, and that no part counts twice.
 *
 * META "r" + key (32) -> version 1: this enrolled key is a relay's.
 *
 * A node that moves from one aggregator to another sends again what it had no answer to, and the
 * two ways may meet here. A part is therefore marked in SH_COORD_T_PART, by its own node, epoch and
 * sequence, when the update that it is in is taken in, and an update is refused whole when it, or a
 * part of it, is marked there or has a row of its own: its factors are one sum, from which no part
 * can be taken. Marks are the inbox's; where a sequence is past the bitmap, everything below the
 * bitmap's new place counts as marked, so that a mark never grows.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define RELAY_ROW_VERSION 1
#define RELAY_KEY_BYTES   33
#define BITMAP_BITS       (64u * SH_ACK_BITMAP_WORDS)

/* ---- which keys are relays ---- */

static void relay_key(uint8_t out[RELAY_KEY_BYTES], const sh_hash *key)
{
    out[0] = 'r';
    memcpy(out + 1, key->b, sizeof key->b);
}

sh_status coord_is_relay(sh_txn *txn, const sh_hash *key, bool *is, sh_error *err)
{
    uint8_t name[RELAY_KEY_BYTES];
    sh_slice value;
    relay_key(name, key);
    sh_status status = sh_txn_get(txn, SH_COORD_T_META, name, sizeof name, &value);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "coordinator: the row of a relay cannot be read");
    *is = status == SH_OK;
    return SH_OK;
}

sh_status coord_drifting(sh_txn *txn, const sh_hash *key, const sh_msg_checkin *checkin,
                         uint32_t *n, sh_error *err)
{
    bool relay = false;
    SH_TRY(coord_is_relay(txn, key, &relay, err));
    *n = relay ? SH_MIN(checkin->nodes_drifting, checkin->nodes) : checkin->drifting;
    return SH_OK;
}

sh_status coord_relays_count(sh_coord *c, sh_txn *txn, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    c->relays = 0;
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_META, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, "r", 1, &key, &value);
    while (status == SH_OK && ((const uint8_t *)key.data)[0] == 'r') {
        c->relays += key.n == RELAY_KEY_BYTES;
        status = sh_cursor_next(cursor, &key, &value);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

sh_status coord_relay_permit(coord_step *s, const sh_hash *any, bool permit, bool *done)
{
    sh_coord *c = s->c;
    sh_hash first;
    const sh_hash *key = &first;
    const uint8_t value[] = {RELAY_ROW_VERSION};
    uint8_t name[RELAY_KEY_BYTES];
    uint32_t before = 0, after = 0;
    sh_node_row node;
    bool is = false;
    SH_TRY(coord_first_key(s->txn, any, &first, s->err));
    sh_status status = coord_node_get(s->txn, key, &node, s->err);
    *done = status == SH_OK && !node.revoked;
    if (!*done)
        return status == SH_ERR_NOT_FOUND ? SH_OK : status;
    SH_TRY(coord_is_relay(s->txn, key, &is, s->err));
    if (is == permit)
        return SH_OK;
    relay_key(name, key);
    SH_TRY(coord_drifting(s->txn, key, &node.checkin, &before, s->err));
    if (permit)
        SH_TRY(sh_txn_put(s->txn, SH_COORD_T_META, name, sizeof name, value, sizeof value, s->err));
    else
        SH_TRY(sh_txn_del(s->txn, SH_COORD_T_META, name, sizeof name, s->err));
    SH_TRY(coord_drifting(s->txn, key, &node.checkin, &after, s->err));
    c->drifting += after;
    c->drifting -= before;
    c->relays += permit ? 1u : (uint32_t)-1;
    return SH_OK;
}

/* ---- parts ---- */

uint32_t coord_parts_of(const sh_update_meta *meta)
{
    return meta->parts.n == 0 ? 1 : (uint32_t)(meta->parts.n / SH_UPDATE_PART_BYTES);
}

sh_update_part coord_part_at(const sh_update_id *id, const sh_update_meta *meta, uint32_t i)
{
    if (meta->parts.n > 0)
        return sh_update_part_get((const uint8_t *)meta->parts.data +
                                  (size_t)i * SH_UPDATE_PART_BYTES);
    return (sh_update_part){
        .node = id->node, .epoch = id->epoch, .seq = id->seq, .samples = meta->samples};
}

static sh_msg_item item_of(const sh_update_part *part)
{
    return (sh_msg_item){.epoch = part->epoch,
                         .cls = SH_CLASS_UPDATE,
                         .seq = part->seq,
                         .kind = SH_ITEM_UPDATE,
                         .last_seq = part->seq};
}

/* A sequence that no outbox gives is no part of anything: it counts as counted. */
static sh_status is_marked(coord_step *s, const sh_update_part *part, bool *marked)
{
    sh_msg_item item = item_of(part);
    sh_inbox_verdict verdict = SH_INBOX_DUPLICATE;
    if (part->seq <= SH_SEQ_MAX)
        SH_TRY(sh_inbox_check(s->txn, SH_COORD_T_PART, &part->node, &item, &verdict, s->err));
    *marked = verdict == SH_INBOX_DUPLICATE;
    return SH_OK;
}

static sh_status has_row(coord_step *s, const sh_update_part *part, bool *has)
{
    uint8_t key[COORD_ID_BYTES];
    sh_update_id id = {.node = part->node, .epoch = part->epoch, .seq = part->seq};
    sh_slice value;
    coord_id_put(key, &id);
    sh_status status = sh_txn_get(s->txn, SH_COORD_T_UPDATE, key, sizeof key, &value);
    *has = status == SH_OK;
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

sh_status coord_parts_reason(coord_step *s, const sh_update_id *id, const sh_update_meta *meta,
                             sh_reason *reason)
{
    bool relay = false;
    if (meta->parts.n > 0) {
        SH_TRY(coord_is_relay(s->txn, &id->node, &relay, s->err));
        if (!relay) {
            *reason = SH_REASON_RELAY;
            return SH_OK;
        }
    }
    for (uint32_t i = 0; i < coord_parts_of(meta); i++) {
        sh_update_part part = coord_part_at(id, meta, i);
        bool counted = false;
        SH_TRY(is_marked(s, &part, &counted));
        if (!counted && meta->parts.n > 0)
            SH_TRY(has_row(s, &part, &counted));
        if (counted) {
            *reason = SH_REASON_TWICE;
            return SH_OK;
        }
    }
    return SH_OK;
}

static sh_status mark(coord_step *s, const sh_update_part *part)
{
    sh_msg_item item = item_of(part);
    sh_inbox_verdict verdict = SH_INBOX_NEW;
    sh_msg_ack ack;
    SH_TRY(sh_inbox_check(s->txn, SH_COORD_T_PART, &part->node, &item, &verdict, s->err));
    if (verdict == SH_INBOX_AHEAD) {
        SH_TRY(sh_inbox_get_ack(s->txn, SH_COORD_T_PART, &part->node, part->epoch, SH_CLASS_UPDATE,
                                &ack, s->err));
        sh_msg_item below = item;
        below.kind = SH_ITEM_TOMBSTONE;
        below.seq = ack.high_water + 1;
        below.last_seq = part->seq - BITMAP_BITS;
        SH_TRY(sh_inbox_mark(s->txn, SH_COORD_T_PART, &part->node, &below, &ack, s->err));
    }
    return sh_inbox_mark(s->txn, SH_COORD_T_PART, &part->node, &item, &ack, s->err);
}

sh_status coord_parts_mark(coord_step *s, const sh_update_meta *meta)
{
    const sh_update_id none = {0};
    for (uint32_t i = 0; meta->parts.n > 0 && i < coord_parts_of(meta); i++) {
        sh_update_part part = coord_part_at(&none, meta, i);
        SH_TRY(mark(s, &part));
    }
    return SH_OK;
}

/* ---- what each part counts ---- */

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

sh_status coord_parts_cap(coord_step *s, const sh_update_id *ids, size_t n, uint64_t *cap)
{
    sh_buf samples;
    sh_status status = SH_OK;
    sh_buf_init(&samples, SIZE_MAX);
    for (size_t i = 0; i < n; i++) {
        sh_update_row row;
        SH_GOTO(coord_update_get(s->txn, &ids[i], &row, s->err));
        for (uint32_t k = 0; k < coord_parts_of(&row.meta); k++) {
            sh_update_part part = coord_part_at(&ids[i], &row.meta, k);
            if (sh_buf_append(&samples, &part.samples, sizeof part.samples) == SH_OK)
                continue;
            status = sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a merge");
            goto cleanup;
        }
    }
    size_t count = samples.len / sizeof(uint64_t);
    SH_ASSERT(count > 0);
    uint64_t *sorted = (uint64_t *)(void *)samples.data;
    qsort(sorted, count, sizeof *sorted, compare_u64);
    *cap = COORD_WEIGHT_FACTOR_MAX * sorted[(count - 1) / 2];
cleanup:
    sh_buf_release(&samples);
    return status;
}

uint64_t coord_parts_samples(const sh_update_id *id, const sh_update_meta *meta, uint64_t cap)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < coord_parts_of(meta); i++)
        sum += SH_MIN(coord_part_at(id, meta, i).samples, cap);
    return sum;
}
