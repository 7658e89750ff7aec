/*
 * `shoal model convert`: between Hugging Face's files and GGUF. What the input is decides what
 * becomes of it:
 *
 *   a folder with adapter_config.json   PEFT adapter    -> GGUF adapter   (needs -m BASE)
 *   a folder with config.json           model           -> GGUF model     (takes --type, --pre)
 *   a GGUF file of an adapter           GGUF adapter    -> PEFT folder    (needs -m BASE)
 */
#include <string.h>
#include <sys/stat.h>

#include "aggregator/cli_model.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/model/convert.h"

typedef struct {
    const char *input, *out, *to, *model, *type, *pre;
    bool json;
} convert_options;

static const sh_option convert_table[] = {
    SH_OPT_STRING(convert_options, input, 'i', "input", "PATH", NULL,
                  "what to convert: a Hugging Face model's folder, a PEFT adapter's folder, or an "
                  "adapter in GGUF"),
    SH_OPT_STRING(convert_options, out, 'o', "output", "OUT", NULL,
                  "file to write; to PEFT, the folder"),
    SH_OPT_STRING(convert_options, to, 0, "to", "FORM", NULL,
                  "gguf or peft; what the input is decides it, and this makes sure"),
    SH_OPT_STRING(convert_options, model, 'm', "model", "FILE", NULL,
                  "GGUF model that the adapter belongs to, for its shapes"),
    SH_OPT_STRING(convert_options, type, 0, "type", "TYPE", NULL,
                  "of a model's matrices: F32, F16 (the default), BF16, Q8_0, Q4_0"),
    SH_OPT_STRING(convert_options, pre, 0, "pre", "NAME", NULL,
                  "pre-tokenizer of a model (llama-bpe, qwen2, gpt-2, ...) where its regular "
                  "expression is not known"),
    SH_OPT_FLAG(convert_options, json, 0, "json", "print one JSON object"),
};
static const sh_command convert_command = {
    "shoal model convert",
    "-i PATH -o OUT [-m BASE.gguf] [--type TYPE]",
    convert_table,
    SH_COUNT(convert_table),
    "Converts a Hugging Face model (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; "
    "safetensors) to GGUF, and LoRA adapters between PEFT's folder and GGUF, both ways.",
    "shoal model convert -i SmolLM2-135M --type Q8_0 -o smollm2-135m-q8.gguf",
};

typedef enum { INPUT_MODEL, INPUT_PEFT, INPUT_GGUF_ADAPTER } input_kind;

static bool has_file(const char *folder, const char *name)
{
    char path[SH_PATH_BYTES];
    return sh_path_join(path, sizeof path, folder, name, NULL) == SH_OK && sh_file_exists(path);
}

static sh_status find_kind(const char *input, input_kind *out, sh_error *err)
{
    struct stat info;
    if (stat(input, &info) == 0 && S_ISDIR(info.st_mode)) {
        const bool peft = has_file(input, "adapter_config.json");
        if (!peft && !has_file(input, "config.json"))
            return sh_fail(err, SH_ERR_INVALID,
                           "%s: neither config.json (a model) nor adapter_config.json (an adapter) "
                           "is in this folder",
                           input);
        *out = peft ? INPUT_PEFT : INPUT_MODEL;
        return SH_OK;
    }
    sh_gguf *gguf = NULL;
    const char *text = NULL;
    size_t n = 0;
    SH_TRY(sh_gguf_open(input, &gguf, err));
    const bool adapter = sh_gguf_get_string(gguf, "general.type", &text, &n, NULL) == SH_OK &&
                         n == strlen("adapter") && memcmp(text, "adapter", n) == 0;
    sh_gguf_close(&gguf);
    if (!adapter)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s: it is a model in GGUF already; shoal model quantize writes it in "
                       "another type",
                       input);
    *out = INPUT_GGUF_ADAPTER;
    return SH_OK;
}

/* Options that the kind does not know, and the one that it needs. */
static sh_status check_options(const convert_options *o, input_kind kind, sh_error *err)
{
    const char *to = kind == INPUT_GGUF_ADAPTER ? "peft" : "gguf";
    if (o->to != NULL && strcmp(o->to, "gguf") != 0 && strcmp(o->to, "peft") != 0)
        return sh_fail(err, SH_ERR_USAGE, "--to is '%s', not gguf or peft", o->to);
    if (o->to != NULL && strcmp(o->to, to) != 0)
        return sh_fail(err, SH_ERR_USAGE, "%s: it can be converted to %s, not to %s", o->input, to,
                       o->to);
    if (kind != INPUT_MODEL && (o->type != NULL || o->pre != NULL))
        return sh_fail(err, SH_ERR_USAGE, "--%s is for models, '%s' is an adapter",
                       o->type != NULL ? "type" : "pre", o->input);
    if (kind == INPUT_MODEL && o->model != NULL)
        return sh_fail(err, SH_ERR_USAGE, "-m FILE is for adapters, '%s' is a model", o->input);
    return kind == INPUT_MODEL ? SH_OK : sh_cli_need(&convert_command, o->model, "-m FILE", err);
}

static void on_tensor(void *arg, size_t done, size_t n, const char *tensor)
{
    (void)arg;
    (void)tensor;
    sh_cli_progress("convert", "tensors", done, n);
}

static sh_status convert_model(const convert_options *o, sh_error *err)
{
    sh_convert_options options = {.type = SH_TYPE_F16, .pre = o->pre, .progress = on_tensor};
    if (o->type != NULL)
        SH_TRY(sh_type_parse(o->type, &options.type, err));
    return sh_convert_model(o->input, o->out, &options, err);
}

static sh_status convert_adapter(const convert_options *o, input_kind kind, sh_error *err)
{
    sh_status status = SH_OK;
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, SIZE_MAX);
    SH_GOTO(sh_model_open(o->model, &model, err));
    SH_GOTO(sh_adapter_open_any(o->input, &model->config, &adapter, err));
    if (kind == INPUT_GGUF_ADAPTER) {
        SH_GOTO(sh_adapter_save_peft(adapter, &model->config, o->out, "", err));
    } else {
        SH_GOTO(sh_adapter_encode(adapter, &bytes, err));
        SH_GOTO(sh_file_write_atomic(o->out, bytes.data, bytes.len, err));
    }

cleanup:
    sh_buf_release(&bytes);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    return status;
}

static sh_status print_converted(const convert_options *o, input_kind kind, sh_error *err)
{
    static const struct {
        const char *what, *from, *to;
    } names[] = {
        [INPUT_MODEL] = {"model", "huggingface", "gguf"},
        [INPUT_PEFT] = {"adapter", "peft", "gguf"},
        [INPUT_GGUF_ADAPTER] = {"adapter", "gguf", "peft"},
    };
    const char *type = kind == INPUT_MODEL ? (o->type != NULL ? o->type : "F16") : "F32";
    if (!o->json) {
        printf("%s: %s in %s, from %s\n", o->out, names[kind].what,
               kind == INPUT_GGUF_ADAPTER ? "PEFT's form" : "GGUF", o->input);
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_json_set(object, "what", json_string(names[kind].what));
    sh_json_set(object, "from", json_string(names[kind].from));
    sh_json_set(object, "to", json_string(names[kind].to));
    sh_json_set(object, "type", json_string(type));
    sh_json_set(object, "output", json_string(o->out));
    return sh_cli_print_json(object, err);
}

int sh_cli_model_convert(int argc, char **argv)
{
    convert_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    input_kind kind = INPUT_MODEL;
    int exit_code = 0;
    if (!sh_cli_parse(&convert_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&convert_command, o.input, "-i PATH", &err));
    SH_GOTO(sh_cli_need(&convert_command, o.out, "-o OUT", &err));
    SH_GOTO(find_kind(o.input, &kind, &err));
    SH_GOTO(check_options(&o, kind, &err));
    if (kind == INPUT_MODEL)
        SH_GOTO(convert_model(&o, &err));
    else
        SH_GOTO(convert_adapter(&o, kind, &err));
    SH_GOTO(print_converted(&o, kind, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    sh_args_release(&args);
    return exit_code;
}
