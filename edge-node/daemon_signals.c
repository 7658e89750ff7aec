/*
 * What the device is doing: a thread asks the probes every probe.interval-seconds, because a
 * command or a file may hang, and the loop hands what they said to the core. Without an answer yet
 * nothing is known, which the policies have a rule for.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/log.h"

static sh_signal signal_of(sh_probe_value v)
{
    return !v.known ? SH_SIGNAL_UNKNOWN : v.value ? SH_SIGNAL_YES : SH_SIGNAL_NO;
}

static void ask(const daemon_signals *g, sh_node_signals *out)
{
    sh_probe_limits limits = {.timeout_ms = g->timeout_ms, .stop_fd = g->stop_fd};
    sh_probe_value v[SH_PROBES];
    struct statvfs disk;
    for (int i = 0; i < SH_PROBES; i++)
        v[i] = sh_probe_read(&g->probes[i], &limits);
    *out = (sh_node_signals){
        .network = signal_of(v[SH_PROBE_NETWORK]),
        .metered = signal_of(v[SH_PROBE_METERED]),
        .power = signal_of(v[SH_PROBE_POWER]),
        .idle_ms = v[SH_PROBE_IDLE].known ? (uint64_t)v[SH_PROBE_IDLE].value : SH_IDLE_UNKNOWN,
        .temperature_mc = v[SH_PROBE_TEMPERATURE].known ? (int32_t)v[SH_PROBE_TEMPERATURE].value
                                                        : SH_TEMPERATURE_UNKNOWN,
    };
    if (statvfs(".", &disk) == 0)
        out->disk_free = (uint64_t)disk.f_bavail * disk.f_frsize;
}

static void *signals_main(void *arg)
{
    sh_daemon *d = arg;
    daemon_signals *g = &d->signals;
    struct pollfd stop = {.fd = g->stop_fd, .events = POLLIN};
    do {
        sh_node_signals now;
        ask(g, &now);
        pthread_mutex_lock(&g->lock);
        g->latest = now;
        g->fresh = g->asked = true;
        pthread_mutex_unlock(&g->lock);
        daemon_inbox_wake(&d->inbox);
        while (poll(&stop, 1, (int)g->interval_ms) < 0 && errno == EINTR)
            ;
    } while (!stop.revents);
    return NULL;
}

sh_status daemon_signals_start(sh_daemon *d, sh_error *err)
{
    daemon_signals *g = &d->signals;
    const sh_node_settings_values *v = &d->settings->v;
    for (int i = 0; i < SH_PROBES; i++)
        SH_TRY(sh_probe_parse((sh_probe_signal)i, v->probes[i], &g->probes[i], err));
    g->interval_ms = (uint32_t)v->probe_interval_s * 1000;
    g->timeout_ms = (uint32_t)v->probe_timeout_ms;
    g->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (g->stop_fd < 0)
        return sh_fail(err, SH_ERR_IO, "eventfd: %s", strerror(errno));
    pthread_mutex_init(&g->lock, NULL);
    int rc = pthread_create(&g->thread, NULL, signals_main, d);
    g->started = rc == 0;
    if (g->started)
        return SH_OK;
    pthread_mutex_destroy(&g->lock);
    close(g->stop_fd);
    return sh_fail(err, SH_ERR_NO_MEMORY, "a thread for probes: %s", strerror(rc));
}

void daemon_signals_stop(sh_daemon *d)
{
    daemon_signals *g = &d->signals;
    uint64_t one = 1;
    if (!g->started)
        return;
    if (write(g->stop_fd, &one, sizeof one) < 0)
        sh_log(SH_LOG_WARN, "probes", "error=\"%s\"", strerror(errno));
    pthread_join(g->thread, NULL);
    pthread_mutex_destroy(&g->lock);
    close(g->stop_fd);
    g->started = false;
}

void daemon_signals_repeat(sh_daemon *d)
{
    daemon_signals *g = &d->signals;
    if (!g->started)
        return;
    pthread_mutex_lock(&g->lock);
    g->fresh = g->asked;
    pthread_mutex_unlock(&g->lock);
}

void daemon_take_signals(sh_daemon *d)
{
    daemon_signals *g = &d->signals;
    sh_node_event e = {.kind = SH_NODE_SIGNALS};
    if (!g->started || !d->node || d->erase.running)
        return;
    pthread_mutex_lock(&g->lock);
    bool fresh = g->fresh;
    e.signals = g->latest;
    g->fresh = false;
    pthread_mutex_unlock(&g->lock);
    if (!fresh)
        return;
    e.signals.store_bytes = d->stats.store_bytes; /* written on this thread only */
    e.signals.store_bytes_max = (uint64_t)d->settings->v.store_bytes_max;
    e.signals.store_full = d->full.is;
    e.signals.stores_lost = d->stores_lost;
    /* Counting writes: not while there is no room, and an erasure may be making some. */
    e.signals.refused_full = d->full.is ? 0 : d->refused_full;
    if (daemon_step(d, &e, NULL) == SH_OK)
        d->refused_full -= e.signals.refused_full;
}
