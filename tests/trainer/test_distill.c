/*
 * Distillation: gradients of the mixed loss against central differences of the plain double
 * forward passes, a teacher that is the student, what a student learns, memory, refusals.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/model/tiny.h"
#include "tests/trainer/small.h"
#include "tests/trainer/util.h"
#include "trainer/train.h"

#define STEP 1e-5
/* As in test_gradients.c. */
#define RELATIVE 1e-5
#define ABSOLUTE 5e-8

static sh_error err;

static const uint32_t rank_3[] = {3};

enum { SEQUENCES = 9, LENGTH = 91 };

/* A student without ties, and a teacher of another architecture, width and depth. */
typedef struct {
    sh_model_config config, teacher_config;
    sh_model *model, *teacher;
    sh_train_data data;
    sh_adapter *adapter;
} setup;

static setup setup_make(size_t n, uint32_t length)
{
    setup s = {.config = small_config(false), .teacher_config = small_config_of(SH_ARCH_QWEN3)};
    s.teacher_config.width = 16;
    s.teacher_config.n_layers = 3;
    s.model = small_model(&s.config, SH_TYPE_F32, 61);
    s.teacher = small_model(&s.teacher_config, SH_TYPE_F32, 62);
    s.data = small_data(&s.config, n, length, true, 63);
    for (size_t i = 0; i < n; i++) /* the second half is a document of its own */
        ((uint8_t *)(uintptr_t)s.data.mask)[i * length + length / 2] |= SH_TRAIN_BEGINS;
    s.adapter = small_adapter(&s.config, rank_3, 1, 64);
    return s;
}

static void setup_release(setup *s)
{
    sh_adapter_destroy(&s->adapter);
    small_data_free(&s->data);
    small_model_free(&s->model);
    small_model_free(&s->teacher);
}

static tr_net *open_net(const sh_model *model, const sh_train_data *data)
{
    tr_net *net = NULL;
    must_be_ok(tr_net_create(&model->config, model, UINT64_MAX, data->length - 1, &net, &err));
    return net;
}

static tr_batch_loss gradient_of(const tr_net *net, const sh_train_data *data, tr_mode mode,
                                 const tr_teacher *teacher, float *grad)
{
    tr_batcher *batcher = NULL;
    uint32_t index[SEQUENCES];
    assert_true(data->n <= SEQUENCES);
    for (uint32_t i = 0; i < data->n; i++)
        index[i] = i;
    const tr_batcher_options o = {
        .net = net, .data = data, .mode = mode, .batch = data->n, .teacher = *teacher};
    must_be_ok(tr_batcher_create(&o, &batcher, &err));
    const tr_batch_loss loss = tr_batcher_run(batcher, index, data->n, grad);
    tr_batcher_destroy(&batcher);
    return loss;
}

static float *floats(size_t n)
{
    float *x = sh_alloc_aligned(n * sizeof(*x));
    assert_non_null(x);
    return x;
}

/* ---- gradients ---- */

static void compare(reference *r, const reference_mixture *mixture, const sh_train_data *data,
                    size_t tensor, const float *grad)
{
    double most = 0, worst = 0, *values = r->tensors[tensor].values;
    for (size_t i = 0; i < r->tensors[tensor].n; i += 3) {
        const double kept = values[i];
        values[i] = kept + STEP;
        const double above = reference_mixed_loss(r, mixture, data);
        values[i] = kept - STEP;
        const double below = reference_mixed_loss(r, mixture, data);
        values[i] = kept;
        const double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + RELATIVE * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", r->tensors[tensor].name, worst,
                 most);
}

static void check_full(float weight, float temperature)
{
    setup s = setup_make(2, 7);
    tr_net *student = open_net(s.model, &s.data), *teacher = open_net(s.teacher, &s.data);
    float *grad = floats(student->layout.n);
    reference r, of_teacher;
    reference_init(&r, s.model);
    reference_init(&of_teacher, s.teacher);
    const reference_mixture mixture = {&of_teacher, (double)weight, (double)temperature};
    const tr_batch_loss loss = gradient_of(student, &s.data, TR_GRAD_FULL,
                                           &(tr_teacher){teacher, weight, temperature}, grad);
    const double expected = reference_mixed_loss(&r, &mixture, &s.data);
    must_be_near(loss.loss_sum / (double)loss.n_targets, expected, 2e-6 * expected);
    for (size_t i = 0; i < tr_tensor_count(student); i++) {
        const tr_tensor t = tr_tensor_at(student, i);
        size_t same = 0;
        while (same < r.n_tensors && strcmp(r.tensors[same].name, t.name) != 0)
            same++;
        assert_true(same < r.n_tensors);
        compare(&r, &mixture, &s.data, same, grad + t.at);
    }
    reference_release(&r);
    reference_release(&of_teacher);
    free(grad);
    tr_net_destroy(&student);
    tr_net_destroy(&teacher);
    setup_release(&s);
}

static void test_full_gradients(void **state)
{
    (void)state;
    check_full(0.7f, 2.0f);
    check_full(1.0f, 0.5f);
}

enum { PAIRS = 2 * SH_LAYER_MATRICES };

/* The mixed loss with the adapter's factors moved by `by` along the gradient. */
static double moved_loss(const setup *s, const reference_mixture *mixture, const sh_adapter *grad,
                         double by)
{
    double *a[PAIRS], *b[PAIRS], scales[PAIRS];
    reference r;
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *p = &s->adapter->pairs[i], *g = &grad->pairs[i];
        const size_t n_a = (size_t)p->rank * p->in, n_b = (size_t)p->rank * p->out;
        a[i] = sh_calloc(n_a + n_b, sizeof(double));
        assert_non_null(a[i]);
        b[i] = a[i] + n_a;
        scales[i] = (double)s->adapter->alpha / p->rank;
        for (size_t j = 0; j < n_a; j++)
            a[i][j] = (double)p->a[j] + by * (double)g->a[j];
        for (size_t j = 0; j < n_b; j++)
            b[i][j] = (double)p->b[j] + by * (double)g->b[j];
    }
    reference_init(&r, s->model);
    reference_adapt(&r, &(reference_lora){.shape = s->adapter, .a = a, .b = b, .scales = scales});
    const double loss = reference_mixed_loss(&r, mixture, &s->data);
    reference_release(&r);
    for (size_t i = 0; i < PAIRS; i++)
        free(a[i]);
    return loss;
}

/* Along the gradient g the loss changes by |g|^2. */
static void test_lora_gradient(void **state)
{
    (void)state;
    setup s = setup_make(3, 9);
    tr_net *student = open_net(s.model, &s.data), *teacher = open_net(s.teacher, &s.data);
    sh_adapter *grad = small_adapter(&s.config, rank_3, 1, 1);
    reference of_teacher;
    must_be_ok(tr_net_attach(student, s.adapter, &err));
    float *lora = floats(student->n_lora), *flat = floats(student->n_lora);
    tr_lora_gather(student, s.adapter, lora);
    tr_net_use(student, lora);
    (void)gradient_of(student, &s.data, TR_GRAD_LORA, &(tr_teacher){teacher, 0.6f, 3.0f}, flat);
    tr_lora_scatter(student, flat, grad);
    reference_init(&of_teacher, s.teacher);
    const reference_mixture mixture = {&of_teacher, (double)0.6f, 3.0};
    double squares = 0;
    for (size_t i = 0; i < PAIRS; i++) {
        const sh_lora_pair *g = &grad->pairs[i];
        for (size_t j = 0; j < (size_t)g->rank * g->in; j++)
            squares += (double)g->a[j] * (double)g->a[j];
        for (size_t j = 0; j < (size_t)g->rank * g->out; j++)
            squares += (double)g->b[j] * (double)g->b[j];
    }
    const double change =
        moved_loss(&s, &mixture, grad, STEP) - moved_loss(&s, &mixture, grad, -STEP);
    must_be_near(change / (2 * STEP), squares, 1e-5 * squares);
    reference_release(&of_teacher);
    free(lora);
    free(flat);
    sh_adapter_destroy(&grad);
    tr_net_destroy(&student);
    tr_net_destroy(&teacher);
    setup_release(&s);
}

/* A teacher that is the student has nothing to teach, at any temperature. */
static void test_itself(void **state)
{
    (void)state;
    setup s = setup_make(3, 9);
    tr_net *student = open_net(s.model, &s.data), *teacher = open_net(s.model, &s.data);
    float *grad = floats(student->layout.n);
    for (float t = 0.5f; t <= 8.0f; t *= 2) {
        const tr_batch_loss loss =
            gradient_of(student, &s.data, TR_GRAD_FULL, &(tr_teacher){teacher, 1.0f, t}, grad);
        must_be_near(loss.kl_sum, 0, 0);
        must_be_near(loss.loss_sum, 0, 0);
        assert_true(loss.cross_entropy_sum > 1);
        for (size_t i = 0; i < tr_tensor_count(student); i++) {
            const tr_tensor tensor = tr_tensor_at(student, i);
            for (size_t j = 0; j < tensor.rows * tensor.row; j++)
                if (grad[tensor.at + j] != 0)
                    fail_msg("%s: a gradient of %g, expected 0", tensor.name,
                             (double)grad[tensor.at + j]);
        }
    }
    free(grad);
    tr_net_destroy(&student);
    tr_net_destroy(&teacher);
    setup_release(&s);
}

/* ---- training ---- */

static sh_train_options options_of(const setup *s, uint32_t steps)
{
    return (sh_train_options){.lr = 0.02f,
                              .batch = 4,
                              .steps = steps,
                              .lr_final = 0.1f,
                              .shuffle_seed = 5,
                              .teacher = s->teacher,
                              .distill_weight = 1.0f,
                              .temperature = 2.0f};
}

/* A student of its own size comes near to its teacher; LoRA some way. */
static void test_learns(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, 33);
    sh_train_result first, last;
    sh_full *full = NULL;
    sh_train_options o = options_of(&s, 1);
    o.batch = SEQUENCES;
    must_be_ok(sh_full_from_model(s.model, &full, &err));
    must_be_ok(sh_full_train(full, &s.data, &o, &first, &err));
    must_be_near(first.loss_last, 4 * first.kl_last, 1e-9);
    o.steps = 80;
    must_be_ok(sh_full_train(full, &s.data, &o, &last, &err));
    if (!(last.kl_last > 0 && last.kl_last < 0.2 * first.kl_last))
        fail_msg("KL is %g at first and %g at last", first.kl_last, last.kl_last);
    sh_full_destroy(&full);

    o.steps = 1;
    must_be_ok(sh_lora_train(s.model, s.adapter, &s.data, &o, &first, &err));
    o.steps = 80;
    must_be_ok(sh_lora_train(s.model, s.adapter, &s.data, &o, &last, &err));
    if (!(last.kl_last > 0 && last.kl_last < 0.6 * first.kl_last))
        fail_msg("with LoRA KL is %g at first and %g at last", first.kl_last, last.kl_last);
    setup_release(&s);
}

/* Any number of threads gives the same bytes; a weight of 0 those of no teacher, with its KL. */
static void test_threads(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, LENGTH);
    sh_adapter *trained[5] = {0};
    sh_train_result results[5];
    for (unsigned i = 0; i < 5; i++) {
        sh_train_options o = options_of(&s, 3);
        o.batch = 7;
        o.threads = i;
        o.distill_weight = i < 3 ? 0.5f : 0;
        o.teacher = i < 4 ? s.teacher : NULL;
        trained[i] = small_adapter(&s.config, rank_3, 1, 64);
        must_be_ok(sh_lora_train(s.model, trained[i], &s.data, &o, &results[i], &err));
        const double w = (double)o.distill_weight, kl = results[i].kl_last;
        must_be_near(results[i].loss_last, (1 - w) * results[i].cross_entropy_last + w * 4 * kl,
                     1e-12);
        assert_true(i < 4 ? kl > 0 : kl == 0);
    }
    assert_true(same_adapter(trained[0], trained[1]) && same_adapter(trained[0], trained[2]));
    assert_true(results[0].loss_last == results[2].loss_last);
    assert_false(same_adapter(trained[0], trained[3]));
    must_be_near(results[3].loss_last, results[4].loss_last, 1e-5);
    for (unsigned i = 0; i < 5; i++)
        sh_adapter_destroy(&trained[i]);
    setup_release(&s);
}

/* ---- memory ---- */

typedef struct {
    double loss;
    sh_tile_plan plan;
} plan_result;

static sh_status plan_run(const setup *s, uint64_t memory_max, bool taught, plan_result *out)
{
    tr_net *student = NULL, *teacher = NULL;
    tr_batcher *batcher = NULL;
    uint32_t index[SEQUENCES];
    const size_t positions = s->data.length - 1;
    must_be_ok(tr_net_create(&s->config, s->model, 0, positions, &student, &err));
    must_be_ok(tr_net_create(&s->teacher_config, s->teacher, 0, positions, &teacher, &err));
    student->tile_floats = teacher->tile_floats = 512;
    must_be_ok(tr_net_attach(student, s->adapter, &err));
    float *lora = floats(student->n_lora), *grad = floats(student->n_lora);
    tr_lora_gather(student, s->adapter, lora);
    tr_net_use(student, lora);
    const tr_batcher_options o = {.net = student,
                                  .data = &s->data,
                                  .mode = TR_GRAD_LORA,
                                  .batch = s->data.n,
                                  .threads = 2,
                                  .memory_max = memory_max,
                                  .teacher = {taught ? teacher : NULL, 0.5f, 2.0f}};
    for (uint32_t i = 0; i < SEQUENCES; i++)
        index[i] = i;
    const sh_status status = tr_batcher_create(&o, &batcher, &err);
    if (status == SH_OK) {
        out->plan = tr_batcher_plan(batcher);
        out->loss = tr_batcher_run(batcher, index, s->data.n, grad).loss_sum;
        tr_batcher_destroy(&batcher);
    }
    free(lora);
    free(grad);
    tr_net_destroy(&student);
    tr_net_destroy(&teacher);
    return status;
}

/* The teacher's memory is in the plan, down to the byte that the refusal asks for. */
static void test_memory(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, LENGTH);
    plan_result alone, whole, less;
    must_be_ok(plan_run(&s, 0, false, &alone));
    must_be_ok(plan_run(&s, 0, true, &whole));
    assert_true(whole.plan.bytes > alone.plan.bytes);
    uint64_t limit = whole.plan.bytes;
    unsigned plans = 0;
    sh_status status;
    while ((status = plan_run(&s, --limit, true, &less)) == SH_OK) {
        assert_true(less.plan.bytes <= limit);
        must_be_near(less.loss, whole.loss, 1e-5 * whole.loss);
        limit = less.plan.bytes;
        plans++;
    }
    assert_int_equal(status, SH_ERR_LIMIT);
    assert_true(plans > 3);
    char needed[32];
    snprintf(needed, sizeof(needed), "need %llu", (unsigned long long)(limit + 1));
    must_say(needed);
    setup_release(&s);
}

/* Every allocation in turn fails: an error, nothing lost, nothing changed. */
static void test_no_memory(void **state)
{
    (void)state;
    setup s = setup_make(SEQUENCES, LENGTH);
    sh_train_options o = options_of(&s, 1);
    o.threads = 2;
    assert_true(small_train_without_memory(s.model, s.adapter, &s.data, &o) >= 15);
    setup_release(&s);
}

/* ---- refusals ---- */

static void must_refuse(const setup *s, const sh_train_options *o, sh_status status,
                        const char *says)
{
    sh_train_result result = {.loss_first = -1};
    must_fail(sh_lora_train(s->model, s->adapter, &s->data, o, &result, &err), status);
    must_say(says);
    assert_true(result.loss_first == -1);
}

static void test_refusals(void **state)
{
    (void)state;
    setup s = setup_make(2, 9);
    sh_train_options o = options_of(&s, 1);
    o.distill_weight = 1.5f;
    must_refuse(&s, &o, SH_ERR_INVALID, "weight of distillation of 1.5");
    o.distill_weight = NAN;
    must_refuse(&s, &o, SH_ERR_INVALID, "weight of distillation");
    o = options_of(&s, 1);
    o.temperature = 0.001f;
    must_refuse(&s, &o, SH_ERR_INVALID, "temperature of 0.001");
    o.temperature = NAN;
    must_refuse(&s, &o, SH_ERR_INVALID, "temperature");
    o = options_of(&s, 1);
    o.teacher = NULL;
    must_refuse(&s, &o, SH_ERR_INVALID, "no teacher");

    o = options_of(&s, 1);
    s.teacher->config.context = 7;
    must_refuse(&s, &o, SH_ERR_LIMIT, "teacher's context is 7");
    s.teacher->config.context = 8;
    s.teacher->config.vocab++;
    must_refuse(&s, &o, SH_ERR_MISMATCH, "24 tokens, the student has 23");
    s.teacher->config.vocab--;
    ((float *)(uintptr_t)s.teacher->layers[2].m[SH_FFN_UP].data)[3] = NAN;
    /* small models' matrices are all called "small" */
    must_refuse(&s, &o, SH_ERR_INVALID, "(the teacher's blk.2.ffn_up.weight is not finite)");
    setup_release(&s);
}

/* Files of the same sizes that spell one token otherwise. */
static void test_vocabularies(void **state)
{
    (void)state;
    char paths[2][64];
    sh_model *models[2] = {0};
    sh_adapter *adapter = NULL;
    sh_full *full = NULL;
    for (uint64_t i = 0; i < 2; i++) {
        tiny_options tiny = tiny_defaults(i + 1);
        tiny.token_from = i == 1 ? "<|user|>" : NULL;
        tiny.token_to = i == 1 ? "<|USER|>" : NULL;
        snprintf(paths[i], sizeof(paths[i]), "/tmp/test_distill.%ld.%d.gguf", (long)getpid(),
                 (int)i);
        must_be_ok(tiny_write(&tiny, paths[i], &err));
        must_be_ok(sh_model_open(paths[i], &models[i], &err));
    }
    sh_train_data data = small_data(&models[0]->config, 2, 9, false, 3);
    sh_train_options o = {
        .lr = 0.01f, .batch = 2, .steps = 1, .teacher = models[1], .distill_weight = 0.5f};
    sh_train_result result;
    char token[32];
    snprintf(token, sizeof(token), "token %u of", tiny_vocab() - 1);
    must_be_ok(sh_lora_initialize(&models[0]->config, 1, 2, 4.0f, &adapter, &err));
    must_fail(sh_lora_train(models[0], adapter, &data, &o, &result, &err), SH_ERR_MISMATCH);
    must_say(token);
    must_be_ok(sh_full_from_model(models[0], &full, &err));
    must_fail(sh_full_train(full, &data, &o, &result, &err), SH_ERR_MISMATCH);
    must_say(token);
    o.teacher = models[0];
    must_be_ok(sh_lora_train(models[0], adapter, &data, &o, &result, &err));
    must_be_near(result.kl_last, 0, 0); /* B is 0 at first */
    must_be_ok(sh_full_train(full, &data, &o, &result, &err));
    sh_full_destroy(&full);
    sh_adapter_destroy(&adapter);
    small_data_free(&data);
    for (size_t i = 0; i < 2; i++) {
        sh_model_close(&models[i]);
        assert_int_equal(unlink(paths[i]), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_gradients), cmocka_unit_test(test_lora_gradient),
        cmocka_unit_test(test_itself),         cmocka_unit_test(test_learns),
        cmocka_unit_test(test_threads),        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_no_memory),      cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_vocabularies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
