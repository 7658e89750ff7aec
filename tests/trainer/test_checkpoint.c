/*
 * Checkpoints: trainings that are cancelled, killed and refused their disk end with the bytes of
 * those that were not, and a file that does not fit is refused by what is wrong with it.
 */
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "tests/trainer/material.h"
#include "tests/trainer/util.h"

static char folder[SH_PATH_BYTES / 2], path[SH_PATH_BYTES];

static int enter(void **state)
{
    (void)state;
    const char *temp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/shoal-checkpoint-XXXXXX", temp && temp[0] ? temp : "/tmp");
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/run.ckpt", folder);
    return 0;
}

/* Files in the folder; with `removes` they go. */
static size_t files(bool removes)
{
    size_t n = 0;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;) {
        if (entry->d_name[0] == '.')
            continue;
        n++;
        if (removes)
            unlinkat(dirfd(dir), entry->d_name, 0);
    }
    if (dir)
        closedir(dir);
    return n;
}

static int clear(void **state)
{
    (void)state;
    (void)files(true);
    return 0;
}

static int leave(void **state)
{
    (void)clear(state);
    return rmdir(folder);
}

/* ---- variants ---- */

enum { STEPS = 8 };
typedef struct {
    const char *name;
    bool full, heldout;
    sh_train_options o; /* what differs from options_of */
} variant;

static const variant variants[] = {
    {"LoRA, AdamW", false, false, {0}},
    {"full, AdamW", true, false, {.weight_decay = 0.1f}},
    {"LoRA, 8 bits, proximal", false, false, {.state_8bit = true, .proximal = 0.5f}},
    {"full, 8 bits, accumulated", true, false, {.state_8bit = true, .accumulate = 2}},
    {"LoRA, SGD, early stop", false, true, {.optimizer = SH_SGD, .momentum = 0.9f, .patience = 2}},
    {"full, SGD in 8 bits",
     true,
     true,
     {.optimizer = SH_SGD, .momentum = 0.9f, .state_8bit = true}},
    {"full, early stop", true, true, {.patience = 1, .lr = 0.2f}},
    {"LoRA in turns, 8 bits", false, true, {.alternate = 3, .state_8bit = true, .patience = 9}},
    {"LoRA in turns, B first", false, false, {.alternate = 2, .freeze = SH_FREEZE_B}},
};

static sh_train_options variant_options(const variant *v, const material *m)
{
    sh_train_options o = options_of(3, STEPS);
    o.optimizer = v->o.optimizer;
    o.momentum = v->o.momentum;
    o.weight_decay = v->o.weight_decay;
    o.state_8bit = v->o.state_8bit;
    o.proximal = v->o.proximal;
    o.accumulate = v->o.accumulate;
    o.patience = v->o.patience;
    o.alternate = v->o.alternate;
    o.freeze = v->o.freeze;
    o.lr = v->o.lr > 0 ? v->o.lr : v->o.optimizer == SH_SGD ? 0.3f : 0.02f;
    if (v->heldout) {
        o.heldout = &m->heldout;
        o.heldout_every = 2;
    }
    return o;
}

static bool same_number(double x, double y)
{
    return x == y || (isnan(x) && isnan(y));
}

static void must_be_same_training(const outcome *x, const outcome *y)
{
    const sh_train_result *a = &x->result, *b = &y->result;
    must_be_same(x, y);
    assert_int_equal(a->steps, b->steps);
    assert_int_equal(a->tokens_seen, b->tokens_seen);
    assert_int_equal(a->heldout_best_step, b->heldout_best_step);
    assert_true(same_number(a->loss_first, b->loss_first));
    assert_true(same_number(a->loss_last, b->loss_last));
    assert_true(same_number(a->heldout_best, b->heldout_best));
    assert_true(same_number(a->heldout_last, b->heldout_last));
}

/* ---- going on ---- */

/* Cancelled after step k, for every k, and gone on with by another number of threads. */
static void test_resume_after_every_step(void **state)
{
    material m = material_make();
    unsigned stopped_early = 0;
    for (size_t v = 0; v < SH_COUNT(variants); v++) {
        const sh_train_options whole_options = variant_options(&variants[v], &m);
        outcome whole, part, rest;
        must_be_ok(train(&m, variants[v].full, &whole_options, &whole));
        assert_int_equal(whole.result.resumed_step, 0);
        stopped_early += whole.result.steps < STEPS;
        for (uint32_t k = 1; k <= whole.result.steps; k++) {
            sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true};
            sh_train_options o = whole_options;
            diary d = {.cancel_at = k};
            o.checkpoint = &c;
            o.progress = note_step;
            o.progress_arg = &d;
            o.threads = k % 3;
            must_fail(train(&m, variants[v].full, &o, &part), SH_ERR_CANCELLED);
            must_say(path);
            d = (diary){0};
            o.threads = (k + 1) % 3;
            must_be_ok(train(&m, variants[v].full, &o, &rest));
            assert_int_equal(rest.result.resumed_step, k);
            assert_int_equal(d.n, whole.result.steps - k);
            if (memcmp(rest.params, whole.params, whole.n * sizeof(float)) != 0)
                fail_msg("%s: other bytes when it goes on after step %u", variants[v].name, k);
            must_be_same_training(&rest, &whole);
            assert_true(rest.result.seconds >= 0);
            assert_int_equal(files(true), 1);
            outcome_release(&part);
            outcome_release(&rest);
        }
        outcome_release(&whole);
    }
    assert_true(stopped_early > 0); /* else early stop was not tried */
    material_release(&m);
    (void)clear(state);
}

/* Cancelled after each single step in turn; and what is done is not done again. */
static void test_resume_step_by_step(void **state)
{
    (void)state;
    material m = material_make();
    for (size_t v = 0; v < SH_COUNT(variants); v++) {
        sh_train_options o = variant_options(&variants[v], &m);
        sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true};
        outcome whole, part;
        must_be_ok(train(&m, variants[v].full, &o, &whole));
        o.checkpoint = &c;
        o.progress = note_step;
        for (uint32_t k = 1; k <= whole.result.steps; k++) {
            diary d = {.cancel_at = k};
            o.progress_arg = &d;
            must_fail(train(&m, variants[v].full, &o, &part), SH_ERR_CANCELLED);
            assert_int_equal(d.n, 1);
            outcome_release(&part);
        }
        for (int again = 0; again < 2; again++) {
            diary d = {0};
            o.progress_arg = &d;
            must_be_ok(train(&m, variants[v].full, &o, &part));
            assert_int_equal(d.n, 0);
            must_be_same_training(&part, &whole);
            outcome_release(&part);
        }
        struct stat st;
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
        assert_int_equal(files(true), 1);
        outcome_release(&whole);
    }
    material_release(&m);
}

/* Without `resume`, or without a file, it begins from the start. */
static void test_from_the_start(void **state)
{
    (void)state;
    material m = material_make();
    outcome whole, again;
    sh_train_options o = options_of(3, 4);
    sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true};
    must_be_ok(train(&m, false, &o, &whole));
    o.checkpoint = &c;
    for (int i = 0; i < 3; i++) {
        c.resume = i == 0;
        must_be_ok(train(&m, false, &o, &again));
        assert_int_equal(again.result.resumed_step, 0);
        must_be_same_training(&again, &whole);
        outcome_release(&again);
    }
    outcome_release(&whole);
    material_release(&m);
}

/* Under a limit of memory batches are cut as the plan allows, which rounds in another way: who goes
 * on keeps to the plan, with more memory or other threads. */
static void test_resume_keeps_the_plan(void **state)
{
    (void)state;
    material m = material_make();
    outcome free_one, whole, part;
    sh_train_options o = options_of(9, 6);
    sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true};
    diary d = {.cancel_at = 3};
    must_be_ok(train(&m, false, &o, &free_one));
    for (o.memory_max = 1u << 20;; o.memory_max -= o.memory_max / 32) {
        must_be_ok(train(&m, false, &o, &whole));
        if (whole.result.plan.micro_sequences < free_one.result.plan.micro_sequences)
            break;
        outcome_release(&whole);
    }
    o.checkpoint = &c;
    o.progress = note_step;
    o.progress_arg = &d;
    must_fail(train(&m, false, &o, &part), SH_ERR_CANCELLED);
    outcome_release(&part);
    o.memory_max = 0;
    o.threads = 2;
    d = (diary){0};
    must_be_ok(train(&m, false, &o, &part));
    assert_int_equal(part.result.plan.micro_sequences, whole.result.plan.micro_sequences);
    must_be_same_training(&part, &whole);
    outcome_release(&part);
    outcome_release(&whole);
    outcome_release(&free_one);
    material_release(&m);
}

/* ---- killed ---- */

static bool tell(void *arg, const sh_train_progress *p)
{
    const int *fd = arg;
    const uint8_t step = (uint8_t)p->step;
    return write(*fd, &step, 1) == 1;
}

/* In a child: trains as far as it gets, and is killed where a fail point says so. */
static void train_and_die(const material *m, bool full, sh_train_options *o, const char *failpoint)
{
    sh_failpoints points = {0};
    sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true, .failpoints = &points};
    outcome out;
    if (failpoint && sh_failpoint_arm_list(&points, failpoint, &err) != SH_OK)
        _exit(3);
    o->checkpoint = &c;
    const sh_status status = train(m, full, o, &out);
    if (status == SH_ERR_CRASHED)
        (void)raise(SIGKILL);
    _exit(status == SH_OK ? 0 : 2);
}

/* Starts one; returns its end of a pipe that says each step. */
static int start_child(const material *m, bool full, const sh_train_options *options,
                       const char *failpoint, pid_t *child)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    *child = fork();
    assert_true(*child >= 0);
    if (*child == 0) {
        sh_train_options o = *options;
        close(ends[0]);
        o.progress = tell;
        o.progress_arg = &ends[1];
        train_and_die(m, full, &o, failpoint);
    }
    close(ends[1]);
    return ends[0];
}

static void must_go_on_to(const material *m, bool full, const sh_train_options *options,
                          const outcome *whole)
{
    sh_train_options o = *options;
    sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true};
    outcome rest;
    o.checkpoint = &c;
    must_be_ok(train(m, full, &o, &rest));
    must_be_same_training(&rest, whole);
    assert_int_equal(files(true), 1); /* what the killed ones left is gone */
    outcome_release(&rest);
}

static void test_killed_at_fail_points(void **state)
{
    (void)state;
    static const char *const points[] = {"half", "before_rename", "after_rename"};
    material m = material_make();
    for (size_t v = 4; v < SH_COUNT(variants); v += 3) {
        const sh_train_options o = variant_options(&variants[v], &m);
        outcome whole;
        must_be_ok(train(&m, variants[v].full, &o, &whole));
        for (size_t p = 0; p < SH_COUNT(points); p++) {
            for (unsigned skip = 0; skip < 3; skip++) {
                char point[64];
                pid_t child;
                int how = 0;
                snprintf(point, sizeof point, "train.checkpoint.%s:%u", points[p], skip);
                const int fd = start_child(&m, variants[v].full, &o, point, &child);
                assert_int_equal(waitpid(child, &how, 0), child);
                close(fd);
                assert_true(WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL);
                assert_int_equal(files(false), (p < 2) + (skip > 0 || p == 2));
                must_go_on_to(&m, variants[v].full, &o, &whole);
            }
        }
        outcome_release(&whole);
    }
    material_release(&m);
}

/* Killed from outside somewhere after a step, again and again, until one gets through. */
static void test_killed_anywhere(void **state)
{
    (void)state;
    material m = material_make();
    sh_rng rng;
    unsigned kills = 0;
    sh_rng_init(&rng, 1, 1, 1);
    for (size_t v = 0; v < SH_COUNT(variants); v++) {
        const sh_train_options o = variant_options(&variants[v], &m);
        outcome whole;
        must_be_ok(train(&m, variants[v].full, &o, &whole));
        for (int tries = 0; tries < 6; tries++) {
            pid_t child;
            int how = 0;
            const int fd = start_child(&m, variants[v].full, &o, NULL, &child);
            uint8_t step;
            for (uint64_t lives = 1 + sh_rng_below(&rng, 2); lives > 0; lives--)
                if (read(fd, &step, 1) <= 0)
                    break;
            (void)kill(child, SIGKILL);
            assert_int_equal(waitpid(child, &how, 0), child);
            close(fd);
            assert_true(WIFSIGNALED(how) || WEXITSTATUS(how) == 0);
            kills += WIFSIGNALED(how);
        }
        must_go_on_to(&m, variants[v].full, &o, &whole);
        outcome_release(&whole);
    }
    assert_true(kills > SH_COUNT(variants));
    material_release(&m);
}

/* ---- refusals ---- */

typedef struct {
    uint8_t *bytes;
    size_t n;
} content;

static content read_file(void)
{
    content c;
    must_be_ok(sh_file_read(path, SIZE_MAX, &c.bytes, &c.n, &err));
    return c;
}

/* Without the syncs that make sh_file_write_atomic slow. */
static void write_file(const uint8_t *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* A checkpoint of step 2 of a training of o. */
static void make_checkpoint(const material *m, bool full, const sh_train_options *options)
{
    sh_train_options o = *options;
    diary d = {.cancel_at = 2};
    outcome out;
    sh_train_checkpoint c = {.path = path, .every_s = 1e9};
    if (options->checkpoint)
        c.identity = options->checkpoint->identity;
    o.checkpoint = &c;
    o.progress = note_step;
    o.progress_arg = &d;
    must_fail(train(m, full, &o, &out), SH_ERR_CANCELLED);
    outcome_release(&out);
}

/* Every byte that is another one, and every length that is shorter; the model stays as it was. */
static void test_damaged(void **state)
{
    (void)state;
    material m = material_make();
    sh_train_options o = variant_options(&variants[6], &m), untrained = options_of(3, 1);
    sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true};
    outcome start, out;
    untrained.lr = 0;
    must_be_ok(train(&m, true, &untrained, &start));
    make_checkpoint(&m, true, &o);
    o.checkpoint = &c;
    content file = read_file();
    const size_t head = 176 + 37 * 8; /* each of its bytes, and some of what follows */
    for (size_t i = 0; i < file.n; i += i < head || i + 40 > file.n ? 1 : 499) {
        const sh_status expected =
            i < 8 ? SH_ERR_INVALID : (i < 16 ? SH_ERR_UNSUPPORTED : SH_ERR_CORRUPT);
        file.bytes[i] ^= (uint8_t)(1u << i % 8);
        write_file(file.bytes, file.n);
        file.bytes[i] ^= (uint8_t)(1u << i % 8);
        const sh_status status = train(&m, true, &o, &out);
        if (status != expected)
            fail_msg("byte %zu is another: %s, expected %s", i, sh_status_name(status),
                     sh_status_name(expected));
        must_say(path);
        must_be_same(&out, &start);
        outcome_release(&out);
    }
    for (size_t n = 0; n < file.n; n += n < head ? 3 : 4001) {
        write_file(file.bytes, n);
        must_fail(train(&m, true, &o, &out), n < 8 ? SH_ERR_INVALID : SH_ERR_CORRUPT);
        must_be_same(&out, &start);
        outcome_release(&out);
    }
    free(file.bytes);
    outcome_release(&start);
    material_release(&m);
}

/* Numbers that no training has, with a checksum that holds. */
static void test_made_to_harm(void **state)
{
    (void)state;
    material m = material_make();
    sh_train_options o = variant_options(&variants[0], &m);
    sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true};
    outcome out;
    make_checkpoint(&m, false, &o);
    o.checkpoint = &c;
    must_be_ok(train(&m, false, &o, &out));
    const size_t n = out.n;
    outcome_release(&out);
    make_checkpoint(&m, false, &o);
    content file = read_file();
    const size_t numbers = 176 + 27 * 8, order = numbers + 17 * 8 + n * sizeof(float);
    const struct {
        size_t at;
        uint64_t value;
        size_t bytes;
    } bad[] = {
        {numbers, 0, 8},                  /* step */
        {numbers, STEPS + 1, 8},          /* step */
        {numbers + 8, 7, 8},              /* updates of A */
        {numbers + 32, SEQUENCES + 1, 8}, /* place in the order */
        {numbers + 40, 0, 8},             /* sequences of a micro-batch */
        {numbers + 120, 5, 8},            /* step of the best, after step 2 */
        {order + 8, SEQUENCES, 4},
        {order + 12, UINT32_MAX, 4},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        uint8_t *changed = malloc(file.n);
        assert_non_null(changed);
        memcpy(changed, file.bytes, file.n);
        memcpy(changed + bad[i].at, &bad[i].value, bad[i].bytes);
        const sh_hash check = sh_sha256(changed, file.n - sizeof check);
        memcpy(changed + file.n - sizeof check, check.b, sizeof check);
        write_file(changed, file.n);
        const sh_status status = train(&m, false, &o, &out);
        if (status != SH_ERR_CORRUPT)
            fail_msg("case %zu: %s", i, sh_status_name(status));
        outcome_release(&out);
        free(changed);
    }
    free(file.bytes);
    material_release(&m);
}

static void must_differ(const material *m, const sh_train_options *o, const char *part)
{
    outcome out;
    must_fail(train(m, false, o, &out), SH_ERR_MISMATCH);
    must_say(part);
    must_say(path);
    outcome_release(&out);
}

static void test_other_options(void **state)
{
    (void)state;
    material m = material_make();
    sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true};
    const sh_train_options same = variant_options(&variants[4], &m);
    make_checkpoint(&m, false, &same);
    sh_train_options o;
#define OTHER(field, value)                                                                        \
    o = same;                                                                                      \
    o.checkpoint = &c;                                                                             \
    o.field = (value);                                                                             \
    must_differ(&m, &o, "the option " #field " (")
    OTHER(lr, 0.125f);
    must_say("(0.300000012 there, 0.125 here)");
    OTHER(beta1, 0.5f);
    OTHER(beta2, 0.5f);
    OTHER(eps, 0.5f);
    OTHER(weight_decay, 0.5f);
    OTHER(clip, 0.5f);
    OTHER(lr_final, 0.5f);
    OTHER(momentum, 0.5f);
    OTHER(proximal, 0.5f);
    OTHER(batch, 4);
    OTHER(steps, STEPS + 1);
    must_say("(8 there, 9 here)");
    OTHER(warmup, 1);
    OTHER(schedule, SH_SCHEDULE_COSINE);
    OTHER(optimizer, SH_ADAMW);
    OTHER(freeze, SH_FREEZE_A);
    OTHER(shuffle_seed, 6);
    OTHER(bf16, true);
    OTHER(accumulate, 2);
    OTHER(state_8bit, true);
    OTHER(heldout_every, 3);
    OTHER(patience, 1);
    OTHER(alternate, 1);
#undef OTHER
    outcome out; /* those that do not change the result */
    o = same;
    o.checkpoint = &c;
    o.threads = 3;
    o.accumulate = 1;
    o.memory_max = 1u << 28;
    must_be_ok(train(&m, false, &o, &out));
    outcome_release(&out);
    material_release(&m);
}

static void test_other_material(void **state)
{
    (void)state;
    material m = material_make();
    sh_train_checkpoint c = {.path = path, .every_s = 1e9, .resume = true, .identity = {{1, 2}}};
    sh_train_options o = variant_options(&variants[4], &m);
    o.checkpoint = &c;
    make_checkpoint(&m, false, &o);
    int32_t *token = (int32_t *)(uintptr_t)m.data.tokens;
    uint8_t *mask = (uint8_t *)(uintptr_t)m.heldout.mask;
    *token ^= 1;
    must_differ(&m, &o, "the training data");
    *token ^= 1;
    m.data.n--;
    must_differ(&m, &o, "the training data");
    m.data.n++;
    mask[7] ^= SH_TRAIN_TARGET;
    must_differ(&m, &o, "the held-out data");
    mask[7] ^= SH_TRAIN_TARGET;
    c.identity.b[31] = 1;
    must_differ(&m, &o, "the base model");
    c.identity.b[31] = 0;
    m.adapter->alpha *= 2;
    must_differ(&m, &o, "the shape");
    m.adapter->alpha /= 2;
    m.adapter->pairs[0].b[0] *= 2;
    must_differ(&m, &o, "what the training begins with");
    m.adapter->pairs[0].b[0] /= 2;
    sh_adapter *adapter = m.adapter;
    m.adapter = small_adapter(&m.config, (const uint32_t[]){4}, 1, 54);
    must_differ(&m, &o, "the shape");
    sh_adapter_destroy(&m.adapter);
    m.adapter = adapter;
    outcome out;
    must_fail(train(&m, true, &o, &out), SH_ERR_MISMATCH); /* of an adapter, not of the model */
    outcome_release(&out);
    must_be_ok(train(&m, false, &o, &out));
    assert_int_equal(out.result.resumed_step, 2);
    outcome_release(&out);
    material_release(&m);
}

static void test_no_checkpoint(void **state)
{
    (void)state;
    material m = material_make();
    sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true};
    sh_train_options o = options_of(3, 3);
    outcome out;
    o.checkpoint = &c;
    c.every_s = -1;
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    outcome_release(&out);
    c.every_s = (double)NAN;
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    outcome_release(&out);
    c.every_s = 0;
    c.path = "";
    must_fail(train(&m, false, &o, &out), SH_ERR_INVALID);
    outcome_release(&out);
    c.path = folder;
    must_fail(train(&m, false, &o, &out), SH_ERR_IO);
    must_say(folder);
    outcome_release(&out);
    char missing[SH_PATH_BYTES];
    snprintf(missing, sizeof missing, "%s/none/here", folder);
    c.path = missing;
    must_fail(train(&m, false, &o, &out), SH_ERR_NOT_FOUND);
    must_say("stopped after step 1");
    must_say(missing);
    outcome_release(&out);
    c.every_s = (double)INFINITY; /* never due */
    must_be_ok(train(&m, false, &o, &out));
    outcome_release(&out);
    material_release(&m);
}

/* ---- no room ---- */

/* Files may be as large as half of a checkpoint: the training stops, what was there is whole,
 * nothing is left beside it, and with room again it ends as if nothing had been. */
static void test_no_room(void **state)
{
    (void)state;
    material m = material_make();
    struct rlimit before, limit;
    outcome whole, out;
    sh_train_options o = variant_options(&variants[2], &m);
    sh_train_checkpoint c = {.path = path, .every_s = 0, .resume = true};
    must_be_ok(train(&m, false, &o, &whole));
    make_checkpoint(&m, false, &o);
    content file = read_file();
    o.checkpoint = &c;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    for (size_t room = 0; room < file.n; room += file.n / 5) {
        limit = before;
        limit.rlim_cur = room;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const sh_status status = train(&m, false, &o, &out);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
        assert_int_equal(status, SH_ERR_IO);
        must_say("stopped after step 3");
        must_say(path);
        must_say(strerror(EFBIG));
        outcome_release(&out);
        assert_int_equal(files(false), 1);
        content after = read_file();
        assert_int_equal(after.n, file.n);
        assert_memory_equal(after.bytes, file.bytes, file.n);
        free(after.bytes);
    }
    (void)signal(SIGXFSZ, handler);
    must_be_ok(train(&m, false, &o, &out));
    assert_int_equal(out.result.resumed_step, 2);
    must_be_same_training(&out, &whole);
    outcome_release(&out);
    outcome_release(&whole);
    free(file.bytes);
    material_release(&m);
}

/* Every allocation in turn fails, with all that a loop can have: an error, and nothing is lost. */
static void test_no_memory(void **state)
{
    (void)state;
    material m = material_make();
    sh_adapter *before = small_adapter(&m.config, (const uint32_t[]){3, 5, 0, 2}, 4, 54);
    sh_train_checkpoint c = {.path = path, .every_s = 1e9};
    sh_train_options o = variant_options(&variants[7], &m);
    sh_train_result result;
    sh_status status = SH_ERR_NO_MEMORY;
    size_t n = 0;
    o.steps = 3;
    o.threads = 2;
    o.accumulate = 2;
    o.proximal = 0.1f;
    o.checkpoint = &c;
    while (status != SH_OK && n < 1000) {
        (void)sh_alloc_fail_after(++n);
        status = sh_lora_train(m.model, m.adapter, &m.data, &o, &result, &err);
        (void)sh_alloc_fail_after(0);
        if (status != SH_OK) {
            assert_int_equal(status, SH_ERR_NO_MEMORY);
            assert_int_equal(files(false), 0);
        }
        for (size_t i = 0; status != SH_OK && i < 2 * SH_LAYER_MATRICES; i++)
            if (before->pairs[i].a)
                assert_memory_equal(m.adapter->pairs[i].a, before->pairs[i].a,
                                    (size_t)before->pairs[i].rank * before->pairs[i].in *
                                        sizeof(float));
    }
    if (n < 20 || n >= 1000)
        fail_msg("training succeeded when allocation %zu was to fail", n);
    sh_adapter_destroy(&before);
    material_release(&m);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_teardown(name, clear)
    const struct CMUnitTest tests[] = {
        TEST(test_resume_after_every_step),
        TEST(test_resume_step_by_step),
        TEST(test_from_the_start),
        TEST(test_resume_keeps_the_plan),
        TEST(test_killed_at_fail_points),
        TEST(test_killed_anywhere),
        TEST(test_damaged),
        TEST(test_made_to_harm),
        TEST(test_other_options),
        TEST(test_other_material),
        TEST(test_no_checkpoint),
        TEST(test_no_room),
        TEST(test_no_memory),
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
