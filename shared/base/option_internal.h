/*
 * What the three files of the option table share. A parse collects one checked value an option
 * and writes nothing; sh_option_values_apply then fills the caller's struct, which cannot fail.
 */
#ifndef SH_BASE_OPTION_INTERNAL_H
#define SH_BASE_OPTION_INTERNAL_H

#include "shared/base/option.h"

#define SH_OPTION_KEY_BYTES  128 /* the longest dotted key, with its final 0 */
#define SH_OPTION_DEPTH_MAX  8   /* of nested YAML mappings */
#define SH_OPTION_VALUE_MAX  (64 << 10)
#define SH_OPTION_YAML_BYTES ((size_t)1 << 20)
#define SH_OPTION_HUGE       9.2e18 /* a bound beyond this is no bound */

typedef struct sh_owned {
    struct sh_owned *next;
    char text[];
} sh_owned;

typedef struct {
    bool given;
    bool flag;
    int64_t integer;
    double real;
    sh_owned *string; /* of a list: the latest item, then those before it */
    size_t n_items;
    bool from_file; /* a list's items go when the command line gives one */
} sh_option_value;

typedef struct {
    const sh_command *command;
    sh_option_value *values; /* one an option of the command */
} sh_option_values;

SH_MUST_USE sh_status sh_option_values_init(sh_option_values *values, const sh_command *command,
                                            sh_error *err);
void sh_option_values_release(sh_option_values *values);
/* Reads text as option i's type. where names the place in an error: "--context", "a.yaml:3: x". */
SH_MUST_USE sh_status sh_option_values_set(sh_option_values *values, size_t i, const char *text,
                                           const char *where, sh_error *err);
/* Fills the struct with defaults and given values; the strings become args'. */
void sh_option_values_apply(sh_option_values *values, void *options, sh_args *args);

/* The index of a key, or n_options. */
size_t sh_option_find(const sh_command *command, const char *key);
/* True when key names a group: "round" of "round.buffer". */
bool sh_option_is_group(const sh_command *command, const char *key);
/* The known key with the least edit distance, into out; "" when the command has no options. */
void sh_option_nearest(const sh_command *command, const char *key, bool groups,
                       char out[SH_OPTION_KEY_BYTES]);
/* True when the default lies in the option's range: another default means "not set". */
bool sh_option_has_default(const sh_option *option);

SH_MUST_USE sh_status sh_option_read_yaml(sh_option_values *values, const char *text, size_t n,
                                          const char *name, sh_error *err);

#endif
