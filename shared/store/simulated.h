/*
 * The disk under a memory store, as the simulator needs it: crashes in the middle of a transaction,
 * commits that a crash takes back, a disk that is full, an environment that cannot be read, copies.
 * For experiments and tests; all of it is for stores of sh_store_open_memory, and costs nothing
 * while it is not used.
 *
 * After a crash (any function says SH_ERR_CRASHED) every begin, put, del, commit and sync of the
 * store says so until sh_store_simulate_restart, which leaves what the disk holds. Close the
 * transactions before that.
 *
 * Threads: as the store's.
 */
#ifndef SH_STORE_SIMULATED_H
#define SH_STORE_SIMULATED_H

#include "shared/store/store.h"

#define SH_STORE_UNSYNCED_MAX 64u /* commits that are kept apart; older ones are on the disk */

/* The process dies at the writes-th put, del or commit of a write transaction from now on (1: the
 * next one). In a commit, `durable` says whether the transaction is on the disk: it is there whole
 * or not at all. writes 0: no crash is to come. */
void sh_store_simulate_crash(sh_store *store, uint64_t writes, bool durable);
bool sh_store_simulate_crashed(const sh_store *store);
/* A commit is durable only once sh_store_sync, or SH_STORE_UNSYNCED_MAX later commits, have
 * returned: what a store without syncs would be. Off: every commit is durable when it returns. */
void sh_store_simulate_unsynced(sh_store *store, bool on);
/* Commits that are not durable yet. */
uint32_t sh_store_simulate_n_unsynced(const sh_store *store);
/* The machine starts again: the last `lose` of the commits that were not synced are gone, at most
 * all of them. Clears a crash. No transaction is open. */
void sh_store_simulate_restart(sh_store *store, uint32_t lose);
/* The disk is full when the store has this many bytes: an ordinary transaction adds nothing beyond.
 * The reserve is on the disk already: SH_TXN_RESERVE may use reserve_bytes more. UINT64_MAX: all
 * that the store was opened with. */
void sh_store_simulate_room(sh_store *store, uint64_t bytes);
/* Every begin says SH_ERR_CORRUPT, until the environment is set aside. */
void sh_store_simulate_corrupt(sh_store *store);
/* What a shell does with it: an empty environment is there instead. Clears corruption and a crash.
 */
void sh_store_simulate_set_aside(sh_store *store);
/* A copy of what is committed: a cloned disk, or a backup. No write transaction is open. */
SH_MUST_USE sh_status sh_store_copy_memory(const sh_store *from, sh_store **out, sh_error *err);
/* to holds what from holds: a restored backup. No transaction is open in either. */
SH_MUST_USE sh_status sh_store_restore_memory(sh_store *to, const sh_store *from, sh_error *err);

#endif
