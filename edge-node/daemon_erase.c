/* Erasing on a store that no daemon has open: the same core, the same events. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "edge-node/setup.h"
#include "shared/base/clock.h"

#define STEPS_MAX 1000000u /* a step deletes many rows */

typedef struct {
    sh_store *store;
    sh_node *node;
    sh_node_actions actions;
    uint64_t timer_ms, now_ms, rows;
    bool done;
} eraser;

static void look_at_actions(eraser *e)
{
    e->timer_ms = 0;
    for (size_t i = 0; i < e->actions.n; i++) {
        const sh_node_action *a = &e->actions.items[i];
        if (a->kind == SH_NODE_SET_TIMER)
            e->timer_ms = a->at_ms;
        if (a->kind == SH_NODE_NOTE && a->note == SH_NOTE_ERASED) {
            e->done = true;
            e->rows = a->number;
        }
    }
    sh_node_actions_clear(&e->actions);
}

static sh_status step(eraser *e, const sh_node_event *event, sh_error *err)
{
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_txn_begin(e->store, SH_TXN_RESERVE, &txn, err));
    SH_GOTO(sh_node_step(e->node, event, txn, &e->actions, err));
    SH_GOTO(sh_txn_commit(&txn, err));
    look_at_actions(e);
cleanup:
    sh_txn_abort(&txn);
    return status;
}

static sh_status make_core(eraser *e, const sh_settings *settings, sh_error *err)
{
    sh_node_options options;
    sh_hash release;
    uint64_t seed;
    sh_rng rng;
    uint8_t *key = NULL, *genesis = NULL;
    size_t n_key = 0, n = 0;
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    sh_settings_node_options(&settings->v, &options);
    SH_GOTO(sh_file_read(SH_NODE_FILE_RELEASE, 1024, &key, &n_key, err));
    while (n_key && key[n_key - 1] == '\n')
        key[--n_key] = 0;
    SH_GOTO(sh_hash_parse((const char *)key, &release, err));
    memcpy(options.release_key.b, release.b, sizeof release.b);
    SH_GOTO(sh_file_read(SH_NODE_FILE_MANIFEST, SH_WIRE_MANIFEST_MAX, &genesis, &n, err));
    sh_random_bytes(&seed, sizeof seed);
    sh_rng_init(&rng, seed, 0, 0x65726173u);
    SH_GOTO(sh_txn_begin(e->store, SH_TXN_RESERVE, &txn, err));
    SH_GOTO(sh_node_create(&options, (sh_bytes){genesis, n}, e->now_ms, &rng, txn, &e->actions,
                           &e->node, err));
    SH_GOTO(sh_txn_commit(&txn, err));
cleanup:
    sh_txn_abort(&txn);
    free(key);
    free(genesis);
    return status;
}

sh_status daemon_mark_erasing(sh_error *err)
{
    return sh_file_write_atomic(SH_NODE_FILE_ERASING, "", 0, err);
}

sh_status sh_erase_offline(const sh_settings *settings, uint64_t user, uint64_t *rows,
                           sh_error *err)
{
    static eraser e; /* its list of actions is large */
    e = (eraser){.now_ms = sh_clock_wall_ms()};
    sh_store_options o = {.tables = sh_node_tables,
                          .n_tables = SH_NODE_TABLES,
                          .bytes_max = (uint64_t)settings->v.store_bytes_max};
    sh_node_event event = {.kind = SH_NODE_ERASE, .now_ms = e.now_ms, .user = user};
    sh_status status = SH_OK;
    SH_GOTO(sh_store_open_lmdb(SH_NODE_DIR_STORE, &o, &e.store, err));
    daemon_empty_work();
    SH_GOTO(make_core(&e, settings, err));
    look_at_actions(&e);
    e.done = false;
    SH_GOTO(daemon_mark_erasing(err));
    SH_GOTO(step(&e, &event, err));
    for (uint32_t i = 0; !e.done; i++) {
        if (i == STEPS_MAX || e.timer_ms == 0)
            SH_GOTO(sh_fail(err, SH_ERR_CORRUPT, "erase: it did not come to its end"));
        e.now_ms = SH_MAX(e.now_ms, e.timer_ms);
        SH_GOTO(step(&e, &(sh_node_event){.kind = SH_NODE_TIMER, .now_ms = e.now_ms}, err));
    }
    sh_node_destroy(&e.node);
    SH_GOTO(sh_store_compact(e.store, err));
    daemon_store_forget_aside();
    (void)unlink(SH_NODE_FILE_ERASING);
    *rows = e.rows;
cleanup:
    sh_node_actions_clear(&e.actions);
    sh_node_destroy(&e.node);
    sh_store_close(&e.store);
    return status;
}
