/*
 * What was committed stays: the rows that items left at the aggregator, looked at in each audit.
 */
#include <string.h>

#include "experiments/world/oracle_internal.h"

#define NOTE(o, rule, at, ...) oracle_note(&(o)->center, rule, at, WORLD_AGGREGATOR, __VA_ARGS__)

static uint32_t kept_of(const world_oracle *o)
{
    return o->options.node_items_max ? o->options.node_items_max : ORACLE_ITEMS_KEPT;
}

static bool was_displaced(const world_oracle *o, const sh_msg_ack *rows, uint64_t seq)
{
    return oracle_covers(rows, seq + kept_of(o));
}

/* Of one line at a time: its marks are read once. */
typedef struct {
    const world_oracle *o;
    sh_txn *txn;
    sh_hash node;
    uint64_t epoch;
    uint8_t cls;
    bool known;
    sh_msg_ack rows;
} marks;

static bool read_marks(marks *m, const sh_hash *node, uint64_t epoch, uint8_t cls)
{
    if (m->known && m->cls == cls && m->epoch == epoch && sh_hash_equal(&m->node, node))
        return true;
    m->known =
        sh_inbox_get_ack(m->txn, SH_COORD_T_INBOX, node, epoch, cls, &m->rows, NULL) == SH_OK;
    m->node = *node;
    m->epoch = epoch;
    m->cls = cls;
    return m->known;
}

static void check_stored(world_oracle *o, oracle_watch *w, uint64_t at_ms,
                         const oracle_map *contents, marks *m)
{
    for (size_t i = w->n_stored; i-- > 0;) {
        const oracle_arrival *a = &w->stored[i];
        sh_update_id id = {.node = w->key, .epoch = a->epoch, .seq = a->seq};
        bool update = a->kind == SH_ITEM_UPDATE, there, same;
        if (update) {
            const uint64_t *blob = oracle_map_find(contents, oracle_id_hash(&id));
            there = blob != NULL;
            same = there && *blob == a->blob;
        } else {
            sh_slice value;
            uint8_t key[ORACLE_ROW_KEY];
            oracle_row_key(key, &id);
            if (read_marks(m, &w->key, a->epoch, a->cls) && was_displaced(o, &m->rows, a->seq)) {
                w->stored[i] = w->stored[--w->n_stored];
                continue;
            }
            unsigned table = a->kind == SH_ITEM_ALARM ? SH_COORD_T_ALARM : SH_COORD_T_WINDOW;
            there = sh_txn_get(m->txn, table, key, sizeof key, &value) == SH_OK;
            same = there && oracle_item_hash(a->cls, value.data, value.n) == a->hash;
        }
        if (same)
            continue;
        NOTE(o, there ? WORLD_RULE_CONTENT : WORLD_RULE_DURABLE, at_ms,
             "item %llu of class %u, epoch %016llx, was committed, and its row is %s",
             (unsigned long long)a->seq, a->cls, (unsigned long long)a->epoch,
             there ? "another's" : "gone");
        w->stored[i] = w->stored[--w->n_stored]; /* told once */
    }
}

static sh_status check_kept(void *arg, const sh_update_id *id, sh_bytes payload)
{
    marks *m = arg;
    (void)payload;
    if (read_marks(m, &id->node, id->epoch, m->cls) && was_displaced(m->o, &m->rows, id->seq))
        return SH_ERR_LIMIT;
    return SH_OK;
}

/* A node leaves so many alarms and windows of an epoch, whatever it sends in which order. */
static void check_bounds(world_oracle *o, uint64_t at_ms, marks *m)
{
    static const struct {
        uint8_t cls;
        unsigned table;
    } kinds[] = {{SH_CLASS_ALARM, SH_COORD_T_ALARM}, {SH_CLASS_WINDOW, SH_COORD_T_WINDOW}};
    for (size_t k = 0; k < SH_COUNT(kinds); k++) {
        m->cls = kinds[k].cls;
        m->known = false;
        if (sh_coord_each_item(m->txn, kinds[k].table, check_kept, m, NULL) == SH_ERR_LIMIT)
            NOTE(o, WORLD_RULE_LIMIT, at_ms,
                 "of an epoch of node %02x%02x it keeps more than %u items of class %u",
                 m->node.b[0], m->node.b[1], kept_of(o), m->cls);
    }
}

void oracle_check_rows(world_oracle *o, uint64_t at_ms, const oracle_map *contents, sh_txn *txn)
{
    marks m = {.o = o, .txn = txn};
    for (size_t i = 0; i < o->n_watches; i++)
        check_stored(o, &o->watches[i], at_ms, contents, &m);
    check_bounds(o, at_ms, &m);
}

/* Nobody refuses an honest node's update but for its age, its gate or the end. */
void oracle_check_verdict(world_oracle *o, uint64_t at_ms, const sh_update_row *row)
{
    const oracle_watch *w = oracle_watch_of(o, &row->id.node);
    bool refused = row->verdict == SH_VERDICT_REFUSED;
    if (!refused && row->meta.parts.n > 0)
        NOTE(o, WORLD_RULE_ONCE, at_ms, "update %llu stands for several, and no relay has sent it",
             (unsigned long long)row->id.seq);
    if (!w || w->lies || !refused || row->reason == SH_REASON_CLOSED ||
        row->reason == SH_REASON_GATE)
        return;
    uint64_t behind = 0; /* at least what it was then */
    for (size_t k = 0; k < o->published.cap; k++)
        behind += o->published.keys[k] > row->meta.base_version;
    if (row->reason == SH_REASON_STALE && behind > o->options.staleness_max)
        return;
    NOTE(o, WORLD_RULE_CONTENT, at_ms, "an honest update, %llu, is refused: %s",
         (unsigned long long)row->id.seq, sh_reason_name(row->reason));
}
