/*
 * Forward and backward pass of a micro-batch.
 */
#include <string.h>

#include "trainer/kernels.h"
#include "trainer/network.h"

static size_t rows_of(const tr_work *work)
{
    return work->n_sequences * work->shape.positions;
}

/* ---- forward ---- */

static void embed(const tr_net *net, tr_work *work, const sh_train_data *data,
                  const uint32_t *index, size_t n)
{
    const size_t t = work->shape.positions, width = net->config.width;
    work->n_sequences = n;
    work->n_targets = 0;
    for (size_t s = 0; s < n; s++) {
        const size_t at = (size_t)index[s] * data->length;
        const int32_t *tokens = data->tokens + at;
        uint32_t begin = 0;
        work->inputs[s] = tokens;
        for (size_t i = 0; i < t; i++) {
            tr_embedding(net, tokens[i], work->acts[0].x + (s * t + i) * width);
            if (data->mask && data->mask[at + i] & SH_TRAIN_BEGINS)
                begin = (uint32_t)i;
            work->begins[s * t + i] = begin;
            if (!data->mask || data->mask[at + i + 1] & SH_TRAIN_TARGET) {
                work->rows[work->n_targets] = (uint32_t)(s * t + i);
                work->targets[work->n_targets++] = tokens[i + 1];
            }
        }
    }
}

static void add_bias(const tr_net *net, size_t layer, float *qkv, size_t rows)
{
    const tr_group *group = &net->groups[TR_QKV];
    for (size_t p = 0; p < group->n_parts; p++) {
        const float *bias = tr_vector(net, layer, TR_Q_BIAS + p);
        for (size_t i = 0; bias && i < rows; i++)
            tr_add(qkv + i * group->out + group->part_at[p], bias,
                   group->part_at[p + 1] - group->part_at[p]);
    }
}

/* The norms of the heads of q and k; what they were before goes to acts->qk. */
static void norm_heads(const tr_net *net, size_t layer, const tr_acts *a, size_t rows)
{
    const size_t size = net->config.head_size, heads = net->config.n_heads;
    const size_t all = heads + net->config.n_kv_heads, out = net->groups[TR_QKV].out;
    for (size_t i = 0; a->qk && i < rows; i++) {
        float *x = a->qkv + i * out, *before = a->qk + i * all * size;
        memcpy(before, x, all * size * sizeof(*x));
        for (size_t h = 0; h < all; h++) {
            const float *w = tr_vector(net, layer, h < heads ? TR_Q_NORM : TR_K_NORM);
            const float r = tr_rms_scale(before + h * size, net->config.norm_eps, size);
            tr_rmsnorm(before + h * size, w, r, size, x + h * size);
        }
    }
}

static void turn(const tr_net *net, const tr_work *work, float *qkv, float direction)
{
    const sh_model_config *c = &net->config;
    const size_t half = c->head_size / 2, out = net->groups[TR_QKV].out;
    for (size_t i = 0; i < rows_of(work); i++) {
        const size_t t = i % work->shape.positions;
        const tr_angles angles = {net->rope_cos + t * half, net->rope_sin + t * half, half,
                                  c->rope_halves};
        tr_rope(qkv + i * out, &angles, c->n_heads + c->n_kv_heads, direction);
    }
}

static void norm_rows(const float *x, const float *w, const float *r, size_t rows, size_t width,
                      float *y)
{
    for (size_t i = 0; i < rows; i++)
        tr_rmsnorm(x + i * width, w, r[i], width, y + i * width);
}

static tr_product product_of(const tr_acts *a, size_t layer, size_t g, size_t rows, const float *x)
{
    return (tr_product){.at = {.layer = layer, .g = g, .rows = rows}, .x = x, .u = a->u[g]};
}

/* next NULL: what the layer gives on is there already. */
static void layer_forward(const tr_net *net, tr_work *work, size_t layer, float *next)
{
    const sh_model_config *c = &net->config;
    const tr_acts *a = &work->acts[layer];
    const size_t rows = rows_of(work), width = c->width, ffn = c->ffn;
    for (size_t i = 0; i < rows; i++)
        a->r1[i] = tr_rms_scale(a->x + i * width, c->norm_eps, width);
    norm_rows(a->x, tr_vector(net, layer, TR_ATTN_NORM), a->r1, rows, width, work->narrow);
    tr_product p = product_of(a, layer, TR_QKV, rows, work->narrow);
    tr_group_forward(net, work, &p, a->qkv);
    add_bias(net, layer, a->qkv, rows);
    norm_heads(net, layer, a, rows);
    turn(net, work, a->qkv, 1.0f);
    for (size_t s = 0; s < work->n_sequences; s++)
        tr_attention(net, work, a, s);
    p = product_of(a, layer, TR_ATTN_OUTPUT, rows, a->attn_out);
    tr_group_forward(net, work, &p, a->mid);
    tr_add(a->mid, a->x, rows * width);
    for (size_t i = 0; i < rows; i++)
        a->r2[i] = tr_rms_scale(a->mid + i * width, c->norm_eps, width);
    norm_rows(a->mid, tr_vector(net, layer, TR_FFN_NORM), a->r2, rows, width, work->narrow);
    p = product_of(a, layer, TR_GATE_UP, rows, work->narrow);
    tr_group_forward(net, work, &p, a->gate_up);
    for (size_t i = 0; i < rows; i++)
        tr_swiglu(a->gate_up + i * 2 * ffn, a->gate_up + i * 2 * ffn + ffn, ffn,
                  work->wide + i * ffn);
    p = product_of(a, layer, TR_DOWN, rows, work->wide);
    tr_group_forward(net, work, &p, next);
    if (next)
        tr_add(next, a->mid, rows * width);
}

void tr_forward(const tr_net *net, tr_work *work, const sh_train_data *data, const uint32_t *index,
                size_t n)
{
    SH_ASSERT(n <= work->shape.sequences && data->length == work->shape.positions + 1 &&
              work->shape.positions <= net->rope_n);
    embed(net, work, data, index, n);
    for (size_t l = 0; l < net->config.n_layers; l++)
        layer_forward(net, work, l, work->acts[l + 1].x);
}

/* ---- backward ---- */

static float *vector_grad(const tr_net *net, size_t layer, size_t which, const tr_grads *grads)
{
    const tr_layout *l = &net->layout;
    if (!grads->weights || l->vector_n[which] == 0)
        return NULL;
    float *at = grads->weights + l->layers + layer * l->layer_stride + l->vector[which];
    memset(at, 0, l->vector_n[which] * sizeof(*at));
    return at;
}

/* dx += gradient through the norm whose input rows were x. */
typedef struct {
    const float *x, *r, *dy;
    size_t layer, which;
} norm_pass;

static void norm_backward(const tr_net *net, tr_work *work, const norm_pass *s,
                          const tr_grads *grads)
{
    const size_t rows = rows_of(work), width = net->config.width;
    const float *w = tr_vector(net, s->layer, s->which);
    float *dw = vector_grad(net, s->layer, s->which, grads);
    for (size_t i = 0; i < rows; i++) {
        const float *x = s->x + i * width, *dy = s->dy + i * width;
        tr_rmsnorm_backward(work->dx + i * width, dy, x, w, s->r[i], width);
        if (dw)
            tr_rmsnorm_backward_weight(dw, dy, x, s->r[i], width);
    }
}

static void ffn_backward(const tr_net *net, tr_work *work, size_t layer, const tr_grads *grads)
{
    const tr_acts *a = &work->acts[layer];
    const size_t rows = rows_of(work), width = net->config.width, ffn = net->config.ffn;
    for (size_t i = 0; i < rows; i++)
        tr_swiglu(a->gate_up + i * 2 * ffn, a->gate_up + i * 2 * ffn + ffn, ffn,
                  work->wide + i * ffn);
    tr_product p = product_of(a, layer, TR_DOWN, rows, work->wide);
    tr_group_backward(net, work, &p, work->dx, work->dnarrow, grads);
    for (size_t i = 0; i < rows; i++) {
        float *d = work->dwide + i * 2 * ffn;
        memcpy(d, a->gate_up + i * 2 * ffn, 2 * ffn * sizeof(*d));
        tr_swiglu_backward(d, d + ffn, work->dnarrow + i * ffn, ffn);
    }
    norm_rows(a->mid, tr_vector(net, layer, TR_FFN_NORM), a->r2, rows, width, work->narrow);
    p = product_of(a, layer, TR_GATE_UP, rows, work->narrow);
    tr_group_backward(net, work, &p, work->dwide, work->dnarrow, grads);
    norm_backward(net, work, &(norm_pass){a->mid, a->r2, work->dnarrow, layer, TR_FFN_NORM}, grads);
}

/* From the gradient of the heads after their norms to that before them, in place. */
static void heads_backward(const tr_net *net, size_t layer, const tr_acts *a, float *dqkv,
                           size_t rows, const tr_grads *grads)
{
    const size_t size = net->config.head_size, heads = net->config.n_heads;
    const size_t all = heads + net->config.n_kv_heads, out = net->groups[TR_QKV].out;
    float *dw[] = {vector_grad(net, layer, TR_Q_NORM, grads),
                   vector_grad(net, layer, TR_K_NORM, grads)};
    for (size_t i = 0; a->qk && i < rows; i++) {
        for (size_t h = 0; h < all; h++) {
            const size_t is_k = h >= heads;
            const float *x = a->qk + (i * all + h) * size;
            const float *w = tr_vector(net, layer, TR_Q_NORM + is_k);
            const float r = tr_rms_scale(x, net->config.norm_eps, size);
            float *dy = dqkv + i * out + h * size;
            if (dw[is_k])
                tr_rmsnorm_backward_weight(dw[is_k], dy, x, r, size);
            tr_rmsnorm_backward_in_place(dy, x, w, r, size);
        }
    }
}

static void bias_backward(const tr_net *net, size_t layer, const float *dqkv, size_t rows,
                          const tr_grads *grads)
{
    const tr_group *group = &net->groups[TR_QKV];
    for (size_t p = 0; p < group->n_parts; p++) {
        float *db = vector_grad(net, layer, TR_Q_BIAS + p, grads);
        for (size_t i = 0; db && i < rows; i++)
            tr_add(db, dqkv + i * group->out + group->part_at[p],
                   group->part_at[p + 1] - group->part_at[p]);
    }
}

/* need_dx false: the layer's own input needs no gradient (only what is frozen is below). */
static void attention_part_backward(const tr_net *net, tr_work *work, size_t layer, bool need_dx,
                                    const tr_grads *grads)
{
    const tr_acts *a = &work->acts[layer];
    const size_t rows = rows_of(work), width = net->config.width;
    tr_product p = product_of(a, layer, TR_ATTN_OUTPUT, rows, a->attn_out);
    tr_group_backward(net, work, &p, work->dx, work->dnarrow, grads);
    for (size_t s = 0; s < work->n_sequences; s++)
        tr_attention_backward(net, work, a, work->dnarrow, work->dwide, s);
    turn(net, work, work->dwide, -1.0f);
    heads_backward(net, layer, a, work->dwide, rows, grads);
    bias_backward(net, layer, work->dwide, rows, grads);
    norm_rows(a->x, tr_vector(net, layer, TR_ATTN_NORM), a->r1, rows, width, work->narrow);
    p = product_of(a, layer, TR_QKV, rows, work->narrow);
    tr_group_backward(net, work, &p, work->dwide, need_dx ? work->dnarrow : NULL, grads);
    if (need_dx)
        norm_backward(net, work, &(norm_pass){a->x, a->r1, work->dnarrow, layer, TR_ATTN_NORM},
                      grads);
}

/* ---- the last norm, the output matrix and the loss ---- */

/* Below it nothing has a gradient; n_layers: only the head has. */
static size_t first_layer(const tr_net *net, const tr_grads *grads)
{
    return grads->weights ? 0 : net->lora_from;
}

/* On rows that have a target only. */
static void last_norm(const tr_net *net, tr_work *work)
{
    const size_t width = net->config.width;
    const float *x = work->acts[net->config.n_layers].x, *norm = tr_output_norm(net);
    for (size_t i = 0; i < work->n_targets; i++) {
        const float *row = x + work->rows[i] * width;
        work->final_r[i] = tr_rms_scale(row, net->config.norm_eps, width);
        tr_rmsnorm(row, norm, work->final_r[i], width, work->final_in + i * width);
    }
}

/* Targets [at, at + rows) as rows of the output matrix's product. */
static tr_product head_product(const tr_net *net, const tr_work *work, size_t at, size_t rows)
{
    return (tr_product){.at = {.g = TR_HEAD, .rows = rows, .index = work->rows + at},
                        .x = work->final_in + at * net->config.width,
                        .u = work->head_u,
                        .add = at > 0};
}

/* Adds the losses of these targets, whose logits become their gradients. */
static void add_losses(const tr_net *net, tr_work *work, const tr_objective *o, size_t at,
                       size_t rows, tr_losses *sum)
{
    const size_t vocab = net->config.vocab;
    const tr_teacher *teacher = &o->teacher;
    const tr_mixture mixture = {teacher->weight, teacher->temperature, o->scale};
    const tr_product p = head_product(net, work, at, rows);
    tr_group_forward(net, work, &p, work->logits);
    if (teacher->net) {
        const tr_product beside = head_product(teacher->net, o->teacher_work, at, rows);
        tr_group_forward(teacher->net, o->teacher_work, &beside, o->teacher_work->logits);
    }
    for (size_t i = 0; i < rows; i++) {
        float *z = work->logits + i * vocab;
        const size_t target = (size_t)work->targets[at + i];
        if (!teacher->net) {
            sum->cross_entropy += tr_cross_entropy(z, vocab, target, o->scale);
            continue;
        }
        const tr_losses one =
            tr_distill(&mixture, z, o->teacher_work->logits + i * vocab, vocab, target);
        sum->cross_entropy += one.cross_entropy;
        sum->kl += one.kl;
    }
}

/* With grads, final_in becomes its own gradient, if anything below the head needs it. */
static tr_losses head(const tr_net *net, tr_work *work, const tr_objective *o,
                      const tr_grads *grads)
{
    const bool below = grads && first_layer(net, grads) < net->config.n_layers;
    tr_losses sum = {0};
    last_norm(net, work);
    if (o->teacher.net)
        last_norm(o->teacher.net, o->teacher_work);
    for (size_t at = 0; at < work->n_targets; at += work->shape.logit_rows) {
        const size_t rows = SH_MIN(work->shape.logit_rows, work->n_targets - at);
        const tr_product p = head_product(net, work, at, rows);
        add_losses(net, work, o, at, rows, &sum);
        if (grads)
            tr_group_backward(net, work, &p, work->logits,
                              below ? work->final_in + at * net->config.width : NULL, grads);
    }
    return sum;
}

static void final_norm_backward(const tr_net *net, tr_work *work, const tr_grads *grads)
{
    const size_t width = net->config.width;
    const float *x = work->acts[net->config.n_layers].x, *w = tr_output_norm(net);
    memset(work->dx, 0, rows_of(work) * width * sizeof(float));
    if (grads->weights)
        memset(grads->weights + net->layout.output_norm, 0, width * sizeof(float));
    for (size_t i = 0; i < work->n_targets; i++) {
        const float *dy = work->final_in + i * width, *row = x + work->rows[i] * width;
        tr_rmsnorm_backward(work->dx + work->rows[i] * width, dy, row, w, work->final_r[i], width);
        if (grads->weights)
            tr_rmsnorm_backward_weight(grads->weights + net->layout.output_norm, dy, row,
                                       work->final_r[i], width);
    }
}

static void embedding_backward(const tr_net *net, tr_work *work, float *grad)
{
    const size_t width = net->config.width, positions = work->shape.positions;
    for (size_t s = 0; s < work->n_sequences; s++)
        for (size_t t = 0; t < positions; t++)
            tr_add(grad + (size_t)work->inputs[s][t] * width,
                   work->dx + (s * positions + t) * width, width);
}

tr_losses tr_backward(const tr_net *net, tr_work *work, const tr_objective *objective,
                      const tr_grads *grads)
{
    if (grads && work->n_targets == 0) {
        if (grads->weights)
            memset(grads->weights, 0, net->layout.n * sizeof(float));
        if (grads->lora)
            memset(grads->lora, 0, net->n_lora * sizeof(float));
        return (tr_losses){0};
    }
    const tr_losses losses = head(net, work, objective, grads);
    const size_t n_layers = net->config.n_layers, end = grads ? first_layer(net, grads) : n_layers;
    if (end == n_layers)
        return losses;
    final_norm_backward(net, work, grads);
    for (size_t l = n_layers; l-- > end;) {
        if (l < n_layers - work->shape.kept)
            layer_forward(net, work, l, NULL);
        ffn_backward(net, work, l, grads);
        attention_part_backward(net, work, l, l > end || grads->weights, grads);
    }
    if (grads->weights) {
        float *embd = grads->weights + net->layout.embd;
        if (!net->config.tied_output)
            memset(embd, 0, (size_t)net->config.vocab * net->config.width * sizeof(float));
        embedding_backward(net, work, embd);
    }
    return losses;
}
