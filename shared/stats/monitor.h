/*
 * What a node measures of its own inference: a fixed record an inference (record.h), a window of
 * many (window.h), and a sequential drift detector over them (edetector.h). No text and no tokens
 * leave in any of these.
 *
 * A monitor holds the open window, the references and the detectors of one node.
 *
 *  - Each metric first collects its reference: the first `reference` inferences that have it. The
 *    model-dependent metrics (NLL, REJECT) collect one for each release, or every rollout would
 *    look like drift; those of the last releases are kept for a rollback. Projection and buckets
 *    learn where they are centred from the first half and how they spread from the second.
 *  - After that every inference updates the metric's e-detector. The null hypothesis is "mean <=
 *    reference mean + margin", with margin the larger of half the least effect and two standard
 *    errors of the reference mean (long-run: passages are allowed for). LENGTH and BUCKETS are
 *    watched in both directions.
 *  - When a window closes, a metric is in alarm when its e-detector is at or over log(average run
 *    length x number of detectors), AND the window's mean is at least effect_min from the
 *    reference, AND it has samples_min samples. With fewer, or while the reference is not full,
 *    it is `insufficient`, which is not "fine".
 *
 * Threads: one at a time. Ownership: create/destroy; records and results are copied.
 * Determinism: the same options and records give the same results, also across encode and decode.
 *
 *     sh_monitor *m = NULL;
 *     SH_TRY(sh_monitor_create(&options, &m, err));
 *     if (sh_monitor_add(m, &record, &closed) && closed.alarms)
 *         ... sh_window_encode(&closed.window, false, &payload) ...
 *     sh_monitor_destroy(&m);
 */
#ifndef SH_STATS_MONITOR_H
#define SH_STATS_MONITOR_H

#include "shared/base/buf.h"
#include "shared/base/hash.h"
#include "shared/stats/edetector.h"
#include "shared/stats/record.h"
#include "shared/stats/window.h"

#define SH_MONITOR_BYTES_MAX 16384 /* of an encoded monitor */

typedef struct sh_monitor sh_monitor;

typedef struct {
    uint32_t window;               /* inferences a window, 16 to 65,536; 0: 256 */
    uint64_t window_ms_max;        /* a window closes after this long too; 0: never */
    uint32_t reference;            /* inferences of the reference, 64 to 2,000; 0: 2,000 */
    double average_run_length;     /* inferences between false alarms, of all metrics together;
                                      0: 100,000 */
    double effect_min[SH_METRICS]; /* an alarm needs at least this shift, in the metric's unit;
                                      0: the default */
    uint32_t samples_min; /* fewer in a window is "insufficient"; 0: 100, or the window if that is
                             smaller */
    uint64_t origin;      /* the store's epoch: (origin, index) identifies a window */
} sh_monitor_options;

typedef struct {
    uint32_t samples; /* in the window */
    bool insufficient, alarm;
    double mean, reference; /* of the window, of the reference (0 while it is not full) */
    double effect;          /* mean - reference in the metric's unit; 0 when insufficient */
    double log_evalue;      /* the e-detector's running value, natural log; 0 without a reference.
                               Comparable with sh_monitor_threshold; not an e-value itself */
} sh_metric_result;

typedef struct {
    sh_window window;
    sh_metric_result metric[SH_METRICS];
    uint32_t alarms; /* how many metrics are in alarm */
    sh_metric worst; /* the metric in alarm with the largest log_evalue; 0 without alarms */
} sh_window_result;

/* SH_ERR_USAGE: an option out of range. The first window has index 1. */
SH_MUST_USE sh_status sh_monitor_create(const sh_monitor_options *options, sh_monitor **out,
                                        sh_error *err);
void sh_monitor_destroy(sh_monitor **monitor);

/* Counts one inference; true when a window closed, which is then in *closed (else untouched). A
 * window closes before the first record after sh_monitor_set_release, before one that is past
 * window_ms_max, and after the record that fills it. The first record sets the release if nothing
 * else did; a later one of another release (in flight at a switch) is kept from the model-dependent
 * metrics. */
bool sh_monitor_add(sh_monitor *monitor, const sh_record *record, sh_window_result *closed);
/* Feedback that came after its inference was added with SH_FEEDBACK_NONE. One for another than the
 * current release only counts in the window's feedback. */
void sh_monitor_feedback(sh_monitor *monitor, uint32_t release_version, sh_feedback_kind kind,
                         uint16_t edit_distance);
/* Model-dependent metrics start the reference of this release, or take up the one that is known.
 * The open window, if it has inferences, closes with the next record or tick. */
void sh_monitor_set_release(sh_monitor *monitor, uint32_t release_version);
/* Closes the open window if it is past window_ms_max or of an earlier release: for nodes that
 * rest. A window without inferences never closes. */
bool sh_monitor_tick(sh_monitor *monitor, uint64_t now_ms, sh_window_result *closed);
/* What was lost here since the last window; goes into the open one. */
void sh_monitor_note_drop(sh_monitor *monitor, sh_drop what, uint64_t n);

/* log(average run length x number of detectors): what log_evalue must reach. */
double sh_monitor_threshold(const sh_monitor *monitor);
double sh_monitor_log_evalue(const sh_monitor *monitor, sh_metric metric); /* now */
uint64_t sh_monitor_next_window(const sh_monitor *monitor); /* index of the open window */

/* The whole state, for the transaction of the node's step: at most SH_MONITOR_BYTES_MAX bytes,
 * appended. A monitor decoded with the same options continues with equal results. */
SH_MUST_USE sh_status sh_monitor_encode(const sh_monitor *monitor, sh_buf *out);
SH_MUST_USE sh_status sh_monitor_decode(const sh_monitor_options *options, const void *bytes,
                                        size_t n, sh_monitor **out, sh_error *err);

#endif
