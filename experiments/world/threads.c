/*
 * A team of threads that runs a list of partitions again and again. A turn takes some microseconds
 * of work, so threads wait for the next one by turning first, then by giving way, then asleep.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "experiments/world/world.h"

#define SPINS  2000u
#define YIELDS 200u

struct world_team {
    pthread_t threads[WORLD_THREADS_MAX];
    uint32_t n; /* beside the caller's */
    world_part *const *parts;
    uint32_t n_parts;
    world_part_fn fn;
    atomic_uint next;  /* part to take */
    atomic_uint done;  /* threads that have ended the turn */
    atomic_ulong turn; /* grows with each */
    atomic_bool stopping;
    pthread_mutex_t lock;
    pthread_cond_t begins;
    atomic_uint asleep;
};

static void work(world_team *t)
{
    uint32_t k;
    while ((k = atomic_fetch_add(&t->next, 1)) < t->n_parts) {
        world_part *p = t->parts[k];
        p->status = t->fn(p, &p->err);
    }
}

static void wait_for_turn(world_team *t, unsigned long last)
{
    for (uint32_t k = 0; k < SPINS + YIELDS; k++) {
        if (atomic_load(&t->turn) != last)
            return;
        if (k >= SPINS)
            sched_yield();
    }
    pthread_mutex_lock(&t->lock);
    atomic_fetch_add(&t->asleep, 1);
    while (atomic_load(&t->turn) == last)
        pthread_cond_wait(&t->begins, &t->lock);
    atomic_fetch_sub(&t->asleep, 1);
    pthread_mutex_unlock(&t->lock);
}

static void *loop(void *arg)
{
    world_team *t = arg;
    unsigned long last = 0;
    for (;;) {
        wait_for_turn(t, last);
        last++;
        if (atomic_load(&t->stopping))
            return NULL;
        work(t);
        atomic_fetch_add(&t->done, 1);
    }
}

static void begin_turn(world_team *t)
{
    atomic_store(&t->next, 0);
    atomic_store(&t->done, 0);
    atomic_fetch_add(&t->turn, 1);
    if (atomic_load(&t->asleep) == 0)
        return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_broadcast(&t->begins);
    pthread_mutex_unlock(&t->lock);
}

void world_team_run(world_team *t, world_part *const *parts, uint32_t n, world_part_fn fn)
{
    t->parts = parts;
    t->n_parts = n;
    t->fn = fn;
    if (t->n == 0 || n < 2) { /* a turn costs more than one partition's events */
        atomic_store(&t->next, 0);
        work(t);
        return;
    }
    begin_turn(t);
    work(t);
    for (uint32_t k = 0; atomic_load(&t->done) < t->n; k++)
        if (k >= SPINS)
            sched_yield();
}

sh_status world_team_create(uint32_t threads, world_team **out, sh_error *err)
{
    world_team *t = sh_calloc(1, sizeof *t);
    if (!t)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u threads", threads);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->begins, NULL);
    while (t->n + 1 < threads) {
        if (pthread_create(&t->threads[t->n], NULL, loop, t) != 0) {
            world_team_destroy(&t);
            return sh_fail(err, SH_ERR_LIMIT, "simulation: %u threads could not be started",
                           threads);
        }
        t->n++;
    }
    *out = t;
    return SH_OK;
}

void world_team_destroy(world_team **team)
{
    world_team *t = *team;
    if (!t)
        return;
    atomic_store(&t->stopping, true);
    begin_turn(t);
    for (uint32_t k = 0; k < t->n; k++)
        pthread_join(t->threads[k], NULL);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->begins);
    free(t);
    *team = NULL;
}
