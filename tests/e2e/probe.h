/*
 * What tests look at from outside a process: its answers, its metrics, its memory, the bytes of its
 * files. Include after cmocka.h.
 */
#ifndef SH_TESTS_E2E_PROBE_H
#define SH_TESTS_E2E_PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Resident bytes of a process now (VmRSS). */
uint64_t probe_rss(pid_t pid);
uint64_t probe_peak(pid_t pid); /* the most that it ever had (VmHWM) */
/* A sanitizer's own memory is no measure of the program's: limits on it are not looked at then. */
bool probe_is_sanitized(void);
/* The value of the sample `name` (labels included) on a page of metrics; -1: not there. */
double probe_metric(const char *page, const char *name);
/* One request to 127.0.0.1:port; the answer's body into out. Returns the status, 0: no answer. */
int probe_ask(unsigned port, const char *method, const char *path, const char *body, char *out,
              size_t out_bytes);
/* A completion of a few tokens, which must succeed; its id into id[64]. */
void probe_complete(unsigned port, const char *prompt, const char *user, char *id);
int probe_feedback(unsigned port, const char *id, const char *action, const char *text);
/* How many regular files below `dir` have these bytes; their paths are printed to `where`, which
 * may be NULL. */
size_t probe_files_with(const char *dir, const void *bytes, size_t n, char *where,
                        size_t where_bytes);

#endif
