#include "edge-node/settings.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/log.h"
#include "shared/math/kernel.h"
#include "shared/model/model.h"

#define V                   sh_node_settings_values
#define COMMAND_LINE        2 /* options at the table's start that are no settings of a file */
#define DAY_MS              (24ull * 3600 * 1000)
#define SAMPLE_MAX          (256u << 10)
#define THREADS_DEFAULT_MAX 4
#define OUTBOX_RECORDS      (1u << 20)      /* this version sends no records */
#define BYTES_MAX           1099511627776.0 /* 1 TiB */

#define UTC_OFFSET_UNSET 9999

/* The conditions of one policy; unknown: what its default is where a signal is not known. */
#define POLICY(kind, name, unknown_default, what)                                                  \
    SH_OPT_FLAG(V, policies[kind].unmetered, 0, "policy." name ".unmetered",                       \
                what " only on a network that costs nothing by the byte"),                         \
        SH_OPT_FLAG(V, policies[kind].power, 0, "policy." name ".power",                           \
                    "only on external power"),                                                     \
        SH_OPT_INT(V, policies[kind].idle_minutes, 0, "policy." name ".idle-minutes", "MIN", 0, 0, \
                   100000, "only when the device was not used for so long; 0: always"),            \
        SH_OPT_STRING(V, policies[kind].hours, 0, "policy." name ".hours", "HH:MM-HH:MM", NULL,    \
                      "only inside these hours, which may pass midnight"),                         \
        SH_OPT_REAL(V, policies[kind].temperature_max, 0, "policy." name ".temperature-max",       \
                    "DEGREES", 0, 0, 150, "only below so many degrees Celsius; 0: at any"),        \
        SH_OPT_STRING(V, policies[kind].unknown, 0, "policy." name ".unknown", "HOW",              \
                      unknown_default, "where a signal is needed and not known: allow or wait")

static const sh_option table[] = {
    SH_OPT_STRING(V, dir, 'd', "dir", "DIR", NULL, "the node's folder, made by shoal-node init"),
    SH_OPT_STRING(V, config, 'c', "config", "FILE", NULL,
                  "settings to read instead of DIR/node.yaml"),
    SH_OPT_STRING(V, aggregator, 0, "aggregator", "ENDPOINT", NULL,
                  "tcp://HOST:PORT of the aggregator; without one the node works alone"),
    {"sync.enabled", 0, SH_OPTION_FLAG, offsetof(V, sync), NULL, 1, 0, 1, NULL,
     "dial the aggregator when there is a network"},
    /* the local API */
    SH_OPT_STRING(V, http_address, 0, "http.address", "IP", "127.0.0.1",
                  "loopback address that the API listens on: 127.0.0.1 or ::1"),
    SH_OPT_INT(V, http_port, 'p', "http.port", "PORT", 8420, 0, 65535, "port; 0: any free one"),
    SH_OPT_STRING(V, http_token_file, 0, "http.token-file", "FILE", NULL,
                  "file (mode 0600) with the token that every request must bring"),
    SH_OPT_INT(V, http_connections_max, 0, "http.connections-max", "N", 64, 1, 4096,
               "connections at once"),
    SH_OPT_STRING(V, http_model_name, 0, "http.model-name", "NAME", "shoal",
                  "name of the model in the API"),
    /* inference */
    SH_OPT_INT(V, engine_slots, 0, "engine.slots", "N", 4, 1, 64,
               "requests that run at once, and texts whose cache is kept"),
    SH_OPT_INT(V, engine_context, 0, "engine.context", "TOKENS", 0, 0, SH_CONTEXT_MAX,
               "tokens a slot; 0: the model's, at most 1024"),
    SH_OPT_INT(V, engine_threads, 0, "engine.threads", "N", 0, 0, SH_TEAM_THREADS_MAX,
               "threads of a pass over the model; 0: a processor each, at most 4"),
    SH_OPT_STRING(V, engine_pack, 0, "engine.pack", "HOW", "memory",
                  "weights in the kernels' own order: memory, file (kept beside the model), none"),
    SH_OPT_STRING(V, engine_kernel, 0, "engine.kernel", "LEVEL", NULL,
                  "instruction set of the kernels, of those that this machine has; by default the "
                  "best"),
    SH_OPT_STRING(V, engine_kv, 0, "engine.kv", "TYPE", "f16", "values of the cache: f16 or f32"),
    SH_OPT_FLAG(V, engine_share_prefix, 0, "engine.share-prefix",
                "starts of texts are shared among users, too: faster, but the time of an answer "
                "tells what others asked"),
    /* monitoring */
    SH_OPT_INT(V, window, 0, "monitor.window", "N", 256, 16, 65536, "inferences a window"),
    SH_OPT_INT(V, window_minutes, 0, "monitor.window-minutes", "MIN", 60, 0, 100000,
               "a window closes after this long too; 0: never"),
    SH_OPT_INT(V, reference, 0, "monitor.reference", "N", 2000, 64, 2000,
               "inferences that the reference is made of"),
    SH_OPT_REAL(V, average_run_length, 0, "monitor.average-run-length", "N", 1e6, 100, 1e12,
                "inferences between two false alarms, at least"),
    /* store */
    SH_OPT_INT(V, store_bytes_max, 0, "store.bytes-max", "BYTES", 1073741824, 8388608, BYTES_MAX,
               "largest size of the store; a release on its way needs its own size there"),
    SH_OPT_INT(V, commit_ms, 0, "store.commit-ms", "MS", 1000, 0, 60000,
               "the loss window: records of inferences are committed together at the latest this "
               "long after they came, and a crash or power cut loses at most those; feedback is "
               "committed before it is answered"),
    SH_OPT_INT(V, records_max, 0, "records.count-max", "N", 100000, 256, 1e8,
               "records of inferences kept (numbers, no text)"),
    SH_OPT_INT(V, records_bytes_max, 0, "records.bytes-max", "BYTES", 0, 0, BYTES_MAX,
               "and their bytes; 0: no limit"),
    SH_OPT_INT(V, records_days_max, 0, "records.days-max", "DAYS", 30, 0, 36500,
               "and their age; 0: no limit"),
    SH_OPT_INT(V, windows_max, 0, "windows.count-max", "N", 1024, 16, 1e6,
               "windows of statistics kept"),
    SH_OPT_INT(V, feedback_tokens_max, 0, "feedback.tokens-max", "TOKENS", 262144, 512, 1e9,
               "tokens of feedback that training can use; the oldest are deleted"),
    SH_OPT_INT(V, feedback_days_max, 0, "feedback.days-max", "DAYS", 30, 0, 36500,
               "and their age; 0: no limit"),
    SH_OPT_INT(V, completions_max, 0, "completions.count-max", "N", 4096, 16, 1e7,
               "finished completions that feedback may still come for"),
    SH_OPT_INT(V, completions_bytes_max, 0, "completions.bytes-max", "BYTES", 16777216, 0,
               BYTES_MAX, "and their bytes; 0: no limit"),
    SH_OPT_INT(V, completions_days_max, 0, "completions.days-max", "DAYS", 7, 0, 36500,
               "and their age; 0: no limit"),
    /* what is owed to the aggregator */
    SH_OPT_INT(V, outbox_update_bytes, 0, "outbox.update-bytes", "BYTES", 67108864, 1048576,
               BYTES_MAX, "updates that wait for the network; the oldest are dropped"),
    SH_OPT_INT(V, outbox_alarm_bytes, 0, "outbox.alarm-bytes", "BYTES", 1048576, 65536, BYTES_MAX,
               "the same for alarms and evaluations"),
    SH_OPT_INT(V, outbox_window_bytes, 0, "outbox.window-bytes", "BYTES", 16777216, 65536,
               BYTES_MAX, "the same for windows"),
    /* learning */
    {"train.enabled", 0, SH_OPTION_FLAG, offsetof(V, train), NULL, 1, 0, 1, NULL,
     "train when the aggregator's plan asks for it"},
    {"train.idle", 0, SH_OPTION_FLAG, offsetof(V, train_idle), NULL, 1, 0, 1, NULL,
     "at idle priority: only with time that nobody else wants"},
    SH_OPT_STRING(V, train_program, 0, "train.program", "FILE", NULL,
                  "the training program; by default shoal-train beside shoal-node"),
    SH_OPT_INT(V, train_memory_max, 0, "train.memory-max", "BYTES", 2147483648.0, 0, BYTES_MAX,
               "memory that a training may take; 0: no limit"),
    {"evaluate.enabled", 0, SH_OPTION_FLAG, offsetof(V, evaluate), NULL, 1, 0, 1, NULL,
     "score candidates on the node's own held-out feedback when a plan asks for it"},
    SH_OPT_INT(V, evaluate_tokens_min, 0, "evaluate.tokens-min", "TOKENS", 64, 1, 1e9,
               "held-out target tokens below which it says that it has too little"),
    SH_OPT_INT(V, retry_min_ms, 0, "retry.min-ms", "MS", 1000, 1, 604800000,
               "first pause before something is sent again; it doubles"),
    SH_OPT_INT(V, retry_max_ms, 0, "retry.max-ms", "MS", 600000, 1, 604800000, "longest pause"),
    SH_OPT_INT(V, confirm_inferences, 0, "confirm-inferences", "N", 32, 0, 1e6,
               "healthy inferences that confirm a release; until then it can fall back"),
    /* opportunistic mode */
    POLICY(SH_POLICY_FEEDBACK, "feedback", "allow", "updates, alarms and check-ins go up"),
    POLICY(SH_POLICY_WINDOWS, "windows", "allow", "windows of statistics go up"),
    POLICY(SH_POLICY_DOWNLOAD, "download", "allow", "models are fetched"),
    POLICY(SH_POLICY_TRAIN, "train", "wait", "trains and evaluates"),
    SH_OPT_INT(V, checkin_blocked_minutes, 0, "policy.checkin-blocked-minutes", "MIN", 360, 1,
               10080, "between check-ins while policy.feedback does not hold"),
    SH_OPT_INT(V, utc_offset, 0, "policy.utc-offset", "MIN", UTC_OFFSET_UNSET, -840, 840,
               "local time less UTC, of hours and days; by default the system's at the start"),
    SH_OPT_STRING(V, probes[SH_PROBE_NETWORK], 0, "probe.network", "SOURCE", NULL,
                  "is there a network: sysfs, file:PATH, command:PROGRAM ARG..., always, never; by "
                  "default only the link says it"),
    SH_OPT_STRING(V, probes[SH_PROBE_METERED], 0, "probe.metered", "SOURCE", NULL,
                  "does it cost by the byte; the same sources but sysfs"),
    SH_OPT_STRING(V, probes[SH_PROBE_POWER], 0, "probe.power", "SOURCE", "sysfs",
                  "is there external power"),
    SH_OPT_STRING(V, probes[SH_PROBE_IDLE], 0, "probe.idle", "SOURCE", NULL,
                  "milliseconds since the device was used, besides the node's own requests; no "
                  "sysfs"),
    SH_OPT_STRING(V, probes[SH_PROBE_TEMPERATURE], 0, "probe.temperature", "SOURCE", "sysfs",
                  "thousandths of a degree Celsius"),
    SH_OPT_INT(V, probe_interval_s, 0, "probe.interval-seconds", "S", 30, 1, 86400,
               "between two looks at them"),
    SH_OPT_INT(V, probe_timeout_ms, 0, "probe.timeout-ms", "MS", 5000, 1, 600000,
               "what a command may take before it is killed, and says nothing"),
    SH_OPT_INT(V, budget_up_day, 0, "budget.up-day", "BYTES", 0, 0, BYTES_MAX,
               "bytes sent to the aggregator a day; then what is large waits; 0: no limit"),
    SH_OPT_INT(V, budget_up_month, 0, "budget.up-month", "BYTES", 0, 0, BYTES_MAX,
               "the same a month"),
    SH_OPT_INT(V, budget_down_day, 0, "budget.down-day", "BYTES", 0, 0, BYTES_MAX,
               "bytes received a day; then no model is fetched; 0: no limit"),
    SH_OPT_INT(V, budget_down_month, 0, "budget.down-month", "BYTES", 0, 0, BYTES_MAX,
               "the same a month"),
    SH_OPT_STRING(V, device_class, 0, "device.class", "NAME", NULL,
                  "what kind of device this is, told to the aggregator: phone, gateway, ..."),
    SH_OPT_INT(V, stop_wait_ms, 0, "stop.wait-ms", "MS", 10000, 0, 600000,
               "how long running requests may take at a stop"),
    SH_OPT_STRING(V, log_level, 0, "log.level", "LEVEL", "info", "error, warn, info or debug"),
};

static const char about[] =
    "Serves the active release over a local OpenAI-compatible API, measures drift, trains on\n"
    "feedback and syncs with the aggregator when there is a network. docs/node.md is the manual.";

const sh_command sh_settings_command = {"shoal-node run",
                                        "--dir DIR [--config FILE] [options]",
                                        table,
                                        SH_COUNT(table),
                                        about,
                                        "shoal-node run --dir /var/lib/shoal-node"};

static const sh_command file_command = {
    "shoal-node", "", table + COMMAND_LINE, SH_COUNT(table) - COMMAND_LINE, about, NULL};

sh_status sh_settings_beside(const char *name, char *out, size_t out_bytes, sh_error *err)
{
    char path[SH_PATH_BYTES];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n < 0)
        return sh_fail(err, SH_ERR_IO, "/proc/self/exe: %s", strerror(errno));
    path[n] = 0;
    char *slash = strrchr(path, '/');
    if (slash)
        *slash = 0;
    return sh_path_join(out, out_bytes, path, name, err);
}

/* `path` as seen from the folder that the program was started in. */
static sh_status make_absolute(const char *path, char *out, sh_error *err)
{
    char here[SH_PATH_BYTES];
    if (path[0] == '/') {
        if (strlen(path) >= SH_PATH_BYTES)
            return sh_fail(err, SH_ERR_LIMIT, "%.64s…: the path is too long", path);
        memcpy(out, path, strlen(path) + 1);
        return SH_OK;
    }
    if (!getcwd(here, sizeof here))
        return sh_fail(err, SH_ERR_IO, "the current folder: %s", strerror(errno));
    return sh_path_join(out, SH_PATH_BYTES, here, path, err);
}

/* A path of the file or of a flag; the latter is what the flags alone say. */
static sh_status settle_path(const char *value, const char *flag, char *out, sh_error *err)
{
    if (value == NULL || value[0] == 0) {
        out[0] = 0;
        return SH_OK;
    }
    if (flag != NULL && strcmp(flag, value) == 0)
        return make_absolute(value, out, err);
    if (strlen(value) >= SH_PATH_BYTES)
        return sh_fail(err, SH_ERR_LIMIT, "%.64s…: the path is too long", value);
    memcpy(out, value, strlen(value) + 1);
    return SH_OK;
}

static sh_status check_dir(const char *given, char *dir, sh_error *err)
{
    struct stat st;
    if (given == NULL || given[0] == 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "--dir is missing: the folder that shoal-node init has made");
    if (stat(given, &st) != 0 || !S_ISDIR(st.st_mode))
        return sh_fail(err, SH_ERR_USAGE, "%s: no such folder; shoal-node init --dir %s makes one",
                       given, given);
    return make_absolute(given, dir, err);
}

/* "22:00-06:00"; "": the whole day. */
static sh_status parse_hours(const char *text, uint32_t *from_min, uint32_t *to_min)
{
    unsigned at[4];
    char rest;
    *from_min = *to_min = 0;
    if (text == NULL || text[0] == 0)
        return SH_OK;
    if (sscanf(text, "%2u:%2u-%2u:%2u%c", &at[0], &at[1], &at[2], &at[3], &rest) != 4 ||
        at[0] > 23 || at[1] > 59 || at[2] > 24 || at[3] > 59 || (at[2] == 24 && at[3] > 0))
        return SH_ERR_USAGE;
    *from_min = at[0] * 60 + at[1];
    *to_min = at[2] * 60 + at[3];
    return *from_min == *to_min ? SH_ERR_USAGE : SH_OK;
}

static sh_status check_device(const V *v, sh_error *err)
{
    static const char *const names[SH_POLICIES] = {"feedback", "windows", "download", "train"};
    uint32_t from, to;
    sh_probe probe;
    for (int i = 0; i < SH_POLICIES; i++) {
        if (parse_hours(v->policies[i].hours, &from, &to) != SH_OK)
            return sh_fail(err, SH_ERR_USAGE,
                           "policy.%s.hours: '%.32s' is not of the form HH:MM-HH:MM, as "
                           "22:00-06:00",
                           names[i], v->policies[i].hours);
        const char *unknown = v->policies[i].unknown;
        if (strcmp(unknown, "allow") && strcmp(unknown, "wait"))
            return sh_fail(err, SH_ERR_USAGE, "policy.%s.unknown: '%.32s' is not allow or wait",
                           names[i], unknown);
    }
    for (int i = 0; i < SH_PROBES; i++)
        SH_TRY(sh_probe_parse((sh_probe_signal)i, v->probes[i], &probe, err));
    const char *class = v->device_class ? v->device_class : "";
    for (const char *c = class; *c; c++)
        if (*c < ' ' || *c > '~' || c - class >= SH_WIRE_CLASS_MAX)
            return sh_fail(err, SH_ERR_USAGE,
                           "device.class: a name of at most %d plain characters is wanted",
                           SH_WIRE_CLASS_MAX);
    return SH_OK;
}

static sh_status check_values(const V *v, sh_error *err)
{
    sh_log_level level;
    SH_TRY(check_device(v, err));
    if (v->retry_max_ms < v->retry_min_ms)
        return sh_fail(err, SH_ERR_USAGE, "retry.max-ms: %lld is below retry.min-ms, %lld",
                       (long long)v->retry_max_ms, (long long)v->retry_min_ms);
    if (sh_log_parse_level(v->log_level, &level, err) != SH_OK)
        return sh_fail_in(err, "log.level");
    if (strcmp(v->engine_pack, "memory") && strcmp(v->engine_pack, "file") &&
        strcmp(v->engine_pack, "none"))
        return sh_fail(err, SH_ERR_USAGE, "engine.pack: '%.32s' is not memory, file or none",
                       v->engine_pack);
    if (strcmp(v->engine_kv, "f16") && strcmp(v->engine_kv, "f32"))
        return sh_fail(err, SH_ERR_USAGE, "engine.kv: '%.32s' is not f16 or f32", v->engine_kv);
    if (v->engine_kernel && v->engine_kernel[0] && sh_kernel_force(v->engine_kernel, err) != SH_OK)
        return sh_fail_in(err, "engine.kernel");
    return SH_OK;
}

static sh_status finish(sh_settings *s, const V *flags, sh_error *err)
{
    SH_TRY(check_values(&s->v, err));
    SH_TRY(settle_path(s->v.train_program, flags->train_program, s->program, err));
    SH_TRY(settle_path(s->v.http_token_file, flags->http_token_file, s->token_file, err));
    if (s->program[0])
        return SH_OK;
    return sh_settings_beside("shoal-train", s->program, sizeof s->program, err);
}

/* Which file to read: --config, or DIR/node.yaml when it is there ("": none). */
static sh_status find_file(const V *flags, const char *dir, char *path, sh_error *err)
{
    if (flags->config && flags->config[0])
        return make_absolute(flags->config, path, err);
    SH_TRY(sh_path_join(path, SH_PATH_BYTES, dir, SH_NODE_FILE_CONFIG, err));
    if (!sh_file_exists(path))
        path[0] = 0;
    return SH_OK;
}

sh_status sh_settings_parse(int argc, char **argv, sh_settings *out, bool *help, sh_error *err)
{
    V flags = {0};
    sh_args args = {0};
    sh_settings *s = out;
    char path[SH_PATH_BYTES];
    *s = (sh_settings){0};
    sh_status status = SH_OK;
    SH_GOTO(sh_options_parse(&sh_settings_command, argc, argv, &flags, &args, err));
    *help = args.help;
    if (args.help)
        goto cleanup;
    if (args.n_positional)
        SH_GOTO(sh_fail(err, SH_ERR_USAGE, "'%s' is no option (see shoal-node run --help)",
                        args.positional[0]));
    SH_GOTO(check_dir(flags.dir, s->dir, err));
    SH_GOTO(find_file(&flags, s->dir, path, err));
    SH_GOTO(sh_options_parse_file(&sh_settings_command, path[0] ? path : NULL, argc, argv, &s->v,
                                  &s->args, err));
    SH_GOTO(finish(s, &flags, err));
cleanup:
    sh_args_release(&args);
    if (status != SH_OK)
        sh_settings_release(s);
    return status;
}

sh_status sh_settings_of_dir(const char *dir, sh_settings *out, sh_error *err)
{
    char *argv[] = {(char *)"shoal-node", (char *)"--dir", (char *)dir, NULL};
    bool help = false;
    return sh_settings_parse(3, argv, out, &help, err);
}

void sh_settings_release(sh_settings *s)
{
    sh_args_release(&s->args);
    *s = (sh_settings){0};
}

/* Comments out every line "key: value" of the sample whose value is the default: groups and
 * comments stay. */
static sh_status comment_out(const sh_buf *sample, sh_buf *out)
{
    const char *text = (const char *)sample->data, *end = text + sample->len;
    while (text < end) {
        const char *stop = memchr(text, '\n', (size_t)(end - text));
        size_t n = stop ? (size_t)(stop - text) : (size_t)(end - text);
        size_t indent = 0;
        while (indent < n && text[indent] == ' ')
            indent++;
        bool value = n > indent && text[indent] != '#' && text[n - 1] != ':';
        SH_TRY(sh_buf_printf(out, "%.*s%s%.*s\n", (int)indent, text, value ? "# " : "",
                             (int)(n - indent), text + indent));
        text += n + 1;
    }
    return SH_OK;
}

sh_status sh_settings_sample(const char *aggregator, sh_buf *out)
{
    sh_buf sample;
    sh_buf_init(&sample, SAMPLE_MAX);
    sh_status status = SH_OK;
    SH_GOTO(sh_options_sample(&file_command, &sample));
    if (aggregator)
        SH_GOTO(sh_buf_printf(out, "aggregator: \"%s\"\n\n", aggregator));
    SH_GOTO(comment_out(&sample, out));
cleanup:
    sh_buf_release(&sample);
    return status;
}

sh_node_pack sh_settings_pack(const V *v)
{
    return !strcmp(v->engine_pack, "none")   ? SH_NODE_PACK_NONE
           : !strcmp(v->engine_pack, "file") ? SH_NODE_PACK_FILE
                                             : SH_NODE_PACK_MEMORY;
}

unsigned sh_settings_threads(const V *v)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (v->engine_threads > 0)
        return (unsigned)v->engine_threads;
    return cores > 0 ? (unsigned)SH_MIN(cores, (long)THREADS_DEFAULT_MAX) : 1;
}

static int32_t system_utc_offset_min(void)
{
    time_t now = time(NULL);
    struct tm local;
    return localtime_r(&now, &local) ? (int32_t)(local.tm_gmtoff / 60) : 0;
}

static void set_device(const V *v, sh_node_options *out)
{
    for (int i = 0; i < SH_POLICIES; i++) {
        sh_node_policy *p = &out->policies[i];
        p->unmetered = v->policies[i].unmetered;
        p->power = v->policies[i].power;
        p->unknown_allowed = strcmp(v->policies[i].unknown, "allow") == 0;
        p->idle_ms_min = (uint64_t)v->policies[i].idle_minutes * 60000;
        p->temperature_mc_max = (int32_t)(v->policies[i].temperature_max * 1000);
        sh_status status = parse_hours(v->policies[i].hours, &p->from_min, &p->to_min);
        SH_ASSERT(status == SH_OK); /* sh_settings_parse has checked it */
    }
    out->checkin_blocked_ms = (uint64_t)v->checkin_blocked_minutes * 60000;
    out->utc_offset_min =
        v->utc_offset == UTC_OFFSET_UNSET ? system_utc_offset_min() : (int32_t)v->utc_offset;
    out->budgets = (sh_node_budgets){
        .up_day = (uint64_t)v->budget_up_day,
        .up_month = (uint64_t)v->budget_up_month,
        .down_day = (uint64_t)v->budget_down_day,
        .down_month = (uint64_t)v->budget_down_month,
    };
    out->device_class = v->device_class;
    out->disk_bytes = (uint64_t)v->store_bytes_max;
}

void sh_settings_node_options(const V *v, sh_node_options *out)
{
    struct sysinfo info = {0};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    (void)sysinfo(&info);
    *out = (sh_node_options){
        .agent = "shoal-node/" SHOAL_VERSION,
        .kernel = sh_kernel_level(),
        .cores = cores > 0 ? (uint32_t)cores : 1,
        .memory_bytes = (uint64_t)info.totalram * info.mem_unit,
        .records_max = (uint64_t)v->records_max,
        .records_bytes_max = (uint64_t)v->records_bytes_max,
        .records_age_ms_max = (uint64_t)v->records_days_max * DAY_MS,
        .windows_max = (uint64_t)v->windows_max,
        .feedback_tokens_max = (uint64_t)v->feedback_tokens_max,
        .feedback_age_ms_max = (uint64_t)v->feedback_days_max * DAY_MS,
        .completions_max = (uint64_t)v->completions_max,
        .completions_bytes_max = (uint64_t)v->completions_bytes_max,
        .completions_age_ms_max = (uint64_t)v->completions_days_max * DAY_MS,
        .outbox_quota_bytes = {(uint64_t)v->outbox_update_bytes, (uint64_t)v->outbox_alarm_bytes,
                               (uint64_t)v->outbox_window_bytes, OUTBOX_RECORDS},
        .retry_min_ms = (uint64_t)v->retry_min_ms,
        .retry_max_ms = (uint64_t)v->retry_max_ms,
        .confirm_inferences = (uint32_t)v->confirm_inferences,
        .send_only_if_better = true,
        .evaluate = v->evaluate,
        .evaluate_tokens_min = (uint64_t)v->evaluate_tokens_min,
        .monitor = {.window = (uint32_t)v->window,
                    .window_ms_max = (uint64_t)v->window_minutes * 60000,
                    .reference = (uint32_t)v->reference,
                    .average_run_length = v->average_run_length}};
    set_device(v, out);
}
