/*
 * What the stores say once all processes have stopped, opened for reading only: rows for the
 * summary, windows for the timeline, examples for the baselines. And what a real fleet's summary
 * has beside the simulator's.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "experiments/fleet/fleet.h"

#define SWAPS_MIN 3 /* releases that came while streams ran */

static sh_status open_store(const char *dir, const char *const *tables, size_t n, sh_store **out,
                            sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_store_options o = {.tables = tables, .n_tables = n, .read_only = true};
    SH_TRY(sh_path_join(path, sizeof path, dir, "store", err));
    return sh_store_open_lmdb(path, &o, out, err);
}

static sh_status take_genesis(void *arg, const sh_release_row *row)
{
    sim *s = arg;
    if (row->candidate == 0 && row->version == 1)
        s->genesis_master = row->new_master;
    return SH_OK;
}

/* One window that a node sent: its point in the timeline. */
static sh_status take_window(void *arg, const sh_update_id *id, sh_bytes payload)
{
    sim *s = arg;
    sh_window w;
    (void)id;
    if (sh_window_decode(payload.data, payload.n, &w, NULL) != SH_OK || w.index == 0)
        return SH_OK;
    size_t at = (size_t)w.index - 1;
    if (s->n_timeline <= at) {
        if (sh_array_reserve((void **)&s->timeline, &s->timeline_cap, at + 1, sizeof *s->timeline,
                             1u << 20) != SH_OK)
            return SH_ERR_NO_MEMORY;
        memset(s->timeline + s->n_timeline, 0, (at + 1 - s->n_timeline) * sizeof *s->timeline);
        s->n_timeline = at + 1;
    }
    struct sim_point *p = &s->timeline[at];
    const sh_window_metric *nll = &w.metric[SH_METRIC_NLL], *reject = &w.metric[SH_METRIC_REJECT];
    p->nll += (double)nll->sum / SH_FIXED_POINT;
    p->inferences += nll->n;
    p->accepted += reject->n - SH_MIN((uint64_t)reject->n,
                                      (uint64_t)((double)reject->sum / SH_FIXED_POINT + 0.5));
    return SH_OK;
}

/* The models of all candidates, beside the baselines' that are still to be made. */
static sh_status link_models(fleet *f, sh_error *err)
{
    char dir[SH_PATH_BYTES], from[SH_PATH_BYTES], to[SH_PATH_BYTES];
    SH_TRY(sh_path_join(dir, sizeof dir, f->aggregator_dir, "objects", err));
    DIR *d = opendir(dir);
    sh_status status = SH_OK;
    if (!d)
        return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
    for (struct dirent *e; status == SH_OK && (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.')
            continue;
        status = sh_path_join(from, sizeof from, dir, e->d_name, err);
        if (status == SH_OK)
            status = sh_path_join(to, sizeof to, f->sim->objects, e->d_name, err);
        if (status == SH_OK && link(from, to) != 0 && errno != EEXIST)
            status = sh_fail(err, SH_ERR_IO, "%s: cannot be linked to: %s", to, strerror(errno));
    }
    closedir(d);
    return status;
}

sh_status fleet_collect(fleet *f, sh_error *err)
{
    sim *s = f->sim;
    sh_txn *txn = NULL;
    SH_TRY(open_store(f->aggregator_dir, sh_coord_tables, SH_COORD_TABLES, &s->coord_store, err));
    for (uint32_t i = 0; i < f->n_nodes; i++)
        SH_TRY(
            open_store(f->nodes[i].dir, sh_node_tables, SH_NODE_TABLES, &s->nodes[i].store, err));
    SH_TRY(sh_txn_begin(s->coord_store, SH_TXN_READ, &txn, err));
    sh_status status = sh_coord_each_candidate(txn, take_genesis, s, err);
    if (status == SH_OK)
        status = sh_coord_each_item(txn, SH_COORD_T_WINDOW, take_window, s, err);
    sh_txn_abort(&txn);
    SH_TRY(status);
    return link_models(f, err);
}

/* ---- the summary's own part ---- */

static void check(json_t *checks, const char *name, json_t *value, const char *limit, bool ok)
{
    json_t *row = json_object();
    sh_json_set(row, "name", json_string(name));
    sh_json_set(row, "value", value);
    sh_json_set(row, "limit", json_string(limit));
    sh_json_set(row, "ok", json_boolean(ok));
    json_array_append_new(checks, row);
}

static json_t *count(const atomic_uint_fast64_t *n)
{
    return json_integer((json_int_t)atomic_load(n));
}

static json_t *users_part(const fleet_traffic *t)
{
    json_t *users = json_object();
    sh_json_set(users, "completions", count(&t->asked));
    sh_json_set(users, "accepted", count(&t->accepted));
    sh_json_set(users, "edited", count(&t->edited));
    sh_json_set(users, "rejected", count(&t->rejected));
    sh_json_set(users, "asked_again", count(&t->refused));
    sh_json_set(users, "broken_by_a_kill", count(&t->broken));
    sh_json_set(users, "feedback_gone", count(&t->feedback_gone));
    sh_json_set(users, "unexpected_answers", count(&t->unexpected));
    return users;
}

static json_t *presence_part(const fleet *f, uint32_t *n_offline)
{
    json_t *presence = json_array();
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        if (f->nodes[i].offline_ms == 0)
            continue;
        json_t *row = json_object();
        sh_json_set(row, "node", json_string(f->nodes[i].name));
        sh_json_set(row, "offline_ms", json_integer((json_int_t)f->nodes[i].offline_ms));
        json_array_append_new(presence, row);
        *n_offline += 1;
    }
    return presence;
}

void fleet_extra(fleet *f)
{
    const fleet_traffic *t = &f->traffic;
    json_t *extra = json_object(), *checks = json_array(), *streams = json_object();
    uint64_t swaps = (uint64_t)__builtin_popcountll(atomic_load(&t->swapped));
    uint64_t unexpected = atomic_load(&t->unexpected), cut = atomic_load(&t->streams_cut);
    uint64_t changed = atomic_load(&t->streams_changed);
    uint32_t n_offline = 0;
    sh_json_set(streams, "all", count(&t->streams));
    sh_json_set(streams, "over_a_swap", count(&t->streams_over_swap));
    sh_json_set(streams, "releases_swapped_under_streams", json_integer((json_int_t)swaps));
    sh_json_set(streams, "changed_release", count(&t->streams_changed));
    sh_json_set(streams, "cut", count(&t->streams_cut));
    sh_json_set(extra, "users", users_part(t));
    sh_json_set(extra, "streams", streams);
    sh_json_set(extra, "offline", presence_part(f, &n_offline));
    if (f->options.sim.canary_nodes_min > 0) {
        json_t *canaries = json_object();
        sh_json_set(canaries, "candidates", json_integer((json_int_t)f->canaries));
        sh_json_set(canaries, "evaluations", json_integer((json_int_t)f->evaluations));
        sh_json_set(extra, "federated_evaluation", canaries);
        check(checks, "candidates that canary nodes scored", json_integer((json_int_t)f->canaries),
              ">= 1", f->canaries >= 1);
    }
    check(checks, "streams that changed release", count(&t->streams_changed), "0", changed == 0);
    check(checks, "streams cut", count(&t->streams_cut), "0", cut == 0);
    check(checks, "releases swapped under running streams", json_integer((json_int_t)swaps), ">= 3",
          swaps >= SWAPS_MIN);
    check(checks, "answers that should not be", count(&t->unexpected), "0", unexpected == 0);
    if (f->options.offline)
        check(checks, "nodes offline for a part of the run", json_integer(n_offline),
              "half of them", n_offline >= f->n_nodes / 2);
    check(checks, "processes that did not stop with status 0", json_integer(f->exits_bad), "0",
          f->exits_bad == 0);
    f->sim->extra = extra;
    f->sim->extra_checks = checks;
}
