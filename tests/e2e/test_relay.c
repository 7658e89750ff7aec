/*
 * Three tiers of real processes: an aggregator, two relays and their nodes. Releases are made of
 * relayed updates and come down through the relays to every node; relays are killed where it
 * matters, and what all sides stored is audited. Then the same with one relay under the other.
 * argv[1]: the programs' folder.
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
#include "tests/e2e/harness.h"

#define NODES  4
#define RELAYS 2

static const char *bin;

/* Two relays' updates of two nodes each make a merge; no node is asked about a candidate. */
static const char *const root_words[] = {FLEETS_SMALL_LEARNING,
                                         "--learn.drifting-min",
                                         "0",
                                         "--learn.buffer",
                                         "4",
                                         "--learn.round-ms-max",
                                         "5000",
                                         NULL};
static const char *const relay_words[] = {"--learn.buffer",
                                          "2",
                                          "--merge.cosine-min",
                                          "-1",
                                          "--relay.wait-ms",
                                          "2000",
                                          "--upstream.retry-min-ms",
                                          "50",
                                          "--upstream.retry-max-ms",
                                          "500",
                                          NULL};

typedef struct {
    e2e_fleet fleet;
    e2e_user users[NODES];
} scene;

static int make_as(void **state, bool chain)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    s->fleet = (e2e_fleet){.bin = bin,
                           .aggregator_words = root_words,
                           .relay_words = relay_words,
                           .node_words = fleets_eager_node,
                           .n_relays = RELAYS,
                           .chain = chain};
    e2e_fleet_make(&s->fleet, NODES);
    e2e_fleet_start(&s->fleet);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = 300 + i;
        u->pause_ms = 10;
        atomic_store(&u->port, s->fleet.nodes[i].port);
        e2e_user_start(u);
    }
    return 0;
}

static int make(void **state)
{
    return make_as(state, false);
}

static int make_chain(void **state)
{
    return make_as(state, true);
}

static int release(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_release(&s->fleet);
    free(s);
    return 0;
}

/* Another text, so that there is something to learn, until the root has `more` releases more. */
static void learn(scene *s, uint64_t more)
{
    uint64_t from = e2e_newest_release(&s->fleet);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, e2e_news());
    E2E_UNTIL(e2e_newest_release(&s->fleet) >= from + more, "a release of relayed updates");
}

static void restart_relay(scene *s, unsigned r, const char *failpoints)
{
    e2e_relay_start(&s->fleet, r, failpoints);
    assert_true(e2e_saw(&s->fleet.relays[r].process, "event=ready"));
}

/* It dies at the fail point, and goes on from what it had stored. */
static void kill_relay_at(scene *s, unsigned r, const char *failpoint)
{
    e2e_relay *relay = &s->fleet.relays[r];
    print_message("%s\n", failpoint);
    assert_int_equal(e2e_end(&relay->process, SIGKILL), 128 + SIGKILL);
    restart_relay(s, r, failpoint);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, e2e_news());
    e2e_expect_death(&relay->process, failpoint);
    restart_relay(s, r, NULL);
}

static void check_counts(e2e_fleet *f)
{
    int code;
    json_t *status = e2e_tool(f, (const char *const[]){"status", NULL}, &code);
    const json_t *refused = json_object_get(json_object_get(status, "updates"), "refused");
    assert_int_equal(e2e_int(status, "relays"), RELAYS);
    assert_int_equal(e2e_int(status, "enrolled"), RELAYS);
    assert_int_equal(e2e_int(refused, "twice"), 0);
    assert_int_equal(e2e_int(refused, "not-a-relay"), 0);
    assert_int_equal(e2e_int(refused, "bad-blob"), 0);
    json_decref(status);
    for (unsigned i = 0; i < RELAYS; i++) {
        json_t *relay = e2e_relay_status(f, i);
        const json_t *parent = json_object_get(relay, "parent");
        assert_string_equal(json_string_value(json_object_get(parent, "state")), "welcome");
        assert_true(e2e_int(parent, "updates") >= 2);
        assert_int_equal(e2e_int(relay, "enrolled"), NODES / RELAYS);
        json_decref(relay);
    }
}

static void check_audit(e2e_fleet *f)
{
    json_t *audit = e2e_audit(f);
    print_message("audit: %lld made, %lld merged, %lld refused\n",
                  (long long)e2e_int(audit, "made"), (long long)e2e_int(audit, "merged"),
                  (long long)e2e_int(audit, "refused"));
    assert_int_equal(e2e_int(audit, "nodes"), NODES);
    assert_int_equal(e2e_int(audit, "relays"), RELAYS);
    assert_int_equal(e2e_int(audit, "owed"), 0);
    assert_true(e2e_int(audit, "merged") >= 8);
    json_decref(audit);
}

static void test_three_tiers_learn_and_lose_nothing(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    learn(s, 1);
    kill_relay_at(s, 0, "stack.before_commit");
    kill_relay_at(s, 1, "stack.after_commit");
    assert_int_equal(e2e_end(&f->relays[0].process, SIGKILL), 128 + SIGKILL);
    restart_relay(s, 0, NULL);
    learn(s, 1);
    uint64_t version = e2e_settle(f);
    assert_true(version >= 3);
    check_counts(f);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user_stop(&s->users[i]);
        if (atomic_load(&s->users[i].bad) > 0)
            fail_msg("%s: %s", s->users[i].name, s->users[i].first_bad);
    }
    e2e_fleet_stop(f);
    check_audit(f);
}

/* A relay under a relay: what the lower one stacked the upper one stacks again, and each node's
 * part of it is counted once at the top. */
static void test_a_relay_under_a_relay(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    learn(s, 1);
    kill_relay_at(s, 0, "stack.after_commit");
    kill_relay_at(s, 1, "stack.before_commit");
    learn(s, 1);
    assert_true(e2e_settle(f) >= 3);
    for (unsigned i = 0; i < RELAYS; i++) {
        json_t *relay = e2e_relay_status(f, i);
        const json_t *parent = json_object_get(relay, "parent");
        assert_string_equal(json_string_value(json_object_get(parent, "state")), "welcome");
        assert_true(e2e_int(parent, "updates") >= 2);
        assert_int_equal(e2e_int(relay, "enrolled"), i + 1 < RELAYS ? 1 : NODES);
        json_decref(relay);
    }
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user_stop(&s->users[i]);
        if (atomic_load(&s->users[i].bad) > 0)
            fail_msg("%s: %s", s->users[i].name, s->users[i].first_bad);
    }
    e2e_fleet_stop(f);
    check_audit(f);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_three_tiers_learn_and_lose_nothing, make, release),
        cmocka_unit_test_setup_teardown(test_a_relay_under_a_relay, make_chain, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
