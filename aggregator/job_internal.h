/* What the job bodies share. */
#ifndef SH_AGGREGATOR_JOB_INTERNAL_H
#define SH_AGGREGATOR_JOB_INTERNAL_H

#include "aggregator/jobs.h"
#include "aggregator/merge.h"

#define JOB_FILE_BYTES_MAX ((size_t)16 << 30)
#define JOB_ENERGY         0.99
#define JOB_RANK_MAX       32u
#define JOB_CHUNK          128u
#define JOB_TEXT_MAX       (64u << 20) /* bytes of a suite's file */

/* The weights of src in F32 as a new GGUF, in out (inited here). sources NULL: unchanged; else each
 * adapted matrix has factor · Σ wᵢ/Σw · ΔWᵢ added. SH_ERR_INVALID: the result is not finite. */
sh_status job_fold(const sh_gguf *src, const sh_merge_source *sources, size_t n, double factor,
                   sh_pool *pool, sh_buf *out, sh_error *err);

/* Decodes the updates; one that is not readable, not what its sender promised, or not of this
 * model's shapes gets its verdict. sources and adapters: [job->n_inputs], zeroed; the caller
 * destroys the adapters. */
sh_status job_read_sources(const sh_merge_job *o, const sh_model_config *config,
                           sh_merge_source *sources, sh_adapter **adapters, sh_error *err);
/* Copies what was found out about the sources to the job's inputs; returns how many are good. */
uint32_t job_put_verdicts(const sh_merge_job *o, const sh_merge_source *sources);

#endif
