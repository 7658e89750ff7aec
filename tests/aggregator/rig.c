#include "tests/aggregator/rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define EPOCH   77
#define TORTURE 150 /* a gate that passes has about 100 allocations */

static void ok(sh_status status, const sh_error *err)
{
    if (status != SH_OK) {
        print_error("%s: %s\n", sh_status_name(status), err->text);
        fail();
    }
}

void rig_fill(uint8_t *bytes, size_t n, uint64_t content)
{
    sh_rng rng;
    sh_rng_init(&rng, content, 0, 0x66696c6c);
    for (size_t i = 0; i + 4 <= n; i += 4) {
        uint32_t x = sh_rng_u32(&rng);
        memcpy(bytes + i, &x, 4);
    }
}

void rig_candidate_bytes(uint8_t *bytes, uint64_t candidate)
{
    memset(bytes, 7, RIG_MODEL_BYTES); /* the first chunk is every candidate's */
    rig_fill(bytes + SH_CHUNK_BYTES, RIG_MODEL_BYTES - SH_CHUNK_BYTES, 1000 + candidate);
}

sh_hash rig_key(unsigned node)
{
    sh_hash key = {{0}};
    key.b[0] = (uint8_t)(node + 1);
    key.b[31] = 0x4e;
    return key;
}

void rig_init(rig *r, const char *dir)
{
    *r = (rig){.dir = dir, .now_ms = 1000};
    uint8_t seed[32] = {5};
    sh_sign_keypair(seed, &r->options.release_pk, &r->options.release_sk);
    r->options.enrol_any = true;
    r->options.buffer = 3;
    r->options.staleness_max = 1;
    r->options.staleness_discount = 0.5f;
    r->options.server_scale = 1;
    r->options.norm_factor_max = 4;
    r->options.gate_slice_max = 0.05;
    r->options.train = (sh_train_plan){
        .rank = 8, .alpha = 16, .lr = 0.01f, .batch = 4, .context = 64, .passes_milli = 1000};
    r->options.checkin_ms = 1000;
    r->options.chunk_budget = 2;
    memset(r->genesis, 7, sizeof r->genesis);
    rig_fill(r->genesis + SH_CHUNK_BYTES, sizeof r->genesis - SH_CHUNK_BYTES, 1);
    r->master = sh_sha256("master", 6);
}

static void open_store(rig *r)
{
    sh_store_options options = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    sh_error err = {0};
    if (r->dir != NULL) {
        options.no_sync = true; /* it is the slices that this is for, not the disk */
        ok(sh_store_open_lmdb(r->dir, &options, &r->store, &err), &err);
    } else {
        ok(sh_store_open_memory(&options, &r->store, &err), &err);
    }
}

static void set_key(rig *r, const sh_hash *key, bool allowed)
{
    for (size_t i = 0; i < r->n_keys; i++)
        if (sh_hash_equal(&r->keys[i], key)) {
            r->key_allowed[i] = allowed;
            return;
        }
    assert_true(r->n_keys < RIG_KEYS_MAX);
    r->keys[r->n_keys] = *key;
    r->key_allowed[r->n_keys++] = allowed;
}

bool rig_may_connect(const rig *r, unsigned node)
{
    sh_hash key = rig_key(node);
    for (size_t i = 0; i < r->n_keys; i++)
        if (sh_hash_equal(&r->keys[i], &key))
            return r->key_allowed[i];
    return false;
}

static void carry_out(rig *r, sh_coord_actions *actions)
{
    assert_true(actions->n <= SH_COORD_ACTIONS_MAX);
    for (size_t i = 0; i < actions->n; i++) {
        sh_coord_action *a = &actions->items[i];
        switch (a->kind) {
        case SH_COORD_SEND:
            assert_true(r->n_mail < RIG_MAIL_MAX);
            r->mail[r->n_mail++] = (rig_mail){.to = a->node, .bytes = a->message};
            a->message = (sh_buf){0};
            break;
        case SH_COORD_SET_TIMER:
            r->timer_ms = a->at_ms;
            break;
        case SH_COORD_START_JOB:
            free(r->job.inputs);
            r->job = a->job;
            a->job.inputs = NULL;
            r->jobs++;
            break;
        case SH_COORD_NOTE:
            assert_true(a->note < RIG_NOTES);
            r->notes[a->note]++;
            r->last_number[a->note] = a->number;
            break;
        case SH_COORD_SEND_UP:
            assert_true(r->n_up < RIG_UP_MAX);
            r->up[r->n_up++] = a->message;
            a->message = (sh_buf){0};
            break;
        case SH_COORD_KEY:
            set_key(r, &a->node, a->access == SH_KEY_ALLOWED);
            break;
        case SH_COORD_DROP_OTHERS:
            r->others_drops++;
            r->dropped = a->node;
            r->spared = a->connection;
            break;
        case SH_COORD_DROP:
            r->drops++;
            r->dropped = a->node;
            break;
        }
    }
}

static sh_genesis genesis_of(const rig *r)
{
    return (sh_genesis){.model = {r->genesis, sizeof r->genesis},
                        .format = "Q8_0",
                        .master = r->master,
                        .manifest = {r->manifest.data, r->manifest.len}};
}

static void start(rig *r)
{
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_genesis genesis = genesis_of(r);
    sh_rng_init(&rng, 9, r->life++, 3);
    assert_non_null(actions);
    ok(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &err), &err);
    ok(sh_coord_create(&r->options, &genesis, r->now_ms, &rng, txn, actions, &r->coord, &err),
       &err);
    ok(sh_txn_commit(&txn, &err), &err);
    carry_out(r, actions);
    sh_coord_actions_clear(actions);
    free(actions);
}

void rig_boot(rig *r)
{
    open_store(r);
    start(r);
}

static void forget(rig *r)
{
    rig_drop_mail(r);
    for (size_t i = 0; i < r->n_up; i++)
        sh_buf_release(&r->up[i]);
    r->n_up = 0;
    free(r->job.inputs);
    r->job = (sh_coord_job){0};
    r->timer_ms = 0;
}

void rig_reboot(rig *r)
{
    forget(r);
    sh_coord_destroy(&r->coord);
    if (r->dir != NULL) {
        sh_store_close(&r->store);
        open_store(r);
    }
    start(r);
}

void rig_release(rig *r)
{
    forget(r);
    sh_buf_release(&r->manifest);
    sh_coord_destroy(&r->coord);
    sh_store_close(&r->store);
}

sh_coord_status rig_status(const rig *r)
{
    return sh_coord_get_status(r->coord);
}

bool rig_step(rig *r, sh_coord_event *event)
{
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_error err = {0};
    sh_txn *txn = NULL;
    bool done = false;
    assert_non_null(actions);
    event->now_ms = r->now_ms += 10;
    ok(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &err), &err);
    if (r->torture) /* most steps have few allocations */
        (void)sh_alloc_fail_after(
            1 + sh_rng_below(&r->torture_rng, sh_rng_below(&r->torture_rng, 2) ? 20 : TORTURE));
    sh_status status = sh_coord_step(r->coord, event, txn, actions, &err);
    (void)sh_alloc_fail_after(0);
    if (r->torture && status == SH_ERR_NO_MEMORY) {
        r->failures++;
        sh_txn_abort(&txn);
        rig_reboot(r);
        goto cleanup;
    }
    ok(status, &err);
    r->commits++;
    bool crash = r->crash_at == r->commits;
    if (crash && r->crash_mode == RIG_CRASH_BEFORE)
        sh_txn_abort(&txn);
    else
        ok(sh_txn_commit(&txn, &err), &err);
    if (crash) {
        rig_reboot(r);
        goto cleanup;
    }
    carry_out(r, actions);
    done = true;
cleanup:
    sh_coord_actions_clear(actions);
    free(actions);
    return done;
}

/* ---- messages ---- */

bool rig_send_bytes(rig *r, unsigned node, const void *bytes, size_t n)
{
    sh_coord_event event = {.kind = SH_COORD_MESSAGE,
                            .node = rig_key(node),
                            .connection = r->connection,
                            .message = {bytes, n}};
    return rig_step(r, &event);
}

bool rig_send(rig *r, unsigned node, const sh_msg *msg)
{
    sh_buf bytes;
    sh_error err = {0};
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_msg versioned = *msg;
    versioned.version = r->wire;
    ok(sh_msg_encode(&versioned, &bytes, &err), &err);
    bool done = rig_send_bytes(r, node, bytes.data, bytes.len);
    sh_buf_release(&bytes);
    return done;
}

bool rig_take(rig *r, unsigned node, sh_msg *msg)
{
    static uint8_t taken[SH_WIRE_MESSAGE_MAX]; /* what msg's slices point to */
    sh_hash key = rig_key(node);
    for (size_t i = 0; i < r->n_mail; i++) {
        if (!sh_hash_equal(&r->mail[i].to, &key))
            continue;
        sh_buf bytes = r->mail[i].bytes;
        memmove(&r->mail[i], &r->mail[i + 1], (r->n_mail - i - 1) * sizeof r->mail[0]);
        r->n_mail--;
        size_t n = bytes.len;
        memcpy(taken, bytes.data, n);
        sh_buf_release(&bytes);
        sh_error err = {0};
        ok(sh_msg_decode(taken, n, msg, &err), &err);
        return true;
    }
    return false;
}

void rig_drop_mail(rig *r)
{
    for (size_t i = 0; i < r->n_mail; i++)
        sh_buf_release(&r->mail[i].bytes);
    r->n_mail = 0;
}

bool rig_command(rig *r, sh_coord_command command, uint64_t number, double real, unsigned node)
{
    sh_coord_event event = {.kind = SH_COORD_COMMAND,
                            .command = command,
                            .number = number,
                            .real = real,
                            .node = rig_key(node)};
    return rig_step(r, &event);
}

void rig_enrol(rig *r, unsigned node)
{
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = EPOCH, .agent = "rig", .kernel = "none", .cores = 1}};
    if (rig_send(r, node, &msg)) {
        assert_true(rig_take(r, node, &msg));
        assert_int_equal(msg.type, SH_MSG_WELCOME);
        assert_true(msg.welcome.accepted);
    }
}

rig_plan rig_checkin(rig *r, unsigned node, uint64_t active_version, bool drifting)
{
    sh_msg msg = {.type = SH_MSG_CHECKIN,
                  .checkin = {.epoch = EPOCH,
                              .active_version = active_version,
                              .confirmed_version = active_version,
                              .drifting = drifting}};
    rig_plan plan = {0};
    if (!rig_send(r, node, &msg))
        return plan;
    assert_true(rig_take(r, node, &msg));
    if (msg.type == SH_MSG_ERROR) /* a crash took its enrolment: it will enrol again */
        return plan;
    assert_int_equal(msg.type, SH_MSG_PLAN);
    plan.train = msg.plan.train;
    plan.return_after_ms = msg.plan.return_after_ms;
    plan.wire = msg.version;
    plan.evaluate = msg.plan.evaluate;
    plan.evaluate.model.chunk_hashes = NULL;
    if (msg.plan.manifest.n > 0) {
        sh_manifest manifest;
        sh_error err = {0};
        ok(sh_manifest_verify(msg.plan.manifest.data, msg.plan.manifest.n, &r->options.release_pk,
                              &manifest, &err),
           &err);
        plan.manifest_version = manifest.version;
        plan.manifest = sh_blake2b(msg.plan.manifest.data, msg.plan.manifest.n);
    }
    return plan;
}

bool rig_item(rig *r, unsigned node, const sh_msg_item *item)
{
    sh_msg msg = {.type = SH_MSG_ITEM, .item = *item};
    return rig_send(r, node, &msg);
}

/* ---- updates ---- */

rig_update rig_make(const rig *r, unsigned node, uint64_t seq)
{
    rig_update u = {.epoch = EPOCH,
                    .seq = seq,
                    .base_version = rig_status(r).version,
                    .samples = 1000,
                    .content = 100000 + node * 1000 + seq};
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_bytes bytes;
    sh_manifest manifest;
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_get_manifest(txn, u.base_version, &bytes, &err), &err);
    ok(sh_manifest_verify(bytes.data, bytes.n, &r->options.release_pk, &manifest, &err), &err);
    u.base_sha256 = manifest.model.sha256;
    sh_txn_abort(&txn);
    return u;
}

static void send_chunks(rig *r, unsigned node, const sh_hash_list *want, const uint8_t *bytes)
{
    for (uint32_t i = 0; i < want->n; i++)
        for (size_t at = 0; at < RIG_UPDATE_BYTES; at += SH_CHUNK_BYTES) {
            size_t n = SH_MIN(RIG_UPDATE_BYTES - at, (size_t)SH_CHUNK_BYTES);
            sh_msg msg = {.type = SH_MSG_CHUNK,
                          .chunk = {.hash = sh_blake2b(bytes + at, n), .bytes = {bytes + at, n}}};
            if (memcmp(msg.chunk.hash.b, want->hashes + 32 * i, 32) == 0)
                (void)rig_send(r, node, &msg);
        }
}

bool rig_offer(rig *r, unsigned node, const rig_update *u)
{
    static uint8_t bytes[RIG_UPDATE_BYTES];
    rig_fill(bytes, sizeof bytes, u->content);
    sh_update_meta meta = {.round = 1,
                           .base_version = u->base_version,
                           .base_sha256 = u->base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = u->samples,
                           .tokens_seen = u->samples,
                           .heldout_before = 3,
                           .heldout_after = 2.5};
    if (u->heldout != 0)
        meta.heldout_before = meta.heldout_after = u->heldout;
    uint8_t *hashes = NULL;
    sh_error err = {0};
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    ok(sh_blob_describe(bytes, sizeof bytes, &meta.blob, &hashes, &err), &err);
    ok(sh_update_meta_encode(&meta, &payload, &err), &err);
    sh_msg_item item = {.epoch = u->epoch,
                        .cls = SH_CLASS_UPDATE,
                        .seq = u->seq,
                        .kind = SH_ITEM_UPDATE,
                        .last_seq = u->seq,
                        .payload = {payload.data, payload.len}};
    (void)rig_item(r, node, &item);
    sh_buf_release(&payload);
    free(hashes);
    bool acked = false;
    sh_msg msg;
    while (rig_take(r, node, &msg)) {
        if (msg.type == SH_MSG_ACK && msg.ack.cls == SH_CLASS_UPDATE && msg.ack.epoch == u->epoch) {
            uint64_t above = u->seq - msg.ack.high_water - 1;
            acked = acked || msg.ack.high_water >= u->seq ||
                    (above < 64 && (msg.ack.bitmap[0] >> above & 1) != 0);
        } else if (msg.type == SH_MSG_WANT) {
            uint8_t wanted[32 * SH_WIRE_WANT_MAX];
            memcpy(wanted, msg.want.hashes, 32 * (size_t)msg.want.n);
            msg.want.hashes = wanted;
            send_chunks(r, node, &msg.want, bytes);
        }
    }
    return acked;
}

/* ---- evaluations ---- */

bool rig_send_evaluation(rig *r, unsigned node, uint64_t seq, const sh_evaluation *evaluation)
{
    sh_error err = {0};
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    ok(sh_evaluation_encode(evaluation, &payload, &err), &err);
    sh_msg_item item = {.epoch = EPOCH,
                        .cls = SH_CLASS_ALARM,
                        .seq = seq,
                        .last_seq = seq,
                        .kind = SH_ITEM_EVALUATION,
                        .payload = {payload.data, payload.len}};
    bool done = rig_item(r, node, &item), acked = false;
    sh_buf_release(&payload);
    sh_msg msg;
    while (done && rig_take(r, node, &msg))
        acked = acked || (msg.type == SH_MSG_ACK && msg.ack.high_water >= seq);
    return acked;
}

bool rig_evaluate(rig *r, unsigned node, uint64_t seq, const sh_evaluate_plan *plan,
                  const double tpc[3])
{
    sh_evaluation e = {.candidate = plan->candidate,
                       .parent_version = plan->parent_version,
                       .candidate_sha256 = plan->model.sha256,
                       .n = tpc[0] > 0};
    e.slices[0] = (sh_slice_score){.slice = SH_SLICE_CORRECTED,
                                   .tokens = (uint64_t)tpc[0],
                                   .nll_parent = tpc[0] * tpc[1],
                                   .nll_candidate = tpc[0] * tpc[2]};
    return rig_send_evaluation(r, node, seq, &e);
}

bool rig_timer(rig *r)
{
    sh_coord_event event = {.kind = SH_COORD_TIMER};
    assert_true(r->timer_ms != 0);
    r->now_ms = SH_MAX(r->now_ms, r->timer_ms);
    r->timer_ms = 0;
    return rig_step(r, &event);
}

/* ---- backups ---- */

static sh_store *copy_of(sh_store *from)
{
    sh_store_options options = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    sh_store *to = NULL;
    sh_error err = {0};
    sh_txn *in = NULL, *out = NULL;
    ok(sh_store_open_memory(&options, &to, &err), &err);
    ok(sh_txn_begin(from, SH_TXN_READ, &in, &err), &err);
    ok(sh_txn_begin(to, SH_TXN_WRITE, &out, &err), &err);
    for (unsigned table = 0; table < SH_COORD_TABLES; table++) {
        sh_cursor *cursor = NULL;
        sh_slice key, value;
        ok(sh_cursor_open(in, table, &cursor, &err), &err);
        for (sh_status more = sh_cursor_seek(cursor, NULL, 0, &key, &value); more == SH_OK;
             more = sh_cursor_next(cursor, &key, &value))
            ok(sh_txn_put(out, table, key.data, key.n, value.data, value.n, &err), &err);
        sh_cursor_close(&cursor);
    }
    ok(sh_txn_commit(&out, &err), &err);
    sh_txn_abort(&in);
    return to;
}

sh_store *rig_backup(rig *r)
{
    sh_store *backup = copy_of(r->store);
    sh_error err = {0};
    sh_txn *txn = NULL;
    ok(sh_txn_begin(backup, SH_TXN_WRITE, &txn, &err), &err);
    ok(sh_coord_mark_backup(txn, r->now_ms, &err), &err);
    ok(sh_txn_commit(&txn, &err), &err);
    return backup;
}

void rig_restore(rig *r, sh_store *backup)
{
    assert_null(r->dir);
    forget(r);
    sh_coord_destroy(&r->coord);
    sh_store_close(&r->store);
    r->store = copy_of(backup);
    r->jumps = true;
    start(r);
}

/* ---- jobs ---- */

static bool end_job(rig *r, sh_coord_job_result *result)
{
    result->id = r->job.id;
    sh_coord_event event = {.kind = SH_COORD_JOB_DONE, .result = *result};
    sh_coord_job job = r->job;
    r->job = (sh_coord_job){0}; /* the step may start the next one */
    bool done = rig_step(r, &event);
    free(job.inputs);
    return done;
}

bool rig_end_merge(rig *r, const sh_reason *reasons)
{
    static uint8_t bytes[RIG_MODEL_BYTES];
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    rig_candidate_bytes(bytes, r->job.candidate);
    sh_hash sha256 = sh_sha256(bytes, sizeof bytes);
    for (uint32_t i = 0; i < r->job.n_inputs; i++) {
        r->job.inputs[i].norm = 1 + i;
        r->job.inputs[i].cosine = 0.5;
        r->job.inputs[i].reason = reasons == NULL ? SH_REASON_NONE : reasons[i];
    }
    sh_coord_job_result result = {.inputs = r->job.inputs,
                                  .n_inputs = r->job.n_inputs,
                                  .new_master = sh_sha256(&r->job.candidate, 8),
                                  .candidate = {.sha256 = sha256, .bytes = sizeof bytes},
                                  .candidate_bytes = {bytes, sizeof bytes},
                                  .format = "Q8_0",
                                  .adapter_rank = 12,
                                  .adapter_discarded = 0.01};
    return end_job(r, &result);
}

bool rig_end_gate(rig *r, double parent, double candidate)
{
    assert_int_equal(r->job.kind, SH_COORD_GATE);
    sh_coord_job_result result = {.suite = sh_sha256("suite", 5),
                                  .loss_parent = parent,
                                  .loss_candidate = candidate,
                                  .loss_adapter_form = candidate + 0.01,
                                  .n_slices = 2,
                                  .slice_parent = {parent, parent},
                                  .slice_candidate = {candidate, candidate}};
    return end_job(r, &result);
}

bool rig_fail_job(rig *r, sh_status status)
{
    sh_coord_job_result result = {.status = status, .text = "the disk is full"};
    return end_job(r, &result);
}

/* ---- rows ---- */

typedef struct {
    sh_update_id id;
    sh_update_row row;
    bool found;
    uint64_t pending, merged, refused;
} find_update;

static sh_status see_update(void *arg, const sh_update_row *row)
{
    find_update *f = arg;
    f->pending += row->verdict == SH_VERDICT_PENDING;
    f->merged += row->verdict == SH_VERDICT_MERGED || row->verdict == SH_VERDICT_RELAYED;
    f->refused += row->verdict == SH_VERDICT_REFUSED;
    if (row->id.epoch == f->id.epoch && row->id.seq == f->id.seq &&
        sh_hash_equal(&row->id.node, &f->id.node)) {
        f->row = *row;
        f->found = true;
    }
    return SH_OK;
}

static find_update look(rig *r, sh_update_id id)
{
    find_update f = {.id = id};
    sh_error err = {0};
    sh_txn *txn = NULL;
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_each_update(txn, see_update, &f, &err), &err);
    sh_txn_abort(&txn);
    return f;
}

sh_update_row rig_row(rig *r, unsigned node, uint64_t epoch, uint64_t seq, bool *found)
{
    find_update f = look(r, (sh_update_id){rig_key(node), epoch, seq});
    *found = f.found;
    return f.row;
}

typedef struct {
    uint64_t candidate;
    sh_release_row row;
    bool found;
    uint64_t released, refused, open, last_version, previous;
    uint64_t named; /* updates that releases name */
    bool jumps;
} find_candidate;

static sh_status see_candidate(void *arg, const sh_release_row *row)
{
    find_candidate *f = arg;
    if (row->version != 0) {
        assert_true(row->version > f->last_version); /* monotonic, and without gaps: */
        assert_true(f->jumps || row->version == f->last_version + 1);
        f->previous = f->last_version;
        f->last_version = row->version;
        f->released++;
        f->named += row->n_merged;
    } else if (strncmp(row->verdict, "inconclusive", 12) == 0) {
        f->open++;
    } else {
        f->refused++;
    }
    if (row->candidate == f->candidate) {
        f->row = *row;
        f->row.merged = NULL;
        f->found = true;
    }
    return SH_OK;
}

static find_candidate look_candidate(rig *r, uint64_t candidate)
{
    find_candidate f = {.candidate = candidate, .jumps = r->jumps};
    sh_error err = {0};
    sh_txn *txn = NULL;
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_each_candidate(txn, see_candidate, &f, &err), &err);
    sh_txn_abort(&txn);
    return f;
}

sh_release_row rig_candidate(rig *r, uint64_t candidate, bool *found)
{
    find_candidate f = look_candidate(r, candidate);
    *found = f.found;
    return f.row;
}

uint64_t rig_count(rig *r, unsigned table)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    uint64_t n = sh_txn_count(txn, table);
    sh_txn_abort(&txn);
    return n;
}

/* The chunks of release `version` are in the store; thorough: with its bytes. */
static void check_release(rig *r, uint64_t version, bool thorough)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_bytes bytes;
    sh_manifest manifest;
    sh_buf model;
    sh_buf_init(&model, RIG_MODEL_BYTES);
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_get_manifest(txn, version, &bytes, &err), &err);
    ok(sh_manifest_verify(bytes.data, bytes.n, &r->options.release_pk, &manifest, &err), &err);
    assert_true(manifest.version == version);
    uint8_t name[32];
    uint32_t missing = 1;
    ok(sh_blob_missing(txn, SH_COORD_T_CHUNK, &manifest.model, name, 1, &missing, &err), &err);
    assert_int_equal(missing, 0);
    if (thorough)
        ok(sh_blob_get(txn, SH_COORD_T_CHUNK, &manifest.model, &model, &err), &err);
    sh_txn_abort(&txn);
    sh_buf_release(&model);
}

void rig_check(rig *r, bool thorough)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_coord_status status = rig_status(r);
    find_update u = look(r, (sh_update_id){{{0}}, 0, 0});
    find_candidate c = look_candidate(r, UINT64_MAX);
    uint64_t refused = 0;
    for (int i = 0; i < SH_REASONS; i++)
        refused += status.updates_refused[i];
    assert_true(status.updates_in == u.pending + u.merged + u.refused);
    assert_true(status.buffered == u.pending);
    assert_true(status.updates_merged == u.merged);
    /* Each merged update is in exactly one release; a relay makes none. */
    assert_true(c.named == (status.relay ? 0 : u.merged));
    assert_true(refused == u.refused);
    assert_true(c.last_version == status.version);
    assert_true(c.released == status.releases + 1); /* and the genesis */
    assert_true(c.refused == status.candidates_refused);
    assert_true(c.open == status.candidates_inconclusive);
    assert_true(status.evaluations == rig_count(r, SH_COORD_T_EVALUATION));
    assert_true(status.evaluating || status.evaluations == 0);
    check_release(r, status.version, thorough);
    if (c.previous != 0)
        check_release(r, c.previous, thorough);
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_each_audit(txn, NULL, NULL, &err), &err);
    sh_txn_abort(&txn);
}

bool rig_renews(rig *r, unsigned node, uint64_t epoch, const char *leases, const uint64_t *windows)
{
    uint8_t hashes[SH_WIRE_LEASES_MAX * 32] = {0};
    uint8_t starts[SH_WIRE_LEASES_MAX * SH_WIRE_START_BYTES];
    uint32_t n = (uint32_t)strlen(leases);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t next_seq[SH_CLASSES] = {1, 1, windows == NULL ? 1 : windows[i], 1};
        hashes[i * 32] = (uint8_t)leases[i];
        sh_start_put(starts + i * SH_WIRE_START_BYTES, next_seq);
    }
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = epoch,
                            .agent = "a",
                            .kernel = "k",
                            .device_class = "",
                            .leases = {.n = n, .hashes = hashes}}};
    if (windows != NULL)
        msg.enrol.starts = (sh_bytes){starts, n * SH_WIRE_START_BYTES};
    assert_true(rig_send(r, node, &msg));
    assert_true(rig_take(r, node, &msg));
    assert_int_equal(msg.type, SH_MSG_WELCOME);
    assert_true(msg.welcome.accepted);
    assert_int_equal(msg.welcome.epoch, msg.version < 3 ? 0 : epoch);
    if (msg.version >= 3)
        assert_int_equal(msg.welcome.lease, n == 0 ? 0 : sh_lease_name(hashes));
    r->common = msg.welcome.common;
    r->parted = 0;
    if (msg.welcome.parted.n > 0) {
        uint64_t next_seq[SH_CLASSES];
        sh_start_get(msg.welcome.parted.data, next_seq);
        r->parted = next_seq[SH_CLASS_WINDOW];
    }
    return msg.welcome.renew;
}
