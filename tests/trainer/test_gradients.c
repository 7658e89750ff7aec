/*
 * Gradients against central differences of an independent double-precision forward pass. The
 * differences themselves are good to about 1e-9; what is measured is float32 rounding.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "shared/model/synth.h"
#include "tests/trainer/small.h"
#include "tests/trainer/util.h"
#include "trainer/train.h"

#define STEP 1e-5
/* Against the largest gradient of the tensor: float32 sums over some 100 rows with 2^-24 each. */
#define RELATIVE         1e-5
#define RELATIVE_TRAINED 1e-4 /* B is rounded to its scale, inputs are larger: seen are 3e-5 */
/* Gradients of the residual stream are sums of terms of about 0.1; how they are rounded is the BLAS
 * kernels': beyond RELATIVE 1.1e-7 was seen with Nehalem's, 8e-8 with SkylakeX's, 5e-8 at most with
 * Haswell's. */
#define ABSOLUTE 1.5e-7

static sh_error err;

/* Compares every stride-th value of a tensor's gradient. */
static void compare(reference *r, const sh_train_data *data, const char *name, double *values,
                    const float *grad, size_t n, size_t stride)
{
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i += stride) {
        double kept = values[i];
        values[i] = kept + STEP;
        double above = reference_loss(r, data);
        values[i] = kept - STEP;
        double below = reference_loss(r, data);
        values[i] = kept;
        double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + RELATIVE * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", name, worst, most);
}

static void check_opened_model(const sh_model *model, const sh_train_data *data, size_t stride)
{
    sh_full *full = NULL;
    reference r;
    double loss = 0;
    reference_init(&r, model);
    must_be_ok(sh_full_from_model(model, &full, &err));
    must_be_ok(sh_full_gradient(full, data, &loss, &err));
    double expected = reference_loss(&r, data);
    if (!(fabs(loss - expected) <= 1e-6 * expected))
        fail_msg("loss is %.9g, expected %.9g", loss, expected);
    for (size_t i = 0; i < r.n_tensors; i++) {
        size_t count = 0;
        const float *grad = sh_full_grad(full, r.tensors[i].name, &count);
        if (!grad || count != r.tensors[i].n)
            fail_msg("%s: %zu values, expected %zu", r.tensors[i].name, count, r.tensors[i].n);
        compare(&r, data, r.tensors[i].name, r.tensors[i].values, grad, count, stride);
    }
    reference_release(&r);
    sh_full_destroy(&full);
}

static void check_full_model(const sh_model_config *config, const sh_train_data *data,
                             size_t stride)
{
    sh_model *model = small_model(config, SH_TYPE_F32, 7);
    check_opened_model(model, data, stride);
    small_model_free(&model);
}

static void check_full(bool tied, size_t n, uint32_t length, bool masked, size_t stride)
{
    const sh_model_config config = small_config(tied);
    sh_train_data data = small_data(&config, n, length, masked, 11);
    check_full_model(&config, &data, stride);
    small_data_free(&data);
}

/* Biases, norms of heads, RoPE scaled, with its pairs a half apart and, of llama, side by side;
 * with an output of its own and without. */
static sh_model_config architecture(sh_arch arch, bool tied)
{
    sh_model_config config = small_config_of(arch);
    config.rope_halves = arch != SH_ARCH_LLAMA;
    config.tied_output = tied;
    return config;
}

static void test_full_architectures(void **state)
{
    (void)state;
    for (sh_arch arch = SH_ARCH_LLAMA; arch <= SH_ARCH_QWEN3; arch++) {
        for (int tied = 0; tied < 2; tied++) {
            const sh_model_config config = architecture(arch, tied);
            sh_train_data data = small_data(&config, 2, 7, false, 11);
            check_full_model(&config, &data, 3);
            small_data_free(&data);
        }
    }
}

/* The trainer's loss of files of every form of RoPE is the engine's, and gradients are those of
 * the angles that the file was read with. */
static void test_files(void **state)
{
    (void)state;
    static const struct {
        sh_arch arch;
        sh_rope_scaling rope;
        bool freqs, tied;
    } cases[] = {
        {SH_ARCH_LLAMA, SH_ROPE_PLAIN, false, false}, {SH_ARCH_LLAMA, SH_ROPE_LINEAR, false, true},
        {SH_ARCH_LLAMA, SH_ROPE_YARN, false, false},  {SH_ARCH_LLAMA, SH_ROPE_PLAIN, true, true},
        {SH_ARCH_QWEN2, SH_ROPE_PLAIN, false, true},  {SH_ARCH_QWEN2, SH_ROPE_LINEAR, false, false},
        {SH_ARCH_QWEN3, SH_ROPE_PLAIN, false, false}, {SH_ARCH_QWEN3, SH_ROPE_YARN, false, true},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char path[] = "/tmp/shoal-gradients-XXXXXX";
        const int fd = mkstemp(path);
        sh_model *model = NULL;
        sh_loss engine = {0};
        double nll = 0;
        const sh_synth_shape shape = {"small", cases[i].arch, 2,    16, 4, 2, 8, 24, 300,
                                      32,      cases[i].tied, 50.0f}; /* low frequencies matter */
        const sh_synth_options synth = {.shape = &shape,
                                        .type = SH_TYPE_F32,
                                        .seed = 50 + i,
                                        .sigma = 0.3f,
                                        .rope = cases[i].rope,
                                        .rope_factor = 4,
                                        .rope_freqs = cases[i].freqs};
        assert_true(fd >= 0);
        close(fd);
        must_be_ok(sh_synth_model(&synth, path, &err));
        must_be_ok(sh_model_open(path, &model, &err));
        unlink(path);
        sh_train_data data = small_data(&model->config, 1, 13, false, 11);
        must_be_ok(sh_model_loss(model, NULL, data.tokens, data.length, data.length, false, &engine,
                                 &err));
        must_be_ok(sh_train_evaluate(model, NULL, &data, NULL, &nll, &err));
        must_be_near(nll, engine.nll_sum / (double)engine.n_scored, 1e-5 * nll);
        check_opened_model(model, &data, 41);
        small_data_free(&data);
        sh_model_close(&model);
    }
}

/* Documents in one sequence, their borders at, before and behind a block of queries. */
static void test_full_documents(void **state)
{
    (void)state;
    static const uint32_t borders[] = {1, 2, 30, 64, 71, 90};
    const sh_model_config config = small_config(true);
    sh_train_data data = small_data(&config, 2, 91, true, 11);
    for (size_t i = 0; i < SH_COUNT(borders); i++)
        ((uint8_t *)(uintptr_t)data.mask)[(i % 2) * 91 + borders[i]] |= SH_TRAIN_BEGINS;
    check_full_model(&config, &data, 37);
    small_data_free(&data);
}

static void test_full_tied(void **state)
{
    (void)state;
    check_full(true, 3, 7, false, 1);
}

static void test_full_untied_masked(void **state)
{
    (void)state;
    check_full(false, 3, 7, true, 1);
}

/* More positions than a block of attention queries has. */
static void test_full_long(void **state)
{
    (void)state;
    check_full(true, 1, 91, false, 37);
}

/* The reference's weights are W + scale·B·A: perturbing A or B means forming them again. */
typedef struct {
    const sh_model *model;
    const sh_train_data *data;
    reference_lora lora;
    double relative;
    size_t stride;
} lora_case;

static double lora_loss(const lora_case *c)
{
    reference r;
    reference_init(&r, c->model);
    reference_adapt(&r, &c->lora);
    double loss = reference_loss(&r, c->data);
    reference_release(&r);
    return loss;
}

static double *to_double(const float *x, size_t n)
{
    double *y = sh_calloc(n, sizeof(*y));
    assert_non_null(y);
    for (size_t i = 0; i < n; i++)
        y[i] = (double)x[i];
    return y;
}

static void compare_lora(const lora_case *c, const char *name, double *values, const float *grad,
                         size_t n)
{
    double most = 0, worst = 0;
    for (size_t i = 0; i < n; i += c->stride) {
        double kept = values[i];
        values[i] = kept + STEP;
        double above = lora_loss(c);
        values[i] = kept - STEP;
        double below = lora_loss(c);
        values[i] = kept;
        double expected = (above - below) / (2 * STEP);
        most = fmax(most, fabs(expected));
        worst = fmax(worst, fabs(expected - (double)grad[i]));
    }
    if (!(most > 0) || !(worst <= ABSOLUTE + c->relative * most))
        fail_msg("%s: gradients differ by %g, the largest is %g", name, worst, most);
}

/* ---- a training's own scales, and its dropout ---- */

#define DROPOUT_STEP 5

/* Masks of all groups: at[layer * TR_GROUPS + g] is [sequences * positions, in]. */
typedef struct {
    float *at[2 * TR_GROUPS];
    size_t in[2 * TR_GROUPS], positions;
} masks;

/* What ones become. */
static void masks_make(masks *m, const tr_net *net, const sh_train_data *data)
{
    tr_work *work = NULL;
    const tr_work_shape shape = {
        .sequences = data->n, .positions = data->length - 1, .logit_rows = 1};
    must_be_ok(tr_work_create(net, &shape, &work, &err));
    m->positions = shape.positions;
    for (size_t i = 0; i < SH_COUNT(m->at); i++) {
        const tr_place place = {
            .layer = i / TR_GROUPS, .g = i % TR_GROUPS, .rows = data->n * m->positions};
        const size_t in = net->groups[place.g].in, n = place.rows * in;
        m->in[i] = in;
        m->at[i] = sh_calloc(n, sizeof(float));
        assert_non_null(m->at[i]);
        for (size_t j = 0; j < n; j++)
            m->at[i][j] = 1.0f;
        tr_drop(net, work, &place, m->at[i], m->at[i]);
    }
    tr_work_destroy(&work);
}

static const float *mask_of(const void *arg, size_t pair, size_t sequence, size_t position)
{
    const masks *m = arg;
    size_t g, part;
    tr_matrix_group(pair % SH_LAYER_MATRICES, &g, &part);
    const size_t i = pair / SH_LAYER_MATRICES * TR_GROUPS + g;
    return m->at[i] + (sequence * m->positions + position) * m->in[i];
}

/* Loss and gradient of a training's first batch, in its own parametrisation; `at` becomes where it
 * begins. */
static void training_gradient(const lora_case *c, const sh_train_options *options, masks *m,
                              sh_adapter *at, sh_adapter *grad, double *loss)
{
    tr_net *nets[2] = {0}; /* with the training's scales, and with the adapter's */
    for (size_t i = 0; i < 2; i++) {
        must_be_ok(tr_net_create(&c->model->config, c->model, TR_COPY_BYTES, c->data->length - 1,
                                 &nets[i], &err));
        must_be_ok(tr_net_attach(nets[i], at, &err));
    }
    float *lora = sh_alloc_aligned(nets[0]->n_lora * sizeof(*lora));
    float *values = sh_alloc_aligned(nets[0]->n_lora * sizeof(*values));
    assert_true(lora && values);
    must_be_ok(tr_net_set_lora(nets[0], at, options, &err));
    nets[0]->dropout.step = DROPOUT_STEP;
    tr_lora_gather(nets[0], at, lora);
    tr_net_use(nets[0], lora);
    must_be_ok(tr_gradient(nets[0], c->data, TR_GRAD_LORA, values, loss, &err));
    tr_lora_scatter(nets[1], lora, at);
    tr_lora_scatter(nets[1], values, grad);
    if (options->dropout > 0)
        masks_make(m, nets[0], c->data);
    free(lora);
    free(values);
    tr_net_destroy(&nets[0]);
    tr_net_destroy(&nets[1]);
}

static double scale_of(const sh_train_options *o, const sh_adapter *adapter, size_t i)
{
    const float own = o->alphas[i % SH_LAYER_MATRICES];
    const double rank = adapter->pairs[i].rank, alpha = (double)(own > 0 ? own : adapter->alpha);
    return alpha / (o->rslora ? sqrt(rank) : rank);
}

/* options NULL: sh_lora_gradient. */
static void check_lora_of(const sh_model_config *config, const sh_train_data *data,
                          const uint32_t *ranks, size_t n_ranks, const sh_train_options *options)
{
    const sh_train_options none = {0};
    sh_model *model = small_model(config, SH_TYPE_F32, 3);
    sh_adapter *adapter = small_adapter(config, ranks, n_ranks, 13);
    sh_adapter *grad = small_adapter(config, ranks, n_ranks, 14);
    double *a[2 * SH_LAYER_MATRICES] = {0}, *b[2 * SH_LAYER_MATRICES] = {0}, loss = 0;
    double scales[2 * SH_LAYER_MATRICES];
    masks m = {0};
    lora_case c = {model, data, {.shape = adapter, .a = a, .b = b, .scales = scales}, RELATIVE, 1};
    if (options)
        training_gradient(&c, options, &m, adapter, grad, &loss);
    else
        must_be_ok(sh_lora_gradient(model, adapter, data, grad, &loss, &err));
    if (options) {
        c.relative = RELATIVE_TRAINED;
        c.stride = 5;
    }
    if (options && options->dropout > 0) {
        c.lora.mask = mask_of;
        c.lora.mask_arg = &m;
    }
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        const sh_lora_pair *pair = &adapter->pairs[i];
        if (!pair->a)
            continue;
        scales[i] = scale_of(options ? options : &none, adapter, i);
        a[i] = to_double(pair->a, (size_t)pair->rank * pair->in);
        b[i] = to_double(pair->b, (size_t)pair->rank * pair->out);
    }
    double expected = lora_loss(&c);
    if (!(fabs(loss - expected) <= 1e-6 * expected))
        fail_msg("loss is %.9g, expected %.9g", loss, expected);
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        const sh_lora_pair *g = &grad->pairs[i];
        char name[64];
        if (!g->a)
            continue;
        snprintf(name, sizeof(name), "pair %zu lora_a", i);
        compare_lora(&c, name, a[i], g->a, (size_t)g->rank * g->in);
        snprintf(name, sizeof(name), "pair %zu lora_b", i);
        compare_lora(&c, name, b[i], g->b, (size_t)g->rank * g->out);
    }
    for (size_t i = 0; i < SH_COUNT(a); i++) {
        free(a[i]);
        free(b[i]);
    }
    for (size_t i = 0; i < SH_COUNT(m.at); i++)
        free(m.at[i]);
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&grad);
    small_model_free(&model);
}

static void check_lora(const uint32_t *ranks, size_t n_ranks, bool tied,
                       const sh_train_options *options)
{
    const sh_model_config config = small_config(tied);
    sh_train_data data = small_data(&config, 2, 6, true, 5);
    check_lora_of(&config, &data, ranks, n_ranks, options);
    small_data_free(&data);
}

static void test_lora(void **state)
{
    (void)state;
    check_lora((const uint32_t[]){3}, 1, true, NULL);
}

/* Ranks that differ between matrices of one GEMM, and matrices that are not adapted. */
static void test_lora_mixed_ranks(void **state)
{
    (void)state;
    check_lora((const uint32_t[]){2, 0, 5, 1, 0}, 5, false, NULL);
}

/* Through biases, norms of heads and scaled RoPE, and with several documents in a sequence. */
static void test_lora_architectures(void **state)
{
    (void)state;
    static const uint32_t ranks[] = {1, 0, 2};
    for (sh_arch arch = SH_ARCH_LLAMA; arch <= SH_ARCH_QWEN3; arch++) {
        const sh_model_config config = architecture(arch, arch == SH_ARCH_QWEN2);
        sh_train_data data = small_data(&config, 2, 8, true, 5);
        ((uint8_t *)(uintptr_t)data.mask)[3] |= SH_TRAIN_BEGINS;
        ((uint8_t *)(uintptr_t)data.mask)[8 + 5] |= SH_TRAIN_BEGINS;
        check_lora_of(&config, &data, ranks, SH_COUNT(ranks), NULL);
        small_data_free(&data);
    }
}

static void test_lora_scales(void **state)
{
    (void)state;
    static const uint32_t ranks[] = {2, 0, 5, 1, 3};
    sh_train_options o = {.alphas = {[SH_ATTN_Q] = 3, [SH_ATTN_V] = 1.5f, [SH_FFN_DOWN] = 7}};
    check_lora(ranks, SH_COUNT(ranks), false, &o);
    o.rslora = true;
    check_lora(ranks, SH_COUNT(ranks), false, &o);
}

/* Under a fixed mask the loss is smooth. */
static void test_lora_dropout(void **state)
{
    (void)state;
    static const uint32_t ranks[] = {2, 0, 5, 1, 3};
    sh_train_options o = {.dropout = 0.3f, .dropout_seed = 9};
    check_lora(ranks, SH_COUNT(ranks), false, &o);
    o.rslora = true;
    o.dropout = 0.6f;
    check_lora(ranks, SH_COUNT(ranks), true, &o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full_tied),          cmocka_unit_test(test_full_untied_masked),
        cmocka_unit_test(test_full_long),          cmocka_unit_test(test_full_architectures),
        cmocka_unit_test(test_full_documents),     cmocka_unit_test(test_lora),
        cmocka_unit_test(test_lora_mixed_ranks),   cmocka_unit_test(test_lora_scales),
        cmocka_unit_test(test_lora_dropout),       cmocka_unit_test(test_files),
        cmocka_unit_test(test_lora_architectures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
