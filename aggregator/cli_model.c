/* `shoal model`: perplexity, tokenize, generate, quantize (inspect is in cli_inspect.c). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "aggregator/cli.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/math/kernel.h"
#include "shared/math/pool.h"
#include "shared/model/model.h"
#include "shared/model/quantize.h"
#include "shared/model/sampler.h"

#define THREADS_MAX    256
#define SEED_MAX       9007199254740991.0 /* 2^53 - 1: what a double holds exactly */
#define PURPOSE_SAMPLE 0x73616d70u        /* "samp" */
#define PIECE_BYTES    (1u << 20)

/* ---- perplexity ---- */

#define CHUNKS_A_STEP 32 /* between two words of progress; fixed, so that sums are, too */
#define CHUNKS_A_LINE 1024

typedef struct {
    const char *model, *file, *lora;
    int64_t context, threads;
    bool json;
} perplexity_options;

static const sh_option perplexity_table[] = {
    SH_OPT_STRING(perplexity_options, model, 'm', "model", "FILE", NULL, "GGUF model"),
    SH_OPT_STRING(perplexity_options, file, 'f', "file", "TEXT", NULL,
                  "text to measure on; - is standard input"),
    SH_OPT_INT(perplexity_options, context, 'c', "context", "N", 256, 4, SH_CONTEXT_MAX,
               "tokens a chunk"),
    SH_OPT_STRING(perplexity_options, lora, 0, "lora", "ADAPTER", NULL,
                  "GGUF adapter to apply beside the model"),
    SH_OPT_INT(perplexity_options, threads, 't', "threads", "N", 1, 1, THREADS_MAX,
               "threads; the result is the same for any number"),
    SH_OPT_FLAG(perplexity_options, json, 0, "json", "print one JSON object"),
};
static const sh_command perplexity_command = {
    "shoal model perplexity",
    "-m FILE -f TEXT [-c N] [--json]",
    perplexity_table,
    SH_COUNT(perplexity_table),
    "Perplexity of a text, as llama-perplexity measures it: the text is cut into chunks, each is "
    "evaluated alone, and the tokens of its second half are scored.",
    "shoal model perplexity -m models/shoal-base-2.6m-f16.gguf -f text.txt -c 256",
};

typedef struct {
    sh_model *model;
    sh_adapter *adapter;
} loaded;

static sh_status load(const char *model, const char *lora, loaded *out, sh_error *err)
{
    SH_TRY(sh_model_open(model, &out->model, err));
    if (lora == NULL)
        return SH_OK;
    return sh_adapter_open(lora, &out->model->config, &out->adapter, err);
}

static void unload(loaded *l)
{
    sh_adapter_destroy(&l->adapter);
    sh_model_close(&l->model);
}

/* A file's tokens, less one final newline, as the protocol has it. */
static sh_status read_tokens(const sh_model *model, const char *path, int32_t **out, size_t *n,
                             sh_error *err)
{
    uint8_t *text;
    size_t bytes;
    SH_TRY(sh_file_read(path, SH_TOKENIZE_BYTES_MAX, &text, &bytes, err));
    if (bytes > 0 && text[bytes - 1] == '\n')
        bytes--;
    sh_status status = sh_tokenize(model->tokenizer, (const char *)text, bytes,
                                   SH_TOKENIZE_BOS | SH_TOKENIZE_SPECIAL, out, n, err);
    free(text);
    return status;
}

static void show_progress(size_t done, size_t n, bool terminal)
{
    if (terminal)
        fprintf(stderr, "\rperplexity: %zu of %zu chunks", done, n);
    else if (done % CHUNKS_A_LINE == 0)
        fprintf(stderr, "perplexity: %zu of %zu chunks\n", done, n);
}

static sh_status measure(const loaded *l, const perplexity_options *o, const int32_t *tokens,
                         size_t n_tokens, sh_loss *out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_pool *pool = NULL;
    sh_loss total = {0};
    const bool terminal = isatty(STDERR_FILENO) == 1;
    const size_t chunk = (size_t)o->context, n_chunks = n_tokens / chunk;
    if (n_chunks == 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: %zu tokens are too few for one chunk of %zu",
                       o->file, n_tokens, chunk);
    if (o->threads > 1)
        SH_GOTO(sh_pool_create((unsigned)o->threads, &pool, err));
    for (size_t done = 0; done < n_chunks;) {
        const size_t now = SH_MIN(CHUNKS_A_STEP, n_chunks - done);
        const sh_loss_text text = {tokens + done * chunk, now * chunk, (uint32_t)chunk, true};
        sh_loss part;
        SH_GOTO(sh_model_loss_pool(l->model, l->adapter, &text, pool, &part, err));
        total.nll_sum += part.nll_sum;
        total.n_scored += part.n_scored;
        total.n_tokens += part.n_tokens;
        done += now;
        show_progress(done, n_chunks, terminal);
    }
    *out = total;

cleanup:
    if (terminal)
        fputc('\n', stderr);
    sh_pool_destroy(&pool);
    return status;
}

static sh_status print_perplexity(const perplexity_options *o, const sh_loss *loss, size_t n_tokens,
                                  sh_error *err)
{
    const double mean = loss->nll_sum / (double)loss->n_scored;
    const size_t n_chunks = n_tokens / (size_t)o->context;
    if (!isfinite(mean))
        return sh_fail(err, SH_ERR_INVALID, "%s: its loss on this text is not a finite number",
                       o->model);
    if (o->json) {
        json_t *object = json_object();
        sh_json_set(object, "perplexity", sh_json_number(exp(mean)));
        sh_json_set(object, "nll", sh_json_number(mean));
        sh_json_set(object, "tokens", json_integer((json_int_t)n_tokens));
        sh_json_set(object, "scored_tokens", json_integer((json_int_t)loss->n_scored));
        sh_json_set(object, "chunks", json_integer((json_int_t)n_chunks));
        sh_json_set(object, "context", json_integer(o->context));
        sh_json_set(object, "kernel", json_string(sh_kernel_level()));
        return sh_cli_print_json(object, err);
    }
    printf("perplexity %.4f  (%llu of %zu tokens scored, %zu chunks of %lld)\n", exp(mean),
           (unsigned long long)loss->n_scored, n_tokens, n_chunks, (long long)o->context);
    return sh_cli_flush(err);
}

static int run_perplexity(int argc, char **argv)
{
    perplexity_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    loaded l = {0};
    int32_t *tokens = NULL;
    size_t n_tokens = 0;
    sh_loss loss = {0};
    int exit_code = 0;
    if (!sh_cli_parse(&perplexity_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&perplexity_command, o.model, "-m FILE", &err));
    SH_GOTO(sh_cli_need(&perplexity_command, o.file, "-f TEXT", &err));
    SH_GOTO(load(o.model, o.lora, &l, &err));
    SH_GOTO(read_tokens(l.model, o.file, &tokens, &n_tokens, &err));
    SH_GOTO(measure(&l, &o, tokens, n_tokens, &loss, &err));
    SH_GOTO(print_perplexity(&o, &loss, n_tokens, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(tokens);
    unload(&l);
    sh_args_release(&args);
    return exit_code;
}

/* ---- tokenize ---- */

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

static int run_tokenize(int argc, char **argv)
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

/* ---- generate ---- */

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

static sh_status prepare(generation *g, const loaded *l, sh_error *err)
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

static int run_generate(int argc, char **argv)
{
    generate_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    loaded l = {0};
    generation g = {.o = &o};
    int exit_code = 0;
    if (!sh_cli_parse(&generate_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    sh_buf_init(&g.text, PIECE_BYTES);
    SH_GOTO(sh_cli_need(&generate_command, o.model, "-m FILE", &err));
    if (o.prompt == NULL)
        SH_GOTO(sh_cli_need(&generate_command, o.prompt, "-p PROMPT", &err));
    SH_GOTO(load(o.model, o.lora, &l, &err));
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
    unload(&l);
    sh_args_release(&args);
    return exit_code;
}

/* ---- quantize ---- */

typedef struct {
    const char *model, *type, *out;
    bool json;
} quantize_options;

static const sh_option quantize_table[] = {
    SH_OPT_STRING(quantize_options, model, 'm', "model", "FILE", NULL, "GGUF model to read"),
    SH_OPT_STRING(quantize_options, type, 0, "type", "TYPE", NULL,
                  "type of the matrices: F32, F16, Q8_0, Q4_0"),
    SH_OPT_STRING(quantize_options, out, 'o', "output", "OUT", NULL, "GGUF model to write"),
    SH_OPT_FLAG(quantize_options, json, 0, "json", "print one JSON object"),
};
static const sh_command quantize_command = {
    "shoal model quantize",
    "-m FILE --type TYPE -o OUT",
    quantize_table,
    SH_COUNT(quantize_table),
    "Writes a model with its matrices in another type. The file is there whole or not at all.",
    "shoal model quantize -m models/shoal-base-2.6m-f16.gguf --type Q8_0 -o base-q8.gguf",
};

static sh_status print_quantized(const quantize_options *o, sh_error *err)
{
    sh_hash before, after;
    uint64_t bytes_before, bytes_after;
    char hex[SH_HASH_HEX_BYTES];
    SH_TRY(sh_sha256_file(o->model, &before, &bytes_before, err));
    SH_TRY(sh_sha256_file(o->out, &after, &bytes_after, err));
    sh_hex(after.b, sizeof after.b, hex);
    if (!o->json) {
        printf("%s: %s, %llu bytes (from %llu), sha256 %s\n", o->out, o->type,
               (unsigned long long)bytes_after, (unsigned long long)bytes_before, hex);
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_json_set(object, "type", json_string(o->type));
    sh_json_set(object, "bytes", json_integer((json_int_t)bytes_after));
    sh_json_set(object, "bytes_before", json_integer((json_int_t)bytes_before));
    sh_json_set(object, "sha256", json_string(hex));
    return sh_cli_print_json(object, err);
}

static int run_quantize(int argc, char **argv)
{
    quantize_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_gguf *gguf = NULL;
    sh_type type = SH_TYPE_F32;
    int exit_code = 0;
    if (!sh_cli_parse(&quantize_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&quantize_command, o.model, "-m FILE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.type, "--type TYPE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.out, "-o OUT", &err));
    SH_GOTO(sh_type_parse(o.type, &type, &err));
    SH_GOTO(sh_gguf_open(o.model, &gguf, &err));
    SH_GOTO(sh_gguf_quantize(gguf, type, o.out, &err));
    SH_GOTO(print_quantized(&o, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    sh_gguf_close(&gguf);
    sh_args_release(&args);
    return exit_code;
}

int sh_cli_model(int argc, char **argv)
{
    static const sh_cli_entry entries[] = {
        {"inspect", "what a GGUF file holds, and whether it can be run", sh_cli_model_inspect},
        {"perplexity", "perplexity of a text", run_perplexity},
        {"tokenize", "token ids of a text", run_tokenize},
        {"generate", "go on from a prompt", run_generate},
        {"quantize", "write the model in another type", run_quantize},
    };
    static const sh_cli_menu menu = {
        .name = "shoal model",
        .about = "Works on model files in GGUF.",
        .entries = entries,
        .n = SH_COUNT(entries),
    };
    return sh_cli_dispatch(&menu, argc, argv);
}
