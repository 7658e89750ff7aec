/*
 * A closed batch of a node's monitoring statistics, and how windows add up.
 *
 * Invariants: everything in a window is an integer count, a fixed-point sum or a maximum, so
 * merging is commutative and associative to the last bit. Encoded, a window is at most
 * SH_WINDOW_BYTES_MAX. Encoding for the network suppresses small token counts; what the node keeps
 * for itself may hold them.
 * Identity: (origin, index) names a window for ever; origin is the random epoch of the node's
 * store. Merging refuses a window with itself, other releases and other schemas.
 * Threads: plain data. Ownership: by value (about 6 KB).
 */
#ifndef SH_STATS_WINDOW_H
#define SH_STATS_WINDOW_H

#include "shared/base/buf.h"
#include "shared/stats/record.h"
#include "shared/stats/sketch.h"

typedef enum {
    SH_METRIC_NLL,        /* prompt likelihood, nats a token, clipped to [0, 16] */
    SH_METRIC_REJECT,     /* 1: the user did not accept; only inferences with feedback */
    SH_METRIC_LENGTH,     /* log2(1 + prompt tokens) */
    SH_METRIC_BYTES,      /* share of byte tokens in the prompt */
    SH_METRIC_PROJECTION, /* distance to the reference's mean embedding, its standard deviations */
    SH_METRIC_BUCKETS,    /* surprise of the token buckets under the reference, the same unit */
    SH_METRICS
} sh_metric;
const char *sh_metric_name(sh_metric metric);        /* "nll", "reject", …; "?" out of range */
const char *sh_metric_unit(sh_metric metric);        /* of mean and effect: "nats", "share", … */
bool sh_metric_is_model_dependent(sh_metric metric); /* NLL, REJECT */

#define SH_WINDOW_BYTES_MAX  8192
#define SH_WINDOW_VERSION    1
#define SH_HISTOGRAM_BINS    16
#define SH_WINDOW_STOPS      8
#define SH_TOKEN_COUNT_LEAST 5 /* smaller hashed token counts leave no node */
#define SH_COVARIANCES       (SH_PROJECTIONS * (SH_PROJECTIONS + 1) / 2)
#define SH_FIXED_POINT       1048576.0 /* sums are in units of 2^-20 */

typedef enum { SH_DROP_RECORD, SH_DROP_FEEDBACK, SH_DROP_WINDOW, SH_DROP_UPDATE, SH_DROPS } sh_drop;

typedef struct {
    uint32_t n;
    int64_t sum, square_sum; /* fixed point */
    uint32_t
        histogram[SH_HISTOGRAM_BINS]; /* equal bins over the metric's range, see sh_metric_low */
} sh_window_metric;

typedef struct {
    uint64_t origin; /* of the first window by (origin, index) */
    uint64_t index;
    uint32_t windows; /* 1, or how many were merged */
    uint32_t release_version;
    uint64_t first_seq, last_seq, start_ms, end_ms;
    uint32_t inferences;
    uint64_t prompt_tokens, output_tokens;
    uint32_t feedback[SH_FEEDBACK_KINDS], stop[SH_WINDOW_STOPS];
    uint64_t edit_distance;
    int64_t logprob_sum, entropy_sum, repeated_sum; /* fixed point */
    float least_logprob;                            /* minimum */
    sh_window_metric metric[SH_METRICS];
    sh_quantiles ttft_us, token_us;
    sh_distinct prompts; /* distinct prompts, by a fingerprint of the record */
    uint64_t bucket[SH_TOKEN_BUCKETS];
    int64_t projection_sum[SH_PROJECTIONS], covariance_sum[SH_COVARIANCES]; /* sums of p, p p' */
    uint64_t drops[SH_DROPS];
} sh_window;

/* A metric's range: values are clipped to it, and x = (value - low) / (high - low) is what the
 * histogram and the detectors see. */
double sh_metric_low(sh_metric metric);
double sh_metric_high(sh_metric metric);

/* An empty window. Then one sh_window_add an inference, which takes all of the record but its
 * feedback, and one sh_window_add_metric for each metric that the inference has. */
void sh_window_init(sh_window *window, uint64_t origin, uint64_t index, uint32_t release_version);
void sh_window_add(sh_window *window, const sh_record *record);
void sh_window_add_metric(sh_window *window, sh_metric metric, double value); /* NaN: ignored */

/* Mean and standard deviation of a metric; 0 when it has no sample. */
double sh_window_mean(const sh_window *window, sh_metric metric);
double sh_window_spread(const sh_window *window, sh_metric metric);
bool sh_window_same(const sh_window *a, const sh_window *b); /* the same identity */

/* into += from. SH_ERR_EXISTS: the same window; SH_ERR_MISMATCH: other release;
 * SH_ERR_LIMIT: a count would overflow. into is unchanged on error. */
SH_MUST_USE sh_status sh_window_merge(sh_window *into, const sh_window *from, sh_error *err);

/* Appends the bytes (described at the head of window.c). Token counts under SH_TOKEN_COUNT_LEAST
 * become 0 unless `whole`, which is for the node's own store only. */
SH_MUST_USE sh_status sh_window_encode(const sh_window *window, bool whole, sh_buf *out);
/* SH_ERR_INVALID, SH_ERR_UNSUPPORTED (version or schema), SH_ERR_CORRUPT (checksum). */
SH_MUST_USE sh_status sh_window_decode(const void *bytes, size_t n, sh_window *out, sh_error *err);

#endif
