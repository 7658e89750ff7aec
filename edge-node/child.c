#include "edge-node/child.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static sh_status spawn(const char *const *argv, int out, pid_t *pid, sh_error *err)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, ours; /* what the daemon blocks or ignores */
    sigemptyset(&none);
    sigemptyset(&ours);
    sigaddset(&ours, SIGPIPE);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    if (posix_spawn_file_actions_init(&files) != 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory to start it", argv[0]);
    if (posix_spawnattr_init(&attributes) != 0) {
        posix_spawn_file_actions_destroy(&files);
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory to start it", argv[0]);
    }
    int rc = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    rc = rc ? rc : posix_spawn_file_actions_adddup2(&files, out, 1);
    rc = rc ? rc : posix_spawn_file_actions_adddup2(&files, out, 2);
    rc = rc ? rc : posix_spawn_file_actions_addclosefrom_np(&files, 3);
    rc = rc ? rc : posix_spawnattr_setsigmask(&attributes, &none);
    rc = rc ? rc : posix_spawnattr_setsigdefault(&attributes, &ours);
    rc = rc ? rc : posix_spawnattr_setpgroup(&attributes, 0);
    rc = rc ? rc
            : posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF |
                                                        POSIX_SPAWN_SETPGROUP);
    rc = rc ? rc : posix_spawn(pid, argv[0], &files, &attributes, (char *const *)argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    if (rc == 0)
        return SH_OK;
    return sh_fail(err, rc == ENOMEM || rc == EAGAIN ? SH_ERR_NO_MEMORY : SH_ERR_NOT_FOUND,
                   "%s: cannot be started: %s", argv[0], strerror(rc));
}

sh_status sh_child_start(const char *const *argv, sh_child *out, sh_error *err)
{
    int pipe_fds[2];
    sh_child c = {0};
    if (pipe2(pipe_fds, O_CLOEXEC) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: no pipe: %s", argv[0], strerror(errno));
    sh_status status = spawn(argv, pipe_fds[1], &c.pid, err);
    close(pipe_fds[1]);
    if (status != SH_OK) {
        close(pipe_fds[0]);
        return status;
    }
    c.out = pipe_fds[0];
    c.pid_fd = (int)syscall(SYS_pidfd_open, c.pid, 0); /* close-on-exec by itself */
    if (c.pid_fd < 0 || fcntl(c.out, F_SETFL, O_NONBLOCK) != 0) {
        status = sh_fail(err, SH_ERR_IO, "%s: cannot be watched: %s", argv[0], strerror(errno));
        sh_child_release(&c);
        return status;
    }
    *out = c;
    return SH_OK;
}

static void take_line(sh_child *c)
{
    unsigned step, steps;
    c->line[c->n] = 0;
    if (sscanf(c->line, "step %u/%u", &step, &steps) == 2) {
        c->step = step;
        c->steps = steps;
    } else if (c->n > 0) {
        memcpy(c->last, c->line, c->n + 1);
    }
    c->n = 0;
}

bool sh_child_read(sh_child *c)
{
    char bytes[512];
    if (c->out < 0)
        return false;
    ssize_t n = read(c->out, bytes, sizeof bytes);
    for (ssize_t i = 0; i < n; i++) {
        if (bytes[i] == '\n')
            take_line(c);
        else if (c->n < sizeof c->line - 1)
            c->line[c->n++] = bytes[i];
    }
    if (n == 0) {
        take_line(c);
        close(c->out);
        c->out = -1; /* poll passes a negative descriptor over */
    }
    return n > 0;
}

bool sh_child_ended(sh_child *c, sh_status *status, sh_error *err)
{
    int how = 0;
    pid_t got = waitpid(c->pid, &how, WNOHANG);
    if (got == 0 || (got < 0 && errno == EINTR))
        return false;
    while (sh_child_read(c)) /* bounded by what the pipe holds: the writer is gone */
        ;
    if (got < 0)
        *status = sh_fail(err, SH_ERR_IO, "training: waiting for it: %s", strerror(errno));
    else if (WIFEXITED(how) && WEXITSTATUS(how) == 0)
        *status = SH_OK;
    else if (WIFSIGNALED(how))
        *status = sh_fail(err, SH_ERR_IO, "training: killed by signal %d", WTERMSIG(how));
    else
        *status = sh_fail(err, SH_ERR_INVALID, "training: exit code %d: %s", WEXITSTATUS(how),
                          c->last[0] ? c->last : "it said nothing");
    c->pid = 0;
    sh_child_release(c);
    return true;
}

void sh_child_release(sh_child *c)
{
    if (c->pid > 0) {
        kill(c->pid, SIGKILL);
        while (waitpid(c->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (c->pid_fd > 0)
        close(c->pid_fd);
    if (c->out > 0)
        close(c->out);
    *c = (sh_child){0};
}
