/*
 * What the processes' logs and ends say, taken into the sim that measures the run.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "experiments/fleet/fleet.h"

static bool event_is(const char *line, const char *name)
{
    char event[64];
    return fleet_log_text(line, "event", event, sizeof event) && strcmp(event, name) == 0;
}

static uint64_t number_of(const char *line, const char *key)
{
    double x = 0;
    return fleet_log_number(line, key, &x) && x > 0 ? (uint64_t)x : 0;
}

static uint16_t port_after(const char *line, const char *key)
{
    char text[128];
    if (!fleet_log_text(line, key, text, sizeof text))
        return 0;
    const char *colon = strrchr(text, ':');
    return colon ? (uint16_t)strtoul(colon + 1, NULL, 10) : 0;
}

/* ---- nodes ---- */

static void take_alarm(fleet *f, uint32_t i, const char *line)
{
    sim_node *n = &f->sim->nodes[i];
    char name[32] = "";
    uint32_t metric = 0;
    (void)fleet_log_text(line, "metric", name, sizeof name);
    while (metric < SH_METRICS && strcmp(sh_metric_name((sh_metric)metric), name) != 0)
        metric++;
    if (f->sim->phase == SIM_PHASE_BEFORE) {
        n->false_alarms++;
    } else if (n->alarm_window == 0 && metric < SH_METRICS) {
        n->alarm_window = number_of(line, "window");
        n->alarm_metric = metric;
    }
}

/* The display's and the summary's counts. */
static void count_event(fleet *f, uint32_t i, const char *line)
{
    sim_node *n = &f->sim->nodes[i];
    fleet_node *node = &f->nodes[i];
    if (event_is(line, "window")) {
        n->windows = SH_MAX(n->windows, number_of(line, "index"));
    } else if (event_is(line, "alarm")) {
        take_alarm(f, i, line);
    } else if (event_is(line, "train_started")) {
        node->training = true;
    } else if (event_is(line, "train_done")) {
        node->training = false;
        node->pending_tokens = number_of(line, "tokens_seen");
    } else if (event_is(line, "train_cancelled") ||
               (event_is(line, "job_failed") && strstr(line, " job=train"))) {
        node->training = false;
    } else if (event_is(line, "update_made")) {
        n->updates_made++;
        n->tokens_trained += node->pending_tokens;
    } else if (event_is(line, "update_not_better")) {
        n->updates_not_better++;
    } else if (event_is(line, "update_acked")) {
        n->updates_acked++;
    } else if (event_is(line, "evaluated")) {
        f->evaluations++;
    }
}

static void take_node_line(fleet *f, uint32_t i, const char *line)
{
    sim_node *n = &f->sim->nodes[i];
    fleet_node *node = &f->nodes[i];
    char state[16] = "";
    uint64_t version = number_of(line, "version");
    if (event_is(line, "ready")) {
        n->up = true;
        n->active_version = version;
        atomic_store(&node->port, port_after(line, "http"));
    } else if (event_is(line, "link")) {
        (void)fleet_log_text(line, "state", state, sizeof state);
        n->online = strcmp(state, "up") == 0;
        if (strcmp(state, "refused") == 0 && node->n_threads == 0) /* before anything is cut */
            fleet_fail(f, "%s: the aggregator refuses its key", node->name);
    } else if (event_is(line, "release_active")) {
        n->steps_back += version < n->active_version;
        n->active_version = version;
        n->releases_taken |= version < 64 ? 1ull << version : 0;
    } else if (event_is(line, "release_confirmed")) {
        node->confirmed = version;
    } else if (event_is(line, "release_refused")) {
        sim_progress_line(f->sim, "%s refused release %llu", node->name,
                          (unsigned long long)version);
    } else {
        count_event(f, i, line);
    }
}

/* ---- the aggregator ---- */

static void take_aggregator_line(fleet *f, const char *line)
{
    sim *s = f->sim;
    if (event_is(line, "ready")) {
        f->aggregator_port = port_after(line, "endpoint");
        f->aggregator_up = true;
        s->version_seen = SH_MAX(s->version_seen, number_of(line, "version"));
        fleet_forward_target(f->forward, f->aggregator_port);
    } else if (event_is(line, "rounds_begin")) {
        f->rounds_begun = true;
        sim_progress_line(s, "drift is reported by enough nodes: rounds begin");
    } else if (event_is(line, "released")) {
        s->version_seen = SH_MAX(s->version_seen, number_of(line, "version"));
        s->gate_loss = s->candidate_loss;
        sim_progress_line(s, "release %llu is out, gate loss %.3f",
                          (unsigned long long)s->version_seen, s->gate_loss);
    } else if (event_is(line, "gated")) {
        (void)fleet_log_number(line, "loss", &s->candidate_loss);
    } else if (event_is(line, "candidate_refused")) {
        sim_progress_line(s, "candidate %llu is refused, gate loss %.3f",
                          (unsigned long long)number_of(line, "candidate"), s->candidate_loss);
    } else if (event_is(line, "canary_started")) {
        f->canaries++;
    } else if (event_is(line, "closed")) {
        f->closed = true;
    }
}

/* ---- ends ---- */

/* A fail point logs its name, then raises SIGKILL. */
static void remember_failpoint(fleet_process *p, const char *line)
{
    if (event_is(line, "failpoint"))
        (void)fleet_log_text(line, "name", p->failpoint, sizeof p->failpoint);
}

/* Whether the process that ended was killed at a fail point; *name is which. */
static bool was_killed(fleet_process *p, char *name, size_t name_bytes)
{
    bool killed = WIFSIGNALED(p->status) && WTERMSIG(p->status) == SIGKILL && p->failpoint[0] != 0;
    snprintf(name, name_bytes, "%s", p->failpoint);
    p->failpoint[0] = 0;
    return killed;
}

static sh_status read_node(fleet *f, uint32_t i, sh_error *err)
{
    fleet_node *node = &f->nodes[i];
    sim_node *n = &f->sim->nodes[i];
    char failpoint[SH_FAILPOINT_NAME_MAX];
    bool ended = fleet_process_reap(&node->process); /* before the log: then that is whole */
    for (const char *line; (line = fleet_process_line(&node->process)) != NULL;) {
        take_node_line(f, i, line);
        remember_failpoint(&node->process, line);
    }
    if (!ended)
        return SH_OK;
    n->up = n->online = node->training = false;
    atomic_store(&node->port, 0);
    if (node->stopped) {
        if (!WIFEXITED(node->process.status) || WEXITSTATUS(node->process.status) != 0) {
            f->exits_bad++;
            fleet_fail(f, "%s did not stop with status 0; see %s", node->name, node->log);
        }
        return SH_OK;
    }
    if (!was_killed(&node->process, failpoint, sizeof failpoint))
        return sh_fail(err, SH_ERR_IO, "%s ended by itself; see the end of %s", node->name,
                       node->log);
    n->crashes++;
    atomic_fetch_add(&node->life, 1);
    sim_note_fault(f->sim, failpoint, i);
    sim_progress_line(f->sim, "%s was killed at %s and is started again", node->name, failpoint);
    return fleet_start_node(f, i, NULL, err);
}

static sh_status read_aggregator(fleet *f, sh_error *err)
{
    char failpoint[SH_FAILPOINT_NAME_MAX];
    bool ended = fleet_process_reap(&f->aggregator);
    for (const char *line; (line = fleet_process_line(&f->aggregator)) != NULL;) {
        take_aggregator_line(f, line);
        remember_failpoint(&f->aggregator, line);
    }
    if (!ended)
        return SH_OK;
    f->aggregator_up = false;
    fleet_forward_target(f->forward, 0);
    if (f->close_sent && WIFEXITED(f->aggregator.status) && f->nodes[0].stopped) {
        f->exits_bad += WEXITSTATUS(f->aggregator.status) != 0;
        return SH_OK;
    }
    if (!was_killed(&f->aggregator, failpoint, sizeof failpoint))
        return sh_fail(err, SH_ERR_IO, "the aggregator ended by itself; see the end of %s",
                       f->aggregator_log);
    sim_note_fault(f->sim, failpoint, f->n_nodes);
    sim_progress_line(f->sim, "the aggregator was killed at %s and is started again", failpoint);
    return fleet_start_aggregator(f, NULL, err);
}

sh_status fleet_watch(fleet *f, sh_error *err)
{
    SH_TRY(read_aggregator(f, err));
    for (uint32_t i = 0; i < f->n_nodes; i++)
        SH_TRY(read_node(f, i, err));
    return SH_OK;
}
