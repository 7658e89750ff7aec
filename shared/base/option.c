#include "shared/base/option_internal.h"

#include "shared/base/file.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A wrong table is our own bug: found by the first run of the program. */
static void check_table(const sh_command *command)
{
    for (size_t i = 0; i < command->n_options; i++) {
        const sh_option *option = &command->options[i];
        SH_ASSERT(option->key[0] && strlen(option->key) < SH_OPTION_KEY_BYTES);
        SH_ASSERT(!sh_option_is_group(command, option->key));
        SH_ASSERT(option->letter != 'h' && strcmp(option->key, "help") != 0);
        SH_ASSERT(option->type != SH_OPTION_INT || fabs(option->default_number) < 0x1p63);
        for (size_t j = 0; j < i; j++) {
            SH_ASSERT(strcmp(option->key, command->options[j].key) != 0);
            SH_ASSERT(!option->letter || option->letter != command->options[j].letter);
        }
    }
}

sh_status sh_option_values_init(sh_option_values *values, const sh_command *command, sh_error *err)
{
    check_table(command);
    sh_option_value *list = sh_calloc(command->n_options, sizeof *list);
    if (!list)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the options");
    *values = (sh_option_values){.command = command, .values = list};
    return SH_OK;
}

static void free_strings(sh_option_value *value)
{
    for (sh_owned *owned = value->string, *next; owned; owned = next) {
        next = owned->next;
        free(owned);
    }
    value->string = NULL;
}

void sh_option_values_release(sh_option_values *values)
{
    for (size_t i = 0; values->values && i < values->command->n_options; i++)
        free_strings(&values->values[i]);
    free(values->values);
    *values = (sh_option_values){0};
}

bool sh_option_has_default(const sh_option *option)
{
    if (option->type == SH_OPTION_STRING || option->type == SH_OPTION_LIST)
        return option->default_string != NULL;
    return option->default_number >= option->min && option->default_number <= option->max;
}

size_t sh_option_find(const sh_command *command, const char *key)
{
    size_t i = 0;
    while (i < command->n_options && strcmp(command->options[i].key, key) != 0)
        i++;
    return i;
}

bool sh_option_is_group(const sh_command *command, const char *key)
{
    size_t n = strlen(key);
    for (size_t i = 0; i < command->n_options; i++)
        if (strncmp(command->options[i].key, key, n) == 0 && command->options[i].key[n] == '.')
            return true;
    return false;
}

/* Levenshtein's distance of two strings shorter than SH_OPTION_KEY_BYTES. */
static size_t edit_distance(const char *a, size_t a_n, const char *b, size_t b_n)
{
    size_t row[SH_OPTION_KEY_BYTES];
    for (size_t j = 0; j <= b_n; j++)
        row[j] = j;
    for (size_t i = 1; i <= a_n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b_n; j++) {
            size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = SH_MIN(replaced, SH_MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[b_n];
}

void sh_option_nearest(const sh_command *command, const char *key, bool groups,
                       char out[SH_OPTION_KEY_BYTES])
{
    size_t key_n = strnlen(key, SH_OPTION_KEY_BYTES - 1), best = SIZE_MAX;
    out[0] = 0;
    for (size_t i = 0; i < command->n_options; i++) {
        const char *known = command->options[i].key;
        size_t n = strlen(known);
        for (size_t end = groups ? strcspn(known, ".") : n;;
             end += 1 + strcspn(known + end + 1, ".")) {
            size_t distance = edit_distance(key, key_n, known, end);
            if (distance < best) {
                best = distance;
                memcpy(out, known, end);
                out[end] = 0;
            }
            if (end == n)
                break;
        }
    }
}

static void describe_range(const sh_option *option, char *out, size_t out_bytes)
{
    const char *kind = option->type == SH_OPTION_INT ? "a whole number" : "a number";
    if (option->min <= -SH_OPTION_HUGE && option->max >= SH_OPTION_HUGE)
        snprintf(out, out_bytes, "%s", kind);
    else if (option->max >= SH_OPTION_HUGE)
        snprintf(out, out_bytes, "%s of at least %.15g", kind, option->min);
    else
        snprintf(out, out_bytes, "%s from %.15g to %.15g", kind, option->min, option->max);
}

static sh_status parse_flag(const char *text, bool *out)
{
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no",
                                                                                "off", "0"};
    for (size_t i = 0; i < SH_COUNT(yes); i++)
        if (strcmp(text, yes[i]) == 0 || strcmp(text, no[i]) == 0) {
            *out = strcmp(text, yes[i]) == 0;
            return SH_OK;
        }
    return SH_ERR_USAGE;
}

/* Of a number of bytes: "400M". 1: none. */
static int64_t unit_of(const sh_option *option, const char *text)
{
    static const char units[] = "kMG";
    const char *at = text[0] ? strchr(units, text[0]) : NULL;
    if (at == NULL || text[1] != 0 || option->type != SH_OPTION_INT ||
        strcmp(option->value, "BYTES") != 0)
        return 1;
    static const int64_t sizes[] = {1000, 1000000, 1000000000};
    return sizes[at - units];
}

static sh_status parse_number(const sh_option *option, const char *text, sh_option_value *value)
{
    char *end = NULL;
    errno = 0;
    /* strtod and strtoll also take leading blanks, "nan" and hexadecimal: we do not. */
    const size_t digits = strspn(text, "+-0123456789.eE");
    const int64_t unit = unit_of(option, text + digits);
    if (!text[0] || (text[digits] != 0 && unit == 1))
        return SH_ERR_USAGE;
    if (option->type == SH_OPTION_INT) {
        value->integer = strtoll(text, &end, 10);
        value->real = (double)value->integer * (double)unit;
        if (unit > 1 && end == text + digits && fabs(value->real) < 0x1p62) {
            value->integer *= unit;
            end++;
        }
    } else {
        value->real = strtod(text, &end);
    }
    bool overflow = errno == ERANGE && (option->type == SH_OPTION_INT || !isfinite(value->real));
    if (*end || end == text || overflow || value->real < option->min || value->real > option->max)
        return SH_ERR_USAGE;
    return SH_OK;
}

static sh_owned *own_string(const char *text, size_t n)
{
    sh_owned *owned = sh_calloc(1, sizeof *owned + n + 1);
    if (owned)
        memcpy(owned->text, text, n);
    return owned;
}

sh_status sh_option_values_set(sh_option_values *values, size_t i, const char *text,
                               const char *where, sh_error *err)
{
    const sh_option *option = &values->command->options[i];
    sh_option_value *old = &values->values[i], value = {.given = true};
    size_t n = strlen(text);
    char range[96];
    if (n > SH_OPTION_VALUE_MAX)
        return sh_fail(err, SH_ERR_USAGE, "%s: the value is longer than %d bytes", where,
                       SH_OPTION_VALUE_MAX);
    switch (option->type) {
    case SH_OPTION_FLAG:
        if (parse_flag(text, &value.flag) != SH_OK)
            return sh_fail(err, SH_ERR_USAGE, "%s: '%.100s' is not true or false", where, text);
        break;
    case SH_OPTION_INT:
    case SH_OPTION_REAL:
        if (parse_number(option, text, &value) != SH_OK) {
            describe_range(option, range, sizeof range);
            return sh_fail(err, SH_ERR_USAGE, "%s: '%.100s' is not %s", where, text, range);
        }
        break;
    case SH_OPTION_STRING:
        value.string = own_string(text, n);
        if (!value.string)
            return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory", where);
        break;
    case SH_OPTION_LIST:
        if (old->from_file) {
            free_strings(old);
            old->n_items = 0;
        }
        if (old->n_items == SH_OPTION_LIST_MAX)
            return sh_fail(err, SH_ERR_USAGE, "%s is given more than %d times", where,
                           SH_OPTION_LIST_MAX);
        value.string = own_string(text, n);
        if (!value.string)
            return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory", where);
        value.string->next = old->string;
        value.n_items = old->n_items + 1;
        old->string = NULL;
        break;
    }
    free_strings(old);
    *old = value;
    return SH_OK;
}

/* The items in the order in which they were given; they become args'. */
static void apply_list(sh_option_value *value, sh_option_list *list, sh_args *args)
{
    *list = (sh_option_list){.n = value->n_items};
    for (size_t i = value->n_items; i > 0; i--) {
        sh_owned *owned = value->string;
        value->string = owned->next;
        list->items[i - 1] = owned->text;
        owned->next = args->owned;
        args->owned = owned;
    }
}

void sh_option_values_apply(sh_option_values *values, void *options, sh_args *args)
{
    const sh_command *command = values->command;
    for (size_t i = 0; i < command->n_options; i++) {
        const sh_option *option = &command->options[i];
        sh_option_value *value = &values->values[i];
        char *field = (char *)options + option->offset;
        switch (option->type) {
        case SH_OPTION_FLAG:
            *(bool *)field = value->given ? value->flag : option->default_number != 0;
            break;
        case SH_OPTION_INT:
            *(int64_t *)field = value->given ? value->integer : (int64_t)option->default_number;
            break;
        case SH_OPTION_REAL:
            *(double *)field = value->given ? value->real : option->default_number;
            break;
        case SH_OPTION_STRING:
            *(const char **)field = value->given ? value->string->text : option->default_string;
            if (value->given) {
                value->string->next = args->owned;
                args->owned = value->string;
                value->string = NULL;
            }
            break;
        case SH_OPTION_LIST:
            apply_list(value, (sh_option_list *)field, args);
            break;
        }
    }
}

void sh_args_release(sh_args *args)
{
    for (sh_owned *owned = args->owned, *next; owned; owned = next) {
        next = owned->next;
        free(owned);
    }
    free(args->positional);
    *args = (sh_args){0};
}

/* ---- The command line ---- */

typedef struct {
    int argc, next;
    char **argv;
    const char **positional;
    size_t n_positional;
    bool help;
} arguments;

static sh_status unknown_flag(const sh_command *command, const char *flag, const char *key,
                              sh_error *err)
{
    char nearest[SH_OPTION_KEY_BYTES];
    sh_option_nearest(command, key, false, nearest);
    if (!nearest[0])
        return sh_fail(err, SH_ERR_USAGE, "unknown option '%.100s': there is only --help", flag);
    return sh_fail(err, SH_ERR_USAGE, "unknown option '%.100s': the nearest known one is --%s",
                   flag, nearest);
}

/* --key VALUE, --key=VALUE, --flag */
static sh_status take_long(sh_option_values *values, arguments *a, const char *arg, sh_error *err)
{
    const sh_command *command = values->command;
    size_t n = strcspn(arg + 2, "=");
    char key[SH_OPTION_KEY_BYTES], where[SH_OPTION_KEY_BYTES + 2];
    snprintf(key, sizeof key, "%.*s", (int)SH_MIN(n, sizeof key - 1), arg + 2);
    snprintf(where, sizeof where, "--%s", key);
    bool has_value = arg[2 + n] == '=';
    if (strcmp(key, "help") == 0 && !has_value) {
        a->help = true;
        return SH_OK;
    }
    size_t i = n < sizeof key ? sh_option_find(command, key) : command->n_options;
    if (i == command->n_options)
        return unknown_flag(command, where, key, err);
    const char *value = "true";
    if (has_value)
        value = arg + 2 + n + 1;
    else if (command->options[i].type != SH_OPTION_FLAG) {
        if (a->next >= a->argc)
            return sh_fail(err, SH_ERR_USAGE, "%s needs a value: %s %s", where, where,
                           command->options[i].value);
        value = a->argv[a->next++];
    }
    return sh_option_values_set(values, i, value, where, err);
}

/* -k VALUE, -kVALUE, -abc for three flags */
static sh_status take_short(sh_option_values *values, arguments *a, const char *arg, sh_error *err)
{
    const sh_command *command = values->command;
    for (const char *c = arg + 1; *c; c++) {
        char where[] = {'-', *c, 0}, key[] = {*c, 0};
        if (*c == 'h') {
            a->help = true;
            return SH_OK;
        }
        size_t i = 0;
        while (i < command->n_options && command->options[i].letter != *c)
            i++;
        if (i == command->n_options) /* "-xyz" may be a misspelt "--xyz" */
            return c == arg + 1 ? unknown_flag(command, arg, arg + 1, err)
                                : unknown_flag(command, where, key, err);
        if (command->options[i].type == SH_OPTION_FLAG) {
            SH_TRY(sh_option_values_set(values, i, "true", where, err));
            continue;
        }
        const char *value = c + 1;
        if (!*value) {
            if (a->next >= a->argc)
                return sh_fail(err, SH_ERR_USAGE, "%s needs a value: %s %s", where, where,
                               command->options[i].value);
            value = a->argv[a->next++];
        }
        return sh_option_values_set(values, i, value, where, err);
    }
    return SH_OK;
}

static sh_status take_arguments(sh_option_values *values, arguments *a, sh_error *err)
{
    bool only_positional = false;
    a->n_positional = 0;
    a->next = 1;
    while (a->next < a->argc && !a->help) {
        const char *arg = a->argv[a->next++];
        if (only_positional || arg[0] != '-' || !arg[1]) /* "-" is standard input */
            a->positional[a->n_positional++] = arg;
        else if (strcmp(arg, "--") == 0)
            only_positional = true;
        else if (arg[1] == '-')
            SH_TRY(take_long(values, a, arg, err));
        else
            SH_TRY(take_short(values, a, arg, err));
    }
    return SH_OK;
}

static sh_status read_yaml_file(sh_option_values *values, const char *path, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, SH_OPTION_YAML_BYTES, &text, &n, err));
    sh_status status = sh_option_read_yaml(values, (const char *)text, n, path, err);
    free(text);
    return status;
}

sh_status sh_options_parse_file(const sh_command *command, const char *yaml_path, int argc,
                                char **argv, void *options, sh_args *args, sh_error *err)
{
    sh_option_values values = {0};
    arguments a = {.argc = argc, .argv = argv};
    sh_status status = SH_OK;
    a.positional = sh_calloc((size_t)SH_MAX(argc, 1), sizeof *a.positional);
    if (!a.positional)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the command line"));
    SH_GOTO(sh_option_values_init(&values, command, err));
    /* The flags are read twice when there is a file: they may ask for help, and they override. */
    SH_GOTO(take_arguments(&values, &a, err));
    if (yaml_path && !a.help) {
        sh_option_values_release(&values);
        SH_GOTO(sh_option_values_init(&values, command, err));
        SH_GOTO(read_yaml_file(&values, yaml_path, err));
        for (size_t i = 0; i < command->n_options; i++)
            values.values[i].from_file = true;
        SH_GOTO(take_arguments(&values, &a, err));
    }
    sh_option_values_apply(&values, options, args);
    free(args->positional);
    args->positional = a.positional;
    args->n_positional = a.n_positional;
    args->help = a.help;
    a.positional = NULL;

cleanup:
    free(a.positional);
    sh_option_values_release(&values);
    return status;
}

sh_status sh_options_parse(const sh_command *command, int argc, char **argv, void *options,
                           sh_args *args, sh_error *err)
{
    return sh_options_parse_file(command, NULL, argc, argv, options, args, err);
}

sh_status sh_options_parse_yaml(const sh_command *command, const char *text, size_t n,
                                const char *name, void *options, sh_args *args, sh_error *err)
{
    sh_option_values values = {0};
    sh_status status = SH_OK;
    SH_GOTO(sh_option_values_init(&values, command, err));
    SH_GOTO(sh_option_read_yaml(&values, text, n, name, err));
    sh_option_values_apply(&values, options, args);

cleanup:
    sh_option_values_release(&values);
    return status;
}
