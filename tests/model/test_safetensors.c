/* Safetensors files: round trips, and headers that lie. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/file.h"
#include "shared/model/safetensors.h"
#include "tests/model/util.h"

#define DATA_BYTES 48

/* A file of this header and DATA_BYTES zeros, at an odd address. */
static sh_status open_text(const char *header, uint64_t length, sh_safetensors **out, sh_error *err)
{
    static uint8_t room[8192];
    uint8_t *bytes = room + 1;
    const size_t n = strlen(header);
    assert_true(n + 8 + DATA_BYTES < sizeof room);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, n);
    memset(bytes + 8 + n, 0, DATA_BYTES);
    return sh_safetensors_open_memory(bytes, 8 + n + DATA_BYTES, "x.safetensors", out, err);
}

static void test_round_trip(void **state)
{
    (void)state;
    static const sh_type types[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16};
    static const char *const names[] = {"zz", "aa", "m.m"};
    char path[] = "/tmp/shoal-tensors-XXXXXX";
    float values[1200];
    uint8_t bytes[3][1200 * 4];
    sh_safetensor list[3];
    for (size_t i = 0; i < SH_COUNT(values); i++)
        values[i] = (float)((int)i % 251 - 125) / 8; /* exact in all three */
    for (size_t i = 0; i < 3; i++) {
        sh_row_quantize(types[i], values, bytes[i], SH_COUNT(values));
        list[i] = (sh_safetensor){.name = names[i],
                                  .type = types[i],
                                  .n_dims = 2,
                                  .shape = {30, 40},
                                  .data = bytes[i],
                                  .bytes = sh_type_row_bytes(types[i], SH_COUNT(values))};
    }
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    CHECK_OK(sh_safetensors_save(path, list, 3, err));
    sh_safetensors *file = NULL;
    CHECK_OK(sh_safetensors_open(path, &file, err));
    unlink(path);
    assert_int_equal(sh_safetensors_count(file), 3);
    assert_string_equal(sh_safetensors_at(file, 0)->name, "aa");
    assert_null(sh_safetensors_find(file, "a"));
    for (size_t i = 0; i < 3; i++) {
        const sh_safetensor *t = sh_safetensors_find(file, names[i]);
        float read[700];
        assert_non_null(t);
        assert_true(t->is_float);
        assert_int_equal(t->type, types[i]);
        assert_int_equal(t->shape[0], 30);
        assert_int_equal(t->shape[1], 40);
        sh_safetensor_floats(t, 411, 700, read);
        assert_memory_equal(read, values + 411, sizeof read);
    }
    sh_safetensors_close(&file);
    sh_safetensors_close(&file);
}

static void test_headers(void **state)
{
    (void)state;
#define T(name, dtype, shape, offsets)                                                             \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": " offsets "}"
    static const struct {
        const char *header;
        sh_status status;
        const char *part;
    } cases[] = {
        {"{" T("a", "F32", "[3, 4]", "[0, 48]") "}", SH_OK, ""},
        {"{" T("a", "I64", "[6]", "[0, 48]") ", \"__metadata__\": {\"format\": \"pt\"}}", SH_OK,
         ""},
        {"{" T("a", "F32", "[6]", "[0, 24]") "," T("b", "F32", "[6]", "[24, 48]") "}", SH_OK, ""},
        {"{" T("a", "F32", "[]", "[0, 4]") "," T("e", "F32", "[0]",
                                                 "[4, 4]") "," T("b", "F32", "[11]", "[4, 48]") "}",
         SH_OK, ""},
        {"{" T("a", "F32", "[6]", "[0, 24]") "," T("b", "F32", "[7]", "[20, 48]") "}",
         SH_ERR_INVALID, "overlaps"},
        {"{" T("a", "F32", "[6]", "[0, 24]") "," T("b", "F32", "[5]", "[28, 48]") "}",
         SH_ERR_INVALID, "bytes of no tensor"},
        {"{" T("a", "F32", "[6]", "[0, 24]") "}", SH_ERR_INVALID, "24 bytes after the last"},
        {"{}", SH_ERR_INVALID, "48 bytes after the last"},
        {"{" T("a", "F32", "[13]", "[0, 52]") "}", SH_ERR_INVALID, "not a range"},
        {"{" T("a", "F32", "[12]", "[48, 0]") "}", SH_ERR_INVALID, "not a range"},
        {"{" T("a", "F32", "[12]", "[-48, 0]") "}", SH_ERR_INVALID, "not a range"},
        {"{" T("a", "F32", "[12]", "[0]") "}", SH_ERR_INVALID, "not a range"},
        {"{" T("a", "F32", "[12]", "[0.0, 48]") "}", SH_ERR_INVALID, "not a range"},
        {"{" T("a", "F32", "[11]", "[0, 48]") "}", SH_ERR_INVALID, "44 bytes by its shape"},
        {"{" T("a", "F32", "[-1]", "[0, 48]") "}", SH_ERR_INVALID, "negative"},
        {"{" T("a", "F32", "[4611686018427387904, 4]", "[0, 48]") "}", SH_ERR_INVALID, "too large"},
        {"{" T("a", "F32", "[1, 1, 1, 1, 12]", "[0, 48]") "}", SH_ERR_UNSUPPORTED, "dimensions"},
        {"{" T("a", "F32", "7", "[0, 48]") "}", SH_ERR_INVALID, "no shape"},
        {"{" T("a", "Q4", "[12]", "[0, 48]") "}", SH_ERR_UNSUPPORTED, "'Q4'"},
        {"{" T("a", "F32", "[12]", "[0, 48]") "," T("a", "F32", "[12]", "[0, 48]") "}",
         SH_ERR_INVALID, "duplicate"},
        {"{\"a\": 3}", SH_ERR_INVALID, "no dtype"},
        {"{" T("a\\n", "F32", "[12]", "[0, 48]") "}", SH_ERR_INVALID, "control characters"},
        {"[]", SH_ERR_INVALID, "no JSON object"},
        {"{\"a\": [[[[1]]]]}", SH_ERR_LIMIT, "levels"},
        {"{", SH_ERR_INVALID, "x.safetensors"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_safetensors *file = NULL;
        sh_error e = {0};
        sh_status status = open_text(cases[i].header, strlen(cases[i].header), &file, &e);
        if (status != cases[i].status || strstr(e.text, cases[i].part) == NULL)
            fail_msg("%s: %s, \"%s\"", cases[i].header, sh_status_name(status), e.text);
        sh_safetensors_close(&file);
    }
}

static void test_lengths(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {0, 1u << 20, UINT64_MAX, UINT64_MAX - 7, 200u << 20};
    for (size_t i = 0; i < SH_COUNT(lengths); i++) {
        sh_safetensors *file = NULL;
        sh_error e = {0};
        assert_int_equal(open_text("{}", lengths[i], &file, &e), SH_ERR_INVALID);
        assert_non_null(strstr(e.text, "x.safetensors"));
        assert_null(file);
    }
    sh_safetensors *file = NULL;
    assert_int_equal(sh_safetensors_open_memory("1234567", 7, "x", &file, NULL), SH_ERR_INVALID);
    assert_int_equal(sh_safetensors_open_memory("", 0, "x", &file, NULL), SH_ERR_INVALID);
    assert_int_equal(sh_safetensors_open("/nowhere/x", &file, NULL), SH_ERR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_headers),
        cmocka_unit_test(test_lengths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
