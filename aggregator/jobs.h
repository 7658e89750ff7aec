/*
 * The bodies of the coordinator's long jobs. A shell runs them on a worker: they read files and
 * bytes, write only content-addressed files in `dir`, and can be run again without harm.
 *
 *     dir/<sha256>.gguf          masters (F32), genesis, quantized candidates and releases
 *     dir/<sha256>.adapter.gguf  adapter form of the candidate <sha256>, relative to its parent
 *
 * Results do not depend on the number of pool threads; pool may be NULL. One BLAS thread a worker.
 */
#ifndef SH_AGGREGATOR_JOBS_H
#define SH_AGGREGATOR_JOBS_H

#include "aggregator/coordinator.h"
#include "shared/math/pool.h"
#include "shared/model/model.h"

/* "dir/<hex>.gguf" and "dir/<hex>.adapter.gguf" into out of SH_PATH_BYTES. */
SH_MUST_USE sh_status sh_job_path(char *out, const char *dir, const sh_hash *sha256, sh_error *err);
SH_MUST_USE sh_status sh_job_adapter_path(char *out, const char *dir, const sh_hash *sha256,
                                          sh_error *err);
/* Writes bytes under their SHA-256 if they are not there yet. */
SH_MUST_USE sh_status sh_job_put_file(const char *dir, const void *bytes, size_t n, sh_hash *sha256,
                                      sh_error *err);

/* The genesis files of a base model (any readable type): its weights in F32 as the master, and
 * quantized to `format`; both are put into dir. model is the quantized bytes (the caller inits and
 * releases). */
SH_MUST_USE sh_status sh_job_genesis(const char *base_path, sh_type format, const char *dir,
                                     sh_hash *master, sh_buf *model, sh_error *err);

/* ---- merge ---- */
typedef struct {
    const char *dir;
    const sh_coord_job *job; /* SH_COORD_MERGE: master, scale, limits */
    sh_merge_input *inputs; /* [job->n_inputs]: the job's inputs; norm, cosine, reason are filled */
    const sh_bytes *blobs;  /* [job->n_inputs] updates' bytes; empty: not readable, "bad-blob" */
    sh_type format;         /* of the candidate: SH_TYPE_Q8_0 */
    double energy;          /* adapter form: share to hold (0: 0.99) */
    uint32_t rank_max;      /* and the largest rank (0: 32) */
    sh_pool *pool;
} sh_merge_job;

typedef struct {
    uint32_t n_good; /* 0: no candidate was made, the rest is empty */
    sh_hash new_master;
    sh_buf candidate; /* quantized bytes, also in dir */
    sh_blob blob;     /* describes them; chunk_hashes points to `chunks` */
    uint8_t *chunks;
    const char *format;  /* "Q8_0" */
    sh_adapter *adapter; /* adapter form, also in dir */
    double discarded;
} sh_merge_job_result;
/* *result is zeroed first. An unreadable or misfit update is a verdict (SH_REASON_BAD_BLOB), never
 * an error; an error is a missing master, a full disk, no memory. */
SH_MUST_USE sh_status sh_job_merge(const sh_merge_job *options, sh_merge_job_result *result,
                                   sh_error *err);
void sh_merge_job_result_release(sh_merge_job_result *result);
/* What the coordinator is told of it: borrows result and inputs; id, status and text are the
 * shell's to set. */
sh_coord_job_result sh_job_merged(const sh_merge_job_result *result, const sh_merge_input *inputs,
                                  uint32_t n_inputs);

/* ---- stack ---- */
/* SH_COORD_STACK: judges as sh_job_merge does and stacks the good updates, without a file being
 * written: candidate and blob are the adapter's bytes, format is empty. Of options, format, energy
 * and rank_max are not used. SH_ERR_LIMIT: more than one update can hold, see sh_merge_stack and
 * SH_BLOB_CHUNKS_MAX. */
SH_MUST_USE sh_status sh_job_stack(const sh_merge_job *options, sh_merge_job_result *result,
                                   sh_error *err);

/* ---- gate ---- */
#define SH_SUITE_NAME_MAX 64

typedef struct {
    char name[SH_SUITE_NAME_MAX];
    int32_t *tokens;
    size_t n;
} sh_suite_slice;

/* Operator-owned evaluation texts, a slice each. The hash is over names and tokens, in order, so
 * the same texts under another vocabulary are another suite. */
typedef struct {
    sh_suite_slice slices[SH_GATE_SLICES_MAX];
    uint32_t n;
    sh_hash sha256;
} sh_suite;
/* Appends a slice (tokens are copied) and brings the hash up to date. SH_ERR_LIMIT; SH_ERR_INVALID
 * for fewer than two tokens. */
SH_MUST_USE sh_status sh_suite_add(sh_suite *suite, const char *name, const int32_t *tokens,
                                   size_t n, sh_error *err);
/* Every *.txt of a folder, in the order of their names, is a slice. */
SH_MUST_USE sh_status sh_suite_load(const char *dir, const sh_tokenizer *tokenizer, sh_suite *out,
                                    sh_error *err);
void sh_suite_release(sh_suite *suite); /* takes a zeroed one */

typedef struct {
    const char *dir;
    const sh_coord_job *job; /* SH_COORD_GATE: parent_model, candidate_model */
    const sh_suite *suite;
    uint32_t chunk; /* tokens an evaluation window; 0: 128 */
    sh_pool *pool;
} sh_gate_job;
/* Fills suite, losses and slices of out (id, status and text are the shell's). Mean negative
 * log-likelihood of every predicted token, nats: parent Q(W), candidate Q(W+ΔW), adapter form
 * Q(W)+ΔW. SH_ERR_NOT_FOUND when the candidate's files are gone (the coordinator merges again). */
SH_MUST_USE sh_status sh_job_gate(const sh_gate_job *options, sh_coord_job_result *out,
                                  sh_error *err);

#endif
