#include "edge-node/api_internal.h"

#include <stdlib.h>
#include <string.h>

#include "shared/base/clock.h"
#include "shared/base/log.h"

/* ---------------------------------------------------------------- feedback */

/* "cmpl-" or "chatcmpl-" and 16 hexadecimal digits, as they were given out. */
static bool parse_id(const char *text, uint64_t *out)
{
    const char *digits = strchr(text, '-');
    size_t prefix = digits ? (size_t)(digits - text) : 0;
    if (!(prefix == 4 && !memcmp(text, "cmpl", 4)) &&
        !(prefix == 8 && !memcmp(text, "chatcmpl", 8)))
        return false;
    digits++;
    if (strlen(digits) != 16 || strspn(digits, "0123456789abcdef") != 16)
        return false;
    *out = strtoull(digits, NULL, 16);
    return true;
}

static bool bad_feedback(sh_http_reply *reply, const char *param, const char *text)
{
    sh_http_fail(reply, 400, "invalid_request_error", param, NULL, "%s: %s", param, text);
    return false;
}

static bool read_feedback(const json_t *root, sh_api_feedback *out, sh_http_reply *reply)
{
    static const char *const kinds[SH_FEEDBACK_KINDS] = {[SH_FEEDBACK_ACCEPT] = "accept",
                                                         [SH_FEEDBACK_EDIT] = "edit",
                                                         [SH_FEEDBACK_REJECT] = "reject"};
    const json_t *text = json_object_get(root, "text");
    const char *id = json_string_value(json_object_get(root, "id"));
    const char *action = json_string_value(json_object_get(root, "action"));
    *out = (sh_api_feedback){.kind = SH_FEEDBACK_NONE};
    if (!id || !parse_id(id, &out->id))
        return bad_feedback(reply, "id", "the id of a completion is needed: cmpl-… or chatcmpl-…");
    for (int k = SH_FEEDBACK_ACCEPT; k < SH_FEEDBACK_KINDS && action; k++)
        if (!strcmp(action, kinds[k]))
            out->kind = (sh_feedback_kind)k;
    if (out->kind == SH_FEEDBACK_NONE)
        return bad_feedback(reply, "action", "accept, edit or reject is needed");
    if (text && !json_is_null(text)) {
        if (!json_is_string(text))
            return bad_feedback(reply, "text", "a string is needed");
        out->text = json_string_value(text);
        out->text_bytes = json_string_length(text);
    }
    if (out->kind == SH_FEEDBACK_EDIT && !out->text_bytes)
        return bad_feedback(reply, "text",
                            "with edit it is needed: what the author wrote from the end of the "
                            "prompt on");
    if (!out->text_bytes)
        out->text = NULL;
    if (out->text_bytes > SH_API_TEXT_BYTES_MAX) {
        sh_http_fail(reply, 413, "invalid_request_error", "text", "text_too_long",
                     "text: %zu bytes, at most %u are taken", out->text_bytes,
                     SH_API_TEXT_BYTES_MAX);
        return false;
    }
    return true;
}

static void fail_feedback(sh_http_reply *reply, const sh_api_feedback *feedback, sh_status status,
                          const sh_error *err)
{
    const char *invalid = "invalid_request_error";
    switch (status) {
    case SH_ERR_NOT_FOUND:
        sh_http_fail(reply, 404, "not_found_error", "id", "completion_not_found", "%s", err->text);
        break;
    case SH_ERR_EXISTS:
        sh_http_fail(reply, 409, "conflict_error", "action", "already_rated", "%s", err->text);
        break;
    case SH_ERR_INVALID:
        sh_http_fail(reply, 400, invalid, "text", NULL, "%s", err->text);
        break;
    case SH_ERR_LIMIT: /* no token is shorter than a byte: a short text is not what is too long */
        if (feedback->text_bytes >= SH_NODE_FEEDBACK_ROW_MAX) {
            sh_http_fail(reply, 413, invalid, "text", "text_too_long", "%s", err->text);
        } else {
            sh_http_fail(reply, 429, "overloaded_error", NULL, "busy", "%s", err->text);
            reply->retry_after_s = 1;
        }
        break;
    case SH_ERR_CANCELLED:
        sh_http_fail(reply, 503, "overloaded_error", NULL, "unavailable", "%s", err->text);
        reply->retry_after_s = 5;
        break;
    case SH_ERR_FULL:
        sh_http_fail(reply, 507, "server_error", NULL, "disk_full", "%s", err->text);
        break;
    default:
        sh_http_fail(reply, 500, "server_error", NULL, NULL, "%s", err->text);
        sh_log(SH_LOG_ERROR, "feedback_failed", "status=%s error=\"%s\"", sh_status_name(status),
               err->text);
    }
}

static void handle_feedback(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    sh_api *api = arg;
    sh_api_feedback feedback;
    sh_error err = {0};
    json_t *root = api_parse_body(request, reply);
    if (root && read_feedback(root, &feedback, reply)) {
        sh_status status = api->options.backend.feedback(api->options.backend.arg, &feedback, &err);
        if (status == SH_OK) {
            json_t *answer = json_object();
            sh_json_set(answer, "object", json_string("feedback"));
            sh_json_set(answer, "id", json_incref(json_object_get(root, "id")));
            sh_json_set(answer, "action", json_incref(json_object_get(root, "action")));
            sh_http_json(reply, 200, answer);
        } else {
            fail_feedback(reply, &feedback, status, &err);
        }
    }
    json_decref(root);
    api_count_code(api, API_FEEDBACK, reply->status);
}

/* ---------------------------------------------------------------- models, health */

static json_t *model_json(const sh_api *api)
{
    json_t *model = json_object();
    sh_json_set(model, "id", json_string(api->model_name));
    sh_json_set(model, "object", json_string("model"));
    sh_json_set(model, "created", json_integer((json_int_t)api->created_s));
    sh_json_set(model, "owned_by", json_string("shoal"));
    sh_engine_status status = sh_engine_get_status(api->options.engine);
    sh_json_set(model, "release", json_integer((json_int_t)status.version));
    sh_json_set(model, "chat_template", json_string(sh_chat_family_name(status.family)));
    return model;
}

static void handle_models(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    const sh_api *api = arg;
    (void)request;
    json_t *root = json_object(), *data = json_array();
    int failed = json_array_append_new(data, model_json(api));
    SH_ASSERT(!failed);
    sh_json_set(root, "object", json_string("list"));
    sh_json_set(root, "data", data);
    sh_http_json(reply, 200, root);
}

static void handle_model(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    const sh_api *api = arg;
    const char *name = request->path + strlen(API_MODELS_PATH);
    if (!strcmp(name, api->model_name) || !strcmp(name, API_NAME))
        sh_http_json(reply, 200, model_json(api));
    else
        sh_http_fail(reply, 404, "not_found_error", "model", "model_not_found",
                     "there is no model '%.64s' here: this node has '%s'", name, api->model_name);
}

static void handle_health(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    const sh_api *api = arg;
    (void)request;
    char reason[SH_ERROR_TEXT_BYTES] = "";
    const sh_api_backend *backend = &api->options.backend;
    bool healthy = !backend->healthy || backend->healthy(backend->arg, reason, sizeof reason);
    json_t *root = json_object();
    sh_json_set(root, "status", json_string(healthy ? "ok" : "unhealthy"));
    if (!healthy) {
        json_t *text = json_string(reason);
        sh_json_set(root, "reason", text ? text : json_string("")); /* cut inside a character */
    }
    sh_http_json(reply, healthy ? 200 : 503, root);
}

/* ---------------------------------------------------------------- create, destroy */

static const sh_http_route routes[] = {
    {"POST", "/v1/completions", api_handle_completions, false},
    {"POST", "/v1/chat/completions", api_handle_chat, false},
    {"POST", "/v1/embeddings", api_handle_embeddings, false},
    {"GET", "/v1/models", handle_models, false},
    {"GET", API_MODELS_PATH "*", handle_model, false},
    {"POST", "/v1/feedback", handle_feedback, false},
    {"GET", "/healthz", handle_health, true},
    {"GET", "/metrics", api_handle_metrics, true},
};

static void api_free(sh_api *api)
{
    pthread_mutex_destroy(&api->lock);
    free(api->model_name);
    free(api);
}

sh_status sh_api_create(const sh_api_options *options, sh_api **out, sh_error *err)
{
    const char *name = options->model_name && *options->model_name ? options->model_name : API_NAME;
    json_t *text = json_string(name);
    if (!text)
        return sh_fail(err, SH_ERR_USAGE, "API: the model's name is not UTF-8: choose another");
    json_decref(text);
    sh_api *api = sh_calloc(1, sizeof *api);
    if (!api || !(api->model_name = strdup(name))) {
        free(api);
        return sh_fail(err, SH_ERR_NO_MEMORY, "API: out of memory");
    }
    api->options = *options;
    api->options.model_name = api->options.address = api->options.token = NULL; /* the caller's */
    api->created_s = sh_clock_wall_ms() / 1000;
    pthread_mutex_init(&api->lock, NULL);
    api_metrics_init(api);
    sh_http_options http = {.address = options->address,
                            .port = options->port,
                            .token = options->token,
                            .routes = routes,
                            .n_routes = SH_COUNT(routes),
                            .arg = api,
                            .connections_max = options->connections_max};
    sh_status status = sh_http_create(&http, &api->http, err);
    if (status != SH_OK) {
        api_free(api);
        return status;
    }
    *out = api;
    return SH_OK;
}

void sh_api_destroy(sh_api **api)
{
    if (!*api)
        return;
    sh_http_destroy(&(*api)->http);
    api_free(*api);
    *api = NULL;
}

uint16_t sh_api_port(const sh_api *api)
{
    return sh_http_port(api->http);
}
