/* `shoal model quantize`: writes a model in another type. */
#include "aggregator/cli_model.h"
#include "shared/base/log.h"
#include "shared/model/quantize.h"

typedef struct {
    const char *model, *type, *out;
    bool json;
} quantize_options;

static const sh_option quantize_table[] = {
    SH_OPT_STRING(quantize_options, model, 'm', "model", "FILE", NULL, "GGUF model to read"),
    SH_OPT_STRING(quantize_options, type, 0, "type", "TYPE", NULL,
                  "type of the matrices: F32, F16, Q8_0, Q4_0"),
    SH_OPT_STRING(quantize_options, out, 'o', "output", "OUT", NULL, "GGUF model to write"),
    SH_OPT_FLAG(quantize_options, json, 0, "json", "print one JSON object"),
};
static const sh_command quantize_command = {
    "shoal model quantize",
    "-m FILE --type TYPE -o OUT",
    quantize_table,
    SH_COUNT(quantize_table),
    "Writes a model with its matrices in another type. The file is there whole or not at all.",
    "shoal model quantize -m models/shoal-base-2.6m-f16.gguf --type Q8_0 -o base-q8.gguf",
};

static sh_status print_quantized(const quantize_options *o, sh_error *err)
{
    sh_hash before, after;
    uint64_t bytes_before, bytes_after;
    char hex[SH_HASH_HEX_BYTES];
    SH_TRY(sh_sha256_file(o->model, &before, &bytes_before, err));
    SH_TRY(sh_sha256_file(o->out, &after, &bytes_after, err));
    sh_hex(after.b, sizeof after.b, hex);
    if (!o->json) {
        printf("%s: %s, %llu bytes (from %llu), sha256 %s\n", o->out, o->type,
               (unsigned long long)bytes_after, (unsigned long long)bytes_before, hex);
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_json_set(object, "type", json_string(o->type));
    sh_json_set(object, "bytes", json_integer((json_int_t)bytes_after));
    sh_json_set(object, "bytes_before", json_integer((json_int_t)bytes_before));
    sh_json_set(object, "sha256", json_string(hex));
    return sh_cli_print_json(object, err);
}

int sh_cli_model_quantize(int argc, char **argv)
{
    quantize_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    sh_gguf *gguf = NULL;
    sh_type type = SH_TYPE_F32;
    int exit_code = 0;
    if (!sh_cli_parse(&quantize_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&quantize_command, o.model, "-m FILE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.type, "--type TYPE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.out, "-o OUT", &err));
    SH_GOTO(sh_type_parse(o.type, &type, &err));
    SH_GOTO(sh_gguf_open(o.model, &gguf, &err));
    SH_GOTO(sh_gguf_quantize(gguf, type, o.out, &err));
    SH_GOTO(print_quantized(&o, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    sh_gguf_close(&gguf);
    sh_args_release(&args);
    return exit_code;
}
