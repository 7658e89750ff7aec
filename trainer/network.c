/*
 * Shapes, weights and memory of the float network, and LoRA's effective matrices.
 */
#include "trainer/network.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/kernels.h"

#define ALIGN_FLOATS 16 /* every tensor starts on a cache line */
#define BORDER_STEP  8

static size_t align_up(size_t n, size_t step)
{
    return (n + step - 1) / step * step;
}

static void groups_init(const sh_model_config *c, tr_group groups[TR_GROUPS])
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
}

static size_t place(size_t *at, size_t n)
{
    size_t here = *at;
    *at = align_up(here + n, ALIGN_FLOATS);
    return here;
}

static void layout_init(const sh_model_config *c, const tr_group groups[TR_GROUPS], tr_layout *l)
{
    size_t width = c->width, table = (size_t)c->vocab * width, at = 0;
    l->embd = place(&at, table);
    l->output = c->tied_output ? l->embd : place(&at, table);
    l->output_norm = place(&at, width);
    l->layers = at;
    at = 0;
    l->attn_norm = place(&at, width);
    l->ffn_norm = place(&at, width);
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
    size_t half = net->config.head_size / 2;
    float *cosines = sh_calloc(positions * half, sizeof(*cosines));
    float *sines = sh_calloc(positions * half, sizeof(*sines));
    if (!cosines || !sines) {
        free(cosines);
        free(sines);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu positions", positions);
    }
    for (size_t t = 0; t < positions; t++) {
        for (size_t i = 0; i < half; i++) {
            double power = -2.0 * (double)i / (double)net->config.head_size;
            double angle = (double)t * pow((double)net->config.rope_base, power);
            cosines[t * half + i] = (float)cos(angle);
            sines[t * half + i] = (float)sin(angle);
        }
    }
    free(net->rope_cos);
    free(net->rope_sin);
    net->rope_cos = cosines;
    net->rope_sin = sines;
    net->rope_n = positions;
    return SH_OK;
}

sh_status tr_net_create(const sh_model_config *config, size_t positions, tr_net **out,
                        sh_error *err)
{
    SH_TRY(config_check(config, err));
    sh_status status = SH_OK;
    tr_net *net = sh_calloc(1, sizeof(*net));
    if (!net)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a network");
    net->config = *config;
    groups_init(config, net->groups);
    layout_init(config, net->groups, &net->layout);
    net->weights = sh_alloc_aligned(net->layout.n * sizeof(float));
    if (!net->weights) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu weights", net->layout.n);
        goto cleanup;
    }
    SH_GOTO(tr_net_reserve_positions(net, positions, err));
    *out = net;
    net = NULL;
cleanup:
    tr_net_destroy(&net);
    return status;
}

void tr_net_destroy(tr_net **net)
{
    if (!*net)
        return;
    free((*net)->weights);
    free((*net)->lora);
    free((*net)->effective);
    free((*net)->rope_cos);
    free((*net)->rope_sin);
    free(*net);
    *net = NULL;
}

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

size_t tr_matrix_at(const tr_net *net, size_t layer, size_t matrix)
{
    size_t g, part;
    tr_matrix_group(matrix, &g, &part);
    return net->layout.layers + layer * net->layout.layer_stride + net->layout.group[g] +
           net->groups[g].part_at[part] * net->groups[g].in;
}

/* Tensors outside the layers: token_embd, output (unless tied), output_norm. */
static size_t head_tensors(const tr_net *net)
{
    return net->config.tied_output ? 2 : 3;
}

#define LAYER_TENSORS (SH_LAYER_MATRICES + 2) /* two norms */

size_t tr_tensor_count(const tr_net *net)
{
    return head_tensors(net) + net->config.n_layers * LAYER_TENSORS;
}

static tr_tensor head_tensor(const tr_net *net, size_t i)
{
    const sh_model_config *c = &net->config;
    if (i + 1 == head_tensors(net))
        return (tr_tensor){.name = "output_norm.weight",
                           .at = net->layout.output_norm,
                           .rows = 1,
                           .row = c->width,
                           .is_norm = true};
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
    size_t layer = (i - head_tensors(net)) / LAYER_TENSORS;
    size_t within = (i - head_tensors(net)) % LAYER_TENSORS;
    const tr_layout *l = &net->layout;
    tr_tensor t = {.rows = 1, .row = net->config.width, .is_norm = true};
    if (within >= SH_LAYER_MATRICES) {
        bool first = within == SH_LAYER_MATRICES;
        t.at = l->layers + layer * l->layer_stride + (first ? l->attn_norm : l->ffn_norm);
        snprintf(t.name, sizeof(t.name), "blk.%zu.%s.weight", layer,
                 first ? "attn_norm" : "ffn_norm");
        return t;
    }
    size_t g, part;
    tr_matrix_group(within, &g, &part);
    t.is_norm = false;
    t.at = tr_matrix_at(net, layer, within);
    t.rows = net->groups[g].part_at[part + 1] - net->groups[g].part_at[part];
    t.row = net->groups[g].in;
    snprintf(t.name, sizeof(t.name), "blk.%zu.%s.weight", layer, sh_layer_matrix_names[within]);
    return t;
}

static void dequantize(const sh_matrix *m, float *out)
{
    size_t row_bytes = sh_type_row_bytes(m->type, m->in);
    for (size_t o = 0; o < m->out; o++)
        sh_row_dequantize(m->type, (const uint8_t *)m->data + o * row_bytes,
                          out + o * (size_t)m->in, m->in);
}

sh_status tr_model_check(const sh_model *model, sh_error *err)
{
    if (sh_model_is_plain_llama(model))
        return SH_OK;
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "%s: cannot train: its architecture is %s%s; only llama without biases and "
                   "scaled RoPE is trained",
                   model->gguf != NULL ? sh_gguf_path(model->gguf) : "the model",
                   sh_arch_name(model->config.arch),
                   model->config.arch == SH_ARCH_LLAMA ? " with biases or scaled RoPE" : "");
}

void tr_net_dequantize(tr_net *net, const sh_model *model)
{
    const tr_layout *l = &net->layout;
    size_t norm_bytes = net->config.width * sizeof(float);
    dequantize(&model->token_embd, net->weights + l->embd);
    if (!net->config.tied_output)
        dequantize(&model->output, net->weights + l->output);
    memcpy(net->weights + l->output_norm, model->output_norm, norm_bytes);
    for (size_t i = 0; i < net->config.n_layers; i++) {
        float *layer = net->weights + l->layers + i * l->layer_stride;
        memcpy(layer + l->attn_norm, model->layers[i].attn_norm, norm_bytes);
        memcpy(layer + l->ffn_norm, model->layers[i].ffn_norm, norm_bytes);
        for (size_t m = 0; m < SH_LAYER_MATRICES; m++)
            dequantize(&model->layers[i].m[m], net->weights + tr_matrix_at(net, i, m));
    }
}

sh_status tr_net_attach(tr_net *net, const sh_adapter *adapter, bool trainable, sh_error *err)
{
    size_t n_layers = net->config.n_layers, at = 0, most[TR_GROUPS] = {0};
    tr_lora *lora = sh_calloc(n_layers * TR_GROUPS, sizeof(*lora));
    if (!lora)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for an adapter's layout");
    for (size_t i = 0; i < n_layers * TR_GROUPS; i++) {
        const tr_group *group = &net->groups[i % TR_GROUPS];
        const sh_lora_pair *pairs = &adapter->pairs[i / TR_GROUPS * SH_LAYER_MATRICES];
        for (size_t p = 0; p < group->n_parts; p++) {
            const sh_lora_pair *pair = &pairs[group->first + p];
            lora[i].at[p] = lora[i].total;
            lora[i].rank[p] = pair->a ? pair->rank : 0;
            lora[i].scale[p] = pair->a ? adapter->alpha / (float)pair->rank : 0.0f;
            lora[i].total += lora[i].rank[p];
        }
        lora[i].a = place(&at, lora[i].total * group->in);
        for (size_t p = 0; p < group->n_parts; p++)
            lora[i].b[p] =
                place(&at, (group->part_at[p + 1] - group->part_at[p]) * lora[i].rank[p]);
        most[i % TR_GROUPS] = SH_MAX(most[i % TR_GROUPS], lora[i].total);
    }
    size_t stride = 0;
    for (size_t g = 0; g < TR_GROUPS; g++) {
        net->border[g] = trainable ? align_up(most[g], BORDER_STEP) : 0;
        net->effective_at[g] = place(&stride, (net->groups[g].in + net->border[g]) *
                                                  (net->groups[g].out + net->border[g]));
    }
    net->effective = sh_alloc_aligned(n_layers * stride * sizeof(float));
    if (!net->effective) {
        free(lora);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for effective weights");
    }
    net->effective_stride = stride;
    net->lora = lora;
    net->n_lora = at;
    return SH_OK;
}

static void fold_group(const tr_net *net, const float *lora, size_t layer, size_t g)
{
    const tr_group *group = &net->groups[g];
    const tr_lora *l = &net->lora[layer * TR_GROUPS + g];
    size_t border = net->border[g], ld = group->in + border;
    float *out = net->effective + layer * net->effective_stride + net->effective_at[g];
    const float *w =
        net->weights + net->layout.layers + layer * net->layout.layer_stride + net->layout.group[g];
    const float *a = lora + l->a;
    float scaled[SH_LORA_RANK_MAX];
    for (size_t p = 0; p < group->n_parts; p++) {
        size_t rank = l->rank[p];
        for (size_t o = group->part_at[p]; o < group->part_at[p + 1]; o++) {
            const float *b = lora + l->b[p] + (o - group->part_at[p]) * rank;
            for (size_t k = 0; k < rank; k++)
                scaled[k] = l->scale[p] * b[k];
            tr_fold_row(out + o * ld, w + o * group->in, scaled, a + l->at[p] * group->in, rank,
                        group->in);
            if (border > 0) {
                memset(out + o * ld + group->in, 0, border * sizeof(float));
                memcpy(out + o * ld + group->in + l->at[p], scaled, rank * sizeof(float));
            }
        }
    }
    for (size_t k = 0; k < SH_MIN(l->total, border); k++)
        memcpy(out + (group->out + k) * ld, a + k * group->in, group->in * sizeof(float));
}

void tr_net_fold(tr_net *net, const float *lora)
{
    for (size_t layer = 0; layer < net->config.n_layers; layer++)
        for (size_t g = 0; g < TR_GROUPS; g++)
            fold_group(net, lora, layer, g);
}

/* Where pair i of an adapter lies in the flat vector; false when it is not adapted. */
static bool pair_at(const tr_net *net, const sh_lora_pair *pair, size_t i, size_t *a, size_t *b)
{
    size_t g, part;
    tr_matrix_group(i % SH_LAYER_MATRICES, &g, &part);
    const tr_lora *l = &net->lora[i / SH_LAYER_MATRICES * TR_GROUPS + g];
    *a = l->a + l->at[part] * pair->in;
    *b = l->b[part];
    return pair->a != NULL;
}

void tr_lora_gather(const tr_net *net, const sh_adapter *adapter, float *lora)
{
    for (size_t i = 0; i < (size_t)net->config.n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        size_t a, b;
        if (!pair_at(net, pair, i, &a, &b))
            continue;
        memcpy(lora + a, pair->a, (size_t)pair->rank * pair->in * sizeof(float));
        memcpy(lora + b, pair->b, (size_t)pair->rank * pair->out * sizeof(float));
    }
}

void tr_lora_scatter(const tr_net *net, const float *lora, sh_adapter *adapter)
{
    for (size_t i = 0; i < (size_t)net->config.n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        size_t a, b;
        if (!pair_at(net, pair, i, &a, &b))
            continue;
        memcpy(pair->a, lora + a, (size_t)pair->rank * pair->in * sizeof(float));
        memcpy(pair->b, lora + b, (size_t)pair->rank * pair->out * sizeof(float));
    }
}
