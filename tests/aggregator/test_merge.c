/* Properties of merging, against a plain double-precision reference, and the check against poison
 * with planted bad updates. Everything is seeded. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "aggregator/merge.h"
#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/blas.h"

#define UPDATES 12

static const sh_model_config config = {.n_layers = 2,
                                       .width = 32,
                                       .n_heads = 4,
                                       .n_kv_heads = 2,
                                       .head_size = 8,
                                       .ffn = 48,
                                       .vocab = 300,
                                       .context = 64};

/* ---- one matrix ---- */

typedef struct {
    uint32_t out, in;
    size_t n;
    sh_factor f[UPDATES];
    float *memory[2 * UPDATES];
} factors;

static float *randoms(sh_rng *rng, size_t n)
{
    float *x = sh_calloc(n, sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(rng);
    return x;
}

static factors make_factors(uint64_t seed, uint32_t out, uint32_t in, const uint32_t *ranks,
                            size_t n)
{
    factors s = {.out = out, .in = in, .n = n};
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    for (size_t i = 0; i < n; i++) {
        uint32_t r = ranks[i];
        float *a = s.memory[2 * i] = randoms(&rng, (size_t)r * in);
        float *b = s.memory[2 * i + 1] = randoms(&rng, (size_t)r * out);
        s.f[i] = (sh_factor){.a = a, .b = b, .rank = r, .scale = 0.1 + sh_rng_unit(&rng)};
    }
    return s;
}

static void free_factors(factors *s)
{
    for (size_t i = 0; i < 2 * UPDATES; i++)
        free(s->memory[i]);
}

static void reference_sum(const factors *s, double *delta)
{
    memset(delta, 0, (size_t)s->out * s->in * sizeof *delta);
    for (size_t u = 0; u < s->n; u++)
        for (size_t i = 0; i < s->out; i++)
            for (size_t k = 0; k < s->f[u].rank; k++)
                for (size_t j = 0; j < s->in; j++)
                    delta[i * s->in + j] += s->f[u].scale *
                                            (double)s->f[u].b[i * s->f[u].rank + k] *
                                            (double)s->f[u].a[k * s->in + j];
}

/* ‖ours − theirs‖ / ‖theirs‖ */
static double relative(const float *ours, const double *theirs, size_t n)
{
    double difference = 0, whole = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)ours[i] - theirs[i];
        difference += d * d;
        whole += theirs[i] * theirs[i];
    }
    return whole > 0 ? sqrt(difference / whole) : sqrt(difference);
}

static void check_below(const char *what, double value, double limit)
{
    if (!(value <= limit)) {
        print_error("%s: %g, limit %g\n", what, value, limit);
        fail();
    }
}

static const uint32_t shapes[][2] = {{96, 64}, {64, 96}, {7, 33}, {40, 40}};
static const uint32_t few[] = {2, 4, 8, 1}, many[] = {16, 3, 32, 8, 8, 24, 0, 16};

static void test_sum_is_the_dense_reference(void **state)
{
    (void)state;
    for (size_t shape = 0; shape < SH_COUNT(shapes); shape++)
        for (int which = 0; which < 2; which++) {
            factors s = make_factors(shape, shapes[shape][0], shapes[shape][1], which ? many : few,
                                     which ? SH_COUNT(many) : SH_COUNT(few));
            size_t n = (size_t)s.out * s.in;
            float *ours = sh_calloc(n, sizeof *ours);
            double *theirs = sh_calloc(n, sizeof *theirs);
            assert_int_equal(sh_merge_sum(s.f, s.n, s.out, s.in, ours, NULL), SH_OK);
            reference_sum(&s, theirs);
            check_below("sum", relative(ours, theirs, n), 1e-5);
            free(ours);
            free(theirs);
            free_factors(&s);
        }
}

static void test_sum_of_nothing_is_zero(void **state)
{
    (void)state;
    float delta[6] = {1, 2, 3, 4, 5, 6};
    sh_factor zero = {0};
    assert_int_equal(sh_merge_sum(&zero, 1, 2, 3, delta, NULL), SH_OK);
    for (int i = 0; i < 6; i++)
        assert_true(delta[i] == 0);
}

/* Another order gives the same sum (to rounding), the same order the same bits. */
static void test_sum_does_not_depend_on_the_order(void **state)
{
    (void)state;
    factors s = make_factors(3, 96, 64, many, SH_COUNT(many));
    size_t n = (size_t)s.out * s.in;
    float *first = sh_calloc(3 * n, sizeof *first);
    double *reference = sh_calloc(n, sizeof *reference);
    assert_int_equal(sh_merge_sum(s.f, s.n, s.out, s.in, first, NULL), SH_OK);
    assert_int_equal(sh_merge_sum(s.f, s.n, s.out, s.in, first + n, NULL), SH_OK);
    assert_memory_equal(first, first + n, n * sizeof *first);
    reference_sum(&s, reference);
    for (uint64_t seed = 0; seed < 10; seed++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, 0, 2);
        uint32_t order[UPDATES];
        sh_factor shuffled[UPDATES];
        for (uint32_t i = 0; i < s.n; i++)
            order[i] = i;
        sh_rng_shuffle(&rng, order, s.n);
        for (size_t i = 0; i < s.n; i++)
            shuffled[i] = s.f[order[i]];
        assert_int_equal(sh_merge_sum(shuffled, s.n, s.out, s.in, first + 2 * n, NULL), SH_OK);
        check_below("shuffled sum", relative(first + 2 * n, reference, n), 1e-5);
    }
    free(first);
    free(reference);
    free_factors(&s);
}

/* (Σ B·A)ᵀ = Σ Aᵀ·Bᵀ: merging the transposed factors gives the transposed sum and rank. */
static void test_transposed_updates_merge_to_the_transpose(void **state)
{
    (void)state;
    factors s = make_factors(4, 96, 64, few, SH_COUNT(few));
    factors t = {.out = s.in, .in = s.out, .n = s.n};
    for (size_t i = 0; i < s.n; i++) {
        uint32_t r = s.f[i].rank;
        float *a = t.memory[2 * i] = sh_calloc((size_t)r * t.in, sizeof *a);
        float *b = t.memory[2 * i + 1] = sh_calloc((size_t)r * t.out, sizeof *b);
        for (size_t k = 0; k < r; k++) {
            for (size_t j = 0; j < s.out; j++)
                a[k * s.out + j] = s.f[i].b[j * r + k];
            for (size_t j = 0; j < s.in; j++)
                b[j * r + k] = s.f[i].a[k * s.in + j];
        }
        t.f[i] = (sh_factor){.a = a, .b = b, .rank = r, .scale = s.f[i].scale};
    }
    size_t n = (size_t)s.out * s.in;
    float *x = sh_calloc(n, sizeof *x), *y = sh_calloc(n, sizeof *y);
    double *xt = sh_calloc(n, sizeof *xt);
    assert_int_equal(sh_merge_sum(s.f, s.n, s.out, s.in, x, NULL), SH_OK);
    assert_int_equal(sh_merge_sum(t.f, t.n, t.out, t.in, y, NULL), SH_OK);
    for (size_t i = 0; i < s.out; i++)
        for (size_t j = 0; j < s.in; j++)
            xt[j * s.out + i] = (double)x[i * s.in + j];
    check_below("transposed sum", relative(y, xt, n), 1e-5);
    sh_truncation options = {.energy = 0.9};
    sh_truncated a, b;
    assert_int_equal(sh_merge_truncate(s.f, s.n, s.out, s.in, &options, &a, NULL), SH_OK);
    assert_int_equal(sh_merge_truncate(t.f, t.n, t.out, t.in, &options, &b, NULL), SH_OK);
    assert_int_equal(a.rank, b.rank);
    check_below("energy", fabs(a.energy - b.energy) / a.energy, 1e-5);
    free(a.a), free(a.b), free(b.a), free(b.b);
    free(x), free(y), free(xt);
    free_factors(&s);
    free_factors(&t);
}

static double truncation_error(const factors *s, const sh_truncated *t)
{
    size_t n = (size_t)s->out * s->in;
    double *whole = sh_calloc(n, sizeof *whole);
    float *ours = sh_calloc(n, sizeof *ours);
    reference_sum(s, whole);
    sh_factor f = {.a = t->a, .b = t->b, .rank = t->rank, .scale = 1};
    assert_int_equal(sh_merge_sum(&f, 1, s->out, s->in, ours, NULL), SH_OK);
    double error = relative(ours, whole, n);
    free(whole);
    free(ours);
    return error;
}

/* Both ways (stacked and dense), every rank: what is lost is what the result says, and a full rank
 * loses nothing. */
static void test_truncation_loses_what_it_says(void **state)
{
    (void)state;
    for (size_t shape = 0; shape < SH_COUNT(shapes); shape++)
        for (int which = 0; which < 2; which++) {
            factors s = make_factors(20 + shape, shapes[shape][0], shapes[shape][1],
                                     which ? many : few, which ? SH_COUNT(many) : SH_COUNT(few));
            uint32_t full = 0;
            for (size_t i = 0; i < s.n; i++)
                full += s.f[i].rank;
            full = SH_MIN(full, SH_MIN(s.out, s.in));
            for (uint32_t k = 1; k <= full; k += 3) {
                sh_truncation options = {.energy = 1, .rank_max = k};
                sh_truncated t;
                assert_int_equal(sh_merge_truncate(s.f, s.n, s.out, s.in, &options, &t, NULL),
                                 SH_OK);
                assert_true(t.rank <= k);
                check_below("truncation error against discarded energy",
                            fabs(truncation_error(&s, &t) - sqrt(t.discarded / t.energy)), 1e-5);
                free(t.a), free(t.b);
            }
            sh_truncation whole = {.energy = 1};
            sh_truncated t;
            assert_int_equal(sh_merge_truncate(s.f, s.n, s.out, s.in, &whole, &t, NULL), SH_OK);
            check_below("full rank", truncation_error(&s, &t), 1e-5);
            sh_truncation share = {.energy = 0.8};
            sh_truncated u;
            assert_int_equal(sh_merge_truncate(s.f, s.n, s.out, s.in, &share, &u, NULL), SH_OK);
            check_below("discarded share", u.discarded / u.energy, 0.2 + 1e-6);
            assert_true(u.rank <= t.rank);
            free(t.a), free(t.b), free(u.a), free(u.b);
            free_factors(&s);
        }
}

static void test_truncation_of_zero_has_no_rank(void **state)
{
    (void)state;
    float a[3] = {1, 2, 3}, b[2] = {0, 0};
    sh_factor f = {.a = a, .b = b, .rank = 1, .scale = 1};
    sh_truncation options = {.energy = 0.99};
    sh_truncated t;
    assert_int_equal(sh_merge_truncate(&f, 1, 2, 3, &options, &t, NULL), SH_OK);
    assert_int_equal(t.rank, 0);
    assert_null(t.a);
    assert_int_equal(sh_merge_truncate(NULL, 0, 2, 3, &options, &t, NULL), SH_OK);
    assert_int_equal(t.rank, 0);
}

/* ⟨B·A, B'·A'⟩ through the factors is the inner product of the dense matrices. */
static void test_inner_products_are_of_the_products(void **state)
{
    (void)state;
    factors s = make_factors(6, 64, 96, few, SH_COUNT(few));
    size_t n = (size_t)s.out * s.in;
    float *x = sh_calloc(2 * n, sizeof *x);
    double gram[SH_COUNT(few) * SH_COUNT(few)];
    assert_int_equal(sh_merge_gram(s.f, s.n, s.out, s.in, gram, NULL), SH_OK);
    for (size_t i = 0; i < s.n; i++)
        for (size_t j = 0; j < s.n; j++) {
            assert_int_equal(sh_merge_sum(&s.f[i], 1, s.out, s.in, x, NULL), SH_OK);
            assert_int_equal(sh_merge_sum(&s.f[j], 1, s.out, s.in, x + n, NULL), SH_OK);
            double inner = 0;
            for (size_t k = 0; k < n; k++)
                inner += (double)x[k] * (double)x[n + k];
            check_below("inner product", fabs(inner - gram[i * s.n + j]),
                        1e-5 * sqrt(gram[i * s.n + i] * gram[j * s.n + j]));
        }
    free(x);
    free_factors(&s);
}

static void test_fedit_refuses_mixed_ranks(void **state)
{
    (void)state;
    factors s = make_factors(7, 8, 8, few, 2);
    float a[64], b[64];
    double weights[2] = {0.5, 0.5};
    assert_int_equal(sh_merge_fedit(s.f, weights, 2, 8, 8, a, b, NULL), SH_ERR_MISMATCH);
    free_factors(&s);
}

/* ---- whole models ---- */

enum { MATRICES = 2 * SH_LAYER_MATRICES + 1 }; /* two layers and the output */

typedef struct {
    sh_adapter *adapter[UPDATES];
    sh_merge_source source[UPDATES];
    size_t n;
} fleet;

/* n honest nodes: a common direction and noise of their own, in B, over a shared A, like updates of
 * one round. Ranks are mixed. */
static fleet make_fleet(uint64_t seed, size_t n, float noise)
{
    fleet f = {.n = n};
    for (size_t i = 0; i < n; i++) {
        uint32_t rank = i % 3 == 2 ? 8 : 4;
        assert_int_equal(sh_adapter_create(&config, rank, 16, &f.adapter[i], NULL), SH_OK);
        assert_int_equal(sh_adapter_add_output(f.adapter[i], &config, rank, NULL), SH_OK);
        for (size_t m = 0; m < MATRICES; m++) {
            sh_lora_pair *pair = &f.adapter[i]->pairs[m];
            sh_rng common, own;
            sh_rng_init(&common, seed, m, 10);
            sh_rng_init(&own, seed, 1000 * i + m, 11);
            /* The first four of rank 8 are those of rank 4; its scale is half. */
            for (size_t k = 0; k < 4; k++)
                for (size_t j = 0; j < pair->in; j++)
                    pair->a[k * pair->in + j] = sh_rng_normal(&common);
            float scale = rank == 8 ? 2 : 1;
            for (size_t k = 0; k < 4; k++)
                for (size_t j = 0; j < pair->out; j++)
                    pair->b[j * rank + k] =
                        scale * (sh_rng_normal(&common) + noise * sh_rng_normal(&own));
        }
        f.source[i] = (sh_merge_source){.adapter = f.adapter[i], .weight = 1000 + 100 * (double)i};
    }
    return f;
}

static void scale_b(sh_adapter *adapter, float by)
{
    for (size_t m = 0; m < MATRICES; m++)
        for (size_t i = 0; i < (size_t)adapter->pairs[m].rank * adapter->pairs[m].out; i++)
            adapter->pairs[m].b[i] *= by;
}

static void free_fleet(fleet *f)
{
    for (size_t i = 0; i < f->n; i++)
        sh_adapter_destroy(&f->adapter[i]);
}

static const sh_judge_options limits = {.norm_factor_max = 4, .cosine_min = 0};

static void expect_reasons(const fleet *f, const sh_reason *reasons)
{
    for (size_t i = 0; i < f->n; i++)
        if (f->source[i].reason != reasons[i]) {
            print_error("update %zu: %s, expected %s (norm %g, cosine %g)\n", i,
                        sh_reason_name(f->source[i].reason), sh_reason_name(reasons[i]),
                        f->source[i].norm, f->source[i].cosine);
            fail();
        }
}

static void test_honest_updates_pass(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 5; seed++) {
        fleet f = make_fleet(seed, 10, 2);
        assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
        expect_reasons(&f, (sh_reason[UPDATES]){0});
        for (size_t i = 0; i < f.n; i++)
            assert_true(f.source[i].cosine > 0.2);
        free_fleet(&f);
    }
}

static void test_norm_is_that_of_the_products(void **state)
{
    (void)state;
    fleet f = make_fleet(1, 3, 1);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    for (size_t i = 0; i < f.n; i++) {
        double squared = 0;
        for (size_t m = 0; m < MATRICES; m++) {
            const sh_lora_pair *p = &f.adapter[i]->pairs[m];
            for (size_t row = 0; row < p->out; row++)
                for (size_t col = 0; col < p->in; col++) {
                    double sum = 0;
                    for (size_t k = 0; k < p->rank; k++)
                        sum += (double)p->b[row * p->rank + k] * (double)p->a[k * p->in + col];
                    sum *= 16.0 / p->rank;
                    squared += sum * sum;
                }
        }
        check_below("norm", fabs(f.source[i].norm / sqrt(squared) - 1), 1e-5);
    }
    free_fleet(&f);
}

/* The cosines are those of the definition, computed from all pairs. */
static void test_cosine_is_to_the_sum_of_the_others(void **state)
{
    (void)state;
    fleet f = make_fleet(2, 6, 1);
    scale_b(f.adapter[4], 3); /* over the median: clipped in the sum */
    sh_judge_options all = {.norm_factor_max = 0, .cosine_min = -1};
    assert_int_equal(sh_merge_judge(f.source, f.n, &all, NULL), SH_OK);
    double gram[UPDATES * UPDATES] = {0}, norms[UPDATES], median = 0;
    for (size_t m = 0; m < MATRICES; m++) {
        const sh_lora_pair *p = &f.adapter[0]->pairs[m];
        sh_factor factor[UPDATES];
        double one[UPDATES * UPDATES];
        for (size_t i = 0; i < f.n; i++) {
            const sh_lora_pair *q = &f.adapter[i]->pairs[m];
            factor[i] = (sh_factor){q->a, q->b, q->rank, 16.0 / q->rank};
        }
        assert_int_equal(sh_merge_gram(factor, f.n, p->out, p->in, one, NULL), SH_OK);
        for (size_t i = 0; i < f.n * f.n; i++)
            gram[i] += one[i];
    }
    for (size_t i = 0; i < f.n; i++)
        norms[i] = sqrt(gram[i * f.n + i]);
    for (size_t i = 0; i < f.n; i++) { /* lower median: two are below it */
        size_t below = 0;
        for (size_t j = 0; j < f.n; j++)
            below += norms[j] < norms[i];
        if (below == 2)
            median = norms[i];
    }
    for (size_t i = 0; i < f.n; i++) {
        double inner = 0, squared = 0;
        for (size_t j = 0; j < f.n; j++) {
            double cj = f.source[j].weight * fmin(1, median / norms[j]);
            if (j == i)
                continue;
            inner += cj * gram[i * f.n + j];
            for (size_t k = 0; k < f.n; k++)
                if (k != i)
                    squared +=
                        cj * f.source[k].weight * fmin(1, median / norms[k]) * gram[j * f.n + k];
        }
        check_below("cosine", fabs(f.source[i].cosine - inner / (norms[i] * sqrt(squared))), 1e-5);
    }
    free_fleet(&f);
}

static void test_a_scaled_update_is_refused_by_norm(void **state)
{
    (void)state;
    fleet f = make_fleet(3, 10, 1);
    scale_b(f.adapter[3], -100);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){[3] = SH_REASON_NORM});
    free_fleet(&f);
}

static void test_reversed_updates_are_refused_by_direction(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 5; seed++) {
        fleet f = make_fleet(seed, 10, 2);
        scale_b(f.adapter[2], -1);
        scale_b(f.adapter[7], -3.5f);
        assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
        expect_reasons(&f,
                       (sh_reason[UPDATES]){[2] = SH_REASON_DIRECTION, [7] = SH_REASON_DIRECTION});
        assert_true(f.source[2].cosine < -0.2);
        free_fleet(&f);
    }
}

/* The one that is refused is out of the sum that the others are then held against. */
static void test_the_refused_do_not_count_for_the_others(void **state)
{
    (void)state;
    fleet f = make_fleet(11, 7, 2);
    scale_b(f.adapter[3], -1);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){[3] = SH_REASON_DIRECTION});
    double with[UPDATES];
    for (size_t i = 0; i < f.n; i++)
        with[i] = f.source[i].cosine;
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK); /* 3 is left out */
    for (size_t i = 0; i < f.n; i++)
        if (i != 3) /* the median that clips is another by one norm */
            check_below("cosine without the refused", fabs(f.source[i].cosine - with[i]), 0.02);
    free_fleet(&f);
}

/* The quickstart's two liars at once: ×−100 and a norm-matched −ΔW, of which one must not hide the
 * other. */
static void test_two_kinds_of_poison_at_once(void **state)
{
    (void)state;
    fleet f = make_fleet(5, 8, 2);
    scale_b(f.adapter[0], -100);
    scale_b(f.adapter[5], -1);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){[0] = SH_REASON_NORM, [5] = SH_REASON_DIRECTION});
    free_fleet(&f);
}

/* A heavy liar: weights are by samples, but the direction of "the others" is not his. */
static void test_a_heavy_liar_does_not_turn_the_tables(void **state)
{
    (void)state;
    fleet f = make_fleet(6, 10, 1);
    scale_b(f.adapter[9], -1);
    f.source[9].weight = 4000; /* four times the others, the most that the coordinator lets count */
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){[9] = SH_REASON_DIRECTION});
    free_fleet(&f);
}

static void test_values_that_are_not_finite(void **state)
{
    (void)state;
    fleet f = make_fleet(7, 6, 1);
    f.adapter[0]->pairs[3].b[5] = NAN;
    f.adapter[1]->pairs[0].a[0] = INFINITY;
    scale_b(f.adapter[2], 1e30f); /* finite, but its norm is not */
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(
        &f, (sh_reason[UPDATES]){SH_REASON_NOT_FINITE, SH_REASON_NOT_FINITE, SH_REASON_NOT_FINITE});
    free_fleet(&f);
}

static void test_two_that_contradict_are_both_refused(void **state)
{
    (void)state;
    fleet f = make_fleet(8, 2, 0.5f);
    scale_b(f.adapter[1], -1);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){SH_REASON_DIRECTION, SH_REASON_DIRECTION});
    free_fleet(&f);
}

static void test_one_alone_and_zeros_pass(void **state)
{
    (void)state;
    fleet f = make_fleet(9, 1, 1);
    assert_int_equal(sh_merge_judge(f.source, f.n, &limits, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){0});
    free_fleet(&f);
    f = make_fleet(9, 4, 1);
    scale_b(f.adapter[1], 0); /* a node that learnt nothing does no harm */
    sh_judge_options strict = {.norm_factor_max = 4, .cosine_min = 0.1f};
    assert_int_equal(sh_merge_judge(f.source, f.n, &strict, NULL), SH_OK);
    expect_reasons(&f, (sh_reason[UPDATES]){0});
    free_fleet(&f);
    assert_int_equal(sh_merge_judge(NULL, 0, &limits, NULL), SH_OK);
}

/* The merged adapter is the truncated weighted mean, with and without a pool, bit for bit. */
static void test_merged_adapter_is_the_weighted_mean(void **state)
{
    (void)state;
    fleet f = make_fleet(10, 5, 1);
    f.source[2].reason = SH_REASON_NORM;
    sh_truncation options = {.energy = 1};
    sh_adapter *one = NULL, *two = NULL;
    double discarded = -1, again = -1;
    sh_pool *pool = NULL;
    assert_int_equal(sh_pool_create(3, &pool, NULL), SH_OK);
    assert_int_equal(
        sh_merge_adapter(f.source, f.n, 1.5, &config, &options, NULL, &one, &discarded, NULL),
        SH_OK);
    assert_int_equal(
        sh_merge_adapter(f.source, f.n, 1.5, &config, &options, pool, &two, &again, NULL), SH_OK);
    check_below("discarded", discarded, 1e-9);
    assert_true(discarded == again);
    double weights = 0;
    for (size_t i = 0; i < f.n; i++)
        weights += i == 2 ? 0 : f.source[i].weight;
    for (size_t m = 0; m < MATRICES; m++) {
        const sh_lora_pair *p = &one->pairs[m], *q = &two->pairs[m];
        size_t n = (size_t)p->out * p->in;
        assert_int_equal(p->rank, q->rank);
        assert_memory_equal(p->a, q->a, (size_t)p->rank * p->in * sizeof(float));
        assert_memory_equal(p->b, q->b, (size_t)p->rank * p->out * sizeof(float));
        factors s = {.out = p->out, .in = p->in};
        for (size_t i = 0; i < f.n; i++) {
            const sh_lora_pair *r = &f.adapter[i]->pairs[m];
            if (i != 2)
                s.f[s.n++] = (sh_factor){r->a, r->b, r->rank,
                                         1.5 * f.source[i].weight / weights * 16 / r->rank};
        }
        double *mean = sh_calloc(n, sizeof *mean);
        float *ours = sh_calloc(n, sizeof *ours);
        reference_sum(&s, mean);
        sh_factor whole = {p->a, p->b, p->rank, (double)one->alpha / p->rank};
        assert_int_equal(sh_merge_sum(&whole, 1, p->out, p->in, ours, NULL), SH_OK);
        check_below("merged adapter", relative(ours, mean, n), 1e-5);
        free(mean);
        free(ours);
    }
    sh_adapter_destroy(&one);
    sh_model_config tied = config;
    sh_error failure = {0};
    tied.tied_output = true;
    assert_int_equal(
        sh_merge_adapter(f.source, f.n, 1.5, &tied, &options, NULL, &one, &discarded, &failure),
        SH_ERR_MISMATCH);
    assert_non_null(strstr(failure.text, "output.weight"));
    sh_adapter_destroy(&two);
    sh_pool_destroy(&pool);
    free_fleet(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sum_is_the_dense_reference),
        cmocka_unit_test(test_sum_of_nothing_is_zero),
        cmocka_unit_test(test_sum_does_not_depend_on_the_order),
        cmocka_unit_test(test_transposed_updates_merge_to_the_transpose),
        cmocka_unit_test(test_truncation_loses_what_it_says),
        cmocka_unit_test(test_truncation_of_zero_has_no_rank),
        cmocka_unit_test(test_inner_products_are_of_the_products),
        cmocka_unit_test(test_fedit_refuses_mixed_ranks),
        cmocka_unit_test(test_honest_updates_pass),
        cmocka_unit_test(test_norm_is_that_of_the_products),
        cmocka_unit_test(test_cosine_is_to_the_sum_of_the_others),
        cmocka_unit_test(test_a_scaled_update_is_refused_by_norm),
        cmocka_unit_test(test_reversed_updates_are_refused_by_direction),
        cmocka_unit_test(test_the_refused_do_not_count_for_the_others),
        cmocka_unit_test(test_two_kinds_of_poison_at_once),
        cmocka_unit_test(test_a_heavy_liar_does_not_turn_the_tables),
        cmocka_unit_test(test_values_that_are_not_finite),
        cmocka_unit_test(test_two_that_contradict_are_both_refused),
        cmocka_unit_test(test_one_alone_and_zeros_pass),
        cmocka_unit_test(test_merged_adapter_is_the_weighted_mean),
    };
    sh_blas_init();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
