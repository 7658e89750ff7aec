/*
 * What the store in memory and its simulated disk share. Private to the module.
 *   store_memory.c     transactions, cursors
 *   memory_tree.c      a table: a B+tree of rows
 *   store_simulated.c  crashes, unsynced commits, a full disk, corruption, copies
 */
#ifndef SH_STORE_MEMORY_INTERNAL_H
#define SH_STORE_MEMORY_INTERNAL_H

#include <stdatomic.h>

#include "shared/store/backend.h"
#include "shared/store/simulated.h"

#define MEM_DEPTH_MAX 12 /* of a tree: a page is divided only when it has had 16 inserts */

typedef struct {
    uint32_t value_n;
    uint8_t key_n;
    uint8_t bytes[]; /* key, value */
} mem_row;

typedef struct {
    uint64_t prefix; /* the key's first bytes, big-endian, with zeros behind a shorter one */
    mem_row *row;
} mem_entry;

typedef struct mem_page mem_page;

typedef struct {
    mem_page *root; /* NULL: no rows */
    uint64_t count;
    uint32_t version; /* grows with each change: a path of before is void */
    uint32_t depth;   /* levels of pages */
} mem_table;

typedef struct { /* a row's place, or that of one to come: pages and entries from the root down */
    mem_page *page[MEM_DEPTH_MAX];
    uint32_t at[MEM_DEPTH_MAX];
    uint32_t depth;
} mem_path;

typedef struct {
    unsigned table;
    mem_row *removed, *added; /* either may be NULL */
} mem_undo;

typedef struct {
    sh_txn base;
    mem_undo *undo;
    size_t n, cap;
} mem_txn;

typedef struct {
    mem_undo *undo; /* owned, with the nodes that it took out */
    size_t n;
} mem_unsynced;

typedef struct {          /* of a store whose disk is simulated */
    uint64_t writes_left; /* until the crash; 0: none is to come */
    bool durable, crashed, corrupt, unsynced;
    uint64_t room;                               /* bytes; UINT64_MAX: all */
    mem_unsynced commits[SH_STORE_UNSYNCED_MAX]; /* oldest first */
    uint32_t n_commits;
} mem_sim;

typedef struct {
    sh_store base;
    uint64_t used;    /* bytes of all rows */
    atomic_int users; /* -1: a writer; else the number of readers */
    mem_txn writer;
    mem_sim *sim; /* NULL: a disk without faults */
    mem_table tables[];
} mem_store;

/* ---- memory_tree.c ---- */
mem_row *mem_tree_get(const mem_table *table, sh_slice key);
/* The place of the first row with a key >= key (or, with `after`, > key), if it is in this page. */
void mem_tree_find(const mem_table *table, sh_slice key, bool after, mem_path *path);
/* The row with just this key, of a path that mem_tree_find gave for it; NULL: there is none. */
mem_row *mem_tree_found(const mem_path *path, sh_slice key);
/* That first row, whichever page it is in. These four: NULL when there is none. */
mem_row *mem_tree_seek(const mem_table *table, sh_slice key, bool after, mem_path *path);
mem_row *mem_tree_next(mem_path *path);
mem_row *mem_tree_first(const mem_table *table, mem_path *path);
mem_row *mem_tree_last(const mem_table *table, mem_path *path);
/* At a place that mem_tree_find gave for the row's key. */
void mem_tree_replace(mem_table *table, mem_path *path, mem_row *row);
void mem_tree_remove(mem_table *table, mem_path *path); /* the row stays the caller's */
/* false: no memory, and no row has changed. `must`: of a caller that cannot go on without; no
 * test's allocator fails it. */
bool mem_tree_insert(mem_table *table, mem_path *path, mem_row *row, bool must);
void mem_tree_clear(mem_table *table); /* frees the rows */

/* ---- store_memory.c ---- */
bool mem_is_memory(const sh_store *store);
void mem_forget(mem_undo *undo, size_t n);                     /* what these notes keep */
void mem_undo_all(mem_store *store, mem_undo *undo, size_t n); /* takes the writes back */
void mem_empty(mem_store *store);
sh_status mem_copy_rows(mem_store *to, const mem_store *from, sh_error *err);

/* ---- store_simulated.c; each is SH_OK at once without a simulated disk ---- */
sh_status mem_sim_begin(const mem_store *store, sh_error *err);
sh_status mem_sim_write_slow(mem_store *store, sh_error *err);
static inline sh_status mem_sim_write(mem_store *store, sh_error *err) /* a put or del */
{
    return store->sim ? mem_sim_write_slow(store, err) : SH_OK;
}
/* *durable false: the transaction did not reach the disk. */
sh_status mem_sim_commit(mem_store *store, bool *durable, sh_error *err);
/* Takes over the notes of a commit that is not durable yet; false: it is. */
bool mem_sim_keep(mem_store *store, mem_txn *txn);
sh_status mem_sim_sync(mem_store *store, sh_error *err);
void mem_sim_release(mem_store *store);

#endif
