#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/fleets.h"

#include "edge-node/node.h"
#include "shared/base/file.h"

const char *const fleets_eager_aggregator[] = {FLEETS_SMALL_LEARNING,
                                               "--learn.drifting-min",
                                               "0",
                                               "--learn.buffer",
                                               "2",
                                               "--canary.nodes-min",
                                               "1",
                                               "--canary.tokens-min",
                                               "20",
                                               "--canary.ms-max",
                                               "5000",
                                               "--learn.round-ms-max",
                                               "5000",
                                               NULL};
const char *const fleets_eager_node[] = {"--monitor.window",
                                         "16",
                                         "--monitor.reference",
                                         "64",
                                         "--evaluate.tokens-min",
                                         "4",
                                         "--feedback.tokens-max",
                                         "1000000",
                                         "--completions.count-max",
                                         "100000",
                                         "--windows.count-max",
                                         "100000",
                                         NULL};

static sh_status count(void *arg, const sh_feedback *row)
{
    *(uint64_t *)arg += row->target;
    return SH_OK;
}

void fleets_check_feedback(e2e_fleet *f, unsigned node, uint64_t acknowledged, uint64_t doubtful)
{
    char path[SH_PATH_BYTES];
    sh_store_options o = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES, .read_only = true};
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    uint64_t pieces = 0;
    OK(sh_path_join(path, sizeof path, f->nodes[node].dir, "store", err));
    OK(sh_store_open_lmdb(path, &o, &store, err));
    OK(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    OK(sh_node_each_feedback(txn, count, &pieces, err));
    sh_txn_abort(&txn);
    sh_store_close(&store);
    print_message("%s: %llu pieces of feedback; %llu were acknowledged, %llu are in doubt\n",
                  f->nodes[node].name, (unsigned long long)pieces, (unsigned long long)acknowledged,
                  (unsigned long long)doubtful);
    if (pieces < acknowledged || pieces > acknowledged + doubtful)
        fail_msg("%s: feedback was lost or doubled", f->nodes[node].name);
    assert_true(acknowledged > 0);
}

fleets_scene *fleets_scene_make(const char *bin, uint64_t seed)
{
    fleets_scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    s->fleet = (e2e_fleet){
        .bin = bin, .aggregator_words = fleets_eager_aggregator, .node_words = fleets_eager_node};
    e2e_fleet_make(&s->fleet, FLEETS_NODES);
    e2e_fleet_start(&s->fleet);
    for (unsigned i = 0; i < FLEETS_NODES; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = seed + i;
        u->pause_ms = 10;
        atomic_store(&u->port, s->fleet.nodes[i].port);
        e2e_user_start(u);
    }
    return s;
}

void fleets_scene_release(fleets_scene *s)
{
    for (unsigned i = 0; i < FLEETS_NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_release(&s->fleet);
    free(s);
}
