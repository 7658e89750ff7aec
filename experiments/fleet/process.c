#include "experiments/fleet/process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/clock.h"

#define REAP_MS 5

extern char **environ;

/* ---- command lines ---- */

void fleet_words_add(fleet_words *w, const char *word)
{
    if (w->n == FLEET_WORDS_MAX)
        w->overflow = true;
    else
        w->words[w->n++] = word;
    w->words[w->n] = NULL;
}

void fleet_words_addf(fleet_words *w, const char *format, ...)
{
    char *at = w->text + w->used;
    size_t room = sizeof w->text - w->used;
    va_list args;
    va_start(args, format);
    int n = vsnprintf(at, room, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= room) {
        w->overflow = true;
        return;
    }
    w->used += (size_t)n + 1;
    fleet_words_add(w, at);
}

void fleet_words_int(fleet_words *w, const char *key, int64_t value)
{
    fleet_words_addf(w, "--%s=%lld", key, (long long)value);
}

void fleet_words_real(fleet_words *w, const char *key, double value)
{
    fleet_words_addf(w, "--%s=%.12g", key, value);
}

/* ---- programs ---- */

sh_status fleet_program(const char *name, char *out, size_t out_bytes, sh_error *err)
{
    char self[SH_PATH_BYTES];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        return sh_fail(err, SH_ERR_IO, "cannot tell where this program lies: %s", strerror(errno));
    self[n] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    SH_TRY(sh_path_join(out, out_bytes, self, name, err));
    if (access(out, X_OK) != 0)
        return sh_fail(err, SH_ERR_NOT_FOUND, "%s: not there; build the target %s", out, name);
    return SH_OK;
}

int fleet_child_main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    long parent = strtol(argv[2], NULL, 10);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != (pid_t)parent)
        return 1; /* it is gone already */
    execv(argv[3], argv + 3);
    fprintf(stderr, "shoal-fleet: %s: %s\n", argv[3], strerror(errno));
    return 1;
}

/* environ with one more; the array is the caller's to free. */
static char **environment_with(const char *one)
{
    size_t n = 0;
    while (environ[n])
        n++;
    char **out = sh_calloc(n + 2, sizeof *out);
    if (!out)
        return NULL;
    memcpy(out, environ, n * sizeof *out);
    if (one)
        out[n] = (char *)(uintptr_t)one;
    return out;
}

static int open_log(posix_spawn_file_actions_t *actions, const char *path)
{
    int failed = posix_spawn_file_actions_addopen(actions, 0, "/dev/null", O_RDONLY, 0);
    if (!failed)
        failed =
            posix_spawn_file_actions_addopen(actions, 1, path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    return failed ? failed : posix_spawn_file_actions_adddup2(actions, 1, 2);
}

/* A process group of its own: a terminal's Ctrl-C is for this program, which stops them in turn. No
 * signal stays blocked or ignored. */
static sh_status spawn(const fleet_words *w, const char *environment, const char *log_path,
                       pid_t *pid, sh_error *err)
{
    char parent[24], program[SH_PATH_BYTES];
    char self_name[] = "shoal-fleet", child[] = "child";
    char *argv[FLEET_WORDS_MAX + 4] = {self_name, child, parent};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, all;
    if (w->overflow)
        return sh_fail(err, SH_ERR_LIMIT, "%s: more than %d words", w->words[0], FLEET_WORDS_MAX);
    SH_TRY(fleet_program("shoal-fleet", program, sizeof program, err));
    snprintf(parent, sizeof parent, "%ld", (long)getpid());
    for (size_t i = 0; i <= w->n; i++)
        argv[3 + i] = (char *)(uintptr_t)w->words[i];
    char **env = environment_with(environment);
    if (!env)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory", w->words[0]);
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK |
                                              POSIX_SPAWN_SETSIGDEF);
    int failed = open_log(&actions, log_path);
    if (!failed)
        failed = posix_spawn(pid, program, &actions, &attributes, argv, env);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    free(env);
    if (failed)
        return sh_fail(err, SH_ERR_IO, "%s: cannot be started: %s", w->words[0], strerror(failed));
    return SH_OK;
}

sh_status fleet_process_start(fleet_process *p, const fleet_words *words, const char *environment,
                              const char *log_path, sh_error *err)
{
    SH_ASSERT(p->pid == 0);
    SH_TRY(spawn(words, environment, log_path, &p->pid, err));
    if (!p->log_open) {
        p->log_fd = open(log_path, O_RDONLY | O_CREAT | O_CLOEXEC, 0644);
        if (p->log_fd < 0)
            return sh_fail(err, SH_ERR_IO, "%s: %s", log_path, strerror(errno));
        p->log_open = true;
        snprintf(p->log_path, sizeof p->log_path, "%s", log_path);
    }
    return SH_OK;
}

bool fleet_process_reap(fleet_process *p)
{
    int status = 0;
    if (p->pid == 0 || waitpid(p->pid, &status, WNOHANG) != p->pid)
        return false;
    p->pid = 0;
    p->status = status;
    return true;
}

void fleet_process_signal(const fleet_process *p, int number)
{
    if (p->pid > 0)
        kill(p->pid, number);
}

void fleet_process_release(fleet_process *p)
{
    if (p->pid > 0) {
        kill(p->pid, SIGKILL);
        while (waitpid(p->pid, &p->status, 0) < 0 && errno == EINTR)
            ;
        p->pid = 0;
    }
    if (p->log_open)
        close(p->log_fd);
    p->log_open = false;
}

/* ---- logs ---- */

const char *fleet_process_line(fleet_process *p)
{
    static _Thread_local char whole[FLEET_LOG_LINE_MAX];
    char c;
    if (!p->log_open)
        return NULL;
    for (;;) {
        char block[512];
        ssize_t n = read(p->log_fd, block, sizeof block);
        if (n <= 0)
            return NULL;
        for (ssize_t i = 0; i < n; i++) {
            c = block[i];
            if (c != '\n') {
                if (p->n_line + 1 < sizeof p->line)
                    p->line[p->n_line++] = c;
                continue;
            }
            memcpy(whole, p->line, p->n_line);
            whole[p->n_line] = 0;
            p->n_line = 0;
            (void)lseek(p->log_fd, i + 1 - n, SEEK_CUR); /* the rest is read the next time */
            return whole;
        }
    }
}

static sh_status last_line(const char *path, char *out, size_t out_bytes, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, 16u << 20, &bytes, &n, err));
    while (n > 0 && bytes[n - 1] == '\n')
        bytes[--n] = 0;
    const char *line = strrchr((char *)bytes, '\n');
    snprintf(out, out_bytes, "%s", line ? line + 1 : (char *)bytes);
    free(bytes);
    return SH_OK;
}

sh_status fleet_run_tool(const fleet_words *words, const char *log_path, int timeout_s,
                         sh_error *err)
{
    fleet_process p = {0};
    char line[256] = "";
    SH_TRY(spawn(words, NULL, log_path, &p.pid, err));
    uint64_t end = sh_clock_mono_ms() + (uint64_t)timeout_s * 1000;
    while (!fleet_process_reap(&p)) {
        if (sh_clock_mono_ms() > end) {
            fleet_process_release(&p);
            return sh_fail(err, SH_ERR_IO, "%s %s: not done after %d s; see %s", words->words[0],
                           words->n > 1 ? words->words[1] : "", timeout_s, log_path);
        }
        usleep(REAP_MS * 1000);
    }
    if (WIFEXITED(p.status) && WEXITSTATUS(p.status) == 0)
        return SH_OK;
    SH_TRY(last_line(log_path, line, sizeof line, err));
    return sh_fail(err, SH_ERR_IO, "%s %s failed: %s", words->words[0],
                   words->n > 1 ? words->words[1] : "", line);
}

bool fleet_log_text(const char *line, const char *key, char *out, size_t out_bytes)
{
    size_t n_key = strlen(key);
    for (const char *at = line; (at = strstr(at, key)) != NULL; at += n_key) {
        if ((at != line && at[-1] != ' ') || at[n_key] != '=')
            continue;
        const char *value = at + n_key + 1;
        bool quoted = *value == '"';
        value += quoted;
        size_t n = quoted ? strcspn(value, "\"") : strcspn(value, " ");
        snprintf(out, out_bytes, "%.*s", (int)SH_MIN(n, out_bytes - 1), value);
        return true;
    }
    return false;
}

bool fleet_log_number(const char *line, const char *key, double *out)
{
    char text[64], *end;
    if (!fleet_log_text(line, key, text, sizeof text))
        return false;
    double x = strtod(text, &end);
    if (end == text)
        return false;
    *out = x;
    return true;
}
