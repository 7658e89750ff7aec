/* What a node's feedback becomes on its way to the trainer: snapshot, held-out split, update. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "edge-node/learn.h"
#include "shared/base/file.h"
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
    sh_round_result r = {0};
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
    sh_round_result_release(&r);
    sh_snapshot_release(&s);
}

static void test_same_seed_same_bytes(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_round_result a = {0}, b = {0}, c = {0};
    OK(sh_learn_run(model, &s, &o, &a, &err));
    o.threads = 2;
    OK(sh_learn_run(model, &s, &o, &b, &err));
    o.shuffle_seed++;
    OK(sh_learn_run(model, &s, &o, &c, &err));
    assert_int_equal(a.update.len, b.update.len);
    assert_memory_equal(a.update.data, b.update.data, a.update.len);
    assert_true(c.update.len == a.update.len &&
                memcmp(a.update.data, c.update.data, a.update.len) != 0);
    sh_round_result_release(&a);
    sh_round_result_release(&b);
    sh_round_result_release(&c);
    sh_snapshot_release(&s);
}

static void test_counts(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_round_result r = {0};
    o.heldout = false;
    o.plan.passes_milli = 2000;
    OK(sh_learn_run(model, &s, &o, &r, &err));
    /* Every target but the stream's first token is predicted once a pass. */
    assert_int_equal(r.samples, sh_snapshot_targets(&s));
    if (r.tokens_seen < 2 * r.samples || r.tokens_seen > 2 * r.samples + 2 * o.plan.context)
        fail_msg("%zu target tokens seen in two passes over %zu", (size_t)r.tokens_seen,
                 (size_t)r.samples);
    sh_round_result_release(&r);
    o.plan.steps_max = 3;
    OK(sh_learn_run(model, &s, &o, &r, &err));
    assert_int_equal(r.steps, 3);
    sh_round_result_release(&r);
    sh_snapshot_release(&s);
}

static void test_too_few(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS), none = {0};
    sh_learn_options o = make_options();
    sh_round_result r = {0};
    o.plan.tokens_min = 10000;
    assert_int_equal(sh_learn_run(model, &s, &o, &r, &err), SH_ERR_LIMIT);
    assert_non_null(strstr(err.text, "10000"));
    size_t n = 0; /* as the node counts before it starts a training */
    for (size_t i = 0; i < s.n_sessions; i++)
        for (size_t k = s.starts[i]; k < (i + 1 < s.n_sessions ? s.starts[i + 1] : s.n_tokens); k++)
            n += !sh_snapshot_is_heldout(s.sessions[i]) && (s.mask[k] & SH_TOKEN_TARGET) != 0;
    o.plan.tokens_min = (uint32_t)n + 1;
    assert_int_equal(sh_learn_run(model, &s, &o, &r, &err), SH_ERR_LIMIT);
    o.plan.tokens_min = (uint32_t)n;
    OK(sh_learn_run(model, &s, &o, &r, &err));
    assert_int_equal(r.samples, n);
    sh_round_result_release(&r);
    o.plan.tokens_min = 0;
    assert_int_equal(sh_learn_run(model, &none, &o, &r, &err), SH_ERR_LIMIT);
    assert_null(r.update.data);
    sh_snapshot_release(&s);
}

/* ---- scoring a candidate ---- */

/* A second model of the same shape, which knows the pattern no better. */
static sh_model *open_other(uint64_t seed)
{
    char path[] = "/tmp/shoal-learn-XXXXXX";
    sh_model *other = NULL;
    tiny_options options = tiny_defaults(seed);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    OK(tiny_write(&options, path, &err));
    OK(sh_model_open(path, &other, &err));
    unlink(path);
    return other;
}

/* The sum of one slice by the plainest means: a fresh context a token. */
static double plain_sum(const sh_model *m, const sh_snapshot *s, uint32_t context, uint8_t want,
                        uint64_t *tokens)
{
    double sum = 0;
    float *logits = calloc(m->config.vocab, sizeof *logits);
    *tokens = 0;
    for (size_t i = 0; i < s->n_sessions; i++) {
        for (size_t k = 1; sh_snapshot_is_heldout(s->sessions[i]) && k < LENGTH; k++) {
            size_t at = s->starts[i] + k, from = s->starts[i] + (k - 1) / context * context;
            if (s->mask[at] != want)
                continue;
            sh_context *c = NULL;
            OK(sh_context_create(m, &(sh_context_options){.n_tokens_max = context}, &c, &err));
            OK(sh_context_decode(c, s->tokens + from, (uint32_t)(at - from), SH_LOGITS_LAST, logits,
                                 &err));
            sum += sh_nll(logits, m->config.vocab, s->tokens[at]);
            ++*tokens;
            sh_context_destroy(&c);
        }
    }
    free(logits);
    return sum;
}

static void test_evaluation(void **state)
{
    (void)state;
    const uint32_t context = 16;
    sh_snapshot s = make_snapshot(SESSIONS);
    for (size_t i = 0; i < s.n_tokens; i++)
        if (s.mask[i] && i % 3 == 0)
            s.mask[i] |= SH_TOKEN_ACCEPTED;
    sh_model *other = open_other(4);
    sh_slice_score slices[SH_SLICES];
    uint32_t n = 0;
    OK(sh_learn_evaluate(model, other, &s, context, slices, &n, &err));
    assert_int_equal(n, 2);
    for (uint32_t k = 0; k < n; k++) {
        uint8_t want = SH_TOKEN_TARGET | (k == SH_SLICE_ACCEPTED ? SH_TOKEN_ACCEPTED : 0);
        uint64_t tokens;
        double parent = plain_sum(model, &s, context, want, &tokens);
        double candidate = plain_sum(other, &s, context, want, &tokens);
        assert_int_equal(slices[k].slice, k);
        assert_true(tokens > 10);
        assert_int_equal(slices[k].tokens, tokens);
        /* Both add the same bits, the one by session, the other as well. */
        if (fabs(slices[k].nll_parent - parent) > 1e-9 * parent ||
            fabs(slices[k].nll_candidate - candidate) > 1e-9 * candidate)
            fail_msg("slice %u: %.12g and %.12g, expected %.12g and %.12g", k, slices[k].nll_parent,
                     slices[k].nll_candidate, parent, candidate);
    }
    assert_true(slices[0].nll_parent != slices[0].nll_candidate);

    /* What is trained on is not scored. */
    for (size_t i = 0; i < s.n_sessions; i++)
        for (size_t k = 0; k < LENGTH; k++)
            if (sh_snapshot_is_heldout(s.sessions[i]))
                s.mask[i * LENGTH + k] = 0;
    OK(sh_learn_evaluate(model, other, &s, context, slices, &n, &err));
    assert_int_equal(n, 0);
    sh_model_close(&other);
    sh_snapshot_release(&s);
}

/* ---- snapshots as files ---- */

static void must_equal(const sh_snapshot *a, const sh_snapshot *b)
{
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_int_equal(a->n_sessions, b->n_sessions);
    assert_memory_equal(a->tokens, b->tokens, a->n_tokens * sizeof *a->tokens);
    assert_memory_equal(a->mask, b->mask, a->n_tokens);
    assert_memory_equal(a->starts, b->starts, a->n_sessions * sizeof *a->starts);
    assert_memory_equal(a->sessions, b->sessions, a->n_sessions * sizeof *a->sessions);
}

static void test_snapshot_file(void **state)
{
    (void)state;
    char dir[] = "/tmp/shoal-learn-XXXXXX", path[64];
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/snapshot", dir);
    sh_snapshot s = make_snapshot(3), back = {0}, empty = {0};
    s.tokens[5] = INT32_MAX;
    s.tokens[6] = -1;
    s.mask[7] = SH_TOKEN_TARGET | SH_TOKEN_ACCEPTED;
    struct stat info;
    OK(sh_snapshot_save(&s, path, &err));
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    OK(sh_snapshot_load(path, &back, &err));
    must_equal(&s, &back);
    sh_snapshot_release(&back);

    uint8_t *bytes = NULL;
    size_t n = 0;
    OK(sh_file_read(path, SIZE_MAX, &bytes, &n, &err));
    for (size_t i = 0; i < n; i += i < 64 ? 1 : 7) { /* cut and damaged, anywhere */
        OK(sh_file_write_private(path, bytes, i, &err));
        assert_true(sh_snapshot_load(path, &back, &err) != SH_OK);
        bytes[i] ^= 0x40;
        OK(sh_file_write_private(path, bytes, n, &err));
        assert_true(sh_snapshot_load(path, &back, &err) != SH_OK);
        assert_non_null(strstr(err.text, path));
        bytes[i] ^= 0x40;
        assert_null(back.tokens);
    }
    free(bytes);
    s.starts[1] = s.starts[2]; /* a good checksum over sessions out of order */
    OK(sh_snapshot_save(&s, path, &err));
    assert_int_equal(sh_snapshot_load(path, &back, &err), SH_ERR_INVALID);
    OK(sh_snapshot_save(&empty, path, &err));
    OK(sh_snapshot_load(path, &back, &err));
    assert_int_equal(back.n_tokens, 0);
    sh_snapshot_release(&back);
    sh_snapshot_release(&s);
    unlink(path);
    assert_int_equal(sh_snapshot_load(path, &back, &err), SH_ERR_NOT_FOUND);
    rmdir(dir);
}

static void test_pieces(void **state)
{
    (void)state;
    static const int32_t tokens[] = {1, 2, 3, 4, 5, 6};
    sh_snapshot s = {0};
    OK(sh_snapshot_add(&s, 7, tokens, 2, 0));
    OK(sh_snapshot_add(&s, 7, tokens + 2, 1, SH_TOKEN_TARGET));
    OK(sh_snapshot_add(&s, 8, tokens + 3, 0, SH_TOKEN_TARGET)); /* nothing */
    OK(sh_snapshot_add(&s, 9, tokens + 3, 3, SH_TOKEN_TARGET | SH_TOKEN_ACCEPTED));
    assert_int_equal(s.n_sessions, 2);
    assert_int_equal(s.starts[1], 3);
    assert_int_equal(s.sessions[1], 9);
    assert_memory_equal(s.tokens, tokens, sizeof tokens);
    assert_memory_equal(s.mask, ((uint8_t[]){0, 0, 1, 3, 3, 3}), 6);
    assert_int_equal(sh_snapshot_targets(&s), 4);
    sh_snapshot_release(&s);
}

/* The bits of a mask beside the target's change nothing in training. */
static void test_accepted_targets_train_alike(void **state)
{
    (void)state;
    sh_snapshot s = make_snapshot(SESSIONS);
    sh_learn_options o = make_options();
    sh_round_result a = {0}, b = {0};
    o.plan.steps_max = 2;
    OK(sh_learn_run(model, &s, &o, &a, &err));
    for (size_t i = 0; i < s.n_tokens; i++)
        s.mask[i] |= SH_TOKEN_ACCEPTED;
    OK(sh_learn_run(model, &s, &o, &b, &err));
    assert_int_equal(a.samples, b.samples);
    assert_memory_equal(a.update.data, b.update.data, a.update.len);
    sh_round_result_release(&a);
    sh_round_result_release(&b);
    sh_snapshot_release(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_update_improves_on_heldout),
        cmocka_unit_test(test_same_seed_same_bytes),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_too_few),
        cmocka_unit_test(test_evaluation),
        cmocka_unit_test(test_snapshot_file),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_accepted_targets_train_alike),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
