/* `shoal model bench`: how fast a model runs here, and what this machine could do at most. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "aggregator/cli_model.h"
#include "shared/base/log.h"
#include "shared/base/memory.h"
#include "shared/base/rng.h"
#include "shared/math/ceiling.h"
#include "shared/math/kernel.h"
#include "shared/math/pack.h"

#define REPEATS_MAX   100
#define CEILING_BYTES (512u << 20) /* over any cache */
#define PURPOSE_BENCH 0x62656e63u  /* "benc" */

typedef struct {
    sh_cli_model_options model;
    const char *kv;
    int64_t prefill, decode, repeats;
    bool ceilings, json;
} bench_options;

static const sh_option bench_table[] = {
    SH_CLI_MODEL_ROWS(bench_options, model),
    SH_OPT_INT(bench_options, prefill, 'p', "prefill", "N", 512, 1, SH_CONTEXT_MAX,
               "tokens of the prompt, in one go, into an empty cache"),
    SH_OPT_INT(bench_options, decode, 'n', "decode", "N", 128, 1, SH_CONTEXT_MAX,
               "tokens made one at a time, from an empty cache on"),
    SH_OPT_INT(bench_options, repeats, 'r', "repeats", "N", 5, 1, REPEATS_MAX,
               "times that each is measured; the median counts"),
    SH_OPT_STRING(bench_options, kv, 0, "kv", "TYPE", "f16", "cache of keys and values: f16, f32"),
    SH_OPT_FLAG(bench_options, ceilings, 0, "ceilings",
                "measure the machine's read bandwidth and peak operations beside it"),
    SH_OPT_FLAG(bench_options, json, 0, "json", "print one JSON object"),
};
static const sh_command bench_command = {
    "shoal model bench",
    "-m FILE [-t THREADS] [-p N] [-n N] [-r N] [--lora ADAPTER] [--json]",
    bench_table,
    SH_COUNT(bench_table),
    "Tokens a second of prefill (a prompt of N tokens, logits of its last) and of decode (tokens "
    "one "
    "after another), each the median of the repeats, which take turns; time to load; memory.",
    "shoal model bench -m models/shoal-base-2.6m-f16.gguf -t 2 -p 256 -n 64",
};

/* What was measured of one kind: rates of the repeats, sorted at the end. */
typedef struct {
    double rates[REPEATS_MAX];
    size_t n;
} series;

typedef struct {
    const bench_options *o;
    sh_cli_loaded loaded;
    sh_cli_context context;
    int32_t *tokens;
    float *logits;
    double load_s, first_token_s;
    series prefill, decode, decode_base; /* decode_base: without the adapter */
    size_t rss_bytes, weight_bytes;
    double int8_per_s, f32_per_s;
    /* Of each repeat: decode with the adapter over without; memory's rate, and the share of it that
     * decode's weights had. On a busy machine a ratio of neighbours says more than one of medians.
     */
    series kept, read, share;
} bench;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void add_rate(series *s, double rate)
{
    s->rates[s->n++] = rate;
    qsort(s->rates, s->n, sizeof *s->rates, compare);
}

static double median(const series *s)
{
    return s->n % 2 != 0 ? s->rates[s->n / 2] : (s->rates[s->n / 2 - 1] + s->rates[s->n / 2]) / 2;
}

/* ---- loading ---- */

static size_t matrix_bytes(const sh_matrix *m)
{
    const size_t packed = m->packed != NULL ? sh_pack_bytes(m->type, m->out, m->in) : 0;
    return packed != 0 ? packed : sh_type_row_bytes(m->type, m->in) * m->out;
}

/* Bytes that one token's pass reads: every matrix once, the output's, too. */
static size_t weight_bytes(const sh_model *model)
{
    size_t bytes = matrix_bytes(&model->output);
    for (uint32_t i = 0; i < model->config.n_layers; i++)
        for (int m = 0; m < SH_LAYER_MATRICES; m++)
            bytes += matrix_bytes(&model->layers[i].m[m]);
    return bytes;
}

static sh_status load(bench *b, sh_error *err)
{
    const bench_options *o = b->o;
    const double begun = now_s();
    SH_TRY(sh_cli_load(&o->model, &b->loaded, err));
    const sh_model_config *c = &b->loaded.model->config;
    const int64_t n_max = SH_MAX(o->prefill, o->decode);
    if (n_max > c->context)
        return sh_fail(err, SH_ERR_LIMIT,
                       "-p and -n: %lld tokens are over the model's context of %u",
                       (long long)n_max, c->context);
    const sh_cli_context_options context = {.length = n_max, .kv = o->kv};
    SH_TRY(sh_cli_context_create(&b->loaded, &context, &b->context, err));
    b->tokens = sh_calloc((size_t)n_max, sizeof *b->tokens);
    b->logits = sh_alloc_aligned(c->vocab * sizeof *b->logits);
    if (b->tokens == NULL || b->logits == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "bench: out of memory");
    sh_rng rng;
    sh_rng_init(&rng, 0, 0, PURPOSE_BENCH);
    for (int64_t i = 0; i < n_max; i++)
        b->tokens[i] = (int32_t)(sh_rng_u32(&rng) % c->vocab);
    b->load_s = now_s() - begun;
    SH_TRY(sh_context_decode(b->context.context, b->tokens, 1, SH_LOGITS_LAST, b->logits, err));
    b->first_token_s = now_s() - begun;
    b->weight_bytes = weight_bytes(b->loaded.model);
    return SH_OK;
}

/* ---- measuring ---- */

static sh_status measure_prefill(bench *b, series *s, sh_error *err)
{
    sh_context_truncate(b->context.context, 0);
    const double begun = now_s();
    SH_TRY(sh_context_decode(b->context.context, b->tokens, (uint32_t)b->o->prefill, SH_LOGITS_LAST,
                             b->logits, err));
    add_rate(s, (double)b->o->prefill / (now_s() - begun));
    return SH_OK;
}

static sh_status measure_decode(bench *b, double *rate, sh_error *err)
{
    sh_context_truncate(b->context.context, 0);
    const double begun = now_s();
    for (int64_t i = 0; i < b->o->decode; i++)
        SH_TRY(sh_context_decode(b->context.context, &b->tokens[i], 1, SH_LOGITS_LAST, b->logits,
                                 err));
    *rate = (double)b->o->decode / (now_s() - begun);
    return SH_OK;
}

static sh_status measure_memory(bench *b, double decode, sh_error *err)
{
    double read;
    SH_TRY(sh_ceiling_read(b->loaded.team, CEILING_BYTES, &read, err));
    add_rate(&b->read, read);
    add_rate(&b->share, decode * (double)b->weight_bytes / read);
    return SH_OK;
}

static sh_status use_adapter(bench *b, bool on, sh_error *err)
{
    const sh_cli_loaded *l = &b->loaded;
    return sh_context_set_adapters(b->context.context, (const sh_adapter *const *)l->adapters,
                                   l->scales, on ? l->n_adapters : 0, err);
}

static sh_status measure(bench *b, sh_error *err)
{
    const bool terminal = isatty(STDERR_FILENO) == 1;
    double base, rate; /* the first is to warm up */
    SH_TRY(measure_decode(b, &rate, err));
    for (int64_t i = 0; i < b->o->repeats; i++) {
        if (terminal)
            fprintf(stderr, "\rbench: repeat %lld of %lld", (long long)i + 1,
                    (long long)b->o->repeats);
        if (b->loaded.n_adapters > 0) {
            SH_TRY(use_adapter(b, false, err));
            SH_TRY(measure_decode(b, &base, err));
            SH_TRY(use_adapter(b, true, err));
            add_rate(&b->decode_base, base);
        }
        SH_TRY(measure_prefill(b, &b->prefill, err));
        SH_TRY(measure_decode(b, &rate, err));
        add_rate(&b->decode, rate);
        if (b->loaded.n_adapters > 0)
            add_rate(&b->kept, rate / base);
        if (i == 0)
            b->rss_bytes = sh_memory_now().resident;
        if (b->o->ceilings)
            SH_TRY(measure_memory(b, rate, err));
    }
    if (b->o->ceilings) {
        b->int8_per_s = sh_ceiling_int8(b->loaded.team);
        b->f32_per_s = sh_ceiling_f32(b->loaded.team);
    }
    if (terminal)
        fputc('\n', stderr);
    return SH_OK;
}

/* ---- printing ---- */

static void set_series(json_t *object, const char *name, const series *s)
{
    char key[64];
    snprintf(key, sizeof key, "%s_tokens_per_s", name);
    sh_json_set(object, key, sh_json_number(median(s)));
    snprintf(key, sizeof key, "%s_samples", name);
    json_t *samples = json_array();
    for (size_t i = 0; i < s->n; i++)
        json_array_append_new(samples, sh_json_number(s->rates[i]));
    sh_json_set(object, key, samples);
}

static sh_status print_json(const bench *b, sh_error *err)
{
    const bench_options *o = b->o;
    json_t *object = json_object();
    set_series(object, "prefill", &b->prefill);
    set_series(object, "decode", &b->decode);
    if (b->loaded.n_adapters > 0)
        set_series(object, "decode_without_lora", &b->decode_base);
    if (b->loaded.n_adapters > 0)
        sh_json_set(object, "decode_with_over_without_lora", sh_json_number(median(&b->kept)));
    sh_json_set(object, "prefill_tokens", json_integer(o->prefill));
    sh_json_set(object, "decode_tokens", json_integer(o->decode));
    sh_json_set(object, "load_s", sh_json_number(b->load_s));
    sh_json_set(object, "first_token_s", sh_json_number(b->first_token_s));
    sh_json_set(object, "rss_bytes", json_integer((json_int_t)b->rss_bytes));
    sh_json_set(object, "weight_bytes", json_integer((json_int_t)b->weight_bytes));
    sh_json_set(object, "pack", json_string(o->model.pack));
    sh_json_set(object, "kv", json_string(o->kv));
    sh_json_set(object, "kernel", json_string(sh_kernel_level()));
    sh_json_set(object, "threads", json_integer(o->model.threads));
    if (o->ceilings) {
        sh_json_set(object, "read_bytes_per_s", sh_json_number(median(&b->read)));
        sh_json_set(object, "decode_read_share", sh_json_number(median(&b->share)));
        sh_json_set(object, "int8_ops_per_s", sh_json_number(b->int8_per_s));
        sh_json_set(object, "f32_flops", sh_json_number(b->f32_per_s));
    }
    return sh_cli_print_json(object, err);
}

static void print_series(const char *what, int64_t tokens, const series *s)
{
    printf("%-22s %10.1f tokens/s  (%lld tokens; %.1f to %.1f)\n", what, median(s),
           (long long)tokens, s->rates[0], s->rates[s->n - 1]);
}

static sh_status print_text(const bench *b, sh_error *err)
{
    const bench_options *o = b->o;
    const double read = median(&b->decode) * (double)b->weight_bytes;
    printf("kernel %s, %lld thread%s, weights %s, cache %s\n", sh_kernel_level(),
           (long long)o->model.threads, o->model.threads == 1 ? "" : "s",
           strcmp(o->model.pack, "none") == 0 ? "in place" : "packed", o->kv);
    print_series("prefill", o->prefill, &b->prefill);
    if (b->loaded.n_adapters > 0)
        print_series("decode, no adapter", o->decode, &b->decode_base);
    print_series(b->loaded.n_adapters > 0 ? "decode, adapter" : "decode", o->decode, &b->decode);
    if (b->loaded.n_adapters > 0)
        printf("%-22s %10.3f of without\n", "decode, adapter", median(&b->kept));
    printf("%-22s %10.1f GB/s of weights\n", "decode reads", read * 1e-9);
    if (o->ceilings) {
        printf("%-22s %10.1f GB/s (decode: %.0f %%)\n", "memory reads", median(&b->read) * 1e-9,
               100 * median(&b->share));
        printf("%-22s %10.1f Gop/s int8, %.1f GFLOP/s\n", "cores do at most", b->int8_per_s * 1e-9,
               b->f32_per_s * 1e-9);
    }
    printf("%-22s %10.3f s, first token after %.3f s\n", "load", b->load_s, b->first_token_s);
    printf("%-22s %10.1f MB, of it weights %.1f MB\n", "resident", (double)b->rss_bytes * 1e-6,
           (double)b->weight_bytes * 1e-6);
    return sh_cli_flush(err);
}

static void release(bench *b)
{
    free(b->tokens);
    free(b->logits);
    sh_cli_context_release(&b->context);
    sh_cli_unload(&b->loaded);
}

int sh_cli_model_bench(int argc, char **argv)
{
    bench_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    int exit_code = 0;
    bench b = {.o = &o};
    if (!sh_cli_parse(&bench_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&bench_command, o.model.model, "-m FILE", &err));
    SH_GOTO(load(&b, &err));
    SH_GOTO(measure(&b, &err));
    SH_GOTO(o.json ? print_json(&b, &err) : print_text(&b, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    release(&b);
    sh_args_release(&args);
    return exit_code;
}
