/*
 * Outbox and inbox over a channel that loses, repeats and reorders, with crashes of both ends
 * between any two steps: in the end every item was taken exactly once or lies under a tombstone,
 * and nothing is owed.
 */
#include "tests/sync/fixture.h"

#include <string.h>

#define ITEMS      3000u
#define CHANNEL    64u
#define SLOW_STEPS 40000u /* faults stop after these; liveness is claimed then */

typedef struct {
    bool used, is_ack;
    sh_msg_item item; /* payload: the sequence again */
    uint64_t payload;
    sh_msg_ack ack;
} packet;

typedef struct {
    fixture node, agg;
    sh_outbox outbox;
    sh_rng rng;
    packet channel[CHANNEL];
    unsigned taken[ITEMS + 1], tombstoned[ITEMS + 1];
    bool faults;
    uint64_t made, cursor;
} world;

static void put_packet(world *w, const packet *p)
{
    unsigned copies = 1;
    if (w->faults)
        copies = sh_rng_below(&w->rng, 5) == 0 ? 0 : sh_rng_below(&w->rng, 8) == 0 ? 2 : 1;
    for (; copies > 0; copies--) {
        unsigned slot = (unsigned)sh_rng_below(&w->rng, CHANNEL); /* a full slot: a loss */
        w->channel[slot] = *p;
        w->channel[slot].used = true;
    }
}

static void node_make(world *w)
{
    uint64_t seq, payload = w->made + 1;
    OK(sh_outbox_put(&w->outbox, w->node.txn, SH_CLASS_WINDOW, SH_ITEM_WINDOW,
                     (sh_bytes){&payload, sizeof(payload)}, &seq, &test_err));
    assert_int_equal(seq, payload);
    if (w->faults && sh_rng_below(&w->rng, 10) == 0) { /* crash: not made after all */
        sh_txn_abort(&w->node.txn);
        OK(sh_txn_begin(w->node.store, SH_TXN_WRITE, &w->node.txn, &test_err));
        return;
    }
    fixture_commit(&w->node);
    w->made = seq;
}

static void node_send(world *w)
{
    packet p = {0};
    sh_status status = sh_outbox_next(&w->outbox, w->node.txn, SH_CLASS_WINDOW, w->cursor, &p.item);
    if (status == SH_ERR_NOT_FOUND) {
        w->cursor = 0; /* from the oldest again */
        return;
    }
    OK(status);
    w->cursor = sh_rng_below(&w->rng, 50) == 0 ? 0 : p.item.last_seq + 1;
    p.item.epoch = 3;
    if (p.item.kind != SH_ITEM_TOMBSTONE)
        memcpy(&p.payload, p.item.payload.data, sizeof(p.payload));
    put_packet(w, &p);
}

static void agg_receive(world *w, const packet *p)
{
    sh_hash node = {{1}};
    sh_inbox_verdict verdict;
    packet reply = {.is_ack = true};
    OK(sh_inbox_check(w->agg.txn, T_INBOX, &node, &p->item, &verdict, &test_err));
    if (verdict == SH_INBOX_NEW)
        OK(sh_inbox_mark(w->agg.txn, T_INBOX, &node, &p->item, &reply.ack, &test_err));
    else
        OK(sh_inbox_get_ack(w->agg.txn, T_INBOX, &node, 3, SH_CLASS_WINDOW, &reply.ack, &test_err));
    if (w->faults && sh_rng_below(&w->rng, 10) == 0) { /* crash before the commit */
        sh_txn_abort(&w->agg.txn);
        OK(sh_txn_begin(w->agg.store, SH_TXN_WRITE, &w->agg.txn, &test_err));
        return;
    }
    fixture_commit(&w->agg);
    if (verdict == SH_INBOX_NEW && p->item.kind == SH_ITEM_TOMBSTONE) {
        for (uint64_t seq = p->item.seq; seq <= p->item.last_seq; seq++)
            w->tombstoned[seq]++;
    } else if (verdict == SH_INBOX_NEW) {
        assert_int_equal(p->payload, p->item.seq);
        w->taken[p->item.seq]++;
    }
    if (w->faults && sh_rng_below(&w->rng, 10) == 0)
        return; /* crash after the commit: the acknowledgement is lost */
    put_packet(w, &reply);
}

static void deliver(world *w)
{
    unsigned slot = (unsigned)sh_rng_below(&w->rng, CHANNEL);
    packet p = w->channel[slot];
    if (!p.used)
        return;
    w->channel[slot].used = w->faults && sh_rng_below(&w->rng, 20) == 0;
    if (!p.is_ack) {
        agg_receive(w, &p);
        return;
    }
    OK(sh_outbox_ack(&w->outbox, w->node.txn, &(sh_outbox_acked){.ack = &p.ack}, NULL, NULL,
                     &test_err));
    if (w->faults && sh_rng_below(&w->rng, 10) == 0) {
        sh_txn_abort(&w->node.txn);
        OK(sh_txn_begin(w->node.store, SH_TXN_WRITE, &w->node.txn, &test_err));
    } else {
        fixture_commit(&w->node);
    }
}

static void run(uint64_t seed, uint64_t quota)
{
    static world w;
    memset(&w, 0, sizeof(w));
    sh_rng_init(&w.rng, seed, 0, 6);
    fixture_open(&w.node);
    fixture_open(&w.agg);
    w.outbox = fixture_outbox(quota);
    sh_outbox_counts counts = {0};
    for (unsigned step = 0;; step++) {
        w.faults = step < SLOW_STEPS;
        uint64_t what = sh_rng_below(&w.rng, 8);
        if (what == 0 && w.made < ITEMS)
            node_make(&w);
        else if (what < 4)
            node_send(&w);
        else
            deliver(&w);
        OK(sh_outbox_get_counts(&w.outbox, w.node.txn, &counts, &test_err));
        if (w.made == ITEMS && counts.items[SH_CLASS_WINDOW] == 0)
            break;
        if (step > 20 * SLOW_STEPS)
            fail_msg("seed %llu: %llu items still owed", (unsigned long long)seed,
                     (unsigned long long)counts.items[SH_CLASS_WINDOW]);
    }
    uint64_t lost = 0;
    for (unsigned seq = 1; seq <= ITEMS; seq++) {
        if (w.taken[seq] > 1)
            fail_msg("seed %llu: %u was taken %u times", (unsigned long long)seed, seq,
                     w.taken[seq]);
        if (w.taken[seq] == 0 && w.tombstoned[seq] == 0)
            fail_msg("seed %llu: %u was lost", (unsigned long long)seed, seq);
        lost += w.taken[seq] == 0;
    }
    uint64_t dropped = counts.dropped[SH_CLASS_WINDOW];
    if (lost > dropped)
        fail_msg("seed %llu: %llu not taken, %llu counted as dropped", (unsigned long long)seed,
                 (unsigned long long)lost, (unsigned long long)dropped);
    if (quota == UINT64_MAX)
        assert_int_equal(lost, 0);
    else
        assert_true(dropped > 0);
    fixture_close(&w.node);
    fixture_close(&w.agg);
}

static void without_quota(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 10; seed++)
        run(seed, UINT64_MAX);
}

static void with_quota(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 10; seed++)
        run(seed, 26 * 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_quota),
        cmocka_unit_test(with_quota),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
