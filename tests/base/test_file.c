/* file.h and json.h, in a temporary folder */
#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/json.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[SH_PATH_BYTES / 2];

static const char *in_folder(const char *name)
{
    static char path[SH_PATH_BYTES];
    assert_int_equal(sh_path_join(path, sizeof path, folder, name, NULL), SH_OK);
    return path;
}

static size_t count_entries(void)
{
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    size_t n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void write_text(const char *path, const char *text)
{
    assert_int_equal(sh_file_write_atomic(path, text, strlen(text), NULL), SH_OK);
}

static void assert_file(const char *path, const char *text)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    assert_int_equal(sh_file_read(path, 1 << 20, &bytes, &n, NULL), SH_OK);
    assert_int_equal(n, strlen(text));
    assert_string_equal((char *)bytes, text);
    free(bytes);
}

static void test_write_then_read(void **state)
{
    (void)state;
    size_t before = count_entries();
    write_text(in_folder("a"), "first");
    assert_file(in_folder("a"), "first");
    write_text(in_folder("a"), "second, longer");
    assert_file(in_folder("a"), "second, longer");
    write_text(in_folder("empty"), "");
    assert_file(in_folder("empty"), "");
    assert_int_equal(count_entries(), before + 2); /* no temporary file is left */
}

static void test_write_keeps_a_private_file_private(void **state)
{
    (void)state;
    const char *path = in_folder("private");
    write_text(path, "secret");
    assert_int_equal(chmod(path, 0600), 0);
    write_text(path, "other secret");
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
}

static void test_failed_write_leaves_the_old_file(void **state)
{
    (void)state;
    const char *path = in_folder("kept");
    write_text(path, "old");
    size_t before = count_entries();
    /* A file size limit fails the write like a full disk would, in the middle. */
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    struct rlimit small = {.rlim_cur = 4096, .rlim_max = limit.rlim_max};
    uint8_t *bytes = calloc(1, 10000);
    assert_non_null(bytes);
    sh_error err = {0};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    sh_status status = sh_file_write_atomic(path, bytes, 10000, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    free(bytes);
    assert_int_equal(status, SH_ERR_IO);
    assert_non_null(strstr(err.text, path));
    assert_file(path, "old");
    assert_int_equal(count_entries(), before);
}

/* Nothing is at the path before the commit, and nothing is left after an abandonment. */
static void test_writer_commits_or_leaves_nothing(void **state)
{
    (void)state;
    sh_file_writer w = {0};
    sh_error err = {0};
    char path[SH_PATH_BYTES];
    snprintf(path, sizeof path, "%s", in_folder("pieces"));
    const size_t before = count_entries();
    assert_int_equal(sh_file_writer_open(path, &w, &err), SH_OK);
    assert_int_equal(sh_file_writer_append(&w, "one, ", 5, &err), SH_OK);
    assert_int_equal(sh_file_writer_append(&w, "", 0, &err), SH_OK);
    assert_int_equal(sh_file_writer_append(&w, "two", 3, &err), SH_OK);
    assert_false(sh_file_exists(path));
    assert_int_equal(count_entries(), before + 1);
    assert_int_equal(sh_file_writer_commit(&w, &err), SH_OK);
    assert_file(path, "one, two");
    sh_file_writer_abandon(&w); /* an ended one */
    assert_file(path, "one, two");

    assert_int_equal(sh_file_writer_open(path, &w, &err), SH_OK);
    assert_int_equal(sh_file_writer_append(&w, "three", 5, &err), SH_OK);
    sh_file_writer_abandon(&w);
    sh_file_writer_abandon(&w);
    assert_file(path, "one, two");
    assert_int_equal(count_entries(), before + 1);
}

/* Two at once on one path: the one that commits last stays, whole. */
static void test_writers_of_one_path(void **state)
{
    (void)state;
    sh_file_writer a = {0}, b = {0};
    const size_t before = count_entries();
    assert_int_equal(sh_file_writer_open(in_folder("both"), &a, NULL), SH_OK);
    assert_int_equal(sh_file_writer_open(in_folder("both"), &b, NULL), SH_OK);
    assert_int_equal(sh_file_writer_append(&a, "first", 5, NULL), SH_OK);
    assert_int_equal(sh_file_writer_append(&b, "second", 6, NULL), SH_OK);
    assert_int_equal(sh_file_writer_commit(&b, NULL), SH_OK);
    assert_file(in_folder("both"), "second");
    assert_int_equal(sh_file_writer_commit(&a, NULL), SH_OK);
    assert_file(in_folder("both"), "first");
    assert_int_equal(count_entries(), before + 1);
}

/* What a killed process left goes, and nothing else. */
static void test_leftovers(void **state)
{
    (void)state;
    char mine[64], alive[64];
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) { /* killed while it writes */
        sh_file_writer w = {0};
        if (sh_file_writer_open_private(in_folder("left"), &w, NULL) == SH_OK)
            (void)raise(SIGKILL);
        _exit(1);
    }
    int how = 0;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL);
    snprintf(mine, sizeof mine, "left.tmp-%ld-77", (long)getpid());
    snprintf(alive, sizeof alive, "left.tmp-%ld-0", (long)getppid());
    const char *const kept[] = {"left",
                                alive,
                                "left.tmp-",
                                "left.tmp-1234567",
                                "left.tmp-0-1",
                                "left.tmp-5-1x",
                                "left2.tmp-999999999-0"};
    for (size_t i = 0; i < SH_COUNT(kept); i++)
        write_text(in_folder(kept[i]), "kept");
    write_text(in_folder(mine), "of one that had this process's number");
    const size_t before = count_entries();
    sh_file_remove_leftovers(in_folder("left"));
    assert_int_equal(count_entries(), before - 2);
    assert_false(sh_file_exists(in_folder(mine)));
    for (size_t i = 0; i < SH_COUNT(kept); i++) {
        assert_file(in_folder(kept[i]), "kept");
        assert_int_equal(unlink(in_folder(kept[i])), 0);
    }
    assert_int_equal(count_entries(), before - 2 - SH_COUNT(kept));
    sh_file_remove_leftovers(in_folder("no/such/folder"));
}

static void test_writer_on_a_full_disk(void **state)
{
    (void)state;
    const char *path = in_folder("whole");
    write_text(path, "old");
    const size_t before = count_entries();
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    const struct rlimit small = {.rlim_cur = 4096, .rlim_max = limit.rlim_max};
    sh_file_writer w = {0};
    sh_error err = {0};
    uint8_t *bytes = calloc(1, 3000);
    assert_non_null(bytes);
    assert_int_equal(sh_file_writer_open(path, &w, &err), SH_OK);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    const sh_status first = sh_file_writer_append(&w, bytes, 3000, &err);
    const sh_status second = sh_file_writer_append(&w, bytes, 3000, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    free(bytes);
    assert_int_equal(first, SH_OK);
    assert_int_equal(second, SH_ERR_IO);
    assert_non_null(strstr(err.text, path));
    sh_file_writer_abandon(&w);
    assert_file(path, "old");
    assert_int_equal(count_entries(), before);
}

/* The folder goes away under the writer. */
static void test_commit_that_fails(void **state)
{
    (void)state;
    sh_file_writer w = {0};
    sh_error err = {0};
    char path[SH_PATH_BYTES];
    snprintf(path, sizeof path, "%s", in_folder("going/file"));
    assert_int_equal(sh_dir_make(in_folder("going"), NULL), SH_OK);
    assert_int_equal(sh_file_writer_open(path, &w, &err), SH_OK);
    assert_int_equal(unlink(w.temp), 0);
    assert_int_equal(rmdir(in_folder("going")), 0);
    assert_int_equal(sh_file_writer_commit(&w, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, path));
    assert_false(w.open);
    sh_file_writer_abandon(&w);
}

/* A rename would put a file in the place of a pipe, or of /dev/null. */
static void test_what_is_no_regular_file_is_not_replaced(void **state)
{
    (void)state;
    const char *path = in_folder("pipe");
    struct stat info;
    sh_file_writer w = {0};
    sh_error err = {0};
    assert_int_equal(mkfifo(path, 0600), 0);
    const size_t before = count_entries();
    assert_int_equal(sh_file_write_atomic(path, "x", 1, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "not a regular file"));
    assert_int_equal(sh_file_write_private(path, "x", 1, &err), SH_ERR_INVALID);
    assert_int_equal(sh_file_writer_open(path, &w, &err), SH_ERR_INVALID);
    assert_false(w.open);
    assert_int_equal(sh_file_writer_open(folder, &w, &err), SH_ERR_IO);
    assert_int_equal(stat(path, &info), 0);
    assert_true(S_ISFIFO(info.st_mode));
    assert_int_equal(count_entries(), before);
}

static void test_write_to_nowhere(void **state)
{
    (void)state;
    sh_error err = {0};
    assert_int_equal(sh_file_write_atomic(in_folder("no/such/file"), "x", 1, &err),
                     SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "no/such/file"));
    char path[SH_PATH_BYTES + 10];
    memset(path, 'p', sizeof path);
    path[sizeof path - 1] = 0;
    assert_int_equal(sh_file_write_atomic(path, "x", 1, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_file_write_atomic(folder, "x", 1, &err), SH_ERR_IO); /* it is a folder */
}

static void test_read_limits(void **state)
{
    (void)state;
    uint8_t *bytes = NULL;
    size_t n = 99;
    sh_error err = {0};
    write_text(in_folder("ten"), "0123456789");
    assert_int_equal(sh_file_read(in_folder("ten"), 9, &bytes, &n, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "10 bytes"));
    assert_null(bytes);
    assert_int_equal(n, 99);
    assert_int_equal(sh_file_read(in_folder("ten"), 10, &bytes, &n, &err), SH_OK);
    assert_int_equal(n, 10);
    free(bytes);
    bytes = NULL;
    assert_int_equal(sh_file_read(in_folder("ten"), SIZE_MAX, &bytes, &n, &err), SH_OK);
    assert_int_equal(n, 10);
    free(bytes);
    bytes = NULL;
    assert_int_equal(sh_file_read(in_folder("none"), 10, &bytes, &n, &err), SH_ERR_NOT_FOUND);
    assert_int_equal(sh_file_read(folder, 10, &bytes, &n, &err), SH_ERR_IO);
    assert_null(bytes);
    /* A file without a size of its own. */
    assert_int_equal(sh_file_read("/dev/zero", 1000000, &bytes, &n, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_file_read("/dev/null", 0, &bytes, &n, &err), SH_OK);
    assert_int_equal(n, 0);
    free(bytes);
}

/* Standard input through a pipe, of exactly the limit and of one byte more. */
static void test_read_standard_input(void **state)
{
    (void)state;
    for (int extra = 0; extra < 2; extra++) {
        int pipe_ends[2], kept = dup(STDIN_FILENO);
        assert_true(kept >= 0);
        assert_int_equal(pipe(pipe_ends), 0);
        assert_int_equal(write(pipe_ends[1], "12345", 4 + (size_t)extra), 4 + extra);
        close(pipe_ends[1]);
        assert_int_equal(dup2(pipe_ends[0], STDIN_FILENO), STDIN_FILENO);
        close(pipe_ends[0]);
        uint8_t *bytes = NULL;
        size_t n = 0;
        sh_error err = {0};
        sh_status status = sh_file_read("-", 4, &bytes, &n, &err);
        dup2(kept, STDIN_FILENO);
        close(kept);
        assert_int_equal(status, extra ? SH_ERR_LIMIT : SH_OK);
        assert_int_equal(n, extra ? 0 : 4);
        if (!extra)
            assert_string_equal((char *)bytes, "1234");
        else
            assert_non_null(strstr(err.text, "standard input"));
        free(bytes);
    }
}

static void test_read_survives_each_failed_allocation(void **state)
{
    (void)state;
    write_text(in_folder("ten"), "0123456789");
    uint8_t *bytes = NULL;
    size_t n = 0, tried = 0;
    sh_status status;
    do {
        sh_alloc_fail_after(++tried);
        status = sh_file_read(in_folder("ten"), 100, &bytes, &n, NULL);
        sh_alloc_fail_after(0);
        assert_true(status == SH_OK || (status == SH_ERR_NO_MEMORY && !bytes && n == 0));
    } while (status != SH_OK && tried < 100);
    assert_int_equal(status, SH_OK);
    assert_true(tried > 1);
    free(bytes);
}

static void test_map(void **state)
{
    (void)state;
    sh_map map = {0};
    sh_error err = {0};
    write_text(in_folder("mapped"), "mapped bytes");
    assert_int_equal(sh_map_open(in_folder("mapped"), &map, &err), SH_OK);
    assert_int_equal(map.bytes, 12);
    assert_memory_equal(map.data, "mapped bytes", 12);
    sh_map_release(&map);
    assert_null(map.data);
    sh_map_release(&map);
    write_text(in_folder("mapped"), "");
    assert_int_equal(sh_map_open(in_folder("mapped"), &map, &err), SH_OK);
    assert_int_equal(map.bytes, 0);
    assert_non_null(map.data);
    sh_map_release(&map);
    assert_int_equal(sh_map_open(in_folder("none"), &map, &err), SH_ERR_NOT_FOUND);
    assert_int_equal(sh_map_open(folder, &map, &err), SH_ERR_IO);
    assert_int_equal(sh_map_open("/dev/null", &map, &err), SH_ERR_INVALID);
    assert_null(map.data);
}

static void test_folders(void **state)
{
    (void)state;
    sh_error err = {0};
    assert_int_equal(sh_dir_make(in_folder("x/y/z"), &err), SH_OK);
    assert_true(sh_file_exists(in_folder("x/y/z")));
    assert_int_equal(sh_dir_make(in_folder("x/y/z/"), &err), SH_OK);
    assert_int_equal(sh_dir_make("/", &err), SH_OK);
    write_text(in_folder("x/file"), "");
    assert_int_equal(sh_dir_make(in_folder("x/file"), &err), SH_ERR_EXISTS);
    assert_int_not_equal(sh_dir_make(in_folder("x/file/below"), &err), SH_OK);
    assert_int_equal(sh_dir_make("", &err), SH_ERR_NOT_FOUND);
    assert_false(sh_file_exists(in_folder("w")));
}

static void test_path_join(void **state)
{
    (void)state;
    char out[8];
    assert_int_equal(sh_path_join(out, sizeof out, "ab", "cdef", NULL), SH_OK);
    assert_string_equal(out, "ab/cdef");
    assert_int_equal(sh_path_join(out, sizeof out, "ab", "cdefg", NULL), SH_ERR_LIMIT);
    assert_string_equal(out, "ab/cdef");
    assert_int_equal(sh_path_join(out, sizeof out, "ab/", "cdef", NULL), SH_OK);
    assert_string_equal(out, "ab/cdef");
    assert_int_equal(sh_path_join(out, sizeof out, "", "cdef", NULL), SH_OK);
    assert_string_equal(out, "cdef");
    assert_int_equal(sh_path_join(out, sizeof out, "1234567", "", NULL), SH_ERR_LIMIT);
    assert_int_equal(sh_path_join(out, sizeof out, "123456789", "", NULL), SH_ERR_LIMIT);
    assert_int_equal(sh_path_join(out, 0, "", "", NULL), SH_ERR_LIMIT);
}

static void test_json_round_trip(void **state)
{
    (void)state;
    json_t *value = json_object(), *read = NULL;
    sh_json_set(value, "zulu", json_integer(1));
    sh_json_set(value, "alpha", json_string("caf\xc3\xa9"));
    sh_json_set(value, "third", sh_json_number(0.1));
    sh_json_set(value, "none", sh_json_number(NAN));
    sh_json_set(value, "more", sh_json_number(INFINITY));
    assert_int_equal(sh_json_save(in_folder("v.json"), value, NULL), SH_OK);
    assert_file(in_folder("v.json"), "{\n  \"zulu\": 1,\n  \"alpha\": \"caf\xc3\xa9\",\n"
                                     "  \"third\": 0.10000000000000001,\n"
                                     "  \"none\": null,\n  \"more\": null\n}\n");
    assert_int_equal(sh_json_load(in_folder("v.json"), &read, NULL), SH_OK);
    assert_true(json_equal(value, read));
    assert_true(json_real_value(json_object_get(read, "third")) == 0.1);
    json_decref(value);
    json_decref(read);
}

static void test_json_errors_name_file_and_line(void **state)
{
    (void)state;
    static const struct {
        const char *text, *place;
    } cases[] = {
        {"{\n  \"a\": 1,\n  \"b\": ?\n}\n", "bad.json:3:"},
        {"{\n  \"a\": 1,\n  \"a\": 2\n}\n", "bad.json:3:"}, /* a key twice */
        {"", "bad.json:1:"},
        {"{}\n{}", "bad.json:2:"},
        {"{\"a\": \"\xff\"}", "bad.json:1:"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        json_t *value = NULL;
        sh_error err = {0};
        write_text(in_folder("bad.json"), cases[i].text);
        assert_int_equal(sh_json_load(in_folder("bad.json"), &value, &err), SH_ERR_INVALID);
        assert_null(value);
        if (!strstr(err.text, cases[i].place))
            fail_msg("'%s' does not hold '%s'", err.text, cases[i].place);
    }
    json_t *value = NULL;
    sh_error err = {0};
    assert_int_equal(sh_json_load(in_folder("none.json"), &value, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "none.json"));
}

static void check_limit(const char *text, size_t n, const sh_json_limits *limits,
                        const char *expected)
{
    json_t *value = NULL;
    sh_error err = {0};
    const sh_status status = sh_json_decode(text, n, "text", limits, &value, &err);
    if (status != (expected == NULL ? SH_OK : SH_ERR_LIMIT) || (value == NULL) == (status == SH_OK))
        fail_msg("%.40s: %s (%s)", text, sh_status_name(status), err.text);
    if (expected != NULL && strstr(err.text, expected) == NULL)
        fail_msg("%.40s: '%s' does not hold '%s'", text, err.text, expected);
    json_decref(value);
}

/* A line of a file: its number is in every error. */
static void test_json_line(void **state)
{
    (void)state;
    static const sh_json_limits limits = {.bytes_max = 24, .values_max = 2, .depth_max = 2};
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"{\"a\": }", "lines:7:7: unexpected token near '}'"},
        {"[1,2,3]", "lines:7: JSON of 3 values, at most 2 are read"},
        {"[[[", "lines:7: JSON of 3 values, at most 2 are read"},
        {"[                       ]", "lines:7: JSON of 25 bytes, at most 24 are read"},
    };
    json_t *value = NULL;
    sh_error err = {0};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        const sh_json_line line = {"lines", 7, cases[i].text, strlen(cases[i].text)};
        assert_int_not_equal(sh_json_decode_line(&line, &limits, &value, &err), SH_OK);
        assert_string_equal(err.text, cases[i].expected);
        assert_null(value);
    }
    const sh_json_line good = {"lines", 7, "{\"a\": 1}junk", 8};
    assert_int_equal(sh_json_decode_line(&good, &limits, &value, &err), SH_OK);
    assert_int_equal(json_integer_value(json_object_get(value, "a")), 1);
    json_decref(value);
}

/* At each limit and one over it. */
static void test_json_limits(void **state)
{
    (void)state;
    static const sh_json_limits limits = {.bytes_max = 24, .values_max = 6, .depth_max = 3};
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"[1,2,3,4,5,6]", NULL},
        {"[1,2,3,4,5,6,7]", "7 values, at most 6"},
        {"[[[1]]]", NULL},
        {"[[[[]]]]", "4 levels, at most 3"},
        {"{\"a\":{\"b\":[[]]}}", "4 levels, at most 3"},
        {"[[],[],[]]", NULL},               /* the depth goes down again */
        {"[\"[[[[,,,,,,,,\"]", NULL},       /* what is in strings does not count */
        {"[\"\\\"[[[[,,,,,,\"]", NULL},     /* nor behind a quote in one */
        {"[\"\\\\\",[[[]]]]", "4 levels"},  /* but behind a backslash in one it does */
        {"[                      ]", NULL}, /* 24 bytes */
        {"[                       ]", "25 bytes, at most 24"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++)
        check_limit(cases[i].text, strlen(cases[i].text), &limits, cases[i].expected);
    json_t *value = NULL;
    sh_error err = {0};
    /* Within the limits, and no JSON: brackets that close what was never open, a text cut off. */
    static const char *const broken[] = {"]]]]]]", "[1", "\"", "\"\\", "", "[1,]", "nul"};
    for (size_t i = 0; i < SH_COUNT(broken); i++) {
        assert_int_equal(
            sh_json_decode(broken[i], strlen(broken[i]), "text", &limits, &value, &err),
            SH_ERR_INVALID);
        assert_null(value);
        assert_non_null(strstr(err.text, "text:1:"));
    }
}

static int remove_tree(const char *path)
{
    DIR *dir = opendir(path);
    if (!dir)
        return unlink(path);
    for (struct dirent *entry; (entry = readdir(dir));) {
        char below[SH_PATH_BYTES];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (sh_path_join(below, sizeof below, path, entry->d_name, NULL) == SH_OK)
            remove_tree(below);
    }
    closedir(dir);
    return rmdir(path);
}

static int setup(void **state)
{
    (void)state;
    const char *temp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/shoal-file-XXXXXX", temp && temp[0] ? temp : "/tmp");
    signal(SIGXFSZ, SIG_IGN); /* a write past the limit returns an error then */
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return remove_tree(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_write_then_read),
        cmocka_unit_test(test_write_keeps_a_private_file_private),
        cmocka_unit_test(test_failed_write_leaves_the_old_file),
        cmocka_unit_test(test_writer_commits_or_leaves_nothing),
        cmocka_unit_test(test_writers_of_one_path),
        cmocka_unit_test(test_leftovers),
        cmocka_unit_test(test_writer_on_a_full_disk),
        cmocka_unit_test(test_commit_that_fails),
        cmocka_unit_test(test_what_is_no_regular_file_is_not_replaced),
        cmocka_unit_test(test_write_to_nowhere),
        cmocka_unit_test(test_read_limits),
        cmocka_unit_test(test_read_standard_input),
        cmocka_unit_test(test_read_survives_each_failed_allocation),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_path_join),
        cmocka_unit_test(test_json_round_trip),
        cmocka_unit_test(test_json_errors_name_file_and_line),
        cmocka_unit_test(test_json_limits),
        cmocka_unit_test(test_json_line),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
