/* The coordinator under crashes, failing allocations and hostile nodes: nothing is lost, nothing is
 * counted twice, and no message ends a step with an error. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/aggregator/rig.h"
#include "tests/store/util.h"

#define EPOCH 77
#define NODES 4

static rig *setup(const char *dir)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, dir);
    return r;
}

static void finish(rig *r)
{
    rig_check(r, true);
    rig_release(r);
    free(r);
}

/* ---- a scripted round, driven as nodes would: what is not acknowledged is sent again ---- */

typedef struct {
    rig_update updates[NODES];
    bool acked[NODES], enrolled[NODES];
} script;

/* One pass over everybody. Decisions of jobs depend on the candidate alone, so that a job that is
 * run again says the same: node 1's update is refused, the first candidate fails at the gate. */
static void pass(rig *r, script *s)
{
    for (unsigned node = 0; node < NODES; node++) {
        rig_enrol(r, node);
        (void)rig_checkin(r, node, 1, node == 2);
        if (!s->acked[node])
            s->acked[node] = rig_offer(r, node, &s->updates[node]);
    }
    rig_check(r, false);
    if (r->job.kind == SH_COORD_MERGE) {
        sh_reason reasons[NODES];
        for (uint32_t i = 0; i < r->job.n_inputs; i++) {
            sh_hash bad = rig_key(1);
            reasons[i] =
                sh_hash_equal(&r->job.inputs[i].id.node, &bad) ? SH_REASON_NORM : SH_REASON_NONE;
        }
        (void)rig_end_merge(r, reasons);
    } else if (r->job.kind == SH_COORD_GATE) {
        bool raised = r->job.server_scale > 1;
        (void)rig_end_gate(r, 3.0, raised ? 5.0 : 2.5);
    }
}

/* Runs the round to its end and checks it; how many commits it took. */
static size_t run_round(rig *r, size_t crash_at, int mode)
{
    r->options.buffer = NODES;
    r->options.server_scale = 2; /* the gate refuses it once: the retry is in the script, too */
    r->options.drifting_min = 1;
    rig_boot(r);
    script s = {0};
    for (unsigned node = 0; node < NODES; node++)
        s.updates[node] = rig_make(r, node, 1);
    r->commits = 0;
    r->crash_at = crash_at;
    r->crash_mode = mode;
    for (int i = 0; rig_status(r).version < 2 && i < 40; i++)
        pass(r, &s);
    sh_coord_status status = rig_status(r);
    assert_int_equal(status.version, 2);
    assert_int_equal(status.updates_in, NODES);
    assert_int_equal(status.updates_merged, NODES - 1);
    assert_int_equal(status.updates_refused[SH_REASON_NORM], 1);
    assert_int_equal(status.candidates_refused, 1);
    assert_int_equal(status.round, 2);
    assert_true(status.server_scale == 1);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 5); /* two releases that share one */
    for (int i = 0; i < 3; i++)                          /* and all of them hear of it in the end */
        pass(r, &s);
    for (unsigned node = 0; node < NODES; node++)
        assert_true(s.acked[node]);
    return r->commits;
}

static void test_a_crash_between_any_two_steps(void **state)
{
    (void)state;
    rig *r = setup(NULL);
    size_t commits = run_round(r, 0, RIG_SOUND);
    finish(r);
    assert_true(commits > 40);
    for (size_t at = 1; at <= commits; at++)
        for (int mode = RIG_CRASH_BEFORE; mode <= RIG_CRASH_AFTER; mode++) {
            r = setup(NULL);
            (void)run_round(r, at, mode);
            finish(r);
        }
}

/* The same over LMDB, whose slices do not survive a write and whose values are unaligned. */
static void test_the_round_over_lmdb(void **state)
{
    (void)state;
    const size_t at[] = {0, 9, 14, 23, 30};
    for (size_t i = 0; i < SH_COUNT(at); i++) {
        temp_dir dir = temp_dir_make();
        rig *r = setup(dir.path);
        (void)run_round(r, at[i], RIG_CRASH_AFTER);
        finish(r);
        temp_dir_remove(&dir);
    }
}

/* Allocations fail all the time: a step is undone as a whole, and the core is made again. */
static void test_memory_that_runs_out(void **state)
{
    (void)state;
    size_t failures = 0;
    for (uint64_t seed = 0; seed < 12; seed++) {
        rig *r = setup(NULL);
        r->options.buffer = NODES;
        rig_boot(r);
        script s = {0};
        for (unsigned node = 0; node < NODES; node++)
            s.updates[node] = rig_make(r, node, 1);
        sh_rng_init(&r->torture_rng, seed, 0, 4);
        r->torture = true;
        for (int i = 0; rig_status(r).version < 2 && i < 300; i++)
            pass(r, &s);
        sh_coord_status status = rig_status(r);
        assert_int_equal(status.version, 2);
        assert_int_equal(status.updates_in, NODES);
        assert_int_equal(status.updates_merged, NODES - 1);
        assert_int_equal(status.updates_refused[SH_REASON_NORM], 1);
        failures += r->failures;
        finish(r);
    }
    print_message("%zu steps failed\n", failures);
    assert_true(failures > 50);
}

/* ---- chunks ---- */

static void offer(rig *r, unsigned node, const rig_update *u)
{
    assert_true(rig_offer(r, node, u));
}

/* An item with the meta of u, and the message's answer. */
static void send_item(rig *r, unsigned node, const rig_update *u, sh_msg *answer)
{
    static uint8_t bytes[RIG_UPDATE_BYTES];
    rig_fill(bytes, sizeof bytes, u->content);
    sh_update_meta meta = {.base_version = u->base_version,
                           .base_sha256 = u->base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = u->samples};
    uint8_t *hashes = NULL;
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_blob_describe(bytes, sizeof bytes, &meta.blob, &hashes, NULL), SH_OK);
    assert_int_equal(sh_update_meta_encode(&meta, &payload, NULL), SH_OK);
    sh_msg_item item = {.epoch = u->epoch,
                        .cls = SH_CLASS_UPDATE,
                        .seq = u->seq,
                        .last_seq = u->seq,
                        .kind = SH_ITEM_UPDATE,
                        .payload = {payload.data, payload.len}};
    assert_true(rig_item(r, node, &item));
    assert_true(rig_take(r, node, answer));
    sh_buf_release(&payload);
    free(hashes);
}

static void send_chunk(rig *r, unsigned node, uint64_t content, size_t index)
{
    static uint8_t bytes[RIG_UPDATE_BYTES];
    rig_fill(bytes, sizeof bytes, content);
    size_t at = index * SH_CHUNK_BYTES, n = SH_MIN(sizeof bytes - at, (size_t)SH_CHUNK_BYTES);
    sh_msg msg = {.type = SH_MSG_CHUNK,
                  .chunk = {.hash = sh_blake2b(bytes + at, n), .bytes = {bytes + at, n}}};
    assert_true(rig_send(r, node, &msg));
}

static rig *setup_fleet(void)
{
    rig *r = setup(NULL);
    rig_boot(r);
    for (unsigned node = 0; node < NODES; node++)
        rig_enrol(r, node);
    return r;
}

static void test_a_transfer_resumes_at_the_chunk(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    rig_update u = rig_make(r, 0, 1);
    sh_msg msg;
    send_item(r, 0, &u, &msg);
    assert_int_equal(msg.type, SH_MSG_WANT);
    assert_int_equal(msg.want.n, 2);
    send_chunk(r, 0, u.content, 1);
    sh_coord_event gone = {.kind = SH_COORD_GONE, .node = rig_key(0)};
    assert_true(rig_step(r, &gone));
    rig_reboot(r); /* not even a crash makes it begin again */
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 4);
    send_item(r, 0, &u, &msg);
    assert_int_equal(msg.type, SH_MSG_WANT);
    assert_int_equal(msg.want.n, 1);
    send_chunk(r, 0, u.content, 0);
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    assert_int_equal(rig_status(r).buffered, 1);
    finish(r);
}

static void test_only_wanted_chunks_are_kept(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    rig_update u = rig_make(r, 0, 1);
    sh_msg msg;
    send_chunk(r, 0, 12345, 0); /* nobody asked */
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    send_item(r, 0, &u, &msg);
    send_chunk(r, 1, u.content, 0); /* another node was asked */
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    uint8_t hash[32];
    memcpy(hash, msg.want.hashes, 32);
    sh_msg lie = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {"not these bytes", 15}}};
    memcpy(lie.chunk.hash.b, hash, 32);
    assert_true(rig_send(r, 0, &lie));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_int_equal(rig_status(r).bad_messages, 1);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    offer(r, 0, &u); /* and the honest ones still get in */
    finish(r);
}

static void test_waiting_updates_are_bounded(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    for (uint64_t seq = 1; seq <= 20; seq++) {
        rig_update u = rig_make(r, 0, seq);
        sh_msg msg;
        send_item(r, 0, &u, &msg);
        assert_int_equal(msg.type, SH_MSG_WANT);
        send_chunk(r, 0, u.content, 0);
    }
    /* Of one node, four wait: state, schema, and a chunk of each. */
    assert_int_equal(rig_count(r, SH_COORD_T_META), 2 + 4);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3 + 4);
    for (uint64_t seq = 1; seq <= 20; seq++) { /* the others come again */
        rig_update u = rig_make(r, 0, seq);
        r->options.buffer = 100;
        offer(r, 0, &u);
    }
    assert_int_equal(rig_status(r).updates_in, 20);
    finish(r);
}

/* A node that names another's chunks gets nothing of it, and takes nothing away. */
static void test_naming_anothers_chunks(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    rig_update honest = rig_make(r, 0, 1), copy = rig_make(r, 1, 1);
    offer(r, 0, &honest);
    copy.content = honest.content;
    copy.base_version = 0; /* to be refused */
    offer(r, 1, &copy);
    assert_int_equal(rig_status(r).updates_refused[SH_REASON_BASE], 1);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 5);
    sh_txn *txn = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, RIG_UPDATE_BYTES);
    sh_update_id id = {rig_key(0), EPOCH, 1};
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_read_update(txn, &id, &bytes, NULL), SH_OK);
    assert_int_equal(bytes.len, RIG_UPDATE_BYTES);
    id.seq = 2;
    assert_int_equal(sh_coord_read_update(txn, &id, &bytes, NULL), SH_ERR_NOT_FOUND);
    sh_txn_abort(&txn);
    sh_hash chunk = sh_blake2b(bytes.data, SH_CHUNK_BYTES);
    sh_buf_release(&bytes);
    sh_msg msg = {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = chunk.b}};
    assert_true(rig_send(r, 1, &msg)); /* another node's update is not served */
    assert_true(rig_take(r, 1, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    /* One that promises another SHA-256 than its chunks have is told at the merge: bad-blob. */
    copy = rig_make(r, 1, 2);
    copy.content = honest.content;
    offer(r, 1, &copy); /* the same bytes as node 0's: nothing is asked for */
    assert_int_equal(rig_status(r).buffered, 2);
    finish(r);
}

static void test_a_release_is_served_in_pieces(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    uint8_t hashes[5 * 32];
    for (size_t i = 0; i < 3; i++) {
        size_t at = i * SH_CHUNK_BYTES;
        sh_hash h = sh_blake2b(r->genesis + at, SH_MIN(sizeof r->genesis - at, SH_CHUNK_BYTES));
        memcpy(hashes + 32 * i, h.b, 32);
    }
    memset(hashes + 96, 0x5a, 64); /* and two that nobody has */
    sh_msg msg = {.type = SH_MSG_WANT, .want = {.n = 5, .hashes = hashes}};
    assert_true(rig_send(r, 0, &msg));
    unsigned chunks = 0;
    while (rig_take(r, 0, &msg)) {
        assert_int_equal(msg.type, SH_MSG_CHUNK);
        chunks++;
    }
    assert_int_equal(chunks, 2); /* the budget of one message */
    finish(r);
}

/* ---- other items ---- */

static sh_msg_item item_of(sh_class cls, sh_item_kind kind, uint64_t seq, const void *data,
                           size_t n)
{
    return (sh_msg_item){.epoch = EPOCH,
                         .cls = (uint8_t)cls,
                         .seq = seq,
                         .last_seq = seq,
                         .kind = (uint8_t)kind,
                         .payload = {data, n}};
}

static sh_status count_item(void *arg, const sh_update_id *id, sh_bytes payload)
{
    uint64_t *count = arg;
    assert_true(id->epoch == EPOCH && payload.n > 0);
    (*count)++;
    return SH_OK;
}

static void expect_ack(rig *r, unsigned node, uint64_t high_water)
{
    sh_msg msg;
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    assert_int_equal(msg.ack.high_water, high_water);
}

static void test_alarms_and_windows_are_kept_and_bounded(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    sh_buf alarm;
    sh_buf_init(&alarm, 4096);
    assert_int_equal(sh_alarm_encode(&(sh_alarm){.window = 3, .metric = 1}, &alarm, NULL), SH_OK);
    sh_msg_item item = item_of(SH_CLASS_ALARM, SH_ITEM_ALARM, 1, alarm.data, alarm.len);
    for (int i = 0; i < 3; i++) { /* three times the same */
        assert_true(rig_item(r, 0, &item));
        expect_ack(r, 0, 1);
    }
    assert_int_equal(rig_count(r, SH_COORD_T_ALARM), 1);
    for (uint64_t seq = 1; seq <= 1100; seq++) {
        item = item_of(SH_CLASS_WINDOW, SH_ITEM_WINDOW, seq, "window", 6);
        assert_true(rig_item(r, 0, &item));
        expect_ack(r, 0, seq);
    }
    uint64_t windows = 0;
    sh_txn *txn = NULL;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_each_item(txn, SH_COORD_T_WINDOW, count_item, &windows, NULL), SH_OK);
    sh_txn_abort(&txn);
    assert_int_equal(windows, 1024);
    /* Not readable, or in the wrong class: acknowledged, counted, not kept. */
    static uint8_t big[9000];
    const sh_msg_item bad[] = {
        item_of(SH_CLASS_ALARM, SH_ITEM_ALARM, 2, "no alarm", 8),
        item_of(SH_CLASS_ALARM, SH_ITEM_WINDOW, 3, "window", 6),
        item_of(SH_CLASS_WINDOW, SH_ITEM_WINDOW, 1101, big, sizeof big),
        item_of(SH_CLASS_WINDOW, SH_ITEM_UPDATE, 1102, "update", 6),
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        assert_true(rig_item(r, 0, &bad[i]));
        expect_ack(r, 0, bad[i].seq);
        rig_drop_mail(r);
    }
    assert_int_equal(rig_status(r).bad_messages, SH_COUNT(bad));
    assert_int_equal(rig_count(r, SH_COORD_T_ALARM), 1);
    sh_buf_release(&alarm);
    finish(r);
}

static void give_window(rig *r, uint64_t first, uint64_t last, bool tombstone)
{
    sh_msg_item item = item_of(SH_CLASS_WINDOW, tombstone ? SH_ITEM_TOMBSTONE : SH_ITEM_WINDOW,
                               first, tombstone ? NULL : "window", tombstone ? 0 : 6);
    item.last_seq = last;
    assert_true(rig_item(r, 0, &item));
    rig_drop_mail(r);
}

/* Whatever comes in their places, and in which order: one marked sequence, one place. */
static void test_no_order_leaves_more_windows(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    for (uint64_t seq = 1; seq <= 1024; seq++)
        give_window(r, seq, seq, false);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 1024);
    give_window(r, 1025, 1027, true); /* takes the places of 1 to 3 */
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 1021);
    give_window(r, 1028, UINT64_C(1) << 40, true);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 0);
    finish(r);

    r = setup(NULL);
    r->options.node_items_max = 4;
    rig_boot(r);
    rig_enrol(r, 0);
    for (uint64_t seq = 40; seq > 0; seq--) /* the latest first */
        give_window(r, seq, seq, false);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 4);
    give_window(r, 41, 41, false);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 4);
    finish(r);
}

static void test_tombstones(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    rig_update u = rig_make(r, 0, 1);
    sh_msg msg;
    send_item(r, 0, &u, &msg);
    send_chunk(r, 0, u.content, 0);
    sh_msg_item item = item_of(SH_CLASS_UPDATE, SH_ITEM_TOMBSTONE, 1, NULL, 0);
    item.last_seq = 5;
    assert_true(rig_item(r, 0, &item));
    expect_ack(r, 0, 5);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3); /* what was on its way is forgotten */
    assert_true(rig_offer(r, 0, &u));                    /* a late copy is a duplicate */
    assert_int_equal(rig_status(r).updates_in, 0);
    u = rig_make(r, 0, 6);
    offer(r, 0, &u);
    item.seq = 7;
    item.last_seq = 6; /* no range */
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_msg bad = {.type = SH_MSG_ITEM, .item = item};
    if (sh_msg_encode(&bad, &bytes, NULL) == SH_OK)
        assert_true(rig_send_bytes(r, 0, bytes.data, bytes.len));
    sh_buf_release(&bytes);
    item.seq = 1000000; /* far ahead: not taken, so that the bitmap stays bounded */
    item.last_seq = 1000001;
    rig_drop_mail(r);
    assert_true(rig_item(r, 0, &item));
    expect_ack(r, 0, 6);
    finish(r);
}

/* ---- hostile bytes ---- */

static void test_random_and_mutated_messages(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    sh_rng rng;
    sh_rng_init(&rng, 11, 0, 1);
    sh_buf good[4];
    rig_update u = rig_make(r, 0, 1);
    sh_msg msgs[4] = {
        {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH, .active_version = 1}},
        {.type = SH_MSG_ITEM, .item = item_of(SH_CLASS_WINDOW, SH_ITEM_WINDOW, 1, "window", 6)},
        {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = u.base_sha256.b}},
        {.type = SH_MSG_WELCOME, .welcome = {.accepted = true, .text = "I am the aggregator"}},
    };
    for (size_t i = 0; i < SH_COUNT(good); i++) {
        sh_buf_init(&good[i], SH_WIRE_MESSAGE_MAX);
        assert_int_equal(sh_msg_encode(&msgs[i], &good[i], NULL), SH_OK);
    }
    for (int i = 0; i < 4000; i++) {
        uint8_t bytes[512];
        size_t n = 0;
        if (i % 2 == 0) {
            n = (size_t)sh_rng_below(&rng, sizeof bytes);
            for (size_t k = 0; k < n; k++)
                bytes[k] = (uint8_t)sh_rng_u32(&rng);
        } else {
            const sh_buf *m = &good[sh_rng_below(&rng, SH_COUNT(good))];
            n = SH_MIN(m->len, sizeof bytes);
            memcpy(bytes, m->data, n);
            bytes[sh_rng_below(&rng, n)] ^= (uint8_t)(1u << sh_rng_below(&rng, 8));
            if (i % 3 == 0)
                n = (size_t)sh_rng_below(&rng, n);
        }
        assert_true(rig_send_bytes(r, (unsigned)sh_rng_below(&rng, 6), bytes, n));
        assert_true(r->n_mail <= 3);
        rig_drop_mail(r);
    }
    assert_true(rig_send(r, 0, &msgs[3])); /* well-formed, but not a node's to send */
    sh_msg msg;
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    sh_msg error = {.type = SH_MSG_ERROR, .error = {.code = "invalid", .text = "no, you"}};
    assert_true(rig_send(r, 0, &error));
    assert_false(rig_take(r, 0, &msg)); /* errors are not answered with errors */
    assert_true(rig_status(r).bad_messages > 3000);
    for (size_t i = 0; i < SH_COUNT(good); i++)
        sh_buf_release(&good[i]);
    offer(r, 0, &u); /* and it still works */
    finish(r);
}

/* ---- the audit log ---- */

static sh_status read_all(void *arg, uint64_t seq, uint64_t at_ms, const char *text)
{
    uint64_t *n = arg;
    assert_true(seq == *n + 1 && at_ms > 0 && text[0] != '\0');
    *n = seq;
    return SH_OK;
}

static sh_status audit(rig *r, uint64_t *n)
{
    sh_txn *txn = NULL;
    *n = 0;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    sh_status status = sh_coord_each_audit(txn, read_all, n, NULL);
    sh_txn_abort(&txn);
    return status;
}

static void test_the_audit_log_cannot_be_changed_unseen(void **state)
{
    (void)state;
    for (int how = 0; how < 3; how++) {
        rig *r = setup_fleet();
        for (unsigned node = 0; node < 3; node++) {
            rig_update u = rig_make(r, node, 1);
            offer(r, node, &u);
        }
        assert_true(rig_end_merge(r, NULL));
        assert_true(rig_end_gate(r, 3, 2.9));
        assert_true(rig_command(r, SH_COMMAND_PAUSE, 0, 0, 0));
        uint64_t n = 0;
        assert_int_equal(audit(r, &n), SH_OK);
        assert_true(n >= 4); /* genesis, merge, release, pause */
        uint8_t key[8], copy[512];
        sh_slice value;
        sh_txn *txn = NULL;
        sh_key_put_u64(key, how == 2 ? n : 2);
        assert_int_equal(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
        assert_int_equal(sh_txn_get(txn, SH_COORD_T_AUDIT, key, 8, &value), SH_OK);
        assert_true(value.n <= sizeof copy);
        memcpy(copy, value.data, value.n);
        if (how == 0) { /* a word is changed */
            copy[value.n - 1] ^= 1;
            assert_int_equal(sh_txn_put(txn, SH_COORD_T_AUDIT, key, 8, copy, value.n, NULL), SH_OK);
        } else { /* an entry is left out: in the middle, at the end */
            assert_int_equal(sh_txn_del(txn, SH_COORD_T_AUDIT, key, 8, NULL), SH_OK);
        }
        assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
        assert_int_equal(audit(r, &n), SH_ERR_CORRUPT);
        rig_release(r);
        free(r);
    }
}

static void test_a_damaged_state_is_refused(void **state)
{
    (void)state;
    rig *r = setup_fleet();
    sh_txn *txn = NULL;
    sh_slice value;
    uint8_t copy[1024];
    sh_error err = {0};
    sh_rng rng;
    sh_coord *coord = NULL;
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_rng_init(&rng, 1, 1, 1);
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_get(txn, SH_COORD_T_META, "state", 5, &value), SH_OK);
    assert_true(value.n <= sizeof copy);
    size_t n = value.n;
    memcpy(copy, value.data, n);
    for (size_t i = 0; i < n; i += 7) {
        copy[i] ^= 0x10;
        assert_int_equal(sh_txn_put(txn, SH_COORD_T_META, "state", 5, copy, n, NULL), SH_OK);
        assert_int_equal(sh_coord_create(&r->options, NULL, 0, &rng, txn, actions, &coord, &err),
                         SH_ERR_CORRUPT);
        copy[i] ^= 0x10;
    }
    sh_txn_abort(&txn);
    sh_coord_actions_clear(actions);
    free(actions);
    finish(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_crash_between_any_two_steps),
        cmocka_unit_test(test_the_round_over_lmdb),
        cmocka_unit_test(test_memory_that_runs_out),
        cmocka_unit_test(test_a_transfer_resumes_at_the_chunk),
        cmocka_unit_test(test_only_wanted_chunks_are_kept),
        cmocka_unit_test(test_waiting_updates_are_bounded),
        cmocka_unit_test(test_naming_anothers_chunks),
        cmocka_unit_test(test_a_release_is_served_in_pieces),
        cmocka_unit_test(test_alarms_and_windows_are_kept_and_bounded),
        cmocka_unit_test(test_no_order_leaves_more_windows),
        cmocka_unit_test(test_tombstones),
        cmocka_unit_test(test_random_and_mutated_messages),
        cmocka_unit_test(test_the_audit_log_cannot_be_changed_unseen),
        cmocka_unit_test(test_a_damaged_state_is_refused),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
