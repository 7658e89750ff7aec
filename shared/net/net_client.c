/*
 * The dialling side: a DEALER. libzmq makes a broken connection again by itself, but gives up after
 * a handshake that failed: then the socket is made anew, after a pause that doubles with every
 * failure (full jitter), from reconnect_min_ms to reconnect_max_ms. What was queued goes with it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "shared/net/net_internal.h"

#define RECONNECT_MIN_MS   200
#define RECONNECT_MAX_MS   30000
#define HEARTBEAT_MS       5000
#define CONNECT_TIMEOUT_MS 10000
#define BACKOFF_MAX        20 /* doublings */

struct sh_net_client {
    sh_net *net;
    sh_net_client_options options; /* endpoint and keys are ours */
    sh_net_keys keys;
    char endpoint[NET_ENDPOINT_BYTES];
    void *socket, *monitor; /* NULL while it waits to dial again */
    bool up;
    bool skipping;
    unsigned refusals; /* in a row */
    uint64_t dial_ms;  /* when to dial again; UINT64_MAX: dialled */
    zmq_msg_t body;
};

static sh_status dial(sh_net_client *c, sh_error *err)
{
    const sh_net_client_options *o = &c->options;
    int beat = (int)o->heartbeat_ms;
    const int settings[][2] = {
        {ZMQ_IMMEDIATE, !o->keep_unread},
        {ZMQ_RECONNECT_IVL, (int)o->reconnect_min_ms},
        {ZMQ_RECONNECT_IVL_MAX, (int)o->reconnect_max_ms},
        {ZMQ_CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS},
        {ZMQ_HEARTBEAT_IVL, beat},
        {ZMQ_HEARTBEAT_TIMEOUT, 3 * beat},
        {ZMQ_HEARTBEAT_TTL, 3 * beat}, /* the server notices as well */
    };
    sh_status status = SH_OK;
    SH_GOTO(net_socket_create(c->net,
                              &(net_socket_options){.type = ZMQ_DEALER,
                                                    .keys = o->keys,
                                                    .queue_max = o->queue_max,
                                                    .receive_max = o->message_max},
                              &c->socket, err));
    for (size_t i = 0; i < SH_COUNT(settings); i++)
        SH_GOTO(net_set_int(c->socket, settings[i][0], settings[i][1], err));
    if (zmq_setsockopt(c->socket, ZMQ_CURVE_SERVERKEY, o->server_key.b, 32) != 0)
        SH_GOTO(net_fail(err, "guard", c->endpoint));
    SH_GOTO(net_monitor_open(
        c->net, c->socket,
        ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
            ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL,
        &c->monitor, err));
    if (zmq_connect(c->socket, c->endpoint) != 0)
        SH_GOTO(net_fail(err, "connect to", c->endpoint));
    c->dial_ms = UINT64_MAX;
cleanup:
    if (status != SH_OK)
        net_socket_close(&c->socket, &c->monitor, 0);
    return status;
}

/* Dial again, but not at once. */
static void back_off(sh_net_client *c)
{
    uint64_t most = (uint64_t)c->options.reconnect_min_ms << SH_MIN(c->refusals, BACKOFF_MAX);
    most = SH_MIN(most, (uint64_t)c->options.reconnect_max_ms);
    uint32_t chance;
    sh_random_bytes(&chance, sizeof chance);
    c->refusals++;
    c->dial_ms = net_now_ms() + most / 2 + chance % (most / 2 + 1);
    net_socket_close(&c->socket, &c->monitor, 0);
    c->up = c->skipping = false;
}

sh_status sh_net_client_create(sh_net *net, const sh_net_client_options *options,
                               sh_net_client **out, sh_error *err)
{
    SH_TRY(net_check_endpoint(options->endpoint, false, err));
    sh_net_client *c = sh_calloc(1, sizeof *c);
    if (!c)
        return sh_fail(err, SH_ERR_NO_MEMORY, "net: no memory for a client");
    c->net = net;
    c->options = *options;
    c->keys = *options->keys;
    memcpy(c->endpoint, options->endpoint, strlen(options->endpoint) + 1);
    sh_net_client_options *o = &c->options;
    o->keys = &c->keys;
    o->endpoint = c->endpoint;
    o->reconnect_min_ms = o->reconnect_min_ms ? o->reconnect_min_ms : RECONNECT_MIN_MS;
    o->reconnect_max_ms = o->reconnect_max_ms ? o->reconnect_max_ms : RECONNECT_MAX_MS;
    o->reconnect_max_ms = SH_MAX(o->reconnect_max_ms, o->reconnect_min_ms);
    o->heartbeat_ms = o->heartbeat_ms ? o->heartbeat_ms : HEARTBEAT_MS;
    zmq_msg_init(&c->body);
    atomic_fetch_add(&net->sockets, 1);
    sh_status status = dial(c, err);
    if (status == SH_OK)
        *out = c;
    else
        sh_net_client_destroy(&c, 0);
    return status;
}

void sh_net_client_destroy(sh_net_client **out, int linger_ms)
{
    sh_net_client *c = *out;
    if (!c)
        return;
    zmq_msg_close(&c->body);
    net_socket_close(&c->socket, &c->monitor, linger_ms);
    sh_net_keys_forget(&c->keys);
    atomic_fetch_sub(&c->net->sockets, 1);
    free(c);
    *out = NULL;
}

/* Messages are waited for only while the link is up: what an older connection left is not heard,
 * and must not end every wait. */
net_waitable net_client_waitable(const sh_net_client *c)
{
    return (net_waitable){c->up ? c->socket : NULL, c->monitor, c->dial_ms};
}

/* ---- what comes ---- */

static bool next_message(sh_net_client *c, sh_net_event *out)
{
    for (size_t i = 0; i < NET_SKIP_MAX; i++) {
        if (c->skipping) {
            c->skipping = !net_skip_rest(c->socket, NET_SKIP_MAX);
            if (c->skipping)
                return false;
        }
        if (zmq_msg_recv(&c->body, c->socket, ZMQ_DONTWAIT) < 0)
            return false;
        c->skipping = zmq_msg_more(&c->body);
        if (c->skipping || zmq_msg_size(&c->body) > c->options.message_max)
            continue;
        *out = (sh_net_event){
            .kind = SH_NET_MESSAGE, .data = zmq_msg_data(&c->body), .n = zmq_msg_size(&c->body)};
        return true;
    }
    return false;
}

static sh_net_event_kind next_change(sh_net_client *c)
{
    uint16_t event;
    uint32_t value;
    while (net_monitor_next(c->monitor, &event, &value)) {
        switch (event) {
        case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
            c->up = true;
            c->refusals = 0;
            return SH_NET_UP;
        case ZMQ_EVENT_DISCONNECTED:
            if (!c->up)
                break; /* of a handshake; that it failed is an event of its own */
            c->up = c->skipping = false;
            return SH_NET_DOWN;
        default:
            back_off(c);
            return SH_NET_REFUSED;
        }
    }
    return SH_NET_NONE;
}

sh_status sh_net_client_next(sh_net_client *c, sh_net_event *out, sh_error *err)
{
    sh_net_event event = {.kind = SH_NET_NONE};
    if (!c->socket && net_now_ms() >= c->dial_ms)
        SH_TRY(dial(c, err));
    if (!(c->up && next_message(c, &event)) && c->monitor)
        event = (sh_net_event){.kind = next_change(c)};
    *out = event;
    return SH_OK;
}

sh_status sh_net_client_send(sh_net_client *c, const void *bytes, size_t n, sh_error *err)
{
    if (n > c->options.message_max)
        return sh_fail(err, SH_ERR_INVALID, "net: a message of %zu bytes, at most %zu may be sent",
                       n, c->options.message_max);
    if (!c->up)
        return sh_fail(err, SH_ERR_LIMIT, "net: not connected to '%s'", c->endpoint);
    int rc;
    do
        rc = zmq_send(c->socket, bytes, n, ZMQ_DONTWAIT);
    while (rc < 0 && zmq_errno() == EINTR);
    if (rc >= 0)
        return SH_OK;
    if (zmq_errno() == EAGAIN)
        return sh_fail(err, SH_ERR_LIMIT, "net: the queue to '%s' is full", c->endpoint);
    return net_fail(err, "send to", c->endpoint);
}
