/*
 * The shell of the simulated aggregator, with its fail points.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/sim/sim.h"

#define RESTART_MS       30000
#define STEP_CRASHES     0.005 /* of faults.crash-rate, before and after each commit */
#define LATE_LOST        0.5   /* of what a node sent before its link went down or it crashed */
#define MERGE_MS         20000
#define GATE_MS          60000
#define UPDATE_BYTES_MAX (64u << 20)

static sh_status carry_out(sim *s, sh_coord_actions *actions, sh_error *err);
static sh_status send_all(sim *s, sh_coord_actions *actions, sh_error *err);

static sh_status crash(sim *s, const char *failpoint, sh_error *err)
{
    sim_note_fault(s, failpoint, s->n_nodes);
    sh_coord_destroy(&s->coord);
    s->coord_up = false;
    s->coord_life++;
    return sim_push(s,
                    (sim_event){.at_ms = s->now_ms + RESTART_MS,
                                .target = s->n_nodes,
                                .life = s->coord_life,
                                .kind = SIM_EV_RESTART},
                    err);
}

/* stage: the kind of job whose end this step takes in, which has fail points around its commit:
 * merge.before_commit, merge.after_commit, gate.before_commit, gate.after_commit. NULL: none. */
static bool crashes(sim *s, const char *stage, const char *when, char *name, size_t name_bytes)
{
    double rate = sim_crash_rate(s) * STEP_CRASHES;
    if (rate > 0 && sh_rng_unit(&s->net_rng) < rate) {
        snprintf(name, name_bytes, "aggregator.%s_commit", when);
        return true;
    }
    if (!stage)
        return false;
    snprintf(name, name_bytes, "%s.%s_commit", stage, when);
    return sh_failpoint_hit(&s->failpoints, name);
}

static sh_status step(sim *s, sh_coord_event *event, const char *stage, sh_error *err)
{
    static sh_coord_actions actions;
    char failpoint[SH_FAILPOINT_NAME_MAX];
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    event->now_ms = s->now_ms;
    sh_coord_actions_clear(&actions);
    SH_GOTO(sh_txn_begin(s->coord_store, SH_TXN_WRITE, &txn, err));
    SH_GOTO(sh_coord_step(s->coord, event, txn, &actions, err));
    if (crashes(s, stage, "before", failpoint, sizeof failpoint)) {
        sh_txn_abort(&txn);
        if (s->canary == SIM_CANARY_AGGREGATOR)
            SH_GOTO(send_all(s, &actions, err));
        SH_GOTO(crash(s, failpoint, err));
        goto cleanup;
    }
    SH_GOTO(sh_txn_commit(&txn, err));
    if (crashes(s, stage, "after", failpoint, sizeof failpoint))
        SH_GOTO(crash(s, failpoint, err));
    else
        SH_GOTO(carry_out(s, &actions, err));
cleanup:
    sh_txn_abort(&txn);
    sh_coord_actions_clear(&actions);
    return status;
}

sh_status sim_coord_boot(sim *s, sh_error *err)
{
    static sh_coord_actions actions;
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_status status = SH_OK;
    sh_genesis genesis = {.model = {s->genesis_model.data, s->genesis_model.len},
                          .format = "Q8_0",
                          .master = s->genesis_master};
    sh_rng_init(&rng, (uint64_t)s->options.seed, s->coord_life, 0x434f4f52);
    sh_coord_actions_clear(&actions);
    SH_GOTO(sh_txn_begin(s->coord_store, SH_TXN_WRITE, &txn, err));
    SH_GOTO(sh_coord_create(&s->coord_options, &genesis, s->now_ms, &rng, txn, &actions, &s->coord,
                            err));
    SH_GOTO(sh_txn_commit(&txn, err));
    s->coord_up = true;
    SH_GOTO(carry_out(s, &actions, err));
cleanup:
    sh_txn_abort(&txn);
    sh_coord_actions_clear(&actions);
    return status;
}

sh_status sim_coord_gone(sim *s, uint32_t node, sh_error *err)
{
    sh_coord_event e = {.kind = SH_COORD_GONE, .node = s->nodes[node].key};
    return s->coord_up ? step(s, &e, NULL, err) : SH_OK;
}

sh_status sim_coord_command(sim *s, sh_coord_command command, double real, sh_error *err)
{
    sh_coord_event e = {.kind = SH_COORD_COMMAND, .command = command, .real = real};
    return step(s, &e, NULL, err);
}

/* ---- jobs ---- */

static sh_status start_merge(sim *s, sim_job *job, sh_error *err)
{
    uint32_t n = job->coord.n_inputs;
    sh_txn *txn = NULL;
    job->inputs = sh_calloc(n, sizeof *job->inputs);
    job->updates = sh_calloc(n, sizeof *job->updates);
    if (!job->inputs || !job->updates)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u updates", n);
    memcpy(job->inputs, job->coord.inputs, n * sizeof *job->inputs);
    job->coord.inputs = NULL;
    SH_TRY(sh_txn_begin(s->coord_store, SH_TXN_READ, &txn, err));
    for (uint32_t i = 0; i < n; i++) {
        sh_buf_init(&job->updates[i], UPDATE_BYTES_MAX);
        /* Unreadable is left empty: the merge refuses it by name. */
        if (sh_coord_read_update(txn, &job->inputs[i].id, &job->updates[i], NULL) != SH_OK)
            sh_buf_clear(&job->updates[i]);
    }
    sh_txn_abort(&txn);
    return SH_OK;
}

static sh_status start_job(sim *s, const sh_coord_job *want, sh_error *err)
{
    sim_job *job = sim_job_create(s, s->n_nodes, SIM_COORD_KIND + (int)want->kind);
    if (!job)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job");
    job->id = want->id;
    job->coord = *want;
    sh_status status = SH_OK;
    if (want->kind == SH_COORD_GATE) {
        job->coord.inputs = NULL;
        job->coord.n_inputs = 0;
    } else {
        s->merges_started++;
        SH_GOTO(start_merge(s, job, err));
    }
    status = sim_job_start(s, &job, want->kind == SH_COORD_GATE ? GATE_MS : MERGE_MS, err);
cleanup:
    sim_job_destroy(&job); /* one that was not started */
    return status;
}

static sh_status end_job(sim *s, sim_job *job, sh_error *err)
{
    sh_coord_event e = {.kind = SH_COORD_JOB_DONE};
    bool merge = job->kind == SIM_COORD_KIND + SH_COORD_MERGE;
    if (merge) {
        const sh_merge_job_result *m = &job->merged;
        e.result = sh_job_merged(m, job->inputs, job->coord.n_inputs);
        sh_sha256_update(&s->hash, &m->blob.sha256, sizeof m->blob.sha256);
    } else {
        e.result = job->gated;
        s->candidate_loss = job->gated.loss_candidate;
        sh_sha256_update(&s->hash, &e.result.loss_candidate, sizeof e.result.loss_candidate);
    }
    e.result.id = job->id;
    e.result.status = job->status;
    e.result.text = job->err.text;
    return step(s, &e, merge ? "merge" : "gate", err);
}

/* ---- actions ---- */

static sh_status take_note(sim *s, const sh_coord_action *a, sh_error *err)
{
    switch (a->note) {
    case SH_CNOTE_RELEASED:
        s->version_seen = a->number;
        s->gate_loss = s->candidate_loss;
        sim_progress_line(s, "release %llu published, gate loss %.3f",
                          (unsigned long long)a->number, s->gate_loss);
        /* An operator's slip: the step is set far too large before one of the merges. */
        if (s->options.bad_scale_round > 0 && a->number == (uint64_t)s->options.bad_scale_round) {
            sim_note_fault(s, "operator.server_scale", s->n_nodes);
            return sim_push(s,
                            (sim_event){.at_ms = s->now_ms + 1,
                                        .target = s->n_nodes,
                                        .life = s->coord_life,
                                        .kind = SIM_EV_USER},
                            err);
        }
        break;
    case SH_CNOTE_CANDIDATE_REFUSED:
        sim_progress_line(s, "candidate %llu refused by the gate, loss %.3f",
                          (unsigned long long)a->number, s->candidate_loss);
        break;
    case SH_CNOTE_INCONCLUSIVE:
        sim_progress_line(s, "candidate %llu inconclusive: too few nodes have scored it",
                          (unsigned long long)a->number);
        break;
    default:
        break;
    }
    return SH_OK;
}

static sh_status send(sim *s, sh_coord_action *a, sh_error *err)
{
    uint32_t to = sim_node_of(s, &a->node);
    sh_buf message = a->message;
    SH_ASSERT(to < s->n_nodes);
    a->message = (sh_buf){0};
    return sim_send(s, s->n_nodes, to, message, err);
}

static sh_status send_all(sim *s, sh_coord_actions *actions, sh_error *err)
{
    for (size_t k = 0; k < actions->n; k++)
        if (actions->items[k].kind == SH_COORD_SEND)
            SH_TRY(send(s, &actions->items[k], err));
    return SH_OK;
}

static sh_status carry_out(sim *s, sh_coord_actions *actions, sh_error *err)
{
    for (size_t k = 0; k < actions->n; k++) {
        sh_coord_action *a = &actions->items[k];
        switch (a->kind) {
        case SH_COORD_SEND:
            SH_TRY(send(s, a, err));
            break;
        case SH_COORD_SET_TIMER:
            SH_TRY(sim_push(s,
                            (sim_event){.at_ms = SH_MAX(a->at_ms, s->now_ms + 1),
                                        .target = s->n_nodes,
                                        .life = s->coord_life,
                                        .kind = SIM_EV_TIMER,
                                        .tag = ++s->coord_timer},
                            err));
            break;
        case SH_COORD_START_JOB:
            SH_TRY(start_job(s, &a->job, err));
            break;
        case SH_COORD_SEND_UP: /* of relays; there is none here */
            break;
        case SH_COORD_NOTE:
            SH_TRY(take_note(s, a, err));
            break;
        case SH_COORD_KEY: /* every key may connect here, and nobody is disconnected */
        case SH_COORD_DROP:
        case SH_COORD_DROP_OTHERS:
            break;
        }
    }
    return SH_OK;
}

sh_status sim_coord_event(sim *s, const sim_event *e, sh_error *err)
{
    if (e->kind == SIM_EV_JOB) {
        sim_job *job = e->job;
        sh_pool_wait(s->pool, &job->running);
        sh_status status = e->life == s->coord_life ? end_job(s, job, err) : SH_OK;
        sim_job_destroy(&job);
        return status;
    }
    if (e->life != s->coord_life)
        return SH_OK;
    switch (e->kind) {
    case SIM_EV_DELIVER: {
        const sim_node *n = &s->nodes[e->from];
        if (e->tag != n->connection && sh_rng_unit(&s->net_rng) < LATE_LOST)
            return SH_OK;
        sh_coord_event m = {.kind = SH_COORD_MESSAGE,
                            .node = n->key,
                            .connection = e->from + 1,
                            .message = {e->message.data, e->message.len}};
        return step(s, &m, NULL, err);
    }
    case SIM_EV_TIMER: {
        sh_coord_event t = {.kind = SH_COORD_TIMER};
        return e->tag == s->coord_timer ? step(s, &t, NULL, err) : SH_OK;
    }
    case SIM_EV_USER:
        return sim_coord_command(s, SH_COMMAND_SERVER_SCALE, s->options.bad_scale, err);
    case SIM_EV_RESTART:
        return sim_coord_boot(s, err);
    default:
        return SH_OK;
    }
}
