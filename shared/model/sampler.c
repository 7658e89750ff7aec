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

static bool is_before(sh_sample_item a, sh_sample_item b)
{
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

/* Lets heap[i] sink to its place. */
static void sift_down(sh_sample_item *heap, uint32_t n, uint32_t i)
{
    const sh_sample_item item = heap[i];
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= n)
            break;
        if (child + 1 < n && is_before(heap[child + 1], heap[child]))
            child++;
        if (!is_before(heap[child], item))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = item;
}

int32_t sh_sample_top_p(const float *logits, uint32_t vocab, float temperature, float top_p,
                        sh_sample_item *scratch, sh_rng *rng)
{
    if (!(temperature > 0) || top_p >= 1)
        return sh_sample(logits, vocab, temperature, rng);
    SH_ASSERT(vocab > 0 && scratch != NULL);
    /* A heap: the nucleus is a few tokens of many, most need no order. */
    const int32_t top = argmax(logits, vocab);
    const double max = logits[top], scale = 1.0 / temperature;
    double sum = 0;
    for (uint32_t i = 0; i < vocab; i++) {
        scratch[i] = (sh_sample_item){exp((logits[i] - max) * scale), (int32_t)i};
        sum += scratch[i].weight;
    }
    for (uint32_t i = vocab / 2; i > 0; i--)
        sift_down(scratch, vocab, i - 1);
    /* What is taken out of the heap is kept behind its end, the most probable last. */
    uint32_t left = vocab;
    double nucleus = 0;
    while (left > 0 && (left == vocab || nucleus < top_p * sum)) {
        const sh_sample_item first = scratch[0];
        scratch[0] = scratch[--left];
        sift_down(scratch, left > 0 ? left : 1, 0);
        scratch[left] = first;
        nucleus += first.weight;
    }
    const double target = sh_rng_unit(rng) * nucleus;
    double cumulated = 0;
    for (uint32_t i = vocab; i > left; i--) {
        cumulated += scratch[i - 1].weight;
        if (cumulated > target)
            return scratch[i - 1].token;
    }
    return top; /* only when a weight is NaN */
}
