/*
 * What the files of net share: the context, the table of keys, the watch on a socket's connections.
 * Internal to shared/net.
 */
#ifndef SH_NET_INTERNAL_H
#define SH_NET_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <zmq.h>

#include "shared/net/net.h"

#define NET_ENDPOINT_BYTES  512
#define NET_QUEUE_DEFAULT   256
#define NET_BACKLOG_DEFAULT 4096
/* A peer that is not through with its handshake by then is gone. Long enough for all of a fleet to
 * be at it at once: what is cut off begins anew, and does its share of the work again. */
#define NET_HANDSHAKE_MS 30000
#define NET_FDS_RESERVED 64 /* descriptors that a server leaves to the rest of the process */
#define NET_ROUTES_MAX   (1u << 20) /* keys whose route is remembered */
#define NET_DROPPED_MAX  (1u << 20) /* keys shut out of what they had open */
#define NET_SKIP_MAX     256        /* frames of no use that one call of next goes over */
#define NET_EVENTS_EVERY 32         /* messages between two looks at what became of connections */
/* What CURVE adds to a message on the wire, which libzmq's limit counts (33 bytes), and a little.
 */
#define NET_CURVE_BYTES   64
#define NET_KEYFILE_BYTES 256

/* ---- a table from keys to numbers (net_map.c) ---- */
typedef struct {
    struct net_map_slot *slots; /* [cap], a power of two; NULL at first */
    size_t n, cap, max;
    size_t hand; /* where the search for something to evict goes on */
} net_map;
bool net_map_get(const net_map *map, const sh_hash *key, uint64_t *value);
/* SH_ERR_LIMIT at max, SH_ERR_NO_MEMORY; unchanged then. */
SH_MUST_USE sh_status net_map_put(net_map *map, const sh_hash *key, uint64_t value);
void net_map_remove(net_map *map, const sh_hash *key);
/* Removes one key, another one each time. */
void net_map_evict(net_map *map);
void net_map_release(net_map *map);

/* ---- connections, by descriptor, and those that have to be ended (net_peers.c) ---- */
#define NET_PEERS_MAX         (1 << 20) /* descriptors whose connections are watched */
#define NET_PEERS_LOOK_MS     100u
#define NET_PEERS_LOOKS_A_MS  10u         /* many connections are looked at less often */
#define NET_DROP_LINGER_MS    1000u       /* for what was sent to a peer before it was dropped */
#define NET_UNHEARD_MAX       (12u << 20) /* bytes: the kernel's own buffer, and some */
#define NET_HEARTBEAT_BYTES_S 256u
#define NET_MESSAGE_BYTES     48u /* around a message on the wire: ZMTP and CURVE */
typedef struct {
    struct net_peer *items; /* [n], by descriptor */
    size_t n, cap, watched;
    uint64_t last_ms, next_ms;
} net_peers;
void net_peers_opened(net_peers *peers, int fd, uint64_t now_ms);
void net_peers_closed(net_peers *peers, int fd);
/* Whether a message was heard by that connection before. */
bool net_peers_has(const net_peers *peers, int fd, uint32_t connection);
/* A message of that key came by that connection, of n bytes. */
void net_peers_heard(net_peers *peers, int fd, const sh_hash *key, uint32_t connection, size_t n);
/* All connections of the key but that one; NULL: all. */
void net_peers_drop(net_peers *peers, const sh_hash *key, const uint32_t *but, uint64_t now_ms);
uint64_t net_peers_due(const net_peers *peers); /* of the next look; UINT64_MAX: none */
typedef struct {
    uint64_t now_ms;
    uint32_t silence_ms; /* see sh_net_server_set_silence */
    bool idle;           /* all that came was read */
    uint64_t allowed;    /* else: bytes of a peer's whole messages that may wait to be read */
    void (*shut)(void *arg, int fd);
    void *arg;
} net_peers_looking;
/* Looks, when it is time, and shuts what has to be. */
void net_peers_look(net_peers *peers, const net_peers_looking *look);
void net_peers_release(net_peers *peers);

/* ---- who may connect (net_zap.c) ---- */
typedef struct net_gate { /* of one server; the ZAP thread reads it under the lock of its sh_net */
    char domain[24];
    bool (*allow)(void *arg, const sh_hash *key);
    void *arg;
    /* Grows with every drop. A handshake notes it, and every message of its connection has it: so
     * what was dropped is told from what connected later. */
    atomic_ullong generation;
    atomic_ullong refused;
    struct net_gate *next;
} net_gate;

struct sh_net {
    void *zmq, *zap; /* the socket is the thread's */
    pthread_t thread;
    pthread_mutex_t lock; /* of gates; held during `allow` */
    net_gate *gates;
    atomic_uint serial;  /* names domains and monitors */
    atomic_uint sockets; /* servers and clients that live */
};
/* What libzmq asks, and nobody else can: a message of frames, version, request id, domain, address,
 * identity, mechanism, and for CURVE the key. Read without sockets, for the fuzzer. */
#define NET_ZAP_FRAMES    7
#define NET_ZAP_FRAME_MAX 256
typedef struct {
    uint8_t bytes[NET_ZAP_FRAME_MAX];
    size_t n;
} net_zap_frame;
typedef struct {
    net_zap_frame frames[NET_ZAP_FRAMES];
    size_t n;    /* frames that came */
    bool spoilt; /* too many, or one too long */
} net_zap_question;
typedef struct {
    char domain[24];
    bool curve; /* with a key */
    sh_hash key;
} net_zap_request;
void net_zap_add(net_zap_question *question, const void *bytes, size_t n); /* the next frame */
/* False: not of this form. */
bool net_zap_read(const net_zap_question *question, net_zap_request *out);
#define NET_GENERATION "X-Generation" /* of ZAP's metadata, a number in decimal */
SH_MUST_USE sh_status net_zap_start(sh_net *net, sh_error *err);
void net_zap_join(sh_net *net); /* after zmq_ctx_shutdown */
void net_gate_open(sh_net *net, net_gate *gate);
void net_gate_close(sh_net *net, net_gate *gate); /* no `allow` runs when it returns */

/* ---- sockets (net.c) ---- */
SH_MUST_USE sh_status net_fail(sh_error *err, const char *what, const char *endpoint);
SH_MUST_USE sh_status net_set_int(void *socket, int option, int value, sh_error *err);
/* tcp://HOST:PORT or ipc://PATH; libzmq takes a port above 65,535 for another one. */
SH_MUST_USE sh_status net_check_endpoint(const char *endpoint, bool listens, sh_error *err);
/* A socket with limits, keys and without linger. */
typedef struct {
    int type;
    const sh_net_keys *keys;
    uint32_t queue_max; /* to a peer; 0: the default */
    size_t receive_max;
} net_socket_options;
SH_MUST_USE sh_status net_socket_create(sh_net *net, const net_socket_options *options, void **out,
                                        sh_error *err);
/* The socket's life as messages: a PAIR that reads it. */
SH_MUST_USE sh_status net_monitor_open(sh_net *net, void *socket, int events, void **out,
                                       sh_error *err);
/* False: no event is there now. */
bool net_monitor_next(void *monitor, uint16_t *event, uint32_t *value);
void net_socket_close(void **socket, void **monitor, int linger_ms);
uint64_t net_now_ms(void); /* monotonic */
/* The whole message, of which `first` is the first frame, is read over; at most n frames at once.
 * Returns false when more of it is there. */
bool net_skip_rest(void *socket, size_t frames_max);

/* ---- what sh_net_wait asks them ---- */
typedef struct {
    void *socket, *monitor; /* NULL: not to be waited for */
    uint64_t due_ms;        /* UINT64_MAX: never */
} net_waitable;
net_waitable net_server_waitable(const sh_net_server *server);
net_waitable net_client_waitable(const sh_net_client *client);

#endif
