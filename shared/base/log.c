#include "shared/base/log.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "shared/base/clock.h"

#define LINE_BYTES 1024

static _Atomic(int) log_level = SH_LOG_WARN;

void sh_log_set_level(sh_log_level level)
{
    atomic_store(&log_level, (int)level);
}

static const char *const level_names[] = {"error", "warn", "info", "debug"};

const char *sh_log_level_name(sh_log_level level)
{
    return level_names[SH_MIN((size_t)level, SH_COUNT(level_names) - 1)];
}

sh_status sh_log_parse_level(const char *name, sh_log_level *out, sh_error *err)
{
    for (size_t i = 0; i < SH_COUNT(level_names); i++)
        if (strcmp(name, level_names[i]) == 0) {
            *out = (sh_log_level)i;
            return SH_OK;
        }
    return sh_fail(err, SH_ERR_USAGE, "log level '%s' is none of error, warn, info, debug", name);
}

/* "ts=2026-11-22T05:09:35.123Z" */
static int put_time(char *out, size_t n)
{
    uint64_t ms = sh_clock_wall_ms();
    time_t seconds = (time_t)(ms / 1000);
    struct tm tm;
    if (gmtime_r(&seconds, &tm) == NULL)
        return snprintf(out, n, "ts=%llu", (unsigned long long)ms);
    return snprintf(out, n, "ts=%04d-%02d-%02dT%02d:%02d:%02d.%03uZ", tm.tm_year + 1900,
                    tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec,
                    (unsigned)(ms % 1000));
}

void sh_log(sh_log_level level, const char *event, const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&log_level, memory_order_relaxed))
        return;
    char line[LINE_BYTES], when[64];
    put_time(when, sizeof when);
    int n =
        snprintf(line, sizeof line - 1, "%s level=%s event=%s", when, level_names[level], event);
    size_t used = n < 0 ? 0 : SH_MIN((size_t)n, sizeof line - 2);
    if (format[0] && used < sizeof line - 3) {
        line[used++] = ' ';
        va_list args;
        va_start(args, format);
        n = vsnprintf(line + used, sizeof line - 1 - used, format, args);
        va_end(args);
        used += n < 0 ? 0 : SH_MIN((size_t)n, sizeof line - 2 - used);
    }
    /* One event is one line, whatever a value holds. */
    for (size_t i = 0; i < used; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
            line[i] = ' ';
    line[used++] = '\n';
    fwrite(line, 1, used, stderr); /* one call holds the stream's lock: lines do not mix */
}

int sh_error_report(const char *program, const sh_error *err)
{
    fprintf(stderr, "%s: %s\n", program, err->text[0] ? err->text : sh_status_name(err->code));
    return sh_status_exit_code(err->code);
}
