/*
 * What a node's thread sees: its outbox, its releases, its limits.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/world/oracle_internal.h"

#define NOTE(w, i, rule, at, ...) oracle_note(&(w)->notes, rule, at, i, __VA_ARGS__)

static oracle_node *node_of(world_oracle *o, uint32_t node)
{
    SH_ASSERT(node < o->options.nodes);
    return &o->nodes[node];
}

void world_oracle_node_lies(world_oracle *o, uint32_t node)
{
    node_of(o, node)->lies = true;
}

void world_oracle_node_replaced(world_oracle *o, uint32_t node, uint64_t at_ms)
{
    oracle_node *w = node_of(o, node);
    (void)at_ms;
    w->replaced++;
    w->use = (oracle_use){.quiets = w->use.quiets};
    w->begun = false;
    w->counts_n = 0;
    w->n_owed = 0; /* what is gone was acknowledged; that is judged at the next join still */
    w->version = 0;
}

void world_oracle_node_slot(world_oracle *o, uint32_t node, uint32_t slot, const sh_hash *sha256)
{
    SH_ASSERT(slot < 2);
    node_of(o, node)->slot[slot] = *sha256;
}

void world_oracle_node_inference(world_oracle *o, uint32_t node, uint64_t at_ms,
                                 world_inference what)
{
    oracle_node *w = node_of(o, node);
    w->seen.inferences_taken += what == WORLD_INFERENCE_TAKEN;
    w->seen.inferences_full += what == WORLD_INFERENCE_FULL;
    if (what == WORLD_INFERENCE_LOST)
        NOTE(w, node, WORLD_RULE_INFERENCE, at_ms, "an inference was neither taken nor counted");
}

void world_oracle_node_failed(world_oracle *o, uint32_t node, uint64_t at_ms, sh_status status,
                              const char *text, bool excused)
{
    if (!excused)
        NOTE(node_of(o, node), node, WORLD_RULE_CORE, at_ms, "%s: %s", sh_status_name(status),
             text);
}

/* ---- the outbox ---- */

typedef struct {
    oracle_owed *rows; /* as they are now; owned */
    size_t n, cap;
} outbox_rows;

/* The rows of the outbox, as shared/sync/outbox.c describes their bytes. */
static bool read_rows(sh_txn *txn, const oracle_node *w, outbox_rows *out)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    if (sh_cursor_open(txn, SH_NODE_T_OUTBOX, &cursor, NULL) != SH_OK)
        return false;
    bool good = true;
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    for (; status == SH_OK && good; status = sh_cursor_next(cursor, &key, &value)) {
        const uint8_t *k = key.data, *v = value.data;
        good = key.n == 9 && value.n >= 9 && k[0] < SH_CLASSES;
        if (!good)
            break;
        oracle_owed row = {.cls = k[0], .seq = sh_key_get_u64(k + 1), .kind = v[0]};
        for (int i = 7; i >= 0; i--)
            row.last_seq = row.last_seq << 8 | v[1 + i];
        /* An item that was there keeps its content: only new ones are hashed. */
        if (row.kind != SH_ITEM_TOMBSTONE && (!w->begun || row.seq >= w->now.next_seq[row.cls]))
            row.hash = oracle_item_hash(row.cls, v + 9, value.n - 9);
        oracle_grow((void **)&out->rows, &out->cap, out->n, sizeof row);
        out->rows[out->n++] = row;
    }
    sh_cursor_close(&cursor);
    return good && status == SH_ERR_NOT_FOUND;
}

static int owed_order(const oracle_owed *a, const oracle_owed *b)
{
    if (a->cls != b->cls)
        return a->cls < b->cls ? -1 : 1;
    return (a->seq > b->seq) - (a->seq < b->seq);
}

static const oracle_owed *tombstone_of(const outbox_rows *now, uint8_t cls)
{
    for (size_t i = 0; i < now->n; i++)
        if (now->rows[i].cls == cls && now->rows[i].kind == SH_ITEM_TOMBSTONE)
            return &now->rows[i];
    return NULL;
}

static bool is_buried(const oracle_owed *tombstone, uint64_t seq)
{
    return tombstone && seq >= tombstone->seq && seq <= tombstone->last_seq;
}

static void gone(oracle_node *w, uint64_t hash, uint64_t at_ms)
{
    oracle_grow((void **)&w->gone, &w->gone_cap, w->n_gone, sizeof *w->gone);
    w->gone[w->n_gone++] = (oracle_gone){.hash = hash, .at_ms = at_ms};
}

static uint64_t make_once_more(oracle_node *w, uint64_t hash)
{
    const uint64_t *made = oracle_map_find(&w->made, hash);
    uint64_t times = made ? *made + 1 : 1;
    oracle_map_put(&w->made, hash, times);
    return times;
}

/* A store that was set back closes its window again, and answers for a candidate again: once for
 * each time that it was. No update is trained twice, and no other store makes anything twice. */
static void check_made(oracle_node *w, uint32_t i, uint64_t at_ms, const oracle_owed *row,
                       uint64_t times)
{
    if (times > 1 && (row->kind == SH_ITEM_UPDATE || times > 1 + (uint64_t)w->replaced))
        NOTE(w, i, WORLD_RULE_ONCE, at_ms, "item %llu of class %u is what it had made before",
             (unsigned long long)row->seq, row->cls);
}

/* What was there and is not any more, and what was made since; dropped[c]: by a tombstone. */
static void compare(oracle_node *w, uint32_t i, uint64_t at_ms, outbox_rows *now,
                    const sh_outbox_counts *counts, uint64_t dropped[SH_CLASSES])
{
    size_t at = 0;
    for (size_t k = 0; k < w->n_owed; k++) {
        const oracle_owed *was = &w->owed[k];
        while (at < now->n && owed_order(&now->rows[at], was) < 0)
            at++;
        bool there = at < now->n && owed_order(&now->rows[at], was) == 0;
        if (was->kind == SH_ITEM_TOMBSTONE)
            continue;
        if (there && now->rows[at].kind != SH_ITEM_TOMBSTONE) {
            now->rows[at].hash = was->hash;
            continue;
        }
        if (is_buried(tombstone_of(now, was->cls), was->seq)) {
            dropped[was->cls]++;
            oracle_map_put(&w->dropped, was->hash, at_ms + 1);
        } else {
            gone(w, was->hash, at_ms);
        }
    }
    at = 0;
    for (uint8_t cls = 0; cls < SH_CLASSES; cls++) {
        const oracle_owed *tombstone = tombstone_of(now, cls);
        for (uint64_t seq = w->now.next_seq[cls]; seq < counts->next_seq[cls]; seq++) {
            oracle_owed want = {.cls = cls, .seq = seq};
            while (at < now->n && owed_order(&now->rows[at], &want) < 0)
                at++;
            w->seen.items_made++;
            if (at < now->n && owed_order(&now->rows[at], &want) == 0 &&
                now->rows[at].kind != SH_ITEM_TOMBSTONE)
                check_made(w, i, at_ms, &now->rows[at], make_once_more(w, now->rows[at].hash));
            else if (is_buried(tombstone, seq))
                dropped[cls]++;
            else
                NOTE(w, i, WORLD_RULE_OUTBOX, at_ms,
                     "item %llu of class %u was made and is nowhere", (unsigned long long)seq, cls);
        }
    }
}

static void check_counts(world_oracle *o, oracle_node *w, uint32_t i, uint64_t at_ms,
                         const outbox_rows *now, const sh_outbox_counts *counts)
{
    uint64_t items[SH_CLASSES] = {0};
    for (size_t k = 0; k < now->n; k++)
        items[now->rows[k].cls]++;
    for (int cls = 0; cls < SH_CLASSES; cls++) {
        if (items[cls] != counts->items[cls])
            NOTE(w, i, WORLD_RULE_OUTBOX, at_ms, "class %d: %llu items are counted, %llu are there",
                 cls, (unsigned long long)counts->items[cls], (unsigned long long)items[cls]);
        uint64_t quota = o->options.node ? o->options.node->outbox_quota_bytes[cls] : 0;
        if (quota && counts->bytes[cls] > quota + ORACLE_TOMBSTONE_MAX)
            NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "class %d: %llu bytes in an outbox of %llu", cls,
                 (unsigned long long)counts->bytes[cls], (unsigned long long)quota);
    }
}

/* A store that begins anew, or is another's: what lies in it is where it begins. What the other
 * made is not made again; it lives in the same thread. */
static void take_as_it_is(const world_oracle *o, oracle_node *w, const outbox_rows *now)
{
    const oracle_watch *watch = w->watch == UINT32_MAX ? NULL : &o->watches[w->watch];
    for (size_t k = 0; k < now->n; k++)
        if (now->rows[k].kind != SH_ITEM_TOMBSTONE &&
            (!watch || oracle_times_made(o, watch, now->rows[k].hash) == 0))
            (void)make_once_more(w, now->rows[k].hash);
}

void oracle_node_scan(world_oracle *o, uint32_t node, uint64_t at_ms, sh_store *store, bool full)
{
    oracle_node *w = node_of(o, node);
    sh_txn *txn = NULL;
    sh_slice bytes = {0};
    sh_outbox_counts counts;
    const sh_outbox outbox = {.table = SH_NODE_T_OUTBOX, .meta_table = SH_NODE_T_META};
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return; /* it cannot be read now: the shell will find out */
    sh_status status =
        sh_txn_get(txn, SH_NODE_T_META, SH_OUTBOX_META_KEY, sizeof(SH_OUTBOX_META_KEY) - 1, &bytes);
    size_t n = status == SH_OK ? bytes.n : 0;
    SH_ASSERT(n <= sizeof w->counts);
    if (!full && w->begun && n == w->counts_n && (n == 0 || !memcmp(bytes.data, w->counts, n))) {
        sh_txn_abort(&txn);
        return; /* nothing was made, nothing is gone */
    }
    if (n > 0)
        memcpy(w->counts, bytes.data, n);
    w->counts_n = n;
    outbox_rows now = {0};
    bool good =
        read_rows(txn, w, &now) && sh_outbox_get_counts(&outbox, txn, &counts, NULL) == SH_OK;
    oracle_check_rings(o, w, node, at_ms, txn);
    sh_txn_abort(&txn);
    if (!good) {
        NOTE(w, node, WORLD_RULE_OUTBOX, at_ms, "the outbox cannot be read");
        free(now.rows);
        return;
    }
    uint64_t dropped[SH_CLASSES] = {0};
    if (w->begun)
        compare(w, node, at_ms, &now, &counts, dropped);
    else
        take_as_it_is(o, w, &now);
    for (int cls = 0; cls < SH_CLASSES && w->begun; cls++) {
        uint64_t counted = counts.dropped[cls] - w->now.dropped[cls];
        w->seen.items_dropped += dropped[cls];
        if (counted != dropped[cls])
            NOTE(w, node, WORLD_RULE_OUTBOX, at_ms,
                 "class %d: %llu items were dropped, %llu are counted", cls,
                 (unsigned long long)dropped[cls], (unsigned long long)counted);
    }
    check_counts(o, w, node, at_ms, &now, &counts);
    free(w->owed);
    w->owed = now.rows;
    w->n_owed = now.n;
    w->owed_cap = now.cap;
    w->now = counts;
    w->begun = true;
}

/* ---- releases ---- */

/* The active slot's manifest is, byte for byte, one that was published and whose signature holds (a
 * join finds that out), and its file is what the manifest says. */
static void check_active(oracle_node *w, uint32_t i, uint64_t at_ms, uint32_t slot,
                         uint64_t version, sh_store *store)
{
    sh_txn *txn = NULL;
    sh_bytes signed_bytes;
    sh_manifest manifest;
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return;
    sh_status status = sh_node_get_slot(txn, slot, &signed_bytes, NULL);
    if (status == SH_OK)
        status = sh_manifest_decode(signed_bytes.data, signed_bytes.n, &manifest, NULL);
    if (status != SH_OK) {
        NOTE(w, i, WORLD_RULE_MODEL, at_ms, "release %llu is active, its manifest: %s",
             (unsigned long long)version, sh_status_name(status));
    } else if (manifest.version != version) {
        NOTE(w, i, WORLD_RULE_MODEL, at_ms, "release %llu is active in slot %u, which holds %llu",
             (unsigned long long)version, slot, (unsigned long long)manifest.version);
    } else {
        oracle_grow((void **)&w->active, &w->active_cap, w->n_active, sizeof *w->active);
        w->active[w->n_active++] =
            (oracle_active){version, oracle_hash(signed_bytes.data, signed_bytes.n), at_ms};
        if (!sh_hash_equal(&manifest.model.sha256, &w->slot[slot]))
            NOTE(w, i, WORLD_RULE_MODEL, at_ms,
                 "release %llu is active, and its file is not what the manifest says",
                 (unsigned long long)version);
        w->version_sha = manifest.model.sha256;
        w->version_slot = slot;
    }
    sh_txn_abort(&txn);
    w->seen.activations++;
}

static bool was_refused(const sh_node_actions *actions)
{
    for (size_t k = 0; actions && k < actions->n; k++)
        if (actions->items[k].kind == SH_NODE_NOTE &&
            actions->items[k].note == SH_NOTE_RELEASE_REFUSED)
            return true;
    return false;
}

/* actions NULL: a boot. */
static void check_version(oracle_node *w, uint32_t i, uint64_t at_ms,
                          const sh_node_actions *actions, const sh_node *core, sh_store *store)
{
    sh_node_status status = sh_node_get_status(core);
    if (status.active_version == w->version && actions)
        return;
    /* Back is right when the release was found unhealthy, or its file is lost. */
    bool lost = !sh_hash_equal(&w->version_sha, &w->slot[w->version_slot]);
    if (status.active_version < w->version && !was_refused(actions) && !lost)
        NOTE(w, i, WORLD_RULE_VERSION, at_ms, "the active release goes from %llu back to %llu",
             (unsigned long long)w->version, (unsigned long long)status.active_version);
    bool tried = w->use.tried == status.active_version || w->use.tried == ORACLE_ANY;
    if (actions && status.active_version > w->version && !tried)
        NOTE(w, i, WORLD_RULE_MODEL, at_ms, "release %llu is active, which was not tried",
             (unsigned long long)status.active_version);
    bool slot_lost = actions == NULL; /* the shell opens the file first, and tells of a bad one */
    w->version = status.active_version;
    if (status.active_version != 0 &&
        (!slot_lost || !sh_hash_is_zero(&w->slot[status.active_slot])))
        check_active(w, i, at_ms, status.active_slot, status.active_version, store);
}

static void check_limits(world_oracle *o, oracle_node *w, uint32_t i, uint64_t at_ms,
                         const sh_node_actions *actions, sh_store *store)
{
    uint64_t used = sh_store_bytes_used(store), most = o->options.store_bytes_max;
    if (most && used > most)
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "its store has %llu bytes of %llu",
             (unsigned long long)used, (unsigned long long)most);
    if (actions && actions->n > SH_NODE_ACTIONS_MAX)
        NOTE(w, i, WORLD_RULE_LIMIT, at_ms, "a step has %zu actions", actions->n);
}

void world_oracle_node_boot(world_oracle *o, uint32_t node, uint64_t at_ms, const sh_node *core,
                            sh_store *store)
{
    oracle_node *w = node_of(o, node);
    if (!w->watched)
        return;
    oracle_node_scan(o, node, at_ms, store, true);
    check_version(w, node, at_ms, NULL, core, store);
    check_limits(o, w, node, at_ms, NULL, store);
    oracle_check_use(o, node, at_ms, NULL, NULL, core);
}

void world_oracle_node_step(world_oracle *o, uint32_t node, uint64_t at_ms,
                            const sh_node_event *event, const sh_node_actions *actions,
                            const sh_node *core, sh_store *store)
{
    oracle_node *w = node_of(o, node);
    w->seen.node_steps++;
    if (!w->watched)
        return;
    oracle_node_scan(o, node, at_ms, store, false);
    oracle_see_jobs(&w->use, event, actions);
    check_version(w, node, at_ms, actions, core, store);
    check_limits(o, w, node, at_ms, actions, store);
    oracle_check_use(o, node, at_ms, event, actions, core);
}
