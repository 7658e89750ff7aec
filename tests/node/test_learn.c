/* What a node's feedback becomes on its way to the trainer: snapshot, held-out split, update. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "edge-node/learn.h"
#include "shared/base/rng.h"
#include "tests/model/tiny.h"

#define SESSIONS 24
#define LENGTH   40 /* tokens a session */

static sh_error err;
static sh_model *model;

#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), err.text);                   \
    } while (0)

static int setup(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-learn-XXXXXX";
    tiny_options options = tiny_defaults(3);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    OK(sh_crypto_init(&err));
    OK(tiny_write(&options, path, &err));
    OK(sh_model_open(path, &model, &err));
    unlink(path);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    sh_model_close(&model);
    return 0;
}

/* Sessions of one repeated pattern, so that training helps; the first 4 tokens are context. */
static sh_snapshot make_snapshot(uint32_t n_sessions)
{
    sh_snapshot s = {0};
    s.tokens = calloc(n_sessions * LENGTH, sizeof *s.tokens);
    s.mask = calloc(n_sessions * LENGTH, 1);
    s.starts = calloc(n_sessions, sizeof *s.starts);
    s.sessions = calloc(n_sessions, sizeof *s.sessions);
    for (uint32_t i = 0; i < n_sessions; i++) {
        s.starts[i] = i * LENGTH;
        s.sessions[i] = 1000 + i;
        for (uint32_t k = 0; k < LENGTH; k++) {
            s.tokens[i * LENGTH + k] = (int32_t)(260 + (k * 7 + i % 3) % 13);
            s.mask[i * LENGTH + k] = k >= 4;
        }
    }
    s.n_sessions = n_sessions;
    s.n_tokens = (size_t)n_sessions * LENGTH;
    return s;
}

static sh_learn_options make_options(void)
{
    return (sh_learn_options){.plan = {.a_seed = 11,
                                       .rank = 4,
                                       .alpha = 8,
                                       .lr = 0.02f,
                                       .lr_final = 1,
                                       .clip = 1,
                                       .batch = 2,
                                       .context = 16,
                                       .passes_milli = 4000,
                                       .steps_max = 1000},
                              .shuffle_seed = 5,
                              .threads = 1,
                              .heldout = true};
}

static void test_update_improves_on_heldout(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_learn_result r = {0};
    OK(sh_learn_run(model, &s, &o, &r, &err));
    if (!(r.heldout_after < r.heldout_before - 0.5))
        fail_msg("held-out loss %.3f before, %.3f after", r.heldout_before, r.heldout_after);
    size_t targets = sh_snapshot_targets(&s);
    assert_int_equal(targets, SESSIONS * (LENGTH - 4));
    /* Whole sessions are held out: some, and not most. */
    if (!(r.samples < targets && r.samples > targets / 2))
        fail_msg("%zu of %zu targets are trained on", (size_t)r.samples, targets);
    assert_int_equal((targets - r.samples) % (LENGTH - 4), 0);
    sh_adapter *adapter = NULL;
    OK(sh_adapter_decode(r.update.data, r.update.len, "update", &model->config, &adapter, &err));
    assert_int_equal(adapter->rank, 4);
    sh_adapter_destroy(&adapter);
    sh_learn_result_release(&r);
    sh_snapshot_release(&s);
}

static void test_same_seed_same_bytes(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_learn_result a = {0}, b = {0}, c = {0};
    OK(sh_learn_run(model, &s, &o, &a, &err));
    o.threads = 2;
    OK(sh_learn_run(model, &s, &o, &b, &err));
    o.shuffle_seed++;
    OK(sh_learn_run(model, &s, &o, &c, &err));
    assert_int_equal(a.update.len, b.update.len);
    assert_memory_equal(a.update.data, b.update.data, a.update.len);
    assert_true(c.update.len == a.update.len &&
                memcmp(a.update.data, c.update.data, a.update.len) != 0);
    sh_learn_result_release(&a);
    sh_learn_result_release(&b);
    sh_learn_result_release(&c);
    sh_snapshot_release(&s);
}

static void test_counts(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_learn_result r = {0};
    o.heldout = false;
    o.plan.passes_milli = 2000;
    OK(sh_learn_run(model, &s, &o, &r, &err));
    /* Every target but the stream's first token is predicted once a pass. */
    assert_int_equal(r.samples, sh_snapshot_targets(&s));
    if (r.tokens_seen < 2 * r.samples || r.tokens_seen > 2 * r.samples + 2 * o.plan.context)
        fail_msg("%zu target tokens seen in two passes over %zu", (size_t)r.tokens_seen,
                 (size_t)r.samples);
    sh_learn_result_release(&r);
    o.plan.steps_max = 3;
    OK(sh_learn_run(model, &s, &o, &r, &err));
    assert_int_equal(r.steps, 3);
    sh_learn_result_release(&r);
    sh_snapshot_release(&s);
}

static void test_too_few(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(2), none = {0};
    sh_learn_options o = make_options();
    sh_learn_result r = {0};
    o.plan.tokens_min = 10000;
    assert_int_equal(sh_learn_run(model, &s, &o, &r, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "10000"));
    o.plan.tokens_min = 0;
    assert_int_equal(sh_learn_run(model, &none, &o, &r, &err), SH_ERR_LIMIT);
    assert_null(r.update.data);
    sh_snapshot_release(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_update_improves_on_heldout),
        cmocka_unit_test(test_same_seed_same_bytes),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_too_few),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
