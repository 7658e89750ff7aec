/* What outlives a program: stores of version 1, backups that are restored, names, and versions that
 * are never issued twice. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "edge-node/node.h"
#include "tests/aggregator/rig.h"
#include "tests/store/dump.h"
#include "tests/store/util.h"

#define EPOCH  77
#define NOW_MS UINT64_C(1790000000000) /* 2026 */

static rig *setup(void)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    r->now_ms = NOW_MS;
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

static void publish_one(rig *r, uint64_t seq)
{
    for (unsigned node = 0; node < 3; node++) {
        rig_update u = rig_make(r, node, seq);
        assert_true(rig_offer(r, node, &u));
    }
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
}

static sh_status count_audit(void *arg, uint64_t seq, uint64_t at_ms, const char *text)
{
    (void)at_ms;
    (void)text;
    *(uint64_t *)arg = seq;
    return SH_OK;
}

static uint64_t audit_length(sh_store *store)
{
    uint64_t n = 0;
    sh_txn *txn = NULL;
    sh_error err = {0};
    assert_int_equal(sh_txn_begin(store, SH_TXN_READ, &txn, NULL), SH_OK);
    if (sh_coord_each_audit(txn, count_audit, &n, &err) != SH_OK)
        fail_msg("%s", err.text);
    sh_txn_abort(&txn);
    return n;
}

/* ---- stores of version 1 ---- */

/* store-v1.txt: dumped by version 1. Three nodes began to drift; release 2, a refused candidate,
 * release 3 with one of its updates refused; one key revoked; then three updates in a candidate
 * that is at the gate, one that waits beside it, one whose chunk is still to come. */
static void load(rig *r, const char *dir, const char *dump)
{
    sh_store_options options = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    sh_error err = {0};
    rig_init(r, dir);
    r->now_ms = 30000;
    r->options.drifting_min = 2;
    if (sh_store_open_lmdb(dir, &options, &r->store, &err) != SH_OK ||
        dump_read(r->store, sh_coord_tables, SH_COORD_TABLES, dump, &err) != SH_OK)
        fail_msg("%s", err.text);
}

static sh_status create(rig *r, sh_coord_actions *actions, sh_error *err)
{
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_rng_init(&rng, 3, r->life++, 3);
    SH_TRY(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, err));
    sh_status status =
        sh_coord_create(&r->options, NULL, r->now_ms, &rng, txn, actions, &r->coord, err);
    if (status == SH_OK)
        status = sh_txn_commit(&txn, err);
    sh_txn_abort(&txn);
    return status;
}

typedef struct {
    sh_hash key;
    sh_node_row row;
} find_node;

static sh_status see_node(void *arg, const sh_node_row *row)
{
    find_node *f = arg;
    if (sh_hash_equal(&row->key, &f->key))
        f->row = *row;
    return SH_OK;
}

static sh_node_row node_of(rig *r, unsigned node)
{
    find_node f = {.key = rig_key(node)};
    sh_txn *txn = NULL;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_each_node(txn, see_node, &f, NULL), SH_OK);
    sh_txn_abort(&txn);
    return f.row;
}

static void expect_v1_life(rig *r)
{
    sh_coord_status s = rig_status(r);
    assert_int_equal(s.version, 3);
    assert_int_equal(s.releases, 2);
    assert_int_equal(s.candidates_refused, 1);
    assert_int_equal(s.candidates_inconclusive, 0);
    assert_int_equal(s.enrolled, 5);
    assert_int_equal(s.round, 4);
    assert_int_equal(s.buffered, 4);
    assert_int_equal(s.updates_in, 13);
    assert_int_equal(s.updates_merged, 5);
    assert_int_equal(s.updates_refused[SH_REASON_GATE], 3);
    assert_int_equal(s.updates_refused[SH_REASON_NORM], 1);
    assert_int_equal(s.drifting, 1);
    assert_int_equal(s.bad_messages, 0); /* the last one was not stored before it ended */
    assert_true(s.gating && s.rounds_begun && !s.paused && !s.evaluating);
    assert_int_equal(s.candidate, 4);
    assert_true(s.server_scale == 1.5f);
    assert_true(s.epoch != 0);
    assert_int_equal(rig_count(r, SH_COORD_T_ALARM), 3);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 4);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 7);
    assert_int_equal(rig_count(r, SH_COORD_T_INBOX), 7);
    sh_node_row row = node_of(r, 3);
    assert_string_equal(row.agent, "shoal-node 0.1");
    assert_string_equal(row.name, "");
    assert_int_equal(row.n_epochs, 2);
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 7);
    assert_int_equal(row.checkin.active_version, 2);
    assert_true(node_of(r, 5).revoked);
    bool found;
    sh_release_row release = rig_candidate(r, 3, &found);
    assert_true(found && release.version == 3 && release.updates == 2);
    assert_true(release.loss_candidate == 2.5 && release.loss_parent == 2.75);
    assert_int_equal(release.canary_nodes, 0);
}

static void test_a_store_of_version_1_goes_on(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    rig *r = calloc(1, sizeof *r);
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    assert_non_null(r);
    assert_non_null(actions);
    load(r, dir.path, SHOAL_SOURCE_DIR "/tests/aggregator/store-v1.txt");
    uint64_t audited = audit_length(r->store); /* readers take it as it is */
    assert_int_equal(audited, 11);
    if (create(r, actions, &err) != SH_OK)
        fail_msg("%s", err.text);
    expect_v1_life(r);
    assert_int_equal(rig_count(r, SH_COORD_T_META), 4); /* state, candidate, waiting; schema */
    assert_int_equal(audit_length(r->store), audited + 1);
    assert_int_equal(actions->n, 1); /* the gate that version 1 had begun */
    assert_int_equal(actions->items[0].job.kind, SH_COORD_GATE);
    uint64_t epoch = rig_status(r).epoch, gate = actions->items[0].job.id;
    sh_coord_destroy(&r->coord);
    sh_coord_actions_clear(actions);
    if (create(r, actions, &err) != SH_OK) /* the second time there is nothing to migrate */
        fail_msg("%s", err.text);
    expect_v1_life(r);
    assert_true(rig_status(r).epoch == epoch);
    assert_int_equal(audit_length(r->store), audited + 1);
    assert_true(actions->items[0].job.id > gate);
    /* And it goes on: the gate passes, the next round comes, over nodes of version 1, too. */
    r->job = actions->items[0].job;
    actions->items[0].job.inputs = NULL;
    sh_coord_actions_clear(actions);
    assert_true(rig_end_gate(r, 2.5, 2.4));
    assert_int_equal(rig_status(r).version, 4);
    bool found;
    sh_release_row release = rig_candidate(r, 4, &found);
    assert_true(found && release.parent == 3 && release.server_scale == 1.5f);
    r->wire = 1;
    rig_plan plan = rig_checkin(r, 3, 3, true);
    assert_int_equal(plan.wire, 1);
    assert_int_equal(plan.manifest_version, 4);
    assert_int_equal(plan.train.base_version, 4);
    sh_coord_destroy(&r->coord);
    sh_store_close(&r->store);
    rig_drop_mail(r);
    free(r->job.inputs);
    free(actions);
    free(r);
    temp_dir_remove(&dir);
}

/* store-v2.txt: dumped by version 2. Six nodes, node 0 with a name, node 3 with three stores, node
 * 5 revoked; release 2, which two canary nodes scored; then a backup that was restored, which made
 * release 21, and two updates that wait. */
static void expect_v2_life(rig *r)
{
    sh_coord_status s = rig_status(r);
    assert_int_equal(s.version, 21);
    assert_int_equal(s.releases, 2);
    assert_int_equal(s.enrolled, 5);
    assert_int_equal(s.drifting, 1);
    assert_int_equal(s.buffered, 2);
    assert_int_equal(s.clones, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 8);
    assert_int_equal(rig_count(r, SH_COORD_T_ACCESS), 0);
    sh_node_row row = node_of(r, 3), kitchen = node_of(r, 0);
    sh_hash key = rig_key(3);
    assert_int_equal(row.n_epochs, 3);
    assert_string_equal(row.agent, "shoal-node 0.2");
    assert_true(sh_hash_equal(&row.current_key, &key));
    assert_string_equal(kitchen.name, "kitchen");
    assert_int_equal(kitchen.checkin.active_version, 1);
    assert_true(node_of(r, 2).checkin.drifting && !kitchen.checkin.drifting);
    assert_true(node_of(r, 5).revoked);
}

static bool renews(rig *r, unsigned node, uint64_t epoch, const char *leases)
{
    return rig_renews(r, node, epoch, leases, NULL);
}

static void test_a_store_of_version_2_goes_on(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    rig *r = calloc(1, sizeof *r);
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    assert_non_null(r);
    assert_non_null(actions);
    load(r, dir.path, SHOAL_SOURCE_DIR "/tests/aggregator/store-v2.txt");
    uint64_t audited = audit_length(r->store);
    assert_int_equal(node_of(r, 3).n_epochs, 3); /* readers take it as it is */
    for (int i = 0; i < 2; i++) {                /* the second time there is nothing to migrate */
        if (create(r, actions, &err) != SH_OK)
            fail_msg("%s", err.text);
        expect_v2_life(r);
        assert_int_equal(audit_length(r->store), audited + 1);
        assert_int_equal(actions->n, 0);
        if (i == 0)
            sh_coord_destroy(&r->coord);
    }
    /* The epochs that it had are known, and none has a lease: whoever comes first has it. */
    rig_item(r, 3,
             &(sh_msg_item){.epoch = 1001,
                            .cls = SH_CLASS_WINDOW,
                            .seq = 2,
                            .last_seq = 2,
                            .kind = SH_ITEM_WINDOW,
                            .payload = {"window", 6}});
    rig_drop_mail(r);
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 8);
    assert_false(renews(r, 3, 1001, "b"));
    assert_true(renews(r, 3, 1001, "c"));
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 8);
    assert_int_equal(node_of(r, 3).n_epochs, 3);
    rig_update u = rig_make(r, 2, 2);
    assert_true(rig_offer(r, 2, &u));
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    sh_coord_destroy(&r->coord);
    sh_store_close(&r->store);
    rig_drop_mail(r);
    free(r->job.inputs);
    free(actions);
    free(r);
    temp_dir_remove(&dir);
}

static void put_schema(rig *r, const void *bytes, size_t n)
{
    sh_txn *txn = NULL;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_put(txn, SH_COORD_T_META, "schema", 6, bytes, n, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
}

static void test_a_newer_store_is_refused(void **state)
{
    (void)state;
    rig *r = setup();
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    assert_non_null(actions);
    sh_coord_destroy(&r->coord);
    put_schema(r, "\4\0\0\0", 4);
    assert_int_equal(create(r, actions, &err), SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "schema 4"));
    put_schema(r, "\1\0\0\0", 4);
    assert_int_equal(create(r, actions, &err), SH_ERR_CORRUPT);
    put_schema(r, "\2\0", 2);
    assert_int_equal(create(r, actions, &err), SH_ERR_CORRUPT);
    put_schema(r, "\3\0\0\0", 4);
    assert_int_equal(create(r, actions, &err), SH_OK);
    sh_coord_actions_clear(actions);
    free(actions);
    finish(r);
}

/* ---- who is who ---- */

static bool enrol_as(rig *r, unsigned node, const char *name)
{
    uint32_t refused = r->notes[SH_CNOTE_COMMAND_REFUSED];
    sh_coord_event event = {
        .kind = SH_COORD_COMMAND, .command = SH_COMMAND_ENROL, .node = rig_key(node), .name = name};
    assert_true(rig_step(r, &event));
    return r->notes[SH_CNOTE_COMMAND_REFUSED] == refused;
}

static void test_nodes_have_names(void **state)
{
    (void)state;
    rig *r = setup();
    char longest[SH_NODE_NAME_MAX + 2];
    memset(longest, 'x', sizeof longest);
    longest[SH_NODE_NAME_MAX + 1] = '\0';
    assert_false(enrol_as(r, 9, longest));
    longest[SH_NODE_NAME_MAX] = '\0';
    assert_true(enrol_as(r, 9, longest));
    assert_false(enrol_as(r, 9, "two\nlines"));
    assert_string_equal(node_of(r, 9).name, longest);
    assert_true(enrol_as(r, 0, "kitchen"));
    assert_int_equal(rig_status(r).enrolled, 5); /* it was enrolled: only the name is new */
    (void)rig_checkin(r, 0, 1, true);
    rig_reboot(r);
    rig_enrol(r, 0);
    assert_true(enrol_as(r, 0, NULL)); /* keeps it */
    assert_string_equal(node_of(r, 0).name, "kitchen");
    finish(r);
}

static void test_drift_is_noted_as_it_begins(void **state)
{
    (void)state;
    rig *r = setup();
    (void)rig_checkin(r, 0, 1, true);
    (void)rig_checkin(r, 0, 1, true);
    (void)rig_checkin(r, 1, 1, false);
    assert_int_equal(r->notes[SH_CNOTE_DRIFTING], 1);
    (void)rig_checkin(r, 1, 1, true);
    assert_int_equal(r->notes[SH_CNOTE_DRIFTING], 2);
    assert_int_equal(r->last_number[SH_CNOTE_DRIFTING], 2);
    finish(r);
}

static void test_answers_are_in_the_askers_version(void **state)
{
    (void)state;
    rig *r = setup();
    sh_msg msg;
    for (uint32_t wire = 1; wire <= SH_WIRE_VERSION; wire++) {
        r->wire = wire;
        assert_int_equal(rig_checkin(r, 0, 1, false).wire, wire);
        sh_msg_item item = {.epoch = EPOCH,
                            .cls = SH_CLASS_WINDOW,
                            .seq = wire,
                            .last_seq = wire,
                            .kind = SH_ITEM_WINDOW,
                            .payload = {"window", 6}};
        assert_true(rig_item(r, 0, &item));
        assert_true(rig_take(r, 0, &msg));
        assert_int_equal(msg.type, SH_MSG_ACK);
        assert_int_equal(msg.version, wire);
    }
    /* What cannot be read is answered so that everybody can read it. */
    assert_true(rig_send_bytes(r, 0, "junk", 4));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_int_equal(msg.version, SH_WIRE_VERSION_MIN);
    const uint8_t newer[] = {0x94, SH_WIRE_VERSION + 1, 3, 0xc4, 0};
    assert_true(rig_send_bytes(r, 0, newer, sizeof newer));
    assert_true(rig_take(r, 0, &msg));
    assert_string_equal(msg.error.code, "unsupported");
    assert_int_equal(msg.version, SH_WIRE_VERSION);
    finish(r);
}

/* ---- leases ---- */

static void test_an_epoch_has_one_sender(void **state)
{
    (void)state;
    rig *r = setup();
    assert_false(renews(r, 0, 5, "a"));   /* the first start */
    assert_false(renews(r, 0, 5, "a"));   /* another connection */
    assert_false(renews(r, 0, 5, "ba"));  /* the second start */
    assert_false(renews(r, 0, 5, "dcb")); /* the fourth, the third never got through */
    /* A copy that was made before the third start: its newest welcomed lease is b. */
    uint64_t audited = audit_length(r->store);
    assert_true(renews(r, 0, 5, "xb"));
    assert_int_equal(r->common, 1);
    assert_true(renews(r, 0, 5, "yxa"));
    assert_int_equal(r->common, 2);
    assert_true(renews(r, 0, 5, "yx"));
    assert_int_equal(r->common, 2);     /* none */
    assert_false(renews(r, 0, 6, "y")); /* it took a new epoch */
    assert_false(renews(r, 0, 5, "d")); /* and the first sender never noticed */
    assert_false(renews(r, 0, 5, ""));  /* one that does not take part is not checked */
    assert_false(renews(r, 0, 5, "d"));
    assert_false(renews(r, 1, 5, "x")); /* another node's epoch of the same number */
    assert_int_equal(rig_status(r).clones, 3);
    assert_int_equal(r->notes[SH_CNOTE_CLONED], 3);
    assert_int_equal(audit_length(r->store), audited + 2); /* the 1st and the 2nd, not the 3rd */
    assert_int_equal(node_of(r, 0).n_clones, 3);
    assert_int_equal(node_of(r, 0).n_epochs, 3); /* rig_enrol's, 5, 6 */
    assert_int_equal(node_of(r, 1).n_clones, 0);
    rig_reboot(r);
    assert_int_equal(rig_status(r).clones, 3);
    assert_true(renews(r, 0, 5, "xb"));
    assert_false(renews(r, 0, 5, "d"));
    finish(r);
}

/* By a PLAN: the check-in was taken; else the node is told to enrol. */
static bool answered(rig *r, unsigned node, uint64_t epoch)
{
    sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = epoch}};
    assert_true(rig_send(r, node, &msg));
    assert_true(rig_take(r, node, &msg));
    if (msg.type == SH_MSG_PLAN)
        return true;
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_string_equal(msg.error.code, "auth");
    return false;
}

/* A start that takes an epoch over from another, which may be the original of its copied store and
 * still run: that one's connections end, and it is told apart when it comes again. */
static void test_a_start_that_takes_over_is_alone(void **state)
{
    (void)state;
    rig *r = setup();
    sh_hash key = rig_key(0);
    r->connection = 7;
    assert_false(renews(r, 0, 5, "a")); /* from nobody */
    r->connection = 8;
    assert_false(renews(r, 0, 5, "a")); /* the same start, by another connection */
    assert_int_equal(r->others_drops, 0);
    r->connection = 9;
    assert_false(renews(r, 0, 5, "ba"));
    assert_int_equal(r->others_drops, 1);
    assert_true(sh_hash_equal(&r->dropped, &key));
    assert_int_equal(r->spared, 9);
    r->connection = 10;
    assert_true(renews(r, 0, 5, "a")); /* the original */
    /* What it sent before it knew is not taken; it is under the new epoch, with what was before. */
    assert_false(answered(r, 0, 5));
    r->connection = 9;
    assert_true(answered(r, 0, 5));
    r->connection = 10;
    assert_false(renews(r, 0, 6, "a"));
    assert_true(answered(r, 0, 6) && answered(r, 0, 5));
    assert_false(renews(r, 0, 5, "")); /* one that does not take part */
    assert_true(renews(r, 0, 5, "a")); /* its ENROL of before once more, late */
    assert_false(answered(r, 0, 6));
    assert_false(renews(r, 0, 6, "a"));
    assert_true(answered(r, 0, 6));
    assert_int_equal(r->others_drops, 1);
    finish(r);
}

/* A restored backup has leases of the past: nodes that went on since are no copies. */
static void test_leases_across_a_restore(void **state)
{
    (void)state;
    rig *r = setup();
    assert_false(renews(r, 0, 5, "a"));
    assert_false(renews(r, 1, 5, "a"));
    sh_store *backup = rig_backup(r);
    assert_false(renews(r, 0, 5, "ba"));
    assert_false(renews(r, 0, 5, "cb"));
    rig_restore(r, backup);
    assert_false(renews(r, 0, 5, "dc")); /* a is long forgotten */
    assert_true(renews(r, 0, 5, "xb"));  /* from here on it is checked again */
    assert_false(renews(r, 0, 5, "d"));
    assert_false(renews(r, 1, 5, "ba"));
    assert_true(renews(r, 1, 5, "a"));
    rig_restore(r, backup); /* a second time, the same copy */
    assert_false(renews(r, 0, 5, "ed"));
    assert_true(renews(r, 0, 5, "x"));
    sh_store_close(&backup);
    finish(r);
}

/* Nodes that speak version 2 have no leases, and are told nothing of renewals. */
static void test_leases_and_older_nodes(void **state)
{
    (void)state;
    rig *r = setup();
    assert_false(renews(r, 0, 5, "a"));
    r->wire = 2;
    assert_false(renews(r, 0, 5, "x")); /* not in that version: left out */
    r->wire = 0;
    assert_false(renews(r, 0, 5, "a"));
    assert_int_equal(rig_status(r).clones, 0);
    finish(r);
}

/* ---- backups ---- */

static void test_a_restored_backup_goes_on_above(void **state)
{
    (void)state;
    rig *r = setup();
    publish_one(r, 1);
    publish_one(r, 2); /* version 3 */
    sh_store *backup = rig_backup(r);
    uint64_t epoch = rig_status(r).epoch, round = rig_checkin(r, 0, 3, false).train.round;
    publish_one(r, 3);
    publish_one(r, 4); /* version 5, which the backup has never heard of */
    rig_update on_five = rig_make(r, 3, 1);
    r->now_ms += 2000;
    rig_restore(r, backup);
    sh_coord_status s = rig_status(r);
    assert_true(s.epoch != epoch);
    assert_true(s.version > NOW_MS / 1000);
    assert_int_equal(r->notes[SH_CNOTE_RESTORED], 1);
    assert_true(r->last_number[SH_CNOTE_RESTORED] == s.version - 1);
    /* A node that runs 5 takes it: else it could neither train nor go back. */
    rig_plan plan = rig_checkin(r, 3, 5, false);
    assert_true(plan.manifest_version == s.version);
    assert_true(plan.train.base_version == s.version && plan.train.round > round);
    assert_true(rig_offer(r, 3, &on_five)); /* on a base that is gone */
    bool found;
    assert_int_equal(rig_row(r, 3, EPOCH, 1, &found).reason, SH_REASON_BASE);
    rig_check(r, true);
    /* The mark is gone: a second start restores nothing. */
    rig_reboot(r);
    assert_int_equal(r->notes[SH_CNOTE_RESTORED], 1);
    assert_true(rig_status(r).version == s.version);
    /* Updates on what the backup knew are one release behind, as ever. */
    publish_one(r, 5);
    assert_true(rig_status(r).version == s.version + 1);
    assert_true(rig_checkin(r, 0, s.version, false).manifest_version == s.version + 1);
    /* The skipped versions are no releases. */
    uint32_t refused = r->notes[SH_CNOTE_COMMAND_REFUSED];
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 5, 0, 0));
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, s.version - 1, 0, 0));
    assert_int_equal(r->notes[SH_CNOTE_COMMAND_REFUSED], refused + 2);
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, s.version, 0, 0));
    assert_true(rig_status(r).version == s.version + 2);
    sh_store_close(&backup);
    finish(r);
}

/* Staleness counts releases, not numbers. */
static void test_updates_across_a_restore(void **state)
{
    (void)state;
    rig *r = setup();
    publish_one(r, 1);
    rig_update on_two = rig_make(r, 3, 1);
    for (unsigned node = 0; node < 2; node++) {
        rig_update u = rig_make(r, node, 2);
        assert_true(rig_offer(r, node, &u));
    }
    sh_store *backup = rig_backup(r);
    r->now_ms += 5000;
    rig_restore(r, backup);
    assert_int_equal(rig_status(r).buffered, 2);
    assert_true(rig_offer(r, 3, &on_two));
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_int_equal(r->job.n_inputs, 3);
    assert_true(r->job.inputs[0].weight == 500); /* one release behind: half */
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    assert_int_equal(rig_status(r).updates_merged, 6);
    sh_store_close(&backup);
    finish(r);
}

/* A candidate in progress belongs to a release that is not current any more. */
static void test_a_restore_in_the_middle_of_a_round(void **state)
{
    (void)state;
    for (int stage = 0; stage < 3; stage++) {
        rig *r = setup();
        if (stage == 2) {
            r->options.canary_nodes_min = 2;
            r->options.canary_share = 1;
            r->options.canary_ms_max = 1000000;
            rig_reboot(r);
        }
        for (unsigned node = 0; node < 3; node++) {
            rig_update u = rig_make(r, node, 1);
            assert_true(rig_offer(r, node, &u));
        }
        if (stage > 0)
            assert_true(rig_end_merge(r, NULL));
        if (stage > 1)
            assert_true(rig_end_gate(r, 3.0, 2.9));
        sh_store *backup = rig_backup(r);
        uint64_t candidate = rig_status(r).candidate;
        r->now_ms += 2000;
        rig_restore(r, backup);
        assert_int_equal(r->job.kind, SH_COORD_MERGE); /* of the same updates, anew */
        assert_int_equal(r->job.n_inputs, 3);
        assert_true(r->job.candidate > candidate && r->job.parent_version == rig_status(r).version);
        rig_check(r, true);
        sh_store_close(&backup);
        finish(r);
    }
}

/* A store that was set back without a mark (a copy of a disk), or by a clock that was: the nodes
 * know better. */
static void test_nodes_lift_the_version(void **state)
{
    (void)state;
    rig *r = setup();
    publish_one(r, 1);
    r->jumps = true;
    rig_plan plan = rig_checkin(r, 3, 5, false);
    uint64_t version = rig_status(r).version;
    assert_true(version > 5 && plan.manifest_version == version);
    assert_true(plan.train.base_version == version);
    assert_int_equal(rig_checkin(r, 3, UINT64_MAX, false).manifest_version, 0); /* absurd */
    assert_true(rig_status(r).version == version);
    /* One that lies moves the numbers, but does not make the fleet take a model each time. */
    for (uint64_t lie = 1; lie < 100; lie++)
        (void)rig_checkin(r, 3, rig_status(r).version + 1000, false);
    assert_true(rig_status(r).releases <= 9);
    uint64_t lifted = rig_status(r).version + 1000;
    publish_one(r, 2);
    assert_true(rig_status(r).version > lifted);
    rig_reboot(r);
    finish(r);
}

/* What a restored aggregator has forgotten, its nodes do not owe any more: a tombstone for the gap
 * lets the high-water mark pass, also when part of the range is known. */
static void test_a_gap_is_closed_by_a_tombstone(void **state)
{
    (void)state;
    rig *r = setup();
    sh_msg msg;
    sh_msg_item item = {
        .epoch = EPOCH, .cls = SH_CLASS_WINDOW, .kind = SH_ITEM_WINDOW, .payload = {"window", 6}};
    const uint64_t seqs[] = {1, 2, 3, 6}; /* 4 and 5 were acknowledged by who is forgotten */
    for (size_t i = 0; i < SH_COUNT(seqs); i++) {
        item.seq = item.last_seq = seqs[i];
        assert_true(rig_item(r, 0, &item));
        rig_drop_mail(r);
    }
    const struct {
        uint64_t first, last, high_water;
    } gaps[] = {{2, 4, 4}, {1, 5, 6}, {7, 9000, 9000}, {1, 9000, 9000}, {9000, 9001, 9001}};
    for (size_t i = 0; i < SH_COUNT(gaps); i++) {
        item.kind = SH_ITEM_TOMBSTONE;
        item.payload = (sh_bytes){0};
        item.seq = gaps[i].first;
        item.last_seq = gaps[i].last;
        assert_true(rig_item(r, 0, &item));
        assert_true(rig_take(r, 0, &msg));
        assert_int_equal(msg.type, SH_MSG_ACK);
        assert_int_equal(msg.ack.high_water, gaps[i].high_water);
        /* Of an epoch the last 1024 sequences are kept, those of a gap among them. */
        assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), gaps[i].last <= 1024 ? 4 : 0);
    }
    finish(r);
}

static void test_only_an_aggregators_store_is_a_backup(void **state)
{
    (void)state;
    sh_store_options options = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    assert_int_equal(sh_store_open_memory(&options, &store, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_mark_backup(txn, 1, NULL), SH_ERR_NOT_FOUND);
    sh_txn_abort(&txn);
    sh_store_close(&store);
}

/* ---- a node's core against a restored aggregator ---- */

typedef struct {
    rig *r;
    sh_store *store;
    sh_node *core;
    sh_node_job job; /* id 0: none */
    uint64_t timer_ms;
} real_node;

static void node_actions(real_node *n, sh_node_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++) {
        const sh_node_action *a = &actions->items[i];
        if (a->kind == SH_NODE_SEND)
            assert_true(rig_send_bytes(n->r, 0, a->message.data, a->message.len));
        else if (a->kind == SH_NODE_START_JOB)
            n->job = a->job;
        else if (a->kind == SH_NODE_SET_TIMER)
            n->timer_ms = a->at_ms;
    }
    sh_node_actions_clear(actions);
}

static void node_event(real_node *n, sh_node_event *event)
{
    sh_node_actions *actions = calloc(1, sizeof *actions);
    sh_txn *txn = NULL;
    assert_non_null(actions);
    event->now_ms = n->r->now_ms;
    assert_int_equal(sh_txn_begin(n->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_node_step(n->core, event, txn, actions, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    node_actions(n, actions);
    free(actions);
}

/* Until both sides have nothing more to say, and a while longer. */
static void node_run(real_node *n)
{
    rig *r = n->r;
    for (int i = 0; i < 200; i++) {
        sh_node_event event = {.kind = SH_NODE_MESSAGE};
        if (r->n_mail > 0) { /* all of it is node 0's */
            sh_buf bytes = r->mail[0].bytes;
            memmove(&r->mail[0], &r->mail[1], --r->n_mail * sizeof r->mail[0]);
            event.message = (sh_bytes){bytes.data, bytes.len};
            node_event(n, &event);
            sh_buf_release(&bytes);
            continue;
        }
        if (n->job.id == 0) {
            r->now_ms = SH_MAX(r->now_ms, n->timer_ms);
            event.kind = SH_NODE_TIMER;
            node_event(n, &event);
            continue;
        }
        event.kind = SH_NODE_JOB_DONE;
        event.result = (sh_node_job_result){.id = n->job.id, .nll = 2.0};
        n->job = (sh_node_job){0};
        node_event(n, &event);
    }
}

static void node_start(real_node *n, rig *r)
{
    sh_store_options tables = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES};
    sh_node_options options = {.release_key = r->options.release_pk,
                               .agent = "core",
                               .kernel = "none",
                               .records_max = 512,
                               .feedback_tokens_max = 1000,
                               .windows_max = 8,
                               .completions_max = 8,
                               .outbox_quota_bytes = {1u << 20, 1u << 20, 1u << 20, 1u << 20},
                               .retry_min_ms = 100,
                               .retry_max_ms = 1000,
                               .confirm_inferences = 5};
    options.monitor.window = 128;
    options.monitor.reference = 512;
    options.monitor.average_run_length = 1e6;
    *n = (real_node){.r = r};
    sh_node_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    sh_txn *txn = NULL, *in = NULL;
    sh_bytes genesis;
    sh_rng rng;
    sh_rng_init(&rng, 4, 0, 4);
    assert_non_null(actions);
    assert_int_equal(sh_store_open_memory(&tables, &n->store, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &in, NULL), SH_OK);
    assert_int_equal(sh_coord_get_manifest(in, 1, &genesis, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(n->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    if (sh_node_create(&options, genesis, r->now_ms, &rng, txn, actions, &n->core, &err) != SH_OK)
        fail_msg("%s", err.text);
    sh_txn_abort(&in);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    node_actions(n, actions);
    free(actions);
}

/* Its users are there, so that what it runs is confirmed: else it takes no other release. */
static void node_serve(real_node *n)
{
    for (int i = 0; i < 6; i++) {
        sh_node_event event = {
            .kind = SH_NODE_INFERENCE,
            .record = {.at_ms = n->r->now_ms,
                       .release_version = (uint32_t)sh_node_get_status(n->core).active_version,
                       .prompt_tokens = 20,
                       .output_tokens = 5,
                       .prompt_nll = 2.0f,
                       .mean_logprob = -1.0f,
                       .least_logprob = -2.0f,
                       .mean_entropy = 1.0f}};
        node_event(n, &event);
    }
}

static void node_link(real_node *n)
{
    node_serve(n);
    sh_node_event down = {.kind = SH_NODE_LINK_DOWN}, up = {.kind = SH_NODE_LINK_UP};
    node_event(n, &down);
    node_event(n, &up);
    node_run(n);
}

static void test_a_node_follows_a_restored_aggregator(void **state)
{
    (void)state;
    rig *r = setup();
    real_node n;
    rig_drop_mail(r);
    node_start(&n, r);
    publish_one(r, 1);
    publish_one(r, 2);
    sh_store *backup = rig_backup(r);
    publish_one(r, 3);
    publish_one(r, 4);
    node_link(&n);
    assert_int_equal(sh_node_get_status(n.core).active_version, 5);
    r->now_ms += 3000;
    rig_restore(r, backup);
    node_link(&n);
    assert_true(rig_status(r).version > 5);
    assert_true(sh_node_get_status(n.core).active_version == rig_status(r).version);
    for (unsigned node = 1; node < 4; node++) { /* and what is published from then on */
        rig_update u = rig_make(r, node, 20);
        assert_true(rig_offer(r, node, &u));
    }
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    node_link(&n);
    assert_true(sh_node_get_status(n.core).active_version == rig_status(r).version);
    sh_node_destroy(&n.core);
    sh_store_close(&n.store);
    sh_store_close(&backup);
    finish(r);
}

/* ---- whatever happens, no version is issued twice ---- */

#define ISSUED_MAX 4096
typedef struct {
    uint64_t version;
    sh_hash manifest;
} issued;

typedef struct {
    rig *r;
    sh_rng rng;
    sh_store *backup;
    issued issued[ISSUED_MAX];
    size_t n_issued;
    uint64_t active[4], seq[4], evaluations[4];
    uint32_t restores;
} fleet;

/* A node takes what is above what it has; a version that it sees has always the same manifest. */
static void see(fleet *f, unsigned node, const rig_plan *plan)
{
    if (plan->manifest_version == 0)
        return;
    assert_true(plan->manifest_version > f->active[node]);
    size_t i = 0;
    while (i < f->n_issued && f->issued[i].version != plan->manifest_version)
        i++;
    if (i == f->n_issued) {
        assert_true(f->n_issued < ISSUED_MAX);
        f->issued[f->n_issued++] = (issued){plan->manifest_version, plan->manifest};
    }
    assert_true(sh_hash_equal(&f->issued[i].manifest, &plan->manifest));
    if (sh_rng_below(&f->rng, 4) != 0)
        f->active[node] = plan->manifest_version;
}

static void do_something(fleet *f)
{
    rig *r = f->r;
    unsigned node = (unsigned)sh_rng_below(&f->rng, 4);
    uint64_t what = sh_rng_below(&f->rng, 100);
    r->now_ms += 500;
    if (what < 40) {
        rig_enrol(r, node);
        rig_plan plan = rig_checkin(r, node, f->active[node], sh_rng_below(&f->rng, 2) != 0);
        see(f, node, &plan);
        if (plan.evaluate.candidate != 0)
            (void)rig_evaluate(r, node, ++f->evaluations[node], &plan.evaluate,
                               (double[3]){500, 3.0, 2.8 + 0.25 * sh_rng_unit(&f->rng)});
    } else if (what < 75) {
        rig_enrol(r, node);
        rig_update u = rig_make(r, node, ++f->seq[node]);
        (void)rig_offer(r, node, &u);
    } else if (what < 80) {
        rig_reboot(r);
    } else if (what < 82) {
        sh_store_close(&f->backup);
        f->backup = rig_backup(r);
    } else if (what < 84 && f->backup != NULL) {
        rig_restore(r, f->backup);
        f->restores++;
    } else if (what < 86) {
        (void)rig_command(r, SH_COMMAND_ROLLBACK, rig_status(r).version - 1, 0, 0);
    } else if (what < 88 && f->restores == 0) { /* a lie about what it runs */
        (void)rig_checkin(r, node, f->active[node] + sh_rng_below(&f->rng, 5000), false);
    } else if (what < 91 && r->timer_ms != 0) {
        (void)rig_timer(r);
    }
    if (r->job.kind == SH_COORD_MERGE && sh_rng_below(&f->rng, 3) == 0)
        (void)rig_end_merge(r, NULL);
    else if (r->job.kind == SH_COORD_GATE && sh_rng_below(&f->rng, 3) == 0)
        (void)rig_end_gate(r, 3.0, 2.9 + 0.15 * sh_rng_unit(&f->rng));
    rig_drop_mail(r);
    if (what % 10 == 0) {
        r->crash_at = r->commits + 1 + sh_rng_below(&f->rng, 6);
        r->crash_mode = (int)sh_rng_below(&f->rng, 3);
    }
}

static void test_no_version_is_issued_twice(void **state)
{
    (void)state;
    size_t versions = 0;
    uint32_t restores = 0;
    for (uint64_t seed = 0; seed < 20; seed++) {
        fleet *f = calloc(1, sizeof *f);
        assert_non_null(f);
        f->r = calloc(1, sizeof *f->r);
        assert_non_null(f->r);
        rig_init(f->r, NULL);
        f->r->now_ms = NOW_MS;
        f->r->options.canary_nodes_min = seed % 2 == 0 ? 2 : 0;
        f->r->options.canary_tokens_min = 900;
        f->r->options.canary_share = 0.7;
        f->r->options.canary_ms_max = 20000;
        f->r->options.round_ms_max = 30000;
        f->r->jumps = true;
        rig_boot(f->r);
        sh_rng_init(&f->rng, seed, 0, 0x76657273);
        for (int i = 0; i < 400; i++)
            do_something(f);
        versions += f->n_issued;
        restores += f->restores;
        f->r->crash_at = 0;
        sh_store_close(&f->backup);
        finish(f->r);
        free(f);
    }
    print_message("%zu versions seen, %u restores\n", versions, restores);
    assert_true(versions > 100 && restores > 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_store_of_version_1_goes_on),
        cmocka_unit_test(test_a_store_of_version_2_goes_on),
        cmocka_unit_test(test_a_newer_store_is_refused),
        cmocka_unit_test(test_an_epoch_has_one_sender),
        cmocka_unit_test(test_a_start_that_takes_over_is_alone),
        cmocka_unit_test(test_leases_across_a_restore),
        cmocka_unit_test(test_leases_and_older_nodes),
        cmocka_unit_test(test_nodes_have_names),
        cmocka_unit_test(test_drift_is_noted_as_it_begins),
        cmocka_unit_test(test_answers_are_in_the_askers_version),
        cmocka_unit_test(test_a_restored_backup_goes_on_above),
        cmocka_unit_test(test_updates_across_a_restore),
        cmocka_unit_test(test_a_node_follows_a_restored_aggregator),
        cmocka_unit_test(test_a_restore_in_the_middle_of_a_round),
        cmocka_unit_test(test_nodes_lift_the_version),
        cmocka_unit_test(test_a_gap_is_closed_by_a_tombstone),
        cmocka_unit_test(test_only_an_aggregators_store_is_a_backup),
        cmocka_unit_test(test_no_version_is_issued_twice),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
