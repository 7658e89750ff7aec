/*
 * An aggregator's disk is lost when its nodes are ahead of the last backup. The one that is
 * restored issues no version twice, the nodes take what it publishes, learning goes on, and nothing
 * is counted twice. argv[1]: the programs' folder.
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
#include "tests/e2e/fleets.h"
#include "tests/e2e/harness.h"

#define NODES FLEETS_NODES

static const char *bin;

typedef fleets_scene scene;

static int make(void **state)
{
    *state = fleets_scene_make(bin, 30);
    return 0;
}

static int release(void **state)
{
    fleets_scene_release(*state);
    return 0;
}

/* The newest published version; *rows: all that the aggregator decided. */
static int64_t newest(e2e_fleet *f, json_t **rows)
{
    int code;
    int64_t version = 0;
    json_t *reply = e2e_tool(f, (const char *const[]){"releases", "--limit", "1000", NULL}, &code),
           *row;
    size_t i;
    assert_int_equal(code, 0);
    *rows = json_incref(json_object_get(reply, "releases"));
    json_decref(reply);
    assert_true(json_is_array(*rows));
    json_array_foreach(*rows, i, row) version = SH_MAX(version, e2e_int(row, "version"));
    return version;
}

static void wait_for_version(scene *s, int64_t above)
{
    for (unsigned i = 0; i < NODES; i++)
        E2E_UNTIL(e2e_node_int(&s->fleet, i, "confirmed_version") > above,
                  "a newer release is confirmed");
}

/* Who gave out a version gave it out for one model only. */
static void check_versions(const json_t *lost, const json_t *restored, int64_t at_backup)
{
    const json_t *a, *b;
    size_t i, k;
    json_array_foreach(lost, i, a)
    {
        int64_t version = e2e_int(a, "version");
        const char *sha256 = json_string_value(json_object_get(a, "sha256"));
        if (version == 0)
            continue; /* a candidate that was refused */
        json_array_foreach(restored, k, b)
        {
            if (e2e_int(b, "version") != version)
                continue;
            assert_true(version <= at_backup);
            assert_string_equal(json_string_value(json_object_get(b, "sha256")), sha256);
        }
    }
}

static void restore(e2e_fleet *f, const char *backup)
{
    char gone[SH_PATH_BYTES];
    assert_int_equal(e2e_end(&f->aggregator, SIGKILL), 128 + SIGKILL);
    snprintf(gone, sizeof gone, "%s/gone", f->root.path);
    assert_int_equal(rename(f->aggregator_dir, gone), 0);
    run_result r = run_program(
        e2e_program(f, "shoal-aggregator"),
        (const char *const[]){"restore", "--from", backup, "--dir", f->aggregator_dir, NULL}, NULL,
        0);
    if (r.exit_code != 0)
        fail_msg("restore: exit code %d: %s%s", r.exit_code, r.out, r.err);
    run_release(&r);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
    assert_true(e2e_logged(&f->aggregator, "event=restored "));
}

/* What was acknowledged and lost with the disk is all that the audit may miss. */
static void check_audit(e2e_fleet *f)
{
    run_result r = run_program(e2e_program(f, "shoal-audit"),
                               (const char *const[]){"--dir", f->root.path, NULL}, NULL, 0);
    json_t *audit = json_loads(r.out, 0, NULL);
    if (audit == NULL || r.exit_code > 1)
        fail_msg("audit: exit code %d: %s%s", r.exit_code, r.out, r.err);
    print_message("audit: %lld made, %lld acknowledged, %lld went with the disk\n",
                  (long long)e2e_int(audit, "made"), (long long)e2e_int(audit, "acknowledged"),
                  (long long)e2e_int(audit, "lost"));
    assert_int_equal(e2e_int(audit, "twice"), 0);
    assert_int_equal(e2e_int(audit, "wrong"), 0);
    assert_true(e2e_int(audit, "lost") > 0); /* else the backup was too new to show anything */
    assert_true(e2e_int(audit, "lost") < e2e_int(audit, "acknowledged"));
    json_decref(audit);
    run_release(&r);
}

static void a_restored_aggregator_repeats_no_version(void **state)
{
    scene *s = *state;
    e2e_fleet *f = &s->fleet;
    json_t *rows, *lost, *after;
    const char *backup = temp_path(&f->root, "backup");
    char line[96];
    wait_for_version(s, 1);
    e2e_command(f, "backup", backup);
    int64_t at_backup = newest(f, &rows); /* or one more: so it is no less strict */
    json_decref(rows);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, &e2e_after);
    wait_for_version(s, at_backup + 1);
    e2e_command(f, "pause", NULL); /* nothing is published between the list and the loss */
    int64_t before = newest(f, &lost);
    assert_true(before > at_backup);

    restore(f, backup);
    wait_for_version(s, before);
    for (unsigned i = 0; i < NODES; i++)
        atomic_store(&s->users[i].topic, &e2e_before);
    assert_true(e2e_saw(&f->aggregator, "event=merge_started"));
    int64_t republished = newest(f, &rows);
    json_decref(rows);
    wait_for_version(s, republished); /* one that was learned after the restore */
    e2e_settle(f);
    int64_t last = newest(f, &after);
    print_message("versions: %lld at the backup, %lld when lost, %lld at last\n",
                  (long long)at_backup, (long long)before, (long long)last);
    check_versions(lost, after, at_backup);
    assert_true(last > before);
    snprintf(line, sizeof line, "event=release_confirmed version=%lld", (long long)last);
    for (unsigned i = 0; i < NODES; i++) {
        assert_true(e2e_logged(&f->nodes[i].process, line));
        e2e_user_stop(&s->users[i]);
        if (atomic_load(&s->users[i].bad) > 0)
            fail_msg("%s: %s", s->users[i].name, s->users[i].first_bad);
        assert_int_equal(atomic_load(&s->users[i].broken), 0); /* no node noticed it */
    }
    json_decref(lost);
    json_decref(after);
    e2e_fleet_stop(f);
    check_audit(f);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_restored_aggregator_repeats_no_version, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
