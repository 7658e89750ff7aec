/*
 * The training loop: order of the data, steps, and what is not finite by its name.
 */
#include "trainer/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

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

/* The first weight that is not finite, if any is. */
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
        const sh_matrix *m = sh_lora_pair_matrix(net->model, i);
        for (uint32_t o = 0; o < m->out; o++) {
            sh_row_dequantize(m->type,
                              (const uint8_t *)m->data + o * sh_type_row_bytes(m->type, m->in), row,
                              m->in);
            if (find_not_finite(row, m->in, &at)) {
                snprintf(out, bytes, "%s.weight", m->name);
                goto done;
            }
        }
    }
done:
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
    return SH_OK;
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    tr_batcher *batcher;
    uint32_t *batch; /* [n_batch] */
    size_t n_batch;
    sampler sampler;
    tr_optimizer optimizer;
} loop;

static void loop_release(loop *l)
{
    tr_batcher_destroy(&l->batcher);
    free(l->batch);
    free(l->sampler.order);
    tr_optimizer_release(&l->optimizer);
}

/* For the batcher, after weights, parameters and the optimizer. */
static sh_status memory_left(const tr_trainee *t, size_t n, const sh_train_options *options,
                             uint64_t *out, sh_error *err)
{
    const uint64_t memory_max = options->memory_max;
    const tr_net *teacher = t->teacher.net;
    const uint64_t weights = (t->net->weights ? t->net->layout.n : 0) +
                             (teacher && teacher->weights ? teacher->layout.n : 0);
    const uint64_t lora = t->mode == TR_GRAD_LORA ? n + t->net->n_turned : 0;
    const uint64_t taken = (weights + lora + tr_optimizer_floats(options, n)) * sizeof(float);
    if (memory_max > 0 && taken >= memory_max)
        return sh_fail(err, SH_ERR_LIMIT,
                       "training: weights and optimizer take %llu bytes, the memory limit is %llu",
                       (unsigned long long)taken, (unsigned long long)memory_max);
    *out = memory_max > 0 ? memory_max - taken : 0;
    return SH_OK;
}

/* On error the caller releases what there is. */
static sh_status loop_init(loop *l, const tr_trainee *t, const sh_train_data *data,
                           const sh_train_options *options, sh_error *err)
{
    size_t n = t->mode == TR_GRAD_FULL ? t->net->layout.n : t->net->n_lora;
    uint64_t left = 0;
    SH_TRY(memory_left(t, n, options, &left, err));
    l->n_batch = SH_MIN((size_t)options->batch, data->n);
    l->batch = sh_calloc(l->n_batch, sizeof(*l->batch));
    l->sampler = (sampler){.order = sh_calloc(data->n, sizeof(*l->sampler.order)),
                           .n = data->n,
                           .seed = options->shuffle_seed};
    if (!l->batch || !l->sampler.order)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", data->n);
    SH_TRY(tr_optimizer_create(t->net, t->mode == TR_GRAD_FULL, options, t->params, &l->optimizer,
                               err));
    for (size_t i = 0; i < data->n; i++)
        l->sampler.order[i] = (uint32_t)i;
    return tr_batcher_create(&(tr_batcher_options){.net = t->net,
                                                   .data = data,
                                                   .mode = t->mode,
                                                   .batch = l->n_batch,
                                                   .threads = options->threads,
                                                   .memory_max = left,
                                                   .teacher = t->teacher},
                             &l->batcher, err);
}

sh_status tr_train(const tr_trainee *t, const sh_train_data *data, const sh_train_options *options,
                   sh_train_result *result, sh_error *err)
{
    sh_status status = SH_OK;
    loop l = {0};
    sh_train_result r = {0};
    double start = seconds_now();
    SH_GOTO(options_check(options, err));
    SH_GOTO(loop_init(&l, t, data, options, err));
    r.plan = tr_batcher_plan(l.batcher);
    for (uint32_t step = 0; step < options->steps; step++) {
        if (t->mode == TR_GRAD_LORA)
            tr_net_use(t->net, t->params);
        t->net->dropout.step = step;
        sampler_next(&l.sampler, l.batch, l.n_batch);
        tr_batch_loss sum = tr_batcher_run(l.batcher, l.batch, l.n_batch, l.optimizer.grad);
        /* A batch that is masked out whole teaches nothing, but counts as a step. */
        double loss = sum.n_targets > 0 ? sum.loss_sum / (double)sum.n_targets : 0.0;
        if (!isfinite(loss)) {
            status = loss_not_finite(t, l.optimizer.n, step + 1, err);
            goto cleanup;
        }
        if (!tr_optimizer_step(&l.optimizer, t->params)) {
            status = grad_not_finite(t, l.optimizer.grad, l.optimizer.n, step + 1, err);
            goto cleanup;
        }
        r.tokens_seen += sum.n_targets;
        r.loss_last = loss;
        r.cross_entropy_last = sum.cross_entropy_sum / (double)SH_MAX(sum.n_targets, 1u);
        r.kl_last = sum.kl_sum / (double)SH_MAX(sum.n_targets, 1u);
        if (step == 0)
            r.loss_first = loss;
        if (options->progress && !options->progress(options->progress_arg, step + 1, loss)) {
            status = sh_fail(err, SH_ERR_CANCELLED, "training: cancelled after step %u", step + 1);
            goto cleanup;
        }
    }
    r.seconds = seconds_now() - start;
    *result = r;
cleanup:
    loop_release(&l);
    return status;
}
