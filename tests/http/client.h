/*
 * A small HTTP client over a raw socket: it sends what it is given, right or wrong, and reads one
 * reply, whole or cut. Every wait ends after 60 s.
 */
#ifndef SH_TESTS_HTTP_CLIENT_H
#define SH_TESTS_HTTP_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CLIENT_BYTES_MAX (1u << 20)

typedef struct {
    int status; /* 0: no reply came */
    char *head; /* status line and headers */
    char *body; /* 0-terminated, chunks put together */
    size_t n;
    bool whole; /* body as long as announced; with its last chunk */
} client_reply;

int client_connect(uint16_t port); /* -1 when refused */
/* False when the other side has closed. */
bool client_send(int fd, const char *bytes, size_t n);
/* To a reply's end: by its length, its last chunk, or the connection's end. */
client_reply client_read(int fd, bool no_body);
void client_release(client_reply *reply);
/* Reads until the text was seen (true), or the end. Drops what it reads. */
bool client_wait_for(int fd, const char *text);
/* True when the other side closes within the wait; what comes before is dropped. */
bool client_wait_closed(int fd);

/* One request on a connection of its own. Host, Content-Type (with a body) and Content-Length are
 * added; more headers, each with its "\r\n", may be NULL. */
client_reply client_ask(uint16_t port, const char *method, const char *path, const char *headers,
                        const char *body);
/* The value of a header in a static buffer, or NULL. */
const char *client_header(const client_reply *reply, const char *name);

#endif
