/*
 * The transport: ZeroMQ DEALER and ROUTER over TCP (or ipc) with CURVE (RFC 26/CurveZMQ), and a
 * ZAP handler (RFC 27) of our own, because without one libzmq lets any key in.
 *
 * Invariants
 *   - Who sent a message is the key that CURVE authenticated (the message's User-Id), never a field
 *     of it. A server looks each message's key up again: sh_net_server_drop shuts a key out from
 *     its next message on, whatever connections it has.
 *   - Sending is no acknowledgement: what a queue holds is lost with the process or the link.
 *   - Every queue has a limit. Past it a send says SH_ERR_LIMIT and nothing is sent.
 *   - A message is one frame of at most message_max bytes; a peer that sends a larger one is
 *     disconnected, and messages of several frames are thrown away.
 * Threads: a server or client belongs to one thread at a time; a lock may hand it on. The ZAP
 * handler runs on a thread of the sh_net and calls `allow` there, under a lock: it is quick, and
 * calls nothing of this header. Ownership: create/destroy; servers and clients go before their
 * sh_net. Nothing blocks at the end: linger_ms bounds how long destroy waits for what is queued.
 *
 *     SH_TRY(sh_net_create(&net, err));
 *     SH_TRY(sh_net_client_create(net, &options, &client, err));
 *     for (;;) {
 *         SH_TRY(sh_net_wait(&(sh_net_waiting){.clients = &client, .n_clients = 1, .timeout_ms =
 *                            until_timer}, err));
 *         while (sh_net_client_next(client, &event, err) == SH_OK && event.kind != SH_NET_NONE)
 *             ...
 *     }
 */
#ifndef SH_NET_NET_H
#define SH_NET_NET_H

#include <poll.h>

#include "shared/base/buf.h"
#include "shared/base/hash.h"

#define SH_NET_KEY_TEXT    65 /* a key as text: 64 hexadecimal digits and the 0 */
#define SH_NET_FDS_MAX     16
#define SH_NET_SOCKETS_MAX 16 /* servers and clients of one wait */

typedef struct { /* a Curve25519 pair */
    sh_hash public_key;
    uint8_t secret[32];
} sh_net_keys;
SH_MUST_USE sh_status sh_net_keys_make(sh_net_keys *out, sh_error *err);
/* A file of two lines, "public HEX" and "secret HEX", mode 0600. save: SH_ERR_EXISTS when path is
 * there. load: SH_ERR_AUTH when others may read it, SH_ERR_INVALID when the two do not belong
 * together. */
SH_MUST_USE sh_status sh_net_keys_save(const char *path, const sh_net_keys *keys, sh_error *err);
SH_MUST_USE sh_status sh_net_keys_load(const char *path, sh_net_keys *out, sh_error *err);
void sh_net_keys_forget(sh_net_keys *keys); /* overwrites the secret */

typedef struct sh_net sh_net; /* a ZeroMQ context and its ZAP handler */
SH_MUST_USE sh_status sh_net_create(sh_net **out, sh_error *err);
/* The same with threads that do the connections' work (0: 1) and more sockets than libzmq allows by
 * itself, for a process with thousands of clients (0: libzmq's 1,023; a client takes three). */
typedef struct {
    uint32_t io_threads, sockets_max;
} sh_net_options;
SH_MUST_USE sh_status sh_net_create_with(const sh_net_options *options, sh_net **out,
                                         sh_error *err);
/* Raises the process's limit of open descriptors as far as it may. Returns what it is then. */
uint64_t sh_net_raise_descriptors(void);
void sh_net_destroy(sh_net **net);

/* ---- what comes ---- */
typedef enum {
    SH_NET_NONE,    /* nothing now */
    SH_NET_MESSAGE, /* from `key` (server), from the server (client) */
    SH_NET_UP,      /* client: the handshake is done */
    SH_NET_DOWN,    /* client: the connection ended; it is tried again by itself */
    SH_NET_REFUSED, /* client: the server ended the handshake: it does not accept our key, is not
                       whom we expect, or is full. Tried again by itself, after a growing pause */
} sh_net_event_kind;
typedef struct {
    sh_net_event_kind kind;
    sh_hash key;         /* server: the authenticated sender */
    uint32_t connection; /* server: which of the key's connections it came by */
    uint64_t generation; /* server: drops before that one's handshake */
    const uint8_t *data; /* MESSAGE: n bytes, valid until the next call on the same socket */
    size_t n;
} sh_net_event;

/* ---- the side that listens ---- */
typedef struct sh_net_server sh_net_server;
typedef struct {
    const char *endpoint; /* "tcp://0.0.0.0:7420", "tcp://127.0.0.1:*", "ipc://admin.sock" */
    const sh_net_keys *keys;
    /* On the ZAP thread, at each handshake: may this key connect? NULL: no key may. */
    bool (*allow)(void *arg, const sh_hash *key);
    void *arg;
    uint32_t connections_max; /* at it a new connection is shut at once, until one ends; 0: half of
                                 the process's descriptor limit. More than the limit leaves room for
                                 is SH_ERR_USAGE */
    /* What one peer can make the process hold, at most: receive_queue_max messages of receive_max
     * and one that is being read, queue_max of message_max that it does not read, and
     * 12 MiB more, of a message of frames without end or of what came between two looks. Past
     * that, in bytes, its connection is ended. Messages that wait are to be read all the time, also
     * by who has no use for them now. */
    uint32_t queue_max;         /* messages to a peer; 0: 256 */
    uint32_t receive_queue_max; /* messages from a peer; 0: queue_max */
    size_t message_max;         /* largest to a peer */
    size_t receive_max;         /* largest from a peer; 0: message_max */
    uint32_t backlog;           /* of the listening socket; 0: 4096 */
} sh_net_server_options;
/* SH_ERR_EXISTS: the address is in use (the text names it and says what to do). */
SH_MUST_USE sh_status sh_net_server_create(sh_net *net, const sh_net_server_options *options,
                                           sh_net_server **out, sh_error *err);
void sh_net_server_destroy(sh_net_server **server, int linger_ms);
const char *sh_net_server_endpoint(const sh_net_server *server); /* with the port that it got */
uint32_t sh_net_server_connections(const sh_net_server *server);
uint64_t sh_net_server_refused(const sh_net_server *server); /* handshakes, since the start */
/* Messages of more than one frame, or of dropped keys: thrown away unseen, since the start. */
uint64_t sh_net_server_ignored(const sh_net_server *server);
SH_MUST_USE sh_status sh_net_server_next(sh_net_server *server, sh_net_event *out, sh_error *err);
/* The message of the last event, a MESSAGE, is the caller's from now on and outlives further calls
 * and the server, without its bytes being copied; event->data is where they are then, as long as
 * *out stays where it is. Any thread may release it, once. */
typedef struct {
    void *opaque[8];
} sh_net_message;
void sh_net_server_keep(sh_net_server *server, sh_net_event *event, sh_net_message *out);
void sh_net_message_release(sh_net_message *message);
/* To the newest connection of that key that was heard. SH_ERR_NOT_FOUND: it has none; SH_ERR_LIMIT:
 * its queue is full; SH_ERR_INVALID: more than message_max. In all cases nothing was sent. */
SH_MUST_USE sh_status sh_net_server_send(sh_net_server *server, const sh_hash *key,
                                         const void *bytes, size_t n, sh_error *err);
/* The same to the connection that a message came by, whatever others of its key were heard since:
 * an answer to one of several callers that share a key. SH_ERR_NOT_FOUND: it has ended. */
SH_MUST_USE sh_status sh_net_server_answer(sh_net_server *server, uint32_t connection,
                                           const void *bytes, size_t n, sh_error *err);
/* Forgets the routes of a key: nothing more is sent to it or taken from its open connections, which
 * are shut when they send, and a second later (at a call of next) in any case: what was sent to
 * them before gets away. A new handshake is `allow`'s to decide. */
void sh_net_server_drop(sh_net_server *server, const sh_hash *key);
/* The same for all connections of a key but this one, which answers go to from now on: another
 * program came with the same key, and those that it takes over from have to begin anew. */
void sh_net_server_drop_others(sh_net_server *server, const sh_hash *key, uint32_t connection);
/* Whether a message that was read before, and kept by the caller, comes from a connection that was
 * not dropped since; its data is not looked at. */
bool sh_net_server_hears(const sh_net_server *server, const sh_net_event *event);
/* From now on a connection on which nothing comes for so long after it was accepted is shut, which
 * bounds what a peer without a word can hold. 0, as at first: never. */
void sh_net_server_set_silence(sh_net_server *server, uint32_t silence_ms);

/* ---- the side that dials ---- */
typedef struct sh_net_client sh_net_client;
typedef struct {
    const char *endpoint;
    sh_hash server_key;
    const sh_net_keys *keys;
    uint32_t queue_max; /* messages; 0: 256 */
    size_t message_max;
    uint32_t reconnect_min_ms, reconnect_max_ms; /* exponential; 0: 200 and 30,000 */
    uint32_t heartbeat_ms;                       /* 0: 5,000; a silent peer is gone after three */
    bool keep_unread; /* what came and was not read yet outlives its connection (libzmq forgets it
                         otherwise): for a single answer of a peer that ends. What was sent and did
                         not get away outlives it, too */
} sh_net_client_options;
SH_MUST_USE sh_status sh_net_client_create(sh_net *net, const sh_net_client_options *options,
                                           sh_net_client **out, sh_error *err);
void sh_net_client_destroy(sh_net_client **client, int linger_ms);
SH_MUST_USE sh_status sh_net_client_next(sh_net_client *client, sh_net_event *out, sh_error *err);
/* SH_ERR_LIMIT: not connected, or the queue is full; SH_ERR_INVALID: more than message_max. Nothing
 * was sent. */
SH_MUST_USE sh_status sh_net_client_send(sh_net_client *client, const void *bytes, size_t n,
                                         sh_error *err);

/* ---- waiting ---- */
typedef struct {
    sh_net_server *const *servers;
    size_t n_servers;
    sh_net_client *const *clients;
    size_t n_clients;
    struct pollfd *fds; /* as for poll(2); revents are filled */
    size_t n_fds;       /* at most SH_NET_FDS_MAX */
    int timeout_ms;     /* -1: none */
} sh_net_waiting;
/* Returns when one of them has something (sh_net_*_next is to be called until NONE), a signal
 * came (SH_OK as well), or time is up. */
SH_MUST_USE sh_status sh_net_wait(const sh_net_waiting *waiting, sh_error *err);

#endif
