#include "shared/base/rng.h"

#include <math.h>
#include <string.h>

#define PHILOX_ROUNDS 10
#define PHILOX_M0     0xD2511F53u
#define PHILOX_M1     0xCD9E8D57u
#define PHILOX_W0     0x9E3779B9u /* golden ratio */
#define PHILOX_W1     0xBB67AE85u /* sqrt(3) - 1 */

void sh_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)PHILOX_M0 * c0, p1 = (uint64_t)PHILOX_M1 * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

void sh_rng_init(sh_rng *rng, uint64_t seed, uint64_t stream, uint32_t purpose)
{
    *rng = (sh_rng){
        .key = {(uint32_t)seed, (uint32_t)(seed >> 32)},
        .counter = {0, purpose, (uint32_t)stream, (uint32_t)(stream >> 32)},
        .used = 4,
    };
}

uint32_t sh_rng_u32(sh_rng *rng)
{
    if (rng->used >= 4) {
        sh_philox4x32(rng->counter, rng->key, rng->block);
        rng->counter[0]++;
        /* 2^34 numbers from one generator: past that it would repeat itself. */
        SH_ASSERT(rng->counter[0] != 0);
        rng->used = 0;
    }
    return rng->block[rng->used++];
}

uint64_t sh_rng_u64(sh_rng *rng)
{
    uint64_t low = sh_rng_u32(rng);
    return low | (uint64_t)sh_rng_u32(rng) << 32;
}

uint64_t sh_rng_below(sh_rng *rng, uint64_t n)
{
    SH_ASSERT(n > 0);
    /* 2^64 mod n values are refused, so that what is left divides evenly. */
    uint64_t refused = (0 - n) % n, x;
    do
        x = sh_rng_u64(rng);
    while (x < refused);
    return x % n;
}

double sh_rng_unit(sh_rng *rng)
{
    return (double)(sh_rng_u64(rng) >> 11) * 0x1p-53;
}

float sh_rng_normal(sh_rng *rng)
{
    double u = ((double)sh_rng_u32(rng) + 1) * 0x1p-32; /* (0, 1], so that log is finite */
    double v = (double)sh_rng_u32(rng) * 0x1p-32;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

void sh_rng_shuffle(sh_rng *rng, uint32_t *items, size_t n)
{
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)sh_rng_below(rng, i);
        uint32_t item = items[i - 1];
        items[i - 1] = items[j];
        items[j] = item;
    }
}
