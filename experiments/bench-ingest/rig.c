/* A real aggregator: its folder, its process, and what is in its store afterwards. */
#include "experiments/bench-ingest/bench.h"

#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "aggregator/folder.h"
#include "experiments/fleet/web.h"
#include "shared/base/clock.h"
#include "shared/model/synth.h"

#define SHAPE       "tiny-llama"
#define TOOL_S      60
#define START_MS    60000u
#define STOP_MS     60000u
#define STORE_BYTES ((uint64_t)8 << 30)
#define PAGE_MAX    (1u << 20)
#define UPDATE_MAX  ((size_t)64 << 20)
#define POLL_US     5000

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

void bench_remove(const char *dir)
{
    (void)nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static sh_status read_key(const bench_rig *rig, const char *name, sh_hash *out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_path_join(path, sizeof path, rig->dir, name, err));
    SH_TRY(sh_file_read(path, 4096, &text, &n, err));
    text[strcspn((char *)text, "\n")] = '\0';
    sh_status status = sh_hash_parse((const char *)text, out, err);
    free(text);
    return status;
}

sh_status bench_rig_make(bench_rig *rig, const char *dir, sh_error *err)
{
    char base[SH_PATH_BYTES], genesis[SH_PATH_BYTES];
    uint64_t bytes = 0;
    sh_synth_options synth = {.type = SH_TYPE_F16, .seed = 1};
    fleet_words w = {0};
    *rig = (bench_rig){.endpoint = "tcp://127.0.0.1:*"};
    SH_TRY(fleet_program("shoal-aggregator", rig->program, sizeof rig->program, err));
    SH_TRY(sh_path_join(rig->dir, sizeof rig->dir, dir, "aggregator", err));
    SH_TRY(sh_path_join(rig->log, sizeof rig->log, dir, "aggregator.log", err));
    SH_TRY(sh_path_join(base, sizeof base, dir, "base.gguf", err));
    bench_remove(rig->dir);
    (void)unlink(rig->log);
    SH_TRY(sh_dir_make(dir, err));
    SH_TRY(sh_synth_find(SHAPE, &synth.shape, err));
    SH_TRY(sh_synth_model(&synth, base, err));
    fleet_words_add(&w, rig->program);
    fleet_words_add(&w, "init");
    fleet_words_addf(&w, "--dir=%s", rig->dir);
    fleet_words_addf(&w, "--base=%s", base);
    SH_TRY(fleet_run_tool(&w, rig->log, TOOL_S, err));
    SH_TRY(read_key(rig, "bundle/aggregator.pub", &rig->key, err));
    SH_TRY(sh_path_join(genesis, sizeof genesis, rig->dir, "bundle/genesis.gguf", err));
    return sh_sha256_file(genesis, &rig->base_sha256, &bytes, err);
}

static sh_status wait_ready(bench_rig *rig, sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + START_MS;
    char text[128];
    while (sh_clock_mono_ms() < end) {
        const char *line = fleet_process_line(&rig->process);
        if (line == NULL) {
            if (fleet_process_reap(&rig->process))
                return sh_fail(err, SH_ERR_IO, "shoal-aggregator ended; see %s", rig->log);
            usleep(POLL_US);
        } else if (strstr(line, "event=ready") != NULL &&
                   fleet_log_text(line, "endpoint", rig->endpoint, sizeof rig->endpoint) &&
                   fleet_log_text(line, "http", text, sizeof text)) {
            const char *colon = strrchr(text, ':');
            rig->http_port = (uint16_t)strtoul(colon == NULL ? "0" : colon + 1, NULL, 10);
            return SH_OK;
        }
    }
    return sh_fail(err, SH_ERR_IO, "shoal-aggregator is not ready after a minute; see %s",
                   rig->log);
}

sh_status bench_rig_start(bench_rig *rig, const char *const *extra, sh_error *err)
{
    fleet_words w = {0};
    fleet_words_add(&w, rig->program);
    fleet_words_addf(&w, "--dir=%s", rig->dir);
    fleet_words_addf(&w, "--listen=%s", rig->endpoint);
    fleet_words_add(&w, "--http.port=0");
    fleet_words_add(&w, "--enrol-any");
    fleet_words_addf(&w, "--store.bytes-max=%llu", (unsigned long long)STORE_BYTES);
    /* Updates stay in the buffer: merging is no part of taking them in. */
    fleet_words_addf(&w, "--learn.buffer=%u", SH_COORD_BUFFER_MAX);
    fleet_words_add(&w, "--learn.drifting-min=100000");
    for (size_t i = 0; extra != NULL && extra[i] != NULL; i++)
        fleet_words_add(&w, extra[i]);
    SH_TRY(fleet_process_start(&rig->process, &w, NULL, rig->log, err));
    return wait_ready(rig, err);
}

sh_status bench_rig_stop(bench_rig *rig, int signal_number, sh_error *err)
{
    uint64_t end = sh_clock_mono_ms() + STOP_MS;
    fleet_process_signal(&rig->process, signal_number);
    while (!fleet_process_reap(&rig->process)) {
        if (sh_clock_mono_ms() > end)
            return sh_fail(err, SH_ERR_IO, "shoal-aggregator does not end; see %s", rig->log);
        usleep(POLL_US);
    }
    return SH_OK;
}

void bench_rig_release(bench_rig *rig)
{
    fleet_process_release(&rig->process);
    if (rig->dir[0] != '\0')
        bench_remove(rig->dir);
}

double bench_rig_metric(bench_rig *rig, const char *name)
{
    static const fleet_web_request request = {.method = "GET", .path = "/metrics"};
    fleet_web web = {0};
    sh_buf page;
    int code = 0;
    double value = -1;
    size_t n = strlen(name);
    sh_buf_init(&page, PAGE_MAX);
    if (fleet_web_get(&web, rig->http_port, &request, &code, &page, NULL) == SH_OK && code == 200)
        for (const char *line = (const char *)page.data; line != NULL; line = strchr(line, '\n')) {
            line += *line == '\n';
            if (strncmp(line, name, n) == 0 && line[n] == ' ')
                value = strtod(line + n, NULL);
        }
    fleet_web_release(&web);
    sh_buf_release(&page);
    return value;
}

double bench_cpu_s(const fleet_process *process)
{
    char path[64], line[1024];
    unsigned long long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)process->pid);
    FILE *f = fopen(path, "r");
    if (f == NULL)
        return 0;
    /* The second field, a name in brackets, may hold anything. */
    const char *rest = fgets(line, sizeof line, f) != NULL ? strrchr(line, ')') : NULL;
    if (rest != NULL)
        (void)sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %llu %llu", &user,
                     &system);
    fclose(f);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

uint64_t bench_rig_peak_rss(const bench_rig *rig)
{
    char path[64], line[256];
    unsigned long long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)rig->process.pid);
    FILE *f = fopen(path, "re");
    while (f != NULL && fgets(line, sizeof line, f) != NULL)
        if (sscanf(line, "VmHWM: %llu kB", &kib) == 1)
            break;
    if (f != NULL)
        fclose(f);
    return (uint64_t)kib << 10;
}

/* ---- audit ---- */

sh_status bench_rig_store(const bench_rig *rig, sh_store **store, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, rig->dir, SH_FOLDER_STORE, err));
    return sh_store_open_lmdb(path,
                              &(sh_store_options){.tables = sh_coord_tables,
                                                  .n_tables = SH_COORD_TABLES,
                                                  .read_only = true},
                              store, err);
}

typedef struct {
    sh_txn *txn;
    sh_buf bytes;
    uint64_t whole;
    sh_error *err;
} audit;

static sh_status look_at_update(void *arg, const sh_update_row *row)
{
    audit *a = arg;
    sh_buf_clear(&a->bytes);
    SH_TRY(sh_coord_read_update(a->txn, &row->id, &a->bytes, a->err));
    a->whole++;
    return SH_OK;
}

sh_status bench_rig_audit(const bench_rig *rig, uint64_t *updates, uint64_t *windows, sh_error *err)
{
    sh_store *store = NULL;
    audit a = {.err = err};
    sh_status status = SH_OK;
    SH_TRY(bench_rig_store(rig, &store, err));
    sh_buf_init(&a.bytes, UPDATE_MAX);
    SH_GOTO(sh_txn_begin(store, SH_TXN_READ, &a.txn, err));
    SH_GOTO(sh_coord_each_update(a.txn, look_at_update, &a, err));
    *updates = a.whole;
    *windows = sh_txn_count(a.txn, SH_COORD_T_WINDOW);
cleanup:
    sh_txn_abort(&a.txn);
    sh_store_close(&store);
    sh_buf_release(&a.bytes);
    return status;
}
