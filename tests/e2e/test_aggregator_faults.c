/*
 * shoal-aggregator killed at every fail point while nodes send updates and score a candidate; each
 * time it comes back, and what was acknowledged is decided once, in a release that all nodes get.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include <signal.h>

#include "aggregator/coordinator.h"
#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "tests/e2e/aggregator_rig.h"

static const char *program, *tool;
static const char *const flags[] = {"--learn.drifting-min",
                                    "2",
                                    "--learn.buffer",
                                    "2",
                                    "--gate.overall-max",
                                    "10",
                                    "--gate.slice-max",
                                    "100",
                                    "--canary.nodes-min",
                                    "2",
                                    "--canary.tokens-min",
                                    "100",
                                    "--learn.rounds-max",
                                    "1",
                                    NULL};

typedef struct {
    uint64_t rows, merged, refused, pending;
} counts;

static sh_status count(void *arg, const sh_update_row *row)
{
    counts *c = arg;
    c->rows++;
    c->merged += row->verdict == SH_VERDICT_MERGED;
    c->refused += row->verdict == SH_VERDICT_REFUSED;
    c->pending += row->verdict == SH_VERDICT_PENDING;
    return SH_OK;
}

/* The store as the stopped aggregator left it. */
static counts look(const agg_rig *r)
{
    char path[SH_PATH_BYTES];
    counts c = {0};
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    OK(sh_path_join(path, sizeof path, r->dir, "store", err));
    OK(sh_store_open_lmdb(path,
                          &(sh_store_options){.tables = sh_coord_tables,
                                              .n_tables = SH_COORD_TABLES,
                                              .read_only = true},
                          &store, err));
    OK(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    OK(sh_coord_each_update(txn, count, &c, err));
    OK(sh_coord_each_audit(txn, NULL, NULL, err));
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return c;
}

/* Plays until both nodes were offered release 2 and all of theirs is acknowledged; starts the
 * aggregator again when it was killed. Returns how often. */
static unsigned play_until_released(agg_rig *r)
{
    unsigned killed = 0;
    uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS;
    for (;;) {
        bool done = true;
        for (unsigned i = 0; i < 2; i++)
            done &= r->peers[i].version >= 2 && r->peers[i].update.acked;
        if (done)
            return killed;
        if (sh_clock_mono_ms() > end) {
            json_t *status = agg_runs(r) ? agg_status(r) : NULL;
            fail_msg("no release: %s", status ? json_dumps(status, 0) : "it does not run");
        }
        agg_play(r, 50);
        if (agg_runs(r))
            continue;
        assert_true(agg_logged(r, "event=failpoint name="));
        assert_int_equal(agg_wait(r), 128 + SIGKILL);
        killed++;
        agg_start(r, flags, NULL);
        agg_ready(r);
    }
}

static void run_with(const char *failpoint)
{
    agg_rig r;
    char line[96];
    agg_make(&r, program, tool);
    agg_start(&r, flags, NULL); /* takes a port, which stays */
    agg_ready(&r);
    agg_enrol(&r, 0);
    agg_enrol(&r, 1);
    assert_int_equal(agg_end(&r, SIGTERM), 0);
    assert_true(agg_logged(&r, "event=stop reason=SIGTERM"));
    agg_start(&r, flags, failpoint);
    /* One that fires at the first commit may do so before it is ready. */
    while (!agg_logged(&r, "event=ready") && agg_runs(&r))
        agg_play(&r, 20);
    agg_dial(&r, 0);
    agg_dial(&r, 1);
    unsigned killed = play_until_released(&r);
    snprintf(line, sizeof line, "%s: killed %u times", failpoint ? failpoint : "none", killed);
    print_message("%s\n", line);
    assert_int_equal(killed, failpoint != NULL);
    json_t *status = agg_status(&r);
    assert_int_equal(json_integer_value(json_object_get(status, "releases")), 1);
    json_decref(status);
    assert_int_equal(agg_end(&r, SIGTERM), 0);
    counts c = look(&r);
    assert_true(c.merged >= 2);
    assert_int_equal(c.merged + c.refused + c.pending, c.rows);
    assert_true(c.rows <= r.peers[0].update.seq + r.peers[1].update.seq);
    agg_release(&r);
}

static void a_round_without_faults(void **state)
{
    (void)state;
    run_with(NULL);
}

static void killed_at_every_fail_point(void **state)
{
    (void)state;
    static const char *const names[] = {
        "merge.before_commit",       "merge.after_commit",         "gate.before_commit",
        "gate.after_commit",         "canary.before_commit",       "aggregator.before_commit:3",
        "aggregator.after_commit:3", "aggregator.before_commit:9", "aggregator.after_commit:9",
    };
    for (size_t i = 0; i < SH_COUNT(names); i++)
        run_with(names[i]);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_round_without_faults),
        cmocka_unit_test(killed_at_every_fail_point),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
