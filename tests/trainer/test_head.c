/*
 * LoRA of the output matrix: gradients against central differences, pieces of logits, a head that
 * is adapted alone, dropout, frozen factors, memory, refusals.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/trainer/small.h"
#include "tests/trainer/util.h"
#include "trainer/train.h"

#define STEP 1e-5
/* As in test_gradients.c. */
#define RELATIVE 1e-5
#define ABSOLUTE 5e-8

static sh_error err;

enum { LAYERS = 2, OUTPUT = LAYERS * SH_LAYER_MATRICES, PAIRS = OUTPUT + 1, SEQUENCES = 7 };

/* Widths are whole blocks of Q8_0; the vocabulary is narrower than the input of the head. */
static sh_model_config head_config(void)
{
    sh_model_config c = small_config(false);
    c.width = 32;
    c.head_size = 8;
    c.ffn = 64;
    return c;
}

static void fill(float *x, size_t n, float std, uint64_t seed)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    for (size_t i = 0; i < n; i++)
        x[i] = std * sh_rng_normal(&rng);
}

/* A head of rank 4 with random factors, with random pairs of ranks beside it or alone. */
static sh_adapter *head_adapter(const sh_model_config *config, const uint32_t *ranks,
                                size_t n_ranks)
{
    sh_adapter *adapter = NULL;
    if (n_ranks > 0)
        adapter = small_adapter(config, ranks, n_ranks, 73);
    else
        must_be_ok(sh_adapter_create_empty(config, 6, &adapter, &err));
    must_be_ok(sh_lora_add_output(adapter, config, 74, 4, &err));
    fill(adapter->pairs[OUTPUT].b, (size_t)4 * config->vocab, 0.2f, 75);
    return adapter;
}

typedef struct {
    sh_model_config config;
    sh_model *model;
    sh_train_data data;
} setup;

static setup setup_make(size_t n, uint32_t length)
{
    setup s = {.config = head_config()};
    s.model = small_model(&s.config, SH_TYPE_F32, 71);
    s.data = small_data(&s.config, n, length, true, 72);
    return s;
}

static void setup_release(setup *s)
{
    small_data_free(&s->data);
    small_model_free(&s->model);
}

static sh_train_options options_of(uint32_t steps)
{
    return (sh_train_options){
        .lr = 0.02f, .batch = SEQUENCES, .steps = steps, .lr_final = 1, .shuffle_seed = 5};
}

static bool same(const sh_lora_pair *x, const sh_lora_pair *y)
{
    return memcmp(x->a, y->a, (size_t)x->rank * x->in * sizeof(float)) == 0 &&
           memcmp(x->b, y->b, (size_t)x->rank * x->out * sizeof(float)) == 0;
}

/* ---- gradients ---- */

typedef struct {
    const setup *s;
    const sh_adapter *adapter;
    double *a[PAIRS], *b[PAIRS], scales[PAIRS];
} doubles;

static double *to_double(const float *x, size_t n)
{
    double *y = sh_calloc(n, sizeof(*y));
    assert_non_null(y);
    for (size_t i = 0; i < n; i++)
        y[i] = (double)x[i];
    return y;
}

static double loss_of(const doubles *d)
{
    const sh_lora_pair *head = &d->adapter->pairs[OUTPUT];
    reference r;
    reference_init(&r, d->s->model);
    reference_adapt(
        &r, &(reference_lora){.shape = d->adapter, .a = d->a, .b = d->b, .scales = d->scales});
    for (size_t o = 0; o < head->out; o++)
        for (size_t i = 0; i < head->in; i++)
            for (size_t k = 0; k < head->rank; k++)
                r.output[o * head->in + i] += d->scales[OUTPUT] * d->b[OUTPUT][o * head->rank + k] *
                                              d->a[OUTPUT][k * head->in + i];
    const double loss = reference_loss(&r, &d->s->data);
    reference_release(&r);
    return loss;
}

static void compare(const doubles *d, const char *name, double *values, const float *grad, size_t n)
{
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        const double kept = values[i];
        values[i] = kept + STEP;
        const double above = loss_of(d);
        values[i] = kept - STEP;
        const double below = loss_of(d);
        values[i] = kept;
        const double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + RELATIVE * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", name, worst, most);
}

/* Of the head, and of what is below it. */
static void check_gradients(const uint32_t *ranks, size_t n_ranks)
{
    static const size_t looked_at[] = {OUTPUT, SH_ATTN_V, SH_LAYER_MATRICES + SH_FFN_DOWN};
    setup s = setup_make(2, 6);
    sh_adapter *adapter = head_adapter(&s.config, ranks, n_ranks);
    sh_adapter *grad = head_adapter(&s.config, ranks, n_ranks);
    doubles d = {.s = &s, .adapter = adapter};
    double loss = 0;
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        if (!p->a)
            continue;
        d.scales[i] = (double)adapter->alpha / p->rank;
        d.a[i] = to_double(p->a, (size_t)p->rank * p->in);
        d.b[i] = to_double(p->b, (size_t)p->rank * p->out);
    }
    must_be_ok(sh_lora_gradient(s.model, adapter, &s.data, grad, &loss, &err));
    const double expected = loss_of(&d);
    must_be_near(loss, expected, 1e-6 * expected);
    for (size_t i = 0; i < SH_COUNT(looked_at); i++) {
        const size_t at = looked_at[i];
        const sh_lora_pair *g = &grad->pairs[at];
        char name[64];
        if (!g->a)
            continue;
        snprintf(name, sizeof(name), "pair %zu lora_a", at);
        compare(&d, name, d.a[at], g->a, (size_t)g->rank * g->in);
        snprintf(name, sizeof(name), "pair %zu lora_b", at);
        compare(&d, name, d.b[at], g->b, (size_t)g->rank * g->out);
    }
    for (size_t i = 0; i < PAIRS; i++) {
        free(d.a[i]);
        free(d.b[i]);
    }
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&grad);
    setup_release(&s);
}

static void test_gradients(void **state)
{
    (void)state;
    check_gradients((const uint32_t[]){2}, 1);
    check_gradients(NULL, 0);
}

/* What is below the lowest adapted layer gets no gradient, and nothing else changes by that: the
 * same bits as with pairs there that do nothing. */
static void test_below_the_lowest(void **state)
{
    (void)state;
    setup s = setup_make(3, 9);
    for (size_t from = SH_LAYER_MATRICES; from <= OUTPUT; from += SH_LAYER_MATRICES) {
        sh_adapter *x[2], *grads[2];
        double loss[2];
        for (size_t k = 0; k < 2; k++) {
            x[k] = head_adapter(&s.config, (const uint32_t[]){2}, 1);
            grads[k] = head_adapter(&s.config, (const uint32_t[]){2}, 1);
            for (size_t i = 0; i < from; i++) {
                sh_lora_pair *pairs[] = {&x[k]->pairs[i], &grads[k]->pairs[i]};
                memset(pairs[0]->b, 0, (size_t)pairs[0]->rank * pairs[0]->out * sizeof(float));
                for (size_t j = 0; k == 1 && j < 2; j++) {
                    free(pairs[j]->a);
                    free(pairs[j]->b);
                    pairs[j]->a = pairs[j]->b = NULL;
                }
            }
            must_be_ok(sh_lora_gradient(s.model, x[k], &s.data, grads[k], &loss[k], &err));
        }
        must_be_near(loss[0], loss[1], 0);
        for (size_t i = from; i < PAIRS; i++)
            assert_true(same(&grads[0]->pairs[i], &grads[1]->pairs[i]));
        for (size_t k = 0; k < 2; k++) {
            sh_adapter_destroy(&x[k]);
            sh_adapter_destroy(&grads[k]);
        }
    }
    setup_release(&s);
}

/* ---- evaluation ---- */

static void fold(sh_model *model, const sh_adapter *adapter)
{
    const sh_lora_pair *p = &adapter->pairs[OUTPUT];
    const float scale = adapter->alpha / (float)p->rank;
    float *w = (float *)(uintptr_t)model->output.data;
    for (size_t o = 0; o < p->out; o++)
        for (size_t k = 0; k < p->rank; k++)
            for (size_t i = 0; i < p->in; i++)
                w[o * p->in + i] += scale * p->b[o * p->rank + k] * p->a[k * p->in + i];
}

/* Beside the output matrix and in it, also where both are seen quantized. */
static void test_equals_folding(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_Q8_0};
    setup s = setup_make(4, 17);
    sh_adapter *adapter = head_adapter(&s.config, NULL, 0);
    double beside[2], base[2], folded;
    for (size_t i = 0; i < 2; i++) {
        const sh_train_limits limits = {.quantize_aware = types[i]};
        must_be_ok(sh_train_evaluate(s.model, NULL, &s.data, &limits, &base[i], &err));
        must_be_ok(sh_train_evaluate(s.model, adapter, &s.data, &limits, &beside[i], &err));
        assert_true(fabs(base[i] - beside[i]) > 0.01);
    }
    assert_true(beside[0] != beside[1]);
    fold(s.model, adapter);
    for (size_t i = 0; i < 2; i++) {
        const sh_train_limits limits = {.quantize_aware = types[i]};
        must_be_ok(sh_train_evaluate(s.model, NULL, &s.data, &limits, &folded, &err));
        must_be_near(beside[i], folded, 1e-5); /* a quant that is rounded the other way */
    }
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

/* ---- training ---- */

static void test_head_alone_learns(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, 17);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        sh_adapter *adapter = NULL;
        sh_train_options o = options_of(60);
        sh_train_result result;
        double before = 0, after = 0;
        o.bf16 = bf16 == 1;
        must_be_ok(sh_adapter_create_empty(&s.config, 8, &adapter, &err));
        must_be_ok(sh_lora_add_output(adapter, &s.config, 1, 4, &err));
        must_be_ok(sh_train_evaluate(s.model, NULL, &s.data, NULL, &before, &err));
        must_be_ok(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err));
        must_be_ok(sh_train_evaluate(s.model, adapter, &s.data, NULL, &after, &err));
        if (!(after < 0.8 * before))
            fail_msg("the loss is %g, before %g", after, before);
        for (size_t i = 0; i < OUTPUT; i++)
            assert_null(adapter->pairs[i].a);
        sh_adapter_destroy(&adapter);
    }
    setup_release(&s);
}

/* Same bytes for any number of threads; alphas of a layer's matrices are not the head's. */
static void test_threads(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, 91);
    sh_adapter *trained[5], *start = head_adapter(&s.config, (const uint32_t[]){3}, 1);
    for (unsigned i = 0; i < SH_COUNT(trained); i++) {
        sh_train_options o = options_of(3);
        sh_train_result result;
        o.dropout = 0.3f;
        o.dropout_seed = 9;
        o.threads = i;
        trained[i] = head_adapter(&s.config, i < 3 ? (const uint32_t[]){3} : NULL, i < 3);
        for (size_t m = 0; i == 4 && m < SH_LAYER_MATRICES; m++)
            o.alphas[m] = 100;
        must_be_ok(sh_lora_train(s.model, trained[i], &s.data, &o, &result, &err));
        assert_false(same(&start->pairs[OUTPUT], &trained[i]->pairs[OUTPUT]));
    }
    for (size_t i = 0; i < PAIRS; i++)
        assert_true(same(&trained[0]->pairs[i], &trained[1]->pairs[i]) &&
                    same(&trained[0]->pairs[i], &trained[2]->pairs[i]));
    assert_true(same(&trained[3]->pairs[OUTPUT], &trained[4]->pairs[OUTPUT]));
    for (unsigned i = 0; i < SH_COUNT(trained); i++)
        sh_adapter_destroy(&trained[i]);
    sh_adapter_destroy(&start);
    setup_release(&s);
}

static void test_freeze(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, 9);
    for (sh_freeze freeze = SH_FREEZE_A; freeze <= SH_FREEZE_B; freeze++) {
        sh_adapter *start = head_adapter(&s.config, NULL, 0);
        sh_adapter *trained = head_adapter(&s.config, NULL, 0);
        const sh_lora_pair *x = &start->pairs[OUTPUT], *y = &trained->pairs[OUTPUT];
        sh_train_options o = options_of(2);
        sh_train_result result;
        o.freeze = freeze;
        must_be_ok(sh_lora_train(s.model, trained, &s.data, &o, &result, &err));
        const bool same_a = memcmp(x->a, y->a, (size_t)4 * x->in * sizeof(float)) == 0;
        const bool same_b = memcmp(x->b, y->b, (size_t)4 * x->out * sizeof(float)) == 0;
        assert_true(same_a == (freeze == SH_FREEZE_A) && same_b == (freeze == SH_FREEZE_B));
        sh_adapter_destroy(&start);
        sh_adapter_destroy(&trained);
    }
    setup_release(&s);
}

/* ---- memory ---- */

typedef struct {
    float *grad;
    size_t n;
    double loss;
    sh_tile_plan plan;
} plan_result;

static sh_status plan_run(const setup *s, const sh_adapter *adapter, uint64_t memory_max,
                          plan_result *out)
{
    tr_net *net = NULL;
    tr_batcher *batcher = NULL;
    uint32_t index[SEQUENCES];
    must_be_ok(tr_net_create(&s->config, s->model, 0, s->data.length - 1, &net, &err));
    net->tile_floats = 512;
    must_be_ok(tr_net_attach(net, adapter, &err));
    net->dropout = (tr_dropout){.p = 0.4f, .seed = 3};
    float *lora = sh_alloc_aligned(net->n_lora * sizeof(*lora));
    assert_non_null(lora);
    tr_lora_gather(net, adapter, lora);
    tr_net_use(net, lora);
    for (uint32_t i = 0; i < SEQUENCES; i++)
        index[i] = i;
    const tr_batcher_options o = {.net = net,
                                  .data = &s->data,
                                  .mode = TR_GRAD_LORA,
                                  .batch = SEQUENCES,
                                  .threads = 2,
                                  .memory_max = memory_max};
    const sh_status status = tr_batcher_create(&o, &batcher, &err);
    if (status == SH_OK) {
        *out = (plan_result){.grad = sh_alloc_aligned(net->n_lora * sizeof(float)),
                             .n = net->n_lora,
                             .plan = tr_batcher_plan(batcher)};
        assert_non_null(out->grad);
        out->loss = tr_batcher_run(batcher, index, SEQUENCES, out->grad).loss_sum;
        tr_batcher_destroy(&batcher);
    }
    free(lora);
    tr_net_destroy(&net);
    return status;
}

static void must_agree(const plan_result *x, const plan_result *y)
{
    double norm = 0, difference = 0;
    for (size_t i = 0; i < x->n; i++) {
        norm += (double)x->grad[i] * (double)x->grad[i];
        difference += pow((double)x->grad[i] - (double)y->grad[i], 2);
    }
    must_be_near(sqrt(difference), 0, 1e-5 * sqrt(norm));
    must_be_near(x->loss, y->loss, 1e-6 * x->loss);
}

/* In pieces of ever fewer logits, under dropout: the same gradient, down to the last byte that the
 * refusal asks for. */
static void check_memory(const uint32_t *ranks, size_t n_ranks)
{
    setup s = setup_make(SEQUENCES, 65);
    sh_adapter *adapter = head_adapter(&s.config, ranks, n_ranks);
    plan_result whole, less;
    must_be_ok(plan_run(&s, adapter, 0, &whole));
    uint64_t limit = whole.plan.bytes;
    uint32_t rows = whole.plan.logit_rows;
    assert_true(rows >= 128);
    sh_status status;
    while ((status = plan_run(&s, adapter, --limit, &less)) == SH_OK) {
        assert_true(less.plan.bytes <= limit);
        must_agree(&whole, &less);
        rows = SH_MIN(rows, less.plan.logit_rows);
        limit = less.plan.bytes;
        free(less.grad);
    }
    assert_int_equal(status, SH_ERR_LIMIT);
    assert_int_equal(rows, TR_LOGIT_ROWS);
    char needed[32];
    snprintf(needed, sizeof(needed), "need %llu", (unsigned long long)(limit + 1));
    must_say(needed);
    free(whole.grad);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

static void test_memory(void **state)
{
    (void)state;
    check_memory((const uint32_t[]){3, 0}, 2);
    check_memory(NULL, 0);
}

/* Every allocation in turn fails: an error, and nothing changed. */
static void test_no_memory(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, 9);
    sh_adapter *adapter = NULL;
    sh_train_options o = options_of(1);
    sh_train_result result;
    sh_status status = SH_ERR_NO_MEMORY;
    size_t n = 0;
    must_be_ok(sh_adapter_create_empty(&s.config, 8, &adapter, &err));
    sh_lora_pair *head = &adapter->pairs[OUTPUT];
    while (status != SH_OK && n < 1000) {
        (void)sh_alloc_fail_after(++n);
        status = head->a ? SH_OK : sh_lora_add_output(adapter, &s.config, 1, 4, &err);
        if (status == SH_OK)
            status = sh_lora_train(s.model, adapter, &s.data, &o, &result, &err);
        (void)sh_alloc_fail_after(0);
        assert_true(status == SH_OK || status == SH_ERR_NO_MEMORY);
        assert_true(!head->a == !head->b && !head->a == (head->rank == 0));
        for (size_t i = 0; status != SH_OK && head->a && i < (size_t)4 * head->out; i++)
            assert_true(head->b[i] == 0);
    }
    if (n < 10 || n >= 1000)
        fail_msg("training succeeded when allocation %zu was to fail", n);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

/* ---- refusals ---- */

static void test_refusals(void **state)
{
    (void)state;
    setup s = setup_make(2, 9);
    sh_adapter *adapter = head_adapter(&s.config, NULL, 0), *none = NULL;
    sh_train_options o = options_of(1);
    sh_train_result result;
    double loss;
    must_fail(sh_lora_add_output(adapter, &s.config, 1, 4, &err), SH_ERR_INVALID);
    must_say("output.weight");
    must_be_ok(sh_adapter_create_empty(&s.config, 8, &none, &err));
    must_fail(sh_lora_add_output(none, &s.config, 1, 0, &err), SH_ERR_INVALID);
    must_fail(sh_lora_add_output(none, &s.config, 1, SH_LORA_RANK_MAX + 1, &err), SH_ERR_INVALID);
    sh_model_config tied = s.config;
    tied.tied_output = true;
    must_fail(sh_lora_add_output(none, &tied, 1, 4, &err), SH_ERR_UNSUPPORTED);
    must_say("output.weight");
    assert_null(none->pairs[OUTPUT].a);
    must_fail(sh_lora_gradient(s.model, adapter, &s.data, none, &loss, &err), SH_ERR_INVALID);
    sh_adapter_destroy(&none);
    sh_adapter *layers = small_adapter(&s.config, (const uint32_t[]){2}, 1, 1);
    must_fail(sh_lora_gradient(s.model, adapter, &s.data, layers, &loss, &err), SH_ERR_MISMATCH);
    sh_adapter_destroy(&layers);

    /* With B = 0 the loss is finite; times such a scale the gradient of B is not. */
    sh_lora_pair *head = &adapter->pairs[OUTPUT];
    adapter->alpha = 3e38f;
    memset(head->b, 0, (size_t)head->rank * head->out * sizeof(float));
    for (size_t i = 0; i < (size_t)head->rank * head->in; i++)
        head->a[i] *= 1e6f;
    must_fail(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err), SH_ERR_INVALID);
    must_say("output.weight.lora_b");

    setup t = {.config = tied};
    t.model = small_model(&t.config, SH_TYPE_F32, 71);
    must_fail(sh_lora_train(t.model, adapter, &s.data, &o, &result, &err), SH_ERR_MISMATCH);
    must_say("output.weight");
    must_fail(sh_train_evaluate(t.model, adapter, &s.data, NULL, &loss, &err), SH_ERR_MISMATCH);
    must_say("output.weight");
    small_model_free(&t.model);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients),      cmocka_unit_test(test_below_the_lowest),
        cmocka_unit_test(test_equals_folding), cmocka_unit_test(test_head_alone_learns),
        cmocka_unit_test(test_threads),        cmocka_unit_test(test_freeze),
        cmocka_unit_test(test_memory),         cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
