/*
 * Adapters as the kernels use them. The factors of all adapters are stacked: of all matrices that
 * read the same input one A, so that it is passed over once, and of each matrix one B. Their form
 * is transform.h's. Halves reach from 6e-8 to 65504 only: unless all is float, each pair's factors
 * are first brought to a largest value below 1 by powers of two, which `scales` gives back.
 */
#include <math.h>
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/math/pack.h"
#include "shared/model/context_internal.h"

/* Matrices that read one input. What the output matrix reads is the one input of a layer after the
 * last one, whose matrix 0 it is. */
typedef struct {
    uint8_t n, matrices[3];
} readers;

static const readers inputs[SH_LAYER_INPUTS] = {
    [SH_INPUT_ATTN] = {3, {SH_ATTN_Q, SH_ATTN_K, SH_ATTN_V}},
    [SH_INPUT_ATT] = {1, {SH_ATTN_OUTPUT}},
    [SH_INPUT_FFN] = {2, {SH_FFN_GATE, SH_FFN_UP}},
    [SH_INPUT_GATE] = {1, {SH_FFN_DOWN}},
};

typedef struct {
    const sh_model *model;
    const sh_adapter *const *adapters;
    const float *scales;
    size_t n;
    sh_carver carver;
    sh_lora *lora;   /* fields set in the second pass */
    size_t n_values; /* of the largest factor */
    float *values;   /* one factor as floats */
    uint8_t *rows;   /* and as Q8_0 */
} builder;

static const sh_lora_pair *pair_of(const builder *b, size_t adapter, uint32_t layer, uint32_t m)
{
    const sh_lora_pair *p = &b->adapters[adapter]->pairs[(size_t)layer * SH_LAYER_MATRICES + m];
    return p->a != NULL && p->b != NULL ? p : NULL;
}

static const sh_matrix *matrix_of(const builder *b, uint32_t layer, uint32_t m)
{
    return sh_lora_pair_matrix(b->model, (size_t)layer * SH_LAYER_MATRICES + m);
}

static const readers *readers_of(const builder *b, uint32_t layer, uint32_t input)
{
    static const readers of_head = {1, {0}};
    return layer < b->model->config.n_layers ? &inputs[input] : &of_head;
}

static sh_status check_adapter(const sh_model *model, const sh_adapter *adapter, sh_error *err)
{
    if (adapter->n_layers != model->config.n_layers)
        return sh_fail(err, SH_ERR_MISMATCH, "the adapter is for %u layers, the model has %u",
                       adapter->n_layers, model->config.n_layers);
    SH_TRY(sh_adapter_check_output(adapter, &model->config, err));
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        const sh_matrix *m = sh_lora_pair_matrix(model, i);
        if (p->a == NULL || p->b == NULL)
            continue;
        if (p->in != m->in || p->out != m->out || p->rank == 0 || p->rank > SH_ADAPTER_RANK_MAX)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "the adapter's pair for %s is %u x %u of rank %u, the matrix %u x %u",
                           m->name, p->out, p->in, p->rank, m->out, m->in);
    }
    return SH_OK;
}

static uint32_t matrix_rank(const builder *b, uint32_t layer, uint32_t m)
{
    uint32_t rank = 0;
    for (size_t i = 0; i < b->n; i++) {
        const sh_lora_pair *p = pair_of(b, i, layer, m);
        rank += p != NULL ? p->rank : 0;
    }
    return rank;
}

/* The power of two that is over every value; 0 (2^0) for zeros and for what is not finite. */
static int exponent_of(const float *values, size_t n)
{
    float largest = 0;
    int exponent = 0;
    for (size_t i = 0; i < n; i++)
        largest = fmaxf(largest, fabsf(values[i]));
    if (largest > 0 && isfinite(largest))
        frexpf(largest, &exponent);
    return exponent;
}

/* A pair's factors are its own times 2^-a_exponent, and times scale * 2^-b_exponent; t is given
 * t_scale. */
typedef struct {
    const sh_lora_pair *pair;
    float scale, t_scale;
    int a_exponent, b_exponent;
} scaled;

static scaled scale_pair(const builder *b, size_t adapter, const sh_lora_pair *p, sh_factor form)
{
    const float own = b->scales != NULL ? b->scales[adapter] : 1;
    scaled s = {
        .pair = p, .scale = own * b->adapters[adapter]->alpha / (float)p->rank, .t_scale = 1};
    if (form != SH_FACTOR_F32) {
        int exponent;
        s.scale = frexpf(s.scale, &exponent);
        s.a_exponent = exponent_of(p->a, (size_t)p->rank * p->in);
        s.b_exponent = exponent_of(p->b, (size_t)p->rank * p->out);
        s.t_scale = ldexpf(1, s.a_exponent + s.b_exponent + exponent);
    }
    return s;
}

/* ---- one form of the factors ---- */

static size_t a_bytes(sh_factor form, uint32_t in, uint32_t rank_padded)
{
    return form == SH_FACTOR_INT8 ? sh_pack_bytes(SH_TYPE_Q8_0, rank_padded, in)
                                  : (size_t)in * rank_padded * sh_factor_bytes(form);
}

static void put(void *to, size_t i, float value, sh_factor form)
{
    if (form == SH_FACTOR_F16)
        ((uint16_t *)to)[i] = sh_f32_to_f16(value);
    else
        ((float *)to)[i] = value;
}

/* values [rank, in]; rows: room for them as Q8_0. */
static void encode_a(const sh_lora_a *a, const float *values, uint32_t rank, void *to,
                     uint8_t *rows)
{
    const size_t row_bytes = sh_type_row_bytes(SH_TYPE_Q8_0, a->in);
    for (uint32_t r = 0; r < rank; r++) {
        const float *row = values + (size_t)r * a->in;
        if (a->form == SH_FACTOR_INT8)
            sh_row_quantize(SH_TYPE_Q8_0, row, rows + r * row_bytes, a->in);
        for (uint32_t i = 0; a->form != SH_FACTOR_INT8 && i < a->in; i++)
            put(to, (size_t)i * a->rank + r, row[i], a->form);
    }
    if (a->form == SH_FACTOR_INT8)
        sh_pack_groups(SH_TYPE_Q8_0, rows, rank, a->in, 0, a->rank / SH_GROUP_ROWS, to);
}

/* An output's ranks as codes; what is not finite makes the scale so. */
static void encode_codes(const float *values, uint32_t rank, uint16_t *scale, int8_t *codes)
{
    float largest = 0;
    bool finite = true;
    for (uint32_t r = 0; r < rank; r++) {
        largest = fmaxf(largest, fabsf(values[r]));
        finite = finite && isfinite(values[r]);
    }
    *scale = sh_f32_to_f16(finite ? largest / 127 : NAN);
    const float d = sh_f16_to_f32(*scale);
    for (uint32_t r = 0; r < rank && d > 0; r++)
        codes[(size_t)(r / 4) * 4 * SH_LANES + r % 4] =
            (int8_t)lrintf(fminf(fmaxf(values[r] / d, -127), 127)); /* d was rounded */
}

/* values [out, rank]. */
static void encode_b(const sh_lora_b *b, const float *values, uint32_t out, uint8_t *to)
{
    const size_t group_bytes = sh_lora_b_group_bytes(b->form, b->rank);
    for (uint32_t o = 0; o < out; o++) {
        uint8_t *group = to + o / SH_LANES * group_bytes;
        const uint32_t lane = o % SH_LANES;
        const float *row = values + (size_t)o * b->rank;
        if (b->form == SH_FACTOR_INT8)
            encode_codes(row, b->rank, (uint16_t *)(void *)group + lane,
                         (int8_t *)group + SH_LANES * sizeof(uint16_t) + (size_t)lane * 4);
        for (uint32_t r = 0; b->form != SH_FACTOR_INT8 && r < b->rank; r++)
            put(group, (size_t)r * SH_LANES + lane, row[r], b->form);
    }
}

/* ---- all of them ---- */

static bool is_first_pass(const builder *b)
{
    return b->carver.block == NULL;
}

static void build_matrix(builder *b, uint32_t layer, uint32_t m, uint32_t from, sh_factor form)
{
    const uint32_t out = matrix_of(b, layer, m)->out, rank = matrix_rank(b, layer, m);
    const sh_lora_b lora_b = {.rank = rank, .form = form};
    void *to =
        sh_carve(&b->carver, SH_LANES_UP(out) / SH_LANES * sh_lora_b_group_bytes(form, rank));
    b->n_values = SH_MAX(b->n_values, (size_t)rank * out);
    if (is_first_pass(b) || rank == 0)
        return;
    for (size_t i = 0, at = 0; i < b->n; i++) {
        const sh_lora_pair *p = pair_of(b, i, layer, m);
        if (p == NULL)
            continue;
        const scaled s = scale_pair(b, i, p, form);
        for (uint32_t o = 0; o < out; o++)
            for (uint32_t r = 0; r < p->rank; r++)
                b->values[(size_t)o * rank + at + r] =
                    s.scale * ldexpf(p->b[(size_t)o * p->rank + r], -s.b_exponent);
        at += p->rank;
    }
    encode_b(&lora_b, b->values, out, to);
    sh_lora_output *output = &b->lora->outputs[(size_t)layer * SH_LAYER_MATRICES + m];
    *output = (sh_lora_output){.b = lora_b, .from = from};
    output->b.b = to;
}

/* Ranks of one matrix's adapters, from rank `from` of the input on; how many there are. */
static uint32_t gather_a(builder *b, uint32_t layer, uint32_t m, uint32_t from, sh_factor form,
                         float *t_scales)
{
    uint32_t at = from;
    for (size_t i = 0; i < b->n; i++) {
        const sh_lora_pair *p = pair_of(b, i, layer, m);
        if (p == NULL)
            continue;
        const scaled s = scale_pair(b, i, p, form);
        float *rows = b->values + (size_t)at * p->in;
        for (size_t k = 0; k < (size_t)p->rank * p->in; k++)
            rows[k] = ldexpf(p->a[k], -s.a_exponent);
        for (uint32_t r = 0; t_scales != NULL && r < p->rank; r++)
            t_scales[at + r] = s.t_scale;
        at += p->rank;
    }
    return at - from;
}

/* The most exact that one of the matrices needs. */
static sh_factor form_of(const builder *b, uint32_t layer, const readers *of)
{
    sh_factor form = SH_FACTOR_INT8;
    for (uint32_t k = 0; k < of->n; k++) {
        const sh_type type = matrix_of(b, layer, of->matrices[k])->type;
        const sh_factor own = type == SH_TYPE_F32             ? SH_FACTOR_F32
                              : sh_product_takes_blocks(type) ? SH_FACTOR_INT8
                                                              : SH_FACTOR_F16;
        form = SH_MIN(form, own);
    }
    return form;
}

static void build_input(builder *b, uint32_t layer, uint32_t input)
{
    const readers *of = readers_of(b, layer, input);
    const sh_factor form = form_of(b, layer, of);
    sh_lora_a a = {.in = matrix_of(b, layer, of->matrices[0])->in, .form = form};
    uint32_t rank = 0;
    for (uint32_t k = 0; k < of->n; k++)
        rank += matrix_rank(b, layer, of->matrices[k]);
    if (rank == 0)
        return;
    a.rank = (uint32_t)SH_LANES_UP(rank);
    void *to = sh_carve(&b->carver, a_bytes(form, a.in, a.rank));
    float *t_scales = sh_carve(&b->carver, form != SH_FACTOR_F32 ? a.rank * sizeof(float) : 0);
    t_scales = form != SH_FACTOR_F32 ? t_scales : NULL;
    b->n_values = SH_MAX(b->n_values, (size_t)rank * a.in);
    if (!is_first_pass(b)) {
        for (uint32_t k = 0, from = 0; k < of->n; k++)
            from += gather_a(b, layer, of->matrices[k], from, form, t_scales);
        encode_a(&a, b->values, rank, to, b->rows);
        a.a = to;
        b->lora->inputs[(size_t)layer * SH_LAYER_INPUTS + input] =
            (sh_lora_input){.a = a, .scales = t_scales};
        b->lora->rank_max = SH_MAX(b->lora->rank_max, a.rank);
    }
    for (uint32_t k = 0, from = 0; k < of->n; k++) {
        const uint32_t m = of->matrices[k];
        build_matrix(b, layer, m, from, form);
        from += matrix_rank(b, layer, m);
    }
}

static void build(builder *b)
{
    const uint32_t n_layers = b->model->config.n_layers;
    sh_lora_input *all_inputs =
        sh_carve(&b->carver, ((size_t)n_layers * SH_LAYER_INPUTS + 1) * sizeof *all_inputs);
    sh_lora_output *outputs = sh_carve(&b->carver, sh_lora_pair_count(n_layers) * sizeof *outputs);
    b->lora->inputs = all_inputs;
    b->lora->outputs = outputs;
    for (uint32_t layer = 0; layer < n_layers; layer++)
        for (uint32_t input = 0; input < SH_LAYER_INPUTS; input++)
            build_input(b, layer, input);
    build_input(b, n_layers, 0);
}

sh_status sh_lora_create(const sh_model *model, const sh_adapter *const *adapters,
                         const float *scales, size_t n, sh_lora **out, sh_error *err)
{
    for (size_t i = 0; i < n; i++)
        SH_TRY(check_adapter(model, adapters[i], err));
    sh_lora *lora = sh_calloc(1, sizeof *lora);
    if (lora == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "adapters: out of memory");
    builder b = {.model = model, .adapters = adapters, .scales = scales, .n = n, .lora = lora};
    build(&b);
    const size_t bytes = b.carver.used;
    lora->block = sh_alloc_aligned(bytes);
    b.values = sh_calloc(SH_MAX(b.n_values, 1), sizeof *b.values);
    b.rows = sh_calloc(b.n_values / SH_Q8_0_VALUES + 1, sizeof(sh_block_q8_0));
    const bool got_all = lora->block != NULL && b.values != NULL && b.rows != NULL;
    if (got_all) {
        b.carver = (sh_carver){.block = lora->block};
        build(&b);
        *out = lora;
    } else {
        sh_lora_destroy(&lora);
    }
    free(b.values);
    free(b.rows);
    return got_all ? SH_OK
                   : sh_fail(err, SH_ERR_NO_MEMORY, "adapters: no memory for %zu bytes", bytes);
}

void sh_lora_destroy(sh_lora **lora)
{
    if (*lora == NULL)
        return;
    free((*lora)->block);
    free(*lora);
    *lora = NULL;
}
