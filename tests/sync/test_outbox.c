/* The outbox against a naive list. */
#include "tests/sync/fixture.h"

#include <stdlib.h>
#include <string.h>

#define ITEMS_MAX 4000u
#define QUOTA     4000u
#define ROW_BYTES 18u /* key and head of an item */

typedef struct {
    uint64_t seq, last;
    size_t n;
    uint8_t fill;
    bool tombstone;
} naive_item;

typedef struct {
    naive_item items[ITEMS_MAX];
    size_t n;
    uint64_t next, dropped;
} naive_class;

static naive_class model[SH_CLASSES];

static uint64_t naive_bytes(const naive_class *c)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < c->n; i++)
        bytes += ROW_BYTES + c->items[i].n;
    return bytes;
}

static void naive_remove(naive_class *c, size_t i)
{
    memmove(&c->items[i], &c->items[i + 1], (--c->n - i) * sizeof(naive_item));
}

static void naive_put(naive_class *c, size_t n, uint8_t fill)
{
    c->items[c->n++] = (naive_item){c->next, c->next, n, fill, false};
    c->next++;
    while (naive_bytes(c) > QUOTA) {
        naive_item *a = &c->items[0];
        if (!a->tombstone) {
            *a = (naive_item){a->seq, a->last, 0, 0, true};
            c->dropped++;
        } else if (c->n > 1) {
            a->last = c->items[1].last;
            naive_remove(c, 1);
            c->dropped++;
        } else {
            break;
        }
    }
}

static bool covered(const sh_msg_ack *ack, uint64_t seq)
{
    uint64_t bit = seq - ack->high_water - 1;
    return seq <= ack->high_water ||
           (bit < 64u * SH_ACK_BITMAP_WORDS && (ack->bitmap[bit / 64] >> (bit % 64) & 1));
}

static void naive_ack(naive_class *c, const sh_msg_ack *ack)
{
    for (size_t i = c->n; i-- > 0;) {
        bool all = true;
        for (uint64_t seq = c->items[i].seq; seq <= c->items[i].last; seq++)
            all = all && covered(ack, seq);
        if (all)
            naive_remove(c, i);
    }
}

static void compare(const sh_outbox *outbox, fixture *f)
{
    sh_outbox_counts counts;
    OK(sh_outbox_get_counts(outbox, f->txn, &counts, &test_err));
    for (unsigned cls = 0; cls < SH_CLASSES; cls++) {
        const naive_class *c = &model[cls];
        assert_int_equal(counts.items[cls], c->n);
        assert_int_equal(counts.bytes[cls], naive_bytes(c));
        assert_int_equal(counts.dropped[cls], c->dropped);
        assert_int_equal(counts.next_seq[cls], c->next);
        uint64_t from = 0;
        sh_msg_item item;
        for (size_t i = 0; i < c->n; i++, from = item.last_seq + 1) {
            OK(sh_outbox_next(outbox, f->txn, cls, from, &item));
            assert_int_equal(item.seq, c->items[i].seq);
            assert_int_equal(item.last_seq, c->items[i].last);
            assert_int_equal(item.kind == SH_ITEM_TOMBSTONE, c->items[i].tombstone);
            assert_int_equal(item.payload.n, c->items[i].n);
            for (size_t k = 0; k < item.payload.n; k++)
                assert_int_equal(((const uint8_t *)item.payload.data)[k], c->items[i].fill);
        }
        assert_int_equal(sh_outbox_next(outbox, f->txn, cls, from, &item), SH_ERR_NOT_FOUND);
    }
}

static sh_msg_ack random_ack(sh_rng *rng, uint8_t cls)
{
    sh_msg_ack ack = {.cls = cls};
    uint64_t made = model[cls].next - 1;
    ack.high_water = made > 30 ? made - sh_rng_below(rng, 30) : sh_rng_below(rng, made + 1);
    if (sh_rng_below(rng, 4) == 0)
        ack.high_water /= 2; /* an old one */
    for (uint64_t seq = ack.high_water + 2; seq <= made && seq - ack.high_water <= 1024; seq++)
        if (sh_rng_below(rng, 2))
            ack.bitmap[(seq - ack.high_water - 1) / 64] |= UINT64_C(1)
                                                           << ((seq - ack.high_water - 1) % 64);
    return ack;
}

static void same_as_naive(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 10; seed++) {
        fixture f;
        sh_rng rng;
        sh_outbox outbox = fixture_outbox(QUOTA);
        sh_rng_init(&rng, seed, 0, 2);
        memset(model, 0, sizeof(model));
        for (int c = 0; c < SH_CLASSES; c++)
            model[c].next = 1;
        fixture_open(&f);
        for (int i = 0; i < 600; i++) {
            uint8_t cls = (uint8_t)sh_rng_below(&rng, SH_CLASSES);
            if (sh_rng_below(&rng, 5) == 0) {
                sh_msg_ack ack = random_ack(&rng, cls);
                OK(sh_outbox_ack(&outbox, f.txn, &(sh_outbox_acked){.ack = &ack}, NULL, NULL,
                                 &test_err));
                naive_ack(&model[cls], &ack);
            } else {
                uint8_t bytes[QUOTA + 500];
                size_t n = sh_rng_below(&rng, sh_rng_below(&rng, 50) == 0 ? sizeof(bytes) : 400);
                uint64_t seq, want = model[cls].next;
                memset(bytes, i & 0xff, sizeof(bytes));
                OK(sh_outbox_put(&outbox, f.txn, cls, SH_ITEM_WINDOW, (sh_bytes){bytes, n}, &seq,
                                 &test_err));
                assert_int_equal(seq, want);
                naive_put(&model[cls], n, (uint8_t)(i & 0xff));
            }
            if (i % 50 == 0)
                fixture_commit(&f);
            compare(&outbox, &f);
        }
        fixture_close(&f);
    }
}

static sh_status collect(void *arg, const sh_msg_item *item)
{
    uint64_t *sum = arg;
    assert_int_equal(item->payload.n, 3);
    assert_memory_equal(item->payload.data, "abc", 3);
    *sum = *sum * 10 + item->seq;
    return SH_OK;
}

static void ack_tells_each_item_once(void **state)
{
    (void)state;
    fixture f;
    sh_outbox outbox = fixture_outbox(UINT64_MAX);
    uint64_t seq, told = 0;
    fixture_open(&f);
    for (int i = 0; i < 5; i++)
        OK(sh_outbox_put(&outbox, f.txn, SH_CLASS_UPDATE, SH_ITEM_UPDATE, (sh_bytes){"abc", 3},
                         &seq, &test_err));
    sh_msg_ack ack = {.cls = SH_CLASS_UPDATE, .high_water = 2, .bitmap = {2}}; /* 1, 2, 4 */
    OK(sh_outbox_ack(&outbox, f.txn, &(sh_outbox_acked){.ack = &ack}, collect, &told, &test_err));
    OK(sh_outbox_ack(&outbox, f.txn, &(sh_outbox_acked){.ack = &ack}, collect, &told, &test_err));
    assert_int_equal(told, 124);
    fixture_close(&f);
}

static void impossible_acks(void **state)
{
    (void)state;
    fixture f;
    sh_outbox outbox = fixture_outbox(UINT64_MAX);
    uint64_t seq;
    fixture_open(&f);
    for (int i = 0; i < 3; i++)
        OK(sh_outbox_put(&outbox, f.txn, SH_CLASS_ALARM, SH_ITEM_ALARM, (sh_bytes){"abc", 3}, &seq,
                         &test_err));
    const sh_msg_ack bad[] = {
        {.cls = SH_CLASSES},
        {.cls = SH_CLASS_ALARM, .high_water = 4},
        {.cls = SH_CLASS_ALARM, .high_water = UINT64_MAX},
        {.cls = SH_CLASS_ALARM, .high_water = 1, .bitmap = {4}}, /* 4 */
        {.cls = SH_CLASS_UPDATE, .high_water = 1},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        assert_int_equal(sh_outbox_ack(&outbox, f.txn, &(sh_outbox_acked){.ack = &bad[i]}, NULL,
                                       NULL, &test_err),
                         SH_ERR_INVALID);
    assert_int_equal(sh_txn_count(f.txn, T_OUTBOX), 3);
    uint8_t *big = calloc(1, SH_WIRE_ITEM_MAX + 1);
    assert_non_null(big);
    assert_int_equal(sh_outbox_put(&outbox, f.txn, SH_CLASS_ALARM, SH_ITEM_ALARM,
                                   (sh_bytes){big, SH_WIRE_ITEM_MAX + 1}, &seq, &test_err),
                     SH_ERR_LIMIT);
    free(big);
    fixture_close(&f);
}

static uint64_t weigh_1000(void *arg, const sh_msg_item *item)
{
    (void)arg;
    return item->kind == SH_ITEM_TOMBSTONE ? 0 : 1000;
}

static sh_status count_drop(void *arg, const sh_msg_item *item)
{
    (void)item;
    ++*(int *)arg;
    return SH_OK;
}

static void weight_counts(void **state)
{
    (void)state;
    fixture f;
    int drops = 0;
    uint64_t seq;
    sh_outbox outbox = fixture_outbox(2500);
    outbox.weigh = weigh_1000;
    outbox.on_drop = count_drop;
    outbox.arg = &drops;
    sh_outbox_counts counts;
    fixture_open(&f);
    for (int i = 0; i < 5; i++)
        OK(sh_outbox_put(&outbox, f.txn, SH_CLASS_UPDATE, SH_ITEM_UPDATE, (sh_bytes){"abc", 3},
                         &seq, &test_err));
    OK(sh_outbox_get_counts(&outbox, f.txn, &counts, &test_err));
    assert_int_equal(drops, 3);
    assert_int_equal(counts.dropped[SH_CLASS_UPDATE], 3);
    assert_int_equal(counts.items[SH_CLASS_UPDATE], 3); /* tombstone 1..3, and 4, 5 */
    assert_int_equal(counts.bytes[SH_CLASS_UPDATE], ROW_BYTES + 2 * (ROW_BYTES + 3 + 1000));
    sh_msg_ack ack = {.cls = SH_CLASS_UPDATE, .high_water = 5};
    OK(sh_outbox_ack(&outbox, f.txn, &(sh_outbox_acked){.ack = &ack}, NULL, NULL, &test_err));
    OK(sh_outbox_get_counts(&outbox, f.txn, &counts, &test_err));
    assert_int_equal(counts.bytes[SH_CLASS_UPDATE], 0);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_as_naive),
        cmocka_unit_test(ack_tells_each_item_once),
        cmocka_unit_test(impossible_acks),
        cmocka_unit_test(weight_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
