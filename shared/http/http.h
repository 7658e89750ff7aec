/*
 * The local API server: HTTP/1.1 by libmicrohttpd, for this machine only.
 *
 * Invariants
 *   - It listens on a loopback address, nothing else: another one is SH_ERR_USAGE.
 *   - Host must be this address, "localhost" or "[::1]" with this port, and Origin absent or the
 *     same, else 403: a web page, or a name that someone points at 127.0.0.1, gets nothing. POST
 *     bodies must be application/json (415): no browser sends that across origins unasked.
 *   - With a token, every request needs "Authorization: Bearer TOKEN" (401), but for routes marked
 *     open. Tokens are compared in constant time.
 *   - A body, a header block, the number of connections and the time that a client may take have
 *     limits (413, 431, 503, closed). The time counts from the first byte to the last, not from
 * byte to byte; that of a handler does not count. No request can end the process.
 *   - Errors have OpenAI's shape: {"error": {"message", "type", "param", "code"}}; only what is no
 *     HTTP at all, or has too large a header block, gets a page of libmicrohttpd's own.
 *   - Nothing is printed, and no text of a client is logged.
 * Threads: a thread a connection; handlers and streams run there, several at once, and may block.
 * All signals are blocked in them.
 * Ownership: a handler fills the reply; the server releases its body and calls its release once,
 * also when the client went away.
 */
#ifndef SH_HTTP_HTTP_H
#define SH_HTTP_HTTP_H

#include "shared/base/buf.h"
#include "shared/base/json.h"

#define SH_HTTP_HEAD_MAX            (32u << 10) /* bytes of a header block, about */
#define SH_HTTP_CONNECTIONS_DEFAULT 64u
#define SH_HTTP_BODY_DEFAULT        ((size_t)1 << 20)
#define SH_HTTP_REPLY_MAX           ((size_t)4 << 20) /* a body, a piece of a stream */
#define SH_HTTP_TIMEOUT_DEFAULT_S   30u
#define SH_HTTP_STOP_MS             10000u /* that sh_http_destroy leaves to requests that run */

typedef struct {
    const char *method, *path; /* "POST", "/v1/completions"; decoded, without the query */
    const uint8_t *body;       /* [n], 0-terminated beyond it */
    size_t n;
    void *server;       /* for sh_http_request_query */
    const void *client; /* for sh_http_client_gone */
} sh_http_request;
/* Value of ?name=... or NULL. */
const char *sh_http_request_query(const sh_http_request *request, const char *name);

/* Whether the client has closed its side of the connection: nobody may read the answer. Of the
 * request's client, in its handler and in the stream's next, on their thread. NULL never goes. */
bool sh_http_client_gone(const void *client);

typedef struct {
    int status;               /* 200 when the handler leaves it */
    const char *content_type; /* a literal; "application/json" when the handler leaves it */
    uint32_t retry_after_s;   /* 0: no such header */
    sh_buf body;              /* initialized by the server; empty when next is set */
    /* A stream: appends the next piece to out (nothing is fine), sets *done at its end. May block.
     * An error ends the connection without the last chunk, so that the client sees a cut. */
    sh_status (*next)(void *arg, sh_buf *out, bool *done);
    void (*release)(void *arg); /* may be NULL */
    void *arg;
} sh_http_reply;

/* Puts an error into a reply. type: "invalid_request_error", "authentication_error",
 * "not_found_error", "conflict_error", "overloaded_error", "server_error"; param and code may be
 * NULL. */
void sh_http_fail(sh_http_reply *reply, int status, const char *type, const char *param,
                  const char *code, const char *format, ...) __attribute__((format(printf, 6, 7)));
/* Puts JSON (taken over) into a reply. */
void sh_http_json(sh_http_reply *reply, int status, json_t *value);

typedef struct {
    const char *method;
    const char *path; /* exact; one that ends in '*' takes all that begins so, after exact ones */
    void (*handle)(void *arg, const sh_http_request *request, sh_http_reply *reply);
    bool open; /* no token needed: /healthz, /metrics */
} sh_http_route;

typedef struct sh_http sh_http;
typedef struct {
    const char *address;         /* "127.0.0.1" or "::1" */
    uint16_t port;               /* 0: any free one */
    const char *token;           /* NULL or "": none is asked for */
    const sh_http_route *routes; /* borrowed; an unknown path is 404, another method 405; a GET
                                    route answers HEAD, too */
    size_t n_routes;
    void *arg;                /* of the handlers */
    uint32_t connections_max; /* 0: the default; those past it get 503, or are closed */
    size_t body_max;          /* 0: the default */
    uint32_t timeout_s;       /* of an idle or slow client; 0: the default */
} sh_http_options;
/* SH_ERR_EXISTS: the port is in use. */
SH_MUST_USE sh_status sh_http_create(const sh_http_options *options, sh_http **out, sh_error *err);
/* Stops listening and gives requests that run SH_HTTP_STOP_MS to end; new ones get 503. Then cuts
 * the connections and waits for the handlers' threads: whoever blocks in a handler must be woken
 * first. */
void sh_http_destroy(sh_http **http);
uint16_t sh_http_port(const sh_http *http);

#endif
