/*
 * The lock guards everything but the items of the pass that runs, which are the leader's until it
 * has taken the lock again. A job lies on the stack of the thread that waits for it.
 */
#include "edge-node/batch.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

typedef struct job {
    struct job *next;
    sh_run_item item; /* what is left of it */
    sh_batch_member *member;
    pthread_cond_t turn; /* it is done, or its thread is to lead */
    bool done;
    sh_status status;
    sh_error err;
} job;

struct sh_batcher {
    sh_team *team;
    pthread_mutex_t lock;
    pthread_cond_t arrived; /* for a leader that gathers */
    pthread_condattr_t monotonic;
    job *first; /* all that are not done, in the order of their coming */
    uint32_t n_jobs, n_expected;
    uint64_t wait_number; /* of the wait in which members are expected */
    uint64_t pass_us;     /* the last one took */
    bool led;
    const sh_runner *last;
    sh_batcher_status status;
};

/* What the next pass takes of which jobs. */
typedef struct {
    job *jobs[SH_BATCH_ROWS];
    sh_run_item items[SH_BATCH_ROWS];
    sh_runner *runner;
    uint32_t n, rows;
} pass;

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

sh_status sh_batcher_create(sh_team *team, sh_batcher **out, sh_error *err)
{
    sh_batcher *b = sh_calloc(1, sizeof(*b));
    if (b == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "batcher: no memory");
    b->team = team;
    b->wait_number = 1;
    pthread_mutex_init(&b->lock, NULL);
    pthread_condattr_init(&b->monotonic);
    pthread_condattr_setclock(&b->monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&b->arrived, &b->monotonic);
    *out = b;
    return SH_OK;
}

void sh_batcher_destroy(sh_batcher **batcher)
{
    sh_batcher *b = *batcher;
    if (b == NULL)
        return;
    SH_ASSERT(b->first == NULL && !b->led);
    pthread_cond_destroy(&b->arrived);
    pthread_condattr_destroy(&b->monotonic);
    pthread_mutex_destroy(&b->lock);
    free(b);
    *batcher = NULL;
}

sh_batcher_status sh_batcher_get_status(sh_batcher *batcher)
{
    pthread_mutex_lock(&batcher->lock);
    sh_batcher_status status = batcher->status;
    pthread_mutex_unlock(&batcher->lock);
    return status;
}

/* The member is here, or will not come. The lock is held. */
static void settle(sh_batcher *b, sh_batch_member *member)
{
    if (member->expected == b->wait_number) {
        SH_ASSERT(b->n_expected > 0);
        b->n_expected--;
    }
    member->expected = 0;
}

void sh_batcher_leave(sh_batcher *batcher, sh_batch_member *member)
{
    pthread_mutex_lock(&batcher->lock);
    settle(batcher, member);
    pthread_cond_signal(&batcher->arrived);
    pthread_mutex_unlock(&batcher->lock);
}

/* Waits until all that are expected have come, for a bounded time; then nobody is expected. */
static void gather(sh_batcher *b)
{
    uint64_t us = SH_MIN(b->pass_us / 2, (uint64_t)BATCH_GATHER_US_MAX);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)us * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    while (b->n_expected > 0)
        if (pthread_cond_timedwait(&b->arrived, &b->lock, &until) == ETIMEDOUT)
            break;
    b->status.gathers_late += b->n_expected > 0;
    b->n_expected = 0;
    b->wait_number++;
}

static void take(sh_batcher *b, pass *p, job *j, uint32_t n)
{
    sh_run_item item = j->item;
    if (n < item.n) { /* the piece that has the last logits comes later */
        item.n = n;
        if (item.logits_wanted == SH_LOGITS_LAST) {
            item.logits_wanted = SH_LOGITS_NONE;
            item.logits = NULL;
        }
    }
    p->jobs[p->n] = j;
    p->items[p->n++] = item;
    p->rows += n;
    b->status.rows += n;
}

/* Chooses what the next pass runs. */
static void choose(sh_batcher *b, pass *p)
{
    const job *lead = b->first;
    while (lead != NULL && lead->member->runner == b->last)
        lead = lead->next;
    *p = (pass){.runner = lead != NULL ? lead->member->runner : b->first->member->runner};
    for (job *j = b->first; j != NULL && p->rows < SH_BATCH_ROWS; j = j->next)
        if (j->member->runner == p->runner && j->item.n == 1)
            take(b, p, j, 1);
    for (job *j = b->first; j != NULL && p->rows < SH_BATCH_ROWS; j = j->next)
        if (j->member->runner == p->runner && j->item.n > 1) {
            uint32_t most = b->n_jobs > 1 ? SH_BATCH_PIECE : SH_BATCH_ROWS;
            take(b, p, j, SH_MIN(SH_MIN(j->item.n, most), SH_BATCH_ROWS - p->rows));
        }
    b->last = p->runner;
    b->status.passes++;
    b->status.items += p->n;
}

/* Without the lock. An item that cannot be run is its own fault, not the others'. */
static void run(pass *p)
{
    sh_error err = {0};
    sh_status status = sh_runner_run(p->runner, p->items, p->n, &err);
    for (uint32_t i = 0; i < p->n; i++) {
        job *j = p->jobs[i];
        if (status != SH_OK && p->n > 1)
            j->status = sh_runner_run(p->runner, &p->items[i], 1, &j->err);
        else if ((j->status = status) != SH_OK)
            j->err = err;
    }
}

static void finish(sh_batcher *b, job *done)
{
    job **at = &b->first;
    while (*at != done)
        at = &(*at)->next;
    *at = done->next;
    b->n_jobs--;
    done->done = true;
    done->member->expected = b->wait_number;
    b->n_expected++;
    pthread_cond_signal(&done->turn);
}

/* What is left of the jobs, after a pass. */
static void advance(sh_batcher *b, const pass *p)
{
    for (uint32_t i = 0; i < p->n; i++) {
        job *j = p->jobs[i];
        const sh_run_item *ran = &p->items[i];
        sh_run_item *left = &j->item;
        if (j->status != SH_OK || ran->n == left->n) {
            finish(b, j);
            continue;
        }
        const sh_model_config *config = &j->member->model->config;
        left->tokens += ran->n;
        left->n -= ran->n;
        if (left->logits_wanted == SH_LOGITS_ALL)
            left->logits += (size_t)ran->n * config->vocab;
        for (uint32_t k = 0; k < ran->n && left->logits_wanted == SH_LOGITS_SOME; k++)
            left->logits += *left->wants++ ? config->vocab : 0;
        if (left->hidden != NULL)
            left->hidden += (size_t)ran->n * config->width;
    }
}

/* One pass. The lock is held before and after. */
static void lead(sh_batcher *b)
{
    pass p;
    b->led = true;
    gather(b);
    choose(b, &p);
    pthread_mutex_unlock(&b->lock);
    uint64_t begun = now_us();
    run(&p);
    uint64_t us = now_us() - begun;
    pthread_mutex_lock(&b->lock);
    b->pass_us = us;
    advance(b, &p);
    b->led = false;
}

sh_status sh_batcher_run(sh_batcher *batcher, sh_batch_member *member, const sh_run_item *item,
                         sh_error *err)
{
    sh_batcher *b = batcher;
    job j = {.item = *item, .member = member};
    if (item->n == 0)
        return SH_OK;
    pthread_cond_init(&j.turn, &b->monotonic);
    pthread_mutex_lock(&b->lock);
    job **at = &b->first;
    while (*at != NULL)
        at = &(*at)->next;
    *at = &j;
    b->n_jobs++;
    settle(b, member);
    pthread_cond_signal(&b->arrived);
    while (!j.done) {
        if (b->led)
            pthread_cond_wait(&j.turn, &b->lock);
        else
            lead(b);
    }
    /* Whoever comes first now leads; should all be waiting, the one that waits longest. */
    if (b->first != NULL && !b->led)
        pthread_cond_signal(&b->first->turn);
    pthread_mutex_unlock(&b->lock);
    pthread_cond_destroy(&j.turn);
    if (j.status != SH_OK && err != NULL)
        *err = j.err;
    return j.status;
}
