/*
 * The daemon and its device: a store that is damaged, at the start and while it runs, signals of
 * files and commands. argv[1]: shoal-node.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge-node/node.h"
#include "shared/base/file.h"
#include "shared/store/store.h"
#include "tests/e2e/node_rig.h"

#define PAGE 4096

static const char *program;

static int make(void **state)
{
    node_rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    node_rig_make(r, program, NULL);
    *state = r;
    return 0;
}

static int release(void **state)
{
    node_rig_release(*state);
    free(*state);
    return 0;
}

static void start(node_rig *r, const char *const *words)
{
    node_rig_start(r, words, NULL);
    node_rig_ready(r);
}

static json_int_t number(node_rig *r, const char *key)
{
    json_t *status = node_rig_status(r);
    json_t *v = json_object_get(status, key);
    if (!json_is_integer(v))
        fail_msg("no %s in the status", key);
    json_int_t n = json_integer_value(v);
    json_decref(status);
    return n;
}

static bool holds(node_rig *r, const char *policy)
{
    char key[64];
    json_t *status = node_rig_status(r);
    snprintf(key, sizeof key, "policy_%s", policy);
    bool yes = json_is_true(json_object_get(status, key));
    json_decref(status);
    return yes;
}

static void epoch(node_rig *r, char out[32])
{
    json_t *status = node_rig_status(r);
    snprintf(out, 32, "%s", json_string_value(json_object_get(status, "epoch")));
    json_decref(status);
}

static const char *in_node(node_rig *r, const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", r->node, name);
    return path;
}

/* Overwrites bytes [from, to) of the store's file, to 0: its end. */
static void damage(node_rig *r, off_t from, off_t to, int with)
{
    char block[PAGE];
    struct stat st;
    memset(block, with, sizeof block);
    int fd = open(in_node(r, "store/data.mdb"), O_WRONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    for (off_t at = from; at < (to ? to : st.st_size); at += PAGE)
        assert_int_equal(pwrite(fd, block, PAGE, at), PAGE);
    close(fd);
}

static void use(node_rig *r)
{
    char id[64];
    node_rig_complete(r, "so it goes", "bob", id);
    assert_int_equal(node_rig_feedback(r, id, "edit", " again"), 200);
}

/* It goes on: with a store that is another one, and no less than before. */
static void expect_new_store(node_rig *r, json_int_t lost, char before[32])
{
    char now[32];
    use(r);
    assert_int_equal(number(r, "stores_lost"), lost);
    assert_int_equal(number(r, "active_version"), 1);
    epoch(r, now);
    assert_string_not_equal(before, now);
    memcpy(before, now, sizeof now);
    assert_true(node_rig_logged(r, "state=corrupt set_aside=store.corrupt-"));
}

static void test_damaged_at_the_start(void **state)
{
    node_rig *r = *state;
    char was[32];
    start(r, NULL);
    use(r);
    epoch(r, was);
    for (int i = 1; i <= 4; i++) {
        assert_int_equal(node_rig_end(r, i == 2 ? SIGTERM : SIGKILL), i == 2 ? 0 : 128 + SIGKILL);
        if (i == 1) /* its two first pages: not a store any more */
            damage(r, 0, 2 * PAGE, 'x');
        else if (i == 2) /* all behind them: not what was in it */
            damage(r, 2 * PAGE, 0, 0);
        else /* torn off; emptied, as by a file system that had its name on the disk and no more */
            assert_int_equal(truncate(in_node(r, "store/data.mdb"), i == 3 ? 2 * PAGE : 0), 0);
        start(r, NULL);
        expect_new_store(r, i, was);
    }
    assert_false(sh_file_exists(in_node(r, "store.corrupt-2"))); /* two are kept */
    assert_true(sh_file_exists(in_node(r, "store.corrupt-3")));
    assert_true(sh_file_exists(in_node(r, "store.corrupt-4")));
    /* They hold what users wrote: an erasure takes them, too. */
    run_result e = run_program(
        program, (const char *const[]){"erase", "--dir", r->node, "--user", "bob", NULL}, NULL, 0);
    if (e.exit_code != 0)
        fail_msg("erase: exit code %d: %s%s", e.exit_code, e.out, e.err);
    run_release(&e);
    assert_false(sh_file_exists(in_node(r, "store.corrupt-3")));
    assert_false(sh_file_exists(in_node(r, "store.corrupt-4")));
    assert_int_equal(number(r, "stores_lost"), 4);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

/* A crash right after its creation: nothing was in it. */
static void test_empty_before_the_first_start(void **state)
{
    node_rig *r = *state;
    OK(sh_file_write_atomic(in_node(r, "store/data.mdb"), "", 0, err));
    start(r, NULL);
    use(r);
    assert_int_equal(number(r, "stores_lost"), 0);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

static void test_damaged_while_it_runs(void **state)
{
    node_rig *r = *state;
    char was[32], id[64];
    start(r, (const char *const[]){"--store.commit-ms", "0", NULL});
    for (int i = 0; i < 20; i++)
        use(r);
    epoch(r, was);
    damage(r, 2 * PAGE, 0, 0);
    node_rig_complete(r, "so it goes", "bob", id); /* answered, whatever becomes of its record */
    (void)node_rig_feedback(r, id, "edit", " again");
    assert_true(node_rig_saw(r, "state=corrupt"));
    for (int i = 0; i < 3; i++)
        node_rig_complete(r, "so it goes", "bob", id);
    E2E_UNTIL(node_rig_http(r, "GET", "/healthz", NULL, was + 31, 1) == 200, "it is well again");
    expect_new_store(r, 1, was);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    start(r, NULL);
    assert_int_equal(number(r, "stores_lost"), 1);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

/* A release whose file and manifest are sound is served on; one whose file is not, is not. */
static void test_the_release_stays(void **state)
{
    node_rig *r = *state;
    sh_buf model, manifest;
    start(r, NULL);
    assert_int_equal(node_rig_end(r, SIGKILL), 128 + SIGKILL);
    for (uint64_t version = 2; version <= 3; version++) {
        node_rig_release_make(r, version, version, &model, &manifest);
        OK(sh_file_write_atomic(
            in_node(r, version == 2 ? "models/slot1.gguf" : "models/slot0.gguf"), model.data,
            version == 2 ? model.len : model.len - 1, err));
        OK(sh_file_write_atomic(
            in_node(r, version == 2 ? "models/slot1.manifest" : "models/slot0.manifest"),
            manifest.data, manifest.len, err));
        sh_buf_release(&model);
        sh_buf_release(&manifest);
    }
    damage(r, 0, 0, 'x');
    start(r, NULL);
    use(r);
    assert_int_equal(number(r, "active_version"), 2);
    assert_int_equal(number(r, "confirmed_version"), 2);
    assert_int_equal(number(r, "serving_version"), 2);
    assert_int_equal(number(r, "stores_lost"), 1);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

static void put(node_rig *r, const char *name, const char *text)
{
    OK(sh_file_write_atomic(in_node(r, name), text, strlen(text), err));
}

/* One bit of what the store has as the manifest of a slot. */
static void damage_manifest(node_rig *r, const char *slot)
{
    const sh_store_options o = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES};
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    sh_slice value;
    uint8_t copy[4096];
    OK(sh_store_open_lmdb(in_node(r, "store"), &o, &store, err));
    OK(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
    OK(sh_txn_get(txn, SH_NODE_T_META, slot, strlen(slot), &value));
    assert_in_range(value.n, 1, sizeof copy);
    memcpy(copy, value.data, value.n);
    copy[value.n / 2] ^= 1;
    OK(sh_txn_put(txn, SH_NODE_T_META, slot, strlen(slot), copy, value.n, err));
    OK(sh_txn_commit(&txn, err));
    sh_store_close(&store);
}

/* The one beside the file says the same; without that the slot is lost, and the store is not. */
static void test_a_manifest_is_damaged(void **state)
{
    node_rig *r = *state;
    char was[32], now[32];
    test_the_release_stays(state);
    damage_manifest(r, "slot1");
    start(r, NULL);
    assert_true(node_rig_logged(r, "event=manifest_lost version=2 slot=1 state=file-is-sound"));
    assert_int_equal(number(r, "active_version"), 2);
    assert_int_equal(number(r, "serving_version"), 2);
    use(r);
    epoch(r, was);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    put(r, "models/slot1.manifest", "rubbish");
    start(r, NULL);
    assert_true(node_rig_logged(r, "event=manifest_lost version=2 slot=1 state=lost"));
    assert_true(node_rig_logged(r, "event=slot_lost slot=1"));
    assert_int_equal(number(r, "active_version"), 1);
    assert_int_equal(number(r, "serving_version"), 1);
    use(r);
    epoch(r, now);
    assert_string_equal(was, now);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

static void test_signals(void **state)
{
    node_rig *r = *state;
    char hangs[300];
    put(r, "metered", "yes\n");
    put(r, "hot", "20000\n");
    put(r, "hangs", "#!/bin/sh\nsleep 100000\n");
    assert_int_equal(chmod(in_node(r, "hangs"), 0700), 0);
    snprintf(hangs, sizeof hangs, "command:%s", in_node(r, "hangs"));
    start(r, (const char *const[]){"--policy.train.unmetered", "--policy.download.unmetered",
                                   "--policy.windows.temperature-max", "60",
                                   "--policy.feedback.unknown", "wait", "--policy.feedback.power",
                                   "--probe.metered", "file:metered", "--probe.temperature",
                                   "file:hot", "--probe.power", hangs, "--probe.timeout-ms", "100",
                                   "--probe.interval-seconds", "1", NULL});
    E2E_UNTIL(!holds(r, "download"), "a metered network stops downloads"); /* unknown would not */
    assert_false(holds(r, "train"));
    assert_true(holds(r, "windows"));
    assert_false(holds(r, "feedback")); /* whether there is power nobody says */
    use(r);                             /* nothing of it is inference's */
    put(r, "metered", "no\n");
    put(r, "hot", "60000\n");
    E2E_UNTIL(holds(r, "train") && holds(r, "download"), "a free one lets it begin");
    E2E_UNTIL(!holds(r, "windows"), "heat stops windows");
    put(r, "metered", "rubbish\n");
    E2E_UNTIL(!holds(r, "train") && holds(r, "download"), "unknown: as the defaults say");
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    /* A command that hangs, and a time limit that is long: it stops at once. */
    start(r, (const char *const[]){"--probe.power", hangs, "--probe.timeout-ms", "600000", NULL});
    use(r);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    assert_false(node_rig_logged(r, "forced=1"));
}

static void test_usage(void **state)
{
    node_rig *r = *state;
    static const char *const bad[][3] = {
        {"--policy.train.hours", "22-06", "not of the form HH:MM-HH:MM"},
        {"--policy.train.hours", "22:00-24:01", "not of the form HH:MM-HH:MM"},
        {"--policy.windows.hours", "06:00-06:00", "policy.windows.hours"},
        {"--policy.feedback.unknown", "maybe", "not allow or wait"},
        {"--probe.idle", "sysfs", "does not show"},
        {"--probe.power", "fil:x", "not sysfs, file:PATH"},
        {"--device.class", "a name that is longer than thirty-one", "at most 31"},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        run_result e = run_program(
            program, (const char *const[]){"--dir", r->node, bad[i][0], bad[i][1], NULL}, NULL, 0);
        if (e.exit_code != 2 || !strstr(e.err, bad[i][2]))
            fail_msg("%s %s: exit code %d: %s", bad[i][0], bad[i][1], e.exit_code, e.err);
        run_release(&e);
    }
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    program = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_damaged_at_the_start, make, release),
        cmocka_unit_test_setup_teardown(test_empty_before_the_first_start, make, release),
        cmocka_unit_test_setup_teardown(test_damaged_while_it_runs, make, release),
        cmocka_unit_test_setup_teardown(test_the_release_stays, make, release),
        cmocka_unit_test_setup_teardown(test_a_manifest_is_damaged, make, release),
        cmocka_unit_test_setup_teardown(test_signals, make, release),
        cmocka_unit_test_setup_teardown(test_usage, make, release),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
