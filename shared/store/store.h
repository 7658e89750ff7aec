/*
 * The store: ordered tables of byte keys and values under transactions. Two implementations,
 * LMDB on disk and one in memory for the simulator, held equal by a model-based test.
 *
 * Transactions: one write transaction at a time in a store (a second is SH_ERR_LIMIT), any number
 * of readers with snapshots; the memory store has no snapshots and takes either one writer or any
 * number of readers. A commit is durable when sh_txn_commit returns SH_OK (LMDB: with sync on).
 * Keep reads short: in LMDB a reader pins pages.
 *
 * Full: SH_ERR_FULL from put, del or commit means that nothing of the transaction was or will be
 * written (abort it; run it again only after deleting). `reserve_bytes` of `bytes_max` are kept for
 * transactions begun with SH_TXN_RESERVE, so that deleting works when a store is full; in LMDB
 * this holds while no read transaction is open in the process. LMDB's map is bytes_max of address
 * space from the start (the file takes disk space only as pages are written), so nothing has to
 * grow under a transaction; opening again with a larger bytes_max grows it, and readers in other
 * processes follow. A bytes_max below what the file takes already counts as that and the reserve.
 *
 * Threads: a transaction stays on the thread that began it. One writer process an environment, and
 * an environment is opened once in a process: both are checked (SH_ERR_EXISTS).
 * Keys sort as unsigned bytes; integers in keys are big-endian (sh_key_put_u64). Keys have 1 to
 * SH_STORE_KEY_MAX bytes, values 0 to SH_STORE_VALUE_MAX, else put says SH_ERR_LIMIT.
 *
 *     sh_txn *txn = NULL;
 *     SH_TRY(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
 *     SH_GOTO(sh_txn_put(txn, T_ITEM, key, sizeof(key), value, n, err));
 *     status = sh_txn_commit(&txn, err);
 *   cleanup:
 *     sh_txn_abort(&txn); // nothing when committed
 */
#ifndef SH_STORE_STORE_H
#define SH_STORE_STORE_H

#include "shared/base/status.h"

#define SH_STORE_TABLES_MAX 16
#define SH_STORE_KEY_MAX    128
#define SH_STORE_VALUE_MAX  (16u << 20)

typedef struct sh_store sh_store;
typedef struct sh_txn sh_txn;
typedef struct sh_cursor sh_cursor;

typedef struct {
    const void *data;
    size_t n;
} sh_slice; /* in the store's memory, perhaps unaligned; valid until the next write of its
               transaction, or its end */

typedef struct {
    const char *const *tables; /* names, index is the table number used below */
    size_t n_tables;
    uint64_t bytes_max, reserve_bytes; /* 0: 4 GiB, 1 MiB (at most a quarter of bytes_max) */
    bool read_only;                    /* LMDB: beside a writer in another process */
    bool no_sync;                      /* simulation: durability is the simulator's to say */
} sh_store_options;

/* Makes dir and its tables unless read_only. SH_ERR_CORRUPT: what is there is no store, or its file
 * was emptied or removed since one was made here. SH_ERR_NOT_FOUND: read_only and no store, or no
 * such table, is there; SH_ERR_EXISTS: this process has it open, or another process writes it. */
SH_MUST_USE sh_status sh_store_open_lmdb(const char *dir, const sh_store_options *options,
                                         sh_store **out, sh_error *err);
/* In memory. What a killed process would leave is what is there after sh_txn_abort. */
SH_MUST_USE sh_status sh_store_open_memory(const sh_store_options *options, sh_store **out,
                                           sh_error *err);
void sh_store_close(sh_store **store); /* takes NULL; every transaction has ended */
SH_MUST_USE sh_status sh_store_sync(sh_store *store, sh_error *err);
/* Writes the whole store anew and puts that in place of the file, so that what was deleted is gone
 * from it: LMDB leaves deleted values in free pages and in the slack of others. At any moment of it
 * a crash leaves the old file or the new one. Takes twice the disk space for a while, and holds up
 * every begin. SH_ERR_LIMIT: a transaction is open, or another process reads the store: end that
 * and try again. After another error than these two the store may be unusable until it is opened
 * again. The memory store has nothing to do. */
SH_MUST_USE sh_status sh_store_compact(sh_store *store, sh_error *err);
/* Makes dir and in it a copy of what is committed now, which opens as a store, while transactions
 * go on. SH_ERR_EXISTS: a store is there. Not for the memory store (SH_ERR_UNSUPPORTED). */
SH_MUST_USE sh_status sh_store_backup(sh_store *store, const char *dir, sh_error *err);
/* Bytes that could not be used for something else: LMDB's pages less the free ones. */
uint64_t sh_store_bytes_used(const sh_store *store);

enum { SH_TXN_READ, SH_TXN_WRITE, SH_TXN_RESERVE /* write; may use the reserve */ };
SH_MUST_USE sh_status sh_txn_begin(sh_store *store, int kind, sh_txn **out, sh_error *err);
SH_MUST_USE sh_status sh_txn_commit(sh_txn **txn, sh_error *err); /* *txn is NULL afterwards */
void sh_txn_abort(sh_txn **txn);                                  /* takes NULL */

/* SH_ERR_NOT_FOUND without filling err's text. */
SH_MUST_USE sh_status sh_txn_get(sh_txn *txn, unsigned table, const void *key, size_t key_n,
                                 sh_slice *value);
SH_MUST_USE sh_status sh_txn_put(sh_txn *txn, unsigned table, const void *key, size_t key_n,
                                 const void *value, size_t value_n, sh_error *err);
SH_MUST_USE sh_status sh_txn_del(sh_txn *txn, unsigned table, const void *key, size_t key_n,
                                 sh_error *err); /* absent is SH_OK */
uint64_t sh_txn_count(sh_txn *txn, unsigned table);

/* Iteration. seek: the smallest key >= from (from_n 0: the table's first). SH_ERR_NOT_FOUND at the
 * end, and from then on until a seek or last succeeds. Writes of the same transaction, also of the
 * current key, do not disturb a cursor: next is the smallest key above the last one returned.
 * key and value may be NULL. Close a cursor before its transaction ends. */
SH_MUST_USE sh_status sh_cursor_open(sh_txn *txn, unsigned table, sh_cursor **out, sh_error *err);
SH_MUST_USE sh_status sh_cursor_seek(sh_cursor *cursor, const void *from, size_t from_n,
                                     sh_slice *key, sh_slice *value);
SH_MUST_USE sh_status sh_cursor_next(sh_cursor *cursor, sh_slice *key, sh_slice *value);
SH_MUST_USE sh_status sh_cursor_last(sh_cursor *cursor, sh_slice *key, sh_slice *value);
void sh_cursor_close(sh_cursor **cursor);

void sh_key_put_u64(uint8_t out[8], uint64_t x); /* big-endian */
uint64_t sh_key_get_u64(const uint8_t in[8]);

#endif
