#include "edge-node/probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"

#define SYSFS_ROOT    "/sys"
#define SYSFS_DEVICES 64u   /* of a class; more are not looked at */
#define LOOPBACK_TYPE "772" /* ARPHRD_LOOPBACK */
#define IDLE_FOR_EVER ((int64_t)1 << 53)

extern char **environ;

static const sh_probe_value unknown_value = {false, 0};

static sh_probe_value known(int64_t value)
{
    return (sh_probe_value){true, value};
}

const char *sh_probe_name(sh_probe_signal signal)
{
    static const char *const names[SH_PROBES] = {"network", "metered", "power", "idle",
                                                 "temperature"};
    return names[signal];
}

/* ---- sources ---- */

static sh_status split(sh_probe *p, sh_error *err)
{
    size_t n = 0;
    char *save = NULL;
    for (char *word = strtok_r(p->text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        if (n == SH_PROBE_ARGS_MAX)
            return sh_fail(err, SH_ERR_USAGE, "probe.%s: more than %d words",
                           sh_probe_name(p->signal), SH_PROBE_ARGS_MAX);
        p->argv[n++] = word;
    }
    p->argv[n] = NULL;
    if (n > 0)
        return SH_OK;
    return sh_fail(err, SH_ERR_USAGE, "probe.%s: command: which one?", sh_probe_name(p->signal));
}

static sh_status set_text(sh_probe *p, sh_probe_kind kind, const char *text, sh_error *err)
{
    p->kind = kind;
    if (strlen(text) >= sizeof p->text)
        return sh_fail(err, SH_ERR_USAGE, "probe.%s: more than %zu bytes", sh_probe_name(p->signal),
                       sizeof p->text - 1);
    memcpy(p->text, text, strlen(text) + 1);
    if (kind == SH_PROBE_COMMAND)
        return split(p, err);
    if (text[0])
        return SH_OK;
    return sh_fail(err, SH_ERR_USAGE, "probe.%s: the path is missing", sh_probe_name(p->signal));
}

static sh_status set_constant(sh_probe *p, bool yes, sh_error *err)
{
    if (p->signal == SH_PROBE_TEMPERATURE)
        return sh_fail(err, SH_ERR_USAGE, "probe.temperature: '%s' is no temperature",
                       yes ? "always" : "never");
    p->kind = SH_PROBE_CONSTANT;
    p->constant = !yes ? 0 : p->signal == SH_PROBE_IDLE ? IDLE_FOR_EVER : 1;
    return SH_OK;
}

static sh_status set_sysfs(sh_probe *p, const char *root, sh_error *err)
{
    if (p->signal == SH_PROBE_METERED || p->signal == SH_PROBE_IDLE)
        return sh_fail(err, SH_ERR_USAGE,
                       "probe.%s: sysfs does not show it; use file:, command:, always or never",
                       sh_probe_name(p->signal));
    return set_text(p, SH_PROBE_SYSFS, root, err);
}

sh_status sh_probe_parse(sh_probe_signal signal, const char *source, sh_probe *out, sh_error *err)
{
    *out = (sh_probe){.signal = signal};
    if (source == NULL || source[0] == 0)
        return SH_OK;
    if (strcmp(source, "always") == 0 || strcmp(source, "never") == 0)
        return set_constant(out, source[0] == 'a', err);
    if (strcmp(source, "sysfs") == 0)
        return set_sysfs(out, SYSFS_ROOT, err);
    if (strncmp(source, "sysfs:", 6) == 0)
        return set_sysfs(out, source + 6, err);
    if (strncmp(source, "file:", 5) == 0)
        return set_text(out, SH_PROBE_FILE, source + 5, err);
    if (strncmp(source, "command:", 8) == 0)
        return set_text(out, SH_PROBE_COMMAND, source + 8, err);
    return sh_fail(err, SH_ERR_USAGE,
                   "probe.%s: '%.64s' is not sysfs, file:PATH, command:PROGRAM ARG..., always or "
                   "never",
                   sh_probe_name(signal), source);
}

/* ---- what they say ---- */

/* Of at most SH_PROBE_OUTPUT_MAX bytes; text has a 0 behind them. */
static sh_probe_value parse_value(char *text, size_t n)
{
    static const struct {
        const char *word;
        int64_t value;
    } words[] = {{"yes", 1}, {"no", 0}, {"true", 1}, {"false", 0}, {"on", 1}, {"off", 0}};
    while (n > 0 && strchr(" \t\r\n", text[n - 1]) && text[n - 1])
        text[--n] = 0;
    for (size_t i = 0; i < SH_COUNT(words); i++)
        if (strcasecmp(text, words[i].word) == 0)
            return known(words[i].value);
    char *end = NULL;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (n == 0 || errno != 0 || end != text + n || end == text)
        return unknown_value;
    return known(value);
}

/* The start of a file, 0 behind it; SIZE_MAX: it cannot be read. Does not wait for a pipe's writer.
 */
static size_t read_some(const char *path, char *out, size_t out_bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return SIZE_MAX;
    ssize_t n = read(fd, out, out_bytes - 1);
    close(fd);
    if (n < 0)
        return SIZE_MAX;
    out[n] = 0;
    return (size_t)n;
}

static sh_probe_value read_file(const char *path)
{
    char text[SH_PROBE_OUTPUT_MAX + 2];
    size_t n = read_some(path, text, sizeof text);
    return n > SH_PROBE_OUTPUT_MAX ? unknown_value : parse_value(text, n);
}

/* ---- sysfs ---- */

typedef struct {
    const char *root, *class;
    sh_probe_signal signal;
    unsigned devices, sources, yes, maybe; /* seen; that say something; that say yes */
    int64_t most;
} sysfs_walk;

/* One line of ROOT/class/CLASS/DEVICE/NAME; false: it is not there. */
static bool read_attribute(const sysfs_walk *w, const char *device, const char *name, char *out,
                           size_t out_bytes)
{
    char path[SH_PATH_BYTES];
    int n = snprintf(path, sizeof path, "%s/class/%s/%s/%s", w->root, w->class, device, name);
    if (n < 0 || (size_t)n >= sizeof path || read_some(path, out, out_bytes) == SIZE_MAX)
        return false;
    out[strcspn(out, "\n")] = 0;
    return true;
}

static void look_at_network(sysfs_walk *w, const char *device)
{
    char text[32];
    if (read_attribute(w, device, "type", text, sizeof text) && !strcmp(text, LOOPBACK_TYPE))
        return;
    if (!read_attribute(w, device, "operstate", text, sizeof text))
        return;
    w->sources++;
    w->yes += strcmp(text, "up") == 0;
    w->maybe += strcmp(text, "unknown") == 0; /* point-to-point devices say no more */
}

static void look_at_power(sysfs_walk *w, const char *device)
{
    char type[32], text[32];
    if (!read_attribute(w, device, "type", type, sizeof type))
        return;
    if (!strcmp(type, "Mains") || !strncmp(type, "USB", 3)) {
        if (!read_attribute(w, device, "online", text, sizeof text))
            return;
        w->sources++;
        w->yes += text[0] != '0';
    } else if (!strcmp(type, "Battery") && read_attribute(w, device, "status", text, sizeof text)) {
        w->sources += !strcmp(text, "Discharging") || !strcmp(text, "Charging");
        w->yes += !strcmp(text, "Charging");
    }
}

static void look_at_heat(sysfs_walk *w, const char *device)
{
    char text[32];
    if (strncmp(device, "thermal_zone", 12) != 0 ||
        !read_attribute(w, device, "temp", text, sizeof text))
        return;
    sh_probe_value v = parse_value(text, strlen(text));
    if (!v.known)
        return;
    w->most = w->sources == 0 ? v.value : SH_MAX(w->most, v.value);
    w->sources++;
}

/* False: the class's folder is not there. */
static bool walk_class(sysfs_walk *w)
{
    char path[SH_PATH_BYTES];
    int n = snprintf(path, sizeof path, "%s/class/%s", w->root, w->class);
    DIR *dir = n > 0 && (size_t)n < sizeof path ? opendir(path) : NULL;
    if (!dir)
        return false;
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL && w->devices < SYSFS_DEVICES) {
        if (entry->d_name[0] == '.')
            continue;
        w->devices++;
        if (w->signal == SH_PROBE_NETWORK)
            look_at_network(w, entry->d_name);
        else if (w->signal == SH_PROBE_POWER)
            look_at_power(w, entry->d_name);
        else
            look_at_heat(w, entry->d_name);
    }
    closedir(dir);
    return true;
}

static sh_probe_value read_sysfs(const sh_probe *p)
{
    static const char *const classes[SH_PROBES] = {[SH_PROBE_NETWORK] = "net",
                                                   [SH_PROBE_POWER] = "power_supply",
                                                   [SH_PROBE_TEMPERATURE] = "thermal"};
    sysfs_walk w = {.root = p->text, .class = classes[p->signal], .signal = p->signal};
    if (!walk_class(&w))
        return unknown_value;
    if (p->signal == SH_PROBE_POWER && w.devices == 0)
        return known(1); /* a machine without a battery */
    if (p->signal == SH_PROBE_TEMPERATURE)
        return w.sources > 0 ? known(w.most) : unknown_value;
    if (w.yes > 0)
        return known(1);
    if (w.maybe > 0 || (w.sources == 0 && p->signal == SH_PROBE_POWER))
        return unknown_value;
    return known(0);
}

/* ---- commands ---- */

static int spawn(const sh_probe *p, int out, pid_t *pid)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, ours;
    sigemptyset(&none);
    sigemptyset(&ours);
    sigaddset(&ours, SIGPIPE);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    if (posix_spawn_file_actions_init(&files) != 0)
        return ENOMEM;
    if (posix_spawnattr_init(&attributes) != 0) {
        posix_spawn_file_actions_destroy(&files);
        return ENOMEM;
    }
    int rc = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    rc = rc ? rc : posix_spawn_file_actions_adddup2(&files, out, 1);
    rc = rc ? rc : posix_spawn_file_actions_addopen(&files, 2, "/dev/null", O_WRONLY, 0);
    rc = rc ? rc : posix_spawn_file_actions_addclosefrom_np(&files, 3);
    rc = rc ? rc : posix_spawnattr_setsigmask(&attributes, &none);
    rc = rc ? rc : posix_spawnattr_setsigdefault(&attributes, &ours);
    rc = rc ? rc : posix_spawnattr_setpgroup(&attributes, 0);
    rc = rc ? rc
            : posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF |
                                                        POSIX_SPAWN_SETPGROUP);
    rc = rc ? rc : posix_spawnp(pid, p->argv[0], &files, &attributes, p->argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    return rc;
}

/* Waits until fd is readable; false: the time is over, or it is to stop. */
static bool wait_readable(int fd, uint64_t deadline_ms, int stop_fd)
{
    for (;;) {
        struct pollfd fds[2] = {{.fd = fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};
        uint64_t now = sh_clock_mono_ms();
        if (now >= deadline_ms)
            return false;
        int n = poll(fds, 2, (int)SH_MIN(deadline_ms - now, (uint64_t)60000));
        if (n < 0 && errno != EINTR)
            return false;
        if (n > 0 && fds[1].revents)
            return false;
        if (n > 0 && fds[0].revents)
            return true;
    }
}

/* Its output until it closes that, at most out_bytes; SIZE_MAX: not in time. */
static size_t take_output(int fd, char *out, size_t out_bytes, uint64_t deadline_ms, int stop_fd)
{
    size_t n = 0;
    while (n < out_bytes) {
        if (!wait_readable(fd, deadline_ms, stop_fd))
            return SIZE_MAX;
        ssize_t got = read(fd, out + n, out_bytes - n);
        if (got < 0 && errno != EINTR)
            return SIZE_MAX;
        if (got == 0)
            return n;
        n += got > 0 ? (size_t)got : 0;
    }
    return n;
}

static bool ended_well(pid_t pid, uint64_t deadline_ms, int stop_fd)
{
    int how = 0, fd = (int)syscall(SYS_pidfd_open, pid, 0);
    bool ended = fd >= 0 && wait_readable(fd, deadline_ms, stop_fd);
    if (fd >= 0)
        close(fd);
    /* Whatever it started goes with it; and itself, where it did not end. */
    (void)kill(-pid, SIGKILL);
    while (waitpid(pid, &how, 0) < 0 && errno == EINTR)
        ;
    return ended && WIFEXITED(how) && WEXITSTATUS(how) == 0;
}

static sh_probe_value run_command(const sh_probe *p, const sh_probe_limits *limits)
{
    char text[SH_PROBE_OUTPUT_MAX + 2];
    uint64_t deadline = sh_clock_mono_ms() + limits->timeout_ms;
    int fds[2];
    pid_t pid = 0;
    if (pipe2(fds, O_CLOEXEC) != 0)
        return unknown_value;
    int rc = spawn(p, fds[1], &pid);
    close(fds[1]);
    if (rc != 0) {
        close(fds[0]);
        return unknown_value;
    }
    size_t n = take_output(fds[0], text, sizeof text - 1, deadline, limits->stop_fd);
    close(fds[0]);
    bool well = n <= SH_PROBE_OUTPUT_MAX;
    well = ended_well(pid, well ? deadline : 0, limits->stop_fd) && well;
    if (!well)
        return unknown_value;
    text[n] = 0;
    return parse_value(text, n);
}

/* A number that the signal cannot have says nothing. */
static sh_probe_value check(sh_probe_signal signal, sh_probe_value v)
{
    bool bad = signal == SH_PROBE_IDLE          ? v.value < 0
               : signal == SH_PROBE_TEMPERATURE ? v.value < -273150 || v.value > 1000000
                                                : v.value != 0 && v.value != 1;
    return v.known && bad ? unknown_value : v;
}

sh_probe_value sh_probe_read(const sh_probe *probe, const sh_probe_limits *limits)
{
    switch (probe->kind) {
    case SH_PROBE_NONE:
        return unknown_value;
    case SH_PROBE_CONSTANT:
        return known(probe->constant);
    case SH_PROBE_SYSFS:
        return check(probe->signal, read_sysfs(probe));
    case SH_PROBE_FILE:
        return check(probe->signal, read_file(probe->text));
    case SH_PROBE_COMMAND:
        return check(probe->signal, run_command(probe, limits));
    }
    return unknown_value;
}
