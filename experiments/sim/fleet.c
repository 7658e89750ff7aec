/*
 * The shell of the simulated nodes: each step of a core is one transaction of its store; actions
 * are carried out after the commit.
 */
#include <string.h>

#include "experiments/sim/sim.h"
#include "shared/base/log.h"

#define RESTART_MS 60000
/* Of faults.crash-rate, a step: half before, half after its commit. */
#define STEP_CRASHES          0.01
#define TRAIN_MS_PER_TOKEN    40.0 /* of the reference device, over all passes */
#define EVALUATE_MS_PER_TOKEN 10.0 /* two models forward */
#define INSTALL_MS            5000
#define SMOKE_MS              10000
#define BULK_BYTES            1024 /* messages over this are looked into for the byte counts */

enum { RESTART_BOOT, RESTART_CRASH };

static sh_status carry_out(sim *s, uint32_t i, sh_node_actions *actions, sh_error *err);
static sh_status send_all(sim *s, uint32_t i, sh_node_actions *actions, sh_error *err);

static sh_status step(sim *s, uint32_t i, sh_node_event *event, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    static sh_node_actions actions; /* one loop thread; large */
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    event->now_ms = s->now_ms;
    sh_node_actions_clear(&actions);
    SH_GOTO(sh_txn_begin(n->store, SH_TXN_WRITE, &txn, err));
    SH_GOTO(sh_node_step(n->core, event, txn, &actions, err));
    double rate = sim_crash_rate(s) * STEP_CRASHES, fate = rate > 0 ? sh_rng_unit(&s->net_rng) : 1;
    bool dies = fate < rate;
    if (dies && fate < rate / 2) {
        sh_txn_abort(&txn);
        if (s->canary == SIM_CANARY_NODE)
            SH_GOTO(send_all(s, i, &actions, err));
    } else {
        SH_GOTO(sh_txn_commit(&txn, err));
    }
    if (dies)
        SH_GOTO(sim_node_crash(s, i, "node.step", RESTART_MS, err));
    else
        SH_GOTO(carry_out(s, i, &actions, err));
cleanup:
    sh_txn_abort(&txn);
    sh_node_actions_clear(&actions);
    return status;
}

/* ---- typing ---- */

static const sim_text *next_text(sim *s, uint32_t i)
{
    sim_node *n = &s->nodes[i];
    if (s->learning == &sim_learning_cost)
        return NULL;
    if (s->phase == SIM_PHASE_BEFORE) {
        const sim_text_list *l = &s->texts.before[SIM_TRAFFIC];
        return &l->texts[(i + n->texts_before++ * s->n_nodes) % l->n];
    }
    /* Nodes that share a topic take its texts in turn. */
    const sim_text_list *l = &s->texts.topic[n->topic][SIM_TRAFFIC];
    uint32_t n_topics = (uint32_t)s->texts.n_topics;
    uint64_t turn = i / n_topics, sharers = (s->n_nodes - n->topic + n_topics - 1) / n_topics;
    return &l->texts[(turn + n->texts_after++ * sharers) % l->n];
}

static bool wants_to_type(const sim *s, const sim_node *n)
{
    if (!n->up || n->typing)
        return false;
    if (s->phase == SIM_PHASE_BEFORE)
        return n->windows < (uint64_t)s->options.windows_before;
    if (s->phase != SIM_PHASE_SETTLE)
        return true;
    sh_node_status status = sh_node_get_status(n->core);
    return status.confirmed_version != status.active_version;
}

/* After the first windows of the new kind users slow down: the rest of the run is about learning.
 */
static uint64_t pause_ms(const sim *s, const sim_node *n)
{
    bool hurry = s->phase == SIM_PHASE_BEFORE || s->phase == SIM_PHASE_SETTLE ||
                 n->windows < n->change_window + (uint64_t)s->options.windows_after;
    return (uint64_t)(hurry ? s->options.text_pause_ms / 10 : s->options.text_pause_ms);
}

sh_status sim_node_type(sim *s, uint32_t i, uint64_t at_ms, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    return sim_push(
        s, (sim_event){.at_ms = at_ms, .target = i, .life = n->life, .kind = SIM_EV_USER}, err);
}

static sh_status start_typing(sim *s, uint32_t i, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    if (!wants_to_type(s, n)) /* in SETTLE a release may still come that wants to be confirmed */
        return s->phase == SIM_PHASE_SETTLE && n->up && !n->typing
                   ? sim_node_type(s, i, s->now_ms + (uint64_t)s->options.text_ms, err)
                   : SH_OK;
    sim_job *job = sim_job_create(s, i, SIM_JOB_TEXT);
    if (!job)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a text");
    job->drifted = s->phase != SIM_PHASE_BEFORE;
    job->model = n->slots[n->active_slot];
    job->version = sh_node_get_status(n->core).active_version;
    job->text = next_text(s, i);
    job->session = (uint64_t)i << 40 | (uint64_t)n->life << 32 | s->queue.next_number;
    n->typing = true;
    sh_status status =
        sim_job_start(s, &job, (uint64_t)((double)s->options.text_ms / n->speed), err);
    sim_job_destroy(&job); /* one that was not started */
    return status;
}

/* The timeline's point for windows with this index on their nodes; NULL when memory is out. */
static struct sim_point *point_at(sim *s, size_t at)
{
    if (s->n_timeline <= at) {
        if (sh_array_reserve((void **)&s->timeline, &s->timeline_cap, at + 1, sizeof *s->timeline,
                             1u << 20) != SH_OK)
            return NULL;
        memset(s->timeline + s->n_timeline, 0, (at + 1 - s->n_timeline) * sizeof *s->timeline);
        s->n_timeline = at + 1;
    }
    return &s->timeline[at];
}

/* Feeds one finished text to the core: each inference, then what its user did. */
static sh_status end_typing(sim *s, sim_job *job, sh_error *err)
{
    uint32_t i = job->target;
    sim_node *n = &s->nodes[i];
    if (job->status != SH_OK) {
        *err = job->err;
        return job->status;
    }
    n->typing = false;
    sh_node_event f = {.kind = SH_NODE_FEEDBACK};
    const int32_t *tokens = job->text ? job->text->tokens : sim_cost_tokens;
    if (job->typed.opening > 0) {
        f.feedback =
            (sh_feedback){.session = job->session, .n = job->typed.opening, .tokens = tokens};
        SH_TRY(step(s, i, &f, err));
    }
    for (size_t k = 0; k < job->typed.n && job->life == n->life; k++) {
        sh_node_event e = {.kind = SH_NODE_INFERENCE, .record = job->typed.records[k]};
        const sim_row *row = &job->typed.rows[k];
        struct sim_point *p = point_at(s, (size_t)n->windows);
        if (!p)
            return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for the timeline");
        p->nll += e.record.prompt_nll;
        p->inferences++;
        p->accepted += row->accepted;
        sh_sha256_update(&s->hash, &e.record.prompt_nll, sizeof e.record.prompt_nll);
        SH_TRY(step(s, i, &e, err));
        f.feedback = (sh_feedback){.session = job->session,
                                   .offset = row->offset,
                                   .accepted = row->accepted,
                                   .n = row->n,
                                   .tokens = tokens + row->offset,
                                   .target = true};
        if (job->life == n->life)
            SH_TRY(step(s, i, &f, err));
    }
    if (job->life != n->life)
        return SH_OK; /* crashed in between: the user starts again after the restart */
    return sim_node_type(s, i, s->now_ms + SH_MAX(pause_ms(s, n), 1), err);
}

/* ---- jobs of the core ---- */

static sh_status start_training(sim *s, uint32_t i, sim_job **jobp, const sh_node_job *want,
                                sh_error *err)
{
    sim_node *n = &s->nodes[i];
    sim_job *job = *jobp;
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(n->store, SH_TXN_READ, &txn, err));
    sh_status status = sh_snapshot_read(txn, &job->snapshot, err);
    sh_txn_abort(&txn);
    SH_TRY(status);
    job->plan = want->train;
    job->model = n->slots[n->active_slot];
    if ((int64_t)i == s->options.poison_scale_node)
        job->poison = -100;
    if ((int64_t)i == s->options.poison_sign_node)
        job->poison = -1;
    double tokens = (double)sh_snapshot_targets(&job->snapshot) * want->train.passes_milli / 1000;
    uint64_t duration = (uint64_t)(tokens * TRAIN_MS_PER_TOKEN / n->speed) + 1000;
    if ((int64_t)i == s->options.crash_training_node &&
        sh_failpoint_hit(&s->failpoints, "node.train"))
        SH_TRY(sim_push(s,
                        (sim_event){.at_ms = s->now_ms + duration / 2,
                                    .target = i,
                                    .life = n->life,
                                    .kind = SIM_EV_RESTART,
                                    .tag = RESTART_CRASH},
                        err));
    return sim_job_start(s, jobp, duration, err);
}

/* The chunks of a release, put together from the store. */
static sh_status start_installation(sim *s, uint32_t i, sim_job **jobp, const sh_node_job *want,
                                    sh_error *err)
{
    sim_job *job = *jobp;
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(s->nodes[i].store, SH_TXN_READ, &txn, err));
    job->status = sh_blob_get(txn, SH_NODE_T_CHUNK, &want->blob, &job->bytes, &job->err);
    sh_txn_abort(&txn);
    job->coord.candidate_model = want->blob.sha256;
    return sim_job_start(s, jobp, INSTALL_MS, err);
}

/* A candidate's chunks and the feedback that it is scored on. */
static sh_status start_evaluation(sim *s, uint32_t i, sim_job **jobp, const sh_node_job *want,
                                  sh_error *err)
{
    sim_node *n = &s->nodes[i];
    sim_job *job = *jobp;
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(n->store, SH_TXN_READ, &txn, err));
    sh_status status = sh_snapshot_read(txn, &job->snapshot, err);
    if (status == SH_OK)
        job->status = sh_blob_get(txn, SH_NODE_T_CHUNK, &want->blob, &job->bytes, &job->err);
    sh_txn_abort(&txn);
    SH_TRY(status);
    job->model = n->slots[want->slot];
    double tokens = (double)sh_snapshot_targets(&job->snapshot);
    return sim_job_start(s, jobp, (uint64_t)(tokens * EVALUATE_MS_PER_TOKEN / n->speed) + 1000,
                         err);
}

static sh_status start_job(sim *s, uint32_t i, const sh_node_job *want, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    sim_job *job = sim_job_create(s, i, (int)want->kind);
    if (!job)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job");
    job->id = want->id;
    job->slot = want->slot;
    job->version = want->version;
    sh_status status = SH_OK;
    switch (want->kind) {
    case SH_JOB_TRAIN:
        status = start_training(s, i, &job, want, err);
        break;
    case SH_JOB_SMOKE:
        job->installed = n->slots[want->slot];
        status = sim_job_start(s, &job, SMOKE_MS, err);
        break;
    case SH_JOB_EVALUATE:
        status = start_evaluation(s, i, &job, want, err);
        break;
    case SH_JOB_INSTALL:
        status = start_installation(s, i, &job, want, err);
        break;
    }
    sim_job_destroy(&job); /* one that was not started */
    return status;
}

static sh_status end_job(sim *s, sim_job *job, sh_error *err)
{
    uint32_t i = job->target;
    sim_node *n = &s->nodes[i];
    if (job->kind == SIM_JOB_TEXT)
        return end_typing(s, job, err);
    sh_node_event e = {.kind = SH_NODE_JOB_DONE};
    e.result = (sh_node_job_result){.id = job->id, .status = job->status, .text = job->err.text};
    if (job->kind == SH_JOB_TRAIN && job->status == SH_OK) {
        e.result.update = (sh_bytes){job->learned.update.data, job->learned.update.len};
        e.result.samples = job->learned.samples;
        e.result.tokens_seen = job->learned.tokens_seen;
        e.result.heldout_before = job->learned.heldout_before;
        e.result.heldout_after = job->learned.heldout_after;
        sh_sha256_update(&s->hash, job->learned.update.data, job->learned.update.len);
    } else if (job->kind == SH_JOB_INSTALL && job->status == SH_OK) {
        n->slots[job->slot] = job->installed;
    } else if (job->kind == SH_JOB_SMOKE) {
        e.result.nll = job->nll;
    } else if (job->kind == SH_JOB_EVALUATE && job->status == SH_OK) {
        e.result.n_slices = job->n_slices;
        memcpy(e.result.slices, job->slices, sizeof job->slices);
    }
    uint64_t made = n->updates_made;
    SH_TRY(step(s, i, &e, err));
    if (n->updates_made > made)
        n->tokens_trained += job->learned.tokens_seen;
    return SH_OK;
}

/* ---- actions ---- */

static void take_note(sim *s, uint32_t i, sh_node_note note, uint64_t number)
{
    sim_node *n = &s->nodes[i];
    switch (note) {
    case SH_NOTE_WINDOW:
        n->windows++;
        break;
    case SH_NOTE_ALARM:
        if (n->change_window == 0) {
            n->false_alarms++;
        } else if (n->alarm_window == 0) {
            n->alarm_window = n->windows;
            n->alarm_metric = (uint32_t)number;
        }
        break;
    case SH_NOTE_UPDATE_MADE:
        n->updates_made++;
        break;
    case SH_NOTE_UPDATE_NOT_BETTER:
        n->updates_not_better++;
        break;
    case SH_NOTE_UPDATE_ACKED:
        n->updates_acked++;
        break;
    case SH_NOTE_RELEASE_ACTIVE:
        if (number < 64)
            n->releases_taken |= 1ull << number;
        break;
    default:
        break;
    }
}

static void count_bytes(sim *s, uint32_t i, bool up, const sh_buf *message)
{
    sim_node *n = &s->nodes[i];
    sh_msg msg;
    if (message->len <= BULK_BYTES ||
        sh_msg_decode(message->data, message->len, &msg, NULL) != SH_OK)
        return;
    if (msg.type == SH_MSG_CHUNK && up)
        n->bytes_up += message->len;
    if (msg.type == SH_MSG_CHUNK && !up)
        n->release_bytes_down += message->len;
}

static sh_status send(sim *s, uint32_t i, sh_node_action *a, sh_error *err)
{
    sh_buf message = a->message;
    count_bytes(s, i, true, &message);
    a->message = (sh_buf){0};
    return sim_send(s, i, s->n_nodes, message, err);
}

static sh_status send_all(sim *s, uint32_t i, sh_node_actions *actions, sh_error *err)
{
    for (size_t k = 0; k < actions->n; k++)
        if (actions->items[k].kind == SH_NODE_SEND)
            SH_TRY(send(s, i, &actions->items[k], err));
    return SH_OK;
}

static sh_status carry_out(sim *s, uint32_t i, sh_node_actions *actions, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    for (size_t k = 0; k < actions->n; k++) {
        sh_node_action *a = &actions->items[k];
        switch (a->kind) {
        case SH_NODE_SEND:
            SH_TRY(send(s, i, a, err));
            break;
        case SH_NODE_SET_TIMER:
            SH_TRY(sim_push(s,
                            (sim_event){.at_ms = SH_MAX(a->at_ms, s->now_ms + 1),
                                        .target = i,
                                        .life = n->life,
                                        .kind = SIM_EV_TIMER,
                                        .tag = ++n->timer_generation},
                            err));
            break;
        case SH_NODE_START_JOB:
            SH_TRY(start_job(s, i, &a->job, err));
            break;
        case SH_NODE_ACTIVATE:
            n->active_slot = a->slot;
            n->steps_back += a->version < n->active_version;
            n->active_version = a->version;
            break;
        case SH_NODE_NOTE:
            take_note(s, i, a->note, a->number);
            break;
        case SH_NODE_SWITCH_KEY: /* nobody rotates here */
            break;
        case SH_NODE_CANCEL_JOB: /* its result will be of an id that the core no longer knows */
            break;
        }
    }
    return SH_OK;
}

/* ---- life ---- */

static bool scheduled_online(const sim *s, uint32_t i, uint64_t at_ms)
{
    if (s->options.offline_share <= 0)
        return true;
    uint64_t groups = (uint64_t)(1.0 / s->options.offline_share + 0.5);
    uint64_t period = at_ms / (uint64_t)s->options.offline_ms;
    return (i + period) % SH_MAX(groups, 1) != 0;
}

sh_status sim_node_boot(sim *s, uint32_t i, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    static sh_node_actions actions;
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    bool first = n->life == 0;
    if (first && s->n_models)
        n->slots[0] = s->models[0].model;
    sh_node_actions_clear(&actions);
    SH_GOTO(sh_txn_begin(n->store, SH_TXN_WRITE, &txn, err));
    SH_GOTO(sh_node_create(&s->node_options,
                           (sh_bytes){s->genesis_manifest.data, s->genesis_manifest.len}, s->now_ms,
                           &n->rng, txn, &actions, &n->core, err));
    SH_GOTO(sh_txn_commit(&txn, err));
    n->up = true;
    SH_GOTO(carry_out(s, i, &actions, err));
    n->link_wanted = s->phase == SIM_PHASE_SETTLE || scheduled_online(s, i, s->now_ms);
    SH_GOTO(sim_node_link(s, i, n->link_wanted, err));
    SH_GOTO(sim_node_type(s, i, s->now_ms + 1 + sh_rng_below(&n->rng, 10000), err));
    if (first)
        SH_GOTO(sim_push(s,
                         (sim_event){.at_ms = s->now_ms + (uint64_t)s->options.offline_ms,
                                     .target = i,
                                     .kind = SIM_EV_LINK},
                         err));
cleanup:
    sh_txn_abort(&txn);
    sh_node_actions_clear(&actions);
    return status;
}

sh_status sim_node_crash(sim *s, uint32_t i, const char *name, uint64_t restart_ms, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    sim_note_fault(s, name, i);
    sh_node_destroy(&n->core);
    n->up = n->online = n->typing = false;
    n->life++;
    n->crashes++;
    n->connection++;
    (void)sh_rng_u64(&n->rng); /* the new life draws other numbers */
    SH_TRY(sim_coord_gone(s, i, err));
    return sim_push(s,
                    (sim_event){.at_ms = s->now_ms + restart_ms,
                                .target = i,
                                .life = n->life,
                                .kind = SIM_EV_RESTART,
                                .tag = RESTART_BOOT},
                    err);
}

sh_status sim_node_link(sim *s, uint32_t i, bool up, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    if (n->online == up || !n->up)
        return SH_OK;
    n->online = up;
    n->connection++;
    sh_node_event e = {.kind = up ? SH_NODE_LINK_UP : SH_NODE_LINK_DOWN};
    SH_TRY(step(s, i, &e, err));
    return up ? SH_OK : sim_coord_gone(s, i, err);
}

static sh_status presence(sim *s, uint32_t i, sh_error *err)
{
    sim_node *n = &s->nodes[i];
    SH_TRY(sim_push(s,
                    (sim_event){.at_ms = s->now_ms + (uint64_t)s->options.offline_ms,
                                .target = i,
                                .kind = SIM_EV_LINK},
                    err));
    n->link_wanted = s->phase == SIM_PHASE_SETTLE || scheduled_online(s, i, s->now_ms);
    return sim_node_link(s, i, n->link_wanted, err);
}

sh_status sim_node_event(sim *s, const sim_event *e, sh_error *err)
{
    uint32_t i = e->target;
    sim_node *n = &s->nodes[i];
    if (e->kind == SIM_EV_LINK)
        return presence(s, i, err);
    if (e->kind == SIM_EV_JOB) {
        sim_job *job = e->job;
        sh_pool_wait(s->pool, &job->running);
        sh_status status = e->life == n->life ? end_job(s, job, err) : SH_OK;
        sim_job_destroy(&job);
        return status;
    }
    if (e->life != n->life)
        return SH_OK;
    switch (e->kind) {
    case SIM_EV_DELIVER: {
        if (!n->online || e->tag != n->connection)
            return SH_OK;
        count_bytes(s, i, false, &e->message);
        sh_node_event m = {.kind = SH_NODE_MESSAGE, .message = {e->message.data, e->message.len}};
        return step(s, i, &m, err);
    }
    case SIM_EV_TIMER: {
        sh_node_event t = {.kind = SH_NODE_TIMER};
        return e->tag == n->timer_generation ? step(s, i, &t, err) : SH_OK;
    }
    case SIM_EV_USER:
        return start_typing(s, i, err);
    case SIM_EV_RESTART:
        return e->tag == RESTART_CRASH ? sim_node_crash(s, i, "node.train", RESTART_MS, err)
                                       : sim_node_boot(s, i, err);
    default:
        return SH_OK;
    }
}
