/* The users' HTTP client against a server that answers in awkward ways. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "experiments/fleet/web.h"
#include "tests/fleet/peer.h"

typedef struct {
    const char *replies[4][4]; /* of a connection: one a request; NULL: the connection is closed */
    char requests[4][4][1024];
    bool trickle; /* a byte a write */
} script;

static void serve(int fd, int number, void *arg)
{
    script *s = arg;
    for (int k = 0; k < 4 && s->replies[number][k]; k++) {
        char *request = s->requests[number][k];
        if (!peer_read_until(fd, request, 1024, "\r\n\r\n"))
            return;
        size_t length = 0;
        const char *header = strstr(request, "Content-Length: ");
        char body[256];
        if (header && sscanf(header, "Content-Length: %zu", &length) == 1 && length > 0 &&
            length < sizeof body && peer_read(fd, body, length))
            memcpy(request + strlen(request), body, length);
        const char *reply = s->replies[number][k];
        for (size_t i = 0; s->trickle && i < strlen(reply); i++)
            peer_write(fd, reply + i, 1);
        if (!s->trickle)
            peer_write(fd, reply, strlen(reply));
    }
}

static const fleet_web_request get = {.method = "GET", .path = "/x"};
static const fleet_web_request post = {.method = "POST", .path = "/y", .body = "{\"a\":1}"};

static void ask(fleet_web *web, const peer *p, const fleet_web_request *r, sh_status want, int code,
                const char *body)
{
    sh_buf reply;
    sh_error err = {0};
    int got = 0;
    sh_buf_init(&reply, FLEET_WEB_BODY_MAX);
    sh_status status = fleet_web_get(web, p->port, r, &got, &reply, &err);
    if (status != want)
        fail_msg("status %s (%s), not %s", sh_status_name(status), err.text, sh_status_name(want));
    if (want == SH_OK) {
        assert_int_equal(got, code);
        assert_string_equal((char *)reply.data, body);
    } else {
        assert_true(err.text[0] != 0);
    }
    sh_buf_release(&reply);
}

#define TWO "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
#define CHUNKED                                                                                    \
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

static void test_kept_connection(void **state)
{
    script s = {.replies = {{TWO, CHUNKED, "HTTP/1.1 404 No\r\ncontent-length:  3\r\n\r\nno!"}}};
    peer p = {.serve = serve, .arg = &s, .connections = 1};
    fleet_web web = {0};
    (void)state;
    peer_start(&p);
    ask(&web, &p, &get, SH_OK, 200, "ok");
    ask(&web, &p, &post, SH_OK, 200, "abcde");
    ask(&web, &p, &get, SH_OK, 404, "no!");
    fleet_web_release(&web);
    peer_end(&p);
    char host[64];
    snprintf(host, sizeof host, "Host: 127.0.0.1:%u\r\n", p.port);
    assert_non_null(strstr(s.requests[0][0], host));
    assert_non_null(strstr(s.requests[0][0], "GET /x HTTP/1.1\r\n"));
    assert_non_null(strstr(s.requests[0][1], "Content-Type: application/json\r\n"));
    assert_non_null(strstr(s.requests[0][1], "\r\n\r\n{\"a\":1}"));
}

static void test_bytes_one_by_one(void **state)
{
    script s = {.replies = {{CHUNKED, TWO}}, .trickle = true};
    peer p = {.serve = serve, .arg = &s, .connections = 1};
    fleet_web web = {0};
    (void)state;
    peer_start(&p);
    ask(&web, &p, &get, SH_OK, 200, "abcde");
    ask(&web, &p, &get, SH_OK, 200, "ok");
    fleet_web_release(&web);
    peer_end(&p);
}

/* A server may close a kept connection at any time: the request goes over a new one. */
static void test_closed_between_requests(void **state)
{
    script s = {.replies = {{TWO}, {TWO}}};
    peer p = {.serve = serve, .arg = &s, .connections = 2};
    fleet_web web = {0};
    (void)state;
    peer_start(&p);
    ask(&web, &p, &get, SH_OK, 200, "ok");
    ask(&web, &p, &get, SH_OK, 200, "ok");
    fleet_web_release(&web);
    peer_end(&p);
    assert_true(s.requests[1][0][0] != 0);
}

static void test_connection_close_header(void **state)
{
    script s = {
        .replies = {{"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx"}, {TWO}}};
    peer p = {.serve = serve, .arg = &s, .connections = 2};
    fleet_web web = {0};
    (void)state;
    peer_start(&p);
    ask(&web, &p, &get, SH_OK, 200, "x");
    assert_false(web.open);
    ask(&web, &p, &get, SH_OK, 200, "ok");
    fleet_web_release(&web);
    peer_end(&p);
}

/* What broke in the middle is an error, never a short body. */
static void test_broken_replies(void **state)
{
    static const struct {
        const char *reply;
        sh_status want;
    } cases[] = {
        {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", SH_ERR_IO},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n", SH_ERR_IO},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", SH_ERR_INVALID},
        {"HTTP/1.1 200 OK\r\nContent-Le", SH_ERR_IO},
        {"HTTP/1.1 200 OK\r\n\r\nno length", SH_ERR_INVALID},
        {"SMTP hello\r\n\r\n", SH_ERR_INVALID},
        {"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", SH_ERR_INVALID},
    };
    (void)state;
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        script s = {.replies = {{cases[i].reply}}};
        peer p = {.serve = serve, .arg = &s, .connections = 1};
        fleet_web web = {0};
        peer_start(&p);
        ask(&web, &p, &get, cases[i].want, 0, NULL);
        assert_false(web.open);
        fleet_web_release(&web);
        peer_end(&p);
    }
}

static void test_nobody_listens(void **state)
{
    script s = {.replies = {{TWO}}};
    peer p = {.serve = serve, .arg = &s, .connections = 0};
    fleet_web web = {0};
    (void)state;
    peer_start(&p);
    peer_end(&p); /* the port is free again */
    ask(&web, &p, &get, SH_ERR_IO, 0, NULL);
    fleet_web_release(&web);
}

typedef struct {
    char text[256];
    int n;
} events;

static void take(void *arg, const char *data, size_t n)
{
    events *e = arg;
    size_t at = strlen(e->text);
    snprintf(e->text + at, sizeof e->text - at, "[%.*s]", (int)n, data);
    e->n++;
}

/* The same events however the bytes are split. */
static void test_events(void **state)
{
    static const char bytes[] =
        "data: one\n\n: a comment\nevent: x\ndata:two\r\n\r\ndata: [DONE]\n\n";
    (void)state;
    for (size_t step = 1; step < sizeof bytes; step++) {
        events e = {0};
        fleet_sse sse;
        fleet_sse_init(&sse, take, &e);
        for (size_t at = 0; at < sizeof bytes - 1; at += step)
            assert_true(fleet_sse_feed(&sse, (const uint8_t *)bytes + at,
                                       SH_MIN(step, sizeof bytes - 1 - at)));
        assert_string_equal(e.text, "[one][two][[DONE]]");
        assert_int_equal(e.n, 3);
        fleet_sse_release(&sse);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kept_connection),
        cmocka_unit_test(test_bytes_one_by_one),
        cmocka_unit_test(test_closed_between_requests),
        cmocka_unit_test(test_connection_close_header),
        cmocka_unit_test(test_broken_replies),
        cmocka_unit_test(test_nobody_listens),
        cmocka_unit_test(test_events),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
