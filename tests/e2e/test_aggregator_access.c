/*
 * Access over real sockets: one-time tokens, a list of keys, a key that is replaced, revocation and
 * limits while a node is connected. The test plays the nodes. argv: shoal-aggregator, shoal.
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
#include "tests/e2e/aggregator_rig.h"

#define EPOCH 5

/* ---- a node ---- */

typedef struct {
    sh_net_keys keys;
    sh_net_client *client;
    char hex[SH_HASH_HEX_BYTES];
} node;

static const char *program, *tool;
static node nodes[4]; /* of the test that runs */
static size_t n_nodes;

static int make(void **state)
{
    agg_rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    *state = r;
    agg_make(r, program, tool);
    return 0;
}

static int release(void **state)
{
    while (n_nodes > 0)
        sh_net_client_destroy(&nodes[--n_nodes].client, 0);
    agg_release(*state);
    free(*state);
    return 0;
}

static node *node_with(agg_rig *r, const sh_net_keys *keys)
{
    assert_true(n_nodes < SH_COUNT(nodes));
    node *n = &nodes[n_nodes++];
    n->keys = *keys;
    sh_hex(n->keys.public_key.b, sizeof n->keys.public_key.b, n->hex);
    OK(sh_net_client_create(r->net,
                            &(sh_net_client_options){.endpoint = r->endpoint,
                                                     .server_key = r->server_key,
                                                     .keys = &n->keys,
                                                     .message_max = SH_WIRE_MESSAGE_MAX,
                                                     .reconnect_min_ms = 20,
                                                     .reconnect_max_ms = 200},
                            &n->client, err));
    return n;
}

static node *node_make(agg_rig *r)
{
    sh_net_keys keys;
    OK(sh_net_keys_make(&keys, err));
    return node_with(r, &keys);
}

/* The next event that is no `but`. */
static sh_net_event node_next(node *n, sh_net_event_kind but)
{
    sh_net_event event = {0};
    uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS;
    while (sh_clock_mono_ms() < end) {
        OK(sh_net_client_next(n->client, &event, err));
        if (event.kind != SH_NET_NONE && event.kind != but)
            return event;
        if (event.kind == SH_NET_NONE)
            OK(sh_net_wait(
                &(sh_net_waiting){.clients = &n->client, .n_clients = 1, .timeout_ms = 100}, err));
    }
    fail_msg("nothing comes");
    return event;
}

static void node_until(node *n, sh_net_event_kind kind)
{
    while (node_next(n, SH_NET_NONE).kind != kind)
        ;
}

static void node_send(node *n, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, err));
    OK(sh_net_client_send(n->client, bytes.data, bytes.len, err));
    sh_buf_release(&bytes);
}

/* The answer; its texts are valid until the next one. */
static const sh_msg *node_ask(node *n, const sh_msg *msg)
{
    static uint8_t bytes[SH_WIRE_MESSAGE_MAX];
    static sh_msg answer;
    node_send(n, msg);
    sh_net_event event = node_next(n, SH_NET_UP);
    assert_int_equal(event.kind, SH_NET_MESSAGE);
    memcpy(bytes, event.data, event.n);
    OK(sh_msg_decode(bytes, event.n, &answer, err));
    return &answer;
}

static bool node_enrol(node *n, sh_bytes token)
{
    const sh_msg *m = node_ask(n, &(sh_msg){.type = SH_MSG_ENROL,
                                            .enrol = {.epoch = EPOCH,
                                                      .agent = "test",
                                                      .kernel = "none",
                                                      .cores = 1,
                                                      .memory_bytes = 1,
                                                      .token = token}});
    assert_int_equal(m->type, SH_MSG_WELCOME);
    return m->welcome.accepted;
}

static sh_msg_type node_checkin(node *n)
{
    return node_ask(n, &(sh_msg){.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}})->type;
}

/* ---- the operator ---- */

static json_t *command(agg_rig *r, const char *const *words)
{
    int code;
    json_t *reply = agg_tool(r, words, &code);
    assert_int_equal(code, 0);
    return reply;
}

static void add_token(agg_rig *r, const char *uses, sh_hash *token)
{
    json_t *reply =
        command(r, (const char *[]){"token", "add", "--uses", uses, "--name", "spring", NULL});
    OK(sh_hash_parse(json_string_value(json_object_get(reply, "token")), token, err));
    json_decref(reply);
}

static int64_t status_of(agg_rig *r, const char *key)
{
    json_t *status = agg_status(r);
    int64_t n = e2e_int(status, key);
    json_decref(status);
    return n;
}

/* ---- tests ---- */

static void tokens(void **state)
{
    agg_rig *r = *state;
    sh_hash token, other = {{9}};
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node *a = node_make(r);
    node_until(a, SH_NET_REFUSED); /* nobody is let in */
    add_token(r, "1", &token);
    node_until(a, SH_NET_UP);
    /* As long as it is not enrolled it may enrol, and is disconnected for anything else. */
    assert_int_equal(node_checkin(a), SH_MSG_ERROR);
    node_until(a, SH_NET_DOWN);
    node_until(a, SH_NET_UP);
    assert_false(node_enrol(a, (sh_bytes){other.b, sizeof other.b}));
    node_until(a, SH_NET_DOWN);
    node_until(a, SH_NET_UP);
    assert_true(node_enrol(a, (sh_bytes){token.b, sizeof token.b}));
    assert_int_equal(node_checkin(a), SH_MSG_PLAN);
    /* It was for one: the door is shut again. */
    node *b = node_make(r);
    node_until(b, SH_NET_REFUSED);
    assert_int_equal(status_of(r, "enrolled"), 1);
    assert_int_equal(status_of(r, "tokens"), 0);
    assert_int_equal(status_of(r, "tokens_refused"), 1);
    assert_int_equal(node_checkin(a), SH_MSG_PLAN); /* on the same connection, all the while */
    /* A token outlives the process, and can be withdrawn. */
    add_token(r, "5", &token);
    assert_int_equal(agg_end(r, SIGKILL), 128 + SIGKILL);
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node_until(b, SH_NET_UP);
    assert_true(node_enrol(b, (sh_bytes){token.b, sizeof token.b}));
    json_t *list = command(r, (const char *[]){"token", "list", NULL});
    const json_t *row = json_array_get(json_object_get(list, "tokens"), 0);
    assert_int_equal(e2e_int(row, "uses_left"), 4);
    json_decref(command(r, (const char *[]){"token", "remove",
                                            json_string_value(json_object_get(row, "id")), NULL}));
    json_decref(list);
    node *c = node_make(r);
    node_until(c, SH_NET_REFUSED);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

static void replaced_and_revoked(void **state)
{
    agg_rig *r = *state;
    static const char token[] = "a token of the node's own";
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node *old = node_make(r), *new = node_make(r);
    json_decref(command(r, (const char *[]){"enrol", old->hex, NULL}));
    node_until(old, SH_NET_UP);
    assert_true(node_enrol(old, (sh_bytes){0}));
    const sh_msg *m = node_ask(
        old, &(sh_msg){.type = SH_MSG_ROTATE,
                       .rotate = {.key = new->keys.public_key, .token = {token, sizeof token}}});
    assert_int_equal(m->type, SH_MSG_ROTATE);
    node_until(new, SH_NET_UP);
    assert_true(node_enrol(new, (sh_bytes){token, sizeof token}));
    /* The old key is cut off without a word of its own, and cannot come again. */
    node_until(old, SH_NET_DOWN);
    node_until(old, SH_NET_REFUSED);
    assert_int_equal(node_checkin(new), SH_MSG_PLAN);
    json_t *list = command(r, (const char *[]){"nodes", NULL});
    const json_t *row = json_array_get(json_object_get(list, "nodes"), 0);
    assert_int_equal(json_array_size(json_object_get(list, "nodes")), 1);
    assert_string_equal(json_string_value(json_object_get(row, "key")), old->hex);
    assert_string_equal(json_string_value(json_object_get(row, "current_key")), new->hex);
    json_decref(list);
    assert_int_equal(agg_end(r, SIGKILL), 128 + SIGKILL);
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node_until(new, SH_NET_UP);
    assert_int_equal(node_checkin(new), SH_MSG_PLAN);
    /* Revoked by the key that the operator knows it by: the one that it has is shut. */
    json_decref(command(r, (const char *[]){"revoke", old->hex, NULL}));
    int64_t windows = status_of(r, "bad_messages");
    node_until(new, SH_NET_DOWN);
    node_until(new, SH_NET_REFUSED);
    assert_int_equal(status_of(r, "bad_messages"), windows);
    json_decref(command(r, (const char *[]){"enrol", old->hex, NULL}));
    node_until(new, SH_NET_UP);
    assert_int_equal(node_checkin(new), SH_MSG_PLAN);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

static void lists(void **state)
{
    agg_rig *r = *state;
    char path[128];
    sh_buf text;
    int code;
    snprintf(path, sizeof path, "%s/list", r->root);
    sh_buf_init(&text, 1u << 20);
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node *a = node_make(r);
    for (unsigned i = 0; i < 1500; i++) {
        char line[160];
        int n = snprintf(line, sizeof line, "%056u%08x%s", 7u, i, i % 2 ? " kiosk 7\n" : "\n");
        OK(sh_buf_append(&text, line, (size_t)n));
    }
    OK(sh_buf_append(&text, "# the one that is real\n", 23));
    OK(sh_buf_append(&text, a->hex, 64));
    size_t good = text.len;
    OK(sh_buf_append(&text, "\nnot a key\n", 11));
    OK(sh_file_write_atomic(path, text.data, text.len, err));
    assert_null(agg_tool(r, (const char *[]){"enrol", "--file", path, NULL}, &code));
    assert_int_equal(code, 2);
    assert_int_equal(status_of(r, "enrolled"), 0); /* none of them */
    OK(sh_file_write_atomic(path, text.data, good, err));
    json_t *reply = command(r, (const char *[]){"enrol", "--file", path, NULL});
    assert_int_equal(e2e_int(reply, "enrolled"), 1501);
    json_decref(reply);
    assert_int_equal(status_of(r, "enrolled"), 1501);
    node_until(a, SH_NET_UP);
    assert_true(node_enrol(a, (sh_bytes){0}));
    /* A key that comes twice. */
    OK(sh_buf_append(&text, "", 0));
    text.len = good;
    OK(sh_buf_append(&text, "\n", 1));
    OK(sh_buf_append(&text, a->hex, 64));
    OK(sh_file_write_atomic(path, text.data, text.len, err));
    assert_null(agg_tool(r, (const char *[]){"enrol", "--file", path, NULL}, &code));
    assert_int_equal(code, 2);
    sh_buf_release(&text);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

static void limits(void **state)
{
    agg_rig *r = *state;
    agg_start(r, (const char *[]){"--limit.messages", "2", "--limit.burst-s", "1", NULL}, NULL);
    agg_ready(r);
    node *a = node_make(r), *b = node_make(r);
    json_decref(command(r, (const char *[]){"enrol", a->hex, NULL}));
    json_decref(command(r, (const char *[]){"enrol", b->hex, NULL}));
    node_until(a, SH_NET_UP);
    node_until(b, SH_NET_UP);
    assert_true(node_enrol(a, (sh_bytes){0}));
    assert_true(node_enrol(b, (sh_bytes){0}));
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = EPOCH}};
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(&checkin, &bytes, err));
    /* It waits for each answer: after a hundred of them it is told to wait. */
    const sh_msg *m = node_ask(a, &checkin);
    for (int i = 0; i < 1000 && m->type == SH_MSG_PLAN; i++)
        m = node_ask(a, &checkin);
    assert_int_equal(m->type, SH_MSG_ERROR);
    assert_string_equal(m->error.code, "limit");
    assert_true(m->error.retry_after_ms > 0);
    /* And goes on as fast as it can. */
    bool down = false;
    for (uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS; !down && sh_clock_mono_ms() < end;) {
        sh_net_event event;
        (void)!sh_net_client_send(a->client, bytes.data, bytes.len, NULL);
        OK(sh_net_client_next(a->client, &event, err));
        down = event.kind == SH_NET_DOWN;
    }
    assert_true(down);
    assert_true(agg_saw(r, "event=limited"));
    assert_int_equal(node_checkin(b), SH_MSG_PLAN); /* the other one does not notice */
    assert_true(status_of(r, "disconnected") >= 1);
    node_until(a, SH_NET_UP); /* it is not revoked */
    sh_buf_release(&bytes);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

/* ENROL with these leases, a letter each: whether it has to take a new epoch. */
static bool node_renews(node *n, const char *leases)
{
    uint8_t hashes[SH_WIRE_LEASES_MAX * sizeof(sh_hash)] = {0};
    sh_msg msg = {
        .type = SH_MSG_ENROL,
        .enrol = {
            .epoch = EPOCH, .agent = "test", .kernel = "none", .cores = 1, .memory_bytes = 1}};
    for (; leases[msg.enrol.leases.n] != 0; msg.enrol.leases.n++)
        hashes[msg.enrol.leases.n * sizeof(sh_hash)] = (uint8_t)leases[msg.enrol.leases.n];
    msg.enrol.leases.hashes = hashes;
    const sh_msg *m = node_ask(n, &msg);
    assert_int_equal(m->type, SH_MSG_WELCOME);
    assert_true(m->welcome.accepted);
    return m->welcome.renew;
}

/* A node's disk is copied while it runs, and the copy started: both have one key and one epoch. */
static void a_copy_of_a_running_node(void **state)
{
    agg_rig *r = *state;
    agg_start(r, NULL, NULL);
    agg_ready(r);
    node *original = node_make(r), *copy = node_with(r, &original->keys);
    json_decref(command(r, (const char *[]){"enrol", original->hex, NULL}));
    node_until(original, SH_NET_UP);
    assert_false(node_renews(original, "a"));
    assert_int_equal(node_checkin(original), SH_MSG_PLAN);
    node_until(copy, SH_NET_UP);
    assert_false(node_renews(copy, "ba"));
    /* The original says nothing, and is cut off; it has to say who it is, and is told apart. */
    node_until(original, SH_NET_DOWN);
    node_until(original, SH_NET_UP);
    assert_int_equal(node_checkin(copy), SH_MSG_PLAN); /* on the same connection, all the while */
    assert_true(node_renews(original, "a"));
    assert_int_equal(status_of(r, "clones"), 1);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(tokens, make, release),
        cmocka_unit_test_setup_teardown(replaced_and_revoked, make, release),
        cmocka_unit_test_setup_teardown(lists, make, release),
        cmocka_unit_test_setup_teardown(limits, make, release),
        cmocka_unit_test_setup_teardown(a_copy_of_a_running_node, make, release),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
