/*
 * The settings of a node: one table makes flags, node.yaml, --help and the sample file.
 *
 * The file is DIR/node.yaml unless --config names another; flags override it. Secrets are files,
 * never options. Paths in the file are relative to DIR, which the daemon makes its working
 * directory; paths given as flags are relative to where it was started.
 * Ownership: strings belong to the settings; release takes a zeroed one.
 */
#ifndef SH_EDGE_SETTINGS_H
#define SH_EDGE_SETTINGS_H

#include "edge-node/node.h"
#include "edge-node/probe.h"
#include "shared/base/file.h"
#include "shared/base/option.h"

/* Names in a node's folder. */
#define SH_NODE_FILE_CONFIG     "node.yaml"
#define SH_NODE_FILE_KEYS       "node.key"
#define SH_NODE_FILE_KEYS_NEXT  "node.key.next" /* there while the key is being changed */
#define SH_NODE_FILE_ADMIN_KEYS "admin.key"
#define SH_NODE_FILE_AGGREGATOR "aggregator.pub"
#define SH_NODE_FILE_RELEASE    "release.pub"
#define SH_NODE_FILE_GENESIS    "genesis.gguf"
#define SH_NODE_FILE_MANIFEST   "genesis.manifest"
#define SH_NODE_FILE_TOKEN      "enrol.token" /* there until the aggregator has let the node in */
#define SH_NODE_FILE_ERASING    "erasing"     /* there while an erasure is not wholly done */
#define SH_NODE_DIR_STORE       "store"
#define SH_NODE_DIR_MODELS      "models"
#define SH_NODE_DIR_WORK        "work"

typedef struct {
    const char *dir, *config;
    const char *aggregator;
    bool sync;
    const char *http_address, *http_token_file, *http_model_name;
    int64_t http_port, http_connections_max;
    int64_t engine_slots, engine_context, engine_threads;
    const char *engine_pack, *engine_kernel, *engine_kv;
    bool engine_share_prefix;
    int64_t window, window_minutes, reference;
    double average_run_length;
    int64_t store_bytes_max, commit_ms;
    int64_t records_max, records_bytes_max, records_days_max;
    int64_t windows_max;
    int64_t feedback_tokens_max, feedback_days_max;
    int64_t completions_max, completions_bytes_max, completions_days_max;
    int64_t outbox_update_bytes, outbox_alarm_bytes, outbox_window_bytes;
    bool train, train_idle, evaluate;
    const char *train_program;
    int64_t train_memory_max, evaluate_tokens_min;
    int64_t retry_min_ms, retry_max_ms;
    int64_t confirm_inferences, stop_wait_ms;
    const char *log_level;
    /* opportunistic mode */
    struct {
        bool unmetered, power;
        int64_t idle_minutes;
        double temperature_max;
        const char *hours, *unknown;
    } policies[SH_POLICIES];
    int64_t checkin_blocked_minutes, utc_offset;
    const char *probes[SH_PROBES];
    int64_t probe_interval_s, probe_timeout_ms;
    int64_t budget_up_day, budget_up_month, budget_down_day, budget_down_month;
    const char *device_class;
} sh_node_settings_values;

typedef struct {
    sh_node_settings_values v;
    sh_args args;
    char dir[SH_PATH_BYTES];        /* absolute */
    char program[SH_PATH_BYTES];    /* absolute path of shoal-train */
    char token_file[SH_PATH_BYTES]; /* absolute when it was a flag; "": none */
} sh_settings;

extern const sh_command sh_settings_command; /* "shoal-node run" */

/* From the words after `run`. *help: --help was given and the rest is not filled. SH_ERR_USAGE,
 * SH_ERR_NOT_FOUND: no such folder, or it is no node's. */
SH_MUST_USE sh_status sh_settings_parse(int argc, char **argv, sh_settings *out, bool *help,
                                        sh_error *err);
/* What tools need: defaults and the file of a node's folder (when there). */
SH_MUST_USE sh_status sh_settings_of_dir(const char *dir, sh_settings *out, sh_error *err);
void sh_settings_release(sh_settings *settings);

/* node.yaml: only what differs from the defaults is set, the rest is commented with its help. The
 * command line's --dir and --config are not in it. */
SH_MUST_USE sh_status sh_settings_sample(const char *aggregator, sh_buf *out);
/* How the engine runs, of the settings engine.*; the kernel is forced by sh_settings_parse. */
typedef enum { SH_NODE_PACK_NONE, SH_NODE_PACK_MEMORY, SH_NODE_PACK_FILE } sh_node_pack;
sh_node_pack sh_settings_pack(const sh_node_settings_values *values);
unsigned sh_settings_threads(const sh_node_settings_values *values);
/* The core's options; agent and kernel are literals, release_key is the caller's to set. */
void sh_settings_node_options(const sh_node_settings_values *values, sh_node_options *out);
/* Where the running program lies: its folder and `name`. */
SH_MUST_USE sh_status sh_settings_beside(const char *name, char *out, size_t out_bytes,
                                         sh_error *err);

#endif
