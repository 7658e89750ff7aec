/*
 * What a client may ask for. A field that OpenAI's API has and this one cannot honour is refused by
 * name, unless it says what holds anyway; a field that nobody knows is ignored, as OpenAI's server
 * does.
 */
#include "edge-node/api_internal.h"

#include <stdio.h>
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
    {"n", NEUTRAL_ONE, "1"},
    {"best_of", NEUTRAL_ONE, "1"},
    {"echo", NEUTRAL_FALSE, "false"},
    {"suffix", NEUTRAL_EMPTY, "empty"},
    {"logprobs", NEUTRAL_FALSE, "null"},
    {"top_logprobs", NEUTRAL_ZERO, "0"},
    {"logit_bias", NEUTRAL_EMPTY, "empty"},
    {"frequency_penalty", NEUTRAL_ZERO, "0"},
    {"presence_penalty", NEUTRAL_ZERO, "0"},
    {"tools", NEUTRAL_EMPTY, "empty"},
    {"functions", NEUTRAL_EMPTY, "empty"},
    {"audio", NEUTRAL_EMPTY, "null"},
    {"prediction", NEUTRAL_EMPTY, "null"},
};

__attribute__((format(printf, 3, 4))) static bool bad(sh_http_reply *reply, const char *param,
                                                      const char *format, ...)
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
static const json_t *field(const json_t *root, const char *name)
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
        const json_t *value = field(root, fixed[i].name);
        if (value && !is_neutral(value, fixed[i].value))
            return bad(reply, fixed[i].name, "not supported: leave it out, or %s", fixed[i].say);
    }
    const json_t *format = field(root, "response_format");
    const char *type = json_string_value(json_object_get(format, "type"));
    if (format && (!type || strcmp(type, "text") != 0))
        return bad(reply, "response_format", "only {\"type\": \"text\"} is supported");
    return true;
}

static bool check_model(const sh_api *api, const json_t *root, sh_http_reply *reply)
{
    const json_t *model = field(root, "model");
    if (!model)
        return true;
    if (!json_is_string(model))
        return bad(reply, "model", "a string is needed");
    const char *name = json_string_value(model);
    if (!strcmp(name, api->model_name) || !strcmp(name, API_NAME))
        return true;
    sh_http_fail(reply, 404, "not_found_error", "model", "model_not_found",
                 "there is no model '%.64s' here: this node has '%s'", name, api->model_name);
    return false;
}

static bool read_integer(const json_t *root, const char *name, uint32_t max, uint32_t *out,
                         sh_http_reply *reply)
{
    const json_t *value = field(root, name);
    if (!value)
        return true;
    if (!json_is_integer(value) || json_integer_value(value) < 1 ||
        json_integer_value(value) > (json_int_t)max)
        return bad(reply, name, "an integer from 1 to %u is needed", max);
    *out = (uint32_t)json_integer_value(value);
    return true;
}

static bool read_number(const json_t *root, const char *name, double max, float *out,
                        sh_http_reply *reply)
{
    const json_t *value = field(root, name);
    if (!value)
        return true;
    double x = json_number_value(value);
    if (!json_is_number(value) || !(x >= 0 && x <= max))
        return bad(reply, name, "a number from 0 to %g is needed", max);
    *out = (float)x;
    return true;
}

static bool read_flag(const json_t *root, const char *name, bool *out, sh_http_reply *reply)
{
    const json_t *value = field(root, name);
    if (!value)
        return true;
    if (!json_is_boolean(value))
        return bad(reply, name, "true or false is needed");
    *out = json_is_true(value);
    return true;
}

static bool read_stops(const json_t *root, sh_request *out, sh_http_reply *reply)
{
    const json_t *stop = field(root, "stop");
    if (!stop)
        return true;
    size_t n = json_is_string(stop) ? 1 : json_array_size(stop);
    if (!json_is_string(stop) && !json_is_array(stop))
        return bad(reply, "stop", "a string, or an array of up to %d, is needed", SH_STOPS_MAX);
    if (n > SH_STOPS_MAX)
        return bad(reply, "stop", "at most %d strings are taken", SH_STOPS_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *text = json_is_string(stop) ? stop : json_array_get(stop, i);
        size_t bytes = json_string_length(text);
        if (!json_is_string(text) || bytes < 1 || bytes > SH_STOP_BYTES_MAX)
            return bad(reply, "stop", "each must be a string of 1 to %d bytes", SH_STOP_BYTES_MAX);
        out->stops[i] = json_string_value(text);
    }
    out->n_stops = n;
    return true;
}

static bool read_stream(const json_t *root, api_ask *out, sh_http_reply *reply)
{
    const json_t *options = field(root, "stream_options");
    if (!read_flag(root, "stream", &out->stream, reply))
        return false;
    if (!options)
        return true;
    if (!json_is_object(options))
        return bad(reply, "stream_options", "an object is needed");
    if (!out->stream)
        return bad(reply, "stream_options", "only with \"stream\": true");
    return read_flag(options, "include_usage", &out->include_usage, reply);
}

static bool read_sampling(const json_t *root, sh_request *out, sh_http_reply *reply)
{
    out->temperature = out->top_p = 1; /* OpenAI's defaults */
    if (!read_number(root, "temperature", 2, &out->temperature, reply) ||
        !read_number(root, "top_p", 1, &out->top_p, reply))
        return false;
    if (out->top_p == 0) { /* only the likeliest token is left */
        out->temperature = 0;
        out->top_p = 1;
    }
    const json_t *seed = field(root, "seed"), *user = field(root, "user");
    if (seed && !json_is_integer(seed))
        return bad(reply, "seed", "an integer is needed");
    if (seed)
        out->seed = json_integer_value(seed) ? (uint64_t)json_integer_value(seed) : SEED_OF_ZERO;
    if (user && (!json_is_string(user) || json_string_length(user) > SH_USER_BYTES_MAX))
        return bad(reply, "user", "a string of at most %d bytes is needed", SH_USER_BYTES_MAX);
    out->user = user ? json_string_value(user) : NULL;
    return true;
}

static bool read_prompt(api_ask *out, sh_http_reply *reply)
{
    const json_t *prompt = field(out->root, "prompt");
    if (json_is_array(prompt)) {
        if (json_array_size(prompt) != 1)
            return bad(reply, "prompt", "a string, or an array of exactly one, is needed");
        prompt = json_array_get(prompt, 0);
    }
    if (!json_is_string(prompt))
        return bad(reply, "prompt", "a string, or an array of exactly one, is needed");
    if (json_string_length(prompt) == 0)
        return bad(reply, "prompt", "it is empty: there is nothing to go on from");
    out->request.prompt = json_string_value(prompt);
    out->request.prompt_bytes = json_string_length(prompt);
    return true;
}

/* Appends a message's text: a string, or parts of type text. */
static bool put_content(const json_t *content, sh_buf *out)
{
    if (json_is_string(content))
        return sh_buf_append(out, json_string_value(content), json_string_length(content)) == SH_OK;
    if (!json_is_array(content))
        return false;
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *part = json_array_get(content, i), *text = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") != 0 || !json_is_string(text) ||
            sh_buf_append(out, json_string_value(text), json_string_length(text)) != SH_OK)
            return false;
    }
    return true;
}

static bool read_messages(api_ask *out, sh_http_reply *reply)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant"};
    const json_t *messages = field(out->root, "messages");
    if (!json_is_array(messages) || json_array_size(messages) == 0)
        return bad(reply, "messages", "an array of at least one message is needed");
    bool room = true;
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const json_t *message = json_array_get(messages, i);
        const char *role = json_string_value(json_object_get(message, "role"));
        size_t r = 0;
        while (r < SH_COUNT(roles) && (!role || strcmp(role, roles[r]) != 0))
            r++;
        if (r == SH_COUNT(roles))
            return bad(reply, "messages",
                       "message %zu: its role must be system, developer, user or assistant", i);
        room = room && sh_buf_printf(&out->prompt, "%s: ", roles[r]) == SH_OK;
        if (!put_content(json_object_get(message, "content"), &out->prompt))
            return bad(reply, "messages",
                       "message %zu: its content must be a string, or an array of text parts", i);
        room = room && sh_buf_append(&out->prompt, "\n", 1) == SH_OK;
    }
    if (!room || sh_buf_append(&out->prompt, "assistant:", 10) != SH_OK)
        return bad(reply, "messages", "they are too long");
    out->request.prompt = (const char *)out->prompt.data;
    out->request.prompt_bytes = out->prompt.len;
    return true;
}

json_t *api_parse_body(const sh_http_request *request, sh_http_reply *reply)
{
    json_error_t error;
    json_t *root = json_loadb((const char *)request->body, request->n, 0, &error);
    if (!root) {
        /* Not jansson's own text: it quotes the body. */
        bad(reply, NULL, "it is not JSON in UTF-8 (line %d, column %d)", error.line, error.column);
    } else if (!json_is_object(root)) {
        bad(reply, NULL, "a JSON object is needed");
        json_decref(root);
        root = NULL;
    }
    return root;
}

bool api_ask_parse(const sh_api *api, const sh_http_request *request, bool chat, api_ask *out,
                   sh_http_reply *reply)
{
    *out = (api_ask){.chat = chat};
    sh_request *r = &out->request;
    r->max_tokens = chat ? CHAT_MAX_TOKENS_DEFAULT : MAX_TOKENS_DEFAULT;
    /* Roles make a message longer, by less than its own JSON does. */
    sh_buf_init(&out->prompt, request->n + 64);
    out->root = api_parse_body(request, reply);
    return out->root && check_model(api, out->root, reply) && check_fixed(out->root, reply) &&
           (chat ? read_messages(out, reply) : read_prompt(out, reply)) &&
           read_integer(out->root, "max_tokens", SH_MAX_TOKENS_MAX, &r->max_tokens, reply) &&
           (!chat || read_integer(out->root, "max_completion_tokens", SH_MAX_TOKENS_MAX,
                                  &r->max_tokens, reply)) &&
           read_sampling(out->root, r, reply) && read_stops(out->root, r, reply) &&
           read_stream(out->root, out, reply);
}

void api_ask_release(api_ask *ask)
{
    json_decref(ask->root);
    sh_buf_release(&ask->prompt);
    *ask = (api_ask){0};
}
