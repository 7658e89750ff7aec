/*
 * What a commit promises: SIGKILL at any moment, power loss at any write, failing writes; and who
 * may open an environment. The program is its own child: `test_store_crash ROLE DIR ...`.
 *
 * A writer's item i: the transaction puts two entries for it (one in each table, both or none) and
 * deletes item i - KEPT.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/store/disk.h"
#include "tests/store/util.h"

#define KEPT       40
#define VALUE_MAX  9000
#define KILLS      40
#define POWER_RUN  60 /* commits that are recorded */
#define EXIT_LOST  3
#define EXIT_ERROR 4

static const char *const tables[] = {"items", "twins"};

static sh_store_options options_of(bool no_sync)
{
    return (sh_store_options){
        .tables = tables, .n_tables = 2, .bytes_max = 16 << 20, .no_sync = no_sync};
}

static size_t value_bytes(uint64_t i, unsigned table)
{
    return table ? 30 : i % 5 ? i * 37 % 600 : i * 811 % VALUE_MAX;
}

static sh_status write_item(sh_store *store, uint64_t i, sh_error *err)
{
    static uint8_t value[VALUE_MAX];
    uint8_t key[8];
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
    for (unsigned t = 0; t < 2; t++) {
        sh_key_put_u64(key, i);
        value_fill(i + t, value, value_bytes(i, t));
        SH_GOTO(sh_txn_put(txn, t, key, sizeof(key), value, value_bytes(i, t), err));
        sh_key_put_u64(key, i - KEPT);
        if (i > KEPT)
            SH_GOTO(sh_txn_del(txn, t, key, sizeof(key), err));
    }
    status = sh_txn_commit(&txn, err);
cleanup:
    sh_txn_abort(&txn);
    return status;
}

/* The newest item, 0 when there is none; -1 when the tables do not hold exactly the items
 * (newest - KEPT, newest], twins included. */
static int64_t newest_item(sh_store *store)
{
    sh_txn *txn = NULL;
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    sh_error err = {0};
    must(sh_txn_begin(store, SH_TXN_READ, &txn, &err), &err, "begin");
    must(sh_cursor_open(txn, 0, &cursor, &err), &err, "cursor");
    uint64_t newest = 0;
    if (sh_cursor_last(cursor, &key, &value) == SH_OK && key.n == 8)
        newest = sh_key_get_u64(key.data);
    sh_cursor_close(&cursor);
    uint64_t oldest = newest > KEPT ? newest - KEPT + 1 : 1;
    bool whole = true;
    for (unsigned t = 0; t < 2; t++) {
        whole = whole && sh_txn_count(txn, t) == newest - oldest + 1;
        for (uint64_t i = oldest; i <= newest && whole; i++) {
            uint8_t k[8];
            sh_key_put_u64(k, i);
            whole = sh_txn_get(txn, t, k, sizeof(k), &value) == SH_OK &&
                    value_is(i + t, value_bytes(i, t), value);
        }
    }
    sh_txn_abort(&txn);
    return whole ? (int64_t)newest : -1;
}

static sh_store *open_or_die(const char *dir, bool no_sync)
{
    sh_store *store = NULL;
    sh_error err = {0};
    sh_store_options options = options_of(no_sync);
    must(sh_store_open_lmdb(dir, &options, &store, &err), &err, "open");
    return store;
}

/* ---- roles of the child ---- */

/* Commits items and writes each number to its standard output after the commit, until killed. */
static int role_writer(const char *dir)
{
    sh_store *store = open_or_die(dir, false);
    sh_error err = {0};
    for (uint64_t i = (uint64_t)newest_item(store) + 1;; i++) {
        must(write_item(store, i, &err), &err, "write");
        if (write(STDOUT_FILENO, &i, sizeof(i)) != sizeof(i))
            return 1;
    }
}

/* Whether the folder's store has all up to `acknowledged`. May well crash on a broken one. */
static int role_check(const char *dir, const char *acknowledged)
{
    sh_store *store = NULL;
    sh_store_options options = options_of(true);
    if (sh_store_open_lmdb(dir, &options, &store, NULL) != SH_OK)
        return EXIT_LOST;
    int64_t newest = newest_item(store);
    sh_store_close(&store);
    return newest >= 0 && (uint64_t)newest >= strtoull(acknowledged, NULL, 10) ? 0 : EXIT_LOST;
}

/* A spawned child must not hold its parent's environment. */
static void no_inherited_files(void)
{
    for (int fd = 3; fd < 64; fd++) {
        char link[32], name[256];
        snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, name, sizeof(name) - 1);
        name[n < 0 ? 0 : n] = 0;
        if (strstr(name, "/data.mdb") || strstr(name, ".lock") || strstr(name, "/lock.mdb"))
            printf("inherited %s ", name);
    }
}

/* Opens, says so with a status, and answers each line with the newest item until end of file. */
static int role_open(const char *dir, const char *how)
{
    sh_store *store = NULL;
    sh_store_options options = options_of(false);
    options.read_only = strcmp(how, "read") == 0;
    sh_error err = {0};
    no_inherited_files();
    sh_status status = sh_store_open_lmdb(dir, &options, &store, &err);
    printf("%s %s\n", sh_status_name(status), err.text);
    fflush(stdout);
    if (status != SH_OK)
        return EXIT_ERROR;
    for (int c = getchar(); c != EOF; c = getchar())
        if (c == '\n') {
            printf("%lld\n", (long long)newest_item(store));
            fflush(stdout);
        }
    sh_store_close(&store);
    return 0;
}

/* ---- SIGKILL ---- */

/* Reads a number; false at the end of the file. */
static bool read_number(int fd, uint64_t *number)
{
    return read(fd, number, sizeof(*number)) == sizeof(*number);
}

static void test_sigkill(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 1);
    uint64_t acknowledged = 0, beyond = 0;
    for (int kill_n = 0; kill_n < KILLS; kill_n++) {
        int out;
        pid_t pid = spawn_self((const char *const[]){"writer", dir.path, NULL}, NULL, &out);
        for (uint64_t wait = sh_rng_below(&rng, 12); wait > 0; wait--)
            assert_true(read_number(out, &acknowledged));
        /* Somewhere within the next commits. */
        volatile uint64_t spin = sh_rng_below(&rng, 3000000);
        while (spin > 0)
            spin--;
        kill(pid, SIGKILL);
        assert_int_equal(wait_exit(pid), -SIGKILL);
        while (read_number(out, &acknowledged)) {
        }
        close(out);
        sh_store *store = open_or_die(dir.path, false);
        int64_t newest = newest_item(store);
        sh_store_close(&store);
        if (newest < (int64_t)acknowledged || newest > (int64_t)acknowledged + 1)
            fail_msg("kill %d: newest item %lld, acknowledged %llu", kill_n, (long long)newest,
                     (unsigned long long)acknowledged);
        beyond += (uint64_t)newest - acknowledged;
        acknowledged = (uint64_t)newest;
    }
    print_message("%d kills, %llu commits, %llu of them not acknowledged yet\n", KILLS,
                  (unsigned long long)acknowledged, (unsigned long long)beyond);
    assert_true(acknowledged > KILLS);
    temp_dir_remove(&dir);
}

/* ---- power loss ---- */

static disk_log record_run(const char *dir, bool no_sync)
{
    char file[128];
    snprintf(file, sizeof(file), "%s/data.mdb", dir);
    disk_record(file);
    sh_store *store = open_or_die(dir, no_sync);
    sh_error err = {0};
    for (uint64_t i = 1; i <= POWER_RUN; i++) {
        must(write_item(store, i, &err), &err, "write");
        disk_mark(i);
    }
    sh_store_close(&store);
    disk_record(NULL);
    return disk_take_log();
}

static const char *const loss_names[] = {"none", "all", "some", "torn"};

static void test_power_loss(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make(), rebuilt = temp_dir_make();
    disk_log log = record_run(dir.path, false);
    size_t syncs = 0, images = 0;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 2);
    for (size_t at = 0; at <= log.n; at++) {
        syncs += at < log.n && log.events[at].kind == DISK_SYNC;
        uint64_t acknowledged = disk_last_mark(&log, at);
        if (acknowledged == 0)
            continue; /* before the first commit there may be no store yet */
        for (disk_loss loss = DISK_NONE; loss <= DISK_TORN; loss++, images++) {
            disk_rebuild(&log, at, loss, &rng, temp_path(&rebuilt, "data.mdb"));
            (void)unlink(temp_path(&rebuilt, "lock.mdb"));
            sh_store *store = open_or_die(rebuilt.path, true);
            int64_t newest = newest_item(store);
            if (newest < (int64_t)acknowledged)
                fail_msg("event %zu of %zu, unsynced %s: newest item %lld, acknowledged %llu", at,
                         log.n, loss_names[loss], (long long)newest,
                         (unsigned long long)acknowledged);
            sh_error err = {0}; /* and it goes on from there */
            must(write_item(store, (uint64_t)newest + 1, &err), &err, "write on");
            assert_int_equal(newest_item(store), newest + 1);
            sh_store_close(&store);
        }
    }
    print_message("%zu events, %zu syncs, %zu images\n", log.n, syncs, images);
    assert_true(syncs >= POWER_RUN);
    assert_true(images > 4 * POWER_RUN);
    disk_log_release(&log);
    temp_dir_remove(&dir);
    temp_dir_remove(&rebuilt);
}

/* What the process that may crash says of an image. */
static bool image_lost(const disk_log *log, size_t at, disk_loss loss, sh_rng *rng,
                       const temp_dir *rebuilt)
{
    char acknowledged[24];
    snprintf(acknowledged, sizeof(acknowledged), "%llu",
             (unsigned long long)disk_last_mark(log, at));
    disk_rebuild(log, at, loss, rng, temp_path(rebuilt, "data.mdb"));
    (void)unlink(temp_path(rebuilt, "lock.mdb"));
    pid_t pid =
        spawn_self((const char *const[]){"check", rebuilt->path, acknowledged, NULL}, NULL, NULL);
    return wait_exit(pid) != 0;
}

/* The same without syncing: the test above must be able to fail. */
static void test_power_loss_is_seen(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make(), rebuilt = temp_dir_make();
    disk_log log = record_run(dir.path, true);
    for (size_t i = 0; i < log.n; i++)
        assert_true(log.events[i].kind == DISK_WRITE || log.events[i].kind == DISK_MARK);
    unsigned lost = 0, images = 0;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 3);
    for (size_t at = log.n / 8; at <= log.n; at += log.n / 8) {
        lost += image_lost(&log, at, DISK_NONE, &rng, &rebuilt);
        lost += image_lost(&log, at, DISK_SOME, &rng, &rebuilt);
        lost += image_lost(&log, at, DISK_TORN, &rng, &rebuilt);
        images += 3;
    }
    print_message("without syncing: loss seen in %u of %u images\n", lost, images);
    assert_true(lost > images / 2);
    /* It is the loss that is seen: with all writes on the disk there is none. */
    assert_false(image_lost(&log, log.n, DISK_ALL, &rng, &rebuilt));
    disk_log_release(&log);
    temp_dir_remove(&dir);
    temp_dir_remove(&rebuilt);
}

/* ---- failing writes ---- */

/* Each write and sync of a commit fails in turn: the commit says so, and what was there stays. */
static void fail_each(int error, sh_status want)
{
    for (unsigned n = 1;; n++) {
        temp_dir dir = temp_dir_make();
        sh_store *store = open_or_die(dir.path, false);
        sh_error err = {0};
        for (uint64_t i = 1; i <= 3; i++)
            must(write_item(store, i, &err), &err, "write");
        char file[128];
        snprintf(file, sizeof(file), "%s/data.mdb", dir.path);
        disk_record(file);
        disk_fail_after(n, error);
        sh_status status = write_item(store, 4, &err);
        disk_fail_after(0, 0);
        disk_record(NULL);
        disk_log log = disk_take_log();
        disk_log_release(&log);
        if (status != SH_OK) {
            assert_int_equal(status, want);
            assert_non_null(strstr(err.text, dir.path));
        }
        sh_store_close(&store);
        store = open_or_die(dir.path, false);
        /* Whether a commit that failed late is there is open; that the others are is not. */
        int64_t newest = newest_item(store);
        assert_in_range(newest, status == SH_OK ? 4 : 3, 4);
        must(write_item(store, (uint64_t)newest + 1, &err), &err, "write on");
        assert_int_equal(newest_item(store), newest + 1);
        sh_store_close(&store);
        temp_dir_remove(&dir);
        if (status == SH_OK) {
            assert_true(n > 3); /* pages, their sync and the meta page at least */
            return;
        }
    }
}

static void test_failing_writes(void **state)
{
    (void)state;
    fail_each(EIO, SH_ERR_IO);
    fail_each(ENOSPC, SH_ERR_FULL);
}

/* ---- who may open ---- */

static void assert_answer(int fd, const char *want)
{
    char line[512];
    size_t n = 0;
    while (n < sizeof(line) - 1 && read(fd, line + n, 1) == 1 && line[n] != '\n')
        n++;
    line[n] = 0;
    if (strncmp(line, want, strlen(want)) != 0)
        fail_msg("the other process said '%s', not '%s'", line, want);
}

static void test_two_processes(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_error err = {0};
    sh_store *store = open_or_die(dir.path, false);
    must(write_item(store, 1, &err), &err, "write");

    int in, out;
    pid_t pid = spawn_self((const char *const[]){"open", dir.path, "write", NULL}, &in, &out);
    assert_answer(out, "exists store");
    assert_int_equal(wait_exit(pid), EXIT_ERROR);
    close(in);
    close(out);

    /* A reader in another process sees what is committed, also beyond the map it began with. */
    pid = spawn_self((const char *const[]){"open", dir.path, "read", NULL}, &in, &out);
    assert_answer(out, "ok");
    assert_int_equal(write(in, "\n", 1), 1);
    assert_answer(out, "1");
    sh_store_close(&store);
    sh_store_options large = options_of(false);
    large.bytes_max *= 4;
    must(sh_store_open_lmdb(dir.path, &large, &store, &err), &err, "open");
    sh_txn *txn = NULL;
    must(sh_txn_begin(store, SH_TXN_WRITE, &txn, &err), &err, "begin");
    static uint8_t bulk[1 << 20];
    for (uint8_t i = 0; i < 24; i++)
        must(sh_txn_put(txn, 1, &i, 1, bulk, sizeof(bulk), &err), &err, "put");
    must(sh_txn_commit(&txn, &err), &err, "commit");
    must(sh_txn_begin(store, SH_TXN_WRITE, &txn, &err), &err, "begin");
    for (uint8_t i = 0; i < 24; i++)
        must(sh_txn_del(txn, 1, &i, 1, &err), &err, "del");
    must(sh_txn_commit(&txn, &err), &err, "commit");
    must(write_item(store, 2, &err), &err, "write");
    assert_int_equal(write(in, "\n", 1), 1);
    assert_answer(out, "2");
    close(in);
    assert_int_equal(wait_exit(pid), 0);
    close(out);
    sh_store_close(&store);
    temp_dir_remove(&dir);
}

static void test_twice_in_a_process(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    char link[64];
    snprintf(link, sizeof(link), "%.50s-link", dir.path);
    assert_int_equal(symlink(dir.path, link), 0);
    sh_error err = {0};
    sh_store *store = open_or_die(dir.path, false), *second = NULL;
    sh_store_options options = options_of(false);
    for (int reads = 0; reads < 2; reads++) {
        options.read_only = reads;
        assert_int_equal(sh_store_open_lmdb(dir.path, &options, &second, &err), SH_ERR_EXISTS);
        assert_non_null(strstr(err.text, dir.path));
        assert_int_equal(sh_store_open_lmdb(link, &options, &second, &err), SH_ERR_EXISTS);
        assert_null(second);
    }
    /* The refusals took nothing away: it still works, and opens again after closing. */
    must(write_item(store, 1, &err), &err, "write");
    sh_store_close(&store);
    store = open_or_die(link, false);
    assert_int_equal(newest_item(store), 1);
    sh_store_close(&store);
    assert_int_equal(unlink(link), 0);
    temp_dir_remove(&dir);
}

static void test_not_there(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store = NULL;
    sh_error err = {0};
    sh_store_options options = options_of(false);
    options.read_only = true;
    const char *missing = temp_path(&dir, "missing");
    assert_int_equal(sh_store_open_lmdb(missing, &options, &store, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, missing));
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "no store"));
    /* A store without one of the tables. */
    static const char *const others[] = {"items", "absent"};
    store = open_or_die(dir.path, false);
    sh_store_close(&store);
    options.tables = others;
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "absent"));
    /* A file that is no store, and a file in place of the folder. */
    const char *broken = temp_path(&dir, "broken");
    must(sh_dir_make(broken, &err), &err, "folder");
    static uint8_t rubbish[8192];
    value_fill(1, rubbish, sizeof(rubbish));
    char file[160];
    snprintf(file, sizeof(file), "%s/data.mdb", broken);
    must(sh_file_write_atomic(file, rubbish, sizeof(rubbish), &err), &err, "file");
    options = options_of(false);
    assert_int_equal(sh_store_open_lmdb(broken, &options, &store, &err), SH_ERR_CORRUPT);
    assert_non_null(strstr(err.text, broken));
    assert_int_equal(sh_store_open_lmdb(file, &options, &store, &err), SH_ERR_EXISTS);
    assert_null(store);
    temp_dir_remove(&dir);
}

/* An empty file is one to be made only where none was made before. */
static void test_emptied(void **state)
{
    (void)state;
    temp_dir dir = temp_dir_make();
    sh_store *store = NULL;
    sh_error err = {0};
    char file[160];
    sh_store_options options = options_of(false);
    snprintf(file, sizeof(file), "%s/data.mdb", dir.path);
    must(sh_file_write_atomic(file, "", 0, &err), &err, "file");
    for (int i = 0; i < 2; i++) {
        store = open_or_die(dir.path, false);
        sh_store_close(&store);
    }
    assert_int_equal(truncate(file, 0), 0);
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store, &err), SH_ERR_CORRUPT);
    assert_non_null(strstr(err.text, dir.path));
    assert_int_equal(unlink(file), 0);
    assert_int_equal(sh_store_open_lmdb(dir.path, &options, &store, &err), SH_ERR_CORRUPT);
    assert_null(store);
    assert_int_equal(access(file, F_OK), -1); /* nothing new was begun */
    temp_dir_remove(&dir);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "writer") == 0)
        return role_writer(argv[2]);
    if (argc == 4 && strcmp(argv[1], "check") == 0)
        return role_check(argv[2], argv[3]);
    if (argc == 4 && strcmp(argv[1], "open") == 0)
        return role_open(argv[2], argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sigkill),
        cmocka_unit_test(test_power_loss),
        cmocka_unit_test(test_power_loss_is_seen),
        cmocka_unit_test(test_failing_writes),
        cmocka_unit_test(test_two_processes),
        cmocka_unit_test(test_twice_in_a_process),
        cmocka_unit_test(test_not_there),
        cmocka_unit_test(test_emptied),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
