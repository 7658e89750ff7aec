/* The YAML reader of the option table: any bytes end in a status, never in a crash or a leak. */
#include "shared/base/option.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *name, *list;
    int64_t count;
    double rate;
    bool on;
} options;

static const sh_option table[] = {
    SH_OPT_STRING(options, name, 'n', "name", "TEXT", "shoal", "a name"),
    SH_OPT_STRING(options, list, 0, "round.list", "LIST", NULL, "a list"),
    SH_OPT_INT(options, count, 'c', "round.count", "N", 8, 1, 64, "a count"),
    SH_OPT_REAL(options, rate, 0, "train.deep.rate", "X", 0.5, 0, 1, "a rate"),
    SH_OPT_FLAG(options, on, 0, "on", "a switch"),
};
static const sh_command command = {"fuzz", "", table, SH_COUNT(table), NULL, NULL};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    options o = {0};
    sh_args args = {0};
    sh_error err = {0};
    sh_status status =
        sh_options_parse_yaml(&command, (const char *)data, size, "fuzz.yaml", &o, &args, &err);
    if (status == SH_OK) {
        /* What was accepted holds the table's promises. */
        SH_ASSERT(o.count >= 1 && o.count <= 64);
        SH_ASSERT(o.rate >= 0 && o.rate <= 1);
        /* An escape such as \L becomes more bytes than it is written with. */
        SH_ASSERT(!o.name || strlen(o.name) <= 2 * size + strlen("shoal"));
    } else {
        SH_ASSERT(err.code == status && err.text[0]);
        SH_ASSERT(!o.name && o.count == 0);
    }
    sh_args_release(&args);
    return 0;
}
