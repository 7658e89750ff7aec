/*
 * The store in memory: a B+tree a table (memory_tree.c) and an undo log for the write transaction.
 *
 * A write never changes a row: it takes the old one out, puts a new one in, and notes both. So
 * abort is the notes backwards, and what a transaction took out stays readable (by slices and
 * cursors) until it ends. A resting store is its struct, its pages and its rows; the write
 * transaction is a part of the struct, its notes are kept while they are few.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/store/memory_internal.h"

#define UNDO_MAX  (1u << 26)
#define UNDO_KEPT 32u /* notes whose memory a resting store keeps */

typedef struct {
    sh_cursor base;
    mem_row *at;      /* NULL: nowhere */
    uint32_t version; /* of the table, when path was its place */
    mem_path path;
} mem_cursor;

static mem_store *store_of(const sh_txn *txn)
{
    return (mem_store *)txn->store;
}

static sh_slice key_of(const mem_row *row)
{
    return (sh_slice){row->bytes, row->key_n};
}

static size_t bytes_of(size_t key_n, size_t value_n)
{
    return offsetof(mem_row, bytes) + sizeof(mem_entry) + key_n + value_n;
}

static size_t row_bytes(const mem_row *row)
{
    return bytes_of(row->key_n, row->value_n);
}

static sh_status reserve_undo(mem_txn *txn, sh_error *err)
{
    if (txn->n < txn->cap)
        return SH_OK;
    void *undo = txn->undo;
    sh_status status = sh_array_reserve(&undo, &txn->cap, txn->n + 1, sizeof(mem_undo), UNDO_MAX);
    txn->undo = undo;
    if (status != SH_OK)
        return sh_fail(err, status, "store: %zu writes in one transaction: no memory", txn->n);
    return SH_OK;
}

/* Bytes that a transaction of this kind may bring the store to. */
static uint64_t room(const mem_store *store, int kind)
{
    uint64_t kept = store->base.reserve_bytes, all = store->base.bytes_max;
    uint64_t most = SH_MIN(all - kept, store->sim ? store->sim->room : UINT64_MAX);
    return kind == SH_TXN_RESERVE ? most + kept : most;
}

static mem_row *make_row(sh_slice key, sh_slice value)
{
    mem_row *row = sh_calloc(1, SH_MAX(sizeof(*row), offsetof(mem_row, bytes) + key.n + value.n));
    if (!row)
        return NULL;
    row->key_n = (uint8_t)key.n;
    row->value_n = (uint32_t)value.n;
    memcpy(row->bytes, key.data, key.n);
    if (value.n)
        memcpy(row->bytes + key.n, value.data, value.n);
    return row;
}

static sh_status mem_put(sh_txn *base, unsigned t, sh_slice key, sh_slice value, sh_error *err)
{
    mem_txn *txn = (mem_txn *)base;
    mem_store *store = store_of(base);
    mem_table *table = &store->tables[t];
    mem_path path;
    SH_TRY(mem_sim_write(store, err));
    SH_TRY(reserve_undo(txn, err));
    mem_tree_find(table, key, false, &path);
    mem_row *old = mem_tree_found(&path, key);
    size_t bytes = bytes_of(key.n, value.n);
    uint64_t used = store->used - (old ? row_bytes(old) : 0) + bytes;
    uint64_t most = room(store, base->kind);
    if (used > most)
        return sh_fail(err, SH_ERR_FULL,
                       "store in memory: full: %llu bytes in use, this transaction may use %llu",
                       (unsigned long long)store->used, (unsigned long long)most);
    mem_row *row = make_row(key, value);
    if (row && old)
        mem_tree_replace(table, &path, row);
    if (!row || (!old && !mem_tree_insert(table, &path, row, false))) {
        free(row);
        return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for %zu bytes", bytes);
    }
    store->used = used;
    txn->undo[txn->n++] = (mem_undo){t, old, row};
    return SH_OK;
}

static sh_status mem_del(sh_txn *base, unsigned t, sh_slice key, sh_error *err)
{
    mem_txn *txn = (mem_txn *)base;
    mem_store *store = store_of(base);
    mem_table *table = &store->tables[t];
    mem_path path;
    SH_TRY(mem_sim_write(store, err));
    mem_tree_find(table, key, false, &path);
    mem_row *row = mem_tree_found(&path, key);
    if (!row)
        return SH_OK;
    SH_TRY(reserve_undo(txn, err));
    mem_tree_remove(table, &path);
    store->used -= row_bytes(row);
    txn->undo[txn->n++] = (mem_undo){t, row, NULL};
    return SH_OK;
}

static void give(const mem_row *row, sh_slice *key, sh_slice *value)
{
    if (key)
        *key = key_of(row);
    if (value)
        *value = (sh_slice){row->bytes + row->key_n, row->value_n};
}

static sh_status mem_get(sh_txn *base, unsigned t, sh_slice key, sh_slice *value)
{
    const mem_row *row = mem_tree_get(&store_of(base)->tables[t], key);
    if (!row)
        return SH_ERR_NOT_FOUND;
    give(row, NULL, value);
    return SH_OK;
}

static uint64_t mem_count(sh_txn *base, unsigned t)
{
    return store_of(base)->tables[t].count;
}

/* ---- transactions ---- */

/* A reader has a struct of its own, the writer the store's. */
static sh_status take_users(mem_store *store, int kind, sh_error *err)
{
    int users = atomic_load(&store->users);
    do {
        if (users < 0 || (users > 0 && kind != SH_TXN_READ))
            return sh_fail(err, SH_ERR_LIMIT,
                           "store in memory: %s transaction is open (one writer or any number of "
                           "readers)",
                           users < 0 ? "a write" : "a read");
    } while (
        !atomic_compare_exchange_weak(&store->users, &users, kind == SH_TXN_READ ? users + 1 : -1));
    return SH_OK;
}

static sh_status mem_begin(sh_store *base, int kind, sh_txn **out, sh_error *err)
{
    mem_store *store = (mem_store *)base;
    mem_txn *txn = &store->writer;
    SH_TRY(mem_sim_begin(store, err));
    if (kind == SH_TXN_READ && !(txn = sh_calloc(1, sizeof(*txn))))
        return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for a transaction");
    sh_status status = take_users(store, kind, err);
    if (status != SH_OK) {
        if (kind == SH_TXN_READ)
            free(txn);
        return status;
    }
    txn->base = (sh_txn){.store = base, .kind = kind};
    *out = &txn->base;
    return SH_OK;
}

static void end(mem_txn *txn)
{
    mem_store *store = store_of(&txn->base);
    if (txn->base.kind == SH_TXN_READ) {
        atomic_fetch_sub(&store->users, 1);
        free(txn);
        return;
    }
    txn->n = 0;
    if (txn->cap > UNDO_KEPT) {
        free(txn->undo);
        txn->undo = NULL;
        txn->cap = 0;
    }
    atomic_store(&store->users, 0);
}

void mem_forget(mem_undo *undo, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(undo[i].removed);
}

/* Backwards. The tree may have lost a page since that this needs again: without memory for it
 * neither an abort nor a simulated crash can go on. */
void mem_undo_all(mem_store *store, mem_undo *undo, size_t n)
{
    while (n > 0) {
        const mem_undo *u = &undo[--n];
        mem_table *table = &store->tables[u->table];
        mem_path path;
        mem_tree_find(table, key_of(u->added ? u->added : u->removed), false, &path);
        if (u->added && u->removed)
            mem_tree_replace(table, &path, u->removed);
        else if (u->added)
            mem_tree_remove(table, &path);
        else
            SH_ASSERT(mem_tree_insert(table, &path, u->removed, true));
        store->used += u->removed ? row_bytes(u->removed) : 0;
        store->used -= u->added ? row_bytes(u->added) : 0;
        free(u->added);
    }
}

static sh_status mem_commit(sh_txn *base, sh_error *err)
{
    mem_txn *txn = (mem_txn *)base;
    mem_store *store = store_of(base);
    bool durable = true;
    sh_status status = base->kind == SH_TXN_READ ? SH_OK : mem_sim_commit(store, &durable, err);
    if (!durable)
        mem_undo_all(store, txn->undo, txn->n);
    else if (!mem_sim_keep(store, txn))
        mem_forget(txn->undo, txn->n);
    end(txn);
    return status;
}

static void mem_abort(sh_txn *base)
{
    mem_txn *txn = (mem_txn *)base;
    mem_undo_all(store_of(base), txn->undo, txn->n);
    end(txn);
}

/* ---- cursors ---- */

static sh_status mem_cursor_open(sh_txn *txn, unsigned table, sh_cursor **out, sh_error *err)
{
    mem_cursor *cursor = sh_calloc(1, sizeof(*cursor));
    if (!cursor)
        return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for a cursor");
    cursor->base = (sh_cursor){.txn = txn, .table = table};
    *out = &cursor->base;
    return SH_OK;
}

static const mem_table *cursor_table(const mem_cursor *cursor)
{
    return &store_of(cursor->base.txn)->tables[cursor->base.table];
}

static sh_status move(mem_cursor *cursor, mem_row *to, sh_slice *key, sh_slice *value)
{
    cursor->at = to;
    cursor->version = cursor_table(cursor)->version;
    if (!to)
        return SH_ERR_NOT_FOUND;
    give(to, key, value);
    return SH_OK;
}

static sh_status mem_seek(sh_cursor *base, sh_slice from, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    const mem_table *table = cursor_table(cursor);
    mem_row *to = from.n == 0 ? mem_tree_first(table, &cursor->path)
                              : mem_tree_seek(table, from, false, &cursor->path);
    return move(cursor, to, key, value);
}

static sh_status mem_next(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    const mem_table *table = cursor_table(cursor);
    if (!cursor->at)
        return SH_ERR_NOT_FOUND;
    mem_row *to = cursor->version == table->version
                      ? mem_tree_next(&cursor->path)
                      : mem_tree_seek(table, key_of(cursor->at), true, &cursor->path);
    return move(cursor, to, key, value);
}

static sh_status mem_last(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    return move(cursor, mem_tree_last(cursor_table(cursor), &cursor->path), key, value);
}

static void mem_cursor_close(sh_cursor *base)
{
    free(base);
}

/* ---- the store ---- */

void mem_empty(mem_store *store)
{
    for (size_t t = 0; t < store->base.n_tables; t++)
        mem_tree_clear(&store->tables[t]);
    store->used = 0;
}

static void mem_close(sh_store *base)
{
    mem_store *store = (mem_store *)base;
    SH_ASSERT(atomic_load(&store->users) == 0);
    mem_sim_release(store);
    mem_empty(store);
    free(store->writer.undo);
    free(store);
}

static sh_status mem_sync(sh_store *store, sh_error *err)
{
    return mem_sim_sync((mem_store *)store, err);
}

static uint64_t mem_bytes_used(const sh_store *store)
{
    return ((const mem_store *)store)->used;
}

static sh_status memory_compact(sh_store *store, sh_error *err)
{
    (void)store;
    (void)err;
    return SH_OK;
}

static sh_status memory_backup(sh_store *store, const char *dir, sh_error *err)
{
    (void)store;
    return sh_fail(err, SH_ERR_UNSUPPORTED, "store in memory: it cannot be copied to '%s'", dir);
}

static const sh_store_backend memory_backend = {
    .compact = memory_compact,
    .backup = memory_backup,
    .close = mem_close,
    .sync = mem_sync,
    .bytes_used = mem_bytes_used,
    .begin = mem_begin,
    .commit = mem_commit,
    .abort = mem_abort,
    .put = mem_put,
    .del = mem_del,
    .get = mem_get,
    .count = mem_count,
    .cursor_open = mem_cursor_open,
    .seek = mem_seek,
    .next = mem_next,
    .last = mem_last,
    .cursor_close = mem_cursor_close,
};

sh_status sh_store_open_memory(const sh_store_options *options, sh_store **out, sh_error *err)
{
    sh_store common = {0};
    SH_TRY(sh_store_init(&common, &memory_backend, options, err));
    mem_store *store = sh_calloc(1, sizeof(*store) + common.n_tables * sizeof(store->tables[0]));
    if (!store)
        return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory");
    store->base = common;
    atomic_init(&store->users, 0);
    *out = &store->base;
    return SH_OK;
}

sh_status mem_copy_rows(mem_store *to, const mem_store *from, sh_error *err)
{
    for (size_t t = 0; t < from->base.n_tables; t++) {
        mem_table *table = &to->tables[t];
        mem_path here, there;
        sh_slice value;
        const mem_row *row = mem_tree_first(&from->tables[t], &here);
        for (; row; row = mem_tree_next(&here)) {
            give(row, NULL, &value);
            mem_row *copy = make_row(key_of(row), value);
            mem_tree_find(table, key_of(row), false, &there);
            if (!copy || !mem_tree_insert(table, &there, copy, false)) {
                free(copy);
                return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for a copy");
            }
            to->used += row_bytes(copy);
        }
    }
    return SH_OK;
}

bool mem_is_memory(const sh_store *store)
{
    return store->backend == &memory_backend;
}
