/* `shoal model quantize`: writes a model in another type, and says what each tensor lost. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/model/quantize.h"

typedef struct {
    const char *model, *type, *out;
    bool quiet, json;
} quantize_options;

static const sh_option quantize_table[] = {
    SH_OPT_STRING(quantize_options, model, 'm', "model", "FILE", NULL, "GGUF model to read"),
    SH_OPT_STRING(quantize_options, type, 0, "type", "TYPE", NULL,
                  "type of the matrices: F32, F16, BF16, Q8_0, Q4_0"),
    SH_OPT_STRING(quantize_options, out, 'o', "output", "OUT", NULL, "GGUF model to write"),
    SH_OPT_FLAG(quantize_options, quiet, 'q', "quiet", "no table of the tensors"),
    SH_OPT_FLAG(quantize_options, json, 0, "json", "print one JSON object"),
};
static const sh_command quantize_command = {
    "shoal model quantize",
    "-m FILE --type TYPE -o OUT",
    quantize_table,
    SH_COUNT(quantize_table),
    "Writes a model with its matrices in another type; one whose rows are no whole blocks gets "
    "F16, "
    "vectors F32. Prints what each tensor lost: the error's root mean square as a share of the "
    "tensor's own, and the largest error. The file is there whole or not at all.",
    "shoal model quantize -m models/shoal-base-2.6m-f16.gguf --type Q8_0 -o base-q8.gguf",
};

/* What sh_gguf_quantize_file told, tensor by tensor. */
typedef struct {
    sh_quantize_loss *losses; /* names are the source's */
    size_t n, cap;
    bool failed;
} loss_list;

static void on_tensor(void *arg, const sh_quantize_loss *loss, size_t done, size_t n)
{
    loss_list *list = arg;
    if (sh_array_reserve((void **)&list->losses, &list->cap, list->n + 1, sizeof *loss,
                         SH_GGUF_TENSORS_MAX) == SH_OK)
        list->losses[list->n++] = *loss;
    else
        list->failed = true;
    sh_cli_progress("quantize", "tensors", done, n);
}

/* A name of a file as one word that a terminal can take. */
static void print_name(const char *name)
{
    int n = 0;
    for (; *name != '\0'; name++, n++)
        putchar((unsigned char)*name < 0x20 || *name == 0x7f ? '?' : *name);
    printf("%*s", n < 28 ? 28 - n : 0, "");
}

static void print_table(const loss_list *list)
{
    printf("%-28s %-5s %-5s %12s %12s %10s %10s\n", "tensor", "from", "to", "bytes from", "bytes",
           "rms error", "largest");
    for (size_t i = 0; i < list->n; i++) {
        const sh_quantize_loss *l = &list->losses[i];
        print_name(l->name);
        printf(" %-5s %-5s %12llu %12llu %9.4f%% %10.3g\n", sh_type_get(l->before)->name,
               sh_type_get(l->after)->name, (unsigned long long)l->bytes_before,
               (unsigned long long)l->bytes, 100 * l->rms_error, l->largest_error);
    }
}

static json_t *losses_json(const loss_list *list)
{
    json_t *array = json_array();
    for (size_t i = 0; i < list->n; i++) {
        const sh_quantize_loss *l = &list->losses[i];
        json_t *o = json_object(), *name = json_string(l->name);
        sh_json_set(o, "name", name != NULL ? name : json_string("(not UTF-8)"));
        sh_json_set(o, "before", json_string(sh_type_get(l->before)->name));
        sh_json_set(o, "after", json_string(sh_type_get(l->after)->name));
        sh_json_set(o, "bytes_before", json_integer((json_int_t)l->bytes_before));
        sh_json_set(o, "bytes", json_integer((json_int_t)l->bytes));
        sh_json_set(o, "rms_error", json_real(l->rms_error));
        sh_json_set(o, "largest_error", json_real(l->largest_error));
        json_array_append_new(array, o);
    }
    return array;
}

static sh_status print_quantized(const quantize_options *o, sh_type type, const loss_list *list,
                                 sh_error *err)
{
    sh_hash before, after;
    uint64_t bytes_before, bytes_after;
    char hex[SH_HASH_HEX_BYTES];
    if (list->failed)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the table of tensors");
    SH_TRY(sh_sha256_file(o->model, &before, &bytes_before, err));
    SH_TRY(sh_sha256_file(o->out, &after, &bytes_after, err));
    sh_hex(after.b, sizeof after.b, hex);
    if (!o->json) {
        if (!o->quiet)
            print_table(list);
        printf("%s: %s, %llu bytes (from %llu), sha256 %s\n", o->out,
               sh_type_get((uint32_t)type)->name, (unsigned long long)bytes_after,
               (unsigned long long)bytes_before, hex);
        return sh_cli_flush(err);
    }
    json_t *object = json_object();
    sh_json_set(object, "type", json_string(sh_type_get((uint32_t)type)->name));
    sh_json_set(object, "bytes", json_integer((json_int_t)bytes_after));
    sh_json_set(object, "bytes_before", json_integer((json_int_t)bytes_before));
    sh_json_set(object, "sha256", json_string(hex));
    sh_json_set(object, "tensors", losses_json(list));
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
    loss_list list = {0};
    const sh_quantize_report report = {on_tensor, &list};
    int exit_code = 0;
    if (!sh_cli_parse(&quantize_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&quantize_command, o.model, "-m FILE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.type, "--type TYPE", &err));
    SH_GOTO(sh_cli_need(&quantize_command, o.out, "-o OUT", &err));
    SH_GOTO(sh_type_parse(o.type, &type, &err));
    SH_GOTO(sh_gguf_open(o.model, &gguf, &err));
    SH_GOTO(sh_gguf_quantize_file(gguf, type, o.out, &report, &err));
    SH_GOTO(print_quantized(&o, type, &list, &err));

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    free(list.losses);
    sh_gguf_close(&gguf);
    sh_args_release(&args);
    return exit_code;
}
