/* Sources of signals, with fakes: folders that look like sysfs, files, programs that misbehave. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge-node/probe.h"
#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "tests/store/util.h"

#define LONG_MS 600000u /* longer than any test may take: what ends sooner was not waited for */

static sh_probe_limits limits = {.timeout_ms = LONG_MS, .stop_fd = -1};
static temp_dir dir;

static void put(const char *name, const char *text)
{
    char path[512], parent[512];
    sh_error err = {0};
    snprintf(path, sizeof path, "%s/%s", dir.path, name);
    snprintf(parent, sizeof parent, "%s", path);
    *strrchr(parent, '/') = 0;
    assert_int_equal(sh_dir_make(parent, &err), SH_OK);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void put_program(const char *name, const char *text)
{
    char path[512];
    put(name, text);
    snprintf(path, sizeof path, "%s/%s", dir.path, name);
    assert_int_equal(chmod(path, 0700), 0);
}

/* source: %s is the test's folder. */
static sh_probe_value look(sh_probe_signal signal, const char *kind, const char *rest)
{
    char source[512];
    sh_probe probe;
    sh_error err = {0};
    snprintf(source, sizeof source, "%s%s%s", kind, dir.path, rest);
    if (sh_probe_parse(signal, source, &probe, &err) != SH_OK)
        fail_msg("%s: %s", source, err.text);
    return sh_probe_read(&probe, &limits);
}

static void assert_known(sh_probe_value v, int64_t value)
{
    if (!v.known || v.value != value)
        fail_msg("known %d, value %lld, wanted %lld", v.known, (long long)v.value,
                 (long long)value);
}

static int set_up(void **state)
{
    (void)state;
    dir = temp_dir_make();
    limits = (sh_probe_limits){.timeout_ms = LONG_MS, .stop_fd = -1};
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", dir.path);
    return system(command);
}

static void test_parse(void **state)
{
    (void)state;
    static const struct {
        sh_probe_signal signal;
        const char *source, *said;
    } bad[] = {
        {SH_PROBE_POWER, "sysf", "not sysfs"},
        {SH_PROBE_POWER, "file:", "path is missing"},
        {SH_PROBE_POWER, "command:  ", "which one"},
        {SH_PROBE_METERED, "sysfs", "does not show"},
        {SH_PROBE_IDLE, "sysfs", "does not show"},
        {SH_PROBE_TEMPERATURE, "always", "no temperature"},
        {SH_PROBE_IDLE, "command:a b c d e f g h i j k l m n o p q", "more than 16"},
    };
    sh_probe probe;
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        sh_error err = {0};
        assert_int_equal(sh_probe_parse(bad[i].signal, bad[i].source, &probe, &err), SH_ERR_USAGE);
        if (!strstr(err.text, bad[i].said) || !strstr(err.text, "probe."))
            fail_msg("%s: %s", bad[i].source, err.text);
    }
    sh_error err = {0};
    char longer[SH_PROBE_TEXT_MAX + 16];
    memset(longer, 'x', sizeof longer);
    memcpy(longer, "file:", 5);
    longer[sizeof longer - 1] = 0;
    assert_int_equal(sh_probe_parse(SH_PROBE_POWER, longer, &probe, &err), SH_ERR_USAGE);
}

static void test_constants(void **state)
{
    (void)state;
    sh_probe probe;
    assert_int_equal(sh_probe_parse(SH_PROBE_METERED, "always", &probe, NULL), SH_OK);
    assert_known(sh_probe_read(&probe, &limits), 1);
    assert_int_equal(sh_probe_parse(SH_PROBE_METERED, "never", &probe, NULL), SH_OK);
    assert_known(sh_probe_read(&probe, &limits), 0);
    assert_int_equal(sh_probe_parse(SH_PROBE_IDLE, "never", &probe, NULL), SH_OK);
    assert_known(sh_probe_read(&probe, &limits), 0);
    assert_int_equal(sh_probe_parse(SH_PROBE_IDLE, "always", &probe, NULL), SH_OK);
    assert_true(sh_probe_read(&probe, &limits).value > INT64_C(1000) * 3600 * 24 * 365);
    assert_int_equal(sh_probe_parse(SH_PROBE_POWER, "", &probe, NULL), SH_OK);
    assert_false(sh_probe_read(&probe, &limits).known);
}

static void test_files(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        sh_probe_signal signal;
        bool known;
        int64_t value;
    } cases[] = {
        {"yes\n", SH_PROBE_POWER, true, 1},
        {"No", SH_PROBE_POWER, true, 0},
        {"1\n", SH_PROBE_METERED, true, 1},
        {"off \n\n", SH_PROBE_METERED, true, 0},
        {"2", SH_PROBE_METERED, false, 0},
        {"", SH_PROBE_POWER, false, 0},
        {"\n", SH_PROBE_POWER, false, 0},
        {"maybe", SH_PROBE_POWER, false, 0},
        {"41500\n", SH_PROBE_TEMPERATURE, true, 41500},
        {"-2000", SH_PROBE_TEMPERATURE, true, -2000},
        {"41.5", SH_PROBE_TEMPERATURE, false, 0},
        {"99999999999999999999", SH_PROBE_TEMPERATURE, false, 0},
        {"2000000", SH_PROBE_TEMPERATURE, false, 0},
        {"60000", SH_PROBE_IDLE, true, 60000},
        {"-1", SH_PROBE_IDLE, false, 0},
        {"12 34", SH_PROBE_IDLE, false, 0},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        put("value", cases[i].text);
        sh_probe_value v = look(cases[i].signal, "file:", "/value");
        if (v.known != cases[i].known || (v.known && v.value != cases[i].value))
            fail_msg("'%s': known %d, value %lld", cases[i].text, v.known, (long long)v.value);
    }
    assert_false(look(SH_PROBE_POWER, "file:", "/not-there").known);
    assert_false(look(SH_PROBE_POWER, "file:", "").known); /* a folder */
    char more[SH_PROBE_OUTPUT_MAX + 2];
    memset(more, '1', sizeof more - 1);
    more[sizeof more - 1] = 0;
    put("value", more);
    assert_false(look(SH_PROBE_IDLE, "file:", "/value").known);
    char pipe[512];
    snprintf(pipe, sizeof pipe, "%s/pipe", dir.path);
    assert_int_equal(mkfifo(pipe, 0600), 0);
    assert_false(look(SH_PROBE_POWER, "file:", "/pipe").known); /* nobody writes; no wait */
}

static void test_sysfs_power(void **state)
{
    (void)state;
    assert_false(look(SH_PROBE_POWER, "sysfs:", "").known);
    assert_int_equal(sh_dir_make(dir.path, NULL), SH_OK);
    put("class/power_supply/.keep", "");
    assert_known(look(SH_PROBE_POWER, "sysfs:", ""), 1); /* nothing to run out */
    put("class/power_supply/BAT0/type", "Battery\n");
    put("class/power_supply/BAT0/status", "Unknown\n");
    assert_false(look(SH_PROBE_POWER, "sysfs:", "").known);
    put("class/power_supply/BAT0/status", "Discharging\n");
    assert_known(look(SH_PROBE_POWER, "sysfs:", ""), 0);
    put("class/power_supply/BAT0/status", "Charging\n");
    assert_known(look(SH_PROBE_POWER, "sysfs:", ""), 1);
    put("class/power_supply/BAT0/status", "Full\n");
    put("class/power_supply/AC/type", "Mains\n");
    put("class/power_supply/AC/online", "0\n");
    assert_known(look(SH_PROBE_POWER, "sysfs:", ""), 0);
    put("class/power_supply/port/type", "USB\n");
    put("class/power_supply/port/online", "1\n");
    assert_known(look(SH_PROBE_POWER, "sysfs:", ""), 1);
}

static void test_sysfs_network(void **state)
{
    (void)state;
    assert_false(look(SH_PROBE_NETWORK, "sysfs:", "").known);
    put("class/net/lo/type", "772\n");
    put("class/net/lo/operstate", "up\n");
    assert_known(look(SH_PROBE_NETWORK, "sysfs:", ""), 0);
    put("class/net/ppp0/type", "512\n");
    put("class/net/ppp0/operstate", "unknown\n");
    assert_false(look(SH_PROBE_NETWORK, "sysfs:", "").known);
    put("class/net/wlan0/type", "1\n");
    put("class/net/wlan0/operstate", "up\n");
    assert_known(look(SH_PROBE_NETWORK, "sysfs:", ""), 1);
}

static void test_sysfs_temperature(void **state)
{
    (void)state;
    put("class/thermal/cooling_device0/temp", "99000\n");
    assert_false(look(SH_PROBE_TEMPERATURE, "sysfs:", "").known);
    put("class/thermal/thermal_zone0/temp", "-5000\n");
    put("class/thermal/thermal_zone1/temp", "rubbish\n");
    assert_known(look(SH_PROBE_TEMPERATURE, "sysfs:", ""), -5000);
    put("class/thermal/thermal_zone2/temp", "51000\n");
    assert_known(look(SH_PROBE_TEMPERATURE, "sysfs:", ""), 51000);
}

static void test_commands(void **state)
{
    (void)state;
    put_program("says", "#!/bin/sh\necho \"$1$2\"\n");
    assert_known(look(SH_PROBE_TEMPERATURE, "command:", "/says 4 2000"), 42000);
    assert_known(look(SH_PROBE_METERED, "command:", "/says yes"), 1);
    assert_false(look(SH_PROBE_METERED, "command:", "/says $HOME").known); /* no shell reads it */
    assert_false(look(SH_PROBE_METERED, "command:", "/not-there").known);
    put_program("fails", "#!/bin/sh\necho yes\nexit 3\n");
    assert_false(look(SH_PROBE_METERED, "command:", "/fails").known);
    put_program("dies", "#!/bin/sh\necho yes\nkill -9 $$\n");
    assert_false(look(SH_PROBE_METERED, "command:", "/dies").known);
    put_program("complains", "#!/bin/sh\necho no >&2\necho yes\n");
    assert_known(look(SH_PROBE_METERED, "command:", "/complains"), 1);
    put_program("reads", "#!/bin/sh\ncat\necho yes\n"); /* its input is empty */
    assert_known(look(SH_PROBE_METERED, "command:", "/reads"), 1);
    /* One that never stops printing is cut, and killed, long before its time is over. */
    put_program("floods", "#!/bin/sh\nwhile :; do echo yes; done\n");
    assert_false(look(SH_PROBE_METERED, "command:", "/floods").known);
}

static void test_commands_that_hang(void **state)
{
    (void)state;
    put_program("hangs", "#!/bin/sh\nsleep 100000 &\nwait\n");
    put_program("half", "#!/bin/sh\necho yes\nexec >&-\nsleep 100000\n");
    limits.timeout_ms = 50;
    uint64_t before = sh_clock_mono_ms();
    assert_false(look(SH_PROBE_METERED, "command:", "/hangs").known);
    assert_false(look(SH_PROBE_METERED, "command:", "/half").known);
    assert_true(sh_clock_mono_ms() - before >= 100); /* each had its time */
    /* Asked to stop: at once, whatever the time limit. */
    limits.timeout_ms = LONG_MS;
    limits.stop_fd = eventfd(1, EFD_CLOEXEC);
    assert_true(limits.stop_fd >= 0);
    assert_false(look(SH_PROBE_METERED, "command:", "/hangs").known);
    close(limits.stop_fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse),
        cmocka_unit_test(test_constants),
        cmocka_unit_test_setup_teardown(test_files, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_sysfs_power, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_sysfs_network, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_sysfs_temperature, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_commands, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_commands_that_hang, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
