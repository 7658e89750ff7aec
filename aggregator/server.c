#include "aggregator/server.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

#define AWAY_MS_MIN   1000u /* what nodes are told while nothing is taken in, at least */
#define VIEW_MS       500   /* between two refreshes of what HTTP shows */
#define LINGER_MS     1000
#define HTTP_BODY_MAX 4096
#define SIGNAL_INT    0x10000 /* added to the event's number by SIGINT, 1 by SIGTERM */

static const sh_http_route routes[] = {
    {"GET", "/", server_handle_page, false},
    {"GET", "/metrics", server_handle_metrics, true},
    {"GET", "/healthz", server_handle_health, true},
};

/* ---- create ---- */

/* A folder stays what init made of it. */
static sh_status check_kind(const sh_server *s, sh_error *err)
{
    bool is_relay = sh_file_exists(SH_FOLDER_UP_KEY);
    if (s->options.relay && !is_relay)
        return sh_fail(err, SH_ERR_USAGE,
                       "upstream.endpoint is set, and %s is no relay's folder; shoal-aggregator "
                       "init --relay makes one",
                       s->settings.dir);
    if (!s->options.relay && is_relay)
        return sh_fail(err, SH_ERR_USAGE,
                       "%s is a relay's folder; set upstream.endpoint to its parent",
                       s->settings.dir);
    return SH_OK;
}

static sh_status open_keys(sh_server *s, sh_error *err)
{
    SH_TRY(check_kind(s, err));
    SH_TRY(sh_net_keys_load(SH_FOLDER_KEY, &s->keys, err));
    SH_TRY(sh_net_keys_load(SH_FOLDER_ADMIN, &s->admin_keys, err));
    if (s->options.relay) {
        sh_hash key;
        SH_TRY(sh_folder_read_public(SH_FOLDER_PUB, &key, err));
        memcpy(s->options.release_pk.b, key.b, sizeof key.b);
        return SH_OK;
    }
    return sh_folder_release_key(&s->options.release_pk, &s->options.release_sk, err);
}

/* A handler, not signalfd: OpenBLAS starts threads before main, which block no signal, so that one
 * of them would take the signal and its default action end the process. */
static volatile int signal_fd = -1;

static void on_signal(int number)
{
    uint64_t one = number == SIGTERM ? 1 : SIGNAL_INT;
    int saved = errno;
    (void)!write(signal_fd, &one, sizeof one);
    errno = saved;
}

static sh_status open_signals(sh_server *s, sh_error *err)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    s->signal_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->signal_fd < 0)
        return sh_fail(err, SH_ERR_IO, "server: eventfd: %s", strerror(errno));
    signal_fd = s->signal_fd;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    return SH_OK;
}

static void close_signals(sh_server *s)
{
    if (s->signal_fd < 0)
        return;
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    signal_fd = -1;
    close(s->signal_fd);
}

static sh_status open_store(sh_server *s, sh_error *err)
{
    if (!sh_file_exists(SH_FOLDER_STORE))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s/store is not there; shoal-aggregator init or restore makes it",
                       s->settings.dir);
    sh_status status = sh_folder_open_store(SH_FOLDER_STORE, (uint64_t)s->settings.store_bytes_max,
                                            &s->store, err);
    if (status == SH_ERR_EXISTS)
        return sh_fail(err, SH_ERR_EXISTS,
                       "%s: another shoal-aggregator runs on it; stop that one, or name another "
                       "--dir",
                       s->settings.dir);
    return status;
}

static sh_status open_sockets(sh_server *s, sh_error *err)
{
    sh_net_server_options nodes = {.endpoint = s->settings.listen,
                                   .keys = &s->keys,
                                   .allow = server_keys_allow,
                                   .arg = &s->allowed,
                                   .connections_max = (uint32_t)s->settings.connections_max,
                                   .queue_max =
                                       SERVER_PEER_OUT + 2 * (uint32_t)s->settings.chunk_budget,
                                   .receive_queue_max = SERVER_PEER_IN,
                                   .message_max = SH_WIRE_MESSAGE_MAX,
                                   .receive_max = SERVER_PEER_IN_BYTES};
    sh_net_options net = {.io_threads = (uint32_t)s->settings.io_threads};
    sh_http_options http = {.address = s->settings.http_address,
                            .port = (uint16_t)s->settings.http_port,
                            .routes = routes,
                            .n_routes = SH_COUNT(routes),
                            .arg = s,
                            .body_max = HTTP_BODY_MAX};
    (void)sh_net_raise_descriptors(); /* each connection takes one */
    SH_TRY(sh_net_create_with(&net, &s->net, err));
    SH_TRY(sh_net_server_create(s->net, &nodes, &s->nodes, err));
    SH_TRY(server_parent_open(s, err));
    SH_TRY(server_fetch_create(s->nodes, &s->fetch, err));
    SH_TRY(sh_admin_create(s->net, SH_ADMIN_ENDPOINT, &s->keys, &s->admin_keys.public_key,
                           &s->admin, err));
    return sh_http_create(&http, &s->http, err);
}

static void init_histograms(sh_server *s)
{
    static const double bounds[] = {0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600};
    for (int i = 0; i < TASK_KINDS; i++) {
        sh_histogram *h = &s->counters.task_seconds[i];
        memcpy(h->bounds, bounds, sizeof bounds);
        h->n_bounds = SH_COUNT(bounds);
    }
}

static sh_status open_all(sh_server *s, const char *failpoints, sh_error *err)
{
    SH_TRY(server_keys_init(&s->allowed, s->settings.enrol_any, err));
    SH_TRY(server_views_init(&s->views, err));
    if (failpoints != NULL)
        SH_TRY(sh_failpoint_arm_list(&s->failpoints, failpoints, err));
    SH_TRY(open_signals(s, err));
    SH_TRY(open_keys(s, err));
    SH_TRY(open_store(s, err));
    SH_TRY(server_worker_start(&s->worker, s->store, &s->settings, err));
    SH_TRY(open_sockets(s, err));
    SH_TRY(server_boot(s, err)); /* after the sockets: what it asks for may be sent */
    server_view_refresh(s);
    return SH_OK;
}

sh_status sh_server_create(const sh_aggregator_settings *settings, const char *failpoints,
                           sh_server **out, sh_error *err)
{
    sh_server *s = sh_calloc(1, sizeof *s);
    if (s == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: no memory");
    s->settings = *settings;
    s->options = sh_aggregator_settings_coord(settings);
    s->signal_fd = -1;
    s->started_ms = sh_clock_wall_ms();
    init_histograms(s);
    sh_status status = open_all(s, failpoints, err);
    if (status != SH_OK) {
        s->settings.stop_wait_ms = 600000; /* nothing runs that could take longer */
        (void)sh_server_destroy(&s);
        return status;
    }
    sh_log(SH_LOG_INFO, "ready", "endpoint=%s http=%s:%u version=%llu",
           sh_net_server_endpoint(s->nodes), settings->http_address,
           (unsigned)sh_http_port(s->http),
           (unsigned long long)(s->coord ? sh_coord_get_status(s->coord).version : 0));
    *out = s;
    return SH_OK;
}

bool sh_server_destroy(sh_server **sp)
{
    sh_server *s = *sp;
    if (s == NULL)
        return true;
    sh_http_destroy(&s->http);
    sh_admin_destroy(&s->admin);
    sh_net_client_destroy(&s->parent, LINGER_MS);
    server_fetch_destroy(&s->fetch);
    sh_net_server_destroy(&s->nodes, LINGER_MS);
    sh_net_destroy(&s->net);
    sh_coord_destroy(&s->coord);
    bool ended = server_worker_stop(&s->worker, (uint64_t)s->settings.stop_wait_ms);
    sh_net_keys_forget(&s->keys);
    sh_net_keys_forget(&s->admin_keys);
    sh_net_keys_forget(&s->parent_keys);
    explicit_bzero(&s->options.release_sk, sizeof s->options.release_sk);
    if (!ended)
        return false;
    sh_store_close(&s->store);
    server_views_release(&s->views);
    server_keys_release(&s->allowed);
    close_signals(s);
    free(s);
    *sp = NULL;
    return true;
}

/* ---- the loop ---- */

static void stop(sh_server *s, const char *reason)
{
    s->stop = true;
    s->stop_reason = reason;
}

static bool is_away(const sh_server *s)
{
    return s->coord == NULL || sh_clock_mono_ms() < s->hold_until_ms;
}

/* The next message of a node, or NONE. */
static sh_status next_message(sh_server *s, sh_net_event *event, bool *checked, sh_error *err)
{
    do
        SH_TRY(server_fetch_next(s->fetch, event, checked, err));
    while (event->kind != SH_NET_MESSAGE && event->kind != SH_NET_NONE);
    s->counters.messages_in += event->kind == SH_NET_MESSAGE;
    return SH_OK;
}

/* While the core is down, or holds, what comes is answered "later" and thrown away, as if it had
 * been lost: queues that nobody reads would grow. Every version reads an ERROR of the oldest. */
static sh_status turn_away(sh_server *s, sh_error *err)
{
    uint64_t now = sh_clock_mono_ms(), until = s->coord == NULL ? s->boot_at_ms : s->hold_until_ms;
    uint64_t left = SH_MAX(until > now ? until - now : 0, (uint64_t)AWAY_MS_MIN), jitter;
    for (unsigned i = 0; i < SERVER_GROUP_STEPS; i++) {
        sh_net_event event;
        bool checked;
        SH_TRY(next_message(s, &event, &checked, err));
        if (event.kind == SH_NET_NONE)
            break;
        s->counters.messages_dropped++;
        sh_random_bytes(&jitter, sizeof jitter);
        sh_msg later = {.version = SH_WIRE_VERSION_MIN,
                        .type = SH_MSG_ERROR,
                        .error = {.code = sh_status_name(SH_ERR_LIMIT),
                                  .text = "the aggregator takes nothing in now: later",
                                  .retry_after_ms = left + jitter % left}};
        sh_buf bytes;
        sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
        if (sh_msg_encode(&later, &bytes, NULL) == SH_OK &&
            sh_net_server_send(s->nodes, &event.key, bytes.data, bytes.len, NULL) == SH_OK)
            s->counters.messages_out++;
        sh_buf_release(&bytes);
    }
    return SH_OK;
}

/* At most one group of what waits; the rest is there at the next turn. */
static sh_status serve_nodes(sh_server *s, sh_error *err)
{
    sh_net_event event;
    bool checked;
    if (is_away(s))
        return turn_away(s, err);
    for (;;) {
        SH_TRY(next_message(s, &event, &checked, err));
        if (event.kind == SH_NET_NONE)
            break;
        sh_coord_event e = {.kind = SH_COORD_MESSAGE,
                            .node = event.key,
                            .connection = event.connection,
                            .message = {event.data, event.n},
                            .checked = checked};
        if (!server_step(s, &e))
            return SH_OK;
        if (server_group_full(s))
            break;
    }
    (void)server_commit(s, NULL);
    return SH_OK;
}

static void take_in(sh_server *s, server_task *task)
{
    sh_coord_event e = {.kind = SH_COORD_JOB_DONE};
    if (s->coord == NULL)
        return; /* its next boot starts it again */
    if (task->kind == TASK_MERGE || task->kind == TASK_STACK) {
        e.result = sh_job_merged(&task->merged, task->inputs, task->job.n_inputs);
    } else {
        e.result = task->gated;
        if (task->status == SH_OK)
            sh_log(SH_LOG_INFO, "gated", "candidate=%llu loss=%.4f parent=%.4f",
                   (unsigned long long)task->job.candidate, task->gated.loss_candidate,
                   task->gated.loss_parent);
    }
    e.result.id = task->job.id;
    e.result.status = task->status;
    e.result.text = task->err.text;
    (void)server_step_alone(s, &e, &task->kind);
}

static void serve_worker(sh_server *s)
{
    for (server_task *task; (task = server_worker_take(&s->worker)) != NULL;) {
        sh_histogram_add(&s->counters.task_seconds[task->kind], (double)task->took_ms / 1000);
        if (task->status != SH_OK) {
            s->counters.tasks_failed[task->kind]++;
            sh_log(SH_LOG_ERROR, "task_failed", "task=%s candidate=%llu code=%s error=\"%s\"",
                   server_task_name(task->kind), (unsigned long long)task->job.candidate,
                   sh_status_name(task->status), task->err.text);
        }
        if (task->kind == TASK_BACKUP)
            server_answer_backup(s, task);
        else if (task->kind == TASK_PRUNE)
            sh_log(SH_LOG_DEBUG, "pruned", "files=%llu", (unsigned long long)task->removed);
        else
            take_in(s, task);
        server_task_destroy(&task);
    }
}

/* Files of candidates that were refused and of old releases go, when nothing is being made. */
static void prune(sh_server *s)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    server_task *task = NULL;
    sh_coord_status now = sh_coord_get_status(s->coord);
    if (!s->prune_due || now.merging || now.gating || now.evaluating ||
        server_worker_busy(&s->worker))
        return;
    s->prune_due = false;
    task = server_task_create(TASK_PRUNE);
    if (task == NULL)
        return;
    SH_GOTO(sh_txn_begin(s->store, SH_TXN_READ, &txn, &err));
    SH_GOTO(sh_folder_keep_read(txn, (uint64_t)s->settings.objects_kept, &task->keep, &err));
    SH_GOTO(server_worker_submit(&s->worker, &task, &err));
cleanup:
    sh_txn_abort(&txn);
    server_task_destroy(&task);
    if (status != SH_OK)
        sh_log(SH_LOG_WARN, "prune_failed", "error=\"%s\"", err.text);
}

static void serve_signals(sh_server *s)
{
    uint64_t n;
    if (read(s->signal_fd, &n, sizeof n) == (ssize_t)sizeof n)
        stop(s, n < SIGNAL_INT ? "SIGTERM" : "SIGINT");
}

static void serve_time(sh_server *s)
{
    sh_error err = {0};
    if (s->coord == NULL && sh_clock_mono_ms() >= s->boot_at_ms) {
        sh_status status = server_boot(s, &err);
        if (status != SH_OK) {
            s->boot_pause_ms =
                SH_MIN(SH_MAX(2 * s->boot_pause_ms, (uint64_t)1000), (uint64_t)60000);
            s->boot_at_ms = sh_clock_mono_ms() + s->boot_pause_ms;
            sh_log(SH_LOG_ERROR, "boot_failed", "code=%s error=\"%s\"", sh_status_name(status),
                   err.text);
        }
    }
    if (s->coord != NULL && s->timer_ms != 0 && sh_clock_wall_ms() >= s->timer_ms) {
        s->timer_ms = 0;
        sh_coord_event e = {.kind = SH_COORD_TIMER};
        (void)server_step_alone(s, &e, NULL);
    }
    if (s->coord != NULL)
        prune(s);
}

static int wait_ms(const sh_server *s)
{
    uint64_t wall = sh_clock_wall_ms(), mono = sh_clock_mono_ms(), ms = VIEW_MS;
    if (s->coord == NULL)
        ms = SH_MIN(ms, s->boot_at_ms > mono ? s->boot_at_ms - mono : 0);
    else if (s->timer_ms != 0)
        ms = SH_MIN(ms, s->timer_ms > wall ? s->timer_ms - wall : 0);
    return (int)ms;
}

sh_status sh_server_run(sh_server *s, sh_error *err)
{
    sh_net_server *servers[] = {sh_admin_server(s->admin), s->nodes};
    sh_net_client *clients[] = {s->parent};
    while (!s->stop) {
        struct pollfd fds[] = {{.fd = s->worker.event_fd, .events = POLLIN},
                               {.fd = s->signal_fd, .events = POLLIN}};
        sh_net_waiting waiting = {.servers = servers,
                                  .n_servers = SH_COUNT(servers),
                                  .clients = clients,
                                  .n_clients = s->parent != NULL && s->coord != NULL,
                                  .fds = fds,
                                  .n_fds = SH_COUNT(fds),
                                  .timeout_ms = server_fetch_ahead(s->fetch) > 0 ? 0 : wait_ms(s)};
        SH_TRY(sh_net_wait(&waiting, err));
        serve_signals(s);
        serve_worker(s);
        serve_time(s);
        SH_TRY(serve_nodes(s, err));
        SH_TRY(server_parent_serve(s, err));
        SH_TRY(server_serve_admin(s, err));
        server_view_refresh(s);
    }
    sh_log(SH_LOG_INFO, "stop", "reason=%s", s->stop_reason);
    return SH_OK;
}
