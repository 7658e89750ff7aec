/*
 * Integers in stored values: little-endian, read with a bound. For the rows that sync keeps; keys
 * are big-endian (sh_key_put_u64).
 */
#ifndef SH_SYNC_CODEC_H
#define SH_SYNC_CODEC_H

#include <string.h>

#include "shared/base/status.h"

static inline void sh_put_le64(uint8_t *out, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        out[i] = (uint8_t)(x >> (8 * i));
}

static inline uint64_t sh_get_le64(const uint8_t *in)
{
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x |= (uint64_t)in[i] << (8 * i);
    return x;
}

#endif
