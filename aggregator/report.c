/*
 * The report document:
 *
 *     report_version  1
 *     run             seed, result_hash, nodes, threads, kernel, blas_core, learning, virtual_ms,
 *                     wall_s, error: as the summary has them
 *     verdict         state: good | attention | drifted | quiet | failed | incomplete; headline;
 *                     action: promote | hold | retrain | roll back | investigate; recommendation
 *     coverage        nodes, nodes_reporting, nodes_alarmed, took_last_release, not_measured
 * [path]; of a fleet's store too: enrolled, stale, never_seen, insufficient, revoked, dropped
 * {updates, alarms, windows, records} fleet           as survey.h has it; null without a store
 *     checks          passed, failed, rows [{name, value, limit, ok}], left_out
 *     quality         heldout_nll, gain_share, acceptance, timeline, change_window
 *     drift           false_alarms, alarmed, within_3_windows, by_metric {name: nodes}, ranked
 *                     [{node, topic, metric, log_evalue, effect, unit, windows_to_alarm}],
 *                     left_out
 *     heatmap         metrics, nodes, values (largest evidence first), left_out
 *     histograms      [{metric, unit, low, high, reference [bins], current [bins], and their n and
 *                     mean}]
 *     decisions       newest entries of the audit log: rows [{at_ms, text}], left_out
 *     releases        published, refused, last_version, rows, left_out
 *     sync            updates, bytes: as the summary has them
 *     faults, phases  rows, left_out
 *
 * Members that the summary lacks are null.
 */
#include "aggregator/report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/report_page.h"

#define ALARM_WINDOWS_SOON  3
#define SENTENCE_BYTES      512
#define ACCEPTANCE_DROP_MAX 0.05 /* of completions, when inputs have not moved */

static void set_number(json_t *object, const char *key, double x)
{
    bool whole = isfinite(x) && x == floor(x) && fabs(x) < 9e15;
    sh_json_set(object, key, whole ? json_integer((json_int_t)x) : sh_json_number(x));
}

/* A copy of a member of the summary, null when it is absent. */
static json_t *copy(const json_t *summary, const char *path)
{
    const json_t *value = report_get(summary, path);
    return value != NULL ? json_deep_copy(value) : json_null();
}

/* The first `most` rows of an array member that are objects, with how many more there are. */
static json_t *first_rows(const json_t *array, size_t most)
{
    json_t *out = json_object(), *rows = json_array();
    size_t n = json_array_size(array), kept = 0;
    for (size_t i = 0; i < n && kept < most; i++) {
        if (!json_is_object(json_array_get(array, i)))
            continue;
        json_array_append_new(rows, json_deep_copy(json_array_get(array, i)));
        kept++;
    }
    sh_json_set(out, "rows", rows);
    set_number(out, "left_out", (double)(n - kept));
    return out;
}

static json_t *first_objects(const json_t *summary, const char *path, size_t most)
{
    json_t *all = first_rows(report_get(summary, path), most);
    json_t *rows = json_incref(json_object_get(all, "rows"));
    json_decref(all);
    return rows;
}

static json_t *make_run(const json_t *summary)
{
    static const char *const keys[] = {"seed",   "result_hash", "nodes",    "threads",
                                       "kernel", "blas_core",   "learning", "virtual_ms",
                                       "wall_s", "error"};
    json_t *run = json_object();
    for (size_t i = 0; i < SH_COUNT(keys); i++)
        sh_json_set(run, keys[i], copy(summary, keys[i]));
    return run;
}

static json_t *make_checks(const json_t *summary)
{
    const json_t *checks = report_get(summary, "checks");
    json_t *out = first_rows(checks, REPORT_CHECKS_MAX);
    double passed = 0, failed = 0;
    for (size_t i = 0; i < json_array_size(checks); i++)
        *(json_is_true(json_object_get(json_array_get(checks, i), "ok")) ? &passed : &failed) += 1;
    set_number(out, "passed", passed);
    set_number(out, "failed", failed);
    return out;
}

/* Every n-th point, so that at most REPORT_POINTS_MAX are left, and the last. */
static json_t *thin_out(const json_t *timeline)
{
    json_t *out = json_array();
    size_t n = json_array_size(timeline), step = n / REPORT_POINTS_MAX + 1;
    for (size_t i = 0; i < n; i++)
        if (i % step == 0 || i + 1 == n)
            json_array_append_new(out, json_deep_copy(json_array_get(timeline, i)));
    return out;
}

static int by_number(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median of a numeric member over rows; NAN when no row has it. */
static double median_of(const json_t *rows, const char *key)
{
    size_t n = json_array_size(rows), m = 0;
    double *values = sh_calloc(n ? n : 1, sizeof(*values));
    if (values == NULL)
        return NAN;
    for (size_t i = 0; i < n; i++) {
        double x = report_number(json_array_get(rows, i), key);
        if (!isnan(x))
            values[m++] = x;
    }
    qsort(values, m, sizeof(*values), by_number);
    double median = m ? values[m / 2] : NAN;
    free(values);
    return median;
}

static json_t *make_quality(const json_t *summary)
{
    json_t *out = json_object();
    sh_json_set(out, "heldout_nll", copy(summary, "heldout_nll"));
    sh_json_set(out, "gain_share", copy(summary, "gain_share"));
    sh_json_set(out, "acceptance", copy(summary, "acceptance"));
    sh_json_set(out, "timeline", thin_out(report_get(summary, "drift.timeline")));
    set_number(out, "change_window",
               median_of(report_get(summary, "drift.nodes"), "change_window"));
    return out;
}

typedef struct {
    size_t index;
    double evidence;
} ranked;

/* Largest first; equal ones keep their order, so that the report does not depend on qsort. */
static int by_evidence(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->evidence != y->evidence)
        return x->evidence < y->evidence ? 1 : -1;
    return (x->index > y->index) - (x->index < y->index);
}

/* "node-00003" of the number 3; a string stays; null for anything else. */
static json_t *node_label(const json_t *node)
{
    char label[32];
    if (json_is_string(node))
        return json_string(json_string_value(node));
    if (!json_is_integer(node))
        return json_null();
    snprintf(label, sizeof(label), "node-%05lld", (long long)json_integer_value(node));
    return json_string(label);
}

static json_t *ranked_row(const json_t *node)
{
    static const char *const keys[] = {
        "topic",       "metric",           "log_evalue",    "effect",
        "unit",        "windows_to_alarm", "change_window", "first_alarm_window",
        "drifting_now"};
    json_t *row = json_object();
    sh_json_set(row, "node", node_label(report_get(node, "node")));
    for (size_t i = 0; i < SH_COUNT(keys); i++)
        sh_json_set(row, keys[i], copy(node, keys[i]));
    return row;
}

static json_t *make_drift(const json_t *summary)
{
    const json_t *nodes = report_get(summary, "drift.nodes");
    size_t n = json_array_size(nodes);
    json_t *out = json_object(), *rows = json_array(), *by_metric = json_object();
    double alarmed = 0, soon = 0;
    ranked *order = sh_calloc(n ? n : 1, sizeof(*order));
    for (size_t i = 0; i < n; i++) {
        const json_t *node = json_array_get(nodes, i);
        const char *metric = report_string(node, "metric");
        double evidence = report_number(node, "log_evalue");
        double windows = report_number(node, "windows_to_alarm");
        bool alarm = !isnan(report_number(node, "first_alarm_window"));
        alarmed += alarm;
        soon += alarm && windows <= ALARM_WINDOWS_SOON;
        if (alarm && metric != NULL)
            set_number(by_metric, metric,
                       json_number_value(json_object_get(by_metric, metric)) + 1);
        if (order != NULL)
            order[i] = (ranked){i, alarm && !isnan(evidence) ? evidence : -INFINITY};
    }
    if (order != NULL)
        qsort(order, n, sizeof(*order), by_evidence);
    for (size_t i = 0; order != NULL && i < n && i < REPORT_RANKED_MAX; i++)
        json_array_append_new(rows, ranked_row(json_array_get(nodes, order[i].index)));
    free(order);
    sh_json_set(out, "false_alarms", copy(summary, "drift.false_alarms"));
    set_number(out, "nodes", nodes != NULL ? (double)n : NAN);
    set_number(out, "alarmed", nodes != NULL ? alarmed : NAN);
    set_number(out, "within_3_windows", nodes != NULL ? soon : NAN);
    sh_json_set(out, "by_metric", by_metric);
    set_number(out, "left_out", (double)(n - json_array_size(rows)));
    sh_json_set(out, "ranked", rows);
    return out;
}

static double row_evidence(const json_t *values)
{
    double most = -INFINITY;
    for (size_t k = 0; k < json_array_size(values); k++) {
        const json_t *value = json_array_get(values, k);
        if (json_is_number(value))
            most = fmax(most, json_number_value(value));
    }
    return most;
}

static json_t *make_heatmap(const json_t *summary)
{
    const json_t *names = report_get(summary, "heatmap.nodes");
    const json_t *values = report_get(summary, "heatmap.values");
    size_t n = SH_MIN(json_array_size(names), json_array_size(values));
    if (n == 0 || json_array_size(report_get(summary, "heatmap.metrics")) == 0)
        return json_null();
    json_t *out = json_object(), *kept_names = json_array(), *kept_values = json_array();
    ranked *order = sh_calloc(n, sizeof(*order));
    for (size_t i = 0; order != NULL && i < n; i++)
        order[i] = (ranked){i, row_evidence(json_array_get(values, i))};
    if (order != NULL)
        qsort(order, n, sizeof(*order), by_evidence);
    for (size_t i = 0; order != NULL && i < n && i < REPORT_NODES_MAX; i++) {
        json_array_append_new(kept_names, node_label(json_array_get(names, order[i].index)));
        json_array_append_new(kept_values, json_deep_copy(json_array_get(values, order[i].index)));
    }
    free(order);
    sh_json_set(out, "metrics", copy(summary, "heatmap.metrics"));
    set_number(out, "left_out", (double)(n - json_array_size(kept_names)));
    sh_json_set(out, "nodes", kept_names);
    sh_json_set(out, "values", kept_values);
    return out;
}

static json_t *make_releases(const json_t *summary)
{
    const json_t *rows = report_get(summary, "releases");
    json_t *out = first_rows(rows, REPORT_RELEASES_MAX);
    double published = 0, refused = 0, last = NAN, taken = NAN;
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        double version = report_number(row, "version");
        *(isnan(version) ? &refused : &published) += 1;
        if (!isnan(version) && (isnan(last) || version >= last)) {
            last = version;
            taken = report_number(row, "taken_by_nodes");
        }
    }
    set_number(out, "published", rows != NULL ? published : NAN);
    set_number(out, "refused", rows != NULL ? refused : NAN);
    set_number(out, "last_version", last);
    set_number(out, "last_taken_by_nodes", taken);
    return out;
}

static json_t *make_coverage(const json_t *summary, const json_t *report)
{
    static const char *const wanted[] = {"heldout_nll.base",
                                         "heldout_nll.final",
                                         "heldout_nll.central_lora",
                                         "heldout_nll.local_only",
                                         "gain_share",
                                         "acceptance.before",
                                         "acceptance.after_base",
                                         "acceptance.end",
                                         "releases",
                                         "drift.nodes",
                                         "drift.timeline",
                                         "heatmap",
                                         "updates.made",
                                         "updates.acknowledged",
                                         "updates.merged",
                                         "updates.lost",
                                         "updates.twice",
                                         "bytes.up_per_update",
                                         "bytes.down_per_release_node"};
    const json_t *given = report_get(summary, "coverage");
    json_t *out = json_is_object(given) ? json_deep_copy(given) : json_object();
    json_t *missing = json_array();
    for (size_t i = 0; i < SH_COUNT(wanted) && !report_is_fleet(report); i++)
        if (report_get(summary, wanted[i]) == NULL)
            json_array_append_new(missing, json_string(wanted[i]));
    sh_json_set(out, "nodes", copy(summary, "nodes"));
    sh_json_set(out, "nodes_reporting",
                given != NULL ? copy(summary, "coverage.reporting") : copy(report, "drift.nodes"));
    sh_json_set(out, "nodes_alarmed", copy(report, "drift.alarmed"));
    sh_json_set(out, "took_last_release", copy(report, "releases.last_taken_by_nodes"));
    sh_json_set(out, "not_measured", missing);
    return out;
}

typedef struct {
    const char *state, *action;
    char headline[SENTENCE_BYTES], recommendation[SENTENCE_BYTES];
} verdict;

static const char *first_failed(const json_t *report)
{
    const json_t *rows = report_get(report, "checks.rows");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        if (!json_is_true(json_object_get(row, "ok")))
            return report_string(row, "name") ? report_string(row, "name") : "(without a name)";
    }
    return "(not listed)";
}

static void say(char out[SENTENCE_BYTES], const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static void say(char out[SENTENCE_BYTES], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(out, SENTENCE_BYTES, format, args);
    va_end(args);
    /* A long name may have been cut inside a character, which JSON refuses: cut before it. */
    size_t end = n < SENTENCE_BYTES ? (size_t)SH_MAX(n, 0) : SENTENCE_BYTES - 1;
    if (n >= SENTENCE_BYTES)
        while (end > 0 && ((unsigned char)out[end - 1] & 0x80))
            end--;
    out[end] = '\0';
}

/* What would make publishing wrong, worst first; false when there is nothing of the kind. */
static bool judge_harm(const json_t *report, verdict *v)
{
    const char *error = report_string(report, "run.error");
    double lost = report_number(report, "sync.updates.lost");
    double twice = report_number(report, "sync.updates.twice");
    double poisoned = report_number(report, "sync.updates.poisoned_merged");
    double base = report_number(report, "quality.heldout_nll.base");
    double final = report_number(report, "quality.heldout_nll.final");
    v->state = "failed";
    v->action = "hold";
    if (error != NULL) {
        v->state = "incomplete";
        say(v->headline, "The run stopped early: %.300s", error);
        say(v->recommendation, "Mend the cause and run again; publish nothing from this run.");
    } else if (lost > 0 || twice > 0) {
        v->action = "investigate";
        say(v->headline, "The audit found %.0f updates lost and %.0f counted twice.",
            isnan(lost) ? 0 : lost, isnan(twice) ? 0 : twice);
        say(v->recommendation, "Find out how before anything is published: see audit.json.");
    } else if (poisoned > 0) {
        v->action = "roll back";
        say(v->headline, "%.0f poisoned updates were merged into a release.", poisoned);
        say(v->recommendation, "Roll back to the release before the first of them.");
    } else if (final >= base) {
        v->action = "roll back";
        say(v->headline, "Held-out loss is not better than the base: %.3f after, %.3f before.",
            final, base);
        say(v->recommendation, "Roll back to the base and look at the gate's suite.");
    } else {
        return false;
    }
    return true;
}

/* A fleet that goes on: what is seen now decides, not what a run was to show. */
static void judge_fleet(const json_t *report, verdict *v)
{
    double enrolled = report_number(report, "coverage.enrolled");
    double reporting = report_number(report, "coverage.nodes_reporting");
    double insufficient = report_number(report, "coverage.insufficient");
    double drifting = report_number(report, "fleet.drifting_now");
    double before = report_number(report, "fleet.acceptance_reference");
    double now = report_number(report, "fleet.acceptance_now");
    double release = report_number(report, "fleet.release");
    double on_release = report_number(report, "fleet.on_release");
    v->action = "hold";
    if (!(reporting > 0) || reporting - insufficient < enrolled / 2) {
        v->state = "incomplete";
        say(v->headline, "%.0f of %.0f nodes report, %.0f of them with too little to judge by.",
            reporting, enrolled, insufficient);
        say(v->recommendation, "Decide nothing yet: see runbook/node-stale.md for those away.");
    } else if (drifting > 0) {
        v->state = "drifted";
        v->action = "retrain";
        say(v->headline, "%.0f of %.0f reporting nodes see drift on release %.0f.", drifting,
            reporting, release);
        say(v->recommendation, "Let rounds go on; if none begins, see runbook/drift.md.");
    } else if (now < before - ACCEPTANCE_DROP_MAX && release > 1) {
        v->state = "attention";
        v->action = "roll back";
        say(v->headline,
            "Users accept %.1f %% of completions, %.1f %% before, and inputs are calm.", 100 * now,
            100 * before);
        say(v->recommendation, "Roll back release %.0f and look at its gate.", release);
    } else if (on_release < reporting) {
        v->state = "good";
        v->action = "promote";
        say(v->headline, "No drift; %.0f of %.0f reporting nodes run release %.0f.", on_release,
            reporting, release);
        say(v->recommendation, "Go on promoting release %.0f.", release);
    } else {
        v->state = "good";
        say(v->headline, "No drift; every reporting node runs release %.0f.", release);
        say(v->recommendation, "Nothing to do.");
    }
}

static void judge(const json_t *report, verdict *v)
{
    double published = report_number(report, "releases.published");
    double last = report_number(report, "releases.last_version");
    double alarmed = report_number(report, "drift.alarmed");
    double nodes = report_number(report, "drift.nodes");
    double failed = report_number(report, "checks.failed");
    double passed = report_number(report, "checks.passed");
    double base = report_number(report, "quality.heldout_nll.base");
    double final = report_number(report, "quality.heldout_nll.final");
    if (report_is_fleet(report)) {
        judge_fleet(report, v);
        return;
    }
    if (judge_harm(report, v))
        return;
    if (isnan(published) && isnan(alarmed)) {
        v->state = "incomplete";
        v->action = "hold";
        say(v->headline, "The summary has neither releases nor drift.");
        say(v->recommendation, "Let the run come to its end, then report again.");
    } else if (failed > 0) {
        v->state = "attention";
        v->action = "hold";
        say(v->headline, "%.0f of %.0f checks do not hold; the first: %.200s.", failed,
            failed + passed, first_failed(report));
        say(v->recommendation, "Hold the last release where it is until that is explained.");
    } else if (!(published > 0) && alarmed > 0) {
        v->state = "drifted";
        v->action = "retrain";
        say(v->headline, "%.0f of %.0f nodes report drift and nothing was released since.", alarmed,
            nodes);
        say(v->recommendation, "Start a round: ask the nodes in alarm to train.");
    } else if (!(published > 0)) {
        v->state = "quiet";
        v->action = "hold";
        say(v->headline, "No node reports drift and nothing was released.");
        say(v->recommendation, "Nothing to do.");
    } else {
        v->state = "good";
        v->action = "promote";
        if (final < base)
            say(v->headline, "The fleet learned: held-out loss %.3f, from %.3f with the base.",
                final, base);
        else
            say(v->headline, "%.0f releases passed the gate; held-out loss is not measured.",
                published);
        say(v->recommendation, "Promote release %.0f.", last);
    }
}

static json_t *make_verdict(const json_t *report)
{
    verdict v = {0};
    json_t *out = json_object();
    judge(report, &v);
    sh_json_set(out, "state", json_string(v.state));
    sh_json_set(out, "headline", json_string(v.headline));
    sh_json_set(out, "action", json_string(v.action));
    sh_json_set(out, "recommendation", json_string(v.recommendation));
    return out;
}

sh_status sh_report_make(const json_t *summary, json_t **out, sh_error *err)
{
    if (!json_is_object(summary))
        return sh_fail(err, SH_ERR_INVALID, "summary: expected a JSON object");
    json_t *report = json_object(), *sync = json_object();
    sh_json_set(report, "report_version", json_integer(1));
    sh_json_set(report, "run", make_run(summary));
    sh_json_set(report, "verdict", json_null()); /* keeps its place; judged last */
    sh_json_set(report, "coverage", json_null());
    sh_json_set(report, "fleet", copy(summary, "fleet"));
    sh_json_set(report, "checks", make_checks(summary));
    sh_json_set(report, "quality", make_quality(summary));
    sh_json_set(report, "drift", make_drift(summary));
    sh_json_set(report, "heatmap", make_heatmap(summary));
    sh_json_set(report, "histograms", first_objects(summary, "histograms", REPORT_METRICS_MAX));
    sh_json_set(report, "releases", make_releases(summary));
    sh_json_set(sync, "updates", copy(summary, "updates"));
    sh_json_set(sync, "bytes", copy(summary, "bytes"));
    sh_json_set(report, "sync", sync);
    sh_json_set(report, "faults", first_rows(report_get(summary, "faults"), REPORT_FAULTS_MAX));
    sh_json_set(report, "decisions",
                first_rows(report_get(summary, "decisions"), REPORT_DECISIONS_MAX));
    sh_json_set(report, "phases", first_rows(report_get(summary, "phases"), REPORT_FAULTS_MAX));
    sh_json_set(report, "coverage", make_coverage(summary, report));
    sh_json_set(report, "verdict", make_verdict(report));
    *out = report;
    return SH_OK;
}
