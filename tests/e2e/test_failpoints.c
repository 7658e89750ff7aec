/*
 * A small fleet that goes on learning while each of its programs is killed at every fail point of
 * docs/architecture.md, one after the other; every one is hit and seen as SIGKILL, the process
 * comes back on what its store has, and at the end the audit is clean and nothing that was answered
 * is gone. argv[1]: the programs' folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/harness.h"

#define NODES FLEETS_NODES

static const char *bin;

typedef fleets_scene scene;

static int make(void **state)
{
    *state = fleets_scene_make(bin, 7);
    return 0;
}

static int release(void **state)
{
    fleets_scene_release(*state);
    return 0;
}

static void change_text(scene *s)
{
    const e2e_topic *news = e2e_news();
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, news);
}

static void kill_node_at(scene *s, unsigned i, const char *failpoint)
{
    e2e_fleet *f = &s->fleet;
    char name[48];
    print_message("%s\n", failpoint);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(failpoint, ":"), failpoint);
    change_text(s);
    atomic_store(&s->users[i].port, 0);
    assert_int_equal(e2e_end(&f->nodes[i].process, SIGTERM), 0);
    e2e_node_start(f, i, failpoint);
    if (e2e_node_ready(f, i)) /* else the point was met before */
        atomic_store(&s->users[i].port, f->nodes[i].port);
    e2e_expect_death(&f->nodes[i].process, name);
    atomic_store(&s->users[i].port, 0);
    e2e_node_start(f, i, NULL);
    assert_true(e2e_node_ready(f, i));
    atomic_store(&s->users[i].port, f->nodes[i].port);
}

static void kill_aggregator_at(scene *s, const char *failpoint)
{
    e2e_fleet *f = &s->fleet;
    char name[48];
    print_message("%s\n", failpoint);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(failpoint, ":"), failpoint);
    change_text(s);
    assert_int_equal(e2e_end(&f->aggregator, SIGTERM), 0);
    e2e_aggregator_start(f, failpoint);
    e2e_expect_death(&f->aggregator, name);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
}

static void stop_and_audit(scene *s)
{
    e2e_fleet *f = &s->fleet;
    /* The kills may have come so close together that no round could end: now one can. */
    if (e2e_newest_release(f) < 2)
        assert_true(e2e_saw(&f->aggregator, "event=released version="));
    uint64_t version = e2e_settle(f);
    print_message("release %llu\n", (unsigned long long)version);
    assert_true(version >= 2);
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_stop(f);
    json_decref(e2e_audit(f));
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        if (atomic_load(&u->bad) > 0)
            fail_msg("%s: %llu bad replies, the first: %s", u->name, atomic_load(&u->bad),
                     u->first_bad);
        fleets_check_feedback(f, i, atomic_load(&u->acknowledged), atomic_load(&u->doubtful));
    }
}

static const char *const of_node[] = {
    "node.train",           "node.before_commit",    "node.after_commit",
    "node.install",         "node.activate",         "node.before_commit:20",
    "node.after_commit:20", "node.before_commit:77", "node.after_commit:77",
};
static const char *const of_aggregator[] = {
    "merge.before_commit",         "merge.after_commit",         "gate.before_commit",
    "gate.after_commit",           "canary.before_commit",       "aggregator.before_commit",
    "aggregator.after_commit",     "aggregator.before_commit:9", "aggregator.after_commit:9",
    "aggregator.before_commit:40",
};

static void node_killed_at_every_fail_point(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < SH_COUNT(of_node); i++)
        kill_node_at(s, i % NODES, of_node[i]);
    stop_and_audit(s);
}

static void aggregator_killed_at_every_fail_point(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < SH_COUNT(of_aggregator); i++)
        kill_aggregator_at(s, of_aggregator[i]);
    stop_and_audit(s);
}

static bool is_in(const char *name, size_t n, const char *const *points, size_t n_points)
{
    for (size_t i = 0; i < n_points; i++)
        if (strncmp(points[i], name, n) == 0 && (points[i][n] == 0 || points[i][n] == ':'))
            return true;
    return false;
}

/* Met by others: of the simulator; of the trainer's library, in tests/trainer/test_checkpoint.c. */
static const char *const elsewhere[] = {"node.step", "node.rotate", "node.rotated",
                                        "stack.before_commit", "stack.after_commit",
                                        "train.checkpoint.half",
                                        "train.checkpoint.before_rename",
                                        "train.checkpoint.after_rename"};

/* The table in docs/architecture.md has no other name. */
static void all_that_are_documented_were_met(void **state)
{
    uint8_t *page = NULL;
    size_t n = 0, rows = 0;
    (void)state;
    OK(sh_file_read(SHOAL_SOURCE_DIR "/docs/architecture.md", 1u << 20, &page, &n, err));
    char *table = strstr((char *)page, "\n## Fail points\n");
    assert_non_null(table);
    char *end = strstr(table + 1, "\n## ");
    assert_non_null(end);
    *end = 0;
    for (char *row = table; (row = strstr(row, "\n| `")) != NULL; rows++) {
        row += 4;
        size_t length = strcspn(row, "`");
        bool met = is_in(row, length, of_node, SH_COUNT(of_node)) ||
                   is_in(row, length, of_aggregator, SH_COUNT(of_aggregator)) ||
                   is_in(row, length, elsewhere, SH_COUNT(elsewhere));
        if (!met)
            fail_msg("%.*s: documented, and no test meets it", (int)length, row);
    }
    assert_true(rows >= 12);
    free(page);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(node_killed_at_every_fail_point, make, release),
        cmocka_unit_test_setup_teardown(aggregator_killed_at_every_fail_point, make, release),
        cmocka_unit_test(all_that_are_documented_were_met),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
