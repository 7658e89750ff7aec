/*
 * Installations, smoke tests and evaluations, one after another on one thread, which begins no
 * write transaction: it reads the store in short read transactions.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/log.h"

#define CANDIDATE_PATH     SH_NODE_DIR_MODELS "/candidate.gguf"
#define CHUNKS_A_READ      64u /* 4 MiB: how long a read transaction pins pages */
#define EVALUATE_CONTEXT   128u
#define SMOKE_CHUNK_TOKENS 64u

/* What a release is tried on. Any text does: only a model that is broken finds it impossible. */
static const char smoke_text[] =
    "The river runs past the old mill and under the stone bridge, where children used to wait for "
    "the evening train. In winter the water is grey and quick; in summer one can count the pebbles "
    "on its bed. People who move here say that they sleep better, and nobody knows whether it is "
    "the air or the sound of the water.";

/* ---- bodies ---- */

static sh_status write_chunk(int fd, sh_sha256_state *hash, sh_slice chunk, const char *path,
                             sh_error *err)
{
    sh_sha256_update(hash, chunk.data, chunk.n);
    for (size_t at = 0; at < chunk.n;) {
        ssize_t n = write(fd, (const uint8_t *)chunk.data + at, chunk.n - at);
        if (n < 0)
            return sh_fail(err, errno == ENOSPC ? SH_ERR_FULL : SH_ERR_IO, "%s: %s", path,
                           strerror(errno));
        at += (size_t)n;
    }
    return SH_OK;
}

static sh_status write_chunks(sh_store *store, const sh_blob *blob, int fd, const char *path,
                              sh_error *err)
{
    sh_sha256_state hash;
    sh_sha256_init(&hash);
    for (uint32_t i = 0; i < blob->n_chunks; i += CHUNKS_A_READ) {
        sh_txn *txn = NULL;
        SH_TRY(sh_txn_begin(store, SH_TXN_READ, &txn, err));
        sh_status status = SH_OK;
        uint32_t end = SH_MIN(blob->n_chunks, i + CHUNKS_A_READ);
        for (uint32_t k = i; status == SH_OK && k < end; k++) {
            sh_slice chunk;
            const uint8_t *name = blob->chunk_hashes + (size_t)k * sizeof(sh_hash);
            status = sh_txn_get(txn, SH_NODE_T_CHUNK, name, sizeof(sh_hash), &chunk);
            if (status != SH_OK)
                sh_fail(err, status, "%s: chunk %u is not in the store", path, k);
            else
                status = write_chunk(fd, &hash, chunk, path, err);
        }
        sh_txn_abort(&txn);
        SH_TRY(status);
    }
    sh_hash got = sh_sha256_final(&hash);
    if (!sh_hash_equal(&got, &blob->sha256))
        return sh_fail(err, SH_ERR_CORRUPT, "%s: not the bytes that its manifest names", path);
    return SH_OK;
}

/* The blob's chunks as a file: a reader of `path` sees the old one or the new one, whole. */
static sh_status put_together(sh_store *store, const sh_blob *blob, const char *path, sh_error *err)
{
    char temporary[80];
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", temporary, strerror(errno));
    sh_status status = write_chunks(store, blob, fd, path, err);
    if (status == SH_OK)
        status = daemon_file_end(fd, temporary, path, err);
    close(fd);
    if (status != SH_OK)
        unlink(temporary);
    return status;
}

static sh_status smoke(daemon_work *work, sh_error *err)
{
    char path[64];
    sh_model *model = NULL;
    int32_t *tokens = NULL;
    size_t n = 0;
    sh_loss loss = {0};
    sh_status status = SH_OK;
    daemon_slot_path(work->job.slot, path, sizeof path);
    SH_GOTO(sh_model_open(path, &model, err));
    SH_GOTO(sh_tokenize(model->tokenizer, smoke_text, strlen(smoke_text), SH_TOKENIZE_BOS, &tokens,
                        &n, err));
    SH_GOTO(sh_model_loss(model, NULL, tokens, n, SH_MIN(SMOKE_CHUNK_TOKENS, model->config.context),
                          false, &loss, err));
    work->nll = loss.nll_sum / (double)SH_MAX(loss.n_scored, 1);
cleanup:
    free(tokens);
    sh_model_close(&model);
    return status;
}

static sh_status evaluate(sh_daemon *d, daemon_work *work, sh_error *err)
{
    sh_model *parent = NULL, *candidate = NULL;
    sh_snapshot snapshot = {0};
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_GOTO(put_together(d->store, &work->job.blob, CANDIDATE_PATH, err));
    SH_GOTO(sh_model_open(work->active, &parent, err));
    SH_GOTO(sh_model_open(CANDIDATE_PATH, &candidate, err));
    SH_GOTO(sh_txn_begin(d->store, SH_TXN_READ, &txn, err));
    status = sh_snapshot_read(txn, &snapshot, err);
    sh_txn_abort(&txn);
    if (status != SH_OK)
        goto cleanup;
    status = sh_learn_evaluate(parent, candidate, &snapshot,
                               SH_MIN(EVALUATE_CONTEXT, parent->config.context), work->slices,
                               &work->n_slices, err);
cleanup:
    sh_snapshot_release(&snapshot);
    sh_model_close(&candidate);
    sh_model_close(&parent);
    unlink(CANDIDATE_PATH);
    return status;
}

static void run(sh_daemon *d, daemon_work *work)
{
    char path[64];
    switch (work->job.kind) {
    case SH_JOB_INSTALL:
        daemon_slot_path(work->job.slot, path, sizeof path);
        daemon_slot_unpack(path);
        work->status = put_together(d->store, &work->job.blob, path, &work->err);
        break;
    case SH_JOB_SMOKE:
        work->status = smoke(work, &work->err);
        break;
    case SH_JOB_EVALUATE:
        work->status = evaluate(d, work, &work->err);
        break;
    case SH_JOB_TRAIN: /* is a child's */
        work->status = sh_fail(&work->err, SH_ERR_UNSUPPORTED, "training on the worker");
        break;
    }
}

/* ---- the thread ---- */

static void *worker_main(void *arg)
{
    sh_daemon *d = arg;
    daemon_worker *w = &d->worker;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (!w->first && !w->stop)
            pthread_cond_wait(&w->changed, &w->lock);
        if (w->stop)
            break;
        daemon_work *work = w->first;
        w->first = work->next;
        w->n--;
        w->busy = true;
        pthread_mutex_unlock(&w->lock);
        run(d, work);
        pthread_mutex_lock(&w->lock);
        w->busy = false;
        daemon_inbox_put_done(&d->inbox, work);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

sh_status daemon_worker_start(sh_daemon *d, sh_error *err)
{
    daemon_worker *w = &d->worker;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    int rc = pthread_create(&w->thread, NULL, worker_main, d);
    if (rc != 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a thread for jobs: %s", strerror(rc));
    w->started = true;
    return SH_OK;
}

static void free_work(daemon_work *work)
{
    free(work->chunks);
    free(work);
}

void daemon_worker_stop(sh_daemon *d)
{
    daemon_worker *w = &d->worker;
    if (!w->started)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    w->started = false;
    while (w->first) {
        daemon_work *work = w->first;
        w->first = work->next;
        free_work(work);
    }
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
}

bool daemon_worker_idle(sh_daemon *d)
{
    daemon_worker *w = &d->worker;
    pthread_mutex_lock(&w->lock);
    bool idle = !w->busy && !w->first;
    pthread_mutex_unlock(&w->lock);
    return idle;
}

/* ---- the loop's side ---- */

static sh_status copy_job(sh_daemon *d, const sh_node_job *job, daemon_work *work, sh_error *err)
{
    size_t n = (size_t)job->blob.n_chunks * sizeof(sh_hash);
    work->job = *job;
    work->job.blob.chunk_hashes = NULL;
    daemon_slot_path(d->active_slot, work->active, sizeof work->active);
    if (n == 0)
        return SH_OK;
    work->chunks = sh_calloc(n, 1);
    if (!work->chunks)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a job");
    memcpy(work->chunks, job->blob.chunk_hashes, n);
    work->job.blob.chunk_hashes = work->chunks;
    return SH_OK;
}

static sh_status enqueue(sh_daemon *d, daemon_work *work, sh_error *err)
{
    daemon_worker *w = &d->worker;
    sh_status status = SH_OK;
    pthread_mutex_lock(&w->lock);
    if (w->n >= DAEMON_JOBS_MAX) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "%u jobs wait already", DAEMON_JOBS_MAX);
    } else {
        daemon_work **at = &w->first;
        while (*at)
            at = &(*at)->next;
        *at = work;
        w->n++;
        pthread_cond_signal(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return status;
}

void daemon_start_job(sh_daemon *d, const sh_node_job *job)
{
    daemon_work *work = sh_calloc(1, sizeof *work);
    if (!work) {
        sh_log(SH_LOG_ERROR, "job_failed", "id=%llu status=no-memory", (unsigned long long)job->id);
        d->remake = true; /* the core starts it again */
        return;
    }
    sh_status status;
    if (job->kind == SH_JOB_TRAIN) {
        work->job = *job;
        status = daemon_start_training(d, job, &work->err);
        if (status == SH_OK) {
            free_work(work);
            return;
        }
    } else {
        status = copy_job(d, job, work, &work->err);
        if (status == SH_OK)
            status = enqueue(d, work, &work->err);
        if (status == SH_OK)
            return;
    }
    work->status = status;
    daemon_inbox_put_done(&d->inbox, work);
}

static const char *kind_name(sh_node_job_kind kind)
{
    static const char *const names[] = {"?", "train", "install", "smoke", "evaluate"};
    return names[(size_t)kind < SH_COUNT(names) ? kind : 0];
}

void daemon_drop_jobs(sh_daemon *d)
{
    daemon_work *work;
    while ((work = daemon_inbox_take_done(&d->inbox)) != NULL)
        free_work(work);
}

void daemon_end_jobs(sh_daemon *d)
{
    daemon_work *work;
    while (d->fatal == SH_OK && (work = daemon_inbox_take_done(&d->inbox)) != NULL) {
        if (work->status != SH_OK)
            sh_log(SH_LOG_WARN, "job_failed", "job=%s id=%llu status=%s error=\"%s\"",
                   kind_name(work->job.kind), (unsigned long long)work->job.id,
                   sh_status_name(work->status), work->err.text);
        else if (work->job.kind == SH_JOB_INSTALL)
            daemon_failpoint(d, "node.install");
        sh_node_event e = {.kind = SH_NODE_JOB_DONE,
                           .result = {.id = work->job.id,
                                      .status = work->status,
                                      .text = work->err.text,
                                      .nll = work->nll,
                                      .n_slices = work->n_slices}};
        memcpy(e.result.slices, work->slices, sizeof work->slices);
        (void)daemon_step(d, &e, NULL);
        free_work(work);
    }
}
