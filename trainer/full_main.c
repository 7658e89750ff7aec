/* `shoal-train full` and `shoal-train distill`: every weight of a small model. */
#include <stdlib.h>

#include "shared/base/memory.h"
#include "trainer/commands.h"
#include "trainer/program.h"

typedef struct {
    tp_options common;
    const char *vocab, *init, *type, *arch;
    int64_t width, layers, heads, kv_heads, head_size, ffn, context_length;
    double rope_base, norm_eps;
    bool untied;
} full_options;

/* clang-format off */
#define SHAPE_OPTIONS                                                                              \
    SH_OPT_STRING(full_options, init, 0, "init", "FILE", NULL,                                     \
                  "begin with this GGUF model, in its shape, instead of random values"),           \
    SH_OPT_STRING(full_options, type, 0, "type", "TYPE", "F16", "type of the saved matrices"),     \
    SH_OPT_STRING(full_options, arch, 0, "arch", "NAME", "llama",                                  \
                  "architecture of a new model: llama, qwen2, qwen3"),                             \
    SH_OPT_INT(full_options, width, 0, "width", "N", 256, 2, 65536, "embedding length"),           \
    SH_OPT_INT(full_options, layers, 0, "layers", "N", 4, 1, SH_MODEL_LAYERS_MAX, "layers"),       \
    SH_OPT_INT(full_options, heads, 0, "heads", "N", 4, 1, 1024, "attention heads"),               \
    SH_OPT_INT(full_options, kv_heads, 0, "kv-heads", "N", 2, 1, 1024, "key and value heads"),     \
    SH_OPT_INT(full_options, head_size, 0, "head-size", "N", 0, 0, 65536,                          \
               "of a head; 0: width / heads"),                                                     \
    SH_OPT_FLAG(full_options, untied, 0, "untied",                                                 \
                "an output matrix beside the embedding"),                                          \
    SH_OPT_INT(full_options, ffn, 0, "ffn", "N", 512, 1, 1 << 20, "feed-forward length"),          \
    SH_OPT_INT(full_options, context_length, 0, "context-length", "N", 512, 2, SH_CONTEXT_MAX,     \
               "context that the file promises"),                                                  \
    SH_OPT_REAL(full_options, rope_base, 0, "rope-base", "X", 10000, 1, 1e9, "RoPE's base"),       \
    SH_OPT_REAL(full_options, norm_eps, 0, "norm-eps", "X", 1e-5, 1e-12, 1, "RMSNorm's epsilon")
/* clang-format on */

static const sh_option full_table[] = {
    SH_OPT_STRING(full_options, vocab, 0, "vocab", "FILE", NULL,
                  "GGUF whose tokenizer the model takes"),
    SHAPE_OPTIONS,
    TP_OPTIONS(full_options, 3e-3, 0.5),
};
const sh_command sh_full_command = {
    TP_PROGRAM " full",
    "--vocab FILE|--init FILE --data PATH --out PATH",
    full_table,
    SH_COUNT(full_table),
    "Trains every weight of a small model: one of random values, or one from a file.",
    TP_PROGRAM " full --vocab vocab.gguf --data train.txt --steps 3000 --batch 16 --out base.gguf"};

static const sh_option distill_table[] = {
    SH_OPT_STRING(full_options, vocab, 0, "vocab", "FILE", NULL,
                  "GGUF whose tokenizer the student takes; default: the teacher's"),
    SHAPE_OPTIONS,
    TP_OPTIONS(full_options, 3e-3, 0.5),
};
const sh_command sh_distill_command = {
    TP_PROGRAM " distill",
    "--teacher FILE --data PATH --out PATH [--init FILE]",
    distill_table,
    SH_COUNT(distill_table),
    "Trains a small model on the probabilities of a larger one: every weight of a student of "
    "random values, or of one from a file. (`lora --teacher` trains an adapter so.)",
    TP_PROGRAM " distill --teacher big-q8_0.gguf --data texts/ --width 192 --steps 3000 --out "
               "small.gguf"};

static sh_status full_config(const full_options *o, const sh_tokenizer *tokenizer,
                             sh_model_config *out, sh_error *err)
{
    static const char *const names[] = {"llama", "qwen2", "qwen3"}; /* as sh_arch */
    const int64_t head_size = o->head_size > 0 ? o->head_size : o->width / o->heads;
    size_t arch = 0;
    SH_TRY(tp_choose("arch", o->arch, names, SH_COUNT(names), &arch, err));
    if ((o->head_size == 0 && o->width % o->heads != 0) || o->heads % o->kv_heads != 0 ||
        head_size % 2 != 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "--width must be an even multiple of --heads (or --head-size even), and "
                       "--heads a multiple of --kv-heads");
    if (arch == SH_ARCH_QWEN2 && head_size * o->heads != o->width)
        return sh_fail(err, SH_ERR_USAGE, "--head-size: heads of qwen2 are width / heads wide");
    if (o->common.context > o->context_length)
        return sh_fail(err, SH_ERR_USAGE, "--context is above --context-length");
    *out = (sh_model_config){
        .arch = (sh_arch)arch,
        .n_layers = (uint32_t)o->layers,
        .width = (uint32_t)o->width,
        .n_heads = (uint32_t)o->heads,
        .n_kv_heads = (uint32_t)o->kv_heads,
        .head_size = (uint32_t)head_size,
        .ffn = (uint32_t)o->ffn,
        .vocab = sh_tokenizer_size(tokenizer),
        .context = (uint32_t)o->context_length,
        .rope_base = (float)o->rope_base,
        .norm_eps = (float)o->norm_eps,
        .tied_output = !o->untied,
        .rope_halves = sh_arch_rope_halves((sh_arch)arch),
    };
    return SH_OK;
}

/* What the training begins with. */
typedef struct {
    sh_model *init; /* NULL: random values, and: */
    sh_gguf *vocab;
    sh_tokenizer *tokenizer;
    sh_full *full;
} student;

static void student_release(student *s)
{
    sh_full_destroy(&s->full);
    sh_tokenizer_destroy(&s->tokenizer);
    sh_gguf_close(&s->vocab);
    sh_model_close(&s->init);
}

static sh_status student_open(const full_options *o, student *s, sh_error *err)
{
    sh_model_config config;
    if (o->init) {
        SH_TRY(sh_model_open(o->init, &s->init, err));
        return sh_full_from_model(s->init, &s->full, err);
    }
    const char *vocab = o->vocab ? o->vocab : o->common.teacher;
    SH_TRY(tp_need(vocab, "vocab", err));
    SH_TRY(sh_gguf_open(vocab, &s->vocab, err));
    SH_TRY(sh_tokenizer_load(s->vocab, &s->tokenizer, err));
    SH_TRY(full_config(o, s->tokenizer, &config, err));
    return sh_full_random(&config, vocab, (uint64_t)o->common.seed, &s->full, err);
}

static sh_status run(const sh_command *command, int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    full_options o = {0};
    sh_args args = {0};
    student s = {0};
    tp_run r = {0};
    sh_train_result result = {0};
    sh_train_options options;
    sh_type type;
    double heldout = 0;

    SH_GOTO(tp_parse(command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    if (command == &sh_distill_command)
        SH_GOTO(tp_need(o.common.teacher, "teacher", err));
    SH_GOTO(tp_written_type("type", o.type, &type, err));
    const uint64_t before = sh_memory_now().resident;
    SH_GOTO(student_open(&o, &s, err));
    const uint64_t after = sh_memory_now().resident;
    SH_GOTO(sh_full_check_save(s.full, type, err));
    const tp_source source = {.tokenizer = s.init ? s.init->tokenizer : s.tokenizer,
                              .chat = sh_chat_detect(s.init ? s.init->gguf : s.vocab),
                              .cut_anew = true,
                              .file_name = "model.gguf",
                              .base = s.init,
                              .weights_bytes = after - SH_MIN(before, after),
                              .inputs = {o.vocab, o.init}};
    SH_GOTO(tp_run_open(&r, &o.common, &source, err));
    SH_GOTO(tp_train_options(&r, &source, &options, err));
    tp_catch_signals();
    SH_GOTO(tp_trained(&r, sh_full_train(s.full, &r.train.data, &options, &result, err), err));
    if (tp_heldout_is_due(&r, &result, &heldout)) {
        const sh_train_limits limits = {options.threads, options.memory_max,
                                        options.quantize_aware};
        SH_GOTO(sh_full_evaluate(s.full, &r.heldout.data, &limits, &heldout, err));
    }
    SH_GOTO(tp_written(&r, sh_full_save(s.full, type, r.out, err), err));
    tp_finish(&r, &result, heldout);
cleanup:
    tp_run_release(&r);
    student_release(&s);
    sh_args_release(&args);
    return status;
}

sh_status sh_full_main(int argc, char **argv, sh_error *err)
{
    return run(&sh_full_command, argc, argv, err);
}

sh_status sh_distill_main(int argc, char **argv, sh_error *err)
{
    return run(&sh_distill_command, argc, argv, err);
}
