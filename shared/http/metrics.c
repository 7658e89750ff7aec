#include "shared/http/metrics.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* A line is there whole or not at all. */
typedef struct {
    sh_buf *out;
    size_t start;
    bool failed;
} line;

static line line_begin(sh_buf *out)
{
    return (line){.out = out, .start = out->len};
}

static void put(line *l, const char *text, size_t n)
{
    l->failed = l->failed || sh_buf_append(l->out, text, n) != SH_OK;
}

static void put_text(line *l, const char *text)
{
    put(l, text, strlen(text));
}

static void put_escaped(line *l, const char *text, bool quotes)
{
    for (const char *c = text; *c; c++) {
        if (*c == '\n')
            put(l, "\\n", 2);
        else if (*c == '\\')
            put(l, "\\\\", 2);
        else if (*c == '"' && quotes)
            put(l, "\\\"", 2);
        else
            put(l, c, 1);
    }
}

/* The shorter of two forms that reads back as the same number. */
static void format_number(double x, char *out, size_t n)
{
    if (isnan(x)) {
        snprintf(out, n, "NaN");
        return;
    }
    if (isinf(x)) {
        snprintf(out, n, x > 0 ? "+Inf" : "-Inf");
        return;
    }
    snprintf(out, n, "%.15g", x);
    double back = 0;
    if (sscanf(out, "%lf", &back) != 1 || back != x)
        snprintf(out, n, "%.17g", x);
}

static void line_end(line *l)
{
    put_text(l, "\n");
    if (l->failed)
        l->out->len = l->start;
}

void sh_metric_family(sh_buf *out, const char *name, const char *type, const char *help)
{
    line l = line_begin(out);
    put_text(&l, "# HELP ");
    put_text(&l, name);
    put_text(&l, " ");
    put_escaped(&l, help, false);
    put_text(&l, "\n# TYPE ");
    put_text(&l, name);
    put_text(&l, " ");
    put_text(&l, type);
    line_end(&l);
}

static void sample(sh_buf *out, const char *name, const char *suffix, const sh_metric_label *labels,
                   size_t n_labels, double value)
{
    char number[40];
    line l = line_begin(out);
    put_text(&l, name);
    put_text(&l, suffix);
    for (size_t i = 0; i < n_labels; i++) {
        put_text(&l, i ? "," : "{");
        put_text(&l, labels[i].name);
        put_text(&l, "=\"");
        put_escaped(&l, labels[i].value, true);
        put_text(&l, i + 1 == n_labels ? "\"}" : "\"");
    }
    format_number(value, number, sizeof number);
    put_text(&l, " ");
    put_text(&l, number);
    line_end(&l);
}

void sh_metric_sample(sh_buf *out, const char *name, const sh_metric_label *labels, size_t n_labels,
                      double value)
{
    sample(out, name, "", labels, n_labels, value);
}

void sh_metric_one(sh_buf *out, const char *name, const char *type, const char *help, double value)
{
    sh_metric_family(out, name, type, help);
    sample(out, name, "", NULL, 0, value);
}

void sh_histogram_add(sh_histogram *histogram, double x)
{
    SH_ASSERT(histogram->n_bounds <= SH_HISTOGRAM_BUCKETS);
    if (isnan(x))
        return; /* it belongs to no bucket, and would spoil the sum for good */
    size_t i = 0;
    while (i < histogram->n_bounds && x > histogram->bounds[i])
        i++;
    histogram->counts[i]++;
    histogram->sum += x;
}

void sh_metric_histogram(sh_buf *out, const char *name, const char *help,
                         const sh_histogram *histogram)
{
    uint64_t count = 0;
    sh_metric_family(out, name, "histogram", help);
    for (size_t i = 0; i <= histogram->n_bounds; i++) {
        char bound[40] = "+Inf";
        count += histogram->counts[i];
        if (i < histogram->n_bounds)
            format_number(histogram->bounds[i], bound, sizeof bound);
        sample(out, name, "_bucket", &(sh_metric_label){"le", bound}, 1, (double)count);
    }
    sample(out, name, "_sum", NULL, 0, histogram->sum);
    sample(out, name, "_count", NULL, 0, (double)count);
}
