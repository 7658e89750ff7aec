#include "edge-node/service.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/transform.h"

#define BATCH              16u   /* rows whose logits are kept side by side */
#define PIECE              128u  /* tokens of a decode */
#define ALL_SCORED         32u   /* of what is typed between two completions; of the rest, */
#define SCORED_EVERY       32u   /* one in so many */
#define PROJECTION_SCALE   48.0f /* one standard deviation of the vocabulary, in int8 steps */
#define PROJECTION_PURPOSE 0x70726f6au
#define HASH_LABEL         "shoal frozen embedding 1"
#define NGRAM              4u

typedef enum { WORD_OTHER /* stands alone */, WORD_START, WORD_PART } word_class;

struct sh_frozen {
    const sh_tokenizer *tokenizer; /* the genesis model's, borrowed */
    uint32_t vocab;
    sh_hash hash;
    uint8_t *word;     /* [vocab] word_class */
    float *projection; /* [vocab, SH_PROJECTIONS] */
};

struct sh_session {
    const sh_model *model;
    const sh_frozen *frozen;
    sh_context *context; /* NULL: detached */
    sh_kv_type kv;
    sh_session_runner runner; /* run NULL: alone, */
    sh_runner *own;           /* with this one */
    uint32_t n_tokens_max, vocab, release_version;
    int32_t *history;             /* [n_tokens_max]: what the cache holds */
    uint32_t n_history, n_prefix; /* prefix: 1 when BOS comes first */
    float *last;                  /* [vocab] logits after the last token */
    float *scratch;               /* [BATCH, vocab] */
    bool has_last;                /* else what the context lacks of the history is run first */
    /* since the last completion */
    double nll_sum, projection_sum[SH_PROJECTIONS];
    uint32_t n_typed, n_scored, n_bytes, evaluated;
    sh_record counts; /* its buckets */
    /* the proposal under way, or the last one */
    sh_proposing how;
    int32_t *proposed; /* [n_tokens_max] */
    uint32_t n_proposed;
    sh_stop stop;
    bool proposing, done;
    double logprob_sum, least_logprob, entropy_sum;
    const float *logits; /* that the last token was chosen from: last or scratch */
    sh_sampler *sampler; /* made when first needed */
};

/* ---- frozen ---- */

static sh_status classify(sh_frozen *f, sh_error *err)
{
    sh_buf text;
    sh_buf_init(&text, SH_GGUF_STRING_MAX);
    sh_status status = SH_OK;
    for (uint32_t t = 0; t < f->vocab; t++) {
        sh_buf_clear(&text);
        status = sh_detokenize(f->tokenizer, (int32_t)t, &text);
        if (status != SH_OK) {
            status = sh_fail(err, status, "token %u has no text", t);
            break;
        }
        if (sh_tokenizer_starts_word(f->tokenizer, (int32_t)t)) {
            f->word[t] = WORD_START;
            continue;
        }
        bool part = text.len > 0;
        for (size_t i = 0; i < text.len && part; i++) {
            uint8_t c = text.data[i];
            part = c >= 0x80 || isalnum(c) || c == '\'' || c == '-';
        }
        f->word[t] = part ? WORD_PART : WORD_OTHER;
    }
    sh_buf_release(&text);
    return status;
}

/* Each component over the vocabulary to mean 0 and standard deviation 1. */
static void standardize(sh_frozen *f)
{
    for (uint32_t k = 0; k < SH_PROJECTIONS; k++) {
        double sum = 0, square = 0;
        for (uint32_t t = 0; t < f->vocab; t++)
            sum += f->projection[(size_t)t * SH_PROJECTIONS + k];
        double mean = sum / f->vocab;
        for (uint32_t t = 0; t < f->vocab; t++) {
            double d = f->projection[(size_t)t * SH_PROJECTIONS + k] - mean;
            square += d * d;
        }
        double spread = sqrt(square / f->vocab);
        double scale = spread > 0 && isfinite(spread) ? 1.0 / spread : 0.0;
        for (uint32_t t = 0; t < f->vocab; t++) {
            float *p = &f->projection[(size_t)t * SH_PROJECTIONS + k];
            *p = (float)((*p - mean) * scale);
        }
    }
}

static sh_status project(sh_frozen *f, const sh_model *genesis, sh_error *err)
{
    const sh_matrix *e = &genesis->token_embd;
    float *row = sh_calloc(e->in, sizeof(float));
    float *sign = sh_calloc((size_t)e->in * SH_PROJECTIONS, sizeof(float));
    sh_status status = SH_OK;
    if (row == NULL || sign == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "frozen embedding: no memory for a projection");
        goto cleanup;
    }
    for (uint32_t k = 0; k < SH_PROJECTIONS; k++) {
        sh_rng rng;
        sh_rng_init(&rng, SH_PROJECTION_SEED, k, PROJECTION_PURPOSE);
        for (uint32_t i = 0; i < e->in; i++)
            sign[(size_t)k * e->in + i] = sh_rng_u32(&rng) & 1 ? 1.0f : -1.0f;
    }
    for (uint32_t t = 0; t < f->vocab; t++) {
        sh_matrix_row(e, t, row);
        for (uint32_t k = 0; k < SH_PROJECTIONS; k++) {
            double sum = 0; /* in order: the frozen embedding is the same on every machine */
            for (uint32_t i = 0; i < e->in; i++)
                sum += (double)row[i] * sign[(size_t)k * e->in + i];
            f->projection[(size_t)t * SH_PROJECTIONS + k] = (float)sum;
        }
    }
    standardize(f);
cleanup:
    free(row);
    free(sign);
    return status;
}

static sh_hash name_frozen(const sh_model *genesis)
{
    sh_sha256_state state;
    uint8_t seed[8];
    for (int i = 0; i < 8; i++)
        seed[i] = (uint8_t)(SH_PROJECTION_SEED >> (8 * i));
    sh_sha256_init(&state);
    sh_sha256_update(&state, HASH_LABEL, sizeof(HASH_LABEL));
    sh_hash hash = sh_model_hash(genesis);
    sh_sha256_update(&state, hash.b, sizeof(hash.b));
    sh_sha256_update(&state, seed, sizeof(seed));
    return sh_sha256_final(&state);
}

sh_status sh_frozen_create(const sh_model *genesis, sh_frozen **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_frozen *f = sh_calloc(1, sizeof(*f));
    if (f == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "frozen embedding: no memory");
    f->tokenizer = genesis->tokenizer;
    f->vocab = genesis->config.vocab;
    f->hash = name_frozen(genesis);
    f->word = sh_calloc(f->vocab, 1);
    f->projection = sh_calloc((size_t)f->vocab * SH_PROJECTIONS, sizeof(float));
    if (f->word == NULL || f->projection == NULL) {
        status =
            sh_fail(err, SH_ERR_NO_MEMORY, "frozen embedding of %u tokens: no memory", f->vocab);
        goto cleanup;
    }
    SH_GOTO(classify(f, err));
    SH_GOTO(project(f, genesis, err));
    *out = f;
    return SH_OK;
cleanup:
    sh_frozen_destroy(&f);
    return status;
}

void sh_frozen_destroy(sh_frozen **frozen)
{
    if (*frozen == NULL)
        return;
    free((*frozen)->word);
    free((*frozen)->projection);
    free(*frozen);
    *frozen = NULL;
}

sh_hash sh_frozen_hash(const sh_frozen *frozen)
{
    return frozen->hash;
}

uint32_t sh_frozen_vocab(const sh_frozen *frozen)
{
    return frozen->vocab;
}

static word_class class_of(const sh_frozen *f, int32_t token)
{
    return token >= 0 && (uint32_t)token < f->vocab ? (word_class)f->word[token] : WORD_OTHER;
}

/* Whether `next` goes on with the word that `first` began. */
static bool goes_on(const sh_frozen *f, int32_t first, int32_t next)
{
    return class_of(f, first) != WORD_OTHER && class_of(f, next) == WORD_PART;
}

uint32_t sh_word_length(const sh_frozen *frozen, const int32_t *tokens, uint32_t n, uint32_t max)
{
    uint32_t length = SH_MIN(SH_MIN(n, max), 1u);
    while (length > 0 && length < n && length < max && goes_on(frozen, tokens[0], tokens[length]))
        length++;
    return length;
}

/* ---- session ---- */

static sh_status make_context(sh_session *s, const sh_model *model, const sh_session_runner *runner,
                              sh_error *err)
{
    sh_context *context = NULL;
    sh_runner *own = NULL;
    if (runner == NULL)
        SH_TRY(sh_runner_create(model, &(sh_runner_options){.rows_max = BATCH}, &own, err));
    sh_context_options options = {.n_tokens_max = s->n_tokens_max,
                                  .kv = s->kv,
                                  .runner = runner != NULL ? runner->runner : own};
    sh_status status = sh_context_create(model, &options, &context, err);
    if (status != SH_OK) {
        sh_runner_destroy(&own);
        return status;
    }
    sh_session_detach(s);
    s->context = context;
    s->own = own;
    if (runner != NULL)
        s->runner = *runner;
    return SH_OK;
}

sh_status sh_session_create(const sh_model *model, const sh_frozen *frozen,
                            const sh_session_options *options, sh_session **out, sh_error *err)
{
    sh_status status = SH_OK;
    uint32_t n_max = options->n_tokens_max;
    if (n_max == 0)
        n_max = SH_MIN(SH_SESSION_TOKENS_DEFAULT, model->config.context);
    if (n_max < SH_SESSION_TOKENS_MIN || n_max > model->config.context)
        return sh_fail(err, SH_ERR_USAGE, "session of %u tokens: %u to the model's %u are possible",
                       n_max, SH_SESSION_TOKENS_MIN, model->config.context);
    if (model->config.vocab != frozen->vocab)
        return sh_fail(err, SH_ERR_MISMATCH, "model of %u tokens, the fleet's vocabulary has %u",
                       model->config.vocab, frozen->vocab);
    sh_session *s = sh_calloc(1, sizeof(*s));
    if (s == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "session: no memory");
    s->model = model;
    s->frozen = frozen;
    s->n_tokens_max = n_max;
    s->vocab = model->config.vocab;
    s->release_version = options->release_version;
    s->history = sh_calloc(n_max, sizeof(int32_t));
    s->proposed = sh_calloc(n_max, sizeof(int32_t));
    s->last = sh_calloc(s->vocab, sizeof(float));
    s->scratch = sh_calloc((size_t)s->vocab * BATCH, sizeof(float));
    if (s->history == NULL || s->proposed == NULL || s->last == NULL || s->scratch == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "session of %u tokens: no memory", n_max);
        goto cleanup;
    }
    s->kv = options->kv;
    SH_GOTO(make_context(s, model, options->runner, err));
    *out = s;
    return SH_OK;
cleanup:
    sh_session_destroy(&s);
    return status;
}

void sh_session_destroy(sh_session **session)
{
    sh_session *s = *session;
    if (s == NULL)
        return;
    sh_session_detach(s);
    free(s->history);
    free(s->proposed);
    sh_sampler_destroy(&s->sampler);
    free(s->last);
    free(s->scratch);
    free(s);
    *session = NULL;
}

static sh_status run_tokens(sh_session *s, const sh_run_item *tokens, sh_error *err)
{
    sh_run_item item = *tokens;
    item.context = s->context;
    if (s->runner.run != NULL)
        return s->runner.run(s->runner.arg, &item, err);
    return sh_runner_run(s->own, &item, 1, err);
}

static void clear_measurement(sh_session *s)
{
    s->nll_sum = 0;
    memset(s->projection_sum, 0, sizeof(s->projection_sum));
    s->n_typed = s->n_scored = s->n_bytes = s->evaluated = 0;
    s->counts = (sh_record){0};
}

/* Runs what the context lacks of the remembered tokens, so that there are logits after the last. */
static sh_status catch_up(sh_session *s, sh_error *err)
{
    uint32_t there = sh_context_length(s->context);
    if (s->has_last || s->n_history == 0)
        return SH_OK;
    SH_TRY(run_tokens(s,
                      &(sh_run_item){.tokens = s->history + there,
                                     .n = s->n_history - there,
                                     .logits_wanted = SH_LOGITS_LAST,
                                     .logits = s->last},
                      err));
    s->has_last = true;
    s->evaluated += s->n_history - there;
    return SH_OK;
}

/* Runs the remembered tokens from the start. */
static sh_status run_history(sh_session *s, sh_error *err)
{
    sh_context_truncate(s->context, 0);
    s->has_last = false;
    return catch_up(s, err);
}

/* Makes room for n more tokens: the later half of the text stays. */
static sh_status make_room(sh_session *s, uint32_t n, sh_error *err)
{
    if (s->n_history + n <= s->n_tokens_max)
        return SH_OK;
    uint32_t keep = SH_MIN(s->n_tokens_max / 2 - s->n_prefix, s->n_history - s->n_prefix);
    memmove(s->history + s->n_prefix, s->history + s->n_history - keep, keep * sizeof(int32_t));
    s->n_history = s->n_prefix + keep;
    return run_history(s, err);
}

sh_status sh_session_begin(sh_session *session, sh_error *err)
{
    sh_session *s = session;
    const sh_tokenizer *tokenizer = s->model->tokenizer;
    clear_measurement(s);
    s->n_history = s->n_prefix = 0;
    if (sh_tokenizer_adds_bos(tokenizer) && sh_tokenizer_bos(tokenizer) >= 0) {
        s->history[0] = sh_tokenizer_bos(tokenizer);
        s->n_history = s->n_prefix = 1;
    }
    return run_history(s, err);
}

sh_status sh_session_resume(sh_session *session, const int32_t *tokens, size_t n, sh_error *err)
{
    sh_session *s = session;
    SH_TRY(sh_session_begin(s, err));
    size_t keep = SH_MIN(n, (size_t)(s->n_tokens_max / 2 - s->n_prefix));
    if (keep > 0)
        memcpy(s->history + s->n_prefix, tokens + n - keep, keep * sizeof(int32_t));
    s->n_history = s->n_prefix + (uint32_t)keep;
    return run_history(s, err);
}

void sh_session_detach(sh_session *session)
{
    sh_context_destroy(&session->context);
    sh_runner_destroy(&session->own);
    session->runner = (sh_session_runner){0};
    session->has_last = false;
}

sh_status sh_session_attach(sh_session *session, const sh_model *model, uint32_t release_version,
                            const sh_session_runner *runner, sh_error *err)
{
    sh_session *s = session;
    if (model->config.vocab != s->vocab || model->config.context < s->n_tokens_max)
        return sh_fail(err, SH_ERR_MISMATCH, "the release's model does not fit the session");
    SH_TRY(make_context(s, model, runner, err));
    s->model = model;
    s->release_version = release_version;
    return run_history(s, err);
}

sh_status sh_session_switch(sh_session *session, const sh_model *model, uint32_t release_version,
                            sh_error *err)
{
    return sh_session_attach(session, model, release_version, NULL, err);
}

sh_status sh_session_adopt(sh_session *session, const sh_session *other, uint32_t n, sh_error *err)
{
    sh_session *s = session;
    SH_ASSERT(s->model == other->model && n + other->n_prefix <= other->n_history && n > 0);
    SH_ASSERT(other->n_history <= s->n_tokens_max);
    clear_measurement(s);
    s->n_prefix = other->n_prefix;
    s->n_history = s->n_prefix + n;
    memcpy(s->history, other->history, s->n_history * sizeof(int32_t));
    s->has_last = false;
    /* Its logits are not copied: the last token is run again. What the other has not run yet, too.
     */
    uint32_t there = SH_MIN(sh_context_length(other->context), s->n_history - 1);
    return sh_context_copy_prefix(s->context, other->context, there, err);
}

sh_status sh_session_embed(sh_session *session, const int32_t *tokens, uint32_t n, float *out,
                           sh_error *err)
{
    sh_session *s = session;
    const uint32_t width = s->model->config.width;
    sh_status status = SH_OK;
    sh_session_cut(s, 0);
    sh_context_truncate(s->context, 0);
    float *hidden = sh_calloc((size_t)SH_MIN(n, BATCH) * width, sizeof(float));
    double *sum = sh_calloc(width, sizeof(double));
    if (hidden == NULL || sum == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "an embedding: no memory");
        goto cleanup;
    }
    for (uint32_t at = 0; at < n; at += BATCH) {
        uint32_t piece = SH_MIN(n - at, BATCH);
        SH_GOTO(run_tokens(s, &(sh_run_item){.tokens = tokens + at, .n = piece, .hidden = hidden},
                           err));
        for (size_t i = 0; i < (size_t)piece * width; i++)
            sum[i % width] += hidden[i];
    }
    for (uint32_t i = 0; i < width; i++)
        out[i] = (float)(sum[i] / n);
cleanup:
    sh_context_truncate(s->context, 0);
    s->n_history = s->n_prefix = 0;
    s->has_last = false;
    free(hidden);
    free(sum);
    return status;
}

const int32_t *sh_session_text(const sh_session *session, uint32_t *n)
{
    *n = session->n_history - session->n_prefix;
    return session->history + session->n_prefix;
}

void sh_session_cut(sh_session *session, uint32_t n)
{
    sh_session *s = session;
    SH_ASSERT(!s->proposing);
    clear_measurement(s);
    memset(s->proposed, 0, s->n_tokens_max * sizeof(int32_t));
    if (n >= s->n_history - s->n_prefix)
        return;
    s->n_history = s->n_prefix + n;
    memset(s->history + s->n_history, 0, (s->n_tokens_max - s->n_history) * sizeof(int32_t));
    /* The logits after the last token that stays are gone: it is run again. */
    if (s->context != NULL)
        sh_context_truncate(s->context, s->n_history > 0 ? s->n_history - 1 : 0);
    s->has_last = false;
}

/* ---- typing ---- */

/* Whether the i-th token typed since the last completion is scored. Its logits cost a product with
 * the whole output matrix: a quarter of a small model's prefill, were it all of a long prompt. By
 * its number, so that it does not depend on how the text was split into calls. */
static bool is_scored(uint32_t i)
{
    return i < ALL_SCORED || i % SCORED_EVERY == 0;
}

/* logits: NULL: nothing foretold it (the first token of a text without BOS), or it is not scored */
static void measure_token(sh_session *s, int32_t token, const float *logits)
{
    const float *p = s->frozen->projection + (size_t)token * SH_PROJECTIONS;
    for (unsigned k = 0; k < SH_PROJECTIONS; k++)
        s->projection_sum[k] += p[k];
    sh_record_count_token(&s->counts, token);
    s->n_bytes += sh_tokenizer_is_byte(s->model->tokenizer, token);
    s->n_typed++;
    if (logits == NULL)
        return;
    s->nll_sum += sh_nll(logits, s->vocab, token);
    s->n_scored++;
}

/* How many of the next n tokens are run at once, and of which the logits are wanted: of those
 * before a scored one, and of the last. */
static uint32_t plan_piece(const sh_session *s, size_t n, bool wants[PIECE])
{
    uint32_t most = (uint32_t)SH_MIN(n, (size_t)SH_MIN(PIECE, s->n_tokens_max / 2)), rows = 0;
    /* Up to the brim and no further, so that where the text slides does not depend on how it was
     * split into calls. */
    if (s->n_history < s->n_tokens_max)
        most = SH_MIN(most, s->n_tokens_max - s->n_history);
    uint32_t piece = 0;
    while (piece < most && rows < BATCH) {
        wants[piece] = is_scored(s->n_typed + piece + 1);
        rows += wants[piece++];
    }
    wants[piece - 1] = true; /* there is room for its row: at BATCH it is one already */
    return piece;
}

static sh_status type_piece(sh_session *s, const int32_t *tokens, uint32_t n, const bool *wants,
                            sh_error *err)
{
    SH_TRY(make_room(s, n, err));
    SH_TRY(run_tokens(s,
                      &(sh_run_item){.tokens = tokens,
                                     .n = n,
                                     .logits_wanted = SH_LOGITS_SOME,
                                     .logits = s->scratch,
                                     .wants = wants},
                      err));
    const float *before = s->has_last ? s->last : NULL, *row = s->scratch;
    for (uint32_t i = 0; i < n; i++) {
        measure_token(s, tokens[i], is_scored(s->n_typed) ? before : NULL);
        before = row; /* of this token, where there is one; else it is not looked at */
        row += wants[i] ? s->vocab : 0;
    }
    memcpy(s->last, before, s->vocab * sizeof(float));
    s->has_last = true;
    memcpy(s->history + s->n_history, tokens, n * sizeof(int32_t));
    s->n_history += n;
    s->evaluated += n;
    return SH_OK;
}

sh_status sh_session_type(sh_session *session, const int32_t *tokens, size_t n, sh_error *err)
{
    sh_session *s = session;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= s->vocab)
            return sh_fail(err, SH_ERR_INVALID, "token %d at %zu is outside the vocabulary of %u",
                           tokens[i], i, s->vocab);
    SH_ASSERT(!s->proposing);
    SH_TRY(catch_up(s, err));
    for (size_t at = 0; at < n;) {
        bool wants[PIECE];
        uint32_t piece = plan_piece(s, n - at, wants);
        SH_TRY(type_piece(s, tokens + at, piece, wants, err));
        at += piece;
    }
    return SH_OK;
}

/* ---- completing ---- */

/* Log-probability of token and entropy of softmax(logits), nats. */
static void judge_logits(const float *logits, uint32_t vocab, int32_t token, double *logprob,
                         double *entropy)
{
    double mean, log_sum = sh_transform_get()->log_sum_exp_mean(logits, vocab, &mean);
    *logprob = (double)logits[token] - log_sum;
    *entropy = log_sum - mean;
}

static int32_t token_at(const sh_session *s, uint32_t i)
{
    return i < s->n_history ? s->history[i] : s->proposed[i - s->n_history];
}

/* Share of the proposed tokens that end a run of NGRAM tokens which was there before. */
static float repeated_share(const sh_session *s)
{
    uint32_t repeated = 0;
    for (uint32_t i = 0; i < s->n_proposed; i++) {
        uint32_t end = s->n_history + i;
        bool found = false;
        for (uint32_t before = NGRAM - 1; before < end && !found; before++) {
            uint32_t same = 0;
            while (same < NGRAM && token_at(s, before - same) == token_at(s, end - same))
                same++;
            found = same == NGRAM;
        }
        repeated += found;
    }
    return s->n_proposed > 0 ? (float)repeated / (float)s->n_proposed : 0.0f;
}

static void fill_record(const sh_session *s, sh_record *r)
{
    uint32_t n = s->n_proposed;
    *r = s->counts; /* the buckets */
    r->release_version = s->release_version;
    r->prompt_tokens = (uint16_t)SH_MIN(s->n_typed, (uint32_t)UINT16_MAX);
    r->output_tokens = (uint16_t)SH_MIN(n, (uint32_t)UINT16_MAX);
    r->prompt_nll = s->n_scored > 0 ? (float)(s->nll_sum / s->n_scored) : 0.0f;
    r->byte_fallback = s->n_typed > 0 ? (float)s->n_bytes / (float)s->n_typed : 0.0f;
    r->mean_logprob = n > 0 ? (float)(s->logprob_sum / n) : 0.0f;
    r->least_logprob = (float)s->least_logprob;
    r->mean_entropy = n > 0 ? (float)(s->entropy_sum / n) : 0.0f;
    r->repeated_4grams = repeated_share(s);
    r->stop = (uint8_t)(s->done ? s->stop : SH_STOP_CANCELLED);
    for (unsigned k = 0; k < SH_PROJECTIONS && s->n_typed > 0; k++) {
        double mean = s->projection_sum[k] / s->n_typed * PROJECTION_SCALE;
        r->projection[k] = (int8_t)lrint(SH_MAX(-127.0, SH_MIN(127.0, mean)));
    }
}

sh_status sh_session_propose(sh_session *session, const sh_proposing *how, sh_error *err)
{
    sh_session *s = session;
    SH_ASSERT(!s->proposing && how->max_tokens > 0);
    SH_ASSERT(how->max_tokens <= SH_MAX(s->n_tokens_max / 2, s->n_tokens_max - s->n_history));
    SH_TRY(catch_up(s, err));
    if (!s->has_last)
        return sh_fail(err, SH_ERR_INVALID, "session: nothing was typed, there is no next word");
    if (s->sampler == NULL)
        SH_TRY(sh_sampler_create(&how->sampling, s->vocab, &s->sampler, err));
    else
        SH_TRY(sh_sampler_begin(s->sampler, &how->sampling, err));
    SH_TRY(make_room(s, how->max_tokens, err));
    s->how = *how;
    s->n_proposed = 0;
    s->proposing = true;
    s->done = false;
    s->logprob_sum = s->least_logprob = s->entropy_sum = 0;
    return SH_OK;
}

static bool ends(sh_session *s, sh_stop stop)
{
    s->stop = stop;
    s->done = true;
    return true;
}

/* Whether the proposal is over before what follows it is known. */
static bool is_over(sh_session *s)
{
    if (s->done)
        return true;
    if (s->n_proposed == 0)
        return false;
    if (s->how.one_word)
        /* what stands alone is a word, whatever would follow */
        return class_of(s->frozen, s->proposed[0]) == WORD_OTHER && ends(s, SH_STOP_WORD);
    return s->n_proposed == s->how.max_tokens && ends(s, SH_STOP_LIMIT);
}

/* The next token by the proposal's sampling. */
static sh_status choose(sh_session *s, const float *logits, int32_t *token, sh_error *err)
{
    int32_t recent[SH_REPEAT_MAX];
    uint32_t all = s->n_history + s->n_proposed, n = 0;
    const float penalty = s->how.sampling.repeat_penalty;
    if (penalty != 0 && penalty != 1)
        for (n = 0; n < SH_MIN(all, (uint32_t)SH_REPEAT_MAX); n++)
            recent[n] = token_at(s, all - SH_MIN(all, (uint32_t)SH_REPEAT_MAX) + n);
    s->logits = logits;
    SH_TRY(sh_sampler_next(s->sampler, logits, n > 0 ? recent : NULL, n, token, err));
    if (!isfinite(logits[*token])) /* only where there is no better one */
        return sh_fail(err, SH_ERR_CORRUPT, "the model's logits are no numbers: it is broken");
    return SH_OK;
}

sh_status sh_session_next(sh_session *session, int32_t *token, bool *done, sh_error *err)
{
    sh_session *s = session;
    const float *logits = s->last;
    double logprob, entropy;
    SH_ASSERT(s->proposing);
    *done = is_over(s);
    if (*done)
        return SH_OK;
    if (s->n_proposed > 0) {
        SH_TRY(run_tokens(s,
                          &(sh_run_item){.tokens = &s->proposed[s->n_proposed - 1],
                                         .n = 1,
                                         .logits_wanted = SH_LOGITS_LAST,
                                         .logits = s->scratch},
                          err));
        logits = s->scratch;
        s->evaluated++;
    }
    int32_t next;
    SH_TRY(choose(s, logits, &next, err));
    if (sh_tokenizer_is_end(s->model->tokenizer, next))
        *done = ends(s, SH_STOP_END_OF_TEXT);
    else if (s->how.one_word && s->n_proposed > 0 && !goes_on(s->frozen, s->proposed[0], next))
        *done = ends(s, SH_STOP_WORD);
    else if (s->n_proposed == s->how.max_tokens)
        *done = ends(s, SH_STOP_LIMIT);
    if (*done)
        return SH_OK;
    judge_logits(logits, s->vocab, next, &logprob, &entropy);
    s->logprob_sum += logprob;
    s->least_logprob = SH_MIN(s->least_logprob, logprob);
    s->entropy_sum += entropy;
    s->proposed[s->n_proposed++] = next;
    *token = next;
    return SH_OK;
}

const float *sh_session_logits(const sh_session *session)
{
    return session->logits;
}

void sh_session_end(sh_session *session, sh_proposal *out)
{
    sh_session *s = session;
    SH_ASSERT(s->proposing);
    sh_context_truncate(s->context, s->n_history);
    *out = (sh_proposal){.n = s->n_proposed, .tokens = s->proposed, .evaluated = s->evaluated};
    fill_record(s, &out->record);
    s->proposing = false;
    clear_measurement(s);
}

sh_status sh_session_complete(sh_session *session, uint32_t max_tokens, sh_completion *out,
                              sh_error *err)
{
    sh_proposing how = {.max_tokens = max_tokens, .one_word = true, .sampling.top_p = 1};
    sh_proposal proposal;
    sh_status status = SH_OK;
    int32_t token;
    SH_ASSERT(max_tokens > 0 && max_tokens <= SH_WORD_TOKENS_MAX);
    SH_TRY(sh_session_propose(session, &how, err));
    for (bool done = false; status == SH_OK && !done;)
        status = sh_session_next(session, &token, &done, err);
    sh_session_end(session, &proposal);
    if (status != SH_OK)
        return status;
    sh_completion c = {.n = proposal.n, .evaluated = proposal.evaluated, .record = proposal.record};
    memcpy(c.tokens, proposal.tokens, c.n * sizeof(c.tokens[0]));
    *out = c;
    return SH_OK;
}

static uint32_t edit_distance(const int32_t *a, uint32_t n, const int32_t *b, uint32_t m)
{
    uint32_t row[SH_JUDGED_TOKENS_MAX + 1];
    for (uint32_t j = 0; j <= m; j++)
        row[j] = j;
    for (uint32_t i = 1; i <= n; i++) {
        uint32_t diagonal = row[0];
        row[0] = i;
        for (uint32_t j = 1; j <= m; j++) {
            uint32_t above = row[j];
            uint32_t best =
                SH_MIN(SH_MIN(above, row[j - 1]) + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
            row[j] = best;
        }
    }
    return row[m];
}

sh_feedback_kind sh_completion_judge(sh_completion *completion, const int32_t *author, uint32_t n)
{
    n = SH_MIN(n, SH_JUDGED_TOKENS_MAX);
    uint32_t distance = edit_distance(completion->tokens, completion->n, author, n);
    sh_feedback_kind kind = SH_FEEDBACK_EDIT;
    if (distance == 0)
        kind = SH_FEEDBACK_ACCEPT;
    else if (distance >= SH_MAX(n, completion->n))
        kind = SH_FEEDBACK_REJECT;
    completion->record.feedback = (uint8_t)kind;
    completion->record.edit_distance = (uint16_t)distance;
    return kind;
}
