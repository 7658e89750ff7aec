/* Whole-file quantization: types, values, keys; errors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/model/quantize.h"

#define SEED      20260205
#define BYTES_MAX (1u << 20)

enum { ROWS = 3, WIDE = 64, NARROW = 40 };

typedef struct {
    float wide[ROWS * WIDE], narrow[ROWS * NARROW], vector[WIDE];
} values;

static sh_gguf *make_source(values *v, sh_buf *file)
{
    sh_rng rng;
    sh_gguf_writer *w = NULL;
    sh_gguf *g = NULL;
    const uint64_t ne_wide[] = {WIDE, ROWS}, ne_narrow[] = {NARROW, ROWS}, ne_vector[] = {WIDE};
    float *all[] = {v->wide, v->narrow, v->vector};
    const size_t counts[] = {ROWS * WIDE, ROWS * NARROW, WIDE};
    sh_rng_init(&rng, SEED, 0, 1);
    for (size_t k = 0; k < 3; k++)
        for (size_t i = 0; i < counts[k]; i++)
            all[k][i] = sh_rng_normal(&rng);
    sh_buf_init(file, BYTES_MAX);
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "general.architecture", "llama"), SH_OK);
    assert_int_equal(sh_gguf_writer_set_u32(w, "general.file_type", 0), SH_OK);
    assert_int_equal(
        sh_gguf_writer_add_tensor(w, "wide.weight", SH_TYPE_F32, ne_wide, 2, v->wide, NULL), SH_OK);
    assert_int_equal(
        sh_gguf_writer_add_tensor(w, "narrow.weight", SH_TYPE_F32, ne_narrow, 2, v->narrow, NULL),
        SH_OK);
    assert_int_equal(
        sh_gguf_writer_add_tensor(w, "norm.weight", SH_TYPE_F32, ne_vector, 1, v->vector, NULL),
        SH_OK);
    assert_int_equal(sh_gguf_writer_encode(w, file, NULL), SH_OK);
    sh_gguf_writer_destroy(&w);
    assert_int_equal(sh_gguf_open_memory(file->data, file->len, "source", &g, NULL), SH_OK);
    return g;
}

static void expect_tensor(const sh_gguf *g, const char *name, sh_type type, const float *x,
                          size_t n)
{
    const sh_gguf_tensor *t = sh_gguf_tensor_find(g, name);
    assert_non_null(t);
    assert_int_equal(t->type, type);
    uint8_t *bytes = malloc(t->bytes);
    assert_non_null(bytes);
    assert_int_equal(t->bytes, sh_type_row_bytes(type, n));
    sh_row_quantize(type, x, bytes, n);
    assert_memory_equal(bytes, t->data, t->bytes);
    free(bytes);
}

static void test_types(void **state)
{
    (void)state;
    static const struct {
        sh_type type, narrow;
        uint32_t file_type;
    } cases[] = {
        {SH_TYPE_F32, SH_TYPE_F32, 0},
        {SH_TYPE_F16, SH_TYPE_F16, 1},
        {SH_TYPE_BF16, SH_TYPE_BF16, 32},
        {SH_TYPE_Q8_0, SH_TYPE_F16, 7}, /* 40 is no multiple of 32 */
        {SH_TYPE_Q4_0, SH_TYPE_F16, 2},
    };
    values v;
    sh_buf file;
    sh_gguf *source = make_source(&v, &file);
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_buf out;
        sh_gguf *g = NULL;
        uint64_t number = 99;
        const char *text = NULL;
        size_t n = 0;
        sh_buf_init(&out, BYTES_MAX);
        assert_int_equal(sh_gguf_quantize_encode(source, cases[i].type, &out, NULL), SH_OK);
        assert_int_equal(sh_gguf_open_memory(out.data, out.len, "made", &g, NULL), SH_OK);
        expect_tensor(g, "wide.weight", cases[i].type, v.wide, ROWS * WIDE);
        expect_tensor(g, "narrow.weight", cases[i].narrow, v.narrow, ROWS * NARROW);
        expect_tensor(g, "norm.weight", SH_TYPE_F32, v.vector, WIDE);
        assert_int_equal(sh_gguf_get_u64(g, "general.file_type", &number, NULL), SH_OK);
        assert_int_equal(number, cases[i].file_type);
        assert_int_equal(sh_gguf_get_u64(g, "general.quantization_version", &number, NULL), SH_OK);
        assert_int_equal(number, 2);
        assert_int_equal(sh_gguf_get_string(g, "general.architecture", &text, &n, NULL), SH_OK);
        assert_int_equal(n, 5);
        assert_int_equal(sh_gguf_n_keys(g), 3);
        sh_gguf_close(&g);
        sh_buf_release(&out);
    }
    sh_gguf_close(&source);
    sh_buf_release(&file);
}

typedef struct {
    size_t n;
    sh_quantize_loss losses[3];
} seen;

static void on_tensor(void *arg, const sh_quantize_loss *loss, size_t done, size_t n)
{
    seen *s = arg;
    assert_int_equal(n, 3);
    assert_int_equal(done, s->n + 1);
    s->losses[s->n++] = *loss;
}

/* The file is the one made in memory; the losses are those of the definition. */
static void test_file_and_losses(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-quantize-XXXXXX";
    values v;
    sh_buf file, expected;
    uint8_t *bytes = NULL, row[2 * 34];
    size_t n = 0;
    seen s = {0};
    const sh_quantize_report report = {on_tensor, &s};
    sh_gguf *source = make_source(&v, &file);
    close(mkstemp(path));
    sh_buf_init(&expected, BYTES_MAX);
    assert_int_equal(sh_gguf_quantize_encode(source, SH_TYPE_Q8_0, &expected, NULL), SH_OK);
    assert_int_equal(sh_gguf_quantize_file(source, SH_TYPE_Q8_0, path, &report, NULL), SH_OK);
    assert_int_equal(sh_file_read(path, BYTES_MAX, &bytes, &n, NULL), SH_OK);
    assert_int_equal(n, expected.len);
    assert_memory_equal(bytes, expected.data, n);
    assert_int_equal(s.n, 3);
    double squares = 0, errors = 0, largest = 0;
    for (size_t r = 0; r < ROWS; r++) {
        float back[WIDE];
        sh_row_quantize(SH_TYPE_Q8_0, v.wide + r * WIDE, row, WIDE);
        sh_row_dequantize(SH_TYPE_Q8_0, row, back, WIDE);
        for (size_t i = 0; i < WIDE; i++) {
            const double x = (double)v.wide[r * WIDE + i], e = (double)back[i] - x;
            squares += x * x;
            errors += e * e;
            largest = fabs(e) > largest ? fabs(e) : largest;
        }
    }
    assert_true(errors > 0);
    assert_true(fabs(s.losses[0].rms_error - sqrt(errors / squares)) < 1e-12);
    assert_true(fabs(s.losses[0].largest_error - largest) < 1e-12);
    assert_int_equal(s.losses[0].before, SH_TYPE_F32);
    assert_int_equal(s.losses[0].after, SH_TYPE_Q8_0);
    assert_int_equal(s.losses[0].bytes, ROWS * sizeof row);
    assert_int_equal(s.losses[1].after, SH_TYPE_F16);
    assert_int_equal(s.losses[2].after, SH_TYPE_F32);
    assert_true(s.losses[2].rms_error == 0);
    unlink(path);
    free(bytes);
    sh_buf_release(&expected);
    sh_gguf_close(&source);
    sh_buf_release(&file);
}

/* The place of a tensor's value in a file that is in memory. */
static float *value_in(sh_buf *file, const sh_gguf *g, const char *name, size_t i)
{
    const sh_gguf_tensor *t = sh_gguf_tensor_find(g, name);
    assert_non_null(t);
    return (float *)(void *)(file->data + ((const uint8_t *)t->data - file->data)) + i;
}

static void test_numbers_that_are_none(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-quantize-XXXXXX";
    values v;
    sh_buf file, out;
    sh_error err = {0};
    sh_gguf *source = make_source(&v, &file);
    close(mkstemp(path));
    unlink(path);
    sh_buf_init(&out, BYTES_MAX);
    assert_int_equal(sh_gguf_check_tensor(sh_gguf_tensor_find(source, "wide.weight"), &err), SH_OK);
    *value_in(&file, source, "wide.weight", 2 * WIDE + 5) = -INFINITY;
    assert_int_equal(sh_gguf_check_tensor(sh_gguf_tensor_find(source, "wide.weight"), &err),
                     SH_ERR_INVALID);
    assert_int_equal(sh_gguf_quantize_encode(source, SH_TYPE_Q4_0, &out, &err), SH_ERR_INVALID);
    assert_string_equal(err.text, "source: tensor 'wide.weight': row 2 holds a NaN or an infinity");
    assert_int_equal(sh_gguf_quantize_file(source, SH_TYPE_Q4_0, path, NULL, &err), SH_ERR_INVALID);
    assert_string_equal(err.text, "source: tensor 'wide.weight': row 2 holds a NaN or an infinity");
    assert_false(sh_file_exists(path));
    sh_buf_release(&out);
    sh_gguf_close(&source);
    sh_buf_release(&file);
}

static void test_errors(void **state)
{
    (void)state;
    values v;
    sh_buf file, out;
    sh_error err = {0};
    sh_gguf *source = make_source(&v, &file);
    sh_buf_init(&out, BYTES_MAX);
    assert_int_equal(sh_gguf_quantize_encode(source, SH_TYPE_Q6_K, &out, &err), SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "Q6_K"));
    assert_int_equal(sh_gguf_quantize_file(source, SH_TYPE_Q8_0, "/nonexistent/x.gguf", NULL, &err),
                     SH_ERR_NOT_FOUND);
    bool done = false;
    for (size_t n = 1; !done; n++) {
        sh_alloc_fail_after(n);
        sh_status status = sh_gguf_quantize_encode(source, SH_TYPE_Q8_0, &out, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        assert_true(done || (status == SH_ERR_NO_MEMORY && out.len == 0));
        assert_true(n < 1000);
    }
    sh_buf_release(&out);
    sh_gguf_close(&source);
    sh_buf_release(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_file_and_losses),
        cmocka_unit_test(test_numbers_that_are_none),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
