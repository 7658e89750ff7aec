#include "tests/trainer/program_run.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/model/tiny.h"

sh_error err;
const char *program;
char dir[] = "/tmp/shoal-train-test-XXXXXX";

const char *path_of(const char *name)
{
    static char paths[8][128];
    static size_t next;
    char *path = paths[next++ % SH_COUNT(paths)];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
    return path;
}

/* Runs the program in a shell with the folder as working directory; returns its exit status and
 * what it printed on stdout. stderr goes to the folder's file "stderr". */
int run(const char *arguments, char *out, size_t bytes)
{
    char command[1024];
    snprintf(command, sizeof(command), "cd '%s' && '%s' %s 2>stderr", dir, program, arguments);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t n = fread(out, 1, bytes - 1, pipe);
    out[n] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

void must_exit(const char *arguments, int expected)
{
    char out[4096];
    uint8_t *text = NULL;
    size_t n = 0;
    int status = run(arguments, out, sizeof(out));
    must_be_ok(sh_file_read(path_of("stderr"), 1 << 20, &text, &n, &err));
    if (status != expected || n == 0)
        fail_msg("'%s' exits with %d, expected %d and a line: %s", arguments, status, expected,
                 (const char *)text);
    free(text);
}

json_t *run_json(const char *arguments)
{
    char out[8192];
    json_error_t where;
    int status = run(arguments, out, sizeof(out));
    if (status != 0)
        fail_msg("'%s' exits with %d", arguments, status);
    json_t *j = json_loads(out, 0, &where);
    if (!j)
        fail_msg("'%s' prints no JSON: %s", arguments, out);
    return j;
}

double number_of(const json_t *j, const char *key)
{
    const json_t *value = json_object_get(j, key);
    if (!json_is_number(value))
        fail_msg("no number '%s'", key);
    return json_number_value(value);
}

void expect_error(const char *arguments, int code, const char *text)
{
    uint8_t *line = NULL;
    size_t n = 0;
    unlink(path_of("result.json"));
    must_exit(arguments, code);
    must_be_ok(sh_file_read(path_of("stderr"), 1 << 20, &line, &n, &err));
    if (!strstr((const char *)line, text))
        fail_msg("'%s' says: %s", arguments, (const char *)line);
    free(line);
    assert_false(sh_file_exists(path_of("result.json")));
}

int prepare(void **state)
{
    (void)state;
    static const char line[] = "the quick brown fox jumps over the lazy dog and the cat sat. ";
    static char text[60 * sizeof(line)];
    tiny_options o = tiny_defaults(1);
    size_t n = 0;
    for (int i = 0; i < 60; i++, n += sizeof(line) - 1)
        memcpy(text + n, line, sizeof(line) - 1);
    if (!mkdtemp(dir))
        return 1;
    must_be_ok(tiny_write(&o, path_of("vocab.gguf"), &err));
    must_be_ok(sh_file_write_atomic(path_of("text"), text, n, &err));
    must_be_ok(sh_file_write_atomic(path_of("broken.gguf"), "GGUFnot", 7, &err));
    return 0;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *where)
{
    (void)st, (void)kind, (void)where;
    return remove(path);
}

int clean(void **state)
{
    (void)state;
    return nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}
