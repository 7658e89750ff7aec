/* Sampling: what can be chosen, against a naive sort; how often, against exact probabilities. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "shared/model/sampler.h"

enum { VOCAB = 10, DRAWS = 20000 };
static const float ten[VOCAB] = {0.3f, -1, 0.5f, 0, 1.2f, -0.7f, 0.1f, 0.9f, -0.2f, 0.5f};

static sh_sampling plain(float temperature)
{
    return (sh_sampling){.temperature = temperature, .top_p = 1, .repeat_penalty = 1, .seed = 42};
}

static sh_sampler *make(sh_sampling how, uint32_t vocab)
{
    sh_sampler *sampler = NULL;
    sh_error err = {0};
    if (sh_sampler_create(&how, vocab, &sampler, &err) != SH_OK)
        fail_msg("%s", err.text);
    return sampler;
}

static int32_t next(sh_sampler *sampler, const float *logits)
{
    int32_t token = -1;
    assert_int_equal(sh_sampler_next(sampler, logits, NULL, 0, &token, NULL), SH_OK);
    return token;
}

/* One token of a sampler of its own. */
static int32_t once(sh_sampling how, const float *logits, uint32_t vocab)
{
    sh_sampler *sampler = make(how, vocab);
    const int32_t token = next(sampler, logits);
    sh_sampler_destroy(&sampler);
    assert_null(sampler);
    return token;
}

/* ---- The naive one: sorts everything, in double ---- */

typedef struct {
    double p; /* 0: cannot come */
    float logit;
    int32_t token;
} naive_item;

static int by_logit(const void *a, const void *b)
{
    const naive_item *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit < y->logit ? 1 : -1;
    return x->token < y->token ? -1 : 1;
}

/* p [vocab]: the exact probabilities; *closest: how near a sum or a ratio came to a bound,
 * relative, where floats may decide otherwise. */
static void naive(const sh_sampling *how, const float *logits, uint32_t vocab, double *p,
                  double *closest)
{
    naive_item *items = calloc(vocab, sizeof *items);
    assert_non_null(items);
    double sum = 0, held = 0;
    *closest = 1;
    for (uint32_t i = 0; i < vocab; i++)
        items[i] = (naive_item){0, isnan(logits[i]) ? -INFINITY : logits[i], (int32_t)i};
    qsort(items, vocab, sizeof *items, by_logit);
    uint32_t n = how->top_k > 0 && how->top_k < vocab ? how->top_k : vocab;
    for (uint32_t i = 0; i < n; i++)
        sum += items[i].p = exp(((double)items[i].logit - items[0].logit) / how->temperature);
    if (how->top_p < 1) {
        uint32_t kept = 0;
        while (kept < n && (kept == 0 || held < how->top_p * sum)) {
            held += items[kept++].p;
            *closest = fmin(*closest, fabs(held / (how->top_p * sum) - 1));
        }
        n = kept;
    }
    for (uint32_t i = 0; i < n; i++)
        if (how->min_p > 0)
            *closest = fmin(*closest, fabs(items[i].p / how->min_p - 1));
    while (n > 1 && items[n - 1].p < how->min_p)
        n--;
    sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += items[i].p;
    memset(p, 0, vocab * sizeof *p);
    for (uint32_t i = 0; i < n; i++)
        p[items[i].token] = items[i].p / sum;
    free(items);
}

/* 99.9 % of true samplers stay below this chi-square (Wilson and Hilferty 1931). */
static double chi_square_limit(unsigned freedom)
{
    const double f = freedom, t = 1 - 2 / (9 * f) + 3.09 * sqrt(2 / (9 * f));
    return f * t * t * t;
}

static void check_distribution(const sh_sampling *how)
{
    double p[VOCAB], closest, chi_square = 0;
    unsigned counts[VOCAB] = {0}, kept = 0;
    naive(how, ten, VOCAB, p, &closest);
    sh_sampler *sampler = make(*how, VOCAB);
    for (int i = 0; i < DRAWS; i++) {
        const int32_t token = next(sampler, ten);
        assert_in_range(token, 0, VOCAB - 1);
        counts[token]++;
    }
    sh_sampler_destroy(&sampler);
    for (int i = 0; i < VOCAB; i++) {
        if (p[i] == 0) {
            assert_int_equal(counts[i], 0);
            continue;
        }
        const double expected = p[i] * DRAWS;
        chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
        kept++;
    }
    if (kept > 1 && !(chi_square < chi_square_limit(kept - 1)))
        fail_msg("temperature %g, top_k %u, top_p %g, min_p %g: chi-square %.1f of %u tokens is "
                 "over %.1f",
                 how->temperature, how->top_k, how->top_p, how->min_p, chi_square, kept,
                 chi_square_limit(kept - 1));
}

static void test_distribution(void **state)
{
    (void)state;
    static const float temperatures[] = {0.5f, 1, 3}, top_ps[] = {1, 0.9f, 0.5f, 0.05f};
    static const float min_ps[] = {0, 0.3f};
    static const uint32_t top_ks[] = {0, 1, 4, 9, 50};
    uint64_t seed = 1;
    for (size_t t = 0; t < SH_COUNT(temperatures); t++)
        for (size_t k = 0; k < SH_COUNT(top_ks); k++)
            for (size_t p = 0; p < SH_COUNT(top_ps); p++)
                for (size_t m = 0; m < SH_COUNT(min_ps); m++) {
                    const sh_sampling how = {.temperature = temperatures[t],
                                             .top_k = top_ks[k],
                                             .top_p = top_ps[p],
                                             .min_p = min_ps[m],
                                             .repeat_penalty = 1,
                                             .seed = seed++};
                    check_distribution(&how);
                }
}

/* Over vocabularies of many sizes, with ties, infinities and NaNs, nothing comes that may not, and
 * (the sets are small) everything that may. */
static void test_sets(void **state)
{
    (void)state;
    enum { MOST = 700 };
    float logits[MOST];
    double p[MOST], closest;
    sh_rng rng;
    sh_rng_init(&rng, 11, 0, 1);
    for (uint32_t round = 0; round < 300; round++) {
        const uint32_t vocab = 1 + (uint32_t)sh_rng_below(&rng, MOST);
        for (uint32_t i = 0; i < vocab; i++) {
            logits[i] = 4 * sh_rng_normal(&rng);
            if (round % 3 == 0)
                logits[i] = roundf(logits[i]); /* many are equal */
            if (round % 5 == 0 && i > 0 && sh_rng_below(&rng, 8) == 0)
                logits[i] = sh_rng_below(&rng, 2) ? NAN : -INFINITY;
        }
        const sh_sampling how = {.temperature = 0.5f + (float)sh_rng_unit(&rng),
                                 .top_k = round % 2 ? (uint32_t)sh_rng_below(&rng, 40) : 0,
                                 .top_p =
                                     round % 4 < 2 ? 0.1f + 0.8f * (float)sh_rng_unit(&rng) : 1,
                                 .min_p = round % 8 < 4 ? 0.2f * (float)sh_rng_unit(&rng) : 0,
                                 .repeat_penalty = 1,
                                 .seed = round};
        naive(&how, logits, vocab, p, &closest);
        if (closest < 1e-5) /* floats may draw the line on its other side */
            continue;
        sh_sampler *sampler = make(how, vocab);
        bool seen[MOST] = {0};
        for (int i = 0; i < 2000; i++) {
            const int32_t token = next(sampler, logits);
            assert_in_range(token, 0, vocab - 1);
            if (p[token] == 0)
                fail_msg("round %u: token %d of %u came", round, token, vocab);
            seen[token] = true;
        }
        sh_sampler_destroy(&sampler);
        for (uint32_t i = 0; i < vocab; i++) /* 2000 draws miss one of 0.01 once in 5e8 times */
            if (p[i] > 0.01 && !seen[i])
                fail_msg("round %u: token %u of %u, probability %g, never came", round, i, vocab,
                         p[i]);
    }
}

static void test_greedy(void **state)
{
    (void)state;
    const float logits[] = {1, 5, -3, 5, 4};
    assert_int_equal(once(plain(0), logits, 5), 1); /* the lowest id on ties */
    assert_int_equal(once(plain(0), logits, 1), 0);
    assert_int_equal(once(plain(1), logits, 1), 0);
    const float clear[] = {1, 5, -3, 4.9f, 4};
    sh_sampler *cold = make(plain(1e-3f), 5), *coldest = make(plain(1e-40f), 5);
    for (int i = 0; i < 1000; i++) { /* a gap of 0.1 is 100 temperatures */
        assert_int_equal(next(cold, clear), 1);
        assert_int_equal(next(coldest, clear), 1);
    }
    sh_sampler_destroy(&cold);
    sh_sampler_destroy(&coldest);
    /* Wherever the largest is, in whole blocks and in what is left. */
    float many[131];
    for (uint32_t n = 1; n <= 131; n++)
        for (uint32_t at = 0; at < n; at++) {
            for (uint32_t i = 0; i < n; i++)
                many[i] = i % 7 == 3 ? NAN : -1;
            many[at] = 2;
            many[n - 1] = at == n - 1 ? 2 : many[n - 1];
            assert_int_equal(sh_argmax(many, n), at);
        }
}

static void test_broken_logits(void **state)
{
    (void)state;
    const float nans[] = {NAN, NAN, NAN}, low[] = {-INFINITY, 0, -INFINITY};
    const float least[] = {NAN, -INFINITY, -INFINITY}, high[] = {1, INFINITY, INFINITY};
    const float mixed[] = {NAN, 1, NAN};
    sh_sampling kinds[] = {plain(0), plain(1), plain(1), plain(1), plain(1)};
    kinds[2].top_k = 2;
    kinds[3].top_p = 0.5f;
    kinds[4].min_p = 0.1f;
    for (size_t i = 0; i < SH_COUNT(kinds); i++) {
        assert_int_equal(once(kinds[i], nans, 3), 0);
        assert_int_equal(once(kinds[i], low, 3), 1);
        assert_int_equal(once(kinds[i], least, 3), 1);
        assert_int_equal(once(kinds[i], high, 3), 1);
        assert_int_equal(once(kinds[i], mixed, 3), 1);
    }
}

static void test_same_seed(void **state)
{
    (void)state;
    const float flat[8] = {0};
    sh_sampler *a = make(plain(1), 8), *b = make(plain(1), 8);
    int32_t first[100];
    for (int i = 0; i < 100; i++)
        assert_int_equal(first[i] = next(a, flat), next(b, flat));
    /* Begun anew it is a new one, also with other options. */
    sh_sampling how = plain(1);
    how.seed = 43;
    assert_int_equal(sh_sampler_begin(a, &how, NULL), SH_OK);
    int equal = 0;
    for (int i = 0; i < 100; i++)
        equal += next(a, flat) == first[i];
    assert_in_range(equal, 0, 40); /* 12.5 expected */
    how = plain(1);
    assert_int_equal(sh_sampler_begin(a, &how, NULL), SH_OK);
    for (int i = 0; i < 100; i++)
        assert_int_equal(next(a, flat), first[i]);
    sh_sampler_destroy(&a);
    sh_sampler_destroy(&b);
}

/* What "the same on every machine" is held to: computed once, on x86-64. */
static void test_known_tokens(void **state)
{
    (void)state;
    float logits[1000];
    for (int i = 0; i < 1000; i++)
        logits[i] = (float)((i * 7919) % 1000) / 80.0f;
    static const int32_t expected[4][4] = {
        {927, 594, 669, 531}, {877, 62, 25, 99}, {939, 605, 680, 531}, {927, 594, 673, 520}};
    sh_sampling kinds[] = {plain(1), plain(1), plain(1), plain(2)};
    kinds[1].top_k = 40;
    kinds[2].top_p = 0.9f;
    kinds[3].min_p = 0.01f;
    for (size_t i = 0; i < SH_COUNT(kinds); i++) {
        sh_sampler *sampler = make(kinds[i], 1000);
        for (size_t j = 0; j < 4; j++) {
            const int32_t token = next(sampler, logits);
            if (token != expected[i][j])
                fail_msg("options %zu, draw %zu: token %d, expected %d", i, j, token,
                         expected[i][j]);
        }
        sh_sampler_destroy(&sampler);
    }
}

static void test_penalty(void **state)
{
    (void)state;
    const float logits[] = {3, 2.9f, -1, -0.9f}, negative[] = {-1, -1.5f};
    const int32_t recent[] = {0, 0, 0}, outside[] = {4}, below[] = {-1};
    sh_sampling how = plain(0);
    how.repeat_penalty = 1.1f;
    sh_sampler *sampler = make(how, 4);
    int32_t token = -1;
    sh_error err = {0};
    /* 3 / 1.1 is less than 2.9; however often it was there it counts once. */
    assert_int_equal(sh_sampler_next(sampler, logits, recent, 3, &token, NULL), SH_OK);
    assert_int_equal(token, 1);
    const int32_t both[] = {0, 1, 1, 1, 1};
    assert_int_equal(sh_sampler_next(sampler, logits, both, 5, &token, NULL), SH_OK);
    assert_int_equal(token, 0);
    assert_int_equal(sh_sampler_next(sampler, logits, NULL, 0, &token, NULL), SH_OK);
    assert_int_equal(token, 0);
    /* Only the last SH_REPEAT_MAX count. */
    int32_t many[SH_REPEAT_MAX + 1];
    for (int i = 0; i <= SH_REPEAT_MAX; i++)
        many[i] = i == 0 ? 0 : 3;
    assert_int_equal(sh_sampler_next(sampler, logits, many, SH_COUNT(many), &token, NULL), SH_OK);
    assert_int_equal(token, 0);
    token = 77;
    assert_int_equal(sh_sampler_next(sampler, logits, outside, 1, &token, &err), SH_ERR_INVALID);
    assert_int_equal(sh_sampler_next(sampler, logits, below, 1, &token, &err), SH_ERR_INVALID);
    assert_int_equal(token, 77);
    assert_true(logits[0] == 3);
    sh_sampler_destroy(&sampler);
    how.repeat_penalty = 2; /* a negative logit is multiplied */
    sampler = make(how, 2);
    assert_int_equal(sh_sampler_next(sampler, negative, recent, 1, &token, NULL), SH_OK);
    assert_int_equal(token, 1);
    sh_sampler_destroy(&sampler);
}

static void test_check(void **state)
{
    (void)state;
    const struct {
        sh_sampling how;
        const char *name; /* NULL: sound */
    } cases[] = {
        {{.temperature = -1, .top_p = 1}, "temperature"},
        {{.temperature = NAN, .top_p = 1}, "temperature"},
        {{.temperature = 101, .top_p = 1}, "temperature"},
        {{.temperature = 1, .top_p = 1.5f}, "top_p"},
        {{.temperature = 1, .top_p = NAN}, "top_p"},
        {{.temperature = 1, .top_p = 1, .min_p = -0.1f}, "min_p"},
        {{.temperature = 1, .top_p = 1, .repeat_penalty = INFINITY}, "repeat_penalty"},
        {{.temperature = 100, .top_p = 0, .min_p = 1, .top_k = UINT32_MAX}, NULL},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_error err = {0};
        sh_sampler *sampler = NULL;
        const sh_status status = sh_sampler_create(&cases[i].how, 3, &sampler, &err);
        assert_int_equal(status, cases[i].name != NULL ? SH_ERR_INVALID : SH_OK);
        if (cases[i].name != NULL && strncmp(err.text, cases[i].name, strlen(cases[i].name)) != 0)
            fail_msg("case %zu: %s", i, err.text);
        sh_sampler_destroy(&sampler);
    }
}

static void test_logprobs(void **state)
{
    (void)state;
    sh_token_logprob best[12];
    float logprob = 0;
    double sum = 0;
    static const int32_t order[VOCAB] = {4, 7, 2, 9, 0, 6, 3, 8, 5, 1}; /* of ties the lower id */
    for (int i = 0; i < VOCAB; i++)
        sum += exp(ten[i]);
    sh_logprobs(ten, VOCAB, 3, 12, best, &logprob);
    if (!(fabs(logprob - (ten[3] - log(sum))) < 1e-6))
        fail_msg("%.9g, expected %.9g", (double)logprob, ten[3] - log(sum));
    for (int i = 0; i < VOCAB; i++) {
        assert_int_equal(best[i].token, order[i]);
        if (!(fabs(best[i].logprob - (ten[order[i]] - log(sum))) < 1e-6))
            fail_msg("%d: %.9g, expected %.9g", i, (double)best[i].logprob,
                     ten[order[i]] - log(sum));
    }
    assert_int_equal(best[10].token, -1);
    assert_true(isinf(best[11].logprob));
    sh_logprobs(ten, VOCAB, 0, 3, best, NULL);
    assert_int_equal(best[2].token, 2);
    const float broken[] = {NAN, 1, -INFINITY};
    sh_logprobs(broken, 3, 0, 3, best, &logprob);
    assert_true(isinf(logprob) && logprob < 0);
    assert_int_equal(best[0].token, 1);
    assert_true(best[0].logprob == 0);
    assert_int_equal(best[1].token, 2);
    assert_true(isinf(best[1].logprob) && best[1].logprob < 0);
    assert_int_equal(best[2].token, -1);
}

/* Over the whole range of one exponential, through the only door there is: two tokens. */
static void test_exponential(void **state)
{
    (void)state;
    for (double gap = 0; gap < 86; gap += 0.37) {
        const float logits[] = {0, (float)-gap};
        float logprob;
        sh_logprobs(logits, 2, 0, 0, NULL, &logprob);
        const double expected = -log1p(exp(logits[1]));
        /* Half a unit of the float result, and 2e-7 of the exponential. */
        if (!(fabs(logprob - expected) <= 6e-8 * fabs(expected) + 3e-7 * exp(logits[1]) + 1e-15))
            fail_msg("gap %g: %.9g, expected %.9g", gap, (double)logprob, expected);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_distribution), cmocka_unit_test(test_sets),
        cmocka_unit_test(test_greedy),       cmocka_unit_test(test_broken_logits),
        cmocka_unit_test(test_same_seed),    cmocka_unit_test(test_known_tokens),
        cmocka_unit_test(test_penalty),      cmocka_unit_test(test_check),
        cmocka_unit_test(test_logprobs),     cmocka_unit_test(test_exponential),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
