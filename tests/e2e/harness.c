#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/harness.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/model/tiny.h"

#define LOG_MAX     (16u << 20)
#define LOOK_MS     10
#define ENVIRON_MAX 512
#define CONTEXT     256 /* of the base model: prompts and texts are longer than tiny.h's 64 */
#define PORT_FIRST  20000
#define PORT_LAST   30000
#define SUITE_BYTES 4000
#define LOG_SHOWN   6000

extern char **environ;

static const e2e_fleet *fleet; /* that was made and not released: a test has one */

void e2e_pause(void)
{
    (void)poll(NULL, 0, LOOK_MS);
}

/* ---- a process ---- */

/* fork, not posix_spawn: the child must ask to die with its parent before it becomes the program.
 * Between the two it calls nothing but what a signal handler may. */
static void become(const char *const *words, char **environment, int log, pid_t parent)
{
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(log, 2) < 0)
        _exit(126);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
        _exit(126);
    execve(words[0], (char *const *)(uintptr_t)words, environment);
    _exit(127);
}

void e2e_start(e2e_process *p, const char *const *words, const char *failpoints)
{
    static char line[256];
    static char *environment[ENVIRON_MAX];
    size_t n = 0;
    assert_int_equal(p->pid, 0);
    for (char **e = environ; *e && n < ENVIRON_MAX - 2; e++)
        if (strncmp(*e, "SHOAL_FAILPOINTS=", 17) != 0)
            environment[n++] = *e;
    if (failpoints) {
        snprintf(line, sizeof line, "SHOAL_FAILPOINTS=%s", failpoints);
        environment[n++] = line;
    }
    environment[n] = NULL;
    if (access(words[0], X_OK) != 0)
        fail_msg("%s: not there", words[0]);
    int log = open(p->log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    assert_true(log >= 0);
    pid_t self = getpid(), pid = fork();
    if (pid == 0)
        become(words, environment, log, self);
    close(log);
    assert_true(pid > 0);
    p->pid = pid;
}

bool e2e_runs(e2e_process *p)
{
    siginfo_t info = {0};
    if (p->pid == 0)
        return false;
    assert_int_equal(waitid(P_PID, (id_t)p->pid, &info, WEXITED | WNOHANG | WNOWAIT), 0);
    return info.si_pid == 0;
}

char *e2e_log(const e2e_process *p)
{
    uint8_t *text = NULL;
    size_t n = 0;
    if (sh_file_read(p->log, LOG_MAX, &text, &n, NULL) != SH_OK)
        return calloc(1, 1);
    return (char *)text;
}

bool e2e_logged(const e2e_process *p, const char *text)
{
    char *log = e2e_log(p);
    bool there = strstr(log, text) != NULL;
    free(log);
    return there;
}

/* Without what repeats; not by cmocka, which cuts a message at 1024 bytes. */
static void show_log(const e2e_process *p)
{
    char *log = e2e_log(p), *rest = log, *kept = log;
    for (char *line; (line = strsep(&rest, "\n")) != NULL;) {
        size_t n = strlen(line);
        if (n == 0 || strstr(line, "event=checked_in "))
            continue;
        memmove(kept, line, n);
        kept[n] = '\n';
        kept += n + 1;
    }
    const size_t n = (size_t)(kept - log), shown = SH_MIN(n, LOG_SHOWN);
    fprintf(stderr, "%s:\n%.*s\n", p->log, (int)shown, log + n - shown);
    free(log);
}

void e2e_too_late(const char *what)
{
    if (fleet)
        show_log(&fleet->aggregator);
    for (unsigned i = 0; fleet && i < fleet->n_nodes; i++)
        show_log(&fleet->nodes[i].process);
    fail_msg("%s: did not happen in %d s", what, E2E_WAIT_MS / 1000);
}

bool e2e_saw(e2e_process *p, const char *text)
{
    for (uint64_t end = sh_clock_mono_ms() + E2E_WAIT_MS; sh_clock_mono_ms() < end; e2e_pause()) {
        bool runs = e2e_runs(p); /* looked at first: the log of an ended one is whole */
        if (e2e_logged(p, text))
            return true;
        if (!runs)
            return false;
    }
    show_log(p);
    fail_msg("'%s' did not come into the log", text);
    return false;
}

bool e2e_value(const e2e_process *p, const char *event, const char *key, char *out, size_t n)
{
    char *log = e2e_log(p), *line = strstr(log, event), name[48];
    snprintf(name, sizeof name, " %s=", key);
    if (line)
        line[strcspn(line, "\n")] = 0;
    char *at = line ? strstr(line, name) : NULL;
    if (at)
        snprintf(out, n, "%.*s", (int)strcspn(at + strlen(name), " "), at + strlen(name));
    free(log);
    return at != NULL;
}

int e2e_wait(e2e_process *p)
{
    int how = 0;
    for (uint64_t end = sh_clock_mono_ms() + E2E_WAIT_MS; e2e_runs(p); e2e_pause())
        if (sh_clock_mono_ms() > end) {
            show_log(p);
            fail_msg("%s: the process does not end", p->log);
        }
    assert_int_equal(waitpid(p->pid, &how, 0), p->pid);
    p->pid = 0;
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

int e2e_end(e2e_process *p, int signal_number)
{
    assert_true(p->pid > 0);
    assert_int_equal(kill(p->pid, signal_number), 0);
    return e2e_wait(p);
}

void e2e_expect_death(e2e_process *p, const char *failpoint)
{
    char text[96];
    snprintf(text, sizeof text, "event=failpoint name=%s", failpoint);
    if (!e2e_saw(p, text)) {
        show_log(p);
        fail_msg("it ended by itself, without '%s'", text);
    }
    assert_int_equal(e2e_wait(p), 128 + SIGKILL);
}

unsigned e2e_free_port(void)
{
    static unsigned turn;
    for (unsigned i = 0; i < PORT_LAST - PORT_FIRST; i++) {
        unsigned port = PORT_FIRST + ((unsigned)getpid() * 16 + turn++) % (PORT_LAST - PORT_FIRST);
        struct sockaddr_in at = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)port),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_true(fd >= 0);
        bool free_port = bind(fd, (struct sockaddr *)&at, sizeof at) == 0;
        close(fd);
        if (free_port)
            return port;
    }
    fail_msg("no free port from %d to %d", PORT_FIRST, PORT_LAST);
    return 0;
}

/* ---- a fleet ---- */

const char *e2e_program(const e2e_fleet *f, const char *name)
{
    static char paths[8][SH_PATH_BYTES];
    static unsigned turn;
    char *path = paths[turn++ % SH_COUNT(paths)];
    OK(sh_path_join(path, SH_PATH_BYTES, f->bin, name, err));
    return path;
}

/* A tool that must succeed. */
static void run_tool(const char *program, const char *const *words)
{
    run_result r = run_program(program, words, NULL, 0);
    if (r.exit_code != 0)
        fail_msg("%s %s: exit code %d: %s%s", program, words[0], r.exit_code, r.out, r.err);
    run_release(&r);
}

static void make_inputs(e2e_fleet *f, char *base, char *suites)
{
    tiny_options tiny = tiny_defaults(3);
    char text[SUITE_BYTES];
    tiny.context = CONTEXT;
    tiny.layers = f->layers ? f->layers : tiny.layers;
    OK(tiny_write(&tiny, base, err));
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = i % 7 == 6 ? ' ' : (char)('a' + i * i % 26);
    OK(sh_dir_make(suites, err));
    char path[SH_PATH_BYTES];
    OK(sh_path_join(path, sizeof path, suites, "words.txt", err));
    OK(sh_file_write_atomic(path, text, sizeof text, err));
}

/* The relay above a relay; NULL: the aggregator is. */
static const e2e_relay *above(const e2e_fleet *f, unsigned relay)
{
    return f->chain && relay > 0 ? &f->relays[relay - 1] : NULL;
}

/* The relay that a node belongs to; NULL: the aggregator's. */
static const e2e_relay *relay_of(const e2e_fleet *f, unsigned node)
{
    if (f->n_relays == 0)
        return NULL;
    return &f->relays[f->chain ? f->n_relays - 1 : node % f->n_relays];
}

static void make_relay(e2e_fleet *f, unsigned i)
{
    const e2e_relay *parent = above(f, i);
    e2e_relay *relay = &f->relays[i];
    char bundle[SH_PATH_BYTES], listen[64], upstream[64];
    relay->port = e2e_free_port();
    snprintf(relay->name, sizeof relay->name, "relay-%u", i);
    snprintf(relay->dir, sizeof relay->dir, "%s/relays/relay-%u", f->root.path, i);
    snprintf(relay->process.log, sizeof relay->process.log, "%s/relay-%u.log", f->root.path, i);
    snprintf(listen, sizeof listen, "tcp://127.0.0.1:%u", relay->port);
    snprintf(upstream, sizeof upstream, "tcp://127.0.0.1:%u", parent ? parent->port : f->port);
    OK(sh_path_join(bundle, sizeof bundle, parent ? parent->dir : f->aggregator_dir, "bundle",
                    err));
    run_result r =
        run_program(e2e_program(f, "shoal-aggregator"),
                    (const char *const[]){"init", "--dir", relay->dir, "--relay", bundle,
                                          "--upstream", upstream, "--listen", listen, NULL},
                    NULL, 0);
    if (r.exit_code != 0 || sscanf(r.out, "public key %64s", relay->key) != 1)
        fail_msg("%s: exit code %d: %s%s", relay->dir, r.exit_code, r.out, r.err);
    run_release(&r);
}

/* The folder of the aggregator or relay that a node belongs to. */
static const char *center_of(const e2e_fleet *f, unsigned i)
{
    const e2e_relay *relay = relay_of(f, i);
    return relay ? relay->dir : f->aggregator_dir;
}

static void make_node(e2e_fleet *f, unsigned i)
{
    e2e_node *n = &f->nodes[i];
    const e2e_relay *relay = relay_of(f, i);
    unsigned port = relay ? relay->port : f->port;
    char bundle[SH_PATH_BYTES], endpoint[64], path[SH_PATH_BYTES];
    snprintf(n->name, sizeof n->name, "node-%u", i);
    snprintf(n->dir, sizeof n->dir, "%s/nodes/%s", f->root.path, n->name);
    snprintf(n->process.log, sizeof n->process.log, "%s/%s.log", f->root.path, n->name);
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:%u", n->dial ? n->dial : port);
    OK(sh_path_join(bundle, sizeof bundle, center_of(f, i), "bundle", err));
    run_result r = run_program(e2e_program(f, "shoal-node"),
                               (const char *const[]){"init", "--dir", n->dir, "--bundle", bundle,
                                                     "--aggregator", endpoint, NULL},
                               NULL, 0);
    if (r.exit_code != 0 || sscanf(r.out, "public key %64s", n->key) != 1)
        fail_msg("%s: exit code %d: %s%s", n->dir, r.exit_code, r.out, r.err);
    run_release(&r);
    OK(sh_path_join(path, sizeof path, n->dir, "node.yaml", err));
    assert_true(sh_file_exists(path));
}

void e2e_fleet_make(e2e_fleet *f, unsigned n_nodes)
{
    char base[SH_PATH_BYTES], suites[SH_PATH_BYTES], listen[64];
    assert_true(n_nodes <= E2E_NODES_MAX);
    OK(sh_crypto_init(err));
    f->root = temp_dir_make();
    f->n_nodes = n_nodes;
    fleet = f;
    f->port = e2e_free_port();
    snprintf(f->aggregator_dir, sizeof f->aggregator_dir, "%s/aggregator", f->root.path);
    snprintf(f->aggregator.log, sizeof f->aggregator.log, "%s/aggregator.log", f->root.path);
    snprintf(listen, sizeof listen, "tcp://127.0.0.1:%u", f->port);
    OK(sh_path_join(base, sizeof base, f->root.path, "base.gguf", err));
    OK(sh_path_join(suites, sizeof suites, f->root.path, "suites", err));
    OK(sh_dir_make(temp_path(&f->root, "nodes"), err));
    make_inputs(f, base, suites);
    run_tool(e2e_program(f, "shoal-aggregator"),
             (const char *const[]){"init", "--dir", f->aggregator_dir, "--base", base, "--suites",
                                   suites, "--listen", listen, NULL});
    if (f->n_relays > 0)
        OK(sh_dir_make(temp_path(&f->root, "relays"), err));
    for (unsigned i = 0; i < f->n_relays; i++)
        make_relay(f, i);
    for (unsigned i = 0; i < n_nodes; i++)
        make_node(f, i);
}

void e2e_fleet_release(e2e_fleet *f)
{
    for (unsigned i = 0; i < f->n_nodes; i++)
        if (f->nodes[i].process.pid > 0)
            (void)e2e_end(&f->nodes[i].process, SIGKILL);
    for (unsigned i = 0; i < f->n_relays; i++)
        if (f->relays[i].process.pid > 0)
            (void)e2e_end(&f->relays[i].process, SIGKILL);
    if (f->aggregator.pid > 0)
        (void)e2e_end(&f->aggregator, SIGKILL);
    if (f->root.path[0])
        temp_dir_remove(&f->root);
    fleet = NULL;
}

static void add_words(const char **words, size_t *n, const char *const *more)
{
    for (size_t i = 0; more && more[i]; i++) {
        assert_true(*n < E2E_WORDS_MAX - 1);
        words[(*n)++] = more[i];
    }
    words[*n] = NULL;
}

static void center_start(const e2e_fleet *f, e2e_process *p, const char *dir,
                         const char *const *more, const char *failpoints)
{
    const char *words[E2E_WORDS_MAX];
    size_t n = 0;
    const char *const own[] = {e2e_program(f, "shoal-aggregator"),
                               "run",
                               "--dir",
                               dir,
                               "--http.port",
                               "0",
                               "--checkin-ms",
                               "200",
                               "--jobs.threads",
                               "1",
                               NULL};
    add_words(words, &n, own);
    add_words(words, &n, more);
    e2e_start(p, words, failpoints);
}

void e2e_aggregator_start(e2e_fleet *f, const char *failpoints)
{
    center_start(f, &f->aggregator, f->aggregator_dir, f->aggregator_words, failpoints);
}

void e2e_relay_start(e2e_fleet *f, unsigned r, const char *failpoints)
{
    e2e_relay *relay = &f->relays[r];
    center_start(f, &relay->process, relay->dir, f->relay_words, failpoints);
}

bool e2e_aggregator_ready(e2e_fleet *f)
{
    return e2e_saw(&f->aggregator, "event=ready");
}

void e2e_node_start(e2e_fleet *f, unsigned i, const char *failpoints)
{
    const char *words[E2E_WORDS_MAX];
    size_t n = 0;
    const char *const own[] = {e2e_program(f, "shoal-node"),
                               "run",
                               "--dir",
                               f->nodes[i].dir,
                               "--http.port",
                               "0",
                               "--retry.min-ms",
                               "50",
                               "--retry.max-ms",
                               "500",
                               "--store.commit-ms",
                               "50",
                               "--confirm-inferences",
                               "3",
                               "--train.idle=false", /* the machine is never idle in a test */
                               NULL};
    add_words(words, &n, own);
    add_words(words, &n, f->node_words);
    add_words(words, &n, f->nodes[i].words);
    e2e_start(&f->nodes[i].process, words, failpoints);
}

bool e2e_node_ready(e2e_fleet *f, unsigned i)
{
    char address[64];
    if (!e2e_saw(&f->nodes[i].process, "event=ready"))
        return false;
    assert_true(e2e_value(&f->nodes[i].process, "event=ready", "http", address, sizeof address));
    assert_int_equal(sscanf(address, "127.0.0.1:%u", &f->nodes[i].port), 1);
    return true;
}

static json_t *tool(e2e_fleet *f, const char *dir, const char *const *words, int *code);

static void enrol_key(e2e_fleet *f, const char *dir, const char *key, const char *name,
                      const char *more)
{
    int code;
    json_t *reply =
        tool(f, dir, (const char *const[]){"enrol", key, "--name", name, more, NULL}, &code);
    assert_int_equal(code, 0);
    json_decref(reply);
}

void e2e_fleet_start(e2e_fleet *f)
{
    e2e_aggregator_start(f, NULL);
    if (!e2e_aggregator_ready(f)) {
        show_log(&f->aggregator);
        fail_msg("the aggregator does not start");
    }
    for (unsigned i = 0; i < f->n_relays; i++) {
        const e2e_relay *parent = above(f, i);
        enrol_key(f, parent ? parent->dir : f->aggregator_dir, f->relays[i].key, f->relays[i].name,
                  "--relay");
        e2e_relay_start(f, i, NULL);
        if (!e2e_saw(&f->relays[i].process, "event=ready")) {
            show_log(&f->relays[i].process);
            fail_msg("%s does not start", f->relays[i].name);
        }
    }
    for (unsigned i = 0; i < f->n_nodes; i++) {
        e2e_enrol(f, i);
        e2e_node_start(f, i, NULL);
    }
    for (unsigned i = 0; i < f->n_nodes; i++)
        if (!e2e_node_ready(f, i)) {
            show_log(&f->nodes[i].process);
            fail_msg("%s does not start", f->nodes[i].name);
        }
}

static void stop_one(e2e_process *p)
{
    if (p->pid == 0)
        return;
    int code = e2e_wait(p);
    if (code != 0) {
        show_log(p);
        fail_msg("%s: exit code %d after SIGTERM", p->log, code);
    }
    assert_true(e2e_logged(p, "event=stop reason=SIGTERM"));
}

void e2e_fleet_stop(e2e_fleet *f)
{
    for (unsigned i = 0; i < f->n_nodes; i++)
        if (f->nodes[i].process.pid > 0)
            kill(f->nodes[i].process.pid, SIGTERM);
    for (unsigned i = 0; i < f->n_nodes; i++)
        stop_one(&f->nodes[i].process);
    for (unsigned i = 0; i < f->n_relays; i++)
        if (f->relays[i].process.pid > 0)
            kill(f->relays[i].process.pid, SIGTERM);
    for (unsigned i = 0; i < f->n_relays; i++)
        stop_one(&f->relays[i].process);
    if (f->aggregator.pid > 0)
        kill(f->aggregator.pid, SIGTERM);
    stop_one(&f->aggregator);
}

/* ---- tools ---- */

static json_t *tool(e2e_fleet *f, const char *dir, const char *const *words, int *code)
{
    const char *all[RUN_ARGS_MAX] = {"aggregator"};
    size_t n = 1;
    add_words(all, &n, words);
    add_words(all, &n, (const char *const[]){"--dir", dir, "--json", NULL});
    run_result r = run_program(e2e_program(f, "shoal"), all, NULL, 0);
    json_t *reply = r.exit_code == 0 ? json_loads(r.out, 0, NULL) : NULL;
    *code = r.exit_code;
    if (r.exit_code == 0)
        assert_non_null(reply);
    else if (r.n_err == 0 || strchr(r.err, '\n') != r.err + r.n_err - 1)
        fail_msg("%s: exit code %d, and not one line: '%s'", words[0], r.exit_code, r.err);
    run_release(&r);
    return reply;
}

json_t *e2e_tool(e2e_fleet *f, const char *const *words, int *code)
{
    return tool(f, f->aggregator_dir, words, code);
}

json_t *e2e_relay_status(e2e_fleet *f, unsigned r)
{
    int code;
    return tool(f, f->relays[r].dir, (const char *const[]){"status", NULL}, &code);
}

void e2e_command(e2e_fleet *f, const char *word, const char *argument)
{
    int code;
    json_t *reply = e2e_tool(f, (const char *const[]){word, argument, NULL}, &code);
    if (code != 0)
        fail_msg("%s: exit code %d", word, code);
    json_decref(reply);
}

void e2e_enrol(e2e_fleet *f, unsigned i)
{
    enrol_key(f, center_of(f, i), f->nodes[i].key, f->nodes[i].name, NULL);
}

json_t *e2e_node_status(e2e_fleet *f, unsigned i)
{
    run_result r = run_program(
        e2e_program(f, "shoal-node"),
        (const char *const[]){"status", "--dir", f->nodes[i].dir, "--json", NULL}, NULL, 0);
    json_t *reply = r.exit_code == 0 ? json_loads(r.out, 0, NULL) : NULL;
    run_release(&r);
    return reply;
}

int64_t e2e_int(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_integer(value) ? (int64_t)json_integer_value(value) : -1;
}

int64_t e2e_node_int(e2e_fleet *f, unsigned i, const char *key)
{
    json_t *status = e2e_node_status(f, i);
    int64_t n = e2e_int(status, key);
    json_decref(status);
    return n;
}

uint64_t e2e_newest_release(e2e_fleet *f)
{
    int code;
    json_t *status = e2e_tool(f, (const char *const[]){"status", NULL}, &code);
    if (code != 0)
        show_log(&f->aggregator);
    assert_int_equal(code, 0);
    int64_t version = e2e_int(status, "release");
    json_decref(status);
    return version > 0 ? (uint64_t)version : 0;
}

static bool settled(e2e_fleet *f, unsigned i, uint64_t version)
{
    json_t *s = e2e_node_status(f, i);
    bool yes =
        e2e_int(s, "confirmed_version") == (int64_t)version && e2e_int(s, "outbox_items") == 0;
    json_decref(s);
    return yes;
}

static bool owes_nothing(e2e_fleet *f, unsigned relay)
{
    json_t *s = e2e_relay_status(f, relay);
    bool yes = e2e_int(s, "buffered") == 0 && e2e_int(json_object_get(s, "parent"), "owed") == 0;
    json_decref(s);
    return yes;
}

uint64_t e2e_settle(e2e_fleet *f)
{
    e2e_command(f, "close", NULL);
    if (!e2e_saw(&f->aggregator, "event=closed"))
        fail_msg("the aggregator ended");
    uint64_t version = e2e_newest_release(f);
    for (unsigned i = 0; i < f->n_nodes; i++)
        E2E_UNTIL(settled(f, i, version), f->nodes[i].name);
    for (unsigned i = f->n_relays; i-- > 0;) /* of a chain the lowest first */
        E2E_UNTIL(owes_nothing(f, i), f->relays[i].name);
    return version;
}

json_t *e2e_audit(e2e_fleet *f)
{
    run_result r = run_program(e2e_program(f, "shoal-audit"),
                               (const char *const[]){"--dir", f->root.path, NULL}, NULL, 0);
    if (r.exit_code != 0)
        fail_msg("audit: exit code %d: %s%s", r.exit_code, r.out, r.err);
    json_t *document = json_loads(r.out, 0, NULL);
    assert_non_null(document);
    run_release(&r);
    return document;
}
