/* The inbox against a naive set of sequences. */
#include "tests/sync/fixture.h"

#include <string.h>

#define SEQS   6000u
#define WINDOW (64u * SH_ACK_BITMAP_WORDS)

static bool taken[SEQS + 1]; /* the naive receiver */

static uint64_t naive_high_water(void)
{
    uint64_t high = 0;
    while (high < SEQS && taken[high + 1])
        high++;
    return high;
}

static sh_inbox_verdict naive_verdict(const sh_msg_item *item)
{
    uint64_t high = naive_high_water();
    bool all = true;
    for (uint64_t seq = item->seq; seq <= item->last_seq; seq++)
        all = all && taken[seq];
    if (all)
        return SH_INBOX_DUPLICATE;
    if (item->seq > high + 1 && item->last_seq > high + WINDOW)
        return SH_INBOX_AHEAD;
    return SH_INBOX_NEW;
}

static void check_ack(const sh_msg_ack *ack)
{
    uint64_t high = naive_high_water();
    assert_int_equal(ack->high_water, high);
    for (uint64_t bit = 0; bit < WINDOW; bit++) {
        uint64_t seq = high + 1 + bit;
        bool want = seq <= SEQS && taken[seq];
        bool got = ack->bitmap[bit / 64] >> (bit % 64) & 1;
        if (want != got)
            fail_msg("sequence %llu: naive %d, bitmap %d", (unsigned long long)seq, want, got);
    }
}

static sh_msg_item random_item(sh_rng *rng, uint64_t high)
{
    /* Around the mark mostly; now and then far ahead or long past. */
    uint64_t reach = sh_rng_below(rng, 8) == 0 ? SEQS : high + 2 + sh_rng_below(rng, 40);
    uint64_t seq = 1 + sh_rng_below(rng, SH_MIN(reach, (uint64_t)SEQS));
    sh_msg_item item = {.epoch = 7, .cls = SH_CLASS_ALARM, .kind = SH_ITEM_ALARM};
    item.seq = item.last_seq = seq;
    if (sh_rng_below(rng, 6) == 0) {
        item.kind = SH_ITEM_TOMBSTONE;
        uint64_t length = sh_rng_below(rng, 4) == 0 ? 1500 : 20;
        uint64_t last = seq + sh_rng_below(rng, length);
        item.last_seq = SH_MIN(last, (uint64_t)SEQS);
    }
    return item;
}

static void same_as_naive(void **state)
{
    (void)state;
    sh_hash node = {{1, 2, 3}};
    for (uint64_t seed = 1; seed <= 20; seed++) {
        fixture f;
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 1);
        memset(taken, 0, sizeof(taken));
        fixture_open(&f);
        for (int i = 0; i < 800; i++) {
            sh_msg_item item = random_item(&rng, naive_high_water());
            sh_inbox_verdict want = naive_verdict(&item), got;
            sh_msg_ack ack;
            OK(sh_inbox_check(f.txn, T_INBOX, &node, &item, &got, &test_err));
            if (got != want)
                fail_msg("seed %llu step %d: %llu..%llu naive %d, inbox %d",
                         (unsigned long long)seed, i, (unsigned long long)item.seq,
                         (unsigned long long)item.last_seq, want, got);
            sh_status status = sh_inbox_mark(f.txn, T_INBOX, &node, &item, &ack, &test_err);
            assert_int_equal(status, want == SH_INBOX_AHEAD ? SH_ERR_LIMIT : SH_OK);
            if (want != SH_INBOX_AHEAD)
                for (uint64_t seq = item.seq; seq <= item.last_seq; seq++)
                    taken[seq] = true;
            OK(sh_inbox_get_ack(f.txn, T_INBOX, &node, 7, SH_CLASS_ALARM, &ack, &test_err));
            check_ack(&ack);
        }
        fixture_close(&f);
    }
}

/* Nodes, epochs and classes do not know of each other. */
static void senders_are_apart(void **state)
{
    (void)state;
    fixture f;
    fixture_open(&f);
    sh_hash nodes[2] = {{{1}}, {{2}}};
    sh_msg_item item = {.epoch = 1, .cls = 0, .kind = SH_ITEM_UPDATE, .seq = 1, .last_seq = 1};
    sh_msg_ack ack;
    sh_inbox_verdict verdict;
    OK(sh_inbox_mark(f.txn, T_INBOX, &nodes[0], &item, &ack, &test_err));
    sh_msg_item others[3] = {item, item, item};
    others[1].epoch = 2;
    others[2].cls = 1;
    for (int i = 0; i < 3; i++) {
        OK(sh_inbox_check(f.txn, T_INBOX, &nodes[i == 0], &others[i], &verdict, &test_err));
        assert_int_equal(verdict, SH_INBOX_NEW);
    }
    OK(sh_inbox_check(f.txn, T_INBOX, &nodes[0], &item, &verdict, &test_err));
    assert_int_equal(verdict, SH_INBOX_DUPLICATE);
    fixture_close(&f);
}

static void hostile_items(void **state)
{
    (void)state;
    fixture f;
    fixture_open(&f);
    sh_hash node = {{9}};
    const sh_msg_item bad[] = {
        {.cls = SH_CLASSES, .kind = SH_ITEM_ALARM, .seq = 1, .last_seq = 1},
        {.kind = SH_ITEM_ALARM, .seq = 0, .last_seq = 0},
        {.kind = SH_ITEM_TOMBSTONE, .seq = 5, .last_seq = 4},
        {.kind = SH_ITEM_UPDATE, .seq = 1, .last_seq = 2},
        {.kind = SH_ITEM_TOMBSTONE, .seq = 1, .last_seq = UINT64_MAX},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        sh_inbox_verdict verdict = SH_INBOX_NEW;
        sh_msg_ack ack;
        assert_int_equal(sh_inbox_check(f.txn, T_INBOX, &node, &bad[i], &verdict, &test_err),
                         SH_ERR_INVALID);
        assert_int_equal(sh_inbox_mark(f.txn, T_INBOX, &node, &bad[i], &ack, &test_err),
                         SH_ERR_INVALID);
    }
    assert_int_equal(sh_txn_count(f.txn, T_INBOX), 0);
    fixture_close(&f);
}

/* A row that is not ours is an error, not a fresh start (which would count everything twice). */
static void broken_row(void **state)
{
    (void)state;
    fixture f;
    fixture_open(&f);
    sh_hash node = {{4}};
    sh_msg_item item = {.epoch = 1, .cls = 0, .kind = SH_ITEM_UPDATE, .seq = 1, .last_seq = 1};
    sh_msg_ack ack;
    OK(sh_inbox_mark(f.txn, T_INBOX, &node, &item, &ack, &test_err));
    uint8_t key[41] = {4};
    sh_key_put_u64(key + 32, 1);
    OK(sh_txn_put(f.txn, T_INBOX, key, sizeof(key), "x", 1, &test_err));
    sh_inbox_verdict verdict;
    assert_int_equal(sh_inbox_check(f.txn, T_INBOX, &node, &item, &verdict, &test_err),
                     SH_ERR_CORRUPT);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_as_naive),
        cmocka_unit_test(senders_are_apart),
        cmocka_unit_test(hostile_items),
        cmocka_unit_test(broken_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
