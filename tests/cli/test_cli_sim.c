/*
 * `shoal-sim` as a script sees it: standard output, standard error and exit code of good and bad
 * uses. argv[1] is the program.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "tests/cli/run.h"
#include "tests/store/util.h"

static const char *program;

#define RUN(...) run_program(program, (const char *const[]){__VA_ARGS__, NULL}, NULL, 0)
/* A fleet that is done in a moment. */
#define SMALL                                                                                      \
    "run", "--learning", "cost", "--nodes", "4", "--monitor.window", "32", "--monitor.reference",  \
        "64", "--users.windows-before", "4", "--learn.tokens-min", "512"

#define OK(call)                                                                                   \
    do {                                                                                           \
        sh_error ok_err_ = {0};                                                                    \
        sh_error *err = &ok_err_;                                                                  \
        sh_status ok_status_ = (call);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s (%s)", #call, sh_status_name(ok_status_), err->text);                 \
    } while (0)

static int make_dir(void **state)
{
    temp_dir *dir = calloc(1, sizeof *dir);
    assert_non_null(dir);
    *dir = temp_dir_make();
    *state = dir;
    return 0;
}

static int remove_dir(void **state)
{
    temp_dir_remove(*state);
    free(*state);
    return 0;
}

static const char *in(void **state, const char *name)
{
    return temp_path(*state, name);
}

static void put_file(void **state, const char *name, const char *text)
{
    OK(sh_file_write_atomic(in(state, name), text, strlen(text), err));
}

/* Exit code 2, nothing on stdout, and this one line on stderr. */
static void expect_refusal(run_result r, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void expect_refusal(run_result r, const char *format, ...)
{
    char line[1024] = "shoal-sim: ";
    size_t n = strlen(line);
    va_list args;
    va_start(args, format);
    n += (size_t)vsnprintf(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    assert_true(n < sizeof line - 1);
    memcpy(line + n, "\n", 2);
    if (r.exit_code != 2 || r.n_out != 0 || strcmp(r.err, line) != 0)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\"; expected 2 and \"%s\"", r.exit_code,
                 r.out, r.err, line);
    run_release(&r);
}

/* The one JSON object on stdout; the caller's. */
static json_t *expect_json(run_result r, int exit_code)
{
    json_error_t where;
    json_t *document = json_loads(r.out, 0, &where); /* one value and nothing after it */
    if (r.exit_code != exit_code || !json_is_object(document))
        fail_msg("exit code %d, expected %d; %s\nstdout \"%.2000s\"\nstderr \"%s\"", r.exit_code,
                 exit_code, document ? "" : where.text, r.out, r.err);
    run_release(&r);
    return document;
}

static void test_usage(void **state)
{
    (void)state;
    static const char usage[] = "usage: shoal-sim run [EXPERIMENT] [options]\n"
                                "       shoal-sim faults [options]\n"
                                "       shoal-sim run --help, shoal-sim faults --help\n";
    run_result r = run_program(program, (const char *const[]){NULL}, NULL, 0);
    assert_int_equal(r.exit_code, 2);
    assert_string_equal(r.out, "");
    assert_string_equal(r.err, usage);
    run_release(&r);
    r = RUN("--help");
    assert_int_equal(r.exit_code, 0);
    assert_string_equal(r.out, usage);
    assert_string_equal(r.err, "");
    run_release(&r);
    expect_refusal(RUN("walk"), "unknown command 'walk'; there are run and faults");
    r = RUN("run", "--help");
    assert_int_equal(r.exit_code, 0);
    assert_string_equal(r.err, "");
    static const char *const keys[] = {"--nodes", "--learn.rounds", "--faults.crash-rate",
                                       "--json"};
    for (size_t i = 0; i < SH_COUNT(keys); i++)
        if (!strstr(r.out, keys[i]))
            fail_msg("no %s in the help: %s", keys[i], r.out);
    run_release(&r);
}

static void test_experiment(void **state)
{
    put_file(state, "experiment.yaml", "nodes: 4\nlearn:\n  rank: 8\n  ruonds: 3\n");
    expect_refusal(
        RUN("run", in(state, "")),
        "%sexperiment.yaml:4: unknown key 'learn.ruonds': the nearest known one is learn.rounds",
        in(state, ""));
    put_file(state, "experiment.yaml", "nodes: 4\nnetwork: {drop: 1.5}\n");
    run_result r = RUN("run", in(state, ""));
    char place[128];
    snprintf(place, sizeof place, "shoal-sim: %s:2: ", in(state, "experiment.yaml"));
    if (r.exit_code != 2 || strncmp(r.err, place, strlen(place)) != 0 || !strstr(r.err, "1.5"))
        fail_msg("exit code %d, stderr \"%s\"", r.exit_code, r.err);
    run_release(&r);
    expect_refusal(RUN("run", in(state, "nothing")), "cannot open '%s': No such file or directory",
                   in(state, "nothing/experiment.yaml"));
    expect_refusal(RUN("run", "a", "b"), "one EXPERIMENT at most; \"b\" is a second one");
}

static void test_flags(void **state)
{
    (void)state;
    expect_refusal(RUN("run", "--nodes", "0"),
                   "--nodes: '0' is not a whole number from 1 to 100000");
    expect_refusal(RUN("run", "--nodez", "3"),
                   "unknown option '--nodez': the nearest known one is --nodes");
    expect_refusal(RUN(SMALL, "--learning", "rael"), "learning: \"rael\" is neither real nor cost");
    expect_refusal(RUN(SMALL, "--store", "disk"), "store: \"disk\" is neither lmdb nor memory");
    expect_refusal(RUN("run", "--store", "memory"),
                   "store: real learning needs lmdb, whose files the audit reads");
    expect_refusal(RUN(SMALL, "--faults.poison-sign-node", "4"),
                   "faults.poison-sign-node: node 4, but the fleet has nodes 0 to 3");
    expect_refusal(RUN(SMALL, "--faults.merge-failpoint", "merge.commit"),
                   "faults.merge-failpoint: \"merge.commit\" is none of merge.before_commit, "
                   "merge.after_commit, gate.before_commit, gate.after_commit");
}

/* When an input is missing only a summary is written, which says so; the folder can be used again.
 */
static void test_inputs(void **state)
{
    char out[128], texts[128];
    snprintf(out, sizeof out, "%s", in(state, "run"));
    snprintf(texts, sizeof texts, "%s", in(state, "texts"));
    put_file(state, "base.gguf", "GGUF");
    expect_refusal(RUN("run", "--base", in(state, "none.gguf"), "--out", out),
                   "%s: not there; --base should name a GGUF model", in(state, "none.gguf"));
    expect_refusal(RUN("run", "--base", in(state, "base.gguf"), "--texts", texts, "--out", out),
                   "%s/manifest.json: not there; scripts/make-texts %s makes the texts", texts,
                   texts);
    json_t *summary = NULL;
    OK(sh_json_load(in(state, "run/summary.json"), &summary, err));
    assert_true(json_is_false(json_object_get(summary, "ok")));
    assert_non_null(strstr(json_string_value(json_object_get(summary, "error")), texts));
    json_decref(summary);
    assert_false(sh_file_exists(in(state, "run/nodes")));
    /* A model that is none. */
    OK(sh_dir_make(texts, err));
    put_file(state, "texts/manifest.json", "{\"topics\": [\"one\"]}\n");
    run_result r = RUN("run", "--base", in(state, "base.gguf"), "--texts", texts, "--out", out);
    if (r.exit_code != 2 || r.n_out != 0 || !strstr(r.err, in(state, "base.gguf")) ||
        strchr(r.err, '\n') != r.err + r.n_err - 1)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\"", r.exit_code, r.out, r.err);
    run_release(&r);
}

/* A folder that has a run is left as it is. */
static void test_out(void **state)
{
    const char *out = in(state, "run");
    json_t *first = expect_json(RUN(SMALL, "--learn.rounds", "3", "--json", "--out", out), 0);
    json_t *saved = NULL, *still = NULL;
    OK(sh_json_load(in(state, "run/summary.json"), &saved, err));
    assert_true(json_equal(first, saved));
    expect_refusal(RUN(SMALL, "--seed", "2", "--out", in(state, "run")),
                   "%s: there is a run in it already; give another --out or remove it",
                   in(state, "run/nodes"));
    OK(sh_json_load(in(state, "run/summary.json"), &still, err));
    assert_true(json_equal(saved, still));
    json_decref(first);
    json_decref(saved);
    json_decref(still);
    put_file(state, "file", "");
    run_result r = RUN(SMALL, "--out", in(state, "file/run"));
    if (r.exit_code == 0 || r.n_out != 0 || !strstr(r.err, in(state, "file")) ||
        strchr(r.err, '\n') != r.err + r.n_err - 1)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\"", r.exit_code, r.out, r.err);
    run_release(&r);
}

static void test_json(void **state)
{
    (void)state;
    json_t *a = expect_json(RUN(SMALL, "--store", "memory", "--learn.rounds", "3", "--json"), 0);
    json_t *b = expect_json(
        RUN(SMALL, "--store", "memory", "--learn.rounds", "3", "--threads", "3", "--json"), 0);
    json_t *c = expect_json(
        RUN(SMALL, "--store", "memory", "--learn.rounds", "3", "--seed", "9", "--json"), 0);
    const char *hash = json_string_value(json_object_get(a, "result_hash"));
    assert_non_null(hash);
    assert_int_equal(strlen(hash), 64);
    assert_int_equal(strspn(hash, "0123456789abcdef"), 64);
    assert_string_equal(hash, json_string_value(json_object_get(b, "result_hash")));
    assert_string_not_equal(hash, json_string_value(json_object_get(c, "result_hash")));
    assert_true(json_is_true(json_object_get(a, "ok")));
    assert_int_equal(json_integer_value(json_object_get(a, "nodes")), 4);
    assert_int_equal(json_integer_value(json_object_get(c, "seed")), 9);
    json_decref(a);
    json_decref(b);
    json_decref(c);
}

/* A number that does not hold is exit code 1, and the summary says which. */
static void test_numbers(void **state)
{
    (void)state;
    json_t *d = expect_json(RUN(SMALL, "--store", "memory", "--learn.rounds", "1", "--json",
                                "--faults.merge-crash", "1000"),
                            1);
    const json_t *row;
    size_t i;
    bool seen = false;
    assert_true(json_is_false(json_object_get(d, "ok")));
    json_array_foreach(json_object_get(d, "checks"), i, row)
    {
        const char *name = json_string_value(json_object_get(row, "name"));
        if (strcmp(name, "the aggregator crashed in a merge") == 0)
            seen = json_is_false(json_object_get(row, "ok"));
    }
    assert_true(seen);
    json_decref(d);
}

/* The simulator of faults: what it refuses, and the one object that it ends with. */
static void test_faults(void **state)
{
    (void)state;
    run_result r = RUN("faults", "--help");
    assert_int_equal(r.exit_code, 0);
    assert_string_equal(r.err, "");
    assert_non_null(strstr(r.out, "--canary"));
    run_release(&r);
    expect_refusal(RUN("faults", "--nodez", "3"),
                   "unknown option '--nodez': the nearest known one is --nodes");
    expect_refusal(RUN("faults", "seed"), "faults takes options only, not \"seed\"");
    expect_refusal(RUN("faults", "--canary", "lost"),
                   "--canary: \"lost\" is no known bug; --canary list names them");
    /* It would be a run that has to fail, and finds nothing. */
    expect_refusal(RUN("faults", "--canary", "none"),
                   "--canary: \"none\" is no known bug; --canary list names them");
    expect_refusal(RUN("faults", "--script", "none.script"),
                   "cannot open 'none.script': No such file or directory");
    json_t *a =
        expect_json(RUN("faults", "--nodes", "3", "--days", "1", "--faults", "off", "--json"), 0);
    static const char *const keys[] = {
        "seeds_run",         "violations",   "first_failing_seed", "result_hash",
        "simulated_seconds", "wall_seconds", "rss_bytes_per_node", "resting_bytes_per_node"};
    for (size_t i = 0; i < SH_COUNT(keys); i++)
        if (!json_object_get(a, keys[i]))
            fail_msg("no %s", keys[i]);
    assert_int_equal(json_integer_value(json_object_get(a, "seeds_run")), 1);
    assert_int_equal(json_integer_value(json_object_get(a, "violations")), 0);
    assert_true(json_number_value(json_object_get(a, "simulated_seconds")) >= 86400);
    json_decref(a);
}

int main(int argc, char **argv)
{
#define CASE(test) cmocka_unit_test_setup_teardown(test, make_dir, remove_dir)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_usage),
        CASE(test_experiment),
        cmocka_unit_test(test_flags),
        CASE(test_inputs),
        CASE(test_out),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_faults),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s PROGRAM\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
