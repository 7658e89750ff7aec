/* What every test of the trainer uses. */
#ifndef SH_TESTS_TRAINER_UTIL_H
#define SH_TESTS_TRAINER_UTIL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "shared/base/status.h"

#define must_be_ok(expr)                                                                           \
    do {                                                                                           \
        if ((expr) != SH_OK)                                                                       \
            fail_msg("%s: %s", #expr, err.text);                                                   \
    } while (0)

/* |ours - theirs| <= tolerance, both printed otherwise; NaN fails. */
#define must_be_near(ours, theirs, tolerance)                                                      \
    do {                                                                                           \
        double near_a_ = (ours), near_b_ = (theirs), near_t_ = (tolerance);                        \
        if (!(near_a_ - near_b_ <= near_t_ && near_b_ - near_a_ <= near_t_))                       \
            fail_msg("%s is %.9g, expected %.9g within %g", #ours, near_a_, near_b_, near_t_);     \
    } while (0)

#define must_fail(expr, status)                                                                    \
    do {                                                                                           \
        sh_status must_got_ = (expr);                                                              \
        if (must_got_ != (status))                                                                 \
            fail_msg("%s is %s, expected %s (%s)", #expr, sh_status_name(must_got_),               \
                     sh_status_name(status), err.text);                                            \
    } while (0)

/* Of the last error, err. */
#define must_say(part)                                                                             \
    do {                                                                                           \
        const char *must_part_ = (part);                                                           \
        if (!strstr(err.text, must_part_))                                                         \
            fail_msg("the error does not say '%s': %s", must_part_, err.text);                     \
    } while (0)

#endif
