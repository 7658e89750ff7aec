/* `shoal-bench-ingest`: see README.md beside this file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "experiments/bench-ingest/bench.h"
#include "experiments/version.h"
#include "shared/base/log.h"
#include "shared/base/option.h"

#define PROGRAM   "shoal-bench-ingest"
#define TURNS_MAX 1000

static const sh_option table[] = {
    SH_OPT_STRING(bench_options, dir, 'd', "dir", "DIR", "build/bench-ingest",
                  "folder of both sides' files; its disk is what is measured"),
    SH_OPT_INT(bench_options, senders, 0, "senders", "N", 16, 1, BENCH_SENDERS_MAX,
               "connections, each a node"),
    SH_OPT_INT(bench_options, flight, 0, "flight", "N", 2, 1, BENCH_FLIGHT_MAX,
               "updates that each has under way"),
    SH_OPT_INT(bench_options, update_bytes, 0, "update-bytes", "BYTES", 262144, 1024, 1048576,
               "size of an update"),
    SH_OPT_FLAG(bench_options, windows, 0, "windows",
                "windows of 8 KiB, each one message, instead of updates"),
    SH_OPT_INT(bench_options, turns, 0, "turns", "N", 5, 1, TURNS_MAX,
               "of each side, one after the other; the median counts"),
    SH_OPT_INT(bench_options, turn_units, 0, "turn-updates", "N", 0, 0, BENCH_TURN_WINDOWS,
               "updates or windows a turn; 0: as many as a turn may have"),
    SH_OPT_INT(bench_options, io_threads, 0, "io-threads", "N", 1, 1, 16,
               "of ZeroMQ, on each receiving side"),
    SH_OPT_FLAG(bench_options, returning, 0, "return",
                "instead: all connections come back at once after the aggregator was killed"),
    SH_OPT_INT(bench_options, connections, 0, "connections", "N", 10000, 1, 100000, "of --return"),
    SH_OPT_INT(bench_options, processes, 0, "processes", "N", 0, 0, 64,
               "that these are of; 0: as few as the limit of descriptors allows"),
    SH_OPT_INT(bench_options, rate, 0, "rate", "N", 0, 0, 1000000,
               "limit.checkins-per-second of --return; 0: as the aggregator has it by itself"),
    SH_OPT_FLAG(bench_options, json, 0, "json", "one JSON object instead of a table"),
    /* what a child of this program is told */
    SH_OPT_STRING(bench_options, child, 0, "child", "KIND", NULL, "internal: raw or clients"),
    SH_OPT_STRING(bench_options, endpoint, 0, "endpoint", "ENDPOINT", NULL, "internal"),
    SH_OPT_STRING(bench_options, server_key, 0, "server-key", "KEY", NULL, "internal"),
    SH_OPT_STRING(bench_options, out, 0, "out", "FILE", NULL, "internal"),
    SH_OPT_INT(bench_options, first, 0, "first", "N", 0, 0, 100000, "internal"),
};
static const sh_command command = {
    PROGRAM,
    "[--dir DIR] [--update-bytes N | --windows] [--turns N] [--return] [--json]",
    table,
    SH_COUNT(table),
    "Durable ingest of a real shoal-aggregator, beside raw ZeroMQ that syncs the same bytes to a\n"
    "file, in turns; or the return of all nodes after the aggregator was killed.",
    "shoal-bench-ingest --update-bytes 262144 --turns 5",
};

typedef struct {
    double rate[TURNS_MAX], bytes[TURNS_MAX], p50[TURNS_MAX], p99[TURNS_MAX];
    double per_commit[TURNS_MAX], cpu_ms[TURNS_MAX], commits, messages;
    size_t n;
} side;

static void note(side *s, const bench_turn *turn, const bench_load *load)
{
    s->rate[s->n] = turn->units_per_s;
    s->bytes[s->n] = turn->bytes_per_s;
    s->p50[s->n] = turn->p50_ms;
    s->p99[s->n] = turn->p99_ms;
    s->cpu_ms[s->n] = turn->cpu_s * 1000 / (double)load->n_units;
    s->per_commit[s->n++] = turn->commits > 0 ? (double)load->n_units / turn->commits : 0;
    s->commits += turn->commits;
    s->messages += turn->messages;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare);
    return n == 0 ? 0 : (values[(n - 1) / 2] + values[n / 2]) / 2;
}

static json_t *side_json(side *s)
{
    json_t *o = json_object();
    sh_json_set(o, "updates_per_s", sh_json_number(median(s->rate, s->n)));
    sh_json_set(o, "bytes_per_s", sh_json_number(median(s->bytes, s->n)));
    sh_json_set(o, "ack_p50_ms", sh_json_number(median(s->p50, s->n)));
    sh_json_set(o, "ack_p99_ms", sh_json_number(median(s->p99, s->n)));
    sh_json_set(o, "acks_per_commit", sh_json_number(median(s->per_commit, s->n)));
    sh_json_set(o, "cpu_ms_each", sh_json_number(median(s->cpu_ms, s->n)));
    sh_json_set(o, "commits", sh_json_number(s->commits));
    sh_json_set(o, "messages", sh_json_number(s->messages));
    return o;
}

/* One turn of each side, of the same bytes. */
static sh_status take_turn(const bench_options *o, uint64_t number, side sides[2], double *ratio,
                           sh_error *err)
{
    bench_rig rig = {0};
    bench_load load = {0};
    bench_turn ours = {0}, raw = {0};
    sh_status status = SH_OK;
    SH_GOTO(bench_rig_make(&rig, o->dir, err));
    SH_GOTO(bench_load_make(&load, o, &rig, number, err));
    for (uint64_t i = 0; i < 2; i++) { /* who is first finds the machine's memory another way */
        bench_load_reset(&load);
        if ((number + i) % 2 != 0)
            SH_GOTO(bench_ours(o, &load, &rig, &ours, err));
        else
            SH_GOTO(bench_raw(o, &load, &raw, err));
    }
    note(&sides[0], &ours, &load);
    note(&sides[1], &raw, &load);
    *ratio = ours.bytes_per_s / raw.bytes_per_s;
    fprintf(stderr,
            "turn %llu: ours %.0f/s %.1f MB/s p50 %.1f ms p99 %.1f ms %.0f commits %.2f s of CPU; "
            "raw %.0f/s %.1f MB/s p50 %.1f ms p99 %.1f ms %.0f commits %.2f s of CPU; ratio "
            "%.2f\n",
            (unsigned long long)number, ours.units_per_s, ours.bytes_per_s / 1e6, ours.p50_ms,
            ours.p99_ms, ours.commits, ours.cpu_s, raw.units_per_s, raw.bytes_per_s / 1e6,
            raw.p50_ms, raw.p99_ms, raw.commits, raw.cpu_s, *ratio);
cleanup:
    bench_load_release(&load);
    bench_rig_release(&rig);
    return status;
}

static sh_status measure(const bench_options *o, json_t **result, sh_error *err)
{
    static side sides[2];
    double ratios[TURNS_MAX];
    for (int64_t i = 0; i < o->turns; i++)
        SH_TRY(take_turn(o, (uint64_t)i + 1, sides, &ratios[i], err));
    json_t *root = json_object();
    sh_json_set(root, "what", json_string(o->windows ? "windows" : "updates"));
    sh_json_set(root, "bytes_each",
                json_integer(o->windows ? (json_int_t)BENCH_WINDOW_BYTES : o->update_bytes));
    sh_json_set(root, "senders", json_integer(o->senders));
    sh_json_set(root, "flight", json_integer(o->flight));
    sh_json_set(root, "turns", json_integer(o->turns));
    sh_json_set(root, "updates_a_turn", json_integer(o->turn_units));
    sh_json_set(root, "ours", side_json(&sides[0]));
    sh_json_set(root, "raw", side_json(&sides[1]));
    sh_json_set(root, "ratio", sh_json_number(median(ratios, (size_t)o->turns)));
    *result = root;
    return SH_OK;
}

static void print_table(const bench_options *o, const json_t *result)
{
    static const char *const names[] = {"ours", "raw"};
    if (o->returning) {
        const char *key;
        json_t *value;
        json_object_foreach((json_t *)(uintptr_t)result, key, value)
        {
            if (json_is_number(value))
                printf("%-28s %.10g\n", key, json_number_value(value));
        }
        return;
    }
    printf(
        "| side | updates/s | MB/s | acknowledged p50 | p99 | acknowledged a commit | CPU each |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n");
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        const json_t *s = json_object_get(result, names[i]);
        printf("| %s | %.0f | %.1f | %.1f ms | %.1f ms | %.1f | %.3f ms |\n", names[i],
               json_number_value(json_object_get(s, "updates_per_s")),
               json_number_value(json_object_get(s, "bytes_per_s")) / 1e6,
               json_number_value(json_object_get(s, "ack_p50_ms")),
               json_number_value(json_object_get(s, "ack_p99_ms")),
               json_number_value(json_object_get(s, "acks_per_commit")),
               json_number_value(json_object_get(s, "cpu_ms_each")));
    }
    printf("\nratio of bytes/s: %.2f\n", json_number_value(json_object_get(result, "ratio")));
}

static sh_status run(const bench_options *o, sh_error *err)
{
    json_t *result = NULL;
    SH_TRY(sh_dir_make(o->dir, err));
    if (o->returning)
        SH_TRY(bench_return(o, &result, err));
    else
        SH_TRY(measure(o, &result, err));
    sh_json_set(result, "commit", json_string(SHOAL_COMMIT));
    if (o->json)
        (void)json_dumpf(result, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    else
        print_table(o, result);
    if (o->json)
        printf("\n");
    json_decref(result);
    return SH_OK;
}

int main(int argc, char **argv)
{
    bench_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = sh_options_parse(&command, argc, argv, &o, &args, &err);
    if (status == SH_OK && args.help) {
        sh_buf text;
        sh_buf_init(&text, 1u << 20);
        status = sh_options_help(&command, &text);
        fwrite(text.data, 1, text.len, stdout);
        sh_buf_release(&text);
    } else if (status == SH_OK && o.child != NULL) {
        (void)sh_net_raise_descriptors();
        int code = strcmp(o.child, "raw") == 0 ? bench_raw_server(&o) : bench_clients(&o);
        sh_args_release(&args);
        return code;
    } else if (status == SH_OK) {
        int64_t most = BENCH_TURN_UPDATES;
        if (o.windows) /* of one node the aggregator keeps so many */
            most = SH_MIN(o.senders * BENCH_NODE_WINDOWS, (int64_t)BENCH_TURN_WINDOWS);
        if (o.turn_units == 0 || o.turn_units > most)
            o.turn_units = most;
        o.turn_units = SH_MAX(o.turn_units, o.senders);
        status = run(&o, &err);
    }
    sh_args_release(&args);
    if (status != SH_OK)
        err.code = status;
    return status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
}
