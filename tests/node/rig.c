#include "tests/node/rig.h"

#include <stdlib.h>
#include <string.h>

#define WAIT_MS 5u /* virtual time between two looks at the network */

sh_error test_err;
static const sh_hash node_key = {{42}};
static const char *const agg_tables[AGG_TABLES] = {"inbox", "chunk"};

static sh_store *open_store(const char *const *tables, size_t n)
{
    sh_store *store = NULL;
    sh_store_options options = {.tables = tables, .n_tables = n, .bytes_max = 256u << 20};
    OK(sh_store_open_memory(&options, &store, &test_err));
    return store;
}

rig *rig_open(uint64_t seed)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    OK(sh_crypto_init(&test_err));
    r->seed = seed;
    r->now = 1000;
    r->timer = RIG_TIMER_NONE;
    r->store = open_store(sh_node_tables, SH_NODE_TABLES);
    r->agg = open_store(agg_tables, AGG_TABLES);
    sh_rng_init(&r->net, seed, 0, 77);
    uint8_t key_seed[32] = {7};
    r->options = (sh_node_options){
        .agent = "test",
        .kernel = "none",
        .cores = 1,
        .monitor = {.window = 32, .reference = 64, .average_run_length = 10000, .samples_min = 16},
        .records_max = 100,
        .feedback_tokens_max = 500,
        .windows_max = 4,
        .outbox_quota_bytes = {1u << 20, 1u << 20, 1u << 20, 1u << 20},
        .retry_min_ms = 50,
        .retry_max_ms = 2000,
        .confirm_inferences = 3,
        .send_only_if_better = true,
    };
    sh_sign_keypair(key_seed, &r->options.release_key, &r->sk);
    r->heldout_before = 4.0;
    r->heldout_after = 3.0;
    r->smoke_nll = 3.0;
    r->update_bytes = 3 * SH_CHUNK_BYTES + 10;
    r->n_slices = 2;
    r->slices[0] = (sh_slice_score){SH_SLICE_CORRECTED, 60, 180.0, 170.0}; /* in any order */
    r->slices[1] = (sh_slice_score){SH_SLICE_ACCEPTED, 40, 90.0, 91.0};
    r->speaks = SH_WIRE_VERSION;
    r->plan.return_after_ms = 1000;
    sh_buf_init(&r->rotate_token, SH_WIRE_TOKEN_MAX);
    r->chunk_budget = SH_WIRE_WANT_MAX;
    rig_make_release(r, 1, 1000);
    r->slots[0] = sh_sha256(r->releases[0].model.data, r->releases[0].model.len);
    return r;
}

sh_store *rig_copy_store(const rig *r)
{
    sh_store *copy = open_store(sh_node_tables, SH_NODE_TABLES);
    sh_txn *from = NULL, *to = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &from, &test_err));
    OK(sh_txn_begin(copy, SH_TXN_WRITE, &to, &test_err));
    for (unsigned table = 0; table < SH_NODE_TABLES; table++) {
        sh_cursor *cursor = NULL;
        sh_slice key, value;
        OK(sh_cursor_open(from, table, &cursor, &test_err));
        sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
        for (; status == SH_OK; status = sh_cursor_next(cursor, &key, &value))
            OK(sh_txn_put(to, table, key.data, key.n, value.data, value.n, &test_err));
        assert_int_equal(status, SH_ERR_NOT_FOUND);
        sh_cursor_close(&cursor);
    }
    OK(sh_txn_commit(&to, &test_err));
    sh_txn_abort(&from);
    return copy;
}

void rig_swap(rig *r, rig_copy *copy)
{
    rig_copy was = {.store = r->store, .node = r->node, .timer = r->timer, .link = r->link};
    SAME(r->n_jobs, 0); /* they are not carried over */
    was.n_packets = r->n_packets;
    memcpy(was.packets, r->packets, r->n_packets * sizeof(r->packets[0]));
    r->store = copy->store;
    r->node = copy->node;
    r->timer = copy->node == NULL ? RIG_TIMER_NONE : copy->timer;
    r->link = copy->link;
    r->n_packets = copy->n_packets;
    memcpy(r->packets, copy->packets, copy->n_packets * sizeof(r->packets[0]));
    *copy = was;
    if (r->node == NULL)
        rig_start(r);
}

void rig_copy_release(rig_copy *copy)
{
    for (size_t i = 0; i < copy->n_packets; i++)
        sh_buf_release(&copy->packets[i].bytes);
    sh_node_destroy(&copy->node);
    sh_store_close(&copy->store);
}

void rig_copy_packet(rig_copy *copy, const void *bytes, size_t n)
{
    if (!copy->link || copy->n_packets == RIG_PACKETS)
        return;
    rig_packet *p = &copy->packets[copy->n_packets++];
    p->to_node = true;
    sh_buf_init(&p->bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_buf_append(&p->bytes, bytes, n));
}

static void drop_volatile(rig *r)
{
    for (size_t i = 0; i < r->n_jobs; i++)
        sh_buf_release(&r->jobs[i].chunks);
    r->n_jobs = 0;
    r->timer = RIG_TIMER_NONE;
    r->link = false;
    for (size_t i = 0; i < r->n_packets; i++)
        sh_buf_release(&r->packets[i].bytes);
    r->n_packets = 0;
}

void rig_close(rig **rp)
{
    rig *r = *rp;
    drop_volatile(r);
    sh_node_actions_clear(&r->actions);
    sh_node_destroy(&r->node);
    sh_store_close(&r->store);
    sh_store_close(&r->agg);
    sh_buf_release(&r->rotate_token);
    for (size_t i = 0; i < RIG_RELEASES; i++) {
        sh_buf_release(&r->releases[i].manifest);
        sh_buf_release(&r->releases[i].model);
        free(r->releases[i].hashes);
    }
    for (size_t i = 0; i < r->n_pending; i++)
        sh_buf_release(&r->pending_payload[i]);
    free(r);
    *rp = NULL;
}

/* ---- releases and plans ---- */

void rig_make_release(rig *r, uint64_t version, size_t n)
{
    rig_release *release = &r->releases[version - 1];
    sh_rng rng;
    sh_txn *txn = NULL;
    sh_manifest manifest = {.version = version, .parent = version - 1, .format = "Q8_0"};
    sh_rng_init(&rng, version, r->seed, 78);
    sh_buf_init(&release->model, n);
    uint8_t *bytes = sh_buf_reserve(&release->model, n);
    assert_non_null(bytes);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)sh_rng_u32(&rng);
    release->model.len = n;
    OK(sh_blob_describe(bytes, n, &manifest.model, &release->hashes, &test_err));
    sh_buf_init(&release->manifest, SH_WIRE_MANIFEST_MAX);
    OK(sh_manifest_sign(&manifest, &r->sk, &release->manifest, &test_err));
    OK(sh_txn_begin(r->agg, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_blob_put(txn, AGG_T_CHUNK, bytes, n, &test_err));
    OK(sh_txn_commit(&txn, &test_err));
}

sh_bytes rig_manifest(const rig *r, uint64_t version)
{
    const sh_buf *m = &r->releases[version - 1].manifest;
    return (sh_bytes){m->data, m->len};
}

sh_evaluate_plan rig_evaluate_plan(const rig *r, uint64_t candidate, uint64_t parent)
{
    const sh_buf *model = &r->releases[candidate - 1].model;
    return (sh_evaluate_plan){
        .candidate = candidate,
        .parent_version = parent,
        .model = {.sha256 = sh_sha256(model->data, model->len),
                  .bytes = model->len,
                  .n_chunks = (uint32_t)((model->len + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES),
                  .chunk_hashes = r->releases[candidate - 1].hashes},
    };
}

sh_train_plan rig_train_plan(const rig *r, uint32_t round, uint64_t version)
{
    const sh_buf *model = &r->releases[version - 1].model;
    return (sh_train_plan){.train = true,
                           .round = round,
                           .base_version = version,
                           .base_sha256 = sh_sha256(model->data, model->len),
                           .a_seed = 5,
                           .rank = 4,
                           .alpha = 8,
                           .lr = 0.01f,
                           .batch = 4,
                           .context = 32,
                           .passes_milli = 1000,
                           .steps_max = 10,
                           .tokens_min = 10};
}

/* ---- network and aggregator ---- */

static void put_packet(rig *r, bool to_node, const void *bytes, size_t n)
{
    unsigned copies = 1;
    if (sh_rng_below(&r->net, 100) < r->lose)
        copies = 0;
    else if (sh_rng_below(&r->net, 100) < r->repeat)
        copies = 2;
    for (; copies > 0 && r->n_packets < RIG_PACKETS; copies--) {
        rig_packet *p = &r->packets[r->n_packets++];
        p->to_node = to_node;
        sh_buf_init(&p->bytes, SH_WIRE_MESSAGE_MAX);
        OK(sh_buf_append(&p->bytes, bytes, n));
    }
}

static void agg_send(rig *r, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_msg mine = *msg;
    mine.version = r->speaks;
    OK(sh_msg_encode(&mine, &bytes, &test_err));
    put_packet(r, true, bytes.data, bytes.len);
    if (r->on_answer != NULL)
        r->on_answer(r->arg, &bytes);
    sh_buf_release(&bytes);
}

static uint32_t find_lease(const uint8_t *leases, uint32_t n, const uint8_t *lease)
{
    uint32_t i = 0;
    while (i < n && memcmp(leases + i * sizeof(sh_hash), lease, sizeof(sh_hash)) != 0)
        i++;
    return i;
}

static rig_epoch *epoch_of(rig *r, uint64_t epoch)
{
    for (rig_epoch *e = r->epochs; e < r->epochs + r->n_epochs; e++)
        if (e->epoch == epoch)
            return e;
    return NULL;
}

uint64_t rig_lease_name(rig *r, uint64_t epoch)
{
    const rig_epoch *e = epoch_of(r, epoch);
    return e == NULL || e->n == 0 ? 0 : sh_lease_name(e->leases);
}

static void agg_mark(rig *r, sh_txn *txn, const sh_msg_item *item)
{
    sh_msg msg = {.type = SH_MSG_ACK};
    OK(sh_inbox_mark(txn, AGG_T_INBOX, &node_key, item, &msg.ack, &test_err));
    for (uint64_t seq = item->seq; seq <= item->last_seq; seq++) {
        assert_true(seq < RIG_SEQS);
        if (item->kind == SH_ITEM_TOMBSTONE)
            r->buried[item->cls][seq]++;
        else
            r->taken[item->cls][seq]++;
    }
    if (item->kind == SH_ITEM_EVALUATION) {
        SAME(item->cls, SH_CLASS_ALARM);
        OK(sh_evaluation_decode(item->payload.data, item->payload.n, &r->evaluation, &test_err));
        r->n_evaluations++;
    }
    r->n_taken[item->cls] += item->kind != SH_ITEM_TOMBSTONE;
    if (r->on_taken != NULL && item->kind != SH_ITEM_TOMBSTONE)
        r->on_taken(r->arg, item);
    msg.ack.lease = item->kind == SH_ITEM_UPDATE ? rig_lease_name(r, item->epoch) : item->lease;
    agg_send(r, &msg);
}

/* Takes a pending update if its chunks are all here, else asks for them. */
static bool agg_try_update(rig *r, sh_txn *txn, const sh_msg_item *item, bool ask)
{
    sh_update_meta meta;
    uint8_t hashes[SH_WIRE_WANT_MAX * 32];
    sh_msg want = {.type = SH_MSG_WANT};
    OK(sh_update_meta_decode(item->payload.data, item->payload.n, &meta, &test_err));
    OK(sh_blob_missing(txn, AGG_T_CHUNK, &meta.blob, hashes, SH_WIRE_WANT_MAX, &want.want.n,
                       &test_err));
    if (want.want.n == 0) {
        sh_inbox_verdict verdict;
        sh_buf whole;
        sh_buf_init(&whole, 64u << 20);
        OK(sh_blob_get(txn, AGG_T_CHUNK, &meta.blob, &whole, &test_err));
        sh_buf_release(&whole);
        OK(sh_inbox_check(txn, AGG_T_INBOX, &node_key, item, &verdict, &test_err));
        if (verdict == SH_INBOX_NEW)
            agg_mark(r, txn, item);
        return true;
    }
    want.want.hashes = hashes;
    if (ask)
        agg_send(r, &want);
    return false;
}

static void agg_on_item(rig *r, sh_txn *txn, const sh_msg_item *item)
{
    sh_inbox_verdict verdict;
    sh_msg msg = {.type = SH_MSG_ACK};
    if (item->lease != 0 && item->lease != rig_lease_name(r, item->epoch)) {
        sh_msg refusal = {.type = SH_MSG_ERROR, .error = {"auth", "another start", 0}};
        r->evicted++;
        agg_send(r, &refusal);
        return;
    }
    OK(sh_inbox_check(txn, AGG_T_INBOX, &node_key, item, &verdict, &test_err));
    if (verdict != SH_INBOX_NEW) {
        OK(sh_inbox_get_ack(txn, AGG_T_INBOX, &node_key, item->epoch, item->cls, &msg.ack,
                            &test_err));
        msg.ack.lease = item->lease;
        agg_send(r, &msg);
        return;
    }
    if (item->kind != SH_ITEM_UPDATE) {
        agg_mark(r, txn, item);
        return;
    }
    if (agg_try_update(r, txn, item, true))
        return;
    for (size_t i = 0; i < r->n_pending; i++)
        if (r->pending[i].seq == item->seq)
            return;
    assert_true(r->n_pending < RIG_PENDING);
    sh_buf *payload = &r->pending_payload[r->n_pending];
    sh_buf_init(payload, SH_WIRE_ITEM_MAX);
    OK(sh_buf_append(payload, item->payload.data, item->payload.n));
    r->pending[r->n_pending] = *item;
    r->pending[r->n_pending++].payload.data = payload->data;
}

static void agg_on_chunk(rig *r, sh_txn *txn, const sh_msg_chunk *chunk)
{
    OK(sh_chunk_put(txn, AGG_T_CHUNK, chunk, &test_err));
    for (size_t i = r->n_pending; i-- > 0;) {
        if (!agg_try_update(r, txn, &r->pending[i], false))
            continue;
        sh_buf_release(&r->pending_payload[i]);
        r->n_pending--;
        r->pending[i] = r->pending[r->n_pending];
        r->pending_payload[i] = r->pending_payload[r->n_pending];
    }
}

static void agg_on_want(rig *r, sh_txn *txn, const sh_hash_list *want)
{
    for (uint32_t i = 0; i < SH_MIN(want->n, r->chunk_budget); i++) {
        sh_msg msg = {.type = SH_MSG_CHUNK};
        sh_slice value;
        memcpy(msg.chunk.hash.b, want->hashes + i * 32, 32);
        OK(sh_txn_get(txn, AGG_T_CHUNK, msg.chunk.hash.b, 32, &value));
        msg.chunk.bytes = (sh_bytes){value.data, value.n};
        r->chunks_served++;
        agg_send(r, &msg);
    }
}

/* Something of the epoch came that was made since start i of the ENROL began. */
static bool came_since(sh_txn *txn, const sh_msg_enrol *enrol, uint32_t i)
{
    uint64_t next_seq[SH_CLASSES], highest;
    sh_start_get((const uint8_t *)enrol->starts.data + i * SH_WIRE_START_BYTES, next_seq);
    for (uint8_t cls = 0; cls < SH_CLASSES; cls++) {
        OK(sh_inbox_highest(txn, AGG_T_INBOX, &node_key, enrol->epoch, cls, &highest, &test_err));
        if (highest >= next_seq[cls])
            return true;
    }
    return false;
}

static void keep_leases(rig_epoch *e, const sh_msg_enrol *enrol, uint32_t newer)
{
    uint32_t kept = SH_MIN(e->n, SH_WIRE_LEASES_MAX - newer);
    memmove(e->leases + newer * sizeof(sh_hash), e->leases, kept * sizeof(sh_hash));
    memcpy(e->leases, enrol->leases.hashes, newer * sizeof(sh_hash));
    memmove(e->starts + newer * SH_WIRE_START_BYTES, e->starts, kept * SH_WIRE_START_BYTES);
    memcpy(e->starts, enrol->starts.data, newer * SH_WIRE_START_BYTES);
    e->n = newer + kept;
}

/* docs/protocol.md, "Leases". */
static void claim(rig *r, sh_txn *txn, const sh_msg_enrol *enrol, sh_msg_welcome *welcome)
{
    const sh_hash_list *leases = &enrol->leases;
    rig_epoch *e = epoch_of(r, enrol->epoch);
    if (e == NULL) {
        assert_true(r->n_epochs < RIG_EPOCHS);
        e = &r->epochs[r->n_epochs++];
        *e = (rig_epoch){.epoch = enrol->epoch};
    }
    SAME(enrol->starts.n, leases->n * SH_WIRE_START_BYTES);
    welcome->lease = sh_lease_name(leases->hashes);
    uint32_t newer = e->n == 0 ? leases->n : find_lease(leases->hashes, leases->n, e->leases);
    if (e->n > 0 && newer == leases->n) {
        uint32_t *i = &welcome->common, kept = e->n;
        while (*i < leases->n &&
               (kept = find_lease(e->leases, e->n, leases->hashes + *i * 32)) == e->n)
            ++*i;
        welcome->renew = true;
        if (*i < leases->n)
            welcome->parted =
                (sh_bytes){e->starts + (kept - 1) * SH_WIRE_START_BYTES, SH_WIRE_START_BYTES};
    } else if (e->n > 0 && newer > 0 && came_since(txn, enrol, newer - 1)) {
        welcome->renew = true;
        welcome->common = newer;
    } else {
        keep_leases(e, enrol, newer);
    }
    r->renewed += welcome->renew;
}

static void agg_on_enrol(rig *r, sh_txn *txn, const sh_msg_enrol *enrol)
{
    sh_msg reply = {.type = SH_MSG_WELCOME};
    reply.welcome =
        (sh_msg_welcome){.accepted = !r->reject, .text = "hello", .epoch = enrol->epoch};
    if (!r->reject && enrol->leases.n > 0)
        claim(r, txn, enrol, &reply.welcome);
    agg_send(r, &reply);
}

static void agg_receive(rig *r, const void *bytes, size_t n)
{
    sh_msg msg, reply = {0};
    sh_txn *txn = NULL;
    sh_buf stamp;
    if (r->mute)
        return;
    sh_buf_init(&stamp, SH_WIRE_TIME_MAX);
    OK(sh_msg_decode(bytes, n, &msg, &test_err));
    if (msg.version > r->speaks) { /* as a program that does not know it */
        sh_msg refusal = {.type = SH_MSG_ERROR, .error = {"unsupported", "version", 0}};
        agg_send(r, &refusal);
        return;
    }
    OK(sh_txn_begin(r->agg, SH_TXN_WRITE, &txn, &test_err));
    switch (msg.type) {
    case SH_MSG_ENROL:
        r->token_bytes = msg.enrol.token.n;
        if (r->token_bytes > 0) {
            SAME(r->token_bytes, r->rotate_token.len);
            assert_memory_equal(msg.enrol.token.data, r->rotate_token.data, r->token_bytes);
        }
        agg_on_enrol(r, txn, &msg.enrol);
        break;
    case SH_MSG_ROTATE:
        r->rotate_token.len = 0;
        OK(sh_buf_append(&r->rotate_token, msg.rotate.token.data, msg.rotate.token.n));
        reply.type = SH_MSG_ROTATE;
        reply.rotate.key = msg.rotate.key;
        agg_send(r, &reply);
        break;
    case SH_MSG_CHECKIN:
        r->checkin = msg.checkin;
        reply.type = SH_MSG_PLAN;
        reply.plan = r->plan;
        if (r->stamps) {
            OK(sh_time_sign(r->now + r->true_offset, &r->sk, &stamp, &test_err));
            reply.plan.time = (sh_bytes){stamp.data, stamp.len};
        }
        if (r->offer > msg.checkin.active_version)
            reply.plan.manifest = rig_manifest(r, r->offer);
        agg_send(r, &reply);
        break;
    case SH_MSG_ITEM:
        agg_on_item(r, txn, &msg.item);
        break;
    case SH_MSG_CHUNK:
        agg_on_chunk(r, txn, &msg.chunk);
        break;
    case SH_MSG_WANT:
        agg_on_want(r, txn, &msg.want);
        break;
    default:
        break;
    }
    sh_buf_release(&stamp);
    OK(sh_txn_commit(&txn, &test_err));
}

/* ---- the shell ---- */

/* A job that noticed in time: it says nothing any more. */
static void drop_job(rig *r, uint64_t id)
{
    for (size_t i = r->drop_cancelled ? r->n_jobs : 0; i-- > 0;)
        if (r->jobs[i].job.id == id) {
            sh_buf_release(&r->jobs[i].chunks);
            r->jobs[i] = r->jobs[--r->n_jobs];
        }
}

static void carry_out(rig *r)
{
    assert_true(r->actions.n <= SH_NODE_ACTIONS_MAX);
    for (size_t i = 0; i < r->actions.n; i++) {
        sh_node_action *a = &r->actions.items[i];
        sh_msg msg;
        switch (a->kind) {
        case SH_NODE_SEND:
            assert_true(r->link);
            OK(sh_msg_decode(a->message.data, a->message.len, &msg, &test_err));
            r->bytes_up += a->message.len;
            r->sent[msg.type]++;
            put_packet(r, false, a->message.data, a->message.len);
            break;
        case SH_NODE_SET_TIMER:
            assert_true(a->at_ms >= r->now);
            r->timer = a->at_ms;
            break;
        case SH_NODE_START_JOB:
            assert_true(r->n_jobs < RIG_JOBS);
            r->jobs[r->n_jobs++] = (rig_job){a->job, a->job_chunks};
            a->job_chunks = (sh_buf){0}; /* moved */
            break;
        case SH_NODE_CANCEL_JOB:
            r->cancelled++;
            drop_job(r, a->job.id);
            break;
        case SH_NODE_ACTIVATE:
            r->active_version = a->version;
            r->active_slot = a->slot;
            break;
        case SH_NODE_SWITCH_KEY:
            r->switched++;
            r->switch_key = a->key;
            break;
        case SH_NODE_NOTE:
            assert_true(a->note < RIG_NOTES);
            r->notes[a->note]++;
            r->note_number[a->note] = a->number;
            break;
        }
    }
    sh_node_actions_clear(&r->actions);
}

void rig_start(rig *r)
{
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_rng_init(&rng, r->seed, r->starts++, 79);
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    OK(sh_node_create(&r->options, rig_manifest(r, 1), r->now, &rng, txn, &r->actions, &r->node,
                      &test_err));
    OK(sh_txn_commit(&txn, &test_err));
    carry_out(r);
}

void rig_restart(rig *r)
{
    sh_node_destroy(&r->node);
    drop_volatile(r);
    rig_start(r);
}

bool rig_step(rig *r, const sh_node_event *event)
{
    sh_txn *txn = NULL;
    sh_node_event mine = *event;
    rig_crash crash = r->steps++ == r->crash_at ? r->crash : CRASH_NEVER;
    bool was_up = r->link;
    mine.now_ms = r->now;
    mine.wall_ms = r->has_wall ? r->now + r->wall_offset : 0;
    if (event->kind == SH_NODE_MESSAGE)
        r->bytes_down += event->message.n;
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &test_err));
    bool starve = sh_rng_below(&r->net, 100) < r->starve;
    (void)sh_alloc_fail_after(starve ? 1 + sh_rng_below(&r->net, 12) : 0);
    sh_status status = sh_node_step(r->node, &mine, txn, &r->actions, &test_err);
    (void)sh_alloc_fail_after(0);
    if (starve && status == SH_ERR_NO_MEMORY) {
        SAME(r->actions.n, 0);
        crash = CRASH_BEFORE_COMMIT;
        r->starved++;
    } else {
        OK(status);
    }
    if (crash == CRASH_BEFORE_COMMIT)
        sh_txn_abort(&txn);
    else
        OK(sh_txn_commit(&txn, &test_err));
    if (crash == CRASH_NEVER) {
        carry_out(r);
        return true;
    }
    sh_node_actions_clear(&r->actions);
    rig_restart(r);
    if (was_up)
        rig_link(r, true);
    return crash == CRASH_AFTER_COMMIT;
}

void rig_link(rig *r, bool up)
{
    sh_node_event e = {.kind = up ? SH_NODE_LINK_UP : SH_NODE_LINK_DOWN};
    r->link = up;
    if (!up) {
        for (size_t i = 0; i < r->n_packets; i++)
            sh_buf_release(&r->packets[i].bytes);
        r->n_packets = 0;
    }
    (void)rig_step(r, &e);
}

void rig_signals(rig *r, const sh_node_signals *signals)
{
    sh_node_event e = {.kind = SH_NODE_SIGNALS, .signals = *signals};
    (void)rig_step(r, &e);
}

bool rig_infer(rig *r, unsigned i, bool shifted)
{
    sh_rng rng;
    sh_rng_init(&rng, r->seed, i, 80);
    sh_node_event e = {.kind = SH_NODE_INFERENCE};
    sh_record *record = &e.record;
    *record = (sh_record){
        .at_ms = r->now,
        .release_version = (uint32_t)rig_status(r).active_version,
        .ttft_us = 1000,
        .token_us = 100,
        .prompt_tokens = (uint16_t)(4 + sh_rng_below(&rng, 4)),
        .output_tokens = 2,
        .prompt_nll = 3.0f + 0.3f * sh_rng_normal(&rng) + (shifted ? 6.0f : 0.0f),
        .mean_logprob = -1.0f,
        .least_logprob = -2.0f,
        .mean_entropy = 1.5f,
        .feedback = SH_FEEDBACK_ACCEPT,
    };
    for (int k = 0; k < SH_PROJECTIONS; k++)
        record->projection[k] = (int8_t)(20.0f * sh_rng_normal(&rng));
    for (int k = 0; k < record->prompt_tokens; k++)
        sh_record_count_token(record, (int32_t)sh_rng_below(&rng, 500));
    int32_t tokens[10];
    if (r->options.completions_max > 0) {
        for (int32_t k = 0; k < 10; k++)
            tokens[k] = (int32_t)i * 100 + k;
        record->feedback = SH_FEEDBACK_NONE;
        e.completion = (sh_completion_row){
            .id = i + 1,
            .user = 1 + i % 3,
            .session = i / 6,
            .offset = 6 + 5 * (i % 6),
            .n_context = 6,
            .n = 4,
            .tokens = tokens,
        };
    }
    bool happened = rig_step(r, &e);
    r->fed += happened;
    return happened;
}

void rig_teach(rig *r, uint64_t session, uint32_t offset, uint32_t n, bool target)
{
    int32_t tokens[256];
    assert_true(n <= 256);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)(offset + i);
    sh_node_event e = {.kind = SH_NODE_FEEDBACK};
    e.feedback = (sh_feedback){
        .session = session, .offset = offset, .n = n, .tokens = tokens, .target = target};
    while (!rig_step(r, &e))
        continue;
}

bool rig_rate(rig *r, uint64_t id, sh_feedback_kind kind, uint32_t n)
{
    int32_t tokens[256];
    assert_true(n <= 256);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = 7000 + (int32_t)i;
    sh_node_event e = {.kind = SH_NODE_RATING};
    e.rating = (sh_rating){.id = id, .kind = kind, .edit_distance = 3, .n = n, .tokens = tokens};
    return rig_step(r, &e);
}

bool rig_erase(rig *r, uint64_t user)
{
    sh_node_event e = {.kind = SH_NODE_ERASE, .user = user};
    return rig_step(r, &e);
}

void rig_bytes(rig *r, const void *bytes, size_t n)
{
    sh_node_event e = {.kind = SH_NODE_MESSAGE, .message = {bytes, n}};
    (void)rig_step(r, &e);
}

void rig_message(rig *r, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, &test_err));
    rig_bytes(r, bytes.data, bytes.len);
    sh_buf_release(&bytes);
}

/* ---- jobs ---- */

bool rig_job_waits(const rig *r, sh_node_job_kind kind)
{
    for (size_t i = 0; i < r->n_jobs; i++)
        if (r->jobs[i].job.kind == kind)
            return true;
    return false;
}

static sh_status install(rig *r, const sh_node_job *job)
{
    sh_txn *txn = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, 64u << 20);
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    sh_status status = sh_blob_get(txn, SH_NODE_T_CHUNK, &job->blob, &bytes, &test_err);
    if (status == SH_OK)
        r->slots[job->slot] = sh_sha256(bytes.data, bytes.len);
    sh_txn_abort(&txn);
    sh_buf_release(&bytes);
    return status;
}

/* The chunks must be there. */
static void finish_evaluation(rig *r, const sh_node_job *job, sh_node_job_result *result)
{
    sh_txn *txn = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, 64u << 20);
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_blob_get(txn, SH_NODE_T_CHUNK, &job->blob, &bytes, &test_err));
    sh_txn_abort(&txn);
    sh_buf_release(&bytes);
    SAME(job->version, rig_status(r).active_version);
    SAME(job->slot, r->active_slot);
    result->status = r->evaluate_status;
    result->n_slices = r->n_slices;
    memcpy(result->slices, r->slices, sizeof(result->slices));
    r->evaluated = *job;
}

bool rig_finish_job(rig *r, sh_node_job_kind kind)
{
    size_t i = 0;
    while (i < r->n_jobs && r->jobs[i].job.kind != kind)
        i++;
    if (i == r->n_jobs)
        return false;
    rig_job job = r->jobs[i];
    r->jobs[i] = r->jobs[--r->n_jobs];
    sh_node_event e = {.kind = SH_NODE_JOB_DONE, .result = {.id = job.job.id, .text = ""}};
    uint8_t *update = NULL;
    if (kind == SH_JOB_INSTALL) {
        assert_true(job.job.slot != r->active_slot);
        e.result.status = r->install_status != SH_OK ? r->install_status : install(r, &job.job);
    } else if (kind == SH_JOB_SMOKE) {
        e.result.status = r->smoke_status;
        e.result.nll = r->smoke_nll;
    } else if (kind == SH_JOB_EVALUATE) {
        finish_evaluation(r, &job.job, &e.result);
    } else {
        SAME(job.job.version, job.job.train.base_version);
        update = malloc(r->update_bytes + 1);
        assert_non_null(update);
        for (size_t k = 0; k < r->update_bytes; k++)
            update[k] = (uint8_t)(k / 251 + job.job.train.round * 7);
        e.result.status = r->train_status;
        e.result.update = (sh_bytes){update, r->update_bytes};
        e.result.samples = 100;
        e.result.tokens_seen = 200;
        e.result.heldout_before = r->heldout_before;
        e.result.heldout_after = r->heldout_after;
    }
    (void)rig_step(r, &e);
    free(update);
    sh_buf_release(&job.chunks);
    return true;
}

/* ---- time ---- */

static bool deliver_one(rig *r)
{
    if (r->n_packets == 0)
        return false;
    size_t i = r->reorder ? sh_rng_below(&r->net, r->n_packets) : 0;
    rig_packet p = r->packets[i];
    memmove(&r->packets[i], &r->packets[i + 1], (--r->n_packets - i) * sizeof(p));
    if (p.to_node)
        rig_bytes(r, p.bytes.data, p.bytes.len);
    else
        agg_receive(r, p.bytes.data, p.bytes.len);
    sh_buf_release(&p.bytes);
    return true;
}

void rig_run(rig *r, uint64_t ms, bool with_jobs)
{
    uint64_t end = r->now + ms;
    for (unsigned turns = 0; r->now < end; turns++) {
        if (turns > 200000)
            fail_msg("the node never rests: %llu ms", (unsigned long long)r->now);
        if (deliver_one(r))
            continue;
        if (with_jobs && (rig_finish_job(r, SH_JOB_INSTALL) || rig_finish_job(r, SH_JOB_SMOKE) ||
                          rig_finish_job(r, SH_JOB_TRAIN) || rig_finish_job(r, SH_JOB_EVALUATE)))
            continue;
        if (r->timer <= r->now) {
            sh_node_event e = {.kind = SH_NODE_TIMER};
            r->timer = RIG_TIMER_NONE;
            (void)rig_step(r, &e);
            continue;
        }
        r->now = SH_MIN(end, SH_MIN(r->timer, r->coarse ? end : r->now + WAIT_MS));
    }
}

uint64_t rig_count(rig *r, unsigned table)
{
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    uint64_t n = sh_txn_count(txn, table);
    sh_txn_abort(&txn);
    return n;
}

sh_node_status rig_status(const rig *r)
{
    return sh_node_get_status(r->node);
}

static sh_status count_row(void *arg, const sh_ledger_row *row)
{
    rig_ledger *ledger = arg;
    assert_true(row->cls < SH_CLASSES && row->state <= SH_LEDGER_DROPPED);
    ledger->n[row->cls][row->state]++;
    return SH_OK;
}

rig_ledger rig_read_ledger(rig *r)
{
    rig_ledger ledger = {0};
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_each_ledger(txn, count_row, &ledger, &test_err));
    sh_txn_abort(&txn);
    return ledger;
}
