/* The API over an engine of given words: shapes, fields, errors, streams, feedback, metrics. */
#include "edge-node/api.h"
#include "tests/http/client.h"
#include "tests/node/fake_engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS "Hello w\xc3\xb6rld!"

typedef struct {
    sh_engine engine;
    sh_api *api;
    uint16_t port;
    pthread_mutex_t lock;
    sh_status feedback_status;
    sh_api_feedback feedback; /* the last one */
    char text[64];
    uint32_t n_feedback;
    bool sick;
} world;

static sh_status take_feedback(void *arg, const sh_api_feedback *feedback, sh_error *err)
{
    world *w = arg;
    pthread_mutex_lock(&w->lock);
    w->n_feedback++;
    w->feedback = *feedback;
    snprintf(w->text, sizeof w->text, "%.*s", (int)feedback->text_bytes,
             feedback->text ? feedback->text : "");
    sh_status status = w->feedback_status;
    pthread_mutex_unlock(&w->lock);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "feedback: %s", sh_status_name(status));
}

static void put_metrics(void *arg, sh_buf *out)
{
    (void)arg;
    sh_metric_one(out, "shoal_of_the_backend", "gauge", "One more.", 4);
}

static bool is_healthy(void *arg, char *text, size_t text_bytes)
{
    const world *w = arg;
    if (w->sick)
        snprintf(text, text_bytes, "the disk is full");
    return !w->sick;
}

static int setup(void **state)
{
    world *w = calloc(1, sizeof *w);
    sh_error err = {0};
    fake_engine_init(&w->engine);
    pthread_mutex_init(&w->lock, NULL);
    sh_api_options o = {.engine = &w->engine,
                        .backend = {.arg = w,
                                    .feedback = take_feedback,
                                    .metrics = put_metrics,
                                    .healthy = is_healthy},
                        .model_name = "edge-model",
                        .address = "127.0.0.1"};
    if (sh_api_create(&o, &w->api, &err) != SH_OK)
        fail_msg("%s", err.text);
    w->port = sh_api_port(w->api);
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    world *w = *state;
    sh_api_destroy(&w->api);
    assert_null(w->api);
    assert_int_equal(w->engine.begun, w->engine.ended);
    pthread_mutex_destroy(&w->lock);
    free(w);
    return 0;
}

static json_t *ask(const world *w, const char *path, const char *body, int status)
{
    json_error_t error;
    client_reply r = client_ask(w->port, body ? "POST" : "GET", path, NULL, body);
    if (r.status != status || !r.whole)
        fail_msg("%s %s: status %d, not %d: %s", path, body ? body : "", r.status, status, r.body);
    json_t *value = json_loads(r.body, 0, &error);
    if (!value)
        fail_msg("%s: no JSON: %s", path, r.body);
    client_release(&r);
    return value;
}

/* The value at a path such as "choices.0.text". */
static const json_t *at(const json_t *value, const char *path)
{
    char name[64];
    while (*path) {
        size_t n = strcspn(path, ".");
        snprintf(name, sizeof name, "%.*s", (int)n, path);
        value = json_is_array(value) ? json_array_get(value, (size_t)atoi(name))
                                     : json_object_get(value, name);
        path += n + (path[n] == '.');
    }
    return value;
}

static void expect_text(const json_t *root, const char *path, const char *want)
{
    const char *text = json_string_value(at(root, path));
    if (!text || strcmp(text, want) != 0)
        fail_msg("%s is '%s', not '%s'", path, text ? text : "(none)", want);
}

static void expect_number(const json_t *root, const char *path, json_int_t want)
{
    const json_t *value = at(root, path);
    if (!json_is_integer(value) || json_integer_value(value) != want)
        fail_msg("%s is %lld, not %lld", path, (long long)json_integer_value(value),
                 (long long)want);
}

static void expect_error(const world *w, const char *path, const char *body, int status,
                         const char *param, const char *code)
{
    json_t *root = ask(w, path, body, status);
    const char *message = json_string_value(at(root, "error.message"));
    assert_true(message && *message);
    assert_non_null(json_string_value(at(root, "error.type")));
    if (param)
        expect_text(root, "error.param", param);
    else
        assert_true(json_is_null(at(root, "error.param")));
    if (code)
        expect_text(root, "error.code", code);
    else
        assert_true(json_is_null(at(root, "error.code")));
    json_decref(root);
}

static void test_completion(void **state)
{
    world *w = *state;
    json_t *root = ask(w, "/v1/completions", "{\"model\":\"edge-model\",\"prompt\":\"Once\"}", 200);
    expect_text(root, "id", "cmpl-000000000000abc1");
    expect_text(root, "object", "text_completion");
    expect_text(root, "model", "edge-model");
    expect_text(root, "system_fingerprint", "shoal-release-7");
    assert_true(json_integer_value(at(root, "created")) > 1600000000);
    assert_int_equal(json_array_size(at(root, "choices")), 1);
    expect_text(root, "choices.0.text", WORDS);
    expect_number(root, "choices.0.index", 0);
    assert_true(json_is_null(at(root, "choices.0.logprobs")));
    expect_text(root, "choices.0.finish_reason", "length");
    expect_number(root, "usage.prompt_tokens", 12);
    expect_number(root, "usage.completion_tokens", 4);
    expect_number(root, "usage.total_tokens", 16);
    expect_number(root, "usage.prompt_tokens_details.cached_tokens", 5);
    json_decref(root);
    const sh_request *r = &w->engine.request;
    assert_string_equal(w->engine.prompt, "Once");
    assert_int_equal(r->max_tokens, 16);
    assert_true(r->temperature == 1 && r->top_p == 1);
    assert_int_equal(r->seed, 0);
    assert_int_equal(r->n_stops, 0);
    assert_null(r->user);
}

static void test_fields_arrive(void **state)
{
    world *w = *state;
    w->engine.finish = SH_FINISH_STOP;
    json_t *root =
        ask(w, "/v1/completions",
            "{\"prompt\":[\"a\\u00e9\"],\"max_tokens\":3,\"temperature\":0.5,\"top_p\":0.25,"
            "\"seed\":-1,\"stop\":[\"x\",\"\\n\\n\"],\"user\":\"ann\",\"n\":1,\"best_of\":1,"
            "\"echo\":false,\"suffix\":null,\"logprobs\":null,\"logit_bias\":{},"
            "\"frequency_penalty\":0.0,\"stream\":false,\"nobody_knows\":[1,2]}",
            200);
    expect_text(root, "choices.0.finish_reason", "stop");
    json_decref(root);
    const sh_request *r = &w->engine.request;
    assert_string_equal(w->engine.prompt, "a\xc3\xa9");
    assert_int_equal(r->max_tokens, 3);
    assert_true(r->temperature == 0.5f && r->top_p == 0.25f);
    assert_true(r->seed == UINT64_MAX);
    assert_int_equal(r->n_stops, 2);
    assert_string_equal(w->engine.stops[0], "x");
    assert_string_equal(w->engine.stops[1], "\n\n");
    assert_string_equal(w->engine.user, "ann");
    /* A seed of 0 is a seed; no probability left but the first token's is greedy. */
    json_decref(ask(w, "/v1/completions",
                    "{\"prompt\":\"a\",\"seed\":0,\"top_p\":0,\"stop\":\"z\",\"model\":\"shoal\"}",
                    200));
    assert_true(r->seed != 0);
    assert_true(r->temperature == 0 && r->top_p == 1);
    assert_int_equal(r->n_stops, 1);
}

static void test_bad_fields(void **state)
{
    world *w = *state;
    static const struct {
        const char *field, *param;
    } cases[] = {
        {"\"prompt\":null", "prompt"},
        {"\"prompt\":\"\"", "prompt"},
        {"\"prompt\":[]", "prompt"},
        {"\"prompt\":[\"a\",\"b\"]", "prompt"},
        {"\"prompt\":[1,2]", "prompt"},
        {"\"max_tokens\":0", "max_tokens"},
        {"\"max_tokens\":1025", "max_tokens"},
        {"\"max_tokens\":1.5", "max_tokens"},
        {"\"max_tokens\":\"5\"", "max_tokens"},
        {"\"temperature\":-0.1", "temperature"},
        {"\"temperature\":2.1", "temperature"},
        {"\"top_p\":1.1", "top_p"},
        {"\"top_p\":\"x\"", "top_p"},
        {"\"n\":0", "n"},
        {"\"n\":9", "n"},
        {"\"best_of\":3", "best_of"},
        {"\"echo\":true", "echo"},
        {"\"suffix\":\"z\"", "suffix"},
        {"\"logprobs\":6", "logprobs"},
        {"\"logprobs\":true", "logprobs"},
        {"\"top_logprobs\":2", "top_logprobs"},
        {"\"top_k\":-1", "top_k"},
        {"\"min_p\":1.5", "min_p"},
        {"\"repeat_penalty\":11", "repeat_penalty"},
        {"\"logit_bias\":{\"5\":1}", "logit_bias"},
        {"\"presence_penalty\":0.1", "presence_penalty"},
        {"\"response_format\":{\"type\":\"json_object\"}", "response_format"},
        {"\"seed\":\"x\"", "seed"},
        {"\"user\":7", "user"},
        {"\"stop\":\"\"", "stop"},
        {"\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\"]", "stop"},
        {"\"stop\":[1]", "stop"},
        {"\"stop\":{}", "stop"},
        {"\"stream\":1", "stream"},
        {"\"stream_options\":{\"include_usage\":true}", "stream_options"},
        {"\"stream\":true,\"stream_options\":7", "stream_options"},
        {"\"model\":7", "model"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char body[256];
        bool prompt = strcmp(cases[i].param, "prompt") == 0;
        snprintf(body, sizeof body, "{%s%s}", prompt ? "" : "\"prompt\":\"a\",", cases[i].field);
        expect_error(w, "/v1/completions", body, 400, cases[i].param, NULL);
    }
    expect_error(w, "/v1/completions", "{}", 400, "prompt", NULL);
    expect_error(w, "/v1/completions", "{\"prompt\":\"a\"", 400, NULL, NULL);
    expect_error(w, "/v1/completions", "[1]", 400, NULL, NULL);
    expect_error(w, "/v1/completions", "", 400, NULL, NULL);
    expect_error(w, "/v1/completions", "{\"prompt\":\"\xff\xfe\"}", 400, NULL, NULL);
    expect_error(w, "/v1/completions", "{\"prompt\":\"a\",\"model\":\"gpt-\xc3\xb6\"}", 404,
                 "model", "model_not_found");
    assert_int_equal(w->engine.begun, 0);
}

static void test_engine_errors(void **state)
{
    world *w = *state;
    static const struct {
        sh_status status;
        bool too_long;
        int code;
        const char *param, *name;
    } cases[] = {
        {SH_ERR_LIMIT, true, 400, "prompt", "context_length_exceeded"},
        {SH_ERR_LIMIT, false, 429, NULL, "busy"},
        {SH_ERR_CANCELLED, false, 503, NULL, "unavailable"},
        {SH_ERR_INVALID, false, 400, "prompt", NULL},
        {SH_ERR_IO, false, 500, NULL, NULL},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        w->engine.begin_status = cases[i].status;
        w->engine.too_long = cases[i].too_long;
        expect_error(w, "/v1/completions", "{\"prompt\":\"a\"}", cases[i].code, cases[i].param,
                     cases[i].name);
        expect_error(w, "/v1/completions", "{\"prompt\":\"a\",\"stream\":true}", cases[i].code,
                     cases[i].param, cases[i].name);
    }
    w->engine.begin_status = SH_ERR_LIMIT;
    w->engine.too_long = false;
    client_reply r = client_ask(w->port, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\"}");
    assert_string_equal(client_header(&r, "Retry-After"), "1");
    client_release(&r);
    w->engine.begin_status = SH_OK;
    w->engine.next_status = SH_ERR_IO;
    expect_error(w, "/v1/completions", "{\"prompt\":\"a\"}", 500, NULL, NULL);
    /* Too late for a status: the stream is cut, which a client sees. */
    r = client_ask(w->port, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\",\"stream\":true}");
    assert_int_equal(r.status, 200);
    assert_false(r.whole);
    assert_null(strstr(r.body, "[DONE]"));
    client_release(&r);
}

static void test_text_that_is_no_utf8(void **state)
{
    world *w = *state;
    static const char *const pieces[] = {"a\xc3"};
    w->engine.pieces = pieces;
    w->engine.n_pieces = 1;
    json_t *root = ask(w, "/v1/completions", "{\"prompt\":\"a\"}", 200);
    expect_text(root, "choices.0.text", "a?");
    json_decref(root);
}

/* The next event of a stream, or NULL at [DONE]. */
static json_t *next_event(const char **at_text)
{
    json_error_t error;
    const char *text = *at_text, *end = strstr(text, "\n\n");
    if (!end || strncmp(text, "data: ", 6) != 0)
        fail_msg("no event: %s", text);
    *at_text = end + 2;
    if (!strncmp(text, "data: [DONE]\n\n", 14)) {
        assert_int_equal(**at_text, 0);
        return NULL;
    }
    json_t *value = json_loadb(text + 6, (size_t)(end - text - 6), 0, &error);
    assert_non_null(value);
    expect_text(value, "system_fingerprint", "shoal-release-7");
    return value;
}

static void test_stream(void **state)
{
    world *w = *state;
    client_reply r =
        client_ask(w->port, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\",\"stream\":true}");
    assert_int_equal(r.status, 200);
    assert_true(r.whole);
    assert_non_null(strstr(client_header(&r, "Content-Type"), "text/event-stream"));
    static const char *const texts[] = {"Hello", " w\xc3\xb6rld", "!", ""};
    const char *text = r.body;
    for (size_t i = 0; i < SH_COUNT(texts); i++) {
        json_t *event = next_event(&text);
        expect_text(event, "id", "cmpl-000000000000abc1");
        expect_text(event, "object", "text_completion");
        expect_text(event, "choices.0.text", texts[i]);
        assert_null(at(event, "usage"));
        if (i + 1 == SH_COUNT(texts))
            expect_text(event, "choices.0.finish_reason", "length");
        else
            assert_true(json_is_null(at(event, "choices.0.finish_reason")));
        json_decref(event);
    }
    assert_null(next_event(&text));
    client_release(&r);
}

static void test_chat_stream(void **state)
{
    world *w = *state;
    client_reply r = client_ask(w->port, "POST", "/v1/chat/completions", NULL,
                                "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":"
                                "true,\"stream_options\":{\"include_usage\":true}}");
    assert_int_equal(r.status, 200);
    const char *text = r.body;
    json_t *event = next_event(&text);
    expect_text(event, "object", "chat.completion.chunk");
    expect_text(event, "id", "chatcmpl-000000000000abc1");
    expect_text(event, "choices.0.delta.role", "assistant");
    expect_text(event, "choices.0.delta.content", "");
    assert_true(json_is_null(at(event, "usage")));
    json_decref(event);
    static const char *const texts[] = {"Hello", " w\xc3\xb6rld", "!"};
    for (size_t i = 0; i < SH_COUNT(texts); i++) {
        event = next_event(&text);
        expect_text(event, "choices.0.delta.content", texts[i]);
        json_decref(event);
    }
    event = next_event(&text);
    assert_int_equal(json_object_size(at(event, "choices.0.delta")), 0);
    expect_text(event, "choices.0.finish_reason", "length");
    json_decref(event);
    event = next_event(&text);
    assert_int_equal(json_array_size(at(event, "choices")), 0);
    expect_number(event, "usage.total_tokens", 16);
    json_decref(event);
    assert_null(next_event(&text));
    client_release(&r);
}

static void test_chat(void **state)
{
    world *w = *state;
    json_t *root =
        ask(w, "/v1/chat/completions",
            "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\","
            "\"content\":[{\"type\":\"text\",\"text\":\"Say \"},{\"type\":\"text\",\"text\":"
            "\"hello\"}]}],\"max_completion_tokens\":9,\"response_format\":{\"type\":\"text\"}}",
            200);
    expect_text(root, "object", "chat.completion");
    expect_text(root, "id", "chatcmpl-000000000000abc1");
    expect_text(root, "choices.0.message.role", "assistant");
    expect_text(root, "choices.0.message.content", WORDS);
    expect_number(root, "usage.completion_tokens", 4);
    json_decref(root);
    assert_string_equal(w->engine.prompt, "system: Be brief.\nuser: Say hello\n");
    assert_int_equal(w->engine.request.max_tokens, 9);
    json_decref(ask(w, "/v1/chat/completions",
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", 200));
    assert_int_equal(w->engine.request.max_tokens, 128);

    static const char *const bad[] = {
        "{}",
        "{\"messages\":[]}",
        "{\"messages\":\"hi\"}",
        "{\"messages\":[7]}",
        "{\"messages\":[{\"content\":\"a\"}]}",
        "{\"messages\":[{\"role\":\"tool\",\"content\":\"a\"}]}",
        "{\"messages\":[{\"role\":\"user\"}]}",
        "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}",
        "{\"messages\":[{\"role\":\"user\",\"content\":[\"a\"]}]}",
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        expect_error(w, "/v1/chat/completions", bad[i], 400, "messages", NULL);
    expect_error(w, "/v1/chat/completions",
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{}]}", 400,
                 "tools", NULL);
    w->engine.begin_status = SH_ERR_LIMIT;
    w->engine.too_long = true;
    expect_error(w, "/v1/chat/completions",
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", 400, "messages",
                 "context_length_exceeded");
}

static void test_choices(void **state)
{
    world *w = *state;
    json_t *root = ask(w, "/v1/completions", "{\"prompt\":\"a\",\"n\":3}", 200);
    assert_int_equal(json_array_size(at(root, "choices")), 3);
    expect_text(root, "id", "cmpl-000000000000abc1"); /* the first one's, which feedback rates */
    expect_number(root, "choices.2.index", 2);
    expect_text(root, "choices.2.text", WORDS);
    expect_number(root, "usage.prompt_tokens", 12);
    expect_number(root, "usage.completion_tokens", 12); /* of all three */
    expect_number(root, "usage.total_tokens", 24);
    json_decref(root);
    assert_int_equal(w->engine.again, 2);
    assert_int_equal(w->engine.begun, 1); /* one place */

    client_reply r = client_ask(w->port, "POST", "/v1/chat/completions", NULL,
                                "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"n\":2,"
                                "\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    const char *text = r.body;
    char said[2][64] = {"", ""};
    int ends[2] = {0, 0}, roles[2] = {0, 0};
    for (json_t *event; (event = next_event(&text)) != NULL; json_decref(event)) {
        expect_text(event, "id", "chatcmpl-000000000000abc2");
        if (json_array_size(at(event, "choices")) == 0) {
            expect_number(event, "usage.completion_tokens", 8);
            continue;
        }
        size_t i = (size_t)json_integer_value(at(event, "choices.0.index"));
        assert_in_range(i, 0, 1);
        const char *piece = json_string_value(at(event, "choices.0.delta.content"));
        strncat(said[i], piece ? piece : "", sizeof said[i] - strlen(said[i]) - 1);
        roles[i] += json_is_string(at(event, "choices.0.delta.role"));
        ends[i] += json_is_string(at(event, "choices.0.finish_reason"));
    }
    for (int i = 0; i < 2; i++) {
        assert_string_equal(said[i], WORDS);
        assert_int_equal(ends[i], 1);
        assert_int_equal(roles[i], 1);
    }
    client_release(&r);
}

static void test_logprobs(void **state)
{
    world *w = *state;
    json_t *root = ask(w, "/v1/completions", "{\"prompt\":\"a\",\"logprobs\":3}", 200);
    const char *const l = "choices.0.logprobs";
    assert_int_equal(json_array_size(at(at(root, l), "tokens")), 4);
    expect_text(at(root, l), "tokens.1", " w\xc3\xb6rld");
    expect_text(at(root, l), "tokens.2", "bytes:\\xc3"); /* a part of a character */
    assert_true(json_real_value(at(at(root, l), "token_logprobs.1")) == -1.0);
    expect_number(at(root, l), "text_offset.2", 11); /* characters, not bytes */
    assert_int_equal(json_object_size(at(at(root, l), "top_logprobs.0")), 3);
    assert_true(json_real_value(at(at(root, l), "top_logprobs.0.Hello")) == -0.25);
    json_decref(root);

    root = ask(w, "/v1/chat/completions",
               "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"logprobs\":true,"
               "\"top_logprobs\":3}",
               200);
    const json_t *content = at(root, "choices.0.logprobs.content");
    assert_int_equal(json_array_size(content), 4);
    expect_text(content, "0.token", "Hello");
    assert_int_equal(json_array_size(at(content, "1.bytes")), 7);
    expect_text(content, "2.token", "\xef\xbf\xbd");
    expect_number(content, "2.bytes.0", 0xc3);
    expect_text(content, "0.top_logprobs.1.token", " w\xc3\xb6rld");
    assert_true(json_real_value(at(content, "0.top_logprobs.2.logprob")) == -9999.0);
    json_decref(root);

    /* A stream's events have them of the tokens that they show: each once. */
    client_reply r = client_ask(w->port, "POST", "/v1/completions", NULL,
                                "{\"prompt\":\"a\",\"logprobs\":0,\"stream\":true}");
    const char *text = r.body;
    size_t n = 0;
    for (json_t *event; (event = next_event(&text)) != NULL; json_decref(event)) {
        const json_t *tokens = at(event, "choices.0.logprobs.tokens");
        n += json_array_size(tokens);
    }
    assert_int_equal(n, 4);
    client_release(&r);
    expect_error(w, "/v1/chat/completions",
                 "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"top_logprobs\":3}", 400,
                 "top_logprobs", NULL);
}

static void test_embeddings(void **state)
{
    world *w = *state;
    json_t *root = ask(w, "/v1/embeddings", "{\"input\":[\"ab\",\"c\"]}", 200);
    expect_text(root, "object", "list");
    expect_text(root, "data.1.object", "embedding");
    expect_number(root, "data.1.index", 1);
    assert_int_equal(json_array_size(at(root, "data.1.embedding")), 3);
    assert_true(json_real_value(at(root, "data.1.embedding.0")) == 1.0);
    assert_true(json_real_value(at(root, "data.0.embedding.1")) == -0.5);
    expect_number(root, "usage.prompt_tokens", 3);
    expect_number(root, "usage.total_tokens", 3);
    json_decref(root);
    /* 0, -0.5, 0 as little-endian floats */
    root = ask(w, "/v1/embeddings", "{\"input\":\"ab\",\"encoding_format\":\"base64\"}", 200);
    expect_text(root, "data.0.embedding", "AAAAAAAAAL8AAAAA");
    json_decref(root);
    root = ask(w, "/v1/embeddings", "{\"input\":[5,6]}", 200); /* one input of two tokens */
    assert_int_equal(json_array_size(at(root, "data")), 1);
    assert_true(json_real_value(at(root, "data.0.embedding.2")) == 2.0);
    json_decref(root);
    root = ask(w, "/v1/embeddings", "{\"input\":[[5],[6,7]]}", 200);
    assert_int_equal(json_array_size(at(root, "data")), 2);
    json_decref(root);
    static const char *const bad[] = {
        "{}",
        "{\"input\":\"\"}",
        "{\"input\":[]}",
        "{\"input\":[[]]}",
        "{\"input\":[\"a\",7]}",
        "{\"input\":[7,\"a\"]}",
        "{\"input\":[-1]}",
        "{\"input\":[99999999999]}",
        "{\"input\":{}}",
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        expect_error(w, "/v1/embeddings", bad[i], 400, "input", NULL);
    expect_error(w, "/v1/embeddings", "{\"input\":\"a\",\"dimensions\":2}", 400, "dimensions",
                 NULL);
    expect_error(w, "/v1/embeddings", "{\"input\":\"a\",\"encoding_format\":\"x\"}", 400,
                 "encoding_format", NULL);
    expect_error(w, "/v1/embeddings", "{\"input\":\"a\",\"model\":\"x\"}", 404, "model",
                 "model_not_found");
}

/* Each endpoint that runs the model says when to come back. */
static void test_busy_everywhere(void **state)
{
    world *w = *state;
    static const char *const asks[][2] = {
        {"/v1/completions", "{\"prompt\":\"a\"}"},
        {"/v1/completions", "{\"prompt\":\"a\",\"stream\":true}"},
        {"/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}"},
        {"/v1/embeddings", "{\"input\":\"a\"}"},
    };
    w->engine.begin_status = SH_ERR_LIMIT;
    for (size_t i = 0; i < SH_COUNT(asks); i++) {
        client_reply r = client_ask(w->port, "POST", asks[i][0], NULL, asks[i][1]);
        assert_int_equal(r.status, 429);
        assert_string_equal(client_header(&r, "Retry-After"), "1");
        client_release(&r);
    }
}

static void test_models_and_health(void **state)
{
    world *w = *state;
    json_t *root = ask(w, "/v1/models", NULL, 200);
    expect_text(root, "object", "list");
    expect_text(root, "data.0.id", "edge-model");
    expect_text(root, "data.0.object", "model");
    expect_number(root, "data.0.release", 7);
    expect_text(root, "data.0.chat_template", "chatml");
    json_decref(root);
    root = ask(w, "/v1/models/edge-model", NULL, 200);
    expect_text(root, "owned_by", "shoal");
    json_decref(root);
    expect_error(w, "/v1/models/other", NULL, 404, "model", "model_not_found");
    expect_error(w, "/v1/models/%ff", NULL, 404, "model", "model_not_found");
    root = ask(w, "/healthz", NULL, 200);
    expect_text(root, "status", "ok");
    json_decref(root);
    w->sick = true;
    root = ask(w, "/healthz", NULL, 503);
    expect_text(root, "reason", "the disk is full");
    json_decref(root);
}

static void test_feedback(void **state)
{
    world *w = *state;
    json_t *root =
        ask(w, "/v1/feedback",
            "{\"id\":\"cmpl-00000000000000ff\",\"action\":\"edit\",\"text\":\"no\"}", 200);
    expect_text(root, "object", "feedback");
    expect_text(root, "id", "cmpl-00000000000000ff");
    expect_text(root, "action", "edit");
    json_decref(root);
    assert_int_equal(w->feedback.id, 255);
    assert_int_equal(w->feedback.kind, SH_FEEDBACK_EDIT);
    assert_string_equal(w->text, "no");
    json_decref(ask(w, "/v1/feedback",
                    "{\"id\":\"chatcmpl-00000000000000fe\",\"action\":\"accept\"}", 200));
    assert_int_equal(w->feedback.id, 254);
    assert_int_equal(w->feedback.kind, SH_FEEDBACK_ACCEPT);
    assert_null(w->feedback.text);
    json_decref(ask(w, "/v1/feedback",
                    "{\"id\":\"cmpl-00000000000000fe\",\"action\":\"reject\",\"text\":\"\"}", 200));
    assert_int_equal(w->feedback.kind, SH_FEEDBACK_REJECT);
    assert_null(w->feedback.text);
    assert_int_equal(w->n_feedback, 3);

    static const struct {
        const char *body, *param;
    } bad[] = {
        {"{}", "id"},
        {"{\"id\":7,\"action\":\"accept\"}", "id"},
        {"{\"id\":\"cmpl-ff\",\"action\":\"accept\"}", "id"},
        {"{\"id\":\"cmpl-00000000000000FF\",\"action\":\"accept\"}", "id"},
        {"{\"id\":\"xmpl-00000000000000ff\",\"action\":\"accept\"}", "id"},
        {"{\"id\":\"00000000000000ff\",\"action\":\"accept\"}", "id"},
        {"{\"id\":\"cmpl-00000000000000ff\"}", "action"},
        {"{\"id\":\"cmpl-00000000000000ff\",\"action\":\"like\"}", "action"},
        {"{\"id\":\"cmpl-00000000000000ff\",\"action\":\"edit\"}", "text"},
        {"{\"id\":\"cmpl-00000000000000ff\",\"action\":\"edit\",\"text\":\"\"}", "text"},
        {"{\"id\":\"cmpl-00000000000000ff\",\"action\":\"accept\",\"text\":7}", "text"},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        expect_error(w, "/v1/feedback", bad[i].body, 400, bad[i].param, NULL);
    expect_error(w, "/v1/feedback", "{\"id\":", 400, NULL, NULL);
    assert_int_equal(w->n_feedback, 3);
}

static void test_feedback_errors(void **state)
{
    world *w = *state;
    static const struct {
        sh_status status;
        int code;
        const char *param, *name;
    } cases[] = {
        {SH_ERR_NOT_FOUND, 404, "id", "completion_not_found"},
        {SH_ERR_EXISTS, 409, "action", "already_rated"},
        {SH_ERR_LIMIT, 429, NULL, "busy"},
        {SH_ERR_CANCELLED, 503, NULL, "unavailable"},
        {SH_ERR_FULL, 507, NULL, "disk_full"},
        {SH_ERR_INVALID, 400, "text", NULL},
        {SH_ERR_CORRUPT, 500, NULL, NULL},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        w->feedback_status = cases[i].status;
        expect_error(w, "/v1/feedback",
                     "{\"id\":\"cmpl-00000000000000ff\",\"action\":\"edit\",\"text\":\"a\"}",
                     cases[i].code, cases[i].param, cases[i].name);
    }
    /* Too many tokens, as only the backend knows; too many bytes, which is known here. */
    size_t n = SH_API_TEXT_BYTES_MAX + 256;
    char *body = calloc(1, n);
    w->feedback_status = SH_ERR_LIMIT;
    for (int i = 0; i < 2; i++) {
        int k = i ? (int)SH_API_TEXT_BYTES_MAX + 1 : 5000;
        snprintf(body, n,
                 "{\"id\":\"cmpl-00000000000000ff\",\"action\":\"edit\",\"text\":\"%0*d\"}", k, 0);
        expect_error(w, "/v1/feedback", body, 413, "text", "text_too_long");
    }
    free(body);
    assert_int_equal(w->n_feedback, SH_COUNT(cases) + 1);
}

static void expect_line(const client_reply *r, const char *line)
{
    const char *at_text = strstr(r->body, line);
    if (!at_text || (at_text != r->body && at_text[-1] != '\n') || at_text[strlen(line)] != '\n')
        fail_msg("no line '%s' in:\n%s", line, r->body);
}

static void test_metrics(void **state)
{
    world *w = *state;
    json_decref(ask(w, "/v1/completions", "{\"prompt\":\"a\"}", 200));
    json_decref(ask(w, "/v1/completions", "{\"prompt\":\"a\"}", 200));
    expect_error(w, "/v1/completions", "{}", 400, "prompt", NULL);
    json_decref(ask(w, "/v1/chat/completions",
                    "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", 200));
    json_decref(
        ask(w, "/v1/feedback", "{\"id\":\"cmpl-00000000000000ff\",\"action\":\"accept\"}", 200));
    client_reply r = client_ask(w->port, "GET", "/metrics", NULL, NULL);
    assert_int_equal(r.status, 200);
    assert_string_equal(client_header(&r, "Content-Type"), SH_METRICS_TYPE);
    expect_line(&r, "# TYPE shoal_inference_requests_total counter");
    expect_line(&r, "shoal_inference_requests_total{endpoint=\"/v1/completions\",code=\"200\"} 2");
    expect_line(&r, "shoal_inference_requests_total{endpoint=\"/v1/completions\",code=\"400\"} 1");
    expect_line(&r,
                "shoal_inference_requests_total{endpoint=\"/v1/chat/completions\",code=\"200\"} 1");
    expect_line(&r, "shoal_feedback_requests_total{code=\"200\"} 1");
    expect_line(&r, "shoal_inference_time_to_first_token_seconds_bucket{le=\"0.01\"} 0");
    expect_line(&r, "shoal_inference_time_to_first_token_seconds_bucket{le=\"0.025\"} 3");
    expect_line(&r, "shoal_inference_time_to_first_token_seconds_count 3");
    expect_line(&r, "shoal_inference_time_per_output_token_seconds_bucket{le=\"0.005\"} 3");
    expect_line(&r, "shoal_inference_tokens_total{kind=\"prompt\"} 120");
    expect_line(&r, "shoal_inference_tokens_total{kind=\"completion\"} 34");
    expect_line(&r, "shoal_inference_running 0");
    expect_line(&r, "shoal_inference_waiting 0");
    expect_line(&r, "shoal_model_info{version=\"7\",name=\"edge-model\"} 1");
    expect_line(&r, "shoal_of_the_backend 4");
    client_release(&r);
}

static int begin_stream(const world *w)
{
    static const char body[] = "{\"prompt\":\"a\",\"stream\":true}";
    char text[256];
    int n = snprintf(text, sizeof text,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nContent-Type: "
                     "application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     w->port, sizeof body - 1, body);
    int fd = client_connect(w->port);
    assert_true(fd >= 0 && client_send(fd, text, (size_t)n));
    return fd;
}

static void test_stream_client_leaves(void **state)
{
    world *w = *state;
    w->engine.n_pieces = UINT32_MAX;
    fake_engine_hold(&w->engine, true);
    int fd = begin_stream(w);
    assert_true(client_wait_for(fd, "Hello")); /* the first words come while the rest is not made */
    fake_engine_await(&w->engine, &w->engine.waiting, 1);
    close(fd);
    fake_engine_hold(&w->engine, false);
    fake_engine_await(&w->engine, &w->engine.ended, 1);
    client_reply r = {0};
    for (int i = 0; i < 600 && !(r.body && strstr(r.body, "code=\"499\"} 1")); i++) {
        client_release(&r); /* it is counted just after its end */
        r = client_ask(w->port, "GET", "/metrics", NULL, NULL);
        usleep(10000);
    }
    expect_line(&r, "shoal_inference_requests_total{endpoint=\"/v1/completions\",code=\"499\"} 1");
    client_release(&r);
}

/* One that does not stream ends, too, when nobody waits for it. */
static void test_whole_client_leaves(void **state)
{
    world *w = *state;
    static const char body[] = "{\"prompt\":\"a\"}";
    char text[256];
    w->engine.n_pieces = UINT32_MAX; /* it would never end */
    fake_engine_hold(&w->engine, true);
    int n = snprintf(text, sizeof text,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nContent-Type: "
                     "application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     w->port, sizeof body - 1, body);
    int fd = client_connect(w->port);
    assert_true(fd >= 0 && client_send(fd, text, (size_t)n));
    fake_engine_await(&w->engine, &w->engine.waiting, 1);
    close(fd);
    fake_engine_hold(&w->engine, false);
    fake_engine_await(&w->engine, &w->engine.ended, 1);
}

static void test_concurrent_streams_keep_their_release(void **state)
{
    enum { STREAMS = 8 };
    world *w = *state;
    int fds[STREAMS];
    fake_engine_hold(&w->engine, true);
    for (uint32_t i = 0; i < STREAMS; i++) {
        fds[i] = begin_stream(w);
        fake_engine_await(&w->engine, &w->engine.waiting, i + 1);
        if (i == STREAMS / 2 - 1) {
            pthread_mutex_lock(&w->engine.lock);
            w->engine.version = 8; /* a release is swapped in under them */
            pthread_mutex_unlock(&w->engine.lock);
        }
    }
    json_t *root = ask(w, "/healthz", NULL, 200); /* others are served meanwhile */
    json_decref(root);
    fake_engine_hold(&w->engine, false);
    for (int i = 0; i < STREAMS; i++) {
        client_reply r = client_read(fds[i], false);
        bool old = i < STREAMS / 2;
        assert_true(r.whole);
        assert_true((strstr(r.body, "shoal-release-7") != NULL) == old);
        assert_true((strstr(r.body, "shoal-release-8") != NULL) == !old);
        assert_non_null(strstr(r.body, "data: [DONE]"));
        client_release(&r);
        close(fds[i]);
    }
}

static void test_bad_options(void **state)
{
    (void)state;
    sh_engine engine;
    sh_api *api = NULL;
    sh_error err = {0};
    fake_engine_init(&engine);
    sh_api_options o = {.engine = &engine, .address = "127.0.0.1", .model_name = "\xff"};
    assert_int_equal(sh_api_create(&o, &api, &err), SH_ERR_USAGE);
    o.model_name = NULL;
    o.address = "0.0.0.0";
    assert_int_equal(sh_api_create(&o, &api, &err), SH_ERR_USAGE);
    assert_null(api);
}

#define API_TEST(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        API_TEST(test_completion),
        API_TEST(test_fields_arrive),
        API_TEST(test_bad_fields),
        API_TEST(test_engine_errors),
        API_TEST(test_text_that_is_no_utf8),
        API_TEST(test_stream),
        API_TEST(test_chat_stream),
        API_TEST(test_chat),
        API_TEST(test_models_and_health),
        API_TEST(test_feedback),
        API_TEST(test_feedback_errors),
        API_TEST(test_metrics),
        API_TEST(test_stream_client_leaves),
        API_TEST(test_concurrent_streams_keep_their_release),
        API_TEST(test_choices),
        API_TEST(test_logprobs),
        API_TEST(test_embeddings),
        API_TEST(test_busy_everywhere),
        API_TEST(test_whole_client_leaves),
        cmocka_unit_test(test_bad_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
