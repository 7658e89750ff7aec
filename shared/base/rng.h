/*
 * Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
 * 1, 2, 3", SC'11). A generator is named by (seed, stream, purpose), so that no draw depends on
 * which thread makes it or on what others drew. Plain data: copy it to fork it.
 */
#ifndef SH_BASE_RNG_H
#define SH_BASE_RNG_H

#include "shared/base/status.h"

typedef struct {
    uint32_t key[2], counter[4], block[4];
    unsigned used; /* numbers of block that are spent */
} sh_rng;

/* The block function itself: 128 counter bits and 64 key bits to 128 random bits. */
void sh_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* The key is the seed, the counter is (block, purpose, stream): a generator gives 2^34 numbers.
 * stream: usually a node's index; purpose: a constant of the caller, one for each use. */
void sh_rng_init(sh_rng *rng, uint64_t seed, uint64_t stream, uint32_t purpose);
uint32_t sh_rng_u32(sh_rng *rng);
uint64_t sh_rng_u64(sh_rng *rng);
uint64_t sh_rng_below(sh_rng *rng, uint64_t n); /* uniform in [0, n), n > 0, without bias */
double sh_rng_unit(sh_rng *rng);                /* uniform in [0, 1), 53 bits */
float sh_rng_normal(sh_rng *rng);               /* standard normal, Box-Muller */
void sh_rng_shuffle(sh_rng *rng, uint32_t *items, size_t n);

#endif
