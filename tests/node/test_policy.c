/* What the node does and leaves, by its device's signals; what waits goes when its policy holds. */
#include "tests/node/rig.h"

#include <string.h>

#define MINUTE_MS 60000ull
#define HOUR_MS   (60 * MINUTE_MS)
#define DAY_MS    (24 * HOUR_MS)

static sh_node_signals unknown(void)
{
    return (sh_node_signals){.idle_ms = SH_IDLE_UNKNOWN, .temperature_mc = SH_TEMPERATURE_UNKNOWN};
}

static sh_node_signals metered(sh_signal signal)
{
    sh_node_signals g = unknown();
    g.metered = signal;
    return g;
}

static void windows(rig *r, unsigned n)
{
    for (unsigned i = 0; i < n * 32; i++)
        rig_infer(r, (unsigned)r->fed, false);
}

static void test_without_policies_nothing_changes(void **state)
{
    (void)state;
    rig *r = rig_open(1);
    rig_start(r);
    sh_node_signals g = {
        .metered = SH_SIGNAL_YES, .power = SH_SIGNAL_NO, .idle_ms = 0, .temperature_mc = 99000};
    rig_signals(r, &g);
    for (int i = 0; i < SH_POLICIES; i++)
        assert_true(rig_status(r).holds[i]);
    rig_teach(r, 1, 0, 100, true);
    windows(r, 2);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_link(r, true);
    rig_run(r, 5000, true);
    SAME(r->n_taken[SH_CLASS_WINDOW], 2);
    SAME(r->n_taken[SH_CLASS_UPDATE], 1);
    SAME(r->checkin.conditions, SH_CONDITION_METERED | SH_CONDITION_BATTERY);
    rig_close(&r);
}

typedef struct {
    sh_node_policy policy;
    sh_node_signals no, yes;
} condition;

static void test_each_condition(void **state)
{
    (void)state;
    condition conditions[] = {
        {.policy = {.unmetered = true}, .no = unknown(), .yes = unknown()},
        {.policy = {.power = true}, .no = unknown(), .yes = unknown()},
        {.policy = {.temperature_mc_max = 60000}, .no = unknown(), .yes = unknown()},
        {.policy = {.idle_ms_min = 1000}, .no = unknown(), .yes = unknown()},
    };
    conditions[0].no.metered = SH_SIGNAL_YES, conditions[0].yes.metered = SH_SIGNAL_NO;
    conditions[1].no.power = SH_SIGNAL_NO, conditions[1].yes.power = SH_SIGNAL_YES;
    conditions[2].no.temperature_mc = 60000, conditions[2].yes.temperature_mc = 59999;
    conditions[3].no.idle_ms = 999, conditions[3].yes.idle_ms = 1000;
    for (int kind = 0; kind < SH_POLICIES; kind++)
        for (size_t i = 0; i < SH_COUNT(conditions); i++)
            for (int allowed = 0; allowed < 2; allowed++) {
                rig *r = rig_open(2);
                sh_node_signals nothing = unknown();
                r->options.policies[kind] = conditions[i].policy;
                r->options.policies[kind].unknown_allowed = allowed != 0;
                rig_start(r);
                r->now += 100000;
                rig_signals(r, &conditions[i].no);
                assert_false(rig_status(r).holds[kind]);
                assert_true(rig_status(r).holds[(kind + 1) % SH_POLICIES]);
                rig_signals(r, &conditions[i].yes);
                assert_true(rig_status(r).holds[kind]);
                rig_signals(r, &nothing);
                /* Idleness is known without a source: from the node's own requests. */
                SAME(rig_status(r).holds[kind], allowed != 0 || i == 3);
                rig_close(&r);
            }
}

static void test_feedback_and_windows_wait(void **state)
{
    (void)state;
    rig *r = rig_open(3);
    sh_node_signals costly = metered(SH_SIGNAL_YES), free_of_charge = metered(SH_SIGNAL_NO);
    r->options.policies[SH_POLICY_FEEDBACK].unmetered = true;
    r->options.policies[SH_POLICY_WINDOWS].unmetered = true;
    r->options.checkin_blocked_ms = HOUR_MS;
    rig_start(r);
    rig_signals(r, &costly);
    rig_teach(r, 1, 0, 100, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_link(r, true);
    rig_run(r, 3000, true); /* the first check-in is let through: training is allowed here */
    SAME(r->sent[SH_MSG_CHECKIN], 1);
    SAME(rig_status(r).updates_made, 1);
    windows(r, 3);
    rig_run(r, 20000, true);
    SAME(r->sent[SH_MSG_ITEM], 0);
    SAME(r->sent[SH_MSG_CHECKIN], 1);
    SAME(rig_status(r).inferences, 96); /* and inference went on */
    rig_signals(r, &free_of_charge);    /* its own step sends what waited */
    assert_true(r->sent[SH_MSG_ITEM] >= 4);
    SAME(r->sent[SH_MSG_CHECKIN], 2);
    rig_run(r, 3000, true);
    SAME(r->n_taken[SH_CLASS_UPDATE], 1);
    SAME(r->n_taken[SH_CLASS_WINDOW], 3);
    SAME(rig_status(r).outbox_items, 0);
    rig_close(&r);
}

/* One class's policy is not the other's. An item on its way is not sent again meanwhile. */
static void test_classes_are_apart(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    sh_node_signals costly = metered(SH_SIGNAL_YES), nothing = unknown();
    r->options.policies[SH_POLICY_WINDOWS] =
        (sh_node_policy){.unmetered = true, .unknown_allowed = true};
    rig_start(r);
    rig_signals(r, &nothing);
    rig_link(r, true);
    rig_run(r, 100, true); /* it is welcome */
    r->mute = true;
    windows(r, 1);
    unsigned sent = r->sent[SH_MSG_ITEM];
    assert_true(sent > 0);
    rig_signals(r, &costly);
    rig_run(r, 20000, true);
    SAME(r->sent[SH_MSG_ITEM], sent);
    assert_true(r->sent[SH_MSG_CHECKIN] > 2); /* FEEDBACK holds */
    r->mute = false;
    rig_teach(r, 1, 0, 100, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_run(r, 5000, true);
    SAME(r->n_taken[SH_CLASS_UPDATE], 1);
    SAME(r->n_taken[SH_CLASS_WINDOW], 0);
    rig_close(&r);
}

static void test_downloads_wait(void **state)
{
    (void)state;
    rig *r = rig_open(5);
    sh_node_signals costly = metered(SH_SIGNAL_YES), free_of_charge = metered(SH_SIGNAL_NO);
    r->options.policies[SH_POLICY_DOWNLOAD].unmetered = true;
    rig_make_release(r, 2, 5 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_signals(r, &costly);
    r->offer = 2;
    rig_link(r, true);
    rig_run(r, 5000, true);
    SAME(r->sent[SH_MSG_WANT], 0);
    SAME(rig_status(r).active_version, 1);
    r->chunk_budget = 2;
    rig_signals(r, &free_of_charge);
    SAME(r->sent[SH_MSG_WANT], 1);
    rig_run(r, 20, true);
    rig_signals(r, &costly); /* in the middle of it */
    unsigned wants = r->sent[SH_MSG_WANT];
    rig_run(r, 10000, true);
    SAME(r->sent[SH_MSG_WANT], wants);
    rig_signals(r, &free_of_charge);
    rig_run(r, 10000, true);
    SAME(rig_status(r).active_version, 2);
    SAME(r->chunks_served, 5); /* each came once */
    rig_close(&r);
}

static void test_training_stops_and_begins_again(void **state)
{
    (void)state;
    rig *r = rig_open(6);
    sh_node_signals battery = unknown(), mains = unknown();
    battery.power = SH_SIGNAL_NO, mains.power = SH_SIGNAL_YES;
    r->options.policies[SH_POLICY_TRAIN].power = true;
    r->drop_cancelled = true;
    rig_start(r);
    rig_signals(r, &battery);
    rig_teach(r, 1, 0, 100, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_link(r, true);
    rig_run(r, 500, false);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    SAME(r->checkin.conditions, SH_CONDITION_BATTERY);
    r->mute = true;                    /* no plan says it again */
    for (unsigned i = 0; i < 8; i++) { /* more often than a training may fail */
        rig_signals(r, &mains);
        assert_true(rig_job_waits(r, SH_JOB_TRAIN));
        rig_signals(r, &battery);
        assert_false(rig_job_waits(r, SH_JOB_TRAIN));
        SAME(r->cancelled, i + 1);
        SAME(r->notes[SH_NOTE_TRAIN_STOPPED], i + 1);
        SAME(rig_status(r).training_round, 0);
    }
    rig_signals(r, &mains);
    assert_true(rig_finish_job(r, SH_JOB_TRAIN));
    SAME(rig_status(r).updates_made, 1);
    rig_signals(r, &battery);
    rig_signals(r, &mains);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN)); /* the round is done with */
    rig_close(&r);
}

static void test_evaluation_waits_too(void **state)
{
    (void)state;
    rig *r = rig_open(7);
    sh_node_signals battery = unknown(), mains = unknown();
    battery.power = SH_SIGNAL_NO, mains.power = SH_SIGNAL_YES;
    r->options.policies[SH_POLICY_TRAIN].power = true;
    r->options.evaluate = true;
    r->options.evaluate_tokens_min = 1;
    r->drop_cancelled = true;
    rig_make_release(r, 2, 2 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_teach(r, 1, 0, 100, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_signals(r, &battery);
    rig_link(r, true);
    rig_run(r, 2000, false);
    assert_false(rig_job_waits(r, SH_JOB_EVALUATE));
    SAME(r->chunks_served, 2);
    rig_signals(r, &mains);
    assert_true(rig_job_waits(r, SH_JOB_EVALUATE));
    rig_signals(r, &battery);
    assert_false(rig_job_waits(r, SH_JOB_EVALUATE));
    rig_signals(r, &mains);
    rig_run(r, 2000, true);
    SAME(r->n_evaluations, 1);
    rig_close(&r);
}

/* From 22:00 to 06:00 two hours east of Greenwich, that is from 20:00 to 04:00 UTC. */
static void test_hours(void **state)
{
    (void)state;
    rig *r = rig_open(8);
    r->now = 20000 * DAY_MS + 19 * HOUR_MS;
    r->coarse = true;
    r->options.utc_offset_min = 120;
    r->options.policies[SH_POLICY_TRAIN].from_min = 22 * 60;
    r->options.policies[SH_POLICY_TRAIN].to_min = 6 * 60;
    r->plan.return_after_ms = 3 * DAY_MS;
    r->drop_cancelled = true;
    rig_start(r);
    rig_teach(r, 1, 0, 100, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_link(r, true);
    rig_run(r, HOUR_MS - 1, false);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    SAME(rig_status(r).conditions, SH_CONDITION_HOURS);
    rig_run(r, 2, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_run(r, 8 * HOUR_MS - 2, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_run(r, 2, false);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN)); /* its time was over: cancelled */
    rig_run(r, 16 * HOUR_MS, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_close(&r);
}

static void test_idle(void **state)
{
    (void)state;
    rig *r = rig_open(9);
    sh_node_signals g = unknown();
    r->options.policies[SH_POLICY_TRAIN].idle_ms_min = 10 * MINUTE_MS;
    r->coarse = true;
    r->plan.return_after_ms = 3 * DAY_MS;
    r->drop_cancelled = true;
    rig_start(r);
    rig_teach(r, 1, 0, 100, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_link(r, true);
    rig_run(r, 9 * MINUTE_MS, false);
    rig_infer(r, 1, false);
    rig_run(r, 10 * MINUTE_MS - 1, false);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    SAME(rig_status(r).conditions, SH_CONDITION_BUSY);
    rig_run(r, 2, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_infer(r, 2, false); /* its user is back: the inference is taken, the training goes */
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    SAME(rig_status(r).inferences, 2);
    rig_run(r, 20 * MINUTE_MS, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    g.idle_ms = 0; /* a key was pressed, says the source */
    rig_signals(r, &g);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    rig_run(r, 10 * MINUTE_MS + 1, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_close(&r);
}

static void test_checkins_while_blocked(void **state)
{
    (void)state;
    rig *r = rig_open(10);
    sh_node_signals costly = metered(SH_SIGNAL_YES), away = metered(SH_SIGNAL_NO);
    away.network = SH_SIGNAL_NO;
    r->options.policies[SH_POLICY_FEEDBACK].unmetered = true;
    r->options.checkin_blocked_ms = 6 * HOUR_MS;
    r->options.retry_max_ms = MINUTE_MS;
    r->plan.return_after_ms = 10 * MINUTE_MS;
    r->coarse = true;
    rig_start(r);
    rig_signals(r, &costly);
    rig_link(r, true);
    rig_run(r, DAY_MS - 1000, false);
    SAME(r->sent[SH_MSG_CHECKIN], 4);
    SAME(r->sent[SH_MSG_ENROL], 1);
    rig_signals(r, &away); /* a link that the device says is not there */
    rig_run(r, DAY_MS, false);
    SAME(r->sent[SH_MSG_CHECKIN], 4);
    away.network = SH_SIGNAL_YES;
    rig_signals(r, &away);
    rig_run(r, HOUR_MS - 1000, false);
    SAME(r->sent[SH_MSG_CHECKIN], 10);
    rig_close(&r);
}

/* Signals that come and go at random, crashes, lost packets: at the end everything has arrived. */
static void test_everything_arrives(void **state)
{
    (void)state;
    uint64_t updates = 0;
    for (uint64_t seed = 20; seed < 40; seed++) {
        rig *r = rig_open(seed);
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 81);
        for (int i = 0; i < SH_POLICIES; i++)
            r->options.policies[i] = (sh_node_policy){.unmetered = true,
                                                      .power = i == SH_POLICY_TRAIN,
                                                      .unknown_allowed = i != SH_POLICY_TRAIN,
                                                      .temperature_mc_max = 50000};
        r->options.checkin_blocked_ms = 5000;
        r->lose = r->repeat = 10;
        rig_make_release(r, 2, 4 * SH_CHUNK_BYTES);
        rig_start(r);
        rig_teach(r, 1, 0, 100, true);
        r->plan.train = rig_train_plan(r, 1, 1);
        rig_link(r, true);
        for (unsigned i = 0; i < 40; i++) {
            sh_node_signals g = {.network = sh_rng_below(&rng, 3),
                                 .metered = sh_rng_below(&rng, 3),
                                 .power = sh_rng_below(&rng, 3),
                                 .idle_ms = SH_IDLE_UNKNOWN,
                                 .temperature_mc = (int32_t)sh_rng_below(&rng, 100000)};
            rig_signals(r, &g);
            if (i % 2 == 0)
                windows(r, 1);
            if (i == 20)
                r->offer = 2;
            if (sh_rng_below(&rng, 8) == 0) {
                rig_restart(r);
                rig_link(r, true);
            }
            rig_run(r, sh_rng_below(&rng, 2000), true);
        }
        sh_node_signals good = {.network = SH_SIGNAL_YES,
                                .metered = SH_SIGNAL_NO,
                                .power = SH_SIGNAL_YES,
                                .idle_ms = 0,
                                .temperature_mc = 20000};
        rig_signals(r, &good);
        rig_run(r, 60000, true);
        SAME(rig_status(r).outbox_items, 0);
        SAME(rig_status(r).active_version, 2);
        SAME(r->n_taken[SH_CLASS_WINDOW], rig_status(r).windows);
        SAME(r->n_taken[SH_CLASS_UPDATE], rig_status(r).updates_made);
        updates += rig_status(r).updates_made; /* none where its base went first */
        rig_close(&r);
    }
    assert_true(updates > 5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_without_policies_nothing_changes),
        cmocka_unit_test(test_each_condition),
        cmocka_unit_test(test_feedback_and_windows_wait),
        cmocka_unit_test(test_classes_are_apart),
        cmocka_unit_test(test_downloads_wait),
        cmocka_unit_test(test_training_stops_and_begins_again),
        cmocka_unit_test(test_evaluation_waits_too),
        cmocka_unit_test(test_hours),
        cmocka_unit_test(test_idle),
        cmocka_unit_test(test_checkins_while_blocked),
        cmocka_unit_test(test_everything_arrives),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
