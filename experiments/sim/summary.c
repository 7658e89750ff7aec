/*
 * DIR/summary.json: what happened and whether the numbers hold. docs/summary.md is its schema.
 * Figures about updates come from the aggregator's store; "lost" and "twice" from the audit, a
 * program of its own that reads what both sides stored.
 */
#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "aggregator/survey.h"
#include "experiments/audit/audit.h"
#include "experiments/sim/sim.h"
#include "experiments/version.h"
#include "shared/base/file.h"
#include "shared/math/blas.h"
#include "shared/math/kernel.h"

#define GAIN_SHARE_MIN    0.75
#define ALARM_WINDOWS_MAX 3
#define ALARM_SHARE_MIN   0.8
#define RELEASES_MIN      3

extern char **environ;

typedef struct {
    sim *s;
    json_t *root, *checks;
    bool ok;
    /* from the aggregator's rows */
    json_t *releases;
    uint64_t published, gate_refused, not_q8;
    uint64_t updates, merged, pending, refused[SH_REASONS];
    uint64_t poisoned, poisoned_merged;
    bool sent_scale, sent_sign; /* by the two poisoners */
    uint64_t update_bytes, update_tokens_honest;
} summary;

/* One number that must hold: `value` is shown beside `limit`. */
static void check(summary *m, const char *name, json_t *value, const char *limit, bool ok)
{
    json_t *row = json_object();
    sh_json_set(row, "name", json_string(name));
    sh_json_set(row, "value", value);
    sh_json_set(row, "limit", json_string(limit));
    sh_json_set(row, "ok", json_boolean(ok));
    json_array_append_new(m->checks, row);
    m->ok = m->ok && ok;
}

static sh_status add_release(void *arg, const sh_release_row *r)
{
    summary *m = arg;
    bool published = r->version != 0;
    if (published && r->parent == 0)
        return SH_OK; /* the genesis release is not the run's; no gate saw it */
    json_t *row = sh_survey_release(r);
    m->published += published;
    m->gate_refused += !published && strncmp(r->verdict, "inconclusive", 12) != 0;
    m->not_q8 += published && strcmp(r->format, "Q8_0") != 0;
    if (published) {
        uint64_t taken = 0;
        for (uint32_t i = 0; i < m->s->n_nodes; i++)
            taken += r->version < 64 && (m->s->nodes[i].releases_taken >> r->version & 1);
        sh_json_set(row, "taken_by_nodes", sh_json_uint(taken));
        sh_sha256_update(&m->s->hash, r->sha256.b, sizeof r->sha256.b);
    }
    json_array_append_new(m->releases, row);
    return SH_OK;
}

static sh_status add_update(void *arg, const sh_update_row *u)
{
    summary *m = arg;
    int64_t node = sim_node_of(m->s, &u->id.node);
    bool scale = node == m->s->options.poison_scale_node;
    bool sign = node == m->s->options.poison_sign_node, poisoned = scale || sign;
    m->sent_scale = m->sent_scale || scale;
    m->sent_sign = m->sent_sign || sign;
    m->updates++;
    m->update_bytes += u->meta.blob.bytes;
    m->merged += u->verdict == SH_VERDICT_MERGED;
    m->pending += u->verdict == SH_VERDICT_PENDING;
    if (u->verdict == SH_VERDICT_REFUSED)
        m->refused[u->reason]++;
    m->poisoned += poisoned;
    m->poisoned_merged += poisoned && u->verdict == SH_VERDICT_MERGED;
    sim_hash_number(m->s, (uint64_t)u->verdict << 32 | (uint64_t)u->reason);
    return SH_OK;
}

/* Alarms as the aggregator has them: key is (node, epoch, seq). */
static sh_status read_alarms(sim *s, sh_txn *txn, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_ALARM, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    for (; status == SH_OK; status = sh_cursor_next(cursor, &key, &value)) {
        sh_alarm alarm;
        sh_hash node = {{0}};
        memcpy(node.b, key.data, SH_MIN(key.n, sizeof node.b));
        uint32_t i = sim_node_of(s, &node);
        if (i == s->n_nodes || sh_alarm_decode(value.data, value.n, &alarm, NULL) != SH_OK ||
            alarm.metric >= SH_METRICS)
            continue;
        sim_node *n = &s->nodes[i];
        n->evidence[alarm.metric] = SH_MAX(n->evidence[alarm.metric], alarm.log_evalue);
        if (alarm.window == n->alarm_window && alarm.metric == n->alarm_metric) {
            n->alarm_log_evalue = alarm.log_evalue;
            n->alarm_effect = alarm.effect;
        }
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

static sh_status read_rows(summary *m, sh_error *err)
{
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(m->s->coord_store, SH_TXN_READ, &txn, err));
    sh_status status = sh_coord_each_candidate(txn, add_release, m, err);
    if (status == SH_OK)
        status = sh_coord_each_update(txn, add_update, m, err);
    if (status == SH_OK)
        status = read_alarms(m->s, txn, err);
    sh_txn_abort(&txn);
    return status;
}

/* ---- the audit, beside this program ---- */

static sh_status audit_path(char *out, sh_error *err)
{
    ssize_t n = readlink("/proc/self/exe", out, SH_PATH_BYTES - 32);
    if (n <= 0)
        return sh_fail(err, SH_ERR_IO, "audit: cannot tell where this program lies: %s",
                       strerror(errno));
    out[n] = 0;
    char *slash = strrchr(out, '/');
    snprintf(slash + 1, 32, "shoal-audit");
    return SH_OK;
}

/* Stores in memory are gone with this process: the same audit is called on them here. */
static sh_status audit_memory(const sim *s, json_t **out, sh_error *err)
{
    sh_audit *audit = NULL;
    sh_audit_result r;
    json_t *findings = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_audit_create(&audit, err));
    SH_GOTO(sh_audit_add_aggregator(audit, s->coord_store, err));
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        char name[32];
        snprintf(name, sizeof name, "node-%05u", i);
        SH_GOTO(sh_audit_add_node(audit, s->nodes[i].store, name, err));
    }
    sh_audit_finish(audit, &r, &findings);
    *out = sh_audit_document(&r, findings);
cleanup:
    sh_audit_destroy(&audit);
    return status;
}

/* Runs `shoal-audit --dir DIR` into DIR/audit.json and loads that. */
static sh_status run_audit(const sim *s, json_t **out, sh_error *err)
{
    char program[SH_PATH_BYTES], path[SH_PATH_BYTES];
    SH_TRY(audit_path(program, err));
    SH_TRY(sh_path_join(path, sizeof path, s->options.out, "audit.json", err));
    char dir_flag[] = "--dir", out_flag[] = "--out";
    char *argv[] = {program, dir_flag, (char *)s->options.out, out_flag, path, NULL};
    pid_t pid = 0;
    int wait_status = 0, failed = posix_spawn(&pid, program, NULL, NULL, argv, environ);
    if (failed)
        return sh_fail(err, SH_ERR_IO, "%s: cannot be run: %s", program, strerror(failed));
    while (waitpid(pid, &wait_status, 0) < 0 && errno == EINTR)
        ;
    if (!WIFEXITED(wait_status) || WEXITSTATUS(wait_status) > 1)
        return sh_fail(err, SH_ERR_IO, "%s failed; run it by hand on %s", program, s->options.out);
    return sh_json_load(path, out, err);
}

/* ---- parts of the document ---- */

static void add_drift(summary *m)
{
    sim *s = m->s;
    json_t *drift = json_object(), *nodes = json_array(), *timeline = json_array();
    uint64_t false_alarms = 0, soon = 0;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        const sim_node *n = &s->nodes[i];
        json_t *row = json_object();
        uint64_t windows = n->alarm_window ? n->alarm_window - n->change_window : 0;
        false_alarms += n->false_alarms;
        soon += n->alarm_window && windows <= ALARM_WINDOWS_MAX;
        sh_json_set(row, "node", sh_json_uint(i));
        sh_json_set(row, "topic", json_string(s->texts.n_topics ? s->texts.names[n->topic] : ""));
        sh_json_set(row, "change_window", sh_json_uint(n->change_window));
        sh_json_set(row, "first_alarm_window",
                    n->alarm_window ? sh_json_uint(n->alarm_window) : json_null());
        sh_json_set(row, "windows_to_alarm", n->alarm_window ? sh_json_uint(windows) : json_null());
        sh_json_set(row, "metric",
                    n->alarm_window ? json_string(sh_metric_name((sh_metric)n->alarm_metric))
                                    : json_null());
        sh_json_set(row, "log_evalue", sh_json_number(n->alarm_log_evalue));
        sh_json_set(row, "effect", n->alarm_window ? sh_json_number(n->alarm_effect) : json_null());
        sh_json_set(row, "unit",
                    n->alarm_window ? json_string(sh_metric_unit((sh_metric)n->alarm_metric))
                                    : json_null());
        sh_json_set(row, "false_alarms", sh_json_uint(n->false_alarms));
        json_array_append_new(nodes, row);
        sim_hash_number(s, n->alarm_window << 16 | n->false_alarms);
    }
    for (size_t i = 0; i < s->n_timeline; i++) {
        const struct sim_point *p = &s->timeline[i];
        double n = (double)SH_MAX(p->inferences, 1);
        uint64_t alarmed = 0;
        for (uint32_t k = 0; k < s->n_nodes; k++)
            alarmed += s->nodes[k].alarm_window && s->nodes[k].alarm_window <= i + 1;
        json_t *row = json_object();
        sh_json_set(row, "window", sh_json_uint(i + 1));
        sh_json_set(row, "nll", sh_json_number(p->nll / n));
        sh_json_set(row, "acceptance", sh_json_number((double)p->accepted / n));
        sh_json_set(row, "nodes_alarmed", sh_json_uint(alarmed));
        json_array_append_new(timeline, row);
    }
    sh_json_set(drift, "false_alarms", sh_json_uint(false_alarms));
    sh_json_set(drift, "nodes", nodes);
    sh_json_set(drift, "timeline", timeline);
    sh_json_set(m->root, "drift", drift);
    double share = (double)soon / s->n_nodes;
    check(m, "alarm within 3 windows of the change", sh_json_number(share), ">= 0.8 of the nodes",
          share >= ALARM_SHARE_MIN);
    check(m, "alarms before the change", sh_json_uint(false_alarms), "0", false_alarms == 0);
}

static void add_heatmap(summary *m)
{
    sim *s = m->s;
    json_t *map = json_object(), *nodes = json_array(), *metrics = json_array(),
           *values = json_array();
    for (int k = 0; k < SH_METRICS; k++)
        json_array_append_new(metrics, json_string(sh_metric_name((sh_metric)k)));
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        json_t *row = json_array();
        char name[64];
        snprintf(name, sizeof name, "node-%05u", i);
        for (int k = 0; k < SH_METRICS; k++)
            json_array_append_new(row, sh_json_number(s->nodes[i].evidence[k]));
        json_array_append_new(nodes, json_string(name));
        json_array_append_new(values, row);
    }
    sh_json_set(map, "nodes", nodes);
    sh_json_set(map, "metrics", metrics);
    sh_json_set(map, "values", values);
    sh_json_set(m->root, "heatmap", map);
}

/* Updates that nodes made in each second in which any could: of "learn" and "settle". */
static json_t *updates_per_s(const sim *s, uint64_t made)
{
    double seconds = s->phase_wall_s[SIM_PHASE_SETTLE] - s->phase_wall_s[SIM_PHASE_DRIFT];
    return seconds > 0 ? sh_json_number((double)made / seconds) : json_null();
}

static void add_updates(summary *m, const json_t *audit)
{
    sim *s = m->s;
    json_t *updates = json_object(), *refused = json_object();
    uint64_t made = 0, acked = 0, not_better = 0;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        made += s->nodes[i].updates_made;
        acked += s->nodes[i].updates_acked;
        not_better += s->nodes[i].updates_not_better;
    }
    for (int r = 1; r < SH_REASONS; r++)
        if (m->refused[r])
            sh_json_set(refused, sh_reason_name((sh_reason)r), sh_json_uint(m->refused[r]));
    sh_json_set(updates, "made", sh_json_uint(made));
    sh_json_set(updates, "made_per_s", updates_per_s(s, made));
    sh_json_set(updates, "not_better_on_own_heldout", sh_json_uint(not_better));
    sh_json_set(updates, "acknowledged", sh_json_uint(acked));
    sh_json_set(updates, "merged", sh_json_uint(m->merged));
    sh_json_set(updates, "refused", refused);
    sh_json_set(updates, "pending", sh_json_uint(m->pending));
    sh_json_set(updates, "poisoned", sh_json_uint(m->poisoned));
    sh_json_set(updates, "poisoned_merged", sh_json_uint(m->poisoned_merged));
    json_t *lost = json_object_get(audit, "lost"), *twice = json_object_get(audit, "twice");
    sh_json_set(updates, "lost", lost ? json_incref(lost) : json_null());
    sh_json_set(updates, "twice", twice ? json_incref(twice) : json_null());
    sh_json_set(m->root, "updates", updates);
    json_t *wrong = json_object_get(audit, "wrong");
    sh_json_set(updates, "findings", json_incref(json_object_get(audit, "findings")));
    check(m, "wrong (audit)", wrong ? json_incref(wrong) : json_null(), "0",
          json_is_integer(wrong) && json_integer_value(wrong) == 0);
    check(m, "lost (audit)", lost ? json_incref(lost) : json_null(), "0",
          json_is_integer(lost) && json_integer_value(lost) == 0);
    check(m, "counted twice (audit)", twice ? json_incref(twice) : json_null(), "0",
          json_is_integer(twice) && json_integer_value(twice) == 0);
    bool scale = s->options.poison_scale_node >= 0, sign = s->options.poison_sign_node >= 0;
    if (scale || sign)
        check(m, "poisoned updates merged", sh_json_uint(m->poisoned_merged),
              "0, each kind was sent",
              m->poisoned_merged == 0 && m->sent_scale == scale && m->sent_sign == sign);
}

static void add_bytes(summary *m)
{
    sim *s = m->s;
    json_t *bytes = json_object();
    uint64_t up = 0, down = 0, acked = 0, taken = 0;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        up += s->nodes[i].bytes_up;
        down += s->nodes[i].release_bytes_down;
        acked += s->nodes[i].updates_acked;
        taken += (uint64_t)__builtin_popcountll(s->nodes[i].releases_taken & ~3ull);
    }
    sh_json_set(bytes, "up_per_update", sh_json_number((double)up / (double)SH_MAX(acked, 1)));
    sh_json_set(bytes, "update_blob",
                sh_json_number((double)m->update_bytes / (double)SH_MAX(m->updates, 1)));
    sh_json_set(bytes, "down_per_release_node",
                sh_json_number((double)down / (double)SH_MAX(taken, 1)));
    sh_json_set(bytes, "full_model", sh_json_uint(s->genesis_model.len));
    sh_json_set(m->root, "bytes", bytes);
}

static void add_faults(summary *m)
{
    sim *s = m->s;
    json_t *faults = json_array();
    bool node = false, merge = false;
    for (size_t i = 0; i < s->n_faults; i++) {
        const sim_fault *f = &s->faults[i];
        char target[32] = "aggregator";
        if (f->target < s->n_nodes)
            snprintf(target, sizeof target, "node-%05u", f->target);
        json_t *row = json_object();
        sh_json_set(row, "name", json_string(f->name));
        sh_json_set(row, "target", json_string(target));
        sh_json_set(row, "at_ms", sh_json_uint(f->at_ms));
        json_array_append_new(faults, row);
        node = node || strcmp(f->name, "node.train") == 0;
        merge = merge || strcmp(f->name, s->options.merge_failpoint) == 0;
    }
    sh_json_set(m->root, "faults", faults);
    if (s->options.crash_training_node >= 0)
        check(m, "a node crashed in training", json_boolean(node), "hit", node);
    if (s->options.merge_crash > 0)
        check(m, "the aggregator crashed in a merge", json_boolean(merge), "hit", merge);
}

static void add_phases(summary *m)
{
    sim *s = m->s;
    json_t *phases = json_array();
    for (int p = 0; p <= (int)s->phase; p++) {
        json_t *row = json_object();
        sh_json_set(row, "name", json_string(sim_phase_names[p]));
        sh_json_set(row, "at_ms", sh_json_uint(s->phase_at_ms[p]));
        sh_json_set(row, "wall_s", sh_json_number(s->phase_wall_s[p]));
        json_array_append_new(phases, row);
    }
    sh_json_set(m->root, "phases", phases);
}

static void add_measures(summary *m, const sim_measures *x)
{
    sim *s = m->s;
    json_t *nll = json_object(), *acceptance = json_object();
    bool baselines = x->done && !s->options.no_baselines;
    sh_json_set(nll, "base", x->done ? sh_json_number(x->heldout_base) : json_null());
    sh_json_set(nll, "final", x->done ? sh_json_number(x->heldout_final) : json_null());
    sh_json_set(nll, "central_lora", baselines ? sh_json_number(x->heldout_central) : json_null());
    sh_json_set(nll, "local_only", baselines ? sh_json_number(x->heldout_local) : json_null());
    sh_json_set(m->root, "heldout_nll", nll);
    double share =
        baselines ? (x->heldout_base - x->heldout_final) / (x->heldout_base - x->heldout_central)
                  : NAN;
    sh_json_set(m->root, "gain_share", sh_json_number(share));
    sh_json_set(m->root, "central_example_passes", sh_json_number(x->central_passes));
    sh_json_set(acceptance, "before", sh_json_number(x->done ? x->acceptance_before : NAN));
    sh_json_set(acceptance, "after_base", sh_json_number(x->done ? x->acceptance_base : NAN));
    sh_json_set(acceptance, "end", sh_json_number(x->done ? x->acceptance_end : NAN));
    sh_json_set(m->root, "acceptance", acceptance);
    if (x->done) {
        sh_sha256_update(&s->hash, &x->heldout_base, sizeof(double));
        sh_sha256_update(&s->hash, &x->heldout_final, sizeof(double));
    }
    if (s->learning == &sim_learning_real && !s->options.no_baselines)
        check(m, "share of central LoRA's gain", sh_json_number(share), ">= 0.75",
              share >= GAIN_SHARE_MIN);
}

/* Every setting by its key, and the hash of those that a result may depend on. */
static void add_configuration(summary *m)
{
    static const char *const without[] = {"out", "texts", "base", "threads", "json", "plain"};
    json_t *all = json_object(), *hashed = json_object();
    for (size_t i = 0; i < m->s->command->n_options; i++) {
        const sh_option *o = &m->s->command->options[i];
        const char *field = (const char *)m->s->command_options + o->offset;
        json_t *value = o->type == SH_OPTION_FLAG   ? json_boolean(*(const bool *)field)
                        : o->type == SH_OPTION_INT  ? json_integer(*(const int64_t *)field)
                        : o->type == SH_OPTION_REAL ? sh_json_number(*(const double *)field)
                                                    : json_string(*(const char *const *)field);
        bool counts = true;
        for (size_t k = 0; k < SH_COUNT(without); k++)
            counts = counts && strcmp(o->key, without[k]) != 0;
        if (counts)
            sh_json_set(hashed, o->key, json_incref(value));
        sh_json_set(all, o->key, value);
    }
    char *text = json_dumps(hashed, JSON_COMPACT | JSON_SORT_KEYS);
    sh_hash h = sh_sha256(text ? text : "", text ? strlen(text) : 0);
    free(text);
    json_decref(hashed);
    sh_json_set(m->root, "configuration_sha256", sh_json_hash(&h));
    sh_json_set(m->root, "configuration", all);
}

static void add_head(summary *m, const sh_error *run_error)
{
    sim *s = m->s;
    sh_json_set(m->root, "version", json_integer(1));
    sh_json_set(m->root, "program", json_string(s->program));
    sh_json_set(m->root, "seed", json_integer((json_int_t)s->options.seed));
    sh_json_set(m->root, "result_hash", json_null()); /* filled last; keeps its place */
    sh_json_set(m->root, "ok", json_false());
    sh_json_set(m->root, "error",
                run_error && run_error->code ? json_string(run_error->text) : json_null());
    sh_json_set(m->root, "nodes", sh_json_uint(s->n_nodes));
    sh_json_set(m->root, "threads", json_integer((json_int_t)s->options.threads));
    sh_json_set(m->root, "commit", json_string(SHOAL_COMMIT));
    sh_json_set(m->root, "dirty", json_boolean(SHOAL_DIRTY));
    sh_json_set(m->root, "compiler", json_string(__VERSION__));
    sh_json_set(m->root, "learning", json_string(s->learning->name));
    sh_json_set(m->root, "kernel", json_string(sh_kernel_level()));
    sh_json_set(m->root, "blas_core", json_string(sh_blas_core()));
    sh_json_set(m->root, "virtual_ms", s->real_processes ? json_null() : sh_json_uint(s->now_ms));
    sh_json_set(m->root, "events", s->real_processes ? json_null() : sh_json_uint(s->events));
    sh_json_set(m->root, "wall_s", sh_json_number(sim_wall_seconds() - s->wall_start_s));
}

/* What the program that ran the fleet has to say beside. */
static void add_extra(summary *m)
{
    size_t i;
    const json_t *row;
    json_array_foreach(m->s->extra_checks, i, row)
    {
        json_array_append(m->checks, (json_t *)row);
        m->ok = m->ok && json_is_true(json_object_get(row, "ok"));
    }
    if (m->s->extra)
        json_object_update_missing(m->root, m->s->extra);
}

/* A part that cannot be made leaves its figures out; the document is written all the same. */
static void note_failure(summary *m, sh_status status, const sh_error *err)
{
    if (status == SH_OK)
        return;
    m->ok = false;
    if (json_is_null(json_object_get(m->root, "error")))
        sh_json_set(m->root, "error", json_string(err->text));
}

/* A run that never began has a summary too: why, and that it is not ok. */
sh_status sim_summary_unborn(const char *program, const sim_options *options, const sh_error *why,
                             sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_dir_make(options->out, err));
    SH_TRY(sh_path_join(path, sizeof path, options->out, "summary.json", err));
    json_t *root = json_object();
    sh_json_set(root, "version", json_integer(1));
    sh_json_set(root, "program", json_string(program));
    sh_json_set(root, "seed", json_integer((json_int_t)options->seed));
    sh_json_set(root, "result_hash", json_null());
    sh_json_set(root, "ok", json_false());
    sh_json_set(root, "error", json_string(why->text));
    sh_status status = sh_json_save(path, root, err);
    json_decref(root);
    return status;
}

sh_status sim_summary(sim *s, const sim_measures *measures, const sh_error *run_error, json_t **out,
                      bool *ok, sh_error *err)
{
    summary m = {.s = s,
                 .root = json_object(),
                 .checks = json_array(),
                 .releases = json_array(),
                 .ok = !run_error || !run_error->code};
    json_t *audit = NULL;
    sh_error part = {0};
    char path[SH_PATH_BYTES];
    sh_status status = SH_OK;
    add_head(&m, run_error);
    sh_json_set(m.root, "checks", m.checks);
    sh_json_set(m.root, "releases", m.releases);
    note_failure(&m, read_rows(&m, &part), &part);
    add_measures(&m, measures);
    add_drift(&m);
    add_heatmap(&m);
    bool lmdb = strcmp(s->options.store, "lmdb") == 0;
    note_failure(&m, lmdb ? run_audit(s, &audit, &part) : audit_memory(s, &audit, &part), &part);
    add_updates(&m, audit);
    add_bytes(&m);
    add_faults(&m);
    check(&m, "releases published in Q8_0", sh_json_uint(m.published), ">= 3",
          m.published >= RELEASES_MIN && m.not_q8 == 0);
    if (s->options.bad_scale_round > 0)
        check(&m, "candidates refused by the gate", sh_json_uint(m.gate_refused), ">= 1",
              m.gate_refused >= 1);
    add_extra(&m);
    add_phases(&m);
    add_configuration(&m);
    sh_hash h = sh_sha256_final(&s->hash);
    if (!s->real_processes) /* which never run the same way twice */
        sh_json_set(m.root, "result_hash", sh_json_hash(&h));
    sh_json_set(m.root, "ok", json_boolean(m.ok));
    if (strcmp(s->options.store, "lmdb") == 0) {
        SH_GOTO(sh_path_join(path, sizeof path, s->options.out, "summary.json", err));
        SH_GOTO(sh_json_save(path, m.root, err));
    }
    *out = json_incref(m.root);
    *ok = m.ok;
cleanup:
    json_decref(m.root);
    json_decref(audit);
    return status;
}
