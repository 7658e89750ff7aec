/* The memory that a micro-batch's passes work in. */
#include <stdlib.h>

#include "trainer/network.h"

#define ALIGN_FLOATS 16

/* With base NULL only counts: the same code measures and carves. */
static float *carve(float *base, size_t *at, size_t n)
{
    float *here = base && n > 0 ? base + *at : NULL;
    *at += (n + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    return here;
}

static sh_bf16 *carve16(float *base, size_t *at, size_t n)
{
    return (sh_bf16 *)carve(base, at, (n + 1) / 2);
}

static void carve_layer(const tr_net *net, const tr_work_shape *s, tr_acts *a, float *base,
                        size_t *at)
{
    const tr_group *g = net->groups;
    const size_t rows = s->sequences * s->positions;
    a->qk = carve(base, at, net->layout.vector_n[TR_Q_NORM] > 0 ? rows * g[TR_QKV].part_at[2] : 0);
    a->qkv = carve(base, at, rows * g[TR_QKV].out);
    a->attn_out = carve(base, at, rows * g[TR_ATTN_OUTPUT].in);
    a->mid = carve(base, at, rows * net->config.width);
    a->gate_up = carve(base, at, rows * g[TR_GATE_UP].out);
    for (size_t i = 0; i < TR_GROUPS; i++)
        a->u[i] = carve(base, at, rows * net->rank_total);
    a->r1 = carve(base, at, rows);
    a->r2 = carve(base, at, rows);
}

static void carve_backward(const tr_net *net, tr_work *w, float *base, size_t *at)
{
    const tr_group *g = net->groups;
    const size_t rows = w->shape.sequences * w->shape.positions;
    size_t in = 0, out = 0, rank = 0;
    for (size_t i = 0; i < TR_GROUPS; i++) {
        in = SH_MAX(in, g[i].in);
        for (size_t p = 0; p < g[i].n_parts; p++)
            out = SH_MAX(out, g[i].part_at[p + 1] - g[i].part_at[p]);
    }
    if (tr_lora_of(net, 0, TR_HEAD))
        out = SH_MAX(out, SH_MAX(g[TR_HEAD].in, g[TR_HEAD].out));
    for (size_t i = 0; net->lora && i < tr_lora_count(net); i++)
        for (size_t p = 0; p < TR_PARTS_MAX; p++)
            rank = SH_MAX(rank, net->lora[i].rank[p]);
    w->dx = carve(base, at, rows * net->config.width);
    w->dnarrow = carve(base, at, rows * in);
    w->dwide = carve(base, at, rows * SH_MAX(g[TR_QKV].out, g[TR_GATE_UP].out));
    w->du = carve(base, at, rows * net->rank_total);
    w->turned = carve(base, at, rank * out);
    w->dp = carve(base, at, (size_t)TR_QUERY_BLOCK * w->shape.positions);
}

static size_t carve_all(const tr_net *net, tr_work *w, float *base)
{
    const sh_model_config *c = &net->config;
    const tr_work_shape *s = &w->shape;
    const size_t rows = s->sequences * s->positions, n_layers = c->n_layers;
    size_t at = 0, widest = c->width;
    tr_acts again = {0}; /* of the layers that are run once more */
    if (!s->backward || s->kept < n_layers)
        carve_layer(net, s, &again, base, &at);
    for (size_t l = 0; l <= n_layers; l++) {
        tr_acts *a = &w->acts[l];
        float *x = l == 0 || s->backward ? carve(base, &at, rows * c->width) : w->acts[0].x;
        *a = again;
        if (s->backward && l < n_layers && l >= n_layers - s->kept)
            carve_layer(net, s, a, base, &at);
        a->x = x;
    }
    size_t tile = 0, tile_rows = 0, b16 = 0; /* floats of a tile, its rows, its values in bf16 */
    for (size_t g = 0; g < TR_MATRICES; g++) {
        const size_t in = net->groups[g].in, n = tr_tile_rows(net, g);
        widest = SH_MAX(widest, in);
        tile = SH_MAX(tile, n * in);
        tile_rows = SH_MAX(tile_rows, n);
        b16 = SH_MAX(b16, SH_MAX(sh_bf16_b_values(n, in), sh_bf16_b_values(in, n)));
    }
    w->final_in = carve(base, &at, rows * c->width);
    w->final_r = carve(base, &at, rows);
    w->logits = carve(base, &at, s->logit_rows * c->vocab);
    w->head_u = carve(base, &at, tr_lora_of(net, 0, TR_HEAD) ? s->logit_rows * net->rank_total : 0);
    w->tile = carve(base, &at, tr_makes_tiles(net) ? tile : 0);
    w->dropped = carve(base, &at, net->dropout.p > 0 ? rows * widest : 0);
    if (net->bf16) {
        const size_t most = SH_MAX(rows, s->logit_rows);
        w->a16 = carve16(base, &at,
                         SH_MAX(sh_bf16_a_values(rows, widest), sh_bf16_a_values(most, tile_rows)));
        w->b16 = carve16(base, &at, b16);
    }
    w->narrow = carve(base, &at, rows * c->width);
    w->wide = carve(base, &at, rows * c->ffn);
    w->p = carve(base, &at, (size_t)TR_QUERY_BLOCK * s->positions);
    if (s->backward)
        carve_backward(net, w, base, &at);
    return at;
}

size_t tr_work_bytes(const tr_net *net, const tr_work_shape *shape)
{
    const size_t layers = (size_t)net->config.n_layers + 1,
                 rows = shape->sequences * shape->positions;
    tr_acts acts[SH_MODEL_LAYERS_MAX + 1];
    tr_work w = {.shape = *shape, .acts = acts};
    return carve_all(net, &w, NULL) * sizeof(float) + layers * sizeof(*acts) +
           rows * (sizeof(*w.rows) + sizeof(*w.begins) + sizeof(*w.targets)) +
           shape->sequences * sizeof(*w.inputs);
}

sh_status tr_work_create(const tr_net *net, const tr_work_shape *shape, tr_work **out,
                         sh_error *err)
{
    const size_t rows = shape->sequences * shape->positions;
    tr_work *w = sh_calloc(1, sizeof(*w));
    if (!w)
        goto no_memory;
    w->shape = *shape;
    w->acts = sh_calloc((size_t)net->config.n_layers + 1, sizeof(*w->acts));
    w->rows = sh_calloc(rows, sizeof(*w->rows));
    w->begins = sh_calloc(rows, sizeof(*w->begins));
    w->targets = sh_calloc(rows, sizeof(*w->targets));
    w->inputs = sh_calloc(shape->sequences, sizeof(*w->inputs));
    if (!w->acts || !w->rows || !w->begins || !w->targets || !w->inputs)
        goto no_memory;
    w->block = sh_alloc_aligned(carve_all(net, w, NULL) * sizeof(float));
    if (!w->block)
        goto no_memory;
    carve_all(net, w, w->block);
    *out = w;
    return SH_OK;
no_memory:
    tr_work_destroy(&w);
    return sh_fail(err, SH_ERR_NO_MEMORY,
                   "no memory for the activations of %zu sequences of %zu tokens", shape->sequences,
                   shape->positions);
}

void tr_work_destroy(tr_work **work)
{
    if (!*work)
        return;
    free((*work)->acts);
    free((*work)->rows);
    free((*work)->begins);
    free((*work)->targets);
    free((void *)(*work)->inputs);
    free((*work)->block);
    free(*work);
    *work = NULL;
}
