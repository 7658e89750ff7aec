/*
 * Completions and chats, whole or as a stream of events. A generation ends before its last words
 * are sent: a client that rates it at once finds it on record.
 */
#include "edge-node/api_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/clock.h"
#include "shared/base/log.h"

#define TEXT_BYTES_MAX ((size_t)1 << 20)

typedef struct {
    sh_api *api;
    sh_generation *generation; /* NULL after its end */
    sh_generation_info info;
    uint64_t created_s;
    bool chat, include_usage;
    bool begun;   /* the first event of a chat is out */
    bool counted; /* its code */
    sh_buf text;  /* whole, or the next piece */
} completion;

static api_endpoint endpoint_of(bool chat)
{
    return chat ? API_CHAT : API_COMPLETIONS;
}

/* The model may end inside a character, and its byte tokens need not be UTF-8 at all. */
static json_t *text_json(const sh_buf *text)
{
    json_t *value = json_stringn(text->len ? (const char *)text->data : "", text->len);
    if (value)
        return value;
    char *clean = sh_calloc(text->len + 1, 1);
    if (!clean)
        return json_string("");
    for (size_t i = 0; i < text->len; i++)
        clean[i] = text->data[i] < 0x80 ? (char)text->data[i] : '?';
    value = json_stringn(clean, text->len);
    free(clean);
    return value;
}

static json_t *head_json(const completion *c, bool chunk)
{
    char id[40], print[48];
    const char *object = !c->chat ? "text_completion"
                         : chunk  ? "chat.completion.chunk"
                                  : "chat.completion";
    snprintf(id, sizeof id, "%s-%016" PRIx64, c->chat ? "chatcmpl" : "cmpl", c->info.id);
    snprintf(print, sizeof print, "shoal-release-%" PRIu64, c->info.version);
    json_t *root = json_object();
    sh_json_set(root, "id", json_string(id));
    sh_json_set(root, "object", json_string(object));
    sh_json_set(root, "created", json_integer((json_int_t)c->created_s));
    sh_json_set(root, "model", json_string(c->api->model_name));
    sh_json_set(root, "system_fingerprint", json_string(print));
    return root;
}

static json_t *usage_json(const sh_generation_info *info)
{
    json_t *usage = json_object(), *details = json_object();
    sh_json_set(details, "cached_tokens", json_integer(info->cached_tokens));
    sh_json_set(usage, "prompt_tokens", json_integer(info->prompt_tokens));
    sh_json_set(usage, "completion_tokens", json_integer(info->completion_tokens));
    sh_json_set(usage, "total_tokens",
                json_integer((json_int_t)info->prompt_tokens + info->completion_tokens));
    sh_json_set(usage, "prompt_tokens_details", details);
    return usage;
}

static const char *finish_name(const sh_generation_info *info)
{
    return info->finish == SH_FINISH_LENGTH ? "length" : "stop";
}

/* payload_key: "text", "message" or "delta"; finish NULL: it goes on. */
static json_t *choices_json(const char *payload_key, json_t *payload, const char *finish)
{
    json_t *choice = json_object(), *choices = json_array();
    sh_json_set(choice, "index", json_integer(0));
    sh_json_set(choice, payload_key, payload);
    sh_json_set(choice, "logprobs", json_null());
    sh_json_set(choice, "finish_reason", finish ? json_string(finish) : json_null());
    int failed = json_array_append_new(choices, choice);
    SH_ASSERT(!failed);
    return choices;
}

/* Ends the generation: its record goes to the daemon now. */
static void finish(completion *c, int code)
{
    if (c->generation) {
        c->info = sh_generation_get_info(c->generation);
        sh_generation_end(&c->generation);
        api_observe(c->api, &c->info);
    }
    if (!c->counted)
        api_count_code(c->api, endpoint_of(c->chat), code);
    c->counted = true;
}

static void completion_free(void *arg)
{
    completion *c = arg;
    finish(c, API_CLIENT_GONE); /* where nothing else was counted: its client left */
    sh_buf_release(&c->text);
    free(c);
}

/* ---------------------------------------------------------------- streams */

/* One event; choices is taken over, NULL for none. */
static sh_status put_event(completion *c, json_t *choices, json_t *usage, sh_buf *out)
{
    json_t *root = head_json(c, true);
    sh_json_set(root, "choices", choices ? choices : json_array());
    if (usage || c->include_usage)
        sh_json_set(root, "usage", usage ? usage : json_null());
    char *text = json_dumps(root, JSON_COMPACT);
    sh_status status = text ? sh_buf_printf(out, "data: %s\n\n", text) : SH_ERR_NO_MEMORY;
    free(text);
    json_decref(root);
    return status;
}

/* The model's words, or, of a chat's first event, who speaks. text NULL: no more words. */
static sh_status put_words(completion *c, json_t *text, const char *role, const char *finish_reason,
                           sh_buf *out)
{
    if (!c->chat)
        return put_event(c, choices_json("text", text ? text : json_string(""), finish_reason),
                         NULL, out);
    json_t *delta = json_object();
    if (role)
        sh_json_set(delta, "role", json_string(role));
    if (text)
        sh_json_set(delta, "content", text);
    return put_event(c, choices_json("delta", delta, finish_reason), NULL, out);
}

static sh_status put_end(completion *c, sh_buf *out)
{
    SH_TRY(put_words(c, NULL, NULL, finish_name(&c->info), out));
    if (c->include_usage)
        SH_TRY(put_event(c, NULL, usage_json(&c->info), out));
    return sh_buf_printf(out, "data: [DONE]\n\n");
}

static sh_status stream_next(void *arg, sh_buf *out, bool *done)
{
    completion *c = arg;
    sh_error err = {0};
    if (c->chat && !c->begun) {
        c->begun = true;
        return put_words(c, json_string(""), "assistant", NULL, out);
    }
    sh_buf_clear(&c->text);
    bool over = false;
    sh_status status = sh_generation_next(c->generation, &c->text, &over, &err);
    if (status == SH_OK && c->text.len)
        status = put_words(c, text_json(&c->text), NULL, NULL, out);
    if (status == SH_OK && over) {
        finish(c, 200);
        status = put_end(c, out);
        *done = true;
    }
    if (status != SH_OK) {
        sh_log(SH_LOG_ERROR, "stream_failed", "status=%s error=\"%s\"", sh_status_name(status),
               err.text);
        finish(c, 500);
    }
    return status;
}

/* ---------------------------------------------------------------- requests */

static void fail_engine(sh_http_reply *reply, bool chat, sh_status status, bool too_long,
                        const sh_error *err)
{
    const char *param = chat ? "messages" : "prompt";
    if (too_long) {
        sh_http_fail(reply, 400, "invalid_request_error", param, "context_length_exceeded", "%s",
                     err->text);
    } else if (status == SH_ERR_LIMIT) {
        sh_http_fail(reply, 429, "overloaded_error", NULL, "busy", "%s", err->text);
        reply->retry_after_s = 1;
    } else if (status == SH_ERR_CANCELLED || status == SH_ERR_NO_MEMORY) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, "unavailable", "%s", err->text);
        reply->retry_after_s = 5;
    } else if (status == SH_ERR_INVALID) {
        sh_http_fail(reply, 400, "invalid_request_error", param, NULL, "%s", err->text);
    } else {
        sh_http_fail(reply, 500, "server_error", NULL, NULL, "%s", err->text);
        sh_log(SH_LOG_ERROR, "inference_failed", "status=%s error=\"%s\"", sh_status_name(status),
               err->text);
    }
}

static void answer_whole(completion *c, sh_http_reply *reply)
{
    sh_error err = {0};
    sh_status status = SH_OK;
    bool done = false;
    while (status == SH_OK && !done)
        status = sh_generation_next(c->generation, &c->text, &done, &err);
    if (status != SH_OK) {
        fail_engine(reply, c->chat, status, false, &err);
        finish(c, reply->status);
        return;
    }
    finish(c, 200);
    json_t *root = head_json(c, false), *text = text_json(&c->text), *choices;
    if (c->chat) {
        json_t *message = json_object();
        sh_json_set(message, "role", json_string("assistant"));
        sh_json_set(message, "content", text);
        sh_json_set(message, "refusal", json_null());
        choices = choices_json("message", message, finish_name(&c->info));
    } else {
        choices = choices_json("text", text, finish_name(&c->info));
    }
    sh_json_set(root, "choices", choices);
    sh_json_set(root, "usage", usage_json(&c->info));
    sh_http_json(reply, 200, root);
}

static sh_status begin(sh_api *api, const api_ask *ask, completion **out, bool *too_long,
                       sh_error *err)
{
    completion *c = sh_calloc(1, sizeof *c);
    if (!c)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory: try again later");
    c->api = api;
    c->chat = ask->chat;
    c->include_usage = ask->include_usage;
    c->created_s = sh_clock_wall_ms() / 1000;
    sh_buf_init(&c->text, TEXT_BYTES_MAX);
    sh_status status =
        sh_generation_begin(api->options.engine, &ask->request, &c->generation, too_long, err);
    if (status != SH_OK) {
        free(c);
        return status;
    }
    c->info = sh_generation_get_info(c->generation);
    *out = c;
    return SH_OK;
}

static void handle(sh_api *api, const sh_http_request *request, bool chat, sh_http_reply *reply)
{
    api_ask ask;
    completion *c = NULL;
    bool too_long = false;
    sh_error err = {0};
    if (api_ask_parse(api, request, chat, &ask, reply)) {
        sh_status status = begin(api, &ask, &c, &too_long, &err);
        if (status != SH_OK)
            fail_engine(reply, chat, status, too_long, &err);
    }
    if (!c) {
        api_count_code(api, endpoint_of(chat), reply->status);
    } else if (ask.stream) {
        reply->content_type = "text/event-stream; charset=utf-8";
        reply->next = stream_next;
        reply->release = completion_free;
        reply->arg = c;
    } else {
        answer_whole(c, reply);
        completion_free(c);
    }
    api_ask_release(&ask);
}

void api_handle_completions(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    handle(arg, request, false, reply);
}

void api_handle_chat(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    handle(arg, request, true, reply);
}
