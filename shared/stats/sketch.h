/*
 * Two sketches that merge without regard to order: quantiles of positive numbers with 1 % relative
 * error, and a count of distinct things.
 *
 * Quantiles: DDSketch (Masson, Rim, Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with
 * Relative-Error Guarantees", VLDB 2019): a value v counts in bucket ceil(log(v) / log(gamma)),
 * gamma = (1 + a) / (1 - a), a = 0.01. At most SH_QUANTILE_BUCKETS buckets, which end at the
 * largest value's: what lies further below (more than a factor of 2,900) collapses into the lowest
 * bucket. That keeps merging associative, because the largest bucket of a merge alone decides what
 * is collapsed, and what was collapsed before lies at or below that line.
 *
 * Distinct: HyperLogLog (Flajolet et al. 2007) with 256 registers (standard error 6.5 %) and linear
 * counting while registers are empty.
 *
 * Threads: plain data. Ownership: by value; a zeroed sketch is empty. Nothing here allocates.
 */
#ifndef SH_STATS_SKETCH_H
#define SH_STATS_SKETCH_H

#include "shared/base/status.h"

#define SH_QUANTILE_BUCKETS   400
#define SH_QUANTILE_ERROR     0.01
#define SH_QUANTILE_INDEX_MAX 1110 /* bucket of UINT32_MAX, rounded up */
#define SH_DISTINCT_REGISTERS 256

typedef struct {
    uint64_t n;
    uint32_t top; /* index of the highest bucket in use; meaningless while n is 0 */
    uint32_t count[SH_QUANTILE_BUCKETS]; /* count[k] is bucket top - k */
} sh_quantiles;

/* 0 counts as 1: the unit (microseconds) is the resolution. Counts saturate at UINT32_MAX. */
void sh_quantiles_add(sh_quantiles *sketch, uint32_t value);
/* into += from: addition. SH_ERR_LIMIT (into is unchanged) when a count would overflow. */
SH_MUST_USE sh_status sh_quantiles_merge(sh_quantiles *into, const sh_quantiles *from);
/* The value at rank q of [0, 1]; within 1 % of an exact one; 0 when empty. */
double sh_quantiles_get(const sh_quantiles *sketch, double q);

typedef struct {
    uint8_t rank[SH_DISTINCT_REGISTERS]; /* 0 (empty) to SH_DISTINCT_RANK_MAX */
} sh_distinct;
#define SH_DISTINCT_RANK_MAX 57 /* 64 - 8 + 1 */

void sh_distinct_add(sh_distinct *sketch, uint64_t hash); /* hash: well mixed, all 64 bits */
void sh_distinct_merge(sh_distinct *into, const sh_distinct *from); /* maximum */
double sh_distinct_get(const sh_distinct *sketch);

/* A 64-bit mix (the finaliser of SplitMix64), for hashes that need not resist an attacker. */
uint64_t sh_mix64(uint64_t x);

#endif
