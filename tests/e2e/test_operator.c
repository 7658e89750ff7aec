/*
 * What an operator touches: folders with something wrong in them, sample configurations, systemd
 * units, and the runbook, whose metrics and events must be those of the running programs. argv[1]:
 * the programs' folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/stats/window.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/probe.h"

#define RUNBOOK    SHOAL_SOURCE_DIR "/docs/runbook/"
#define TEXT_MAX   (4u << 20)
#define NAME_BYTES 96
#define INFERENCES 40 /* two windows and more */

static const char *bin;
static char pages[1 << 18]; /* of both programs' metrics */
static const char *const words[] = {"--monitor.window", "16", "--monitor.reference", "64", NULL};

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    f->node_words = words;
    e2e_fleet_make(f, 1);
    return 0;
}

static int release(void **state)
{
    e2e_fleet_release(*state);
    free(*state);
    return 0;
}

static char *read_text(const char *path)
{
    uint8_t *text = NULL;
    size_t n = 0;
    OK(sh_file_read(path, TEXT_MAX, &text, &n, err));
    assert_int_equal(strlen((char *)text), n);
    return (char *)text;
}

/* ---- folders with something wrong ---- */

static void in_dir(char *path, const char *dir, const char *name)
{
    OK(sh_path_join(path, SH_PATH_BYTES, dir, name, err));
}

/* It ends by itself with this exit code and one line on stderr that has `what`. */
static void refused(e2e_fleet *f, const char *program, const char *const *more, int code,
                    const char *what)
{
    const char *all[RUN_ARGS_MAX];
    size_t n = 0;
    for (; more[n]; n++)
        all[n] = more[n];
    all[n++] = "--http.port";
    all[n++] = "0";
    all[n] = NULL;
    run_result r = run_program(e2e_program(f, program), all, NULL, 0);
    const char *line = r.err;
    while (strncmp(line, "ts=", 3) == 0 && strchr(line, '\n')) /* what it logged before */
        line = strchr(line, '\n') + 1;
    if (r.exit_code != code || !strstr(line, what) || strchr(line, '\n') != r.err + r.n_err - 1)
        fail_msg("%s: exit code %d, stderr '%s'; wanted %d and one line with '%s'", program,
                 r.exit_code, r.err, code, what);
    run_release(&r);
}

/* With a file of the folder replaced by other bytes (NULL: taken away) or another mode. */
static void refused_with(e2e_fleet *f, const char *program, const char *dir, const char *name,
                         const char *bytes, int code, const char *what)
{
    char path[SH_PATH_BYTES];
    struct stat st;
    uint8_t *was = NULL;
    size_t n = 0;
    in_dir(path, dir, name);
    assert_int_equal(stat(path, &st), 0);
    OK(sh_file_read(path, 64u << 20, &was, &n, err));
    if (bytes)
        OK(sh_file_write_atomic(path, bytes, strlen(bytes), err));
    else
        assert_int_equal(unlink(path), 0);
    if (bytes)
        assert_int_equal(chmod(path, st.st_mode & 0777), 0);
    refused(f, program, (const char *const[]){"--dir", dir, NULL}, code, what);
    OK(sh_file_write_atomic(path, was, n, err));
    assert_int_equal(chmod(path, st.st_mode & 0777), 0);
    free(was);
}

static void refused_when_readable(e2e_fleet *f, const char *program, const char *dir,
                                  const char *name, int code)
{
    char path[SH_PATH_BYTES];
    in_dir(path, dir, name);
    assert_int_equal(chmod(path, 0644), 0);
    refused(f, program, (const char *const[]){"--dir", dir, NULL}, code, "chmod 600");
    assert_int_equal(chmod(path, 0600), 0);
}

static void a_wrong_folder_is_one_clear_line(void **state)
{
    e2e_fleet *f = *state;
    const char *node = f->nodes[0].dir, *aggregator = f->aggregator_dir;
    refused_when_readable(f, "shoal-node", node, "node.key", 2);
    refused_when_readable(f, "shoal-node", node, "admin.key", 2);
    refused_when_readable(f, "shoal-aggregator", aggregator, "aggregator.key", 2);
    refused_when_readable(f, "shoal-aggregator", aggregator, "admin.key", 2);
    refused_when_readable(f, "shoal-aggregator", aggregator, "release.key", 2);
    refused_with(f, "shoal-node", node, "node.key", "public 12\n", 2, "node.key");
    refused_with(f, "shoal-node", node, "aggregator.pub", "not a key\n", 2, "aggregator.pub");
    refused_with(f, "shoal-node", node, "release.pub", NULL, 2, "release.pub");
    refused_with(f, "shoal-node", node, "genesis.manifest", "nothing", 2, "genesis.manifest");
    refused_with(f, "shoal-node", node, "node.yaml", "a: [\n", 2, "node.yaml");
    refused_with(f, "shoal-node", node, "node.yaml", "http: {prot: 1}\n", 2, "http.prot");
    refused_with(f, "shoal-aggregator", aggregator, "aggregator.yaml", "a: [\n", 2,
                 "aggregator.yaml");
    refused_with(f, "shoal-aggregator", aggregator, "aggregator.yaml", "learn: {buffer: many}\n", 2,
                 "learn.buffer");
    refused(f, "shoal-node", (const char *const[]){"--dir", node, "--config", "/nonexistent", NULL},
            2, "/nonexistent");
    refused(f, "shoal-aggregator",
            (const char *const[]){"--dir", aggregator, "--config", "/nonexistent", NULL}, 2,
            "/nonexistent");
    refused(f, "shoal-node", (const char *const[]){"--dir", node, "--config", node, NULL}, 1, node);
    /* And nothing of all that is left behind: both start, and keep others out. */
    e2e_fleet_start(f);
    refused(f, "shoal-node", (const char *const[]){"--dir", node, NULL}, 1, "another shoal-node");
    refused(f, "shoal-aggregator", (const char *const[]){"--dir", aggregator, NULL}, 1,
            "another shoal-aggregator");
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    e2e_fleet_stop(f);
}

/* ---- sample configurations ---- */

static void save_sample(e2e_fleet *f, const char *program, const char *path)
{
    run_result r =
        run_program(e2e_program(f, program), (const char *const[]){"sample-config", NULL}, NULL, 0);
    assert_int_equal(r.exit_code, 0);
    assert_true(r.n_out > 1000 && r.n_err == 0);
    OK(sh_file_write_atomic(path, r.out, r.n_out, err));
    run_release(&r);
}

static void sample_configurations_are_read_back(void **state)
{
    e2e_fleet *f = *state;
    char node[SH_PATH_BYTES], aggregator[SH_PATH_BYTES], listen[64];
    in_dir(node, f->root.path, "sample-node.yaml");
    in_dir(aggregator, f->root.path, "sample-aggregator.yaml");
    save_sample(f, "shoal-node", node);
    save_sample(f, "shoal-aggregator", aggregator);
    snprintf(listen, sizeof listen, "tcp://127.0.0.1:%u", f->port);
    f->node_words = (const char *const[]){"--config", node, NULL};
    f->aggregator_words = (const char *const[]){"--config", aggregator, "--listen", listen, NULL};
    e2e_fleet_start(f);
    char id[64];
    probe_complete(f->nodes[0].port, "as by default", "bob", id);
    e2e_fleet_stop(f);
}

/* ---- units ---- */

static void units_are_verified(void **state)
{
    e2e_fleet *f = *state;
    static const char *const units[][2] = {{"edge-node", "shoal-node"},
                                           {"aggregator", "shoal-aggregator"}};
    const char *tool = "/usr/bin/systemd-analyze";
    if (access(tool, X_OK) != 0) {
        print_message("SKIP: the systemd units: there is no %s\n", tool);
        skip();
    }
    for (size_t i = 0; i < SH_COUNT(units); i++) {
        char path[SH_PATH_BYTES], name[64], start[64];
        snprintf(path, sizeof path, SHOAL_SOURCE_DIR "/%s/%s.service", units[i][0], units[i][1]);
        char *unit = read_text(path), *copy = NULL;
        snprintf(start, sizeof start, "/bin/%s run --dir /var/lib/%s\n", units[i][1], units[i][1]);
        char *at = strstr(unit, "\nExecStart="), *rest = at ? strstr(at, start) : NULL;
        if (!rest || !strstr(unit, "\nNoNewPrivileges=yes\n") ||
            !strstr(unit, "\nProtectSystem=strict\n") || !strstr(unit, "\nPrivateTmp=yes\n") ||
            !strstr(unit, "\nMemoryMax="))
            fail_msg("%s: no ExecStart of the program, or it is not hardened", path);
        /* The program is not installed here: the one that was built stands in. */
        *at = 0;
        assert_true(asprintf(&copy, "%s\nExecStart=%s%s", unit, e2e_program(f, units[i][1]),
                             strchr(rest, ' ')) > 0);
        snprintf(name, sizeof name, "%s.service", units[i][1]);
        in_dir(path, f->root.path, name);
        OK(sh_file_write_atomic(path, copy, strlen(copy), err));
        run_result r = run_program(tool, (const char *const[]){"verify", path, NULL}, NULL, 0);
        if (r.exit_code != 0 || strstr(r.err, name))
            fail_msg("%s: %s%s", name, r.out, r.err);
        run_release(&r);
        free(copy);
        free(unit);
    }
}

/* ---- the runbook ---- */

/* Both programs after some work, so that every metric has something to say. */
static void scrape(e2e_fleet *f)
{
    char id[64], at[64];
    unsigned port;
    e2e_fleet_start(f);
    for (int i = 0; i < INFERENCES; i++) {
        char prompt[64];
        snprintf(prompt, sizeof prompt, "%c word and another %d", 'a' + i % 26, i);
        probe_complete(f->nodes[0].port, prompt, "bob", id);
        assert_int_equal(probe_feedback(f->nodes[0].port, id, i % 2 ? "accept" : "reject", NULL),
                         200);
    }
    assert_true(e2e_saw(&f->nodes[0].process, "event=window index="));
    assert_true(e2e_saw(&f->nodes[0].process, "event=checked_in"));
    E2E_UNTIL(probe_ask(f->nodes[0].port, "GET", "/metrics", NULL, pages, sizeof pages) == 200 &&
                  strstr(pages, "\nshoal_quality_token_nll "),
              "the node's metrics");
    size_t n = strlen(pages);
    assert_true(e2e_value(&f->aggregator, "event=ready", "http", at, sizeof at));
    assert_int_equal(sscanf(at, "127.0.0.1:%u", &port), 1);
    assert_int_equal(probe_ask(port, "GET", "/metrics", NULL, pages + n, sizeof pages - n), 200);
    assert_true(strlen(pages) > n);
}

/* A sample of this name is on the pages, with these labels (`{a="b"}`) where there are some. */
static bool is_exposed(const char *name, const char *labels)
{
    size_t n = strlen(name);
    for (const char *line = pages; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, n) != 0 || (line[n] != ' ' && line[n] != '{'))
            continue;
        char sample[512];
        snprintf(sample, sizeof sample, "%.*s", (int)strcspn(line, "\n"), line);
        if (!labels[0] || strstr(sample, labels))
            return true;
    }
    return false;
}

/* Labels whose value is written only once it happens. */
static bool is_dynamic(const char *name)
{
    return strcmp(name, "shoal_inference_requests_total") == 0;
}

/* Every metric that a text names. Returns how many. */
static unsigned check_metrics(const char *path, const char *text)
{
    unsigned n = 0;
    for (const char *at = text; (at = strstr(at, "shoal_")) != NULL;) {
        char name[NAME_BYTES], labels[NAME_BYTES] = "";
        size_t length = 0;
        while (islower((unsigned char)at[length]) || isdigit((unsigned char)at[length]) ||
               at[length] == '_')
            length++;
        snprintf(name, sizeof name, "%.*s", (int)length, at);
        at += length;
        if (*at == '{') /* one label is what they use */
            snprintf(labels, sizeof labels, "%.*s", (int)strcspn(at + 1, "}"), at + 1);
        if (!is_exposed(name, is_dynamic(name) ? "" : labels))
            fail_msg("%s: neither program exposes %s{%s}", path, name, labels);
        n++;
    }
    return n;
}

static void alerts_name_pages_and_metrics_that_exist(void **state)
{
    char page[SH_PATH_BYTES];
    unsigned alerts = 0, named = 0;
    scrape(*state);
    char *text = read_text(RUNBOOK "alerts.yaml");
    for (const char *at = text; (at = strstr(at, "- alert: ")) != NULL; at++)
        alerts++;
    for (const char *at = text; (at = strstr(at, "runbook: ")) != NULL; at++, named++) {
        snprintf(page, sizeof page, RUNBOOK "%.*s", (int)strcspn(at + 9, ",}"), at + 9);
        if (access(page, R_OK) != 0)
            fail_msg("alerts.yaml: there is no page %s", page);
    }
    assert_true(alerts >= 10);
    assert_int_equal(named, alerts);
    assert_true(check_metrics("alerts.yaml", text) >= alerts);
    free(text);
    e2e_fleet_stop(*state);
}

/* All sources of the two daemons, one after the other. */
static char *read_sources(void)
{
    static const char *const dirs[] = {SHOAL_SOURCE_DIR "/edge-node",
                                       SHOAL_SOURCE_DIR "/aggregator"};
    sh_buf all;
    sh_buf_init(&all, 64u << 20);
    for (size_t i = 0; i < SH_COUNT(dirs); i++) {
        DIR *d = opendir(dirs[i]);
        assert_non_null(d);
        for (struct dirent *e; (e = readdir(d)) != NULL;) {
            char path[SH_PATH_BYTES];
            size_t n = strlen(e->d_name);
            if (n < 3 || strcmp(e->d_name + n - 2, ".c") != 0)
                continue;
            in_dir(path, dirs[i], e->d_name);
            char *text = read_text(path);
            assert_int_equal(sh_buf_append(&all, text, strlen(text)), SH_OK);
            free(text);
        }
        closedir(d);
    }
    assert_int_equal(sh_buf_append(&all, "", 1), SH_OK);
    return (char *)all.data; /* the buffer's own memory: freed by the caller */
}

/* Every event that a page names is logged by one of the programs. */
static void check_events(const char *path, const char *text, const char *sources)
{
    for (const char *at = text; (at = strstr(at, "event=")) != NULL;) {
        char event[NAME_BYTES];
        at += strlen("event=");
        size_t length = 0;
        while (islower((unsigned char)at[length]) || at[length] == '_')
            length++;
        snprintf(event, sizeof event, "\"%.*s\", ", (int)length, at);
        const char *logged = strstr(sources, event);
        if (!logged)
            fail_msg("%s: no program logs event=%.*s", path, (int)length, at);
    }
}

static void pages_name_what_exists_and_are_listed(void **state)
{
    unsigned n = 0;
    scrape(*state);
    char *index = read_text(RUNBOOK "README.md"), *sources = read_sources();
    DIR *d = opendir(RUNBOOK);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char path[SH_PATH_BYTES], link[NAME_BYTES];
        size_t length = strlen(e->d_name);
        if (length < 4 || strcmp(e->d_name + length - 3, ".md") != 0)
            continue;
        snprintf(path, sizeof path, RUNBOOK "%s", e->d_name);
        snprintf(link, sizeof link, "(%.*s)", (int)sizeof link - 3, e->d_name);
        if (strcmp(e->d_name, "README.md") != 0 && !strstr(index, link))
            fail_msg("%s is not in the runbook's list", e->d_name);
        char *text = read_text(path);
        (void)check_metrics(path, text);
        check_events(path, text, sources);
        free(text);
        n++;
    }
    closedir(d);
    assert_true(n > 15);
    /* An alarm names its metric, and each metric has its page. */
    for (int m = 0; m < SH_METRICS; m++) {
        char path[SH_PATH_BYTES];
        snprintf(path, sizeof path, RUNBOOK "drift-%s.md", sh_metric_name((sh_metric)m));
        if (access(path, R_OK) != 0)
            fail_msg("there is no page %s", path);
    }
    free(index);
    free(sources);
    e2e_fleet_stop(*state);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_wrong_folder_is_one_clear_line, make, release),
        cmocka_unit_test_setup_teardown(sample_configurations_are_read_back, make, release),
        cmocka_unit_test_setup_teardown(units_are_verified, make, release),
        cmocka_unit_test_setup_teardown(alerts_name_pages_and_metrics_that_exist, make, release),
        cmocka_unit_test_setup_teardown(pages_name_what_exists_and_are_listed, make, release),
    };
    if (argc != 2)
        return 2;
    bin = realpath(argv[1], NULL); /* a unit names an absolute path */
    if (!bin)
        return 2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
