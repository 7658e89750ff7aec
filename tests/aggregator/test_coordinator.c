/* The coordinator's decisions, one at a time, with nodes and jobs played by hand (rig.h). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/aggregator/rig.h"

#define EPOCH 77

static rig *setup(void)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    return r;
}

static rig *setup_round(void) /* booted, four nodes enrolled, rounds on */
{
    rig *r = setup();
    rig_boot(r);
    for (unsigned node = 0; node < 4; node++)
        rig_enrol(r, node);
    return r;
}

static void finish(rig *r)
{
    rig_check(r, true);
    rig_release(r);
    free(r);
}

static void offer(rig *r, unsigned node, uint64_t seq)
{
    rig_update u = rig_make(r, node, seq);
    assert_true(rig_offer(r, node, &u));
}

static void offer_three(rig *r, uint64_t seq)
{
    for (unsigned node = 0; node < 3; node++)
        offer(r, node, seq);
}

static void expect_row(rig *r, unsigned node, uint64_t seq, sh_verdict verdict, sh_reason reason,
                       uint64_t version)
{
    bool found;
    sh_update_row row = rig_row(r, node, EPOCH, seq, &found);
    assert_true(found);
    if (row.verdict != verdict || row.reason != reason || row.version != version) {
        print_error("node %u seq %llu: verdict %d reason %s version %llu\n", node,
                    (unsigned long long)seq, row.verdict, sh_reason_name(row.reason),
                    (unsigned long long)row.version);
        fail();
    }
}

static void publish_one(rig *r, uint64_t seq)
{
    offer_three(r, seq);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
}

/* ---- start ---- */

static void test_genesis_is_release_one(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.drifting_min = 1;
    rig_boot(r);
    sh_coord_status status = rig_status(r);
    assert_int_equal(status.version, 1);
    assert_int_equal(status.releases, 0);
    assert_int_equal(status.round, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    bool found;
    sh_release_row row = rig_candidate(r, 0, &found);
    assert_true(found);
    assert_string_equal(row.verdict, "genesis");
    assert_int_equal(row.bytes, RIG_MODEL_BYTES);
    rig_reboot(r); /* the second create finds it, and makes no other */
    assert_int_equal(rig_status(r).version, 1);
    finish(r);
}

static void test_options_and_genesis_are_checked(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_coord *coord = NULL;
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_rng_init(&rng, 1, 1, 1);
    sh_genesis other = {.model = {"another", 7}, .format = "Q8_0"};
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &err), SH_OK);
    assert_int_equal(sh_coord_create(&r->options, &other, 0, &rng, txn, actions, &coord, &err),
                     SH_ERR_MISMATCH);
    assert_null(coord);
    assert_int_equal(sh_coord_create(&r->options, NULL, 0, &rng, txn, actions, &coord, &err),
                     SH_OK); /* a store that has begun needs no genesis */
    sh_coord_destroy(&coord);
    sh_coord_options bad[6];
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        bad[i] = r->options;
    bad[0].buffer = 0;
    bad[1].buffer = SH_COORD_BUFFER_MAX + 1;
    bad[2].staleness_discount = NAN;
    bad[3].server_scale = -1;
    bad[4].chunk_budget = 0;
    bad[5].gate_overall_max = NAN;
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        assert_int_equal(sh_coord_create(&bad[i], NULL, 0, &rng, txn, actions, &coord, &err),
                         SH_ERR_INVALID);
    sh_txn_abort(&txn);
    sh_coord_actions_clear(actions);
    free(actions);
    finish(r);
}

/* ---- who may speak ---- */

static void expect_error(rig *r, unsigned node, const char *code)
{
    sh_msg msg;
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_string_equal(msg.error.code, code);
}

static void test_enrolment(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.enrol_any = false;
    rig_boot(r);
    sh_msg enrol = {.type = SH_MSG_ENROL, .enrol = {.epoch = 1, .agent = "a", .kernel = "k"}};
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = 1}}, msg;
    assert_true(rig_send(r, 0, &checkin));
    expect_error(r, 0, "auth");
    assert_true(rig_send(r, 0, &enrol));
    assert_true(rig_take(r, 0, &msg));
    assert_false(msg.welcome.accepted);
    assert_true(rig_command(r, SH_COMMAND_ENROL, 0, 0, 0));
    assert_int_equal(rig_status(r).enrolled, 1);
    assert_true(rig_send(r, 0, &enrol));
    assert_true(rig_take(r, 0, &msg));
    assert_true(msg.welcome.accepted);
    assert_true(rig_send(r, 0, &checkin));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_PLAN);
    assert_true(rig_command(r, SH_COMMAND_REVOKE, 0, 0, 0));
    assert_int_equal(rig_status(r).enrolled, 0);
    assert_true(rig_send(r, 0, &checkin));
    expect_error(r, 0, "auth");
    assert_true(rig_send(r, 0, &enrol));
    assert_true(rig_take(r, 0, &msg));
    assert_false(msg.welcome.accepted);
    rig_reboot(r);
    assert_int_equal(rig_status(r).enrolled, 0);
    assert_true(rig_command(r, SH_COMMAND_REVOKE, 0, 0, 5)); /* unknown */
    assert_int_equal(r->notes[SH_CNOTE_COMMAND_REFUSED], 1);
    finish(r);
}

static void test_a_key_may_not_have_endless_stores(void **state)
{
    (void)state;
    rig *r = setup_round();
    unsigned accepted = 0;
    for (uint64_t epoch = 1000; epoch < 1300; epoch++) {
        sh_msg msg = {.type = SH_MSG_ENROL, .enrol = {.epoch = epoch, .agent = "", .kernel = ""}};
        assert_true(rig_send(r, 0, &msg));
        assert_true(rig_take(r, 0, &msg));
        accepted += msg.welcome.accepted;
    }
    assert_int_equal(accepted, 255); /* and the one that it was set up with */
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 256 + 3);
    /* An item or a check-in makes no more of them, and what it has goes on. */
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = 1}}, msg;
    assert_true(rig_send(r, 0, &checkin));
    expect_error(r, 0, "limit");
    sh_msg_item item = {.epoch = 2,
                        .cls = SH_CLASS_WINDOW,
                        .seq = 1,
                        .last_seq = 1,
                        .kind = SH_ITEM_WINDOW,
                        .payload = {"window", 6}};
    assert_true(rig_item(r, 0, &item));
    expect_error(r, 0, "limit");
    item.epoch = 1000;
    assert_true(rig_item(r, 0, &item));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    finish(r);
}

/* ---- plans ---- */

static void test_rounds_begin_with_drift_and_stay(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.drifting_min = 2;
    rig_boot(r);
    for (unsigned node = 0; node < 3; node++)
        rig_enrol(r, node);
    assert_false(rig_checkin(r, 0, 1, true).train.train);
    assert_false(rig_checkin(r, 0, 1, true).train.train); /* the same one twice is one */
    assert_int_equal(rig_status(r).drifting, 1);
    assert_false(rig_checkin(r, 0, 1, false).train.train);
    assert_false(rig_checkin(r, 1, 1, true).train.train);
    assert_int_equal(rig_status(r).drifting, 1);
    rig_reboot(r);
    assert_int_equal(rig_status(r).drifting, 1);
    rig_plan plan = rig_checkin(r, 2, 1, true);
    assert_true(plan.train.train);
    assert_int_equal(plan.train.round, 1);
    assert_int_equal(plan.train.base_version, 1);
    assert_int_equal(plan.train.rank, 8);
    assert_int_equal(r->notes[SH_CNOTE_ROUNDS_BEGIN], 1);
    for (unsigned node = 0; node < 3; node++) /* drift is over; what began goes on */
        assert_true(rig_checkin(r, node, 1, false).train.train);
    rig_reboot(r);
    rig_plan again = rig_checkin(r, 0, 1, false);
    assert_true(again.train.train);
    assert_true(again.train.a_seed == plan.train.a_seed);
    finish(r);
}

static void test_plans_of_a_round_agree(void **state)
{
    (void)state;
    rig *r = setup_round();
    rig_plan first = rig_checkin(r, 0, 1, false);
    uint64_t least = UINT64_MAX, most = 0;
    for (int i = 0; i < 200; i++) {
        rig_plan plan = rig_checkin(r, 1, 1, false);
        assert_true(plan.train.a_seed == first.train.a_seed);
        assert_int_equal(plan.manifest_version, 0);
        least = SH_MIN(least, plan.return_after_ms);
        most = SH_MAX(most, plan.return_after_ms);
    }
    assert_in_range(least, 750, 800);
    assert_in_range(most, 1200, 1250);
    publish_one(r, 1);
    rig_plan next = rig_checkin(r, 0, 1, false);
    assert_int_equal(next.manifest_version, 2);
    assert_int_equal(next.train.round, 2);
    assert_int_equal(next.train.base_version, 2);
    assert_true(next.train.a_seed != first.train.a_seed);
    assert_int_equal(rig_checkin(r, 0, 2, false).manifest_version, 0);
    finish(r);
}

static void test_rounds_max_and_pause(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.rounds_max = 1;
    rig_boot(r);
    for (unsigned node = 0; node < 4; node++)
        rig_enrol(r, node);
    assert_true(rig_checkin(r, 0, 1, false).train.train);
    assert_true(rig_command(r, SH_COMMAND_PAUSE, 0, 0, 0));
    assert_false(rig_checkin(r, 0, 1, false).train.train);
    offer_three(r, 1); /* taken, but not merged while paused */
    assert_int_equal(rig_status(r).buffered, 3);
    assert_int_equal(r->job.id, 0);
    rig_reboot(r);
    assert_true(rig_status(r).paused);
    assert_int_equal(r->job.id, 0);
    assert_true(rig_command(r, SH_COMMAND_RESUME, 0, 0, 0));
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_false(rig_checkin(r, 0, 2, false).train.train); /* one round was all */
    finish(r);
}

/* A round without a merge begins anew when it is old, also when the aggregator starts again and
 * again in less time than that. */
static void test_an_old_round_begins_anew(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.round_ms_max = 3600000;
    rig_boot(r);
    for (unsigned node = 0; node < 4; node++)
        rig_enrol(r, node);
    uint64_t began_ms = r->now_ms;
    assert_int_equal(rig_checkin(r, 0, 1, true).train.round, 1);
    while (r->now_ms < began_ms + 3000000) {
        r->now_ms += 1000000;
        rig_reboot(r);
        assert_int_equal(rig_checkin(r, 0, 1, true).train.round, 1);
    }
    r->now_ms = began_ms + 4000000;
    rig_reboot(r);
    assert_int_equal(rig_checkin(r, 0, 1, true).train.round, 2);
    r->now_ms = began_ms; /* a clock set back does not stretch the round */
    rig_reboot(r);
    r->now_ms += 3600000;
    assert_int_equal(rig_checkin(r, 0, 1, true).train.round, 3);
    finish(r);
}

/* ---- a round ---- */

static void test_a_round_is_published(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer(r, 0, 1);
    offer(r, 2, 1);
    assert_int_equal(r->job.id, 0);
    assert_int_equal(rig_status(r).buffered, 2);
    offer(r, 1, 1);
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_int_equal(r->job.n_inputs, 3);
    assert_int_equal(r->job.candidate, 1);
    assert_true(sh_hash_equal(&r->job.master, &r->master));
    for (uint32_t i = 0; i < 3; i++) { /* sorted by node, whatever the order of arrival */
        sh_hash key = rig_key(i);
        assert_true(sh_hash_equal(&r->job.inputs[i].id.node, &key));
        assert_true(r->job.inputs[i].weight == 1000);
    }
    assert_true(rig_status(r).merging);
    const sh_reason reasons[3] = {SH_REASON_NONE, SH_REASON_DIRECTION, SH_REASON_NONE};
    assert_true(rig_end_merge(r, reasons));
    assert_true(rig_status(r).gating);
    expect_row(r, 0, 1, SH_VERDICT_PENDING, SH_REASON_NONE, 0); /* not before the gate */
    sh_hash candidate = r->job.candidate_model;
    assert_true(rig_end_gate(r, 3.0, 2.5));
    assert_int_equal(r->notes[SH_CNOTE_RELEASED], 1);
    assert_int_equal(r->last_number[SH_CNOTE_RELEASED], 2);
    expect_row(r, 0, 1, SH_VERDICT_MERGED, SH_REASON_NONE, 2);
    expect_row(r, 1, 1, SH_VERDICT_REFUSED, SH_REASON_DIRECTION, 0);
    expect_row(r, 2, 1, SH_VERDICT_MERGED, SH_REASON_NONE, 2);
    bool found;
    sh_release_row row = rig_candidate(r, 1, &found);
    assert_true(found);
    assert_true(sh_hash_equal(&row.sha256, &candidate));
    assert_int_equal(row.version, 2);
    assert_int_equal(row.parent, 1);
    assert_int_equal(row.updates, 2);
    assert_int_equal(row.n_merged, 2);
    assert_true(row.loss_candidate == 2.5 && row.loss_parent == 3.0);
    assert_string_equal(row.verdict, "released");
    sh_update_row update = rig_row(r, 2, EPOCH, 1, &found);
    assert_true(update.norm == 3 && update.cosine == 0.5 && update.candidate == 1);
    /* Two releases that share a chunk; nothing else is left. */
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 5);
    publish_one(r, 2);
    publish_one(r, 3);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 5);
    assert_int_equal(rig_status(r).version, 4);
    finish(r);
}

static void test_an_update_that_comes_twice_counts_once(void **state)
{
    (void)state;
    rig *r = setup_round();
    rig_update u = rig_make(r, 0, 1);
    assert_true(rig_offer(r, 0, &u));
    assert_true(rig_offer(r, 0, &u)); /* the acknowledgement was lost: it is given again */
    assert_int_equal(rig_status(r).updates_in, 1);
    rig_reboot(r);
    assert_true(rig_offer(r, 0, &u));
    assert_int_equal(rig_status(r).updates_in, 1);
    offer(r, 1, 1);
    offer(r, 2, 1);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_true(rig_offer(r, 0, &u)); /* a month later */
    assert_int_equal(rig_status(r).updates_in, 3);
    assert_int_equal(rig_status(r).updates_merged, 3);
    finish(r);
}

static void test_what_comes_during_a_merge_waits(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    uint64_t job = r->job.id;
    offer_three(r, 2);
    offer(r, 3, 1);
    assert_true(r->job.id == job);
    assert_int_equal(rig_status(r).buffered, 7);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    /* The next merge began in the same step, with everything that waited, at half weight. */
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_int_equal(r->job.n_inputs, 4);
    assert_int_equal(r->job.candidate, 2);
    assert_int_equal(r->job.parent_version, 2);
    assert_true(r->job.inputs[0].weight == 500);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 2.9, 2.8));
    assert_int_equal(rig_status(r).version, 3);
    finish(r);
}

static void test_samples_that_a_node_claims_are_capped(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer(r, 0, 1);
    offer(r, 1, 1);
    rig_update u = rig_make(r, 2, 1);
    u.samples = 1000000;
    assert_true(rig_offer(r, 2, &u));
    assert_true(r->job.inputs[2].weight == 4000);
    finish(r);
}

static void test_all_refused_makes_no_candidate(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    const sh_reason reasons[3] = {SH_REASON_NOT_FINITE, SH_REASON_BAD_BLOB, SH_REASON_NORM};
    assert_true(rig_end_merge(r, reasons));
    assert_int_equal(r->job.id, 0);
    assert_int_equal(rig_status(r).version, 1);
    expect_row(r, 0, 1, SH_VERDICT_REFUSED, SH_REASON_NOT_FINITE, 0);
    expect_row(r, 1, 1, SH_VERDICT_REFUSED, SH_REASON_BAD_BLOB, 0);
    expect_row(r, 2, 1, SH_VERDICT_REFUSED, SH_REASON_NORM, 0);
    assert_int_equal(rig_status(r).round, 2);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    publish_one(r, 2);
    finish(r);
}

/* ---- the gate ---- */

static void test_the_gate_refuses(void **state)
{
    (void)state;
    const double losses[][2] = {{3.0, 3.001}, {3.0, NAN}, {3.0, INFINITY}, {NAN, 2.0}};
    for (size_t i = 0; i < SH_COUNT(losses); i++) {
        rig *r = setup_round();
        offer_three(r, 1);
        assert_true(rig_end_merge(r, NULL));
        assert_true(rig_end_gate(r, losses[i][0], losses[i][1]));
        assert_int_equal(rig_status(r).version, 1);
        assert_int_equal(rig_status(r).candidates_refused, 1);
        assert_int_equal(r->notes[SH_CNOTE_CANDIDATE_REFUSED], 1);
        for (unsigned node = 0; node < 3; node++)
            expect_row(r, node, 1, SH_VERDICT_REFUSED, SH_REASON_GATE, 0);
        bool found;
        sh_release_row row = rig_candidate(r, 1, &found);
        assert_true(found);
        assert_int_equal(row.version, 0);
        assert_int_equal(strncmp(row.verdict, "refused: loss", 13), 0);
        assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3); /* its bytes are gone */
        publish_one(r, 2); /* and the fleet goes on, from the release that stands */
        row = rig_candidate(r, 2, &found);
        assert_int_equal(row.version, 2);
        assert_int_equal(row.parent, 1);
        finish(r);
    }
}

static void end_gate_slices(rig *r, double first, double second)
{
    sh_coord_job_result result = {.id = r->job.id,
                                  .loss_parent = 3,
                                  .loss_candidate = 2.9,
                                  .loss_adapter_form = 2.9,
                                  .n_slices = 2,
                                  .slice_parent = {3, 3},
                                  .slice_candidate = {first, second}};
    sh_coord_event event = {.kind = SH_COORD_JOB_DONE, .result = result};
    free(r->job.inputs);
    r->job = (sh_coord_job){0};
    assert_true(rig_step(r, &event));
}

static void test_one_bad_slice_is_enough(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    assert_true(rig_end_merge(r, NULL));
    end_gate_slices(r, 2.0, 3.06); /* 0.05 is allowed */
    assert_int_equal(rig_status(r).candidates_refused, 1);
    bool found;
    sh_release_row row = rig_candidate(r, 1, &found);
    assert_true(fabs(row.worst_slice - 0.06) < 1e-9);
    assert_int_equal(strncmp(row.verdict, "refused: loss of slice 1", 24), 0);
    offer_three(r, 2);
    assert_true(rig_end_merge(r, NULL));
    end_gate_slices(r, 2.0, NAN);
    assert_int_equal(rig_status(r).candidates_refused, 2);
    offer_three(r, 3);
    assert_true(rig_end_merge(r, NULL));
    end_gate_slices(r, 2.0, 3.04);
    assert_int_equal(rig_status(r).version, 2);
    finish(r);
}

static void test_a_raised_scale_is_taken_back(void **state)
{
    (void)state;
    rig *r = setup_round();
    assert_true(rig_command(r, SH_COMMAND_SERVER_SCALE, 0, 8, 0));
    rig_reboot(r);
    assert_true(rig_status(r).server_scale == 8);
    offer_three(r, 1);
    assert_true(r->job.server_scale == 8);
    assert_true(rig_end_merge(r, NULL));
    rig_reboot(r);
    assert_int_equal(r->job.kind, SH_COORD_GATE);
    assert_true(rig_end_gate(r, 3, 9));
    /* Refused; the same three again, at scale 1, under another number. */
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_true(r->job.server_scale == 1);
    assert_int_equal(r->job.n_inputs, 3);
    assert_int_equal(r->job.candidate, 2);
    assert_true(rig_status(r).server_scale == 1);
    expect_row(r, 0, 1, SH_VERDICT_PENDING, SH_REASON_NONE, 0);
    assert_int_equal(rig_status(r).round, 1);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    expect_row(r, 0, 1, SH_VERDICT_MERGED, SH_REASON_NONE, 2);
    bool found;
    sh_release_row first = rig_candidate(r, 1, &found), second = rig_candidate(r, 2, &found);
    assert_true(first.version == 0 && first.server_scale == 8);
    assert_true(second.version == 2 && second.server_scale == 1);
    /* A scale that is no number, or is absurd, is refused. */
    const double bad[] = {0, -1, NAN, INFINITY, 1e9};
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        assert_true(rig_command(r, SH_COMMAND_SERVER_SCALE, 0, bad[i], 0));
    assert_int_equal(r->notes[SH_CNOTE_COMMAND_REFUSED], SH_COUNT(bad));
    assert_true(rig_status(r).server_scale == 1);
    finish(r);
}

/* ---- updates that do not fit ---- */

static void test_stale_and_foreign_updates_are_refused(void **state)
{
    (void)state;
    rig *r = setup_round();
    rig_update old = rig_make(r, 3, 1);
    publish_one(r, 1);
    rig_update one_behind = rig_make(r, 3, 2);
    publish_one(r, 2);
    assert_true(rig_offer(r, 3, &old)); /* two behind, one is allowed */
    expect_row(r, 3, 1, SH_VERDICT_REFUSED, SH_REASON_STALE, 0);
    assert_true(rig_offer(r, 3, &one_behind));
    expect_row(r, 3, 2, SH_VERDICT_PENDING, SH_REASON_NONE, 0);
    rig_update wrong = rig_make(r, 3, 3);
    wrong.base_sha256.b[0] ^= 1;
    assert_true(rig_offer(r, 3, &wrong));
    expect_row(r, 3, 3, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    wrong = rig_make(r, 3, 4);
    wrong.base_version = 99; /* a release that does not exist yet */
    assert_true(rig_offer(r, 3, &wrong));
    expect_row(r, 3, 4, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    wrong = rig_make(r, 3, 5);
    wrong.base_version = 0;
    assert_true(rig_offer(r, 3, &wrong));
    expect_row(r, 3, 5, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    wrong = rig_make(r, 3, 6);
    wrong.samples = 0;
    assert_true(rig_offer(r, 3, &wrong));
    expect_row(r, 3, 6, SH_VERDICT_REFUSED, SH_REASON_BAD_BLOB, 0);
    sh_msg_item item = {.epoch = EPOCH,
                        .cls = SH_CLASS_UPDATE,
                        .seq = 7,
                        .last_seq = 7,
                        .kind = SH_ITEM_UPDATE,
                        .payload = {"no meta", 7}};
    sh_msg msg;
    assert_true(rig_item(r, 3, &item));
    assert_true(rig_take(r, 3, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK); /* or it would come for ever */
    assert_int_equal(msg.ack.high_water, 7);
    expect_row(r, 3, 7, SH_VERDICT_REFUSED, SH_REASON_BAD_BLOB, 0);
    assert_int_equal(rig_status(r).updates_refused[SH_REASON_BASE], 3);
    finish(r);
}

/* An update that was fresh when it came and has grown stale in the buffer is not merged. */
static void test_updates_that_grow_stale_while_they_wait(void **state)
{
    (void)state;
    rig *r = setup_round();
    rig_update early = rig_make(r, 3, 1);
    offer_three(r, 1);
    assert_true(rig_offer(r, 3, &early)); /* waits while the first three are merged */
    assert_true(rig_command(r, SH_COMMAND_PAUSE, 0, 0, 0));
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 1, 0, 0)); /* version 3: two ahead of 1 */
    assert_int_equal(rig_status(r).version, 3);
    assert_true(rig_command(r, SH_COMMAND_RESUME, 0, 0, 0));
    offer_three(r, 2);
    expect_row(r, 3, 1, SH_VERDICT_REFUSED, SH_REASON_STALE, 0);
    assert_int_equal(r->job.n_inputs, 3);
    finish(r);
}

/* ---- operators ---- */

static void test_rollback_publishes_old_bytes_under_a_new_version(void **state)
{
    (void)state;
    rig *r = setup_round();
    publish_one(r, 1);
    rig_update on_two = rig_make(r, 3, 1);
    offer(r, 0, 2);
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 1, 0, 0));
    assert_int_equal(rig_status(r).version, 3);
    bool found;
    sh_release_row genesis = rig_candidate(r, 0, &found), row = rig_candidate(r, 2, &found);
    assert_true(found);
    assert_true(sh_hash_equal(&row.sha256, &genesis.sha256));
    assert_true(sh_hash_equal(&row.new_master, &r->master));
    assert_int_equal(row.parent, 1);
    assert_string_equal(row.verdict, "rolled back from 2 to 1");
    assert_int_equal(rig_checkin(r, 0, 2, false).manifest_version, 3);
    /* What was trained on the withdrawn release is not merged into what replaced it. */
    assert_true(rig_offer(r, 3, &on_two));
    expect_row(r, 3, 1, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    offer(r, 1, 2);
    offer(r, 2, 2);
    assert_int_equal(r->job.id, 0); /* node 0's went the same way when it came to merging */
    expect_row(r, 0, 2, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    offer(r, 0, 3);
    assert_int_equal(r->job.n_inputs, 3);
    assert_true(sh_hash_equal(&r->job.master, &r->master));
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_int_equal(rig_status(r).version, 4);
    finish(r);
}

/* Two releases on, the withdrawn one is still not a base; the one that it was rolled back to is. */
static void test_a_withdrawn_release_stays_withdrawn(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.staleness_max = 5;
    rig_boot(r);
    for (unsigned node = 0; node < 4; node++)
        rig_enrol(r, node);
    rig_update on_one = rig_make(r, 3, 1);
    publish_one(r, 1);
    rig_update on_two = rig_make(r, 3, 2);
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 1, 0, 0));
    publish_one(r, 2);
    assert_int_equal(rig_status(r).version, 4);
    assert_true(rig_offer(r, 3, &on_one));
    expect_row(r, 3, 1, SH_VERDICT_PENDING, SH_REASON_NONE, 0);
    assert_true(rig_offer(r, 3, &on_two));
    expect_row(r, 3, 2, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    finish(r);
}

static void test_rollback_needs_the_bytes(void **state)
{
    (void)state;
    rig *r = setup_round();
    for (uint64_t seq = 1; seq <= 3; seq++)
        publish_one(r, seq);
    const uint64_t bad[] = {0, 4, 5, 1 /* its chunks are gone */};
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        assert_true(rig_command(r, SH_COMMAND_ROLLBACK, bad[i], 0, 0));
    assert_int_equal(r->notes[SH_CNOTE_COMMAND_REFUSED], SH_COUNT(bad));
    assert_int_equal(rig_status(r).version, 4);
    sh_coord_event event = {.kind = SH_COORD_COMMAND,
                            .command = SH_COMMAND_ROLLBACK,
                            .number = 1,
                            .message = {"other bytes", 11}};
    assert_true(rig_step(r, &event));
    assert_int_equal(rig_status(r).version, 4);
    event.message = (sh_bytes){r->genesis, sizeof r->genesis};
    assert_true(rig_step(r, &event));
    assert_int_equal(rig_status(r).version, 5);
    finish(r);
}

static void test_rollback_drops_the_merge_under_way(void **state)
{
    (void)state;
    rig *r = setup_round();
    publish_one(r, 1);
    offer_three(r, 2);
    sh_coord_job job = r->job;
    r->job = (sh_coord_job){0};
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 1, 0, 0));
    assert_false(rig_status(r).merging);
    for (unsigned node = 0; node < 3; node++)
        expect_row(r, node, 2, SH_VERDICT_REFUSED, SH_REASON_BASE, 0);
    r->job = job; /* its worker did not know */
    assert_true(rig_end_merge(r, NULL));
    assert_int_equal(r->job.id, 0);
    assert_int_equal(rig_status(r).version, 3);
    finish(r);
}

static void test_revoking_takes_a_node_out_of_the_round(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    offer(r, 3, 1);
    sh_coord_job job = r->job;
    r->job = (sh_coord_job){0};
    assert_true(rig_command(r, SH_COMMAND_REVOKE, 0, 0, 1));
    expect_row(r, 1, 1, SH_VERDICT_REFUSED, SH_REASON_REVOKED, 0);
    /* The merge that had it is dropped; the other three are enough for a new one. */
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_int_equal(r->job.n_inputs, 3);
    free(job.inputs);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    expect_row(r, 3, 1, SH_VERDICT_MERGED, SH_REASON_NONE, 2);
    assert_int_equal(rig_status(r).updates_refused[SH_REASON_REVOKED], 1);
    finish(r);
}

static void test_close_merges_what_is_in(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer(r, 0, 1);
    offer(r, 1, 1);
    assert_true(rig_command(r, SH_COMMAND_CLOSE, 0, 0, 0));
    assert_int_equal(r->job.n_inputs, 2);
    assert_true(rig_status(r).closing && !rig_status(r).closed);
    offer(r, 2, 1); /* too late: acknowledged, refused */
    expect_row(r, 2, 1, SH_VERDICT_REFUSED, SH_REASON_CLOSED, 0);
    rig_reboot(r);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_true(rig_status(r).closed);
    assert_int_equal(r->notes[SH_CNOTE_CLOSED], 1);
    rig_plan plan = rig_checkin(r, 0, 1, true);
    assert_false(plan.train.train);
    assert_int_equal(plan.manifest_version, 2); /* releases are still given */
    finish(r);
}

static void test_close_refuses_one_alone(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer(r, 0, 1);
    assert_true(rig_command(r, SH_COMMAND_CLOSE, 0, 0, 0));
    assert_true(rig_status(r).closed);
    expect_row(r, 0, 1, SH_VERDICT_REFUSED, SH_REASON_CLOSED, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    assert_true(rig_command(r, SH_COMMAND_CLOSE, 0, 0, 0));
    assert_int_equal(r->notes[SH_CNOTE_CLOSED], 1);
    finish(r);
}

/* CLOSE during a merge whose candidate is refused at a raised scale: it is tried again, then what
 * came meanwhile is merged, then it is closed. */
static void test_close_during_a_merge(void **state)
{
    (void)state;
    rig *r = setup_round();
    assert_true(rig_command(r, SH_COMMAND_SERVER_SCALE, 0, 4, 0));
    offer_three(r, 1);
    offer(r, 0, 2);
    offer(r, 1, 2);
    assert_true(rig_command(r, SH_COMMAND_CLOSE, 0, 0, 0));
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 4));
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_false(rig_status(r).closed);
    assert_int_equal(r->job.n_inputs, 2);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 2.9, 2.8));
    assert_true(rig_status(r).closed);
    assert_int_equal(rig_status(r).version, 3);
    assert_int_equal(rig_status(r).updates_merged, 5);
    finish(r);
}

/* ---- jobs that fail ---- */

static void test_a_failed_job_is_tried_again_later(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    uint64_t waits[6];
    for (size_t i = 0; i < SH_COUNT(waits); i++) {
        uint64_t before = r->now_ms;
        r->timer_ms = 0;
        assert_true(rig_fail_job(r, SH_ERR_FULL));
        assert_int_equal(r->job.id, 0);
        assert_true(r->timer_ms > before);
        waits[i] = r->timer_ms - before;
        sh_coord_event timer = {.kind = SH_COORD_TIMER};
        assert_true(rig_step(r, &timer)); /* too early */
        assert_int_equal(r->job.id, 0);
        r->now_ms = r->timer_ms;
        assert_true(rig_step(r, &timer));
        assert_int_equal(r->job.kind, SH_COORD_MERGE);
        assert_int_equal(r->job.n_inputs, 3);
        assert_true(i == 0 || waits[i] > waits[i - 1]);
    }
    assert_int_equal(rig_status(r).buffered, 3); /* nothing is lost by it */
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_fail_job(r, SH_ERR_NOT_FOUND)); /* the candidate's file is gone */
    r->now_ms = r->timer_ms;
    sh_coord_event timer = {.kind = SH_COORD_TIMER};
    assert_true(rig_step(r, &timer));
    assert_int_equal(r->job.kind, SH_COORD_MERGE); /* so it is made again */
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3, 2.9));
    assert_int_equal(rig_status(r).version, 2);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 5);
    finish(r);
}

static void test_a_job_that_lies_is_a_failed_job(void **state)
{
    (void)state;
    rig *r = setup_round();
    offer_three(r, 1);
    sh_coord_job_result result = {.id = r->job.id}; /* no verdicts, no candidate */
    sh_coord_event event = {.kind = SH_COORD_JOB_DONE, .result = result};
    assert_true(rig_step(r, &event));
    assert_int_equal(r->notes[SH_CNOTE_JOB_FAILED], 1);
    rig_reboot(r);
    for (uint32_t i = 0; i < 3; i++)
        r->job.inputs[i].reason = SH_REASON_NONE;
    event.result = (sh_coord_job_result){.id = r->job.id,
                                         .inputs = r->job.inputs,
                                         .n_inputs = 3,
                                         .format = "Q8_0",
                                         .candidate = {.bytes = 5},
                                         .candidate_bytes = {"other", 5}};
    assert_true(rig_step(r, &event)); /* bytes that are not what their hash says */
    assert_int_equal(r->notes[SH_CNOTE_JOB_FAILED], 2);
    assert_int_equal(rig_status(r).version, 1);
    assert_int_equal(rig_status(r).buffered, 3);
    finish(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_genesis_is_release_one),
        cmocka_unit_test(test_options_and_genesis_are_checked),
        cmocka_unit_test(test_enrolment),
        cmocka_unit_test(test_a_key_may_not_have_endless_stores),
        cmocka_unit_test(test_rounds_begin_with_drift_and_stay),
        cmocka_unit_test(test_plans_of_a_round_agree),
        cmocka_unit_test(test_rounds_max_and_pause),
        cmocka_unit_test(test_an_old_round_begins_anew),
        cmocka_unit_test(test_a_round_is_published),
        cmocka_unit_test(test_an_update_that_comes_twice_counts_once),
        cmocka_unit_test(test_what_comes_during_a_merge_waits),
        cmocka_unit_test(test_samples_that_a_node_claims_are_capped),
        cmocka_unit_test(test_all_refused_makes_no_candidate),
        cmocka_unit_test(test_the_gate_refuses),
        cmocka_unit_test(test_one_bad_slice_is_enough),
        cmocka_unit_test(test_a_raised_scale_is_taken_back),
        cmocka_unit_test(test_stale_and_foreign_updates_are_refused),
        cmocka_unit_test(test_updates_that_grow_stale_while_they_wait),
        cmocka_unit_test(test_rollback_publishes_old_bytes_under_a_new_version),
        cmocka_unit_test(test_a_withdrawn_release_stays_withdrawn),
        cmocka_unit_test(test_rollback_needs_the_bytes),
        cmocka_unit_test(test_rollback_drops_the_merge_under_way),
        cmocka_unit_test(test_revoking_takes_a_node_out_of_the_round),
        cmocka_unit_test(test_close_merges_what_is_in),
        cmocka_unit_test(test_close_refuses_one_alone),
        cmocka_unit_test(test_close_during_a_merge),
        cmocka_unit_test(test_a_failed_job_is_tried_again_later),
        cmocka_unit_test(test_a_job_that_lies_is_a_failed_job),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
