/*
 * A team of threads that runs a stretch of virtual time: windows of all partitions.
 *
 * No barrier lies between two windows. A shard's window k may run once the aggregator has ended its
 * window k - 1, the aggregator's once all shards have ended theirs of k - 1: shards are at most one
 * window ahead of the aggregator and at most one behind, and there is mostly something to take. A
 * window of a partition is some microseconds of work, and what may run is known by a few numbers
 * under one lock. The aggregator is the calling thread's. A thread takes its own shards first, then
 * the nearest of others: memory that one thread allocates and another one frees has both wait for
 * an allocator's lock. With nothing to take a thread spins for a while, then it sleeps.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "experiments/world/world.h"
#include "shared/base/relax.h"

#define SPINS      2000u /* for a change: some ten microseconds */
#define LOCK_SPINS 200u
/* What the aggregator is thought to weigh, until it is known what its thread comes to take. */
#define CENTER_SHARDS 12u

enum { BEHIND, LEVEL, AHEAD, PLACES }; /* of a shard that ended c - 1, c, c + 1 windows */

typedef struct {
    world_team *team;
    uint32_t index;
} team_thread;

struct world_team {
    pthread_t threads[WORLD_THREADS_MAX];
    team_thread args[WORLD_THREADS_MAX];
    uint32_t n; /* with the caller */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    atomic_uint changes; /* of what may be taken */
    uint32_t asleep;
    bool stopping;
    /* Of the stretch at hand. */
    world *w;
    uint64_t from_ms, until_ms, windows;
    uint64_t left;        /* windows of partitions that have not ended */
    uint64_t center_done; /* windows that the aggregator has ended: c */
    bool center_runs;
    uint64_t shard_done[WORLD_SHARDS];
    uint32_t count[PLACES];   /* of shards */
    uint64_t resting[PLACES]; /* those that nobody runs, by bits */
    /* A thread's own shards are as many as it came to take in the stretch before: from own[me]. */
    uint32_t own[WORLD_THREADS_MAX + 1];
    uint64_t taken[WORLD_THREADS_MAX];
};

_Static_assert(WORLD_SHARDS <= 64, "a shard is a bit");

/* It is held for less time than it takes to sleep. */
static void lock(world_team *t)
{
    for (uint32_t k = 0; k < LOCK_SPINS; k++) {
        if (pthread_mutex_trylock(&t->lock) == 0)
            return;
        sh_relax();
    }
    pthread_mutex_lock(&t->lock);
}

static void tell(world_team *t)
{
    atomic_fetch_add(&t->changes, 1);
    if (t->asleep > 0)
        pthread_cond_broadcast(&t->changed);
}

/* ---- with the lock ---- */

static uint64_t bits_below(uint32_t n)
{
    return n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

/* Of a thread's own shards the lowest; of others' the nearest. */
static bool take_shard(world_team *t, uint32_t me, uint32_t place, uint32_t *shard)
{
    uint64_t all = t->resting[place], below = all & bits_below(t->own[me]);
    uint64_t mine = all & bits_below(t->own[me + 1]) & ~below;
    if (all == 0)
        return false;
    if (mine == 0 && below != 0)
        *shard = 63 - (uint32_t)__builtin_clzll(below);
    else
        *shard = (uint32_t)__builtin_ctzll(mine ? mine : all);
    t->resting[place] &= ~(UINT64_C(1) << *shard);
    t->taken[me]++;
    return true;
}

/* n_shards: the aggregator. It comes first: all others wait for it at last. */
static bool take(world_team *t, uint32_t me, uint32_t *part)
{
    bool center =
        me == 0 && !t->center_runs && t->count[BEHIND] == 0 && t->center_done < t->windows;
    if (!center)
        return take_shard(t, me, BEHIND, part) ||
               (t->center_done < t->windows && take_shard(t, me, LEVEL, part));
    t->center_runs = true;
    *part = t->w->n_shards;
    return true;
}

static void end_center(world_team *t)
{
    t->center_runs = false;
    t->center_done++;
    for (uint32_t k = BEHIND; k < PLACES; k++) {
        t->count[k] = k < AHEAD ? t->count[k + 1] : 0;
        t->resting[k] = k < AHEAD ? t->resting[k + 1] : 0;
    }
    tell(t);
}

static void end_shard(world_team *t, uint32_t shard)
{
    uint64_t done = ++t->shard_done[shard];
    uint32_t place = (uint32_t)(done + 1 - t->center_done);
    SH_ASSERT(place > BEHIND && place < PLACES);
    t->count[place - 1]--;
    t->count[place]++;
    t->resting[place] |= UINT64_C(1) << shard;
    if (place == LEVEL && t->count[BEHIND] == 0)
        tell(t);
}

/* ---- the threads ---- */

static void run(world_team *t, uint32_t part)
{
    world *w = t->w;
    bool center = part == w->n_shards;
    uint64_t k = center ? t->center_done : t->shard_done[part];
    uint64_t end_ms = SH_MIN(t->from_ms + (k + 1) * w->window_ms, t->until_ms);
    pthread_mutex_unlock(&t->lock);
    world_part_run(center ? &w->center_part : &w->shards[part], w->windows_run + 1 + k, end_ms);
    lock(t);
    if (center)
        end_center(t);
    else
        end_shard(t, part);
    if (--t->left == 0)
        tell(t);
}

static void wait_for_change(world_team *t)
{
    uint32_t seen = atomic_load(&t->changes);
    pthread_mutex_unlock(&t->lock);
    for (uint32_t k = 0; k < SPINS && atomic_load(&t->changes) == seen; k++)
        sh_relax();
    lock(t);
    t->asleep++;
    while (atomic_load(&t->changes) == seen)
        pthread_cond_wait(&t->changed, &t->lock);
    t->asleep--;
}

/* The caller's thread, 0, until the stretch is over; the others until the team's end. */
static void work(world_team *t, uint32_t me)
{
    uint32_t part = 0;
    lock(t);
    while (me == 0 ? t->left > 0 : !t->stopping) {
        if (t->left > 0 && take(t, me, &part))
            run(t, part);
        else
            wait_for_change(t);
    }
    pthread_mutex_unlock(&t->lock);
}

static void *loop(void *arg)
{
    const team_thread *me = arg;
    work(me->team, me->index);
    return NULL;
}

static void share_out(world_team *t)
{
    uint64_t all = 0, sum = 0;
    for (uint32_t k = 0; k < t->n; k++)
        all += ++t->taken[k];
    for (uint32_t k = 0; k < t->n; k++) {
        t->own[k] = (uint32_t)((sum * t->w->n_shards + all / 2) / all);
        sum += t->taken[k];
        t->taken[k] = 0;
    }
    t->own[t->n] = t->w->n_shards;
}

void world_team_run(world_team *t, world *w, uint64_t from_ms, uint64_t until_ms)
{
    lock(t);
    t->w = w;
    t->from_ms = from_ms;
    t->until_ms = until_ms;
    t->windows = (until_ms - from_ms + w->window_ms - 1) / w->window_ms;
    t->left = t->windows * (w->n_shards + 1);
    t->center_done = 0;
    for (uint32_t k = 0; k < w->n_shards; k++)
        t->shard_done[k] = 0;
    for (uint32_t k = BEHIND; k < PLACES; k++) {
        t->count[k] = k == LEVEL ? w->n_shards : 0;
        t->resting[k] = k == LEVEL ? bits_below(w->n_shards) : 0;
    }
    share_out(t);
    tell(t);
    pthread_mutex_unlock(&t->lock);
    work(t, 0);
    w->windows_run += t->windows;
}

uint32_t world_team_threads(const world_team *t)
{
    return t->n;
}

sh_status world_team_create(uint32_t threads, world_team **out, sh_error *err)
{
    world_team *t = sh_calloc(1, sizeof *t);
    if (!t)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u threads", threads);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    for (uint32_t k = 0; k < threads; k++)
        t->taken[k] = (WORLD_SHARDS + CENTER_SHARDS) / threads;
    t->taken[0] -= SH_MIN(t->taken[0], (uint64_t)CENTER_SHARDS);
    for (t->n = 1; t->n < threads; t->n++) {
        t->args[t->n] = (team_thread){t, t->n};
        if (pthread_create(&t->threads[t->n], NULL, loop, &t->args[t->n]) != 0) {
            world_team_destroy(&t);
            return sh_fail(err, SH_ERR_LIMIT, "simulation: %u threads could not be started",
                           threads);
        }
    }
    *out = t;
    return SH_OK;
}

void world_team_destroy(world_team **team)
{
    world_team *t = *team;
    if (!t)
        return;
    lock(t);
    t->stopping = true;
    tell(t);
    pthread_mutex_unlock(&t->lock);
    for (uint32_t k = 1; k < t->n; k++)
        pthread_join(t->threads[k], NULL);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->changed);
    free(t);
    *team = NULL;
}
