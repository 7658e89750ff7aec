#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/node_rig.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "tests/model/tiny.h"

#define ARGS_MAX 48

static void put(const char *dir, const char *name, const void *bytes, size_t n)
{
    char path[SH_PATH_BYTES];
    OK(sh_path_join(path, sizeof path, dir, name, err));
    OK(sh_file_write_atomic(path, bytes, n, err));
}

static void put_hex(const char *dir, const char *name, const uint8_t bytes[32])
{
    char hex[SH_HASH_HEX_BYTES + 1];
    sh_hex(bytes, 32, hex);
    hex[64] = '\n';
    put(dir, name, hex, 65);
}

void node_rig_release_make(node_rig *r, uint64_t version, uint64_t seed, sh_buf *model,
                           sh_buf *manifest)
{
    tiny_options o = tiny_defaults(seed);
    sh_manifest m = {.version = version, .parent = version - 1, .created_ms = 1, .format = "F32"};
    uint8_t *chunks = NULL;
    o.context = 256;
    sh_buf_init(model, 64u << 20);
    sh_buf_init(manifest, SH_WIRE_MANIFEST_MAX);
    assert_int_equal(tiny_encode(&o, model), SH_OK);
    OK(sh_blob_describe(model->data, model->len, &m.model, &chunks, err));
    OK(sh_manifest_sign(&m, &r->release_key, manifest, err));
    free(chunks);
}

static void make_bundle(node_rig *r)
{
    sh_buf model, manifest;
    uint8_t seed[32] = {3};
    OK(sh_dir_make(r->bundle, err));
    sh_sign_keypair(seed, &r->release_pub, &r->release_key);
    node_rig_release_make(r, 1, 1, &model, &manifest);
    put(r->bundle, "genesis.gguf", model.data, model.len);
    put(r->bundle, "genesis.manifest", manifest.data, manifest.len);
    put_hex(r->bundle, "aggregator.pub", r->aggregator.public_key.b);
    put_hex(r->bundle, "release.pub", r->release_pub.b);
    sh_buf_release(&model);
    sh_buf_release(&manifest);
}

void node_rig_make(node_rig *r, const char *program, const char *endpoint)
{
    sh_net_keys aggregator = r->aggregator;
    *r = (node_rig){.program = program, .aggregator = aggregator};
    OK(sh_crypto_init(err));
    r->dir = temp_dir_make();
    snprintf(r->bundle, sizeof r->bundle, "%s", temp_path(&r->dir, "bundle"));
    snprintf(r->node, sizeof r->node, "%s", temp_path(&r->dir, "node"));
    snprintf(r->process.log, sizeof r->process.log, "%s", temp_path(&r->dir, "log"));
    if (!endpoint)
        OK(sh_net_keys_make(&r->aggregator, err));
    make_bundle(r);
    run_result done = run_program(
        program,
        (const char *const[]){"init", "--dir", r->node, "--bundle", r->bundle, "--aggregator",
                              endpoint ? endpoint : "tcp://127.0.0.1:9", NULL},
        NULL, 0);
    char hex[SH_HASH_HEX_BYTES];
    if (done.exit_code != 0 || sscanf(done.out, "public key %64s", hex) != 1)
        fail_msg("init: exit code %d: %s%s", done.exit_code, done.out, done.err);
    OK(sh_hash_parse(hex, &r->public_key, err));
    run_release(&done);
}

void node_rig_release(node_rig *r)
{
    if (r->process.pid > 0)
        (void)node_rig_end(r, SIGKILL);
    temp_dir_remove(&r->dir);
}

void node_rig_start(node_rig *r, const char *const *words, const char *failpoints)
{
    const char *argv[ARGS_MAX] = {r->program,          "run",     "--dir",       r->node,
                                  "--http.port",       "0",       "--log.level", "debug",
                                  "--store.bytes-max", "67108864"};
    size_t n = 10;
    for (size_t i = 0; words && words[i]; i++) {
        assert_true(n < ARGS_MAX - 1);
        argv[n++] = words[i];
    }
    argv[n] = NULL;
    r->port = 0;
    r->starts++;
    e2e_start(&r->process, argv, failpoints);
}

bool node_rig_logged(node_rig *r, const char *text)
{
    return e2e_logged(&r->process, text);
}

bool node_rig_saw(node_rig *r, const char *text)
{
    return e2e_saw(&r->process, text);
}

void node_rig_ready(node_rig *r)
{
    bool ready = node_rig_saw(r, "event=ready");
    char *log = e2e_log(&r->process);
    const char *at = strstr(log, "event=ready http=127.0.0.1:");
    if (!ready || !at || sscanf(at, "event=ready http=127.0.0.1:%u", &r->port) != 1)
        fail_msg("the node is not ready: %s", log);
    free(log);
}

int node_rig_wait(node_rig *r)
{
    return e2e_wait(&r->process);
}

int node_rig_end(node_rig *r, int signal_number)
{
    return e2e_end(&r->process, signal_number);
}

/* ---- HTTP ---- */

static int connect_to(unsigned port)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

int node_rig_http(node_rig *r, const char *method, const char *path, const char *body, char *out,
                  size_t out_bytes)
{
    static char answer[1 << 20];
    char head[512];
    int fd = connect_to(r->port), status = -1;
    size_t n = 0;
    out[0] = 0;
    if (fd < 0)
        return -1;
    int n_head = snprintf(head, sizeof head,
                          "%s %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nConnection: close\r\n"
                          "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                          method, path, r->port, body ? strlen(body) : 0);
    if (send(fd, head, (size_t)n_head, MSG_NOSIGNAL) == n_head &&
        (!body || send(fd, body, strlen(body), MSG_NOSIGNAL) == (ssize_t)strlen(body))) {
        ssize_t got;
        while (n < sizeof answer - 1 && (got = recv(fd, answer + n, sizeof answer - 1 - n, 0)) > 0)
            n += (size_t)got;
    }
    close(fd);
    answer[n] = 0;
    const char *text = strstr(answer, "\r\n\r\n");
    if (!text || sscanf(answer, "HTTP/1.1 %d", &status) != 1)
        return -1;
    snprintf(out, out_bytes, "%s", text + 4);
    return status;
}

void node_rig_complete(node_rig *r, const char *prompt, const char *user, char *id)
{
    char body[512], answer[8192];
    snprintf(body, sizeof body,
             "{\"prompt\": \"%s\", \"max_tokens\": 4, \"temperature\": 0, \"user\": \"%s\"}",
             prompt, user);
    int status = node_rig_http(r, "POST", "/v1/completions", body, answer, sizeof answer);
    const char *at = strstr(answer, "\"id\":");
    if (status != 200 || !at || sscanf(at, "\"id\": \"%63[^\"]", id) != 1) {
        if (!at || sscanf(at, "\"id\":\"%63[^\"]", id) != 1)
            fail_msg("completion: status %d: %s", status, answer);
    }
}

int node_rig_feedback(node_rig *r, const char *id, const char *action, const char *text)
{
    static char body[65536];
    char answer[8192];
    snprintf(body, sizeof body, "{\"id\": \"%s\", \"action\": \"%s\"%s%s%s}", id, action,
             text ? ", \"text\": \"" : "", text ? text : "", text ? "\"" : "");
    return node_rig_http(r, "POST", "/v1/feedback", body, answer, sizeof answer);
}

json_t *node_rig_status(node_rig *r)
{
    run_result s = run_program(
        r->program, (const char *const[]){"status", "--dir", r->node, "--json", NULL}, NULL, 0);
    json_t *o = json_loads(s.out, 0, NULL);
    if (s.exit_code != 0 || !o)
        fail_msg("status: exit code %d: %s%s", s.exit_code, s.out, s.err);
    run_release(&s);
    return o;
}
