/* `shoal model generate`: goes on from a prompt. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/cli_answer.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

typedef struct {
    sh_cli_model_options model;
    sh_cli_context_options context;
    sh_cli_sampling_options sampling;
    const char *prompt;
    int64_t n;
    bool json;
} generate_options;

static const sh_option generate_table[] = {
    SH_CLI_MODEL_ROWS(generate_options, model),
    SH_OPT_STRING(generate_options, prompt, 'p', "prompt", "PROMPT", NULL,
                  "text to go on from; - reads it from standard input"),
    SH_OPT_INT(generate_options, n, 'n', "n", "N", 64, 1, SH_CONTEXT_MAX, "tokens to make at most"),
    SH_CLI_SAMPLING_ROWS(generate_options, sampling),
    SH_CLI_CONTEXT_ROWS(generate_options, context),
    SH_OPT_FLAG(generate_options, json, 0, "json", "print one JSON object at the end"),
};
static const sh_command generate_command = {
    "shoal model generate",
    "-m FILE -p PROMPT [-n N] [--temp T] [--seed S] [-t THREADS] [--lora ADAPTER]",
    generate_table,
    SH_COUNT(generate_table),
    "Goes on from a prompt; prints what comes after it. Stops at the model's end token, before a "
    "text given with --stop, after N tokens, or when the context is full.",
    "shoal model generate -m models/shoal-base-2.6m-f16.gguf -p 'The sea' -n 32 --temp 0",
};

static sh_status read_prompt(const generate_options *o, const sh_tokenizer *tokenizer,
                             int32_t **tokens, size_t *n, sh_error *err)
{
    uint8_t *input = NULL;
    const char *text = o->prompt;
    size_t bytes = strlen(text);
    if (strcmp(text, "-") == 0) {
        SH_TRY(sh_file_read("-", SH_TOKENIZE_BYTES_MAX, &input, &bytes, err));
        text = (const char *)input;
    }
    const sh_status status =
        sh_tokenize(tokenizer, text, bytes, SH_TOKENIZE_BOS | SH_TOKENIZE_SPECIAL, tokens, n, err);
    free(input);
    SH_TRY(status);
    if (*n == 0)
        return sh_fail(err, SH_ERR_USAGE, "-p PROMPT is empty and the model adds no BOS");
    return SH_OK;
}

static sh_status finish(const generate_options *o, const sh_cli_answer *a, const int32_t *prompt,
                        size_t n_prompt, sh_error *err)
{
    if (!o->json) {
        putchar('\n');
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_cli_answer_json(a, object);
    sh_json_set(object, "prompt_tokens", sh_cli_ids_json(prompt, n_prompt));
    return sh_cli_print_json(object, err);
}

int sh_cli_model_generate(int argc, char **argv)
{
    generate_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_cli_loaded l = {0};
    sh_cli_context c = {0};
    sh_cli_answer a = {0};
    int32_t *prompt = NULL;
    size_t n_prompt = 0;
    int exit_code = 0;
    if (!sh_cli_parse(&generate_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&generate_command, o.model.model, "-m FILE", &err));
    if (o.prompt == NULL)
        SH_GOTO(sh_cli_need(&generate_command, o.prompt, "-p PROMPT", &err));
    SH_GOTO(sh_cli_load(&o.model, &l, &err));
    SH_GOTO(read_prompt(&o, l.model->tokenizer, &prompt, &n_prompt, &err));
    SH_GOTO(sh_cli_context_create(&l, &o.context, &c, &err));
    const sh_cli_answer_setup setup = {.loaded = &l,
                                       .context = &c,
                                       .sampling = &o.sampling,
                                       .tokens_max = (size_t)o.n,
                                       .print = !o.json};
    SH_GOTO(sh_cli_answer_init(&a, &setup, &err));
    SH_GOTO(sh_cli_answer_run(&a, prompt, n_prompt, &err));
    SH_GOTO(finish(&o, &a, prompt, n_prompt, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(prompt);
    sh_cli_answer_release(&a);
    sh_cli_context_release(&c);
    sh_cli_unload(&l);
    sh_args_release(&args);
    return exit_code;
}
