#include "shared/stats/sketch.h"

#include <math.h>
#include <string.h>

/* log((1 + a) / (1 - a)) for a = SH_QUANTILE_ERROR: the width of a bucket in log space. */
#define LOG_GAMMA 0.020000666706669543

uint64_t sh_mix64(uint64_t x)
{
    x += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
}

static uint32_t saturating_add(uint32_t a, uint32_t b)
{
    return a > UINT32_MAX - b ? UINT32_MAX : a + b;
}

/* Makes `top` the highest bucket: counts move up the array, the tail collapses into the last. */
static void raise_top(sh_quantiles *sketch, uint32_t top)
{
    uint32_t by = top - sketch->top;
    if (by == 0)
        return;
    uint32_t tail = 0;
    uint32_t keep = by < SH_QUANTILE_BUCKETS ? SH_QUANTILE_BUCKETS - by : 0;
    for (uint32_t k = keep; k < SH_QUANTILE_BUCKETS; k++)
        tail = saturating_add(tail, sketch->count[k]);
    memmove(sketch->count + (SH_QUANTILE_BUCKETS - keep), sketch->count,
            keep * sizeof(sketch->count[0]));
    memset(sketch->count, 0, (SH_QUANTILE_BUCKETS - keep) * sizeof(sketch->count[0]));
    uint32_t *last = &sketch->count[SH_QUANTILE_BUCKETS - 1];
    *last = saturating_add(*last, tail);
    sketch->top = top;
}

static void add_bucket(sh_quantiles *sketch, uint32_t index, uint32_t count)
{
    if (sketch->n == 0)
        sketch->top = index;
    else if (index > sketch->top)
        raise_top(sketch, index);
    uint32_t k = SH_MIN(sketch->top - index, SH_QUANTILE_BUCKETS - 1U);
    sketch->count[k] = saturating_add(sketch->count[k], count);
    sketch->n += count;
}

void sh_quantiles_add(sh_quantiles *sketch, uint32_t value)
{
    double index = value <= 1 ? 0 : ceil(log((double)value) / LOG_GAMMA);
    add_bucket(sketch, (uint32_t)index, 1);
}

sh_status sh_quantiles_merge(sh_quantiles *into, const sh_quantiles *from)
{
    if (from->n == 0)
        return SH_OK;
    /* No bucket can hold more than n, so this alone keeps every count from overflowing. */
    if (into->n > UINT32_MAX || from->n > UINT32_MAX || into->n + from->n > UINT32_MAX)
        return SH_ERR_LIMIT;
    if (into->n == 0) {
        *into = *from;
        return SH_OK;
    }
    if (from->top > into->top)
        raise_top(into, from->top);
    for (uint32_t k = 0; k < SH_QUANTILE_BUCKETS; k++) {
        if (from->count[k] == 0)
            continue;
        uint32_t at = SH_MIN(into->top - from->top + k, SH_QUANTILE_BUCKETS - 1U);
        into->count[at] += from->count[k];
    }
    into->n += from->n;
    return SH_OK;
}

double sh_quantiles_get(const sh_quantiles *sketch, double q)
{
    if (sketch->n == 0)
        return 0;
    double rank = q * (double)(sketch->n - 1);
    uint64_t below = 0;
    for (uint32_t k = SH_QUANTILE_BUCKETS; k-- > 0;) {
        below += sketch->count[k];
        if (sketch->count[k] > 0 && (double)below > rank) {
            /* The middle of (gamma^(i-1), gamma^i] in relative terms: 2 gamma^i / (gamma + 1). */
            double index = sketch->top > k ? (double)(sketch->top - k) : 0;
            return 2 * exp(index * LOG_GAMMA) / (exp(LOG_GAMMA) + 1);
        }
    }
    return 2 * exp((double)sketch->top * LOG_GAMMA) / (exp(LOG_GAMMA) + 1);
}

void sh_distinct_add(sh_distinct *sketch, uint64_t hash)
{
    unsigned at = (unsigned)(hash % SH_DISTINCT_REGISTERS);
    uint64_t rest = hash / SH_DISTINCT_REGISTERS; /* 56 bits */
    uint8_t rank = 1;
    while (rank < SH_DISTINCT_RANK_MAX && (rest & 1) == 0) {
        rest >>= 1;
        rank++;
    }
    if (rank > sketch->rank[at])
        sketch->rank[at] = rank;
}

void sh_distinct_merge(sh_distinct *into, const sh_distinct *from)
{
    for (size_t i = 0; i < SH_DISTINCT_REGISTERS; i++)
        into->rank[i] = SH_MAX(into->rank[i], from->rank[i]);
}

double sh_distinct_get(const sh_distinct *sketch)
{
    const double m = SH_DISTINCT_REGISTERS;
    double inverse_sum = 0;
    unsigned empty = 0;
    for (size_t i = 0; i < SH_DISTINCT_REGISTERS; i++) {
        inverse_sum += ldexp(1.0, -sketch->rank[i]);
        empty += sketch->rank[i] == 0;
    }
    double raw = 0.7213 / (1 + 1.079 / m) * m * m / inverse_sum;
    return raw <= 2.5 * m && empty > 0 ? m * log(m / empty) : raw;
}
