/*
 * Random operations on the LMDB store, the memory store and a naive model (a sorted array) side by
 * side: all answers equal, after every operation. A process that dies in a transaction leaves the
 * same in both: nothing of it, or all (what LMDB's own files hold then is test_store_crash.c's).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/rng.h"
#include "shared/store/simulated.h"
#include "tests/store/util.h"

#define TABLES      2
#define ENTRIES_MAX 600
#define SEEDS       60
#define OPERATIONS  700
#define VALUE_LARGE 20000 /* several pages */

static const char *const tables[TABLES] = {"one", "two"};
static const sh_store_options options = {
    .tables = tables, .n_tables = TABLES, .bytes_max = 64 << 20, .no_sync = true};

typedef struct {
    uint8_t key[SH_STORE_KEY_MAX];
    size_t key_n;
    uint64_t value_seed;
    size_t value_n;
} entry;

typedef struct {
    entry entries[TABLES][ENTRIES_MAX]; /* sorted */
    size_t n[TABLES];
} model;

enum { LMDB, MEMORY, SUTS };

typedef struct {
    sh_rng rng;
    uint64_t seed;
    unsigned step;
    const char *operation;
    temp_dir dir;
    sh_store *store[SUTS];
    sh_txn *txn[SUTS];
    sh_cursor *cursor[SUTS];
    unsigned cursor_table;
    bool placed; /* the cursors; at `at` */
    entry at;
    int kind;
    model committed, now;
    sh_txn *snapshot; /* a reader of the LMDB store, which sees `then` */
    model then;
} run;

#define CHECK(r, cond, ...)                                                                        \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            print_error("seed %llu step %u, %s: %s: ", (unsigned long long)(r)->seed, (r)->step,   \
                        (r)->operation, #cond);                                                    \
            print_error(__VA_ARGS__);                                                              \
            fail();                                                                                \
        }                                                                                          \
    } while (0)

static int order(const uint8_t *a, size_t a_n, const uint8_t *b, size_t b_n)
{
    int c = memcmp(a, b, SH_MIN(a_n, b_n));
    return c ? c : (a_n > b_n) - (a_n < b_n);
}

/* The first entry >= key (or > key). */
static size_t model_find(const model *m, unsigned t, const entry *key, bool above)
{
    size_t i = 0;
    while (i < m->n[t] && order(m->entries[t][i].key, m->entries[t][i].key_n, key->key,
                                key->key_n) < (above ? 1 : 0))
        i++;
    return i;
}

static bool model_has(const model *m, unsigned t, const entry *key, size_t *i)
{
    *i = model_find(m, t, key, false);
    return *i < m->n[t] &&
           order(m->entries[t][*i].key, m->entries[t][*i].key_n, key->key, key->key_n) == 0;
}

static void model_put(model *m, unsigned t, const entry *e)
{
    size_t i;
    if (!model_has(m, t, e, &i)) {
        SH_ASSERT(m->n[t] < ENTRIES_MAX);
        memmove(&m->entries[t][i + 1], &m->entries[t][i], (m->n[t] - i) * sizeof(entry));
        m->n[t]++;
    }
    m->entries[t][i] = *e;
}

static void model_del(model *m, unsigned t, const entry *key)
{
    size_t i;
    if (!model_has(m, t, key, &i))
        return;
    m->n[t]--;
    memmove(&m->entries[t][i], &m->entries[t][i + 1], (m->n[t] - i) * sizeof(entry));
}

/* Short keys of few letters meet each other often; long ones differ at their end. */
static entry random_key(run *r)
{
    static const uint8_t letters[] = {0, 1, 'a', 'b', 0x7f, 0x80, 0xff};
    entry e = {0};
    if (sh_rng_below(&r->rng, 5) == 0) {
        e.key_n = SH_STORE_KEY_MAX - sh_rng_below(&r->rng, 3);
        memset(e.key, 'k', e.key_n);
        e.key[e.key_n - 1] = letters[sh_rng_below(&r->rng, sizeof(letters))];
    } else {
        e.key_n = 1 + sh_rng_below(&r->rng, 4);
        for (size_t i = 0; i < e.key_n; i++)
            e.key[i] = letters[sh_rng_below(&r->rng, sizeof(letters))];
    }
    return e;
}

/* A key that is there, if one is. */
static entry some_key(run *r, unsigned t)
{
    if (r->now.n[t] == 0 || sh_rng_below(&r->rng, 4) == 0)
        return random_key(r);
    return r->now.entries[t][sh_rng_below(&r->rng, r->now.n[t])];
}

static void check_entry(run *r, const char *which, const entry *want, const sh_slice *key,
                        sh_slice value)
{
    if (key) {
        CHECK(r, key->n == want->key_n, "%s: %zu bytes, want %zu", which, key->n, want->key_n);
        CHECK(r, memcmp(key->data, want->key, key->n) == 0, "%s: another key", which);
    }
    CHECK(r, value_is(want->value_seed, want->value_n, value), "%s: value of %zu bytes, want %zu",
          which, value.n, want->value_n);
}

static const char *const names[SUTS] = {"lmdb", "memory"};

/* All of a table, through a cursor of its own. */
static void check_scan(run *r, sh_txn *txn, const model *m, const char *which)
{
    for (unsigned t = 0; t < TABLES; t++) {
        sh_cursor *cursor = NULL;
        sh_slice key, value;
        assert_int_equal(sh_cursor_open(txn, t, &cursor, NULL), SH_OK);
        sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
        for (size_t i = 0; i < m->n[t]; i++) {
            CHECK(r, status == SH_OK, "%s: table %u ends after %zu of %zu", which, t, i, m->n[t]);
            check_entry(r, which, &m->entries[t][i], &key, value);
            status = sh_cursor_next(cursor, &key, &value);
        }
        CHECK(r, status == SH_ERR_NOT_FOUND, "%s: table %u goes on after %zu", which, t, m->n[t]);
        sh_cursor_close(&cursor);
        CHECK(r, sh_txn_count(txn, t) == m->n[t], "%s: count %llu, want %zu", which,
              (unsigned long long)sh_txn_count(txn, t), m->n[t]);
    }
}

static void check_found(run *r, bool found, const entry *want, const sh_status status[SUTS],
                        sh_slice key[SUTS], sh_slice value[SUTS])
{
    for (int k = 0; k < SUTS; k++) {
        sh_status expected = found ? SH_OK : SH_ERR_NOT_FOUND;
        CHECK(r, status[k] == expected, "%s: %s, want %s", names[k], sh_status_name(status[k]),
              sh_status_name(expected));
        if (found)
            check_entry(r, names[k], want, key ? &key[k] : NULL, value[k]);
    }
}

/* ---- operations ---- */

static void do_begin(run *r)
{
    static const int kinds[] = {SH_TXN_READ, SH_TXN_WRITE, SH_TXN_WRITE, SH_TXN_RESERVE};
    r->kind = kinds[sh_rng_below(&r->rng, SH_COUNT(kinds))];
    r->cursor_table = (unsigned)sh_rng_below(&r->rng, TABLES);
    r->placed = false;
    for (int k = 0; k < SUTS; k++) {
        sh_error err = {0};
        sh_status status = sh_txn_begin(r->store[k], r->kind, &r->txn[k], &err);
        CHECK(r, status == SH_OK, "%s", err.text);
        status = sh_cursor_open(r->txn[k], r->cursor_table, &r->cursor[k], &err);
        CHECK(r, status == SH_OK, "%s", err.text);
    }
}

static void do_end(run *r, bool commit)
{
    for (int k = 0; k < SUTS; k++) {
        check_scan(r, r->txn[k], &r->now, names[k]);
        sh_cursor_close(&r->cursor[k]);
        sh_error err = {0};
        if (commit)
            CHECK(r, sh_txn_commit(&r->txn[k], &err) == SH_OK, "%s", err.text);
        else
            sh_txn_abort(&r->txn[k]);
        assert_null(r->txn[k]);
    }
    if (commit)
        r->committed = r->now;
    else
        r->now = r->committed;
}

static void open_lmdb(run *r)
{
    sh_error err = {0};
    sh_status status = sh_store_open_lmdb(r->dir.path, &options, &r->store[LMDB], &err);
    CHECK(r, status == SH_OK, "%s", err.text);
}

/* Dies in the commit (durable or not), or at a write before it; both start again. */
static void do_crash(run *r)
{
    sh_store *memory = r->store[MEMORY];
    bool at_write = sh_rng_below(&r->rng, 2), durable = !at_write && sh_rng_below(&r->rng, 2);
    sh_error err = {0};
    for (int k = 0; k < SUTS; k++)
        sh_cursor_close(&r->cursor[k]);
    sh_store_simulate_crash(memory, 1, durable);
    if (at_write) {
        sh_status status = sh_txn_put(r->txn[MEMORY], 0, "k", 1, "v", 1, NULL);
        CHECK(r, status == SH_ERR_CRASHED, "%s", sh_status_name(status));
    }
    sh_status status = sh_txn_commit(&r->txn[MEMORY], &err);
    CHECK(r, status == SH_ERR_CRASHED, "%s", sh_status_name(status));
    CHECK(r, sh_store_simulate_crashed(memory), "%s", err.text);
    status = sh_txn_begin(memory, SH_TXN_READ, &r->txn[MEMORY], &err);
    CHECK(r, status == SH_ERR_CRASHED, "a crashed store begins a transaction");
    sh_store_simulate_restart(memory, 0);
    if (durable)
        CHECK(r, sh_txn_commit(&r->txn[LMDB], &err) == SH_OK, "%s", err.text);
    else
        sh_txn_abort(&r->txn[LMDB]);
    if (!r->snapshot) {
        sh_store_close(&r->store[LMDB]);
        open_lmdb(r);
    }
    if (durable)
        r->committed = r->now;
    else
        r->now = r->committed;
}

static void do_put(run *r, unsigned t)
{
    entry e = sh_rng_below(&r->rng, 3) ? random_key(r) : some_key(r, t);
    size_t i;
    if (r->now.n[t] == ENTRIES_MAX && !model_has(&r->now, t, &e, &i))
        return;
    static uint8_t value[VALUE_LARGE];
    e.value_seed = sh_rng_u64(&r->rng);
    e.value_n = sh_rng_below(&r->rng, sh_rng_below(&r->rng, 10) ? 100 : VALUE_LARGE);
    value_fill(e.value_seed, value, e.value_n);
    model_put(&r->now, t, &e);
    for (int k = 0; k < SUTS; k++) {
        sh_error err = {0};
        sh_status status =
            sh_txn_put(r->txn[k], t, e.key, e.key_n, e.value_n ? value : NULL, e.value_n, &err);
        CHECK(r, status == SH_OK, "%s", err.text);
    }
}

static void do_del(run *r, unsigned t, const entry *e)
{
    model_del(&r->now, t, e);
    for (int k = 0; k < SUTS; k++) {
        sh_error err = {0};
        sh_status status = sh_txn_del(r->txn[k], t, e->key, e->key_n, &err);
        CHECK(r, status == SH_OK, "%s", err.text);
    }
}

static void do_get(run *r, unsigned t)
{
    entry e = some_key(r, t);
    size_t i;
    bool found = model_has(&r->now, t, &e, &i);
    sh_slice value[SUTS];
    sh_status status[SUTS];
    for (int k = 0; k < SUTS; k++)
        status[k] = sh_txn_get(r->txn[k], t, e.key, e.key_n, &value[k]);
    check_found(r, found, &r->now.entries[t][i], status, NULL, value);
}

typedef enum { SEEK, NEXT, LAST } movement;

static void do_move(run *r, movement how)
{
    const model *m = &r->now;
    unsigned t = r->cursor_table;
    entry from = some_key(r, t);
    if (sh_rng_below(&r->rng, 8) == 0)
        from.key_n = 0;
    size_t i = m->n[t];
    if (how == SEEK)
        i = model_find(m, t, &from, false);
    else if (how == NEXT && r->placed)
        i = model_find(m, t, &r->at, true);
    else if (how == LAST && m->n[t] > 0)
        i = m->n[t] - 1;
    bool found = i < m->n[t];
    sh_slice key[SUTS], value[SUTS];
    sh_status status[SUTS];
    for (int k = 0; k < SUTS; k++)
        status[k] = how == SEEK
                        ? sh_cursor_seek(r->cursor[k], from.key, from.key_n, &key[k], &value[k])
                    : how == NEXT ? sh_cursor_next(r->cursor[k], &key[k], &value[k])
                                  : sh_cursor_last(r->cursor[k], &key[k], &value[k]);
    check_found(r, found, &m->entries[t][i < ENTRIES_MAX ? i : 0], status, key, value);
    r->placed = found;
    if (found)
        r->at = m->entries[t][i];
}

static void do_between(run *r)
{
    switch (sh_rng_below(&r->rng, 6)) {
    case 0:
        r->operation = "reopen";
        if (r->snapshot)
            break;
        sh_store_close(&r->store[LMDB]);
        open_lmdb(r);
        break;
    case 1:
        r->operation = "snapshot";
        if (r->snapshot) {
            check_scan(r, r->snapshot, &r->then, "snapshot");
            sh_txn_abort(&r->snapshot);
        } else {
            r->then = r->committed;
            assert_int_equal(sh_txn_begin(r->store[LMDB], SH_TXN_READ, &r->snapshot, NULL), SH_OK);
        }
        break;
    default:
        r->operation = "begin";
        do_begin(r);
    }
}

static void do_within(run *r)
{
    bool writes = r->kind != SH_TXN_READ;
    unsigned t = (unsigned)sh_rng_below(&r->rng, TABLES);
    uint64_t dice = sh_rng_below(&r->rng, 100);
    if (dice < 3) {
        r->operation = "commit";
        do_end(r, true);
    } else if (dice < 5) {
        r->operation = "abort";
        do_end(r, false);
    } else if (dice < 6 && writes) {
        r->operation = "crash";
        do_crash(r);
    } else if (dice < 40 && writes) {
        r->operation = "put";
        do_put(r, t);
    } else if (dice < 50 && writes) {
        r->operation = "del";
        entry e = some_key(r, t);
        do_del(r, t, &e);
    } else if (dice < 60 && writes && r->placed) {
        r->operation = "del at cursor";
        do_del(r, r->cursor_table, &r->at);
    } else if (dice < 70) {
        r->operation = "get";
        do_get(r, t);
    } else if (dice < 78) {
        r->operation = "seek";
        do_move(r, SEEK);
    } else if (dice < 97) {
        r->operation = "next";
        do_move(r, NEXT);
    } else {
        r->operation = "last";
        do_move(r, LAST);
    }
}

static void test_model(void **state)
{
    (void)state;
    run *r = malloc(sizeof(*r));
    assert_non_null(r);
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        memset(r, 0, sizeof(*r));
        r->seed = seed;
        r->operation = "open";
        sh_rng_init(&r->rng, seed, 0, 1);
        r->dir = temp_dir_make();
        open_lmdb(r);
        assert_int_equal(sh_store_open_memory(&options, &r->store[MEMORY], NULL), SH_OK);
        for (r->step = 0; r->step < OPERATIONS; r->step++) {
            if (r->txn[0])
                do_within(r);
            else
                do_between(r);
        }
        r->operation = "end";
        if (r->txn[0])
            do_end(r, true);
        if (r->snapshot)
            check_scan(r, r->snapshot, &r->then, "snapshot");
        sh_txn_abort(&r->snapshot);
        for (int k = 0; k < SUTS; k++)
            sh_store_close(&r->store[k]);
        temp_dir_remove(&r->dir);
    }
    free(r);
}

/* Order and large counts: numbers in random order, half of them deleted again. */
static void test_many(void **state)
{
    (void)state;
    enum { MANY = 5000 };
    temp_dir dir = temp_dir_make();
    sh_store *store[SUTS];
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store[LMDB], NULL), SH_OK);
    assert_int_equal(sh_store_open_memory(&options, &store[MEMORY], NULL), SH_OK);
    static uint32_t shuffled[MANY];
    for (uint32_t i = 0; i < MANY; i++)
        shuffled[i] = i;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 2);
    sh_rng_shuffle(&rng, shuffled, MANY);
    for (int k = 0; k < SUTS; k++) {
        sh_txn *txn = NULL;
        sh_cursor *cursor = NULL;
        uint8_t key[8];
        assert_int_equal(sh_txn_begin(store[k], SH_TXN_WRITE, &txn, NULL), SH_OK);
        for (size_t i = 0; i < MANY; i++) {
            sh_key_put_u64(key, shuffled[i]);
            assert_int_equal(sh_txn_put(txn, 0, key, 8, &shuffled[i], 4, NULL), SH_OK);
        }
        assert_int_equal(sh_txn_count(txn, 0), MANY);
        assert_int_equal(sh_cursor_open(txn, 0, &cursor, NULL), SH_OK);
        sh_slice got, value;
        sh_status status = sh_cursor_seek(cursor, NULL, 0, &got, &value);
        for (uint64_t want = 0; want < MANY; want++) {
            assert_int_equal(status, SH_OK);
            assert_int_equal(sh_key_get_u64(got.data), want);
            sh_key_put_u64(key, want);
            if (want % 2)
                assert_int_equal(sh_txn_del(txn, 0, key, 8, NULL), SH_OK);
            status = sh_cursor_next(cursor, &got, &value);
        }
        assert_int_equal(status, SH_ERR_NOT_FOUND);
        sh_cursor_close(&cursor);
        assert_int_equal(sh_txn_count(txn, 0), MANY / 2);
        assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
        sh_store_close(&store[k]);
    }
    temp_dir_remove(&dir);
}

#define ROWS 3000

/* A number's key; all keys have their first bytes in common. */
static void key_of(uint8_t key[16], uint32_t i)
{
    memcpy(key, "the same", 8);
    sh_key_put_u64(key + 8, i);
}

static void check_even_rows(sh_txn *txn)
{
    sh_cursor *cursor = NULL;
    sh_slice got, value;
    assert_int_equal(sh_txn_count(txn, 0), ROWS / 2);
    assert_int_equal(sh_cursor_open(txn, 0, &cursor, NULL), SH_OK);
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &got, &value);
    for (uint32_t i = 0; i < ROWS; i += 2) {
        uint8_t key[16];
        key_of(key, i);
        assert_int_equal(status, SH_OK);
        assert_memory_equal(got.data, key, sizeof key);
        assert_memory_equal(value.data, &i, sizeof i);
        assert_int_equal(sh_txn_get(txn, 0, key, sizeof key, &value), SH_OK);
        assert_memory_equal(value.data, &i, sizeof i);
        status = sh_cursor_next(cursor, &got, &value);
    }
    assert_int_equal(status, SH_ERR_NOT_FOUND);
    sh_cursor_close(&cursor);
}

/* A transaction that takes all rows out and puts others in, in random order, and is given up. */
static void test_abort_of_many(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store[SUTS];
    uint32_t shuffled[ROWS];
    sh_rng rng;
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store[LMDB], NULL), SH_OK);
    assert_int_equal(sh_store_open_memory(&options, &store[MEMORY], NULL), SH_OK);
    for (uint32_t i = 0; i < ROWS; i++)
        shuffled[i] = i;
    sh_rng_init(&rng, 1, 0, 3);
    for (int k = 0; k < SUTS; k++) {
        sh_txn *txn = NULL;
        uint8_t key[16];
        assert_int_equal(sh_txn_begin(store[k], SH_TXN_WRITE, &txn, NULL), SH_OK);
        for (uint32_t i = 0; i < ROWS; i += 2) {
            key_of(key, i);
            assert_int_equal(sh_txn_put(txn, 0, key, sizeof key, &i, sizeof i, NULL), SH_OK);
        }
        check_even_rows(txn);
        assert_int_equal(sh_txn_commit(&txn, NULL), SH_OK);
        for (int turn = 0; turn < 3; turn++) {
            sh_rng_shuffle(&rng, shuffled, ROWS);
            assert_int_equal(sh_txn_begin(store[k], SH_TXN_WRITE, &txn, NULL), SH_OK);
            for (size_t i = 0; i < ROWS; i++) {
                key_of(key, shuffled[i]);
                if (shuffled[i] % 2 == 0)
                    assert_int_equal(sh_txn_del(txn, 0, key, sizeof key, NULL), SH_OK);
                else if (turn > 0) /* at first there is nothing left */
                    assert_int_equal(sh_txn_put(txn, 0, key, sizeof key, NULL, 0, NULL), SH_OK);
            }
            assert_int_equal(sh_txn_count(txn, 0), turn > 0 ? ROWS / 2 : 0);
            sh_txn_abort(&txn);
            assert_int_equal(sh_txn_begin(store[k], SH_TXN_READ, &txn, NULL), SH_OK);
            check_even_rows(txn);
            sh_txn_abort(&txn);
        }
        sh_store_close(&store[k]);
    }
    temp_dir_remove(&dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_abort_of_many),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
