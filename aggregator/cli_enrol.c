/* Files that `shoal aggregator enrol --file` reads: a key and a name a line. */
#include "aggregator/cli_enrol.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "shared/base/file.h"

#define LIST_BYTES_MAX (32u << 20)

typedef struct {
    sh_hash key;
    size_t line;
} listed;

static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    size_t n = strlen(text);
    while (n > 0 && isspace((unsigned char)text[n - 1]))
        text[--n] = '\0';
    return text;
}

static sh_status read_line(char *text, listed *out, json_t *nodes, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    size_t n = strcspn(text, " \t,");
    if (n != sizeof hex - 1)
        return sh_fail(err, SH_ERR_INVALID, "a key has 64 hexadecimal digits, not %zu", n);
    memcpy(hex, text, n);
    hex[n] = '\0';
    if (sh_hash_parse(hex, &out->key, NULL) != SH_OK || sh_hash_is_zero(&out->key))
        return sh_fail(err, SH_ERR_INVALID, "'%s' is no key of 64 hexadecimal digits", hex);
    char *name = trim(text + n + (text[n] == ','));
    for (const char *p = name; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            return sh_fail(err, SH_ERR_INVALID, "the name has a control character");
    if (strlen(name) > SH_NODE_NAME_MAX)
        return sh_fail(err, SH_ERR_INVALID, "the name has %zu bytes, at most %d may be",
                       strlen(name), SH_NODE_NAME_MAX);
    json_t *node = json_object();
    sh_json_set(node, "key", json_string(hex));
    if (name[0] != '\0') {
        json_t *value = json_string(name);
        if (value == NULL) {
            json_decref(node);
            return sh_fail(err, SH_ERR_INVALID, "the name is no UTF-8");
        }
        sh_json_set(node, "name", value);
    }
    json_array_append_new(nodes, node);
    return SH_OK;
}

static int compare(const void *a, const void *b)
{
    const listed *x = a, *y = b;
    int c = memcmp(&x->key, &y->key, sizeof x->key);
    return c != 0 ? c : (x->line > y->line) - (x->line < y->line);
}

static sh_status check_twice(listed *all, size_t n, sh_error *err)
{
    if (n > 0)
        qsort(all, n, sizeof *all, compare);
    for (size_t i = 1; i < n; i++)
        if (sh_hash_equal(&all[i].key, &all[i - 1].key))
            return sh_fail(err, SH_ERR_INVALID, "lines %zu and %zu have the same key",
                           all[i - 1].line, all[i].line);
    return SH_OK;
}

static sh_status read_lines(char *text, json_t *nodes, sh_error *err)
{
    listed *all = NULL;
    size_t n = 0, cap = 0, line = 0;
    sh_status status = SH_OK;
    for (char *next = text; next != NULL;) {
        char *here = next, *end = strchr(here, '\n');
        next = end == NULL ? NULL : end + 1;
        if (end != NULL)
            *end = '\0';
        line++;
        here = trim(here);
        if (here[0] == '\0' || here[0] == '#')
            continue;
        if (sh_array_reserve((void **)&all, &cap, n + 1, sizeof *all, SH_COORD_NODES_MAX) != SH_OK)
            SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "more than %u keys", SH_COORD_NODES_MAX));
        status = read_line(here, &all[n], nodes, err);
        if (status != SH_OK) {
            (void)sh_fail_in(err, "line %zu", line);
            goto cleanup;
        }
        all[n++].line = line;
    }
    SH_GOTO(check_twice(all, n, err));
    if (n == 0)
        status = sh_fail(err, SH_ERR_INVALID, "no key is in it");
cleanup:
    free(all);
    return status;
}

sh_status sh_cli_read_keys(const char *path, json_t **out, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, LIST_BYTES_MAX, &bytes, &n, err));
    json_t *nodes = json_array();
    char *text = sh_calloc(n + 1, 1);
    sh_status status = SH_OK;
    if (text == NULL || nodes == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory for the list", path);
    } else {
        memcpy(text, bytes, n);
        if (strlen(text) != n)
            status = sh_fail(err, SH_ERR_INVALID, "it is no text");
        else
            status = read_lines(text, nodes, err);
        if (status != SH_OK)
            (void)sh_fail_in(err, "%s", path);
    }
    free(text);
    free(bytes);
    if (status != SH_OK) {
        json_decref(nodes);
        return status;
    }
    *out = nodes;
    return SH_OK;
}
