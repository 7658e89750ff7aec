/*
 * The drift report: one JSON document made from a run's summary (docs/summary.md) or from what an
 * aggregator's store says about its fleet (survey.h), and its text, HTML and plots, which are drawn
 * from that document alone.
 *
 * Invariants: whatever the summary lacks is "not measured" in the report, never 0; names from the
 * summary are escaped in HTML and SVG and lose control characters in text, because node names are
 * other people's. The HTML file is self-contained, works without scripts and is at most
 * SH_REPORT_HTML_MAX bytes: long tables are cut and say so.
 * Threads: none held; plain functions. Ownership: the caller's buffers and json_t references.
 *
 *     json_t *summary = NULL, *report = NULL;
 *     SH_TRY(sh_json_load("out/summary.json", &summary, err));
 *     SH_TRY(sh_report_make(summary, &report, err));
 *     SH_TRY(sh_report_html(report, &page));
 */
#ifndef SH_AGGREGATOR_REPORT_H
#define SH_AGGREGATOR_REPORT_H

#include "shared/base/buf.h"
#include "shared/base/json.h"

#define SH_REPORT_HTML_MAX 500000
#define SH_REPORT_TEXT_MAX 500000
#define SH_REPORT_SVG_MAX  200000

/* *out is a new reference. SH_ERR_INVALID: the summary is no JSON object. */
SH_MUST_USE sh_status sh_report_make(const json_t *summary, json_t **out, sh_error *err);

/* Appends; SH_ERR_LIMIT past the buffer's maximum, SH_ERR_NO_MEMORY. */
SH_MUST_USE sh_status sh_report_text(const json_t *report, sh_buf *out);
SH_MUST_USE sh_status sh_report_html(const json_t *report, sh_buf *out);

typedef enum {
    SH_PLOT_LOSS,
    SH_PLOT_ACCEPTANCE,
    SH_PLOT_DRIFT,
    SH_PLOT_HISTOGRAMS,
    SH_PLOTS
} sh_plot;
const char *sh_plot_name(sh_plot plot); /* "loss": the file is plots/loss.svg */
/* One <svg>; standalone: with XML head and its own style, as a file; else to stand in a page that
 * has sh_plot_style in its style sheet. */
SH_MUST_USE sh_status sh_report_plot(const json_t *report, sh_plot plot, bool standalone,
                                     sh_buf *out);
extern const char *const sh_plot_style;

#endif
