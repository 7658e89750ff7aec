#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/e2e/aggregator_rig.h"

#include <arpa/inet.h>
#include <ftw.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "tests/model/tiny.h"

#define TICK_MS  100
#define WORD_MAX 32

/* ---- its folder and its process ---- */

static void read_hex(agg_rig *r, const char *name, void *out)
{
    char path[SH_PATH_BYTES];
    uint8_t *text = NULL;
    size_t n = 0;
    sh_hash hash;
    OK(sh_path_join(path, sizeof path, r->dir, name, err));
    OK(sh_file_read(path, 1000, &text, &n, err));
    assert_int_equal(n, 65);
    text[64] = '\0';
    OK(sh_hash_parse((const char *)text, &hash, err));
    memcpy(out, &hash, sizeof hash);
    free(text);
}

static void make_suite(const agg_rig *r)
{
    char path[128], text[4000];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = i % 7 == 6 ? ' ' : (char)('a' + i * i % 26);
    OK(sh_dir_make(r->suites, err));
    snprintf(path, sizeof path, "%s/words.txt", r->suites);
    OK(sh_file_write_atomic(path, text, sizeof text, err));
}

void agg_make(agg_rig *r, const char *program, const char *tool)
{
    *r = (agg_rig){.program = program, .tool = tool};
    tiny_options tiny = tiny_defaults(3);
    char model[192];
    OK(sh_crypto_init(err));
    snprintf(r->root, sizeof r->root, "/tmp/shoal-agg-XXXXXX");
    assert_non_null(mkdtemp(r->root));
    snprintf(r->dir, sizeof r->dir, "%s/A", r->root);
    snprintf(r->process.log, sizeof r->process.log, "%s/log", r->root);
    snprintf(r->base, sizeof r->base, "%s/base.gguf", r->root);
    snprintf(r->suites, sizeof r->suites, "%s/suites", r->root);
    snprintf(r->endpoint, sizeof r->endpoint, "tcp://127.0.0.1:*");
    OK(tiny_write(&tiny, r->base, err));
    make_suite(r);
    const char *words[] = {"init", "--dir", r->dir, "--base", r->base, "--suites", r->suites, NULL};
    run_result init = run_program(program, words, NULL, 0);
    if (init.exit_code != 0)
        fail_msg("init: %s", init.err);
    run_release(&init);
    read_hex(r, "bundle/aggregator.pub", &r->server_key);
    read_hex(r, "bundle/release.pub", &r->release_pk);
    snprintf(model, sizeof model, "%s/bundle/genesis.gguf", r->dir);
    OK(sh_model_open(model, &r->model, err));
    OK(sh_net_create(&r->net, err));
    for (unsigned i = 0; i < AGG_PEERS; i++) {
        OK(sh_net_keys_make(&r->peers[i].keys, err));
        r->peers[i].epoch = 1000 + i;
    }
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

static void drop_update(agg_peer *p)
{
    sh_buf_release(&p->blob);
    sh_buf_release(&p->update.payload);
    free(p->chunks);
    p->chunks = NULL;
    p->update = (agg_item){.seq = p->update.seq};
}

void agg_release(agg_rig *r)
{
    if (r->process.pid != 0)
        (void)agg_end(r, SIGKILL);
    for (unsigned i = 0; i < AGG_PEERS; i++) {
        agg_hang_up(r, i);
        drop_update(&r->peers[i]);
        sh_buf_release(&r->peers[i].evaluation.payload);
    }
    sh_net_destroy(&r->net);
    sh_model_close(&r->model);
    (void)nftw(r->root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void agg_start(agg_rig *r, const char *const *words, const char *failpoints)
{
    const char *argv[WORD_MAX] = {r->program, "--dir",          r->dir,      "--http.port",
                                  "0",        "--listen",       r->endpoint, "--checkin-ms",
                                  "200",      "--jobs.threads", "1"};
    size_t n = 11;
    for (size_t i = 0; words != NULL && words[i] != NULL; i++) {
        assert_true(n < WORD_MAX - 1);
        argv[n++] = words[i];
    }
    argv[n] = NULL;
    e2e_start(&r->process, argv, failpoints);
}

bool agg_logged(agg_rig *r, const char *text)
{
    return e2e_logged(&r->process, text);
}

bool agg_runs(agg_rig *r)
{
    return e2e_runs(&r->process);
}

bool agg_saw(agg_rig *r, const char *text)
{
    return e2e_saw(&r->process, text);
}

void agg_ready(agg_rig *r)
{
    if (!agg_saw(r, "event=ready"))
        fail_msg("the aggregator ended: %s", e2e_log(&r->process));
    assert_true(e2e_value(&r->process, "event=ready", "endpoint", r->endpoint, sizeof r->endpoint));
    assert_true(e2e_value(&r->process, "event=ready", "http", r->http, sizeof r->http));
}

int agg_wait(agg_rig *r)
{
    return e2e_wait(&r->process);
}

int agg_end(agg_rig *r, int signal_number)
{
    return e2e_end(&r->process, signal_number);
}

/* ---- its tool and its pages ---- */

json_t *agg_tool(agg_rig *r, const char *const *words, int *code)
{
    const char *all[RUN_ARGS_MAX] = {"aggregator"};
    size_t n = 1;
    for (size_t i = 0; words[i] != NULL; i++)
        all[n++] = words[i];
    all[n++] = "--dir";
    all[n++] = r->dir;
    all[n++] = "--json";
    run_result out = run_program(r->tool, all, NULL, 0);
    *code = out.exit_code;
    json_t *reply = out.exit_code == 0 ? json_loads(out.out, 0, NULL) : NULL;
    if (out.exit_code == 0)
        assert_non_null(reply);
    else
        assert_true(out.n_err > 0 && strchr(out.err, '\n') == out.err + out.n_err - 1);
    run_release(&out);
    return reply;
}

json_t *agg_status(agg_rig *r)
{
    int code;
    json_t *reply = agg_tool(r, (const char *[]){"status", NULL}, &code);
    assert_int_equal(code, 0);
    return reply;
}

int agg_http(agg_rig *r, const char *path, char *out, size_t out_bytes)
{
    char request[256];
    const char *colon = strrchr(r->http, ':');
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(colon + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), status = -1;
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    int n = snprintf(request, sizeof request,
                     "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", path, r->http);
    assert_int_equal(write(fd, request, (size_t)n), n);
    size_t have = 0;
    for (ssize_t k; have < out_bytes - 1 && (k = read(fd, out + have, out_bytes - 1 - have)) > 0;)
        have += (size_t)k;
    out[have] = '\0';
    close(fd);
    assert_int_equal(sscanf(out, "HTTP/1.1 %d", &status), 1);
    return status;
}

/* ---- peers ---- */

void agg_enrol(agg_rig *r, unsigned peer)
{
    char hex[SH_HASH_HEX_BYTES];
    int code;
    sh_hex(r->peers[peer].keys.public_key.b, 32, hex);
    json_t *reply = agg_tool(r, (const char *[]){"enrol", hex, "--name", "kiosk", NULL}, &code);
    assert_int_equal(code, 0);
    json_decref(reply);
}

void agg_dial(agg_rig *r, unsigned peer)
{
    agg_peer *p = &r->peers[peer];
    agg_hang_up(r, peer);
    OK(sh_net_client_create(r->net,
                            &(sh_net_client_options){.endpoint = r->endpoint,
                                                     .server_key = r->server_key,
                                                     .keys = &p->keys,
                                                     .message_max = SH_WIRE_MESSAGE_MAX,
                                                     .reconnect_min_ms = 20,
                                                     .reconnect_max_ms = 200},
                            &p->client, err));
}

void agg_hang_up(agg_rig *r, unsigned peer)
{
    agg_peer *p = &r->peers[peer];
    sh_net_client_destroy(&p->client, 0);
    p->up = p->refused = p->welcomed = false;
}

static void send_msg(agg_peer *p, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, err));
    (void)!sh_net_client_send(p->client, bytes.data, bytes.len, NULL); /* full: it comes again */
    sh_buf_release(&bytes);
}

static void make_update(agg_rig *r, unsigned peer, const sh_train_plan *plan)
{
    agg_peer *p = &r->peers[peer];
    sh_adapter *adapter = NULL;
    drop_update(p);
    OK(sh_adapter_create(&r->model->config, plan->rank, plan->alpha, &adapter, err));
    for (size_t m = 0; m < (size_t)r->model->config.n_layers * SH_LAYER_MATRICES; m++) {
        sh_lora_pair *pair = &adapter->pairs[m];
        sh_rng common, own;
        sh_rng_init(&common, plan->a_seed, m, 5);
        sh_rng_init(&own, plan->a_seed, 100 * (peer + 1) + m, 6);
        for (size_t i = 0; i < (size_t)pair->rank * pair->in; i++)
            pair->a[i] = 0.02f * sh_rng_normal(&common);
        for (size_t i = 0; i < (size_t)pair->rank * pair->out; i++)
            pair->b[i] = 0.01f * (sh_rng_normal(&common) + 0.5f * sh_rng_normal(&own));
    }
    sh_buf_init(&p->blob, 16u << 20);
    OK(sh_adapter_encode(adapter, &p->blob, err));
    sh_adapter_destroy(&adapter);
    OK(sh_blob_describe(p->blob.data, p->blob.len, &p->described, &p->chunks, err));
    sh_update_meta meta = {.blob = p->described,
                           .round = plan->round,
                           .base_version = plan->base_version,
                           .base_sha256 = plan->base_sha256,
                           .a_seed = plan->a_seed,
                           .rank = plan->rank,
                           .alpha = plan->alpha,
                           .samples = 100,
                           .tokens_seen = 100,
                           .heldout_before = 3,
                           .heldout_after = 2.9};
    p->update = (agg_item){.there = true, .seq = p->update.seq + 1, .number = plan->round};
    sh_buf_init(&p->update.payload, SH_WIRE_ITEM_MAX);
    OK(sh_update_meta_encode(&meta, &p->update.payload, err));
}

static void make_evaluation(agg_peer *p, const sh_evaluate_plan *plan)
{
    sh_evaluation e = {
        .candidate = plan->candidate,
        .parent_version = plan->parent_version,
        .candidate_sha256 = plan->model.sha256,
        .n = 1,
        .slices = {
            {.slice = SH_SLICE_CORRECTED, .tokens = 200, .nll_parent = 600, .nll_candidate = 590}}};
    sh_buf_release(&p->evaluation.payload);
    p->evaluation =
        (agg_item){.there = true, .seq = p->evaluation.seq + 1, .number = plan->candidate};
    sh_buf_init(&p->evaluation.payload, SH_WIRE_ITEM_MAX);
    OK(sh_evaluation_encode(&e, &p->evaluation.payload, err));
}

static void send_item(agg_peer *p, const agg_item *item, uint8_t cls, uint8_t kind)
{
    if (!item->there || item->acked)
        return;
    send_msg(p, &(sh_msg){.type = SH_MSG_ITEM,
                          .item = {.epoch = p->epoch,
                                   .cls = cls,
                                   .seq = item->seq,
                                   .kind = kind,
                                   .last_seq = item->seq,
                                   .payload = {item->payload.data, item->payload.len}}});
}

static void tick(agg_peer *p)
{
    if (!p->up)
        return;
    if (!p->welcomed) {
        send_msg(p, &(sh_msg){.type = SH_MSG_ENROL,
                              .enrol = {.epoch = p->epoch,
                                        .agent = "test",
                                        .kernel = "none",
                                        .cores = 1,
                                        .memory_bytes = 1}});
        return;
    }
    uint64_t version = p->version > 0 ? p->version : 1;
    send_msg(p, &(sh_msg){.type = SH_MSG_CHECKIN,
                          .checkin = {.epoch = p->epoch,
                                      .active_version = version,
                                      .confirmed_version = version,
                                      .drifting = true}});
    send_item(p, &p->update, SH_CLASS_UPDATE, SH_ITEM_UPDATE);
    send_item(p, &p->evaluation, SH_CLASS_ALARM, SH_ITEM_EVALUATION);
}

static void on_plan(agg_rig *r, unsigned peer, const sh_msg_plan *plan)
{
    agg_peer *p = &r->peers[peer];
    if (plan->manifest.n > 0) {
        sh_manifest manifest;
        OK(sh_manifest_verify(plan->manifest.data, plan->manifest.n, &r->release_pk, &manifest,
                              err));
        p->version = manifest.version;
    }
    if (plan->train.train && plan->train.round != p->update.number)
        make_update(r, peer, &plan->train);
    if (plan->evaluate.candidate != 0 && plan->evaluate.candidate != p->evaluation.number)
        make_evaluation(p, &plan->evaluate);
}

static void on_want(agg_peer *p, const sh_hash_list *want)
{
    for (uint32_t i = 0; i < want->n && p->chunks != NULL; i++) {
        for (uint32_t k = 0; k < p->described.n_chunks; k++) {
            if (memcmp(p->chunks + 32 * k, want->hashes + 32 * i, 32) != 0)
                continue;
            size_t at = (size_t)k * SH_CHUNK_BYTES;
            sh_msg msg = {.type = SH_MSG_CHUNK};
            memcpy(msg.chunk.hash.b, p->chunks + 32 * k, 32);
            msg.chunk.bytes =
                (sh_bytes){p->blob.data + at, SH_MIN(p->blob.len - at, (size_t)SH_CHUNK_BYTES)};
            send_msg(p, &msg);
        }
    }
}

static void on_message(agg_rig *r, unsigned peer, const sh_net_event *event)
{
    agg_peer *p = &r->peers[peer];
    sh_msg msg;
    OK(sh_msg_decode(event->data, event->n, &msg, err));
    switch (msg.type) {
    case SH_MSG_WELCOME:
        p->welcomed = msg.welcome.accepted;
        break;
    case SH_MSG_PLAN:
        on_plan(r, peer, &msg.plan);
        break;
    case SH_MSG_WANT:
        on_want(p, &msg.want);
        break;
    case SH_MSG_ACK: {
        agg_item *item = msg.ack.cls == SH_CLASS_UPDATE ? &p->update : &p->evaluation;
        p->acks++;
        if (item->there && msg.ack.high_water >= item->seq)
            item->acked = true;
        break;
    }
    case SH_MSG_ERROR:
        p->errors++;
        p->welcomed = false;
        break;
    default:
        fail_msg("a node was sent a %s", sh_msg_type_name(msg.type));
    }
}

static void serve(agg_rig *r, unsigned peer)
{
    agg_peer *p = &r->peers[peer];
    sh_net_event event = {0};
    for (;;) {
        OK(sh_net_client_next(p->client, &event, err));
        switch (event.kind) {
        case SH_NET_NONE:
            return;
        case SH_NET_UP:
            p->up = true;
            tick(p);
            break;
        case SH_NET_DOWN:
            p->up = p->welcomed = false;
            break;
        case SH_NET_REFUSED:
            p->refused = true;
            break;
        case SH_NET_MESSAGE:
            on_message(r, peer, &event);
            break;
        }
    }
}

void agg_play(agg_rig *r, unsigned ms)
{
    static uint64_t next_tick;
    uint64_t end = sh_clock_mono_ms() + ms;
    do {
        sh_net_client *clients[AGG_PEERS];
        size_t n = 0;
        for (unsigned i = 0; i < AGG_PEERS; i++)
            if (r->peers[i].client != NULL)
                clients[n++] = r->peers[i].client;
        if (sh_clock_mono_ms() >= next_tick) {
            for (unsigned i = 0; i < AGG_PEERS; i++)
                if (r->peers[i].client != NULL)
                    tick(&r->peers[i]);
            next_tick = sh_clock_mono_ms() + TICK_MS;
        }
        OK(sh_net_wait(
            &(sh_net_waiting){.clients = clients, .n_clients = n, .timeout_ms = TICK_MS / 4}, err));
        for (unsigned i = 0; i < AGG_PEERS; i++)
            if (r->peers[i].client != NULL)
                serve(r, i);
    } while (sh_clock_mono_ms() < end);
}
