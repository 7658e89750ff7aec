/*
 * What a client may ask for. A field that OpenAI's API has and this one cannot honour is refused by
 * name, unless it says what holds anyway; a field that nobody knows is ignored, as OpenAI's server
 * does.
 */
#include "edge-node/api_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS_DEFAULT = 16, CHAT_MAX_TOKENS_DEFAULT = 128 };
/* The engine takes seed 0 as none: a client's 0 becomes this one. */
#define SEED_OF_ZERO 0x9e3779b97f4a7c15u

typedef enum { NEUTRAL_FALSE, NEUTRAL_ZERO, NEUTRAL_ONE, NEUTRAL_EMPTY } neutral;
static const struct {
    const char *name;
    neutral value; /* besides null */
    const char *say;
} fixed[] = {
    {"best_of", NEUTRAL_ONE, "1"},
    {"echo", NEUTRAL_FALSE, "false"},
    {"suffix", NEUTRAL_EMPTY, "empty"},
    {"logit_bias", NEUTRAL_EMPTY, "empty"},
    {"frequency_penalty", NEUTRAL_ZERO, "0"},
    {"presence_penalty", NEUTRAL_ZERO, "0"},
    {"tools", NEUTRAL_EMPTY, "empty"},
    {"functions", NEUTRAL_EMPTY, "empty"},
    {"audio", NEUTRAL_EMPTY, "null"},
    {"prediction", NEUTRAL_EMPTY, "null"},
};

bool api_refuse(sh_http_reply *reply, const char *param, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    sh_http_fail(reply, 400, "invalid_request_error", param, NULL, "%s: %s", param ? param : "body",
                 text);
    return false;
}

/* The field, NULL when it is not there or null. */
const json_t *api_field(const json_t *root, const char *name)
{
    const json_t *value = json_object_get(root, name);
    return json_is_null(value) ? NULL : value;
}

static bool is_neutral(const json_t *value, neutral kind)
{
    switch (kind) {
    case NEUTRAL_FALSE:
        return json_is_false(value);
    case NEUTRAL_ZERO:
        return json_is_number(value) && json_number_value(value) == 0;
    case NEUTRAL_ONE:
        return json_is_number(value) && json_number_value(value) == 1;
    case NEUTRAL_EMPTY:
        break;
    }
    return (json_is_string(value) && json_string_length(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0);
}

static bool check_fixed(const json_t *root, sh_http_reply *reply)
{
    for (size_t i = 0; i < SH_COUNT(fixed); i++) {
        const json_t *value = api_field(root, fixed[i].name);
        if (value && !is_neutral(value, fixed[i].value))
            return api_refuse(reply, fixed[i].name, "not supported: leave it out, or %s",
                              fixed[i].say);
    }
    const json_t *format = api_field(root, "response_format");
    const char *type = json_string_value(json_object_get(format, "type"));
    if (format && (!type || strcmp(type, "text") != 0))
        return api_refuse(reply, "response_format", "only {\"type\": \"text\"} is supported");
    return true;
}

bool api_check_model(const sh_api *api, const json_t *root, sh_http_reply *reply)
{
    const json_t *model = api_field(root, "model");
    if (!model)
        return true;
    if (!json_is_string(model))
        return api_refuse(reply, "model", "a string is needed");
    const char *name = json_string_value(model);
    if (!strcmp(name, api->model_name) || !strcmp(name, API_NAME))
        return true;
    sh_http_fail(reply, 404, "not_found_error", "model", "model_not_found",
                 "there is no model '%.64s' here: this node has '%s'", name, api->model_name);
    return false;
}

typedef struct {
    uint32_t min, max;
} bounds;

static bool read_integer(const json_t *root, const char *name, bounds b, uint32_t *out,
                         sh_http_reply *reply)
{
    const json_t *value = api_field(root, name);
    if (!value)
        return true;
    if (!json_is_integer(value) || json_integer_value(value) < (json_int_t)b.min ||
        json_integer_value(value) > (json_int_t)b.max)
        return api_refuse(reply, name, "an integer from %u to %u is needed", b.min, b.max);
    *out = (uint32_t)json_integer_value(value);
    return true;
}

static bool read_number(const json_t *root, const char *name, double max, float *out,
                        sh_http_reply *reply)
{
    const json_t *value = api_field(root, name);
    if (!value)
        return true;
    double x = json_number_value(value);
    if (!json_is_number(value) || !(x >= 0 && x <= max))
        return api_refuse(reply, name, "a number from 0 to %g is needed", max);
    *out = (float)x;
    return true;
}

static bool read_flag(const json_t *root, const char *name, bool *out, sh_http_reply *reply)
{
    const json_t *value = api_field(root, name);
    if (!value)
        return true;
    if (!json_is_boolean(value))
        return api_refuse(reply, name, "true or false is needed");
    *out = json_is_true(value);
    return true;
}

static bool read_stops(const json_t *root, sh_request *out, sh_http_reply *reply)
{
    const json_t *stop = api_field(root, "stop");
    if (!stop)
        return true;
    size_t n = json_is_string(stop) ? 1 : json_array_size(stop);
    if (!json_is_string(stop) && !json_is_array(stop))
        return api_refuse(reply, "stop", "a string, or an array of up to %d, is needed",
                          SH_STOPS_MAX);
    if (n > SH_STOPS_MAX)
        return api_refuse(reply, "stop", "at most %d strings are taken", SH_STOPS_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_is_string(stop) ? stop : json_array_get(stop, i);
        size_t bytes = json_string_length(text);
        if (!json_is_string(text) || bytes < 1 || bytes > SH_STOP_BYTES_MAX)
            return api_refuse(reply, "stop", "each must be a string of 1 to %d bytes",
                              SH_STOP_BYTES_MAX);
        out->stops[i] = json_string_value(text);
    }
    out->n_stops = n;
    return true;
}

static bool read_stream(const json_t *root, api_ask *out, sh_http_reply *reply)
{
    const json_t *options = api_field(root, "stream_options");
    if (!read_flag(root, "stream", &out->stream, reply))
        return false;
    if (!options)
        return true;
    if (!json_is_object(options))
        return api_refuse(reply, "stream_options", "an object is needed");
    if (!out->stream)
        return api_refuse(reply, "stream_options", "only with \"stream\": true");
    return read_flag(options, "include_usage", &out->include_usage, reply);
}

static bool read_sampling(const json_t *root, sh_request *out, sh_http_reply *reply)
{
    out->temperature = out->top_p = out->repeat_penalty = 1; /* OpenAI's defaults */
    if (!read_number(root, "temperature", SH_TEMPERATURE_MAX, &out->temperature, reply) ||
        !read_number(root, "top_p", 1, &out->top_p, reply) ||
        !read_number(root, "min_p", 1, &out->min_p, reply) ||
        !read_number(root, "repeat_penalty", SH_PENALTY_MAX, &out->repeat_penalty, reply) ||
        !read_integer(root, "top_k", (bounds){0, SH_TOP_K_MAX}, &out->top_k, reply))
        return false;
    if (out->top_p == 0) { /* only the likeliest token is left */
        out->temperature = 0;
        out->top_p = 1;
    }
    const json_t *seed = api_field(root, "seed"), *user = api_field(root, "user");
    if (seed && !json_is_integer(seed))
        return api_refuse(reply, "seed", "an integer is needed");
    if (seed)
        out->seed = json_integer_value(seed) ? (uint64_t)json_integer_value(seed) : SEED_OF_ZERO;
    if (user && (!json_is_string(user) || json_string_length(user) > SH_USER_BYTES_MAX))
        return api_refuse(reply, "user", "a string of at most %d bytes is needed",
                          SH_USER_BYTES_MAX);
    out->user = user ? json_string_value(user) : NULL;
    return true;
}

static bool read_prompt(api_ask *out, sh_http_reply *reply)
{
    const json_t *prompt = api_field(out->root, "prompt");
    if (json_is_array(prompt)) {
        if (json_array_size(prompt) != 1)
            return api_refuse(reply, "prompt", "a string, or an array of exactly one, is needed");
        prompt = json_array_get(prompt, 0);
    }
    if (!json_is_string(prompt))
        return api_refuse(reply, "prompt", "a string, or an array of exactly one, is needed");
    if (json_string_length(prompt) == 0)
        return api_refuse(reply, "prompt", "it is empty: there is nothing to go on from");
    out->request.prompt = json_string_value(prompt);
    out->request.prompt_bytes = json_string_length(prompt);
    return true;
}

/* A completion asks with a number, a chat with a flag and a number. */
static bool read_logprobs(const json_t *root, api_ask *out, sh_http_reply *reply)
{
    sh_request *r = &out->request;
    const json_t *logprobs = api_field(root, "logprobs"), *top = api_field(root, "top_logprobs");
    if (!out->chat) {
        if (top && !is_neutral(top, NEUTRAL_ZERO))
            return api_refuse(reply, "top_logprobs", "only of a chat: use logprobs");
        if (!logprobs || json_is_false(logprobs))
            return true;
        r->logprobs = true;
        return read_integer(root, "logprobs", (bounds){0, API_LOGPROBS_MAX}, &r->top_logprobs,
                            reply);
    }
    if (!read_flag(root, "logprobs", &r->logprobs, reply) ||
        !read_integer(root, "top_logprobs", (bounds){0, SH_TOP_LOGPROBS_MAX}, &r->top_logprobs,
                      reply))
        return false;
    if (r->top_logprobs > 0 && !r->logprobs)
        return api_refuse(reply, "top_logprobs", "only with \"logprobs\": true");
    return true;
}

/* A message's text: a string, or parts of type text, which are put together. False: neither. */
static bool read_content(const json_t *content, api_ask *out, sh_chat_message *message)
{
    if (json_is_string(content)) {
        message->content = json_string_value(content);
        message->content_bytes = json_string_length(content);
        return true;
    }
    if (!json_is_array(content))
        return false;
    sh_buf text;
    sh_buf_init(&text, SH_CHAT_TEXT_MAX);
    bool good = true;
    for (size_t i = 0; i < json_array_size(content) && good; i++) {
        const json_t *part = json_array_get(content, i), *piece = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        good = type && strcmp(type, "text") == 0 && json_is_string(piece) &&
               sh_buf_append(&text, json_string_value(piece), json_string_length(piece)) == SH_OK;
    }
    char *copy = good ? malloc(text.len + 1) : NULL;
    if (copy) {
        if (text.len)
            memcpy(copy, text.data, text.len);
        copy[text.len] = 0;
        out->texts[out->n_texts++] = copy;
        message->content = copy;
        message->content_bytes = text.len;
    }
    sh_buf_release(&text);
    return copy != NULL;
}

static bool read_messages(api_ask *out, sh_http_reply *reply)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant"};
    const json_t *messages = api_field(out->root, "messages");
    size_t n = json_array_size(messages);
    if (!json_is_array(messages) || n == 0)
        return api_refuse(reply, "messages", "an array of at least one message is needed");
    if (n > SH_CHAT_MESSAGES_MAX)
        return api_refuse(reply, "messages", "at most %d messages are taken", SH_CHAT_MESSAGES_MAX);
    out->messages = sh_calloc(n, sizeof(*out->messages));
    out->texts = sh_calloc(n, sizeof(*out->texts));
    if (!out->messages || !out->texts) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, "memory",
                     "no memory for the messages: try again later");
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(messages, i);
        const char *role = json_string_value(json_object_get(message, "role"));
        size_t r = 0;
        while (r < SH_COUNT(roles) && (!role || strcmp(role, roles[r]) != 0))
            r++;
        if (r == SH_COUNT(roles))
            return api_refuse(reply, "messages",
                              "message %zu: its role must be system, developer, user or assistant",
                              i);
        out->messages[i].role = roles[r];
        if (!read_content(json_object_get(message, "content"), out, &out->messages[i]))
            return api_refuse(
                reply, "messages",
                "message %zu: its content must be a string, or an array of text parts", i);
    }
    out->request.messages = out->messages;
    out->request.n_messages = n;
    return true;
}

json_t *api_parse_body(const sh_http_request *request, sh_http_reply *reply)
{
    json_error_t error;
    json_t *root = json_loadb((const char *)request->body, request->n, 0, &error);
    if (!root) {
        /* Not jansson's own text: it quotes the body. */
        api_refuse(reply, NULL, "it is not JSON in UTF-8 (line %d, column %d)", error.line,
                   error.column);
    } else if (!json_is_object(root)) {
        api_refuse(reply, NULL, "a JSON object is needed");
        json_decref(root);
        root = NULL;
    }
    return root;
}

bool api_ask_parse(const sh_api *api, const sh_http_request *request, bool chat, api_ask *out,
                   sh_http_reply *reply)
{
    const bounds tokens = {1, SH_MAX_TOKENS_MAX};
    *out = (api_ask){.chat = chat, .n = 1};
    sh_request *r = &out->request;
    r->max_tokens = chat ? CHAT_MAX_TOKENS_DEFAULT : MAX_TOKENS_DEFAULT;
    out->root = api_parse_body(request, reply);
    return out->root && api_check_model(api, out->root, reply) && check_fixed(out->root, reply) &&
           (chat ? read_messages(out, reply) : read_prompt(out, reply)) &&
           read_integer(out->root, "max_tokens", tokens, &r->max_tokens, reply) &&
           (!chat ||
            read_integer(out->root, "max_completion_tokens", tokens, &r->max_tokens, reply)) &&
           read_integer(out->root, "n", (bounds){1, API_CHOICES_MAX}, &out->n, reply) &&
           read_sampling(out->root, r, reply) && read_logprobs(out->root, out, reply) &&
           read_stops(out->root, r, reply) && read_stream(out->root, out, reply);
}

void api_ask_release(api_ask *ask)
{
    json_decref(ask->root);
    for (size_t i = 0; i < ask->n_texts; i++)
        free(ask->texts[i]);
    free(ask->texts);
    free(ask->messages);
    *ask = (api_ask){0};
}
