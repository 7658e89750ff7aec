#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "shared/model/tokenizer.h"
#include "trainer/commands.h"
#include "trainer/program.h"
#include "trainer/tokenizer_train.h"

#define TENTHS    10  /* progress lines when stderr is no terminal */
#define REDRAW_S  0.2 /* between two of them when it is */
#define EXTENSION ".txt"

typedef struct {
    const char *data, *out, *kind, *special, *bos, *eos, *add_bos, *add_eos, *pre;
    int64_t vocab_size;
    double coverage;
    bool keep_numbers, no_space_prefix, json;
} tokenizer_options;

static const sh_option table[] = {
    SH_OPT_STRING(
        tokenizer_options, data, 'f', "data", "TEXT[,...]", NULL,
        "text to train on: files, and folders whose *.txt files are taken; each file is a "
        "document"),
    SH_OPT_STRING(tokenizer_options, out, 'o', "out", "FILE", NULL, "GGUF to write"),
    SH_OPT_STRING(tokenizer_options, kind, 'k', "kind", "NAME", "bpe",
                  "bpe (bytes, as GPT-2) or spm (characters, as SentencePiece)"),
    SH_OPT_INT(tokenizer_options, vocab_size, 'n', "vocab-size", "N", 4096, 1, SH_VOCAB_MAX,
               "tokens, with bytes and special ones"),
    SH_OPT_STRING(tokenizer_options, special, 0, "special", "LIST", NULL,
                  "more control tokens, with commas between: '<|im_start|>,<|im_end|>'"),
    SH_OPT_STRING(tokenizer_options, bos, 0, "bos", "TEXT", NULL,
                  "what begins a text; as usual: <|endoftext|> of bpe, <s> of spm"),
    SH_OPT_STRING(tokenizer_options, eos, 0, "eos", "TEXT", NULL,
                  "what ends it; as usual: <|endoftext|> of bpe, </s> of spm"),
    SH_OPT_STRING(tokenizer_options, add_bos, 0, "add-bos", "YESNO", NULL,
                  "whether BOS is put before a text: yes, no; as usual: yes for spm"),
    SH_OPT_STRING(tokenizer_options, add_eos, 0, "add-eos", "YESNO", NULL,
                  "whether EOS is put after it: yes, no; as usual: no"),
    SH_OPT_STRING(tokenizer_options, pre, 0, "pre", "NAME", NULL,
                  "bpe: rule that cuts a text into words, by llama.cpp's name: gpt-2, llama-bpe, "
                  "qwen2, ...; as usual: smollm"),
    SH_OPT_REAL(tokenizer_options, coverage, 0, "coverage", "X", 0.9995, 0, 1,
                "spm: share of the text's characters that have tokens; the rarest have bytes"),
    SH_OPT_FLAG(tokenizer_options, keep_numbers, 0, "keep-numbers",
                "spm: pieces may have several digits"),
    SH_OPT_FLAG(tokenizer_options, no_space_prefix, 0, "no-space-prefix",
                "spm: no space is put before a text"),
    SH_OPT_FLAG(tokenizer_options, json, 0, "json", "print one JSON object"),
};
const sh_command sh_tokenizer_train_command = {
    TP_PROGRAM " tokenizer",
    "--data TEXT[,...] --kind bpe|spm --vocab-size N --out FILE",
    table,
    SH_COUNT(table),
    "Makes a vocabulary from text: a GGUF without weights, for 'full --vocab'. The same text in "
    "any "
    "order gives the same file.",
    TP_PROGRAM " tokenizer --data texts/,notes.txt --kind bpe --vocab-size 4096 "
               "--special '<|im_start|>,<|im_end|>' --out vocab.gguf"};

/* ---- progress ---- */

typedef struct {
    const tokenizer_options *options;
    double shown;
    int64_t tenth;
    bool terminal;
} progress_state;

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool on_token(void *arg, uint32_t tokens)
{
    progress_state *p = arg;
    const int64_t vocab = p->options->vocab_size;
    const double now = seconds_now();
    const int64_t tenth = TENTHS * (int64_t)tokens / vocab;
    const bool last = tokens == vocab;
    if (last || (p->terminal ? now - p->shown > REDRAW_S : tenth > p->tenth)) {
        fprintf(stderr, "%s%u/%lld tokens%s", p->terminal ? "\r" : "", tokens, (long long)vocab,
                p->terminal && !last ? "" : "\n");
        p->shown = now;
        p->tenth = tenth;
    }
    return !sh_train_interrupted;
}

/* ---- documents ---- */

static sh_status add_file(sh_tokenizer_trainer *trainer, const char *path, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    if (sh_train_interrupted)
        return sh_fail(err, SH_ERR_CANCELLED, "cancelled before %s", path);
    SH_TRY(sh_file_read(path, SH_TOKENIZE_BYTES_MAX, &bytes, &n, err));
    const sh_status status = sh_tokenizer_trainer_add(trainer, bytes, n, err);
    free(bytes);
    return status == SH_OK ? SH_OK : sh_fail_in(err, "%s", path);
}

static int is_text_name(const struct dirent *entry)
{
    const size_t n = strlen(entry->d_name), n_end = strlen(EXTENSION);
    return n > n_end && strcmp(entry->d_name + n - n_end, EXTENSION) == 0;
}

static int compare_names(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static sh_status add_folder(sh_tokenizer_trainer *trainer, const char *dir, sh_error *err)
{
    struct dirent **names = NULL;
    sh_status status = SH_OK;
    size_t files = 0;
    const int n = scandir(dir, &names, is_text_name, compare_names);
    if (n < 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
    for (int i = 0; i < n; i++) {
        char path[SH_PATH_BYTES];
        struct stat st;
        SH_GOTO(sh_path_join(path, sizeof path, dir, names[i]->d_name, err));
        if (stat(path, &st) != 0 || !S_ISREG(st.st_mode))
            continue;
        SH_GOTO(add_file(trainer, path, err));
        files++;
    }
    if (files == 0)
        status = sh_fail(err, SH_ERR_NOT_FOUND, "%s: no file *%s in this folder", dir, EXTENSION);
cleanup:
    for (int i = 0; i < n; i++)
        free(names[i]);
    free(names);
    return status;
}

static sh_status add_data(sh_tokenizer_trainer *trainer, const char *list, sh_error *err)
{
    for (const char *at = list;; at++) {
        char path[SH_PATH_BYTES];
        struct stat st;
        const size_t n = strcspn(at, ",");
        if (n == 0 || n >= sizeof path)
            return sh_fail(err, SH_ERR_USAGE, "--data: '%.80s' has an empty or too long path",
                           list);
        snprintf(path, sizeof path, "%.*s", (int)n, at);
        const bool folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
        SH_TRY(folder ? add_folder(trainer, path, err) : add_file(trainer, path, err));
        at += n;
        if (*at == '\0')
            return SH_OK;
    }
}

/* ---- options ---- */

static sh_status parse_yes_no(const char *value, const char *key, bool *out, sh_error *err)
{
    if (value == NULL)
        return SH_OK;
    if (strcmp(value, "yes") != 0 && strcmp(value, "no") != 0)
        return sh_fail(err, SH_ERR_USAGE, "--%s: '%.40s' is neither yes nor no", key, value);
    *out = strcmp(value, "yes") == 0;
    return SH_OK;
}

/* The items of a list, cut in place; *items is malloc'ed. */
static sh_status split_list(char *list, const char ***items, size_t *n, sh_error *err)
{
    const char **out = sh_calloc(SH_TOKENIZER_SPECIALS_MAX, sizeof *out);
    if (out == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for special tokens");
    *n = 0;
    for (char *item; (item = strsep(&list, ",")) != NULL; out[(*n)++] = item) {
        if (*n == SH_TOKENIZER_SPECIALS_MAX) {
            free(out);
            return sh_fail(err, SH_ERR_LIMIT, "--special: over %d tokens",
                           SH_TOKENIZER_SPECIALS_MAX);
        }
    }
    *items = out;
    return SH_OK;
}

/* What is given beside the usual; special tokens are added by the caller. */
static sh_status make_options(const tokenizer_options *o, sh_tokenizer_train_options *out,
                              sh_error *err)
{
    const bool spm = strcmp(o->kind, "spm") == 0;
    if (o->data == NULL || o->out == NULL)
        return sh_fail(err, SH_ERR_USAGE, "--%s is missing", o->data == NULL ? "data" : "out");
    if (!spm && strcmp(o->kind, "bpe") != 0)
        return sh_fail(err, SH_ERR_USAGE, "--kind: '%.40s' is none of bpe, spm", o->kind);
    if (spm && o->pre != NULL)
        return sh_fail(err, SH_ERR_USAGE, "--pre is for --kind bpe");
    if (!spm && (o->keep_numbers || o->no_space_prefix))
        return sh_fail(err, SH_ERR_USAGE,
                       "--keep-numbers and --no-space-prefix are for --kind spm");
    *out = sh_tokenizer_train_defaults(spm ? SH_TOKENIZER_SPM : SH_TOKENIZER_BPE,
                                       (uint32_t)o->vocab_size);
    out->bos = o->bos != NULL ? o->bos : out->bos;
    out->eos = o->eos != NULL ? o->eos : out->eos;
    out->pre = o->pre != NULL ? o->pre : out->pre;
    if (spm) {
        out->coverage = o->coverage;
        out->split_digits = !o->keep_numbers;
        out->add_space_prefix = !o->no_space_prefix;
    }
    SH_TRY(parse_yes_no(o->add_bos, "add-bos", &out->add_bos, err));
    return parse_yes_no(o->add_eos, "add-eos", &out->add_eos, err);
}

/* ---- the result ---- */

static void print_result(const tokenizer_options *o, const sh_tokenizer_train_result *r,
                         double seconds)
{
    const double rate = r->text_tokens > 0 ? (double)r->text_bytes / (double)r->text_tokens : 0;
    if (!o->json) {
        printf("%s: %u tokens (%u merges) from %llu documents; %.3f bytes a token over %llu bytes; "
               "%.1f s\n",
               o->out, r->vocab, r->merges, (unsigned long long)r->documents, rate,
               (unsigned long long)r->text_bytes, seconds);
        return;
    }
    json_t *j = json_object();
    sh_json_set(j, "kind", json_string(o->kind));
    sh_json_set(j, "vocab", json_integer(r->vocab));
    sh_json_set(j, "merges", json_integer(r->merges));
    sh_json_set(j, "characters", json_integer(r->characters));
    sh_json_set(j, "documents", sh_json_uint(r->documents));
    sh_json_set(j, "words", sh_json_uint(r->words));
    sh_json_set(j, "text_bytes", sh_json_uint(r->text_bytes));
    sh_json_set(j, "text_tokens", sh_json_uint(r->text_tokens));
    sh_json_set(j, "bytes_per_token", sh_json_number(rate));
    sh_json_set(j, "seconds", sh_json_number(seconds));
    json_dumpf(j, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(j);
}

sh_status sh_tokenizer_train_main(int argc, char **argv, sh_error *err)
{
    sh_status status = SH_OK;
    tokenizer_options o = {0};
    sh_args args = {0};
    sh_tokenizer_trainer *trainer = NULL;
    sh_tokenizer_train_options options;
    sh_tokenizer_train_result result;
    char *list = NULL;
    const char **specials = NULL;
    const double start = seconds_now();

    SH_GOTO(sh_options_parse(&sh_tokenizer_train_command, argc, argv, &o, &args, err));
    if (args.help)
        goto cleanup;
    tp_catch_signals();
    SH_GOTO(tp_no_words(&sh_tokenizer_train_command, &args, err));
    SH_GOTO(make_options(&o, &options, err));
    SH_GOTO(tp_check_output(o.out, &o.data, 1, err));
    if (o.special != NULL) {
        list = strdup(o.special);
        if (list == NULL) {
            status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for special tokens");
            goto cleanup;
        }
        SH_GOTO(split_list(list, &specials, &options.n_specials, err));
        options.specials = specials;
    }
    progress_state progress = {.options = &o, .terminal = isatty(STDERR_FILENO) != 0};
    options.progress = on_token;
    options.progress_arg = &progress;
    SH_GOTO(sh_tokenizer_trainer_create(&options, &trainer, err));
    SH_GOTO(add_data(trainer, o.data, err));
    SH_GOTO(sh_tokenizer_trainer_run(trainer, &result, err));
    SH_GOTO(sh_tokenizer_trainer_save(trainer, o.out, err));
    print_result(&o, &result, seconds_now() - start);
cleanup:
    sh_tokenizer_trainer_destroy(&trainer);
    free(specials);
    free(list);
    sh_args_release(&args);
    return status;
}
