/*
 * Token sampling: greedy at temperature 0 (lowest id on ties), else softmax(logits / temperature)
 * with the caller's generator.
 */
#ifndef SH_MODEL_SAMPLER_H
#define SH_MODEL_SAMPLER_H

#include "shared/base/rng.h"

int32_t sh_sample(const float *logits, uint32_t vocab, float temperature, sh_rng *rng);

#endif
