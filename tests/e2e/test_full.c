/*
 * Full disks under a fleet: the aggregator's store and a node's each on a small ext4 file system of
 * its own (a loopback device; a tmpfs where there is none). First the one, then the other is full:
 * the programs go on, inference is answered, commands are, what is acknowledged stays so; when
 * there is room again all goes on by itself, and the audit of both stores is clean. test_disk.c has
 * the node alone, in more detail. argv[1]: the programs' folder. Skips, and says so, where mounting
 * is not allowed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/harness.h"

#define SKIPPED         77
#define NODES           2u
#define AGGREGATOR_DISK (32u << 20)
#define NODE_DISK       (24u << 20)
#define ASKED_IN_IT     40u /* requests that are answered while a disk is full */

static const char *bin;
static bool skipped;

typedef struct {
    e2e_fleet fleet;
    e2e_user users[NODES];
    char stores[2][SH_PATH_BYTES]; /* mounted: the aggregator's, node 0's */
    bool mounted[2], loopback;
} scene;

/* ---- disks ---- */

static bool run_ok(const char *program, const char *const *words)
{
    if (access(program, X_OK) != 0)
        return false;
    run_result r = run_program(program, words, NULL, 0);
    bool good = r.exit_code == 0;
    run_release(&r);
    return good;
}

/* A file system of so many bytes at `at`; false with errno. */
static bool mount_small(scene *s, const char *name, unsigned bytes, const char *at)
{
    char image[SH_PATH_BYTES], options[48];
    OK(sh_path_join(image, sizeof image, s->fleet.root.path, name, err));
    int fd = open(image, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, bytes), 0);
    close(fd);
    s->loopback = run_ok("/sbin/mkfs.ext4", (const char *const[]){"-q", "-m", "0", image, NULL}) &&
                  run_ok("/bin/mount", (const char *const[]){"-o", "loop", image, at, NULL});
    snprintf(options, sizeof options, "size=%u", bytes);
    return s->loopback || mount("tmpfs", at, "tmpfs", 0, options) == 0;
}

/* The store in `dir`, as it is, on a small disk of its own. Returns why not, or NULL. */
static const char *move_store(scene *s, unsigned k, const char *name, unsigned bytes,
                              const char *dir)
{
    char fresh[SH_PATH_BYTES], from[SH_PATH_BYTES], image[SH_PATH_BYTES];
    OK(sh_path_join(s->stores[k], sizeof s->stores[k], dir, "store", err));
    OK(sh_path_join(fresh, sizeof fresh, dir, "store-on-disk", err));
    OK(sh_dir_make(s->stores[k], err));
    OK(sh_dir_make(fresh, err));
    snprintf(image, sizeof image, "%s.image", name);
    if (!mount_small(s, image, bytes, fresh))
        return strerror(errno);
    assert_true((size_t)snprintf(from, sizeof from, "%s/.", s->stores[k]) < sizeof from);
    assert_true(run_ok("/bin/cp", (const char *const[]){"-a", from, fresh, NULL}));
    assert_int_equal(mount(fresh, s->stores[k], NULL, MS_MOVE, NULL), 0);
    assert_int_equal(rmdir(fresh), 0);
    s->mounted[k] = true;
    return NULL;
}

static void fill_disk(const scene *s, unsigned k)
{
    static const char block[4096];
    char path[SH_PATH_BYTES];
    OK(sh_path_join(path, sizeof path, s->stores[k], "filler", err));
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    while (write(fd, block, sizeof block) > 0)
        ;
    assert_int_equal(errno, ENOSPC);
    close(fd);
}

static void make_room(const scene *s, unsigned k)
{
    char path[SH_PATH_BYTES];
    OK(sh_path_join(path, sizeof path, s->stores[k], "filler", err));
    assert_int_equal(unlink(path), 0);
}

/* ---- the fleet ---- */

static const char *set_up(scene *s)
{
    e2e_fleet *f = &s->fleet;
    const char *why = NULL;
    /* Mounts of its own, which end with the test. */
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return strerror(errno);
    *f = (e2e_fleet){
        .bin = bin, .aggregator_words = fleets_eager_aggregator, .node_words = fleets_eager_node};
    e2e_fleet_make(f, NODES);
    why = move_store(s, 0, "aggregator", AGGREGATOR_DISK, f->aggregator_dir);
    if (!why)
        why = move_store(s, 1, "node", NODE_DISK, f->nodes[0].dir);
    return why;
}

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    const char *why = set_up(s);
    if (why) {
        print_message("SKIP: full disks under a fleet: mounting is not allowed here: %s\n", why);
        skipped = true;
        return 0;
    }
    print_message("disks: %s\n", s->loopback ? "ext4 on a loopback device" : "tmpfs");
    e2e_fleet_start(&s->fleet);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = 11 + i;
        u->pause_ms = 20;
        atomic_store(&u->port, s->fleet.nodes[i].port);
        e2e_user_start(u);
    }
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    for (unsigned i = 0; i < NODES; i++) /* what has files there open goes first */
        if (s->fleet.nodes[i].process.pid > 0)
            (void)e2e_end(&s->fleet.nodes[i].process, SIGKILL);
    if (s->fleet.aggregator.pid > 0)
        (void)e2e_end(&s->fleet.aggregator, SIGKILL);
    for (unsigned k = 0; k < 2; k++)
        if (s->mounted[k])
            (void)umount2(s->stores[k], MNT_DETACH);
    e2e_fleet_release(&s->fleet);
    free(s);
    return 0;
}

static void expect_inference(scene *s, const char *what)
{
    unsigned long long before[NODES];
    for (unsigned i = 0; i < NODES; i++)
        before[i] = atomic_load(&s->users[i].whole);
    for (unsigned i = 0; i < NODES; i++)
        E2E_UNTIL(atomic_load(&s->users[i].whole) > before[i] + ASKED_IN_IT, what);
    for (unsigned i = 0; i < NODES; i++)
        assert_true(e2e_runs(&s->fleet.nodes[i].process));
    assert_true(e2e_runs(&s->fleet.aggregator));
}

static void both_recover(void **state)
{
    scene *s = *state;
    if (skipped)
        skip();
    e2e_fleet *f = &s->fleet;
    E2E_UNTIL(e2e_newest_release(f) > 1, "a release before");
    fill_disk(s, 0);
    expect_inference(s, "inference while the aggregator's disk is full");
    E2E_UNTIL(e2e_node_int(f, 1, "outbox_items") > 0, "the nodes owe, nothing is acknowledged");
    make_room(s, 0);
    E2E_UNTIL(e2e_newest_release(f) > 0, "the aggregator's core is there again");
    uint64_t version = e2e_newest_release(f);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, e2e_news());
    E2E_UNTIL(e2e_newest_release(f) > version, "a release after the aggregator's disk was full");
    fill_disk(s, 1);
    expect_inference(s, "inference while a node's disk is full");
    make_room(s, 1);
    version = e2e_newest_release(f);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, e2e_news());
    E2E_UNTIL(e2e_newest_release(f) > version, "a release after a node's disk was full");
    version = e2e_settle(f);
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_stop(f);
    json_t *audit = e2e_audit(f);
    print_message("release %llu; audit: %lld made, %lld acknowledged\n",
                  (unsigned long long)version, (long long)e2e_int(audit, "made"),
                  (long long)e2e_int(audit, "acknowledged"));
    json_decref(audit);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        print_message("%s: %llu asked, %llu whole, %llu broken, %llu bad\n", u->name,
                      atomic_load(&u->asked), atomic_load(&u->whole), atomic_load(&u->broken),
                      atomic_load(&u->bad));
        assert_int_equal(atomic_load(&u->broken), 0);
        /* Nothing but feedback that was refused for want of room, of the node that had none. */
        if (atomic_load(&u->bad) > 0 && (i > 0 || !strstr(u->first_bad, "status 507")))
            fail_msg("%s: %s", u->name, u->first_bad);
        fleets_check_feedback(f, i, atomic_load(&u->acknowledged), atomic_load(&u->doubtful));
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(both_recover, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed == 0 && skipped ? SKIPPED : failed;
}
