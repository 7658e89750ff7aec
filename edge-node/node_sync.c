/*
 * What the node's end of the protocol says and does; how it is kept up is shared/sync/link.h's.
 */
#include "edge-node/node_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OWED_BLOBS_MAX 65536u /* owed updates whose chunks are compared on a deletion */

/* ---- outbox ---- */

/* Every sequence of the classes that updates and alarms go in has a row. */
static bool is_in_ledger(uint8_t kind)
{
    return kind == SH_ITEM_UPDATE || kind == SH_ITEM_ALARM || kind == SH_ITEM_EVALUATION;
}

static uint64_t weigh(void *arg, const sh_msg_item *item)
{
    (void)arg;
    sh_update_meta meta;
    if (item->kind != SH_ITEM_UPDATE ||
        sh_update_meta_decode(item->payload.data, item->payload.n, &meta, NULL) != SH_OK)
        return 0;
    return meta.blob.bytes;
}

static sh_status on_drop(void *arg, const sh_msg_item *item)
{
    node_step *s = arg;
    sh_node *n = s->n;
    node_note(s, SH_NOTE_DROPPED, item->cls);
    if (item->kind == SH_ITEM_WINDOW || item->kind == SH_ITEM_UPDATE) {
        sh_monitor_note_drop(n->monitor,
                             item->kind == SH_ITEM_WINDOW ? SH_DROP_WINDOW : SH_DROP_UPDATE, 1);
        n->monitor_dirty = true;
    }
    if (item->kind == SH_ITEM_UPDATE) {
        sh_update_meta meta;
        SH_TRY(sh_update_meta_decode(item->payload.data, item->payload.n, &meta, s->err));
        SH_TRY(node_chunks_delete(s, &meta.blob, item->seq, NULL));
    }
    if (is_in_ledger(item->kind))
        SH_TRY(node_ledger_settle(s, item->cls, item->seq, SH_LEDGER_DROPPED));
    return SH_OK;
}

sh_status node_outbox_put(node_step *s, sh_class cls, sh_item_kind kind, sh_bytes payload)
{
    sh_node *n = s->n;
    sh_link_step link = node_link(s);
    if (is_in_ledger((uint8_t)kind)) {
        /* The row comes first: an item over its whole quota is dropped as it is put. */
        sh_hash sha256 = sh_sha256(payload.data, payload.n);
        if (kind == SH_ITEM_UPDATE) {
            sh_update_meta meta;
            SH_TRY(sh_update_meta_decode(payload.data, payload.n, &meta, s->err));
            sha256 = meta.blob.sha256;
        }
        /* The aggregator keeps no evaluation once it has decided: nothing is to be compared. */
        if (kind == SH_ITEM_EVALUATION)
            sha256 = (sh_hash){{0}};
        SH_TRY(node_ledger_add(s, cls, n->link.counts.next_seq[cls], &sha256));
    }
    return sh_link_put(&link, cls, kind, payload, NULL);
}

/* ---- chunks that are still needed ---- */

typedef struct {
    sh_buf bytes; /* payloads, one after another: rows borrowed from the store end with a write */
    size_t *lengths;
    size_t n, cap;
} owed_updates;

static sh_status collect_owed(node_step *s, uint64_t except, owed_updates *owed)
{
    const sh_outbox *outbox = &s->n->link.options.outbox; /* read only: it needs no arg */
    sh_msg_item item;
    sh_buf_init(&owed->bytes, SH_STORE_VALUE_MAX);
    sh_status status;
    for (uint64_t from = 0;
         (status = sh_outbox_next(outbox, s->txn, SH_CLASS_UPDATE, from, &item)) == SH_OK;
         from = item.last_seq + 1) {
        if (item.kind != SH_ITEM_UPDATE || item.seq == except)
            continue;
        SH_TRY(sh_array_reserve((void **)&owed->lengths, &owed->cap, owed->n + 1, sizeof(size_t),
                                OWED_BLOBS_MAX));
        SH_TRY(sh_buf_append(&owed->bytes, item.payload.data, item.payload.n));
        owed->lengths[owed->n++] = item.payload.n;
    }
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

sh_status node_chunks_delete(node_step *s, const sh_blob *blob, uint64_t except,
                             const sh_blob *also)
{
    owed_updates owed = {0};
    sh_buf take = {0}, candidate = {0};
    sh_blob *keep = NULL;
    size_t n_keep = 0;
    sh_status status = collect_owed(s, except, &owed);
    if (status != SH_OK) {
        status = sh_fail(s->err, status, "node: the updates owed cannot be read");
        goto cleanup;
    }
    keep = sh_calloc(owed.n + 3, sizeof(*keep));
    if (keep == NULL) {
        status = sh_fail(s->err, SH_ERR_NO_MEMORY, "node: %zu updates owed", owed.n);
        goto cleanup;
    }
    const uint8_t *at = owed.bytes.data;
    for (size_t i = 0; i < owed.n; at += owed.lengths[i++]) {
        sh_update_meta meta;
        SH_GOTO(sh_update_meta_decode(at, owed.lengths[i], &meta, s->err));
        keep[n_keep++] = meta.blob;
    }
    if (also != NULL)
        keep[n_keep++] = *also;
    if (s->n->state.take != TAKE_NONE) {
        sh_manifest manifest;
        status = node_manifest_take(s, &take, &manifest);
        if (status == SH_OK)
            keep[n_keep++] = manifest.model;
        else if (status != SH_ERR_NOT_FOUND) /* lost: whoever takes it up notices */
            goto cleanup;
    }
    if (s->n->state.candidate.version != 0) {
        sh_evaluate_plan plan;
        SH_GOTO(node_candidate_load(s, &candidate, &plan));
        keep[n_keep++] = plan.model;
    }
    SH_GOTO(sh_blob_delete(s->txn, SH_NODE_T_CHUNK, blob, keep, n_keep, s->err));
cleanup:
    free(keep);
    free(owed.lengths);
    sh_buf_release(&owed.bytes);
    sh_buf_release(&take);
    sh_buf_release(&candidate);
    return status;
}

/* The next chunks above `last` (all zero: from the first), as a blob of these. */
static sh_status some_chunks(node_step *s, sh_hash *last, sh_buf *hashes, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key;
    SH_TRY(sh_cursor_open(s->txn, SH_NODE_T_CHUNK, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, last->b, sizeof(last->b), &key, NULL);
    for (unsigned i = 0; status == SH_OK && i < NODE_SWEEP_CHUNKS; i++) {
        if (key.n != sizeof(last->b))
            status = sh_fail(err, SH_ERR_CORRUPT, "node: a chunk's key of %zu bytes", key.n);
        else if (sh_buf_append(hashes, key.data, key.n) != SH_OK)
            status = sh_fail(err, SH_ERR_NO_MEMORY, "node: no memory for chunks' names");
        else
            status = sh_cursor_next(cursor, &key, NULL);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

sh_status node_chunks_sweep(node_step *s, const sh_blob *also)
{
    sh_buf hashes;
    sh_hash last = {{0}};
    sh_status status = SH_OK;
    size_t n = NODE_SWEEP_CHUNKS;
    sh_buf_init(&hashes, NODE_SWEEP_CHUNKS * sizeof(sh_hash));
    while (n == NODE_SWEEP_CHUNKS) {
        hashes.len = 0;
        SH_GOTO(some_chunks(s, &last, &hashes, s->err));
        n = hashes.len / sizeof(sh_hash);
        if (n == 0)
            break;
        memcpy(&last, hashes.data + (n - 1) * sizeof(sh_hash), sizeof(last));
        const sh_blob blob = {.n_chunks = (uint32_t)n, .chunk_hashes = hashes.data};
        SH_GOTO(node_chunks_delete(s, &blob, 0, also));
    }
cleanup:
    sh_buf_release(&hashes);
    return status;
}

/* ---- what the link asks ---- */

static bool may_send(void *arg)
{
    const node_step *s = arg;
    return s->actions->n < SH_NODE_ACTIONS_MAX - 1; /* one place is the timer's */
}

static void send_message(void *arg, sh_buf *message)
{
    sh_node_action *action = node_act(arg, SH_NODE_SEND);
    SH_ASSERT(action != NULL);
    action->message = *message;
    *message = (sh_buf){0};
    node_budget_count(arg, true, action->message.len);
    node_policy_gates(((node_step *)arg)->n);
}

static sh_status fill_checkin(void *arg, sh_msg_checkin *c)
{
    node_step *s = arg;
    sh_node *n = s->n;
    const node_state *st = &n->state;
    n->clock.asked_ms = s->now_ms;
    c->now_ms = s->wall_ms;
    node_policy_fill(n, c);
    c->active_version = node_active(n)->version;
    c->confirmed_version = st->confirmed_version;
    c->installing_version = st->take != TAKE_NONE ? st->taking.version : 0;
    c->training_round = n->train_job != 0 ? n->training.round : 0;
    c->examples = st->feedback_rows;
    c->example_tokens = st->feedback_tokens;
    c->inferences = st->inferences;
    c->windows = st->windows;
    c->drifting = st->drifting;
    return SH_OK;
}

static sh_status on_plan(void *arg, const sh_msg_plan *plan)
{
    node_step *s = arg;
    sh_status stamped = node_clock_stamp(s, plan->time);
    if (stamped != SH_OK) {
        sh_link_step link = node_link(s);
        SH_TRY(sh_link_refuse(&link, stamped, "the signed time does not hold"));
    }
    s->n->policy.plan_ms = s->now_ms;
    node_policy_gates(s->n);
    s->n->state.last_sync_ms = s->wall_ms;
    s->n->dirty = true;
    node_note(s, SH_NOTE_CHECKED_IN, 0);
    node_on_train_plan(s, &plan->train);
    if (plan->manifest.n > 0) {
        sh_status status = node_on_manifest(s, plan->manifest);
        if (status == SH_ERR_AUTH || status == SH_ERR_INVALID) {
            sh_link_step link = node_link(s);
            return sh_link_refuse(&link, status, "the manifest does not hold");
        }
        SH_TRY(status);
    }
    SH_TRY(node_on_evaluate_plan(s, &plan->evaluate));
    return node_train_consider(s);
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    node_step *s = arg;
    if (item->kind == SH_ITEM_UPDATE) {
        sh_update_meta meta;
        SH_TRY(sh_update_meta_decode(item->payload.data, item->payload.n, &meta, s->err));
        SH_TRY(node_chunks_delete(s, &meta.blob, item->seq, NULL));
        s->n->state.updates_acked++;
        s->n->dirty = true;
        node_note(s, SH_NOTE_UPDATE_ACKED, item->seq);
    }
    if (is_in_ledger(item->kind))
        return node_ledger_settle(s, item->cls, item->seq, SH_LEDGER_ACKED);
    return SH_OK;
}

static sh_status missing(void *arg, uint8_t *hashes, uint32_t max, uint32_t *n)
{
    return node_missing(arg, hashes, max, n);
}

static sh_status on_chunks(void *arg)
{
    SH_TRY(node_take_advance(arg));
    return node_evaluate_advance(arg);
}

static void on_rejected(void *arg, const char *why)
{
    node_step *s = arg;
    (void)snprintf(s->n->rejected, sizeof(s->n->rejected), "%s",
                   why && why[0] ? why : "refused without a reason");
    node_note(s, SH_NOTE_REJECTED, 0);
}

static void on_renewed(void *arg)
{
    const node_step *s = arg;
    node_note(arg, SH_NOTE_RENEWED, s->n->link.renewals);
}

static void on_rotated(void *arg, const sh_hash *key)
{
    sh_node_action *action = node_act(arg, SH_NODE_SWITCH_KEY);
    SH_ASSERT(action != NULL); /* a message's step has sent nothing yet */
    action->key = *key;
}

static void on_refused(void *arg)
{
    sh_node *n = ((node_step *)arg)->n;
    n->state.bad_messages++;
    n->dirty = true;
}

static const sh_link_callbacks callbacks = {
    .may_send = may_send,
    .send = send_message,
    .fill_checkin = fill_checkin,
    .on_plan = on_plan,
    .on_acked = on_acked,
    .missing = missing,
    .on_chunks = on_chunks,
    .on_rejected = on_rejected,
    .on_renewed = on_renewed,
    .on_rotated = on_rotated,
    .on_refused = on_refused,
};

/* ---- what the core asks of the link ---- */

sh_link_step node_link(node_step *s)
{
    return (sh_link_step){&s->n->link, s->txn, s->now_ms, &s->n->rng, s, s->err};
}

sh_status node_link_open(node_step *s)
{
    const sh_node_options *o = &s->n->options;
    sh_link_step link = node_link(s);
    sh_link_options options = {
        .callbacks = &callbacks,
        .outbox = {.table = SH_NODE_T_OUTBOX,
                   .meta_table = SH_NODE_T_META,
                   .weigh = weigh,
                   .on_drop = on_drop},
        .chunk_table = SH_NODE_T_CHUNK,
        .enrol = {.agent = o->agent,
                  .kernel = o->kernel,
                  .cores = o->cores,
                  .memory_bytes = o->memory_bytes,
                  .device_class = o->device_class ? o->device_class : "",
                  .disk_bytes = o->disk_bytes,
                  .slots = NODE_SLOTS,
                  .token = o->rotate_token.n > 0 ? o->rotate_token : o->token},
        .retry_min_ms = o->retry_min_ms,
        .retry_max_ms = o->retry_max_ms,
    };
    memcpy(options.outbox.quota_bytes, o->outbox_quota_bytes, sizeof(o->outbox_quota_bytes));
    return sh_link_open(&link, &options);
}

void node_on_link(node_step *s, bool up)
{
    sh_link_step link = node_link(s);
    if (!up) {
        sh_link_down(&link);
        return;
    }
    sh_link_up(&link);
    if (s->n->state.take == TAKE_DOWNLOAD || s->n->evaluate)
        sh_link_want(&link);
}

void node_on_rotate(node_step *s, const sh_hash *key, sh_bytes token)
{
    sh_link_step link = node_link(s);
    sh_link_rotate(&link, key, token);
}

void node_checkin_soon(node_step *s)
{
    sh_link_step link = node_link(s);
    sh_link_checkin_soon(&link);
}

sh_status node_on_message(node_step *s, sh_bytes message)
{
    sh_link_step link = node_link(s);
    SH_TRY(sh_link_receive(&link, message));
    if (s->n->link.state == SH_LINK_WELCOME)
        s->n->rejected[0] = 0;
    return SH_OK;
}

sh_status node_pump(node_step *s)
{
    sh_link_step link = node_link(s);
    return sh_link_pump(&link);
}
