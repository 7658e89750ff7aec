/* `shoal model generate`: goes on from a prompt. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/log.h"
#include "shared/model/sampler.h"

#define SEED_MAX       9007199254740991.0 /* 2^53 - 1: what a double holds exactly */
#define PURPOSE_SAMPLE 0x73616d70u        /* "samp" */
#define PIECE_BYTES    (1u << 20)

typedef struct {
    const char *model, *prompt, *lora;
    int64_t n, seed, context;
    double temperature;
    bool json;
} generate_options;

static const sh_option generate_table[] = {
    SH_OPT_STRING(generate_options, model, 'm', "model", "FILE", NULL, "GGUF model"),
    SH_OPT_STRING(generate_options, prompt, 'p', "prompt", "PROMPT", NULL, "text to go on from"),
    SH_OPT_INT(generate_options, n, 'n', "n", "N", 64, 1, SH_CONTEXT_MAX, "tokens to make at most"),
    SH_OPT_REAL(generate_options, temperature, 0, "temp", "T", 0.8, 0, 100,
                "temperature; 0 always takes the likeliest token"),
    SH_OPT_INT(generate_options, seed, 0, "seed", "S", 0, 0, SEED_MAX, "seed of the sampling"),
    SH_OPT_INT(generate_options, context, 'c', "context", "N", 0, 0, SH_CONTEXT_MAX,
               "context to keep; 0: all that the model has"),
    SH_OPT_STRING(generate_options, lora, 0, "lora", "ADAPTER", NULL,
                  "GGUF adapter to apply beside the model"),
    SH_OPT_FLAG(generate_options, json, 0, "json", "print one JSON object at the end"),
};
static const sh_command generate_command = {
    "shoal model generate",
    "-m FILE -p PROMPT [-n N] [--temp T] [--seed S] [--lora ADAPTER]",
    generate_table,
    SH_COUNT(generate_table),
    "Goes on from a prompt; prints what comes after it. Stops at the model's end token, after N "
    "tokens, or when the context is full.",
    "shoal model generate -m models/shoal-base-2.6m-f16.gguf -p 'The sea' -n 32 --temp 0",
};

/* A run of generate: tokens and text so far. */
typedef struct {
    const sh_model *model;
    sh_context *context;
    const generate_options *o;
    int32_t *prompt, *tokens;
    size_t n_prompt, n;
    sh_buf text;
    const char *stop;
} generation;

static sh_status prepare(generation *g, const sh_cli_loaded *l, sh_error *err)
{
    const generate_options *o = g->o;
    const sh_model *model = l->model;
    g->model = model;
    SH_TRY(sh_tokenize(model->tokenizer, o->prompt, strlen(o->prompt),
                       SH_TOKENIZE_BOS | SH_TOKENIZE_SPECIAL, &g->prompt, &g->n_prompt, err));
    if (g->n_prompt == 0)
        return sh_fail(err, SH_ERR_USAGE, "-p PROMPT is empty and the model adds no BOS");
    if (o->context > model->config.context)
        return sh_fail(err, SH_ERR_LIMIT, "-c %lld is over the model's context of %u",
                       (long long)o->context, model->config.context);
    const sh_context_options options = {.n_tokens_max = o->context != 0 ? (uint32_t)o->context
                                                                        : model->config.context};
    if (g->n_prompt > options.n_tokens_max)
        return sh_fail(err, SH_ERR_LIMIT, "the prompt has %zu tokens, the context holds %u",
                       g->n_prompt, options.n_tokens_max);
    SH_TRY(sh_context_create(model, &options, &g->context, err));
    if (l->adapter != NULL) {
        const sh_adapter *adapter = l->adapter;
        SH_TRY(sh_context_set_adapters(g->context, &adapter, 1, err));
    }
    g->tokens = sh_calloc((size_t)o->n, sizeof *g->tokens);
    if (g->tokens == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "generate: out of memory");
    return SH_OK;
}

/* Appends a token's text and, unless it goes into JSON at the end, prints it at once. */
static sh_status say(generation *g, int32_t token, sh_error *err)
{
    const size_t before = g->text.len;
    g->tokens[g->n++] = token;
    const sh_status status = sh_detokenize(g->model->tokenizer, token, &g->text);
    if (status != SH_OK)
        return sh_fail(err, status, "generate: over %u bytes of text", PIECE_BYTES);
    if (g->o->json)
        return SH_OK;
    fwrite(g->text.data + before, 1, g->text.len - before, stdout);
    return sh_cli_flush(err);
}

static sh_status generate(generation *g, sh_error *err)
{
    const uint32_t vocab = g->model->config.vocab;
    const int32_t eos = sh_tokenizer_eos(g->model->tokenizer);
    sh_rng rng;
    sh_rng_init(&rng, (uint64_t)g->o->seed, 0, PURPOSE_SAMPLE);
    float *logits = sh_alloc_aligned(vocab * sizeof *logits);
    if (logits == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "generate: out of memory");
    const uint32_t places = g->o->context != 0 ? (uint32_t)g->o->context : g->model->config.context;
    sh_status status = SH_OK;
    SH_GOTO(sh_context_decode(g->context, g->prompt, (uint32_t)g->n_prompt, SH_LOGITS_LAST, logits,
                              err));
    for (;;) {
        const int32_t token = sh_sample(logits, vocab, (float)g->o->temperature, &rng);
        g->stop = "end";
        if (token == eos)
            break;
        SH_GOTO(say(g, token, err));
        g->stop = "length";
        if (g->n == (size_t)g->o->n)
            break;
        g->stop = "context";
        if (sh_context_length(g->context) == places)
            break;
        SH_GOTO(sh_context_decode(g->context, &token, 1, SH_LOGITS_LAST, logits, err));
    }

cleanup:
    free(logits);
    return status;
}

static json_t *ids_json(const int32_t *tokens, size_t n)
{
    json_t *array = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(array, json_integer(tokens[i]));
    return array;
}

static sh_status finish(const generation *g, sh_error *err)
{
    if (!g->o->json) {
        putchar('\n');
        return sh_cli_flush(err);
    }
    json_t *o = json_object();
    json_t *text =
        json_stringn(g->text.data != NULL ? (const char *)g->text.data : "", g->text.len);
    sh_json_set(o, "text", text != NULL ? text : json_null()); /* cut inside a character */
    sh_json_set(o, "prompt_tokens", ids_json(g->prompt, g->n_prompt));
    sh_json_set(o, "tokens", ids_json(g->tokens, g->n));
    sh_json_set(o, "stop", json_string(g->stop));
    return sh_cli_print_json(o, err);
}

int sh_cli_model_generate(int argc, char **argv)
{
    generate_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_cli_loaded l = {0};
    generation g = {.o = &o};
    int exit_code = 0;
    if (!sh_cli_parse(&generate_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    sh_buf_init(&g.text, PIECE_BYTES);
    SH_GOTO(sh_cli_need(&generate_command, o.model, "-m FILE", &err));
    if (o.prompt == NULL)
        SH_GOTO(sh_cli_need(&generate_command, o.prompt, "-p PROMPT", &err));
    SH_GOTO(sh_cli_load(o.model, o.lora, &l, &err));
    SH_GOTO(prepare(&g, &l, &err));
    SH_GOTO(generate(&g, &err));
    SH_GOTO(finish(&g, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(g.prompt);
    free(g.tokens);
    sh_buf_release(&g.text);
    sh_context_destroy(&g.context);
    sh_cli_unload(&l);
    sh_args_release(&args);
    return exit_code;
}
