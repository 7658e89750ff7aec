/* sh_model_open: what a sound file becomes, and every way in which a file can be refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>

#include "shared/base/file.h"
#include "shared/model/synth.h"
#include "tests/model/util.h"

static void test_opens_every_type_and_version(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16, SH_TYPE_Q8_0,
                                    SH_TYPE_Q4_0};
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        tiny_options o = tiny_defaults(i);
        o.type = types[i];
        o.version = i % 2 == 0 ? 3 : 2;
        o.untied = i % 2 == 1;
        sh_model *model = util_open(&o);
        const sh_model_config *c = &model->config;
        assert_int_equal(c->n_layers, 2);
        assert_int_equal(c->width, 64);
        assert_int_equal(c->n_heads, 4);
        assert_int_equal(c->n_kv_heads, 2);
        assert_int_equal(c->head_size, 16);
        assert_int_equal(c->ffn, 96);
        assert_int_equal(c->context, 64);
        assert_int_equal(c->vocab, tiny_vocab());
        assert_int_equal(c->tied_output, !o.untied);
        assert_ptr_equal(model->output.data == model->token_embd.data, c->tied_output);
        assert_int_equal(model->layers[1].m[SH_FFN_DOWN].in, 96);
        assert_int_equal(model->layers[1].m[SH_FFN_DOWN].out, 64);
        assert_int_equal(model->layers[1].m[SH_FFN_DOWN].type, types[i]);
        assert_string_equal(model->layers[1].m[SH_ATTN_K].name, "blk.1.attn_k");
        const sh_hash hash = sh_model_hash(model);
        assert_false(sh_hash_is_zero(&hash));
        sh_model_close(&model);
        assert_null(model);
    }
}

static void test_an_even_head_that_is_no_multiple_of_lanes(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(1);
    o.heads = 8;
    o.kv_heads = 8;
    sh_model *model = util_open(&o);
    assert_int_equal(model->config.head_size, 8);
    sh_model_close(&model);
}

/* status and a part of the text that must name the culprit. */
static void refuse(const char *name, const tiny_options *o, sh_status expected, const char *part)
{
    sh_error err = {0};
    sh_model *model = NULL;
    const sh_status status = util_try_open(o, &model, &err);
    if (status != expected || strstr(err.text, part) == NULL || model != NULL ||
        strchr(err.text, '\n') != NULL)
        fail_msg("%s: %s \"%s\", expected %s with \"%s\"", name, sh_status_name(status), err.text,
                 sh_status_name(expected), part);
}

#define REFUSE(expected, part, ...)                                                                \
    do {                                                                                           \
        tiny_options o = tiny_defaults(1);                                                         \
        __VA_ARGS__;                                                                               \
        refuse(#__VA_ARGS__, &o, expected, part);                                                  \
    } while (0)

static void test_refuses_by_name(void **state)
{
    (void)state;
    REFUSE(SH_ERR_UNSUPPORTED, "'gemma'", o.architecture = "gemma");
    REFUSE(SH_ERR_NOT_FOUND, "qwen2.block_count", o.architecture = "qwen2");
    REFUSE(SH_ERR_INVALID, "<0x41>", o.token_from = "<0x41>", o.token_to = "other");
    REFUSE(SH_ERR_INVALID, "twice", o.token_from = "z", o.token_to = "y");
    REFUSE(SH_ERR_INVALID, "blk.1.ffn_up.weight", o.skip_tensor = "blk.1.ffn_up.weight");
    REFUSE(SH_ERR_INVALID, "blk.0.attn_norm.weight", o.skip_tensor = "blk.0.attn_norm.weight");
    REFUSE(SH_ERR_INVALID, "token_embd.weight", o.skip_tensor = "token_embd.weight");
    REFUSE(SH_ERR_INVALID, "output_norm.weight", o.skip_tensor = "output_norm.weight");
    REFUSE(SH_ERR_UNSUPPORTED, "blk.0.ffn_up.bias", o.extra_tensor = "blk.0.ffn_up.bias");
    REFUSE(SH_ERR_UNSUPPORTED, "blk.0.attn_q_norm", o.extra_tensor = "blk.0.attn_q_norm.weight");
    REFUSE(SH_ERR_INVALID, "blk.0.attn_k.bias", o.extra_tensor = "blk.0.attn_k.bias");
    REFUSE(SH_ERR_INVALID, "rope_freqs.weight", o.extra_tensor = "rope_freqs.weight");
    REFUSE(SH_ERR_UNSUPPORTED, "expert_count", o.u32_key = "llama.expert_count", o.u32_value = 8);
    REFUSE(SH_ERR_UNSUPPORTED, "'longrope'", o.string_key = "llama.rope.scaling.type",
           o.string_value = "longrope");
    REFUSE(SH_ERR_MISMATCH, "adapter", o.string_key = "general.type", o.string_value = "adapter");
    REFUSE(SH_ERR_UNSUPPORTED, "RoPE over 8", o.u32_key = "llama.rope.dimension_count",
           o.u32_value = 8);
    REFUSE(SH_ERR_INVALID, "head_count is 0", o.u32_key = "llama.attention.head_count",
           o.u32_value = 0);
    REFUSE(SH_ERR_INVALID, "key-value heads", o.u32_key = "llama.attention.head_count_kv",
           o.u32_value = 3);
    REFUSE(SH_ERR_INVALID, "multiple of 3 heads", o.kv_heads = 1,
           o.u32_key = "llama.attention.head_count", o.u32_value = 3);
    REFUSE(SH_ERR_INVALID, "odd", o.kv_heads = 1, o.skip_key = "llama.rope.dimension_count",
           o.u32_key = "llama.attention.head_count", o.u32_value = 64);
    REFUSE(SH_ERR_INVALID, "block_count", o.u32_key = "llama.block_count", o.u32_value = 1000);
    REFUSE(SH_ERR_INVALID, "blk.2.", o.u32_key = "llama.block_count", o.u32_value = 3);
    REFUSE(SH_ERR_UNSUPPORTED, "blk.1.", o.u32_key = "llama.block_count", o.u32_value = 1);
    REFUSE(SH_ERR_INVALID, "token_embd.weight", o.skip_key = "llama.rope.dimension_count",
           o.u32_key = "llama.embedding_length", o.u32_value = 128);
    REFUSE(SH_ERR_INVALID, "blk.0.ffn_gate", o.u32_key = "llama.feed_forward_length",
           o.u32_value = 100);
    REFUSE(SH_ERR_INVALID, "vocab_size", o.u32_key = "llama.vocab_size", o.u32_value = 7);
    REFUSE(SH_ERR_INVALID, "layer_norm_rms_epsilon",
           o.skip_key = "llama.attention.layer_norm_rms_epsilon");
    REFUSE(SH_ERR_NOT_FOUND, "general.architecture", o.skip_key = "general.architecture");
    REFUSE(SH_ERR_NOT_FOUND, "llama.context_length", o.skip_key = "llama.context_length");
}

/* Rewrites a made-up model of a few tensors with other keys: GGUF of ours in, GGUF out. */
static sh_status rewrite(const char *from, const char *to, const char *skip_tensor,
                         void (*keys)(sh_gguf_writer *), sh_error *err)
{
    sh_status status;
    sh_gguf *g = NULL;
    sh_gguf_writer *w = NULL;
    SH_GOTO(sh_gguf_open(from, &g, err));
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_copy_keys(w, g, NULL, err));
    if (keys != NULL)
        keys(w);
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(g, i);
        if (skip_tensor == NULL || strcmp(t->name, skip_tensor) != 0)
            SH_GOTO(sh_gguf_writer_add_tensor(w, t->name, t->type, t->ne, t->n_dims, t->data, err));
    }
    SH_GOTO(sh_gguf_writer_save(w, to, err));

cleanup:
    sh_gguf_writer_destroy(&w);
    sh_gguf_close(&g);
    return status;
}

static void fewer_tokens(sh_gguf_writer *w)
{
    static const char *texts[300];
    static char spelled[300][8];
    static uint32_t lengths[300];
    static float scores[300];
    static int32_t kinds[300];
    for (unsigned i = 0; i < 300; i++) {
        snprintf(spelled[i], sizeof spelled[i], i < 256 ? "<0x%02X>" : "w%u", i);
        texts[i] = spelled[i];
        lengths[i] = (uint32_t)strlen(spelled[i]);
        kinds[i] = i < 256 ? 6 : 1;
    }
    assert_int_equal(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", texts, lengths, 300),
                     SH_OK);
    assert_int_equal(sh_gguf_writer_set_f32s(w, "tokenizer.ggml.scores", scores, 300), SH_OK);
    assert_int_equal(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", kinds, 300), SH_OK);
}

static void window(sh_gguf_writer *w)
{
    assert_int_equal(sh_gguf_writer_set_u32(w, "qwen2.attention.sliding_window", 128), SH_OK);
}

static void softcap(sh_gguf_writer *w)
{
    assert_int_equal(sh_gguf_writer_set_f32(w, "qwen2.final_logit_softcapping", 30), SH_OK);
}

/* Vectors are read at once; of matrices sh_model_pack does it. */
static void test_a_vector_that_holds_no_number(void **state)
{
    (void)state;
    static const char *const names[] = {"output_norm.weight", "blk.1.attn_norm.weight"};
    const float bad[] = {NAN, -INFINITY};
    char path[] = "/tmp/shoal-tiny-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    const tiny_options o = tiny_defaults(9);
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        sh_buf bytes;
        sh_gguf *gguf = NULL;
        sh_model *model = NULL;
        sh_error problem = {0};
        sh_buf_init(&bytes, 16u << 20);
        assert_int_equal(tiny_encode(&o, &bytes), SH_OK);
        CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, err));
        const sh_gguf_tensor *t = sh_gguf_tensor_find(gguf, names[i]);
        assert_non_null(t);
        const size_t last = (size_t)((const uint8_t *)t->data - bytes.data) + t->bytes - 4;
        sh_gguf_close(&gguf);
        memcpy(bytes.data + last, &bad[i], sizeof bad[i]);
        CHECK_OK(sh_file_write_atomic(path, bytes.data, bytes.len, err));
        assert_int_equal(sh_model_open(path, &model, &problem), SH_ERR_INVALID);
        assert_null(model);
        if (strstr(problem.text, names[i]) == NULL || strstr(problem.text, "NaN") == NULL)
            fail_msg("'%s' does not name %s", problem.text, names[i]);
        sh_buf_release(&bytes);
    }
    unlink(path);
}

static void test_other_architectures(void **state)
{
    (void)state;
    char from[] = "/tmp/shoal-arch-XXXXXX", to[] = "/tmp/shoal-arch-XXXXXX";
    sh_synth_options o = {.type = SH_TYPE_F32};
    sh_model *model = NULL;
    sh_error e = {0};
    close(mkstemp(from));
    close(mkstemp(to));
    CHECK_OK(sh_synth_find("tiny-qwen2", &o.shape, err));
    CHECK_OK(sh_synth_model(&o, from, err));

    /* More rows than the tokenizer has tokens, as Qwen pads them. */
    CHECK_OK(rewrite(from, to, NULL, fewer_tokens, err));
    CHECK_OK(sh_model_open(to, &model, err));
    assert_int_equal(sh_tokenizer_size(model->tokenizer), 300);
    assert_int_equal(model->config.vocab, 320);
    sh_model_close(&model);

    CHECK_OK(rewrite(from, to, NULL, window, err));
    CHECK_OK(sh_model_open(to, &model, err));
    assert_int_equal(model->config.context, 128);
    sh_model_close(&model);

    CHECK_OK(rewrite(from, to, NULL, softcap, err));
    assert_int_equal(sh_model_open(to, &model, &e), SH_ERR_UNSUPPORTED);
    assert_non_null(strstr(e.text, "qwen2.final_logit_softcapping is 30"));

    CHECK_OK(rewrite(from, to, "blk.1.attn_k.bias", NULL, err));
    assert_int_equal(sh_model_open(to, &model, &e), SH_ERR_INVALID);
    assert_non_null(strstr(e.text, "blk.1.attn_k.bias is missing"));

    CHECK_OK(sh_synth_find("tiny-qwen3", &o.shape, err));
    CHECK_OK(sh_synth_model(&o, from, err));
    CHECK_OK(rewrite(from, to, "blk.0.attn_q_norm.weight", NULL, err));
    assert_int_equal(sh_model_open(to, &model, &e), SH_ERR_INVALID);
    assert_non_null(strstr(e.text, "blk.0.attn_q_norm.weight is missing"));
    assert_null(model);
    unlink(from);
    unlink(to);
}

static void test_every_truncation_is_refused(void **state)
{
    (void)state;
    sh_buf bytes;
    sh_buf_init(&bytes, 16u << 20);
    const tiny_options o = tiny_defaults(3);
    assert_int_equal(tiny_encode(&o, &bytes), SH_OK);
    for (size_t n = 0; n < bytes.len; n += 1 + n / 64) {
        sh_gguf *gguf = NULL;
        sh_error err = {0};
        const sh_status status = sh_gguf_open_memory(bytes.data, n, "cut", &gguf, &err);
        if (status == SH_OK)
            fail_msg("%zu of %zu bytes were taken for a whole file", n, bytes.len);
    }
    sh_buf_release(&bytes);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-tiny-XXXXXX";
    close(mkstemp(path));
    const tiny_options o = tiny_defaults(3);
    CHECK_OK(tiny_write(&o, path, err));
    sh_model *model = NULL;
    size_t n = 1;
    for (;; n++) {
        sh_error err = {0};
        sh_alloc_fail_after(n);
        const sh_status status = sh_model_open(path, &model, &err);
        sh_alloc_fail_after(0);
        if (status == SH_OK)
            break;
        assert_null(model);
        if (status != SH_ERR_NO_MEMORY)
            fail_msg("allocation %zu: %s \"%s\"", n, sh_status_name(status), err.text);
    }
    assert_true(n > 8);
    sh_model_close(&model);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_opens_every_type_and_version),
        cmocka_unit_test(test_an_even_head_that_is_no_multiple_of_lanes),
        cmocka_unit_test(test_refuses_by_name),
        cmocka_unit_test(test_a_vector_that_holds_no_number),
        cmocka_unit_test(test_other_architectures),
        cmocka_unit_test(test_every_truncation_is_refused),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
