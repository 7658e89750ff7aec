/*
 * Learning replaced by a cost model: bytes and numbers are drawn from the seed, durations are those
 * of the device's class. An update is small; in a small fleet one in eight has two chunks, and
 * in every other such fleet a model has two or three, so that transfers break in the middle.
 */
#include <string.h>

#include "experiments/world/world.h"
#include "shared/base/hash.h"

#define SMALL_FLEET     100u
#define INSTALL_MS      5000u
#define SMOKE_MS        10000u
#define EVALUATE_MS     20000u
#define BETTER          0.98
#define RELEASES_DAY    0.5 /* of a fleet whose buffer fills often; of a small one three times */
#define DRIFTING_PART   2u  /* of small fleets' nodes, from their DRIFT_EVENT-th event on */
#define DRIFT_EVENT     450u
#define GATE_PASSES_MAX 0.6
#define TOKENS_TRAINED  256
#define STREAM_GENESIS  0x47454e45u
#define STREAM_UPDATE   0x55504441u
#define STREAM_MODEL    0x4d4f4445u
#define STREAM_GATE     0x47415445u
#define STREAM_RECORD   0x5245434fu
#define STREAM_SIGN     0x5349474eu

static const char poison_mark[8] = "poison!";

static sh_status fill(const world *w, uint32_t i, uint32_t purpose, uint64_t number, size_t n,
                      sh_buf *out, sh_error *err)
{
    sh_rng rng;
    sh_rng_init(&rng, world_draw(w, i, purpose, number), number, purpose);
    uint8_t *to = sh_buf_reserve(out, n);
    if (!to)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %zu bytes", n);
    for (size_t at = 0; at < n; at += 4) {
        uint32_t x = sh_rng_u32(&rng);
        memcpy(to + at, &x, SH_MIN((size_t)4, n - at));
    }
    out->len += n;
    return SH_OK;
}

static size_t model_bytes(const world *w)
{
    static const size_t sizes[] = {2000, 67000, 2000, 67000, 2000, 67000, 2000, 140000};
    bool small = w->n_nodes <= SMALL_FLEET;
    return sizes[small ? world_draw(w, 0, STREAM_MODEL, 0) % SH_COUNT(sizes) : 0];
}

sh_status world_make_genesis(world *w, sh_error *err)
{
    sh_coord_options *c = &w->coord_options;
    uint8_t seed[32];
    sh_sign_public_key other;
    sh_buf_init(&w->genesis_model, 1u << 20);
    sh_buf_init(&w->genesis_manifest, SH_WIRE_MANIFEST_MAX);
    for (size_t k = 0; k < sizeof seed; k++)
        seed[k] = (uint8_t)world_draw(w, 0, STREAM_SIGN, k);
    sh_sign_keypair(seed, &c->release_pk, &c->release_sk);
    seed[0] ^= 1;
    sh_sign_keypair(seed, &other, &w->other_sk);
    SH_TRY(fill(w, 0, STREAM_GENESIS, 0, model_bytes(w), &w->genesis_model, err));
    w->genesis_sha = sh_sha256(w->genesis_model.data, w->genesis_model.len);
    w->genesis_master = sh_blake2b(w->genesis_model.data, w->genesis_model.len);
    return SH_OK;
}

uint64_t world_learn_ms(const world *w, uint32_t i, const sh_node_job *job)
{
    const world_class *c = &w->fleet->classes[w->nodes[i].cls];
    switch (job->kind) {
    case SH_JOB_TRAIN: /* it waits for the device's quiet hours */
        return c->train_pause_ms + (uint64_t)(TOKENS_TRAINED * c->train_ms_per_token);
    case SH_JOB_INSTALL:
        return INSTALL_MS;
    case SH_JOB_SMOKE:
        return SMOKE_MS;
    default:
        return EVALUATE_MS;
    }
}

static sh_status make_update(const world *w, uint32_t i, const world_job *job, sh_buf *bytes,
                             sh_node_job_result *out, sh_error *err)
{
    uint64_t draw = world_draw(w, i, STREAM_UPDATE, w->nodes[i].sequence);
    size_t n = 400 + draw % 1600;
    if (w->n_nodes <= SMALL_FLEET && draw >> 32 & 1 && draw >> 33 & 1 && draw >> 34 & 1)
        n = 70000;
    if (job->poisoned)
        SH_TRY(sh_buf_append(bytes, poison_mark, sizeof poison_mark));
    SH_TRY(fill(w, i, STREAM_UPDATE, w->nodes[i].sequence, n, bytes, err));
    out->update = (sh_bytes){bytes->data, bytes->len};
    out->samples = out->tokens_seen = TOKENS_TRAINED;
    out->heldout_before = 5;
    out->heldout_after = world_unit(draw) < BETTER ? 4.5 : 5.5;
    return SH_OK;
}

sh_status world_learn(const world *w, uint32_t i, const world_job *job, sh_buf *bytes,
                      sh_node_job_result *out, sh_error *err)
{
    out->id = job->job.id;
    out->status = job->status;
    out->text = job->status == SH_OK ? NULL : "simulation: the file's bytes are damaged";
    if (job->status != SH_OK)
        return SH_OK;
    if (job->job.kind == SH_JOB_TRAIN)
        return make_update(w, i, job, bytes, out, err);
    if (job->job.kind == SH_JOB_SMOKE)
        out->nll = 3;
    if (job->job.kind == SH_JOB_EVALUATE) {
        uint64_t tokens = SH_MAX(job->targets / 8, (uint64_t)1);
        double change = world_unit(world_draw(w, i, STREAM_GATE, job->job.candidate)) - 0.8;
        out->n_slices = SH_SLICES;
        for (uint32_t k = 0; k < SH_SLICES; k++)
            out->slices[k] =
                (sh_slice_score){k, tokens, (double)tokens * 4.0, (double)tokens * (4.0 + change)};
    }
    return SH_OK;
}

void world_make_record(const world *w, uint32_t i, uint64_t number, uint64_t now_ms, sh_record *out)
{
    uint64_t draw = world_draw(w, i, STREAM_RECORD, number);
    *out = (sh_record){.at_ms = now_ms,
                       .ttft_us = 20000 + (uint32_t)(draw % 5000),
                       .token_us = 9000,
                       .prompt_tokens = (uint16_t)(8 + draw % 8),
                       .output_tokens = 4,
                       .prompt_nll = 3.0f + (float)world_unit(draw),
                       .mean_logprob = -1,
                       .least_logprob = -2,
                       .mean_entropy = 1,
                       .feedback = draw >> 60 < 6 ? SH_FEEDBACK_ACCEPT : SH_FEEDBACK_NONE};
    if (w->n_nodes <= SMALL_FLEET && i % DRIFTING_PART == 0 && number > DRIFT_EVENT)
        out->prompt_tokens += 400; /* which is no matter of the release */
}

bool world_is_poison(const uint8_t *bytes, size_t n)
{
    return n >= sizeof poison_mark && memcmp(bytes, poison_mark, sizeof poison_mark) == 0;
}

sh_status world_make_candidate(const world *w, uint64_t candidate, sh_buf *out, sh_error *err)
{
    return fill(w, 0, STREAM_MODEL, candidate, model_bytes(w), out, err);
}

bool world_gate_passes(const world *w, uint64_t candidate)
{
    double releases = w->n_nodes <= SMALL_FLEET ? 3 * RELEASES_DAY : RELEASES_DAY;
    double share = SH_MIN(GATE_PASSES_MAX, releases / SH_MAX(w->candidates_day, 0.01));
    return world_unit(world_draw(w, 0, STREAM_GATE, candidate)) < share;
}
