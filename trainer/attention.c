/*
 * Causal grouped-query attention, head by head, in blocks of queries so that half of the score
 * matrix beyond the diagonal is not computed.
 */
#include <math.h>

#include "shared/math/blas.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

typedef struct {
    const float *q, *k, *v; /* [T, head_size], leading dimension ld */
    float *p;               /* [T, T] */
    size_t ld, n, size;
    float scale;
} head_view;

static head_view head_of(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s,
                         size_t head)
{
    const sh_model_config *c = &net->config;
    const tr_group *group = &net->groups[TR_QKV];
    size_t t = work->positions, kv_head = head / (c->n_heads / c->n_kv_heads);
    const float *row = acts->qkv + s * t * work->ld_qkv;
    return (head_view){
        .q = row + head * c->head_size,
        .k = row + group->part_at[1] + kv_head * c->head_size,
        .v = row + group->part_at[2] + kv_head * c->head_size,
        .p = acts->p + (s * c->n_heads + head) * t * t,
        .ld = work->ld_qkv,
        .n = t,
        .size = c->head_size,
        .scale = 1.0f / sqrtf((float)c->head_size),
    };
}

void tr_attention(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s)
{
    size_t q_width = net->groups[TR_QKV].part_at[1];
    for (size_t head = 0; head < net->config.n_heads; head++) {
        head_view h = head_of(net, work, acts, s, head);
        float *out = acts->attn_out + s * h.n * q_width + head * h.size;
        for (size_t at = 0; at < h.n; at += TR_QUERY_BLOCK) {
            size_t rows = SH_MIN((size_t)TR_QUERY_BLOCK, h.n - at), keys = at + rows;
            float *p = h.p + at * h.n;
            sh_sgemm(&(sh_gemm){.trans_b = true,
                                .m = rows,
                                .n = keys,
                                .k = h.size,
                                .alpha = h.scale,
                                .a = h.q + at * h.ld,
                                .lda = h.ld,
                                .b = h.k,
                                .ldb = h.ld,
                                .c = p,
                                .ldc = h.n});
            for (size_t i = 0; i < rows; i++)
                tr_softmax(p + i * h.n, at + i + 1, keys);
            sh_sgemm(&(sh_gemm){.m = rows,
                                .n = h.size,
                                .k = keys,
                                .alpha = 1.0f,
                                .a = p,
                                .lda = h.n,
                                .b = h.v,
                                .ldb = h.ld,
                                .c = out + at * q_width,
                                .ldc = q_width});
        }
    }
}

/* Query rows [at, at + rows) of one head. `beta` 0 overwrites dK and dV, 1 adds to them. */
typedef struct {
    float *dq, *dk, *dv;
    const float *dout;
    size_t ld_grad, ld_out, at;
    float beta;
} block_grads;

static void block_backward(const head_view *h, float *dp, const block_grads *g)
{
    size_t rows = SH_MIN((size_t)TR_QUERY_BLOCK, h->n - g->at), keys = g->at + rows;
    const float *p = h->p + g->at * h->n, *dout = g->dout + g->at * g->ld_out;
    sh_sgemm(&(sh_gemm){.trans_b = true,
                        .m = rows,
                        .n = keys,
                        .k = h->size,
                        .alpha = 1.0f,
                        .a = dout,
                        .lda = g->ld_out,
                        .b = h->v,
                        .ldb = h->ld,
                        .c = dp,
                        .ldc = h->n});
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = keys,
                        .n = h->size,
                        .k = rows,
                        .alpha = 1.0f,
                        .beta = g->beta,
                        .a = p,
                        .lda = h->n,
                        .b = dout,
                        .ldb = g->ld_out,
                        .c = g->dv,
                        .ldc = g->ld_grad});
    for (size_t i = 0; i < rows; i++)
        tr_softmax_backward(dp + i * h->n, p + i * h->n, keys);
    sh_sgemm(&(sh_gemm){.m = rows,
                        .n = h->size,
                        .k = keys,
                        .alpha = h->scale,
                        .a = dp,
                        .lda = h->n,
                        .b = h->k,
                        .ldb = h->ld,
                        .c = g->dq + g->at * g->ld_grad,
                        .ldc = g->ld_grad});
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = keys,
                        .n = h->size,
                        .k = rows,
                        .alpha = h->scale,
                        .beta = g->beta,
                        .a = dp,
                        .lda = h->n,
                        .b = h->q + g->at * h->ld,
                        .ldb = h->ld,
                        .c = g->dk,
                        .ldc = g->ld_grad});
}

void tr_attention_backward(const tr_net *net, const tr_work *work, const tr_acts *acts,
                           const tr_attention_grads *grads, size_t s)
{
    const tr_group *group = &net->groups[TR_QKV];
    size_t t = work->positions, per_kv = net->config.n_heads / net->config.n_kv_heads;
    float *row = grads->dqkv + s * t * group->out;
    for (size_t head = 0; head < net->config.n_heads; head++) {
        head_view h = head_of(net, work, acts, s, head);
        size_t kv_at = head / per_kv * h.size;
        block_grads g = {
            .dq = row + head * h.size,
            .dk = row + group->part_at[1] + kv_at,
            .dv = row + group->part_at[2] + kv_at,
            .dout = grads->dout + s * t * grads->ld_out + head * h.size,
            .ld_grad = group->out,
            .ld_out = grads->ld_out,
        };
        /* The last block sees all keys: it goes first and overwrites what later ones add to. */
        size_t n_blocks = (t + TR_QUERY_BLOCK - 1) / TR_QUERY_BLOCK;
        for (size_t block = n_blocks; block-- > 0;) {
            g.at = block * TR_QUERY_BLOCK;
            g.beta = block + 1 == n_blocks && head % per_kv == 0 ? 0.0f : 1.0f;
            block_backward(&h, work->dp, &g);
        }
    }
}
