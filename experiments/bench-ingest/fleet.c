/*
 * The return of a whole fleet: every node is connected and has been acknowledged a window; each
 * makes another one, and in the middle of these the aggregator is killed (SIGKILL). When all know
 * that it is gone each makes a third, the aggregator starts again, and all return at once.
 * Measured: until every node was answered, and until everything owed is acknowledged; what the
 * aggregator took of memory at most. Then its store is audited: what a node was acknowledged is
 * there.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "experiments/bench-ingest/bench.h"
#include "shared/base/clock.h"

#define FDS_EACH      6u /* of a client: four, and more while it dials again */
#define FDS_SPARE     500u
#define PROCESSES_MAX 64u
#define STAGE_MS      600000u
#define KILL_SHARE    0.3 /* of the second windows acknowledged, when the aggregator is killed */
#define WINDOWS       3   /* of each node: before, amid and after */
#define ACKED_MAX     ((size_t)64 << 20)
#define POLL_US       2000

typedef struct {
    fleet_process process;
    char log[SH_PATH_BYTES], out[SH_PATH_BYTES];
    size_t n;
    double up, answered, done, acked, later; /* as of its last line */
} crowd;

typedef struct {
    const bench_options *options;
    bench_rig rig;
    crowd crowds[PROCESSES_MAX];
    size_t n_crowds;
    double up, answered, done, acked, later; /* sums */
    uint64_t peak_rss;
} fleet_run;

static sh_status start_crowd(fleet_run *f, size_t i, size_t n, sh_error *err)
{
    char program[SH_PATH_BYTES], hex[SH_HASH_HEX_BYTES], name[64];
    crowd *c = &f->crowds[i];
    fleet_words w = {0};
    c->n = n;
    SH_TRY(fleet_program("shoal-bench-ingest", program, sizeof program, err));
    snprintf(name, sizeof name, "clients-%zu.log", i);
    SH_TRY(sh_path_join(c->log, sizeof c->log, f->options->dir, name, err));
    snprintf(name, sizeof name, "clients-%zu.acked", i);
    SH_TRY(sh_path_join(c->out, sizeof c->out, f->options->dir, name, err));
    (void)unlink(c->log);
    (void)unlink(c->out);
    sh_hex(f->rig.key.b, 32, hex);
    fleet_words_add(&w, program);
    fleet_words_add(&w, "--child=clients");
    fleet_words_addf(&w, "--endpoint=%s", f->rig.endpoint);
    fleet_words_addf(&w, "--server-key=%s", hex);
    fleet_words_addf(&w, "--out=%s", c->out);
    fleet_words_int(&w, "connections", (int64_t)n);
    return fleet_process_start(&c->process, &w, NULL, c->log, err);
}

static sh_status start_crowds(fleet_run *f, sh_error *err)
{
    size_t left = (size_t)f->options->connections, n = (size_t)f->options->processes;
    size_t each = (size_t)((sh_net_raise_descriptors() - FDS_SPARE) / FDS_EACH);
    if (n == 0)
        n = (left + each - 1) / each;
    if (n > PROCESSES_MAX || (left + n - 1) / n > each)
        return sh_fail(err, SH_ERR_LIMIT,
                       "%zu connections of %zu processes: more descriptors than a process may have",
                       left, n);
    f->n_crowds = n;
    for (size_t i = 0; i < n; i++) {
        size_t share = left / (n - i);
        SH_TRY(start_crowd(f, i, share, err));
        left -= share;
    }
    return SH_OK;
}

/* Reads what the clients say. */
static sh_status look(fleet_run *f, sh_error *err)
{
    f->up = f->answered = f->done = f->acked = f->later = 0;
    for (size_t i = 0; i < f->n_crowds; i++) {
        crowd *c = &f->crowds[i];
        for (const char *line; (line = fleet_process_line(&c->process)) != NULL;) {
            if (strstr(line, "event=failed") != NULL)
                return sh_fail(err, SH_ERR_IO, "clients: %s", line);
            if (strstr(line, "event=state") == NULL)
                continue;
            (void)fleet_log_number(line, "up", &c->up);
            (void)fleet_log_number(line, "answered", &c->answered);
            (void)fleet_log_number(line, "done", &c->done);
            (void)fleet_log_number(line, "acked", &c->acked);
            (void)fleet_log_number(line, "later", &c->later);
        }
        if (fleet_process_reap(&c->process))
            return sh_fail(err, SH_ERR_IO, "clients ended; see %s", c->log);
        f->up += c->up;
        f->answered += c->answered;
        f->done += c->done;
        f->acked += c->acked;
        f->later += c->later;
    }
    if (f->rig.process.pid != 0) {
        f->peak_rss = SH_MAX(f->peak_rss, bench_rig_peak_rss(&f->rig));
        if (fleet_process_reap(&f->rig.process))
            return sh_fail(err, SH_ERR_IO, "shoal-aggregator ended; see %s", f->rig.log);
    }
    (void)usleep(POLL_US);
    return SH_OK;
}

typedef bool (*stage)(const fleet_run *f);

static bool all_done(const fleet_run *f)
{
    return f->done >= (double)f->options->connections;
}

static bool some_second(const fleet_run *f)
{
    return f->acked >= (1 + KILL_SHARE) * (double)f->options->connections;
}

static bool all_down(const fleet_run *f)
{
    return f->up == 0;
}

static bool all_answered(const fleet_run *f)
{
    return f->answered >= (double)f->options->connections;
}

static bool all_acked(const fleet_run *f)
{
    return all_done(f) && f->acked >= WINDOWS * (double)f->options->connections;
}

static sh_status wait_for(fleet_run *f, stage reached, const char *what, sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + STAGE_MS;
    for (;;) {
        SH_TRY(look(f, err));
        if (reached(f))
            break;
        if (sh_clock_mono_ms() > end)
            return sh_fail(err, SH_ERR_IO, "%s: not after ten minutes (%.0f up, %.0f done)", what,
                           f->up, f->done);
    }
    fprintf(stderr, "%s: %.0f up, %.0f acknowledged, %.0f told later\n", what, f->up, f->acked,
            f->later);
    return SH_OK;
}

static void signal_all(const fleet_run *f, int number)
{
    for (size_t i = 0; i < f->n_crowds; i++)
        fleet_process_signal(&f->crowds[i].process, number);
}

/* ---- audit ---- */

static sh_status audit_file(const char *path, sh_txn *txn, uint64_t *acked, uint64_t *missing,
                            sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    sh_status status = SH_OK;
    SH_TRY(sh_file_read(path, ACKED_MAX, &text, &n, err));
    char *rest = NULL;
    for (char *line = strtok_r((char *)text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        char *space = strchr(line, ' ');
        sh_hash node;
        uint8_t key[48];
        if (space == NULL)
            SH_GOTO(sh_fail(err, SH_ERR_CORRUPT, "%s: a line without a number", path));
        *space = '\0';
        SH_GOTO(sh_hash_parse(line, &node, err));
        memcpy(key, node.b, 32);
        sh_key_put_u64(key + 32, 1);
        for (uint64_t seq = 1; seq <= strtoull(space + 1, NULL, 10); seq++) {
            sh_key_put_u64(key + 40, seq);
            ++*acked;
            *missing += sh_txn_get(txn, SH_COORD_T_WINDOW, key, sizeof key, NULL) != SH_OK;
        }
    }
cleanup:
    free(text);
    return status;
}

static sh_status audit(const fleet_run *f, uint64_t *acked, uint64_t *missing, uint64_t *stored,
                       sh_error *err)
{
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    SH_TRY(bench_rig_store(&f->rig, &store, err));
    SH_GOTO(sh_txn_begin(store, SH_TXN_READ, &txn, err));
    for (size_t i = 0; i < f->n_crowds; i++)
        SH_GOTO(audit_file(f->crowds[i].out, txn, acked, missing, err));
    *stored = sh_txn_count(txn, SH_COORD_T_WINDOW);
cleanup:
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return status;
}

static sh_status end_crowds(fleet_run *f, sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + STAGE_MS;
    signal_all(f, SIGTERM);
    for (size_t i = 0; i < f->n_crowds; i++)
        while (!fleet_process_reap(&f->crowds[i].process)) {
            if (sh_clock_mono_ms() > end)
                return sh_fail(err, SH_ERR_IO, "clients do not end; see %s", f->crowds[i].log);
            (void)usleep(POLL_US);
        }
    return SH_OK;
}

/* ---- the run ---- */

static sh_status play(fleet_run *f, json_t *result, sh_error *err)
{
    char threads[32], connections[48], rate[64];
    uint64_t acked = 0, missing = 0, stored = 0;
    snprintf(threads, sizeof threads, "--io-threads=%lld", (long long)f->options->io_threads);
    snprintf(connections, sizeof connections, "--connections-max=%lld",
             (long long)f->options->connections + 100);
    snprintf(rate, sizeof rate, "--limit.checkins-per-second=%lld", (long long)f->options->rate);
    const char *const words[] = {threads, connections, f->options->rate > 0 ? rate : NULL, NULL};
    SH_TRY(bench_rig_make(&f->rig, f->options->dir, err));
    SH_TRY(bench_rig_start(&f->rig, words, err));
    double begin = bench_now_ms();
    SH_TRY(start_crowds(f, err));
    SH_TRY(wait_for(f, all_done, "connected, enrolled, first window", err));
    sh_json_set(result, "first_seconds", sh_json_number((bench_now_ms() - begin) / 1000));
    sh_json_set(result, "first_later", sh_json_number(f->later));
    double later = f->later;
    signal_all(f, SIGUSR1);
    SH_TRY(wait_for(f, some_second, "amid the second window", err));
    SH_TRY(bench_rig_stop(&f->rig, SIGKILL, err));
    SH_TRY(wait_for(f, all_down, "killed", err));
    signal_all(f, SIGUSR1); /* every one of them owes something when it returns */
    sh_json_set(result, "acked_at_kill", sh_json_number(f->acked));
    begin = bench_now_ms();
    SH_TRY(bench_rig_start(&f->rig, words, err));
    double ready = bench_now_ms();
    sh_json_set(result, "start_seconds", sh_json_number((ready - begin) / 1000));
    SH_TRY(wait_for(f, all_answered, "all answered", err));
    sh_json_set(result, "answered_seconds", sh_json_number((bench_now_ms() - ready) / 1000));
    SH_TRY(wait_for(f, all_acked, "all acknowledged", err));
    sh_json_set(result, "acked_seconds", sh_json_number((bench_now_ms() - ready) / 1000));
    sh_json_set(result, "return_later", sh_json_number(f->later - later));
    (void)usleep(1200 * 1000); /* the page of metrics follows each second */
    sh_json_set(result, "commits",
                sh_json_number(bench_rig_metric(&f->rig, "shoal_aggregator_commits_total")));
    sh_json_set(result, "messages",
                sh_json_number(bench_rig_metric(
                    &f->rig, "shoal_aggregator_messages_total{direction=\"in\"}")));
    sh_json_set(
        result, "handshakes_failed",
        sh_json_number(bench_rig_metric(&f->rig, "shoal_aggregator_handshakes_refused_total")));
    SH_TRY(look(f, err));
    SH_TRY(end_crowds(f, err));
    SH_TRY(bench_rig_stop(&f->rig, SIGTERM, err));
    SH_TRY(audit(f, &acked, &missing, &stored, err));
    sh_json_set(result, "acknowledged", sh_json_uint(acked));
    sh_json_set(result, "missing", sh_json_uint(missing));
    sh_json_set(result, "stored", sh_json_uint(stored));
    sh_json_set(result, "peak_rss_bytes", sh_json_uint(f->peak_rss));
    if (missing > 0)
        return sh_fail(err, SH_ERR_CORRUPT, "%llu acknowledged windows are not in the store",
                       (unsigned long long)missing);
    return SH_OK;
}

sh_status bench_return(const bench_options *o, json_t **result, sh_error *err)
{
    fleet_run *f = sh_calloc(1, sizeof *f);
    if (f == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory");
    f->options = o;
    json_t *root = json_object();
    sh_json_set(root, "connections", json_integer(o->connections));
    sh_status status = play(f, root, err);
    for (size_t i = 0; i < f->n_crowds; i++)
        fleet_process_release(&f->crowds[i].process);
    bench_rig_release(&f->rig);
    free(f);
    if (status == SH_OK)
        *result = root;
    else
        json_decref(root);
    return status;
}
