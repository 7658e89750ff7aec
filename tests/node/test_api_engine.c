/*
 * The API over the true engine on a tiny model: what is streamed is what is answered whole,
 * releases are swapped under streams, a client that leaves frees its slot.
 */
#include "edge-node/api.h"
#include "shared/base/clock.h"
#include "tests/http/client.h"
#include "tests/model/tiny.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { IDS_MAX = 1024, SLOTS = 2 };

static struct {
    char folder[64];
    sh_model *genesis;
    sh_frozen *frozen;
    sh_engine *engine;
    sh_api *api;
    uint16_t port;
    pthread_mutex_t lock;
    uint64_t ids[IDS_MAX]; /* of finished completions */
    sh_feedback_kind rated[IDS_MAX];
    size_t n_ids;
} world = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void must(sh_status status, const sh_error *err)
{
    if (status != SH_OK) {
        print_error("%s\n", err->text);
        abort();
    }
}

static uint64_t now_ms(void *arg)
{
    (void)arg;
    return sh_clock_wall_ms();
}

static void finished(void *arg, const sh_record *record, const sh_completion_row *row)
{
    (void)arg;
    (void)record;
    pthread_mutex_lock(&world.lock);
    if (world.n_ids < IDS_MAX)
        world.ids[world.n_ids++] = row->id;
    pthread_mutex_unlock(&world.lock);
}

static sh_status take_feedback(void *arg, const sh_api_feedback *feedback, sh_error *err)
{
    (void)arg;
    sh_status status = SH_ERR_NOT_FOUND;
    pthread_mutex_lock(&world.lock);
    for (size_t i = 0; i < world.n_ids; i++)
        if (world.ids[i] == feedback->id) {
            bool same = !world.rated[i] || world.rated[i] == feedback->kind;
            status = same ? SH_OK : SH_ERR_EXISTS;
            if (same)
                world.rated[i] = feedback->kind;
        }
    pthread_mutex_unlock(&world.lock);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "%s", sh_status_name(status));
}

static sh_model *open_tiny(uint64_t seed)
{
    char path[128];
    sh_error err = {0};
    sh_model *model = NULL;
    tiny_options o = tiny_defaults(seed);
    o.context = 512;
    snprintf(path, sizeof path, "%s/%llu.gguf", world.folder, (unsigned long long)seed);
    must(tiny_write(&o, path, &err), &err);
    must(sh_model_open(path, &model, &err), &err);
    unlink(path);
    return model;
}

static int start(void **state)
{
    (void)state;
    sh_error err = {0};
    snprintf(world.folder, sizeof world.folder, "/tmp/shoal-api-XXXXXX");
    if (!mkdtemp(world.folder))
        return -1;
    world.genesis = open_tiny(1);
    must(sh_frozen_create(world.genesis, &world.frozen, &err), &err);
    sh_engine_options engine = {
        .frozen = world.frozen, .slots = SLOTS, .now_ms = now_ms, .finished = finished};
    must(sh_engine_create(&engine, &world.engine, &err), &err);
    sh_model *active = open_tiny(1);
    must(sh_engine_activate(world.engine, &active, 1, &err), &err);
    sh_api_options api = {
        .engine = world.engine, .backend = {.feedback = take_feedback}, .address = "127.0.0.1"};
    must(sh_api_create(&api, &world.api, &err), &err);
    world.port = sh_api_port(world.api);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    sh_engine_stop(world.engine);
    sh_api_destroy(&world.api);
    sh_engine_destroy(&world.engine);
    sh_frozen_destroy(&world.frozen);
    sh_model_close(&world.genesis);
    return rmdir(world.folder);
}

/* Puts the texts of a stream's events together; the fingerprint of all must be the same. */
static void join_events(const char *body, char *out, size_t max, char *print, size_t print_max)
{
    json_error_t error;
    size_t n = 0;
    print[0] = out[0] = 0;
    for (const char *text = body; strncmp(text, "data: [DONE]", 12) != 0;) {
        const char *end = strstr(text, "\n\n");
        assert_non_null(end);
        json_t *event = json_loadb(text + 6, (size_t)(end - text - 6), 0, &error);
        assert_non_null(event);
        json_t *choice = json_array_get(json_object_get(event, "choices"), 0);
        n += (size_t)snprintf(out + n, max - n, "%s",
                              json_string_value(json_object_get(choice, "text")));
        assert_true(n < max);
        const char *now = json_string_value(json_object_get(event, "system_fingerprint"));
        if (!print[0])
            snprintf(print, print_max, "%s", now);
        assert_string_equal(print, now);
        json_decref(event);
        text = end + 2;
    }
}

static void test_stream_is_the_whole(void **state)
{
    (void)state;
    json_error_t error;
    char text[4096], print[64];
    for (int greedy = 0; greedy < 2; greedy++) {
        char body[256];
        snprintf(body, sizeof body,
                 "{\"prompt\":\"the quick\",\"max_tokens\":40,\"seed\":5,\"temperature\":%d}",
                 !greedy);
        client_reply whole = client_ask(world.port, "POST", "/v1/completions", NULL, body);
        assert_int_equal(whole.status, 200);
        json_t *root = json_loads(whole.body, 0, &error);
        const char *want = json_string_value(
            json_object_get(json_array_get(json_object_get(root, "choices"), 0), "text"));
        assert_true(want && *want);
        body[strlen(body) - 1] = 0;
        strncat(body, ",\"stream\":true}", sizeof body - strlen(body) - 1);
        client_reply stream = client_ask(world.port, "POST", "/v1/completions", NULL, body);
        assert_int_equal(stream.status, 200);
        assert_true(stream.whole);
        join_events(stream.body, text, sizeof text, print, sizeof print);
        assert_string_equal(text, want);
        json_decref(root);
        client_release(&whole);
        client_release(&stream);
    }
}

static void test_too_long(void **state)
{
    (void)state;
    char body[8192];
    snprintf(body, sizeof body, "{\"prompt\":\"%04000d\",\"max_tokens\":5}", 0);
    client_reply r = client_ask(world.port, "POST", "/v1/completions", NULL, body);
    assert_int_equal(r.status, 400);
    assert_non_null(strstr(r.body, "context_length_exceeded"));
    client_release(&r);
}

static void test_feedback_finds_what_was_answered(void **state)
{
    (void)state;
    for (int stream = 0; stream < 2; stream++) {
        char body[256];
        client_reply r =
            client_ask(world.port, "POST", "/v1/completions", NULL,
                       stream ? "{\"prompt\":\"a\",\"stream\":true}" : "{\"prompt\":\"a\"}");
        const char *id = strstr(r.body, "\"id\":\"cmpl-"); /* 28 characters: "id":"cmpl-…" */
        assert_non_null(id);
        snprintf(body, sizeof body, "{%.*s,\"action\":\"accept\"}", 28, id);
        client_release(&r);
        r = client_ask(world.port, "POST", "/v1/feedback", NULL, body);
        if (r.status != 200)
            fail_msg("%s: %d %s", body, r.status, r.body);
        client_release(&r);
    }
}

enum { READERS = 4, RELEASES = 4 };
static struct {
    pthread_mutex_t lock;
    bool over, failed;
    uint32_t n_of[RELEASES + 1]; /* streams that ran on each release */
    char texts[RELEASES + 1][2048];
} swaps = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void *read_streams(void *arg)
{
    char text[2048], print[64];
    for (bool over = false; !over;) {
        client_reply reply = client_ask(
            world.port, "POST", "/v1/completions", NULL,
            "{\"prompt\":\"one two\",\"max_tokens\":60,\"temperature\":0,\"stream\":true}");
        bool good = reply.status == 200 && reply.whole;
        if (good)
            join_events(reply.body, text, sizeof text, print, sizeof print);
        unsigned long v = good ? strtoul(print + strlen("shoal-release-"), NULL, 10) : 0;
        pthread_mutex_lock(&swaps.lock);
        if (v < 1 || v > RELEASES)
            swaps.failed = true;
        else if (swaps.n_of[v]++ == 0)
            snprintf(swaps.texts[v], sizeof swaps.texts[v], "%s", text);
        else if (strcmp(swaps.texts[v], text) != 0)
            swaps.failed = true;
        over = swaps.over || swaps.failed;
        pthread_mutex_unlock(&swaps.lock);
        client_release(&reply);
    }
    return arg;
}

/* Until some streams have ended on release v. */
static void await_streams(uint64_t v)
{
    bool enough = false;
    for (int i = 0; i < 6000 && !enough; i++) {
        pthread_mutex_lock(&swaps.lock);
        enough = swaps.n_of[v] >= 3 || swaps.failed;
        pthread_mutex_unlock(&swaps.lock);
        usleep(enough ? 0 : 10000);
    }
    assert_true(enough);
}

/* The same request on the same release is the same text, whoever else runs and swaps. */
static void test_swaps_under_streams(void **state)
{
    (void)state;
    sh_error err = {0};
    pthread_t readers[READERS];
    for (int i = 0; i < READERS; i++)
        assert_int_equal(pthread_create(&readers[i], NULL, read_streams, NULL), 0);
    await_streams(1);
    for (uint64_t v = 2; v <= RELEASES; v++) {
        sh_model *model = open_tiny(v);
        must(sh_engine_activate(world.engine, &model, v, &err), &err);
        await_streams(v);
    }
    pthread_mutex_lock(&swaps.lock);
    swaps.over = true;
    pthread_mutex_unlock(&swaps.lock);
    for (int i = 0; i < READERS; i++)
        pthread_join(readers[i], NULL);
    assert_false(swaps.failed);
    sh_engine_status s = sh_engine_get_status(world.engine);
    assert_int_equal(s.models_open, 1);
    assert_int_equal(s.version, RELEASES);
}

static void test_client_leaves(void **state)
{
    (void)state;
    char text[512];
    static const char body[] = "{\"prompt\":\"one\",\"max_tokens\":400,\"stream\":true}";
    int n = snprintf(text, sizeof text,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nContent-Type: "
                     "application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     world.port, sizeof body - 1, body);
    for (int i = 0; i < 3 * SLOTS; i++) { /* more than there are slots */
        int fd = client_connect(world.port);
        assert_true(client_send(fd, text, (size_t)n));
        assert_true(client_wait_for(fd, "\"text\""));
        close(fd);
    }
    client_reply r = client_ask(world.port, "POST", "/v1/completions", NULL, "{\"prompt\":\"a\"}");
    assert_int_equal(r.status, 200);
    client_release(&r);
    for (int i = 0; i < 6000 && sh_engine_get_status(world.engine).running; i++)
        usleep(10000);
    assert_int_equal(sh_engine_get_status(world.engine).running, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stream_is_the_whole),
        cmocka_unit_test(test_too_long),
        cmocka_unit_test(test_feedback_finds_what_was_answered),
        cmocka_unit_test(test_swaps_under_streams),
        cmocka_unit_test(test_client_leaves),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
