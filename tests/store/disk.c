#include "tests/store/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "shared/base/buf.h"

#define SECTOR     512
#define FILE_MAX   ((size_t)64 << 20)
#define EVENTS_MAX ((size_t)1 << 20)

static const char *recorded;
static disk_log current;
static unsigned fail_countdown;
static int fail_error;

static bool is_recorded(int fd)
{
    struct stat a, b;
    return recorded && fstat(fd, &a) == 0 && stat(recorded, &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

static void note(disk_event event)
{
    void *events = current.events;
    if (sh_array_reserve(&events, &current.cap, current.n + 1, sizeof(event), EVENTS_MAX) != SH_OK)
        abort();
    current.events = events;
    current.events[current.n++] = event;
}

/* True when this call must fail. */
static bool failing(void)
{
    if (fail_countdown == 0 || --fail_countdown > 0)
        return false;
    errno = fail_error;
    return true;
}

static void note_write(int fd, const struct iovec *parts, int n_parts, uint64_t offset, size_t n)
{
    disk_event event = {.kind = fcntl(fd, F_GETFL) & O_DSYNC ? DISK_WRITE_SYNCED : DISK_WRITE,
                        .offset = offset,
                        .n = n,
                        .bytes = malloc(n ? n : 1)};
    if (!event.bytes)
        abort();
    size_t at = 0;
    for (int i = 0; i < n_parts && at < n; i++) {
        size_t part = SH_MIN(parts[i].iov_len, n - at);
        memcpy(event.bytes + at, parts[i].iov_base, part);
        at += part;
    }
    note(event);
}

/* ---- what LMDB calls ---- */

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t offset)
{
    bool mine = is_recorded(fd);
    if (mine && failing())
        return -1;
    ssize_t wrote = syscall(SYS_pwrite64, fd, bytes, n, offset);
    if (mine && wrote > 0) {
        struct iovec part = {(void *)(uintptr_t)bytes, n};
        note_write(fd, &part, 1, (uint64_t)offset, (size_t)wrote);
    }
    return wrote;
}

ssize_t writev(int fd, const struct iovec *parts, int n_parts)
{
    bool mine = is_recorded(fd);
    if (mine && failing())
        return -1;
    off_t offset = mine ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t wrote = syscall(SYS_writev, fd, parts, n_parts);
    if (mine && wrote > 0)
        note_write(fd, parts, n_parts, (uint64_t)offset, (size_t)wrote);
    return wrote;
}

ssize_t write(int fd, const void *bytes, size_t n)
{
    struct iovec part = {(void *)(uintptr_t)bytes, n};
    return is_recorded(fd) ? writev(fd, &part, 1) : syscall(SYS_write, fd, bytes, n);
}

static int sync_by(long number, int fd)
{
    bool mine = is_recorded(fd);
    if (mine && failing())
        return -1;
    int rc = (int)syscall(number, fd);
    if (mine && rc == 0)
        note((disk_event){.kind = DISK_SYNC});
    return rc;
}

int fdatasync(int fd)
{
    return sync_by(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return sync_by(SYS_fsync, fd);
}

/* Writes that would go past the recorder. */
int msync(void *address, size_t n, int flags)
{
    if (recorded)
        abort();
    return (int)syscall(SYS_msync, address, n, flags);
}

int ftruncate(int fd, off_t n)
{
    if (is_recorded(fd))
        abort();
    return (int)syscall(SYS_ftruncate, fd, n);
}

/* ---- the recorder ---- */

void disk_record(const char *path)
{
    recorded = path;
}

disk_log disk_take_log(void)
{
    disk_log log = current;
    current = (disk_log){0};
    return log;
}

void disk_log_release(disk_log *log)
{
    for (size_t i = 0; i < log->n; i++)
        free(log->events[i].bytes);
    free(log->events);
    *log = (disk_log){0};
}

void disk_mark(uint64_t number)
{
    note((disk_event){.kind = DISK_MARK, .number = number});
}

void disk_fail_after(unsigned n, int error)
{
    fail_countdown = n;
    fail_error = error;
}

uint64_t disk_last_mark(const disk_log *log, size_t at)
{
    uint64_t mark = 0;
    for (size_t i = 0; i < at && i < log->n; i++)
        if (log->events[i].kind == DISK_MARK)
            mark = log->events[i].number;
    return mark;
}

static void apply(uint8_t *image, size_t *length, const disk_event *e, size_t from, size_t n)
{
    SH_ASSERT(e->offset + from + n <= FILE_MAX);
    memcpy(image + e->offset + from, e->bytes + from, n);
    *length = SH_MAX(*length, e->offset + from + n);
}

static void apply_unsynced(uint8_t *image, size_t *length, const disk_event *e, disk_loss loss,
                           sh_rng *rng)
{
    if (loss == DISK_ALL || (loss == DISK_SOME && sh_rng_below(rng, 2)))
        apply(image, length, e, 0, e->n);
    if (loss != DISK_TORN)
        return;
    for (size_t from = 0; from < e->n;) { /* cut where the disk's sectors end */
        size_t n = SH_MIN(SECTOR - (e->offset + from) % SECTOR, e->n - from);
        if (sh_rng_below(rng, 2))
            apply(image, length, e, from, n);
        from += n;
    }
}

void disk_rebuild(const disk_log *log, size_t at, disk_loss loss, sh_rng *rng, const char *path)
{
    static uint8_t image[FILE_MAX];
    size_t length = 0, synced = 0;
    for (size_t i = 0; i < at && i < log->n; i++)
        if (log->events[i].kind == DISK_SYNC)
            synced = i;
    for (size_t i = 0; i <= at && i < log->n; i++) {
        const disk_event *e = &log->events[i];
        if (e->kind != DISK_WRITE && e->kind != DISK_WRITE_SYNCED)
            continue;
        if (i < synced || (i < at && e->kind == DISK_WRITE_SYNCED))
            apply(image, &length, e, 0, e->n);
        else
            apply_unsynced(image, &length, e, loss, rng);
    }
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(image, 1, length, file) != length || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
    memset(image, 0, length);
}
