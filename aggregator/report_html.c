/*
 * The report as one HTML file: no scripts, no links, nothing from elsewhere; light and dark by the
 * reader's preference; prints on paper.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "aggregator/report_page.h"

#define REASONS_MAX 32

static const char page_style[] =
    ":root{color-scheme:light dark;--ink:#1c2430;--muted:#5d6878;--paper:#fff;--soft:#f5f7f9;"
    "--line:#e3e7ec;--good:#15803d;--warn:#b45309;--bad:#c0291b}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--muted:#9aa6b6;--paper:#14181e;"
    "--soft:#1b2129;--line:#2b333e;--good:#5fd38a;--warn:#f0a35e;--bad:#ff8577}}"
    "*{box-sizing:border-box}"
    "body{margin:0 auto;padding:32px 24px 64px;max-width:960px;background:var(--paper);"
    "color:var(--ink);font:15px/1.5 system-ui,-apple-system,\"Segoe UI\",sans-serif}"
    "h1{font-size:16px;font-weight:600;color:var(--muted);margin:0 0 12px}"
    "h2{font-size:19px;margin:40px 0 8px;padding-top:16px;border-top:1px solid var(--line)}"
    "p{margin:6px 0}.muted{color:var(--muted)}"
    ".verdict{border-left:5px solid var(--warn);background:var(--soft);padding:14px 18px;"
    "border-radius:0 6px 6px 0}.verdict p:first-child{font-size:21px;line-height:1.3;"
    "font-weight:600;margin:0 0 6px}.verdict.good{border-color:var(--good)}"
    ".verdict.failed{border-color:var(--bad)}.verdict.quiet{border-color:var(--muted)}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;"
    "margin:20px 0 0;padding:0;list-style:none}.tiles li{background:var(--soft);"
    "border-radius:6px;padding:10px 14px}.tiles b{display:block;font-size:20px;"
    "font-variant-numeric:tabular-nums}.tiles span{color:var(--muted);font-size:13px}"
    ".wide{overflow-x:auto}"
    "table{border-collapse:collapse;width:100%;font-size:14px;"
    "font-variant-numeric:tabular-nums;margin:8px 0}"
    "th{font-weight:600;text-align:left;color:var(--muted);border-bottom:1px solid var(--line)}"
    "td,th{padding:5px 12px 5px 0;vertical-align:top}tr+tr td{border-top:1px solid var(--line)}"
    "table.f{max-width:600px}td{overflow-wrap:anywhere}.n{text-align:right;white-space:nowrap}"
    "td:last-child,th:last-child{padding-right:0}"
    "td.good{color:var(--good)}td.bad{color:var(--bad);font-weight:600}"
    "code{font-size:13px;overflow-wrap:anywhere}figure{margin:12px 0}"
    "figcaption{color:var(--muted);font-size:13px}"
    "@media print{body{max-width:none;padding:0;font-size:11pt}h2{break-after:avoid}"
    "figure,tr,.verdict,.tiles{break-inside:avoid}}";

static void put_cell_text(report_page *p, const char *class, const char *text)
{
    report_put(p, class ? "<td class=\"%s\">" : "<td>", class);
    report_put_escaped(p, text);
    report_put(p, "</td>");
}

static void put_cell_number(report_page *p, const json_t *row, const char *path, report_form form)
{
    char text[REPORT_NUMBER_BYTES];
    double x = report_number(row, path);
    report_put(p, "<td class=\"n\">%s</td>", isnan(x) ? "–" : report_format(x, form, text));
}

static void put_tile(report_page *p, const json_t *report, const char *label, const char *path,
                     report_form form)
{
    char text[REPORT_NUMBER_BYTES];
    double x = report_number(report, path);
    report_put(p, "<li><b>%s</b><span>%s</span></li>",
               isnan(x) ? "–" : report_format(x, form, text), label);
}

static void put_figure_row(report_page *p, const json_t *report, const char *label,
                           const char *path, report_form form)
{
    char text[REPORT_NUMBER_BYTES];
    report_put(p, "<tr><td>%s</td><td class=\"n\">%s</td></tr>\n", label,
               report_format(report_number(report, path), form, text));
}

static void put_figures(report_page *p, const json_t *report, const report_figure *figure)
{
    for (; figure->label != NULL; figure++)
        if (report_shows(report, figure))
            put_figure_row(p, report, figure->label, figure->path, figure->form);
}

static void put_left_out(report_page *p, const json_t *part, const char *what)
{
    double n = report_number(part, "left_out");
    if (n > 0)
        report_put(p, "<p class=\"muted\">… and %.0f more %s.</p>\n", n, what);
}

static void put_plot(report_page *p, const json_t *report, sh_plot plot, const char *caption)
{
    report_put(p, "<figure class=\"wide\">\n");
    if (p->status == SH_OK)
        p->status = sh_report_plot(report, plot, false, p->out);
    report_put(p, "<figcaption>%s</figcaption></figure>\n", caption);
}

/* The state is one of our own words, so it may name a class. */
static void put_head(report_page *p, const json_t *report)
{
    report_put(p, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
                  "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
                  "<title>Shoal report</title>\n<style>");
    report_put_raw(p, page_style);
    report_put_raw(p, sh_plot_style);
    report_put(p, "</style>\n</head>\n<body>\n<h1>Shoal report</h1>\n<div class=\"verdict ");
    report_put_escaped(p, report_string(report, "verdict.state"));
    report_put(p, "\"><p>");
    report_put_escaped(p, report_string(report, "verdict.headline"));
    report_put(p, "</p>\n<p>");
    report_put_escaped(p, report_string(report, "verdict.recommendation"));
    report_put(p, "</p></div>\n<ul class=\"tiles\">");
    if (report_is_fleet(report)) {
        put_tile(p, report, "nodes reporting", "coverage.nodes_reporting", REPORT_COUNT);
        put_tile(p, report, "accepted now", "fleet.acceptance_now", REPORT_SHARE);
    } else {
        put_tile(p, report, "of central LoRA's gain", "quality.gain_share", REPORT_SHARE);
        put_tile(p, report, "accepted at the end", "quality.acceptance.end", REPORT_SHARE);
    }
    put_tile(p, report, "releases published", "releases.published", REPORT_COUNT);
    put_tile(p, report, "updates merged", "sync.updates.merged", REPORT_COUNT);
    put_tile(p, report, "nodes in alarm", "drift.alarmed", REPORT_COUNT);
    report_put(p, "</ul>\n");
}

static void put_value_cell(report_page *p, const json_t *value)
{
    char text[REPORT_NUMBER_BYTES];
    if (json_is_string(value)) {
        put_cell_text(p, NULL, json_string_value(value));
    } else if (json_is_boolean(value)) {
        put_cell_text(p, NULL, json_is_true(value) ? "yes" : "no");
    } else {
        report_format(json_is_number(value) ? json_number_value(value) : NAN,
                      json_is_integer(value) ? REPORT_COUNT : REPORT_PLAIN, text);
        put_cell_text(p, NULL, text);
    }
}

static void put_checks(report_page *p, const json_t *report)
{
    const json_t *rows = report_get(report, "checks.rows");
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "<h2>Checks</h2>\n<div class=\"wide\"><table><tr><th></th><th>what must hold</th>"
                  "<th>measured</th><th>limit</th></tr>\n");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        bool ok = json_is_true(report_get(row, "ok"));
        report_put(p, "<tr>");
        put_cell_text(p, ok ? "good" : "bad", ok ? "ok" : "fails");
        put_cell_text(p, NULL, report_string(row, "name"));
        put_value_cell(p, report_get(row, "value"));
        put_value_cell(p, report_get(row, "limit"));
        report_put(p, "</tr>\n");
    }
    report_put(p, "</table></div>\n");
    put_left_out(p, report_get(report, "checks"), "checks");
}

static void put_coverage(report_page *p, const json_t *report)
{
    report_put(p, "<h2>Coverage</h2>\n<table class=\"f\">\n");
    put_figures(p, report, report_coverage_figures);
    report_put(p, "</table>\n");
}

static void put_quality(report_page *p, const json_t *report)
{
    report_put(p, "<h2>Quality</h2>\n");
    put_plot(p, report, SH_PLOT_LOSS,
             "Each dot is a release that passed the gate, each cross a candidate that it refused. "
             "The gate's suite and the held-out text are different texts.");
    report_put(p, "<table class=\"f\">\n");
    put_figures(p, report, report_quality_figures);
    report_put(p, "</table>\n");
    put_plot(p, report, SH_PLOT_ACCEPTANCE,
             report_is_fleet(report) ? "Over all nodes, by the time when windows closed."
                                     : "Means over the nodes, by the number of the window on its "
                                       "node.");
}

static void put_ranked(report_page *p, const json_t *row)
{
    char effect[REPORT_NUMBER_BYTES], text[2 * REPORT_NUMBER_BYTES] = "–";
    bool alarm = !isnan(report_number(row, "first_alarm_window"));
    double x = report_number(row, "effect");
    const char *unit = report_string(row, "unit");
    if (alarm && !isnan(x))
        snprintf(text, sizeof(text), "%s %.40s", report_format(x, REPORT_PLAIN, effect),
                 unit != NULL ? unit : "");
    report_put(p, "<tr>");
    put_cell_text(p, NULL, report_string(row, "node"));
    put_cell_text(p, NULL, report_string(row, "topic"));
    put_cell_text(p, NULL, alarm ? report_string(row, "metric") : "no alarm");
    put_cell_text(p, "n", text);
    put_cell_number(p, alarm ? row : NULL, "log_evalue", REPORT_PLAIN);
    put_cell_number(p, alarm ? row : NULL, "windows_to_alarm", REPORT_COUNT);
    report_put(p, "</tr>\n");
}

static void put_drift(report_page *p, const json_t *report)
{
    const json_t *drift = report_get(report, "drift"), *rows = report_get(drift, "ranked");
    char early[REPORT_NUMBER_BYTES], alarmed[REPORT_NUMBER_BYTES], soon[REPORT_NUMBER_BYTES];
    report_put(p, "<h2>Drift</h2>\n");
    if (!report_is_fleet(report))
        report_put(p,
                   "<p>Alarms before the change: %s. Nodes in alarm after it: %s, of these within "
                   "3 windows: %s.</p>\n",
                   report_format(report_number(drift, "false_alarms"), REPORT_COUNT, early),
                   report_format(report_number(drift, "alarmed"), REPORT_COUNT, alarmed),
                   report_format(report_number(drift, "within_3_windows"), REPORT_COUNT, soon));
    put_plot(p, report, SH_PLOT_DRIFT,
             "Natural logarithm of the e-detector's running value: what chance alone would have to "
             "be against it. Nodes with the strongest evidence come first.");
    put_left_out(p, report_get(report, "heatmap"), "nodes");
    if (json_array_size(rows) > 0)
        report_put(p, "<div class=\"wide\"><table><tr><th>node</th><th>topic</th><th>metric</th>"
                      "<th class=\"n\">effect</th><th class=\"n\">log e-value</th>"
                      "<th class=\"n\">windows to the alarm</th></tr>\n");
    for (size_t i = 0; i < json_array_size(rows); i++)
        put_ranked(p, json_array_get(rows, i));
    if (json_array_size(rows) > 0)
        report_put(p, "</table></div>\n");
    put_left_out(p, drift, "nodes");
    if (json_array_size(report_get(report, "histograms")) > 0)
        put_plot(p, report, SH_PLOT_HISTOGRAMS,
                 "The first windows that the aggregator keeps of each node against its newest; "
                 "likelihood and rejections within the release that the node runs now.");
}

/* What the canary nodes' own texts said: change of the loss, over how many nodes. */
static void put_canary(report_page *p, const json_t *row)
{
    char text[2 * REPORT_NUMBER_BYTES] = "–";
    double nodes = report_number(row, "canary_nodes");
    double change = report_number(row, "canary_candidate") - report_number(row, "canary_parent");
    if (nodes > 0 && !isnan(change))
        snprintf(text, sizeof(text), "%+.3f (%.0f)", change, nodes);
    put_cell_text(p, "n", text);
}

static void put_release_row(report_page *p, const json_t *row)
{
    char name[REPORT_NUMBER_BYTES];
    double version = report_number(row, "version");
    bool published = !isnan(version);
    report_put(p, "<tr>");
    put_cell_text(p, published ? NULL : "bad",
                  published ? report_format(version, REPORT_COUNT, name) : "–");
    put_cell_number(p, row, "parent", REPORT_COUNT);
    put_cell_text(p, NULL, report_string(row, "format"));
    put_cell_number(p, row, "loss_candidate", REPORT_PLAIN);
    put_cell_number(p, row, "loss_parent", REPORT_PLAIN);
    put_cell_number(p, row, "loss_adapter_form", REPORT_PLAIN);
    put_canary(p, row);
    put_cell_number(p, row, "updates_merged", REPORT_COUNT);
    put_cell_number(p, row, "rank", REPORT_COUNT);
    put_cell_number(p, row, "discarded_energy", REPORT_SHARE);
    put_cell_number(p, row, "bytes", REPORT_BYTES);
    put_cell_text(p, published ? "good" : "bad", report_string(row, "verdict"));
    report_put(p, "</tr>\n");
}

static void put_releases(report_page *p, const json_t *report)
{
    const json_t *releases = report_get(report, "releases"), *rows = report_get(releases, "rows");
    char published[REPORT_NUMBER_BYTES], refused[REPORT_NUMBER_BYTES];
    report_put(p, "<h2>Releases</h2>\n<p>Published: %s. Refused by the gate: %s.</p>\n",
               report_format(report_number(releases, "published"), REPORT_COUNT, published),
               report_format(report_number(releases, "refused"), REPORT_COUNT, refused));
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "<div class=\"wide\"><table><tr><th>release</th><th class=\"n\">parent</th>"
                  "<th>format</th><th class=\"n\">loss</th><th class=\"n\">of parent</th>"
                  "<th class=\"n\">as adapter</th><th class=\"n\">on nodes</th>"
                  "<th class=\"n\">updates</th>"
                  "<th class=\"n\">rank</th><th class=\"n\">discarded</th>"
                  "<th class=\"n\">size</th><th>verdict</th></tr>\n");
    for (size_t i = 0; i < json_array_size(rows); i++)
        put_release_row(p, json_array_get(rows, i));
    report_put(p, "</table></div>\n<p class=\"muted\">Loss: the gate's suite on the quantized "
                  "bytes. As adapter: the same change beside the quantized base. On nodes: "
                  "its change on canary nodes' own texts (nodes). Discarded: energy "
                  "that the adapter form's rank leaves out.</p>\n");
    put_left_out(p, releases, "candidates");
}

static void put_sync(report_page *p, const json_t *report)
{
    const json_t *sync = report_get(report, "sync");
    const char *reason;
    json_t *count;
    size_t reasons = 0;
    report_put(p, "<h2>Sync</h2>\n<table class=\"f\">\n");
    put_figures(p, report, report_sync_figures);
    /* jansson's iteration takes a pointer to non-const, and does not write */
    json_object_foreach((json_t *)report_get(sync, "updates.refused"), reason, count)
    {
        char text[REPORT_NUMBER_BYTES];
        if (reasons++ == REASONS_MAX)
            break;
        report_put(p, "<tr><td>refused: ");
        report_put_escaped(p, reason);
        report_put(p, "</td><td class=\"n\">%s</td></tr>\n",
                   report_format(json_number_value(count), REPORT_COUNT, text));
    }
    report_put(p, "</table>\n");
}

static void put_faults(report_page *p, const json_t *report)
{
    const json_t *faults = report_get(report, "faults"), *rows = report_get(faults, "rows");
    if (json_array_size(rows) == 0)
        return;
    report_put(p,
               "<h2>Faults</h2>\n<table class=\"f\"><tr><th>fail point or fault</th><th>where</th>"
               "<th class=\"n\">virtual hours</th></tr>\n");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        char hours[REPORT_NUMBER_BYTES];
        report_put(p, "<tr>");
        put_cell_text(p, NULL, report_string(row, "name"));
        put_cell_text(p, NULL, report_string(row, "target"));
        report_put(p, "<td class=\"n\">%s</td></tr>\n",
                   report_format(report_number(row, "at_ms") / 3600e3, REPORT_PLAIN, hours));
    }
    report_put(p, "</table>\n");
    put_left_out(p, faults, "faults");
}

static void put_foot(report_page *p, const json_t *report)
{
    static const char *const names[][2] = {{"kernel", "kernel"},
                                           {"BLAS core", "blas_core"},
                                           {"learning", "learning"},
                                           {"result hash", "result_hash"},
                                           {"error", "error"}};
    const json_t *run = report_get(report, "run");
    const json_t *missing = report_get(report, "coverage.not_measured");
    if (report_is_fleet(report)) {
        report_put(p, "</body>\n</html>\n");
        return;
    }
    report_put(p, "<h2>Run</h2>\n<table class=\"f\">\n");
    put_figure_row(p, run, "seed", "seed", REPORT_COUNT);
    put_figure_row(p, run, "nodes", "nodes", REPORT_COUNT);
    put_figure_row(p, run, "threads", "threads", REPORT_COUNT);
    put_figure_row(p, run, "wall seconds", "wall_s", REPORT_PLAIN);
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        const char *text = report_string(run, names[i][1]);
        if (text == NULL)
            continue;
        report_put(p, "<tr><td>%s</td><td class=\"n\"><code>", names[i][0]);
        report_put_escaped(p, text);
        report_put(p, "</code></td></tr>\n");
    }
    report_put(p, "</table>\n");
    for (size_t i = 0; i < json_array_size(missing); i++) {
        report_put(p, i == 0 ? "<p class=\"muted\">Not measured: <code>" : ", <code>");
        report_put_escaped(p, json_string_value(json_array_get(missing, i)));
        report_put(p, "</code>");
    }
    report_put(p, json_array_size(missing) ? ".</p>\n</body>\n</html>\n" : "</body>\n</html>\n");
}

static void put_decisions(report_page *p, const json_t *report)
{
    const json_t *rows = report_get(report, "decisions.rows");
    char when[REPORT_NUMBER_BYTES];
    if (json_array_size(rows) == 0)
        return;
    report_put(p, "<h2>Decisions</h2>\n<div class=\"wide\"><table><tr><th>when (UTC)</th>"
                  "<th>what the aggregator's log says, newest first</th></tr>\n");
    for (size_t i = json_array_size(rows); i-- > 0;) {
        const json_t *row = json_array_get(rows, i);
        report_put(p, "<tr>");
        put_cell_text(p, NULL, report_time(report_number(row, "at_ms"), when));
        put_cell_text(p, NULL, report_string(row, "text"));
        report_put(p, "</tr>\n");
    }
    report_put(p, "</table></div>\n");
    put_left_out(p, report_get(report, "decisions"), "decisions");
}

sh_status sh_report_html(const json_t *report, sh_buf *out)
{
    report_page page = {out, SH_OK};
    put_head(&page, report);
    put_checks(&page, report);
    put_coverage(&page, report);
    put_quality(&page, report);
    put_drift(&page, report);
    put_releases(&page, report);
    put_sync(&page, report);
    put_faults(&page, report);
    put_decisions(&page, report);
    put_foot(&page, report);
    return page.status;
}
