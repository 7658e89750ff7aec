/*
 * A file of keys to enrol: a line a node, its key in 64 hexadecimal digits and, after a blank or a
 * comma, its name if it has one. Empty lines, and those that begin with '#', are skipped.
 */
#ifndef SH_AGGREGATOR_CLI_ENROL_H
#define SH_AGGREGATOR_CLI_ENROL_H

#include "shared/base/json.h"
#include "shared/base/status.h"

/* *out: [{"key": HEX, "name": NAME}, ...], a new reference, when every line is good: what is wrong
 * with the first that is not is in err, with its number. A key comes once. */
SH_MUST_USE sh_status sh_cli_read_keys(const char *path, json_t **out, sh_error *err);

#endif
