/*
 * Who holds what: a request takes one of `slots` places (admit), which promises it a free slot; a
 * slot is one session. Models are counted in by requests, readers and by being active, and closed
 * by whoever counts the last one out. A slot remembers by the number of the activation, never by
 * address, which model its session was run on: that model may be gone.
 *
 * The mutex guards everything in sh_engine but the insides of a busy slot, which are its
 * request's; nothing is computed under it but the comparison of a prompt with the texts.
 */
#include "edge-node/engine.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "edge-node/engine_text.h"
#include "shared/base/hash.h"

#define SLOTS_DEFAULT       4u
#define SLOTS_MAX           256u
#define CONTEXT_DEFAULT_MAX 1024u
#define QUEUE_DEFAULT       64u
#define WAIT_MS_DEFAULT     30000u
#define TOKEN_BYTES_MAX     64u /* a prompt has more tokens than bytes / this; refused unread */
#define SAMPLING_PURPOSE    0x73616d70u

typedef struct model_use {
    struct model_use *next;
    sh_model *model;
    uint64_t version, number; /* number: of the activation */
    uint32_t users;           /* requests, readers; one more while it is active */
} model_use;

typedef struct {
    sh_session *session;
    uint64_t number;      /* of the activation that the session was run on */
    uint64_t id, user;    /* of the text; id 0: there is none */
    uint64_t used;        /* when, in requests */
    bool busy, forgotten; /* forgotten: while it was busy */
} slot;

typedef struct waiter {
    struct waiter *next;
    pthread_cond_t woken;
    bool admitted;
} waiter;

struct sh_engine {
    sh_engine_options o;
    pthread_mutex_t lock;
    pthread_cond_t idle; /* a slot is free again */
    slot *slots;         /* [o.slots] */
    model_use *models, *active;
    uint64_t n_activations, n_uses, last_id;
    waiter *first_waiter, *last_waiter;
    bool stopping;
    sh_engine_status status; /* version, models_open: when asked */
};

struct sh_generation {
    sh_engine *engine;
    slot *slot;
    model_use *model;
    sh_text_filter filter;
    sh_generation_info info;
    uint64_t user, spent_ns, first_ns; /* computing and waiting, all and to the first token */
    int32_t *tokens;                   /* [prompt_tokens + max_tokens]: the prompt, the proposal */
    uint32_t max_tokens;
    bool proposing, done, failed;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t sh_engine_user(const char *name)
{
    if (name == NULL)
        return 0;
    sh_hash hash = sh_blake2b(name, strlen(name));
    uint64_t user = 0;
    for (unsigned i = 0; i < 8; i++)
        user |= (uint64_t)hash.b[i] << (8 * i);
    return user != 0 ? user : 1;
}

/* ---- the engine ---- */

sh_status sh_engine_create(const sh_engine_options *options, sh_engine **out, sh_error *err)
{
    sh_engine_options o = *options;
    o.slots = o.slots ? o.slots : SLOTS_DEFAULT;
    o.queue_max = o.queue_max ? o.queue_max : QUEUE_DEFAULT;
    o.wait_ms_max = o.wait_ms_max ? o.wait_ms_max : WAIT_MS_DEFAULT;
    SH_ASSERT(o.frozen != NULL && o.now_ms != NULL && o.finished != NULL);
    if (o.slots > SLOTS_MAX)
        return sh_fail(err, SH_ERR_USAGE, "engine: %u slots, at most %u are possible", o.slots,
                       SLOTS_MAX);
    if (o.context != 0 && (o.context < SH_SESSION_TOKENS_MIN || o.context > SH_CONTEXT_MAX))
        return sh_fail(err, SH_ERR_USAGE, "engine: a context of %u tokens is outside %u to %d",
                       o.context, SH_SESSION_TOKENS_MIN, SH_CONTEXT_MAX);
    sh_engine *e = sh_calloc(1, sizeof(*e));
    slot *slots = sh_calloc(o.slots, sizeof(*slots));
    if (e == NULL || slots == NULL) {
        free(e);
        free(slots);
        return sh_fail(err, SH_ERR_NO_MEMORY, "engine: no memory");
    }
    e->o = o;
    e->slots = slots;
    e->status.slots = o.slots;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->idle, NULL);
    *out = e;
    return SH_OK;
}

/* Counts a user out; what must be closed, outside the lock, is returned. */
static model_use *count_out(sh_engine *e, model_use *use)
{
    SH_ASSERT(use->users > 0);
    if (--use->users > 0)
        return NULL;
    model_use **at = &e->models;
    while (*at != use)
        at = &(*at)->next;
    *at = use->next;
    return use;
}

static void close_use(model_use *use)
{
    if (use != NULL)
        sh_model_close(&use->model);
    free(use);
}

void sh_engine_destroy(sh_engine **engine)
{
    sh_engine *e = *engine;
    if (e == NULL)
        return;
    SH_ASSERT(e->status.running == 0 && e->first_waiter == NULL);
    for (uint32_t i = 0; i < e->o.slots; i++)
        sh_session_destroy(&e->slots[i].session);
    if (e->active != NULL)
        close_use(count_out(e, e->active));
    SH_ASSERT(e->models == NULL); /* a reader did not put one back */
    pthread_cond_destroy(&e->idle);
    pthread_mutex_destroy(&e->lock);
    free(e->slots);
    free(e);
    *engine = NULL;
}

void sh_engine_stop(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->stopping = true;
    for (waiter *w = engine->first_waiter; w != NULL; w = w->next)
        pthread_cond_signal(&w->woken);
    pthread_mutex_unlock(&engine->lock);
}

void sh_engine_set_last_id(sh_engine *engine, uint64_t last)
{
    pthread_mutex_lock(&engine->lock);
    engine->last_id = SH_MAX(engine->last_id, last);
    pthread_mutex_unlock(&engine->lock);
}

sh_engine_status sh_engine_get_status(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    sh_engine_status status = engine->status;
    status.version = engine->active != NULL ? engine->active->version : 0;
    for (const model_use *use = engine->models; use != NULL; use = use->next)
        status.models_open++;
    pthread_mutex_unlock(&engine->lock);
    return status;
}

/* ---- models ---- */

/* All memory that requests will need is taken here, not when the first of them come. */
static sh_status make_sessions(sh_engine *e, const sh_model *model, uint64_t version, sh_error *err)
{
    sh_session_options options = {.n_tokens_max = e->o.context,
                                  .release_version = (uint32_t)version};
    if (options.n_tokens_max == 0)
        options.n_tokens_max = SH_MIN(model->config.context, CONTEXT_DEFAULT_MAX);
    sh_session *made[SLOTS_MAX];
    sh_status status = SH_OK;
    uint32_t n = 0;
    while (n < e->o.slots && status == SH_OK) {
        status = sh_session_create(model, e->o.frozen, &options, &made[n], err);
        n += status == SH_OK;
    }
    if (status != SH_OK) {
        while (n > 0)
            sh_session_destroy(&made[--n]);
        return status;
    }
    for (uint32_t i = 0; i < n; i++) {
        e->slots[i].session = made[i];
        e->slots[i].number = e->n_activations + 1;
    }
    e->o.context = options.n_tokens_max;
    return SH_OK;
}

static sh_status check_model(const sh_engine *e, const sh_model *model, sh_error *err)
{
    uint32_t vocab = sh_frozen_vocab(e->o.frozen);
    if (model->config.vocab != vocab)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "a release's model of %u tokens, the fleet's vocabulary has %u",
                       model->config.vocab, vocab);
    if (model->config.context < e->o.context)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "a release's model has a context of %u tokens, engine.context is %u",
                       model->config.context, e->o.context);
    return SH_OK;
}

sh_status sh_engine_activate(sh_engine *engine, sh_model **model, uint64_t version, sh_error *err)
{
    sh_engine *e = engine;
    model_use *use = sh_calloc(1, sizeof(*use)), *ended = NULL;
    if (use == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "engine: no memory for release %llu",
                       (unsigned long long)version);
    pthread_mutex_lock(&e->lock);
    sh_status status = check_model(e, *model, err);
    if (status == SH_OK && e->active == NULL)
        status = make_sessions(e, *model, version, err);
    if (status == SH_OK) {
        *use = (model_use){.next = e->models,
                           .model = *model,
                           .version = version,
                           .number = ++e->n_activations,
                           .users = 1};
        e->models = use;
        if (e->active != NULL)
            ended = count_out(e, e->active);
        e->active = use;
        *model = NULL;
    }
    pthread_mutex_unlock(&e->lock);
    if (status != SH_OK)
        free(use);
    close_use(ended);
    return status;
}

const sh_model *sh_engine_use_model(sh_engine *engine, uint64_t *version)
{
    const sh_model *model = NULL;
    pthread_mutex_lock(&engine->lock);
    if (engine->active != NULL) {
        engine->active->users++;
        model = engine->active->model;
        if (version != NULL)
            *version = engine->active->version;
    }
    pthread_mutex_unlock(&engine->lock);
    return model;
}

void sh_engine_release_model(sh_engine *engine, const sh_model *model)
{
    if (model == NULL)
        return;
    pthread_mutex_lock(&engine->lock);
    model_use *use = engine->models;
    while (use != NULL && use->model != model)
        use = use->next;
    SH_ASSERT(use != NULL);
    model_use *ended = count_out(engine, use);
    pthread_mutex_unlock(&engine->lock);
    close_use(ended);
}

/* ---- places and slots ---- */

static void unlink_waiter(sh_engine *e, waiter *w)
{
    waiter **at = &e->first_waiter, *before = NULL;
    while (*at != w) {
        before = *at;
        at = &(*at)->next;
    }
    *at = w->next;
    if (e->last_waiter == w)
        e->last_waiter = before;
    e->status.waiting--;
}

/* First come, first served. The lock is held. */
static bool wait_for_place(sh_engine *e)
{
    waiter w = {0};
    struct timespec until;
    pthread_condattr_t attr;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += e->o.wait_ms_max / 1000;
    until.tv_nsec += (long)(e->o.wait_ms_max % 1000) * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w.woken, &attr);
    pthread_condattr_destroy(&attr);
    if (e->last_waiter != NULL)
        e->last_waiter->next = &w;
    else
        e->first_waiter = &w;
    e->last_waiter = &w;
    e->status.waiting++;
    while (!w.admitted && !e->stopping)
        if (pthread_cond_timedwait(&w.woken, &e->lock, &until) == ETIMEDOUT)
            break;
    if (!w.admitted)
        unlink_waiter(e, &w);
    pthread_cond_destroy(&w.woken);
    return w.admitted;
}

/* Gives the request a place and the model that is active then. */
static sh_status admit(sh_generation *g, sh_error *err)
{
    sh_engine *e = g->engine;
    sh_status status = SH_OK;
    pthread_mutex_lock(&e->lock);
    if (e->stopping)
        status = sh_fail(err, SH_ERR_CANCELLED, "the node is stopping");
    else if (e->active == NULL)
        status = sh_fail(err, SH_ERR_LIMIT, "busy: no model is active yet, try again");
    else if (e->status.running < e->o.slots)
        e->status.running++;
    else if (e->status.waiting >= e->o.queue_max)
        status = sh_fail(err, SH_ERR_LIMIT, "busy: %u requests run and %u wait, try again",
                         e->status.running, e->status.waiting);
    else if (!wait_for_place(e)) /* else the place was handed over */
        status = e->stopping ? sh_fail(err, SH_ERR_CANCELLED, "the node is stopping")
                             : sh_fail(err, SH_ERR_LIMIT, "busy: waited for %u ms, try again",
                                       e->o.wait_ms_max);
    if (status == SH_OK) {
        g->model = e->active;
        g->model->users++;
        g->info.version = g->model->version;
        g->info.id = ++e->last_id;
        e->status.requests++;
    } else {
        e->status.refused++;
    }
    pthread_mutex_unlock(&e->lock);
    return status;
}

/* Forgets a slot's text. */
static void clear_slot(slot *s)
{
    if (s->session != NULL)
        sh_session_cut(s->session, 0);
    s->id = s->user = 0;
    s->forgotten = false;
}

/* The opposite of admit and choose_slot, of as much of them as was done. */
static void leave(sh_generation *g)
{
    sh_engine *e = g->engine;
    model_use *ended = NULL;
    pthread_mutex_lock(&e->lock);
    if (g->slot != NULL) {
        if (g->slot->forgotten || g->failed)
            clear_slot(g->slot);
        g->slot->busy = false;
        pthread_cond_broadcast(&e->idle);
    }
    if (g->model != NULL) {
        ended = count_out(e, g->model);
        waiter *w = e->first_waiter;
        if (w != NULL && !e->stopping) {
            unlink_waiter(e, w);
            w->admitted = true; /* the place changes hands */
            pthread_cond_signal(&w->woken);
        } else {
            e->status.running--;
        }
    }
    pthread_mutex_unlock(&e->lock);
    close_use(ended);
}

void sh_engine_forget_soon(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    for (uint32_t i = 0; i < engine->o.slots; i++) {
        if (engine->slots[i].busy)
            engine->slots[i].forgotten = true;
        else
            clear_slot(&engine->slots[i]);
    }
    pthread_mutex_unlock(&engine->lock);
}

/* The lock is held. */
static bool is_forgotten(const sh_engine *e)
{
    for (uint32_t i = 0; i < e->o.slots; i++)
        if (e->slots[i].forgotten)
            return false;
    return true;
}

bool sh_engine_is_forgotten(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    bool forgotten = is_forgotten(engine);
    pthread_mutex_unlock(&engine->lock);
    return forgotten;
}

void sh_engine_forget(sh_engine *engine)
{
    sh_engine_forget_soon(engine);
    pthread_mutex_lock(&engine->lock);
    while (!is_forgotten(engine))
        pthread_cond_wait(&engine->idle, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
}

static uint32_t common_start(const int32_t *a, uint32_t n, const int32_t *b, uint32_t m)
{
    uint32_t i = 0;
    while (i < n && i < m && a[i] == b[i])
        i++;
    return i;
}

/* Takes the free slot whose text the prompt goes on with, else an empty one, else the one that was
 * used longest ago. Returns how much of its text is the prompt's. */
static uint32_t choose_slot(sh_generation *g)
{
    sh_engine *e = g->engine;
    uint32_t shared = 0;
    pthread_mutex_lock(&e->lock);
    slot *best = NULL, *oldest = NULL;
    for (uint32_t i = 0; i < e->o.slots; i++) {
        slot *s = &e->slots[i];
        uint32_t n, common;
        if (s->busy)
            continue;
        if (oldest == NULL || (oldest->id != 0 && (s->id == 0 || s->used < oldest->used)))
            oldest = s;
        if (s->id == 0 || s->user != g->user)
            continue;
        const int32_t *text = sh_session_text(s->session, &n);
        common = common_start(text, n, g->tokens, g->info.prompt_tokens);
        if (common > shared && 2 * common >= n) {
            best = s;
            shared = common;
        }
    }
    g->slot = best != NULL ? best : oldest;
    SH_ASSERT(g->slot != NULL); /* the place promises one */
    g->slot->busy = true;
    g->slot->used = ++e->n_uses;
    pthread_mutex_unlock(&e->lock);
    return shared;
}

/* ---- a request ---- */

static sh_status check_request(const sh_request *r, sh_error *err)
{
    if (r->prompt == NULL || r->prompt_bytes == 0)
        return sh_fail(err, SH_ERR_INVALID, "the prompt is empty: there is nothing to go on from");
    if (r->max_tokens == 0 || r->max_tokens > SH_MAX_TOKENS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "max_tokens %u is outside 1 to %d", r->max_tokens,
                       SH_MAX_TOKENS_MAX);
    if (!(r->temperature >= 0 && r->temperature <= SH_TEMPERATURE_MAX))
        return sh_fail(err, SH_ERR_INVALID, "temperature %g is outside 0 to %d",
                       (double)r->temperature, SH_TEMPERATURE_MAX);
    if (!(r->top_p >= 0 && r->top_p <= 1))
        return sh_fail(err, SH_ERR_INVALID, "top_p %g is outside 0 to 1", (double)r->top_p);
    if (r->n_stops > SH_STOPS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "%zu stop strings, at most %d are possible", r->n_stops,
                       SH_STOPS_MAX);
    for (size_t i = 0; i < r->n_stops; i++) {
        size_t n = strlen(r->stops[i]);
        if (n == 0 || n > SH_STOP_BYTES_MAX)
            return sh_fail(err, SH_ERR_INVALID, "a stop string of %zu bytes, 1 to %d are possible",
                           n, SH_STOP_BYTES_MAX);
    }
    if (r->user != NULL && strlen(r->user) > SH_USER_BYTES_MAX)
        return sh_fail(err, SH_ERR_INVALID, "a user's name of %zu bytes is over the limit of %d",
                       strlen(r->user), SH_USER_BYTES_MAX);
    return SH_OK;
}

static sh_status fail_too_long(const sh_generation *g, bool *too_long, sh_error *err)
{
    *too_long = true;
    return sh_fail(err, SH_ERR_LIMIT,
                   "the prompt and max_tokens %u are longer than the context of %u tokens: shorten "
                   "them",
                   g->max_tokens, g->engine->o.context);
}

/* The prompt's tokens, without BOS: offsets count from the text's start. */
static sh_status read_prompt(sh_generation *g, const sh_request *r, bool *too_long, sh_error *err)
{
    const sh_tokenizer *tokenizer = g->model->model->tokenizer;
    uint32_t context = g->engine->o.context;
    bool bos = sh_tokenizer_adds_bos(tokenizer) && sh_tokenizer_bos(tokenizer) >= 0;
    size_t n = 0;
    if (r->prompt_bytes > (size_t)context * TOKEN_BYTES_MAX)
        return fail_too_long(g, too_long, err);
    SH_TRY(sh_tokenize(tokenizer, r->prompt, r->prompt_bytes, 0, &g->tokens, &n, err));
    if (n == 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "the prompt has no token: there is nothing to go on "
                       "from");
    if (n + bos + r->max_tokens > context)
        return fail_too_long(g, too_long, err);
    int32_t *more = realloc(g->tokens, (n + r->max_tokens) * sizeof(*more));
    if (more == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a request: no memory");
    g->tokens = more;
    g->info.prompt_tokens = (uint32_t)n;
    return SH_OK;
}

static uint64_t new_text_id(void)
{
    uint64_t id = 0;
    while (id == 0)
        sh_random_bytes(&id, sizeof(id));
    return id;
}

/* Brings the slot's session to the prompt: what it shares is not measured again, what is new is. */
static sh_status type_prompt(sh_generation *g, uint32_t shared, sh_error *err)
{
    slot *s = g->slot;
    sh_session_cut(s->session, shared);
    if (s->number != g->model->number) {
        SH_TRY(sh_session_switch(s->session, g->model->model, (uint32_t)g->model->version, err));
        s->number = g->model->number;
    } else {
        g->info.cached_tokens = shared;
    }
    if (shared == 0) {
        s->id = new_text_id();
        s->user = g->user;
        SH_TRY(sh_session_begin(s->session, err));
    }
    return sh_session_type(s->session, g->tokens + shared, g->info.prompt_tokens - shared, err);
}

static sh_status start(sh_generation *g, const sh_request *r, bool *too_long, sh_error *err)
{
    SH_TRY(sh_text_filter_init(&g->filter, r->stops, r->n_stops, r->max_tokens, err));
    SH_TRY(admit(g, err));
    SH_TRY(read_prompt(g, r, too_long, err));
    sh_status status = type_prompt(g, choose_slot(g), err);
    if (status == SH_OK) {
        sh_proposing how = {
            .max_tokens = r->max_tokens, .temperature = r->temperature, .top_p = r->top_p};
        sh_rng_init(&how.rng, r->seed != 0 ? r->seed : g->info.id, 0, SAMPLING_PURPOSE);
        status = sh_session_propose(g->slot->session, &how, err);
    }
    g->failed = status != SH_OK;
    g->proposing = !g->failed;
    return status;
}

static void free_generation(sh_generation *g)
{
    sh_text_filter_release(&g->filter);
    free(g->tokens);
    free(g);
}

sh_status sh_generation_begin(sh_engine *engine, const sh_request *request, sh_generation **out,
                              bool *too_long, sh_error *err)
{
    uint64_t begun = now_ns();
    *too_long = false;
    SH_TRY(check_request(request, err));
    sh_generation *g = sh_calloc(1, sizeof(*g));
    if (g == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a request: no memory");
    g->engine = engine;
    g->user = sh_engine_user(request->user);
    g->max_tokens = request->max_tokens;
    sh_status status = start(g, request, too_long, err);
    if (status != SH_OK) {
        leave(g);
        free_generation(g);
        return status;
    }
    g->spent_ns = now_ns() - begun;
    *out = g;
    return SH_OK;
}

/* One token more, or the end. */
static sh_status advance(sh_generation *g, sh_buf *text, sh_error *err)
{
    int32_t token;
    bool over;
    SH_TRY(sh_session_next(g->slot->session, &token, &over, err));
    if (over) {
        g->done = true;
        g->info.finish =
            g->info.completion_tokens == g->max_tokens ? SH_FINISH_LENGTH : SH_FINISH_STOP;
        return sh_text_filter_end(&g->filter, text, err);
    }
    g->tokens[g->info.prompt_tokens + g->info.completion_tokens++] = token;
    SH_TRY(sh_text_filter_add(&g->filter, g->model->model->tokenizer, token, text, err));
    if (g->filter.stopped) {
        g->done = true;
        g->info.finish = SH_FINISH_STOP;
    }
    return SH_OK;
}

sh_status sh_generation_next(sh_generation *generation, sh_buf *text, bool *done, sh_error *err)
{
    sh_generation *g = generation;
    sh_status status = SH_OK;
    size_t before = text->len;
    SH_ASSERT(!g->failed);
    while (status == SH_OK && !g->done && text->len == before) {
        uint64_t begun = now_ns();
        status = advance(g, text, err);
        g->spent_ns += now_ns() - begun;
        if (g->first_ns == 0)
            g->first_ns = g->spent_ns;
    }
    g->failed = status != SH_OK;
    *done = g->done;
    return status;
}

sh_generation_info sh_generation_get_info(const sh_generation *generation)
{
    const sh_generation *g = generation;
    sh_generation_info info = g->info;
    info.ttft_us = (uint32_t)SH_MIN(g->first_ns / 1000, (uint64_t)UINT32_MAX);
    if (info.completion_tokens > 1) {
        uint64_t each = (g->spent_ns - g->first_ns) / (info.completion_tokens - 1) / 1000;
        info.token_us = (uint32_t)SH_MIN(each, (uint64_t)UINT32_MAX);
    }
    return info;
}

/* The row has what the user was shown: no token of a stop string. */
static void hand_over(sh_generation *g, const sh_proposal *proposal)
{
    sh_generation_info info = sh_generation_get_info(g);
    sh_record record = proposal->record;
    uint32_t shown = sh_text_filter_tokens_shown(&g->filter);
    uint32_t n_context = SH_MIN(info.prompt_tokens, SH_NODE_COMPLETION_TOKENS_MAX - shown);
    record.at_ms = g->engine->o.now_ms(g->engine->o.arg);
    record.ttft_us = info.ttft_us;
    record.token_us = info.token_us;
    if (g->filter.stopped)
        record.stop = SH_STOP_STRING;
    sh_completion_row row = {.id = info.id,
                             .user = g->user,
                             .session = g->slot->id,
                             .offset = info.prompt_tokens,
                             .n_context = n_context,
                             .n = shown,
                             .tokens = g->tokens + info.prompt_tokens - n_context,
                             .at_ms = record.at_ms,
                             .release_version = (uint32_t)info.version};
    g->engine->o.finished(g->engine->o.arg, &record, &row);
}

void sh_generation_end(sh_generation **generation)
{
    sh_generation *g = *generation;
    sh_proposal proposal;
    if (g == NULL)
        return;
    *generation = NULL;
    sh_session_end(g->slot->session, &proposal);
    if (!g->failed)
        hand_over(g, &proposal);
    pthread_mutex_lock(&g->engine->lock);
    g->engine->status.prompt_tokens += g->info.prompt_tokens;
    g->engine->status.completion_tokens += g->info.completion_tokens;
    pthread_mutex_unlock(&g->engine->lock);
    leave(g);
    free_generation(g);
}
