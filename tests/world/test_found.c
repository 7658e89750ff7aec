/*
 * Each known bug is found by `shoal-sim faults`, within a bounded number of seeds; without one the
 * same seeds are clean.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "shared/base/canary.h"

#define SEEDS_MAX 40

/* Exit status of shoal-sim faults on one seed. */
static int run(const char *canary, int seed)
{
    char command[1024];
    int n = snprintf(command, sizeof command,
                     "%s faults --seed %d --nodes 20 --days 2 --threads 1 %s %s >/dev/null 2>&1",
                     SIM_PROGRAM, seed, canary ? "--canary" : "", canary ? canary : "");
    assert_in_range(n, 1, sizeof command - 1);
    int status = system(command);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void test_list(void **state)
{
    (void)state;
    FILE *pipe = popen(SIM_PROGRAM " faults --canary list", "r");
    char line[128];
    int n = 0;
    assert_non_null(pipe);
    while (fgets(line, sizeof line, pipe)) {
        line[strcspn(line, "\n")] = '\0';
        assert_string_equal(line, sh_canary_name((sh_canary)++n));
    }
    assert_int_equal(pclose(pipe), 0);
    assert_int_equal(n, SH_CANARIES - 1);
    assert_int_equal(run("nightingale", 1), 2);
}

/* Of 20,000 seeds these ended in an error: an evaluation's end found a store that could not be
 * read. */
static void test_damaged_under_an_evaluation(void **state)
{
    (void)state;
    assert_int_equal(run(NULL, 10706), 0);
    assert_int_equal(run(NULL, 11135), 0);
}

static void test_each_is_found(void **state)
{
    (void)state;
    for (int canary = 1; canary < SH_CANARIES; canary++) {
        const char *name = sh_canary_name((sh_canary)canary);
        int seed = 1;
        while (seed <= SEEDS_MAX && run(name, seed) == 0)
            seed++;
        if (seed > SEEDS_MAX)
            fail_msg("%s: not found in %d seeds", name, SEEDS_MAX);
        assert_int_equal(run(name, seed), 1);
        assert_int_equal(run(NULL, seed), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_damaged_under_an_evaluation),
        cmocka_unit_test(test_each_is_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
