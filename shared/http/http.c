/*
 * libmicrohttpd has a thread for listening and one a connection. Its own timeout knows only
 * silence: a client that sends a byte a second would never meet it, and a handler that computes for
 * long would. So it is off, and a thread of ours cuts the connection of a client that has been the
 * one to wait for (connection.waits) for too long. The request's state:
 *
 *     headers, body   the client is waited for, each at most timeout_s
 *     handler, next   we are: no limit here
 *     the reply       the client is: at most timeout_s for all of it, or from piece to piece
 *     between two     the client is
 *
 * Ownership: a connection lives from MHD's "started" to its "closed", which comes before its socket
 * is closed: within it the socket may be shut down. An exchange lives from its headers to MHD's
 * "completed"; a stream belongs to MHD's response, which may outlive both.
 */
#include "shared/base/clock.h"
#include "shared/base/log.h"
#include "shared/http/http_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    HTTP_RESERVE = 8,      /* connections past the limit that are told so; more are closed */
    HTTP_DRAIN_FACTOR = 4, /* bodies of the limit that are read away before a refusal */
    HTTP_PIECE_BYTES = 16 << 10,
    HTTP_ALLOW_BYTES = 64,
};

typedef struct connection connection;
struct connection {
    connection *before, *after;
    int socket;
    bool waits; /* for the client, since since_ms */
    bool over;  /* past the limit */
    uint64_t since_ms;
};

struct sh_http {
    sh_http_options options;
    http_guard guard;
    uint16_t port;
    struct MHD_Daemon *daemon;
    pthread_t watch;
    bool watching;
    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t changed;
    connection *connections;
    uint32_t n_connections;
    uint32_t n_active; /* exchanges */
    bool stopping, stop_watch;
};

typedef struct {
    sh_http *server;
    connection *connection;
    const sh_http_route *route;
    sh_buf body;
    size_t body_bytes; /* that came, kept or not */
    sh_http_reply reply;
    bool refused; /* reply is an error already: the rest of the body is read away */
    char allow[HTTP_ALLOW_BYTES];
} exchange;

typedef struct { /* what MHD reads a streamed reply from */
    sh_http *server;
    connection *connection;
    sh_http_reply reply;
    sh_buf piece;
    size_t sent; /* of piece */
    bool done;
} stream;

/* ---------------------------------------------------------------- connections */

static void connection_waits(sh_http *server, connection *c, bool waits)
{
    pthread_mutex_lock(&server->lock);
    c->waits = waits;
    c->since_ms = sh_clock_mono_ms();
    pthread_mutex_unlock(&server->lock);
}

static void connection_open(sh_http *server, struct MHD_Connection *mhd, void **context)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_CONNECTION_FD);
    connection *c = sh_calloc(1, sizeof *c);
    *context = c;
    if (!c || !info) {
        free(c);
        *context = NULL; /* its requests are refused: no limit would hold for them */
        return;
    }
    c->socket = info->connect_fd;
    c->waits = true;
    c->since_ms = sh_clock_mono_ms();
    pthread_mutex_lock(&server->lock);
    c->over = server->n_connections >= server->options.connections_max;
    c->after = server->connections;
    if (c->after)
        c->after->before = c;
    server->connections = c;
    if (server->n_connections++ == 0)
        pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

static void connection_close(sh_http *server, connection *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&server->lock);
    *(c->before ? &c->before->after : &server->connections) = c->after;
    if (c->after)
        c->after->before = c->before;
    server->n_connections--;
    pthread_mutex_unlock(&server->lock);
    free(c);
}

static void on_connection(void *arg, struct MHD_Connection *mhd, void **context,
                          enum MHD_ConnectionNotificationCode code)
{
    if (code == MHD_CONNECTION_NOTIFY_STARTED)
        connection_open(arg, mhd, context);
    else
        connection_close(arg, *context);
}

/* Cuts whom we waited for too long, and says how long until the next one's time is up. */
static uint64_t watch_once(sh_http *server)
{
    uint64_t limit = (uint64_t)server->options.timeout_s * 1000, next = limit;
    uint64_t now = sh_clock_mono_ms();
    for (connection *c = server->connections; c; c = c->after) {
        if (!c->waits)
            continue;
        uint64_t waited = now - c->since_ms;
        if (waited >= limit) {
            shutdown(c->socket, SHUT_RDWR); /* its thread wakes up and ends it */
            c->waits = false;
            sh_log(SH_LOG_DEBUG, "http_timeout", "waited_ms=%llu", (unsigned long long)waited);
        } else {
            next = SH_MIN(next, limit - waited);
        }
    }
    return next;
}

static void *watch(void *arg)
{
    sh_http *server = arg;
    pthread_mutex_lock(&server->lock);
    while (!server->stop_watch) {
        if (!server->connections) {
            pthread_cond_wait(&server->changed, &server->lock);
            continue;
        }
        /* Whoever is waited for from now on has more time than this sleep takes. */
        uint64_t until = sh_clock_mono_ms() + watch_once(server) + 1;
        struct timespec t = {.tv_sec = (time_t)(until / 1000),
                             .tv_nsec = (long)(until % 1000) * 1000000};
        pthread_cond_timedwait(&server->changed, &server->lock, &t);
    }
    pthread_mutex_unlock(&server->lock);
    return NULL;
}

/* ---------------------------------------------------------------- replies */

static ssize_t stream_read(void *arg, uint64_t position, char *out, size_t max)
{
    (void)position;
    stream *s = arg;
    connection_waits(s->server, s->connection, false);
    while (s->sent == s->piece.len && !s->done) {
        sh_buf_clear(&s->piece);
        s->sent = 0;
        if (s->reply.next(s->reply.arg, &s->piece, &s->done) != SH_OK)
            return MHD_CONTENT_READER_END_WITH_ERROR;
    }
    connection_waits(s->server, s->connection, true);
    size_t n = SH_MIN(max, s->piece.len - s->sent);
    if (!n)
        return MHD_CONTENT_READER_END_OF_STREAM;
    memcpy(out, s->piece.data + s->sent, n);
    s->sent += n;
    return (ssize_t)n;
}

static void reply_release(sh_http_reply *reply)
{
    if (reply->release)
        reply->release(reply->arg);
    reply->release = NULL;
    sh_buf_release(&reply->body);
}

static void stream_free(void *arg)
{
    stream *s = arg;
    reply_release(&s->reply);
    sh_buf_release(&s->piece);
    free(s);
}

/* The reply goes to MHD's response, or stays where it was. */
static struct MHD_Response *make_stream(exchange *e)
{
    stream *s = sh_calloc(1, sizeof *s);
    if (!s)
        return NULL;
    struct MHD_Response *response = MHD_create_response_from_callback(
        MHD_SIZE_UNKNOWN, HTTP_PIECE_BYTES, stream_read, s, stream_free);
    if (!response) {
        free(s);
        return NULL;
    }
    s->server = e->server;
    s->connection = e->connection;
    s->reply = e->reply;
    sh_buf_init(&s->piece, SH_HTTP_REPLY_MAX);
    e->reply = (sh_http_reply){0};
    sh_buf_init(&e->reply.body, SH_HTTP_REPLY_MAX);
    return response;
}

static bool add_headers(struct MHD_Response *response, const exchange *e, int status,
                        uint32_t retry_after_s, const char *content_type)
{
    char seconds[16];
    bool ok = MHD_add_response_header(response, "Content-Type",
                                      content_type ? content_type : "application/json") &&
              MHD_add_response_header(response, "Cache-Control", "no-store") &&
              MHD_add_response_header(response, "X-Content-Type-Options", "nosniff");
    if (retry_after_s) {
        snprintf(seconds, sizeof seconds, "%u", retry_after_s);
        ok = ok && MHD_add_response_header(response, "Retry-After", seconds);
    }
    if (status == 401)
        ok = ok && MHD_add_response_header(response, "WWW-Authenticate", "Bearer");
    if (status == 405)
        ok = ok && MHD_add_response_header(response, "Allow", e->allow);
    return ok;
}

/* MHD_NO, which closes the connection, when memory is out. */
static enum MHD_Result send_reply(exchange *e, struct MHD_Connection *mhd)
{
    sh_http_reply *reply = &e->reply;
    int status = reply->status ? reply->status : 200;
    uint32_t retry_after_s = reply->retry_after_s;
    const char *type = reply->content_type;
    struct MHD_Response *response =
        reply->next ? make_stream(e)
                    : MHD_create_response_from_buffer(reply->body.len, reply->body.data,
                                                      MHD_RESPMEM_MUST_COPY);
    if (!response)
        return MHD_NO;
    enum MHD_Result result = MHD_NO;
    if (add_headers(response, e, status, retry_after_s, type))
        result = MHD_queue_response(mhd, (unsigned)status, response);
    MHD_destroy_response(response);
    connection_waits(e->server, e->connection, true);
    return result;
}

/* ---------------------------------------------------------------- requests */

typedef struct {
    const char *name, *value;
    size_t n; /* how often it is there */
} header;

static enum MHD_Result count_header(void *arg, enum MHD_ValueKind kind, const char *name,
                                    const char *value)
{
    (void)kind;
    header *h = arg;
    if (!strcasecmp(name, h->name)) {
        h->value = value;
        h->n++;
    }
    return MHD_YES;
}

static header get_header(struct MHD_Connection *mhd, const char *name)
{
    header h = {.name = name};
    MHD_get_connection_values(mhd, MHD_HEADER_KIND, count_header, &h);
    return h;
}

static void refuse(exchange *e, int status, const char *type, const char *code, const char *text)
{
    sh_http_fail(&e->reply, status, type, NULL, code, "%s", text);
    e->refused = true;
}

/* Who asks, and whether for something that we have. */
static void check_caller(exchange *e, struct MHD_Connection *mhd, const char *path,
                         const char *method)
{
    sh_http *server = e->server;
    header host = get_header(mhd, "Host"), origin = get_header(mhd, "Origin");
    header authorization = get_header(mhd, "Authorization");
    const char *invalid = "invalid_request_error";
    http_route_found found =
        http_route_find(&server->options, method, path, &e->route, e->allow, sizeof e->allow);
    bool open = found == HTTP_ROUTE_FOUND && e->route->open;

    if (host.n != 1 || !http_guard_host(&server->guard, host.value))
        refuse(e, 403, invalid, "forbidden_host",
               "Host is not this server: use the address and port that it listens on");
    else if (origin.n > 1 || !http_guard_origin(&server->guard, origin.value))
        refuse(e, 403, invalid, "forbidden_origin",
               "Origin is another site: pages of others may not use this server");
    else if (e->connection->over && !open)
        refuse(e, 503, "overloaded_error", "connections",
               "too many connections: close idle ones, or try again later");
    else if (!open &&
             (authorization.n > 1 || !http_guard_token(&server->guard, authorization.value)))
        refuse(e, 401, "authentication_error", "invalid_api_key",
               "a token is needed: send \"Authorization: Bearer TOKEN\" with the one configured");
    else if (found == HTTP_ROUTE_NO_PATH)
        refuse(e, 404, "not_found_error", "unknown_url", "no such path: docs/api.md lists them");
    else if (found == HTTP_ROUTE_NO_METHOD)
        refuse(e, 405, invalid, "method_not_allowed",
               "this path takes another method: the Allow header lists them");
    if (e->reply.status == 503)
        e->reply.retry_after_s = 1;
}

/* What its headers say of the body; *declared is 0 for a chunked one. */
static void check_body(exchange *e, struct MHD_Connection *mhd, const char *method,
                       size_t *declared)
{
    header length = get_header(mhd, "Content-Length");
    header coding = get_header(mhd, "Transfer-Encoding");
    header type = get_header(mhd, "Content-Type");
    unsigned long long n = length.value ? strtoull(length.value, NULL, 10) : 0;
    *declared = n > SIZE_MAX ? SIZE_MAX : (size_t)n;

    if (length.n + coding.n > 1 || (coding.n && strcasecmp(coding.value, "chunked") != 0)) {
        refuse(e, 400, "invalid_request_error", "bad_length",
               "the length of the body is unclear: send one Content-Length, or chunks");
        *declared = SIZE_MAX;
    } else if (!e->refused && !strcmp(method, "POST") &&
               (type.n != 1 || !http_is_json(type.value))) {
        refuse(e, 415, "invalid_request_error", "unsupported_media_type",
               "the body must be JSON: send Content-Type: application/json");
    } else if (!e->refused && *declared > e->server->options.body_max) {
        refuse(e, 413, "invalid_request_error", "body_too_large", "the body is too large");
    }
}

static exchange *exchange_new(sh_http *server, struct MHD_Connection *mhd)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(mhd, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    exchange *e = info && info->socket_context ? sh_calloc(1, sizeof *e) : NULL;
    if (!e)
        return NULL;
    e->server = server;
    e->connection = info->socket_context;
    sh_buf_init(&e->body, server->options.body_max + 1);
    sh_buf_init(&e->reply.body, SH_HTTP_REPLY_MAX);
    pthread_mutex_lock(&server->lock);
    server->n_active++;
    pthread_mutex_unlock(&server->lock);
    return e;
}

/* The headers are there. A refusal waits until the body is read away, or the client would see a
 * broken connection instead of it; but not for a very long one, or one that waits for our word. */
static enum MHD_Result on_headers(exchange *e, struct MHD_Connection *mhd, const char *path,
                                  const char *method)
{
    size_t declared = 0;
    connection_waits(e->server, e->connection, true);
    check_caller(e, mhd, path, method);
    check_body(e, mhd, method, &declared);
    bool long_body = declared / HTTP_DRAIN_FACTOR > e->server->options.body_max;
    if (e->refused && (long_body || get_header(mhd, "Expect").n))
        return send_reply(e, mhd);
    return MHD_YES;
}

static enum MHD_Result on_body(exchange *e, const char *bytes, size_t n)
{
    size_t max = e->server->options.body_max;
    e->body_bytes += n;
    if (e->body_bytes / HTTP_DRAIN_FACTOR > max)
        return MHD_NO;
    if (e->refused)
        return MHD_YES;
    if (e->body_bytes > max)
        refuse(e, 413, "invalid_request_error", "body_too_large", "the body is too large");
    else if (sh_buf_append(&e->body, bytes, n) != SH_OK)
        refuse(e, 503, "overloaded_error", "memory", "no memory for the body: try again later");
    return MHD_YES;
}

static enum MHD_Result on_whole(exchange *e, struct MHD_Connection *mhd, const char *path,
                                const char *method)
{
    sh_http *server = e->server;
    connection_waits(server, e->connection, false);
    pthread_mutex_lock(&server->lock);
    bool stopping = server->stopping;
    pthread_mutex_unlock(&server->lock);
    if (!e->refused && stopping) {
        refuse(e, 503, "overloaded_error", "stopping", "the server stops");
    } else if (!e->refused && sh_buf_append(&e->body, "", 1) != SH_OK) {
        refuse(e, 503, "overloaded_error", "memory", "no memory for the body: try again later");
    } else if (!e->refused) {
        sh_http_request request = {.method = method,
                                   .path = path,
                                   .body = e->body.data,
                                   .n = e->body.len - 1,
                                   .server = mhd,
                                   .client = e->connection};
        e->route->handle(server->options.arg, &request, &e->reply);
    }
    sh_log(SH_LOG_DEBUG, "http", "route=%s status=%d", e->route ? e->route->path : "none",
           e->reply.status ? e->reply.status : 200);
    return send_reply(e, mhd);
}

static enum MHD_Result on_request(void *arg, struct MHD_Connection *mhd, const char *path,
                                  const char *method, const char *version, const char *bytes,
                                  size_t *n, void **context)
{
    (void)version;
    exchange *e = *context;
    if (!e) {
        e = exchange_new(arg, mhd);
        *context = e;
        return e ? on_headers(e, mhd, path, method) : MHD_NO;
    }
    if (*n) {
        enum MHD_Result result = on_body(e, bytes, *n);
        *n = 0;
        return result;
    }
    return on_whole(e, mhd, path, method);
}

static void on_completed(void *arg, struct MHD_Connection *mhd, void **context,
                         enum MHD_RequestTerminationCode code)
{
    (void)mhd;
    (void)code;
    sh_http *server = arg;
    exchange *e = *context;
    if (!e)
        return;
    *context = NULL;
    connection_waits(server, e->connection, true);
    reply_release(&e->reply);
    sh_buf_release(&e->body);
    free(e);
    pthread_mutex_lock(&server->lock);
    if (--server->n_active == 0)
        pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

const char *sh_http_request_query(const sh_http_request *request, const char *name)
{
    return MHD_lookup_connection_value(request->server, MHD_GET_ARGUMENT_KIND, name);
}

bool sh_http_client_gone(const void *client)
{
    const connection *c = client;
    if (!c)
        return false;
    struct pollfd fd = {.fd = c->socket, .events = POLLRDHUP};
    return poll(&fd, 1, 0) > 0 && (fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

/* The format alone: its arguments may be a client's. */
__attribute__((format(printf, 2, 0))) static void on_log(void *arg, const char *format,
                                                         va_list args)
{
    (void)arg;
    (void)args;
    sh_log(SH_LOG_DEBUG, "microhttpd", "text=\"%.*s\"", (int)strcspn(format, "\n"), format);
}

/* ---------------------------------------------------------------- the server */

typedef struct {
    struct sockaddr_storage bytes;
    socklen_t n;
    char text[INET6_ADDRSTRLEN];
} endpoint;

static sh_status parse_address(const sh_http_options *options, endpoint *out, sh_error *err)
{
    struct sockaddr_in *ip4 = (struct sockaddr_in *)&out->bytes;
    struct sockaddr_in6 *ip6 = (struct sockaddr_in6 *)&out->bytes;
    const char *text = options->address ? options->address : "127.0.0.1";
    bool loopback = false;
    memset(out, 0, sizeof *out);
    if (inet_pton(AF_INET, text, &ip4->sin_addr) == 1) {
        ip4->sin_family = AF_INET;
        ip4->sin_port = htons(options->port);
        out->n = sizeof *ip4;
        loopback = ntohl(ip4->sin_addr.s_addr) >> 24 == 127;
        inet_ntop(AF_INET, &ip4->sin_addr, out->text, sizeof out->text);
    } else if (inet_pton(AF_INET6, text, &ip6->sin6_addr) == 1) {
        ip6->sin6_family = AF_INET6;
        ip6->sin6_port = htons(options->port);
        out->n = sizeof *ip6;
        loopback = IN6_IS_ADDR_LOOPBACK(&ip6->sin6_addr);
        inet_ntop(AF_INET6, &ip6->sin6_addr, out->text, sizeof out->text);
    }
    if (!loopback)
        return sh_fail(err, SH_ERR_USAGE,
                       "HTTP address '%s': it must be of this machine alone, 127.0.0.1 or ::1",
                       text);
    return SH_OK;
}

/* A socket that listens. Ours, not MHD's, because it tells why it could not and on which port. */
static sh_status listen_at(endpoint *at, uint16_t *port, int *out, sh_error *err)
{
    sh_status status = SH_OK;
    int fd = socket(at->bytes.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int on = 1;
    if (fd < 0)
        return sh_fail(err, SH_ERR_IO, "HTTP socket: %s", strerror(errno));
    /* A port whose last connections are still fading is free; one that is listened on is not. */
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
        bind(fd, (struct sockaddr *)&at->bytes, at->n) != 0 || listen(fd, SOMAXCONN) != 0 ||
        getsockname(fd, (struct sockaddr *)&at->bytes, &at->n) != 0) {
        status = errno == EADDRINUSE
                     ? sh_fail(err, SH_ERR_EXISTS,
                               "HTTP port %u of %s is in use: stop the other program, or "
                               "configure another port",
                               *port, at->text)
                     : sh_fail(err, SH_ERR_IO, "HTTP port %u of %s: %s", *port, at->text,
                               strerror(errno));
        close(fd);
        return status;
    }
    *port = ntohs(at->bytes.ss_family == AF_INET ? ((struct sockaddr_in *)&at->bytes)->sin_port
                                                 : ((struct sockaddr_in6 *)&at->bytes)->sin6_port);
    *out = fd;
    return SH_OK;
}

/* The threads begin with all signals blocked: a signal is for the program's own threads. */
static sh_status start_threads(sh_http *server, int fd, sh_error *err)
{
    sh_status status = SH_OK;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    server->watching = pthread_create(&server->watch, NULL, watch, server) == 0;
    if (server->watching)
        server->daemon = MHD_start_daemon(
            MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL |
                MHD_USE_ITC | MHD_USE_ERROR_LOG,
            0, NULL, NULL, on_request, server, MHD_OPTION_EXTERNAL_LOGGER, on_log, NULL,
            MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_CONNECTION_LIMIT,
            (unsigned)(server->options.connections_max + HTTP_RESERVE),
            MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)SH_HTTP_HEAD_MAX,
            MHD_OPTION_CONNECTION_TIMEOUT, 0u, MHD_OPTION_NOTIFY_COMPLETED, on_completed, server,
            MHD_OPTION_NOTIFY_CONNECTION, on_connection, server, MHD_OPTION_END);
    if (!server->daemon)
        status = sh_fail(err, SH_ERR_IO, "HTTP server: cannot start its threads");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

static void stop_watch(sh_http *server)
{
    if (!server->watching)
        return;
    pthread_mutex_lock(&server->lock);
    server->stop_watch = true;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
    pthread_join(server->watch, NULL);
}

static void server_free(sh_http *server)
{
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

sh_status sh_http_create(const sh_http_options *options, sh_http **out, sh_error *err)
{
    endpoint at;
    int fd = -1;
    uint16_t port = options->port;
    SH_TRY(sh_crypto_init(err));
    SH_TRY(parse_address(options, &at, err));
    SH_TRY(listen_at(&at, &port, &fd, err));
    sh_http *server = sh_calloc(1, sizeof *server);
    if (!server) {
        close(fd);
        return sh_fail(err, SH_ERR_NO_MEMORY, "HTTP server: out of memory");
    }
    server->options = *options;
    sh_http_options *o = &server->options;
    o->connections_max = o->connections_max ? o->connections_max : SH_HTTP_CONNECTIONS_DEFAULT;
    o->body_max = o->body_max ? o->body_max : SH_HTTP_BODY_DEFAULT;
    o->timeout_s = o->timeout_s ? o->timeout_s : SH_HTTP_TIMEOUT_DEFAULT_S;
    server->port = port;
    http_guard_init(&server->guard, at.text, port, options->token);
    o->address = o->token = NULL; /* the caller's memory; what was needed of it is in the guard */

    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->changed, &clock);
    pthread_condattr_destroy(&clock);
    sh_status status = start_threads(server, fd, err);
    if (status != SH_OK) {
        stop_watch(server);
        close(fd);
        server_free(server);
        return status;
    }
    *out = server;
    return SH_OK;
}

void sh_http_destroy(sh_http **http)
{
    sh_http *server = *http;
    if (!server)
        return;
    *http = NULL;
    MHD_socket listening = MHD_quiesce_daemon(server->daemon);
    if (listening != MHD_INVALID_SOCKET)
        close(listening);

    uint64_t until = sh_clock_mono_ms() + SH_HTTP_STOP_MS;
    struct timespec t = {.tv_sec = (time_t)(until / 1000),
                         .tv_nsec = (long)(until % 1000) * 1000000};
    pthread_mutex_lock(&server->lock);
    server->stopping = true;
    while (server->n_active && sh_clock_mono_ms() < until)
        pthread_cond_timedwait(&server->changed, &server->lock, &t);
    pthread_mutex_unlock(&server->lock);

    MHD_stop_daemon(server->daemon);
    stop_watch(server);
    server_free(server);
}

uint16_t sh_http_port(const sh_http *http)
{
    return http->port;
}
