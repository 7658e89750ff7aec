/*
 * The forward pass: against the naive one, however the tokens are split, with and without adapters,
 * at its limits; and the losses that are built on it.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/model/naive.h"
#include "tests/model/util.h"

#define N 40 /* tokens of a test sequence: over a batch of 16, under the context of 64 */

static void random_tokens(uint64_t seed, uint32_t vocab, int32_t *tokens, uint32_t n)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 2);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)sh_rng_below(&rng, vocab);
}

static sh_context *open_context(const sh_model *model, uint32_t batch_max)
{
    sh_context *context = NULL;
    const sh_context_options options = {.n_tokens_max = model->config.context,
                                        .batch_max = batch_max};
    CHECK_OK(sh_context_create(model, &options, &context, err));
    return context;
}

static float *new_logits(const sh_model *model, uint32_t n)
{
    float *logits = calloc((size_t)n * model->config.vocab, sizeof *logits);
    assert_non_null(logits);
    return logits;
}

/* Set in the model that was opened: what qwen2, qwen3 and scaled rotations have. */
typedef enum { SOME_BIAS = 1, SOME_NORMS = 2, SOME_HALVES = 4, SOME_SCALING = 8 } extras;

static float *random_floats(sh_rng *rng, uint32_t n, float mean)
{
    float *values = calloc(n, sizeof *values);
    assert_non_null(values);
    for (uint32_t i = 0; i < n; i++)
        values[i] = mean + 0.3f * sh_rng_normal(rng);
    return values;
}

static void add_extras(sh_model *model, unsigned with)
{
    sh_model_config *c = &model->config;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 5);
    c->rope_halves = (with & SOME_HALVES) != 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        sh_layer *layer = &model->layers[l];
        for (uint32_t m = SH_ATTN_Q; m <= SH_ATTN_V && (with & SOME_BIAS) != 0; m++)
            layer->bias[m] = random_floats(&rng, layer->m[m].out, 0);
        if ((with & SOME_NORMS) != 0) {
            layer->q_norm = random_floats(&rng, c->head_size, 1);
            layer->k_norm = random_floats(&rng, c->head_size, 1);
        }
    }
    if ((with & SOME_SCALING) != 0) {
        c->rope_scaling = SH_ROPE_YARN;
        model->rope_magnitude = 1.1f;
        for (uint32_t j = 0; j < c->head_size / 2; j++)
            model->rope_frequency[j] *= 1.0 / (1 + j % 4);
    }
}

static void remove_extras(sh_model *model)
{
    for (uint32_t l = 0; l < model->config.n_layers; l++) {
        sh_layer *layer = &model->layers[l];
        for (uint32_t m = SH_ATTN_Q; m <= SH_ATTN_V; m++)
            free((float *)layer->bias[m]);
        free((float *)layer->q_norm);
        free((float *)layer->k_norm);
    }
}

/* Root mean square difference over root mean square of the reference. */
static double relative_error(const float *ours, const double *reference, size_t n)
{
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += (ours[i] - reference[i]) * (ours[i] - reference[i]);
        size += reference[i] * reference[i];
    }
    return sqrt(difference / size);
}

/* Float rounding over two layers gives some 1e-6. Quantized types round the activations to 1/254 of
 * a block's largest value at each product: below 1 % each, some 2 % over the nine in a row. */
static void check_model(const tiny_options *o, unsigned with, uint32_t rank, double limit)
{
    sh_model *model = util_open(o);
    add_extras(model, with);
    sh_context *context = open_context(model, 16);
    sh_adapter *adapter = NULL;
    int32_t tokens[N];
    float *ours = new_logits(model, N);
    double *reference = calloc((size_t)N * model->config.vocab, sizeof *reference);
    assert_non_null(reference);
    random_tokens(o->seed, model->config.vocab, tokens, N);
    if (rank > 0) {
        adapter = util_adapter(model, rank, o->seed, 0.05f);
        const sh_adapter *one = adapter;
        CHECK_OK(sh_context_set_adapters(context, &one, NULL, 1, err));
    }
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, ours, err));
    naive_forward(model, adapter, tokens, N, reference);
    const double error = relative_error(ours, reference, (size_t)N * model->config.vocab);
    print_message("type %u, %u heads, rank %u: relative error %.3g (limit %.3g)\n",
                  (unsigned)o->type, o->heads, rank, error, limit);
    if (!(error <= limit))
        fail_msg("relative error %.3g is over %.3g", error, limit);
    sh_adapter_destroy(&adapter);
    sh_context_destroy(&context);
    remove_extras(model);
    sh_model_close(&model);
    free(ours);
    free(reference);
}

static void check_against_naive(const tiny_options *o, uint32_t rank, double limit)
{
    check_model(o, 0, rank, limit);
}

static void test_other_architectures(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(12);
    for (unsigned with = 1; with < 16; with++)
        check_model(&o, with, with % 3, 2e-6);
}

static void test_equals_naive_forward(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(11);
    check_against_naive(&o, 0, 2e-6);
    check_against_naive(&o, 4, 2e-6);
    check_against_naive(&o, 5, 2e-6);
    o.untied = true;
    o.heads = 8; /* head size 8, less than the lanes */
    o.kv_heads = 8;
    o.ffn = 100; /* no multiple of the lanes */
    check_against_naive(&o, 3, 2e-6);
    o.heads = 1; /* one head of 64 */
    o.kv_heads = 1;
    check_against_naive(&o, 0, 2e-6);
    o.heads = 2;
    o.width = 160; /* head size 80: one block of four lanes and one of one */
    check_against_naive(&o, 2, 2e-6);
}

static void test_types_equal_naive_forward(void **state)
{
    (void)state;
    static const struct {
        sh_type type;
        double limit;
    } cases[] = {
        {SH_TYPE_F16, 2e-6}, {SH_TYPE_BF16, 2e-6}, {SH_TYPE_Q8_0, 0.03}, {SH_TYPE_Q4_0, 0.03}};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        tiny_options o = tiny_defaults(20 + i);
        o.type = cases[i].type;
        check_against_naive(&o, 0, cases[i].limit);
        check_against_naive(&o, 4, SH_MAX(cases[i].limit, 5e-4)); /* factors are halves: 2^-11 */
        o.untied = true;
        check_against_naive(&o, 4, SH_MAX(cases[i].limit, 5e-4));
    }
}

/* The same logits, bit for bit, for every split of the tokens and every batch size. */
static void check_splits(sh_type type, uint32_t rank)
{
    static const uint32_t batches[] = {0, 1, 3, 16, 64};
    tiny_options o = tiny_defaults(31);
    o.type = type;
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    int32_t tokens[N];
    random_tokens(7, (uint32_t)vocab, tokens, N);
    sh_adapter *adapter = util_adapter(model, SH_MAX(rank, 1), 3, 0.05f);
    const sh_adapter *one = adapter;
    float *whole = new_logits(model, N), *split = new_logits(model, N);
    for (size_t b = 0; b < SH_COUNT(batches); b++) {
        sh_context *context = open_context(model, batches[b]);
        if (rank > 0)
            CHECK_OK(sh_context_set_adapters(context, &one, NULL, 1, err));
        sh_rng rng;
        sh_rng_init(&rng, b, 0, 3);
        for (uint32_t done = 0; done < N;) {
            const uint32_t n =
                b == 0 ? N
                       : 1 + (uint32_t)sh_rng_below(&rng, SH_MIN(N - done, 1 + 5 * (uint32_t)b));
            CHECK_OK(sh_context_decode(context, tokens + done, n, SH_LOGITS_ALL,
                                       (b == 0 ? whole : split) + done * vocab, err));
            done += n;
        }
        if (b > 0 && memcmp(whole, split, N * vocab * sizeof *whole) != 0)
            fail_msg("type %u, rank %u: batches of %u give other bits", (unsigned)type, rank,
                     batches[b]);
        sh_context_destroy(&context);
    }
    free(whole);
    free(split);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

static void test_splits_do_not_matter(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16, SH_TYPE_Q8_0,
                                    SH_TYPE_Q4_0};
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        check_splits(types[i], 0);
        check_splits(types[i], 4);
    }
}

static void test_last_and_none(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(5);
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    int32_t tokens[N];
    random_tokens(1, (uint32_t)vocab, tokens, N);
    float *all = new_logits(model, N), *last = new_logits(model, 1);
    sh_context *context = open_context(model, 16);
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, all, err));
    sh_context_truncate(context, 0);
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_LAST, last, err));
    assert_memory_equal(last, all + (N - 1) * vocab, vocab * sizeof *last);
    sh_context_truncate(context, 0);
    CHECK_OK(sh_context_decode(context, tokens, N - 1, SH_LOGITS_NONE, NULL, err));
    memset(last, 0, vocab * sizeof *last);
    CHECK_OK(sh_context_decode(context, tokens + N - 1, 1, SH_LOGITS_LAST, last, err));
    assert_memory_equal(last, all + (N - 1) * vocab, vocab * sizeof *last);
    assert_int_equal(sh_context_length(context), N);
    free(all);
    free(last);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

static void test_truncate_forgets(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(6);
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    int32_t tokens[N], other[N];
    random_tokens(1, (uint32_t)vocab, tokens, N);
    random_tokens(2, (uint32_t)vocab, other, N);
    float *expected = new_logits(model, 1), *ours = new_logits(model, 1);
    sh_context *context = open_context(model, 0);
    CHECK_OK(sh_context_decode(context, tokens, 20, SH_LOGITS_LAST, expected, err));
    CHECK_OK(sh_context_decode(context, other, 20, SH_LOGITS_NONE, NULL, err));
    sh_context_truncate(context, 10);
    assert_int_equal(sh_context_length(context), 10);
    sh_context_truncate(context, 30); /* nothing to forget */
    assert_int_equal(sh_context_length(context), 10);
    CHECK_OK(sh_context_decode(context, tokens + 10, 10, SH_LOGITS_LAST, ours, err));
    assert_memory_equal(ours, expected, vocab * sizeof *ours);
    free(expected);
    free(ours);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

static void decode_last(sh_context *context, const int32_t *tokens, float *logits)
{
    sh_context_truncate(context, 0);
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_LAST, logits, err));
}

static void test_adapters_come_and_go(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(8);
    o.type = SH_TYPE_Q8_0;
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab, bytes = vocab * sizeof(float);
    int32_t tokens[N];
    random_tokens(1, (uint32_t)vocab, tokens, N);
    sh_adapter *a = util_adapter(model, 4, 1, 0.05f), *b = util_adapter(model, 2, 2, 0.05f);
    sh_adapter *zero = util_adapter(model, 4, 3, 0);
    const sh_adapter *set_a[] = {a}, *set_ab[] = {a, b}, *set_zero[] = {zero};
    float *base = new_logits(model, 1), *with_a = new_logits(model, 1), *x = new_logits(model, 1);
    sh_context *context = open_context(model, 0);
    decode_last(context, tokens, base);
    CHECK_OK(sh_context_set_adapters(context, NULL, NULL, 0, err));
    assert_int_equal(sh_context_length(context), N); /* none before and after: the cache stays */
    CHECK_OK(sh_context_set_adapters(context, set_a, NULL, 1, err));
    assert_int_equal(sh_context_length(context), 0);
    decode_last(context, tokens, with_a);
    assert_memory_not_equal(with_a, base, bytes);
    CHECK_OK(sh_context_set_adapters(context, set_ab, NULL, 2, err));
    decode_last(context, tokens, x);
    assert_memory_not_equal(x, base, bytes);
    assert_memory_not_equal(x, with_a, bytes);
    CHECK_OK(sh_context_set_adapters(context, set_a, NULL, 1, err));
    decode_last(context, tokens, x);
    assert_memory_equal(x, with_a, bytes);
    /* Values changed in place count from the next set on. */
    memset(a->pairs[0].b, 0, (size_t)a->pairs[0].rank * a->pairs[0].out * sizeof(float));
    CHECK_OK(sh_context_set_adapters(context, set_a, NULL, 1, err));
    decode_last(context, tokens, x);
    assert_memory_not_equal(x, with_a, bytes);
    CHECK_OK(sh_context_set_adapters(context, set_zero, NULL, 1, err));
    decode_last(context, tokens, x);
    assert_memory_equal(x, base, bytes);
    CHECK_OK(sh_context_set_adapters(context, NULL, NULL, 0, err));
    assert_int_equal(sh_context_length(context), 0);
    decode_last(context, tokens, x);
    assert_memory_equal(x, base, bytes);
    sh_adapter_destroy(&a);
    sh_adapter_destroy(&b);
    sh_adapter_destroy(&zero);
    free(base);
    free(with_a);
    free(x);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

/* The last of four adapters leaves one matrix alone. */
static void test_four_adapters_add_up(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(9);
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    int32_t tokens[N];
    random_tokens(4, (uint32_t)vocab, tokens, N);
    /* One adapter of rank 4 is the sum of four of rank 1 (alpha / rank is the same). */
    sh_adapter *sum = util_adapter(model, 4, 5, 0.05f), *parts[SH_ADAPTERS_MAX + 1];
    sh_lora_pair *none = &sum->pairs[SH_FFN_UP];
    memset(none->b, 0, (size_t)none->rank * none->out * sizeof *none->b);
    for (uint32_t r = 0; r < SH_ADAPTERS_MAX; r++) {
        parts[r] = util_adapter(model, 1, 6, 0);
        for (size_t i = 0; i < (size_t)sum->n_layers * SH_LAYER_MATRICES; i++) {
            const sh_lora_pair *from = &sum->pairs[i];
            sh_lora_pair *to = &parts[r]->pairs[i];
            memcpy(to->a, from->a + (size_t)r * from->in, from->in * sizeof *to->a);
            for (uint32_t k = 0; k < from->out; k++)
                to->b[k] = from->b[(size_t)k * from->rank + r];
        }
    }
    parts[SH_ADAPTERS_MAX] = parts[0];
    float *one = new_logits(model, 1), *four = new_logits(model, 1);
    sh_context *context = open_context(model, 0);
    const sh_adapter *set[] = {sum};
    CHECK_OK(sh_context_set_adapters(context, set, NULL, 1, err));
    decode_last(context, tokens, one);
    CHECK_OK(sh_context_set_adapters(context, (const sh_adapter *const *)parts, NULL,
                                     SH_ADAPTERS_MAX, err));
    decode_last(context, tokens, four);
    for (size_t i = 0; i < vocab; i++)
        if (!(fabsf(one[i] - four[i]) <= 1e-3f))
            fail_msg("logit %zu: one adapter %.9g, four %.9g", i, one[i], four[i]);
    sh_error failure = {0};
    assert_int_equal(sh_context_set_adapters(context, (const sh_adapter *const *)parts, NULL,
                                             SH_ADAPTERS_MAX + 1, &failure),
                     SH_ERR_LIMIT);
    for (uint32_t r = 0; r < SH_ADAPTERS_MAX; r++)
        sh_adapter_destroy(&parts[r]);
    sh_adapter_destroy(&sum);
    free(one);
    free(four);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

/* An adapter of the output matrix alone gives the logits of the matrix W + s B A. */
static void test_output_adapter_equals_folding(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(13);
    o.untied = true;
    sh_model *model = util_open(&o);
    const sh_model_config *c = &model->config;
    const size_t n = (size_t)c->vocab * c->width;
    sh_adapter *adapter = NULL;
    sh_rng rng;
    sh_rng_init(&rng, 4, 0, 1);
    CHECK_OK(sh_adapter_create_empty(c, 6, &adapter, err));
    CHECK_OK(sh_adapter_add_output(adapter, c, 3, err));
    const sh_lora_pair *p = &adapter->pairs[sh_lora_output_pair(c->n_layers)];
    for (size_t i = 0; i < 3 * (size_t)p->in; i++)
        p->a[i] = sh_rng_normal(&rng) / 8;
    for (size_t i = 0; i < 3 * (size_t)p->out; i++)
        p->b[i] = sh_rng_normal(&rng) / 8;
    int32_t tokens[N];
    random_tokens(5, c->vocab, tokens, N);
    float *base = new_logits(model, N), *ours = new_logits(model, N),
          *folded = new_logits(model, N);
    sh_context *context = open_context(model, 16);
    const sh_adapter *set[] = {adapter};
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, base, err));
    CHECK_OK(sh_context_set_adapters(context, set, NULL, 1, err));
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, ours, err));

    const void *kept = model->output.data;
    float *w = calloc(n, sizeof *w);
    assert_non_null(w);
    memcpy(w, kept, n * sizeof *w); /* F32 */
    for (size_t i = 0; i < n; i++)
        for (size_t r = 0; r < 3; r++)
            w[i] += 2.0f * p->b[i / p->in * 3 + r] * p->a[r * p->in + i % p->in];
    model->output.data = w;
    CHECK_OK(sh_context_set_adapters(context, NULL, NULL, 0, err));
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, folded, err));
    for (size_t i = 0; i < (size_t)N * c->vocab; i++)
        if (!(fabsf(ours[i] - folded[i]) <= 1e-4f))
            fail_msg("logit %zu: %.9g, folded %.9g, without %.9g", i, ours[i], folded[i], base[i]);
    assert_memory_not_equal(ours, base, (size_t)N * c->vocab * sizeof *ours);
    model->output.data = kept;

    /* The same adapter is none of a model whose output is tied. */
    sh_error failure = {0};
    model->config.tied_output = true;
    assert_int_equal(sh_context_set_adapters(context, set, NULL, 1, &failure), SH_ERR_MISMATCH);
    assert_non_null(strstr(failure.text, "output.weight"));
    free(w);
    free(base);
    free(ours);
    free(folded);
    sh_adapter_destroy(&adapter);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

static void test_limits(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(6);
    tiny_options other_shape = o;
    other_shape.ffn = 64;
    sh_model *model = util_open(&o), *other = util_open(&other_shape);
    sh_error failure = {0};
    int32_t tokens[65] = {0};
    sh_context *context = open_context(model, 0);
    assert_int_equal(sh_context_decode(context, tokens, 0, SH_LOGITS_NONE, NULL, &failure),
                     SH_ERR_INVALID);
    assert_int_equal(sh_context_decode(context, tokens, 65, SH_LOGITS_NONE, NULL, &failure),
                     SH_ERR_LIMIT);
    tokens[3] = (int32_t)model->config.vocab;
    assert_int_equal(sh_context_decode(context, tokens, 8, SH_LOGITS_NONE, NULL, &failure),
                     SH_ERR_INVALID);
    tokens[3] = -1;
    assert_int_equal(sh_context_decode(context, tokens, 8, SH_LOGITS_NONE, NULL, &failure),
                     SH_ERR_INVALID);
    assert_int_equal(sh_context_length(context), 0); /* a failed call leaves nothing */
    tokens[3] = 0;
    CHECK_OK(sh_context_decode(context, tokens, 64, SH_LOGITS_NONE, NULL, err));
    assert_int_equal(sh_context_decode(context, tokens, 1, SH_LOGITS_NONE, NULL, &failure),
                     SH_ERR_LIMIT);
    sh_adapter *wrong = util_adapter(other, 2, 1, 0.1f);
    const sh_adapter *one = wrong;
    assert_int_equal(sh_context_set_adapters(context, &one, NULL, 1, &failure), SH_ERR_MISMATCH);
    assert_non_null(strstr(failure.text, "ffn_gate"));
    assert_int_equal(sh_context_length(context), 64); /* nothing changed */
    sh_context *no = NULL;
    const sh_context_options too_long = {.n_tokens_max = 65}, empty = {.n_tokens_max = 0};
    assert_int_equal(sh_context_create(model, &too_long, &no, &failure), SH_ERR_LIMIT);
    assert_int_equal(sh_context_create(model, &empty, &no, &failure), SH_ERR_LIMIT);
    assert_null(no);
    sh_adapter_destroy(&wrong);
    sh_context_destroy(&context);
    sh_model_close(&model);
    sh_model_close(&other);
}

/* Refused before anything is reserved: the kernel would grant it and kill us later. */
static void test_a_context_longer_than_memory(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(5);
    sh_model *model = util_open(&o);
    const sh_model_config kept = model->config;
    const sh_context_options options = {.n_tokens_max = SH_CONTEXT_MAX};
    sh_context *context = NULL;
    sh_error err = {0};
    model->config.n_layers = SH_MODEL_LAYERS_MAX; /* 8 TiB of cache */
    model->config.head_size = 65536;
    model->config.context = SH_CONTEXT_MAX;
    assert_true(sh_context_bytes(model, &options) >> 43 != 0);
    assert_int_equal(sh_context_create(model, &options, &context, &err), SH_ERR_NO_MEMORY);
    assert_null(context);
    assert_non_null(strstr(err.text, "ask for a shorter one"));
    model->config = kept;
    sh_model_close(&model);
}

static void test_nll_is_accurate(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 4);
    float logits[1000];
    for (uint32_t vocab = 1; vocab <= 1000; vocab += 37) {
        double top = -INFINITY, sum = 0;
        for (uint32_t i = 0; i < vocab; i++) {
            logits[i] = 12.0f * sh_rng_normal(&rng);
            top = fmax(top, logits[i]);
        }
        for (uint32_t i = 0; i < vocab; i++)
            sum += exp(logits[i] - top);
        const int32_t token = (int32_t)sh_rng_below(&rng, vocab);
        const double expected = top + log(sum) - logits[token];
        const double ours = sh_nll(logits, vocab, token);
        if (!(fabs(ours - expected) <= 1e-6 + 1e-7 * fabs(expected)))
            fail_msg("vocabulary of %u: %.12g, expected %.12g", vocab, ours, expected);
    }
    logits[7] = NAN;
    assert_true(isnan(sh_nll(logits, 100, 3)));
}

/* sh_model_loss against decoding the chunk at once; then for 1 to 4 workers, to the bit. */
static void test_loss(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(6);
    o.add_bos = true; /* the half protocol puts it first in each chunk */
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    enum { CHUNK = 24, TEXT = 5 * CHUNK + 7 };
    int32_t tokens[TEXT], chunk[CHUNK];
    random_tokens(3, (uint32_t)vocab, tokens, TEXT);
    sh_adapter *adapter = util_adapter(model, 2, 1, 0.05f);
    const sh_adapter *one = adapter;
    float *logits = new_logits(model, CHUNK);
    sh_context *context = open_context(model, 0);
    CHECK_OK(sh_context_set_adapters(context, &one, NULL, 1, err));
    for (int half = 0; half <= 1; half++) {
        double expected = 0;
        uint64_t scored = 0, used = 0;
        for (uint32_t at = 0; at + 1 < TEXT; at += CHUNK) {
            const uint32_t n = SH_MIN(CHUNK, TEXT - at);
            if (half && n < CHUNK)
                break;
            memcpy(chunk, tokens + at, n * sizeof *chunk);
            if (half)
                chunk[0] = 1;
            sh_context_truncate(context, 0);
            CHECK_OK(sh_context_decode(context, chunk, n, SH_LOGITS_ALL, logits, err));
            for (uint32_t i = half ? n / 2 : 0; i + 1 < n; i++, scored++)
                expected += sh_nll(logits + i * vocab, (uint32_t)vocab, chunk[i + 1]);
            used += n;
        }
        sh_loss loss;
        CHECK_OK(sh_model_loss(model, adapter, tokens, TEXT, CHUNK, half, &loss, err));
        assert_int_equal(loss.n_scored, scored);
        assert_int_equal(loss.n_tokens, used);
        if (!(fabs(loss.nll_sum - expected) <= 1e-9 * expected))
            fail_msg("half %d: %.15g, expected %.15g", half, loss.nll_sum, expected);
        for (unsigned threads = 1; threads <= 4; threads++) {
            sh_pool *pool = NULL;
            sh_loss shared;
            const sh_adapter *const halves[] = {adapter, adapter};
            const sh_loss_text text = {.tokens = tokens,
                                       .n_tokens = TEXT,
                                       .chunk = CHUNK,
                                       .half = half,
                                       .adapters = &one,
                                       .n_adapters = 1};
            sh_loss_text in_two = text;
            in_two.adapters = halves;
            in_two.scales = (const float[]){0.25f, 0.75f};
            in_two.n_adapters = 2;
            CHECK_OK(sh_pool_create(threads, &pool, err));
            CHECK_OK(sh_model_loss_pool(model, &text, pool, &shared, err));
            assert_memory_equal(&shared.nll_sum, &loss.nll_sum, sizeof loss.nll_sum);
            CHECK_OK(sh_model_loss_pool(model, &in_two, pool, &shared, err));
            if (!(fabs(shared.nll_sum - loss.nll_sum) <= 1e-4 * loss.nll_sum))
                fail_msg("two parts of an adapter: %.9g, whole: %.9g", shared.nll_sum,
                         loss.nll_sum);
            sh_pool_destroy(&pool);
        }
    }
    sh_error failure = {0};
    sh_loss loss;
    assert_int_equal(sh_model_loss(model, NULL, tokens, CHUNK - 1, CHUNK, true, &loss, &failure),
                     SH_ERR_INVALID);
    assert_int_equal(sh_model_loss(model, NULL, tokens, TEXT, 65, true, &loss, &failure),
                     SH_ERR_LIMIT);
    assert_int_equal(sh_model_loss(model, NULL, tokens, TEXT, 1, false, &loss, &failure),
                     SH_ERR_LIMIT);
    free(logits);
    sh_adapter_destroy(&adapter);
    sh_context_destroy(&context);
    sh_model_close(&model);
}

/* One round through everything that allocates; SH_OK or the first failure, with nothing leaked. */
static sh_status use_everything(const sh_model *model, const sh_adapter *adapter)
{
    static const int32_t tokens[16] = {1, 2, 3};
    sh_context *context = NULL;
    sh_loss loss;
    const sh_context_options options = {.n_tokens_max = 16};
    sh_status status = sh_context_create(model, &options, &context, NULL);
    if (status == SH_OK)
        status = sh_context_set_adapters(context, &adapter, NULL, 1, NULL);
    if (status == SH_OK)
        status = sh_context_set_adapters(context, &adapter, NULL, 1, NULL);
    sh_context_destroy(&context);
    if (status == SH_OK)
        status = sh_model_loss(model, adapter, tokens, 16, 8, true, &loss, NULL);
    return status;
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(6);
    sh_model *model = util_open(&o);
    sh_adapter *adapter = util_adapter(model, 2, 1, 0.05f);
    size_t n = 1;
    for (;; n++) {
        sh_alloc_fail_after(n);
        const sh_status status = use_everything(model, adapter);
        sh_alloc_fail_after(0);
        if (status == SH_OK)
            break;
        assert_int_equal(status, SH_ERR_NO_MEMORY);
    }
    assert_true(n > 10);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_output_adapter_equals_folding),
        cmocka_unit_test(test_equals_naive_forward),
        cmocka_unit_test(test_types_equal_naive_forward),
        cmocka_unit_test(test_other_architectures),
        cmocka_unit_test(test_splits_do_not_matter),
        cmocka_unit_test(test_last_and_none),
        cmocka_unit_test(test_truncate_forgets),
        cmocka_unit_test(test_adapters_come_and_go),
        cmocka_unit_test(test_four_adapters_add_up),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_a_context_longer_than_memory),
        cmocka_unit_test(test_nll_is_accurate),
        cmocka_unit_test(test_loss),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
