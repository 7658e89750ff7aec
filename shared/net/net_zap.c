/*
 * The ZAP handler (RFC 27): one thread a context, which asks each server's `allow` about the key of
 * a handshake. libzmq sends the questions of all sockets to inproc://zeromq.zap.01; servers are
 * told apart by their domain. A request that we cannot read, of no domain of ours or of another
 * mechanism than CURVE is refused.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "shared/net/net_internal.h"

#define ZAP_ENDPOINT   "inproc://zeromq.zap.01"
#define METADATA_BYTES 64

/* ---- the request ---- */

enum { ZAP_VERSION, ZAP_REQUEST, ZAP_DOMAIN, ZAP_ADDRESS, ZAP_IDENTITY, ZAP_MECHANISM, ZAP_KEY };

static bool frame_is(const net_zap_frame *f, const char *text)
{
    return f->n == strlen(text) && memcmp(f->bytes, text, f->n) == 0;
}

void net_zap_add(net_zap_question *q, const void *bytes, size_t n)
{
    if (q->n < NET_ZAP_FRAMES && n <= NET_ZAP_FRAME_MAX) {
        if (n > 0)
            memcpy(q->frames[q->n].bytes, bytes, n);
        q->frames[q->n].n = n;
    } else {
        q->spoilt = true;
    }
    q->n += q->n < SIZE_MAX;
}

bool net_zap_read(const net_zap_question *q, net_zap_request *out)
{
    const net_zap_frame *domain = &q->frames[ZAP_DOMAIN], *key = &q->frames[ZAP_KEY];
    *out = (net_zap_request){0};
    if (q->spoilt || q->n != NET_ZAP_FRAMES || !frame_is(&q->frames[ZAP_VERSION], "1.0") ||
        domain->n == 0 || domain->n >= sizeof out->domain ||
        memchr(domain->bytes, 0, domain->n) != NULL)
        return false;
    memcpy(out->domain, domain->bytes, domain->n);
    out->curve = frame_is(&q->frames[ZAP_MECHANISM], "CURVE") && key->n == sizeof out->key.b;
    if (out->curve)
        memcpy(out->key.b, key->bytes, sizeof out->key.b);
    return true;
}

/* False: the context ends. */
static bool receive(void *socket, net_zap_question *q)
{
    *q = (net_zap_question){0};
    for (bool more = true; more;) {
        zmq_msg_t message;
        zmq_msg_init(&message);
        int rc;
        do
            rc = zmq_msg_recv(&message, socket, 0);
        while (rc < 0 && zmq_errno() == EINTR);
        if (rc < 0) {
            zmq_msg_close(&message);
            return false;
        }
        more = zmq_msg_more(&message);
        net_zap_add(q, zmq_msg_data(&message), zmq_msg_size(&message));
        zmq_msg_close(&message);
    }
    return true;
}

/* *generation is that from before `allow` was asked: a drop in between counts. */
static bool decide(sh_net *net, const net_zap_request *request, uint64_t *generation)
{
    bool yes = false;
    pthread_mutex_lock(&net->lock);
    for (net_gate *gate = net->gates; gate; gate = gate->next) {
        if (strcmp(request->domain, gate->domain) != 0)
            continue;
        *generation = atomic_load(&gate->generation);
        yes = request->curve && gate->allow && gate->allow(gate->arg, &request->key);
        if (!yes)
            atomic_fetch_add(&gate->refused, 1);
        break;
    }
    pthread_mutex_unlock(&net->lock);
    return yes;
}

/* Metadata of ZMTP (RFC 23): length of the name, name, length of the value in network order, value.
 */
static size_t make_metadata(uint64_t generation, uint8_t out[METADATA_BYTES])
{
    size_t name = strlen(NET_GENERATION);
    char value[24];
    int n = snprintf(value, sizeof value, "%llu", (unsigned long long)generation);
    out[0] = (uint8_t)name;
    memcpy(out + 1, NET_GENERATION, name);
    memcpy(out + 1 + name, (uint8_t[4]){0, 0, 0, (uint8_t)n}, 4);
    memcpy(out + 5 + name, value, (size_t)n);
    return 5 + name + (size_t)n;
}

static void answer(void *socket, const net_zap_question *q, bool yes, uint64_t generation)
{
    const net_zap_frame *id = &q->frames[ZAP_REQUEST];
    char user[SH_HASH_HEX_BYTES] = "";
    uint8_t metadata[METADATA_BYTES];
    size_t n = 0;
    if (yes) {
        sh_hex(q->frames[ZAP_KEY].bytes, sizeof(sh_hash), user);
        n = make_metadata(generation, metadata);
    }
    const char *text = yes ? "OK" : "this key may not connect";
    if (zmq_send(socket, "1.0", 3, ZMQ_SNDMORE) < 0 ||
        zmq_send(socket, id->bytes, id->n, ZMQ_SNDMORE) < 0 ||
        zmq_send(socket, yes ? "200" : "400", 3, ZMQ_SNDMORE) < 0 ||
        zmq_send(socket, text, strlen(text), ZMQ_SNDMORE) < 0 ||
        zmq_send(socket, user, strlen(user), ZMQ_SNDMORE) < 0 ||
        zmq_send(socket, metadata, n, 0) < 0)
        return; /* the context ends; the next read says so */
}

static void *run(void *arg)
{
    sh_net *net = arg;
    net_zap_question q;
    while (receive(net->zap, &q)) {
        net_zap_request request;
        uint64_t generation = 0;
        bool yes = net_zap_read(&q, &request) && decide(net, &request, &generation);
        answer(net->zap, &q, yes, generation);
    }
    zmq_close(net->zap);
    return NULL;
}

sh_status net_zap_start(sh_net *net, sh_error *err)
{
    net->zap = zmq_socket(net->zmq, ZMQ_REP);
    if (!net->zap)
        return net_fail(err, "make a socket for", ZAP_ENDPOINT);
    if (net_set_int(net->zap, ZMQ_LINGER, 0, err) != SH_OK ||
        zmq_bind(net->zap, ZAP_ENDPOINT) != 0) {
        sh_status status = net_fail(err, "listen at", ZAP_ENDPOINT);
        zmq_close(net->zap);
        return status;
    }
    /* Signals are for the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int reason = pthread_create(&net->thread, NULL, run, net);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (reason != 0) {
        zmq_close(net->zap);
        return sh_fail(err, SH_ERR_IO, "net: no thread for the key check: %s", strerror(reason));
    }
    return SH_OK;
}

void net_zap_join(sh_net *net)
{
    pthread_join(net->thread, NULL);
}

void net_gate_open(sh_net *net, net_gate *gate)
{
    pthread_mutex_lock(&net->lock);
    gate->next = net->gates;
    net->gates = gate;
    pthread_mutex_unlock(&net->lock);
}

void net_gate_close(sh_net *net, net_gate *gate)
{
    pthread_mutex_lock(&net->lock);
    for (net_gate **at = &net->gates; *at; at = &(*at)->next)
        if (*at == gate) {
            *at = gate->next;
            break;
        }
    pthread_mutex_unlock(&net->lock);
}
