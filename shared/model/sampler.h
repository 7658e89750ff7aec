/*
 * Token sampling: greedy at temperature 0 (lowest id on ties), else softmax(logits / temperature)
 * with the caller's generator, of all tokens or of the nucleus: the fewest tokens, the most
 * probable first, that hold at least top_p of the probability (Holtzman et al. 2020,
 * arXiv:1904.09751).
 */
#ifndef SH_MODEL_SAMPLER_H
#define SH_MODEL_SAMPLER_H

#include "shared/base/rng.h"

int32_t sh_sample(const float *logits, uint32_t vocab, float temperature, sh_rng *rng);

typedef struct {
    double weight;
    int32_t token;
} sh_sample_item;
/* The same with top_p; 1 or more, and temperature 0, are sh_sample. scratch is [vocab], the
 * caller's; it may be NULL where it is not needed. One number is drawn, or none when greedy. */
int32_t sh_sample_top_p(const float *logits, uint32_t vocab, float temperature, float top_p,
                        sh_sample_item *scratch, sh_rng *rng);

#endif
