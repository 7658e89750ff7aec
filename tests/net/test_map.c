/* The table of keys against a plain array. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "shared/base/rng.h"
#include "shared/net/net_internal.h"

#define KEYS  300
#define STEPS 20000
#define MOST  200

/* Keys that crowd around few places, so that searches are long and pass the end of the table. */
static sh_hash key_of(uint32_t i)
{
    sh_hash key = {{0}};
    key.b[0] = (uint8_t)(i % 5);
    memcpy(key.b + 8, &i, sizeof i);
    return key;
}

static void test_like_an_array(void **state)
{
    (void)state;
    net_map map = {.max = MOST};
    uint64_t values[KEYS], value;
    bool there[KEYS] = {false};
    size_t n = 0, refused = 0;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 1);
    for (int step = 0; step < STEPS; step++) {
        uint32_t i = (uint32_t)sh_rng_below(&rng, KEYS);
        sh_hash key = key_of(i);
        /* It grows for a while, then shrinks. */
        if (sh_rng_below(&rng, 100) < (step / 2000 % 2 ? 30 : 70)) {
            uint64_t x = sh_rng_u64(&rng);
            sh_status status = net_map_put(&map, &key, x);
            assert_int_equal(status, !there[i] && n == MOST ? SH_ERR_LIMIT : SH_OK);
            refused += status != SH_OK;
            n += status == SH_OK && !there[i];
            if (status == SH_OK)
                there[i] = true, values[i] = x;
        } else {
            net_map_remove(&map, &key);
            n -= there[i];
            there[i] = false;
        }
        assert_int_equal(map.n, n);
        for (uint32_t k = 0; step % 16 == 0 && k < KEYS; k++) {
            sh_hash other = key_of(k);
            assert_int_equal(net_map_get(&map, &other, &value), there[k]);
            if (there[k])
                assert_int_equal(value, values[k]);
        }
    }
    assert_true(refused > 0);
    for (; n > 0; n--) {
        assert_int_equal(map.n, n);
        net_map_evict(&map);
    }
    assert_int_equal(map.n, 0);
    net_map_evict(&map);
    net_map_release(&map);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_like_an_array)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
