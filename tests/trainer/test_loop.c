/*
 * What a training does between its steps: accumulated gradients, moments in 8 bits, held-out loss
 * and early stop, factors in turns, checkpoints.
 */
#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/trainer/material.h"
#include "tests/trainer/util.h"
#include "trainer/optimizer.h"

/* ---- accumulated gradients ---- */

/* As one large batch, to rounding. The batches have unequal numbers of targets: the mean of their
 * means would be another one. */
static void test_accumulate(void **state)
{
    (void)state;
    material m = material_make();
    for (int full = 0; full < 2; full++) {
        outcome large, small;
        sh_train_options o = options_of(6, 4);
        o.optimizer = SH_SGD;
        o.momentum = 0.5f;
        o.lr = 0.3f;
        must_be_ok(train(&m, full, &o, &large));
        o.batch = 2;
        o.accumulate = 3;
        must_be_ok(train(&m, full, &o, &small));
        must_be_near(distance(&large, &small), 0, 1e-5); /* rounding, amplified */
        must_be_near(small.result.loss_first, large.result.loss_first, 1e-6);
        must_be_near(small.result.loss_last, large.result.loss_last, 1e-5);
        assert_int_equal(small.result.tokens_seen, large.result.tokens_seen);
        outcome_release(&small);
        o.accumulate = 1;
        must_be_ok(train(&m, full, &o, &small));
        assert_true(distance(&large, &small) > 1e-4);
        outcome_release(&small);
        outcome_release(&large);
    }
    material_release(&m);
}

/* A batch that is masked out whole, first or later, weighs nothing. */
static void test_accumulate_masked_batch(void **state)
{
    (void)state;
    material m = material_make();
    outcome with, without;
    sh_train_options o = options_of(1, 1);
    uint8_t *mask = (uint8_t *)(uintptr_t)m.data.mask;
    memset(mask, 0, LENGTH);
    memset(mask + 2 * LENGTH, 0, LENGTH);
    o.shuffle_seed = 0;
    o.accumulate = 3;
    must_be_ok(train(&m, false, &o, &with));
    sh_train_data second = m.data;
    m.data.tokens += LENGTH;
    m.data.mask += LENGTH;
    m.data.n = 1;
    o.accumulate = 1;
    must_be_ok(train(&m, false, &o, &without));
    assert_memory_equal(with.params, without.params, with.n * sizeof(*with.params));
    must_be_near(with.result.loss_last, without.result.loss_last, 0);
    m.data = second;
    outcome_release(&with);
    outcome_release(&without);
    material_release(&m);
}

/* The least memory_max that a step gets by with. */
static uint64_t least_memory(const material *m, bool full, const sh_train_options *options)
{
    uint64_t low = 0, high = 1u << 26; /* refused, enough */
    while (high - low > 1) {
        sh_train_options o = *options;
        outcome out;
        o.memory_max = low + (high - low) / 2;
        const sh_status status = train(m, full, &o, &out);
        if (status != SH_OK)
            assert_int_equal(status, SH_ERR_LIMIT);
        outcome_release(&out);
        if (status == SH_OK)
            high = o.memory_max;
        else
            low = o.memory_max;
    }
    return high;
}

static void test_accumulate_memory(void **state)
{
    (void)state;
    material m = material_make();
    outcome out;
    sh_train_options o = options_of(2, 1);
    must_be_ok(train(&m, false, &o, &out));
    const uint64_t plain = least_memory(&m, false, &o);
    o.accumulate = 2;
    const uint64_t two = least_memory(&m, false, &o);
    o.accumulate = 40;
    const uint64_t forty = least_memory(&m, false, &o);
    assert_int_equal(two - plain, out.n * sizeof(float));
    assert_int_equal(forty, two);
    outcome_release(&out);
    material_release(&m);
}

/* ---- moments in 8 bits ---- */

/* What optimizer leaves of a sum of squares h (p - goal)^2 / 2 whose curvatures h span three
 * decades within a block, from gradients with noise: a problem without chaos, so that ends differ
 * by what is lost of moments alone. */
static double squares_left(const tr_net *net, const sh_train_options *o, uint64_t seed)
{
    const size_t n = net->layout.n;
    tr_optimizer optimizer;
    float *params = sh_calloc(n, sizeof(*params));
    sh_rng rng;
    double left = 0;
    assert_non_null(params);
    must_be_ok(tr_optimizer_create(net, true, o, params, &optimizer, &err));
    sh_rng_init(&rng, seed, 0, 0);
    for (uint32_t step = 0; step < o->steps; step++) {
        for (size_t i = 0; i < n; i++) {
            const float h = powf(10.0f, -(float)(i % 4)), goal = i % 3 ? 1.0f : -1.0f;
            optimizer.grad[i] = h * (params[i] - goal + 0.5f * sh_rng_normal(&rng));
        }
        assert_true(tr_optimizer_step(&optimizer, params));
    }
    for (size_t i = 0; i < n; i++)
        left += pow((double)params[i] - (i % 3 ? 1 : -1), 2) / (double)n;
    tr_optimizer_release(&optimizer);
    free(params);
    return left;
}

static void test_state_8bit_squares(void **state)
{
    (void)state;
    material m = material_make();
    tr_net *net = NULL;
    must_be_ok(tr_net_create(&m.config, m.model, UINT64_MAX, LENGTH, &net, &err));
    for (sh_optimizer optimizer = SH_ADAMW; optimizer <= SH_SGD; optimizer++) {
        for (uint64_t seed = 1; seed <= 3; seed++) {
            sh_train_options o = {.optimizer = optimizer,
                                  .lr = optimizer == SH_SGD ? 0.05f : 0.01f,
                                  .momentum = 0.9f,
                                  .steps = 400,
                                  .schedule = SH_SCHEDULE_CONSTANT};
            const double plain = squares_left(net, &o, seed);
            o.state_8bit = true;
            const double coded = squares_left(net, &o, seed);
            print_message("%s: %.6f left in floats, %.6f in 8 bits\n",
                          optimizer == SH_SGD ? "SGD" : "AdamW", plain, coded);
            /* Twice what was lost in any of these: with AdamW, whose steps have the noise of both
             * moments' codes, and with SGD, whose sum of steps has almost none. */
            must_be_near(coded, plain, (optimizer == SH_SGD ? 0.002 : 0.06) * plain);
        }
    }
    tr_net_destroy(&net);
    material_release(&m);
}

/* What is learnt on the data of a seed. */
static double learnt(material *m, bool full, const sh_train_options *o, uint64_t seed)
{
    outcome out;
    small_data_free(&m->data);
    m->data = small_data(&m->config, SEQUENCES, LENGTH, true, seed);
    must_be_ok(train(m, full, o, &out));
    const double loss = out.result.loss_first - out.result.loss_last;
    outcome_release(&out);
    return loss;
}

/* Trainings learn as much as with moments in floats. Where a single one of such small models ends a
 * last bit decides (a rate that is one part in 10,000 larger moves it by some hundredths of what is
 * learnt), so it is the mean over SEEDS that is held to a twenty-fifth: four of its standard
 * deviations, if one training's is a fiftieth. */
static void check_state_8bit(bool full, sh_optimizer optimizer)
{
    enum { SEEDS = 4 };
    material m = material_make();
    double mean = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        sh_train_options o = options_of(SEQUENCES, 30);
        o.optimizer = optimizer;
        o.lr = optimizer == SH_SGD ? 0.02f : 0.003f;
        o.momentum = 0.9f;
        o.weight_decay = 0.01f;
        const double plain = learnt(&m, full, &o, seed);
        o.state_8bit = true;
        const double coded = learnt(&m, full, &o, seed);
        assert_true(plain > 0.2);
        assert_true(coded != plain); /* it is another training */
        mean += (coded - plain) / plain / SEEDS;
    }
    print_message("%s, %s: in 8 bits %+.4f of what is learnt\n", full ? "full" : "LoRA",
                  optimizer == SH_SGD ? "SGD" : "AdamW", mean);
    must_be_near(mean, 0, 0.04);
    material_release(&m);
}

static void test_state_8bit(void **state)
{
    (void)state;
    for (int full = 0; full < 2; full++) {
        check_state_8bit(full, SH_ADAMW);
        check_state_8bit(full, SH_SGD);
    }
}

static void test_state_8bit_threads(void **state)
{
    (void)state;
    material m = material_make();
    outcome one, three;
    sh_train_options o = options_of(SEQUENCES, 6);
    o.state_8bit = true;
    must_be_ok(train(&m, true, &o, &one));
    o.threads = 3;
    must_be_ok(train(&m, true, &o, &three));
    must_be_same(&one, &three);
    outcome_release(&one);
    outcome_release(&three);
    material_release(&m);
}

/* Parameters that no batch reaches, in blocks with others that move, stay where they are: their
 * second moments' codes do not make steps. */
static void test_state_8bit_untouched(void **state)
{
    (void)state;
    material m = material_make();
    outcome before, out;
    sh_train_options o = options_of(3, 20);
    int32_t *tokens = (int32_t *)(uintptr_t)m.data.tokens;
    sh_model_config untied = small_config(false); /* embeddings are read, and nothing else */
    small_model_free(&m.model);
    m.config = untied;
    m.model = small_model(&untied, SH_TYPE_F32, 51);
    for (size_t i = 0; i < m.data.n * m.data.length; i++)
        tokens[i] = tokens[i] % 2 ? tokens[i] - 1 : tokens[i];
    o.state_8bit = true;
    o.steps = 1;
    o.lr = 0;
    must_be_ok(train(&m, true, &o, &before));
    o = options_of(3, 20);
    o.state_8bit = true;
    must_be_ok(train(&m, true, &o, &out));
    for (size_t token = 0; token < untied.vocab; token++) /* the embeddings lie first */
        for (size_t i = token * untied.width; i < (token + 1) * untied.width; i++)
            if (token % 2)
                assert_true(before.params[i] == out.params[i]);
            else
                must_be_near((double)out.params[i], (double)before.params[i], 20 * 0.02);
    outcome_release(&before);
    outcome_release(&out);
    material_release(&m);
}

static size_t usable(void *p)
{
    return p ? malloc_usable_size(p) : 0;
}

/* tr_optimizer_bytes is what is allocated, to the allocator's rounding. */
static void test_optimizer_bytes(void **state)
{
    (void)state;
    material m = material_make();
    tr_net *net = NULL;
    must_be_ok(tr_net_create(&m.config, m.model, UINT64_MAX, LENGTH, &net, &err));
    for (unsigned i = 0; i < 8; i++) {
        const sh_train_options o = {.optimizer = i & 1 ? SH_SGD : SH_ADAMW,
                                    .state_8bit = (i & 2) != 0,
                                    .proximal = i & 4 ? 1.0f : 0.0f};
        tr_optimizer optimizer;
        must_be_ok(tr_optimizer_create(net, true, &o, net->weights, &optimizer, &err));
        const uint64_t counted = tr_optimizer_bytes(&o, net->layout.n);
        uint64_t held = usable(optimizer.grad) + usable(optimizer.m) + usable(optimizer.v) +
                        usable(optimizer.start) + usable(optimizer.coded);
        if (optimizer.coded)
            held += usable(optimizer.coded->m) + usable(optimizer.coded->v) +
                    usable(optimizer.coded->m_scale) + usable(optimizer.coded->v_scale);
        if (held < counted || held > counted + 9 * 128)
            fail_msg("case %u: %llu bytes are held, %llu counted", i, (unsigned long long)held,
                     (unsigned long long)counted);
        tr_optimizer_release(&optimizer);
    }
    const sh_train_options plain = {0}, coded = {.state_8bit = true};
    assert_true(tr_optimizer_bytes(&coded, 1u << 20) - (4u << 20) <
                (tr_optimizer_bytes(&plain, 1u << 20) - (4u << 20)) * 26 / 100);
    tr_net_destroy(&net);
    material_release(&m);
}

/* ---- held-out loss and early stop ---- */

static void test_progress(void **state)
{
    (void)state;
    material m = material_make();
    outcome out;
    diary d = {0};
    sh_train_options o = options_of(3, 7);
    o.heldout = &m.heldout;
    o.heldout_every = 3;
    o.progress = note_step;
    o.progress_arg = &d;
    must_be_ok(train(&m, false, &o, &out));
    assert_int_equal(d.n, 7);
    for (uint32_t i = 0; i < 7; i++) {
        const sh_train_progress *p = &d.steps[i];
        assert_int_equal(p->step, i + 1);
        assert_int_equal(p->steps, 7);
        must_be_near(p->lr, tr_learning_rate(&o, i), 0);
        assert_true(p->grad_norm > 0 && isfinite(p->grad_norm));
        assert_int_equal(isnan(p->heldout_loss), i != 2 && i != 5 && i != 6);
        assert_true(i == 0 || (p->tokens_seen > p[-1].tokens_seen && p->seconds >= p[-1].seconds));
    }
    assert_true(d.steps[0].loss == out.result.loss_first);
    assert_true(d.steps[6].loss == out.result.loss_last);
    assert_true(d.steps[6].heldout_loss == out.result.heldout_last);
    assert_int_equal(d.steps[6].tokens_seen, out.result.tokens_seen);
    assert_int_equal(out.result.steps, 7);

    outcome unmeasured; /* to measure changes nothing */
    o.heldout = NULL;
    o.heldout_every = 0;
    o.progress = NULL;
    must_be_ok(train(&m, false, &o, &unmeasured));
    must_be_same(&out, &unmeasured);
    assert_true(isnan(unmeasured.result.heldout_best) && isnan(unmeasured.result.heldout_last));
    assert_int_equal(unmeasured.result.heldout_best_step, 0);
    outcome_release(&unmeasured);
    outcome_release(&out);
    material_release(&m);
}

/* The norm that is told is the gradient's, before clipping. */
static void test_progress_norm(void **state)
{
    (void)state;
    material m = material_make();
    outcome before, after;
    diary d = {0};
    sh_train_options o = constant_options(1);
    o.optimizer = SH_SGD;
    o.lr = 0;
    must_be_ok(train(&m, true, &o, &before));
    o.lr = 0.5f;
    o.clip = 0;
    o.progress = note_step;
    o.progress_arg = &d;
    must_be_ok(train(&m, true, &o, &after));
    double moved = 0;
    for (size_t i = 0; i < after.n; i++)
        moved += pow((double)after.params[i] - (double)before.params[i], 2);
    must_be_near(d.steps[0].grad_norm, sqrt(moved) / 0.5, 1e-5 * d.steps[0].grad_norm);
    const double norm = d.steps[0].grad_norm;
    outcome_release(&after);
    d.n = 0;
    o.clip = 1e-3f;
    must_be_ok(train(&m, true, &o, &after));
    assert_true(d.steps[0].grad_norm == norm);
    outcome_release(&before);
    outcome_release(&after);
    material_release(&m);
}

enum { EVERY = 4, STEPS = 60 };

/* Where a training of these held-out losses ends, and with the parameters of which step. */
typedef struct {
    uint32_t best, end;
    bool rose; /* and then fell below its best */
} forecast;

static forecast forecast_of(const diary *d, uint32_t patience)
{
    forecast f = {0};
    uint32_t since = 0;
    for (uint32_t i = EVERY; i <= STEPS && f.end == 0; i += EVERY) {
        const bool worse =
            f.best > 0 && d->steps[i - 1].heldout_loss >= d->steps[f.best - 1].heldout_loss;
        f.rose = f.rose || (since > 0 && !worse);
        since = worse ? since + 1 : 0;
        f.best = worse ? f.best : i;
        f.end = since == patience || i == STEPS ? i : 0;
    }
    return f;
}

/* What the cases tried: a sum over all of them, as rounding decides where one of them ends. */
typedef struct {
    unsigned early, rose;
} tried;

static void check_early_stop(bool full, bool alike, tried *t)
{
    material m = material_make();
    outcome whole, stopped, shorter;
    diary d = {0};
    if (alike) {
        fewer_tokens(&m.data);
        fewer_tokens(&m.heldout);
    }
    sh_train_options o = constant_options(STEPS);
    o.heldout = &m.heldout;
    o.heldout_every = EVERY;
    o.progress = note_step;
    o.progress_arg = &d;
    must_be_ok(train(&m, full, &o, &whole));
    const forecast all = forecast_of(&d, STEPS);
    assert_int_equal(whole.result.steps, STEPS);
    assert_int_equal(whole.result.heldout_best_step, all.best);
    assert_true(whole.result.heldout_best == d.steps[all.best - 1].heldout_loss);

    o.progress = NULL;
    for (uint32_t patience = 1; patience <= 5; patience++) { /* the last one: to the end */
        o.patience = patience < 5 ? patience : STEPS;
        o.threads = patience % 3;
        const forecast f = forecast_of(&d, o.patience);
        must_be_ok(train(&m, full, &o, &stopped));
        assert_int_equal(stopped.result.steps, f.end);
        assert_int_equal(stopped.result.heldout_best_step, f.best);
        assert_true(stopped.result.heldout_best == d.steps[f.best - 1].heldout_loss);
        assert_true(stopped.result.heldout_last == d.steps[f.end - 1].heldout_loss);
        sh_train_options until = constant_options(f.best);
        must_be_ok(train(&m, full, &until, &shorter));
        must_be_same(&stopped, &shorter);
        t->early += f.end < STEPS && f.best > EVERY;
        t->rose += f.end < STEPS && f.rose;
        outcome_release(&shorter);
        outcome_release(&stopped);
    }
    outcome_release(&whole);
    material_release(&m);
}

static void test_early_stop(void **state)
{
    (void)state;
    tried t = {0};
    check_early_stop(false, true, &t);
    check_early_stop(true, true, &t);
    check_early_stop(false, false, &t); /* unlike texts: the loss rises on the way to its best */
    print_message("%u stopped early, %u of them after a rise and a new best\n", t.early, t.rose);
    assert_true(t.early > 0 && t.rose > 0); /* else this tries nothing */
}

/* Measuring fits into the memory of training but for the angles of longer sequences; patience takes
 * one vector of parameters. */
static void test_early_stop_memory(void **state)
{
    (void)state;
    material m = material_make();
    outcome free_one, limited;
    sh_train_options o = constant_options(2);
    const uint64_t plain = least_memory(&m, false, &o);
    o.heldout = &m.heldout;
    o.heldout_every = 1;
    const uint64_t angles = (m.heldout.length - LENGTH) * m.config.head_size * sizeof(float);
    const uint64_t measured = least_memory(&m, false, &o);
    assert_int_equal(measured, plain + angles);
    o.patience = 5;
    must_be_ok(train(&m, false, &o, &free_one));
    const uint64_t least = least_memory(&m, false, &o);
    assert_int_equal(least - measured, free_one.n * sizeof(float));
    o.memory_max = least;
    must_be_ok(train(&m, false, &o, &limited));
    must_be_near(limited.result.heldout_best, free_one.result.heldout_best, 1e-5);
    outcome_release(&limited);
    /* The refusal says what is missing. */
    o.memory_max = least - 123;
    must_fail(train(&m, false, &o, &limited), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, ": 123 more are needed"));
    outcome_release(&limited);
    o.memory_max = 5;
    must_fail(train(&m, false, &o, &limited), SH_ERR_LIMIT);
    char missing[64];
    snprintf(missing, sizeof missing, ": %llu more", (unsigned long long)(least - 5));
    assert_non_null(strstr(err.text, missing));
    outcome_release(&limited);
    outcome_release(&free_one);
    material_release(&m);
}

static void test_heldout_refusals(void **state)
{
    (void)state;
    material m = material_make();
    outcome out;
    int32_t *tokens = (int32_t *)(uintptr_t)m.heldout.tokens;
    sh_train_options o = constant_options(2);
    o.patience = 1;
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    outcome_release(&out);
    o.heldout_every = 1;
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    outcome_release(&out);
    o.heldout = &m.heldout;
    tokens[5] = -7;
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "held-out"));
    assert_non_null(strstr(err.text, "token -7"));
    outcome_release(&out);
    material_release(&m);
}

/* ---- factors in turns ---- */

/* Which factors of pairs differ: 1: an A, 2: a B. */
static unsigned changed_factors(const material *m, const outcome *x, const outcome *y)
{
    unsigned changed = 0;
    tr_net *net = NULL;
    sh_adapter *of[2];
    must_be_ok(tr_net_create(&m->config, m->model, UINT64_MAX, LENGTH, &net, &err));
    must_be_ok(tr_net_attach(net, m->adapter, &err));
    for (size_t i = 0; i < 2; i++) {
        of[i] = small_adapter(&m->config, (const uint32_t[]){3, 5, 0, 2}, 4, 54);
        tr_lora_scatter(net, (i ? y : x)->params, of[i]);
    }
    for (size_t i = 0; i < (size_t)m->config.n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *p = &of[0]->pairs[i], *q = &of[1]->pairs[i];
        if (!p->a)
            continue;
        changed |= memcmp(p->a, q->a, (size_t)p->rank * p->in * sizeof(float)) != 0;
        changed |= (memcmp(p->b, q->b, (size_t)p->rank * p->out * sizeof(float)) != 0) << 1;
    }
    sh_adapter_destroy(&of[0]);
    sh_adapter_destroy(&of[1]);
    tr_net_destroy(&net);
    return changed;
}

static void test_alternate(void **state)
{
    (void)state;
    material m = material_make();
    for (sh_freeze freeze = SH_FREEZE_NONE; freeze <= SH_FREEZE_B; freeze++) {
        for (unsigned coded = 0; coded < 2; coded++) {
            outcome last = {0}, next;
            for (uint32_t steps = 1; steps <= 7; steps++) {
                sh_train_options o = constant_options(steps);
                o.alternate = 2;
                o.freeze = freeze;
                o.state_8bit = coded;
                o.proximal = 0.1f;
                must_be_ok(train(&m, false, &o, &next));
                const bool b_frozen = ((steps - 1) / 2 % 2 == 0) == (freeze == SH_FREEZE_B);
                if (steps > 1)
                    assert_int_equal(changed_factors(&m, &last, &next), b_frozen ? 1 : 2);
                outcome_release(&last);
                last = next;
            }
            outcome_release(&last);
        }
    }
    material_release(&m);
}

/* A factor's first turn is as a training of that factor alone: its moments and their correction
 * begin with its own first update, whenever that is. */
static void test_alternate_moments(void **state)
{
    (void)state;
    material m = material_make();
    outcome turns, first, second;
    sh_train_options o = constant_options(40);
    o.batch = SEQUENCES;
    o.shuffle_seed = 0;
    o.alternate = 20;
    must_be_ok(train(&m, false, &o, &turns));
    o.steps = 20;
    o.alternate = 0;
    o.freeze = SH_FREEZE_A;
    must_be_ok(train(&m, false, &o, &first));
    tr_net *net = NULL;
    must_be_ok(tr_net_create(&m.config, m.model, UINT64_MAX, LENGTH, &net, &err));
    must_be_ok(tr_net_attach(net, m.adapter, &err));
    tr_lora_scatter(net, first.params, m.adapter);
    o.freeze = SH_FREEZE_B;
    must_be_ok(train(&m, false, &o, &second));
    must_be_same(&turns, &second);
    tr_net_destroy(&net);
    outcome_release(&turns);
    outcome_release(&first);
    outcome_release(&second);
    material_release(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accumulate),
        cmocka_unit_test(test_accumulate_masked_batch),
        cmocka_unit_test(test_accumulate_memory),
        cmocka_unit_test(test_state_8bit_squares),
        cmocka_unit_test(test_state_8bit),
        cmocka_unit_test(test_state_8bit_threads),
        cmocka_unit_test(test_state_8bit_untouched),
        cmocka_unit_test(test_optimizer_bytes),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_progress_norm),
        cmocka_unit_test(test_early_stop),
        cmocka_unit_test(test_early_stop_memory),
        cmocka_unit_test(test_heldout_refusals),
        cmocka_unit_test(test_alternate),
        cmocka_unit_test(test_alternate_moments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
