/* `shoal model`: its menu, and how its subcommands open a model. */
#include "aggregator/cli_model.h"

sh_status sh_cli_load(const char *model, const char *lora, sh_cli_loaded *out, sh_error *err)
{
    SH_TRY(sh_model_open(model, &out->model, err));
    if (lora == NULL)
        return SH_OK;
    return sh_adapter_open(lora, &out->model->config, &out->adapter, err);
}

void sh_cli_unload(sh_cli_loaded *loaded)
{
    sh_adapter_destroy(&loaded->adapter);
    sh_model_close(&loaded->model);
}

int sh_cli_model(int argc, char **argv)
{
    static const sh_cli_entry entries[] = {
        {"inspect", "what a GGUF file holds, and whether it can be run", sh_cli_model_inspect},
        {"perplexity", "perplexity of a text", sh_cli_model_perplexity},
        {"tokenize", "token ids of a text", sh_cli_model_tokenize},
        {"generate", "go on from a prompt", sh_cli_model_generate},
        {"quantize", "write the model in another type", sh_cli_model_quantize},
    };
    static const sh_cli_menu menu = {
        .name = "shoal model",
        .about = "Works on model files in GGUF.",
        .entries = entries,
        .n = SH_COUNT(entries),
    };
    return sh_cli_dispatch(&menu, argc, argv);
}
