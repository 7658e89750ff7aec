/*
 * The store in memory: a skip list a table (Pugh, "Skip Lists: A Probabilistic Alternative to
 * Balanced Trees", 1990) and an undo log for the write transaction.
 *
 * A write never changes a node: it takes the old one out, puts a new one in, and notes both. So
 * abort is the notes backwards, and what a transaction took out stays readable (by slices and
 * cursors) until it ends. A resting store is its struct and its nodes, each one allocation; the
 * write transaction is a part of the struct, its notes are kept while they are few.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/store/memory_internal.h"

#define UNDO_MAX  (1u << 26)
#define UNDO_KEPT 32u /* notes whose memory a resting store keeps */

typedef struct {
    sh_cursor base;
    mem_node *at; /* NULL: nowhere */
} mem_cursor;

static mem_store *store_of(const sh_txn *txn)
{
    return (mem_store *)txn->store;
}

static const uint8_t *node_key(const mem_node *node)
{
    return (const uint8_t *)(node->next + node->height);
}

static size_t node_bytes(const mem_node *node)
{
    return sizeof(*node) + node->height * sizeof(node->next[0]) + node->key_n + node->value_n;
}

static uint64_t prefix_of(sh_slice key)
{
    uint64_t prefix = 0;
    memcpy(&prefix, key.data, SH_MIN(key.n, sizeof prefix));
    return be64toh(prefix);
}

/* Most keys differ in their first bytes, which the node has at hand. */
static int compare(const mem_node *node, uint64_t prefix, sh_slice key)
{
    if (node->prefix != prefix)
        return node->prefix < prefix ? -1 : 1;
    size_t n = SH_MIN((size_t)node->key_n, key.n);
    int order = memcmp(node_key(node), key.data, n);
    return order ? order : (node->key_n > key.n) - (node->key_n < key.n);
}

/* links[l] is the link of level l that points at the first node with a key >= key (or, with
 * `after`, > key). */
static void find(mem_table *table, sh_slice key, bool after, mem_node **links[HEIGHT_MAX])
{
    mem_node **row = table->head;
    uint64_t prefix = prefix_of(key);
    for (int l = table->levels; l < HEIGHT_MAX; l++)
        links[l] = &row[l];
    for (int l = table->levels - 1; l >= 0; l--) {
        while (row[l] && compare(row[l], prefix, key) < (after ? 1 : 0))
            row = row[l]->next;
        links[l] = &row[l];
    }
}

/* The first node with a key >= key, NULL when there is none. */
static mem_node *seek(mem_table *table, sh_slice key)
{
    mem_node **row = table->head, *past = NULL;
    uint64_t prefix = prefix_of(key);
    for (int l = table->levels - 1; l >= 0; l--) {
        while (row[l] && row[l] != past && compare(row[l], prefix, key) < 0)
            row = row[l]->next;
        past = row[l]; /* it was looked at: not again on the levels below */
    }
    return past;
}

/* Out of, and into, the place that find gave for the node's key. */
static void unlink_node(mem_store *store, mem_table *table, mem_node *node,
                        mem_node **links[HEIGHT_MAX])
{
    for (int l = 0; l < node->height; l++) {
        SH_ASSERT(*links[l] == node);
        *links[l] = node->next[l];
    }
    node->dead = true;
    table->count--;
    store->used -= node_bytes(node);
}

static void link_node(mem_store *store, mem_table *table, mem_node *node,
                      mem_node **links[HEIGHT_MAX])
{
    for (int l = 0; l < node->height; l++) {
        node->next[l] = *links[l];
        *links[l] = node;
    }
    node->dead = false;
    table->levels = SH_MAX(table->levels, node->height);
    table->count++;
    store->used += node_bytes(node);
}

static void find_node(mem_table *table, const mem_node *node, mem_node **links[HEIGHT_MAX])
{
    find(table, (sh_slice){node_key(node), node->key_n}, false, links);
}

static uint8_t draw_height(mem_store *store)
{
    store->level_bits ^= store->level_bits << 13; /* xorshift64 */
    store->level_bits ^= store->level_bits >> 7;
    store->level_bits ^= store->level_bits << 17;
    uint8_t height = 1;
    for (uint64_t bits = store->level_bits; (bits & 3) == 0 && height < HEIGHT_MAX; bits >>= 2)
        height++;
    return height;
}

/* The node of key, NULL when there is none; links: its place. */
static mem_node *lookup(mem_txn *txn, unsigned table, sh_slice key, mem_node **links[HEIGHT_MAX])
{
    find(&store_of(&txn->base)->tables[table], key, false, links);
    mem_node *node = *links[0];
    return node && compare(node, prefix_of(key), key) == 0 ? node : NULL;
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

static sh_status mem_put(sh_txn *base, unsigned t, sh_slice key, sh_slice value, sh_error *err)
{
    mem_txn *txn = (mem_txn *)base;
    mem_store *store = store_of(base);
    mem_table *table = &store->tables[t];
    mem_node **links[HEIGHT_MAX];
    SH_TRY(mem_sim_write(store, err));
    SH_TRY(reserve_undo(txn, err));
    mem_node *old = lookup(txn, t, key, links);
    uint8_t height = old ? old->height : draw_height(store);
    size_t bytes = sizeof(mem_node) + height * sizeof(mem_node *) + key.n + value.n;
    uint64_t most = room(store, base->kind);
    if (store->used - (old ? node_bytes(old) : 0) + bytes > most)
        return sh_fail(err, SH_ERR_FULL,
                       "store in memory: full: %llu bytes in use, this transaction may use %llu",
                       (unsigned long long)store->used, (unsigned long long)most);
    mem_node *node = sh_calloc(1, bytes);
    if (!node)
        return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for %zu bytes", bytes);
    node->prefix = prefix_of(key);
    node->height = height;
    node->key_n = (uint8_t)key.n;
    node->value_n = (uint32_t)value.n;
    uint8_t *to = (uint8_t *)(node->next + height);
    memcpy(to, key.data, key.n);
    if (value.n)
        memcpy(to + key.n, value.data, value.n);
    if (old) /* of the same height: the links are the new one's, too */
        unlink_node(store, table, old, links);
    link_node(store, table, node, links);
    txn->undo[txn->n++] = (mem_undo){t, old, node};
    return SH_OK;
}

static sh_status mem_del(sh_txn *base, unsigned t, sh_slice key, sh_error *err)
{
    mem_txn *txn = (mem_txn *)base;
    mem_store *store = store_of(base);
    mem_node **links[HEIGHT_MAX];
    SH_TRY(mem_sim_write(store, err));
    mem_node *node = lookup(txn, t, key, links);
    if (!node)
        return SH_OK;
    SH_TRY(reserve_undo(txn, err));
    unlink_node(store, &store->tables[t], node, links);
    txn->undo[txn->n++] = (mem_undo){t, node, NULL};
    return SH_OK;
}

static void give(const mem_node *node, sh_slice *key, sh_slice *value)
{
    if (key)
        *key = (sh_slice){node_key(node), node->key_n};
    if (value)
        *value = (sh_slice){node_key(node) + node->key_n, node->value_n};
}

static sh_status mem_get(sh_txn *base, unsigned t, sh_slice key, sh_slice *value)
{
    const mem_node *node = seek(&store_of(base)->tables[t], key);
    if (!node || compare(node, prefix_of(key), key) != 0)
        return SH_ERR_NOT_FOUND;
    give(node, NULL, value);
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

void mem_undo_all(mem_store *store, mem_undo *undo, size_t n)
{
    mem_node **links[HEIGHT_MAX];
    while (n > 0) {
        const mem_undo *u = &undo[--n];
        mem_table *table = &store->tables[u->table];
        if (u->added) {
            find_node(table, u->added, links);
            unlink_node(store, table, u->added, links);
            free(u->added);
        }
        if (u->removed) {
            find_node(table, u->removed, links);
            link_node(store, table, u->removed, links);
        }
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

static sh_status move(mem_cursor *cursor, mem_node *to, sh_slice *key, sh_slice *value)
{
    cursor->at = to;
    if (!to)
        return SH_ERR_NOT_FOUND;
    give(to, key, value);
    return SH_OK;
}

static mem_table *cursor_table(const mem_cursor *cursor)
{
    return &store_of(cursor->base.txn)->tables[cursor->base.table];
}

static sh_status mem_seek(sh_cursor *base, sh_slice from, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    mem_table *table = cursor_table(cursor);
    if (from.n == 0)
        return move(cursor, table->head[0], key, value);
    return move(cursor, seek(table, from), key, value);
}

static sh_status mem_next(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    mem_node *at = cursor->at;
    if (!at)
        return SH_ERR_NOT_FOUND;
    if (!at->dead)
        return move(cursor, at->next[0], key, value);
    mem_node **links[HEIGHT_MAX];
    find(cursor_table(cursor), (sh_slice){node_key(at), at->key_n}, true, links);
    return move(cursor, *links[0], key, value);
}

static sh_status mem_last(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    mem_cursor *cursor = (mem_cursor *)base;
    mem_node **row = cursor_table(cursor)->head;
    mem_node *last = NULL;
    for (int l = HEIGHT_MAX - 1; l >= 0; l--)
        while (row[l]) {
            last = row[l];
            row = last->next;
        }
    return move(cursor, last, key, value);
}

static void mem_cursor_close(sh_cursor *base)
{
    free(base);
}

/* ---- the store ---- */

void mem_empty(mem_store *store)
{
    for (size_t t = 0; t < store->base.n_tables; t++) {
        for (mem_node *node = store->tables[t].head[0]; node;) {
            mem_node *next = node->next[0];
            free(node);
            node = next;
        }
        store->tables[t] = (mem_table){0};
    }
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
    store->level_bits = 0x9e3779b97f4a7c15u;
    atomic_init(&store->users, 0);
    *out = &store->base;
    return SH_OK;
}

/* All of from's nodes, one by one at the end of each level: they come in order. */
sh_status mem_copy_rows(mem_store *to, const mem_store *from, sh_error *err)
{
    for (size_t t = 0; t < from->base.n_tables; t++) {
        mem_node **last[HEIGHT_MAX];
        for (int l = 0; l < HEIGHT_MAX; l++)
            last[l] = &to->tables[t].head[l];
        for (const mem_node *node = from->tables[t].head[0]; node; node = node->next[0]) {
            mem_node *copy = sh_calloc(1, node_bytes(node));
            if (!copy)
                return sh_fail(err, SH_ERR_NO_MEMORY, "store in memory: no memory for a copy");
            memcpy(copy, node, node_bytes(node));
            link_node(to, &to->tables[t], copy, last);
            for (int l = 0; l < copy->height; l++)
                last[l] = &copy->next[l];
        }
    }
    return SH_OK;
}

bool mem_is_memory(const sh_store *store)
{
    return store->backend == &memory_backend;
}
