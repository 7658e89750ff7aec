/*
 * Named fail points: places where a test, the simulator or (by an environment variable) a real
 * process can be made to crash. A fail point is armed by name with the number of passes to let
 * through; hitting it returns true once. Every name is listed in docs/architecture.md.
 * An sh_failpoints is owned by one shell and is not thread-safe.
 */
#ifndef SH_BASE_FAILPOINT_H
#define SH_BASE_FAILPOINT_H

#include "shared/base/status.h"

#define SH_FAILPOINTS_MAX     32
#define SH_FAILPOINT_NAME_MAX 48

typedef struct {
    char name[SH_FAILPOINT_NAME_MAX];
    uint32_t skip, hits; /* passes still let through; times it fired */
    bool armed;
} sh_failpoint;

typedef struct {
    sh_failpoint points[SH_FAILPOINTS_MAX];
    size_t n;
} sh_failpoints;

/* SH_ERR_LIMIT when the table or the name is too long. */
SH_MUST_USE sh_status sh_failpoint_arm(sh_failpoints *set, const char *name, uint32_t skip,
                                       sh_error *err);
/* The same for a list such as "outbox.commit:3,release.switch" (name, then the passes to let
 * through, 0 when not given), which is how an environment variable arms a real process. */
SH_MUST_USE sh_status sh_failpoint_arm_list(sh_failpoints *set, const char *list, sh_error *err);
/* True exactly when the armed point's passes are used up; it is disarmed by that. set may be NULL.
 */
bool sh_failpoint_hit(sh_failpoints *set, const char *name);

#endif
