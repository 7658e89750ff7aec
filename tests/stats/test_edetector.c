/* The e-detector's promises: run length, detection, and what dependence does to both. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "shared/base/rng.h"
#include "shared/stats/edetector.h"

/* Against the definition, without logarithms: M <- L (M + 1), averaged over the grid. */
static void value_is_the_definition(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 0);
    sh_edetector d;
    sh_edetector_init(&d, 0.25, 0.01);
    double m[SH_EDETECTOR_LAMBDAS] = {0};
    for (int i = 0; i < 300; i++) {
        double x = sh_rng_unit(&rng) < 0.3 ? 1 : 0, mean = 0;
        sh_edetector_update(&d, x);
        for (int k = 0; k < SH_EDETECTOR_LAMBDAS; k++) {
            double l = 0.9 / 0.25 / (1 << k);
            m[k] = (1 + l * (x - 0.25)) * exp(-l * l * 0.01 / 2) * (m[k] + 1);
            mean += m[k] / SH_EDETECTOR_LAMBDAS;
        }
        double ours = sh_edetector_log_value(&d), theirs = log(fmax(mean, 1e-9));
        if (fabs(ours - theirs) > 1e-9)
            fail_msg("step %d: %.12f, by the definition %.12f", i, ours, theirs);
    }
    sh_edetector_reset(&d);
    assert_true(sh_edetector_log_value(&d) < log(1e-8));
}

/* Independent draws at the very edge of the null hypothesis: 400 streams of 1,000 at a run length
 * of 1,000. P(alarm within n) <= n / ARL would allow all of them; E[first alarm] >= ARL is what is
 * promised, and a stream without alarm counts with its length only. */
static void run_length_is_kept(void **state)
{
    (void)state;
    const int streams = 400, length = 4000;
    double run = 0;
    unsigned alarms = 0;
    for (int s = 0; s < streams; s++) {
        sh_rng rng;
        sh_rng_init(&rng, (uint64_t)s, 0, 2);
        sh_edetector d;
        sh_edetector_init(&d, 0.2, 0);
        for (int i = 0; i < length; i++) {
            run++;
            sh_edetector_update(&d, sh_rng_unit(&rng) < 0.2);
            if (sh_edetector_log_value(&d) >= log(1000)) {
                alarms++;
                break;
            }
        }
    }
    print_message("run length %.0f observations an alarm, promised 1000\n", run / alarms);
    assert_true(alarms > 0); /* or the test would not see a detector that never alarms */
    assert_true(run / alarms >= 1000);
}

static void a_change_is_found(void **state)
{
    (void)state;
    double delays = 0;
    for (uint64_t s = 0; s < 100; s++) {
        sh_rng rng;
        sh_rng_init(&rng, s, 0, 3);
        sh_edetector d;
        sh_edetector_init(&d, 0.22, 0);
        int delay = 0;
        for (int i = 0; i < 1000; i++)
            sh_edetector_update(&d, sh_rng_unit(&rng) < 0.2);
        while (sh_edetector_log_value(&d) < log(50000.0) && delay < 2000) {
            delay++;
            sh_edetector_update(&d, sh_rng_unit(&rng) < 0.4);
        }
        delays += delay;
    }
    print_message("0.2 to 0.4: delay %.0f\n", delays / 100);
    assert_true(delays / 100 < 138); /* HDDM_A's, which does not know the mean before */
}

/* An AR(1) stream whose neighbours correlate, around one mean for ever. */
static double dependent(sh_rng *rng, double *noise)
{
    *noise = 0.9 * *noise + sqrt(1 - 0.81) * sh_rng_normal(rng);
    return fmin(fmax(0.4 + 0.12 * *noise, 0), 1);
}

static unsigned false_alarms(bool pretend_independent, double *observations)
{
    unsigned alarms = 0;
    *observations = 0;
    for (uint64_t s = 0; s < 100; s++) {
        sh_rng rng;
        sh_rng_init(&rng, s, 0, 4);
        double noise = sh_rng_normal(&rng);
        sh_reference reference = {0};
        for (int i = 0; i < 2000; i++)
            sh_reference_add(&reference, dependent(&rng, &noise));
        sh_reference_stats stats = sh_reference_get(&reference, pretend_independent);
        sh_edetector d;
        sh_edetector_init(&d, stats.mean + 2 * stats.mean_error, stats.excess_variance);
        for (int i = 0; i < 10000; i++) {
            ++*observations;
            sh_edetector_update(&d, dependent(&rng, &noise));
            if (sh_edetector_log_value(&d) >= log(50000.0)) {
                alarms++;
                sh_edetector_reset(&d);
            }
        }
    }
    return alarms;
}

static void dependence_is_allowed_for(void **state)
{
    (void)state;
    double observations;
    unsigned naive = false_alarms(true, &observations);
    unsigned ours = false_alarms(false, &observations);
    print_message("AR(1) 0.9, false alarms per 10,000: %.3f, taken as independent %.3f\n",
                  ours / observations * 1e4, naive / observations * 1e4);
    assert_true(ours / observations * 1e4 <= 0.1);
    assert_true(naive > 20 * (ours + 1)); /* the correction is what does it */
}

static void reference_measures(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, 9, 0, 5);
    sh_reference r = {0};
    assert_float_equal(sh_reference_get(&r, false).mean_error, 0, 0);
    for (int i = 0; i < 3000; i++) /* beyond SH_REFERENCE_MAX: ignored */
        sh_reference_add(&r, 0.5 + 0.1 * sh_rng_normal(&rng));
    sh_reference_add(&r, NAN);
    sh_reference_stats s = sh_reference_get(&r, false);
    assert_int_equal(r.n, SH_REFERENCE_MAX);
    assert_float_equal(s.mean, 0.5, 0.01);
    assert_float_equal(s.variance, 0.01, 0.001);
    /* independent: the upper bound is the variance within chance (9 batches at the coarsest) */
    assert_true(s.excess_variance < 1.5 * s.variance);
    assert_float_equal(sh_reference_get(&r, true).mean_error, sqrt(s.variance / 2000), 1e-12);
}

static void bounds_are_clamped(void **state)
{
    (void)state;
    const double bounds[] = {-1, 0, 1, 2, NAN};
    for (size_t i = 0; i < SH_COUNT(bounds); i++) {
        sh_edetector d;
        sh_edetector_init(&d, bounds[i], NAN);
        for (int k = 0; k < 5000; k++)
            sh_edetector_update(&d, k % 2 ? 5 : NAN);
        assert_true(d.bound > 0 && d.bound < 1);
        assert_true(sh_edetector_log_value(&d) <= SH_EDETECTOR_LOG_MAX);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(value_is_the_definition), cmocka_unit_test(run_length_is_kept),
        cmocka_unit_test(a_change_is_found),       cmocka_unit_test(dependence_is_allowed_for),
        cmocka_unit_test(reference_measures),      cmocka_unit_test(bounds_are_clamped),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
