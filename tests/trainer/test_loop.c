/*
 * What a training does between its steps: accumulated gradients, moments in 8 bits, held-out loss
 * and early stop, factors in turns, checkpoints.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/trainer/small.h"
#include "tests/trainer/util.h"
#include "trainer/optimizer.h"
#include "trainer/train.h"

static sh_error err;

enum { SEQUENCES = 11, HELDOUT = 4, LENGTH = 33 };

/* A base, what is trained on it, and what of it is held out. */
typedef struct {
    sh_model_config config;
    sh_model *model;
    sh_adapter *adapter;
    sh_train_data data, heldout;
} material;

static material material_make(void)
{
    material m = {.config = small_config(true)};
    m.model = small_model(&m.config, SH_TYPE_F32, 51);
    m.data = small_data(&m.config, SEQUENCES, LENGTH, true, 52);
    m.heldout = small_data(&m.config, HELDOUT, LENGTH + 4, true, 53);
    m.adapter = small_adapter(&m.config, (const uint32_t[]){3, 5, 0, 2}, 4, 54);
    return m;
}

static void material_release(material *m)
{
    sh_adapter_destroy(&m->adapter);
    small_data_free(&m->data);
    small_data_free(&m->heldout);
    small_model_free(&m->model);
}

static sh_train_options options_of(uint32_t batch, uint32_t steps)
{
    return (sh_train_options){.lr = 0.01f,
                              .batch = batch,
                              .steps = steps,
                              .warmup = 2,
                              .lr_final = 0.1f,
                              .shuffle_seed = 5,
                              .clip = 1.0f};
}

/* What a training leaves. */
typedef struct {
    float *params;
    size_t n;
    sh_train_result result;
} outcome;

static void outcome_release(outcome *o)
{
    free(o->params);
    *o = (outcome){0};
}

/* Parameters also of a training that fails. */
static sh_status train(const material *m, bool full, const sh_train_options *options, outcome *out)
{
    tr_net *net = NULL;
    float *lora = NULL;
    must_be_ok(tr_net_create(&m->config, m->model, UINT64_MAX, m->data.length - 1, &net, &err));
    if (!full) {
        must_be_ok(tr_net_attach(net, m->adapter, &err));
        lora = sh_alloc_aligned(net->n_lora * sizeof(*lora));
        assert_non_null(lora);
        tr_lora_gather(net, m->adapter, lora);
    }
    const tr_trainee t = {net, full ? net->weights : lora, full ? TR_GRAD_FULL : TR_GRAD_LORA};
    *out = (outcome){.n = full ? net->layout.n : net->n_lora};
    const sh_status status = tr_train(&t, &m->data, options, &out->result, &err);
    out->params = sh_calloc(out->n, sizeof(*out->params));
    assert_non_null(out->params);
    memcpy(out->params, t.params, out->n * sizeof(*out->params));
    free(lora);
    tr_net_destroy(&net);
    return status;
}

/* |x - y| / |x| */
static double distance(const outcome *x, const outcome *y)
{
    double norm = 0, difference = 0;
    assert_int_equal(x->n, y->n);
    for (size_t i = 0; i < x->n; i++) {
        const double a = (double)x->params[i], b = (double)y->params[i];
        norm += a * a;
        difference += (a - b) * (a - b);
    }
    return sqrt(difference / norm);
}

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accumulate),
        cmocka_unit_test(test_accumulate_masked_batch),
        cmocka_unit_test(test_accumulate_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
