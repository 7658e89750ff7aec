/*
 * The training loop: order of the data, steps, and what is not finite by its name.
 */
#include "trainer/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/clock.h"
#include "trainer/checkpoint.h"
#include "trainer/kernels.h"
#include "trainer/optimizer.h"

#define PURPOSE_ORDER 0x74726f72u /* names this use of the generator */

/* ---- order of the data ---- */

typedef struct {
    uint32_t *order;
    size_t n, at;
    uint64_t seed, pass;
} sampler;

static void sampler_next(sampler *s, uint32_t *index, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (s->at == s->n)
            s->at = 0;
        if (s->at == 0 && s->seed != 0) {
            sh_rng rng;
            sh_rng_init(&rng, s->seed, s->pass++, PURPOSE_ORDER);
            sh_rng_shuffle(&rng, s->order, s->n);
        }
        index[i] = s->order[s->at++];
    }
}

/* ---- naming what is not finite ---- */

static void name_full(const tr_net *net, size_t at, char *out, size_t bytes)
{
    for (size_t i = 0; i < tr_tensor_count(net); i++) {
        tr_tensor t = tr_tensor_at(net, i);
        if (at >= t.at && at < t.at + t.rows * t.row)
            snprintf(out, bytes, "%s", t.name);
    }
}

static void name_lora(const tr_net *net, size_t at, char *out, size_t bytes)
{
    for (size_t i = 0; i < sh_lora_pair_count(net->config.n_layers); i++) {
        char matrix[SH_GGUF_NAME_MAX];
        size_t g, part;
        const tr_lora *l = tr_pair_lora(net, i, &g, &part);
        const tr_group *group = &net->groups[g];
        sh_lora_pair_name(net->config.n_layers, i, matrix);
        size_t a = l->a + l->at[part] * group->in, b = l->b[part];
        size_t out_p = group->part_at[part + 1] - group->part_at[part];
        bool in_a = at >= a && at < a + l->rank[part] * group->in;
        bool in_b = at >= b && at < b + l->rank[part] * out_p;
        if (in_a || in_b)
            snprintf(out, bytes, "%s.weight.lora_%s", matrix, in_a ? "a" : "b");
    }
}

static bool find_not_finite(const float *x, size_t n, size_t *at)
{
    for (*at = 0; *at < n; (*at)++)
        if (!isfinite(x[*at]))
            return true;
    return false;
}

static bool matrix_is_finite(const sh_matrix *m, float *row)
{
    size_t at;
    for (uint32_t o = 0; o < m->out; o++) {
        sh_row_dequantize(m->type, (const uint8_t *)m->data + o * sh_type_row_bytes(m->type, m->in),
                          row, m->in);
        if (find_not_finite(row, m->in, &at))
            return false;
    }
    return true;
}

static void name_vector(const tr_net *net, char *out, size_t bytes)
{
    const tr_layout *l = &net->layout;
    size_t at;
    if (find_not_finite(tr_output_norm(net), net->config.width, &at))
        name_full(net, l->output_norm, out, bytes);
    for (size_t i = 0; i < net->config.n_layers; i++)
        for (size_t v = 0; v < TR_VECTORS; v++)
            if (l->vector_n[v] > 0 && find_not_finite(tr_vector(net, i, v), l->vector_n[v], &at))
                name_full(net, l->layers + i * l->layer_stride + l->vector[v], out, bytes);
}

/* A weight that is not finite, if any is. */
static void name_weight(const tr_net *net, char *out, size_t bytes)
{
    size_t at, most = net->config.width;
    if (net->weights) {
        if (find_not_finite(net->weights, net->layout.n, &at))
            name_full(net, at, out, bytes);
        return;
    }
    for (size_t g = 0; g < TR_GROUPS; g++)
        most = SH_MAX(most, net->groups[g].in);
    float *row = sh_calloc(most, sizeof(*row));
    for (size_t i = 0; row && i < sh_lora_pair_count(net->config.n_layers); i++) {
        char matrix[SH_GGUF_NAME_MAX];
        if (matrix_is_finite(sh_lora_pair_matrix(net->model, i), row))
            continue;
        sh_lora_pair_name(net->config.n_layers, i, matrix);
        snprintf(out, bytes, "%s.weight", matrix);
    }
    if (row && !matrix_is_finite(&net->model->token_embd, row)) /* the output too when tied */
        name_full(net, net->layout.embd, out, bytes);
    name_vector(net, out, bytes);
    free(row);
}

#define TENSOR_NAME_BYTES (SH_GGUF_NAME_MAX + 16)

/* The loss is not finite: a parameter may be, or a weight of the base. */
static sh_status loss_not_finite(const tr_trainee *t, size_t n, uint32_t step, sh_error *err)
{
    char name[TENSOR_NAME_BYTES] = "";
    const char *whose = "";
    size_t at;
    if (t->mode == TR_GRAD_LORA && find_not_finite(t->params, n, &at))
        name_lora(t->net, at, name, sizeof(name));
    else
        name_weight(t->net, name, sizeof(name));
    if (!name[0] && t->teacher.net) {
        whose = "the teacher's ";
        name_weight(t->teacher.net, name, sizeof(name));
    }
    return sh_fail(err, SH_ERR_INVALID,
                   "training: the loss is not finite at step %u (%s%s is not finite); a lower "
                   "learning rate or clipping may help",
                   step, name[0] ? whose : "", name[0] ? name : "no weight");
}

static sh_status grad_not_finite(const tr_trainee *t, const float *grad, size_t n, uint32_t step,
                                 sh_error *err)
{
    char name[TENSOR_NAME_BYTES] = "the norm of all";
    size_t at;
    if (find_not_finite(grad, n, &at) && t->mode == TR_GRAD_LORA)
        name_lora(t->net, at, name, sizeof(name));
    else if (at < n)
        name_full(t->net, at, name, sizeof(name));
    return sh_fail(err, SH_ERR_INVALID,
                   "training: the gradient of %s is not finite at step %u; a lower learning rate "
                   "or clipping may help",
                   name, step);
}

/* ---- the loop ---- */

static sh_status options_check(const sh_train_options *o, sh_error *err)
{
    const float reals[] = {o->lr,           o->beta1,    o->beta2,    o->eps,     o->clip,
                           o->weight_decay, o->lr_final, o->momentum, o->proximal};
    for (size_t i = 0; i < SH_COUNT(reals); i++)
        if (!isfinite(reals[i]) || reals[i] < 0)
            return sh_fail(err, SH_ERR_INVALID,
                           "training options: lr, betas, eps, clip, decay, lr_final, momentum and "
                           "the proximal weight must be finite and not negative");
    if (o->beta1 >= 1 || o->beta2 >= 1 || o->momentum >= 1)
        return sh_fail(err, SH_ERR_INVALID, "training options: betas and momentum must be below 1");
    if (o->batch == 0 || o->steps == 0 || o->threads > TR_THREADS_MAX)
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: need a batch, steps and at most %d threads",
                       TR_THREADS_MAX);
    if ((o->heldout_every > 0) != (o->heldout != NULL) || (o->patience > 0 && !o->heldout))
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: held-out data, how often to measure its loss, and "
                       "patience go together");
    const sh_train_checkpoint *c = o->checkpoint;
    if (c && (!c->path || !c->path[0] || !(c->every_s >= 0)))
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: a checkpoint needs a path, and seconds between two that "
                       "are not negative");
    return SH_OK;
}

typedef struct {
    const tr_trainee *t;
    const sh_train_options *options;
    const sh_train_data *data;
    size_t n;             /* parameters */
    uint64_t memory_left; /* for activations; 0: no limit */
    sh_tile_plan plan;
    tr_batcher *batcher;
    uint32_t *batch; /* [n_batch] */
    size_t n_batch;
    uint32_t accumulate; /* batches a step */
    float *partial;      /* [n], gradient of a batch after a step's first; NULL: there is none */
    float *best;         /* [n], parameters of the best measurement; NULL: no patience */
    sampler sampler;
    tr_optimizer optimizer;
    tr_state at; /* what optimizer, sampler and plan hold themselves is there only in a file */
    tr_checkpoint checkpoint;
    uint64_t start_ms, saved_ms;
    double seconds_before; /* that a resume adds */
    uint32_t resumed_step;
} loop;

static void loop_release(loop *l)
{
    tr_batcher_destroy(&l->batcher);
    free(l->batch);
    free(l->partial);
    free(l->best);
    free(l->sampler.order);
    tr_optimizer_release(&l->optimizer);
}

static tr_batcher_options batcher_options(const loop *l)
{
    return (tr_batcher_options){.net = l->t->net,
                                .data = l->data,
                                .mode = l->t->mode,
                                .batch = l->n_batch,
                                .threads = l->options->threads,
                                .memory_max = l->memory_left,
                                .teacher = l->t->teacher,
                                .like = l->plan.micro_sequences > 0 ? &l->plan : NULL};
}

/* The least limit, of what is taken without copies of frozen weights: under a limit they are made
 * as tr_copy_bytes says, and then they count. */
static uint64_t memory_least(const loop *l, uint64_t without_copies)
{
    const tr_net *nets[] = {l->t->net, l->t->teacher.net};
    uint64_t least = without_copies, before;
    do {
        before = least;
        least = without_copies;
        for (size_t i = 0; i < SH_COUNT(nets); i++) {
            const uint64_t copy = nets[i] ? nets[i]->layout.n * sizeof(float) : 0;
            if (nets[i] && nets[i]->model && copy <= tr_copy_bytes(before) &&
                (i > 0 || l->t->mode == TR_GRAD_LORA))
                least += copy;
        }
        least = SH_MAX(least, before);
    } while (least > before);
    return least;
}

/* What weights, parameters, optimizer and the order of the data leave for activations. */
static sh_status memory_left(loop *l, sh_error *err)
{
    const tr_net *net = l->t->net, *teacher = l->t->teacher.net;
    const uint64_t memory_max = l->options->memory_max;
    const bool is_lora = l->t->mode == TR_GRAD_LORA; /* else the parameters are the weights */
    const uint64_t copies = is_lora + (l->options->accumulate > 1) + (l->options->patience > 0);
    const uint64_t taken =
        tr_net_bytes(net) + (teacher ? tr_net_bytes(teacher) : 0) + copies * l->n * sizeof(float) +
        (l->n_batch + l->sampler.n) * sizeof(uint32_t) + tr_optimizer_bytes(l->options, l->n);
    if (memory_max == 0)
        return SH_OK;
    const tr_batcher_options o = batcher_options(l);
    const uint64_t least = tr_batcher_bytes_least(&o);
    if (taken + least > memory_max && l->options->memory_least) {
        const uint64_t copied = (is_lora && net->weights ? net->layout.n : 0) +
                                (teacher && teacher->weights ? teacher->layout.n : 0);
        *l->options->memory_least = memory_least(l, taken + least - copied * sizeof(float));
    }
    if (taken + least > memory_max)
        return sh_fail(err, SH_ERR_LIMIT,
                       "training: weights and optimizer take %llu bytes and sequences of %u tokens "
                       "%llu, the memory limit is %llu: %llu more are needed",
                       (unsigned long long)taken, l->data->length - 1, (unsigned long long)least,
                       (unsigned long long)memory_max,
                       (unsigned long long)(taken + least - memory_max));
    l->memory_left = memory_max - taken;
    return SH_OK;
}

/* What is wrong with it is said before the first step. */
static sh_status heldout_check(const loop *l, sh_error *err)
{
    const sh_train_data *heldout = l->options->heldout;
    sh_status status = tr_data_check(&l->t->net->config, heldout, err);
    if (status == SH_OK)
        status = tr_net_reserve_positions(l->t->net, heldout->length - 1, err);
    if (status != SH_OK)
        (void)sh_fail_in(err, "held-out data");
    return status;
}

/* That tr_evaluate gets by with what is left. */
static sh_status heldout_fits(const loop *l, sh_error *err)
{
    const tr_batcher_options o = {.net = l->t->net,
                                  .data = l->options->heldout,
                                  .mode = TR_LOSS_ONLY,
                                  .batch = 1,
                                  .threads = 1,
                                  .memory_max = l->memory_left};
    tr_batcher *batcher = NULL;
    const sh_status status = tr_batcher_create(&o, &batcher, err);
    tr_batcher_destroy(&batcher);
    if (status != SH_OK)
        (void)sh_fail_in(err, "held-out data");
    return status;
}

static sh_status batcher_create(loop *l, sh_error *err)
{
    const tr_batcher_options o = batcher_options(l);
    SH_TRY(tr_batcher_create(&o, &l->batcher, err));
    l->plan = tr_batcher_plan(l->batcher);
    return SH_OK;
}

static double loop_seconds(const loop *l)
{
    return l->seconds_before + (double)(sh_clock_mono_ms() - l->start_ms) / 1e3;
}

static sh_status checkpoint_save(loop *l, sh_error *err)
{
    tr_state state = l->at;
    state.step = l->optimizer.step;
    memcpy(state.updates, l->optimizer.updates, sizeof state.updates);
    state.pass = l->sampler.pass;
    state.order_at = l->sampler.at;
    state.micro_sequences = l->plan.micro_sequences;
    state.logit_rows = l->plan.logit_rows;
    state.seconds = loop_seconds(l);
    SH_TRY(tr_checkpoint_save(&l->checkpoint, &state, err));
    l->saved_ms = sh_clock_mono_ms();
    return SH_OK;
}

/* Before the batcher is made: its plan is the checkpoint's. */
static sh_status checkpoint_init(loop *l, sh_error *err)
{
    bool found = false;
    l->checkpoint = (tr_checkpoint){.trainee = l->t,
                                    .data = l->data,
                                    .options = l->options,
                                    .order = l->sampler.order,
                                    .best = l->best};
    l->checkpoint.n_moments = tr_optimizer_moments(&l->optimizer, l->checkpoint.moments);
    l->saved_ms = sh_clock_mono_ms();
    tr_checkpoint_identify(&l->checkpoint);
    if (l->options->checkpoint->resume)
        SH_TRY(tr_checkpoint_load(&l->checkpoint, &l->at, &found, err));
    if (!found)
        return SH_OK;
    l->optimizer.step = l->resumed_step = l->at.step;
    memcpy(l->optimizer.updates, l->at.updates, sizeof l->at.updates);
    l->sampler.pass = l->at.pass;
    l->sampler.at = (size_t)l->at.order_at;
    l->plan.micro_sequences = l->at.micro_sequences;
    l->plan.logit_rows = l->at.logit_rows;
    l->seconds_before = l->at.seconds;
    return SH_OK;
}

static bool checkpoint_is_due(const loop *l)
{
    const double since_ms = (double)(sh_clock_mono_ms() - l->saved_ms);
    return l->options->checkpoint && since_ms >= l->options->checkpoint->every_s * 1e3;
}

/* On error the caller releases what there is. */
static sh_status loop_init(loop *l, sh_error *err)
{
    const sh_train_options *options = l->options;
    const size_t n = l->t->mode == TR_GRAD_FULL ? l->t->net->layout.n : l->t->net->n_lora;
    l->n = n;
    l->n_batch = SH_MIN((size_t)options->batch, l->data->n);
    l->accumulate = SH_MAX(1u, options->accumulate);
    l->at = (tr_state){.heldout_best = (double)NAN, .heldout_last = (double)NAN};
    l->sampler = (sampler){.n = l->data->n, .seed = options->shuffle_seed};
    if (options->heldout)
        SH_TRY(heldout_check(l, err)); /* its sequences may be longer: before the net is measured */
    SH_TRY(memory_left(l, err));
    l->batch = sh_calloc(l->n_batch, sizeof(*l->batch));
    l->sampler.order = sh_calloc(l->data->n, sizeof(*l->sampler.order));
    if (!l->batch || !l->sampler.order)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", l->data->n);
    for (size_t i = 0; i < l->data->n; i++)
        l->sampler.order[i] = (uint32_t)i;
    if (l->accumulate > 1 && !(l->partial = sh_alloc_aligned(n * sizeof(*l->partial))))
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for gradients");
    if (options->patience > 0 && !(l->best = sh_alloc_aligned(n * sizeof(*l->best))))
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the best parameters");
    SH_TRY(tr_optimizer_create(l->t->net, l->t->mode == TR_GRAD_FULL, options, l->t->params,
                               &l->optimizer, err));
    if (options->heldout)
        SH_TRY(heldout_fits(l, err));
    if (options->checkpoint)
        SH_TRY(checkpoint_init(l, err));
    return batcher_create(l, err);
}

/* The gradient of the mean over all targets of a step's batches: each batch's own mean counts by
 * its targets, so that nothing has to be known of the batches that follow. */
static tr_batch_loss step_gradient(loop *l)
{
    tr_batch_loss sum = {0};
    l->t->net->dropout.step = l->optimizer.step;
    for (uint32_t k = 0; k < l->accumulate; k++) {
        sampler_next(&l->sampler, l->batch, l->n_batch);
        l->t->net->dropout.first = (uint32_t)(k * l->n_batch);
        const tr_batch_loss one = tr_batcher_run(l->batcher, l->batch, l->n_batch,
                                                 k == 0 ? l->optimizer.grad : l->partial);
        const double all = (double)(sum.n_targets + one.n_targets);
        if (k > 0 && one.n_targets > 0)
            tr_blend(l->optimizer.grad, (float)((double)sum.n_targets / all), l->partial,
                     (float)((double)one.n_targets / all), l->n);
        sum.loss_sum += one.loss_sum;
        sum.cross_entropy_sum += one.cross_entropy_sum;
        sum.kl_sum += one.kl_sum;
        sum.n_targets += one.n_targets;
    }
    return sum;
}

/* The memory limit holds for activations of training or of this: the one gives way to the other. */
static sh_status measure_heldout(loop *l, double *loss, sh_error *err)
{
    const sh_train_limits limits = {.threads = l->options->threads, .memory_max = l->memory_left};
    const float dropout = l->t->net->dropout.p;
    tr_batcher_destroy(&l->batcher);
    l->t->net->dropout.p = 0;
    SH_TRY(tr_evaluate(l->t->net, l->options->heldout, &limits, loss, err));
    l->t->net->dropout.p = dropout;
    SH_TRY(batcher_create(l, err));
    l->at.heldout_last = *loss;
    if (l->at.heldout_best_step > 0 && *loss >= l->at.heldout_best) {
        l->at.heldout_since++;
        return SH_OK;
    }
    l->at.heldout_best = *loss;
    l->at.heldout_best_step = l->optimizer.step;
    l->at.heldout_since = 0;
    if (l->best)
        memcpy(l->best, l->t->params, l->n * sizeof(*l->best));
    return SH_OK;
}

static bool loop_is_done(const loop *l)
{
    return l->optimizer.step == l->options->steps ||
           (l->options->patience > 0 && l->at.heldout_since >= l->options->patience);
}

static sh_status loop_step(loop *l, sh_error *err)
{
    const tr_trainee *t = l->t;
    const sh_train_options *options = l->options;
    const uint32_t step = l->optimizer.step + 1;
    const tr_batch_loss sum = step_gradient(l);
    /* A step whose batches are masked out whole teaches nothing, but counts. */
    const double loss = sum.n_targets > 0 ? sum.loss_sum / (double)sum.n_targets : 0.0;
    if (!isfinite(loss))
        return loss_not_finite(t, l->n, step, err);
    if (!tr_optimizer_step(&l->optimizer, t->params))
        return grad_not_finite(t, l->optimizer.grad, l->n, step, err);
    if (t->mode == TR_GRAD_LORA)
        tr_net_use(t->net, t->params);
    l->at.tokens_seen += sum.n_targets;
    l->at.loss_last = loss;
    l->at.cross_entropy_last = sum.cross_entropy_sum / (double)SH_MAX(sum.n_targets, 1u);
    l->at.kl_last = sum.kl_sum / (double)SH_MAX(sum.n_targets, 1u);
    if (step == 1)
        l->at.loss_first = loss;
    double heldout = (double)NAN;
    if (options->heldout && (step % options->heldout_every == 0 || step == options->steps))
        SH_TRY(measure_heldout(l, &heldout, err));
    const sh_train_progress progress = {.step = step,
                                        .steps = options->steps,
                                        .loss = loss,
                                        .heldout_loss = heldout,
                                        .lr = tr_learning_rate(options, step - 1),
                                        .grad_norm = l->optimizer.norm,
                                        .tokens_seen = l->at.tokens_seen,
                                        .seconds = loop_seconds(l)};
    const bool goes_on = !options->progress || options->progress(options->progress_arg, &progress);
    if (options->checkpoint && (!goes_on || checkpoint_is_due(l)))
        SH_TRY(checkpoint_save(l, err));
    if (!goes_on)
        return sh_fail(err, SH_ERR_CANCELLED, "training: cancelled after step %u%s%s", step,
                       options->checkpoint ? "; it can go on from " : "",
                       options->checkpoint ? options->checkpoint->path : "");
    return SH_OK;
}

sh_status tr_train(const tr_trainee *t, const sh_train_data *data, const sh_train_options *options,
                   sh_train_result *result, sh_error *err)
{
    sh_status status = SH_OK;
    loop l = {.t = t, .data = data, .options = options};
    SH_GOTO(options_check(options, err));
    SH_GOTO(loop_init(&l, err));
    if (t->mode == TR_GRAD_LORA)
        tr_net_use(t->net, t->params);
    l.start_ms = sh_clock_mono_ms();
    while (!loop_is_done(&l))
        SH_GOTO(loop_step(&l, err));
    if (l.best)
        memcpy(t->params, l.best, l.n * sizeof(*l.best));
    *result = (sh_train_result){.plan = l.plan,
                                .loss_first = l.at.loss_first,
                                .loss_last = l.at.loss_last,
                                .cross_entropy_last = l.at.cross_entropy_last,
                                .kl_last = l.at.kl_last,
                                .tokens_seen = l.at.tokens_seen,
                                .seconds = loop_seconds(&l),
                                .steps = l.optimizer.step,
                                .heldout_best = l.at.heldout_best,
                                .heldout_last = l.at.heldout_last,
                                .heldout_best_step = l.at.heldout_best_step,
                                .resumed_step = l.resumed_step};
cleanup:
    loop_release(&l);
    return status;
}
