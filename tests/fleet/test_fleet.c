/*
 * A small fleet of real processes: three nodes and an aggregator set up, driven, cut off, killed,
 * stopped and audited by shoal-fleet, on the shipped base and the texts of scripts/make-texts. It
 * is about what must hold (nothing lost, nothing twice, no stream broken), not about how much is
 * learnt.
 *
 *     test_fleet SHOAL_FLEET
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "tests/cli/run.h"

#define BASE  SHOAL_SOURCE_DIR "/models/shoal-base-2.6m-f16.gguf"
#define TEXTS SHOAL_SOURCE_DIR "/build/texts"

static const char *program;
static char folder[64];

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/shoal-small-XXXXXX");
    return mkdtemp(folder) == NULL;
}

static int tear_down(void **state)
{
    const char *const words[] = {"-rf", folder, NULL};
    (void)state;
    run_result r = run_program("/bin/rm", words, NULL, 0);
    run_release(&r);
    return 0;
}

static json_t *load_summary(const char *out)
{
    char path[SH_PATH_BYTES];
    sh_error err = {0};
    json_t *summary = NULL;
    snprintf(path, sizeof path, "%s/summary.json", out);
    if (sh_json_load(path, &summary, &err) != SH_OK)
        fail_msg("%s", err.text);
    return summary;
}

/* The row of `checks` with this name. */
static const json_t *check_of(const json_t *summary, const char *name)
{
    size_t i;
    const json_t *row;
    json_array_foreach(json_object_get(summary, "checks"), i, row)
    {
        if (strcmp(json_string_value(json_object_get(row, "name")), name) == 0)
            return row;
    }
    fail_msg("the summary has no check \"%s\"", name);
    return NULL;
}

static void must_hold(const json_t *summary, const char *name)
{
    const json_t *row = check_of(summary, name);
    if (!json_is_true(json_object_get(row, "ok"))) {
        char *text = json_dumps(row, 0);
        fail_msg("%s", text ? text : name);
    }
}

static void test_small_fleet(void **state)
{
    char out[128];
    snprintf(out, sizeof out, "%s/run", folder);
    const char *const words[] = {"run",
                                 "--nodes=3",
                                 "--out",
                                 out,
                                 "--base=" BASE,
                                 "--texts=" TEXTS,
                                 "--plain",
                                 "--no-baselines",
                                 "--users.windows-before=5",
                                 "--users.windows-after=2",
                                 "--users.pace-ms=50",
                                 "--monitor.window=32",
                                 "--monitor.reference=64",
                                 "--learn.rounds=2",
                                 "--learn.buffer=1",
                                 "--learn.tokens-min=256",
                                 "--learn.steps-max=20",
                                 "--gate.overall-max=5",
                                 "--gate.slice-max=9",
                                 "--gate.tokens=256",
                                 "--heldout-tokens=256",
                                 "--faults.crash-training-node=1",
                                 "--faults.merge-crash=1",
                                 "--presence.offline",
                                 "--phase-seconds-max=240",
                                 NULL};
    (void)state;
    run_result r = run_program(program, words, NULL, 0);
    json_t *summary = load_summary(out);
    const json_t *error = json_object_get(summary, "error");
    if (!json_is_null(error))
        fail_msg("%s\n%s", json_string_value(error), r.err);
    assert_string_equal(json_string_value(json_object_get(summary, "program")), "shoal-fleet");
    assert_true(json_is_null(json_object_get(summary, "result_hash")));
    must_hold(summary, "wrong (audit)");
    must_hold(summary, "lost (audit)");
    must_hold(summary, "counted twice (audit)");
    must_hold(summary, "a node crashed in training");
    must_hold(summary, "the aggregator crashed in a merge");
    must_hold(summary, "streams that changed release");
    must_hold(summary, "streams cut");
    must_hold(summary, "answers that should not be");
    must_hold(summary, "nodes offline for a part of the run");
    must_hold(summary, "processes that did not stop with status 0");
    assert_true(json_array_size(json_object_get(summary, "releases")) >= 2);
    const json_t *users = json_object_get(summary, "users");
    assert_true(json_integer_value(json_object_get(users, "completions")) >= 3 * 5 * 32);
    const json_t *timeline = json_object_get(json_object_get(summary, "drift"), "timeline");
    assert_true(json_array_size(timeline) >= 5);
    json_decref(summary);
    run_release(&r);
    /* The folder holds a run now: it is not written over. */
    r = run_program(program, words, NULL, 0);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "there is a run in it already"));
    run_release(&r);
}

/* One line and exit status 2, or 1 with a summary that says why. */
static void test_bad_input(void **state)
{
    char out[128], base[160];
    (void)state;
    snprintf(out, sizeof out, "%s/bad", folder);
    snprintf(base, sizeof base, "--base=%s/none.gguf", folder);
    const char *const no_base[] = {"run", "--out", out, base, NULL};
    const char *const no_node[] = {"run", "--faults.crash-training-node=8", NULL};
    const char *const no_flag[] = {"run", "--node=8", NULL};
    const char *const no_command[] = {"walk", NULL};
    run_result r = run_program(program, no_base, NULL, 0);
    assert_non_null(strstr(r.err, "none.gguf"));
    assert_true(r.exit_code != 0);
    json_t *summary = load_summary(out);
    assert_true(json_is_false(json_object_get(summary, "ok")));
    assert_non_null(strstr(json_string_value(json_object_get(summary, "error")), "none.gguf"));
    json_decref(summary);
    run_release(&r);
    r = run_program(program, no_node, NULL, 0);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "nodes 0 to 7"));
    run_release(&r);
    r = run_program(program, no_flag, NULL, 0);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "nodes"));
    run_release(&r);
    r = run_program(program, no_command, NULL, 0);
    assert_int_equal(r.exit_code, 2);
    run_release(&r);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: test_fleet SHOAL_FLEET\n");
        return 2;
    }
    program = argv[1];
    if (access(TEXTS "/manifest.json", R_OK) != 0) {
        printf("SKIP: the small fleet was not run: no texts in build/texts; scripts/make-texts "
               "makes them\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_bad_input, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_small_fleet, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
