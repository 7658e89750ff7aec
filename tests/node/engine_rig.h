/*
 * What the tests of the engine share: tiny models, an engine that tells what it hands over, and
 * what a context of its own says. Included by each of them: all of it is theirs.
 */
#ifndef SH_TESTS_ENGINE_RIG_H
#define SH_TESTS_ENGINE_RIG_H

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "edge-node/engine.h"
#include "shared/model/sampler.h"
#include "shared/model/text_filter.h"
#include "tests/model/tiny.h"

#define TEXT_MAX    4096
#define PATIENCE_MS 60000 /* the machine is noisy; nothing here takes a hundredth of it */

static sh_error err;

#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), err.text);                   \
    } while (0)

static sh_model *genesis; /* seed 1, which frozen is made from */
static sh_frozen *frozen;

static inline sh_model *open_tiny(uint64_t seed)
{
    char path[] = "/tmp/shoal-engine-XXXXXX";
    tiny_options options = tiny_defaults(seed);
    sh_model *m = NULL;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    options.add_bos = options.untied = true; /* tied, it would say one letter for ever */
    OK(tiny_write(&options, path, &err));
    OK(sh_model_open(path, &m, &err));
    unlink(path); /* the map stays */
    return m;
}

static inline int setup(void **state)
{
    (void)state;
    OK(sh_crypto_init(&err));
    genesis = open_tiny(1);
    OK(sh_frozen_create(genesis, &frozen, &err));
    return 0;
}

static inline int teardown(void **state)
{
    (void)state;
    sh_frozen_destroy(&frozen);
    sh_model_close(&genesis);
    return 0;
}

/* What `finished` was given last, and how often. */
typedef struct {
    pthread_mutex_t lock;
    unsigned calls;
    sh_record record;
    sh_completion_row row;
    int32_t tokens[256]; /* of the row */
} seen;

static inline void take(void *arg, const sh_record *record, const sh_completion_row *row)
{
    seen *s = arg;
    pthread_mutex_lock(&s->lock);
    s->calls++;
    s->record = *record;
    s->row = *row;
    /* cmocka's asserts are for the main thread; what does not fit is seen as a wrong row */
    memcpy(s->tokens, row->tokens, SH_MIN(row->n_context + row->n, 256u) * sizeof(int32_t));
    s->row.tokens = s->tokens;
    pthread_mutex_unlock(&s->lock);
}

static inline uint64_t fixed_clock(void *arg)
{
    (void)arg;
    return 1234;
}

static inline sh_engine *new_engine(seen *s, sh_engine_options o)
{
    sh_engine *e = NULL;
    sh_model *model = open_tiny(1);
    *s = (seen){.lock = PTHREAD_MUTEX_INITIALIZER};
    o.frozen = frozen;
    o.now_ms = fixed_clock;
    o.finished = take;
    o.arg = s;
    OK(sh_engine_create(&o, &e, &err));
    OK(sh_engine_activate(e, &model, 1, &err));
    assert_null(model);
    return e;
}

static inline sh_request greedy(const char *prompt, uint32_t max_tokens)
{
    return (sh_request){
        .prompt = prompt, .prompt_bytes = strlen(prompt), .max_tokens = max_tokens, .top_p = 1};
}

static inline sh_generation *begin(sh_engine *e, const sh_request *r)
{
    sh_generation *g = NULL;
    bool too_long;
    OK(sh_generation_begin(e, r, &g, &too_long, &err));
    return g;
}

/* To the end; the text into `text`, with a NUL. */
static inline sh_generation_info run(sh_engine *e, const sh_request *r, char text[TEXT_MAX])
{
    sh_generation *g = begin(e, r);
    sh_buf out;
    sh_buf_init(&out, TEXT_MAX - 1);
    for (bool done = false; !done;) {
        size_t before = out.len;
        OK(sh_generation_next(g, &out, &done, &err));
        assert_true(done || out.len > before);
    }
    if (out.len > 0)
        memcpy(text, out.data, out.len);
    text[out.len] = 0;
    sh_buf_release(&out);
    sh_generation_info info = sh_generation_get_info(g);
    sh_generation_end(&g);
    assert_null(g);
    return info;
}

/* ---- what a context of its own says ---- */

typedef struct {
    int32_t tokens[64], prompt[64];
    uint32_t n, n_prompt;
    char text[TEXT_MAX]; /* raw bytes */
    size_t bytes;
} expected;

static inline void read_tokens(const sh_model *m, const char *text, expected *x)
{
    int32_t *tokens = NULL;
    size_t n = 0;
    OK(sh_tokenize(m->tokenizer, text, strlen(text), 0, &tokens, &n, &err));
    assert_in_range(n, 1, 60);
    memcpy(x->prompt, tokens, n * sizeof(*tokens));
    x->n_prompt = (uint32_t)n;
    free(tokens);
}

static inline void direct(const sh_model *m, const char *prompt, uint32_t max_tokens, expected *x)
{
    sh_context *context = NULL;
    sh_context_options options = {.n_tokens_max = m->config.context};
    float *logits = calloc(m->config.vocab, sizeof(float));
    int32_t bos = sh_tokenizer_bos(m->tokenizer);
    sh_buf text;
    assert_non_null(logits);
    *x = (expected){0};
    read_tokens(m, prompt, x);
    sh_buf_init(&text, TEXT_MAX);
    OK(sh_context_create(m, &options, &context, &err));
    OK(sh_context_decode(context, &bos, 1, SH_LOGITS_NONE, NULL, &err));
    OK(sh_context_decode(context, x->prompt, x->n_prompt, SH_LOGITS_LAST, logits, &err));
    while (x->n < max_tokens) {
        int32_t token = sh_argmax(logits, m->config.vocab);
        if (token == sh_tokenizer_eos(m->tokenizer))
            break;
        x->tokens[x->n++] = token;
        OK(sh_detokenize(m->tokenizer, token, &text));
        OK(sh_context_decode(context, &token, 1, SH_LOGITS_LAST, logits, &err));
    }
    memcpy(x->text, text.data, text.len);
    x->bytes = text.len;
    sh_buf_release(&text);
    sh_context_destroy(&context);
    free(logits);
}

#endif
