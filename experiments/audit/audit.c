#include "experiments/audit/audit.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "edge-node/node.h"
#include "shared/sync/link.h"

typedef struct {         /* what a node made */
    uint64_t epoch, seq; /* on the wire */
    uint64_t local;      /* the node's own sequence */
    sh_hash sha256;
    uint32_t node;
    uint8_t cls, state;
    bool in_outbox, seen;
    bool relayed; /* made by a relay, of others: its bytes are not known any more */
} made_item;

typedef struct { /* what the aggregator has */
    uint64_t epoch, seq;
    sh_hash node, sha256;
    uint8_t cls, verdict;
    uint64_t version;
    uint32_t listed; /* by published releases */
    uint32_t store;  /* 0: the root's, else a relay's */
    bool part;       /* it came in another update, (via_epoch, via_seq); sha256 is not known */
    uint64_t via_epoch, via_seq;
} kept_item;

typedef struct {
    uint64_t epoch, seq, version;
} listing;

typedef struct {
    sh_link_segments segments; /* what its updates are called on the wire */
    uint32_t name;
} relay;

struct sh_audit {
    made_item *made;
    kept_item *kept;
    listing *listed;
    size_t n_made, cap_made, n_kept, cap_kept, n_listed, cap_listed;
    char (*names)[64];
    size_t n_names, cap_names;
    char unknown[64]; /* what an epoch that no node has is called */
    uint64_t epoch;   /* of the node or relay being read */
    uint32_t store;   /* whose rows are being read: 0, or a relay's number */
    relay *relays;
    size_t n_relays, cap_relays;
    uint64_t *left; /* epochs that a node or relay had before its present one */
    size_t n_left, cap_left;
    sh_audit_result result;
    json_t *findings;
};

sh_status sh_audit_create(sh_audit **out, sh_error *err)
{
    sh_audit *a = sh_calloc(1, sizeof *a);
    if (a)
        a->findings = json_array();
    if (!a || !a->findings) {
        free(a);
        return sh_fail(err, SH_ERR_NO_MEMORY, "audit: no memory");
    }
    *out = a;
    return SH_OK;
}

void sh_audit_destroy(sh_audit **audit)
{
    sh_audit *a = *audit;
    if (!a)
        return;
    free(a->made);
    free(a->kept);
    free(a->listed);
    free(a->names);
    free(a->relays);
    free(a->left);
    json_decref(a->findings);
    free(a);
    *audit = NULL;
}

static void find(sh_audit *a, uint64_t *counter, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static void find(sh_audit *a, uint64_t *counter, const char *format, ...)
{
    char text[256];
    ++*counter;
    if (json_array_size(a->findings) >= SH_AUDIT_FINDINGS_MAX)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    json_array_append_new(a->findings, json_string(text));
}

static const char *class_name(uint8_t cls)
{
    return cls == SH_CLASS_UPDATE ? "update" : "alarm";
}

/* ---- the aggregator's side ---- */

static sh_status keep(sh_audit *a, kept_item item)
{
    SH_TRY(sh_array_reserve((void **)&a->kept, &a->cap_kept, a->n_kept + 1, sizeof *a->kept,
                            SH_AUDIT_ITEMS_MAX));
    a->kept[a->n_kept++] = item;
    return SH_OK;
}

static size_t parts_of(const sh_update_meta *meta)
{
    return meta->parts.n / SH_UPDATE_PART_BYTES;
}

/* The nodes' updates that came in a relay's: what becomes of it becomes of them. */
static sh_status keep_parts(sh_audit *a, const sh_update_row *row)
{
    for (size_t i = 0; i < parts_of(&row->meta); i++) {
        sh_update_part part =
            sh_update_part_get((const uint8_t *)row->meta.parts.data + i * SH_UPDATE_PART_BYTES);
        SH_TRY(keep(a, (kept_item){.epoch = part.epoch,
                                   .seq = part.seq,
                                   .node = part.node,
                                   .cls = SH_CLASS_UPDATE,
                                   .verdict = (uint8_t)row->verdict,
                                   .version = row->version,
                                   .store = a->store,
                                   .part = true,
                                   .via_epoch = row->id.epoch,
                                   .via_seq = row->id.seq}));
    }
    return SH_OK;
}

static sh_status keep_update(void *arg, const sh_update_row *row)
{
    sh_audit *a = arg;
    uint64_t n = SH_MAX(parts_of(&row->meta), (size_t)1);
    a->result.merged += row->verdict == SH_VERDICT_MERGED ? n : 0;
    a->result.refused += row->verdict == SH_VERDICT_REFUSED ? n : 0;
    a->result.pending += row->verdict == SH_VERDICT_PENDING ? n : 0;
    SH_TRY(keep(a, (kept_item){.epoch = row->id.epoch,
                               .seq = row->id.seq,
                               .node = row->id.node,
                               .sha256 = row->meta.blob.sha256,
                               .cls = SH_CLASS_UPDATE,
                               .verdict = (uint8_t)row->verdict,
                               .version = row->version,
                               .store = a->store}));
    return keep_parts(a, row);
}

static sh_status keep_listing(void *arg, const sh_release_row *row)
{
    sh_audit *a = arg;
    if (row->version == 0)
        return SH_OK; /* a refused candidate counts nothing */
    for (uint32_t i = 0; i < row->n_merged; i++) {
        SH_TRY(sh_array_reserve((void **)&a->listed, &a->cap_listed, a->n_listed + 1,
                                sizeof *a->listed, SH_AUDIT_ITEMS_MAX));
        a->listed[a->n_listed++] =
            (listing){row->merged[i].epoch, row->merged[i].seq, row->version};
    }
    return SH_OK;
}

static sh_status keep_alarms(sh_audit *a, sh_txn *txn, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_ALARM, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    while (status == SH_OK) {
        kept_item item = {
            .cls = SH_CLASS_ALARM, .store = a->store, .sha256 = sh_sha256(value.data, value.n)};
        const uint8_t *p = key.data;
        if (key.n != sizeof item.node.b + 16) {
            status = sh_fail(err, SH_ERR_CORRUPT, "audit: an alarm's key has %zu bytes", key.n);
            break;
        }
        memcpy(item.node.b, p, sizeof item.node.b);
        item.epoch = sh_key_get_u64(p + 32);
        item.seq = sh_key_get_u64(p + 40);
        status = keep(a, item);
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

sh_status sh_audit_add_aggregator(sh_audit *a, sh_store *store, sh_error *err)
{
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    SH_GOTO(sh_coord_each_update(txn, keep_update, a, err));
    SH_GOTO(sh_coord_each_candidate(txn, keep_listing, a, err));
    SH_GOTO(keep_alarms(a, txn, err));
cleanup:
    sh_txn_abort(&txn);
    return status;
}

/* ---- a relay's two sides ---- */

static const sh_outbox relay_outbox = {.table = SH_COORD_T_OUTBOX, .meta_table = SH_COORD_T_META};

/* What the relay's update of that number is called on the wire. False: it was of an epoch that the
 * relay left, and has forgotten since nothing of it is owed. */
static bool relay_id(const relay *r, uint64_t number, sh_wire_id *id)
{
    if (number <= r->segments.items[0].base[SH_CLASS_UPDATE])
        return false;
    *id = sh_link_wire_id(&r->segments, SH_CLASS_UPDATE, number);
    return true;
}

/* The updates that the relay made: the numbers that rows from `first` on say they went into. What
 * is not in its outbox any more was acknowledged. */
static sh_status made_by_relay(sh_audit *a, sh_txn *txn, size_t first)
{
    for (size_t i = first; i < a->n_kept; i++) {
        const kept_item *k = &a->kept[i];
        const relay *r = &a->relays[a->n_relays - 1];
        sh_wire_id id;
        bool known = k->verdict != SH_VERDICT_RELAYED || k->cls != SH_CLASS_UPDATE || k->part ||
                     !relay_id(r, k->version, &id);
        for (size_t m = a->n_made; !known && m-- > 0 && a->made[m].node == r->name;)
            known = a->made[m].local == k->version;
        if (known)
            continue;
        sh_msg_item item;
        sh_status status = sh_outbox_next(&relay_outbox, txn, SH_CLASS_UPDATE, k->version, &item);
        if (status != SH_OK && status != SH_ERR_NOT_FOUND)
            return status;
        bool owed = status == SH_OK && item.seq == k->version;
        SH_TRY(sh_array_reserve((void **)&a->made, &a->cap_made, a->n_made + 1, sizeof *a->made,
                                SH_AUDIT_ITEMS_MAX));
        a->made[a->n_made++] = (made_item){.epoch = id.epoch,
                                           .seq = id.seq,
                                           .local = k->version,
                                           .node = r->name,
                                           .cls = SH_CLASS_UPDATE,
                                           .state = owed ? SH_LEDGER_OWED : SH_LEDGER_ACKED,
                                           .in_outbox = owed,
                                           .relayed = true};
        a->result.owed += owed;
    }
    return SH_OK;
}

sh_status sh_audit_add_relay(sh_audit *a, sh_store *store, const char *name, sh_error *err)
{
    sh_txn *txn = NULL;
    size_t first = a->n_kept;
    sh_status status = SH_OK;
    SH_GOTO(sh_array_reserve((void **)&a->names, &a->cap_names, a->n_names + 1, sizeof *a->names,
                             SH_AUDIT_ITEMS_MAX));
    snprintf(a->names[a->n_names++], sizeof *a->names, "%s", name);
    SH_GOTO(sh_array_reserve((void **)&a->relays, &a->cap_relays, a->n_relays + 1,
                             sizeof *a->relays, SH_AUDIT_ITEMS_MAX));
    SH_GOTO(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    relay *r = &a->relays[a->n_relays];
    *r = (relay){.name = (uint32_t)(a->n_names - 1)};
    SH_GOTO(sh_link_stored_segments(txn, &relay_outbox, &r->segments, err));
    a->n_relays++;
    a->store = (uint32_t)a->n_relays;
    SH_GOTO(sh_coord_each_update(txn, keep_update, a, err));
    SH_GOTO(keep_alarms(a, txn, err));
    SH_GOTO(made_by_relay(a, txn, first));
    a->result.relays++;
cleanup:
    sh_txn_abort(&txn);
    return status;
}

/* ---- a node's side ---- */

static bool was_left(const sh_audit *a, uint64_t epoch)
{
    for (size_t i = a->n_left; i > 0; i--) /* the last is asked for most often */
        if (a->left[i - 1] == epoch)
            return true;
    return false;
}

/* Other copies of the node's store may have sent under an epoch that it left. */
static sh_status add_epoch(sh_audit *a, uint64_t epoch)
{
    if (epoch == a->epoch || was_left(a, epoch))
        return SH_OK;
    SH_TRY(sh_array_reserve((void **)&a->left, &a->cap_left, a->n_left + 1, sizeof *a->left,
                            SH_AUDIT_ITEMS_MAX));
    a->left[a->n_left++] = epoch;
    return SH_OK;
}

static sh_status add_made(void *arg, const sh_ledger_row *row)
{
    sh_audit *a = arg;
    SH_TRY(add_epoch(a, row->id.epoch));
    SH_TRY(sh_array_reserve((void **)&a->made, &a->cap_made, a->n_made + 1, sizeof *a->made,
                            SH_AUDIT_ITEMS_MAX));
    a->made[a->n_made++] = (made_item){.epoch = row->id.epoch,
                                       .seq = row->id.seq,
                                       .local = row->seq,
                                       .sha256 = row->sha256,
                                       .node = (uint32_t)(a->n_names - 1),
                                       .cls = row->cls,
                                       .state = (uint8_t)row->state};
    a->result.made++;
    a->result.acknowledged += row->state == SH_LEDGER_ACKED;
    a->result.owed += row->state == SH_LEDGER_OWED;
    a->result.dropped += row->state == SH_LEDGER_DROPPED;
    return SH_OK;
}

/* Rows of one class come in sequence order, up to the outbox's next sequence, and are the last
 * SH_NODE_LEDGER_MAX of them: a gap is an item that vanished. */
static void check_gaps(sh_audit *a, size_t first, uint8_t cls, uint64_t next_seq)
{
    uint64_t expected = next_seq > SH_NODE_LEDGER_MAX ? next_seq - SH_NODE_LEDGER_MAX : 1;
    for (size_t i = first; i <= a->n_made; i++) {
        if (i < a->n_made && a->made[i].cls != cls)
            continue;
        uint64_t seq = i < a->n_made ? a->made[i].local : next_seq;
        if (seq > expected)
            find(a, &a->result.lost, "%s: %s %llu to %llu missing from the ledger",
                 a->names[a->n_names - 1], class_name(cls), (unsigned long long)expected,
                 (unsigned long long)seq - 1);
        expected = SH_MAX(expected, seq + 1);
    }
}

static const sh_outbox outbox = {.table = SH_NODE_T_OUTBOX, .meta_table = SH_NODE_T_META};

static sh_status mark_outbox(sh_audit *a, sh_txn *txn, size_t first)
{
    for (size_t i = first; i < a->n_made; i++) {
        made_item *m = &a->made[i];
        sh_msg_item item;
        sh_status status = sh_outbox_next(&outbox, txn, (sh_class)m->cls, m->local, &item);
        if (status != SH_OK && status != SH_ERR_NOT_FOUND)
            return status;
        m->in_outbox = status == SH_OK && item.seq == m->local && item.kind != SH_ITEM_TOMBSTONE;
    }
    return SH_OK;
}

sh_status sh_audit_add_node(sh_audit *a, sh_store *store, const char *name, sh_error *err)
{
    sh_txn *txn = NULL;
    sh_outbox_counts counts;
    uint64_t origin;
    size_t first = a->n_made;
    sh_status status = SH_OK;
    SH_GOTO(sh_array_reserve((void **)&a->names, &a->cap_names, a->n_names + 1, sizeof *a->names,
                             SH_AUDIT_ITEMS_MAX));
    snprintf(a->names[a->n_names++], sizeof *a->names, "%s", name);
    SH_GOTO(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    SH_GOTO(sh_node_stored_epoch(txn, &a->epoch, err));
    SH_GOTO(sh_node_stored_origin(txn, &origin, err));
    SH_GOTO(add_epoch(a, origin));
    SH_GOTO(sh_node_each_ledger(txn, add_made, a, err));
    SH_GOTO(mark_outbox(a, txn, first));
    SH_GOTO(sh_outbox_get_counts(&outbox, txn, &counts, err));
    check_gaps(a, first, SH_CLASS_UPDATE, counts.next_seq[SH_CLASS_UPDATE]);
    check_gaps(a, first, SH_CLASS_ALARM, counts.next_seq[SH_CLASS_ALARM]);
    a->result.nodes++;
cleanup:
    sh_txn_abort(&txn);
    return status;
}

/* ---- comparing ---- */

#define COMPARE(x, y) ((x) < (y) ? -1 : (x) > (y))

static int by_item(const void *x, const void *y)
{
    const kept_item *a = x, *b = y;
    int c = COMPARE(a->epoch, b->epoch);
    c = c ? c : COMPARE(a->cls, b->cls);
    return c ? c : COMPARE(a->seq, b->seq);
}

/* The root's first: it says what became of the item. */
static int by_item_and_store(const void *x, const void *y)
{
    const kept_item *a = x, *b = y;
    int c = by_item(x, y);
    return c ? c : COMPARE(a->store, b->store);
}

static int by_listing(const void *x, const void *y)
{
    const listing *a = x, *b = y;
    int c = COMPARE(a->epoch, b->epoch);
    c = c ? c : COMPARE(a->seq, b->seq);
    return c ? c : COMPARE(a->version, b->version);
}

static int by_content(const void *x, const void *y)
{
    const kept_item *a = x, *b = y;
    int c = COMPARE(a->epoch, b->epoch);
    c = c ? c : memcmp(&a->sha256, &b->sha256, sizeof a->sha256);
    return c ? c : COMPARE(a->seq, b->seq);
}

static int by_maker(const void *x, const void *y)
{
    const made_item *a = x, *b = y;
    int c = COMPARE(a->epoch, b->epoch);
    c = c ? c : COMPARE(a->cls, b->cls);
    return c ? c : COMPARE(a->seq, b->seq);
}

/* The first of the sorted made items that is not below (epoch, class, 0); NULL: it is another
 * epoch's. */
static const made_item *made_first(const sh_audit *a, uint64_t epoch, uint8_t cls)
{
    const made_item key = {.epoch = epoch, .cls = cls};
    size_t low = 0, high = a->n_made;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (by_maker(&a->made[middle], &key) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < a->n_made && a->made[low].epoch == epoch ? &a->made[low] : NULL;
}

static bool is_relays(const sh_audit *a, uint64_t epoch)
{
    for (size_t i = 0; i < a->n_relays; i++) {
        const sh_link_segments *s = &a->relays[i].segments;
        for (uint32_t n = 0; n < s->n; n++)
            if (s->items[n].epoch == epoch)
                return true;
    }
    return was_left(a, epoch);
}

static const char *owner(sh_audit *a, uint64_t epoch)
{
    const made_item *m = made_first(a, epoch, 0);
    if (m)
        return a->names[m->node];
    snprintf(a->unknown, sizeof a->unknown, "unknown node of epoch %016llx",
             (unsigned long long)epoch);
    return a->unknown;
}

static kept_item *kept_find(const sh_audit *a, uint64_t epoch, uint8_t cls, uint64_t seq)
{
    const kept_item key = {.epoch = epoch, .cls = cls, .seq = seq};
    size_t low = 0, high = a->n_kept;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (by_item(&a->kept[middle], &key) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < a->n_kept && by_item(&a->kept[low], &key) == 0 ? &a->kept[low] : NULL;
}

static bool same_item(const sh_audit *a, const kept_item *k, const kept_item *first)
{
    return k && k < a->kept + a->n_kept && by_item(k, first) == 0;
}

static void check_made(sh_audit *a, const made_item *m)
{
    const char *name = a->names[m->node], *what = class_name(m->cls);
    unsigned long long seq = m->seq;
    const kept_item *k = kept_find(a, m->epoch, m->cls, m->seq);
    /* An evaluation is not, once it was used. */
    bool kept = m->relayed || !sh_hash_is_zero(&m->sha256);
    if (m->state == SH_LEDGER_ACKED && !k && kept)
        find(a, &a->result.lost, "%s: %s %llu was acknowledged, the aggregator does not have it",
             name, what, seq);
    if (m->state == SH_LEDGER_OWED && !m->in_outbox && !k)
        find(a, &a->result.lost, "%s: %s %llu is owed, and neither side has it", name, what, seq);
    for (const kept_item *i = k; same_item(a, i, k); i++)
        if (!m->relayed && !i->part && !sh_hash_equal(&i->sha256, &m->sha256))
            find(a, &a->result.wrong, "%s: %s %llu has other bytes at the aggregator", name, what,
                 seq);
}

/* All listings of one update: there should be one, of the release that its row names. */
static void check_listing(sh_audit *a, const listing *l, size_t n)
{
    kept_item *k = kept_find(a, l->epoch, SH_CLASS_UPDATE, l->seq), *first = k;
    unsigned long long seq = l->seq;
    /* One that came by two ways has a row of each, and one of them was refused. */
    for (kept_item *i = first; same_item(a, i, first) && k->verdict != SH_VERDICT_MERGED; i++)
        k = i->verdict == SH_VERDICT_MERGED ? i : k;
    bool agree = false;
    for (size_t i = 0; k && i < n; i++)
        agree = agree || (k->verdict == SH_VERDICT_MERGED && k->version == l[i].version);
    if (k)
        k->listed = (uint32_t)n;
    if (!agree)
        find(a, &a->result.wrong, "%s: update %llu is listed by release %llu, its row %s",
             owner(a, l->epoch), seq, (unsigned long long)l->version,
             k ? "says otherwise" : "is not there");
    if (n > 1)
        find(a, &a->result.twice, "%s: update %llu is counted %zu times, by releases %llu and %llu",
             owner(a, l->epoch), seq, n, (unsigned long long)l[0].version,
             (unsigned long long)l[n - 1].version);
}

static void check_listings(sh_audit *a)
{
    for (size_t i = 0, n = 0; i < a->n_listed; i += n) {
        const listing *l = &a->listed[i];
        n = 1;
        while (i + n < a->n_listed && l[n].epoch == l->epoch && l[n].seq == l->seq)
            n++;
        check_listing(a, l, n);
    }
}

/* Whether `above` is the item that k's relay passed on, as its parent has it. */
static bool is_passed_on(const kept_item *above, const kept_item *k)
{
    return above->part && above->store != k->store;
}

/* Under which epochs a relay sent what it has forgotten the names of, only its parent's rows say.
 */
static sh_status find_left(sh_audit *a)
{
    for (size_t i = 0; i < a->n_kept; i++) {
        const kept_item *k = &a->kept[i];
        sh_wire_id id;
        if (k->verdict != SH_VERDICT_RELAYED || relay_id(&a->relays[k->store - 1], k->version, &id))
            continue;
        const kept_item *first = kept_find(a, k->epoch, k->cls, k->seq);
        for (const kept_item *above = first; same_item(a, above, first); above++)
            if (is_passed_on(above, k))
                SH_TRY(add_epoch(a, above->via_epoch));
    }
    return SH_OK;
}

/* What a relay says that it passed up is owed by it, or with its parent in the update that it
 * named.
 */
static void check_relayed(sh_audit *a, const kept_item *k)
{
    const relay *r = &a->relays[k->store - 1];
    sh_wire_id id = {0};
    bool named = relay_id(r, k->version, &id);
    const made_item key = {.epoch = id.epoch, .cls = SH_CLASS_UPDATE, .seq = id.seq};
    const made_item *m =
        named && a->n_made ? bsearch(&key, a->made, a->n_made, sizeof key, by_maker) : NULL;
    const kept_item *first = kept_find(a, k->epoch, k->cls, k->seq);
    bool found = m && m->in_outbox;
    /* A relay's own update that came here in parts is followed part by part. */
    for (const kept_item *i = first; !found && same_item(a, i, first); i++)
        found = named ? i->part && i->via_epoch == id.epoch && i->via_seq == id.seq
                      : is_passed_on(i, k);
    bool whole = !named || kept_find(a, id.epoch, SH_CLASS_UPDATE, id.seq) != NULL;
    if (!found && !(whole && is_relays(a, k->epoch)))
        find(a, &a->result.lost, "%s: update %llu went up in update %llu of %s, which is nowhere",
             owner(a, k->epoch), (unsigned long long)k->seq, (unsigned long long)k->version,
             a->names[r->name]);
}

static void check_kept(sh_audit *a)
{
    for (size_t i = 0; i < a->n_kept; i++) {
        const kept_item *k = &a->kept[i];
        if (k->cls == SH_CLASS_UPDATE && k->verdict == SH_VERDICT_MERGED && k->listed == 0)
            find(a, &a->result.lost, "%s: update %llu is marked merged, and no release lists it",
                 owner(a, k->epoch), (unsigned long long)k->seq);
        const kept_item *before = i ? &a->kept[i - 1] : NULL;
        if (k->verdict == SH_VERDICT_RELAYED)
            check_relayed(a, k);
        if (before && by_item_and_store(before, k) == 0 && !sh_hash_equal(&before->node, &k->node))
            find(a, &a->result.twice, "%s: %s %llu is stored for two senders", owner(a, k->epoch),
                 class_name(k->cls), (unsigned long long)k->seq);
    }
}

/* What the aggregator has and its node's ledger does not; a ledger forgets its oldest rows, and a
 * store that was set back, or copied, has not what another copy made. */
static void check_forged(sh_audit *a)
{
    for (size_t i = 0; i < a->n_kept; i++) {
        const kept_item *k = &a->kept[i];
        const made_item key = {.epoch = k->epoch, .cls = k->cls, .seq = k->seq};
        if (a->n_made && bsearch(&key, a->made, a->n_made, sizeof key, by_maker))
            continue;
        const made_item *first = made_first(a, k->epoch, k->cls);
        if (was_left(a, k->epoch))
            continue;
        if (!first || first->cls != k->cls || k->seq > first->seq)
            find(a, &a->result.wrong, "%s: %s %llu is stored, and no node made it",
                 owner(a, k->epoch), class_name(k->cls), (unsigned long long)k->seq);
    }
}

static void check_same_bytes(sh_audit *a)
{
    qsort(a->kept, a->n_kept, sizeof *a->kept, by_content);
    for (size_t i = 1; i < a->n_kept; i++) {
        const kept_item *x = &a->kept[i - 1], *y = &a->kept[i];
        if (x->epoch == y->epoch && x->cls == SH_CLASS_UPDATE && y->cls == SH_CLASS_UPDATE &&
            !x->part && !y->part && x->verdict == SH_VERDICT_MERGED &&
            y->verdict == SH_VERDICT_MERGED && sh_hash_equal(&x->sha256, &y->sha256))
            find(a, &a->result.twice, "%s: updates %llu and %llu are the same bytes, both merged",
                 owner(a, x->epoch), (unsigned long long)x->seq, (unsigned long long)y->seq);
    }
}

/* A release that lists a relay's update lists its parts. Called with the kept items sorted. */
static sh_status list_parts(sh_audit *a)
{
    size_t n = a->n_listed;
    for (size_t i = 0; i < a->n_kept; i++) {
        const kept_item *k = &a->kept[i];
        for (size_t l = 0; k->part && k->store == 0 && l < n; l++) {
            listing via = a->listed[l];
            if (via.epoch != k->via_epoch || via.seq != k->via_seq)
                continue;
            SH_TRY(sh_array_reserve((void **)&a->listed, &a->cap_listed, a->n_listed + 1,
                                    sizeof *a->listed, SH_AUDIT_ITEMS_MAX));
            a->listed[a->n_listed++] = (listing){k->epoch, k->seq, via.version};
        }
    }
    return SH_OK;
}

void sh_audit_finish(sh_audit *a, sh_audit_result *out, json_t **findings)
{
    if (a->n_kept)
        qsort(a->kept, a->n_kept, sizeof *a->kept, by_item_and_store);
    a->epoch = 0;
    if (list_parts(a) != SH_OK || find_left(a) != SH_OK)
        find(a, &a->result.wrong, "no memory to follow the parts of relays' updates");
    if (a->n_listed)
        qsort(a->listed, a->n_listed, sizeof *a->listed, by_listing);
    if (a->n_made)
        qsort(a->made, a->n_made, sizeof *a->made, by_maker);
    for (size_t i = 0; i < a->n_made; i++)
        check_made(a, &a->made[i]);
    check_listings(a);
    check_kept(a);
    check_forged(a);
    if (a->n_kept)
        check_same_bytes(a);
    *out = a->result;
    *findings = json_incref(a->findings);
}

json_t *sh_audit_document(const sh_audit_result *r, json_t *findings)
{
    const struct {
        const char *key;
        uint64_t value;
    } rows[] = {{"nodes", r->nodes},     {"relays", r->relays},
                {"made", r->made},       {"acknowledged", r->acknowledged},
                {"owed", r->owed},       {"dropped", r->dropped},
                {"merged", r->merged},   {"refused", r->refused},
                {"pending", r->pending}, {"lost", r->lost},
                {"twice", r->twice},     {"wrong", r->wrong}};
    json_t *root = json_object();
    for (size_t i = 0; i < SH_COUNT(rows); i++)
        sh_json_set(root, rows[i].key, json_integer((json_int_t)rows[i].value));
    sh_json_set(root, "findings", findings);
    return root;
}
