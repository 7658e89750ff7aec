/* The monitor as a node uses it: windows, references by release, alarms, survival of a crash. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "shared/stats/monitor.h"
#include "tests/stats/traffic.h"

static sh_monitor *make(const sh_monitor_options *options)
{
    sh_monitor *m = NULL;
    sh_error err = {0};
    if (sh_monitor_create(options, &m, &err) != SH_OK)
        fail_msg("%s", err.text);
    return m;
}

static void windows_close_by_count_time_and_release(void **state)
{
    (void)state;
    sh_monitor_options o = {.window = 32, .window_ms_max = 60000, .reference = 64, .origin = 77};
    sh_monitor *m = make(&o);
    traffic t;
    sh_window_result closed;
    traffic_init(&t, &traffic_default, 1);
    for (int i = 1; i <= 32; i++) {
        sh_record r = traffic_next(&t);
        assert_int_equal(sh_monitor_add(m, &r, &closed), i == 32);
    }
    assert_int_equal(closed.window.index, 1);
    assert_int_equal(closed.window.origin, 77);
    assert_int_equal(closed.window.inferences, 32);
    assert_int_equal(closed.window.first_seq, 1);
    assert_int_equal(closed.window.last_seq, 32);
    assert_false(sh_monitor_tick(m, UINT64_MAX, &closed)); /* nothing in it */
    sh_record r = traffic_next(&t);
    assert_false(sh_monitor_add(m, &r, &closed));
    assert_false(sh_monitor_tick(m, r.at_ms + 59999, &closed));
    assert_true(sh_monitor_tick(m, r.at_ms + 60000, &closed));
    assert_int_equal(closed.window.inferences, 1);
    assert_true(closed.metric[SH_METRIC_NLL].insufficient);
    r = traffic_next(&t);
    assert_false(sh_monitor_add(m, &r, &closed));
    sh_monitor_set_release(m, 2);
    r = traffic_next(&t); /* still of release 1: in flight at the switch */
    assert_true(sh_monitor_add(m, &r, &closed));
    assert_int_equal(closed.window.release_version, 1);
    assert_int_equal(sh_monitor_next_window(m), 4);
    sh_monitor_note_drop(m, SH_DROP_RECORD, 5);
    assert_true(sh_monitor_tick(m, r.at_ms + 60000, &closed));
    assert_int_equal(closed.window.release_version, 2);
    assert_int_equal(closed.window.metric[SH_METRIC_NLL].n, 0);
    assert_int_equal(closed.window.metric[SH_METRIC_LENGTH].n, 1);
    assert_int_equal(closed.window.drops[SH_DROP_RECORD], 5);
    sh_monitor_destroy(&m);
    assert_null(m);
}

static void options_are_checked(void **state)
{
    (void)state;
    const sh_monitor_options wrong[] = {
        {.window = 4},
        {.reference = 5000},
        {.average_run_length = -1},
        {.effect_min = {[SH_METRIC_NLL] = 99}},
    };
    for (size_t i = 0; i < SH_COUNT(wrong); i++) {
        sh_monitor *m = NULL;
        sh_error err = {0};
        assert_int_equal(sh_monitor_create(&wrong[i], &m, &err), SH_ERR_USAGE);
        assert_null(m);
        assert_true(strlen(err.text) > 0);
    }
}

typedef struct {
    unsigned windows, alarms[SH_METRICS], first_alarm; /* first_alarm: 0 is none */
} tally;

static void feed(sh_monitor *m, traffic *t, unsigned n, tally *out)
{
    sh_window_result closed;
    for (unsigned i = 0; i < n; i++) {
        sh_record r = traffic_next(t);
        if (!sh_monitor_add(m, &r, &closed))
            continue;
        out->windows++;
        if (closed.alarms > 0 && out->first_alarm == 0)
            out->first_alarm = out->windows;
        for (size_t k = 0; k < SH_METRICS; k++)
            out->alarms[k] += closed.metric[k].alarm;
    }
}

/* Passages make neighbours alike and windows uneven; nothing has changed, nothing may alarm. */
static void stationary_passages_do_not_alarm(void **state)
{
    (void)state;
    const sh_monitor_options o = {.window = 128, .reference = 1000, .average_run_length = 1e6};
    const unsigned seeds = 40;
    unsigned alarmed = 0, windows = 0;
    for (uint64_t seed = 0; seed < seeds; seed++) {
        sh_monitor *m = make(&o);
        traffic t;
        tally all = {0};
        traffic_init(&t, &traffic_default, seed);
        feed(m, &t, 5000, &all);
        alarmed += all.first_alarm > 0;
        windows += all.windows;
        sh_monitor_destroy(&m);
    }
    print_message("stationary: %u of %u users alarm in %u windows\n", alarmed, seeds, windows);
    assert_int_equal(alarmed, 0);
}

typedef struct {
    sh_metric metric;
    traffic_options now;
} shift;

static void shifts_are_found_by_their_metric(void **state)
{
    (void)state;
    shift shifts[] = {{SH_METRIC_NLL, traffic_default},
                      {SH_METRIC_REJECT, traffic_default},
                      {SH_METRIC_PROJECTION, traffic_default},
                      {SH_METRIC_BUCKETS, traffic_default}};
    shifts[0].now.nll += 2;
    shifts[1].now.reject = 1.3; /* with its spread over passages: always */
    shifts[2].now.projection_shift = 40;
    shifts[3].now.off_topic = 0.5;
    const sh_monitor_options o = {.window = 128, .reference = 1000, .average_run_length = 1e6};
    for (size_t s = 0; s < SH_COUNT(shifts); s++) {
        unsigned soon = 0;
        for (uint64_t seed = 0; seed < 10; seed++) {
            sh_monitor *m = make(&o);
            traffic t;
            tally before = {0}, after = {0};
            traffic_init(&t, &traffic_default, 1000 + seed);
            feed(m, &t, 128 * 20, &before);
            assert_int_equal(before.first_alarm, 0);
            t.options = shifts[s].now;
            t.left = 0;
            feed(m, &t, 128 * 3, &after);
            soon += after.alarms[shifts[s].metric] > 0;
            sh_monitor_destroy(&m);
        }
        print_message("%s: %u of 10 within 3 windows\n", sh_metric_name(shifts[s].metric), soon);
        assert_true(soon >= 8);
    }
}

static void small_shifts_are_significant_but_no_alarm(void **state)
{
    (void)state;
    /* A steady change of 0.15 nats under a least effect of 1: traffic alone must not make it one.
     */
    const sh_monitor_options o = {
        .window = 256, .reference = 2000, .effect_min = {[SH_METRIC_NLL] = 1}};
    traffic_options even = traffic_default;
    even.nll_passage_sd = 0;
    sh_monitor *m = make(&o);
    traffic t;
    tally all = {0};
    traffic_init(&t, &even, 5);
    feed(m, &t, 4000, &all);
    t.options.nll += 0.4;
    feed(m, &t, 20000, &all);
    assert_int_equal(all.alarms[SH_METRIC_NLL], 0);
    sh_monitor_destroy(&m);
}

static void a_release_gets_its_own_reference(void **state)
{
    (void)state;
    const sh_monitor_options o = {.window = 128, .reference = 512, .average_run_length = 1e6};
    sh_monitor *m = make(&o);
    traffic t;
    tally all = {0};
    sh_window_result closed;
    traffic_init(&t, &traffic_default, 8);
    feed(m, &t, 1920, &all);
    /* Release 2 is worse by 2 nats from its first inference on: that is its reference. */
    t.options.nll += 2;
    sh_monitor_set_release(m, 2);
    for (unsigned i = 0; i < 1920; i++) {
        sh_record r = traffic_next(&t);
        r.release_version = 2;
        if (!sh_monitor_add(m, &r, &closed))
            continue;
        assert_int_equal(closed.alarms, 0);
        assert_int_equal(closed.metric[SH_METRIC_NLL].insufficient, i < 511);
        assert_false(closed.metric[SH_METRIC_LENGTH].insufficient);
    }
    assert_true(closed.metric[SH_METRIC_NLL].reference > 4.5);
    /* Back to release 1: its reference is known, and against it this traffic is a change. */
    sh_monitor_set_release(m, 1);
    tally back = {0};
    feed(m, &t, 384, &back);
    assert_true(back.alarms[SH_METRIC_NLL] > 0);
    sh_monitor_destroy(&m);
}

static void late_feedback_counts(void **state)
{
    (void)state;
    const sh_monitor_options o = {.window = 64, .reference = 64};
    sh_monitor *m = make(&o);
    sh_window_result closed;
    traffic t;
    traffic_init(&t, &traffic_default, 2);
    for (int i = 0; i < 64; i++) {
        sh_record r = traffic_next(&t);
        r.feedback = SH_FEEDBACK_NONE;
        r.edit_distance = 0;
        if (i < 10)
            sh_monitor_feedback(m, i < 5 ? 1 : 7, SH_FEEDBACK_REJECT, 2);
        if (sh_monitor_add(m, &r, &closed))
            break;
    }
    assert_int_equal(closed.window.feedback[SH_FEEDBACK_REJECT], 10);
    assert_int_equal(closed.window.feedback[SH_FEEDBACK_NONE], 64 - 9); /* the first came early */
    assert_int_equal(closed.window.edit_distance, 20);
    assert_int_equal(closed.window.metric[SH_METRIC_REJECT].n, 4); /* of this release only */
    sh_monitor_destroy(&m);
}

/* Saves and loads at every few inferences; the twin that never does must see the same. */
static void a_resumed_monitor_is_the_same(void **state)
{
    (void)state;
    const sh_monitor_options o = {.window = 64, .reference = 300, .origin = 5};
    sh_monitor *steady = make(&o), *resumed = make(&o);
    traffic t;
    sh_window_result a, b;
    size_t most = 0;
    traffic_init(&t, &traffic_default, 11);
    for (unsigned i = 0; i < 3000; i++) {
        sh_record r = traffic_next(&t);
        if (i == 1500)
            t.options.nll += 2;
        if (i == 900 || i == 1200) {
            sh_monitor_set_release(steady, i == 900 ? 2 : 1);
            sh_monitor_set_release(resumed, i == 900 ? 2 : 1);
        }
        r.release_version = i >= 900 && i < 1200 ? 2 : 1;
        bool closed = sh_monitor_add(steady, &r, &a);
        assert_int_equal(sh_monitor_add(resumed, &r, &b), closed);
        for (size_t k = 0; closed && k < SH_METRICS; k++) {
            assert_memory_equal(&a.metric[k].log_evalue, &b.metric[k].log_evalue, sizeof(double));
            assert_memory_equal(&a.metric[k].effect, &b.metric[k].effect, sizeof(double));
            assert_int_equal(a.metric[k].alarm, b.metric[k].alarm);
        }
        if (i % 7 != 0)
            continue;
        sh_buf bytes;
        sh_buf_init(&bytes, SH_MONITOR_BYTES_MAX);
        assert_int_equal(sh_monitor_encode(resumed, &bytes), SH_OK);
        most = SH_MAX(most, bytes.len);
        sh_monitor_destroy(&resumed);
        sh_error err = {0};
        if (sh_monitor_decode(&o, bytes.data, bytes.len, &resumed, &err) != SH_OK)
            fail_msg("inference %u: %s", i, err.text);
        sh_buf_release(&bytes);
    }
    assert_true(a.alarms > 0);
    print_message("largest state: %zu bytes\n", most);
    sh_monitor_destroy(&steady);
    sh_monitor_destroy(&resumed);
}

static void broken_state_is_refused(void **state)
{
    (void)state;
    const sh_monitor_options o = {.window = 64, .reference = 64};
    sh_monitor *m = make(&o), *out = NULL;
    traffic t;
    tally all = {0};
    traffic_init(&t, &traffic_default, 4);
    feed(m, &t, 300, &all);
    sh_buf bytes;
    sh_buf_init(&bytes, SH_MONITOR_BYTES_MAX);
    assert_int_equal(sh_monitor_encode(m, &bytes), SH_OK);
    for (size_t n = 0; n < bytes.len; n += 13)
        assert_int_not_equal(sh_monitor_decode(&o, bytes.data, n, &out, NULL), SH_OK);
    for (size_t i = 0; i < bytes.len; i += 13) {
        bytes.data[i] ^= 1;
        assert_int_not_equal(sh_monitor_decode(&o, bytes.data, bytes.len, &out, NULL), SH_OK);
        bytes.data[i] ^= 1;
    }
    assert_null(out);
    sh_alloc_fail_after(1);
    assert_int_equal(sh_monitor_decode(&o, bytes.data, bytes.len, &out, NULL), SH_ERR_NO_MEMORY);
    sh_alloc_fail_after(0);
    sh_buf_release(&bytes);
    sh_monitor_destroy(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(windows_close_by_count_time_and_release),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(stationary_passages_do_not_alarm),
        cmocka_unit_test(shifts_are_found_by_their_metric),
        cmocka_unit_test(small_shifts_are_significant_but_no_alarm),
        cmocka_unit_test(a_release_gets_its_own_reference),
        cmocka_unit_test(late_feedback_counts),
        cmocka_unit_test(a_resumed_monitor_is_the_same),
        cmocka_unit_test(broken_state_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
