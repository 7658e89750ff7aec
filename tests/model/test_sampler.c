/* Sampling: greedy and its ties, and the distribution at a temperature. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/model/sampler.h"

static void test_greedy(void **state)
{
    (void)state;
    const float logits[] = {1, 5, -3, 5, 4};
    assert_int_equal(sh_sample(logits, 5, 0, NULL), 1); /* the lowest id on ties */
    assert_int_equal(sh_sample(logits, 1, 0, NULL), 0);
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 1);
    const float clear[] = {1, 5, -3, 4.9f, 4};
    for (int i = 0; i < 1000; i++) /* a gap of 0.1 is 100 temperatures */
        assert_int_equal(sh_sample(clear, 5, 1e-3f, &rng), 1);
}

/* Pearson's chi-square of 20,000 draws against softmax(logits / T); 99.9 % of true samplers stay
 * under the limit for 9 degrees of freedom, 27.9, and the seed is fixed. */
static void check_distribution(float temperature)
{
    enum { VOCAB = 10, DRAWS = 20000 };
    static const float logits[VOCAB] = {0.3f, -1, 0.5f, 0, 1.2f, -0.7f, 0.1f, 0.9f, -0.2f, 0.4f};
    double p[VOCAB], sum = 0, chi_square = 0;
    unsigned counts[VOCAB] = {0};
    sh_rng rng;
    sh_rng_init(&rng, 42, 0, 1);
    for (int i = 0; i < VOCAB; i++)
        sum += p[i] = exp(logits[i] / temperature);
    for (int i = 0; i < DRAWS; i++) {
        const int32_t token = sh_sample(logits, VOCAB, temperature, &rng);
        assert_in_range(token, 0, VOCAB - 1);
        counts[token]++;
    }
    for (int i = 0; i < VOCAB; i++) {
        const double expected = p[i] / sum * DRAWS;
        chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
    if (!(chi_square < 27.9))
        fail_msg("temperature %g: chi-square %.1f is over 27.9", temperature, chi_square);
}

static void test_distribution(void **state)
{
    (void)state;
    check_distribution(0.5f);
    check_distribution(1);
    check_distribution(3);
}

static void test_same_seed_same_tokens(void **state)
{
    (void)state;
    const float logits[] = {0, 0, 0, 0, 0, 0, 0, 0};
    sh_rng a, b;
    sh_rng_init(&a, 7, 0, 1);
    sh_rng_init(&b, 7, 0, 1);
    for (int i = 0; i < 100; i++)
        assert_int_equal(sh_sample(logits, 8, 1, &a), sh_sample(logits, 8, 1, &b));
}

static void test_broken_logits_stay_in_range(void **state)
{
    (void)state;
    const float logits[] = {NAN, NAN, NAN};
    const float infinite[] = {-INFINITY, 0, -INFINITY};
    sh_rng rng;
    sh_rng_init(&rng, 7, 0, 1);
    assert_in_range(sh_sample(logits, 3, 1, &rng), 0, 2);
    assert_in_range(sh_sample(logits, 3, 0, NULL), 0, 2);
    assert_int_equal(sh_sample(infinite, 3, 1, &rng), 1);
}

/* Every token that can come, and how often, against the nucleus found by sorting. */
static void test_nucleus(void **state)
{
    (void)state;
    enum { VOCAB = 10, DRAWS = 20000 };
    static const float logits[VOCAB] = {0.3f, -1, 0.5f, 0, 1.2f, -0.7f, 0.1f, 0.9f, -0.2f, 0.5f};
    static const int order[VOCAB] = {4, 7, 2, 9, 0, 6, 3, 8, 5, 1}; /* of ties the lower id */
    sh_sample_item scratch[VOCAB];
    double p[VOCAB], sum = 0;
    for (int i = 0; i < VOCAB; i++)
        sum += p[i] = exp(logits[i]);
    for (float top_p = 0.1f; top_p < 1; top_p += 0.2f) {
        int kept = 0;
        double nucleus = 0, chi_square = 0;
        while (nucleus < top_p * sum)
            nucleus += p[order[kept++]];
        unsigned counts[VOCAB] = {0};
        sh_rng rng;
        sh_rng_init(&rng, 5, 0, 1);
        for (int i = 0; i < DRAWS; i++)
            counts[sh_sample_top_p(logits, VOCAB, 1, top_p, scratch, &rng)]++;
        for (int i = 0; i < VOCAB; i++) {
            const double expected = p[order[i]] / nucleus * DRAWS;
            if (i >= kept)
                assert_int_equal(counts[order[i]], 0);
            else
                chi_square +=
                    (counts[order[i]] - expected) * (counts[order[i]] - expected) / expected;
        }
        if (!(chi_square < 27.9))
            fail_msg("top_p %g: chi-square %.1f is over 27.9", top_p, chi_square);
    }
}

static void test_nucleus_at_its_ends(void **state)
{
    (void)state;
    const float logits[] = {0.5f, 2, 1, 2}, broken[] = {NAN, NAN, NAN};
    sh_sample_item scratch[4];
    sh_rng a, b;
    sh_rng_init(&a, 3, 0, 1);
    sh_rng_init(&b, 3, 0, 1);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(sh_sample_top_p(logits, 4, 1, 1, NULL, &a), sh_sample(logits, 4, 1, &b));
        assert_int_equal(sh_sample_top_p(logits, 4, 0, 0.5f, NULL, NULL), 1);
        assert_int_equal(sh_sample_top_p(logits, 4, 1, 1e-6f, scratch, &a), 1);
        (void)sh_rng_unit(&b); /* one number is drawn for one token */
        assert_in_range(sh_sample_top_p(broken, 3, 1, 0.5f, scratch, &a), 0, 2);
        (void)sh_rng_unit(&b);
        assert_int_equal(sh_sample_top_p(logits, 1, 1, 0.5f, scratch, &a), 0);
        (void)sh_rng_unit(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),
        cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_same_seed_same_tokens),
        cmocka_unit_test(test_broken_logits_stay_in_range),
        cmocka_unit_test(test_nucleus),
        cmocka_unit_test(test_nucleus_at_its_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
