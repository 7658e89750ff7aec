/*
 * Passes over several contexts, by several threads: the same bits as each context alone, whatever
 * runs beside it, however calls are cut, with the weights packed or not.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/model/context_internal.h"
#include "tests/model/util.h"

enum { N = 40, CONTEXTS = 7, THREADS = 3 };

static void random_tokens(uint64_t seed, uint32_t vocab, int32_t *tokens, uint32_t n)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 2);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)sh_rng_below(&rng, vocab);
}

static float *floats(size_t n)
{
    float *p = calloc(n, sizeof *p);
    assert_non_null(p);
    return p;
}

static sh_runner *new_runner(const sh_model *model, uint32_t rows_max, sh_team *team)
{
    sh_runner *runner = NULL;
    const sh_runner_options options = {.rows_max = rows_max, .team = team};
    CHECK_OK(sh_runner_create(model, &options, &runner, err));
    return runner;
}

static sh_context *new_context(const sh_model *model, sh_runner *runner, sh_kv_type kv)
{
    sh_context *context = NULL;
    const sh_context_options options = {
        .n_tokens_max = model->config.context, .runner = runner, .kv = kv};
    CHECK_OK(sh_context_create(model, &options, &context, err));
    return context;
}

/* A fleet of contexts with texts and adapters of their own, and what each of them says when it is
 * run alone, a token a call, by one thread. */
typedef struct {
    sh_model *model;
    sh_adapter *adapter;
    sh_kv_type kv;
    bool adapted[CONTEXTS];
    int32_t tokens[CONTEXTS][N];
    float *logits[CONTEXTS], *hidden[CONTEXTS];
} fleet;

static void adapt(const fleet *f, sh_context *context, uint32_t i)
{
    const sh_adapter *set[] = {f->adapter};
    const float scale = 0.5f + (float)i;
    if (f->adapted[i])
        CHECK_OK(sh_context_set_adapters(context, set, &scale, 1, err));
}

static void fleet_open_of(fleet *f, sh_type type, sh_kv_type kv, bool untied)
{
    tiny_options o = tiny_defaults(31);
    o.type = type;
    o.untied = untied; /* then the output matrix is adapted, too */
    f->model = util_open(&o);
    f->kv = kv;
    f->adapter = util_adapter(f->model, 5, 3, 0.05f);
    const size_t vocab = f->model->config.vocab, width = f->model->config.width;
    for (uint32_t i = 0; i < CONTEXTS; i++) {
        f->adapted[i] = i % 3 == 1;
        random_tokens(i, (uint32_t)vocab, f->tokens[i], N);
        f->logits[i] = floats(N * vocab);
        f->hidden[i] = floats(N * width);
        sh_runner *runner = new_runner(f->model, 8, NULL);
        sh_context *context = new_context(f->model, runner, kv);
        adapt(f, context, i);
        for (uint32_t t = 0; t < N; t++) {
            const sh_run_item item = {.context = context,
                                      .tokens = &f->tokens[i][t],
                                      .n = 1,
                                      .logits_wanted = SH_LOGITS_LAST,
                                      .logits = f->logits[i] + t * vocab,
                                      .hidden = f->hidden[i] + t * width};
            CHECK_OK(sh_runner_run(runner, &item, 1, err));
        }
        sh_context_destroy(&context);
        sh_runner_destroy(&runner);
    }
}

static void fleet_open(fleet *f, sh_type type, sh_kv_type kv)
{
    fleet_open_of(f, type, kv, false);
}

static void fleet_close(fleet *f)
{
    for (uint32_t i = 0; i < CONTEXTS; i++) {
        free(f->logits[i]);
        free(f->hidden[i]);
    }
    sh_adapter_destroy(&f->adapter);
    sh_model_close(&f->model);
}

static void check_bits(const char *what, uint32_t context, uint32_t token, const float *ours,
                       const float *expected, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&ours[i], &expected[i], sizeof *ours) != 0)
            fail_msg("%s %zu of token %u of context %u: %.9g, alone %.9g", what, i, token, context,
                     ours[i], expected[i]);
}

/* What one context gave in a call against what it gave alone. */
static void check_item(const fleet *f, uint32_t context, uint32_t from, const sh_run_item *item)
{
    const size_t vocab = f->model->config.vocab, width = f->model->config.width;
    for (uint32_t k = 0; k < item->n; k++) {
        const uint32_t t = from + k;
        const bool last = k + 1 == item->n;
        const float *logits = NULL;
        if (item->logits_wanted == SH_LOGITS_ALL)
            logits = item->logits + k * vocab;
        else if (item->logits_wanted == SH_LOGITS_LAST && last)
            logits = item->logits;
        if (logits != NULL)
            check_bits("logit", context, t, logits, f->logits[context] + t * vocab, vocab);
        if (item->hidden != NULL)
            check_bits("hidden value", context, t, item->hidden + k * width,
                       f->hidden[context] + t * width, width);
    }
}

/* Random cuts of all texts, everything wanted at random, until all are done. */
static void run_mixed(const fleet *f, uint32_t rows_max, unsigned threads, uint64_t seed)
{
    const size_t vocab = f->model->config.vocab, width = f->model->config.width;
    sh_team *team = NULL;
    if (threads > 1)
        CHECK_OK(sh_team_create(threads, &team, err));
    sh_runner *runner = new_runner(f->model, rows_max, team);
    sh_context *contexts[CONTEXTS];
    uint32_t done[CONTEXTS] = {0}, left = CONTEXTS;
    float *logits[CONTEXTS], *hidden[CONTEXTS];
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 3);
    for (uint32_t i = 0; i < CONTEXTS; i++) {
        contexts[i] = new_context(f->model, runner, f->kv);
        adapt(f, contexts[i], i);
        logits[i] = floats(N * vocab);
        hidden[i] = floats(N * width);
    }
    while (left > 0) {
        sh_run_item items[CONTEXTS];
        uint32_t which[CONTEXTS];
        size_t n = 0;
        for (uint32_t i = 0; i < CONTEXTS; i++) {
            if (done[i] == N || sh_rng_below(&rng, 3) == 0)
                continue;
            const uint32_t most = sh_rng_below(&rng, 2) == 0 ? 1 : N - done[i];
            which[n] = i;
            items[n++] = (sh_run_item){.context = contexts[i],
                                       .tokens = &f->tokens[i][done[i]],
                                       .n = 1 + (uint32_t)sh_rng_below(&rng, most),
                                       .logits_wanted = (int)sh_rng_below(&rng, 3),
                                       .logits = logits[i],
                                       .hidden = sh_rng_below(&rng, 2) == 0 ? hidden[i] : NULL};
        }
        CHECK_OK(sh_runner_run(runner, items, n, err));
        for (size_t k = 0; k < n; k++) {
            check_item(f, which[k], done[which[k]], &items[k]);
            done[which[k]] += items[k].n;
            assert_int_equal(sh_context_length(contexts[which[k]]), done[which[k]]);
            left -= done[which[k]] == N;
        }
    }
    for (uint32_t i = 0; i < CONTEXTS; i++) {
        sh_context_destroy(&contexts[i]);
        free(logits[i]);
        free(hidden[i]);
    }
    sh_runner_destroy(&runner);
    sh_team_destroy(&team);
}

static void check_type(sh_type type, sh_kv_type kv)
{
    static const uint32_t rows[] = {1, 5, 64, 0};
    fleet f;
    fleet_open_of(&f, type, kv, kv == SH_KV_F16);
    for (size_t i = 0; i < SH_COUNT(rows); i++)
        for (unsigned threads = 1; threads <= THREADS; threads++)
            run_mixed(&f, rows[i], threads, 10 * i + threads);
    fleet_close(&f);
}

static void test_company_does_not_matter(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        check_type(types[i], SH_KV_F32);
        check_type(types[i], SH_KV_F16);
    }
}

static void test_packing_does_not_matter(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        fleet f;
        bool cached = true;
        fleet_open_of(&f, types[i], SH_KV_F16, i == 0);
        CHECK_OK(sh_model_pack(f.model, &(sh_pack_options){0}, &cached, err));
        assert_false(cached);
        assert_non_null(f.model->layers[0].m[0].packed);
        for (unsigned threads = 1; threads <= 2; threads++)
            run_mixed(&f, 16, threads, threads);
        fleet_close(&f);
    }
}

/* A cache of halves says nearly the same as one of floats. */
static void test_cache_of_halves(void **state)
{
    (void)state;
    fleet a, b;
    fleet_open(&a, SH_TYPE_F32, SH_KV_F32);
    fleet_open(&b, SH_TYPE_F32, SH_KV_F16);
    const size_t n = (size_t)N * a.model->config.vocab;
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        const double d = a.logits[0][i] - b.logits[0][i];
        difference += d * d;
        size += (double)a.logits[0][i] * a.logits[0][i];
    }
    const double error = sqrt(difference / size); /* a half is good to 2^-11, 4.9e-4 */
    print_message("halves in the cache: relative error %.3g\n", error);
    assert_true(error > 0 && error < 1e-3);
    fleet_close(&a);
    fleet_close(&b);
}

/* A context that takes over another's beginning goes on as the one that ran it itself. */
static void test_prefix_is_copied(void **state)
{
    (void)state;
    for (int halves = 0; halves < 2; halves++) {
        fleet f;
        fleet_open(&f, SH_TYPE_Q8_0, halves ? SH_KV_F16 : SH_KV_F32);
        const size_t vocab = f.model->config.vocab;
        sh_runner *runner = new_runner(f.model, 8, NULL);
        sh_context *from = new_context(f.model, runner, f.kv);
        sh_context *to = new_context(f.model, runner, f.kv);
        float *logits = floats(N * vocab);
        CHECK_OK(sh_context_decode(from, f.tokens[0], N, SH_LOGITS_NONE, NULL, err));
        CHECK_OK(sh_context_decode(to, f.tokens[2], 3, SH_LOGITS_NONE, NULL, err));
        for (uint32_t n = 0; n < N; n += 5) {
            CHECK_OK(sh_context_copy_prefix(to, from, n, err));
            assert_int_equal(sh_context_length(to), n);
            const sh_run_item item = {.context = to,
                                      .tokens = f.tokens[0] + n,
                                      .n = N - n,
                                      .logits_wanted = SH_LOGITS_ALL,
                                      .logits = logits};
            CHECK_OK(sh_runner_run(runner, &item, 1, err));
            check_item(&f, 0, n, &item);
        }
        sh_error err = {0};
        assert_int_equal(sh_context_copy_prefix(to, from, N + 1, &err), SH_ERR_LIMIT);
        adapt(&f, to, 1); /* what was computed with an adapter is another text's */
        assert_int_equal(sh_context_copy_prefix(to, from, 1, &err), SH_ERR_MISMATCH);
        assert_int_equal(sh_context_copy_prefix(from, to, 0, &err), SH_ERR_MISMATCH);
        free(logits);
        sh_context_destroy(&from);
        sh_context_destroy(&to);
        sh_runner_destroy(&runner);
        fleet_close(&f);
    }
}

/* Logits of chosen tokens are those that all of them would give, one row after another. */
static void test_some_logits(void **state)
{
    (void)state;
    fleet f;
    fleet_open(&f, SH_TYPE_Q8_0, SH_KV_F32);
    const size_t vocab = f.model->config.vocab;
    sh_runner *runner = new_runner(f.model, 8, NULL);
    sh_context *context = new_context(f.model, runner, f.kv);
    float *logits = floats(N * vocab), *row = logits;
    bool wants[N];
    for (uint32_t t = 0; t < N; t++)
        wants[t] = t % 3 == 1 || t == 6;
    const sh_run_item item = {.context = context,
                              .tokens = f.tokens[0],
                              .n = N,
                              .logits_wanted = SH_LOGITS_SOME,
                              .logits = logits,
                              .wants = wants};
    CHECK_OK(sh_runner_run(runner, &item, 1, err));
    for (uint32_t t = 0; t < N; t++) {
        if (!wants[t])
            continue;
        check_bits("logit", 0, t, row, f.logits[0] + t * vocab, vocab);
        row += vocab;
    }
    free(logits);
    sh_context_destroy(&context);
    sh_runner_destroy(&runner);
    fleet_close(&f);
}

/* An error in any item, and nothing of the call is done. */
static void test_errors_leave_nothing(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(3);
    sh_model *model = util_open(&o);
    sh_runner *runner = new_runner(model, 4, NULL);
    sh_context *a = new_context(model, runner, SH_KV_F32), *b = new_context(model, runner, 0);
    int32_t tokens[64] = {1, 2, 3}, wrong[2] = {1, -1};
    sh_run_item items[2] = {{.context = a, .tokens = tokens, .n = 3},
                            {.context = b, .tokens = wrong, .n = 2}};
    sh_error failure = {0};
    assert_int_equal(sh_runner_run(runner, items, 2, &failure), SH_ERR_INVALID);
    items[1] = (sh_run_item){.context = b, .tokens = tokens, .n = 65};
    assert_int_equal(sh_runner_run(runner, items, 2, &failure), SH_ERR_LIMIT);
    items[1].n = 0;
    assert_int_equal(sh_runner_run(runner, items, 2, &failure), SH_ERR_INVALID);
    assert_int_equal(sh_context_length(a), 0);
    assert_int_equal(sh_context_length(b), 0);
    CHECK_OK(sh_runner_run(runner, items, 0, err)); /* nothing to do is no error */
    CHECK_OK(sh_runner_run(runner, items, 1, err));
    assert_int_equal(sh_context_length(a), 3);
    sh_context_destroy(&a);
    sh_context_destroy(&b);
    sh_runner_destroy(&runner);
    sh_runner *none = NULL;
    const sh_runner_options too_many = {.rows_max = SH_PASS_ROWS_MAX + 1};
    assert_int_equal(sh_runner_create(model, &too_many, &none, &failure), SH_ERR_LIMIT);
    assert_null(none);
    sh_model_close(&model);
}

/* Scales multiply, also those that halves could not hold; and a context of one runner may be run by
 * another that has no room for adapters yet. */
static void test_scales(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(4);
    o.type = SH_TYPE_Q8_0;
    sh_model *model = util_open(&o);
    const size_t vocab = model->config.vocab;
    sh_adapter *adapter = util_adapter(model, 4, 3, 0.05f);
    sh_adapter *scaled = util_adapter(model, 4, 3, 0.05f);
    const float factor = 1.0f / (1 << 24);
    for (size_t i = 0; i < (size_t)scaled->n_layers * SH_LAYER_MATRICES; i++)
        for (size_t k = 0; k < (size_t)scaled->pairs[i].rank * scaled->pairs[i].out; k++)
            scaled->pairs[i].b[k] *= factor;
    const float back = 1 / factor;
    int32_t tokens[N];
    random_tokens(1, (uint32_t)vocab, tokens, N);
    float *expected = floats(vocab), *ours = floats(vocab), *without = floats(vocab);
    sh_runner *first = new_runner(model, 8, NULL), *second = new_runner(model, 3, NULL);
    sh_context *context = new_context(model, first, SH_KV_F32);
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_LAST, without, err));
    const sh_adapter *set[] = {adapter};
    CHECK_OK(sh_context_set_adapters(context, set, NULL, 1, err));
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_LAST, expected, err));
    assert_memory_not_equal(expected, without, vocab * sizeof *ours);
    set[0] = scaled;
    CHECK_OK(sh_context_set_adapters(context, set, &back, 1, err));
    const sh_run_item item = {.context = context,
                              .tokens = tokens,
                              .n = N,
                              .logits_wanted = SH_LOGITS_LAST,
                              .logits = ours};
    CHECK_OK(sh_runner_run(second, &item, 1, err));
    assert_memory_equal(ours, expected, vocab * sizeof *ours); /* powers of two are exact */
    const float zero = 0;
    CHECK_OK(sh_context_set_adapters(context, set, &zero, 1, err));
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_LAST, ours, err));
    assert_memory_equal(ours, without, vocab * sizeof *ours);
    sh_context_destroy(&context);
    sh_runner_destroy(&first);
    sh_runner_destroy(&second);
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&scaled);
    free(expected);
    free(ours);
    free(without);
    sh_model_close(&model);
}

/* Pages of the process that are in memory. */
static size_t resident_bytes(void)
{
    size_t pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*u %zu", &pages), 1);
    fclose(file);
    return pages * (size_t)sysconf(_SC_PAGESIZE);
}

/* What a context does not use is not in memory; what no machine has is refused. */
static void test_memory(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(4);
    o.context = SH_CONTEXT_MAX;
    o.width = 512;
    o.layers = 4;
    sh_model *model = util_open(&o);
    sh_runner *runner = new_runner(model, 8, NULL);
    sh_context_options options = {.n_tokens_max = SH_CONTEXT_MAX, .runner = runner};
    const size_t bytes = sh_context_bytes(model, &options);
    options.kv = SH_KV_F16;
    assert_true(sh_context_bytes(model, &options) < bytes * 6 / 10);
    const size_t before = resident_bytes();
    sh_context *context = new_context(model, runner, SH_KV_F32);
    const int32_t tokens[] = {1, 2, 3};
    CHECK_OK(sh_context_decode(context, tokens, 3, SH_LOGITS_NONE, NULL, err));
    const size_t grown = resident_bytes() - before;
    print_message("context of %zu MiB: %zu KiB in memory\n", bytes >> 20, grown >> 10);
    assert_true(bytes > 256u << 20);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    assert_true(grown < 16u << 20);
#endif
    sh_context_destroy(&context);
    sh_error failure = {0};
    sh_context *none = NULL;
    model->config.n_layers = 1u << 20; /* of which only the size is asked */
    assert_int_equal(sh_context_create(model, &options, &none, &failure), SH_ERR_NO_MEMORY);
    assert_non_null(strstr(failure.text, "ask for a shorter one"));
    model->config.n_layers = o.layers;
    assert_null(none);
    sh_runner_destroy(&runner);
    sh_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_company_does_not_matter),
        cmocka_unit_test(test_packing_does_not_matter),
        cmocka_unit_test(test_cache_of_halves),
        cmocka_unit_test(test_prefix_is_copied),
        cmocka_unit_test(test_some_logits),
        cmocka_unit_test(test_errors_leave_nothing),
        cmocka_unit_test(test_scales),
        cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
