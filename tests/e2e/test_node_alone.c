/*
 * shoal-node as a process, without an aggregator: set-up, completions, feedback, kill and restart,
 * erasure, refusals. argv[1] is the program.
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

static const char *program;

#define RUN(...) run_program(program, (const char *const[]){__VA_ARGS__, NULL}, NULL, 0)

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

/* Exit code, and one line on stderr (the log's lines aside) that has `text`. */
static void expect_refusal(run_result r, int exit_code, const char *text)
{
    const char *line = strstr(r.err, "shoal-node: ");
    if (r.exit_code != exit_code || !line || !strstr(line, text) ||
        strchr(line, '\n') != r.err + r.n_err - 1)
        fail_msg("exit code %d, stderr \"%s\"; expected %d and \"%s\"", r.exit_code, r.err,
                 exit_code, text);
    run_release(&r);
}

static uint64_t rows_of(node_rig *r, unsigned table)
{
    char path[160];
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    snprintf(path, sizeof path, "%s/store", r->node);
    sh_store_options o = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES, .read_only = true};
    OK(sh_store_open_lmdb(path, &o, &store, err));
    OK(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    uint64_t n = sh_txn_count(txn, table);
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return n;
}

static json_int_t number(json_t *status, const char *key)
{
    json_t *v = json_object_get(status, key);
    if (!json_is_integer(v))
        fail_msg("no %s in the status", key);
    return json_integer_value(v);
}

static void test_init(void **state)
{
    node_rig *r = *state;
    struct stat st;
    char path[160];
    static const char *const secrets[] = {"node.key", "admin.key"};
    for (size_t i = 0; i < SH_COUNT(secrets); i++) {
        snprintf(path, sizeof path, "%s/%s", r->node, secrets[i]);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
    }
    expect_refusal(
        RUN("init", "--dir", r->node, "--bundle", r->bundle, "--aggregator", "tcp://127.0.0.1:1"),
        1, "a node is set up here already");
    expect_refusal(RUN("init", "--dir", temp_path(&r->dir, "x"), "--bundle", r->bundle,
                       "--aggregator", "127.0.0.1"),
                   2, "not of the form tcp://HOST:PORT");
    expect_refusal(RUN("init", "--dir", temp_path(&r->dir, "x")), 2, "--bundle is missing");
    /* A bundle whose model is another one. */
    snprintf(path, sizeof path, "%s/genesis.gguf", r->bundle);
    OK(sh_file_write_atomic(path, "GGUF", 4, err));
    expect_refusal(RUN("init", "--dir", temp_path(&r->dir, "x"), "--bundle", r->bundle,
                       "--aggregator", "tcp://127.0.0.1:1"),
                   2, "not the file that genesis.manifest names");
    assert_false(sh_file_exists(temp_path(&r->dir, "x")));
}

static void test_usage(void **state)
{
    node_rig *r = *state;
    expect_refusal(RUN("walk"), 2, "'walk' is no command");
    expect_refusal(RUN("run"), 2, "--dir is missing");
    expect_refusal(RUN("run", "--dir", "/nonexistent/node"), 2, "no such folder");
    expect_refusal(RUN("run", "--dir", r->bundle), 2, "no node was set up here");
    expect_refusal(RUN("--dir", r->node, "--http.prot", "1"), 2,
                   "nearest known one is --http.port");
    expect_refusal(RUN("--dir", r->node, "--log.level", "loud"), 2, "none of error, warn");
    expect_refusal(RUN("--dir", r->node, "--http.address", "0.0.0.0"), 2, "0.0.0.0");
    expect_refusal(RUN("status", "--dir", r->node), 1, "no shoal-node runs here");
    expect_refusal(RUN("rotate", "--dir", r->node), 1, "start it: shoal-node --dir");
    expect_refusal(RUN("erase", "--dir", r->node), 2, "either --user NAME or --all");
    run_result sample = RUN("sample-config");
    assert_int_equal(sample.exit_code, 0);
    assert_non_null(strstr(sample.out, "commit-ms: 1000"));
    run_release(&sample);
    char path[160];
    snprintf(path, sizeof path, "%s/node.yaml", r->node);
    OK(sh_file_write_atomic(path, "http:\n  prot: 1\n", 16, err));
    expect_refusal(RUN("--dir", r->node), 2, "unknown key 'http.prot'");
}

static void test_serves(void **state)
{
    node_rig *r = *state;
    char id[64], answer[65536];
    start(r, NULL);
    assert_int_equal(node_rig_http(r, "GET", "/healthz", NULL, answer, sizeof answer), 200);
    node_rig_complete(r, "the cat sat on the", "alice", id);
    assert_int_equal(node_rig_feedback(r, id, "edit", " mat and slept"), 200);
    assert_int_equal(node_rig_feedback(r, id, "edit", " mat and slept"), 200); /* said again */
    assert_int_equal(node_rig_feedback(r, id, "accept", NULL), 409);
    assert_int_equal(node_rig_feedback(r, "cmpl-00000000000000ff", "accept", NULL), 404);
    assert_int_equal(node_rig_http(r, "GET", "/metrics", NULL, answer, sizeof answer), 200);
    static const char *const families[] = {"shoal_spool_bytes 0",
                                           "shoal_spool_dropped_total{reason=\"store-full\"} 0",
                                           "shoal_sync_link_up 0",
                                           "shoal_drift_log_evalue{metric=\"nll\"}",
                                           "shoal_training_runs_total{result=\"ok\"} 0",
                                           "process_start_time_seconds ",
                                           "shoal_store_bytes ",
                                           "shoal_windows_total 0"};
    for (size_t i = 0; i < SH_COUNT(families); i++)
        if (!strstr(answer, families[i]))
            fail_msg("no '%s' in the metrics: %s", families[i], answer);
    json_t *s = node_rig_status(r);
    assert_int_equal(number(s, "inferences"), 1);
    assert_int_equal(number(s, "active_version"), 1);
    assert_true(number(s, "feedback_tokens") > 0);
    json_decref(s);
    /* A second one on the folder, and one on its port. */
    expect_refusal(RUN("--dir", r->node, "--http.port", "0"), 1, "is another shoal-node running");
    char port[16];
    snprintf(port, sizeof port, "%u", r->port);
    node_rig other = {0};
    node_rig_make(&other, program, NULL);
    expect_refusal(RUN("--dir", other.node, "--http.port", port), 1, port);
    node_rig_release(&other);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    assert_true(node_rig_logged(r, "event=stop reason=SIGTERM"));
}

/* What was answered is there after a SIGKILL; an inference only after its commit. */
static void test_kill(void **state)
{
    node_rig *r = *state;
    char first[64], second[64];
    start(r, NULL);
    node_rig_complete(r, "a night in the", "alice", first);
    assert_int_equal(node_rig_feedback(r, first, "reject", NULL), 200);
    node_rig_complete(r, "a day on the", "alice", second);
    assert_int_equal(node_rig_feedback(r, second, "edit", " river"), 200);
    assert_int_equal(node_rig_end(r, SIGKILL), 128 + SIGKILL);
    start(r, NULL);
    assert_int_equal(node_rig_feedback(r, first, "reject", NULL), 200);
    assert_int_equal(node_rig_feedback(r, second, "accept", NULL), 409);
    char third[64];
    node_rig_complete(r, "a day on the", "alice", third);
    assert_true(strcmp(third, first) > 0 && strcmp(third, second) > 0); /* ids go on */
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    assert_int_equal(rows_of(r, SH_NODE_T_RECORD), 3); /* a graceful stop commits */
}

/* Dies at a step's commit; before it the rating was not stored, after it it was. */
static void test_failpoints(void **state)
{
    node_rig *r = *state;
    char id[64];
    start(r, NULL);
    node_rig_complete(r, "one two three", "bob", id);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    static const char *const points[] = {"node.before_commit", "node.after_commit"};
    for (size_t i = 0; i < SH_COUNT(points); i++) {
        node_rig_start(r, NULL, points[i]);
        node_rig_ready(r);
        assert_int_equal(node_rig_feedback(r, id, "edit", " four"), -1);
        assert_int_equal(node_rig_wait(r), 128 + SIGKILL);
        assert_true(node_rig_logged(r, points[i]));
        start(r, NULL);
        json_t *s = node_rig_status(r);
        if (i == 0)
            assert_int_equal(number(s, "feedback_tokens"), 0);
        else
            assert_true(number(s, "feedback_tokens") > 0);
        json_decref(s);
        assert_int_equal(node_rig_end(r, SIGTERM), 0);
    }
}

static bool file_has(const char *path, const void *needle, size_t n_needle)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    OK(sh_file_read(path, (size_t)1 << 30, &bytes, &n, err));
    bool there = memmem(bytes, n, needle, n_needle) != NULL;
    free(bytes);
    return there;
}

/* Rows of alice's and bob's; alice's go, by the running node or by the tool alone. */
static void erase_one(node_rig *r, bool running)
{
    char id[64], user[32];
    for (int i = 0; i < 6; i++) {
        snprintf(user, sizeof user, "%s", i % 2 ? "bob" : "alice");
        node_rig_complete(r, i % 2 ? "it was bob who wrote" : "and alice had said", user, id);
        assert_int_equal(node_rig_feedback(r, id, "edit", i % 2 ? " this" : " zzyx zzyx"), 200);
    }
    if (!running)
        assert_int_equal(node_rig_end(r, SIGTERM), 0);
    run_result done = RUN("erase", "--dir", r->node, "--user", "alice");
    unsigned rows = 0;
    if (done.exit_code != 0 || sscanf(done.out, "erased %u rows", &rows) != 1 || rows < 6)
        fail_msg("erase: exit code %d: %s%s", done.exit_code, done.out, done.err);
    run_release(&done);
    if (running) {
        node_rig_complete(r, "still here", "bob", id);
        assert_int_equal(node_rig_end(r, SIGTERM), 0);
    }
}

static void expect_erased(node_rig *r, const int32_t *tokens, size_t n)
{
    char path[160];
    snprintf(path, sizeof path, "%s/store/data.mdb", r->node);
    assert_false(file_has(path, tokens, n * sizeof *tokens));
    assert_true(rows_of(r, SH_NODE_T_FEEDBACK) >= 3); /* bob's */
}

static sh_status take_last(void *arg, const sh_feedback *row)
{
    sh_buf *out = arg;
    if (row->target) {
        sh_buf_clear(out);
        return sh_buf_append(out, row->tokens, row->n * sizeof *row->tokens);
    }
    return SH_OK;
}

/* The tokens of alice's words, from a store that has them. */
static void learn_tokens(node_rig *r, sh_buf *tokens)
{
    char id[64], path[160];
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    start(r, NULL);
    node_rig_complete(r, "and alice had said", "alice", id);
    assert_int_equal(node_rig_feedback(r, id, "edit", " zzyx zzyx"), 200);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    snprintf(path, sizeof path, "%s/store", r->node);
    sh_store_options o = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES, .read_only = true};
    sh_buf_init(tokens, 4096);
    OK(sh_store_open_lmdb(path, &o, &store, err));
    OK(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    OK(sh_node_each_feedback(txn, take_last, tokens, err));
    sh_txn_abort(&txn);
    sh_store_close(&store);
    assert_true(tokens->len >= 4 * sizeof(int32_t));
    snprintf(path, sizeof path, "%s/store/data.mdb", r->node);
    assert_true(file_has(path, tokens->data, tokens->len));
}

static void test_erase(void **state)
{
    node_rig *r = *state;
    sh_buf tokens;
    learn_tokens(r, &tokens);
    for (int running = 0; running < 2; running++) {
        start(r, NULL);
        erase_one(r, running);
        expect_erased(r, (const int32_t *)(const void *)tokens.data, tokens.len / sizeof(int32_t));
    }
    sh_buf_release(&tokens);
}

/* The active slot's file is torn while the node is down: it goes on with the genesis model. */
static void test_torn_slot(void **state)
{
    node_rig *r = *state;
    char path[160], id[64];
    start(r, NULL);
    node_rig_complete(r, "before", "bob", id);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    snprintf(path, sizeof path, "%s/models/slot0.gguf", r->node);
    assert_int_equal(truncate(path, 1000), 0);
    start(r, NULL);
    assert_true(node_rig_logged(r, "event=slot_repaired slot=0"));
    node_rig_complete(r, "after", "bob", id);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
    /* The genesis file as well: nothing is left, which one line says. */
    assert_int_equal(truncate(path, 1000), 0);
    snprintf(path, sizeof path, "%s/genesis.gguf", r->node);
    assert_int_equal(truncate(path, 1000), 0);
    run_result done = RUN("--dir", r->node, "--http.port", "0");
    assert_true(done.exit_code != 0);
    assert_non_null(strstr(done.err, "put it back from the aggregator's bundle"));
    run_release(&done);
}

/* A store that is full: inference goes on, feedback says so, health too; erasing makes room. */
static void test_full(void **state)
{
    node_rig *r = *state;
    static char text[8192];
    char id[64], answer[8192];
    int status = 0, i;
    for (size_t at = 0; at + 3 < sizeof text / 2; at += 2)
        memcpy(text + at, " z", 3);
    start(r, (const char *const[]){"--store.bytes-max", "8388608", "--feedback.tokens-max",
                                   "100000000", NULL});
    for (i = 0; i < 4000 && status != 507; i++) {
        node_rig_complete(r, "so it goes", "bob", id);
        status = node_rig_feedback(r, id, "edit", text);
        if (status != 200 && status != 507)
            fail_msg("feedback %d: status %d", i, status);
    }
    assert_int_equal(status, 507);
    assert_true(i > 100);
    assert_true(node_rig_logged(r, "event=store state=full"));
    node_rig_complete(r, "so it goes", "bob", id);
    assert_int_equal(node_rig_http(r, "GET", "/healthz", NULL, answer, sizeof answer), 503);
    assert_non_null(strstr(answer, "store is full"));
    run_result done = RUN("erase", "--dir", r->node, "--all");
    if (done.exit_code != 0)
        fail_msg("erase: exit code %d: %s%s", done.exit_code, done.out, done.err);
    run_release(&done);
    node_rig_complete(r, "and goes on", "bob", id);
    assert_int_equal(node_rig_feedback(r, id, "edit", " again"), 200);
    assert_int_equal(node_rig_http(r, "GET", "/healthz", NULL, answer, sizeof answer), 200);
    assert_int_equal(node_rig_end(r, SIGTERM), 0);
}

static void test_token(void **state)
{
    node_rig *r = *state;
    char path[160], answer[4096];
    snprintf(path, sizeof path, "%s/token", r->node);
    OK(sh_file_write_atomic(path, "s3cret\n", 7, err));
    assert_int_equal(chmod(path, 0644), 0);
    expect_refusal(RUN("--dir", r->node, "--http.port", "0", "--http.token-file", path), 2,
                   "others may read it");
    assert_int_equal(chmod(path, 0600), 0);
    start(r, (const char *const[]){"--http.token-file", path, NULL});
    assert_int_equal(node_rig_http(r, "GET", "/v1/models", NULL, answer, sizeof answer), 401);
    assert_int_equal(node_rig_http(r, "GET", "/healthz", NULL, answer, sizeof answer), 200);
    assert_int_equal(node_rig_end(r, SIGINT), 0);
    assert_false(node_rig_logged(r, "s3cret"));
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    program = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_init, make, release),
        cmocka_unit_test_setup_teardown(test_usage, make, release),
        cmocka_unit_test_setup_teardown(test_serves, make, release),
        cmocka_unit_test_setup_teardown(test_kill, make, release),
        cmocka_unit_test_setup_teardown(test_failpoints, make, release),
        cmocka_unit_test_setup_teardown(test_erase, make, release),
        cmocka_unit_test_setup_teardown(test_torn_slot, make, release),
        cmocka_unit_test_setup_teardown(test_full, make, release),
        cmocka_unit_test_setup_teardown(test_token, make, release),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
