/*
 * Known bugs: they are where they should be, and nowhere else.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/canary.h"
#include "shared/base/file.h"
#include "shared/sync/sync.h"

static void test_names(void **state)
{
    (void)state;
    for (int a = 1; a < SH_CANARIES; a++) {
        const char *name = sh_canary_name((sh_canary)a);
        assert_non_null(name);
        assert_int_equal(sh_canary_find(name), a);
    }
    assert_int_equal(sh_canary_find("nightingale"), SH_CANARIES);
    assert_int_equal(sh_canary_find(""), SH_CANARIES);
    assert_int_equal(sh_canary_find(sh_canary_name(SH_CANARY_NONE)), SH_CANARIES);
    assert_string_equal(sh_canary_name(SH_CANARIES), "?");
}

/* Marks 1, 3, then 2: the mark is 3. With the bug, 3 is forgotten when 2 comes. */
static uint64_t marks(void)
{
    static const char *const tables[] = {"inbox"};
    static const uint64_t order[] = {1, 3, 2};
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    sh_hash node = {{1}};
    sh_msg_ack ack = {0};
    const sh_store_options options = {.tables = tables, .n_tables = 1};
    assert_int_equal(sh_store_open_memory(&options, &store, NULL), SH_OK);
    assert_int_equal(sh_txn_begin(store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    for (size_t i = 0; i < SH_COUNT(order); i++) {
        sh_msg_item item = {.epoch = 5,
                            .cls = SH_CLASS_WINDOW,
                            .seq = order[i],
                            .last_seq = order[i],
                            .kind = SH_ITEM_WINDOW};
        assert_int_equal(sh_inbox_mark(txn, 0, &node, &item, &ack, NULL), SH_OK);
    }
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return ack.high_water;
}

static void test_it_is_the_switch_that_makes_the_bug(void **state)
{
    (void)state;
    assert_int_equal(marks(), 3);
    sh_canary_on = SH_CANARY_FORGET_GAP;
    assert_int_equal(marks(), 2);
    sh_canary_on = SH_CANARY_NONE;
    assert_int_equal(marks(), 3);
}

static bool contains(const uint8_t *bytes, size_t n, const char *text)
{
    return memmem(bytes, n, text, strlen(text)) != NULL;
}

/* What is shipped has neither the switch nor the names. This program has both, so the search can
 * find them. */
static void test_shipped_programs_have_none(void **state)
{
    (void)state;
    static const struct {
        const char *path;
        bool has;
    } programs[] = {{NODE_PROGRAM, false}, {AGGREGATOR_PROGRAM, false}, {"/proc/self/exe", true}};
    for (size_t i = 0; i < SH_COUNT(programs); i++) {
        uint8_t *bytes = NULL;
        size_t n = 0;
        sh_error err = {0};
        if (sh_file_read(programs[i].path, SIZE_MAX, &bytes, &n, &err) != SH_OK)
            fail_msg("%s", err.text);
        assert_int_equal(contains(bytes, n, "sh_canary"), programs[i].has);
        for (int a = 1; a < SH_CANARIES; a++)
            assert_int_equal(contains(bytes, n, sh_canary_name((sh_canary)a)), programs[i].has);
        free(bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_it_is_the_switch_that_makes_the_bug),
        cmocka_unit_test(test_shipped_programs_have_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
