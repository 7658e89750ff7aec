/*
 * shoal-aggregator as an operator meets it: set-up and what is refused, keys that are let in and
 * shut out, commands, pages, backup and restore.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "tests/e2e/aggregator_rig.h"

static const char *program, *tool;
static const char *const flags[] = {"--learn.drifting-min",
                                    "1",
                                    "--learn.buffer",
                                    "1",
                                    "--gate.overall-max",
                                    "10",
                                    "--gate.slice-max",
                                    "100",
                                    "--learn.rounds-max",
                                    "2",
                                    NULL};

/* Runs to the end; one line on stderr that has `text`. */
static void refused(const char *const *words, int exit_code, const char *text)
{
    run_result out = run_program(program, words, NULL, 0);
    if (out.exit_code != exit_code || strstr(out.err, text) == NULL ||
        strchr(out.err, '\n') != out.err + out.n_err - 1)
        fail_msg("exit code %d, '%s'; wanted %d, '%s'", out.exit_code, out.err, exit_code, text);
    run_release(&out);
}

#define REFUSED(code, text, ...) refused((const char *[]){__VA_ARGS__, NULL}, code, text)

/* Plays until the condition holds. */
#define PLAY_UNTIL(r, condition)                                                                   \
    do {                                                                                           \
        uint64_t play_end_ = sh_clock_mono_ms() + AGG_WAIT_MS;                                     \
        while (!(condition)) {                                                                     \
            if (sh_clock_mono_ms() > play_end_)                                                    \
                fail_msg("this did not come true: %s", #condition);                                \
            agg_play(r, 20);                                                                       \
        }                                                                                          \
    } while (0)

static void bad_input_is_one_clear_line(void **state)
{
    (void)state;
    agg_rig r;
    char path[192], text[8192];
    agg_make(&r, program, tool);
    REFUSED(2, "--dir is missing", "run");
    REFUSED(2, "is not there", "--dir", "/tmp/shoal-no-such-folder");
    REFUSED(2, "unknown option '--frob'", "--dir", r.dir, "--frob");
    REFUSED(2, "is no command", "frob");
    REFUSED(2, "not empty", "init", "--dir", r.dir, "--base", r.base);
    snprintf(path, sizeof path, "%s/new", r.root);
    REFUSED(2, "--base", "init", "--dir", path);
    REFUSED(2, "is not there", "init", "--dir", path, "--base", "/tmp/shoal-no-such-file");
    REFUSED(2, "log level", "--dir", r.dir, "--log.level", "loud");
    REFUSED(2, "must be of this machine", "--dir", r.dir, "--http.address", "0.0.0.0",
            "--http.port", "0", "--listen", "tcp://127.0.0.1:*");
    snprintf(path, sizeof path, "%s/release.key", r.dir);
    assert_int_equal(chmod(path, 0644), 0);
    REFUSED(2, "chmod 600", "--dir", r.dir, "--http.port", "0");
    assert_int_equal(chmod(path, 0600), 0);

    agg_start(&r, NULL, NULL);
    agg_ready(&r);
    REFUSED(1, "another shoal-aggregator runs on it", "--dir", r.dir, "--http.port", "0");
    snprintf(path, sizeof path, "%s/B", r.root);
    agg_rig other;
    agg_make(&other, program, tool);
    REFUSED(1, "in use", "--dir", other.dir, "--http.port", "0", "--listen", r.endpoint);
    REFUSED(1, "in use", "--dir", other.dir, "--http.port", strrchr(r.http, ':') + 1, "--listen",
            "tcp://127.0.0.1:*");
    agg_release(&other);
    assert_int_equal(agg_http(&r, "/healthz", text, sizeof text), 200);
    assert_int_equal(agg_http(&r, "/frob", text, sizeof text), 404);
    assert_int_equal(agg_end(&r, SIGINT), 0);
    agg_release(&r);
}

static void only_enrolled_keys_are_let_in(void **state)
{
    (void)state;
    agg_rig r;
    int code;
    char hex[SH_HASH_HEX_BYTES];
    static char text[1 << 16];
    agg_make(&r, program, tool);
    agg_start(&r, flags, NULL);
    agg_ready(&r);
    agg_dial(&r, 0);
    PLAY_UNTIL(&r, r.peers[0].refused);
    assert_false(r.peers[0].up);

    agg_enrol(&r, 0);
    agg_enrol(&r, 1);
    agg_dial(&r, 0);
    agg_dial(&r, 1);
    PLAY_UNTIL(&r, r.peers[0].welcomed && r.peers[1].welcomed);
    assert_int_equal(agg_http(&r, "/metrics", text, sizeof text), 200);
    assert_non_null(strstr(text, "\nshoal_aggregator_up 1\n"));

    /* Shut out while connected: nothing of it is heard any more, and it may not come again. */
    sh_hex(r.peers[0].keys.public_key.b, 32, hex);
    json_decref(agg_tool(&r, (const char *[]){"revoke", hex, NULL}, &code));
    assert_int_equal(code, 0);
    assert_true(agg_logged(&r, "event=revoked"));
    agg_dial(&r, 0);
    PLAY_UNTIL(&r, r.peers[0].refused);
    assert_true(r.peers[1].welcomed && r.peers[1].up);
    assert_null(agg_tool(&r, (const char *[]){"revoke", hex, NULL}, &code));
    assert_int_equal(code, 2);

    assert_null(agg_tool(&r, (const char *[]){"enrol", "ff", NULL}, &code));
    assert_int_equal(code, 2);
    json_t *nodes = agg_tool(&r, (const char *[]){"nodes", NULL}, &code);
    assert_int_equal(json_array_size(json_object_get(nodes, "nodes")), 2);
    json_decref(nodes);
    /* Revoked survives a restart. */
    assert_int_equal(agg_end(&r, SIGKILL), 128 + SIGKILL);
    agg_start(&r, flags, NULL);
    agg_ready(&r);
    agg_dial(&r, 0);
    PLAY_UNTIL(&r, r.peers[0].refused);
    assert_int_equal(agg_http(&r, "/", text, sizeof text), 200);
    assert_non_null(strstr(text, "kiosk"));
    assert_null(strstr(text, "<script"));
    json_decref(agg_tool(&r, (const char *[]){"stop", NULL}, &code));
    assert_int_equal(code, 0);
    assert_int_equal(agg_wait(&r), 0);
    assert_null(agg_tool(&r, (const char *[]){"status", NULL}, &code));
    assert_int_not_equal(code, 0);
    agg_release(&r);
}

static uint64_t release_of(agg_rig *r)
{
    json_t *status = agg_status(r);
    uint64_t version = (uint64_t)json_integer_value(json_object_get(status, "release"));
    json_decref(status);
    return version;
}

static bool is_released(agg_rig *r, uint64_t version)
{
    char text[64];
    snprintf(text, sizeof text, "event=released version=%llu", (unsigned long long)version);
    return agg_logged(r, text);
}

static void damage(const char *dir)
{
    char path[SH_PATH_BYTES];
    OK(sh_path_join(path, sizeof path, dir, "bundle/genesis.manifest", err));
    FILE *f = fopen(path, "r+");
    assert_non_null(f);
    int c = fgetc(f);
    assert_int_equal(fseek(f, 0, SEEK_SET), 0);
    fputc(c ^ 1, f);
    fclose(f);
}

/* A backup at release 2; the fleet goes on to 3; the restored one never gives 3 again. */
static void a_restored_backup_gives_no_version_twice(void **state)
{
    (void)state;
    agg_rig r;
    int code;
    char backup[128], restored[128];
    agg_make(&r, program, tool);
    snprintf(backup, sizeof backup, "%s/backup", r.root);
    snprintf(restored, sizeof restored, "%s/restored", r.root);
    agg_start(&r, flags, NULL);
    agg_ready(&r);
    agg_enrol(&r, 0);
    agg_dial(&r, 0);
    PLAY_UNTIL(&r, is_released(&r, 2));
    json_decref(agg_tool(&r, (const char *[]){"pause", NULL}, &code));
    uint64_t at_backup = release_of(&r);
    json_decref(agg_tool(&r, (const char *[]){"backup", backup, NULL}, &code));
    assert_int_equal(code, 0);
    assert_null(agg_tool(&r, (const char *[]){"backup", backup, NULL}, &code));
    assert_int_equal(code, 2);
    json_decref(agg_tool(&r, (const char *[]){"resume", NULL}, &code));
    /* An operator's rollback is a new version, and its bytes come from objects/. */
    json_t *rolled = agg_tool(&r, (const char *[]){"rollback", "1", NULL}, &code);
    assert_int_equal(code, 0);
    uint64_t newest = (uint64_t)json_integer_value(json_object_get(rolled, "release"));
    json_decref(rolled);
    assert_true(newest > at_backup);
    PLAY_UNTIL(&r, r.peers[0].version >= newest);
    assert_null(agg_tool(&r, (const char *[]){"rollback", "99", NULL}, &code));
    assert_int_equal(code, 2);
    newest = release_of(&r);
    assert_int_equal(agg_end(&r, SIGTERM), 0);

    REFUSED(2, "not empty", "restore", "--from", backup, "--dir", r.dir);
    const char *words[] = {"restore", "--from", backup, "--dir", restored, NULL};
    run_result out = run_program(program, words, NULL, 0);
    if (out.exit_code != 0)
        fail_msg("restore: %s", out.err);
    run_release(&out);
    snprintf(r.dir, sizeof r.dir, "%s", restored);
    agg_start(&r, flags, NULL);
    agg_ready(&r);
    assert_true(agg_logged(&r, "event=restored"));
    PLAY_UNTIL(&r, r.peers[0].version > newest);
    assert_true(release_of(&r) > newest);
    assert_int_equal(agg_end(&r, SIGTERM), 0);

    damage(backup);
    snprintf(restored, sizeof restored, "%s/third", r.root);
    REFUSED(1, "SHA-256", "restore", "--from", backup, "--dir", restored);
    REFUSED(2, "was not finished", "--dir", restored, "--http.port", "0");
    agg_release(&r);
}

static void a_closed_aggregator_answers(void **state)
{
    (void)state;
    agg_rig r;
    int code;
    agg_make(&r, program, tool);
    agg_start(&r, flags, NULL);
    agg_ready(&r);
    agg_enrol(&r, 0);
    agg_dial(&r, 0);
    json_decref(agg_tool(&r, (const char *[]){"server-scale", "0.5", NULL}, &code));
    assert_int_equal(code, 0);
    assert_null(agg_tool(&r, (const char *[]){"server-scale", "-1", NULL}, &code));
    assert_int_equal(code, 2);
    json_decref(agg_tool(&r, (const char *[]){"log-level", "debug", NULL}, &code));
    assert_int_equal(code, 0);
    PLAY_UNTIL(&r, r.peers[0].version >= 2);
    json_decref(agg_tool(&r, (const char *[]){"close", NULL}, &code));
    assert_int_equal(code, 0);
    PLAY_UNTIL(&r, agg_logged(&r, "event=closed"));
    json_t *status = agg_status(&r);
    assert_true(json_is_true(json_object_get(status, "closed")));
    json_decref(status);
    json_t *audit = agg_tool(&r, (const char *[]){"audit", "--limit", "3", NULL}, &code);
    assert_int_equal(json_array_size(json_object_get(audit, "audit")), 3);
    json_decref(audit);
    json_t *releases = agg_tool(&r, (const char *[]){"releases", NULL}, &code);
    const json_t *rows = json_object_get(releases, "releases");
    assert_true(json_array_size(rows) >= 2);
    assert_string_equal(json_string_value(json_object_get(json_array_get(rows, 1), "verdict")),
                        "released");
    json_decref(releases);
    assert_int_equal(agg_end(&r, SIGTERM), 0);
    agg_release(&r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_input_is_one_clear_line),
        cmocka_unit_test(only_enrolled_keys_are_let_in),
        cmocka_unit_test(a_closed_aggregator_answers),
        cmocka_unit_test(a_restored_backup_gives_no_version_twice),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
