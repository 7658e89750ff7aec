#include "trainer/program.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/json.h"
#include "shared/base/memory.h"
#include "shared/math/bf16.h"
#include "shared/math/blas.h"

#define PLAIN_EVERY_S    5.0 /* between progress lines when stderr is no terminal */
#define TERMINAL_EVERY_S 0.2
#define SMOOTHED_STEPS   20.0
#define FILE_CHECKPOINT  "checkpoint"
#define FILE_METRICS     "metrics.jsonl"
#define METRICS_LINE_MAX 512

volatile sig_atomic_t sh_train_interrupted;

static void on_signal(int number)
{
    (void)number;
    sh_train_interrupted = 1;
}

void tp_catch_signals(void)
{
    /* A second one ends it at once, should what it does now take long. */
    struct sigaction stop = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND},
                     ignore = {.sa_handler = SIG_IGN};
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGXFSZ, &ignore, NULL); /* a limit of file sizes is an error of the write */
}

/* ---- options ---- */

sh_status tp_no_words(const sh_command *command, const sh_args *args, sh_error *err)
{
    return args->n_positional == 0 ? SH_OK
                                   : sh_fail(err, SH_ERR_USAGE, "'%s' is no option (see %s --help)",
                                             args->positional[0], command->name);
}

sh_status tp_need(const char *value, const char *key, sh_error *err)
{
    return value && value[0] ? SH_OK : sh_fail(err, SH_ERR_USAGE, "--%s is missing", key);
}

sh_status tp_choose(const char *key, const char *value, const char *const *names, size_t n,
                    size_t *out, sh_error *err)
{
    char list[128] = "";
    for (size_t i = 0, at = 0; i < n; i++) {
        if (strcmp(names[i], value) == 0) {
            *out = i;
            return SH_OK;
        }
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", i > 0 ? ", " : "", names[i]);
    }
    return sh_fail(err, SH_ERR_USAGE, "--%s: '%.40s' is none of %s", key, value, list);
}

sh_status tp_long_samples(const char *name, sh_long_samples *out, sh_error *err)
{
    static const char *const names[] = {"refuse", "skip", "split"};
    size_t which = 0;
    SH_TRY(tp_choose("long-samples", name, names, SH_COUNT(names), &which, err));
    *out = (sh_long_samples)which;
    return SH_OK;
}

sh_status tp_quantize_aware(const char *name, sh_type *out, sh_error *err)
{
    static const char *const names[] = {"Q8_0", "Q4_0"};
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    size_t which = 0;
    *out = SH_TYPE_F32;
    if (!name)
        return SH_OK;
    SH_TRY(tp_choose("quantize-aware", name, names, SH_COUNT(names), &which, err));
    *out = types[which];
    return SH_OK;
}

sh_status tp_written_type(const char *key, const char *name, sh_type *out, sh_error *err)
{
    sh_type type;
    SH_TRY(sh_type_parse(name, &type, err));
    if (!sh_type_get((uint32_t)type)->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "--%s: %s cannot be written; F32, F16, BF16, Q8_0 and Q4_0 can", key, name);
    *out = type;
    return SH_OK;
}

static sh_status check_options(const tp_options *o, sh_error *err)
{
    SH_TRY(tp_need(o->data, "data", err));
    SH_TRY(tp_need(o->out, "out", err));
    const bool heldout = o->heldout || o->heldout_share > 0;
    if (o->heldout && o->heldout_share > 0)
        return sh_fail(err, SH_ERR_USAGE, "--heldout and --heldout-share: one of them");
    if ((o->heldout_every > 0 || o->patience > 0) && !heldout)
        return sh_fail(err, SH_ERR_USAGE,
                       "--heldout-every and --patience need --heldout or --heldout-share");
    if (o->patience > 0 && o->heldout_every == 0)
        return sh_fail(err, SH_ERR_USAGE, "--patience counts measurements: give --heldout-every");
    return SH_OK;
}

sh_status tp_parse(const sh_command *command, int argc, char **argv, void *options, sh_args *args,
                   sh_error *err)
{
    tp_options *o = options;
    char config[SH_PATH_BYTES];
    SH_TRY(sh_options_parse(command, argc, argv, options, args, err));
    if (args->help)
        return SH_OK;
    if (o->config) {
        if (strlen(o->config) >= sizeof config)
            return sh_fail(err, SH_ERR_USAGE, "--config: the path is too long");
        snprintf(config, sizeof config, "%s", o->config);
        SH_TRY(sh_options_parse_file(command, config, argc, argv, options, args, err));
    }
    SH_TRY(tp_no_words(command, args, err));
    return check_options(o, err);
}

/* ---- paths ---- */

static sh_status append(char out[SH_PATH_BYTES], const char *path, const char *suffix,
                        sh_error *err)
{
    if (snprintf(out, SH_PATH_BYTES, "%s%s", path, suffix) >= SH_PATH_BYTES)
        return sh_fail(err, SH_ERR_USAGE, "--out: the path is too long");
    return SH_OK;
}

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* Before hours of training: a file is begun beside it, and removed. */
static sh_status check_writable(const char *path, sh_error *err)
{
    sh_file_writer writer = {0};
    SH_TRY(sh_file_writer_open_private(path, &writer, err));
    sh_file_writer_abandon(&writer);
    return SH_OK;
}

static sh_status check_folder(const char *folder, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_dir_make(folder, err));
    SH_TRY(sh_path_join(path, sizeof path, folder, "adapter_config.json", err));
    return check_writable(path, err);
}

sh_status tp_check_output(const char *path, const char *const *inputs, size_t n, sh_error *err)
{
    struct stat out, in;
    if (stat(path, &out) != 0)
        return SH_OK;
    for (size_t i = 0; i < n; i++)
        if (inputs[i] && stat(inputs[i], &in) == 0 && in.st_dev == out.st_dev &&
            in.st_ino == out.st_ino)
            return sh_fail(err, SH_ERR_USAGE,
                           "cannot write %s: it is %s, which is read; choose another name", path,
                           inputs[i]);
    if (S_ISREG(out.st_mode) && (out.st_mode & (S_IWUSR | S_IWGRP | S_IWOTH)) == 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "cannot write %s: that file is read-only; choose another name", path);
    return SH_OK;
}

/* Before anything is read or written. */
static sh_status check_outputs(const tp_run *run, const tp_source *source, sh_error *err)
{
    const tp_options *o = run->o;
    const char *const inputs[] = {o->data,   o->heldout,        o->teacher,
                                  o->config, source->inputs[0], source->inputs[1]};
    const char *const outputs[] = {run->out, run->metrics, run->checkpoint, source->outputs[0]};
    for (size_t i = 0; i < SH_COUNT(outputs); i++) {
        if (!outputs[i] || !outputs[i][0])
            continue;
        for (size_t k = 0; k < i; k++)
            if (outputs[k] && strcmp(outputs[k], outputs[i]) == 0)
                return sh_fail(err, SH_ERR_USAGE, "%s would be written twice; choose another name",
                               outputs[i]);
        SH_TRY(tp_check_output(outputs[i], inputs, SH_COUNT(inputs), err));
        SH_TRY(check_writable(outputs[i], err));
    }
    if (!o->resume && sh_file_exists(run->checkpoint))
        return sh_fail(err, SH_ERR_USAGE,
                       "%s is of a run that was interrupted: --resume goes on with it; remove it "
                       "to begin anew",
                       run->checkpoint);
    return source->folder ? check_folder(source->folder, err) : SH_OK;
}

static sh_status choose_paths(tp_run *run, const char *name, sh_error *err)
{
    const tp_options *o = run->o;
    if (ends_with(o->out, ".gguf")) {
        SH_TRY(append(run->out, o->out, "", err));
        SH_TRY(append(run->checkpoint, o->out, "." FILE_CHECKPOINT, err));
    } else {
        SH_TRY(sh_dir_make(o->out, err));
        SH_TRY(sh_path_join(run->out, sizeof run->out, o->out, name, err));
        SH_TRY(sh_path_join(run->checkpoint, sizeof run->checkpoint, o->out, FILE_CHECKPOINT, err));
        SH_TRY(sh_path_join(run->metrics, sizeof run->metrics, o->out, FILE_METRICS, err));
    }
    if (o->metrics)
        SH_TRY(append(run->metrics, o->metrics, "", err));
    return SH_OK;
}

/* ---- data ---- */

static sh_status open_heldout(tp_run *run, const sh_dataset_options *reading,
                              const sh_dataset_packing *packing, sh_error *err)
{
    const tp_options *o = run->o;
    const sh_dataset *heldout = NULL;
    if (o->heldout) {
        SH_TRY(sh_dataset_open(o->heldout, reading, &run->heldout_all, err));
        heldout = run->heldout_all;
    } else if (o->heldout_share > 0) {
        SH_TRY(sh_dataset_split(run->all, o->heldout_share, (uint64_t)o->seed, &run->train_part,
                                &run->heldout_part, err));
        heldout = run->heldout_part;
    }
    return heldout ? sh_dataset_pack(heldout, packing, &run->heldout, err) : SH_OK;
}

static sh_status open_data(tp_run *run, const tp_source *source, sh_error *err)
{
    const tp_options *o = run->o;
    const sh_dataset_options reading = {.tokenizer = source->tokenizer, .chat = source->chat};
    sh_dataset_packing packing = {.context = (uint32_t)o->context};
    SH_TRY(tp_long_samples(o->long_samples, &packing.long_samples, err));
    SH_TRY(sh_dataset_open(o->data, &reading, &run->all, err));
    if (sh_dataset_count(run->all).conversations > 0 && source->chat == SH_CHAT_PLAIN)
        fprintf(stderr,
                TP_PROGRAM ": the model has no chat template that is known here: conversations "
                           "are written as plain \"role: content\" lines\n");
    SH_TRY(open_heldout(run, &reading, &packing, err));
    const sh_dataset *train = run->train_part ? run->train_part : run->all;
    if (!source->cut_anew)
        return sh_dataset_pack(train, &packing, &run->train, err);
    return sh_dataset_pack_shuffled(
        train, &packing,
        &(sh_dataset_range){.seed = (uint64_t)o->seed,
                            .want = (size_t)o->steps * (size_t)o->batch * (size_t)o->accumulate},
        &run->train, err);
}

/* ---- metrics ---- */

/* Line i is step i: what was written after the step that a resumed run goes on from is cut off. */
static sh_status open_metrics(tp_run *run, uint32_t first_step, sh_error *err)
{
    FILE *f = fopen(run->metrics, run->o->resume ? "a+" : "w");
    if (!f)
        return sh_fail(err, SH_ERR_IO, "%s: %s", run->metrics, strerror(errno));
    run->metrics_file = f;
    rewind(f);
    uint32_t lines = 0;
    for (int c; lines + 1 < first_step && (c = getc(f)) != EOF;)
        lines += c == '\n';
    const long end = ftell(f);
    if (end < 0 || ftruncate(fileno(f), end) != 0 || fseek(f, 0, SEEK_END) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", run->metrics, strerror(errno));
    return SH_OK;
}

static sh_status write_metrics(tp_run *run, const sh_train_progress *p, sh_error *err)
{
    char heldout[48] = "";
    if (!run->metrics_file)
        SH_TRY(open_metrics(run, p->step, err));
    if (!isnan(p->heldout_loss))
        snprintf(heldout, sizeof heldout, ", \"heldout_loss\": %.9g", p->heldout_loss);
    if (fprintf(run->metrics_file,
                "{\"step\": %u, \"loss\": %.9g%s, \"lr\": %.6g, \"grad_norm\": %.6g, "
                "\"tokens_seen\": %llu, \"seconds\": %.3f, \"rss_bytes\": %llu}\n",
                p->step, p->loss, heldout, p->lr, p->grad_norm, (unsigned long long)p->tokens_seen,
                p->seconds, (unsigned long long)sh_memory_now().resident) < 0 ||
        fflush(run->metrics_file) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", run->metrics, strerror(errno));
    return SH_OK;
}

/* ---- progress ---- */

static double seconds_now(void)
{
    return (double)sh_clock_mono_ms() / 1e3;
}

static void show(tp_run *run, const sh_train_progress *p)
{
    const double now = seconds_now(), spent = now - run->begun;
    const bool last = p->step == p->steps || sh_train_interrupted;
    const double every = run->terminal ? TERMINAL_EVERY_S : PLAIN_EVERY_S;
    if (!last && p->step != 1 && now - run->shown < every)
        return;
    const double steps = (double)(p->step - run->step_begun);
    char heldout[32] = "", rate[64] = "";
    if (!isnan(run->heldout_loss))
        snprintf(heldout, sizeof heldout, "  held-out %.4f", run->heldout_loss);
    if (steps > 0 && spent > 0) /* the first step of this run is where the clock starts */
        snprintf(rate, sizeof rate, "  %.0f tokens/s  %.0f s left",
                 (double)(p->tokens_seen - run->tokens_begun) / spent,
                 spent / steps * (double)(p->steps - p->step));
    fprintf(stderr, "%sstep %u/%u  loss %.4f (mean %.4f)%s%s  %.0f MB%s",
            run->terminal ? "\r\033[K" : "", p->step, p->steps, p->loss, run->smoothed, heldout,
            rate, (double)sh_memory_now().resident / 1e6, run->terminal && !last ? "" : "\n");
    run->shown = now;
}

static bool on_step(void *arg, const sh_train_progress *p)
{
    tp_run *run = arg;
    if (!isnan(p->heldout_loss))
        run->heldout_loss = p->heldout_loss;
    if (!run->any_step) {
        run->begun = seconds_now();
        run->tokens_begun = p->tokens_seen;
        run->step_begun = p->step;
        run->smoothed = p->loss;
        run->any_step = true;
        if (p->step > 1)
            fprintf(stderr, TP_PROGRAM ": went on from %s after step %u\n", run->checkpoint,
                    p->step - 1);
    }
    run->smoothed += (p->loss - run->smoothed) / SMOOTHED_STEPS;
    show(run, p);
    if (run->metrics[0] && write_metrics(run, p, &run->failed) != SH_OK)
        return false;
    return !sh_train_interrupted;
}

/* ---- memory ---- */

#define BLAS_BYTES  (24u << 20) /* of a thread that calls OpenBLAS: its packed panels */
#define OTHER_BYTES (16u << 20) /* the allocator's own, stacks, what else is read meanwhile */

uint64_t tp_memory_taken(int64_t threads, uint64_t file_bytes)
{
    return sh_memory_now().resident + file_bytes + OTHER_BYTES + (uint64_t)threads * BLAS_BYTES;
}

/* What a limit leaves for the training; where it leaves nothing, the least that is a limit: the
 * library's planning then says what it needs. */
static uint64_t memory_left(uint64_t limit, uint64_t taken)
{
    return limit == 0 ? 0 : limit > taken ? limit - taken : 1;
}

/* ---- a run ---- */

sh_status tp_run_open(tp_run *run, const tp_options *o, const tp_source *source, sh_error *err)
{
    run->o = o;
    run->terminal = isatty(STDERR_FILENO) == 1;
    run->heldout_loss = (double)NAN;
    SH_TRY(choose_paths(run, source->file_name, err));
    SH_TRY(check_outputs(run, source, err));
    SH_TRY(open_data(run, source, err));
    if (o->teacher)
        SH_TRY(sh_model_open(o->teacher, &run->teacher, err));
    const char *advice = sh_blas_advice();
    if (advice)
        fprintf(stderr, TP_PROGRAM ": %s\n", advice);
    return SH_OK;
}

void tp_run_release(tp_run *run)
{
    if (run->metrics_file)
        fclose(run->metrics_file);
    sh_dataset_rows_release(&run->train);
    sh_dataset_rows_release(&run->heldout);
    sh_dataset_destroy(&run->train_part);
    sh_dataset_destroy(&run->heldout_part);
    sh_dataset_destroy(&run->heldout_all);
    sh_dataset_destroy(&run->all);
    sh_model_close(&run->teacher);
}

/* Of the files that the training depends on and the library does not see whole. */
static sh_hash identity_of(const tp_run *run, const sh_model *base)
{
    sh_hash hashes[2] = {0};
    if (base)
        hashes[0] = sh_model_hash(base);
    if (run->teacher)
        hashes[1] = sh_model_hash(run->teacher);
    return sh_sha256(hashes, sizeof hashes);
}

sh_status tp_train_options(tp_run *run, const tp_source *source, sh_train_options *out,
                           sh_error *err)
{
    static const char *const schedules[] = {"linear", "cosine", "constant"};
    static const char *const optimizers[] = {"adamw", "sgd"};
    const tp_options *o = run->o;
    size_t schedule = 0, optimizer = 0;
    SH_TRY(tp_choose("schedule", o->schedule, schedules, SH_COUNT(schedules), &schedule, err));
    SH_TRY(tp_choose("optimizer", o->optimizer, optimizers, SH_COUNT(optimizers), &optimizer, err));
    /* Before the files are hashed, which makes their pages resident: they are counted as files. */
    const uint64_t file_bytes = (source->base ? source->base->file_bytes : 0) +
                                (run->teacher ? run->teacher->file_bytes : 0);
    run->memory_taken = tp_memory_taken(o->threads, file_bytes) - source->weights_bytes;
    run->saving = (sh_train_checkpoint){.path = run->checkpoint,
                                        .every_s = o->checkpoint_every > 0 ? o->checkpoint_every
                                                                           : (double)INFINITY,
                                        .resume = o->resume,
                                        .identity = identity_of(run, source->base)};
    *out = (sh_train_options){
        .lr = (float)o->lr,
        .schedule = (sh_schedule)schedule,
        .lr_final = (float)o->lr_final,
        .optimizer = (sh_optimizer)optimizer,
        .state_8bit = o->state_8bit,
        .momentum = (float)o->momentum,
        .clip = (float)o->clip,
        .weight_decay = (float)o->weight_decay,
        .batch = (uint32_t)o->batch,
        .accumulate = (uint32_t)o->accumulate,
        .steps = (uint32_t)o->steps,
        .warmup = (uint32_t)o->warmup,
        .shuffle_seed = source->cut_anew ? 0 : (uint64_t)o->seed,
        .threads = (unsigned)o->threads,
        .bf16 = o->bf16,
        .heldout = o->heldout_every > 0 ? &run->heldout.data : NULL,
        .heldout_every = (uint32_t)o->heldout_every,
        .patience = (uint32_t)o->patience,
        .teacher = run->teacher,
        .distill_weight = run->teacher ? (float)o->distill_weight : 0,
        .temperature = run->teacher ? (float)o->temperature : 0,
        .checkpoint = &run->saving,
        .progress = on_step,
        .progress_arg = run,
    };
    SH_TRY(tp_quantize_aware(o->quantize_aware, &out->quantize_aware, err));
    out->memory_max = memory_left((uint64_t)o->memory_max, run->memory_taken);
    out->memory_least = &run->memory_least;
    return SH_OK;
}

sh_status tp_trained(tp_run *run, sh_status status, sh_error *err)
{
    if (run->failed.code != SH_OK) {
        *err = run->failed;
        return run->failed.code;
    }
    if (status == SH_ERR_LIMIT && run->memory_least > 0)
        return sh_fail(
            err, status,
            "--memory-max %lld is too little: %llu are needed at least, %llu for the "
            "training, the rest for the program, its data, the models' files and OpenBLAS",
            (long long)run->o->memory_max,
            (unsigned long long)(run->memory_taken + run->memory_least),
            (unsigned long long)run->memory_least);
    if (status == SH_ERR_CANCELLED)
        return sh_fail(err, status, "interrupted; --resume goes on from %s", run->checkpoint);
    return status;
}

sh_status tp_written(tp_run *run, sh_status status, sh_error *err)
{
    return status == SH_OK
               ? SH_OK
               : sh_fail_in(err, "the training is done and kept in %s, --resume writes it again",
                            run->checkpoint);
}

/* ---- results ---- */

bool tp_heldout_is_due(const tp_run *run, const sh_train_result *result, double *loss)
{
    *loss = result->heldout_best_step == 0 ? (double)NAN
            : run->o->patience > 0         ? result->heldout_best
                                           : result->heldout_last;
    return run->heldout.data.n > 0 && isnan(*loss);
}

static json_t *number_or_null(double x)
{
    return isnan(x) ? json_null() : sh_json_number(x);
}

static json_t *data_json(const tp_run *run)
{
    const sh_dataset_counts c = sh_dataset_count(run->all);
    json_t *j = json_object();
    sh_json_set(j, "files", json_integer((json_int_t)c.files));
    sh_json_set(j, "documents", json_integer((json_int_t)c.documents));
    sh_json_set(j, "left_off", json_integer((json_int_t)c.left_off));
    sh_json_set(j, "tokens", json_integer((json_int_t)c.tokens));
    sh_json_set(j, "targets", json_integer((json_int_t)c.targets));
    sh_json_set(j, "sequences", json_integer((json_int_t)run->train.data.n));
    sh_json_set(j, "padding", sh_json_number(sh_dataset_rows_padding(&run->train)));
    sh_json_set(j, "skipped", json_integer((json_int_t)run->train.skipped));
    sh_json_set(j, "heldout_targets", json_integer((json_int_t)run->heldout.targets));
    return j;
}

static void print_json(const tp_run *run, const sh_train_result *r, double heldout, double rate)
{
    const tp_options *o = run->o;
    const sh_tile_plan *plan = &r->plan;
    json_t *j = json_object();
    sh_json_set(j, "out", json_string(run->out));
    sh_json_set(j, "steps", json_integer(r->steps));
    sh_json_set(j, "resumed_step", json_integer(r->resumed_step));
    sh_json_set(j, "batch", json_integer(o->batch));
    sh_json_set(j, "accumulate", json_integer(o->accumulate));
    sh_json_set(j, "context", json_integer(o->context));
    sh_json_set(j, "threads", json_integer(o->threads));
    sh_json_set(j, "seed", json_integer(o->seed));
    sh_json_set(j, "data", data_json(run));
    sh_json_set(j, "tokens_seen", json_integer((json_int_t)r->tokens_seen));
    sh_json_set(j, "loss_first", sh_json_number(r->loss_first));
    sh_json_set(j, "loss_last", sh_json_number(r->loss_last));
    if (run->teacher) {
        sh_json_set(j, "cross_entropy_last", sh_json_number(r->cross_entropy_last));
        sh_json_set(j, "kl_last", sh_json_number(r->kl_last));
    }
    sh_json_set(j, "heldout_loss", number_or_null(heldout));
    if (r->heldout_best_step > 0)
        sh_json_set(j, "heldout_best_step", json_integer(r->heldout_best_step));
    sh_json_set(j, "seconds", sh_json_number(r->seconds));
    sh_json_set(j, "tokens_per_s", sh_json_number(rate));
    sh_json_set(j, "blas_core", json_string(sh_blas_core()));
    sh_json_set(j, "bf16", o->bf16 ? json_string(sh_bf16_level()) : json_false());
    sh_json_set(j, "peak_rss_bytes", json_integer((json_int_t)sh_memory_now().peak));
    sh_json_set(j, "plan",
                json_pack("{s:i, s:i, s:i, s:i, s:I}", "threads", (int)plan->threads,
                          "micro_sequences", (int)plan->micro_sequences, "kept_layers",
                          (int)plan->kept_layers, "logit_rows", (int)plan->logit_rows, "bytes",
                          (json_int_t)plan->bytes));
    json_dumpf(j, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(j);
}

void tp_finish(tp_run *run, const sh_train_result *r, double heldout)
{
    const double rate = r->seconds > 0 ? (double)r->tokens_seen / r->seconds : 0;
    unlink(run->checkpoint); /* what it was for is written */
    if (run->o->json) {
        print_json(run, r, heldout, rate);
        return;
    }
    printf("loss %.4f -> %.4f, ", r->loss_first, r->loss_last);
    if (!isnan(heldout))
        printf("held-out %.4f, ", heldout);
    if (r->steps < (uint32_t)run->o->steps)
        printf("stopped early after step %u, ", r->steps);
    printf("%.0f tokens/s, %.0f MB at most, %s, %lld threads, wrote %s\n", rate,
           (double)sh_memory_now().peak / 1e6, sh_blas_core(), (long long)run->o->threads,
           run->out);
}
