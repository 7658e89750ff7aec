/* A round's training on a snapshot: packed sequences, the held-out part, the encoded update. */
#include <stdlib.h>
#include <string.h>

#include "trainer/snapshot.h"

#define UPDATE_BYTES_MAX (64u << 20)

typedef struct {
    int32_t *tokens;
    uint8_t *mask;       /* 1: a target */
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
        if (split && sh_snapshot_is_heldout(s->sessions[i]) != heldout)
            continue;
        size_t end = i + 1 < s->n_sessions ? s->starts[i + 1] : s->n_tokens;
        for (size_t k = s->starts[i]; k < end; k++, out->n++) {
            out->tokens[out->n] = s->tokens[k];
            out->mask[out->n] = (s->mask[k] & SH_TOKEN_TARGET) != 0;
        }
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

void sh_round_result_release(sh_round_result *result)
{
    sh_buf_release(&result->update);
}

typedef struct {
    const sh_round_options *options;
    uint32_t steps;
} progress;

static bool on_step(void *arg, const sh_train_progress *step)
{
    const progress *p = arg;
    return p->options->progress(p->options->progress_arg, step->step, p->steps, step->loss);
}

static sh_train_options train_options(const sh_round_options *o, size_t n_sequences, progress *p)
{
    uint64_t steps =
        ((uint64_t)n_sequences * o->passes_milli + o->batch * 1000ull - 1) / (o->batch * 1000ull);
    *p = (progress){o, (uint32_t)SH_MIN(SH_MAX(steps, 1), o->steps_max)};
    return (sh_train_options){.lr = o->lr,
                              .lr_final = o->lr_final,
                              .clip = o->clip,
                              .batch = o->batch,
                              .steps = p->steps,
                              .warmup = o->warmup,
                              .shuffle_seed = o->shuffle_seed,
                              .threads = o->threads,
                              .memory_max = o->memory_max,
                              .progress = o->progress ? on_step : NULL,
                              .progress_arg = p};
}

sh_status sh_round_train(const sh_model *base, const sh_snapshot *snapshot,
                         const sh_round_options *o, sh_round_result *out, sh_error *err)
{
    stream train = {0}, held = {0};
    sh_train_data data = {0}, held_data = {0};
    sh_adapter *adapter = NULL;
    sh_round_result r = {0};
    sh_train_result trained = {0};
    const sh_train_limits limits = {.threads = o->threads, .memory_max = o->memory_max};
    progress steps;
    sh_buf_init(&r.update, UPDATE_BYTES_MAX);
    sh_status status = SH_OK;
    SH_GOTO(make_stream(snapshot, o->heldout, false, o->context, &train));
    if (train.n_targets < SH_MAX(o->tokens_min, 1))
        SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "training: %zu target tokens, the plan asks for %u",
                        train.n_targets, o->tokens_min));
    SH_GOTO(make_data(&train, o->context, &data));
    if (o->heldout) {
        SH_GOTO(make_stream(snapshot, true, true, o->context, &held));
        SH_GOTO(make_data(&held, o->context, &held_data));
    }
    SH_GOTO(sh_lora_initialize(&base->config, o->a_seed, o->rank, o->alpha, &adapter, err));
    if (held.n_targets)
        SH_GOTO(sh_train_evaluate(base, NULL, &held_data, &limits, &r.heldout_before, err));
    sh_train_options to = train_options(o, data.n, &steps);
    SH_GOTO(sh_lora_train(base, adapter, &data, &to, &trained, err));
    if (held.n_targets)
        SH_GOTO(sh_train_evaluate(base, adapter, &held_data, &limits, &r.heldout_after, err));
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
