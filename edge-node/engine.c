#include "edge-node/engine_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/base/hash.h"

#define SLOTS_DEFAULT       4u
#define CONTEXT_DEFAULT_MAX 1024u
#define QUEUE_DEFAULT       64u
#define WAIT_MS_DEFAULT     30000u
#define CLIENT_POLL_MS      50u /* how often one that waits is asked for */
#define DONATED_MIN         16u /* tokens of a start that it pays to copy */

typedef struct waiter {
    struct waiter *next;
    pthread_cond_t woken;
    bool admitted;
} waiter;

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
    if (o.slots > ENGINE_SLOTS_MAX)
        return sh_fail(err, SH_ERR_USAGE, "engine: %u slots, at most %u are possible", o.slots,
                       ENGINE_SLOTS_MAX);
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
    for (uint32_t i = 0; i < o.slots; i++)
        slots[i].engine = e;
    sh_status status = SH_OK;
    if (o.threads > 1)
        status = sh_team_create(o.threads, &e->team, err);
    if (status == SH_OK)
        status = sh_batcher_create(e->team, &e->batcher, err);
    if (status != SH_OK)
        sh_engine_destroy(&e);
    else
        *out = e;
    return status;
}

/* The slot's text stays, its cache does not. The lock is held. */
static void detach(slot *s)
{
    if (s->session != NULL)
        sh_session_detach(s->session);
    s->member = (sh_batch_member){0};
    s->number = 0;
}

/* Counts a user out; what must be closed, outside the lock, is returned. Nothing is run on it any
 * more: no slot that is in use has its number. */
static model_use *count_out(sh_engine *e, model_use *use)
{
    SH_ASSERT(use->users > 0);
    if (--use->users > 0)
        return NULL;
    model_use **at = &e->models;
    while (*at != use)
        at = &(*at)->next;
    *at = use->next;
    for (uint32_t i = 0; i < e->o.slots; i++)
        if (e->slots[i].number == use->number)
            detach(&e->slots[i]);
    return use;
}

static void close_use(model_use *use)
{
    if (use != NULL) {
        sh_runner_destroy(&use->runner);
        sh_model_close(&use->model);
    }
    free(use);
}

void sh_engine_destroy(sh_engine **engine)
{
    sh_engine *e = *engine;
    if (e == NULL)
        return;
    SH_ASSERT(e->status.running == 0 && e->first_waiter == NULL);
    if (e->active != NULL)
        close_use(count_out(e, e->active));
    SH_ASSERT(e->models == NULL); /* a reader did not put one back */
    for (uint32_t i = 0; i < e->o.slots; i++)
        sh_session_destroy(&e->slots[i].session);
    sh_batcher_destroy(&e->batcher);
    sh_team_destroy(&e->team);
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
    const model_use *active = engine->active;
    if (active != NULL) {
        status.version = active->version;
        status.width = active->model->config.width;
        status.family = active->family;
    }
    for (const model_use *use = engine->models; use != NULL; use = use->next)
        status.models_open++;
    pthread_mutex_unlock(&engine->lock);
    sh_batcher_status passes = sh_batcher_get_status(engine->batcher);
    status.passes = passes.passes;
    status.pass_rows = passes.rows;
    return status;
}

/* ---- models ---- */

static sh_status run_item(void *arg, const sh_run_item *item, sh_error *err)
{
    slot *s = arg;
    const sh_request_client *client = s->client;
    if (client != NULL && client->gone(client->arg))
        return sh_fail(err, SH_ERR_CANCELLED, "the client is gone");
    return sh_batcher_run(s->engine->batcher, &s->member, item, err);
}

sh_session_runner engine_session_runner(slot *s, const model_use *use)
{
    s->member = (sh_batch_member){.model = use->model, .runner = use->runner};
    return (sh_session_runner){.runner = use->runner, .run = run_item, .arg = s};
}

/* All memory that requests will need is taken here, not when the first of them come. */
static sh_status make_sessions(sh_engine *e, const model_use *use, sh_error *err)
{
    sh_session_options options = {
        .n_tokens_max = e->o.context, .release_version = (uint32_t)use->version, .kv = e->o.kv};
    if (options.n_tokens_max == 0)
        options.n_tokens_max = SH_MIN(use->model->config.context, CONTEXT_DEFAULT_MAX);
    sh_status status = SH_OK;
    uint32_t n = 0;
    for (; n < e->o.slots && status == SH_OK; n++) {
        slot *s = &e->slots[n];
        sh_session_runner runner = engine_session_runner(s, use);
        options.runner = &runner;
        status = sh_session_create(use->model, e->o.frozen, &options, &s->session, err);
        s->number = use->number;
    }
    if (status == SH_OK) {
        e->o.context = options.n_tokens_max;
        return SH_OK;
    }
    for (uint32_t i = 0; i < n; i++) {
        detach(&e->slots[i]);
        sh_session_destroy(&e->slots[i].session);
    }
    return status;
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

static sh_status make_use(const sh_engine *e, sh_model *model, uint64_t version, model_use **out,
                          sh_error *err)
{
    model_use *use = sh_calloc(1, sizeof(*use));
    if (use == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "engine: no memory for release %llu",
                       (unsigned long long)version);
    *use = (model_use){.model = model, .version = version, .users = 1};
    use->family = sh_chat_detect(model->gguf);
    sh_runner_options options = {.rows_max = SH_BATCH_ROWS, .team = e->team};
    sh_status status = sh_runner_create(model, &options, &use->runner, err);
    if (status != SH_OK)
        free(use);
    else
        *out = use;
    return status;
}

sh_status sh_engine_activate(sh_engine *engine, sh_model **model, uint64_t version, sh_error *err)
{
    sh_engine *e = engine;
    model_use *use = NULL, *ended = NULL;
    SH_TRY(make_use(e, *model, version, &use, err));
    pthread_mutex_lock(&e->lock);
    use->number = e->n_activations + 1;
    sh_status status = check_model(e, *model, err);
    if (status == SH_OK && e->active == NULL)
        status = make_sessions(e, use, err);
    if (status == SH_OK) {
        e->n_activations++;
        use->next = e->models;
        e->models = use;
        if (e->active != NULL)
            ended = count_out(e, e->active);
        e->active = use;
        *model = NULL;
    }
    pthread_mutex_unlock(&e->lock);
    if (status != SH_OK) {
        sh_runner_destroy(&use->runner);
        free(use);
    }
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

static struct timespec after(struct timespec t, uint32_t ms)
{
    t.tv_sec += ms / 1000;
    t.tv_nsec += (long)(ms % 1000) * 1000000;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    return t;
}

/* Until it is admitted, or a reason to give up. The lock is held. */
static void wait_as(sh_engine *e, waiter *w, const sh_request_client *client)
{
    struct timespec now, until;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint32_t left_ms = e->o.wait_ms_max;
    until = now;
    while (!w->admitted && !e->stopping && left_ms > 0) {
        uint32_t ms = client != NULL ? SH_MIN(left_ms, CLIENT_POLL_MS) : left_ms;
        until = after(until, ms);
        int late = 0;
        while (!w->admitted && !e->stopping && late != ETIMEDOUT)
            late = pthread_cond_timedwait(&w->woken, &e->lock, &until);
        left_ms -= ms;
        if (!w->admitted && client != NULL && client->gone(client->arg))
            break;
    }
}

/* First come, first served. The lock is held. */
static bool wait_for_place(sh_engine *e, const sh_request_client *client)
{
    waiter w = {0};
    pthread_condattr_t attr;
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
    wait_as(e, &w, client);
    if (!w.admitted)
        unlink_waiter(e, &w);
    pthread_cond_destroy(&w.woken);
    return w.admitted;
}

static sh_status fail_waiting(const sh_engine *e, const sh_request_client *client, sh_error *err)
{
    if (e->stopping)
        return sh_fail(err, SH_ERR_CANCELLED, "the node is stopping");
    if (client != NULL && client->gone(client->arg))
        return sh_fail(err, SH_ERR_CANCELLED, "the client is gone");
    return sh_fail(err, SH_ERR_LIMIT, "busy: waited for %u ms, try again", e->o.wait_ms_max);
}

sh_status engine_admit(engine_seat *seat, const sh_request_client *client, sh_error *err)
{
    sh_engine *e = seat->engine;
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
    else if (!wait_for_place(e, client)) /* else the place was handed over */
        status = fail_waiting(e, client, err);
    if (status == SH_OK) {
        seat->model = e->active;
        seat->model->users++;
        seat->id = ++e->last_id;
        e->status.requests++;
    } else {
        e->status.refused++;
    }
    pthread_mutex_unlock(&e->lock);
    return status;
}

uint64_t engine_next_id(sh_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    uint64_t id = ++engine->last_id;
    pthread_mutex_unlock(&engine->lock);
    return id;
}

/* Forgets a slot's text. */
static void clear_slot(slot *s)
{
    if (s->session != NULL)
        sh_session_cut(s->session, 0);
    s->id = s->user = 0;
    s->forgotten = false;
}

/* Does what had to wait until nobody uses the slot. The lock is held. */
static void settle(slot *s)
{
    if (s->forgotten && !s->busy && s->readers == 0)
        clear_slot(s);
}

void engine_leave(engine_seat *seat)
{
    sh_engine *e = seat->engine;
    slot *s = seat->slot;
    model_use *ended = NULL;
    if (s != NULL)
        sh_batcher_leave(e->batcher, &s->member);
    pthread_mutex_lock(&e->lock);
    if (s != NULL) {
        s->client = NULL;
        s->busy = false;
        s->forgotten = s->forgotten || seat->failed;
        settle(s);
        pthread_cond_broadcast(&e->idle);
    }
    if (seat->model != NULL) {
        ended = count_out(e, seat->model);
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
        engine->slots[i].forgotten = true;
        settle(&engine->slots[i]);
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

/* Whose text begins with more of the prompt than the slot's own; it stays as it is until it is
 * released. The lock is held. */
static void find_donor(const engine_seat *seat, uint64_t user, const int32_t *tokens, uint32_t n,
                       engine_match *match)
{
    sh_engine *e = seat->engine;
    for (uint32_t i = 0; i < e->o.slots; i++) {
        slot *s = &e->slots[i];
        uint32_t n_text;
        if (s == seat->slot || s->busy || s->id == 0 || s->forgotten ||
            s->number != seat->model->number || (s->user != user && !e->o.share_prefix))
            continue;
        const int32_t *text = sh_session_text(s->session, &n_text);
        uint32_t common = common_start(text, n_text, tokens, n);
        if (common >= DONATED_MIN && common > match->donated) {
            match->donor = s;
            match->donated = common;
        }
    }
    if (match->donor != NULL)
        match->donor->readers++;
}

engine_match engine_choose_slot(engine_seat *seat, uint64_t user, const int32_t *tokens, uint32_t n)
{
    sh_engine *e = seat->engine;
    engine_match match = {0};
    pthread_mutex_lock(&e->lock);
    slot *best = NULL, *oldest = NULL;
    for (uint32_t i = 0; i < e->o.slots; i++) {
        slot *s = &e->slots[i];
        uint32_t n_text, common;
        if (s->busy)
            continue;
        if (oldest == NULL || (oldest->id != 0 && (s->id == 0 || s->used < oldest->used)))
            oldest = s;
        if (s->id == 0 || s->user != user || s->forgotten)
            continue;
        const int32_t *text = sh_session_text(s->session, &n_text);
        common = common_start(text, n_text, tokens, n);
        if (common > match.shared && 2 * common >= n_text) {
            best = s;
            match.shared = common;
        }
    }
    slot *s = best != NULL ? best : oldest;
    SH_ASSERT(s != NULL); /* the place promises one */
    seat->slot = s;
    s->busy = true;
    s->used = ++e->n_uses;
    if (match.shared == 0)
        find_donor(seat, user, tokens, n, &match);
    while (s->readers > 0)
        pthread_cond_wait(&e->idle, &e->lock);
    if (s->forgotten) { /* meanwhile */
        clear_slot(s);
        s->forgotten = true; /* and of the request that runs now, too */
        match.shared = 0;
    }
    if (s->number != seat->model->number)
        detach(s); /* its model may go at any time from now on */
    pthread_mutex_unlock(&e->lock);
    return match;
}

void engine_release_donor(sh_engine *engine, slot *donor)
{
    if (donor == NULL)
        return;
    pthread_mutex_lock(&engine->lock);
    donor->readers--;
    settle(donor);
    pthread_cond_broadcast(&engine->idle);
    pthread_mutex_unlock(&engine->lock);
}

sh_status engine_attach(engine_seat *seat, sh_error *err)
{
    slot *s = seat->slot;
    const model_use *use = seat->model;
    if (s->number == use->number)
        return SH_OK;
    sh_session_runner runner = engine_session_runner(s, use);
    SH_TRY(sh_session_attach(s->session, use->model, (uint32_t)use->version, &runner, err));
    pthread_mutex_lock(&seat->engine->lock);
    s->number = use->number;
    pthread_mutex_unlock(&seat->engine->lock);
    return SH_OK;
}
