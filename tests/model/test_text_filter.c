/*
 * From tokens to text: pieces are whole characters whatever the tokens, and nothing of a stop
 * string is shown, wherever it begins and ends.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/model/text_filter.h"
#include "tests/model/util.h"

#define TEXT_MAX 256

static sh_model *model;

static int open_model(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(1);
    model = util_open(&o);
    return 0;
}

static int close_model(void **state)
{
    (void)state;
    sh_model_close(&model);
    return 0;
}

/* All bytes of `in` as byte tokens, each piece checked to be whole. */
static void filter(const char *in, const char *stop, char out[TEXT_MAX], uint32_t *shown)
{
    sh_text_filter f;
    sh_buf text;
    const size_t n = strlen(in);
    sh_buf_init(&text, TEXT_MAX - 1);
    CHECK_OK(sh_text_filter_init(&f, &stop, stop != NULL, (uint32_t)n, err));
    for (size_t i = 0; i < n && !f.stopped; i++) {
        const size_t before = text.len;
        CHECK_OK(sh_text_filter_add(&f, model->tokenizer, 3 + (uint8_t)in[i], &text, err));
        assert_true(text.len == before || (text.data[before] & 0xc0) != 0x80);
    }
    if (!f.stopped)
        CHECK_OK(sh_text_filter_end(&f, &text, err));
    if (text.len > 0)
        memcpy(out, text.data, text.len);
    out[text.len] = 0;
    *shown = sh_text_filter_tokens_shown(&f);
    sh_text_filter_release(&f);
    sh_buf_release(&text);
}

static void test_whole_characters(void **state)
{
    (void)state;
#define BAD "\xef\xbf\xbd"
    static const struct {
        const char *in, *stop, *out;
        uint32_t shown;
    } cases[] = {
        {"na\xc3\xafve", NULL, "na\xc3\xafve", 6},
        {"\xf0\x9f\x90\x9f!", NULL, "\xf0\x9f\x90\x9f!", 5},
        {"a\xff"
         "b",
         NULL, "a" BAD "b", 3},
        {"a\xe2\x82", NULL, "a" BAD BAD, 3},            /* the end of a character never came */
        {"\xe2\x82z", NULL, BAD BAD "z", 3},            /* or something else did */
        {"\xc0\xaf", NULL, BAD BAD, 2},                 /* overlong */
        {"\xed\xa0\x80", NULL, BAD BAD BAD, 3},         /* a surrogate */
        {"\xf4\x90\x80\x80", NULL, BAD BAD BAD BAD, 4}, /* past U+10FFFF */
        {"one\n\ntwo", "\n\n", "one", 3},
        {"one\n.\n\nx", "\n\n", "one\n.", 5},
        {"aabaab", "ab", "a", 1},
        {"abab", "abc", "abab", 4},
        {"x\xe2\x82\xac!", "\xe2\x82\xac", "x", 1},
        {"\xe2\x82STOP", "STOP", BAD BAD, 2},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char out[TEXT_MAX];
        uint32_t shown;
        filter(cases[i].in, cases[i].stop, out, &shown);
        assert_string_equal(out, cases[i].out);
        assert_int_equal(shown, cases[i].shown);
    }
}

/* " the" is one token here, and the stop string begins within it. */
static void test_a_stop_within_tokens(void **state)
{
    (void)state;
    static const char *const stops[] = {"never", "he!", "ex"};
    const int32_t the = sh_tokenizer_find(model->tokenizer, "\u2581the", strlen("\u2581the"));
    assert_true(the > 0);
    const int32_t tokens[] = {3 + 'a', the, the, 3 + '!'};
    static const uint32_t out[] = {1, 1, 2, 2};
    sh_text_filter f;
    sh_buf text;
    sh_buf_init(&text, TEXT_MAX);
    CHECK_OK(sh_text_filter_init(&f, stops, SH_COUNT(stops), SH_COUNT(tokens), err));
    for (size_t i = 0; i < SH_COUNT(tokens); i++) {
        assert_false(f.stopped);
        assert_int_equal(sh_text_filter_bytes_behind(&f), 0);
        CHECK_OK(sh_text_filter_add(&f, model->tokenizer, tokens[i], &text, err));
        assert_int_equal(sh_text_filter_tokens_out(&f), out[i]);
    }
    assert_true(f.stopped);
    assert_int_equal(text.len, strlen("a the t"));
    assert_memory_equal(text.data, "a the t", text.len);
    assert_int_equal(sh_text_filter_tokens_shown(&f), 2);
    assert_int_equal(sh_text_filter_bytes_behind(&f), 2); /* " t" of " the" */
    sh_text_filter_release(&f);
    sh_buf_release(&text);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    for (size_t n = 1;; n++) {
        sh_text_filter f = {0};
        sh_buf text;
        sh_error why = {0};
        const char *const stop = "x";
        sh_buf_init(&text, TEXT_MAX);
        sh_alloc_fail_after(n);
        sh_status status = sh_text_filter_init(&f, &stop, 1, 1, &why);
        if (status == SH_OK)
            status = sh_text_filter_add(&f, model->tokenizer, 3 + 'a', &text, &why);
        sh_alloc_fail_after(0);
        sh_text_filter_release(&f);
        sh_buf_release(&text);
        if (status == SH_OK) {
            assert_true(n > 1);
            return;
        }
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_true(why.text[0] != '\0');
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_characters),
        cmocka_unit_test(test_a_stop_within_tokens),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
