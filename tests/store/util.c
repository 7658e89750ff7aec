#include "tests/store/util.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/rng.h"

#define ARGS_MAX 4

extern char **environ;

static void stop(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

temp_dir temp_dir_make(void)
{
    temp_dir dir;
    const char *base = getenv("TMPDIR");
    if (!base || strlen(base) > 40)
        base = "/tmp";
    snprintf(dir.path, sizeof(dir.path), "%s/shoal-store-XXXXXX", base);
    if (!mkdtemp(dir.path))
        stop(dir.path);
    return dir;
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *place)
{
    (void)info;
    (void)kind;
    (void)place;
    return remove(path);
}

void temp_dir_remove(const temp_dir *dir)
{
    if (nftw(dir->path, remove_one, 8, FTW_DEPTH | FTW_PHYS) != 0)
        stop(dir->path);
}

const char *temp_path(const temp_dir *dir, const char *name)
{
    static char paths[4][128];
    static unsigned turn;
    char *path = paths[turn++ % SH_COUNT(paths)];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir->path, name);
    return path;
}

void value_fill(uint64_t seed, void *bytes, size_t n)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 0x76616c);
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)bytes)[i] = (uint8_t)sh_rng_u32(&rng);
}

bool value_is(uint64_t seed, size_t n, sh_slice value)
{
    if (value.n != n)
        return false;
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 0x76616c);
    for (size_t i = 0; i < n; i++)
        if (((const uint8_t *)value.data)[i] != (uint8_t)sh_rng_u32(&rng))
            return false;
    return true;
}

void must(sh_status status, const sh_error *err, const char *what)
{
    if (status == SH_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, sh_status_name(status), err->text);
    exit(1);
}

pid_t spawn_self(const char *const args[], int *in, int *out)
{
    char self[] = "/proc/self/exe", *argv[ARGS_MAX + 2] = {self};
    int down[2], up[2];
    for (size_t i = 0; args[i]; i++) {
        SH_ASSERT(i < ARGS_MAX);
        argv[i + 1] = (char *)(uintptr_t)args[i];
    }
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    if (in) {
        if (pipe2(down, O_CLOEXEC) != 0)
            stop("pipe");
        posix_spawn_file_actions_adddup2(&actions, down[0], STDIN_FILENO);
    }
    if (out) {
        if (pipe2(up, O_CLOEXEC) != 0)
            stop("pipe");
        posix_spawn_file_actions_adddup2(&actions, up[1], STDOUT_FILENO);
    }
    pid_t pid;
    errno = posix_spawn(&pid, self, &actions, NULL, argv, environ);
    if (errno != 0)
        stop("posix_spawn");
    posix_spawn_file_actions_destroy(&actions);
    if (in) {
        close(down[0]);
        *in = down[1];
    }
    if (out) {
        close(up[1]);
        *out = up[0];
    }
    return pid;
}

int wait_exit(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            stop("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
