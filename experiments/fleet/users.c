/*
 * The users: each types texts into its node over HTTP, as experiments/sim/user.c does into a model:
 * a few opening words, then every few words a completion is asked for, judged by what the author
 * really wrote, and answered with feedback that says so. Some requests stream.
 *
 * What must hold of every answer: it comes whole; a stream is of one release from its first chunk
 * to [DONE]. A connection may only break when the node was killed on purpose.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "experiments/fleet/fleet.h"
#include "experiments/fleet/web.h"
#include "shared/base/clock.h"

#define OPENING_WORDS    3  /* nobody is offered a word before these */
#define STREAM_ONE_IN    4  /* of a user's requests */
#define STREAM_TOKENS    64 /* of the requests that go on while releases are swapped */
#define STREAM_PROMPT    24 /* tokens */
#define POLL_MS          20
#define BUSY_MS          100
#define BUSY_TRIES       200
#define KILL_NOTICE_MS   10000 /* in which a broken connection is explained by a killed process */
#define CONTEXT_RESERVED (STREAM_TOKENS + 8)

typedef struct {
    fleet_node *node;
    fleet *fleet;
    size_t number; /* 0: the user, others only stream */
    fleet_web web;
    sh_rng rng;
    uint64_t texts_old, texts_new, requests;
    sh_buf reply, text; /* text: of the passage, bytes */
    uint32_t *offsets;  /* [n_tokens + 1] into text */
    size_t offsets_cap;
    const sim_text *passage;
} user;

void fleet_fail(fleet *f, const char *format, ...)
{
    va_list args;
    pthread_mutex_lock(&f->failure_mutex);
    if (!atomic_load(&f->failed)) {
        va_start(args, format);
        vsnprintf(f->failure, sizeof f->failure, format, args);
        va_end(args);
        atomic_store(&f->failed, true);
    }
    pthread_mutex_unlock(&f->failure_mutex);
}

static fleet_mode mode_of(const user *u)
{
    return (fleet_mode)atomic_load(&u->node->mode);
}

static bool types(fleet_mode m)
{
    return m == FLEET_OLD || m == FLEET_NEW || m == FLEET_SLOW;
}

/* ---- passages ---- */

/* The passage's text and where each token begins in it. */
static bool set_passage(user *u, const sim_text *passage)
{
    const sh_tokenizer *tokenizer = u->fleet->sim->models[0].model->tokenizer;
    sh_buf_clear(&u->text);
    if (sh_array_reserve((void **)&u->offsets, &u->offsets_cap, passage->n + 1u, sizeof *u->offsets,
                         1u << 24) != SH_OK)
        return false;
    for (uint32_t i = 0; i < passage->n; i++) {
        u->offsets[i] = (uint32_t)u->text.len;
        if (sh_detokenize(tokenizer, passage->tokens[i], &u->text) != SH_OK)
            return false;
    }
    u->offsets[passage->n] = (uint32_t)u->text.len;
    u->passage = passage;
    return true;
}

/* The text of tokens [from, to); a text's own first space is the tokenizer's, not the author's. */
static json_t *piece(const user *u, uint32_t from, uint32_t to)
{
    const char *at = (const char *)u->text.data + u->offsets[from];
    size_t n = u->offsets[to] - u->offsets[from];
    size_t skip = from == 0 && n > 0 && at[0] == ' ';
    return json_stringn(at + skip, n - skip);
}

static uint32_t skip_words(const user *u, uint32_t at, uint32_t n_words)
{
    const sim_text *t = u->passage;
    for (; n_words && at < t->n; n_words--)
        at += sh_word_length(u->fleet->sim->frozen, t->tokens + at, t->n - at, t->n);
    return at;
}

static const sim_text *next_passage(user *u, bool old)
{
    const sim *s = u->fleet->sim;
    uint32_t i = u->node->index, n_topics = (uint32_t)s->texts.n_topics;
    if (old) {
        const sim_text_list *l = &s->texts.before[SIM_TRAFFIC];
        return &l->texts[(i + u->texts_old++ * s->n_nodes) % l->n];
    }
    uint32_t topic = s->nodes[i].topic;
    const sim_text_list *l = &s->texts.topic[topic][SIM_TRAFFIC];
    uint64_t turn = i / n_topics, sharers = (s->n_nodes - topic + n_topics - 1) / n_topics;
    return &l->texts[(turn + u->texts_new++ * sharers) % l->n];
}

/* ---- requests ---- */

typedef enum { CALL_OK, CALL_GONE, CALL_KILLED, CALL_FAILED } call_result;

/* A connection broke: only a process that was killed explains it. */
static call_result explain(user *u, unsigned life, const sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + KILL_NOTICE_MS;
    while (sh_clock_mono_ms() < end && mode_of(u) != FLEET_STOP) {
        if (atomic_load(&u->node->life) != life) {
            atomic_fetch_add(&u->fleet->traffic.broken, 1);
            return CALL_KILLED;
        }
        usleep(POLL_MS * 1000);
    }
    atomic_fetch_add(&u->fleet->traffic.unexpected, 1);
    fleet_fail(u->fleet, "%s: a request broke: %.150s", u->node->name, err->text);
    return CALL_FAILED;
}

/* The node's port, waited for while it is down; 0: nobody types any more. */
static uint16_t port_of(user *u)
{
    for (;;) {
        unsigned port = atomic_load(&u->node->port);
        if (port || mode_of(u) == FLEET_STOP)
            return (uint16_t)port;
        usleep(POLL_MS * 1000);
    }
}

/* One request; asks again while the node is busy. */
static call_result call(user *u, const fleet_web_request *r, bool whole)
{
    fleet_traffic *t = &u->fleet->traffic;
    sh_error err = {0};
    int code = 0;
    for (int tries = 0; tries < BUSY_TRIES; tries++) {
        unsigned life = atomic_load(&u->node->life);
        uint16_t port = port_of(u);
        if (port == 0)
            return CALL_KILLED;
        sh_status status = whole ? fleet_web_get(&u->web, port, r, &code, &u->reply, &err)
                                 : fleet_web_call(&u->web, port, r, &code, &err);
        if (status != SH_OK)
            return explain(u, life, &err);
        if (code == 200)
            return CALL_OK;
        if (code == 404 && life > 0)
            return CALL_GONE;
        if (code != 429 && code != 503)
            break;
        atomic_fetch_add(&t->refused, 1);
        usleep(BUSY_MS * 1000);
    }
    atomic_fetch_add(&t->unexpected, 1);
    fleet_fail(u->fleet, "%s: %s answered %d", u->node->name, r->path, code);
    return CALL_FAILED;
}

typedef struct {
    char id[64], fingerprint[64];
    sh_buf text;
    bool done, changed, broken;
    uint64_t version;
} answer;

static void note_release(user *u, answer *a)
{
    static const char prefix[] = "shoal-release-";
    if (strncmp(a->fingerprint, prefix, sizeof prefix - 1) == 0)
        a->version = strtoull(a->fingerprint + sizeof prefix - 1, NULL, 10);
    uint_fast64_t seen = atomic_load(&u->node->newest);
    while (a->version > seen && !atomic_compare_exchange_weak(&u->node->newest, &seen, a->version))
        ;
}

/* Takes in a completion object, or a chunk of one. */
static void read_answer(user *u, answer *a, const json_t *root)
{
    const char *id = json_string_value(json_object_get(root, "id"));
    const char *release = json_string_value(json_object_get(root, "system_fingerprint"));
    const char *text = json_string_value(
        json_object_get(json_array_get(json_object_get(root, "choices"), 0), "text"));
    if (!id || !release) {
        a->broken = true;
        return;
    }
    if (a->fingerprint[0])
        a->changed = a->changed || strcmp(a->fingerprint, release) != 0;
    snprintf(a->id, sizeof a->id, "%s", id);
    snprintf(a->fingerprint, sizeof a->fingerprint, "%s", release);
    note_release(u, a);
    if (text && sh_buf_append(&a->text, text, strlen(text)) != SH_OK)
        a->broken = true;
}

typedef struct {
    user *user;
    answer *answer;
    fleet_sse sse;
} stream;

static void take_event(void *arg, const char *data, size_t n)
{
    stream *s = arg;
    if (n == 6 && memcmp(data, "[DONE]", 6) == 0) {
        s->answer->done = true;
        return;
    }
    json_t *root = json_loadb(data, n, 0, NULL);
    if (root)
        read_answer(s->user, s->answer, root);
    else
        s->answer->broken = true;
    json_decref(root);
}

static bool take_piece(void *arg, const uint8_t *bytes, size_t n)
{
    stream *s = arg;
    return fleet_sse_feed(&s->sse, bytes, n);
}

static call_result call_stream(user *u, const fleet_web_request *request, answer *a)
{
    fleet_traffic *t = &u->fleet->traffic;
    stream s = {.user = u, .answer = a};
    fleet_web_request r = *request;
    fleet_sse_init(&s.sse, take_event, &s);
    r.piece = take_piece;
    r.arg = &s;
    call_result result = call(u, &r, false);
    fleet_sse_release(&s.sse);
    uint64_t newest = atomic_load(&u->node->newest);
    atomic_fetch_add(&t->streams, 1);
    if (result == CALL_OK && (!a->done || a->broken)) {
        atomic_fetch_add(&t->streams_cut, 1);
        return CALL_FAILED;
    }
    if (result == CALL_FAILED)
        atomic_fetch_add(&t->streams_cut, 1);
    if (a->changed)
        atomic_fetch_add(&t->streams_changed, 1);
    if (result == CALL_OK && newest > a->version) {
        atomic_fetch_add(&t->streams_over_swap, 1);
        atomic_fetch_or(&t->swapped, newest < 64 ? 1ull << newest : 0);
    }
    return result;
}

static call_result complete(user *u, json_t *prompt, int max_tokens, bool streams, answer *a)
{
    char name[32];
    json_t *body = json_object();
    snprintf(name, sizeof name, "user-%u", u->node->index);
    sh_json_set(body, "model", json_string("shoal"));
    sh_json_set(body, "prompt", prompt);
    sh_json_set(body, "max_tokens", json_integer(max_tokens));
    sh_json_set(body, "temperature", json_integer(0));
    sh_json_set(body, "user", json_string(name));
    sh_json_set(body, "stream", json_boolean(streams));
    char *text = json_dumps(body, JSON_COMPACT);
    fleet_web_request r = {.method = "POST", .path = "/v1/completions", .body = text};
    call_result result = CALL_FAILED;
    json_decref(body);
    if (text && streams) {
        result = call_stream(u, &r, a);
    } else if (text) {
        result = call(u, &r, true);
        json_t *root = result == CALL_OK ? json_loads((char *)u->reply.data, 0, NULL) : NULL;
        if (root)
            read_answer(u, a, root);
        if (result == CALL_OK && (!root || a->broken)) {
            fleet_fail(u->fleet, "%s: an answer is no completion object", u->node->name);
            result = CALL_FAILED;
        }
        json_decref(root);
    }
    free(text);
    return result;
}

/* ---- judging, as a person at the keyboard would ---- */

static bool goes_on(char c)
{
    unsigned char b = (unsigned char)c;
    return b >= 0x80 || b == '\'' || b == '-' || (b >= '0' && b <= '9') ||
           ((b | 0x20) >= 'a' && (b | 0x20) <= 'z');
}

/* The author's next word is tokens [at, to): accepted when the answer begins with just that word,
 * edited when it has the word's first token right. */
static const char *judge(const user *u, const answer *a, uint32_t at, uint32_t to)
{
    const char *word = (const char *)u->text.data + u->offsets[at];
    size_t n = u->offsets[to] - u->offsets[at], first = u->offsets[at + 1] - u->offsets[at];
    const char *got = (const char *)a->text.data;
    if (a->text.len >= n && n > 0 && memcmp(got, word, n) == 0 &&
        (a->text.len == n || !goes_on(word[n - 1]) || !goes_on(got[n])))
        return "accept";
    return first > 1 && a->text.len >= first && memcmp(got, word, first) == 0 ? "edit" : "reject";
}

static call_result send_feedback(user *u, const char *id, const char *action, json_t *text)
{
    json_t *body = json_object();
    sh_json_set(body, "id", json_string(id));
    sh_json_set(body, "action", json_string(action));
    sh_json_set(body, "text", text);
    char *bytes = json_dumps(body, JSON_COMPACT);
    json_decref(body);
    fleet_web_request r = {.method = "POST", .path = "/v1/feedback", .body = bytes};
    call_result result = bytes ? call(u, &r, true) : CALL_FAILED;
    free(bytes);
    if (result == CALL_GONE)
        atomic_fetch_add(&u->fleet->traffic.feedback_gone, 1);
    return result;
}

/* ---- typing ---- */

static void pause_ms(user *u, uint64_t ms)
{
    uint64_t end = sh_clock_mono_ms() + ms;
    while (sh_clock_mono_ms() < end && mode_of(u) == FLEET_SLOW)
        usleep(POLL_MS * 1000);
}

/* One completion and its feedback at token `at`; the author goes on to *next. */
static bool ask(user *u, uint32_t at, uint32_t next)
{
    fleet_traffic *t = &u->fleet->traffic;
    json_t *prompt = piece(u, 0, at), *text = piece(u, at, next);
    answer a = {0};
    bool ok = false;
    sh_buf_init(&a.text, 1u << 16);
    if (!prompt || !text) { /* not UTF-8: nobody could type it */
        json_decref(prompt);
        json_decref(text);
        return false;
    }
    u->requests++;
    call_result result =
        complete(u, prompt, SH_WORD_TOKENS_MAX, u->requests % STREAM_ONE_IN == 0, &a);
    if (result == CALL_OK) {
        uint32_t left = u->passage->n - at;
        uint32_t word = sh_word_length(u->fleet->sim->frozen, u->passage->tokens + at, left,
                                       SH_JUDGED_TOKENS_MAX);
        const char *action = judge(u, &a, at, at + word);
        atomic_fetch_add(&t->asked, 1);
        atomic_fetch_add(action[0] == 'a'   ? &t->accepted
                         : action[0] == 'e' ? &t->edited
                                            : &t->rejected,
                         1);
        if (mode_of(u) == FLEET_SLOW)
            pause_ms(u, (uint64_t)u->fleet->options.pace_ms);
        ok = send_feedback(u, a.id, action, json_incref(text)) == CALL_OK;
    }
    json_decref(text);
    sh_buf_release(&a.text);
    return ok;
}

static uint32_t tokens_max(const user *u)
{
    return u->fleet->sim->models[0].model->config.context - CONTEXT_RESERVED;
}

static void type_passage(user *u)
{
    bool old = mode_of(u) == FLEET_OLD;
    uint32_t between = (uint32_t)u->fleet->options.sim.words_between;
    if (!set_passage(u, next_passage(u, old)))
        return;
    uint32_t n = SH_MIN(u->passage->n, tokens_max(u)), at = skip_words(u, 0, OPENING_WORDS);
    while (at < n && types(mode_of(u)) && (mode_of(u) == FLEET_OLD) == old) {
        uint32_t next = skip_words(u, at, 1 + (uint32_t)sh_rng_below(&u->rng, 2 * between - 1));
        if (!ask(u, at, next))
            return;
        at = next;
    }
}

/* A longer text streams from the middle of a passage of the node's topic. */
static void stream_once(user *u)
{
    answer a = {0};
    const sim_text_list *l =
        &u->fleet->sim->texts.topic[u->fleet->sim->nodes[u->node->index].topic][SIM_TRAFFIC];
    if (!set_passage(u, &l->texts[sh_rng_below(&u->rng, l->n)]))
        return;
    json_t *prompt = piece(u, 0, SH_MIN(u->passage->n, STREAM_PROMPT));
    sh_buf_init(&a.text, 1u << 16);
    if (prompt)
        (void)complete(u, prompt, STREAM_TOKENS, true, &a);
    sh_buf_release(&a.text);
}

static void *live(void *arg)
{
    user *u = arg;
    for (;;) {
        fleet_mode m = mode_of(u);
        if (m == FLEET_STOP)
            break;
        if (u->number == 0 && types(m)) {
            atomic_store(&u->node->typing, true);
            if (types(mode_of(u)))
                type_passage(u);
            atomic_store(&u->node->typing, false);
        } else if (u->number > 0 && atomic_load(&u->node->streaming)) {
            stream_once(u);
        } else {
            usleep(POLL_MS * 1000);
        }
    }
    fleet_web_release(&u->web);
    sh_buf_release(&u->reply);
    sh_buf_release(&u->text);
    free(u->offsets);
    free(u);
    return NULL;
}

sh_status fleet_users_start(fleet *f, sh_error *err)
{
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        fleet_node *n = &f->nodes[i];
        for (size_t k = 0; k < 1 + FLEET_STREAMERS; k++) {
            user *u = sh_calloc(1, sizeof *u);
            if (!u)
                return sh_fail(err, SH_ERR_NO_MEMORY, "users: no memory");
            u->node = n;
            u->fleet = f;
            u->number = k;
            sh_rng_init(&u->rng, (uint64_t)f->options.sim.seed, (uint64_t)i << 8 | k, 0x55534552);
            sh_buf_init(&u->reply, FLEET_WEB_BODY_MAX);
            sh_buf_init(&u->text, 1u << 20);
            if (pthread_create(&n->threads[k], NULL, live, u) != 0) {
                free(u);
                return sh_fail(err, SH_ERR_NO_MEMORY, "users: no thread");
            }
            n->n_threads++;
        }
    }
    return SH_OK;
}

void fleet_users_stop(fleet *f)
{
    for (uint32_t i = 0; f->nodes && i < f->n_nodes; i++)
        atomic_store(&f->nodes[i].mode, FLEET_STOP);
    for (uint32_t i = 0; f->nodes && i < f->n_nodes; i++) {
        fleet_node *n = &f->nodes[i];
        for (size_t k = 0; k < n->n_threads; k++)
            pthread_join(n->threads[k], NULL);
        n->n_threads = 0;
    }
}
