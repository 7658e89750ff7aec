/*
 * Adapters as the kernels use them. The factors of all adapters are stacked: of all matrices that
 * read the same input one A, so that it is passed over once, and of each matrix one B. Values are
 * halves unless a base matrix of the input is F32. Halves reach from 6e-8 to 65504 only: each
 * pair's factors are first brought to a largest value below 1 by powers of two, which `scales`
 * gives back.
 */
#include <math.h>
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/model/context_internal.h"

#define RANK_MAX 65536u

static const struct {
    uint8_t n, matrices[3];
} inputs[SH_LAYER_INPUTS] = {
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
    sh_lora *lora; /* fields set in the second pass */
} builder;

static const sh_lora_pair *pair_of(const builder *b, size_t adapter, uint32_t layer, uint32_t m)
{
    const sh_lora_pair *p = &b->adapters[adapter]->pairs[(size_t)layer * SH_LAYER_MATRICES + m];
    return p->a != NULL && p->b != NULL ? p : NULL;
}

static sh_status check_adapter(const sh_model *model, const sh_adapter *adapter, sh_error *err)
{
    if (adapter->n_layers != model->config.n_layers)
        return sh_fail(err, SH_ERR_MISMATCH, "the adapter is for %u layers, the model has %u",
                       adapter->n_layers, model->config.n_layers);
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        const sh_matrix *m = &model->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES];
        if (p->a == NULL || p->b == NULL)
            continue;
        if (p->in != m->in || p->out != m->out || p->rank == 0 || p->rank > RANK_MAX)
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

static void put(void *to, size_t i, float value, bool halves)
{
    if (halves)
        ((uint16_t *)to)[i] = sh_f32_to_f16(value);
    else
        ((float *)to)[i] = value;
}

/* What of a matrix's stacked factors one pair is. */
typedef struct {
    void *a, *b; /* of the input, of the matrix */
    float *scales;
    uint32_t a_rank, a_from, b_from, out_padded;
    bool halves;
} place;

static void put_pair(const sh_lora_pair *p, float scale, const place *at)
{
    int a_exponent = 0, b_exponent = 0;
    if (at->halves) {
        int scale_exponent;
        scale = frexpf(scale, &scale_exponent);
        a_exponent = exponent_of(p->a, (size_t)p->rank * p->in);
        b_exponent = exponent_of(p->b, (size_t)p->rank * p->out);
        for (uint32_t r = 0; r < p->rank; r++)
            at->scales[at->a_from + r] = ldexpf(1, a_exponent + b_exponent + scale_exponent);
    }
    for (uint32_t r = 0; r < p->rank; r++)
        for (uint32_t i = 0; i < p->in; i++)
            put(at->a, (size_t)i * at->a_rank + at->a_from + r,
                ldexpf(p->a[(size_t)r * p->in + i], -a_exponent), at->halves);
    for (uint32_t o = 0; o < p->out; o++)
        for (uint32_t r = 0; r < p->rank; r++)
            put(at->b, (size_t)(at->b_from + r) * at->out_padded + o,
                scale * ldexpf(p->b[(size_t)o * p->rank + r], -b_exponent), at->halves);
}

static void build_matrix(builder *b, uint32_t layer, uint32_t m, place at)
{
    const sh_matrix *matrix = &b->model->layers[layer].m[m];
    const uint32_t rank = matrix_rank(b, layer, m);
    at.out_padded = (uint32_t)SH_LANES_UP(matrix->out);
    at.b = sh_carve(&b->carver, (size_t)rank * at.out_padded * (at.halves ? 2 : 4));
    if (b->carver.block == NULL || rank == 0)
        return;
    b->lora->outputs[(size_t)layer * SH_LAYER_MATRICES + m] = (sh_lora_output){
        .b = {.b = at.b, .rank = rank, .out_padded = at.out_padded, .halves = at.halves},
        .from = at.a_from};
    for (size_t i = 0; i < b->n; i++) {
        const sh_lora_pair *p = pair_of(b, i, layer, m);
        if (p == NULL)
            continue;
        const float own = b->scales != NULL ? b->scales[i] : 1;
        put_pair(p, own * b->adapters[i]->alpha / (float)p->rank, &at);
        at.a_from += p->rank;
        at.b_from += p->rank;
    }
}

static void build_input(builder *b, uint32_t layer, uint32_t input)
{
    const sh_layer *l = &b->model->layers[layer];
    const uint32_t in = l->m[inputs[input].matrices[0]].in;
    uint32_t rank = 0;
    place at = {.halves = true};
    for (uint32_t k = 0; k < inputs[input].n; k++) {
        const uint32_t m = inputs[input].matrices[k];
        rank += matrix_rank(b, layer, m);
        at.halves = at.halves && l->m[m].type != SH_TYPE_F32;
    }
    if (rank == 0)
        return;
    at.a_rank = (uint32_t)SH_LANES_UP(rank);
    at.a = sh_carve(&b->carver, (size_t)in * at.a_rank * (at.halves ? 2 : 4));
    at.scales = sh_carve(&b->carver, at.halves ? at.a_rank * sizeof *at.scales : 0);
    if (b->carver.block != NULL) {
        b->lora->inputs[(size_t)layer * SH_LAYER_INPUTS + input] =
            (sh_lora_input){.a = {.a = at.a, .in = in, .rank = at.a_rank, .halves = at.halves},
                            .scales = at.halves ? at.scales : NULL};
        b->lora->rank_max = SH_MAX(b->lora->rank_max, at.a_rank);
    }
    for (uint32_t k = 0; k < inputs[input].n; k++) {
        const uint32_t m = inputs[input].matrices[k];
        build_matrix(b, layer, m, at);
        at.a_from += matrix_rank(b, layer, m);
    }
}

static void build(builder *b)
{
    const uint32_t n_layers = b->model->config.n_layers;
    sh_lora_input *all_inputs =
        sh_carve(&b->carver, (size_t)n_layers * SH_LAYER_INPUTS * sizeof *all_inputs);
    sh_lora_output *outputs =
        sh_carve(&b->carver, (size_t)n_layers * SH_LAYER_MATRICES * sizeof *outputs);
    b->lora->inputs = all_inputs;
    b->lora->outputs = outputs;
    for (uint32_t layer = 0; layer < n_layers; layer++)
        for (uint32_t input = 0; input < SH_LAYER_INPUTS; input++)
            build_input(b, layer, input);
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
    if (lora->block == NULL) {
        free(lora);
        return sh_fail(err, SH_ERR_NO_MEMORY, "adapters: no memory for %zu bytes", bytes);
    }
    b.carver = (sh_carver){.block = lora->block};
    build(&b);
    *out = lora;
    return SH_OK;
}

void sh_lora_destroy(sh_lora **lora)
{
    if (*lora == NULL)
        return;
    free((*lora)->block);
    free(*lora);
    *lora = NULL;
}
