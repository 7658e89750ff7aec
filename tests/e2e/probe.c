#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/probe.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "tests/http/client.h"

#define FILE_MAX ((size_t)1 << 30)

static uint64_t memory_of(pid_t pid, const char *name)
{
    char path[64], line[256];
    unsigned long long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        if (strncmp(line, name, strlen(name)) == 0 &&
            sscanf(line + strlen(name), ": %llu kB", &kib) == 1)
            break;
    fclose(f);
    assert_true(kib > 0);
    return (uint64_t)kib << 10;
}

uint64_t probe_rss(pid_t pid)
{
    return memory_of(pid, "VmRSS");
}

uint64_t probe_peak(pid_t pid)
{
    return memory_of(pid, "VmHWM");
}

bool probe_is_sanitized(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
    return true;
#else
    return false;
#endif
#else
    return false;
#endif
}

double probe_metric(const char *page, const char *name)
{
    size_t n = strlen(name);
    for (const char *line = page; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, n) == 0 && line[n] == ' ')
            return strtod(line + n, NULL);
    }
    return -1;
}

/* ---- HTTP ---- */

int probe_ask(unsigned port, const char *method, const char *path, const char *body, char *out,
              size_t out_bytes)
{
    client_reply reply = client_ask((uint16_t)port, method, path, NULL, body);
    int status = reply.whole ? reply.status : 0;
    if (out)
        snprintf(out, out_bytes, "%s", reply.body ? reply.body : "");
    client_release(&reply);
    return status;
}

void probe_complete(unsigned port, const char *prompt, const char *user, char *id)
{
    char body[1024], answer[8192];
    snprintf(body, sizeof body,
             "{\"prompt\": \"%s\", \"max_tokens\": 4, \"temperature\": 0, \"user\": \"%s\"}",
             prompt, user);
    int status = probe_ask(port, "POST", "/v1/completions", body, answer, sizeof answer);
    const char *at = strstr(answer, "\"cmpl-");
    if (status != 200 || !at || sscanf(at, "\"%63[^\"]", id) != 1)
        fail_msg("completion: status %d: %s", status, answer);
}

int probe_feedback(unsigned port, const char *id, const char *action, const char *text)
{
    size_t n = (text ? strlen(text) : 0) + 256;
    char *body = malloc(n);
    assert_non_null(body);
    snprintf(body, n, "{\"id\": \"%s\", \"action\": \"%s\"%s%s%s}", id, action,
             text ? ", \"text\": \"" : "", text ? text : "", text ? "\"" : "");
    int status = probe_ask(port, "POST", "/v1/feedback", body, NULL, 0);
    free(body);
    return status;
}

/* ---- files ---- */

static struct {
    const void *bytes;
    size_t n, found, used, where_bytes;
    char *where;
} search;

static int look(const char *path, const struct stat *info, int kind, struct FTW *place)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_error err = {0};
    (void)info, (void)place;
    /* A file that went meanwhile has nothing any more. */
    if (kind != FTW_F || !S_ISREG(info->st_mode) ||
        sh_file_read(path, FILE_MAX, &bytes, &n, &err) != SH_OK)
        return 0;
    if (memmem(bytes, n, search.bytes, search.n)) {
        search.found++;
        if (search.used < search.where_bytes)
            search.used += (size_t)snprintf(search.where + search.used,
                                            search.where_bytes - search.used, " %s", path);
    }
    free(bytes);
    return 0;
}

size_t probe_files_with(const char *dir, const void *bytes, size_t n, char *where,
                        size_t where_bytes)
{
    memset(&search, 0, sizeof search);
    search.bytes = bytes;
    search.n = n;
    search.where = where;
    search.where_bytes = where ? where_bytes : 0;
    if (where)
        where[0] = 0;
    assert_int_equal(nftw(dir, look, 8, FTW_PHYS), 0);
    return search.found;
}
