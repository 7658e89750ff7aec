/*
 * Synthetic users for the monitor's tests: inferences that come in passages, so that neighbours
 * are alike, as those of a real text are. Everything follows from the seed.
 */
#ifndef TESTS_STATS_TRAFFIC_H
#define TESTS_STATS_TRAFFIC_H

#include "shared/base/rng.h"
#include "shared/stats/monitor.h"

typedef struct {
    double nll, nll_passage_sd, nll_sd, nll_memory; /* mean; between, within passages; AR(1) */
    double reject, reject_passage_sd;
    double off_topic; /* share of tokens from a vocabulary that the first topic does not use */
    double projection_shift;
    unsigned passage_least, passage_most; /* inferences */
} traffic_options;

extern const traffic_options traffic_default;

typedef struct {
    traffic_options options;
    sh_rng rng;
    uint64_t seq;
    unsigned left; /* inferences of this passage */
    unsigned prompt_tokens;
    double passage_nll, noise, passage_reject;
    double passage_projection[SH_PROJECTIONS];
    int32_t passage_words[24];
} traffic;

void traffic_init(traffic *t, const traffic_options *options, uint64_t seed);
sh_record traffic_next(traffic *t);

#endif
