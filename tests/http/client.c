#include "tests/http/client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

int client_connect(uint16_t port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct timeval wait = {.tv_sec = 60};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
    if (connect(fd, (struct sockaddr *)&at, sizeof at) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

bool client_send(int fd, const char *bytes, size_t n)
{
    while (n) {
        ssize_t sent = send(fd, bytes, n, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        bytes += sent;
        n -= (size_t)sent;
    }
    return true;
}

static bool read_byte(int fd, char *out)
{
    return recv(fd, out, 1, 0) == 1;
}

/* Up to and with "\r\n", which is cut off. */
static bool read_line(int fd, char *out, size_t max)
{
    size_t n = 0;
    while (n + 1 < max && read_byte(fd, out + n)) {
        if (out[n] == '\n') {
            out[n && out[n - 1] == '\r' ? n - 1 : n] = 0;
            return true;
        }
        n++;
    }
    out[n] = 0;
    return false;
}

static bool read_bytes(int fd, client_reply *reply, size_t n)
{
    while (n && reply->n < CLIENT_BYTES_MAX) {
        ssize_t got = recv(fd, reply->body + reply->n, n, 0);
        if (got <= 0)
            return false;
        reply->n += (size_t)got;
        n -= (size_t)got;
    }
    return n == 0;
}

static bool read_chunks(int fd, client_reply *reply)
{
    char line[64];
    while (read_line(fd, line, sizeof line)) {
        size_t n = strtoul(line, NULL, 16);
        if (!n)
            return read_line(fd, line, sizeof line);
        if (n > CLIENT_BYTES_MAX - reply->n || !read_bytes(fd, reply, n) ||
            !read_line(fd, line, sizeof line))
            return false;
    }
    return false;
}

client_reply client_read(int fd, bool no_body)
{
    client_reply reply = {.head = calloc(1, CLIENT_BYTES_MAX + 1),
                          .body = calloc(1, CLIENT_BYTES_MAX + 1)};
    size_t n = 0;
    while (n < CLIENT_BYTES_MAX && read_byte(fd, reply.head + n)) {
        n++;
        if (n >= 4 && !memcmp(reply.head + n - 4, "\r\n\r\n", 4))
            break;
    }
    if (sscanf(reply.head, "HTTP/1.%*d %d", &reply.status) != 1)
        return reply;
    const char *coding = client_header(&reply, "Transfer-Encoding"), *length;
    if (no_body)
        reply.whole = true;
    else if (coding)
        reply.whole = read_chunks(fd, &reply);
    else if ((length = client_header(&reply, "Content-Length")) != NULL)
        reply.whole = read_bytes(fd, &reply, strtoul(length, NULL, 10));
    else
        reply.whole = !read_bytes(fd, &reply, CLIENT_BYTES_MAX);
    return reply;
}

void client_release(client_reply *reply)
{
    free(reply->head);
    free(reply->body);
    *reply = (client_reply){0};
}

bool client_wait_for(int fd, const char *text)
{
    char window[256] = {0};
    size_t n = strlen(text);
    while (n < sizeof window) {
        memmove(window, window + 1, sizeof window - 1);
        if (!read_byte(fd, window + sizeof window - 1))
            return false;
        if (!memcmp(window + sizeof window - n, text, n))
            return true;
    }
    return false;
}

bool client_wait_closed(int fd)
{
    char dropped[4096];
    ssize_t n;
    while ((n = recv(fd, dropped, sizeof dropped, 0)) > 0) {
    }
    return n == 0 || errno == ECONNRESET;
}

client_reply client_ask(uint16_t port, const char *method, const char *path, const char *headers,
                        const char *body)
{
    size_t max = strlen(path) + (headers ? strlen(headers) : 0) + (body ? strlen(body) : 0) + 512;
    char *text = malloc(max);
    int n = snprintf(text, max, "%s %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n%s", method, path, port,
                     headers ? headers : "");
    if (body)
        n += snprintf(text + n, max - (size_t)n,
                      "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
    n += snprintf(text + n, max - (size_t)n, "\r\n%s", body ? body : "");
    client_reply reply = {0};
    int fd = client_connect(port);
    if (fd >= 0 && client_send(fd, text, (size_t)n))
        reply = client_read(fd, !strcmp(method, "HEAD"));
    if (fd >= 0)
        close(fd);
    free(text);
    return reply;
}

const char *client_header(const client_reply *reply, const char *name)
{
    static _Thread_local char value[512];
    size_t n = strlen(name);
    for (const char *line = reply->head; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (!strncasecmp(line, name, n) && line[n] == ':') {
            const char *at = line + n + 1;
            while (*at == ' ')
                at++;
            snprintf(value, sizeof value, "%.*s", (int)strcspn(at, "\r\n"), at);
            return value;
        }
    }
    return NULL;
}
