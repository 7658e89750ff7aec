/* What the merging files share: factors one beside another. */
#ifndef SH_AGGREGATOR_MERGE_INTERNAL_H
#define SH_AGGREGATOR_MERGE_INTERNAL_H

#include "aggregator/merge.h"

/* b_stack [out, ranks] = [s₁B₁ s₂B₂ …]. */
void merge_stack_b(const sh_factor *factors, size_t n, uint32_t out, size_t ranks, float *b_stack);
/* a_stack [ranks, in] = [A₁; A₂; …]. */
void merge_stack_a(const sh_factor *factors, size_t n, uint32_t in, float *a_stack);

#endif
