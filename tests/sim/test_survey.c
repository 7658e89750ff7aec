/* What an aggregator's store says about its fleet, against the fleet that filled it, and the report
 * made from that. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/sim/rig.h"

#include <string.h>

#include "aggregator/report.h"
#include "aggregator/survey.h"

static json_t *at(const json_t *object, const char *key, const char *member)
{
    json_t *value = json_object_get(json_object_get(object, key), member);
    if (!value)
        fail_msg("the survey has no %s.%s", key, member);
    return value;
}

static uint64_t count_at(const json_t *object, const char *key, const char *member)
{
    return (uint64_t)json_integer_value(at(object, key, member));
}

static void run_fleet(rig *r)
{
    static const char *const words[] = {"--nodes", "6", "--store", "memory", "--seed", "7", NULL};
    rig_init(r, words);
    rig_create(r);
    OK(sim_run(r->sim, err));
}

static void a_survey_is_what_the_fleet_did(void **state)
{
    (void)state;
    rig r;
    json_t *survey = NULL;
    run_fleet(&r);
    sh_coord_status c = sh_coord_get_status(r.sim->coord);
    sh_survey_options o = {.now_ms = r.sim->now_ms, .stale_ms = UINT64_MAX / 2};
    OK(sh_survey_make(r.sim->coord_store, &o, &survey, err));
    assert_int_equal(count_at(survey, "coverage", "enrolled"), 6);
    assert_int_equal(count_at(survey, "coverage", "reporting"), 6);
    assert_int_equal(count_at(survey, "coverage", "stale"), 0);
    assert_int_equal(count_at(survey, "fleet", "release"), c.version);
    assert_int_equal(count_at(survey, "fleet", "on_release"), 6);
    assert_int_equal(count_at(survey, "updates", "received"), c.updates_in);
    assert_int_equal(count_at(survey, "updates", "merged"), c.updates_merged);
    assert_int_equal(json_array_size(json_object_get(survey, "releases")),
                     c.releases + c.candidates_refused);
    uint64_t windows = 0, alarmed = 0, rows = 0;
    for (uint32_t i = 0; i < r.sim->n_nodes; i++) {
        windows += r.sim->nodes[i].windows;
        alarmed += sh_node_get_status(r.sim->nodes[i].core).first_alarm_window > 0;
    }
    assert_int_equal(count_at(survey, "fleet", "windows"), windows);
    const json_t *nodes = at(survey, "drift", "nodes");
    for (size_t i = 0; i < json_array_size(nodes); i++)
        rows += json_is_string(json_object_get(json_array_get(nodes, i), "metric"));
    assert_true(alarmed > 0);
    assert_int_equal(rows, alarmed);
    json_decref(survey);
    rig_release(&r);
}

/* Every window that the store has stands in the timeline, and the histograms hold what their counts
 * say. */
static void histograms_add_up(void **state)
{
    (void)state;
    rig r;
    json_t *survey = NULL, *row;
    size_t i, with_samples = 0;
    run_fleet(&r);
    sh_survey_options o = {.now_ms = r.sim->now_ms, .stale_ms = 1};
    OK(sh_survey_make(r.sim->coord_store, &o, &survey, err));
    json_t *histograms = json_object_get(survey, "histograms");
    assert_int_equal(json_array_size(histograms), SH_METRICS);
    json_array_foreach(histograms, i, row)
    {
        static const char *const keys[][2] = {{"reference", "reference_n"},
                                              {"current", "current_n"}};
        for (size_t k = 0; k < SH_COUNT(keys); k++) {
            json_t *bins = json_object_get(row, keys[k][0]);
            json_int_t sum = 0, n = json_integer_value(json_object_get(row, keys[k][1]));
            for (size_t b = 0; b < json_array_size(bins); b++)
                sum += json_integer_value(json_array_get(bins, b));
            assert_int_equal(sum, n);
            with_samples += n > 0;
        }
    }
    assert_true(with_samples >= 2);
    /* Half a fleet's nodes checked in last before the very last one did. */
    assert_true(count_at(survey, "coverage", "stale") > 0);
    assert_true(json_array_size(at(survey, "drift", "timeline")) > 1);
    json_decref(survey);
    rig_release(&r);
}

static void a_report_is_made_of_it(void **state)
{
    (void)state;
    rig r;
    json_t *survey = NULL, *report = NULL;
    sh_buf text, html;
    sh_buf_init(&text, SH_REPORT_TEXT_MAX);
    sh_buf_init(&html, SH_REPORT_HTML_MAX);
    run_fleet(&r);
    sh_survey_options o = {.now_ms = r.sim->now_ms, .stale_ms = UINT64_MAX / 2};
    OK(sh_survey_make(r.sim->coord_store, &o, &survey, err));
    OK(sh_report_make(survey, &report, err));
    assert_string_not_equal(json_string_value(at(report, "verdict", "state")), "incomplete");
    OK(sh_report_text(report, &text));
    OK(sh_report_html(report, &html));
    OK(sh_buf_append(&text, "", 1));
    OK(sh_buf_append(&html, "", 1));
    assert_non_null(strstr((char *)text.data, "nodes reporting                       6"));
    assert_null(strstr((char *)text.data, "central LoRA")); /* a fleet has no baseline */
    assert_non_null(strstr((char *)html.data, "Reference and current distribution"));
    assert_null(strstr((char *)html.data, "<script"));

    /* A node that is away for long makes the verdict careful. */
    json_object_set_new(json_object_get(survey, "coverage"), "reporting", json_integer(2));
    json_decref(report);
    OK(sh_report_make(survey, &report, err));
    assert_string_equal(json_string_value(at(report, "verdict", "action")), "hold");
    assert_string_equal(json_string_value(at(report, "verdict", "state")), "incomplete");
    json_decref(report);
    json_decref(survey);
    sh_buf_release(&text);
    sh_buf_release(&html);
    rig_release(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_survey_is_what_the_fleet_did),
        cmocka_unit_test(histograms_add_up),
        cmocka_unit_test(a_report_is_made_of_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
