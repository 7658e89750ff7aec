/*
 * The subcommands of `shoal model`, a file each (cli_<name>.c), and what they share.
 */
#ifndef SH_AGGREGATOR_CLI_MODEL_H
#define SH_AGGREGATOR_CLI_MODEL_H

#include "aggregator/cli.h"
#include "shared/model/model.h"

#define SH_CLI_THREADS_MAX 256

typedef struct {
    sh_model *model;
    sh_adapter *adapter; /* NULL: none */
} sh_cli_loaded;
/* lora may be NULL. */
SH_MUST_USE sh_status sh_cli_load(const char *model, const char *lora, sh_cli_loaded *out,
                                  sh_error *err);
void sh_cli_unload(sh_cli_loaded *loaded);

int sh_cli_model_inspect(int argc, char **argv);
int sh_cli_model_perplexity(int argc, char **argv);
int sh_cli_model_tokenize(int argc, char **argv);
int sh_cli_model_generate(int argc, char **argv);
int sh_cli_model_quantize(int argc, char **argv);

#endif
