/*
 * Training: a snapshot of the feedback in work/, and `shoal-train round` on it and the active
 * slot's model. The child never sees the store. It dies with the daemon (--parent), and is killed
 * when the core cancels; what it leaves in work/ is removed.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/log.h"

#define SNAPSHOT_PATH    SH_NODE_DIR_WORK "/snapshot"
#define UPDATE_PATH      SH_NODE_DIR_WORK "/update.gguf"
#define RESULT_PATH      SH_NODE_DIR_WORK "/result.json"
#define UPDATE_BYTES_MAX ((size_t)64 << 20)
#define ARGS_MAX         40

void daemon_empty_work(void)
{
    DIR *dir = opendir(SH_NODE_DIR_WORK);
    if (!dir)
        return;
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            (void)unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
}

static sh_status export_snapshot(sh_daemon *d, sh_error *err)
{
    sh_snapshot snapshot = {0};
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_txn_begin(d->store, SH_TXN_READ, &txn, err));
    status = sh_snapshot_read(txn, &snapshot, err);
    sh_txn_abort(&txn);
    if (status == SH_OK)
        status = sh_snapshot_save(&snapshot, SNAPSHOT_PATH, err);
cleanup:
    sh_snapshot_release(&snapshot);
    return status;
}

sh_status daemon_start_training(sh_daemon *d, const sh_node_job *job, sh_error *err)
{
    const sh_node_settings_values *v = &d->settings->v;
    char model[64], memory[48], parent[48];
    const char *argv[ARGS_MAX] = {
        d->settings->program, "round",     "--snapshot", SNAPSHOT_PATH, "--out", UPDATE_PATH,
        "--result",           RESULT_PATH, "--model",    model,         memory,  parent};
    size_t n = 12;
    sh_learn_words words = {0};
    sh_learn_options o = {
        .plan = job->train, .shuffle_seed = sh_rng_u64(&d->rng) | 1, .threads = 1, .heldout = true};
    if (!v->train)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "training is off (train.enabled)");
    if (d->child.pid != 0)
        return sh_fail(err, SH_ERR_LIMIT, "a training runs already");
    daemon_slot_path(d->active_slot, model, sizeof model);
    snprintf(memory, sizeof memory, "--memory-max=%lld", (long long)v->train_memory_max);
    snprintf(parent, sizeof parent, "--parent=%ld", (long)getpid());
    if (v->train_idle)
        argv[n++] = "--idle";
    sh_learn_make_words(&o, &words);
    for (size_t i = 0; i < words.n && n < ARGS_MAX - 1; i++)
        argv[n++] = words.words[i];
    daemon_empty_work();
    SH_TRY(export_snapshot(d, err));
    sh_status status = sh_child_start(argv, &d->child, err);
    if (status != SH_OK) {
        daemon_empty_work();
        return status;
    }
    d->child_job = job->id;
    d->child_round = job->train.round;
    d->child_half = false;
    return SH_OK;
}

void daemon_cancel_training(sh_daemon *d)
{
    if (d->child.pid == 0)
        return;
    sh_child_release(&d->child);
    daemon_empty_work();
    d->child_job = 0;
    pthread_mutex_lock(&d->stats_lock);
    d->stats.trainings_cancelled++;
    pthread_mutex_unlock(&d->stats_lock);
    sh_log(SH_LOG_INFO, "train_cancelled", "round=%u", d->child_round);
}

static sh_status read_u64(const json_t *o, const char *key, uint64_t *out, sh_error *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return sh_fail(err, SH_ERR_INVALID, "%s: no %s", RESULT_PATH, key);
    *out = (uint64_t)json_integer_value(v);
    return SH_OK;
}

static sh_status read_real(const json_t *o, const char *key, double *out, sh_error *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_number(v))
        return sh_fail(err, SH_ERR_INVALID, "%s: no %s", RESULT_PATH, key);
    *out = json_number_value(v);
    return SH_OK;
}

/* *update is the caller's. */
static sh_status read_result(sh_node_job_result *r, uint8_t **update, sh_error *err)
{
    json_t *o = NULL;
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_hash wanted, got;
    sh_status status = SH_OK;
    SH_GOTO(sh_json_load(RESULT_PATH, &o, err));
    SH_GOTO(read_u64(o, "samples", &r->samples, err));
    SH_GOTO(read_u64(o, "tokens_seen", &r->tokens_seen, err));
    SH_GOTO(read_real(o, "heldout_before", &r->heldout_before, err));
    SH_GOTO(read_real(o, "heldout_after", &r->heldout_after, err));
    const char *hex = json_string_value(json_object_get(o, "sha256"));
    SH_GOTO(sh_hash_parse(hex ? hex : "", &wanted, err));
    SH_GOTO(sh_file_read(UPDATE_PATH, UPDATE_BYTES_MAX, &bytes, &n, err));
    got = sh_sha256(bytes, n);
    if (!sh_hash_equal(&wanted, &got))
        SH_GOTO(sh_fail(err, SH_ERR_CORRUPT, "%s: not what %s names", UPDATE_PATH, RESULT_PATH));
    r->update = (sh_bytes){bytes, n};
    *update = bytes;
    bytes = NULL;
cleanup:
    free(bytes);
    json_decref(o);
    return status;
}

static void end_training(sh_daemon *d, sh_status status, sh_error *err)
{
    uint8_t *update = NULL;
    sh_node_event e = {.kind = SH_NODE_JOB_DONE, .result = {.id = d->child_job, .text = err->text}};
    if (status == SH_OK)
        status = read_result(&e.result, &update, err);
    e.result.status = status;
    if (status == SH_OK)
        sh_log(SH_LOG_INFO, "train_done",
               "round=%u samples=%llu tokens_seen=%llu before=%.4f after=%.4f", d->child_round,
               (unsigned long long)e.result.samples, (unsigned long long)e.result.tokens_seen,
               e.result.heldout_before, e.result.heldout_after);
    else
        sh_log(SH_LOG_WARN, "job_failed", "job=train id=%llu status=%s error=\"%s\"",
               (unsigned long long)d->child_job, sh_status_name(status), err->text);
    pthread_mutex_lock(&d->stats_lock);
    if (status == SH_OK)
        d->stats.trainings_ok++;
    else
        d->stats.trainings_failed++;
    pthread_mutex_unlock(&d->stats_lock);
    d->child_job = 0;
    daemon_empty_work();
    (void)daemon_step(d, &e, NULL);
    free(update);
}

void daemon_watch_training(sh_daemon *d)
{
    sh_error err = {0};
    sh_status status;
    if (d->child.pid == 0)
        return;
    bool more = sh_child_read(&d->child);
    if (!d->child_half && d->child.steps && d->child.step * 2 >= d->child.steps) {
        d->child_half = true;
        daemon_failpoint(d, "node.train");
    }
    if (!more && sh_child_ended(&d->child, &status, &err))
        end_training(d, status, &err);
}
