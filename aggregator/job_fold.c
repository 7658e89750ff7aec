/* Folding a merged sum into the full-precision master: every tensor in F32, the adapted matrices
 * with the exact, untruncated sum added. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/job_internal.h"

#define FILE_TYPE_ALL_F32 0
#define OUTPUT_TENSOR     "output.weight"

typedef struct {
    const sh_gguf *src;
    const sh_merge_source *sources;
    size_t n;
    uint32_t n_layers; /* 0: nothing to add */
    double factor;
    float **values;   /* [tensors] F32 weights of each */
    sh_error *errors; /* [tensors] */
} fold_job;

/* "blk.3.attn_q.weight" -> 3 * SH_LAYER_MATRICES + SH_ATTN_Q, "output.weight" -> the pair of the
 * output matrix; false for what no adapter touches. */
static bool matrix_index(const char *name, uint32_t n_layers, size_t *index)
{
    unsigned layer;
    int at = 0;
    if (n_layers > 0 && strcmp(name, OUTPUT_TENSOR) == 0) {
        *index = sh_lora_output_pair(n_layers);
        return true;
    }
    if (sscanf(name, "blk.%u.%n", &layer, &at) != 1 || at == 0 || layer >= n_layers)
        return false;
    for (size_t k = 0; k < SH_LAYER_MATRICES; k++) {
        size_t n = strlen(sh_layer_matrix_names[k]);
        if (strncmp(name + at, sh_layer_matrix_names[k], n) == 0 &&
            strcmp(name + at + n, ".weight") == 0) {
            *index = layer * SH_LAYER_MATRICES + k;
            return true;
        }
    }
    return false;
}

static sh_status add_sum(const fold_job *job, const sh_gguf_tensor *tensor, size_t matrix,
                         float *values, sh_error *err)
{
    size_t count = (size_t)tensor->ne[0] * (size_t)tensor->ne[1];
    sh_factor *factors = sh_calloc(job->n, sizeof *factors);
    float *delta = sh_alloc_aligned(count * sizeof *delta);
    sh_status status = SH_OK;
    if (factors == NULL || delta == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "fold: no memory for %s", tensor->name);
        goto cleanup;
    }
    size_t n = sh_merge_factors(job->sources, job->n, job->factor, matrix, factors);
    if (n == 0)
        goto cleanup;
    SH_GOTO(sh_merge_sum(factors, n, (uint32_t)tensor->ne[1], (uint32_t)tensor->ne[0], delta, err));
    for (size_t i = 0; i < count; i++) {
        values[i] += delta[i];
        if (!isfinite(values[i])) {
            status = sh_fail(err, SH_ERR_INVALID, "fold: %s is not finite", tensor->name);
            goto cleanup;
        }
    }
cleanup:
    free(factors);
    free(delta);
    return status;
}

static sh_status fold_tensor(fold_job *job, size_t t, sh_error *err)
{
    const sh_gguf_tensor *tensor = sh_gguf_tensor_at(job->src, t);
    size_t row = (size_t)tensor->ne[0], rows = 1;
    for (uint32_t d = 1; d < SH_GGUF_DIMS_MAX; d++)
        rows *= (size_t)tensor->ne[d];
    float *values = sh_alloc_aligned(row * rows * sizeof *values);
    if (values == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "fold: no memory for %s", tensor->name);
    job->values[t] = values;
    size_t bytes = sh_type_row_bytes(tensor->type, row);
    for (size_t i = 0; i < rows; i++)
        sh_row_dequantize(tensor->type, (const uint8_t *)tensor->data + i * bytes, values + i * row,
                          row);
    size_t matrix;
    if (!matrix_index(tensor->name, job->n_layers, &matrix))
        return SH_OK;
    return add_sum(job, tensor, matrix, values, err);
}

static void run_fold(void *arg, size_t t)
{
    fold_job *job = arg;
    job->errors[t].code = fold_tensor(job, t, &job->errors[t]);
}

static sh_status encode(const fold_job *job, size_t n_tensors, sh_buf *out, sh_error *err)
{
    static const char *const skip[] = {"general.file_type", NULL};
    sh_gguf_writer *writer = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_gguf_writer_create(&writer, err));
    SH_GOTO(sh_gguf_writer_copy_keys(writer, job->src, skip, err));
    if (sh_gguf_writer_set_u32(writer, "general.file_type", FILE_TYPE_ALL_F32) != SH_OK) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "fold: no memory for a key");
        goto cleanup;
    }
    for (size_t t = 0; t < n_tensors; t++) {
        const sh_gguf_tensor *tensor = sh_gguf_tensor_at(job->src, t);
        SH_GOTO(sh_gguf_writer_add_tensor(writer, tensor->name, SH_TYPE_F32, tensor->ne,
                                          tensor->n_dims, job->values[t], err));
    }
    status = sh_gguf_writer_encode(writer, out, err);
cleanup:
    sh_gguf_writer_destroy(&writer);
    return status;
}

/* How many layers the good updates have; none changes a matrix that is not there. */
static sh_status count_layers(fold_job *job, sh_error *err)
{
    const bool untied = sh_gguf_tensor_find(job->src, OUTPUT_TENSOR) != NULL;
    for (size_t i = 0; i < job->n; i++) {
        const sh_adapter *adapter = job->sources[i].adapter;
        if (job->sources[i].reason != SH_REASON_NONE)
            continue;
        job->n_layers = adapter->n_layers;
        SH_TRY(sh_adapter_check_output(adapter, &(sh_model_config){.tied_output = !untied}, err));
    }
    return SH_OK;
}

sh_status job_fold(const sh_gguf *src, const sh_merge_source *sources, size_t n, double factor,
                   sh_pool *pool, sh_buf *out, sh_error *err)
{
    size_t n_tensors = sh_gguf_n_tensors(src);
    fold_job job = {.src = src, .sources = sources, .n = n, .factor = factor};
    job.values = sh_calloc(SH_MAX(n_tensors, (size_t)1), sizeof *job.values);
    job.errors = sh_calloc(SH_MAX(n_tensors, (size_t)1), sizeof *job.errors);
    sh_status status = SH_OK;
    sh_buf bytes;
    sh_buf_init(&bytes, JOB_FILE_BYTES_MAX);
    SH_GOTO(count_layers(&job, err));
    if (job.values == NULL || job.errors == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "fold: no memory for a model");
        goto cleanup;
    }
    if (pool != NULL)
        sh_pool_for(pool, run_fold, &job, n_tensors);
    else
        for (size_t t = 0; t < n_tensors; t++)
            run_fold(&job, t);
    for (size_t t = 0; t < n_tensors; t++)
        if (job.errors[t].code != SH_OK) {
            status = sh_fail(err, job.errors[t].code, "%s", job.errors[t].text);
            goto cleanup;
        }
    SH_GOTO(encode(&job, n_tensors, &bytes, err));
    *out = bytes;
    bytes = (sh_buf){0};
cleanup:
    for (size_t t = 0; job.values != NULL && t < n_tensors; t++)
        free(job.values[t]);
    free(job.values);
    free(job.errors);
    sh_buf_release(&bytes);
    return status;
}
