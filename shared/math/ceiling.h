/*
 * What this machine can do at most, measured now: the limits that a benchmark compares itself with.
 * All members of a team work at once, with the instructions of the kernel level in use. Takes 0.1
 * to 1 s a call.
 */
#ifndef SH_MATH_CEILING_H
#define SH_MATH_CEILING_H

#include "shared/math/team.h"

/* Bytes a second that are read from one buffer of `bytes` (each member reads its share, in order):
 * of memory when it is larger than the caches. The median of some passes: what memory gives while
 * something is measured, which on a shared machine is not its best moment. SH_ERR_NO_MEMORY. */
SH_MUST_USE sh_status sh_ceiling_read(sh_team *team, size_t bytes, double *bytes_per_s,
                                      sh_error *err);
/* Operations a second, a multiplication and an addition counted as two: 8-bit integers with 32-bit
 * sums, and floats; in registers alone. The best of some passes. */
double sh_ceiling_int8(sh_team *team);
double sh_ceiling_f32(sh_team *team);

#endif
