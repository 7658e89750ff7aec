/*
 * A run: nodes, aggregator and faults are made, then windows of virtual time go by, in stretches
 * from one of the oracle's joins to the next, until the days are over; then the fleet gets time to
 * come to rest.
 */
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/world/run_internal.h"
#include "shared/base/clock.h"
#include "shared/base/memory.h"
#include "shared/store/simulated.h"

#define EVENTS_KEPT_MAX  (16u << 20)
#define MAIL_BYTES_MAX   (1u << 30)
#define REST_CHECK_MS    600000u
#define AUDIT_MS         WORLD_DAY_MS
#define SHARED_EVENTS    12u /* a window: about as long as it takes to tell another thread */
#define NODE_STORE_BYTES (4u << 20)
#define NODE_RESERVE     (256u << 10)
#define BUFFER_PART      5u /* a merge takes the updates of so small a part of the fleet */
#define BUFFER_MAX       500u
#define STREAM_CLASS     0x434c4153u
#define STREAM_USER      0x55534552u
#define STREAM_CONFIG    0x434f4e46u

/* ---- numbers ---- */

uint64_t world_mix(uint64_t hash, uint64_t x)
{
    uint64_t h = (hash ^ x) * 0x9e3779b97f4a7c15ull;
    h ^= h >> 29;
    h *= 0xbf58476d1ce4e5b9ull;
    return h ^ h >> 32;
}

uint64_t world_draw(const world *w, uint32_t node, uint32_t purpose, uint64_t number)
{
    const uint32_t counter[4] = {(uint32_t)number, (uint32_t)(number >> 32), purpose, node};
    const uint32_t key[2] = {(uint32_t)w->seed, (uint32_t)(w->seed >> 32)};
    uint32_t out[4];
    sh_philox4x32(counter, key, out);
    return (uint64_t)out[1] << 32 | out[0];
}

double world_unit(uint64_t draw)
{
    return (double)(draw >> 11) * 0x1p-53;
}

/* ---- events ---- */

uint32_t world_shard_of(const world *w, uint32_t node)
{
    uint32_t home = node < w->n_nodes ? node : w->nodes[node].key_of; /* a clone: its original's */
    return (uint32_t)((uint64_t)home * w->n_shards / w->n_nodes);
}

world_part *world_part_of(world *w, uint32_t node)
{
    return node < w->n_nodes + w->n_clones ? &w->shards[world_shard_of(w, node)] : &w->center_part;
}

static uint64_t *numbers_of(world_part *p, const sim_event *e)
{
    bool center = p == &p->w->center_part;
    return center ? &p->numbers : &p->w->nodes[e->from].sequence;
}

static void number(world_part *p, sim_event *e)
{
    uint64_t by = p == &p->w->center_part ? 0 : e->from + 1;
    e->number = by << 40 | ++*numbers_of(p, e);
}

sh_status world_push(world_part *p, sim_event event, sh_error *err)
{
    number(p, &event);
    if (sim_queue_insert(&p->queue, event) != SH_OK)
        return sh_fail(err, SH_ERR_LIMIT, "simulation: too many events");
    return SH_OK;
}

sh_status world_mail(world_part *p, sim_event event, sh_error *err)
{
    bool up = p != &p->w->center_part;
    world_mail_box *box = &p->out[p->window & 1][up ? 0 : world_shard_of(p->w, event.target)];
    SH_ASSERT(event.at_ms >= p->window_end_ms);
    number(p, &event);
    box->bytes.max = MAIL_BYTES_MAX;
    sh_status status = sh_array_reserve((void **)&box->items, &box->cap, box->n + 1,
                                        sizeof *box->items, EVENTS_KEPT_MAX);
    if (status == SH_OK)
        status = sh_buf_append(&box->bytes, event.message.data, event.message.len);
    size_t n = event.message.len;
    sh_buf_release(&event.message);
    if (status != SH_OK)
        return sh_fail(err, SH_ERR_LIMIT, "simulation: too many messages in a window");
    event.message.len = n;
    box->items[box->n++] = event;
    p->mail_ms = SH_MIN(p->mail_ms, event.at_ms);
    return SH_OK;
}

/* ---- a window ---- */

static sh_status take_mail(world_part *p, world_mail_box *box, sh_error *err)
{
    size_t at = 0;
    for (size_t k = 0; k < box->n; k++) {
        sim_event e = box->items[k];
        size_t n = e.message.len;
        e.message = (sh_buf){.max = e.message.max};
        if (sh_buf_append(&e.message, box->bytes.data + at, n) != SH_OK ||
            sim_queue_insert(&p->queue, e) != SH_OK)
            return sh_fail(err, SH_ERR_LIMIT, "simulation: too many events");
        at += n;
    }
    box->n = 0;
    sh_buf_clear(&box->bytes);
    return SH_OK;
}

/* What was sent to this partition in the window before. */
static sh_status import(world_part *p, sh_error *err)
{
    world *w = p->w;
    uint32_t before = (p->window & 1) ^ 1;
    if (p != &w->center_part)
        return take_mail(p, &w->center_part.out[before][p - w->shards], err);
    for (uint32_t k = 0; k < w->n_shards; k++)
        SH_TRY(take_mail(p, &w->shards[k].out[before][0], err));
    return SH_OK;
}

static uint64_t next_of(const world_part *p)
{
    return p->queue.n > 0 ? p->queue.keys[0].at_ms : UINT64_MAX;
}

static sh_status run_events(world_part *p, sh_error *err)
{
    sim_event e;
    SH_TRY(import(p, err));
    while (next_of(p) < p->window_end_ms) {
        (void)sim_queue_pop(&p->queue, &e);
        SH_ASSERT(e.at_ms >= p->now_ms);
        p->now_ms = e.at_ms;
        p->counts.events++;
        sh_status status =
            p == &p->w->center_part ? world_center_event(p, &e, err) : world_node_event(p, &e, err);
        sh_buf_release(&e.message);
        SH_TRY(status);
    }
    return SH_OK;
}

/* By the thread that will run them, so that their memory is of its arena. */
static sh_status begin_nodes(world_part *p, sh_error *err)
{
    world *w = p->w;
    sh_store_options options = {.tables = sh_node_tables,
                                .n_tables = SH_NODE_TABLES,
                                .bytes_max = NODE_STORE_BYTES,
                                .reserve_bytes = NODE_RESERVE};
    for (uint32_t i = 0; i < w->n_nodes; i++) {
        if (world_part_of(w, i) != p)
            continue;
        SH_TRY(sh_store_open_memory(&options, &w->nodes[i].store, err));
        SH_TRY(world_node_begin(p, i, err));
    }
    return SH_OK;
}

void world_part_run(world_part *p, uint64_t window, uint64_t end_ms)
{
    p->window = window;
    p->window_end_ms = end_ms;
    p->mail_ms = UINT64_MAX;
    if (p->status == SH_OK)
        p->status = p->w->begun ? run_events(p, &p->err) : begin_nodes(p, &p->err);
    p->next_ms = p->status == SH_OK ? next_of(p) : UINT64_MAX;
}

/* One window on this thread, of those that have something to do in it: their events, or mail of the
 * window before. Returns when the next one begins. */
static uint64_t run_window(world *w, uint64_t window, uint64_t end_ms)
{
    uint64_t next = UINT64_MAX;
    uint32_t before = (window & 1) ^ 1;
    bool mail = false;
    for (uint32_t k = 0; k <= w->n_shards; k++) {
        bool center = k == w->n_shards;
        world_part *p = center ? &w->center_part : &w->shards[k];
        bool came = center ? mail : w->center_part.out[before][k].n > 0;
        mail = mail || (!center && p->out[before][0].n > 0);
        p->mail_ms = UINT64_MAX;
        if (came || p->next_ms < end_ms)
            world_part_run(p, window, end_ms);
        next = SH_MIN(next, SH_MIN(p->next_ms, p->mail_ms));
    }
    return next;
}

static uint64_t earliest(const world *w)
{
    uint64_t at = SH_MIN(w->center_part.next_ms, w->center_part.mail_ms);
    for (uint32_t k = 0; k < w->n_shards; k++)
        at = SH_MIN(at, SH_MIN(w->shards[k].next_ms, w->shards[k].mail_ms));
    return at;
}

/* Between windows all partitions are at the same time, and what they send is of the window that is
 * over. */
static sh_status end_windows(world *w, uint64_t at_ms, sh_error *err)
{
    sh_status status = SH_OK;
    for (uint32_t k = 0; k <= w->n_shards; k++) {
        world_part *p = k == w->n_shards ? &w->center_part : &w->shards[k];
        p->window = w->windows_run;
        p->window_end_ms = at_ms;
        if (status == SH_OK && p->status != SH_OK) {
            *err = p->err;
            status = p->status;
        }
    }
    return status;
}

static uint64_t events_of(const world *w)
{
    uint64_t n = w->center_part.counts.events;
    for (uint32_t k = 0; k < w->n_shards; k++)
        n += w->shards[k].counts.events;
    return n;
}

/* All that happens from one time to the other. Threads share it when the stretch before had enough
 * work; of less, one has done it before others know of it. */
static sh_status run_stretch(world *w, world_team *team, uint64_t from_ms, uint64_t until_ms,
                             sh_error *err)
{
    uint64_t before = events_of(w);
    bool share = w->busy || w->options->share_all;
    if (share && world_team_threads(team) > 1)
        world_team_run(team, w, from_ms, until_ms);
    else
        for (uint64_t at = from_ms; at < until_ms;)
            at = run_window(w, ++w->windows_run, SH_MIN(at + w->window_ms, until_ms));
    uint64_t windows = (until_ms - from_ms) / w->window_ms + 1;
    w->busy = events_of(w) - before >= windows * SHARED_EVENTS;
    return end_windows(w, until_ms, err);
}

/* So many promises are broken that the rest of the run would show no more: a fleet with a bug in it
 * may go round in circles for ever. */
static bool is_decided(const world *w)
{
    return world_oracle_violations(w->oracle) >= WORLD_VIOLATIONS_KEPT;
}

/* All that happens before until_ms. */
static sh_status run_until(world *w, world_team *team, uint64_t until_ms, sh_error *err)
{
    for (uint64_t at; !is_decided(w) && (at = earliest(w)) < until_ms;) {
        uint64_t due = world_oracle_join_due(w->oracle);
        uint64_t end = SH_MIN(SH_MAX(due, at + w->window_ms), until_ms);
        SH_TRY(run_stretch(w, team, at, end, err));
        world_oracle_join(w->oracle, end);
        world_progress_run(w, end);
    }
    for (uint32_t k = 0; k < w->n_shards; k++)
        w->shards[k].now_ms = until_ms;
    w->center_part.now_ms = until_ms;
    return end_windows(w, until_ms, err);
}

/* What was sent outside of a window goes into the queues. */
static sh_status flush(world *w, sh_error *err)
{
    w->windows_run++;
    for (uint32_t k = 0; k <= w->n_shards; k++) {
        world_part *p = k == w->n_shards ? &w->center_part : &w->shards[k];
        p->window = w->windows_run;
        SH_TRY(import(p, err));
        p->next_ms = next_of(p);
        p->mail_ms = UINT64_MAX;
    }
    return SH_OK;
}

/* ---- faults ---- */

/* Its events that are to come from from_ms on and before until_ms; its end with its begin. */
static sh_status schedule_one(world *w, const world_fault *f, uint32_t target, uint64_t clone_at,
                              uint64_t from_ms, uint64_t until_ms, sh_error *err)
{
    world_part *p = world_part_of(w, target);
    sim_event e = {.at_ms = f->at_ms,
                   .target = target,
                   .from = target,
                   .kind = SIM_EV_FAULT,
                   .job = (void *)f,
                   .tag = clone_at << 1 | 1};
    bool lasts = world_fault_is_link(f->kind) || world_fault_is_lie(f->kind) ||
                 f->kind == WORLD_DISK_FULL || f->kind == WORLD_CLOCK_SKEW ||
                 f->kind == WORLD_CLONE;
    bool begins = f->at_ms >= from_ms && f->at_ms < until_ms;
    if (begins)
        SH_TRY(world_push(p, e, err));
    if (f->kind == WORLD_RESTORE) {
        e.kind = SIM_EV_BACKUP;
        e.at_ms = f->at_ms > f->number ? f->at_ms - f->number : 0;
        if (e.at_ms >= from_ms && e.at_ms < until_ms)
            SH_TRY(world_push(p, e, err));
    }
    if (!begins || !lasts)
        return SH_OK;
    e.kind = SIM_EV_FAULT;
    e.at_ms = SH_MIN(f->at_ms + SH_MAX(f->for_ms, (uint64_t)1), w->end_ms);
    e.tag = clone_at << 1;
    return world_push(p, e, err);
}

/* A day's faults: those of a month would lie in the queues for most of it. */
static sh_status schedule(world *w, uint64_t from_ms, uint64_t until_ms, sh_error *err)
{
    uint32_t center = w->n_nodes + w->n_clones, clones = 0;
    for (size_t k = 0; k < w->script.n; k++) {
        const world_fault *f = &w->script.faults[k];
        uint64_t clone_at = f->kind == WORLD_CLONE ? w->n_nodes + clones++ : 0;
        uint32_t first = f->target, n = f->target < w->n_nodes ? 1 : 0;
        bool aggregator = f->target == WORLD_AGGREGATOR || f->kind == WORLD_CRASH_AGGREGATOR;
        bool begins = f->at_ms >= from_ms && f->at_ms < until_ms;
        if (f->at_ms >= w->end_ms || (!begins && f->kind != WORLD_RESTORE))
            continue;
        if (aggregator && !world_fault_is_link(f->kind)) {
            first = center;
            n = 1;
        } else if (aggregator || f->target == WORLD_ALL) {
            first = 0;
            n = w->n_nodes;
        }
        for (uint32_t i = first; i < first + n; i++)
            SH_TRY(schedule_one(w, f, i, clone_at, from_ms, until_ms, err));
    }
    return SH_OK;
}

/* ---- the end ---- */

static bool at_rest(const world *w)
{
    const sh_coord *core = world_center_core(w);
    if (!core)
        return false;
    sh_coord_status c = sh_coord_get_status(core);
    if (c.merging || c.gating || c.evaluating || !c.closed)
        return false;
    for (uint32_t i = 0; i < w->n_nodes; i++) {
        const world_node *n = &w->nodes[i];
        if (!n->core)
            return false;
        sh_node_status s = sh_node_get_status(n->core);
        if (s.confirmed_version != c.version || s.outbox_items > 0)
            return false;
    }
    return true;
}

static sh_status settle(world *w, world_team *team, sh_error *err)
{
    w->settling = true;
    SH_TRY(world_center_close(w, err));
    SH_TRY(flush(w, err));
    uint64_t until = w->end_ms;
    while (!is_decided(w) && !at_rest(w) && until < w->end_ms + WORLD_SETTLE_MS_MAX) {
        until += REST_CHECK_MS;
        SH_TRY(run_until(w, team, until, err));
    }
    w->rest_ms = until;
    return SH_OK;
}

static sh_status finish(world *w, sh_error *err)
{
    uint32_t n = w->n_nodes + w->n_clones;
    world_oracle_node *nodes = sh_calloc(n, sizeof *nodes);
    if (!nodes)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u nodes", n);
    for (uint32_t i = 0; i < n; i++)
        nodes[i] = (world_oracle_node){w->nodes[i].core, w->nodes[i].store};
    world_oracle_join(w->oracle, w->rest_ms);
    world_oracle_finish(w->oracle, w->rest_ms, world_center_core(w), world_center_store(w), nodes);
    free(nodes);
    return SH_OK;
}

static sh_status run_days(world *w, world_team *team, sh_error *err)
{
    for (uint64_t until = 0; until < w->end_ms && !is_decided(w);) {
        uint64_t from = until;
        until = SH_MIN(from + AUDIT_MS, w->end_ms);
        SH_TRY(schedule(w, from, until, err));
        SH_TRY(flush(w, err));
        SH_TRY(run_until(w, team, until, err));
        if (w->n_nodes <= AUDIT_NODES_MAX)
            world_oracle_audit(w->oracle, until, world_center_store(w));
    }
    SH_TRY(settle(w, team, err));
    return finish(w, err);
}

/* ---- making it ---- */

/* Small fleets differ in what they are limited by. */
static void set_small_options(world *w, uint64_t bits)
{
    sh_node_options *n = &w->node_options;
    sh_coord_options *c = &w->coord_options;
    if (bits & 1) { /* nodes evaluate candidates themselves */
        c->canary_nodes_min = 2;
        c->canary_tokens_min = 8;
        c->canary_share = 1;
        c->canary_ms_max = 4 * WORLD_HOUR_MS;
    }
    if (bits & 2) { /* a day's windows are more, and so is a large update */
        c->node_items_max = 16;
        n->outbox_quota_bytes[SH_CLASS_UPDATE] = 64u << 10;
    }
    if (bits & 4) { /* a fleet that comes back at once is told to come back later */
        c->checkins_per_s = 1;
        c->items_per_s = 1;
        c->asked_bytes_max = 72000; /* the largest update, alone */
    }
    if (bits & 8) /* more than most need on a day, less than some */
        n->budgets = (sh_node_budgets){.up_day = 40u << 10, .down_day = 640u << 10};
    n->monitor.samples_min = 1;
    n->monitor.average_run_length = 100;
}

static void set_options(world *w)
{
    uint64_t bits = world_draw(w, 0, STREAM_CONFIG, 0);
    bool small = w->n_nodes <= AUDIT_NODES_MAX;
    w->node_options = (sh_node_options){
        .release_key = w->coord_options.release_pk,
        .agent = "shoal-sim",
        .kernel = "simulated",
        .cores = 1,
        .memory_bytes = 1u << 30,
        .records_max = 64,
        .feedback_tokens_max = 256,
        .windows_max = 2,
        .completions_max = 1,
        .retry_min_ms = 10000,
        .retry_max_ms = 1800000,
        .confirm_inferences = 2,
        .send_only_if_better = true,
        .evaluate = true,
        .monitor = {
            .window = 64, .window_ms_max = 40 * 60000, .reference = 64, .average_run_length = 1e6}};
    static const uint64_t quotas[SH_CLASSES] = {1u << 20, 64u << 10, 6u << 10, 64u << 10};
    memcpy(w->node_options.outbox_quota_bytes, quotas, sizeof quotas);
    sh_coord_options *c = &w->coord_options;
    c->enrol_any = true;
    c->buffer = SH_MIN(SH_MAX(w->n_nodes / BUFFER_PART, 2u), BUFFER_MAX);
    c->staleness_max = 6;
    c->staleness_discount = 0.8f;
    c->server_scale = 1;
    c->norm_factor_max = 4;
    c->gate_slice_max = 1.5;
    c->round_ms_max = 6 * WORLD_HOUR_MS;
    c->checkin_ms = 50 * 60000;
    c->chunk_budget = 16;
    if (small)
        set_small_options(w, bits);
    else
        c->node_items_max = 4; /* a month of windows of all nodes is not to be looked at */
    c->train = (sh_train_plan){.rank = 8,
                               .alpha = 16,
                               .lr = 0.01f,
                               .lr_final = 0.3f,
                               .clip = 1,
                               .batch = 2,
                               .context = 32,
                               .passes_milli = 1000,
                               .steps_max = 100,
                               .tokens_min = 32};
    w->candidates_day = (double)w->n_nodes * 1.1 / c->buffer;
}

/* The key's first bytes are its node's number, so that the aggregator's shell needs no table. */
static void make_key(world *w, uint32_t i)
{
    uint64_t seed[2] = {w->seed, i};
    w->nodes[i].key = sh_blake2b(seed, sizeof seed);
    memcpy(w->nodes[i].key.b, &i, sizeof i);
}

static uint8_t class_of(const world *w, uint32_t i)
{
    double at = world_unit(world_draw(w, i, STREAM_CLASS, 0));
    size_t k = 0;
    while (k + 1 < w->fleet->n && at >= w->fleet->classes[k].share)
        at -= w->fleet->classes[k++].share;
    return (uint8_t)k;
}

static void make_node(world *w, uint32_t i)
{
    world_node *n = &w->nodes[i];
    sh_rng_init(&n->rng, w->seed, i, STREAM_USER);
    n->off = i >= w->n_nodes;
    if (n->off)
        return;
    n->key_of = i;
    make_key(w, i);
    n->cls = class_of(w, i);
    n->files[0] = (world_file){w->genesis_sha, true};
    world_oracle_node_key(w->oracle, i, &n->key);
    world_oracle_node_slot(w->oracle, i, 0, &w->genesis_sha);
}

static void count_clones(world *w)
{
    for (size_t k = 0; k < w->script.n; k++)
        w->n_clones += w->script.faults[k].kind == WORLD_CLONE;
}

static void name_clones(world *w)
{
    uint32_t at = w->n_nodes;
    for (size_t k = 0; k < w->script.n; k++) {
        const world_fault *f = &w->script.faults[k];
        if (f->kind != WORLD_CLONE)
            continue;
        world_node *copy = &w->nodes[at++];
        copy->key_of = f->target < w->n_nodes ? f->target : 0;
        copy->key = w->nodes[copy->key_of].key;
        copy->cls = w->nodes[copy->key_of].cls;
        world_oracle_node_key(w->oracle, at - 1, &copy->key);
    }
}

static sh_status make_parts(world *w, sh_error *err)
{
    w->n_shards = SH_MIN(w->n_nodes, WORLD_SHARDS);
    for (uint32_t k = 0; k <= w->n_shards; k++) {
        bool center = k == w->n_shards;
        world_part *p = center ? &w->center_part : &w->shards[k];
        p->w = w;
        p->next_ms = 0;
        p->mail_ms = UINT64_MAX;
        p->actions = center ? NULL : sh_calloc(1, sizeof *p->actions);
        for (int b = 0; b < 2; b++) {
            p->out[b] = sh_calloc(center ? WORLD_SHARDS : 1, sizeof *p->out[b]);
            if (!p->out[b] || (!center && !p->actions))
                return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for partitions");
        }
    }
    return SH_OK;
}

static sh_status make(world *w, world_team *team, sh_error *err)
{
    world_oracle_options o = {.nodes = w->n_nodes + w->n_clones,
                              .node = &w->node_options,
                              .store_bytes_max = NODE_STORE_BYTES,
                              .stride = w->n_nodes <= AUDIT_NODES_MAX ? 1 : 64};
    SH_TRY(make_parts(w, err));
    SH_TRY(world_make_genesis(w, err));
    set_options(w);
    o.release_key = w->coord_options.release_pk;
    o.node_items_max = w->coord_options.node_items_max;
    o.staleness_max = w->coord_options.staleness_max;
    o.asked_bytes_max = w->coord_options.asked_bytes_max;
    o.says_later = w->coord_options.checkins_per_s > 0;
    SH_TRY(world_oracle_create(&o, &w->oracle, err));
    w->nodes = sh_calloc(o.nodes, sizeof *w->nodes);
    if (!w->nodes)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u nodes", o.nodes);
    SH_TRY(world_center_create(w, err));
    world_oracle_join(w->oracle, 0); /* the first release is published */
    for (uint32_t i = 0; i < o.nodes; i++)
        make_node(w, i);
    world_team_run(team, w, 0, 1);
    SH_TRY(end_windows(w, 0, err));
    w->begun = w->busy = true;
    name_clones(w);
    return SH_OK;
}

static void destroy(world *w)
{
    for (uint32_t k = 0; k < w->n_shards; k++) {
        world_part *p = &w->shards[k];
        sim_event e;
        while (sim_queue_pop(&p->queue, &e)) {
            sh_buf_release(&e.message);
            if (e.kind == SIM_EV_JOB)
                free(e.job);
        }
    }
    for (uint32_t i = 0; w->nodes && i < w->n_nodes + w->n_clones; i++)
        world_node_release(&w->nodes[i]);
    world_center_destroy(w);
    for (uint32_t k = 0; k <= w->n_shards; k++) {
        bool center = k == w->n_shards;
        world_part *p = center ? &w->center_part : &w->shards[k];
        for (int b = 0; b < 2; b++) {
            for (uint32_t m = 0; p->out[b] && m < (center ? WORLD_SHARDS : 1); m++) {
                free(p->out[b][m].items);
                sh_buf_release(&p->out[b][m].bytes);
            }
            free(p->out[b]);
        }
        if (p->actions)
            sh_node_actions_clear(p->actions);
        free(p->actions);
        sim_queue_release(&p->queue);
    }
    free(w->nodes);
    world_oracle_destroy(&w->oracle);
    sh_buf_release(&w->genesis_manifest);
    sh_buf_release(&w->genesis_model);
    world_script_release(&w->script);
    free(w);
}

/* ---- what came out ---- */

void world_add_counts(world_counts *to, const world_counts *from)
{
    uint64_t *a = (uint64_t *)to;
    const uint64_t *b = (const uint64_t *)from;
    for (size_t k = 0; k < sizeof *to / sizeof *a; k++)
        a[k] += b[k];
}

static void fill_result(world *w, world_result *out)
{
    uint64_t hash = world_center_hash(w);
    world_add_counts(&out->counts, &w->center_part.counts);
    for (uint32_t k = 0; k < w->n_shards; k++)
        world_add_counts(&out->counts, &w->shards[k].counts);
    for (uint32_t i = 0; i < w->n_nodes + w->n_clones; i++) {
        const world_node *n = &w->nodes[i];
        uint64_t bytes = n->store ? sh_store_bytes_used(n->store) : 0;
        hash = world_mix(world_mix(hash, n->hash), n->version);
        out->store_bytes_node_max = SH_MAX(out->store_bytes_node_max, bytes);
    }
    out->oracle = world_oracle_get_counts(w->oracle);
    out->counts.acks = out->oracle.acks_promised;
    out->counts.told_later = out->oracle.quiets;
    out->violations = world_oracle_violations(w->oracle);
    for (size_t k = 0; k < world_oracle_kept(w->oracle) && k < SH_COUNT(out->kept); k++)
        out->kept[out->n_kept++] = *world_oracle_get(w->oracle, k);
    out->hash = world_mix(hash, out->violations);
    out->nodes = w->n_nodes;
    out->days = w->script.days;
    out->simulated_ms = w->rest_ms;
    out->rested_ms = w->rest_ms - w->end_ms;
    const sh_coord *core = world_center_core(w);
    out->coord_version = core ? sh_coord_get_status(core).version : 0;
}

/* The size that follows the last such text of malloc_info's: the sums over all arenas come last. */
static uint64_t last_size(const char *text, const char *of)
{
    const char *at = NULL;
    for (const char *next = text; (next = strstr(next, of)) != NULL; next++)
        at = next;
    at = at ? strstr(at, "size=\"") : NULL;
    return at ? strtoull(at + 6, NULL, 10) : 0;
}

/* Bytes of all blocks that are allocated, with what the allocator adds to each; 0: not known. */
static uint64_t heap_in_use(void)
{
    char *text = NULL;
    size_t n = 0;
    uint64_t bytes = 0;
    FILE *f = open_memstream(&text, &n);
    if (!f)
        return 0;
    int failed = malloc_info(0, f);
    if (fclose(f) == 0 && failed == 0)
        bytes = last_size(text, "<system type=\"current\"") + last_size(text, "type=\"mmap\"") -
                last_size(text, "type=\"rest\"") - last_size(text, "type=\"fast\"");
    free(text);
    return bytes;
}

/* What the nodes take, with their stores, now that they rest: what is free once they are gone. */
static uint64_t weigh_nodes(world *w)
{
    uint64_t with = heap_in_use();
    for (uint32_t i = 0; i < w->n_nodes + w->n_clones; i++)
        world_node_release(&w->nodes[i]);
    uint64_t without = heap_in_use();
    return with > without ? with - without : 0;
}

sh_status world_run(const world_options *options, const world_fleet *fleet, world_script *script,
                    uint32_t threads, world_result *out, sh_error *err)
{
    world_team *team = NULL;
    sh_status status = SH_OK;
    world *w = sh_calloc(1, sizeof *w);
    if (!w)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory");
    *out = (world_result){.seed = script->seed};
    w->options = options;
    w->fleet = fleet;
    w->seed = script->seed;
    w->script = *script;
    *script = (world_script){0};
    w->n_nodes = w->script.nodes;
    w->end_ms = w->script.days * WORLD_DAY_MS;
    w->window_ms = fleet->delay_ms_min;
    count_clones(w);
    out->rss_before = sh_memory_now().resident;
    SH_GOTO(world_team_create(threads, &team, err));
    SH_GOTO(make(w, team, err));
    SH_GOTO(run_days(w, team, err));
    out->rss_peak = sh_memory_now().peak;
    fill_result(w, out);
    if (options->seeds == 1) /* else other seeds take and give memory meanwhile */
        out->resting_bytes = weigh_nodes(w);
cleanup:
    world_team_destroy(&team);
    destroy(w);
    return status;
}
