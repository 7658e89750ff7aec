#include "aggregator/survey.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/stats/window.h"

#define WINDOWS_MAX (1u << 20) /* of one node, in memory at a time */

typedef struct { /* what is needed of one window */
    uint32_t release;
    uint64_t start_ms, end_ms;
    uint32_t inferences, rated, accepted;
    sh_window_metric metric[SH_METRICS];
} point;

typedef struct {
    sh_hash key;
    char label[SH_HASH_HEX_BYTES];
    uint64_t last_ms;
    bool revoked, stale, silent, drifting, sufficient;
    uint64_t active_version;
    sh_alarm strongest; /* log_evalue 0: none */
    uint64_t first_alarm_window;
    double evidence[SH_METRICS];
} node;

typedef struct {
    const sh_survey_options *options;
    uint64_t now_ms;
    sh_txn *txn;
    json_t *releases, *decisions;
    node *nodes; /* sorted by key, as the store is */
    size_t n_nodes, nodes_cap;
    uint64_t inferences, dropped[SH_CLASSES];
    /* the windows of the node that is being read */
    point *points;
    size_t n_points, points_cap, windows;
    sh_hash reading;
    uint64_t first_ms, last_ms; /* over all windows */
    struct bucket {
        double nll;
        uint64_t nll_n, inferences, rated, accepted, alarms;
    } timeline[SH_SURVEY_POINTS];
    sh_window_metric reference[SH_METRICS], current[SH_METRICS];
    struct bucket before, now; /* of the same windows */
    uint64_t merged, pending, refused[SH_REASONS], updates;
    uint64_t last_version;
} survey;

json_t *sh_survey_release(const sh_release_row *r)
{
    json_t *row = json_object();
    sh_json_set(row, "candidate", sh_json_uint(r->candidate));
    sh_json_set(row, "version", r->version ? sh_json_uint(r->version) : json_null());
    sh_json_set(row, "parent", sh_json_uint(r->parent));
    sh_json_set(row, "at_ms", sh_json_uint(r->at_ms));
    sh_json_set(row, "sha256", sh_json_hash(&r->sha256));
    sh_json_set(row, "bytes", sh_json_uint(r->bytes));
    sh_json_set(row, "format", json_string(r->format));
    sh_json_set(row, "loss_parent", sh_json_number(r->loss_parent));
    sh_json_set(row, "loss_candidate", sh_json_number(r->loss_candidate));
    sh_json_set(row, "loss_adapter_form", sh_json_number(r->loss_adapter_form));
    sh_json_set(row, "worst_slice", sh_json_number(r->worst_slice));
    sh_json_set(row, "verdict", json_string(r->verdict));
    sh_json_set(row, "updates_merged", sh_json_uint(r->n_merged));
    sh_json_set(row, "rank", sh_json_uint(r->adapter_rank));
    sh_json_set(row, "discarded_energy", sh_json_number(r->adapter_discarded));
    sh_json_set(row, "server_scale", sh_json_number(r->server_scale));
    if (r->canary_nodes) {
        sh_json_set(row, "canary_nodes", sh_json_uint(r->canary_nodes));
        sh_json_set(row, "canary_tokens", sh_json_uint(r->canary_tokens));
        sh_json_set(row, "canary_parent", sh_json_number(r->canary_parent));
        sh_json_set(row, "canary_candidate", sh_json_number(r->canary_candidate));
    }
    return row;
}

/* ---- rows of the store ---- */

static sh_status add_node(void *arg, const sh_node_row *row)
{
    survey *s = arg;
    SH_TRY(sh_array_reserve((void **)&s->nodes, &s->nodes_cap, s->n_nodes + 1, sizeof *s->nodes,
                            SH_COORD_NODES_MAX));
    node *n = &s->nodes[s->n_nodes++];
    char hex[SH_HASH_HEX_BYTES];
    *n = (node){.key = row->key,
                .revoked = row->revoked,
                .last_ms = row->last_ms,
                .silent = row->last_ms == 0,
                .drifting = row->checkin.drifting,
                .active_version = row->checkin.active_version};
    sh_hex(row->key.b, 4, hex);
    snprintf(n->label, sizeof n->label, "%s", row->name[0] ? row->name : hex);
    s->inferences += row->checkin.inferences;
    for (int c = 0; c < SH_CLASSES; c++)
        s->dropped[c] += row->checkin.dropped[c];
    return SH_OK;
}

static int by_key(const void *a, const void *b)
{
    return memcmp(a, ((const node *)b)->key.b, sizeof(sh_hash));
}

static node *node_of(survey *s, const sh_hash *key)
{
    return s->n_nodes ? bsearch(key->b, s->nodes, s->n_nodes, sizeof *s->nodes, by_key) : NULL;
}

static sh_status add_alarm(void *arg, const sh_update_id *id, sh_bytes payload)
{
    survey *s = arg;
    sh_alarm alarm;
    node *n = node_of(s, &id->node);
    if (!n || sh_alarm_decode(payload.data, payload.n, &alarm, NULL) != SH_OK ||
        alarm.metric >= SH_METRICS)
        return SH_OK;
    n->evidence[alarm.metric] = fmax(n->evidence[alarm.metric], alarm.log_evalue);
    if (n->first_alarm_window == 0 || alarm.window < n->first_alarm_window)
        n->first_alarm_window = alarm.window;
    if (alarm.log_evalue > n->strongest.log_evalue)
        n->strongest = alarm;
    if (s->last_ms > s->first_ms && alarm.at_ms >= s->first_ms && alarm.at_ms <= s->last_ms) {
        double at = (double)(alarm.at_ms - s->first_ms) / (double)(s->last_ms - s->first_ms);
        s->timeline[SH_MIN((size_t)(at * SH_SURVEY_POINTS), SH_SURVEY_POINTS - 1)].alarms++;
    }
    return SH_OK;
}

static sh_status add_candidate(void *arg, const sh_release_row *row)
{
    survey *s = arg;
    if (row->version)
        s->last_version = SH_MAX(s->last_version, row->version);
    if (row->version && row->parent == 0)
        return SH_OK; /* the genesis: no gate saw it */
    json_t *release = sh_survey_release(row);
    if (row->version) {
        uint64_t taken = 0;
        for (size_t i = 0; i < s->n_nodes; i++)
            taken += s->nodes[i].active_version == row->version;
        sh_json_set(release, "taken_by_nodes", sh_json_uint(taken));
    }
    json_array_append_new(s->releases, release);
    return SH_OK;
}

static sh_status add_update(void *arg, const sh_update_row *row)
{
    survey *s = arg;
    s->updates++;
    s->merged += row->verdict == SH_VERDICT_MERGED;
    s->pending += row->verdict == SH_VERDICT_PENDING;
    if (row->verdict == SH_VERDICT_REFUSED && (unsigned)row->reason < SH_REASONS)
        s->refused[row->reason]++;
    return SH_OK;
}

static sh_status add_decision(void *arg, uint64_t seq, uint64_t at_ms, const char *text)
{
    survey *s = arg;
    json_t *row = json_object();
    sh_json_set(row, "seq", sh_json_uint(seq));
    sh_json_set(row, "at_ms", sh_json_uint(at_ms));
    sh_json_set(row, "text", json_string(text));
    json_array_append_new(s->decisions, row);
    if (json_array_size(s->decisions) > SH_SURVEY_DECISIONS)
        json_array_remove(s->decisions, 0);
    return SH_OK;
}

/* ---- windows ---- */

static void add_metrics(sh_window_metric *into, const sh_window_metric *from)
{
    into->n += from->n;
    into->sum += from->sum;
    into->square_sum += from->square_sum;
    for (int b = 0; b < SH_HISTOGRAM_BINS; b++)
        into->histogram[b] += from->histogram[b];
}

static void add_bucket(struct bucket *b, const point *p)
{
    b->inferences += p->inferences;
    b->rated += p->rated;
    b->accepted += p->accepted;
    b->nll += (double)p->metric[SH_METRIC_NLL].sum / SH_FIXED_POINT;
    b->nll_n += p->metric[SH_METRIC_NLL].n;
}

/* Whether a point counts for a metric: of that release (0: any), and with samples (the metrics that
 * learn where they are centred have none at first). */
static bool counts(const point *p, uint32_t release, int metric)
{
    return (release == 0 || p->release == release) && p->metric[metric].n > 0;
}

/* The first and the last SH_SURVEY_WINDOWS of the node's points that count, into `first` and
 * `last`; of fewer than twice that, half each. */
static size_t split(const survey *s, uint32_t release, int metric, const point **first,
                    const point **last)
{
    size_t of = 0, most = SH_SURVEY_WINDOWS, at = 0, end = 0;
    for (size_t i = 0; i < s->n_points; i++)
        of += counts(&s->points[i], release, metric);
    most = SH_MIN(most, of / 2);
    for (size_t i = 0; i < s->n_points; i++) {
        if (!counts(&s->points[i], release, metric))
            continue;
        if (at < most)
            first[at] = &s->points[i];
        if (at + most >= of)
            last[end++] = &s->points[i];
        at++;
    }
    return most;
}

/* All windows of one node are there. */
static void end_node(survey *s)
{
    const point *first[SH_SURVEY_WINDOWS], *last[SH_SURVEY_WINDOWS];
    node *n = node_of(s, &s->reading);
    size_t k = 0;
    if (s->n_points == 0)
        return;
    const point *newest = &s->points[s->n_points - 1];
    uint64_t samples = 0;
    for (size_t i = s->n_points; i-- > 0 && s->n_points - i <= SH_SURVEY_WINDOWS;)
        samples += s->points[i].metric[SH_METRIC_NLL].n;
    if (n)
        n->sufficient = samples >= SH_SURVEY_SAMPLES_MIN;
    for (int m = 0; m < SH_METRICS; m++) {
        bool by_release = sh_metric_is_model_dependent((sh_metric)m);
        k = split(s, by_release ? newest->release : 0, m, first, last);
        for (size_t i = 0; i < k; i++) {
            add_metrics(&s->reference[m], &first[i]->metric[m]);
            add_metrics(&s->current[m], &last[i]->metric[m]);
        }
    }
    k = split(s, 0, SH_METRIC_NLL, first, last);
    for (size_t i = 0; i < k; i++) {
        add_bucket(&s->before, first[i]);
        add_bucket(&s->now, last[i]);
    }
    s->n_points = 0;
}

static bool read_point(sh_bytes payload, point *p)
{
    sh_window w;
    if (sh_window_decode(payload.data, payload.n, &w, NULL) != SH_OK)
        return false;
    *p = (point){.release = w.release_version,
                 .start_ms = w.start_ms,
                 .end_ms = w.end_ms,
                 .inferences = w.inferences,
                 .accepted = w.feedback[SH_FEEDBACK_ACCEPT]};
    for (int k = SH_FEEDBACK_ACCEPT; k < SH_FEEDBACK_KINDS; k++)
        p->rated += w.feedback[k];
    memcpy(p->metric, w.metric, sizeof p->metric);
    return true;
}

static sh_status find_range(void *arg, const sh_update_id *id, sh_bytes payload)
{
    survey *s = arg;
    point p;
    (void)id;
    if (!read_point(payload, &p))
        return SH_OK;
    s->first_ms = s->windows == 0 ? p.start_ms : SH_MIN(s->first_ms, p.start_ms);
    s->last_ms = SH_MAX(s->last_ms, p.end_ms);
    s->windows++;
    return SH_OK;
}

static sh_status add_window(void *arg, const sh_update_id *id, sh_bytes payload)
{
    survey *s = arg;
    point p;
    if (!sh_hash_equal(&s->reading, &id->node)) {
        end_node(s);
        s->reading = id->node;
    }
    if (!read_point(payload, &p))
        return SH_OK;
    SH_TRY(sh_array_reserve((void **)&s->points, &s->points_cap, s->n_points + 1, sizeof *s->points,
                            WINDOWS_MAX));
    s->points[s->n_points++] = p;
    double span = (double)SH_MAX(s->last_ms - s->first_ms, 1);
    double at = (double)(p.end_ms - SH_MIN(s->first_ms, p.end_ms)) / span;
    add_bucket(&s->timeline[SH_MIN((size_t)(at * SH_SURVEY_POINTS), SH_SURVEY_POINTS - 1)], &p);
    return SH_OK;
}

/* ---- the document ---- */

static json_t *ratio(double a, uint64_t n)
{
    return sh_json_number(n ? a / (double)n : NAN);
}

static json_t *make_coverage(const survey *s)
{
    json_t *out = json_object(), *dropped = json_object();
    static const char *const classes[SH_CLASSES] = {"updates", "alarms", "windows", "records"};
    uint64_t revoked = 0, stale = 0, silent = 0, reporting = 0, insufficient = 0;
    for (size_t i = 0; i < s->n_nodes; i++) {
        const node *n = &s->nodes[i];
        bool reports = !n->revoked && !n->stale && !n->silent;
        revoked += n->revoked;
        stale += !n->revoked && n->stale;
        silent += !n->revoked && n->silent;
        reporting += reports;
        insufficient += reports && !n->sufficient;
    }
    sh_json_set(out, "enrolled", sh_json_uint(s->n_nodes - revoked));
    sh_json_set(out, "reporting", sh_json_uint(reporting));
    sh_json_set(out, "stale", sh_json_uint(stale));
    sh_json_set(out, "never_seen", sh_json_uint(silent));
    sh_json_set(out, "insufficient", sh_json_uint(insufficient));
    sh_json_set(out, "revoked", sh_json_uint(revoked));
    sh_json_set(out, "stale_after_ms", sh_json_uint(s->options->stale_ms));
    for (int c = 0; c < SH_CLASSES; c++)
        sh_json_set(dropped, classes[c], sh_json_uint(s->dropped[c]));
    sh_json_set(out, "dropped", dropped);
    return out;
}

static json_t *make_fleet(const survey *s)
{
    json_t *out = json_object();
    uint64_t drifting = 0, on_last = 0;
    for (size_t i = 0; i < s->n_nodes; i++) {
        drifting += !s->nodes[i].revoked && s->nodes[i].drifting;
        on_last += !s->nodes[i].revoked && s->nodes[i].active_version == s->last_version;
    }
    sh_json_set(out, "inferences", sh_json_uint(s->inferences));
    sh_json_set(out, "windows", sh_json_uint(s->windows));
    sh_json_set(out, "drifting_now", sh_json_uint(drifting));
    sh_json_set(out, "release", sh_json_uint(s->last_version));
    sh_json_set(out, "on_release", sh_json_uint(on_last));
    sh_json_set(out, "nll_reference", ratio(s->before.nll, s->before.nll_n));
    sh_json_set(out, "nll_now", ratio(s->now.nll, s->now.nll_n));
    sh_json_set(out, "acceptance_reference", ratio((double)s->before.accepted, s->before.rated));
    sh_json_set(out, "acceptance_now", ratio((double)s->now.accepted, s->now.rated));
    return out;
}

static json_t *make_drift(const survey *s)
{
    json_t *out = json_object(), *nodes = json_array(), *timeline = json_array();
    for (size_t i = 0; i < s->n_nodes; i++) {
        const node *n = &s->nodes[i];
        const sh_alarm *a = &n->strongest;
        bool alarm = a->log_evalue > 0;
        json_t *row = json_object();
        sh_json_set(row, "node", json_string(n->label));
        sh_json_set(row, "first_alarm_window",
                    n->first_alarm_window ? sh_json_uint(n->first_alarm_window) : json_null());
        sh_json_set(row, "metric",
                    alarm ? json_string(sh_metric_name((sh_metric)a->metric)) : json_null());
        sh_json_set(row, "unit",
                    alarm ? json_string(sh_metric_unit((sh_metric)a->metric)) : json_null());
        sh_json_set(row, "log_evalue", sh_json_number(alarm ? a->log_evalue : NAN));
        sh_json_set(row, "effect", sh_json_number(alarm ? a->effect : NAN));
        sh_json_set(row, "release", alarm ? sh_json_uint(a->release_version) : json_null());
        sh_json_set(row, "drifting_now", json_boolean(n->drifting));
        json_array_append_new(nodes, row);
    }
    for (size_t i = 0; i < SH_SURVEY_POINTS && s->windows; i++) {
        const struct bucket *b = &s->timeline[i];
        if (b->inferences == 0)
            continue;
        json_t *row = json_object();
        double at = ((double)i + 0.5) / SH_SURVEY_POINTS * (double)(s->last_ms - s->first_ms);
        sh_json_set(row, "at_ms", sh_json_uint(s->first_ms + (uint64_t)at));
        sh_json_set(row, "nll", ratio(b->nll, b->nll_n));
        sh_json_set(row, "acceptance", ratio((double)b->accepted, b->rated));
        sh_json_set(row, "alarms", sh_json_uint(b->alarms));
        json_array_append_new(timeline, row);
    }
    sh_json_set(out, "nodes", nodes);
    sh_json_set(out, "timeline", timeline);
    return out;
}

static json_t *make_heatmap(const survey *s)
{
    json_t *out = json_object(), *nodes = json_array(), *metrics = json_array();
    json_t *values = json_array();
    for (int m = 0; m < SH_METRICS; m++)
        json_array_append_new(metrics, json_string(sh_metric_name((sh_metric)m)));
    for (size_t i = 0; i < s->n_nodes; i++) {
        json_t *row = json_array();
        for (int m = 0; m < SH_METRICS; m++)
            json_array_append_new(row, sh_json_number(s->nodes[i].evidence[m]));
        json_array_append_new(nodes, json_string(s->nodes[i].label));
        json_array_append_new(values, row);
    }
    sh_json_set(out, "metrics", metrics);
    sh_json_set(out, "nodes", nodes);
    sh_json_set(out, "values", values);
    return out;
}

static json_t *bins(const sh_window_metric *m)
{
    json_t *out = json_array();
    for (int b = 0; b < SH_HISTOGRAM_BINS; b++)
        json_array_append_new(out, sh_json_uint(m->histogram[b]));
    return out;
}

static json_t *make_histograms(const survey *s)
{
    json_t *out = json_array();
    for (int m = 0; m < SH_METRICS; m++) {
        const sh_window_metric *r = &s->reference[m], *c = &s->current[m];
        json_t *row = json_object();
        sh_json_set(row, "metric", json_string(sh_metric_name((sh_metric)m)));
        sh_json_set(row, "unit", json_string(sh_metric_unit((sh_metric)m)));
        sh_json_set(row, "low", sh_json_number(sh_metric_low((sh_metric)m)));
        sh_json_set(row, "high", sh_json_number(sh_metric_high((sh_metric)m)));
        sh_json_set(row, "reference", bins(r));
        sh_json_set(row, "current", bins(c));
        sh_json_set(row, "reference_n", sh_json_uint(r->n));
        sh_json_set(row, "current_n", sh_json_uint(c->n));
        sh_json_set(row, "reference_mean", ratio((double)r->sum / SH_FIXED_POINT, r->n));
        sh_json_set(row, "current_mean", ratio((double)c->sum / SH_FIXED_POINT, c->n));
        json_array_append_new(out, row);
    }
    return out;
}

static json_t *make_updates(const survey *s)
{
    json_t *out = json_object(), *refused = json_object();
    for (int r = 1; r < SH_REASONS; r++)
        if (s->refused[r])
            sh_json_set(refused, sh_reason_name((sh_reason)r), sh_json_uint(s->refused[r]));
    sh_json_set(out, "received", sh_json_uint(s->updates));
    sh_json_set(out, "merged", sh_json_uint(s->merged));
    sh_json_set(out, "pending", sh_json_uint(s->pending));
    sh_json_set(out, "refused", refused);
    return out;
}

/* One kind of row at a time, each in a transaction of its own: a long reader would make the store
 * grow under a running aggregator. */
static sh_status in_txn(sh_store *store, survey *s, sh_status (*fn)(survey *s, sh_error *err),
                        sh_error *err)
{
    SH_TRY(sh_txn_begin(store, SH_TXN_READ, &s->txn, err));
    sh_status status = fn(s, err);
    sh_txn_abort(&s->txn);
    return status;
}

static sh_status read_nodes(survey *s, sh_error *err)
{
    s->now_ms = s->options->now_ms;
    SH_TRY(sh_coord_each_node(s->txn, add_node, s, err));
    for (size_t i = 0; i < s->n_nodes && s->options->now_ms == 0; i++)
        s->now_ms = SH_MAX(s->now_ms, s->nodes[i].last_ms);
    for (size_t i = 0; i < s->n_nodes; i++) {
        node *n = &s->nodes[i];
        n->stale = !n->silent && n->last_ms + s->options->stale_ms < s->now_ms;
    }
    return SH_OK;
}

static sh_status read_range(survey *s, sh_error *err)
{
    return sh_coord_each_item(s->txn, SH_COORD_T_WINDOW, find_range, s, err);
}

static sh_status read_windows(survey *s, sh_error *err)
{
    SH_TRY(sh_coord_each_item(s->txn, SH_COORD_T_WINDOW, add_window, s, err));
    end_node(s);
    return SH_OK;
}

static sh_status read_alarms(survey *s, sh_error *err)
{
    return sh_coord_each_item(s->txn, SH_COORD_T_ALARM, add_alarm, s, err);
}

static sh_status read_releases(survey *s, sh_error *err)
{
    SH_TRY(sh_coord_each_candidate(s->txn, add_candidate, s, err));
    return sh_coord_each_update(s->txn, add_update, s, err);
}

static sh_status read_audit(survey *s, sh_error *err)
{
    return sh_coord_each_audit(s->txn, add_decision, s, err);
}

sh_status sh_survey_make(sh_store *store, const sh_survey_options *options, json_t **out,
                         sh_error *err)
{
    static sh_status (*const parts[])(survey *, sh_error *) = {
        read_nodes, read_range, read_windows, read_alarms, read_releases, read_audit};
    sh_status status = SH_OK;
    survey *s = sh_calloc(1, sizeof *s);
    if (!s)
        return sh_fail(err, SH_ERR_NO_MEMORY, "survey: no memory");
    s->options = options;
    s->releases = json_array();
    s->decisions = json_array();
    for (size_t i = 0; i < SH_COUNT(parts); i++)
        SH_GOTO(in_txn(store, s, parts[i], err));
    json_t *root = json_object();
    sh_json_set(root, "version", json_integer(1));
    sh_json_set(root, "program", json_string("shoal-aggregator"));
    sh_json_set(root, "made_ms", sh_json_uint(s->now_ms));
    sh_json_set(root, "nodes", sh_json_uint(s->n_nodes));
    sh_json_set(root, "coverage", make_coverage(s));
    sh_json_set(root, "fleet", make_fleet(s));
    sh_json_set(root, "drift", make_drift(s));
    sh_json_set(root, "heatmap", make_heatmap(s));
    sh_json_set(root, "histograms", make_histograms(s));
    sh_json_set(root, "releases", json_incref(s->releases));
    sh_json_set(root, "updates", make_updates(s));
    sh_json_set(root, "decisions", json_incref(s->decisions));
    *out = root;
cleanup:
    json_decref(s->releases);
    json_decref(s->decisions);
    free(s->nodes);
    free(s->points);
    free(s);
    return status;
}
