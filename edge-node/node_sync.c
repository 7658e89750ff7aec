/*
 * The node's end of the protocol. Everything that is owed is in the outbox; what is kept here only
 * says when it goes out next. An item stays in flight until an acknowledgement covers it; the link
 * going down forgets the flight, not the item.
 */
#include "edge-node/node_internal.h"

#include <stdlib.h>
#include <string.h>

#define HASH_BYTES     sizeof(sh_hash)
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

static sh_outbox outbox_of(node_step *s)
{
    sh_outbox outbox = {
        .table = SH_NODE_T_OUTBOX,
        .meta_table = SH_NODE_T_META,
        .weigh = weigh,
        .on_drop = on_drop,
        .arg = s,
    };
    memcpy(outbox.quota_bytes, s->n->options.outbox_quota_bytes, sizeof(outbox.quota_bytes));
    return outbox;
}

sh_status node_outbox_put(node_step *s, sh_class cls, sh_item_kind kind, sh_bytes payload)
{
    sh_node *n = s->n;
    sh_outbox outbox = outbox_of(s);
    uint64_t seq;
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
        SH_TRY(node_ledger_add(s, cls, n->counts.next_seq[cls], &sha256));
    }
    SH_TRY(sh_outbox_put(&outbox, s->txn, cls, kind, payload, &seq, s->err));
    SH_ASSERT(seq == n->counts.next_seq[cls]);
    /* A tombstone that a quota put here has the sequence of the oldest item, which is in flight or
     * not sent yet: it goes out as that one would have. */
    return sh_outbox_get_counts(&outbox, s->txn, &n->counts, s->err);
}

/* ---- chunks that are still needed ---- */

typedef struct {
    sh_buf bytes; /* payloads, one after another: rows borrowed from the store end with a write */
    size_t *lengths;
    size_t n, cap;
} owed_updates;

static sh_status collect_owed(node_step *s, uint64_t except, owed_updates *owed)
{
    sh_outbox outbox = outbox_of(s);
    sh_msg_item item;
    sh_buf_init(&owed->bytes, SH_STORE_VALUE_MAX);
    sh_status status;
    for (uint64_t from = 0;
         (status = sh_outbox_next(&outbox, s->txn, SH_CLASS_UPDATE, from, &item)) == SH_OK;
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
        SH_GOTO(node_manifest_take(s, &take, &manifest));
        keep[n_keep++] = manifest.model;
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

/* ---- link ---- */

/* Everything owed goes out again. */
static void forget_flight(sh_node *n)
{
    memset(n->in_flight, 0, sizeof(n->in_flight));
    memset(n->send_from, 0, sizeof(n->send_from));
}

void node_on_link(node_step *s, bool up)
{
    sh_node *n = s->n;
    n->link = up ? LINK_TRYING : LINK_DOWN;
    uint64_t due = up ? s->now_ms : NODE_NEVER;
    n->enrol = n->checkin = (node_retry){.due_ms = due};
    n->want = (node_retry){.due_ms = NODE_NEVER};
    if (up && (n->state.take == TAKE_DOWNLOAD || n->evaluate))
        n->want.due_ms = due;
    n->version = SH_WIRE_VERSION;
    memset(n->bury, 0, sizeof(n->bury));
    forget_flight(n);
    n->n_serve = n->n_asked = n->asked_got = 0;
    n->want_size = SH_WIRE_WANT_MAX;
    n->hold_ms = 0;
}

void node_checkin_soon(node_step *s)
{
    if (s->n->link != LINK_DOWN)
        s->n->checkin = (node_retry){.due_ms = s->now_ms};
}

/* ---- what goes out ---- */

static sh_status send_enrol(node_step *s)
{
    const sh_node_options *o = &s->n->options;
    sh_msg msg = {.type = SH_MSG_ENROL};
    msg.enrol = (sh_msg_enrol){.epoch = s->n->state.epoch,
                               .agent = o->agent,
                               .kernel = o->kernel,
                               .cores = o->cores,
                               .memory_bytes = o->memory_bytes,
                               .slots = NODE_SLOTS,
                               .token = o->token};
    node_retry_arm(s, &s->n->enrol);
    return node_send(s, &msg);
}

static sh_status send_checkin(node_step *s)
{
    sh_node *n = s->n;
    const node_state *st = &n->state;
    sh_msg msg = {.type = SH_MSG_CHECKIN};
    sh_msg_checkin *c = &msg.checkin;
    *c = (sh_msg_checkin){
        .epoch = st->epoch,
        .now_ms = s->now_ms,
        .active_version = node_active(n)->version,
        .confirmed_version = st->confirmed_version,
        .installing_version = st->take != TAKE_NONE ? st->taking.version : 0,
        .training_round = n->train_job != 0 ? n->training.round : 0,
        .examples = st->feedback_rows,
        .example_tokens = st->feedback_tokens,
        .inferences = st->inferences,
        .windows = st->windows,
        .drifting = st->drifting,
    };
    for (int cls = 0; cls < SH_CLASSES; cls++) {
        c->outbox_items += n->counts.items[cls];
        c->outbox_bytes += n->counts.bytes[cls];
        c->dropped[cls] = n->counts.dropped[cls];
    }
    node_retry_arm(s, &n->checkin);
    return node_send(s, &msg);
}

static sh_status send_item(node_step *s, node_in_flight *f, const sh_msg_item *item)
{
    sh_msg msg = {.type = SH_MSG_ITEM, .item = *item};
    msg.item.epoch = s->n->state.epoch;
    node_retry_arm(s, &f->retry);
    return node_send(s, &msg);
}

static bool is_in_flight(const sh_node *n, uint8_t cls, uint64_t seq)
{
    for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX; i++)
        if (n->in_flight[i].used && n->in_flight[i].cls == cls && n->in_flight[i].seq == seq)
            return true;
    return false;
}

static sh_status resend_items(node_step *s, const sh_outbox *outbox)
{
    for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX && node_may_send(s); i++) {
        node_in_flight *f = &s->n->in_flight[i];
        sh_msg_item item;
        if (!f->used || f->retry.due_ms > s->now_ms)
            continue;
        sh_status status = sh_outbox_next(outbox, s->txn, f->cls, f->seq, &item);
        if (status != SH_OK && status != SH_ERR_NOT_FOUND)
            return sh_fail(s->err, status, "outbox: cannot be read");
        if (status == SH_ERR_NOT_FOUND || item.seq != f->seq)
            f->used = false; /* a tombstone has taken its place */
        else
            SH_TRY(send_item(s, f, &item));
    }
    return SH_OK;
}

static node_in_flight *free_flight(sh_node *n)
{
    for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX; i++)
        if (!n->in_flight[i].used)
            return &n->in_flight[i];
    return NULL;
}

static sh_status send_items(node_step *s)
{
    sh_node *n = s->n;
    sh_outbox outbox = outbox_of(s);
    SH_TRY(resend_items(s, &outbox));
    for (unsigned cls = 0; cls < SH_CLASSES; cls++) {
        while (n->counts.items[cls] > 0 && n->send_from[cls] < n->counts.next_seq[cls]) {
            node_in_flight *f = free_flight(n);
            sh_msg_item item;
            if (f == NULL || !node_may_send(s))
                return SH_OK;
            sh_status status =
                sh_outbox_next(&outbox, s->txn, (sh_class)cls, n->send_from[cls], &item);
            if (status == SH_ERR_NOT_FOUND) {
                n->send_from[cls] = n->counts.next_seq[cls];
                break;
            }
            if (status != SH_OK)
                return sh_fail(s->err, status, "outbox: cannot be read");
            n->send_from[cls] = item.seq + 1;
            bool unknown = n->version < 2 && item.kind == SH_ITEM_EVALUATION;
            if (unknown || is_in_flight(n, item.cls, item.seq))
                continue; /* the other has no such kind: it stays owed */
            *f = (node_in_flight){.used = true, .cls = item.cls, .seq = item.seq};
            SH_TRY(send_item(s, f, &item));
        }
    }
    return SH_OK;
}

static sh_status serve_chunks(node_step *s)
{
    sh_node *n = s->n;
    uint32_t done = 0;
    for (unsigned sent = 0; done < n->n_serve && sent < NODE_SERVE_STEP_MAX && node_may_send(s);
         done++) {
        sh_msg msg = {.type = SH_MSG_CHUNK};
        sh_slice bytes;
        memcpy(msg.chunk.hash.b, n->serve + done * HASH_BYTES, HASH_BYTES);
        sh_status status =
            sh_txn_get(s->txn, SH_NODE_T_CHUNK, msg.chunk.hash.b, HASH_BYTES, &bytes);
        if (status == SH_ERR_NOT_FOUND)
            continue; /* its update was acknowledged or dropped since */
        if (status != SH_OK)
            return sh_fail(s->err, status, "chunk table: cannot be read");
        msg.chunk.bytes = (sh_bytes){bytes.data, bytes.n};
        SH_TRY(node_send(s, &msg));
        sent++;
    }
    n->n_serve -= done;
    memmove(n->serve, n->serve + done * HASH_BYTES, n->n_serve * HASH_BYTES);
    return SH_OK;
}

/* There is an item that was not sent since the link came up, and room for it. */
static bool items_wait(const sh_node *n)
{
    unsigned used = 0;
    for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX; i++)
        used += n->in_flight[i].used;
    for (unsigned cls = 0; cls < SH_CLASSES && used < NODE_IN_FLIGHT_MAX; cls++)
        if (n->counts.items[cls] > 0 && n->send_from[cls] < n->counts.next_seq[cls])
            return true;
    return false;
}

sh_status node_pump(node_step *s)
{
    sh_node *n = s->n;
    if (n->link == LINK_DOWN || n->hold_ms > s->now_ms)
        return SH_OK;
    if (n->enrol.due_ms <= s->now_ms && node_may_send(s))
        SH_TRY(send_enrol(s));
    if (n->link == LINK_REJECTED)
        return SH_OK;
    if (n->checkin.due_ms <= s->now_ms && node_may_send(s))
        SH_TRY(send_checkin(s));
    SH_TRY(send_items(s));
    SH_TRY(serve_chunks(s));
    if (n->want.due_ms <= s->now_ms && node_may_send(s))
        SH_TRY(node_want(s));
    return SH_OK;
}

uint64_t node_sync_due(const sh_node *n)
{
    if (n->link == LINK_DOWN)
        return NODE_NEVER;
    uint64_t due = n->enrol.due_ms;
    if (n->link != LINK_REJECTED) {
        due = SH_MIN(due, n->checkin.due_ms);
        due = SH_MIN(due, n->want.due_ms);
        for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX; i++)
            if (n->in_flight[i].used)
                due = SH_MIN(due, n->in_flight[i].retry.due_ms);
        if (n->n_serve > 0 || items_wait(n))
            due = 0;
    }
    return SH_MAX(due, n->hold_ms);
}

/* ---- what comes in ---- */

static sh_status bad_message(node_step *s, sh_status code, const char *text)
{
    s->n->state.bad_messages++;
    s->n->dirty = true;
    sh_msg msg = {.type = SH_MSG_ERROR};
    msg.error = (sh_msg_error){.code = sh_status_name(code), .text = text};
    return node_may_send(s) ? node_send(s, &msg) : SH_OK;
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    node_step *s = arg;
    sh_node *n = s->n;
    for (unsigned i = 0; i < NODE_IN_FLIGHT_MAX; i++)
        if (n->in_flight[i].cls == item->cls && n->in_flight[i].seq == item->seq)
            n->in_flight[i].used = false;
    if (item->kind == SH_ITEM_UPDATE) {
        sh_update_meta meta;
        SH_TRY(sh_update_meta_decode(item->payload.data, item->payload.n, &meta, s->err));
        SH_TRY(node_chunks_delete(s, &meta.blob, item->seq, NULL));
        n->state.updates_acked++;
        n->dirty = true;
        node_note(s, SH_NOTE_UPDATE_ACKED, item->seq);
    }
    if (is_in_ledger(item->kind))
        return node_ledger_settle(s, item->cls, item->seq, SH_LEDGER_ACKED);
    return SH_OK;
}

/* The first sequence above the high-water mark that the bitmap has; SH_SEQ_MAX + 1: none. */
static uint64_t first_marked(const sh_msg_ack *ack)
{
    for (unsigned w = 0; w < SH_ACK_BITMAP_WORDS; w++)
        for (unsigned bit = 0; bit < 64 && ack->bitmap[w] != 0; bit++)
            if (ack->bitmap[w] >> bit & 1)
                return ack->high_water + 1 + 64 * w + bit;
    return SH_SEQ_MAX + 1;
}

/* A restored aggregator may have forgotten what it acknowledged, and the node has it no more: a
 * tombstone lets the high-water mark pass. An old acknowledgement looks the same; then it is a
 * duplicate there, and changes nothing. */
static sh_status bury_gap(node_step *s, const sh_outbox *outbox, const sh_msg_ack *ack)
{
    sh_node *n = s->n;
    node_retry *retry = &n->bury[ack->cls];
    sh_msg_item owed;
    uint64_t end = n->counts.next_seq[ack->cls];
    sh_status status = sh_outbox_next(outbox, s->txn, ack->cls, 0, &owed);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "outbox: cannot be read");
    if (status == SH_OK)
        end = owed.seq;
    end = SH_MIN(end, first_marked(ack));
    if (end <= ack->high_water + 1) {
        *retry = (node_retry){0};
        return SH_OK;
    }
    if (retry->due_ms > s->now_ms || !node_may_send(s))
        return SH_OK; /* the next acknowledgement shows it again */
    sh_msg msg = {.type = SH_MSG_ITEM};
    msg.item = (sh_msg_item){
        .epoch = n->state.epoch,
        .cls = ack->cls,
        .seq = ack->high_water + 1,
        .kind = SH_ITEM_TOMBSTONE,
        .last_seq = end - 1,
    };
    node_retry_arm(s, retry);
    return node_send(s, &msg);
}

static sh_status on_ack(node_step *s, const sh_msg_ack *ack)
{
    sh_node *n = s->n;
    sh_outbox outbox = outbox_of(s);
    if (ack->epoch != n->state.epoch)
        return bad_message(s, SH_ERR_MISMATCH, "acknowledgement of another epoch");
    sh_error local = {0};
    sh_status status = sh_outbox_ack(&outbox, s->txn, ack, on_acked, s, &local);
    if (status == SH_ERR_INVALID && ack->cls < SH_CLASSES)
        return bad_message(s, status, "acknowledgement of what was never sent");
    if (status == SH_ERR_INVALID)
        return bad_message(s, status, "acknowledgement of an unknown class");
    if (status != SH_OK) {
        if (local.code != SH_OK && s->err != NULL)
            *s->err = local;
        return status;
    }
    SH_TRY(sh_outbox_get_counts(&outbox, s->txn, &n->counts, s->err));
    return bury_gap(s, &outbox, ack);
}

static void on_want(node_step *s, const sh_hash_list *want)
{
    sh_node *n = s->n;
    for (uint32_t i = 0; i < want->n && n->n_serve < NODE_SERVE_MAX; i++) {
        const uint8_t *hash = want->hashes + i * HASH_BYTES;
        bool queued = false;
        for (uint32_t k = 0; k < n->n_serve && !queued; k++)
            queued = memcmp(n->serve + k * HASH_BYTES, hash, HASH_BYTES) == 0;
        if (!queued)
            memcpy(n->serve + n->n_serve++ * HASH_BYTES, hash, HASH_BYTES);
    } /* what finds no room is asked for again */
}

static void on_welcome(node_step *s, const sh_msg_welcome *welcome)
{
    sh_node *n = s->n;
    if (n->link == LINK_DOWN)
        return; /* late: the next link enrols anew */
    if (!welcome->accepted) {
        n->link = LINK_REJECTED;
        node_note(s, SH_NOTE_REJECTED, 0);
        if (n->enrol.due_ms == NODE_NEVER)
            node_retry_arm(s, &n->enrol);
        return;
    }
    n->link = LINK_WELCOME;
    n->options.token = (sh_bytes){0};
    n->enrol = (node_retry){.due_ms = NODE_NEVER};
}

static sh_status on_plan(node_step *s, const sh_msg_plan *plan)
{
    sh_node *n = s->n;
    if (n->link != LINK_DOWN) {
        uint64_t wait = SH_MAX(plan->return_after_ms, (uint64_t)NODE_RETURN_MIN_MS);
        n->checkin = (node_retry){.due_ms = s->now_ms + SH_MIN(wait, (uint64_t)NODE_RETURN_MAX_MS)};
    }
    n->state.last_sync_ms = s->now_ms;
    n->dirty = true;
    node_note(s, SH_NOTE_CHECKED_IN, 0);
    node_on_train_plan(s, &plan->train);
    if (plan->manifest.n > 0) {
        sh_status status = node_on_manifest(s, plan->manifest);
        if (status == SH_ERR_AUTH || status == SH_ERR_INVALID)
            return bad_message(s, status, "the manifest does not hold");
        SH_TRY(status);
    }
    SH_TRY(node_on_evaluate_plan(s, &plan->evaluate));
    return node_train_consider(s);
}

/* The other does not speak our version, but this one. */
static void speak(node_step *s, uint32_t version)
{
    sh_node *n = s->n;
    n->version = version;
    n->enrol = n->checkin = (node_retry){.due_ms = s->now_ms};
    if (n->want.due_ms != NODE_NEVER)
        n->want = (node_retry){.due_ms = s->now_ms};
    forget_flight(n);
}

static void on_error(node_step *s, const sh_msg *msg)
{
    sh_node *n = s->n;
    const sh_msg_error *error = &msg->error;
    if (n->link == LINK_DOWN)
        return;
    if (msg->version < n->version && strcmp(error->code, sh_status_name(SH_ERR_UNSUPPORTED)) == 0)
        speak(s, msg->version);
    uint64_t quiet = SH_MIN(error->retry_after_ms, n->options.retry_max_ms);
    if (quiet > 0)
        n->hold_ms = s->now_ms + quiet;
    if (strcmp(error->code, sh_status_name(SH_ERR_AUTH)) == 0 && n->enrol.due_ms == NODE_NEVER)
        node_retry_arm(s, &n->enrol); /* it does not know us: enrol again */
}

sh_status node_on_message(node_step *s, sh_bytes message)
{
    sh_msg msg;
    sh_error local = {0};
    sh_status status = sh_msg_decode(message.data, message.n, &msg, &local);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", local.text);
    if (status != SH_OK)
        return bad_message(s, status, "the message cannot be read");
    switch (msg.type) {
    case SH_MSG_WELCOME:
        on_welcome(s, &msg.welcome);
        return SH_OK;
    case SH_MSG_PLAN:
        return on_plan(s, &msg.plan);
    case SH_MSG_ACK:
        return on_ack(s, &msg.ack);
    case SH_MSG_WANT:
        on_want(s, &msg.want);
        return SH_OK;
    case SH_MSG_CHUNK:
        status = node_on_chunk(s, &msg.chunk);
        return status == SH_ERR_CORRUPT ? bad_message(s, status, "the chunk is not what it says")
                                        : status;
    case SH_MSG_ERROR:
        on_error(s, &msg);
        return SH_OK;
    default:
        return bad_message(s, SH_ERR_INVALID, "a node does not take this message");
    }
}
