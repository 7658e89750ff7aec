/*
 * Probes: where the daemon reads what its device is doing. Each signal has one source, named in the
 * configuration:
 *     sysfs[:ROOT]             what Linux shows under /sys: network, power, temperature
 *     file:PATH                a number, or yes or no
 *     command:PROGRAM ARG...   the same, printed; split at spaces, no shell
 *     always, never            yes, no; of idleness: for ever, not at all
 *     ""                       none: unknown
 * Units: temperature in thousandths of a degree Celsius, idleness in milliseconds.
 * Unknown is a value of its own: no source, a file that is not there or holds something else, a
 * command that fails, takes longer than its time or prints more than SH_PROBE_OUTPUT_MAX bytes.
 *
 *     sh_probe probe;
 *     SH_TRY(sh_probe_parse(SH_PROBE_POWER, "sysfs", &probe, err));
 *     sh_probe_value v = sh_probe_read(&probe, &limits);
 *
 * Threads: a probe is read by one at a time; reading may take as long as its time limit (of a file:
 * as its file system). Ownership: by value.
 */
#ifndef SH_EDGE_PROBE_H
#define SH_EDGE_PROBE_H

#include "shared/base/status.h"

#define SH_PROBE_TEXT_MAX   512 /* bytes of a source */
#define SH_PROBE_ARGS_MAX   16
#define SH_PROBE_OUTPUT_MAX 256

typedef enum {
    SH_PROBE_NETWORK,
    SH_PROBE_METERED,
    SH_PROBE_POWER,
    SH_PROBE_IDLE,
    SH_PROBE_TEMPERATURE,
    SH_PROBES
} sh_probe_signal;

typedef enum {
    SH_PROBE_NONE,
    SH_PROBE_SYSFS,
    SH_PROBE_FILE,
    SH_PROBE_COMMAND,
    SH_PROBE_CONSTANT
} sh_probe_kind;

typedef struct {
    sh_probe_signal signal;
    sh_probe_kind kind;
    int64_t constant;
    char text[SH_PROBE_TEXT_MAX]; /* root, path, or the words of a command, 0 between them */
    char *argv[SH_PROBE_ARGS_MAX + 1];
} sh_probe;

typedef struct {
    bool known;
    int64_t value; /* yes: not 0 */
} sh_probe_value;

typedef struct {
    uint32_t timeout_ms; /* of a command, which is killed then */
    int stop_fd;         /* readable: stop waiting; -1: none */
} sh_probe_limits;

const char *sh_probe_name(sh_probe_signal signal);
/* SH_ERR_USAGE: no such source, or not for this signal. out keeps pointers into itself: parse where
 * it stays. */
SH_MUST_USE sh_status sh_probe_parse(sh_probe_signal signal, const char *source, sh_probe *out,
                                     sh_error *err);
sh_probe_value sh_probe_read(const sh_probe *probe, const sh_probe_limits *limits);

#endif
