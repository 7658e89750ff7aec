/*
 * What a request must be before a handler sees it: checks on strings alone, so that each can be
 * tested without a server.
 */
#ifndef SH_HTTP_INTERNAL_H
#define SH_HTTP_INTERNAL_H

#include "shared/base/hash.h"
#include "shared/http/http.h"

typedef struct {
    char names[3][64]; /* "127.0.0.1:8080", "localhost:8080", "[::1]:8080" */
    size_t n;
    bool default_port; /* 80: the port may be left out */
    bool token;
    sh_hash token_hash; /* compared instead of the token: equal lengths, constant time */
} http_guard;

/* address as inet_ntop writes it. */
void http_guard_init(http_guard *guard, const char *address, uint16_t port, const char *token);
/* The value of Host, NULL for none. */
bool http_guard_host(const http_guard *guard, const char *host);
/* The value of Origin, NULL for none, which is good. */
bool http_guard_origin(const http_guard *guard, const char *origin);
/* The value of Authorization, NULL for none. */
bool http_guard_token(const http_guard *guard, const char *authorization);
/* The value of Content-Type, NULL for none. */
bool http_is_json(const char *content_type);

typedef enum { HTTP_ROUTE_FOUND, HTTP_ROUTE_NO_PATH, HTTP_ROUTE_NO_METHOD } http_route_found;
/* allow [n]: the methods of the path, separated by ", ", where the method is not among them. */
http_route_found http_route_find(const sh_http_options *options, const char *method,
                                 const char *path, const sh_http_route **out, char *allow,
                                 size_t allow_bytes);

#endif
