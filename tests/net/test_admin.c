/* Commands over the admin socket: a daemon's side on a thread of its own, the tool's in the test.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "shared/net/admin.h"
#include "tests/net/rig.h"

#define SOCKET "admin.sock"

static sh_net_keys daemon_keys, admin_keys, other_keys;

/* ---- a daemon ---- */

typedef struct {
    pthread_t thread;
    sh_net *net;
    sh_admin *admin;
    atomic_bool stop, holds;
    sh_admin_caller held; /* who said "hold": answered after the next "free" */
} service;

static json_t *answer(json_t *request)
{
    const char *command = json_string_value(json_object_get(request, "command"));
    json_t *reply = json_object();
    if (command && strcmp(command, "echo") == 0) {
        sh_json_set(reply, "ok", json_true());
        sh_json_set(reply, "value", json_incref(json_object_get(request, "value")));
    } else if (command && strcmp(command, "huge") == 0) {
        size_t n = (size_t)json_integer_value(json_object_get(request, "bytes"));
        char *text = malloc(n + 1);
        memset(text, 'x', n);
        text[n] = 0;
        sh_json_set(reply, "ok", json_true());
        sh_json_set(reply, "value", json_string(text));
        free(text);
    } else {
        sh_error e = {0};
        sh_fail(&e, SH_ERR_NOT_FOUND, "there is no command like this");
        json_decref(reply);
        reply = sh_admin_error(&e);
    }
    json_decref(request);
    return reply;
}

static bool says(const json_t *request, const char *word)
{
    const char *command = json_string_value(json_object_get(request, "command"));
    return command && strcmp(command, word) == 0;
}

static json_t *good(const char *value)
{
    json_t *reply = json_object();
    sh_json_set(reply, "ok", json_true());
    sh_json_set(reply, "value", json_string(value));
    return reply;
}

static void take(service *s, json_t *request, sh_admin_caller caller)
{
    bool hold = says(request, "hold"), release = says(request, "free");
    if (!hold && !release) {
        sh_admin_reply(s->admin, caller, answer(request));
        return;
    }
    json_decref(request);
    if (hold) {
        s->held = caller;
        atomic_store(&s->holds, true);
        return;
    }
    sh_admin_reply(s->admin, caller, good("free"));
    sh_admin_reply(s->admin, s->held, good("held"));
}

static void *run(void *arg)
{
    service *s = arg;
    sh_net_server *server = sh_admin_server(s->admin);
    while (!atomic_load(&s->stop)) {
        json_t *request = NULL;
        sh_admin_caller caller;
        sh_error e = {0};
        if (sh_admin_next(s->admin, &request, &caller, &e) != SH_OK)
            abort();
        if (request) {
            take(s, request, caller);
            continue;
        }
        if (sh_net_wait(&(sh_net_waiting){.servers = &server, .n_servers = 1, .timeout_ms = 50},
                        &e) != SH_OK)
            abort();
    }
    return NULL;
}

static void service_start(service *s)
{
    *s = (service){0};
    OK(sh_net_create(&s->net, &err));
    OK(sh_admin_create(s->net, SH_ADMIN_ENDPOINT, &daemon_keys, &admin_keys.public_key, &s->admin,
                       &err));
    assert_int_equal(pthread_create(&s->thread, NULL, run, s), 0);
}

static void service_stop(service *s)
{
    atomic_store(&s->stop, true);
    pthread_join(s->thread, NULL);
    sh_admin_destroy(&s->admin);
    sh_net_destroy(&s->net);
}

static sh_status call(const sh_net_keys *keys, const char *request, json_t **reply)
{
    json_t *r = json_loads(request, 0, NULL);
    assert_non_null(r);
    sh_status status = sh_admin_call(SH_ADMIN_ENDPOINT, &daemon_keys.public_key, keys, r,
                                     DEADLINE_MS, reply, &err);
    json_decref(r);
    return status;
}

/* ---- tests ---- */

static void test_calls(void **state)
{
    (void)state;
    service s;
    struct stat info;
    service_start(&s);
    assert_int_equal(stat(SOCKET, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    for (int i = 0; i < 5; i++) {
        json_t *reply = NULL;
        OK(call(&admin_keys, "{\"command\": \"echo\", \"value\": [1, \"two\"]}", &reply));
        assert_int_equal(json_array_size(json_object_get(reply, "value")), 2);
        json_decref(reply);
    }
    json_t *none = NULL;
    assert_int_equal(call(&admin_keys, "{\"command\": \"dance\"}", &none), SH_ERR_NOT_FOUND);
    assert_string_equal(err.text, "there is no command like this");
    assert_null(none);
    service_stop(&s);
    assert_int_equal(access(SOCKET, F_OK), -1);
}

static void test_huge_replies(void **state)
{
    (void)state;
    service s;
    json_t *reply = NULL;
    service_start(&s);
    OK(call(&admin_keys, "{\"command\": \"huge\", \"bytes\": 4000000}", &reply));
    assert_int_equal(json_string_length(json_object_get(reply, "value")), 4000000);
    json_decref(reply);
    reply = NULL;
    assert_int_equal(call(&admin_keys, "{\"command\": \"huge\", \"bytes\": 5000000}", &reply),
                     SH_ERR_LIMIT);
    assert_null(reply);
    service_stop(&s);
}

static void test_wrong_keys(void **state)
{
    (void)state;
    service s;
    json_t *reply = NULL;
    service_start(&s);
    assert_int_equal(call(&other_keys, "{\"command\": \"echo\"}", &reply), SH_ERR_AUTH);
    json_t *request = json_object();
    assert_int_equal(sh_admin_call(SH_ADMIN_ENDPOINT, &other_keys.public_key, &admin_keys, request,
                                   DEADLINE_MS, &reply, &err),
                     SH_ERR_AUTH);
    json_decref(request);
    assert_null(reply);
    service_stop(&s);
}

static void test_nobody_there(void **state)
{
    (void)state;
    json_t *reply = NULL;
    assert_int_equal(call(&admin_keys, "{}", &reply), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "running"));
    /* Somebody accepts connections and says nothing: time ends it. */
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(fd, 5), 0);
    json_t *request = json_object();
    assert_int_equal(sh_admin_call(SH_ADMIN_ENDPOINT, &daemon_keys.public_key, &admin_keys, request,
                                   200, &reply, &err),
                     SH_ERR_NOT_FOUND);
    json_decref(request);
    assert_non_null(strstr(err.text, "200 ms"));

    /* A second daemon does not take its place. */
    sh_net *net = NULL;
    sh_admin *admin = NULL;
    OK(sh_net_create(&net, &err));
    assert_int_equal(
        sh_admin_create(net, SH_ADMIN_ENDPOINT, &daemon_keys, &admin_keys.public_key, &admin, &err),
        SH_ERR_EXISTS);
    assert_null(admin);
    sh_net_destroy(&net);
    close(fd); /* what a killed program leaves: a file that nobody listens behind */
    assert_int_equal(access(SOCKET, F_OK), 0);
}

static void test_stale_socket_is_replaced(void **state)
{
    (void)state;
    service s;
    json_t *reply = NULL;
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = SOCKET};
    unlink(SOCKET);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    close(fd);
    assert_int_equal(call(&admin_keys, "{}", &reply), SH_ERR_NOT_FOUND);
    service_start(&s);
    OK(call(&admin_keys, "{\"command\": \"echo\", \"value\": 1}", &reply));
    json_decref(reply);
    service_stop(&s);

    /* A file that is no socket is somebody's. */
    FILE *file = fopen(SOCKET, "w");
    fclose(file);
    sh_net *net = NULL;
    sh_admin *admin = NULL;
    OK(sh_net_create(&net, &err));
    assert_int_equal(
        sh_admin_create(net, SH_ADMIN_ENDPOINT, &daemon_keys, &admin_keys.public_key, &admin, &err),
        SH_ERR_EXISTS);
    sh_net_destroy(&net);
    assert_int_equal(unlink(SOCKET), 0);
}

/* Bytes that are no JSON, from the right key: answered, and the next request is heard. */
static void test_garbage_requests(void **state)
{
    (void)state;
    static const char *const garbage[] = {"",
                                          "{",
                                          "[1]",
                                          "\"x\"",
                                          "{\"a\":1,\"a\":2}",
                                          "\xff\xfe",
                                          "{\"command\": \"echo\"} trailing",
                                          "null"};
    service s;
    service_start(&s);
    sh_net *net = NULL;
    OK(sh_net_create(&net, &err));
    sh_net_client *client =
        make_client(net, SH_ADMIN_ENDPOINT, &daemon_keys.public_key, &admin_keys);
    client_until(client, NULL, SH_NET_UP);
    for (size_t i = 0; i < SH_COUNT(garbage); i++) {
        OK(sh_net_client_send(client, garbage[i], strlen(garbage[i]), &err));
        sh_net_event event = client_until(client, NULL, SH_NET_MESSAGE);
        json_t *reply = json_loadb((const char *)event.data, event.n, 0, NULL);
        assert_true(json_is_false(json_object_get(reply, "ok")));
        assert_string_equal(json_string_value(json_object_get(reply, "code")), "invalid");
        json_decref(reply);
    }
    sh_net_client_destroy(&client, 0);
    sh_net_destroy(&net);
    json_t *reply = NULL;
    OK(call(&admin_keys, "{\"command\": \"echo\", \"value\": 1}", &reply));
    json_decref(reply);
    service_stop(&s);
}

static void *hold(void *arg)
{
    sh_error e = {0};
    json_t *request = json_pack("{s:s}", "command", "hold");
    sh_status status = sh_admin_call(SH_ADMIN_ENDPOINT, &daemon_keys.public_key, &admin_keys,
                                     request, DEADLINE_MS, arg, &e);
    json_decref(request);
    return status == SH_OK ? arg : NULL;
}

/* Tools share the admin key: a long command's answer goes to who gave it, whoever called since. */
static void test_answers_go_to_their_callers(void **state)
{
    (void)state;
    service s;
    pthread_t thread;
    json_t *held = NULL, *other = NULL;
    void *ended = NULL;
    service_start(&s);
    assert_int_equal(pthread_create(&thread, NULL, hold, &held), 0);
    for (uint64_t end = rig_now_ms() + DEADLINE_MS; !atomic_load(&s.holds); poll(NULL, 0, 5))
        assert_true(rig_now_ms() < end);
    assert_int_equal(call(&admin_keys, "{\"command\": \"free\"}", &other), SH_OK);
    assert_string_equal(json_string_value(json_object_get(other, "value")), "free");
    pthread_join(thread, &ended);
    assert_non_null(ended);
    assert_string_equal(json_string_value(json_object_get(held, "value")), "held");
    json_decref(held);
    json_decref(other);
    service_stop(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls),
        cmocka_unit_test(test_huge_replies),
        cmocka_unit_test(test_wrong_keys),
        cmocka_unit_test(test_nobody_there),
        cmocka_unit_test(test_stale_socket_is_replaced),
        cmocka_unit_test(test_garbage_requests),
        cmocka_unit_test(test_answers_go_to_their_callers),
    };
    char dir[] = "/tmp/shoal-admin-XXXXXX";
    OK(sh_crypto_init(&err));
    daemon_keys = make_keys();
    admin_keys = make_keys();
    other_keys = make_keys();
    if (!mkdtemp(dir) || chdir(dir) != 0)
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(SOCKET);
    return rmdir(dir) == 0 ? failed : 1;
}
