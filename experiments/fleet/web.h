/*
 * A small HTTP/1.1 client for one server on this machine: plain sockets, one connection that is
 * kept and opened again when it broke, whole replies and streams of server-sent events.
 *
 * Threads: a client belongs to one. Ownership: zero it, release it. Limits: FLEET_WEB_* below.
 */
#ifndef FLEET_WEB_H
#define FLEET_WEB_H

#include "shared/base/buf.h"

#define FLEET_WEB_BODY_MAX   (4u << 20)
#define FLEET_WEB_HEADER_MAX 16384u
#define FLEET_WEB_TIMEOUT_S  60

typedef struct {
    int fd; /* of the open connection; valid when `open` */
    bool open;
    bool fresh; /* no reply came over it yet */
    uint16_t port;
    uint8_t in[16384]; /* read, not yet used: [at, end) */
    size_t at, end;
} fleet_web;
void fleet_web_release(fleet_web *web);

/* Each piece of the body as it comes; false: the rest is not wanted (the connection is closed). */
typedef bool (*fleet_web_piece)(void *arg, const uint8_t *bytes, size_t n);

typedef struct {
    const char *method, *path;
    const char *body; /* JSON, or NULL */
    fleet_web_piece piece;
    void *arg;
} fleet_web_request;
/* *code is the reply's status. SH_ERR_IO: no connection, or it ended before the reply did (*code is
 * set when the head was there); SH_ERR_INVALID: no HTTP that we know. A request over a connection
 * that the server had closed meanwhile is sent once more over a new one. */
SH_MUST_USE sh_status fleet_web_call(fleet_web *web, uint16_t port,
                                     const fleet_web_request *request, int *code, sh_error *err);
/* The whole body into reply (cleared first, ends in a 0 byte beyond it). */
SH_MUST_USE sh_status fleet_web_get(fleet_web *web, uint16_t port, const fleet_web_request *request,
                                    int *code, sh_buf *reply, sh_error *err);

/* Server-sent events: calls event for the text of each "data:" line. */
typedef struct {
    sh_buf line; /* initialized by fleet_sse_init */
    void (*event)(void *arg, const char *data, size_t n);
    void *arg;
} fleet_sse;
void fleet_sse_init(fleet_sse *sse, void (*event)(void *arg, const char *data, size_t n),
                    void *arg);
void fleet_sse_release(fleet_sse *sse);
bool fleet_sse_feed(fleet_sse *sse, const uint8_t *bytes, size_t n); /* false: a line is too long */

#endif
