/*
 * What tests look at from outside a process: its memory, a page of its metrics, the bytes of its
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
/* A sanitizer's own memory is no measure of the program's: limits on it are not looked at then. */
bool probe_is_sanitized(void);
/* The value of the sample `name` (labels included) on a page of metrics; -1: not there. */
double probe_metric(const char *page, const char *name);
/* How many regular files below `dir` have these bytes; their paths are printed to `where`, which
 * may be NULL. */
size_t probe_files_with(const char *dir, const void *bytes, size_t n, char *where,
                        size_t where_bytes);

#endif
