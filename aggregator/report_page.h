/*
 * What the report's renderers share: looking into a document that may lack anything, and writing
 * text that is escaped. Internal to aggregator/report*.c.
 */
#ifndef SH_AGGREGATOR_REPORT_PAGE_H
#define SH_AGGREGATOR_REPORT_PAGE_H

#include "aggregator/report.h"

/* Rows of a table or plot beyond these are left out, and the report says how many. */
#define REPORT_RELEASES_MAX  60
#define REPORT_NODES_MAX     64
#define REPORT_RANKED_MAX    32
#define REPORT_CHECKS_MAX    64
#define REPORT_FAULTS_MAX    64
#define REPORT_DECISIONS_MAX 40
#define REPORT_METRICS_MAX   8
#define REPORT_BINS_MAX      32 /* of a histogram */
#define REPORT_POINTS_MAX    400
#define REPORT_NAME_BYTES    160 /* a name is cut here, at a character */

/* "heldout_nll.base": a member of a member; NULL when any is absent. */
const json_t *report_get(const json_t *object, const char *path);
double report_number(const json_t *object, const char *path);      /* NAN: absent or no number */
const char *report_string(const json_t *object, const char *path); /* NULL: absent */

/* A number as a reader wants it, "not measured" for NAN. */
#define REPORT_NUMBER_BYTES 48
typedef enum {
    REPORT_PLAIN, /* 3.142: three decimals */
    REPORT_COUNT, /* 12345 */
    REPORT_SHARE, /* 61.8 % */
    REPORT_BYTES, /* 2.6 MB */
} report_form;
const char *report_format(double x, report_form form, char out[REPORT_NUMBER_BYTES]);

/* Milliseconds since 1970 as "2026-11-22 03:04" UTC; "–" for NAN. */
const char *report_time(double at_ms, char out[REPORT_NUMBER_BYTES]);

/* A report is of a run that is over (a simulated or real fleet's summary) or of a fleet that goes
 * on (an aggregator's store alone). */
bool report_is_fleet(const json_t *report);

/* The figures of a section, for text and HTML alike. Those of a run are left out of a fleet's
 * report; those of a fleet are left out where they were not measured. */
typedef struct {
    const char *label, *path;
    report_form form;
    enum { REPORT_ALWAYS, REPORT_RUN, REPORT_FLEET } where;
} report_figure;
extern const report_figure report_coverage_figures[], report_quality_figures[],
    report_sync_figures[]; /* end in a NULL label */
bool report_shows(const json_t *report, const report_figure *figure);

/* A buffer whose first error sticks. */
typedef struct {
    sh_buf *out;
    sh_status status;
} report_page;

void report_put(report_page *page, const char *format, ...) __attribute__((format(printf, 2, 3)));
void report_put_raw(report_page *page, const char *markup); /* of any length */
/* A name from the summary: cut to REPORT_NAME_BYTES, without control characters and characters
 * that turn the direction of text; with &, <, >, " and ' escaped. NULL: "–". _plain does not
 * escape, and fills up to `width` characters with spaces, at least one unless width is 0. */
void report_put_escaped(report_page *page, const char *text);
void report_put_plain(report_page *page, const char *text, size_t width);

#endif
