#include "tests/stats/traffic.h"

#include <math.h>
#include <string.h>

#define VOCABULARY 1000

const traffic_options traffic_default = {.nll = 3.5,
                                         .nll_passage_sd = 0.4,
                                         .nll_sd = 0.7,
                                         .nll_memory = 0.5,
                                         .reject = 0.7,
                                         .reject_passage_sd = 0.08,
                                         .passage_least = 10,
                                         .passage_most = 50};

void traffic_init(traffic *t, const traffic_options *options, uint64_t seed)
{
    memset(t, 0, sizeof(*t));
    t->options = *options;
    sh_rng_init(&t->rng, seed, 0, 1);
}

/* Word frequencies fall off as 1/rank, as they do in text. */
static int32_t word(traffic *t)
{
    double u = sh_rng_unit(&t->rng);
    int32_t rank = (int32_t)(pow(VOCABULARY + 1, u)) - 1;
    return sh_rng_unit(&t->rng) < t->options.off_topic ? VOCABULARY + rank : rank;
}

static void next_passage(traffic *t)
{
    const traffic_options *o = &t->options;
    t->left =
        o->passage_least + (unsigned)sh_rng_below(&t->rng, o->passage_most - o->passage_least + 1);
    t->prompt_tokens = 0;
    t->passage_nll = o->nll + o->nll_passage_sd * sh_rng_normal(&t->rng);
    t->passage_reject = o->reject + o->reject_passage_sd * sh_rng_normal(&t->rng);
    t->noise = o->nll_sd * sh_rng_normal(&t->rng);
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        t->passage_projection[i] = 8 * sh_rng_normal(&t->rng) + (i < 4 ? o->projection_shift : 0);
    for (size_t i = 0; i < SH_COUNT(t->passage_words); i++)
        t->passage_words[i] = word(t);
}

sh_record traffic_next(traffic *t)
{
    const traffic_options *o = &t->options;
    if (t->left == 0)
        next_passage(t);
    t->left--;
    double fresh = sqrt(1 - o->nll_memory * o->nll_memory) * o->nll_sd;
    t->noise = o->nll_memory * t->noise + fresh * sh_rng_normal(&t->rng);
    t->prompt_tokens = SH_MIN(t->prompt_tokens + 5U, 40U);
    t->seq++;
    sh_record r = {.seq = t->seq,
                   .at_ms = 1000 * t->seq,
                   .release_version = 1,
                   .ttft_us = 2000 + (uint32_t)sh_rng_below(&t->rng, 8000),
                   .token_us = 300 + (uint32_t)sh_rng_below(&t->rng, 100),
                   .prompt_tokens = (uint16_t)t->prompt_tokens,
                   .output_tokens = 4,
                   .prompt_nll = (float)fmax(0.05, t->passage_nll + t->noise),
                   .mean_logprob = -2.5F,
                   .least_logprob = -7,
                   .mean_entropy = 3,
                   .repeated_4grams = 0.01F};
    r.byte_fallback = sh_rng_below(&t->rng, 200) == 0 ? 0.1F : 0;
    r.feedback = sh_rng_unit(&t->rng) < t->passage_reject ? SH_FEEDBACK_EDIT : SH_FEEDBACK_ACCEPT;
    r.edit_distance = r.feedback == SH_FEEDBACK_EDIT ? 3 : 0;
    for (size_t i = 0; i < SH_PROJECTIONS; i++) {
        double p = t->passage_projection[i] + 12 * sh_rng_normal(&t->rng);
        r.projection[i] = (int8_t)lrint(fmin(fmax(p, -127), 127));
    }
    for (unsigned i = 0; i < t->prompt_tokens; i++) {
        bool topical = sh_rng_below(&t->rng, 3) == 0;
        size_t pick = (size_t)sh_rng_below(&t->rng, SH_COUNT(t->passage_words));
        sh_record_count_token(&r, topical ? t->passage_words[pick] : word(t));
    }
    return r;
}
