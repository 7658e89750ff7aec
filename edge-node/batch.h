/*
 * Continuous batching: threads that each run a text hand in their tokens and wait; one pass over
 * the weights serves all that are there (Yu et al. 2022, "Orca").
 *
 * One of those that wait leads: it gathers what is pending, runs one pass for all, wakes them, and
 * leads again or hands over. No thread is the batcher's own but its team's.
 *
 * Invariants
 *   - The results are the same bits as of one text at a time (model.h).
 *   - Served first come, first served, single tokens before long runs of them: these are cut into
 *     pieces of piece_max rows, so that a long prompt delays the others by one such piece a pass.
 *   - A pass serves one runner; of two (a release was swapped) the one that was not served last.
 *   - Who was served is expected back (it samples, and sends its text) and waited for, but no
 *     longer than half the time of the last pass and BATCH_GATHER_US_MAX: texts in step stay in
 *     step, a slow one is not waited for twice.
 * Threads: all functions from any thread; a member belongs to one at a time, create and destroy are
 * alone.
 *
 *     sh_batch_member member = {.model = model, .runner = runner};
 *     SH_TRY(sh_batcher_run(batcher, &member, &item, err)); ... as sh_runner_run
 *     sh_batcher_leave(batcher, &member);                           it does not come back for now
 */
#ifndef SH_EDGE_BATCH_H
#define SH_EDGE_BATCH_H

#include "shared/model/model.h"

#define SH_BATCH_ROWS       128u /* of a pass: sh_runner_options.rows_max of its runners */
#define SH_BATCH_PIECE      32u  /* of them for one text while others wait */
#define BATCH_GATHER_US_MAX 3000u

typedef struct sh_batcher sh_batcher;
typedef struct {
    const sh_model *model; /* of the runner; borrowed, both */
    sh_runner *runner;
    uint64_t expected; /* the batcher's: number of the wait in which it is expected; 0: not */
} sh_batch_member;

/* team: borrowed, NULL for none; nobody else runs it. */
SH_MUST_USE sh_status sh_batcher_create(sh_team *team, sh_batcher **out, sh_error *err);
void sh_batcher_destroy(sh_batcher **batcher); /* nobody runs */
/* As sh_runner_run with one item of any length; waits for its turn. */
SH_MUST_USE sh_status sh_batcher_run(sh_batcher *batcher, sh_batch_member *member,
                                     const sh_run_item *item, sh_error *err);
/* The member is not expected back: it waits for something else, or has ended. */
void sh_batcher_leave(sh_batcher *batcher, sh_batch_member *member);

typedef struct {
    uint64_t passes, rows, items; /* since the start */
    uint64_t gathers_late;        /* passes that began without someone who was expected */
} sh_batcher_status;
sh_batcher_status sh_batcher_get_status(sh_batcher *batcher);

#endif
