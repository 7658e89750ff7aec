/* Files with an adapter merged in: values, types, what the engine makes of them; refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>

#include "shared/base/file.h"
#include "shared/model/quantize.h"
#include "tests/model/util.h"

#define SEED      20260211
#define BYTES_MAX (4u << 20)

/* Pairs of two ranks, one that is missing, and the output's. */
static sh_adapter *uneven_adapter(const sh_model *model)
{
    sh_adapter *adapter = util_adapter(model, 3, SEED, 0.1f);
    sh_lora_pair *gone = &adapter->pairs[SH_LAYER_MATRICES + SH_ATTN_K];
    sh_lora_pair *thin = &adapter->pairs[SH_FFN_DOWN];
    free(gone->a);
    free(gone->b);
    gone->a = gone->b = NULL;
    gone->rank = 0;
    thin->rank = 1; /* the first row of A, and B read with another stride */
    return adapter;
}

/* A path that is not there yet. */
static void fresh_path(char path[static 32])
{
    snprintf(path, 32, "/tmp/shoal-merge-XXXXXX");
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    unlink(path);
}

static sh_gguf *merged(const sh_gguf *source, const sh_adapter *adapter, sh_type type)
{
    char path[32];
    sh_gguf *g = NULL;
    fresh_path(path);
    CHECK_OK(sh_gguf_merge_file(source, adapter, type, path, NULL, err));
    CHECK_OK(sh_gguf_open(path, &g, err));
    unlink(path); /* the map keeps the bytes */
    return g;
}

/* The pair of a tensor; NULL: it is not adapted. */
static const sh_lora_pair *pair_of(const sh_adapter *adapter, const char *tensor)
{
    char name[SH_GGUF_NAME_MAX], full[SH_GGUF_NAME_MAX + 8];
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        sh_lora_pair_name(adapter->n_layers, i, name);
        snprintf(full, sizeof full, "%s.weight", name);
        if (adapter->pairs[i].a != NULL && strcmp(full, tensor) == 0)
            return &adapter->pairs[i];
    }
    return NULL;
}

/* Every value is W + scale B A: as many roundings as the rank has terms, and some. Returns by how
 * much the matrix was changed at most. */
static double expect_sum(const sh_gguf_tensor *w, const sh_gguf_tensor *m, const sh_lora_pair *p,
                         double alpha)
{
    const float *before = w->data, *after = m->data;
    double most = 0;
    for (size_t o = 0; o < p->out; o++) {
        for (size_t i = 0; i < p->in; i++) {
            const double x = (double)before[o * p->in + i], y = (double)after[o * p->in + i];
            double sum = x, size = fabs(x);
            for (size_t k = 0; k < p->rank; k++) {
                const double term =
                    alpha / p->rank * (double)p->b[o * p->rank + k] * (double)p->a[k * p->in + i];
                sum += term;
                size += fabs(term);
            }
            if (!(fabs(y - sum) <= (p->rank + 2) * (double)FLT_EPSILON * size))
                fail_msg("%s [%zu, %zu] is %.9g, expected %.9g", w->name, o, i, y, sum);
            most = fmax(most, fabs(y - x));
        }
    }
    return most;
}

static void test_values(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(SEED);
    o.untied = true;
    sh_model *model = util_open(&o);
    sh_adapter *adapter = uneven_adapter(model);
    sh_gguf *g = merged(model->gguf, adapter, SH_TYPE_F32);
    size_t n_adapted = 0;
    assert_int_equal(sh_gguf_n_tensors(g), sh_gguf_n_tensors(model->gguf));
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *w = sh_gguf_tensor_at(model->gguf, i);
        const sh_gguf_tensor *m = sh_gguf_tensor_find(g, w->name);
        assert_non_null(m);
        assert_int_equal(m->type, SH_TYPE_F32);
        assert_int_equal(m->bytes, w->bytes);
        const sh_lora_pair *p = pair_of(adapter, w->name);
        if (p == NULL) {
            assert_memory_equal(m->data, w->data, w->bytes);
            continue;
        }
        assert_true(expect_sum(w, m, p, (double)adapter->alpha) > 0.01);
        n_adapted++;
    }
    assert_int_equal(n_adapted, 2 * SH_LAYER_MATRICES); /* one is missing, the output's is there */
    sh_gguf_close(&g);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

/* What is written in another type is what quantization makes of the merged F32 file. */
static void test_types(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F16, SH_TYPE_BF16, SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    tiny_options o = tiny_defaults(SEED);
    o.untied = true;
    sh_model *model = util_open(&o);
    sh_adapter *adapter = uneven_adapter(model);
    sh_gguf *f32 = merged(model->gguf, adapter, SH_TYPE_F32);
    for (size_t k = 0; k < SH_COUNT(types); k++) {
        sh_gguf *g = merged(model->gguf, adapter, types[k]), *expected = NULL;
        sh_buf bytes;
        sh_buf_init(&bytes, BYTES_MAX);
        CHECK_OK(sh_gguf_quantize_encode(f32, types[k], &bytes, err));
        CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "expected", &expected, err));
        for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
            const sh_gguf_tensor *x = sh_gguf_tensor_at(g, i);
            const sh_gguf_tensor *y = sh_gguf_tensor_find(expected, x->name);
            assert_non_null(y);
            assert_int_equal(x->type, x->n_dims < 2 ? SH_TYPE_F32 : types[k]);
            assert_int_equal(x->type, y->type);
            assert_int_equal(x->bytes, y->bytes);
            assert_memory_equal(x->data, y->data, x->bytes);
        }
        sh_gguf_close(&expected);
        sh_buf_release(&bytes);
        sh_gguf_close(&g);
    }
    sh_gguf_close(&f32);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

/* Of a base that is quantized already, what is not adapted keeps its bytes. */
static void test_quantized_base(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(SEED);
    o.type = SH_TYPE_Q8_0;
    sh_model *model = util_open(&o);
    sh_adapter *adapter = uneven_adapter(model);
    sh_gguf *g = merged(model->gguf, adapter, SH_TYPE_Q8_0);
    size_t kept = 0, changed = 0;
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *w = sh_gguf_tensor_at(model->gguf, i);
        const sh_gguf_tensor *m = sh_gguf_tensor_find(g, w->name);
        assert_non_null(m);
        assert_int_equal(m->type, w->type);
        assert_int_equal(m->bytes, w->bytes);
        const bool same = memcmp(m->data, w->data, w->bytes) == 0;
        if (same != (pair_of(adapter, w->name) == NULL))
            fail_msg("%s: %s", w->name, same ? "it was not merged" : "its bytes were changed");
        kept += same;
        changed += !same;
    }
    assert_int_equal(changed, 2 * SH_LAYER_MATRICES - 1);
    assert_int_equal(kept, sh_gguf_n_tensors(g) - changed);
    sh_gguf_close(&g);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

/* The engine's loss of the merged file is that of the base with the adapter beside it. */
static void test_loss(void **state)
{
    (void)state;
    enum { N = 48 };
    char path[32];
    int32_t tokens[N];
    sh_model *both[2] = {0};
    tiny_options o = tiny_defaults(SEED);
    sh_loss loss[3] = {0};
    o.untied = true;
    both[0] = util_open(&o);
    sh_adapter *adapter = uneven_adapter(both[0]);
    for (size_t i = 0; i < N; i++)
        tokens[i] = (int32_t)(3 + i * 31 % (tiny_vocab() - 3));
    fresh_path(path);
    CHECK_OK(sh_gguf_merge_file(both[0]->gguf, adapter, SH_TYPE_F32, path, NULL, err));
    CHECK_OK(sh_model_open(path, &both[1], err));
    unlink(path);
    CHECK_OK(sh_model_loss(both[0], NULL, tokens, N, N, false, &loss[0], err));
    CHECK_OK(sh_model_loss(both[0], adapter, tokens, N, N, false, &loss[1], err));
    CHECK_OK(sh_model_loss(both[1], NULL, tokens, N, N, false, &loss[2], err));
    if (!(fabs(loss[2].nll_sum / loss[1].nll_sum - 1) <= 1e-5))
        fail_msg("merged %.9g, beside the base %.9g", loss[2].nll_sum, loss[1].nll_sum);
    assert_true(fabs(loss[1].nll_sum / loss[0].nll_sum - 1) > 1e-3);
    for (size_t i = 0; i < 2; i++)
        sh_model_close(&both[i]);
    sh_adapter_destroy(&adapter);
}

typedef struct {
    size_t n, lossy;
} seen;

static void on_tensor(void *arg, const sh_quantize_loss *loss, size_t done, size_t n)
{
    seen *s = arg;
    assert_int_equal(done, ++s->n);
    assert_true(done <= n);
    s->lossy += loss->rms_error > 0;
}

/* Merging alone loses nothing that is reported as lost: in F32 the errors are zero. */
static void test_report(void **state)
{
    (void)state;
    char path[32];
    tiny_options o = tiny_defaults(SEED);
    sh_model *model = util_open(&o);
    sh_adapter *adapter = uneven_adapter(model);
    for (size_t quantized = 0; quantized < 2; quantized++) {
        seen s = {0};
        const sh_quantize_report report = {on_tensor, &s};
        fresh_path(path);
        CHECK_OK(sh_gguf_merge_file(model->gguf, adapter, quantized ? SH_TYPE_Q8_0 : SH_TYPE_F32,
                                    path, &report, err));
        unlink(path);
        assert_int_equal(s.n, sh_gguf_n_tensors(model->gguf));
        assert_int_equal(s.lossy, quantized ? 2 * SH_LAYER_MATRICES + 1 : 0); /* the embedding */
    }
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

/* ---- refusals ---- */

static void expect_refused(const sh_model *base, const sh_adapter *adapter, sh_status wanted,
                           const char *part)
{
    char path[32];
    sh_error err = {0};
    fresh_path(path);
    const sh_status status = sh_gguf_merge_file(base->gguf, adapter, SH_TYPE_F32, path, NULL, &err);
    if (status != wanted || strstr(err.text, part) == NULL)
        fail_msg("status %s, wanted %s; text '%s', wanted '%s' in it", sh_status_name(status),
                 sh_status_name(wanted), err.text, part);
    assert_false(sh_file_exists(path));
}

static void test_refused(void **state)
{
    (void)state;
    tiny_options options[] = {tiny_defaults(SEED), tiny_defaults(SEED), tiny_defaults(SEED),
                              tiny_defaults(SEED)};
    static const char *const parts[] = {NULL, "blk.0.ffn_gate.weight", "blk.2.attn_q.weight",
                                        "output.weight"};
    sh_model *base = util_open(&options[0]);
    options[1].ffn = 64;
    options[2].layers = 3;
    options[3].untied = true;
    for (size_t i = 1; i < SH_COUNT(options); i++) {
        sh_model *other = util_open(&options[i]);
        sh_adapter *adapter = util_adapter(other, 2, SEED, 0.1f);
        expect_refused(base, adapter, SH_ERR_MISMATCH, parts[i]);
        expect_refused(base, adapter, SH_ERR_MISMATCH, "another base");
        sh_adapter_destroy(&adapter);
        sh_model_close(&other);
    }
    sh_adapter *adapter = util_adapter(base, 2, SEED, 0.1f);
    sh_lora_pair *p = &adapter->pairs[SH_LAYER_MATRICES + SH_ATTN_V];
    p->a[5] = p->b[2 * 3] = 3e38f;
    expect_refused(base, adapter, SH_ERR_INVALID, "'blk.1.attn_v.weight': row 3");
    sh_adapter_destroy(&adapter);
    sh_model_close(&base);
}

static void test_no_memory(void **state)
{
    (void)state;
    char path[32];
    tiny_options o = tiny_defaults(SEED);
    sh_model *model = util_open(&o);
    sh_adapter *adapter = uneven_adapter(model);
    sh_status status = SH_ERR_NO_MEMORY;
    size_t n = 0;
    fresh_path(path);
    while (status != SH_OK && n < 1000) {
        sh_alloc_fail_after(++n);
        status = sh_gguf_merge_file(model->gguf, adapter, SH_TYPE_Q4_0, path, NULL, NULL);
        sh_alloc_fail_after(0);
        assert_true(status == SH_OK || status == SH_ERR_NO_MEMORY);
        assert_int_equal(sh_file_exists(path), status == SH_OK);
    }
    assert_true(n > 10 && n < 1000);
    unlink(path);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),         cmocka_unit_test(test_types),
        cmocka_unit_test(test_quantized_base), cmocka_unit_test(test_loss),
        cmocka_unit_test(test_report),         cmocka_unit_test(test_refused),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
