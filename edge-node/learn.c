#include "edge-node/learn.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edge-node/node.h"

#define LOGIT_ROWS 16 /* tokens whose logits are in memory at a time */

/* Rows of one session are consecutive pieces; a piece whose predecessor left the ring begins a
 * text of its own. */
static sh_status add_row(void *arg, const sh_feedback *row)
{
    uint8_t mask = row->target ? SH_TOKEN_TARGET : 0;
    if (row->target && row->accepted)
        mask |= SH_TOKEN_ACCEPTED;
    return sh_snapshot_add(arg, row->session, row->tokens, row->n, mask);
}

sh_status sh_snapshot_read(sh_txn *txn, sh_snapshot *snapshot, sh_error *err)
{
    return sh_node_each_feedback(txn, add_row, snapshot, err);
}

sh_status sh_learn_run(const sh_model *base, const sh_snapshot *snapshot, const sh_learn_options *o,
                       sh_round_result *out, sh_error *err)
{
    const sh_train_plan *p = &o->plan;
    sh_round_options options = {.a_seed = p->a_seed,
                                .shuffle_seed = o->shuffle_seed,
                                .rank = p->rank,
                                .alpha = p->alpha,
                                .lr = p->lr,
                                .lr_final = p->lr_final,
                                .clip = p->clip,
                                .batch = p->batch,
                                .context = p->context,
                                .passes_milli = p->passes_milli,
                                .steps_max = p->steps_max,
                                .warmup = p->warmup,
                                .tokens_min = p->tokens_min,
                                .threads = o->threads,
                                .heldout = o->heldout,
                                .progress = o->progress,
                                .progress_arg = o->progress_arg};
    return sh_round_train(base, snapshot, &options, out, err);
}

static void add_word(sh_learn_words *words, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void add_word(sh_learn_words *words, const char *format, ...)
{
    SH_ASSERT(words->n < SH_LEARN_WORDS_MAX);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(words->words[words->n], sizeof words->words[0], format, args);
    va_end(args);
    SH_ASSERT(n > 0 && (size_t)n < sizeof words->words[0]);
    words->n++;
}

void sh_learn_make_words(const sh_learn_options *o, sh_learn_words *out)
{
    const sh_train_plan *p = &o->plan;
    out->n = 0;
    add_word(out, "--a-seed=%" PRIu64, p->a_seed);
    add_word(out, "--shuffle-seed=%" PRIu64, o->shuffle_seed);
    add_word(out, "--rank=%u", p->rank);
    /* Nine digits name a float exactly. */
    add_word(out, "--alpha=%.9g", (double)p->alpha);
    add_word(out, "--lr=%.9g", (double)p->lr);
    add_word(out, "--lr-final=%.9g", (double)p->lr_final);
    add_word(out, "--clip=%.9g", (double)p->clip);
    add_word(out, "--batch=%u", p->batch);
    add_word(out, "--context=%u", p->context);
    add_word(out, "--passes-milli=%u", p->passes_milli);
    add_word(out, "--steps-max=%u", p->steps_max);
    add_word(out, "--warmup=%u", p->warmup);
    add_word(out, "--tokens-min=%u", p->tokens_min);
    add_word(out, "--threads=%u", SH_MAX(o->threads, 1));
    add_word(out, "--heldout=%s", o->heldout ? "true" : "false");
}

/* ---- federated evaluation ---- */

typedef struct {
    sh_context *context;
    uint32_t vocab;
    float *logits; /* [LOGIT_ROWS, vocab] */
    double nll[SH_SLICES];
    uint64_t tokens[SH_SLICES];
} scorer;

/* n tokens from an empty cache; the first is no target. mask and tokens are [n]. */
static sh_status score_window(scorer *c, const int32_t *tokens, const uint8_t *mask, size_t n,
                              sh_error *err)
{
    sh_context_truncate(c->context, 0);
    for (size_t at = 0; at + 1 < n; at += LOGIT_ROWS) {
        uint32_t rows = (uint32_t)SH_MIN((size_t)LOGIT_ROWS, n - 1 - at);
        SH_TRY(sh_context_decode(c->context, tokens + at, rows, SH_LOGITS_ALL, c->logits, err));
        for (uint32_t i = 0; i < rows; i++) {
            uint8_t m = mask[at + i + 1];
            int32_t token = tokens[at + i + 1];
            if (!(m & SH_TOKEN_TARGET))
                continue;
            if (token < 0 || (uint32_t)token >= c->vocab)
                return sh_fail(err, SH_ERR_INVALID, "evaluation: token %d of a vocabulary of %u",
                               token, c->vocab);
            sh_slice_kind k = m & SH_TOKEN_ACCEPTED ? SH_SLICE_ACCEPTED : SH_SLICE_CORRECTED;
            c->nll[k] += sh_nll(c->logits + (size_t)i * c->vocab, c->vocab, token);
            c->tokens[k]++;
        }
    }
    return SH_OK;
}

static bool has_target(const uint8_t *mask, size_t n)
{
    for (size_t i = 1; i < n; i++)
        if (mask[i] & SH_TOKEN_TARGET)
            return true;
    return false;
}

static sh_status score_sessions(scorer *c, const sh_snapshot *s, uint32_t context, sh_error *err)
{
    for (size_t i = 0; i < s->n_sessions; i++) {
        if (!sh_snapshot_is_heldout(s->sessions[i]))
            continue;
        size_t end = i + 1 < s->n_sessions ? s->starts[i + 1] : s->n_tokens;
        /* Windows overlap by one token, so that every target but the first token is scored once. */
        for (size_t at = s->starts[i]; at + 1 < end; at += context) {
            size_t n = SH_MIN((size_t)context + 1, end - at);
            if (has_target(s->mask + at, n))
                SH_TRY(score_window(c, s->tokens + at, s->mask + at, n, err));
        }
    }
    return SH_OK;
}

static sh_status score_model(const sh_model *model, const sh_snapshot *snapshot, uint32_t context,
                             scorer *c, sh_error *err)
{
    sh_status status = SH_OK;
    sh_context_options options = {.n_tokens_max = context, .batch_max = LOGIT_ROWS};
    *c = (scorer){.vocab = model->config.vocab};
    SH_GOTO(sh_context_create(model, &options, &c->context, err));
    c->logits = sh_alloc_aligned((size_t)LOGIT_ROWS * c->vocab * sizeof *c->logits);
    if (!c->logits)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "evaluation: no memory for logits"));
    SH_GOTO(score_sessions(c, snapshot, context, err));
cleanup:
    free(c->logits);
    sh_context_destroy(&c->context);
    return status;
}

sh_status sh_learn_evaluate(const sh_model *parent, const sh_model *candidate,
                            const sh_snapshot *snapshot, uint32_t context, sh_slice_score *slices,
                            uint32_t *n, sh_error *err)
{
    scorer p, c;
    if (parent->config.vocab != candidate->config.vocab)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "evaluation: the candidate has a vocabulary of %u tokens, its parent %u",
                       candidate->config.vocab, parent->config.vocab);
    context = SH_MAX(SH_MIN(SH_MIN(context, parent->config.context), candidate->config.context), 1);
    SH_TRY(score_model(parent, snapshot, context, &p, err));
    SH_TRY(score_model(candidate, snapshot, context, &c, err));
    uint32_t found = 0;
    for (uint32_t k = 0; k < SH_SLICES; k++)
        if (p.tokens[k] > 0)
            slices[found++] = (sh_slice_score){.slice = k,
                                               .tokens = p.tokens[k],
                                               .nll_parent = p.nll[k],
                                               .nll_candidate = c.nll[k]};
    *n = found;
    return SH_OK;
}
