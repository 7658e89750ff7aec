/* `shoal-train lora`: an adapter beside a frozen base. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/convert.h"
#include "shared/model/quantize.h"
#include "trainer/commands.h"
#include "trainer/program.h"

typedef struct {
    tp_options common;
    const char *base, *start, *targets, *ranks, *alphas, *variant, *freeze;
    const char *peft, *merged, *merged_type;
    int64_t rank, a_seed, alternate;
    double alpha, proximal, dropout;
    bool rslora;
} lora_options;

static const sh_option table[] = {
    SH_OPT_STRING(lora_options, base, 'm', "base", "FILE", NULL, "GGUF model to adapt"),
    SH_OPT_INT(lora_options, rank, 'r', "rank", "N", 8, 1, SH_LORA_RANK_MAX, "rank of A and B"),
    SH_OPT_STRING(lora_options, ranks, 0, "ranks", "LIST", NULL,
                  "ranks of some of the matrices: q=16,v=4"),
    SH_OPT_REAL(lora_options, alpha, 0, "alpha", "X", 16, 1e-6, 1e6, "scale is alpha / rank"),
    SH_OPT_STRING(lora_options, alphas, 0, "alphas", "LIST", NULL,
                  "alphas of some of the matrices: down=8"),
    SH_OPT_FLAG(lora_options, rslora, 0, "rslora", "scale is alpha / sqrt(rank)"),
    SH_OPT_STRING(lora_options, targets, 0, "targets", "LIST", "q,k,v,o,gate,up,down",
                  "matrices to adapt; output, too, where it is not the embedding"),
    SH_OPT_STRING(lora_options, variant, 0, "variant", "NAME", "lora",
                  "lora; others are options of their own, or refused"),
    SH_OPT_REAL(lora_options, dropout, 0, "dropout", "X", 0, 0, 0.99,
                "share of A's inputs that a step forgets"),
    SH_OPT_INT(lora_options, a_seed, 0, "a-seed", "N", 1, 0, INT32_MAX, "first values of A"),
    SH_OPT_STRING(lora_options, start, 0, "start", "ADAPTER", NULL,
                  "begin with this adapter, GGUF or a PEFT folder, and its ranks and alpha"),
    SH_OPT_STRING(lora_options, freeze, 0, "freeze", "NAME", "none",
                  "a factor that is not trained: a, b, none"),
    SH_OPT_INT(lora_options, alternate, 0, "alternate", "N", 0, 0, 100000000,
               "steps after which the other factor is frozen, A first; 0: never"),
    SH_OPT_REAL(lora_options, proximal, 0, "proximal", "X", 0, 0, 1e6,
                "weight of half the squared distance to the start"),
    SH_OPT_STRING(lora_options, peft, 0, "peft", "DIR", NULL,
                  "write the adapter as a PEFT folder, too"),
    SH_OPT_STRING(lora_options, merged, 0, "merged", "FILE", NULL,
                  "write the base with the adapter merged into it, too, as GGUF"),
    SH_OPT_STRING(lora_options, merged_type, 0, "merged-type", "TYPE", NULL,
                  "of its matrices; default: that of --quantize-aware, or Q8_0"),
    TP_OPTIONS(lora_options, 5e-3, 0.5),
};
const sh_command sh_lora_command = {
    TP_PROGRAM " lora",
    "--base FILE --data PATH --out PATH",
    table,
    SH_COUNT(table),
    "Trains a LoRA adapter beside the matrices of every layer of a frozen, quantized base.",
    TP_PROGRAM " lora --base base-q8_0.gguf --data notes.txt --rank 8 --steps 200 --out adapted"};

/* ---- matrices by their short names ---- */

enum { OUTPUT = SH_LAYER_MATRICES, TARGETS };
static const char *const target_names[TARGETS] = {"q",    "k",  "v",    "o",
                                                  "gate", "up", "down", "output"};

/* The next word of a list with commas; false at its end. */
static bool next_word(const char **list, char *word, size_t bytes)
{
    *list += strspn(*list, ", ");
    const size_t n = strcspn(*list, ",");
    snprintf(word, bytes, "%.*s", (int)n, *list);
    *list += n;
    return n > 0;
}

static sh_status read_targets(const char *list, bool out[TARGETS], sh_error *err)
{
    char word[32];
    size_t which;
    memset(out, 0, TARGETS * sizeof *out);
    while (next_word(&list, word, sizeof word)) {
        SH_TRY(tp_choose("targets", word, target_names, TARGETS, &which, err));
        out[which] = true;
    }
    return SH_OK;
}

/* "q=16,v=4" over what values has. */
static sh_status read_numbers(const char *key, const char *list, double least, double most,
                              double values[TARGETS], sh_error *err)
{
    char word[48];
    size_t which = 0;
    while (list && next_word(&list, word, sizeof word)) {
        char *number = strchr(word, '='), *end;
        if (!number)
            return sh_fail(err, SH_ERR_USAGE, "--%s: '%s' is not NAME=NUMBER", key, word);
        *number++ = '\0';
        SH_TRY(tp_choose(key, word, target_names, TARGETS, &which, err));
        values[which] = strtod(number, &end);
        if (end == number || *end || !(values[which] >= least && values[which] <= most))
            return sh_fail(err, SH_ERR_USAGE, "--%s: %s=%s is not in [%g, %g]", key, word, number,
                           least, most);
    }
    return SH_OK;
}

/* A rank or an alpha of a matrix that is not adapted would be lost without a word. */
static sh_status check_adapted(const char *key, const char *list, const bool targets[TARGETS],
                               sh_error *err)
{
    double values[TARGETS] = {0};
    SH_TRY(read_numbers(key, list, 1e-6, 1e6, values, err));
    for (size_t i = 0; i < TARGETS; i++) {
        if (values[i] > 0 && !targets[i])
            return sh_fail(err, SH_ERR_USAGE, "--%s: %s is not among --targets", key,
                           target_names[i]);
        if (strcmp(key, "ranks") == 0 && values[i] != floor(values[i]))
            return sh_fail(err, SH_ERR_USAGE, "--ranks: %s=%g is no whole number", target_names[i],
                           values[i]);
    }
    return SH_OK;
}

/* What PEFT and others have beside plain LoRA. */
static sh_status check_variant(const char *name, sh_error *err)
{
    static const struct {
        const char *name, *use;
    } ours[] = {{"rslora", "--rslora"}, {"ffa", "--freeze a"}, {"rolora", "--alternate N"}};
    if (strcmp(name, "lora") == 0)
        return SH_OK;
    for (size_t i = 0; i < SH_COUNT(ours); i++)
        if (strcmp(name, ours[i].name) == 0)
            return sh_fail(err, SH_ERR_USAGE, "--variant %s: give %s instead", name, ours[i].use);
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "--variant %.40s is not supported: a GGUF adapter holds B·A and one scale, and "
                   "nothing else; there are lora, and --rslora, --freeze a (FFA), --alternate N "
                   "(RoLoRA)",
                   name);
}

/* ---- the adapter ---- */

static sh_status make_adapter(const lora_options *o, const sh_model *model, sh_adapter **out,
                              sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *adapter = NULL;
    bool targets[TARGETS];
    double numbers[TARGETS];
    uint32_t ranks[SH_LAYER_MATRICES];
    bool any = false;
    SH_TRY(read_targets(o->targets, targets, err));
    SH_TRY(check_adapted("ranks", o->ranks, targets, err));
    SH_TRY(check_adapted("alphas", o->alphas, targets, err));
    for (size_t i = 0; i < TARGETS; i++)
        numbers[i] = (double)o->rank;
    SH_TRY(read_numbers("ranks", o->ranks, 1, SH_LORA_RANK_MAX, numbers, err));
    for (size_t i = 0; i < SH_LAYER_MATRICES; i++)
        any |= (ranks[i] = targets[i] ? (uint32_t)numbers[i] : 0) > 0;
    if (any)
        SH_GOTO(sh_lora_initialize_ranks(&model->config, (uint64_t)o->a_seed, ranks,
                                         (float)o->alpha, &adapter, err));
    else
        SH_GOTO(sh_adapter_create_empty(&model->config, (float)o->alpha, &adapter, err));
    if (targets[OUTPUT])
        SH_GOTO(sh_lora_add_output(adapter, &model->config, (uint64_t)o->a_seed,
                                   (uint32_t)numbers[OUTPUT], err));
    *out = adapter;
    adapter = NULL;
cleanup:
    sh_adapter_destroy(&adapter);
    return status;
}

static sh_status first_adapter(const lora_options *o, const sh_model *model, sh_adapter **out,
                               sh_error *err)
{
    if (!o->start)
        return make_adapter(o, model, out, err);
    if (o->ranks)
        return sh_fail(err, SH_ERR_USAGE, "--ranks: an adapter of --start has its own ranks");
    SH_TRY(sh_adapter_open_any(o->start, &model->config, out, err));
    const sh_status status = sh_adapter_check_base(*out, model, o->start, err);
    if (status != SH_OK)
        sh_adapter_destroy(out);
    return status;
}

static sh_status lora_train_options(const lora_options *o, tp_run *run, const tp_source *source,
                                    sh_train_options *out, sh_error *err)
{
    static const char *const factors[] = {"none", "a", "b"};
    double alphas[TARGETS] = {0};
    size_t freeze = 0;
    SH_TRY(tp_train_options(run, source, out, err));
    SH_TRY(tp_choose("freeze", o->freeze, factors, SH_COUNT(factors), &freeze, err));
    SH_TRY(read_numbers("alphas", o->alphas, 1e-6, 1e6, alphas, err));
    if (alphas[OUTPUT] > 0)
        return sh_fail(err, SH_ERR_USAGE, "--alphas: the output matrix has --alpha");
    for (size_t i = 0; i < SH_LAYER_MATRICES; i++)
        out->alphas[i] = (float)alphas[i];
    out->freeze = (sh_freeze)freeze;
    out->alternate = (uint32_t)o->alternate;
    out->proximal = (float)o->proximal;
    out->rslora = o->rslora;
    out->dropout = (float)o->dropout;
    out->dropout_seed = (uint64_t)o->common.seed;
    return SH_OK;
}

/* ---- what is written ---- */

static sh_status merged_type(const lora_options *o, sh_type *out, sh_error *err)
{
    const char *name = o->merged_type             ? o->merged_type
                       : o->common.quantize_aware ? o->common.quantize_aware
                                                  : "Q8_0";
    return tp_written_type("merged-type", name, out, err);
}

static sh_status write_outputs(const lora_options *o, const tp_run *run, const sh_model *model,
                               const sh_adapter *adapter, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf encoded;
    sh_buf_init(&encoded, SIZE_MAX);
    SH_GOTO(sh_adapter_encode(adapter, &encoded, err));
    SH_GOTO(sh_file_write_atomic(run->out, encoded.data, encoded.len, err));
    if (o->peft)
        SH_GOTO(sh_adapter_save_peft(adapter, &model->config, o->peft, o->base, err));
    if (o->merged) {
        sh_type type;
        SH_GOTO(merged_type(o, &type, err));
        SH_GOTO(sh_gguf_merge_file(model->gguf, adapter, type, o->merged, NULL, err));
    }
cleanup:
    sh_buf_release(&encoded);
    return status;
}

sh_status sh_lora_main(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    lora_options o = {0};
    sh_args args = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    tp_run run = {0};
    sh_train_result result = {0};
    sh_train_options options;
    sh_type type;
    double heldout = 0;

    SH_GOTO(tp_parse(&sh_lora_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(tp_need(o.base, "base", err));
    SH_GOTO(check_variant(o.variant, err));
    SH_GOTO(merged_type(&o, &type, err));
    SH_GOTO(sh_model_open(o.base, &model, err));
    SH_GOTO(first_adapter(&o, model, &adapter, err));
    const tp_source source = {.tokenizer = model->tokenizer,
                              .chat = sh_chat_detect(model->gguf),
                              .file_name = "adapter.gguf",
                              .base = model,
                              .folder = o.peft,
                              .inputs = {o.base, o.start},
                              .outputs = {o.merged}};
    SH_GOTO(tp_run_open(&run, &o.common, &source, err));
    SH_GOTO(lora_train_options(&o, &run, &source, &options, err));
    tp_catch_signals();
    SH_GOTO(tp_trained(&run, sh_lora_train(model, adapter, &run.train.data, &options, &result, err),
                       err));
    if (tp_heldout_is_due(&run, &result, &heldout)) {
        const sh_train_limits limits = {options.threads, options.memory_max,
                                        options.quantize_aware};
        SH_GOTO(sh_train_evaluate(model, adapter, &run.heldout.data, &limits, &heldout, err));
    }
    adapter->base = sh_model_hash(model);
    SH_GOTO(tp_written(&run, write_outputs(&o, &run, model, adapter, err), err));
    tp_finish(&run, &result, heldout);
cleanup:
    tp_run_release(&run);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    sh_args_release(&args);
    return status;
}
