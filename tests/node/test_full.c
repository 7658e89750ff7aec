/* How long a store that was full counts as full. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "edge-node/daemon_internal.h"

#define START 1000u

static void pauses_double(void **state)
{
    (void)state;
    daemon_full full = {0};
    uint64_t now = START, want = DAEMON_FULL_PAUSE_MS;
    assert_false(daemon_full_counts(&full, now));
    for (int i = 0; i < 8; i++) {
        daemon_full_found(&full, now);
        assert_true(full.is);
        assert_int_equal(full.until_ms, now + want);
        assert_true(daemon_full_counts(&full, now) && daemon_full_counts(&full, now + want - 1));
        now += want; /* tried at once when the pause is over */
        assert_false(daemon_full_counts(&full, now));
        assert_true(full.is); /* until something was written */
        want = want * 2 < DAEMON_FULL_PAUSE_MAX_MS ? want * 2 : DAEMON_FULL_PAUSE_MAX_MS;
    }
    assert_int_equal(want, DAEMON_FULL_PAUSE_MAX_MS);
}

/* A timer that comes late does not begin anew; after a pause's length it is another time. */
static void later_it_is_another_time(void **state)
{
    (void)state;
    for (int late = 0; late < 2; late++) {
        daemon_full full = {0};
        daemon_full_found(&full, START);
        daemon_full_found(&full, full.until_ms);
        assert_int_equal(full.pause_ms, 2 * DAEMON_FULL_PAUSE_MS);
        daemon_full_found(&full, full.until_ms + full.pause_ms - !late);
        assert_int_equal(full.pause_ms, late ? DAEMON_FULL_PAUSE_MS : 4 * DAEMON_FULL_PAUSE_MS);
    }
}

/* What the reserve lets through during the pause does not end it. */
static void a_write_ends_it(void **state)
{
    (void)state;
    daemon_full full = {0};
    assert_false(daemon_full_written(&full, START));
    daemon_full_found(&full, START);
    assert_false(daemon_full_written(&full, full.until_ms - 1));
    assert_true(full.is);
    assert_true(daemon_full_written(&full, full.until_ms));
    assert_false(full.is);
    assert_false(daemon_full_written(&full, full.until_ms)); /* said once */
    daemon_full_found(&full, full.until_ms + 1);             /* the room was gone at once */
    assert_int_equal(full.pause_ms, 2 * DAEMON_FULL_PAUSE_MS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pauses_double),
        cmocka_unit_test(later_it_is_another_time),
        cmocka_unit_test(a_write_ends_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
