#include "shared/net/net.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

#include "shared/net/net_internal.h"

/* ---- the context ---- */

sh_status net_fail(sh_error *err, const char *what, const char *endpoint)
{
    int reason = zmq_errno();
    sh_status code = SH_ERR_IO;
    const char *advice = "";
    switch (reason) {
    case EADDRINUSE:
        code = SH_ERR_EXISTS;
        advice = ": another program listens there; stop it or choose another address";
        break;
    case EINVAL:
    case ENODEV:
    case EPROTONOSUPPORT:
    case ENOCOMPATPROTO:
    case EADDRNOTAVAIL:
    case ENAMETOOLONG:
        code = SH_ERR_USAGE;
        advice = ": an address is like tcp://127.0.0.1:7420, of this machine";
        break;
    case EMFILE:
    case ENFILE:
        code = SH_ERR_LIMIT;
        advice = ": raise the limit of open files (ulimit -n)";
        break;
    case ENOMEM:
        code = SH_ERR_NO_MEMORY;
        break;
    default:
        break;
    }
    return sh_fail(err, code, "cannot %s '%s': %s%s", what, endpoint, zmq_strerror(reason), advice);
}

static bool is_port(const char *text, bool listens)
{
    size_t n = strspn(text, "0123456789");
    if (listens && strcmp(text, "*") == 0)
        return true;
    unsigned long port = n > 0 && n <= 5 && text[n] == 0 ? strtoul(text, NULL, 10) : ULONG_MAX;
    return port <= 65535 && (listens || port > 0);
}

sh_status net_check_endpoint(const char *endpoint, bool listens, sh_error *err)
{
    static const char tcp[] = "tcp://", ipc[] = "ipc://";
    struct sockaddr_un local;
    const char *rest = endpoint + sizeof tcp - 1, *colon;
    size_t n = strlen(endpoint);
    bool good = false;
    if (n >= NET_ENDPOINT_BYTES)
        return sh_fail(err, SH_ERR_USAGE, "net: an address of %zu bytes, at most %d are taken", n,
                       NET_ENDPOINT_BYTES - 1);
    if (strncmp(endpoint, tcp, sizeof tcp - 1) == 0) {
        colon = strrchr(rest, ':');
        good = colon && colon > rest && is_port(colon + 1, listens);
    } else if (strncmp(endpoint, ipc, sizeof ipc - 1) == 0) {
        good = *rest && strlen(rest) < sizeof local.sun_path;
    }
    return good ? SH_OK
                : sh_fail(err, SH_ERR_USAGE,
                          "'%s' is no address: it is like tcp://127.0.0.1:7420, or ipc://PATH with "
                          "a path of at most %zu bytes",
                          endpoint, sizeof local.sun_path - 1);
}

uint64_t sh_net_raise_descriptors(void)
{
    struct rlimit files = {0};
    if (getrlimit(RLIMIT_NOFILE, &files) != 0)
        return 0;
    struct rlimit most = {.rlim_cur = files.rlim_max, .rlim_max = files.rlim_max};
    if (files.rlim_cur < files.rlim_max && setrlimit(RLIMIT_NOFILE, &most) == 0)
        files = most;
    return (uint64_t)files.rlim_cur;
}

sh_status sh_net_create(sh_net **out, sh_error *err)
{
    return sh_net_create_with(&(sh_net_options){0}, out, err);
}

static sh_status set_context(sh_net *net, const sh_net_options *o, sh_error *err)
{
    if (o->io_threads > 0 && zmq_ctx_set(net->zmq, ZMQ_IO_THREADS, (int)o->io_threads) != 0)
        return sh_fail(err, SH_ERR_USAGE, "net: %u I/O threads: %s", o->io_threads,
                       zmq_strerror(zmq_errno()));
    if (o->sockets_max > 0 && zmq_ctx_set(net->zmq, ZMQ_MAX_SOCKETS, (int)o->sockets_max) != 0)
        return sh_fail(err, SH_ERR_USAGE, "net: %u sockets: %s", o->sockets_max,
                       zmq_strerror(zmq_errno()));
    return SH_OK;
}

sh_status sh_net_create_with(const sh_net_options *options, sh_net **out, sh_error *err)
{
    if (!zmq_has("curve"))
        return sh_fail(err, SH_ERR_UNSUPPORTED, "net: this libzmq was built without CURVE");
    sh_net *net = sh_calloc(1, sizeof *net);
    if (!net)
        return sh_fail(err, SH_ERR_NO_MEMORY, "net: no memory");
    net->zmq = zmq_ctx_new();
    if (!net->zmq) {
        free(net);
        return sh_fail(err, SH_ERR_IO, "net: no context: %s", zmq_strerror(zmq_errno()));
    }
    pthread_mutex_init(&net->lock, NULL);
    sh_status status = set_context(net, options, err);
    if (status == SH_OK)
        status = net_zap_start(net, err);
    if (status != SH_OK) {
        zmq_ctx_term(net->zmq);
        pthread_mutex_destroy(&net->lock);
        free(net);
        return status;
    }
    *out = net;
    return SH_OK;
}

void sh_net_destroy(sh_net **out)
{
    sh_net *net = *out;
    if (!net)
        return;
    SH_ASSERT(atomic_load(&net->sockets) == 0);
    zmq_ctx_shutdown(net->zmq);
    net_zap_join(net);
    while (zmq_ctx_term(net->zmq) != 0 && zmq_errno() == EINTR)
        ;
    pthread_mutex_destroy(&net->lock);
    free(net);
    *out = NULL;
}

uint64_t net_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- sockets ---- */

sh_status net_set_int(void *socket, int option, int value, sh_error *err)
{
    if (zmq_setsockopt(socket, option, &value, sizeof value) == 0)
        return SH_OK;
    return sh_fail(err, SH_ERR_IO, "net: option %d = %d: %s", option, value,
                   zmq_strerror(zmq_errno()));
}

static sh_status set_keys(void *socket, const net_socket_options *o, sh_error *err)
{
    if (o->type == ZMQ_ROUTER)
        SH_TRY(net_set_int(socket, ZMQ_CURVE_SERVER, 1, err));
    if (zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, o->keys->public_key.b, 32) != 0 ||
        zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, o->keys->secret, 32) != 0)
        return sh_fail(err, SH_ERR_IO, "net: keys: %s", zmq_strerror(zmq_errno()));
    return SH_OK;
}

sh_status net_socket_create(sh_net *net, const net_socket_options *o, void **out, sh_error *err)
{
    void *socket = zmq_socket(net->zmq, o->type);
    if (!socket)
        return net_fail(err, "make", "a socket");
    int queue = (int)SH_MIN(o->queue_max ? o->queue_max : NET_QUEUE_DEFAULT, (uint32_t)INT32_MAX);
    int64_t receive_max = (int64_t)o->receive_max + NET_CURVE_BYTES;
    sh_status status = SH_OK;
    SH_GOTO(net_set_int(socket, ZMQ_LINGER, 0, err));
    SH_GOTO(net_set_int(socket, ZMQ_SNDHWM, queue, err));
    /* No limit: a connection that is not read because of one, and ends, fells the process when a
     * PING stands behind what waits (libzmq 4.3.4: "Assertion failed: !_io_error", restart_input
     * answers it on a connection that is gone). A server counts bytes instead (net_peers.c); a
     * client asked for what comes. */
    SH_GOTO(net_set_int(socket, ZMQ_RCVHWM, 0, err));
    SH_GOTO(net_set_int(socket, ZMQ_HANDSHAKE_IVL, NET_HANDSHAKE_MS, err));
    if (zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &receive_max, sizeof receive_max) != 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "net: largest message: %s", zmq_strerror(zmq_errno())));
    SH_GOTO(set_keys(socket, o, err));
    *out = socket;
    return SH_OK;
cleanup:
    zmq_close(socket);
    return status;
}

sh_status net_monitor_open(sh_net *net, void *socket, int events, void **out, sh_error *err)
{
    char address[64];
    snprintf(address, sizeof address, "inproc://monitor-%u", atomic_fetch_add(&net->serial, 1));
    if (zmq_socket_monitor(socket, address, events) != 0)
        return net_fail(err, "watch", address);
    void *monitor = zmq_socket(net->zmq, ZMQ_PAIR);
    /* Without a limit: a full queue would stop the thread that does the connections' work. What
     * comes in is a few events a connection, and each wait takes all of them out. */
    if (!monitor || net_set_int(monitor, ZMQ_RCVHWM, 0, err) != SH_OK ||
        net_set_int(monitor, ZMQ_LINGER, 0, err) != SH_OK || zmq_connect(monitor, address) != 0) {
        sh_status status = net_fail(err, "watch", address);
        if (monitor)
            zmq_close(monitor);
        zmq_socket_monitor(socket, NULL, 0);
        return status;
    }
    *out = monitor;
    return SH_OK;
}

bool net_monitor_next(void *monitor, uint16_t *event, uint32_t *value)
{
    uint8_t bytes[6];
    int n;
    do
        n = zmq_recv(monitor, bytes, sizeof bytes, ZMQ_DONTWAIT);
    while (n < 0 && zmq_errno() == EINTR);
    if (n != (int)sizeof bytes)
        return false;
    /* The second frame is the address. */
    char address[NET_ENDPOINT_BYTES];
    if (zmq_recv(monitor, address, sizeof address, ZMQ_DONTWAIT) < 0)
        return false;
    memcpy(event, bytes, 2);
    memcpy(value, bytes + 2, 4);
    return true;
}

void net_socket_close(void **socket, void **monitor, int linger_ms)
{
    if (*socket) {
        zmq_setsockopt(*socket, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
        zmq_socket_monitor(*socket, NULL, 0);
    }
    if (*monitor)
        zmq_close(*monitor);
    if (*socket)
        zmq_close(*socket);
    *socket = *monitor = NULL;
}

bool net_skip_rest(void *socket, size_t frames_max)
{
    bool more = true;
    for (size_t i = 0; more && i < frames_max; i++) {
        zmq_msg_t frame;
        zmq_msg_init(&frame);
        if (zmq_msg_recv(&frame, socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&frame);
            return false;
        }
        more = zmq_msg_more(&frame);
        zmq_msg_close(&frame);
    }
    return !more;
}

/* ---- waiting ---- */

#define ITEMS_MAX (2 * SH_NET_SOCKETS_MAX + SH_NET_FDS_MAX)

static size_t add_items(zmq_pollitem_t *items, size_t n, const net_waitable *w, uint64_t *due_ms)
{
    if (w->socket)
        items[n++] = (zmq_pollitem_t){.socket = w->socket, .events = ZMQ_POLLIN};
    if (w->monitor)
        items[n++] = (zmq_pollitem_t){.socket = w->monitor, .events = ZMQ_POLLIN};
    *due_ms = SH_MIN(*due_ms, w->due_ms);
    return n;
}

static long timeout_until(uint64_t due_ms, int timeout_ms)
{
    if (due_ms == UINT64_MAX)
        return timeout_ms;
    uint64_t now = net_now_ms(), left = due_ms > now ? due_ms - now : 0;
    left = SH_MIN(left, (uint64_t)INT32_MAX);
    return timeout_ms < 0 ? (long)left : (long)SH_MIN(left, (uint64_t)timeout_ms);
}

static short to_zmq(short events)
{
    int out = 0;
    out |= events & POLLIN ? ZMQ_POLLIN : 0;
    out |= events & POLLOUT ? ZMQ_POLLOUT : 0;
    out |= events & POLLPRI ? ZMQ_POLLPRI : 0;
    return (short)out;
}

static short from_zmq(short events)
{
    int out = 0;
    out |= events & ZMQ_POLLIN ? POLLIN : 0;
    out |= events & ZMQ_POLLOUT ? POLLOUT : 0;
    out |= events & ZMQ_POLLPRI ? POLLPRI : 0;
    out |= events & ZMQ_POLLERR ? POLLERR : 0;
    return (short)out;
}

sh_status sh_net_wait(const sh_net_waiting *w, sh_error *err)
{
    zmq_pollitem_t items[ITEMS_MAX];
    uint64_t due_ms = UINT64_MAX;
    size_t n = 0;
    if (w->n_servers + w->n_clients > SH_NET_SOCKETS_MAX || w->n_fds > SH_NET_FDS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "net: to wait for %zu sockets and %zu descriptors",
                       w->n_servers + w->n_clients, w->n_fds);
    for (size_t i = 0; i < w->n_servers; i++) {
        net_waitable server = net_server_waitable(w->servers[i]);
        n = add_items(items, n, &server, &due_ms);
    }
    for (size_t i = 0; i < w->n_clients; i++) {
        net_waitable client = net_client_waitable(w->clients[i]);
        n = add_items(items, n, &client, &due_ms);
    }
    for (size_t i = 0; i < w->n_fds; i++) {
        w->fds[i].revents = 0;
        items[n + i] = (zmq_pollitem_t){.fd = w->fds[i].fd, .events = to_zmq(w->fds[i].events)};
    }
    int rc = zmq_poll(items, (int)(n + w->n_fds), timeout_until(due_ms, w->timeout_ms));
    if (rc < 0 && zmq_errno() == EINTR)
        return SH_OK;
    if (rc < 0)
        return sh_fail(err, SH_ERR_IO, "net: waiting: %s", zmq_strerror(zmq_errno()));
    for (size_t i = 0; i < w->n_fds; i++)
        w->fds[i].revents = from_zmq(items[n + i].revents);
    return SH_OK;
}
