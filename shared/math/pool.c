/*
 * One list holds every job in submission order: those done, those that run, then those that wait,
 * from `next` on. A worker takes `next`. A job is done exactly once, by the worker that took it;
 * sh_pool_wait or sh_pool_destroy frees it. Destroy lets the workers empty the list first.
 *
 * sh_pool_for: helper jobs take indices from one counter, as the caller does. When the caller finds
 * the counter at its end it withdraws the helpers that no worker has taken, so that a job may
 * itself call sh_pool_for while every worker is busy.
 */
#include "shared/math/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"

#define POOL_THREADS_MAX 1024

typedef enum { JOB_WAITING, JOB_RUNNING, JOB_DONE } job_state;

struct sh_pool_job {
    void (*fn)(void *arg);
    void *arg;
    job_state state;
    sh_pool_job *before, *after;
};

struct sh_pool {
    pthread_mutex_t lock;
    pthread_cond_t submitted, done;
    sh_pool_job *first, *last, *next; /* next: the first that waits, or NULL */
    bool closing;
    unsigned n_threads;
    pthread_t *threads;
};

/* ---- the list; the lock is held ---- */

static void list_append(sh_pool *pool, sh_pool_job *job)
{
    job->before = pool->last;
    job->after = NULL;
    if (pool->last == NULL)
        pool->first = job;
    else
        pool->last->after = job;
    pool->last = job;
    if (pool->next == NULL)
        pool->next = job;
}

static void list_remove(sh_pool *pool, sh_pool_job *job)
{
    if (pool->next == job)
        pool->next = job->after;
    if (job->before == NULL)
        pool->first = job->after;
    else
        job->before->after = job->after;
    if (job->after == NULL)
        pool->last = job->before;
    else
        job->after->before = job->before;
}

/* ---- workers ---- */

static void *worker_main(void *arg)
{
    sh_pool *pool = arg;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->next == NULL && !pool->closing)
            pthread_cond_wait(&pool->submitted, &pool->lock);
        sh_pool_job *job = pool->next;
        if (job == NULL)
            break;
        pool->next = job->after;
        job->state = JOB_RUNNING;
        pthread_mutex_unlock(&pool->lock);
        job->fn(job->arg);
        pthread_mutex_lock(&pool->lock);
        job->state = JOB_DONE;
        pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Ends and joins the threads that were started, then frees everything. */
static void pool_end(sh_pool *pool, unsigned n_started)
{
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->submitted);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < n_started; i++)
        pthread_join(pool->threads[i], NULL);
    for (sh_pool_job *job = pool->first, *after; job != NULL; job = after) {
        after = job->after;
        free(job);
    }
    pthread_cond_destroy(&pool->submitted);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads);
    free(pool);
}

sh_status sh_pool_create(unsigned n_threads, sh_pool **out, sh_error *err)
{
    if (n_threads < 1 || n_threads > POOL_THREADS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a pool of %u threads; 1 to %d are allowed", n_threads,
                       POOL_THREADS_MAX);
    sh_pool *pool = sh_calloc(1, sizeof *pool);
    pthread_t *threads = sh_calloc(n_threads, sizeof *threads);
    if (pool == NULL || threads == NULL) {
        free(pool);
        free(threads);
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for a pool of %u threads", n_threads);
    }
    pool->threads = threads;
    pool->n_threads = n_threads;
    pthread_mutex_init(&pool->lock, NULL); /* with default attributes these cannot fail on Linux */
    pthread_cond_init(&pool->submitted, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (unsigned i = 0; i < n_threads; i++) {
        int reason = pthread_create(&threads[i], NULL, worker_main, pool);
        if (reason != 0) {
            pool_end(pool, i);
            return sh_fail(err, SH_ERR_LIMIT, "cannot start thread %u of %u: %s", i + 1, n_threads,
                           strerror(reason));
        }
    }
    *out = pool;
    return SH_OK;
}

void sh_pool_destroy(sh_pool **pool)
{
    if (*pool == NULL)
        return;
    pool_end(*pool, (*pool)->n_threads);
    *pool = NULL;
}

unsigned sh_pool_threads(const sh_pool *pool)
{
    return pool->n_threads;
}

sh_pool_job *sh_pool_submit(sh_pool *pool, void (*fn)(void *arg), void *arg)
{
    sh_pool_job *job = sh_calloc(1, sizeof *job);
    if (job == NULL)
        return NULL;
    job->fn = fn;
    job->arg = arg;
    pthread_mutex_lock(&pool->lock);
    list_append(pool, job);
    pthread_cond_signal(&pool->submitted);
    pthread_mutex_unlock(&pool->lock);
    return job;
}

void sh_pool_wait(sh_pool *pool, sh_pool_job **job)
{
    if (*job == NULL)
        return;
    pthread_mutex_lock(&pool->lock);
    while ((*job)->state != JOB_DONE)
        pthread_cond_wait(&pool->done, &pool->lock);
    list_remove(pool, *job);
    pthread_mutex_unlock(&pool->lock);
    free(*job);
    *job = NULL;
}

/* ---- loops ---- */

typedef struct {
    void (*fn)(void *arg, size_t i);
    void *arg;
    size_t n;
    atomic_size_t next;
} loop;

static void loop_run(void *arg)
{
    loop *l = arg;
    for (;;) {
        size_t i = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (i >= l->n)
            return;
        l->fn(l->arg, i);
    }
}

/* Waits for a helper that runs; takes back one that does not. */
static void helper_end(sh_pool *pool, sh_pool_job *job)
{
    pthread_mutex_lock(&pool->lock);
    while (job->state == JOB_RUNNING)
        pthread_cond_wait(&pool->done, &pool->lock);
    list_remove(pool, job);
    pthread_mutex_unlock(&pool->lock);
    free(job);
}

void sh_pool_for(sh_pool *pool, void (*fn)(void *arg, size_t i), void *arg, size_t n)
{
    loop l = {.fn = fn, .arg = arg, .n = n};
    /* with the caller as many threads as the pool has */
    size_t n_helpers = n < 2 ? 0 : SH_MIN((size_t)pool->n_threads - 1, n - 1), made = 0;
    sh_pool_job *helpers[POOL_THREADS_MAX];
    atomic_init(&l.next, 0);
    for (; made < n_helpers; made++) {
        helpers[made] = sh_pool_submit(pool, loop_run, &l);
        if (helpers[made] == NULL) /* out of memory: fewer helpers, the same result */
            break;
    }
    loop_run(&l);
    for (size_t i = 0; i < made; i++)
        helper_end(pool, helpers[i]);
}
