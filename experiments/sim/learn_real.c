/*
 * The real learning: users type through the quantized model, LoRA is trained, updates are merged
 * into the master, candidates are gated on their bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/sim/sim.h"
#include "shared/base/file.h"

#define TOKEN_US     3000.0 /* a token on the reference device, virtual */
#define SMOKE_TOKENS 48
#define LIE_NATS     0.5

static sh_status type_text(sim_job *job)
{
    sim *s = job->sim;
    sim_typing t = {.model = job->model,
                    .frozen = s->frozen,
                    .text = job->text,
                    .release_version = (uint32_t)job->version,
                    .words_between = (uint32_t)s->options.words_between,
                    .seed = job->rng_seed,
                    .start_ms = job->start_ms,
                    .duration_ms = job->done_ms - job->start_ms,
                    .us_per_token = TOKEN_US / s->nodes[job->target].speed};
    return sim_type_text(&t, &job->typed, &job->err);
}

/* A liar: what it learned, with B multiplied, and a claim that it helped. */
static sh_status poison(sim_job *job)
{
    sh_adapter *adapter = NULL;
    sh_buf *update = &job->learned.update;
    SH_TRY(sh_adapter_decode(update->data, update->len, "update", &job->model->config, &adapter,
                             &job->err));
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        sh_lora_pair *p = &adapter->pairs[i];
        for (size_t k = 0; p->b && k < (size_t)p->out * p->rank; k++)
            p->b[k] *= job->poison;
    }
    job->learned.heldout_after =
        SH_MIN(job->learned.heldout_after, job->learned.heldout_before - LIE_NATS);
    sh_buf_clear(update);
    sh_status status = sh_adapter_encode(adapter, update, &job->err);
    sh_adapter_destroy(&adapter);
    return status;
}

static sh_status train(sim_job *job)
{
    sh_learn_options o = {
        .plan = job->plan, .shuffle_seed = job->rng_seed, .threads = 1, .heldout = true};
    SH_TRY(sh_learn_run(job->model, &job->snapshot, &o, &job->learned, &job->err));
    return job->poison == 1 ? SH_OK : poison(job);
}

/* The store's chunks were put together and checked when the job began; the file is shared by all
 * nodes of the simulation. */
static sh_status install(sim_job *job)
{
    sim *s = job->sim;
    sh_hash sha256;
    if (job->status != SH_OK)
        return job->status;
    SH_TRY(sh_job_put_file(s->objects, job->bytes.data, job->bytes.len, &sha256, &job->err));
    return sim_model_get(s, &sha256, &job->installed, &job->err);
}

static sh_status smoke(sim_job *job)
{
    const sim_text_list *l = &job->sim->texts.before[SIM_GATE];
    sh_loss loss;
    int32_t *tokens = NULL;
    size_t n = 0;
    SH_TRY(sim_texts_join(l, SMOKE_TOKENS, &tokens, &n));
    sh_status status =
        sh_model_loss(job->installed, NULL, tokens, n, SMOKE_TOKENS, false, &loss, &job->err);
    free(tokens);
    if (status == SH_OK)
        job->nll = loss.nll_sum / (double)SH_MAX(loss.n_scored, 1);
    return status;
}

static sh_status evaluate(sim_job *job)
{
    sim *s = job->sim;
    const sh_model *candidate = NULL;
    sh_hash sha256;
    if (job->status != SH_OK)
        return job->status;
    SH_TRY(sh_job_put_file(s->objects, job->bytes.data, job->bytes.len, &sha256, &job->err));
    SH_TRY(sim_model_get(s, &sha256, &candidate, &job->err));
    return sh_learn_evaluate(job->model, candidate, &job->snapshot, (uint32_t)s->options.context,
                             job->slices, &job->n_slices, &job->err);
}

static sh_status merge(sim_job *job)
{
    sim *s = job->sim;
    uint32_t n = job->coord.n_inputs;
    sh_bytes *blobs = sh_calloc(n, sizeof *blobs);
    if (!blobs)
        return sh_fail(&job->err, SH_ERR_NO_MEMORY, "merge: no memory");
    for (uint32_t i = 0; i < n; i++)
        blobs[i] = (sh_bytes){job->updates[i].data, job->updates[i].len};
    sh_merge_job options = {.dir = s->objects,
                            .job = &job->coord,
                            .inputs = job->inputs,
                            .blobs = blobs,
                            .format = SH_TYPE_Q8_0};
    sh_status status = sh_job_merge(&options, &job->merged, &job->err);
    free(blobs);
    return status;
}

static sh_status gate(sim_job *job)
{
    sh_gate_job options = {.dir = job->sim->objects,
                           .job = &job->coord,
                           .suite = &job->sim->suite,
                           .chunk = (uint32_t)job->sim->options.context};
    return sh_job_gate(&options, &job->gated, &job->err);
}

static void run(sim_job *job)
{
    switch (job->kind) {
    case SIM_JOB_TEXT:
        job->status = type_text(job);
        break;
    case SH_JOB_TRAIN:
        job->status = train(job);
        break;
    case SH_JOB_INSTALL:
        job->status = install(job);
        break;
    case SH_JOB_SMOKE:
        job->status = smoke(job);
        break;
    case SH_JOB_EVALUATE:
        job->status = evaluate(job);
        break;
    case SIM_COORD_KIND + SH_COORD_MERGE:
        job->status = merge(job);
        break;
    default:
        job->status = gate(job);
        break;
    }
}

const sim_learning sim_learning_real = {"real", run};
