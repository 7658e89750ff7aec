/*
 * LoRA dropout (Srivastava et al. 2014, JMLR 15; on the input of A as in PEFT). Masks are not kept:
 * they are drawn again where they are needed, from the generator that the seed, the step and the
 * sequence's place in the batch name, so that they hang on nothing of how the work is cut up.
 */
#include <math.h>

#include "trainer/network.h"

#define PURPOSE_DROPOUT 0x64726f70u /* names this use of the generator */
#define DRAWS           8           /* 16 bits each, of a block of the generator */
#define DRAW_VALUES     65536       /* p is a multiple of 1 / this */

/* Draws of one row: blocks of Philox whose counter is as sh_rng_init's. */
typedef struct {
    uint32_t key[2], counter[4];
} row_draws;

static row_draws draws_of(const tr_net *net, const tr_work *work, const tr_place *at, size_t row)
{
    const size_t positions = work->shape.positions;
    const uint32_t sequence = work->first + (uint32_t)(row / positions);
    sh_rng rng;
    sh_rng_init(&rng, net->dropout.seed, (uint64_t)net->dropout.step << 32 | sequence,
                PURPOSE_DROPOUT);
    row_draws d = {.counter = {0, PURPOSE_DROPOUT, (uint32_t)(row % positions),
                               (uint32_t)(at->layer * TR_MATRICES + at->g)}};
    d.key[0] = sh_rng_u32(&rng);
    d.key[1] = sh_rng_u32(&rng);
    return d;
}

void tr_drop(const tr_net *net, const tr_work *work, const tr_place *at, const float *x, float *y)
{
    const size_t in = net->groups[at->g].in;
    const uint32_t below =
        SH_MIN((uint32_t)lrintf(net->dropout.p * DRAW_VALUES), (uint32_t)DRAW_VALUES - 1);
    const float scale = (float)DRAW_VALUES / (float)(DRAW_VALUES - below);
    for (size_t row = 0; row < at->rows; row++, x += in, y += in) {
        row_draws d = draws_of(net, work, at, at->index ? at->index[row] : row);
        for (size_t i = 0; i < in; i += DRAWS, d.counter[0]++) {
            uint32_t bits[DRAWS / 2];
            sh_philox4x32(d.counter, d.key, bits);
            for (size_t j = 0; j < DRAWS && i + j < in; j++) {
                const uint32_t draw = bits[j / 2] >> (16 * (j % 2)) & (DRAW_VALUES - 1);
                y[i + j] = draw < below ? 0.0f : x[i + j] * scale;
            }
        }
    }
}
