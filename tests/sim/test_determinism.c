/*
 * One seed, one result: whatever the number of threads, and on LMDB as in memory. The runs have
 * faults, so that the order of everything is at stake. Lies beside shoal-audit, which a run on LMDB
 * starts.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/sim/rig.h"

#include <stdio.h>
#include <string.h>

#include "tests/store/util.h"

typedef struct {
    char hash[SH_HASH_HEX_BYTES];
    uint64_t events, virtual_ms, crashes, versions;
} outcome;

typedef struct {
    uint64_t seed, threads;
    const char *store, *out, *drop;
} setup;

static outcome run(setup x)
{
    static const char *const words[] = {
        "--nodes", "8", "--learn.rounds", "3", "--network.duplicate", "0.05", "--faults.crash-rate",
        "0.5",     NULL};
    rig r;
    sim_measures none = {0};
    outcome o = {.hash = ""};
    bool ok = false;
    json_t *summary = NULL;
    rig_init(&r, words);
    rig_add_number(&r, "--seed", x.seed);
    rig_add_number(&r, "--threads", x.threads);
    rig_add(&r, "--network.drop", x.drop ? x.drop : "0.05");
    rig_add(&r, "--store", x.store);
    if (x.out)
        rig_add(&r, "--out", x.out);
    rig_create(&r);
    OK(sim_run(r.sim, err));
    OK(sim_summary(r.sim, &none, NULL, &summary, &ok, err));
    snprintf(o.hash, sizeof o.hash, "%s",
             json_string_value(json_object_get(summary, "result_hash")));
    o.events = r.sim->events;
    o.virtual_ms = r.sim->now_ms;
    o.versions = r.sim->version_seen;
    o.crashes = r.sim->coord_life;
    for (uint32_t i = 0; i < r.sim->n_nodes; i++)
        o.crashes += r.sim->nodes[i].crashes;
    printf("seed %llu, %llu threads, store %s, drop %s: %llu events, %llu virtual ms, %llu "
           "crashes, release %llu, hash %.16s\n",
           (unsigned long long)x.seed, (unsigned long long)x.threads, x.store,
           x.drop ? x.drop : "0.05", (unsigned long long)o.events, (unsigned long long)o.virtual_ms,
           (unsigned long long)o.crashes, (unsigned long long)o.versions, o.hash);
    json_decref(summary);
    rig_release(&r);
    return o;
}

static void assert_same(const outcome *a, const outcome *b)
{
    assert_string_equal(a->hash, b->hash);
    assert_int_equal(a->events, b->events);
    assert_int_equal(a->virtual_ms, b->virtual_ms);
}

static void test_threads(void **state)
{
    (void)state;
    outcome one = run((setup){.seed = 5, .threads = 1, .store = "memory"});
    outcome again = run((setup){.seed = 5, .threads = 1, .store = "memory"});
    outcome two = run((setup){.seed = 5, .threads = 2, .store = "memory"});
    outcome four = run((setup){.seed = 5, .threads = 4, .store = "memory"});
    assert_same(&one, &again);
    assert_same(&one, &two);
    assert_same(&one, &four);
    /* The run was one in which something happened. */
    assert_true(one.versions >= 4);
    assert_true(one.crashes > 10);
}

static void test_stores(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    outcome memory = run((setup){.seed = 6, .threads = 2, .store = "memory"});
    outcome lmdb =
        run((setup){.seed = 6, .threads = 2, .store = "lmdb", .out = temp_path(&dir, "run")});
    temp_dir_remove(&dir);
    assert_same(&memory, &lmdb);
}

/* The hash can tell runs apart, and not by the seed alone. */
static void test_differences(void **state)
{
    (void)state;
    outcome a = run((setup){.seed = 7, .threads = 2, .store = "memory"});
    outcome b = run((setup){.seed = 8, .threads = 2, .store = "memory"});
    outcome c = run((setup){.seed = 7, .threads = 2, .store = "memory", .drop = "0.06"});
    assert_string_not_equal(a.hash, b.hash);
    assert_string_not_equal(a.hash, c.hash);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_stores),
        cmocka_unit_test(test_differences),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
