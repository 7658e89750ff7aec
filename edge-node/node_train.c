/*
 * Training. A plan asks for one update a round against a stated base; the job runs beside the core
 * and a crash costs only its own progress: it is the next plan that starts it again. A running job
 * is allowed to finish on an older base; the update says which.
 */
#include "edge-node/node_internal.h"

#include <math.h>
#include <stdlib.h>

#include "trainer/snapshot.h"

void node_on_train_plan(node_step *s, const sh_train_plan *plan)
{
    s->n->plan = *plan;
}

static sh_status count_trainable(void *arg, const sh_feedback *row)
{
    if (row->target && !sh_snapshot_is_heldout(row->session))
        *(uint64_t *)arg += row->n;
    return SH_OK;
}

/* Whether the feedback that is not held out suffices. It is only counted when all of it would. */
static sh_status has_enough(node_step *s, uint32_t tokens_min, bool *out)
{
    uint64_t n = 0;
    if (s->n->state.feedback_tokens >= SH_MAX(tokens_min, 1))
        SH_TRY(sh_node_each_feedback(s->txn, count_trainable, &n, s->err));
    *out = n >= SH_MAX(tokens_min, 1);
    return SH_OK;
}

sh_status node_train_consider(node_step *s)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    const sh_train_plan *plan = &n->plan;
    const node_release *active = node_active(n);
    if (!plan->train || n->train_job != 0 || st->erasing || plan->round <= st->trained_round ||
        !node_policy_holds(n, SH_POLICY_TRAIN))
        return SH_OK;
    /* A base that is not here yet comes as a release; its activation comes back here. */
    if (plan->base_version != active->version ||
        !sh_hash_equal(&plan->base_sha256, &active->sha256))
        return SH_OK;
    if (st->try_round == plan->round && st->tries >= NODE_JOB_TRIES_MAX)
        return SH_OK;
    bool enough = false;
    SH_TRY(has_enough(s, plan->tokens_min, &enough));
    sh_node_action *action = enough ? node_act(s, SH_NODE_START_JOB) : NULL;
    if (action == NULL)
        return SH_OK;
    st->tries = st->try_round == plan->round ? st->tries + 1 : 1;
    st->try_round = plan->round;
    n->training = *plan;
    n->train_job = st->next_job++;
    n->plan.train = false;
    n->dirty = true;
    action->job = (sh_node_job){
        .id = n->train_job,
        .kind = SH_JOB_TRAIN,
        .train = n->training,
        .version = active->version,
        .slot = st->active_slot,
    };
    node_note(s, SH_NOTE_TRAIN_STARTED, plan->round);
    return SH_OK;
}

void node_train_cancel(node_step *s)
{
    sh_node_action *action = node_act(s, SH_NODE_CANCEL_JOB);
    SH_ASSERT(action != NULL);
    action->job.id = s->n->train_job;
    action->job.kind = SH_JOB_TRAIN;
    s->n->train_job = 0;
}

static sh_status put_update(node_step *s, const sh_node_job_result *result)
{
    const sh_train_plan *plan = &s->n->training;
    sh_update_meta meta = {
        .round = plan->round,
        .base_version = plan->base_version,
        .base_sha256 = plan->base_sha256,
        .a_seed = plan->a_seed,
        .rank = plan->rank,
        .alpha = plan->alpha,
        .samples = result->samples,
        .tokens_seen = result->tokens_seen,
        .heldout_before = result->heldout_before,
        .heldout_after = result->heldout_after,
    };
    uint8_t *hashes = NULL;
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    sh_status status = SH_OK;
    SH_GOTO(sh_blob_describe(result->update.data, result->update.n, &meta.blob, &hashes, s->err));
    SH_GOTO(sh_blob_put(s->txn, SH_NODE_T_CHUNK, result->update.data, result->update.n, s->err));
    SH_GOTO(sh_update_meta_encode(&meta, &payload, s->err));
    SH_GOTO(
        node_outbox_put(s, SH_CLASS_UPDATE, SH_ITEM_UPDATE, (sh_bytes){payload.data, payload.len}));
cleanup:
    sh_buf_release(&payload);
    free(hashes);
    return status;
}

/* What the job brought can be an update at all. */
static bool is_sound(const sh_node_job_result *result)
{
    return result->update.n > 0 &&
           result->update.n <= (size_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES &&
           isfinite(result->heldout_before) && isfinite(result->heldout_after);
}

sh_status node_train_done(node_step *s, const sh_node_job_result *result)
{
    sh_node *n = s->n;
    n->train_job = 0;
    n->dirty = true;
    if (result->status != SH_OK || !is_sound(result)) {
        sh_status code = result->status != SH_OK ? result->status : SH_ERR_INVALID;
        node_note(s, SH_NOTE_JOB_FAILED, (uint64_t)code);
        node_checkin_soon(s);
        return SH_OK;
    }
    n->state.trained_round = SH_MAX(n->state.trained_round, n->training.round);
    bool better = result->heldout_after < result->heldout_before;
    if (!better && n->options.send_only_if_better) {
        node_note(s, SH_NOTE_UPDATE_NOT_BETTER, n->training.round);
    } else {
        SH_TRY(put_update(s, result));
        n->state.updates_made++;
        node_note(s, SH_NOTE_UPDATE_MADE, n->training.round);
    }
    node_checkin_soon(s);
    return node_train_consider(s); /* a newer plan may have come meanwhile */
}
