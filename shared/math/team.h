/*
 * A team of threads for the phases of a forward pass: workers that wait, spinning for a short time,
 * then asleep; a barrier; and loops whose ranges are taken by whoever is free.
 *
 *     static void body(void *arg, const sh_member *me)
 *     {
 *         size_t begin, end;
 *         while (sh_team_take(me, n_rows, 16, &begin, &end))
 *             ... rows begin .. end - 1 ...
 *         sh_team_barrier(me);                      everybody is here, all of it is visible
 *         while (sh_team_take(me, ...)) ...         the next loop
 *     }
 *     sh_team_run(team, body, arg);
 *
 * Results must not depend on who takes what. Between two barriers there is at most one loop, the
 * same for all members (run's begin and end are barriers, too). Nothing is allocated, and no thread
 * created, by run. A worker spins SH_TEAM_SPIN_US after its last work, then sleeps: an idle team
 * costs nothing. On a machine with fewer free processors than members a waiting member yields.
 *
 * Threads: a team runs one function at a time; run is called by one thread at a time, which is
 * member 0. NULL is a team of the caller alone, everywhere.
 */
#ifndef SH_MATH_TEAM_H
#define SH_MATH_TEAM_H

#include "shared/base/status.h"

#define SH_TEAM_THREADS_MAX 256
#define SH_TEAM_SPIN_US     200 /* longer than what is serial between two tokens */

typedef struct sh_team sh_team;
typedef struct {
    sh_team *team;
    unsigned index, n; /* index < n; 0 is the caller of run */
} sh_member;

/* n_threads - 1 workers are started. SH_ERR_LIMIT: 0, too many, or no thread to be had. */
SH_MUST_USE sh_status sh_team_create(unsigned n_threads, sh_team **out, sh_error *err);
void sh_team_destroy(sh_team **team); /* no run */
unsigned sh_team_threads(const sh_team *team);
void sh_team_run(sh_team *team, void (*fn)(void *arg, const sh_member *me), void *arg);
void sh_team_barrier(const sh_member *me);
/* The next `chunk` of 0 .. n - 1 that nobody has taken; false when there is none. */
bool sh_team_take(const sh_member *me, size_t n, size_t chunk, size_t *begin, size_t *end);

#endif
