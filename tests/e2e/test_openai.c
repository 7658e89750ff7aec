/*
 * The stock OpenAI client (npm's "openai", openai_client.mjs) against a real shoal-node; skipped
 * aloud by openai_client.test where npm or its package cannot be had. argv[1]: the programs'
 * folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/e2e/harness.h"

#define SKIPPED 77

static const char *bin;
static bool skipped;

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    e2e_fleet_make(f, 1);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    return 0;
}

static int release(void **state)
{
    e2e_fleet_release(*state);
    free(*state);
    return 0;
}

static void the_stock_client_works(void **state)
{
    e2e_fleet *f = *state;
    char url[64];
    snprintf(url, sizeof url, "http://127.0.0.1:%u/v1", f->nodes[0].port);
    run_result r = run_program(
        "/bin/sh",
        (const char *const[]){SHOAL_SOURCE_DIR "/tests/e2e/openai_client.test", url, NULL}, NULL,
        0);
    print_message("%s", r.out);
    if (r.exit_code != 0 && r.exit_code != SKIPPED)
        fail_msg("exit code %d: %s%s", r.exit_code, r.out, r.err);
    skipped = r.exit_code == SKIPPED;
    run_release(&r);
    /* Its ratings are in the node's store. */
    if (!skipped)
        assert_true(e2e_node_int(f, 0, "feedback_tokens") > 0);
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_stock_client_works, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed == 0 && skipped ? SKIPPED : failed;
}
