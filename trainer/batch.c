#include <math.h>
#include <stdlib.h>

#include "shared/math/blas.h"
#include "shared/math/pool.h"
#include "trainer/kernels.h"
#include "trainer/train.h"

typedef struct {
    tr_work *work, *teacher; /* NULL without a teacher */
    float *grad;             /* NULL when every batch is one micro-batch */
    tr_losses sum;
} slot;

struct tr_batcher {
    tr_batcher_options o;
    sh_tile_plan plan;
    size_t micro; /* sequences of a micro-batch */
    size_t n_slots, n_grad;
    slot *slots;
    sh_pool *pool; /* NULL with one slot */

    /* of the call that runs */
    const uint32_t *index;
    size_t n, first; /* sequences; first micro-batch of the wave */
    float scale, *grad;
};

/* ---- the plan ---- */

typedef struct {
    const tr_batcher_options *o;
    tr_work_shape shape;
    size_t n_grad;
    unsigned threads; /* wanted */
} planning;

static size_t n_slots_of(const planning *p)
{
    const size_t n_micro = (p->o->batch + p->shape.sequences - 1) / p->shape.sequences;
    return SH_MIN((size_t)p->threads, n_micro);
}

/* The teacher runs forward only, beside its student. */
static tr_work_shape teacher_shape(const tr_work_shape *student)
{
    return (tr_work_shape){.sequences = student->sequences,
                           .positions = student->positions,
                           .logit_rows = student->logit_rows};
}

static uint64_t bytes_of(const planning *p)
{
    const bool grads = p->n_grad > 0 && p->o->batch > p->shape.sequences;
    const tr_work_shape beside = teacher_shape(&p->shape);
    const tr_net *teacher = p->o->teacher.net;
    return n_slots_of(p) *
           (tr_work_bytes(p->o->net, &p->shape) + (teacher ? tr_work_bytes(teacher, &beside) : 0) +
            (grads ? p->n_grad * sizeof(float) : 0));
}

static bool fits(const planning *p)
{
    return p->o->memory_max == 0 || bytes_of(p) <= p->o->memory_max;
}

/* What costs least time is given up first: logits at once; layers that are kept, as few as have
 * to be; sequences at once, which makes other sums; threads. */
static sh_status make_plan(planning *p, sh_error *err)
{
    const sh_tile_plan *like = p->o->like;
    const size_t n_layers = p->o->net->config.n_layers;
    const size_t positions = p->shape.positions, vocab = p->o->net->config.vocab;
    for (;;) {
        const size_t rows = p->shape.sequences * positions;
        p->shape.logit_rows = SH_MIN(rows, SH_MAX((size_t)TR_LOGIT_ROWS, TR_LOGIT_FLOATS / vocab));
        if (like)
            p->shape.logit_rows = SH_MIN(rows, SH_MAX(like->logit_rows, 1u));
        p->shape.kept = n_layers;
        while (!fits(p) && !like && p->shape.logit_rows > 4 * (size_t)TR_LOGIT_ROWS)
            p->shape.logit_rows /= 2;
        while (!fits(p) && p->shape.kept > 0 && p->shape.backward)
            p->shape.kept--;
        while (!fits(p) && !like && p->shape.logit_rows > TR_LOGIT_ROWS)
            p->shape.logit_rows /= 2;
        if (fits(p))
            return SH_OK;
        if (p->shape.sequences > 1 && !like)
            p->shape.sequences /= 2;
        else if (p->threads > 1)
            p->threads /= 2;
        else
            return sh_fail(err, SH_ERR_LIMIT,
                           "training: the memory limit leaves %llu bytes for activations, and "
                           "sequences of %zu tokens need %llu: %llu more",
                           (unsigned long long)p->o->memory_max, positions,
                           (unsigned long long)bytes_of(p),
                           (unsigned long long)(bytes_of(p) - p->o->memory_max));
    }
}

static planning planning_of(const tr_batcher_options *o)
{
    const size_t positions = o->data->length - 1;
    const size_t sequences = o->like ? o->like->micro_sequences : TR_MICRO_ROWS / positions;
    return (planning){.o = o,
                      .n_grad = o->mode == TR_GRAD_FULL   ? o->net->layout.n
                                : o->mode == TR_GRAD_LORA ? o->net->n_lora
                                                          : 0,
                      .threads = SH_MAX(1u, o->threads),
                      .shape = {.sequences = SH_MIN(SH_MAX((size_t)1, sequences), o->batch),
                                .positions = positions,
                                .backward = o->mode != TR_LOSS_ONLY}};
}

uint64_t tr_batcher_bytes_least(const tr_batcher_options *options)
{
    tr_batcher_options o = *options;
    o.memory_max = 1; /* nothing fits: what is given up last is what is left */
    planning p = planning_of(&o);
    return make_plan(&p, NULL) == SH_OK ? 1 : bytes_of(&p);
}

sh_tile_plan tr_batcher_plan(const tr_batcher *batcher)
{
    return batcher->plan;
}

/* ---- slots ---- */

sh_status tr_batcher_create(const tr_batcher_options *options, tr_batcher **out, sh_error *err)
{
    sh_status status = SH_OK;
    tr_batcher *b = sh_calloc(1, sizeof(*b));
    if (!b)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a batch");
    b->o = *options;
    b->o.like = NULL;
    planning p = planning_of(options);
    b->n_grad = p.n_grad;
    SH_GOTO(make_plan(&p, err));
    b->micro = p.shape.sequences;
    b->n_slots = n_slots_of(&p);
    b->plan = (sh_tile_plan){.threads = (unsigned)b->n_slots,
                             .micro_sequences = (uint32_t)b->micro,
                             .kept_layers = (uint32_t)p.shape.kept,
                             .logit_rows = (uint32_t)p.shape.logit_rows,
                             .bytes = bytes_of(&p)};
    b->slots = sh_calloc(b->n_slots, sizeof(*b->slots));
    if (!b->slots) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a batch");
        goto cleanup;
    }
    const tr_work_shape beside = teacher_shape(&p.shape);
    for (size_t i = 0; i < b->n_slots; i++) {
        SH_GOTO(tr_work_create(options->net, &p.shape, &b->slots[i].work, err));
        if (options->teacher.net)
            SH_GOTO(tr_work_create(options->teacher.net, &beside, &b->slots[i].teacher, err));
        if (b->n_grad == 0 || options->batch <= b->micro)
            continue;
        b->slots[i].grad = sh_alloc_aligned(b->n_grad * sizeof(float));
        if (!b->slots[i].grad) {
            status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for gradients");
            goto cleanup;
        }
    }
    sh_blas_init();
    if (b->n_slots > 1)
        SH_GOTO(sh_pool_create((unsigned)b->n_slots, &b->pool, err));
    *out = b;
    b = NULL;
cleanup:
    tr_batcher_destroy(&b);
    return status;
}

void tr_batcher_destroy(tr_batcher **batcher)
{
    tr_batcher *b = *batcher;
    if (!b)
        return;
    if (b->pool)
        sh_pool_destroy(&b->pool);
    for (size_t i = 0; b->slots && i < b->n_slots; i++) {
        tr_work_destroy(&b->slots[i].work);
        tr_work_destroy(&b->slots[i].teacher);
        free(b->slots[i].grad);
    }
    free(b->slots);
    free(b);
    *batcher = NULL;
}

static void run_micro(void *arg, size_t i)
{
    tr_batcher *b = arg;
    slot *s = &b->slots[i];
    size_t micro = b->first + i, at = micro * b->micro, n = SH_MIN(b->micro, b->n - at);
    s->work->first = b->o.net->dropout.first + (uint32_t)at;
    tr_forward(b->o.net, s->work, b->o.data, b->index + at, n);
    if (s->teacher)
        tr_forward(b->o.teacher.net, s->teacher, b->o.data, b->index + at, n);
    float *grad = micro == 0 ? b->grad : s->grad;
    tr_grads grads = {.weights = b->o.mode == TR_GRAD_FULL ? grad : NULL,
                      .lora = b->o.mode == TR_GRAD_LORA ? grad : NULL};
    const tr_objective objective = {b->scale, b->o.teacher, s->teacher};
    s->sum = tr_backward(b->o.net, s->work, &objective, b->grad ? &grads : NULL);
}

static uint64_t count_targets(const sh_train_data *data, const uint32_t *index, size_t n)
{
    uint64_t count = 0;
    for (size_t s = 0; s < n; s++)
        for (size_t i = 1; i < data->length; i++)
            count += !data->mask ||
                     (data->mask[(size_t)index[s] * data->length + i] & SH_TRAIN_TARGET) != 0;
    return count;
}

tr_batch_loss tr_batcher_run(tr_batcher *b, const uint32_t *index, size_t n, float *grad)
{
    SH_ASSERT(n > 0 && n <= b->o.batch && (grad != NULL) == (b->n_grad > 0));
    tr_batch_loss loss = {.n_targets = count_targets(b->o.data, index, n)};
    size_t n_micro = (n + b->micro - 1) / b->micro;
    b->index = index;
    b->n = n;
    b->grad = grad;
    b->scale = loss.n_targets > 0 ? 1.0f / (float)loss.n_targets : 0.0f;
    for (b->first = 0; b->first < n_micro; b->first += b->n_slots) {
        size_t wave = SH_MIN(b->n_slots, n_micro - b->first);
        if (wave == 1)
            run_micro(b, 0);
        else
            sh_pool_for(b->pool, run_micro, b, wave);
        for (size_t i = 0; i < wave; i++) {
            loss.cross_entropy_sum += b->slots[i].sum.cross_entropy;
            loss.kl_sum += b->slots[i].sum.kl;
            if (grad && b->first + i > 0)
                tr_add(grad, b->slots[i].grad, b->n_grad);
        }
    }
    const double weight = (double)b->o.teacher.weight, t = (double)b->o.teacher.temperature;
    loss.loss_sum = b->o.teacher.net
                        ? (1 - weight) * loss.cross_entropy_sum + weight * t * t * loss.kl_sum
                        : loss.cross_entropy_sum;
    return loss;
}

sh_status tr_data_check(const sh_model_config *config, const sh_train_data *data, sh_error *err)
{
    if (data->n == 0 || data->n > UINT32_MAX || data->length < 2)
        return sh_fail(err, SH_ERR_INVALID,
                       "training data: %zu sequences of %u tokens; need at least one of two tokens",
                       data->n, data->length);
    uint32_t longest = SH_MIN(config->context, (uint32_t)SH_CONTEXT_MAX);
    if (data->length - 1 > longest)
        return sh_fail(err, SH_ERR_LIMIT,
                       "training data: sequences of %u inputs, but the model's context is %u",
                       data->length - 1, longest);
    bool any = false;
    for (size_t i = 0; i < data->n * data->length; i++) {
        if (data->tokens[i] < 0 || (uint32_t)data->tokens[i] >= config->vocab)
            return sh_fail(err, SH_ERR_INVALID,
                           "training data: token %d of sequence %zu is outside the vocabulary of "
                           "%u",
                           data->tokens[i], i / data->length, config->vocab);
        any = any ||
              (i % data->length > 0 && (!data->mask || (data->mask[i] & SH_TRAIN_TARGET) != 0));
    }
    if (!any)
        return sh_fail(err, SH_ERR_INVALID, "training data: the mask leaves no target");
    return SH_OK;
}

#define EVALUATE_BATCH 64 /* micro-batches a call, to keep all workers busy */

sh_status tr_evaluate(const tr_net *net, const sh_train_data *data, const sh_train_limits *limits,
                      double *mean_nll, sh_error *err)
{
    sh_status status = SH_OK;
    tr_batcher *batcher = NULL;
    size_t batch =
        SH_MIN(data->n, EVALUATE_BATCH * SH_MAX((size_t)1, TR_MICRO_ROWS / (data->length - 1)));
    tr_batch_loss sum = {0};
    uint32_t *index = sh_calloc(batch, sizeof(*index));
    if (!index) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", batch);
        goto cleanup;
    }
    SH_GOTO(tr_batcher_create(&(tr_batcher_options){.net = net,
                                                    .data = data,
                                                    .mode = TR_LOSS_ONLY,
                                                    .batch = batch,
                                                    .threads = limits->threads,
                                                    .memory_max = limits->memory_max},
                              &batcher, err));
    for (size_t at = 0; at < data->n; at += batch) {
        const size_t n = SH_MIN(batch, data->n - at);
        for (size_t i = 0; i < n; i++)
            index[i] = (uint32_t)(at + i);
        tr_batch_loss loss = tr_batcher_run(batcher, index, n, NULL);
        sum.loss_sum += loss.loss_sum;
        sum.n_targets += loss.n_targets;
    }
    double mean = sum.loss_sum / (double)sum.n_targets;
    if (!isfinite(mean)) {
        status = sh_fail(err, SH_ERR_INVALID, "evaluation: the loss is not finite");
        goto cleanup;
    }
    *mean_nll = mean;
cleanup:
    tr_batcher_destroy(&batcher);
    free(index);
    return status;
}

sh_status tr_gradient(const tr_net *net, const sh_train_data *data, tr_mode mode, float *grad,
                      double *loss, sh_error *err)
{
    sh_status status = SH_OK;
    tr_batcher *batcher = NULL;
    uint32_t *index = sh_calloc(data->n, sizeof(*index));
    if (!index) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", data->n);
        goto cleanup;
    }
    for (size_t i = 0; i < data->n; i++)
        index[i] = (uint32_t)i;
    SH_GOTO(tr_batcher_create(
        &(tr_batcher_options){
            .net = net, .data = data, .mode = mode, .batch = data->n, .threads = 1},
        &batcher, err));
    tr_batch_loss sum = tr_batcher_run(batcher, index, data->n, grad);
    *loss = sum.loss_sum / (double)sum.n_targets;
cleanup:
    tr_batcher_destroy(&batcher);
    free(index);
    return status;
}
