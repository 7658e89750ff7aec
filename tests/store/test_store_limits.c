/* Limits, full stores and the reserve, on both implementations; growing by opening again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "tests/store/util.h"

#define VALUE_BYTES 900
#define BYTES_MAX   ((uint64_t)1 << 20)
#define RESERVE     ((uint64_t)128 << 10)

static const char *const tables[] = {"items", "notes"};
static const sh_store_options small = {.tables = tables,
                                       .n_tables = 2,
                                       .bytes_max = BYTES_MAX,
                                       .reserve_bytes = RESERVE,
                                       .no_sync = true};

/* Every test runs twice: LMDB, memory. */
typedef struct {
    bool lmdb;
    temp_dir dir;
    sh_store *store;
} fixture;

static void open_store(fixture *f, const sh_store_options *options)
{
    sh_error err = {0};
    must(f->lmdb ? sh_store_open_lmdb(f->dir.path, options, &f->store, &err)
                 : sh_store_open_memory(options, &f->store, &err),
         &err, "open");
}

static int setup(void **state, bool lmdb)
{
    fixture *f = calloc(1, sizeof(*f));
    if (!f)
        return -1;
    f->lmdb = lmdb;
    f->dir = temp_dir_make();
    open_store(f, &small);
    *state = f;
    return 0;
}

static int setup_lmdb(void **state)
{
    return setup(state, true);
}

static int setup_memory(void **state)
{
    return setup(state, false);
}

static int teardown(void **state)
{
    fixture *f = *state;
    sh_store_close(&f->store);
    temp_dir_remove(&f->dir);
    free(f);
    return 0;
}

static sh_txn *begin(fixture *f, int kind)
{
    sh_txn *txn = NULL;
    sh_error err = {0};
    must(sh_txn_begin(f->store, kind, &txn, &err), &err, "begin");
    return txn;
}

/* The items [from, from + count) in one transaction. */
static sh_status put_items(fixture *f, int kind, uint64_t from, uint64_t count, sh_error *err)
{
    static uint8_t value[VALUE_BYTES];
    uint8_t key[8];
    sh_txn *txn = NULL;
    sh_status status = sh_txn_begin(f->store, kind, &txn, err);
    for (uint64_t i = from; i < from + count && status == SH_OK; i++) {
        sh_key_put_u64(key, i);
        value_fill(i, value, VALUE_BYTES);
        status = sh_txn_put(txn, 0, key, sizeof(key), value, VALUE_BYTES, err);
    }
    if (status == SH_OK)
        return sh_txn_commit(&txn, err);
    sh_txn_abort(&txn);
    return status;
}

static sh_status put_item(fixture *f, int kind, uint64_t i, sh_error *err)
{
    return put_items(f, kind, i, 1, err);
}

static sh_status del_item(fixture *f, uint64_t i, sh_error *err)
{
    uint8_t key[8];
    sh_key_put_u64(key, i);
    sh_txn *txn = NULL;
    sh_status status = sh_txn_begin(f->store, SH_TXN_RESERVE, &txn, err);
    if (status != SH_OK)
        return status;
    status = sh_txn_del(txn, 0, key, sizeof(key), err);
    if (status == SH_OK)
        return sh_txn_commit(&txn, err);
    sh_txn_abort(&txn);
    return status;
}

/* Exactly the items [from, to) are there. */
static void assert_items(fixture *f, uint64_t from, uint64_t to)
{
    sh_txn *txn = begin(f, SH_TXN_READ);
    assert_int_equal(sh_txn_count(txn, 0), to - from);
    for (uint64_t i = from; i < to; i++) {
        uint8_t key[8];
        sh_slice value;
        sh_key_put_u64(key, i);
        assert_int_equal(sh_txn_get(txn, 0, key, sizeof(key), &value), SH_OK);
        assert_true(value_is(i, VALUE_BYTES, value));
    }
    sh_txn_abort(&txn);
}

static uint64_t fill_up(fixture *f, uint64_t from)
{
    sh_error err = {0};
    uint64_t i = from;
    sh_status status;
    while ((status = put_item(f, SH_TXN_WRITE, i, &err)) == SH_OK)
        i++;
    assert_int_equal(status, SH_ERR_FULL);
    assert_non_null(strstr(err.text, "full"));
    if (f->lmdb)
        assert_non_null(strstr(err.text, f->dir.path));
    return i;
}

/* What is kept is there: half of the reserve can be written at once (and is not). */
static void assert_reserve(fixture *f, uint64_t from, const char *when)
{
    sh_error err = {0};
    static uint8_t value[VALUE_BYTES];
    sh_txn *txn = begin(f, SH_TXN_RESERVE);
    for (uint64_t i = from; i < from + RESERVE / 2 / VALUE_BYTES; i++) {
        uint8_t key[8];
        sh_key_put_u64(key, i);
        must(sh_txn_put(txn, 0, key, sizeof(key), value, VALUE_BYTES, &err), &err, when);
    }
    sh_txn_abort(&txn);
}

static void test_full(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    uint64_t first = 0, next = 0;
    for (int round = 0; round < 40; round++) {
        next = fill_up(f, next);
        assert_items(f, first, next);
        if (round % 20 == 0)
            print_message("round %d: %llu items of %d bytes, %llu bytes used\n", round,
                          (unsigned long long)(next - first), VALUE_BYTES,
                          (unsigned long long)sh_store_bytes_used(f->store));
        assert_reserve(f, next, "reserve after small transactions");
        /* At least half of what is not the reserve holds values: nothing leaks over the rounds. */
        assert_true((next - first) * VALUE_BYTES > (BYTES_MAX - RESERVE) / 2);
        assert_true(sh_store_bytes_used(f->store) <= BYTES_MAX);
        /* The reserve: notes of what will be dropped fit, and all can be deleted one by one. They
         * make the file longer, which must not give the plain writers of later rounds more. */
        uint64_t notes = round == 0 ? RESERVE / 2 / VALUE_BYTES : 16;
        must(put_items(f, SH_TXN_RESERVE, next, notes, &err), &err, "use the reserve");
        next += notes;
        uint64_t keep = next - (next - first) / 4;
        while (first < keep)
            must(del_item(f, first++, &err), &err, "delete when full");
        assert_items(f, first, next);
        /* As many as one transaction takes, new ones or ones that are there: it may not take the
         * reserve either. */
        bool again = round % 2 == 1;
        for (uint64_t count = again ? next - first : 512; count > 0; count -= count / 32 + 1)
            if (put_items(f, SH_TXN_WRITE, again ? first : next, count, &err) == SH_OK) {
                next += again ? 0 : count;
                break;
            }
        if (round % 20 == 0)
            print_message("round %d: %llu items after a large transaction, %llu bytes used\n",
                          round, (unsigned long long)(next - first),
                          (unsigned long long)sh_store_bytes_used(f->store));
        assert_reserve(f, next, "reserve after a large transaction");
    }
}

/* The reserve is one: writers that may use it are refused too in the end. */
static void test_reserve_ends(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    uint64_t full = fill_up(f, 0), i = full;
    while (put_item(f, SH_TXN_RESERVE, i, &err) == SH_OK)
        i++;
    assert_int_equal(err.code, SH_ERR_FULL);
    assert_true(i > full + RESERVE / 2 / VALUE_BYTES);
    assert_items(f, 0, i);
}

/* A transaction that fails at a put writes nothing, whatever it wrote before. */
static void test_failed_transaction(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    uint64_t next = fill_up(f, 0);
    sh_txn *txn = begin(f, SH_TXN_WRITE);
    static uint8_t value[BYTES_MAX];
    sh_status status = SH_OK;
    for (uint8_t i = 0; i < 200 && status == SH_OK; i++)
        status = sh_txn_put(txn, 1, &i, 1, value, 100 + (size_t)i * 100, &err);
    assert_int_equal(status, SH_ERR_FULL);
    assert_int_equal(sh_txn_put(txn, 1, "k", 1, "v", 1, &err), SH_ERR_FULL);
    assert_int_equal(sh_txn_del(txn, 0, "k", 1, &err), SH_ERR_FULL);
    assert_int_equal(sh_txn_commit(&txn, &err), SH_ERR_FULL);
    assert_null(txn);
    txn = begin(f, SH_TXN_READ);
    assert_int_equal(sh_txn_count(txn, 1), 0);
    sh_txn_abort(&txn);
    assert_items(f, 0, next);
}

static void test_sizes(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    static uint8_t bytes[SH_STORE_KEY_MAX + 1], value[100000];
    sh_slice got;
    sh_txn *txn = begin(f, SH_TXN_WRITE);
    assert_int_equal(sh_txn_put(txn, 0, bytes, 0, "v", 1, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_txn_put(txn, 0, bytes, SH_STORE_KEY_MAX + 1, "v", 1, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "129"));
    assert_int_equal(sh_txn_put(txn, 0, "k", 1, bytes, SH_STORE_VALUE_MAX + 1, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_txn_get(txn, 0, bytes, 0, &got), SH_ERR_NOT_FOUND);
    assert_int_equal(sh_txn_get(txn, 0, bytes, SH_STORE_KEY_MAX + 1, &got), SH_ERR_NOT_FOUND);
    assert_int_equal(sh_txn_del(txn, 0, bytes, 0, &err), SH_OK);
    /* None of that spoiled the transaction. */
    assert_int_equal(sh_txn_put(txn, 0, bytes, SH_STORE_KEY_MAX, NULL, 0, &err), SH_OK);
    value_fill(1, value, sizeof(value));
    assert_int_equal(sh_txn_put(txn, 1, bytes, 1, value, sizeof(value), &err), SH_OK);
    assert_int_equal(sh_txn_commit(&txn, &err), SH_OK);
    txn = begin(f, SH_TXN_READ);
    assert_int_equal(sh_txn_get(txn, 0, bytes, SH_STORE_KEY_MAX, &got), SH_OK);
    assert_int_equal(got.n, 0);
    assert_int_equal(sh_txn_get(txn, 1, bytes, 1, &got), SH_OK);
    assert_true(value_is(1, sizeof(value), got));
    assert_int_equal(sh_txn_get(txn, 1, bytes, 2, NULL), SH_ERR_NOT_FOUND);
    sh_txn_abort(&txn);
}

static void test_one_writer(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    sh_txn *first = begin(f, SH_TXN_WRITE), *second = NULL;
    assert_int_equal(sh_txn_begin(f->store, SH_TXN_WRITE, &second, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_txn_begin(f->store, SH_TXN_RESERVE, &second, &err), SH_ERR_LIMIT);
    assert_null(second);
    sh_txn_abort(&first);
    sh_txn *readers[3];
    for (size_t i = 0; i < SH_COUNT(readers); i++)
        readers[i] = begin(f, SH_TXN_READ);
    if (!f->lmdb) { /* no snapshots there */
        assert_int_equal(sh_txn_begin(f->store, SH_TXN_WRITE, &second, &err), SH_ERR_LIMIT);
        assert_null(second);
    }
    for (size_t i = 0; i < SH_COUNT(readers); i++)
        sh_txn_abort(&readers[i]);
    first = begin(f, SH_TXN_WRITE);
    sh_txn_abort(&first);
    assert_int_equal(sh_store_sync(f->store, &err), SH_OK);
}

static void test_tables(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    sh_store *store = NULL;
    sh_store_options options = small;
    static const char *many[SH_STORE_TABLES_MAX + 1];
    for (size_t i = 0; i < SH_COUNT(many); i++)
        many[i] = "name";
    options.tables = many;
    options.n_tables = SH_COUNT(many);
    const char *other = temp_path(&f->dir, "other");
    for (int lmdb = 0; lmdb < 2; lmdb++) {
        assert_int_equal(lmdb ? sh_store_open_lmdb(other, &options, &store, &err)
                              : sh_store_open_memory(&options, &store, &err),
                         SH_ERR_LIMIT);
        assert_non_null(strstr(err.text, "17 tables"));
        assert_null(store);
    }
}

/* Each allocation of ours fails in turn: an error, and the store as before. */
static void test_no_memory(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    must(put_item(f, SH_TXN_WRITE, 0, &err), &err, "put");
    for (size_t n = 1;; n++) {
        (void)sh_alloc_fail_after(n);
        sh_status status = put_item(f, SH_TXN_WRITE, 1, &err);
        (void)sh_alloc_fail_after(0);
        if (status == SH_OK) {
            assert_true(n > 1);
            break;
        }
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_items(f, 0, 1);
    }
    assert_items(f, 0, 2);
}

/* ---- LMDB alone ---- */

/* Readers pin pages, and keep the map from changing: what is refused then is refused whole, and
 * works when they have ended. */
static void test_full_with_reader(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    uint64_t next = fill_up(f, 0), first = 0;
    sh_txn *reader = begin(f, SH_TXN_READ);
    sh_status status = SH_OK;
    for (int i = 0; i < 40 && status == SH_OK; i++) {
        status = del_item(f, first, &err);
        if (status == SH_OK)
            first++;
    }
    assert_true(status == SH_OK || status == SH_ERR_FULL);
    assert_int_equal(sh_txn_count(reader, 0), next);
    sh_txn_abort(&reader);
    assert_items(f, first, next);
    while (first < next / 2)
        must(del_item(f, first++, &err), &err, "delete after the reader ended");
    /* A reader that began on the whole map: plain writers may be refused, never let in there. */
    uint64_t more = fill_up(f, next);
    assert_true(more > next);
    sh_txn *deleter = begin(f, SH_TXN_RESERVE);
    reader = begin(f, SH_TXN_READ);
    sh_txn_abort(&deleter);
    assert_int_equal(put_item(f, SH_TXN_WRITE, more, &err), SH_ERR_FULL);
    sh_txn_abort(&reader);
    must(del_item(f, first++, &err), &err, "delete");
    assert_items(f, first, more);
}

/* Opened again with a larger limit a full store takes more, and keeps what it had; with a smaller
 * one it opens, and can be deleted from. */
static void test_other_limit(void **state)
{
    fixture *f = *state;
    sh_error err = {0};
    uint64_t next = fill_up(f, 0);
    sh_store_close(&f->store);
    sh_store_options options = small;
    options.bytes_max = 4 * BYTES_MAX;
    open_store(f, &options);
    uint64_t more = fill_up(f, next);
    assert_true(more > 2 * next);
    assert_items(f, 0, more);
    sh_store_close(&f->store);
    open_store(f, &small);
    assert_items(f, 0, more);
    uint64_t first = 0;
    sh_status status = SH_OK;
    while (first < more && (status = del_item(f, first, &err)) == SH_OK)
        first++;
    assert_int_equal(status, SH_OK);
    assert_items(f, more, more);
}

int main(void)
{
#define BOTH(test)                                                                                 \
    {#test " (lmdb)", test, setup_lmdb, teardown, NULL},                                           \
    {                                                                                              \
#test " (memory)", test, setup_memory, teardown, NULL                                      \
    }
    const struct CMUnitTest tests[] = {
        BOTH(test_full),
        BOTH(test_reserve_ends),
        BOTH(test_failed_transaction),
        BOTH(test_sizes),
        BOTH(test_one_writer),
        BOTH(test_tables),
        BOTH(test_no_memory),
        cmocka_unit_test_setup_teardown(test_full_with_reader, setup_lmdb, teardown),
        cmocka_unit_test_setup_teardown(test_other_limit, setup_lmdb, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
