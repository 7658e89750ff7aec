/* Processes of the fleet: their logs, their ends, tools that fail. Lies beside shoal-fleet. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "experiments/fleet/process.h"
#include "shared/base/clock.h"

#define DEADLINE_MS 60000
#define ERR         (&ok_err_)
#define OK(call)                                                                                   \
    do {                                                                                           \
        sh_error ok_err_ = {0};                                                                    \
        if ((call) != SH_OK)                                                                       \
            fail_msg("%s: %s", #call, ok_err_.text);                                               \
    } while (0)

static char folder[64], log_path[128];

static int set_up(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/shoal-fleet-XXXXXX");
    if (!mkdtemp(folder))
        return 1;
    snprintf(log_path, sizeof log_path, "%s/log", folder);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    (void)unlink(log_path);
    return rmdir(folder);
}

static void shell(fleet_words *w, const char *script)
{
    fleet_words_add(w, "/bin/sh");
    fleet_words_add(w, "-c");
    fleet_words_add(w, script);
}

static void wait_end(fleet_process *p)
{
    uint64_t end = sh_clock_mono_ms() + DEADLINE_MS;
    while (!fleet_process_reap(p)) {
        assert_true(sh_clock_mono_ms() < end);
        usleep(2000);
    }
}

static void test_log_and_status(void **state)
{
    fleet_process p = {0};
    fleet_words w = {0};
    (void)state;
    shell(&w, "echo event=a x=$WORD; echo >&2 event=b; printf unfinished; exit 3");
    OK(fleet_process_start(&p, &w, "WORD=7", log_path, ERR));
    wait_end(&p);
    assert_int_equal(p.pid, 0);
    assert_true(WIFEXITED(p.status) && WEXITSTATUS(p.status) == 3);
    assert_string_equal(fleet_process_line(&p), "event=a x=7");
    assert_string_equal(fleet_process_line(&p), "event=b");
    assert_null(fleet_process_line(&p));
    assert_false(fleet_process_reap(&p)); /* once */
    /* A second life goes on in the same log, after what the first one left unfinished. */
    w = (fleet_words){0};
    shell(&w, "echo -now; kill -KILL $$");
    OK(fleet_process_start(&p, &w, NULL, log_path, ERR));
    wait_end(&p);
    assert_true(WIFSIGNALED(p.status) && WTERMSIG(p.status) == SIGKILL);
    assert_string_equal(fleet_process_line(&p), "unfinished-now");
    fleet_process_release(&p);
}

static void test_signal_and_release(void **state)
{
    fleet_process p = {0}, q = {0};
    fleet_words w = {0};
    (void)state;
    shell(&w, "exec sleep 1000");
    OK(fleet_process_start(&p, &w, NULL, log_path, ERR));
    assert_false(fleet_process_reap(&p));
    fleet_process_signal(&p, SIGTERM);
    wait_end(&p);
    assert_true(WIFSIGNALED(p.status) && WTERMSIG(p.status) == SIGTERM);
    fleet_process_release(&p);
    OK(fleet_process_start(&q, &w, NULL, log_path, ERR));
    pid_t pid = q.pid;
    fleet_process_release(&q);
    assert_int_equal(kill(pid, 0), -1); /* gone, and waited for */
}

static void test_tools(void **state)
{
    fleet_words good = {0}, bad = {0}, slow = {0}, none = {0};
    sh_error err = {0};
    (void)state;
    shell(&good, "echo done");
    shell(&bad, "echo first; echo 'what is wrong' >&2; exit 1");
    shell(&slow, "exec sleep 1000");
    fleet_words_add(&none, "/nonexistent/tool");
    OK(fleet_run_tool(&good, log_path, 60, ERR));
    assert_int_equal(fleet_run_tool(&bad, log_path, 60, &err), SH_ERR_IO);
    assert_non_null(strstr(err.text, "what is wrong"));
    assert_int_equal(fleet_run_tool(&slow, log_path, 0, &err), SH_ERR_IO);
    assert_non_null(strstr(err.text, "not done"));
    assert_int_equal(fleet_run_tool(&none, log_path, 60, &err), SH_ERR_IO);
    assert_non_null(strstr(err.text, "/nonexistent/tool"));
}

/* A child whose parent is gone already does not start its program. */
static void test_orphan(void **state)
{
    char self[SH_PATH_BYTES], command[SH_PATH_BYTES + 256];
    (void)state;
    OK(fleet_program("shoal-fleet", self, sizeof self, ERR));
    snprintf(command, sizeof command, "'%s' child 1 /bin/echo no > '%s'; test $? = 1", self,
             log_path);
    assert_int_equal(system(command), 0);
    snprintf(command, sizeof command, "test ! -s '%s'", log_path);
    assert_int_equal(system(command), 0);
}

static void test_words(void **state)
{
    static fleet_words w;
    (void)state;
    fleet_words_int(&w, "a.b", -3);
    fleet_words_real(&w, "c", 0.25);
    assert_string_equal(w.words[0], "--a.b=-3");
    assert_string_equal(w.words[1], "--c=0.25");
    assert_null(w.words[2]);
    for (int i = 0; i < FLEET_WORDS_MAX; i++)
        fleet_words_add(&w, "x");
    assert_true(w.overflow);
    assert_null(w.words[FLEET_WORDS_MAX]);
}

static void test_log_values(void **state)
{
    static const char line[] = "ts=1 level=info event=ready http=127.0.0.1:81 text=\"a b\" n=-2.5";
    char out[32];
    double x = 0;
    (void)state;
    assert_true(fleet_log_text(line, "event", out, sizeof out));
    assert_string_equal(out, "ready");
    assert_true(fleet_log_text(line, "text", out, sizeof out));
    assert_string_equal(out, "a b");
    assert_true(fleet_log_text(line, "ts", out, sizeof out));
    assert_string_equal(out, "1");
    assert_false(fleet_log_text(line, "s", out, sizeof out)); /* of "ts" */
    assert_false(fleet_log_text(line, "port", out, sizeof out));
    assert_true(fleet_log_text(line, "http", out, 6)); /* cut */
    assert_string_equal(out, "127.0");
    assert_true(fleet_log_number(line, "n", &x));
    assert_true(x == -2.5);
    assert_false(fleet_log_number(line, "event", &x));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_log_and_status, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_signal_and_release, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_tools, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_orphan, set_up, tear_down),
        cmocka_unit_test(test_words),
        cmocka_unit_test(test_log_values),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
