#include "trainer/optimizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PURPOSE_ROUNDING 0x38626974u /* names this use of the generator */
#define CLIP_EPSILON     1e-6        /* torch.nn.utils.clip_grad_norm_ */

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

sh_freeze tr_freeze(const sh_train_options *o, uint32_t step)
{
    if (o->alternate == 0)
        return o->freeze;
    const bool other = step / o->alternate % 2 == 1;
    return (o->freeze == SH_FREEZE_B) != other ? SH_FREEZE_B : SH_FREEZE_A;
}

static size_t n_blocks_of(size_t n)
{
    return (n + TR_BLOCK - 1) / TR_BLOCK;
}

uint64_t tr_optimizer_bytes(const sh_train_options *options, size_t n)
{
    const uint64_t moments = 1 + (options->optimizer == SH_ADAMW);
    const uint64_t vectors = 1 + (options->proximal > 0) + (options->state_8bit ? 0 : moments);
    const uint64_t coded = sizeof(tr_coded) + moments * (n + n_blocks_of(n) * sizeof(float));
    return vectors * n * sizeof(float) + (options->state_8bit ? coded : 0);
}

/* Codes of zeros. */
static bool coded_create(size_t n, bool second, tr_coded **out)
{
    const size_t scales = n_blocks_of(n) * sizeof(float);
    tr_coded *c = *out = sh_calloc(1, sizeof(*c));
    if (!c)
        return false;
    c->block = SIZE_MAX;
    c->m = sh_alloc_aligned(n);
    c->m_scale = sh_alloc_aligned(scales);
    c->v = second ? sh_alloc_aligned(n) : NULL;
    c->v_scale = second ? sh_alloc_aligned(scales) : NULL;
    return c->m && c->m_scale && (!second || (c->v && c->v_scale));
}

static void coded_destroy(tr_coded **coded)
{
    tr_coded *c = *coded;
    if (!c)
        return;
    free(c->m);
    free(c->v);
    free(c->m_scale);
    free(c->v_scale);
    free(c);
    *coded = NULL;
}

sh_status tr_optimizer_create(const tr_net *net, bool full, const sh_train_options *options,
                              const float *params, tr_optimizer *out, sh_error *err)
{
    const size_t n = full ? net->layout.n : net->n_lora, bytes = n * sizeof(float);
    const bool second = options->optimizer == SH_ADAMW;
    tr_optimizer o = {.net = net, .options = options, .full = full, .n = n};
    bool good = (o.grad = sh_alloc_aligned(bytes)) != NULL;
    if (good && options->state_8bit)
        good = coded_create(n, second, &o.coded);
    if (good && !options->state_8bit)
        good = (o.m = sh_alloc_aligned(bytes)) != NULL;
    if (good && !options->state_8bit && second)
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
    coded_destroy(&o->coded);
    *o = (tr_optimizer){0};
}

size_t tr_optimizer_moments(const tr_optimizer *o, tr_area out[TR_MOMENT_AREAS])
{
    const size_t floats = o->n * sizeof(float), scales = n_blocks_of(o->n) * sizeof(float);
    const tr_coded *c = o->coded;
    if (c) {
        out[0] = (tr_area){c->m, o->n};
        out[1] = (tr_area){c->m_scale, scales};
        out[2] = (tr_area){c->v, o->n};
        out[3] = (tr_area){c->v_scale, scales};
        return c->v ? 4 : 2;
    }
    out[0] = (tr_area){o->m, floats};
    out[1] = (tr_area){o->v, floats};
    return o->v ? 2 : 1;
}

/* ---- moments in 8 bits ---- */

static size_t block_values(const tr_optimizer *o, size_t block)
{
    return SH_MIN(o->n - block * TR_BLOCK, (size_t)TR_BLOCK);
}

/* The open block's moments go back to their codes. Rounding by chance depends on step and place. */
static void close_block(tr_optimizer *o)
{
    tr_coded *c = o->coded;
    if (c->block == SIZE_MAX)
        return;
    const size_t at = c->block * TR_BLOCK, n = block_values(o, c->block);
    sh_rng rng;
    sh_rng_init(&rng, o->step, c->block, PURPOSE_ROUNDING);
    c->m_scale[c->block] = tr_encode_first(c->open_m, sh_rng_u32(&rng), n, c->m + at);
    if (c->v)
        c->v_scale[c->block] = tr_encode_second(c->open_v, sh_rng_u32(&rng), n, c->v + at);
    c->block = SIZE_MAX;
}

static void open_block(tr_optimizer *o, size_t block)
{
    tr_coded *c = o->coded;
    const size_t at = block * TR_BLOCK, n = block_values(o, block);
    if (c->block == block)
        return;
    close_block(o);
    tr_decode_first(c->m + at, c->m_scale[block], n, c->open_m);
    if (c->v)
        tr_decode_second(c->v + at, c->v_scale[block], n, c->open_v);
    c->block = block;
}

/* ---- one step ---- */

/* Numbers of this step. */
typedef struct {
    tr_adamw adamw;
    float momentum, lr;
} step_numbers;

/* m, v: of these parameters; v NULL: SGD. */
static void update_values(const step_numbers *s, float *params, const float *grad, float *m,
                          float *v, size_t n)
{
    if (v)
        tr_adamw_update(&s->adamw, params, grad, m, v, n);
    else
        tr_sgd_update(&(tr_sgd){s->momentum, s->lr, s->adamw.decay}, params, grad, m, n);
}

static void update_range(tr_optimizer *o, const step_numbers *numbers, float *params, size_t at,
                         size_t n, bool decays)
{
    step_numbers s = *numbers;
    if (!decays)
        s.adamw.decay = 1.0f;
    if (!o->coded) {
        update_values(&s, params + at, o->grad + at, o->m + at, o->v ? o->v + at : NULL, n);
        return;
    }
    /* Ranges begin and end within blocks: one that two of them share stays open. */
    for (const size_t end = at + n; at < end;) {
        tr_coded *c = o->coded;
        const size_t within = at % TR_BLOCK, piece = SH_MIN(end - at, TR_BLOCK - within);
        open_block(o, at / TR_BLOCK);
        update_values(&s, params + at, o->grad + at, c->open_m + within,
                      c->v ? c->open_v + within : NULL, piece);
        at += piece;
    }
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

static void update_lora(tr_optimizer *o, const step_numbers *s, sh_freeze freeze, float *params)
{
    if (freeze == SH_FREEZE_NONE)
        update_range(o, s, params, 0, o->n, true);
    else
        each_factor(o, freeze == SH_FREEZE_A, s, params, learn_range);
}

/* updates: with this one, of what is updated. */
static step_numbers numbers_of(const sh_train_options *o, double lr, uint32_t updates)
{
    const double beta1 = o->beta1 > 0 ? (double)o->beta1 : 0.9;
    const double beta2 = o->beta2 > 0 ? (double)o->beta2 : 0.999;
    return (step_numbers){
        .adamw = {.beta1 = (float)beta1,
                  .beta2 = (float)beta2,
                  .eps = o->eps > 0 ? o->eps : 1e-8f,
                  .step_size = (float)(lr / (1.0 - pow(beta1, updates))),
                  .sqrt_correction = (float)sqrt(1.0 - pow(beta2, updates)),
                  .decay = (float)(1.0 - lr * (double)o->weight_decay)},
        .momentum = o->momentum,
        .lr = (float)lr,
    };
}

bool tr_optimizer_step(tr_optimizer *o, float *params)
{
    const sh_train_options *options = o->options;
    const sh_freeze freeze = o->full ? SH_FREEZE_NONE : tr_freeze(options, o->step);
    if (o->start)
        tr_proximal(o->grad, params, o->start, options->proximal, o->n);
    if (freeze != SH_FREEZE_NONE)
        each_factor(o, freeze == SH_FREEZE_B, NULL, params, forget_range);
    const double norm = sqrt(tr_sum_squares(o->grad, o->n));
    if (!isfinite(norm))
        return false;
    if (options->clip > 0 && norm > (double)options->clip)
        tr_scale(o->grad, (float)((double)options->clip / (norm + CLIP_EPSILON)), o->n);
    const double lr = tr_learning_rate(options, o->step);
    const step_numbers s = numbers_of(options, lr, ++o->updates[freeze == SH_FREEZE_A]);
    o->norm = norm;
    o->step++;
    if (o->full)
        update_full(o, &s, params);
    else
        update_lora(o, &s, freeze, params);
    if (o->coded)
        close_block(o);
    return true;
}
