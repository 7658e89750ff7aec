#include "shared/base/log.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define LINE_BYTES 1024

static _Atomic(int) log_level = SH_LOG_WARN;

void sh_log_set_level(sh_log_level level)
{
    atomic_store(&log_level, (int)level);
}

void sh_log(sh_log_level level, const char *event, const char *format, ...)
{
    static const char *const names[] = {"error", "warn", "info", "debug"};
    if ((int)level > atomic_load_explicit(&log_level, memory_order_relaxed))
        return;
    char line[LINE_BYTES];
    int n = snprintf(line, sizeof line - 1, "level=%s event=%s", names[level], event);
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
