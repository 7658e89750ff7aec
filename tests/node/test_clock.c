/* A device whose clock is years off, and set while the node runs. */
#include "tests/node/rig.h"

#define MINUTE_MS 60000ull
#define HOUR_MS   (60 * MINUTE_MS)
#define DAY_MS    (24 * HOUR_MS)
#define YEAR_MS   (365 * DAY_MS)
#define TRUE_MS   (20484 * DAY_MS) /* 31 January 2026 */
#define BACK      ((uint64_t) - (int64_t)(30 * YEAR_MS))
#define AHEAD     (30 * YEAR_MS)

/* A node whose process began with a clock that was off by `off`; the true time is TRUE_MS + (now -
 * its start). */
static rig *open_off(uint64_t seed, uint64_t off)
{
    rig *r = rig_open(seed);
    r->now = TRUE_MS + off;
    r->has_wall = true;
    r->stamps = true;
    r->true_offset = 0 - off;
    r->coarse = true;
    r->plan.return_after_ms = HOUR_MS;
    r->options.retry_max_ms = 10000;
    r->options.feedback_age_ms_max = 30 * DAY_MS;
    return r;
}

static uint64_t apart(uint64_t a, uint64_t b)
{
    return a > b ? a - b : b - a;
}

static uint64_t true_ms(const rig *r)
{
    return r->now + r->true_offset;
}

static void test_right_after_the_first_plan(void **state)
{
    (void)state;
    static const uint64_t offs[] = {BACK, AHEAD, 0, 2 * DAY_MS, (uint64_t) - (int64_t)(2 * DAY_MS)};
    for (size_t i = 0; i < SH_COUNT(offs); i++) {
        rig *r = open_off(1, offs[i]);
        rig_start(r);
        rig_link(r, true);
        SAME(rig_status(r).wall_ms, r->now);
        SAME(rig_status(r).clock_trusted, false);
        rig_run(r, MINUTE_MS, true);
        assert_true(rig_status(r).clock_trusted);
        assert_true(apart(rig_status(r).wall_ms, true_ms(r)) <= MINUTE_MS);
        SAME(r->notes[SH_NOTE_CLOCK_SET], offs[i] != 0);
        rig_run(r, HOUR_MS, true);
        SAME(r->checkin.conditions, offs[i] ? SH_CONDITION_CLOCK : 0);
        assert_true(apart(r->checkin.now_ms, true_ms(r)) <= MINUTE_MS);
        assert_true(apart(rig_status(r).last_sync_ms, true_ms(r)) <= MINUTE_MS);
        /* From then on the device's clock says nothing, and nothing more is set. */
        r->wall_offset = 7 * YEAR_MS;
        rig_run(r, DAY_MS, true);
        assert_true(apart(rig_status(r).wall_ms, true_ms(r)) <= HOUR_MS);
        SAME(r->notes[SH_NOTE_CLOCK_SET], offs[i] != 0);
        rig_close(&r);
    }
}

/* As wrong as before after a restart, put right meanwhile, or at its beginning again. */
static void test_restarts(void **state)
{
    (void)state;
    static const uint64_t offs[] = {BACK, AHEAD};
    for (size_t i = 0; i < SH_COUNT(offs); i++)
        for (unsigned how = 0; how < 3; how++) {
            rig *r = open_off(2, offs[i]);
            rig_start(r);
            rig_link(r, true);
            rig_run(r, 2 * HOUR_MS, true);
            uint64_t was = rig_status(r).wall_ms, then = true_ms(r) + 5 * HOUR_MS;
            if (how == 0) /* five hours later */
                r->now += 5 * HOUR_MS;
            else if (how == 1) /* put right */
                r->now = then;
            else /* no battery: its clock begins in 1970 */
                r->now = 1000;
            r->true_offset = then - r->now;
            r->timer = RIG_TIMER_NONE;
            rig_restart(r);
            rig_infer(r, 1, false); /* offline */
            if (how < 2)
                assert_true(apart(rig_status(r).wall_ms, then) <= 10 * MINUTE_MS);
            else
                assert_true(rig_status(r).wall_ms >= was - HOUR_MS); /* the floor holds */
            SAME(rig_status(r).clock_trusted, false);
            rig_link(r, true);
            rig_run(r, MINUTE_MS, true);
            assert_true(apart(rig_status(r).wall_ms, true_ms(r)) <= 6 * MINUTE_MS);
            rig_close(&r);
        }
}

/* Steps of the clock while it runs, before any plan: check-ins come when they should. */
static void test_intervals(void **state)
{
    (void)state;
    for (unsigned stamps = 0; stamps < 2; stamps++) {
        rig *r = open_off(3, 0);
        r->stamps = stamps != 0;
        rig_start(r);
        rig_link(r, true);
        static const uint64_t offs[] = {AHEAD, 0, BACK, AHEAD, BACK, 0};
        for (size_t i = 0; i < SH_COUNT(offs); i++) {
            unsigned before = r->sent[SH_MSG_CHECKIN];
            uint64_t row = rig_status(r).row_ms;
            r->wall_offset = offs[i];
            rig_infer(r, (unsigned)i, false);
            rig_run(r, 10 * HOUR_MS, true);
            SAME(r->sent[SH_MSG_CHECKIN] - before, 10);
            assert_true(rig_status(r).row_ms >= row);
            assert_true(rig_status(r).row_ms <=
                        row + 11 * HOUR_MS + (row == 0 ? UINT64_MAX / 2 : 0));
        }
        rig_close(&r);
    }
}

/* Feedback of today lives 30 days of the node's life, whatever its clock said and says. */
static void test_retention(void **state)
{
    (void)state;
    static const uint64_t offs[] = {0, AHEAD, BACK};
    for (size_t start = 0; start < SH_COUNT(offs); start++)
        for (unsigned online = 0; online < 2; online++) {
            bool gone = false;
            rig *r = open_off(4, offs[start]);
            rig_start(r);
            rig_teach(r, 1, 0, 40, true);
            SAME(rig_count(r, SH_NODE_T_FEEDBACK), 1);
            if (online)
                rig_link(r, true);
            for (unsigned day = 0; day < 29; day++) {
                r->wall_offset = offs[day % 3] - offs[start]; /* it jumps both ways */
                rig_infer(r, day, false);
                rig_run(r, DAY_MS, true);
                gone = rig_count(r, SH_NODE_T_FEEDBACK) == 0;
                /* Offline a jump at a start may count as a week off. */
                assert_true(!gone || (!online && day >= 14));
                if (day % 10 == 9) { /* a process that begins with another clock */
                    uint64_t then = true_ms(r);
                    r->now += offs[(day + 1) % 3];
                    r->true_offset = then - r->now;
                    rig_restart(r);
                    if (online)
                        rig_link(r, true);
                    rig_infer(r, day, false);
                }
            }
            /* Each start may cost what was not kept since the last step: here a day. */
            rig_run(r, 4 * DAY_MS, true);
            SAME(rig_count(r, SH_NODE_T_FEEDBACK), 0);
            rig_close(&r);
        }
}

/* Two months in a drawer: believed when the aggregator's time says so. */
static void test_long_time_off(void **state)
{
    (void)state;
    rig *r = open_off(8, 0);
    rig_start(r);
    rig_link(r, true);
    rig_run(r, HOUR_MS, true);
    rig_teach(r, 1, 0, 40, true);
    r->now += 60 * DAY_MS;
    rig_restart(r);
    rig_run(r, DAY_MS, true);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 1); /* it may as well be a clock that is wrong */
    rig_link(r, true);
    rig_run(r, MINUTE_MS, true);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 0);
    rig_close(&r);
}

/* Rows that an earlier program wrote with a clock that was 30 years ahead. */
static void test_rows_of_the_future(void **state)
{
    (void)state;
    rig *r = open_off(5, 0);
    sh_txn *txn = NULL;
    r->now += AHEAD;
    rig_start(r);
    rig_teach(r, 1, 0, 40, true);
    rig_teach(r, 2, 0, 40, true);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err)); /* it had no row of its clock */
    OK(sh_txn_del(txn, SH_NODE_T_META, "clock", 5, &test_err));
    OK(sh_txn_commit(&txn, &test_err));
    r->now -= AHEAD;
    rig_restart(r);
    rig_teach(r, 3, 0, 40, true);
    rig_run(r, 29 * DAY_MS, true);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 3);
    rig_run(r, 2 * DAY_MS, true);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 0);
    rig_close(&r);
}

static void give_stamp(rig *r, uint64_t ms, const sh_sign_secret_key *sk)
{
    sh_buf stamp;
    sh_buf_init(&stamp, SH_WIRE_TIME_MAX);
    OK(sh_time_sign(ms, sk, &stamp, &test_err));
    sh_msg msg = {.type = SH_MSG_PLAN, .plan = {.return_after_ms = HOUR_MS}};
    msg.plan.time = (sh_bytes){stamp.data, stamp.len};
    rig_message(r, &msg);
    sh_buf_release(&stamp);
}

static void test_stamps(void **state)
{
    (void)state;
    rig *r = open_off(6, 0);
    sh_sign_public_key other_pk;
    sh_sign_secret_key other;
    uint8_t seed[32] = {9};
    sh_sign_keypair(seed, &other_pk, &other);
    rig_start(r);
    rig_link(r, true);
    give_stamp(r, TRUE_MS + YEAR_MS, &other); /* another's signature */
    SAME(rig_status(r).bad_messages, 1);
    SAME(rig_status(r).wall_ms, r->now);
    SAME(rig_status(r).clock_trusted, false);
    give_stamp(r, TRUE_MS + YEAR_MS, &r->sk);
    SAME(rig_status(r).wall_ms, TRUE_MS + YEAR_MS);
    assert_true(rig_status(r).clock_trusted);
    give_stamp(r, TRUE_MS, &r->sk); /* an old one, said again */
    SAME(rig_status(r).wall_ms, TRUE_MS + YEAR_MS);
    r->now += 2000;
    give_stamp(r, TRUE_MS + YEAR_MS + 5 * MINUTE_MS, &r->sk); /* near enough */
    SAME(rig_status(r).wall_ms, TRUE_MS + YEAR_MS + 2000);
    give_stamp(r, TRUE_MS + YEAR_MS + 2 * HOUR_MS, &other); /* not near: looked at, refused */
    SAME(rig_status(r).wall_ms, TRUE_MS + YEAR_MS + 2000);
    SAME(rig_status(r).bad_messages, 2);
    rig_restart(r); /* the floor was kept; the skew, too */
    rig_infer(r, 1, false);
    assert_true(rig_status(r).wall_ms >= TRUE_MS + YEAR_MS);
    rig_close(&r);
}

/* Windows, the ledger and alarms bear true dates once there was a plan, also for records of before.
 */
static void test_dates(void **state)
{
    (void)state;
    rig *r = open_off(7, BACK);
    rig_start(r);
    for (unsigned i = 0; i < 16; i++)
        rig_infer(r, i, false);
    rig_link(r, true);
    rig_run(r, MINUTE_MS, true);
    for (unsigned i = 16; i < 32; i++)
        rig_infer(r, i, false);
    SAME(rig_status(r).windows, 1);
    sh_txn *txn = NULL;
    sh_slice value;
    uint8_t key[8];
    sh_window window;
    sh_key_put_u64(key, 1);
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_txn_get(txn, SH_NODE_T_WINDOW, key, 8, &value));
    OK(sh_window_decode(value.data, value.n, &window, &test_err));
    sh_txn_abort(&txn);
    assert_true(apart(window.start_ms, TRUE_MS) <= 2 * MINUTE_MS);
    assert_true(apart(window.end_ms, true_ms(r)) <= MINUTE_MS);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_right_after_the_first_plan),
        cmocka_unit_test(test_restarts),
        cmocka_unit_test(test_intervals),
        cmocka_unit_test(test_retention),
        cmocka_unit_test(test_long_time_off),
        cmocka_unit_test(test_rows_of_the_future),
        cmocka_unit_test(test_stamps),
        cmocka_unit_test(test_dates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
