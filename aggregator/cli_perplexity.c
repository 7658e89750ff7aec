/* `shoal model perplexity`: the loss on a text. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "aggregator/cli_model.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/math/kernel.h"
#include "shared/math/pool.h"

#define CHUNKS_A_STEP 32 /* between two words of progress; fixed, so that sums are, too */
#define CHUNKS_A_LINE 1024

typedef struct {
    sh_cli_model_options model;
    const char *file;
    int64_t context;
    bool json;
} perplexity_options;

static const sh_option perplexity_table[] = {
    SH_CLI_MODEL_ROWS(perplexity_options, model),
    SH_OPT_STRING(perplexity_options, file, 'f', "file", "TEXT", NULL,
                  "text to measure on; - is standard input"),
    SH_OPT_INT(perplexity_options, context, 'c', "context", "N", 256, 4, SH_CONTEXT_MAX,
               "tokens a chunk"),
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

static sh_status measure(const sh_cli_loaded *l, const perplexity_options *o, const int32_t *tokens,
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
    if (o->model.threads > 1)
        SH_GOTO(sh_pool_create((unsigned)o->model.threads, &pool, err));
    for (size_t done = 0; done < n_chunks;) {
        const size_t now = SH_MIN(CHUNKS_A_STEP, n_chunks - done);
        const sh_loss_text text = {.tokens = tokens + done * chunk,
                                   .n_tokens = now * chunk,
                                   .chunk = (uint32_t)chunk,
                                   .half = true,
                                   .adapters = (const sh_adapter *const *)l->adapters,
                                   .scales = l->scales,
                                   .n_adapters = l->n_adapters};
        sh_loss part;
        SH_GOTO(sh_model_loss_pool(l->model, &text, pool, &part, err));
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
                       o->model.model);
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

int sh_cli_model_perplexity(int argc, char **argv)
{
    perplexity_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_cli_loaded l = {0};
    int32_t *tokens = NULL;
    size_t n_tokens = 0;
    sh_loss loss = {0};
    int exit_code = 0;
    if (!sh_cli_parse(&perplexity_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&perplexity_command, o.model.model, "-m FILE", &err));
    SH_GOTO(sh_cli_need(&perplexity_command, o.file, "-f TEXT", &err));
    SH_GOTO(sh_cli_load(&o.model, &l, &err));
    SH_GOTO(read_tokens(l.model, o.file, &tokens, &n_tokens, &err));
    SH_GOTO(measure(&l, &o, tokens, n_tokens, &loss, &err));
    SH_GOTO(print_perplexity(&o, &loss, n_tokens, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(tokens);
    sh_cli_unload(&l);
    sh_args_release(&args);
    return exit_code;
}
