/*
 * What both ends of the protocol do over a store, without I/O: the outbox that a node owes from,
 * the inbox that an aggregator de-duplicates with, and blobs that travel as content-addressed
 * chunks. At-least-once on the wire, exactly once in effect: identity is (node, epoch, class,
 * sequence); there is no time window.
 *
 * All functions work inside the caller's transaction; nothing is kept in memory between calls, so a
 * crash needs no recovery here.
 */
#ifndef SH_SYNC_SYNC_H
#define SH_SYNC_SYNC_H

#include "shared/store/store.h"
#include "shared/wire/wire.h"

/* ---- outbox (sender) ---- */
/* Table layout: key = class (1 byte) + seq (8, big-endian); value = kind (1) + last_seq (8) +
 * payload. Counters live under SH_OUTBOX_META_KEY in the meta table: next sequence, bytes, items
 * and drops of each class. */
#define SH_OUTBOX_META_KEY "outbox"
#define SH_SEQ_MAX         (UINT64_C(1) << 62) /* a sequence beyond it is refused */

/* Called for an item that leaves the outbox, before it does; its payload is a copy. fn may write
 * to other tables of the transaction, not to the outbox's. */
typedef sh_status (*sh_outbox_fn)(void *arg, const sh_msg_item *item);

typedef struct {
    unsigned table, meta_table; /* in the store */
    uint64_t quota_bytes[SH_CLASSES];
    /* Bytes that an item holds in the store beside its row (an update's chunks): they count
     * against the quota. The same item always weighs the same. NULL: none. */
    uint64_t (*weigh)(void *arg, const sh_msg_item *item);
    sh_outbox_fn on_drop; /* an item falls to its quota; may be NULL */
    void *arg;            /* of weigh and on_drop */
} sh_outbox;

typedef struct {
    uint64_t next_seq[SH_CLASSES], items[SH_CLASSES], bytes[SH_CLASSES], dropped[SH_CLASSES];
} sh_outbox_counts;

/* Appends one item, *seq its number. Over the class's quota the oldest items of the class are
 * replaced by one tombstone range (counted in dropped). */
SH_MUST_USE sh_status sh_outbox_put(const sh_outbox *outbox, sh_txn *txn, sh_class cls,
                                    sh_item_kind kind, sh_bytes payload, uint64_t *seq,
                                    sh_error *err);
/* The first item of cls with sequence >= from. SH_ERR_NOT_FOUND at the end. item->epoch is not
 * set. */
SH_MUST_USE sh_status sh_outbox_next(const sh_outbox *outbox, sh_txn *txn, sh_class cls,
                                     uint64_t from, sh_msg_item *item);
/* It says that the sequences in [first, last] are all committed. */
bool sh_ack_covers(const sh_msg_ack *ack, uint64_t first, uint64_t last);
typedef struct { /* an acknowledgement, and the part of the class that its epoch numbers */
    const sh_msg_ack *ack;
    uint64_t base; /* its sequence n is base + n in the outbox */
    uint64_t last; /* in the outbox; 0: what is made now still goes under it */
} sh_outbox_acked;
/* Removes what is acknowledged; calls fn (may be NULL) for each removed item first. Of a tombstone
 * that goes on beyond `last` the rest stays. SH_ERR_INVALID, nothing changed, when what was never
 * made is acknowledged; beyond `last` another sender may have made it. The epoch is the caller's to
 * check. */
SH_MUST_USE sh_status sh_outbox_ack(const sh_outbox *outbox, sh_txn *txn,
                                    const sh_outbox_acked *acked, sh_outbox_fn fn, void *arg,
                                    sh_error *err);
SH_MUST_USE sh_status sh_outbox_get_counts(const sh_outbox *outbox, sh_txn *txn,
                                           sh_outbox_counts *out, sh_error *err);

/* ---- inbox (receiver) ---- */
/* Table layout: key = node key (32) + epoch (8) + class (1); value = high-water (8) + bitmap. */
typedef enum {
    SH_INBOX_NEW,
    SH_INBOX_DUPLICATE,
    SH_INBOX_AHEAD /* beyond the bitmap: not taken */
} sh_inbox_verdict;
/* Whether the sequences seq .. last_seq of this sender are new, without changing anything. */
SH_MUST_USE sh_status sh_inbox_check(sh_txn *txn, unsigned table, const sh_hash *node,
                                     const sh_msg_item *item, sh_inbox_verdict *verdict,
                                     sh_error *err);
/* Marks them as committed with this transaction and fills the acknowledgement to send after it. */
SH_MUST_USE sh_status sh_inbox_mark(sh_txn *txn, unsigned table, const sh_hash *node,
                                    const sh_msg_item *item, sh_msg_ack *ack, sh_error *err);
/* The acknowledgement as it stands (for a duplicate). */
SH_MUST_USE sh_status sh_inbox_get_ack(sh_txn *txn, unsigned table, const sh_hash *node,
                                       uint64_t epoch, uint8_t cls, sh_msg_ack *ack, sh_error *err);
/* The highest sequence of a class that is committed, whether or not all below it are; 0: none. */
SH_MUST_USE sh_status sh_inbox_highest(sh_txn *txn, unsigned table, const sh_hash *node,
                                       uint64_t epoch, uint8_t cls, uint64_t *highest,
                                       sh_error *err);

/* ---- blobs ---- */
/* Puts the chunks of bytes into the chunk table (those that are not there). */
SH_MUST_USE sh_status sh_blob_put(sh_txn *txn, unsigned table, const void *bytes, size_t n,
                                  sh_error *err);
/* Verifies a chunk against its name, unless the decoder has, and puts it. SH_ERR_CORRUPT when it
 * does not match. */
SH_MUST_USE sh_status sh_chunk_put(sh_txn *txn, unsigned table, const sh_msg_chunk *chunk,
                                   sh_error *err);
/* The chunks of blob that are missing, at most max; *n 0 when it is whole. Writes 32 bytes each. */
SH_MUST_USE sh_status sh_blob_missing(sh_txn *txn, unsigned table, const sh_blob *blob,
                                      uint8_t *hashes, uint32_t max, uint32_t *n, sh_error *err);
/* Appends the blob's bytes to out and checks the whole SHA-256 (SH_ERR_CORRUPT). */
SH_MUST_USE sh_status sh_blob_get(sh_txn *txn, unsigned table, const sh_blob *blob, sh_buf *out,
                                  sh_error *err);
/* Deletes those chunks of blob that are not also among keep's. */
SH_MUST_USE sh_status sh_blob_delete(sh_txn *txn, unsigned table, const sh_blob *blob,
                                     const sh_blob *keep, size_t n_keep, sh_error *err);

#endif
