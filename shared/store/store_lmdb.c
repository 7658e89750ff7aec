/*
 * The store on disk: an LMDB environment (a folder with data.mdb and lock.mdb) with one named
 * database a table, and the files writer.lock, whose flock says that a process writes here, and
 * readers.lock, which other processes that read hold shared.
 *
 * To LMDB an empty data.mdb is one that is to be made. So writer.lock is empty until the first
 * commit of a store is durable, and holds a line from then on: an empty data.mdb beside it has lost
 * what was in it.
 *
 * The reserve. LMDB's only limit is its map, so plain writers run on a map that is reserve_bytes
 * short of bytes_max, and a SH_TXN_RESERVE writer near the limit on the whole of it. Changing the
 * map takes a moment without transactions in this process; `lock` and `open` see to that. If there
 * is no such moment, a SH_TXN_RESERVE writer makes do with the pages that are free, and a plain
 * writer that would find the map still whole is refused.
 *   The file never gets shorter, so what the reserve made it longer by would go to plain writers
 * as free pages. From then on the map does not hold them back, and they have a budget of pages:
 * what is free less what is missing from the reserve. LMDB does not say what a transaction has
 * taken, so `pages_taken` is an upper bound.
 *
 * Compaction puts every row into a new environment, the folder "compact" in this one, and renames
 * its data.mdb over the old one while no process has that open. LMDB's own compacting copy would
 * take along the stale ends of overflow pages.
 *
 * Durability. With syncing on LMDB writes and fdatasyncs all pages before it writes, with O_DSYNC,
 * the meta page (under a sector) that makes them count.
 */
#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/store/backend.h"

#define READERS_MAX      254
#define LOCK_FILE_BYTES  16384 /* LMDB's head and READERS_MAX readers of 64 bytes each */
#define LIST_PAGE_IDS    500   /* of free pages, in a page of their list */
#define LIST_PAGES_SPARE 8
#define FILE_MODE        0600 /* what a store holds is its owner's */
#define DIR_MODE         0700
#define COMPACT_STEP     ((uint64_t)16 << 20) /* bytes of a transaction of the new environment */

typedef struct lmdb_store lmdb_store;
struct lmdb_store {
    sh_store base;
    MDB_env *env;
    MDB_dbi tables[SH_STORE_TABLES_MAX];
    char *dir;
    char *names[SH_STORE_TABLES_MAX];
    int writer_fd; /* holds the flock; -1: read only */
    int readers_fd;
    bool no_sync;
    size_t page_bytes;
    /* Under `lock`: */
    pthread_mutex_t lock;
    unsigned open; /* transactions */
    bool writing;
    bool whole_map; /* the map is bytes_max, not less the reserve */
    bool unmapped;  /* changing the map or the file failed: nothing can be read or written */
    /* The registry of environments that this process has open: */
    dev_t device;
    ino_t inode;
    lmdb_store *next;
};

typedef struct {
    sh_txn base;
    MDB_txn *mdb;
    uint64_t writes; /* so far: a cursor that sees it changed finds its place anew */
    bool limited;    /* by a budget of pages */
    uint64_t budget, pages_before, nodes_before;
} lmdb_txn;

typedef struct {
    sh_cursor base;
    MDB_cursor *mdb;
    bool placed;
    uint64_t writes; /* of the transaction, when the cursor was placed */
    size_t key_n;
    uint8_t key[SH_STORE_KEY_MAX]; /* where it was placed; in write transactions only */
} lmdb_cursor;

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static lmdb_store *registry;

static lmdb_store *store_of(const sh_txn *txn)
{
    return (lmdb_store *)txn->store;
}

static sh_status status_of(int rc)
{
    switch (rc) {
    case MDB_SUCCESS:
        return SH_OK;
    case MDB_NOTFOUND:
        return SH_ERR_NOT_FOUND;
    case MDB_MAP_FULL:
    case ENOSPC:
    case EDQUOT:
        return SH_ERR_FULL;
    case MDB_READERS_FULL:
    case MDB_TXN_FULL:
    case MDB_MAP_RESIZED:
        return SH_ERR_LIMIT;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_PANIC:
    case MDB_INVALID:
        return SH_ERR_CORRUPT;
    case MDB_VERSION_MISMATCH:
        return SH_ERR_UNSUPPORTED;
    case ENOMEM:
        return SH_ERR_NO_MEMORY;
    default:
        return SH_ERR_IO;
    }
}

static const char *reason(int rc)
{
    switch (rc) {
    case MDB_MAP_FULL:
        return "it is full; delete something or raise its limit";
    case ENOSPC:
    case EDQUOT:
        return "the disk is full; make room on it";
    case MDB_MAP_RESIZED:
        return "its writer raised its limit; end this process's other transactions and try again";
    case MDB_NOTFOUND:
        return "it is not there";
    default:
        return mdb_strerror(rc);
    }
}

static sh_status fail_mdb(const lmdb_store *store, int rc, const char *doing, sh_error *err)
{
    return sh_fail(err, status_of(rc), "store '%s': cannot %s: %s", store->dir, doing, reason(rc));
}

/* Of a call in a transaction. LMDB says MDB_BAD_TXN from the second error on, and where opening a
 * table's root failed without having been told: that is a damaged file, if nothing of ours failed
 * before. */
static sh_status status_in(const sh_txn *txn, int rc)
{
    if (rc != MDB_BAD_TXN)
        return status_of(rc);
    return txn->failed != SH_OK ? txn->failed : SH_ERR_CORRUPT;
}

static sh_status fail_in_txn(const sh_txn *txn, int rc, const char *doing, sh_error *err)
{
    return sh_fail(err, status_in(txn, rc), "store '%s': cannot %s: %s", store_of(txn)->dir, doing,
                   reason(rc));
}

/* ---- transactions ---- */

/* The file never gets shorter: this only grows. */
static uint64_t high_water(const lmdb_store *store)
{
    MDB_envinfo info;
    int rc = mdb_env_info(store->env, &info);
    SH_ASSERT(rc == 0); /* fails for a null argument only */
    return ((uint64_t)info.me_last_pgno + 1) * store->page_bytes;
}

/* The free pages that transactions before `before` list: an entry of the free list is a
 * transaction's number and, first of its value, how many pages it freed. */
static uint64_t free_pages(MDB_txn *reader, uint64_t before)
{
    MDB_cursor *cursor = NULL;
    if (mdb_cursor_open(reader, 0, &cursor) != 0)
        return 0;
    uint64_t pages = 0;
    MDB_val k, v;
    while (mdb_cursor_get(cursor, &k, &v, MDB_NEXT) == 0) {
        size_t id, count;
        memcpy(&id, k.mv_data, sizeof(id));
        memcpy(&count, v.mv_data, sizeof(count));
        if (id < before)
            pages += count;
    }
    mdb_cursor_close(cursor);
    return pages;
}

/* All pages of the tables, as txn sees them; *nodes those with keys, *depth of the deepest. */
static uint64_t table_pages(const lmdb_txn *txn, uint64_t *nodes, unsigned *depth)
{
    const lmdb_store *store = store_of(&txn->base);
    uint64_t pages = 0;
    *nodes = 0;
    *depth = 0;
    for (size_t t = 0; t < store->base.n_tables; t++) {
        MDB_stat stat = {0};
        (void)mdb_stat(txn->mdb, store->tables[t], &stat);
        *nodes += stat.ms_branch_pages + stat.ms_leaf_pages;
        pages += stat.ms_branch_pages + stat.ms_leaf_pages + stat.ms_overflow_pages;
        *depth = SH_MAX(*depth, stat.ms_depth);
    }
    return pages;
}

/* At most so many pages has the transaction taken: what the tables grew by, a copy of each page
 * that its writes came through, and the lists of tables and of free pages, with some to spare. */
static uint64_t pages_taken(const lmdb_txn *txn)
{
    uint64_t nodes;
    unsigned depth;
    uint64_t pages = table_pages(txn, &nodes, &depth);
    uint64_t grown = pages > txn->pages_before ? pages - txn->pages_before : 0;
    /* A write copies its path, and a neighbour a level when pages are merged. */
    uint64_t copied = SH_MIN(txn->writes * 2 * (depth + 1), txn->nodes_before);
    return grown + copied + (grown + copied) / LIST_PAGE_IDS + LIST_PAGES_SPARE;
}

/* Gives a plain writer its budget when the file is longer than its map would be. The free pages of
 * the last commit are nobody's yet. SH_ERR_FULL when there is none. Under the lock. */
static sh_status set_budget(lmdb_store *store, lmdb_txn *txn, sh_error *err)
{
    uint64_t used = high_water(store);
    if (used <= store->base.bytes_max - store->base.reserve_bytes)
        return SH_OK;
    MDB_txn *reader = NULL;
    int rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &reader);
    if (rc)
        return fail_mdb(store, rc, "read its free pages", err);
    uint64_t free_now = free_pages(reader, mdb_txn_id(reader));
    mdb_txn_abort(reader);
    uint64_t room = store->base.bytes_max - SH_MIN(used, store->base.bytes_max);
    uint64_t missing =
        (store->base.reserve_bytes - SH_MIN(room, store->base.reserve_bytes)) / store->page_bytes;
    if (free_now <= missing)
        return fail_mdb(store, MDB_MAP_FULL, "begin a transaction", err);
    txn->limited = true;
    txn->budget = free_now - missing;
    return SH_OK;
}

/* Under the lock and without transactions. 0 bytes: what the environment says. */
static int map_again(lmdb_store *store, uint64_t bytes)
{
    int rc = mdb_env_set_mapsize(store->env, (size_t)bytes);
    store->unmapped = rc != 0;
    return rc;
}

/* Makes the map what a writer of this kind may fill. Under the lock. */
static sh_status choose_map(lmdb_store *store, int kind, sh_error *err)
{
    uint64_t part = store->base.bytes_max - store->base.reserve_bytes;
    uint64_t used = high_water(store);
    bool near = used + store->base.reserve_bytes > part;
    bool whole = kind == SH_TXN_RESERVE && near;
    if (near) {
        int dead = 0;
        (void)mdb_reader_check(store->env, &dead); /* pages pinned by killed processes */
    }
    if (whole == store->whole_map)
        return SH_OK;
    if (store->open > 0) {
        if (whole)
            return SH_OK;
        return sh_fail(err, SH_ERR_FULL,
                       "store '%s': full, and a transaction that began while its reserve was in "
                       "use is still open: end it",
                       store->dir);
    }
    int rc = map_again(store, SH_MAX(whole ? store->base.bytes_max : part, used));
    if (rc)
        return fail_mdb(store, rc, "map it", err);
    store->whole_map = whole;
    return SH_OK;
}

/* Under the lock. */
static sh_status begin_reader(lmdb_store *store, lmdb_txn *txn, sh_error *err)
{
    int rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn->mdb);
    if (rc == MDB_MAP_RESIZED && store->open == 0) { /* the writer's process has a larger map */
        rc = map_again(store, 0);
        if (rc == 0)
            rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn->mdb);
    }
    if (rc)
        return fail_mdb(store, rc, "begin a transaction", err);
    store->open++;
    return SH_OK;
}

/* Under the lock; the transaction itself begins outside, because LMDB's own lock, which a writer
 * holds until it ends, would otherwise be taken both inside and around this one. */
static sh_status admit_writer(lmdb_store *store, lmdb_txn *txn, sh_error *err)
{
    if (store->writing)
        return sh_fail(err, SH_ERR_LIMIT, "store '%s': a write transaction is open", store->dir);
    SH_TRY(choose_map(store, txn->base.kind, err));
    if (txn->base.kind == SH_TXN_WRITE)
        SH_TRY(set_budget(store, txn, err));
    store->open++;
    store->writing = true;
    return SH_OK;
}

static void end(lmdb_txn *txn)
{
    lmdb_store *store = store_of(&txn->base);
    pthread_mutex_lock(&store->lock);
    store->open--;
    if (txn->base.kind != SH_TXN_READ)
        store->writing = false;
    pthread_mutex_unlock(&store->lock);
    free(txn);
}

static sh_status lmdb_begin(sh_store *base, int kind, sh_txn **out, sh_error *err)
{
    lmdb_store *store = (lmdb_store *)base;
    lmdb_txn *txn = sh_calloc(1, sizeof(*txn));
    if (!txn)
        return sh_fail(err, SH_ERR_NO_MEMORY, "store '%s': no memory for a transaction",
                       store->dir);
    txn->base = (sh_txn){.store = base, .kind = kind};
    pthread_mutex_lock(&store->lock);
    sh_status status;
    if (store->unmapped)
        status = sh_fail(err, SH_ERR_IO, "store '%s': its map is gone; open it again", store->dir);
    else if (kind == SH_TXN_READ)
        status = begin_reader(store, txn, err);
    else
        status = admit_writer(store, txn, err);
    pthread_mutex_unlock(&store->lock);
    if (status != SH_OK) {
        free(txn);
        return status;
    }
    int rc = kind == SH_TXN_READ ? 0 : mdb_txn_begin(store->env, NULL, 0, &txn->mdb);
    if (rc) {
        end(txn);
        return fail_mdb(store, rc, "begin a transaction", err);
    }
    unsigned depth;
    if (txn->limited)
        txn->pages_before = table_pages(txn, &txn->nodes_before, &depth);
    *out = &txn->base;
    return SH_OK;
}

static sh_status lmdb_commit(sh_txn *base, sh_error *err)
{
    lmdb_txn *txn = (lmdb_txn *)base;
    int rc = mdb_txn_commit(txn->mdb);
    sh_status status = rc ? fail_in_txn(base, rc, "commit", err) : SH_OK;
    end(txn);
    return status;
}

static void lmdb_abort(sh_txn *base)
{
    lmdb_txn *txn = (lmdb_txn *)base;
    mdb_txn_abort(txn->mdb);
    end(txn);
}

/* ---- entries ---- */

static MDB_val val_of(sh_slice slice)
{
    static char none; /* LMDB wants an address for no bytes too */
    return (MDB_val){slice.n, slice.n ? (void *)(uintptr_t)slice.data : &none};
}

static sh_status lmdb_put(sh_txn *base, unsigned table, sh_slice key, sh_slice value, sh_error *err)
{
    lmdb_txn *txn = (lmdb_txn *)base;
    MDB_val k = val_of(key), v = val_of(value);
    txn->writes++;
    int rc = mdb_put(txn->mdb, store_of(base)->tables[table], &k, &v, 0);
    if (rc == 0 && txn->limited && pages_taken(txn) > txn->budget)
        rc = MDB_MAP_FULL;
    return rc ? fail_in_txn(base, rc, "put", err) : SH_OK;
}

static sh_status lmdb_del(sh_txn *base, unsigned table, sh_slice key, sh_error *err)
{
    lmdb_txn *txn = (lmdb_txn *)base;
    MDB_val k = val_of(key);
    txn->writes++;
    int rc = mdb_del(txn->mdb, store_of(base)->tables[table], &k, NULL);
    if (rc == 0 && txn->limited && pages_taken(txn) > txn->budget)
        rc = MDB_MAP_FULL;
    return rc && rc != MDB_NOTFOUND ? fail_in_txn(base, rc, "delete", err) : SH_OK;
}

static sh_status lmdb_get(sh_txn *base, unsigned table, sh_slice key, sh_slice *value)
{
    lmdb_txn *txn = (lmdb_txn *)base;
    MDB_val k = val_of(key), v;
    int rc = mdb_get(txn->mdb, store_of(base)->tables[table], &k, &v);
    if (rc == 0 && value)
        *value = (sh_slice){v.mv_data, v.mv_size};
    return status_in(base, rc);
}

static uint64_t lmdb_count(sh_txn *base, unsigned table)
{
    MDB_stat stat = {0};
    (void)mdb_stat(((lmdb_txn *)base)->mdb, store_of(base)->tables[table], &stat);
    return stat.ms_entries;
}

/* ---- cursors ---- */

static sh_status lmdb_cursor_open(sh_txn *base, unsigned table, sh_cursor **out, sh_error *err)
{
    lmdb_cursor *cursor = sh_calloc(1, sizeof(*cursor));
    if (!cursor)
        return sh_fail(err, SH_ERR_NO_MEMORY, "store '%s': no memory for a cursor",
                       store_of(base)->dir);
    int rc = mdb_cursor_open(((lmdb_txn *)base)->mdb, store_of(base)->tables[table], &cursor->mdb);
    if (rc) {
        free(cursor);
        return fail_in_txn(base, rc, "open a cursor", err);
    }
    cursor->base = (sh_cursor){.txn = base, .table = table};
    *out = &cursor->base;
    return SH_OK;
}

/* Moves by op (from k for MDB_SET_RANGE) and gives what is there. */
static sh_status move(lmdb_cursor *cursor, MDB_cursor_op op, MDB_val k, sh_slice *key,
                      sh_slice *value)
{
    const lmdb_txn *txn = (const lmdb_txn *)cursor->base.txn;
    MDB_val v;
    int rc = mdb_cursor_get(cursor->mdb, &k, &v, op);
    cursor->placed = rc == 0;
    if (rc)
        return status_in(&txn->base, rc);
    if (txn->base.kind != SH_TXN_READ) {
        cursor->writes = txn->writes;
        cursor->key_n = SH_MIN(k.mv_size, sizeof(cursor->key));
        memcpy(cursor->key, k.mv_data, cursor->key_n);
    }
    if (key)
        *key = (sh_slice){k.mv_data, k.mv_size};
    if (value)
        *value = (sh_slice){v.mv_data, v.mv_size};
    return SH_OK;
}

static sh_status lmdb_seek(sh_cursor *base, sh_slice from, sh_slice *key, sh_slice *value)
{
    return move((lmdb_cursor *)base, from.n ? MDB_SET_RANGE : MDB_FIRST, val_of(from), key, value);
}

static sh_status lmdb_next(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    lmdb_cursor *cursor = (lmdb_cursor *)base;
    if (!cursor->placed)
        return SH_ERR_NOT_FOUND;
    if (cursor->writes != ((const lmdb_txn *)base->txn)->writes) {
        uint8_t last[SH_STORE_KEY_MAX];
        size_t last_n = cursor->key_n;
        memcpy(last, cursor->key, last_n);
        sh_slice found, data;
        sh_status status = lmdb_seek(base, (sh_slice){last, last_n}, &found, &data);
        if (status != SH_OK)
            return status;
        if (found.n != last_n || memcmp(found.data, last, last_n) != 0) { /* the key is gone */
            if (key)
                *key = found;
            if (value)
                *value = data;
            return SH_OK;
        }
    }
    return move(cursor, MDB_NEXT, (MDB_val){0}, key, value);
}

static sh_status lmdb_last(sh_cursor *base, sh_slice *key, sh_slice *value)
{
    return move((lmdb_cursor *)base, MDB_LAST, (MDB_val){0}, key, value);
}

static void lmdb_cursor_close(sh_cursor *base)
{
    mdb_cursor_close(((lmdb_cursor *)base)->mdb);
    free(base);
}

/* ---- the environment ---- */

static sh_status lmdb_sync(sh_store *base, sh_error *err)
{
    lmdb_store *store = (lmdb_store *)base;
    int rc = store->unmapped ? MDB_PANIC : mdb_env_sync(store->env, 1);
    return rc ? fail_mdb(store, rc, "sync", err) : SH_OK;
}

static uint64_t lmdb_bytes_used(const sh_store *base)
{
    lmdb_store *store = (lmdb_store *)(uintptr_t)base; /* for its lock */
    pthread_mutex_lock(&store->lock);
    uint64_t used = store->env ? high_water(store) : 0;
    MDB_txn *txn = NULL;
    if (!store->unmapped && mdb_txn_begin(store->env, NULL, MDB_RDONLY, &txn) == 0) {
        used -= SH_MIN(used, free_pages(txn, UINT64_MAX) * store->page_bytes);
        mdb_txn_abort(txn);
    }
    pthread_mutex_unlock(&store->lock);
    return used;
}

static sh_status register_store(lmdb_store *store, sh_error *err)
{
    struct stat info;
    if (stat(store->dir, &info) != 0)
        return sh_fail(err, errno == ENOENT ? SH_ERR_NOT_FOUND : SH_ERR_IO, "store '%s': %s",
                       store->dir, strerror(errno));
    store->device = info.st_dev;
    store->inode = info.st_ino;
    pthread_mutex_lock(&registry_lock);
    bool there = false;
    for (lmdb_store *s = registry; s && !there; s = s->next)
        there = s->device == store->device && s->inode == store->inode;
    if (!there) {
        store->next = registry;
        registry = store;
    }
    pthread_mutex_unlock(&registry_lock);
    if (there)
        return sh_fail(err, SH_ERR_EXISTS, "store '%s': this process has it open already",
                       store->dir);
    return SH_OK;
}

static void unregister_store(lmdb_store *store)
{
    pthread_mutex_lock(&registry_lock);
    lmdb_store **link = &registry;
    while (*link && *link != store)
        link = &(*link)->next;
    if (*link)
        *link = store->next;
    pthread_mutex_unlock(&registry_lock);
}

static sh_status lock_writer(lmdb_store *store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof(path), store->dir, "writer.lock", err));
    store->writer_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, FILE_MODE);
    if (store->writer_fd < 0)
        return fail_mdb(store, errno, "open writer.lock", err);
    if (flock(store->writer_fd, LOCK_EX | LOCK_NB) != 0)
        return sh_fail(err, errno == EWOULDBLOCK ? SH_ERR_EXISTS : SH_ERR_IO, "store '%s': %s",
                       store->dir,
                       errno == EWOULDBLOCK ? "another process writes here" : strerror(errno));
    return SH_OK;
}

/* The file that keeps a compaction and the readers of other processes apart: a writer has it open,
 * a reader holds it shared. A reader that may not write here goes without. */
static sh_status open_readers_lock(lmdb_store *store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof(path), store->dir, "readers.lock", err));
    int flags = store->base.read_only ? O_RDWR : O_RDWR | O_CREAT;
    store->readers_fd = open(path, flags | O_CLOEXEC, FILE_MODE);
    if (store->readers_fd < 0)
        return store->base.read_only ? SH_OK : fail_mdb(store, errno, "open readers.lock", err);
    int rc = 0;
    while (store->base.read_only && (rc = flock(store->readers_fd, LOCK_SH)) != 0 && errno == EINTR)
        continue;
    return rc != 0 ? fail_mdb(store, errno, "lock readers.lock", err) : SH_OK;
}

/* LMDB makes lock.mdb of a hole and writes it through a map: on a full disk that is a SIGBUS. So it
 * gets its blocks before. No environment is open: closing the file would drop LMDB's locks. */
static sh_status reserve_lock_file(const lmdb_store *store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    struct stat info;
    SH_TRY(sh_path_join(path, sizeof(path), store->dir, "lock.mdb", err));
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return fail_mdb(store, errno, "open lock.mdb", err);
    int rc = fstat(fd, &info) != 0 ? errno : 0;
    if (rc == 0 && info.st_blocks == 0)
        rc = posix_fallocate(fd, 0, LOCK_FILE_BYTES);
    close(fd);
    return rc == ENOSPC || rc == EDQUOT ? fail_mdb(store, rc, "make lock.mdb", err) : SH_OK;
}

/* Reading a mapped page that a torn file has not would end the process (SIGBUS). Zeros in its place
 * LMDB knows for what they are, and pages that no tree needs may well be missing. */
static sh_status fill_up(const lmdb_store *store, int fd, sh_error *err)
{
    struct stat info;
    uint64_t bytes = high_water(store);
    if (fstat(fd, &info) != 0)
        return fail_mdb(store, errno, "look at its file", err);
    if ((uint64_t)info.st_size >= bytes || ftruncate(fd, (off_t)bytes) == 0)
        return SH_OK;
    return fail_mdb(store, errno, "fill up its file", err);
}

static sh_status open_env(lmdb_store *store, sh_error *err)
{
    unsigned flags = MDB_NOTLS;
    if (store->base.read_only)
        flags |= MDB_RDONLY;
    if (store->no_sync)
        flags |= MDB_NOSYNC | MDB_NOMETASYNC;
    int rc = mdb_env_create(&store->env);
    if (rc == 0)
        rc = mdb_env_set_maxdbs(store->env, (MDB_dbi)store->base.n_tables);
    if (rc == 0)
        rc = mdb_env_set_maxreaders(store->env, READERS_MAX);
    if (rc == 0 && !store->base.read_only)
        rc = mdb_env_set_mapsize(store->env,
                                 (size_t)(store->base.bytes_max - store->base.reserve_bytes));
    if (rc == 0)
        rc = mdb_env_open(store->env, store->dir, flags, FILE_MODE);
    if (rc == ENOENT)
        return sh_fail(err, SH_ERR_NOT_FOUND, "store '%s': there is no store in this folder",
                       store->dir);
    if (rc)
        return fail_mdb(store, rc, "open it", err);
    int fd = -1, dead = 0;
    if (mdb_env_get_fd(store->env, &fd) == 0) /* the one that LMDB 0.9 lets children inherit */
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
    if (!store->base.read_only)
        (void)mdb_reader_check(store->env, &dead);
    MDB_stat stat;
    rc = mdb_env_stat(store->env, &stat);
    store->page_bytes = stat.ms_psize;
    if (rc)
        return fail_mdb(store, rc, "read its page size", err);
    if (!store->base.read_only && fd >= 0)
        SH_TRY(fill_up(store, fd, err));
    /* A limit that was lowered below what the file takes leaves room for deleting. */
    if (high_water(store) > store->base.bytes_max)
        store->base.bytes_max = high_water(store) + store->base.reserve_bytes;
    return SH_OK;
}

static sh_status open_tables(lmdb_store *store, sh_error *err)
{
    bool reads = store->base.read_only;
    MDB_txn *txn = NULL;
    int rc = mdb_txn_begin(store->env, NULL, reads ? MDB_RDONLY : 0, &txn);
    if (rc)
        return fail_mdb(store, rc, "begin a transaction", err);
    for (size_t t = 0; t < store->base.n_tables; t++) {
        rc = mdb_dbi_open(txn, store->names[t], reads ? 0 : MDB_CREATE, &store->tables[t]);
        if (rc) {
            mdb_txn_abort(txn);
            return sh_fail(err, status_of(rc), "store '%s': cannot open table '%s': %s", store->dir,
                           store->names[t], reason(rc));
        }
    }
    rc = mdb_txn_commit(txn);
    return rc ? fail_mdb(store, rc, "make its tables", err) : SH_OK;
}

/* Syncs a folder, so that the names in it outlast a power loss. */
static sh_status sync_dir(const lmdb_store *store, const char *dir, sh_error *err)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool failed = fd < 0 || fsync(fd) != 0;
    int reason = errno;
    if (fd >= 0)
        close(fd);
    return failed ? fail_mdb(store, reason, "sync its folder", err) : SH_OK;
}

static sh_status sync_names(const lmdb_store *store, sh_error *err)
{
    char parent[SH_PATH_BYTES];
    SH_TRY(sh_path_join(parent, sizeof(parent), store->dir, "..", err));
    SH_TRY(sync_dir(store, store->dir, err));
    return sync_dir(store, parent, err);
}

/* ---- compaction and backup ---- */

static const char *const env_files[] = {"data.mdb", "lock.mdb"};

static sh_status compact_path(const lmdb_store *store, const char *name, char *out, sh_error *err)
{
    char dir[SH_PATH_BYTES];
    SH_TRY(sh_path_join(dir, sizeof(dir), store->dir, "compact", err));
    return sh_path_join(out, SH_PATH_BYTES, dir, name, err);
}

static sh_status remove_compact(lmdb_store *store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < SH_COUNT(env_files); i++) {
        SH_TRY(compact_path(store, env_files[i], path, err));
        if (unlink(path) != 0 && errno != ENOENT)
            return fail_mdb(store, errno, "remove an unfinished compaction", err);
    }
    SH_TRY(sh_path_join(path, sizeof(path), store->dir, "compact", err));
    if (rmdir(path) != 0 && errno != ENOENT)
        return fail_mdb(store, errno, "remove an unfinished compaction", err);
    return SH_OK;
}

/* Puts a table's rows into the same table of another environment, in transactions of its own. */
static int copy_table(lmdb_store *store, MDB_txn *from, size_t table, MDB_env *to)
{
    MDB_cursor *cursor = NULL;
    MDB_txn *txn = NULL;
    MDB_dbi dbi;
    MDB_val k, v;
    uint64_t bytes = 0;
    int rc = mdb_txn_begin(to, NULL, 0, &txn);
    if (rc == 0)
        rc = mdb_dbi_open(txn, store->names[table], MDB_CREATE, &dbi);
    if (rc == 0)
        rc = mdb_cursor_open(from, store->tables[table], &cursor);
    while (rc == 0 && (rc = mdb_cursor_get(cursor, &k, &v, MDB_NEXT)) == 0) {
        rc = mdb_put(txn, dbi, &k, &v, MDB_APPEND);
        bytes += k.mv_size + v.mv_size;
        if (rc != 0 || bytes < COMPACT_STEP)
            continue;
        bytes = 0;
        rc = mdb_txn_commit(txn);
        txn = NULL;
        if (rc == 0)
            rc = mdb_txn_begin(to, NULL, 0, &txn);
    }
    if (cursor)
        mdb_cursor_close(cursor);
    if (rc == MDB_NOTFOUND) {
        rc = mdb_txn_commit(txn);
        txn = NULL;
    }
    if (txn)
        mdb_txn_abort(txn);
    return rc;
}

static int copy_tables(lmdb_store *store, MDB_env *to)
{
    MDB_txn *from = NULL;
    MDB_stat stat;
    MDB_dbi main_dbi;
    int rc = mdb_txn_begin(store->env, NULL, MDB_RDONLY, &from);
    if (rc == 0)
        rc = mdb_dbi_open(from, NULL, 0, &main_dbi);
    if (rc == 0)
        rc = mdb_stat(from, main_dbi, &stat);
    if (rc == 0 && stat.ms_entries != store->base.n_tables)
        rc = MDB_INCOMPATIBLE; /* tables that we did not open would be lost */
    for (size_t t = 0; t < store->base.n_tables && rc == 0; t++)
        rc = copy_table(store, from, t, to);
    if (from)
        mdb_txn_abort(from);
    return rc;
}

/* Makes the folder "compact" with all rows in it, synced. */
static sh_status write_compact(lmdb_store *store, sh_error *err)
{
    char dir[SH_PATH_BYTES];
    MDB_env *to = NULL;
    unsigned flags = store->no_sync ? MDB_NOSYNC | MDB_NOMETASYNC : 0;
    SH_TRY(remove_compact(store, err));
    SH_TRY(sh_path_join(dir, sizeof(dir), store->dir, "compact", err));
    if (mkdir(dir, DIR_MODE) != 0)
        return fail_mdb(store, errno, "make its folder 'compact'", err);
    int rc = mdb_env_create(&to);
    if (rc == 0)
        rc = mdb_env_set_maxdbs(to, (MDB_dbi)store->base.n_tables);
    if (rc == 0)
        rc = mdb_env_set_mapsize(to, (size_t)(store->base.bytes_max + store->base.reserve_bytes));
    if (rc == 0)
        rc = mdb_env_open(to, dir, MDB_NOTLS | flags, FILE_MODE);
    if (rc == 0)
        rc = copy_tables(store, to);
    if (to)
        mdb_env_close(to);
    return rc ? fail_mdb(store, rc, "write its rows anew", err) : SH_OK;
}

/* Under the lock, without transactions, and with no other process that reads. */
static sh_status replace_file(lmdb_store *store, sh_error *err)
{
    char from[SH_PATH_BYTES], to[SH_PATH_BYTES];
    SH_TRY(write_compact(store, err));
    SH_TRY(compact_path(store, "data.mdb", from, err));
    SH_TRY(sh_path_join(to, sizeof(to), store->dir, "data.mdb", err));
    mdb_env_close(store->env);
    store->env = NULL;
    store->unmapped = true;
    store->whole_map = false;
    if (rename(from, to) != 0)
        return fail_mdb(store, errno, "put the new file in place", err);
    if (!store->no_sync)
        SH_TRY(sync_dir(store, store->dir, err));
    SH_TRY(open_env(store, err));
    SH_TRY(open_tables(store, err));
    store->unmapped = false;
    return remove_compact(store, err);
}

static sh_status lmdb_compact(sh_store *base, sh_error *err)
{
    lmdb_store *store = (lmdb_store *)base;
    sh_status status;
    pthread_mutex_lock(&store->lock);
    if (store->unmapped) {
        status = sh_fail(err, SH_ERR_IO, "store '%s': its map is gone; open it again", store->dir);
    } else if (store->open > 0) {
        status = sh_fail(err, SH_ERR_LIMIT,
                         "store '%s': not compacted, a transaction is open: end it", store->dir);
    } else if (flock(store->readers_fd, LOCK_EX | LOCK_NB) != 0) {
        status = sh_fail(err, SH_ERR_LIMIT,
                         "store '%s': not compacted, another process reads it: end that and try "
                         "again",
                         store->dir);
    } else {
        status = replace_file(store, err);
        if (status != SH_OK && !store->unmapped)
            (void)remove_compact(store, NULL);
        (void)flock(store->readers_fd, LOCK_UN);
    }
    pthread_mutex_unlock(&store->lock);
    return status;
}

/* A copy beside its name, synced, then renamed: no half copy is ever taken for one. */
static sh_status copy_to(lmdb_store *store, const char *dir, const char *path, sh_error *err)
{
    char part[SH_PATH_BYTES];
    SH_TRY(sh_path_join(part, sizeof(part), dir, "data.mdb.part", err));
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, FILE_MODE);
    if (fd < 0)
        return fail_mdb(store, errno, "make the copy's file", err);
    int rc = mdb_env_copyfd2(store->env, fd, MDB_CP_COMPACT);
    if (rc == 0 && fsync(fd) != 0)
        rc = errno;
    if (close(fd) != 0 && rc == 0)
        rc = errno;
    if (rc == 0 && rename(part, path) != 0)
        rc = errno;
    if (rc == 0)
        return sync_dir(store, dir, err);
    (void)unlink(part);
    return fail_mdb(store, rc, "copy it", err);
}

static sh_status lmdb_backup(sh_store *base, const char *dir, sh_error *err)
{
    lmdb_store *store = (lmdb_store *)base;
    char path[SH_PATH_BYTES];
    SH_TRY(sh_dir_make(dir, err));
    SH_TRY(sh_path_join(path, sizeof(path), dir, "data.mdb", err));
    if (access(path, F_OK) == 0)
        return sh_fail(err, SH_ERR_EXISTS, "store '%s': there is one in '%s' already", store->dir,
                       dir);
    pthread_mutex_lock(&store->lock);
    bool usable = !store->unmapped;
    store->open += usable; /* the map must stay */
    pthread_mutex_unlock(&store->lock);
    if (!usable)
        return sh_fail(err, SH_ERR_IO, "store '%s': its map is gone; open it again", store->dir);
    sh_status status = copy_to(store, dir, path, err);
    pthread_mutex_lock(&store->lock);
    store->open--;
    pthread_mutex_unlock(&store->lock);
    return status;
}

static void lmdb_close(sh_store *base)
{
    lmdb_store *store = (lmdb_store *)base;
    SH_ASSERT(store->open == 0);
    if (store->env)
        mdb_env_close(store->env);
    if (store->writer_fd >= 0)
        close(store->writer_fd); /* and with it the flock */
    if (store->readers_fd >= 0)
        close(store->readers_fd);
    for (size_t t = 0; t < store->base.n_tables; t++)
        free(store->names[t]);
    unregister_store(store);
    pthread_mutex_destroy(&store->lock);
    free(store->dir);
    free(store);
}

static const sh_store_backend lmdb_backend = {
    .close = lmdb_close,
    .sync = lmdb_sync,
    .compact = lmdb_compact,
    .backup = lmdb_backup,
    .bytes_used = lmdb_bytes_used,
    .begin = lmdb_begin,
    .commit = lmdb_commit,
    .abort = lmdb_abort,
    .put = lmdb_put,
    .del = lmdb_del,
    .get = lmdb_get,
    .count = lmdb_count,
    .cursor_open = lmdb_cursor_open,
    .seek = lmdb_seek,
    .next = lmdb_next,
    .last = lmdb_last,
    .cursor_close = lmdb_cursor_close,
};

static bool was_made(const lmdb_store *store)
{
    struct stat info;
    return fstat(store->writer_fd, &info) == 0 && info.st_size > 0;
}

/* Where there is no room for it, the next start that has some does it. */
static void remember_made(const lmdb_store *store)
{
    static const char line[] = "a store was made here\n";
    if (was_made(store))
        return;
    if (pwrite(store->writer_fd, line, sizeof(line) - 1, 0) > 0 && !store->no_sync)
        (void)fdatasync(store->writer_fd);
}

/* A file that a full disk let begin and not end is no store yet: left behind, the next try would
 * take it for a damaged one. */
static sh_status open_file(lmdb_store *store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    struct stat info;
    SH_TRY(sh_path_join(path, sizeof(path), store->dir, "data.mdb", err));
    bool is_new = !store->base.read_only && (stat(path, &info) != 0 || info.st_size == 0);
    if (is_new && was_made(store))
        return sh_fail(err, SH_ERR_CORRUPT,
                       "store '%s': data.mdb is empty or gone, and a store was made here: put it "
                       "back from a backup, or remove the folder to begin anew",
                       store->dir);
    if (!store->base.read_only)
        SH_TRY(reserve_lock_file(store, err));
    sh_status status = open_env(store, err);
    if (status == SH_OK)
        status = open_tables(store, err);
    if (status != SH_OK && is_new)
        (void)unlink(path);
    return status;
}

static sh_status open_parts(lmdb_store *store, const sh_store_options *options, sh_error *err)
{
    if (!options->read_only)
        SH_TRY(sh_dir_make(store->dir, err));
    SH_TRY(register_store(store, err));
    if (!options->read_only)
        SH_TRY(lock_writer(store, err));
    SH_TRY(open_readers_lock(store, err));
    for (size_t t = 0; t < store->base.n_tables; t++)
        if ((store->names[t] = strdup(options->tables[t])) == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "store '%s': no memory", store->dir);
    if (!options->read_only)
        SH_TRY(remove_compact(store, err)); /* what a crash left may hold what was deleted */
    SH_TRY(open_file(store, err));
    if (options->read_only)
        return SH_OK;
    if (!options->no_sync)
        SH_TRY(sync_names(store, err));
    remember_made(store);
    return SH_OK;
}

sh_status sh_store_open_lmdb(const char *dir, const sh_store_options *options, sh_store **out,
                             sh_error *err)
{
    sh_store common = {0};
    SH_TRY(sh_store_init(&common, &lmdb_backend, options, err));
    if (common.bytes_max > SIZE_MAX / 2)
        return sh_fail(err, SH_ERR_LIMIT, "store '%s': a limit of %llu bytes cannot be mapped here",
                       dir, (unsigned long long)common.bytes_max);
    lmdb_store *store = sh_calloc(1, sizeof(*store));
    char *copy = strdup(dir);
    if (!store || !copy) {
        free(store);
        free(copy);
        return sh_fail(err, SH_ERR_NO_MEMORY, "store '%s': no memory", dir);
    }
    store->base = common;
    store->dir = copy;
    store->no_sync = options->no_sync;
    store->writer_fd = store->readers_fd = -1;
    pthread_mutex_init(&store->lock, NULL);
    sh_status status = open_parts(store, options, err);
    if (status == SH_OK)
        *out = &store->base;
    else
        lmdb_close(&store->base);
    return status;
}
