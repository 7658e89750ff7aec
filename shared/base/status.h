/*
 * Status codes and error descriptions.
 *
 * Every function that can fail returns an sh_status (0 is success) and, where the caller may want
 * to know more, fills an sh_error: what went wrong, where, and what to do about it. The caller
 * owns the sh_error (usually on its stack) and may pass NULL. Out-parameters are untouched on
 * error. Libraries neither print nor exit: only a program's main turns a status into an exit code
 * (0 ok, 1 failed, 2 usage or bad input).
 *
 *     sh_error err = {0};
 *     if (sh_file_read(path, SIZE_MAX, &bytes, &n, &err) != SH_OK)
 *         return sh_error_report("shoal", &err);
 */
#ifndef SH_BASE_STATUS_H
#define SH_BASE_STATUS_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    SH_OK = 0,
    SH_ERR_USAGE,       /* the command line or a configuration is wrong */
    SH_ERR_INVALID,     /* input bytes break their format's rules */
    SH_ERR_UNSUPPORTED, /* well-formed, but a type, architecture or version that we do not know */
    SH_ERR_MISMATCH,    /* two good things that do not belong together (adapter and base) */
    SH_ERR_NOT_FOUND,
    SH_ERR_EXISTS,
    SH_ERR_LIMIT, /* a named limit would be passed */
    SH_ERR_FULL,  /* store or disk is full */
    SH_ERR_NO_MEMORY,
    SH_ERR_IO,
    SH_ERR_CORRUPT, /* a checksum or invariant of something that we wrote does not hold */
    SH_ERR_AUTH,    /* signature or identity does not hold */
    SH_ERR_CANCELLED,
    SH_ERR_CRASHED, /* a fail point asked for a crash (simulation and tests only) */
} sh_status;

#define SH_ERROR_TEXT_BYTES 512

typedef struct {
    sh_status code;
    char text[SH_ERROR_TEXT_BYTES]; /* one line: what, where, what to do */
} sh_error;

#define SH_MUST_USE __attribute__((warn_unused_result))

/* Fills err (may be NULL) and returns code, so that `return sh_fail(err, SH_ERR_IO, "...")` works.
 */
sh_status sh_fail(sh_error *err, sh_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " before the text of an error that a callee filled; returns its code
 * (SH_ERR_INVALID when err is NULL: keep the callee's status where that matters). */
sh_status sh_fail_in(sh_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The name of a status in lower case, e.g. "not-found". Never NULL. */
const char *sh_status_name(sh_status status);

/* The exit code that main returns for a status: 0, 1 (failed) or 2 (usage, bad input). */
int sh_status_exit_code(sh_status status);

/* Early return on failure; `SH_TRY(f(x, err));` in a function that has nothing to clean up. */
#define SH_TRY(expr)                                                                               \
    do {                                                                                           \
        sh_status sh_try_status_ = (expr);                                                         \
        if (sh_try_status_ != SH_OK)                                                               \
            return sh_try_status_;                                                                 \
    } while (0)

/* The same with a `status` variable and a `cleanup:` label in scope. */
#define SH_GOTO(expr)                                                                              \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != SH_OK)                                                                       \
            goto cleanup;                                                                          \
    } while (0)

/* Assertions stay on in every build: they guard our own bugs, never what a peer or file says. */
#define SH_ASSERT(cond) ((cond) ? (void)0 : sh_assert_failed(#cond, __FILE__, __LINE__))
_Noreturn void sh_assert_failed(const char *cond, const char *file, int line);

#define SH_COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define SH_MIN(a, b)    ((a) < (b) ? (a) : (b))
#define SH_MAX(a, b)    ((a) > (b) ? (a) : (b))

#endif
