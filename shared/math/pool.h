/*
 * A pool of worker threads for independent jobs. Results must not depend on the number of
 * workers; what a job writes is visible to whoever saw it done. Jobs start in submission order.
 */
#ifndef SH_MATH_POOL_H
#define SH_MATH_POOL_H

#include "shared/base/status.h"

typedef struct sh_pool sh_pool;
typedef struct sh_pool_job sh_pool_job;

SH_MUST_USE sh_status sh_pool_create(unsigned n_threads, sh_pool **out, sh_error *err);
void sh_pool_destroy(sh_pool **pool); /* waits for what was submitted */
unsigned sh_pool_threads(const sh_pool *pool);
/* Runs fn(arg) on a worker. NULL when memory is out. */
sh_pool_job *sh_pool_submit(sh_pool *pool, void (*fn)(void *arg), void *arg);
void sh_pool_wait(sh_pool *pool, sh_pool_job **job); /* waits, frees, nulls */
/* fn(arg, i) for i in [0, n), on the caller and all workers but one; returns when all are done. May
 * be called by a job of the same pool. */
void sh_pool_for(sh_pool *pool, void (*fn)(void *arg, size_t i), void *arg, size_t n);

#endif
