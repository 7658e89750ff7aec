/*
 * A release on its way: manifest verified -> DOWNLOAD (chunks wanted) -> INSTALL (job: put together
 * in the inactive slot, hash, fsync) -> SMOKE (job: open, run) -> active -> confirmed after healthy
 * inferences, else back to the other slot. Each arrow is a transaction; create goes on where the
 * store says that the node was. The inactive slot is not written while the active release is
 * unconfirmed: it is what the node would fall back to.
 */
#include "edge-node/node_internal.h"

#include <math.h>

#include "shared/base/canary.h"

#define HASH_BYTES sizeof(sh_hash)

static bool is_refused(const sh_node *n, uint64_t version)
{
    for (unsigned i = 0; i < NODE_REFUSED_MAX; i++)
        if (n->state.refused[i] == version)
            return true;
    return false;
}

static void remember_refused(node_step *s, uint64_t version)
{
    node_state *st = &s->n->state;
    st->refused[st->refused_at] = version;
    st->refused_at = (st->refused_at + 1) % NODE_REFUSED_MAX;
    s->n->dirty = true;
    node_note(s, SH_NOTE_RELEASE_REFUSED, version);
}

static void stop_asking(node_step *s)
{
    sh_link_step link = node_link(s);
    sh_link_want_stop(&link);
}

static void take_none(node_step *s)
{
    sh_node *n = s->n;
    n->state.take = TAKE_NONE;
    n->take_job = 0;
    n->take_retry_ms = NODE_NEVER;
    n->dirty = true;
    stop_asking(s);
}

sh_status node_take_lost(node_step *s, const sh_blob *next)
{
    node_note(s, SH_NOTE_MANIFEST_LOST, s->n->state.taking.version);
    take_none(s);
    SH_TRY(node_manifest_del(s, node_meta_take));
    SH_TRY(node_chunks_sweep(s, next)); /* which were its own, nobody knows any more */
    node_checkin_soon(s);
    return SH_OK;
}

/* Forgets the release being taken and those of its chunks that `next` (may be NULL) and owed
 * updates do not share. */
static sh_status take_drop(node_step *s, const sh_blob *next)
{
    sh_node *n = s->n;
    sh_buf bytes = {0};
    sh_manifest manifest;
    sh_status status = SH_OK;
    if (n->state.take == TAKE_NONE)
        return SH_OK;
    status = node_manifest_take(s, &bytes, &manifest);
    if (status == SH_ERR_NOT_FOUND)
        status = node_take_lost(s, next);
    if (status != SH_OK || n->state.take == TAKE_NONE)
        goto cleanup;
    take_none(s);
    SH_GOTO(node_chunks_delete(s, &manifest.model, 0, next));
    SH_GOTO(node_manifest_del(s, node_meta_take));
cleanup:
    sh_buf_release(&bytes);
    return status;
}

sh_status node_on_manifest(node_step *s, sh_bytes bytes)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    sh_manifest manifest;
    sh_error local = {0};
    sh_status status = node_manifest_verify(n, bytes, &manifest, &local);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", local.text);
    if (status != SH_OK) {
        node_note(s, SH_NOTE_RELEASE_REFUSED, 0);
        return status == SH_ERR_AUTH ? status : SH_ERR_INVALID;
    }
    uint64_t version = manifest.version;
    if (version < node_active(n)->version && !SH_CANARY(OLD_MANIFEST)) {
        node_note(s, SH_NOTE_RELEASE_REFUSED, version); /* no way back but by a newer version */
        return SH_OK;
    }
    if (version == node_active(n)->version || is_refused(n, version))
        return SH_OK;
    if (st->take != TAKE_NONE && version <= st->taking.version)
        return SH_OK;
    if (st->take == TAKE_INSTALL || st->take == TAKE_SMOKE)
        return SH_OK; /* that one is all but there; the next plan brings this one again */
    if (manifest.model.bytes == 0 || version > UINT32_MAX) { /* records have 32 bits for it */
        remember_refused(s, version);
        return SH_OK;
    }
    SH_TRY(take_drop(s, &manifest.model));
    if (!sh_hash_equal(&st->candidate.sha256, &manifest.model.sha256))
        SH_TRY(node_candidate_drop(s, &manifest.model)); /* another release than it has come */
    SH_TRY(node_manifest_put(s, node_meta_take, bytes));
    st->take = TAKE_DOWNLOAD;
    st->take_tries = 0;
    st->taking = (node_release){version, manifest.model.sha256, manifest.model.bytes};
    n->dirty = true;
    sh_link_step link = node_link(s);
    sh_link_want(&link);
    return node_take_advance(s); /* every chunk may be here already */
}

/* ---- chunks down ---- */

sh_status node_missing(node_step *s, uint8_t *hashes, uint32_t max, uint32_t *missing)
{
    sh_node *n = s->n;
    sh_buf bytes = {0};
    sh_status status = SH_OK;
    *missing = 0;
    if (n->state.take == TAKE_DOWNLOAD) {
        sh_manifest manifest;
        status = node_manifest_take(s, &bytes, &manifest);
        if (status == SH_OK)
            status = sh_blob_missing(s->txn, SH_NODE_T_CHUNK, &manifest.model, hashes, max, missing,
                                     s->err);
        else if (status == SH_ERR_NOT_FOUND)
            status = node_take_lost(s, NULL);
        if (status != SH_OK)
            goto cleanup;
    }
    if (*missing == 0 && n->evaluate && n->evaluate_job == 0) {
        sh_evaluate_plan plan;
        sh_buf_release(&bytes);
        SH_GOTO(node_candidate_load(s, &bytes, &plan));
        SH_GOTO(
            sh_blob_missing(s->txn, SH_NODE_T_CHUNK, &plan.model, hashes, max, missing, s->err));
    }
cleanup: /* a whole release waits for the active one's confirmation: nothing is missing */
    sh_buf_release(&bytes);
    return status;
}

/* ---- jobs ---- */

static sh_status start_job(node_step *s, sh_node_job_kind kind, const sh_blob *blob)
{
    sh_node *n = s->n;
    sh_buf hashes;
    sh_buf_init(&hashes, SH_BLOB_CHUNKS_MAX * HASH_BYTES);
    if (blob != NULL &&
        sh_buf_append(&hashes, blob->chunk_hashes, blob->n_chunks * HASH_BYTES) != SH_OK)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: a job's %u chunks", blob->n_chunks);
    sh_node_action *action = node_act(s, SH_NODE_START_JOB);
    SH_ASSERT(action != NULL);
    n->take_job = n->state.next_job++;
    n->dirty = true;
    action->job = (sh_node_job){
        .id = n->take_job,
        .kind = kind,
        .version = n->state.taking.version,
        .slot = 1 - n->state.active_slot,
    };
    action->job_chunks = hashes;
    if (blob != NULL) {
        action->job.blob = *blob;
        action->job.blob.chunk_hashes = hashes.data;
    }
    return SH_OK;
}

sh_status node_take_advance(node_step *s)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    sh_buf bytes = {0};
    sh_manifest manifest;
    sh_status status = SH_OK;
    if (st->take == TAKE_NONE || n->take_job != 0 || n->take_retry_ms != NODE_NEVER)
        return SH_OK;
    if (st->confirmed_version != node_active(n)->version)
        return SH_OK; /* judge_health comes back here */
    if (st->take == TAKE_SMOKE)
        return start_job(s, SH_JOB_SMOKE, NULL);
    status = node_manifest_take(s, &bytes, &manifest);
    if (status == SH_ERR_NOT_FOUND)
        status = node_take_lost(s, NULL);
    if (status != SH_OK || st->take == TAKE_NONE)
        goto cleanup;
    if (st->take == TAKE_DOWNLOAD) {
        uint8_t one[HASH_BYTES];
        uint32_t missing;
        SH_GOTO(
            sh_blob_missing(s->txn, SH_NODE_T_CHUNK, &manifest.model, one, 1, &missing, s->err));
        if (missing > 0)
            goto cleanup;
        st->take = TAKE_INSTALL;
        n->dirty = true;
        stop_asking(s);
    }
    status = start_job(s, SH_JOB_INSTALL, &manifest.model);
cleanup:
    sh_buf_release(&bytes);
    return status;
}

static bool is_final(sh_status status)
{
    return status == SH_ERR_CORRUPT || status == SH_ERR_INVALID || status == SH_ERR_MISMATCH ||
           status == SH_ERR_UNSUPPORTED || status == SH_ERR_AUTH || status == SH_ERR_LIMIT;
}

static sh_status refuse_taking(node_step *s)
{
    remember_refused(s, s->n->state.taking.version);
    SH_TRY(take_drop(s, NULL));
    if (sh_hash_equal(&s->n->state.candidate.sha256, &s->n->state.taking.sha256))
        SH_TRY(node_candidate_drop(s, NULL));
    node_checkin_soon(s);
    return SH_OK;
}

sh_status node_take_done(node_step *s, const sh_node_job_result *result)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    bool smoke = st->take == TAKE_SMOKE;
    n->take_job = 0;
    n->dirty = true;
    if (result->status != SH_OK) {
        node_note(s, SH_NOTE_JOB_FAILED, (uint64_t)result->status);
        st->take_tries++;
        if (is_final(result->status) || st->take_tries >= NODE_JOB_TRIES_MAX)
            return refuse_taking(s);
        sh_retry again = {.attempt = st->take_tries};
        sh_link_step link = node_link(s);
        sh_link_arm(&link, &again);
        n->take_retry_ms = again.due_ms;
        return SH_OK;
    }
    if (!smoke) {
        st->take = TAKE_SMOKE;
        return node_take_advance(s);
    }
    if (!isfinite(result->nll) || result->nll > NODE_HEALTHY_NLL_MAX)
        return refuse_taking(s);
    return node_activate(s);
}

/* ---- active, confirmed, back ---- */

static void tell_active(node_step *s)
{
    sh_node *n = s->n;
    sh_node_action *action = node_act(s, SH_NODE_ACTIVATE);
    SH_ASSERT(action != NULL);
    action->version = node_active(n)->version;
    action->slot = n->state.active_slot;
    node_monitor_release(s);
    node_checkin_soon(s);
}

sh_status node_activate(node_step *s)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    uint32_t slot = 1 - st->active_slot;
    sh_buf bytes = {0};
    sh_manifest manifest;
    sh_status status = SH_OK;
    status = node_manifest_take(s, &bytes, &manifest);
    if (status == SH_ERR_NOT_FOUND)
        status = node_take_lost(s, NULL);
    if (status != SH_OK || st->take == TAKE_NONE)
        goto cleanup;
    SH_GOTO(node_manifest_put(s, slot == 0 ? node_meta_slot0 : node_meta_slot1,
                              (sh_bytes){bytes.data, bytes.len}));
    st->slots[slot] = st->taking;
    st->active_slot = slot;
    st->healthy = 0;
    SH_GOTO(take_drop(s, NULL));
    SH_GOTO(node_candidate_drop(s, NULL)); /* it is this one, or its parent is no more */
    tell_active(s);
    node_note(s, SH_NOTE_RELEASE_ACTIVE, node_active(n)->version);
    if (n->options.confirm_inferences == 0) {
        st->confirmed_version = node_active(n)->version;
        node_note(s, SH_NOTE_RELEASE_CONFIRMED, st->confirmed_version);
    }
    SH_GOTO(node_train_consider(s));
cleanup:
    sh_buf_release(&bytes);
    return status;
}

static sh_status fall_back(node_step *s)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    uint32_t other = 1 - st->active_slot;
    SH_ASSERT(st->slots[other].version != 0); /* genesis begins confirmed */
    remember_refused(s, node_active(n)->version);
    if (n->train_job != 0 && n->training.base_version == node_active(n)->version)
        node_train_cancel(s);
    SH_TRY(node_candidate_drop(s, NULL));
    st->slots[st->active_slot] = (node_release){0};
    SH_TRY(node_manifest_del(s, st->active_slot == 0 ? node_meta_slot0 : node_meta_slot1));
    st->active_slot = other;
    st->confirmed_version = node_active(n)->version; /* it was, before */
    st->healthy = 0;
    tell_active(s);
    return node_take_advance(s);
}

sh_status node_judge_health(node_step *s, const sh_record *record)
{
    sh_node *n = s->n;
    node_state *st = &n->state;
    uint64_t version = node_active(n)->version;
    if (st->confirmed_version == version || record->release_version != version)
        return SH_OK;
    bool healthy = isfinite(record->prompt_nll) && record->prompt_nll <= NODE_HEALTHY_NLL_MAX &&
                   isfinite(record->mean_logprob) && isfinite(record->least_logprob) &&
                   isfinite(record->mean_entropy);
    n->dirty = true;
    if (!healthy)
        return fall_back(s);
    if (++st->healthy < n->options.confirm_inferences)
        return SH_OK;
    st->confirmed_version = version;
    node_note(s, SH_NOTE_RELEASE_CONFIRMED, version);
    node_checkin_soon(s);
    return node_take_advance(s);
}
