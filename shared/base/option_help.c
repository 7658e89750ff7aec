/* What people read of an option table: --help and the sample configuration. */
#include "shared/base/option_internal.h"

#include <stdio.h>
#include <string.h>

#define HELP_COLUMNS    80
#define HELP_LEFT_MAX   30 /* a longer flag puts its text on the next line */
#define HELP_NOTE_BYTES 512
#define HELP_FLAG_BYTES 256

/* Appends words, broken at `columns`; the first line begins at `column`, the others at `indent`. */
static sh_status append_wrapped(sh_buf *out, const char *text, size_t column, size_t indent,
                                const char *prefix)
{
    bool line_empty = true;
    while (*text) {
        size_t word = strcspn(text, " \n");
        if (!line_empty && (column + 1 + word > HELP_COLUMNS)) {
            SH_TRY(sh_buf_printf(out, "\n%*s%s", (int)indent, "", prefix));
            column = indent + strlen(prefix);
            line_empty = true;
        }
        SH_TRY(sh_buf_printf(out, "%s%.*s", line_empty ? "" : " ", (int)word, text));
        column += word + !line_empty;
        line_empty = false;
        text += word;
        text += strspn(text, " \n");
    }
    return sh_buf_append(out, "\n", 1);
}

static void number_text(const sh_option *option, double x, char *out, size_t bytes)
{
    snprintf(out, bytes, option->type == SH_OPTION_INT ? "%.0f" : "%.15g", x);
}

/* " (2 to 8192; default 256)", or nothing. */
static void describe(const sh_option *option, char *out, size_t bytes)
{
    char range[96] = "", dflt[HELP_NOTE_BYTES / 2] = "", low[32], high[32];
    bool number = option->type == SH_OPTION_INT || option->type == SH_OPTION_REAL;
    number_text(option, option->min, low, sizeof low);
    number_text(option, option->max, high, sizeof high);
    if (number && option->max < SH_OPTION_HUGE)
        snprintf(range, sizeof range, "%s to %s", low, high);
    else if (number && option->min > -SH_OPTION_HUGE)
        snprintf(range, sizeof range, "at least %s", low);
    if (sh_option_has_default(option)) {
        if (number) {
            number_text(option, option->default_number, low, sizeof low);
            snprintf(dflt, sizeof dflt, "default %s", low);
        } else if (option->type == SH_OPTION_STRING) {
            snprintf(dflt, sizeof dflt, "default %.200s",
                     option->default_string[0] ? option->default_string : "\"\"");
        } else if (option->default_number != 0) {
            snprintf(dflt, sizeof dflt, "default true");
        }
    }
    if (option->type == SH_OPTION_LIST)
        snprintf(range, sizeof range, "may be repeated");
    if (range[0] || dflt[0])
        snprintf(out, bytes, " (%s%s%s)", range, range[0] && dflt[0] ? "; " : "", dflt);
    else
        out[0] = 0;
}

static void flag_text(const sh_option *option, char *out, size_t bytes)
{
    char letter[] = {'-', option->letter, ',', ' ', 0};
    snprintf(out, bytes, "  %s--%s%s%s", option->letter ? letter : "    ", option->key,
             option->value ? " " : "", option->value ? option->value : "");
}

static sh_status append_option(sh_buf *out, const char *left, size_t width, const char *help,
                               const char *note)
{
    char text[HELP_NOTE_BYTES * 2];
    snprintf(text, sizeof text, "%.*s%s", HELP_NOTE_BYTES, help, note);
    if (strlen(left) > width)
        SH_TRY(sh_buf_printf(out, "%s\n%*s", left, (int)width + 2, ""));
    else
        SH_TRY(sh_buf_printf(out, "%-*s", (int)width + 2, left));
    return append_wrapped(out, text, width + 2, width + 2, "");
}

sh_status sh_options_help(const sh_command *command, sh_buf *out)
{
    char left[HELP_FLAG_BYTES], note[HELP_NOTE_BYTES];
    size_t width = strlen("  -h, --help");
    for (size_t i = 0; i < command->n_options; i++) {
        flag_text(&command->options[i], left, sizeof left);
        if (strlen(left) <= HELP_LEFT_MAX)
            width = SH_MAX(width, strlen(left));
    }
    SH_TRY(sh_buf_printf(out, "Usage: %s %s\n\n", command->name, command->usage));
    if (command->about) {
        SH_TRY(append_wrapped(out, command->about, 0, 0, ""));
        SH_TRY(sh_buf_append(out, "\n", 1));
    }
    SH_TRY(sh_buf_printf(out, "Options:\n"));
    for (size_t i = 0; i < command->n_options; i++) {
        flag_text(&command->options[i], left, sizeof left);
        describe(&command->options[i], note, sizeof note);
        SH_TRY(append_option(out, left, width, command->options[i].help, note));
    }
    SH_TRY(append_option(out, "  -h, --help", width, "print this text and exit", ""));
    if (command->example)
        SH_TRY(sh_buf_printf(out, "\nExample:\n  %s\n", command->example));
    return SH_OK;
}

/* A double-quoted YAML scalar. */
static sh_status append_quoted(sh_buf *out, const char *text)
{
    SH_TRY(sh_buf_append(out, "\"", 1));
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            SH_TRY(sh_buf_printf(out, "\\%c", *text));
        else if ((unsigned char)*text < ' ' || *text == 0x7f)
            SH_TRY(sh_buf_printf(out, "\\x%02x", (unsigned)*text));
        else
            SH_TRY(sh_buf_append(out, text, 1));
    }
    return sh_buf_append(out, "\"", 1);
}

static sh_status append_sample_option(sh_buf *out, const sh_option *option, const char *key,
                                      size_t indent)
{
    char note[HELP_NOTE_BYTES], text[HELP_NOTE_BYTES * 2], number[64];
    describe(option, note, sizeof note);
    snprintf(text, sizeof text, "%.*s%s", HELP_NOTE_BYTES, option->help, note);
    SH_TRY(sh_buf_printf(out, "%*s# ", (int)indent, ""));
    SH_TRY(append_wrapped(out, text, indent + 2, indent, "# "));
    SH_TRY(sh_buf_printf(out, "%*s", (int)indent, ""));
    if (!sh_option_has_default(option)) /* to be filled in by hand */
        return sh_buf_printf(out, "# %s: %s\n", key, option->value ? option->value : "");
    SH_TRY(sh_buf_printf(out, "%s: ", key));
    if (option->type == SH_OPTION_STRING) {
        SH_TRY(append_quoted(out, option->default_string));
    } else if (option->type == SH_OPTION_FLAG) {
        SH_TRY(sh_buf_printf(out, "%s", option->default_number != 0 ? "true" : "false"));
    } else {
        snprintf(number, sizeof number, option->type == SH_OPTION_INT ? "%.0f" : "%.17g",
                 option->default_number);
        SH_TRY(sh_buf_printf(out, "%s", number));
    }
    return sh_buf_append(out, "\n", 1);
}

/* True when an option before i lies in the same group, which was then written there. */
static bool group_written(const sh_command *command, size_t i, size_t prefix_n)
{
    for (size_t j = 0; j < i; j++)
        if (strncmp(command->options[j].key, command->options[i].key, prefix_n) == 0)
            return true;
    return false;
}

/* The options whose key begins with the first `outer` bytes of prefix ("round."). */
static sh_status append_sample_group(const sh_command *command, sh_buf *out, const char *prefix,
                                     size_t outer, size_t indent)
{
    for (size_t i = 0; i < command->n_options; i++) {
        const sh_option *option = &command->options[i];
        if (strncmp(option->key, prefix, outer) != 0)
            continue;
        const char *rest = option->key + outer;
        size_t n = strcspn(rest, ".");
        if (!rest[n]) {
            SH_TRY(append_sample_option(out, option, rest, indent));
        } else if (!group_written(command, i, outer + n + 1)) {
            SH_TRY(sh_buf_printf(out, "%*s%.*s:\n", (int)indent, "", (int)n, rest));
            SH_TRY(append_sample_group(command, out, option->key, outer + n + 1, indent + 2));
        }
    }
    return SH_OK;
}

sh_status sh_options_sample(const sh_command *command, sh_buf *out)
{
    SH_TRY(sh_buf_printf(out, "# Configuration of %s. Every key is also a flag: --key VALUE.\n",
                         command->name));
    return append_sample_group(command, out, "", 0, 0);
}
