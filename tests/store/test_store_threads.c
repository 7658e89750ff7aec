/* Threads: readers see whole commits of a writer beside them (LMDB), or each other (memory). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "tests/store/util.h"

#define READERS 3
#define COMMITS 200
#define READS   200
#define KEYS    16

static const char *const tables[] = {"items"};

typedef struct {
    sh_store *store;
    atomic_uint bad, reads;
} shared;

/* All keys have the same value: that of one commit. */
static bool read_once(sh_store *store)
{
    sh_txn *txn = NULL;
    sh_cursor *cursor = NULL;
    sh_slice value;
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return false;
    if (sh_cursor_open(txn, 0, &cursor, NULL) != SH_OK) {
        sh_txn_abort(&txn);
        return false;
    }
    uint64_t first = 0, other;
    unsigned n = 0;
    bool same = true;
    for (sh_status status = sh_cursor_seek(cursor, NULL, 0, NULL, &value); status == SH_OK;
         status = sh_cursor_next(cursor, NULL, &value)) {
        memcpy(n ? &other : &first, value.data, sizeof(first));
        same = same && (n == 0 || other == first);
        n++;
    }
    sh_cursor_close(&cursor);
    sh_txn_abort(&txn);
    return same && n == KEYS;
}

static void *read_much(void *arg)
{
    shared *s = arg;
    for (int i = 0; i < READS; i++) {
        atomic_fetch_add(&s->bad, !read_once(s->store));
        atomic_fetch_add(&s->reads, 1);
    }
    return NULL;
}

static void commit(sh_store *store, uint64_t value)
{
    sh_txn *txn = NULL;
    sh_error err = {0};
    must(sh_txn_begin(store, SH_TXN_WRITE, &txn, &err), &err, "begin");
    for (uint8_t k = 0; k < KEYS; k++)
        must(sh_txn_put(txn, 0, &k, 1, &value, sizeof(value), &err), &err, "put");
    must(sh_txn_commit(&txn, &err), &err, "commit");
}

static void run(sh_store *store, bool writes)
{
    shared s = {.store = store};
    pthread_t readers[READERS];
    commit(store, 0);
    for (int i = 0; i < READERS; i++)
        assert_int_equal(pthread_create(&readers[i], NULL, read_much, &s), 0);
    for (uint64_t i = 1; i <= COMMITS && writes; i++)
        commit(store, i);
    for (int i = 0; i < READERS; i++)
        pthread_join(readers[i], NULL);
    assert_int_equal(atomic_load(&s.bad), 0);
    assert_int_equal(atomic_load(&s.reads), READERS * READS);
    commit(store, COMMITS + 1);
    sh_store_close(&store);
}

static void test_threads(void **state)
{
    (void)state;
    sh_store_options options = {
        .tables = tables, .n_tables = 1, .bytes_max = 16 << 20, .no_sync = true};
    sh_store *store = NULL;
    temp_dir dir = temp_dir_make();
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store, NULL), SH_OK);
    run(store, true);
    assert_int_equal(sh_store_open_memory(&options, &store, NULL), SH_OK);
    run(store, false);
    temp_dir_remove(&dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
