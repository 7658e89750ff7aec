/*
 * The listening side: a ROUTER. libzmq gives each connection a routing id of its own, five bytes: 0
 * and a number that grows. `routes` has the one of each key that was heard last, the newest wins.
 *
 * Dropping a key: every connection notes, at its handshake, the number of drops before it (the
 * generation, which the ZAP handler puts into the metadata of its messages); `dropped` has, for a
 * key, the generation that a connection must have to be heard. A message of an older one is thrown
 * away, and its connection is shut. `spared` has the one connection of a key that a drop of its
 * others left.
 *
 * The cap: libzmq ends all connections of a listener with it, so that to stop listening is no way
 * to refuse the next one. A connection past the cap is shut as soon as its event is read, instead;
 * its file descriptor is in the event. Between the event and its reading libzmq may have closed the
 * descriptor and the process opened another under the same number, so what is shut is looked at
 * first: a socket whose own end is our listening address.
 *
 * What libzmq cannot refuse: a message of any number of frames is put together in memory before we
 * see the first. It takes a key that `allow` lets in, and net_peers.c to end it.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "shared/net/net_internal.h"

#define ROUTE_BYTES      5
#define CONNECTIONS_MOST (1u << 20) /* for a process without a limit of descriptors */
#define IPC              "ipc://"

struct sh_net_server {
    sh_net *net;
    net_gate gate;
    void *socket, *monitor;
    char endpoint[NET_ENDPOINT_BYTES];
    uint32_t connections, connections_max;
    uint64_t failed; /* handshakes that did not get as far as a key */
    uint64_t ignored;
    size_t message_max, receive_max;
    net_map routes;  /* key -> number of its newest connection */
    net_map dropped; /* key -> generation from which on it is heard */
    net_map spared;  /* key -> number of a connection that is heard whatever its generation */
    uint64_t floor;  /* generation from which on anyone is heard */
    net_peers peers;
    uint32_t silence_ms; /* see sh_net_server_set_silence */
    uint64_t queued_max; /* bytes of a peer's messages that wait to be read */
    zmq_msg_t body;      /* what the last event shows */
    bool skipping;       /* frames of a message that is thrown away are still to be read */
    unsigned unlooked;   /* messages since the events of connections were read */
};

/* ---- start and end ---- */

static sh_status decide_cap(uint32_t wanted, uint32_t *out, sh_error *err)
{
    struct rlimit files = {0};
    if (getrlimit(RLIMIT_NOFILE, &files) != 0)
        return sh_fail(err, SH_ERR_IO, "net: limit of open files: %s", strerror(errno));
    uint64_t limit = SH_MIN((uint64_t)files.rlim_cur, 2ull * CONNECTIONS_MOST);
    if (wanted > 0 && wanted + (uint64_t)NET_FDS_RESERVED > limit)
        return sh_fail(err, SH_ERR_USAGE,
                       "%u connections at most are too many for a limit of %llu open files: lower "
                       "the one or raise the other (ulimit -n)",
                       wanted, (unsigned long long)limit);
    *out = wanted ? wanted : (uint32_t)(limit / 2);
    return SH_OK;
}

static sh_status listen_at(sh_net_server *s, const sh_net_server_options *o, sh_error *err)
{
    int backlog = (int)(o->backlog ? o->backlog : NET_BACKLOG_DEFAULT);
    SH_TRY(net_set_int(s->socket, ZMQ_ROUTER_MANDATORY, 1, err));
    SH_TRY(net_set_int(s->socket, ZMQ_BACKLOG, backlog, err));
    SH_TRY(net_set_int(s->socket, ZMQ_TCP_KEEPALIVE, 1, err));
    if (zmq_setsockopt(s->socket, ZMQ_ZAP_DOMAIN, s->gate.domain, strlen(s->gate.domain)) != 0)
        return net_fail(err, "guard", o->endpoint);
    SH_TRY(net_monitor_open(s->net, s->socket,
                            ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED |
                                ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                                ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL,
                            &s->monitor, err));
    if (zmq_bind(s->socket, o->endpoint) != 0)
        return net_fail(err, "listen at", o->endpoint);
    size_t n = sizeof s->endpoint;
    if (zmq_getsockopt(s->socket, ZMQ_LAST_ENDPOINT, s->endpoint, &n) != 0)
        return net_fail(err, "find the address of", o->endpoint);
    return SH_OK;
}

static uint64_t receive_queue(const sh_net_server_options *o)
{
    if (o->receive_queue_max > 0)
        return o->receive_queue_max;
    return o->queue_max > 0 ? o->queue_max : NET_QUEUE_DEFAULT;
}

sh_status sh_net_server_create(sh_net *net, const sh_net_server_options *o, sh_net_server **out,
                               sh_error *err)
{
    uint32_t cap = 0;
    SH_TRY(net_check_endpoint(o->endpoint, true, err));
    SH_TRY(decide_cap(o->connections_max, &cap, err));
    sh_net_server *s = sh_calloc(1, sizeof *s);
    if (!s)
        return sh_fail(err, SH_ERR_NO_MEMORY, "net: no memory for a server");
    *s = (sh_net_server){.net = net,
                         .connections_max = cap,
                         .message_max = o->message_max,
                         .receive_max = o->receive_max ? o->receive_max : o->message_max,
                         .queued_max = receive_queue(o) *
                                       (uint64_t)(o->receive_max ? o->receive_max : o->message_max),
                         .routes = {.max = NET_ROUTES_MAX},
                         .dropped = {.max = NET_DROPPED_MAX},
                         .spared = {.max = NET_DROPPED_MAX}};
    s->gate.allow = o->allow;
    s->gate.arg = o->arg;
    snprintf(s->gate.domain, sizeof s->gate.domain, "server-%u", atomic_fetch_add(&net->serial, 1));
    zmq_msg_init(&s->body);
    atomic_fetch_add(&net->sockets, 1);
    net_gate_open(net, &s->gate);
    sh_status status = SH_OK;
    SH_GOTO(net_socket_create(net,
                              &(net_socket_options){.type = ZMQ_ROUTER,
                                                    .keys = o->keys,
                                                    .queue_max = o->queue_max,
                                                    .receive_max = s->receive_max},
                              &s->socket, err));
    SH_GOTO(listen_at(s, o, err));
    *out = s;
    return SH_OK;
cleanup:
    sh_net_server_destroy(&s, 0);
    return status;
}

void sh_net_server_destroy(sh_net_server **out, int linger_ms)
{
    sh_net_server *s = *out;
    if (!s)
        return;
    zmq_msg_close(&s->body);
    net_socket_close(&s->socket, &s->monitor, linger_ms);
    net_gate_close(s->net, &s->gate);
    net_map_release(&s->routes);
    net_map_release(&s->dropped);
    net_map_release(&s->spared);
    net_peers_release(&s->peers);
    atomic_fetch_sub(&s->net->sockets, 1);
    free(s);
    *out = NULL;
}

const char *sh_net_server_endpoint(const sh_net_server *server)
{
    return server->endpoint;
}

uint32_t sh_net_server_connections(const sh_net_server *server)
{
    return server->connections;
}

uint64_t sh_net_server_refused(const sh_net_server *server)
{
    return atomic_load(&server->gate.refused) + server->failed;
}

uint64_t sh_net_server_ignored(const sh_net_server *server)
{
    return server->ignored;
}

net_waitable net_server_waitable(const sh_net_server *server)
{
    return (net_waitable){server->socket, server->monitor, net_peers_due(&server->peers)};
}

/* ---- connections ---- */

static bool is_ours(const sh_net_server *s, int fd)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un local;
        struct sockaddr_storage room;
    } a = {0};
    socklen_t n = sizeof a;
    if (getsockname(fd, &a.any, &n) != 0)
        return false;
    if (a.any.sa_family == AF_UNIX)
        return strncmp(s->endpoint, IPC, strlen(IPC)) == 0 &&
               strncmp(s->endpoint + strlen(IPC), a.local.sun_path, sizeof a.local.sun_path) == 0;
    const char *port = strrchr(s->endpoint, ':');
    unsigned own = a.any.sa_family == AF_INET    ? ntohs(a.v4.sin_port)
                   : a.any.sa_family == AF_INET6 ? ntohs(a.v6.sin6_port)
                                                 : 0;
    return port && own != 0 && strtoul(port + 1, NULL, 10) == own;
}

static void shut(void *server, int fd)
{
    const sh_net_server *s = server;
    if (fd >= 0 && is_ours(s, fd))
        shutdown(fd, SHUT_RDWR);
}

/* To find that there is none costs libzmq two system calls, as much as a small message: not before
 * each message, but before the first of a connection, which is then known. */
static void take_connection_events(sh_net_server *s)
{
    uint16_t event;
    uint32_t value;
    s->unlooked = 0;
    while (net_monitor_next(s->monitor, &event, &value)) {
        switch (event) {
        case ZMQ_EVENT_ACCEPTED:
            s->connections++;
            net_peers_opened(&s->peers, (int)value, net_now_ms());
            if (s->connections > s->connections_max)
                shut(s, (int)value);
            break;
        case ZMQ_EVENT_DISCONNECTED:
            if (s->connections > 0)
                s->connections--;
            net_peers_closed(&s->peers, (int)value);
            break;
        default:
            s->failed++;
            break;
        }
    }
}

static void look_at_peers(sh_net_server *s, bool idle)
{
    net_peers_look(&s->peers, &(net_peers_looking){.now_ms = net_now_ms(),
                                                   .silence_ms = s->silence_ms,
                                                   .idle = idle,
                                                   .allowed = s->queued_max,
                                                   .shut = shut,
                                                   .arg = s});
}

void sh_net_server_set_silence(sh_net_server *server, uint32_t silence_ms)
{
    server->silence_ms = silence_ms;
}

/* ---- messages ---- */

static bool read_number(const char *text, uint64_t *out)
{
    char *end = NULL;
    if (!text || text[0] < '0' || text[0] > '9')
        return false;
    *out = strtoull(text, &end, 10);
    return *end == 0;
}

bool sh_net_server_hears(const sh_net_server *s, const sh_net_event *event)
{
    uint64_t least = 0, spared = 0;
    if (net_map_get(&s->dropped, &event->key, &least) && event->generation < least)
        return net_map_get(&s->spared, &event->key, &spared) && spared == event->connection;
    return event->generation >= s->floor;
}

/* Who sent the message in s->body. False: its connection is not heard. */
static bool authenticate(sh_net_server *s, sh_net_event *event)
{
    const char *user = zmq_msg_gets(&s->body, "User-Id");
    return user && sh_hash_parse(user, &event->key, NULL) == SH_OK &&
           read_number(zmq_msg_gets(&s->body, NET_GENERATION), &event->generation) &&
           sh_net_server_hears(s, event);
}

static sh_status note_route(sh_net_server *s, const sh_hash *key, uint32_t number, sh_error *err)
{
    uint64_t old;
    /* Numbers grow, and may pass 2^32. A newer connection that has ended gives way when a send to
     * it fails. */
    if (net_map_get(&s->routes, key, &old) && (int32_t)(number - (uint32_t)old) <= 0)
        return SH_OK;
    sh_status status = net_map_put(&s->routes, key, number);
    if (status == SH_ERR_LIMIT) {
        net_map_evict(&s->routes);
        status = net_map_put(&s->routes, key, number);
    }
    return status == SH_OK ? SH_OK : sh_fail(err, status, "net: no memory for a route");
}

/* The first two frames: whose connection, and the message. False: nothing is there. */
static bool read_frames(sh_net_server *s, uint8_t id[ROUTE_BYTES], bool *good)
{
    zmq_msg_t first;
    zmq_msg_init(&first);
    bool there = zmq_msg_recv(&first, s->socket, ZMQ_DONTWAIT) >= 0;
    *good = there && zmq_msg_size(&first) == ROUTE_BYTES && zmq_msg_more(&first);
    bool more = there && zmq_msg_more(&first);
    if (*good)
        memcpy(id, zmq_msg_data(&first), ROUTE_BYTES);
    zmq_msg_close(&first);
    if (more && zmq_msg_recv(&s->body, s->socket, ZMQ_DONTWAIT) < 0)
        return false;
    s->skipping = more && zmq_msg_more(&s->body);
    *good = *good && !s->skipping && id[0] == 0;
    return there;
}

sh_status sh_net_server_next(sh_net_server *s, sh_net_event *out, sh_error *err)
{
    sh_net_event event = {.kind = SH_NET_NONE};
    uint8_t id[ROUTE_BYTES] = {0};
    bool good;
    if (s->unlooked++ >= NET_EVENTS_EVERY)
        take_connection_events(s);
    for (size_t i = 0; i < NET_SKIP_MAX && event.kind == SH_NET_NONE; i++) {
        if (s->skipping) {
            s->skipping = !net_skip_rest(s->socket, NET_SKIP_MAX);
            if (s->skipping)
                break;
        }
        if (!read_frames(s, id, &good))
            break;
        event.connection =
            (uint32_t)id[1] << 24 | (uint32_t)id[2] << 16 | (uint32_t)id[3] << 8 | id[4];
        if (!good) {
            s->ignored++;
        } else if (!authenticate(s, &event) || zmq_msg_size(&s->body) > s->receive_max) {
            s->ignored++;
            shut(s, zmq_msg_get(&s->body, ZMQ_SRCFD));
        } else {
            int fd = zmq_msg_get(&s->body, ZMQ_SRCFD);
            SH_TRY(note_route(s, &event.key, event.connection, err));
            if (!net_peers_has(&s->peers, fd, event.connection))
                take_connection_events(s);
            net_peers_heard(&s->peers, fd, &event.key, event.connection, zmq_msg_size(&s->body));
            event.kind = SH_NET_MESSAGE;
            event.data = zmq_msg_data(&s->body);
            event.n = zmq_msg_size(&s->body);
        }
    }
    if (event.kind == SH_NET_NONE) /* a wait ends for them, too */
        take_connection_events(s);
    look_at_peers(s, event.kind == SH_NET_NONE);
    *out = event;
    return SH_OK;
}

_Static_assert(sizeof(zmq_msg_t) <= sizeof(sh_net_message), "a message has room");

void sh_net_server_keep(sh_net_server *s, sh_net_event *event, sh_net_message *out)
{
    zmq_msg_t *msg = (zmq_msg_t *)(void *)out;
    SH_ASSERT(event->kind == SH_NET_MESSAGE);
    zmq_msg_init(msg);
    (void)zmq_msg_move(msg, &s->body); /* fails for what is no message only */
    event->data = zmq_msg_data(msg);   /* a short one may have them in itself */
}

void sh_net_message_release(sh_net_message *message)
{
    zmq_msg_close((zmq_msg_t *)(void *)message);
}

sh_status sh_net_server_answer(sh_net_server *s, uint32_t number, const void *bytes, size_t n,
                               sh_error *err)
{
    if (n > s->message_max)
        return sh_fail(err, SH_ERR_INVALID, "net: a message of %zu bytes, at most %zu may be sent",
                       n, s->message_max);
    const uint8_t id[ROUTE_BYTES] = {0, (uint8_t)(number >> 24), (uint8_t)(number >> 16),
                                     (uint8_t)(number >> 8), (uint8_t)number};
    int rc;
    do
        rc = zmq_send(s->socket, id, sizeof id, ZMQ_SNDMORE | ZMQ_DONTWAIT);
    while (rc < 0 && zmq_errno() == EINTR);
    if (rc < 0 && zmq_errno() == EAGAIN)
        return sh_fail(err, SH_ERR_LIMIT, "net: the queue of that connection is full");
    if (rc < 0 && zmq_errno() == EHOSTUNREACH)
        return sh_fail(err, SH_ERR_NOT_FOUND, "net: that connection has ended");
    if (rc < 0)
        return net_fail(err, "send from", s->endpoint);
    /* The first frame reserved the place: this one is taken, or dropped with the connection. */
    do
        rc = zmq_send(s->socket, bytes, n, ZMQ_DONTWAIT);
    while (rc < 0 && zmq_errno() == EINTR);
    return rc < 0 ? net_fail(err, "send from", s->endpoint) : SH_OK;
}

sh_status sh_net_server_send(sh_net_server *s, const sh_hash *key, const void *bytes, size_t n,
                             sh_error *err)
{
    uint64_t number = 0;
    if (!net_map_get(&s->routes, key, &number) && n <= s->message_max)
        return sh_fail(err, SH_ERR_NOT_FOUND, "net: that key has no connection");
    sh_status status = sh_net_server_answer(s, (uint32_t)number, bytes, n, err);
    if (status == SH_ERR_NOT_FOUND)
        net_map_remove(&s->routes, key);
    return status;
}

/* but: a connection that goes on; NULL: none does. */
static void drop(sh_net_server *s, const sh_hash *key, const uint32_t *but)
{
    uint64_t generation = atomic_fetch_add(&s->gate.generation, 1) + 1;
    net_map_remove(&s->routes, key);
    net_map_remove(&s->spared, key);
    net_peers_drop(&s->peers, key, but, net_now_ms());
    /* One that cannot be noted has to be made again, as the others. */
    if (but != NULL && net_map_put(&s->spared, key, *but) == SH_OK)
        (void)!net_map_put(&s->routes, key, *but);
    /* When a key cannot be noted, every connection that is open now has to be made again. */
    if (net_map_put(&s->dropped, key, generation) != SH_OK)
        s->floor = generation;
}

void sh_net_server_drop(sh_net_server *s, const sh_hash *key)
{
    drop(s, key, NULL);
}

void sh_net_server_drop_others(sh_net_server *s, const sh_hash *key, uint32_t connection)
{
    drop(s, key, &connection);
}
