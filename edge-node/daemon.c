#include "edge-node/daemon.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "edge-node/setup.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define TOKEN_FILE_MAX 4096u
#define KEY_FILE_MAX   1024u
#define ERASE_LOOK_MS  50u    /* between two looks whether an erasure can go on */
#define WAIT_MS_MAX    60000u /* the loop wakes at least this often */

enum { FD_INBOX, FD_SIGNAL, FD_CHILD_OUT, FD_CHILD_END, FDS };

void daemon_failpoint(sh_daemon *d, const char *name)
{
    if (!sh_failpoint_hit(&d->failpoints, name))
        return;
    sh_log(SH_LOG_WARN, "failpoint", "name=%s", name);
    (void)raise(SIGKILL);
}

/* ---- start ---- */

static sh_status read_hex_file(const char *path, sh_hash *out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, KEY_FILE_MAX, &text, &n, err));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r' || text[n - 1] == ' '))
        text[--n] = 0;
    sh_status status = sh_hash_parse((const char *)text, out, err);
    free(text);
    return status == SH_OK ? SH_OK : sh_fail_in(err, "%s", path);
}

static sh_status read_token(sh_daemon *d, sh_error *err)
{
    const char *path = d->settings->token_file;
    struct stat st;
    uint8_t *text = NULL;
    size_t n = 0;
    if (!path[0])
        return SH_OK;
    if (stat(path, &st) == 0 && st.st_mode & (S_IRWXG | S_IRWXO))
        return sh_fail(err, SH_ERR_AUTH, "%s: others may read it; chmod 600 %s", path, path);
    SH_TRY(sh_file_read(path, TOKEN_FILE_MAX, &text, &n, err));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r' || text[n - 1] == ' '))
        n--;
    sh_status status = SH_OK;
    if (n == 0 || n >= sizeof d->token || memchr(text, 0, n))
        status = sh_fail(err, SH_ERR_INVALID, "%s: a token of 1 to %zu characters is wanted", path,
                         sizeof d->token - 1);
    else
        memcpy(d->token, text, n);
    free(text);
    return status;
}

static sh_status read_files(sh_daemon *d, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_hash release;
    sh_manifest manifest;
    SH_TRY(sh_net_keys_load(SH_NODE_FILE_KEYS, &d->keys, err));
    SH_TRY(read_hex_file(SH_NODE_FILE_RELEASE, &release, err));
    memcpy(d->options.release_key.b, release.b, sizeof release.b);
    SH_TRY(sh_file_read(SH_NODE_FILE_MANIFEST, SH_WIRE_MANIFEST_MAX, &bytes, &n, err));
    sh_buf_init(&d->genesis, SH_WIRE_MANIFEST_MAX);
    sh_status status = sh_buf_append(&d->genesis, bytes, n);
    free(bytes);
    if (status != SH_OK)
        return sh_fail(err, status, "%s: no memory", SH_NODE_FILE_MANIFEST);
    if (sh_manifest_verify(d->genesis.data, d->genesis.len, &d->options.release_key, &manifest,
                           err) != SH_OK)
        return sh_fail_in(err, SH_NODE_FILE_MANIFEST);
    d->genesis_sha256 = manifest.model.sha256;
    return read_token(d, err);
}

static uint64_t steady_ms(void *arg)
{
    return daemon_now(arg);
}

/* What every release of a fleet shares is made from the genesis model, which is then closed. */
static sh_status make_engine(sh_daemon *d, sh_error *err)
{
    const sh_node_settings_values *v = &d->settings->v;
    sh_model *genesis = NULL;
    sh_status status = sh_model_open(SH_NODE_FILE_GENESIS, &genesis, err);
    sh_hash hash = {0};
    if (status == SH_OK)
        hash = sh_model_hash(genesis);
    if (status == SH_OK && !sh_hash_equal(&hash, &d->genesis_sha256))
        status = sh_fail(err, SH_ERR_CORRUPT, "not the file that %s names", SH_NODE_FILE_MANIFEST);
    if (status != SH_OK) {
        sh_model_close(&genesis);
        return sh_fail_in(err, "%s: put it back from the aggregator's bundle",
                          SH_NODE_FILE_GENESIS);
    }
    status = sh_frozen_create(genesis, &d->frozen, err);
    sh_model_close(&genesis);
    SH_TRY(status);
    sh_engine_options o = {.frozen = d->frozen,
                           .slots = (uint32_t)v->engine_slots,
                           .context = (uint32_t)v->engine_context,
                           .threads = sh_settings_threads(v),
                           .kv = strcmp(v->engine_kv, "f32") == 0 ? SH_KV_F32 : SH_KV_F16,
                           .share_prefix = v->engine_share_prefix,
                           .now_ms = steady_ms,
                           .finished = daemon_finished,
                           .arg = d};
    return sh_engine_create(&o, &d->engine, err);
}

sh_status daemon_open_admin(sh_daemon *d, sh_error *err)
{
    sh_net_keys admin = {0};
    SH_TRY(sh_net_keys_load(SH_NODE_FILE_ADMIN_KEYS, &admin, err));
    sh_hash admin_key = admin.public_key;
    sh_net_keys_forget(&admin);
    sh_admin_destroy(&d->admin);
    return sh_admin_create(d->net, SH_ADMIN_ENDPOINT, &d->keys, &admin_key, &d->admin, err);
}

sh_status daemon_connect(sh_daemon *d, const sh_net_keys *keys, sh_error *err)
{
    sh_net_client_options o = {
        .endpoint = d->settings->v.aggregator, .keys = keys, .message_max = SH_WIRE_MESSAGE_MAX};
    SH_TRY(read_hex_file(SH_NODE_FILE_AGGREGATOR, &o.server_key, err));
    return sh_net_client_create(d->net, &o, &d->client, err);
}

static sh_status make_net(sh_daemon *d, sh_error *err)
{
    const sh_node_settings_values *v = &d->settings->v;
    SH_TRY(sh_net_create(&d->net, err));
    SH_TRY(daemon_open_admin(d, err));
    if (!v->sync || !v->aggregator || !v->aggregator[0])
        return SH_OK;
    SH_TRY(daemon_rotation_load(d, err));
    d->rotate.since_ms = sh_clock_mono_ms();
    return daemon_connect(d, &d->keys, err);
}

/* A handler and not a signalfd: OpenBLAS makes threads before main, which block no signal. */
static int signal_event = -1;
static volatile sig_atomic_t signal_seen;

static void on_signal(int number)
{
    uint64_t one = 1;
    int saved = errno;
    signal_seen = number;
    if (write(signal_event, &one, sizeof one) < 0)
        errno = saved; /* the loop is awake anyway */
    errno = saved;
}

static sh_status catch_signals(sh_daemon *d, sh_error *err)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    d->signal_fd = signal_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (d->signal_fd < 0)
        return sh_fail(err, SH_ERR_IO, "eventfd: %s", strerror(errno));
    (void)signal(SIGPIPE, SIG_IGN);
    if (sigaction(SIGTERM, &action, NULL) != 0 || sigaction(SIGINT, &action, NULL) != 0)
        return sh_fail(err, SH_ERR_IO, "sigaction: %s", strerror(errno));
    return SH_OK;
}

static sh_status arm_failpoints(sh_daemon *d, sh_error *err)
{
    const char *list = getenv("SHOAL_FAILPOINTS");
    if (!list || !list[0])
        return SH_OK;
    if (sh_failpoint_arm_list(&d->failpoints, list, err) != SH_OK)
        return sh_fail_in(err, "SHOAL_FAILPOINTS");
    return SH_OK;
}

/* Of a node that was set up with one and was not let in yet. */
static sh_status read_enrol_token(sh_daemon *d, sh_error *err)
{
    if (!sh_file_exists(SH_NODE_FILE_TOKEN))
        return SH_OK;
    SH_TRY(sh_setup_read_token(SH_NODE_FILE_TOKEN, &d->enrol_token, err));
    d->options.token = (sh_bytes){d->enrol_token.b, sizeof d->enrol_token.b};
    return SH_OK;
}

static sh_status make_folders(sh_error *err)
{
    static const char *const names[] = {SH_NODE_DIR_STORE, SH_NODE_DIR_MODELS, SH_NODE_DIR_WORK};
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        SH_TRY(sh_dir_make(names[i], err));
        if (chmod(names[i], 0700) != 0)
            return sh_fail(err, SH_ERR_IO, "%s: %s", names[i], strerror(errno));
    }
    return SH_OK;
}

static sh_status start(sh_daemon *d, sh_error *err)
{
    uint64_t seed;
    sh_log_level level;
    SH_TRY(sh_log_parse_level(d->settings->v.log_level, &level, err));
    sh_log_set_level(level);
    SH_TRY(catch_signals(d, err));
    SH_TRY(arm_failpoints(d, err));
    if (chdir(d->settings->dir) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", d->settings->dir, strerror(errno));
    if (!sh_file_exists(SH_NODE_FILE_KEYS))
        return sh_fail(err, SH_ERR_USAGE,
                       "%s: no node was set up here (no %s); shoal-node init does that",
                       d->settings->dir, SH_NODE_FILE_KEYS);
    sh_random_bytes(&seed, sizeof seed);
    sh_rng_init(&d->rng, seed, 0, 0x6e6f6465u);
    sh_settings_node_options(&d->settings->v, &d->options);
    SH_TRY(read_files(d, err));
    SH_TRY(read_enrol_token(d, err));
    SH_TRY(make_folders(err));
    sh_status opened = daemon_store_open(d, err); /* from here on the folder is ours alone */
    if (opened != SH_OK && opened != SH_ERR_FULL) /* which the loop waits for */
        return opened;
    daemon_empty_work();
    (void)unlink(SH_NODE_DIR_MODELS "/candidate.gguf");
    SH_TRY(daemon_inbox_init(&d->inbox, err));
    SH_TRY(make_engine(d, err));
    SH_TRY(make_net(d, err));
    SH_TRY(daemon_worker_start(d, err));
    d->remake = d->resume_erasure = true;
    daemon_settle(d);
    if (d->fatal != SH_OK) {
        *err = d->fatal_err;
        return d->fatal;
    }
    if (!d->node) /* no room: it serves, and the loop tries again */
        SH_TRY(daemon_serve_without_core(d, err));
    /* Ids that a kill took out of the loss window were given to clients already: ids of this life
     * begin above them, at the clock, so that no old id ever names another completion. */
    sh_node_status status = d->node ? sh_node_get_status(d->node) : (sh_node_status){0};
    uint64_t clock_ms = SH_MAX(daemon_now(d), status.wall_ms);
    sh_engine_set_last_id(d->engine,
                          SH_MAX(status.last_completion, clock_ms << DAEMON_ID_CLOCK_SHIFT));
    SH_TRY(daemon_signals_start(d, err));
    daemon_refresh_stats(d, true);
    return daemon_api_create(d, err);
}

/* ---- stop ---- */

static void *close_api(void *arg)
{
    sh_daemon *d = arg;
    sh_api_destroy(&d->api);
    daemon_inbox_put_api_closed(&d->inbox);
    return NULL;
}

void daemon_stop(sh_daemon *d, const char *reason)
{
    if (d->stopping)
        return;
    d->stopping = true;
    d->stop_reason = reason;
    d->stop_due_ms = sh_clock_mono_ms() + (uint64_t)d->settings->v.stop_wait_ms;
    sh_engine_stop(d->engine);
    daemon_cancel_training(d);
    /* Requests that run end on their threads, and may post: the loop goes on meanwhile. */
    d->closer_started = pthread_create(&d->closer, NULL, close_api, d) == 0;
    if (!d->closer_started)
        d->stop_due_ms = 0;
}

static bool has_stopped(sh_daemon *d)
{
    pthread_mutex_lock(&d->inbox.lock);
    bool closed = d->inbox.api_closed;
    pthread_mutex_unlock(&d->inbox.lock);
    return closed && daemon_worker_idle(d);
}

/* A request or a job that takes too long: what is committed is safe, so the process just ends. */
static void stop_hard(sh_daemon *d)
{
    sh_error err = {0};
    daemon_flush(d);
    if (d->store && sh_store_sync(d->store, &err) != SH_OK)
        sh_log(SH_LOG_ERROR, "store", "error=\"%s\"", err.text);
    sh_log(SH_LOG_WARN, "stop", "reason=%s forced=1", d->stop_reason);
    _exit(0);
}

static void release(sh_daemon *d)
{
    if (d->closer_started)
        pthread_join(d->closer, NULL);
    if (d->engine)
        sh_engine_stop(d->engine);
    if (d->inbox.event_fd >= 0)
        daemon_inbox_close(&d->inbox);
    sh_api_destroy(&d->api);
    daemon_worker_stop(d);
    daemon_signals_stop(d);
    sh_child_release(&d->child);
    if (d->store)
        daemon_empty_work();
    sh_net_client_destroy(&d->client, 0);
    sh_admin_destroy(&d->admin);
    sh_net_destroy(&d->net);
    sh_engine_destroy(&d->engine);
    sh_frozen_destroy(&d->frozen);
    sh_node_destroy(&d->node);
    sh_node_actions_clear(&d->actions);
    sh_store_close(&d->store);
    sh_buf_release(&d->genesis);
    sh_buf_release(&d->kept_bytes);
    sh_net_keys_forget(&d->keys);
    memset(d->token, 0, sizeof d->token);
    free(d->kept);
    daemon_inbox_release(&d->inbox);
    /* The descriptor of signals stays: one may still come. */
    pthread_mutex_destroy(&d->stats_lock);
}

/* ---- the loop ---- */

static void take_signal(sh_daemon *d)
{
    uint64_t n;
    if (read(d->signal_fd, &n, sizeof n) == sizeof n)
        daemon_stop(d, signal_seen == SIGTERM ? "SIGTERM" : "SIGINT");
}

static int until(uint64_t now, uint64_t due)
{
    return due <= now ? 0 : (int)SH_MIN(due - now, WAIT_MS_MAX);
}

static int wait_ms(sh_daemon *d)
{
    uint64_t now = sh_clock_mono_ms(), commit_ms = (uint64_t)d->settings->v.commit_ms;
    uint64_t due = now + WAIT_MS_MAX;
    due = SH_MIN(due, daemon_inbox_due(&d->inbox, commit_ms));
    if (d->timer_at_ms && d->node) {
        uint64_t steady = daemon_now(d); /* it counts sleep, the other does not */
        uint64_t wait = d->timer_at_ms > steady ? d->timer_at_ms - steady : 0;
        due = SH_MIN(due, SH_MAX(now + SH_MIN(wait, (uint64_t)WAIT_MS_MAX), d->full.until_ms));
    }
    if (d->remake)
        due = SH_MIN(due, d->reserve_used_up ? d->full.until_ms : now);
    if (d->erase.wanted || (d->erase.running && d->erase.done))
        due = SH_MIN(due, now + ERASE_LOOK_MS);
    if (d->stopping)
        due = SH_MIN(due, d->stop_due_ms);
    return until(now, due);
}

static sh_status wait_for_something(sh_daemon *d, sh_error *err)
{
    struct pollfd fds[FDS] = {
        [FD_INBOX] = {.fd = d->inbox.event_fd, .events = POLLIN},
        [FD_SIGNAL] = {.fd = d->signal_fd, .events = POLLIN},
        [FD_CHILD_OUT] = {.fd = -1, .events = POLLIN},
        [FD_CHILD_END] = {.fd = -1, .events = POLLIN},
    };
    if (d->child.pid) {
        fds[FD_CHILD_OUT].fd = d->child.out;
        fds[FD_CHILD_END].fd = d->child.pid_fd;
    }
    sh_net_server *servers[] = {sh_admin_server(d->admin)};
    sh_net_waiting w = {.servers = servers,
                        .n_servers = 1,
                        .clients = &d->client,
                        .n_clients = d->client ? 1 : 0,
                        .fds = fds,
                        .n_fds = FDS,
                        .timeout_ms = wait_ms(d)};
    SH_TRY(sh_net_wait(&w, err));
    if (fds[FD_INBOX].revents)
        daemon_inbox_clear_event(&d->inbox);
    if (fds[FD_SIGNAL].revents)
        take_signal(d);
    if (fds[FD_CHILD_OUT].revents || fds[FD_CHILD_END].revents)
        daemon_watch_training(d);
    return SH_OK;
}

static sh_status turn(sh_daemon *d, sh_error *err)
{
    uint64_t commit_ms = (uint64_t)d->settings->v.commit_ms;
    SH_TRY(wait_for_something(d, err));
    daemon_settle(d);
    daemon_take_commands(d);
    if (d->client)
        daemon_take_messages(d);
    if (d->stopping || daemon_inbox_due(&d->inbox, commit_ms) <= sh_clock_mono_ms())
        daemon_flush(d);
    daemon_end_jobs(d);
    daemon_run_timer(d);
    daemon_take_signals(d);
    daemon_advance_rotation(d);
    daemon_advance_erasure(d); /* last: any of the others may have ended one */
    daemon_refresh_stats(d, false);
    if (d->fatal != SH_OK)
        *err = d->fatal_err;
    return d->fatal;
}

static sh_status loop(sh_daemon *d, sh_error *err)
{
    while (!d->stopping || !has_stopped(d)) {
        if (d->stopping && sh_clock_mono_ms() >= d->stop_due_ms)
            stop_hard(d);
        SH_TRY(turn(d, err));
    }
    daemon_flush(d);
    return SH_OK;
}

sh_status sh_daemon_run(const sh_settings *settings, sh_error *err)
{
    static sh_daemon daemon; /* large; one a process */
    sh_daemon *d = &daemon;
    *d = (sh_daemon){.settings = settings, .signal_fd = -1};
    d->inbox.event_fd = -1;
    d->started_ms = sh_clock_mono_ms();
    d->started_wall_ms = d->base_ms = sh_clock_wall_ms();
    d->boot_ms = sh_clock_boot_ms();
    pthread_mutex_init(&d->stats_lock, NULL);
    sh_status status = start(d, err);
    if (status == SH_OK) {
        sh_log(SH_LOG_INFO, "ready", "http=%s%s%s:%u version=%llu",
               strchr(settings->v.http_address, ':') ? "[" : "", settings->v.http_address,
               strchr(settings->v.http_address, ':') ? "]" : "", sh_api_port(d->api),
               (unsigned long long)d->active_version);
        status = loop(d, err);
        sh_log(status == SH_OK ? SH_LOG_INFO : SH_LOG_ERROR, "stop", "reason=%s",
               status == SH_OK ? d->stop_reason : "error");
    }
    release(d);
    return status;
}
