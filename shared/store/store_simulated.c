#include "shared/store/simulated.h"

#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/store/memory_internal.h"

static mem_store *memory_store(sh_store *store)
{
    SH_ASSERT(mem_is_memory(store));
    return (mem_store *)store;
}

/* The disk's struct, made at its first use. It is a simulator's: without memory it cannot go on. */
static mem_sim *sim_of(sh_store *base)
{
    mem_store *store = memory_store(base);
    if (!store->sim) {
        store->sim = calloc(1, sizeof(*store->sim));
        SH_ASSERT(store->sim != NULL);
        store->sim->room = UINT64_MAX;
    }
    return store->sim;
}

static sh_status crashed(sh_error *err)
{
    return sh_fail(err, SH_ERR_CRASHED, "store in memory: simulated crash");
}

/* ---- what the store asks ---- */

sh_status mem_sim_begin(const mem_store *store, sh_error *err)
{
    if (!store->sim)
        return SH_OK;
    if (store->sim->crashed)
        return crashed(err);
    if (store->sim->corrupt)
        return sh_fail(err, SH_ERR_CORRUPT,
                       "store in memory: it cannot be read: set it aside and begin a new one");
    return SH_OK;
}

static bool is_the_write(mem_sim *sim)
{
    return sim->writes_left > 0 && --sim->writes_left == 0;
}

sh_status mem_sim_write_slow(mem_store *store, sh_error *err)
{
    if (is_the_write(store->sim))
        store->sim->crashed = true;
    return store->sim->crashed ? crashed(err) : SH_OK;
}

sh_status mem_sim_commit(mem_store *store, bool *durable, sh_error *err)
{
    mem_sim *sim = store->sim;
    *durable = true;
    if (!sim)
        return SH_OK;
    if (sim->crashed) {
        *durable = false;
        return crashed(err);
    }
    if (!is_the_write(sim))
        return SH_OK;
    sim->crashed = true;
    *durable = sim->durable;
    return crashed(err);
}

static void oldest_is_synced(mem_sim *sim)
{
    mem_forget(sim->commits[0].undo, sim->commits[0].n);
    free(sim->commits[0].undo);
    sim->n_commits--;
    memmove(&sim->commits[0], &sim->commits[1], sim->n_commits * sizeof(sim->commits[0]));
}

bool mem_sim_keep(mem_store *store, mem_txn *txn)
{
    mem_sim *sim = store->sim;
    if (!sim || !sim->unsynced || txn->n == 0)
        return false;
    if (sim->n_commits == SH_STORE_UNSYNCED_MAX)
        oldest_is_synced(sim);
    sim->commits[sim->n_commits++] = (mem_unsynced){.undo = txn->undo, .n = txn->n};
    txn->undo = NULL;
    txn->n = txn->cap = 0;
    return true;
}

sh_status mem_sim_sync(mem_store *store, sh_error *err)
{
    mem_sim *sim = store->sim;
    if (!sim)
        return SH_OK;
    if (sim->crashed)
        return crashed(err);
    while (sim->n_commits > 0)
        oldest_is_synced(sim);
    return SH_OK;
}

void mem_sim_release(mem_store *store)
{
    while (store->sim && store->sim->n_commits > 0)
        oldest_is_synced(store->sim);
    free(store->sim);
    store->sim = NULL;
}

/* ---- what the simulator does ---- */

void sh_store_simulate_crash(sh_store *store, uint64_t writes, bool durable)
{
    mem_sim *sim = sim_of(store);
    sim->writes_left = writes;
    sim->durable = durable;
}

bool sh_store_simulate_crashed(const sh_store *store)
{
    SH_ASSERT(mem_is_memory(store));
    const mem_sim *sim = ((const mem_store *)store)->sim;
    return sim && sim->crashed;
}

void sh_store_simulate_unsynced(sh_store *store, bool on)
{
    mem_sim *sim = sim_of(store);
    while (!on && sim->n_commits > 0)
        oldest_is_synced(sim);
    sim->unsynced = on;
}

uint32_t sh_store_simulate_n_unsynced(const sh_store *store)
{
    SH_ASSERT(mem_is_memory(store));
    const mem_sim *sim = ((const mem_store *)store)->sim;
    return sim ? sim->n_commits : 0;
}

void sh_store_simulate_restart(sh_store *base, uint32_t lose)
{
    mem_store *store = memory_store(base);
    mem_sim *sim = sim_of(base);
    SH_ASSERT(atomic_load(&store->users) == 0);
    for (; lose > 0 && sim->n_commits > 0; lose--) {
        mem_unsynced *last = &sim->commits[--sim->n_commits];
        mem_undo_all(store, last->undo, last->n);
        free(last->undo);
    }
    while (sim->n_commits > 0)
        oldest_is_synced(sim); /* what a restarted machine reads is on the disk */
    sim->writes_left = 0;
    sim->crashed = false;
}

void sh_store_simulate_room(sh_store *store, uint64_t bytes)
{
    sim_of(store)->room = bytes;
}

void sh_store_simulate_corrupt(sh_store *store)
{
    sim_of(store)->corrupt = true;
}

void sh_store_simulate_set_aside(sh_store *base)
{
    mem_store *store = memory_store(base);
    mem_sim *sim = sim_of(base);
    SH_ASSERT(atomic_load(&store->users) == 0);
    while (sim->n_commits > 0)
        oldest_is_synced(sim);
    mem_empty(store);
    sim->writes_left = 0;
    sim->crashed = sim->corrupt = false;
}

sh_status sh_store_restore_memory(sh_store *to, const sh_store *from, sh_error *err)
{
    SH_ASSERT(mem_is_memory(from) && from->n_tables == to->n_tables);
    sh_store_simulate_set_aside(to);
    sh_status status = mem_copy_rows(memory_store(to), (const mem_store *)from, err);
    if (status != SH_OK)
        mem_empty(memory_store(to));
    return status;
}

sh_status sh_store_copy_memory(const sh_store *from, sh_store **out, sh_error *err)
{
    static const char *const names[SH_STORE_TABLES_MAX]; /* the store in memory knows none */
    sh_store_options options = {
        .tables = names,
        .n_tables = from->n_tables,
        .bytes_max = from->bytes_max,
        .reserve_bytes = from->reserve_bytes,
    };
    sh_store *copy = NULL;
    SH_ASSERT(mem_is_memory(from));
    SH_TRY(sh_store_open_memory(&options, &copy, err));
    sh_status status = mem_copy_rows(memory_store(copy), (const mem_store *)from, err);
    if (status != SH_OK) {
        sh_store_close(&copy);
        return status;
    }
    *out = copy;
    return SH_OK;
}
