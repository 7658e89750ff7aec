/* Bytes of a day and a month: what waits, what goes on, what is kept over restarts. */
#include "tests/node/rig.h"

#define MINUTE_MS 60000ull
#define HOUR_MS   (60 * MINUTE_MS)
#define DAY_MS    (24 * HOUR_MS)
#define YEAR_MS   (365 * DAY_MS)
#define CHUNKS    20u
#define JAN_31    (20484 * DAY_MS) /* of 2026 */

static rig *open_at(uint64_t seed, uint64_t now)
{
    rig *r = rig_open(seed);
    r->now = now;
    r->coarse = true;
    r->plan.return_after_ms = 30 * MINUTE_MS;
    return r;
}

static void windows(rig *r, unsigned n)
{
    for (unsigned i = 0; i < n * 32; i++)
        rig_infer(r, (unsigned)r->fed, false);
}

/* A release of CHUNKS chunks with a budget of about six a day. */
static void test_release_over_days(void **state)
{
    (void)state;
    rig *r = open_at(1, JAN_31 + 12 * HOUR_MS);
    uint64_t budget = 6 * (SH_CHUNK_BYTES + 1024) + 20000;
    r->options.budgets.down_day = budget;
    r->options.confirm_inferences = 0;
    rig_make_release(r, 2, CHUNKS * SH_CHUNK_BYTES - 7);
    rig_start(r);
    r->offer = 2;
    rig_link(r, true);
    uint64_t before = 0;
    unsigned day = 0;
    for (; rig_status(r).active_version == 1; day++) {
        assert_true(day < 5);
        rig_run(r, day == 0 ? 12 * HOUR_MS - 1 : DAY_MS, true);
        uint64_t bytes = r->bytes_down - before;
        if (day < 3) {
            SAME(r->chunks_served, 6 * (day + 1));
            assert_true(rig_status(r).conditions & SH_CONDITION_BUDGET);
            SAME(rig_status(r).active_version, 1);
        }
        assert_true(bytes <= budget + budget / 8 + (64u << 10));
        before = r->bytes_down;
        if (day == 1) { /* it knows over a restart what it has, and what it has used */
            rig_restart(r);
            rig_link(r, true);
            rig_run(r, 1, true);
            SAME(r->chunks_served, 12);
            before = r->bytes_down;
        }
    }
    SAME(day, 4);
    SAME(r->chunks_served, CHUNKS); /* each came once, whatever stood between */
    rig_close(&r);
}

/* Windows wait for the next day; check-ins and their answers go on, until the overdraft is used. */
static void test_up(void **state)
{
    (void)state;
    rig *r = open_at(2, JAN_31 + HOUR_MS);
    r->options.budgets.up_day = 20000;
    rig_start(r);
    windows(r, 60);
    rig_link(r, true);
    rig_run(r, 10 * MINUTE_MS, true);
    uint64_t owed = rig_status(r).outbox_items;
    unsigned taken = r->n_taken[SH_CLASS_WINDOW];
    assert_true(owed > 0 && taken > 0);
    SAME(rig_status(r).conditions, SH_CONDITION_BUDGET);
    assert_true(r->bytes_up >= 20000 && r->bytes_up < 20000 + 32768);
    SAME(r->notes[SH_NOTE_BUDGET], 1);
    rig_run(r, 12 * HOUR_MS, true);
    SAME(rig_status(r).outbox_items, owed);
    assert_true(r->sent[SH_MSG_CHECKIN] >= 24);
    SAME(r->checkin.conditions, SH_CONDITION_BUDGET);
    SAME(rig_status(r).bytes_up_day, r->bytes_up);
    uint64_t first = r->bytes_up;
    rig_run(r, 11 * HOUR_MS, true); /* the next day */
    assert_true(rig_status(r).outbox_items < owed);
    assert_true(r->n_taken[SH_CLASS_WINDOW] > taken);
    assert_true(rig_status(r).bytes_up_day < r->bytes_up - first + 1);
    rig_run(r, 10 * DAY_MS, true);
    SAME(rig_status(r).outbox_items, 0);
    rig_close(&r);
}

static void test_overdraft_ends(void **state)
{
    (void)state;
    rig *r = open_at(3, JAN_31);
    r->options.budgets.up_day = 1000;
    r->plan.return_after_ms = 1000; /* it is asked far too often */
    rig_start(r);
    rig_link(r, true);
    rig_run(r, HOUR_MS, true);
    uint64_t most = 1000 + 1000 / 8 + (64u << 10) + 1024;
    assert_true(r->bytes_up > most - 2048 && r->bytes_up < most);
    uint64_t then = r->bytes_up;
    rig_run(r, 22 * HOUR_MS, true);
    SAME(r->bytes_up, then); /* silent */
    rig_run(r, 2 * HOUR_MS, true);
    assert_true(r->bytes_up > then + 1000);
    rig_close(&r);
}

/* A month's budget is new on the first: at midnight where the device is. */
static void test_month(void **state)
{
    (void)state;
    static const struct {
        uint64_t day;
        unsigned left; /* whole days to the next month */
    } cases[] = {{20484, 1},
                 {20485, 28},
                 {20512, 1},
                 {19782, 1} /* 29 February 2024 */,
                 {20453, 1} /* 31 December 2025 */,
                 {20454, 31}};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        rig *r = open_at(4, cases[i].day * DAY_MS + 23 * HOUR_MS);
        r->options.utc_offset_min = -60; /* the local day has two hours left */
        r->options.budgets.up_month = 3000;
        r->options.records_max = 100;
        rig_start(r);
        rig_link(r, true);
        rig_run(r, HOUR_MS, true);
        uint64_t used = rig_status(r).bytes_up_month;
        SAME(used, r->bytes_up);
        rig_run(r, HOUR_MS - 1, true);
        assert_true(rig_status(r).bytes_up_month >= used);
        if (cases[i].left > 1) {
            rig_run(r, (cases[i].left - 1) * DAY_MS, true);
            assert_true(rig_status(r).bytes_up_month >= used);
            assert_true(rig_status(r).bytes_up_month > rig_status(r).bytes_up_day);
        }
        uint64_t before = r->bytes_up;
        rig_run(r, 2 * HOUR_MS, true);
        SAME(rig_status(r).bytes_up_month, r->bytes_up - before);
        rig_close(&r);
    }
}

/* Whatever is done to the device's clock: a day of the node's life has one budget. */
static void test_clock_gives_no_budget(void **state)
{
    (void)state;
    rig *r = open_at(5, JAN_31 + HOUR_MS);
    r->options.budgets.down_day = 3 * (SH_CHUNK_BYTES + 1024);
    r->has_wall = true;
    rig_make_release(r, 2, CHUNKS * SH_CHUNK_BYTES);
    rig_start(r);
    r->offer = 2;
    rig_link(r, true);
    rig_run(r, HOUR_MS, true);
    uint64_t served = r->chunks_served;
    assert_true(served > 0 && served <= 3);
    static const int64_t years[] = {-30, 30, -1, 1, 0, 31, -5, 5};
    for (size_t i = 0; i < SH_COUNT(years); i++) {
        r->wall_offset = (uint64_t)(years[i] * (int64_t)YEAR_MS);
        rig_run(r, HOUR_MS, true);
        SAME(r->chunks_served, served);
        if (years[i] < 0) { /* also at a start: the process begins with that clock */
            r->now += r->wall_offset;
            r->wall_offset = 0;
            r->timer = RIG_TIMER_NONE;
            rig_restart(r);
            rig_link(r, true);
        }
    }
    r->wall_offset = 0;
    rig_run(r, DAY_MS, true);
    assert_true(r->chunks_served > served && r->chunks_served <= 2 * served + 3);
    rig_close(&r);
}

/* What a step counted is there after a crash at once behind its commit. */
static void test_crash(void **state)
{
    (void)state;
    rig *r = open_at(6, JAN_31);
    r->options.budgets.down_day = 5 * (SH_CHUNK_BYTES + 1024);
    rig_make_release(r, 2, CHUNKS * SH_CHUNK_BYTES);
    rig_start(r);
    r->offer = 2;
    rig_link(r, true);
    for (unsigned i = 0; i < 30; i++) {
        r->crash_at = r->steps + 3;
        r->crash = CRASH_AFTER_COMMIT;
        rig_run(r, MINUTE_MS, true);
        SAME(rig_status(r).bytes_down_day, r->bytes_down);
    }
    assert_true(r->bytes_down > 4 * SH_CHUNK_BYTES);
    assert_true(r->bytes_down <= r->options.budgets.down_day * 9 / 8 + (64u << 10));
    rig_close(&r);
}

/* What a full store refused is the shell's to count, and the core's to keep. */
static void test_refusals_are_kept(void **state)
{
    (void)state;
    rig *r = open_at(7, JAN_31);
    sh_node_signals g = {.idle_ms = SH_IDLE_UNKNOWN,
                         .temperature_mc = SH_TEMPERATURE_UNKNOWN,
                         .disk_free = 11,
                         .store_bytes = 12,
                         .store_bytes_max = 13,
                         .store_full = true,
                         .stores_lost = 2,
                         .refused_full = 5};
    rig_start(r);
    rig_signals(r, &g);
    rig_signals(r, &g);
    SAME(rig_status(r).refused_full, 10);
    rig_restart(r);
    SAME(rig_status(r).refused_full, 10);
    g.refused_full = 0;
    rig_signals(r, &g);
    rig_link(r, true);
    rig_run(r, MINUTE_MS, true);
    SAME(r->checkin.refused_full, 10);
    SAME(r->checkin.stores_lost, 2);
    SAME(r->checkin.disk_free, 11);
    SAME(r->checkin.store_bytes, 12);
    SAME(r->checkin.store_bytes_max, 13);
    SAME(r->checkin.conditions, SH_CONDITION_STORE_FULL);
    assert_true(rig_status(r).bytes_up_day > 0 && rig_status(r).bytes_down_day > 0);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_release_over_days),     cmocka_unit_test(test_up),
        cmocka_unit_test(test_overdraft_ends),        cmocka_unit_test(test_month),
        cmocka_unit_test(test_clock_gives_no_budget), cmocka_unit_test(test_crash),
        cmocka_unit_test(test_refusals_are_kept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
