#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/cutter.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/status.h"

#define PIECE   4096 /* a millisecond: some 4 MB/s */
#define POLL_MS 50

static int connect_to(unsigned port)
{
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof at) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Reset, not closed: what lies in buffers is gone, as when a link goes. */
static void cut(cutter_conn *c)
{
    struct linger none = {.l_onoff = 1};
    int fds[] = {c->from, c->to};
    for (size_t i = 0; i < SH_COUNT(fds); i++) {
        setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &none, sizeof none);
        close(fds[i]);
    }
    *c = (cutter_conn){.from = -1, .to = -1};
}

static void accept_one(cutter *c)
{
    int from = accept4(c->listener, NULL, NULL, SOCK_CLOEXEC);
    int to = from >= 0 ? connect_to(c->target) : -1;
    for (size_t i = 0; to >= 0 && i < CUTTER_CONNS_MAX; i++)
        if (c->conns[i].from < 0) {
            c->conns[i] = (cutter_conn){.from = from, .to = to};
            atomic_fetch_add(&c->connections, 1);
            return;
        }
    if (to >= 0)
        close(to);
    if (from >= 0)
        close(from);
}

/* One piece; false: the connection has ended. Blocks while the other side does not read: both
 * sides always do. */
static bool pass(int in, int out, uint64_t *passed, atomic_ullong *total)
{
    char bytes[PIECE];
    ssize_t n = recv(in, bytes, sizeof bytes, 0);
    if (n <= 0)
        return false;
    for (ssize_t sent = 0, k; sent < n; sent += k)
        if ((k = send(out, bytes + sent, (size_t)(n - sent), MSG_NOSIGNAL)) <= 0)
            return false;
    *passed += (uint64_t)n;
    atomic_fetch_add(total, (uint64_t)n);
    (void)poll(NULL, 0, 1);
    return true;
}

static void serve(cutter *c, cutter_conn *conn, short from, short to)
{
    bool well = true;
    uint64_t limit = atomic_load(&c->cut_after);
    if (from)
        well = pass(conn->from, conn->to, &conn->passed, &c->up);
    if (well && to)
        well = pass(conn->to, conn->from, &conn->passed, &c->down);
    bool full = limit > 0 && conn->passed >= limit;
    if (full)
        atomic_fetch_add(&c->cuts, 1);
    if (full || !well)
        cut(conn);
}

static void *forward(void *arg)
{
    cutter *c = arg;
    while (!atomic_load(&c->stop)) {
        struct pollfd fds[1 + 2 * CUTTER_CONNS_MAX];
        fds[0] = (struct pollfd){.fd = c->listener, .events = POLLIN};
        for (size_t i = 0; i < CUTTER_CONNS_MAX; i++) {
            fds[1 + 2 * i] = (struct pollfd){.fd = c->conns[i].from, .events = POLLIN};
            fds[2 + 2 * i] = (struct pollfd){.fd = c->conns[i].to, .events = POLLIN};
        }
        if (poll(fds, SH_COUNT(fds), POLL_MS) <= 0)
            continue;
        for (size_t i = 0; i < CUTTER_CONNS_MAX; i++)
            if (c->conns[i].from >= 0 && (fds[1 + 2 * i].revents || fds[2 + 2 * i].revents))
                serve(c, &c->conns[i], fds[1 + 2 * i].revents, fds[2 + 2 * i].revents);
        if (fds[0].revents)
            accept_one(c);
    }
    for (size_t i = 0; i < CUTTER_CONNS_MAX; i++)
        if (c->conns[i].from >= 0)
            cut(&c->conns[i]);
    close(c->listener);
    return NULL;
}

void cutter_start(cutter *c, unsigned port, unsigned target, uint64_t cut_after)
{
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int yes = 1;
    *c = (cutter){.port = port, .target = target};
    atomic_store(&c->cut_after, cut_after);
    for (size_t i = 0; i < CUTTER_CONNS_MAX; i++)
        c->conns[i] = (cutter_conn){.from = -1, .to = -1};
    c->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(c->listener >= 0);
    setsockopt(c->listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    assert_int_equal(bind(c->listener, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(c->listener, 16), 0);
    assert_int_equal(pthread_create(&c->thread, NULL, forward, c), 0);
    atomic_store(&c->runs, true);
}

void cutter_stop(cutter *c)
{
    if (!atomic_exchange(&c->runs, false))
        return;
    atomic_store(&c->stop, true);
    pthread_join(c->thread, NULL);
}
