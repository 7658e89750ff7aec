/* The transport over real sockets on loopback: who gets in, what is refused, and every limit. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <zmq.h>

#include "shared/base/file.h"
#include "tests/net/rig.h"

static sh_net *net;
static sh_net_keys server_keys, node_keys, other_keys;
static guest_list guests;

static int setup(void **state)
{
    (void)state;
    OK(sh_net_create(&net, &err));
    guests = (guest_list){.keys = {node_keys.public_key}};
    atomic_store(&guests.n, 1);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    sh_net_destroy(&net);
    assert_null(net);
    return 0;
}

static sh_net_client *dial(sh_net_server *server, const sh_net_keys *keys)
{
    return make_client(net, sh_net_server_endpoint(server), &server_keys.public_key, keys);
}

static void say(sh_net_client *client, const char *text)
{
    OK(sh_net_client_send(client, text, strlen(text), &err));
}

static void expect_text(const sh_net_event *event, const char *text)
{
    assert_int_equal(event->n, strlen(text));
    assert_memory_equal(event->data, text, event->n);
}

/* ---- the plain way ---- */

static void test_talk(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    assert_non_null(strstr(sh_net_server_endpoint(server), "tcp://127.0.0.1:"));
    assert_null(strstr(sh_net_server_endpoint(server), "*"));
    sh_net_client *client = dial(server, &node_keys);
    assert_int_equal(sh_net_client_send(client, "early", 5, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_net_server_send(server, &node_keys.public_key, "x", 1, &err),
                     SH_ERR_NOT_FOUND);
    client_until(client, server, SH_NET_UP);

    for (int i = 0; i < 100; i++) {
        char text[32];
        snprintf(text, sizeof text, "message %d", i);
        say(client, text);
        sh_net_event event = server_message(server);
        expect_text(&event, text);
        assert_true(sh_hash_equal(&event.key, &node_keys.public_key));
        OK(sh_net_server_send(server, &event.key, event.data, event.n, &err));
        event = client_until(client, server, SH_NET_MESSAGE);
        expect_text(&event, text);
    }
    OK(sh_net_client_send(client, "", 0, &err)); /* nothing is a message, too */
    assert_int_equal(server_message(server).n, 0);
    assert_int_equal(sh_net_server_connections(server), 1);
    assert_int_equal(sh_net_server_refused(server), 0);
    assert_int_equal(sh_net_server_ignored(server), 0);
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
    assert_null(server);
}

/* A message that is kept is the one that came, whatever comes after it, also when the server is
 * gone: a short one, which libzmq may have in its own structure, and a long one. */
static void test_kept_messages_last(void **state)
{
    (void)state;
    enum { KEPT = 20 };
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &node_keys);
    sh_net_event events[KEPT];
    sh_net_message kept[KEPT];
    char texts[KEPT][400];
    client_until(client, server, SH_NET_UP);
    for (int i = 0; i < KEPT; i++) {
        snprintf(texts[i], sizeof texts[i], "%0*d", i % 2 == 0 ? 8 : 300, i);
        say(client, texts[i]);
    }
    for (int i = 0; i < KEPT; i++) {
        events[i] = server_message(server);
        sh_net_server_keep(server, &events[i], &kept[i]);
    }
    say(client, "another one");
    sh_net_event event = server_message(server);
    expect_text(&event, "another one");
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
    for (int i = 0; i < KEPT; i++) {
        expect_text(&events[i], texts[i]);
        sh_net_message_release(&kept[i]);
    }
}

static void test_linger_delivers(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &node_keys);
    client_until(client, server, SH_NET_UP);
    for (int i = 0; i < 50; i++)
        say(client, "the last words");
    sh_net_client_destroy(&client, DEADLINE_MS);
    for (int i = 0; i < 50; i++) {
        sh_net_event event = server_message(server);
        expect_text(&event, "the last words");
    }
    sh_net_server_destroy(&server, 0);
}

/* ---- who gets in ---- */

static void test_unknown_key_is_refused(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &other_keys);
    client_until(client, server, SH_NET_REFUSED);
    assert_true(atomic_load(&guests.asked) > 0);
    assert_true(sh_net_server_refused(server) > 0);
    assert_int_equal(sh_net_client_send(client, "x", 1, &err), SH_ERR_LIMIT);
    /* Tried again by itself: an operator who enrols the key later need not tell the node. */
    client_until(client, server, SH_NET_REFUSED);
    guests.keys[1] = other_keys.public_key;
    atomic_store(&guests.n, 2);
    client_until(client, server, SH_NET_UP);
    say(client, "now");
    sh_net_event event = server_message(server);
    expect_text(&event, "now");
    assert_true(sh_hash_equal(&event.key, &other_keys.public_key));
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_nobody_without_allow(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, NULL);
    sh_net_client *client = dial(server, &node_keys);
    client_until(client, server, SH_NET_REFUSED);
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_wrong_server_key(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client =
        make_client(net, sh_net_server_endpoint(server), &other_keys.public_key, &node_keys);
    client_until(client, server, SH_NET_REFUSED);
    assert_int_equal(atomic_load(&guests.asked), 0); /* it did not get as far as its key */
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

/* A server asks its own list only, whichever other server a key may talk to. */
static void test_servers_are_apart(void **state)
{
    (void)state;
    guest_list others = {.keys = {other_keys.public_key}};
    atomic_store(&others.n, 1);
    sh_net_server *a = make_server(net, &server_keys, &guests);
    sh_net_server *b = make_server(net, &server_keys, &others);
    sh_net_client *to_a = dial(a, &node_keys), *to_b = dial(b, &node_keys);
    client_until(to_a, a, SH_NET_UP);
    client_until(to_b, b, SH_NET_REFUSED);
    sh_net_client_destroy(&to_a, 0);
    sh_net_client_destroy(&to_b, 0);
    sh_net_server_destroy(&a, 0);
    sh_net_server_destroy(&b, 0);
}

static void test_dropped_key_is_cut_off(void **state)
{
    (void)state;
    guests.keys[1] = other_keys.public_key;
    atomic_store(&guests.n, 2);
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &node_keys), *silent = dial(server, &other_keys);
    client_until(client, server, SH_NET_UP);
    client_until(silent, server, SH_NET_UP);
    say(client, "before");
    sh_net_event event = server_message(server);
    expect_text(&event, "before");

    /* One that was heard, and one that has said nothing yet. */
    atomic_store(&guests.n, 0);
    sh_net_server_drop(server, &node_keys.public_key);
    sh_net_server_drop(server, &other_keys.public_key);
    assert_int_equal(sh_net_server_send(server, &node_keys.public_key, "x", 1, &err),
                     SH_ERR_NOT_FOUND);
    say(client, "after");
    say(silent, "after");
    client_until(client, server, SH_NET_DOWN); /* fails if the server hears it */
    client_until(client, server, SH_NET_REFUSED);
    client_until(silent, server, SH_NET_DOWN);
    assert_int_equal(sh_net_server_ignored(server), 2);

    /* Enrolled again: the new connection is heard. */
    atomic_store(&guests.n, 1);
    client_until(client, server, SH_NET_UP);
    say(client, "again");
    event = server_message(server);
    expect_text(&event, "again");
    OK(sh_net_server_send(server, &event.key, "welcome", 7, &err));
    event = client_until(client, server, SH_NET_MESSAGE);
    expect_text(&event, "welcome");
    sh_net_client_destroy(&client, 0);
    sh_net_client_destroy(&silent, 0);
    sh_net_server_destroy(&server, 0);
}

/* Whoever was dropped is disconnected without a word of his, and hears what was sent before. */
static void test_dropped_key_is_disconnected(void **state)
{
    (void)state;
    guests.keys[1] = other_keys.public_key;
    atomic_store(&guests.n, 2);
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &node_keys), *other = dial(server, &other_keys);
    client_until(client, server, SH_NET_UP);
    client_until(other, server, SH_NET_UP);
    say(client, "hello");
    (void)server_message(server);
    say(other, "hello");
    (void)server_message(server);
    OK(sh_net_server_send(server, &node_keys.public_key, "farewell", 8, &err));
    sh_net_server_drop(server, &node_keys.public_key);
    sh_net_event event = client_until(client, server, SH_NET_MESSAGE);
    expect_text(&event, "farewell");
    client_until(client, server, SH_NET_DOWN);
    client_until(client, server, SH_NET_UP); /* it may come again, and is heard */
    say(client, "again");
    event = server_message(server);
    expect_text(&event, "again");
    say(other, "still here"); /* the other one never went */
    event = server_message(server);
    expect_text(&event, "still here");
    assert_int_equal(sh_net_server_ignored(server), 0);
    sh_net_client_destroy(&client, 0);
    sh_net_client_destroy(&other, 0);
    sh_net_server_destroy(&server, 0);
}

/* Of two connections of a key one is dropped, with what it had sent before. */
static void test_others_of_a_key_are_dropped(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *old = dial(server, &node_keys), *new = dial(server, &node_keys);
    client_until(old, server, SH_NET_UP);
    client_until(new, server, SH_NET_UP);
    say(new, "first");
    uint32_t spared = server_message(server).connection;
    say(old, "kept by the server's owner");
    sh_net_event kept = server_message(server);
    assert_int_not_equal(kept.connection, spared);
    assert_true(sh_net_server_hears(server, &kept));
    say(old, "in its queue");
    sh_net_server_drop_others(server, &node_keys.public_key, spared);
    assert_false(sh_net_server_hears(server, &kept));
    client_until(old, server, SH_NET_DOWN); /* fails if the server hears it */
    assert_int_equal(sh_net_server_ignored(server), 1);
    say(new, "second"); /* on the same connection */
    sh_net_event event = server_message(server);
    expect_text(&event, "second");
    assert_int_equal(event.connection, spared);
    OK(sh_net_server_send(server, &event.key, "answer", 6, &err));
    event = client_until(new, server, SH_NET_MESSAGE);
    expect_text(&event, "answer");

    /* It comes again, and is heard; then it takes over, as the other did. */
    client_until(old, server, SH_NET_UP);
    say(old, "again");
    event = server_message(server);
    expect_text(&event, "again");
    sh_net_server_drop_others(server, &node_keys.public_key, event.connection);
    client_until(new, server, SH_NET_DOWN); /* without a word of its own */
    sh_net_server_drop(server, &node_keys.public_key);
    assert_false(sh_net_server_hears(server, &event));
    client_until(old, server, SH_NET_DOWN);
    sh_net_client_destroy(&old, 0);
    sh_net_client_destroy(&new, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_silence_is_bounded(void **state)
{
    (void)state;
    guests.keys[1] = other_keys.public_key;
    atomic_store(&guests.n, 2);
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *client = dial(server, &node_keys), *silent = dial(server, &other_keys);
    client_until(client, server, SH_NET_UP);
    client_until(silent, server, SH_NET_UP);
    say(client, "a word");
    (void)server_message(server);
    sh_net_server_set_silence(server, 300);
    client_until(silent, server, SH_NET_DOWN);
    say(client, "on the same connection");
    sh_net_event event = server_message(server);
    expect_text(&event, "on the same connection");
    sh_net_client_destroy(&client, 0);
    sh_net_client_destroy(&silent, 0);
    sh_net_server_destroy(&server, 0);
}

/* Two connections of one key: answers go to the newer one. */
static void test_newest_connection_wins(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    sh_net_client *old = dial(server, &node_keys);
    client_until(old, server, SH_NET_UP);
    say(old, "old");
    server_message(server);
    sh_net_client *new = dial(server, &node_keys);
    client_until(new, server, SH_NET_UP);
    say(new, "new");
    server_message(server);
    say(old, "old again");
    sh_net_event event = server_message(server);
    expect_text(&event, "old again");
    OK(sh_net_server_send(server, &event.key, "to the new one", 14, &err));
    event = client_until(new, server, SH_NET_MESSAGE);
    expect_text(&event, "to the new one");

    /* When it has gone a send says so, and the older is answered after its next message. */
    sh_net_client_destroy(&new, 0);
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (sh_net_server_connections(server) > 1 && rig_now_ms() < end) {
        OK(sh_net_server_next(server, &event, &err));
        serve(server, NULL);
    }
    while (sh_net_server_send(server, &node_keys.public_key, "x", 1, NULL) != SH_ERR_NOT_FOUND)
        assert_true(rig_now_ms() < end);
    say(old, "old");
    event = server_message(server);
    OK(sh_net_server_send(server, &event.key, "to the old one", 14, &err));
    event = client_until(old, server, SH_NET_MESSAGE);
    expect_text(&event, "to the old one");
    sh_net_client_destroy(&old, 0);
    sh_net_server_destroy(&server, 0);
}

/* ---- strangers: sockets that are not ours ---- */

typedef struct {
    void *context, *socket;
} stranger;

static stranger stranger_make(const sh_net_server *server, const sh_net_keys *keys)
{
    int linger = 0, wait = 100;
    stranger s = {.context = zmq_ctx_new()};
    s.socket = zmq_socket(s.context, ZMQ_DEALER);
    zmq_setsockopt(s.socket, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(s.socket, ZMQ_RCVTIMEO, &wait, sizeof wait);
    if (keys) {
        zmq_setsockopt(s.socket, ZMQ_CURVE_PUBLICKEY, keys->public_key.b, 32);
        zmq_setsockopt(s.socket, ZMQ_CURVE_SECRETKEY, keys->secret, 32);
        zmq_setsockopt(s.socket, ZMQ_CURVE_SERVERKEY, server_keys.public_key.b, 32);
    }
    assert_int_equal(zmq_connect(s.socket, sh_net_server_endpoint(server)), 0);
    return s;
}

static void stranger_end(stranger *s)
{
    zmq_close(s->socket);
    zmq_ctx_term(s->context);
}

static void test_plain_client_gets_nothing(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    stranger s = stranger_make(server, NULL);
    assert_int_equal(zmq_send(s.socket, "hello", 5, 0), 5);
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (sh_net_server_refused(server) == 0) {
        sh_net_event event;
        assert_true(rig_now_ms() < end);
        OK(sh_net_server_next(server, &event, &err));
        assert_int_equal(event.kind, SH_NET_NONE);
        serve(server, NULL);
    }
    char bytes[8];
    assert_int_equal(zmq_recv(s.socket, bytes, sizeof bytes, 0), -1);
    assert_int_equal(atomic_load(&guests.asked), 0);
    stranger_end(&s);
    sh_net_server_destroy(&server, 0);
}

/* Of our key, but with frames that the protocol has not: thrown away, and the next message heard.
 */
static void test_several_frames(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    stranger s = stranger_make(server, &node_keys);
    zmq_send(s.socket, "", 0, ZMQ_SNDMORE);
    zmq_send(s.socket, "two", 3, 0);
    for (int i = 0; i < 1000; i++)
        zmq_send(s.socket, "many", 4, ZMQ_SNDMORE);
    zmq_send(s.socket, "many", 4, 0);
    zmq_send(s.socket, "one", 3, 0);
    sh_net_event event = server_message(server);
    expect_text(&event, "one");
    assert_int_equal(sh_net_server_ignored(server), 2);
    stranger_end(&s);
    sh_net_server_destroy(&server, 0);
}

/* A routing id of the peer's own choice is none of ours. */
static void test_chosen_route_is_ignored(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests);
    stranger s = {.context = zmq_ctx_new()};
    int linger = 0;
    s.socket = zmq_socket(s.context, ZMQ_DEALER);
    zmq_setsockopt(s.socket, ZMQ_LINGER, &linger, sizeof linger);
    zmq_setsockopt(s.socket, ZMQ_ROUTING_ID, "mine!", 5);
    zmq_setsockopt(s.socket, ZMQ_CURVE_PUBLICKEY, node_keys.public_key.b, 32);
    zmq_setsockopt(s.socket, ZMQ_CURVE_SECRETKEY, node_keys.secret, 32);
    zmq_setsockopt(s.socket, ZMQ_CURVE_SERVERKEY, server_keys.public_key.b, 32);
    assert_int_equal(zmq_connect(s.socket, sh_net_server_endpoint(server)), 0);
    zmq_send(s.socket, "x", 1, 0);
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (sh_net_server_ignored(server) == 0) {
        sh_net_event event;
        assert_true(rig_now_ms() < end);
        OK(sh_net_server_next(server, &event, &err));
        assert_int_equal(event.kind, SH_NET_NONE);
        serve(server, NULL);
    }
    stranger_end(&s);
    sh_net_server_destroy(&server, 0);
}

/* ---- limits ---- */

static void test_too_large_a_message(void **state)
{
    (void)state;
    static uint8_t big[MESSAGE_MAX + 1];
    sh_net_server *server = make_server(net, &server_keys, &guests);
    guests.keys[1] = other_keys.public_key;
    atomic_store(&guests.n, 2);
    sh_net_client *client = dial(server, &other_keys);
    client_until(client, server, SH_NET_UP);
    /* Our own side does not send it. */
    assert_int_equal(sh_net_client_send(client, big, sizeof big, &err), SH_ERR_INVALID);
    OK(sh_net_client_send(client, big, MESSAGE_MAX, &err));
    assert_int_equal(server_message(server).n, MESSAGE_MAX);
    /* A peer that does is cut off; others are not. */
    stranger s = stranger_make(server, &node_keys);
    zmq_send(s.socket, "small", 5, 0);
    sh_net_event event = server_message(server);
    expect_text(&event, "small");
    assert_int_equal(sh_net_server_connections(server), 2);
    zmq_send(s.socket, big, sizeof big, 0);
    zmq_send(s.socket, "next", 4, 0);
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (sh_net_server_connections(server) > 1) {
        assert_true(rig_now_ms() < end);
        OK(sh_net_server_next(server, &event, &err));
        if (event.kind == SH_NET_MESSAGE)
            assert_true(event.n <= MESSAGE_MAX);
        serve(server, NULL);
    }
    stranger_end(&s);
    say(client, "still here");
    event = server_message(server);
    expect_text(&event, "still here");
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_full_queues(void **state)
{
    (void)state;
    static uint8_t bytes[MESSAGE_MAX];
    sh_net_server *server = NULL;
    sh_net_server_options so = {.endpoint = ENDPOINT,
                                .keys = &server_keys,
                                .allow = guest_allow,
                                .arg = &guests,
                                .queue_max = 8,
                                .message_max = MESSAGE_MAX};
    OK(sh_net_server_create(net, &so, &server, &err));
    sh_net_client *client = NULL;
    /* Who reads nothing hears no heartbeat either: the link is not to end in this test. */
    sh_net_client_options co = {.endpoint = sh_net_server_endpoint(server),
                                .server_key = server_keys.public_key,
                                .keys = &node_keys,
                                .queue_max = 8,
                                .heartbeat_ms = 20 * DEADLINE_MS,
                                .message_max = MESSAGE_MAX};
    OK(sh_net_client_create(net, &co, &client, &err));
    client_until(client, server, SH_NET_UP);
    say(client, "hello");
    server_message(server);
    /* Nobody reads: queues and the sockets' buffers fill. */
    sh_status status = SH_OK;
    size_t sent = 0;
    for (; status == SH_OK && sent < 100000; sent++)
        status = sh_net_client_send(client, bytes, sizeof bytes, &err);
    assert_int_equal(status, SH_ERR_LIMIT);
    status = SH_OK;
    for (size_t i = 0; status == SH_OK && i < 100000; i++)
        status = sh_net_server_send(server, &node_keys.public_key, bytes, sizeof bytes, &err);
    assert_int_equal(status, SH_ERR_LIMIT);
    /* What was taken comes. */
    for (size_t i = 0; i + 1 < sent; i++)
        assert_int_equal(server_message(server).n, sizeof bytes);
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_port_in_use(void **state)
{
    (void)state;
    sh_net_server *server = make_server(net, &server_keys, &guests), *second = NULL;
    sh_net_server_options options = {.endpoint = sh_net_server_endpoint(server),
                                     .keys = &server_keys,
                                     .message_max = MESSAGE_MAX};
    assert_int_equal(sh_net_server_create(net, &options, &second, &err), SH_ERR_EXISTS);
    assert_null(second);
    assert_non_null(strstr(err.text, options.endpoint));
    assert_non_null(strstr(err.text, "choose another"));
    sh_net_server_destroy(&server, 0);
}

static void test_bad_addresses(void **state)
{
    (void)state;
    static const char *const bad[] = {"",
                                      "127.0.0.1:7420",
                                      "tcp://",
                                      "tcp://127.0.0.1",
                                      "tcp://127.0.0.1:99999",
                                      "nonsense://x",
                                      "tcp://203.0.113.7:7420"};
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        sh_net_server *server = NULL;
        sh_net_server_options options = {
            .endpoint = bad[i], .keys = &server_keys, .message_max = MESSAGE_MAX};
        sh_status status = sh_net_server_create(net, &options, &server, &err);
        if (status != SH_ERR_USAGE)
            fail_msg("'%s': %s: %s", bad[i], sh_status_name(status), err.text);
        assert_null(server);
    }
    sh_net_client *client = NULL;
    sh_net_client_options options = {
        .endpoint = "nonsense", .keys = &node_keys, .message_max = MESSAGE_MAX};
    assert_int_equal(sh_net_client_create(net, &options, &client, &err), SH_ERR_USAGE);
    assert_null(client);
}

static sh_net_server *small_server(uint32_t connections_max)
{
    sh_net_server *server = NULL;
    sh_net_server_options options = {.endpoint = ENDPOINT,
                                     .keys = &server_keys,
                                     .allow = guest_allow,
                                     .arg = &guests,
                                     .connections_max = connections_max,
                                     .message_max = MESSAGE_MAX};
    OK(sh_net_server_create(net, &options, &server, &err));
    return server;
}

static void test_connection_cap(void **state)
{
    (void)state;
    sh_net_server *server = small_server(2);
    sh_net_client *a = dial(server, &node_keys), *b = NULL, *c = NULL;
    client_until(a, server, SH_NET_UP);
    b = dial(server, &node_keys);
    client_until(b, server, SH_NET_UP);
    c = dial(server, &node_keys);
    /* The third is shut, before or after its handshake, and those that were there are not. */
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    bool ended = false;
    while (!ended) {
        sh_net_event event;
        assert_true(rig_now_ms() < end);
        OK(sh_net_client_next(c, &event, &err));
        ended = event.kind == SH_NET_DOWN || event.kind == SH_NET_REFUSED;
        OK(sh_net_server_next(server, &event, &err));
        serve(server, c);
    }
    say(a, "a");
    say(b, "b");
    server_message(server);
    server_message(server);
    /* One goes, and the third finds a place. */
    sh_net_client_destroy(&a, 0);
    for (bool heard = false; !heard;) {
        sh_net_event event;
        assert_true(rig_now_ms() < end);
        OK(sh_net_client_next(c, &event, &err));
        if (event.kind == SH_NET_UP)
            sh_status_name(sh_net_client_send(c, "c", 1, NULL));
        OK(sh_net_server_next(server, &event, &err));
        heard = event.kind == SH_NET_MESSAGE;
        if (heard)
            expect_text(&event, "c");
        serve(server, c);
    }
    sh_net_client_destroy(&b, 0);
    sh_net_client_destroy(&c, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_cap_above_the_descriptor_limit(void **state)
{
    (void)state;
    sh_net_server *server = NULL;
    sh_net_server_options options = {.endpoint = ENDPOINT,
                                     .keys = &server_keys,
                                     .connections_max = UINT32_MAX,
                                     .message_max = MESSAGE_MAX};
    assert_int_equal(sh_net_server_create(net, &options, &server, &err), SH_ERR_USAGE);
    assert_non_null(strstr(err.text, "ulimit -n"));
}

/* ---- the link ---- */

static void test_server_restarts(void **state)
{
    (void)state;
    sh_net *other = NULL;
    OK(sh_net_create(&other, &err));
    sh_net_server *server = make_server(other, &server_keys, &guests);
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "%s", sh_net_server_endpoint(server));
    sh_net_client *client = dial(server, &node_keys);
    client_until(client, server, SH_NET_UP);
    sh_net_server_destroy(&server, 0);
    sh_net_destroy(&other); /* the address is free after this */
    client_until(client, NULL, SH_NET_DOWN);
    assert_int_equal(sh_net_client_send(client, "x", 1, &err), SH_ERR_LIMIT);

    sh_net_server_options options = {.endpoint = endpoint,
                                     .keys = &server_keys,
                                     .allow = guest_allow,
                                     .arg = &guests,
                                     .message_max = MESSAGE_MAX};
    OK(sh_net_server_create(net, &options, &server, &err));
    client_until(client, server, SH_NET_UP);
    say(client, "back");
    sh_net_event event = server_message(server);
    expect_text(&event, "back");
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

/* Nobody is there at first. */
static void test_server_comes_later(void **state)
{
    (void)state;
    sh_net *other = NULL;
    OK(sh_net_create(&other, &err));
    sh_net_server *server = make_server(other, &server_keys, &guests);
    char endpoint[128];
    snprintf(endpoint, sizeof endpoint, "%s", sh_net_server_endpoint(server));
    sh_net_server_destroy(&server, 0);
    sh_net_destroy(&other);

    sh_net_client *client = make_client(net, endpoint, &server_keys.public_key, &node_keys);
    sh_net_event event;
    OK(sh_net_client_next(client, &event, &err));
    assert_int_equal(event.kind, SH_NET_NONE);
    sh_net_server_options options = {.endpoint = endpoint,
                                     .keys = &server_keys,
                                     .allow = guest_allow,
                                     .arg = &guests,
                                     .message_max = MESSAGE_MAX};
    OK(sh_net_server_create(net, &options, &server, &err));
    client_until(client, server, SH_NET_UP);
    sh_net_client_destroy(&client, 0);
    sh_net_server_destroy(&server, 0);
}

static void test_waiting_for_descriptors(void **state)
{
    (void)state;
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    struct pollfd fd = {.fd = ends[0], .events = POLLIN};
    sh_net_waiting w = {.fds = &fd, .n_fds = 1, .timeout_ms = 0};
    OK(sh_net_wait(&w, &err));
    assert_int_equal(fd.revents, 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    w.timeout_ms = DEADLINE_MS;
    OK(sh_net_wait(&w, &err));
    assert_int_equal(fd.revents, POLLIN);
    w.n_fds = SH_NET_FDS_MAX + 1;
    assert_int_equal(sh_net_wait(&w, &err), SH_ERR_LIMIT);
    close(ends[0]);
    close(ends[1]);
}

/* ---- keys ---- */

static void test_key_files(void **state)
{
    (void)state;
    char dir[] = "/tmp/shoal-net-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/node.key", dir);
    sh_net_keys back;
    struct stat info;
    OK(sh_net_keys_save(path, &node_keys, &err));
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    OK(sh_net_keys_load(path, &back, &err));
    assert_memory_equal(&back, &node_keys, sizeof back);
    assert_int_equal(sh_net_keys_save(path, &other_keys, &err), SH_ERR_EXISTS);
    sh_net_keys_forget(&back);
    assert_true(sh_hash_equal(&back.public_key, &node_keys.public_key));
    assert_memory_equal(back.secret, (uint8_t[32]){0}, 32);

    assert_int_equal(chmod(path, 0640), 0);
    assert_int_equal(sh_net_keys_load(path, &back, &err), SH_ERR_AUTH);
    assert_non_null(strstr(err.text, path));
    assert_int_equal(chmod(path, 0600), 0);

    uint8_t *text = NULL;
    size_t n = 0;
    OK(sh_file_read(path, 1000, &text, &n, &err));
    /* Every cut, every changed letter, and a byte too many. */
    for (size_t i = 0; i < n; i++) {
        OK(sh_file_write_private(path, text, i, &err));
        assert_int_equal(sh_net_keys_load(path, &back, &err), SH_ERR_INVALID);
        text[i] ^= 1;
        OK(sh_file_write_private(path, text, n, &err));
        sh_status status = sh_net_keys_load(path, &back, &err);
        /* Curve25519 does not look at five bits of a secret: the pair still fits. */
        if (status == SH_OK)
            assert_memory_equal(&back.public_key, &node_keys.public_key, 32);
        else
            assert_int_equal(status, SH_ERR_INVALID);
        text[i] ^= 1;
    }
    OK(sh_file_write_private(path, "public 00\nsecret 00\n", 20, &err));
    assert_int_equal(sh_net_keys_load(path, &back, &err), SH_ERR_INVALID);
    unlink(path);
    assert_int_equal(sh_net_keys_load(path, &back, &err), SH_ERR_NOT_FOUND);
    free(text);
    rmdir(dir);
}

int main(void)
{
#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        CASE(test_talk),
        CASE(test_kept_messages_last),
        CASE(test_linger_delivers),
        CASE(test_unknown_key_is_refused),
        CASE(test_nobody_without_allow),
        CASE(test_wrong_server_key),
        CASE(test_servers_are_apart),
        CASE(test_dropped_key_is_cut_off),
        CASE(test_dropped_key_is_disconnected),
        CASE(test_others_of_a_key_are_dropped),
        CASE(test_silence_is_bounded),
        CASE(test_newest_connection_wins),
        CASE(test_plain_client_gets_nothing),
        CASE(test_several_frames),
        CASE(test_chosen_route_is_ignored),
        CASE(test_too_large_a_message),
        CASE(test_full_queues),
        CASE(test_port_in_use),
        CASE(test_bad_addresses),
        CASE(test_connection_cap),
        CASE(test_cap_above_the_descriptor_limit),
        CASE(test_server_restarts),
        CASE(test_server_comes_later),
        CASE(test_waiting_for_descriptors),
        CASE(test_key_files),
    };
    OK(sh_crypto_init(&err));
    server_keys = make_keys();
    node_keys = make_keys();
    other_keys = make_keys();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
