/* Reading ahead while the loop is elsewhere: what is kept, in which order it comes, and who has the
 * socket; over real sockets, by the functions that the loop calls. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "aggregator/server_internal.h"
#include "tests/net/rig.h"

#define BIG_BYTES 40000u /* of a CHUNK's content: such a message does not go first */

static sh_net *net;
static sh_net_keys own_keys, keys[2];
static guest_list guests;
static sh_net_server *server;
static sh_net_client *clients[2];
static server_fetch *fetch;

static int setup(void **state)
{
    (void)state;
    OK(sh_net_create(&net, &err));
    own_keys = make_keys();
    for (unsigned i = 0; i < SH_COUNT(keys); i++)
        guests.keys[i] = (keys[i] = make_keys()).public_key;
    atomic_store(&guests.n, SH_COUNT(keys));
    server = make_server(net, &own_keys, &guests);
    for (unsigned i = 0; i < SH_COUNT(keys); i++) {
        clients[i] =
            make_client(net, sh_net_server_endpoint(server), &own_keys.public_key, &keys[i]);
        client_until(clients[i], server, SH_NET_UP);
    }
    OK(server_fetch_create(server, &fetch, &err));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    server_fetch_destroy(&fetch);
    for (unsigned i = 0; i < SH_COUNT(keys); i++)
        sh_net_client_destroy(&clients[i], 0);
    sh_net_server_destroy(&server, 0);
    sh_net_destroy(&net);
    return 0;
}

static void say(unsigned who, const void *bytes, size_t n)
{
    OK(sh_net_client_send(clients[who], bytes, n, &err));
}

static void say_msg(unsigned who, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, &err));
    say(who, bytes.data, bytes.len);
    sh_buf_release(&bytes);
}

static void say_small(unsigned who, unsigned number)
{
    say_msg(who, &(sh_msg){.type = SH_MSG_ITEM,
                           .item = {.epoch = 1,
                                    .cls = SH_CLASS_WINDOW,
                                    .seq = number + 1,
                                    .last_seq = number + 1,
                                    .kind = SH_ITEM_WINDOW,
                                    .payload = {"w", 1}}});
}

static void say_chunk(unsigned who, bool good)
{
    static uint8_t content[BIG_BYTES];
    sh_msg msg = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {content, sizeof content}}};
    msg.chunk.hash = sh_blake2b(content, sizeof content);
    msg.chunk.hash.b[0] ^= good ? 0 : 1;
    say_msg(who, &msg);
}

/* The thread has the socket for a while, as in a commit. */
static void commit_for(unsigned us)
{
    server_fetch_begin(fetch);
    (void)usleep(us);
    server_fetch_end(fetch);
}

/* Until so many wait. */
static void read_ahead(size_t n)
{
    for (uint64_t end = rig_now_ms() + DEADLINE_MS; server_fetch_ahead(fetch) < n;) {
        assert_true(rig_now_ms() < end);
        commit_for(1000);
    }
    assert_int_equal(server_fetch_ahead(fetch), n);
}

static sh_net_event take(bool *checked)
{
    sh_net_event event = {0};
    OK(server_fetch_next(fetch, &event, checked, &err));
    assert_int_equal(event.kind, SH_NET_MESSAGE);
    return event;
}

static void expect_small(unsigned who, unsigned number)
{
    sh_msg msg;
    bool checked = false;
    sh_net_event event = take(&checked);
    OK(sh_msg_decode(event.data, event.n, &msg, &err));
    assert_int_equal(msg.type, SH_MSG_ITEM);
    assert_int_equal(msg.item.seq, number + 1);
    assert_true(sh_hash_equal(&event.key, &keys[who].public_key));
    assert_true(checked);
}

static void expect_chunk(unsigned who, bool good)
{
    bool checked = !good;
    sh_net_event event = take(&checked);
    assert_true(event.n > BIG_BYTES);
    assert_true(sh_hash_equal(&event.key, &keys[who].public_key));
    assert_int_equal(checked, good);
}

static void test_small_ones_go_first(void **state)
{
    (void)state;
    say_chunk(0, true);
    say_chunk(0, false);
    say_small(0, 0); /* behind its own node's */
    read_ahead(3);
    say_small(1, 0);
    say_small(1, 1);
    say_chunk(1, true);
    say_small(1, 2); /* and this one, too */
    read_ahead(7);

    expect_small(1, 0);
    say_small(1, 3); /* what comes later finds a gap before it */
    read_ahead(7);
    expect_small(1, 1);
    expect_chunk(0, true);
    expect_chunk(0, false);
    expect_small(0, 0);
    expect_chunk(1, true);
    expect_small(1, 2);
    expect_small(1, 3);
    assert_int_equal(server_fetch_ahead(fetch), 0);
}

static void test_check_ins_do_not(void **state)
{
    (void)state;
    bool checked;
    say_chunk(0, true);
    read_ahead(1);
    say_msg(1, &(sh_msg){.type = SH_MSG_CHECKIN, .checkin = {.epoch = 1}});
    read_ahead(2);
    expect_chunk(0, true);
    sh_net_event event = take(&checked);
    assert_true(sh_hash_equal(&event.key, &keys[1].public_key));
    assert_true(checked);
}

static void test_nothing_is_overtaken_by_more_than_the_ring(void **state)
{
    (void)state;
    say_chunk(0, true);
    read_ahead(1);
    for (unsigned i = 0; i < SERVER_GROUP_STEPS + 20; i++) {
        say_small(1, i);
        if (i % 64 == 0)
            commit_for(1000); /* the queue to it has 256 places */
    }
    read_ahead(SERVER_GROUP_STEPS);
    commit_for(10000); /* it is full */
    for (unsigned i = 1; i < SERVER_GROUP_STEPS; i++) {
        assert_int_equal(server_fetch_ahead(fetch), SERVER_GROUP_STEPS - i + 1);
        expect_small(1, i - 1);
        commit_for(0); /* places behind it that are free are not given away */
    }
    expect_chunk(0, true);
    read_ahead(21);
    for (unsigned i = 0; i < 21; i++)
        expect_small(1, SERVER_GROUP_STEPS - 1 + i);
}

static void test_bytes_are_bounded(void **state)
{
    (void)state;
    static uint8_t bytes[MESSAGE_MAX]; /* no CHUNK: the thread sanitizer is slow where we hash */
    size_t most = SERVER_FETCH_BYTES / sizeof bytes;
    for (size_t i = 0; i < most + 10; i++)
        say(0, bytes, sizeof bytes);
    read_ahead(most);
    commit_for(10000); /* it has what it may */
    assert_int_equal(server_fetch_ahead(fetch), most);
}

/* After end the socket is the loop's: it reads and sends, and what the thread had read comes first.
 */
static void test_the_socket_comes_back(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 50; i++) {
        say_small(0, 2 * i);
        read_ahead(1);
        say_small(0, 2 * i + 1);
        expect_small(0, 2 * i);
        sh_net_event event = {0};
        for (uint64_t end = rig_now_ms() + DEADLINE_MS; event.kind != SH_NET_MESSAGE;) {
            bool checked;
            assert_true(rig_now_ms() < end);
            OK(server_fetch_next(fetch, &event, &checked, &err));
            if (event.kind == SH_NET_NONE)
                serve(server, NULL);
        }
        size_t n = event.n;
        OK(sh_net_server_send(server, &event.key, event.data, n, &err));
        event = client_until(clients[0], server, SH_NET_MESSAGE);
        assert_int_equal(event.n, n);
    }
}

/* What a connection sent that was dropped since is not the loop's to step. */
static void test_dropped_ones_are_passed_over(void **state)
{
    (void)state;
    say_chunk(0, true);
    say_small(0, 0);
    say_small(1, 0);
    read_ahead(3);
    sh_net_server_drop(server, &keys[0].public_key);
    expect_small(1, 0);
    sh_net_event event = {0};
    bool checked;
    OK(server_fetch_next(fetch, &event, &checked, &err));
    assert_int_not_equal(event.kind, SH_NET_MESSAGE);
}

/* Memory is watched by the sanitizers. */
static void test_it_ends_with_messages_that_wait(void **state)
{
    (void)state;
    bool checked;
    say_chunk(0, true);
    say_small(1, 0);
    say_chunk(1, true);
    read_ahead(3);
    (void)take(&checked);
}

int main(void)
{
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_small_ones_go_first),
        TEST(test_check_ins_do_not),
        TEST(test_nothing_is_overtaken_by_more_than_the_ring),
        TEST(test_bytes_are_bounded),
        TEST(test_the_socket_comes_back),
        TEST(test_dropped_ones_are_passed_over),
        TEST(test_it_ends_with_messages_that_wait),
    };
    return cmocka_run_group_tests_name("fetch", tests, NULL, NULL);
}
