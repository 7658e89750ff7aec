/* `shoal model`: its menu, and how its subcommands open a model. */
#include "aggregator/cli_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/math/kernel.h"
#include "shared/model/convert.h"

#define PROGRESS_AFTER_MS 2000 /* shorter work needs no lines in a log */

/* The scale behind the last '=' when all behind it is a number: "a.gguf=0.5". */
static sh_status split_scale(const char *text, char **path, float *scale, sh_error *err)
{
    size_t n = strlen(text);
    *scale = 1;
    const char *equals = strrchr(text, '=');
    if (equals != NULL && equals[1] != '\0') {
        char *end;
        const float given = strtof(equals + 1, &end);
        if (*end == '\0') {
            if (!isfinite(given))
                return sh_fail(err, SH_ERR_USAGE, "--lora %s: the scale is no finite number", text);
            *scale = given;
            n = (size_t)(equals - text);
        }
    }
    if (n == 0)
        return sh_fail(err, SH_ERR_USAGE, "--lora %s: ADAPTER[=SCALE] is needed", text);
    *path = strndup(text, n);
    if (*path == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    return SH_OK;
}

static sh_status load_adapters(const sh_option_list *lora, sh_cli_loaded *l, sh_error *err)
{
    if (lora->n > SH_ADAPTERS_MAX)
        return sh_fail(err, SH_ERR_USAGE, "--lora is given %zu times: at most %d adapters", lora->n,
                       SH_ADAPTERS_MAX);
    for (size_t i = 0; i < lora->n; i++) {
        char *path = NULL;
        SH_TRY(split_scale(lora->items[i], &path, &l->scales[i], err));
        const sh_status status = sh_adapter_open_any(path, &l->model->config, &l->adapters[i], err);
        free(path);
        SH_TRY(status);
        l->n_adapters++;
    }
    return SH_OK;
}

static sh_status pack(const sh_cli_model_options *o, sh_cli_loaded *l, sh_error *err)
{
    char *cache = NULL;
    bool cached;
    if (strcmp(o->pack, "none") == 0)
        return SH_OK;
    if (strcmp(o->pack, "file") == 0 && asprintf(&cache, "%s" SH_PACK_SUFFIX, o->model) < 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    const sh_pack_options options = {.cache = cache, .team = l->team};
    const sh_status status = sh_model_pack(l->model, &options, &cached, err);
    free(cache);
    return status;
}

sh_status sh_cli_load(const sh_cli_model_options *options, sh_cli_loaded *out, sh_error *err)
{
    const sh_cli_model_options *o = options;
    if (strcmp(o->pack, "memory") != 0 && strcmp(o->pack, "file") != 0 &&
        strcmp(o->pack, "none") != 0)
        return sh_fail(err, SH_ERR_USAGE, "--pack %.100s: memory, file or none is needed", o->pack);
    SH_TRY(sh_kernel_force(o->kernel, err));
    SH_TRY(sh_model_open(o->model, &out->model, err));
    SH_TRY(load_adapters(&o->lora, out, err));
    if (o->threads > 1)
        SH_TRY(sh_team_create((unsigned)o->threads, &out->team, err));
    return pack(o, out, err);
}

void sh_cli_unload(sh_cli_loaded *loaded)
{
    for (size_t i = 0; i < loaded->n_adapters; i++)
        sh_adapter_destroy(&loaded->adapters[i]);
    loaded->n_adapters = 0;
    sh_model_close(&loaded->model);
    sh_team_destroy(&loaded->team);
}

sh_status sh_cli_context_create(const sh_cli_loaded *loaded, const sh_cli_context_options *options,
                                sh_cli_context *out, sh_error *err)
{
    const sh_cli_loaded *l = loaded;
    const uint32_t most = l->model->config.context;
    const bool half = strcmp(options->kv, "f16") == 0;
    if (!half && strcmp(options->kv, "f32") != 0)
        return sh_fail(err, SH_ERR_USAGE, "--kv %.100s: f16 or f32 is needed", options->kv);
    if (options->length > most)
        return sh_fail(err, SH_ERR_LIMIT, "-c %lld is over the model's context of %u",
                       (long long)options->length, most);
    out->places = options->length != 0 ? (uint32_t)options->length : most;
    const sh_runner_options runner = {.team = l->team};
    SH_TRY(sh_runner_create(l->model, &runner, &out->runner, err));
    const sh_context_options context = {
        .n_tokens_max = out->places, .kv = half ? SH_KV_F16 : SH_KV_F32, .runner = out->runner};
    SH_TRY(sh_context_create(l->model, &context, &out->context, err));
    if (l->n_adapters == 0)
        return SH_OK;
    return sh_context_set_adapters(out->context, (const sh_adapter *const *)l->adapters, l->scales,
                                   l->n_adapters, err);
}

void sh_cli_context_release(sh_cli_context *context)
{
    sh_context_destroy(&context->context);
    sh_runner_destroy(&context->runner);
}

void sh_cli_progress(const char *command, const char *what, size_t done, size_t n)
{
    static uint64_t begun_ms; /* one command a process */
    const size_t now = n > 0 ? done * 10 / n : 10,
                 before = done > 0 && n > 0 ? (done - 1) * 10 / n : 0;
    if (begun_ms == 0)
        begun_ms = sh_clock_mono_ms();
    if (isatty(STDERR_FILENO) == 1)
        fprintf(stderr, "\r%s: %zu of %zu %s%s", command, done, n, what, done == n ? "\n" : "");
    else if (now != before && sh_clock_mono_ms() - begun_ms >= PROGRESS_AFTER_MS)
        fprintf(stderr, "%s: %zu of %zu %s\n", command, done, n, what);
}

int sh_cli_model(int argc, char **argv)
{
    static const sh_cli_entry entries[] = {
        {"inspect", "what a GGUF file holds, and whether it can be run", sh_cli_model_inspect},
        {"perplexity", "perplexity of a text", sh_cli_model_perplexity},
        {"tokenize", "token ids of a text", sh_cli_model_tokenize},
        {"generate", "go on from a prompt", sh_cli_model_generate},
        {"chat", "talk with a model", sh_cli_model_chat},
        {"quantize", "write the model in another type", sh_cli_model_quantize},
        {"convert", "Hugging Face models to GGUF, adapters between PEFT and GGUF",
         sh_cli_model_convert},
        {"bench", "how fast a model runs here", sh_cli_model_bench},
        {"synth", "make a model with random weights", sh_cli_model_synth},
    };
    static const sh_cli_menu menu = {
        .name = "shoal model",
        .about = "Works on model files in GGUF.",
        .entries = entries,
        .n = SH_COUNT(entries),
    };
    return sh_cli_dispatch(&menu, argc, argv);
}
