/* Classes of devices: one YAML file each, read with the same option table as everything else. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/world/world.h"
#include "shared/base/file.h"

typedef struct {
    const char *name, *hours, *weekdays;
    double share, train_ms_per_token, loss, inferences_hour, corrections, leave_day;
    int64_t memory_bytes, cores, up, down, delay_ms, jitter_ms, away_ms, pause_ms;
} fields;
#define F fields

static const sh_option table[] = {
    SH_OPT_STRING(F, name, 0, "name", "NAME", "device", "of the class"),
    SH_OPT_REAL(F, share, 0, "share", "X", 1, 0.0001, 1e6, "of the fleet, relative to the others'"),
    SH_OPT_REAL(F, train_ms_per_token, 0, "compute.train-ms-per-token", "MS", 20, 0.001, 1e6,
                "time that training takes"),
    SH_OPT_INT(F, pause_ms, 0, "compute.train-pause-ms", "MS", 72000000, 0, 1e12,
               "from one training to the next quiet hours of its owner"),
    SH_OPT_INT(F, cores, 0, "compute.cores", "N", 4, 1, 4096, "processor cores"),
    SH_OPT_INT(F, memory_bytes, 0, "memory", "BYTES", 2e9, 1e6, 1e15, "main memory"),
    SH_OPT_INT(F, up, 0, "link.up", "BYTES", 250000, 100, 1e12, "a second, to the aggregator"),
    SH_OPT_INT(F, down, 0, "link.down", "BYTES", 1000000, 100, 1e12, "a second, from it"),
    SH_OPT_INT(F, delay_ms, 0, "link.delay-ms", "MS", 800, 1, 600000,
               "least delay of a message, the radio's or driver's wake-up included"),
    SH_OPT_INT(F, jitter_ms, 0, "link.jitter-ms", "MS", 400, 0, 600000,
               "what a message may take longer, which reorders"),
    SH_OPT_REAL(F, loss, 0, "link.loss", "X", 0.001, 0, 0.9, "share of messages lost"),
    SH_OPT_STRING(
        F, hours, 0, "online.hours", "LIST", "1",
        "chance to have a network in each of the day's 24 hours; one number: all of them"),
    SH_OPT_STRING(F, weekdays, 0, "online.weekdays", "LIST", "1",
                  "factor on it for each of the week's 7 days; one number: all of them"),
    SH_OPT_REAL(F, inferences_hour, 0, "use.inferences-hour", "X", 2, 0.01, 3600,
                "requests of its user, on average"),
    SH_OPT_REAL(F, corrections, 0, "use.corrections", "X", 0.4, 0, 1,
                "share of them that teach something"),
    SH_OPT_REAL(F, leave_day, 0, "churn.leave-day", "X", 0.01, 0, 1,
                "chance that it goes away on a day"),
    SH_OPT_INT(F, away_ms, 0, "churn.away-ms", "MS", 86400000, 1, 1e12, "and for how long"),
};
static const sh_command command = {"devices", "FILE", table, SH_COUNT(table), "A class of devices.",
                                   NULL};

/* "0.9, 1, ..." or one number for all; each in [0, 1]. */
static sh_status read_list(const char *path, const char *key, const char *text, double *out,
                           size_t n, sh_error *err)
{
    size_t got = 0;
    const char *at = text;
    while (*at) {
        char *end;
        double x = strtod(at, &end);
        if (end == at || !(x >= 0 && x <= 1) || got == n)
            return sh_fail(err, SH_ERR_USAGE,
                           "%s: %s: '%s' is not one number or %zu numbers from 0 to 1", path, key,
                           text, n);
        out[got++] = x;
        at = end + strspn(end, ", ");
    }
    if (got != 1 && got != n)
        return sh_fail(err, SH_ERR_USAGE, "%s: %s: %zu numbers, it takes one or %zu", path, key,
                       got, n);
    for (size_t k = got; k < n; k++)
        out[k] = out[0];
    return SH_OK;
}

static sh_status read_class(const char *path, world_class *out, sh_error *err)
{
    fields f;
    sh_args args = {0};
    char program[] = "devices", *argv[] = {program, NULL};
    SH_TRY(sh_options_parse_file(&command, path, 1, argv, &f, &args, err));
    world_class c = {.share = f.share,
                     .train_ms_per_token = f.train_ms_per_token,
                     .train_pause_ms = (uint64_t)f.pause_ms,
                     .memory_bytes = f.memory_bytes,
                     .cores = f.cores,
                     .bytes_up_s = f.up,
                     .bytes_down_s = f.down,
                     .delay_ms = f.delay_ms,
                     .jitter_ms = f.jitter_ms,
                     .loss = f.loss,
                     .inferences_hour = f.inferences_hour,
                     .corrections = f.corrections,
                     .leave_day = f.leave_day,
                     .away_ms = f.away_ms};
    (void)snprintf(c.name, sizeof c.name, "%s", f.name);
    sh_status status = read_list(path, "online.hours", f.hours, c.online_hour, WORLD_HOURS, err);
    if (status == SH_OK)
        status =
            read_list(path, "online.weekdays", f.weekdays, c.online_weekday, WORLD_WEEKDAYS, err);
    sh_args_release(&args);
    if (status == SH_OK)
        *out = c;
    return status;
}

sh_status world_fleet_read(const sh_option_list *files, world_fleet *out, sh_error *err)
{
    static const char *const shipped[] = {"phones", "gateways", "shop-floor-pcs"};
    world_fleet f = {.delay_ms_min = UINT64_MAX};
    size_t n = files->n ? files->n : SH_COUNT(shipped);
    double shares = 0;
    for (size_t k = 0; k < n; k++) {
        char path[SH_PATH_BYTES];
        if (files->n)
            (void)snprintf(path, sizeof path, "%s", files->items[k]);
        else
            (void)snprintf(path, sizeof path, WORLD_DEVICES_DIR "/%s.yaml", shipped[k]);
        SH_TRY(read_class(path, &f.classes[f.n], err));
        shares += f.classes[f.n].share;
        f.delay_ms_min = SH_MIN(f.delay_ms_min, (uint64_t)f.classes[f.n].delay_ms);
        f.n++;
    }
    for (size_t k = 0; k < f.n; k++)
        f.classes[k].share /= shares;
    *out = f;
    return SH_OK;
}
