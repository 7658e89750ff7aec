/*
 * Messages that are read and hashed while the loop waits for the disk. For the time of a commit the
 * nodes' socket is this thread's: begin hands it over, end takes it back and waits until the thread
 * has let go, so that it is never used by two at once; a descriptor ends its wait for a message at
 * once. What was read is kept, SERVER_GROUP_STEPS messages and SERVER_FETCH_BYTES at most, and is
 * stepped before anything newer: more than one group takes, so that the thread has work for as long
 * as the disk has. A message that the thread found good is not hashed again by the core; one that
 * is bad, or that it had no time for, is the core's to judge.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "aggregator/server_internal.h"

typedef struct {
    sh_net_event event;
    sh_net_message message;
    bool checked;
} fetched;

struct server_fetch {
    sh_net_server *nodes;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int stop_fd;                                        /* readable: as `stop` */
    enum { FETCH_IDLE, FETCH_ASKED, FETCH_BUSY } state; /* under the lock */
    bool ending;                                        /* under the lock */
    atomic_bool stop;
    /* The thread's while it is busy, else the loop's: */
    fetched list[SERVER_GROUP_STEPS]; /* a ring */
    size_t n, next, released;         /* so far: numbers [released, n) have a message */
    size_t bytes;                     /* of [next, n) */
    sh_status status;
    sh_error err;
};

static fetched *at(server_fetch *f, size_t number)
{
    return &f->list[number % SERVER_GROUP_STEPS];
}

static void keep(server_fetch *f, const sh_net_event *event)
{
    sh_msg msg;
    fetched *one = at(f, f->n++);
    one->event = *event;
    sh_net_server_keep(f->nodes, &one->event, &one->message);
    one->checked =
        sh_msg_decode_checked(one->event.data, event->n, SH_CHECK_NAME, &msg, NULL) == SH_OK;
    f->bytes += event->n;
}

/* Of messages before the one numbered end. */
static void release(server_fetch *f, size_t end)
{
    for (; f->released < end; f->released++)
        sh_net_message_release(&at(f, f->released)->message);
}

static sh_status fetch(server_fetch *f)
{
    sh_net_event event;
    release(f, f->next);
    while (!atomic_load(&f->stop) && f->n - f->next < SERVER_GROUP_STEPS &&
           f->bytes < SERVER_FETCH_BYTES) {
        SH_TRY(sh_net_server_next(f->nodes, &event, &f->err));
        if (event.kind == SH_NET_MESSAGE) {
            keep(f, &event);
        } else if (event.kind == SH_NET_NONE) {
            struct pollfd stop = {.fd = f->stop_fd, .events = POLLIN};
            SH_TRY(sh_net_wait(&(sh_net_waiting){.servers = &f->nodes,
                                                 .n_servers = 1,
                                                 .fds = &stop,
                                                 .n_fds = 1,
                                                 .timeout_ms = -1},
                               &f->err));
        }
    }
    return SH_OK;
}

static void *run(void *arg)
{
    server_fetch *f = arg;
    pthread_mutex_lock(&f->lock);
    for (;;) {
        while (!f->ending && f->state != FETCH_ASKED)
            pthread_cond_wait(&f->changed, &f->lock);
        if (f->ending)
            break;
        f->state = FETCH_BUSY;
        pthread_mutex_unlock(&f->lock);
        sh_status status = fetch(f);
        pthread_mutex_lock(&f->lock);
        f->status = status;
        f->state = FETCH_IDLE;
        pthread_cond_broadcast(&f->changed);
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

sh_status server_fetch_create(sh_net_server *nodes, server_fetch **out, sh_error *err)
{
    server_fetch *f = sh_calloc(1, sizeof *f);
    sigset_t all, before;
    if (f == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: no memory");
    f->nodes = nodes;
    f->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (f->stop_fd < 0) {
        free(f);
        return sh_fail(err, SH_ERR_IO, "server: eventfd: %s", strerror(errno));
    }
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->changed, NULL);
    /* Signals are for the loop's thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int reason = pthread_create(&f->thread, NULL, run, f);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (reason != 0) {
        pthread_cond_destroy(&f->changed);
        pthread_mutex_destroy(&f->lock);
        close(f->stop_fd);
        free(f);
        return sh_fail(err, SH_ERR_IO, "server: no thread to read with: %s", strerror(reason));
    }
    *out = f;
    return SH_OK;
}

void server_fetch_destroy(server_fetch **fp)
{
    server_fetch *f = *fp;
    if (f == NULL)
        return;
    pthread_mutex_lock(&f->lock);
    f->ending = true;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
    pthread_join(f->thread, NULL);
    pthread_cond_destroy(&f->changed);
    pthread_mutex_destroy(&f->lock);
    release(f, f->n);
    close(f->stop_fd);
    free(f);
    *fp = NULL;
}

void server_fetch_begin(server_fetch *f)
{
    uint64_t asked;
    (void)!read(f->stop_fd, &asked, sizeof asked);
    pthread_mutex_lock(&f->lock);
    atomic_store(&f->stop, false);
    f->state = FETCH_ASKED;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

void server_fetch_end(server_fetch *f)
{
    const uint64_t one = 1;
    atomic_store(&f->stop, true);
    pthread_mutex_lock(&f->lock);
    if (f->state == FETCH_ASKED) /* it has not begun */
        f->state = FETCH_IDLE;
    if (f->state == FETCH_BUSY)
        (void)!write(f->stop_fd, &one, sizeof one);
    while (f->state == FETCH_BUSY)
        pthread_cond_wait(&f->changed, &f->lock);
    pthread_mutex_unlock(&f->lock);
}

bool server_fetch_has(const server_fetch *f)
{
    return f->next < f->n;
}

sh_status server_fetch_next(server_fetch *f, sh_net_event *event, bool *checked, sh_error *err)
{
    if (f->status != SH_OK) {
        sh_status status = f->status;
        *err = f->err;
        f->status = SH_OK;
        return status;
    }
    while (f->next < f->n) {
        const fetched *one = at(f, f->next);
        release(f, f->next++);
        f->bytes -= one->event.n;
        if (!sh_net_server_hears(f->nodes, &one->event))
            continue; /* dropped since */
        *event = one->event;
        *checked = one->checked;
        return SH_OK;
    }
    *checked = false;
    return sh_net_server_next(f->nodes, event, err);
}
