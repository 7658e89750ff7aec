/*
 * LoRA on a frozen base. Hu et al. 2021 (arXiv:2106.09685).
 */
#include <math.h>
#include <stdlib.h>

#include "trainer/train.h"

#define PURPOSE_A0 0x6c6f7241u /* names this use of the generator */

sh_status sh_lora_initialize(const sh_model_config *config, uint64_t a_seed, uint32_t rank,
                             float alpha, sh_adapter **out, sh_error *err)
{
    sh_adapter *adapter = NULL;
    if (rank == 0 || rank > SH_LORA_RANK_MAX || !isfinite(alpha) || alpha <= 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "LoRA: rank %u must be in [1, %d] and alpha %g above zero", rank,
                       SH_LORA_RANK_MAX, (double)alpha);
    SH_TRY(sh_adapter_create(config, rank, alpha, &adapter, err));
    for (size_t i = 0; i < (size_t)config->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        float std = 1.0f / sqrtf((float)pair->in);
        sh_rng rng;
        sh_rng_init(&rng, a_seed, i, PURPOSE_A0);
        for (size_t j = 0; j < (size_t)pair->rank * pair->in; j++)
            pair->a[j] = std * sh_rng_normal(&rng);
    }
    *out = adapter;
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
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        const sh_matrix *m = &base->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES];
        if (!pair->a)
            continue;
        any = true;
        if (!pair->b || pair->in != m->in || pair->out != m->out)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "adapter is for another base: blk.%zu.%s is %u x %u there, %u x %u here",
                           i / SH_LAYER_MATRICES, sh_layer_matrix_names[i % SH_LAYER_MATRICES],
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
 * vector, the caller's to free. memory_max: of sh_train_options. */
static sh_status net_open(const sh_model *base, const sh_adapter *adapter,
                          const sh_train_data *data, uint64_t memory_max, float **lora,
                          tr_net **out, sh_error *err)
{
    sh_status status = SH_OK;
    tr_net *net = NULL;
    SH_GOTO(tr_data_check(&base->config, data, err));
    SH_GOTO(
        tr_net_create(&base->config, base, tr_copy_bytes(memory_max), data->length - 1, &net, err));
    if (adapter) {
        SH_GOTO(adapter_check(base, adapter, err));
        SH_GOTO(tr_net_attach(net, adapter, err));
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
    SH_GOTO(net_open(base, adapter, data, options->memory_max, &lora, &net, err));
    SH_GOTO(tr_teacher_open(options, &base->config, base->gguf, data, &teacher, err));
    net->bf16 = options->bf16;
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
    const sh_train_limits none = {0}, *l = limits ? limits : &none;
    SH_GOTO(net_open(base, adapter, data, l->memory_max, &lora, &net, err));
    SH_GOTO(tr_evaluate(net, data, l, mean_nll, err));
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
    for (size_t i = 0; i < (size_t)grad->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *g = &grad->pairs[i], *pair = &adapter->pairs[i];
        if (!g->a != !pair->a || (g->a && g->rank != pair->rank)) {
            status = sh_fail(err, SH_ERR_MISMATCH, "gradient and adapter differ in shape");
            goto cleanup;
        }
    }
    SH_GOTO(net_open(base, adapter, data, 0, &lora, &net, err));
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
