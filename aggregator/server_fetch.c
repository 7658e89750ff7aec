/*
 * Messages that are read and hashed while the loop waits for the disk. For the time of a commit the
 * nodes' socket is this thread's: begin hands it over, end takes it back and waits until the thread
 * has let go, so that it is never used by two at once; a descriptor ends its wait for a message at
 * once, and hashing needs no socket, so that nobody waits for that. What was read is kept,
 * SERVER_GROUP_STEPS messages and SERVER_FETCH_BYTES at most, and is stepped before anything newer:
 * more than one group takes, so that the thread has work for as long as the disk has. A message
 * that the thread found good is not hashed again by the core; one that is bad is the core's to
 * judge.
 *
 * Small ITEMs go first: an update's node waits for the WANT, and that is not to stand behind
 * megabytes of others' chunks. Not so check-ins: a node that floods would take the rate that all
 * share from those that do not. What one node sends keeps its order, and since the ring has no more
 * places, fewer than SERVER_GROUP_STEPS messages overtake another.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "aggregator/server_internal.h"

#define SMALL_BYTES 16384u /* of an ITEM that goes first, at most */

typedef struct {
    sh_net_event event;
    sh_net_message message;
    bool checked, taken;
    bool first; /* may go before others */
} fetched;

struct server_fetch {
    sh_net_server *nodes;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int stop_fd; /* readable: the loop wants the socket back */
    /* Under the lock: */
    bool given;   /* the socket is the thread's */
    bool reading; /* and it uses it */
    bool ending;
    size_t hashed; /* messages so far; at most one less than n */
    /* The thread's while it reads, else the loop's: */
    fetched list[SERVER_GROUP_STEPS]; /* a ring; numbers [next, n) are in it */
    size_t n, next;
    size_t ahead, bytes; /* of those that are not taken */
    sh_status status;
    sh_error err;
    /* The loop's: */
    size_t looked; /* no number below it may go first */
    fetched *last; /* taken, and its message not yet released */
};

static fetched *at(server_fetch *f, size_t number)
{
    return &f->list[number % SERVER_GROUP_STEPS];
}

/* ---- the thread ---- */

static bool has_room(const server_fetch *f)
{
    return f->n - f->next < SERVER_GROUP_STEPS && f->bytes < SERVER_FETCH_BYTES;
}

/* One message, which *out then is, or a wait for one. */
static sh_status read_one(server_fetch *f, fetched **out)
{
    sh_net_event event;
    *out = NULL;
    SH_TRY(sh_net_server_next(f->nodes, &event, &f->err));
    if (event.kind == SH_NET_MESSAGE) {
        fetched *one = at(f, f->n++);
        *one = (fetched){.event = event};
        sh_net_server_keep(f->nodes, &one->event, &one->message);
        f->ahead++;
        f->bytes += event.n;
        *out = one;
    } else if (event.kind == SH_NET_NONE) {
        struct pollfd stop = {.fd = f->stop_fd, .events = POLLIN};
        SH_TRY(sh_net_wait(
            &(sh_net_waiting){
                .servers = &f->nodes, .n_servers = 1, .fds = &stop, .n_fds = 1, .timeout_ms = -1},
            &f->err));
    }
    return SH_OK;
}

static void check(fetched *one)
{
    sh_msg msg;
    one->checked =
        sh_msg_decode_checked(one->event.data, one->event.n, SH_CHECK_NAME, &msg, NULL) == SH_OK;
    one->first = one->checked && msg.type == SH_MSG_ITEM && one->event.n <= SMALL_BYTES;
}

static void *run(void *arg)
{
    server_fetch *f = arg;
    pthread_mutex_lock(&f->lock);
    for (;;) {
        fetched *one = NULL;
        while (!f->ending && !(f->given && f->status == SH_OK && has_room(f)))
            pthread_cond_wait(&f->changed, &f->lock);
        if (f->ending)
            break;
        f->reading = true;
        pthread_mutex_unlock(&f->lock);
        sh_status status = read_one(f, &one);
        pthread_mutex_lock(&f->lock);
        f->status = status;
        f->reading = false;
        pthread_cond_broadcast(&f->changed);
        if (one == NULL)
            continue;
        pthread_mutex_unlock(&f->lock);
        check(one);
        pthread_mutex_lock(&f->lock);
        f->hashed++;
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

/* What was taken last is stepped. */
static void release(server_fetch *f)
{
    if (f->last != NULL)
        sh_net_message_release(&f->last->message);
    f->last = NULL;
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
    release(f);
    for (; f->next < f->n; f->next++)
        if (!at(f, f->next)->taken)
            sh_net_message_release(&at(f, f->next)->message);
    close(f->stop_fd);
    free(f);
    *fp = NULL;
}

void server_fetch_begin(server_fetch *f)
{
    uint64_t asked;
    (void)!read(f->stop_fd, &asked, sizeof asked);
    release(f);
    pthread_mutex_lock(&f->lock);
    f->given = true;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

void server_fetch_end(server_fetch *f)
{
    const uint64_t one = 1;
    pthread_mutex_lock(&f->lock);
    f->given = false;
    if (f->reading)
        (void)!write(f->stop_fd, &one, sizeof one);
    while (f->reading)
        pthread_cond_wait(&f->changed, &f->lock);
    pthread_mutex_unlock(&f->lock);
}

size_t server_fetch_ahead(const server_fetch *f)
{
    return f->ahead;
}

static bool is_first_of_its_node(server_fetch *f, size_t number)
{
    for (size_t i = f->next; i < number; i++)
        if (!at(f, i)->taken && sh_hash_equal(&at(f, i)->event.key, &at(f, number)->event.key))
            return false;
    return true;
}

/* Which one of [next, end) is next: an ITEM that may go first, or the oldest. */
static fetched *take(server_fetch *f, size_t end)
{
    size_t number = f->next;
    for (f->looked = SH_MAX(f->looked, f->next); f->looked < end; f->looked++)
        if (at(f, f->looked)->first && is_first_of_its_node(f, f->looked)) {
            number = f->looked++;
            break;
        }
    fetched *one = at(f, number);
    one->taken = true;
    f->ahead--;
    f->bytes -= one->event.n;
    while (f->next < end && at(f, f->next)->taken)
        f->next++;
    return one;
}

/* Numbers below it are hashed, and there is one unless the ring is empty. */
static size_t wait_hashed(server_fetch *f)
{
    pthread_mutex_lock(&f->lock);
    while (f->hashed == f->next && f->next < f->n)
        pthread_cond_wait(&f->changed, &f->lock);
    size_t hashed = f->hashed;
    pthread_mutex_unlock(&f->lock);
    return hashed;
}

sh_status server_fetch_next(server_fetch *f, sh_net_event *event, bool *checked, sh_error *err)
{
    release(f);
    if (f->status != SH_OK) {
        sh_status status = f->status;
        *err = f->err;
        f->status = SH_OK;
        return status;
    }
    while (f->next < f->n) {
        f->last = take(f, wait_hashed(f));
        if (sh_net_server_hears(f->nodes, &f->last->event)) {
            *event = f->last->event;
            *checked = f->last->checked;
            return SH_OK;
        }
        release(f); /* dropped since */
    }
    *checked = false;
    return sh_net_server_next(f->nodes, event, err);
}
