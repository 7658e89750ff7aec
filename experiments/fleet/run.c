/*
 * The course of the run: phases end on counts that the logs report, with a limit in time that ends
 * a run which is stuck; faults come at stated points of it.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "experiments/fleet/fleet.h"
#include "experiments/fleet/web.h"
#include "shared/base/clock.h"

#define TICK_MS       50
#define START_S_MAX   60
#define STOP_S_MAX    30
#define OWED_EVERY_MS 500 /* how often a node is asked what it owes */

static volatile sig_atomic_t interrupted;

void fleet_interrupt(int number)
{
    interrupted = number;
}

/* One look at everything, a short rest; the errors that end a run. */
static sh_status tick(fleet *f, sh_error *err)
{
    sim *s = f->sim;
    usleep(TICK_MS * 1000);
    s->now_ms = (uint64_t)((sim_wall_seconds() - s->wall_start_s) * 1000);
    SH_TRY(fleet_watch(f, err));
    if (interrupted)
        return sh_fail(err, SH_ERR_CANCELLED, "interrupted by signal %d in phase %s",
                       (int)interrupted, sim_phase_names[s->phase]);
    if (atomic_load(&f->failed))
        return sh_fail(err, SH_ERR_IO, "%s", f->failure);
    sim_progress_tick(s, false);
    return SH_OK;
}

static void set_mode(fleet *f, uint32_t i, fleet_mode mode)
{
    atomic_store(&f->nodes[i].mode, (int)mode);
}

/* ---- start ---- */

static sh_status wait_ready(fleet *f, bool (*ready)(const fleet *f), const char *what,
                            sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + START_S_MAX * 1000;
    while (!ready(f)) {
        if (sh_clock_mono_ms() > end)
            return sh_fail(err, SH_ERR_LIMIT, "%s not ready after %d s; see %s/logs", what,
                           START_S_MAX, f->options.sim.out);
        SH_TRY(tick(f, err));
    }
    return SH_OK;
}

static bool aggregator_ready(const fleet *f)
{
    return f->aggregator_up;
}

static bool nodes_ready(const fleet *f)
{
    for (uint32_t i = 0; i < f->n_nodes; i++)
        if (!atomic_load(&f->nodes[i].port) || !f->sim->nodes[i].online)
            return false;
    return true;
}

static sh_status start(fleet *f, sh_error *err)
{
    const sim_options *o = &f->options.sim;
    char failpoint[96];
    snprintf(failpoint, sizeof failpoint, "%s:%lld", o->merge_failpoint,
             (long long)o->merge_crash - 1);
    SH_TRY(fleet_start_aggregator(f, o->merge_crash > 0 ? failpoint : NULL, err));
    SH_TRY(wait_ready(f, aggregator_ready, "the aggregator is", err));
    SH_TRY(fleet_enrol(f, err));
    for (uint32_t i = 0; i < f->n_nodes; i++)
        SH_TRY(fleet_start_node(f, i, (int64_t)i == o->crash_training_node ? "node.train" : NULL,
                                err));
    SH_TRY(wait_ready(f, nodes_ready, "the nodes are", err));
    sim_progress_line(f->sim, "%u nodes and the aggregator are up and connected", f->n_nodes);
    return fleet_users_start(f, err);
}

/* ---- what users do ---- */

static fleet_mode mode_for(const fleet *f, uint32_t i)
{
    const sim *s = f->sim;
    const sim_node *n = &s->nodes[i];
    switch (s->phase) {
    case SIM_PHASE_BEFORE:
        return n->windows < (uint64_t)s->options.windows_before ? FLEET_OLD : FLEET_IDLE;
    case SIM_PHASE_DRIFT:
    case SIM_PHASE_LEARN:
        return n->windows < n->change_window + (uint64_t)s->options.windows_after ? FLEET_NEW
                                                                                  : FLEET_SLOW;
    case SIM_PHASE_SETTLE: /* a release is confirmed by inferences */
        return n->active_version == s->version_seen && f->nodes[i].confirmed == n->active_version
                   ? FLEET_IDLE
                   : FLEET_NEW;
    default:
        return FLEET_IDLE;
    }
}

/* Streams go on from the moment that a release is out until the node has taken it. */
static void direct_users(fleet *f)
{
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        fleet_node *n = &f->nodes[i];
        bool learning = f->sim->phase == SIM_PHASE_LEARN || f->sim->phase == SIM_PHASE_SETTLE;
        set_mode(f, i, mode_for(f, i));
        atomic_store(&n->streaming,
                     learning && !n->cut && f->sim->nodes[i].active_version < f->sim->version_seen);
    }
}

/* ---- faults ---- */

static void set_link(fleet *f, uint32_t i, bool cut)
{
    fleet_node *n = &f->nodes[i];
    if (n->cut == cut)
        return;
    n->cut = cut;
    if (cut)
        n->offline_since_ms = f->sim->now_ms;
    else
        n->offline_ms += f->sim->now_ms - n->offline_since_ms;
    if (cut)
        sim_note_fault(f->sim, "network.cut", i);
    fleet_forward_cut(f->forward, i, cut);
}

/* Every second node is cut off when the first release is out, so that it learns of it late, and
 * what it trains meanwhile is behind. */
static void direct_network(fleet *f)
{
    sim *s = f->sim;
    if (!f->options.offline)
        return;
    if (s->phase == SIM_PHASE_LEARN && f->offline_version == 0 && s->version_seen >= 2) {
        f->offline_version = s->version_seen;
        for (uint32_t i = 1; i < f->n_nodes; i += 2)
            set_link(f, i, true);
        sim_progress_line(s, "the network of every second node is cut");
    }
    bool any = false;
    for (uint32_t i = 0; i < f->n_nodes; i++)
        any = any || f->nodes[i].cut;
    uint64_t since = any ? s->now_ms - f->nodes[1].offline_since_ms : 0;
    if (any && (s->phase != SIM_PHASE_LEARN || s->version_seen > f->offline_version ||
                since > (uint64_t)f->options.offline_ms_max)) {
        for (uint32_t i = 0; i < f->n_nodes; i++)
            set_link(f, i, false);
        sim_progress_line(s, "the network is whole again");
    }
}

static sh_status direct_operator(fleet *f, sh_error *err)
{
    const sim_options *o = &f->options.sim;
    char scale[32];
    if (o->bad_scale_round > 0 && !f->scale_set &&
        f->sim->version_seen >= (uint64_t)o->bad_scale_round && f->aggregator_up) {
        snprintf(scale, sizeof scale, "%.6g", o->bad_scale);
        SH_TRY(fleet_command(f, "server-scale", scale, err));
        f->scale_set = true;
        sim_note_fault(f->sim, "operator.server_scale", f->n_nodes);
        sim_progress_line(f->sim, "an operator sets the server scale to %s", scale);
    }
    if (f->sim->phase == SIM_PHASE_SETTLE && !f->close_sent && f->aggregator_up) {
        SH_TRY(fleet_command(f, "close", NULL, err));
        f->close_sent = true;
    }
    return SH_OK;
}

/* ---- phases ---- */

/* shoal_spool_items of a node's /metrics; -1: it does not say. */
static double owed_items(fleet *f, uint32_t i)
{
    fleet_web web = {0};
    sh_buf reply;
    sh_error err;
    int code = 0;
    double sum = -1;
    uint16_t port = (uint16_t)atomic_load(&f->nodes[i].port);
    fleet_web_request r = {.method = "GET", .path = "/metrics"};
    sh_buf_init(&reply, FLEET_WEB_BODY_MAX);
    if (port && fleet_web_get(&web, port, &r, &code, &reply, &err) == SH_OK && code == 200) {
        static const char name[] = "\nshoal_spool_items";
        const char *at = (const char *)reply.data;
        while ((at = strstr(at, name)) != NULL) {
            at += sizeof name - 1;
            if (*at == '{')
                at = strchr(at, '}') ? strchr(at, '}') + 1 : "";
            if (*at == ' ')
                sum = SH_MAX(sum, 0) + strtod(at, NULL);
        }
    }
    sh_buf_release(&reply);
    fleet_web_release(&web);
    return sum;
}

static bool windows_done(const fleet *f)
{
    for (uint32_t i = 0; i < f->n_nodes; i++)
        if (f->sim->nodes[i].windows < (uint64_t)f->options.sim.windows_before ||
            atomic_load(&f->nodes[i].typing))
            return false;
    return true;
}

static bool all_confirmed(const fleet *f)
{
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        const fleet_node *n = &f->nodes[i];
        if (f->sim->nodes[i].active_version != f->sim->version_seen ||
            n->confirmed != f->sim->version_seen || n->training || atomic_load(&n->typing))
            return false;
    }
    return true;
}

static bool settled(fleet *f, uint64_t *asked_ms)
{
    if (!f->closed || !all_confirmed(f) || f->sim->now_ms < *asked_ms + OWED_EVERY_MS)
        return false;
    *asked_ms = f->sim->now_ms;
    for (uint32_t i = 0; i < f->n_nodes; i++)
        if (owed_items(f, i) != 0)
            return false;
    return true;
}

static bool phase_over(fleet *f, uint64_t *asked_ms)
{
    switch (f->sim->phase) {
    case SIM_PHASE_BEFORE:
        return windows_done(f);
    case SIM_PHASE_DRIFT:
        return f->rounds_begun;
    case SIM_PHASE_LEARN:
        return f->sim->version_seen >= (uint64_t)f->options.sim.rounds + 1;
    case SIM_PHASE_SETTLE:
        return settled(f, asked_ms);
    default:
        return true;
    }
}

/* Why a phase is not over, for the error. */
static void say_missing(const fleet *f, char *out, size_t n)
{
    uint32_t windows = 0, alarmed = 0, confirmed = 0, training = 0;
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        windows += f->sim->nodes[i].windows >= (uint64_t)f->options.sim.windows_before;
        alarmed += f->sim->nodes[i].alarm_window != 0;
        confirmed += f->nodes[i].confirmed == f->sim->version_seen;
        training += f->nodes[i].training;
    }
    snprintf(out, n,
             "%u of %u nodes have their windows, %u have alarmed, %u confirmed release %llu, "
             "%u train, closed=%d",
             windows, f->n_nodes, alarmed, confirmed, (unsigned long long)f->sim->version_seen,
             training, f->closed);
}

static void enter_phase(fleet *f, sim_phase phase)
{
    sim *s = f->sim;
    s->phase_wall_s[s->phase] = sim_wall_seconds() - s->wall_start_s;
    s->phase = phase;
    s->phase_at_ms[phase] = s->now_ms;
    for (uint32_t i = 0; phase == SIM_PHASE_DRIFT && i < f->n_nodes; i++)
        s->nodes[i].change_window = s->nodes[i].windows;
    sim_progress_tick(s, true);
}

static sh_status run_phases(fleet *f, sh_error *err)
{
    sim *s = f->sim;
    uint64_t asked_ms = 0;
    while (s->phase < SIM_PHASE_MEASURE) {
        direct_users(f);
        direct_network(f);
        SH_TRY(direct_operator(f, err));
        SH_TRY(tick(f, err));
        if (phase_over(f, &asked_ms)) {
            enter_phase(f, s->phase + 1);
        } else if (s->now_ms - s->phase_at_ms[s->phase] > (uint64_t)f->options.phase_s_max * 1000) {
            char missing[200];
            say_missing(f, missing, sizeof missing);
            return sh_fail(err, SH_ERR_LIMIT, "phase %s is not over after %lld s: %s; see %s/logs",
                           sim_phase_names[s->phase], (long long)f->options.phase_s_max, missing,
                           f->options.sim.out);
        }
    }
    return SH_OK;
}

/* ---- stop ---- */

static bool any_runs(const fleet *f)
{
    bool runs = false;
    for (uint32_t i = 0; i < f->n_nodes; i++)
        runs = runs || f->nodes[i].process.pid > 0;
    return runs;
}

/* SIGTERM to the nodes, then to the aggregator; what does not stop is killed and counted. */
static void stop_all(fleet *f)
{
    sh_error ignored;
    fleet_users_stop(f);
    f->close_sent = true;
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        f->nodes[i].stopped = true;
        fleet_process_signal(&f->nodes[i].process, SIGTERM);
    }
    uint64_t end = sh_clock_mono_ms() + STOP_S_MAX * 1000;
    while (any_runs(f) && sh_clock_mono_ms() < end) {
        usleep(TICK_MS * 1000);
        (void)(fleet_watch(f, &ignored) == SH_OK);
    }
    fleet_process_signal(&f->aggregator, SIGTERM);
    while (f->aggregator.pid > 0 && sh_clock_mono_ms() < end + STOP_S_MAX * 1000) {
        usleep(TICK_MS * 1000);
        (void)(fleet_watch(f, &ignored) == SH_OK);
    }
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        f->exits_bad += f->nodes[i].process.pid > 0;
        fleet_process_release(&f->nodes[i].process);
    }
    f->exits_bad += f->aggregator.pid > 0;
    fleet_process_release(&f->aggregator);
}

sh_status fleet_run(fleet *f, sh_error *err)
{
    sh_status status = start(f, err);
    if (status == SH_OK)
        status = run_phases(f, err);
    if (status == SH_OK)
        sim_progress_line(f->sim, "everything has arrived; the processes are stopped");
    stop_all(f);
    for (uint32_t i = 0; f->forward && i < f->n_nodes; i++)
        fleet_forward_bytes(f->forward, i, &f->sim->nodes[i].bytes_up,
                            &f->sim->nodes[i].release_bytes_down);
    return status;
}
