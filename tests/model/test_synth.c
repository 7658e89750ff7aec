/* Made-up models: they open, are what their shape says, and come out the same again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>

#include "shared/model/synth.h"
#include "tests/model/util.h"

#define PATH_BYTES 32

static void make(const sh_synth_options *o, char *path, sh_model **out)
{
    snprintf(path, PATH_BYTES, "/tmp/shoal-synth-XXXXXX");
    close(mkstemp(path));
    CHECK_OK(sh_synth_model(o, path, err));
    CHECK_OK(sh_model_open(path, out, err));
    unlink(path);
}

static void test_tiny_shapes(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16, SH_TYPE_Q8_0,
                                    SH_TYPE_Q4_0};
    static const char *const names[] = {"tiny-llama", "tiny-qwen2", "tiny-qwen3"};
    for (size_t i = 0; i < SH_COUNT(types) * SH_COUNT(names); i++) {
        char path[PATH_BYTES];
        sh_model *model = NULL;
        sh_synth_options o = {.type = types[i % SH_COUNT(types)], .seed = i};
        CHECK_OK(sh_synth_find(names[i / SH_COUNT(types)], &o.shape, err));
        make(&o, path, &model);
        const sh_model_config *c = &model->config;
        assert_int_equal(c->arch, o.shape->arch);
        assert_int_equal(c->n_layers, o.shape->n_layers);
        assert_int_equal(c->head_size, o.shape->head_size);
        assert_int_equal(c->vocab, o.shape->vocab);
        assert_int_equal(c->tied_output, o.shape->tied_output);
        assert_int_equal(c->rope_halves, c->arch != SH_ARCH_LLAMA);
        assert_int_equal(model->layers[0].bias[SH_ATTN_V] != NULL, c->arch == SH_ARCH_QWEN2);
        assert_int_equal(model->layers[1].k_norm != NULL, c->arch == SH_ARCH_QWEN3);
        assert_int_equal(model->layers[1].m[SH_FFN_UP].type, o.type);
        sh_model_close(&model);
    }
}

static void test_the_same_seed_gives_the_same_bytes(void **state)
{
    (void)state;
    sh_hash hashes[3];
    for (int i = 0; i < 3; i++) {
        char path[PATH_BYTES];
        sh_model *model = NULL;
        sh_synth_options o = {.type = SH_TYPE_Q8_0, .seed = i == 2 ? 8 : 7};
        CHECK_OK(sh_synth_find("tiny-qwen3", &o.shape, err));
        make(&o, path, &model);
        hashes[i] = sh_model_hash(model);
        sh_model_close(&model);
    }
    assert_true(sh_hash_equal(&hashes[0], &hashes[1]));
    assert_false(sh_hash_equal(&hashes[0], &hashes[2]));
}

/* Mean and deviation of 20,480 values: five standard errors either way. */
static void test_weights_are_normal(void **state)
{
    (void)state;
    char path[PATH_BYTES];
    sh_model *model = NULL;
    sh_synth_options o = {.type = SH_TYPE_F32, .seed = 3, .sigma = 0.5f};
    CHECK_OK(sh_synth_find("tiny-llama", &o.shape, err));
    make(&o, path, &model);
    const size_t n = (size_t)model->token_embd.out * model->token_embd.in;
    const float *x = model->token_embd.data;
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
    }
    const double mean = sum / (double)n, deviation = sqrt(squares / (double)n - mean * mean);
    if (fabs(mean) > 5 * 0.5 / sqrt((double)n) ||
        fabs(deviation - 0.5) > 5 * 0.5 / sqrt(2 * (double)n))
        fail_msg("mean %g, deviation %g", mean, deviation);
    sh_model_close(&model);
}

static void test_rope(void **state)
{
    (void)state;
    char path[PATH_BYTES];
    sh_model *model = NULL;
    sh_synth_options o = {.type = SH_TYPE_F32, .rope = SH_ROPE_LINEAR, .rope_factor = 4};
    CHECK_OK(sh_synth_find("tiny-llama", &o.shape, err));
    make(&o, path, &model);
    assert_int_equal(model->config.rope_scaling, SH_ROPE_LINEAR);
    assert_true(fabs(model->rope_frequency[0] - 0.25) < 1e-15);
    sh_model_close(&model);
    o.rope = SH_ROPE_PLAIN;
    o.rope_freqs = true;
    make(&o, path, &model);
    assert_true(model->rope_factors);
    assert_true(fabs(model->rope_frequency[7] - pow(10000, -14.0 / 16) / 8) < 1e-15);
    sh_model_close(&model);
}

/* Calculated apart from this program, by llama.cpp's formula in doubles: head size 16, base 10,000,
 * factor 4 over an original context of 128. */
static void test_yarn(void **state)
{
    (void)state;
    static const double expected[] = {
        1.0,    0.23717082451262847,   0.05,    0.007905694150420948,
        0.0025, 0.0007905694150420948, 0.00025, 7.905694150420948e-05};
    char path[PATH_BYTES];
    sh_model *model = NULL;
    sh_synth_options o = {.type = SH_TYPE_F32, .rope = SH_ROPE_YARN, .rope_factor = 4};
    CHECK_OK(sh_synth_find("tiny-llama", &o.shape, err));
    make(&o, path, &model);
    for (size_t j = 0; j < SH_COUNT(expected); j++)
        if (!(fabs(model->rope_frequency[j] - expected[j]) < 1e-14))
            fail_msg("pair %zu: %.17g, expected %.17g", j, model->rope_frequency[j], expected[j]);
    assert_true(fabs((double)model->rope_magnitude - 1.138629436111989) < 1e-7);
    sh_model_close(&model);
}

static void test_adapter(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-synth-XXXXXX", model_path[PATH_BYTES];
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    sh_synth_options o = {.type = SH_TYPE_F32};
    CHECK_OK(sh_synth_find("tiny-qwen3", &o.shape, err));
    make(&o, model_path, &model);
    close(mkstemp(path));
    CHECK_OK(sh_synth_adapter(o.shape, 4, 1, path, err));
    CHECK_OK(sh_adapter_open(path, &model->config, &adapter, err));
    unlink(path);
    assert_int_equal(adapter->rank, 4);
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++)
        assert_true(adapter->pairs[i].b != NULL && adapter->pairs[i].b[0] != 0);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

static void test_errors(void **state)
{
    (void)state;
    sh_error e = {0};
    sh_synth_options o = {.type = SH_TYPE_Q6_K};
    assert_int_equal(sh_synth_find("2m", &o.shape, &e), SH_ERR_USAGE);
    assert_non_null(strstr(e.text, "135m"));
    assert_null(o.shape);
    CHECK_OK(sh_synth_find("tiny-qwen2", &o.shape, err));
    assert_int_equal(sh_synth_model(&o, "/tmp/none", &e), SH_ERR_UNSUPPORTED);
    o.type = SH_TYPE_F32;
    o.rope_freqs = true;
    assert_int_equal(sh_synth_model(&o, "/tmp/none", &e), SH_ERR_USAGE);
    o.rope_freqs = false;
    assert_int_equal(sh_synth_model(&o, "/nonexistent/x", &e), SH_ERR_NOT_FOUND);
    assert_int_equal(sh_synth_adapter(o.shape, 0, 1, "/tmp/none", &e), SH_ERR_USAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiny_shapes),
        cmocka_unit_test(test_the_same_seed_gives_the_same_bytes),
        cmocka_unit_test(test_weights_are_normal),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_yarn),
        cmocka_unit_test(test_adapter),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
