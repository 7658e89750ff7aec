/*
 * The oracle's life, its joins and the end of a run.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/world/oracle_internal.h"

static const char *const rule_names[WORLD_RULES] = {
    [WORLD_RULE_DURABLE] = "durable",     [WORLD_RULE_ONCE] = "once",
    [WORLD_RULE_OUTBOX] = "outbox",       [WORLD_RULE_CONTENT] = "content",
    [WORLD_RULE_VERSION] = "version",     [WORLD_RULE_MODEL] = "model",
    [WORLD_RULE_LIMIT] = "limit",         [WORLD_RULE_INFERENCE] = "inference",
    [WORLD_RULE_CORE] = "core",           [WORLD_RULE_DELIVERED] = "delivered",
    [WORLD_RULE_CONVERGED] = "converged",
};

const char *world_rule_name(world_rule rule)
{
    return rule < WORLD_RULES ? rule_names[rule] : "?";
}

sh_status world_oracle_create(const world_oracle_options *options, world_oracle **out,
                              sh_error *err)
{
    world_oracle *o = sh_calloc(1, sizeof *o);
    if (o)
        o->nodes = sh_calloc(SH_MAX(options->nodes, 1u), sizeof *o->nodes);
    if (!o || !o->nodes) {
        free(o);
        return sh_fail(err, SH_ERR_NO_MEMORY, "oracle: no memory for %u nodes", options->nodes);
    }
    o->options = *options;
    for (uint32_t i = 0; i < options->nodes; i++) {
        o->nodes[i].watched = i % SH_MAX(options->stride, 1u) == 0;
        o->nodes[i].watch = UINT32_MAX;
    }
    *out = o;
    return SH_OK;
}

void world_oracle_destroy(world_oracle **oracle)
{
    world_oracle *o = *oracle;
    if (!o)
        return;
    for (uint32_t i = 0; i < o->options.nodes; i++) {
        oracle_node *w = &o->nodes[i];
        free(w->owed);
        free(w->gone);
        free(w->active);
        free(w->notes.items);
        oracle_map_release(&w->made);
        oracle_map_release(&w->dropped);
    }
    for (size_t i = 0; i < o->n_watches; i++) {
        for (size_t k = 0; k < o->watches[i].n_lines; k++)
            free(o->watches[i].lines[k].ranges);
        free(o->watches[i].lines);
        free(o->watches[i].arrivals);
        free(o->watches[i].stored);
        free(o->watches[i].nodes);
        oracle_map_release(&o->watches[i].committed);
        oracle_map_release(&o->watches[i].times);
    }
    free(o->nodes);
    free(o->watches);
    free(o->commits);
    free(o->center.items);
    free(o->kept);
    oracle_map_release(&o->keys);
    oracle_map_release(&o->published);
    free(o);
    *oracle = NULL;
}

void world_oracle_node_key(world_oracle *o, uint32_t node, const sh_hash *key)
{
    SH_ASSERT(node < o->options.nodes);
    oracle_node *n = &o->nodes[node];
    oracle_watch *known = oracle_watch_of(o, key);
    uint32_t watch = known ? (uint32_t)(known - o->watches) : n->watch;
    if (watch == UINT32_MAX) {
        oracle_grow((void **)&o->watches, &o->watches_cap, o->n_watches, sizeof *o->watches);
        watch = (uint32_t)o->n_watches++;
        o->watches[watch] = (oracle_watch){.key = *key, .watched = n->watched};
    }
    oracle_map_put(&o->keys, oracle_hash(key->b, sizeof key->b), watch);
    oracle_watch *w = &o->watches[watch];
    n->watched = w->watched; /* all copies of a store, or none */
    if (n->watch == watch)
        return;
    n->watch = watch;
    oracle_grow((void **)&w->nodes, &w->nodes_cap, w->n_nodes, sizeof *w->nodes);
    w->nodes[w->n_nodes++] = node;
}

/* ---- violations ---- */

static int violation_order(const void *a, const void *b)
{
    const world_violation *x = a, *y = b;
    if (x->at_ms != y->at_ms)
        return x->at_ms < y->at_ms ? -1 : 1;
    if (x->target != y->target)
        return x->target < y->target ? -1 : 1;
    if (x->rule != y->rule)
        return x->rule < y->rule ? -1 : 1;
    return strcmp(x->text, y->text);
}

static void collect(world_oracle *o, oracle_notes *notes)
{
    for (size_t i = 0; i < notes->n; i++) {
        oracle_grow((void **)&o->kept, &o->kept_cap, o->n_kept, sizeof *o->kept);
        o->kept[o->n_kept++] = notes->items[i];
    }
    o->violations += notes->n + notes->more;
    notes->n = 0;
    notes->more = 0;
}

static void collect_all(world_oracle *o)
{
    for (uint32_t i = 0; i < o->options.nodes; i++)
        collect(o, &o->nodes[i].notes);
    collect(o, &o->center);
    if (o->n_kept > 0)
        qsort(o->kept, o->n_kept, sizeof *o->kept, violation_order);
    o->n_kept = SH_MIN(o->n_kept, (size_t)WORLD_VIOLATIONS_KEPT);
}

uint64_t world_oracle_violations(const world_oracle *o)
{
    return o->violations;
}

size_t world_oracle_kept(const world_oracle *o)
{
    return o->n_kept;
}

const world_violation *world_oracle_get(const world_oracle *o, size_t i)
{
    SH_ASSERT(i < o->n_kept);
    return &o->kept[i];
}

world_oracle_counts world_oracle_get_counts(const world_oracle *o)
{
    world_oracle_counts all = o->seen;
    for (uint32_t i = 0; i < o->options.nodes; i++) {
        const world_oracle_counts *c = &o->nodes[i].seen;
        all.node_steps += c->node_steps;
        all.items_made += c->items_made;
        all.items_dropped += c->items_dropped;
        all.activations += c->activations;
        all.inferences_taken += c->inferences_taken;
        all.inferences_full += c->inferences_full;
        all.quiets += o->nodes[i].use.quiets;
    }
    return all;
}

/* ---- both sides ---- */

uint64_t oracle_times_made(const world_oracle *o, const oracle_watch *w, uint64_t hash)
{
    uint64_t times = 0;
    for (size_t i = 0; i < w->n_nodes; i++) {
        const uint64_t *made = oracle_map_find(&o->nodes[w->nodes[i]].made, hash);
        times += made ? *made : 0;
    }
    return times;
}

bool oracle_has_copies(const world_oracle *o, const oracle_watch *w)
{
    for (size_t i = 0; i < w->n_nodes; i++)
        if (w->n_nodes > 1 || o->nodes[w->nodes[i]].replaced > 0)
            return true;
    return false;
}

/* Of two copies of a store one may have dropped, and counted, what the other still had: its
 * tombstone is acknowledged for both. */
static bool was_dropped(const world_oracle *o, const oracle_watch *w, uint64_t hash)
{
    for (size_t i = 0; i < w->n_nodes && oracle_has_copies(o, w); i++)
        if (oracle_map_find(&o->nodes[w->nodes[i]].dropped, hash))
            return true;
    return false;
}

static void join_commits(world_oracle *o)
{
    for (size_t i = 0; i < o->n_commits; i++) {
        const oracle_commit *c = &o->commits[i];
        const oracle_arrival *a = &c->item;
        oracle_watch *w = &o->watches[c->watch];
        const uint64_t *before = oracle_map_find(&w->times, a->hash);
        uint64_t made = oracle_times_made(o, w, a->hash), times = before ? *before + 1 : 1;
        oracle_map_put(&w->times, a->hash, times);
        if (w->lies)
            continue;
        if (made == 0)
            oracle_note(&o->center, WORLD_RULE_CONTENT, c->at_ms, WORLD_AGGREGATOR,
                        "an item was committed that none of the nodes of its key has made");
        /* A node that was set back may answer for a candidate again, in the same words. */
        else if (times > made && (a->kind != SH_ITEM_EVALUATION || !oracle_has_copies(o, w)))
            oracle_note(&o->center, WORLD_RULE_ONCE, c->at_ms, WORLD_AGGREGATOR,
                        "item %llu of class %u, epoch %016llx, counts again: its content was "
                        "committed before",
                        (unsigned long long)a->seq, a->cls, (unsigned long long)a->epoch);
    }
    o->n_commits = 0;
}

static void join_node(world_oracle *o, uint32_t i)
{
    oracle_node *n = &o->nodes[i];
    const oracle_watch *w = n->watch == UINT32_MAX ? NULL : &o->watches[n->watch];
    for (size_t k = 0; k < n->n_gone && !n->lies; k++) {
        const uint64_t *when = w ? oracle_map_find(&w->committed, n->gone[k].hash) : NULL;
        if (!when && w && was_dropped(o, w, n->gone[k].hash))
            continue;
        if (!when || *when - 1 > n->gone[k].at_ms)
            oracle_note(&n->notes, WORLD_RULE_OUTBOX, n->gone[k].at_ms, i,
                        "an item left the outbox, %s",
                        when ? "before the aggregator had committed it"
                             : "the aggregator has not committed it, and it is not counted");
    }
    n->n_gone = 0;
    for (size_t k = 0; k < n->n_active; k++) {
        const uint64_t *manifest = oracle_map_find(&o->published, n->active[k].version);
        if (!manifest || *manifest != n->active[k].manifest)
            oracle_note(&n->notes, WORLD_RULE_MODEL, n->active[k].at_ms, i,
                        "release %llu is active, whose manifest was never published so",
                        (unsigned long long)n->active[k].version);
    }
    n->n_active = 0;
}

static void join_now(world_oracle *o)
{
    o->seen.joins++;
    for (uint32_t i = 0; i < o->options.nodes; i++)
        if (o->nodes[i].lies && o->nodes[i].watch != UINT32_MAX)
            o->watches[o->nodes[i].watch].lies = true;
    join_commits(o);
    for (uint32_t i = 0; i < o->options.nodes; i++)
        join_node(o, i);
    collect_all(o);
}

void world_oracle_join(world_oracle *o, uint64_t now_ms)
{
    if (now_ms < o->join_due_ms)
        return;
    o->join_due_ms = now_ms + ORACLE_JOIN_MS;
    join_now(o);
}

uint64_t world_oracle_join_due(const world_oracle *o)
{
    return o->join_due_ms;
}

static uint64_t count_rows(sh_store *store, unsigned table)
{
    sh_txn *txn = NULL;
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return 0;
    uint64_t n = sh_txn_count(txn, table);
    sh_txn_abort(&txn);
    return n;
}

/* Chunks of a node that needs none. It keeps a candidate's for the release that that may become,
 * until it hears of another one. */
static uint64_t count_leaked(sh_store *store)
{
    static const char candidate[] = "candidate";
    sh_txn *txn = NULL;
    sh_slice row;
    if (sh_txn_begin(store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return 0;
    sh_status kept = sh_txn_get(txn, SH_NODE_T_META, candidate, sizeof candidate - 1, &row);
    sh_txn_abort(&txn);
    return kept == SH_OK ? 0 : count_rows(store, SH_NODE_T_CHUNK);
}

/* An honest node at the end owes nothing and runs what it should. */
static void finish_node(world_oracle *o, uint32_t i, uint64_t now_ms, const world_oracle_node *node,
                        uint64_t version)
{
    oracle_node *w = &o->nodes[i];
    bool lies = w->lies || (w->watch != UINT32_MAX && o->watches[w->watch].lies);
    if (!node->store || !node->core || lies)
        return;
    if (w->watched)
        oracle_node_scan(o, i, now_ms, node->store, true);
    sh_node_status status = sh_node_get_status(node->core);
    if (status.outbox_items > 0)
        oracle_note(&w->notes, WORLD_RULE_DELIVERED, now_ms, i, "it owes %llu items still",
                    (unsigned long long)status.outbox_items);
    uint64_t chunks = count_leaked(node->store);
    if (status.outbox_items == 0 && status.confirmed_version == version && chunks > 0)
        oracle_note(&w->notes, WORLD_RULE_LIMIT, now_ms, i, "it keeps %llu chunks, and needs none",
                    (unsigned long long)chunks);
    if (status.confirmed_version != version || status.active_version != version)
        oracle_note(&w->notes, WORLD_RULE_CONVERGED, now_ms, i,
                    "release %llu is the newest; active is %llu, confirmed %llu",
                    (unsigned long long)version, (unsigned long long)status.active_version,
                    (unsigned long long)status.confirmed_version);
}

void world_oracle_finish(world_oracle *o, uint64_t now_ms, const sh_coord *core,
                         sh_store *coord_store, const world_oracle_node *nodes)
{
    SH_ASSERT(!o->finished);
    o->finished = true;
    join_now(o);
    world_oracle_audit(o, now_ms, coord_store);
    if (!core) {
        oracle_note(&o->center, WORLD_RULE_CONVERGED, now_ms, WORLD_AGGREGATOR, "it does not run");
        collect_all(o);
        return;
    }
    sh_coord_status status = sh_coord_get_status(core);
    uint64_t version = status.version, chunks = count_rows(coord_store, SH_COORD_T_CHUNK);
    if (chunks > status.chunk_names)
        oracle_note(&o->center, WORLD_RULE_LIMIT, now_ms, WORLD_AGGREGATOR,
                    "it keeps %llu chunks, of which %llu belong to something",
                    (unsigned long long)chunks, (unsigned long long)status.chunk_names);
    for (uint32_t i = 0; i < o->options.nodes; i++)
        finish_node(o, i, now_ms, &nodes[i], version);
    join_now(o);
}
