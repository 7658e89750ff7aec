#include "trainer/optimizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/kernels.h"

#define CLIP_EPSILON 1e-6 /* torch.nn.utils.clip_grad_norm_ */

double tr_learning_rate(const sh_train_options *o, uint32_t step)
{
    if (step < o->warmup)
        return (double)o->lr * (step + 1.0) / (double)o->warmup;
    double left = (double)(o->steps - step) / (double)SH_MAX(1u, o->steps - o->warmup);
    if (o->schedule == SH_SCHEDULE_CONSTANT)
        left = 1;
    else if (o->schedule == SH_SCHEDULE_COSINE)
        left = 0.5 * (1 - cos(acos(-1.0) * left));
    return (double)o->lr * ((double)o->lr_final + (1.0 - (double)o->lr_final) * left);
}

size_t tr_optimizer_floats(const sh_train_options *options, size_t n)
{
    return n * (2 + (options->optimizer == SH_ADAMW) + (options->proximal > 0));
}

sh_status tr_optimizer_create(const tr_net *net, bool full, const sh_train_options *options,
                              const float *params, tr_optimizer *out, sh_error *err)
{
    const size_t n = full ? net->layout.n : net->n_lora, bytes = n * sizeof(float);
    tr_optimizer o = {.net = net, .options = options, .full = full, .n = n};
    o.grad = sh_alloc_aligned(bytes);
    o.m = sh_alloc_aligned(bytes);
    bool good = o.grad && o.m;
    if (good && options->optimizer == SH_ADAMW)
        good = (o.v = sh_alloc_aligned(bytes)) != NULL;
    if (good && options->proximal > 0)
        good = (o.start = sh_alloc_aligned(bytes)) != NULL;
    if (!good) {
        tr_optimizer_release(&o);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory to train %zu parameters", n);
    }
    if (o.start)
        memcpy(o.start, params, bytes);
    *out = o;
    return SH_OK;
}

void tr_optimizer_release(tr_optimizer *o)
{
    free(o->grad);
    free(o->m);
    free(o->v);
    free(o->start);
    *o = (tr_optimizer){0};
}

/* ---- one step ---- */

/* Numbers of this step. */
typedef struct {
    tr_adamw adamw;
    float momentum, lr;
} step_numbers;

static void update_range(tr_optimizer *o, const step_numbers *s, float *params, size_t at, size_t n,
                         bool decays)
{
    tr_adamw adamw = s->adamw;
    if (!decays)
        adamw.decay = 1.0f;
    if (o->v)
        tr_adamw_update(&adamw, params + at, o->grad + at, o->m + at, o->v + at, n);
    else
        tr_sgd_update(&(tr_sgd){s->momentum, s->lr, adamw.decay}, params + at, o->grad + at,
                      o->m + at, n);
}

/* Matrices decay, norms and biases do not: a norm's weight is a scale around 1. */
static void update_full(tr_optimizer *o, const step_numbers *s, float *params)
{
    const tr_layout *l = &o->net->layout;
    update_range(o, s, params, 0, l->output_norm, true);
    update_range(o, s, params, l->output_norm, l->layers - l->output_norm, false);
    for (size_t i = 0; i < o->net->config.n_layers; i++) {
        const size_t at = l->layers + i * l->layer_stride, vectors = l->group[0];
        update_range(o, s, params, at, vectors, false);
        update_range(o, s, params, at + vectors, l->layer_stride - vectors, true);
    }
}

typedef void (*range_fn)(tr_optimizer *o, const step_numbers *s, float *params, size_t at,
                         size_t n);

/* fn on all A's or all B's. */
static void each_factor(tr_optimizer *o, bool b, const step_numbers *s, float *params, range_fn fn)
{
    for (size_t i = 0; i < tr_lora_count(o->net); i++) {
        const tr_group *group = &o->net->groups[tr_lora_group(o->net, i)];
        const tr_lora *l = &o->net->lora[i];
        if (!b)
            fn(o, s, params, l->a, l->total * group->in);
        for (size_t p = 0; b && p < group->n_parts; p++)
            fn(o, s, params, l->b[p], (group->part_at[p + 1] - group->part_at[p]) * l->rank[p]);
    }
}

static void forget_range(tr_optimizer *o, const step_numbers *s, float *params, size_t at, size_t n)
{
    (void)s;
    (void)params;
    memset(o->grad + at, 0, n * sizeof(*o->grad));
}

static void learn_range(tr_optimizer *o, const step_numbers *s, float *params, size_t at, size_t n)
{
    update_range(o, s, params, at, n, true);
}

static void update_lora(tr_optimizer *o, const step_numbers *s, float *params)
{
    if (o->options->freeze == SH_FREEZE_NONE)
        update_range(o, s, params, 0, o->n, true);
    else
        each_factor(o, o->options->freeze == SH_FREEZE_A, s, params, learn_range);
}

bool tr_optimizer_step(tr_optimizer *o, float *params)
{
    const sh_train_options *options = o->options;
    if (!o->full && options->freeze != SH_FREEZE_NONE)
        each_factor(o, options->freeze == SH_FREEZE_B, NULL, params, forget_range);
    if (o->start)
        tr_proximal(o->grad, params, o->start, options->proximal, o->n);
    const double norm = sqrt(tr_sum_squares(o->grad, o->n));
    if (!isfinite(norm))
        return false;
    if (options->clip > 0 && norm > (double)options->clip)
        tr_scale(o->grad, (float)((double)options->clip / (norm + CLIP_EPSILON)), o->n);
    const double beta1 = options->beta1 > 0 ? (double)options->beta1 : 0.9;
    const double beta2 = options->beta2 > 0 ? (double)options->beta2 : 0.999;
    const double lr = tr_learning_rate(options, o->step);
    o->step++;
    const step_numbers s = {
        .adamw = {.beta1 = (float)beta1,
                  .beta2 = (float)beta2,
                  .eps = options->eps > 0 ? options->eps : 1e-8f,
                  .step_size = (float)(lr / (1.0 - pow(beta1, o->step))),
                  .sqrt_correction = (float)sqrt(1.0 - pow(beta2, o->step)),
                  .decay = (float)(1.0 - lr * (double)options->weight_decay)},
        .momentum = options->momentum,
        .lr = (float)lr,
    };
    if (o->full)
        update_full(o, &s, params);
    else
        update_lora(o, &s, params);
    return true;
}
