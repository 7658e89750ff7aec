/* The report as text for a terminal: at most 100 columns where names are short. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "aggregator/report_page.h"

#define REASONS_MAX 32
#define NAME_WIDTH  44

/* "  label          value" of a number of the report. */
static void put_figure(report_page *p, const json_t *report, const char *label, const char *path,
                       report_form form)
{
    char text[REPORT_NUMBER_BYTES];
    report_put(p, "  %-38s%s\n", label, report_format(report_number(report, path), form, text));
}

static void put_figures(report_page *p, const json_t *report, const report_figure *figure)
{
    for (; figure->label != NULL; figure++)
        if (report_shows(report, figure))
            put_figure(p, report, figure->label, figure->path, figure->form);
}

static void put_left_out(report_page *p, const json_t *part, const char *what)
{
    double n = report_number(part, "left_out");
    if (n > 0)
        report_put(p, "  … and %.0f more %s\n", n, what);
}

static void put_head(report_page *p, const json_t *report)
{
    const json_t *run = report_get(report, "run");
    char number[REPORT_NUMBER_BYTES];
    report_put(p, "Shoal report\n\n  ");
    report_put_plain(p, report_string(report, "verdict.headline"), 0);
    report_put(p, "\n  Do: ");
    report_put_plain(p, report_string(report, "verdict.recommendation"), 0);
    report_put(p, "\n");
    if (report_is_fleet(report)) {
        put_figure(p, report, "current release", "fleet.release", REPORT_COUNT);
        return;
    }
    report_put(p, "\nRun\n");
    put_figure(p, run, "seed", "seed", REPORT_COUNT);
    put_figure(p, run, "nodes", "nodes", REPORT_COUNT);
    report_put(p, "  %-38s", "kernel, BLAS core");
    report_put_plain(p, report_string(run, "kernel"), 0);
    report_put(p, ", ");
    report_put_plain(p, report_string(run, "blas_core"), 0);
    report_put(p, "\n  %-38s", "result hash");
    report_put_plain(p, report_string(run, "result_hash"), 0);
    double days = report_number(run, "virtual_ms") / 86400e3;
    report_put(p, "\n  %-38s%s\n", "virtual days", report_format(days, REPORT_PLAIN, number));
}

static void put_coverage(report_page *p, const json_t *report)
{
    const json_t *missing = report_get(report, "coverage.not_measured");
    report_put(p, "\nCoverage\n");
    put_figures(p, report, report_coverage_figures);
    if (report_is_fleet(report))
        return;
    if (json_array_size(missing) > 0)
        report_put(p, "  not measured:\n");
    for (size_t i = 0; i < json_array_size(missing); i++) {
        report_put(p, "    ");
        report_put_plain(p, json_string_value(json_array_get(missing, i)), 0);
        report_put(p, "\n");
    }
}

/* Whatever a check's value is: number, truth, text or nothing. */
static void put_value(report_page *p, const json_t *value, size_t width)
{
    char text[REPORT_NUMBER_BYTES];
    if (json_is_string(value)) {
        report_put_plain(p, json_string_value(value), width);
        return;
    }
    if (json_is_boolean(value))
        snprintf(text, sizeof(text), "%s", json_is_true(value) ? "yes" : "no");
    else
        report_format(json_is_number(value) ? json_number_value(value) : NAN,
                      json_is_integer(value) ? REPORT_COUNT : REPORT_PLAIN, text);
    report_put_plain(p, text, width);
}

static void put_checks(report_page *p, const json_t *report)
{
    const json_t *rows = report_get(report, "checks.rows");
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "\nChecks\n");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        report_put(p, "  %-5s", json_is_true(report_get(row, "ok")) ? "ok" : "FAIL");
        report_put_plain(p, report_string(row, "name"), NAME_WIDTH);
        report_put(p, " ");
        put_value(p, report_get(row, "value"), 14);
        report_put(p, " ");
        put_value(p, report_get(row, "limit"), 0);
        report_put(p, "\n");
    }
    put_left_out(p, report_get(report, "checks"), "checks");
}

static void put_quality(report_page *p, const json_t *report)
{
    report_put(p, "\nQuality\n");
    put_figures(p, report, report_quality_figures);
}

/* What moved, and by how much: means of the first and the newest windows. */
static void put_shifts(report_page *p, const json_t *report)
{
    const json_t *rows = report_get(report, "histograms");
    char n[3][REPORT_NUMBER_BYTES];
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "\n  %-20s%14s%14s%14s\n", "metric", "reference", "now", "shift");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        double before = report_number(row, "reference_mean");
        double now = report_number(row, "current_mean");
        report_put(p, "  ");
        report_put_plain(p, report_string(row, "metric"), 20);
        if (isnan(before) || isnan(now))
            report_put(p, "%14s\n", "insufficient");
        else
            report_put(p, "%14s%14s%14s\n", report_format(before, REPORT_PLAIN, n[0]),
                       report_format(now, REPORT_PLAIN, n[1]),
                       report_format(now - before, REPORT_PLAIN, n[2]));
    }
}

static void put_ranked(report_page *p, const json_t *row)
{
    char number[REPORT_NUMBER_BYTES];
    bool alarm = !isnan(report_number(row, "first_alarm_window"));
    report_put(p, "  ");
    report_put_plain(p, report_string(row, "node"), 20);
    report_put_plain(p, report_string(row, "topic"), 20);
    report_put_plain(p, report_string(row, "metric"), 12);
    report_put(p, "%14s",
               alarm ? report_format(report_number(row, "log_evalue"), REPORT_PLAIN, number)
                     : "no alarm");
    double windows = report_number(row, "windows_to_alarm"), effect = report_number(row, "effect");
    report_put(p, "%10s",
               alarm && !isnan(windows) ? report_format(windows, REPORT_COUNT, number) : "");
    if (alarm && !isnan(effect)) {
        report_put(p, "%12s ", report_format(effect, REPORT_PLAIN, number));
        report_put_plain(p, report_string(row, "unit"), 0);
    }
    report_put(p, "\n");
}

static void put_drift(report_page *p, const json_t *report)
{
    const json_t *drift = report_get(report, "drift"), *rows = report_get(drift, "ranked");
    report_put(p, "\nDrift\n");
    if (!report_is_fleet(report)) {
        put_figure(p, drift, "alarms before the change", "false_alarms", REPORT_COUNT);
        put_figure(p, drift, "nodes in alarm after it", "alarmed", REPORT_COUNT);
        put_figure(p, drift, "of these within 3 windows", "within_3_windows", REPORT_COUNT);
    }
    if (json_array_size(rows) > 0)
        report_put(p, "\n  %-20s%-20s%-12s%14s%10s%12s\n", "node", "topic", "metric", "log e-value",
                   "windows", "effect");
    for (size_t i = 0; i < json_array_size(rows); i++)
        put_ranked(p, json_array_get(rows, i));
    put_left_out(p, drift, "nodes");
    put_shifts(p, report);
}

static void put_releases(report_page *p, const json_t *report)
{
    const json_t *releases = report_get(report, "releases"), *rows = report_get(releases, "rows");
    report_put(p, "\nReleases\n");
    put_figure(p, releases, "published", "published", REPORT_COUNT);
    put_figure(p, releases, "refused by the gate", "refused", REPORT_COUNT);
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "\n  %-9s%-8s%-8s%10s%12s%9s%6s%12s  %s\n", "release", "parent", "format", "loss",
               "of parent", "updates", "rank", "bytes", "verdict");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        char name[REPORT_NUMBER_BYTES] = "–       ", n[6][REPORT_NUMBER_BYTES];
        double version = report_number(row, "version");
        if (!isnan(version))
            snprintf(name, sizeof(name), "%-8.0f", version);
        report_put(p, "  %s %-8s", name,
                   report_format(report_number(row, "parent"), REPORT_COUNT, n[0]));
        report_put_plain(p, report_string(row, "format"), 8);
        report_put(p, "%10s%12s%9s%6s%12s  ",
                   report_format(report_number(row, "loss_candidate"), REPORT_PLAIN, n[1]),
                   report_format(report_number(row, "loss_parent"), REPORT_PLAIN, n[2]),
                   report_format(report_number(row, "updates_merged"), REPORT_COUNT, n[3]),
                   report_format(report_number(row, "rank"), REPORT_COUNT, n[4]),
                   report_format(report_number(row, "bytes"), REPORT_BYTES, n[5]));
        report_put_plain(p, report_string(row, "verdict"), 0);
        report_put(p, "\n");
    }
    put_left_out(p, releases, "candidates");
}

static void put_sync(report_page *p, const json_t *report)
{
    const json_t *sync = report_get(report, "sync"), *faults = report_get(report, "faults");
    const char *reason;
    json_t *count;
    size_t reasons = 0;
    report_put(p, "\nSync\n");
    put_figures(p, report, report_sync_figures);
    /* jansson's iteration takes a pointer to non-const, and does not write */
    json_object_foreach((json_t *)report_get(sync, "updates.refused"), reason, count)
    {
        char text[REPORT_NUMBER_BYTES];
        if (reasons++ == REASONS_MAX)
            break;
        report_put(p, "  refused: ");
        report_put_plain(p, reason, 29);
        report_put(p, "%s\n", report_format(json_number_value(count), REPORT_COUNT, text));
    }
    const json_t *rows = report_get(faults, "rows");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        report_put(p, i == 0 ? "\nFaults\n  " : "  ");
        report_put_plain(p, report_string(row, "name"), 38);
        report_put_plain(p, report_string(row, "target"), 0);
        report_put(p, "\n");
    }
    put_left_out(p, faults, "faults");
}

static void put_decisions(report_page *p, const json_t *report)
{
    const json_t *rows = report_get(report, "decisions.rows");
    char when[REPORT_NUMBER_BYTES];
    if (json_array_size(rows) > 0)
        report_put(p, "\nDecisions, newest first\n");
    for (size_t i = json_array_size(rows); i-- > 0;) {
        const json_t *row = json_array_get(rows, i);
        report_put(p, "  %s  ", report_time(report_number(row, "at_ms"), when));
        report_put_plain(p, report_string(row, "text"), 0);
        report_put(p, "\n");
    }
    put_left_out(p, report_get(report, "decisions"), "decisions");
}

sh_status sh_report_text(const json_t *report, sh_buf *out)
{
    report_page page = {out, SH_OK};
    put_head(&page, report);
    put_coverage(&page, report);
    put_checks(&page, report);
    put_quality(&page, report);
    put_drift(&page, report);
    put_releases(&page, report);
    put_sync(&page, report);
    put_decisions(&page, report);
    return page.status;
}
