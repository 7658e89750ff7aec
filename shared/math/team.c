/*
 * One barrier does everything: between two runs the workers wait in the barrier that begins the
 * next one, for the caller, who is the last to come. `round` counts barriers; a member waits until
 * it changes. The last to arrive resets the loop and starts the next round, and wakes sleepers when
 * there are any: `sleepers` and `round` are read and written in one total order (seq_cst), so that
 * either the sleeper sees the new round, or the last one sees the sleeper.
 */
#include "shared/math/team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/base/buf.h"
#include "shared/base/relax.h"

#define LINE_BYTES 64
/* Looks at the round before the clock is looked at. A member that spins does not yield: on a busy
 * machine it would come back a whole time slice later. If the others do not come, it sleeps, and a
 * thread that is woken runs at once. */
#define SPINS_A_CLOCK 64

typedef struct {
    sh_team *team;
    unsigned index;
} worker;

struct sh_team {
    _Alignas(LINE_BYTES) atomic_uint round;
    _Alignas(LINE_BYTES) atomic_uint arrived;
    _Alignas(LINE_BYTES) atomic_size_t next; /* of the loop */
    _Alignas(LINE_BYTES) atomic_uint sleepers;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* the round */
    unsigned n;
    bool crowded; /* more members than processors: spinning would keep the others from coming */
    /* Of the run at hand; written by the caller before the barrier that begins it. */
    void (*fn)(void *arg, const sh_member *me);
    void *arg;
    pthread_t *threads; /* [n - 1] */
    worker *workers;
};

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static bool has_changed(const sh_team *team, unsigned round)
{
    return atomic_load_explicit(&team->round, memory_order_acquire) != round;
}

/* Whether the round changed while we spun. */
static bool spin(const sh_team *team, unsigned round)
{
    for (unsigned i = 0; !team->crowded && i < SPINS_A_CLOCK; i++) {
        if (has_changed(team, round))
            return true;
        sh_relax();
    }
    const uint64_t start = now_us();
    for (uint64_t passed = 0; passed < SH_TEAM_SPIN_US; passed = now_us() - start) {
        if (team->crowded)
            sched_yield();
        for (unsigned i = 0; i < (team->crowded ? 1 : SPINS_A_CLOCK); i++) {
            if (has_changed(team, round))
                return true;
            sh_relax();
        }
    }
    return false;
}

static void sleep_until_changed(sh_team *team, unsigned round)
{
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->round) == round)
        pthread_cond_wait(&team->changed, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
}

static void meet(sh_team *team)
{
    const unsigned round = atomic_load_explicit(&team->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < team->n) {
        if (!spin(team, round))
            sleep_until_changed(team, round);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    atomic_store(&team->round, round + 1);
    if (atomic_load(&team->sleepers) > 0) {
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->changed);
        pthread_mutex_unlock(&team->lock);
    }
}

static void *worker_main(void *arg)
{
    const worker *w = arg;
    sh_team *team = w->team;
    const sh_member me = {.team = team, .index = w->index, .n = team->n};
    for (;;) {
        meet(team);
        if (team->fn == NULL)
            return NULL;
        team->fn(team->arg, &me);
        meet(team);
    }
}

static bool is_crowded(unsigned n)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 && (unsigned)CPU_COUNT(&set) < n;
}

static void team_free(sh_team *team)
{
    pthread_cond_destroy(&team->changed);
    pthread_mutex_destroy(&team->lock);
    free(team->threads);
    free(team->workers);
    free(team);
}

sh_status sh_team_create(unsigned n_threads, sh_team **out, sh_error *err)
{
    if (n_threads < 1 || n_threads > SH_TEAM_THREADS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a team of %u threads; 1 to %d are allowed", n_threads,
                       SH_TEAM_THREADS_MAX);
    sh_team *team = sh_alloc_aligned(sizeof *team);
    pthread_t *threads = sh_calloc(n_threads, sizeof *threads);
    worker *workers = sh_calloc(n_threads, sizeof *workers);
    if (team == NULL || threads == NULL || workers == NULL) {
        free(team);
        free(threads);
        free(workers);
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for a team of %u threads", n_threads);
    }
    team->threads = threads;
    team->workers = workers;
    team->n = n_threads;
    team->crowded = is_crowded(n_threads);
    pthread_mutex_init(&team->lock, NULL); /* with default attributes these cannot fail on Linux */
    pthread_cond_init(&team->changed, NULL);
    for (unsigned i = 1; i < n_threads; i++) {
        workers[i] = (worker){.team = team, .index = i};
        const int reason = pthread_create(&threads[i], NULL, worker_main, &workers[i]);
        if (reason != 0) {
            /* Those that are missing count as arrived, so that the others may end. */
            atomic_fetch_add(&team->arrived, n_threads - i);
            meet(team);
            for (unsigned k = 1; k < i; k++)
                pthread_join(threads[k], NULL);
            team_free(team);
            return sh_fail(err, SH_ERR_LIMIT, "cannot start thread %u of %u: %s", i + 1, n_threads,
                           strerror(reason));
        }
    }
    *out = team;
    return SH_OK;
}

void sh_team_destroy(sh_team **team)
{
    if (*team == NULL)
        return;
    (*team)->fn = NULL;
    meet(*team);
    for (unsigned i = 1; i < (*team)->n; i++)
        pthread_join((*team)->threads[i], NULL);
    team_free(*team);
    *team = NULL;
}

unsigned sh_team_threads(const sh_team *team)
{
    return team != NULL ? team->n : 1;
}

void sh_team_run(sh_team *team, void (*fn)(void *arg, const sh_member *me), void *arg)
{
    sh_team alone; /* what a team of one needs for its loops: nobody else sees it */
    if (team == NULL) {
        team = &alone;
        team->n = 1;
    }
    const sh_member me = {.team = team, .n = team->n};
    if (team->n == 1) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        fn(arg, &me);
        return;
    }
    team->fn = fn;
    team->arg = arg;
    meet(team);
    fn(arg, &me);
    meet(team);
}

void sh_team_barrier(const sh_member *me)
{
    if (me->n == 1)
        atomic_store_explicit(&me->team->next, 0, memory_order_relaxed);
    else
        meet(me->team);
}

bool sh_team_take(const sh_member *me, size_t n, size_t chunk, size_t *begin, size_t *end)
{
    atomic_size_t *next = &me->team->next;
    size_t first;
    if (me->n == 1) {
        first = atomic_load_explicit(next, memory_order_relaxed);
        atomic_store_explicit(next, first + chunk, memory_order_relaxed);
    } else {
        first = atomic_fetch_add_explicit(next, chunk, memory_order_relaxed);
    }
    if (first >= n)
        return false;
    *begin = first;
    *end = SH_MIN(n, first + chunk);
    return true;
}
