/*
 * shoal-train: trains a LoRA adapter or a whole small model on a text file, measures a text's loss,
 * or does a node's round of training (round_main.c). Thin: everything is in trainer.h; here are
 * options, text in, progress and JSON out.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "shared/base/log.h"
#include "shared/base/memory.h"
#include "shared/base/option.h"
#include "shared/math/bf16.h"
#include "shared/math/blas.h"
#include "shared/model/convert.h"
#include "trainer/round_main.h"
#include "trainer/tokenizer_main.h"
#include "trainer/trainer.h"

#define PROGRAM        "shoal-train"
#define PURPOSE_CHUNKS 0x63686e6bu /* names this use of the generator */
#define PLAIN_EVERY    50          /* steps between progress lines when stderr is no terminal */
#define SEQUENCES_MAX  (1u << 28)

/* ---- options ---- */

/* What `lora` and `full` share. */
typedef struct {
    const char *data, *heldout, *out;
    int64_t batch, context, steps, warmup, seed, threads, save_every, memory_max;
    double lr, lr_final, clip, weight_decay, momentum;
    const char *schedule, *optimizer;
    bool bf16, json;
} common_options;

typedef struct {
    common_options common;
    const char *base, *start, *peft, *targets, *freeze;
    int64_t rank, a_seed;
    double alpha, proximal;
    bool rslora;
} lora_options;

typedef struct {
    common_options common;
    const char *vocab, *type;
    int64_t width, layers, heads, kv_heads, ffn, context_length;
    double rope_base, norm_eps;
} full_options;

typedef struct {
    const char *model, *adapter, *data;
    int64_t context, threads;
    bool json;
} eval_options;

#define TRAIN_OPTIONS(T, lr_default, clip_default)                                                 \
    SH_OPT_STRING(T, common.data, 'f', "data", "TEXT", NULL, "text to train on"),                  \
        SH_OPT_STRING(T, common.heldout, 0, "heldout", "TEXT", NULL,                               \
                      "text whose loss is measured at the end"),                                   \
        SH_OPT_STRING(T, common.out, 'o', "out", "FILE", NULL, "GGUF to write"),                   \
        SH_OPT_INT(T, common.batch, 'b', "batch", "N", 8, 1, 65536, "sequences a step"),           \
        SH_OPT_INT(T, common.context, 'c', "context", "N", 128, 1, SH_CONTEXT_MAX,                 \
                   "tokens a sequence"),                                                           \
        SH_OPT_INT(T, common.steps, 'n', "steps", "N", 200, 1, 100000000, "optimizer steps"),      \
        SH_OPT_INT(T, common.warmup, 0, "warmup", "N", 10, 0, 100000000,                           \
                   "steps of linear warm-up"),                                                     \
        SH_OPT_REAL(T, common.lr, 0, "lr", "X", lr_default, 0, 1, "peak learning rate"),           \
        SH_OPT_REAL(T, common.lr_final, 0, "lr-final", "X", 0.05, 0, 1,                            \
                    "share of the learning rate at the end"),                                      \
        SH_OPT_STRING(T, common.schedule, 0, "schedule", "NAME", "linear",                         \
                      "how it gets there: linear, cosine, constant"),                              \
        SH_OPT_STRING(T, common.optimizer, 0, "optimizer", "NAME", "adamw", "adamw, sgd"),         \
        SH_OPT_REAL(T, common.momentum, 0, "momentum", "X", 0.9, 0, 0.9999, "of sgd"),             \
        SH_OPT_REAL(T, common.clip, 0, "clip", "X", clip_default, 0, 1e9,                          \
                    "largest gradient norm; 0: no clipping"),                                      \
        SH_OPT_REAL(T, common.weight_decay, 0, "weight-decay", "X", 0, 0, 1,                       \
                    "decoupled weight decay"),                                                     \
        SH_OPT_INT(T, common.seed, 's', "seed", "N", 1, 1, INT32_MAX, "order of the data"),        \
        SH_OPT_INT(T, common.threads, 't', "threads", "N", 1, 1, 256, "worker threads"),           \
        SH_OPT_FLAG(T, common.bf16, 0, "bf16",                                                     \
                    "round the operands of products with weights to bf16: faster where the "       \
                    "processor has instructions for it"),                                          \
        SH_OPT_INT(T, common.memory_max, 0, "memory-max", "BYTES", 0, 0, 1ll << 50,                \
                   "stay below so much resident memory, slower; 0: no limit"),                     \
        SH_OPT_INT(T, common.save_every, 0, "save-every", "N", 200, 0, 100000000,                  \
                   "steps between saves of an unfinished model (full only); 0: at the end"),       \
        SH_OPT_FLAG(T, common.json, 0, "json", "print one JSON object")

static const sh_option lora_table[] = {
    SH_OPT_STRING(lora_options, base, 'm', "base", "FILE", NULL, "GGUF model to adapt"),
    SH_OPT_INT(lora_options, rank, 'r', "rank", "N", 8, 1, SH_LORA_RANK_MAX, "rank of A and B"),
    SH_OPT_REAL(lora_options, alpha, 0, "alpha", "X", 16, 1e-6, 1e6, "scale is alpha / rank"),
    SH_OPT_FLAG(lora_options, rslora, 0, "rslora", "scale is alpha / sqrt(rank)"),
    SH_OPT_STRING(lora_options, targets, 0, "targets", "LIST", "q,k,v,o,gate,up,down",
                  "matrices to adapt"),
    SH_OPT_INT(lora_options, a_seed, 0, "a-seed", "N", 1, 0, INT32_MAX, "first values of A"),
    SH_OPT_STRING(lora_options, start, 0, "start", "ADAPTER", NULL,
                  "begin with this adapter, GGUF or a PEFT folder, and its ranks"),
    SH_OPT_STRING(lora_options, freeze, 0, "freeze", "NAME", "none",
                  "a factor that is not trained: a, b, none"),
    SH_OPT_REAL(lora_options, proximal, 0, "proximal", "X", 0, 0, 1e6,
                "weight of half the squared distance to the start"),
    SH_OPT_STRING(lora_options, peft, 0, "peft", "DIR", NULL,
                  "write the adapter as a PEFT folder, too"),
    TRAIN_OPTIONS(lora_options, 5e-3, 1.0),
};
static const sh_command lora_command = {
    PROGRAM " lora",
    "--base FILE --data TEXT --out ADAPTER.gguf",
    lora_table,
    SH_COUNT(lora_table),
    "Trains a LoRA adapter beside the matrices of every layer of a frozen, quantized base.",
    PROGRAM " lora --base base-q8_0.gguf --data notes.txt --rank 8 --steps 200 --out a.gguf"};

static const sh_option full_table[] = {
    SH_OPT_STRING(full_options, vocab, 0, "vocab", "FILE", NULL,
                  "GGUF whose tokenizer the model takes"),
    SH_OPT_STRING(full_options, type, 0, "type", "TYPE", "F16", "type of the saved matrices"),
    SH_OPT_INT(full_options, width, 0, "width", "N", 256, 2, 65536, "embedding length"),
    SH_OPT_INT(full_options, layers, 0, "layers", "N", 4, 1, SH_MODEL_LAYERS_MAX, "layers"),
    SH_OPT_INT(full_options, heads, 0, "heads", "N", 4, 1, 1024, "attention heads"),
    SH_OPT_INT(full_options, kv_heads, 0, "kv-heads", "N", 2, 1, 1024, "key and value heads"),
    SH_OPT_INT(full_options, ffn, 0, "ffn", "N", 512, 1, 1 << 20, "feed-forward length"),
    SH_OPT_INT(full_options, context_length, 0, "context-length", "N", 512, 2, SH_CONTEXT_MAX,
               "context that the file promises"),
    SH_OPT_REAL(full_options, rope_base, 0, "rope-base", "X", 10000, 1, 1e9, "RoPE's base"),
    SH_OPT_REAL(full_options, norm_eps, 0, "norm-eps", "X", 1e-5, 1e-12, 1, "RMSNorm's epsilon"),
    TRAIN_OPTIONS(full_options, 3e-3, 1.0),
};
static const sh_command full_command = {
    PROGRAM " full",
    "--vocab FILE --data TEXT --out FILE",
    full_table,
    SH_COUNT(full_table),
    "Trains every weight of a small Llama-family model from random values. The output matrix is "
    "the embedding.",
    PROGRAM " full --vocab vocab.gguf --data train.txt --steps 3000 --batch 16 --out base.gguf"};

static const sh_option eval_table[] = {
    SH_OPT_STRING(eval_options, model, 'm', "model", "FILE", NULL, "GGUF model"),
    SH_OPT_STRING(eval_options, adapter, 0, "lora", "FILE", NULL, "GGUF LoRA adapter"),
    SH_OPT_STRING(eval_options, data, 'f', "data", "TEXT", NULL, "text to measure"),
    SH_OPT_INT(eval_options, context, 'c', "context", "N", 128, 1, SH_CONTEXT_MAX,
               "tokens a sequence"),
    SH_OPT_INT(eval_options, threads, 't', "threads", "N", 1, 1, 256, "worker threads"),
    SH_OPT_FLAG(eval_options, json, 0, "json", "print one JSON object"),
};
static const sh_command eval_command = {
    PROGRAM " eval",
    "--model FILE --data TEXT [--lora ADAPTER]",
    eval_table,
    SH_COUNT(eval_table),
    "Mean negative log-likelihood of a text's tokens, in sequences side by side.",
    PROGRAM " eval --model base.gguf --data heldout.txt --context 128 --json"};

static sh_status need(const char *value, const char *key, sh_error *err)
{
    return value ? SH_OK : sh_fail(err, SH_ERR_USAGE, "--%s is missing", key);
}

static sh_status need_training(const common_options *o, sh_error *err)
{
    SH_TRY(need(o->data, "data", err));
    return need(o->out, "out", err);
}

/* ---- text ---- */

typedef struct {
    int32_t *tokens;
    size_t n;
} text;

static sh_status text_load(const sh_tokenizer *tokenizer, const char *path, text *out,
                           sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, SH_TOKENIZE_BYTES_MAX, &bytes, &n, err));
    sh_status status =
        sh_tokenize(tokenizer, (const char *)bytes, n, SH_TOKENIZE_BOS, &out->tokens, &out->n, err);
    free(bytes);
    return status;
}

/* Sequences of context + 1 tokens from `offset` on, each beginning with the last of the one
 * before, so that every token but the first is a target once. */
static size_t chunk_count(const text *t, size_t offset, size_t context)
{
    return t->n > offset + context ? (t->n - offset - 1) / context : 0;
}

static sh_status too_short(const char *path, const text *t, size_t context, sh_error *err)
{
    return sh_fail(err, SH_ERR_INVALID, "%s: %zu tokens are too few for one sequence of %zu", path,
                   t->n, context);
}

static sh_status chunks_in_order(const char *path, const text *t, size_t context,
                                 sh_train_data *out, sh_error *err)
{
    size_t n = chunk_count(t, 0, context), length = context + 1;
    if (n == 0)
        return too_short(path, t, context, err);
    int32_t *tokens = sh_calloc(n, length * sizeof(*tokens));
    if (!tokens)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", n);
    for (size_t i = 0; i < n; i++)
        memcpy(tokens + i * length, t->tokens + i * context, length * sizeof(*tokens));
    *out = (sh_train_data){.tokens = tokens, .n = n, .length = (uint32_t)length};
    return SH_OK;
}

/* `want` sequences in passes over the text, each with a cut and an order of its own. */
static sh_status chunks_shuffled(const char *path, const text *t, size_t context, size_t want,
                                 uint64_t seed, sh_train_data *out, sh_error *err)
{
    size_t length = context + 1, n_most = chunk_count(t, 0, context), at = 0;
    if (chunk_count(t, context - 1, context) == 0)
        return too_short(path, t, context, err);
    int32_t *tokens = want <= SEQUENCES_MAX ? sh_calloc(want, length * sizeof(*tokens)) : NULL;
    uint32_t *order = sh_calloc(n_most, sizeof(*order));
    if (!tokens || !order) {
        free(tokens);
        free(order);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu sequences", want);
    }
    for (uint64_t pass = 0; at < want; pass++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, pass, PURPOSE_CHUNKS);
        size_t offset = (size_t)sh_rng_below(&rng, context);
        size_t n = chunk_count(t, offset, context);
        for (size_t i = 0; i < n; i++)
            order[i] = (uint32_t)i;
        sh_rng_shuffle(&rng, order, n);
        for (size_t i = 0; i < n && at < want; i++, at++)
            memcpy(tokens + at * length, t->tokens + offset + order[i] * context,
                   length * sizeof(*tokens));
    }
    free(order);
    *out = (sh_train_data){.tokens = tokens, .n = want, .length = (uint32_t)length};
    return SH_OK;
}

static void data_release(sh_train_data *data)
{
    free((void *)data->tokens);
    *data = (sh_train_data){0};
}

/* ---- progress ---- */

volatile sig_atomic_t sh_train_interrupted;

static void on_signal(int number)
{
    (void)number;
    sh_train_interrupted = 1;
}

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    const common_options *options;
    const sh_full *full; /* NULL: an adapter, which is only saved at the end */
    sh_type type;
    double start, shown;
    double smoothed; /* loss, a moving average over some 20 steps */
    bool terminal;
    sh_status save_status;
    sh_error save_error;
} progress_state;

static bool on_step(void *arg, const sh_train_progress *made)
{
    progress_state *p = arg;
    const uint32_t step = made->step;
    const double loss = made->loss;
    const common_options *o = p->options;
    double now = seconds_now(), spent = now - p->start;
    bool last = step == (uint32_t)o->steps;
    p->smoothed = step == 1 ? loss : 0.95 * p->smoothed + 0.05 * loss;
    if (last || (p->terminal ? now - p->shown > 0.2 : step == 1 || step % PLAIN_EVERY == 0)) {
        double rate = (double)step * (double)(o->batch * o->context) / spent;
        fprintf(stderr, "%sstep %u/%u  loss %.4f (mean %.4f)  %.0f tokens/s  %.0f s left%s",
                p->terminal ? "\r\033[K" : "", step, (uint32_t)o->steps, loss, p->smoothed, rate,
                spent / step * ((double)o->steps - step), p->terminal && !last ? "" : "\n");
        p->shown = now;
    }
    if (p->full && o->save_every > 0 && step % o->save_every == 0 && !last) {
        p->save_status = sh_full_save(p->full, p->type, o->out, &p->save_error);
        if (p->save_status != SH_OK)
            return false;
    }
    return !sh_train_interrupted;
}

static void catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

static progress_state progress_start(const common_options *o)
{
    catch_signals();
    return (progress_state){
        .options = o, .start = seconds_now(), .terminal = isatty(STDERR_FILENO) == 1};
}

/* The index of a name in a list. */
static sh_status choose(const char *key, const char *value, const char *const *names, size_t n,
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

static sh_status train_options(const common_options *o, progress_state *progress,
                               sh_train_options *out, sh_error *err)
{
    static const char *const schedules[] = {"linear", "cosine", "constant"};
    static const char *const optimizers[] = {"adamw", "sgd"};
    size_t schedule = 0, optimizer = 0;
    SH_TRY(choose("schedule", o->schedule, schedules, SH_COUNT(schedules), &schedule, err));
    SH_TRY(choose("optimizer", o->optimizer, optimizers, SH_COUNT(optimizers), &optimizer, err));
    *out = (sh_train_options){
        .lr = (float)o->lr,
        .schedule = (sh_schedule)schedule,
        .lr_final = (float)o->lr_final,
        .optimizer = (sh_optimizer)optimizer,
        .momentum = (float)o->momentum,
        .clip = (float)o->clip,
        .weight_decay = (float)o->weight_decay,
        .batch = (uint32_t)o->batch,
        .steps = (uint32_t)o->steps,
        .warmup = (uint32_t)o->warmup,
        .shuffle_seed = (uint64_t)o->seed,
        .threads = (unsigned)o->threads,
        .bf16 = o->bf16,
        .progress = on_step,
        .progress_arg = progress,
    };
    return SH_OK;
}

/* ---- memory ---- */

#define BLAS_BYTES  (24u << 20) /* of a thread that calls OpenBLAS: its packed panels */
#define OTHER_BYTES (16u << 20) /* the allocator's own, stacks, what else is read meanwhile */

/* What of --memory-max is left for the training: the pages of the model's file will be resident,
 * and so is what the process has now. */
static sh_status training_memory(const common_options *o, uint64_t file_bytes, uint64_t *out,
                                 sh_error *err)
{
    const uint64_t taken =
        sh_memory_now().resident + file_bytes + OTHER_BYTES + (uint64_t)o->threads * BLAS_BYTES;
    *out = 0;
    if (o->memory_max == 0)
        return SH_OK;
    if (taken >= (uint64_t)o->memory_max)
        return sh_fail(err, SH_ERR_LIMIT,
                       "--memory-max %lld: the program, the base's file and OpenBLAS alone take "
                       "%llu bytes",
                       (long long)o->memory_max, (unsigned long long)taken);
    *out = (uint64_t)o->memory_max - taken;
    return SH_OK;
}

static void warn_of_blas(void)
{
    const char *advice = sh_blas_advice();
    if (advice)
        fprintf(stderr, "%s: %s\n", PROGRAM, advice);
}

/* ---- results ---- */

typedef struct {
    const common_options *options;
    const sh_train_result *result;
    double heldout; /* NaN: not measured */
    size_t n_tokens;
} report;

static void print_report(const report *r)
{
    const common_options *o = r->options;
    double rate = r->result->seconds > 0 ? (double)r->result->tokens_seen / r->result->seconds : 0;
    if (!o->json) {
        printf("loss %.4f -> %.4f, ", r->result->loss_first, r->result->loss_last);
        if (o->heldout)
            printf("held-out %.4f, ", r->heldout);
        printf("%.0f tokens/s, %.0f MB at most, %s, wrote %s\n", rate,
               (double)sh_memory_now().peak / 1e6, sh_blas_core(), o->out);
        return;
    }
    const sh_tile_plan *plan = &r->result->plan;
    json_t *j = json_object();
    sh_json_set(j, "out", json_string(o->out));
    sh_json_set(j, "steps", json_integer(o->steps));
    sh_json_set(j, "batch", json_integer(o->batch));
    sh_json_set(j, "context", json_integer(o->context));
    sh_json_set(j, "threads", json_integer(o->threads));
    sh_json_set(j, "seed", json_integer(o->seed));
    sh_json_set(j, "data_tokens", json_integer((json_int_t)r->n_tokens));
    sh_json_set(j, "tokens_seen", json_integer((json_int_t)r->result->tokens_seen));
    sh_json_set(j, "loss_first", sh_json_number(r->result->loss_first));
    sh_json_set(j, "loss_last", sh_json_number(r->result->loss_last));
    sh_json_set(j, "heldout_loss", o->heldout ? sh_json_number(r->heldout) : json_null());
    sh_json_set(j, "seconds", sh_json_number(r->result->seconds));
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

/* ---- lora ---- */

static bool is_target(const char *list, const char *name)
{
    const size_t n = strlen(name);
    for (const char *at = list; *at; at += strcspn(at, ","), at += *at == ',')
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == 0))
            return true;
    return false;
}

/* Leaves the factors of the listed matrices alone. */
static sh_status keep_targets(const char *list, sh_adapter *adapter, sh_error *err)
{
    static const char *const names[SH_LAYER_MATRICES] = {"q", "k", "v", "o", "gate", "up", "down"};
    char name[32];
    size_t which;
    for (const char *at = list; *at; at += strcspn(at, ","), at += *at == ',') {
        snprintf(name, sizeof name, "%.*s", (int)strcspn(at, ","), at);
        SH_TRY(choose("targets", name, names, SH_COUNT(names), &which, err));
    }
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        if (is_target(list, names[i % SH_LAYER_MATRICES]))
            continue;
        free(pair->a);
        free(pair->b);
        *pair = (sh_lora_pair){.in = pair->in, .out = pair->out};
    }
    return SH_OK;
}

static sh_status first_adapter(const lora_options *o, const sh_model *model, sh_adapter **out,
                               sh_error *err)
{
    if (o->start)
        return sh_adapter_open_any(o->start, &model->config, out, err);
    const double alpha = o->rslora ? o->alpha * sqrt((double)o->rank) : o->alpha;
    SH_TRY(sh_lora_initialize(&model->config, (uint64_t)o->a_seed, (uint32_t)o->rank, (float)alpha,
                              out, err));
    return keep_targets(o->targets, *out, err);
}

static sh_status lora_train_options(const lora_options *o, progress_state *progress,
                                    sh_train_options *out, sh_error *err)
{
    static const char *const factors[] = {"none", "a", "b"};
    size_t freeze = 0;
    SH_TRY(train_options(&o->common, progress, out, err));
    SH_TRY(choose("freeze", o->freeze, factors, SH_COUNT(factors), &freeze, err));
    out->freeze = (sh_freeze)freeze;
    out->proximal = (float)o->proximal;
    return SH_OK;
}

static sh_status run_lora(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    lora_options o = {0};
    sh_args args = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    text train = {0}, heldout = {0};
    sh_train_data data = {0}, heldout_data = {0};
    sh_train_result result = {0};
    sh_buf encoded = {0};
    double heldout_loss = 0;

    SH_GOTO(sh_options_parse(&lora_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(need(o.base, "base", err));
    SH_GOTO(need_training(&o.common, err));
    SH_GOTO(sh_model_open(o.base, &model, err));
    SH_GOTO(text_load(model->tokenizer, o.common.data, &train, err));
    SH_GOTO(chunks_in_order(o.common.data, &train, (size_t)o.common.context, &data, err));
    if (o.common.heldout) {
        SH_GOTO(text_load(model->tokenizer, o.common.heldout, &heldout, err));
        SH_GOTO(chunks_in_order(o.common.heldout, &heldout, (size_t)o.common.context, &heldout_data,
                                err));
    }
    SH_GOTO(first_adapter(&o, model, &adapter, err));
    warn_of_blas();
    progress_state progress = progress_start(&o.common);
    sh_train_options options;
    SH_GOTO(lora_train_options(&o, &progress, &options, err));
    SH_GOTO(training_memory(&o.common, model->file_bytes, &options.memory_max, err));
    const sh_train_limits limits = {.threads = options.threads, .memory_max = options.memory_max};
    SH_GOTO(sh_lora_train(model, adapter, &data, &options, &result, err));
    if (o.common.heldout)
        SH_GOTO(sh_train_evaluate(model, adapter, &heldout_data, &limits, &heldout_loss, err));
    sh_buf_init(&encoded, SIZE_MAX);
    SH_GOTO(sh_adapter_encode(adapter, &encoded, err));
    SH_GOTO(sh_file_write_atomic(o.common.out, encoded.data, encoded.len, err));
    if (o.peft)
        SH_GOTO(sh_adapter_save_peft(adapter, &model->config, o.peft, o.base, err));
    print_report(&(report){&o.common, &result, heldout_loss, train.n});
cleanup:
    sh_buf_release(&encoded);
    data_release(&data);
    data_release(&heldout_data);
    free(train.tokens);
    free(heldout.tokens);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    sh_args_release(&args);
    return status;
}

/* ---- full ---- */

static sh_status full_config(const full_options *o, const sh_tokenizer *tokenizer,
                             sh_model_config *out, sh_error *err)
{
    if (o->width % o->heads != 0 || o->heads % o->kv_heads != 0 || o->width / o->heads % 2 != 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "--width must be an even multiple of --heads, and --heads a multiple of "
                       "--kv-heads");
    if (o->common.context > o->context_length)
        return sh_fail(err, SH_ERR_USAGE, "--context is above --context-length");
    *out = (sh_model_config){
        .n_layers = (uint32_t)o->layers,
        .width = (uint32_t)o->width,
        .n_heads = (uint32_t)o->heads,
        .n_kv_heads = (uint32_t)o->kv_heads,
        .head_size = (uint32_t)(o->width / o->heads),
        .ffn = (uint32_t)o->ffn,
        .vocab = sh_tokenizer_size(tokenizer),
        .context = (uint32_t)o->context_length,
        .rope_base = (float)o->rope_base,
        .norm_eps = (float)o->norm_eps,
        .tied_output = true,
    };
    return SH_OK;
}

/* Trains and saves; a stop by signal saves what there is and is still an error. */
static sh_status full_train_and_save(const full_options *o, sh_full *full,
                                     const sh_train_data *data, sh_train_result *result,
                                     sh_error *err)
{
    sh_type type;
    SH_TRY(sh_type_parse(o->type, &type, err));
    warn_of_blas();
    progress_state progress = progress_start(&o->common);
    progress.full = full;
    progress.type = type;
    sh_train_options options;
    SH_TRY(train_options(&o->common, &progress, &options, err));
    options.shuffle_seed = 0; /* the sequences are in a random order already */
    SH_TRY(training_memory(&o->common, 0, &options.memory_max, err));
    sh_status status = sh_full_train(full, data, &options, result, err);
    if (progress.save_status != SH_OK) {
        if (err)
            *err = progress.save_error;
        return progress.save_status;
    }
    if (status == SH_ERR_CANCELLED)
        SH_TRY(sh_full_save(full, type, o->common.out, err));
    SH_TRY(status);
    return sh_full_save(full, type, o->common.out, err);
}

static sh_status run_full(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    full_options o = {0};
    sh_args args = {0};
    sh_gguf *vocab = NULL;
    sh_tokenizer *tokenizer = NULL;
    sh_full *full = NULL;
    text train = {0}, heldout = {0};
    sh_train_data data = {0}, heldout_data = {0};
    sh_model_config config;
    sh_train_result result = {0};
    double heldout_loss = 0;

    SH_GOTO(sh_options_parse(&full_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(need(o.vocab, "vocab", err));
    SH_GOTO(need_training(&o.common, err));
    SH_GOTO(sh_gguf_open(o.vocab, &vocab, err));
    SH_GOTO(sh_tokenizer_load(vocab, &tokenizer, err));
    SH_GOTO(full_config(&o, tokenizer, &config, err));
    SH_GOTO(text_load(tokenizer, o.common.data, &train, err));
    SH_GOTO(chunks_shuffled(o.common.data, &train, (size_t)o.common.context,
                            (size_t)o.common.steps * (size_t)o.common.batch,
                            (uint64_t)o.common.seed, &data, err));
    if (o.common.heldout) {
        SH_GOTO(text_load(tokenizer, o.common.heldout, &heldout, err));
        SH_GOTO(chunks_in_order(o.common.heldout, &heldout, (size_t)o.common.context, &heldout_data,
                                err));
    }
    SH_GOTO(sh_full_random(&config, o.vocab, (uint64_t)o.common.seed, &full, err));
    SH_GOTO(full_train_and_save(&o, full, &data, &result, err));
    if (o.common.heldout)
        SH_GOTO(sh_full_evaluate(full, &heldout_data,
                                 &(sh_train_limits){.threads = (unsigned)o.common.threads},
                                 &heldout_loss, err));
    print_report(&(report){&o.common, &result, heldout_loss, train.n});
cleanup:
    sh_full_destroy(&full);
    data_release(&data);
    data_release(&heldout_data);
    free(train.tokens);
    free(heldout.tokens);
    sh_tokenizer_destroy(&tokenizer);
    sh_gguf_close(&vocab);
    sh_args_release(&args);
    return status;
}

/* ---- eval ---- */

static sh_status run_eval(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    eval_options o = {0};
    sh_args args = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    text t = {0};
    sh_train_data data = {0};
    double nll = 0;

    SH_GOTO(sh_options_parse(&eval_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(need(o.model, "model", err));
    SH_GOTO(need(o.data, "data", err));
    SH_GOTO(sh_model_open(o.model, &model, err));
    if (o.adapter)
        SH_GOTO(sh_adapter_open(o.adapter, &model->config, &adapter, err));
    SH_GOTO(text_load(model->tokenizer, o.data, &t, err));
    SH_GOTO(chunks_in_order(o.data, &t, (size_t)o.context, &data, err));
    SH_GOTO(sh_train_evaluate(model, adapter, &data,
                              &(sh_train_limits){.threads = (unsigned)o.threads}, &nll, err));
    if (o.json) {
        json_t *j = json_object();
        sh_json_set(j, "mean_nll", sh_json_number(nll));
        sh_json_set(j, "targets", json_integer((json_int_t)(data.n * (data.length - 1))));
        sh_json_set(j, "tokens", json_integer((json_int_t)t.n));
        sh_json_set(j, "blas_core", json_string(sh_blas_core()));
        json_dumpf(j, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(j);
    } else {
        printf("mean NLL %.6f over %zu tokens\n", nll, data.n * (data.length - 1));
    }
cleanup:
    data_release(&data);
    free(t.tokens);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    sh_args_release(&args);
    return status;
}

/* ---- main ---- */

static sh_status run_round(int argc, char **argv, sh_error *err)
{
    catch_signals();
    return sh_round_main(argc, argv, err);
}

static sh_status run_tokenizer(int argc, char **argv, sh_error *err)
{
    catch_signals();
    return sh_tokenizer_train_main(argc, argv, err);
}

static const struct {
    const char *name;
    const sh_command *command;
    sh_status (*run)(int argc, char **argv, sh_error *err);
} commands[] = {
    {"lora", &lora_command, run_lora},
    {"full", &full_command, run_full},
    {"eval", &eval_command, run_eval},
    {"round", &sh_round_command, run_round},
    {"tokenizer", &sh_tokenizer_train_command, run_tokenizer},
};

static void print_help(const sh_command *command)
{
    sh_buf text_of;
    sh_buf_init(&text_of, 1u << 20);
    if (sh_options_help(command, &text_of) == SH_OK)
        fwrite(text_of.data, 1, text_of.len, stdout);
    sh_buf_release(&text_of);
}

static bool asks_for_help(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0)
            return true;
    return false;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    for (size_t i = 0; argc > 1 && i < SH_COUNT(commands); i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        if (asks_for_help(argc - 1, argv + 1)) {
            print_help(commands[i].command);
            return 0;
        }
        sh_status status = commands[i].run(argc - 1, argv + 1, &err);
        return status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
    }
    bool help = argc > 1 && asks_for_help(argc, argv);
    fprintf(help ? stdout : stderr, "usage: " PROGRAM " lora|full|eval|round|tokenizer [OPTIONS]; "
                                    "'" PROGRAM " lora --help' lists the options of one\n");
    return help ? 0 : 2;
}
