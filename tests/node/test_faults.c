/*
 * One story - traffic that drifts, three rounds of training, two releases - told with a crash at
 * every one of its steps, before the commit and after it, and on networks that lose, repeat and
 * reorder. Whatever happens, at the end every update, alarm and window was taken exactly once, the
 * ledger says so, and nothing is left behind.
 */
#include "tests/node/rig.h"

#include <stdio.h>

#define ROUNDS     3u
#define INFERENCES 360u
#define SHIFT      200u

static void feed(rig *r, unsigned from, unsigned to)
{
    for (unsigned i = from; i < to; i++) {
        while (!rig_infer(r, i, i >= SHIFT)) /* the shell asks again what did not happen */
            continue;
        if (i % 10 == 0)
            rig_run(r, 20, true);
    }
}

static void until(rig *r, const char *what, bool (*done)(rig *r, uint64_t n), uint64_t n)
{
    for (unsigned i = 0; i < 4000; i++) {
        if (done(r, n))
            return;
        rig_run(r, 50, true);
    }
    fail_msg("crash at %llu: never %s %llu", (unsigned long long)r->crash_at, what,
             (unsigned long long)n);
}

static bool has_acked(rig *r, uint64_t n)
{
    return rig_status(r).updates_acked >= n;
}

static bool has_evaluated(rig *r, uint64_t n)
{
    return r->n_evaluations >= n;
}

static bool has_active(rig *r, uint64_t version)
{
    return rig_status(r).active_version >= version;
}

static bool has_confirmed(rig *r, uint64_t version)
{
    return rig_status(r).confirmed_version >= version;
}

static bool owes_nothing(rig *r, uint64_t n)
{
    return rig_status(r).outbox_items == n;
}

static void check_end(rig *r)
{
    sh_node_status status = rig_status(r);
    SAME(status.inferences, INFERENCES);
    SAME(r->fed, INFERENCES);
    SAME(status.updates_made, ROUNDS);
    SAME(status.updates_acked, ROUNDS);
    SAME(r->n_taken[SH_CLASS_UPDATE], ROUNDS);
    SAME(r->n_taken[SH_CLASS_WINDOW], status.windows);
    SAME(r->n_taken[SH_CLASS_ALARM], status.alarms + 1);
    SAME(r->n_evaluations, 1);
    assert_true(status.alarms > 0);
    for (unsigned cls = 0; cls < SH_CLASSES; cls++)
        for (unsigned seq = 1; seq < RIG_SEQS; seq++)
            if (r->taken[cls][seq] != (seq <= r->n_taken[cls] ? 1u : 0u))
                fail_msg("crash at %llu: class %u sequence %u was taken %u times",
                         (unsigned long long)r->crash_at, cls, seq, r->taken[cls][seq]);
    rig_ledger ledger = rig_read_ledger(r);
    SAME(ledger.n[SH_CLASS_UPDATE][SH_LEDGER_ACKED], ROUNDS);
    SAME(ledger.n[SH_CLASS_UPDATE][SH_LEDGER_OWED], 0);
    SAME(ledger.n[SH_CLASS_ALARM][SH_LEDGER_ACKED], status.alarms + 1); /* and the evaluation */
    SAME(status.active_version, 3);
    SAME(status.confirmed_version, 3);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(rig_count(r, SH_NODE_T_OUTBOX), 0);
    sh_hash sha = sh_sha256(r->releases[2].model.data, r->releases[2].model.len);
    assert_memory_equal(&r->slots[r->active_slot], &sha, sizeof(sha));
    SAME(status.bad_messages, 0);
}

static unsigned starve, starved; /* of 100 steps; steps that failed */

static uint64_t story(uint64_t seed, uint64_t crash_at, rig_crash crash, unsigned faults)
{
    rig *r = rig_open(seed);
    r->starve = starve;
    r->crash_at = crash_at;
    r->crash = crash;
    r->lose = r->repeat = faults;
    r->reorder = faults > 0;
    r->options.evaluate = true;
    r->update_bytes = SH_CHUNK_BYTES + 1000;
    rig_make_release(r, 2, SH_CHUNK_BYTES + 500);
    rig_make_release(r, 3, 3000);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    feed(r, 0, 60);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    until(r, "acknowledged", has_acked, 1);
    r->update_bytes = 3000;
    feed(r, 60, 100);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    until(r, "evaluated", has_evaluated, 1);
    r->offer = 2;
    until(r, "active", has_active, 2);
    feed(r, 100, 140);
    until(r, "confirmed", has_confirmed, 2);
    r->plan.train = rig_train_plan(r, 2, 2);
    until(r, "acknowledged", has_acked, 2);
    rig_link(r, false);
    feed(r, 140, 330);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 3, 2);
    until(r, "acknowledged", has_acked, 3);
    r->offer = 3;
    until(r, "active", has_active, 3);
    feed(r, 330, INFERENCES);
    until(r, "confirmed", has_confirmed, 3);
    until(r, "owing", owes_nothing, 0);
    check_end(r);
    uint64_t steps = r->steps;
    starved += r->starved;
    rig_close(&r);
    return steps;
}

static void a_crash_at_every_step(void **state)
{
    (void)state;
    uint64_t steps = story(1, UINT64_MAX, CRASH_NEVER, 0);
    printf("the story has %llu steps\n", (unsigned long long)steps);
    assert_true(steps > 300);
    for (uint64_t at = 0; at < steps; at++) {
        story(1, at, CRASH_BEFORE_COMMIT, 0);
        story(1, at, CRASH_AFTER_COMMIT, 0);
    }
}

static void bad_networks(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 60; seed++)
        story(seed, UINT64_MAX, CRASH_NEVER, 1 + (unsigned)(seed % 30));
}

static void bad_networks_and_a_crash(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 100; seed++)
        story(seed, seed * 7 % 600, seed % 2 ? CRASH_BEFORE_COMMIT : CRASH_AFTER_COMMIT,
              (unsigned)(seed % 25));
}

/* Memory runs out at any allocation of a step: the step did not happen, and nothing else. */
static void no_memory(void **state)
{
    (void)state;
    starve = 4;
    for (uint64_t seed = 1; seed <= 40; seed++)
        story(seed, UINT64_MAX, CRASH_NEVER, 0);
    starve = 0;
    printf("%u steps had no memory\n", starved);
    assert_true(starved > 100);
}

/* The same seed and events, the same actions. */
static void it_is_deterministic(void **state)
{
    (void)state;
    SAME(story(5, 100, CRASH_AFTER_COMMIT, 10), story(5, 100, CRASH_AFTER_COMMIT, 10));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_is_deterministic),      cmocka_unit_test(bad_networks),
        cmocka_unit_test(bad_networks_and_a_crash), cmocka_unit_test(no_memory),
        cmocka_unit_test(a_crash_at_every_step),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
