/*
 * A recorder between LMDB and the disk: the test program's own pwrite, writev, fdatasync and so on
 * (the dynamic linker takes them for LMDB's) note what is written to one file and when it is
 * synced, and can fail the n-th of them. From the notes a file is made as a power loss could have
 * left it.
 */
#ifndef TESTS_STORE_DISK_H
#define TESTS_STORE_DISK_H

#include "shared/base/rng.h"
#include "shared/store/store.h"

typedef enum {
    DISK_WRITE,
    DISK_WRITE_SYNCED, /* through a descriptor with O_DSYNC */
    DISK_SYNC,
    DISK_MARK, /* the test's: number */
} disk_event_kind;

typedef struct {
    disk_event_kind kind;
    uint64_t offset, n, number;
    uint8_t *bytes;
} disk_event;

typedef struct {
    disk_event *events;
    size_t n, cap;
} disk_log;

void disk_record(const char *path); /* from now on; NULL: no more */
disk_log disk_take_log(void);       /* what was recorded; the caller's */
void disk_log_release(disk_log *log);
void disk_mark(uint64_t number);

/* The n-th write or sync of the recorded file from now on fails with this errno; 0: none. */
void disk_fail_after(unsigned n, int error);

typedef enum { DISK_NONE, DISK_ALL, DISK_SOME, DISK_TORN } disk_loss;

/* Writes to path what the disk holds when the power goes while event `at` is under way. What was
 * synced is there. Of the rest, DISK_NONE is there, ALL, SOME of the writes, or of each write SOME
 * sectors of 512 bytes (TORN). */
void disk_rebuild(const disk_log *log, size_t at, disk_loss loss, sh_rng *rng, const char *path);
uint64_t disk_last_mark(const disk_log *log, size_t at); /* before event `at`; 0: none */

#endif
