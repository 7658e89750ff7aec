#include "experiments/fleet/web.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define HEAD_BYTES 512

static void hang_up(fleet_web *w)
{
    if (w->open)
        close(w->fd);
    w->open = false;
    w->at = w->end = 0;
}

void fleet_web_release(fleet_web *w)
{
    hang_up(w);
}

static sh_status dial(fleet_web *w, uint16_t port, sh_error *err)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct timeval timeout = {.tv_sec = FLEET_WEB_TIMEOUT_S};
    int one = 1;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return sh_fail(err, SH_ERR_IO, "http: socket: %s", strerror(errno));
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
        sh_status status = sh_fail(err, SH_ERR_IO, "http: 127.0.0.1:%u: %s", port, strerror(errno));
        close(fd);
        return status;
    }
    w->fd = fd;
    w->open = w->fresh = true;
    w->port = port;
    w->at = w->end = 0;
    return SH_OK;
}

static bool send_all(fleet_web *w, const char *bytes, size_t n)
{
    while (n > 0) {
        ssize_t k = send(w->fd, bytes, n, MSG_NOSIGNAL);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return false;
        bytes += k;
        n -= (size_t)k;
    }
    return true;
}

static bool send_request(fleet_web *w, const fleet_web_request *r)
{
    char head[HEAD_BYTES];
    size_t n = r->body ? strlen(r->body) : 0;
    int k = snprintf(
        head, sizeof head, "%s %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n%sContent-Length: %zu\r\n\r\n",
        r->method, r->path, w->port, r->body ? "Content-Type: application/json\r\n" : "", n);
    return k > 0 && (size_t)k < sizeof head && send_all(w, head, (size_t)k) &&
           send_all(w, r->body ? r->body : "", n);
}

/* ---- reading ---- */

/* At least one byte in [at, end); SH_ERR_IO at the end of the connection. */
static sh_status fill(fleet_web *w, sh_error *err)
{
    if (w->at < w->end)
        return SH_OK;
    ssize_t n;
    do {
        n = recv(w->fd, w->in, sizeof w->in, 0);
    } while (n < 0 && errno == EINTR);
    if (n <= 0)
        return sh_fail(err, SH_ERR_IO, "http: 127.0.0.1:%u: %s", w->port,
                       n == 0 ? "the connection ended before the reply did" : strerror(errno));
    w->at = 0;
    w->end = (size_t)n;
    return SH_OK;
}

/* A line without its CR LF. */
static sh_status read_line(fleet_web *w, char *out, size_t out_bytes, sh_error *err)
{
    size_t n = 0;
    for (;;) {
        SH_TRY(fill(w, err));
        char c = (char)w->in[w->at++];
        if (c == '\n')
            break;
        if (n + 1 >= out_bytes)
            return sh_fail(err, SH_ERR_INVALID, "http: a line of the reply is too long");
        out[n++] = c;
    }
    if (n > 0 && out[n - 1] == '\r')
        n--;
    out[n] = 0;
    return SH_OK;
}

typedef struct {
    int code;
    bool chunked, has_length, close;
    size_t length;
} head;

static sh_status read_head(fleet_web *w, head *h, sh_error *err)
{
    char line[2048];
    size_t total = 0;
    *h = (head){0};
    SH_TRY(read_line(w, line, sizeof line, err));
    if (sscanf(line, "HTTP/1.%*1[01] %3d", &h->code) != 1)
        return sh_fail(err, SH_ERR_INVALID, "http: the reply is no HTTP/1.1");
    for (;;) {
        SH_TRY(read_line(w, line, sizeof line, err));
        total += strlen(line);
        if (line[0] == 0)
            return SH_OK;
        if (total > FLEET_WEB_HEADER_MAX)
            return sh_fail(err, SH_ERR_INVALID, "http: the reply's head is too long");
        char *value = strchr(line, ':');
        if (!value)
            continue;
        *value++ = 0;
        value += strspn(value, " \t");
        if (strcasecmp(line, "Content-Length") == 0) {
            h->has_length = true;
            h->length = (size_t)strtoull(value, NULL, 10);
        } else if (strcasecmp(line, "Transfer-Encoding") == 0) {
            h->chunked = strcasecmp(value, "chunked") == 0;
        } else if (strcasecmp(line, "Connection") == 0) {
            h->close = strcasecmp(value, "close") == 0;
        }
    }
}

/* n bytes of the body; *go_on turns false when the receiver has enough. */
static sh_status read_piece(fleet_web *w, size_t n, const fleet_web_request *r, bool *go_on,
                            sh_error *err)
{
    while (n > 0 && *go_on) {
        SH_TRY(fill(w, err));
        size_t take = SH_MIN(n, w->end - w->at);
        *go_on = !r->piece || r->piece(r->arg, w->in + w->at, take);
        w->at += take;
        n -= take;
    }
    return SH_OK;
}

static sh_status read_chunks(fleet_web *w, const fleet_web_request *r, bool *go_on, sh_error *err)
{
    char line[256], *end;
    for (size_t total = 0; *go_on;) {
        SH_TRY(read_line(w, line, sizeof line, err));
        size_t n = (size_t)strtoull(line, &end, 16);
        total += n;
        if (end == line || n > FLEET_WEB_BODY_MAX || total > FLEET_WEB_BODY_MAX)
            return sh_fail(err, SH_ERR_INVALID, "http: a chunk of the reply has no good length");
        SH_TRY(read_piece(w, n, r, go_on, err));
        if (*go_on)
            SH_TRY(read_line(w, line, sizeof line, err)); /* after a chunk, or the last one's end */
        if (n == 0)
            break;
    }
    return SH_OK;
}

static sh_status read_reply(fleet_web *w, const fleet_web_request *r, int *code, sh_error *err)
{
    head h;
    bool go_on = true;
    SH_TRY(read_head(w, &h, err));
    *code = h.code;
    w->fresh = false;
    if (h.chunked) {
        SH_TRY(read_chunks(w, r, &go_on, err));
    } else {
        if (!h.has_length || h.length > FLEET_WEB_BODY_MAX)
            return sh_fail(err, SH_ERR_INVALID, "http: the reply's body has no good length");
        SH_TRY(read_piece(w, h.length, r, &go_on, err));
    }
    if (h.close || !go_on)
        hang_up(w);
    return SH_OK;
}

sh_status fleet_web_call(fleet_web *w, uint16_t port, const fleet_web_request *r, int *code,
                         sh_error *err)
{
    *code = 0;
    if (w->open && w->port != port)
        hang_up(w);
    bool kept = w->open;
    for (int attempt = 0;; attempt++) {
        if (!w->open)
            SH_TRY(dial(w, port, err));
        sh_status status = send_request(w, r) ? read_reply(w, r, code, err)
                                              : sh_fail(err, SH_ERR_IO, "http: 127.0.0.1:%u: %s",
                                                        port, strerror(errno));
        if (status == SH_OK)
            return SH_OK;
        hang_up(w);
        if (!kept || attempt > 0 || *code != 0)
            return status;
    }
}

typedef struct {
    sh_buf *out;
    bool full;
} collector;

static bool collect(void *arg, const uint8_t *bytes, size_t n)
{
    collector *c = arg;
    c->full = sh_buf_append(c->out, bytes, n) != SH_OK;
    return !c->full;
}

sh_status fleet_web_get(fleet_web *w, uint16_t port, const fleet_web_request *request, int *code,
                        sh_buf *reply, sh_error *err)
{
    collector c = {.out = reply};
    fleet_web_request r = *request;
    r.piece = collect;
    r.arg = &c;
    sh_buf_clear(reply);
    SH_TRY(fleet_web_call(w, port, &r, code, err));
    char *end = c.full ? NULL : sh_buf_reserve(reply, 1);
    if (!end)
        return sh_fail(err, SH_ERR_LIMIT, "http: the reply is too long");
    *end = 0;
    return SH_OK;
}

/* ---- server-sent events ---- */

void fleet_sse_init(fleet_sse *sse, void (*event)(void *arg, const char *data, size_t n), void *arg)
{
    *sse = (fleet_sse){.event = event, .arg = arg};
    sh_buf_init(&sse->line, FLEET_WEB_BODY_MAX);
}

void fleet_sse_release(fleet_sse *sse)
{
    sh_buf_release(&sse->line);
}

static void end_line(fleet_sse *sse)
{
    static const char field[] = "data:";
    sh_buf *l = &sse->line;
    size_t n = l->len, at = sizeof field - 1;
    while (n > 0 && l->data[n - 1] == '\r')
        n--;
    if (n >= at && memcmp(l->data, field, at) == 0) {
        at += at < n && l->data[at] == ' ';
        sse->event(sse->arg, (const char *)l->data + at, n - at);
    }
    sh_buf_clear(l);
}

bool fleet_sse_feed(fleet_sse *sse, const uint8_t *bytes, size_t n)
{
    while (n > 0) {
        const uint8_t *end = memchr(bytes, '\n', n);
        size_t k = end ? (size_t)(end - bytes) : n;
        if (sh_buf_append(&sse->line, bytes, k) != SH_OK)
            return false;
        if (end)
            end_line(sse);
        k += end != NULL;
        bytes += k;
        n -= k;
    }
    return true;
}
