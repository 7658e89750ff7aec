#include "experiments/fleet/forward.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/buf.h"

typedef struct { /* one direction */
    uint8_t bytes[FLEET_LINK_BUFFER];
    size_t at, end;
} pipe_buffer;

typedef struct {
    bool open;
    int fd[2];            /* 0: the node, 1: the aggregator */
    pipe_buffer *from[2]; /* from[k]: what fd[k] sent, for the other; owned */
    short ready[2];       /* of the last poll */
} connection;

typedef struct {
    int listener;
    uint16_t port;
    atomic_bool cut;
    atomic_uint_fast64_t bytes[2]; /* by the side that sent them */
    connection conns[FLEET_LINK_CONNS_MAX];
} link_state;

struct fleet_forward {
    link_state *links;
    size_t n;
    atomic_uint target;
    atomic_bool stop;
    int wake;
    pthread_t thread;
    bool running;
};

/* ---- connections ---- */

/* Closed at once, as a cable that is cut: what is on its way is gone. */
static void reset_socket(int fd)
{
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(fd);
}

static void end_connection(connection *c, bool cut)
{
    for (int k = 0; k < 2; k++) {
        if (cut)
            reset_socket(c->fd[k]);
        else
            close(c->fd[k]);
        free(c->from[k]);
        c->from[k] = NULL;
    }
    c->open = false;
}

static int dial(uint16_t port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0 || errno == EINPROGRESS)
        return fd;
    close(fd);
    return -1;
}

static void take_connection(fleet_forward *f, link_state *l)
{
    int one = 1, fd = accept4(l->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    unsigned port = atomic_load(&f->target);
    connection *c = NULL;
    if (fd < 0)
        return;
    for (size_t k = 0; k < FLEET_LINK_CONNS_MAX && !c; k++)
        if (!l->conns[k].open)
            c = &l->conns[k];
    int other = c && port && !atomic_load(&l->cut) ? dial((uint16_t)port) : -1;
    pipe_buffer *a = other >= 0 ? sh_calloc(1, sizeof *a) : NULL;
    pipe_buffer *b = other >= 0 ? sh_calloc(1, sizeof *b) : NULL;
    if (!a || !b) {
        reset_socket(fd);
        if (other >= 0)
            close(other);
        free(a);
        free(b);
        return;
    }
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    *c = (connection){.open = true, .fd = {fd, other}, .from = {a, b}};
}

/* Reads from side k when its buffer is empty, writes what there is to the other side. False: over.
 */
static bool move(link_state *l, connection *c, int k)
{
    pipe_buffer *b = c->from[k];
    if (b->at == b->end && c->ready[k] & (POLLIN | POLLHUP | POLLERR)) {
        ssize_t n = recv(c->fd[k], b->bytes, sizeof b->bytes, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        b->at = 0;
        b->end = n > 0 ? (size_t)n : 0;
        atomic_fetch_add(&l->bytes[k], b->end);
    }
    while (b->at < b->end) {
        ssize_t n = send(c->fd[!k], b->bytes + b->at, b->end - b->at, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOTCONN))
            return !(c->ready[k] & (POLLHUP | POLLERR)); /* it would be polled without a rest */
        if (n <= 0)
            return false;
        b->at += (size_t)n;
    }
    return true;
}

/* ---- the thread ---- */

#define POLLS_MAX (1 + FLEET_LINKS_MAX * (1 + 2 * FLEET_LINK_CONNS_MAX))

static short wanted(const connection *c, int k)
{
    bool room = c->from[k]->at == c->from[k]->end, owed = c->from[!k]->at < c->from[!k]->end;
    return (short)((room ? POLLIN : 0) | (owed ? POLLOUT : 0));
}

static size_t gather(fleet_forward *f, struct pollfd *fds)
{
    size_t n = 0;
    fds[n++] = (struct pollfd){.fd = f->wake, .events = POLLIN};
    for (size_t i = 0; i < f->n; i++) {
        link_state *l = &f->links[i];
        fds[n++] = (struct pollfd){.fd = l->listener, .events = POLLIN};
        for (size_t k = 0; k < FLEET_LINK_CONNS_MAX; k++)
            for (int side = 0; l->conns[k].open && side < 2; side++)
                fds[n++] = (struct pollfd){.fd = l->conns[k].fd[side],
                                           .events = wanted(&l->conns[k], side)};
    }
    return n;
}

static void serve_link(fleet_forward *f, link_state *l, const struct pollfd *fds, size_t *at)
{
    bool comes = fds[(*at)++].revents & POLLIN;
    bool cut = atomic_load(&l->cut);
    for (size_t k = 0; k < FLEET_LINK_CONNS_MAX; k++) {
        connection *c = &l->conns[k];
        if (!c->open)
            continue;
        for (int side = 0; side < 2; side++)
            c->ready[side] = fds[(*at)++].revents;
        if (cut || !move(l, c, 0) || !move(l, c, 1))
            end_connection(c, cut);
    }
    if (comes)
        take_connection(f, l);
}

static void *forward_all(void *arg)
{
    fleet_forward *f = arg;
    static _Thread_local struct pollfd fds[POLLS_MAX];
    while (!atomic_load(&f->stop)) {
        size_t n = gather(f, fds), at = 0;
        if (poll(fds, (nfds_t)n, -1) < 0)
            continue;
        if (fds[at++].revents & POLLIN) {
            uint64_t count;
            (void)(read(f->wake, &count, sizeof count) == sizeof count);
        }
        for (size_t i = 0; i < f->n; i++)
            serve_link(f, &f->links[i], fds, &at);
    }
    return NULL;
}

/* ---- for others ---- */

static void wake(fleet_forward *f)
{
    uint64_t one = 1;
    (void)(write(f->wake, &one, sizeof one) == sizeof one);
}

static sh_status open_listener(link_state *l, sh_error *err)
{
    struct sockaddr_in at = {.sin_family = AF_INET};
    socklen_t n = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    l->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->listener < 0 || bind(l->listener, (struct sockaddr *)&at, sizeof at) != 0 ||
        listen(l->listener, FLEET_LINK_CONNS_MAX) != 0 ||
        getsockname(l->listener, (struct sockaddr *)&at, &n) != 0)
        return sh_fail(err, SH_ERR_IO, "forwarder: no port on 127.0.0.1: %s", strerror(errno));
    l->port = ntohs(at.sin_port);
    return SH_OK;
}

sh_status fleet_forward_create(size_t n_links, fleet_forward **out, sh_error *err)
{
    SH_ASSERT(n_links <= FLEET_LINKS_MAX);
    fleet_forward *f = sh_calloc(1, sizeof *f);
    sh_status status = SH_OK;
    if (!f)
        return sh_fail(err, SH_ERR_NO_MEMORY, "forwarder: no memory");
    f->wake = -1;
    f->links = sh_calloc(SH_MAX(n_links, (size_t)1), sizeof *f->links);
    if (!f->links)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "forwarder: no memory"));
    f->n = n_links;
    for (size_t i = 0; i < n_links; i++)
        f->links[i].listener = -1;
    f->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (f->wake < 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "forwarder: eventfd: %s", strerror(errno)));
    for (size_t i = 0; i < n_links; i++)
        SH_GOTO(open_listener(&f->links[i], err));
    if (pthread_create(&f->thread, NULL, forward_all, f) != 0)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "forwarder: no thread"));
    f->running = true;
    *out = f;
    f = NULL;
cleanup:
    fleet_forward_destroy(&f);
    return status;
}

void fleet_forward_destroy(fleet_forward **fp)
{
    fleet_forward *f = *fp;
    if (!f)
        return;
    if (f->running) {
        atomic_store(&f->stop, true);
        wake(f);
        pthread_join(f->thread, NULL);
    }
    for (size_t i = 0; i < f->n; i++) {
        link_state *l = &f->links[i];
        for (size_t k = 0; k < FLEET_LINK_CONNS_MAX; k++)
            if (l->conns[k].open)
                end_connection(&l->conns[k], true);
        if (l->listener >= 0)
            close(l->listener);
    }
    if (f->wake >= 0)
        close(f->wake);
    free(f->links);
    free(f);
    *fp = NULL;
}

uint16_t fleet_forward_port(const fleet_forward *f, size_t link)
{
    return f->links[link].port;
}

void fleet_forward_target(fleet_forward *f, uint16_t port)
{
    atomic_store(&f->target, port);
}

void fleet_forward_cut(fleet_forward *f, size_t link, bool cut)
{
    atomic_store(&f->links[link].cut, cut);
    wake(f);
}

void fleet_forward_bytes(fleet_forward *f, size_t link, uint64_t *up, uint64_t *down)
{
    *up = atomic_load(&f->links[link].bytes[0]);
    *down = atomic_load(&f->links[link].bytes[1]);
}
