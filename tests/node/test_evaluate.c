/*
 * Federated evaluation, what a node does for an aggregator that was restored, and for one that
 * speaks version 1.
 */
#include "tests/node/rig.h"

#include <string.h>

#define CANDIDATE_BYTES (2 * SH_CHUNK_BYTES + 300)

static rig *open_rig(uint64_t seed)
{
    rig *r = rig_open(seed);
    r->options.evaluate = true;
    r->options.evaluate_tokens_min = 50;
    rig_make_release(r, 2, CANDIDATE_BYTES);
    rig_make_release(r, 3, CANDIDATE_BYTES + 1000);
    return r;
}

static void test_evaluate(void **state)
{
    (void)state;
    rig *r = open_rig(1);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 500, false);
    assert_true(rig_job_waits(r, SH_JOB_EVALUATE));
    SAME(rig_count(r, SH_NODE_T_CHUNK), 3);
    rig_run(r, 3000, true);
    SAME(r->evaluated.candidate, 2);
    SAME(r->n_evaluations, 1); /* however often the plan asks */
    SAME(r->notes[SH_NOTE_EVALUATED], 1);
    SAME(r->note_number[SH_NOTE_EVALUATED], 2);
    const sh_evaluation *e = &r->evaluation;
    sh_hash sha = sh_sha256(r->releases[1].model.data, r->releases[1].model.len);
    SAME(e->candidate, 2);
    SAME(e->parent_version, 1);
    assert_memory_equal(&e->candidate_sha256, &sha, sizeof(sha));
    SAME(e->n, 2);
    SAME(e->slices[0].slice, SH_SLICE_ACCEPTED);
    SAME(e->slices[0].tokens, 40);
    assert_true(e->slices[1].nll_parent == 180.0 && e->slices[1].nll_candidate == 170.0);
    /* It is active nowhere; its chunks wait for the release that it becomes. */
    SAME(rig_status(r).active_version, 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 3);
    unsigned wants = r->sent[SH_MSG_WANT];
    r->offer = 2;
    rig_run(r, 3000, true);
    SAME(rig_status(r).active_version, 2);
    SAME(r->sent[SH_MSG_WANT], wants); /* nothing had to come again */
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    rig_close(&r);
}

static void test_not_for_us(void **state)
{
    (void)state;
    rig *r = open_rig(2);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 3, 2); /* its parent is not active here */
    rig_run(r, 2500, true);
    SAME(r->n_evaluations, 0);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    r->options.evaluate = false;
    rig_restart(r);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 2500, true);
    SAME(r->n_evaluations, 0);
    rig_close(&r);
}

/* Too little feedback: an answer of no slices, at once and without the chunks. */
static void test_too_little(void **state)
{
    (void)state;
    rig *r = open_rig(3);
    rig_start(r);
    rig_teach(r, 1, 0, 49, true);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 2500, true);
    SAME(r->n_evaluations, 1);
    SAME(r->evaluation.n, 0);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(r->sent[SH_MSG_WANT], 0);
    rig_close(&r);
}

/* A job that fails is tried again a few times; then there is nothing to say, and that is said. */
static void test_failing(void **state)
{
    (void)state;
    rig *r = open_rig(4);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    rig_link(r, true);
    r->evaluate_status = SH_ERR_NO_MEMORY;
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 1500, true);
    assert_true(r->notes[SH_NOTE_JOB_FAILED] > 0);
    SAME(r->n_evaluations, 0);
    rig_run(r, 10000, true);
    SAME(r->notes[SH_NOTE_JOB_FAILED], 3);
    SAME(r->n_evaluations, 1);
    SAME(r->evaluation.n, 0);
    /* Scores that are none count as a failure. */
    r->evaluate_status = SH_OK;
    r->slices[1].slice = r->slices[0].slice;
    r->plan.evaluate = rig_evaluate_plan(r, 3, 1);
    for (unsigned i = 0; i < 100 && r->notes[SH_NOTE_JOB_FAILED] < 4; i++)
        rig_run(r, 20, true);
    SAME(r->notes[SH_NOTE_JOB_FAILED], 4);
    SAME(r->n_evaluations, 1);
    r->slices[1].slice = SH_SLICE_ACCEPTED;
    rig_run(r, 2000, true);
    SAME(r->n_evaluations, 2);
    SAME(r->evaluation.candidate, 3);
    SAME(r->evaluation.n, 2);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 3); /* those of candidate 2 are gone */
    rig_close(&r);
}

/* A release comes first, and what it makes moot ends. */
static void test_release_first(void **state)
{
    (void)state;
    rig *r = open_rig(5);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 500, false);
    assert_true(rig_job_waits(r, SH_JOB_EVALUATE));
    r->drop_cancelled = true;
    r->offer = 3;
    rig_run(r, 3000, false);
    SAME(r->cancelled, 1);
    assert_true(rig_job_waits(r, SH_JOB_INSTALL));
    rig_run(r, 3000, true);
    SAME(rig_status(r).active_version, 3);
    SAME(r->n_evaluations, 0);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    rig_close(&r);
}

/* After a crash the next plan brings it again, and no chunk that is here. */
static void test_crash(void **state)
{
    (void)state;
    rig *r = open_rig(6);
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    rig_link(r, true);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1);
    rig_run(r, 500, false);
    unsigned wants = r->sent[SH_MSG_WANT];
    rig_restart(r);
    rig_link(r, true);
    rig_run(r, 3000, true);
    SAME(r->n_evaluations, 1);
    SAME(r->sent[SH_MSG_WANT], wants);
    /* Erasing what it would be measured on ends it too. */
    r->drop_cancelled = true;
    r->plan.evaluate = rig_evaluate_plan(r, 3, 1);
    rig_run(r, 2000, false);
    assert_true(rig_job_waits(r, SH_JOB_EVALUATE));
    rig_erase(r, 0);
    assert_false(rig_job_waits(r, SH_JOB_EVALUATE));
    rig_run(r, 3000, true);
    SAME(r->n_evaluations, 2);
    SAME(r->evaluation.n, 0); /* it has nothing left to say */
    rig_close(&r);
}

/* ---- a restored aggregator ---- */

/* As from a backup that knew nothing yet. */
static void forget_all(rig *r)
{
    sh_txn *txn = NULL;
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    OK(sh_txn_begin(r->agg, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_cursor_open(txn, AGG_T_INBOX, &cursor, &test_err));
    while (sh_cursor_seek(cursor, NULL, 0, &key, &value) == SH_OK) {
        uint8_t copy[SH_STORE_KEY_MAX];
        memcpy(copy, key.data, key.n);
        OK(sh_txn_del(txn, AGG_T_INBOX, copy, key.n, &test_err));
    }
    sh_cursor_close(&cursor);
    OK(sh_txn_commit(&txn, &test_err));
    memset(r->taken, 0, sizeof(r->taken));
    memset(r->n_taken, 0, sizeof(r->n_taken));
}

static void test_forgotten(void **state)
{
    (void)state;
    rig *r = open_rig(7);
    rig_start(r);
    rig_link(r, true);
    for (unsigned i = 0; i < 5 * 32; i++)
        rig_infer(r, i, false);
    rig_run(r, 1000, true);
    SAME(r->n_taken[SH_CLASS_WINDOW], 5);
    SAME(rig_status(r).outbox_items, 0);
    SAME(r->buried[SH_CLASS_WINDOW][1], 0);
    forget_all(r);
    for (unsigned i = 0; i < 2 * 32; i++)
        rig_infer(r, 1000 + i, false);
    rig_run(r, 3000, true);
    SAME(rig_status(r).outbox_items, 0);
    for (unsigned seq = 1; seq <= 5; seq++) {
        SAME(r->buried[SH_CLASS_WINDOW][seq], 1);
        SAME(r->taken[SH_CLASS_WINDOW][seq], 0);
    }
    SAME(r->taken[SH_CLASS_WINDOW][6], 1);
    SAME(r->taken[SH_CLASS_WINDOW][7], 1);
    SAME(r->buried[SH_CLASS_WINDOW][6], 0);
    SAME(rig_status(r).bad_messages, 0);
    /* The mark has passed: more than the bitmap holds goes through. */
    rig_infer(r, 2000, false);
    rig_close(&r);
}

/* An acknowledgement that shows a gap brings one tombstone, of what is not owed and no more; one on
 * its way is enough. */
static void test_one_tombstone(void **state)
{
    (void)state;
    rig *r = open_rig(8);
    rig_start(r);
    rig_link(r, true);
    for (unsigned i = 0; i < 5 * 32; i++)
        rig_infer(r, i, false);
    rig_run(r, 1000, true);
    r->mute = true;
    for (unsigned i = 0; i < 2 * 32; i++)
        rig_infer(r, 1000 + i, false); /* 6 and 7 are owed */
    rig_run(r, 20, false);
    unsigned items = r->sent[SH_MSG_ITEM];
    sh_msg ack = {.type = SH_MSG_ACK,
                  .ack = {.epoch = rig_status(r).epoch, .cls = SH_CLASS_WINDOW, .high_water = 2}};
    ack.ack.lease = rig_lease_name(r, ack.ack.epoch);
    rig_message(r, &ack);
    SAME(r->sent[SH_MSG_ITEM], items + 1);
    sh_msg sent;
    OK(sh_msg_decode(r->packets[r->n_packets - 1].bytes.data,
                     r->packets[r->n_packets - 1].bytes.len, &sent, &test_err));
    SAME(sent.item.kind, SH_ITEM_TOMBSTONE);
    SAME(sent.item.seq, 3);
    SAME(sent.item.last_seq, 5);
    rig_message(r, &ack);
    SAME(r->sent[SH_MSG_ITEM], items + 1);
    ack.ack.high_water = 5; /* passed: nothing is missing */
    rig_message(r, &ack);
    SAME(r->sent[SH_MSG_ITEM], items + 1);
    ack.ack.high_water = 1; /* and a gap that ends where the bitmap begins */
    ack.ack.bitmap[0] = 1u << 2;
    rig_message(r, &ack);
    SAME(r->sent[SH_MSG_ITEM], items + 2);
    OK(sh_msg_decode(r->packets[r->n_packets - 1].bytes.data,
                     r->packets[r->n_packets - 1].bytes.len, &sent, &test_err));
    SAME(sent.item.seq, 2);
    SAME(sent.item.last_seq, 3);
    rig_close(&r);
}

/* ---- version 1 ---- */

static void test_version_1(void **state)
{
    (void)state;
    rig *r = open_rig(9);
    r->speaks = 1;
    rig_start(r);
    rig_teach(r, 1, 0, 60, true);
    for (unsigned i = 0; i < 2 * 32; i++)
        rig_infer(r, i, false);
    r->plan.train = rig_train_plan(r, 1, 1);
    r->plan.evaluate = rig_evaluate_plan(r, 2, 1); /* which version 1 cannot carry */
    rig_link(r, true);
    rig_run(r, 5000, true);
    SAME(rig_status(r).updates_acked, 1);
    SAME(r->n_taken[SH_CLASS_WINDOW], 2);
    SAME(r->n_evaluations, 0);
    assert_true(rig_status(r).welcome);
    SAME(rig_status(r).outbox_items, 0);
    /* The next link may be to a newer one; what it finds out waits if that is cut off. */
    r->speaks = 2;
    rig_link(r, false);
    rig_link(r, true);
    rig_run(r, 500, false);
    assert_true(rig_job_waits(r, SH_JOB_EVALUATE));
    rig_link(r, false);
    assert_true(rig_finish_job(r, SH_JOB_EVALUATE));
    SAME(rig_status(r).outbox_items, 1);
    r->speaks = 1;
    rig_link(r, true);
    for (unsigned i = 0; i < 32; i++)
        rig_infer(r, 500 + i, false);
    rig_run(r, 3000, true);
    SAME(r->n_taken[SH_CLASS_WINDOW], 3); /* the rest goes on */
    SAME(r->n_evaluations, 0);
    SAME(rig_status(r).outbox_items, 1);
    r->speaks = 2;
    rig_link(r, false);
    rig_link(r, true);
    rig_run(r, 1000, true);
    SAME(r->n_evaluations, 1);
    SAME(rig_status(r).outbox_items, 0);
    rig_close(&r);
}

static void test_status(void **state)
{
    (void)state;
    rig *r = open_rig(10);
    rig_start(r);
    sh_node_status status = rig_status(r);
    SAME(status.last_sync_ms, 0);
    assert_false(status.welcome);
    r->reject = true;
    rig_link(r, true);
    rig_run(r, 20, false);
    assert_true(r->notes[SH_NOTE_REJECTED] > 0);
    assert_false(rig_status(r).welcome);
    r->reject = false;
    rig_run(r, 5000, false);
    status = rig_status(r);
    assert_true(status.welcome);
    assert_true(r->notes[SH_NOTE_CHECKED_IN] > 0);
    assert_true(status.last_sync_ms > 1000 && status.last_sync_ms <= r->now);
    SAME(status.outbox_bytes, 0);
    for (unsigned i = 0; i < 6 * 32; i++)
        rig_infer(r, i, i > 100);
    status = rig_status(r);
    assert_true(status.log_evalue[0] > 5.0);
    SAME(status.dropped[SH_CLASS_WINDOW], 0);
    uint64_t synced = status.last_sync_ms;
    rig_restart(r);
    SAME(rig_status(r).last_sync_ms, synced);
    sh_txn *txn = NULL;
    sh_bytes manifest;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_get_slot(txn, 0, &manifest, &test_err));
    SAME(manifest.n, rig_manifest(r, 1).n);
    assert_memory_equal(manifest.data, rig_manifest(r, 1).data, manifest.n);
    SAME(sh_node_get_slot(txn, 1, &manifest, &test_err), SH_ERR_NOT_FOUND);
    sh_txn_abort(&txn);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_evaluate),      cmocka_unit_test(test_not_for_us),
        cmocka_unit_test(test_too_little),    cmocka_unit_test(test_failing),
        cmocka_unit_test(test_release_first), cmocka_unit_test(test_crash),
        cmocka_unit_test(test_forgotten),     cmocka_unit_test(test_one_tombstone),
        cmocka_unit_test(test_version_1),     cmocka_unit_test(test_status),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
