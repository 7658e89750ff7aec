/*
 * All nodes of a fleet come back at once after the aggregator was killed amid what they send: each
 * is answered, everything owed is acknowledged, and what was acknowledged is in the store. The
 * thousands of it are experiments/bench-ingest; this is the same program with fewer.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "shared/base/json.h"
#include "tests/cli/run.h"

#include <ftw.h>
#include <stdio.h>

#define NODES   200
#define RATE    "20" /* check-ins a second: of NODES that return at once most are put off */
#define UPDATES 64
#define RSS_MAX ((double)512 * 1024 * 1024)

static const char *program;

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

static json_t *run_bench(const char *const *words)
{
    char dir[] = "/tmp/shoal-return-XXXXXX";
    const char *all[RUN_ARGS_MAX] = {"--json", "--dir", mkdtemp(dir)};
    size_t n = 3;
    assert_non_null(all[2]);
    for (size_t i = 0; words[i] != NULL; i++)
        all[n++] = words[i];
    run_result out = run_program(program, all, NULL, 0);
    if (out.exit_code != 0)
        fail_msg("exit code %d: %s", out.exit_code, out.err);
    json_t *result = json_loads(out.out, 0, NULL);
    assert_non_null(result);
    run_release(&out);
    (void)nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return result;
}

static double number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_number(value))
        fail_msg("no number %s", key);
    return json_number_value(value);
}

static void test_everybody_returns(void **state)
{
    (void)state;
    char nodes[16];
    snprintf(nodes, sizeof nodes, "%d", NODES);
    json_t *r =
        run_bench((const char *[]){"--return", "--connections", nodes, "--processes", "2", NULL});
    assert_true(number(r, "acknowledged") == 3 * NODES);
    assert_true(number(r, "missing") == 0);
    assert_true(number(r, "stored") == 3 * NODES); /* none twice, none that nobody sent */
    assert_true(number(r, "acked_at_kill") >= NODES);
    assert_true(number(r, "peak_rss_bytes") > 0);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    assert_true(number(r, "peak_rss_bytes") < RSS_MAX);
    assert_true(number(r, "first_later") + number(r, "return_later") > 0);
#endif
    json_decref(r);
}

/* The benchmark itself: it ends with an error when what was acknowledged is not in the store. */
static void test_updates_are_durable(void **state)
{
    (void)state;
    char updates[16];
    snprintf(updates, sizeof updates, "%d", UPDATES);
    json_t *r = run_bench((const char *[]){"--turns", "1", "--turn-updates", updates, NULL});
    const json_t *ours = json_object_get(r, "ours");
    assert_true(number(r, "ratio") > 0);
    assert_true(number(ours, "messages") >= 5 * UPDATES); /* each an item and four chunks */
    assert_true(number(ours, "commits") > 0);
    assert_true(number(ours, "commits") < number(ours, "messages"));
    json_decref(r);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    program = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_everybody_returns),
        cmocka_unit_test(test_updates_are_durable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
