/*
 * Messages that are read and hashed while the loop waits for the disk. For the time of a commit the
 * nodes' socket is this thread's: begin hands it over, end takes it back and waits until the thread
 * has let go, so that it is never used by two at once. What was read is copied, at most one group's
 * worth, and is stepped before anything newer. A message that the thread found good is not hashed
 * again by the core; one that is bad, or that it had no time for, is the core's to judge.
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"

#define IDLE_MS 1 /* between two looks at an empty socket */

typedef struct {
    sh_net_event event; /* without data */
    size_t at;
    bool checked;
} fetched;

struct server_fetch {
    sh_net_server *nodes;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum { FETCH_IDLE, FETCH_ASKED, FETCH_BUSY } state; /* under the lock */
    bool ending;                                        /* under the lock */
    atomic_bool stop;
    /* The thread's while it is busy, else the loop's: */
    fetched list[SERVER_GROUP_STEPS];
    size_t n, next;
    sh_buf bytes;
    sh_status status;
    sh_error err;
};

static sh_status keep(server_fetch *f, const sh_net_event *event)
{
    sh_msg msg;
    fetched *one = &f->list[f->n];
    *one = (fetched){.event = *event, .at = f->bytes.len};
    one->event.data = NULL;
    if (sh_buf_append(&f->bytes, event->data, event->n) != SH_OK)
        return sh_fail(&f->err, SH_ERR_NO_MEMORY, "server: no memory for messages that wait");
    one->checked = sh_msg_decode_checked(f->bytes.data + one->at, event->n, SH_CHECK_NAME, &msg,
                                         NULL) == SH_OK;
    f->n++;
    return SH_OK;
}

static sh_status fetch(server_fetch *f)
{
    sh_net_event event;
    f->n = f->next = 0;
    sh_buf_clear(&f->bytes);
    while (!atomic_load(&f->stop) && f->n < SERVER_GROUP_STEPS &&
           f->bytes.len < SERVER_GROUP_IN_BYTES) {
        SH_TRY(sh_net_server_next(f->nodes, &event, &f->err));
        if (event.kind == SH_NET_MESSAGE)
            SH_TRY(keep(f, &event));
        else if (event.kind == SH_NET_NONE)
            SH_TRY(sh_net_wait(
                &(sh_net_waiting){.servers = &f->nodes, .n_servers = 1, .timeout_ms = IDLE_MS},
                &f->err));
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
    sh_buf_init(&f->bytes, SERVER_GROUP_IN_BYTES + SERVER_PEER_IN_BYTES);
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
    sh_buf_release(&f->bytes);
    free(f);
    *fp = NULL;
}

void server_fetch_begin(server_fetch *f)
{
    if (f->next < f->n) /* what was read before is not stepped yet */
        return;
    pthread_mutex_lock(&f->lock);
    atomic_store(&f->stop, false);
    f->state = FETCH_ASKED;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

void server_fetch_end(server_fetch *f)
{
    atomic_store(&f->stop, true);
    pthread_mutex_lock(&f->lock);
    if (f->state == FETCH_ASKED) /* it has not begun */
        f->state = FETCH_IDLE;
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
        const fetched *one = &f->list[f->next++];
        if (!sh_net_server_hears(f->nodes, &one->event))
            continue; /* dropped since */
        *event = one->event;
        event->data = f->bytes.data + one->at;
        *checked = one->checked;
        return SH_OK;
    }
    *checked = false;
    return sh_net_server_next(f->nodes, event, err);
}
