/*
 * A node that knows docs/protocol.md and nothing of our code (protocol_node.mjs) against a real
 * shoal-aggregator, and what is then in the aggregator's store. Skipped aloud by protocol_node.test
 * where npm or its packages cannot be had. argv: shoal-aggregator, shoal.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "shared/base/file.h"
#include "shared/stats/window.h"
#include "tests/e2e/aggregator_rig.h"

#define SKIPPED 77

static const char *program, *tool;
static bool skipped;

static int make(void **state)
{
    agg_rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    *state = r;
    agg_make(r, program, tool);
    agg_start(r, NULL, NULL);
    agg_ready(r);
    return 0;
}

static int release(void **state)
{
    agg_release(*state);
    free(*state);
    return 0;
}

typedef struct {
    sh_hash node;
    uint64_t epochs[2];
    unsigned seen[2][8]; /* windows of each epoch, by sequence */
    unsigned others;
} expected;

static sh_status look_at(void *arg, const sh_update_id *id, sh_bytes payload)
{
    expected *e = arg;
    sh_window w;
    OK(sh_window_decode(payload.data, payload.n, &w, err));
    assert_int_equal(w.inferences, 3);
    assert_int_equal(w.prompt_tokens, 30);
    assert_int_equal(w.feedback[SH_FEEDBACK_ACCEPT], 2);
    assert_true(sh_window_mean(&w, SH_METRIC_NLL) == 4);
    assert_memory_equal(&id->node, &e->node, sizeof e->node);
    for (unsigned i = 0; i < 2; i++)
        if (id->epoch == e->epochs[i] && id->seq < SH_COUNT(e->seen[i])) {
            assert_int_equal(w.index, i == 0 ? id->seq : 5);
            e->seen[i][id->seq]++;
            return SH_OK;
        }
    e->others++;
    return SH_OK;
}

/* What was acknowledged is there, once; what was given up for dropped is not. */
static void check_store(agg_rig *r, expected *e)
{
    char path[SH_PATH_BYTES];
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    sh_store_options o = {
        .tables = sh_coord_tables, .n_tables = SH_COORD_TABLES, .read_only = true};
    OK(sh_path_join(path, sizeof path, r->dir, "store", err));
    OK(sh_store_open_lmdb(path, &o, &store, err));
    OK(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    OK(sh_coord_each_item(txn, SH_COORD_T_WINDOW, look_at, e, err));
    sh_txn_abort(&txn);
    sh_store_close(&store);
    const unsigned first[] = {0, 1, 0, 1, 1, 0, 0, 0}, second[] = {0, 1, 0, 0, 0, 0, 0, 0};
    assert_memory_equal(e->seen[0], first, sizeof first);
    assert_memory_equal(e->seen[1], second, sizeof second);
    assert_int_equal(e->others, 0);
}

static void a_node_in_another_language(void **state)
{
    agg_rig *r = *state;
    char bundle[SH_PATH_BYTES];
    expected e = {0};
    int code;
    json_t *token = agg_tool(r, (const char *[]){"token", "add", "--uses", "1", NULL}, &code);
    assert_int_equal(code, 0);
    OK(sh_path_join(bundle, sizeof bundle, r->dir, "bundle", err));
    run_result run = run_program(
        "/bin/sh",
        (const char *const[]){SHOAL_SOURCE_DIR "/tests/e2e/protocol_node.test", r->endpoint, bundle,
                              json_string_value(json_object_get(token, "token")), NULL},
        NULL, 0);
    json_decref(token);
    skipped = run.exit_code == SKIPPED;
    if (skipped)
        print_message("%s", run.out);
    else if (run.exit_code != 0)
        fail_msg("exit code %d: %s%s", run.exit_code, run.out, run.err);
    json_t *said = skipped ? NULL : json_loads(run.out, 0, NULL);
    run_release(&run);
    assert_int_equal(agg_end(r, SIGTERM), 0);
    if (skipped)
        return;
    assert_non_null(said);
    OK(sh_hash_parse(json_string_value(json_object_get(said, "key")), &e.node, err));
    for (size_t i = 0; i < 2; i++)
        e.epochs[i] = strtoull(
            json_string_value(json_array_get(json_object_get(said, "epochs"), i)), NULL, 10);
    json_decref(said);
    check_store(r, &e);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_node_in_another_language, make, release),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed == 0 && skipped ? SKIPPED : failed;
}
