/* The log, and what base promises to threads: whole lines, one count of allocations. */
#include "shared/base/buf.h"
#include "shared/base/log.h"
#include "tests/base/capture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <string.h>

enum { THREADS = 4, LINES = 200, ALLOCATIONS = 1000 };

/* Past "ts=2026-11-22T05:09:35.123Z ", which must be there. */
static char *after_time(char *line)
{
    int used = 0;
    unsigned year, month, day, hour, minute, second, ms;
    int got = sscanf(line, "ts=%4u-%2u-%2uT%2u:%2u:%2u.%3uZ %n", &year, &month, &day, &hour,
                     &minute, &second, &ms, &used);
    if (got != 7 || used != 28 || year < 2024 || month < 1 || month > 12 || day < 1 || day > 31 ||
        hour > 23 || minute > 59 || second > 60)
        fail_msg("no time in '%s'", line);
    return line + used;
}

static void test_log_lines_and_levels(void **state)
{
    (void)state;
    char text[8192];
    capture c = capture_begin();
    sh_log(SH_LOG_INFO, "quiet", "by=default");
    sh_log(SH_LOG_WARN, "loud", "a=%d b=%s", 1, "x");
    sh_log_set_level(SH_LOG_DEBUG);
    sh_log(SH_LOG_DEBUG, "bare", "%s", "");
    sh_log(SH_LOG_ERROR, "forged", "path=%s", "x\nlevel=error event=fake");
    sh_log_set_level(SH_LOG_WARN);
    capture_end(&c, text, sizeof text);
    static const char *const expected[] = {
        "level=warn event=loud a=1 b=x", "level=debug event=bare ",
        "level=error event=forged path=x level=error event=fake"};
    size_t n = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), n++) {
        assert_true(n < SH_COUNT(expected));
        assert_string_equal(after_time(line), expected[n]);
    }
    assert_int_equal(n, SH_COUNT(expected));
}

static void test_log_level_names(void **state)
{
    (void)state;
    sh_error err = {0};
    for (int i = SH_LOG_ERROR; i <= SH_LOG_DEBUG; i++) {
        sh_log_level level = SH_LOG_ERROR;
        assert_int_equal(sh_log_parse_level(sh_log_level_name((sh_log_level)i), &level, &err), 0);
        assert_int_equal(level, i);
    }
    sh_log_level level = SH_LOG_INFO;
    assert_int_equal(sh_log_parse_level("loud", &level, &err), SH_ERR_USAGE);
    assert_int_equal(level, SH_LOG_INFO);
    assert_string_equal(err.text, "log level 'loud' is none of error, warn, info, debug");
}

static void test_log_line_is_bounded(void **state)
{
    (void)state;
    char text[8192], longer[4000];
    memset(longer, 'v', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    capture c = capture_begin();
    sh_log(SH_LOG_ERROR, "long", "v=%s", longer);
    sh_log(SH_LOG_ERROR, longer, "v=%s", longer);
    size_t n = capture_end(&c, text, sizeof text);
    const char *end = strchr(text, '\n');
    assert_non_null(end);
    assert_true(end - text > 900 && end - text < 1024);
    assert_true(n > (size_t)(end - text) + 900 && n <= 2048);
    assert_int_equal(text[n - 1], '\n');
}

static void test_error_report(void **state)
{
    (void)state;
    char text[1024];
    sh_error err = {0};
    sh_fail(&err, SH_ERR_USAGE, "unknown key 'x'");
    capture c = capture_begin();
    int usage = sh_error_report("shoal", &err);
    err = (sh_error){.code = SH_ERR_NO_MEMORY};
    int failed = sh_error_report("shoal", &err);
    capture_end(&c, text, sizeof text);
    assert_string_equal(text, "shoal: unknown key 'x'\nshoal: no-memory\n");
    assert_int_equal(usage, 2);
    assert_int_equal(failed, 1);
}

static void *log_lines(void *arg)
{
    for (int i = 0; i < LINES; i++)
        sh_log(SH_LOG_WARN, "line", "thread=%d i=%03d end", *(const int *)arg, i);
    return NULL;
}

static void test_lines_of_threads_do_not_mix(void **state)
{
    (void)state;
    static char text[THREADS * LINES * 128];
    pthread_t threads[THREADS];
    int ids[THREADS];
    capture c = capture_begin();
    for (int i = 0; i < THREADS; i++) {
        ids[i] = i;
        if (pthread_create(&threads[i], NULL, log_lines, &ids[i]) != 0)
            abort();
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    capture_end(&c, text, sizeof text);
    int next[THREADS] = {0}, lines = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), lines++) {
        int thread = -1, i = -1, used = 0;
        line = after_time(line);
        int got = sscanf(line, "level=warn event=line thread=%d i=%d end%n", &thread, &i, &used);
        if (got != 2 || line[used] != 0 || thread < 0 || thread >= THREADS)
            fail_msg("a mixed line: '%s'", line);
        assert_int_equal(i, next[thread]++);
    }
    assert_int_equal(lines, THREADS * LINES);
}

static void *count_allocations(void *arg)
{
    for (int i = 0; i < ALLOCATIONS; i++) {
        void *memory = sh_calloc(1, 8);
        *(int *)arg += memory == NULL;
        free(memory);
    }
    return NULL;
}

static void test_exactly_one_allocation_fails(void **state)
{
    (void)state;
    pthread_t threads[THREADS];
    int failed[THREADS] = {0}, total = 0;
    sh_alloc_fail_after(THREADS * ALLOCATIONS / 2);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, count_allocations, &failed[i]) != 0)
            abort();
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        total += failed[i];
    }
    assert_int_equal(sh_alloc_fail_after(0), THREADS * ALLOCATIONS);
    assert_int_equal(total, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_log_lines_and_levels),
        cmocka_unit_test(test_log_level_names),
        cmocka_unit_test(test_log_line_is_bounded),
        cmocka_unit_test(test_error_report),
        cmocka_unit_test(test_lines_of_threads_do_not_mix),
        cmocka_unit_test(test_exactly_one_allocation_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
