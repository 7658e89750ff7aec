/*
 * A network that breaks off in the middle of every transfer: updates go up and a release comes
 * down all the same, because what has arrived is not asked for again. argv[1]: the programs'
 * folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "tests/e2e/cutter.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/harness.h"

#define CHUNK 65536u
/* A connection's life: less than an update or a release, more than the handshake and a chunk. */
#define CUT_AFTER 200000u

enum { TRAINS, TAKES, NODES };

static const char *bin;

static const char *const aggregator_words[] = {
    "--learn.drifting-min", "0", "--learn.buffer", "1", "--learn.rounds-max", "1", "--learn.rank",
    "16", "--learn.alpha", "16", "--learn.context", "32", "--learn.batch", "1",
    /* so much, so gently, that the only update of
     * the only round is better and is sent */
    "--learn.tokens-min", "256", "--learn.lr", "0.001", "--learn.steps-max", "20",
    "--gate.overall-max", "10", "--gate.slice-max", "100", "--gate.tokens", "512",
    "--merge.cosine-min", "-1", "--learn.round-ms-max", "0", NULL};
static const char *const takes_words[] = {"--train.enabled=false", NULL};

typedef struct {
    e2e_fleet fleet;
    cutter links[NODES];
    e2e_user users[NODES];
} scene;

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    e2e_fleet *f = &s->fleet;
    *f = (e2e_fleet){.bin = bin,
                     .layers = 48,
                     .aggregator_words = aggregator_words,
                     .node_words = fleets_eager_node};
    f->nodes[TAKES].words = takes_words;
    for (unsigned i = 0; i < NODES; i++)
        f->nodes[i].dial = e2e_free_port();
    e2e_fleet_make(f, NODES);
    for (unsigned i = 0; i < NODES; i++)
        cutter_start(&s->links[i], f->nodes[i].dial, f->port, CUT_AFTER);
    e2e_fleet_start(f);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        snprintf(u->name, sizeof u->name, "user-%u", i);
        u->seed = 3 + i;
        u->pause_ms = 20;
        u->max_tokens = 4;
        atomic_store(&u->port, f->nodes[i].port);
        e2e_user_start(u);
    }
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    for (unsigned i = 0; i < NODES; i++)
        e2e_user_stop(&s->users[i]);
    e2e_fleet_release(&s->fleet);
    for (unsigned i = 0; i < NODES; i++)
        cutter_stop(&s->links[i]);
    free(s);
    return 0;
}

/* Of the file in the slot that is not the genesis release's. */
static uint64_t release_bytes(const e2e_fleet *f, unsigned i)
{
    char path[SH_PATH_BYTES];
    sh_hash sha256;
    uint64_t n = 0;
    OK(sh_path_join(path, sizeof path, f->nodes[i].dir, "models/slot1.gguf", err));
    OK(sh_sha256_file(path, &sha256, &n, err));
    return n;
}

static void what_has_come_stays(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    assert_true(e2e_saw(&f->nodes[TRAINS].process, "event=update_acked"));
    assert_true(e2e_saw(&f->aggregator, "event=released version=2"));
    for (unsigned i = 0; i < NODES; i++)
        assert_true(e2e_saw(&f->nodes[i].process, "event=release_confirmed version=2"));
    uint64_t bytes = release_bytes(f, TAKES);
    for (unsigned i = 0; i < NODES; i++) {
        const cutter *link = &s->links[i];
        uint64_t down = atomic_load(&link->down);
        unsigned cuts = atomic_load(&link->cuts);
        print_message("%s: release of %llu bytes; %llu up, %llu down, %u connections, %u cuts\n",
                      f->nodes[i].name, (unsigned long long)bytes, atomic_load(&link->up),
                      (unsigned long long)down, atomic_load(&link->connections), cuts);
        assert_true(bytes > 6 * CUT_AFTER); /* else nothing was shown */
        assert_true(cuts >= bytes / CUT_AFTER);
    }
    /* Every connection brought at least one chunk further; the other's update went up as well. */
    assert_true(atomic_load(&s->links[TAKES].cuts) <= bytes / CHUNK + 16);
    assert_true(atomic_load(&s->links[TRAINS].cuts) <= 4 * (bytes / CHUNK) + 16);
    /* A cut costs what was under way: a chunk or two. */
    assert_true(atomic_load(&s->links[TAKES].down) <=
                bytes + (atomic_load(&s->links[TAKES].cuts) + 2ull) * 2 * CHUNK);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->links[i].cut_after, 0);
    assert_int_equal(e2e_settle(f), 2);
    for (unsigned i = 0; i < NODES; i++) {
        e2e_user *u = &s->users[i];
        e2e_user_stop(u);
        if (atomic_load(&u->bad) > 0)
            fail_msg("%s: %s", u->name, u->first_bad);
        assert_int_equal(atomic_load(&u->broken), 0);
    }
    e2e_fleet_stop(f);
    json_decref(e2e_audit(f));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_has_come_stays, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
