/*
 * One option table a program: key, type, range, default and help in one place make the command
 * line parser, the YAML reader, `--help`, the sample configuration and the man text. An unknown
 * key is an error that names the nearest known one. Flags override the file.
 *
 *     typedef struct { const char *model; int64_t context; bool json; } options;
 *     static const sh_option table[] = {
 *         SH_OPT_STRING(options, model, 'm', "model", "FILE", NULL, "GGUF model to read"),
 *         SH_OPT_INT(options, context, 'c', "context", "N", 256, 2, 8192, "tokens a chunk"),
 *         SH_OPT_FLAG(options, json, 0, "json", "print one JSON object"),
 *     };
 *     static const sh_command command = {"shoal model perplexity", "-m FILE -f TEXT", table,
 *                                        SH_COUNT(table), "Perplexity of a text."};
 *     options o; sh_args args = {0};
 *     SH_TRY(sh_options_parse(&command, argc, argv, &o, &args, &err));
 *
 * The command line takes --key VALUE, --key=VALUE, --flag, --flag=false, -k VALUE, -kVALUE, -ab for
 * two flags, and "--" before words that are no options; of two values the last one counts, but a
 * list takes each (of a list in both places, the command line's is the whole of it). A table has no
 * key "help" and no letter 'h': those are always known.
 *
 * In YAML a key may be nested: "round.buffer" is `round: {buffer: 8}`; a list of scalars is joined
 * with commas (of a list option: each is an item); `key:` alone leaves the default. Tags, anchors,
 * a key given twice and a second document are errors, which name file and line.
 *
 * A whole number whose placeholder is BYTES takes k, M and G, powers of 1000: "400M".
 *
 * A default outside the option's range means "not set": it is kept, but not shown.
 *
 * Owner: strings that the parser stores live in args (sh_args_release frees them), as do those of
 * an earlier parse into the same args; positional words are argv's. Nothing is written on error.
 */
#ifndef SH_BASE_OPTION_H
#define SH_BASE_OPTION_H

#include "shared/base/buf.h"
#include "shared/base/status.h"

typedef enum {
    SH_OPTION_FLAG,
    SH_OPTION_INT,
    SH_OPTION_REAL,
    SH_OPTION_STRING,
    SH_OPTION_LIST
} sh_option_type;

#define SH_OPTION_LIST_MAX 16 /* items; one more is an error */
typedef struct {
    const char *items[SH_OPTION_LIST_MAX];
    size_t n;
} sh_option_list;

typedef struct {
    const char *key; /* long name and YAML key, dots nest: "train.rank"; flag is --train.rank */
    char letter;     /* short flag or 0 */
    sh_option_type type;
    size_t offset;     /* in the options struct: bool, int64_t, double, const char *, list */
    const char *value; /* placeholder in --help: "FILE"; NULL for flags */
    double default_number, min, max;
    const char *default_string; /* may be NULL */
    const char *help;
} sh_option;

#define SH_OPT_FLAG(T, field, letter, key, help)                                                   \
    {                                                                                              \
        key, letter, SH_OPTION_FLAG, offsetof(T, field), NULL, 0, 0, 1, NULL, help                 \
    }
#define SH_OPT_INT(T, field, letter, key, value, dflt, min, max, help)                             \
    {                                                                                              \
        key, letter, SH_OPTION_INT, offsetof(T, field), value, dflt, min, max, NULL, help          \
    }
#define SH_OPT_REAL(T, field, letter, key, value, dflt, min, max, help)                            \
    {                                                                                              \
        key, letter, SH_OPTION_REAL, offsetof(T, field), value, dflt, min, max, NULL, help         \
    }
#define SH_OPT_STRING(T, field, letter, key, value, dflt, help)                                    \
    {                                                                                              \
        key, letter, SH_OPTION_STRING, offsetof(T, field), value, 0, 0, 0, dflt, help              \
    }
#define SH_OPT_LIST(T, field, letter, key, value, help)                                            \
    {                                                                                              \
        key, letter, SH_OPTION_LIST, offsetof(T, field), value, 0, 0, 0, NULL, help                \
    }

typedef struct {
    const char *name, *usage; /* "shoal model inspect", "-m FILE [--json]" */
    const sh_option *options;
    size_t n_options;
    const char *about;   /* a paragraph */
    const char *example; /* one command line, may be NULL */
} sh_command;

typedef struct {
    const char **positional; /* what was no option */
    size_t n_positional;
    bool help;   /* --help was given: print sh_options_help and exit 0 */
    void *owned; /* strings; sh_args_release */
} sh_args;

/* Fills the struct at `options` with defaults, then with the flags. argv[0] is skipped.
 * SH_ERR_USAGE: unknown flag, missing or out-of-range value. --help is always known. */
SH_MUST_USE sh_status sh_options_parse(const sh_command *command, int argc, char **argv,
                                       void *options, sh_args *args, sh_error *err);
/* The same with a YAML file read first (flags override it). yaml_path NULL: no file. */
SH_MUST_USE sh_status sh_options_parse_file(const sh_command *command, const char *yaml_path,
                                            int argc, char **argv, void *options, sh_args *args,
                                            sh_error *err);
/* Only YAML text, for tests and fuzzing. */
SH_MUST_USE sh_status sh_options_parse_yaml(const sh_command *command, const char *text, size_t n,
                                            const char *name, void *options, sh_args *args,
                                            sh_error *err);
void sh_args_release(sh_args *args);

SH_MUST_USE sh_status sh_options_help(const sh_command *command, sh_buf *out);
SH_MUST_USE sh_status sh_options_sample(const sh_command *command, sh_buf *out); /* YAML */

#endif
