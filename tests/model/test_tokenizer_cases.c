/*
 * Ids recorded from llama.cpp for random texts, invalid UTF-8 among them: the vocabularies and
 * cases of tests/model/tokenizer/ (its README.md says how they were made), one rule after another.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/json.h"
#include "tests/model/util.h"

#define DIR            SHOAL_SOURCE_DIR "/tests/model/tokenizer/"
#define TEXT_BYTES_MAX 4096

/* The vocabulary of a rule: bpe.gguf under another name of pre-tokenizer, or spm.gguf. */
static sh_tokenizer *load(const char *rule)
{
    const bool spm = strcmp(rule, "llama-spm") == 0;
    sh_gguf *file = NULL, *gguf = NULL;
    sh_gguf_writer *w = NULL;
    sh_tokenizer *t = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, 1u << 20);
    CHECK_OK(sh_gguf_open(spm ? DIR "spm.gguf" : DIR "bpe.gguf", &file, err));
    CHECK_OK(sh_gguf_writer_create(&w, err));
    CHECK_OK(sh_gguf_writer_copy_keys(w, file, NULL, err));
    if (!spm)
        assert_int_equal(sh_gguf_writer_set_string(w, "tokenizer.ggml.pre", rule), SH_OK);
    CHECK_OK(sh_gguf_writer_encode(w, &bytes, err));
    CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, rule, &gguf, err));
    CHECK_OK(sh_tokenizer_load(gguf, &t, err));
    sh_gguf_close(&gguf);
    sh_gguf_close(&file);
    sh_gguf_writer_destroy(&w);
    sh_buf_release(&bytes);
    return t;
}

static size_t decode_hex(const char *hex, char *out)
{
    const size_t n = strlen(hex) / 2;
    assert_true(n <= TEXT_BYTES_MAX);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (char)byte;
    }
    return n;
}

static void check(const sh_tokenizer *t, const char *rule, const char *hex, unsigned flags,
                  const char *expected)
{
    char text[TEXT_BYTES_MAX];
    int32_t *ids = NULL;
    size_t n = 0;
    sh_buf ours;
    sh_buf_init(&ours, 1u << 20);
    CHECK_OK(sh_tokenize(t, text, decode_hex(hex, text), flags, &ids, &n, err));
    assert_int_equal(sh_buf_printf(&ours, "%s", ""), SH_OK);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(sh_buf_printf(&ours, i > 0 ? " %d" : "%d", ids[i]), SH_OK);
    if (ours.len != strlen(expected) ||
        (ours.len > 0 && memcmp(ours.data, expected, ours.len) != 0))
        fail_msg("%s, bytes %s, flags %u:\n  %.*s\nnot\n  %s", rule, hex, flags, (int)ours.len,
                 (const char *)ours.data, expected);
    free(ids);
    sh_buf_release(&ours);
}

static void test_recorded_ids(void **state)
{
    (void)state;
    json_t *cases = NULL, *rule;
    const char *name;
    CHECK_OK(sh_json_load(DIR "cases.json", &cases, err));
    const json_t *texts = json_object_get(cases, "texts");
    assert_true(json_array_size(texts) >= 200);
    assert_true(json_object_size(json_object_get(cases, "rules")) >= 13);
    json_object_foreach(json_object_get(cases, "rules"), name, rule)
    {
        const json_t *ids = json_object_get(rule, "ids"),
                     *special = json_object_get(rule, "special");
        sh_tokenizer *t = load(name);
        assert_int_equal(json_array_size(ids), json_array_size(texts));
        for (size_t i = 0; i < json_array_size(texts); i++) {
            char key[24];
            snprintf(key, sizeof key, "%zu", i);
            const char *hex = json_string_value(json_array_get(texts, i));
            const char *plain = json_string_value(json_array_get(ids, i));
            const char *parsed = json_string_value(json_object_get(special, key));
            check(t, name, hex, 0, plain);
            check(t, name, hex, SH_TOKENIZE_SPECIAL, parsed != NULL ? parsed : plain);
        }
        sh_tokenizer_destroy(&t);
    }
    json_decref(cases);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_recorded_ids)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
