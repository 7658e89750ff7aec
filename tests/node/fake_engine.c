#include "tests/node/fake_engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct sh_generation {
    sh_engine *engine;
    uint32_t sent;
    uint64_t id, version;
};

void fake_engine_init(sh_engine *engine)
{
    static const char *const pieces[] = {"Hello", " w\xc3\xb6rld", "", "!"};
    *engine = (sh_engine){.pieces = pieces, .n_pieces = 4, .version = 7};
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->changed, NULL);
}

void fake_engine_hold(sh_engine *engine, bool hold)
{
    pthread_mutex_lock(&engine->lock);
    engine->hold = hold;
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
}

void fake_engine_await(sh_engine *engine, const uint32_t *counter, uint32_t n)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    int failed = 0;
    pthread_mutex_lock(&engine->lock);
    while (*counter != n && !failed)
        failed = pthread_cond_timedwait(&engine->changed, &engine->lock, &until);
    pthread_mutex_unlock(&engine->lock);
    assert_int_equal(failed, 0);
}

static void keep_request(sh_engine *e, const sh_request *r)
{
    e->request = *r;
    snprintf(e->prompt, sizeof e->prompt, "%.*s", (int)r->prompt_bytes, r->prompt ? r->prompt : "");
    for (size_t i = 0; i < r->n_messages; i++) {
        size_t n = strlen(e->prompt);
        snprintf(e->prompt + n, sizeof e->prompt - n, "%s: %.*s\n", r->messages[i].role,
                 (int)r->messages[i].content_bytes, r->messages[i].content);
    }
    snprintf(e->user, sizeof e->user, "%s", r->user ? r->user : "");
    for (size_t i = 0; i < r->n_stops; i++)
        snprintf(e->stops[i], sizeof e->stops[i], "%s", r->stops[i]);
}

sh_status sh_generation_begin(sh_engine *engine, const sh_request *request, sh_generation **out,
                              bool *too_long, sh_error *err)
{
    sh_status status = SH_OK;
    sh_generation *g = calloc(1, sizeof *g);
    pthread_mutex_lock(&engine->lock);
    keep_request(engine, request);
    status = engine->begin_status;
    *too_long = engine->too_long;
    if (status == SH_OK) {
        *g = (sh_generation){
            .engine = engine, .id = ++engine->begun + 0xabc0, .version = engine->version};
        *out = g;
    } else {
        sh_fail(err, status, "the engine says %s", sh_status_name(status));
        free(g);
    }
    pthread_mutex_unlock(&engine->lock);
    return status;
}

sh_status sh_generation_next(sh_generation *generation, sh_buf *text, bool *done, sh_error *err)
{
    sh_engine *e = generation->engine;
    sh_status status = SH_OK;
    pthread_mutex_lock(&e->lock);
    if (generation->sent == 1) {
        e->waiting++;
        pthread_cond_broadcast(&e->changed);
        while (e->hold)
            pthread_cond_wait(&e->changed, &e->lock);
        e->waiting--;
        status = e->next_status;
    }
    bool endless = e->n_pieces == UINT32_MAX;
    const char *piece = e->pieces[endless ? 0 : generation->sent];
    generation->sent++;
    *done = !endless && generation->sent == e->n_pieces;
    pthread_mutex_unlock(&e->lock);
    if (status != SH_OK)
        return sh_fail(err, status, "the engine broke");
    return sh_buf_append(text, piece, strlen(piece));
}

sh_generation_info sh_generation_get_info(const sh_generation *generation)
{
    return (sh_generation_info){.id = generation->id,
                                .version = generation->version,
                                .prompt_tokens = 12,
                                .cached_tokens = 5,
                                .completion_tokens = generation->sent,
                                .finish = generation->engine->finish,
                                .ttft_us = 20000,
                                .token_us = 3000};
}

sh_status sh_generation_again(sh_generation *generation, sh_error *err)
{
    (void)err;
    sh_engine *e = generation->engine;
    pthread_mutex_lock(&e->lock);
    generation->sent = 0;
    generation->id++;
    e->again++;
    pthread_mutex_unlock(&e->lock);
    return SH_OK;
}

/* A piece is a token; "Hello" is 0. */
uint32_t sh_generation_shown(const sh_generation *generation)
{
    return generation->sent;
}

sh_generation_token sh_generation_get_token(const sh_generation *generation, uint32_t i)
{
    static const sh_token_logprob likeliest[] = {{0, -0.25f}, {1, -1.5f}, {2, -INFINITY}};
    return (sh_generation_token){.token = (int32_t)i,
                                 .logprob = -0.5f * (float)(i + 1),
                                 .n_likeliest = generation->engine->request.top_logprobs,
                                 .likeliest = likeliest};
}

sh_status sh_generation_token_text(const sh_generation *generation, int32_t token, sh_buf *out)
{
    const char *piece = token == 2 ? "\xc3" : generation->engine->pieces[token];
    return sh_buf_append(out, piece, strlen(piece));
}

sh_status sh_engine_embed(sh_engine *engine, const sh_embed_request *request, sh_embeddings *out,
                          bool *too_long, sh_error *err)
{
    pthread_mutex_lock(&engine->lock);
    sh_status status = engine->begin_status;
    *too_long = engine->too_long;
    engine->embedded += (uint32_t)request->n;
    pthread_mutex_unlock(&engine->lock);
    if (status != SH_OK)
        return sh_fail(err, status, "the engine says %s", sh_status_name(status));
    *out = (sh_embeddings){.version = engine->version, .width = 3};
    out->vectors = calloc(request->n * 3, sizeof(float));
    for (size_t i = 0; i < request->n; i++) {
        out->vectors[3 * i] = (float)i;
        out->vectors[3 * i + 1] = -0.5f;
        out->vectors[3 * i + 2] = (float)(request->inputs[i].n_tokens);
        out->tokens += (uint32_t)(request->inputs[i].text_bytes + request->inputs[i].n_tokens);
    }
    return SH_OK;
}

void sh_generation_end(sh_generation **generation)
{
    sh_engine *e = (*generation)->engine;
    free(*generation);
    *generation = NULL;
    pthread_mutex_lock(&e->lock);
    e->ended++;
    pthread_cond_broadcast(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

sh_engine_status sh_engine_get_status(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    sh_engine_status s = {.requests = engine->begun,
                          .prompt_tokens = 120,
                          .completion_tokens = 34,
                          .running = engine->begun - engine->ended,
                          .slots = 4,
                          .width = 3,
                          .family = SH_CHAT_CHATML,
                          .version = engine->version,
                          .models_open = 1};
    pthread_mutex_unlock(&engine->lock);
    return s;
}
