#include "shared/http/http_internal.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

void http_guard_init(http_guard *guard, const char *address, uint16_t port, const char *token)
{
    *guard = (http_guard){.n = 3, .default_port = port == 80, .token = token && *token};
    bool ip6 = strchr(address, ':') != NULL;
    snprintf(guard->names[0], sizeof guard->names[0], ip6 ? "[%s]:%u" : "%s:%u", address, port);
    snprintf(guard->names[1], sizeof guard->names[1], "localhost:%u", port);
    snprintf(guard->names[2], sizeof guard->names[2], "[::1]:%u", port);
    if (guard->token)
        guard->token_hash = sh_blake2b(token, strlen(token));
}

bool http_guard_host(const http_guard *guard, const char *host)
{
    if (!host)
        return false;
    for (size_t i = 0; i < guard->n; i++) {
        const char *name = guard->names[i];
        size_t bare = (size_t)(strrchr(name, ':') - name);
        if (!strcasecmp(host, name))
            return true;
        if (guard->default_port && strlen(host) == bare && !strncasecmp(host, name, bare))
            return true;
    }
    return false;
}

bool http_guard_origin(const http_guard *guard, const char *origin)
{
    if (!origin)
        return true;
    return !strncasecmp(origin, "http://", 7) && http_guard_host(guard, origin + 7);
}

bool http_guard_token(const http_guard *guard, const char *authorization)
{
    if (!guard->token)
        return true;
    if (!authorization || strncasecmp(authorization, "Bearer ", 7) != 0)
        return false;
    const char *token = authorization + 7;
    token += strspn(token, " ");
    sh_hash hash = sh_blake2b(token, strlen(token));
    return sh_bytes_equal(hash.b, guard->token_hash.b, sizeof hash.b);
}

bool http_is_json(const char *content_type)
{
    static const char want[] = "application/json";
    if (!content_type || strncasecmp(content_type, want, sizeof want - 1) != 0)
        return false;
    const char *rest = content_type + sizeof want - 1;
    rest += strspn(rest, " \t");
    return *rest == 0 || *rest == ';';
}

static bool path_matches(const char *pattern, const char *path, bool exact)
{
    size_t n = strlen(pattern);
    bool wild = n && pattern[n - 1] == '*';
    if (exact)
        return !wild && !strcmp(pattern, path);
    return wild && !strncmp(pattern, path, n - 1);
}

http_route_found http_route_find(const sh_http_options *options, const char *method,
                                 const char *path, const sh_http_route **out, char *allow,
                                 size_t allow_bytes)
{
    bool known = false;
    size_t used = 0;
    allow[0] = 0;
    for (int exact = 1; exact >= 0 && !known; exact--)
        for (size_t i = 0; i < options->n_routes; i++) {
            const sh_http_route *route = &options->routes[i];
            if (!path_matches(route->path, path, exact))
                continue;
            known = true;
            bool get = !strcmp(route->method, "GET");
            if (!strcmp(route->method, method) || (get && !strcmp(method, "HEAD"))) {
                *out = route;
                return HTTP_ROUTE_FOUND;
            }
            int n = snprintf(allow + used, allow_bytes - used, "%s%s%s", used ? ", " : "",
                             route->method, get ? ", HEAD" : "");
            if (n > 0 && used + (size_t)n < allow_bytes)
                used += (size_t)n;
        }
    return known ? HTTP_ROUTE_NO_METHOD : HTTP_ROUTE_NO_PATH;
}
