/* The packed form: its size, what comes back from it, and groups packed one by one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/pack.h"

#define SEED 20261102

static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0, SH_TYPE_Q4_1, SH_TYPE_Q5_0,
                                SH_TYPE_Q5_1, SH_TYPE_Q4_K, SH_TYPE_Q5_K, SH_TYPE_Q6_K};

/* Every byte may be anything, NaN scales included: what matters are the bits. */
static uint8_t *random_rows(sh_rng *rng, sh_type type, size_t out, size_t in)
{
    size_t bytes = out * sh_type_row_bytes(type, in);
    uint8_t *rows = malloc(bytes);
    assert_non_null(rows);
    for (size_t i = 0; i < bytes; i++)
        rows[i] = (uint8_t)sh_rng_u32(rng);
    return rows;
}

static void check_rows(sh_type type, const uint8_t *rows, const void *packed, uint32_t out,
                       uint32_t in)
{
    float *expected = malloc(in * sizeof *expected), *values = malloc(in * sizeof *values);
    assert_true(expected != NULL && values != NULL);
    for (uint32_t o = 0; o < out; o++) {
        sh_row_dequantize(type, rows + o * sh_type_row_bytes(type, in), expected, in);
        sh_packed_row(type, packed, in, o, values);
        for (uint32_t i = 0; i < in; i++) {
            bool both_nan = expected[i] != expected[i] && values[i] != values[i];
            if (!both_nan && memcmp(&expected[i], &values[i], sizeof *values) != 0)
                fail_msg("%s out %u in %u: row %u value %u is %.9g, not %.9g",
                         sh_type_get((uint32_t)type)->name, out, in, o, i, (double)values[i],
                         (double)expected[i]);
        }
    }
    free(expected);
    free(values);
}

static void test_back(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 0, 1);
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        uint32_t block = sh_type_get((uint32_t)types[t])->block_values;
        for (uint32_t out = 1; out <= 50; out++) {
            uint32_t in = block * (1 + out % 5), groups = (out + 15) / 16;
            uint8_t *rows = random_rows(&rng, types[t], out, in);
            void *packed = sh_alloc_aligned(sh_pack_bytes(types[t], out, in));
            assert_non_null(packed);
            for (uint32_t g = groups; g-- > 0;) /* in any order */
                sh_pack_groups(types[t], rows, out, in, g, g + 1, packed);
            check_rows(types[t], rows, packed, out, in);
            free(packed);
            free(rows);
        }
    }
}

/* At most 5 % more than the file, in whole lines; floats have no packed form. */
static void test_bytes(void **state)
{
    (void)state;
    for (size_t t = 0; t < SH_COUNT(types); t++) {
        size_t packed = sh_pack_bytes(types[t], 160, 2048);
        size_t file = 160 * sh_type_row_bytes(types[t], 2048);
        assert_true(packed >= file && (double)packed <= 1.05 * (double)file);
        assert_int_equal(packed % 64, 0);
        assert_true(sh_product_takes_blocks(types[t]));
    }
    assert_int_equal(sh_pack_bytes(SH_TYPE_Q8_0, 17, 32), 2 * (64 + 512));
    static const sh_type floats[] = {SH_TYPE_F32, SH_TYPE_F16, SH_TYPE_BF16};
    for (size_t t = 0; t < SH_COUNT(floats); t++) {
        assert_int_equal(sh_pack_bytes(floats[t], 16, 32), 0);
        assert_false(sh_product_takes_blocks(floats[t]));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_back), cmocka_unit_test(test_bytes)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
