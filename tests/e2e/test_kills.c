/*
 * Many SIGKILLs at random moments over an aggregator and three nodes, under traffic and rounds,
 * often with several processes down at once, over links that are slow and break off in between, or
 * are down for a while. When it stops, all settles, the audit is clean, and
 * every piece of feedback that was answered is there, once.
 *
 *     test_e2e_kills FOLDER-OF-PROGRAMS [KILLS [SEED]]
 *
 * The seed decides whom and how soon; it is printed. What the processes do meanwhile is up to the
 * machine, so the same seed is another run.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/rng.h"
#include "tests/e2e/cutter.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/harness.h"

#define NODES         3
#define PROCESSES     (NODES + 1) /* the last is the aggregator */
#define KILLS_DEFAULT 60
/* Mostly sooner than anything is over; at times long enough for a training and a merge. */
#define SOON_MS   120
#define LATER_MS  3000
#define LATER_ONE 25 /* of so many kills */
#define DOWN_MS   150
/* What a link does until the next change: breaks off after so many bytes, or at once. */
#define CUT_AFTER_LEAST 2000u
#define CUT_AFTER_MOST  200000u

static const char *bin;
static unsigned kills_wanted = KILLS_DEFAULT;
static uint64_t seed = 1;

typedef struct {
    e2e_fleet fleet;
    e2e_user users[NODES];
    cutter links[NODES];
    sh_rng rng;
    bool ready[PROCESSES];
    uint64_t start_at[PROCESSES]; /* of one that is down */
    unsigned kills[PROCESSES], in_training, in_merge, not_ready;
    unsigned both; /* kills after which an aggregator and a node were down */
} scene;

static e2e_process *process_of(scene *s, unsigned i)
{
    return i < NODES ? &s->fleet.nodes[i].process : &s->fleet.aggregator;
}

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    s->fleet = (e2e_fleet){
        .bin = bin, .aggregator_words = fleets_eager_aggregator, .node_words = fleets_eager_node};
    sh_rng_init(&s->rng, seed, 1, 1);
    for (unsigned i = 0; i < NODES; i++)
        s->fleet.nodes[i].dial = e2e_free_port();
    e2e_fleet_make(&s->fleet, NODES);
    for (unsigned i = 0; i < NODES; i++)
        cutter_start(&s->links[i], s->fleet.nodes[i].dial, s->fleet.port, 0);
    e2e_fleet_start(&s->fleet);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = seed * 100 + i;
        u->pause_ms = 20;
        atomic_store(&u->port, s->fleet.nodes[i].port);
        e2e_user_start(u);
    }
    for (unsigned i = 0; i < PROCESSES; i++)
        s->ready[i] = true;
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_release(&s->fleet);
    for (unsigned i = 0; i < NODES; i++)
        cutter_stop(&s->links[i]);
    free(s);
    return 0;
}

static void begin(scene *s, unsigned i)
{
    if (i < NODES)
        e2e_node_start(&s->fleet, i, NULL);
    else
        e2e_aggregator_start(&s->fleet, NULL);
    s->ready[i] = false;
}

/* Nobody ends by itself; who is ready gets users. */
static void look_after(scene *s, unsigned i)
{
    e2e_process *p = process_of(s, i);
    if (p->pid == 0) {
        if (sh_clock_mono_ms() >= s->start_at[i])
            begin(s, i);
        return;
    }
    if (!e2e_runs(p)) {
        char *log = e2e_log(p);
        fail_msg("%s: it ended by itself: %s", p->log, log);
    }
    if (s->ready[i] || !e2e_logged(p, "event=ready"))
        return;
    s->ready[i] = true;
    if (i < NODES && e2e_node_ready(&s->fleet, i))
        atomic_store(&s->users[i].port, s->fleet.nodes[i].port);
}

static unsigned count_of(const char *log, const char *text)
{
    unsigned n = 0;
    for (const char *at = log; (at = strstr(at, text)) != NULL; at++)
        n++;
    return n;
}

static void count_kill(scene *s, unsigned i)
{
    char *log = e2e_log(process_of(s, i));
    s->kills[i]++;
    s->not_ready += !s->ready[i];
    s->in_training +=
        count_of(log, "event=train_started") > count_of(log, "event=train_done") && s->ready[i];
    s->in_merge += count_of(log, "event=merge_started") > count_of(log, "event=gate_started");
    free(log);
}

static void kill_one(scene *s, unsigned i)
{
    e2e_process *p = process_of(s, i);
    bool node_down = false;
    if (i < NODES)
        atomic_store(&s->users[i].port, 0);
    assert_int_equal(e2e_end(p, SIGKILL), 128 + SIGKILL);
    count_kill(s, i);
    s->start_at[i] = sh_clock_mono_ms() + sh_rng_below(&s->rng, DOWN_MS);
    for (unsigned k = 0; k < NODES; k++)
        node_down |= s->fleet.nodes[k].process.pid == 0;
    s->both += node_down && s->fleet.aggregator.pid == 0;
}

static unsigned pick(scene *s)
{
    for (;;) {
        unsigned i = (unsigned)sh_rng_below(&s->rng, PROCESSES);
        if (process_of(s, i)->pid != 0)
            return i;
        for (unsigned k = 0; k < PROCESSES; k++) /* all may be down */
            look_after(s, k);
        e2e_pause();
    }
}

static void change_link(scene *s)
{
    uint64_t cut_after[] = {0, 0, 1, /* down */
                            CUT_AFTER_LEAST + sh_rng_below(&s->rng, CUT_AFTER_MOST)};
    atomic_store(&s->links[sh_rng_below(&s->rng, NODES)].cut_after,
                 cut_after[sh_rng_below(&s->rng, SH_COUNT(cut_after))]);
}

static void kill_all_over(scene *s)
{
    for (unsigned n = 0; n < kills_wanted; n++) {
        uint64_t pause = sh_rng_below(&s->rng, LATER_ONE) == 0 ? LATER_MS : SOON_MS;
        uint64_t next = sh_clock_mono_ms() + sh_rng_below(&s->rng, pause);
        if (n % 50 == 0)
            for (unsigned i = 0; i < NODES; i++)
                atomic_store(&s->users[i].topic, n % 100 ? &e2e_after : &e2e_before);
        do {
            for (unsigned i = 0; i < PROCESSES; i++)
                look_after(s, i);
            e2e_pause();
        } while (sh_clock_mono_ms() < next);
        kill_one(s, pick(s));
        change_link(s);
    }
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->links[i].cut_after, 0);
}

static bool all_ready(scene *s)
{
    bool all = true;
    for (unsigned i = 0; i < PROCESSES; i++) {
        look_after(s, i);
        all &= process_of(s, i)->pid != 0 && s->ready[i];
    }
    return all;
}

static void print_counts(const scene *s)
{
    print_message("killed: %u", s->kills[NODES]);
    for (unsigned i = 0; i < NODES; i++)
        print_message(" %u", s->kills[i]);
    print_message(" (aggregator, nodes); before ready %u, in training %u, in a merge %u; "
                  "with both sides down %u\n",
                  s->not_ready, s->in_training, s->in_merge, s->both);
    for (unsigned i = 0; i < NODES; i++)
        print_message("link of node-%u: %u connections, %u cuts\n", i,
                      atomic_load(&s->links[i].connections), atomic_load(&s->links[i].cuts));
}

static void nothing_is_lost(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    unsigned total = 0;
    print_message("%u kills, seed %llu\n", kills_wanted, (unsigned long long)seed);
    kill_all_over(s);
    E2E_UNTIL(all_ready(s), "all are back");
    print_counts(s);
    const e2e_topic *news = e2e_news();
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, news);
    uint64_t killed_at = e2e_newest_release(f);
    E2E_UNTIL(e2e_newest_release(f) > killed_at, "a release after the kills: it goes on learning");
    uint64_t version = e2e_settle(f);
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_stop(f);
    json_t *audit = e2e_audit(f);
    print_message("release %llu, at the last kill %llu; audit: %lld made, %lld acknowledged, "
                  "%lld merged\n",
                  (unsigned long long)version, (unsigned long long)killed_at,
                  (long long)e2e_int(audit, "made"), (long long)e2e_int(audit, "acknowledged"),
                  (long long)e2e_int(audit, "merged"));
    json_decref(audit);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        if (atomic_load(&u->bad) > 0)
            fail_msg("%s: %llu bad replies, the first: %s", u->name, atomic_load(&u->bad),
                     u->first_bad);
        fleets_check_feedback(f, i, atomic_load(&u->acknowledged), atomic_load(&u->doubtful));
    }
    for (unsigned i = 0; i < PROCESSES; i++)
        total += s->kills[i];
    assert_int_equal(total, kills_wanted);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(nothing_is_lost, make, release),
    };
    if (argc < 2 || argc > 4)
        return 2;
    bin = argv[1];
    if (argc > 2)
        kills_wanted = (unsigned)strtoul(argv[2], NULL, 10);
    if (argc > 3)
        seed = strtoull(argv[3], NULL, 10);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
