/*
 * The shell of a simulated node, as edge-node/daemon_core.c is the real one's: a step is a
 * transaction, its actions are carried out after the commit, and after an error the core is made
 * again from the store.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/world/world.h"
#include "shared/base/canary.h"
#include "shared/store/simulated.h"
#include "shared/sync/sync.h"

#define RESERVE_MESSAGE_MAX 4096u /* as the daemon's */
#define SETTLE_USER_MS      300000u
#define FEEDBACK_TOKENS     16u
#define SESSION_TOKENS      128u
#define STREAM_USER         0x55534552u
#define STREAM_CORRECT      0x434f5252u

static uint64_t wall_of(const world_node *n, uint64_t now_ms)
{
    double skewed = n->clock_rate * (double)(now_ms - n->clock_from_ms);
    return (uint64_t)((int64_t)(WORLD_START_MS + now_ms) + n->clock_ms + (int64_t)skewed);
}

uint64_t world_node_now(const world_node *n, uint64_t now_ms)
{
    return now_ms + n->steady_ms;
}

void world_node_start_clock(world_node *n, uint64_t now_ms)
{
    n->steady_ms = wall_of(n, now_ms) - now_ms;
}

/* ---- steps ---- */

/* A crash of the store ends the process; an unreadable store is found out by the next boot. */
static sh_status failed(world_part *p, uint32_t i, int kind, sh_status why, const sh_error *text,
                        sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    bool full = why == SH_ERR_FULL;
    bool excused =
        why == SH_ERR_CRASHED ||
        (full && kind == SH_TXN_WRITE && world_node_active(n, WORLD_DISK_FULL) != NULL) ||
        (why == SH_ERR_CORRUPT && n->store_bad);
    world_oracle_node_failed(w->oracle, i, p->now_ms, why, text->text, excused);
    if (why == SH_ERR_CRASHED)
        return world_node_die(p, i, err);
    sh_node_destroy(&n->core);
    if (full)
        world_node_full(p, n);
    if (full && kind == SH_TXN_WRITE)
        return world_node_boot(p, i, err);
    return world_node_restart_in(p, i, full ? n->full_pause_ms : WORLD_REMAKE_MS, err);
}

/* One transaction. *why: what the step or its commit said; an error returned is the engine's. */
static sh_status step_as(world_part *p, uint32_t i, sh_node_event *event, int kind, sh_status *why,
                         sh_error *text)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    event->now_ms = world_node_now(n, p->now_ms);
    event->wall_ms = wall_of(n, p->now_ms);
    p->counts.node_steps++;
    SH_GOTO(sh_txn_begin(n->store, kind, &txn, text));
    SH_GOTO(sh_node_step(n->core, event, txn, p->actions, text));
    SH_GOTO(sh_txn_commit(&txn, text));
    if (n->dies_after) { /* before anything of it is sent */
        n->dies_after = false;
        status = SH_ERR_CRASHED;
    }
cleanup:
    sh_txn_abort(&txn);
    *why = status;
    if (status != SH_OK)
        sh_node_actions_clear(p->actions);
    return SH_OK;
}

/* An installation's end: taken in with the reserve at once, because a core that is made again gives
 * the job another number. */
static bool ends_job(const sh_node_event *event)
{
    return event->kind == SH_NODE_JOB_DONE && event->result.update.n == 0;
}

/* What is taken in with the reserve while the store counts as full. */
static bool may_reserve(const sh_node_event *event)
{
    return event->kind == SH_NODE_LINK_UP || event->kind == SH_NODE_LINK_DOWN ||
           (event->kind == SH_NODE_MESSAGE && event->message.n <= RESERVE_MESSAGE_MAX);
}

sh_status world_node_step(world_part *p, uint32_t i, sh_node_event *event, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_status why = SH_OK;
    sh_error text = {0};
    for (bool full = world_node_is_full(p, n);; full = true) {
        bool reserve = ends_job(event) || (full && may_reserve(event));
        int kind = reserve ? SH_TXN_RESERVE : SH_TXN_WRITE;
        if (!n->up || !n->core)
            return SH_OK;
        if (full && event->kind == SH_NODE_MESSAGE && !reserve) /* the peer sends it again */
            return SH_OK;
        SH_TRY(step_as(p, i, event, kind, &why, &text));
        n->hash = world_mix(n->hash, (uint64_t)event->kind << 32 | (uint64_t)why);
        if (why == SH_OK) {
            if (kind == SH_TXN_WRITE && !full)
                n->full_until_ms = 0;
            break;
        }
        SH_TRY(failed(p, i, kind, why, &text, err));
        if (why != SH_ERR_FULL || kind == SH_TXN_RESERVE || event->kind != SH_NODE_MESSAGE)
            return SH_OK; /* of the link the core that was made again knows */
    }
    world_oracle_node_step(w->oracle, i, p->now_ms, event, p->actions, n->core, n->store);
    return world_node_carry_out(p, i, p->actions, err);
}

/* ---- actions ---- */

static sh_status start_job(world_part *p, uint32_t i, const sh_node_job *want, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    sh_buf bytes;
    world_job *job = sh_calloc(1, sizeof *job);
    if (!job)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job");
    sh_buf_init(&bytes, SH_STORE_VALUE_MAX);
    job->job = *want;
    job->poisoned = world_node_active(n, WORLD_LIE_POISON) != NULL;
    if (want->kind == SH_JOB_INSTALL || want->kind == SH_JOB_EVALUATE) {
        sh_error ignored;
        SH_GOTO(sh_txn_begin(n->store, SH_TXN_READ, &txn, err));
        job->status = sh_blob_get(txn, SH_NODE_T_CHUNK, &want->blob, &bytes, &ignored);
        sh_txn_abort(&txn);
        job->sha256 = SH_CANARY(INSTALL_UNCHECKED) ? sh_sha256(bytes.data, bytes.len)
                                                   : want->blob.sha256; /* it was checked */
    }
    job->job.blob.chunk_hashes = NULL;
    uint64_t ms = world_learn_ms(w, i, want);
    if (want->kind == SH_JOB_TRAIN) { /* once in a device's day, when its owner does not need it */
        n->train_due_ms = SH_MAX(n->train_due_ms, p->now_ms) + ms;
        ms = n->train_due_ms - p->now_ms;
    }
    SH_GOTO(world_push(p,
                       (sim_event){.at_ms = p->now_ms + SH_MAX(ms, 1),
                                   .target = i,
                                   .from = i,
                                   .life = n->life,
                                   .kind = SIM_EV_JOB,
                                   .job = job},
                       err));
    job = NULL;
cleanup:
    free(job);
    sh_buf_release(&bytes);
    return status;
}

static void take_note(world_part *p, const sh_node_action *a)
{
    world_counts *c = &p->counts;
    switch (a->note) {
    case SH_NOTE_WINDOW:
        c->windows++;
        break;
    case SH_NOTE_ALARM:
        c->alarms++;
        break;
    case SH_NOTE_UPDATE_MADE:
        c->updates++;
        break;
    case SH_NOTE_UPDATE_ACKED:
        c->updates_acked++;
        break;
    case SH_NOTE_RELEASE_ACTIVE:
        c->activations++;
        break;
    case SH_NOTE_RELEASE_CONFIRMED:
        c->confirmations++;
        break;
    case SH_NOTE_CHECKED_IN:
        c->checkins++;
        break;
    case SH_NOTE_REJECTED:
        c->rejected++;
        break;
    default:
        break;
    }
}

static sh_status file_holds(world_node *n, uint32_t slot, bool *holds, sh_error *err)
{
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(n->store, SH_TXN_READ, &txn, err));
    *holds = world_node_file_holds(n, txn, slot);
    sh_txn_abort(&txn);
    return SH_OK;
}

sh_status world_node_carry_out(world_part *p, uint32_t i, sh_node_actions *actions, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    bool lost = false;
    for (size_t k = 0; k < actions->n; k++) {
        sh_node_action *a = &actions->items[k];
        n->hash =
            world_mix(n->hash, (uint64_t)a->kind << 56 ^ a->at_ms ^ a->number << 8 ^ a->version);
        switch (a->kind) {
        case SH_NODE_SEND:
            SH_TRY(world_send_up(p, i, &a->message, err));
            break;
        case SH_NODE_SET_TIMER: {
            uint64_t now = world_node_now(n, p->now_ms);
            SH_TRY(
                world_push(p,
                           (sim_event){.at_ms = p->now_ms + (a->at_ms > now ? a->at_ms - now : 1),
                                       .target = i,
                                       .from = i,
                                       .life = n->life,
                                       .kind = SIM_EV_TIMER,
                                       .tag = ++n->timer},
                           err));
            break;
        }
        case SH_NODE_START_JOB:
            SH_TRY(start_job(p, i, &a->job, err));
            break;
        case SH_NODE_ACTIVATE: {
            bool holds = true;
            SH_TRY(file_holds(n, a->slot, &holds, err));
            lost = lost || !holds;
            n->slot = a->slot;
            n->version = a->version;
            break;
        }
        case SH_NODE_NOTE:
            take_note(p, a);
            break;
        case SH_NODE_SWITCH_KEY: /* no node is asked to change its key */
        case SH_NODE_CANCEL_JOB: /* its result will be of an id that the core no longer knows */
            break;
        }
    }
    sh_node_actions_clear(actions);
    if (!lost)
        return SH_OK;
    sh_node_destroy(&n->core);
    return world_node_boot(p, i, err);
}

/* ---- jobs ---- */

static sh_status count_targets(void *arg, const sh_feedback *row)
{
    *(uint64_t *)arg += row->target ? row->n : 0;
    return SH_OK;
}

/* The bytes are read again at the job's end: a byte of the file may have changed meanwhile. */
static void end_install(world_part *p, uint32_t i, world_job *job)
{
    world_node *n = &p->w->nodes[i];
    world_file *file = &n->files[job->job.slot];
    if (job->status != SH_OK)
        return;
    *file = (world_file){job->sha256, true};
    world_oracle_node_slot(p->w->oracle, i, job->job.slot, &file->sha256);
}

static sh_status end_job(world_part *p, uint32_t i, world_job *job, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_node_event e = {.kind = SH_NODE_JOB_DONE};
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    sh_buf bytes;
    sh_buf_init(&bytes, SH_STORE_VALUE_MAX);
    if (job->job.kind == SH_JOB_INSTALL)
        end_install(p, i, job);
    if (job->job.kind == SH_JOB_SMOKE && !n->files[job->job.slot].there)
        job->status = SH_ERR_CORRUPT;
    if (job->job.kind == SH_JOB_EVALUATE && job->status == SH_OK && n->core) {
        job->status = sh_txn_begin(n->store, SH_TXN_READ, &txn, NULL); /* the step says why */
        if (job->status == SH_OK)
            SH_GOTO(sh_node_each_feedback(txn, count_targets, &job->targets, err));
        sh_txn_abort(&txn);
    }
    SH_GOTO(world_learn(w, i, job, &bytes, &e.result, err));
    p->counts.faults[WORLD_LIE_POISON] += job->poisoned && e.result.update.n > 0;
    if (e.result.update.n > 0)
        n->hash = world_mix(n->hash, e.result.update.n);
    status = world_node_step(p, i, &e, err);
cleanup:
    sh_txn_abort(&txn);
    sh_buf_release(&bytes);
    return status;
}

/* ---- the user ---- */

static sh_status correct(world_part *p, uint32_t i, uint64_t number, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    int32_t tokens[FEEDBACK_TOKENS];
    uint64_t bits = world_draw(p->w, i, STREAM_CORRECT, number);
    for (size_t k = 0; k < FEEDBACK_TOKENS; k++)
        tokens[k] = (int32_t)(bits >> k & 0x3ff);
    if (n->offset >= SESSION_TOKENS) {
        n->offset = 0;
        n->session++;
    }
    sh_node_event f = {.kind = SH_NODE_FEEDBACK,
                       .feedback = {.session = (uint64_t)i << 32 | n->session,
                                    .offset = n->offset,
                                    .accepted = (bits & 1) != 0,
                                    .n = FEEDBACK_TOKENS,
                                    .tokens = tokens,
                                    .target = true}};
    n->offset += FEEDBACK_TOKENS;
    p->counts.feedback++;
    return world_node_step(p, i, &f, err);
}

static sh_status use(world_part *p, uint32_t i, uint64_t number, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_node_event e = {.kind = SH_NODE_INFERENCE};
    if (!n->core || world_node_is_full(p, n)) { /* the daemon answers, and counts it */
        p->counts.inferences_full++;
        world_oracle_node_inference(w->oracle, i, p->now_ms, WORLD_INFERENCE_FULL);
        return SH_OK;
    }
    world_make_record(w, i, number, world_node_now(n, p->now_ms), &e.record);
    e.record.release_version = (uint32_t)n->version;
    SH_TRY(world_node_step(p, i, &e, err));
    bool taken = n->up && n->core && !world_node_is_full(p, n);
    if (n->up) {
        p->counts.inferences += taken;
        p->counts.inferences_full += !taken;
        world_oracle_node_inference(w->oracle, i, p->now_ms,
                                    taken ? WORLD_INFERENCE_TAKEN : WORLD_INFERENCE_FULL);
    }
    return SH_OK;
}

static sh_status on_user(world_part *p, uint32_t i, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    const world_class *c = &w->fleet->classes[n->cls];
    uint64_t number = n->sequence;
    double mean = (double)WORLD_HOUR_MS / c->inferences_hour;
    uint64_t pause = (uint64_t)(mean * (0.5 + sh_rng_unit(&n->rng)));
    bool teaches = sh_rng_unit(&n->rng) < c->corrections && !w->settling;
    SH_TRY(world_push(p,
                      (sim_event){.at_ms = p->now_ms + (w->settling ? SETTLE_USER_MS : pause),
                                  .target = i,
                                  .from = i,
                                  .kind = SIM_EV_USER},
                      err));
    if (!n->up)
        return SH_OK;
    if (w->settling && n->core && sh_node_get_status(n->core).confirmed_version == n->version)
        return SH_OK; /* only what confirms a release */
    SH_TRY(use(p, i, number, err));
    return teaches && n->core && !world_node_is_full(p, n) ? correct(p, i, number, err) : SH_OK;
}

/* ---- events ---- */

static sh_status on_message(world_part *p, sim_event *e, sh_error *err)
{
    uint32_t i = e->target;
    world_node *n = &p->w->nodes[i];
    bool now = false;
    if (!n->up || !n->online || (uint32_t)e->tag != n->connection)
        return SH_OK;
    SH_TRY(world_arrive(p, e, &now, err));
    if (!now)
        return SH_OK;
    p->counts.messages_down++;
    p->counts.bytes_down += e->message.len;
    sh_node_event m = {.kind = SH_NODE_MESSAGE, .message = {e->message.data, e->message.len}};
    return world_node_step(p, i, &m, err);
}

sh_status world_node_event(world_part *p, sim_event *e, sh_error *err)
{
    uint32_t i = e->target;
    world_node *n = &p->w->nodes[i];
    switch (e->kind) {
    case SIM_EV_DELIVER:
        return on_message(p, e, err);
    case SIM_EV_TIMER: {
        sh_node_event t = {.kind = SH_NODE_TIMER};
        if (e->life != n->life || e->tag != n->timer)
            return SH_OK;
        if (n->core && world_node_is_full(p, n)) {
            sim_event later = *e;
            later.at_ms = n->full_until_ms;
            return world_push(p, later, err);
        }
        return n->core ? world_node_step(p, i, &t, err) : SH_OK;
    }
    case SIM_EV_LINK:
        return world_node_presence(p, i, err);
    case SIM_EV_CONNECTED:
        n->server_up = e->tag != 0;
        return world_node_relink(p, i, err);
    case SIM_EV_USER:
        return n->off ? SH_OK : on_user(p, i, err);
    case SIM_EV_JOB: {
        world_job *job = e->job;
        sh_status status = e->life == n->life && n->up ? end_job(p, i, job, err) : SH_OK;
        free(job);
        return status;
    }
    case SIM_EV_RESTART:
        return e->tag == n->restart && !n->core && !n->off ? world_node_boot(p, i, err) : SH_OK;
    case SIM_EV_FAULT:
    case SIM_EV_BACKUP:
    case SIM_EV_DIE:
        return world_node_fault(p, e, err);
    default:
        return SH_OK;
    }
}
