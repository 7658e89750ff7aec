/*
 * Logs on stderr, one line each: `ts=2026-11-22T05:09:35.123Z level=… event=… key=value …`; ts is
 * UTC (RFC 3339). Never user text, never secrets.
 * Thread-safe. Libraries may log; they never print anything else.
 */
#ifndef SH_BASE_LOG_H
#define SH_BASE_LOG_H

#include "shared/base/status.h"

typedef enum { SH_LOG_ERROR, SH_LOG_WARN, SH_LOG_INFO, SH_LOG_DEBUG } sh_log_level;

void sh_log_set_level(sh_log_level level);         /* default SH_LOG_WARN */
const char *sh_log_level_name(sh_log_level level); /* "error", "warn", "info", "debug" */
/* SH_ERR_USAGE: none of these names. */
SH_MUST_USE sh_status sh_log_parse_level(const char *name, sh_log_level *out, sh_error *err);
/* format holds the key=value pairs: sh_log(SH_LOG_INFO, "release", "version=%u sha256=%s", …) */
void sh_log(sh_log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Prints "program: text" on stderr and returns sh_status_exit_code(err->code). For main only. */
int sh_error_report(const char *program, const sh_error *err);

#endif
