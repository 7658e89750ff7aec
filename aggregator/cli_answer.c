#include "aggregator/cli_answer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PROMPT_PIECE 512 /* tokens between two looks at whether to stop */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static sh_status add_stop(sh_cli_answer *a, const char *text, sh_error *err)
{
    if (text[0] == '\0')
        return sh_fail(err, SH_ERR_USAGE, "--stop needs a text that is not empty");
    if (strlen(text) > SH_CLI_STOP_BYTES_MAX)
        return sh_fail(err, SH_ERR_USAGE, "--stop %.20s...: over %d bytes", text,
                       SH_CLI_STOP_BYTES_MAX);
    a->stops[a->n_stops++] = text;
    return SH_OK;
}

sh_status sh_cli_answer_init(sh_cli_answer *answer, const sh_cli_answer_setup *setup, sh_error *err)
{
    sh_cli_answer *a = answer;
    const sh_cli_sampling_options *o = setup->sampling;
    const uint32_t vocab = setup->loaded->model->config.vocab;
    const sh_sampling sampling = {.temperature = (float)o->temperature,
                                  .top_k = (uint32_t)o->top_k,
                                  .top_p = (float)o->top_p,
                                  .min_p = (float)o->min_p,
                                  .repeat_penalty = (float)o->repeat_penalty,
                                  .seed = (uint64_t)o->seed};
    a->setup = *setup;
    sh_buf_init(&a->text, SH_CLI_TEXT_BYTES_MAX);
    for (size_t i = 0; i < o->stop.n; i++)
        SH_TRY(add_stop(a, o->stop.items[i], err));
    if (setup->stop_text != NULL)
        SH_TRY(add_stop(a, setup->stop_text, err));
    SH_TRY(sh_sampler_create(&sampling, vocab, &a->sampler, err));
    a->logits = sh_alloc_aligned(vocab * sizeof *a->logits);
    a->tokens = sh_calloc(setup->tokens_max, sizeof *a->tokens);
    if (a->logits == NULL || a->tokens == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "an answer of %zu tokens: out of memory",
                       setup->tokens_max);
    return SH_OK;
}

void sh_cli_answer_release(sh_cli_answer *answer)
{
    sh_sampler_destroy(&answer->sampler);
    free(answer->logits);
    free(answer->tokens);
    sh_text_filter_release(&answer->filter);
    sh_buf_release(&answer->text);
    *answer = (sh_cli_answer){0};
}

static void remember(sh_cli_answer *a, const int32_t *tokens, size_t n)
{
    const size_t taken = SH_MIN(n, SH_CLI_REPEAT_TOKENS);
    const size_t kept = SH_MIN(a->n_recent, SH_CLI_REPEAT_TOKENS - taken);
    memmove(a->recent, a->recent + a->n_recent - kept, kept * sizeof *a->recent);
    memcpy(a->recent + kept, tokens + n - taken, taken * sizeof *a->recent);
    a->n_recent = kept + taken;
}

static bool is_interrupted(const sh_cli_answer *a)
{
    return a->setup.interrupted != NULL && *a->setup.interrupted != 0;
}

/* ---- Text ---- */

static sh_status print_new(sh_cli_answer *a, sh_error *err)
{
    if (!a->setup.print || a->text.len == a->n_printed)
        return SH_OK;
    fwrite(a->text.data + a->n_printed, 1, a->text.len - a->n_printed, stdout);
    a->n_printed = a->text.len;
    return sh_cli_flush(err);
}

static sh_status take(sh_cli_answer *a, int32_t token, sh_error *err)
{
    const sh_tokenizer *tokenizer = a->setup.loaded->model->tokenizer;
    SH_TRY(sh_text_filter_add(&a->filter, tokenizer, token, &a->text, err));
    a->tokens[a->n++] = token;
    remember(a, &token, 1);
    return print_new(a, err);
}

/* ---- The run ---- */

static sh_status run_prompt(sh_cli_answer *a, const int32_t *prompt, size_t n, sh_error *err)
{
    sh_context *context = a->setup.context->context;
    const uint32_t places = a->setup.context->places, used = sh_context_length(context);
    if (n > places - used)
        return sh_fail(err, SH_ERR_LIMIT, "the prompt has %zu tokens, the context holds %u%s", n,
                       places, used > 0 ? ", not all of them free" : "");
    for (size_t at = 0; at < n && !is_interrupted(a);) {
        const size_t piece = SH_MIN(PROMPT_PIECE, n - at);
        const bool last = at + piece == n;
        SH_TRY(sh_context_decode(context, prompt + at, (uint32_t)piece,
                                 last ? SH_LOGITS_LAST : SH_LOGITS_NONE, last ? a->logits : NULL,
                                 err));
        at += piece;
    }
    return SH_OK;
}

static sh_status make_tokens(sh_cli_answer *a, sh_error *err)
{
    sh_context *context = a->setup.context->context;
    for (;;) {
        int32_t token;
        a->stop = "interrupted";
        if (is_interrupted(a))
            return SH_OK;
        SH_TRY(sh_sampler_next(a->sampler, a->logits, a->recent, a->n_recent, &token, err));
        if (!isfinite(a->logits[token])) /* only where there is no better one */
            return sh_fail(err, SH_ERR_INVALID,
                           "%s: its logits are no numbers: its weights or an adapter's are broken",
                           sh_gguf_path(a->setup.loaded->model->gguf));
        a->stop = "end";
        if (sh_tokenizer_is_end(a->setup.loaded->model->tokenizer, token))
            return SH_OK;
        SH_TRY(take(a, token, err));
        a->stop = "stop";
        if (a->filter.stopped)
            return SH_OK;
        a->stop = "length";
        if (a->n == a->setup.tokens_max)
            return SH_OK;
        a->stop = "context";
        if (sh_context_length(context) == a->setup.context->places)
            return SH_OK;
        const uint64_t start = now_ns();
        SH_TRY(sh_context_decode(context, &token, 1, SH_LOGITS_LAST, a->logits, err));
        a->decode_ns += now_ns() - start;
        a->n_decoded++;
        a->n_cached = a->n;
    }
}

sh_status sh_cli_answer_run(sh_cli_answer *answer, const int32_t *prompt, size_t n, sh_error *err)
{
    sh_cli_answer *a = answer;
    a->n = a->n_cached = a->n_printed = a->n_decoded = 0;
    a->prefill_ns = a->decode_ns = 0;
    a->n_prompt = n;
    sh_buf_clear(&a->text);
    sh_text_filter_release(&a->filter);
    SH_TRY(
        sh_text_filter_init(&a->filter, a->stops, a->n_stops, (uint32_t)a->setup.tokens_max, err));
    const uint64_t start = now_ns();
    SH_TRY(run_prompt(a, prompt, n, err));
    a->prefill_ns = now_ns() - start;
    remember(a, prompt, n);
    SH_TRY(make_tokens(a, err));
    if (!a->filter.stopped)
        SH_TRY(sh_text_filter_end(&a->filter, &a->text, err));
    return print_new(a, err);
}

static double rate(size_t n, uint64_t ns)
{
    return n > 0 && ns > 0 ? (double)n / ((double)ns * 1e-9) : 0;
}

json_t *sh_cli_ids_json(const int32_t *tokens, size_t n)
{
    json_t *array = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(array, json_integer(tokens[i]));
    return array;
}

void sh_cli_answer_json(const sh_cli_answer *answer, json_t *object)
{
    const sh_cli_answer *a = answer;
    sh_json_set(object, "text",
                json_stringn(a->text.len > 0 ? (const char *)a->text.data : "", a->text.len));
    sh_json_set(object, "tokens", sh_cli_ids_json(a->tokens, a->n));
    sh_json_set(object, "stop", json_string(a->stop));
    sh_json_set(object, "prefill_tokens_per_s", sh_json_number(rate(a->n_prompt, a->prefill_ns)));
    sh_json_set(object, "decode_tokens_per_s", sh_json_number(rate(a->n_decoded, a->decode_ns)));
}
