/*
 * Metrics in Prometheus' text format 0.0.4, with OpenMetrics' naming: base units in the name
 * (_seconds, _bytes, _ratio), counters end in _total. A family is written once, its samples after
 * it. Label values are escaped.
 */
#ifndef SH_HTTP_METRICS_H
#define SH_HTTP_METRICS_H

#include "shared/base/buf.h"

#define SH_METRICS_BYTES_MAX (1u << 20)
#define SH_METRICS_TYPE      "text/plain; version=0.0.4; charset=utf-8"

typedef struct {
    const char *name, *value;
} sh_metric_label;

/* Whatever does not fit the buffer is left out. type: "counter", "gauge", "histogram". */
void sh_metric_family(sh_buf *out, const char *name, const char *type, const char *help);
void sh_metric_sample(sh_buf *out, const char *name, const sh_metric_label *labels, size_t n_labels,
                      double value);
/* The usual family with one sample without labels. */
void sh_metric_one(sh_buf *out, const char *name, const char *type, const char *help, double value);

#define SH_HISTOGRAM_BUCKETS 16
typedef struct {                         /* of seconds, tokens, ...; the caller's to lock */
    double bounds[SH_HISTOGRAM_BUCKETS]; /* ascending; n_bounds of them, +Inf is implied */
    uint64_t counts[SH_HISTOGRAM_BUCKETS + 1];
    size_t n_bounds;
    double sum;
} sh_histogram;
void sh_histogram_add(sh_histogram *histogram, double x);
void sh_metric_histogram(sh_buf *out, const char *name, const char *help,
                         const sh_histogram *histogram);

#endif
