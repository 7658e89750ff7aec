/* `shoal model inspect`: what a GGUF file holds, and whether this program can run it. */
#include <inttypes.h>
#include <string.h>

#include "aggregator/cli_model.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"
#include "shared/math/pack.h"
#include "shared/model/chat.h"
#include "shared/model/model.h"
#include "shared/model/quantize.h"

#define TEXT_BYTES_MAX (1u << 20)
#define KV_TOKENS      1000u
#define NAME_BYTES     128
#define TYPES_END      64u /* GGUF numbers of types are below it */

typedef struct {
    const char *model;
    bool json, tensors, check;
} inspect_options;

static const sh_option inspect_table[] = {
    SH_OPT_STRING(inspect_options, model, 'm', "model", "FILE", NULL, "GGUF file to look into"),
    SH_OPT_FLAG(inspect_options, tensors, 0, "tensors", "list every tensor, too"),
    SH_OPT_FLAG(inspect_options, check, 0, "check",
                "read every weight, too: a NaN or an infinity is an error"),
    SH_OPT_FLAG(inspect_options, json, 0, "json", "print one JSON object (with every tensor)"),
};
static const sh_command inspect_command = {
    "shoal model inspect",
    "-m FILE [--tensors] [--check] [--json]",
    inspect_table,
    SH_COUNT(inspect_table),
    "Prints the metadata of a GGUF model or adapter, and the memory that a model takes: its file, "
    "its packed form (what is packed leaves the file's pages), and the cache of 1,000 tokens. For "
    "a model that this program cannot run it says why on standard error and exits with 2.",
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
    uint64_t packed_bytes, kv_bytes; /* of a model that runs: packed weights; F16, 1,000 tokens */
} subject;

static bool string_is(const sh_gguf *gguf, const char *key, const char *expected)
{
    const char *text;
    size_t n;
    return sh_gguf_get_string(gguf, key, &text, &n, NULL) == SH_OK && n == strlen(expected) &&
           memcmp(text, expected, n) == 0;
}

static uint64_t packed_bytes(const sh_matrix *m)
{
    return sh_pack_bytes(m->type, m->out, m->in);
}

static void measure_memory(subject *s)
{
    const sh_model *model = s->model;
    const sh_model_config *c = &model->config;
    s->packed_bytes = packed_bytes(&model->token_embd);
    if (!c->tied_output)
        s->packed_bytes += packed_bytes(&model->output);
    for (uint32_t i = 0; i < c->n_layers; i++)
        for (int m = 0; m < SH_LAYER_MATRICES; m++)
            s->packed_bytes += packed_bytes(&model->layers[i].m[m]);
    s->kv_bytes =
        (uint64_t)KV_TOKENS * c->n_layers * c->n_kv_heads * c->head_size * 2 * sizeof(uint16_t);
}

static sh_status check_values(const subject *s, sh_error *err)
{
    for (size_t i = 0; i < sh_gguf_n_tensors(s->gguf); i++)
        if (sh_gguf_check_tensor(sh_gguf_tensor_at(s->gguf, i), err) != SH_OK)
            return sh_fail_in(err, "%s", s->path);
    return SH_OK;
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
    if (s->model != NULL)
        measure_memory(s);
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

static const char *rope_name(const sh_model *model)
{
    static const char *const names[] = {"plain", "linear", "yarn"};
    return model->rope_factors ? "freqs" : names[model->config.rope_scaling];
}

/* "gpt2 (smollm)": what a GGUF says of its tokenizer, which the model was opened with. */
static void tokenizer_name(const subject *s, char *out, size_t bytes)
{
    const char *kind = "", *rule = "";
    size_t n_kind = 0, n_rule = 0;
    if (sh_gguf_get_string(s->gguf, "tokenizer.ggml.model", &kind, &n_kind, NULL) != SH_OK)
        n_kind = 0;
    if (sh_gguf_get_string(s->gguf, "tokenizer.ggml.pre", &rule, &n_rule, NULL) != SH_OK)
        n_rule = 0;
    snprintf(out, bytes, n_rule > 0 ? "%.*s (%.*s)" : "%.*s", (int)n_kind, kind, (int)n_rule, rule);
}

static json_t *tokenizer_json(const subject *s)
{
    const sh_tokenizer *t = s->model->tokenizer;
    json_t *o = json_object();
    char name[NAME_BYTES];
    tokenizer_name(s, name, sizeof name);
    sh_json_set(o, "kind", text_json(name, strlen(name)));
    sh_json_set(o, "tokens", json_integer(sh_tokenizer_size(t)));
    sh_json_set(o, "bos", json_integer(sh_tokenizer_bos(t)));
    sh_json_set(o, "eos", json_integer(sh_tokenizer_eos(t)));
    sh_json_set(o, "adds_bos", json_boolean(sh_tokenizer_adds_bos(t)));
    sh_json_set(o, "chat", json_string(sh_chat_family_name(sh_chat_detect(s->gguf))));
    return o;
}

static json_t *config_json(const sh_model *model)
{
    const sh_model_config *c = &model->config;
    json_t *o = json_object(), *rope = json_object();
    sh_json_set(rope, "scaling", json_string(rope_name(model)));
    sh_json_set(rope, "base", json_real((double)c->rope_base));
    sh_json_set(rope, "pairs", json_string(c->rope_halves ? "halves" : "adjacent"));
    sh_json_set(o, "architecture", json_string(sh_arch_name(c->arch)));
    sh_json_set(o, "rope", rope);
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

static json_t *memory_json(const subject *s)
{
    json_t *o = json_object();
    sh_json_set(o, "file_bytes", json_integer((json_int_t)s->bytes));
    sh_json_set(o, "packed_bytes", json_integer((json_int_t)s->packed_bytes));
    sh_json_set(o, "kv_f16_bytes_1000_tokens", json_integer((json_int_t)s->kv_bytes));
    return o;
}

/* Tensors of one type, and their bytes. */
typedef struct {
    size_t count;
    uint64_t bytes;
} type_sum;

static type_sum sum_type(const subject *s, sh_type type)
{
    type_sum sum = {0};
    for (size_t i = 0; i < sh_gguf_n_tensors(s->gguf); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(s->gguf, i);
        sum.count += t->type == type;
        sum.bytes += t->type == type ? t->bytes : 0;
    }
    return sum;
}

static json_t *types_json(const subject *s)
{
    json_t *o = json_object();
    for (uint32_t type = 0; type < TYPES_END; type++) {
        const sh_type_info *info = sh_type_get(type);
        const type_sum sum = info != NULL ? sum_type(s, (sh_type)type) : (type_sum){0};
        if (sum.count == 0)
            continue;
        json_t *item = json_object();
        sh_json_set(item, "tensors", json_integer((json_int_t)sum.count));
        sh_json_set(item, "bytes", json_integer((json_int_t)sum.bytes));
        sh_json_set(o, info->name, item);
    }
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
        sh_json_set(o, "config", config_json(s->model));
    if (s->model != NULL)
        sh_json_set(o, "tokenizer", tokenizer_json(s));
    if (s->model != NULL)
        sh_json_set(o, "memory", memory_json(s));
    sh_json_set(o, "types", types_json(s));
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

/* "Q8_0 15 (1,234 bytes), F32 9 (...)". */
static void print_types(const subject *s)
{
    const char *separator = "";
    for (uint32_t type = 0; type < TYPES_END; type++) {
        const sh_type_info *info = sh_type_get(type);
        const type_sum sum = info != NULL ? sum_type(s, (sh_type)type) : (type_sum){0};
        if (sum.count == 0)
            continue;
        printf("%s%s %zu (%" PRIu64 " bytes)", separator, info->name, sum.count, sum.bytes);
        separator = ", ";
    }
    putchar('\n');
}

static void print_model(const subject *s)
{
    const sh_model_config *c = &s->model->config;
    printf("shape       %s: %u layers, width %u, %u heads on %u of size %u, ffn %u, vocabulary "
           "%u, context %u%s\n",
           sh_arch_name(c->arch), c->n_layers, c->width, c->n_heads, c->n_kv_heads, c->head_size,
           c->ffn, c->vocab, c->context, c->tied_output ? ", tied output" : "");
    printf("rope        %s, base %g, pairs %s\n", rope_name(s->model), (double)c->rope_base,
           c->rope_halves ? "a half head apart" : "adjacent");
    const sh_tokenizer *t = s->model->tokenizer;
    char name[NAME_BYTES];
    tokenizer_name(s, name, sizeof name);
    fputs("tokenizer   ", stdout);
    print_text((const uint8_t *)name, strlen(name));
    printf(", %u tokens, BOS %d%s, EOS %d; chat template: %s\n", sh_tokenizer_size(t),
           sh_tokenizer_bos(t), sh_tokenizer_adds_bos(t) ? " (added)" : " (not added)",
           sh_tokenizer_eos(t), sh_chat_family_name(sh_chat_detect(s->gguf)));
    printf("memory      file %" PRIu64 ", packed %" PRIu64 ", cache of %u tokens %" PRIu64
           " bytes (F16)\n",
           s->bytes, s->packed_bytes, KV_TOKENS, s->kv_bytes);
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
    if (s->model != NULL)
        print_model(s);
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
    if (o.check)
        SH_GOTO(check_values(&s, &err));
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
