#include "shared/store/store.h"

#include "shared/store/backend.h"

sh_status sh_store_init(sh_store *store, const sh_store_backend *backend,
                        const sh_store_options *options, sh_error *err)
{
    if (options->n_tables == 0 || options->n_tables > SH_STORE_TABLES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "store: %zu tables, must be 1 to %d", options->n_tables,
                       SH_STORE_TABLES_MAX);
    store->backend = backend;
    store->n_tables = options->n_tables;
    store->bytes_max = options->bytes_max ? options->bytes_max : SH_STORE_BYTES_MAX_DEFAULT;
    uint64_t reserve = options->reserve_bytes ? options->reserve_bytes : SH_STORE_RESERVE_DEFAULT;
    store->reserve_bytes = SH_MIN(reserve, store->bytes_max / 4);
    store->read_only = options->read_only;
    return SH_OK;
}

void sh_store_close(sh_store **store)
{
    if (*store)
        (*store)->backend->close(*store);
    *store = NULL;
}

sh_status sh_store_sync(sh_store *store, sh_error *err)
{
    return store->backend->sync(store, err);
}

sh_status sh_store_compact(sh_store *store, sh_error *err)
{
    SH_ASSERT(!store->read_only);
    return store->backend->compact(store, err);
}

sh_status sh_store_backup(sh_store *store, const char *dir, sh_error *err)
{
    return store->backend->backup(store, dir, err);
}

uint64_t sh_store_bytes_used(const sh_store *store)
{
    return store->backend->bytes_used(store);
}

sh_status sh_txn_begin(sh_store *store, int kind, sh_txn **out, sh_error *err)
{
    SH_ASSERT(kind == SH_TXN_READ || kind == SH_TXN_WRITE || kind == SH_TXN_RESERVE);
    SH_ASSERT(kind == SH_TXN_READ || !store->read_only);
    return store->backend->begin(store, kind, out, err);
}

sh_status sh_txn_commit(sh_txn **txn, sh_error *err)
{
    sh_txn *t = *txn;
    *txn = NULL;
    SH_ASSERT(t->cursors == 0);
    if (t->failed != SH_OK) {
        sh_status failed = t->failed;
        t->store->backend->abort(t);
        return sh_fail(err, failed, "store: not committed, because a write of it failed before");
    }
    return t->store->backend->commit(t, err);
}

void sh_txn_abort(sh_txn **txn)
{
    if (*txn) {
        SH_ASSERT((*txn)->cursors == 0);
        (*txn)->store->backend->abort(*txn);
    }
    *txn = NULL;
}

sh_status sh_txn_get(sh_txn *txn, unsigned table, const void *key, size_t key_n, sh_slice *value)
{
    SH_ASSERT(table < txn->store->n_tables);
    if (key_n == 0 || key_n > SH_STORE_KEY_MAX)
        return SH_ERR_NOT_FOUND; /* put refuses such keys */
    return txn->store->backend->get(txn, table, (sh_slice){key, key_n}, value);
}

/* What put and del have in common before they write. */
static sh_status writable(const sh_txn *txn, unsigned table, sh_error *err)
{
    SH_ASSERT(table < txn->store->n_tables);
    SH_ASSERT(txn->kind != SH_TXN_READ);
    if (txn->failed != SH_OK)
        return sh_fail(err, txn->failed, "store: an earlier write of this transaction failed");
    return SH_OK;
}

sh_status sh_txn_put(sh_txn *txn, unsigned table, const void *key, size_t key_n, const void *value,
                     size_t value_n, sh_error *err)
{
    SH_TRY(writable(txn, table, err));
    if (key_n == 0 || key_n > SH_STORE_KEY_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "store: key of %zu bytes, must be 1 to %d", key_n,
                       SH_STORE_KEY_MAX);
    if (value_n > SH_STORE_VALUE_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "store: value of %zu bytes, at most %u", value_n,
                       SH_STORE_VALUE_MAX);
    sh_status status = txn->store->backend->put(txn, table, (sh_slice){key, key_n},
                                                (sh_slice){value, value_n}, err);
    txn->failed = status;
    return status;
}

sh_status sh_txn_del(sh_txn *txn, unsigned table, const void *key, size_t key_n, sh_error *err)
{
    SH_TRY(writable(txn, table, err));
    if (key_n == 0 || key_n > SH_STORE_KEY_MAX)
        return SH_OK; /* absent */
    sh_status status = txn->store->backend->del(txn, table, (sh_slice){key, key_n}, err);
    txn->failed = status;
    return status;
}

uint64_t sh_txn_count(sh_txn *txn, unsigned table)
{
    SH_ASSERT(table < txn->store->n_tables);
    return txn->store->backend->count(txn, table);
}

sh_status sh_cursor_open(sh_txn *txn, unsigned table, sh_cursor **out, sh_error *err)
{
    SH_ASSERT(table < txn->store->n_tables);
    SH_TRY(txn->store->backend->cursor_open(txn, table, out, err));
    txn->cursors++;
    return SH_OK;
}

sh_status sh_cursor_seek(sh_cursor *cursor, const void *from, size_t from_n, sh_slice *key,
                         sh_slice *value)
{
    return cursor->txn->store->backend->seek(cursor, (sh_slice){from, from_n}, key, value);
}

sh_status sh_cursor_next(sh_cursor *cursor, sh_slice *key, sh_slice *value)
{
    return cursor->txn->store->backend->next(cursor, key, value);
}

sh_status sh_cursor_last(sh_cursor *cursor, sh_slice *key, sh_slice *value)
{
    return cursor->txn->store->backend->last(cursor, key, value);
}

void sh_cursor_close(sh_cursor **cursor)
{
    if (*cursor) {
        (*cursor)->txn->cursors--;
        (*cursor)->txn->store->backend->cursor_close(*cursor);
    }
    *cursor = NULL;
}

void sh_key_put_u64(uint8_t out[8], uint64_t x)
{
    for (int i = 7; i >= 0; i--, x >>= 8)
        out[i] = (uint8_t)x;
}

uint64_t sh_key_get_u64(const uint8_t in[8])
{
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x = x << 8 | in[i];
    return x;
}
