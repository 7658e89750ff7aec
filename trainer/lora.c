/*
 * LoRA on a frozen base. Hu et al. 2021 (arXiv:2106.09685).
 */
#include <math.h>
#include <stdlib.h>

#include "trainer/train.h"

#define PURPOSE_A0 0x6c6f7241u /* names this use of the generator */

/* A0 of pair i of an adapter. */
static void random_a(sh_lora_pair *pair, uint64_t a_seed, size_t i)
{
    const float std = 1.0f / sqrtf((float)pair->in);
    sh_rng rng;
    sh_rng_init(&rng, a_seed, i, PURPOSE_A0);
    for (size_t j = 0; j < (size_t)pair->rank * pair->in; j++)
        pair->a[j] = std * sh_rng_normal(&rng);
}

/* Pair i of an adapter, of its rank: A0 and B = 0. */
static sh_status pair_init(sh_lora_pair *pair, uint64_t a_seed, size_t i, sh_error *err)
{
    const size_t a_n = (size_t)pair->rank * pair->in, b_n = (size_t)pair->rank * pair->out;
    pair->a = sh_alloc_aligned(a_n * sizeof(*pair->a));
    pair->b = sh_alloc_aligned(b_n * sizeof(*pair->b));
    if (!pair->a || !pair->b)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for an adapter of rank %u", pair->rank);
    random_a(pair, a_seed, i);
    return SH_OK;
}

sh_status sh_lora_initialize_ranks(const sh_model_config *config, uint64_t a_seed,
                                   const uint32_t ranks[SH_LAYER_MATRICES], float alpha,
                                   sh_adapter **out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *adapter = NULL;
    uint32_t most = 0;
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++)
        most = SH_MAX(most, ranks[m]);
    if (most == 0 || most > SH_LORA_RANK_MAX || !isfinite(alpha) || alpha <= 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "LoRA: rank %u must be in [1, %d] and alpha %g above zero", most,
                       SH_LORA_RANK_MAX, (double)alpha);
    SH_TRY(sh_adapter_create_empty(config, alpha, &adapter, err));
    adapter->rank = most;
    for (size_t i = 0; i < (size_t)config->n_layers * SH_LAYER_MATRICES; i++) {
        adapter->pairs[i].rank = ranks[i % SH_LAYER_MATRICES];
        if (adapter->pairs[i].rank > 0)
            SH_GOTO(pair_init(&adapter->pairs[i], a_seed, i, err));
    }
    *out = adapter;
    adapter = NULL;
cleanup:
    sh_adapter_destroy(&adapter);
    return status;
}

sh_status sh_lora_initialize(const sh_model_config *config, uint64_t a_seed, uint32_t rank,
                             float alpha, sh_adapter **out, sh_error *err)
{
    uint32_t ranks[SH_LAYER_MATRICES];
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++)
        ranks[m] = rank;
    return sh_lora_initialize_ranks(config, a_seed, ranks, alpha, out, err);
}

sh_status sh_lora_add_output(sh_adapter *adapter, const sh_model_config *config, uint64_t a_seed,
                             uint32_t rank, sh_error *err)
{
    const size_t i = sh_lora_output_pair(adapter->n_layers);
    if (rank == 0 || rank > SH_LORA_RANK_MAX)
        return sh_fail(err, SH_ERR_INVALID, "LoRA: rank %u of output.weight must be in [1, %d]",
                       rank, SH_LORA_RANK_MAX);
    SH_TRY(sh_adapter_add_output(adapter, config, rank, err));
    random_a(&adapter->pairs[i], a_seed, i);
    return SH_OK;
}

static sh_status adapter_check(const sh_model *base, const sh_adapter *adapter, sh_error *err)
{
    bool any = false;
    if (adapter->n_layers != base->config.n_layers)
        return sh_fail(err, SH_ERR_MISMATCH, "adapter is for %u layers, the base has %u",
                       adapter->n_layers, base->config.n_layers);
    if (!isfinite(adapter->alpha))
        return sh_fail(err, SH_ERR_INVALID, "adapter: alpha is not finite");
    SH_TRY(sh_adapter_check_output(adapter, &base->config, err));
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        const sh_matrix *m = sh_lora_pair_matrix(base, i);
        char name[SH_GGUF_NAME_MAX];
        if (!pair->a)
            continue;
        any = true;
        sh_lora_pair_name(adapter->n_layers, i, name);
        if (!pair->b || pair->in != m->in || pair->out != m->out)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "adapter is for another base: %s is %u x %u there, %u x %u here", name,
                           pair->out, pair->in, m->out, m->in);
        if (pair->rank == 0 || pair->rank > SH_LORA_RANK_MAX)
            return sh_fail(err, SH_ERR_LIMIT, "adapter: rank %u is not in [1, %d]", pair->rank,
                           SH_LORA_RANK_MAX);
    }
    if (!any)
        return sh_fail(err, SH_ERR_INVALID, "adapter: no matrix is adapted");
    return SH_OK;
}

/* The network of a base, with an adapter (may be NULL) laid out and in use; *lora is its flat
 * vector, the caller's to free. */
static sh_status net_open(const sh_model *base, const sh_adapter *adapter,
                          const sh_train_data *data, const sh_train_options *options, float **lora,
                          tr_net **out, sh_error *err)
{
    sh_status status = SH_OK;
    tr_net *net = NULL;
    const uint64_t copy = tr_copy_bytes(options->memory_max);
    SH_GOTO(tr_data_check(&base->config, data, err));
    SH_GOTO(tr_net_create(&base->config, base, copy, data->length - 1, &net, err));
    SH_GOTO(tr_net_quantize(net, options->quantize_aware, err));
    net->bf16 = options->bf16;
    if (adapter) {
        SH_GOTO(adapter_check(base, adapter, err));
        SH_GOTO(tr_net_attach(net, adapter, err));
        SH_GOTO(tr_net_set_lora(net, adapter, options, err));
        *lora = sh_alloc_aligned(net->n_lora * sizeof(**lora));
        if (!*lora) {
            status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for an adapter");
            goto cleanup;
        }
        tr_lora_gather(net, adapter, *lora);
        tr_net_use(net, *lora);
    }
    *out = net;
    net = NULL;
cleanup:
    tr_net_destroy(&net);
    return status;
}

sh_status sh_lora_train(const sh_model *base, sh_adapter *adapter, const sh_train_data *data,
                        const sh_train_options *options, sh_train_result *result, sh_error *err)
{
    sh_status status = SH_OK;
    tr_net *net = NULL, *teacher = NULL;
    float *lora = NULL;
    SH_GOTO(net_open(base, adapter, data, options, &lora, &net, err));
    SH_GOTO(tr_teacher_open(options, &base->config, base->gguf, data, &teacher, err));
    SH_GOTO(tr_train(&(tr_trainee){.net = net,
                                   .params = lora,
                                   .mode = TR_GRAD_LORA,
                                   .teacher = tr_teacher_of(teacher, options)},
                     data, options, result, err));
    tr_lora_scatter(net, lora, adapter);
cleanup:
    free(lora);
    tr_net_destroy(&teacher);
    tr_net_destroy(&net);
    return status;
}

sh_status sh_train_evaluate(const sh_model *base, const sh_adapter *adapter,
                            const sh_train_data *data, const sh_train_limits *limits,
                            double *mean_nll, sh_error *err)
{
    sh_status status = SH_OK;
    tr_net *net = NULL;
    float *lora = NULL;
    sh_train_limits left = limits ? *limits : (sh_train_limits){0};
    const sh_train_options options = {.memory_max = left.memory_max,
                                      .quantize_aware = left.quantize_aware};
    SH_GOTO(net_open(base, adapter, data, &options, &lora, &net, err));
    const uint64_t taken = tr_net_bytes(net) + net->n_lora * sizeof(*lora);
    if (left.memory_max > 0 && taken >= left.memory_max) {
        status = sh_fail(err, SH_ERR_LIMIT,
                         "evaluation: weights and adapter take %llu bytes, the memory limit is "
                         "%llu",
                         (unsigned long long)taken, (unsigned long long)left.memory_max);
        goto cleanup;
    }
    left.memory_max -= left.memory_max > 0 ? taken : 0;
    SH_GOTO(tr_evaluate(net, data, &left, mean_nll, err));
cleanup:
    free(lora);
    tr_net_destroy(&net);
    return status;
}

sh_status sh_lora_gradient(const sh_model *base, const sh_adapter *adapter,
                           const sh_train_data *data, sh_adapter *grad, double *loss, sh_error *err)
{
    sh_status status = SH_OK;
    tr_net *net = NULL;
    float *lora = NULL, *values = NULL;
    SH_GOTO(adapter_check(base, adapter, err));
    SH_GOTO(adapter_check(base, grad, err));
    for (size_t i = 0; i < sh_lora_pair_count(grad->n_layers); i++) {
        const sh_lora_pair *g = &grad->pairs[i], *pair = &adapter->pairs[i];
        if (!g->a != !pair->a || (g->a && g->rank != pair->rank)) {
            status = sh_fail(err, SH_ERR_MISMATCH, "gradient and adapter differ in shape");
            goto cleanup;
        }
    }
    SH_GOTO(net_open(base, adapter, data, &(sh_train_options){0}, &lora, &net, err));
    values = sh_alloc_aligned(net->n_lora * sizeof(*values));
    if (!values) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a gradient");
        goto cleanup;
    }
    SH_GOTO(tr_gradient(net, data, TR_GRAD_LORA, values, loss, err));
    tr_lora_scatter(net, values, grad);
cleanup:
    free(values);
    free(lora);
    tr_net_destroy(&net);
    return status;
}
