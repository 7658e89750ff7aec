/* `shoal model synth`: models and adapters with random weights. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/model/synth.h"

#define SEED_MAX 9007199254740991.0 /* 2^53 - 1: what a double holds exactly */

typedef struct {
    const char *shape, *type, *out, *rope;
    int64_t lora, seed;
    double sigma;
    bool json;
} synth_options;

static const sh_option synth_table[] = {
    SH_OPT_STRING(
        synth_options, shape, 0, "shape", "SHAPE", NULL,
        "2.6m, 15m, 135m, 1.1b (llama), 0.5b (qwen2), 0.6b (qwen3), tiny-llama, tiny-qwen2, "
        "tiny-qwen3"),
    SH_OPT_STRING(synth_options, type, 0, "type", "TYPE", "Q8_0",
                  "type of the matrices: F32, F16, BF16, Q8_0, Q4_0"),
    SH_OPT_STRING(synth_options, out, 'o', "output", "OUT", NULL, "GGUF file to write"),
    SH_OPT_INT(synth_options, lora, 0, "lora", "RANK", 0, 0, 4096,
               "write an adapter of this rank for the shape instead of a model"),
    SH_OPT_INT(synth_options, seed, 0, "seed", "S", 1, 0, SEED_MAX,
               "the same seed gives the same bytes"),
    SH_OPT_REAL(synth_options, sigma, 0, "sigma", "X", 0.02, 1e-6, 10,
                "standard deviation of the weights"),
    SH_OPT_STRING(synth_options, rope, 0, "rope", "KIND", "plain",
                  "plain, linear:FACTOR, yarn:FACTOR, or freqs (factors as Llama 3 has them)"),
    SH_OPT_FLAG(synth_options, json, 0, "json", "print one JSON object"),
};
static const sh_command synth_command = {
    "shoal model synth",
    "--shape SHAPE [--type TYPE] [--lora RANK] -o OUT",
    synth_table,
    SH_COUNT(synth_table),
    "Writes a model with random weights in the shape of a known one, for measuring speed and for "
    "tests, or an adapter for it. The file is there whole or not at all.",
    "shoal model synth --shape 135m --type Q8_0 -o synth-135m-q8_0.gguf",
};

static sh_status parse_rope(const char *text, sh_synth_options *out, sh_error *err)
{
    static const struct {
        const char *prefix;
        sh_rope_scaling scaling;
    } scaled[] = {{"linear:", SH_ROPE_LINEAR}, {"yarn:", SH_ROPE_YARN}};
    out->rope_freqs = strcmp(text, "freqs") == 0;
    if (out->rope_freqs || strcmp(text, "plain") == 0)
        return SH_OK;
    for (size_t i = 0; i < SH_COUNT(scaled); i++) {
        const size_t n = strlen(scaled[i].prefix);
        char *end = NULL;
        if (strncmp(text, scaled[i].prefix, n) != 0)
            continue;
        out->rope = scaled[i].scaling;
        out->rope_factor = strtof(text + n, &end);
        if (end != text + n && *end == '\0' && isfinite(out->rope_factor))
            return SH_OK;
    }
    return sh_fail(err, SH_ERR_USAGE,
                   "--rope is '%.32s', not plain, freqs, linear:FACTOR or yarn:FACTOR", text);
}

static void on_progress(void *arg, size_t done, size_t n)
{
    (void)arg;
    sh_cli_progress("synth", "tensors", done, n);
}

static sh_status make(const synth_options *o, sh_error *err)
{
    sh_synth_options options = {
        .seed = (uint64_t)o->seed, .sigma = (float)o->sigma, .progress = on_progress};
    SH_TRY(sh_synth_find(o->shape, &options.shape, err));
    SH_TRY(sh_type_parse(o->type, &options.type, err));
    SH_TRY(parse_rope(o->rope, &options, err));
    if (o->lora > 0)
        return sh_synth_adapter(options.shape, (uint32_t)o->lora, options.seed, o->out, err);
    return sh_synth_model(&options, o->out, err);
}

static sh_status print_made(const synth_options *o, sh_error *err)
{
    sh_map map = {0};
    SH_TRY(sh_map_open(o->out, &map, err));
    const size_t bytes = map.bytes;
    sh_map_release(&map);
    if (!o->json) {
        printf("%s: %zu bytes\n", o->out, bytes);
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_json_set(object, "file", json_string(o->out));
    sh_json_set(object, "shape", json_string(o->shape));
    sh_json_set(object, "kind", json_string(o->lora > 0 ? "adapter" : "model"));
    sh_json_set(object, "bytes", json_integer((json_int_t)bytes));
    return sh_cli_print_json(object, err);
}

int sh_cli_model_synth(int argc, char **argv)
{
    synth_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    int exit_code = 0;
    if (!sh_cli_parse(&synth_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&synth_command, o.shape, "--shape SHAPE", &err));
    SH_GOTO(sh_cli_need(&synth_command, o.out, "-o OUT", &err));
    SH_GOTO(make(&o, &err));
    SH_GOTO(print_made(&o, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    sh_args_release(&args);
    return exit_code;
}
