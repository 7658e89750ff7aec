/* A group with its LoRA. The products with A and B have kernels of their own, since a BLAS runs
 * products with a side of 8 or 16 at a fraction of its speed. */
#include <string.h>

#include "shared/math/blas.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

static const tr_lora *lora_of(const tr_net *net, const tr_product *p)
{
    const tr_lora *l = net->lora ? &net->lora[p->at.layer * TR_GROUPS + p->at.g] : NULL;
    return l && l->total > 0 ? l : NULL;
}

/* A part's columns of y, and its ranks. */
static tr_skinny part_of(const tr_net *net, const tr_product *p, size_t part)
{
    const tr_group *group = &net->groups[p->at.g];
    return (tr_skinny){.rows = p->at.rows,
                       .n = group->part_at[part + 1] - group->part_at[part],
                       .ld = group->out,
                       .rank = lora_of(net, p)->rank[part],
                       .ld_narrow = net->rank_total};
}

void tr_group_forward(const tr_net *net, tr_work *work, const tr_product *p, float *y)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_lora *lora = lora_of(net, p);
    if (lora)
        tr_dots(&(tr_skinny){p->at.rows, group->in, group->in, lora->total, net->rank_total}, p->x,
                net->lora_values + lora->a, p->u);
    if (!y)
        return;
    tr_weights_forward(net, work, &p->at, p->x, y);
    for (size_t part = 0; lora && part < group->n_parts; part++) {
        const tr_skinny s = part_of(net, p, part);
        tr_rank_add(&s, y + group->part_at[part], p->u + lora->at[part],
                    net->b_turned + lora->bt[part]);
    }
}

/* du = dy·sB, of each part. */
static void rank_gradient(const tr_net *net, tr_work *work, const tr_product *p, const float *dy)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_lora *lora = lora_of(net, p);
    for (size_t part = 0; part < group->n_parts; part++) {
        const tr_skinny s = part_of(net, p, part);
        tr_dots(&s, dy + group->part_at[part], net->b_turned + lora->bt[part],
                work->du + lora->at[part]);
    }
}

static void lora_gradients(const tr_net *net, tr_work *work, const tr_product *p, const float *dy,
                           float *grad)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_lora *lora = lora_of(net, p);
    tr_outer(&(tr_skinny){p->at.rows, group->in, group->in, lora->total, net->rank_total}, p->x,
             work->du, grad + lora->a);
    for (size_t part = 0; part < group->n_parts; part++) {
        const tr_skinny s = part_of(net, p, part);
        float *db = grad + lora->b[part];
        tr_outer(&s, dy + group->part_at[part], p->u + lora->at[part], work->turned);
        for (size_t o = 0; o < s.n; o++)
            for (size_t k = 0; k < s.rank; k++)
                db[o * s.rank + k] = lora->scale[part] * work->turned[k * s.n + o];
    }
}

void tr_group_backward(const tr_net *net, tr_work *work, const tr_product *p, const float *dy,
                       float *dx, const tr_grads *grads)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_lora *lora = lora_of(net, p);
    if (lora) {
        rank_gradient(net, work, p, dy);
        if (grads->lora)
            lora_gradients(net, work, p, dy, grads->lora);
    }
    if (dx) {
        tr_weights_backward(net, work, &p->at, dy, dx);
        if (lora)
            tr_rank_add(
                &(tr_skinny){p->at.rows, group->in, group->in, lora->total, net->rank_total}, dx,
                work->du, net->lora_values + lora->a);
    }
    if (grads->weights)
        sh_sgemm(&(sh_gemm){.trans_a = true,
                            .m = group->out,
                            .n = group->in,
                            .k = p->at.rows,
                            .alpha = 1.0f,
                            .a = dy,
                            .lda = group->out,
                            .b = p->x,
                            .ldb = group->in,
                            .c = grads->weights + net->layout.layers +
                                 p->at.layer * net->layout.layer_stride +
                                 net->layout.group[p->at.g],
                            .ldc = group->in});
}
