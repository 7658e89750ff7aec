/* The body of a relay's merge: judge, stack, encode. */
#include <stdlib.h>

#include "aggregator/job_internal.h"
#include "shared/base/file.h"

_Static_assert(SH_COORD_STACK_RANK_MAX == SH_ADAPTER_RANK_MAX, "a stack is an adapter");

/* The good sources as one adapter's bytes. */
static sh_status make_stack(const sh_merge_job *o, const sh_model *model,
                            const sh_merge_source *sources, sh_merge_job_result *result,
                            sh_error *err)
{
    SH_TRY(sh_merge_stack(sources, o->job->n_inputs, &model->config, &result->adapter, err));
    SH_TRY(sh_adapter_encode(result->adapter, &result->candidate, err));
    SH_TRY(sh_blob_describe(result->candidate.data, result->candidate.len, &result->blob,
                            &result->chunks, err));
    result->format = "";
    return SH_OK;
}

sh_status sh_job_stack(const sh_merge_job *o, sh_merge_job_result *result, sh_error *err)
{
    size_t n = o->job->n_inputs;
    sh_model *model = NULL;
    sh_merge_source *sources = sh_calloc(SH_MAX(n, (size_t)1), sizeof *sources);
    sh_adapter **adapters = sh_calloc(SH_MAX(n, (size_t)1), sizeof *adapters);
    sh_status status = SH_OK;
    char path[SH_PATH_BYTES];
    *result = (sh_merge_job_result){0};
    sh_buf_init(&result->candidate, (size_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES);
    if (sources == NULL || adapters == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "stack: no memory for %zu updates", n);
        goto cleanup;
    }
    SH_GOTO(sh_job_path(path, o->dir, &o->job->parent_model, err));
    SH_GOTO(sh_model_open(path, &model, err));
    SH_GOTO(job_read_sources(o, &model->config, sources, adapters, err));
    sh_judge_options judge = {.norm_factor_max = o->job->norm_factor_max,
                              .cosine_min = o->job->cosine_min};
    SH_GOTO(sh_merge_judge(sources, n, &judge, err));
    result->n_good = job_put_verdicts(o, sources);
    if (result->n_good > 0)
        status = make_stack(o, model, sources, result, err);
cleanup:
    for (size_t i = 0; adapters != NULL && i < n; i++)
        sh_adapter_destroy(&adapters[i]);
    free(adapters);
    free(sources);
    sh_model_close(&model);
    if (status != SH_OK)
        sh_merge_job_result_release(result);
    return status;
}
