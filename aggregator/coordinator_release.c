/*
 * Releases: the genesis, publishing under the next version, and rollback, which publishes an older
 * release's bytes again: versions only grow, so a node can refuse everything that is older.
 *
 * A restored backup has forgotten what was issued after it was made. It goes on above the time of
 * the restore in seconds: more releases than seconds since 1970 were never made. It publishes its
 * current release anew at once, because nodes may run one that it does not know, on which they can
 * neither train nor be told to stay. Candidates and rounds skip ahead in the same way: nodes
 * remember the numbers of those they have evaluated and trained for.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"
#include "shared/sync/link.h"

void coord_release_release(coord_release *release)
{
    free(release->bytes);
    *release = (coord_release){0};
}

/* Takes over bytes (malloc'ed), also on error. */
static sh_status release_init(coord_release *out, uint8_t *bytes, size_t n, const sh_hash *master,
                              const sh_coord_options *options, sh_error *err)
{
    coord_release r = {.master = *master, .bytes = bytes, .n = n};
    sh_status status = sh_manifest_verify(bytes, n, &options->release_pk, &r.manifest, err);
    if (status != SH_OK) {
        free(bytes);
        return sh_fail_in(err, "coordinator: a stored manifest");
    }
    r.version = r.manifest.version;
    *out = r;
    return SH_OK;
}

static sh_status release_load(sh_coord *c, sh_txn *txn, uint64_t version, coord_release *out,
                              sh_error *err)
{
    uint64_t candidate = 0;
    sh_slice manifest = {0};
    if (coord_manifest_get(txn, version, &candidate, &manifest, err) != SH_OK)
        return sh_fail(err, SH_ERR_CORRUPT, "coordinator: release %llu has no row",
                       (unsigned long long)version);
    uint8_t *bytes = sh_calloc(manifest.n, 1);
    if (bytes == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for a manifest");
    memcpy(bytes, manifest.data, manifest.n);
    size_t n = manifest.n;
    sh_release_row row;
    sh_status status = coord_candidate_row_get(txn, candidate, &row, err);
    if (status != SH_OK) {
        free(bytes);
        return status;
    }
    free(row.merged);
    return release_init(out, bytes, n, &row.new_master, &c->options, err);
}

sh_status coord_releases_load(sh_coord *c, sh_txn *txn, sh_error *err)
{
    const uint64_t versions[] = {c->state.version, c->state.previous};
    _Static_assert(SH_COUNT(versions) == COORD_RELEASES_KEPT,
                   "the state names those that are kept");
    for (size_t i = 0; i < COORD_RELEASES_KEPT; i++) {
        const sh_blob *model = &c->kept[i].manifest.model;
        if (versions[i] == 0)
            continue;
        SH_TRY(release_load(c, txn, versions[i], &c->kept[i], err));
        SH_TRY(coord_chunks_hold(c, model->chunk_hashes, model->n_chunks, err));
    }
    return SH_OK;
}

/* The new release is kept, the oldest is not any more: its chunks go, unless others have them. */
static sh_status keep(coord_step *s, coord_release *fresh)
{
    sh_coord *c = s->c;
    coord_release old = c->kept[COORD_RELEASES_KEPT - 1];
    memmove(&c->kept[1], &c->kept[0], (COORD_RELEASES_KEPT - 1) * sizeof c->kept[0]);
    c->kept[0] = *fresh;
    const sh_blob *model = &fresh->manifest.model;
    sh_status status = coord_chunks_hold(c, model->chunk_hashes, model->n_chunks, s->err);
    if (status == SH_OK && old.version != 0)
        status = coord_chunks_drop(s, old.manifest.model.chunk_hashes, old.manifest.model.n_chunks);
    coord_release_release(&old);
    return status;
}

static sh_status sign(coord_step *s, const sh_release_row *row, const sh_blob *blob,
                      coord_release *out)
{
    sh_manifest manifest = {.version = row->version,
                            .parent = row->parent,
                            .created_ms = row->at_ms,
                            .model = *blob,
                            .format = row->format,
                            .suite_sha256 = row->suite,
                            .gate_loss_parent = row->loss_parent,
                            .gate_loss = row->loss_candidate,
                            .updates_merged = row->updates};
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_status status = sh_manifest_sign(&manifest, &s->c->options.release_sk, &bytes, s->err);
    if (status != SH_OK) {
        sh_buf_release(&bytes);
        return status;
    }
    /* The buffer's memory becomes the release's. */
    return release_init(out, bytes.data, bytes.len, &row->new_master, &s->c->options, s->err);
}

sh_status coord_publish(coord_step *s, sh_release_row *row, sh_bytes model, const sh_blob *blob)
{
    sh_coord *c = s->c;
    uint8_t *hashes = NULL;
    sh_blob described = {0};
    coord_release fresh = {0};
    sh_status status = SH_OK;
    row->version = SH_MAX(c->state.version, c->state.version_floor) + 1;
    row->at_ms = s->now_ms;
    if (model.n > 0) {
        SH_GOTO(sh_blob_describe(model.data, model.n, &described, &hashes, s->err));
        SH_GOTO(sh_blob_put(s->txn, SH_COORD_T_CHUNK, model.data, model.n, s->err));
        blob = &described;
    }
    row->sha256 = blob->sha256;
    row->bytes = blob->bytes;
    SH_GOTO(sign(s, row, blob, &fresh));
    SH_GOTO(coord_candidate_row_put(s->txn, row, s->err));
    SH_GOTO(coord_manifest_put(s->txn, row->version, row->candidate,
                               (sh_bytes){fresh.bytes, fresh.n}, s->err));
    c->state.previous = c->state.version;
    c->state.version = row->version;
    c->state.releases += row->version > 1;
    c->dirty = true;
    status = keep(s, &fresh);
    fresh = (coord_release){0};
    if (status != SH_OK)
        goto cleanup;
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(row->sha256.b, sizeof row->sha256.b, hex);
    status = coord_audit(s, "release version=%llu parent=%llu candidate=%llu sha256=%s updates=%u",
                         (unsigned long long)row->version, (unsigned long long)row->parent,
                         (unsigned long long)row->candidate, hex, row->updates);
cleanup:
    coord_release_release(&fresh);
    free(hashes);
    return status;
}

sh_status coord_adopt(coord_step *s, sh_bytes manifest, uint64_t candidate, const char *verdict)
{
    sh_coord *c = s->c;
    const sh_hash no_master = {{0}};
    coord_release fresh = {0};
    sh_status status = SH_OK;
    uint8_t *bytes = sh_calloc(SH_MAX(manifest.n, (size_t)1), 1);
    if (bytes == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a manifest");
    if (manifest.n > 0)
        memcpy(bytes, manifest.data, manifest.n);
    SH_TRY(release_init(&fresh, bytes, manifest.n, &no_master, &c->options, s->err));
    const sh_manifest *m = &fresh.manifest;
    sh_release_row row = {.candidate = candidate,
                          .version = m->version,
                          .parent = m->parent,
                          .at_ms = s->now_ms,
                          .sha256 = m->model.sha256,
                          .suite = m->suite_sha256,
                          .bytes = m->model.bytes,
                          .loss_parent = m->gate_loss_parent,
                          .loss_candidate = m->gate_loss,
                          .updates = m->updates_merged,
                          .server_scale = 1};
    memcpy(row.format, m->format_text, sizeof row.format);
    (void)snprintf(row.verdict, sizeof row.verdict, "%s", verdict);
    SH_GOTO(coord_candidate_row_put(s->txn, &row, s->err));
    SH_GOTO(coord_manifest_put(s->txn, row.version, candidate, (sh_bytes){fresh.bytes, fresh.n},
                               s->err));
    c->state.previous = c->state.version;
    c->state.version = row.version;
    c->state.releases += row.version > 1;
    c->dirty = true;
    status = keep(s, &fresh);
    fresh = (coord_release){0};
    if (status == SH_OK)
        status = coord_audit(s, "parent's release version=%llu parent=%llu",
                             (unsigned long long)row.version, (unsigned long long)row.parent);
cleanup:
    coord_release_release(&fresh);
    return status;
}

sh_status coord_genesis(coord_step *s, const sh_genesis *genesis)
{
    if (s->c->options.relay) {
        SH_TRY(
            sh_blob_put(s->txn, SH_COORD_T_CHUNK, genesis->model.data, genesis->model.n, s->err));
        SH_TRY(coord_adopt(s, genesis->manifest, 0, "genesis"));
        sh_hash sha256 = sh_sha256(genesis->model.data, genesis->model.n);
        if (!sh_hash_equal(&s->c->kept[0].manifest.model.sha256, &sha256))
            return sh_fail(s->err, SH_ERR_MISMATCH,
                           "coordinator: the parent's manifest names another model");
        return SH_OK;
    }
    sh_release_row row = {
        .candidate = 0, .new_master = genesis->master, .server_scale = 1, .verdict = "genesis"};
    if (genesis->model.n == 0 || genesis->format == NULL ||
        strlen(genesis->format) >= sizeof row.format)
        return sh_fail(s->err, SH_ERR_INVALID,
                       "coordinator: the genesis release needs its model's "
                       "bytes and their format");
    memcpy(row.format, genesis->format, strlen(genesis->format) + 1);
    return coord_publish(s, &row, genesis->model, NULL);
}

sh_status coord_rollback(coord_step *s, uint64_t version, sh_bytes model, bool *done)
{
    sh_coord *c = s->c;
    uint64_t from = c->state.version;
    *done = false;
    if (version == 0 || version >= from)
        return SH_OK;
    coord_release target = {0};
    sh_release_row row = {0};
    uint64_t candidate = 0;
    sh_slice manifest = {0};
    sh_status status = coord_manifest_get(s->txn, version, &candidate, &manifest, s->err);
    if (status == SH_ERR_NOT_FOUND) /* skipped by a restore */
        return SH_OK;
    SH_TRY(status);
    SH_TRY(release_load(c, s->txn, version, &target, s->err));
    status = coord_manifest_get(s->txn, version, &candidate, &manifest, s->err);
    if (status == SH_OK)
        status = coord_candidate_row_get(s->txn, candidate, &row, s->err);
    if (status != SH_OK)
        goto cleanup;
    const sh_blob *blob = &target.manifest.model;
    if (model.n > 0) {
        sh_hash sha256 = sh_sha256(model.data, model.n);
        if (!sh_hash_equal(&sha256, &blob->sha256))
            goto cleanup;
    } else {
        sh_hash name;
        uint32_t missing = 0;
        SH_GOTO(sh_blob_missing(s->txn, SH_COORD_T_CHUNK, blob, name.b, 1, &missing, s->err));
        if (missing > 0)
            goto cleanup;
    }
    SH_GOTO(coord_abandon(s));
    row.candidate = c->state.next_candidate++;
    row.parent = version; /* its lineage: what came between is withdrawn */
    row.updates = 0;
    row.n_merged = 0;
    (void)snprintf(row.verdict, sizeof row.verdict, "rolled back from %llu to %llu",
                   (unsigned long long)from, (unsigned long long)version);
    SH_GOTO(coord_publish(s, &row, model, blob));
    coord_note(s, SH_CNOTE_ROLLED_BACK, NULL, c->state.version);
    *done = true;
cleanup:
    free(row.merged);
    coord_release_release(&target);
    return status;
}

/* The current release again, under the next version. */
static sh_status republish(coord_step *s, const char *why)
{
    sh_coord *c = s->c;
    sh_release_row row = {0};
    uint64_t candidate = 0;
    sh_slice manifest = {0};
    coord_release current = {0};
    SH_TRY(coord_abandon(s)); /* its parent is not current any more; its updates stay */
    if (coord_manifest_get(s->txn, c->state.version, &candidate, &manifest, s->err) != SH_OK)
        return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: the current release has no row");
    /* Publishing moves what is kept: the chunks' names must not move with it. */
    SH_TRY(release_load(c, s->txn, c->state.version, &current, s->err));
    sh_status status = coord_candidate_row_get(s->txn, candidate, &row, s->err);
    if (status != SH_OK)
        goto cleanup;
    row.candidate = c->state.next_candidate++;
    row.parent = c->state.version;
    row.updates = 0;
    row.n_merged = 0;
    row.canary_nodes = 0;
    row.canary_tokens = 0;
    (void)snprintf(row.verdict, sizeof row.verdict, "%s, was %llu", why,
                   (unsigned long long)c->state.version);
    SH_GOTO(coord_publish(s, &row, (sh_bytes){0}, &current.manifest.model));
    c->state.round += c->state.rounds_begun;
cleanup:
    free(row.merged);
    coord_release_release(&current);
    return status;
}

sh_status coord_restored(coord_step *s, uint64_t made_ms)
{
    sh_coord *c = s->c;
    coord_state *state = &c->state;
    uint64_t now_s = s->now_ms / 1000;
    state->epoch = sh_rng_u64(&c->rng);
    state->version_floor = SH_MAX(SH_MAX(state->version, state->version_floor), now_s);
    state->next_candidate = SH_MAX(state->next_candidate, now_s);
    uint32_t round = SH_MAX(state->round, (uint32_t)SH_MIN(now_s, (uint64_t)UINT32_MAX / 2));
    if (state->rounds_begun) {
        state->round_base += round - state->round;
        state->round = round;
    }
    state->restored = true;
    state->restores++; /* what it knows of its nodes' senders is out of date */
    state->lifts = 0;
    c->dirty = true;
    SH_TRY(coord_audit(s, "restored backup_ms=%llu epoch=%016llx version=%llu above=%llu",
                       (unsigned long long)made_ms, (unsigned long long)state->epoch,
                       (unsigned long long)state->version,
                       (unsigned long long)state->version_floor));
    coord_note(s, SH_CNOTE_RESTORED, NULL, state->version_floor);
    if (c->options.relay) /* releases are the root's; the original may have sent since */
        return sh_link_forget_identity(s->txn, SH_COORD_T_META, s->err);
    return republish(s, "restored from a backup");
}

sh_status coord_lift(coord_step *s, uint64_t version)
{
    sh_coord *c = s->c;
    coord_state *state = &c->state;
    uint64_t now_s = s->now_ms / 1000;
    /* Only a clock that was set back after a restore makes versions of the future. To take more
     * from a node's word would let one that lies issue numbers that a restore comes to again. */
    uint64_t plausible = now_s + (state->restored ? COORD_VERSION_AHEAD_MAX : 0);
    if (c->relay != NULL || version <= state->version || version > plausible)
        return SH_OK;
    state->version_floor = SH_MAX(state->version_floor, version);
    c->dirty = true;
    if (state->lifts >= COORD_LIFTS_MAX) /* a node that lies has cost the fleet enough */
        return SH_OK;
    state->lifts++;
    /* Others may run what was issued after it, too. */
    state->version_floor =
        SH_MAX(state->version_floor, SH_MIN(version + COORD_LIFT_MARGIN, plausible));
    SH_TRY(coord_audit(s, "a node runs version=%llu, which this store never issued",
                       (unsigned long long)version));
    SH_TRY(republish(s, "republished above a node's"));
    return coord_advance(s);
}
