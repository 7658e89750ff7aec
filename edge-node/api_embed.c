/*
 * POST /v1/embeddings: vectors of texts, from the engine. Nothing of them is kept.
 */
#include "edge-node/api_internal.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    json_t *root;
    sh_embed_input inputs[SH_EMBED_INPUTS_MAX];
    size_t n;
    int32_t *tokens; /* of all inputs that are arrays of tokens */
    size_t n_tokens;
    bool base64;
} embed_ask;

static bool read_tokens(const json_t *array, embed_ask *ask, sh_embed_input *out,
                        sh_http_reply *reply)
{
    size_t n = json_array_size(array);
    out->tokens = ask->tokens + ask->n_tokens;
    out->n_tokens = n;
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_integer(value) || json_integer_value(value) < 0 ||
            json_integer_value(value) > INT32_MAX)
            return api_refuse(reply, "input", "tokens must be integers from 0");
        ask->tokens[ask->n_tokens++] = (int32_t)json_integer_value(value);
    }
    return n > 0 || api_refuse(reply, "input", "it is empty");
}

static bool read_input(const json_t *value, embed_ask *ask, sh_http_reply *reply)
{
    sh_embed_input *out = &ask->inputs[ask->n++];
    if (json_is_array(value))
        return read_tokens(value, ask, out, reply);
    if (!json_is_string(value))
        return api_refuse(reply, "input",
                          "a string, an array of strings, or of tokens, or of arrays of tokens, is "
                          "needed");
    out->text = json_string_value(value);
    out->text_bytes = json_string_length(value);
    return out->text_bytes > 0 || api_refuse(reply, "input", "it is empty");
}

static size_t count_tokens(const json_t *input)
{
    size_t n = json_array_size(input), all = n;
    for (size_t i = 0; i < n; i++)
        all += json_array_size(json_array_get(input, i));
    return all;
}

static bool read_inputs(embed_ask *ask, sh_http_reply *reply)
{
    const json_t *input = api_field(ask->root, "input");
    ask->tokens = sh_calloc(count_tokens(input) + 1, sizeof(*ask->tokens));
    if (!ask->tokens) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, "memory",
                     "no memory for the input: try again later");
        return false;
    }
    size_t n = json_array_size(input);
    if (!json_is_array(input) || json_is_integer(json_array_get(input, 0)))
        return read_input(input, ask, reply);
    if (n < 1 || n > SH_EMBED_INPUTS_MAX)
        return api_refuse(reply, "input", "1 to %d inputs are taken", SH_EMBED_INPUTS_MAX);
    for (size_t i = 0; i < n; i++)
        if (!read_input(json_array_get(input, i), ask, reply))
            return false;
    return true;
}

static bool parse(const sh_api *api, const sh_http_request *request, embed_ask *ask,
                  sh_http_reply *reply)
{
    ask->root = api_parse_body(request, reply);
    if (!ask->root || !api_check_model(api, ask->root, reply))
        return false;
    if (api_field(ask->root, "dimensions"))
        return api_refuse(reply, "dimensions", "not supported: leave it out");
    const json_t *format = api_field(ask->root, "encoding_format");
    const char *name = format ? json_string_value(format) : "float";
    ask->base64 = name && strcmp(name, "base64") == 0;
    if (!ask->base64 && !(name && strcmp(name, "float") == 0))
        return api_refuse(reply, "encoding_format", "float or base64 is needed");
    if (!read_inputs(ask, reply))
        return false;
    uint64_t width = sh_engine_get_status(api->options.engine).width;
    if (ask->n * width * API_EMBED_BYTES_A_VALUE > SH_HTTP_REPLY_MAX)
        return api_refuse(reply, "input",
                          "%zu vectors of %llu values do not fit one answer: ask for fewer", ask->n,
                          (unsigned long long)width);
    return true;
}

/* RFC 4648, of little-endian floats, as OpenAI sends them. */
static json_t *base64_json(const float *v, uint32_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t bytes = (size_t)n * sizeof(float), at = 0;
    uint8_t *in = sh_calloc(bytes + 2, 1);
    char *out = sh_calloc(bytes / 3 * 4 + 5, 1);
    if (!in || !out) {
        free(in);
        free(out);
        return NULL;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &v[i], sizeof bits);
        for (int b = 0; b < 4; b++)
            in[4 * (size_t)i + (size_t)b] = (uint8_t)(bits >> (8 * b));
    }
    for (size_t i = 0; i < bytes; i += 3) {
        uint32_t group = (uint32_t)in[i] << 16 | (uint32_t)in[i + 1] << 8 | in[i + 2];
        for (int k = 0; k < 4; k++)
            out[at++] = digits[group >> (18 - 6 * k) & 63];
    }
    if (bytes % 3)
        memset(out + at - (3 - bytes % 3), '=', 3 - bytes % 3);
    json_t *text = json_stringn(out, at);
    free(in);
    free(out);
    return text;
}

static json_t *vector_json(const float *v, uint32_t n, bool base64)
{
    if (base64)
        return base64_json(v, n);
    json_t *array = json_array();
    for (uint32_t i = 0; array && i < n; i++)
        if (json_array_append_new(array, json_real((double)v[i])) != 0) {
            json_decref(array); /* not a number, or memory is out */
            return NULL;
        }
    return array;
}

static void answer(const sh_api *api, const embed_ask *ask, const sh_embeddings *made,
                   sh_http_reply *reply)
{
    json_t *root = json_object(), *data = json_array(), *usage = json_object();
    bool good = true;
    for (size_t i = 0; i < ask->n && good; i++) {
        json_t *vector = vector_json(made->vectors + i * made->width, made->width, ask->base64);
        json_t *item = json_object();
        good = vector != NULL;
        sh_json_set(item, "object", json_string("embedding"));
        sh_json_set(item, "index", json_integer((json_int_t)i));
        sh_json_set(item, "embedding", good ? vector : json_null());
        good = json_array_append_new(data, item) == 0 && good;
    }
    sh_json_set(usage, "prompt_tokens", json_integer(made->tokens));
    sh_json_set(usage, "total_tokens", json_integer(made->tokens));
    sh_json_set(root, "object", json_string("list"));
    sh_json_set(root, "data", data);
    sh_json_set(root, "model", json_string(api->model_name));
    sh_json_set(root, "usage", usage);
    if (good) {
        sh_http_json(reply, 200, root);
        return;
    }
    json_decref(root);
    sh_http_fail(reply, 500, "server_error", NULL, NULL,
                 "the model's state is no number, or memory is out");
}

void api_handle_embeddings(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    sh_api *api = arg;
    bool gone = false;
    embed_ask *ask = sh_calloc(1, sizeof *ask);
    if (!ask) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, "memory", "no memory: try again later");
    } else if (parse(api, request, ask, reply)) {
        sh_error err = {0};
        sh_embeddings made = {0};
        bool too_long = false;
        const sh_request_client client = {api_client_gone, (void *)request->client};
        sh_embed_request wanted = {.inputs = ask->inputs, .n = ask->n, .client = &client};
        sh_status status = sh_engine_embed(api->options.engine, &wanted, &made, &too_long, &err);
        gone = status == SH_ERR_CANCELLED && sh_http_client_gone(request->client);
        if (status == SH_OK)
            answer(api, ask, &made, reply);
        else
            api_fail_engine(reply, "input", status, too_long, &err);
        free(made.vectors);
    }
    api_count_code(api, API_EMBEDDINGS, gone ? API_CLIENT_GONE : reply->status);
    if (ask) {
        json_decref(ask->root);
        free(ask->tokens);
    }
    free(ask);
}
