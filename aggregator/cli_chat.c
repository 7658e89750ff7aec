/*
 * `shoal model chat`: a conversation, a line of input a message. What was said stays in the
 * context; only what is new of a turn is run. When the context is full the oldest turns are
 * forgotten and the rest is run anew.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "aggregator/cli_answer.h"
#include "shared/base/log.h"
#include "shared/model/chat.h"

#define ROOM_SHARE                                                                                 \
    4 /* this part of the context at least is free for an answer, unless -n is less */

typedef struct {
    sh_cli_model_options model;
    sh_cli_context_options context;
    sh_cli_sampling_options sampling;
    const char *system, *template;
    int64_t n;
    bool json;
} chat_options;

static const sh_option chat_table[] = {
    SH_CLI_MODEL_ROWS(chat_options, model),
    SH_OPT_STRING(chat_options, system, 's', "system", "TEXT", NULL,
                  "what the model is told before the conversation"),
    SH_OPT_STRING(chat_options, template, 0, "template", "NAME", NULL,
                  "chatml, llama2, llama3, zephyr or plain; else what the model's file says"),
    SH_OPT_INT(chat_options, n, 'n', "n", "N", 512, 1, SH_CONTEXT_MAX, "tokens an answer at most"),
    SH_CLI_SAMPLING_ROWS(chat_options, sampling),
    SH_CLI_CONTEXT_ROWS(chat_options, context),
    SH_OPT_FLAG(chat_options, json, 0, "json", "print a JSON object, in one line, an answer"),
};
static const sh_command chat_command = {
    "shoal model chat",
    "-m FILE [--system TEXT] [--template NAME] [-n N] [--temp T] [-t THREADS]",
    chat_table,
    SH_COUNT(chat_table),
    "Talks with a model: each line of input is a message. Ctrl-C stops an answer, Ctrl-D ends.",
    "shoal model chat -m model.gguf --system 'Answer briefly.'",
};

typedef struct {
    const chat_options *o;
    const sh_tokenizer *tokenizer;
    sh_cli_context context;
    sh_cli_answer answer;
    sh_chat_family family;
    sh_chat_message *messages; /* contents are malloc'ed */
    size_t n, cap;
    bool follows;  /* the context holds all messages, the last of them the answer */
    int32_t *rest; /* of that answer's tokens, those that are not in the context yet */
    size_t n_rest;
    sh_buf tail; /* the next token's text, whose first n_tail bytes belong to the answer */
    size_t n_tail;
} chat;

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal)
{
    (void)signal;
    interrupted = 1;
}

/* ---- What was said ---- */

static sh_status add_message(chat *c, const char *role, const void *text, size_t n, sh_error *err)
{
    char *copy = sh_calloc(n + 1, 1);
    const sh_status status = sh_array_reserve((void **)&c->messages, &c->cap, c->n + 1,
                                              sizeof *c->messages, SH_CHAT_MESSAGES_MAX);
    if (copy == NULL || status != SH_OK) {
        free(copy);
        return sh_fail(err, status != SH_OK ? status : SH_ERR_NO_MEMORY,
                       "chat: no room for another message");
    }
    if (n > 0)
        memcpy(copy, text, n);
    c->messages[c->n++] = (sh_chat_message){.role = role, .content = copy, .content_bytes = n};
    return SH_OK;
}

static void drop_messages(chat *c, size_t first, size_t n)
{
    for (size_t i = first; i < first + n; i++)
        free((char *)(uintptr_t)c->messages[i].content);
    if (n > 0) /* there may be no array yet */
        memmove(c->messages + first, c->messages + first + n,
                (c->n - first - n) * sizeof *c->messages);
    c->n -= n;
}

static void forget_rest(chat *c)
{
    free(c->rest);
    sh_buf_release(&c->tail);
    c->rest = NULL;
    c->n_rest = c->n_tail = 0;
    c->follows = false;
}

/* Drops a user's message and its answer, the oldest ones; false when only the latest is left. */
static bool forget_turn(chat *c)
{
    const size_t first = c->n > 0 && strcmp(c->messages[0].role, "system") == 0;
    size_t n = 1;
    while (first + n < c->n && strcmp(c->messages[first + n].role, "user") != 0)
        n++;
    if (first + n >= c->n)
        return false;
    drop_messages(c, first, n);
    return true;
}

/* ---- A turn ---- */

/* Tokens of what is new, after an answer that is in the context. */
static sh_status tokens_after(const chat *c, int32_t **out, size_t *n, sh_error *err)
{
    const sh_chat_message messages[] = {
        {.role = "assistant",
         .content = c->n_tail > 0 ? (const char *)c->tail.data : "",
         .content_bytes = c->n_tail},
        c->messages[c->n - 1],
    };
    int32_t *after = NULL;
    size_t n_after = 0;
    SH_TRY(sh_chat_tokenize_after(c->tokenizer, c->family, messages, 2, &after, &n_after, err));
    int32_t *tokens = sh_calloc(c->n_rest + n_after, sizeof *tokens);
    if (tokens == NULL) {
        free(after);
        return sh_fail(err, SH_ERR_NO_MEMORY, "chat: out of memory");
    }
    if (c->n_rest > 0)
        memcpy(tokens, c->rest, c->n_rest * sizeof *tokens);
    memcpy(tokens + c->n_rest, after, n_after * sizeof *tokens);
    free(after);
    *out = tokens;
    *n = c->n_rest + n_after;
    return SH_OK;
}

/* SH_ERR_LIMIT when the latest message has no place even alone: then nothing is to be forgotten. */
static sh_status check_alone(const chat *c, size_t room, sh_error *err)
{
    const bool system = strcmp(c->messages[0].role, "system") == 0 && c->n > 1;
    const sh_chat_message messages[] = {c->messages[0], c->messages[c->n - 1]};
    int32_t *tokens;
    size_t n;
    SH_TRY(sh_chat_tokenize(c->tokenizer, c->family, messages + !system, 1 + (size_t)system,
                            &tokens, &n, err));
    free(tokens);
    if (n + room <= c->context.places)
        return SH_OK;
    return sh_fail(err, SH_ERR_LIMIT,
                   "the message is too long: %zu tokens with what belongs to it; the context holds "
                   "%u, %zu of them for the answer",
                   n, c->context.places, room);
}

/* The prompt of the latest message, for which there is room then; *forgotten turns were dropped. */
static sh_status make_prompt(chat *c, int32_t **out, size_t *n, size_t *forgotten, sh_error *err)
{
    const uint32_t places = c->context.places;
    const size_t room = SH_MIN((size_t)c->o->n, SH_MAX(places / ROOM_SHARE, 1));
    *forgotten = 0;
    if (c->follows) {
        SH_TRY(tokens_after(c, out, n, err));
        if (sh_context_length(c->context.context) + *n + room <= places)
            return SH_OK;
        free(*out);
        *out = NULL;
    }
    forget_rest(c);
    sh_context_truncate(c->context.context, 0);
    SH_TRY(check_alone(c, room, err));
    for (;; ++*forgotten) {
        SH_TRY(sh_chat_tokenize(c->tokenizer, c->family, c->messages, c->n, out, n, err));
        if (*n + room <= places || !forget_turn(c))
            return SH_OK;
        free(*out);
        *out = NULL;
    }
}

/* The answer as the next turn goes on from it: in the context only what was shown of it. */
static sh_status keep_answer(chat *c, uint32_t start, sh_error *err)
{
    const sh_cli_answer *a = &c->answer;
    const size_t shown = sh_text_filter_tokens_shown(&a->filter);
    const size_t cached = SH_MIN(shown, a->n_cached);
    sh_context_truncate(c->context.context, start + (uint32_t)cached);
    c->rest = sh_calloc(shown - cached + 1, sizeof *c->rest);
    if (c->rest == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "chat: out of memory");
    memcpy(c->rest, a->tokens + cached, (shown - cached) * sizeof *c->rest);
    c->n_rest = shown - cached;
    c->n_tail = sh_text_filter_bytes_behind(&a->filter);
    if (c->n_tail > 0 && sh_detokenize(c->tokenizer, a->tokens[shown], &c->tail) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "chat: out of memory");
    c->follows = true;
    return add_message(c, "assistant", a->text.data, a->text.len, err);
}

static sh_status print_answer(const chat *c, size_t forgotten, sh_error *err)
{
    const sh_cli_answer *a = &c->answer;
    if (c->o->json) {
        json_t *object = json_object();
        sh_cli_answer_json(a, object);
        sh_json_set(object, "prompt_tokens", json_integer((json_int_t)a->n_prompt));
        sh_json_set(object, "forgotten_turns", json_integer((json_int_t)forgotten));
        return sh_cli_print_json(object, err);
    }
    putchar('\n');
    SH_TRY(sh_cli_flush(err));
    if (strcmp(a->stop, "length") == 0 || strcmp(a->stop, "context") == 0)
        fprintf(stderr, "chat: the answer was cut off (%s)\n",
                a->stop[0] == 'l' ? "-n tokens" : "the context is full");
    else if (strcmp(a->stop, "interrupted") == 0)
        fputs("chat: stopped\n", stderr);
    return SH_OK;
}

static sh_status take_turn(chat *c, const char *text, size_t bytes, sh_error *err)
{
    int32_t *prompt = NULL;
    size_t n = 0, forgotten;
    SH_TRY(add_message(c, "user", text, bytes, err));
    sh_status status = make_prompt(c, &prompt, &n, &forgotten, err);
    if (status != SH_OK) {
        drop_messages(c, c->n - 1, 1);
        if (status == SH_ERR_LIMIT) { /* the conversation goes on without it */
            (void)sh_error_report("chat", err);
            status = SH_OK;
        }
        return status;
    }
    if (forgotten > 0)
        fprintf(stderr, "chat: the context of %u tokens is full: forgot the oldest %zu turn%s\n",
                c->context.places, forgotten, forgotten > 1 ? "s" : "");
    forget_rest(c);
    SH_GOTO(sh_cli_answer_run(&c->answer, prompt, n, err));
    if (strcmp(c->answer.stop, "interrupted") != 0 || c->answer.n > 0)
        SH_GOTO(keep_answer(c, sh_context_length(c->context.context) - (uint32_t)c->answer.n_cached,
                            err));
    else
        drop_messages(c, c->n - 1, 1); /* nothing was answered; the next turn begins anew */
    SH_GOTO(print_answer(c, forgotten, err));

cleanup:
    free(prompt);
    return status;
}

/* ---- The conversation ---- */

static sh_status set_up(chat *c, const sh_cli_loaded *l, sh_error *err)
{
    const chat_options *o = c->o;
    c->tokenizer = l->model->tokenizer;
    sh_buf_init(&c->tail, SH_CLI_TEXT_BYTES_MAX);
    c->family = sh_chat_detect(l->model->gguf);
    if (o->template != NULL)
        SH_TRY(sh_chat_parse_family(o->template, &c->family, err));
    SH_TRY(sh_cli_context_create(l, &o->context, &c->context, err));
    const sh_cli_answer_setup setup = {.loaded = l,
                                       .context = &c->context,
                                       .sampling = &o->sampling,
                                       .tokens_max = (size_t)o->n,
                                       .stop_text = sh_chat_stop_text(c->family),
                                       .print = !o->json,
                                       .interrupted = &interrupted};
    SH_TRY(sh_cli_answer_init(&c->answer, &setup, err));
    if (o->system != NULL)
        SH_TRY(add_message(c, "system", o->system, strlen(o->system), err));
    if (c->family == SH_CHAT_PLAIN && o->template == NULL)
        fputs("chat: no known template: plain\n", stderr);
    else
        fprintf(stderr, "chat: template: %s\n", sh_chat_family_name(c->family));
    struct sigaction action = {.sa_handler = on_interrupt}; /* reading is interrupted, too */
    if (sigaction(SIGINT, &action, NULL) != 0)
        return sh_fail(err, SH_ERR_IO, "chat: SIGINT: %s", strerror(errno));
    return SH_OK;
}

static sh_status converse(chat *c, sh_error *err)
{
    const bool terminal = isatty(STDIN_FILENO) == 1;
    sh_status status = SH_OK;
    char *line = NULL;
    size_t cap = 0;
    for (;;) {
        interrupted = 0;
        if (terminal)
            fputs("> ", stderr);
        errno = 0;
        ssize_t n = getline(&line, &cap, stdin);
        if (n < 0 && interrupted != 0) {
            clearerr(stdin);
            fputs("\nchat: Ctrl-D ends\n", stderr);
            continue;
        }
        if (n < 0) {
            if (ferror(stdin))
                status = sh_fail(err, SH_ERR_IO, "standard input: %s", strerror(errno));
            break;
        }
        if (n > 0 && line[n - 1] == '\n')
            n--;
        interrupted = 0;
        if (n == 0)
            continue;
        status = take_turn(c, line, (size_t)n, err);
        if (status != SH_OK)
            break;
    }
    if (terminal)
        fputc('\n', stderr);
    free(line);
    return status;
}

int sh_cli_model_chat(int argc, char **argv)
{
    chat_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_cli_loaded l = {0};
    chat c = {.o = &o};
    int exit_code = 0;
    if (!sh_cli_parse(&chat_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&chat_command, o.model.model, "-m FILE", &err));
    SH_GOTO(sh_cli_load(&o.model, &l, &err));
    SH_GOTO(set_up(&c, &l, &err));
    SH_GOTO(converse(&c, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    forget_rest(&c);
    drop_messages(&c, 0, c.n);
    free(c.messages);
    sh_cli_answer_release(&c.answer);
    sh_cli_context_release(&c.context);
    sh_cli_unload(&l);
    sh_args_release(&args);
    return exit_code;
}
