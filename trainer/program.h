/*
 * What the commands of shoal-train that train have in common: options, data, memory, progress,
 * metrics, checkpoints, results. Internal to the program; the work is in trainer.h and dataset.h.
 */
#ifndef SH_TRAINER_PROGRAM_H
#define SH_TRAINER_PROGRAM_H

#include <signal.h>
#include <stdio.h>

#include "shared/base/file.h"
#include "shared/base/option.h"
#include "trainer/dataset.h"

#define TP_PROGRAM "shoal-train"

/* SIGINT or SIGTERM came: the step that runs is finished. */
extern volatile sig_atomic_t sh_train_interrupted;
void tp_catch_signals(void);

/* The first member of the options of each command. */
typedef struct {
    const char *config, *data, *heldout, *out, *metrics, *long_samples;
    const char *schedule, *optimizer, *teacher, *quantize_aware;
    int64_t batch, accumulate, context, steps, warmup, seed, threads, memory_max;
    int64_t heldout_every, patience;
    double lr, lr_final, clip, weight_decay, momentum, heldout_share, checkpoint_every;
    double distill_weight, temperature;
    bool bf16, state_8bit, resume, json;
} tp_options;

/* clang-format off */
#define TP_OPTIONS(T, lr_default, weight_default)                                                  \
    SH_OPT_STRING(T, common.config, 0, "config", "FILE", NULL,                                     \
                  "YAML file of these options; flags override it"),                                \
    SH_OPT_STRING(T, common.data, 'f', "data", "PATH", NULL,                                       \
                  "text, JSON Lines ({\"text\"}, {\"prompt\", \"completion\"}, {\"messages\"}), "  \
                  "a node's snapshot, or a folder of such files"),                                 \
    SH_OPT_STRING(T, common.heldout, 0, "heldout", "PATH", NULL,                                   \
                  "the same, not trained on: its loss is measured"),                               \
    SH_OPT_REAL(T, common.heldout_share, 0, "heldout-share", "X", 0, 0, 0.9,                       \
                "instead: share of the data's documents that are held out"),                       \
    SH_OPT_INT(T, common.heldout_every, 0, "heldout-every", "N", 0, 0, 100000000,                  \
               "steps between measurements of the held-out loss; 0: at the end"),                  \
    SH_OPT_INT(T, common.patience, 0, "patience", "N", 0, 0, 1000000,                              \
               "stop after so many measurements without a new best, and keep the best; 0: never"), \
    SH_OPT_STRING(T, common.out, 'o', "out", "PATH", NULL,                                         \
                  "FILE.gguf to write, or a folder for it, its metrics and its checkpoint"),       \
    SH_OPT_INT(T, common.batch, 'b', "batch", "N", 8, 1, 65536, "sequences a batch"),              \
    SH_OPT_INT(T, common.accumulate, 0, "accumulate", "N", 1, 1, 65536,                            \
               "batches whose gradients make a step"),                                             \
    SH_OPT_INT(T, common.context, 'c', "context", "N", 128, 1, SH_CONTEXT_MAX,                     \
               "tokens a sequence"),                                                               \
    SH_OPT_STRING(T, common.long_samples, 0, "long-samples", "NAME", "refuse",                     \
                  "a sample that is longer than the context: refuse, skip, split"),                \
    SH_OPT_INT(T, common.steps, 'n', "steps", "N", 200, 1, 100000000, "optimizer steps"),          \
    SH_OPT_INT(T, common.warmup, 0, "warmup", "N", 10, 0, 100000000,                               \
               "steps of linear warm-up"),                                                         \
    SH_OPT_REAL(T, common.lr, 0, "lr", "X", lr_default, 0, 1, "peak learning rate"),               \
    SH_OPT_REAL(T, common.lr_final, 0, "lr-final", "X", 0.05, 0, 1,                                \
                "share of the learning rate at the end"),                                          \
    SH_OPT_STRING(T, common.schedule, 0, "schedule", "NAME", "linear",                             \
                  "how it gets there: linear, cosine, constant"),                                  \
    SH_OPT_STRING(T, common.optimizer, 0, "optimizer", "NAME", "adamw", "adamw, sgd"),             \
    SH_OPT_FLAG(T, common.state_8bit, 0, "state-8bit",                                             \
                "keep the optimizer's moments in blocks of 8-bit numbers"),                        \
    SH_OPT_REAL(T, common.momentum, 0, "momentum", "X", 0.9, 0, 0.9999, "of sgd"),                 \
    SH_OPT_REAL(T, common.clip, 0, "clip", "X", 1.0, 0, 1e9,                                       \
                "largest gradient norm; 0: no clipping"),                                          \
    SH_OPT_REAL(T, common.weight_decay, 0, "weight-decay", "X", 0, 0, 1,                           \
                "decoupled weight decay"),                                                         \
    SH_OPT_STRING(T, common.quantize_aware, 0, "quantize-aware", "TYPE", NULL,                     \
                  "train for weights that will be quantized to Q8_0 or Q4_0"),                     \
    SH_OPT_STRING(T, common.teacher, 0, "teacher", "FILE", NULL,                                   \
                  "GGUF model of the same vocabulary to learn from"),                              \
    SH_OPT_REAL(T, common.distill_weight, 0, "distill-weight", "X", weight_default, 0, 1,          \
                "weight of the divergence from the teacher; the rest is the data's"),              \
    SH_OPT_REAL(T, common.temperature, 0, "temperature", "X", 2, 0.01, 100,                        \
                "softens teacher and student"),                                                    \
    SH_OPT_INT(T, common.seed, 's', "seed", "N", 1, 1, INT32_MAX, "order of the data, masks"),     \
    SH_OPT_INT(T, common.threads, 't', "threads", "N", 1, 1, 256, "worker threads"),               \
    SH_OPT_FLAG(T, common.bf16, 0, "bf16",                                                         \
                "round the operands of products with weights to bf16: faster where the "           \
                "processor has instructions for it"),                                              \
    SH_OPT_INT(T, common.memory_max, 0, "memory-max", "BYTES", 0, 0, 1ll << 50,                    \
               "stay below so much resident memory, slower; 0: no limit"),                         \
    SH_OPT_REAL(T, common.checkpoint_every, 0, "checkpoint-every", "SECONDS", 60, 0, 1e9,          \
                "between checkpoints; 0: only when it is interrupted"),                            \
    SH_OPT_FLAG(T, common.resume, 0, "resume",                                                     \
                "go on from the checkpoint of an interrupted run of the same options, if any"),    \
    SH_OPT_STRING(T, common.metrics, 0, "metrics", "FILE", NULL,                                   \
                  "JSON Lines of each step's figures; in a folder: metrics.jsonl"),                \
    SH_OPT_FLAG(T, common.json, 0, "json", "print one JSON object")
/* clang-format on */

/* SH_ERR_USAGE: words that are no options. */
SH_MUST_USE sh_status tp_no_words(const sh_command *command, const sh_args *args, sh_error *err);
SH_MUST_USE sh_status tp_need(const char *value, const char *key, sh_error *err);
/* The index of a name in a list. */
SH_MUST_USE sh_status tp_choose(const char *key, const char *value, const char *const *names,
                                size_t n, size_t *out, sh_error *err);
SH_MUST_USE sh_status tp_long_samples(const char *name, sh_long_samples *out, sh_error *err);
SH_MUST_USE sh_status tp_quantize_aware(const char *name, sh_type *out,
                                        sh_error *err); /* NULL: F32 */
SH_MUST_USE sh_status tp_written_type(const char *key, const char *name, sh_type *out,
                                      sh_error *err);
/* That writing to path would destroy nothing that is meant to stay: neither one of the n inputs
 * (any may be NULL), whatever name it goes by here, nor a file that its owner made read-only. A
 * rename onto a file asks for no permission of it. */
SH_MUST_USE sh_status tp_check_output(const char *path, const char *const *inputs, size_t n,
                                      sh_error *err);
/* What is taken beside a training: the pages of models' files will be resident, and so is what the
 * process has now. */
uint64_t tp_memory_taken(int64_t threads, uint64_t file_bytes);
/* Options of a command that has TP_OPTIONS, of its --config, too. Not with args->help. */
SH_MUST_USE sh_status tp_parse(const sh_command *command, int argc, char **argv, void *options,
                               sh_args *args, sh_error *err);

/* ---- a run ---- */

typedef struct {
    const tp_options *o;
    char out[SH_PATH_BYTES], metrics[SH_PATH_BYTES], checkpoint[SH_PATH_BYTES]; /* "": none */
    sh_dataset *all, *train_part, *heldout_part, *heldout_all;
    sh_dataset_rows train, heldout; /* heldout.data.n 0: none */
    sh_model *teacher;
    sh_train_checkpoint saving;
    /* of the progress; seconds of a clock */
    double begun, shown, smoothed, heldout_loss;
    uint64_t tokens_begun;
    uint32_t step_begun;
    bool terminal, any_step;
    FILE *metrics_file;
    uint64_t memory_taken, memory_least; /* beside the training; of it, once it was too much */
    sh_error failed;                     /* of the metrics; code SH_OK: none */
} tp_run;

/* What a command brings. */
typedef struct {
    const sh_tokenizer *tokenizer;
    sh_chat_family chat;
    bool cut_anew;         /* each pass over texts with cuts of its own, in the order of training */
    const char *file_name; /* of what is written into a folder: "adapter.gguf" */
    const sh_model *base;  /* that the training begins with; NULL: none */
    uint64_t
        weights_bytes;     /* of the trained model: resident, and the training counts them itself */
    const char *inputs[2]; /* files of the command's own that are read; NULL: none */
    const char *folder;    /* to be made and written into; NULL: none */
    const char *outputs[1]; /* files of the command's own that are written, beside --out; NULL: none
                             */
} tp_source;

/* Reads data and teacher, chooses the paths. run is zeroed before, and released in any case. */
SH_MUST_USE sh_status tp_run_open(tp_run *run, const tp_options *o, const tp_source *source,
                                  sh_error *err);
void tp_run_release(tp_run *run);
/* Options of the training; run must stay where it is. */
SH_MUST_USE sh_status tp_train_options(tp_run *run, const tp_source *source, sh_train_options *out,
                                       sh_error *err);
/* What a training came to: the error that stopped it, with what to do. */
SH_MUST_USE sh_status tp_trained(tp_run *run, sh_status status, sh_error *err);
/* What writing the results came to: a training is not lost with a full disk. */
SH_MUST_USE sh_status tp_written(tp_run *run, sh_status status, sh_error *err);
/* Whether the loss of run->heldout is still to be measured; if not, *loss is it (NaN: none). */
bool tp_heldout_is_due(const tp_run *run, const sh_train_result *result, double *loss);
/* Results on standard output; the checkpoint is removed. */
void tp_finish(tp_run *run, const sh_train_result *result, double heldout_loss);

#endif
