/*
 * A child process whose output is read line by line: the training program. It starts by
 * posix_spawn, with no descriptor but the standard ones, no blocked signals, in a process group of
 * its own (a Ctrl-C is for the daemon), and is killed without being asked.
 * Lines "step K/N" are progress; the last other line is what it has to say when it fails.
 * Threads: one. Ownership: by value; release takes a zeroed one and kills what still runs.
 */
#ifndef SH_EDGE_CHILD_H
#define SH_EDGE_CHILD_H

#include <sys/types.h>

#include "shared/base/status.h"

#define SH_CHILD_LINE_MAX 256

typedef struct {
    pid_t pid;       /* 0: none */
    int pid_fd, out; /* for poll: it ended; it wrote */
    char line[SH_CHILD_LINE_MAX], last[SH_CHILD_LINE_MAX];
    size_t n;
    uint32_t step, steps; /* of the newest progress line */
} sh_child;

/* argv[0] is the program's path; NULL at the end. SH_ERR_NOT_FOUND: it cannot be started. */
SH_MUST_USE sh_status sh_child_start(const char *const *argv, sh_child *out, sh_error *err);
/* Takes in some of what was written, without waiting. False: there is nothing now. */
bool sh_child_read(sh_child *child);
/* True when it has ended: SH_OK, or what went wrong in err; it is released. */
bool sh_child_ended(sh_child *child, sh_status *status, sh_error *err);
void sh_child_release(sh_child *child);

#endif
