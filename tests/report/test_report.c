/* The report: its verdicts, its text, and that no summary can break the page. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "aggregator/report.h"
#include "shared/base/file.h"

#define SAMPLE      SHOAL_SOURCE_DIR "/tests/report/sample_summary.json"
#define SAMPLE_TEXT SHOAL_SOURCE_DIR "/tests/report/sample_report.txt"
#define TAGS_MAX    64

static json_t *sample(void)
{
    json_t *summary = NULL;
    sh_error err = {0};
    if (sh_json_load(SAMPLE, &summary, &err) != SH_OK)
        fail_msg("%s", err.text);
    return summary;
}

/* Draws everything; the buffers are the caller's, each ends in a 0 byte. */
typedef struct {
    sh_buf text, html, plots[SH_PLOTS];
} drawn;

static void draw(const json_t *summary, drawn *out)
{
    json_t *report = NULL;
    assert_int_equal(sh_report_make(summary, &report, NULL), SH_OK);
    sh_buf_init(&out->text, SH_REPORT_TEXT_MAX);
    sh_buf_init(&out->html, SH_REPORT_HTML_MAX);
    assert_int_equal(sh_report_text(report, &out->text), SH_OK);
    assert_int_equal(sh_report_html(report, &out->html), SH_OK);
    assert_int_equal(sh_buf_append(&out->text, "", 1), SH_OK);
    assert_int_equal(sh_buf_append(&out->html, "", 1), SH_OK);
    for (int i = 0; i < SH_PLOTS; i++) {
        sh_buf_init(&out->plots[i], SH_REPORT_SVG_MAX);
        assert_int_equal(sh_report_plot(report, (sh_plot)i, true, &out->plots[i]), SH_OK);
        assert_int_equal(sh_buf_append(&out->plots[i], "", 1), SH_OK);
    }
    json_decref(report);
}

static void release(drawn *d)
{
    sh_buf_release(&d->text);
    sh_buf_release(&d->html);
    for (int i = 0; i < SH_PLOTS; i++)
        sh_buf_release(&d->plots[i]);
}

static bool is_void(const char *name, size_t n)
{
    static const char *const names[] = {"meta", "br", "hr", "img", "link", "input"};
    for (size_t i = 0; i < SH_COUNT(names); i++)
        if (strlen(names[i]) == n && memcmp(names[i], name, n) == 0)
            return true;
    return false;
}

/* One tag from `<` on; pushes or pops it; returns where text goes on. Attribute values are quoted
 * and a `<` in one is a fault of ours. */
static const char *take_tag(const char *at, const char **open, size_t *depth)
{
    bool closing = at[1] == '/', quoted = false;
    const char *name = at + 1 + closing, *end = name;
    size_t n = strcspn(name, " \t\n/>");
    for (; *end != '\0' && (quoted || *end != '>'); end++) {
        if (*end == '<')
            fail_msg("a tag within a tag: %.60s", at);
        quoted ^= *end == '"';
    }
    if (*end == '\0' || n == 0)
        fail_msg("a tag without an end: %.60s", at);
    if (closing) {
        if (*depth == 0 || strncmp(open[*depth - 1], name, n) != 0)
            fail_msg("</%.*s> closes %.20s", (int)n, name, *depth ? open[*depth - 1] : "nothing");
        --*depth;
    } else if (end[-1] != '/' && !is_void(name, n) && *name != '!' && *name != '?') {
        assert_true(*depth < TAGS_MAX);
        open[(*depth)++] = name;
    }
    return end + 1;
}

static void assert_well_formed(const sh_buf *page)
{
    const char *open[TAGS_MAX], *at = (const char *)page->data;
    size_t depth = 0;
    while (*at != '\0') {
        if (*at == '<') {
            at = take_tag(at, open, &depth);
            continue;
        }
        if (*at == '&' && strncmp(at, "&amp;", 5) != 0 && strncmp(at, "&lt;", 4) != 0 &&
            strncmp(at, "&gt;", 4) != 0 && strncmp(at, "&quot;", 6) != 0 &&
            strncmp(at, "&#39;", 5) != 0)
            fail_msg("an unescaped &: %.40s", at);
        at++;
    }
    if (depth != 0)
        fail_msg("%zu tags are left open, the last is %.20s", depth, open[depth - 1]);
}

/* Nothing of the page may come from elsewhere or run. */
static void assert_self_contained(const sh_buf *page)
{
    static const char *const never[] = {"<script", "<img",      "<link",      "<iframe",
                                        "<object", "<img src=", "<a ",        "@import",
                                        "url(",    "https:",    "javascript:"};
    const char *text = (const char *)page->data, *at = text;
    for (size_t i = 0; i < SH_COUNT(never); i++)
        if (strstr(text, never[i]) != NULL)
            fail_msg("the page has '%.60s'", strstr(text, never[i]));
    while ((at = strstr(at, "http:")) != NULL) {
        const char *space = "http://www.w3.org/2000/svg\"";
        if (strncmp(at, space, strlen(space)) != 0)
            fail_msg("the page has '%.60s'", at);
        at++;
    }
    assert_null(strstr(text, "nan"));
    assert_null(strstr(text, "inf\""));
}

static void assert_good(const json_t *summary)
{
    drawn d;
    draw(summary, &d);
    assert_well_formed(&d.html);
    assert_self_contained(&d.html);
    assert_true(d.html.len <= SH_REPORT_HTML_MAX);
    for (int i = 0; i < SH_PLOTS; i++) {
        assert_well_formed(&d.plots[i]);
        assert_self_contained(&d.plots[i]);
    }
    for (size_t i = 0; i + 1 < d.text.len; i++)
        if (d.text.data[i] < 0x20 && d.text.data[i] != '\n')
            fail_msg("the text has control character %u", d.text.data[i]);
    release(&d);
}

static void text_is_the_golden_one(void **state)
{
    (void)state;
    json_t *summary = sample();
    drawn d;
    uint8_t *golden = NULL;
    size_t n = 0, line = 1;
    sh_error err = {0};
    draw(summary, &d);
    if (sh_file_read(SAMPLE_TEXT, SH_REPORT_TEXT_MAX, &golden, &n, &err) != SH_OK)
        fail_msg("%s", err.text);
    for (size_t i = 0; i <= n && i < d.text.len; i++) {
        if (golden[i] != d.text.data[i])
            fail_msg("line %zu differs: ours '%.50s', golden '%.50s'", line, d.text.data + i,
                     golden + i);
        line += golden[i] == '\n';
    }
    free(golden);
    release(&d);
    json_decref(summary);
}

static void hostile_names_are_text(void **state)
{
    (void)state;
    json_t *summary = sample(); /* has a topic with a script and a node with an image */
    drawn d;
    json_t *node = json_array_get(json_object_get(json_object_get(summary, "drift"), "nodes"), 0);
    json_object_set_new(node, "topic", json_string("\x1b[2J\xe2\x80\xae\xc2\x85 & 'quoted' </td>"));
    assert_good(summary);
    draw(summary, &d);
    const char *html = (const char *)d.html.data, *text = (const char *)d.text.data;
    assert_non_null(strstr(html, "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; co"));
    assert_non_null(strstr(html, "node &quot;&#39;&gt;&lt;img src=x onerror=alert(1)&gt;"));
    assert_non_null(strstr(html, "?[2J?? &amp; &#39;quoted&#39; &lt;/td&gt;"));
    assert_non_null(strstr(text, "?[2J?? & 'quoted' </td>"));
    release(&d);
    json_decref(summary);
}

/* Replaces every member in turn by what should not stand there. */
static void break_each(json_t *root, json_t *at, unsigned *count)
{
    static const char *const wrong[] = {"null", "-1e308",        "1e308", "\"<b>\"",
                                        "[[]]", "{\"rows\": 3}", "true",  "9007199254740993"};
    const char *key;
    json_t *value, *keys = json_array(); /* the object changes under the loop */
    json_object_foreach(at, key, value) json_array_append_new(keys, json_string(key));
    for (size_t k = 0; k < json_array_size(keys); k++) {
        key = json_string_value(json_array_get(keys, k));
        json_t *kept = json_incref(json_object_get(at, key));
        for (size_t i = 0; i < SH_COUNT(wrong); i++) {
            json_object_set_new(at, key, json_loads(wrong[i], JSON_DECODE_ANY, NULL));
            assert_good(root);
            ++*count;
        }
        json_object_del(at, key);
        assert_good(root);
        json_object_set_new(at, key, kept);
    }
    json_decref(keys);
    json_object_foreach(at, key, value)
    {
        if (json_is_object(value))
            break_each(root, value, count);
        if (json_is_array(value) && json_is_object(json_array_get(value, 0)))
            break_each(root, json_array_get(value, 0), count);
    }
}

static void broken_members_break_nothing(void **state)
{
    (void)state;
    json_t *summary = sample();
    unsigned count = 0;
    break_each(summary, summary, &count);
    print_message("%u broken summaries\n", count);
    assert_true(count > 500);
    json_decref(summary);
}

static void an_empty_summary_is_not_measured(void **state)
{
    (void)state;
    json_t *summary = json_object(), *report = NULL, *list = json_array();
    drawn d;
    assert_good(summary);
    draw(summary, &d);
    assert_non_null(strstr((const char *)d.text.data, "not measured"));
    assert_null(strstr((const char *)d.text.data, "gain                                0"));
    release(&d);
    assert_int_equal(sh_report_make(summary, &report, NULL), SH_OK);
    json_t *verdict = json_object_get(report, "verdict");
    assert_string_equal(json_string_value(json_object_get(verdict, "state")), "incomplete");
    assert_int_equal(sh_report_make(list, &report, NULL), SH_ERR_INVALID);
    json_decref(report);
    json_decref(list);
    json_decref(summary);
}

static void assert_action(json_t *summary, const char *state, const char *action)
{
    json_t *report = NULL;
    assert_int_equal(sh_report_make(summary, &report, NULL), SH_OK);
    const json_t *v = json_object_get(report, "verdict");
    assert_string_equal(json_string_value(json_object_get(v, "state")), state);
    assert_string_equal(json_string_value(json_object_get(v, "action")), action);
    json_decref(report);
}

static void verdicts_follow_the_numbers(void **state)
{
    (void)state;
    json_t *s = sample(), *updates = json_object_get(s, "updates");
    json_t *nll = json_object_get(s, "heldout_nll");
    json_t *check = json_array_get(json_object_get(s, "checks"), 2);
    assert_action(s, "good", "promote");
    sh_json_set(check, "ok", json_false());
    assert_action(s, "attention", "hold");
    sh_json_set(nll, "final", json_real(6));
    assert_action(s, "failed", "roll back");
    sh_json_set(updates, "poisoned_merged", json_integer(1));
    assert_action(s, "failed", "roll back");
    sh_json_set(updates, "lost", json_integer(1));
    assert_action(s, "failed", "investigate");
    sh_json_set(s, "error", json_string("the disk is full"));
    assert_action(s, "incomplete", "hold");
    json_decref(s);
    s = sample();
    json_object_del(s, "heldout_nll");
    assert_action(s, "good", "promote");
    sh_json_set(s, "releases", json_array());
    assert_action(s, "drifted", "retrain");
    sh_json_set(s, "drift", json_object());
    assert_action(s, "quiet", "hold");
    json_decref(s);
}

static json_t *repeat(const json_t *row, size_t n)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < n; i++)
        json_array_append_new(rows, json_deep_copy(row));
    return rows;
}

static void a_huge_fleet_fits(void **state)
{
    (void)state;
    json_t *s = sample(), *drift = json_object_get(s, "drift"),
           *map = json_object_get(s, "heatmap");
    char name[2000];
    memset(name, '&', sizeof(name)); /* five bytes each when escaped */
    name[sizeof(name) - 1] = '\0';
    json_t *node = json_array_get(json_object_get(drift, "nodes"), 0);
    sh_json_set(node, "topic", json_string(name));
    sh_json_set(node, "node", json_string(name));
    sh_json_set(drift, "nodes", repeat(node, 20000));
    sh_json_set(drift, "timeline",
                repeat(json_array_get(json_object_get(drift, "timeline"), 0), 20000));
    sh_json_set(map, "values", repeat(json_array_get(json_object_get(map, "values"), 0), 20000));
    json_t *label = json_string(name);
    sh_json_set(map, "nodes", repeat(label, 20000));
    json_decref(label);
    static const char *const lists[] = {"releases", "checks", "faults"};
    for (size_t i = 0; i < SH_COUNT(lists); i++) {
        json_t *row = json_incref(json_array_get(json_object_get(s, lists[i]), 0));
        sh_json_set(row, "name", json_string(name));
        sh_json_set(row, "verdict", json_string(name));
        sh_json_set(s, lists[i], repeat(row, 5000));
        json_decref(row);
    }
    assert_good(s);
    json_decref(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_is_the_golden_one),
        cmocka_unit_test(hostile_names_are_text),
        cmocka_unit_test(broken_members_break_nothing),
        cmocka_unit_test(an_empty_summary_is_not_measured),
        cmocka_unit_test(verdicts_follow_the_numbers),
        cmocka_unit_test(a_huge_fleet_fits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
