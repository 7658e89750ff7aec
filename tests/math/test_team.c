/* Teams: every index once, what is written before a barrier is seen after it, sleep when idle. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/math/team.h"

enum { ITEMS = 203, LOOPS = 20, RUNS = 50, THREADS = 8 };

static sh_team *new_team(unsigned threads)
{
    sh_team *team = NULL;
    sh_error err = {0};
    if (sh_team_create(threads, &team, &err) != SH_OK)
        fail_msg("%u threads: %s", threads, err.text);
    assert_int_equal(sh_team_threads(team), threads);
    return team;
}

/* Plain memory: the thread sanitizer sees it when a barrier does not order. */
typedef struct {
    unsigned n;
    uint64_t values[LOOPS + 1][ITEMS];
    unsigned members[THREADS];
} chain;

/* Each loop reads what the loop before wrote, whoever wrote it. */
static void run_chain(void *arg, const sh_member *me)
{
    chain *c = arg;
    assert_int_equal(me->n, c->n);
    c->members[me->index]++;
    for (unsigned loop = 0; loop < LOOPS; loop++) {
        size_t begin, end;
        while (sh_team_take(me, ITEMS, 1 + loop, &begin, &end)) {
            assert_true(begin < end && end <= ITEMS && end - begin <= 1 + loop);
            for (size_t i = begin; i < end; i++)
                c->values[loop + 1][i] += c->values[loop][ITEMS - 1 - i] + 1;
        }
        sh_team_barrier(me);
    }
}

static void check_chain(sh_team *team, unsigned n)
{
    chain *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->n = n;
    sh_team_run(team, run_chain, c);
    for (unsigned i = 0; i < n; i++)
        assert_int_equal(c->members[i], 1);
    for (unsigned loop = 0; loop <= LOOPS; loop++)
        for (size_t i = 0; i < ITEMS; i++)
            assert_int_equal(c->values[loop][i], loop); /* once and only once */
    free(c);
}

static void test_loops_and_barriers(void **state)
{
    (void)state;
    for (unsigned n = 1; n <= THREADS; n++) { /* some of them more than processors */
        sh_team *team = new_team(n);
        for (int run = 0; run < RUNS; run++)
            check_chain(team, n);
        sh_team_destroy(&team);
        assert_null(team);
    }
}

static void test_none_is_the_caller(void **state)
{
    (void)state;
    assert_int_equal(sh_team_threads(NULL), 1);
    check_chain(NULL, 1);
}

static void do_nothing(void *arg, const sh_member *me)
{
    (void)arg;
    (void)me;
}

/* Threads of this process that the scheduler does not call sleeping, the caller aside. */
static int awake(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    assert_non_null(dir);
    for (struct dirent *e; (e = readdir(dir)) != NULL;) {
        char path[300], state = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/stat", e->d_name);
        if (e->d_name[0] == '.' || atoi(e->d_name) == getpid())
            continue;
        FILE *file = fopen(path, "r");
        if (file == NULL)
            continue;
        if (fscanf(file, "%*d (%*[^)]) %c", &state) == 1 && state != 'S')
            n++;
        fclose(file);
    }
    closedir(dir);
    return n;
}

static void wait_until_asleep(void)
{
    const time_t deadline = time(NULL) + 60;
    while (awake() > 0) {
        if (time(NULL) > deadline)
            fail_msg("%d threads of an idle team are awake", awake());
        usleep(1000);
    }
}

/* Workers sleep when nothing runs, and when the caller is late at a barrier; both wake up. */
static void late_caller(void *arg, const sh_member *me)
{
    int *seen = arg;
    if (me->index == 0) {
        wait_until_asleep();
        *seen = 1;
    }
    sh_team_barrier(me);
    assert_int_equal(*seen, 1);
}

static void test_idle_teams_sleep(void **state)
{
    (void)state;
    sh_team *team = new_team(4);
    for (int round = 0; round < 3; round++) {
        int seen = 0;
        wait_until_asleep();
        check_chain(team, 4);
        sh_team_run(team, do_nothing, NULL);
        wait_until_asleep();
        sh_team_run(team, late_caller, &seen);
    }
    wait_until_asleep();
    sh_team_destroy(&team);
}

static void test_limits(void **state)
{
    (void)state;
    sh_team *team = NULL;
    sh_error err = {0};
    assert_int_equal(sh_team_create(0, &team, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_team_create(SH_TEAM_THREADS_MAX + 1, &team, &err), SH_ERR_LIMIT);
    for (size_t n = 1; n <= 3; n++) {
        sh_alloc_fail_after(n);
        assert_int_equal(sh_team_create(2, &team, &err), SH_ERR_NO_MEMORY);
    }
    sh_alloc_fail_after(0);
    assert_null(team);
    sh_team_destroy(&team); /* takes NULL */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loops_and_barriers),
        cmocka_unit_test(test_none_is_the_caller),
        cmocka_unit_test(test_idle_teams_sleep),
        cmocka_unit_test(test_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
