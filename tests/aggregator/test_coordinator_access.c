/* Who may speak, for whom, and how much: tokens, rotation, revocation, limits of a node. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/aggregator/rig.h"

#define EPOCH  77
#define NOW_MS UINT64_C(1790000000000)

static rig *setup(void)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    r->now_ms = NOW_MS;
    r->options.enrol_any = false;
    return r;
}

static void finish(rig *r)
{
    rig_check(r, true);
    rig_release(r);
    free(r);
}

static sh_bytes token_of(const char *text)
{
    return (sh_bytes){text, strlen(text)};
}

/* The answer to an ENROL with this token. */
static sh_msg_welcome enrol(rig *r, unsigned node, const char *token)
{
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = EPOCH,
                            .agent = "a",
                            .kernel = "k",
                            .device_class = "gateway",
                            .token = token_of(token)}};
    assert_true(rig_send(r, node, &msg));
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_WELCOME);
    return msg.welcome;
}

static bool command(rig *r, sh_coord_event event)
{
    uint32_t refused = r->notes[SH_CNOTE_COMMAND_REFUSED];
    event.kind = SH_COORD_COMMAND;
    assert_true(rig_step(r, &event));
    return r->notes[SH_CNOTE_COMMAND_REFUSED] == refused;
}

static bool add_token(rig *r, const char *token, uint64_t uses, uint64_t for_ms)
{
    return command(r, (sh_coord_event){.command = SH_COMMAND_TOKEN_ADD,
                                       .node = sh_blake2b(token, strlen(token)),
                                       .number = uses,
                                       .until_ms = r->now_ms + for_ms,
                                       .name = "spring"});
}

static bool remove_token(rig *r, const char *token)
{
    return command(r, (sh_coord_event){.command = SH_COMMAND_TOKEN_REMOVE,
                                       .node = sh_blake2b(token, strlen(token))});
}

static bool key_command(rig *r, sh_coord_command what, unsigned node)
{
    return command(r, (sh_coord_event){.command = what, .node = rig_key(node)});
}

static void expect_error(rig *r, unsigned node, const char *code)
{
    sh_msg msg;
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_string_equal(msg.error.code, code);
}

static bool was_dropped(rig *r, unsigned node)
{
    sh_hash key = rig_key(node);
    bool was = r->drops > 0 && sh_hash_equal(&r->dropped, &key);
    r->drops = 0;
    return was;
}

typedef struct {
    sh_hash key;
    sh_node_row row;
    bool found;
} find_node;

static sh_status see_node(void *arg, const sh_node_row *row)
{
    find_node *f = arg;
    if (sh_hash_equal(&row->key, &f->key)) {
        f->row = *row;
        f->found = true;
    }
    return SH_OK;
}

static bool get_node(rig *r, unsigned node, sh_node_row *row)
{
    find_node f = {.key = rig_key(node)};
    sh_txn *txn = NULL;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_each_node(txn, see_node, &f, NULL), SH_OK);
    sh_txn_abort(&txn);
    *row = f.row;
    return f.found;
}

/* What a fresh start tells the transport of a key: 1 it may connect, 0 it may not, -1 unknown. */
typedef struct {
    sh_hash key;
    int answer;
} find_key;

static sh_status see_key(void *arg, const sh_hash *key, bool allowed)
{
    find_key *f = arg;
    if (sh_hash_equal(key, &f->key)) {
        assert_int_equal(f->answer, -1); /* each key once */
        f->answer = allowed;
    }
    return SH_OK;
}

static int connects(rig *r, unsigned node)
{
    find_key f = {.key = rig_key(node), .answer = -1};
    sh_txn *txn = NULL;
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_READ, &txn, NULL), SH_OK);
    assert_int_equal(sh_coord_each_key(txn, see_key, &f, NULL), SH_OK);
    sh_txn_abort(&txn);
    if (f.answer >= 0)
        assert_int_equal(rig_may_connect(r, node), f.answer); /* what the actions said */
    return f.answer;
}

/* ---- tokens ---- */

static void test_a_token_enrols_as_often_as_it_says(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    assert_false(enrol(r, 0, "").accepted);
    assert_true(was_dropped(r, 0));
    assert_true(add_token(r, "two uses of this", 2, 60000));
    assert_int_equal(rig_status(r).tokens, 1);
    sh_msg_welcome no = enrol(r, 0, "another token");
    assert_false(no.accepted);
    assert_true(no.retry_after_ms > 0);
    assert_true(was_dropped(r, 0));
    assert_true(enrol(r, 0, "two uses of this").accepted);
    assert_false(was_dropped(r, 0));
    assert_int_equal(connects(r, 0), 1);
    assert_true(enrol(r, 0, "two uses of this").accepted); /* it is enrolled: no use is taken */
    assert_true(enrol(r, 0, "").accepted);
    rig_reboot(r);
    assert_int_equal(rig_status(r).tokens, 1);
    assert_true(enrol(r, 1, "two uses of this").accepted);
    assert_int_equal(rig_status(r).tokens, 0);
    assert_false(enrol(r, 2, "two uses of this").accepted);
    assert_int_equal(connects(r, 2), -1);
    sh_coord_status s = rig_status(r);
    assert_int_equal(s.enrolled, 2);
    assert_int_equal(s.token_enrolments, 2);
    assert_int_equal(s.tokens_refused, 2);
    sh_node_row row;
    assert_true(get_node(r, 0, &row));
    assert_string_equal(row.device_class, "gateway");
    assert_int_equal(rig_count(r, SH_COORD_T_ACCESS), 0);
    finish(r);
}

static void test_a_token_expires_and_can_be_withdrawn(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    assert_true(add_token(r, "short", 5, 1000));
    assert_true(add_token(r, "long", 5, 100000));
    assert_true(rig_status(r).tokens_until_ms > r->now_ms + 90000);
    r->now_ms += 1000;
    assert_false(enrol(r, 0, "short").accepted);
    assert_true(add_token(r, "third", 1, 1000)); /* clears away what is expired */
    assert_int_equal(rig_status(r).tokens, 2);
    assert_true(remove_token(r, "long"));
    assert_false(remove_token(r, "long"));
    assert_false(enrol(r, 0, "long").accepted);
    assert_false(add_token(r, "none", 0, 1000));
    assert_false(add_token(r, "over", 1, 0));
    assert_int_equal(rig_status(r).enrolled, 0);
    finish(r);
}

/* A token lets an unknown key in, not one that was revoked. */
static void test_a_token_does_not_bring_back(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    assert_true(add_token(r, "many", 100, 60000));
    assert_true(enrol(r, 0, "many").accepted);
    assert_true(key_command(r, SH_COMMAND_REVOKE, 0));
    assert_int_equal(connects(r, 0), 0);
    assert_false(enrol(r, 0, "many").accepted);
    assert_int_equal(rig_status(r).token_enrolments, 1);
    finish(r);
}

static void test_guessing_keeps_no_good_token_waiting(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    assert_true(add_token(r, "the right one", 10, 3600000));
    char guess[32];
    for (unsigned i = 0; i < 150; i++) {
        (void)snprintf(guess, sizeof guess, "guess %u", i);
        assert_false(enrol(r, i, guess).accepted);
    }
    assert_int_equal(rig_status(r).tokens_refused, 100);
    assert_true(enrol(r, 151, "the right one").accepted);
    assert_int_equal(rig_status(r).tokens_refused, 100);
    r->now_ms += 60000;
    assert_false(enrol(r, 0, "guess").accepted);
    assert_int_equal(rig_status(r).tokens_refused, 101);
    finish(r);
}

/* Unknown, revoked and flooding keys leave the rate of check-ins to the others. */
static void test_who_may_not_speak_takes_nothing_of_the_rate(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.checkins_per_s = 2;
    r->options.limit_messages_s = 1;
    r->options.limit_burst_s = 1;
    rig_boot(r);
    assert_true(add_token(r, "a token", 5, 60000));
    for (unsigned node = 0; node < 3; node++)
        assert_true(key_command(r, SH_COMMAND_ENROL, node));
    assert_true(key_command(r, SH_COMMAND_REVOKE, 2));
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}}, msg;
    for (unsigned i = 0; i < 20; i++) {
        assert_false(enrol(r, 9, "a guess").accepted);
        assert_false(enrol(r, 9, "").accepted);
        assert_false(enrol(r, 2, "").accepted);
        assert_true(rig_send(r, 2, &checkin));
        expect_error(r, 2, "auth");
    }
    /* These are over the rate, then over the node's own limit: those take nothing of the rate. */
    for (unsigned i = 0; i < 150; i++) {
        assert_true(rig_send(r, 0, &checkin));
        rig_drop_mail(r);
    }
    uint64_t told = rig_status(r).told_later;
    assert_true(rig_status(r).limited > 0);
    r->now_ms += 2000; /* two are there again: the node that was in its slot had taken more */
    for (unsigned i = 0; i < 20; i++) {
        assert_false(enrol(r, 9, "a guess").accepted);
        assert_true(rig_send(r, 0, &checkin));
        rig_drop_mail(r);
    }
    assert_true(enrol(r, 10, "a token").accepted);
    assert_true(rig_send(r, 1, &checkin));
    assert_true(rig_take(r, 1, &msg));
    assert_int_equal(msg.type, SH_MSG_PLAN);
    assert_int_equal(rig_status(r).told_later, told);
    finish(r);
}

static void test_strangers_may_only_enrol(void **state)
{
    (void)state;
    rig *r = setup();
    rig_boot(r);
    assert_true(add_token(r, "a token", 1, 60000));
    sh_hash hash = sh_blake2b("chunk", 5);
    sh_msg all[] = {
        {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}},
        {.type = SH_MSG_ITEM,
         .item = {.epoch = EPOCH,
                  .cls = SH_CLASS_WINDOW,
                  .seq = 1,
                  .last_seq = 1,
                  .kind = SH_ITEM_WINDOW,
                  .payload = {"window", 6}}},
        {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = hash.b}},
        {.type = SH_MSG_CHUNK, .chunk = {.hash = hash, .bytes = {"chunk", 5}}},
        {.type = SH_MSG_ROTATE, .rotate = {.key = hash, .token = {"0123456789abcdef", 16}}},
        {.type = SH_MSG_ERROR, .error = {.code = "auth", .text = "no"}},
    };
    for (size_t i = 0; i < SH_COUNT(all); i++) {
        assert_true(rig_send(r, 9, &all[i]));
        expect_error(r, 9, "auth");
        assert_true(was_dropped(r, 9));
    }
    assert_true(rig_send_bytes(r, 9, "junk", 4));
    expect_error(r, 9, "invalid");
    assert_true(was_dropped(r, 9));
    assert_int_equal(rig_count(r, SH_COORD_T_NODE), 0);
    assert_int_equal(rig_count(r, SH_COORD_T_EPOCH), 0);
    assert_int_equal(rig_count(r, SH_COORD_T_INBOX), 0);
    finish(r);
}

/* ---- rotation ---- */

#define ROTATION "0123456789abcdef of a node"

static bool rotate(rig *r, unsigned from, unsigned to)
{
    sh_msg msg = {.type = SH_MSG_ROTATE,
                  .rotate = {.key = rig_key(to), .token = token_of(ROTATION)}};
    assert_true(rig_send(r, from, &msg));
    assert_true(rig_take(r, from, &msg));
    if (msg.type == SH_MSG_ROTATE) {
        sh_hash key = rig_key(to);
        assert_true(sh_hash_equal(&msg.rotate.key, &key));
        assert_int_equal(msg.rotate.token.n, 0);
        return true;
    }
    assert_int_equal(msg.type, SH_MSG_ERROR);
    return false;
}

static rig *setup_two(void) /* nodes 0 and 1 enrolled, rounds on */
{
    rig *r = setup();
    rig_boot(r);
    for (unsigned node = 0; node < 2; node++) {
        assert_true(key_command(r, SH_COMMAND_ENROL, node));
        assert_true(enrol(r, node, "").accepted);
    }
    return r;
}

static bool speaks(rig *r, unsigned node)
{
    sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    assert_true(rig_send(r, node, &msg));
    assert_true(rig_take(r, node, &msg));
    return msg.type == SH_MSG_PLAN;
}

static sh_msg_ack window(rig *r, unsigned node, uint64_t seq)
{
    sh_msg_item item = {.epoch = EPOCH,
                        .cls = SH_CLASS_WINDOW,
                        .seq = seq,
                        .last_seq = seq,
                        .kind = SH_ITEM_WINDOW,
                        .payload = {"window", 6}};
    sh_msg msg;
    assert_true(rig_item(r, node, &item));
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    return msg.ack;
}

static void test_a_node_rotates_its_key(void **state)
{
    (void)state;
    rig *r = setup_two();
    assert_int_equal(window(r, 0, 1).high_water, 1);
    assert_true(rotate(r, 0, 10));
    assert_int_equal(connects(r, 10), 1); /* to send ENROL */
    assert_int_equal(connects(r, 0), 1);
    assert_false(speaks(r, 10));
    assert_true(was_dropped(r, 10));
    assert_false(enrol(r, 10, "").accepted);
    assert_false(enrol(r, 10, "0123456789abcdef of another").accepted);
    assert_true(speaks(r, 0));
    rig_reboot(r);
    assert_true(rotate(r, 0, 10)); /* said again: the answer was lost */
    assert_true(enrol(r, 10, ROTATION).accepted);
    assert_int_equal(r->notes[SH_CNOTE_ROTATED], 1);
    assert_int_equal(connects(r, 10), 1);
    assert_int_equal(connects(r, 0), 0);
    /* The same node: what the old key sent is not taken again, and what it had goes on. */
    assert_int_equal(window(r, 10, 1).high_water, 1);
    assert_int_equal(window(r, 10, 2).high_water, 2);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 2);
    assert_int_equal(rig_count(r, SH_COORD_T_NODE), 2);
    assert_int_equal(rig_status(r).enrolled, 2);
    assert_true(speaks(r, 10));
    assert_true(enrol(r, 10, ROTATION).accepted); /* WELCOME was lost */
    assert_int_equal(rig_status(r).rotations, 1);
    /* The old key is nobody's. */
    assert_false(speaks(r, 0));
    assert_true(was_dropped(r, 0));
    assert_false(enrol(r, 0, "").accepted);
    assert_true(key_command(r, SH_COMMAND_ENROL, 0)); /* the node, which is enrolled as it is */
    assert_int_equal(connects(r, 0), 0);
    assert_int_equal(rig_status(r).enrolled, 2);
    rig_reboot(r);
    assert_int_equal(connects(r, 0), 0);
    sh_node_row row;
    sh_hash key = rig_key(10);
    assert_true(get_node(r, 0, &row));
    assert_true(sh_hash_equal(&row.current_key, &key));
    assert_int_equal(row.n_rotations, 1);
    /* And once more, from the new one. */
    assert_true(rotate(r, 10, 11));
    assert_true(enrol(r, 11, ROTATION).accepted);
    assert_int_equal(connects(r, 10), 0);
    assert_int_equal(connects(r, 11), 1);
    assert_int_equal(window(r, 11, 3).high_water, 3);
    rig_update u = rig_make(r, 11, 1);
    u.epoch = EPOCH;
    assert_true(rig_offer(r, 11, &u)); /* chunks are asked for, and come, under the new key */
    bool found;
    (void)rig_row(r, 0, EPOCH, 1, &found);
    assert_true(found);
    finish(r);
}

/* A node can name only keys that are nobody's, and only its own rotation can complete. */
static void test_a_node_cannot_rotate_to_anothers_key(void **state)
{
    (void)state;
    rig *r = setup_two();
    assert_true(key_command(r, SH_COMMAND_ENROL, 5));
    assert_true(key_command(r, SH_COMMAND_REVOKE, 5));
    assert_false(rotate(r, 0, 0)); /* itself */
    assert_false(rotate(r, 0, 1)); /* enrolled */
    assert_false(rotate(r, 0, 5)); /* revoked */
    assert_true(rotate(r, 0, 10));
    assert_false(rotate(r, 1, 10)); /* pending for another */
    assert_true(rotate(r, 0, 11));  /* changed its mind */
    assert_int_equal(connects(r, 10), -1);
    assert_false(rig_may_connect(r, 10));
    assert_false(enrol(r, 10, ROTATION).accepted);
    assert_true(rotate(r, 1, 10));
    assert_true(enrol(r, 10, ROTATION).accepted);
    assert_false(rotate(r, 0, 10)); /* node 1's now */
    assert_false(rotate(r, 0, 1));  /* which node 1 had */
    sh_msg msg = {.type = SH_MSG_ROTATE,
                  .rotate = {.key = rig_key(12), .token = {"0123456789abcde", 15}}};
    assert_true(rig_send(r, 0, &msg));
    expect_error(r, 0, "invalid");
    sh_node_row row;
    assert_true(get_node(r, 1, &row));
    sh_hash key = rig_key(10);
    assert_true(sh_hash_equal(&row.current_key, &key));
    assert_true(get_node(r, 0, &row));
    key = rig_key(0);
    assert_true(sh_hash_equal(&row.current_key, &key));
    finish(r);
}

/* To name a key is no proof of having it. */
static void test_a_claim_gives_way_to_the_owner(void **state)
{
    (void)state;
    rig *r = setup_two();
    assert_true(add_token(r, "for the device", 1, 60000));
    assert_true(rotate(r, 0, 10)); /* node 0 has seen a device's label */
    assert_true(enrol(r, 10, "for the device").accepted);
    assert_int_equal(rig_status(r).enrolled, 3);
    assert_int_equal(rig_status(r).rotations, 0);
    assert_true(rotate(r, 0, 11));
    assert_true(key_command(r, SH_COMMAND_ENROL, 11));
    assert_true(enrol(r, 11, "").accepted);
    assert_int_equal(rig_status(r).enrolled, 4);
    sh_node_row row;
    assert_true(get_node(r, 11, &row));
    assert_true(rotate(r, 0, 12)); /* its own goes on */
    assert_true(enrol(r, 12, ROTATION).accepted);
    finish(r);
}

/* ---- revocation ---- */

/* Whatever it sends next, under whichever of its keys. */
static void expect_silence(rig *r, unsigned node, uint64_t windows)
{
    sh_hash hash = sh_blake2b("chunk", 5);
    sh_msg all[] = {
        {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}},
        {.type = SH_MSG_ITEM,
         .item = {.epoch = EPOCH,
                  .cls = SH_CLASS_WINDOW,
                  .seq = 50,
                  .last_seq = 50,
                  .kind = SH_ITEM_WINDOW,
                  .payload = {"window", 6}}},
        {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = hash.b}},
        {.type = SH_MSG_CHUNK, .chunk = {.hash = hash, .bytes = {"chunk", 5}}},
        {.type = SH_MSG_ROTATE, .rotate = {.key = rig_key(60), .token = token_of(ROTATION)}},
    };
    for (size_t i = 0; i < SH_COUNT(all); i++) {
        assert_true(rig_send(r, node, &all[i]));
        expect_error(r, node, "auth");
        assert_true(was_dropped(r, node));
    }
    assert_false(enrol(r, node, "").accepted);
    assert_false(enrol(r, node, ROTATION).accepted);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), windows);
    assert_int_not_equal(connects(r, node), 1);
}

static void test_revocation_holds_for_all_keys(void **state)
{
    (void)state;
    rig *r = setup_two();
    (void)window(r, 0, 1);
    assert_true(rotate(r, 0, 10));
    assert_true(enrol(r, 10, ROTATION).accepted);
    assert_true(rotate(r, 10, 11));                    /* pending */
    assert_true(key_command(r, SH_COMMAND_REVOKE, 0)); /* by its first key */
    for (unsigned i = 0; i < 3; i++)
        expect_silence(r, (unsigned[]){0, 10, 11}[i], 1);
    assert_int_equal(rig_status(r).enrolled, 1);
    rig_reboot(r);
    expect_silence(r, 10, 1);
    assert_true(speaks(r, 1));
    /* The operator brings it back, by its first key; it comes with the one that it has. */
    assert_true(key_command(r, SH_COMMAND_ENROL, 0));
    assert_true(speaks(r, 10));
    assert_false(speaks(r, 0));
    assert_int_equal(connects(r, 10), 1);
    assert_int_equal(connects(r, 11), -1);
    assert_true(rotate(r, 10, 11));
    assert_true(key_command(r, SH_COMMAND_REVOKE, 11)); /* by the one that it is about to have */
    expect_silence(r, 10, 1);
    assert_false(key_command(r, SH_COMMAND_REVOKE, 10)); /* it is, already */
    finish(r);
}

/* Chunks of an update that was under way come to nothing. */
static void test_revocation_in_the_middle_of_an_update(void **state)
{
    (void)state;
    rig *r = setup_two();
    static uint8_t bytes[RIG_UPDATE_BYTES];
    rig_fill(bytes, sizeof bytes, 3);
    sh_blob blob;
    uint8_t *hashes = NULL;
    assert_int_equal(sh_blob_describe(bytes, sizeof bytes, &blob, &hashes, NULL), SH_OK);
    rig_update u = rig_make(r, 0, 1);
    sh_update_meta meta = {.blob = blob,
                           .round = 1,
                           .base_version = u.base_version,
                           .base_sha256 = u.base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = 10,
                           .tokens_seen = 10};
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_update_meta_encode(&meta, &payload, NULL), SH_OK);
    sh_msg_item item = {.epoch = EPOCH,
                        .cls = SH_CLASS_UPDATE,
                        .seq = 1,
                        .last_seq = 1,
                        .kind = SH_ITEM_UPDATE,
                        .payload = {payload.data, payload.len}};
    sh_msg msg;
    assert_true(rig_item(r, 0, &item));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_WANT);
    uint64_t chunks = rig_count(r, SH_COORD_T_CHUNK);
    sh_msg chunk = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {bytes, SH_CHUNK_BYTES}}};
    chunk.chunk.hash = sh_blake2b(bytes, SH_CHUNK_BYTES);
    /* Another node cannot put what is another's to send, nor have it. */
    assert_true(rig_send(r, 1, &chunk));
    assert_false(rig_take(r, 1, &msg));
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks);
    assert_true(rig_send(r, 0, &chunk));
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks + 1);
    sh_msg want = {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = chunk.chunk.hash.b}};
    assert_true(rig_send(r, 1, &want));
    expect_error(r, 1, "not-found");
    assert_true(key_command(r, SH_COMMAND_REVOKE, 0));
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks);
    chunk.chunk.bytes = (sh_bytes){bytes + SH_CHUNK_BYTES, sizeof bytes - SH_CHUNK_BYTES};
    chunk.chunk.hash = sh_blake2b(chunk.chunk.bytes.data, chunk.chunk.bytes.n);
    assert_true(rig_send(r, 0, &chunk));
    expect_error(r, 0, "auth");
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks);
    sh_buf_release(&payload);
    free(hashes);
    finish(r);
}

/* ---- a node acts for itself only ---- */

static void test_an_epoch_is_its_nodes_own(void **state)
{
    (void)state;
    rig *r = setup_two();
    assert_int_equal(window(r, 0, 1).high_water, 1);
    assert_int_equal(window(r, 0, 2).high_water, 2);
    /* Node 1 uses node 0's epoch: that is another epoch of its own, with sequences of its own. */
    assert_int_equal(window(r, 1, 2).high_water, 0);
    assert_int_equal(window(r, 0, 3).high_water, 3);
    sh_msg_item tombstone = {.epoch = EPOCH,
                             .cls = SH_CLASS_WINDOW,
                             .seq = 1,
                             .last_seq = 100,
                             .kind = SH_ITEM_TOMBSTONE};
    sh_msg msg;
    assert_true(rig_item(r, 1, &tombstone));
    assert_true(rig_take(r, 1, &msg));
    assert_int_equal(msg.ack.high_water, 100);
    assert_int_equal(window(r, 0, 4).high_water, 4); /* not dropped for node 0 */
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 5);
    finish(r);
}

/* ---- limits ---- */

static void test_limits_of_a_node(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.limit_messages_s = 10;
    r->options.limit_burst_s = 20; /* 200 at once */
    rig_boot(r);
    for (unsigned node = 0; node < 2; node++)
        assert_true(key_command(r, SH_COMMAND_ENROL, node));
    unsigned answered = 0, told = 0;
    sh_msg msg, checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    uint64_t wait_ms = 0;
    for (unsigned i = 0; i < 400; i++) { /* 10 ms each: ten times what it may */
        assert_true(rig_send(r, 0, &checkin));
        while (rig_take(r, 0, &msg)) {
            answered += msg.type == SH_MSG_PLAN;
            if (msg.type == SH_MSG_ERROR) {
                assert_string_equal(msg.error.code, "limit");
                assert_true(msg.error.retry_after_ms > wait_ms); /* ever deeper */
                wait_ms = msg.error.retry_after_ms;
                told++;
            }
        }
    }
    assert_in_range(answered, 215, 225); /* 200, and 10 a second for 2 s */
    assert_in_range(told, 1, 8);         /* not each message is answered */
    assert_in_range(wait_ms, 1000, 20000);
    assert_int_equal(rig_status(r).limited, 400 - answered);
    assert_int_equal(r->drops, 0);
    assert_true(speaks(r, 1)); /* another node does not notice */
    /* It waits until what it sent too much is made good for: it is heard again. */
    r->now_ms += 25000;
    assert_true(speaks(r, 0));
    /* It goes on regardless: disconnected, and then it may come again. */
    for (unsigned i = 0; i < 2000 && r->drops == 0; i++) {
        assert_true(rig_send(r, 0, &checkin));
        rig_drop_mail(r);
    }
    assert_true(was_dropped(r, 0));
    assert_int_equal(rig_status(r).disconnected, 1);
    assert_int_equal(r->notes[SH_CNOTE_LIMITED], 1);
    assert_int_equal(connects(r, 0), 1);
    r->now_ms += 1000;
    assert_true(speaks(r, 0));
    finish(r);
}

static void test_byte_limits_of_a_node(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.limit_bytes_s = 100000;
    r->options.limit_burst_s = 1; /* the least that a bucket holds is 8 MiB */
    rig_boot(r);
    assert_true(key_command(r, SH_COMMAND_ENROL, 0));
    static uint8_t bytes[SH_CHUNK_BYTES];
    sh_msg chunk = {
        .type = SH_MSG_CHUNK,
        .chunk = {.hash = sh_blake2b(bytes, sizeof bytes), .bytes = {bytes, sizeof bytes}}};
    unsigned sent = 0;
    for (; rig_status(r).limited == 0; sent++)
        assert_true(rig_send(r, 0, &chunk));
    assert_in_range(sent, 128, 132);
    expect_error(r, 0, "limit");
    sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    assert_true(rig_send(r, 0, &msg)); /* over it, small as it is */
    assert_int_equal(rig_status(r).limited, 2);
    assert_false(rig_take(r, 0, &msg));
    r->now_ms += 10000;
    assert_true(speaks(r, 0));
    /* A clock that jumps back does not shut anyone out for long. */
    r->now_ms -= 5000000;
    assert_true(speaks(r, 0));
    r->now_ms += 60000;
    assert_true(speaks(r, 0));
    finish(r);
}

/* More keys than the table has room for: each has its limit while it is heard, and none another's.
 */
static void test_limits_of_many_nodes(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.enrol_any = true;
    r->options.limit_messages_s = 1;
    r->options.limit_burst_s = 100;
    rig_boot(r);
    sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    assert_int_equal(sh_msg_encode(&msg, &bytes, NULL), SH_OK);
    for (uint32_t i = 0; i < 40000; i++) {
        sh_coord_event e = {.kind = SH_COORD_MESSAGE, .message = {bytes.data, bytes.len}};
        memcpy(e.node.b, &i, sizeof i);
        memcpy(e.node.b + 28, &(uint32_t){i * 2654435761u}, 4);
        assert_true(rig_step(r, &e));
        rig_drop_mail(r);
    }
    assert_int_equal(rig_status(r).limited, 0);
    sh_buf_release(&bytes);
    finish(r);
}

/* ---- time ---- */

static void test_plans_carry_a_signed_time(void **state)
{
    (void)state;
    rig *r = setup_two();
    uint64_t last = 0;
    for (int i = 0; i < 5; i++) {
        sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
        assert_true(rig_send(r, 0, &msg));
        assert_true(rig_take(r, 0, &msg));
        uint64_t at_ms = 0;
        assert_int_equal(sh_time_verify(msg.plan.time, &r->options.release_pk, &at_ms, NULL),
                         SH_OK);
        assert_true(at_ms <= r->now_ms && at_ms + 60000 > r->now_ms);
        assert_true(i == 0 || (at_ms == last) == (i % 2 == 1)); /* signed once in a minute */
        last = at_ms;
        r->now_ms += 40000;
    }
    r->now_ms -= 1000000; /* the aggregator's clock was set back: so is what it says */
    sh_msg msg = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    assert_true(rig_send(r, 0, &msg));
    assert_true(rig_take(r, 0, &msg));
    uint64_t at_ms = 0;
    assert_int_equal(sh_time_verify(msg.plan.time, &r->options.release_pk, &at_ms, NULL), SH_OK);
    assert_true(at_ms == r->now_ms);
    finish(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_token_enrols_as_often_as_it_says),
        cmocka_unit_test(test_a_token_expires_and_can_be_withdrawn),
        cmocka_unit_test(test_a_token_does_not_bring_back),
        cmocka_unit_test(test_guessing_keeps_no_good_token_waiting),
        cmocka_unit_test(test_who_may_not_speak_takes_nothing_of_the_rate),
        cmocka_unit_test(test_strangers_may_only_enrol),
        cmocka_unit_test(test_a_node_rotates_its_key),
        cmocka_unit_test(test_a_node_cannot_rotate_to_anothers_key),
        cmocka_unit_test(test_a_claim_gives_way_to_the_owner),
        cmocka_unit_test(test_revocation_holds_for_all_keys),
        cmocka_unit_test(test_revocation_in_the_middle_of_an_update),
        cmocka_unit_test(test_an_epoch_is_its_nodes_own),
        cmocka_unit_test(test_limits_of_a_node),
        cmocka_unit_test(test_byte_limits_of_a_node),
        cmocka_unit_test(test_limits_of_many_nodes),
        cmocka_unit_test(test_plans_carry_a_signed_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
