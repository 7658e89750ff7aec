#include "aggregator/report_page.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define LINE_BYTES 2048
#define PATH_STEP  48

const json_t *report_get(const json_t *object, const char *path)
{
    while (object != NULL) {
        char step[PATH_STEP];
        size_t n = strcspn(path, ".");
        SH_ASSERT(n < sizeof(step));
        memcpy(step, path, n);
        step[n] = '\0';
        object = json_object_get(object, step); /* NULL when object is no object */
        if (path[n] == '\0')
            break;
        path += n + 1;
    }
    return json_is_null(object) ? NULL : object;
}

double report_number(const json_t *object, const char *path)
{
    const json_t *value = report_get(object, path);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

const char *report_string(const json_t *object, const char *path)
{
    return json_string_value(report_get(object, path));
}

const char *report_format(double x, report_form form, char out[REPORT_NUMBER_BYTES])
{
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
    size_t unit = 0;
    if (isnan(x)) {
        snprintf(out, REPORT_NUMBER_BYTES, "not measured");
        return out;
    }
    switch (form) {
    case REPORT_PLAIN:
        snprintf(out, REPORT_NUMBER_BYTES, fabs(x) < 1e6 ? "%.3f" : "%.3g", x);
        break;
    case REPORT_COUNT:
        snprintf(out, REPORT_NUMBER_BYTES, fabs(x) < 1e15 ? "%.0f" : "%.3g", x);
        break;
    case REPORT_SHARE:
        snprintf(out, REPORT_NUMBER_BYTES, fabs(x) < 1e6 ? "%.1f %%" : "%.3g %%", 100 * x);
        break;
    case REPORT_BYTES:
        while (fabs(x) >= 1000 && unit + 1 < SH_COUNT(units)) {
            x /= 1000;
            unit++;
        }
        snprintf(out, REPORT_NUMBER_BYTES, unit == 0 ? "%.0f %s" : "%.2f %s", x, units[unit]);
        break;
    }
    return out;
}

static void put_bytes(report_page *page, const char *bytes, size_t n)
{
    if (page->status == SH_OK)
        page->status = sh_buf_append(page->out, bytes, n);
}

void report_put(report_page *page, const char *format, ...)
{
    char line[LINE_BYTES];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    SH_ASSERT(n >= 0 && (size_t)n < sizeof(line)); /* names never go through here */
    put_bytes(page, line, (size_t)n);
}

void report_put_raw(report_page *page, const char *markup)
{
    put_bytes(page, markup, strlen(markup));
}

/* Bytes of the UTF-8 character at text; jansson has checked that it is UTF-8. */
static size_t character_bytes(const char *text)
{
    unsigned char c = (unsigned char)*text;
    size_t n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    return SH_MIN(n, strlen(text));
}

/* C0 and C1 controls, DEL, and the marks that turn or isolate the direction of text. */
static bool is_unwanted(const char *text, size_t n)
{
    const unsigned char *c = (const unsigned char *)text;
    if (n == 1)
        return c[0] < 0x20 || c[0] == 0x7f;
    if (n == 2)
        return c[0] == 0xc2 && c[1] < 0xa0;
    if (n == 3 && c[0] == 0xe2)
        return (c[1] == 0x80 && ((c[2] >= 0xa8 && c[2] <= 0xae) || c[2] == 0x8e || c[2] == 0x8f)) ||
               (c[1] == 0x81 && c[2] >= 0xa6 && c[2] <= 0xa9);
    return false;
}

static const char *entity(char c)
{
    switch (c) {
    case '&':
        return "&amp;";
    case '<':
        return "&lt;";
    case '>':
        return "&gt;";
    case '"':
        return "&quot;";
    case '\'':
        return "&#39;";
    default:
        return NULL;
    }
}

static size_t put_name(report_page *page, const char *text, bool escape)
{
    size_t used = 0, characters = 0;
    if (text == NULL)
        text = "–";
    while (*text != '\0') {
        size_t n = character_bytes(text);
        const char *as = escape ? entity(*text) : NULL;
        if (used + n > REPORT_NAME_BYTES) {
            put_bytes(page, "…", strlen("…"));
            return characters + 1;
        }
        if (is_unwanted(text, n))
            put_bytes(page, "?", 1);
        else if (as != NULL)
            put_bytes(page, as, strlen(as));
        else
            put_bytes(page, text, n);
        used += n;
        text += n;
        characters++;
    }
    return characters;
}

void report_put_escaped(report_page *page, const char *text)
{
    (void)put_name(page, text, true);
}

void report_put_plain(report_page *page, const char *text, size_t width)
{
    size_t n = put_name(page, text, false);
    for (size_t least = width > 0 ? n + 1 : n; n < SH_MAX(width, least); n++)
        put_bytes(page, " ", 1);
}

const char *report_time(double at_ms, char out[REPORT_NUMBER_BYTES])
{
    struct tm tm;
    time_t at = at_ms >= 0 && at_ms < 1e15 ? (time_t)(at_ms / 1000) : -1;
    if (at < 0 || gmtime_r(&at, &tm) == NULL ||
        strftime(out, REPORT_NUMBER_BYTES, "%Y-%m-%d %H:%M", &tm) == 0)
        snprintf(out, REPORT_NUMBER_BYTES, "–");
    return out;
}

bool report_is_fleet(const json_t *report)
{
    return json_is_object(report_get(report, "fleet")) && isnan(report_number(report, "run.seed"));
}

const report_figure report_coverage_figures[] = {
    {"nodes enrolled", "coverage.enrolled", REPORT_COUNT, REPORT_FLEET},
    {"nodes reporting", "coverage.nodes_reporting", REPORT_COUNT, REPORT_ALWAYS},
    {"nodes stale (no check-in)", "coverage.stale", REPORT_COUNT, REPORT_FLEET},
    {"nodes never seen", "coverage.never_seen", REPORT_COUNT, REPORT_FLEET},
    {"nodes with insufficient data", "coverage.insufficient", REPORT_COUNT, REPORT_FLEET},
    {"nodes revoked", "coverage.revoked", REPORT_COUNT, REPORT_FLEET},
    {"nodes in alarm", "coverage.nodes_alarmed", REPORT_COUNT, REPORT_ALWAYS},
    {"nodes that report drift now", "fleet.drifting_now", REPORT_COUNT, REPORT_FLEET},
    {"nodes that took the last release", "coverage.took_last_release", REPORT_COUNT, REPORT_ALWAYS},
    {"updates dropped on nodes", "coverage.dropped.updates", REPORT_COUNT, REPORT_FLEET},
    {"alarms dropped on nodes", "coverage.dropped.alarms", REPORT_COUNT, REPORT_FLEET},
    {"windows dropped on nodes", "coverage.dropped.windows", REPORT_COUNT, REPORT_FLEET},
    {NULL, NULL, REPORT_PLAIN, REPORT_ALWAYS},
};

const report_figure report_quality_figures[] = {
    {"held-out loss, base", "quality.heldout_nll.base", REPORT_PLAIN, REPORT_RUN},
    {"held-out loss, final release", "quality.heldout_nll.final", REPORT_PLAIN, REPORT_RUN},
    {"held-out loss, central LoRA", "quality.heldout_nll.central_lora", REPORT_PLAIN, REPORT_RUN},
    {"held-out loss, local only (mean)", "quality.heldout_nll.local_only", REPORT_PLAIN,
     REPORT_RUN},
    {"share of the central gain", "quality.gain_share", REPORT_SHARE, REPORT_RUN},
    {"acceptance before the change", "quality.acceptance.before", REPORT_SHARE, REPORT_RUN},
    {"acceptance after it, with the base", "quality.acceptance.after_base", REPORT_SHARE,
     REPORT_RUN},
    {"acceptance at the end", "quality.acceptance.end", REPORT_SHARE, REPORT_RUN},
    {"inferences", "fleet.inferences", REPORT_COUNT, REPORT_FLEET},
    {"windows kept", "fleet.windows", REPORT_COUNT, REPORT_FLEET},
    {"loss of typed text, first windows", "fleet.nll_reference", REPORT_PLAIN, REPORT_FLEET},
    {"loss of typed text, newest windows", "fleet.nll_now", REPORT_PLAIN, REPORT_FLEET},
    {"accepted, first windows", "fleet.acceptance_reference", REPORT_SHARE, REPORT_FLEET},
    {"accepted, newest windows", "fleet.acceptance_now", REPORT_SHARE, REPORT_FLEET},
    {NULL, NULL, REPORT_PLAIN, REPORT_ALWAYS},
};

const report_figure report_sync_figures[] = {
    {"updates made", "sync.updates.made", REPORT_COUNT, REPORT_RUN},
    {"updates acknowledged", "sync.updates.acknowledged", REPORT_COUNT, REPORT_RUN},
    {"updates received", "sync.updates.received", REPORT_COUNT, REPORT_FLEET},
    {"updates merged", "sync.updates.merged", REPORT_COUNT, REPORT_ALWAYS},
    {"updates pending", "sync.updates.pending", REPORT_COUNT, REPORT_ALWAYS},
    {"lost (audit)", "sync.updates.lost", REPORT_COUNT, REPORT_RUN},
    {"counted twice (audit)", "sync.updates.twice", REPORT_COUNT, REPORT_RUN},
    {"up, an update", "sync.bytes.up_per_update", REPORT_BYTES, REPORT_RUN},
    {"down, a release and node", "sync.bytes.down_per_release_node", REPORT_BYTES, REPORT_RUN},
    {"the full model", "sync.bytes.full_model", REPORT_BYTES, REPORT_RUN},
    {NULL, NULL, REPORT_PLAIN, REPORT_ALWAYS},
};

bool report_shows(const json_t *report, const report_figure *figure)
{
    if (figure->where == REPORT_RUN)
        return !report_is_fleet(report);
    return figure->where == REPORT_ALWAYS || !isnan(report_number(report, figure->path));
}
