#include "shared/base/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Formats into a copy first: the arguments may point into err->text. */
__attribute__((format(printf, 2, 0))) static void set_text(sh_error *err, const char *format,
                                                           va_list args)
{
    char text[SH_ERROR_TEXT_BYTES];
    if (vsnprintf(text, sizeof text, format, args) < 0)
        text[0] = 0;
    /* An error is one line, whatever a file name or a parser's message holds. */
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = ' ';
    memcpy(err->text, text, sizeof text);
}

sh_status sh_fail(sh_error *err, sh_status code, const char *format, ...)
{
    if (!err)
        return code;
    va_list args;
    va_start(args, format);
    set_text(err, format, args);
    va_end(args);
    err->code = code;
    return code;
}

sh_status sh_fail_in(sh_error *err, const char *format, ...)
{
    if (!err)
        return SH_ERR_INVALID; /* the callee's code is not known here; callers keep their own */
    sh_error prefix = {0};
    va_list args;
    va_start(args, format);
    set_text(&prefix, format, args);
    va_end(args);
    return sh_fail(err, err->code, "%s: %s", prefix.text, err->text);
}

const char *sh_status_name(sh_status status)
{
    switch (status) {
    case SH_OK:
        return "ok";
    case SH_ERR_USAGE:
        return "usage";
    case SH_ERR_INVALID:
        return "invalid";
    case SH_ERR_UNSUPPORTED:
        return "unsupported";
    case SH_ERR_MISMATCH:
        return "mismatch";
    case SH_ERR_NOT_FOUND:
        return "not-found";
    case SH_ERR_EXISTS:
        return "exists";
    case SH_ERR_LIMIT:
        return "limit";
    case SH_ERR_FULL:
        return "full";
    case SH_ERR_NO_MEMORY:
        return "no-memory";
    case SH_ERR_IO:
        return "io";
    case SH_ERR_CORRUPT:
        return "corrupt";
    case SH_ERR_AUTH:
        return "auth";
    case SH_ERR_CANCELLED:
        return "cancelled";
    case SH_ERR_CRASHED:
        return "crashed";
    }
    return "unknown";
}

int sh_status_exit_code(sh_status status)
{
    switch (status) {
    case SH_OK:
        return 0;
    case SH_ERR_USAGE:
    case SH_ERR_INVALID:
    case SH_ERR_UNSUPPORTED:
    case SH_ERR_MISMATCH:
    case SH_ERR_NOT_FOUND:
    case SH_ERR_EXISTS:
    case SH_ERR_LIMIT:
    case SH_ERR_AUTH:
        return 2;
    case SH_ERR_FULL:
    case SH_ERR_NO_MEMORY:
    case SH_ERR_IO:
    case SH_ERR_CORRUPT:
    case SH_ERR_CANCELLED:
    case SH_ERR_CRASHED:
        return 1;
    }
    return 1;
}

_Noreturn void sh_assert_failed(const char *cond, const char *file, int line)
{
    fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, cond);
    abort();
}
