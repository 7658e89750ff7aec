/*
 * The shell of the simulated aggregator, as aggregator/server_step.c is the real one's: what comes
 * within COMMIT_MS is stepped in one transaction, whose actions wait for its commit; other events
 * have a transaction of their own. After an error the group is taken back and the core made again
 * after a pause, in which messages wait; a crash loses them, and every connection.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/server.h"
#include "experiments/world/world.h"
#include "shared/base/canary.h"
#include "shared/store/simulated.h"

#define COMMIT_MS     40u /* from a group's first message to its commit: an fsync's time */
#define BOOT_MS       1000u
#define BOOT_MS_MAX   60000u
#define DOWN_MS_MIN   1000u
#define RETURN_MS     30000u /* nodes find it again within that time */
#define MERGE_MS      120000u
#define GATE_MS       300000u
#define UPDATE_MAX    (1u << 20)
#define WAITING_MAX   65536u
#define STREAM_CENTER 0x434f4f52u
#define STREAM_RETURN 0x52455455u
#define STORE_MAX     (UINT64_C(64) << 30)

typedef struct { /* a step of the group */
    sh_coord_event event;
    sh_buf message;  /* storage of event.message */
    size_t first, n; /* its actions */
} group_step;

struct world_center {
    sh_coord *core;
    sh_store *store;
    sh_txn *txn;
    sh_coord_actions actions;
    sh_coord_action *queued;
    size_t n_queued, queued_cap;
    group_step steps[SERVER_GROUP_STEPS];
    size_t n_steps;
    sim_event *waiting; /* while the core is down; owned */
    size_t n_waiting, waiting_cap;
    world_route *routes;
    uint64_t sequence, timer, hash, boot_ms, life;
    uint32_t connection_life;
    uint64_t down_ms;
    const world_fault *full;
    bool alive, dies_after, closing;
    bool has_reserve; /* the transaction: a full disk is no excuse */
};

typedef struct {
    sh_coord_job job;
    sh_merge_input *inputs;
    bool *poisoned; /* [n_inputs] */
} center_job;

static void job_free(center_job *job)
{
    if (!job)
        return;
    free(job->inputs);
    free(job->poisoned);
    free(job);
}

const sh_coord *world_center_core(const world *w)
{
    return w->center->core;
}

sh_store *world_center_store(const world *w)
{
    return w->center->store;
}

uint64_t world_center_hash(const world *w)
{
    return w->center->hash;
}

world_route world_center_route(const world *w, uint32_t key_of)
{
    SH_ASSERT(key_of < w->n_nodes);
    return w->center->routes[key_of];
}

static sh_status push(world_part *p, sim_event e, sh_error *err)
{
    e.target = p->w->n_nodes + p->w->n_clones;
    e.from = e.target;
    return world_push(p, e, err);
}

/* ---- actions ---- */

static sh_status start_job(world_part *p, sh_coord_action *a, sh_error *err)
{
    world_center *c = p->w->center;
    center_job *job = sh_calloc(1, sizeof *job);
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    sh_buf bytes;
    if (!job)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job");
    sh_buf_init(&bytes, UPDATE_MAX);
    job->job = a->job;
    job->inputs = a->job.inputs;
    a->job.inputs = NULL;
    bool merge = job->job.kind == SH_COORD_MERGE;
    job->poisoned = sh_calloc(SH_MAX(job->job.n_inputs, 1u), sizeof *job->poisoned);
    if (!job->poisoned)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job"));
    if (merge) {
        SH_GOTO(sh_txn_begin(c->store, SH_TXN_READ, &txn, err));
        for (uint32_t k = 0; k < job->job.n_inputs; k++) {
            sh_merge_input *in = &job->inputs[k];
            sh_buf_clear(&bytes);
            in->reason = SH_REASON_NONE;
            in->norm = in->cosine = 0.5;
            if (sh_coord_read_update(txn, &in->id, &bytes, NULL) != SH_OK)
                in->reason = SH_REASON_BAD_BLOB;
            else if (world_is_poison(bytes.data, bytes.len))
                in->reason = SH_REASON_NORM;
        }
    }
    SH_GOTO(push(p,
                 (sim_event){.at_ms = p->now_ms + (merge ? MERGE_MS : GATE_MS),
                             .life = (uint32_t)c->life,
                             .kind = SIM_EV_JOB,
                             .job = job},
                 err));
    job = NULL;
cleanup:
    sh_txn_abort(&txn);
    sh_buf_release(&bytes);
    job_free(job);
    return status;
}

static void take_note(world_part *p, const sh_coord_action *a)
{
    p->counts.releases += a->note == SH_CNOTE_RELEASED || a->note == SH_CNOTE_ROLLED_BACK;
    p->counts.candidates_refused += a->note == SH_CNOTE_CANDIDATE_REFUSED;
    p->counts.merges += a->note == SH_CNOTE_MERGE_STARTED;
}

static sh_status send(world_part *p, sh_coord_action *a, sh_error *err)
{
    world_center *c = p->w->center;
    sh_buf message = a->message;
    uint64_t head[2] = {message.len, 0};
    a->message = (sh_buf){0};
    if (message.len >= sizeof head)
        memcpy(head, message.data, sizeof head);
    c->hash = world_mix(c->hash, head[0] ^ head[1]);
    return world_send_down(p, &a->node, &message, err);
}

static sh_status carry_out(world_part *p, sh_coord_action *actions, size_t n, sh_error *err)
{
    world_center *c = p->w->center;
    sh_status status = SH_OK;
    for (size_t k = 0; k < n; k++) {
        sh_coord_action *a = &actions[k];
        uint64_t now = WORLD_START_MS + p->now_ms;
        c->hash = world_mix(c->hash, (uint64_t)a->kind << 56 ^ a->number ^ a->at_ms << 8);
        switch (a->kind) {
        case SH_COORD_SEND:
            if (!a->early) /* gone already */
                SH_GOTO(send(p, a, err));
            break;
        case SH_COORD_SET_TIMER:
            SH_GOTO(push(p,
                         (sim_event){.at_ms = p->now_ms + (a->at_ms > now ? a->at_ms - now : 1),
                                     .life = (uint32_t)c->life,
                                     .kind = SIM_EV_TIMER,
                                     .tag = ++c->timer},
                         err));
            break;
        case SH_COORD_START_JOB:
            SH_GOTO(start_job(p, a, err));
            break;
        case SH_COORD_NOTE:
            take_note(p, a);
            break;
        case SH_COORD_KEY: /* who may connect is not simulated: any key may */
        case SH_COORD_DROP:
        case SH_COORD_DROP_OTHERS:
        case SH_COORD_SEND_UP: /* and no relays are */
            break;
        }
    }
cleanup:
    for (size_t k = 0; k < n; k++) {
        sh_buf_release(&actions[k].message);
        free(actions[k].job.inputs);
        actions[k] = (sh_coord_action){0};
    }
    return status;
}

/* ---- transactions ---- */

static void end_group(world_center *c)
{
    sh_txn_abort(&c->txn);
    sh_coord_actions_clear(&c->actions);
    for (size_t k = 0; k < c->n_queued; k++) {
        sh_buf_release(&c->queued[k].message);
        free(c->queued[k].job.inputs);
    }
    for (size_t k = 0; k < c->n_steps; k++)
        sh_buf_release(&c->steps[k].message);
    c->n_queued = c->n_steps = 0;
}

static sh_status restart_in(world_part *p, uint64_t ms, sh_error *err)
{
    world_center *c = p->w->center;
    return push(
        p, (sim_event){.at_ms = p->now_ms + ms, .life = (uint32_t)c->life, .kind = SIM_EV_RESTART},
        err);
}

/* Every node's connection ends, or may begin again. */
static sh_status tell_nodes(world_part *p, bool there, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    for (uint32_t i = 0; i < w->n_nodes + w->n_clones; i++) {
        uint64_t spread = world_draw(w, i, STREAM_RETURN, c->life << 1 | there) % RETURN_MS;
        sim_event e = {.at_ms = p->now_ms + w->fleet->delay_ms_min + (there ? spread : 0),
                       .target = i,
                       .from = w->n_nodes + w->n_clones,
                       .kind = SIM_EV_CONNECTED,
                       .tag = there};
        SH_TRY(world_mail(p, e, err));
    }
    return SH_OK;
}

static sh_status die(world_part *p, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    end_group(c);
    sh_coord_destroy(&c->core);
    c->alive = c->dies_after = false;
    c->life++;
    for (size_t k = 0; k < c->n_waiting; k++)
        sh_buf_release(&c->waiting[k].message);
    c->n_waiting = 0;
    memset(c->routes, 0, w->n_nodes * sizeof *c->routes);
    c->hash = world_mix(c->hash, 0xdead);
    SH_TRY(tell_nodes(p, false, err));
    return restart_in(p, SH_MAX(c->down_ms, DOWN_MS_MIN), err);
}

static sh_status fall(world_part *p, sh_status why, const sh_error *text, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    bool excused =
        why == SH_ERR_CRASHED || (why == SH_ERR_FULL && c->full != NULL && !c->has_reserve);
    world_oracle_coord_failed(w->oracle, p->now_ms, why, text->text, excused);
    if (why == SH_ERR_CRASHED)
        return die(p, err);
    end_group(c);
    sh_coord_destroy(&c->core);
    c->life++;
    c->boot_ms = SH_MIN(SH_MAX(2 * c->boot_ms, (uint64_t)BOOT_MS), (uint64_t)BOOT_MS_MAX);
    return restart_in(p, c->boot_ms, err);
}

static sh_status queue_actions(world_center *c, sh_error *err)
{
    size_t n = c->actions.n;
    if (sh_array_reserve((void **)&c->queued, &c->queued_cap, c->n_queued + n, sizeof *c->queued,
                         (size_t)SERVER_GROUP_STEPS * SH_COORD_ACTIONS_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %zu actions", n);
    if (n > 0)
        memcpy(c->queued + c->n_queued, c->actions.items, n * sizeof *c->queued);
    c->n_queued += n;
    c->actions.n = 0; /* their memory moved */
    return SH_OK;
}

/* What the core lets go before the commit. The oracle sees it with its step. */
static sh_status send_early(world_part *p, size_t first, sh_error *err)
{
    world_center *c = p->w->center;
    for (size_t k = first; k < c->n_queued; k++) {
        sh_coord_action early = c->queued[k];
        if (early.kind != SH_COORD_SEND || !early.early)
            continue;
        SH_TRY(world_copy(&c->queued[k].message, &early.message, err));
        SH_TRY(send(p, &early, err));
    }
    return SH_OK;
}

/* Commits the group; its steps are shown to the oracle, then what they ask for is done. */
static sh_status commit(world_part *p, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    sh_error text = {0};
    sh_status status;
    if (!c->txn)
        return SH_OK;
    if (SH_CANARY(ACK_BEFORE_COMMIT))
        for (size_t k = 0; k < c->n_queued; k++)
            if (c->queued[k].kind == SH_COORD_SEND && !c->queued[k].early)
                SH_TRY(send(p, &c->queued[k], err));
    status = sh_txn_commit(&c->txn, &text);
    if (status == SH_OK && !SH_CANARY(NO_SYNC))
        status = sh_store_sync(c->store, &text);
    if (status == SH_OK && c->dies_after)
        status = SH_ERR_CRASHED;
    if (status != SH_OK)
        return fall(p, status, &text, err);
    p->counts.commits++;
    c->boot_ms = 0;
    for (size_t k = 0; k < c->n_steps; k++) {
        group_step *g = &c->steps[k];
        c->actions.n = g->n;
        if (g->n > 0)
            memcpy(c->actions.items, c->queued + g->first, g->n * sizeof *c->queued);
        world_oracle_coord_step(w->oracle, p->now_ms, &c->actions, c->core, c->store);
        c->actions.n = 0;
        sh_buf_release(&g->message);
    }
    c->n_steps = 0;
    sh_coord_action *queued = c->queued;
    size_t n = c->n_queued;
    c->queued = NULL;
    c->n_queued = c->queued_cap = 0;
    status = carry_out(p, queued, n, err);
    free(queued);
    return status;
}

static sh_status step(world_part *p, sh_coord_event *event, sh_buf *message, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    sh_error text = {0};
    sh_status why = SH_OK;
    event->now_ms = WORLD_START_MS + p->now_ms;
    if (!c->txn) {
        int kind = event->kind == SH_COORD_MESSAGE ? SH_TXN_WRITE : SH_TXN_RESERVE;
        /* A candidate's bytes may be more than the reserve. */
        c->has_reserve = kind == SH_TXN_RESERVE && event->kind != SH_COORD_JOB_DONE;
        why = sh_txn_begin(c->store, kind, &c->txn, &text);
        if (why == SH_OK && event->kind == SH_COORD_MESSAGE)
            SH_TRY(push(p,
                        (sim_event){.at_ms = p->now_ms + COMMIT_MS,
                                    .life = (uint32_t)c->life,
                                    .kind = SIM_EV_COMMIT},
                        err));
    }
    p->counts.coord_steps++;
    size_t first = c->n_queued;
    if (why == SH_OK)
        why = sh_coord_step(c->core, event, c->txn, &c->actions, &text);
    if (why != SH_OK)
        return fall(p, why, &text, err);
    world_oracle_coord_stepped(w->oracle, event);
    SH_TRY(queue_actions(c, err));
    SH_TRY(send_early(p, first, err));
    group_step *g = &c->steps[c->n_steps++];
    *g = (group_step){.event = *event, .first = first, .n = c->n_queued - first};
    if (message) {
        g->message = *message;
        *message = (sh_buf){0};
    }
    return c->n_steps == SERVER_GROUP_STEPS ? commit(p, err) : SH_OK;
}

static sh_status step_alone(world_part *p, sh_coord_event *event, sh_error *err)
{
    world_center *c = p->w->center;
    SH_TRY(commit(p, err));
    if (!c->core)
        return SH_OK;
    SH_TRY(step(p, event, NULL, err));
    return c->core ? commit(p, err) : SH_OK;
}

/* ---- boot ---- */

static sh_status boot(world_part *p, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    sh_genesis genesis = {.model = {w->genesis_model.data, w->genesis_model.len},
                          .format = "Q8_0",
                          .master = w->genesis_master};
    sh_txn *txn = NULL;
    sh_error text = {0};
    sh_rng rng;
    sh_status status = SH_OK;
    bool began = c->alive;
    if (!c->alive)
        sh_store_simulate_restart(c->store, SH_STORE_UNSYNCED_MAX);
    c->alive = true;
    sh_rng_init(&rng, w->seed, c->life, STREAM_CENTER);
    c->has_reserve = true;
    SH_GOTO(sh_txn_begin(c->store, SH_TXN_RESERVE, &txn, &text));
    SH_GOTO(sh_coord_create(&w->coord_options, &genesis, WORLD_START_MS + p->now_ms, &rng, txn,
                            &c->actions, &c->core, &text));
    SH_GOTO(sh_txn_commit(&txn, &text));
    SH_GOTO(sh_store_sync(c->store, &text));
    p->counts.boots++;
cleanup:
    sh_txn_abort(&txn);
    if (status != SH_OK) {
        sh_coord_actions_clear(&c->actions);
        return fall(p, status, &text, err);
    }
    world_oracle_coord_boot(w->oracle, p->now_ms, c->core, c->store);
    SH_TRY(queue_actions(c, err));
    SH_TRY(send_early(p, 0, err));
    sh_coord_action *queued = c->queued;
    size_t n = c->n_queued;
    c->queued = NULL;
    c->n_queued = c->queued_cap = 0;
    status = carry_out(p, queued, n, err);
    free(queued);
    SH_TRY(status);
    if (!began && c->life > 0)
        SH_TRY(tell_nodes(p, true, err));
    if (c->closing)
        SH_TRY(world_center_close(w, err));
    for (size_t k = 0; k < c->n_waiting; k++) { /* in the order that they came in */
        c->waiting[k].at_ms = p->now_ms + 1;
        SH_TRY(world_push(p, c->waiting[k], err));
    }
    c->n_waiting = 0;
    return SH_OK;
}

/* What a device is delivered with. */
static sh_status export_genesis(world *w, sh_error *err)
{
    sh_txn *txn = NULL;
    sh_bytes manifest;
    SH_TRY(sh_txn_begin(w->center->store, SH_TXN_READ, &txn, err));
    sh_status status = sh_coord_get_manifest(txn, 1, &manifest, err);
    if (status == SH_OK)
        status = sh_buf_append(&w->genesis_manifest, manifest.data, manifest.n);
    sh_txn_abort(&txn);
    return status;
}

sh_status world_center_create(world *w, sh_error *err)
{
    world_center *c = sh_calloc(1, sizeof *c);
    if (!c)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for an aggregator");
    w->center = c;
    c->routes = sh_calloc(w->n_nodes, sizeof *c->routes);
    if (!c->routes)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u nodes", w->n_nodes);
    sh_store_options options = {.tables = sh_coord_tables,
                                .n_tables = SH_COORD_TABLES,
                                .bytes_max = STORE_MAX,
                                .reserve_bytes = 1u << 20};
    SH_TRY(sh_store_open_memory(&options, &c->store, err));
    if (SH_CANARY(NO_SYNC))
        sh_store_simulate_unsynced(c->store, true);
    SH_TRY(boot(&w->center_part, err));
    return export_genesis(w, err);
}

void world_center_destroy(world *w)
{
    world_center *c = w->center;
    sim_event e;
    if (!c)
        return;
    while (sim_queue_pop(&w->center_part.queue, &e)) {
        sh_buf_release(&e.message);
        if (e.kind == SIM_EV_JOB)
            job_free(e.job);
    }
    end_group(c);
    sh_coord_destroy(&c->core);
    sh_store_close(&c->store);
    for (size_t k = 0; k < c->n_waiting; k++)
        sh_buf_release(&c->waiting[k].message);
    free(c->waiting);
    free(c->queued);
    free(c->routes);
    free(c);
    w->center = NULL;
}

sh_status world_center_close(world *w, sh_error *err)
{
    world_center *c = w->center;
    sh_coord_event e = {.kind = SH_COORD_COMMAND, .command = SH_COMMAND_CLOSE};
    c->closing = true; /* and again after a boot, until the store has it */
    if (!c->core || sh_coord_get_status(c->core).closing)
        return SH_OK;
    return step_alone(&w->center_part, &e, err);
}

/* ---- jobs ---- */

static sh_status end_job(world_part *p, center_job *job, sh_error *err)
{
    world *w = p->w;
    sh_coord_event e = {.kind = SH_COORD_JOB_DONE};
    sh_coord_job_result *r = &e.result;
    sh_status status = SH_OK;
    uint8_t *hashes = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, 4u << 20);
    r->id = job->job.id;
    if (job->job.kind == SH_COORD_MERGE) {
        uint32_t good = 0;
        for (uint32_t k = 0; k < job->job.n_inputs; k++)
            good += job->inputs[k].reason == SH_REASON_NONE;
        r->inputs = job->inputs;
        r->n_inputs = job->job.n_inputs;
        if (good > 0) {
            SH_GOTO(world_make_candidate(w, job->job.candidate, &bytes, err));
            SH_GOTO(sh_blob_describe(bytes.data, bytes.len, &r->candidate, &hashes, err));
            r->candidate_bytes = (sh_bytes){bytes.data, bytes.len};
            r->new_master = sh_blake2b(bytes.data, bytes.len);
            r->format = "Q8_0";
            r->adapter_rank = 8;
        }
    } else {
        bool passes = world_gate_passes(w, job->job.candidate);
        r->loss_parent = 4;
        r->loss_candidate = r->loss_adapter_form = passes ? 3.5 : 6;
        r->n_slices = 1;
        r->slice_parent[0] = 4;
        r->slice_candidate[0] = r->loss_candidate;
    }
    status = step_alone(p, &e, err);
cleanup:
    sh_buf_release(&bytes);
    free(hashes);
    return status;
}

/* ---- faults ---- */

static sh_status on_fault(world_part *p, const sim_event *e, sh_error *err)
{
    world_center *c = p->w->center;
    const world_fault *f = e->job;
    bool begins = (e->tag & 1) != 0;
    (void)err;
    if (f->kind == WORLD_DISK_FULL && begins) {
        c->full = f;
        p->counts.faults[f->kind]++;
        sh_store_simulate_room(c->store, sh_store_bytes_used(c->store) + f->number);
    } else if (f->kind == WORLD_DISK_FULL && c->full == f) {
        c->full = NULL;
        sh_store_simulate_room(c->store, UINT64_MAX);
    }
    if (!begins || !c->alive)
        return SH_OK;
    if (f->kind == WORLD_CRASH_AGGREGATOR || f->kind == WORLD_TORN) {
        p->counts.faults[f->kind]++;
        c->down_ms = f->for_ms;
        if (f->kind == WORLD_TORN && f->rate >= 0.5)
            c->dies_after = true;
        else
            sh_store_simulate_crash(c->store, SH_MAX(f->number, 1), false);
    }
    return SH_OK;
}

/* ---- events ---- */

static sh_status keep(world_center *c, sim_event *e, sh_error *err)
{
    if (c->n_waiting == WAITING_MAX) { /* a full queue: what comes is dropped */
        sh_buf_release(&e->message);
        return SH_OK;
    }
    if (sh_array_reserve((void **)&c->waiting, &c->waiting_cap, c->n_waiting + 1,
                         sizeof *c->waiting, WAITING_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for what waits");
    c->waiting[c->n_waiting++] = *e;
    e->message = (sh_buf){0};
    return SH_OK;
}

static sh_status on_message(world_part *p, sim_event *e, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    if (!c->alive)
        return SH_OK;
    if (!c->core)
        return keep(c, e, err);
    uint32_t from = e->from;
    sh_coord_event m = {.kind = SH_COORD_MESSAGE,
                        .node = w->nodes[from].key,
                        .connection = from + 1,
                        .message = {e->message.data, e->message.len}};
    return step(p, &m, &e->message, err);
}

/* The later connection of a key takes it over (as net_map.c has it). */
static void learn_route(world *w, const sim_event *e)
{
    world_center *c = w->center;
    world_route *r = &c->routes[w->nodes[e->from].key_of];
    if (r->node != e->from || r->connection == 0 || (uint32_t)e->tag > r->connection)
        *r = (world_route){e->from, (uint32_t)e->tag};
}

sh_status world_center_event(world_part *p, sim_event *e, sh_error *err)
{
    world *w = p->w;
    world_center *c = w->center;
    switch (e->kind) {
    case SIM_EV_DELIVER:
        if (c->alive)
            learn_route(w, e);
        return on_message(p, e, err);
    case SIM_EV_CONNECTED: {
        world_route *r = &c->routes[w->nodes[e->from].key_of];
        sh_coord_event gone = {.kind = SH_COORD_GONE, .node = w->nodes[e->from].key};
        if (r->node != e->from || r->connection > e->life)
            return SH_OK; /* it is back already */
        r->connection = 0;
        return c->core ? step_alone(p, &gone, err) : SH_OK;
    }
    case SIM_EV_TIMER: {
        sh_coord_event t = {.kind = SH_COORD_TIMER};
        return c->core && e->tag == c->timer && e->life == (uint32_t)c->life
                   ? step_alone(p, &t, err)
                   : SH_OK;
    }
    case SIM_EV_COMMIT:
        return e->life == (uint32_t)c->life ? commit(p, err) : SH_OK;
    case SIM_EV_JOB: {
        center_job *job = e->job;
        sh_status status = c->core && e->life == (uint32_t)c->life ? end_job(p, job, err) : SH_OK;
        job_free(job);
        return status;
    }
    case SIM_EV_RESTART:
        return e->life == (uint32_t)c->life && !c->core ? boot(p, err) : SH_OK;
    case SIM_EV_FAULT:
        return on_fault(p, e, err);
    default:
        return SH_OK;
    }
}
