/*
 * A node changes its key: while it runs, and killed before anybody heard of the next one and just
 * before the old one is gone. It stays the same node. argv[1]: the programs' folder.
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

#include "shared/base/file.h"
#include "shared/net/net.h"
#include "tests/e2e/harness.h"

static const char *bin;

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    e2e_fleet_make(f, 1);
    e2e_aggregator_start(f, NULL);
    assert_true(e2e_aggregator_ready(f));
    e2e_enrol(f, 0);
    return 0;
}

static int release(void **state)
{
    e2e_fleet_release(*state);
    free(*state);
    return 0;
}

static void start(e2e_fleet *f, const char *failpoint)
{
    e2e_node_start(f, 0, failpoint);
    assert_true(e2e_node_ready(f, 0));
}

static int rotate(e2e_fleet *f)
{
    e2e_process p = {0};
    snprintf(p.log, sizeof p.log, "%s/rotate.log", f->root.path);
    e2e_start(&p,
              (const char *const[]){e2e_program(f, "shoal-node"), "rotate", "--dir",
                                    f->nodes[0].dir, NULL},
              NULL);
    return e2e_wait(&p);
}

static void key_of(const e2e_fleet *f, const char *name, char hex[SH_HASH_HEX_BYTES])
{
    char path[160];
    sh_net_keys keys;
    snprintf(path, sizeof path, "%s/%s", f->nodes[0].dir, name);
    OK(sh_net_keys_load(path, &keys, err));
    sh_hex(keys.public_key.b, sizeof keys.public_key.b, hex);
}

static bool has_next(const e2e_fleet *f)
{
    char path[160];
    snprintf(path, sizeof path, "%s/node.key.next", f->nodes[0].dir);
    return sh_file_exists(path);
}

/* One node, enrolled once, which has this key now. */
static void expect_same_node(e2e_fleet *f, const char *key)
{
    int code;
    json_t *reply = e2e_tool(f, (const char *const[]){"nodes", NULL}, &code);
    assert_int_equal(code, 0);
    const json_t *nodes = json_object_get(reply, "nodes");
    assert_int_equal(json_array_size(nodes), 1);
    const json_t *node = json_array_get(nodes, 0);
    assert_string_equal(json_string_value(json_object_get(node, "key")), f->nodes[0].key);
    assert_string_equal(json_string_value(json_object_get(node, "current_key")), key);
    json_decref(reply);
}

static void while_it_runs(void **state)
{
    e2e_fleet *f = *state;
    char old[SH_HASH_HEX_BYTES], now[SH_HASH_HEX_BYTES];
    start(f, NULL);
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    key_of(f, "node.key", old);
    assert_int_equal(rotate(f), 0);
    assert_true(e2e_saw(&f->nodes[0].process, "event=rotate state=done"));
    key_of(f, "node.key", now);
    assert_string_not_equal(old, now);
    E2E_UNTIL(!has_next(f), "the next pair is the pair");
    expect_same_node(f, now);
    assert_int_equal(e2e_node_int(f, 0, "renewals"), 0); /* and its commands go by the new key */
    assert_int_equal(rotate(f), 0);                      /* once more */
    E2E_UNTIL(!has_next(f), "the second one is done");
    key_of(f, "node.key", old);
    assert_string_not_equal(old, now);
    expect_same_node(f, old);
    e2e_fleet_stop(f);
}

static void killed_in_between(void **state)
{
    static const char *const points[] = {"node.rotate", "node.rotated"};
    e2e_fleet *f = *state;
    for (unsigned i = 0; i < SH_COUNT(points); i++) {
        char old[SH_HASH_HEX_BYTES], now[SH_HASH_HEX_BYTES];
        key_of(f, "node.key", old);
        start(f, points[i]);
        assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
        (void)rotate(f); /* its answer may be lost with the daemon */
        e2e_expect_death(&f->nodes[0].process, points[i]);
        assert_true(has_next(f));
        start(f, NULL);
        E2E_UNTIL(!has_next(f), "the change went on");
        key_of(f, "node.key", now);
        assert_string_not_equal(old, now);
        E2E_UNTIL(e2e_logged(&f->nodes[0].process, "event=checked_in"), "it checks in");
        expect_same_node(f, now);
        assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    }
    e2e_fleet_stop(f);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    bin = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(while_it_runs, make, release),
        cmocka_unit_test_setup_teardown(killed_in_between, make, release),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
