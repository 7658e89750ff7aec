/* The engine against sessions and contexts of their own, on tiny models: the same texts, the same
 * records, and models swapped under streaming requests of many threads. */
#include "tests/node/engine_rig.h"

static void says_what_the_model_says(void **state)
{
    (void)state;
    static const char *const prompts[] = {"the cat", "it is in the hand of a", "x", "\xff\xfe ve"};
    static const char *const users[] = {"ann", "bob", "cy", NULL};
    seen s;
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    for (size_t i = 0; i < SH_COUNT(prompts); i++) {
        expected x;
        char text[TEXT_MAX];
        direct(genesis, prompts[i], 20, &x);
        sh_request r = greedy(prompts[i], 20);
        r.user = users[i];
        sh_generation_info info = run(e, &r, text);
        assert_int_equal(info.version, 1);
        assert_int_equal(info.prompt_tokens, x.n_prompt);
        assert_int_equal(info.cached_tokens, 0);
        assert_int_equal(info.completion_tokens, x.n);
        assert_int_equal(info.finish, x.n == 20 ? SH_FINISH_LENGTH : SH_FINISH_STOP);
        assert_true(info.ttft_us > 0);
        assert_int_equal(s.calls, i + 1);
        assert_int_equal(s.row.id, info.id);
        assert_int_equal(info.id, i + 1);
        assert_int_equal(s.row.offset, x.n_prompt);
        assert_int_equal(s.row.n_context, x.n_prompt);
        assert_int_equal(s.row.n, x.n);
        assert_memory_equal(s.tokens, x.prompt, x.n_prompt * sizeof(int32_t));
        assert_memory_equal(s.tokens + x.n_prompt, x.tokens, x.n * sizeof(int32_t));
        assert_true(s.row.session != 0);
        assert_int_equal(s.row.user, sh_engine_user(users[i]));
        assert_int_equal(s.row.release_version, 1);
        assert_int_equal(s.record.release_version, 1);
        assert_int_equal(s.record.at_ms, 1234);
        assert_int_equal(s.record.output_tokens, x.n);
        assert_int_equal(s.record.ttft_us, info.ttft_us);
        assert_int_equal(s.record.stop, x.n == 20 ? SH_STOP_LIMIT : SH_STOP_END_OF_TEXT);
    }
    sh_engine_destroy(&e);
    assert_true(sh_engine_user("ann") != sh_engine_user("bob") && sh_engine_user("ann") != 0);
    assert_true(sh_engine_user(NULL) == 0);
}

static void equal_seeds_equal_texts(void **state)
{
    (void)state;
    seen s;
    char a[TEXT_MAX], b[TEXT_MAX], c[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    sh_request r = greedy("the st", 24);
    r.temperature = 1;
    for (unsigned i = 0; i < 2; i++) {
        r.top_p = i ? 0.8f : 1.0f;
        r.seed = 11;
        run(e, &r, a);
        run(e, &r, b);
        r.seed = 12;
        run(e, &r, c);
        assert_string_equal(a, b);
        assert_string_not_equal(a, c);
        r.seed = 0; /* from the id: another every time */
        run(e, &r, b);
        run(e, &r, c);
        assert_string_not_equal(b, c);
    }
    sh_engine_destroy(&e);
}

/* ---- one text that grows ---- */

static void same_measurement(const sh_record *a, const sh_record *b)
{
    sh_record x = *a, y = *b; /* but for times, and why it ended */
    x.at_ms = y.at_ms = 0;
    x.ttft_us = y.ttft_us = x.token_us = y.token_us = 0;
    x.stop = y.stop = 0;
    assert_memory_equal(&x, &y, sizeof(x));
}

static void a_growing_prompt_is_one_session(void **state)
{
    (void)state;
    static const char *const prompts[] = {"the cat", "the cat sat on", "the cat sat on the mat of",
                                          "the cat sat on the mat of a hen"};
    seen s;
    sh_session *session = NULL;
    sh_session_options so = {.n_tokens_max = 64, .release_version = 1};
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    OK(sh_session_create(genesis, frozen, &so, &session, &err));
    OK(sh_session_begin(session, &err));
    uint32_t typed = 0;
    uint64_t id = 0;
    for (size_t i = 0; i < SH_COUNT(prompts); i++) {
        expected x = {0};
        sh_completion word;
        char text[TEXT_MAX];
        read_tokens(genesis, prompts[i], &x);
        OK(sh_session_type(session, x.prompt + typed, x.n_prompt - typed, &err));
        OK(sh_session_complete(session, SH_WORD_TOKENS_MAX, &word, &err));
        /* as many tokens as the word has: the same proposal, and so the same record */
        assert_true(word.n > 0);
        sh_request r = greedy(prompts[i], word.n);
        sh_generation_info info = run(e, &r, text);
        assert_int_equal(info.cached_tokens, typed);
        assert_int_equal(s.row.n, word.n);
        assert_memory_equal(s.tokens + x.n_prompt, word.tokens, word.n * sizeof(int32_t));
        same_measurement(&s.record, &word.record);
        assert_true(id == 0 || s.row.session == id);
        id = s.row.session;
        typed = x.n_prompt;
    }
    sh_session_destroy(&session);
    sh_engine_destroy(&e);
}

static void a_retry_is_not_measured_twice(void **state)
{
    (void)state;
    seen s;
    char first[TEXT_MAX], again[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    sh_request r = greedy("the cat sat on the", 8);
    run(e, &r, first);
    uint64_t session = s.row.session;
    uint32_t n = s.record.prompt_tokens;
    assert_true(n > 5 && s.record.prompt_nll > 0);
    sh_request shorter = greedy("the cat sat on", 8), another = greedy("the cat sat on it", 8);
    for (int i = 0; i < 2; i++) {
        static const sh_record none;
        sh_generation_info info = run(e, i ? &shorter : &r, again);
        assert_int_equal(info.cached_tokens, info.prompt_tokens);
        assert_int_equal(s.record.prompt_tokens, 0);
        assert_true(s.record.prompt_nll == 0 && s.record.byte_fallback == 0);
        assert_memory_equal(s.record.projection, none.projection, sizeof(none.projection));
        assert_memory_equal(s.record.bucket, none.bucket, sizeof(none.bucket));
        assert_true(s.record.output_tokens > 0 && s.record.mean_logprob < 0);
        assert_true(s.row.session == session);
        if (i == 0)
            assert_string_equal(again, first);
    }
    /* what goes on from the shorter text, as if the longer one had never been */
    expected x;
    direct(genesis, another.prompt, 8, &x);
    sh_generation_info info = run(e, &another, again);
    assert_int_equal(s.record.prompt_tokens, info.prompt_tokens - info.cached_tokens);
    assert_true(s.record.prompt_tokens > 0 && info.cached_tokens > 0);
    assert_memory_equal(s.tokens + x.n_prompt, x.tokens, x.n * sizeof(int32_t));
    sh_engine_destroy(&e);
}

static void texts_and_users_are_kept_apart(void **state)
{
    (void)state;
    seen s;
    char text[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 2});
    sh_request a = greedy("the cat sat on the", 4), b = a, c = greedy("of in and is to", 4);
    a.user = "ann";
    b.user = c.user = "bob";
    assert_int_equal(run(e, &a, text).cached_tokens, 0);
    uint64_t ann = s.row.session;
    assert_int_equal(run(e, &b, text).cached_tokens, 0);
    uint64_t bob = s.row.session;
    assert_true(ann != bob);
    assert_true(run(e, &a, text).cached_tokens > 0);
    assert_int_equal(run(e, &c, text).cached_tokens, 0); /* over bob's, the oldest */
    assert_true(run(e, &a, text).cached_tokens > 0);
    assert_true(s.row.session == ann);
    assert_int_equal(run(e, &b, text).cached_tokens, 0);
    assert_true(s.row.session != bob); /* it is a new text now */
    /* a short start in common is no continuation of a long text */
    sh_request d = greedy("the", 4);
    d.user = "ann";
    run(e, &d, text);
    assert_true(s.row.session != ann);
    sh_engine_forget(e);
    assert_int_equal(run(e, &b, text).cached_tokens, 0);
    sh_engine_destroy(&e);
}

/* ---- the text that is shown ---- */

static void stop_strings(void **state)
{
    (void)state;
    static const char *const prompt = "the cat";
    seen s;
    expected x;
    char whole[TEXT_MAX], text[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    sh_request r = greedy(prompt, 24);
    run(e, &r, whole);
    direct(genesis, prompt, 24, &x);
    size_t bytes = strlen(whole);
    assert_true(bytes > 12);
    unsigned straddled = 0;
    for (size_t at = 0; at + 3 <= bytes; at++) {
        /* three bytes of the text itself: often parts of two tokens */
        char stop[4] = {whole[at], whole[at + 1], whole[at + 2], 0};
        if (((unsigned char)stop[0] & 0xc0) == 0x80 || strstr(stop, "\xef") != NULL)
            continue; /* in the middle of a character, or what was no UTF-8 */
        r.stops[0] = "no such text";
        r.stops[1] = stop;
        r.n_stops = 2;
        sh_generation_info info = run(e, &r, text);
        size_t first = (size_t)(strstr(whole, stop) - whole);
        assert_int_equal(strlen(text), first);
        assert_memory_equal(text, whole, first);
        assert_int_equal(info.finish, SH_FINISH_STOP);
        assert_int_equal(s.record.stop, SH_STOP_STRING);
        assert_true(s.row.n < info.completion_tokens);
        /* the row's tokens are those that are in the text as a whole */
        assert_memory_equal(s.tokens + x.n_prompt, x.tokens, s.row.n * sizeof(int32_t));
        straddled += info.completion_tokens - s.row.n > 1;
    }
    assert_true(straddled > 0);
    r.stops[0] = "never said";
    r.n_stops = 1;
    assert_int_equal(run(e, &r, text).finish, SH_FINISH_LENGTH);
    assert_string_equal(text, whole); /* nothing that was held back is lost */
    sh_engine_destroy(&e);
}

/* ---- limits ---- */

static sh_status refused(sh_engine *e, const sh_request *r, bool *too_long)
{
    sh_generation *g = NULL;
    sh_status status = sh_generation_begin(e, r, &g, too_long, &err);
    assert_true(status != SH_OK);
    assert_null(g);
    return status;
}

static void what_is_wrong_is_refused(void **state)
{
    (void)state;
    seen s;
    bool too_long;
    char text[TEXT_MAX], name[SH_USER_BYTES_MAX + 2], *huge = malloc(100000);
    sh_engine *e = new_engine(&s, (sh_engine_options){0});
    sh_request empty = greedy("", 4), r = greedy("the", 4);
    assert_non_null(huge);
    assert_int_equal(refused(e, &empty, &too_long), SH_ERR_INVALID);
    assert_false(too_long);
    memset(huge, 'x', 99999);
    huge[99999] = 0;
    memset(name, 'n', sizeof(name) - 1);
    name[sizeof(name) - 1] = 0;
    sh_request bad[10];
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        bad[i] = r;
    bad[0].max_tokens = 0;
    bad[1].max_tokens = SH_MAX_TOKENS_MAX + 1;
    bad[2].temperature = -1;
    bad[3].temperature = NAN;
    bad[4].temperature = 2.5f;
    bad[5].top_p = 1.5f;
    bad[6].top_p = NAN;
    bad[7].n_stops = SH_STOPS_MAX + 1;
    bad[8].n_stops = 1;
    bad[8].stops[0] = "";
    bad[9].user = name;
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        assert_int_equal(refused(e, &bad[i], &too_long), SH_ERR_INVALID);
        assert_false(too_long);
    }
    sh_request just = greedy("the", 62), over = greedy("the", 63), long_prompt = greedy(huge, 1);
    assert_int_equal(run(e, &just, text).prompt_tokens, 1); /* BOS, one token and 62 */
    assert_int_equal(refused(e, &over, &too_long), SH_ERR_LIMIT);
    assert_true(too_long);
    assert_int_equal(refused(e, &long_prompt, &too_long), SH_ERR_LIMIT);
    assert_true(too_long);
    assert_int_equal(sh_engine_get_status(e).running, 0);
    assert_int_equal(s.calls, 1);
    sh_engine_destroy(&e);
    free(huge);
    sh_engine_options o = {.frozen = frozen, .now_ms = fixed_clock, .finished = take, .arg = &s};
    OK(sh_engine_create(&o, &e, &err));
    assert_int_equal(refused(e, &r, &too_long), SH_ERR_LIMIT); /* no model yet */
    assert_false(too_long);
    assert_null(sh_engine_use_model(e, NULL));
    sh_engine_destroy(&e);
    o.context = 65; /* the model has 64 */
    OK(sh_engine_create(&o, &e, &err));
    sh_model *model = open_tiny(1);
    assert_int_equal(sh_engine_activate(e, &model, 1, &err), SH_ERR_MISMATCH);
    assert_non_null(model);
    sh_model_close(&model);
    sh_engine_destroy(&e);
}

static void busy_is_said(void **state)
{
    (void)state;
    seen s;
    bool too_long;
    char text[TEXT_MAX];
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 1, .wait_ms_max = 5});
    sh_request r = greedy("the cat", 4), other = greedy("of it", 4);
    sh_generation *g = begin(e, &r);
    assert_int_equal(refused(e, &other, &too_long), SH_ERR_LIMIT); /* waited in vain */
    assert_false(too_long);
    assert_non_null(strstr(err.text, "busy"));
    sh_engine_status status = sh_engine_get_status(e);
    assert_int_equal(status.running, 1);
    assert_int_equal(status.waiting, 0);
    assert_int_equal(status.refused, 1);
    sh_generation_end(&g); /* before its first token */
    assert_int_equal(s.calls, 1);
    assert_int_equal(s.record.stop, SH_STOP_CANCELLED);
    assert_int_equal(s.record.output_tokens, 0);
    assert_true(s.record.prompt_tokens > 0);
    run(e, &other, text);
    status = sh_engine_get_status(e);
    assert_int_equal(status.running, 0);
    assert_int_equal(status.requests, 2);
    assert_int_equal(status.completion_tokens, s.record.output_tokens);
    sh_engine_destroy(&e);
}

static void pause_briefly(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Until `field` of the status is `value`. */
#define AWAIT(e, field, value)                                                                     \
    do {                                                                                           \
        int tries_ = 0;                                                                            \
        while (sh_engine_get_status(e).field != (value) && tries_++ < PATIENCE_MS)                 \
            pause_briefly();                                                                       \
        assert_int_equal(sh_engine_get_status(e).field, value);                                    \
    } while (0)

typedef struct {
    sh_engine *engine;
    sh_status status;
    unsigned order; /* of being served */
    atomic_uint *served;
} queued;

static void *ask(void *arg)
{
    queued *q = arg;
    sh_request r = greedy("of it", 2);
    sh_generation *g = NULL;
    sh_error why;
    bool too_long;
    q->status = sh_generation_begin(q->engine, &r, &g, &too_long, &why);
    q->order = atomic_fetch_add(q->served, 1);
    sh_generation_end(&g);
    return NULL;
}

static void *forget(void *arg)
{
    sh_engine_forget(arg);
    return NULL;
}

static void who_waits_is_served_in_turn_or_woken_by_stop(void **state)
{
    (void)state;
    for (int stop = 0; stop < 2; stop++) {
        enum { N = 4 };
        seen s;
        bool too_long;
        queued q[N];
        pthread_t threads[N];
        atomic_uint served = 0;
        sh_engine *e = new_engine(
            &s, (sh_engine_options){.slots = 1, .queue_max = N, .wait_ms_max = PATIENCE_MS});
        sh_request r = greedy("the cat", 4);
        sh_generation *g = begin(e, &r);
        for (unsigned i = 0; i < N; i++) {
            q[i] = (queued){.engine = e, .served = &served};
            assert_int_equal(pthread_create(&threads[i], NULL, ask, &q[i]), 0);
            AWAIT(e, waiting, i + 1);
        }
        assert_int_equal(refused(e, &r, &too_long), SH_ERR_LIMIT); /* the queue is full */
        if (stop) {
            sh_engine_stop(e);
            assert_int_equal(refused(e, &r, &too_long), SH_ERR_CANCELLED);
        } else {
            sh_generation_end(&g);
        }
        for (unsigned i = 0; i < N; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(q[i].status, stop ? SH_ERR_CANCELLED : SH_OK);
            if (!stop)
                assert_int_equal(q[i].order, i);
        }
        if (stop) { /* what runs may end */
            sh_buf text;
            bool done = false;
            sh_buf_init(&text, TEXT_MAX);
            while (!done)
                OK(sh_generation_next(g, &text, &done, &err));
            sh_buf_release(&text);
            sh_generation_end(&g);
        }
        assert_int_equal(s.calls, stop ? 1 : N + 1);
        sh_engine_destroy(&e);
    }
}

static void forgetting_waits_for_what_runs(void **state)
{
    (void)state;
    seen s;
    char text[TEXT_MAX];
    pthread_t thread;
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 2});
    sh_request r = greedy("the cat sat", 4), other = greedy("of it in", 4);
    sh_generation *g = begin(e, &r);
    run(e, &other, text);
    assert_int_equal(pthread_create(&thread, NULL, forget, e), 0);
    /* the free slot is emptied at once; the thread waits for the other one */
    int tries = 0;
    while (run(e, &other, text).cached_tokens != 0 && tries++ < PATIENCE_MS)
        pause_briefly();
    assert_int_equal(pthread_tryjoin_np(thread, NULL), EBUSY);
    sh_generation_end(&g);
    pthread_join(thread, NULL);
    assert_int_equal(run(e, &r, text).cached_tokens, 0);
    g = begin(e, &r);
    sh_engine_forget_soon(e);
    assert_false(sh_engine_is_forgotten(e));
    assert_int_equal(run(e, &other, text).cached_tokens, 0); /* others do not wait */
    sh_generation_end(&g);
    assert_true(sh_engine_is_forgotten(e));
    assert_int_equal(run(e, &r, text).cached_tokens, 0);
    sh_engine_destroy(&e);
}

/* ---- swaps ---- */

enum { RELEASES = 5, STREAMERS = 8, PROMPTS = 3 };
static const char *const swap_prompts[PROMPTS] = {"the cat sat", "of in and is", "a he is to"};

typedef struct {
    sh_engine *engine;
    expected *wanted; /* [RELEASES, PROMPTS] */
    unsigned index;
    atomic_bool *stop;
    atomic_uint *done, *versions; /* bits */
    char wrong[256];
} streamer;

static void stream_once(streamer *t, unsigned turn)
{
    unsigned p = (t->index + turn) % PROMPTS;
    sh_request r = greedy(swap_prompts[p], 24);
    char user[16];
    sh_generation *g = NULL;
    bool too_long, done = false;
    sh_error why = {0};
    sh_buf text;
    snprintf(user, sizeof(user), "user-%u", t->index / 2);
    r.user = user;
    sh_buf_init(&text, TEXT_MAX);
    sh_status status = sh_generation_begin(t->engine, &r, &g, &too_long, &why);
    if (status != SH_OK) {
        snprintf(t->wrong, sizeof(t->wrong), "begin: %.200s", why.text);
        return;
    }
    while (status == SH_OK && !done)
        status = sh_generation_next(g, &text, &done, &why);
    sh_generation_info info = sh_generation_get_info(g);
    sh_generation_end(&g);
    if (status != SH_OK || info.version < 1 || info.version > RELEASES) {
        snprintf(t->wrong, sizeof(t->wrong), "next: %.200s", why.text);
    } else {
        const expected *x = &t->wanted[(info.version - 1) * PROMPTS + p];
        if (text.len != x->bytes || memcmp(text.data, x->text, x->bytes) != 0)
            snprintf(t->wrong, sizeof(t->wrong), "release %u said '%.*s', alone '%.*s'",
                     (unsigned)info.version, SH_MIN((int)text.len, 80), (const char *)text.data,
                     SH_MIN((int)x->bytes, 80), x->text);
        atomic_fetch_or(t->versions, 1u << info.version);
        atomic_fetch_add(t->done, 1);
    }
    sh_buf_release(&text);
}

static void *stream(void *arg)
{
    streamer *t = arg;
    for (unsigned turn = 0; !atomic_load(t->stop); turn++) {
        stream_once(t, turn);
        if (t->wrong[0] != 0)
            atomic_store(t->stop, true);
    }
    return NULL;
}

/* Makes the text what a user is shown of it. */
static void show(expected *x)
{
    sh_text_filter f;
    sh_buf text;
    sh_buf_init(&text, TEXT_MAX);
    OK(sh_text_filter_init(&f, NULL, 0, 64, &err));
    for (uint32_t i = 0; i < x->n; i++)
        OK(sh_text_filter_add(&f, genesis->tokenizer, x->tokens[i], &text, &err));
    OK(sh_text_filter_end(&f, &text, &err));
    memcpy(x->text, text.data, text.len);
    x->bytes = text.len;
    sh_text_filter_release(&f);
    sh_buf_release(&text);
}

static void requests_end_on_the_release_that_they_began_with(void **state)
{
    (void)state;
    static expected wanted[RELEASES * PROMPTS];
    for (unsigned v = 0; v < RELEASES; v++) {
        sh_model *m = open_tiny(v + 1);
        for (unsigned p = 0; p < PROMPTS; p++) {
            direct(m, swap_prompts[p], 24, &wanted[v * PROMPTS + p]);
            show(&wanted[v * PROMPTS + p]);
            assert_true(v == 0 || strcmp(wanted[v * PROMPTS + p].text,
                                         wanted[(v - 1) * PROMPTS + p].text) != 0);
        }
        sh_model_close(&m);
    }
    seen s;
    atomic_bool stop = false;
    atomic_uint done = 0, versions = 0;
    pthread_t threads[STREAMERS];
    static streamer t[STREAMERS];
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 3, .wait_ms_max = PATIENCE_MS});
    /* one that began on the first release and is there until the last */
    sh_request r = greedy(swap_prompts[0], 24);
    sh_generation *longest = begin(e, &r);
    for (unsigned i = 0; i < STREAMERS; i++) {
        t[i] = (streamer){.engine = e,
                          .wanted = wanted,
                          .index = i,
                          .stop = &stop,
                          .done = &done,
                          .versions = &versions};
        assert_int_equal(pthread_create(&threads[i], NULL, stream, &t[i]), 0);
    }
    for (unsigned v = 1; v <= RELEASES; v++) {
        if (v > 1) {
            sh_model *m = open_tiny(v);
            OK(sh_engine_activate(e, &m, v, &err));
        }
        for (int tries = 0; !(atomic_load(&versions) >> v & 1) && tries < PATIENCE_MS; tries++) {
            if (atomic_load(&stop))
                break; /* something went wrong; it is told below */
            pause_briefly();
        }
    }
    uint64_t version = 0;
    const sh_model *reader = sh_engine_use_model(e, &version);
    assert_int_equal(version, RELEASES);
    sh_model *last = open_tiny(1);
    OK(sh_engine_activate(e, &last, 1, &err)); /* a fall-back to an earlier one */
    atomic_store(&stop, true);
    for (unsigned i = 0; i < STREAMERS; i++) {
        pthread_join(threads[i], NULL);
        assert_string_equal(t[i].wrong, "");
    }
    assert_int_equal(atomic_load(&versions) >> 1, (1u << RELEASES) - 1);
    sh_engine_status status = sh_engine_get_status(e);
    assert_int_equal(status.models_open, 3); /* the active, the reader's, the longest request's */
    assert_int_equal(reader->config.vocab, genesis->config.vocab);
    sh_engine_release_model(e, reader);
    assert_int_equal(sh_engine_get_status(e).models_open, 2);
    sh_buf text;
    bool over = false;
    sh_buf_init(&text, TEXT_MAX);
    while (!over)
        OK(sh_generation_next(longest, &text, &over, &err));
    assert_int_equal(text.len, wanted[0].bytes);
    assert_memory_equal(text.data, wanted[0].text, text.len);
    sh_buf_release(&text);
    assert_int_equal(sh_generation_get_info(longest).version, 1);
    sh_generation_end(&longest);
    status = sh_engine_get_status(e);
    assert_int_equal(status.models_open, 1);
    assert_int_equal(status.running, 0);
    assert_int_equal(s.calls, atomic_load(&done) + 1);
    assert_int_equal(status.requests, s.calls);
    sh_engine_destroy(&e);
}

static void a_text_goes_on_over_a_swap(void **state)
{
    (void)state;
    seen s;
    char text[TEXT_MAX];
    expected x;
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 1});
    sh_request r = greedy("the cat sat on", 4), more = greedy("the cat sat on the mat", 4);
    uint32_t before = run(e, &r, text).prompt_tokens;
    uint64_t session = s.row.session;
    sh_model *m = open_tiny(2);
    direct(m, more.prompt, 4, &x);
    OK(sh_engine_activate(e, &m, 2, &err));
    assert_int_equal(sh_engine_get_status(e).models_open, 1);
    sh_engine_set_last_id(e, 1000);
    sh_generation_info info = run(e, &more, text);
    assert_int_equal(info.id, 1001);
    assert_int_equal(info.version, 2);
    assert_int_equal(info.cached_tokens, 0);                               /* all was run again */
    assert_int_equal(s.record.prompt_tokens, info.prompt_tokens - before); /* and not measured */
    assert_int_equal(s.record.release_version, 2);
    assert_true(s.row.session == session);
    assert_memory_equal(s.tokens + x.n_prompt, x.tokens, x.n * sizeof(int32_t));
    m = open_tiny(3); /* forgetting and a new text touch no closed model */
    OK(sh_engine_activate(e, &m, 3, &err));
    sh_engine_forget(e);
    assert_int_equal(run(e, &r, text).version, 3);
    assert_true(s.row.session != session);
    sh_engine_destroy(&e);
}

/* Every allocation fails in turn: an error, and the engine goes on as if nothing had been. */
static void no_memory_is_survived(void **state)
{
    (void)state;
    seen s;
    char text[TEXT_MAX], want[TEXT_MAX];
    bool too_long;
    sh_engine *e = new_engine(&s, (sh_engine_options){.slots = 1});
    sh_request r = greedy("the cat sat", 8);
    unsigned failed[3] = {0}; /* creating, activating, asking */
    r.temperature = 0.5f;
    r.top_p = 0.9f;
    r.seed = 3;
    for (size_t n = 1;; n++) {
        sh_engine_options o = {
            .frozen = frozen, .now_ms = fixed_clock, .finished = take, .arg = &s};
        sh_engine *other = NULL;
        sh_model *m = open_tiny(2);
        sh_alloc_fail_after(n);
        sh_status status = sh_engine_create(&o, &other, &err);
        failed[0] += status != SH_OK;
        if (status == SH_OK) {
            status = sh_engine_activate(other, &m, 1, &err);
            failed[1] += status != SH_OK;
        }
        sh_alloc_fail_after(0);
        assert_true(status == SH_OK || status == SH_ERR_NO_MEMORY);
        sh_engine_destroy(&other);
        sh_model_close(&m);
        if (status == SH_OK)
            break;
    }
    for (size_t n = 1;; n++) { /* with a switch of models each time */
        sh_generation *g = NULL;
        sh_model *m = open_tiny(2);
        OK(sh_engine_activate(e, &m, n + 1, &err));
        sh_alloc_fail_after(n);
        sh_status status = sh_generation_begin(e, &r, &g, &too_long, &err);
        sh_alloc_fail_after(0);
        assert_int_equal(sh_engine_get_status(e).running, status == SH_OK);
        sh_generation_end(&g);
        assert_int_equal(sh_engine_get_status(e).models_open, 1);
        if (status == SH_OK)
            break;
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        failed[2]++;
    }
    assert_true(failed[0] >= 2 && failed[1] >= 2 && failed[2] >= 4);
    run(e, &r, text);
    sh_engine_forget(e);
    run(e, &r, want);
    assert_string_equal(text, want);
    sh_engine_destroy(&e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(says_what_the_model_says),
        cmocka_unit_test(equal_seeds_equal_texts),
        cmocka_unit_test(a_growing_prompt_is_one_session),
        cmocka_unit_test(a_retry_is_not_measured_twice),
        cmocka_unit_test(texts_and_users_are_kept_apart),
        cmocka_unit_test(stop_strings),
        cmocka_unit_test(what_is_wrong_is_refused),
        cmocka_unit_test(busy_is_said),
        cmocka_unit_test(who_waits_is_served_in_turn_or_woken_by_stop),
        cmocka_unit_test(forgetting_waits_for_what_runs),
        cmocka_unit_test(requests_end_on_the_release_that_they_began_with),
        cmocka_unit_test(a_text_goes_on_over_a_swap),
        cmocka_unit_test(no_memory_is_survived),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
