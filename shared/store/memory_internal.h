/*
 * What the store in memory and its simulated disk share. Private to the module.
 *   store_memory.c     tables, transactions, cursors
 *   store_simulated.c  crashes, unsynced commits, a full disk, corruption, copies
 */
#ifndef SH_STORE_MEMORY_INTERNAL_H
#define SH_STORE_MEMORY_INTERNAL_H

#include <stdatomic.h>

#include "shared/store/backend.h"
#include "shared/store/simulated.h"

#define HEIGHT_MAX 12 /* with one node in four a level higher: good for 4^12 nodes */

typedef struct mem_node mem_node;
struct mem_node {
    uint64_t prefix; /* the key's first bytes, big-endian, with zeros behind a shorter one */
    uint32_t value_n;
    uint8_t key_n, height;
    bool dead;        /* taken out; a cursor may still stand on it */
    mem_node *next[]; /* [height], then the key's bytes, then the value's */
};

typedef struct {
    uint64_t count;
    uint8_t levels; /* no node was ever higher */
    mem_node *head[HEIGHT_MAX];
} mem_table;

typedef struct {
    unsigned table;
    mem_node *removed, *added; /* either may be NULL */
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
    uint64_t used;       /* bytes of all live nodes */
    uint64_t level_bits; /* generator of node heights */
    atomic_int users;    /* -1: a writer; else the number of readers */
    mem_txn writer;
    mem_sim *sim; /* NULL: a disk without faults */
    mem_table tables[];
} mem_store;

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
