/*
 * Token ids against llama-tokenize, byte for byte of input, invalid UTF-8 included.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/tokenizer.h"
#include "tests/golden/golden.h"

#define CASE_BYTES_MAX (1u << 20)
#define NAME_BYTES     256

static int hex_digit(char c)
{
    const char *digits = "0123456789abcdef", *at = c != '\0' ? strchr(digits, c) : NULL;
    return at != NULL ? (int)(at - digits) : -1;
}

static sh_status decode_hex(const char *hex, char **out, size_t *n, sh_error *err)
{
    const size_t length = strlen(hex);
    char *bytes = sh_calloc(length / 2 + 1, 1);
    if (bytes == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
    for (size_t i = 0; i + 1 < length; i += 2) {
        const int high = hex_digit(hex[i]), low = hex_digit(hex[i + 1]);
        if (high < 0 || low < 0) {
            free(bytes);
            return sh_fail(err, SH_ERR_INVALID, "'%.20s' is not in hex", hex);
        }
        bytes[i / 2] = (char)(high * 16 + low);
    }
    *out = bytes;
    *n = length / 2;
    return SH_OK;
}

static sh_status check_ids(golden *g, const char *what, const sh_tokenizer *tokenizer,
                           const char *hex, unsigned flags, const json_t *expected, sh_error *err)
{
    sh_status status;
    char *text = NULL;
    int32_t *ours = NULL, *theirs = NULL;
    size_t bytes = 0, n = 0;
    const size_t n_theirs = json_array_size(expected);
    SH_GOTO(decode_hex(hex, &text, &bytes, err));
    SH_GOTO(sh_tokenize(tokenizer, text, bytes, flags, &ours, &n, err));
    if (!json_is_array(expected))
        goto cleanup; /* llama.cpp aborts there; that we came here is all there is to check */
    theirs = sh_calloc(n_theirs, sizeof *theirs);
    if (theirs == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    for (size_t i = 0; i < n_theirs; i++)
        theirs[i] = (int32_t)json_integer_value(json_array_get(expected, i));
    if (golden_check(g, n == n_theirs, "%s: %zu ids, reference %zu", what, n, n_theirs))
        golden_equal_i32(g, what, ours, theirs, n);

cleanup:
    free(text);
    free(ours);
    free(theirs);
    return status;
}

static sh_status check_vocabulary(golden *g, const char *key, const char *path, const json_t *cases,
                                  const json_t *expected, sh_error *err)
{
    sh_status status;
    sh_gguf *gguf = NULL;
    sh_tokenizer *tokenizer = NULL;
    const json_t *ids = json_object_get(expected, "ids");
    const json_t *special = json_object_get(expected, "ids_parse_special");
    const json_t *hello = json_object_get(expected, "hello_world_with_special_tokens_added");
    SH_TRY(sh_gguf_open(path, &gguf, err));
    SH_GOTO(sh_tokenizer_load(gguf, &tokenizer, err));
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i);
        const char *name = json_string_value(json_object_get(one, "name"));
        const char *hex = json_string_value(json_object_get(one, "hex"));
        char what[NAME_BYTES];
        if (name == NULL || hex == NULL) {
            status = sh_fail(err, SH_ERR_INVALID, "case %zu has no name or no bytes", i);
            goto cleanup;
        }
        snprintf(what, sizeof what, "%s: %s", key, name);
        SH_GOTO(check_ids(g, what, tokenizer, hex, 0, json_array_get(ids, i), err));
        snprintf(what, sizeof what, "%s: %s, special tokens parsed", key, name);
        const json_t *parsed = json_object_get(special, name);
        SH_GOTO(check_ids(g, what, tokenizer, hex, SH_TOKENIZE_SPECIAL,
                          parsed != NULL ? parsed : json_array_get(ids, i), err));
    }
    golden_check(g, json_array_size(ids) == json_array_size(cases), "%s: %zu results, %zu cases",
                 key, json_array_size(ids), json_array_size(cases));
    if (hello != NULL)
        SH_GOTO(check_ids(g, "Hello world with BOS", tokenizer, "48656c6c6f20776f726c64",
                          SH_TOKENIZE_BOS, hello, err));

cleanup:
    sh_tokenizer_destroy(&tokenizer);
    sh_gguf_close(&gguf);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status;
    json_t *expected = NULL, *files = json_object_get(c, "vocabularies"), *value;
    const char *path, *key;
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_TRY(sh_json_load(path, &expected, err));
    const json_t *cases = json_object_get(expected, "cases");
    json_object_foreach(files, key, value)
    {
        const json_t *results = json_object_get(json_object_get(expected, "vocabularies"), key);
        status = golden_file(g, files, key, &path, err);
        if (status == SH_OK)
            status = check_vocabulary(g, key, path, cases, results, err);
        if (status == SH_ERR_NOT_FOUND)
            golden_skip(g, "%s: %s", key, err->text);
        else if (status != SH_OK)
            goto cleanup;
    }
    status = SH_OK;

cleanup:
    json_decref(expected);
    return status;
}

int main(void)
{
    return golden_main("tokenizer", run);
}
