/* The YAML side of the option table: libyaml's events, checked one by one. */
#include "shared/base/option_internal.h"

#include <stdio.h>
#include <string.h>
#include <yaml.h>

typedef struct {
    sh_option_values *values;
    const char *name; /* of the file */
    yaml_parser_t parser;
    yaml_event_t event; /* the current one; zeroed between events */
    char key[SH_OPTION_KEY_BYTES];
    sh_error *err;
} reader;

static size_t line_of(const reader *r)
{
    return r->event.start_mark.line + 1;
}

static sh_status next_event(reader *r)
{
    yaml_event_delete(&r->event);
    if (!yaml_parser_parse(&r->parser, &r->event)) {
        const char *problem = r->parser.problem ? r->parser.problem : "not YAML";
        if (r->parser.error == YAML_MEMORY_ERROR)
            return sh_fail(r->err, SH_ERR_NO_MEMORY, "%s: no memory", r->name);
        if (r->parser.error == YAML_READER_ERROR)
            return sh_fail(r->err, SH_ERR_USAGE, "%s: byte %zu: %s", r->name,
                           r->parser.problem_offset, problem);
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: %s", r->name, r->parser.problem_mark.line + 1,
                       problem);
    }
    bool tagged =
        (r->event.type == YAML_SCALAR_EVENT && r->event.data.scalar.tag) ||
        (r->event.type == YAML_SEQUENCE_START_EVENT && r->event.data.sequence_start.tag) ||
        (r->event.type == YAML_MAPPING_START_EVENT && r->event.data.mapping_start.tag);
    if (tagged || r->event.type == YAML_ALIAS_EVENT)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: tags and aliases are not used here", r->name,
                       line_of(r));
    return SH_OK;
}

static sh_status scalar_text(reader *r, const char **text)
{
    const char *value = (const char *)r->event.data.scalar.value;
    if (memchr(value, 0, r->event.data.scalar.length))
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: a value holds a 0 byte", r->name, line_of(r));
    *text = value;
    return SH_OK;
}

static bool scalar_is_null(const reader *r)
{
    const char *text = (const char *)r->event.data.scalar.value;
    return r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE &&
           (!text[0] || strcmp(text, "~") == 0 || strcmp(text, "null") == 0);
}

static sh_status unknown_key(reader *r, const char *key)
{
    char nearest[SH_OPTION_KEY_BYTES];
    sh_option_nearest(r->values->command, key, true, nearest);
    return sh_fail(r->err, SH_ERR_USAGE,
                   "%s:%zu: unknown key '%.100s': the nearest known one is %s", r->name, line_of(r),
                   key, nearest[0] ? nearest : "none");
}

/* Puts the current scalar behind the `outer` bytes of r->key. */
static sh_status take_key(reader *r, size_t outer)
{
    if (r->event.type != YAML_SCALAR_EVENT)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: a key is expected here", r->name, line_of(r));
    const char *text = NULL;
    SH_TRY(scalar_text(r, &text));
    int n = snprintf(r->key + outer, sizeof r->key - outer, "%s%s", outer ? "." : "", text);
    if (n < 0 || (size_t)n >= sizeof r->key - outer)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: a key is longer than %d bytes", r->name,
                       line_of(r), SH_OPTION_KEY_BYTES - 1);
    const sh_command *command = r->values->command;
    if (sh_option_find(command, r->key) == command->n_options &&
        !sh_option_is_group(command, r->key))
        return unknown_key(r, r->key);
    return SH_OK;
}

static sh_status set_value(reader *r, size_t i, const char *text, size_t line)
{
    char where[SH_ERROR_TEXT_BYTES];
    snprintf(where, sizeof where, "%.200s:%zu: %s", r->name, line, r->key);
    if (r->values->values[i].given)
        return sh_fail(r->err, SH_ERR_USAGE, "%s is given twice", where);
    return sh_option_values_set(r->values, i, text, where, r->err);
}

static sh_status take_scalar(reader *r)
{
    const sh_command *command = r->values->command;
    size_t i = sh_option_find(command, r->key);
    if (scalar_is_null(r)) /* "key:" leaves the default */
        return SH_OK;
    if (i == command->n_options)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: '%s' is a group of keys, not a value",
                       r->name, line_of(r), r->key);
    const char *text = NULL;
    SH_TRY(scalar_text(r, &text));
    return set_value(r, i, text, line_of(r));
}

/* Items of a list option, up to the sequence's end. */
static sh_status take_items(reader *r, size_t i)
{
    char where[SH_ERROR_TEXT_BYTES];
    const size_t line = line_of(r);
    snprintf(where, sizeof where, "%.200s:%zu: %s", r->name, line, r->key);
    if (r->values->values[i].given)
        return sh_fail(r->err, SH_ERR_USAGE, "%s is given twice", where);
    for (;;) {
        SH_TRY(next_event(r));
        if (r->event.type == YAML_SEQUENCE_END_EVENT)
            return SH_OK;
        const char *text = NULL;
        if (r->event.type != YAML_SCALAR_EVENT)
            return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: '%s' takes a list of plain values",
                           r->name, line_of(r), r->key);
        SH_TRY(scalar_text(r, &text));
        SH_TRY(sh_option_values_set(r->values, i, text, where, r->err));
    }
}

/* [a, b] becomes "a,b": only for strings, and no item may hold a comma of its own. */
static sh_status take_list(reader *r)
{
    const sh_command *command = r->values->command;
    size_t i = sh_option_find(command, r->key), line = line_of(r);
    if (i < command->n_options && command->options[i].type == SH_OPTION_LIST)
        return take_items(r, i);
    if (i == command->n_options || command->options[i].type != SH_OPTION_STRING)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: '%s' does not take a list", r->name, line,
                       r->key);
    sh_buf joined;
    sh_buf_init(&joined, SH_OPTION_VALUE_MAX + 2);
    sh_status status = SH_OK;
    for (bool first = true;; first = false) {
        SH_GOTO(next_event(r));
        if (r->event.type == YAML_SEQUENCE_END_EVENT)
            break;
        const char *text = NULL;
        if (r->event.type != YAML_SCALAR_EVENT)
            SH_GOTO(sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: '%s' takes a list of plain values",
                            r->name, line_of(r), r->key));
        SH_GOTO(scalar_text(r, &text));
        if (strchr(text, ','))
            SH_GOTO(sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: an item of '%s' holds a comma", r->name,
                            line_of(r), r->key));
        status = sh_buf_printf(&joined, "%s%s", first ? "" : ",", text);
        if (status != SH_OK)
            SH_GOTO(sh_fail(r->err, status == SH_ERR_LIMIT ? SH_ERR_USAGE : status,
                            "%s:%zu: the list '%s' is too long", r->name, line, r->key));
    }
    status = sh_buf_append(&joined, "", 1);
    if (status != SH_OK)
        SH_GOTO(sh_fail(r->err, status, "%s:%zu: no memory", r->name, line));
    SH_GOTO(set_value(r, i, (const char *)joined.data, line));

cleanup:
    sh_buf_release(&joined);
    return status;
}

/* The pairs of one mapping, up to its end. Recursion is bounded by SH_OPTION_DEPTH_MAX. */
static sh_status take_mapping(reader *r, size_t depth)
{
    size_t outer = strlen(r->key);
    for (;;) {
        r->key[outer] = 0;
        SH_TRY(next_event(r));
        if (r->event.type == YAML_MAPPING_END_EVENT)
            return SH_OK;
        SH_TRY(take_key(r, outer));
        SH_TRY(next_event(r));
        switch (r->event.type) {
        case YAML_SCALAR_EVENT:
            SH_TRY(take_scalar(r));
            break;
        case YAML_SEQUENCE_START_EVENT:
            SH_TRY(take_list(r));
            break;
        default:
            SH_ASSERT(r->event.type == YAML_MAPPING_START_EVENT);
            if (!sh_option_is_group(r->values->command, r->key) || depth == SH_OPTION_DEPTH_MAX)
                return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: '%s' takes one value, not keys",
                               r->name, line_of(r), r->key);
            SH_TRY(take_mapping(r, depth + 1));
        }
    }
}

static sh_status take_stream(reader *r)
{
    SH_TRY(next_event(r)); /* stream start */
    SH_TRY(next_event(r));
    if (r->event.type == YAML_STREAM_END_EVENT) /* nothing but comments */
        return SH_OK;
    SH_TRY(next_event(r));
    if (r->event.type == YAML_MAPPING_START_EVENT)
        SH_TRY(take_mapping(r, 1));
    else if (r->event.type != YAML_SCALAR_EVENT || !scalar_is_null(r))
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: 'key: value' lines are expected", r->name,
                       line_of(r));
    SH_TRY(next_event(r)); /* document end */
    SH_TRY(next_event(r));
    if (r->event.type != YAML_STREAM_END_EVENT)
        return sh_fail(r->err, SH_ERR_USAGE, "%s:%zu: only one document is read", r->name,
                       line_of(r));
    return SH_OK;
}

sh_status sh_option_read_yaml(sh_option_values *values, const char *text, size_t n,
                              const char *name, sh_error *err)
{
    if (n > SH_OPTION_YAML_BYTES)
        return sh_fail(err, SH_ERR_LIMIT, "%s: larger than %zu bytes", name, SH_OPTION_YAML_BYTES);
    reader r = {.values = values, .name = name, .err = err};
    if (!yaml_parser_initialize(&r.parser))
        return sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory", name);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, n);
    sh_status status = take_stream(&r);
    yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    return status;
}
