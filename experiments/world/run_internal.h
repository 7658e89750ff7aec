/* What run.c, faults.c and report.c share. */
#ifndef WORLD_RUN_INTERNAL_H
#define WORLD_RUN_INTERNAL_H

#include "experiments/world/world.h"

#define AUDIT_NODES_MAX 200u /* in a larger fleet only the end is audited, and nodes by turns */

void world_add_counts(world_counts *to, const world_counts *from);
void world_progress_run(const world *w, uint64_t now_ms); /* on a terminal, now and then */
void world_progress_seeds(const world_options *options, uint64_t done, uint64_t n,
                          uint64_t violations);
void world_progress_end(void);

#endif
