/*
 * Token sampling. The order of the steps is fixed: repetition penalty (Keskar et al. 2019,
 * arXiv:1909.05858), temperature, top_k, top_p (nucleus: Holtzman et al. 2020, arXiv:1904.09751),
 * min_p (Nguyen et al. 2024, arXiv:2407.01082); then one number of the caller's generator chooses
 * among what is left. Temperature 0 is greedy: the largest logit after the penalty, the lowest id
 * on ties, and no number is drawn.
 *
 *     top_k  keeps the k likeliest tokens (0: all)
 *     top_p  of these the fewest, the most probable first, that hold at least top_p (1: all)
 *     min_p  of these the ones with at least min_p times the probability of the likeliest (0: all)
 *     repeat_penalty  for each token among the last `n_recent` given: a positive logit is divided
 * by it, a negative one multiplied (1: none)
 *
 * The same seed, logits and options give the same token on every machine.
 * Threads: a sampler belongs to one thread at a time. Memory: 16 bytes a token of the vocabulary,
 * taken when first needed (not for greedy without penalty).
 */
#ifndef SH_MODEL_SAMPLER_H
#define SH_MODEL_SAMPLER_H

#include "shared/base/rng.h"
#include "shared/base/status.h"

#define SH_TEMPERATURE_LIMIT 100  /* a larger one is refused */
#define SH_REPEAT_MAX        1024 /* tokens that the penalty looks back on */

typedef struct {
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* 0: off */
    float top_p, min_p;   /* 1 and 0: off */
    float repeat_penalty; /* 1: off; 0 is taken for 1 */
    uint64_t seed;
} sh_sampling;

typedef struct sh_sampler sh_sampler;
/* SH_ERR_INVALID names the field that is out of its range. */
SH_MUST_USE sh_status sh_sampler_create(const sh_sampling *sampling, uint32_t vocab,
                                        sh_sampler **out, sh_error *err);
void sh_sampler_destroy(sh_sampler **sampler);
/* Starts anew with other options (of the same vocabulary): what a slot that is used again does. */
SH_MUST_USE sh_status sh_sampler_begin(sh_sampler *sampler, const sh_sampling *sampling,
                                       sh_error *err);
/* logits [vocab] are not changed. recent: the tokens before, the latest last (the last
 * SH_REPEAT_MAX count); may be NULL, 0. NaNs among the logits are never chosen; only NaNs: token 0.
 */
SH_MUST_USE sh_status sh_sampler_next(sh_sampler *sampler, const float *logits,
                                      const int32_t *recent, size_t n_recent, int32_t *token,
                                      sh_error *err);

/* The largest, the lowest id on ties, no NaN; 0 when there are only NaNs. n > 0. */
int32_t sh_argmax(const float *logits, uint32_t n);

/* The `n` likeliest tokens of softmax(logits) and their log-probabilities (natural), most probable
 * first, ties by id; and the log-probability of `token` where `logprob` is not NULL. What a
 * vocabulary of fewer tokens cannot fill is token -1; a probability of 0 is -INFINITY. */
typedef struct {
    int32_t token;
    float logprob;
} sh_token_logprob;
void sh_logprobs(const float *logits, uint32_t vocab, int32_t token, uint32_t n,
                 sh_token_logprob *likeliest, float *logprob);

#endif
