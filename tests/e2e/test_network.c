/*
 * A node and an aggregator in two network namespaces with a bad network between them (tunnel.h):
 * packets are lost, late, doubled, damaged and out of order, the link is thin, or goes down and up
 * again, or passes one way only, while users work and rounds go on. Inference does not notice; when
 * the network is well again all arrives, and the audit of both stores is clean. argv[1]: the
 * programs' folder. Skips, and says so, where namespaces or TUN devices are not allowed.
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
#include "tests/e2e/tunnel.h"

#define SEED    7
#define SKIPPED 77
#define FLAGS   48

static const char *bin;
static bool skipped;

static const struct {
    const char *name;
    tunnel_weather weather;
    unsigned ms; /* how long at least */
} weathers[] = {
    {"some loss, damage, doubles", {.lose = 30, .repeat = 20, .damage = 10, .delay_ms = 5}, 2000},
    {"much loss, out of order", {.lose = 150, .delay_ms = 20, .jitter_ms = 60}, 3000},
    {"a thin link", {.rate_kb_s = 60, .delay_ms = 100, .jitter_ms = 20}, 3000},
    {"down and up", {.down_ms = 300, .up_ms = 400, .delay_ms = 2}, 4000},
    {"one way", {.only_b_to_a = true}, 1500},
    {"the other way", {.only_a_to_b = true}, 1500},
    {"down", {.down_ms = 1000}, 1500},
    {"all of it",
     {.lose = 50,
      .repeat = 50,
      .damage = 20,
      .delay_ms = 10,
      .jitter_ms = 40,
      .rate_kb_s = 400,
      .down_ms = 100,
      .up_ms = 900},
     4000},
};

typedef struct {
    e2e_fleet fleet;
    e2e_user user;
    tunnel net;
    const char *aggregator_words[FLAGS], *node_words[FLAGS];
    char listen[64], dial[64];
} scene;

static void add(const char **words, const char *const *more, const char *flag, const char *value)
{
    size_t n = 0;
    for (; more[n]; n++)
        words[n] = more[n];
    assert_true(n + 2 < FLAGS);
    words[n++] = flag;
    words[n++] = value;
}

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    const char *why = tunnel_start(&s->net, SEED);
    if (why) {
        print_message("SKIP: the bad network: %s\n", why);
        skipped = true;
        return 0;
    }
    e2e_fleet *f = &s->fleet;
    f->bin = bin;
    e2e_fleet_make(f, 1);
    snprintf(s->listen, sizeof s->listen, "tcp://" TUNNEL_ADDRESS_A ":%u", f->port);
    snprintf(s->dial, sizeof s->dial, "tcp://" TUNNEL_ADDRESS_A ":%u", f->port);
    add(s->aggregator_words, fleets_eager_aggregator, "--listen", s->listen);
    add(s->aggregator_words, s->aggregator_words, "--learn.buffer", "1");
    add(s->node_words, fleets_eager_node, "--aggregator", s->dial);
    f->aggregator_words = s->aggregator_words;
    f->node_words = s->node_words;
    tunnel_enter(&s->net, 0);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
    e2e_enrol(f, 0);
    tunnel_enter(&s->net, 1);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    e2e_user *u = &s->user;
    snprintf(u->name, sizeof u->name, "user");
    u->seed = SEED;
    u->pause_ms = 20;
    atomic_store(&u->port, f->nodes[0].port);
    e2e_user_start(u);
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    e2e_user_stop(&s->user);
    e2e_fleet_release(&s->fleet);
    if (!skipped)
        tunnel_enter(&s->net, -1);
    tunnel_stop(&s->net);
    free(s);
    return 0;
}

/* Through one weather, until users have gone on asking in it. */
static void live_through(scene *s, size_t i)
{
    e2e_user *u = &s->user;
    uint64_t until = sh_clock_mono_ms() + weathers[i].ms, asked = atomic_load(&u->whole);
    atomic_store(&u->topic, i % 2 ? &e2e_after : &e2e_before);
    tunnel_set(&s->net, &weathers[i].weather);
    E2E_UNTIL(sh_clock_mono_ms() > until && atomic_load(&u->whole) > asked + 5, weathers[i].name);
    assert_true(e2e_runs(&s->fleet.nodes[0].process));
    assert_true(e2e_runs(&s->fleet.aggregator));
}

static void all_arrives(void **state)
{
    scene *s = *state;
    if (skipped)
        skip();
    e2e_fleet *f = &s->fleet;
    for (size_t i = 0; i < SH_COUNT(weathers); i++)
        live_through(s, i);
    tunnel_set(&s->net, &(tunnel_weather){0});
    uint64_t before = e2e_newest_release(f);
    atomic_store(&s->user.topic, e2e_news());
    E2E_UNTIL(e2e_newest_release(f) > before, "a release after it: it goes on learning");
    uint64_t version = e2e_settle(f);
    e2e_user_stop(&s->user);
    e2e_fleet_stop(f);
    json_t *audit = e2e_audit(f);
    tunnel *t = &s->net;
    print_message("packets: %llu carried, %llu lost, %llu doubled, %llu damaged, %llu overtaken, "
                  "%llu too many; release %llu, before %llu; audit: %lld made, %lld acknowledged\n",
                  atomic_load(&t->carried), atomic_load(&t->lost), atomic_load(&t->repeated),
                  atomic_load(&t->damaged), atomic_load(&t->overtaken), atomic_load(&t->too_many),
                  (unsigned long long)version, (unsigned long long)before,
                  (long long)e2e_int(audit, "made"), (long long)e2e_int(audit, "acknowledged"));
    assert_true(e2e_int(audit, "acknowledged") > 0);
    json_decref(audit);
    assert_true(atomic_load(&t->lost) > 0 && atomic_load(&t->repeated) > 0 &&
                atomic_load(&t->damaged) > 0 && atomic_load(&t->overtaken) > 0);
    if (atomic_load(&s->user.bad) > 0)
        fail_msg("%s", s->user.first_bad);
    assert_int_equal(atomic_load(&s->user.broken), 0); /* inference never waits for a network */
    fleets_check_feedback(f, 0, atomic_load(&s->user.acknowledged), atomic_load(&s->user.doubtful));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(all_arrives, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed == 0 && skipped ? SKIPPED : failed;
}
