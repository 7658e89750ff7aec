/* The report's plots, as SVG that needs nothing else: no scripts, no fonts, no links. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/report_page.h"

#define WIDTH        760.0
#define LEFT         64.0
#define RIGHT        150.0 /* room for the names of lines */
#define TICKS_MAX    12
#define LINES_MAX    4
#define LABEL_APART  15.0
#define CELL_WIDTH   84.0
#define CELL_HEIGHT  20.0
#define COLUMNS_MAX  7
#define VALUE_MAX    1e12 /* what is larger sets no scale; it is drawn at the edge */
#define EVIDENCE_TOP 20.0 /* a cell is at least this far from full colour: e^20 against chance */

const char *const sh_plot_style =
    ".sp{font:12px system-ui,-apple-system,\"Segoe UI\",sans-serif;max-width:100%;height:auto}"
    ".sp text{fill:#1c2430}.sp .m{fill:#5d6878}.sp .g{stroke:#e3e7ec;fill:none}"
    ".sp .x{stroke:#8a94a3;fill:none}"
    ".sp .l{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    ".sp .a{stroke:#1f6feb}.sp .b{stroke:#b45309}.sp .c{stroke:#15803d}.sp .d{stroke:#7c3aed}"
    ".sp .fa{fill:#1f6feb}.sp .fb{fill:#b45309}.sp .fc{fill:#15803d}.sp .fd{fill:#7c3aed}"
    ".sp .bad{stroke:#c0291b;fill:none;stroke-width:2}.sp text.tb{fill:#c0291b}"
    ".sp .dash{stroke-dasharray:5 4;fill:none;stroke-width:1.5}.sp .paper{fill:#fff}"
    ".sp .o{paint-order:stroke;stroke:#fff;stroke-width:4px;stroke-linejoin:round}"
    ".sp .ring{stroke:#fff;stroke-width:2}.sp .h{fill:#f59e0b}"
    "@media(prefers-color-scheme:dark){"
    ".sp text{fill:#e6eaf0}.sp .m{fill:#9aa6b6}.sp .g{stroke:#2b333e}.sp .x{stroke:#6b7686}"
    ".sp .a{stroke:#6ea8fe}.sp .b{stroke:#f0a35e}.sp .c{stroke:#5fd38a}.sp .d{stroke:#b79bff}"
    ".sp .fa{fill:#6ea8fe}.sp .fb{fill:#f0a35e}.sp .fc{fill:#5fd38a}.sp .fd{fill:#b79bff}"
    ".sp .bad{stroke:#ff8577}.sp text.tb{fill:#ff8577}.sp .paper{fill:#14181e}"
    ".sp .ring,.sp .o{stroke:#14181e}.sp .h{fill:#b45309}}";

typedef struct {
    double low, high;  /* of the data */
    double begin, end; /* in the drawing; begin > end for y */
} axis;

const char *sh_plot_name(sh_plot plot)
{
    static const char *const names[SH_PLOTS] = {"loss", "acceptance", "drift", "histograms"};
    return (unsigned)plot < SH_PLOTS ? names[plot] : "?";
}

static double place(const axis *a, double x)
{
    double at = (x - a->low) / (a->high - a->low);
    return a->begin + fmin(fmax(at, 0), 1) * (a->end - a->begin);
}

/* Opens the range so that it is not empty and has a little air. */
static void open_range(axis *a, double air)
{
    if (!(a->low <= a->high)) {
        a->low = 0;
        a->high = 1;
    }
    double range = a->high - a->low;
    if (range <= 0)
        range = fmax(fabs(a->high), 1) * 0.1;
    a->low -= air * range;
    a->high += air * range;
}

static void include(axis *a, double x)
{
    if (isfinite(x) && fabs(x) <= VALUE_MAX) {
        a->low = fmin(a->low, x);
        a->high = fmax(a->high, x);
    }
}

/* 1, 2 or 5 times a power of ten, so that about `wanted` ticks fit. */
static double tick_step(const axis *a, double wanted)
{
    double raw = (a->high - a->low) / wanted, power = pow(10, floor(log10(raw)));
    double digit = raw / power;
    return (digit <= 1 ? 1 : digit <= 2 ? 2 : digit <= 5 ? 5 : 10) * power;
}

static void put_begin(report_page *p, double height, bool standalone, const char *title)
{
    if (standalone)
        report_put(p, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    report_put(p,
               "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"sp\" role=\"img\" width=\"%.0f\" "
               "height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\"><title>%s</title>",
               WIDTH, height, WIDTH, height, title);
    if (standalone) {
        report_put(p, "<style>");
        report_put_raw(p, sh_plot_style);
        report_put(p, "</style><rect class=\"paper\" width=\"100%%\" height=\"100%%\"/>");
    }
    report_put(p, "\n");
}

static void put_end(report_page *p)
{
    report_put(p, "</svg>\n");
}

static void put_line(report_page *p, const char *class, const double xy[4])
{
    report_put(p, "<line class=\"%s\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>", class,
               xy[0], xy[1], xy[2], xy[3]);
}

static void put_label(report_page *p, const char *class, const char *anchor, double x, double y,
                      const char *text)
{
    report_put(p, "<text class=\"%s\" text-anchor=\"%s\" x=\"%.1f\" y=\"%.1f\">", class, anchor, x,
               y);
    report_put_escaped(p, text);
    report_put(p, "</text>");
}

static void put_y_axis(report_page *p, const axis *y, double right, double wanted, bool share)
{
    double step = tick_step(y, wanted), first = ceil(y->low / step);
    for (int k = 0; k < TICKS_MAX && (first + k) * step <= y->high + 1e-9 * step; k++) {
        double value = (first + k) * step, at = place(y, value);
        char text[REPORT_NUMBER_BYTES];
        int digits = step >= 1 ? 0 : (int)ceil(-log10(step) - 1e-9);
        if (share)
            snprintf(text, sizeof(text), "%.*f %%", SH_MAX(digits - 2, 0), 100 * value);
        else
            snprintf(text, sizeof(text), "%.*f", SH_MIN(digits, 6), value + 0.0);
        put_line(p, "g", (double[]){LEFT, at, right, at});
        put_label(p, "m", "end", LEFT - 8, at + 4, text);
    }
    report_put(p, "\n");
}

static void put_nothing(report_page *p, double height, const char *what)
{
    put_label(p, "m", "middle", WIDTH / 2, height / 2, what);
}

/* ---- loss: the gate's loss of each candidate, and the held-out losses as lines ---- */

typedef struct {
    const char *name, *class, *text_class;
    double value, label_y;
} reference_line;

static int by_label_y(const void *a, const void *b)
{
    double x = ((const reference_line *)a)->label_y, y = ((const reference_line *)b)->label_y;
    return (x > y) - (x < y);
}

static size_t reference_lines(const json_t *report, reference_line out[LINES_MAX])
{
    static const struct {
        const char *path, *name, *class, *text_class;
    } all[LINES_MAX] = {
        {"quality.heldout_nll.base", "base", "x dash", "m"},
        {"quality.heldout_nll.local_only", "local only", "d dash", "fd"},
        {"quality.heldout_nll.central_lora", "central LoRA", "c dash", "fc"},
        {"quality.heldout_nll.final", "final", "a dash", "fa"},
    };
    size_t n = 0;
    for (size_t i = 0; i < LINES_MAX; i++) {
        double value = report_number(report, all[i].path);
        if (isfinite(value))
            out[n++] = (reference_line){all[i].name, all[i].class, all[i].text_class, value, 0};
    }
    return n;
}

static void put_reference_lines(report_page *p, reference_line *lines, size_t n, const axis *x,
                                const axis *y)
{
    for (size_t i = 0; i < n; i++)
        lines[i].label_y = place(y, lines[i].value) + 4;
    qsort(lines, n, sizeof(*lines), by_label_y);
    for (size_t i = 1; i < n; i++)
        lines[i].label_y = fmax(lines[i].label_y, lines[i - 1].label_y + LABEL_APART);
    for (size_t i = 0; i < n; i++) {
        char text[80];
        double at = place(y, lines[i].value);
        snprintf(text, sizeof(text), "%s %.3f", lines[i].name, lines[i].value);
        put_line(p, lines[i].class, (double[]){x->begin, at, x->end, at});
        put_label(p, lines[i].text_class, "start", x->end + 10, lines[i].label_y, text);
    }
    report_put(p, "\n");
}

static bool is_published(const json_t *row)
{
    return !isnan(report_number(row, "version"));
}

static void put_candidate(report_page *p, const json_t *row, double at, const axis *y)
{
    double loss = report_number(row, "loss_candidate");
    char text[REPORT_NUMBER_BYTES];
    if (isnan(loss))
        return;
    double to = place(y, loss);
    if (is_published(row)) {
        report_put(p, "<circle class=\"fa ring\" cx=\"%.1f\" cy=\"%.1f\" r=\"5\"/>", at, to);
        snprintf(text, sizeof(text), "%.3f", loss);
        put_label(p, "o", "middle", at, to - 11, text);
        return;
    }
    report_put(p, "<path class=\"bad\" d=\"M%.1f %.1fl9 9m0 -9l-9 9\"/>", at - 4.5, to - 4.5);
    snprintf(text, sizeof(text), loss > y->high ? "%.3g ↑" : "%.3f", loss);
    put_label(p, "tb o", "middle", at, to + 20, text);
}

static void put_candidates(report_page *p, const json_t *rows, const axis *x, const axis *y)
{
    size_t n = json_array_size(rows), step = n / 16 + 1;
    double base = report_number(json_array_get(rows, 0), "loss_parent");
    report_put(p, "<path class=\"l a\" d=\"");
    bool drawing = false;
    if (!isnan(base)) {
        report_put(p, "M%.1f %.1f", place(x, 0), place(y, base));
        drawing = true;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        double loss = report_number(row, "loss_candidate");
        if (!is_published(row) || isnan(loss))
            continue;
        report_put(p, "%c%.1f %.1f", drawing ? 'L' : 'M', place(x, (double)i + 1), place(y, loss));
        drawing = true;
    }
    report_put(p, "\"/>\n");
    if (!isnan(base)) {
        report_put(p, "<circle class=\"fa ring\" cx=\"%.1f\" cy=\"%.1f\" r=\"5\"/>", place(x, 0),
                   place(y, base));
        put_label(p, "m", "middle", place(x, 0), y->begin + 18, "base");
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        char text[REPORT_NUMBER_BYTES] = "refused";
        double at = place(x, (double)i + 1);
        put_candidate(p, row, at, y);
        if (is_published(row))
            snprintf(text, sizeof(text), "v%.0f", report_number(row, "version"));
        if (i % step == 0)
            put_label(p, is_published(row) ? "" : "tb", "middle", at, y->begin + 18, text);
    }
    report_put(p, "\n");
}

static void put_loss(report_page *p, const json_t *report, bool standalone)
{
    const double height = 330;
    const json_t *rows = report_get(report, "releases.rows");
    size_t n = json_array_size(rows);
    reference_line lines[LINES_MAX];
    size_t n_lines = reference_lines(report, lines);
    put_begin(p, height, standalone, "Loss of each release");
    put_label(p, "m", "start", LEFT - 8, 20,
              "nats a token: ● gate, on the quantized bytes; "
              "- - held-out text");
    axis y = {INFINITY, -INFINITY, height - 40, 40};
    axis x = {-0.4, (double)n + 0.4, LEFT, WIDTH - RIGHT};
    for (size_t i = 0; i < n_lines; i++)
        include(&y, lines[i].value);
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        include(&y, report_number(row, "loss_parent"));
        if (is_published(row)) /* a refused one may be anywhere: it is drawn at the edge */
            include(&y, report_number(row, "loss_candidate"));
    }
    if (!(y.low <= y.high)) {
        put_nothing(p, height, "no loss was measured");
    } else {
        open_range(&y, 0.12);
        put_y_axis(p, &y, x.end, 6, false);
        put_reference_lines(p, lines, n_lines, &x, &y);
        put_candidates(p, rows, &x, &y);
        put_line(p, "x", (double[]){x.begin, y.begin, x.end, y.begin});
    }
    put_end(p);
}

/* ---- acceptance: three strips over the windows ---- */

typedef struct {
    const char *key, *title, *class, *text_class;
    bool share, from_zero;
} strip;

/* Where a point of the timeline stands: its window's number, in a fleet's report its time. */
static double point_at(const json_t *point)
{
    double window = report_number(point, "window");
    return isnan(window) ? report_number(point, "at_ms") : window;
}

static void put_strip(report_page *p, const json_t *timeline, const strip *s, const axis *x,
                      double top)
{
    axis y = {INFINITY, -INFINITY, top + 108, top + 22};
    size_t n = json_array_size(timeline);
    double last_x = 0, last_y = 0, last = NAN;
    for (size_t i = 0; i < n; i++)
        include(&y, report_number(json_array_get(timeline, i), s->key));
    put_label(p, "", "start", LEFT - 8, top + 12, s->title);
    if (!(y.low <= y.high)) {
        put_label(p, "m", "middle", (x->begin + x->end) / 2, top + 65, "not measured");
        return;
    }
    if (s->from_zero)
        include(&y, 0);
    open_range(&y, 0.08);
    if (s->from_zero)
        y.low = 0;
    put_y_axis(p, &y, x->end, 4, s->share);
    report_put(p, "<path class=\"l %s\" d=\"", s->class);
    for (size_t i = 0, drawn = 0; i < n; i++) {
        const json_t *point = json_array_get(timeline, i);
        double at = point_at(point), value = report_number(point, s->key);
        if (!isfinite(at) || !isfinite(value))
            continue;
        last_x = place(x, at);
        last_y = place(&y, value);
        last = value;
        report_put(p, "%c%.1f %.1f", drawn++ ? 'L' : 'M', last_x, last_y);
    }
    report_put(p, "\"/>\n");
    if (!isnan(last)) {
        char text[REPORT_NUMBER_BYTES];
        report_put(p, "<circle class=\"%s ring\" cx=\"%.1f\" cy=\"%.1f\" r=\"4\"/>", s->text_class,
                   last_x, last_y);
        report_format(last,
                      s->share       ? REPORT_SHARE
                      : s->from_zero ? REPORT_COUNT
                                     : REPORT_PLAIN,
                      text);
        put_label(p, s->text_class, "start", x->end + 10, last_y + 4, text);
    }
}

static void put_x_label(report_page *p, bool is_time, const char *anchor, double value, double x,
                        double y)
{
    char text[REPORT_NUMBER_BYTES + 16], time[REPORT_NUMBER_BYTES];
    if (is_time)
        snprintf(text, sizeof(text), "%s", report_time(value, time));
    else
        snprintf(text, sizeof(text), "window %.0f", value);
    put_label(p, "m", anchor, x, y, text);
}

static void put_acceptance(report_page *p, const json_t *report, bool standalone)
{
    const bool fleet = report_is_fleet(report);
    const strip strips[] = {
        {"acceptance", "accepted completions", "c", "fc", true, true},
        {"nll", "prompt loss, nats a token", "a", "fa", false, false},
        {fleet ? "alarms" : "nodes_alarmed", fleet ? "alarms" : "nodes in alarm so far", "b", "fb",
         false, true},
    };
    const double strip_height = 132, height = SH_COUNT(strips) * strip_height + 34;
    const json_t *timeline = report_get(report, "quality.timeline");
    axis x = {INFINITY, -INFINITY, LEFT, WIDTH - RIGHT};
    put_begin(p, height, standalone, "Acceptance, prompt loss and alarms over the windows");
    for (size_t i = 0; i < json_array_size(timeline); i++)
        include(&x, point_at(json_array_get(timeline, i)));
    if (!(x.low <= x.high)) {
        put_nothing(p, height, "no timeline was measured");
        put_end(p);
        return;
    }
    double first = x.low, last = x.high, bottom = height - 34;
    open_range(&x, 0);
    for (size_t i = 0; i < SH_COUNT(strips); i++)
        put_strip(p, timeline, &strips[i], &x, (double)i * strip_height);
    double change = report_number(report, "quality.change_window") + 0.5;
    if (change >= first && change <= last + 0.5) {
        double at = place(&x, change);
        for (size_t i = 0; i < SH_COUNT(strips); i++) {
            double top = (double)i * strip_height;
            put_line(p, "bad dash", (double[]){at, top + 22, at, top + 108});
        }
        put_label(p, "tb", "middle", at, bottom - 8, "the text changes");
    }
    put_x_label(p, fleet, "start", first, x.begin, height - 14);
    put_x_label(p, fleet, "end", last, x.end, height - 14);
    put_end(p);
}

/* ---- drift: node by metric ---- */

static void put_cell(report_page *p, const json_t *value, double x, double y, double top)
{
    char text[REPORT_NUMBER_BYTES] = "–";
    double evidence = json_is_number(value) ? json_number_value(value) : NAN;
    double shade = isnan(evidence) ? 0 : fmin(fmax(evidence / top, 0), 1);
    report_put(p,
               "<rect class=\"g\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>"
               "<rect class=\"h\" fill-opacity=\"%.2f\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" "
               "height=\"%.1f\"/>",
               x, y, CELL_WIDTH, CELL_HEIGHT, 0.9 * shade, x + 1, y + 1, CELL_WIDTH - 2,
               CELL_HEIGHT - 2);
    if (evidence == 0)
        snprintf(text, sizeof(text), "·");
    else if (!isnan(evidence))
        snprintf(text, sizeof(text), fabs(evidence) < 1e6 ? "%.1f" : "%.2g", evidence);
    put_label(p, shade > 0 ? "" : "m", "middle", x + CELL_WIDTH / 2, y + 14, text);
}

static void put_drift(report_page *p, const json_t *report, bool standalone)
{
    const double left = 190, head = 52;
    const json_t *map = report_get(report, "heatmap");
    const json_t *nodes = report_get(map, "nodes"), *metrics = report_get(map, "metrics");
    const json_t *values = report_get(map, "values");
    size_t rows = SH_MIN(json_array_size(nodes), (size_t)REPORT_NODES_MAX);
    size_t columns = SH_MIN(json_array_size(metrics), (size_t)COLUMNS_MAX);
    double height = rows ? head + (double)rows * CELL_HEIGHT + 16 : 120, top = EVIDENCE_TOP;
    put_begin(p, height, standalone, "Evidence of drift, node by metric");
    if (rows == 0) {
        put_nothing(p, height, "no evidence was measured");
        put_end(p);
        return;
    }
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < columns; k++) {
            const json_t *value = json_array_get(json_array_get(values, i), k);
            if (json_is_number(value))
                top = fmax(top, json_number_value(value));
        }
    put_label(p, "m", "start", 8, 18, "log e-value at the strongest alarm; ·: none");
    for (size_t k = 0; k < columns; k++)
        put_label(p, "m", "middle", left + ((double)k + 0.5) * CELL_WIDTH, head - 10,
                  json_string_value(json_array_get(metrics, k)));
    for (size_t i = 0; i < rows; i++) {
        double y = head + (double)i * CELL_HEIGHT;
        /* A nested svg clips a long name at its own edge. */
        report_put(p, "<svg x=\"0\" y=\"%.1f\" width=\"%.0f\" height=\"%.0f\">", y, left - 10,
                   CELL_HEIGHT);
        put_label(p, "", "start", 8, 14, json_string_value(json_array_get(nodes, i)));
        report_put(p, "</svg>");
        for (size_t k = 0; k < columns; k++)
            put_cell(p, json_array_get(json_array_get(values, i), k), left + (double)k * CELL_WIDTH,
                     y, top);
        report_put(p, "\n");
    }
    put_end(p);
}

/* ---- histograms: what was and what is, a panel a metric ---- */

#define PANEL_WIDTH  236.0
#define PANEL_HEIGHT 150.0
#define PANEL_APART  16.0
#define PANELS_A_ROW 3

/* Shares of the samples; false when there are none. */
static bool shares(const json_t *row, const char *key, double out[REPORT_BINS_MAX], size_t *n)
{
    const json_t *bins = report_get(row, key);
    double sum = 0;
    *n = SH_MIN(json_array_size(bins), (size_t)REPORT_BINS_MAX);
    for (size_t i = 0; i < *n; i++) {
        const json_t *value = json_array_get(bins, i);
        out[i] = json_is_number(value) ? fmax(json_number_value(value), 0) : 0;
        sum += out[i];
    }
    for (size_t i = 0; i < *n; i++)
        out[i] = fmin(out[i] / sum, 1);
    return sum > 0 && isfinite(sum);
}

static void put_bars(report_page *p, const double *share, size_t n, double top,
                     const double place[2])
{
    double width = PANEL_WIDTH / (double)n, height = PANEL_HEIGHT - 52;
    for (size_t i = 0; i < n; i++) {
        double tall = height * share[i] / top;
        report_put(p,
                   "<rect class=\"fa\" fill-opacity=\"0.55\" x=\"%.1f\" y=\"%.1f\" "
                   "width=\"%.1f\" height=\"%.1f\"/>",
                   place[0] + (double)i * width + 1, place[1] + 22 + height - tall,
                   fmax(width - 2, 1), tall);
    }
}

static void put_steps(report_page *p, const double *share, size_t n, double top,
                      const double place[2])
{
    double width = PANEL_WIDTH / (double)n, height = PANEL_HEIGHT - 52;
    report_put(p, "<path class=\"l b\" d=\"");
    for (size_t i = 0; i < n; i++) {
        double y = place[1] + 22 + height - height * share[i] / top;
        report_put(p, "%c%.1f %.1fH%.1f", i ? 'L' : 'M', place[0] + (double)i * width, y,
                   place[0] + (double)(i + 1) * width);
    }
    report_put(p, "\"/>\n");
}

static void put_panel(report_page *p, const json_t *row, double x, double y)
{
    double before[REPORT_BINS_MAX], now[REPORT_BINS_MAX], top = 0;
    size_t n = 0, m = 0;
    char text[2 * REPORT_NUMBER_BYTES], low[REPORT_NUMBER_BYTES], high[REPORT_NUMBER_BYTES];
    bool known = shares(row, "reference", before, &n);
    known = shares(row, "current", now, &m) && known;
    const double bottom = y + PANEL_HEIGHT - 30;
    put_label(p, "", "start", x, y + 14, report_string(row, "metric"));
    put_line(p, "x", (double[]){x, bottom, x + PANEL_WIDTH, bottom});
    if (!known || n != m) {
        put_label(p, "m", "middle", x + PANEL_WIDTH / 2, y + PANEL_HEIGHT / 2, "insufficient data");
        return;
    }
    for (size_t i = 0; i < n; i++)
        top = fmax(top, fmax(before[i], now[i]));
    put_bars(p, now, n, top, (double[]){x, y});
    put_steps(p, before, n, top, (double[]){x, y});
    put_label(p, "m", "start", x, bottom + 16,
              report_format(report_number(row, "low"), REPORT_PLAIN, low));
    snprintf(text, sizeof(text), "%s %s",
             report_format(report_number(row, "high"), REPORT_PLAIN, high),
             report_string(row, "unit") != NULL ? report_string(row, "unit") : "");
    put_label(p, "m", "end", x + PANEL_WIDTH, bottom + 16, text);
}

static void put_histograms(report_page *p, const json_t *report, bool standalone)
{
    const json_t *rows = report_get(report, "histograms");
    size_t n = SH_MIN(json_array_size(rows), (size_t)REPORT_METRICS_MAX);
    double height = 34 + ceil((double)n / PANELS_A_ROW) * (PANEL_HEIGHT + PANEL_APART);
    height = n ? height : 120;
    put_begin(p, height, standalone, "Reference and current distribution of each metric");
    if (n == 0)
        put_nothing(p, height, "no windows were read");
    else
        put_label(p, "m", "start", 8, 18,
                  "share of inferences: line, the first windows; bars, the newest");
    for (size_t i = 0; i < n; i++)
        put_panel(p, json_array_get(rows, i),
                  8 + (double)(i % PANELS_A_ROW) * (PANEL_WIDTH + PANEL_APART),
                  34 + floor((double)i / PANELS_A_ROW) * (PANEL_HEIGHT + PANEL_APART));
    put_end(p);
}

sh_status sh_report_plot(const json_t *report, sh_plot plot, bool standalone, sh_buf *out)
{
    static void (*const draw[SH_PLOTS])(report_page *, const json_t *, bool) = {
        put_loss, put_acceptance, put_drift, put_histograms};
    SH_ASSERT((unsigned)plot < SH_PLOTS);
    report_page page = {out, SH_OK};
    draw[plot](&page, report, standalone);
    return page.status;
}
