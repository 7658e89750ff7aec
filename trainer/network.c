/* The network's layout: groups, tensors, where weights are read, LoRA's places. */
#include "trainer/network.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIGN_FLOATS 16 /* every tensor starts on a cache line */
#define TILE_STEP    32 /* what bf16 products work on at once */

static size_t align_up(size_t n, size_t step)
{
    return (n + step - 1) / step * step;
}

static void groups_init(const sh_model_config *c, tr_group groups[TR_MATRICES])
{
    size_t q = (size_t)c->n_heads * c->head_size, kv = (size_t)c->n_kv_heads * c->head_size;
    size_t ffn = c->ffn, width = c->width;
    groups[TR_QKV] = (tr_group){.in = width,
                                .out = q + 2 * kv,
                                .first = SH_ATTN_Q,
                                .n_parts = 3,
                                .part_at = {0, q, q + kv, q + 2 * kv}};
    groups[TR_ATTN_OUTPUT] = (tr_group){
        .in = q, .out = width, .first = SH_ATTN_OUTPUT, .n_parts = 1, .part_at = {0, width}};
    groups[TR_GATE_UP] = (tr_group){.in = width,
                                    .out = 2 * ffn,
                                    .first = SH_FFN_GATE,
                                    .n_parts = 2,
                                    .part_at = {0, ffn, 2 * ffn}};
    groups[TR_DOWN] = (tr_group){
        .in = ffn, .out = width, .first = SH_FFN_DOWN, .n_parts = 1, .part_at = {0, width}};
    groups[TR_HEAD] =
        (tr_group){.in = width, .out = c->vocab, .n_parts = 1, .part_at = {0, c->vocab}};
}

static size_t place(size_t *at, size_t n)
{
    size_t here = *at;
    *at = align_up(here + n, ALIGN_FLOATS);
    return here;
}

static void layout_init(const sh_model_config *c, const tr_group groups[TR_MATRICES], tr_layout *l)
{
    const size_t width = c->width, table = (size_t)c->vocab * width;
    const size_t *qkv = groups[TR_QKV].part_at;
    size_t at = 0;
    l->embd = place(&at, table);
    l->output = c->tied_output ? l->embd : place(&at, table);
    l->output_norm = place(&at, width);
    l->layers = at;
    l->vector_n[TR_ATTN_NORM] = l->vector_n[TR_FFN_NORM] = width;
    if (c->arch == SH_ARCH_QWEN3)
        l->vector_n[TR_Q_NORM] = l->vector_n[TR_K_NORM] = c->head_size;
    for (size_t p = 0; p < 3 && c->arch == SH_ARCH_QWEN2; p++)
        l->vector_n[TR_Q_BIAS + p] = qkv[p + 1] - qkv[p];
    at = 0;
    for (size_t v = 0; v < TR_VECTORS; v++)
        l->vector[v] = place(&at, l->vector_n[v]);
    for (size_t g = 0; g < TR_GROUPS; g++)
        l->group[g] = place(&at, groups[g].in * groups[g].out);
    l->layer_stride = at;
    l->n = l->layers + at * c->n_layers;
}

/* Shapes come from files: the product of any two, and the whole, must stay far from overflow. */
#define DIMENSION_MAX (1u << 20)
#define WEIGHTS_MAX   (1ull << 34)

static sh_status config_check(const sh_model_config *c, sh_error *err)
{
    const uint32_t dims[] = {c->width, c->ffn, c->vocab, c->n_heads, c->n_kv_heads, c->head_size};
    for (size_t i = 0; i < SH_COUNT(dims); i++)
        if (dims[i] == 0 || dims[i] > DIMENSION_MAX)
            return sh_fail(err, SH_ERR_INVALID, "model shape: a dimension of %u is not in [1, %u]",
                           dims[i], DIMENSION_MAX);
    if (c->n_layers == 0 || c->n_layers > SH_MODEL_LAYERS_MAX)
        return sh_fail(err, SH_ERR_INVALID, "model shape: %u layers are not in [1, %u]",
                       c->n_layers, SH_MODEL_LAYERS_MAX);
    if (c->n_heads % c->n_kv_heads != 0 || c->head_size % 2 != 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "model shape: %u heads must be a multiple of %u KV heads, and the head size "
                       "%u even",
                       c->n_heads, c->n_kv_heads, c->head_size);
    uint64_t q = (uint64_t)c->n_heads * c->head_size;
    uint64_t layer = (4 * q + 3ull * c->ffn + 2) * c->width;
    uint64_t total = 2ull * c->vocab * c->width + layer * c->n_layers;
    if (q > DIMENSION_MAX || total > WEIGHTS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "model shape: too large to train (%llu weights)",
                       (unsigned long long)total);
    return SH_OK;
}

sh_status tr_net_reserve_positions(tr_net *net, size_t positions, sh_error *err)
{
    if (positions <= net->rope_n)
        return SH_OK;
    const sh_model_config *c = &net->config;
    const double *frequency = net->model ? net->model->rope_frequency : NULL;
    const double magnitude = net->model ? (double)net->model->rope_magnitude : 1;
    size_t half = c->head_size / 2;
    float *cosines = sh_calloc(positions * half, sizeof(*cosines));
    float *sines = sh_calloc(positions * half, sizeof(*sines));
    if (!cosines || !sines) {
        free(cosines);
        free(sines);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu positions", positions);
    }
    for (size_t i = 0; i < half; i++) {
        const double power = -2.0 * (double)i / (double)c->head_size;
        const double f = frequency ? frequency[i] : pow((double)c->rope_base, power);
        for (size_t t = 0; t < positions; t++) {
            cosines[t * half + i] = (float)(cos((double)t * f) * magnitude);
            sines[t * half + i] = (float)(sin((double)t * f) * magnitude);
        }
    }
    free(net->rope_cos);
    free(net->rope_sin);
    net->rope_cos = cosines;
    net->rope_sin = sines;
    net->rope_n = positions;
    return SH_OK;
}

/* ---- where weights are read ---- */

static void dequantize(const sh_matrix *m, size_t first, size_t n, float *out)
{
    const size_t row_bytes = sh_type_row_bytes(m->type, m->in);
    for (size_t o = first; o < first + n; o++, out += m->in)
        sh_row_dequantize(m->type, (const uint8_t *)m->data + o * row_bytes, out, m->in);
}

static const float *matrix_rows(const sh_matrix *m, size_t first, size_t n, float *tile)
{
    if (m->type == SH_TYPE_F32)
        return (const float *)m->data + first * m->in;
    dequantize(m, first, n, tile);
    return tile;
}

/* The same as they are in the weights or the file. */
static const float *plain_rows(const tr_net *net, size_t layer, size_t g, size_t first, size_t n,
                               float *tile)
{
    const tr_group *group = &net->groups[g];
    if (net->weights)
        return net->weights + first * group->in +
               (g == TR_HEAD
                    ? net->layout.output
                    : net->layout.layers + layer * net->layout.layer_stride + net->layout.group[g]);
    if (g == TR_HEAD)
        return matrix_rows(&net->model->output, first, n, tile);
    const sh_matrix *m = &net->model->layers[layer].m[group->first];
    float *to = tile;
    for (size_t p = 0; p < group->n_parts; p++) {
        const size_t from = SH_MAX(first, group->part_at[p]);
        const size_t end = SH_MIN(first + n, group->part_at[p + 1]);
        if (from >= end)
            continue;
        if (end - from == n)
            return matrix_rows(&m[p], from - group->part_at[p], n, tile);
        dequantize(&m[p], from - group->part_at[p], end - from, to);
        to += (end - from) * group->in;
    }
    return tile;
}

const float *tr_group_rows(const tr_net *net, size_t layer, size_t g, size_t first, size_t n,
                           float *tile)
{
    const float *rows = plain_rows(net, layer, g, first, n, tile);
    if (net->quantize == SH_TYPE_F32)
        return rows;
    if (rows != tile)
        memcpy(tile, rows, n * net->groups[g].in * sizeof(*tile));
    tr_quantize_rows(net, layer, g, first, n, tile);
    return tile;
}

void tr_embedding(const tr_net *net, int32_t token, float *out)
{
    const size_t width = net->config.width;
    if (net->weights)
        memcpy(out, net->weights + net->layout.embd + (size_t)token * width, width * sizeof(*out));
    else
        dequantize(&net->model->token_embd, (size_t)token, 1, out);
    if (net->quantize != SH_TYPE_F32)
        tr_quantize_values(net->quantize, out, width);
}

static const float *model_vector(const sh_layer *l, size_t which)
{
    switch (which) {
    case TR_ATTN_NORM:
        return l->attn_norm;
    case TR_FFN_NORM:
        return l->ffn_norm;
    case TR_Q_NORM:
        return l->q_norm;
    case TR_K_NORM:
        return l->k_norm;
    default:
        return l->bias[SH_ATTN_Q + (which - TR_Q_BIAS)];
    }
}

const float *tr_vector(const tr_net *net, size_t layer, size_t which)
{
    const tr_layout *l = &net->layout;
    if (l->vector_n[which] == 0)
        return NULL;
    if (net->weights)
        return net->weights + l->layers + layer * l->layer_stride + l->vector[which];
    return model_vector(&net->model->layers[layer], which);
}

const float *tr_output_norm(const tr_net *net)
{
    return net->weights ? net->weights + net->layout.output_norm : net->model->output_norm;
}

bool tr_makes_tiles(const tr_net *net)
{
    return !net->weights || net->quantize != SH_TYPE_F32;
}

size_t tr_tile_rows(const tr_net *net, size_t g)
{
    const tr_group *group = &net->groups[g];
    if (!tr_makes_tiles(net) && !net->bf16)
        return group->out;
    const size_t rows = net->tile_floats / group->in / TILE_STEP * TILE_STEP;
    return SH_MIN(SH_MAX(rows, (size_t)TILE_STEP), group->out);
}

static void copy_model(tr_net *net)
{
    const tr_layout *l = &net->layout;
    const sh_model *model = net->model;
    dequantize(&model->token_embd, 0, model->token_embd.out, net->weights + l->embd);
    if (!net->config.tied_output)
        dequantize(&model->output, 0, model->output.out, net->weights + l->output);
    memcpy(net->weights + l->output_norm, model->output_norm, net->config.width * sizeof(float));
    for (size_t i = 0; i < net->config.n_layers; i++) {
        float *layer = net->weights + l->layers + i * l->layer_stride;
        for (size_t v = 0; v < TR_VECTORS; v++)
            if (l->vector_n[v] > 0)
                memcpy(layer + l->vector[v], model_vector(&model->layers[i], v),
                       l->vector_n[v] * sizeof(float));
        for (size_t g = 0; g < TR_GROUPS; g++)
            for (size_t p = 0; p < net->groups[g].n_parts; p++) {
                const sh_matrix *m = &model->layers[i].m[net->groups[g].first + p];
                dequantize(m, 0, m->out,
                           layer + l->group[g] + net->groups[g].part_at[p] * net->groups[g].in);
            }
    }
}

sh_status tr_net_create(const sh_model_config *config, const sh_model *model, uint64_t copy_bytes,
                        size_t positions, tr_net **out, sh_error *err)
{
    SH_TRY(config_check(config, err));
    sh_status status = SH_OK;
    tr_net *net = sh_calloc(1, sizeof(*net));
    if (!net)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a network");
    net->config = *config;
    net->model = model;
    net->tile_floats = TR_TILE_FLOATS;
    groups_init(config, net->groups);
    layout_init(config, net->groups, &net->layout);
    if (!model || net->layout.n * sizeof(float) <= copy_bytes) {
        net->weights = sh_alloc_aligned(net->layout.n * sizeof(float));
        if (!net->weights) {
            status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu weights", net->layout.n);
            goto cleanup;
        }
        if (model)
            copy_model(net);
    }
    SH_GOTO(tr_net_reserve_positions(net, positions, err));
    *out = net;
    net = NULL;
cleanup:
    tr_net_destroy(&net);
    return status;
}

uint64_t tr_net_bytes(const tr_net *net)
{
    const size_t floats =
        (net->weights ? net->layout.n : 0) + net->n_turned + net->rope_n * net->config.head_size;
    return floats * sizeof(float) + (net->lora ? tr_lora_count(net) * sizeof(*net->lora) : 0);
}

void tr_net_destroy(tr_net **net)
{
    if (!*net)
        return;
    free((*net)->weights);
    free((*net)->lora);
    free((*net)->b_turned);
    free((*net)->rope_cos);
    free((*net)->rope_sin);
    free(*net);
    *net = NULL;
}

/* ---- tensors ---- */

void tr_matrix_group(size_t matrix, size_t *group, size_t *part)
{
    static const uint8_t of[SH_LAYER_MATRICES][2] = {
        [SH_ATTN_Q] = {TR_QKV, 0},       [SH_ATTN_K] = {TR_QKV, 1},
        [SH_ATTN_V] = {TR_QKV, 2},       [SH_ATTN_OUTPUT] = {TR_ATTN_OUTPUT, 0},
        [SH_FFN_GATE] = {TR_GATE_UP, 0}, [SH_FFN_UP] = {TR_GATE_UP, 1},
        [SH_FFN_DOWN] = {TR_DOWN, 0},
    };
    *group = of[matrix][0];
    *part = of[matrix][1];
}

/* Tensors outside the layers: token_embd, output (unless tied), output_norm. */
static size_t head_tensors(const tr_net *net)
{
    return net->config.tied_output ? 2 : 3;
}

static const char *const vector_names[TR_VECTORS] = {
    "attn_norm.weight", "ffn_norm.weight", "attn_q_norm.weight", "attn_k_norm.weight",
    "attn_q.bias",      "attn_k.bias",     "attn_v.bias"};

static size_t layer_tensors(const tr_net *net)
{
    size_t n = SH_LAYER_MATRICES;
    for (size_t v = 0; v < TR_VECTORS; v++)
        n += net->layout.vector_n[v] > 0;
    return n;
}

size_t tr_tensor_count(const tr_net *net)
{
    return head_tensors(net) + net->config.n_layers * layer_tensors(net);
}

static tr_tensor head_tensor(const tr_net *net, size_t i)
{
    const sh_model_config *c = &net->config;
    if (i + 1 == head_tensors(net))
        return (tr_tensor){.name = "output_norm.weight",
                           .at = net->layout.output_norm,
                           .rows = 1,
                           .row = c->width,
                           .is_vector = true};
    if (i == 0)
        return (tr_tensor){
            .name = "token_embd.weight", .at = net->layout.embd, .rows = c->vocab, .row = c->width};
    return (tr_tensor){
        .name = "output.weight", .at = net->layout.output, .rows = c->vocab, .row = c->width};
}

tr_tensor tr_tensor_at(const tr_net *net, size_t i)
{
    if (i < head_tensors(net))
        return head_tensor(net, i);
    const tr_layout *l = &net->layout;
    const size_t layer = (i - head_tensors(net)) / layer_tensors(net);
    size_t within = (i - head_tensors(net)) % layer_tensors(net);
    const size_t at = l->layers + layer * l->layer_stride;
    tr_tensor t = {0};
    if (within < SH_LAYER_MATRICES) {
        size_t g, part;
        tr_matrix_group(within, &g, &part);
        const tr_group *group = &net->groups[g];
        t.at = at + l->group[g] + group->part_at[part] * group->in;
        t.rows = group->part_at[part + 1] - group->part_at[part];
        t.row = group->in;
        snprintf(t.name, sizeof(t.name), "blk.%zu.%s.weight", layer, sh_layer_matrix_names[within]);
        return t;
    }
    size_t v = 0;
    for (within -= SH_LAYER_MATRICES;; v++)
        if (l->vector_n[v] > 0 && within-- == 0)
            break;
    t.at = at + l->vector[v];
    t.rows = 1;
    t.row = l->vector_n[v];
    t.is_vector = true;
    snprintf(t.name, sizeof(t.name), "blk.%zu.%s", layer, vector_names[v]);
    return t;
}

/* ---- LoRA ---- */

sh_status tr_net_attach(tr_net *net, const sh_adapter *adapter, sh_error *err)
{
    const size_t n_layers = net->config.n_layers;
    size_t at = 0, turned = 0;
    tr_lora *lora = sh_calloc(tr_lora_count(net), sizeof(*lora));
    if (!lora)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for an adapter's layout");
    net->lora_from = n_layers;
    for (size_t i = 0; i < tr_lora_count(net); i++) {
        const tr_group *group = &net->groups[tr_lora_group(net, i)];
        const sh_lora_pair *pairs = &adapter->pairs[i / TR_GROUPS * SH_LAYER_MATRICES];
        for (size_t p = 0; p < group->n_parts; p++) {
            const sh_lora_pair *pair = &pairs[group->first + p];
            lora[i].at[p] = lora[i].total;
            lora[i].rank[p] = pair->a ? pair->rank : 0;
            lora[i].scale[p] = pair->a ? adapter->alpha / (float)pair->rank : 0.0f;
            lora[i].exported[p] = lora[i].scale[p];
            lora[i].total += lora[i].rank[p];
        }
        lora[i].a = place(&at, lora[i].total * group->in);
        for (size_t p = 0; p < group->n_parts; p++) {
            const size_t n = (group->part_at[p + 1] - group->part_at[p]) * lora[i].rank[p];
            lora[i].b[p] = place(&at, n);
            lora[i].bt[p] = place(&turned, n);
        }
        net->rank_total = SH_MAX(net->rank_total, lora[i].total);
        if (lora[i].total > 0)
            net->lora_from = SH_MIN(net->lora_from, i / TR_GROUPS);
    }
    net->b_turned = sh_alloc_aligned(SH_MAX(turned, (size_t)1) * sizeof(float));
    if (!net->b_turned) {
        free(lora);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for an adapter");
    }
    net->lora = lora;
    net->n_lora = at;
    net->n_turned = turned;
    return SH_OK;
}

static sh_status lora_options_check(const sh_train_options *o, sh_error *err)
{
    if (!(o->dropout >= 0 && o->dropout < 1))
        return sh_fail(err, SH_ERR_INVALID, "training options: dropout %g is not in [0, 1)",
                       (double)o->dropout);
    if (o->dropout > 0 && o->quantize_aware != SH_TYPE_F32)
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: dropout acts beside the weights, quantization-aware "
                       "training merges the adapter into them; choose one");
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++)
        if (!isfinite(o->alphas[m]) || o->alphas[m] < 0)
            return sh_fail(err, SH_ERR_INVALID,
                           "training options: the alpha of %s, %g, must be finite and above zero, "
                           "or 0 for the adapter's",
                           sh_layer_matrix_names[m], (double)o->alphas[m]);
    return SH_OK;
}

sh_status tr_net_set_lora(tr_net *net, const sh_adapter *adapter, const sh_train_options *options,
                          sh_error *err)
{
    SH_TRY(lora_options_check(options, err));
    for (size_t i = 0; i < tr_lora_count(net); i++) {
        const size_t g = tr_lora_group(net, i);
        const tr_group *group = &net->groups[g];
        tr_lora *l = &net->lora[i];
        for (size_t p = 0; p < group->n_parts; p++) {
            const float own = g == TR_HEAD ? 0 : options->alphas[group->first + p];
            const float alpha = own > 0 ? own : adapter->alpha, rank = (float)l->rank[p];
            if (l->rank[p] > 0)
                l->scale[p] = alpha / (options->rslora ? sqrtf(rank) : rank);
            if (l->scale[p] != l->exported[p] && !(l->exported[p] > 0))
                return sh_fail(err, SH_ERR_INVALID,
                               "adapter: its alpha is %g; to train it with another scale it must "
                               "be above zero",
                               (double)adapter->alpha);
        }
    }
    net->b_frozen = options->freeze == SH_FREEZE_B && options->alternate == 0;
    net->dropout = (tr_dropout){.p = options->dropout, .seed = options->dropout_seed};
    return SH_OK;
}

const tr_lora *tr_lora_of(const tr_net *net, size_t layer, size_t g)
{
    if (!net->lora)
        return NULL;
    const size_t i = g == TR_HEAD ? tr_lora_count(net) - 1 : layer * TR_GROUPS + g;
    return net->lora[i].total > 0 ? &net->lora[i] : NULL;
}

const tr_lora *tr_pair_lora(const tr_net *net, size_t pair, size_t *group, size_t *part)
{
    if (pair == sh_lora_output_pair(net->config.n_layers)) {
        *group = TR_HEAD;
        *part = 0;
        return &net->lora[tr_lora_count(net) - 1];
    }
    tr_matrix_group(pair % SH_LAYER_MATRICES, group, part);
    return &net->lora[pair / SH_LAYER_MATRICES * TR_GROUPS + *group];
}

void tr_net_use(tr_net *net, const float *lora)
{
    net->lora_values = lora;
    for (size_t i = 0; i < tr_lora_count(net); i++) {
        const tr_group *group = &net->groups[tr_lora_group(net, i)];
        const tr_lora *l = &net->lora[i];
        for (size_t p = 0; p < group->n_parts; p++) {
            const size_t out = group->part_at[p + 1] - group->part_at[p], rank = l->rank[p];
            const float *b = lora + l->b[p];
            float *bt = net->b_turned + l->bt[p];
            for (size_t o = 0; o < out; o++)
                for (size_t k = 0; k < rank; k++)
                    bt[k * out + o] = l->scale[p] * b[o * rank + k];
        }
    }
}

/* Where a pair of an adapter lies in the flat vector, and its scales. */
typedef struct {
    size_t a, b, a_n, b_n;
    float scale, exported;
} pair_place;

/* Of pair i; false when it is not adapted. */
static bool pair_at(const tr_net *net, const sh_lora_pair *pair, size_t i, pair_place *out)
{
    size_t g, part;
    if (!pair->a)
        return false;
    const tr_lora *l = tr_pair_lora(net, i, &g, &part);
    *out = (pair_place){.a = l->a + l->at[part] * pair->in,
                        .b = l->b[part],
                        .a_n = (size_t)pair->rank * pair->in,
                        .b_n = (size_t)pair->rank * pair->out,
                        .scale = l->scale[part],
                        .exported = l->exported[part]};
    return true;
}

/* to = from * times / by: the same bits where they are the same. */
static void copy_scaled(float *to, const float *from, size_t n, float times, float by)
{
    if (times == by)
        memcpy(to, from, n * sizeof(*to));
    else
        for (size_t i = 0; i < n; i++)
            to[i] = (float)((double)from[i] * (double)times / (double)by);
}

void tr_lora_gather(const tr_net *net, const sh_adapter *adapter, float *lora)
{
    for (size_t i = 0; i < sh_lora_pair_count(net->config.n_layers); i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        pair_place p;
        if (!pair_at(net, pair, i, &p))
            continue;
        memcpy(lora + p.a, pair->a, p.a_n * sizeof(float));
        copy_scaled(lora + p.b, pair->b, p.b_n, p.exported, p.scale);
    }
}

void tr_lora_scatter(const tr_net *net, const float *lora, sh_adapter *adapter)
{
    for (size_t i = 0; i < sh_lora_pair_count(net->config.n_layers); i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        pair_place p;
        if (!pair_at(net, pair, i, &p))
            continue;
        memcpy(pair->a, lora + p.a, p.a_n * sizeof(float));
        if (!net->b_frozen)
            copy_scaled(pair->b, lora + p.b, p.b_n, p.scale, p.exported);
    }
}
