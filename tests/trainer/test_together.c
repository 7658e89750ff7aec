/*
 * Options that were made apart, used together through trainer.h: trainings that go on from a
 * checkpoint, what a teacher and a held-out part see, what all of it takes of memory.
 */
#include <malloc.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/trainer/small.h"
#include "tests/trainer/util.h"

enum { SEQUENCES = 7, LENGTH = 33, STEPS = 6, RANK = 8 };

static sh_error err;

typedef struct {
    sh_model_config config, teacher_config;
    sh_model *model, *teacher;
    sh_train_data data, heldout;
} setup;

/* An output matrix of its own; rows are whole blocks of Q8_0 and Q4_0. */
static setup setup_make(void)
{
    setup s = {.config = small_config(false), .teacher_config = small_config_of(SH_ARCH_QWEN3)};
    s.config.width = 64;
    s.config.head_size = 16;
    s.config.ffn = 192;
    s.config.vocab = s.teacher_config.vocab = 608;
    s.model = small_model(&s.config, SH_TYPE_F32, 91);
    s.teacher = small_model(&s.teacher_config, SH_TYPE_F32, 92);
    s.data = small_data(&s.config, SEQUENCES, LENGTH, true, 93);
    s.heldout = small_data(&s.config, 3, LENGTH + 8, true, 94);
    return s;
}

static void setup_release(setup *s)
{
    small_data_free(&s->data);
    small_data_free(&s->heldout);
    small_model_free(&s->model);
    small_model_free(&s->teacher);
}

/* Random pairs, and one of the output matrix. */
static sh_adapter *adapter_make(const setup *s)
{
    sh_adapter *adapter = small_adapter(&s->config, (const uint32_t[]){RANK, 3, RANK}, 3, 95);
    must_be_ok(sh_lora_add_output(adapter, &s->config, 96, 5, &err));
    return adapter;
}

static bool remember(void *arg, const sh_train_progress *p)
{
    return p->step != *(const uint32_t *)arg;
}

static char path[SH_PATH_BYTES];

static int enter(void **state)
{
    (void)state;
    const char *temp = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/shoal-together-XXXXXX", temp && temp[0] ? temp : "/tmp");
    const int fd = mkstemp(path);
    if (fd < 0)
        return -1;
    close(fd);
    return unlink(path);
}

static int leave(void **state)
{
    (void)state;
    (void)unlink(path);
    return 0;
}

/* ---- what is trained ---- */

enum { VARIANTS = 5 };

static sh_train_options variant(const setup *s, unsigned v)
{
    sh_train_options o = {
        .lr = 0.02f, .batch = 3, .steps = STEPS, .warmup = 2, .shuffle_seed = 5, .clip = 1};
    o.heldout = v % 2 == 0 ? &s->heldout : NULL;
    o.heldout_every = v % 2 == 0 ? 2 : 0;
    o.patience = v == 4 ? 9 : 0;
    o.accumulate = v == 3 ? 1 : 2;
    o.teacher = v == 1 || v == 2 ? s->teacher : NULL;
    o.distill_weight = o.teacher ? 0.6f : 0;
    o.temperature = o.teacher ? 2 : 0;
    o.quantize_aware = v == 2 ? SH_TYPE_Q8_0 : v == 3 ? SH_TYPE_Q4_0 : SH_TYPE_F32;
    o.dropout = o.quantize_aware == SH_TYPE_F32 ? 0.3f : 0;
    o.dropout_seed = 6;
    o.bf16 = v == 1 || v == 3;
    o.rslora = v > 1;
    o.alphas[SH_ATTN_V] = v == 4 ? 2 : 0;
    o.state_8bit = v == 1 || v == 4;
    o.proximal = v == 0 || v == 4 ? 0.1f : 0;
    o.alternate = v == 1 || v == 4 ? 2 : 0;
    o.freeze = v == 1 ? SH_FREEZE_B : SH_FREEZE_NONE;
    return o;
}

static void train_variant(const setup *s, const sh_train_options *o, sh_status wanted,
                          sh_adapter **adapter, sh_train_result *result)
{
    *adapter = adapter_make(s);
    const sh_status status = sh_lora_train(s->model, *adapter, &s->data, o, result, &err);
    if (status != wanted)
        fail_msg("%s, expected %s (%s)", sh_status_name(status), sh_status_name(wanted), err.text);
}

/* Cancelled after each step, and gone on with by other threads and under a limit of memory. */
static void test_resume(void **state)
{
    (void)state;
    setup s = setup_make();
    for (unsigned v = 0; v < VARIANTS; v++) {
        sh_train_options o = variant(&s, v);
        sh_adapter *whole, *part;
        sh_train_result result, again;
        train_variant(&s, &o, SH_OK, &whole, &result);
        for (uint32_t k = 1; k < STEPS; k++) {
            sh_train_checkpoint c = {.path = path, .every_s = (double)INFINITY, .resume = true};
            uint32_t cancel_at = k;
            o = variant(&s, v);
            o.checkpoint = &c;
            o.progress = remember;
            o.progress_arg = &cancel_at;
            train_variant(&s, &o, SH_ERR_CANCELLED, &part, &again);
            sh_adapter_destroy(&part);
            cancel_at = 0;
            o.threads = 2;
            o.memory_max = 1u << 24;
            train_variant(&s, &o, SH_OK, &part, &again);
            assert_int_equal(again.resumed_step, k);
            if (!same_adapter(whole, part))
                fail_msg("variant %u: other bytes when it goes on after step %u", v, k);
            must_be_near(again.loss_last, result.loss_last, 0);
            sh_adapter_destroy(&part);
            assert_int_equal(unlink(path), 0);
        }
        sh_adapter_destroy(&whole);
    }
    setup_release(&s);
}

/* In turns that begin with B frozen, B is trained as well, and given back. */
static void test_turns_given_back(void **state)
{
    (void)state;
    setup s = setup_make();
    sh_adapter *start = adapter_make(&s), *adapter;
    sh_train_options o = {
        .lr = 0.02f, .batch = 3, .steps = 2, .freeze = SH_FREEZE_B, .alternate = 1};
    sh_train_result result;
    train_variant(&s, &o, SH_OK, &adapter, &result);
    for (size_t i = 0; i < sh_lora_pair_count(s.config.n_layers); i++) {
        const sh_lora_pair *x = &start->pairs[i], *y = &adapter->pairs[i];
        assert_memory_not_equal(x->b, y->b, (size_t)x->rank * x->out * sizeof(float));
    }
    sh_adapter_destroy(&start);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

/* An adapter of the output matrix alone, with B = 0, whose scale is all that is another. */
static void test_scale_of_output(void **state)
{
    (void)state;
    setup s = setup_make();
    sh_adapter *adapter = NULL;
    sh_train_checkpoint c = {.path = path, .resume = true};
    sh_train_options o = {.lr = 0.02f, .batch = 3, .steps = 2, .checkpoint = &c};
    sh_train_result result;
    uint32_t cancel_at = 1;
    o.progress = remember;
    o.progress_arg = &cancel_at;
    must_be_ok(sh_adapter_create_empty(&s.config, 6, &adapter, &err));
    must_be_ok(sh_lora_add_output(adapter, &s.config, 96, 4, &err));
    must_fail(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err), SH_ERR_CANCELLED);
    o.rslora = true;
    must_fail(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err), SH_ERR_MISMATCH);
    o.rslora = false;
    must_be_ok(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err));
    assert_int_equal(result.resumed_step, 1);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

/* A student that is seen as quantized is not its own teacher, who stays as it is. */
static void test_teacher_is_not_quantized(void **state)
{
    (void)state;
    setup s = setup_make();
    sh_full *full = NULL;
    sh_train_options o = {
        .lr = 0, .batch = SEQUENCES, .steps = 1, .teacher = s.model, .distill_weight = 1};
    sh_train_result itself, quantized;
    must_be_ok(sh_full_from_model(s.model, &full, &err));
    must_be_ok(sh_full_train(full, &s.data, &o, &itself, &err));
    must_be_near(itself.kl_last, 0, 1e-9);
    o.quantize_aware = SH_TYPE_Q4_0;
    must_be_ok(sh_full_train(full, &s.data, &o, &quantized, &err));
    assert_true(quantized.kl_last > 1e-4);
    sh_full_destroy(&full);
    setup_release(&s);
}

/* The loss of the held-out part is that of an evaluation of what remains: without dropout and
 * teacher, as quantized as the training saw it. */
static void test_heldout(void **state)
{
    (void)state;
    setup s = setup_make();
    for (unsigned v = 0; v < VARIANTS; v++) {
        sh_train_options o = variant(&s, v);
        sh_adapter *adapter;
        sh_train_result result;
        double nll = 0;
        o.heldout = &s.heldout;
        o.heldout_every = STEPS;
        o.bf16 = false;
        train_variant(&s, &o, SH_OK, &adapter, &result);
        const sh_train_limits limits = {.quantize_aware = o.quantize_aware};
        must_be_ok(sh_train_evaluate(s.model, adapter, &s.heldout, &limits, &nll, &err));
        must_be_near(nll, result.heldout_last, 1e-4 * nll);
        sh_adapter_destroy(&adapter);
    }
    setup_release(&s);
}

/* Of a base that is read where it lies, too. */
static void test_names_weights(void **state)
{
    (void)state;
    setup s = setup_make();
    static const char *const names[] = {"output.weight", "token_embd.weight", "output_norm.weight",
                                        "blk.1.ffn_norm.weight"};
    float *const bad[] = {
        (float *)(uintptr_t)s.model->output.data, (float *)(uintptr_t)s.model->token_embd.data,
        (float *)(uintptr_t)s.model->output_norm, (float *)(uintptr_t)s.model->layers[1].ffn_norm};
    sh_adapter *adapter = adapter_make(&s);
    sh_train_options o = {.lr = 0.02f, .batch = SEQUENCES, .steps = 1};
    sh_train_result result;
    for (unsigned copied = 0; copied < 2; copied++) {
        o.memory_max = copied ? 0 : 2u << 20; /* a quarter is too little for a copy */
        for (size_t i = 0; i < SH_COUNT(bad); i++) {
            const float before = bad[i][3];
            for (size_t t = 0; t < (i == 1 ? s.config.vocab : 1); t++) /* of all tokens */
                bad[i][t * s.config.width + 3] = NAN;
            must_fail(sh_lora_train(s.model, adapter, &s.data, &o, &result, &err), SH_ERR_INVALID);
            must_say(names[i]);
            for (size_t t = 0; t < (i == 1 ? s.config.vocab : 1); t++)
                bad[i][t * s.config.width + 3] = before;
        }
    }
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

/* ---- memory ---- */

#define SLACK (24u << 10) /* what the allocator adds, and structs; less than any vector of it */

static size_t used_now(void)
{
    const struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* Sanitizers have allocators of their own. */
static bool counts_memory(void)
{
    const size_t before = used_now();
    void *volatile probe = sh_calloc(1, 4 * SLACK);
    const bool counts = used_now() >= before + 4 * SLACK;
    free(probe);
    if (!counts)
        print_message("skipped: this allocator does not say what is used\n");
    return counts;
}

typedef struct {
    size_t before, most;
} usage;

static bool note_used(void *arg, const sh_train_progress *p)
{
    usage *u = arg;
    (void)p;
    u->most = SH_MAX(u->most, used_now() - u->before);
    return true;
}

static sh_status use(const setup *s, bool full, sh_train_options *o, usage *u)
{
    sh_adapter *adapter = adapter_make(s);
    sh_full *model = NULL;
    sh_train_result result;
    o->progress = note_used;
    o->progress_arg = u;
    *u = (usage){.before = used_now()};
    sh_status status;
    if (full) {
        must_be_ok(sh_full_from_model(s->model, &model, &err));
        status = sh_full_train(model, &s->data, o, &result, &err);
    } else {
        status = sh_lora_train(s->model, adapter, &s->data, o, &result, &err);
    }
    sh_full_destroy(&model);
    sh_adapter_destroy(&adapter);
    if (status != SH_OK && status != SH_ERR_LIMIT)
        fail_msg("%s (%s)", sh_status_name(status), err.text);
    return status;
}

/* Under the least limit that is taken, and on the way there, no more is in use than it says. */
static void check_limit(const setup *s, bool full, unsigned v, sh_train_options *o)
{
    uint64_t low = 0, high = 1u << 26; /* refused; taken */
    usage u;
    while (high - low > 256) {
        o->memory_max = low + (high - low) / 2;
        if (use(s, full, o, &u) != SH_OK) {
            low = o->memory_max;
            continue;
        }
        high = o->memory_max;
        if (u.most > high + SLACK)
            fail_msg("variant %u, %s: %zu bytes in use under a limit of %llu", v,
                     full ? "full" : "LoRA", u.most, (unsigned long long)high);
    }
}

static void test_memory(void **state)
{
    (void)state;
    setup s = setup_make();
    usage u;
    if (!counts_memory()) {
        setup_release(&s);
        skip();
    }
    for (unsigned v = 0; v < VARIANTS; v++) {
        sh_train_options o = variant(&s, v);
        o.steps = 1;
        must_be_ok(use(&s, false, &o, &u)); /* what a library allocates once */
        check_limit(&s, false, v, &o);
        o.dropout = 0;
        o.rslora = false;
        o.alternate = 0;
        o.freeze = SH_FREEZE_NONE;
        o.alphas[SH_ATTN_V] = 0;
        check_limit(&s, true, v, &o);
    }
    setup_release(&s);
}

static uint64_t least_to_evaluate(const setup *s, const sh_adapter *adapter)
{
    uint64_t low = 0, high = 1u << 26;
    while (high - low > 1) {
        const sh_train_limits limits = {.memory_max = low + (high - low) / 2};
        double nll;
        const sh_status status =
            sh_train_evaluate(s->model, adapter, &s->data, &limits, &nll, &err);
        if (status == SH_OK) {
            high = limits.memory_max;
        } else {
            assert_int_equal(status, SH_ERR_LIMIT);
            low = limits.memory_max;
        }
    }
    return high;
}

/* An adapter takes its memory of an evaluation's too. */
static void test_memory_of_evaluation(void **state)
{
    (void)state;
    setup s = setup_make();
    sh_adapter *adapter = adapter_make(&s);
    uint64_t bytes = 0;
    for (size_t i = 0; i < sh_lora_pair_count(s.config.n_layers); i++)
        bytes += (uint64_t)adapter->pairs[i].rank * (adapter->pairs[i].in + adapter->pairs[i].out) *
                 sizeof(float);
    assert_true(least_to_evaluate(&s, adapter) >= least_to_evaluate(&s, NULL) + bytes);
    sh_adapter_destroy(&adapter);
    setup_release(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_turns_given_back),
        cmocka_unit_test_setup_teardown(test_scale_of_output, enter, leave),
        cmocka_unit_test(test_teacher_is_not_quantized),
        cmocka_unit_test(test_heldout),
        cmocka_unit_test(test_names_weights),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_memory_of_evaluation),
    };
    return cmocka_run_group_tests(tests, enter, leave);
}
