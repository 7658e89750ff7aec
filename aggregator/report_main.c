/* `shoal report`: makes DIR/report.json, the page and the plots from DIR/summary.json. */
#include <string.h>

#include "aggregator/cli.h"
#include "aggregator/report.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

typedef struct {
    const char *out, *format;
} report_options;

static const sh_option report_table[] = {
    SH_OPT_STRING(report_options, out, 'o', "out", "DIR", NULL,
                  "folder of a run: reads summary.json there, writes the report beside it"),
    SH_OPT_STRING(report_options, format, 0, "format", "FORMAT", "text",
                  "text or json on stdout; html: a file in DIR, whose path is printed"),
};
static const sh_command report_command = {
    "shoal report",
    "--out DIR [--format text|json|html]",
    report_table,
    SH_COUNT(report_table),
    "Makes the drift report of a run, whole or stopped early: verdict and one recommended action, "
    "checks, quality, ranked drift, releases, sync. Every format is drawn from the one document "
    "that is written to DIR/report.json; the plots are DIR/plots/*.svg.",
    "shoal report --out out --format html",
};

static sh_status load_report(const char *dir, json_t **out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *summary = NULL;
    SH_TRY(sh_path_join(path, sizeof(path), dir, "summary.json", err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s is not there; --out must name a folder that shoal-sim run wrote", path);
    SH_TRY(sh_json_load(path, &summary, err));
    sh_status status = sh_report_make(summary, out, err);
    if (status != SH_OK)
        status = sh_fail_in(err, "%s", path);
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

static sh_status run_report(const report_options *o, sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *report = NULL;
    sh_status status = SH_OK;
    bool text = strcmp(o->format, "text") == 0, json = strcmp(o->format, "json") == 0;
    bool html = strcmp(o->format, "html") == 0;
    SH_TRY(sh_cli_need(&report_command, o->out, "--out DIR", err));
    if (!text && !json && !html)
        return sh_fail(err, SH_ERR_USAGE, "--format %s is none of text, json, html", o->format);
    SH_TRY(load_report(o->out, &report, err));
    SH_GOTO(sh_path_join(path, sizeof(path), o->out, "report.json", err));
    SH_GOTO(sh_json_save(path, report, err));
    SH_GOTO(write_plots(report, o->out, err));
    if (html)
        SH_GOTO(write_html(report, o->out, err));
    if (text)
        SH_GOTO(print_text(report, err));
    if (json)
        SH_GOTO(sh_cli_print_json(json_incref(report), err));
    SH_GOTO(sh_cli_flush(err));
cleanup:
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
