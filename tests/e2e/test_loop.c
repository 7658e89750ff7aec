/*
 * The whole loop with real processes: three nodes and an aggregator, users over HTTP whose text
 * changes, drift, local training, merges, the gate with canary nodes, releases that are swapped
 * under streams, a clean stop, and the audit of what the two sides stored. argv[1]: the programs'
 * folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/e2e/fleets.h"

#define NODES          3
#define USERS          6 /* two a node, so that streams run while others begin */
#define WINDOWS_BEFORE 8
#define RELEASES       2 /* beyond the genesis release */

static const char *bin;

/* Nothing is held against a candidate here but that it is measured: the model is random. */
static const char *const aggregator_words[] = {FLEETS_SMALL_LEARNING,
                                               "--learn.drifting-min",
                                               "2",
                                               "--learn.buffer",
                                               "2",
                                               "--canary.nodes-min",
                                               "2",
                                               "--canary.tokens-min",
                                               "20",
                                               "--canary.ms-max",
                                               "5000",
                                               "--learn.round-ms-max",
                                               "10000",
                                               NULL};
static const char *const node_words[] = {"--monitor.window",
                                         "16",
                                         "--monitor.reference",
                                         "64",
                                         "--evaluate.tokens-min",
                                         "4",
                                         "--engine.slots",
                                         "3",
                                         "--feedback.tokens-max",
                                         "4096",
                                         NULL};

typedef struct {
    e2e_fleet fleet;
    e2e_user users[USERS];
} scene;

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    s->fleet =
        (e2e_fleet){.bin = bin, .aggregator_words = aggregator_words, .node_words = node_words};
    e2e_fleet_make(&s->fleet, NODES);
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < USERS; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_release(&s->fleet);
    free(s);
    return 0;
}

static void start_users(scene *s)
{
    for (unsigned i = 0; i < USERS; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = 100 + i;
        u->pause_ms = 10;
        u->max_tokens = i % 2 ? 6 : 40; /* long streams and short requests */
        atomic_store(&u->port, s->fleet.nodes[i % NODES].port);
        e2e_user_start(u);
    }
}

static void check_users(scene *s)
{
    for (unsigned i = 0; i < USERS; i++) {
        e2e_user *u = &s->users[i];
        e2e_user_stop(u);
        print_message("%s: %llu asked, %llu whole, %llu rated\n", u->name, atomic_load(&u->asked),
                      atomic_load(&u->whole), atomic_load(&u->acknowledged));
        if (atomic_load(&u->bad) > 0)
            fail_msg("%s: %llu bad replies, the first: %s", u->name, atomic_load(&u->bad),
                     u->first_bad);
        assert_int_equal(atomic_load(&u->broken), 0);
        assert_int_equal(atomic_load(&u->doubtful), 0);
        assert_int_equal(atomic_load(&u->forgotten), 0);
        assert_int_equal(atomic_load(&u->whole), atomic_load(&u->asked));
        assert_true(atomic_load(&u->whole) > WINDOWS_BEFORE);
    }
}

static void expect_logged(e2e_fleet *f, unsigned node, const char *event)
{
    if (!e2e_logged(&f->nodes[node].process, event))
        fail_msg("%s: no '%s' in its log", f->nodes[node].name, event);
}

/* Each step of the loop has left its line. */
static void check_logs(e2e_fleet *f, uint64_t version)
{
    static const char *const of_aggregator[] = {
        "event=enrolled node=", "event=rounds_begin drifting=", "event=update_in ",
        "event=merge_started ", "event=gate_started ",          "event=canary_started ",
        "event=evaluation_in ", "event=released version=2",     "event=closed "};
    static const char *const of_node[] = {"event=link state=up",
                                          "event=window index=", "event=release_active version="};
    char line[64];
    unsigned made = 0, alarms = 0, trained = 0, evaluated = 0;
    for (size_t i = 0; i < SH_COUNT(of_aggregator); i++)
        if (!e2e_logged(&f->aggregator, of_aggregator[i]))
            fail_msg("the aggregator: no '%s' in its log", of_aggregator[i]);
    snprintf(line, sizeof line, "event=release_confirmed version=%llu",
             (unsigned long long)version);
    for (unsigned i = 0; i < NODES; i++) {
        for (size_t k = 0; k < SH_COUNT(of_node); k++)
            expect_logged(f, i, of_node[k]);
        expect_logged(f, i, line);
        made += e2e_logged(&f->nodes[i].process, "event=update_acked");
        alarms += e2e_logged(&f->nodes[i].process, "event=alarm metric=");
        /* A round or an evaluation may be over before one of the nodes came to it. */
        trained += e2e_logged(&f->nodes[i].process, "event=train_started round=");
        evaluated += e2e_logged(&f->nodes[i].process, "event=evaluated candidate=");
        assert_false(e2e_logged(&f->nodes[i].process, "level=error"));
    }
    assert_false(e2e_logged(&f->aggregator, "level=error"));
    assert_false(e2e_logged(&f->aggregator, "event=bad_message"));
    assert_true(made >= 2);
    assert_true(alarms >= 2);
    assert_true(trained >= 2);
    assert_true(evaluated >= 2);
}

static void check_audit(e2e_fleet *f)
{
    json_t *audit = e2e_audit(f);
    int64_t merged = e2e_int(audit, "merged");
    print_message("audit: %lld made, %lld merged\n", (long long)e2e_int(audit, "made"),
                  (long long)merged);
    assert_int_equal(e2e_int(audit, "nodes"), NODES);
    assert_true(merged >= 2 * RELEASES);
    assert_int_equal(e2e_int(audit, "owed"), 0);
    assert_int_equal(e2e_int(audit, "dropped"), 0);
    json_decref(audit);
}

static void from_drift_to_release(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    char text[64];
    e2e_fleet_start(f);
    start_users(s);
    for (unsigned i = 0; i < NODES; i++)
        E2E_UNTIL(e2e_node_int(f, i, "windows") >= WINDOWS_BEFORE, "windows of the old text");
    assert_false(e2e_logged(&f->aggregator, "event=rounds_begin"));
    for (unsigned i = 0; i < USERS; i++)
        atomic_store(&s->users[i].topic, &e2e_after);
    assert_true(e2e_saw(&f->aggregator, "event=rounds_begin"));
    snprintf(text, sizeof text, "event=released version=%d", 1 + RELEASES);
    assert_true(e2e_saw(&f->aggregator, text));
    uint64_t version = e2e_settle(f);
    assert_true(version >= 1 + RELEASES);
    check_users(s);
    e2e_fleet_stop(f);
    check_logs(f, version);
    check_audit(f);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(from_drift_to_release, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
