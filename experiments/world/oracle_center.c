/*
 * What the aggregator's thread sees: what came, what it promised, what its store holds.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/world/oracle_internal.h"

#define BITMAP_BITS            (64u * SH_ACK_BITMAP_WORDS)
#define NOTE(o, rule, at, ...) oracle_note(&(o)->center, rule, at, WORLD_AGGREGATOR, __VA_ARGS__)

oracle_watch *oracle_watch_of(world_oracle *o, const sh_hash *key)
{
    const uint64_t *at = oracle_map_find(&o->keys, oracle_hash(key->b, sizeof key->b));
    return at ? &o->watches[*at] : NULL;
}

bool oracle_covers(const sh_msg_ack *ack, uint64_t seq)
{
    if (seq <= ack->high_water)
        return true;
    uint64_t bit = seq - ack->high_water - 1;
    return bit < BITMAP_BITS && (ack->bitmap[bit / 64] >> (bit % 64) & 1);
}

/* The first sequence that `part` has and `whole` has not, 0: none. */
static uint64_t first_missing(const sh_msg_ack *part, const sh_msg_ack *whole)
{
    if (whole->high_water < part->high_water)
        return whole->high_water + 1; /* never covered: the mark would be higher */
    for (uint64_t bit = 0; bit < BITMAP_BITS; bit++)
        if (part->bitmap[bit / 64] >> (bit % 64) & 1 &&
            !oracle_covers(whole, part->high_water + 1 + bit))
            return part->high_water + 1 + bit;
    return 0;
}

static oracle_line *line_of(oracle_watch *w, uint64_t epoch, uint8_t cls)
{
    for (size_t i = w->n_lines; i-- > 0;)
        if (w->lines[i].epoch == epoch && w->lines[i].cls == cls)
            return &w->lines[i];
    oracle_grow((void **)&w->lines, &w->lines_cap, w->n_lines, sizeof *w->lines);
    w->lines[w->n_lines] = (oracle_line){.epoch = epoch, .cls = cls};
    return &w->lines[w->n_lines++];
}

/* Takes over what a says beside what is known; both are of one line. */
static void join_acks(sh_msg_ack *known, const sh_msg_ack *a)
{
    sh_msg_ack all = a->high_water >= known->high_water ? *a : *known;
    const sh_msg_ack *other = a->high_water >= known->high_water ? known : a;
    for (uint64_t bit = 0; bit < BITMAP_BITS; bit++) {
        uint64_t seq = other->high_water + 1 + bit;
        if (!(other->bitmap[bit / 64] >> (bit % 64) & 1) || seq <= all.high_water)
            continue;
        uint64_t at = seq - all.high_water - 1; /* at most bit: all's mark is not below */
        all.bitmap[at / 64] |= UINT64_C(1) << (at % 64);
    }
    *known = all;
}

/* ---- items ---- */

static bool same_id(const oracle_arrival *a, const oracle_arrival *b)
{
    return a->epoch == b->epoch && a->cls == b->cls && a->seq == b->seq;
}

/* A tombstone named it: the node gave it up, and its mark may be the tombstone's. */
static bool was_named(const oracle_line *line, uint64_t seq)
{
    for (size_t i = 0; i < line->n_ranges; i++)
        if (line->ranges[i].first <= seq && seq <= line->ranges[i].last)
            return true;
    return false;
}

static void name_range(oracle_line *line, uint64_t first, uint64_t last)
{
    for (size_t i = line->n_ranges; i-- > 0;) { /* with those that it meets it is one */
        oracle_range *r = &line->ranges[i];
        if (r->last < first || last < r->first)
            continue;
        first = SH_MIN(first, r->first);
        last = SH_MAX(last, r->last);
        *r = line->ranges[--line->n_ranges];
    }
    if (line->n_ranges >= ORACLE_RANGES_MAX)
        line->n_ranges = 0; /* a liar's; what is honest comes again */
    oracle_grow((void **)&line->ranges, &line->ranges_cap, line->n_ranges, sizeof *line->ranges);
    line->ranges[line->n_ranges++] = (oracle_range){first, last};
}

/* Of one (node, epoch) the last rows are kept: was the place of this one's taken? */
static bool was_replaced(const world_oracle *o, const oracle_watch *w, const oracle_arrival *a,
                         sh_txn *txn)
{
    uint32_t kept = o->options.node_items_max;
    sh_msg_ack rows;
    return a->kind != SH_ITEM_UPDATE &&
           sh_inbox_get_ack(txn, SH_COORD_T_INBOX, &w->key, a->epoch, a->cls, &rows, NULL) ==
               SH_OK &&
           oracle_covers(&rows, a->seq + (kept ? kept : ORACLE_ITEMS_KEPT));
}

void oracle_row_key(uint8_t key[ORACLE_ROW_KEY], const sh_update_id *id)
{
    memcpy(key, id->node.b, sizeof id->node.b);
    sh_key_put_u64(key + 32, id->epoch);
    sh_key_put_u64(key + 40, id->seq);
}

uint64_t oracle_id_hash(const sh_update_id *id)
{
    uint8_t key[ORACLE_ROW_KEY];
    oracle_row_key(key, id);
    return oracle_hash(key, sizeof key);
}

/* Looks at the row that an item of this kind must have left, as coordinator.h describes the tables.
 * false: the item itself was not taken, a tombstone was in its place. */
static bool check_row(world_oracle *o, oracle_watch *w, const oracle_arrival *a, uint64_t at_ms,
                      sh_txn *txn)
{
    uint8_t key[ORACLE_ROW_KEY];
    sh_slice value;
    oracle_row_key(key, &(sh_update_id){.node = w->key, .epoch = a->epoch, .seq = a->seq});
    unsigned table = a->kind == SH_ITEM_UPDATE   ? SH_COORD_T_UPDATE
                     : a->kind == SH_ITEM_ALARM  ? SH_COORD_T_ALARM
                     : a->kind == SH_ITEM_WINDOW ? SH_COORD_T_WINDOW
                                                 : SH_COORD_TABLES;
    if (table == SH_COORD_TABLES)
        return true; /* an evaluation counts for its candidate, which may be decided */
    sh_status status = sh_txn_get(txn, table, key, sizeof key, &value);
    if (status == SH_ERR_NOT_FOUND && was_replaced(o, w, a, txn))
        return true;
    if (status == SH_ERR_NOT_FOUND && was_named(line_of(w, a->epoch, a->cls), a->seq))
        return false;
    if (status != SH_OK)
        NOTE(o, WORLD_RULE_DURABLE, at_ms, "item %llu of class %u is acknowledged, its row: %s",
             (unsigned long long)a->seq, a->cls, sh_status_name(status));
    else if (table != SH_COORD_T_UPDATE && oracle_item_hash(a->cls, value.data, value.n) != a->hash)
        NOTE(o, WORLD_RULE_CONTENT, at_ms, "item %llu of class %u is not kept as it came",
             (unsigned long long)a->seq, a->cls);
    return true;
}

static void commit(world_oracle *o, oracle_watch *w, const oracle_arrival *a, uint64_t at_ms,
                   sh_txn *txn)
{
    if (!w->lies && !check_row(o, w, a, at_ms, txn))
        return;
    o->seen.items_committed++;
    if (w->lies)
        return;
    if (!oracle_map_find(&w->committed, a->hash))
        oracle_map_put(&w->committed, a->hash, at_ms + 1);
    oracle_grow((void **)&o->commits, &o->commits_cap, o->n_commits, sizeof *o->commits);
    o->commits[o->n_commits++] = (oracle_commit){(uint32_t)(w - o->watches), at_ms, *a};
    if (a->kind == SH_ITEM_EVALUATION || a->kind == SH_ITEM_TOMBSTONE)
        return;
    oracle_grow((void **)&w->stored, &w->stored_cap, w->n_stored, sizeof *a);
    w->stored[w->n_stored++] = *a;
}

/* An item was stepped: once the store's marks cover it, it is committed, be it that the process
 * died with the commit and nobody was told. */
static void expect(oracle_watch *w, const sh_msg_item *item)
{
    const oracle_line *line = line_of(w, item->epoch, item->cls);
    oracle_arrival a = {.epoch = item->epoch,
                        .seq = item->seq,
                        .cls = item->cls,
                        .kind = item->kind,
                        .hash = oracle_item_hash(item->cls, item->payload.data, item->payload.n)};
    sh_update_meta meta;
    if (oracle_covers(&line->rows, item->seq))
        return;
    if (item->kind == SH_ITEM_UPDATE &&
        sh_update_meta_decode(item->payload.data, item->payload.n, &meta, NULL) == SH_OK)
        a.blob = oracle_hash(meta.blob.sha256.b, sizeof meta.blob.sha256.b);
    for (size_t i = 0; i < w->n_arrivals; i++)
        if (same_id(&w->arrivals[i], &a)) {
            w->arrivals[i] = a;
            return;
        }
    if (w->n_arrivals >= ORACLE_ARRIVALS_MAX)
        w->n_arrivals = 0; /* a liar's; what is honest comes again */
    oracle_grow((void **)&w->arrivals, &w->arrivals_cap, w->n_arrivals, sizeof a);
    w->arrivals[w->n_arrivals++] = a;
}

/* Reads the line's marks: they hold all that was promised, and what they had before. What came and
 * is covered by now was committed. */
static void look(world_oracle *o, oracle_watch *w, oracle_line *line, uint64_t at_ms, sh_txn *txn)
{
    sh_msg_ack rows;
    sh_error err = {0};
    if (sh_inbox_get_ack(txn, SH_COORD_T_INBOX, &w->key, line->epoch, line->cls, &rows, &err) !=
        SH_OK) {
        NOTE(o, WORLD_RULE_DURABLE, at_ms, "marks of class %u: %s", line->cls, err.text);
        return;
    }
    uint64_t seq = first_missing(&line->promised, &rows);
    if (seq != 0) {
        NOTE(o, WORLD_RULE_DURABLE, at_ms,
             "item %llu of class %u, epoch %016llx, was acknowledged and is not in the store",
             (unsigned long long)seq, line->cls, (unsigned long long)line->epoch);
        line->promised = rows; /* told once */
    } else if ((seq = first_missing(&line->rows, &rows)) != 0) {
        NOTE(o, WORLD_RULE_DURABLE, at_ms,
             "item %llu of class %u, epoch %016llx, was marked and is not any more",
             (unsigned long long)seq, line->cls, (unsigned long long)line->epoch);
    }
    line->rows = rows;
    for (size_t i = w->n_arrivals; i-- > 0;) {
        oracle_arrival a = w->arrivals[i];
        if (a.epoch != line->epoch || a.cls != line->cls || !oracle_covers(&rows, a.seq))
            continue;
        w->arrivals[i] = w->arrivals[--w->n_arrivals];
        commit(o, w, &a, at_ms, txn);
    }
}

void oracle_check_promises(world_oracle *o, uint64_t at_ms, sh_txn *txn)
{
    for (size_t i = 0; i < o->n_watches; i++)
        for (size_t k = 0; k < o->watches[i].n_lines; k++)
            look(o, &o->watches[i], &o->watches[i].lines[k], at_ms, txn);
}

/* ---- hooks ---- */

static void check_published(world_oracle *o, uint64_t at_ms, const sh_coord_status *status,
                            sh_txn *txn)
{
    if (status->version < o->coord_version)
        NOTE(o, WORLD_RULE_VERSION, at_ms, "the release goes from %llu back to %llu",
             (unsigned long long)o->coord_version, (unsigned long long)status->version);
    if (status->version == o->coord_version)
        return;
    sh_bytes manifest;
    sh_manifest decoded;
    sh_status found = sh_coord_get_manifest(txn, status->version, &manifest, NULL);
    if (found == SH_OK)
        found =
            sh_manifest_verify(manifest.data, manifest.n, &o->options.release_key, &decoded, NULL);
    if (found != SH_OK)
        NOTE(o, WORLD_RULE_MODEL, at_ms, "release %llu is published, its manifest: %s",
             (unsigned long long)status->version, sh_status_name(found));
    else
        oracle_map_put(&o->published, status->version, oracle_hash(manifest.data, manifest.n));
    o->coord_version = status->version;
    o->seen.releases++;
}

void world_oracle_coord_boot(world_oracle *o, uint64_t at_ms, const sh_coord *core, sh_store *store)
{
    sh_txn *txn = NULL;
    sh_coord_status status = sh_coord_get_status(core);
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return;
    check_published(o, at_ms, &status, txn);
    oracle_check_promises(o, at_ms, txn);
    sh_txn_abort(&txn);
}

static bool is_ack(const void *bytes, size_t n, sh_msg *msg)
{
    return oracle_read(bytes, n, msg) && msg->type == SH_MSG_ACK;
}

/* An ITEM that came whole. */
static bool is_item(const sh_coord_event *event, sh_msg *msg)
{
    return oracle_read(event->message.data, event->message.n, msg) && msg->type == SH_MSG_ITEM &&
           msg->item.cls < SH_CLASSES &&
           sh_msg_decode(event->message.data, event->message.n, msg, NULL) == SH_OK;
}

/* What an action says of the store must be true of it by now. */
static void check_send(world_oracle *o, uint64_t at_ms, const sh_coord_action *action, sh_txn *txn)
{
    oracle_watch *w = oracle_watch_of(o, &action->node);
    sh_msg msg;
    if (!w || !w->watched || !is_ack(action->message.data, action->message.len, &msg))
        return;
    oracle_line *line = line_of(w, msg.ack.epoch, msg.ack.cls);
    look(o, w, line, at_ms, txn);
    uint64_t seq = first_missing(&msg.ack, &line->rows);
    if (seq != 0)
        NOTE(o, WORLD_RULE_DURABLE, at_ms,
             "item %llu of class %u, epoch %016llx, is acknowledged and not in the store",
             (unsigned long long)seq, msg.ack.cls, (unsigned long long)msg.ack.epoch);
}

static sh_status count_pending(void *arg, const sh_update_row *row)
{
    *(uint32_t *)arg += row->verdict == SH_VERDICT_PENDING;
    return SH_OK;
}

/* Each update that waits for a round waits once. Fleets that are looked at in part are large: there
 * the rows are too many for that. */
static void check_buffer(world_oracle *o, uint64_t at_ms, const sh_coord_status *status,
                         sh_txn *txn)
{
    uint32_t rows = 0;
    if (status->buffered == o->buffered || o->options.stride > 1)
        return;
    o->buffered = status->buffered;
    if (sh_coord_each_update(txn, count_pending, &rows, NULL) == SH_OK && rows != status->buffered)
        NOTE(o, WORLD_RULE_ONCE, at_ms, "%u updates wait, of which there are %u", status->buffered,
             rows);
}

void world_oracle_coord_stepped(world_oracle *o, const sh_coord_event *event)
{
    sh_msg msg;
    oracle_watch *w = event->kind == SH_COORD_MESSAGE ? oracle_watch_of(o, &event->node) : NULL;
    if (!w || !w->watched || !is_item(event, &msg))
        return;
    if (msg.item.kind != SH_ITEM_TOMBSTONE)
        expect(w, &msg.item);
    else if (msg.item.seq <= msg.item.last_seq)
        name_range(line_of(w, msg.item.epoch, msg.item.cls), msg.item.seq, msg.item.last_seq);
}

void world_oracle_coord_step(world_oracle *o, uint64_t at_ms, const sh_coord_actions *actions,
                             const sh_coord *core, sh_store *store)
{
    sh_txn *txn = NULL;
    o->seen.coord_steps++;
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return;
    if (actions->n > SH_COORD_ACTIONS_MAX)
        NOTE(o, WORLD_RULE_LIMIT, at_ms, "a step has %zu actions", actions->n);
    for (size_t i = 0; i < actions->n; i++)
        if (actions->items[i].kind == SH_COORD_SEND)
            check_send(o, at_ms, &actions->items[i], txn);
    sh_coord_status status = sh_coord_get_status(core);
    if (status.buffered > SH_COORD_BUFFER_MAX)
        NOTE(o, WORLD_RULE_LIMIT, at_ms, "%u updates wait, at most %u", status.buffered,
             SH_COORD_BUFFER_MAX);
    if (o->options.asked_bytes_max && status.asked_bytes > o->options.asked_bytes_max)
        NOTE(o, WORLD_RULE_LIMIT, at_ms, "%llu bytes of updates are asked for, at most %llu",
             (unsigned long long)status.asked_bytes,
             (unsigned long long)o->options.asked_bytes_max);
    check_buffer(o, at_ms, &status, txn);
    check_published(o, at_ms, &status, txn);
    sh_txn_abort(&txn);
}

void world_oracle_coord_failed(world_oracle *o, uint64_t at_ms, sh_status status, const char *text,
                               bool excused)
{
    if (!excused)
        NOTE(o, WORLD_RULE_CORE, at_ms, "%s: %s", sh_status_name(status), text);
}

void world_oracle_coord_sent(world_oracle *o, uint64_t at_ms, const sh_hash *key, const void *bytes,
                             size_t n)
{
    oracle_watch *w = oracle_watch_of(o, key);
    sh_msg msg;
    (void)at_ms;
    if (!w || !w->watched || !is_ack(bytes, n, &msg))
        return;
    join_acks(&line_of(w, msg.ack.epoch, msg.ack.cls)->promised, &msg.ack);
    o->seen.acks_promised++;
}

/* ---- the whole store ---- */

typedef struct {
    world_oracle *o;
    uint64_t at_ms;
    oracle_map ids, contents; /* of merged updates -> version; of rows: id -> content */
    oracle_map versions;      /* of rows that are merged: id -> version + 1 */
} auditor;

static sh_status audit_update(void *arg, const sh_update_row *row)
{
    auditor *a = arg;
    oracle_map_put(&a->contents, oracle_id_hash(&row->id),
                   oracle_hash(row->meta.blob.sha256.b, sizeof row->meta.blob.sha256.b));
    if (row->verdict == SH_VERDICT_MERGED)
        oracle_map_put(&a->versions, oracle_id_hash(&row->id), row->version + 1);
    oracle_check_verdict(a->o, a->at_ms, row);
    return SH_OK;
}

static sh_status audit_candidate(void *arg, const sh_release_row *row)
{
    auditor *a = arg;
    for (uint32_t i = 0; i < row->n_merged && row->version != 0; i++) {
        uint64_t id = oracle_id_hash(&row->merged[i]);
        const uint64_t *content = oracle_map_find(&a->contents, id);
        const uint64_t *before = oracle_map_find(&a->ids, id);
        if (before) {
            NOTE(a->o, WORLD_RULE_ONCE, a->at_ms, "update %llu counts in releases %llu and %llu",
                 (unsigned long long)row->merged[i].seq, (unsigned long long)*before,
                 (unsigned long long)row->version);
            continue;
        }
        oracle_map_put(&a->ids, id, row->version);
        const uint64_t *said = oracle_map_find(&a->versions, id);
        if (content && (!said || *said != row->version + 1))
            NOTE(a->o, WORLD_RULE_ONCE, a->at_ms,
                 "update %llu counts in release %llu, and its row does not say so",
                 (unsigned long long)row->merged[i].seq, (unsigned long long)row->version);
        if (!content) {
            NOTE(a->o, WORLD_RULE_DURABLE, a->at_ms,
                 "release %llu merges update %llu, which has no row",
                 (unsigned long long)row->version, (unsigned long long)row->merged[i].seq);
            continue;
        }
        before = oracle_map_find(&a->ids, *content);
        const oracle_watch *w = oracle_watch_of(a->o, &row->merged[i].node);
        if (before && w && !w->lies)
            NOTE(a->o, WORLD_RULE_ONCE, a->at_ms,
                 "the content of update %llu counts in releases %llu and %llu",
                 (unsigned long long)row->merged[i].seq, (unsigned long long)*before,
                 (unsigned long long)row->version);
        oracle_map_put(&a->ids, *content, row->version);
    }
    return SH_OK;
}

void world_oracle_audit(world_oracle *o, uint64_t now_ms, sh_store *coord_store)
{
    sh_txn *txn = NULL;
    sh_error err = {0};
    auditor a = {.o = o, .at_ms = now_ms};
    if (sh_txn_begin(coord_store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return;
    oracle_check_promises(o, now_ms, txn);
    sh_status status = sh_coord_each_update(txn, audit_update, &a, &err);
    if (status == SH_OK)
        status = sh_coord_each_candidate(txn, audit_candidate, &a, &err);
    if (status == SH_OK)
        status = sh_coord_each_audit(txn, NULL, NULL, &err);
    if (status == SH_OK)
        oracle_check_rows(o, now_ms, &a.contents, txn);
    if (status != SH_OK)
        NOTE(o, WORLD_RULE_DURABLE, now_ms, "the store does not hold: %s", err.text);
    sh_txn_abort(&txn);
    oracle_map_release(&a.ids);
    oracle_map_release(&a.contents);
    oracle_map_release(&a.versions);
    o->seen.audits++;
}
