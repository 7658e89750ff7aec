/*
 * Byte-level BPE: a small vocabulary by hand, what a broken one is told, and how the number of
 * steps grows with the text, for both kinds of tokenizers. test_tokenizer_cases.c has llama.cpp's
 * ids.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/model/tokenizer_internal.h"
#include "tests/model/tiny_bpe.h"
#include "tests/model/util.h"

static sh_status try_load(const tiny_bpe_options *o, sh_tokenizer **out, sh_error *why)
{
    sh_buf bytes;
    sh_gguf *gguf = NULL;
    sh_buf_init(&bytes, 1u << 20);
    assert_int_equal(tiny_bpe_encode(o, &bytes), SH_OK);
    CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "tiny-bpe", &gguf, err));
    const sh_status status = sh_tokenizer_load(gguf, out, why);
    sh_gguf_close(&gguf);
    sh_buf_release(&bytes);
    return status;
}

static sh_tokenizer *load(const char *pre)
{
    const tiny_bpe_options o = {.pre = pre};
    sh_tokenizer *t = NULL;
    CHECK_OK(try_load(&o, &t, err));
    return t;
}

#define HE     TINY_BPE_MERGED(TINY_BPE_HE)
#define THE    TINY_BPE_MERGED(TINY_BPE_THE)
#define _THE   TINY_BPE_MERGED(TINY_BPE_SPACE_THE)
#define LINES  TINY_BPE_MERGED(4)
#define BLANKS TINY_BPE_MERGED(5)
#define N123   TINY_BPE_MERGED(7)
#define IS     TINY_BPE_MERGED(9)

static void test_words_by_rule(void **state)
{
    (void)state;
    sh_tokenizer *gpt2 = load("gpt-2"), *llama3 = load("llama-bpe"), *smollm = load("smollm");
    EXPECT_IDS(gpt2, "the the", 0, THE, _THE);
    EXPECT_IDS(gpt2, "tthe", 0, 't', THE);
    /* "e Ġ" would merge across words; only within one is there a pair. */
    EXPECT_IDS(gpt2, "he he", 0, HE, ' ', HE);
    EXPECT_IDS(gpt2, "he   the", 0, HE, BLANKS, _THE);
    EXPECT_IDS(gpt2, "he's", 0, HE, IS);
    EXPECT_IDS(gpt2, "he'S", 0, HE, '\'', 'S');
    EXPECT_IDS(gpt2, "123", 0, N123);
    EXPECT_IDS(smollm, "123", 0, '1', '2', '3');
    EXPECT_IDS(llama3, "1231", 0, N123, '1');
    EXPECT_IDS(llama3, "the\n\nthe", 0, THE, LINES, THE);
    EXPECT_IDS(gpt2, "the\n\nthe", 0, THE, '\n', '\n', THE);
    EXPECT_IDS(gpt2, "é", 0, 0xC3, 0xA9);
    util_expect_ids(gpt2, "", SH_TOKENIZE_BOS, 0, NULL);
    sh_tokenizer_destroy(&gpt2);
    sh_tokenizer_destroy(&llama3);
    sh_tokenizer_destroy(&smollm);
}

/* What is no UTF-8 has the ids of U+FFFD (ef bf bd), a byte each; so has a character past U+10FFFF,
 * which llama.cpp aborts at; an overlong form is the character it stands for. */
static void test_what_is_no_utf8(void **state)
{
    (void)state;
    sh_tokenizer *t = load("gpt-2");
#define FFFD 0xEF, 0xBF, 0xBD
    EXPECT_IDS(t, "\xff", 0, FFFD);
    EXPECT_IDS(t, "a\x80", 0, 'a', FFFD);
    EXPECT_IDS(t, "\xf4\x90\x80\x80", 0, FFFD, FFFD, FFFD, FFFD);
    EXPECT_IDS(t, "\xf7\xbf\xbf\xbf", 0, FFFD, FFFD, FFFD, FFFD);
    EXPECT_IDS(t, "\xf4\x8f\xbf\xbf", 0, 0xF4, 0x8F, 0xBF, 0xBF);
    EXPECT_IDS(t, "\xed\xa0\x80", 0, 0xED, 0xA0, 0x80);
    EXPECT_IDS(t, "\xc1\xa1", 0, 'a');
    EXPECT_IDS(t, "\xe2\x82", 0, FFFD, FFFD);
    sh_tokenizer_destroy(&t);
}

static void test_specials_and_flags(void **state)
{
    (void)state;
    const tiny_bpe_options o = {.pre = "gpt-2", .add_bos = true, .add_eos = true};
    sh_tokenizer *t = NULL, *plain = load("gpt-2"), *llama3 = load("llama-bpe");
    CHECK_OK(try_load(&o, &t, err));
    EXPECT_IDS(t, "the", SH_TOKENIZE_BOS, TINY_BPE_EOS, THE);
    EXPECT_IDS(t, "the", SH_TOKENIZE_BOS | SH_TOKENIZE_EOS, TINY_BPE_EOS, THE, TINY_BPE_EOS);
    EXPECT_IDS(t, "he<|user|>he", 0, HE, TINY_BPE_USER, HE);
    EXPECT_IDS(t, "he<|endoftext|>", SH_TOKENIZE_SPECIAL, HE, TINY_BPE_EOS);
    EXPECT_IDS(t, "<|im_end|>", SH_TOKENIZE_SPECIAL, TINY_BPE_IM_END);
    EXPECT_IDS(t, "<|im", SH_TOKENIZE_SPECIAL, '<', '|', 'i', 'm');
    assert_true(sh_tokenizer_adds_bos(t) && sh_tokenizer_adds_eos(t));
    assert_false(sh_tokenizer_adds_bos(plain) || sh_tokenizer_adds_eos(plain));
    assert_true(sh_tokenizer_adds_bos(llama3)); /* by its rule */
    assert_int_equal(sh_tokenizer_eos(t), TINY_BPE_EOS);
    assert_int_equal(sh_tokenizer_eot(t), TINY_BPE_IM_END);
    assert_true(sh_tokenizer_is_end(t, TINY_BPE_EOS) && sh_tokenizer_is_end(t, TINY_BPE_IM_END));
    assert_false(sh_tokenizer_is_end(t, TINY_BPE_USER) || sh_tokenizer_is_end(t, -1));
    assert_true(sh_tokenizer_is_special(t, TINY_BPE_IM_END));
    assert_false(sh_tokenizer_is_special(t, TINY_BPE_USER) || sh_tokenizer_is_special(t, THE));
    assert_true(sh_tokenizer_is_byte(t, 0xC3));
    assert_false(sh_tokenizer_is_byte(t, 'a') || sh_tokenizer_is_byte(t, TINY_BPE_SIZE));
    assert_true(sh_tokenizer_starts_word(t, _THE) && sh_tokenizer_starts_word(t, ' '));
    assert_false(sh_tokenizer_starts_word(t, THE));
    assert_int_equal(sh_tokenizer_find(t, "<|user|>", 8), TINY_BPE_USER);
    assert_int_equal(sh_tokenizer_find(t, "<|user|", 7), -1);
    size_t n = 0;
    assert_memory_equal(sh_tokenizer_text(t, _THE, &n), "Ġthe", 5);
    assert_int_equal(n, 5);
    assert_null(sh_tokenizer_text(t, TINY_BPE_SIZE, &n));
    sh_tokenizer_destroy(&t);
    sh_tokenizer_destroy(&plain);
    sh_tokenizer_destroy(&llama3);
}

static void test_every_byte_comes_back(void **state)
{
    (void)state;
    sh_tokenizer *t = load("default");
    sh_buf out;
    sh_buf_init(&out, 1024);
    for (int b = 0; b < 256; b++) {
        sh_buf_clear(&out);
        assert_int_equal(sh_detokenize(t, b, &out), SH_OK);
        assert_int_equal(out.len, 1);
        assert_int_equal(out.data[0], b);
    }
    sh_buf_clear(&out);
    assert_int_equal(sh_detokenize(t, _THE, &out), SH_OK);
    assert_int_equal(sh_detokenize(t, TINY_BPE_USER, &out), SH_OK);
    assert_int_equal(sh_detokenize(t, TINY_BPE_IM_END, &out), SH_OK); /* nothing */
    assert_int_equal(out.len, strlen(" the<|user|>"));
    assert_memory_equal(out.data, " the<|user|>", out.len);
    assert_int_equal(sh_detokenize(t, TINY_BPE_SIZE, &out), SH_ERR_INVALID);
    sh_buf_release(&out);
    sh_tokenizer_destroy(&t);
}

static void test_broken_vocabularies(void **state)
{
    (void)state;
    static const struct {
        tiny_bpe_options options;
        sh_status status;
        const char *part;
    } cases[] = {
        {{.pre = "no-such-rule"}, SH_ERR_UNSUPPORTED, "'no-such-rule'"},
        {{.pre = "gpt-2", .skip_merges = true}, SH_ERR_NOT_FOUND, "tokenizer.ggml.merges"},
        {{.pre = "gpt-2", .merge = "alone"}, SH_ERR_INVALID, "merge 10, 'alone', is no pair"},
        {{.pre = "gpt-2", .merge = "xy z"}, SH_ERR_INVALID, "'xy z': its left side"},
        {{.pre = "gpt-2", .merge = "x yz"}, SH_ERR_INVALID, "'x yz': its right side"},
        {{.pre = "gpt-2", .merge = "x y"}, SH_ERR_INVALID, "'x y': its result"},
        {{.pre = "gpt-2", .renamed = 'q'}, SH_ERR_INVALID, "byte 0x71"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_tokenizer *t = NULL;
        sh_error err = {0};
        assert_int_equal(try_load(&cases[i].options, &t, &err), cases[i].status);
        assert_null(t);
        if (strstr(err.text, cases[i].part) == NULL)
            fail_msg("\"%s\" does not say \"%s\"", err.text, cases[i].part);
        assert_memory_equal(err.text, "tiny-bpe", 8);
    }
}

/* As published vocabularies have it: a rare byte has no token, and leaves no trace in the ids. */
static void test_a_rare_byte_without_token(void **state)
{
    (void)state;
    const tiny_bpe_options o = {.pre = "gpt-2", .renamed = 0xF1};
    sh_tokenizer *t = NULL;
    CHECK_OK(try_load(&o, &t, err));
    EXPECT_IDS(t, "a\xf1\x80\x80\x80", 0, 'a', 0x80, 0x80, 0x80);
    sh_tokenizer_destroy(&t);
}

static void test_no_rule_is_the_default(void **state)
{
    (void)state;
    sh_tokenizer *t = load(NULL);
    EXPECT_IDS(t, "1234", 0, N123, '4'); /* [0-9][0-9][0-9] */
    sh_tokenizer_destroy(&t);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    sh_tokenizer *t = load("llama-bpe");
    static const char text[] = "the<|user|>and then the other things of the sea";
    size_t n = 1;
    for (;; n++) {
        int32_t *ids = NULL;
        size_t n_ids = 99;
        sh_error err = {0};
        sh_alloc_fail_after(n);
        const sh_status status =
            sh_tokenize(t, text, sizeof text - 1, SH_TOKENIZE_SPECIAL, &ids, &n_ids, &err);
        sh_alloc_fail_after(0);
        if (status == SH_OK) {
            free(ids);
            break;
        }
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_null(ids);
        assert_int_equal(n_ids, 99);
    }
    assert_true(n > 5);
    sh_tokenizer_destroy(&t);
}

/* ---- steps ---- */

static uint64_t count_steps(const sh_tokenizer *t, const char *piece, size_t bytes)
{
    char *text = malloc(bytes);
    sh_token_result result = {0};
    assert_non_null(text);
    for (size_t i = 0; i < bytes; i++)
        text[i] = piece[i % strlen(piece)];
    CHECK_OK(sh_tokenize_counted(t, text, bytes, 0, &result, err));
    free(result.ids);
    free(text);
    return result.steps;
}

/* 16 times the text, 16 times the steps; where the text is one word, and so one queue, that times
 * the growth of the logarithm (log 2^17 / log 2^13 = 1.31). */
static void check_growth(const sh_tokenizer *t, const char *piece, size_t bytes, double most)
{
    const double small = (double)count_steps(t, piece, bytes / 16);
    const double large = (double)count_steps(t, piece, bytes);
    if (large > most * small || large < 15 * small)
        fail_msg("\"%s\": %.0f steps for %zu bytes, %.0f for %zu: %.2f times, at most %.1f", piece,
                 small, bytes / 16, large, bytes, large / small, most);
}

static void test_time_is_linear(void **state)
{
    (void)state;
    static const char *const rules[] = {"default", "gpt-2", "llama-bpe",      "qwen2",
                                        "tekken",  "bloom", "deepseek-coder", "deepseek-v3"};
    static const char *const pieces[] = {"the sea, 123 \n\n", " ", "\n ", "in's", "1", "A", "~"};
    for (size_t i = 0; i < SH_COUNT(rules); i++) {
        sh_tokenizer *t = load(rules[i]);
        for (size_t k = 0; k < SH_COUNT(pieces); k++)
            check_growth(t, pieces[k], 1u << 17, 16 * 1.35);
        check_growth(t, "the ", 1u << 17, 16.1);
        sh_tokenizer_destroy(&t);
    }
    sh_tokenizer *llama3 = load("llama-bpe");
    check_growth(llama3, "the sea, 123 \n\n", 1u << 20, 16.1);
    sh_tokenizer_destroy(&llama3);
    const tiny_options o = tiny_defaults(1);
    sh_model *model = util_open(&o);
    check_growth(model->tokenizer, "the sea ", 1u << 20, 16.1);
    check_growth(model->tokenizer, "the", 1u << 17, 16 * 1.35);
    check_growth(model->tokenizer, " ", 1u << 17, 16 * 1.35);
    sh_model_close(&model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_words_by_rule),
        cmocka_unit_test(test_what_is_no_utf8),
        cmocka_unit_test(test_specials_and_flags),
        cmocka_unit_test(test_every_byte_comes_back),
        cmocka_unit_test(test_broken_vocabularies),
        cmocka_unit_test(test_a_rare_byte_without_token),
        cmocka_unit_test(test_no_rule_is_the_default),
        cmocka_unit_test(test_every_allocation_may_fail),
        cmocka_unit_test(test_time_is_linear),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
