/*
 * Who is let in, with real nodes: a key that is not enrolled, enrolled while it waits, revoked
 * while it is connected, enrolled again; and a node that expects another aggregator. Inference and
 * feedback go on through all of it. argv[1]: the programs' folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/net/net.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/probe.h"

static const char *bin;
static char page[1 << 17];

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    e2e_fleet_make(f, 2);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
    return 0;
}

static int release(void **state)
{
    e2e_fleet_release(*state);
    free(*state);
    return 0;
}

static unsigned count_lines(const e2e_process *p, const char *text)
{
    char *log = e2e_log(p);
    unsigned n = 0;
    for (const char *at = log; (at = strstr(at, text)) != NULL; at += strlen(text))
        n++;
    free(log);
    return n;
}

/* When the aggregator last heard of node i; 0: never. */
static int64_t last_heard(e2e_fleet *f, unsigned i)
{
    int code;
    size_t k;
    const json_t *node;
    int64_t ms = -1;
    json_t *reply = e2e_tool(f, (const char *const[]){"nodes", NULL}, &code);
    assert_int_equal(code, 0);
    json_array_foreach(json_object_get(reply, "nodes"), k, node)
    {
        const char *key = json_string_value(json_object_get(node, "key"));
        if (key && strcmp(key, f->nodes[i].key) == 0)
            ms = (int64_t)json_integer_value(json_object_get(node, "last_ms"));
    }
    json_decref(reply);
    return ms;
}

/* What the node is there for does not depend on its aggregator. */
static void expect_serves(e2e_fleet *f, unsigned i)
{
    char id[64];
    probe_complete(f->nodes[i].port, "all the same", "bob", id);
    assert_int_equal(probe_feedback(f->nodes[i].port, id, "edit", " it goes on"), 200);
}

static bool is_link(e2e_fleet *f, unsigned i, const char *state)
{
    json_t *s = e2e_node_status(f, i);
    const char *link = json_string_value(json_object_get(s, "link"));
    bool is = link && strcmp(link, state) == 0;
    json_decref(s);
    return is;
}

static double refused_handshakes(e2e_fleet *f)
{
    char at[64];
    unsigned port;
    assert_true(e2e_value(&f->aggregator, "event=ready", "http", at, sizeof at));
    assert_int_equal(sscanf(at, "127.0.0.1:%u", &port), 1);
    assert_int_equal(probe_ask(port, "GET", "/metrics", NULL, page, sizeof page), 200);
    return probe_metric(page, "shoal_aggregator_handshakes_refused_total");
}

static void enrolled_revoked_and_enrolled_again(void **state)
{
    e2e_fleet *f = *state;
    e2e_process *node = &f->nodes[0].process;
    e2e_enrol(f, 1);
    e2e_node_start(f, 0, NULL);
    e2e_node_start(f, 1, NULL);
    assert_true(e2e_node_ready(f, 0) && e2e_node_ready(f, 1));
    assert_true(e2e_saw(node, "event=link state=refused"));
    E2E_UNTIL(refused_handshakes(f) >= 1, "the refusal is counted");
    expect_serves(f, 0);
    assert_true(e2e_saw(&f->nodes[1].process, "event=checked_in"));
    assert_false(e2e_logged(node, "event=checked_in"));

    e2e_enrol(f, 0); /* the node tries again by itself */
    assert_true(e2e_saw(node, "event=checked_in"));
    assert_true(e2e_saw(node, "event=link state=up"));

    e2e_command(f, "revoke", f->nodes[0].key);
    E2E_UNTIL(is_link(f, 0, "refused"), "the revoked node is cut off");
    int64_t heard = last_heard(f, 0), other = last_heard(f, 1);
    unsigned before = count_lines(node, "event=checked_in");
    expect_serves(f, 0);
    /* While the other one is heard again and again, this one is not. */
    for (int turn = 0; turn < 3; turn++) {
        E2E_UNTIL(last_heard(f, 1) > other, "the other node is heard");
        other = last_heard(f, 1);
    }
    assert_int_equal(last_heard(f, 0), heard);
    assert_int_equal(count_lines(node, "event=checked_in"), before);

    e2e_enrol(f, 0);
    E2E_UNTIL(count_lines(node, "event=checked_in") > before, "it is let in again");
    assert_true(last_heard(f, 0) >= heard);
    expect_serves(f, 0);
    e2e_fleet_stop(f);
}

/* A node that was set up with a token needs no operator, and the token is gone when it was of use.
 */
static void enrolled_by_a_token(void **state)
{
    e2e_fleet *f = *state;
    char file[SH_PATH_BYTES], kept[SH_PATH_BYTES], dir[SH_PATH_BYTES], bundle[SH_PATH_BYTES];
    char endpoint[64];
    int code;
    OK(sh_path_join(file, sizeof file, f->root.path, "token", err));
    OK(sh_path_join(dir, sizeof dir, f->root.path, "by-token", err));
    OK(sh_path_join(kept, sizeof kept, dir, "enrol.token", err));
    OK(sh_path_join(bundle, sizeof bundle, f->aggregator_dir, "bundle", err));
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:%u", f->port);
    const char *const init[] = {"init",   "--dir",        dir,  "--bundle", bundle, "--aggregator",
                                endpoint, "--token-file", file, NULL};
    OK(sh_file_write_atomic(file, "no token", 8, err));
    run_result bad = run_program(e2e_program(f, "shoal-node"), init, NULL, 0);
    assert_int_equal(bad.exit_code, 2);
    assert_non_null(strstr(bad.err, "token"));
    run_release(&bad);
    json_t *reply = e2e_tool(f, (const char *const[]){"token", "add", "--uses", "1", NULL}, &code);
    assert_int_equal(code, 0);
    const char *token = json_string_value(json_object_get(reply, "token"));
    OK(sh_file_write_atomic(file, token, strlen(token), err));
    run_result good = run_program(e2e_program(f, "shoal-node"), init, NULL, 0);
    assert_int_equal(good.exit_code, 0);
    assert_null(strstr(good.out, "shoal aggregator enrol")); /* nobody has to */
    run_release(&good);
    /* The fleet's node 0 goes on as if it had been set up so. */
    struct stat st;
    assert_int_equal(stat(kept, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    OK(sh_path_join(kept, sizeof kept, f->nodes[0].dir, "enrol.token", err));
    OK(sh_file_write_atomic(kept, token, strlen(token), err));
    json_decref(reply);
    e2e_node_start(f, 0, NULL);
    e2e_node_start(f, 1, NULL); /* has none */
    assert_true(e2e_node_ready(f, 0) && e2e_node_ready(f, 1));
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    E2E_UNTIL(!sh_file_exists(kept), "the token is forgotten");
    assert_true(last_heard(f, 0) > 0);
    assert_int_equal(last_heard(f, 1), -1);
    /* What it is now does not depend on the token any more. */
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGKILL), 128 + SIGKILL);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    expect_serves(f, 1);
    assert_false(e2e_logged(&f->nodes[1].process, "event=checked_in"));
    e2e_fleet_stop(f);
}

static bool has(const json_t *status, const char *key, const char *text)
{
    const char *value = json_string_value(json_object_get(status, key));
    return value && strstr(value, text);
}

static bool is_told(e2e_fleet *f, unsigned i, const char *reason, const char *advice)
{
    json_t *s = e2e_node_status(f, i);
    bool yes = has(s, "link", "refused") && has(s, "link_reason", reason) &&
               has(s, "link_advice", advice) && has(s, "link_advice", f->nodes[i].key);
    json_decref(s);
    return yes;
}

/* As a person sees it. The connection may just be a new one: then it says so. */
static bool is_printed(e2e_fleet *f, unsigned i, const char *reason, const char *advice)
{
    char line[256];
    run_result r =
        run_program(e2e_program(f, "shoal-node"),
                    (const char *const[]){"status", "--dir", f->nodes[i].dir, NULL}, NULL, 0);
    snprintf(line, sizeof line, "\nlink                 refused: %s", reason);
    bool yes = r.exit_code == 0 && strstr(r.out, line) && strstr(r.out, advice) &&
               !strstr(r.out, "link_advice");
    run_release(&r);
    return yes;
}

static void says(e2e_fleet *f, unsigned i, const char *reason, const char *advice)
{
    E2E_UNTIL(is_told(f, i, reason, advice), "its status says why, and what to do");
    E2E_UNTIL(is_printed(f, i, reason, advice), "it is printed");
    assert_int_equal(probe_ask(f->nodes[i].port, "GET", "/metrics", NULL, page, sizeof page), 200);
    assert_true(probe_metric(page, "shoal_sync_link_up") == 0);
}

/* While a token is open the aggregator hears strangers out: the network is up, and they are not in.
 */
static void a_refusal_says_why_and_what_to_do(void **state)
{
    e2e_fleet *f = *state;
    char wrong[SH_HASH_HEX_BYTES], path[SH_PATH_BYTES];
    int code;
    json_decref(e2e_tool(f, (const char *const[]){"token", "add", "--uses", "1", NULL}, &code));
    assert_int_equal(code, 0);
    memset(wrong, 'a', sizeof wrong);
    OK(sh_path_join(path, sizeof path, f->nodes[0].dir, "enrol.token", err));
    OK(sh_file_write_atomic(path, wrong, sizeof wrong - 1, err));
    for (unsigned i = 0; i < 2; i++) {
        e2e_node_start(f, i, NULL);
        assert_true(e2e_node_ready(f, i));
    }
    says(f, 0, "this token is not valid", "into enrol.token");
    says(f, 1, "this key is not enrolled", "shoal aggregator enrol");
    for (unsigned i = 0; i < 2; i++)
        e2e_enrol(f, i);
    for (unsigned i = 0; i < 2; i++) {
        E2E_UNTIL(is_link(f, i, "up"), "it is let in");
        assert_true(e2e_saw(&f->nodes[i].process, "event=checked_in"));
    }
    e2e_command(f, "revoke", f->nodes[1].key);
    E2E_UNTIL(is_told(f, 1, "revoked", "shoal aggregator enrol"), "the revoked node is cut off");
    e2e_fleet_stop(f);
}

/* A revocation outlives both processes. */
static void revoked_for_good(void **state)
{
    e2e_fleet *f = *state;
    e2e_enrol(f, 0);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    e2e_command(f, "revoke", f->nodes[0].key);
    assert_int_equal(e2e_end(&f->aggregator, SIGKILL), 128 + SIGKILL);
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGKILL), 128 + SIGKILL);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    assert_true(e2e_saw(&f->nodes[0].process, "event=link state=refused"));
    expect_serves(f, 0);
    assert_false(e2e_logged(&f->nodes[0].process, "event=checked_in"));
    e2e_fleet_stop(f);
}

/* Somebody else answers at the address: the node tells him nothing. */
static void another_aggregator_is_not_believed(void **state)
{
    e2e_fleet *f = *state;
    sh_net_keys other;
    char path[SH_PATH_BYTES], hex[SH_HASH_HEX_BYTES + 1];
    e2e_enrol(f, 0);
    OK(sh_net_keys_make(&other, err));
    sh_hex(other.public_key.b, 32, hex);
    hex[64] = '\n';
    OK(sh_path_join(path, sizeof path, f->nodes[0].dir, "aggregator.pub", err));
    OK(sh_file_write_atomic(path, hex, 65, err));
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    assert_true(e2e_saw(&f->nodes[0].process, "event=link state=refused"));
    expect_serves(f, 0);
    assert_false(e2e_logged(&f->nodes[0].process, "event=link state=up"));
    assert_int_equal(last_heard(f, 0), 0);
    e2e_fleet_stop(f);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(enrolled_revoked_and_enrolled_again, make, release),
        cmocka_unit_test_setup_teardown(a_refusal_says_why_and_what_to_do, make, release),
        cmocka_unit_test_setup_teardown(enrolled_by_a_token, make, release),
        cmocka_unit_test_setup_teardown(revoked_for_good, make, release),
        cmocka_unit_test_setup_teardown(another_aggregator_is_not_believed, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
