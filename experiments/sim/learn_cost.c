/*
 * Learning replaced by a cost model: every byte and number is drawn from the job's seed, sizes and
 * durations are those of a small model. For tests of safety, where thousands of steps matter and
 * what is learned does not.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/sim/sim.h"

#define UPDATE_BYTES    70000 /* two chunks: transfers break in the middle */
#define CANDIDATE_BYTES 200000
#define TEXT_INFERENCES 16
#define GATE_REFUSES    0.25

const int32_t sim_cost_tokens[SIM_COST_TEXT_TOKENS];

static sh_status random_bytes(sh_rng *rng, size_t n, sh_buf *out)
{
    for (size_t i = 0; i < n / 4; i++) {
        uint32_t x = sh_rng_u32(rng);
        SH_TRY(sh_buf_append(out, &x, sizeof x));
    }
    return SH_OK;
}

static sh_status make_text(sim_job *job, sh_rng *rng)
{
    sim_typed *t = &job->typed;
    t->records = sh_calloc(TEXT_INFERENCES, sizeof *t->records);
    t->rows = sh_calloc(TEXT_INFERENCES, sizeof *t->rows);
    if (!t->records || !t->rows)
        return SH_ERR_NO_MEMORY;
    t->n = TEXT_INFERENCES;
    for (size_t i = 0; i < TEXT_INFERENCES; i++) {
        sh_record *r = &t->records[i];
        t->rows[i].offset = (uint32_t)i * (SIM_COST_TEXT_TOKENS / TEXT_INFERENCES);
        t->rows[i].n = SIM_COST_TEXT_TOKENS / TEXT_INFERENCES;
        t->rows[i].accepted = sh_rng_unit(rng) < (job->drifted ? 0.1 : 0.4);
        r->at_ms = job->start_ms + i;
        r->release_version = (uint32_t)job->version;
        r->prompt_tokens = (uint16_t)(8 + sh_rng_below(rng, 8));
        r->output_tokens = 2;
        r->prompt_nll = (job->drifted ? 5.0f : 3.0f) + 0.5f * sh_rng_normal(rng);
        r->mean_logprob = r->least_logprob = -1;
        r->feedback = t->rows[i].accepted ? SH_FEEDBACK_ACCEPT : SH_FEEDBACK_EDIT;
    }
    return SH_OK;
}

static sh_status make_update(sim_job *job, sh_rng *rng)
{
    sh_buf_init(&job->learned.update, 1u << 20);
    SH_TRY(random_bytes(rng, UPDATE_BYTES, &job->learned.update));
    job->learned.samples = 8192;
    job->learned.tokens_seen = 8192;
    job->learned.heldout_before = 5;
    job->learned.heldout_after = 4.5 + sh_rng_unit(rng); /* half of them are not better */
    return SH_OK;
}

static sh_status make_candidate(sim_job *job, sh_rng *rng)
{
    sh_merge_job_result *m = &job->merged;
    sh_buf_init(&m->candidate, 1u << 20);
    for (uint32_t i = 0; i < job->coord.n_inputs; i++) {
        bool bad = job->updates[i].len == 0;
        job->inputs[i].reason = bad                      ? SH_REASON_BAD_BLOB
                                : sh_rng_unit(rng) < 0.1 ? SH_REASON_NORM
                                                         : SH_REASON_NONE;
        job->inputs[i].norm = job->inputs[i].cosine = 0.5;
        m->n_good += job->inputs[i].reason == SH_REASON_NONE;
    }
    if (m->n_good == 0)
        return SH_OK;
    SH_TRY(random_bytes(rng, CANDIDATE_BYTES, &m->candidate));
    SH_TRY(sh_blob_describe(m->candidate.data, m->candidate.len, &m->blob, &m->chunks, &job->err));
    m->new_master = sh_blake2b(m->candidate.data, m->candidate.len);
    m->format = "Q8_0";
    return SH_OK;
}

/* A candidate is mostly a little better than its parent. */
static void make_scores(sim_job *job, sh_rng *rng)
{
    job->n_slices = SH_SLICES;
    for (uint32_t i = 0; i < SH_SLICES; i++) {
        double change = sh_rng_unit(rng) - 0.8;
        job->slices[i] = (sh_slice_score){i, 500, 500 * 4.0, 500 * (4.0 + change)};
    }
}

static void run(sim_job *job)
{
    sh_rng rng;
    sh_rng_init(&rng, job->rng_seed, job->target, 0x434f5354);
    switch (job->kind) {
    case SIM_JOB_TEXT:
        job->status = make_text(job, &rng);
        break;
    case SH_JOB_TRAIN:
        job->status = make_update(job, &rng);
        break;
    case SIM_COORD_KIND + SH_COORD_MERGE:
        job->status = make_candidate(job, &rng);
        break;
    case SIM_COORD_KIND + SH_COORD_GATE: {
        bool worse = sh_rng_unit(&rng) < GATE_REFUSES;
        job->gated = (sh_coord_job_result){.loss_parent = 4,
                                           .loss_candidate = worse ? 6 : 3,
                                           .loss_adapter_form = 3,
                                           .n_slices = 1};
        job->gated.slice_parent[0] = 4;
        job->gated.slice_candidate[0] = job->gated.loss_candidate;
        break;
    }
    case SH_JOB_EVALUATE:
        if (job->status == SH_OK)
            make_scores(job, &rng);
        break;
    default: /* INSTALL was checked by its SHA-256; SMOKE has nothing to run */
        job->nll = 3;
        break;
    }
}

const sim_learning sim_learning_cost = {"cost", run};
