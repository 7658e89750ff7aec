#include "shared/stats/monitor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/stats/monitor_internal.h"

#define WINDOW_DEFAULT     256
#define WINDOW_MIN         16
#define WINDOW_MAX         65536
#define REFERENCE_MIN      64
#define RUN_LENGTH_DEFAULT 100000.0
#define RUN_LENGTH_MAX     1e15
#define SAMPLES_DEFAULT    100
/* The null hypothesis allows the mean this many standard errors of the reference mean. */
#define MARGIN_ERRORS 2.0
/* An alarm's effect is at least this many standard errors of the difference between the window's
 * and the reference's mean, so that a window which happens to hold few, odd passages is no alarm.
 */
#define EFFECT_ERRORS 2.0

typedef struct {
    double effect_min; /* default, in the metric's unit */
    bool both_ways;
    double spread_min; /* scored metrics: a smaller spread of the reference counts as this */
} watch_info;

static const watch_info watches[SH_METRICS] = {
    [SH_METRIC_NLL] = {0.3, false, 0},           [SH_METRIC_REJECT] = {0.08, false, 0},
    [SH_METRIC_LENGTH] = {0.5, true, 0},         [SH_METRIC_BYTES] = {0.02, false, 0},
    [SH_METRIC_PROJECTION] = {0.5, false, 0.05}, [SH_METRIC_BUCKETS] = {0.5, true, 0.05},
};

/* Measured relative to the reference, in its standard deviations. */
static bool is_scored(sh_metric metric)
{
    return watches[metric].spread_min > 0;
}

static unsigned detectors(void)
{
    unsigned n = 0;
    for (size_t i = 0; i < SH_METRICS; i++)
        n += watches[i].both_ways ? 2 : 1;
    return n;
}

static sh_status complete_options(const sh_monitor_options *options, sh_monitor_options *out,
                                  sh_error *err)
{
    sh_monitor_options o = *options;
    o.window = o.window ? o.window : WINDOW_DEFAULT;
    o.reference = o.reference ? o.reference : SH_REFERENCE_MAX;
    o.samples_min = o.samples_min ? o.samples_min : SH_MIN(SAMPLES_DEFAULT, o.window);
    if (o.average_run_length == 0)
        o.average_run_length = RUN_LENGTH_DEFAULT;
    if (o.window < WINDOW_MIN || o.window > WINDOW_MAX)
        return sh_fail(err, SH_ERR_USAGE, "monitor: window %u is outside %d to %d", o.window,
                       WINDOW_MIN, WINDOW_MAX);
    if (o.reference < REFERENCE_MIN || o.reference > SH_REFERENCE_MAX)
        return sh_fail(err, SH_ERR_USAGE, "monitor: reference %u is outside %d to %d", o.reference,
                       REFERENCE_MIN, SH_REFERENCE_MAX);
    if (!(o.average_run_length >= 1 && o.average_run_length <= RUN_LENGTH_MAX))
        return sh_fail(err, SH_ERR_USAGE, "monitor: average run length %g is outside 1 to %g",
                       o.average_run_length, RUN_LENGTH_MAX);
    for (size_t i = 0; i < SH_METRICS; i++) {
        double range = sh_metric_high((sh_metric)i) - sh_metric_low((sh_metric)i);
        if (o.effect_min[i] == 0)
            o.effect_min[i] = watches[i].effect_min;
        if (!(o.effect_min[i] > 0 && o.effect_min[i] < range))
            return sh_fail(err, SH_ERR_USAGE, "monitor: least effect %g of %s is outside 0 to %g",
                           o.effect_min[i], sh_metric_name((sh_metric)i), range);
    }
    *out = o;
    return SH_OK;
}

sh_status sh_monitor_create(const sh_monitor_options *options, sh_monitor **out, sh_error *err)
{
    sh_monitor_options complete;
    SH_TRY(complete_options(options, &complete, err));
    sh_monitor *m = sh_calloc(1, sizeof(*m));
    if (m == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "monitor: out of memory");
    m->options = complete;
    sh_window_init(&m->window, complete.origin, 1, 0);
    *out = m;
    return SH_OK;
}

void sh_monitor_destroy(sh_monitor **monitor)
{
    free(*monitor);
    *monitor = NULL;
}

double sh_monitor_threshold(const sh_monitor *monitor)
{
    return log(monitor->options.average_run_length * detectors());
}

double sh_monitor_log_evalue(const sh_monitor *monitor, sh_metric metric)
{
    const sh_watch *watch = &monitor->watch[metric];
    if (!watch->baseline.ready)
        return 0;
    double up = sh_edetector_log_value(&watch->up), down = sh_edetector_log_value(&watch->down);
    return watches[metric].both_ways ? fmax(up, down) : up;
}

uint64_t sh_monitor_next_window(const sh_monitor *monitor)
{
    return monitor->window.index;
}

/* From the metric's unit to the detectors' [0, 1]. */
static double scaled(sh_metric metric, double value)
{
    double low = sh_metric_low(metric), high = sh_metric_high(metric);
    return fmin(fmax((value - low) / (high - low), 0), 1);
}

/* Sets both detectors to M = 0 under the metric's baseline. */
static void arm(sh_monitor *m, sh_metric metric)
{
    sh_watch *watch = &m->watch[metric];
    const sh_baseline *b = &watch->baseline;
    double range = sh_metric_high(metric) - sh_metric_low(metric);
    /* A scored metric's unit is the spread of the reference, which has mean 0 in it. */
    double unit = is_scored(metric) ? b->spread : 1;
    double mean = scaled(metric, is_scored(metric) ? 0 : b->mean);
    double margin = fmax(m->options.effect_min[metric] / 2, MARGIN_ERRORS * b->mean_error / unit);
    double excess = b->excess_variance / (unit * unit) / (range * range);
    sh_edetector_init(&watch->up, mean + margin / range, excess);
    sh_edetector_init(&watch->down, 1 - mean + margin / range, excess);
}

static void collect(sh_monitor *m, sh_metric metric, double value)
{
    sh_watch *watch = &m->watch[metric];
    sh_reference_add(&watch->collecting, value);
    if (watch->collecting.n < m->options.reference)
        return;
    sh_reference_stats stats = sh_reference_get(&watch->collecting, false);
    watch->baseline =
        (sh_baseline){true, stats.mean, fmax(sqrt(stats.variance), watches[metric].spread_min),
                      stats.mean_error, stats.excess_variance};
    memset(&watch->collecting, 0, sizeof(watch->collecting));
    arm(m, metric);
}

/* One measurement, in the metric's unit or (scored metrics) as raw score; NaN: there is none. */
static void measure(sh_monitor *m, sh_metric metric, double value)
{
    if (!isfinite(value))
        return;
    sh_watch *watch = &m->watch[metric];
    const sh_baseline *b = &watch->baseline;
    if (is_scored(metric)) {
        if (!b->ready) {
            collect(m, metric, value);
            return;
        }
        value = (value - b->mean) / b->spread;
    }
    sh_window_add_metric(&m->window, metric, value);
    if (!b->ready) {
        collect(m, metric, value);
        return;
    }
    double x = scaled(metric, value);
    sh_edetector_update(&watch->up, x);
    if (watches[metric].both_ways)
        sh_edetector_update(&watch->down, 1 - x);
}

/* Distance of the record's projection to the profile's mean, in the profile's spreads, root mean
 * square over the directions. NaN: no projection, or the profile still takes it in. */
static double projection_score(sh_monitor *m, const sh_record *record)
{
    static const int8_t none[SH_PROJECTIONS];
    sh_profile *p = &m->profile;
    if (memcmp(record->projection, none, sizeof(none)) == 0)
        return NAN;
    if (p->projections < m->options.reference) {
        p->projections++;
        for (size_t i = 0; i < SH_PROJECTIONS; i++) {
            int64_t x = record->projection[i];
            p->projection_sum[i] += x;
            p->projection_squares[i] += x * x;
        }
        return NAN;
    }
    double n = p->projections, squares = 0;
    for (size_t i = 0; i < SH_PROJECTIONS; i++) {
        double mean = (double)p->projection_sum[i] / n;
        double variance = (double)p->projection_squares[i] / n - mean * mean;
        double over = record->projection[i] - mean;
        squares += over * over / fmax(variance, 1); /* 1: the step of the integers */
    }
    return sqrt(squares / SH_PROJECTIONS);
}

/* Mean surprise, in nats, of the record's token buckets under the profile's shares (add-one
 * smoothing). Its expectation does not depend on the prompt's length. NaN as above. */
static double bucket_score(sh_monitor *m, const sh_record *record)
{
    sh_profile *p = &m->profile;
    unsigned total = 0;
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
        total += sh_record_bucket(record, b);
    if (total == 0)
        return NAN;
    if (p->prompts < m->options.reference) {
        p->prompts++;
        p->bucket_total += total;
        for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
            p->bucket[b] += sh_record_bucket(record, b);
        return NAN;
    }
    double sum = 0, log_total = log((double)p->bucket_total + SH_TOKEN_BUCKETS);
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++) {
        unsigned count = sh_record_bucket(record, b);
        if (count > 0)
            sum += count * (log_total - log((double)p->bucket[b] + 1));
    }
    return sum / total;
}

static void measure_feedback(sh_monitor *m, uint32_t release, unsigned kind)
{
    if (kind != SH_FEEDBACK_NONE && release == m->release)
        measure(m, SH_METRIC_REJECT, kind == SH_FEEDBACK_ACCEPT ? 0 : 1);
}

/* Standard error of (mean of a window of n - mean of the reference), in the metric's unit. */
static double difference_error(const sh_monitor *m, sh_metric metric, uint32_t n)
{
    const sh_baseline *b = &m->watch[metric].baseline;
    double long_run = b->spread * b->spread + b->excess_variance;
    double error = sqrt(long_run / n + b->mean_error * b->mean_error);
    return is_scored(metric) ? error / b->spread : error;
}

static void judge(const sh_monitor *m, sh_metric metric, sh_metric_result *result)
{
    const sh_watch *watch = &m->watch[metric];
    result->samples = m->window.metric[metric].n;
    result->mean = sh_window_mean(&m->window, metric);
    result->insufficient = !watch->baseline.ready || result->samples < m->options.samples_min;
    if (!watch->baseline.ready)
        return;
    result->reference = is_scored(metric) ? 0 : watch->baseline.mean;
    double threshold = sh_monitor_threshold(m);
    double up = sh_edetector_log_value(&watch->up), down = sh_edetector_log_value(&watch->down);
    bool both = watches[metric].both_ways;
    result->log_evalue = sh_monitor_log_evalue(m, metric);
    if (result->insufficient)
        return;
    double needed = fmax(m->options.effect_min[metric],
                         EFFECT_ERRORS * difference_error(m, metric, result->samples));
    result->effect = result->mean - result->reference;
    result->alarm = (up >= threshold && result->effect >= needed) ||
                    (both && down >= threshold && -result->effect >= needed);
}

static void close_window(sh_monitor *m, sh_window_result *closed)
{
    sh_window_result result = {.window = m->window};
    for (size_t i = 0; i < SH_METRICS; i++) {
        judge(m, (sh_metric)i, &result.metric[i]);
        if (!result.metric[i].alarm)
            continue;
        if (result.alarms == 0 ||
            result.metric[i].log_evalue > result.metric[result.worst].log_evalue)
            result.worst = (sh_metric)i;
        result.alarms++;
    }
    *closed = result;
    sh_window_init(&m->window, m->options.origin, m->window.index + 1, m->release);
}

static bool is_due(const sh_monitor *m, uint64_t now_ms)
{
    const sh_window *w = &m->window;
    uint64_t limit = m->options.window_ms_max;
    return w->inferences > 0 &&
           (w->release_version != m->release ||
            (limit > 0 && now_ms > w->start_ms && now_ms - w->start_ms >= limit));
}

bool sh_monitor_tick(sh_monitor *monitor, uint64_t now_ms, sh_window_result *closed)
{
    if (!is_due(monitor, now_ms))
        return false;
    close_window(monitor, closed);
    return true;
}

bool sh_monitor_add(sh_monitor *monitor, const sh_record *record, sh_window_result *closed)
{
    if (!monitor->has_release)
        sh_monitor_set_release(monitor, record->release_version);
    bool did_close = sh_monitor_tick(monitor, record->at_ms, closed);
    sh_window_add(&monitor->window, record);
    unsigned feedback = SH_MIN((unsigned)record->feedback, SH_FEEDBACK_KINDS - 1U);
    monitor->window.feedback[feedback]++;
    monitor->window.edit_distance += record->edit_distance;
    if (record->release_version == monitor->release && record->prompt_nll > 0)
        measure(monitor, SH_METRIC_NLL, record->prompt_nll);
    measure_feedback(monitor, record->release_version, feedback);
    if (record->prompt_tokens > 0) {
        measure(monitor, SH_METRIC_LENGTH, log2(1.0 + record->prompt_tokens));
        measure(monitor, SH_METRIC_BYTES, record->byte_fallback);
    }
    measure(monitor, SH_METRIC_PROJECTION, projection_score(monitor, record));
    measure(monitor, SH_METRIC_BUCKETS, bucket_score(monitor, record));
    /* A window has at least WINDOW_MIN inferences, so this cannot close a second one. */
    if (monitor->window.inferences >= monitor->options.window) {
        close_window(monitor, closed);
        did_close = true;
    }
    return did_close;
}

void sh_monitor_feedback(sh_monitor *monitor, uint32_t release_version, sh_feedback_kind kind,
                         uint16_t edit_distance)
{
    SH_ASSERT((unsigned)kind < SH_FEEDBACK_KINDS);
    sh_window *w = &monitor->window;
    w->feedback[kind]++;
    if (kind != SH_FEEDBACK_NONE && w->feedback[SH_FEEDBACK_NONE] > 0)
        w->feedback[SH_FEEDBACK_NONE]--; /* its inference was counted as without */
    w->edit_distance += edit_distance;
    measure_feedback(monitor, release_version, kind);
}

void sh_monitor_note_drop(sh_monitor *monitor, sh_drop what, uint64_t n)
{
    SH_ASSERT((unsigned)what < SH_DROPS);
    uint64_t *drops = &monitor->window.drops[what];
    *drops = *drops > UINT64_MAX - n ? UINT64_MAX : *drops + n;
}

/* Keeps what the current release's references have become, if any is full. */
static void remember_release(sh_monitor *m)
{
    sh_known_release *slot = NULL;
    bool any = false;
    for (size_t i = 0; i < SH_MODEL_METRICS; i++)
        any = any || m->watch[i].baseline.ready;
    if (!m->has_release || !any)
        return;
    for (size_t i = 0; i < SH_KNOWN_RELEASES; i++)
        if (m->known[i].used && m->known[i].version == m->release)
            slot = &m->known[i];
    if (slot == NULL) {
        slot = &m->known[m->known_next];
        m->known_next = (m->known_next + 1) % SH_KNOWN_RELEASES;
    }
    slot->used = true;
    slot->version = m->release;
    for (size_t i = 0; i < SH_MODEL_METRICS; i++)
        slot->baseline[i] = m->watch[i].baseline;
}

void sh_monitor_set_release(sh_monitor *monitor, uint32_t release_version)
{
    if (monitor->has_release && monitor->release == release_version)
        return;
    remember_release(monitor);
    monitor->has_release = true;
    monitor->release = release_version;
    if (monitor->window.inferences == 0)
        monitor->window.release_version = release_version;
    for (size_t i = 0; i < SH_MODEL_METRICS; i++)
        memset(&monitor->watch[i], 0, sizeof(monitor->watch[i]));
    for (size_t k = 0; k < SH_KNOWN_RELEASES; k++) {
        const sh_known_release *known = &monitor->known[k];
        if (!known->used || known->version != release_version)
            continue;
        for (size_t i = 0; i < SH_MODEL_METRICS; i++) {
            monitor->watch[i].baseline = known->baseline[i];
            if (known->baseline[i].ready)
                arm(monitor, (sh_metric)i);
        }
    }
}
