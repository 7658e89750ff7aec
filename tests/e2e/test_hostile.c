/*
 * What comes over HTTP to a running shoal-node: clients that are slow, huge, malformed, from
 * another host or page, or gone in the middle, all at once, while an honest one goes on. The
 * details are the unit tests' (tests/http, tests/node); here the process must live and serve.
 * argv[1]: the programs' folder.
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
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/rng.h"
#include "tests/e2e/fleets.h"
#include "tests/e2e/probe.h"
#include "tests/http/client.h"

#define SLOW    24           /* connections held open, byte by byte; the node serves 64 */
#define ROUNDS  60           /* of random damage, 8 requests each */
#define RSS_MAX (128u << 20) /* of the node, whatever is sent to it */

static const char *bin;

typedef struct {
    e2e_fleet fleet;
    unsigned port;
    uint64_t acknowledged;
    int slow[SLOW];
} scene;

static int make(void **state)
{
    scene *s = calloc(1, sizeof *s);
    assert_non_null(s);
    *state = s;
    s->fleet.bin = bin;
    s->fleet.node_words = fleets_eager_node;
    for (int i = 0; i < SLOW; i++)
        s->slow[i] = -1;
    e2e_fleet_make(&s->fleet, 1);
    e2e_node_start(&s->fleet, 0, NULL);
    assert_true(e2e_node_ready(&s->fleet, 0));
    s->port = s->fleet.nodes[0].port;
    return 0;
}

static int release(void **state)
{
    scene *s = *state;
    for (int i = 0; i < SLOW; i++)
        if (s->slow[i] >= 0)
            close(s->slow[i]);
    e2e_fleet_release(&s->fleet);
    free(s);
    return 0;
}

/* An honest client is served, and the node does not grow. */
static void expect_service(scene *s)
{
    char id[64];
    probe_complete(s->port, "an honest word", "bob", id);
    int status = probe_feedback(s->port, id, "edit", " and another");
    assert_int_equal(status, 200);
    s->acknowledged++;
    uint64_t rss = probe_rss(s->fleet.nodes[0].process.pid);
    if (rss > RSS_MAX && !probe_is_sanitized())
        fail_msg("the node has %llu MiB", (unsigned long long)rss >> 20);
}

/* Sends bytes on a connection of their own and leaves, with a reset when `rude`. */
static void throw_at(scene *s, const void *bytes, size_t n, bool rude)
{
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    int fd = client_connect((uint16_t)s->port);
    if (fd < 0)
        return;
    (void)client_send(fd, bytes, n);
    if (rude)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    else
        shutdown(fd, SHUT_WR);
    close(fd);
}

/* ---- slow ---- */

static void drip(scene *s, char byte)
{
    for (int i = 0; i < SLOW; i++) {
        if (s->slow[i] >= 0 && client_send(s->slow[i], &byte, 1))
            continue;
        if (s->slow[i] >= 0)
            close(s->slow[i]); /* the node's right */
        s->slow[i] = client_connect((uint16_t)s->port);
        if (s->slow[i] >= 0)
            (void)client_send(s->slow[i], "POST /v1/completions HTTP/1.1\r\nX: ", 34);
    }
}

static void slow_clients(void **state)
{
    scene *s = *state;
    for (int turn = 0; turn < 20; turn++) {
        drip(s, 'a');
        expect_service(s);
    }
}

/* ---- huge ---- */

static void expect_status(scene *s, const char *request, size_t n, int status)
{
    int fd = client_connect((uint16_t)s->port);
    assert_true(fd >= 0);
    (void)client_send(fd, request, n);
    client_reply reply = client_read(fd, false);
    close(fd);
    if (reply.status != status)
        fail_msg("status %d, not %d, for: %.80s", reply.status, status, request);
    client_release(&reply);
}

static void huge_requests(void **state)
{
    scene *s = *state;
    static char body[3 << 20], request[4 << 20];
    int n;
    /* It says that it is huge. */
    n = snprintf(request, sizeof request,
                 "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nContent-Type: "
                 "application/json\r\nContent-Length: 99999999999\r\n\r\n{",
                 s->port);
    expect_status(s, request, (size_t)n, 413);
    /* It is. */
    memset(body, ' ', sizeof body - 1);
    client_reply reply = client_ask((uint16_t)s->port, "POST", "/v1/completions", NULL, body);
    assert_true(reply.status == 413 || reply.status == 0); /* or cut while it still sent */
    client_release(&reply);
    /* Headers without an end. */
    n = snprintf(request, sizeof request,
                 "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nX: ", s->port);
    memset(request + n, 'y', (size_t)1 << 20);
    throw_at(s, request, (size_t)n + (1u << 20), false);
    expect_service(s);
    /* 100,000 lists in each other, and a number of a million digits. */
    memset(body, '[', 100000);
    body[100000] = 0;
    assert_int_equal(probe_ask(s->port, "POST", "/v1/completions", body, NULL, 0), 400);
    n = snprintf(body, sizeof body, "{\"prompt\": \"x\", \"max_tokens\": ");
    memset(body + n, '9', 900000);
    memcpy(body + n + 900000, "}", 2);
    assert_int_equal(probe_ask(s->port, "POST", "/v1/completions", body, NULL, 0), 400);
    expect_service(s);
}

/* ---- malformed ---- */

static void malformed_requests(void **state)
{
    scene *s = *state;
    static const struct {
        const char *body;
        int status;
    } bodies[] = {{"", 400},
                  {"{", 400},
                  {"[]", 400},
                  {"{\"prompt\": 5}", 400},
                  {"{\"prompt\": \"\"}", 400},
                  {"{\"prompt\": \"\\ud800\"}", 400},
                  {"{\"prompt\": \"x\", \"max_tokens\": -1}", 400},
                  {"{\"prompt\": \"x\", \"max_tokens\": 1e300}", 400},
                  {"{\"prompt\": \"x\", \"temperature\": 1e300}", 400},
                  {"{\"prompt\": \"x\", \"stop\": [\"\"]}", 400},
                  {"{\"prompt\": \"x\", \"prompt\": \"y\", \"n\": 1000}", 400}};
    static const char *const noise[] = {
        "\r\n\r\n\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "POST /v1/feedback HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"};
    for (size_t i = 0; i < SH_COUNT(bodies); i++) {
        int status = probe_ask(s->port, "POST", "/v1/completions", bodies[i].body, NULL, 0);
        if (status != bodies[i].status)
            fail_msg("status %d for the body %s", status, bodies[i].body);
    }
    for (size_t i = 0; i < SH_COUNT(noise); i++) {
        throw_at(s, noise[i], strlen(noise[i]), i % 2);
        expect_service(s);
    }
    assert_int_equal(probe_feedback(s->port, "cmpl-zz", "edit", " x"), 400);
    assert_int_equal(probe_feedback(s->port, "../../../etc/passwd", "accept", NULL), 400);
}

/* A good request with some bytes changed, cut, or repeated; the seed is printed. */
static void damaged_requests(void **state)
{
    scene *s = *state;
    char good[512], bad[1024];
    sh_rng rng;
    sh_rng_init(&rng, 11, 0, 0);
    print_message("seed 11\n");
    int n = snprintf(good, sizeof good,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nContent-Type: "
                     "application/json\r\nContent-Length: 56\r\n\r\n{\"prompt\": \"one two\", "
                     "\"max_tokens\": 4, \"stream\": true}  ",
                     s->port);
    for (int i = 0; i < ROUNDS * 8; i++) {
        size_t m = (size_t)n;
        memcpy(bad, good, m);
        for (uint64_t k = 1 + sh_rng_u64(&rng) % 4; k > 0; k--)
            bad[sh_rng_u64(&rng) % m] = (char)sh_rng_u64(&rng);
        if (i % 5 == 0)
            m = sh_rng_u64(&rng) % m;
        if (i % 7 == 0) { /* a second one behind it */
            memcpy(bad + m, good, (size_t)n);
            m += (size_t)n;
        }
        throw_at(s, bad, m, i % 2);
        if (i % 8 == 0)
            expect_service(s);
    }
}

/* ---- from elsewhere ---- */

static void other_hosts_and_pages(void **state)
{
    scene *s = *state;
    char request[512];
    static const struct {
        const char *host, *origin; /* host NULL: the right one */
    } heads[] = {{"Host: evil.example", ""},
                 {"Host: 127.0.0.1:1", ""},
                 {"X: y", ""},
                 {NULL, "\r\nOrigin: http://evil.example"},
                 {NULL, "\r\nOrigin: null"}};
    for (size_t i = 0; i < SH_COUNT(heads); i++) {
        char head[128];
        snprintf(head, sizeof head, "Host: 127.0.0.1:%u", s->port);
        int n =
            snprintf(request, sizeof request,
                     "POST /v1/completions HTTP/1.1\r\n%s%s\r\nContent-Type: application/json\r\n"
                     "Content-Length: 15\r\n\r\n{\"prompt\": \"x\"}",
                     heads[i].host ? heads[i].host : head, heads[i].origin);
        int fd = client_connect((uint16_t)s->port);
        assert_true(fd >= 0 && client_send(fd, request, (size_t)n));
        client_reply reply = client_read(fd, false);
        close(fd);
        if (reply.status != 403 && reply.status != 400)
            fail_msg("status %d for head %zu", reply.status, i);
        client_release(&reply);
    }
    expect_service(s);
}

/* ---- all of it ---- */

static void everything_at_once(void **state)
{
    scene *s = *state;
    int many[128];
    drip(s, 'a');
    damaged_requests(state);
    drip(s, 'b');
    malformed_requests(state);
    huge_requests(state);
    drip(s, 'c');
    other_hosts_and_pages(state);
    /* More connections than it takes: they are refused, and when they go all is as before. */
    for (size_t i = 0; i < SH_COUNT(many); i++)
        many[i] = client_connect((uint16_t)s->port);
    for (size_t i = 0; i < SH_COUNT(many); i++)
        if (many[i] >= 0)
            close(many[i]);
    E2E_UNTIL(probe_ask(s->port, "GET", "/healthz", NULL, NULL, 0) == 200, "/healthz");
    expect_service(s);
    e2e_process *node = &s->fleet.nodes[0].process;
    assert_int_equal(e2e_node_int(&s->fleet, 0, "running"), 0);
    assert_int_equal(e2e_end(node, SIGTERM), 0);
    fleets_check_feedback(&s->fleet, 0, s->acknowledged, 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(slow_clients, make, release),
        cmocka_unit_test_setup_teardown(everything_at_once, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
