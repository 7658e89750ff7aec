/* The forwarder between nodes and aggregator: bytes pass whole, a link is cut and restored. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "experiments/fleet/forward.h"
#include "tests/fleet/peer.h"

#define MUCH     (3u << 20)
#define OK(call) assert_int_equal((call), SH_OK)

/* Reads a length, then so many bytes, and answers with their sum and the bytes. */
static void echo(int fd, int number, void *arg)
{
    uint32_t n = 0;
    (void)number;
    (void)arg;
    while (peer_read(fd, &n, sizeof n)) {
        uint8_t *bytes = malloc(n);
        if (!bytes || !peer_read(fd, bytes, n)) {
            free(bytes);
            return;
        }
        peer_write(fd, &n, sizeof n);
        peer_write(fd, bytes, n);
        free(bytes);
    }
}

static void fill(uint8_t *bytes, uint32_t n, uint32_t seed)
{
    for (uint32_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)((i * 2654435761u + seed) >> 13);
}

static void *send_much(void *arg)
{
    int fd = *(int *)arg;
    uint32_t n = MUCH;
    uint8_t *bytes = malloc(MUCH);
    if (bytes) {
        fill(bytes, MUCH, 7);
        peer_write(fd, &n, sizeof n);
        peer_write(fd, bytes, MUCH);
    }
    free(bytes);
    return NULL;
}

static bool round_trip(int fd, uint32_t n, uint32_t seed)
{
    uint8_t out[512], back[512];
    uint32_t got = 0;
    assert_true(n <= sizeof out);
    fill(out, n, seed);
    peer_write(fd, &n, sizeof n);
    peer_write(fd, out, n);
    return peer_read(fd, &got, sizeof got) && got == n && peer_read(fd, back, n) &&
           memcmp(out, back, n) == 0;
}

/* True when the connection ends without a byte. */
static bool is_refused(uint16_t port)
{
    int fd = peer_dial(port);
    bool alive = round_trip(fd, 10, 1);
    close(fd);
    return !alive;
}

static void test_much_both_ways(void **state)
{
    peer p = {.serve = echo, .connections = 1};
    fleet_forward *f = NULL;
    pthread_t sender;
    uint32_t n = 0;
    uint64_t up = 0, down = 0;
    (void)state;
    peer_start(&p);
    OK(fleet_forward_create(2, &f, NULL));
    fleet_forward_target(f, p.port);
    int fd = peer_dial(fleet_forward_port(f, 1));
    assert_int_equal(pthread_create(&sender, NULL, send_much, &fd), 0);
    uint8_t *want = malloc(MUCH), *got = malloc(MUCH);
    assert_non_null(want);
    assert_non_null(got);
    assert_true(peer_read(fd, &n, sizeof n));
    assert_int_equal(n, MUCH);
    assert_true(peer_read(fd, got, MUCH));
    fill(want, MUCH, 7);
    assert_memory_equal(got, want, MUCH);
    pthread_join(sender, NULL);
    fleet_forward_bytes(f, 1, &up, &down);
    assert_int_equal(up, MUCH + 4);
    assert_int_equal(down, MUCH + 4);
    fleet_forward_bytes(f, 0, &up, &down);
    assert_int_equal(up + down, 0);
    close(fd);
    peer_end(&p); /* the end of one side ends the other */
    fleet_forward_destroy(&f);
    assert_null(f);
    free(want);
    free(got);
}

static void test_cut_and_restore(void **state)
{
    peer p = {.serve = echo, .connections = 2};
    fleet_forward *f = NULL;
    uint8_t byte;
    (void)state;
    peer_start(&p);
    OK(fleet_forward_create(1, &f, NULL));
    uint16_t port = fleet_forward_port(f, 0);
    assert_true(is_refused(port)); /* no target yet */
    fleet_forward_target(f, p.port);
    int fd = peer_dial(port);
    assert_true(round_trip(fd, 100, 3));
    fleet_forward_cut(f, 0, true);
    assert_false(peer_read(fd, &byte, 1)); /* what was open ends */
    close(fd);
    assert_true(is_refused(port));
    assert_true(is_refused(port));
    fleet_forward_cut(f, 0, false);
    fd = peer_dial(port);
    assert_true(round_trip(fd, 512, 4)); /* the same port, as before */
    close(fd);
    peer_end(&p);
    fleet_forward_destroy(&f);
}

/* An aggregator that comes back has another port. */
static void test_new_target(void **state)
{
    peer a = {.serve = echo, .connections = 1}, b = {.serve = echo, .connections = 1};
    fleet_forward *f = NULL;
    (void)state;
    peer_start(&a);
    peer_start(&b);
    OK(fleet_forward_create(1, &f, NULL));
    fleet_forward_target(f, a.port);
    int fd = peer_dial(fleet_forward_port(f, 0));
    assert_true(round_trip(fd, 10, 1));
    close(fd);
    peer_end(&a);
    fleet_forward_target(f, b.port);
    fd = peer_dial(fleet_forward_port(f, 0));
    assert_true(round_trip(fd, 10, 2));
    close(fd);
    peer_end(&b);
    fleet_forward_destroy(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_much_both_ways),
        cmocka_unit_test(test_cut_and_restore),
        cmocka_unit_test(test_new_target),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
