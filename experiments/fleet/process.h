/*
 * Processes of the fleet: started with a log file as their stdout and stderr, read from there,
 * stopped by signals. A started process dies when the one that started it does.
 *
 * Threads: one (the main thread: a started process is told when the thread that started it ends).
 * Ownership: zero a process, release it; release kills what still runs.
 */
#ifndef FLEET_PROCESS_H
#define FLEET_PROCESS_H

#include <sys/types.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"

#define FLEET_WORDS_MAX    96   /* of a command line */
#define FLEET_LOG_LINE_MAX 4096 /* longer lines are cut */

typedef struct {
    const char *words[FLEET_WORDS_MAX + 1]; /* ended by NULL; words[0] is the program's path */
    size_t n;
    char text[16384]; /* of the words that were formatted */
    size_t used;
    bool overflow;
} fleet_words;
void fleet_words_add(fleet_words *words, const char *word); /* borrowed */
void fleet_words_addf(fleet_words *words, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* "--key" and a formatted value. */
void fleet_words_int(fleet_words *words, const char *key, int64_t value);
void fleet_words_real(fleet_words *words, const char *key, double value);

typedef struct {
    pid_t pid;  /* 0: does not run */
    int status; /* of waitpid, once it has ended */
    char log_path[SH_PATH_BYTES];
    int log_fd; /* reading end; valid when log_open */
    bool log_open;
    char line[FLEET_LOG_LINE_MAX]; /* what is read of the next line */
    size_t n_line;
    char failpoint[48]; /* the last that its log names: the process may end a little later */
} fleet_process;

/* "A/shoal-node" beside this program. SH_ERR_NOT_FOUND says how it is built. */
SH_MUST_USE sh_status fleet_program(const char *name, char *out, size_t out_bytes, sh_error *err);
/* environment: one more "NAME=value", or NULL. The log is appended to. */
SH_MUST_USE sh_status fleet_process_start(fleet_process *process, const fleet_words *words,
                                          const char *environment, const char *log_path,
                                          sh_error *err);
/* Whether it ended since it was last asked; then process->pid is 0 and status is filled. */
bool fleet_process_reap(fleet_process *process);
void fleet_process_signal(const fleet_process *process, int number);
/* The next whole line of the log, without its end; NULL: none yet. */
const char *fleet_process_line(fleet_process *process);
void fleet_process_release(fleet_process *process);

/* Runs a tool to its end, at most timeout_s; its output goes to log_path.
 * SH_ERR_IO with its last line when it fails. */
SH_MUST_USE sh_status fleet_run_tool(const fleet_words *words, const char *log_path, int timeout_s,
                                     sh_error *err);
/* main's part of it: `shoal-fleet child PARENT PROGRAM ...` dies with its parent, and is PROGRAM.
 */
int fleet_child_main(int argc, char **argv);

/* The value of " key=" in a log line; false: it is not there. Quotes are taken off. */
bool fleet_log_text(const char *line, const char *key, char *out, size_t out_bytes);
bool fleet_log_number(const char *line, const char *key, double *out);

#endif
