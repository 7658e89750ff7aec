/* `shoal model tokenize`: token ids of a text. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

typedef struct {
    const char *model, *text;
    bool bos, special, json, pieces;
} tokenize_options;

static const sh_option tokenize_table[] = {
    SH_OPT_STRING(tokenize_options, model, 'm', "model", "FILE", NULL,
                  "GGUF model, or a GGUF with a vocabulary only"),
    SH_OPT_STRING(tokenize_options, text, 0, "text", "TEXT", NULL,
                  "this text instead of standard input"),
    SH_OPT_FLAG(tokenize_options, bos, 0, "bos", "put BOS first if the model says so"),
    SH_OPT_FLAG(tokenize_options, special, 0, "special",
                "take the text of special tokens for those tokens"),
    SH_OPT_FLAG(tokenize_options, pieces, 0, "pieces",
                "print each token's spelling after its id (with --json, objects)"),
    SH_OPT_FLAG(tokenize_options, json, 0, "json", "print one JSON array"),
};
static const sh_command tokenize_command = {
    "shoal model tokenize",
    "-m FILE [--pieces] [--json] [--text TEXT | < TEXT]",
    tokenize_table,
    SH_COUNT(tokenize_table),
    "Token ids of a text, one a line.",
    "printf 'the sea' | shoal model tokenize -m models/shoal-base-2.6m-f16.gguf --json",
};

/* Control characters are escaped as in JSON. */
static void print_escaped(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 0x20 || c == 0x7F)
            printf("\\u%04x", c);
        else
            putchar(c);
    }
}

/* The vocabulary's own spelling ("Ġthe", "▁the", "<0x0A>"): always UTF-8 in a sound file, and it
 * shows spaces. */
static void print_token(const sh_tokenizer *tokenizer, int32_t token, const tokenize_options *o)
{
    size_t n = 0;
    const char *piece = o->pieces ? sh_tokenizer_text(tokenizer, token, &n) : NULL;
    if (piece == NULL) {
        printf("%d", token);
        return;
    }
    printf(o->json ? "{\"id\":%d,\"piece\":\"" : "%d\t\"", token);
    print_escaped(piece, n);
    fputs(o->json ? "\"}" : "\"", stdout);
}

static sh_status print_tokens(const sh_tokenizer *tokenizer, const int32_t *tokens, size_t n,
                              const tokenize_options *o, sh_error *err)
{
    if (o->json)
        putchar('[');
    for (size_t i = 0; i < n; i++) {
        if (o->json && i > 0)
            putchar(',');
        print_token(tokenizer, tokens[i], o);
        if (!o->json)
            putchar('\n');
    }
    if (o->json)
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
    if (o.text == NULL)
        SH_GOTO(sh_file_read("-", SH_TOKENIZE_BYTES_MAX, &text, &bytes, &err));
    const unsigned flags = (o.bos ? SH_TOKENIZE_BOS : 0u) | (o.special ? SH_TOKENIZE_SPECIAL : 0u);
    const char *given = o.text != NULL ? o.text : (const char *)text;
    bytes = o.text != NULL ? strlen(o.text) : bytes;
    SH_GOTO(sh_tokenize(tokenizer, given, bytes, flags, &tokens, &n, &err));
    SH_GOTO(print_tokens(tokenizer, tokens, n, &o, &err));

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
