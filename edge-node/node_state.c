/*
 * META "state": magic "SHNS" (4), version (4), the fields of node_state in order, integers
 * little-endian in 4 or 8 bytes, hashes as 32; then the first 16 bytes of BLAKE2b-256 of all that.
 * Version 1 ends before completion_rows.
 * META "epoch": 8 bytes, big-endian. META "monitor": shared/stats' bytes; it lags behind: the
 * records after monitor_seq are counted again from the RECORD table. META "slot0", "slot1", "take":
 * signed manifests. META "candidate": version (1), candidate (8), parent (8), SHA-256 (32),
 * bytes (8), hashes of its chunks (32 each); little-endian.
 */
#include "edge-node/node_internal.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define STATE_VERSION  2u
#define STATE_MAX      1024u
#define CHECKSUM_BYTES 16u

#define CANDIDATE_VERSION 1
#define CANDIDATE_HEAD    57

static const char meta_state[] = "state";
static const char meta_monitor[] = "monitor";
static const char meta_candidate[] = "candidate";
const char node_meta_take[] = "take";
const char node_meta_slot0[] = "slot0";
const char node_meta_slot1[] = "slot1";

/* One walk over the fields both writes and reads them, so that the two cannot differ. */
typedef struct {
    uint8_t *bytes;
    size_t at, n;
    bool writing, bad;
} walk;

static void visit_bytes(walk *w, void *bytes, size_t n)
{
    if (w->n - w->at < n) {
        w->bad = true;
        return;
    }
    if (w->writing)
        memcpy(w->bytes + w->at, bytes, n);
    else
        memcpy(bytes, w->bytes + w->at, n);
    w->at += n;
}

static void visit_uint(walk *w, uint64_t *x, size_t width)
{
    uint64_t le = htole64(*x); /* the low bytes come first */
    visit_bytes(w, &le, width);
    if (w->writing || w->bad)
        return;
    le = width < sizeof(le) ? le & htole64((1ull << (8 * width)) - 1) : le;
    *x = le64toh(le);
}

static void visit_u64(walk *w, uint64_t *x)
{
    visit_uint(w, x, 8);
}

static void visit_u32(walk *w, uint32_t *x)
{
    uint64_t wide = *x;
    visit_uint(w, &wide, 4);
    *x = (uint32_t)wide;
}

static void visit_release(walk *w, node_release *r)
{
    visit_u64(w, &r->version);
    visit_bytes(w, r->sha256.b, sizeof(r->sha256.b));
    visit_u64(w, &r->bytes);
}

static void visit_bool(walk *w, bool *x)
{
    uint32_t wide = *x;
    visit_u32(w, &wide);
    *x = wide != 0;
}

static void visit_state_2(walk *w, node_state *s)
{
    uint64_t *const numbers[] = {
        &s->completion_rows,    &s->completion_bytes,    &s->last_completion,
        &s->last_sync_ms,       &s->erase_user,          &s->erase_feedback_at,
        &s->erase_feedback_end, &s->erase_completion_at, &s->erase_completion_end,
        &s->erased_rows,        &s->evaluated,
    };
    for (size_t i = 0; i < SH_COUNT(numbers); i++)
        visit_u64(w, numbers[i]);
    visit_bool(w, &s->erasing);
    visit_release(w, &s->candidate);
    visit_u32(w, &s->evaluate_tries);
}

static void visit_state(walk *w, uint32_t version, node_state *s)
{
    visit_u64(w, &s->epoch);
    visit_u32(w, &s->active_slot);
    for (int i = 0; i < NODE_SLOTS; i++)
        visit_release(w, &s->slots[i]);
    visit_u64(w, &s->confirmed_version);
    visit_u32(w, &s->healthy);
    visit_u32(w, &s->take);
    visit_u32(w, &s->take_tries);
    visit_release(w, &s->taking);
    for (unsigned i = 0; i < NODE_REFUSED_MAX; i++)
        visit_u64(w, &s->refused[i]);
    visit_u32(w, &s->refused_at);
    visit_u32(w, &s->trained_round);
    visit_u32(w, &s->try_round);
    visit_u32(w, &s->tries);
    uint64_t *const numbers[] = {
        &s->next_job,      &s->record_first,  &s->record_next,     &s->feedback_first,
        &s->feedback_next, &s->feedback_rows, &s->feedback_tokens, &s->feedback_all_tokens,
        &s->window_first,  &s->window_next,   &s->monitor_seq,     &s->window_open_ms,
        &s->inferences,    &s->windows,       &s->alarms,          &s->first_alarm_window,
        &s->updates_made,  &s->updates_acked, &s->bad_messages,
    };
    for (size_t i = 0; i < SH_COUNT(numbers); i++)
        visit_u64(w, numbers[i]);
    visit_u32(w, &s->alarm_mask);
    visit_bool(w, &s->drifting);
    if (version > 1)
        visit_state_2(w, s);
}

static bool state_holds(const node_state *s)
{
    return s->epoch != 0 && s->active_slot < NODE_SLOTS && s->slots[s->active_slot].version > 0 &&
           s->take <= TAKE_SMOKE && (s->take == TAKE_NONE || s->taking.version > 0) &&
           s->refused_at < NODE_REFUSED_MAX && s->record_first <= s->record_next &&
           s->feedback_first <= s->feedback_next && s->window_first <= s->window_next &&
           s->monitor_seq < s->record_next;
}

sh_status node_state_load(sh_txn *txn, node_state *state, sh_error *err)
{
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_NODE_T_META, meta_state, sizeof(meta_state) - 1, &value);
    if (status == SH_ERR_NOT_FOUND)
        return status;
    if (status != SH_OK)
        return sh_fail(err, status, "node state: cannot be read");
    uint8_t bytes[STATE_MAX];
    if (value.n > sizeof(bytes) || value.n < 8 + CHECKSUM_BYTES)
        return sh_fail(err, SH_ERR_CORRUPT, "node state: %zu bytes", value.n);
    memcpy(bytes, value.data, value.n);
    size_t n = value.n - CHECKSUM_BYTES;
    sh_hash sum = sh_blake2b(bytes, n);
    if (memcmp(sum.b, bytes + n, CHECKSUM_BYTES) != 0 || memcmp(bytes, "SHNS", 4) != 0)
        return sh_fail(err, SH_ERR_CORRUPT, "node state: the checksum does not hold");
    walk w = {bytes, 4, n, false, false};
    uint32_t version = 0;
    node_state got = {0};
    visit_u32(&w, &version);
    if (version == 0 || version > STATE_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "node state: version %u, known are 1 to %u",
                       version, STATE_VERSION);
    visit_state(&w, version, &got);
    if (w.bad || w.at != w.n || !state_holds(&got))
        return sh_fail(err, SH_ERR_CORRUPT, "node state: fields do not fit together");
    *state = got;
    return SH_OK;
}

static sh_status save_state(node_step *s)
{
    uint8_t bytes[STATE_MAX] = {'S', 'H', 'N', 'S'};
    walk w = {bytes, 4, sizeof(bytes) - CHECKSUM_BYTES, true, false};
    uint32_t version = STATE_VERSION;
    visit_u32(&w, &version);
    visit_state(&w, version, &s->n->state);
    SH_ASSERT(!w.bad);
    sh_hash sum = sh_blake2b(bytes, w.at);
    memcpy(bytes + w.at, sum.b, CHECKSUM_BYTES);
    return sh_txn_put(s->txn, SH_NODE_T_META, meta_state, sizeof(meta_state) - 1, bytes,
                      w.at + CHECKSUM_BYTES, s->err);
}

static sh_status save_monitor(node_step *s)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_MONITOR_BYTES_MAX);
    sh_status status = sh_monitor_encode(s->n->monitor, &bytes);
    if (status == SH_OK)
        status = sh_txn_put(s->txn, SH_NODE_T_META, meta_monitor, sizeof(meta_monitor) - 1,
                            bytes.data, bytes.len, s->err);
    else
        status = sh_fail(s->err, status, "node: the monitor cannot be encoded");
    sh_buf_release(&bytes);
    if (status != SH_OK)
        return status;
    s->n->state.monitor_seq = s->n->state.record_next - 1;
    s->n->monitor_dirty = false;
    s->n->dirty = true;
    return SH_OK;
}

sh_status node_state_save(node_step *s)
{
    sh_node *n = s->n;
    uint64_t behind = n->state.record_next - 1 - n->state.monitor_seq;
    if (n->monitor_dirty || behind >= SH_MIN((uint64_t)NODE_MONITOR_SAVE, node_records_max(n)))
        SH_TRY(save_monitor(s));
    if (!n->dirty)
        return SH_OK;
    n->dirty = false;
    return save_state(s);
}

/* The monitor as it was at monitor_seq, then the records since. None of them closed a window, or
 * the monitor would have been saved with it; but the configuration may ask for smaller ones now. */
sh_status node_monitor_load(node_step *s)
{
    sh_node *n = s->n;
    sh_slice value;
    if (sh_txn_get(s->txn, SH_NODE_T_META, meta_monitor, sizeof(meta_monitor) - 1, &value) != SH_OK)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node: the monitor is missing from the store");
    SH_TRY(sh_monitor_decode(&n->options.monitor, value.data, value.n, &n->monitor, s->err));
    for (uint64_t seq = n->state.monitor_seq + 1; seq < n->state.record_next; seq++) {
        uint8_t key[8];
        sh_record record;
        sh_window_result closed;
        sh_key_put_u64(key, seq);
        if (sh_txn_get(s->txn, SH_NODE_T_RECORD, key, sizeof(key), &value) != SH_OK)
            return sh_fail(s->err, SH_ERR_CORRUPT, "node: record %llu is missing from the store",
                           (unsigned long long)seq);
        SH_TRY(sh_record_decode(value.data, value.n, &record, s->err));
        if (sh_monitor_add(n->monitor, &record, &closed))
            SH_TRY(node_take_window(s, &closed));
    }
    return SH_OK;
}

sh_status sh_node_stored_epoch(sh_txn *txn, uint64_t *epoch, sh_error *err)
{
    sh_status status = sh_link_stored_epoch(txn, SH_NODE_T_META, epoch, err);
    return status == SH_ERR_NOT_FOUND ? sh_fail(err, status, "no node was made in this store")
                                      : status;
}

sh_status sh_node_stored_active(sh_txn *txn, uint64_t *version, uint32_t *slot, sh_error *err)
{
    node_state state = {0};
    sh_status status = node_state_load(txn, &state, err);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "no node was made in this store");
    SH_TRY(status);
    *slot = state.active_slot;
    *version = state.slots[state.active_slot].version;
    return SH_OK;
}

sh_status sh_node_stored_origin(sh_txn *txn, uint64_t *epoch, sh_error *err)
{
    node_state state = {0};
    sh_status status = node_state_load(txn, &state, err);
    if (status != SH_OK)
        return status == SH_ERR_NOT_FOUND ? sh_fail(err, status, "no node was made in this store")
                                          : status;
    *epoch = state.epoch;
    return SH_OK;
}

sh_status node_manifest_put(node_step *s, const char *key, sh_bytes manifest)
{
    return sh_txn_put(s->txn, SH_NODE_T_META, key, strlen(key), manifest.data, manifest.n, s->err);
}

sh_status node_manifest_del(node_step *s, const char *key)
{
    return sh_txn_del(s->txn, SH_NODE_T_META, key, strlen(key), s->err);
}

sh_status node_manifest_verify(sh_node *n, sh_bytes bytes, sh_manifest *out, sh_error *err)
{
    sh_hash hash = sh_blake2b(bytes.data, bytes.n);
    if (sh_hash_equal(&hash, &n->verified))
        return sh_manifest_decode(bytes.data, bytes.n, out, err);
    SH_TRY(sh_manifest_verify(bytes.data, bytes.n, &n->options.release_key, out, err));
    n->verified = hash;
    return SH_OK;
}

sh_status node_manifest_take(node_step *s, sh_buf *copy, sh_manifest *out)
{
    const node_release *taking = &s->n->state.taking;
    sh_slice value;
    sh_error why = {0};
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, node_meta_take, strlen(node_meta_take), &value);
    sh_buf_init(copy, NODE_MANIFEST_MAX);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "node: the manifest being taken cannot be read");
    if (status == SH_ERR_NOT_FOUND || value.n > NODE_MANIFEST_MAX)
        return SH_ERR_NOT_FOUND;
    if (sh_buf_append(copy, value.data, value.n) != SH_OK)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: manifest of %zu bytes", value.n);
    status = node_manifest_verify(s->n, (sh_bytes){copy->data, copy->len}, out, &why);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", why.text);
    bool same = status == SH_OK && out->version == taking->version &&
                sh_hash_equal(&out->model.sha256, &taking->sha256);
    return same ? SH_OK : SH_ERR_NOT_FOUND;
}

sh_status sh_node_get_slot(sh_txn *txn, uint32_t slot, sh_bytes *manifest, sh_error *err)
{
    const char *key = slot == 0 ? node_meta_slot0 : node_meta_slot1;
    sh_slice value;
    SH_ASSERT(slot < NODE_SLOTS);
    sh_status status = sh_txn_get(txn, SH_NODE_T_META, key, strlen(key), &value);
    if (status != SH_OK)
        return sh_fail(err, status, "no release lies in slot %u", slot);
    *manifest = (sh_bytes){value.data, value.n};
    return SH_OK;
}

sh_status node_candidate_put(node_step *s, const sh_evaluate_plan *plan)
{
    size_t hashes = (size_t)plan->model.n_chunks * sizeof(sh_hash);
    uint8_t *value = sh_calloc(1, CANDIDATE_HEAD + hashes);
    if (value == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: a candidate of %u chunks",
                       plan->model.n_chunks);
    value[0] = CANDIDATE_VERSION;
    node_put_le(value + 1, plan->candidate, 8);
    node_put_le(value + 9, plan->parent_version, 8);
    memcpy(value + 17, plan->model.sha256.b, sizeof(sh_hash));
    node_put_le(value + 49, plan->model.bytes, 8);
    memcpy(value + CANDIDATE_HEAD, plan->model.chunk_hashes, hashes);
    sh_status status =
        sh_txn_put(s->txn, SH_NODE_T_META, meta_candidate, sizeof(meta_candidate) - 1, value,
                   CANDIDATE_HEAD + hashes, s->err);
    free(value);
    return status;
}

sh_status node_candidate_del(node_step *s)
{
    return sh_txn_del(s->txn, SH_NODE_T_META, meta_candidate, sizeof(meta_candidate) - 1, s->err);
}

sh_status node_candidate_load(node_step *s, sh_buf *copy, sh_evaluate_plan *out)
{
    sh_slice value;
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, meta_candidate, sizeof(meta_candidate) - 1, &value);
    sh_buf_init(copy, SH_BLOB_CHUNKS_MAX * sizeof(sh_hash));
    if (status != SH_OK)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node: the candidate is missing");
    const uint8_t *p = value.data;
    if (value.n < CANDIDATE_HEAD || p[0] != CANDIDATE_VERSION ||
        (value.n - CANDIDATE_HEAD) % sizeof(sh_hash) != 0)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node: a candidate of %zu bytes", value.n);
    if (sh_buf_append(copy, p + CANDIDATE_HEAD, value.n - CANDIDATE_HEAD) != SH_OK)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: a candidate of %zu bytes", value.n);
    *out = (sh_evaluate_plan){
        .candidate = node_get_le(p + 1, 8),
        .parent_version = node_get_le(p + 9, 8),
        .model = {.bytes = node_get_le(p + 49, 8),
                  .n_chunks = (uint32_t)(copy->len / sizeof(sh_hash)),
                  .chunk_hashes = copy->data},
    };
    memcpy(out->model.sha256.b, p + 17, sizeof(sh_hash));
    return SH_OK;
}
