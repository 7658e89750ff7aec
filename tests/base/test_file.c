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
        cmocka_unit_test(test_write_to_nowhere),
        cmocka_unit_test(test_read_limits),
        cmocka_unit_test(test_read_standard_input),
        cmocka_unit_test(test_read_survives_each_failed_allocation),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_path_join),
        cmocka_unit_test(test_json_round_trip),
        cmocka_unit_test(test_json_errors_name_file_and_line),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
