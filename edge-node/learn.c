#include "edge-node/learn.h"

#include <stdlib.h>
#include <string.h>

#include "edge-node/node.h"

#define UPDATE_BYTES_MAX (64u << 20)

void sh_snapshot_release(sh_snapshot *s)
{
    free(s->tokens);
    free(s->mask);
    free(s->starts);
    free(s->sessions);
    *s = (sh_snapshot){0};
}

size_t sh_snapshot_targets(const sh_snapshot *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_tokens; i++)
        n += s->mask[i];
    return n;
}

static sh_status reserve(sh_snapshot *s, size_t tokens)
{
    size_t need = s->n_tokens + tokens, max = SH_SNAPSHOT_TOKENS_MAX;
    SH_TRY(sh_array_reserve((void **)&s->tokens, &s->tokens_cap, need, sizeof *s->tokens, max));
    SH_TRY(sh_array_reserve((void **)&s->mask, &s->mask_cap, need, 1, max));
    need = s->n_sessions + 1;
    SH_TRY(sh_array_reserve((void **)&s->starts, &s->starts_cap, need, sizeof *s->starts, max));
    return sh_array_reserve((void **)&s->sessions, &s->sessions_cap, need, sizeof *s->sessions,
                            max);
}

/* Rows of one session are consecutive pieces; a piece whose predecessor left the ring begins a
 * text of its own. */
static sh_status add_row(void *arg, const sh_feedback *row)
{
    sh_snapshot *s = arg;
    SH_TRY(reserve(s, row->n));
    bool goes_on = s->n_sessions && s->sessions[s->n_sessions - 1] == row->session;
    if (!goes_on) {
        s->starts[s->n_sessions] = (uint32_t)s->n_tokens;
        s->sessions[s->n_sessions++] = row->session;
    }
    memcpy(s->tokens + s->n_tokens, row->tokens, row->n * sizeof *row->tokens);
    memset(s->mask + s->n_tokens, row->target, row->n);
    s->n_tokens += row->n;
    return SH_OK;
}

sh_status sh_snapshot_read(sh_txn *txn, sh_snapshot *snapshot, sh_error *err)
{
    return sh_node_each_feedback(txn, add_row, snapshot, err);
}

static bool is_heldout(uint64_t session)
{
    uint64_t h = session * 0x9e3779b97f4a7c15ull;
    return (h >> 32) % SH_LEARN_HELDOUT_ONE_IN == 0;
}

typedef struct {
    int32_t *tokens;
    uint8_t *mask;
    size_t n, n_targets; /* tokens in the stream */
} stream;

/* One stream of the chosen sessions; room for a last sequence that is padded with non-targets. */
static sh_status make_stream(const sh_snapshot *s, bool split, bool heldout, uint32_t length,
                             stream *out)
{
    out->tokens = sh_calloc(s->n_tokens + length + 1, sizeof *out->tokens);
    out->mask = sh_calloc(s->n_tokens + length + 1, 1);
    if (!out->tokens || !out->mask)
        return SH_ERR_NO_MEMORY;
    for (size_t i = 0; i < s->n_sessions; i++) {
        if (split && is_heldout(s->sessions[i]) != heldout)
            continue;
        size_t end = i + 1 < s->n_sessions ? s->starts[i + 1] : s->n_tokens;
        size_t n = end - s->starts[i];
        memcpy(out->tokens + out->n, s->tokens + s->starts[i], n * sizeof *s->tokens);
        memcpy(out->mask + out->n, s->mask + s->starts[i], n);
        out->n += n;
    }
    for (size_t i = 0; i < out->n; i++)
        out->n_targets += out->mask[i];
    return SH_OK;
}

/* Sequences of context + 1 tokens that overlap by one, so that every target is predicted once. */
static sh_status make_data(const stream *s, uint32_t context, sh_train_data *out)
{
    size_t n = s->n > 1 ? (s->n - 2) / context + 1 : 0;
    uint32_t length = context + 1;
    int32_t *tokens = sh_calloc(SH_MAX(n, 1) * length, sizeof *tokens);
    uint8_t *mask = sh_calloc(SH_MAX(n, 1) * length, 1);
    if (!tokens || !mask) {
        free(tokens);
        free(mask);
        return SH_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(tokens + i * length, s->tokens + i * context, length * sizeof *tokens);
        memcpy(mask + i * length, s->mask + i * context, length);
        mask[i * length] = 0;
    }
    *out = (sh_train_data){.tokens = tokens, .mask = mask, .n = n, .length = length};
    return SH_OK;
}

static void data_release(stream *s, sh_train_data *d)
{
    free(s->tokens);
    free(s->mask);
    free((void *)d->tokens);
    free((void *)d->mask);
}

void sh_learn_result_release(sh_learn_result *result)
{
    sh_buf_release(&result->update);
}

static sh_train_options train_options(const sh_learn_options *o, size_t n_sequences)
{
    const sh_train_plan *p = &o->plan;
    uint64_t steps =
        ((uint64_t)n_sequences * p->passes_milli + p->batch * 1000ull - 1) / (p->batch * 1000ull);
    return (sh_train_options){.a_seed = p->a_seed,
                              .rank = p->rank,
                              .alpha = p->alpha,
                              .lr = p->lr,
                              .lr_final = p->lr_final,
                              .clip = p->clip,
                              .batch = p->batch,
                              .steps = (uint32_t)SH_MIN(SH_MAX(steps, 1), p->steps_max),
                              .warmup = p->warmup,
                              .shuffle_seed = o->shuffle_seed,
                              .threads = o->threads,
                              .progress = o->progress,
                              .progress_arg = o->progress_arg};
}

sh_status sh_learn_run(const sh_model *base, const sh_snapshot *snapshot,
                       const sh_learn_options *options, sh_learn_result *out, sh_error *err)
{
    const sh_train_plan *plan = &options->plan;
    stream train = {0}, held = {0};
    sh_train_data data = {0}, held_data = {0};
    sh_adapter *adapter = NULL;
    sh_learn_result r = {0};
    sh_train_result trained = {0};
    sh_buf_init(&r.update, UPDATE_BYTES_MAX);
    sh_status status = SH_OK;
    SH_GOTO(make_stream(snapshot, options->heldout, false, plan->context, &train));
    if (train.n_targets < SH_MAX(plan->tokens_min, 1))
        SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "training: %zu target tokens, the plan asks for %u",
                        train.n_targets, plan->tokens_min));
    SH_GOTO(make_data(&train, plan->context, &data));
    if (options->heldout) {
        SH_GOTO(make_stream(snapshot, true, true, plan->context, &held));
        SH_GOTO(make_data(&held, plan->context, &held_data));
    }
    SH_GOTO(
        sh_lora_initialize(&base->config, plan->a_seed, plan->rank, plan->alpha, &adapter, err));
    if (held.n_targets)
        SH_GOTO(
            sh_train_evaluate(base, NULL, &held_data, options->threads, &r.heldout_before, err));
    sh_train_options to = train_options(options, data.n);
    SH_GOTO(sh_lora_train(base, adapter, &data, &to, &trained, err));
    if (held.n_targets)
        SH_GOTO(
            sh_train_evaluate(base, adapter, &held_data, options->threads, &r.heldout_after, err));
    else /* no text was held out yet: the training loss is all there is to judge by */
        r.heldout_before = trained.loss_first, r.heldout_after = trained.loss_last;
    r.samples = train.n_targets;
    r.tokens_seen = trained.tokens_seen;
    r.steps = to.steps;
    SH_GOTO(sh_adapter_encode(adapter, &r.update, err));
    *out = r;
    r.update = (sh_buf){0};
cleanup:
    if (status == SH_ERR_NO_MEMORY)
        sh_fail(err, status, "training: no memory for %zu tokens", snapshot->n_tokens);
    sh_buf_release(&r.update);
    sh_adapter_destroy(&adapter);
    data_release(&train, &data);
    data_release(&held, &held_data);
    return status;
}
