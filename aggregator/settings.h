/*
 * The settings of shoal-aggregator: one table makes the flags, --help, the sample configuration and
 * what `init` writes. Strings belong to the sh_args that they were parsed with.
 */
#ifndef SH_AGGREGATOR_SETTINGS_H
#define SH_AGGREGATOR_SETTINGS_H

#include "aggregator/coordinator.h"
#include "shared/base/option.h"

typedef struct {
    const char *dir, *config; /* of the command line only; not in the file */
    const char *listen, *http_address, *log_level;
    int64_t http_port, connections_max, store_bytes_max, stop_wait_ms, threads;
    bool enrol_any;
    int64_t drifting_min, rounds_max, round_ms_max, checkin_ms, chunk_budget;
    int64_t buffer, rank, batch, context, warmup, steps_max, tokens_min;
    double alpha, lr, lr_final, clip, passes;
    int64_t staleness_max;
    double staleness_discount, server_scale, norm_factor_max, cosine_min;
    double gate_overall_max, gate_slice_max;
    int64_t gate_tokens, objects_kept;
    int64_t canary_nodes_min, canary_tokens_min, canary_ms_max;
    double canary_share;
    const char *upstream;
    int64_t upstream_retry_min_ms, upstream_retry_max_ms, relay_wait_ms;
    int64_t checkins_per_s, items_per_s, served_bytes_per_s, asked_bytes_max, io_threads;
    double load_share;
    double limit_messages, limit_bytes, limit_burst_s;
} sh_aggregator_settings;

/* The table begins with this many options that a configuration file has no use for. */
#define SH_AGGREGATOR_SETTINGS_FLAGS 2
extern const sh_command sh_aggregator_command;

/* Reads DIR/aggregator.yaml, or the file that --config names, then the flags. SH_ERR_USAGE: --dir
 * is missing, the file is bad, a word that is no option. With args->help nothing is checked. */
SH_MUST_USE sh_status sh_aggregator_settings_read(int argc, char **argv,
                                                  sh_aggregator_settings *out, sh_args *args,
                                                  sh_error *err);
/* The file with these values in it. */
SH_MUST_USE sh_status sh_aggregator_settings_write(const sh_aggregator_settings *settings,
                                                   sh_buf *out, sh_error *err);
/* All but the release keys. */
sh_coord_options sh_aggregator_settings_coord(const sh_aggregator_settings *settings);

#endif
