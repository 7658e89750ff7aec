/*
 * The subcommands of `shoal model`, a file each (cli_<name>.c), and what they share.
 */
#ifndef SH_AGGREGATOR_CLI_MODEL_H
#define SH_AGGREGATOR_CLI_MODEL_H

#include "aggregator/cli.h"
#include "shared/model/model.h"

#define SH_CLI_THREADS_MAX SH_TEAM_THREADS_MAX

/* What every command that runs a model takes: a member of its options and, in its table,
 * SH_CLI_MODEL_ROWS(options, member). */
typedef struct {
    const char *model, *kernel, *pack;
    sh_option_list lora;
    int64_t threads;
} sh_cli_model_options;
#define SH_CLI_MODEL_ROWS(T, member)                                                               \
    SH_OPT_STRING(T, member.model, 'm', "model", "FILE", NULL, "GGUF model"),                      \
        SH_OPT_LIST(T, member.lora, 0, "lora", "ADAPTER[=SCALE]",                                  \
                    "adapter to apply beside the model: GGUF, or a PEFT folder"),                  \
        SH_OPT_INT(T, member.threads, 't', "threads", "N", 1, 1, SH_CLI_THREADS_MAX,               \
                   "threads; the result is the same for any number"),                              \
        SH_OPT_STRING(T, member.kernel, 0, "kernel", "LEVEL", NULL,                                \
                      "instruction set to use, e.g. avx2 or portable; else the best there is"),    \
        SH_OPT_STRING(T, member.pack, 0, "pack", "WHERE", "memory",                                \
                      "packed form of the weights: memory, file (FILE.packed, made once), none")

/* And what those take that keep a context. */
typedef struct {
    int64_t length;
    const char *kv;
} sh_cli_context_options;
#define SH_CLI_CONTEXT_ROWS(T, member)                                                             \
    SH_OPT_INT(T, member.length, 'c', "context", "N", 0, 0, SH_CONTEXT_MAX,                        \
               "context to keep; 0: all that the model has"),                                      \
        SH_OPT_STRING(T, member.kv, 0, "kv", "TYPE", "f16", "cache of keys and values: f16, f32")

typedef struct {
    sh_model *model; /* packed as was asked for */
    sh_adapter *adapters[SH_ADAPTERS_MAX];
    float scales[SH_ADAPTERS_MAX];
    size_t n_adapters;
    sh_team *team; /* NULL: one thread */
} sh_cli_loaded;
/* Checks the options, then opens all of it. *out is zeroed before; sh_cli_unload also on error. */
SH_MUST_USE sh_status sh_cli_load(const sh_cli_model_options *options, sh_cli_loaded *out,
                                  sh_error *err);
void sh_cli_unload(sh_cli_loaded *loaded);

/* A context with the adapters, and the runner that it uses. */
typedef struct {
    sh_runner *runner;
    sh_context *context;
    uint32_t places;
} sh_cli_context;
SH_MUST_USE sh_status sh_cli_context_create(const sh_cli_loaded *loaded,
                                            const sh_cli_context_options *options,
                                            sh_cli_context *out, sh_error *err);
void sh_cli_context_release(sh_cli_context *context); /* before sh_cli_unload */

/* On standard error: "synth: 3 of 9 tensors", over and over in one line of a terminal, else, of
 * work that takes seconds, a line a tenth of the whole. */
void sh_cli_progress(const char *command, const char *what, size_t done, size_t n);

int sh_cli_model_inspect(int argc, char **argv);
int sh_cli_model_perplexity(int argc, char **argv);
int sh_cli_model_tokenize(int argc, char **argv);
int sh_cli_model_generate(int argc, char **argv);
int sh_cli_model_chat(int argc, char **argv);
int sh_cli_model_quantize(int argc, char **argv);
int sh_cli_model_convert(int argc, char **argv);
int sh_cli_model_synth(int argc, char **argv);
int sh_cli_model_bench(int argc, char **argv);

#endif
