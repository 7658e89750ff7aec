#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "shared/base/log.h"
#include "shared/base/memory.h"
#include "shared/math/blas.h"
#include "trainer/commands.h"
#include "trainer/program.h"
#include "trainer/snapshot.h"

#define NICE_IDLE      19
#define MEMORY_MIN     ((int64_t)16 << 20) /* below it not even a small training starts */
#define BLAS_THREADS   "OPENBLAS_NUM_THREADS"
#define BLAS_SIDE      256
#define IOPRIO_PROCESS 1 /* linux/ioprio.h, which not every system installs */
#define IOPRIO_IDLE    (3 << 13)

typedef struct {
    const char *snapshot, *model, *out, *result, *a_seed, *shuffle_seed;
    int64_t rank, batch, context, passes_milli, steps_max, warmup, tokens_min, threads;
    int64_t memory_max, parent;
    double alpha, lr, lr_final, clip;
    bool heldout, idle;
} round_options;

static const sh_option table[] = {
    SH_OPT_STRING(round_options, snapshot, 's', "snapshot", "FILE", NULL,
                  "what to train on: a snapshot that a node exported"),
    SH_OPT_STRING(round_options, model, 'm', "model", "FILE", NULL, "GGUF model to adapt"),
    SH_OPT_STRING(round_options, out, 'o', "out", "FILE", NULL, "adapter to write, GGUF"),
    SH_OPT_STRING(round_options, result, 'R', "result", "FILE", NULL,
                  "JSON to write when the adapter is there"),
    SH_OPT_STRING(round_options, a_seed, 0, "a-seed", "N", "1", "first values of A, 64 bits"),
    SH_OPT_STRING(round_options, shuffle_seed, 0, "shuffle-seed", "N", "1",
                  "order of the data, 64 bits; 0: as it is"),
    SH_OPT_INT(round_options, rank, 'r', "rank", "N", 8, 1, SH_LORA_RANK_MAX, "rank of A and B"),
    SH_OPT_REAL(round_options, alpha, 0, "alpha", "X", 16, 1e-6, 1e6, "scale is alpha / rank"),
    SH_OPT_REAL(round_options, lr, 0, "lr", "X", 5e-3, 0, 1e3, "peak learning rate"),
    SH_OPT_REAL(round_options, lr_final, 0, "lr-final", "X", 1, 0, 1e3,
                "share of the learning rate at the end (linear decay)"),
    SH_OPT_REAL(round_options, clip, 0, "clip", "X", 1, 0, 1e9,
                "largest gradient norm; 0: no clipping"),
    SH_OPT_INT(round_options, batch, 'b', "batch", "N", 4, 1, 65536, "sequences a step"),
    SH_OPT_INT(round_options, context, 'c', "context", "N", 128, 1, SH_CONTEXT_MAX,
               "tokens a sequence"),
    SH_OPT_INT(round_options, passes_milli, 0, "passes-milli", "N", 1000, 1, UINT32_MAX,
               "passes over the data, in thousandths"),
    SH_OPT_INT(round_options, steps_max, 0, "steps-max", "N", 1000, 1, UINT32_MAX,
               "optimizer steps at most"),
    SH_OPT_INT(round_options, warmup, 0, "warmup", "N", 0, 0, UINT32_MAX,
               "steps of linear warm-up"),
    SH_OPT_INT(round_options, tokens_min, 0, "tokens-min", "N", 0, 0, UINT32_MAX,
               "fail when there are fewer target tokens"),
    SH_OPT_INT(round_options, threads, 't', "threads", "N", 1, 1, 256, "worker threads"),
    SH_OPT_FLAG(round_options, heldout, 0, "heldout",
                "hold one text in eight out, and report its loss before and after"),
    SH_OPT_FLAG(round_options, idle, 0, "idle",
                "run when nobody else wants the processor or the disk"),
    SH_OPT_INT(
        round_options, memory_max, 0, "memory-max", "BYTES", 0, 0, 1ll << 50,
        "work in so much memory, slower, and fail rather than take more (neither the mapped model "
        "nor what the program has at its start is counted; needs --threads 1); 0: no limit"),
    SH_OPT_INT(round_options, parent, 0, "parent", "PID", 0, 0, INT32_MAX,
               "die with this process, which must be the one that started the program; 0: none"),
};
const sh_command sh_round_command = {
    TP_PROGRAM " round",
    "--snapshot FILE --model FILE --out UPDATE.gguf --result RESULT.json",
    table,
    SH_COUNT(table),
    "One round's training of a node: a LoRA adapter on a snapshot of its feedback. Prints a line "
    "'step K/N' after every step. The files are written whole or not at all, the result last; it "
    "says samples, tokens_seen, heldout_before, heldout_after, steps and the update's sha256.",
    TP_PROGRAM " round --snapshot work/snapshot --model models/slot0.gguf --out work/update.gguf "
               "--result work/result.json --rank 8 --heldout --idle --memory-max 1000000000"};

static sh_status check_options(const round_options *o, sh_error *err)
{
    const struct {
        const char *value, *key;
    } needed[] = {
        {o->snapshot, "snapshot"}, {o->model, "model"}, {o->out, "out"}, {o->result, "result"}};
    for (size_t i = 0; i < SH_COUNT(needed); i++)
        if (!needed[i].value)
            return sh_fail(err, SH_ERR_USAGE, "--%s is missing", needed[i].key);
    if (o->memory_max > 0 && o->memory_max < MEMORY_MIN)
        return sh_fail(err, SH_ERR_USAGE, "--memory-max is below %lld: no training fits in that",
                       (long long)MEMORY_MIN);
    if (o->memory_max > 0 && o->threads != 1)
        return sh_fail(
            err, SH_ERR_USAGE,
            "--memory-max needs --threads 1: OpenBLAS has working memory for each thread, "
            "and no way to fail without it");
    return SH_OK;
}

static sh_status parse_seed(const char *text, const char *key, uint64_t *out, sh_error *err)
{
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0)
        return sh_fail(err, SH_ERR_USAGE, "--%s: '%s' is no number from 0 to 2^64 - 1", key, text);
    *out = value;
    return SH_OK;
}

/* ---- the process ---- */

/* The signal comes when the thread ends that started this process, so a parent starts it from one
 * that lives on. The parent may have ended before prctl: then we have another one already. */
static sh_status bind_to_parent(int64_t parent, sh_error *err)
{
    if (parent == 0)
        return SH_OK;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
        return sh_fail(err, SH_ERR_IO, "--parent: %s", strerror(errno));
    if (getppid() != (pid_t)parent)
        return sh_fail(err, SH_ERR_CANCELLED, "--parent: process %lld did not start this one",
                       (long long)parent);
    return SH_OK;
}

/* Where the system forbids one of them, the others still help. */
static void be_idle(void)
{
    const struct sched_param none = {0};
    if (sched_setscheduler(0, SCHED_IDLE, &none) != 0)
        sh_log(SH_LOG_WARN, "idle", "step=scheduler error=\"%s\"", strerror(errno));
    if (setpriority(PRIO_PROCESS, 0, NICE_IDLE) != 0)
        sh_log(SH_LOG_WARN, "idle", "step=nice error=\"%s\"", strerror(errno));
    if (syscall(SYS_ioprio_set, IOPRIO_PROCESS, 0, IOPRIO_IDLE) != 0)
        sh_log(SH_LOG_WARN, "idle", "step=io error=\"%s\"", strerror(errno));
}

/* OpenBLAS starts a thread for each other processor when it is loaded, and each takes memory of its
 * own when it gets to run: one that comes to it after the limit is set would try for ever, with a
 * lock in its hands. Only the environment stops them from being started, so the program starts once
 * more with it. argv[-1] is the program's name. */
static sh_status without_blas_threads(char **argv, sh_error *err)
{
    const char *threads = getenv(BLAS_THREADS);
    if (threads && strcmp(threads, "1") == 0)
        return SH_OK;
    if (setenv(BLAS_THREADS, "1", 1) == 0)
        execv("/proc/self/exe", argv - 1);
    return sh_fail(err, SH_ERR_IO, "--memory-max: cannot start without BLAS threads: %s",
                   strerror(errno));
}

/* A product that is large enough for OpenBLAS to take its working memory, which it keeps: without
 * memory for it OpenBLAS would try again for ever. */
static sh_status reserve_blas(sh_error *err)
{
    size_t n = (size_t)BLAS_SIDE * BLAS_SIDE;
    float *x = sh_alloc_aligned(3 * n * sizeof *x);
    if (!x)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a first product");
    sh_blas_init();
    sh_sgemm(&(sh_gemm){.m = BLAS_SIDE,
                        .n = BLAS_SIDE,
                        .k = BLAS_SIDE,
                        .alpha = 1,
                        .a = x,
                        .lda = BLAS_SIDE,
                        .b = x + n,
                        .ldb = BLAS_SIDE,
                        .c = x + 2 * n,
                        .ldc = BLAS_SIDE});
    free(x);
    return SH_OK;
}

/* Data, not address space: a mapped model costs no memory of its own, and libraries reserve
 * addresses that they never touch. */
static sh_status limit_memory(int64_t bytes, sh_error *err)
{
    if (bytes == 0)
        return SH_OK;
    SH_TRY(reserve_blas(err));
    const uint64_t now = sh_memory_now().data;
    if (now == 0)
        return sh_fail(err, SH_ERR_IO, "--memory-max: /proc/self/statm cannot be read");
    const struct rlimit limit = {now + (rlim_t)bytes, now + (rlim_t)bytes};
    if (setrlimit(RLIMIT_DATA, &limit) != 0)
        return sh_fail(err, SH_ERR_IO, "--memory-max: %s", strerror(errno));
    return SH_OK;
}

static bool on_step(void *arg, uint32_t step, uint32_t steps, double loss)
{
    const round_options *o = arg;
    (void)loss;
    printf("step %u/%u\n", step, steps);
    fflush(stdout);
    return !sh_train_interrupted && (o->parent == 0 || getppid() == (pid_t)o->parent);
}

/* ---- the result ---- */

static sh_status save_result(const round_options *o, const sh_round_result *r, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    sh_hash sha256 = sh_sha256(r->update.data, r->update.len);
    sh_hex(sha256.b, sizeof sha256.b, hex);
    SH_TRY(sh_file_write_private(o->out, r->update.data, r->update.len, err));
    json_t *j = json_object();
    sh_json_set(j, "samples", json_integer((json_int_t)r->samples));
    sh_json_set(j, "tokens_seen", json_integer((json_int_t)r->tokens_seen));
    sh_json_set(j, "heldout_before", sh_json_number(r->heldout_before));
    sh_json_set(j, "heldout_after", sh_json_number(r->heldout_after));
    sh_json_set(j, "steps", json_integer(r->steps));
    sh_json_set(j, "sha256", json_string(hex));
    sh_json_set(j, "bytes", json_integer((json_int_t)r->update.len));
    sh_json_set(j, "blas_core", json_string(sh_blas_core()));
    sh_status status = sh_json_save(o->result, j, err);
    json_decref(j);
    return status;
}

/* The rest is for what is not planned: samples, the update, the allocator's own. */
static uint64_t plan_bytes(int64_t memory_max)
{
    return (uint64_t)memory_max / 4 * 3;
}

static sh_status make_options(round_options *o, sh_round_options *out, sh_error *err)
{
    *out = (sh_round_options){.rank = (uint32_t)o->rank,
                              .alpha = (float)o->alpha,
                              .lr = (float)o->lr,
                              .lr_final = (float)o->lr_final,
                              .clip = (float)o->clip,
                              .batch = (uint32_t)o->batch,
                              .context = (uint32_t)o->context,
                              .passes_milli = (uint32_t)o->passes_milli,
                              .steps_max = (uint32_t)o->steps_max,
                              .warmup = (uint32_t)o->warmup,
                              .tokens_min = (uint32_t)o->tokens_min,
                              .threads = (unsigned)o->threads,
                              .memory_max = plan_bytes(o->memory_max),
                              .heldout = o->heldout,
                              .progress = on_step,
                              .progress_arg = o};
    SH_TRY(parse_seed(o->a_seed, "a-seed", &out->a_seed, err));
    return parse_seed(o->shuffle_seed, "shuffle-seed", &out->shuffle_seed, err);
}

sh_status sh_round_main(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    round_options o = {0};
    sh_args args = {0};
    sh_model *model = NULL;
    sh_snapshot snapshot = {0};
    sh_round_options options;
    sh_round_result result = {0};

    SH_GOTO(sh_options_parse(&sh_round_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(tp_no_words(&sh_round_command, &args, err));
    SH_GOTO(check_options(&o, err));
    SH_GOTO(make_options(&o, &options, err));
    SH_GOTO(sh_crypto_init(err));
    tp_catch_signals();
    SH_GOTO(bind_to_parent(o.parent, err));
    if (o.memory_max > 0)
        SH_GOTO(without_blas_threads(argv, err));
    if (o.idle)
        be_idle();
    SH_GOTO(limit_memory(o.memory_max, err));
    SH_GOTO(sh_model_open(o.model, &model, err));
    SH_GOTO(sh_snapshot_load(o.snapshot, &snapshot, err));
    SH_GOTO(sh_round_train(model, &snapshot, &options, &result, err));
    SH_GOTO(save_result(&o, &result, err));
cleanup:
    if (status == SH_ERR_NO_MEMORY && o.memory_max > 0)
        sh_fail_in(err, "--memory-max of %lld bytes is too small for this training",
                   (long long)o.memory_max);
    sh_round_result_release(&result);
    sh_snapshot_release(&snapshot);
    sh_model_close(&model);
    sh_args_release(&args);
    return status;
}
