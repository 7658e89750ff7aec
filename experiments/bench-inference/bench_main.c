/* `shoal-bench-inference`: see README.md beside this file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "experiments/bench-inference/bench.h"
#include "experiments/fleet/process.h"
#include "shared/base/log.h"
#include "shared/base/option.h"
#include "shared/model/synth.h"

#define TOOL_TIMEOUT_S   1800
#define RESULT_BYTES_MAX (1u << 20)
#define PAGE_BYTES_MAX   (1u << 20)
#define LORA_RANK        16
#define REPEATS          3 /* of each program in a round */
#define CEILINGS_MAX     (8 * BENCH_ROUNDS_MAX)
#define MARK_BEGIN       "<!-- made by shoal-bench-inference: begin -->\n"
#define MARK_END         "<!-- made by shoal-bench-inference: end -->\n"

static const bench_case cases[] = {
    {"15m", "Q8_0", 512, 128, false, 1.5, 2.0, 0},  {"15m", "Q4_0", 512, 128, false, 0, 0, 0},
    {"135m", "Q8_0", 512, 128, false, 2.0, 1.5, 0}, {"135m", "Q4_0", 512, 128, false, 1.5, 1.5, 0},
    {"1.1b", "Q8_0", 128, 32, false, 0, 1.1, 0.85}, {"1.1b", "Q4_0", 128, 32, false, 0, 1.1, 0.85},
    {"135m", "Q8_0", 64, 128, true, 0, 0, 0},
};

typedef struct {
    const char *dir, *llama_bench, *page, *only;
    int64_t threads, rounds;
} bench_main_options;

static const sh_option option_table[] = {
    SH_OPT_STRING(bench_main_options, dir, 0, "dir", "DIR", "build/bench-inference",
                  "folder of models and results"),
    SH_OPT_STRING(bench_main_options, llama_bench, 0, "llama-bench", "PROGRAM", NULL,
                  "llama.cpp's llama-bench, to measure in turns with"),
    SH_OPT_INT(bench_main_options, threads, 't', "threads", "N", 2, 1, 64,
               "measure with one thread, and with N"),
    SH_OPT_INT(bench_main_options, rounds, 'r', "rounds", "N", 3, 1, BENCH_ROUNDS_MAX,
               "rounds; the median counts"),
    SH_OPT_STRING(bench_main_options, only, 0, "only", "SHAPE", NULL, "only this shape"),
    SH_OPT_STRING(bench_main_options, page, 0, "page", "FILE", NULL,
                  "put the tables into this page, between its marks"),
};
static const sh_command command = {
    "shoal-bench-inference",
    "[--llama-bench PROGRAM] [--page docs/performance.md]",
    option_table,
    SH_COUNT(option_table),
    "Measures decode and prefill on models of random weights, beside llama.cpp's llama-bench where "
    "one is named, and beside what the machine can do at most.",
    "shoal-bench-inference --llama-bench ~/llama.cpp/build/bin/llama-bench",
};

double bench_median(double *values, size_t n)
{
    for (size_t i = 1; i < n; i++) /* few values: insertion */
        for (size_t j = i; j > 0 && values[j - 1] > values[j]; j--) {
            const double v = values[j];
            values[j] = values[j - 1];
            values[j - 1] = v;
        }
    if (n == 0)
        return 0;
    return n % 2 != 0 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* ---- models ---- */

static void model_path(const bench_run *run, const bench_case *c, char out[SH_PATH_BYTES])
{
    snprintf(out, SH_PATH_BYTES, "%s/%s-%s.gguf", run->dir, c->shape, c->type);
}

static void lora_path(const bench_run *run, const bench_case *c, char out[SH_PATH_BYTES])
{
    snprintf(out, SH_PATH_BYTES, "%s/%s-lora-r%d.gguf", run->dir, c->shape, LORA_RANK);
}

static sh_status make_model(const bench_run *run, const bench_case *c, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_synth_options options = {.seed = 1};
    SH_TRY(sh_synth_find(c->shape, &options.shape, err));
    SH_TRY(sh_type_parse(c->type, &options.type, err));
    model_path(run, c, path);
    if (!sh_file_exists(path)) {
        fprintf(stderr, "bench: making %s\n", path);
        SH_TRY(sh_synth_model(&options, path, err));
    }
    lora_path(run, c, path);
    if (c->lora && !sh_file_exists(path))
        SH_TRY(sh_synth_adapter(options.shape, LORA_RANK, 1, path, err));
    return SH_OK;
}

/* ---- running a program for its JSON ---- */

static sh_status run_json(const bench_run *run, const fleet_words *words, json_t **out,
                          sh_error *err)
{
    static const sh_json_limits limits = {RESULT_BYTES_MAX, 100000, 32};
    char path[SH_PATH_BYTES];
    uint8_t *text;
    size_t n;
    snprintf(path, sizeof path, "%s/tool.log", run->dir);
    unlink(path);
    SH_TRY(fleet_run_tool(words, path, TOOL_TIMEOUT_S, err));
    SH_TRY(sh_file_read(path, RESULT_BYTES_MAX, &text, &n, err));
    size_t at = 0; /* what is on stderr comes first, in lines of its own */
    while (at < n && !((text[at] == '{' || text[at] == '[') && (at == 0 || text[at - 1] == '\n')))
        at++;
    const sh_status status = sh_json_decode(text + at, n - at, path, &limits, out, err);
    free(text);
    return status;
}

static double number(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

/* What one round adds to. */
typedef struct {
    double prefill[BENCH_ROUNDS_MAX], decode[BENCH_ROUNDS_MAX], base[BENCH_ROUNDS_MAX];
    double peer_prefill[BENCH_ROUNDS_MAX], peer_decode[BENCH_ROUNDS_MAX];
    double prefill_ratio[BENCH_ROUNDS_MAX], decode_ratio[BENCH_ROUNDS_MAX];
    double lora_ratio[BENCH_ROUNDS_MAX], read_share[BENCH_ROUNDS_MAX];
    size_t n;
} rounds;

/* The ceilings that were measured beside rows of one number of threads. */
typedef struct {
    double read[CEILINGS_MAX], int8[CEILINGS_MAX], f32[CEILINGS_MAX];
    size_t n;
} ceilings;

static sh_status measure_ours(bench_run *run, const char *model, bench_row *row, rounds *all,
                              ceilings *limits, sh_error *err)
{
    const bench_case *c = row->what;
    char lora[SH_PATH_BYTES];
    json_t *result = NULL;
    fleet_words words = {0};
    fleet_words_add(&words, run->shoal);
    fleet_words_add(&words, "model");
    fleet_words_add(&words, "bench");
    fleet_words_add(&words, "--json");
    fleet_words_addf(&words, "--model=%s", model);
    fleet_words_addf(&words, "--threads=%d", row->threads);
    fleet_words_addf(&words, "--prefill=%d", c->prefill);
    fleet_words_addf(&words, "--decode=%d", c->decode);
    fleet_words_addf(&words, "--repeats=%d", REPEATS);
    if (c->lora) {
        lora_path(run, c, lora);
        fleet_words_addf(&words, "--lora=%s", lora);
    }
    fleet_words_add(&words, "--ceilings");
    SH_TRY(run_json(run, &words, &result, err));
    SH_ASSERT(limits->n < CEILINGS_MAX);
    limits->read[limits->n] = number(result, "read_bytes_per_s");
    limits->int8[limits->n] = number(result, "int8_ops_per_s");
    limits->f32[limits->n++] = number(result, "f32_flops");
    all->read_share[all->n] = number(result, "decode_read_share");
    all->lora_ratio[all->n] = number(result, "decode_with_over_without_lora");
    all->prefill[all->n] = number(result, "prefill_tokens_per_s");
    all->decode[all->n] = number(result, "decode_tokens_per_s");
    all->base[all->n] = number(result, "decode_without_lora_tokens_per_s");
    row->weight_bytes = number(result, "weight_bytes");
    row->rss_bytes = number(result, "rss_bytes");
    row->load_s = number(result, "load_s");
    row->first_token_s = number(result, "first_token_s");
    const char *kernel = json_string_value(json_object_get(result, "kernel"));
    snprintf(run->kernel, sizeof run->kernel, "%s", kernel != NULL ? kernel : "?");
    json_decref(result);
    return SH_OK;
}

/* Warm, in place: the file is in the page cache by now. */
static sh_status measure_start(const bench_run *run, const char *model, bench_row *row,
                               sh_error *err)
{
    json_t *result = NULL;
    fleet_words words = {0};
    fleet_words_add(&words, run->shoal);
    fleet_words_add(&words, "model");
    fleet_words_add(&words, "bench");
    fleet_words_add(&words, "--json");
    fleet_words_add(&words, "--pack=none");
    fleet_words_addf(&words, "--model=%s", model);
    fleet_words_addf(&words, "--threads=%d", row->threads);
    fleet_words_addf(&words, "--prefill=%d", 1);
    fleet_words_addf(&words, "--decode=%d", 1);
    fleet_words_addf(&words, "--repeats=%d", 1);
    SH_TRY(run_json(run, &words, &result, err));
    row->first_token_in_place_s = number(result, "first_token_s");
    json_decref(result);
    return SH_OK;
}

/* llama-bench's samples of a test with so many prompt and generated tokens. */
static double peer_rate(const json_t *result, int n_prompt, int n_gen)
{
    size_t i;
    json_t *test;
    double samples[64];
    json_array_foreach(result, i, test)
    {
        if (json_integer_value(json_object_get(test, "n_prompt")) != n_prompt ||
            json_integer_value(json_object_get(test, "n_gen")) != n_gen)
            continue;
        const json_t *list = json_object_get(test, "samples_ts");
        const size_t n = SH_MIN(json_array_size(list), SH_COUNT(samples));
        for (size_t k = 0; k < n; k++)
            samples[k] = json_number_value(json_array_get(list, k));
        return bench_median(samples, n);
    }
    return 0;
}

static sh_status measure_peer(const bench_run *run, const char *model, const bench_row *row,
                              rounds *all, sh_error *err)
{
    json_t *result = NULL;
    fleet_words words = {0};
    if (run->llama_bench == NULL || row->what->lora)
        return SH_OK;
    fleet_words_add(&words, run->llama_bench);
    fleet_words_add(&words, "-m");
    fleet_words_add(&words, model);
    fleet_words_add(&words, "-t");
    fleet_words_addf(&words, "%d", row->threads);
    fleet_words_add(&words, "-p");
    fleet_words_addf(&words, "%d", row->what->prefill);
    fleet_words_add(&words, "-n");
    fleet_words_addf(&words, "%d", row->what->decode);
    fleet_words_add(&words, "-r");
    fleet_words_addf(&words, "%d", REPEATS);
    fleet_words_add(&words, "-o");
    fleet_words_add(&words, "json");
    SH_TRY(run_json(run, &words, &result, err));
    all->peer_prefill[all->n] = peer_rate(result, row->what->prefill, 0);
    all->peer_decode[all->n] = peer_rate(result, 0, row->what->decode);
    json_decref(result);
    if (!(all->peer_decode[all->n] > 0) || !(all->peer_prefill[all->n] > 0))
        return sh_fail(err, SH_ERR_INVALID, "%s: its JSON has no samples_ts of these tests",
                       run->llama_bench);
    return SH_OK;
}

static sh_status measure_case(bench_run *run, const bench_case *c, int threads, ceilings *limits,
                              sh_error *err)
{
    char model[SH_PATH_BYTES];
    rounds all = {0};
    if (run->n_rows == SH_COUNT(run->rows))
        return sh_fail(err, SH_ERR_LIMIT, "more than %zu rows", SH_COUNT(run->rows));
    bench_row *row = &run->rows[run->n_rows++];
    *row = (bench_row){.what = c, .threads = threads};
    model_path(run, c, model);
    for (int round = 0; round < run->rounds; round++) {
        fprintf(stderr, "bench: %s %s%s, %d thread%s, round %d of %d\n", c->shape, c->type,
                c->lora ? " with an adapter" : "", threads, threads == 1 ? "" : "s", round + 1,
                run->rounds);
        SH_TRY(measure_ours(run, model, row, &all, limits, err));
        SH_TRY(measure_peer(run, model, row, &all, err));
        if (all.peer_decode[all.n] > 0) {
            all.prefill_ratio[all.n] = all.prefill[all.n] / all.peer_prefill[all.n];
            all.decode_ratio[all.n] = all.decode[all.n] / all.peer_decode[all.n];
        }
        all.n++;
    }
    row->prefill = bench_median(all.prefill, all.n);
    row->decode = bench_median(all.decode, all.n);
    row->decode_base = bench_median(all.base, all.n);
    row->peer_prefill = bench_median(all.peer_prefill, all.n);
    row->peer_decode = bench_median(all.peer_decode, all.n);
    row->prefill_ratio = bench_median(all.prefill_ratio, all.n);
    row->decode_ratio = bench_median(all.decode_ratio, all.n);
    row->lora_ratio = bench_median(all.lora_ratio, all.n);
    row->read_share = bench_median(all.read_share, all.n);
    return c->lora ? SH_OK : measure_start(run, model, row, err);
}

/* All cases with so many threads. */
static sh_status measure_threads(bench_run *run, const char *only, int threads, sh_error *err)
{
    ceilings limits = {0};
    for (size_t i = 0; i < SH_COUNT(cases); i++)
        if (only == NULL || strcmp(only, cases[i].shape) == 0)
            SH_TRY(measure_case(run, &cases[i], threads, &limits, err));
    run->ceilings[run->n_ceilings++] =
        (bench_ceiling){threads, bench_median(limits.read, limits.n),
                        bench_median(limits.int8, limits.n), bench_median(limits.f32, limits.n)};
    return SH_OK;
}

/* ---- results ---- */

static void name_machine(bench_run *run)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");
    snprintf(run->machine, sizeof run->machine, "processor unknown");
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            snprintf(run->machine, sizeof run->machine, "%.*s", (int)strcspn(colon + 2, "\n"),
                     colon + 2);
            break;
        }
    }
    if (f != NULL)
        fclose(f);
}

/* The page with what is between its marks replaced. */
static sh_status write_page(const char *path, const sh_buf *tables, sh_error *err)
{
    uint8_t *text;
    size_t n;
    sh_buf page;
    SH_TRY(sh_file_read(path, PAGE_BYTES_MAX, &text, &n, err));
    sh_buf_init(&page, 2 * PAGE_BYTES_MAX);
    sh_status status = SH_OK;
    const uint8_t *begin = memmem(text, n, MARK_BEGIN, strlen(MARK_BEGIN));
    const uint8_t *end = memmem(text, n, MARK_END, strlen(MARK_END));
    if (begin == NULL || end == NULL || end < begin) {
        status =
            sh_fail(err, SH_ERR_INVALID, "%s: its marks are missing: %.*s ... %.*s", path,
                    (int)strlen(MARK_BEGIN) - 1, MARK_BEGIN, (int)strlen(MARK_END) - 1, MARK_END);
        goto cleanup;
    }
    begin += strlen(MARK_BEGIN);
    SH_GOTO(sh_buf_append(&page, text, (size_t)(begin - text)));
    SH_GOTO(sh_buf_append(&page, tables->data, tables->len));
    SH_GOTO(sh_buf_append(&page, end, n - (size_t)(end - text)));
    SH_GOTO(sh_file_write_atomic(path, page.data, page.len, err));

cleanup:
    free(text);
    sh_buf_release(&page);
    return status;
}

static sh_status write_results(const bench_run *run, const char *page, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_buf tables;
    sh_buf_init(&tables, PAGE_BYTES_MAX);
    json_t *results = bench_results(run);
    snprintf(path, sizeof path, "%s/results.json", run->dir);
    sh_status status = sh_json_save(path, results, err);
    json_decref(results);
    if (status == SH_OK && bench_tables(run, &tables) != SH_OK)
        status = sh_fail(err, SH_ERR_LIMIT, "the tables are over %u bytes", PAGE_BYTES_MAX);
    if (status == SH_OK) {
        fwrite(tables.data, 1, tables.len, stdout);
        snprintf(path, sizeof path, "%s/tables.md", run->dir);
        status = sh_file_write_atomic(path, tables.data, tables.len, err);
    }
    if (status == SH_OK && page != NULL)
        status = write_page(page, &tables, err);
    sh_buf_release(&tables);
    return status;
}

static sh_status run_all(const bench_main_options *o, sh_error *err)
{
    static bench_run run;
    run.dir = o->dir;
    run.llama_bench = o->llama_bench;
    run.rounds = (int)o->rounds;
    name_machine(&run);
    SH_TRY(fleet_program("shoal", run.shoal, sizeof run.shoal, err));
    SH_TRY(sh_dir_make(o->dir, err));
    for (size_t i = 0; i < SH_COUNT(cases); i++)
        if (o->only == NULL || strcmp(o->only, cases[i].shape) == 0)
            SH_TRY(make_model(&run, &cases[i], err));
    for (int threads = 1; threads <= o->threads; threads += SH_MAX(1, (int)o->threads - 1))
        SH_TRY(measure_threads(&run, o->only, threads, err));
    return write_results(&run, o->page, err);
}

int main(int argc, char **argv)
{
    bench_main_options o;
    sh_args args = {0};
    sh_error err = {0};
    if (argc > 1 && strcmp(argv[1], "child") == 0)
        return fleet_child_main(argc, argv);
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = sh_options_parse(&command, argc, argv, &o, &args, &err);
    if (status == SH_OK && args.n_positional > 0)
        status = sh_fail(&err, SH_ERR_USAGE, "'%s' is no option (see --help)", args.positional[0]);
    if (status == SH_OK && args.help) {
        sh_buf help;
        sh_buf_init(&help, 1u << 16);
        status = sh_options_help(&command, &help);
        fwrite(help.data, 1, help.len, stdout);
        sh_buf_release(&help);
    } else if (status == SH_OK) {
        status = run_all(&o, &err);
    }
    sh_args_release(&args);
    return status != SH_OK ? sh_error_report("shoal-bench-inference", &err) : 0;
}
