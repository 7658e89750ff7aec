/* The merged sum of a whole model in adapter form: every matrix truncated on its own. */
#include <stdlib.h>

#include "aggregator/merge.h"
#include "shared/base/buf.h"

typedef struct {
    const sh_merge_source *sources;
    size_t n;
    double factor;
    const sh_truncation *options;
    sh_adapter *adapter;
    sh_truncated *done; /* [matrices] */
    sh_error *errors;   /* [matrices] */
} truncate_job;

static void truncate_matrix(void *arg, size_t m)
{
    truncate_job *job = arg;
    const sh_lora_pair *pair = &job->adapter->pairs[m];
    sh_factor *factors = sh_calloc(job->n, sizeof *factors);
    if (factors == NULL) {
        job->errors[m].code = sh_fail(&job->errors[m], SH_ERR_NO_MEMORY, "merge: no memory");
        return;
    }
    size_t n = sh_merge_factors(job->sources, job->n, job->factor, m, factors);
    job->errors[m].code = sh_merge_truncate(factors, n, pair->out, pair->in, job->options,
                                            &job->done[m], &job->errors[m]);
    free(factors);
}

/* Moves the truncated pairs into the adapter. A pair's scale is alpha / its rank, and alpha is one
 * for all, so B takes up the difference. */
static void move_pairs(sh_adapter *adapter, sh_truncated *done, size_t matrices)
{
    for (size_t m = 0; m < matrices; m++)
        adapter->rank = SH_MAX(adapter->rank, done[m].rank);
    adapter->alpha = (float)adapter->rank;
    for (size_t m = 0; m < matrices; m++) {
        sh_lora_pair *pair = &adapter->pairs[m];
        free(pair->a);
        free(pair->b);
        pair->rank = done[m].rank;
        pair->a = done[m].a;
        pair->b = done[m].b;
        done[m].a = done[m].b = NULL;
        float scale = (float)pair->rank / adapter->alpha;
        for (size_t i = 0; i < (size_t)pair->rank * pair->out; i++)
            pair->b[i] *= scale;
    }
}

static bool any_good(const sh_merge_source *sources, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (sources[i].reason == SH_REASON_NONE)
            return true;
    return false;
}

sh_status sh_merge_adapter(const sh_merge_source *sources, size_t n, double factor,
                           const sh_model_config *config, const sh_truncation *options,
                           sh_pool *pool, sh_adapter **out, double *discarded, sh_error *err)
{
    if (!any_good(sources, n))
        return sh_fail(err, SH_ERR_INVALID, "merge: no update is good");
    size_t matrices = sh_lora_pair_count(config->n_layers);
    for (size_t i = 0; i < n; i++)
        if (sources[i].reason == SH_REASON_NONE)
            SH_TRY(sh_adapter_check_output(sources[i].adapter, config, err));
    truncate_job job = {.sources = sources, .n = n, .factor = factor, .options = options};
    job.done = sh_calloc(matrices, sizeof *job.done);
    job.errors = sh_calloc(matrices, sizeof *job.errors);
    sh_status status = SH_OK;
    if (job.done == NULL || job.errors == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory for an adapter");
        goto cleanup;
    }
    SH_GOTO(sh_adapter_create(config, 1, 1, &job.adapter, err)); /* shapes; zeros of rank 1 */
    if (pool != NULL)
        sh_pool_for(pool, truncate_matrix, &job, matrices);
    else
        for (size_t m = 0; m < matrices; m++)
            truncate_matrix(&job, m);
    double energy = 0, lost = 0;
    uint32_t rank = 0;
    for (size_t m = 0; m < matrices; m++) {
        if (job.errors[m].code != SH_OK) {
            status = sh_fail(err, job.errors[m].code, "%s", job.errors[m].text);
            goto cleanup;
        }
        energy += job.done[m].energy;
        lost += job.done[m].discarded;
        rank = SH_MAX(rank, job.done[m].rank);
    }
    if (rank > 0) /* else the sum is zero: zeros of rank 1 say so in every reader's terms */
        move_pairs(job.adapter, job.done, matrices);
    *out = job.adapter;
    *discarded = energy > 0 ? lost / energy : 0;
    job.adapter = NULL;
cleanup:
    for (size_t m = 0; job.done != NULL && m < matrices; m++) {
        free(job.done[m].a);
        free(job.done[m].b);
    }
    free(job.done);
    free(job.errors);
    sh_adapter_destroy(&job.adapter);
    return status;
}
