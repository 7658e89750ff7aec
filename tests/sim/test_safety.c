/*
 * Safety under faults, over many seeds: messages are lost, doubled and reordered, a third of the
 * nodes is offline, nodes and the aggregator crash before and after commits and at named fail
 * points. At any time nothing that was acknowledged is lost, nothing is counted twice or changed,
 * and no node goes back to an older release; once the aggregator has closed and the crashes have
 * stopped, everything owed arrives and every node runs the newest release.
 *
 * And the checks can fail: with a known bug switched on, they do.
 *
 *     test_sim_safety FIRST_SEED N_SEEDS
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/sim/rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AUDIT_EVERY    500    /* events */
#define EVENTS_MAX     100000 /* a sound run takes less than a tenth */
#define CANARY_SEEDS   60     /* a canary is found in the first few */
#define NODE_CRASHES   40     /* a seed, at least, on average */
#define CENTER_CRASHES 2

static uint64_t first_seed = 1, n_seeds = 10;

static const char *const crash_rates[] = {"1", "0.6", "0.3"};
static const char *const failpoints[] = {"merge.before_commit", "merge.after_commit",
                                         "gate.before_commit", "gate.after_commit"};

typedef struct {
    uint64_t runs, events, node_crashes, center_crashes, failpoints, audits;
    uint64_t made, merged, refused, releases;
} totals;

/* What was found wrong; empty text: nothing. */
typedef struct {
    char text[512];
    sh_audit_result audit;
    totals *totals;
} verdict;

static void find(verdict *v, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void find(verdict *v, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (v->text[0] == 0)
        vsnprintf(v->text, sizeof v->text, format, args);
    va_end(args);
}

/* What holds at any time. */
static sh_status check(sim *s, verdict *v, sh_error *err)
{
    char finding[256];
    SH_TRY(rig_audit(s, &v->audit, finding, sizeof finding, err));
    v->totals->audits++;
    if (v->audit.lost + v->audit.twice + v->audit.wrong)
        find(v, "lost %llu, twice %llu, wrong %llu: %s", (unsigned long long)v->audit.lost,
             (unsigned long long)v->audit.twice, (unsigned long long)v->audit.wrong, finding);
    uint64_t newest = s->coord_up ? sh_coord_get_status(s->coord).version : UINT64_MAX;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        const sim_node *n = &s->nodes[i];
        if (n->steps_back)
            find(v, "node %u went back to an older release", i);
        if (!n->up)
            continue;
        sh_node_status status = sh_node_get_status(n->core);
        if (status.confirmed_version > status.active_version || status.active_version > newest)
            find(v, "node %u: active %llu, confirmed %llu, newest %llu", i,
                 (unsigned long long)status.active_version,
                 (unsigned long long)status.confirmed_version, (unsigned long long)newest);
    }
    return SH_OK;
}

static sh_status probe(sim *s, void *arg, sh_error *err)
{
    verdict *v = arg;
    if (s->events > EVENTS_MAX)
        find(v, "it does not come to rest");
    else if (s->events % AUDIT_EVERY == 0)
        SH_TRY(check(s, v, err));
    return v->text[0] ? sh_fail(err, SH_ERR_CANCELLED, "found") : SH_OK;
}

/* What holds at the end. */
static void check_end(sim *s, verdict *v)
{
    sh_coord_status c = sh_coord_get_status(s->coord);
    if (c.version < (uint64_t)s->options.rounds + 1)
        find(v, "%llu releases, %lld were asked for", (unsigned long long)c.version - 1,
             (long long)s->options.rounds);
    if (v->audit.pending || v->audit.owed || v->audit.made != v->audit.acknowledged)
        find(v, "%llu made, %llu acknowledged, %llu owed, %llu pending at the end",
             (unsigned long long)v->audit.made, (unsigned long long)v->audit.acknowledged,
             (unsigned long long)v->audit.owed, (unsigned long long)v->audit.pending);
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        sh_node_status n = sh_node_get_status(s->nodes[i].core);
        if (n.active_version != c.version || n.confirmed_version != c.version)
            find(v, "node %u ends on release %llu, the newest is %llu", i,
                 (unsigned long long)n.active_version, (unsigned long long)c.version);
    }
}

static void add_up(const sim *s, const verdict *v)
{
    totals *t = v->totals;
    t->runs++;
    t->events += s->events;
    t->center_crashes += s->coord_life;
    t->made += v->audit.made;
    t->merged += v->audit.merged;
    t->refused += v->audit.refused;
    t->releases += s->version_seen;
    for (uint32_t i = 0; i < s->n_nodes; i++)
        t->node_crashes += s->nodes[i].crashes;
    for (size_t i = 0; i < s->failpoints.n; i++)
        t->failpoints += s->failpoints.points[i].hits;
}

/* One seed; the faults' kinds go with it. */
static void run_seed(uint64_t seed, sim_canary canary, totals *t, verdict *v)
{
    static const char *const words[] = {"--store",
                                        "memory",
                                        "--nodes",
                                        "12",
                                        "--threads",
                                        "1",
                                        "--learn.rounds",
                                        "3",
                                        "--network.drop",
                                        "0.05",
                                        "--network.duplicate",
                                        "0.05",
                                        NULL};
    rig r;
    sh_error err = {0};
    *v = (verdict){.totals = t};
    rig_init(&r, words);
    rig_add(&r, "--faults.crash-rate",
            canary == SIM_CANARY_NONE ? crash_rates[seed % SH_COUNT(crash_rates)] : "3");
    rig_add(&r, "--faults.merge-failpoint", failpoints[seed % SH_COUNT(failpoints)]);
    rig_add_number(&r, "--faults.merge-crash", 1 + seed / SH_COUNT(failpoints) % 3);
    rig_add_number(&r, "--faults.crash-training-node", seed % 12);
    rig_add_number(&r, "--seed", seed);
    rig_create(&r);
    r.sim->canary = canary;
    r.sim->probe = probe;
    r.sim->probe_arg = v;
    sh_status status = sim_run(r.sim, &err);
    if (status == SH_OK)
        status = check(r.sim, v, &err);
    if (status == SH_OK)
        check_end(r.sim, v);
    else
        find(v, "the run ends with: %s", err.text);
    add_up(r.sim, v);
    if (v->text[0] && canary == SIM_CANARY_NONE) {
        fprintf(stderr, "seed %llu, event %llu: %s\n", (unsigned long long)seed,
                (unsigned long long)r.sim->events, v->text);
        rig_print_command(&r);
    }
    rig_release(&r);
}

static void test_faults(void **state)
{
    (void)state;
    totals t = {0};
    uint64_t failed = 0;
    for (uint64_t seed = first_seed; seed < first_seed + n_seeds; seed++) {
        verdict v;
        run_seed(seed, SIM_CANARY_NONE, &t, &v);
        failed += v.text[0] != 0;
    }
    printf("seeds %llu to %llu: %llu events, %llu audits; crashes: nodes %llu, aggregator %llu, of "
           "them at fail points %llu; updates and alarms made %llu; updates merged %llu, refused "
           "%llu; releases %llu\n",
           (unsigned long long)first_seed, (unsigned long long)(first_seed + n_seeds - 1),
           (unsigned long long)t.events, (unsigned long long)t.audits,
           (unsigned long long)t.node_crashes, (unsigned long long)t.center_crashes,
           (unsigned long long)t.failpoints, (unsigned long long)t.made,
           (unsigned long long)t.merged, (unsigned long long)t.refused,
           (unsigned long long)t.releases);
    assert_int_equal(failed, 0);
    /* The faults were there. */
    assert_true(t.node_crashes > NODE_CRASHES * t.runs);
    assert_true(t.center_crashes > CENTER_CRASHES * t.runs);
    assert_true(t.failpoints > t.runs);
    assert_true(t.merged > 0 && t.refused > 0);
}

/* Until the first seed whose audit sees the bug. */
static void find_canary(sim_canary canary, const char *what)
{
    totals t = {0};
    for (uint64_t seed = 1; seed <= CANARY_SEEDS; seed++) {
        verdict v;
        run_seed(seed, canary, &t, &v);
        if (v.audit.lost + v.audit.twice + v.audit.wrong) {
            printf("%s: found with seed %llu: %s\n", what, (unsigned long long)seed, v.text);
            return;
        }
    }
    fail_msg("%s: not found in %d seeds", what, CANARY_SEEDS);
}

static void test_canary_aggregator(void **state)
{
    (void)state;
    find_canary(SIM_CANARY_AGGREGATOR, "an aggregator that acknowledges before it commits");
}

static void test_canary_node(void **state)
{
    (void)state;
    find_canary(SIM_CANARY_NODE, "a node that sends before it commits");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_canary_aggregator),
        cmocka_unit_test(test_canary_node),
        cmocka_unit_test(test_faults),
    };
    if (argc == 3) {
        first_seed = strtoull(argv[1], NULL, 10);
        n_seeds = strtoull(argv[2], NULL, 10);
    }
    if (n_seeds == 0 || (argc != 1 && argc != 3)) {
        fprintf(stderr, "usage: %s [FIRST_SEED N_SEEDS]\n", argv[0]);
        return 2;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
