/*
 * The peer: the same messages over ZeroMQ's own DEALER and ROUTER with the same CURVE setting,
 * appended to a file. The receiver takes what waits, up to the aggregator's own limits of a group
 * (but GROUP_BYTES), writes it, syncs once, and answers every update that the group ended. Nothing
 * is checked, looked up or asked for: a sender sends an update's messages one after another.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#include <zmq.h>

#include "aggregator/server.h"
#include "experiments/bench-ingest/bench.h"
#include "shared/base/clock.h"

#define START_MS    20000u
#define MARK_LAST   1 /* first byte of a message: it ends an update */
#define MARK_MORE   0
#define ROUTE_BYTES 16
#define TICK_MS     100
#define GROUP_BYTES (4u << 20) /* fewer did not make it faster */

static sh_status fail_zmq(sh_error *err, const char *what)
{
    return sh_fail(err, SH_ERR_IO, "raw: %s: %s", what, zmq_strerror(zmq_errno()));
}

/* ---- the receiver, a process of its own ---- */

typedef struct {
    void *zmq, *socket;
    int fd;
    uint8_t routes[SERVER_GROUP_STEPS][ROUTE_BYTES];
    size_t n_routes[SERVER_GROUP_STEPS];
    size_t n_answers;
    uint64_t commits, messages;
} receiver;

static bool take_one(receiver *r, size_t *bytes)
{
    uint8_t route[ROUTE_BYTES];
    int n = zmq_recv(r->socket, route, sizeof route, ZMQ_DONTWAIT);
    if (n < 0)
        return false;
    zmq_msg_t body;
    zmq_msg_init(&body);
    bool good = zmq_msg_recv(&body, r->socket, 0) > 0;
    const uint8_t *data = zmq_msg_data(&body);
    size_t left = good ? zmq_msg_size(&body) - 1 : 0;
    if (good && data[0] == MARK_LAST) {
        memcpy(r->routes[r->n_answers], route, (size_t)n);
        r->n_routes[r->n_answers++] = (size_t)n;
    }
    *bytes += left;
    for (ssize_t put; left > 0 && good; left -= (size_t)put) {
        put = write(r->fd, data + zmq_msg_size(&body) - left, left);
        good = put > 0;
    }
    r->messages += good;
    zmq_msg_close(&body);
    return good;
}

static bool receive_group(receiver *r)
{
    size_t bytes = 0;
    uint64_t since = sh_clock_mono_ms();
    r->n_answers = 0;
    for (size_t i = 0; i < SERVER_GROUP_STEPS && bytes < GROUP_BYTES; i++)
        if (!take_one(r, &bytes) || sh_clock_mono_ms() - since >= SERVER_GROUP_MS)
            break;
    if (bytes == 0)
        return true;
    if (fdatasync(r->fd) != 0)
        return false;
    r->commits++;
    for (size_t i = 0; i < r->n_answers; i++) {
        (void)zmq_send(r->socket, r->routes[i], r->n_routes[i], ZMQ_SNDMORE);
        (void)zmq_send(r->socket, "1", 1, 0);
    }
    return true;
}

int bench_raw_server(const bench_options *o)
{
    receiver r = {.zmq = zmq_ctx_new()};
    sh_net_keys keys;
    sh_error err = {0};
    int one = 1, none = 0;
    char endpoint[128], hex[SH_HASH_HEX_BYTES];
    size_t n = sizeof endpoint;
    zmq_ctx_set(r.zmq, ZMQ_IO_THREADS, (int)o->io_threads);
    r.socket = zmq_socket(r.zmq, ZMQ_ROUTER);
    r.fd = open(o->out, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (r.fd < 0 || sh_net_keys_make(&keys, &err) != SH_OK ||
        zmq_setsockopt(r.socket, ZMQ_CURVE_SERVER, &one, sizeof one) != 0 ||
        zmq_setsockopt(r.socket, ZMQ_CURVE_SECRETKEY, keys.secret, 32) != 0 ||
        zmq_setsockopt(r.socket, ZMQ_LINGER, &none, sizeof none) != 0 ||
        zmq_bind(r.socket, "tcp://127.0.0.1:*") != 0 ||
        zmq_getsockopt(r.socket, ZMQ_LAST_ENDPOINT, endpoint, &n) != 0) {
        fprintf(stderr, "raw: cannot listen, or write %s\n", o->out);
        return 1;
    }
    sh_hex(keys.public_key.b, 32, hex);
    fprintf(stderr, "event=ready endpoint=%s key=%s\n", endpoint, hex);
    zmq_pollitem_t item = {.socket = r.socket, .events = ZMQ_POLLIN};
    for (uint64_t told = 0;;) {
        int ready = zmq_poll(&item, 1, TICK_MS);
        if (ready > 0 && !receive_group(&r))
            return 1;
        if (ready == 0 && r.commits != told) {
            told = r.commits;
            fprintf(stderr, "event=idle commits=%llu messages=%llu\n",
                    (unsigned long long)r.commits, (unsigned long long)r.messages);
        }
    }
}

/* ---- senders ---- */

typedef struct {
    void *zmq, *sockets[SH_NET_SOCKETS_MAX];
    bench_node *nodes[SH_NET_SOCKETS_MAX];
    uint32_t sent[SH_NET_SOCKETS_MAX], acked[SH_NET_SOCKETS_MAX];
    size_t n;
    pthread_t thread;
    bool started;
    const bench_options *options;
    double done_ms;
    sh_status status;
    sh_error err;
} sender;

static sh_status connect_one(void *zmq, const char *endpoint, const sh_hash *server_key,
                             const sh_net_keys *keys, void **out, sh_error *err)
{
    int none = 0;
    void *socket = zmq_socket(zmq, ZMQ_DEALER);
    if (socket == NULL)
        return fail_zmq(err, "socket");
    *out = socket;
    if (zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, server_key->b, 32) != 0 ||
        zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, keys->public_key.b, 32) != 0 ||
        zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, keys->secret, 32) != 0 ||
        zmq_setsockopt(socket, ZMQ_LINGER, &none, sizeof none) != 0 ||
        zmq_connect(socket, endpoint) != 0)
        return fail_zmq(err, "connect");
    return SH_OK;
}

static sh_status send_marked(void *socket, sh_bytes bytes, uint8_t mark, sh_error *err)
{
    zmq_msg_t msg;
    if (zmq_msg_init_size(&msg, bytes.n + 1) != 0)
        return fail_zmq(err, "message");
    uint8_t *data = zmq_msg_data(&msg);
    data[0] = mark;
    memcpy(data + 1, bytes.data, bytes.n);
    if (zmq_msg_send(&msg, socket, 0) >= 0)
        return SH_OK;
    zmq_msg_close(&msg);
    return fail_zmq(err, "send");
}

static sh_status fill(sender *s, size_t i, sh_error *err)
{
    bench_node *node = s->nodes[i];
    while (s->sent[i] < node->n_units && s->sent[i] - s->acked[i] < (uint64_t)s->options->flight) {
        bench_unit *unit = &node->units[s->sent[i]++];
        unit->sent_ms = bench_now_ms();
        SH_TRY(send_marked(s->sockets[i], unit->item, unit->n_chunks == 0 ? MARK_LAST : MARK_MORE,
                           err));
        for (uint32_t k = 0; k < unit->n_chunks; k++)
            SH_TRY(send_marked(s->sockets[i], unit->chunks[k],
                               k + 1 == unit->n_chunks ? MARK_LAST : MARK_MORE, err));
    }
    return SH_OK;
}

static sh_status play(sender *s, sh_error *err)
{
    zmq_pollitem_t items[SH_NET_SOCKETS_MAX];
    double progress = bench_now_ms();
    size_t done = 0;
    char answer[8];
    for (size_t i = 0; i < s->n; i++) {
        items[i] = (zmq_pollitem_t){.socket = s->sockets[i], .events = ZMQ_POLLIN};
        SH_TRY(fill(s, i, err));
    }
    while (done < s->n) {
        if (zmq_poll(items, (int)s->n, TICK_MS) < 0)
            return fail_zmq(err, "poll");
        if (bench_now_ms() - progress > BENCH_WAIT_MS)
            return sh_fail(err, SH_ERR_IO, "raw: nothing was acknowledged for a minute");
        done = 0;
        for (size_t i = 0; i < s->n; i++) {
            while (zmq_recv(s->sockets[i], answer, sizeof answer, ZMQ_DONTWAIT) > 0) {
                progress = bench_now_ms();
                s->nodes[i]->units[s->acked[i]++].acked_ms = progress;
            }
            SH_TRY(fill(s, i, err));
            done += s->acked[i] == s->nodes[i]->n_units;
        }
    }
    s->done_ms = bench_now_ms();
    return SH_OK;
}

static void *run(void *arg)
{
    sender *s = arg;
    s->status = play(s, &s->err);
    return NULL;
}

/* An update of one message goes through each socket's handshake before the clock runs. */
static sh_status warm_up(sender *s, sh_error *err)
{
    char answer[8];
    int most_ms = (int)BENCH_WAIT_MS;
    for (size_t i = 0; i < s->n; i++)
        SH_TRY(send_marked(s->sockets[i], (sh_bytes){"hello", 5}, MARK_LAST, err));
    for (size_t i = 0; i < s->n; i++) {
        zmq_setsockopt(s->sockets[i], ZMQ_RCVTIMEO, &most_ms, sizeof most_ms);
        if (zmq_recv(s->sockets[i], answer, sizeof answer, 0) <= 0)
            return fail_zmq(err, "handshake");
    }
    return SH_OK;
}

static sh_status send_all(sender *senders, size_t n, double *seconds, sh_error *err)
{
    sh_status status = SH_OK;
    double begin = bench_now_ms(), end = 0;
    for (size_t i = 0; i < n; i++)
        senders[i].started = pthread_create(&senders[i].thread, NULL, run, &senders[i]) == 0;
    for (size_t i = 0; i < n; i++) {
        if (!senders[i].started) {
            status = sh_fail(err, SH_ERR_IO, "raw: a thread could not be started");
            continue;
        }
        pthread_join(senders[i].thread, NULL);
        end = SH_MAX(end, senders[i].done_ms);
        if (senders[i].status != SH_OK && status == SH_OK) {
            status = senders[i].status;
            *err = senders[i].err;
        }
    }
    *seconds = (end - begin) / 1000;
    return status;
}

static sh_status run_senders(const bench_options *o, bench_load *load, const char *endpoint,
                             const sh_hash *key, double *seconds, sh_error *err)
{
    size_t n = (load->n_nodes + SH_NET_SOCKETS_MAX - 1) / SH_NET_SOCKETS_MAX;
    sender *senders = sh_calloc(n, sizeof *senders);
    sh_status status = SH_OK;
    if (senders == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "raw: no memory");
    for (size_t i = 0; i < n; i++)
        senders[i] = (sender){.options = o, .zmq = zmq_ctx_new()};
    for (uint32_t i = 0; i < load->n_nodes; i++) {
        sender *s = &senders[i % n];
        s->nodes[s->n] = &load->nodes[i];
        SH_GOTO(connect_one(s->zmq, endpoint, key, &load->nodes[i].keys, &s->sockets[s->n++], err));
    }
    for (size_t i = 0; i < n; i++)
        SH_GOTO(warm_up(&senders[i], err));
    status = send_all(senders, n, seconds, err);
cleanup:
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < senders[i].n; k++)
            if (senders[i].sockets[k] != NULL)
                zmq_close(senders[i].sockets[k]);
        zmq_ctx_term(senders[i].zmq);
    }
    free(senders);
    return status;
}

static const char *wait_line(fleet_process *p, const char *event)
{
    uint64_t end = sh_clock_mono_ms() + START_MS;
    while (sh_clock_mono_ms() < end) {
        const char *line = fleet_process_line(p);
        if (line != NULL && strstr(line, event) != NULL)
            return line;
        if (line == NULL)
            (void)usleep(1000);
    }
    return NULL;
}

sh_status bench_raw(const bench_options *o, bench_load *load, bench_turn *turn, sh_error *err)
{
    char program[SH_PATH_BYTES], log[SH_PATH_BYTES], file[SH_PATH_BYTES];
    char endpoint[128] = "", hex[SH_HASH_HEX_BYTES] = "";
    fleet_process process = {0};
    fleet_words w = {0};
    sh_hash key;
    double seconds = 0;
    sh_status status = SH_OK;
    SH_TRY(fleet_program("shoal-bench-ingest", program, sizeof program, err));
    SH_TRY(sh_path_join(log, sizeof log, o->dir, "raw.log", err));
    SH_TRY(sh_path_join(file, sizeof file, o->dir, "raw.data", err));
    (void)unlink(log);
    fleet_words_add(&w, program);
    fleet_words_add(&w, "--child=raw");
    fleet_words_addf(&w, "--out=%s", file);
    fleet_words_int(&w, "io-threads", o->io_threads);
    SH_GOTO(fleet_process_start(&process, &w, NULL, log, err));
    const char *line = wait_line(&process, "event=ready");
    if (line == NULL || !fleet_log_text(line, "endpoint", endpoint, sizeof endpoint) ||
        !fleet_log_text(line, "key", hex, sizeof hex))
        SH_GOTO(sh_fail(err, SH_ERR_IO, "raw: its receiver is not ready; see %s", log));
    SH_GOTO(sh_hash_parse(hex, &key, err));
    double cpu_s = bench_cpu_s(&process);
    SH_GOTO(run_senders(o, load, endpoint, &key, &seconds, err));
    *turn = bench_turn_of(load, seconds);
    turn->cpu_s = bench_cpu_s(&process) - cpu_s;
    for (line = wait_line(&process, "event=idle"); line != NULL;
         line = fleet_process_line(&process)) {
        (void)fleet_log_number(line, "commits", &turn->commits);
        (void)fleet_log_number(line, "messages", &turn->messages);
    }
cleanup:
    fleet_process_release(&process);
    (void)unlink(file);
    return status;
}
