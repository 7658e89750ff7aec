/* The node core, one behaviour a test: recording, syncing, training, and what is bad. */
#include "tests/node/rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/snapshot.h"

#define RESTS 60000 /* ms after which a link with nothing owed is quiet */

static void a_new_node_is_genesis(void **state)
{
    (void)state;
    rig *r = rig_open(1);
    rig_start(r);
    sh_node_status status = rig_status(r);
    SAME(status.active_version, 1);
    SAME(status.confirmed_version, 1);
    SAME(r->active_version, 1);
    assert_true(status.epoch != 0);
    uint64_t stored = 0;
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_stored_epoch(txn, &stored, &test_err));
    sh_txn_abort(&txn);
    SAME(stored, status.epoch);
    rig_restart(r);
    SAME(rig_status(r).epoch, status.epoch); /* once a store */
    rig_close(&r);
}

static void a_bad_genesis_or_option_is_refused(void **state)
{
    (void)state;
    rig *r = rig_open(1);
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_node_options options = r->options;
    sh_rng_init(&rng, 1, 0, 1);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    r->releases[0].manifest.data[40] ^= 1;
    assert_int_equal(sh_node_create(&options, rig_manifest(r, 1), 0, &rng, txn, &r->actions,
                                    &r->node, &test_err),
                     SH_ERR_AUTH);
    r->releases[0].manifest.data[40] ^= 1;
    options.records_max = 0;
    assert_int_equal(sh_node_create(&options, rig_manifest(r, 1), 0, &rng, txn, &r->actions,
                                    &r->node, &test_err),
                     SH_ERR_USAGE);
    options = r->options;
    options.retry_max_ms = 1;
    assert_int_equal(sh_node_create(&options, rig_manifest(r, 1), 0, &rng, txn, &r->actions,
                                    &r->node, &test_err),
                     SH_ERR_USAGE);
    SAME(r->actions.n, 0);
    assert_null(r->node);
    sh_txn_abort(&txn);
    rig_close(&r);
}

static void a_broken_state_is_not_a_new_node(void **state)
{
    (void)state;
    rig *r = rig_open(1);
    rig_start(r);
    sh_txn *txn = NULL;
    sh_rng rng;
    uint8_t copy[2048];
    sh_slice value;
    sh_rng_init(&rng, 1, 0, 1);
    sh_node_destroy(&r->node);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_txn_get(txn, SH_NODE_T_META, "state", 5, &value));
    assert_true(value.n < sizeof(copy));
    size_t n = value.n;
    memcpy(copy, value.data, n);
    for (size_t i = 0; i < n; i += 7) {
        copy[i] ^= 4;
        OK(sh_txn_put(txn, SH_NODE_T_META, "state", 5, copy, n, &test_err));
        assert_int_equal(sh_node_create(&r->options, rig_manifest(r, 1), 0, &rng, txn, &r->actions,
                                        &r->node, &test_err),
                         SH_ERR_CORRUPT);
        copy[i] ^= 4;
    }
    for (size_t cut = 0; cut < n; cut += 31) {
        OK(sh_txn_put(txn, SH_NODE_T_META, "state", 5, copy, cut, &test_err));
        assert_int_equal(sh_node_create(&r->options, rig_manifest(r, 1), 0, &rng, txn, &r->actions,
                                        &r->node, &test_err),
                         SH_ERR_CORRUPT);
    }
    sh_txn_abort(&txn);
    rig_close(&r);
}

static void rings_are_bounded(void **state)
{
    (void)state;
    rig *r = rig_open(2);
    rig_start(r);
    for (unsigned i = 0; i < 350; i++)
        assert_true(rig_infer(r, i, false));
    SAME(rig_count(r, SH_NODE_T_RECORD), 100);
    SAME(rig_status(r).inferences, 350);
    SAME(rig_status(r).windows, 10);
    SAME(rig_count(r, SH_NODE_T_WINDOW), 4);
    SAME(rig_status(r).outbox_items, 10);
    for (unsigned i = 0; i < 60; i++)
        rig_teach(r, 1, i * 20, 20, i % 2 == 1);
    assert_true(rig_status(r).feedback_tokens <= 500);
    assert_true(rig_status(r).feedback_tokens >= 480);
    for (unsigned i = 0; i < 300; i++) /* context alone must not fill the store */
        rig_teach(r, 2, i * 20, 20, false);
    assert_true(rig_count(r, SH_NODE_T_FEEDBACK) * 20 <= 4 * 500 + 20);
    rig_close(&r);
}

static sh_status check_feedback(void *arg, const sh_feedback *row)
{
    unsigned *seen = arg;
    SAME(row->session, 9);
    SAME(row->offset, *seen * 10);
    SAME(row->n, 10);
    assert_int_equal(row->target, *seen > 0);
    for (uint32_t i = 0; i < row->n; i++)
        SAME(row->tokens[i], row->offset + i);
    ++*seen;
    return SH_OK;
}

static void feedback_comes_back_as_it_was(void **state)
{
    (void)state;
    rig *r = rig_open(2);
    rig_start(r);
    for (unsigned i = 0; i < 5; i++)
        rig_teach(r, 9, i * 10, 10, i > 0);
    unsigned seen = 0;
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_each_feedback(txn, check_feedback, &seen, &test_err));
    sh_txn_abort(&txn);
    SAME(seen, 5);
    SAME(rig_status(r).feedback_tokens, 40);
    sh_node_event big = {.kind = SH_NODE_FEEDBACK};
    big.feedback.n = SH_NODE_FEEDBACK_ROW_MAX + 1; /* counted, not stored */
    assert_true(rig_step(r, &big));
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 5);
    SAME(r->notes[SH_NOTE_DROPPED], 1);
    rig_close(&r);
}

/* The detector survives restarts: the same windows and alarms as without any. */
static void drift_is_told_once_and_survives_restarts(void **state)
{
    (void)state;
    uint64_t first[2];
    for (int restarts = 0; restarts < 2; restarts++) {
        rig *r = rig_open(3);
        rig_start(r);
        for (unsigned i = 0; i < 640; i++) {
            assert_true(rig_infer(r, i, i >= 320));
            if (restarts && i % 13 == 0)
                rig_restart(r);
        }
        sh_node_status status = rig_status(r);
        assert_true(status.drifting);
        SAME(status.windows, 20);
        assert_true(status.first_alarm_window > 10);
        assert_true(status.first_alarm_window <= 13);
        SAME(r->notes[SH_NOTE_ALARM], status.alarms);
        SAME(status.alarms, 1); /* of one metric, told once though it stands */
        first[restarts] = status.first_alarm_window;
        rig_link(r, true);
        rig_run(r, 5000, true);
        SAME(r->n_taken[SH_CLASS_WINDOW], 20);
        SAME(r->n_taken[SH_CLASS_ALARM], 1);
        assert_true(r->checkin.drifting);
        SAME(r->checkin.inferences, 640);
        SAME(rig_status(r).outbox_items, 0);
        SAME(rig_read_ledger(r).n[SH_CLASS_ALARM][SH_LEDGER_ACKED], 1);
        rig_close(&r);
    }
    SAME(first[0], first[1]);
}

static void a_quiet_window_closes_by_time(void **state)
{
    (void)state;
    rig *r = rig_open(3);
    r->options.monitor.window_ms_max = 10000;
    rig_start(r);
    for (unsigned i = 0; i < 5; i++)
        assert_true(rig_infer(r, i, false));
    SAME(rig_status(r).windows, 0);
    rig_run(r, 9000, false);
    SAME(rig_status(r).windows, 0);
    rig_restart(r); /* the deadline is the store's */
    rig_run(r, 2000, false);
    SAME(rig_status(r).windows, 1);
    rig_run(r, 50000, false);
    SAME(rig_status(r).windows, 1);
    rig_close(&r);
}

/* ---- training ---- */

static void train_once(rig *r, uint32_t round)
{
    r->plan.train = rig_train_plan(r, round, 1);
    rig_run(r, 3000, true);
}

static void an_update_is_made_and_acknowledged(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    rig_link(r, true);
    train_once(r, 1);
    rig_run(r, RESTS, true);
    SAME(r->notes[SH_NOTE_TRAIN_STARTED], 1); /* once a round, however often the plan comes */
    SAME(rig_status(r).updates_made, 1);
    SAME(rig_status(r).updates_acked, 1);
    SAME(r->taken[SH_CLASS_UPDATE][1], 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(rig_count(r, SH_NODE_T_OUTBOX), 0);
    train_once(r, 2);
    SAME(rig_status(r).updates_acked, 2);
    SAME(rig_read_ledger(r).n[SH_CLASS_UPDATE][SH_LEDGER_ACKED], 2);
    rig_close(&r);
}

static void training_waits_for_what_it_needs(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_start(r);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_teach(r, 1, 0, 9, true);
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 0); /* 9 of 10 tokens */
    rig_teach(r, 1, 9, 1, true);
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 1);
    SAME(r->checkin.training_round, 1);
    r->plan.train.round = 2; /* one at a time */
    rig_run(r, 5000, false);
    SAME(r->n_jobs, 1);
    rig_finish_job(r, SH_JOB_TRAIN);
    SAME(r->jobs[0].job.train.round, 2); /* the newer plan, at once */
    rig_restart(r);
    SAME(r->n_jobs, 0); /* a crash costs its progress; the next plan decides */
    rig_link(r, true);
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 1);
    rig_close(&r);
}

/* Else the training would fail, as often as it may, on feedback that grows. */
static void what_is_held_out_is_no_training_text(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    assert_true(sh_snapshot_is_heldout(0) && !sh_snapshot_is_heldout(1));
    rig_start(r);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_teach(r, 0, 0, 50, true);
    rig_teach(r, 1, 0, 9, true);
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 0); /* 59 tokens; 9 of 10 to train on */
    rig_teach(r, 1, 9, 1, true);
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 1);
    rig_close(&r);
}

static void another_base_is_not_trained_on(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_start(r);
    rig_link(r, true);
    rig_teach(r, 1, 0, 50, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    r->plan.train.base_sha256.b[0] ^= 1;
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 0);
    r->plan.train = rig_train_plan(r, 1, 1);
    r->plan.train.base_version = 2;
    rig_run(r, 3000, false);
    SAME(r->n_jobs, 0);
    rig_close(&r);
}

static void an_update_that_is_no_better_stays(void **state)
{
    (void)state;
    const double after[] = {4.0, 4.5, NAN, INFINITY};
    for (size_t i = 0; i < SH_COUNT(after); i++) {
        rig *r = rig_open(4);
        rig_start(r);
        rig_teach(r, 1, 0, 50, true);
        rig_link(r, true);
        r->heldout_after = after[i];
        train_once(r, 1);
        SAME(rig_status(r).updates_made, 0);
        SAME(r->n_taken[SH_CLASS_UPDATE], 0);
        SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
        rig_close(&r);
    }
    rig *r = rig_open(4);
    r->options.send_only_if_better = false;
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    rig_link(r, true);
    r->heldout_after = 4.5;
    train_once(r, 1);
    SAME(r->n_taken[SH_CLASS_UPDATE], 1);
    rig_close(&r);
}

static void failing_training_gives_up(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    rig_link(r, true);
    r->train_status = SH_ERR_NO_MEMORY;
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_run(r, RESTS, true);
    SAME(r->notes[SH_NOTE_TRAIN_STARTED], 3);
    SAME(r->notes[SH_NOTE_JOB_FAILED], 3);
    r->train_status = SH_OK;
    train_once(r, 2);
    SAME(rig_status(r).updates_made, 1);
    rig_close(&r);
}

/* ---- outbox ---- */

static void offline_then_catches_up(void **state)
{
    (void)state;
    rig *r = rig_open(5);
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_run(r, 2000, false); /* the plan comes, the job runs */
    rig_link(r, false);
    rig_finish_job(r, SH_JOB_TRAIN);
    for (unsigned i = 0; i < 1000; i++)
        assert_true(rig_infer(r, i, false));
    unsigned before = r->sent[SH_MSG_ITEM];
    r->now += UINT64_C(30) * 24 * 3600 * 1000; /* a month */
    rig_run(r, 1000, false);
    SAME(r->sent[SH_MSG_ITEM], before); /* nothing while the link is down */
    SAME(rig_status(r).outbox_items, 32);
    rig_link(r, true);
    rig_run(r, 5000, true);
    SAME(rig_status(r).outbox_items, 0);
    SAME(r->n_taken[SH_CLASS_UPDATE], 1);
    SAME(r->n_taken[SH_CLASS_WINDOW], 31);
    rig_close(&r);
}

static void a_mute_aggregator_is_not_flooded(void **state)
{
    (void)state;
    rig *r = rig_open(5);
    rig_start(r);
    for (unsigned i = 0; i < 2000; i++)
        assert_true(rig_infer(r, i, false));
    r->mute = true;
    rig_link(r, true);
    rig_message(r, &(sh_msg){.type = SH_MSG_WELCOME, .welcome = {.accepted = true, .text = ""}});
    rig_run(r, 100, true);
    SAME(rig_status(r).outbox_items, 62);
    unsigned total = r->sent[SH_MSG_ITEM];
    assert_true(total >= 16 && total <= 48); /* 16 in flight, perhaps a second time */
    rig_run(r, 100000, true);
    /* at most retry_max + retry_min apart on average half of it: 16 items over 100 s */
    assert_true(r->sent[SH_MSG_ITEM] < 16 * 150);
    assert_true(r->sent[SH_MSG_ITEM] > 16 * 40);
    r->mute = false;
    rig_run(r, 20000, true);
    SAME(rig_status(r).outbox_items, 0);
    SAME(r->n_taken[SH_CLASS_WINDOW], 62);
    rig_close(&r);
}

/* Three updates made offline with room for one: the others fall, with their chunks. */
static void dropped_updates_are_counted_and_told(void **state)
{
    (void)state;
    rig *r = rig_open(6);
    r->options.outbox_quota_bytes[SH_CLASS_UPDATE] = 250000; /* one update */
    r->options.outbox_quota_bytes[SH_CLASS_WINDOW] = 3000;
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    for (uint32_t round = 1; round <= 3; round++) {
        sh_msg plan = {.type = SH_MSG_PLAN};
        plan.plan.return_after_ms = 1000;
        plan.plan.train = rig_train_plan(r, round, 1);
        rig_message(r, &plan);
        assert_true(rig_finish_job(r, SH_JOB_TRAIN));
    }
    for (unsigned i = 0; i < 640; i++)
        assert_true(rig_infer(r, i, false));
    rig_ledger ledger = rig_read_ledger(r);
    SAME(ledger.n[SH_CLASS_UPDATE][SH_LEDGER_DROPPED], 2);
    SAME(ledger.n[SH_CLASS_UPDATE][SH_LEDGER_OWED], 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 4);
    rig_restart(r);
    rig_link(r, true);
    rig_run(r, 5000, true);
    SAME(r->buried[SH_CLASS_UPDATE][1], 1);
    SAME(r->buried[SH_CLASS_UPDATE][2], 1);
    SAME(r->taken[SH_CLASS_UPDATE][3], 1);
    SAME(r->checkin.dropped[SH_CLASS_UPDATE], 2);
    assert_true(r->checkin.dropped[SH_CLASS_WINDOW] > 0);
    SAME(r->checkin.dropped[SH_CLASS_WINDOW] + r->n_taken[SH_CLASS_WINDOW], 20);
    SAME(rig_status(r).outbox_items, 0);
    rig_close(&r);
}

/* The quota bites while the link is up and items are in flight: the tombstone goes out by itself.
 */
static void a_quota_bites_in_flight(void **state)
{
    (void)state;
    rig *r = rig_open(6);
    r->options.outbox_quota_bytes[SH_CLASS_WINDOW] = 4000;
    rig_start(r);
    r->mute = true;
    rig_link(r, true);
    for (unsigned i = 0; i < 1280; i++) {
        assert_true(rig_infer(r, i, false));
        if (i % 64 == 0)
            rig_run(r, 100, true);
    }
    r->mute = false;
    rig_run(r, 20000, true);
    SAME(rig_status(r).outbox_items, 0);
    assert_true(r->n_taken[SH_CLASS_WINDOW] > 0);
    SAME(r->checkin.dropped[SH_CLASS_WINDOW] + r->n_taken[SH_CLASS_WINDOW], 40);
    for (unsigned seq = 1; seq <= 40; seq++)
        SAME(r->taken[SH_CLASS_WINDOW][seq] + r->buried[SH_CLASS_WINDOW][seq], 1);
    rig_close(&r);
}

static void an_acknowledgement_of_another_epoch_settles_nothing(void **state)
{
    (void)state;
    rig *r = rig_open(6);
    rig_start(r);
    rig_link(r, true);
    rig_run(r, 100, false);
    rig_link(r, false);
    for (unsigned i = 0; i < 64; i++)
        assert_true(rig_infer(r, i, false));
    sh_msg ack = {.type = SH_MSG_ACK, .ack = {.cls = SH_CLASS_WINDOW, .high_water = 1}};
    ack.ack.epoch = rig_status(r).epoch;
    rig_message(r, &ack); /* of a copy that has the key, for all that it says */
    SAME(rig_status(r).outbox_items, 2);
    SAME(rig_status(r).bad_messages, 0);
    ack.ack.lease = rig_lease_name(r, ack.ack.epoch);
    ack.ack.epoch++;
    rig_message(r, &ack);
    SAME(rig_status(r).outbox_items, 2);
    SAME(rig_status(r).bad_messages, 1);
    ack.ack.epoch--;
    rig_message(r, &ack);
    SAME(rig_status(r).outbox_items, 1);
    rig_close(&r);
}

static void enrolment_refused_sends_nothing_else(void **state)
{
    (void)state;
    rig *r = rig_open(7);
    rig_start(r);
    r->reject = true;
    rig_link(r, true);
    rig_run(r, 1000, true);
    for (unsigned i = 0; i < 64; i++)
        assert_true(rig_infer(r, i, false));
    unsigned items = r->sent[SH_MSG_ITEM];
    rig_run(r, 20000, true);
    SAME(r->sent[SH_MSG_ITEM], items);
    assert_true(r->sent[SH_MSG_ENROL] > 3);
    r->reject = false;
    rig_run(r, 10000, true);
    SAME(rig_status(r).outbox_items, 0);
    rig_close(&r);
}

/* ---- what is bad ---- */

static void bad_messages_never_kill(void **state)
{
    (void)state;
    rig *r = rig_open(8);
    rig_start(r);
    rig_link(r, true);
    rig_run(r, 500, true);
    sh_rng rng;
    sh_rng_init(&rng, 1, 1, 1);
    sh_msg ack = {.type = SH_MSG_ACK, .ack = {.epoch = 1, .cls = 0, .high_water = 5}};
    ack.ack.lease = rig_lease_name(r, rig_status(r).epoch);
    sh_buf good;
    sh_buf_init(&good, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(&ack, &good, &test_err));
    for (unsigned i = 0; i < 2000; i++) {
        uint8_t bytes[256];
        size_t n = sh_rng_below(&rng, sizeof(bytes));
        for (size_t k = 0; k < n; k++)
            bytes[k] = (uint8_t)sh_rng_u32(&rng);
        if (i % 2 == 0) { /* nearly good ones */
            n = SH_MIN(good.len, sizeof(bytes));
            memcpy(bytes, good.data, n);
            bytes[sh_rng_below(&rng, n)] ^= (uint8_t)(1u << sh_rng_below(&rng, 8));
        }
        rig_bytes(r, bytes, n);
    }
    SAME(rig_status(r).bad_messages, 2000);
    SAME(r->sent[SH_MSG_ERROR], 2000);
    rig_bytes(r, good.data, good.len); /* of another epoch */
    sh_msg wrong = {.type = SH_MSG_CHECKIN};
    rig_message(r, &wrong);
    ack.ack.epoch = rig_status(r).epoch; /* of what was never made: see test_lease.c */
    rig_message(r, &ack);
    SAME(rig_status(r).bad_messages, 2002);
    SAME(rig_status(r).renewals, 1);
    unsigned errors = r->sent[SH_MSG_ERROR];
    sh_msg error = {.type = SH_MSG_ERROR, .error = {.code = "invalid", .text = "no"}};
    rig_message(r, &error); /* is not answered */
    SAME(r->sent[SH_MSG_ERROR], errors);
    uint8_t unknown[64 * 32];
    memset(unknown, 9, sizeof(unknown));
    sh_msg want = {.type = SH_MSG_WANT, .want = {64, unknown}};
    rig_message(r, &want);
    SAME(r->sent[SH_MSG_CHUNK], 0);
    sh_msg chunk = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {"abc", 3}}};
    chunk.chunk.hash = sh_blake2b("abc", 3);
    rig_message(r, &chunk); /* nobody asked for it: it is not kept */
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    sh_buf_release(&good);
    rig_close(&r);
}

static void an_error_asks_for_quiet(void **state)
{
    (void)state;
    rig *r = rig_open(8);
    rig_start(r);
    r->mute = true;
    rig_link(r, true);
    sh_msg error = {.type = SH_MSG_ERROR,
                    .error = {.code = "limit", .text = "later", .retry_after_ms = 1500}};
    rig_message(r, &error);
    unsigned before = r->sent[SH_MSG_ENROL] + r->sent[SH_MSG_CHECKIN];
    rig_run(r, 1400, true);
    SAME(r->sent[SH_MSG_ENROL] + r->sent[SH_MSG_CHECKIN], before);
    rig_run(r, 400, true);
    assert_true(r->sent[SH_MSG_ENROL] + r->sent[SH_MSG_CHECKIN] > before);
    rig_close(&r);
}

/* The next key is told until the aggregator answers, over lost messages and links; the core made
 * for it enrols with the token. */
static void a_key_is_rotated(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 10; seed++) {
        rig *r = rig_open(seed);
        uint8_t token[32] = {1, 2, 3};
        sh_node_event e = {.kind = SH_NODE_ROTATE, .key = {{9}}, .token = {token, sizeof(token)}};
        rig_start(r);
        rig_step(r, &e); /* the link is down: it waits */
        r->lose = r->repeat = 40;
        for (unsigned i = 0; i < 100 && r->switched == 0; i++) {
            rig_link(r, i % 2 == 0);
            rig_run(r, 1000, true);
        }
        SAME(r->switched, 1);
        assert_true(sh_hash_equal(&r->switch_key, &e.key));
        r->lose = r->repeat = 0;
        rig_link(r, true);
        unsigned told = r->sent[SH_MSG_ROTATE];
        rig_run(r, 20000, true);
        SAME(r->sent[SH_MSG_ROTATE], told);
        SAME(r->switched, 1);
        SAME(r->token_bytes, 0);
        r->options.rotate_token = e.token;
        rig_restart(r);
        rig_link(r, true);
        rig_run(r, 1000, true);
        SAME(r->token_bytes, sizeof(token)); /* and the rig compares it */
        assert_true(rig_status(r).welcome);
        rig_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_new_node_is_genesis),
        cmocka_unit_test(a_bad_genesis_or_option_is_refused),
        cmocka_unit_test(a_broken_state_is_not_a_new_node),
        cmocka_unit_test(rings_are_bounded),
        cmocka_unit_test(feedback_comes_back_as_it_was),
        cmocka_unit_test(drift_is_told_once_and_survives_restarts),
        cmocka_unit_test(a_quiet_window_closes_by_time),
        cmocka_unit_test(an_update_is_made_and_acknowledged),
        cmocka_unit_test(training_waits_for_what_it_needs),
        cmocka_unit_test(what_is_held_out_is_no_training_text),
        cmocka_unit_test(another_base_is_not_trained_on),
        cmocka_unit_test(an_update_that_is_no_better_stays),
        cmocka_unit_test(failing_training_gives_up),
        cmocka_unit_test(offline_then_catches_up),
        cmocka_unit_test(a_mute_aggregator_is_not_flooded),
        cmocka_unit_test(a_key_is_rotated),
        cmocka_unit_test(dropped_updates_are_counted_and_told),
        cmocka_unit_test(a_quota_bites_in_flight),
        cmocka_unit_test(an_acknowledgement_of_another_epoch_settles_nothing),
        cmocka_unit_test(enrolment_refused_sends_nothing_else),
        cmocka_unit_test(bad_messages_never_kill),
        cmocka_unit_test(an_error_asks_for_quiet),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
