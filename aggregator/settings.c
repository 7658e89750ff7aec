#include "aggregator/settings.h"

#include <math.h>
#include <string.h>

#include "shared/base/file.h"

#define T            sh_aggregator_settings
#define DEFAULT_FILE "aggregator.yaml"

/* Where the simulator has the same setting (experiments/sim/options.c), it has the same name. */
static const sh_option table[] = {
    SH_OPT_STRING(T, dir, 'd', "dir", "DIR", NULL, "the aggregator's folder, made by init"),
    SH_OPT_STRING(T, config, 0, "config", "FILE", NULL,
                  "settings; DIR/aggregator.yaml when not given"),
    SH_OPT_STRING(T, listen, 0, "listen", "ENDPOINT", "tcp://0.0.0.0:7420",
                  "where nodes connect; port * takes any free one"),
    SH_OPT_INT(T, connections_max, 0, "connections-max", "N", 0, 0, 1e6,
               "connections of nodes at a time; 0: half of the process's descriptor limit"),
    SH_OPT_FLAG(T, enrol_any, 0, "enrol-any",
                "let any key in that is not revoked; for tests on a closed network"),
    SH_OPT_STRING(T, http_address, 0, "http.address", "ADDRESS", "127.0.0.1",
                  "of the status page and /metrics; a loopback address"),
    SH_OPT_INT(T, http_port, 0, "http.port", "PORT", 7421, 0, 65535, "0 takes any free one"),
    SH_OPT_STRING(T, log_level, 0, "log.level", "LEVEL", "info", "error, warn, info or debug"),
    SH_OPT_INT(T, store_bytes_max, 0, "store.bytes-max", "BYTES", 4294967296.0, 16777216, 1e15,
               "size of the store at most; an eighth of it is kept for decisions"),
    SH_OPT_INT(T, stop_wait_ms, 0, "stop.wait-ms", "MS", 10000, 0, 3600000,
               "how long a stop waits for the job that runs; what is cut off is done again"),
    SH_OPT_INT(T, threads, 0, "jobs.threads", "N", 2, 1, 256,
               "of merges and gates; no result depends on it"),
    SH_OPT_INT(T, objects_kept, 0, "objects.kept", "N", 8, 2, 100000,
               "releases whose model and master files are kept, to roll back to"),
    /* learning */
    SH_OPT_INT(T, drifting_min, 0, "learn.drifting-min", "N", 2, 0, 100000,
               "nodes that must report drift before the first round; 0: it begins at once"),
    SH_OPT_INT(T, rounds_max, 0, "learn.rounds-max", "N", 0, 0, 1e6, "0: no end"),
    SH_OPT_INT(T, round_ms_max, 0, "learn.round-ms-max", "MS", 14400000, 0, 1e12,
               "a round without a merge begins anew after it, so that nodes train again; 0: never"),
    SH_OPT_INT(T, buffer, 0, "learn.buffer", "N", 8, 1, SH_COORD_BUFFER_MAX,
               "updates that make a merge, at most half of the nodes"),
    SH_OPT_INT(T, rank, 0, "learn.rank", "R", 8, 1, 256, "LoRA rank"),
    SH_OPT_REAL(T, alpha, 0, "learn.alpha", "X", 16, 0.001, 1e4, "LoRA alpha"),
    SH_OPT_REAL(T, lr, 0, "learn.lr", "X", 0.01, 1e-7, 10, "AdamW's learning rate"),
    SH_OPT_REAL(T, lr_final, 0, "learn.lr-final", "X", 0.3, 0, 1,
                "share of it that is left at the end of a node's training (linear decay)"),
    SH_OPT_REAL(T, clip, 0, "learn.clip", "X", 1, 0, 1e6, "gradient norm is clipped to it; 0: not"),
    SH_OPT_INT(T, batch, 0, "learn.batch", "N", 2, 1, 1024, "sequences a step"),
    SH_OPT_INT(T, context, 0, "learn.context", "N", 128, 8, 8192, "tokens a sequence"),
    SH_OPT_INT(T, warmup, 0, "learn.warmup", "N", 4, 0, 1e6, "steps of linear warm-up"),
    SH_OPT_REAL(T, passes, 0, "learn.passes", "X", 1, 0.01, 1000, "passes over a node's examples"),
    SH_OPT_INT(T, steps_max, 0, "learn.steps-max", "N", 400, 1, 1e6, "optimizer steps, at most"),
    SH_OPT_INT(T, tokens_min, 0, "learn.tokens-min", "N", 2048, 1, 1e7,
               "a node with fewer target tokens does not train"),
    /* merging */
    SH_OPT_INT(T, staleness_max, 0, "merge.staleness-max", "N", 2, 0, 1000,
               "releases that an update may be behind"),
    SH_OPT_REAL(T, staleness_discount, 0, "merge.staleness-discount", "X", 0.7, 0.01, 1,
                "weight factor for each release behind"),
    SH_OPT_REAL(
        T, server_scale, 0, "merge.server-scale", "X", 1, 0.01, 100,
        "factor on the merged delta; of a new store: later `shoal aggregator server-scale`"),
    SH_OPT_REAL(T, norm_factor_max, 0, "merge.norm-factor-max", "X", 4, 1, 1e6,
                "an update this many times the median norm is refused"),
    SH_OPT_REAL(T, cosine_min, 0, "merge.cosine-min", "X", 0, -1, 1,
                "an update whose cosine to the others' sum is below is refused"),
    /* gate */
    SH_OPT_REAL(T, gate_overall_max, 0, "gate.overall-max", "NATS", 0, -10, 10,
                "loss increase that the gate allows over all slices"),
    SH_OPT_REAL(T, gate_slice_max, 0, "gate.slice-max", "NATS", 1.5, -10, 100,
                "and on any one slice"),
    SH_OPT_INT(T, gate_tokens, 0, "gate.tokens", "N", 4096, 0, 1e9,
               "first tokens of each file of suites/ that are used; 0: all"),
    SH_OPT_INT(
        T, canary_nodes_min, 0, "canary.nodes-min", "N", 0, 0, 100000,
        "nodes that must score a candidate on their own feedback; 0: the suites alone decide"),
    SH_OPT_INT(T, canary_tokens_min, 0, "canary.tokens-min", "N", 2000, 1, 1e12,
               "and over how many tokens"),
    SH_OPT_REAL(T, canary_share, 0, "canary.share", "X", 1, 0.0001, 1,
                "of the nodes that are asked, chosen by their keys"),
    SH_OPT_INT(T, canary_ms_max, 0, "canary.ms-max", "MS", 3600000, 1, 1e12,
               "to wait for their answers; fewer than the minimum is inconclusive, no release"),
    /* a relay */
    SH_OPT_STRING(T, upstream, 0, "upstream.endpoint", "ENDPOINT", "",
                  "the parent of a relay, tcp://HOST:PORT; empty: this aggregator releases itself"),
    SH_OPT_INT(T, upstream_retry_min_ms, 0, "upstream.retry-min-ms", "MS", 1000, 1, 1e9,
               "pause before the parent is told again, doubled each time"),
    SH_OPT_INT(T, upstream_retry_max_ms, 0, "upstream.retry-max-ms", "MS", 300000, 1, 1e8,
               "at most"),
    SH_OPT_INT(T, relay_wait_ms, 0, "relay.wait-ms", "MS", 600000, 0, 1e12,
               "an update waits so long for learn.buffer to be full; then it goes up with fewer"),
    /* traffic */
    SH_OPT_INT(T, checkin_ms, 0, "checkin-ms", "MS", 60000, 100, 1e9,
               "when nodes come back, with jitter"),
    SH_OPT_REAL(T, limit_messages, 0, "limit.messages", "N", 0, 0, 1e6,
                "messages a second that one node may send; over it, it is told to wait, and "
                "disconnected when it goes on; 0: no limit"),
    SH_OPT_REAL(T, limit_bytes, 0, "limit.bytes", "BYTES", 0, 0, 1e12,
                "bytes a second that one node may send; 0: no limit"),
    SH_OPT_REAL(T, limit_burst_s, 0, "limit.burst-s", "S", 30, 1, 86400,
                "so many seconds' worth may come at once, and in any case 100 messages, 8 MiB"),
    SH_OPT_INT(T, chunk_budget, 0, "chunk-budget", "N", 16, 1, 64,
               "chunks that a node gets a message"),
    SH_OPT_INT(T, io_threads, 0, "io-threads", "N", 1, 1, 16,
               "threads that read, write and encrypt the connections' bytes"),
    /* limits: over them a node is told to come later */
    SH_OPT_INT(T, checkins_per_s, 0, "limit.checkins-per-second", "N", 1000, 0, 1e6,
               "enrolments and check-ins of all nodes; 0: no limit"),
    SH_OPT_REAL(T, load_share, 0, "limit.load-share", "X", 0.5, 0.01, 1,
                "of it that check-ins may take: with more nodes each comes back later"),
    SH_OPT_INT(T, items_per_s, 0, "limit.items-per-second", "N", 2000, 0, 1e6,
               "updates, alarms and windows of all nodes; 0: no limit"),
    SH_OPT_INT(T, served_bytes_per_s, 0, "limit.served-bytes-per-second", "BYTES", 134217728, 0,
               1e12, "of releases, to all nodes; 0: no limit"),
    SH_OPT_INT(T, asked_bytes_max, 0, "limit.asked-bytes", "BYTES", 67108864, 65536, 1e12,
               "of updates, that nodes were asked for and that have not come yet"),
};

const sh_command sh_aggregator_command = {
    "shoal-aggregator",
    "[run] --dir DIR [--config FILE] [flags]",
    table,
    SH_COUNT(table),
    "The server of a fleet: takes in the nodes' updates, merges and gates them, publishes\n"
    "releases. Runs until SIGTERM; logs on stderr. Other commands, each with --help:\n"
    "init (makes DIR: keys, first release, configuration), restore (makes DIR from a\n"
    "backup), sample-config (prints a configuration with every setting).\n"
    "Operators' commands to one that runs: shoal aggregator --help.",
    "shoal-aggregator --dir /var/lib/shoal-aggregator"};

static sh_status find_file(const sh_aggregator_settings *o, char *out, const char **path,
                           sh_error *err)
{
    if (o->dir == NULL || o->dir[0] == '\0')
        return sh_fail(err, SH_ERR_USAGE,
                       "--dir is missing (see shoal-aggregator --help; shoal-aggregator init makes "
                       "one)");
    if (o->config != NULL) {
        *path = o->config;
        return SH_OK;
    }
    SH_TRY(sh_path_join(out, SH_PATH_BYTES, o->dir, DEFAULT_FILE, err));
    *path = sh_file_exists(out) ? out : NULL;
    return SH_OK;
}

sh_status sh_aggregator_settings_read(int argc, char **argv, sh_aggregator_settings *out,
                                      sh_args *args, sh_error *err)
{
    char file[SH_PATH_BYTES];
    const char *path = NULL;
    sh_aggregator_settings o;
    SH_TRY(sh_options_parse(&sh_aggregator_command, argc, argv, &o, args, err));
    if (args->help)
        return SH_OK;
    if (args->n_positional > 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "'%s' is no command of shoal-aggregator (see shoal-aggregator --help)",
                       args->positional[0]);
    SH_TRY(find_file(&o, file, &path, err));
    if (path != NULL && path != file) { /* the second parse frees the first one's strings */
        if (strlen(path) >= sizeof file)
            return sh_fail(err, SH_ERR_USAGE, "--config: the path is too long");
        path = memcpy(file, path, strlen(path) + 1);
    }
    return sh_options_parse_file(&sh_aggregator_command, path, argc, argv, out, args, err);
}

sh_status sh_aggregator_settings_write(const sh_aggregator_settings *settings, sh_buf *out,
                                       sh_error *err)
{
    sh_option copy[SH_COUNT(table)];
    const size_t skip = SH_AGGREGATOR_SETTINGS_FLAGS;
    memcpy(copy, table, sizeof table);
    for (size_t i = skip; i < SH_COUNT(table); i++) {
        const char *field = (const char *)settings + copy[i].offset;
        switch (copy[i].type) {
        case SH_OPTION_FLAG:
            copy[i].default_number = *(const bool *)(const void *)field;
            break;
        case SH_OPTION_INT:
            copy[i].default_number = (double)*(const int64_t *)(const void *)field;
            break;
        case SH_OPTION_REAL:
            copy[i].default_number = *(const double *)(const void *)field;
            break;
        case SH_OPTION_STRING:
            copy[i].default_string = *(const char *const *)(const void *)field;
            break;
        case SH_OPTION_LIST:
            SH_ASSERT(false); /* no default can say it; the table has none */
        }
    }
    sh_command command = sh_aggregator_command;
    command.options = copy + skip;
    command.n_options = SH_COUNT(table) - skip;
    sh_status status = sh_options_sample(&command, out);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "configuration: no memory for its text");
}

sh_coord_options sh_aggregator_settings_coord(const sh_aggregator_settings *o)
{
    sh_coord_options c = {.enrol_any = o->enrol_any,
                          .buffer = (uint32_t)o->buffer,
                          .staleness_max = (uint32_t)o->staleness_max,
                          .staleness_discount = (float)o->staleness_discount,
                          .server_scale = (float)o->server_scale,
                          .norm_factor_max = (float)o->norm_factor_max,
                          .cosine_min = (float)o->cosine_min,
                          .gate_overall_max = o->gate_overall_max,
                          .gate_slice_max = o->gate_slice_max,
                          .drifting_min = (uint32_t)o->drifting_min,
                          .rounds_max = (uint32_t)o->rounds_max,
                          .round_ms_max = (uint64_t)o->round_ms_max,
                          .checkin_ms = (uint64_t)o->checkin_ms,
                          .chunk_budget = (uint64_t)o->chunk_budget,
                          .checkins_per_s = (uint32_t)o->checkins_per_s,
                          .items_per_s = (uint32_t)o->items_per_s,
                          .served_bytes_per_s = (uint64_t)o->served_bytes_per_s,
                          .asked_bytes_max = (uint64_t)o->asked_bytes_max,
                          .load_share = o->load_share,
                          .canary_nodes_min = (uint32_t)o->canary_nodes_min,
                          .canary_tokens_min = (uint64_t)o->canary_tokens_min,
                          .canary_share = o->canary_share,
                          .canary_ms_max = (uint64_t)o->canary_ms_max,
                          .limit_messages_s = o->limit_messages,
                          .limit_bytes_s = o->limit_bytes,
                          .limit_burst_s = o->limit_burst_s};
    c.relay = o->upstream != NULL && o->upstream[0] != '\0';
    c.relay_wait_ms = (uint64_t)o->relay_wait_ms;
    c.relay_retry_min_ms = (uint64_t)o->upstream_retry_min_ms;
    c.relay_retry_max_ms = (uint64_t)o->upstream_retry_max_ms;
    c.agent = "shoal-aggregator " SHOAL_VERSION;
    c.train = (sh_train_plan){.rank = (uint32_t)o->rank,
                              .alpha = (float)o->alpha,
                              .lr = (float)o->lr,
                              .lr_final = (float)o->lr_final,
                              .clip = (float)o->clip,
                              .batch = (uint32_t)o->batch,
                              .context = (uint32_t)o->context,
                              .passes_milli = (uint32_t)lround(o->passes * 1000),
                              .steps_max = (uint32_t)o->steps_max,
                              .warmup = (uint32_t)o->warmup,
                              .tokens_min = (uint32_t)o->tokens_min};
    return c;
}
