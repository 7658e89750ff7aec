/*
 * Forward and backward pass of a micro-batch, and the memory that they work in.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/math/blas.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

#define ALIGN_FLOATS     16
#define LOGIT_FLOATS_MAX (1u << 20) /* logits held at a time, so that a large vocabulary fits */

/* ---- memory ---- */

/* With base NULL only counts: the same code measures and carves. */
static float *carve(float *base, size_t *at, size_t n)
{
    float *here = base ? base + *at : NULL;
    *at += (n + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    return here;
}

static void carve_layer(const tr_net *net, const tr_work *w, tr_acts *a, float *base, size_t *at)
{
    const sh_model_config *c = &net->config;
    size_t rows = w->sequences_max * w->positions;
    a->attn_in = carve(base, at, rows * c->width);
    a->qkv = carve(base, at, rows * w->ld_qkv);
    a->p = carve(base, at, rows * c->n_heads * w->positions);
    a->attn_out = carve(base, at, rows * net->groups[TR_ATTN_OUTPUT].in);
    a->mid = carve(base, at, rows * w->ld_mid);
    a->ffn_in = carve(base, at, rows * c->width);
    a->gate_up = carve(base, at, rows * w->ld_gate_up);
    a->h = carve(base, at, rows * c->ffn);
    a->r1 = carve(base, at, rows);
    a->r2 = carve(base, at, rows);
}

static size_t carve_all(const tr_net *net, tr_work *w, bool backward, float *base)
{
    const sh_model_config *c = &net->config;
    size_t rows = w->sequences_max * w->positions, at = 0, n_layers = c->n_layers;
    for (size_t l = 0; l <= n_layers; l++) {
        if (l > 0 && !backward) {
            w->acts[l] = w->acts[0];
            continue;
        }
        w->acts[l].x = carve(base, &at, rows * w->ld_x);
        if (l < n_layers)
            carve_layer(net, w, &w->acts[l], base, &at);
    }
    w->final_in = carve(base, &at, rows * c->width);
    w->final_r = carve(base, &at, rows);
    w->logits = carve(base, &at, w->logit_rows * c->vocab);
    if (backward) {
        size_t wide = SH_MAX(net->groups[TR_QKV].out, net->groups[TR_GATE_UP].out);
        w->dx = carve(base, &at, rows * c->width);
        w->dnarrow = carve(base, &at, rows * w->ld_narrow);
        w->dwide = carve(base, &at, rows * wide);
        w->dp = carve(base, &at, (size_t)TR_QUERY_BLOCK * w->positions);
    }
    return at;
}

sh_status tr_work_create(const tr_net *net, size_t sequences_max, size_t positions, bool backward,
                         tr_work **out, sh_error *err)
{
    const tr_group *g = net->groups;
    size_t rows = sequences_max * positions;
    tr_work *w = sh_calloc(1, sizeof(*w));
    if (!w)
        goto no_memory;
    w->sequences_max = sequences_max;
    w->positions = positions;
    w->logit_rows = SH_MIN(rows, SH_MAX((size_t)16, LOGIT_FLOATS_MAX / net->config.vocab));
    w->ld_x = g[TR_DOWN].out + net->border[TR_DOWN];
    w->ld_mid = g[TR_ATTN_OUTPUT].out + net->border[TR_ATTN_OUTPUT];
    w->ld_qkv = g[TR_QKV].out + net->border[TR_QKV];
    w->ld_gate_up = g[TR_GATE_UP].out + net->border[TR_GATE_UP];
    for (size_t i = 0; i < TR_GROUPS; i++)
        w->ld_narrow = SH_MAX(w->ld_narrow, g[i].in + net->border[i]);
    w->acts = sh_calloc((size_t)net->config.n_layers + 1, sizeof(*w->acts));
    w->rows = sh_calloc(rows, sizeof(*w->rows));
    w->targets = sh_calloc(rows, sizeof(*w->targets));
    w->inputs = sh_calloc(sequences_max, sizeof(*w->inputs));
    if (!w->acts || !w->rows || !w->targets || !w->inputs)
        goto no_memory;
    w->block = sh_alloc_aligned(carve_all(net, w, backward, NULL) * sizeof(float));
    if (!w->block)
        goto no_memory;
    carve_all(net, w, backward, w->block);
    *out = w;
    return SH_OK;
no_memory:
    tr_work_destroy(&w);
    return sh_fail(err, SH_ERR_NO_MEMORY,
                   "no memory for the activations of %zu sequences of %zu tokens", sequences_max,
                   positions);
}

void tr_work_destroy(tr_work **work)
{
    if (!*work)
        return;
    free((*work)->acts);
    free((*work)->rows);
    free((*work)->targets);
    free((void *)(*work)->inputs);
    free((*work)->block);
    free(*work);
    *work = NULL;
}

/* ---- the matrices of a layer ---- */

typedef struct {
    const float *w; /* [out + border, in + border] */
    size_t ld, in, out, border;
} matrix_view;

static matrix_view matrix_of(const tr_net *net, size_t layer, size_t g)
{
    const tr_group *group = &net->groups[g];
    matrix_view v = {.in = group->in, .out = group->out, .border = net->border[g]};
    v.ld = v.in + v.border;
    v.w = net->effective ? net->effective + layer * net->effective_stride + net->effective_at[g]
                         : net->weights + net->layout.layers + layer * net->layout.layer_stride +
                               net->layout.group[g];
    return v;
}

static const float *norm_of(const tr_net *net, size_t layer, size_t which)
{
    return net->weights + net->layout.layers + layer * net->layout.layer_stride + which;
}

/* y [rows, out + border] = x [rows, in] · Wᵀ */
static void group_forward(const tr_net *net, size_t layer, size_t g, const float *x, float *y,
                          size_t rows)
{
    matrix_view m = matrix_of(net, layer, g);
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = rows,
                        .n = m.out + m.border,
                        .k = m.in,
                        .alpha = 1.0f,
                        .a = x,
                        .lda = m.in,
                        .b = m.w,
                        .ldb = m.ld,
                        .c = y,
                        .ldc = m.out + m.border});
}

/* ---- forward ---- */

static void embed(const tr_net *net, tr_work *work, const sh_train_data *data,
                  const uint32_t *index, size_t n)
{
    size_t t = work->positions, width = net->config.width;
    work->n_sequences = n;
    work->n_targets = 0;
    for (size_t s = 0; s < n; s++) {
        size_t at = (size_t)index[s] * data->length;
        const int32_t *tokens = data->tokens + at;
        work->inputs[s] = tokens;
        for (size_t i = 0; i < t; i++) {
            memcpy(work->acts[0].x + (s * t + i) * work->ld_x,
                   net->weights + net->layout.embd + (size_t)tokens[i] * width,
                   width * sizeof(float));
            if (!data->mask || data->mask[at + i + 1]) {
                work->rows[work->n_targets] = (uint32_t)(s * t + i);
                work->targets[work->n_targets++] = tokens[i + 1];
            }
        }
    }
}

static void layer_forward(const tr_net *net, tr_work *work, size_t layer)
{
    const sh_model_config *c = &net->config;
    const tr_acts *a = &work->acts[layer];
    float *next = work->acts[layer + 1].x;
    size_t rows = work->n_sequences * work->positions, width = c->width, half = c->head_size / 2;
    for (size_t i = 0; i < rows; i++)
        a->r1[i] = tr_rmsnorm(a->x + i * work->ld_x, norm_of(net, layer, net->layout.attn_norm),
                              c->norm_eps, width, a->attn_in + i * width);
    group_forward(net, layer, TR_QKV, a->attn_in, a->qkv, rows);
    for (size_t i = 0; i < rows; i++) {
        size_t t = i % work->positions;
        tr_rope(a->qkv + i * work->ld_qkv, net->rope_cos + t * half, net->rope_sin + t * half, half,
                c->n_heads + c->n_kv_heads, 1.0f);
    }
    for (size_t s = 0; s < work->n_sequences; s++)
        tr_attention(net, work, a, s);
    group_forward(net, layer, TR_ATTN_OUTPUT, a->attn_out, a->mid, rows);
    for (size_t i = 0; i < rows; i++) {
        float *mid = a->mid + i * work->ld_mid;
        tr_add(mid, a->x + i * work->ld_x, width);
        a->r2[i] = tr_rmsnorm(mid, norm_of(net, layer, net->layout.ffn_norm), c->norm_eps, width,
                              a->ffn_in + i * width);
    }
    group_forward(net, layer, TR_GATE_UP, a->ffn_in, a->gate_up, rows);
    for (size_t i = 0; i < rows; i++) {
        const float *gate = a->gate_up + i * work->ld_gate_up;
        tr_swiglu(gate, gate + c->ffn, c->ffn, a->h + i * c->ffn);
    }
    group_forward(net, layer, TR_DOWN, a->h, next, rows);
    for (size_t i = 0; i < rows; i++)
        tr_add(next + i * work->ld_x, a->mid + i * work->ld_mid, width);
}

void tr_forward(const tr_net *net, tr_work *work, const sh_train_data *data, const uint32_t *index,
                size_t n)
{
    SH_ASSERT(n <= work->sequences_max && data->length == work->positions + 1 &&
              work->positions <= net->rope_n);
    embed(net, work, data, index, n);
    for (size_t l = 0; l < net->config.n_layers; l++)
        layer_forward(net, work, l);
}

/* ---- backward ---- */

/* Gradients of one group. x [rows, in] is its input, u [rows, border] with ld_u its low-rank
 * product, dy [rows, out] dense. dx | du [rows, in + border] is written. */
typedef struct {
    const float *x, *u, *dy;
    float *dx;
    size_t ld_u, rows;
    bool need_dx; /* false: only du */
} group_pass;

static void lora_grads(const tr_net *net, size_t layer, size_t g, const group_pass *s, float *grad)
{
    const tr_group *group = &net->groups[g];
    const tr_lora *l = &net->lora[layer * TR_GROUPS + g];
    size_t ld = group->in + net->border[g];
    if (l->total == 0)
        return;
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = l->total,
                        .n = group->in,
                        .k = s->rows,
                        .alpha = 1.0f,
                        .a = s->dx + group->in,
                        .lda = ld,
                        .b = s->x,
                        .ldb = group->in,
                        .c = grad + l->a,
                        .ldc = group->in});
    for (size_t p = 0; p < group->n_parts; p++) {
        size_t out = group->part_at[p + 1] - group->part_at[p];
        if (l->rank[p] == 0)
            continue;
        sh_sgemm(&(sh_gemm){.trans_a = true,
                            .m = out,
                            .n = l->rank[p],
                            .k = s->rows,
                            .alpha = l->scale[p],
                            .a = s->dy + group->part_at[p],
                            .lda = group->out,
                            .b = s->u + l->at[p],
                            .ldb = s->ld_u,
                            .c = grad + l->b[p],
                            .ldc = l->rank[p]});
    }
}

static void group_backward(const tr_net *net, size_t layer, size_t g, const group_pass *s,
                           const tr_grads *grads)
{
    matrix_view m = matrix_of(net, layer, g);
    size_t skip = s->need_dx ? 0 : m.in, columns = m.in + m.border - skip;
    if (columns > 0)
        sh_sgemm(&(sh_gemm){.m = s->rows,
                            .n = columns,
                            .k = m.out,
                            .alpha = 1.0f,
                            .a = s->dy,
                            .lda = m.out,
                            .b = m.w + skip,
                            .ldb = m.ld,
                            .c = s->dx + skip,
                            .ldc = m.ld});
    if (grads->lora)
        lora_grads(net, layer, g, s, grads->lora);
    if (grads->weights)
        sh_sgemm(&(sh_gemm){.trans_a = true,
                            .m = m.out,
                            .n = m.in,
                            .k = s->rows,
                            .alpha = 1.0f,
                            .a = s->dy,
                            .lda = m.out,
                            .b = s->x,
                            .ldb = m.in,
                            .c = grads->weights + net->layout.layers +
                                 layer * net->layout.layer_stride + net->layout.group[g],
                            .ldc = m.in});
}

/* dx += gradient through the norm whose input rows were x; dy rows have leading dimension ld_dy. */
typedef struct {
    const float *x, *r, *dy;
    size_t ld_x, ld_dy, layer, which; /* which: offset of the norm in the layer */
} norm_pass;

static void norm_backward(const tr_net *net, tr_work *work, const norm_pass *s,
                          const tr_grads *grads)
{
    size_t rows = work->n_sequences * work->positions, width = net->config.width;
    const float *w = norm_of(net, s->layer, s->which);
    float *dw = NULL;
    if (grads->weights) {
        dw = grads->weights + (w - net->weights);
        memset(dw, 0, width * sizeof(*dw));
    }
    for (size_t i = 0; i < rows; i++) {
        const float *x = s->x + i * s->ld_x, *dy = s->dy + i * s->ld_dy;
        tr_rmsnorm_backward(work->dx + i * width, dy, x, w, s->r[i], width);
        if (dw)
            tr_rmsnorm_backward_weight(dw, dy, x, s->r[i], width);
    }
}

static void ffn_backward(const tr_net *net, tr_work *work, size_t layer, const tr_grads *grads)
{
    const tr_acts *a = &work->acts[layer];
    size_t rows = work->n_sequences * work->positions, width = net->config.width;
    size_t ffn = net->config.ffn, ld_h = ffn + net->border[TR_DOWN];
    group_backward(net, layer, TR_DOWN,
                   &(group_pass){.x = a->h,
                                 .u = work->acts[layer + 1].x + width,
                                 .ld_u = work->ld_x,
                                 .dy = work->dx,
                                 .dx = work->dnarrow,
                                 .rows = rows,
                                 .need_dx = true},
                   grads);
    for (size_t i = 0; i < rows; i++) {
        float *d = work->dwide + i * 2 * ffn;
        memcpy(d, a->gate_up + i * work->ld_gate_up, 2 * ffn * sizeof(*d));
        tr_swiglu_backward(d, d + ffn, work->dnarrow + i * ld_h, ffn);
    }
    group_backward(net, layer, TR_GATE_UP,
                   &(group_pass){.x = a->ffn_in,
                                 .u = a->gate_up + 2 * ffn,
                                 .ld_u = work->ld_gate_up,
                                 .dy = work->dwide,
                                 .dx = work->dnarrow,
                                 .rows = rows,
                                 .need_dx = true},
                   grads);
    norm_backward(net, work,
                  &(norm_pass){.x = a->mid,
                               .ld_x = work->ld_mid,
                               .r = a->r2,
                               .dy = work->dnarrow,
                               .ld_dy = width + net->border[TR_GATE_UP],
                               .layer = layer,
                               .which = net->layout.ffn_norm},
                  grads);
}

/* need_dx false: the layer's own input needs no gradient (a frozen embedding is below). */
static void attention_part_backward(const tr_net *net, tr_work *work, size_t layer, bool need_dx,
                                    const tr_grads *grads)
{
    const sh_model_config *c = &net->config;
    const tr_acts *a = &work->acts[layer];
    size_t rows = work->n_sequences * work->positions, width = c->width, half = c->head_size / 2;
    size_t q = net->groups[TR_ATTN_OUTPUT].in, qkv = net->groups[TR_QKV].out;
    group_backward(net, layer, TR_ATTN_OUTPUT,
                   &(group_pass){.x = a->attn_out,
                                 .u = a->mid + width,
                                 .ld_u = work->ld_mid,
                                 .dy = work->dx,
                                 .dx = work->dnarrow,
                                 .rows = rows,
                                 .need_dx = true},
                   grads);
    for (size_t s = 0; s < work->n_sequences; s++)
        tr_attention_backward(net, work, a,
                              &(tr_attention_grads){.dout = work->dnarrow,
                                                    .ld_out = q + net->border[TR_ATTN_OUTPUT],
                                                    .dqkv = work->dwide},
                              s);
    for (size_t i = 0; i < rows; i++) {
        size_t t = i % work->positions;
        tr_rope(work->dwide + i * qkv, net->rope_cos + t * half, net->rope_sin + t * half, half,
                c->n_heads + c->n_kv_heads, -1.0f);
    }
    group_backward(net, layer, TR_QKV,
                   &(group_pass){.x = a->attn_in,
                                 .u = a->qkv + qkv,
                                 .ld_u = work->ld_qkv,
                                 .dy = work->dwide,
                                 .dx = work->dnarrow,
                                 .rows = rows,
                                 .need_dx = need_dx},
                   grads);
    if (need_dx)
        norm_backward(net, work,
                      &(norm_pass){.x = a->x,
                                   .ld_x = work->ld_x,
                                   .r = a->r1,
                                   .dy = work->dnarrow,
                                   .ld_dy = width + net->border[TR_QKV],
                                   .layer = layer,
                                   .which = net->layout.attn_norm},
                      grads);
}

/* The last norm, the output matrix and the loss, on rows that have a target only. With grads,
 * final_in becomes its own gradient. */
static double head(const tr_net *net, tr_work *work, float scale, const tr_grads *grads)
{
    const sh_model_config *c = &net->config;
    size_t width = c->width, vocab = c->vocab;
    const float *x = work->acts[c->n_layers].x, *output = net->weights + net->layout.output;
    double loss = 0;
    for (size_t i = 0; i < work->n_targets; i++)
        work->final_r[i] =
            tr_rmsnorm(x + work->rows[i] * work->ld_x, net->weights + net->layout.output_norm,
                       c->norm_eps, width, work->final_in + i * width);
    for (size_t at = 0; at < work->n_targets; at += work->logit_rows) {
        size_t rows = SH_MIN(work->logit_rows, work->n_targets - at);
        float *in = work->final_in + at * width;
        sh_sgemm(&(sh_gemm){.trans_b = true,
                            .m = rows,
                            .n = vocab,
                            .k = width,
                            .alpha = 1.0f,
                            .a = in,
                            .lda = width,
                            .b = output,
                            .ldb = width,
                            .c = work->logits,
                            .ldc = vocab});
        for (size_t i = 0; i < rows; i++)
            loss += tr_cross_entropy(work->logits + i * vocab, vocab, (size_t)work->targets[at + i],
                                     scale);
        if (!grads)
            continue;
        if (grads->weights)
            sh_sgemm(&(sh_gemm){.trans_a = true,
                                .m = vocab,
                                .n = width,
                                .k = rows,
                                .alpha = 1.0f,
                                .beta = at > 0 ? 1.0f : 0.0f,
                                .a = work->logits,
                                .lda = vocab,
                                .b = in,
                                .ldb = width,
                                .c = grads->weights + net->layout.output,
                                .ldc = width});
        sh_sgemm(&(sh_gemm){.m = rows,
                            .n = width,
                            .k = vocab,
                            .alpha = 1.0f,
                            .a = work->logits,
                            .lda = vocab,
                            .b = output,
                            .ldb = width,
                            .c = in,
                            .ldc = width});
    }
    return loss;
}

static void final_norm_backward(const tr_net *net, tr_work *work, const tr_grads *grads)
{
    size_t width = net->config.width, rows = work->n_sequences * work->positions;
    const float *x = work->acts[net->config.n_layers].x;
    const float *w = net->weights + net->layout.output_norm;
    memset(work->dx, 0, rows * width * sizeof(float));
    if (grads->weights)
        memset(grads->weights + net->layout.output_norm, 0, width * sizeof(float));
    for (size_t i = 0; i < work->n_targets; i++) {
        const float *dy = work->final_in + i * width, *row = x + work->rows[i] * work->ld_x;
        tr_rmsnorm_backward(work->dx + work->rows[i] * width, dy, row, w, work->final_r[i], width);
        if (grads->weights)
            tr_rmsnorm_backward_weight(grads->weights + net->layout.output_norm, dy, row,
                                       work->final_r[i], width);
    }
}

static void embedding_backward(const tr_net *net, tr_work *work, float *grad)
{
    size_t width = net->config.width;
    for (size_t s = 0; s < work->n_sequences; s++)
        for (size_t t = 0; t < work->positions; t++)
            tr_add(grad + (size_t)work->inputs[s][t] * width,
                   work->dx + (s * work->positions + t) * width, width);
}

double tr_backward(const tr_net *net, tr_work *work, float scale, const tr_grads *grads)
{
    if (grads && work->n_targets == 0) {
        if (grads->weights)
            memset(grads->weights, 0, net->layout.n * sizeof(float));
        if (grads->lora)
            memset(grads->lora, 0, net->n_lora * sizeof(float));
        return 0;
    }
    double loss = head(net, work, scale, grads);
    if (!grads)
        return loss;
    final_norm_backward(net, work, grads);
    for (size_t l = net->config.n_layers; l-- > 0;) {
        ffn_backward(net, work, l, grads);
        attention_part_backward(net, work, l, l > 0 || grads->weights, grads);
    }
    if (grads->weights) {
        float *embd = grads->weights + net->layout.embd;
        if (!net->config.tied_output)
            memset(embd, 0, (size_t)net->config.vocab * net->config.width * sizeof(float));
        embedding_backward(net, work, embd);
    }
    return loss;
}
