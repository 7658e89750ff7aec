/*
 * `shoal report`: the drift report of a run that is over (--out DIR, from DIR/summary.json and the
 * aggregator's store there), or of a fleet that goes on (--dir DIR, from its aggregator's store).
 */
#include <string.h>
#include <time.h>

#include "aggregator/cli.h"
#include "aggregator/report.h"
#include "aggregator/survey.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

typedef struct {
    const char *out, *dir, *format;
    double stale_hours;
} report_options;

static const sh_option report_table[] = {
    SH_OPT_STRING(report_options, out, 'o', "out", "DIR", NULL,
                  "folder of a run: reads summary.json there, writes the report beside it; with "
                  "--dir only where the report goes"),
    SH_OPT_STRING(report_options, dir, 'd', "dir", "DIR", NULL,
                  "folder of an aggregator, running or not: reports on its fleet"),
    SH_OPT_REAL(report_options, stale_hours, 0, "stale-hours", "H", 24, 0.01, 100000,
                "a node that has not checked in for so long is stale"),
    SH_OPT_STRING(report_options, format, 0, "format", "FORMAT", "text",
                  "text or json on stdout; html: a file in DIR, whose path is printed"),
};
static const sh_command report_command = {
    "shoal report",
    "--out DIR | --dir DIR [--out DIR] [--format text|json|html]",
    report_table,
    SH_COUNT(report_table),
    "Makes the drift report of a run, whole or stopped early, or of a fleet that goes on: verdict "
    "and one recommended action, coverage, quality, ranked drift, distributions, releases and "
    "gates, decisions. Every format is drawn from the one document that is written to "
    "report.json in --out (with --dir alone: DIR/report); the plots are plots/*.svg there.",
    "shoal report --dir /var/lib/shoal-aggregator --format html",
};

/* What a store says; SH_ERR_NOT_FOUND when none is there. In a folder of a run the newest check-in
 * is the present. */
static sh_status survey_store(const char *dir, const sh_survey_options *options, json_t **out,
                              sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_store *store = NULL;
    sh_store_options o = {
        .tables = sh_coord_tables, .n_tables = SH_COORD_TABLES_REPORT, .read_only = true};
    SH_TRY(sh_path_join(path, sizeof(path), dir, "store", err));
    /* The simulator's aggregator has no folder of its own around its store. */
    SH_TRY(sh_store_open_lmdb(sh_file_exists(path) ? path : dir, &o, &store, err));
    sh_status status = sh_survey_make(store, options, out, err);
    sh_store_close(&store);
    return status;
}

static sh_status load_summary(const report_options *o, json_t **out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *survey = NULL;
    sh_survey_options options = {.stale_ms = (uint64_t)(o->stale_hours * 3600e3)};
    SH_TRY(sh_path_join(path, sizeof(path), o->out, "summary.json", err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s is not there; --out must name a folder that shoal-sim or shoal-fleet "
                       "wrote",
                       path);
    SH_TRY(sh_json_load(path, out, err));
    SH_TRY(sh_path_join(path, sizeof(path), o->out, "aggregator", err));
    /* A run in memory has no store, a run that stopped early half a one: the summary stands alone.
     */
    if (json_is_object(*out) && survey_store(path, &options, &survey, NULL) == SH_OK)
        json_object_update_missing(*out, survey);
    json_decref(survey);
    return SH_OK;
}

static sh_status load_report(const report_options *o, json_t **out, sh_error *err)
{
    json_t *summary = NULL;
    sh_survey_options options = {.now_ms = (uint64_t)time(NULL) * 1000,
                                 .stale_ms = (uint64_t)(o->stale_hours * 3600e3)};
    SH_TRY(o->dir ? survey_store(o->dir, &options, &summary, err) : load_summary(o, &summary, err));
    sh_status status = sh_report_make(summary, out, err);
    if (status != SH_OK)
        status = sh_fail_in(err, "%s/summary.json", o->out);
    json_decref(summary);
    return status;
}

static sh_status write_file(const char *dir, const char *name, const sh_buf *bytes, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof(path), dir, name, err));
    return sh_file_write_atomic(path, bytes->data, bytes->len, err);
}

static sh_status write_plots(const json_t *report, const char *dir, sh_error *err)
{
    char plots[SH_PATH_BYTES], name[64];
    SH_TRY(sh_path_join(plots, sizeof(plots), dir, "plots", err));
    SH_TRY(sh_dir_make(plots, err));
    for (int i = 0; i < SH_PLOTS; i++) {
        sh_buf svg;
        sh_buf_init(&svg, SH_REPORT_SVG_MAX);
        sh_status status = sh_report_plot(report, (sh_plot)i, true, &svg);
        snprintf(name, sizeof(name), "%s.svg", sh_plot_name((sh_plot)i));
        if (status != SH_OK)
            (void)sh_fail(err, status, "%s: the plot does not fit", name);
        else
            status = write_file(plots, name, &svg, err);
        sh_buf_release(&svg);
        SH_TRY(status);
    }
    return SH_OK;
}

static sh_status write_html(const json_t *report, const char *dir, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_buf page;
    sh_buf_init(&page, SH_REPORT_HTML_MAX);
    sh_status status = sh_report_html(report, &page);
    if (status != SH_OK)
        (void)sh_fail(err, status, "report.html: the page does not fit %d bytes",
                      SH_REPORT_HTML_MAX);
    if (status == SH_OK)
        status = write_file(dir, "report.html", &page, err);
    if (status == SH_OK)
        status = sh_path_join(path, sizeof(path), dir, "report.html", err);
    if (status == SH_OK)
        printf("%s\n", path);
    sh_buf_release(&page);
    return status;
}

static sh_status print_text(const json_t *report, sh_error *err)
{
    sh_buf text;
    sh_buf_init(&text, SH_REPORT_TEXT_MAX);
    sh_status status = sh_report_text(report, &text);
    if (status == SH_OK)
        fwrite(text.data, 1, text.len, stdout); /* sh_cli_flush sees a failure */
    else
        (void)sh_fail(err, status, "the report's text does not fit %d bytes", SH_REPORT_TEXT_MAX);
    sh_buf_release(&text);
    return status;
}

static sh_status write_report(const report_options *o, const char *dir, const json_t *report,
                              sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_dir_make(dir, err));
    SH_TRY(sh_path_join(path, sizeof(path), dir, "report.json", err));
    SH_TRY(sh_json_save(path, report, err));
    SH_TRY(write_plots(report, dir, err));
    if (strcmp(o->format, "html") == 0)
        SH_TRY(write_html(report, dir, err));
    else if (strcmp(o->format, "text") == 0)
        SH_TRY(print_text(report, err));
    else
        SH_TRY(sh_cli_print_json(json_deep_copy(report), err));
    return sh_cli_flush(err);
}

static sh_status run_report(const report_options *o, sh_error *err)
{
    static const char *const formats[] = {"text", "json", "html"};
    char dir[SH_PATH_BYTES]; /* when --out is not given */
    json_t *report = NULL;
    bool known = false;
    for (size_t i = 0; i < SH_COUNT(formats); i++)
        known |= strcmp(o->format, formats[i]) == 0;
    if (!o->dir)
        SH_TRY(sh_cli_need(&report_command, o->out, "--out DIR or --dir DIR", err));
    if (!known)
        return sh_fail(err, SH_ERR_USAGE, "--format %s is none of text, json, html", o->format);
    SH_TRY(load_report(o, &report, err));
    sh_status status = o->out ? SH_OK : sh_path_join(dir, sizeof(dir), o->dir, "report", err);
    if (status == SH_OK)
        status = write_report(o, o->out ? o->out : dir, report, err);
    json_decref(report);
    return status;
}

int sh_cli_report(int argc, char **argv)
{
    report_options options;
    sh_args args = {0};
    sh_error err = {0};
    int exit_code;
    if (!sh_cli_parse(&report_command, argc, argv, &options, &args, &exit_code))
        return exit_code;
    sh_status status = run_report(&options, &err);
    sh_args_release(&args);
    return status == SH_OK ? 0 : sh_error_report("shoal", &err);
}
