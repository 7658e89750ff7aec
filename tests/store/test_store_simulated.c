/*
 * The simulated disk under the memory store: what is there after a crash is what was there at some
 * commit, and which one is what the disk was told.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/hash.h"
#include "shared/base/rng.h"
#include "shared/store/simulated.h"

static const char *const tables[] = {"one", "two"};
static const sh_store_options options = {
    .tables = tables, .n_tables = 2, .bytes_max = 1 << 20, .reserve_bytes = 4096};

#define KEYS    40u
#define COMMITS 400u

static sh_store *open_store(void)
{
    sh_store *store = NULL;
    assert_int_equal(sh_store_open_memory(&options, &store, NULL), SH_OK);
    return store;
}

/* Of all rows, in order. */
static sh_hash digest(sh_store *store)
{
    sh_buf all;
    sh_txn *txn = NULL;
    sh_buf_init(&all, 1 << 22);
    assert_int_equal(sh_txn_begin(store, SH_TXN_READ, &txn, NULL), SH_OK);
    for (unsigned t = 0; t < 2; t++) {
        sh_cursor *cursor = NULL;
        sh_slice key, value;
        assert_int_equal(sh_cursor_open(txn, t, &cursor, NULL), SH_OK);
        sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
        for (; status == SH_OK; status = sh_cursor_next(cursor, &key, &value)) {
            assert_int_equal(sh_buf_printf(&all, "%u:%zu:%zu:", t, key.n, value.n), SH_OK);
            assert_int_equal(sh_buf_append(&all, key.data, key.n), SH_OK);
            if (value.n > 0)
                assert_int_equal(sh_buf_append(&all, value.data, value.n), SH_OK);
        }
        sh_cursor_close(&cursor);
    }
    sh_txn_abort(&txn);
    sh_hash hash = sh_blake2b(all.data, all.len);
    sh_buf_release(&all);
    return hash;
}

/* Up to 8 random writes; the status of the first that fails, or of the commit. */
static sh_status write_some(sh_store *store, sh_rng *rng)
{
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL));
    uint64_t n = 1 + sh_rng_below(rng, 8);
    for (uint64_t i = 0; i < n; i++) {
        uint8_t key = (uint8_t)sh_rng_below(rng, KEYS), value[64];
        unsigned t = (unsigned)sh_rng_below(rng, 2);
        size_t value_n = sh_rng_below(rng, sizeof value);
        memset(value, (int)sh_rng_below(rng, 256), sizeof value);
        bool del = sh_rng_below(rng, 3) == 0;
        sh_status status = del ? sh_txn_del(txn, t, &key, 1, NULL)
                               : sh_txn_put(txn, t, &key, 1, value, value_n, NULL);
        if (status != SH_OK) {
            sh_txn_abort(&txn);
            return status;
        }
    }
    return sh_txn_commit(&txn, NULL);
}

static void test_crash_in_a_transaction(void **state)
{
    (void)state;
    sh_store *store = open_store();
    sh_rng rng;
    unsigned crashes = 0, kept = 0;
    sh_rng_init(&rng, 1, 0, 1);
    for (unsigned i = 0; i < COMMITS; i++) {
        sh_hash before = digest(store);
        bool durable = i % 2;
        uint64_t used = sh_store_bytes_used(store);
        sh_store_simulate_crash(store, 1 + sh_rng_below(&rng, 12), durable);
        sh_status status = write_some(store, &rng);
        assert_true(status == SH_OK || status == SH_ERR_CRASHED);
        if (status == SH_OK) {
            sh_store_simulate_crash(store, 0, false);
            continue;
        }
        sh_txn *txn = NULL;
        assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_ERR_CRASHED);
        assert_int_equal(sh_store_sync(store, NULL), SH_ERR_CRASHED);
        sh_store_simulate_restart(store, 1000); /* every commit was durable: nothing to lose */
        crashes++;
        sh_hash after = digest(store);
        if (!sh_hash_equal(&before, &after)) {
            assert_true(durable); /* only of a crash in a commit */
            kept++;
        } else {
            assert_int_equal(sh_store_bytes_used(store), used);
        }
    }
    assert_true(crashes > 100);
    assert_true(kept > 10);
    sh_store_close(&store);
}

static void test_lost_commits(void **state)
{
    (void)state;
    sh_store *store = open_store();
    static sh_hash history[COMMITS + 1]; /* after the i-th commit since the last start */
    sh_rng rng;
    sh_rng_init(&rng, 2, 0, 1);
    sh_store_simulate_unsynced(store, true);
    size_t n = 0;
    unsigned losses = 0;
    history[0] = digest(store);
    for (unsigned i = 0; i < COMMITS; i++) {
        uint32_t unsynced = sh_store_simulate_n_unsynced(store);
        assert_int_equal(write_some(store, &rng), SH_OK);
        if (sh_store_simulate_n_unsynced(store) > unsynced) /* it wrote something */
            history[++n] = digest(store);
        if (i % 29 == 0) {
            assert_int_equal(sh_store_sync(store, NULL), SH_OK);
            assert_int_equal(sh_store_simulate_n_unsynced(store), 0);
        }
        if (i % 17 != 0)
            continue;
        uint32_t lose = (uint32_t)sh_rng_below(&rng, 24);
        n -= SH_MIN(lose, sh_store_simulate_n_unsynced(store));
        losses += lose > 0;
        sh_store_simulate_restart(store, lose);
        sh_hash now = digest(store);
        assert_true(sh_hash_equal(&now, &history[n]));
    }
    assert_true(losses > 5);
    for (unsigned i = 0; i < 3 * SH_STORE_UNSYNCED_MAX; i++)
        assert_int_equal(write_some(store, &rng), SH_OK);
    assert_true(sh_store_simulate_n_unsynced(store) <= SH_STORE_UNSYNCED_MAX);
    sh_store_simulate_unsynced(store, false);
    assert_int_equal(sh_store_simulate_n_unsynced(store), 0);
    sh_store_close(&store);
}

static void test_room(void **state)
{
    (void)state;
    sh_store *store = open_store();
    sh_txn *txn = NULL;
    uint8_t value[600] = {0};
    sh_store_simulate_room(store, 1000);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_put(txn, 0, "a", 1, value, sizeof value, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_put(txn, 0, "b", 1, value, sizeof value, NULL), SH_ERR_FULL);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_ERR_FULL);
    assert_int_equal(sh_txn_begin(store, SH_TXN_RESERVE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_put(txn, 0, "b", 1, value, sizeof value, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    assert_int_equal(sh_txn_del(txn, 0, "a", 1, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    sh_store_simulate_room(store, UINT64_MAX);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    for (uint8_t i = 0; i < 100; i++)
        assert_int_equal(sh_txn_put(txn, 1, &i, 1, value, sizeof value, NULL), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
    sh_store_close(&store);
}

static void test_corrupt_and_copies(void **state)
{
    (void)state;
    sh_store *store = open_store(), *copy = NULL;
    sh_rng rng;
    sh_txn *txn = NULL;
    sh_rng_init(&rng, 3, 0, 1);
    sh_hash empty = digest(store);
    for (int i = 0; i < 50; i++)
        assert_int_equal(write_some(store, &rng), SH_OK);
    sh_hash then = digest(store);
    uint64_t used = sh_store_bytes_used(store);
    assert_int_equal(sh_store_copy_memory(store, &copy, NULL), SH_OK);
    for (int i = 0; i < 50; i++)
        assert_int_equal(write_some(store, &rng), SH_OK);
    sh_hash now = digest(store), copied = digest(copy);
    assert_true(sh_hash_equal(&copied, &then));
    assert_false(sh_hash_equal(&copied, &now));
    assert_int_equal(sh_store_bytes_used(copy), used);
    for (int i = 0; i < 50; i++) /* the copy is a store of its own, in good order */
        assert_int_equal(write_some(copy, &rng), SH_OK);
    sh_hash still = digest(store);
    assert_true(sh_hash_equal(&still, &now));

    sh_store_simulate_corrupt(store);
    assert_int_equal(sh_txn_begin(store, SH_TXN_READ, &txn, NULL), SH_ERR_CORRUPT);
    sh_store_simulate_restart(store, 0); /* starting again does not help */
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_ERR_CORRUPT);
    sh_store_simulate_set_aside(store);
    sh_hash after = digest(store);
    assert_true(sh_hash_equal(&after, &empty));
    assert_int_equal(sh_store_bytes_used(store), 0);

    sh_hash of_copy = digest(copy);
    assert_int_equal(sh_store_restore_memory(store, copy, NULL), SH_OK);
    after = digest(store);
    assert_true(sh_hash_equal(&after, &of_copy));
    sh_store_close(&copy);
    sh_store_close(&store);
}

/* The copy and the restore fail one allocation after the other: an error, and nothing is lost but
 * what was to be replaced. */
static void test_copy_without_memory(void **state)
{
    (void)state;
    sh_store *store = open_store(), *copy = NULL;
    sh_rng rng;
    sh_rng_init(&rng, 4, 0, 1);
    for (int i = 0; i < 20; i++)
        assert_int_equal(write_some(store, &rng), SH_OK);
    sh_hash then = digest(store);
    (void)sh_alloc_fail_after(0);
    for (size_t n = 1;; n++) {
        (void)sh_alloc_fail_after(n);
        sh_status status = sh_store_copy_memory(store, &copy, NULL);
        (void)sh_alloc_fail_after(0);
        if (status == SH_OK)
            break;
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_null(copy);
    }
    sh_hash of_copy = digest(copy), still = digest(store);
    assert_true(sh_hash_equal(&of_copy, &then));
    assert_true(sh_hash_equal(&still, &then));
    sh_store_close(&copy);
    sh_store_close(&store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crash_in_a_transaction),
        cmocka_unit_test(test_lost_commits),
        cmocka_unit_test(test_room),
        cmocka_unit_test(test_corrupt_and_copies),
        cmocka_unit_test(test_copy_without_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
