#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/clock.h"

sh_status daemon_inbox_init(daemon_inbox *inbox, sh_error *err)
{
    *inbox = (daemon_inbox){0};
    inbox->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (inbox->event_fd < 0)
        return sh_fail(err, SH_ERR_IO, "eventfd: %s", strerror(errno));
    pthread_mutex_init(&inbox->lock, NULL);
    pthread_cond_init(&inbox->room, NULL);
    pthread_cond_init(&inbox->answered, NULL);
    return SH_OK;
}

void daemon_inbox_release(daemon_inbox *inbox)
{
    if (inbox->event_fd <= 0)
        return;
    for (size_t i = 0; i < inbox->n_waiting; i++)
        free((void *)inbox->waiting[i].row.tokens);
    while (inbox->done) {
        daemon_work *work = inbox->done;
        inbox->done = work->next;
        free(work->chunks);
        free(work);
    }
    close(inbox->event_fd);
    pthread_mutex_destroy(&inbox->lock);
    pthread_cond_destroy(&inbox->room);
    pthread_cond_destroy(&inbox->answered);
    *inbox = (daemon_inbox){0};
}

void daemon_inbox_wake(daemon_inbox *inbox)
{
    uint64_t one = 1;
    if (write(inbox->event_fd, &one, sizeof one) < 0)
        return; /* the counter is at its end: the loop is awake anyway */
}

void daemon_inbox_put(daemon_inbox *inbox, const sh_record *record, const sh_completion_row *row)
{
    daemon_inference item = {.record = *record};
    size_t n = row && row->id ? (size_t)row->n_context + row->n : 0;
    if (n) {
        int32_t *tokens = sh_calloc(n, sizeof *tokens);
        if (tokens) { /* without memory the record is kept, and feedback by id is not possible */
            memcpy(tokens, row->tokens, n * sizeof *tokens);
            item.row = *row;
            item.row.tokens = tokens;
        }
    }
    pthread_mutex_lock(&inbox->lock);
    while (inbox->n_waiting == DAEMON_WAITING_MAX && !inbox->closed)
        pthread_cond_wait(&inbox->room, &inbox->lock);
    if (inbox->closed) {
        inbox->lost++;
        free((void *)item.row.tokens);
    } else {
        if (inbox->n_waiting == 0)
            inbox->first_ms = sh_clock_mono_ms();
        inbox->waiting[inbox->n_waiting++] = item;
        if (inbox->n_waiting == 1 || inbox->n_waiting == DAEMON_WAITING_MAX)
            daemon_inbox_wake(inbox);
    }
    pthread_mutex_unlock(&inbox->lock);
}

sh_status daemon_inbox_rate(daemon_inbox *inbox, daemon_rating *rating, sh_error *err)
{
    sh_status status;
    pthread_mutex_lock(&inbox->lock);
    if (inbox->closed) {
        status = sh_fail(err, SH_ERR_CANCELLED, "the node is stopping");
    } else if (inbox->n_ratings == DAEMON_RATINGS_MAX) {
        status = sh_fail(err, SH_ERR_LIMIT, "%u pieces of feedback wait already; try again",
                         DAEMON_RATINGS_MAX);
    } else {
        inbox->ratings[inbox->n_ratings++] = rating;
        daemon_inbox_wake(inbox);
        while (!rating->done)
            pthread_cond_wait(&inbox->answered, &inbox->lock);
        status = rating->status;
        if (status != SH_OK && err)
            *err = rating->err;
    }
    pthread_mutex_unlock(&inbox->lock);
    return status;
}

void daemon_inbox_put_done(daemon_inbox *inbox, daemon_work *work)
{
    pthread_mutex_lock(&inbox->lock);
    daemon_work **at = &inbox->done;
    while (*at)
        at = &(*at)->next;
    work->next = NULL;
    *at = work;
    daemon_inbox_wake(inbox);
    pthread_mutex_unlock(&inbox->lock);
}

void daemon_inbox_put_api_closed(daemon_inbox *inbox)
{
    pthread_mutex_lock(&inbox->lock);
    inbox->api_closed = true;
    daemon_inbox_wake(inbox);
    pthread_mutex_unlock(&inbox->lock);
}

void daemon_inbox_close(daemon_inbox *inbox)
{
    pthread_mutex_lock(&inbox->lock);
    inbox->closed = true;
    for (size_t i = 0; i < inbox->n_ratings; i++) {
        daemon_rating *r = inbox->ratings[i];
        r->status = sh_fail(&r->err, SH_ERR_CANCELLED, "the node is stopping");
        r->done = true;
    }
    inbox->n_ratings = 0;
    pthread_cond_broadcast(&inbox->room);
    pthread_cond_broadcast(&inbox->answered);
    pthread_mutex_unlock(&inbox->lock);
}

size_t daemon_inbox_take_waiting(daemon_inbox *inbox, daemon_inference *out, size_t max)
{
    pthread_mutex_lock(&inbox->lock);
    size_t n = SH_MIN(inbox->n_waiting, max);
    memcpy(out, inbox->waiting, n * sizeof *out);
    inbox->n_waiting -= n;
    memmove(inbox->waiting, inbox->waiting + n, inbox->n_waiting * sizeof *out);
    pthread_cond_broadcast(&inbox->room);
    pthread_mutex_unlock(&inbox->lock);
    return n;
}

size_t daemon_inbox_take_ratings(daemon_inbox *inbox, daemon_rating **out, size_t max)
{
    pthread_mutex_lock(&inbox->lock);
    size_t n = SH_MIN(inbox->n_ratings, max);
    memcpy(out, inbox->ratings, n * sizeof(*out));
    inbox->n_ratings -= n;
    memmove(inbox->ratings, inbox->ratings + n, inbox->n_ratings * sizeof(*out));
    pthread_mutex_unlock(&inbox->lock);
    return n;
}

daemon_work *daemon_inbox_take_done(daemon_inbox *inbox)
{
    pthread_mutex_lock(&inbox->lock);
    daemon_work *work = inbox->done;
    if (work)
        inbox->done = work->next;
    pthread_mutex_unlock(&inbox->lock);
    return work;
}

void daemon_inbox_answer(daemon_inbox *inbox, daemon_rating *rating, sh_status status,
                         const sh_error *err)
{
    pthread_mutex_lock(&inbox->lock);
    rating->status = status;
    if (status != SH_OK)
        rating->err = *err;
    rating->done = true;
    pthread_cond_broadcast(&inbox->answered);
    pthread_mutex_unlock(&inbox->lock);
}

void daemon_inbox_clear_event(daemon_inbox *inbox)
{
    uint64_t n;
    if (read(inbox->event_fd, &n, sizeof n) < 0)
        return; /* nothing was posted */
}

uint64_t daemon_inbox_due(daemon_inbox *inbox, uint64_t commit_ms)
{
    uint64_t due = UINT64_MAX;
    pthread_mutex_lock(&inbox->lock);
    if (inbox->n_ratings || inbox->n_waiting == DAEMON_WAITING_MAX)
        due = 0;
    else if (inbox->n_waiting)
        due = inbox->first_ms + commit_ms;
    pthread_mutex_unlock(&inbox->lock);
    return due;
}
