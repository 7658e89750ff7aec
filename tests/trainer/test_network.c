/*
 * What the network does beside plain LoRA: scales and ranks by matrix, dropout, weights seen as
 * after quantization.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/model/synth.h"
#include "tests/trainer/small.h"
#include "tests/trainer/util.h"
#include "trainer/train.h"

static sh_error err;

/* A model of whole blocks, and sequences of 32 inputs: 8 a micro-batch. */
typedef struct {
    sh_model_config config;
    sh_model *model;
    sh_adapter *adapter;
    sh_train_data data;
} setup;

enum { PAIRS = 2 * SH_LAYER_MATRICES, SEQUENCES = 19 };

static setup setup_make(const uint32_t *ranks, size_t n_ranks)
{
    setup s = {.config = small_config(false)};
    s.config.width = 32;
    s.config.head_size = 8;
    s.config.ffn = 64;
    s.model = small_model(&s.config, SH_TYPE_F32, 41);
    s.data = small_data(&s.config, SEQUENCES, 33, true, 42);
    s.adapter = small_adapter(&s.config, ranks, n_ranks, 43);
    return s;
}

static void setup_release(setup *s)
{
    sh_adapter_destroy(&s->adapter);
    small_data_free(&s->data);
    small_model_free(&s->model);
}

static const uint32_t rank_4[] = {4}, mixed[] = {3, 5, 0, 2};

static sh_train_options options_of(uint32_t steps)
{
    return (sh_train_options){.lr = 0.01f, .batch = 12, .steps = steps, .lr_final = 1, .clip = 1};
}

/* A copy of s's adapter, with B times factor, trained. */
static sh_adapter *trained(const setup *s, const uint32_t *ranks, size_t n_ranks, float factor,
                           const sh_train_options *o)
{
    sh_adapter *adapter = small_adapter(&s->config, ranks, n_ranks, 43);
    sh_train_result result;
    for (size_t i = 0; i < PAIRS; i++)
        for (size_t j = 0; j < (size_t)adapter->pairs[i].rank * adapter->pairs[i].out; j++)
            adapter->pairs[i].b[j] *= factor;
    must_be_ok(sh_lora_train(s->model, adapter, &s->data, o, &result, &err));
    return adapter;
}

/* ---- ranks and scales ---- */

static void test_ranks(void **state)
{
    (void)state;
    const sh_model_config config = small_config(true);
    static const uint32_t ranks[SH_LAYER_MATRICES] = {[SH_ATTN_Q] = 8, [SH_ATTN_V] = 4};
    const uint32_t none[SH_LAYER_MATRICES] = {0};
    uint32_t many[SH_LAYER_MATRICES] = {[SH_FFN_UP] = SH_LORA_RANK_MAX + 1};
    sh_adapter *some = NULL, *all = NULL, *bad = NULL;
    must_be_ok(sh_lora_initialize_ranks(&config, 7, ranks, 16, &some, &err));
    must_be_ok(sh_lora_initialize(&config, 7, 4, 16, &all, &err));
    assert_int_equal(some->rank, 8);
    must_be_near((double)some->alpha, 16, 0);
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &some->pairs[i], *q = &all->pairs[i];
        assert_int_equal(p->rank, ranks[i % SH_LAYER_MATRICES]);
        assert_int_equal(p->a != NULL, p->rank > 0);
        assert_int_equal(p->b != NULL, p->rank > 0);
        if (p->rank > 0) /* the first rows are those of a smaller rank */
            assert_memory_equal(p->a, q->a, (size_t)q->rank * q->in * sizeof(float));
        for (size_t j = 0; j < (size_t)p->rank * p->out; j++)
            must_be_near((double)p->b[j], 0, 0);
    }
    must_fail(sh_lora_initialize_ranks(&config, 7, none, 16, &bad, &err), SH_ERR_INVALID);
    must_fail(sh_lora_initialize_ranks(&config, 7, many, 16, &bad, &err), SH_ERR_INVALID);
    must_fail(sh_lora_initialize_ranks(&config, 7, ranks, 0, &bad, &err), SH_ERR_INVALID);
    assert_null(bad);
    sh_adapter_destroy(&some);
    sh_adapter_destroy(&all);
}

/* Rank 4 with rsLoRA's alpha / 2 is alpha / 4 of twice the alpha: the same bits but for B's powers
 * of two. The same of alphas by matrix. */
static void test_scales(void **state)
{
    (void)state;
    setup s = setup_make(rank_4, 1);
    sh_train_options plain = options_of(4), rs = plain, alphas = plain, twice = plain;
    plain.weight_decay = rs.weight_decay = 0.1f;
    alphas.weight_decay = twice.weight_decay = 0.1f;
    rs.rslora = true;
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++) {
        twice.alphas[m] = 2 * s.adapter->alpha;
        alphas.alphas[m] = m == SH_ATTN_V ? s.adapter->alpha : 0;
    }
    sh_adapter *x[4] = {trained(&s, rank_4, 1, 1, &plain), trained(&s, rank_4, 1, 1, &alphas),
                        trained(&s, rank_4, 1, 1, &rs), trained(&s, rank_4, 1, 1, &twice)};
    assert_true(same_adapter(x[0], x[1]));
    assert_true(same_adapter(x[2], x[3]));
    assert_false(same_adapter(x[0], x[2]));
    /* What an adapter of twice the alpha becomes. */
    sh_adapter *other = small_adapter(&s.config, rank_4, 1, 43);
    sh_train_result result;
    other->alpha *= 2;
    for (size_t i = 0; i < PAIRS; i++)
        for (size_t j = 0; j < 4 * (size_t)other->pairs[i].out; j++)
            other->pairs[i].b[j] /= 2;
    must_be_ok(sh_lora_train(s.model, other, &s.data, &plain, &result, &err));
    for (size_t i = 0; i < PAIRS; i++)
        for (size_t j = 0; j < 4 * (size_t)other->pairs[i].out; j++)
            other->pairs[i].b[j] *= 2;
    assert_true(same_adapter(other, x[2]));
    sh_adapter_destroy(&other);
    for (size_t i = 0; i < SH_COUNT(x); i++)
        sh_adapter_destroy(&x[i]);
    setup_release(&s);
}

/* One matrix's alpha changes the steps of all, but a frozen B keeps its bits at any scale. */
static void test_frozen_scales(void **state)
{
    (void)state;
    setup s = setup_make(mixed, 4);
    sh_train_options o = options_of(3);
    o.rslora = true;
    o.alphas[SH_ATTN_Q] = 0.7f;
    o.freeze = SH_FREEZE_B;
    sh_adapter *x = trained(&s, mixed, 4, 1, &o);
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &x->pairs[i], *q = &s.adapter->pairs[i];
        if (!p->a)
            continue;
        assert_memory_equal(p->b, q->b, (size_t)p->rank * p->out * sizeof(float));
        assert_memory_not_equal(p->a, q->a, (size_t)p->rank * p->in * sizeof(float));
    }
    sh_adapter_destroy(&x);
    setup_release(&s);
}

/* ---- dropout ---- */

/* A net and a batcher of a setup's adapter. */
typedef struct {
    tr_net *net;
    tr_batcher *batcher;
    float *lora, *grad;
    tr_batch_loss loss; /* of bench_run */
} bench;

static void bench_open(bench *b, const setup *s, const sh_train_options *o, uint64_t memory_max,
                       size_t batch)
{
    *b = (bench){0};
    must_be_ok(tr_net_create(&s->config, s->model, 0, s->data.length - 1, &b->net, &err));
    b->net->tile_floats = 512;
    must_be_ok(tr_net_quantize(b->net, o->quantize_aware, &err));
    must_be_ok(tr_net_attach(b->net, s->adapter, &err));
    must_be_ok(tr_net_set_lora(b->net, s->adapter, o, &err));
    b->net->bf16 = o->bf16;
    b->lora = sh_alloc_aligned(b->net->n_lora * sizeof(float));
    b->grad = sh_alloc_aligned(b->net->n_lora * sizeof(float));
    assert_true(b->lora && b->grad);
    tr_lora_gather(b->net, s->adapter, b->lora);
    tr_net_use(b->net, b->lora);
    must_be_ok(tr_batcher_create(&(tr_batcher_options){.net = b->net,
                                                       .data = &s->data,
                                                       .mode = TR_GRAD_LORA,
                                                       .batch = batch,
                                                       .threads = o->threads,
                                                       .memory_max = memory_max},
                                 &b->batcher, &err));
}

static void bench_close(bench *b)
{
    tr_batcher_destroy(&b->batcher);
    tr_net_destroy(&b->net);
    free(b->lora);
    free(b->grad);
}

static const uint32_t in_order[SEQUENCES] = {0,  1,  2,  3,  4,  5,  6,  7,  8, 9,
                                             10, 11, 12, 13, 14, 15, 16, 17, 18};

static double distance(const float *x, const float *y, size_t n)
{
    double sum = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        sum += pow((double)x[i] - (double)y[i], 2);
        norm += pow((double)x[i], 2);
    }
    return sqrt(sum / norm);
}

/* The rows that a tr_drop makes of ones. */
static void draw(bench *b, const tr_place *at, uint32_t first, float *out)
{
    tr_work *work = NULL;
    const tr_work_shape shape = {.sequences = 4, .positions = 32, .logit_rows = 1};
    must_be_ok(tr_work_create(b->net, &shape, &work, &err));
    work->first = first;
    for (size_t i = 0; i < at->rows * b->net->groups[at->g].in; i++)
        out[i] = 1;
    tr_drop(b->net, work, at, out, out);
    tr_work_destroy(&work);
}

/* A share p is dropped, the others keep the mean; each of what names a mask changes it. */
static void test_masks(void **state)
{
    (void)state;
    enum { ROWS = 4 * 32, IN = 32, N = ROWS * IN };
    setup s = setup_make(mixed, 4);
    sh_train_options o = {.dropout = 0.25f, .dropout_seed = 3};
    bench b;
    float *x = sh_calloc(2 * N, sizeof(*x)), *y = x + N;
    assert_non_null(x);
    bench_open(&b, &s, &o, 0, 4);
    const tr_place place = {.layer = 1, .g = TR_GATE_UP, .rows = ROWS};
    draw(&b, &place, 2, x);
    double dropped = 0;
    for (size_t i = 0; i < N; i++) {
        assert_true(x[i] == 0.0f || fabs((double)x[i] - 1 / 0.75) < 1e-6);
        dropped += x[i] == 0.0f;
    }
    must_be_near(dropped / N, 0.25, 5 * sqrt(0.25 * 0.75 / N));
    /* Sequences 2 and 3 of the batch are the same wherever a micro-batch begins. */
    draw(&b, &place, 0, y);
    assert_memory_equal(x, y + N / 2, N / 2 * sizeof(*x));
    for (size_t change = 0; change < 5; change++) {
        tr_place other = place;
        const uint32_t first = change == 0 ? 6 : 2;
        b.net->dropout.step = change == 1;
        b.net->dropout.seed = change == 2 ? 4 : 3;
        other.layer = change == 3 ? 0 : 1;
        other.g = change == 4 ? TR_QKV : TR_GATE_UP;
        draw(&b, &other, first, y);
        double same = 0;
        for (size_t i = 0; i < N; i++)
            same += x[i] == y[i];
        must_be_near(same / N, 0.25 * 0.25 + 0.75 * 0.75, 5 * 0.5 / sqrt(N));
    }
    double same = 0; /* rows of one sequence */
    for (size_t i = 0; i < N - IN; i++)
        same += x[i] == x[i + IN];
    must_be_near(same / (N - IN), 0.25 * 0.25 + 0.75 * 0.75, 5 * 0.5 / sqrt(N));
    free(x);
    bench_close(&b);
    setup_release(&s);
}

/* A gradient of all sequences at step 7. */
static void bench_run(bench *b, const setup *s, const sh_train_options *o, uint64_t memory_max)
{
    bench_open(b, s, o, memory_max, SEQUENCES);
    b->net->dropout.step = 7;
    b->loss = tr_batcher_run(b->batcher, in_order, SEQUENCES, b->grad);
}

/* The same gradient for any threads and kept layers, bit for bit; for other numbers of sequences
 * and of logits at a time up to `tolerance`. */
static void must_agree_in_plans(const setup *s, const sh_train_options *options, double tolerance)
{
    sh_train_options o = *options;
    bench whole, last, other;
    unsigned fewer_layers = 0;
    o.threads = 1;
    bench_run(&whole, s, &o, 0);
    const size_t n = whole.net->n_lora;
    for (o.threads = 2; o.threads <= 3; o.threads++) {
        bench_run(&other, s, &o, 0);
        assert_int_equal(tr_batcher_plan(other.batcher).threads, o.threads);
        assert_memory_equal(whole.grad, other.grad, n * sizeof(float));
        bench_close(&other);
    }
    o.threads = 1;
    bench_run(&last, s, &o, 0);
    sh_tile_plan before = tr_batcher_plan(last.batcher), now = before;
    while (now.micro_sequences > 1) {
        bench_run(&other, s, &o, before.bytes - 1);
        now = tr_batcher_plan(other.batcher);
        must_be_near(distance(whole.grad, other.grad, n), 0, tolerance);
        if (now.micro_sequences == before.micro_sequences && now.logit_rows == before.logit_rows) {
            assert_memory_equal(last.grad, other.grad, n * sizeof(float));
            fewer_layers += now.kept_layers < before.kept_layers;
        }
        bench_close(&last);
        last = other;
        before = now;
    }
    assert_true(fewer_layers > 0);
    bench_close(&last);
    bench_close(&whole);
}

/* A step of two batches has the masks of one. */
static void test_dropout_plans(void **state)
{
    (void)state;
    setup s = setup_make(mixed, 4);
    const sh_train_options o = {.dropout = 0.4f, .dropout_seed = 3};
    bench whole, other;
    must_agree_in_plans(&s, &o, 1e-5);
    bench_run(&whole, &s, &o, 0);
    bench_open(&other, &s, &o, 0, SEQUENCES);
    other.net->dropout.step = 7;
    const size_t n = whole.net->n_lora;
    float *sum = sh_calloc(n, sizeof(*sum));
    assert_non_null(sum);
    for (uint32_t at = 0; at < SEQUENCES; at += 11) {
        const size_t count = SH_MIN(11u, SEQUENCES - at);
        other.net->dropout.first = at;
        const tr_batch_loss part = tr_batcher_run(other.batcher, in_order + at, count, other.grad);
        for (size_t i = 0; i < n; i++)
            sum[i] += other.grad[i] * (float)part.n_targets / (float)whole.loss.n_targets;
    }
    must_be_near(distance(whole.grad, sum, n), 0, 1e-5);
    free(sum);
    bench_close(&other);
    bench_close(&whole);
    setup_release(&s);
}

/* Seeds name a training; without dropout they are nothing, and evaluation knows no dropout. */
static void test_dropout_training(void **state)
{
    (void)state;
    setup s = setup_make(mixed, 4);
    sh_train_options o[4] = {options_of(5), options_of(5), options_of(5), options_of(5)};
    sh_adapter *x[4];
    o[0].dropout = o[1].dropout = o[2].dropout = 0.2f;
    o[1].threads = 3;
    o[2].dropout_seed = 1;
    for (size_t i = 0; i < SH_COUNT(x); i++)
        x[i] = trained(&s, mixed, 4, 1, &o[i]);
    assert_true(same_adapter(x[0], x[1]));
    assert_false(same_adapter(x[0], x[2]));
    assert_false(same_adapter(x[0], x[3]));
    o[3].dropout_seed = 99;
    sh_adapter *other = trained(&s, mixed, 4, 1, &o[3]);
    assert_true(same_adapter(other, x[3]));
    double before = 0, after = 0;
    must_be_ok(sh_train_evaluate(s.model, s.adapter, &s.data, NULL, &before, &err));
    must_be_ok(sh_train_evaluate(s.model, x[0], &s.data, NULL, &after, &err));
    assert_true(after < before);
    sh_adapter_destroy(&other);
    for (size_t i = 0; i < SH_COUNT(x); i++)
        sh_adapter_destroy(&x[i]);
    setup_release(&s);
}

/* ---- quantization-aware ---- */

static sh_matrix *matrix_at(sh_model *m, size_t i)
{
    return i < PAIRS    ? &m->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES]
           : i == PAIRS ? &m->token_embd
                        : &m->output;
}

/* Values of few bits, so that W + s B A is exact. */
static void round_values(float *x, size_t n, float step)
{
    for (size_t i = 0; i < n; i++)
        x[i] = roundf(x[i] / step) * step;
}

static const uint32_t powers[] = {4, 0, 8, 2};

static setup exact_setup(void)
{
    setup s = setup_make(powers, SH_COUNT(powers));
    for (size_t i = 0; i < PAIRS + 2; i++) {
        const sh_matrix *m = matrix_at(s.model, i);
        round_values((float *)(uintptr_t)m->data, (size_t)m->out * m->in, 0x1p-10f);
    }
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &s.adapter->pairs[i];
        round_values(p->a, (size_t)p->rank * p->in, 0x1p-4f);
        round_values(p->b, (size_t)p->rank * p->out, 0x1p-5f);
    }
    return s;
}

/* What a publication makes: the adapter merged (NULL: none), every matrix in `type`. To be freed
 * with small_model_free. */
static sh_model *published(const setup *s, const sh_adapter *adapter, sh_type type)
{
    sh_model *model = small_model(&s->config, SH_TYPE_F32, 41);
    for (size_t i = 0; i < PAIRS + 2; i++) {
        sh_matrix *m = matrix_at(model, i);
        const size_t n = (size_t)m->out * m->in;
        const sh_lora_pair *p = adapter && i < PAIRS ? &adapter->pairs[i] : NULL;
        float *w = (float *)(uintptr_t)m->data;
        memcpy(w, matrix_at(s->model, i)->data, n * sizeof(*w));
        for (size_t o = 0; p && p->a && o < m->out; o++)
            for (size_t j = 0; j < m->in; j++) {
                double sum = 0;
                for (size_t k = 0; k < p->rank; k++)
                    sum += (double)p->b[o * p->rank + k] * (double)p->a[k * m->in + j];
                w[o * m->in + j] += (float)((double)adapter->alpha / p->rank * sum);
            }
        uint8_t *rows = sh_calloc(1, m->out * sh_type_row_bytes(type, m->in));
        assert_non_null(rows);
        sh_row_quantize(type, w, rows, n);
        free(w);
        m->data = rows;
        m->type = type;
    }
    return model;
}

static const sh_type types[] = {SH_TYPE_Q4_0, SH_TYPE_Q8_0};

/* The loss of a model and its adapter as they would be published. */
static double loss_as(const setup *s, const sh_adapter *adapter, sh_type type)
{
    double nll = 0;
    must_be_ok(sh_train_evaluate(s->model, adapter, &s->data,
                                 &(sh_train_limits){.quantize_aware = type}, &nll, &err));
    return nll;
}

static void test_quantized_loss(void **state)
{
    (void)state;
    setup s = exact_setup();
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        for (size_t with = 0; with < 2; with++) {
            const sh_adapter *adapter = with ? s.adapter : NULL;
            sh_model *model = published(&s, adapter, types[i]);
            double there = 0, again = 0, plain = loss_as(&s, adapter, SH_TYPE_F32);
            must_be_ok(sh_train_evaluate(model, NULL, &s.data, NULL, &there, &err));
            must_be_near(loss_as(&s, adapter, types[i]), there, 1e-6 * there);
            assert_true(fabs(there - plain) > 1e-5 * plain);
            /* What is quantized already stays. */
            must_be_ok(sh_train_evaluate(model, NULL, &s.data,
                                         &(sh_train_limits){.quantize_aware = types[i]}, &again,
                                         &err));
            must_be_near(again, there, 1e-6 * there);
            small_model_free(&model);
        }
    }
    setup_release(&s);
}

/* dB = s dW Aᵀ and dA = s Bᵀ dW, with dW of the weights as they are published. */
static void must_be_straight_through(const setup *s, const sh_full *merged, const sh_adapter *grad)
{
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &s->adapter->pairs[i], *g = &grad->pairs[i];
        char name[64];
        size_t n = 0;
        if (!p->a)
            continue;
        snprintf(name, sizeof(name), "blk.%zu.%s.weight", i / SH_LAYER_MATRICES,
                 sh_layer_matrix_names[i % SH_LAYER_MATRICES]);
        const float *dw = sh_full_grad(merged, name, &n);
        const double scale = (double)s->adapter->alpha / p->rank;
        assert_int_equal(n, (size_t)p->out * p->in);
        double *da = sh_calloc((size_t)p->rank * (p->in + p->out), sizeof(*da));
        assert_non_null(da);
        double *db = da + (size_t)p->rank * p->in, most = 0;
        for (size_t o = 0; o < p->out; o++)
            for (size_t k = 0; k < p->rank; k++)
                for (size_t j = 0; j < p->in; j++) {
                    const double d = scale * (double)dw[o * p->in + j];
                    da[k * p->in + j] += d * (double)p->b[o * p->rank + k];
                    db[o * p->rank + k] += d * (double)p->a[k * p->in + j];
                }
        for (size_t j = 0; j < (size_t)p->rank * (p->in + p->out); j++)
            most = fmax(most, fabs(da[j]));
        for (size_t j = 0; j < (size_t)p->rank * p->in; j++)
            must_be_near((double)g->a[j], da[j], 1e-5 * most);
        for (size_t j = 0; j < (size_t)p->rank * p->out; j++)
            must_be_near((double)g->b[j], db[j], 1e-5 * most);
        free(da);
    }
}

static void test_quantized_lora_gradient(void **state)
{
    (void)state;
    setup s = exact_setup();
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        const sh_train_options o = {.quantize_aware = types[i]};
        sh_model *model = published(&s, s.adapter, types[i]);
        sh_adapter *grad = small_adapter(&s.config, powers, SH_COUNT(powers), 1);
        sh_full *merged = NULL;
        bench b;
        double loss = 0;
        must_be_ok(sh_full_from_model(model, &merged, &err));
        must_be_ok(sh_full_gradient(merged, &s.data, &loss, &err));
        bench_open(&b, &s, &o, 0, SEQUENCES);
        const tr_batch_loss sum = tr_batcher_run(b.batcher, in_order, SEQUENCES, b.grad);
        must_be_near(sum.loss_sum / (double)sum.n_targets, loss, 1e-6 * loss);
        tr_lora_scatter(b.net, b.grad, grad);
        must_be_straight_through(&s, merged, grad);
        bench_close(&b);
        sh_full_destroy(&merged);
        sh_adapter_destroy(&grad);
        small_model_free(&model);
    }
    setup_release(&s);
}

/* Of full training: the gradient at the weights as they are saved. */
static void test_quantized_full_gradient(void **state)
{
    (void)state;
    setup s = exact_setup();
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        sh_model *model = published(&s, NULL, types[i]);
        sh_full *saved = NULL;
        tr_net *net = NULL;
        double losses[2];
        must_be_ok(sh_full_from_model(model, &saved, &err));
        must_be_ok(sh_full_gradient(saved, &s.data, &losses[0], &err));
        must_be_ok(tr_net_create(&s.config, s.model, UINT64_MAX, 32, &net, &err));
        must_be_ok(tr_net_quantize(net, types[i], &err));
        float *grad = sh_alloc_aligned(net->layout.n * sizeof(*grad));
        assert_non_null(grad);
        must_be_ok(tr_gradient(net, &s.data, TR_GRAD_FULL, grad, &losses[1], &err));
        must_be_near(losses[1], losses[0], 1e-6 * losses[0]);
        for (size_t t = 0; t < tr_tensor_count(net); t++) {
            const tr_tensor tensor = tr_tensor_at(net, t);
            size_t n = 0;
            const float *expected = sh_full_grad(saved, tensor.name, &n);
            must_be_near(distance(expected, grad + tensor.at, n), 0, 1e-5);
        }
        free(grad);
        tr_net_destroy(&net);
        sh_full_destroy(&saved);
        small_model_free(&model);
    }
    setup_release(&s);
}

/* The weights are the same bits in any plan; bf16 rounds what comes to them. */
static void test_quantized_plans(void **state)
{
    (void)state;
    setup s = setup_make(mixed, 4);
    sh_train_options o = {.quantize_aware = SH_TYPE_Q4_0};
    must_agree_in_plans(&s, &o, 1e-5);
    o.bf16 = true;
    must_agree_in_plans(&s, &o, 0.05);
    setup_release(&s);
}

/* ---- what it is for ---- */

static void test_quantized_lora_training(void **state)
{
    (void)state;
    setup s = setup_make(rank_4, 1);
    sh_train_options o = options_of(60);
    const double before = loss_as(&s, s.adapter, SH_TYPE_Q4_0);
    sh_adapter *plain = trained(&s, rank_4, 1, 1, &o);
    const double rounded = loss_as(&s, plain, SH_TYPE_Q4_0);
    for (size_t bf16 = 0; bf16 < 2; bf16++) {
        o.quantize_aware = SH_TYPE_Q4_0;
        o.bf16 = bf16;
        o.threads = 2;
        sh_adapter *aware = trained(&s, rank_4, 1, 1, &o);
        const double kept = loss_as(&s, aware, SH_TYPE_Q4_0);
        print_message(
            "LoRA, Q4_0: %.4f at first; %.4f rounded afterwards (%.4f before), %.4f aware\n",
            before, rounded, loss_as(&s, plain, SH_TYPE_F32), kept);
        assert_true(rounded < before);
        assert_true(kept < rounded - 0.2 * (before - rounded));
        sh_adapter_destroy(&aware);
    }
    sh_adapter_destroy(&plain);
    setup_release(&s);
}

/* Trained whole, saved as Q4_0 and read again: the loss is what was said, and less than that of a
 * model that did not know. */
static void test_quantized_file(void **state)
{
    (void)state;
    char dir[] = "/tmp/shoal-network-XXXXXX", base[64], saved[64];
    sh_synth_options synth = {.type = SH_TYPE_F32, .seed = 5, .sigma = 0.3f};
    sh_train_options o = {.lr = 0.003f, .batch = 4, .steps = 40, .lr_final = 1, .clip = 1};
    sh_train_result result;
    sh_model *model = NULL;
    double rounded[2];
    assert_non_null(mkdtemp(dir));
    snprintf(base, sizeof(base), "%s/base.gguf", dir);
    snprintf(saved, sizeof(saved), "%s/saved.gguf", dir);
    must_be_ok(sh_synth_find("tiny-llama", &synth.shape, &err));
    must_be_ok(sh_synth_model(&synth, base, &err));
    must_be_ok(sh_model_open(base, &model, &err));
    sh_train_data data = small_data(&model->config, 8, 33, false, 6);
    for (size_t aware = 0; aware < 2; aware++) {
        sh_full *full = NULL;
        sh_model *file = NULL;
        double said = 0, plain = 0;
        must_be_ok(sh_full_from_model(model, &full, &err));
        o.quantize_aware = aware ? SH_TYPE_Q4_0 : SH_TYPE_F32;
        must_be_ok(sh_full_train(full, &data, &o, &result, &err));
        must_be_ok(sh_full_evaluate(full, &data, &(sh_train_limits){.quantize_aware = SH_TYPE_Q4_0},
                                    &said, &err));
        must_be_ok(sh_full_evaluate(full, &data, NULL, &plain, &err));
        must_be_ok(sh_full_save(full, SH_TYPE_Q4_0, saved, &err));
        must_be_ok(sh_model_open(saved, &file, &err));
        must_be_ok(sh_train_evaluate(file, NULL, &data, NULL, &rounded[aware], &err));
        must_be_near(said, rounded[aware], 1e-5);
        print_message("full, %s: %.4f, as Q4_0 %.4f\n", aware ? "aware" : "plain", plain,
                      rounded[aware]);
        sh_model_close(&file);
        sh_full_destroy(&full);
    }
    assert_true(rounded[1] < 0.3 * rounded[0]);
    small_data_free(&data);
    sh_model_close(&model);
    unlink(base);
    unlink(saved);
    rmdir(dir);
}

/* ---- refusals ---- */

static void must_refuse(const setup *s, const sh_train_options *o, const char *part)
{
    sh_train_result result;
    sh_adapter *before = small_adapter(&s->config, mixed, 4, 43);
    must_fail(sh_lora_train(s->model, s->adapter, &s->data, o, &result, &err), SH_ERR_INVALID);
    must_say(part);
    assert_true(same_adapter(before, s->adapter));
    sh_adapter_destroy(&before);
}

static void test_refusals(void **state)
{
    (void)state;
    setup s = setup_make(mixed, 4);
    static const float dropouts[] = {-0.1f, 1.0f, 7.0f, NAN};
    static const float alphas[] = {-1.0f, NAN, INFINITY};
    sh_train_options o = options_of(2);
    for (size_t i = 0; i < SH_COUNT(dropouts); i++) {
        o.dropout = dropouts[i];
        must_refuse(&s, &o, "dropout");
    }
    o = options_of(2);
    for (size_t i = 0; i < SH_COUNT(alphas); i++) {
        o.alphas[SH_FFN_GATE] = alphas[i];
        must_refuse(&s, &o, "ffn_gate");
    }
    o = options_of(2);
    o.quantize_aware = SH_TYPE_F16;
    must_refuse(&s, &o, "F16");
    o.quantize_aware = (sh_type)99;
    must_refuse(&s, &o, "unknown");
    o.quantize_aware = SH_TYPE_Q8_0;
    o.dropout = 0.1f;
    must_refuse(&s, &o, "dropout");
    o = options_of(2);
    o.rslora = true;
    s.adapter->alpha = -1;
    must_refuse(&s, &o, "above zero");
    setup_release(&s);
}

/* What is LoRA's is not passed over in silence. */
static void check_full_refuses(sh_full *full, const sh_train_data *data)
{
    sh_train_options of_lora[] = {{.dropout = 0.1f},
                                  {.rslora = true},
                                  {.alphas = {[SH_FFN_DOWN] = 3}},
                                  {.freeze = SH_FREEZE_A},
                                  {.alternate = 1}};
    sh_train_result result;
    for (size_t i = 0; i < SH_COUNT(of_lora); i++) {
        of_lora[i].lr = 0.1f;
        of_lora[i].batch = of_lora[i].steps = 1;
        must_fail(sh_full_train(full, data, &of_lora[i], &result, &err), SH_ERR_INVALID);
        must_say("of LoRA");
    }
}

/* Rows of 12 are no whole blocks. */
static void test_refused_models(void **state)
{
    (void)state;
    const sh_model_config config = small_config(true);
    sh_model *model = small_model(&config, SH_TYPE_F32, 1);
    sh_train_data data = small_data(&config, 2, 9, false, 2);
    sh_adapter *adapter = small_adapter(&config, rank_4, 1, 3);
    const sh_train_limits limits = {.quantize_aware = SH_TYPE_Q4_0};
    sh_train_options o = options_of(1);
    sh_train_result result;
    sh_full *full = NULL;
    double nll = 0;
    o.quantize_aware = SH_TYPE_Q4_0;
    must_be_ok(sh_full_from_model(model, &full, &err));
    must_fail(sh_lora_train(model, adapter, &data, &o, &result, &err), SH_ERR_INVALID);
    must_say("token_embd.weight: rows of 12 values do not fit Q4_0");
    must_fail(sh_train_evaluate(model, NULL, &data, &limits, &nll, &err), SH_ERR_INVALID);
    must_fail(sh_full_train(full, &data, &o, &result, &err), SH_ERR_INVALID);
    must_say("rows of 12");
    must_fail(sh_full_evaluate(full, &data, &limits, &nll, &err), SH_ERR_INVALID);
    check_full_refuses(full, &data);
    sh_full_destroy(&full);
    sh_adapter_destroy(&adapter);
    small_data_free(&data);
    small_model_free(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_scales),
        cmocka_unit_test(test_frozen_scales),
        cmocka_unit_test(test_masks),
        cmocka_unit_test(test_dropout_plans),
        cmocka_unit_test(test_dropout_training),
        cmocka_unit_test(test_quantized_loss),
        cmocka_unit_test(test_quantized_lora_gradient),
        cmocka_unit_test(test_quantized_full_gradient),
        cmocka_unit_test(test_quantized_plans),
        cmocka_unit_test(test_quantized_lora_training),
        cmocka_unit_test(test_quantized_file),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_refused_models),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
