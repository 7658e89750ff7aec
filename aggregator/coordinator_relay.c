/*
 * A relay's upward side, over shared/sync/link.h: it is its parent's node.
 *
 * Down: the parent's plan and signed time are told to nodes as they came; a release is verified,
 * fetched whole, and then the current one here, under the same signed manifest. Nobody trains on a
 * release that is not here yet.
 * Up: buffered updates of one base are judged and stacked by a job. One transaction puts the result
 * into the outbox, with its parts named, and marks its inputs as relayed by that sequence; so a
 * child's update is acknowledged when it is here, and is either in the buffer, in an owed update,
 * or with the parent. Nothing in the outbox is ever dropped: while COORD_OWED_MAX updates are owed
 * none is made, the buffer fills, and nodes keep theirs.
 *
 * META "up-state"  magic "SHUP", version 1, the parent's train plan, the last evaluation answered,
 *                  updates made
 * META "up-take"   signed manifest of the release that is being fetched
 * META "outbox", "epoch": shared/sync's
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"
#include "shared/sync/link.h"

#define UP_MAGIC      0x50554853u /* "SHUP" */
#define UP_VERSION    1
#define ACTIONS_SPARE 8u /* of a step's, that messages to the parent leave */

static const char up_state_key[] = "up-state";
static const char up_take_key[] = "up-take";

struct coord_relay {
    sh_link link;
    sh_train_plan train; /* the parent's, as it came */
    uint64_t answered;   /* candidate of the last evaluation that was asked for */
    uint64_t made;       /* updates */
    uint8_t time[SH_WIRE_TIME_MAX];
    size_t time_n;
    uint8_t *take; /* signed manifest; owned */
    size_t take_n;
    sh_manifest taking; /* of take; version 0: none */
    sh_hash shapes;     /* genesis model: what updates have the shapes of */
    uint64_t since_ms;  /* when the buffer began to fill; 0: it is empty */
    size_t inputs_max;  /* of the next stack */
    bool flush;         /* what a full stack left goes up without waiting */
};

static sh_link_step link_step(coord_step *s)
{
    return (sh_link_step){.link = &s->c->relay->link,
                          .txn = s->txn,
                          .now_ms = s->now_ms,
                          .rng = &s->c->rng,
                          .arg = s,
                          .err = s->err};
}

static sh_status no_memory(coord_step *s)
{
    return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a relay");
}

/* ---- rows ---- */

static sh_status save(coord_step *s)
{
    const coord_relay *r = s->c->relay;
    const sh_train_plan *p = &r->train;
    const uint64_t numbers[] = {p->train,     p->round,  p->base_version, p->a_seed,
                                p->rank,      p->batch,  p->context,      p->passes_milli,
                                p->steps_max, p->warmup, p->tokens_min,   r->answered,
                                r->made};
    const double reals[] = {(double)p->alpha, (double)p->lr, (double)p->lr_final, (double)p->clip};
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, UP_MAGIC, 4);
    coord_put_uint(&w, UP_VERSION, 2);
    for (size_t i = 0; i < SH_COUNT(numbers); i++)
        coord_put_uint(&w, numbers[i], 8);
    for (size_t i = 0; i < SH_COUNT(reals); i++)
        coord_put_f64(&w, reals[i]);
    coord_put_hash(&w, &p->base_sha256);
    sh_status status = w.bad ? no_memory(s)
                             : sh_txn_put(s->txn, SH_COORD_T_META, up_state_key,
                                          strlen(up_state_key), w.buf.data, w.buf.len, s->err);
    sh_buf_release(&w.buf);
    return status;
}

static sh_status load(coord_step *s, sh_slice value)
{
    coord_relay *r = s->c->relay;
    sh_train_plan *p = &r->train;
    uint64_t n[13];
    double reals[4];
    coord_reader in = coord_reader_of(value);
    bool good = coord_get_uint(&in, 4) == UP_MAGIC && coord_get_uint(&in, 2) == UP_VERSION;
    for (size_t i = 0; i < SH_COUNT(n); i++)
        n[i] = coord_get_uint(&in, 8);
    for (size_t i = 0; i < SH_COUNT(reals); i++)
        reals[i] = coord_get_f64(&in);
    p->base_sha256 = coord_get_hash(&in);
    if (!good || in.bad || in.p != in.end)
        return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: row \"%s\" cannot be read",
                       up_state_key);
    p->train = n[0] != 0;
    p->round = (uint32_t)n[1];
    p->base_version = n[2];
    p->a_seed = n[3];
    p->rank = (uint32_t)n[4];
    p->batch = (uint32_t)n[5];
    p->context = (uint32_t)n[6];
    p->passes_milli = (uint32_t)n[7];
    p->steps_max = (uint32_t)n[8];
    p->warmup = (uint32_t)n[9];
    p->tokens_min = (uint32_t)n[10];
    r->answered = n[11];
    r->made = n[12];
    p->alpha = (float)reals[0];
    p->lr = (float)reals[1];
    p->lr_final = (float)reals[2];
    p->clip = (float)reals[3];
    return SH_OK;
}

/* ---- releases down ---- */

/* Keeps a copy of a manifest that was verified; bytes may end after the call. */
static sh_status set_taking(coord_step *s, sh_bytes bytes)
{
    coord_relay *r = s->c->relay;
    sh_manifest manifest;
    uint8_t *copy = sh_calloc(bytes.n, 1);
    if (copy == NULL)
        return no_memory(s);
    memcpy(copy, bytes.data, bytes.n);
    sh_status status =
        sh_manifest_verify(copy, bytes.n, &s->c->options.release_pk, &manifest, s->err);
    if (status != SH_OK) {
        free(copy);
        return status;
    }
    free(r->take);
    r->take = copy;
    r->take_n = bytes.n;
    r->taking = manifest;
    return coord_chunks_hold(s->c, manifest.model.chunk_hashes, manifest.model.n_chunks, s->err);
}

/* Forgets the release that is being fetched; its chunks go. */
static sh_status drop_taking(coord_step *s)
{
    coord_relay *r = s->c->relay;
    uint8_t *bytes = r->take;
    sh_manifest manifest = r->taking;
    sh_link_step link = link_step(s);
    if (bytes == NULL)
        return SH_OK;
    r->take = NULL;
    r->taking = (sh_manifest){0};
    sh_link_want_stop(&link);
    sh_status status =
        sh_txn_del(s->txn, SH_COORD_T_META, up_take_key, strlen(up_take_key), s->err);
    if (status == SH_OK)
        status = coord_chunks_drop(s, manifest.model.chunk_hashes, manifest.model.n_chunks);
    free(bytes);
    return status;
}

/* Everything of it is here: nodes get it. */
static sh_status take_if_whole(coord_step *s)
{
    coord_relay *r = s->c->relay;
    sh_hash name;
    uint32_t missing = 0;
    if (r->take == NULL)
        return SH_OK;
    SH_TRY(
        sh_blob_missing(s->txn, SH_COORD_T_CHUNK, &r->taking.model, name.b, 1, &missing, s->err));
    if (missing > 0)
        return SH_OK;
    SH_TRY(coord_adopt(s, (sh_bytes){r->take, r->take_n}, s->c->state.next_candidate++, "taken"));
    coord_note(s, SH_CNOTE_TAKEN, NULL, r->taking.version);
    sh_link_step link = link_step(s);
    sh_link_checkin_soon(&link);
    return drop_taking(s); /* its chunks are the kept release's now */
}

static sh_status on_manifest(coord_step *s, sh_bytes bytes)
{
    coord_relay *r = s->c->relay;
    sh_manifest manifest;
    sh_error why = {0};
    sh_link_step link = link_step(s);
    sh_status status =
        sh_manifest_verify(bytes.data, bytes.n, &s->c->options.release_pk, &manifest, &why);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", why.text);
    if (status != SH_OK)
        return sh_link_refuse(&link, status, "the manifest does not hold");
    if (manifest.version <= s->c->state.version || manifest.version <= r->taking.version ||
        manifest.model.bytes == 0)
        return SH_OK;
    SH_TRY(drop_taking(s));
    SH_TRY(set_taking(s, bytes));
    SH_TRY(sh_txn_put(s->txn, SH_COORD_T_META, up_take_key, strlen(up_take_key), bytes.data,
                      bytes.n, s->err));
    sh_link_want(&link);
    return take_if_whole(s);
}

/* ---- what the link asks ---- */

static bool may_send(void *arg)
{
    const coord_step *s = arg;
    return s->actions->n + ACTIONS_SPARE < SH_COORD_ACTIONS_MAX;
}

static void send_up(void *arg, sh_buf *message)
{
    coord_send_up(arg, message);
}

typedef struct {
    coord_step *s;
    sh_msg_checkin *out;
    uint64_t confirmed; /* by every node that has said so */
} summing;

static sh_status add_node(void *arg, const sh_node_row *row)
{
    summing *sum = arg;
    sh_msg_checkin *out = sum->out;
    const sh_msg_checkin *in = &row->checkin;
    bool relay = false;
    if (row->revoked)
        return SH_OK;
    if (sum->s->c->relays > 0)
        SH_TRY(coord_is_relay(sum->s->txn, &row->key, &relay, sum->s->err));
    out->nodes += relay ? in->nodes : 1;
    out->examples += in->examples;
    out->example_tokens += in->example_tokens;
    out->inferences += in->inferences;
    out->windows += in->windows;
    for (int cls = 0; cls < SH_CLASSES; cls++)
        out->dropped[cls] += in->dropped[cls];
    if (row->last_ms != 0)
        sum->confirmed = SH_MIN(sum->confirmed, in->confirmed_version);
    return SH_OK;
}

/* The sums of its nodes; the release that it has, and the one that all of them run. */
static sh_status fill_checkin(void *arg, sh_msg_checkin *checkin)
{
    coord_step *s = arg;
    const sh_coord *c = s->c;
    summing sum = {.s = s, .out = checkin, .confirmed = c->state.version};
    checkin->active_version = c->state.version;
    checkin->installing_version = c->relay->taking.version;
    SH_TRY(sh_coord_each_node(s->txn, add_node, &sum, s->err));
    checkin->confirmed_version = sum.confirmed;
    checkin->nodes_drifting = SH_MIN(c->drifting, checkin->nodes);
    checkin->drifting = c->drifting > 0;
    return SH_OK;
}

/* A relay has no feedback of its own, and its nodes' stays with them. */
static sh_status answer_evaluation(coord_step *s, const sh_evaluate_plan *plan)
{
    coord_relay *r = s->c->relay;
    if (plan->candidate == 0 || plan->candidate == r->answered)
        return SH_OK;
    sh_evaluation nothing = {.candidate = plan->candidate,
                             .parent_version = plan->parent_version,
                             .candidate_sha256 = plan->model.sha256};
    sh_link_step link = link_step(s);
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    sh_status status = sh_evaluation_encode(&nothing, &payload, s->err);
    if (status == SH_OK)
        status = sh_link_put(&link, SH_CLASS_ALARM, SH_ITEM_EVALUATION,
                             (sh_bytes){payload.data, payload.len}, NULL);
    sh_buf_release(&payload);
    r->answered = plan->candidate;
    return status;
}

static sh_status on_plan(void *arg, const sh_msg_plan *plan)
{
    coord_step *s = arg;
    sh_coord *c = s->c;
    coord_relay *r = c->relay;
    r->train = plan->train;
    c->state.round = plan->train.round;
    c->state.rounds_begun = plan->train.round > 0;
    c->dirty = true;
    if (plan->time.n > 0 && plan->time.n <= sizeof r->time) {
        memcpy(r->time, plan->time.data, plan->time.n);
        r->time_n = plan->time.n;
    }
    SH_TRY(answer_evaluation(s, &plan->evaluate));
    SH_TRY(save(s));
    return plan->manifest.n > 0 ? on_manifest(s, plan->manifest) : SH_OK;
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    coord_step *s = arg;
    sh_update_meta meta;
    if (item->kind != SH_ITEM_UPDATE)
        return SH_OK;
    SH_TRY(sh_update_meta_decode(item->payload.data, item->payload.n, &meta, s->err));
    SH_TRY(coord_chunks_drop(s, meta.blob.chunk_hashes, meta.blob.n_chunks));
    coord_note(s, SH_CNOTE_RELAY_ACKED, NULL, item->seq);
    return coord_audit(s, "parent has update seq=%llu", (unsigned long long)item->seq);
}

static sh_status missing(void *arg, uint8_t *hashes, uint32_t max, uint32_t *n)
{
    coord_step *s = arg;
    const coord_relay *r = s->c->relay;
    *n = 0;
    if (r->take == NULL)
        return SH_OK;
    return sh_blob_missing(s->txn, SH_COORD_T_CHUNK, &r->taking.model, hashes, max, n, s->err);
}

static sh_status on_chunks(void *arg)
{
    return take_if_whole(arg);
}

static void on_rejected(void *arg, const char *why)
{
    (void)why;
    coord_note(arg, SH_CNOTE_PARENT_REFUSED, NULL, 0);
}

static void on_renewed(void *arg)
{
    coord_note(arg, SH_CNOTE_PARENT_RENEWED, NULL, 0);
}

static void on_refused(void *arg)
{
    coord_step *s = arg;
    s->c->state.bad_messages++;
    s->c->dirty = true;
}

static const sh_link_callbacks callbacks = {.may_send = may_send,
                                            .send = send_up,
                                            .fill_checkin = fill_checkin,
                                            .on_plan = on_plan,
                                            .on_acked = on_acked,
                                            .missing = missing,
                                            .on_chunks = on_chunks,
                                            .on_rejected = on_rejected,
                                            .on_renewed = on_renewed,
                                            .on_refused = on_refused};

/* ---- open, step, status ---- */

/* *lost: its manifest is damaged. Then it is forgotten; the parent offers it again. */
static sh_status load_taking(coord_step *s, bool *lost)
{
    sh_slice value;
    *lost = false;
    sh_status status =
        sh_txn_get(s->txn, SH_COORD_T_META, up_take_key, strlen(up_take_key), &value);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    SH_TRY(status);
    status = set_taking(s, (sh_bytes){value.data, value.n});
    *lost = status != SH_OK && status != SH_ERR_NO_MEMORY;
    if (!*lost)
        return status;
    coord_note(s, SH_CNOTE_MANIFEST_LOST, NULL, 0);
    return sh_txn_del(s->txn, SH_COORD_T_META, up_take_key, strlen(up_take_key), s->err);
}

/* The chunks of what is owed stay until it is not. */
static sh_status hold_owed(coord_step *s)
{
    const sh_outbox *outbox = &s->c->relay->link.options.outbox;
    sh_msg_item item;
    for (uint64_t from = 0;; from = item.last_seq + 1) {
        sh_update_meta meta;
        sh_status status = sh_outbox_next(outbox, s->txn, SH_CLASS_UPDATE, from, &item);
        if (status == SH_ERR_NOT_FOUND)
            return SH_OK;
        if (status != SH_OK)
            return sh_fail(s->err, status, "coordinator: the outbox cannot be read");
        if (item.kind != SH_ITEM_UPDATE)
            continue;
        SH_TRY(sh_update_meta_decode(item.payload.data, item.payload.n, &meta, s->err));
        SH_TRY(coord_chunks_hold(s->c, meta.blob.chunk_hashes, meta.blob.n_chunks, s->err));
    }
}

static sh_status open_link(coord_step *s)
{
    const sh_coord_options *o = &s->c->options;
    sh_link_step link = link_step(s);
    sh_link_options options = {
        .callbacks = &callbacks,
        .outbox = {.table = SH_COORD_T_OUTBOX, .meta_table = SH_COORD_T_META},
        .chunk_table = SH_COORD_T_CHUNK,
        .enrol = {.agent = o->agent, .kernel = "relay", .cores = 1},
        .retry_min_ms = o->relay_retry_min_ms,
        .retry_max_ms = o->relay_retry_max_ms};
    for (int cls = 0; cls < SH_CLASSES; cls++)
        options.outbox.quota_bytes[cls] = UINT64_MAX;
    return sh_link_open(&link, &options);
}

sh_status coord_relay_open(coord_step *s, bool is_new)
{
    sh_coord *c = s->c;
    sh_release_row genesis;
    sh_slice value;
    sh_status status =
        sh_txn_get(s->txn, SH_COORD_T_META, up_state_key, strlen(up_state_key), &value);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "coordinator: row \"%s\" cannot be read", up_state_key);
    if (!is_new && c->options.relay != (status == SH_OK))
        return sh_fail(s->err, SH_ERR_MISMATCH, "coordinator: the store began as %s",
                       c->options.relay ? "an aggregator that releases, not as a relay"
                                        : "a relay: upstream.endpoint is missing");
    if (!c->options.relay)
        return SH_OK;
    c->relay = sh_calloc(1, sizeof *c->relay);
    if (c->relay == NULL)
        return no_memory(s);
    c->relay->inputs_max = SH_COORD_BUFFER_MAX;
    if (!is_new)
        SH_TRY(load(s, value));
    else
        SH_TRY(save(s));
    SH_TRY(coord_candidate_row_get(s->txn, 0, &genesis, s->err));
    free(genesis.merged);
    c->relay->shapes = genesis.sha256;
    bool lost = false;
    SH_TRY(load_taking(s, &lost));
    SH_TRY(open_link(s));
    SH_TRY(hold_owed(s));
    return lost ? coord_chunks_sweep(s) : SH_OK; /* which were its own, nobody knows any more */
}

void coord_relay_close(sh_coord *c)
{
    if (c->relay == NULL)
        return;
    free(c->relay->take);
    free(c->relay);
    c->relay = NULL;
}

sh_status coord_relay_event(coord_step *s, const sh_coord_event *event)
{
    sh_link_step link = link_step(s);
    if (s->c->relay == NULL)
        return SH_OK;
    switch (event->kind) {
    case SH_COORD_PARENT_UP:
        sh_link_up(&link);
        if (s->c->relay->take != NULL)
            sh_link_want(&link);
        return SH_OK;
    case SH_COORD_PARENT_DOWN:
        sh_link_down(&link);
        return SH_OK;
    default:
        return sh_link_receive(&link, event->message);
    }
}

/* When a part of the buffer has waited long enough; SH_LINK_NEVER: it is empty, or no merge can be
 * begun now. */
static uint64_t flush_due(const coord_step *s)
{
    const sh_coord *c = s->c;
    if (c->n_pending == 0 || c->relay->since_ms == 0 || c->state.phase != PHASE_IDLE)
        return SH_LINK_NEVER;
    uint64_t due = c->relay->since_ms + c->options.relay_wait_ms;
    return due > s->now_ms ? due : SH_LINK_NEVER; /* what holds it up ends in an event */
}

sh_status coord_relay_end(coord_step *s)
{
    sh_coord *c = s->c;
    sh_link_step link = link_step(s);
    SH_TRY(coord_advance(s));
    SH_TRY(sh_link_pump(&link));
    uint64_t due = SH_MIN(sh_link_due(&c->relay->link), flush_due(s));
    if (c->retry_at_ms != 0 && c->job_id == 0)
        due = SH_MIN(due, c->retry_at_ms);
    return due == SH_LINK_NEVER ? SH_OK : coord_set_timer(s, due);
}

void coord_relay_status(const sh_coord *c, sh_coord_status *out)
{
    const coord_relay *r = c->relay;
    out->relay = true;
    out->parent_up = r->link.state != SH_LINK_DOWN;
    out->parent_welcome = r->link.state == SH_LINK_WELCOME;
    out->parent_epoch = r->link.epoch;
    out->relayed = r->made;
    out->relay_owed = r->link.counts.items[SH_CLASS_UPDATE];
    out->taking = r->taking.version;
}

void coord_relay_plan(const coord_step *s, sh_msg_plan *plan)
{
    const sh_coord *c = s->c;
    const coord_relay *r = c->relay;
    plan->train = r->train;
    plan->train.train = r->train.train && r->train.base_version == c->state.version &&
                        !c->state.paused && !c->state.closing;
    if (s->version >= 3)
        plan->time = (sh_bytes){r->time, r->time_n};
}

/* ---- updates up ---- */

typedef struct {
    uint64_t version;
    sh_hash sha256;
    uint64_t parts;
} base_group;

/* The base of the most parts. */
static sh_status largest_group(coord_step *s, base_group *out)
{
    const sh_coord *c = s->c;
    base_group *groups = sh_calloc(c->n_pending, sizeof *groups);
    size_t n = 0;
    sh_status status = SH_OK;
    if (groups == NULL)
        return no_memory(s);
    for (size_t i = 0; i < c->n_pending; i++) {
        sh_update_row row;
        size_t g = 0;
        SH_GOTO(coord_update_get(s->txn, &c->pending[i], &row, s->err));
        while (g < n && (groups[g].version != row.meta.base_version ||
                         !sh_hash_equal(&groups[g].sha256, &row.meta.base_sha256)))
            g++;
        if (g == n)
            groups[n++] = (base_group){row.meta.base_version, row.meta.base_sha256, 0};
        groups[g].parts += coord_parts_of(&row.meta);
    }
    *out = groups[0];
    for (size_t g = 1; g < n; g++)
        if (groups[g].parts > out->parts)
            *out = groups[g];
cleanup:
    free(groups);
    return status;
}

/* Begins to stack as many of the group as go into one update. */
static sh_status begin_stack(coord_step *s, const base_group *group)
{
    sh_coord *c = s->c;
    coord_relay *r = c->relay;
    uint64_t parts = 0, rank = 0, bytes = 0;
    size_t n = 0;
    sh_status status = SH_OK;
    sh_update_id *ids = sh_calloc(c->n_pending, sizeof *ids);
    if (ids == NULL)
        return no_memory(s);
    r->flush = false;
    for (size_t i = 0; i < c->n_pending; i++) {
        sh_update_row row;
        SH_GOTO(coord_update_get(s->txn, &c->pending[i], &row, s->err));
        const sh_update_meta *meta = &row.meta;
        if (meta->base_version != group->version ||
            !sh_hash_equal(&meta->base_sha256, &group->sha256))
            continue;
        bool fits = n < r->inputs_max && parts + coord_parts_of(meta) <= SH_UPDATE_PARTS_MAX &&
                    rank + meta->rank <= SH_COORD_STACK_RANK_MAX &&
                    bytes + meta->blob.bytes <= (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES;
        if (n > 0 && !fits) {
            r->flush = true;
            continue;
        }
        ids[n++] = row.id;
        parts += coord_parts_of(meta);
        rank += meta->rank;
        bytes += meta->blob.bytes;
    }
    status = coord_begin_merge(s, ids, n);
cleanup:
    free(ids);
    return status;
}

sh_status coord_relay_advance(coord_step *s)
{
    sh_coord *c = s->c;
    coord_relay *r = c->relay;
    if (c->n_pending == 0) {
        r->since_ms = 0;
        r->flush = false;
        if (!c->state.closing)
            return SH_OK;
        c->state.closed = true;
        c->dirty = true;
        coord_note(s, SH_CNOTE_CLOSED, NULL, c->state.version);
        return coord_audit(s, "closed version=%llu", (unsigned long long)c->state.version);
    }
    if (r->since_ms == 0)
        r->since_ms = s->now_ms;
    bool due = c->state.closing || r->flush || s->now_ms >= r->since_ms + c->options.relay_wait_ms;
    if ((!due && c->parts < c->options.buffer) ||
        r->link.counts.items[SH_CLASS_UPDATE] >= COORD_OWED_MAX)
        return SH_OK;
    base_group group;
    SH_TRY(largest_group(s, &group));
    return due || group.parts >= c->options.buffer ? begin_stack(s, &group) : SH_OK;
}

void coord_relay_job(const sh_coord *c, sh_coord_job *job)
{
    job->kind = SH_COORD_STACK;
    job->parent_model = c->relay->shapes;
}

static int compare_parts(const void *a, const void *b)
{
    return memcmp(a, b, SH_UPDATE_PART_BYTES);
}

/* A node's word: what no loss can be would make a sum that cannot be said. */
static double plausible_loss(double loss)
{
    return fmax(0, fmin(loss, COORD_LOSS_MAX));
}

/* What the parent is told of the good inputs together; parts in `parts`, sorted. */
static sh_status describe(coord_step *s, const sh_coord_job_result *result, sh_update_meta *out,
                          sh_buf *parts)
{
    const coord_candidate *candidate = &s->c->candidate;
    sh_update_meta meta = {.rank = result->adapter_rank, .alpha = (float)result->adapter_rank};
    sh_update_id *ids = sh_calloc(candidate->n_inputs, sizeof *ids);
    sh_status status = SH_OK;
    uint64_t cap = 0;
    double before = 0, after = 0;
    if (ids == NULL)
        return no_memory(s);
    for (uint32_t i = 0; i < candidate->n_inputs; i++)
        ids[i] = candidate->inputs[i].id;
    SH_GOTO(coord_parts_cap(s, ids, candidate->n_inputs, &cap)); /* as the weights were made */
    for (uint32_t i = 0; i < candidate->n_inputs; i++) {
        sh_update_row row;
        if (candidate->inputs[i].reason != SH_REASON_NONE)
            continue;
        SH_GOTO(coord_update_get(s->txn, &ids[i], &row, s->err));
        uint64_t samples = coord_parts_samples(&ids[i], &row.meta, cap);
        for (uint32_t k = 0; k < coord_parts_of(&row.meta); k++) {
            sh_update_part part = coord_part_at(&ids[i], &row.meta, k);
            uint8_t bytes[SH_UPDATE_PART_BYTES];
            part.samples = SH_MIN(part.samples, cap);
            sh_update_part_put(bytes, &part);
            SH_GOTO(sh_buf_append(parts, bytes, sizeof bytes));
        }
        meta.round = SH_MAX(meta.round, row.meta.round);
        meta.base_version = row.meta.base_version;
        meta.base_sha256 = row.meta.base_sha256;
        meta.a_seed = row.meta.a_seed;
        meta.samples += samples;
        meta.tokens_seen += row.meta.tokens_seen;
        before += (double)samples * plausible_loss(row.meta.heldout_before);
        after += (double)samples * plausible_loss(row.meta.heldout_after);
    }
    meta.heldout_before = before / (double)meta.samples;
    meta.heldout_after = after / (double)meta.samples;
    qsort(parts->data, parts->len / SH_UPDATE_PART_BYTES, SH_UPDATE_PART_BYTES, compare_parts);
    meta.parts = (sh_bytes){parts->data, parts->len};
    *out = meta;
cleanup:
    free(ids);
    return status;
}

/* Puts the stacked update into the outbox, and decides its inputs with it. */
static sh_status put_up(coord_step *s, const sh_coord_job_result *result)
{
    coord_relay *r = s->c->relay;
    sh_bytes bytes = result->candidate_bytes;
    sh_link_step link = link_step(s);
    sh_buf parts, payload;
    sh_update_meta meta;
    uint8_t *chunks = NULL;
    uint64_t seq = 0;
    sh_status status = SH_OK;
    sh_buf_init(&parts, SH_UPDATE_PARTS_MAX * SH_UPDATE_PART_BYTES);
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    SH_GOTO(describe(s, result, &meta, &parts));
    SH_GOTO(sh_blob_describe(bytes.data, bytes.n, &meta.blob, &chunks, s->err));
    SH_GOTO(sh_update_meta_encode(&meta, &payload, s->err));
    SH_GOTO(sh_blob_put(s->txn, SH_COORD_T_CHUNK, bytes.data, bytes.n, s->err));
    SH_GOTO(sh_link_put(&link, SH_CLASS_UPDATE, SH_ITEM_UPDATE,
                        (sh_bytes){payload.data, payload.len}, &seq));
    SH_GOTO(coord_chunks_hold(s->c, meta.blob.chunk_hashes, meta.blob.n_chunks, s->err));
    r->made++;
    SH_GOTO(save(s));
    SH_GOTO(coord_audit(s, "relayed seq=%llu candidate=%llu base=%llu parts=%zu samples=%llu",
                        (unsigned long long)seq, (unsigned long long)s->c->candidate.number,
                        (unsigned long long)meta.base_version, parts.len / SH_UPDATE_PART_BYTES,
                        (unsigned long long)meta.samples));
    coord_note(s, SH_CNOTE_RELAYED, NULL, seq);
    status = coord_decide_inputs(s, seq);
cleanup:
    sh_buf_release(&parts);
    sh_buf_release(&payload);
    free(chunks);
    return status;
}

/* More than one update can hold, whatever the inputs said of themselves: half of them, then. */
static sh_status try_fewer(coord_step *s, const char *text)
{
    coord_candidate *candidate = &s->c->candidate;
    coord_relay *r = s->c->relay;
    if (candidate->n_inputs > 1) {
        r->inputs_max = candidate->n_inputs / 2;
        return coord_abandon(s); /* the step's end begins anew */
    }
    SH_TRY(coord_audit(s, "too large alone candidate=%llu text=%.128s",
                       (unsigned long long)candidate->number, text == NULL ? "" : text));
    candidate->inputs[0].reason = SH_REASON_BAD_BLOB;
    SH_TRY(coord_decide_inputs(s, 0));
    return coord_end_round(s);
}

sh_status coord_relay_stacked(coord_step *s, const sh_coord_job_result *result)
{
    sh_coord *c = s->c;
    coord_candidate *candidate = &c->candidate;
    uint32_t good = 0;
    if (result->status == SH_ERR_LIMIT)
        return try_fewer(s, result->text);
    if (result->status != SH_OK)
        return coord_job_failed(s, result->status, result->text);
    if (!coord_take_verdicts(candidate, result, &good))
        return coord_job_failed(s, SH_ERR_INVALID, "verdicts are not of this merge's inputs");
    if (good > 0 && (result->candidate_bytes.n == 0 ||
                     result->candidate_bytes.n > (uint64_t)SH_BLOB_CHUNKS_MAX * SH_CHUNK_BYTES))
        return coord_job_failed(s, SH_ERR_INVALID, "the stack brought no update");
    c->relay->inputs_max = SH_COORD_BUFFER_MAX;
    if (good > 0)
        SH_TRY(put_up(s, result));
    else
        SH_TRY(coord_decide_inputs(s, 0));
    return coord_end_round(s);
}
