/*
 * META "state": magic "SHNS" (4), version (4), the fields of node_state in order, integers
 * little-endian in 4 or 8 bytes, hashes as 32; then the first 16 bytes of BLAKE2b-256 of all that.
 * META "epoch": 8 bytes, big-endian. META "monitor": shared/stats' bytes; it lags behind: the
 * records after monitor_seq are counted again from the RECORD table. META "slot0", "slot1", "take":
 * signed manifests.
 */
#include "edge-node/node_internal.h"

#include <string.h>

#define STATE_VERSION  1u
#define STATE_MAX      1024u
#define CHECKSUM_BYTES 16u

static const char meta_state[] = "state";
static const char meta_epoch[] = "epoch";
static const char meta_monitor[] = "monitor";
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
    uint8_t b[8] = {0};
    for (size_t i = 0; i < width; i++)
        b[i] = (uint8_t)(*x >> (8 * i));
    visit_bytes(w, b, width);
    if (w->writing || w->bad)
        return;
    *x = 0;
    for (size_t i = 0; i < width; i++)
        *x |= (uint64_t)b[i] << (8 * i);
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

static void visit_state(walk *w, node_state *s)
{
    uint32_t drifting = s->drifting;
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
    visit_u32(w, &drifting);
    s->drifting = drifting != 0;
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
    if (version != STATE_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "node state: version %u, known is %u", version,
                       STATE_VERSION);
    visit_state(&w, &got);
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
    visit_state(&w, &s->n->state);
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
    if (n->monitor_dirty || behind >= SH_MIN((uint64_t)NODE_MONITOR_SAVE, n->options.records_max))
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

sh_status node_epoch_save(node_step *s)
{
    uint8_t value[8];
    sh_key_put_u64(value, s->n->state.epoch);
    return sh_txn_put(s->txn, SH_NODE_T_META, meta_epoch, sizeof(meta_epoch) - 1, value,
                      sizeof(value), s->err);
}

sh_status sh_node_stored_epoch(sh_txn *txn, uint64_t *epoch, sh_error *err)
{
    sh_slice value;
    sh_status status = sh_txn_get(txn, SH_NODE_T_META, meta_epoch, sizeof(meta_epoch) - 1, &value);
    if (status != SH_OK)
        return sh_fail(err, status, "no node was made in this store");
    if (value.n != 8)
        return sh_fail(err, SH_ERR_CORRUPT, "node epoch: %zu bytes, not 8", value.n);
    *epoch = sh_key_get_u64(value.data);
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

sh_status node_manifest_take(node_step *s, sh_buf *copy, sh_manifest *out)
{
    sh_slice value;
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, node_meta_take, strlen(node_meta_take), &value);
    if (status != SH_OK)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node: the manifest being taken is missing");
    sh_buf_init(copy, NODE_MANIFEST_MAX);
    if (sh_buf_append(copy, value.data, value.n) != SH_OK)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "node: manifest of %zu bytes", value.n);
    return sh_manifest_verify(copy->data, copy->len, &s->n->options.release_key, out, s->err);
}
