/* `shoal model tokenize`: token ids of a text. */
#include <stdlib.h>

#include "aggregator/cli_model.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

typedef struct {
    const char *model;
    bool bos, special, json;
} tokenize_options;

static const sh_option tokenize_table[] = {
    SH_OPT_STRING(tokenize_options, model, 'm', "model", "FILE", NULL,
                  "GGUF model, or a GGUF with a vocabulary only"),
    SH_OPT_FLAG(tokenize_options, bos, 0, "bos", "put BOS first if the model says so"),
    SH_OPT_FLAG(tokenize_options, special, 0, "special",
                "take the text of special tokens for those tokens"),
    SH_OPT_FLAG(tokenize_options, json, 0, "json", "print one JSON array"),
};
static const sh_command tokenize_command = {
    "shoal model tokenize",
    "-m FILE [--json] < TEXT",
    tokenize_table,
    SH_COUNT(tokenize_table),
    "Token ids of the bytes on standard input, one a line.",
    "printf 'the sea' | shoal model tokenize -m models/shoal-base-2.6m-f16.gguf --json",
};

static sh_status print_tokens(const int32_t *tokens, size_t n, bool json, sh_error *err)
{
    if (json)
        putchar('[');
    for (size_t i = 0; i < n; i++) {
        if (json)
            printf("%s%d", i > 0 ? "," : "", tokens[i]);
        else
            printf("%d\n", tokens[i]);
    }
    if (json)
        fputs("]\n", stdout);
    return sh_cli_flush(err);
}

int sh_cli_model_tokenize(int argc, char **argv)
{
    tokenize_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_gguf *gguf = NULL;
    sh_tokenizer *tokenizer = NULL;
    uint8_t *text = NULL;
    int32_t *tokens = NULL;
    size_t bytes = 0, n = 0;
    int exit_code = 0;
    if (!sh_cli_parse(&tokenize_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&tokenize_command, o.model, "-m FILE", &err));
    SH_GOTO(sh_gguf_open(o.model, &gguf, &err));
    SH_GOTO(sh_tokenizer_load(gguf, &tokenizer, &err));
    SH_GOTO(sh_file_read("-", SH_TOKENIZE_BYTES_MAX, &text, &bytes, &err));
    const unsigned flags = (o.bos ? SH_TOKENIZE_BOS : 0u) | (o.special ? SH_TOKENIZE_SPECIAL : 0u);
    SH_GOTO(sh_tokenize(tokenizer, (const char *)text, bytes, flags, &tokens, &n, &err));
    SH_GOTO(print_tokens(tokens, n, o.json, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(text);
    free(tokens);
    sh_tokenizer_destroy(&tokenizer);
    sh_gguf_close(&gguf);
    sh_args_release(&args);
    return exit_code;
}
