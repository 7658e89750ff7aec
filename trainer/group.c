/* A group with its LoRA. The products with A and B have kernels of their own, since a BLAS runs
 * products with a side of 8 or 16 at a fraction of its speed. */
#include <string.h>

#include "shared/math/blas.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

static const tr_lora *lora_of(const tr_net *net, const tr_product *p)
{
    return tr_lora_of(net, p->at.layer, p->at.g);
}

/* What A is multiplied with. */
static const float *a_input(const tr_net *net, tr_work *work, const tr_product *p)
{
    if (net->dropout.p <= 0)
        return p->x;
    tr_drop(net, work, &p->at, p->x, work->dropped);
    return work->dropped;
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
        tr_dots(&(tr_skinny){p->at.rows, group->in, group->in, lora->total, net->rank_total},
                a_input(net, work, p), net->lora_values + lora->a, p->u);
    if (!y)
        return;
    tr_weights_forward(net, work, &p->at, p->x, y);
    if (net->quantize != SH_TYPE_F32) /* sBA is in the weights */
        return;
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
    float *da = grad + lora->a;
    tr_outer(&(tr_skinny){p->at.rows, group->in, group->in, lora->total, net->rank_total},
             a_input(net, work, p), work->du, p->add ? work->turned : da);
    if (p->add)
        tr_add(da, work->turned, lora->total * group->in);
    for (size_t part = 0; part < group->n_parts; part++) {
        const tr_skinny s = part_of(net, p, part);
        float *db = grad + lora->b[part];
        tr_outer(&s, dy + group->part_at[part], p->u + lora->at[part], work->turned);
        for (size_t o = 0; o < s.n; o++)
            for (size_t k = 0; k < s.rank; k++)
                db[o * s.rank + k] = (p->add ? db[o * s.rank + k] : 0.0f) +
                                     lora->scale[part] * work->turned[k * s.n + o];
    }
}

/* dW = dyᵀ·x */
static void weights_gradient(const tr_net *net, const tr_product *p, const float *dy, float *grad)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_layout *l = &net->layout;
    sh_sgemm(&(sh_gemm){.trans_a = true,
                        .m = group->out,
                        .n = group->in,
                        .k = p->at.rows,
                        .alpha = 1.0f,
                        .beta = p->add ? 1.0f : 0.0f,
                        .a = dy,
                        .lda = group->out,
                        .b = p->x,
                        .ldb = group->in,
                        .c = grad +
                             (p->at.g == TR_HEAD
                                  ? l->output
                                  : l->layers + p->at.layer * l->layer_stride + l->group[p->at.g]),
                        .ldc = group->in});
}

/* dx += du·A, under the mask of dropout. */
static void add_lora_dx(const tr_net *net, tr_work *work, const tr_product *p, float *dx)
{
    const tr_group *group = &net->groups[p->at.g];
    const tr_lora *lora = lora_of(net, p);
    const tr_skinny s = {p->at.rows, group->in, group->in, lora->total, net->rank_total};
    if (net->dropout.p <= 0) {
        tr_rank_add(&s, dx, work->du, net->lora_values + lora->a);
        return;
    }
    const size_t n = p->at.rows * group->in;
    memset(work->dropped, 0, n * sizeof(*dx));
    tr_rank_add(&s, work->dropped, work->du, net->lora_values + lora->a);
    tr_drop(net, work, &p->at, work->dropped, work->dropped);
    tr_add(dx, work->dropped, n);
}

void tr_group_backward(const tr_net *net, tr_work *work, const tr_product *p, const float *dy,
                       float *dx, const tr_grads *grads)
{
    const tr_lora *lora = lora_of(net, p);
    if (lora) {
        rank_gradient(net, work, p, dy);
        if (grads->lora)
            lora_gradients(net, work, p, dy, grads->lora);
    }
    if (grads->weights)
        weights_gradient(net, p, dy, grads->weights);
    if (!dx)
        return;
    tr_weights_backward(net, work, &p->at, dy, dx);
    if (lora && net->quantize == SH_TYPE_F32)
        add_lora_dx(net, work, p, dx);
}
