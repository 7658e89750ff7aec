/*
 * Rounds: complete updates are buffered; enough of them are merged by a job, the candidate is gated
 * by another and, if so configured, evaluated by nodes (coordinator_canary.c), and one transaction
 * decides: candidate row, release, and the verdict of every update that was in. Until then the rows
 * are pending, so that a crash at any point merges the same inputs again and counts none twice.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

static sh_status no_memory(coord_step *s)
{
    return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a merge");
}

/* ---- the buffer ---- */

sh_status coord_base_reason(coord_step *s, const sh_update_meta *meta, sh_reason *reason)
{
    const coord_state *state = &s->c->state;
    uint64_t version = state->version;
    *reason = SH_REASON_NONE;
    if (s->c->relay != NULL) /* its parent knows all releases, and says so of what goes up */
        return SH_OK;
    *reason = SH_REASON_BASE;
    if (meta->base_version == 0 || meta->base_version > version)
        return SH_OK;
    uint64_t behind = 0;
    SH_TRY(coord_releases_since(s->txn, meta->base_version,
                                (uint64_t)s->c->options.staleness_max + 1, &behind, s->err));
    if (behind > s->c->options.staleness_max) {
        *reason = SH_REASON_STALE;
        return SH_OK;
    }
    /* Down the line of parents: a release that was rolled back is not on it, and neither is one
     * that a restored backup does not know. At most staleness_max steps, because versions fall. */
    for (;;) {
        uint64_t candidate = 0;
        sh_slice manifest = {0};
        sh_release_row row;
        if (coord_manifest_get(s->txn, version, &candidate, &manifest, s->err) != SH_OK)
            return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: a release has no row");
        SH_TRY(coord_candidate_row_get(s->txn, candidate, &row, s->err));
        free(row.merged);
        if (version == meta->base_version) {
            if (sh_hash_equal(&row.sha256, &meta->base_sha256))
                *reason = SH_REASON_NONE;
            return SH_OK;
        }
        if (row.parent >= version || row.parent < meta->base_version)
            return SH_OK;
        version = row.parent;
    }
}

static void count_refused(coord_step *s, const sh_update_id *id, sh_reason reason)
{
    s->c->state.updates_refused[reason]++;
    s->c->dirty = true;
    coord_note(s, SH_CNOTE_UPDATE_REFUSED, &id->node, (uint64_t)reason);
}

sh_status coord_refuse(coord_step *s, const sh_update_id *id, sh_bytes meta_bytes, sh_reason reason)
{
    sh_update_row row = {.id = *id, .verdict = SH_VERDICT_REFUSED, .reason = reason};
    SH_TRY(coord_update_put(s->txn, &row, meta_bytes, s->err));
    s->c->state.updates_in++;
    count_refused(s, id, reason);
    return SH_OK;
}

sh_status coord_take(coord_step *s, const sh_update_id *id, sh_bytes meta_bytes)
{
    sh_coord *c = s->c;
    sh_update_row row = {.id = *id, .verdict = SH_VERDICT_PENDING};
    SH_TRY(sh_update_meta_decode(meta_bytes.data, meta_bytes.n, &row.meta, s->err));
    SH_TRY(coord_chunks_hold(c, row.meta.blob.chunk_hashes, row.meta.blob.n_chunks, s->err));
    SH_TRY(coord_update_put(s->txn, &row, meta_bytes, s->err));
    SH_TRY(coord_parts_mark(s, &row.meta));
    if (sh_array_reserve((void **)&c->pending, &c->pending_cap, c->n_pending + 1,
                         sizeof *c->pending, SH_COORD_BUFFER_MAX) != SH_OK)
        return no_memory(s);
    size_t at = c->n_pending;
    while (at > 0 && coord_id_compare(&c->pending[at - 1], id) > 0)
        at--;
    memmove(&c->pending[at + 1], &c->pending[at], (c->n_pending - at) * sizeof *c->pending);
    c->pending[at] = *id;
    c->n_pending++;
    c->parts += coord_parts_of(&row.meta);
    c->state.held = false;
    c->state.updates_in++;
    c->dirty = true;
    coord_note(s, SH_CNOTE_UPDATE_IN, &id->node, c->n_pending);
    return SH_OK;
}

/* Writes a pending row's verdict and takes it out of the buffer; its chunks' names go to `names`.
 */
static sh_status decide(coord_step *s, const sh_update_row *decision, sh_buf *names)
{
    sh_coord *c = s->c;
    sh_update_row row;
    SH_TRY(coord_update_get(s->txn, &decision->id, &row, s->err));
    const sh_blob *blob = &row.meta.blob;
    uint32_t parts = coord_parts_of(&row.meta);
    if (blob->n_chunks > 0 &&
        sh_buf_append(names, blob->chunk_hashes, blob->n_chunks * sizeof(sh_hash)) != SH_OK)
        return no_memory(s);
    SH_TRY(coord_update_set(s->txn, decision, s->err));
    sh_update_id *at =
        bsearch(&decision->id, c->pending, c->n_pending, sizeof *c->pending, coord_id_compare);
    SH_ASSERT(at != NULL);
    size_t after = c->n_pending - (size_t)(at - c->pending) - 1;
    memmove(at, at + 1, after * sizeof *at);
    c->n_pending--;
    c->parts -= parts;
    if (decision->verdict != SH_VERDICT_REFUSED) {
        c->state.updates_merged++;
        c->dirty = true;
    } else {
        count_refused(s, &decision->id, decision->reason);
    }
    return SH_OK;
}

/* What was decided holds its chunks no more. */
static sh_status drop(coord_step *s, sh_buf *names, sh_status status)
{
    if (status == SH_OK && names->len > 0)
        status = coord_chunks_drop(s, names->data, names->len / sizeof(sh_hash));
    sh_buf_release(names);
    return status;
}

/* Refuses the buffered updates that pick gives a reason for. */
static sh_status refuse_some(coord_step *s,
                             sh_status (*pick)(coord_step *s, const sh_update_row *row,
                                               const void *arg, sh_reason *reason),
                             const void *arg)
{
    sh_coord *c = s->c;
    sh_status status = SH_OK;
    sh_buf names;
    sh_buf_init(&names, SIZE_MAX);
    for (size_t i = c->n_pending; i-- > 0;) {
        sh_update_row row;
        sh_reason reason = SH_REASON_NONE;
        SH_GOTO(coord_update_get(s->txn, &c->pending[i], &row, s->err));
        SH_GOTO(pick(s, &row, arg, &reason));
        if (reason == SH_REASON_NONE)
            continue;
        row.verdict = SH_VERDICT_REFUSED;
        row.reason = reason;
        SH_GOTO(decide(s, &row, &names));
    }
cleanup:
    return drop(s, &names, status);
}

static sh_status pick_unfit(coord_step *s, const sh_update_row *row, const void *arg,
                            sh_reason *reason)
{
    (void)arg;
    return coord_base_reason(s, &row->meta, reason);
}

static sh_status pick_all(coord_step *s, const sh_update_row *row, const void *arg,
                          sh_reason *reason)
{
    (void)s, (void)row;
    *reason = *(const sh_reason *)arg;
    return SH_OK;
}

typedef struct {
    sh_hash node;
    sh_reason reason;
} of_node;

static sh_status pick_node(coord_step *s, const sh_update_row *row, const void *arg,
                           sh_reason *reason)
{
    (void)s;
    const of_node *of = arg;
    if (sh_hash_equal(&row->id.node, &of->node))
        *reason = of->reason;
    return SH_OK;
}

sh_status coord_refuse_node(coord_step *s, const sh_hash *node, sh_reason reason)
{
    of_node of = {.node = *node, .reason = reason};
    const coord_candidate *candidate = &s->c->candidate;
    for (uint32_t i = 0; i < candidate->n_inputs; i++)
        if (sh_hash_equal(&candidate->inputs[i].id.node, node)) {
            SH_TRY(coord_abandon(s)); /* the merge under way has it */
            break;
        }
    return refuse_some(s, pick_node, &of);
}

/* ---- merge ---- */

/* Weights: samples, of which coord_parts_cap says how many count, discounted by staleness. A relay
 * leaves the discount to its parent: all that it merges together is of one base. */
static sh_status make_inputs(coord_step *s, const sh_update_id *ids, size_t n,
                             sh_merge_input *inputs)
{
    sh_coord *c = s->c;
    uint64_t cap = 0;
    SH_TRY(coord_parts_cap(s, ids, n, &cap));
    for (size_t i = 0; i < n; i++) {
        sh_update_row row;
        uint64_t behind = 0;
        SH_TRY(coord_update_get(s->txn, &ids[i], &row, s->err));
        inputs[i] = (sh_merge_input){.id = row.id,
                                     .sha256 = row.meta.blob.sha256,
                                     .weight = (double)coord_parts_samples(&row.id, &row.meta, cap),
                                     .relayed = row.meta.parts.n > 0};
        if (c->relay == NULL)
            SH_TRY(coord_releases_since(s->txn, row.meta.base_version,
                                        (uint64_t)c->options.staleness_max + 1, &behind, s->err));
        inputs[i].weight *= pow((double)c->options.staleness_discount, (double)behind);
    }
    return SH_OK;
}

sh_status coord_begin_merge(coord_step *s, const sh_update_id *ids, size_t n)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    SH_ASSERT(candidate->inputs == NULL && n > 0);
    candidate->inputs = sh_calloc(n, sizeof *candidate->inputs);
    if (candidate->inputs == NULL)
        return no_memory(s);
    candidate->n_inputs = (uint32_t)n;
    SH_TRY(make_inputs(s, ids, n, candidate->inputs));
    candidate->number = c->state.next_candidate++;
    candidate->parent_version = c->state.version;
    candidate->scale = c->state.server_scale;
    SH_TRY(coord_candidate_save(s));
    c->state.phase = PHASE_MERGING;
    c->dirty = true;
    SH_TRY(coord_audit(s, "merge candidate=%llu parent=%llu updates=%u scale=%.9g",
                       (unsigned long long)candidate->number, (unsigned long long)c->state.version,
                       candidate->n_inputs, (double)candidate->scale));
    coord_note(s, SH_CNOTE_MERGE_STARTED, NULL, candidate->number);
    return coord_start_job(s);
}

sh_status coord_advance(coord_step *s)
{
    sh_coord *c = s->c;
    coord_state *state = &c->state;
    if (state->phase != PHASE_IDLE || state->closed || (state->paused && !state->closing))
        return SH_OK;
    if (c->relay != NULL)
        return coord_relay_advance(s);
    if (state->held && !state->closing) {
        if (state->held_until_ms == 0)
            return SH_OK;
        if (s->now_ms < state->held_until_ms)
            return coord_set_timer(s, state->held_until_ms);
        state->held = false;
        c->dirty = true;
    }
    size_t need = c->options.buffer;
    if (state
            ->closing) /* what nodes could not tell the worth of is not merged at the last moment */
        need = state->held ? SIZE_MAX : SH_MIN(need, (size_t)2);
    if (c->parts >= need)
        SH_TRY(refuse_some(s, pick_unfit, NULL)); /* they may have grown stale while they waited */
    if (c->parts >= need)
        return coord_begin_merge(s, c->pending, c->n_pending);
    if (!state->closing)
        return SH_OK;
    sh_reason reason = SH_REASON_CLOSED;
    SH_TRY(refuse_some(s, pick_all, &reason));
    state->closed = true;
    c->dirty = true;
    coord_note(s, SH_CNOTE_CLOSED, NULL, state->version);
    return coord_audit(s, "closed version=%llu", (unsigned long long)state->version);
}

sh_status coord_abandon(coord_step *s)
{
    sh_coord *c = s->c;
    if (c->state.phase == PHASE_IDLE)
        return SH_OK;
    SH_TRY(coord_audit(s, "abandoned candidate=%llu", (unsigned long long)c->candidate.number));
    SH_TRY(coord_canary_forget(s, NULL));
    SH_TRY(coord_candidate_drop(s));
    c->state.phase = PHASE_IDLE;
    c->job_id = 0;
    c->retry_at_ms = 0;
    c->retries = 0;
    c->dirty = true;
    return SH_OK;
}

sh_status coord_decide_inputs(coord_step *s, uint64_t version)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    sh_status status = SH_OK;
    sh_buf names;
    sh_buf_init(&names, SIZE_MAX);
    for (uint32_t i = 0; i < candidate->n_inputs; i++) {
        const sh_merge_input *in = &candidate->inputs[i];
        sh_update_row row = {.id = in->id,
                             .verdict = SH_VERDICT_REFUSED,
                             .reason = in->reason,
                             .candidate = candidate->number,
                             .norm = in->norm,
                             .cosine = in->cosine};
        if (in->reason == SH_REASON_NONE && version != 0) {
            row.verdict = c->relay == NULL ? SH_VERDICT_MERGED : SH_VERDICT_RELAYED;
            row.version = version;
        } else if (in->reason == SH_REASON_NONE) {
            row.reason = SH_REASON_GATE;
        }
        SH_GOTO(decide(s, &row, &names));
    }
cleanup:
    return drop(s, &names, status);
}

sh_status coord_end_round(coord_step *s)
{
    sh_coord *c = s->c;
    SH_TRY(coord_canary_forget(s, NULL));
    SH_TRY(coord_candidate_drop(s));
    c->state.phase = PHASE_IDLE;
    if (c->relay == NULL) { /* a relay's round is its parent's */
        c->state.round++;
        c->state.round_at_ms = s->now_ms;
    }
    c->retries = 0;
    c->dirty = true;
    return coord_advance(s);
}

bool coord_take_verdicts(coord_candidate *candidate, const sh_coord_job_result *result,
                         uint32_t *good)
{
    if (result->n_inputs != candidate->n_inputs)
        return false;
    for (uint32_t i = 0; i < candidate->n_inputs; i++)
        if (coord_id_compare(&result->inputs[i].id, &candidate->inputs[i].id) != 0 ||
            (unsigned)result->inputs[i].reason >= SH_REASONS)
            return false;
    *good = 0;
    for (uint32_t i = 0; i < candidate->n_inputs; i++) {
        sh_merge_input *in = &candidate->inputs[i];
        in->norm = result->inputs[i].norm;
        in->cosine = result->inputs[i].cosine;
        in->reason = result->inputs[i].reason;
        *good += in->reason == SH_REASON_NONE;
    }
    return true;
}

sh_status coord_job_failed(coord_step *s, sh_status why, const char *text)
{
    sh_coord *c = s->c;
    coord_note(s, SH_CNOTE_JOB_FAILED, NULL, (uint64_t)why);
    if (c->state.phase == PHASE_GATING && (why == SH_ERR_NOT_FOUND || why == SH_ERR_CORRUPT)) {
        c->state.phase = PHASE_MERGING; /* the candidate's files are gone: make them again */
        c->dirty = true;
        SH_TRY(coord_candidate_drop_chunks(s));
        SH_TRY(coord_candidate_save(s));
    }
    uint64_t wait_ms = (uint64_t)COORD_RETRY_MIN_MS << SH_MIN(c->retries, 16u);
    c->retries++;
    c->retry_at_ms = s->now_ms + SH_MIN(wait_ms, (uint64_t)COORD_RETRY_MAX_MS);
    SH_TRY(coord_audit(s, "job failed candidate=%llu status=%s text=%.128s",
                       (unsigned long long)c->candidate.number, sh_status_name(why),
                       text == NULL ? "" : text));
    return coord_set_timer(s, c->retry_at_ms);
}

static sh_status merge_done(coord_step *s, const sh_coord_job_result *result)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    uint32_t good = 0;
    if (!coord_take_verdicts(candidate, result, &good))
        return coord_job_failed(s, SH_ERR_INVALID, "verdicts are not of this merge's inputs");
    if (good == 0) {
        SH_TRY(coord_audit(s, "no candidate=%llu: all %u updates are refused",
                           (unsigned long long)candidate->number, candidate->n_inputs));
        SH_TRY(coord_decide_inputs(s, 0));
        return coord_end_round(s);
    }
    sh_bytes bytes = result->candidate_bytes;
    if (result->format == NULL || strlen(result->format) >= sizeof candidate->format ||
        bytes.n == 0 || bytes.n > (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES)
        return coord_job_failed(s, SH_ERR_INVALID, "the merge brought no candidate");
    sh_status status = coord_candidate_put_chunks(s, bytes, &result->candidate.sha256);
    if (status == SH_ERR_MISMATCH)
        return coord_job_failed(s, status, "the bytes are not the candidate's");
    SH_TRY(status);
    candidate->new_master = result->new_master;
    candidate->sha256 = result->candidate.sha256;
    candidate->bytes = bytes.n;
    memcpy(candidate->format, result->format, strlen(result->format) + 1);
    candidate->rank = result->adapter_rank;
    candidate->discarded = result->adapter_discarded;
    SH_TRY(coord_candidate_save(s));
    c->state.phase = PHASE_GATING;
    c->retries = 0;
    c->dirty = true;
    coord_note(s, SH_CNOTE_GATE_STARTED, NULL, candidate->number);
    return coord_start_job(s);
}

/* ---- gate ---- */

/* Fills losses and verdict; true: it passes. */
static bool gate_passes(const sh_coord_options *options, const sh_coord_job_result *result,
                        sh_release_row *row)
{
    double parent = result->loss_parent, candidate = result->loss_candidate;
    row->loss_parent = parent;
    row->loss_candidate = candidate;
    row->loss_adapter_form = result->loss_adapter_form;
    row->suite = result->suite;
    row->worst_slice = -INFINITY;
    uint32_t worst = 0;
    for (uint32_t i = 0; i < result->n_slices; i++) {
        double increase = result->slice_candidate[i] - result->slice_parent[i];
        if (increase > row->worst_slice || !isfinite(increase)) {
            row->worst_slice = isfinite(increase) ? increase : INFINITY;
            worst = i;
        }
        if (!isfinite(increase))
            break;
    }
    if (result->n_slices == 0)
        row->worst_slice = candidate - parent;
    bool overall =
        isfinite(candidate) && isfinite(parent) && candidate <= parent + options->gate_overall_max;
    bool slices = row->worst_slice <= options->gate_slice_max;
    char *out = row->verdict;
    if (!overall)
        (void)snprintf(out, sizeof row->verdict, "refused: loss %.4f over parent's %.4f + %g",
                       candidate, parent, options->gate_overall_max);
    else if (!slices)
        (void)snprintf(out, sizeof row->verdict, "refused: loss of slice %u up by %.4f, over %g",
                       worst, row->worst_slice, options->gate_slice_max);
    else
        (void)snprintf(out, sizeof row->verdict, "released");
    return overall && slices;
}

sh_status coord_reject(coord_step *s, sh_release_row *row)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    row->at_ms = s->now_ms;
    SH_TRY(coord_candidate_row_put(s->txn, row, s->err));
    c->state.candidates_refused++;
    c->dirty = true;
    SH_TRY(coord_audit(s, "gate candidate=%llu %s", (unsigned long long)candidate->number,
                       row->verdict));
    coord_note(s, SH_CNOTE_CANDIDATE_REFUSED, NULL, candidate->number);
    if (candidate->scale == 1) {
        SH_TRY(coord_decide_inputs(s, 0));
        return coord_end_round(s);
    }
    /* A raised scale is to blame before the updates are: the same ones again, with the configured
     * scale, then as a plain average. */
    float usual = c->options.server_scale, next = candidate->scale != usual ? usual : 1;
    if (c->state.server_scale == candidate->scale)
        c->state.server_scale = next;
    SH_TRY(coord_canary_forget(s, NULL));
    SH_TRY(coord_candidate_drop_chunks(s));
    candidate->number = c->state.next_candidate++;
    candidate->scale = next;
    for (uint32_t i = 0; i < candidate->n_inputs; i++)
        candidate->inputs[i].reason = SH_REASON_NONE;
    SH_TRY(coord_candidate_save(s));
    c->state.phase = PHASE_MERGING;
    SH_TRY(coord_audit(s, "merge candidate=%llu again, scale=%g",
                       (unsigned long long)candidate->number, (double)next));
    coord_note(s, SH_CNOTE_MERGE_STARTED, NULL, candidate->number);
    return coord_start_job(s);
}

sh_status coord_accept(coord_step *s, sh_release_row *row)
{
    const coord_candidate *candidate = &s->c->candidate;
    sh_blob blob = {.sha256 = candidate->sha256,
                    .bytes = candidate->bytes,
                    .n_chunks = candidate->n_chunks,
                    .chunk_hashes = candidate->chunks};
    (void)snprintf(row->verdict, sizeof row->verdict, "released");
    SH_TRY(coord_publish(s, row, (sh_bytes){0}, &blob));
    coord_note(s, SH_CNOTE_RELEASED, NULL, row->version);
    SH_TRY(coord_decide_inputs(s, row->version));
    return coord_end_round(s);
}

/* Nobody knows whether it is good: its row says so, and its updates stay in the buffer, where they
 * wait for another one or for the time of a round, so that the same candidate does not come again
 * at once. The next round begins, or nodes that have sent theirs would bring no other. */
sh_status coord_leave_open(coord_step *s, sh_release_row *row)
{
    sh_coord *c = s->c;
    uint64_t wait_ms = c->options.round_ms_max;
    row->at_ms = s->now_ms;
    SH_TRY(coord_candidate_row_put(s->txn, row, s->err));
    c->state.candidates_inconclusive++;
    SH_TRY(coord_audit(s, "canary candidate=%llu %s", (unsigned long long)row->candidate,
                       row->verdict));
    coord_note(s, SH_CNOTE_INCONCLUSIVE, NULL, row->candidate);
    c->state.held = true;
    c->state.held_until_ms = wait_ms == 0 ? 0 : s->now_ms + wait_ms;
    return coord_end_round(s);
}

sh_status coord_candidate_row(coord_step *s, sh_release_row *row)
{
    const coord_candidate *candidate = &s->c->candidate;
    sh_release_row out = {.candidate = candidate->number,
                          .parent = candidate->parent_version,
                          .sha256 = candidate->sha256,
                          .new_master = candidate->new_master,
                          .suite = candidate->suite,
                          .bytes = candidate->bytes,
                          .loss_parent = candidate->loss_parent,
                          .loss_candidate = candidate->loss_candidate,
                          .loss_adapter_form = candidate->loss_adapter_form,
                          .worst_slice = candidate->worst_slice,
                          .adapter_rank = candidate->rank,
                          .adapter_discarded = candidate->discarded,
                          .server_scale = candidate->scale};
    memcpy(out.format, candidate->format, sizeof out.format);
    out.merged = sh_calloc(candidate->n_inputs, sizeof *out.merged);
    if (out.merged == NULL)
        return no_memory(s);
    for (uint32_t i = 0; i < candidate->n_inputs; i++) {
        sh_update_row update;
        if (candidate->inputs[i].reason != SH_REASON_NONE)
            continue;
        out.merged[out.n_merged++] = candidate->inputs[i].id;
        sh_status status = coord_update_get(s->txn, &candidate->inputs[i].id, &update, s->err);
        if (status != SH_OK) {
            free(out.merged);
            return status;
        }
        out.updates += coord_parts_of(&update.meta);
    }
    *row = out;
    return SH_OK;
}

static sh_status gate_done(coord_step *s, const sh_coord_job_result *result)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    sh_release_row row = {0};
    if (result->n_slices > SH_GATE_SLICES_MAX)
        return coord_job_failed(s, SH_ERR_INVALID, "the gate brought too many slices");
    SH_TRY(coord_candidate_row(s, &row));
    sh_status status;
    if (!gate_passes(&c->options, result, &row)) {
        status = coord_reject(s, &row);
    } else if (c->options.canary_nodes_min == 0) {
        status = coord_accept(s, &row);
    } else {
        candidate->suite = row.suite;
        candidate->loss_parent = row.loss_parent;
        candidate->loss_candidate = row.loss_candidate;
        candidate->loss_adapter_form = row.loss_adapter_form;
        candidate->worst_slice = row.worst_slice;
        c->retries = 0;
        status = coord_canary_begin(s);
    }
    free(row.merged);
    return status;
}

sh_status coord_on_job(coord_step *s, const sh_coord_job_result *result)
{
    sh_coord *c = s->c;
    if (c->job_id == 0 || result->id != c->job_id)
        return SH_OK; /* of a merge that was dropped */
    c->job_id = 0;
    if (c->relay != NULL)
        return coord_relay_stacked(s, result);
    if (result->status != SH_OK)
        return coord_job_failed(s, result->status, result->text);
    return c->state.phase == PHASE_MERGING ? merge_done(s, result) : gate_done(s, result);
}

sh_status coord_begin_rounds(coord_step *s)
{
    sh_coord *c = s->c;
    coord_state *state = &c->state;
    if (c->relay != NULL || state->rounds_begun || state->closing ||
        c->drifting < c->options.drifting_min)
        return SH_OK;
    state->rounds_begun = true;
    state->round = 1;
    c->state.round_at_ms = s->now_ms;
    c->dirty = true;
    coord_note(s, SH_CNOTE_ROUNDS_BEGIN, NULL, c->drifting);
    return coord_audit(s, "rounds begin drifting=%u", c->drifting);
}

void coord_renew_round(coord_step *s)
{
    sh_coord *c = s->c;
    uint64_t most = c->options.round_ms_max;
    if (c->relay != NULL || most == 0 || !c->state.rounds_begun || c->state.phase != PHASE_IDLE ||
        s->now_ms < c->state.round_at_ms + most)
        return;
    c->state.round++;
    c->state.round_at_ms = s->now_ms;
    c->dirty = true;
}
