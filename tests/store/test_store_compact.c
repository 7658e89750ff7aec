/*
 * What compaction and backup promise: what was deleted is in no file of the folder any more, what
 * was not is all there, a kill at any moment changes neither, and a copy made beside a writer is
 * one of its commits. The program is its own child: `test_store_compact ROLE DIR`.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "tests/store/util.h"

#define ROWS      600
#define VALUE_MAX 6000
#define FILE_MAX  (64u << 20)
#define KILLS     25

static const char *const tables[] = {"items", "other"};
static const char secret[] = "what the user wrote, and then asked to be erased";
static sh_error err;

static sh_store *open_store(const char *dir)
{
    sh_store *store = NULL;
    sh_store_options options = {.tables = tables, .n_tables = 2, .bytes_max = 32 << 20};
    must(sh_store_open_lmdb(dir, &options, &store, &err), &err, "open");
    return store;
}

/* Values of all sizes: on a leaf, on overflow pages, and what only just fits either. */
static size_t row_bytes(uint64_t i)
{
    return i % 3 ? i * 37 % 900 : i * 811 % VALUE_MAX;
}

static void put_row(sh_txn *txn, uint64_t i, bool with_secret)
{
    static _Thread_local uint8_t value[VALUE_MAX + sizeof(secret)];
    uint8_t key[8];
    size_t n = row_bytes(i);
    sh_key_put_u64(key, i);
    value_fill(i, value, n);
    if (with_secret) { /* at the end: where a page's slack would keep it */
        memcpy(value + n, secret, sizeof(secret));
        n += sizeof(secret);
    }
    must(sh_txn_put(txn, i % 2, key, sizeof(key), value, n, &err), &err, "put");
}

static void fill(sh_store *store, uint64_t from, uint64_t to, bool with_secret)
{
    sh_txn *txn = NULL;
    must(sh_txn_begin(store, SH_TXN_WRITE, &txn, &err), &err, "begin");
    for (uint64_t i = from; i < to; i++)
        put_row(txn, i, with_secret);
    must(sh_txn_commit(&txn, &err), &err, "commit");
}

static void drop(sh_store *store, uint64_t from, uint64_t to)
{
    sh_txn *txn = NULL;
    uint8_t key[8];
    must(sh_txn_begin(store, SH_TXN_WRITE, &txn, &err), &err, "begin");
    for (uint64_t i = from; i < to; i++) {
        sh_key_put_u64(key, i);
        must(sh_txn_del(txn, i % 2, key, sizeof(key), &err), &err, "del");
    }
    must(sh_txn_commit(&txn, &err), &err, "commit");
}

static void assert_rows(sh_store *store, uint64_t n)
{
    sh_txn *txn = NULL;
    must(sh_txn_begin(store, SH_TXN_READ, &txn, &err), &err, "begin");
    assert_int_equal(sh_txn_count(txn, 0) + sh_txn_count(txn, 1), n);
    for (uint64_t i = 0; i < n; i++) {
        uint8_t key[8];
        sh_slice value;
        sh_key_put_u64(key, i);
        assert_int_equal(sh_txn_get(txn, i % 2, key, sizeof(key), &value), SH_OK);
        assert_true(value_is(i, row_bytes(i), value));
    }
    sh_txn_abort(&txn);
}

/* How many files of the folder hold the secret. */
static unsigned files_with_secret(const char *dir)
{
    DIR *d = opendir(dir);
    unsigned found = 0;
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char path[512];
        uint8_t *bytes = NULL;
        size_t n = 0;
        snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
        if (e->d_type != DT_REG)
            continue;
        must(sh_file_read(path, FILE_MAX, &bytes, &n, &err), &err, "read");
        found += n > 0 && memmem(bytes, n, secret, sizeof(secret) - 1) != NULL;
        free(bytes);
    }
    closedir(d);
    return found;
}

static void test_erased_is_gone(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store = open_store(dir.path);
    fill(store, 0, ROWS, true);
    fill(store, 0, ROWS, false); /* shorter, in their place */
    fill(store, ROWS, 3 * ROWS, true);
    drop(store, ROWS, 3 * ROWS);
    assert_int_equal(files_with_secret(dir.path), 1); /* or the test shows nothing */
    uint64_t before = sh_store_bytes_used(store);
    must(sh_store_compact(store, &err), &err, "compact");
    assert_int_equal(files_with_secret(dir.path), 0);
    assert_true(sh_store_bytes_used(store) <= before);
    assert_false(sh_file_exists(temp_path(&dir, "compact")));
    assert_rows(store, ROWS);
    fill(store, ROWS, ROWS + 50, false); /* it goes on */
    sh_store_close(&store);
    store = open_store(dir.path);
    assert_rows(store, ROWS + 50);
    must(sh_store_compact(store, &err), &err, "compact again");
    assert_rows(store, ROWS + 50);
    sh_store_close(&store);
    temp_dir_remove(&dir);
}

static void test_not_under_a_transaction(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store = open_store(dir.path);
    sh_txn *txn = NULL;
    fill(store, 0, 10, false);
    must(sh_txn_begin(store, SH_TXN_READ, &txn, &err), &err, "begin");
    assert_int_equal(sh_store_compact(store, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "transaction is open"));
    sh_txn_abort(&txn);
    must(sh_store_compact(store, &err), &err, "compact");
    assert_rows(store, 10);
    sh_store_close(&store);
    temp_dir_remove(&dir);
}

/* Holds the store open to read until its input ends. */
static int role_reader(const char *dir)
{
    sh_store *store = NULL;
    sh_store_options options = {
        .tables = tables, .n_tables = 2, .bytes_max = 32 << 20, .read_only = true};
    must(sh_store_open_lmdb(dir, &options, &store, &err), &err, "open");
    char c = 'r';
    if (write(STDOUT_FILENO, &c, 1) != 1)
        return 1;
    while (read(STDIN_FILENO, &c, 1) > 0)
        continue;
    sh_store_close(&store);
    return 0;
}

static void test_not_beside_a_reader(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store = open_store(dir.path);
    fill(store, 0, 10, false);
    int in = -1, out = -1;
    const char *const args[] = {"reader", dir.path, NULL};
    pid_t pid = spawn_self(args, &in, &out);
    char c = 0;
    assert_int_equal(read(out, &c, 1), 1);
    assert_int_equal(sh_store_compact(store, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "another process reads it"));
    assert_rows(store, 10);
    close(in);
    assert_int_equal(wait_exit(pid), 0);
    close(out);
    must(sh_store_compact(store, &err), &err, "compact");
    assert_rows(store, 10);
    sh_store_close(&store);
    temp_dir_remove(&dir);
}

/* Compacts until it is killed, a byte to its output each time. */
static int role_compactor(const char *dir)
{
    sh_store *store = open_store(dir);
    for (;;) {
        char c = 'c';
        must(sh_store_compact(store, &err), &err, "compact");
        if (write(STDOUT_FILENO, &c, 1) != 1)
            return 1;
    }
}

static void test_killed_in_it(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_rng rng;
    sh_rng_init(&rng, 5, 0, 0);
    sh_store *store = open_store(dir.path);
    fill(store, 0, ROWS, false);
    sh_store_close(&store);
    unsigned unfinished = 0;
    for (unsigned i = 0; i < KILLS; i++) {
        int in = -1, out = -1;
        char c;
        const char *const args[] = {"compactor", dir.path, NULL};
        pid_t pid = spawn_self(args, &in, &out);
        assert_int_equal(read(out, &c, 1), 1);
        struct timespec moment = {.tv_nsec = (long)sh_rng_below(&rng, 20000000)}; /* any one */
        nanosleep(&moment, NULL);
        kill(pid, SIGKILL);
        assert_int_equal(wait_exit(pid), -SIGKILL);
        close(in);
        close(out);
        unfinished += sh_file_exists(temp_path(&dir, "compact"));
        store = open_store(dir.path);
        assert_false(sh_file_exists(temp_path(&dir, "compact")));
        assert_rows(store, ROWS);
        sh_store_close(&store);
    }
    print_message("%u of %u kills left a compaction unfinished\n", unfinished, KILLS);
    assert_true(unfinished > 0);
    temp_dir_remove(&dir);
}

typedef struct {
    sh_store *store;
    _Atomic bool stop;
    _Atomic uint64_t commits;
} writer;

/* Commit i deletes i's two rows of before and puts two: there are always those of one commit. */
static void *write_on(void *arg)
{
    writer *w = arg;
    for (uint64_t i = 1; !atomic_load(&w->stop); i++) {
        sh_txn *txn = NULL;
        sh_error mine = {0};
        must(sh_txn_begin(w->store, SH_TXN_WRITE, &txn, &mine), &mine, "begin");
        for (unsigned t = 0; t < 2; t++)
            must(sh_txn_put(txn, t, "now", 3, &i, sizeof(i), &mine), &mine, "put");
        must(sh_txn_commit(&txn, &mine), &mine, "commit");
        atomic_store(&w->commits, i);
    }
    return NULL;
}

static void assert_one_commit(const char *dir, uint64_t *last)
{
    sh_store *copy = open_store(dir);
    sh_txn *txn = NULL;
    sh_slice value;
    uint64_t got[2];
    must(sh_txn_begin(copy, SH_TXN_READ, &txn, &err), &err, "begin");
    for (unsigned t = 0; t < 2; t++) {
        assert_int_equal(sh_txn_get(txn, t, "now", 3, &value), SH_OK);
        memcpy(&got[t], value.data, sizeof(got[t]));
    }
    assert_int_equal(got[0], got[1]);
    assert_true(got[0] > *last);
    *last = got[0];
    assert_int_equal(sh_txn_count(txn, 0) + sh_txn_count(txn, 1), ROWS + 2);
    sh_txn_abort(&txn);
    sh_store_close(&copy);
}

static void test_backup_under_a_writer(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    writer w = {.store = open_store(temp_path(&dir, "store"))};
    fill(w.store, 0, ROWS, false);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, write_on, &w), 0);
    uint64_t last = 0;
    for (unsigned i = 0; i < 5; i++) {
        char name[16];
        uint64_t seen = atomic_load(&w.commits);
        while (atomic_load(&w.commits) < seen + 2)
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        snprintf(name, sizeof(name), "copy%u", i);
        const char *to = temp_path(&dir, name);
        must(sh_store_backup(w.store, to, &err), &err, "backup");
        assert_one_commit(to, &last);
        assert_int_equal(sh_store_backup(w.store, to, &err), SH_ERR_EXISTS);
    }
    atomic_store(&w.stop, true);
    pthread_join(thread, NULL);
    must(sh_store_compact(w.store, &err), &err, "compact");
    sh_store_close(&w.store);
    temp_dir_remove(&dir);
}

static void test_memory_store(void **state)
{
    (void)state;
    sh_store *store = NULL;
    sh_store_options options = {.tables = tables, .n_tables = 2, .bytes_max = 32 << 20};
    must(sh_store_open_memory(&options, &store, &err), &err, "open");
    fill(store, 0, 10, false);
    must(sh_store_compact(store, &err), &err, "compact");
    assert_rows(store, 10);
    assert_int_equal(sh_store_backup(store, "/nowhere", &err), SH_ERR_UNSUPPORTED);
    sh_store_close(&store);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "compactor") == 0)
        return role_compactor(argv[2]);
    if (argc == 3 && strcmp(argv[1], "reader") == 0)
        return role_reader(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_erased_is_gone),
        cmocka_unit_test(test_not_under_a_transaction),
        cmocka_unit_test(test_not_beside_a_reader),
        cmocka_unit_test(test_killed_in_it),
        cmocka_unit_test(test_backup_under_a_writer),
        cmocka_unit_test(test_memory_store),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
