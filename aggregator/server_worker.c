/*
 * The worker: a thread that runs tasks one after another, in the order that they came. A task that
 * is done goes to the list `done`, and event_fd becomes readable; the loop takes it from there.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define UPDATE_BYTES_MAX ((size_t)SH_CHUNK_BYTES * SH_BLOB_CHUNKS_MAX)

const char *server_task_name(server_task_kind kind)
{
    static const char *const names[TASK_KINDS] = {"merge", "gate", "stack", "backup", "prune"};
    return names[kind];
}

server_task *server_task_create(server_task_kind kind)
{
    server_task *task = sh_calloc(1, sizeof *task);
    if (task != NULL)
        task->kind = kind;
    return task;
}

void server_task_destroy(server_task **tp)
{
    server_task *task = *tp;
    if (task == NULL)
        return;
    sh_merge_job_result_release(&task->merged);
    sh_folder_keep_release(&task->keep);
    free(task->inputs);
    free(task);
    *tp = NULL;
}

/* ---- bodies ---- */

static void release_updates(sh_buf *updates, uint32_t n)
{
    for (uint32_t i = 0; updates != NULL && i < n; i++)
        sh_buf_release(&updates[i]);
    free(updates);
}

static sh_status read_updates(sh_store *store, const server_task *task, sh_buf *updates,
                              sh_error *err)
{
    sh_txn *txn = NULL;
    SH_TRY(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    for (uint32_t i = 0; i < task->job.n_inputs; i++) {
        sh_buf_init(&updates[i], UPDATE_BYTES_MAX);
        /* Unreadable is left empty: the merge refuses it by name. */
        if (sh_coord_read_update(txn, &task->inputs[i].id, &updates[i], NULL) != SH_OK)
            sh_buf_clear(&updates[i]);
    }
    sh_txn_abort(&txn);
    return SH_OK;
}

static sh_status run_merge(server_worker *w, server_task *task, sh_error *err)
{
    uint32_t n = task->job.n_inputs;
    sh_buf *updates = sh_calloc(SH_MAX(n, 1u), sizeof *updates);
    sh_bytes *blobs = sh_calloc(SH_MAX(n, 1u), sizeof *blobs);
    sh_status status = SH_OK;
    if (updates == NULL || blobs == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "merge: no memory for %u updates", n));
    SH_GOTO(read_updates(w->store, task, updates, err));
    for (uint32_t i = 0; i < n; i++)
        blobs[i] = (sh_bytes){updates[i].data, updates[i].len};
    sh_merge_job merge = {.dir = SH_FOLDER_OBJECTS,
                          .job = &task->job,
                          .inputs = task->inputs,
                          .blobs = blobs,
                          .format = SH_TYPE_Q8_0,
                          .pool = w->pool};
    status = task->kind == TASK_STACK ? sh_job_stack(&merge, &task->merged, err)
                                      : sh_job_merge(&merge, &task->merged, err);
cleanup:
    release_updates(updates, n);
    free(blobs);
    return status;
}

/* The operator's texts as the parent's vocabulary has them: read at every gate, so that a change of
 * suites/ counts from the next candidate on. */
static sh_status load_suite(const server_worker *w, const sh_hash *model_sha, sh_suite *out,
                            sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_model *model = NULL;
    sh_suite whole = {0}, cut = {0};
    sh_status status = SH_OK;
    SH_GOTO(sh_job_path(path, SH_FOLDER_OBJECTS, model_sha, err));
    SH_GOTO(sh_model_open(path, &model, err));
    SH_GOTO(sh_suite_load(SH_FOLDER_SUITES, model->tokenizer, &whole, err));
    for (uint32_t i = 0; i < whole.n; i++) {
        const sh_suite_slice *slice = &whole.slices[i];
        size_t n = w->gate_tokens > 0 ? SH_MIN(slice->n, (size_t)w->gate_tokens) : slice->n;
        SH_GOTO(sh_suite_add(&cut, slice->name, slice->tokens, n, err));
    }
    *out = cut;
    cut = (sh_suite){0};
cleanup:
    sh_suite_release(&cut);
    sh_suite_release(&whole);
    sh_model_close(&model);
    return status;
}

static sh_status run_gate(server_worker *w, server_task *task, sh_error *err)
{
    sh_suite suite = {0};
    SH_TRY(load_suite(w, &task->job.parent_model, &suite, err));
    sh_gate_job gate = {
        .dir = SH_FOLDER_OBJECTS, .job = &task->job, .suite = &suite, .pool = w->pool};
    sh_status status = sh_job_gate(&gate, &task->gated, err);
    sh_suite_release(&suite);
    return status;
}

static void run(server_worker *w, server_task *task)
{
    uint64_t since = sh_clock_mono_ms();
    switch (task->kind) {
    case TASK_MERGE:
    case TASK_STACK:
        task->status = run_merge(w, task, &task->err);
        break;
    case TASK_GATE:
        task->status = run_gate(w, task, &task->err);
        break;
    case TASK_BACKUP:
        task->status =
            sh_folder_backup(w->store, task->dir, sh_clock_wall_ms(), &task->version, &task->err);
        break;
    case TASK_PRUNE:
        task->status = sh_folder_prune(&task->keep, &task->removed, &task->err);
        break;
    case TASK_KINDS:
        break;
    }
    task->took_ms = sh_clock_mono_ms() - since;
}

/* ---- the thread ---- */

static void append(server_task **list, server_task *task)
{
    while (*list != NULL)
        list = &(*list)->next;
    task->next = NULL;
    *list = task;
}

static void *work(void *arg)
{
    server_worker *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->waiting == NULL && !w->stopping)
            pthread_cond_wait(&w->changed, &w->lock);
        if (w->stopping)
            break;
        server_task *task = w->waiting;
        w->waiting = task->next;
        w->n_waiting--;
        w->busy = true;
        w->running = task->kind;
        pthread_mutex_unlock(&w->lock);
        run(w, task);
        pthread_mutex_lock(&w->lock);
        w->busy = false;
        append(&w->done, task);
        uint64_t one = 1;
        while (write(w->event_fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
    }
    w->ended = true;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

sh_status server_worker_start(server_worker *w, sh_store *store,
                              const sh_aggregator_settings *settings, sh_error *err)
{
    pthread_condattr_t monotonic;
    *w = (server_worker){.store = store, .gate_tokens = (uint64_t)settings->gate_tokens};
    w->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->event_fd < 0)
        return sh_fail(err, SH_ERR_IO, "server: eventfd: %s", strerror(errno));
    if (settings->threads > 1)
        SH_TRY(sh_pool_create((unsigned)settings->threads, &w->pool, err));
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&w->thread, NULL, work, w) != 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: the worker's thread could not be started");
    w->started = true;
    return SH_OK;
}

static void drop_list(server_task **list)
{
    while (*list != NULL) {
        server_task *task = *list;
        *list = task->next;
        server_task_destroy(&task);
    }
}

bool server_worker_stop(server_worker *w, uint64_t wait_ms)
{
    if (w->started) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += (time_t)(wait_ms / 1000);
        until.tv_nsec += (long)(wait_ms % 1000) * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_mutex_lock(&w->lock);
        w->stopping = true;
        pthread_cond_broadcast(&w->changed);
        int rc = 0;
        while (!w->ended && rc == 0)
            rc = pthread_cond_timedwait(&w->changed, &w->lock, &until);
        bool ended = w->ended;
        pthread_mutex_unlock(&w->lock);
        if (!ended)
            return false;
        pthread_join(w->thread, NULL);
        pthread_cond_destroy(&w->changed);
        pthread_mutex_destroy(&w->lock);
        w->started = false;
    }
    drop_list(&w->waiting);
    drop_list(&w->done);
    sh_pool_destroy(&w->pool);
    if (w->event_fd > 0)
        close(w->event_fd);
    *w = (server_worker){0};
    return true;
}

static bool is_job(const server_task *task)
{
    return task->kind == TASK_MERGE || task->kind == TASK_STACK || task->kind == TASK_GATE;
}

sh_status server_worker_submit(server_worker *w, server_task **task, sh_error *err)
{
    server_task *old = NULL;
    sh_status status = SH_OK;
    pthread_mutex_lock(&w->lock);
    for (server_task **at = &w->waiting; is_job(*task) && *at != NULL;) {
        server_task *here = *at;
        if (!is_job(here)) {
            at = &here->next;
            continue;
        }
        *at = here->next;
        append(&old, here);
        w->n_waiting--;
    }
    if (w->n_waiting >= SERVER_TASKS_MAX) {
        status =
            sh_fail(err, SH_ERR_LIMIT, "%u tasks wait already; try again later", SERVER_TASKS_MAX);
    } else {
        append(&w->waiting, *task);
        *task = NULL;
        w->n_waiting++;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    drop_list(&old);
    return status;
}

server_task *server_worker_take(server_worker *w)
{
    uint64_t n;
    while (read(w->event_fd, &n, sizeof n) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&w->lock);
    server_task *task = w->done;
    if (task != NULL) {
        w->done = task->next;
        task->next = NULL;
    }
    pthread_mutex_unlock(&w->lock);
    return task;
}

bool server_worker_has(server_worker *w, server_task_kind kind)
{
    pthread_mutex_lock(&w->lock);
    bool has = w->busy && w->running == kind;
    for (const server_task *t = w->waiting; t != NULL; t = t->next)
        has |= t->kind == kind;
    for (const server_task *t = w->done; t != NULL; t = t->next)
        has |= t->kind == kind;
    pthread_mutex_unlock(&w->lock);
    return has;
}

bool server_worker_busy(server_worker *w)
{
    pthread_mutex_lock(&w->lock);
    bool busy = w->busy || w->waiting != NULL;
    pthread_mutex_unlock(&w->lock);
    return busy;
}
