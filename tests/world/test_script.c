/*
 * Fault scripts: made from a seed, as text, and shrunk.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "experiments/world/script.h"

#define DAY_MS UINT64_C(86400000)

static void make(uint64_t seed, uint32_t nodes, uint32_t days, world_script *out)
{
    sh_error err = {0};
    if (world_script_make(seed, nodes, days, out, &err) != SH_OK)
        fail_msg("%s", err.text);
}

static void test_every_kind_is_there(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 200; seed++) {
        world_script script = {0};
        uint64_t down[20] = {0}, n[WORLD_FAULT_KINDS] = {0};
        bool lies[20] = {0}, copied[20] = {0};
        make(seed, 20, 2, &script);
        for (size_t i = 0; i < script.n; i++) {
            const world_fault *f = &script.faults[i];
            n[f->kind]++;
            assert_true(i == 0 || script.faults[i - 1].at_ms <= f->at_ms);
            assert_true(f->at_ms + f->for_ms <= world_script_quiet_ms(2));
            assert_true(f->target < 20 || f->target == WORLD_AGGREGATOR || f->target == WORLD_ALL);
            if (f->target >= 20)
                continue;
            lies[f->target] |= world_fault_is_lie(f->kind);
            copied[f->target] |= f->kind == WORLD_CLONE || f->kind == WORLD_RESTORE;
            if (f->kind == WORLD_CRASH || f->kind == WORLD_TORN || f->kind == WORLD_PARTITION)
                down[f->target] += f->for_ms;
        }
        unsigned liars = 0;
        for (int i = 0; i < 20; i++) {
            liars += lies[i];
            assert_false(lies[i] && copied[i]);
            assert_true(down[i] <= DAY_MS);
        }
        assert_in_range(liars, 1, 5);
        for (int kind = 0; kind < WORLD_FAULT_KINDS; kind++)
            if (n[kind] == 0)
                fail_msg("seed %d: no fault of kind %s", (int)seed,
                         world_fault_name((world_fault_kind)kind));
        world_script_release(&script);
    }
}

static void test_sizes(void **state)
{
    (void)state;
    static const uint32_t sizes[][2] = {{1, 1}, {3, 1}, {4, 1}, {10000, 30}};
    for (size_t i = 0; i < SH_COUNT(sizes); i++) {
        world_script script = {0};
        make(5, sizes[i][0], sizes[i][1], &script);
        assert_true(script.n > 0);
        for (size_t k = 0; k < script.n && sizes[i][0] < 4; k++)
            assert_false(world_fault_is_lie(script.faults[k].kind));
        world_script_release(&script);
    }
    world_script script = {0};
    assert_int_equal(world_script_make(1, 0, 1, &script, NULL), SH_ERR_USAGE);
    assert_int_equal(world_script_make(1, 1, 0, &script, NULL), SH_ERR_USAGE);
    assert_null(script.faults);
}

static void print(const world_script *script, sh_buf *out)
{
    sh_buf_init(out, WORLD_SCRIPT_BYTES_MAX);
    assert_int_equal(world_script_print(script, out, NULL), SH_OK);
}

static void test_text_and_back(void **state)
{
    (void)state;
    for (uint64_t seed = 0; seed < 50; seed++) {
        world_script script = {0}, back = {0}, again = {0};
        sh_buf text, text2;
        sh_error err = {0};
        make(seed, 20, 2, &script);
        make(seed, 20, 2, &again);
        print(&script, &text);
        if (world_script_parse((const char *)text.data, text.len, &back, &err) != SH_OK)
            fail_msg("%s", err.text);
        assert_int_equal(back.n, script.n);
        for (size_t i = 0; i < script.n; i++) {
            const world_fault *a = &script.faults[i], *b = &back.faults[i], *c = &again.faults[i];
            assert_true(a->kind == b->kind && a->target == b->target && a->at_ms == b->at_ms &&
                        a->for_ms == b->for_ms && a->rate == b->rate && a->number == b->number);
            assert_true(a->kind == c->kind && a->at_ms == c->at_ms && a->number == c->number);
        }
        print(&back, &text2);
        assert_int_equal(text.len, text2.len);
        assert_memory_equal(text.data, text2.data, text.len);
        sh_buf_release(&text);
        sh_buf_release(&text2);
        world_script_release(&script);
        world_script_release(&back);
        world_script_release(&again);
    }
}

static void test_bad_texts(void **state)
{
    (void)state;
#define HEAD "shoal-faults 1\nseed 7 nodes 3 days 1\n"
    static const struct {
        const char *text, *says;
    } bad[] = {
        {"", "must begin"},
        {"shoal-faults 1\n", "must begin"},
        {"shoal-faults 2\nseed 7 nodes 3 days 1\n", "line 1: 1 expected, not '2'"},
        {"seed 7 nodes 3 days 1\n", "line 1: 'shoal-faults 1'"},
        {"shoal-faults 1\nseed 7 nodes 0 days 1\n", "line 2: at least one"},
        {"shoal-faults 1\nseed x nodes 1 days 1\n", "line 2: a number in its range expected, "
                                                    "not 'x'"},
        {"shoal-faults 1\nseed 18446744073709551616 nodes 1 days 1\n", "line 2: a number"},
        {HEAD "at 1 for 2 flood node 1 rate 0 number 0\n", "line 3: a kind of fault expected"},
        {HEAD "at 1 for 2 drop node 3 rate 0 number 0\n", "line 3: a number in its range"},
        {HEAD "at 1 for 2 drop nobody rate 0 number 0\n", "'node', 'all' or 'aggregator'"},
        {HEAD "at 1 for 2 clone all rate 0 number 0\n", "line 3: one node to clone expected"},
        {HEAD "at 1 for 2 drop node 1 rate 2 number 0\n", "a rate from -1 to 1"},
        {HEAD "at 1 for 2 drop node 1 rate nan number 0\n", "a rate from -1 to 1"},
        {HEAD "at 1 for 2 drop node 1 rate 0 number 0 0\n", "the end of the line"},
        {HEAD "at 1 for 2 drop node 1 rate 0\n", "number expected, not ''"},
        {HEAD "at 99999999999999999 for 2 drop all rate 0 number 0\n", "line 3: a number"},
    };
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        world_script script = {0};
        sh_error err = {0};
        assert_int_equal(world_script_parse(bad[i].text, strlen(bad[i].text), &script, &err),
                         SH_ERR_INVALID);
        if (strstr(err.text, bad[i].says) == NULL)
            fail_msg("'%s' says '%s', not '%s'", bad[i].text, err.text, bad[i].says);
        assert_null(script.faults);
    }
    static const char good[] =
        "# a comment\n\n" HEAD "at 5 for 0 crash node 2 rate 0 number 0 # so\r\n"
        "  at 4 for 9 torn aggregator rate 0.5 number 3";
    world_script script = {0};
    assert_int_equal(world_script_parse(good, sizeof good - 1, &script, NULL), SH_OK);
    assert_int_equal(script.n, 2);
    assert_int_equal(script.faults[0].kind, WORLD_TORN); /* in order of time */
    assert_int_equal(script.faults[0].target, WORLD_AGGREGATOR);
    assert_int_equal(script.faults[1].target, 2);
    world_script_release(&script);
}

/* Fails when faults `need[0]` and `need[1]` (their numbers) are there and last for 5 s. */
typedef struct {
    uint64_t need[2];
    unsigned runs;
    sh_status status;
} bug;

static sh_status run_bug(void *arg, const world_script *script, bool *fails, sh_error *err)
{
    bug *b = arg;
    unsigned found = 0;
    b->runs++;
    assert_int_equal(script->seed, 9);
    for (size_t i = 0; i < script->n; i++)
        for (int k = 0; k < 2; k++)
            found += script->faults[i].number == b->need[k] && script->faults[i].for_ms >= 5000;
    *fails = found == 2;
    return b->status == SH_OK ? SH_OK : sh_fail(err, b->status, "no run");
}

static void test_shrink(void **state)
{
    (void)state;
    world_script script = {.seed = 9, .nodes = 20, .days = 2}, small = {0};
    for (uint64_t i = 0; i < 100; i++) {
        world_fault f = {.kind = WORLD_DROP, .at_ms = i, .for_ms = 100000, .number = i};
        assert_int_equal(world_script_add(&script, &f, NULL), SH_OK);
    }
    for (uint64_t a = 0; a < 100; a += 13) {
        bug b = {.need = {a, 99 - a / 2}};
        uint32_t runs = 0;
        assert_int_equal(world_script_shrink(&script, run_bug, &b, 1000, &small, &runs, NULL),
                         SH_OK);
        assert_int_equal(small.n, 2);
        assert_int_equal(small.faults[0].number, SH_MIN(b.need[0], b.need[1]));
        assert_int_equal(small.faults[1].number, SH_MAX(b.need[0], b.need[1]));
        assert_in_range(small.faults[0].for_ms, 5000, 9999);
        assert_in_range(small.faults[1].for_ms, 5000, 9999);
        assert_int_equal(runs, b.runs);
        assert_true(runs < 150);
        world_script_release(&small);
    }
    bug b = {.need = {3, 77}};
    uint32_t runs = 0;
    assert_int_equal(world_script_shrink(&script, run_bug, &b, 7, &small, &runs, NULL), SH_OK);
    assert_int_equal(runs, 7);
    bool fails = false; /* what it gives back has failed, however few the runs */
    assert_int_equal(run_bug(&b, &small, &fails, NULL), SH_OK);
    assert_true(fails);
    world_script_release(&small);
    b.status = SH_ERR_IO;
    assert_int_equal(world_script_shrink(&script, run_bug, &b, 7, &small, &runs, NULL), SH_ERR_IO);
    assert_null(small.faults);
    world_script_release(&script);
}

/* A bug that needs no fault at all is shown by the empty script, in one run. */
static sh_status run_always(void *arg, const world_script *script, bool *fails, sh_error *err)
{
    (void)arg;
    (void)script;
    (void)err;
    *fails = true;
    return SH_OK;
}

static void test_shrink_to_nothing(void **state)
{
    (void)state;
    world_script script = {0}, small = {0};
    uint32_t runs = 0;
    make(1, 20, 2, &script);
    assert_int_equal(world_script_shrink(&script, run_always, NULL, 100, &small, &runs, NULL),
                     SH_OK);
    assert_int_equal(small.n, 0);
    assert_int_equal(runs, 1);
    world_script_release(&small);
    world_script_release(&script);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_kind_is_there),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_text_and_back),
        cmocka_unit_test(test_bad_texts),
        cmocka_unit_test(test_shrink),
        cmocka_unit_test(test_shrink_to_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
