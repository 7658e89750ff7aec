/*
 * Causal grouped-query attention within documents, head by head, in blocks of queries, so that of
 * the score matrix only what a block can see is computed. The weights of the attention are not
 * kept: the backward pass makes a block's again.
 */
#include <math.h>
#include <string.h>

#include "shared/math/blas.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

typedef struct {
    const float *q, *k, *v; /* [T, head_size], leading dimension ld */
    const uint32_t *begins; /* [T]: first key that a query sees */
    size_t ld, n, size;
    float scale;
} head_view;

static head_view head_of(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s,
                         size_t head)
{
    const sh_model_config *c = &net->config;
    const tr_group *group = &net->groups[TR_QKV];
    size_t t = work->shape.positions, kv_head = head / (c->n_heads / c->n_kv_heads);
    const float *row = acts->qkv + s * t * group->out;
    return (head_view){
        .q = row + head * c->head_size,
        .k = row + group->part_at[1] + kv_head * c->head_size,
        .v = row + group->part_at[2] + kv_head * c->head_size,
        .begins = work->begins + s * t,
        .ld = group->out,
        .n = t,
        .size = c->head_size,
        .scale = 1.0f / sqrtf((float)c->head_size),
    };
}

/* Queries [at, at + rows) and the keys [from, from + keys) that they see. */
typedef struct {
    size_t at, rows, from, keys;
} block;

static block block_of(const head_view *h, size_t at)
{
    const size_t rows = SH_MIN((size_t)TR_QUERY_BLOCK, h->n - at), from = h->begins[at];
    return (block){at, rows, from, at + rows - from};
}

/* p [rows, keys] = softmax(scale q·kᵀ) */
static void weights_of(const head_view *h, const block *b, float *p)
{
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = b->rows,
                        .n = b->keys,
                        .k = h->size,
                        .alpha = h->scale,
                        .a = h->q + b->at * h->ld,
                        .lda = h->ld,
                        .b = h->k + b->from * h->ld,
                        .ldb = h->ld,
                        .c = p,
                        .ldc = b->keys});
    for (size_t i = 0; i < b->rows; i++) {
        float *row = p + i * b->keys;
        const size_t unseen = h->begins[b->at + i] - b->from;
        memset(row, 0, unseen * sizeof(*row));
        tr_softmax(row + unseen, b->at + i + 1 - b->from - unseen, b->keys - unseen);
    }
}

void tr_attention(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s)
{
    const size_t q_width = net->groups[TR_QKV].part_at[1];
    for (size_t head = 0; head < net->config.n_heads; head++) {
        const head_view h = head_of(net, work, acts, s, head);
        float *out = acts->attn_out + s * h.n * q_width + head * h.size;
        for (size_t at = 0; at < h.n; at += TR_QUERY_BLOCK) {
            const block b = block_of(&h, at);
            weights_of(&h, &b, work->p);
            sh_sgemm(&(sh_gemm){.m = b.rows,
                                .n = h.size,
                                .k = b.keys,
                                .alpha = 1.0f,
                                .a = work->p,
                                .lda = b.keys,
                                .b = h.v + b.from * h.ld,
                                .ldb = h.ld,
                                .c = out + at * q_width,
                                .ldc = q_width});
        }
    }
}

typedef struct {
    float *dq, *dk, *dv; /* as q, k and v; dk and dv are added to */
    const float *dout;   /* [T, head_size], leading dimension ld_out */
    size_t ld_out;
} head_grads;

static void block_backward(const head_view *h, const tr_work *work, const head_grads *g, size_t at)
{
    const block b = block_of(h, at);
    const float *dout = g->dout + at * g->ld_out;
    float *p = work->p, *dp = work->dp;
    weights_of(h, &b, p);
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = b.rows,
                        .n = b.keys,
                        .k = h->size,
                        .alpha = 1.0f,
                        .a = dout,
                        .lda = g->ld_out,
                        .b = h->v + b.from * h->ld,
                        .ldb = h->ld,
                        .c = dp,
                        .ldc = b.keys});
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = b.keys,
                        .n = h->size,
                        .k = b.rows,
                        .alpha = 1.0f,
                        .beta = 1.0f,
                        .a = p,
                        .lda = b.keys,
                        .b = dout,
                        .ldb = g->ld_out,
                        .c = g->dv + b.from * h->ld,
                        .ldc = h->ld});
    for (size_t i = 0; i < b.rows; i++)
        tr_softmax_backward(dp + i * b.keys, p + i * b.keys, b.keys);
    sh_sgemm(&(sh_gemm){.m = b.rows,
                        .n = h->size,
                        .k = b.keys,
                        .alpha = h->scale,
                        .a = dp,
                        .lda = b.keys,
                        .b = h->k + b.from * h->ld,
                        .ldb = h->ld,
                        .c = g->dq + at * h->ld,
                        .ldc = h->ld});
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = b.keys,
                        .n = h->size,
                        .k = b.rows,
                        .alpha = h->scale,
                        .beta = 1.0f,
                        .a = dp,
                        .lda = b.keys,
                        .b = h->q + at * h->ld,
                        .ldb = h->ld,
                        .c = g->dk + b.from * h->ld,
                        .ldc = h->ld});
}

void tr_attention_backward(const tr_net *net, const tr_work *work, const tr_acts *acts,
                           const float *dout, float *dqkv, size_t s)
{
    const tr_group *group = &net->groups[TR_QKV];
    const size_t t = work->shape.positions, q_width = group->part_at[1];
    const size_t per_kv = net->config.n_heads / net->config.n_kv_heads;
    float *row = dqkv + s * t * group->out;
    for (size_t i = 0; i < t; i++)
        memset(row + i * group->out + q_width, 0, (group->out - q_width) * sizeof(*row));
    for (size_t head = 0; head < net->config.n_heads; head++) {
        const head_view h = head_of(net, work, acts, s, head);
        const size_t kv_at = head / per_kv * h.size;
        const head_grads g = {
            .dq = row + head * h.size,
            .dk = row + group->part_at[1] + kv_at,
            .dv = row + group->part_at[2] + kv_at,
            .dout = dout + s * t * q_width + head * h.size,
            .ld_out = q_width,
        };
        for (size_t at = 0; at < h.n; at += TR_QUERY_BLOCK)
            block_backward(&h, work, &g, at);
    }
}
