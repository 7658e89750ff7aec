/*
 * Senders over the real protocol: each enrols, offers its updates, sends the chunks that it is
 * asked for and waits for the acknowledgement, a few updates at a time. A thread has as many
 * senders as one wait takes; the clock runs from when all are welcome until all is acknowledged.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/bench-ingest/bench.h"

#define TICK_MS 100

typedef struct {
    sh_net_client *client;
    bench_node *node;
    bool up, welcomed;
    uint32_t open, sent; /* units before `open` are acknowledged, before `sent` are sent */
    double again_ms;     /* told to come later: 0: not */
} sender;

typedef struct {
    atomic_uint ready, go;
    atomic_bool failed;
    unsigned all;
} gate;

typedef struct {
    pthread_t thread;
    bool started;
    const bench_options *options;
    const bench_rig *rig;
    gate *gate;
    sh_net *net;
    sender senders[SH_NET_SOCKETS_MAX];
    size_t n;
    double progress_ms, done_ms;
    sh_status status;
    sh_error err;
} worker;

static sh_status dial(worker *w, sender *s, sh_error *err)
{
    sh_net_client_options o = {.endpoint = w->rig->endpoint,
                               .server_key = w->rig->key,
                               .keys = &s->node->keys,
                               .message_max = SH_WIRE_MESSAGE_MAX};
    return sh_net_client_create(w->net, &o, &s->client, err);
}

static sh_status enrol(sender *s, sh_error *err)
{
    sh_buf bytes;
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = s->node->epoch,
                            .agent = "bench-ingest",
                            .kernel = "none",
                            .cores = 1,
                            .memory_bytes = 1}};
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_status status = sh_msg_encode(&msg, &bytes, err);
    if (status == SH_OK)
        status = sh_net_client_send(s->client, bytes.data, bytes.len, err);
    sh_buf_release(&bytes);
    return status;
}

static sh_status send_bytes(sender *s, sh_bytes bytes, sh_error *err)
{
    return sh_net_client_send(s->client, bytes.data, bytes.n, err);
}

static sh_status fill(worker *w, sender *s, sh_error *err)
{
    while (s->sent < s->node->n_units && s->sent - s->open < (uint64_t)w->options->flight) {
        bench_unit *unit = &s->node->units[s->sent++];
        unit->sent_ms = bench_now_ms();
        SH_TRY(send_bytes(s, unit->item, err));
    }
    return SH_OK;
}

static void take_ack(worker *w, sender *s, const sh_msg_ack *ack)
{
    double now = bench_now_ms();
    for (uint32_t i = s->open; i < s->sent; i++) {
        uint64_t seq = (uint64_t)i + 1, above = seq - ack->high_water - 1;
        bool in = seq <= ack->high_water || (above < 64 * SH_ACK_BITMAP_WORDS &&
                                             (ack->bitmap[above / 64] >> (above % 64) & 1) != 0);
        if (in && s->node->units[i].acked_ms < 0)
            s->node->units[i].acked_ms = w->progress_ms = now;
    }
    while (s->open < s->sent && s->node->units[s->open].acked_ms >= 0)
        s->open++;
}

static sh_status serve(sender *s, const sh_hash_list *want, sh_error *err)
{
    for (uint32_t i = 0; i < want->n; i++)
        for (uint32_t u = s->open; u < s->sent; u++) {
            const bench_unit *unit = &s->node->units[u];
            for (uint32_t k = 0; k < unit->n_chunks; k++)
                if (memcmp(unit->names[k].b, want->hashes + i * sizeof(sh_hash), sizeof(sh_hash)) ==
                    0)
                    SH_TRY(send_bytes(s, unit->chunks[k], err));
        }
    return SH_OK;
}

static sh_status on_message(worker *w, sender *s, const sh_net_event *event, sh_error *err)
{
    sh_msg msg;
    SH_TRY(sh_msg_decode(event->data, event->n, &msg, err));
    switch (msg.type) {
    case SH_MSG_WELCOME:
        if (!msg.welcome.accepted)
            return sh_fail(err, SH_ERR_AUTH, "a sender is not welcome: %s", msg.welcome.text);
        if (!s->welcomed)
            atomic_fetch_add(&w->gate->ready, 1);
        s->welcomed = true;
        return SH_OK;
    case SH_MSG_WANT:
        return serve(s, &msg.want, err);
    case SH_MSG_ACK:
        take_ack(w, s, &msg.ack);
        return fill(w, s, err);
    case SH_MSG_ERROR:
        if (msg.error.retry_after_ms == 0 || strcmp(msg.error.code, "limit") != 0)
            return sh_fail(err, SH_ERR_IO, "a sender was told: %s", msg.error.text);
        s->again_ms = bench_now_ms() + (double)msg.error.retry_after_ms;
        return SH_OK;
    default:
        return SH_OK;
    }
}

static sh_status serve_sender(worker *w, sender *s, sh_error *err)
{
    sh_net_event event = {0};
    for (;;) {
        SH_TRY(sh_net_client_next(s->client, &event, err));
        if (event.kind == SH_NET_NONE)
            break;
        if (event.kind == SH_NET_UP)
            SH_TRY(enrol(s, err));
        else if (event.kind == SH_NET_MESSAGE)
            SH_TRY(on_message(w, s, &event, err));
        else
            return sh_fail(err, SH_ERR_IO, "a sender lost its connection");
    }
    if (s->again_ms == 0 || bench_now_ms() < s->again_ms)
        return SH_OK;
    s->again_ms = 0;
    for (uint32_t i = s->open; i < s->sent; i++)
        if (s->node->units[i].acked_ms < 0)
            SH_TRY(send_bytes(s, s->node->units[i].item, err));
    return SH_OK;
}

static sh_status play(worker *w, sh_error *err)
{
    sh_net_client *clients[SH_NET_SOCKETS_MAX];
    bool started = false;
    size_t done = 0;
    SH_TRY(sh_net_create(&w->net, err));
    for (size_t i = 0; i < w->n; i++) {
        SH_TRY(dial(w, &w->senders[i], err));
        clients[i] = w->senders[i].client;
    }
    w->progress_ms = bench_now_ms();
    while (done < w->n) {
        if (atomic_load(&w->gate->failed))
            return sh_fail(err, SH_ERR_IO, "another sender failed");
        if (bench_now_ms() - w->progress_ms > BENCH_WAIT_MS)
            return sh_fail(err, SH_ERR_IO, "nothing was acknowledged for a minute");
        bool go = atomic_load(&w->gate->go) != 0;
        if (!go || started)
            SH_TRY(sh_net_wait(&(sh_net_waiting){.clients = clients,
                                                 .n_clients = w->n,
                                                 .timeout_ms = go ? TICK_MS : 1},
                               err));
        done = 0;
        for (size_t i = 0; i < w->n; i++) {
            sender *s = &w->senders[i];
            if (go && !started)
                SH_TRY(fill(w, s, err));
            SH_TRY(serve_sender(w, s, err));
            done += s->open == s->node->n_units;
        }
        started = go;
    }
    w->done_ms = bench_now_ms();
    return SH_OK;
}

static void *run(void *arg)
{
    worker *w = arg;
    w->status = play(w, &w->err);
    if (w->status != SH_OK)
        atomic_store(&w->gate->failed, true);
    for (size_t i = 0; i < w->n; i++)
        sh_net_client_destroy(&w->senders[i].client, 0);
    sh_net_destroy(&w->net);
    return NULL;
}

static sh_status run_all(const bench_options *o, bench_load *load, const bench_rig *rig,
                         double *seconds, sh_error *err)
{
    size_t n = (load->n_nodes + SH_NET_SOCKETS_MAX - 1) / SH_NET_SOCKETS_MAX;
    gate at = {.all = load->n_nodes};
    worker *workers = sh_calloc(n, sizeof *workers);
    sh_status status = SH_OK;
    double end = 0;
    if (workers == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu threads", n);
    for (size_t i = 0; i < n; i++)
        workers[i] = (worker){.options = o, .rig = rig, .gate = &at};
    for (uint32_t i = 0; i < load->n_nodes; i++) {
        worker *w = &workers[i % n];
        w->senders[w->n++].node = &load->nodes[i];
    }
    for (size_t i = 0; i < n && !atomic_load(&at.failed); i++) {
        workers[i].started = pthread_create(&workers[i].thread, NULL, run, &workers[i]) == 0;
        if (!workers[i].started)
            atomic_store(&at.failed, true);
    }
    while (atomic_load(&at.ready) < at.all && !atomic_load(&at.failed))
        (void)poll(NULL, 0, 1);
    double begin = bench_now_ms();
    atomic_store(&at.go, 1);
    for (size_t i = 0; i < n; i++) {
        if (!workers[i].started)
            continue;
        pthread_join(workers[i].thread, NULL);
        end = SH_MAX(end, workers[i].done_ms);
        if (workers[i].status != SH_OK && status == SH_OK) {
            status = workers[i].status;
            *err = workers[i].err;
        }
    }
    if (status == SH_OK && atomic_load(&at.failed))
        status = sh_fail(err, SH_ERR_IO, "a thread could not be started");
    *seconds = (end - begin) / 1000;
    free(workers);
    return status;
}

sh_status bench_ours(const bench_options *o, bench_load *load, bench_rig *rig, bench_turn *turn,
                     sh_error *err)
{
    char threads[32];
    const char *const words[] = {"--limit.checkins-per-second=0", "--limit.items-per-second=0",
                                 threads, NULL};
    double seconds = 0;
    uint64_t updates = 0, windows = 0;
    snprintf(threads, sizeof threads, "--io-threads=%lld", (long long)o->io_threads);
    SH_TRY(bench_rig_start(rig, words, err));
    double cpu_s = bench_cpu_s(&rig->process);
    SH_TRY(run_all(o, load, rig, &seconds, err));
    *turn = bench_turn_of(load, seconds);
    turn->cpu_s = bench_cpu_s(&rig->process) - cpu_s;
    (void)poll(NULL, 0, 1200); /* the page of metrics follows each second */
    turn->commits = bench_rig_metric(rig, "shoal_aggregator_commits_total");
    turn->messages = bench_rig_metric(rig, "shoal_aggregator_messages_total{direction=\"in\"}");
    SH_TRY(bench_rig_stop(rig, SIGTERM, err));
    SH_TRY(bench_rig_audit(rig, &updates, &windows, err));
    uint64_t found = o->windows ? windows : updates;
    if (found != load->n_units)
        return sh_fail(err, SH_ERR_CORRUPT,
                       "%llu were acknowledged, %llu are in the store: acknowledged is lost",
                       (unsigned long long)load->n_units, (unsigned long long)found);
    return SH_OK;
}
