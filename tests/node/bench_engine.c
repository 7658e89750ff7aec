/*
 * Tokens a second through the node's engine, beside the bare forward pass on the same model, in
 * turns: what batching brings, and what measuring and serving cost.
 *     bench_engine MODEL [THREADS [TOKENS [REPEATS]]]      default 1 96 5
 * Medians of the repeats. No test, and not built by default.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "edge-node/engine.h"
#include "shared/base/hash.h"
#include "shared/model/sampler.h"

enum { REPEATS_MAX = 99, CONTEXT = 1024, PROMPT = 512, STREAMS_MAX = 8, SHORT = 12 };

typedef struct {
    sh_model *model; /* of the bare passes; the engine has its own */
    sh_frozen *frozen;
    sh_engine *engine;
    sh_team *team;
    sh_runner *runner;
    sh_context *context;
    float *logits;
    uint32_t tokens;
    unsigned texts; /* so far: each one is new */
} bench;

typedef struct {
    bench *b;
    pthread_barrier_t *ready;
    unsigned text;
    uint32_t generated;
} stream;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t clock_ms(void *arg)
{
    (void)arg;
    return 1;
}

static void finished(void *arg, const sh_record *record, const sh_completion_row *row)
{
    (void)arg, (void)record, (void)row;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

static void must(sh_status status, const sh_error *err)
{
    if (status == SH_OK)
        return;
    fprintf(stderr, "bench_engine: %s\n", err->text);
    exit(sh_status_exit_code(status));
}

/* A text of n tokens, or a few more, that begins like no other one. */
static void write_text(const bench *b, unsigned number, uint32_t n, sh_buf *out)
{
    sh_error err = {0};
    const uint32_t first = 1000, vocab = b->model->config.vocab;
    uint32_t state = number * 2654435761u + 1;
    for (size_t tokens = 0; tokens < n;) {
        int32_t *ids;
        state = state * 1664525u + 1013904223u;
        must(sh_detokenize(b->model->tokenizer, (int32_t)(first + (state >> 8) % (vocab - first)),
                           out),
             &err);
        must(sh_tokenize(b->model->tokenizer, (const char *)out->data, out->len, 0, &ids, &tokens,
                         &err),
             &err);
        free(ids);
    }
}

static sh_generation *begin(bench *b, const sh_buf *prompt, uint32_t max_tokens)
{
    sh_error err = {0};
    sh_generation *g = NULL;
    bool too_long;
    const sh_request request = {.prompt = (const char *)prompt->data,
                                .prompt_bytes = prompt->len,
                                .max_tokens = max_tokens,
                                .top_p = 1};
    must(sh_generation_begin(b->engine, &request, &g, &too_long, &err), &err);
    return g;
}

static void *generate(void *arg)
{
    stream *s = arg;
    sh_error err = {0};
    sh_buf text, prompt;
    sh_buf_init(&text, 1 << 20);
    sh_buf_init(&prompt, 1 << 20);
    write_text(s->b, s->text, SHORT, &prompt);
    sh_generation *g = begin(s->b, &prompt, s->b->tokens);
    pthread_barrier_wait(s->ready);
    for (bool done = false; !done;)
        must(sh_generation_next(g, &text, &done, &err), &err);
    s->generated = sh_generation_get_info(g).completion_tokens;
    sh_generation_end(&g);
    sh_buf_release(&text);
    sh_buf_release(&prompt);
    return NULL;
}

/* Tokens a second of n texts at once, all of them together. */
static double decode_together(bench *b, unsigned n)
{
    stream streams[STREAMS_MAX];
    pthread_t threads[STREAMS_MAX];
    pthread_barrier_t ready;
    uint64_t tokens = 0;
    pthread_barrier_init(&ready, NULL, n + 1);
    for (unsigned i = 0; i < n; i++) {
        streams[i] = (stream){.b = b, .ready = &ready, .text = b->texts++};
        if (pthread_create(&threads[i], NULL, generate, &streams[i]) != 0)
            exit(1);
    }
    pthread_barrier_wait(&ready);
    const double start = now();
    for (unsigned i = 0; i < n; i++) {
        pthread_join(threads[i], NULL);
        tokens += streams[i].generated;
    }
    const double seconds = now() - start;
    pthread_barrier_destroy(&ready);
    return (double)tokens / seconds;
}

/* Tokens a second of the bare pass, the likeliest token after each. */
static double decode_bare(bench *b)
{
    sh_error err = {0};
    int32_t token = 1000;
    sh_context_truncate(b->context, SHORT);
    const double start = now();
    for (uint32_t i = 0; i < b->tokens; i++) {
        must(sh_context_decode(b->context, &token, 1, SH_LOGITS_LAST, b->logits, &err), &err);
        token = sh_argmax(b->logits, b->model->config.vocab);
    }
    return b->tokens / (now() - start);
}

static double prefill_engine(bench *b)
{
    sh_buf prompt;
    sh_buf_init(&prompt, 1 << 20);
    write_text(b, b->texts++, PROMPT, &prompt);
    const double start = now();
    sh_generation *g = begin(b, &prompt, 1);
    const double seconds = now() - start;
    const uint32_t n = sh_generation_get_info(g).prompt_tokens;
    sh_generation_end(&g);
    sh_buf_release(&prompt);
    return n / seconds;
}

static double prefill_bare(bench *b)
{
    sh_error err = {0};
    int32_t tokens[PROMPT];
    for (int i = 0; i < PROMPT; i++)
        tokens[i] = (int32_t)((uint32_t)i * 7919u % b->model->config.vocab);
    sh_context_truncate(b->context, 0);
    const double start = now();
    must(sh_context_decode(b->context, tokens, PROMPT, SH_LOGITS_LAST, b->logits, &err), &err);
    return PROMPT / (now() - start);
}

static void make(bench *b, const char *path, unsigned threads)
{
    sh_error err = {0};
    sh_model *model = NULL;
    bool cached;
    must(sh_crypto_init(&err), &err);
    must(sh_model_open(path, &b->model, &err), &err);
    must(sh_model_open(path, &model, &err), &err);
    must(sh_frozen_create(b->model, &b->frozen, &err), &err);
    if (threads > 1)
        must(sh_team_create(threads, &b->team, &err), &err);
    must(sh_model_pack(b->model, &(sh_pack_options){.team = b->team}, &cached, &err), &err);
    must(sh_model_pack(model, &(sh_pack_options){.team = b->team}, &cached, &err), &err);
    must(sh_runner_create(b->model, &(sh_runner_options){.team = b->team}, &b->runner, &err), &err);
    const sh_context_options context = {
        .n_tokens_max = CONTEXT, .kv = SH_KV_F16, .runner = b->runner};
    must(sh_context_create(b->model, &context, &b->context, &err), &err);
    b->logits = calloc(b->model->config.vocab, sizeof *b->logits);
    const sh_engine_options options = {.frozen = b->frozen,
                                       .slots = STREAMS_MAX,
                                       .context = CONTEXT,
                                       .threads = threads,
                                       .kv = SH_KV_F16,
                                       .now_ms = clock_ms,
                                       .finished = finished};
    must(sh_engine_create(&options, &b->engine, &err), &err);
    must(sh_engine_activate(b->engine, &model, 1, &err), &err);
}

static void destroy(bench *b)
{
    sh_engine_destroy(&b->engine);
    sh_context_destroy(&b->context);
    sh_runner_destroy(&b->runner);
    sh_team_destroy(&b->team);
    sh_frozen_destroy(&b->frozen);
    sh_model_close(&b->model);
    free(b->logits);
}

int main(int argc, char **argv)
{
    static const unsigned streams[] = {1, 2, 4, 8};
    static double values[3 + SH_COUNT(streams)][REPEATS_MAX];
    const unsigned threads = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 1;
    const int repeats = argc > 4 ? SH_MIN(atoi(argv[4]), REPEATS_MAX) : 5;
    bench b = {.tokens = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 96};
    if (argc < 2 || threads < 1 || repeats < 1 || b.tokens < 1 || b.tokens > CONTEXT / 2) {
        fprintf(stderr, "usage: bench_engine MODEL [THREADS [TOKENS [REPEATS]]]\n");
        return 2;
    }
    make(&b, argv[1], threads);
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        const int at = SH_MAX(r, 0);
        values[0][at] = prefill_bare(&b);
        values[1][at] = prefill_engine(&b);
        values[2][at] = decode_bare(&b);
        for (size_t i = 0; i < SH_COUNT(streams); i++)
            values[3 + i][at] = decode_together(&b, streams[i]);
    }
    const double bare = median(values[0], repeats), prefill = median(values[1], repeats);
    const double alone = median(values[2], repeats);
    double one = 0;
    printf("prefill: bare %.0f, engine %.0f tokens/s (%.3f of it)\n", bare, prefill,
           prefill / bare);
    for (size_t i = 0; i < SH_COUNT(streams); i++) {
        const double all = median(values[3 + i], repeats);
        one = i == 0 ? all : one;
        printf("decode: bare %.0f, %u streams %.0f tokens/s (%.3f of bare, %.2f of one)\n", alone,
               streams[i], all, all / alone, all / one);
    }
    destroy(&b);
    return 0;
}
