/*
 * The engine of `shoal-sim faults`: its result does not depend on threads, a calm fleet delivers
 * everything, and each kind of fault has its effect.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "experiments/world/world.h"

static const char *file; /* a class of devices without losses */

static world_fleet fleet_of(const char *devices)
{
    world_fleet fleet;
    sh_error err = {0};
    sh_option_list files = {.items = {devices}, .n = devices ? 1 : 0};
    if (world_fleet_read(&files, &fleet, &err) != SH_OK)
        fail_msg("%s", err.text);
    return fleet;
}

static world_result run(const world_options *o, const char *devices, uint32_t threads)
{
    world_fleet fleet = fleet_of(devices);
    world_script script = {0};
    world_result result;
    sh_error err = {0};
    if (world_script_of(o, (uint64_t)o->seed, &script, &err) != SH_OK ||
        world_run(o, &fleet, &script, threads, &result, &err) != SH_OK)
        fail_msg("%s", err.text);
    return result;
}

static world_options options(int64_t seed, int64_t nodes, int64_t days, const char *faults)
{
    return (world_options){.seed = seed,
                           .seeds = 2, /* without progress */
                           .nodes = nodes,
                           .days = days,
                           .threads = 1,
                           .faults = faults};
}

/* ---- the same, whoever runs it ---- */

static void same_hash_for_all_threads(void **state)
{
    (void)state;
    world_options o = options(5, 40, 1, "on");
    world_options shared = o;
    shared.share_all = true;
    world_result one = run(&o, NULL, 1), two = run(&shared, NULL, 2), again = run(&shared, NULL, 3),
                 alone = run(&o, NULL, 2); /* so small a fleet's windows are run by one thread */
    assert_int_equal(one.hash, two.hash);
    assert_int_equal(one.hash, again.hash);
    assert_int_equal(one.hash, alone.hash);
    assert_memory_equal(&one.counts, &two.counts, sizeof one.counts);
    assert_int_equal(one.violations, two.violations);
}

static void another_seed_is_another_run(void **state)
{
    (void)state;
    world_options a = options(5, 10, 1, "off"), b = options(6, 10, 1, "off");
    assert_int_not_equal(run(&a, NULL, 1).hash, run(&b, NULL, 1).hash);
}

/* ---- a calm fleet ---- */

static void calm_fleet_delivers_everything(void **state)
{
    (void)state;
    world_options o = options(3, 20, 3, "off");
    world_result r = run(&o, NULL, 1);
    assert_int_equal(r.violations, 0);
    assert_true(r.rested_ms < WORLD_DAY_MS);
    assert_true(r.counts.releases > 0);
    assert_true(r.counts.confirmations >= 20);
    assert_true(r.counts.windows >= 20 * 3 * 24);
    assert_true(r.counts.checkins >= 20 * 3 * 24);
    assert_true(r.counts.updates > 20);
    assert_true(r.counts.updates_acked == r.counts.updates);
    assert_true(r.oracle.acks_promised > 0 && r.oracle.items_committed > 0);
    /* Nothing is lost, so all but what waits for its chunks goes out once. */
    assert_true(r.oracle.acks_promised * 10 < r.oracle.items_committed * 11);
    for (int k = 0; k < WORLD_FAULT_KINDS; k++)
        assert_int_equal(r.counts.faults[k], 0);
}

/* ---- each fault ---- */

static void every_fault_has_its_effect(void **state)
{
    (void)state;
    for (int k = 0; k < WORLD_FAULT_KINDS; k++) {
        const char *name = world_fault_name((world_fault_kind)k);
        uint64_t count = 0;
        /* What a fault meets is chance: a crash of a node that is off has none. */
        for (int64_t seed = 1; seed <= 12 && count == 0; seed++) {
            world_options o = options(seed, 12, 2, name);
            world_result r = run(&o, NULL, 1);
            count = r.counts.faults[k];
            for (int other = 0; other < WORLD_FAULT_KINDS; other++)
                if (other != k)
                    assert_int_equal(r.counts.faults[other], 0);
        }
        if (count == 0)
            fail_msg("%s: no effect", name);
    }
}

static void partition_delays_and_loses_nothing(void **state)
{
    (void)state;
    world_options o = options(10, 12, 2, "partition,drop,duplicate,reorder,delay,slow");
    world_result r = run(&o, NULL, 1);
    assert_int_equal(r.violations, 0);
    assert_true(r.counts.faults[WORLD_PARTITION] > 0);
}

/* ---- devices ---- */

static void bad_devices_are_named(void **state)
{
    (void)state;
    world_fleet fleet;
    sh_error err = {0};
    sh_option_list files = {.items = {file}, .n = 1};
    FILE *f = fopen(file, "w");
    assert_non_null(f);
    fputs("name: x\nonline:\n  hours: [0.5, 0.5, 2]\n", f);
    fclose(f);
    assert_int_equal(world_fleet_read(&files, &fleet, &err), SH_ERR_USAGE);
    assert_non_null(strstr(err.text, "online.hours"));
    f = fopen(file, "w");
    assert_non_null(f);
    fputs("name: x\nlink:\n  delay-ms: 300\n", f);
    fclose(f);
    assert_int_equal(world_fleet_read(&files, &fleet, &err), SH_OK);
    assert_int_equal(fleet.delay_ms_min, 300);
    remove(file);
}

static void shipped_devices_make_up_a_fleet(void **state)
{
    (void)state;
    world_fleet fleet = fleet_of(NULL);
    double shares = 0;
    assert_int_equal(fleet.n, 3);
    for (size_t k = 0; k < fleet.n; k++)
        shares += fleet.classes[k].share;
    assert_true(shares > 0.999 && shares < 1.001);
    assert_true(fleet.delay_ms_min >= 20);
}

int main(void)
{
    char path[] = "world-devices-XXXXXX";
    sh_error err = {0};
    int fd = mkstemp(path);
    if (fd < 0 || sh_crypto_init(&err) != SH_OK)
        return 1;
    file = path;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_hash_for_all_threads),
        cmocka_unit_test(another_seed_is_another_run),
        cmocka_unit_test(calm_fleet_delivers_everything),
        cmocka_unit_test(every_fault_has_its_effect),
        cmocka_unit_test(partition_delays_and_loses_nothing),
        cmocka_unit_test(bad_devices_are_named),
        cmocka_unit_test(shipped_devices_make_up_a_fleet),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
