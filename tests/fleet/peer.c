#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/fleet/peer.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "shared/base/status.h"

#define TIMEOUT_S 60

static void set_timeout(int fd)
{
    struct timeval timeout = {.tv_sec = TIMEOUT_S};
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
}

static void *serve_all(void *arg)
{
    peer *p = arg;
    for (int i = 0; i < p->connections; i++) {
        int fd = accept(p->listener, NULL, NULL);
        if (fd < 0)
            break;
        set_timeout(fd);
        p->serve(fd, i, p->arg);
        close(fd);
    }
    return NULL;
}

void peer_start(peer *p)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t n = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    p->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(p->listener >= 0);
    assert_int_equal(bind(p->listener, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(p->listener, 16), 0);
    assert_int_equal(getsockname(p->listener, (struct sockaddr *)&at, &n), 0);
    p->port = ntohs(at.sin_port);
    assert_int_equal(pthread_create(&p->thread, NULL, serve_all, p), 0);
}

void peer_end(peer *p)
{
    pthread_join(p->thread, NULL);
    close(p->listener);
}

int peer_dial(uint16_t port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    set_timeout(fd);
    return fd;
}

void peer_write(int fd, const void *bytes, size_t n)
{
    const char *at = bytes;
    while (n > 0) {
        ssize_t k = send(fd, at, n, MSG_NOSIGNAL);
        if (k <= 0)
            return; /* the other end sees what is missing */
        at += k;
        n -= (size_t)k;
    }
}

bool peer_read_until(int fd, char *out, size_t out_bytes, const char *until)
{
    size_t n = 0, k = strlen(until);
    while (n + 1 < out_bytes && recv(fd, out + n, 1, 0) == 1) {
        out[++n] = 0;
        if (n >= k && memcmp(out + n - k, until, k) == 0)
            return true;
    }
    out[SH_MIN(n, out_bytes - 1)] = 0;
    return false;
}

bool peer_read(int fd, void *out, size_t n)
{
    char *at = out;
    while (n > 0) {
        ssize_t k = recv(fd, at, n, 0);
        if (k <= 0)
            return false;
        at += k;
        n -= (size_t)k;
    }
    return true;
}
