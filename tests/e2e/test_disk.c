/*
 * No room: the node's store on a disk that is full, and at its own limit. Completions go on,
 * feedback is refused with 507, and when there is room again it goes on by itself, without a
 * restart; what was acknowledged is there, and nothing twice. argv[1]: the programs' folder.
 *
 * The full disk is a small tmpfs in a mount namespace of this process, so that it is gone with it.
 * Where that is not allowed the test says so and is skipped; the one of the limit always runs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/probe.h"

#define DISK_OPTIONS "size=6m"
#define TEXT_BYTES   3000 /* of one piece of feedback: a token each byte, nearly */
#define PIECES_MAX   5000

static const char *bin;
static char text[TEXT_BYTES + 1], answer[65536];

static const char *const words[] = {"--feedback.tokens-max", "1000000000",
                                    "--completions.count-max", "100000", NULL};
static const char *const limited[] = {"--feedback.tokens-max",
                                      "1000000000",
                                      "--completions.count-max",
                                      "100000",
                                      "--store.bytes-max",
                                      "8388608",
                                      NULL};

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    for (size_t i = 0; i < TEXT_BYTES; i++)
        text[i] = i % 2 ? 'z' : ' ';
    e2e_fleet_make(f, 1);
    return 0;
}

static int release(void **state)
{
    static const char *const folders[] = {"store", "."};
    e2e_fleet *f = *state;
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < SH_COUNT(folders); i++) { /* what is mounted cannot be removed */
        OK(sh_path_join(path, sizeof path, f->nodes[0].dir, folders[i], err));
        (void)umount2(path, MNT_DETACH);
    }
    e2e_fleet_release(f);
    free(*state);
    return 0;
}

typedef struct {
    uint64_t acknowledged;
    int status; /* of the last feedback */
} author;

static void write_one(e2e_fleet *f, author *a, const char *user)
{
    char id[64];
    probe_complete(f->nodes[0].port, "so it goes", user, id); /* must succeed, room or not */
    a->status = probe_feedback(f->nodes[0].port, id, "edit", text);
    a->acknowledged += a->status == 200;
}

/* Until it is refused; then it is a while, and completions are answered all the same. */
static void write_until_full(e2e_fleet *f, author *a, const char *user)
{
    for (int i = 0; i < PIECES_MAX && (i == 0 || a->status == 200); i++)
        write_one(f, a, user);
    assert_int_equal(a->status, 507);
    assert_true(e2e_logged(&f->nodes[0].process, "event=store state=full"));
    E2E_UNTIL(probe_ask(f->nodes[0].port, "GET", "/healthz", NULL, answer, sizeof answer) == 503,
              "/healthz says that the store is full");
    assert_non_null(strstr(answer, "full"));
    assert_int_equal(probe_ask(f->nodes[0].port, "GET", "/metrics", NULL, answer, sizeof answer),
                     200);
    assert_true(probe_metric(answer, "shoal_store_full") == 1);
    for (int i = 0; i < 10; i++)
        write_one(f, a, user);
}

static void write_again(e2e_fleet *f, author *a, const char *user)
{
    for (uint64_t end = sh_clock_mono_ms() + E2E_WAIT_MS; a->status != 200;) {
        if (sh_clock_mono_ms() > end)
            fail_msg("feedback is still refused with %d though there is room", a->status);
        write_one(f, a, user);
        e2e_pause();
    }
    E2E_UNTIL(probe_ask(f->nodes[0].port, "GET", "/healthz", NULL, answer, sizeof answer) == 200,
              "/healthz says that it is well again");
    write_one(f, a, user);
    assert_int_equal(a->status, 200);
}

/* ---- a disk ---- */

/* Why not, or NULL. */
static const char *own_mounts(void)
{
    static char why[128];
    static bool done;
    if (!done &&
        (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))) {
        snprintf(why, sizeof why, "mounting is not allowed here: %s", strerror(errno));
        return why;
    }
    done = true;
    return NULL;
}

/* Takes all that is left. */
static void fill_disk(const char *path)
{
    static const char block[4096];
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    while (write(fd, block, sizeof block) > 0)
        ;
    assert_int_equal(errno, ENOSPC);
    close(fd);
}

static void a_full_disk(void **state)
{
    e2e_fleet *f = *state;
    char store[SH_PATH_BYTES], filler[SH_PATH_BYTES];
    author a = {0};
    const char *why = own_mounts();
    if (why) {
        print_message("SKIP: the full disk: %s\n", why);
        skip();
    }
    OK(sh_path_join(store, sizeof store, f->nodes[0].dir, "store", err));
    OK(sh_path_join(filler, sizeof filler, store, "filler", err));
    if (mount("tmpfs", store, "tmpfs", 0, DISK_OPTIONS) != 0) {
        print_message("SKIP: the full disk: a tmpfs cannot be mounted: %s\n", strerror(errno));
        skip();
    }
    f->node_words = words;
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    for (int i = 0; i < 20; i++)
        write_one(f, &a, "bob");
    assert_int_equal(a.acknowledged, 20);
    fill_disk(filler);
    write_until_full(f, &a, "bob");
    assert_int_equal(unlink(filler), 0);
    write_again(f, &a, "bob");
    /* Once more, and it is killed while nothing can be written. */
    fill_disk(filler);
    write_until_full(f, &a, "bob");
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGKILL), 128 + SIGKILL);
    /* It starts all the same, and serves; with room it goes on where it was. */
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    for (int i = 0; i < 3; i++) {
        write_one(f, &a, "bob");
        assert_int_equal(a.status, 507);
    }
    assert_int_equal(unlink(filler), 0);
    write_again(f, &a, "bob");
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    fleets_check_feedback(f, 0, a.acknowledged, 0);
}

/* ---- how often it tries ---- */

static unsigned times_logged(const e2e_process *p, const char *what)
{
    unsigned n = 0;
    char *log = e2e_log(p);
    for (const char *at = log; (at = strstr(at, what)) != NULL; at += strlen(what))
        n++;
    free(log);
    return n;
}

/* By the daemon's own clock: a pause is over before the next but one begins, for one that the
 * reserve did not outlast is begun anew. */
static void check_pauses(const e2e_process *p)
{
    unsigned long long ms, at, begun = 0, over = 0;
    char *log = e2e_log(p);
    for (const char *line = log; (line = strstr(line, "event=store_pause ms=")) != NULL; line++) {
        assert_int_equal(sscanf(line, "event=store_pause ms=%llu at_ms=%llu", &ms, &at), 2);
        if (at < begun)
            fail_msg("a pause at %llu ms, and one that lasts to %llu", at, begun);
        begun = over;
        over = at + ms;
    }
    free(log);
}

static bool has_tried_again(e2e_fleet *f, author *a)
{
    write_one(f, a, "bob"); /* there is always something to write */
    return e2e_logged(&f->nodes[0].process, "event=store_pause ms=10000");
}

/* With an aggregator that answers: an enrolment brings a welcome, a plan and timers, and none of
 * them begins another life of the core before the pause is over. */
static void a_full_disk_is_left_alone(void **state)
{
    static const char *const more[] = {"--feedback.tokens-max",
                                       "1000000000",
                                       "--completions.count-max",
                                       "100000",
                                       "--log.level",
                                       "debug",
                                       NULL};
    e2e_fleet *f = *state;
    e2e_process *node = &f->nodes[0].process;
    char store[SH_PATH_BYTES], filler[SH_PATH_BYTES];
    author a = {0};
    const char *why = own_mounts();
    OK(sh_path_join(store, sizeof store, f->nodes[0].dir, "store", err));
    OK(sh_path_join(filler, sizeof filler, store, "filler", err));
    if (!why && mount("tmpfs", store, "tmpfs", 0, DISK_OPTIONS) != 0)
        why = strerror(errno);
    if (why) {
        print_message("SKIP: a full disk is left alone: %s\n", why);
        skip();
    }
    f->node_words = more;
    e2e_fleet_start(f);
    assert_true(e2e_saw(node, "event=checked_in"));
    for (int i = 0; i < 20; i++)
        write_one(f, &a, "bob");
    fill_disk(filler);
    write_until_full(f, &a, "bob");
    E2E_UNTIL(has_tried_again(f, &a), "it tries again");
    unsigned lives = times_logged(node, "event=core "), pauses = times_logged(node, "store_pause");
    print_message("%u lives of the core, %u pauses\n", lives, pauses);
    assert_true(lives <= 1 + 2 * pauses);
    check_pauses(node);
    assert_int_equal(times_logged(node, "event=store_pause ms=5000"), 1);
    assert_int_equal(unlink(filler), 0);
    write_again(f, &a, "bob");
    e2e_fleet_stop(f);
    fleets_check_feedback(f, 0, a.acknowledged, 0);
}

/* ---- a disk that was full before there was a store ---- */

static bool run_ok(const char *program, const char *const *arguments)
{
    run_result r = run_program(program, arguments, NULL, 0);
    bool good = r.exit_code == 0;
    run_release(&r);
    return good;
}

/* The node's whole folder, as it is, on a small disk of its own. Why not, or NULL. */
static const char *move_folder(const e2e_node *node)
{
    char fresh[SH_PATH_BYTES], from[SH_PATH_BYTES];
    const char *why = own_mounts();
    if (why)
        return why;
    assert_true((size_t)snprintf(fresh, sizeof fresh, "%s-on-disk", node->dir) < sizeof fresh);
    assert_true((size_t)snprintf(from, sizeof from, "%s/.", node->dir) < sizeof from);
    OK(sh_dir_make(fresh, err));
    if (mount("tmpfs", fresh, "tmpfs", 0, DISK_OPTIONS) != 0)
        return "a tmpfs cannot be mounted";
    assert_true(run_ok("/bin/cp", (const char *const[]){"-a", from, fresh, NULL}));
    assert_int_equal(mount(fresh, node->dir, NULL, MS_MOVE, NULL), 0);
    assert_int_equal(rmdir(fresh), 0);
    return NULL;
}

/* It is ready, and answers; when the filler goes, it makes its store by itself. */
static void serve_until_there_is_room(e2e_fleet *f, const char *filler, author *a)
{
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    for (int i = 0; i < 3; i++) {
        write_one(f, a, "bob");
        assert_int_equal(a->status, 507);
    }
    assert_int_equal(probe_ask(f->nodes[0].port, "GET", "/healthz", NULL, answer, sizeof answer),
                     503);
    assert_non_null(strstr(answer, "full"));
    json_t *status = e2e_node_status(f, 0);
    assert_non_null(status);
    assert_true(json_is_true(json_object_get(status, "store_full")));
    assert_int_equal(e2e_int(status, "store_bytes"), 0);
    json_decref(status);
    assert_int_equal(times_logged(&f->nodes[0].process, "state=full"), 1);
    assert_int_equal(unlink(filler), 0);
    write_again(f, a, "bob");
    assert_int_equal(times_logged(&f->nodes[0].process, "state=full"), 1);
}

static void no_store_yet(void **state)
{
    e2e_fleet *f = *state;
    char filler[SH_PATH_BYTES], data[SH_PATH_BYTES];
    author before = {0}, after = {0};
    const char *why = move_folder(&f->nodes[0]);
    if (why) {
        print_message("SKIP: a full disk before the first start: %s\n", why);
        skip();
    }
    OK(sh_path_join(filler, sizeof filler, f->nodes[0].dir, "filler", err));
    OK(sh_path_join(data, sizeof data, f->nodes[0].dir, "store/data.mdb", err));
    f->node_words = words;
    fill_disk(filler);
    serve_until_there_is_room(f, filler, &before);
    assert_int_equal(e2e_node_int(f, 0, "stores_lost"), 0); /* there was none */
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    fleets_check_feedback(f, 0, before.acknowledged, 0);
    /* One that is damaged is set aside, and there is no room for the next one either. */
    assert_int_equal(truncate(data, 100), 0);
    fill_disk(filler);
    serve_until_there_is_room(f, filler, &after);
    assert_true(e2e_logged(&f->nodes[0].process, "set_aside=store.corrupt-1"));
    assert_int_equal(e2e_node_int(f, 0, "stores_lost"), 1);
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    fleets_check_feedback(f, 0, after.acknowledged, 0);
}

/* ---- the store's own limit ---- */

/* Room is made by erasing somebody who wrote much; the other one's feedback is all there. */
static void a_store_at_its_limit(void **state)
{
    e2e_fleet *f = *state;
    author eve = {0}, bob = {0};
    f->node_words = limited;
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    for (int i = 0; i < 20; i++)
        write_one(f, &bob, "bob");
    assert_int_equal(bob.acknowledged, 20);
    write_until_full(f, &eve, "eve");
    assert_true(eve.acknowledged > 100);
    write_one(f, &bob, "bob");
    run_result r = run_program(
        e2e_program(f, "shoal-node"),
        (const char *const[]){"erase", "--dir", f->nodes[0].dir, "--user", "eve", NULL}, NULL, 0);
    if (r.exit_code != 0)
        fail_msg("erase: exit code %d: %s%s", r.exit_code, r.out, r.err);
    run_release(&r);
    bob.status = 0;
    write_again(f, &bob, "bob");
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    fleets_check_feedback(f, 0, bob.acknowledged, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_store_at_its_limit, make, release),
        cmocka_unit_test_setup_teardown(a_full_disk, make, release),
        cmocka_unit_test_setup_teardown(a_full_disk_is_left_alone, make, release),
        cmocka_unit_test_setup_teardown(no_store_yet, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
