/* Requests that share passes, and what a request may ask for beside its text: choices,
 * log-probabilities, starts of other texts, embeddings; clients that leave. */
#include "tests/node/engine_rig.h"

/* ---- batching ---- */

enum { CROWD = 6 };

typedef struct {
    sh_engine *engine;
    sh_request request;
    sh_status status;
    char text[TEXT_MAX];
    float logprobs[40];
    uint32_t n;
} crowd_member;

static sh_status run_quietly(crowd_member *c)
{
    sh_error e = {0};
    sh_generation *g = NULL;
    bool too_long, done = false;
    sh_buf out;
    sh_buf_init(&out, TEXT_MAX - 1);
    sh_status status = sh_generation_begin(c->engine, &c->request, &g, &too_long, &e);
    while (status == SH_OK && !done)
        status = sh_generation_next(g, &out, &done, &e);
    c->n = status == SH_OK ? sh_generation_shown(g) : 0;
    for (uint32_t i = 0; i < c->n && i < 40; i++)
        c->logprobs[i] = sh_generation_get_token(g, i).logprob;
    memcpy(c->text, out.data, out.len);
    c->text[out.len] = 0;
    sh_generation_end(&g);
    sh_buf_release(&out);
    return status;
}

static void *run_in_crowd(void *arg)
{
    crowd_member *c = arg;
    c->status = run_quietly(c);
    return NULL;
}

/* The same bits, whoever shares the passes: texts that differ in their prompts, lengths and
 * samplings, all at once and one at a time, with one thread and with two. */
static void a_crowd_says_what_each_says_alone(void **state)
{
    (void)state;
    static const char *const prompts[CROWD] = {
        "the cat", "of in and is to the hand of a hen in the sand of the land and the",
        "x",       "it is in the hand of a cat that sat on the mat",
        "a hen",   "and the sand is in the hand"};
    seen s;
    crowd_member alone[CROWD], crowd[CROWD];
    for (uint32_t threads = 1; threads <= 2; threads++) {
        sh_engine *e = new_engine(&s, (sh_engine_options){.slots = CROWD, .threads = threads});
        uint64_t rows_alone = 0;
        for (unsigned round = 0; round < 2; round++) {
            crowd_member *all = round ? crowd : alone;
            pthread_t ids[CROWD];
            sh_engine_forget(e);
            for (unsigned i = 0; i < CROWD; i++) {
                all[i] = (crowd_member){.engine = e, .request = greedy(prompts[i], 8 + 3 * i)};
                all[i].request.temperature = i % 2 ? 1 : 0;
                all[i].request.seed = 5 + i;
                all[i].request.repeat_penalty = i == 3 ? 1.5f : 1;
                all[i].request.logprobs = true;
                all[i].request.top_logprobs = 2;
                if (round == 0)
                    run_in_crowd(&all[i]);
                else
                    assert_int_equal(pthread_create(&ids[i], NULL, run_in_crowd, &all[i]), 0);
            }
            for (unsigned i = 0; i < CROWD && round; i++)
                pthread_join(ids[i], NULL);
            if (round == 0)
                rows_alone = sh_engine_get_status(e).pass_rows;
        }
        for (unsigned i = 0; i < CROWD; i++) {
            assert_int_equal(alone[i].status, SH_OK);
            assert_int_equal(crowd[i].status, SH_OK);
            assert_string_equal(alone[i].text, crowd[i].text);
            assert_int_equal(alone[i].n, crowd[i].n);
            assert_memory_equal(alone[i].logprobs, crowd[i].logprobs, alone[i].n * sizeof(float));
        }
        assert_true(rows_alone > 0);
        assert_int_equal(sh_engine_get_status(e).pass_rows, 2 * rows_alone);
        sh_engine_destroy(&e);
    }
}

/* ---- choices, logprobs, starts of texts, embeddings, clients ---- */

static void choices_are_requests_with_the_next_seed(void **state)
{
    (void)state;
    seen s;
    char want[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    sh_request r = greedy("the cat sat", 12);
    r.temperature = 1;
    r.seed = 41;
    sh_generation *g = begin(e, &r);
    sh_generation_info info = {0};
    uint64_t id = 0;
    for (unsigned i = 0; i < 3; i++) {
        sh_buf out;
        bool done = false;
        sh_buf_init(&out, TEXT_MAX - 1);
        if (i > 0)
            OK(sh_generation_again(g, &err));
        while (!done)
            OK(sh_generation_next(g, &out, &done, &err));
        info = sh_generation_get_info(g);
        assert_true(info.id > id);
        id = info.id;
        assert_int_equal(info.version, 1);
        sh_request alone = r;
        alone.user = "another"; /* nothing is shared with it */
        alone.seed = r.seed + i;
        run(e, &alone, want);
        assert_int_equal(strlen(want), out.len);
        assert_memory_equal(out.data, want, out.len);
        sh_buf_release(&out);
    }
    unsigned before = s.calls;
    sh_generation_end(&g);
    assert_int_equal(s.calls, before + 1); /* each choice is a record */
    assert_int_equal(s.row.id, id);
    assert_int_equal(s.record.prompt_tokens, 0); /* measured once, with the first */
    /* Its prompt was computed once, as each of the three others was. */
    assert_int_equal(sh_engine_get_status(e).prompt_tokens, 4 * info.prompt_tokens);
    sh_engine_destroy(&e);
}

static void logprobs_are_the_models(void **state)
{
    (void)state;
    seen s;
    expected x;
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    direct(genesis, "the cat", 6, &x);
    sh_request r = greedy("the cat", 6);
    r.logprobs = true;
    r.top_logprobs = 3;
    sh_generation *g = begin(e, &r);
    sh_buf out;
    sh_buf_init(&out, TEXT_MAX);
    for (bool done = false; !done;)
        OK(sh_generation_next(g, &out, &done, &err));
    assert_int_equal(sh_generation_shown(g), x.n);
    double sum = 0;
    for (uint32_t i = 0; i < x.n; i++) {
        sh_generation_token t = sh_generation_get_token(g, i);
        assert_int_equal(t.token, x.tokens[i]);
        assert_int_equal(t.n_likeliest, 3);
        assert_int_equal(t.likeliest[0].token, t.token); /* greedy */
        assert_true(t.likeliest[0].logprob == t.logprob && t.logprob <= 0);
        assert_true(t.likeliest[1].logprob >= t.likeliest[2].logprob);
        sum += t.logprob;
    }
    sh_generation_end(&g);
    assert_true(fabs(sum / x.n - s.record.mean_logprob) < 1e-4);
    sh_buf_release(&out);
    sh_engine_destroy(&e);
}

/* The start of another slot's text is taken over where its user is the same, or it may be. */
static void starts_of_texts_are_shared(void **state)
{
    (void)state;
    static const char *const system = "the hand of the cat is in the sand of the land and it is";
    seen s;
    for (unsigned share = 0; share < 2; share++) {
        char one[128], two[128], three[128], text[TEXT_MAX], want[TEXT_MAX];
        snprintf(one, sizeof one, "%s a mat on the mat that sat in the sand a hen and a cat",
                 system);
        snprintf(two, sizeof two, "%s of to", system);
        snprintf(three, sizeof three, "%s hen", system);
        sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 4, .share_prefix = share});
        sh_request r = greedy(two, 5);
        r.user = "nobody else";
        run(e, &r, want); /* on its own */
        sh_engine_forget(e);
        r = greedy(one, 2);
        r.user = "ann";
        run(e, &r, text);
        uint64_t first = s.row.session;
        r = greedy(two, 5);
        r.user = "ann";
        sh_generation_info info = run(e, &r, text);
        assert_string_equal(text, want);
        assert_true(s.row.session != first); /* a slot of its own: the long text stays */
        assert_in_range(info.cached_tokens, 16, info.prompt_tokens - 1);
        assert_int_equal(s.record.prompt_tokens, info.prompt_tokens - info.cached_tokens);
        r.user = "bob";
        assert_int_equal(run(e, &r, text).cached_tokens > 0, share);
        assert_string_equal(text, want);
        r = greedy(three, 5);
        assert_int_equal(run(e, &r, text).cached_tokens > 0, share);
        sh_engine_destroy(&e);
    }
}

static void embeddings_are_means(void **state)
{
    (void)state;
    static const char text[] = "it is in the hand of a cat that sat on the mat";
    const uint32_t width = genesis->config.width;
    seen s;
    bool too_long;
    sh_embeddings made = {0};
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 1});
    int32_t *tokens = NULL;
    size_t n = 0;
    OK(sh_tokenize(genesis->tokenizer, text, strlen(text), SH_TOKENIZE_BOS, &tokens, &n, &err));
    sh_runner *runner = NULL;
    sh_context *context = NULL;
    OK(sh_runner_create(genesis, &(sh_runner_options){0}, &runner, &err));
    OK(sh_context_create(genesis, &(sh_context_options){.n_tokens_max = 64, .runner = runner},
                         &context, &err));
    float *hidden = calloc(n * width, sizeof(float));
    sh_run_item item = {.context = context, .tokens = tokens, .n = (uint32_t)n, .hidden = hidden};
    OK(sh_runner_run(runner, &item, 1, &err));
    const sh_embed_input inputs[] = {{.text = text, .text_bytes = strlen(text)},
                                     {.tokens = tokens + 1, .n_tokens = n - 1},
                                     {.text = "x", .text_bytes = 1}};
    sh_embed_request request = {.inputs = inputs, .n = 3};
    OK(sh_engine_embed(e, &request, &made, &too_long, &err));
    assert_int_equal(made.width, width);
    double square = 0, length = 0, mean[256] = {0};
    assert_in_range(width, 1, 256);
    for (size_t i = 0; i < n * width; i++)
        mean[i % width] += hidden[i] / (double)n;
    for (uint32_t k = 0; k < width; k++)
        square += mean[k] * mean[k];
    for (uint32_t k = 0; k < width; k++) {
        assert_true(fabs(made.vectors[k] - mean[k] / sqrt(square)) < 1e-5);
        assert_true(made.vectors[width + k] == made.vectors[k]); /* the same tokens */
        length += (double)made.vectors[2 * width + k] * made.vectors[2 * width + k];
    }
    assert_true(fabs(length - 1) < 1e-5);
    free(made.vectors);
    assert_int_equal(s.calls, 0); /* no record */
    const sh_embed_input bad = {.tokens = (const int32_t[]){1 << 20}, .n_tokens = 1};
    request = (sh_embed_request){.inputs = &bad, .n = 1};
    assert_int_equal(sh_engine_embed(e, &request, &made, &too_long, &err), SH_ERR_INVALID);
    char after[TEXT_MAX], want[TEXT_MAX];
    sh_request r = greedy("the cat", 6);
    run(e, &r, after); /* the slot works as before */
    sh_engine_forget(e);
    run(e, &r, want);
    assert_string_equal(after, want);
    sh_context_destroy(&context);
    sh_runner_destroy(&runner);
    free(hidden);
    free(tokens);
    sh_engine_destroy(&e);
}

static bool is_gone(void *arg)
{
    atomic_int *asked = arg;
    return ++*asked > 2;
}

/* Whoever leaves while it waits, or while its prompt is run, frees its place at once. */
static void who_leaves_is_not_served(void **state)
{
    (void)state;
    seen s;
    char text[TEXT_MAX];
    bool too_long;
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 1});
    atomic_int asked = 0;
    const sh_request_client client = {is_gone, &asked};
    sh_request r = greedy("the cat sat", 4), leaves = greedy("of in", 4);
    leaves.client = &client;
    sh_generation *g = begin(e, &r), *none = NULL;
    assert_int_equal(sh_generation_begin(e, &leaves, &none, &too_long, &err), SH_ERR_CANCELLED);
    assert_int_equal(sh_engine_get_status(e).waiting, 0);
    sh_generation_end(&g);
    asked = 2; /* gone when its prompt begins to run */
    assert_int_equal(sh_generation_begin(e, &leaves, &none, &too_long, &err), SH_ERR_CANCELLED);
    assert_null(none);
    assert_int_equal(sh_engine_get_status(e).running, 0);
    assert_int_equal(s.calls, 1);
    run(e, &r, text);
    sh_engine_destroy(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_crowd_says_what_each_says_alone),
        cmocka_unit_test(choices_are_requests_with_the_next_seed),
        cmocka_unit_test(logprobs_are_the_models),
        cmocka_unit_test(starts_of_texts_are_shared),
        cmocka_unit_test(embeddings_are_means),
        cmocka_unit_test(who_leaves_is_not_served),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
