/* `shoal model inspect`: what a GGUF file holds, and whether this program can run it. */
#include <inttypes.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"
#include "shared/model/model.h"

#define TEXT_BYTES_MAX (1u << 20)

typedef struct {
    const char *model;
    bool json, tensors;
} inspect_options;

static const sh_option inspect_table[] = {
    SH_OPT_STRING(inspect_options, model, 'm', "model", "FILE", NULL, "GGUF file to look into"),
    SH_OPT_FLAG(inspect_options, tensors, 0, "tensors", "list every tensor, too"),
    SH_OPT_FLAG(inspect_options, json, 0, "json", "print one JSON object (with every tensor)"),
};
static const sh_command inspect_command = {
    "shoal model inspect",
    "-m FILE [--tensors] [--json]",
    inspect_table,
    SH_COUNT(inspect_table),
    "Prints the metadata of a GGUF model or adapter. For a model that this program cannot run it "
    "says why on standard error and exits with 2.",
    "shoal model inspect -m models/shoal-base-2.6m-f16.gguf",
};

/* What is said of a file beside its own keys. */
typedef struct {
    const char *path;
    sh_gguf *gguf;
    sh_hash sha256;
    uint64_t bytes, parameters;
    bool is_adapter;
    sh_model *model; /* NULL: cannot be run, `why` says why */
    sh_error why;
} subject;

static bool string_is(const sh_gguf *gguf, const char *key, const char *expected)
{
    const char *text;
    size_t n;
    return sh_gguf_get_string(gguf, key, &text, &n, NULL) == SH_OK && n == strlen(expected) &&
           memcmp(text, expected, n) == 0;
}

static sh_status open_subject(const char *path, subject *s, sh_error *err)
{
    s->path = path;
    SH_TRY(sh_gguf_open(path, &s->gguf, err));
    SH_TRY(sh_sha256_file(path, &s->sha256, &s->bytes, err));
    for (size_t i = 0; i < sh_gguf_n_tensors(s->gguf); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(s->gguf, i);
        uint64_t n = 1;
        for (uint32_t d = 0; d < t->n_dims; d++)
            n *= t->ne[d];
        s->parameters += n;
    }
    s->is_adapter = string_is(s->gguf, "general.type", "adapter");
    if (!s->is_adapter)
        (void)!sh_model_open(path, &s->model, &s->why); /* a failure is what we report */
    return SH_OK;
}

static void close_subject(subject *s)
{
    sh_model_close(&s->model);
    sh_gguf_close(&s->gguf);
}

static json_t *shape_json(const sh_gguf_tensor *t)
{
    json_t *shape = json_array();
    for (uint32_t d = t->n_dims; d > 0; d--)
        json_array_append_new(shape, json_integer((json_int_t)t->ne[d - 1]));
    return shape;
}

/* Text of a file may be no UTF-8; JSON must be. */
static json_t *text_json(const char *text, size_t n)
{
    json_t *value = json_stringn(text, n);
    return value != NULL ? value : json_string("(not UTF-8)");
}

static sh_status keys_json(const subject *s, json_t *keys, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf key, type, value;
    sh_buf_init(&key, TEXT_BYTES_MAX);
    sh_buf_init(&type, TEXT_BYTES_MAX);
    sh_buf_init(&value, TEXT_BYTES_MAX);
    for (size_t i = 0; i < sh_gguf_n_keys(s->gguf); i++) {
        sh_buf_clear(&key);
        sh_buf_clear(&type);
        sh_buf_clear(&value);
        SH_GOTO(sh_gguf_key_text(s->gguf, i, &key, &type, &value));
        SH_GOTO(sh_buf_append(&key, "", 1));
        json_object_set_new(keys, (const char *)key.data,
                            text_json((const char *)value.data, value.len));
    }

cleanup:
    if (status != SH_OK)
        sh_fail(err, status, "%s: key is too long to print", s->path);
    sh_buf_release(&key);
    sh_buf_release(&type);
    sh_buf_release(&value);
    return status;
}

static json_t *config_json(const sh_model_config *c)
{
    json_t *o = json_object();
    sh_json_set(o, "layers", json_integer(c->n_layers));
    sh_json_set(o, "width", json_integer(c->width));
    sh_json_set(o, "heads", json_integer(c->n_heads));
    sh_json_set(o, "kv_heads", json_integer(c->n_kv_heads));
    sh_json_set(o, "head_size", json_integer(c->head_size));
    sh_json_set(o, "ffn", json_integer(c->ffn));
    sh_json_set(o, "vocab", json_integer(c->vocab));
    sh_json_set(o, "context", json_integer(c->context));
    sh_json_set(o, "tied_output", json_boolean(c->tied_output));
    return o;
}

static sh_status print_subject_json(const subject *s, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(s->sha256.b, sizeof s->sha256.b, hex);
    json_t *o = json_object(), *keys = json_object(), *tensors = json_array();
    sh_json_set(o, "file", text_json(s->path, strlen(s->path)));
    sh_json_set(o, "bytes", json_integer((json_int_t)s->bytes));
    sh_json_set(o, "sha256", json_string(hex));
    sh_json_set(o, "gguf_version", json_integer(sh_gguf_version(s->gguf)));
    sh_json_set(o, "kind", json_string(s->is_adapter ? "adapter" : "model"));
    sh_json_set(o, "parameters", json_integer((json_int_t)s->parameters));
    if (!s->is_adapter)
        sh_json_set(o, "runs", json_boolean(s->model != NULL));
    if (s->model != NULL)
        sh_json_set(o, "config", config_json(&s->model->config));
    if (!s->is_adapter && s->model == NULL)
        sh_json_set(o, "why_not", json_string(s->why.text));
    sh_status status = keys_json(s, keys, err);
    if (status != SH_OK) {
        json_decref(o);
        json_decref(keys);
        json_decref(tensors);
        return status;
    }
    for (size_t i = 0; i < sh_gguf_n_tensors(s->gguf); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(s->gguf, i);
        json_t *item = json_object();
        sh_json_set(item, "name", text_json(t->name, strlen(t->name)));
        sh_json_set(item, "type", json_string(sh_type_get(t->type)->name));
        sh_json_set(item, "shape", shape_json(t));
        sh_json_set(item, "bytes", json_integer((json_int_t)t->bytes));
        json_array_append_new(tensors, item);
    }
    sh_json_set(o, "keys", keys);
    sh_json_set(o, "tensors", tensors);
    return sh_cli_print_json(o, err);
}

/* Text of the file, with control characters made visible: a file must not steer the terminal. */
static void print_text(const uint8_t *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (text[i] < 0x20 || text[i] == 0x7f)
            printf("\\x%02x", text[i]);
        else
            putchar(text[i]);
    }
}

static sh_status print_keys(const subject *s, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf key, type, value;
    sh_buf_init(&key, TEXT_BYTES_MAX);
    sh_buf_init(&type, TEXT_BYTES_MAX);
    sh_buf_init(&value, TEXT_BYTES_MAX);
    for (size_t i = 0; i < sh_gguf_n_keys(s->gguf); i++) {
        sh_buf_clear(&key);
        sh_buf_clear(&type);
        sh_buf_clear(&value);
        SH_GOTO(sh_gguf_key_text(s->gguf, i, &key, &type, &value));
        fputs("  ", stdout);
        print_text(key.data, key.len);
        fputs(" = ", stdout);
        print_text(value.data, value.len);
        putchar('\n');
    }

cleanup:
    if (status != SH_OK)
        sh_fail(err, status, "%s: key is too long to print", s->path);
    sh_buf_release(&key);
    sh_buf_release(&type);
    sh_buf_release(&value);
    return status;
}

/* "Q8_0 15, F32 9": how many tensors each type has. */
static void print_types(const subject *s)
{
    static const sh_type types[] = {SH_TYPE_F32,  SH_TYPE_F16,  SH_TYPE_BF16, SH_TYPE_Q8_0,
                                    SH_TYPE_Q4_0, SH_TYPE_Q4_K, SH_TYPE_Q6_K};
    const char *separator = "";
    for (size_t k = 0; k < SH_COUNT(types); k++) {
        size_t count = 0;
        for (size_t i = 0; i < sh_gguf_n_tensors(s->gguf); i++)
            count += sh_gguf_tensor_at(s->gguf, i)->type == types[k];
        if (count > 0)
            printf("%s%s %zu", separator, sh_type_get(types[k])->name, count);
        separator = count > 0 ? ", " : separator;
    }
    putchar('\n');
}

static sh_status print_subject(const subject *s, bool with_tensors, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(s->sha256.b, sizeof s->sha256.b, hex);
    printf("file        %s\n", s->path);
    printf("kind        GGUF v%u %s, %" PRIu64 " bytes\n", sh_gguf_version(s->gguf),
           s->is_adapter ? "adapter" : "model", s->bytes);
    printf("sha256      %s\n", hex);
    printf("tensors     %zu, %" PRIu64 " parameters: ", sh_gguf_n_tensors(s->gguf), s->parameters);
    print_types(s);
    if (s->model != NULL) {
        const sh_model_config *c = &s->model->config;
        printf("shape       %u layers, width %u, %u heads on %u of size %u, ffn %u, vocabulary %u, "
               "context %u%s\n",
               c->n_layers, c->width, c->n_heads, c->n_kv_heads, c->head_size, c->ffn, c->vocab,
               c->context, c->tied_output ? ", tied output" : "");
    }
    printf("keys        %zu\n", sh_gguf_n_keys(s->gguf));
    SH_TRY(print_keys(s, err));
    for (size_t i = 0; with_tensors && i < sh_gguf_n_tensors(s->gguf); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(s->gguf, i);
        printf("  %-5s ", sh_type_get(t->type)->name);
        print_text((const uint8_t *)t->name, strlen(t->name));
        for (uint32_t d = t->n_dims; d > 0; d--)
            printf("%s%" PRIu64, d == t->n_dims ? "  " : " x ", t->ne[d - 1]);
        putchar('\n');
    }
    return sh_cli_flush(err);
}

int sh_cli_model_inspect(int argc, char **argv)
{
    inspect_options o;
    sh_args args = {0};
    sh_error err = {0};
    sh_status status;
    subject s = {0};
    int exit_code = 0;
    if (!sh_cli_parse(&inspect_command, argc, argv, &o, &args, &exit_code))
        return exit_code;
    SH_GOTO(sh_cli_need(&inspect_command, o.model, "-m FILE", &err));
    SH_GOTO(open_subject(o.model, &s, &err));
    SH_GOTO(o.json ? print_subject_json(&s, &err) : print_subject(&s, o.tensors, &err));
    if (!s.is_adapter && s.model == NULL) {
        status = s.why.code;
        err = s.why;
    }

cleanup:
    if (status != SH_OK)
        exit_code = sh_error_report("shoal", &err);
    close_subject(&s);
    sh_args_release(&args);
    return exit_code;
}
