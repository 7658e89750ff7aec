/* What a relay passes up: its nodes' updates as one, without a product being formed. */
#include <stdlib.h>

#include "aggregator/merge_internal.h"
#include "shared/base/buf.h"

/* The base that all good sources are of; zeros when they differ or do not say. */
static sh_hash base_of(const sh_merge_source *sources, size_t n)
{
    sh_hash base = {{0}};
    bool first = true;
    for (size_t i = 0; i < n; i++) {
        if (sources[i].reason != SH_REASON_NONE)
            continue;
        if (!first && !sh_hash_equal(&base, &sources[i].adapter->base))
            return (sh_hash){{0}};
        base = sources[i].adapter->base;
        first = false;
    }
    return base;
}

/* The ranks of a matrix's factors together. */
static uint32_t stacked_rank(const sh_merge_source *sources, size_t n, size_t m, sh_factor *factors)
{
    size_t count = sh_merge_factors(sources, n, 1, m, factors), rank = 0;
    for (size_t i = 0; i < count; i++)
        rank += factors[i].rank;
    return (uint32_t)SH_MIN(rank, (size_t)UINT32_MAX);
}

/* A pair's scale is alpha / its rank, and alpha is one for all, so B takes up the difference. */
static sh_status stack_pair(const sh_merge_source *sources, size_t n, size_t m, sh_factor *factors,
                            sh_adapter *adapter, sh_error *err)
{
    sh_lora_pair *pair = &adapter->pairs[m];
    uint32_t rank = stacked_rank(sources, n, m, factors);
    if (rank == 0)
        return SH_OK;
    size_t count = sh_merge_factors(sources, n, (double)rank / (double)adapter->alpha, m, factors);
    pair->a = sh_alloc_aligned((size_t)rank * pair->in * sizeof *pair->a);
    pair->b = sh_alloc_aligned((size_t)rank * pair->out * sizeof *pair->b);
    if (pair->a == NULL || pair->b == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory to stack %zu updates", n);
    pair->rank = rank;
    merge_stack_a(factors, count, pair->in, pair->a);
    merge_stack_b(factors, count, pair->out, rank, pair->b);
    return SH_OK;
}

sh_status sh_merge_stack(const sh_merge_source *sources, size_t n, const sh_model_config *config,
                         sh_adapter **out, sh_error *err)
{
    size_t matrices = sh_lora_pair_count(config->n_layers), good = 0;
    sh_adapter *adapter = NULL;
    uint32_t rank = 0;
    sh_status status = SH_OK;
    sh_factor *factors = sh_calloc(SH_MAX(n, (size_t)1), sizeof *factors);
    if (factors == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory to stack %zu updates", n);
    for (size_t i = 0; i < n; i++) {
        if (sources[i].reason != SH_REASON_NONE)
            continue;
        SH_GOTO(sh_adapter_check_output(sources[i].adapter, config, err));
        good++;
    }
    if (good == 0) {
        status = sh_fail(err, SH_ERR_INVALID, "merge: no update is good");
        goto cleanup;
    }
    for (size_t m = 0; m < matrices; m++)
        rank = SH_MAX(rank, stacked_rank(sources, n, m, factors));
    if (rank > SH_ADAPTER_RANK_MAX) {
        status = sh_fail(err, SH_ERR_LIMIT,
                         "merge: %zu updates have rank %u together; at most %u go into one", good,
                         rank, SH_ADAPTER_RANK_MAX);
        goto cleanup;
    }
    SH_GOTO(sh_adapter_create_empty(config, (float)rank, &adapter, err));
    adapter->rank = rank;
    adapter->base = base_of(sources, n);
    for (size_t m = 0; m < matrices; m++)
        SH_GOTO(stack_pair(sources, n, m, factors, adapter, err));
    *out = adapter;
    adapter = NULL;
cleanup:
    free(factors);
    sh_adapter_destroy(&adapter);
    return status;
}
