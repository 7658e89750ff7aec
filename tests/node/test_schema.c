/*
 * A store that version 1 of the program left (store-v1.txt: 330 inferences, an alarm, an update
 * owed, a release half taken) is opened by this one, on disk: everything is as it was, and the node
 * goes on.
 */
#include "tests/node/rig.h"
#include "tests/store/dump.h"
#include "tests/store/util.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SEED 11 /* of the rig that made it: its keys and releases */

static sh_store *open_lmdb(const char *dir)
{
    sh_store *store = NULL;
    sh_store_options options = {
        .tables = sh_node_tables, .n_tables = SH_NODE_TABLES, .bytes_max = 64u << 20};
    OK(sh_store_open_lmdb(dir, &options, &store, &test_err));
    return store;
}

static rig *open_rig(const temp_dir *dir)
{
    rig *r = rig_open(SEED);
    sh_store_close(&r->store);
    r->store = open_lmdb(dir->path);
    rig_make_release(r, 2, 2000);
    rig_make_release(r, 3, SH_CHUNK_BYTES + 700);
    /* What the shell has in its slots. */
    r->slots[1] = sh_sha256(r->releases[1].model.data, r->releases[1].model.len);
    return r;
}

static void load(rig *r)
{
    OK(dump_read(r->store, sh_node_tables, SH_NODE_TABLES,
                 SHOAL_SOURCE_DIR "/tests/node/store-v1.txt", &test_err));
}

static void dump(rig *r, const char *path)
{
    OK(dump_write(r->store, sh_node_tables, SH_NODE_TABLES, path, &test_err));
}

/* A row's line; the one of META "lease", which each start writes anew, is left out. */
static bool next_row(FILE *f, char **line, size_t *cap)
{
    ssize_t n;
    do
        n = getline(line, cap, f);
    while (n > 0 && strncmp(*line, "meta 6c65617365 ", 16) == 0);
    return n > 0;
}

static void assert_same_files(const char *a, const char *b)
{
    FILE *f = fopen(a, "r"), *g = fopen(b, "r");
    assert_true(f != NULL && g != NULL);
    char *x = NULL, *y = NULL;
    size_t cap_x = 0, cap_y = 0;
    bool more;
    do {
        more = next_row(f, &x, &cap_x);
        assert_int_equal(next_row(g, &y, &cap_y), more);
        if (more)
            assert_string_equal(x, y);
    } while (more);
    free(x);
    free(y);
    fclose(f);
    fclose(g);
}

static sh_status check_feedback(void *arg, const sh_feedback *row)
{
    unsigned *n = arg;
    static const uint32_t lengths[] = {20, 40, 30};
    assert_true(*n < 3);
    SAME(row->n, lengths[*n]);
    SAME(row->session, *n == 2 ? 2 : 1);
    SAME(row->target, *n > 0);
    SAME(row->user, 0);
    SAME(row->at_ms, 1000); /* when it was migrated, so that its age begins then */
    SAME(row->tokens[row->n - 1], row->offset + row->n - 1);
    (*n)++;
    return SH_OK;
}

static uint32_t stored_schema(rig *r)
{
    sh_txn *txn = NULL;
    sh_slice value;
    uint32_t schema = 1;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    if (sh_txn_get(txn, SH_NODE_T_META, "schema", 6, &value) == SH_OK) {
        SAME(value.n, 4);
        schema = ((const uint8_t *)value.data)[0];
    }
    sh_txn_abort(&txn);
    return schema;
}

static void assert_as_it_was(rig *r)
{
    sh_node_status s = rig_status(r);
    SAME(s.epoch, 0x39a3f14e329ad0e);
    SAME(s.active_version, 2);
    SAME(s.confirmed_version, 2);
    SAME(s.active_slot, 1);
    SAME(s.updates_made, 2);
    SAME(s.updates_acked, 1);
    SAME(s.inferences, 330);
    SAME(s.windows, 11);
    SAME(s.alarms, 1);
    SAME(s.first_alarm_window, 8);
    SAME(s.feedback_tokens, 70);
    SAME(s.outbox_items, 10);
    SAME(s.bad_messages, 0);
    SAME(s.drifting, true);
    SAME(s.last_completion, 0);
    SAME(rig_count(r, SH_NODE_T_RECORD), 100);
    SAME(rig_count(r, SH_NODE_T_WINDOW), 4);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 2);
    SAME(rig_count(r, SH_NODE_T_LEDGER), 3);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 0);
    unsigned n = 0;
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_each_feedback(txn, check_feedback, &n, &test_err));
    sh_txn_abort(&txn);
    SAME(n, 3);
}

static void test_from_version_1(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    rig *r = open_rig(&dir);
    char first[128], second[128];
    snprintf(first, sizeof(first), "%s/first.txt", dir.path);
    snprintf(second, sizeof(second), "%s/second.txt", dir.path);
    load(r);
    SAME(stored_schema(r), 1);
    rig_start(r);
    SAME(r->active_version, 2);
    SAME(stored_schema(r), 3);
    assert_as_it_was(r);
    /* The second start migrates nothing. */
    dump(r, first);
    r->now += 5000;
    rig_restart(r);
    dump(r, second);
    assert_same_files(first, second);
    assert_as_it_was(r);
    /* It goes on: gives what it owed, takes the rest of the release, learns by id. */
    r->options.completions_max = 100;
    rig_restart(r);
    rig_infer(r, 400, false);
    rig_rate(r, 401, SH_FEEDBACK_ACCEPT, 0);
    SAME(rig_status(r).feedback_tokens, 74);
    r->now += 1000;
    rig_link(r, true);
    r->offer = 3;
    rig_run(r, 10000, true);
    SAME(rig_status(r).updates_acked, 2);
    SAME(rig_status(r).outbox_items, 0);
    SAME(rig_status(r).active_version, 3);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    rig_close(&r);
    temp_dir_remove(&dir);
}

/* A crash before create's commit leaves the old store. */
static void test_crash_in_it(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    rig *r = open_rig(&dir);
    sh_txn *txn = NULL;
    sh_rng rng;
    load(r);
    sh_rng_init(&rng, SEED, 0, 79);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_node_create(&r->options, rig_manifest(r, 1), r->now, &rng, txn, &r->actions, &r->node,
                      &test_err));
    sh_txn_abort(&txn);
    sh_node_destroy(&r->node);
    SAME(stored_schema(r), 1);
    rig_start(r);
    assert_as_it_was(r);
    rig_close(&r);
    temp_dir_remove(&dir);
}

static void test_newer_is_refused(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    rig *r = open_rig(&dir);
    sh_txn *txn = NULL;
    sh_rng rng;
    load(r);
    sh_rng_init(&rng, SEED, 0, 79);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_txn_put(txn, SH_NODE_T_META, "schema", 6, "\x04\0\0\0", 4, &test_err));
    SAME(sh_node_create(&r->options, rig_manifest(r, 1), r->now, &rng, txn, &r->actions, &r->node,
                        &test_err),
         SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(test_err.text, "schema version 4"));
    assert_non_null(strstr(test_err.text, "up to 3"));
    assert_null(r->node);
    sh_txn_abort(&txn);
    rig_close(&r);
    temp_dir_remove(&dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_from_version_1),
        cmocka_unit_test(test_crash_in_it),
        cmocka_unit_test(test_newer_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
