/* LoRA adapters: round trips, adapters of other models, broken ones. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "tests/model/util.h"

#define SEED      20260206
#define BYTES_MAX (4u << 20)

static const sh_model_config config = {.n_layers = 2,
                                       .width = 24,
                                       .n_heads = 3,
                                       .n_kv_heads = 1,
                                       .head_size = 8,
                                       .ffn = 40,
                                       .vocab = 16,
                                       .context = 8};

static sh_adapter *random_adapter(uint32_t rank)
{
    sh_rng rng;
    sh_adapter *a = NULL;
    sh_rng_init(&rng, SEED, 0, 1);
    assert_int_equal(sh_adapter_create(&config, rank, 16, &a, NULL), SH_OK);
    for (size_t i = 0; i < (size_t)a->n_layers * SH_LAYER_MATRICES; i++) {
        for (size_t k = 0; k < (size_t)rank * a->pairs[i].in; k++)
            a->pairs[i].a[k] = sh_rng_normal(&rng);
        for (size_t k = 0; k < (size_t)rank * a->pairs[i].out; k++)
            a->pairs[i].b[k] = sh_rng_normal(&rng);
    }
    return a;
}

static void test_create(void **state)
{
    (void)state;
    static const uint32_t shapes[SH_LAYER_MATRICES][2] = {{24, 24}, {8, 24},  {8, 24}, {24, 24},
                                                          {40, 24}, {40, 24}, {24, 40}};
    sh_adapter *a = NULL;
    assert_int_equal(sh_adapter_create(&config, 4, 8, &a, NULL), SH_OK);
    assert_int_equal(a->rank, 4);
    assert_true(a->alpha == 8);
    for (size_t i = 0; i < 2 * SH_LAYER_MATRICES; i++) {
        assert_int_equal(a->pairs[i].out, shapes[i % SH_LAYER_MATRICES][0]);
        assert_int_equal(a->pairs[i].in, shapes[i % SH_LAYER_MATRICES][1]);
        assert_int_equal(a->pairs[i].rank, 4);
        assert_true(a->pairs[i].a[4 * a->pairs[i].in - 1] == 0);
        assert_true(a->pairs[i].b[4 * a->pairs[i].out - 1] == 0);
    }
    sh_adapter_destroy(&a);
    assert_null(a);
    sh_adapter_destroy(&a);
    assert_int_equal(sh_adapter_create(&config, 0, 8, &a, NULL), SH_ERR_LIMIT);
    assert_int_equal(sh_adapter_create(&config, 5000, 8, &a, NULL), SH_ERR_LIMIT);
    assert_null(a);
}

/* Encode, decode, encode: the same bytes; pairs that are not there stay away. */
static void test_round_trip(void **state)
{
    (void)state;
    sh_adapter *a = random_adapter(3), *b = NULL;
    sh_buf first, second;
    sh_lora_pair *gone = &a->pairs[SH_LAYER_MATRICES + SH_FFN_UP];
    sh_buf_init(&first, BYTES_MAX);
    sh_buf_init(&second, BYTES_MAX);
    free(gone->a);
    free(gone->b);
    gone->a = gone->b = NULL;
    assert_int_equal(sh_adapter_encode(a, &first, NULL), SH_OK);
    assert_int_equal(sh_adapter_decode(first.data, first.len, "x", &config, &b, NULL), SH_OK);
    assert_int_equal(b->rank, 3);
    assert_true(b->alpha == 16);
    for (size_t i = 0; i < 2 * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *x = &a->pairs[i], *y = &b->pairs[i];
        if (x == gone) {
            assert_null(y->a);
            assert_null(y->b);
            continue;
        }
        assert_int_equal(y->rank, 3);
        assert_memory_equal(x->a, y->a, (size_t)3 * x->in * sizeof *x->a);
        assert_memory_equal(x->b, y->b, (size_t)3 * x->out * sizeof *x->b);
    }
    assert_int_equal(sh_adapter_encode(b, &second, NULL), SH_OK);
    assert_int_equal(first.len, second.len);
    assert_memory_equal(first.data, second.data, first.len);
    sh_adapter_destroy(&a);
    sh_adapter_destroy(&b);
    sh_buf_release(&first);
    sh_buf_release(&second);
}

/* The output matrix alone, under llama.cpp's names; only where it is not tied. */
static void test_output(void **state)
{
    (void)state;
    sh_model_config tied = config;
    sh_adapter *a = NULL, *b = NULL;
    sh_error err = {0};
    sh_gguf *g = NULL;
    sh_buf bytes;
    tied.tied_output = true;
    sh_buf_init(&bytes, BYTES_MAX);
    assert_int_equal(sh_adapter_create_empty(&config, 5, &a, NULL), SH_OK);
    assert_int_equal(sh_adapter_add_output(a, &tied, 2, &err), SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "output.weight"));
    assert_int_equal(sh_adapter_add_output(a, &config, 0, NULL), SH_ERR_LIMIT);
    assert_int_equal(sh_adapter_add_output(a, &config, 2, NULL), SH_OK);
    assert_int_equal(sh_adapter_add_output(a, &config, 2, NULL), SH_ERR_INVALID);
    assert_int_equal(a->rank, 2);
    sh_lora_pair *x = &a->pairs[sh_lora_output_pair(config.n_layers)];
    for (size_t i = 0; i < 2 * (size_t)x->in; i++)
        x->a[i] = (float)i;
    for (size_t i = 0; i < 2 * (size_t)x->out; i++)
        x->b[i] = -(float)i;
    assert_int_equal(sh_adapter_encode(a, &bytes, NULL), SH_OK);
    assert_int_equal(sh_gguf_open_memory(bytes.data, bytes.len, "x", &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_n_tensors(g), 2);
    const sh_gguf_tensor *t = sh_gguf_tensor_find(g, "output.weight.lora_a");
    assert_true(t != NULL && t->ne[0] == config.width && t->ne[1] == 2);
    t = sh_gguf_tensor_find(g, "output.weight.lora_b");
    assert_true(t != NULL && t->ne[0] == 2 && t->ne[1] == config.vocab);
    sh_gguf_close(&g);
    assert_int_equal(sh_adapter_decode(bytes.data, bytes.len, "x", &config, &b, NULL), SH_OK);
    const sh_lora_pair *y = &b->pairs[sh_lora_output_pair(config.n_layers)];
    assert_int_equal(y->rank, 2);
    assert_memory_equal(x->a, y->a, 2 * x->in * sizeof *x->a);
    assert_memory_equal(x->b, y->b, 2 * x->out * sizeof *x->b);
    assert_null(b->pairs[0].a);
    sh_adapter_destroy(&b);
    assert_int_equal(sh_adapter_decode(bytes.data, bytes.len, "x", &tied, &b, &err),
                     SH_ERR_MISMATCH);
    assert_non_null(strstr(err.text, "output.weight.lora_a"));
    sh_model_config other = config;
    other.vocab++;
    assert_int_equal(sh_adapter_decode(bytes.data, bytes.len, "x", &other, &b, &err),
                     SH_ERR_MISMATCH);
    free(x->b);
    x->b = NULL;
    assert_null(b);
    sh_adapter_destroy(&a);
    sh_buf_release(&bytes);
}

static void expect_refused(const sh_buf *bytes, const sh_model_config *wanted_config,
                           sh_status wanted, const char *part)
{
    sh_adapter *a = NULL;
    sh_error err = {0};
    sh_status status =
        sh_adapter_decode(bytes->data, bytes->len, "x.gguf", wanted_config, &a, &err);
    if (status != wanted || strstr(err.text, part) == NULL || strstr(err.text, "x.gguf") == NULL)
        fail_msg("status %s, wanted %s; text '%s', wanted '%s' in it", sh_status_name(status),
                 sh_status_name(wanted), err.text, part);
    assert_null(a);
}

/* An adapter of another base is said to be one. */
static void test_mismatch(void **state)
{
    (void)state;
    sh_adapter *a = random_adapter(2);
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    assert_int_equal(sh_adapter_encode(a, &bytes, NULL), SH_OK);
    sh_model_config other = config;
    other.n_layers = 1;
    expect_refused(&bytes, &other, SH_ERR_MISMATCH, "more than 1 layers");
    other = config;
    other.ffn = 48;
    expect_refused(&bytes, &other, SH_ERR_MISMATCH, "the model's has 48");
    other = config;
    other.width = 32;
    expect_refused(&bytes, &other, SH_ERR_MISMATCH, "another base");
    sh_adapter_destroy(&a);
    sh_buf_release(&bytes);
}

/* A GGUF with these keys and one tensor. */
static sh_buf one_tensor(const char *type, const char *arch, const char *kind, const char *name,
                         uint64_t in, uint64_t rank, sh_type data_type, const void *data)
{
    sh_gguf_writer *w = NULL;
    sh_buf out;
    const uint64_t ne[] = {in, rank};
    sh_buf_init(&out, BYTES_MAX);
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "general.type", type), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "general.architecture", arch), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "adapter.type", kind), SH_OK);
    assert_int_equal(sh_gguf_writer_set_f32(w, "adapter.lora.alpha", 16), SH_OK);
    if (name != NULL)
        assert_int_equal(sh_gguf_writer_add_tensor(w, name, data_type, ne, 2, data, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_encode(w, &out, NULL), SH_OK);
    sh_gguf_writer_destroy(&w);
    return out;
}

static void test_broken(void **state)
{
    (void)state;
    static const float data[24 * 8] = {0}, nan_data[24 * 8] = {[30] = NAN};
    static const struct {
        const char *type, *arch, *kind, *name;
        sh_status status;
        const char *part;
        const float *data;
    } cases[] = {
        {"model", "llama", "lora", NULL, SH_ERR_UNSUPPORTED, "'model'", data},
        {"adapter", "qwen2", "lora", NULL, SH_ERR_MISMATCH, "'qwen2'", data},
        {"adapter", "llama", "ia3", NULL, SH_ERR_UNSUPPORTED, "'ia3'", data},
        {"adapter", "llama", "lora", NULL, SH_ERR_INVALID, "no tensors", data},
        {"adapter", "llama", "lora", "token_embd.weight.lora_a", SH_ERR_UNSUPPORTED,
         "'token_embd.weight.lora_a'", data},
        {"adapter", "llama", "lora", "blk.00.attn_q.weight.lora_a", SH_ERR_UNSUPPORTED, "blk.00",
         data},
        {"adapter", "llama", "lora", "blk.+0.attn_q.weight.lora_a", SH_ERR_UNSUPPORTED, "blk.+0",
         data},
        {"adapter", "llama", "lora", "blk.0.attn_q.weight.lora_c", SH_ERR_UNSUPPORTED, "lora_c",
         data},
        {"adapter", "llama", "lora", "blk.0.attn_q.weight.lora_ab", SH_ERR_UNSUPPORTED, "lora_ab",
         data},
        {"adapter", "llama", "lora", "blk.7.attn_q.weight.lora_a", SH_ERR_MISMATCH, "layers", data},
        {"adapter", "llama", "lora", "blk.0.attn_q.weight.lora_a", SH_ERR_INVALID,
         "one of lora_a and lora_b", data},
        {"adapter", "llama", "lora", "blk.0.attn_q.weight.lora_a", SH_ERR_INVALID, "not finite",
         nan_data},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_buf file = one_tensor(cases[i].type, cases[i].arch, cases[i].kind, cases[i].name, 24, 8,
                                 SH_TYPE_F32, cases[i].data);
        expect_refused(&file, &config, cases[i].status, cases[i].part);
        sh_buf_release(&file);
    }
}

/* ---- which base it is of ---- */

#define KEY_BASE "shoal.base.sha256"

/* The hash goes through the file; one that is not known leaves no key. */
static void test_base(void **state)
{
    (void)state;
    for (size_t known = 0; known < 2; known++) {
        sh_adapter *a = random_adapter(2), *b = NULL;
        sh_gguf *g = NULL;
        sh_buf bytes;
        const char *text = NULL;
        size_t n = 0;
        assert_true(sh_hash_is_zero(&a->base));
        for (size_t i = 0; known && i < sizeof a->base.b; i++)
            a->base.b[i] = (uint8_t)(i * 37 + 5);
        sh_buf_init(&bytes, BYTES_MAX);
        CHECK_OK(sh_adapter_encode(a, &bytes, err));
        CHECK_OK(sh_adapter_decode(bytes.data, bytes.len, "x", &config, &b, err));
        assert_true(sh_hash_equal(&a->base, &b->base));
        CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "x", &g, err));
        assert_int_equal(sh_gguf_get_string(g, KEY_BASE, &text, &n, NULL),
                         known ? SH_OK : SH_ERR_NOT_FOUND);
        if (known)
            assert_true(n == 64 && memcmp(text, "052a4f7499be", 12) == 0);
        sh_gguf_close(&g);
        sh_adapter_destroy(&a);
        sh_adapter_destroy(&b);
        sh_buf_release(&bytes);
    }
}

/* text NULL: a number. */
static void expect_base_refused(const char *text)
{
    static const float data[24 * 8] = {0};
    sh_gguf_writer *w = NULL;
    sh_buf out;
    const uint64_t ne[] = {24, 8};
    sh_buf_init(&out, BYTES_MAX);
    CHECK_OK(sh_gguf_writer_create(&w, err));
    assert_int_equal(sh_gguf_writer_set_string(w, "general.type", "adapter"), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "general.architecture", "llama"), SH_OK);
    assert_int_equal(sh_gguf_writer_set_string(w, "adapter.type", "lora"), SH_OK);
    assert_int_equal(sh_gguf_writer_set_f32(w, "adapter.lora.alpha", 16), SH_OK);
    assert_int_equal(text ? sh_gguf_writer_set_string(w, KEY_BASE, text)
                          : sh_gguf_writer_set_u32(w, KEY_BASE, 7),
                     SH_OK);
    for (char side = 'a'; side <= 'b'; side++) {
        char name[] = "blk.0.attn_q.weight.lora_a";
        const uint64_t ne_b[] = {8, 24};
        name[sizeof name - 2] = side;
        CHECK_OK(
            sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, side == 'a' ? ne : ne_b, 2, data, err));
    }
    CHECK_OK(sh_gguf_writer_encode(w, &out, err));
    expect_refused(&out, &config, SH_ERR_INVALID, KEY_BASE);
    sh_gguf_writer_destroy(&w);
    sh_buf_release(&out);
}

static void test_base_malformed(void **state)
{
    (void)state;
    char hex[80];
    memset(hex, 'a', sizeof hex);
    hex[65] = '\0';
    expect_base_refused(hex); /* a digit too many */
    hex[63] = '\0';
    expect_base_refused(hex);
    hex[63] = 'a';
    hex[64] = '\0';
    hex[17] = 'g';
    expect_base_refused(hex);
    hex[17] = ' ';
    expect_base_refused(hex);
    expect_base_refused("");
    expect_base_refused(NULL);
}

static void test_check_base(void **state)
{
    (void)state;
    const tiny_options first = tiny_defaults(SEED), second = tiny_defaults(SEED + 1);
    sh_model *model = util_open(&first), *other = util_open(&second);
    sh_adapter *a = util_adapter(model, 2, SEED, 0.1f);
    sh_error error = {0};
    char hex[SH_HASH_HEX_BYTES];
    CHECK_OK(sh_adapter_check_base(a, other, "a.gguf", err)); /* it does not say */
    a->base = sh_model_hash(model);
    CHECK_OK(sh_adapter_check_base(a, model, "a.gguf", err));
    assert_int_equal(sh_adapter_check_base(a, other, "a.gguf", &error), SH_ERR_MISMATCH);
    assert_non_null(strstr(error.text, "a.gguf"));
    for (size_t i = 0; i < 2; i++) { /* both are named by how they begin */
        const sh_hash hash = sh_model_hash(i ? other : model);
        sh_hex(hash.b, sizeof hash.b, hex);
        hex[16] = '\0';
        assert_non_null(strstr(error.text, hex));
    }
    sh_adapter_destroy(&a);
    sh_model_close(&model);
    sh_model_close(&other);
}

/* The two of a pair disagree about the rank; then agree, in F16. */
static void test_ranks_and_f16(void **state)
{
    (void)state;
    float values[24 * 8];
    uint8_t halves[24 * 8 * 2];
    for (size_t i = 0; i < SH_COUNT(values); i++)
        values[i] = (float)i / 16;
    sh_row_quantize(SH_TYPE_F16, values, halves, SH_COUNT(values));
    for (uint64_t rank_b = 7; rank_b <= 8; rank_b++) {
        sh_gguf_writer *w = NULL;
        sh_buf out;
        const uint64_t ne_a[] = {24, 8}, ne_b[] = {rank_b, 24};
        sh_buf_init(&out, BYTES_MAX);
        assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
        assert_int_equal(sh_gguf_writer_set_string(w, "general.type", "adapter"), SH_OK);
        assert_int_equal(sh_gguf_writer_set_string(w, "general.architecture", "llama"), SH_OK);
        assert_int_equal(sh_gguf_writer_set_string(w, "adapter.type", "lora"), SH_OK);
        assert_int_equal(sh_gguf_writer_set_f32(w, "adapter.lora.alpha", 16), SH_OK);
        assert_int_equal(sh_gguf_writer_add_tensor(w, "blk.1.attn_q.weight.lora_a", SH_TYPE_F16,
                                                   ne_a, 2, halves, NULL),
                         SH_OK);
        assert_int_equal(sh_gguf_writer_add_tensor(w, "blk.1.attn_q.weight.lora_b", SH_TYPE_F16,
                                                   ne_b, 2, halves, NULL),
                         SH_OK);
        assert_int_equal(sh_gguf_writer_encode(w, &out, NULL), SH_OK);
        if (rank_b == 7) {
            expect_refused(&out, &config, SH_ERR_INVALID, "rank 7, its pair 8");
        } else {
            sh_adapter *a = NULL;
            assert_int_equal(sh_adapter_decode(out.data, out.len, "x", &config, &a, NULL), SH_OK);
            const sh_lora_pair *pair = &a->pairs[SH_LAYER_MATRICES + SH_ATTN_Q];
            assert_memory_equal(pair->a, values, sizeof values); /* exact in F16 */
            assert_memory_equal(pair->b, values, sizeof values);
            assert_null(a->pairs[0].a);
            sh_adapter_destroy(&a);
        }
        sh_gguf_writer_destroy(&w);
        sh_buf_release(&out);
    }
}

static void test_no_memory(void **state)
{
    (void)state;
    sh_adapter *a = random_adapter(2);
    sh_buf bytes, out;
    bool done = false;
    sh_buf_init(&bytes, BYTES_MAX);
    sh_buf_init(&out, BYTES_MAX);
    assert_int_equal(sh_adapter_encode(a, &bytes, NULL), SH_OK);
    for (size_t n = 1; !done; n++) {
        sh_adapter *b = NULL;
        sh_alloc_fail_after(n);
        sh_status status = sh_adapter_decode(bytes.data, bytes.len, "x", &config, &b, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        assert_true(done || (status == SH_ERR_NO_MEMORY && b == NULL));
        sh_adapter_destroy(&b);
    }
    done = false;
    for (size_t n = 1; !done; n++) {
        sh_alloc_fail_after(n);
        sh_status status = sh_adapter_encode(a, &out, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        assert_true(done || (status == SH_ERR_NO_MEMORY && out.len == 0));
    }
    for (size_t n = 1; n < 10; n++) {
        sh_adapter *b = NULL;
        sh_alloc_fail_after(n);
        assert_int_equal(sh_adapter_create(&config, 2, 1, &b, NULL), SH_ERR_NO_MEMORY);
        sh_alloc_fail_after(0);
        assert_null(b);
    }
    sh_adapter_destroy(&a);
    sh_buf_release(&bytes);
    sh_buf_release(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_output),     cmocka_unit_test(test_create),
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_broken),     cmocka_unit_test(test_ranks_and_f16),
        cmocka_unit_test(test_no_memory),  cmocka_unit_test(test_base),
        cmocka_unit_test(test_check_base), cmocka_unit_test(test_base_malformed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
