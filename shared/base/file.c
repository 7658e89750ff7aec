#include "shared/base/file.h"

#include "shared/base/buf.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_STEP_BYTES   65536
#define TEMP_TRIES        100
#define TEMP_SUFFIX_BYTES 48
#define TEMP_MARK         ".tmp-"

static sh_status fail_errno(sh_error *err, int reason, const char *verb, const char *path)
{
    sh_status code = SH_ERR_IO;
    if (reason == ENOENT || reason == ENOTDIR)
        code = SH_ERR_NOT_FOUND;
    else if (reason == ENOSPC || reason == EDQUOT)
        code = SH_ERR_FULL;
    else if (reason == EEXIST)
        code = SH_ERR_EXISTS;
    else if (reason == ENOMEM)
        code = SH_ERR_NO_MEMORY;
    else if (reason == ENAMETOOLONG)
        code = SH_ERR_LIMIT;
    return sh_fail(err, code, "cannot %s '%s': %s", verb, path, strerror(reason));
}

static sh_status open_read(const char *path, int *fd, struct stat *info, sh_error *err)
{
    int opened = open(path, O_RDONLY | O_CLOEXEC);
    if (opened < 0)
        return fail_errno(err, errno, "open", path);
    int reason = 0;
    if (fstat(opened, info) != 0)
        reason = errno;
    else if (S_ISDIR(info->st_mode))
        reason = EISDIR;
    if (reason) {
        close(opened);
        return fail_errno(err, reason, "read", path);
    }
    *fd = opened;
    return SH_OK;
}

/* Reads to the end of fd, which may be a pipe: the size hint is only that. */
static sh_status read_all(int fd, const char *path, size_t hint, sh_buf *buf, sh_error *err)
{
    size_t step = hint;
    for (;;) {
        /* One byte over the limit tells "exactly full" from "more to come"; one is the final 0. */
        size_t room = SH_MIN(step, buf->max - 1 - buf->len);
        if (room == 0)
            return sh_fail(err, SH_ERR_LIMIT, "'%s' is larger than %zu bytes", path, buf->max - 2);
        uint8_t *end = sh_buf_reserve(buf, room + 1);
        if (!end)
            return sh_fail(err, SH_ERR_NO_MEMORY, "no memory to read '%s'", path);
        ssize_t n = read(fd, end, room);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail_errno(err, errno, "read", path);
        if (n == 0)
            break;
        buf->len += (size_t)n;
        step = READ_STEP_BYTES;
    }
    buf->data[buf->len] = 0;
    return SH_OK;
}

sh_status sh_file_read(const char *path, size_t max_bytes, uint8_t **out, size_t *n, sh_error *err)
{
    bool standard_input = strcmp(path, "-") == 0;
    const char *name = standard_input ? "standard input" : path;
    int fd = STDIN_FILENO;
    struct stat info = {0};
    if (!standard_input)
        SH_TRY(open_read(path, &fd, &info, err));

    max_bytes = SH_MIN(max_bytes, (size_t)PTRDIFF_MAX - 2);
    sh_buf buf;
    sh_buf_init(&buf, max_bytes + 2);
    size_t hint = READ_STEP_BYTES;
    sh_status status = SH_OK;
    if (S_ISREG(info.st_mode) && info.st_size > 0) {
        if ((uintmax_t)info.st_size > max_bytes)
            SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "'%s' has %jd bytes, more than %zu", name,
                            (intmax_t)info.st_size, max_bytes));
        hint = (size_t)info.st_size + 1; /* one more, so that the second read sees the end */
    }
    SH_GOTO(read_all(fd, name, hint, &buf, err));
    *out = buf.data;
    *n = buf.len;
    buf.data = NULL;

cleanup:
    sh_buf_release(&buf);
    if (!standard_input)
        close(fd);
    return status;
}

static int write_all(int fd, const uint8_t *bytes, size_t n)
{
    while (n > 0) {
        ssize_t written = write(fd, bytes, n);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return errno;
        bytes += written;
        n -= (size_t)written;
    }
    return 0;
}

static void folder_of(const char *path, char folder[SH_PATH_BYTES])
{
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    if (!slash)
        snprintf(folder, SH_PATH_BYTES, ".");
    else if (n == 0)
        snprintf(folder, SH_PATH_BYTES, "/");
    else
        snprintf(folder, SH_PATH_BYTES, "%.*s", (int)n, path);
}

/* Syncs the folder that holds path, so that a rename in it survives a power loss. */
static int sync_folder(const char *path)
{
    char folder[SH_PATH_BYTES];
    folder_of(path, folder);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int reason = fsync(fd) != 0 ? errno : 0;
    close(fd);
    return reason == EINVAL ? 0 : reason; /* a file system without folder syncs */
}

static int open_temporary(const char *path, mode_t mode, char *temp, size_t temp_bytes)
{
    static atomic_uint serial;
    for (int i = 0; i < TEMP_TRIES; i++) {
        snprintf(temp, temp_bytes, "%s" TEMP_MARK "%ld-%u", path, (long)getpid(),
                 atomic_fetch_add(&serial, 1));
        int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
        if (fd >= 0 || errno != EEXIST)
            return fd;
    }
    return -1;
}

/* Whether name is one that open_temporary makes for base, by a process that is gone or by this one,
 * which may have been given the number of one that is gone. */
static bool is_leftover(const char *name, const char *base)
{
    const size_t n = strlen(base);
    char *end;
    if (strncmp(name, base, n) != 0 || strncmp(name + n, TEMP_MARK, strlen(TEMP_MARK)) != 0)
        return false;
    const char *digits = name + n + strlen(TEMP_MARK);
    const long pid = strtol(digits, &end, 10);
    if (end == digits || pid <= 0 || *end != '-' || end[1 + strspn(end + 1, "0123456789")] != 0)
        return false;
    return pid == (long)getpid() || (kill((pid_t)pid, 0) != 0 && errno == ESRCH);
}

void sh_file_remove_leftovers(const char *path)
{
    char folder[SH_PATH_BYTES];
    if (strlen(path) >= SH_PATH_BYTES)
        return;
    folder_of(path, folder);
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;)
        if (is_leftover(entry->d_name, base))
            (void)unlinkat(dirfd(dir), entry->d_name, 0);
    if (dir)
        closedir(dir);
}

static sh_status writer_open(const char *path, bool private, sh_file_writer *out, sh_error *err)
{
    size_t n = strlen(path);
    if (n >= SH_PATH_BYTES - TEMP_SUFFIX_BYTES)
        return fail_errno(err, ENAMETOOLONG, "write", path);
    /* The rename would put a file in the place of a device or a pipe: of /dev/null, for root. */
    struct stat info;
    const bool exists = stat(path, &info) == 0;
    if (exists && S_ISDIR(info.st_mode))
        return fail_errno(err, EISDIR, "write", path);
    if (exists && !S_ISREG(info.st_mode))
        return sh_fail(err, SH_ERR_INVALID,
                       "cannot write '%s': it is not a regular file; name another one", path);
    memcpy(out->path, path, n + 1);
    out->fd = open_temporary(path, private ? 0600 : 0666, out->temp, sizeof out->temp);
    if (out->fd < 0)
        return fail_errno(err, errno, "write", path);
    out->open = true;
    /* A file that was private stays private. */
    if (!private && exists && fchmod(out->fd, info.st_mode & 0777) != 0) {
        int reason = errno;
        sh_file_writer_abandon(out);
        return fail_errno(err, reason, "write", path);
    }
    return SH_OK;
}

sh_status sh_file_writer_open(const char *path, sh_file_writer *out, sh_error *err)
{
    return writer_open(path, false, out, err);
}

sh_status sh_file_writer_open_private(const char *path, sh_file_writer *out, sh_error *err)
{
    return writer_open(path, true, out, err);
}

sh_status sh_file_writer_append(sh_file_writer *w, const void *bytes, size_t n, sh_error *err)
{
    SH_ASSERT(w->open);
    int reason = write_all(w->fd, bytes, n);
    return reason ? fail_errno(err, reason, "write", w->path) : SH_OK;
}

sh_status sh_file_writer_commit(sh_file_writer *w, sh_error *err)
{
    int reason = 0;
    SH_ASSERT(w->open);
    if (fsync(w->fd) != 0)
        reason = errno;
    if (close(w->fd) != 0 && !reason)
        reason = errno;
    w->open = false;
    if (!reason && rename(w->temp, w->path) != 0)
        reason = errno;
    if (reason) {
        unlink(w->temp);
        return fail_errno(err, reason, "write", w->path);
    }
    reason = sync_folder(w->path);
    return reason ? fail_errno(err, reason, "sync the folder of", w->path) : SH_OK;
}

void sh_file_writer_abandon(sh_file_writer *w)
{
    if (!w->open)
        return;
    close(w->fd);
    unlink(w->temp);
    w->open = false;
}

static sh_status write_atomic(const char *path, const void *bytes, size_t n, bool private,
                              sh_error *err)
{
    sh_status status = SH_OK;
    sh_file_writer w = {0};
    SH_TRY(writer_open(path, private, &w, err));
    SH_GOTO(sh_file_writer_append(&w, bytes, n, err));
    SH_GOTO(sh_file_writer_commit(&w, err));

cleanup:
    sh_file_writer_abandon(&w);
    return status;
}

sh_status sh_file_write_atomic(const char *path, const void *bytes, size_t n, sh_error *err)
{
    return write_atomic(path, bytes, n, false, err);
}

sh_status sh_file_write_private(const char *path, const void *bytes, size_t n, sh_error *err)
{
    return write_atomic(path, bytes, n, true, err);
}

sh_status sh_map_open(const char *path, sh_map *out, sh_error *err)
{
    int fd = -1;
    struct stat info;
    SH_TRY(open_read(path, &fd, &info, err));
    if (!S_ISREG(info.st_mode)) {
        close(fd);
        return sh_fail(err, SH_ERR_INVALID, "'%s' is not a regular file", path);
    }
    if (info.st_size == 0) { /* mmap refuses to map nothing */
        close(fd);
        *out = (sh_map){.data = (const uint8_t *)"", .bytes = 0};
        return SH_OK;
    }
    void *memory = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
    int reason = errno;
    close(fd);
    if (memory == MAP_FAILED)
        return fail_errno(err, reason, "map", path);
    *out = (sh_map){.data = memory, .bytes = (size_t)info.st_size};
    return SH_OK;
}

void sh_map_release(sh_map *map)
{
    if (map->bytes > 0)
        munmap((void *)(uintptr_t)map->data, map->bytes);
    *map = (sh_map){0};
}

sh_status sh_dir_make(const char *path, sh_error *err)
{
    char part[SH_PATH_BYTES];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof part)
        return fail_errno(err, n == 0 ? ENOENT : ENAMETOOLONG, "make the folder", path);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (part[i] != '/' && part[i] != 0)
            continue;
        part[i] = 0;
        if (mkdir(part, 0777) != 0) {
            int reason = errno;
            struct stat info;
            if (stat(part, &info) != 0)
                return fail_errno(err, reason, "make the folder", part);
            if (!S_ISDIR(info.st_mode))
                return sh_fail(err, SH_ERR_EXISTS, "'%s' exists and is not a folder", part);
        }
        if (i < n)
            part[i] = '/';
    }
    return SH_OK;
}

bool sh_file_exists(const char *path)
{
    return access(path, F_OK) == 0;
}

sh_status sh_path_join(char *out, size_t out_bytes, const char *dir, const char *name,
                       sh_error *err)
{
    size_t dir_n = strlen(dir), name_n = strlen(name);
    bool slash = dir_n > 0 && dir[dir_n - 1] != '/';
    if (dir_n >= out_bytes || name_n + slash >= out_bytes - dir_n)
        return sh_fail(err, SH_ERR_LIMIT, "the path '%.200s/%.200s' is longer than %zu bytes", dir,
                       name, out_bytes - SH_MIN(out_bytes, 1));
    memmove(out, dir, dir_n);
    if (slash)
        out[dir_n++] = '/';
    memcpy(out + dir_n, name, name_n + 1);
    return SH_OK;
}
