/* What the coordinator takes in at a time, and which chunks are alive. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/aggregator/rig.h"

#define EPOCH      77
#define FLEET      100
#define RATE       10
#define SLOT_MS    133 /* 1000 / (0.75 * RATE), rounded down */
#define SILENCE_MS 60000
#define STEP_MS    10  /* that the rig's clock goes on by at each step */
#define KEYS       255 /* that the rig has */

#define KEPT 4u /* windows of a node */

static rig *setup(void)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    return r;
}

static void finish(rig *r)
{
    rig_check(r, true);
    rig_release(r);
    free(r);
}

/* True: it was welcomed. Else *retry_ms is what it was told; 0: nothing. */
static bool enrol(rig *r, unsigned node, uint64_t *retry_ms)
{
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = EPOCH, .agent = "test", .kernel = "none", .cores = 1}};
    r->now_ms -= STEP_MS; /* all at once */
    assert_true(rig_send(r, node, &msg));
    *retry_ms = 0;
    if (!rig_take(r, node, &msg))
        return false;
    if (msg.type == SH_MSG_WELCOME)
        return true;
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_string_equal(msg.error.code, "limit");
    *retry_ms = msg.error.retry_after_ms;
    return false;
}

static void test_a_return_of_all_is_spread(void **state)
{
    (void)state;
    rig *r = setup();
    uint64_t slots[FLEET] = {0}, again = 0;
    r->options.checkins_per_s = RATE;
    rig_boot(r);
    uint64_t begin = r->now_ms;
    for (unsigned node = 0; node < FLEET; node++)
        assert_int_equal(enrol(r, node, &slots[node]), node < RATE);
    for (unsigned node = RATE + 1; node < FLEET; node++)
        assert_in_range(slots[node] - slots[node - 1], SLOT_MS, SLOT_MS + 1);
    assert_int_equal(rig_status(r).told_later, FLEET - RATE);
    /* Who does not wait is answered once a second, with the same slot. */
    assert_false(enrol(r, FLEET - 1, &again));
    assert_int_equal(again, 0);
    r->now_ms = begin + 1000;
    assert_false(enrol(r, FLEET - 1, &again));
    assert_int_equal(again, slots[FLEET - 1] - 1000);
    /* Who does is welcome, though newcomers take every place that they find. */
    for (unsigned node = RATE; node < FLEET; node++) {
        uint64_t none;
        r->now_ms = begin + slots[node];
        for (unsigned k = 0; k < 3; k++)
            (void)enrol(r, FLEET + (3 * node + k) % (KEYS - FLEET), &none);
        assert_true(enrol(r, node, &none));
        rig_drop_mail(r);
    }
    finish(r);
}

static void test_a_clock_set_back_silences_nobody(void **state)
{
    (void)state;
    rig *r = setup();
    uint64_t slot = 0;
    r->options.checkins_per_s = 1;
    rig_boot(r);
    r->now_ms += 86400000;
    assert_true(enrol(r, 0, &slot));
    assert_false(enrol(r, 1, &slot));
    r->now_ms -= 86400000; /* a day back: its slot is not to be waited for */
    assert_false(enrol(r, 1, &slot));
    assert_in_range(slot, 1, 600000);
    r->now_ms += slot;
    assert_true(enrol(r, 1, &slot));
    finish(r);
}

static void test_a_larger_fleet_returns_later(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.checkin_ms = 1000;
    r->options.load_share = 0.5;
    rig_boot(r);
    for (unsigned node = 0; node < FLEET; node++)
        rig_enrol(r, node);
    r->options.checkins_per_s = RATE;
    rig_reboot(r);
    assert_int_equal(rig_status(r).return_ms, 1000); /* nobody has checked in yet */
    for (unsigned turn = 0; turn < 3; turn++)
        for (unsigned node = 0; node < FLEET; node++) {
            r->now_ms += 1000;
            rig_plan plan = rig_checkin(r, node, 1, false);
            uint64_t most = FLEET * 1000 / (RATE / 2);
            if (turn > 0)
                assert_in_range(plan.return_after_ms, most * 3 / 4, most * 5 / 4);
        }
    assert_int_equal(rig_status(r).return_ms, FLEET * 1000 / (RATE / 2));
    rig_reboot(r);
    assert_int_equal(rig_status(r).return_ms, FLEET * 1000 / (RATE / 2));
    /* Those who are gone are forgotten: after two periods one node has the fleet's rate. */
    for (unsigned turn = 0; turn < 3; turn++) {
        r->now_ms += 86400000;
        (void)rig_checkin(r, 0, 1, false);
    }
    assert_int_equal(rig_status(r).return_ms, 1000);
    finish(r);
}

/* ---- updates ---- */

static sh_msg_type send_update(rig *r, unsigned node, const rig_update *u, sh_msg *answer)
{
    static uint8_t bytes[RIG_UPDATE_BYTES];
    sh_update_meta meta = {.base_version = u->base_version,
                           .base_sha256 = u->base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = u->samples};
    uint8_t *hashes = NULL;
    sh_buf payload;
    rig_fill(bytes, sizeof bytes, u->content);
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_blob_describe(bytes, sizeof bytes, &meta.blob, &hashes, NULL), SH_OK);
    assert_int_equal(sh_update_meta_encode(&meta, &payload, NULL), SH_OK);
    sh_msg_item item = {.epoch = u->epoch,
                        .cls = SH_CLASS_UPDATE,
                        .seq = u->seq,
                        .last_seq = u->seq,
                        .kind = SH_ITEM_UPDATE,
                        .payload = {payload.data, payload.len}};
    r->now_ms -= STEP_MS;
    assert_true(rig_item(r, node, &item));
    assert_true(rig_take(r, node, answer));
    sh_buf_release(&payload);
    free(hashes);
    return answer->type;
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

static void test_what_is_asked_for_is_bounded(void **state)
{
    (void)state;
    rig *r = setup();
    rig_update u[5];
    sh_msg msg;
    r->options.asked_bytes_max = 3 * RIG_UPDATE_BYTES;
    r->options.buffer = 100;
    rig_boot(r);
    for (unsigned node = 0; node < 5; node++) {
        rig_enrol(r, node);
        u[node] = rig_make(r, node, 1);
    }
    for (unsigned node = 0; node < 3; node++)
        assert_int_equal(send_update(r, node, &u[node], &msg), SH_MSG_WANT);
    assert_int_equal(rig_status(r).asked_bytes, 3 * RIG_UPDATE_BYTES);
    assert_int_equal(send_update(r, 3, &u[3], &msg), SH_MSG_ERROR);
    assert_string_equal(msg.error.code, "limit");
    uint64_t first = msg.error.retry_after_ms;
    assert_int_equal(send_update(r, 4, &u[4], &msg), SH_MSG_ERROR);
    assert_true(msg.error.retry_after_ms > first);
    assert_int_equal(rig_status(r).waiting, 3);
    /* One is whole: the next finds its place. One that asks again keeps its own. */
    send_chunk(r, 0, u[0].content, 0);
    send_chunk(r, 0, u[0].content, 1);
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    r->now_ms += first;
    assert_int_equal(send_update(r, 3, &u[3], &msg), SH_MSG_WANT);
    assert_int_equal(send_update(r, 1, &u[1], &msg), SH_MSG_WANT);
    assert_int_equal(rig_status(r).asked_bytes, 3 * RIG_UPDATE_BYTES);
    /* A node that is gone gives its place back at once, one that is silent after a while. */
    sh_coord_event gone = {.kind = SH_COORD_GONE, .node = rig_key(1)};
    assert_true(rig_step(r, &gone));
    assert_int_equal(rig_status(r).asked_bytes, 2 * RIG_UPDATE_BYTES);
    r->now_ms += SILENCE_MS;
    assert_int_equal(send_update(r, 4, &u[4], &msg), SH_MSG_WANT);
    rig_enrol(r, 5);
    rig_update sixth = rig_make(r, 5, 1), seventh = rig_make(r, 6, 1);
    assert_int_equal(send_update(r, 5, &sixth, &msg), SH_MSG_WANT);
    rig_enrol(r, 6);
    assert_int_equal(send_update(r, 6, &seventh, &msg), SH_MSG_WANT); /* 2 and 3 were silent */
    assert_true(rig_status(r).asked_bytes <= 3 * RIG_UPDATE_BYTES);
    /* Nothing of it outlives a restart, and who lost its place still gets in. */
    rig_reboot(r);
    assert_int_equal(rig_status(r).asked_bytes, 0);
    for (unsigned node = 1; node < 5; node++)
        assert_true(rig_offer(r, node, &u[node]));
    assert_int_equal(rig_status(r).updates_in, 5);
    finish(r);
}

static void test_two_nodes_with_the_same_chunks(void **state)
{
    (void)state;
    rig *r = setup();
    sh_msg msg;
    r->options.buffer = 100;
    rig_boot(r);
    rig_enrol(r, 0);
    rig_enrol(r, 1);
    rig_update a = rig_make(r, 0, 1), b = rig_make(r, 1, 1);
    b.content = a.content;
    assert_int_equal(send_update(r, 0, &a, &msg), SH_MSG_WANT);
    assert_int_equal(send_update(r, 1, &b, &msg), SH_MSG_WANT);
    for (size_t i = 0; i < 2; i++) {
        send_chunk(r, 0, a.content, i);
        send_chunk(r, 1, a.content, i);
    }
    for (unsigned node = 0; node < 2; node++) {
        assert_true(rig_take(r, node, &msg));
        assert_int_equal(msg.type, SH_MSG_ACK);
    }
    assert_int_equal(rig_status(r).waiting, 0);
    assert_int_equal(rig_status(r).chunk_names, 3 + 2);
    finish(r);
}

static void test_served_bytes_have_a_rate(void **state)
{
    (void)state;
    rig *r = setup();
    uint8_t names[2 * sizeof(sh_hash)];
    sh_msg msg;
    r->options.served_bytes_per_s = 2 * SH_CHUNK_BYTES;
    rig_boot(r);
    rig_enrol(r, 0);
    rig_enrol(r, 1);
    for (size_t i = 0; i < 2; i++) {
        sh_hash name = sh_blake2b(r->genesis + i * SH_CHUNK_BYTES, SH_CHUNK_BYTES);
        memcpy(names + i * sizeof name, name.b, sizeof name);
    }
    sh_msg want = {.type = SH_MSG_WANT, .want = {.n = 2, .hashes = names}};
    assert_true(rig_send(r, 0, &want));
    for (size_t i = 0; i < 2; i++) {
        assert_true(rig_take(r, 0, &msg));
        assert_int_equal(msg.type, SH_MSG_CHUNK);
    }
    assert_true(rig_send(r, 1, &want));
    assert_true(rig_take(r, 1, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_string_equal(msg.error.code, "limit");
    r->now_ms += msg.error.retry_after_ms;
    assert_true(rig_send(r, 1, &want));
    assert_true(rig_take(r, 1, &msg));
    assert_int_equal(msg.type, SH_MSG_CHUNK);
    finish(r);
}

static void test_items_have_a_rate(void **state)
{
    (void)state;
    rig *r = setup();
    unsigned acked = 0, later = 0;
    sh_msg msg;
    r->options.items_per_s = RATE;
    rig_boot(r);
    for (unsigned node = 0; node < 2 * RATE; node++)
        rig_enrol(r, node);
    for (unsigned node = 0; node < 2 * RATE; node++) {
        sh_msg_item item = {.epoch = EPOCH,
                            .cls = SH_CLASS_WINDOW,
                            .seq = 1,
                            .last_seq = 1,
                            .kind = SH_ITEM_WINDOW,
                            .payload = {"window", 6}};
        r->now_ms -= STEP_MS;
        assert_true(rig_item(r, node, &item));
        assert_true(rig_take(r, node, &msg));
        acked += msg.type == SH_MSG_ACK;
        later += msg.type == SH_MSG_ERROR;
    }
    assert_int_equal(acked, RATE);
    assert_int_equal(later, RATE);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), RATE); /* what was put off is not there */
    finish(r);
}

static void window(rig *r, uint64_t epoch, uint64_t seq, uint64_t last, sh_item_kind kind)
{
    sh_msg msg;
    sh_msg_item item = {.epoch = epoch,
                        .cls = SH_CLASS_WINDOW,
                        .seq = seq,
                        .last_seq = last,
                        .kind = (uint8_t)kind,
                        .payload = {"window", 6}};
    if (kind == SH_ITEM_TOMBSTONE)
        item.payload = (sh_bytes){0};
    assert_true(rig_item(r, 0, &item));
    assert_true(rig_take(r, 0, &msg));
    assert_int_equal(msg.type, SH_MSG_ACK);
    assert_int_equal(msg.ack.high_water, last);
}

/* The last ones of each (node, epoch), also where the node had dropped some in between. */
static void test_of_a_node_the_last_items_are_kept(void **state)
{
    (void)state;
    rig *r = setup();
    r->options.node_items_max = KEPT;
    rig_boot(r);
    rig_enrol(r, 0);
    for (uint64_t seq = 1; seq <= KEPT; seq++)
        window(r, EPOCH, seq, seq, SH_ITEM_WINDOW);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), KEPT); /* at its limit, none is gone */
    window(r, EPOCH, KEPT + 1, KEPT + 1, SH_ITEM_WINDOW);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), KEPT);
    window(r, EPOCH + 1, 1, 1, SH_ITEM_WINDOW); /* another epoch has its own */
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), KEPT + 1);
    window(r, EPOCH, KEPT + 2, 3 * KEPT, SH_ITEM_TOMBSTONE);
    window(r, EPOCH, 3 * KEPT + 1, 3 * KEPT + 1, SH_ITEM_WINDOW);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), 1 + 1);
    for (uint64_t seq = 3 * KEPT + 2; seq <= 6 * KEPT; seq++)
        window(r, EPOCH, seq, seq, SH_ITEM_WINDOW);
    assert_int_equal(rig_count(r, SH_COORD_T_WINDOW), KEPT + 1);
    finish(r);
}

/* After any step the counts are those that a new start makes from the rows, and when nothing is on
 * its way the store has the chunks that are named, and no other. */
static void check_names(rig *r)
{
    sh_coord_status before = rig_status(r);
    uint64_t stored = rig_count(r, SH_COORD_T_CHUNK);
    assert_true(stored <= before.chunk_names);
    if (before.waiting == 0)
        assert_int_equal(stored, before.chunk_names);
    rig_reboot(r);
    assert_int_equal(rig_status(r).chunk_names, before.chunk_names);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), stored);
}

static void test_chunks_are_counted(void **state)
{
    (void)state;
    enum { NODES = 4, STEPS = 400 };
    rig *r = setup();
    uint64_t seq[NODES] = {0};
    unsigned merged = 0;
    sh_rng rng;
    sh_msg msg;
    sh_rng_init(&rng, 12, 0, 0);
    r->options.buffer = 3;
    rig_boot(r);
    for (unsigned node = 0; node < NODES; node++)
        rig_enrol(r, node);
    for (unsigned i = 0; i < STEPS; i++) {
        unsigned node = (unsigned)(sh_rng_u64(&rng) % NODES);
        rig_update u = rig_make(r, node, seq[node] + 1);
        u.content = sh_rng_u64(&rng) % 6; /* nodes share chunks */
        switch (sh_rng_u64(&rng) % 6) {
        case 0: /* begins, and may be forgotten */
            (void)send_update(r, node, &u, &msg);
            if (msg.type == SH_MSG_WANT)
                send_chunk(r, node, u.content, sh_rng_u64(&rng) % 2);
            else
                seq[node]++;
            break;
        case 1:
            if (rig_send(r, node,
                         &(sh_msg){.type = SH_MSG_ITEM,
                                   .item = {.epoch = u.epoch,
                                            .cls = SH_CLASS_UPDATE,
                                            .seq = u.seq,
                                            .last_seq = u.seq,
                                            .kind = SH_ITEM_TOMBSTONE}}))
                seq[node]++;
            break;
        case 2:
            if (r->job.id != 0 && r->job.kind == SH_COORD_MERGE)
                assert_true(rig_end_merge(r, NULL));
            else if (r->job.id != 0)
                merged += rig_end_gate(r, 3, sh_rng_unit(&rng) < 0.5 ? 2.9 : 3.1);
            break;
        default:
            seq[node] += rig_offer(r, node, &u);
            break;
        }
        rig_drop_mail(r);
        check_names(r);
    }
    assert_true(merged > 20);
    finish(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_return_of_all_is_spread),
        cmocka_unit_test(test_a_clock_set_back_silences_nobody),
        cmocka_unit_test(test_a_larger_fleet_returns_later),
        cmocka_unit_test(test_what_is_asked_for_is_bounded),
        cmocka_unit_test(test_two_nodes_with_the_same_chunks),
        cmocka_unit_test(test_served_bytes_have_a_rate),
        cmocka_unit_test(test_items_have_a_rate),
        cmocka_unit_test(test_of_a_node_the_last_items_are_kept),
        cmocka_unit_test(test_chunks_are_counted),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
