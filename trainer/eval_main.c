/* `shoal-train eval`: the loss of data. */
#include <math.h>
#include <stdio.h>

#include "shared/base/json.h"
#include "shared/math/blas.h"
#include "shared/model/convert.h"
#include "trainer/commands.h"
#include "trainer/program.h"

typedef struct {
    const char *model, *adapter, *data, *long_samples, *quantize_aware;
    int64_t context, threads, memory_max;
    bool json;
} eval_options;

static const sh_option table[] = {
    SH_OPT_STRING(eval_options, model, 'm', "model", "FILE", NULL, "GGUF model"),
    SH_OPT_STRING(eval_options, adapter, 0, "lora", "ADAPTER", NULL,
                  "LoRA adapter, GGUF or a PEFT folder"),
    SH_OPT_STRING(eval_options, data, 'f', "data", "PATH", NULL,
                  "text, JSON Lines, a snapshot, or a folder of such files"),
    SH_OPT_INT(eval_options, context, 'c', "context", "N", 128, 1, SH_CONTEXT_MAX,
               "tokens a sequence"),
    SH_OPT_STRING(eval_options, long_samples, 0, "long-samples", "NAME", "refuse",
                  "a sample that is longer than the context: refuse, skip, split"),
    SH_OPT_STRING(eval_options, quantize_aware, 0, "quantize-aware", "TYPE", NULL,
                  "as if model and adapter were merged and quantized to Q8_0 or Q4_0"),
    SH_OPT_INT(eval_options, threads, 't', "threads", "N", 1, 1, 256, "worker threads"),
    SH_OPT_INT(eval_options, memory_max, 0, "memory-max", "BYTES", 0, 0, 1ll << 50,
               "stay below so much resident memory, slower; 0: no limit"),
    SH_OPT_FLAG(eval_options, json, 0, "json", "print one JSON object"),
};
const sh_command sh_eval_command = {
    TP_PROGRAM " eval",
    "--model FILE --data PATH [--lora ADAPTER]",
    table,
    SH_COUNT(table),
    "Mean negative log-likelihood of the data's targets, in the sequences that a training would "
    "see.",
    TP_PROGRAM " eval --model base.gguf --data heldout.txt --context 128 --json"};

static sh_status open_adapter(const eval_options *o, const sh_model *model, sh_adapter **out,
                              sh_error *err)
{
    sh_adapter *adapter = NULL;
    SH_TRY(sh_adapter_open_any(o->adapter, &model->config, &adapter, err));
    const sh_status status = sh_adapter_check_base(adapter, model, o->adapter, err);
    if (status == SH_OK)
        *out = adapter;
    else
        sh_adapter_destroy(&adapter);
    return status;
}

static void print_result(const eval_options *o, const sh_dataset_rows *rows, double nll)
{
    if (!o->json) {
        printf("mean NLL %.6f, perplexity %.4f, of %llu tokens; %s, %lld threads\n", nll, exp(nll),
               (unsigned long long)rows->targets, sh_blas_core(), (long long)o->threads);
        return;
    }
    json_t *j = json_object();
    sh_json_set(j, "mean_nll", sh_json_number(nll));
    sh_json_set(j, "targets", json_integer((json_int_t)rows->targets));
    sh_json_set(j, "sequences", json_integer((json_int_t)rows->data.n));
    sh_json_set(j, "threads", json_integer(o->threads));
    sh_json_set(j, "blas_core", json_string(sh_blas_core()));
    json_dumpf(j, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(j);
}

static sh_status memory_left(const eval_options *o, uint64_t file_bytes, uint64_t *out,
                             sh_error *err)
{
    const uint64_t limit = (uint64_t)o->memory_max, taken = tp_memory_taken(o->threads, file_bytes);
    *out = limit == 0 ? 0 : limit - SH_MIN(limit, taken);
    return limit == 0 || limit > taken
               ? SH_OK
               : sh_fail(err, SH_ERR_LIMIT,
                         "--memory-max %llu is too little: the program, its data, the model's file "
                         "and OpenBLAS take %llu, and the sequences more",
                         (unsigned long long)limit, (unsigned long long)taken);
}

sh_status sh_eval_main(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    eval_options o = {0};
    sh_args args = {0};
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    sh_dataset *data = NULL;
    sh_dataset_rows rows = {0};
    sh_dataset_packing packing = {0};
    sh_train_limits limits = {0};
    double nll = 0;

    SH_GOTO(sh_options_parse(&sh_eval_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    SH_GOTO(tp_no_words(&sh_eval_command, &args, err));
    SH_GOTO(tp_need(o.model, "model", err));
    SH_GOTO(tp_need(o.data, "data", err));
    SH_GOTO(tp_long_samples(o.long_samples, &packing.long_samples, err));
    SH_GOTO(tp_quantize_aware(o.quantize_aware, &limits.quantize_aware, err));
    SH_GOTO(sh_model_open(o.model, &model, err));
    if (o.adapter)
        SH_GOTO(open_adapter(&o, model, &adapter, err));
    const sh_dataset_options reading = {.tokenizer = model->tokenizer,
                                        .chat = sh_chat_detect(model->gguf)};
    packing.context = (uint32_t)o.context;
    SH_GOTO(sh_dataset_open(o.data, &reading, &data, err));
    SH_GOTO(sh_dataset_pack(data, &packing, &rows, err));
    limits.threads = (unsigned)o.threads;
    SH_GOTO(memory_left(&o, model->file_bytes, &limits.memory_max, err));
    SH_GOTO(sh_train_evaluate(model, adapter, &rows.data, &limits, &nll, err));
    print_result(&o, &rows, nll);
cleanup:
    sh_dataset_rows_release(&rows);
    sh_dataset_destroy(&data);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    sh_args_release(&args);
    return status;
}
