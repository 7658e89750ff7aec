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

#endif
