/*
 * Scripts for the fuzz targets of the cores. An input is a list of steps, each
 *
 *     u8 operation, u8 a, u8 b, u8 n, n bytes
 *
 * so that any bytes are a script, a cut one a shorter script, and most flips change one step.
 * Numbers that a script may need larger than a byte are made of its bytes by the target.
 */
#ifndef SH_TESTS_FUZZ_OPS_H
#define SH_TESTS_FUZZ_OPS_H

#include "shared/wire/wire.h"

#define FUZZ_STEPS_MAX 64

typedef struct {
    uint8_t op, a, b, n;
    const uint8_t *bytes; /* [n] */
} fuzz_step;

typedef struct {
    const uint8_t *data;
    size_t left;
    unsigned steps;
} fuzz_script;

/* False: it is over. A step that is cut off has the bytes that are there. */
static inline bool fuzz_next(fuzz_script *s, fuzz_step *out)
{
    if (s->left < 4 || s->steps >= FUZZ_STEPS_MAX)
        return false;
    *out = (fuzz_step){s->data[0], s->data[1], s->data[2], s->data[3], s->data + 4};
    out->n = (uint8_t)SH_MIN((size_t)out->n, s->left - 4);
    s->data += 4 + out->n;
    s->left -= 4u + out->n;
    s->steps++;
    return true;
}

/* A number of up to eight of its bytes, highest first; without bytes `otherwise`. */
static inline uint64_t fuzz_number(const fuzz_step *step, uint64_t otherwise)
{
    uint64_t x = 0;
    for (size_t i = 0; i < SH_MIN((size_t)step->n, (size_t)8); i++)
        x = x << 8 | step->bytes[i];
    return step->n ? x : otherwise;
}

#endif
