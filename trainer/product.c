/* Products with the weights of a group, a tile of rows at a time, in f32 or of operands in bf16. */
#include "shared/math/blas.h"
#include "trainer/network.h"

/* Rows of the weights that are rounded together, while they are in the first-level cache. */
#define SLICE SH_BF16_K

static void forward_f32(const tr_net *net, tr_work *work, const tr_place *p, const float *x,
                        float *y)
{
    const tr_group *group = &net->groups[p->g];
    const size_t tile = tr_tile_rows(net, p->g);
    for (size_t at = 0; at < group->out; at += tile) {
        const size_t n = SH_MIN(tile, group->out - at);
        sh_sgemm(&(sh_gemm){.trans_b = true,
                            .m = p->rows,
                            .n = n,
                            .k = group->in,
                            .alpha = 1.0f,
                            .a = x,
                            .lda = group->in,
                            .b = tr_group_rows(net, p->layer, p->g, at, n, work->tile),
                            .ldb = group->in,
                            .c = y + at,
                            .ldc = group->out});
    }
}

static void backward_f32(const tr_net *net, tr_work *work, const tr_place *p, const float *dy,
                         float *dx)
{
    const tr_group *group = &net->groups[p->g];
    const size_t tile = tr_tile_rows(net, p->g);
    for (size_t at = 0; at < group->out; at += tile) {
        const size_t n = SH_MIN(tile, group->out - at);
        sh_sgemm(&(sh_gemm){.m = p->rows,
                            .n = group->in,
                            .k = n,
                            .alpha = 1.0f,
                            .beta = at > 0 ? 1.0f : 0.0f,
                            .a = dy + at,
                            .lda = group->out,
                            .b = tr_group_rows(net, p->layer, p->g, at, n, work->tile),
                            .ldb = group->in,
                            .c = dx,
                            .ldc = group->in});
    }
}

static void forward_bf16(const tr_net *net, tr_work *work, const tr_place *p, const float *x,
                         float *y)
{
    const tr_group *group = &net->groups[p->g];
    const size_t tile = tr_tile_rows(net, p->g);
    sh_bf16_pack_a(x, group->in, p->rows, group->in, work->a16);
    for (size_t at = 0; at < group->out; at += tile) {
        const size_t n = SH_MIN(tile, group->out - at);
        for (size_t i = 0; i < n; i += SLICE) {
            const size_t rows = SH_MIN((size_t)SLICE, n - i);
            const float *w = tr_group_rows(net, p->layer, p->g, at + i, rows, work->tile);
            sh_bf16_pack_columns(w, group->in, i, rows, group->in, work->b16);
        }
        sh_bf16_run(&(sh_bf16_product){.a = work->a16,
                                       .b = work->b16,
                                       .m = p->rows,
                                       .n = n,
                                       .k = group->in,
                                       .c = y + at,
                                       .ldc = group->out});
    }
}

static void backward_bf16(const tr_net *net, tr_work *work, const tr_place *p, const float *dy,
                          float *dx)
{
    const tr_group *group = &net->groups[p->g];
    const size_t tile = tr_tile_rows(net, p->g);
    for (size_t at = 0; at < group->out; at += tile) {
        const size_t n = SH_MIN(tile, group->out - at);
        sh_bf16_pack_a(dy + at, group->out, p->rows, n, work->a16);
        for (size_t i = 0; i < n; i += SLICE) {
            const size_t rows = SH_MIN((size_t)SLICE, n - i);
            const float *w = tr_group_rows(net, p->layer, p->g, at + i, rows, work->tile);
            sh_bf16_pack_rows(w, group->in, i, rows, group->in, n, work->b16);
        }
        sh_bf16_run(&(sh_bf16_product){.a = work->a16,
                                       .b = work->b16,
                                       .m = p->rows,
                                       .n = group->in,
                                       .k = n,
                                       .c = dx,
                                       .ldc = group->in,
                                       .add = at > 0});
    }
}

void tr_weights_forward(const tr_net *net, tr_work *work, const tr_place *at, const float *x,
                        float *y)
{
    (net->bf16 ? forward_bf16 : forward_f32)(net, work, at, x, y);
}

void tr_weights_backward(const tr_net *net, tr_work *work, const tr_place *at, const float *dy,
                         float *dx)
{
    (net->bf16 ? backward_bf16 : backward_f32)(net, work, at, dy, dx);
}
