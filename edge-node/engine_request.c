#include "edge-node/engine_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TOKEN_BYTES_MAX 64u /* a prompt has more tokens than bytes / this; refused unread */

typedef struct {
    float logprob;
    uint32_t n;
    sh_token_logprob likeliest[SH_TOP_LOGPROBS_MAX];
} token_note;

struct sh_generation {
    engine_seat seat;
    sh_text_filter filter;
    sh_generation_info info;
    uint64_t user, spent_ns, first_ns; /* computing and waiting, all and to the first token */
    int32_t *tokens;                   /* [prompt_tokens + max_tokens]: the prompt, the proposal */
    token_note *notes;                 /* [max_tokens]; NULL: not asked for */
    uint32_t max_tokens, top_logprobs;
    sh_proposing how;
    const char *stops[SH_STOPS_MAX + 1]; /* copies: the client's, and what ends a chat's turn */
    size_t n_stops;
    bool proposing, done, prompt_counted;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- a request ---- */

static sh_status check_request(const sh_request *r, sh_error *err)
{
    if (r->n_messages == 0 && (r->prompt == NULL || r->prompt_bytes == 0))
        return sh_fail(err, SH_ERR_INVALID, "the prompt is empty: there is nothing to go on from");
    if (r->max_tokens == 0 || r->max_tokens > SH_MAX_TOKENS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "max_tokens %u is outside 1 to %d", r->max_tokens,
                       SH_MAX_TOKENS_MAX);
    if (!(r->temperature >= 0 && r->temperature <= SH_TEMPERATURE_MAX))
        return sh_fail(err, SH_ERR_INVALID, "temperature %g is outside 0 to %d",
                       (double)r->temperature, SH_TEMPERATURE_MAX);
    if (!(r->top_p >= 0 && r->top_p <= 1))
        return sh_fail(err, SH_ERR_INVALID, "top_p %g is outside 0 to 1", (double)r->top_p);
    if (r->top_k > SH_TOP_K_MAX)
        return sh_fail(err, SH_ERR_INVALID, "top_k %u is outside 0 to %u", r->top_k, SH_TOP_K_MAX);
    if (!(r->min_p >= 0 && r->min_p <= 1))
        return sh_fail(err, SH_ERR_INVALID, "min_p %g is outside 0 to 1", (double)r->min_p);
    if (!(r->repeat_penalty >= 0 && r->repeat_penalty <= SH_PENALTY_MAX))
        return sh_fail(err, SH_ERR_INVALID, "repeat_penalty %g is outside 0 to %d",
                       (double)r->repeat_penalty, SH_PENALTY_MAX);
    if (r->top_logprobs > SH_TOP_LOGPROBS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "top_logprobs %u is outside 0 to %d", r->top_logprobs,
                       SH_TOP_LOGPROBS_MAX);
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
                   g->max_tokens, g->seat.engine->o.context);
}

static bool puts_bos(const sh_tokenizer *tokenizer)
{
    return sh_tokenizer_adds_bos(tokenizer) && sh_tokenizer_bos(tokenizer) >= 0;
}

/* The messages' tokens in the model's own way, without BOS. */
static sh_status tokenize_chat(const sh_generation *g, const sh_request *r, int32_t **out,
                               size_t *n_out, sh_error *err)
{
    const model_use *use = g->seat.model;
    const sh_tokenizer *tokenizer = use->model->tokenizer;
    int32_t *tokens = NULL;
    size_t n = 0;
    SH_TRY(sh_chat_tokenize(tokenizer, use->family, r->messages, r->n_messages, &tokens, &n, err));
    if (n > 0 && puts_bos(tokenizer) && tokens[0] == sh_tokenizer_bos(tokenizer))
        memmove(tokens, tokens + 1, --n * sizeof(*tokens));
    *out = tokens;
    *n_out = n;
    return SH_OK;
}

static size_t request_bytes(const sh_request *r)
{
    size_t n = r->prompt_bytes;
    for (size_t i = 0; i < r->n_messages; i++)
        n += r->messages[i].content_bytes;
    return n;
}

/* The prompt's tokens, without BOS: offsets count from the text's start. */
static sh_status read_prompt(sh_generation *g, const sh_request *r, bool *too_long, sh_error *err)
{
    const sh_tokenizer *tokenizer = g->seat.model->model->tokenizer;
    uint32_t context = g->seat.engine->o.context;
    size_t n = 0;
    if (request_bytes(r) > (size_t)context * TOKEN_BYTES_MAX)
        return fail_too_long(g, too_long, err);
    if (r->n_messages > 0)
        SH_TRY(tokenize_chat(g, r, &g->tokens, &n, err));
    else
        SH_TRY(sh_tokenize(tokenizer, r->prompt, r->prompt_bytes, 0, &g->tokens, &n, err));
    if (n == 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "the prompt has no token: there is nothing to go on "
                       "from");
    if (n + puts_bos(tokenizer) + r->max_tokens > context)
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

/* A text that is new in its slot: from the start, or from a donor's. Returns in *there how many of
 * its tokens need not be typed. */
static sh_status begin_text(sh_generation *g, const engine_match *match, uint32_t *there,
                            sh_error *err)
{
    slot *s = g->seat.slot;
    s->id = new_text_id();
    s->user = g->user;
    *there = match->donated;
    if (match->donor != NULL)
        return sh_session_adopt(s->session, match->donor->session, match->donated, err);
    return sh_session_begin(s->session, err);
}

/* Brings the slot's session to the prompt: what it shares is not measured again, what is new is. */
static sh_status type_prompt(sh_generation *g, const sh_request_client *client, sh_error *err)
{
    const uint32_t n = g->info.prompt_tokens;
    engine_match match = engine_choose_slot(&g->seat, g->user, g->tokens, n);
    slot *s = g->seat.slot;
    uint32_t there = match.shared;
    s->client = client;
    sh_session_cut(s->session, there);
    if (s->number == g->seat.model->number)
        g->info.cached_tokens = there;
    sh_status status = engine_attach(&g->seat, err);
    if (status == SH_OK && there == 0) {
        status = begin_text(g, &match, &there, err);
        g->info.cached_tokens = there;
    }
    engine_release_donor(g->seat.engine, match.donor);
    if (status == SH_OK)
        status = sh_session_type(s->session, g->tokens + there, n - there, err);
    s->client = NULL;
    return status;
}

static sh_status start_filter(sh_generation *g, sh_error *err)
{
    sh_text_filter_release(&g->filter);
    return sh_text_filter_init(&g->filter, g->stops, g->n_stops, g->max_tokens, err);
}

static sh_status propose(sh_generation *g, sh_error *err)
{
    SH_TRY(sh_session_propose(g->seat.slot->session, &g->how, err));
    g->proposing = true;
    return SH_OK;
}

static sh_status keep_request(sh_generation *g, const sh_request *r, sh_error *err)
{
    g->user = sh_engine_user(r->user);
    g->max_tokens = r->max_tokens;
    g->top_logprobs = r->top_logprobs;
    g->how = (sh_proposing){.max_tokens = r->max_tokens,
                            .sampling = {.temperature = r->temperature,
                                         .top_k = r->top_k,
                                         .top_p = r->top_p,
                                         .min_p = r->min_p,
                                         .repeat_penalty = r->repeat_penalty,
                                         .seed = r->seed}};
    for (size_t i = 0; i < r->n_stops; i++) {
        char *copy = strdup(r->stops[i]);
        if (copy == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "a request: no memory");
        g->stops[g->n_stops++] = copy;
    }
    g->notes = r->logprobs ? sh_calloc(r->max_tokens, sizeof(*g->notes)) : NULL;
    if (r->logprobs && g->notes == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a request: no memory");
    return SH_OK;
}

/* What ends a chat's turn where the family has no token for it. */
static sh_status add_chat_stop(sh_generation *g, const sh_request *r, sh_error *err)
{
    const char *stop = r->n_messages > 0 ? sh_chat_stop_text(g->seat.model->family) : NULL;
    char *copy = stop != NULL ? strdup(stop) : NULL;
    if (stop != NULL && copy == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a request: no memory");
    if (copy != NULL)
        g->stops[g->n_stops++] = copy;
    return SH_OK;
}

static sh_status start(sh_generation *g, const sh_request *r, bool *too_long, sh_error *err)
{
    SH_TRY(keep_request(g, r, err));
    SH_TRY(engine_admit(&g->seat, r->client, err));
    g->info.id = g->seat.id;
    g->info.version = g->seat.model->version;
    if (g->how.sampling.seed == 0)
        g->how.sampling.seed = g->info.id;
    SH_TRY(add_chat_stop(g, r, err));
    SH_TRY(start_filter(g, err));
    SH_TRY(read_prompt(g, r, too_long, err));
    sh_status status = type_prompt(g, r->client, err);
    if (status == SH_OK)
        status = propose(g, err);
    g->seat.failed = status != SH_OK;
    return status;
}

static void free_generation(sh_generation *g)
{
    sh_text_filter_release(&g->filter);
    for (size_t i = 0; i < g->n_stops; i++)
        free((char *)g->stops[i]);
    free(g->notes);
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
    g->seat.engine = engine;
    sh_status status = start(g, request, too_long, err);
    if (status != SH_OK) {
        engine_leave(&g->seat);
        free_generation(g);
        return status;
    }
    g->spent_ns = now_ns() - begun;
    *out = g;
    return SH_OK;
}

static void note(sh_generation *g, int32_t token)
{
    token_note *n = &g->notes[g->info.completion_tokens];
    uint32_t vocab = g->seat.model->model->config.vocab;
    n->n = SH_MIN(g->top_logprobs, vocab);
    sh_logprobs(sh_session_logits(g->seat.slot->session), vocab, token, n->n, n->likeliest,
                &n->logprob);
}

/* One token more, or the end. */
static sh_status advance(sh_generation *g, sh_buf *text, sh_error *err)
{
    int32_t token;
    bool over;
    SH_TRY(sh_session_next(g->seat.slot->session, &token, &over, err));
    if (over) {
        g->done = true;
        g->info.finish =
            g->info.completion_tokens == g->max_tokens ? SH_FINISH_LENGTH : SH_FINISH_STOP;
        return sh_text_filter_end(&g->filter, text, err);
    }
    if (g->notes != NULL)
        note(g, token);
    g->tokens[g->info.prompt_tokens + g->info.completion_tokens++] = token;
    SH_TRY(sh_text_filter_add(&g->filter, g->seat.model->model->tokenizer, token, text, err));
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
    SH_ASSERT(!g->seat.failed);
    while (status == SH_OK && !g->done && text->len == before) {
        uint64_t begun = now_ns();
        status = advance(g, text, err);
        g->spent_ns += now_ns() - begun;
        if (g->first_ns == 0)
            g->first_ns = g->spent_ns;
    }
    g->seat.failed = status != SH_OK;
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
    record.at_ms = g->seat.engine->o.now_ms(g->seat.engine->o.arg);
    record.ttft_us = info.ttft_us;
    record.token_us = info.token_us;
    if (g->filter.stopped)
        record.stop = SH_STOP_STRING;
    sh_completion_row row = {.id = info.id,
                             .user = g->user,
                             .session = g->seat.slot->id,
                             .offset = info.prompt_tokens,
                             .n_context = n_context,
                             .n = shown,
                             .tokens = g->tokens + info.prompt_tokens - n_context,
                             .at_ms = record.at_ms,
                             .release_version = (uint32_t)info.version};
    g->seat.engine->o.finished(g->seat.engine->o.arg, &record, &row);
}

/* Ends the answer under way: its record and row are handed over. */
static void end_answer(sh_generation *g)
{
    sh_engine *e = g->seat.engine;
    sh_proposal proposal;
    if (!g->proposing)
        return;
    g->proposing = false;
    sh_session_end(g->seat.slot->session, &proposal);
    sh_batcher_leave(e->batcher, &g->seat.slot->member);
    if (!g->seat.failed)
        hand_over(g, &proposal);
    pthread_mutex_lock(&e->lock);
    e->status.prompt_tokens += g->prompt_counted ? 0 : g->info.prompt_tokens;
    g->prompt_counted = true;
    e->status.completion_tokens += g->info.completion_tokens;
    pthread_mutex_unlock(&e->lock);
}

void sh_generation_end(sh_generation **generation)
{
    sh_generation *g = *generation;
    if (g == NULL)
        return;
    *generation = NULL;
    end_answer(g);
    engine_leave(&g->seat);
    free_generation(g);
}

sh_status sh_generation_again(sh_generation *generation, sh_error *err)
{
    sh_generation *g = generation;
    uint64_t begun = now_ns();
    SH_ASSERT(!g->seat.failed);
    end_answer(g);
    g->info = (sh_generation_info){.id = engine_next_id(g->seat.engine),
                                   .version = g->info.version,
                                   .prompt_tokens = g->info.prompt_tokens,
                                   .cached_tokens = g->info.prompt_tokens};
    g->how.sampling.seed++;
    g->done = false;
    g->first_ns = 0;
    sh_status status = start_filter(g, err);
    if (status == SH_OK)
        status = propose(g, err);
    g->seat.failed = status != SH_OK;
    g->spent_ns = now_ns() - begun;
    return status;
}

uint32_t sh_generation_shown(const sh_generation *generation)
{
    return sh_text_filter_tokens_out(&generation->filter);
}

sh_generation_token sh_generation_get_token(const sh_generation *generation, uint32_t i)
{
    const sh_generation *g = generation;
    SH_ASSERT(g->notes != NULL && i < g->info.completion_tokens);
    const token_note *n = &g->notes[i];
    return (sh_generation_token){.token = g->tokens[g->info.prompt_tokens + i],
                                 .logprob = n->logprob,
                                 .n_likeliest = n->n,
                                 .likeliest = n->likeliest};
}

sh_status sh_generation_token_text(const sh_generation *generation, int32_t token, sh_buf *out)
{
    return sh_detokenize(generation->seat.model->model->tokenizer, token, out);
}

/* ---- embeddings ---- */

/* The input's tokens, with BOS where the model puts one; *out is malloc'ed. */
static sh_status read_input(const engine_seat *seat, const sh_embed_input *input, int32_t **out,
                            size_t *n_out, bool *too_long, sh_error *err)
{
    const sh_model *model = seat->model->model;
    const uint32_t context = seat->engine->o.context;
    const bool bos = puts_bos(model->tokenizer);
    size_t n = input->n_tokens;
    int32_t *tokens = NULL;
    *too_long = input->text_bytes > (size_t)context * TOKEN_BYTES_MAX || n + bos > context;
    if (!*too_long && input->tokens != NULL) {
        for (size_t i = 0; i < n; i++)
            if (input->tokens[i] < 0 || (uint32_t)input->tokens[i] >= model->config.vocab)
                return sh_fail(err, SH_ERR_INVALID, "token %d is outside the vocabulary of %u",
                               input->tokens[i], model->config.vocab);
        tokens = sh_calloc(n + 1, sizeof(*tokens));
        if (tokens == NULL)
            return sh_fail(err, SH_ERR_NO_MEMORY, "an embedding: no memory");
        memcpy(tokens + bos, input->tokens, n * sizeof(*tokens));
        if (bos)
            tokens[0] = sh_tokenizer_bos(model->tokenizer);
        n += bos;
    } else if (!*too_long) {
        SH_TRY(sh_tokenize(model->tokenizer, input->text, input->text_bytes, SH_TOKENIZE_BOS,
                           &tokens, &n, err));
        *too_long = n > context;
    }
    if (*too_long || n <= bos) {
        free(tokens);
        return *too_long
                   ? sh_fail(err, SH_ERR_LIMIT,
                             "an input is longer than the context of %u tokens: split it", context)
                   : sh_fail(err, SH_ERR_INVALID, "an input has no token");
    }
    *out = tokens;
    *n_out = n;
    return SH_OK;
}

/* As OpenAI's are; a vector of zeros, or one with no length, stays. */
static void scale_to_one(float *v, uint32_t n)
{
    double square = 0;
    for (uint32_t i = 0; i < n; i++)
        square += (double)v[i] * v[i];
    double scale = 1 / sqrt(square);
    for (uint32_t i = 0; i < n && isfinite(scale); i++)
        v[i] = (float)(v[i] * scale);
}

static sh_status embed_all(engine_seat *seat, const sh_embed_request *r, sh_embeddings *out,
                           bool *too_long, sh_error *err)
{
    const sh_model *model = seat->model->model;
    sh_status status = engine_attach(seat, err);
    for (size_t i = 0; i < r->n && status == SH_OK; i++) {
        int32_t *tokens = NULL;
        size_t n = 0;
        float *vector = out->vectors + i * out->width;
        status = read_input(seat, &r->inputs[i], &tokens, &n, too_long, err);
        if (status == SH_OK)
            status = sh_session_embed(seat->slot->session, tokens, (uint32_t)n, vector, err);
        if (status == SH_OK)
            scale_to_one(vector, out->width);
        out->tokens += (uint32_t)n - (n > 0 && puts_bos(model->tokenizer));
        free(tokens);
    }
    return status;
}

sh_status sh_engine_embed(sh_engine *engine, const sh_embed_request *request, sh_embeddings *out,
                          bool *too_long, sh_error *err)
{
    engine_seat seat = {.engine = engine};
    sh_embeddings made = {0};
    *too_long = false;
    if (request->n == 0 || request->n > SH_EMBED_INPUTS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "%zu inputs, 1 to %d are possible", request->n,
                       SH_EMBED_INPUTS_MAX);
    sh_status status = engine_admit(&seat, request->client, err);
    if (status == SH_OK) {
        made.version = seat.model->version;
        made.width = seat.model->model->config.width;
        made.vectors = sh_calloc(request->n * made.width, sizeof(float));
        engine_choose_slot(&seat, 0, NULL, 0);
        seat.slot->client = request->client;
        seat.failed = true; /* there is no text in the slot any more */
        status = made.vectors != NULL
                     ? embed_all(&seat, request, &made, too_long, err)
                     : sh_fail(err, SH_ERR_NO_MEMORY, "%zu embeddings: no memory", request->n);
    }
    engine_leave(&seat);
    if (status != SH_OK) {
        free(made.vectors);
        return status;
    }
    *out = made;
    return SH_OK;
}
