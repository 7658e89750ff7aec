/*
 * An answer of a model as a person sees it: how its tokens are chosen, when it ends, and its text,
 * which goes to standard output as it comes (shared/model/text_filter.h).
 *
 *     sh_cli_answer a = {0};
 *     SH_GOTO(sh_cli_answer_init(&a, &setup, &err));
 *     SH_GOTO(sh_cli_answer_run(&a, prompt, n_prompt, &err));       again for the next turn
 *     ... a.text, a.tokens, a.stop ...
 *     sh_cli_answer_release(&a);
 */
#ifndef SH_AGGREGATOR_CLI_ANSWER_H
#define SH_AGGREGATOR_CLI_ANSWER_H

#include <signal.h>

#include "aggregator/cli_model.h"
#include "shared/model/sampler.h"
#include "shared/model/text_filter.h"

#define SH_CLI_SEED_MAX       9007199254740991.0 /* 2^53 - 1: what a double holds exactly */
#define SH_CLI_STOP_BYTES_MAX 256
#define SH_CLI_STOPS_MAX      (SH_OPTION_LIST_MAX + 1) /* and what ends a chat's turn */
#define SH_CLI_REPEAT_TOKENS  64                       /* that the penalty looks back on */
#define SH_CLI_TEXT_BYTES_MAX (16u << 20)

typedef struct {
    double temperature, top_p, min_p, repeat_penalty;
    int64_t top_k, seed;
    sh_option_list stop;
} sh_cli_sampling_options;
#define SH_CLI_SAMPLING_ROWS(T, member)                                                            \
    SH_OPT_REAL(T, member.temperature, 0, "temp", "T", 0.8, 0, SH_TEMPERATURE_LIMIT,               \
                "temperature; 0 always takes the likeliest token"),                                \
        SH_OPT_INT(T, member.top_k, 0, "top-k", "N", 40, 0, UINT32_MAX,                            \
                   "of the N likeliest tokens only; 0: of all"),                                   \
        SH_OPT_REAL(T, member.top_p, 0, "top-p", "P", 0.95, 0, 1,                                  \
                    "of these the likeliest that together have this probability"),                 \
        SH_OPT_REAL(T, member.min_p, 0, "min-p", "P", 0.05, 0, 1,                                  \
                    "of these the ones with this share of the likeliest one's"),                   \
        SH_OPT_REAL(T, member.repeat_penalty, 0, "repeat-penalty", "X", 1, 0.01, 100,              \
                    "makes the last 64 tokens less likely; 1: does not"),                          \
        SH_OPT_INT(T, member.seed, 0, "seed", "S", 0, 0, SH_CLI_SEED_MAX, "seed of the sampling"), \
        SH_OPT_LIST(T, member.stop, 0, "stop", "TEXT", "text to end before")

typedef struct {
    const sh_cli_loaded *loaded;
    const sh_cli_context *context;
    const sh_cli_sampling_options *sampling;
    size_t tokens_max;
    const char *stop_text;                    /* one more; NULL: none */
    bool print;                               /* text as it comes */
    const volatile sig_atomic_t *interrupted; /* NULL: cannot be */
} sh_cli_answer_setup;

typedef struct {
    sh_cli_answer_setup setup;
    sh_sampler *sampler;
    float *logits;
    int32_t recent[SH_CLI_REPEAT_TOKENS]; /* the latest last */
    size_t n_recent;
    const char *stops[SH_CLI_STOPS_MAX];
    size_t n_stops;
    /* Of the latest run: */
    sh_text_filter filter;
    int32_t *tokens; /* [tokens_max] */
    size_t n;
    size_t n_cached; /* of these in the context: all, or all but the last */
    sh_buf text;     /* UTF-8, without the stop string and what comes behind it */
    size_t n_printed;
    const char *stop; /* "end", "stop", "length", "context", "interrupted" */
    size_t n_prompt;
    uint64_t prefill_ns, decode_ns;
    size_t n_decoded; /* tokens that decode_ns is of */
} sh_cli_answer;

SH_MUST_USE sh_status sh_cli_answer_init(sh_cli_answer *answer, const sh_cli_answer_setup *setup,
                                         sh_error *err);
void sh_cli_answer_release(sh_cli_answer *answer);
/* Runs the prompt behind what is in the context, then makes tokens. SH_ERR_LIMIT when the prompt
 * has no place. An interruption while the prompt runs leaves 0 tokens, and part of it in the
 * context. */
SH_MUST_USE sh_status sh_cli_answer_run(sh_cli_answer *answer, const int32_t *prompt, size_t n,
                                        sh_error *err);
/* text, tokens, stop, and the rates. */
void sh_cli_answer_json(const sh_cli_answer *answer, json_t *object);
json_t *sh_cli_ids_json(const int32_t *tokens, size_t n);

#endif
