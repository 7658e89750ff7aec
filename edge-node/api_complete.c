/*
 * Completions and chats, whole or as a stream of events. A generation ends before its last words
 * are sent: a client that rates it at once finds it on record. Of several choices (`n`) one is
 * generated after the other, on one slot; the id of the answer is the first one's.
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
    sh_generation_info info;   /* of the first choice */
    sh_generation_info last;   /* of the one that ended last */
    uint64_t completion_tokens;
    uint32_t n, index; /* choices; the one under way */
    const void *client;
    bool with_logprobs;
    api_logprobs logprobs;
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

static json_t *usage_json(const completion *c)
{
    const sh_generation_info *info = &c->info;
    json_t *usage = json_object(), *details = json_object();
    sh_json_set(details, "cached_tokens", json_integer(info->cached_tokens));
    sh_json_set(usage, "prompt_tokens", json_integer(info->prompt_tokens));
    sh_json_set(usage, "completion_tokens", json_integer((json_int_t)c->completion_tokens));
    sh_json_set(usage, "total_tokens",
                json_integer((json_int_t)(info->prompt_tokens + c->completion_tokens)));
    sh_json_set(usage, "prompt_tokens_details", details);
    return usage;
}

static const char *finish_name(const sh_generation_info *info)
{
    return info->finish == SH_FINISH_LENGTH ? "length" : "stop";
}

typedef struct {
    const char *payload_key; /* "text", "message" or "delta" */
    json_t *payload, *logprobs;
    const char *finish; /* NULL: it goes on */
} choice_parts;

/* The parts are taken over. */
static json_t *choice_json(const completion *c, const choice_parts *parts)
{
    json_t *choice = json_object();
    sh_json_set(choice, "index", json_integer(c->index));
    sh_json_set(choice, parts->payload_key, parts->payload);
    sh_json_set(choice, "logprobs", parts->logprobs ? parts->logprobs : json_null());
    sh_json_set(choice, "finish_reason", parts->finish ? json_string(parts->finish) : json_null());
    return choice;
}

static json_t *take_logprobs(completion *c)
{
    return api_logprobs_take(c->with_logprobs ? &c->logprobs : NULL, c->generation);
}

/* Counts a choice that has ended. */
static void end_choice(completion *c)
{
    c->last = sh_generation_get_info(c->generation);
    c->completion_tokens += c->last.completion_tokens;
    api_observe(c->api, &c->last);
}

/* Begins the next choice. */
static sh_status begin_next(completion *c, sh_error *err)
{
    end_choice(c);
    c->index++;
    c->begun = false;
    c->logprobs = (api_logprobs){.chat = c->chat};
    return sh_generation_again(c->generation, err);
}

/* Ends the generation: its record goes to the daemon now. */
static void finish(completion *c, int code)
{
    if (c->generation) {
        end_choice(c);
        sh_generation_end(&c->generation);
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

/* One event; choice is taken over, NULL for none. */
static sh_status put_event(completion *c, json_t *choice, json_t *usage, sh_buf *out)
{
    json_t *root = head_json(c, true), *choices = json_array();
    int failed = choice ? json_array_append_new(choices, choice) : 0;
    SH_ASSERT(!failed);
    sh_json_set(root, "choices", choices);
    if (usage || c->include_usage)
        sh_json_set(root, "usage", usage ? usage : json_null());
    char *text = json_dumps(root, JSON_COMPACT);
    sh_status status = text ? sh_buf_printf(out, "data: %s\n\n", text) : SH_ERR_NO_MEMORY;
    free(text);
    json_decref(root);
    return status;
}

/* The model's words, or, of a chat's first event, who speaks. text NULL: no more words. text and
 * logprobs are taken over. */
static sh_status put_words(completion *c, json_t *text, json_t *logprobs, const char *finish_reason,
                           sh_buf *out)
{
    choice_parts parts = {"text", NULL, logprobs, finish_reason};
    if (c->chat) {
        parts.payload_key = "delta";
        parts.payload = json_object();
        if (!c->begun)
            sh_json_set(parts.payload, "role", json_string("assistant"));
        if (text)
            sh_json_set(parts.payload, "content", text);
    } else {
        parts.payload = text ? text : json_string("");
    }
    c->begun = true;
    return put_event(c, choice_json(c, &parts), NULL, out);
}

/* The end of a choice, and of the stream with the last one. Its record is handed over first. */
static sh_status put_end(completion *c, json_t *logprobs, bool *done, sh_buf *out, sh_error *err)
{
    uint32_t index = c->index;
    *done = index + 1 == c->n;
    sh_status status = SH_OK;
    if (*done)
        finish(c, 200);
    else
        status = begin_next(c, err);
    if (status != SH_OK) {
        json_decref(logprobs);
        return status;
    }
    uint32_t next = c->index;
    bool begun = c->begun;
    c->index = index;
    c->begun = true;
    status = put_words(c, NULL, logprobs, finish_name(&c->last), out);
    c->index = next;
    c->begun = begun;
    if (*done && status == SH_OK && c->include_usage)
        status = put_event(c, NULL, usage_json(c), out);
    return *done && status == SH_OK ? sh_buf_printf(out, "data: [DONE]\n\n") : status;
}

static sh_status stream_next(void *arg, sh_buf *out, bool *done)
{
    completion *c = arg;
    sh_error err = {0};
    if (c->chat && !c->begun)
        return put_words(c, json_string(""), NULL, NULL, out);
    if (sh_http_client_gone(c->client))
        return SH_ERR_CANCELLED; /* completion_free ends it, and counts */
    sh_buf_clear(&c->text);
    bool over = false;
    sh_status status = sh_generation_next(c->generation, &c->text, &over, &err);
    json_t *logprobs = status == SH_OK && (c->text.len || over) ? take_logprobs(c) : NULL;
    if (status == SH_OK && c->text.len) {
        status = put_words(c, text_json(&c->text), logprobs, NULL, out);
        logprobs = NULL;
    }
    if (status == SH_OK && over) {
        status = put_end(c, logprobs, done, out, &err);
        logprobs = NULL;
    }
    json_decref(logprobs);
    if (status != SH_OK) {
        sh_log(SH_LOG_ERROR, "stream_failed", "status=%s error=\"%s\"", sh_status_name(status),
               err.text);
        finish(c, 500);
    }
    return status;
}

/* ---------------------------------------------------------------- requests */

void api_fail_engine(sh_http_reply *reply, const char *param, sh_status status, bool too_long,
                     const sh_error *err)
{
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

bool api_client_gone(void *client)
{
    return sh_http_client_gone(client);
}

static const char *param_of(bool chat)
{
    return chat ? "messages" : "prompt";
}

/* The whole of one choice; its generation has not ended yet. */
static sh_status run_choice(completion *c, json_t *choices, sh_error *err)
{
    bool done = false;
    sh_buf_clear(&c->text);
    while (!done) {
        if (sh_http_client_gone(c->client))
            return sh_fail(err, SH_ERR_CANCELLED, "the client is gone");
        SH_TRY(sh_generation_next(c->generation, &c->text, &done, err));
    }
    sh_generation_info info = sh_generation_get_info(c->generation);
    choice_parts parts = {"text", text_json(&c->text), take_logprobs(c), finish_name(&info)};
    if (c->chat) {
        json_t *message = json_object();
        sh_json_set(message, "role", json_string("assistant"));
        sh_json_set(message, "content", parts.payload);
        sh_json_set(message, "refusal", json_null());
        parts.payload_key = "message";
        parts.payload = message;
    }
    int failed = json_array_append_new(choices, choice_json(c, &parts));
    SH_ASSERT(!failed);
    return SH_OK;
}

static void answer_whole(completion *c, sh_http_reply *reply)
{
    sh_error err = {0};
    json_t *choices = json_array();
    sh_status status = run_choice(c, choices, &err);
    while (status == SH_OK && c->index + 1 < c->n) {
        status = begin_next(c, &err);
        if (status == SH_OK)
            status = run_choice(c, choices, &err);
    }
    if (status != SH_OK) {
        bool gone = status == SH_ERR_CANCELLED && sh_http_client_gone(c->client);
        api_fail_engine(reply, param_of(c->chat), status, false, &err);
        finish(c, gone ? API_CLIENT_GONE : reply->status);
        json_decref(choices);
        return;
    }
    finish(c, 200);
    json_t *root = head_json(c, false);
    sh_json_set(root, "choices", choices);
    sh_json_set(root, "usage", usage_json(c));
    sh_http_json(reply, 200, root);
}

static sh_status begin(sh_api *api, const api_ask *ask, const void *client, completion **out,
                       bool *too_long, sh_error *err)
{
    completion *c = sh_calloc(1, sizeof *c);
    if (!c)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory: try again later");
    c->api = api;
    c->chat = ask->chat;
    c->n = ask->n;
    c->client = client;
    c->with_logprobs = ask->request.logprobs;
    c->logprobs.chat = ask->chat;
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
    bool too_long = false, gone = false;
    sh_error err = {0};
    const sh_request_client client = {api_client_gone, (void *)request->client};
    if (api_ask_parse(api, request, chat, &ask, reply)) {
        ask.request.client = &client;
        sh_status status = begin(api, &ask, request->client, &c, &too_long, &err);
        gone = status == SH_ERR_CANCELLED && sh_http_client_gone(request->client);
        if (status != SH_OK)
            api_fail_engine(reply, param_of(chat), status, too_long, &err);
    }
    if (!c) {
        api_count_code(api, endpoint_of(chat), gone ? API_CLIENT_GONE : reply->status);
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
