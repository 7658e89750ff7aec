/*
 * What the run is judged by, made after it on texts that nobody trained on and no gate saw:
 * held-out loss of the base, of the final release, of one LoRA trained centrally on the honest
 * nodes' pooled corrections, and of each node's LoRA trained alone; next-word acceptance.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/sim/sim.h"

#define ACCEPTANCE_TEXTS   6 /* held-out texts typed a topic */
#define CENTRAL_TELL_STEPS 50

/* ---- held-out loss ---- */

typedef struct {
    sim *s;
    const sh_model **models; /* [n_topics], the model that scores a topic */
    sh_loss losses[SIM_TOPICS_MAX];
    sh_status statuses[SIM_TOPICS_MAX];
    sh_error errors[SIM_TOPICS_MAX];
} heldout;

static void score_topic(void *arg, size_t t)
{
    heldout *h = arg;
    int32_t *tokens = NULL;
    size_t n = 0;
    if (!h->models[t])
        return;
    h->statuses[t] = sim_texts_join(&h->s->texts.topic[t][SIM_HELDOUT],
                                    (size_t)h->s->options.heldout_tokens, &tokens, &n);
    if (h->statuses[t] == SH_OK)
        h->statuses[t] =
            sh_model_loss(h->models[t], NULL, tokens, n, (uint32_t)h->s->options.context, false,
                          &h->losses[t], &h->errors[t]);
    free(tokens);
}

/* Mean over the scored tokens of all topics; models[t] may be NULL: that topic is left out. */
static sh_status heldout_loss(sim *s, const sh_model **models, double *out, sh_error *err)
{
    heldout *h = sh_calloc(1, sizeof *h);
    if (!h)
        return sh_fail(err, SH_ERR_NO_MEMORY, "measure: no memory");
    sh_status status = SH_OK;
    double sum = 0;
    uint64_t n = 0;
    h->s = s;
    h->models = models;
    sh_pool_for(s->pool, score_topic, h, s->texts.n_topics);
    for (size_t t = 0; t < s->texts.n_topics; t++) {
        if (h->statuses[t] != SH_OK) {
            *err = h->errors[t];
            SH_GOTO(h->statuses[t]);
        }
        sum += h->losses[t].nll_sum;
        n += h->losses[t].n_scored;
    }
    *out = sum / (double)SH_MAX(n, 1);
cleanup:
    free(h);
    return status;
}

static sh_status heldout_loss_of(sim *s, const sh_model *model, double *out, sh_error *err)
{
    const sh_model *models[SIM_TOPICS_MAX];
    for (size_t t = 0; t < s->texts.n_topics; t++)
        models[t] = model;
    return heldout_loss(s, models, out, err);
}

/* ---- baselines ---- */

/* Folds one adapter into the genesis master and quantizes, as a release would be. */
static sh_status fold(sim *s, const sh_buf *update, const sh_model **out, sh_error *err)
{
    sh_merge_input input = {.weight = 1, .sha256 = sh_sha256(update->data, update->len)};
    sh_bytes blob = {update->data, update->len};
    sh_coord_job job = {.kind = SH_COORD_MERGE,
                        .parent_model = s->genesis_sha,
                        .master = s->genesis_master,
                        .server_scale = 1,
                        .norm_factor_max = 1e30f,
                        .cosine_min = -1,
                        .n_inputs = 1};
    sh_merge_job options = {
        .dir = s->objects, .job = &job, .inputs = &input, .blobs = &blob, .format = SH_TYPE_Q8_0};
    sh_merge_job_result result = {0};
    sh_status status = SH_OK;
    SH_GOTO(sh_job_merge(&options, &result, err));
    if (result.n_good != 1)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID, "measure: the baseline's update was refused: %s",
                        sh_reason_name(input.reason)));
    SH_GOTO(sim_model_get(s, &result.blob.sha256, out, err));
cleanup:
    sh_merge_job_result_release(&result);
    return status;
}

static bool is_honest(const sim *s, uint32_t i)
{
    return (int64_t)i != s->options.poison_scale_node && (int64_t)i != s->options.poison_sign_node;
}

static sh_status read_snapshot(sim *s, uint32_t i, sh_snapshot *out, sh_error *err)
{
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(s->nodes[i].store, SH_TXN_READ, &txn, err));
    sh_status status = sh_snapshot_read(txn, out, err);
    sh_txn_abort(&txn);
    return status;
}

static sh_learn_options baseline_options(const sim *s, double passes)
{
    sh_learn_options o = {.plan = s->coord_options.train, .threads = 1};
    o.plan.passes_milli = (uint32_t)(SH_MAX(passes, 0.001) * 1000 + 0.5);
    o.plan.steps_max = UINT32_MAX;
    o.plan.tokens_min = 0;
    o.plan.lr_final = 0;
    o.plan.a_seed = sim_seed(s, 0, 0x43454e54);
    o.shuffle_seed = sim_seed(s, 1, 0x43454e54);
    return o;
}

static bool central_progress(void *arg, uint32_t step, uint32_t steps, double loss)
{
    if (step % CENTRAL_TELL_STEPS == 0)
        sim_progress_line(arg,
                          "measuring: one LoRA on the pooled corrections, step %u of %u, loss %.3f",
                          step, steps, loss);
    return true;
}

/* One training on all honest nodes' corrections, with as many example passes as the fleet made. */
static sh_status central(sim *s, sim_measures *m, sh_error *err)
{
    sh_snapshot pooled = {0};
    sh_round_result learned = {0};
    const sh_model *base = NULL, *model = NULL;
    uint64_t trained = 0;
    sh_status status = SH_OK;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        if (!is_honest(s, i))
            continue;
        SH_GOTO(read_snapshot(s, i, &pooled, err));
        trained += s->nodes[i].tokens_trained;
    }
    m->central_passes = (double)trained / (double)SH_MAX(sh_snapshot_targets(&pooled), 1);
    sh_learn_options o = baseline_options(s, m->central_passes);
    o.plan.batch = (uint32_t)s->options.central_batch;
    o.threads = (unsigned)s->options.threads;
    o.progress = central_progress;
    o.progress_arg = s;
    SH_GOTO(sim_model_get(s, &s->genesis_sha, &base, err));
    SH_GOTO(sh_learn_run(base, &pooled, &o, &learned, err));
    SH_GOTO(fold(s, &learned.update, &model, err));
    SH_GOTO(heldout_loss_of(s, model, &m->heldout_central, err));
cleanup:
    sh_snapshot_release(&pooled);
    sh_round_result_release(&learned);
    return status;
}

typedef struct {
    sim *s;
    double passes;
    uint32_t *nodes; /* which node stands for a topic */
    sh_snapshot *snapshots;
    sh_round_result *learned;
    sh_status *statuses;
    sh_error *errors;
} local_runs;

static void train_local(void *arg, size_t t)
{
    local_runs *l = arg;
    const sh_model *base = NULL;
    sh_learn_options o = baseline_options(l->s, l->passes);
    l->statuses[t] = sim_model_get(l->s, &l->s->genesis_sha, &base, &l->errors[t]);
    if (l->statuses[t] == SH_OK && l->snapshots[t].n_tokens)
        l->statuses[t] = sh_learn_run(base, &l->snapshots[t], &o, &l->learned[t], &l->errors[t]);
}

static sh_status local_models(sim *s, local_runs *l, double *out, sh_error *err)
{
    const sh_model *models[SIM_TOPICS_MAX] = {0};
    for (uint32_t i = 0; i < SH_MIN(s->n_nodes, s->texts.n_topics); i++)
        SH_TRY(read_snapshot(s, i, &l->snapshots[s->nodes[i].topic], err));
    sh_pool_for(s->pool, train_local, l, s->texts.n_topics);
    for (size_t t = 0; t < s->texts.n_topics; t++) {
        if (l->statuses[t] != SH_OK) {
            *err = l->errors[t];
            return l->statuses[t];
        }
        if (l->snapshots[t].n_tokens)
            SH_TRY(fold(s, &l->learned[t].update, &models[t], err));
    }
    return heldout_loss(s, models, out, err);
}

/* Each topic is scored by the model that its first node would have made alone; a liar learns
 * honestly, it only sends something else. */
static sh_status local_only(sim *s, sim_measures *m, sh_error *err)
{
    size_t n = s->texts.n_topics;
    local_runs l = {.s = s,
                    .passes = m->central_passes,
                    .snapshots = sh_calloc(n, sizeof *l.snapshots),
                    .learned = sh_calloc(n, sizeof *l.learned),
                    .statuses = sh_calloc(n, sizeof *l.statuses),
                    .errors = sh_calloc(n, sizeof *l.errors)};
    sh_status status = l.snapshots && l.learned && l.statuses && l.errors
                           ? local_models(s, &l, &m->heldout_local, err)
                           : sh_fail(err, SH_ERR_NO_MEMORY, "measure: no memory");
    for (size_t t = 0; t < n; t++) {
        if (l.snapshots)
            sh_snapshot_release(&l.snapshots[t]);
        if (l.learned)
            sh_round_result_release(&l.learned[t]);
    }
    free(l.snapshots);
    free(l.learned);
    free(l.statuses);
    free(l.errors);
    return status;
}

/* ---- acceptance ---- */

typedef struct {
    sim *s;
    const sh_model *model;
    bool before;
    uint64_t asked[SIM_TOPICS_MAX], accepted[SIM_TOPICS_MAX];
    sh_status statuses[SIM_TOPICS_MAX];
    sh_error errors[SIM_TOPICS_MAX];
} acceptance;

static void type_topic(void *arg, size_t t)
{
    acceptance *a = arg;
    sim *s = a->s;
    const sim_text_list *l =
        a->before ? &s->texts.before[SIM_HELDOUT] : &s->texts.topic[t][SIM_HELDOUT];
    for (size_t k = 0; k < ACCEPTANCE_TEXTS && a->statuses[t] == SH_OK; k++) {
        size_t i = a->before ? t * ACCEPTANCE_TEXTS + k : k;
        sim_typed typed = {0};
        if (i >= l->n)
            return;
        sim_typing typing = {.model = a->model,
                             .frozen = s->frozen,
                             .text = &l->texts[i],
                             .words_between = (uint32_t)s->options.words_between,
                             .seed = i};
        a->statuses[t] = sim_type_text(&typing, &typed, &a->errors[t]);
        a->asked[t] += typed.n;
        a->accepted[t] += typed.accepted;
        sim_typed_release(&typed);
    }
}

/* The same held-out texts, asked at the same words, whatever the model. */
static sh_status accept_rate(sim *s, const sh_model *model, bool before, double *out, sh_error *err)
{
    acceptance *a = sh_calloc(1, sizeof *a);
    if (!a)
        return sh_fail(err, SH_ERR_NO_MEMORY, "measure: no memory");
    uint64_t asked = 0, accepted = 0;
    sh_status status = SH_OK;
    a->s = s;
    a->model = model;
    a->before = before;
    sh_pool_for(s->pool, type_topic, a, s->texts.n_topics);
    for (size_t t = 0; t < s->texts.n_topics; t++) {
        if (a->statuses[t] != SH_OK) {
            *err = a->errors[t];
            SH_GOTO(a->statuses[t]);
        }
        asked += a->asked[t];
        accepted += a->accepted[t];
    }
    *out = (double)accepted / (double)SH_MAX(asked, 1);
cleanup:
    free(a);
    return status;
}

/* The released model with the highest version. */
static sh_status newest(void *arg, const sh_release_row *row)
{
    if (row->version)
        *(sh_hash *)arg = row->sha256;
    return SH_OK;
}

static sh_status final_model(sim *s, const sh_model **out, sh_error *err)
{
    sh_hash sha256 = s->genesis_sha;
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(s->coord_store, SH_TXN_READ, &txn, err));
    sh_status status = sh_coord_each_candidate(txn, newest, &sha256, err);
    sh_txn_abort(&txn);
    return status == SH_OK ? sim_model_get(s, &sha256, out, err) : status;
}

sh_status sim_measure(sim *s, sim_measures *out, sh_error *err)
{
    sim_measures m = {0};
    const sh_model *base = NULL, *final = NULL;
    SH_TRY(sim_model_get(s, &s->genesis_sha, &base, err));
    SH_TRY(final_model(s, &final, err));
    sim_progress_line(s, "measuring: held-out loss of base and final release");
    SH_TRY(heldout_loss_of(s, base, &m.heldout_base, err));
    SH_TRY(heldout_loss_of(s, final, &m.heldout_final, err));
    SH_TRY(accept_rate(s, base, true, &m.acceptance_before, err));
    SH_TRY(accept_rate(s, base, false, &m.acceptance_base, err));
    SH_TRY(accept_rate(s, final, false, &m.acceptance_end, err));
    if (!s->options.no_baselines) {
        SH_TRY(central(s, &m, err));
        sim_progress_line(s, "measuring: each node's LoRA alone, %u trainings",
                          (unsigned)SH_MIN(s->n_nodes, s->texts.n_topics));
        SH_TRY(local_only(s, &m, err));
    }
    m.done = true;
    *out = m;
    s->phase_wall_s[SIM_PHASE_MEASURE] = sim_wall_seconds() - s->wall_start_s;
    return SH_OK;
}
