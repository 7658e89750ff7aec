/*
 * Many nodes in one process, each with a key and a connection of its own: they enrol, check in, and
 * owe a window, which they send until it is acknowledged. SIGUSR1 makes each owe one more; SIGTERM
 * ends them, and what each was acknowledged is written to a file. Told to come later, a node is
 * silent for so long. How far they are is a line in the log.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/bench-ingest/bench.h"
#include "shared/base/clock.h"
#include "shared/base/rng.h"

#define SWEEP_MS 20
#define SWEEP_PAUSE                                                                                \
    4 /* times what a sweep over all nodes took: they share the machine with what                  \
         is measured, and each of them would be a machine of its own */
#define DIALS_MAX     100u /* first handshakes under way: all at once is for the return */
#define QUEUE_MAX     16u
#define TELL_MS       100u
#define RETRY_MIN_MS  5000u
#define RETRY_MAX_MS  40000u
#define SOCKETS_EACH  6u /* three, and those that are being closed while it dials again */
#define SOCKETS_SPARE 64u

typedef struct {
    sh_net_keys keys;
    sh_net_client *client;
    uint64_t made, acked;
    bool up, welcomed, checked_in;
    bool answered; /* since its connection came up; a "later" is an answer */
    uint64_t due_ms, retry_ms;
    uint64_t later;
} node;

typedef struct {
    node *nodes;
    size_t n, dialled;
    sh_net *net;
    sh_hash server_key;
    sh_rng rng;
    uint8_t window[BENCH_WINDOW_BYTES];
    uint64_t later;
} crowd;

static volatile sig_atomic_t one_more, ending;

static void on_signal(int number)
{
    if (number == SIGUSR1)
        one_more = one_more + 1;
    else
        ending = 1;
}

static sh_status send_msg(node *p, const sh_msg *msg, sh_error *err)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_status status = sh_msg_encode(msg, &bytes, err);
    /* What finds its queue full is sent again. */
    if (status == SH_OK && sh_net_client_send(p->client, bytes.data, bytes.len, NULL) != SH_OK)
        p->due_ms = 0;
    sh_buf_release(&bytes);
    return status;
}

/* What is to be said now; said again when nothing comes. */
static sh_status speak(crowd *c, node *p, sh_error *err)
{
    uint64_t now = sh_clock_mono_ms();
    p->retry_ms = SH_MIN(SH_MAX(2 * p->retry_ms, (uint64_t)RETRY_MIN_MS), (uint64_t)RETRY_MAX_MS);
    p->due_ms = now + p->retry_ms / 2 + (uint64_t)(sh_rng_unit(&c->rng) * (double)p->retry_ms / 2);
    if (!p->welcomed)
        return send_msg(p,
                        &(sh_msg){.type = SH_MSG_ENROL,
                                  .enrol = {.epoch = 1,
                                            .agent = "bench-ingest",
                                            .kernel = "none",
                                            .cores = 1,
                                            .memory_bytes = 1}},
                        err);
    if (!p->checked_in)
        SH_TRY(send_msg(p,
                        &(sh_msg){.type = SH_MSG_CHECKIN,
                                  .checkin = {.epoch = 1,
                                              .active_version = 1,
                                              .confirmed_version = 1,
                                              .outbox_items = p->made - p->acked}},
                        err));
    for (uint64_t seq = p->acked + 1; seq <= p->made; seq++)
        SH_TRY(send_msg(p,
                        &(sh_msg){.type = SH_MSG_ITEM,
                                  .item = {.epoch = 1,
                                           .cls = SH_CLASS_WINDOW,
                                           .seq = seq,
                                           .last_seq = seq,
                                           .kind = SH_ITEM_WINDOW,
                                           .payload = {c->window, sizeof c->window}}},
                        err));
    return SH_OK;
}

static sh_status on_message(crowd *c, node *p, const sh_net_event *event, sh_error *err)
{
    sh_msg msg;
    SH_TRY(sh_msg_decode(event->data, event->n, &msg, err));
    p->answered = true;
    switch (msg.type) {
    case SH_MSG_WELCOME:
        if (!msg.welcome.accepted)
            return sh_fail(err, SH_ERR_AUTH, "a node is not welcome: %s", msg.welcome.text);
        p->welcomed = true;
        p->retry_ms = 0;
        return speak(c, p, err);
    case SH_MSG_PLAN:
        p->checked_in = true;
        return SH_OK;
    case SH_MSG_ACK:
        p->acked = SH_MAX(p->acked, msg.ack.high_water);
        return SH_OK;
    case SH_MSG_ERROR:
        if (strcmp(msg.error.code, "limit") != 0)
            return sh_fail(err, SH_ERR_IO, "a node was told: %s", msg.error.text);
        c->later++;
        p->retry_ms = 0;
        p->due_ms = sh_clock_mono_ms() + msg.error.retry_after_ms;
        return SH_OK;
    default:
        return SH_OK;
    }
}

static sh_status serve(crowd *c, node *p, sh_error *err)
{
    sh_net_event event = {0};
    for (;;) {
        SH_TRY(sh_net_client_next(p->client, &event, err));
        if (event.kind == SH_NET_NONE)
            break;
        if (event.kind == SH_NET_MESSAGE) {
            SH_TRY(on_message(c, p, &event, err));
            continue;
        }
        p->up = event.kind == SH_NET_UP;
        p->welcomed = p->checked_in = p->answered = false;
        p->retry_ms = p->due_ms = 0;
    }
    bool owes = !p->checked_in || p->acked < p->made;
    return p->up && owes && sh_clock_mono_ms() >= p->due_ms ? speak(c, p, err) : SH_OK;
}

static void tell(const crowd *c)
{
    static size_t told[4];
    size_t now[4] = {0};
    for (size_t i = 0; i < c->n; i++) {
        const node *p = &c->nodes[i];
        now[0] += p->up;
        now[1] += p->answered;
        now[2] += p->checked_in && p->acked == p->made;
        now[3] += p->acked;
    }
    if (memcmp(told, now, sizeof now) == 0)
        return;
    memcpy(told, now, sizeof now);
    fprintf(stderr, "event=state up=%zu answered=%zu done=%zu acked=%zu later=%llu\n", now[0],
            now[1], now[2], now[3], (unsigned long long)c->later);
}

static sh_status open_net(crowd *c, const bench_options *o, sh_error *err)
{
    sh_net_options options = {.sockets_max = SOCKETS_EACH * (uint32_t)c->n + SOCKETS_SPARE};
    SH_TRY(sh_hash_parse(o->server_key, &c->server_key, err));
    SH_TRY(sh_net_create_with(&options, &c->net, err));
    for (size_t i = 0; i < c->n; i++) {
        c->nodes[i].made = 1;
        SH_TRY(sh_net_keys_make(&c->nodes[i].keys, err));
    }
    return SH_OK;
}

/* A few at a time, with a node's own pauses between two attempts. */
static sh_status dial_some(crowd *c, const bench_options *o, sh_error *err)
{
    size_t up = 0;
    for (size_t i = 0; i < c->dialled; i++)
        up += c->nodes[i].up;
    for (size_t pending = c->dialled - up; c->dialled < c->n && pending < DIALS_MAX; pending++) {
        node *p = &c->nodes[c->dialled];
        sh_net_client_options options = {.endpoint = o->endpoint,
                                         .server_key = c->server_key,
                                         .keys = &p->keys,
                                         .message_max = SH_WIRE_MESSAGE_MAX,
                                         .queue_max = QUEUE_MAX};
        SH_TRY(sh_net_client_create(c->net, &options, &p->client, err));
        c->dialled++;
    }
    return SH_OK;
}

static sh_status write_acked(const crowd *c, const char *path, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    sh_buf text;
    sh_buf_init(&text, (size_t)64 << 20);
    sh_status status = SH_OK;
    for (size_t i = 0; i < c->n && status == SH_OK; i++) {
        sh_hex(c->nodes[i].keys.public_key.b, 32, hex);
        status = sh_buf_printf(&text, "%s %llu\n", hex, (unsigned long long)c->nodes[i].acked);
    }
    if (status == SH_OK)
        status = sh_file_write_atomic(path, text.data, text.len, err);
    sh_buf_release(&text);
    return status;
}

static sh_status play(crowd *c, const bench_options *o, sh_error *err)
{
    int added = 0;
    uint64_t tell_ms = 0;
    SH_TRY(open_net(c, o, err));
    while (!ending) {
        uint64_t begin = sh_clock_mono_ms();
        for (; added < one_more; added++)
            for (size_t i = 0; i < c->n; i++) {
                c->nodes[i].made++;
                c->nodes[i].due_ms = c->nodes[i].retry_ms = 0;
            }
        if (c->dialled < c->n)
            SH_TRY(dial_some(c, o, err));
        for (size_t i = 0; i < c->dialled; i++)
            SH_TRY(serve(c, &c->nodes[i], err));
        if (sh_clock_mono_ms() >= tell_ms) {
            tell(c);
            tell_ms = sh_clock_mono_ms() + TELL_MS;
        }
        uint64_t took = sh_clock_mono_ms() - begin;
        (void)poll(NULL, 0, (int)SH_MAX(SWEEP_PAUSE * took, (uint64_t)SWEEP_MS));
    }
    return write_acked(c, o->out, err);
}

int bench_clients(const bench_options *o)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    crowd c = {.n = (size_t)o->connections};
    sh_error err = {0};
    uint64_t seed;
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sh_random_bytes(&seed, sizeof seed);
    sh_rng_init(&c.rng, seed, 0, 1);
    sh_random_bytes(c.window, sizeof c.window);
    c.nodes = sh_calloc(c.n, sizeof *c.nodes);
    sh_status status = c.nodes != NULL ? play(&c, o, &err) : SH_ERR_NO_MEMORY;
    for (size_t i = 0; c.nodes != NULL && i < c.n; i++)
        sh_net_client_destroy(&c.nodes[i].client, 0);
    sh_net_destroy(&c.net);
    free(c.nodes);
    if (status != SH_OK)
        fprintf(stderr, "event=failed error=\"%s\"\n", err.text);
    return status == SH_OK ? 0 : 1;
}
