/*
 * What a training does between its steps: accumulated gradients, moments in 8 bits, held-out loss
 * and early stop, factors in turns, checkpoints.
 */
#include <malloc.h>
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

/* ---- moments in 8 bits ---- */

/* A training ends where it does with moments in floats. Rounding has no mean, and its standard
 * deviation, some hundredths of a moment, moves each step's length by less: a twentieth of what is
 * learnt is three times what was seen in any of these. */
static void test_state_8bit(void **state)
{
    (void)state;
    material m = material_make();
    for (int full = 0; full < 2; full++) {
        for (sh_optimizer optimizer = SH_ADAMW; optimizer <= SH_SGD; optimizer++) {
            sh_train_options o = options_of(SEQUENCES, 60);
            outcome plain, coded, again;
            o.optimizer = optimizer;
            o.lr = optimizer == SH_SGD ? 0.2f : 0.01f;
            o.momentum = 0.9f;
            o.weight_decay = 0.01f;
            must_be_ok(train(&m, full, &o, &plain));
            o.state_8bit = true;
            must_be_ok(train(&m, full, &o, &coded));
            o.threads = 3;
            must_be_ok(train(&m, full, &o, &again));
            assert_memory_equal(coded.params, again.params, coded.n * sizeof(float));
            const double learnt = plain.result.loss_first - plain.result.loss_last;
            print_message("%.4f to %.4f in floats, %.4f in 8 bits\n", plain.result.loss_first,
                          plain.result.loss_last, coded.result.loss_last);
            assert_true(learnt > 0.3);
            must_be_near(coded.result.loss_last, plain.result.loss_last, 0.05 * learnt);
            assert_true(distance(&plain, &coded) > 1e-5); /* it is another training */
            outcome_release(&plain);
            outcome_release(&coded);
            outcome_release(&again);
        }
    }
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accumulate),           cmocka_unit_test(test_accumulate_masked_batch),
        cmocka_unit_test(test_accumulate_memory),    cmocka_unit_test(test_state_8bit),
        cmocka_unit_test(test_state_8bit_untouched), cmocka_unit_test(test_optimizer_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
