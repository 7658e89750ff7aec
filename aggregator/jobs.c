/* The bodies of merge and genesis; the gate is in job_gate.c, folding in job_fold.c,
 * a relay's stack in job_stack.c. */
#include "aggregator/jobs.h"

#include <stdlib.h>
#include <string.h>

#include "aggregator/job_internal.h"
#include "shared/base/file.h"
#include "shared/model/quantize.h"

/* ---- files ---- */

static sh_status path_of(char *out, const char *dir, const sh_hash *sha256, const char *ending,
                         sh_error *err)
{
    char name[SH_HASH_HEX_BYTES + 16];
    sh_hex(sha256->b, sizeof sha256->b, name);
    memcpy(name + SH_HASH_HEX_BYTES - 1, ending, strlen(ending) + 1);
    return sh_path_join(out, SH_PATH_BYTES, dir, name, err);
}

sh_status sh_job_path(char *out, const char *dir, const sh_hash *sha256, sh_error *err)
{
    return path_of(out, dir, sha256, ".gguf", err);
}

sh_status sh_job_adapter_path(char *out, const char *dir, const sh_hash *sha256, sh_error *err)
{
    return path_of(out, dir, sha256, ".adapter.gguf", err);
}

sh_status sh_job_put_file(const char *dir, const void *bytes, size_t n, sh_hash *sha256,
                          sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_hash name = sh_sha256(bytes, n);
    SH_TRY(sh_job_path(path, dir, &name, err));
    if (!sh_file_exists(path))
        SH_TRY(sh_file_write_atomic(path, bytes, n, err));
    *sha256 = name;
    return SH_OK;
}

/* Quantizes the F32 file in `master`. */
static sh_status quantize(const sh_buf *master, sh_type format, sh_buf *out, sh_error *err)
{
    sh_gguf *gguf = NULL;
    SH_TRY(sh_gguf_open_memory(master->data, master->len, "master", &gguf, err));
    sh_status status = sh_gguf_quantize_encode(gguf, format, out, err);
    sh_gguf_close(&gguf);
    return status;
}

sh_status sh_job_genesis(const char *base_path, sh_type format, const char *dir, sh_hash *master,
                         sh_buf *model, sh_error *err)
{
    sh_gguf *base = NULL;
    sh_buf f32 = {0};
    sh_hash name, quantized;
    sh_status status = SH_OK;
    SH_GOTO(sh_gguf_open(base_path, &base, err));
    SH_GOTO(job_fold(base, NULL, 0, 0, NULL, &f32, err));
    SH_GOTO(sh_job_put_file(dir, f32.data, f32.len, &name, err));
    SH_GOTO(quantize(&f32, format, model, err));
    SH_GOTO(sh_job_put_file(dir, model->data, model->len, &quantized, err));
    *master = name;
cleanup:
    sh_buf_release(&f32);
    sh_gguf_close(&base);
    return status;
}

/* ---- merge ---- */

sh_status job_read_sources(const sh_merge_job *o, const sh_model_config *config,
                           sh_merge_source *sources, sh_adapter **adapters, sh_error *err)
{
    for (uint32_t i = 0; i < o->job->n_inputs; i++) {
        sh_merge_input *in = &o->inputs[i];
        const sh_bytes *blob = &o->blobs[i];
        sources[i] = (sh_merge_source){
            .weight = in->weight, .relayed = in->relayed, .reason = SH_REASON_BAD_BLOB};
        if (blob->n == 0)
            continue;
        sh_hash sha256 = sh_sha256(blob->data, blob->n);
        if (!sh_hash_equal(&sha256, &in->sha256))
            continue;
        sh_status status =
            sh_adapter_decode(blob->data, blob->n, "update", config, &adapters[i], err);
        if (status == SH_ERR_NO_MEMORY)
            return status;
        if (status != SH_OK)
            continue;
        sources[i].adapter = adapters[i];
        sources[i].reason = SH_REASON_NONE;
    }
    return SH_OK;
}

static sh_status write_adapter(const sh_merge_job *o, const sh_merge_job_result *result,
                               sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_buf bytes;
    sh_buf_init(&bytes, JOB_FILE_BYTES_MAX);
    sh_status status = SH_OK;
    SH_GOTO(sh_job_adapter_path(path, o->dir, &result->blob.sha256, err));
    SH_GOTO(sh_adapter_encode(result->adapter, &bytes, err));
    SH_GOTO(sh_file_write_atomic(path, bytes.data, bytes.len, err));
cleanup:
    sh_buf_release(&bytes);
    return status;
}

/* New master, quantized candidate and adapter form of the good sources, and their files. */
static sh_status make_candidate(const sh_merge_job *o, const sh_model *master,
                                const sh_merge_source *sources, sh_merge_job_result *result,
                                sh_error *err)
{
    sh_truncation truncation = {.energy = o->energy > 0 ? o->energy : JOB_ENERGY,
                                .rank_max = o->rank_max > 0 ? o->rank_max : JOB_RANK_MAX};
    double factor = (double)o->job->server_scale;
    size_t n = o->job->n_inputs;
    sh_buf f32 = {0};
    sh_hash candidate;
    sh_status status = SH_OK;
    SH_GOTO(job_fold(master->gguf, sources, n, factor, o->pool, &f32, err));
    SH_GOTO(sh_job_put_file(o->dir, f32.data, f32.len, &result->new_master, err));
    SH_GOTO(quantize(&f32, o->format, &result->candidate, err));
    SH_GOTO(
        sh_job_put_file(o->dir, result->candidate.data, result->candidate.len, &candidate, err));
    SH_GOTO(sh_blob_describe(result->candidate.data, result->candidate.len, &result->blob,
                             &result->chunks, err));
    SH_GOTO(sh_merge_adapter(sources, n, factor, &master->config, &truncation, o->pool,
                             &result->adapter, &result->discarded, err));
    SH_GOTO(write_adapter(o, result, err));
    result->format = sh_type_get(o->format)->name;
cleanup:
    sh_buf_release(&f32);
    return status;
}

static uint32_t count_good(const sh_merge_source *sources, size_t n)
{
    uint32_t good = 0;
    for (size_t i = 0; i < n; i++)
        good += sources[i].reason == SH_REASON_NONE;
    return good;
}

uint32_t job_put_verdicts(const sh_merge_job *o, const sh_merge_source *sources)
{
    for (size_t i = 0; i < o->job->n_inputs; i++) {
        o->inputs[i].norm = sources[i].norm;
        o->inputs[i].cosine = sources[i].cosine;
        o->inputs[i].reason = sources[i].reason;
    }
    return count_good(sources, o->job->n_inputs);
}

sh_coord_job_result sh_job_merged(const sh_merge_job_result *r, const sh_merge_input *inputs,
                                  uint32_t n_inputs)
{
    return (sh_coord_job_result){.inputs = inputs,
                                 .n_inputs = n_inputs,
                                 .new_master = r->new_master,
                                 .candidate = r->blob,
                                 .candidate_bytes = {r->candidate.data, r->candidate.len},
                                 .format = r->format,
                                 .adapter_rank = r->adapter ? r->adapter->rank : 0,
                                 .adapter_discarded = r->discarded};
}

void sh_merge_job_result_release(sh_merge_job_result *result)
{
    sh_buf_release(&result->candidate);
    free(result->chunks);
    sh_adapter_destroy(&result->adapter);
    *result = (sh_merge_job_result){0};
}

sh_status sh_job_merge(const sh_merge_job *o, sh_merge_job_result *result, sh_error *err)
{
    size_t n = o->job->n_inputs;
    sh_model *master = NULL;
    sh_merge_source *sources = sh_calloc(SH_MAX(n, (size_t)1), sizeof *sources);
    sh_adapter **adapters = sh_calloc(SH_MAX(n, (size_t)1), sizeof *adapters);
    sh_status status = SH_OK;
    char path[SH_PATH_BYTES];
    *result = (sh_merge_job_result){0};
    sh_buf_init(&result->candidate, JOB_FILE_BYTES_MAX);
    if (sources == NULL || adapters == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory for %zu updates", n);
        goto cleanup;
    }
    SH_GOTO(sh_job_path(path, o->dir, &o->job->master, err));
    SH_GOTO(sh_model_open(path, &master, err));
    SH_GOTO(job_read_sources(o, &master->config, sources, adapters, err));
    sh_judge_options judge = {.norm_factor_max = o->job->norm_factor_max,
                              .cosine_min = o->job->cosine_min};
    SH_GOTO(sh_merge_judge(sources, n, &judge, err));
    if (count_good(sources, n) > 0) {
        status = make_candidate(o, master, sources, result, err);
        if (status == SH_ERR_INVALID) { /* each is finite, the sum is not */
            sh_merge_job_result_release(result);
            for (size_t i = 0; i < n; i++)
                if (sources[i].reason == SH_REASON_NONE)
                    sources[i].reason = SH_REASON_NOT_FINITE;
            status = SH_OK;
        }
        if (status != SH_OK)
            goto cleanup;
    }
    result->n_good = job_put_verdicts(o, sources);
cleanup:
    for (size_t i = 0; adapters != NULL && i < n; i++)
        sh_adapter_destroy(&adapters[i]);
    free(adapters);
    free(sources);
    sh_model_close(&master);
    if (status != SH_OK)
        sh_merge_job_result_release(result);
    return status;
}
