/*
 * How a token is chosen. The kernels are plain loops over lanes, which the compiler turns
 * into vectors: no value depends on how wide those are, because every sum has its own fixed order
 * and exponentials are a polynomial of our own (libm's differ between machines).
 *
 * With top_k a heap of k items is kept whose root is the worst of them; almost every block of 16
 * logits is passed over after one comparison. A nucleus without top_k first drops the tokens below
 * (1 - top_p) / vocab of the sum: all of them together hold less than 1 - top_p, so what is left
 * has the nucleus in it. Then buckets of nearly equal weights are added up from the top; only the
 * one in which the nucleus ends is put in order.
 */
#include "shared/model/sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc has it off in standard C */
#endif

#define PURPOSE_SAMPLE 0x73616d70u /* "samp" */
#define PENALTY_MAX    100
#define LANES          16
#define BLOCK          64 /* weights that are added up as floats */
#define BUCKETS        512

typedef struct {
    float logit;
    int32_t token;
} item;

struct sh_sampler {
    sh_sampling how;
    uint32_t vocab;
    sh_rng rng;
    void *scratch; /* NULL before it is needed; the three are parts of it, [vocab] each */
    float *logits; /* after the penalty */
    float *weights;
    item *items;
};

/* What a draw is made of. */
typedef struct {
    const float *logits;
    uint32_t vocab;
    float max, scale; /* a weight is exp((logit - max) * scale) */
} scores;

/* ---- Kernels ---- */

static float largest_of_lanes(const float lanes[LANES])
{
    float largest = lanes[0];
    for (int j = 1; j < LANES; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    return largest;
}

/* NaNs are never greater than what is kept. */
static float largest_of_block(const float *x)
{
    float kept[LANES / 2];
    for (int j = 0; j < LANES / 2; j++)
        kept[j] = x[j] > -INFINITY ? x[j] : -INFINITY;
    for (int j = 0; j < LANES / 2; j++)
        kept[j] = x[j + LANES / 2] > kept[j] ? x[j + LANES / 2] : kept[j];
    for (int step = LANES / 4; step > 0; step /= 2)
        for (int j = 0; j < step; j++)
            kept[j] = kept[j] > kept[j + step] ? kept[j] : kept[j + step];
    return kept[0];
}

/* -INFINITY when all are NaN. Vectors by name: gcc makes none of this loop by itself. */
static float largest(const float *x, uint32_t n)
{
    typedef float floats __attribute__((vector_size(16)));
    typedef int32_t masks __attribute__((vector_size(16)));
    enum { WIDTH = 4, PARTS = LANES / WIDTH };
    floats kept[PARTS];
    float lanes[LANES];
    uint32_t i = 0;
    for (int j = 0; j < LANES; j++)
        lanes[j] = -INFINITY;
    memcpy(kept, lanes, sizeof kept);
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < PARTS; j++) {
            floats now;
            memcpy(&now, x + i + (uint32_t)j * WIDTH, sizeof now);
            const masks greater = now > kept[j]; /* not where it is NaN */
            kept[j] = (floats)(((masks)now & greater) | ((masks)kept[j] & ~greater));
        }
    memcpy(lanes, kept, sizeof lanes);
    for (; i < n; i++)
        lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    return largest_of_lanes(lanes);
}

static bool block_has(const float *x, float value)
{
    int32_t any = 0;
    for (int j = 0; j < LANES; j++)
        any |= x[j] == value;
    return any != 0;
}

int32_t sh_argmax(const float *x, uint32_t n)
{
    const float value = largest(x, n);
    uint32_t i = 0;
    while (i + LANES <= n && !block_has(x + i, value))
        i += LANES;
    for (; i < n; i++)
        if (x[i] == value)
            return (int32_t)i;
    return 0; /* only NaNs */
}

/* e^x for x <= 0: Cody and Waite's reduction by ln 2 in two parts, a polynomial of degree 7 (that
 * of Cephes' expf), 2^n by the exponent's bits; relative error below 2e-7. 0 where
 * n is -127, which is as far down as `bound` lets it go (x below -87.7, NaN). */
static inline float exp_of(float bounded)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves a whole number */
    const float n = (bounded * 1.44269504f + round) - round;
    const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float bound(float x)
{
    return x > -88.1f ? x : -88.1f;
}

/* Two loops: of one the compiler makes no vectors, for the branch that it finds in it. */
static void exponentials(const float *x, uint32_t n, float max, float scale, float *out)
{
    for (uint32_t i = 0; i < n; i++)
        out[i] = bound((x[i] - max) * scale);
    for (uint32_t i = 0; i < n; i++)
        out[i] = exp_of(out[i]);
}

static void weigh(const scores *s, float *weights)
{
    exponentials(s->logits, s->vocab, s->max, s->scale, weights);
}

static void weigh_items(const scores *s, const item *items, uint32_t n, float *weights)
{
    for (uint32_t i = 0; i < n; i++)
        weights[i] = exp_of(bound((items[i].logit - s->max) * s->scale));
}

/* The sum of a block of at most BLOCK. */
static double sum_block(const float *w, uint32_t n)
{
    float lanes[LANES] = {0};
    double sum = 0;
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] += w[i + (uint32_t)j];
    for (int j = 0; j < LANES; j++)
        sum += lanes[j];
    for (; i < n; i++)
        sum += w[i];
    return sum;
}

static double sum_of(const float *w, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i += BLOCK)
        sum += sum_block(w + i, SH_MIN(BLOCK, n - i));
    return sum;
}

/* Index of the first weight with which the sum passes unit * sum_of(w, n). */
static uint32_t draw(const float *w, uint32_t n, double unit)
{
    const double target = unit * sum_of(w, n);
    double sum = 0;
    uint32_t last = 0;
    for (uint32_t i = 0; i < n; i += BLOCK) {
        const uint32_t end = SH_MIN(n, i + BLOCK);
        const double after = sum + sum_block(w + i, end - i);
        if (after <= target) {
            sum = after;
            continue;
        }
        for (uint32_t j = i; j < end; j++) {
            sum += w[j];
            if (w[j] > 0)
                last = j; /* rounding may leave the sum of this order below the block's */
            if (sum > target)
                return j;
        }
        return last;
    }
    return last;
}

/* ---- Selection ---- */

static bool is_better(item a, item b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/* Lets heap[i] sink to its place; the root is the best or the worst. */
static void sift_down(item *heap, uint32_t n, uint32_t i, bool best)
{
    const item moved = heap[i];
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= n)
            break;
        if (child + 1 < n && is_better(heap[child + 1], heap[child]) == best)
            child++;
        if (is_better(heap[child], moved) != best)
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

static void make_heap(item *heap, uint32_t n, bool best)
{
    for (uint32_t i = n / 2; i > 0; i--)
        sift_down(heap, n, i - 1, best);
}

/* Moves the root behind the heap's end, which is now one item shorter. */
static void pop(item *heap, uint32_t n, bool best)
{
    const item root = heap[0];
    heap[0] = heap[n - 1];
    if (n > 1)
        sift_down(heap, n - 1, 0, best);
    heap[n - 1] = root;
}

static void offer(item *heap, uint32_t k, item candidate)
{
    if (!is_better(candidate, heap[0])) /* NaN is better than nothing */
        return;
    heap[0] = candidate;
    sift_down(heap, k, 0, false);
}

/* The k best, the best first; fewer where there are NaNs. */
static uint32_t select_top_k(const float *logits, uint32_t vocab, uint32_t k, item *items)
{
    uint32_t n = 0, i = 0;
    for (; i < vocab && n < k; i++)
        if (!isnan(logits[i]))
            items[n++] = (item){logits[i], (int32_t)i};
    make_heap(items, n, false);
    while (i < vocab) {
        const bool whole = i + LANES <= vocab;
        const uint32_t end = whole ? i + LANES : vocab;
        /* Of equal ones the lower id was first: only a greater one gets in. */
        if (!whole || largest_of_block(logits + i) > items[0].logit)
            for (uint32_t j = i; j < end; j++)
                offer(items, n, (item){logits[j], (int32_t)j});
        i = end;
    }
    for (uint32_t left = n; left > 1; left--)
        pop(items, left, false);
    return n;
}

static uint32_t bucket_of(const scores *s, float logit)
{
    const float below = (s->max - logit) * s->scale; /* at most 88 where there is a weight */
    return (uint32_t)SH_MIN(below * (BUCKETS / 88.0f), BUCKETS - 1.0f);
}

/* Moves the items of a bucket below `bound` to the front; returns how many. */
static uint32_t part(const scores *s, item *items, uint32_t n, uint32_t bound)
{
    uint32_t front = 0;
    for (uint32_t i = 0; i < n; i++)
        if (bucket_of(s, items[i].logit) < bound) {
            const item swapped = items[front];
            items[front++] = items[i];
            items[i] = swapped;
        }
    return front;
}

/* The fewest of all tokens that hold top_p, in no order that means something. */
static uint32_t select_nucleus(const scores *s, float top_p, float *weights, item *items)
{
    weigh(s, weights);
    const double sum = sum_of(weights, s->vocab), wanted = top_p * sum;
    /* A little lower than the bound, for what rounding moved. */
    const float least = (float)((1 - top_p) * sum / s->vocab * 0.999);
    double buckets[BUCKETS] = {0}, held = 0;
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->vocab;) {
        const uint32_t end = SH_MIN(s->vocab, i + LANES);
        if (end - i < LANES || largest_of_block(weights + i) >= least)
            for (uint32_t j = i; j < end; j++)
                if (weights[j] >= least && weights[j] > 0) {
                    items[n++] = (item){s->logits[j], (int32_t)j};
                    buckets[bucket_of(s, s->logits[j])] += weights[j];
                }
        i = end;
    }
    uint32_t crossed = 0; /* the bucket in which the nucleus ends */
    while (crossed < BUCKETS - 1 && held + buckets[crossed] < wanted)
        held += buckets[crossed++];
    const uint32_t kept = part(s, items, n, crossed);
    const uint32_t in_last = part(s, items + kept, n - kept, crossed + 1);
    item *heap = items + kept;
    make_heap(heap, in_last, true);
    uint32_t left = in_last;
    for (; left > 0 && ((left == in_last && kept == 0) || held < wanted); left--) {
        held += weights[heap[0].token];
        pop(heap, left, true);
    }
    memmove(heap, heap + left, (in_last - left) * sizeof *heap); /* popped ones lie behind it */
    return kept + in_last - left;
}

static int32_t choose(sh_sampler *sampler, const scores *s)
{
    const sh_sampling *how = &sampler->how;
    float *w = sampler->weights;
    item *items = sampler->items;
    const double unit = sh_rng_unit(&sampler->rng);
    if (!isfinite(s->max)) /* no distribution to speak of */
        return sh_argmax(s->logits, s->vocab);
    uint32_t n;
    if (how->top_k > 0 && how->top_k < s->vocab) {
        n = select_top_k(s->logits, s->vocab, how->top_k, items);
        weigh_items(s, items, n, w);
        if (how->top_p < 1) {
            const double wanted = how->top_p * sum_of(w, n);
            double held = w[0];
            uint32_t kept = 1;
            while (kept < n && held < wanted)
                held += w[kept++];
            n = kept;
        }
    } else if (how->top_p < 1) {
        n = select_nucleus(s, how->top_p, w, items);
        weigh_items(s, items, n, w);
    } else {
        weigh(s, w);
        for (uint32_t i = 0; i < s->vocab && how->min_p > 0; i++)
            w[i] = w[i] >= how->min_p ? w[i] : 0; /* the likeliest weighs 1 */
        return (int32_t)draw(w, s->vocab, unit);
    }
    for (uint32_t i = 0; i < n; i++)
        w[i] = w[i] >= how->min_p ? w[i] : 0;
    return items[draw(w, n, unit)].token;
}

/* ---- The interface ---- */

static sh_status check_range(const char *name, float value, float least, float most, sh_error *err)
{
    if (value >= least && value <= most)
        return SH_OK;
    return sh_fail(err, SH_ERR_INVALID, "%s is %g: from %g to %g is possible", name, (double)value,
                   (double)least, (double)most);
}

static sh_status check_sampling(const sh_sampling *s, sh_error *err)
{
    SH_TRY(check_range("temperature", s->temperature, 0, SH_TEMPERATURE_LIMIT, err));
    SH_TRY(check_range("top_p", s->top_p, 0, 1, err));
    SH_TRY(check_range("min_p", s->min_p, 0, 1, err));
    return check_range("repeat_penalty", s->repeat_penalty, 0, PENALTY_MAX, err);
}

sh_status sh_sampler_create(const sh_sampling *sampling, uint32_t vocab, sh_sampler **out,
                            sh_error *err)
{
    SH_ASSERT(vocab > 0 && vocab <= INT32_MAX);
    sh_sampler *s = sh_calloc(1, sizeof *s);
    if (s == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a sampler: no memory");
    s->vocab = vocab;
    const sh_status status = sh_sampler_begin(s, sampling, err);
    if (status != SH_OK) {
        free(s);
        return status;
    }
    *out = s;
    return SH_OK;
}

void sh_sampler_destroy(sh_sampler **sampler)
{
    if (*sampler == NULL)
        return;
    free((*sampler)->scratch);
    free(*sampler);
    *sampler = NULL;
}

sh_status sh_sampler_begin(sh_sampler *sampler, const sh_sampling *sampling, sh_error *err)
{
    SH_TRY(check_sampling(sampling, err));
    sampler->how = *sampling;
    if (sampler->how.repeat_penalty == 0)
        sampler->how.repeat_penalty = 1;
    sh_rng_init(&sampler->rng, sampling->seed, 0, PURPOSE_SAMPLE);
    return SH_OK;
}

static sh_status take_scratch(sh_sampler *s, sh_error *err)
{
    if (s->scratch != NULL)
        return SH_OK;
    const size_t vocab = s->vocab;
    s->scratch = sh_alloc_aligned(vocab * (2 * sizeof(float) + sizeof(item)));
    if (s->scratch == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "sampling among %u tokens: no memory", s->vocab);
    s->logits = s->scratch;
    s->weights = s->logits + vocab;
    s->items = (item *)(s->weights + vocab);
    return SH_OK;
}

/* Each token once, however often it was there: always from its own logit. */
static sh_status penalize(sh_sampler *s, const float *logits, const int32_t *recent, size_t n,
                          sh_error *err)
{
    const float penalty = s->how.repeat_penalty;
    memcpy(s->logits, logits, s->vocab * sizeof *logits);
    for (size_t i = n - SH_MIN(n, SH_REPEAT_MAX); i < n; i++) {
        if (recent[i] < 0 || (uint32_t)recent[i] >= s->vocab)
            return sh_fail(err, SH_ERR_INVALID, "token %d is outside the vocabulary of %u",
                           recent[i], s->vocab);
        const float logit = logits[recent[i]];
        s->logits[recent[i]] = logit > 0 ? logit / penalty : logit * penalty;
    }
    return SH_OK;
}

sh_status sh_sampler_next(sh_sampler *sampler, const float *logits, const int32_t *recent,
                          size_t n_recent, int32_t *token, sh_error *err)
{
    sh_sampler *s = sampler;
    const bool greedy = s->how.temperature == 0;
    const bool penalty = s->how.repeat_penalty != 1 && n_recent > 0;
    if (!greedy || penalty)
        SH_TRY(take_scratch(s, err));
    if (penalty) {
        SH_TRY(penalize(s, logits, recent, n_recent, err));
        logits = s->logits;
    }
    if (greedy) {
        *token = sh_argmax(logits, s->vocab);
        return SH_OK;
    }
    const float scale = 1 / s->how.temperature;
    const scores of = {.logits = logits,
                       .vocab = s->vocab,
                       .max = largest(logits, s->vocab),
                       .scale = scale < FLT_MAX ? scale : FLT_MAX}; /* infinity times 0 is NaN */
    *token = choose(s, &of);
    return SH_OK;
}

void sh_logprobs(const float *logits, uint32_t vocab, int32_t token, uint32_t n,
                 sh_token_logprob *likeliest, float *logprob)
{
    const float max = largest(logits, vocab);
    double sum = 0;
    for (uint32_t i = 0; i < vocab; i += BLOCK) {
        float w[BLOCK];
        const uint32_t count = SH_MIN(BLOCK, vocab - i);
        exponentials(logits + i, count, max, 1, w);
        sum += sum_block(w, count);
    }
    const double log_sum = isfinite(max) && sum > 0 ? (double)max + log(sum) : INFINITY;
    if (logprob != NULL) {
        SH_ASSERT(token >= 0 && (uint32_t)token < vocab);
        const double p = logits[token] - log_sum;
        *logprob = p == p ? (float)p : -INFINITY;
    }
    /* Kept sorted, the best first: n is small. The logit stands in for the logarithm until the
     * end. */
    uint32_t kept = 0;
    for (uint32_t i = 0; i < vocab && n > 0; i++) {
        if (isnan(logits[i]) || (kept == n && logits[i] <= likeliest[n - 1].logprob))
            continue;
        uint32_t at = kept < n ? kept++ : n - 1;
        for (; at > 0 && logits[i] > likeliest[at - 1].logprob; at--)
            likeliest[at] = likeliest[at - 1];
        likeliest[at] = (sh_token_logprob){(int32_t)i, logits[i]};
    }
    for (uint32_t i = 0; i < n; i++)
        likeliest[i] = i < kept ? (sh_token_logprob){likeliest[i].token,
                                                     (float)(likeliest[i].logprob - log_sum)}
                                : (sh_token_logprob){-1, -INFINITY};
}
