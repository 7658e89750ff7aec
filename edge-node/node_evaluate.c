/*
 * Federated evaluation. A plan names a candidate; its chunks come like a release's and after them,
 * the job scores it beside the active release on the node's own held-out feedback, and the sums go
 * out as an item. The plan is volatile, as one to train is: after a crash the next one brings it
 * again. What is on disk of a candidate is in the state, so that its chunks are not forgotten: they
 * stay for the release that it may become, and go when another candidate or release comes.
 */
#include "edge-node/node_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

sh_status node_candidate_drop(node_step *s, const sh_blob *next)
{
    sh_node *n = s->n;
    sh_buf hashes = {0};
    sh_evaluate_plan plan;
    sh_status status = SH_OK;
    if (n->state.candidate.version == 0)
        return SH_OK;
    node_evaluate_stop(s);
    SH_GOTO(node_candidate_load(s, &hashes, &plan));
    n->state.candidate = (node_release){0};
    n->dirty = true;
    SH_GOTO(node_chunks_delete(s, &plan.model, 0, next));
    SH_GOTO(node_candidate_del(s));
cleanup:
    sh_buf_release(&hashes);
    return status;
}

void node_evaluate_stop(node_step *s)
{
    sh_node *n = s->n;
    n->evaluate = false;
    if (n->evaluate_job == 0)
        return;
    sh_node_action *action = node_act(s, SH_NODE_CANCEL_JOB);
    SH_ASSERT(action != NULL);
    action->job.id = n->evaluate_job;
    action->job.kind = SH_JOB_EVALUATE;
    n->evaluate_job = 0;
}

static int by_slice(const void *a, const void *b)
{
    const sh_slice_score *x = a, *y = b;
    return x->slice < y->slice ? -1 : x->slice > y->slice;
}

static sh_status answer(node_step *s, const sh_evaluate_plan *plan, const sh_slice_score *slices,
                        uint32_t n_slices)
{
    sh_node *n = s->n;
    sh_evaluation evaluation = {
        .candidate = plan->candidate,
        .parent_version = plan->parent_version,
        .candidate_sha256 = plan->model.sha256,
        .n = n_slices,
    };
    for (uint32_t i = 0; i < n_slices; i++)
        evaluation.slices[i] = slices[i];
    qsort(evaluation.slices, n_slices, sizeof(evaluation.slices[0]), by_slice);
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    sh_status status = sh_evaluation_encode(&evaluation, &payload, s->err);
    if (status == SH_OK)
        status = node_outbox_put(s, SH_CLASS_ALARM, SH_ITEM_EVALUATION,
                                 (sh_bytes){payload.data, payload.len});
    sh_buf_release(&payload);
    if (status != SH_OK)
        return status;
    n->evaluate = false;
    n->state.evaluated = plan->candidate;
    n->state.evaluate_tries = 0;
    n->dirty = true;
    node_note(s, SH_NOTE_EVALUATED, plan->candidate);
    return SH_OK;
}

static bool is_for_us(const sh_node *n, const sh_evaluate_plan *plan)
{
    const node_release *active = node_active(n);
    return n->options.evaluate && plan->candidate != 0 && plan->model.bytes > 0 &&
           plan->parent_version == active->version && plan->candidate > n->state.evaluated &&
           !n->state.erasing;
}

sh_status node_on_evaluate_plan(node_step *s, const sh_evaluate_plan *plan)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    n->evaluate = false;
    if (!is_for_us(n, plan))
        return SH_OK;
    if (st->feedback_tokens < n->options.evaluate_tokens_min || st->feedback_tokens == 0)
        return answer(s, plan, NULL, 0);
    bool same = st->candidate.version == plan->candidate &&
                sh_hash_equal(&st->candidate.sha256, &plan->model.sha256);
    if (!same) {
        SH_TRY(node_candidate_drop(s, &plan->model));
        SH_TRY(node_candidate_put(s, plan));
        st->candidate = (node_release){plan->candidate, plan->model.sha256, plan->model.bytes};
        st->evaluate_tries = 0;
        n->dirty = true;
    }
    n->evaluate = true;
    return node_evaluate_advance(s);
}

static sh_status start_job(node_step *s, const sh_evaluate_plan *plan, sh_buf *hashes)
{
    sh_node *n = s->n;
    sh_node_action *action = node_act(s, SH_NODE_START_JOB);
    if (action == NULL)
        return SH_OK; /* the next plan asks again */
    n->evaluate_job = n->state.next_job++;
    n->dirty = true;
    action->job = (sh_node_job){
        .id = n->evaluate_job,
        .kind = SH_JOB_EVALUATE,
        .version = plan->parent_version,
        .slot = n->state.active_slot,
        .blob = plan->model,
        .candidate = plan->candidate,
    };
    action->job_chunks = *hashes; /* moved */
    *hashes = (sh_buf){0};
    return SH_OK;
}

sh_status node_evaluate_advance(node_step *s)
{
    sh_node *n = s->n;
    sh_buf hashes = {0};
    sh_evaluate_plan plan;
    uint8_t one[sizeof(sh_hash)];
    uint32_t missing;
    sh_status status = SH_OK;
    if (!n->evaluate || n->evaluate_job != 0)
        return SH_OK;
    SH_GOTO(node_candidate_load(s, &hashes, &plan));
    SH_GOTO(sh_blob_missing(s->txn, SH_NODE_T_CHUNK, &plan.model, one, 1, &missing, s->err));
    if (missing == 0 && node_policy_holds(n, SH_POLICY_TRAIN))
        status = start_job(s, &plan, &hashes);
    else if (missing > 0 && n->link.want.due_ms == NODE_NEVER) {
        sh_link_step link = node_link(s);
        sh_link_want(&link);
    }
cleanup:
    sh_buf_release(&hashes);
    return status;
}

/* Slices that say something, in `out`. False: they are no scores. */
static bool sound_slices(const sh_node_job_result *result, sh_slice_score *out, uint32_t *n)
{
    unsigned seen = 0;
    *n = 0;
    if (result->n_slices > SH_EVALUATION_SLICES_MAX)
        return false;
    for (uint32_t i = 0; i < result->n_slices; i++) {
        const sh_slice_score *slice = &result->slices[i];
        if (slice->slice >= SH_SLICES || (seen >> slice->slice & 1) ||
            !isfinite(slice->nll_parent) || !isfinite(slice->nll_candidate))
            return false;
        seen |= 1u << slice->slice;
        if (slice->tokens > 0)
            out[(*n)++] = *slice;
    }
    return true;
}

sh_status node_evaluate_done(node_step *s, const sh_node_job_result *result)
{
    sh_node *n = s->n;
    sh_buf hashes = {0};
    sh_evaluate_plan plan;
    sh_slice_score slices[SH_EVALUATION_SLICES_MAX];
    uint32_t n_slices = 0;
    sh_status status = SH_OK;
    n->evaluate_job = 0;
    n->dirty = true;
    bool good = result->status == SH_OK && sound_slices(result, slices, &n_slices);
    if (!good) {
        sh_status code = result->status != SH_OK ? result->status : SH_ERR_INVALID;
        node_note(s, SH_NOTE_JOB_FAILED, (uint64_t)code);
        n->evaluate = false; /* the next plan asks again */
        if (++n->state.evaluate_tries < NODE_JOB_TRIES_MAX)
            return SH_OK;
        n_slices = 0; /* it will never have anything to say */
    }
    SH_GOTO(node_candidate_load(s, &hashes, &plan));
    status = answer(s, &plan, slices, n_slices);
cleanup:
    sh_buf_release(&hashes);
    return status;
}
