/*
 * What monitor.c (measuring) and monitor_state.c (keeping it over a crash) share.
 */
#ifndef SH_STATS_MONITOR_INTERNAL_H
#define SH_STATS_MONITOR_INTERNAL_H

#include "shared/stats/monitor.h"

#define SH_KNOWN_RELEASES 4

/* What a full reference gives, in the metric's unit (PROJECTION, BUCKETS: of the raw score). */
typedef struct {
    bool ready;
    double mean, spread;
    double mean_error, excess_variance; /* see sh_reference_stats */
} sh_baseline;

typedef struct {
    sh_reference collecting; /* until the baseline is ready; then empty */
    sh_baseline baseline;
    sh_edetector up, down; /* down: of 1 - x, only where the metric is watched both ways */
} sh_watch;

/* Where the prompts of the reference's first half lie: sums, so that it is exact. */
typedef struct {
    uint32_t projections, prompts; /* records with a projection, with tokens */
    int64_t projection_sum[SH_PROJECTIONS], projection_squares[SH_PROJECTIONS];
    uint64_t bucket[SH_TOKEN_BUCKETS], bucket_total;
} sh_profile;

#define SH_MODEL_METRICS 2 /* SH_METRIC_NLL, SH_METRIC_REJECT: the first two */

typedef struct {
    bool used;
    uint32_t version;
    sh_baseline baseline[SH_MODEL_METRICS];
} sh_known_release;

struct sh_monitor {
    sh_monitor_options options; /* without zeros */
    bool has_release;
    uint32_t release;
    sh_window window;
    sh_watch watch[SH_METRICS];
    sh_profile profile;
    sh_known_release known[SH_KNOWN_RELEASES];
    uint32_t known_next; /* the one to replace */
};

#endif
