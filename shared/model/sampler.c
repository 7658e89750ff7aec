#include "shared/model/sampler.h"

#include <math.h>

#include "shared/base/status.h"

static int32_t argmax(const float *logits, uint32_t vocab)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

int32_t sh_sample(const float *logits, uint32_t vocab, float temperature, sh_rng *rng)
{
    SH_ASSERT(vocab > 0);
    const int32_t top = argmax(logits, vocab);
    if (!(temperature > 0))
        return top;
    /* Two passes instead of a buffer of probabilities: the vocabulary may be large. */
    const double max = logits[top], scale = 1.0 / temperature;
    double sum = 0;
    for (uint32_t i = 0; i < vocab; i++)
        sum += exp((logits[i] - max) * scale);
    const double target = sh_rng_unit(rng) * sum;
    double cumulated = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        cumulated += exp((logits[i] - max) * scale);
        if (cumulated > target)
            return (int32_t)i;
    }
    return top; /* only when every term is NaN: the same sum was above target */
}
