/* Releases on a node: taken, refused, confirmed, given up for the one before. */
#include "tests/node/rig.h"

#include <math.h>
#include <string.h>

static void offer(rig *r, uint64_t version, uint64_t ms)
{
    r->offer = version;
    rig_run(r, ms, true);
}

static void confirm(rig *r)
{
    for (unsigned i = 0; i < r->options.confirm_inferences; i++)
        assert_true(rig_infer(r, i, false));
}

static void taken_and_confirmed(void **state)
{
    (void)state;
    rig *r = rig_open(1);
    rig_make_release(r, 2, 5 * SH_CHUNK_BYTES);
    rig_make_release(r, 3, 100 * (size_t)SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    offer(r, 2, 3000);
    SAME(r->active_version, 2);
    SAME(r->active_slot, 1);
    sh_hash sha = sh_sha256(r->releases[1].model.data, r->releases[1].model.len);
    assert_memory_equal(&r->slots[1], &sha, sizeof(sha));
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(r->checkin.active_version, 2);
    SAME(r->checkin.confirmed_version, 1);
    offer(r, 3, 3000); /* downloaded, but the slot of release 1 is what 2 would fall back to */
    SAME(r->active_version, 2);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 100);
    SAME(r->checkin.installing_version, 3);
    confirm(r);
    rig_run(r, 3000, true);
    SAME(rig_status(r).confirmed_version, 2);
    SAME(r->active_version, 3);
    SAME(r->active_slot, 0);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(r->notes[SH_NOTE_RELEASE_ACTIVE], 2);
    SAME(r->notes[SH_NOTE_RELEASE_CONFIRMED], 1);
    rig_restart(r);
    SAME(r->active_version, 3);
    SAME(r->active_slot, 0);
    rig_close(&r);
}

static void a_download_resumes_at_the_chunk(void **state)
{
    (void)state;
    rig *r = rig_open(2);
    rig_make_release(r, 2, 40 * SH_CHUNK_BYTES);
    r->chunk_budget = 3;
    rig_start(r);
    rig_link(r, true);
    offer(r, 2, 300);
    uint64_t have = rig_count(r, SH_NODE_T_CHUNK);
    assert_true(have > 0 && have < 40);
    unsigned got = r->sent[SH_MSG_WANT];
    assert_true(got > 0);
    rig_restart(r);
    SAME(rig_count(r, SH_NODE_T_CHUNK), have);
    rig_link(r, true);
    rig_run(r, 60000, true);
    SAME(r->active_version, 2);
    rig_close(&r);
}

/* One answer asks for the next: no waiting for a timer while chunks come. */
static void a_download_does_not_wait(void **state)
{
    (void)state;
    rig *r = rig_open(2);
    rig_make_release(r, 2, 150 * (size_t)SH_CHUNK_BYTES);
    r->options.retry_min_ms = 100000;
    r->options.retry_max_ms = 100000;
    rig_start(r);
    rig_link(r, true);
    offer(r, 2, 5000);
    SAME(r->active_version, 2);
    SAME(r->sent[SH_MSG_WANT], 3); /* 64, 64, 22 */
    rig_close(&r);
}

static void plan_with(rig *r, sh_bytes manifest)
{
    sh_msg msg = {.type = SH_MSG_PLAN};
    msg.plan.return_after_ms = 1000;
    msg.plan.manifest = manifest;
    rig_message(r, &msg);
}

static void bad_signature(void **state)
{
    (void)state;
    rig *r = rig_open(3);
    rig_make_release(r, 2, 2 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    rig_run(r, 200, true);
    sh_buf *m = &r->releases[1].manifest;
    for (size_t i = 0; i < m->len; i += 11) {
        m->data[i] ^= 16;
        plan_with(r, (sh_bytes){m->data, m->len});
        m->data[i] ^= 16;
    }
    plan_with(r, (sh_bytes){m->data, m->len - 1});
    plan_with(r, (sh_bytes){"x", 1});
    sh_sign_public_key other;
    sh_sign_secret_key other_sk;
    uint8_t seed[32] = {8};
    sh_sign_keypair(seed, &other, &other_sk);
    sh_manifest manifest;
    OK(sh_manifest_verify(m->data, m->len, &r->options.release_key, &manifest, &test_err));
    sh_buf forged;
    sh_buf_init(&forged, SH_WIRE_MANIFEST_MAX);
    OK(sh_manifest_sign(&manifest, &other_sk, &forged, &test_err));
    plan_with(r, (sh_bytes){forged.data, forged.len});
    sh_buf_release(&forged);
    SAME(rig_status(r).bad_messages, (m->len + 10) / 11 + 3);
    SAME(r->sent[SH_MSG_WANT], 0);
    SAME(rig_status(r).active_version, 1);
    plan_with(r, (sh_bytes){m->data, m->len}); /* and the true one is still welcome */
    rig_run(r, 2000, true);
    SAME(r->active_version, 2);
    rig_close(&r);
}

static void no_way_back(void **state)
{
    (void)state;
    rig *r = rig_open(3);
    rig_make_release(r, 2, 2 * SH_CHUNK_BYTES);
    rig_make_release(r, 3, 2 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    offer(r, 3, 3000);
    SAME(r->active_version, 3);
    confirm(r);
    unsigned wants = r->sent[SH_MSG_WANT];
    r->offer = 0;
    plan_with(r, rig_manifest(r, 2));
    rig_run(r, 5000, true);
    SAME(r->active_version, 3);
    SAME(r->sent[SH_MSG_WANT], wants);
    SAME(r->note_number[SH_NOTE_RELEASE_REFUSED], 2);
    rig_close(&r);
}

static void a_corrupt_chunk_is_asked_for_again(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    rig_run(r, 500, true);
    r->mute = true;
    plan_with(r, rig_manifest(r, 2));
    SAME(r->sent[SH_MSG_WANT], 1);
    uint8_t *model = r->releases[1].model.data;
    sh_msg msg = {.type = SH_MSG_CHUNK};
    msg.chunk.hash = sh_blake2b(model, SH_CHUNK_BYTES);
    model[5] ^= 1;
    msg.chunk.bytes = (sh_bytes){model, SH_CHUNK_BYTES};
    rig_message(r, &msg);
    model[5] ^= 1;
    SAME(rig_status(r).bad_messages, 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    r->mute = false;
    rig_run(r, 5000, true);
    SAME(r->active_version, 2);
    rig_close(&r);
}

static void a_blob_that_is_not_its_hash_is_refused(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_make_release(r, 3, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    r->install_status = SH_ERR_CORRUPT;
    offer(r, 2, 3000);
    SAME(r->active_version, 1);
    SAME(r->note_number[SH_NOTE_RELEASE_REFUSED], 2);
    SAME(r->notes[SH_NOTE_RELEASE_REFUSED], 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    r->install_status = SH_OK;
    unsigned wants = r->sent[SH_MSG_WANT];
    rig_restart(r); /* it is remembered */
    rig_link(r, true);
    rig_run(r, 10000, true);
    SAME(r->sent[SH_MSG_WANT], wants);
    SAME(r->active_version, 1);
    offer(r, 3, 3000);
    SAME(r->active_version, 3);
    rig_close(&r);
}

static void a_full_disk_is_tried_again(void **state)
{
    (void)state;
    rig *r = rig_open(4);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    r->install_status = SH_ERR_FULL;
    r->offer = 2;
    while (r->notes[SH_NOTE_JOB_FAILED] == 0)
        rig_run(r, 10, true);
    r->install_status = SH_OK;
    rig_run(r, 10000, true);
    SAME(r->active_version, 2);
    rig_close(&r);

    r = rig_open(4);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    r->install_status = SH_ERR_FULL;
    offer(r, 2, 60000);
    SAME(r->notes[SH_NOTE_JOB_FAILED], 3); /* not for ever */
    SAME(r->notes[SH_NOTE_RELEASE_REFUSED], 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    rig_close(&r);
}

static void smoke_must_be_finite(void **state)
{
    (void)state;
    const double nll[] = {NAN, INFINITY, 1e6};
    for (size_t i = 0; i < SH_COUNT(nll); i++) {
        rig *r = rig_open(5);
        rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
        rig_start(r);
        rig_link(r, true);
        r->smoke_nll = nll[i];
        offer(r, 2, 3000);
        SAME(r->active_version, 1);
        SAME(r->notes[SH_NOTE_RELEASE_REFUSED], 1);
        rig_close(&r);
    }
}

static void an_unhealthy_release_is_given_up(void **state)
{
    (void)state;
    rig *r = rig_open(6);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_make_release(r, 3, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    rig_teach(r, 1, 0, 50, true);
    offer(r, 2, 3000);
    SAME(r->active_version, 2);
    r->plan.train = rig_train_plan(r, 1, 2);
    rig_run(r, 2000, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    assert_true(rig_infer(r, 1, false));
    sh_node_event sick = {.kind = SH_NODE_INFERENCE};
    sick.record = (sh_record){.at_ms = r->now, .release_version = 1, .prompt_tokens = 3};
    sick.record.prompt_nll = NAN;
    assert_true(rig_step(r, &sick)); /* of a request that began on release 1: says nothing of 2 */
    SAME(r->active_version, 2);
    sick.record.release_version = 2;
    assert_true(rig_step(r, &sick));
    SAME(r->active_version, 1);
    SAME(r->active_slot, 0);
    SAME(r->cancelled, 1); /* the training on it */
    SAME(rig_status(r).confirmed_version, 1);
    SAME(r->note_number[SH_NOTE_RELEASE_REFUSED], 2);
    rig_finish_job(r, SH_JOB_TRAIN); /* its result comes too late */
    SAME(rig_status(r).updates_made, 0);
    r->plan.train = (sh_train_plan){0};
    rig_run(r, 10000, true); /* offered still, and refused still */
    SAME(r->active_version, 1);
    offer(r, 3, 3000);
    confirm(r);
    SAME(rig_status(r).confirmed_version, 3);
    rig_close(&r);
}

static void a_newer_release_replaces_a_download(void **state)
{
    (void)state;
    rig *r = rig_open(7);
    rig_make_release(r, 2, 30 * SH_CHUNK_BYTES);
    rig_make_release(r, 3, 4 * SH_CHUNK_BYTES);
    r->chunk_budget = 2;
    rig_start(r);
    rig_link(r, true);
    r->offer = 2;
    while (rig_count(r, SH_NODE_T_CHUNK) < 2)
        rig_run(r, 10, true);
    r->offer = 3;
    rig_run(r, 20000, true);
    SAME(r->active_version, 3);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0); /* nothing of 2 is left behind */
    rig_close(&r);
}

/* An update whose bytes lie in chunks that a release also has keeps them. */
static void chunks_are_shared_with_owed_updates(void **state)
{
    (void)state;
    rig *r = rig_open(7);
    rig_make_release(r, 2, 2 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_teach(r, 1, 0, 50, true);
    sh_msg plan = {.type = SH_MSG_PLAN};
    plan.plan.return_after_ms = 1000;
    plan.plan.train = rig_train_plan(r, 1, 1);
    rig_message(r, &plan);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    /* the "update" is the release's own bytes */
    const sh_buf *model = &r->releases[1].model;
    sh_node_event done = {.kind = SH_NODE_JOB_DONE};
    done.result = (sh_node_job_result){.id = r->jobs[0].job.id,
                                       .text = "",
                                       .update = {model->data, model->len},
                                       .samples = 1,
                                       .heldout_before = 2,
                                       .heldout_after = 1};
    assert_true(rig_step(r, &done));
    plan.plan.train = (sh_train_plan){0};
    plan.plan.manifest = rig_manifest(r, 2);
    rig_message(r, &plan);
    assert_true(rig_finish_job(r, SH_JOB_INSTALL)); /* every chunk was here already */
    assert_true(rig_finish_job(r, SH_JOB_SMOKE));
    SAME(r->active_version, 2);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 2);
    rig_link(r, true);
    rig_run(r, 3000, true);
    SAME(rig_status(r).updates_acked, 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    rig_close(&r);
}

/* ---- manifests that the store has damaged ---- */

static void damage_manifest(rig *r)
{
    sh_txn *txn = NULL;
    sh_slice value;
    uint8_t copy[8192];
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_txn_get(txn, SH_NODE_T_META, "take", 4, &value));
    assert_in_range(value.n, 1, sizeof(copy));
    memcpy(copy, value.data, value.n);
    copy[value.n / 2] ^= 1;
    OK(sh_txn_put(txn, SH_NODE_T_META, "take", 4, copy, value.n, &test_err));
    OK(sh_txn_commit(&txn, &test_err));
}

/* Reported, forgotten with its chunks, and taken anew; what runs goes on meanwhile. */
static void expect_taken_anew(rig *r, uint64_t chunks)
{
    SAME(r->notes[SH_NOTE_MANIFEST_LOST], 1);
    SAME(r->note_number[SH_NOTE_MANIFEST_LOST], 2);
    SAME(rig_count(r, SH_NODE_T_CHUNK), chunks);
    SAME(r->active_version, 1);
    assert_true(rig_infer(r, 1, false));
    r->chunk_budget = SH_WIRE_WANT_MAX;
    rig_link(r, true);
    rig_run(r, 60000, true);
    SAME(r->active_version, 2);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0);
    SAME(r->notes[SH_NOTE_MANIFEST_LOST], 1);
    SAME(r->notes[SH_NOTE_RELEASE_REFUSED], 0);
}

static rig *with_part_of_a_download(void)
{
    rig *r = rig_open(5);
    rig_make_release(r, 2, 40 * SH_CHUNK_BYTES);
    r->chunk_budget = 3;
    rig_start(r);
    rig_link(r, true);
    offer(r, 2, 300);
    uint64_t have = rig_count(r, SH_NODE_T_CHUNK);
    assert_true(have > 0 && have < 40);
    r->mute = true;
    return r;
}

static void a_manifest_is_lost_in_the_download(void **state)
{
    (void)state;
    rig *r = with_part_of_a_download();
    damage_manifest(r);
    rig_run(r, 60000, true); /* it asks for the next chunks */
    r->mute = false;
    expect_taken_anew(r, 0);
    rig_close(&r);
}

static void a_manifest_is_lost_while_the_node_is_off(void **state)
{
    (void)state;
    rig *r = with_part_of_a_download();
    damage_manifest(r);
    rig_restart(r);
    r->mute = false;
    expect_taken_anew(r, 0);
    rig_close(&r);
}

static void a_manifest_is_lost_before_a_newer_one(void **state)
{
    (void)state;
    rig *r = with_part_of_a_download();
    rig_make_release(r, 3, 41 * SH_CHUNK_BYTES);
    damage_manifest(r);
    r->mute = false;
    r->chunk_budget = SH_WIRE_WANT_MAX;
    r->offer = 3;
    plan_with(r, rig_manifest(r, 3));
    SAME(r->notes[SH_NOTE_MANIFEST_LOST], 1);
    SAME(rig_count(r, SH_NODE_T_CHUNK), 0); /* release 2's, which 3 does not share */
    rig_run(r, 60000, true);
    SAME(r->active_version, 3);
    rig_close(&r);
}

static void a_manifest_is_lost_before_the_smoke_test(void **state)
{
    (void)state;
    rig *r = rig_open(5);
    rig_make_release(r, 2, 3 * SH_CHUNK_BYTES);
    rig_start(r);
    rig_link(r, true);
    r->offer = 2;
    rig_run(r, 5000, false);
    assert_true(rig_finish_job(r, SH_JOB_INSTALL));
    damage_manifest(r);
    assert_true(rig_finish_job(r, SH_JOB_SMOKE));
    expect_taken_anew(r, 0);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(taken_and_confirmed),
        cmocka_unit_test(a_download_resumes_at_the_chunk),
        cmocka_unit_test(a_download_does_not_wait),
        cmocka_unit_test(bad_signature),
        cmocka_unit_test(no_way_back),
        cmocka_unit_test(a_corrupt_chunk_is_asked_for_again),
        cmocka_unit_test(a_blob_that_is_not_its_hash_is_refused),
        cmocka_unit_test(a_full_disk_is_tried_again),
        cmocka_unit_test(smoke_must_be_finite),
        cmocka_unit_test(an_unhealthy_release_is_given_up),
        cmocka_unit_test(a_newer_release_replaces_a_download),
        cmocka_unit_test(chunks_are_shared_with_owed_updates),
        cmocka_unit_test(a_manifest_is_lost_in_the_download),
        cmocka_unit_test(a_manifest_is_lost_while_the_node_is_off),
        cmocka_unit_test(a_manifest_is_lost_before_a_newer_one),
        cmocka_unit_test(a_manifest_is_lost_before_the_smoke_test),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
