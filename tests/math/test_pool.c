/* Thread pool: order, completion, nesting, teardown. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/math/pool.h"

enum { JOBS = 200 };

typedef struct {
    atomic_size_t *ticket;
    size_t started, value;
} numbered;

static void take_number(void *arg)
{
    numbered *job = arg;
    job->started = atomic_fetch_add(job->ticket, 1);
    job->value = job->started * 3; /* plain memory: visible to who waited */
}

/* One worker starts jobs in submission order. */
static void test_order(void **state)
{
    (void)state;
    sh_pool *pool = NULL;
    atomic_size_t ticket = 0;
    numbered jobs[JOBS];
    sh_pool_job *handles[JOBS];
    assert_int_equal(sh_pool_create(1, &pool, NULL), SH_OK);
    assert_int_equal(sh_pool_threads(pool), 1);
    for (size_t i = 0; i < JOBS; i++) {
        jobs[i] = (numbered){.ticket = &ticket};
        handles[i] = sh_pool_submit(pool, take_number, &jobs[i]);
        assert_non_null(handles[i]);
    }
    for (size_t i = JOBS; i-- > 0;) { /* waiting in another order is fine */
        sh_pool_wait(pool, &handles[i]);
        assert_null(handles[i]);
        assert_int_equal(jobs[i].started, i);
        assert_int_equal(jobs[i].value, 3 * i);
    }
    sh_pool_destroy(&pool);
    assert_null(pool);
}

/* Destroy runs what was submitted, waited for or not. */
static void test_destroy_waits(void **state)
{
    (void)state;
    for (unsigned threads = 1; threads <= 4; threads++) {
        sh_pool *pool = NULL;
        atomic_size_t ticket = 0;
        numbered jobs[JOBS];
        assert_int_equal(sh_pool_create(threads, &pool, NULL), SH_OK);
        for (size_t i = 0; i < JOBS; i++) {
            jobs[i] = (numbered){.ticket = &ticket};
            assert_non_null(sh_pool_submit(pool, take_number, &jobs[i]));
        }
        sh_pool_destroy(&pool);
        assert_int_equal(ticket, JOBS);
    }
}

static void add_index(void *arg, size_t i)
{
    atomic_size_t *counts = arg;
    atomic_fetch_add(&counts[i], 1);
}

/* Each index once, for any numbers of threads and indices. */
static void test_for(void **state)
{
    (void)state;
    for (unsigned threads = 1; threads <= 4; threads++) {
        sh_pool *pool = NULL;
        assert_int_equal(sh_pool_create(threads, &pool, NULL), SH_OK);
        for (size_t n = 0; n < 50; n++) {
            atomic_size_t counts[50] = {0};
            sh_pool_for(pool, add_index, counts, n);
            for (size_t i = 0; i < 50; i++)
                assert_int_equal(counts[i], i < n ? 1 : 0);
        }
        sh_pool_destroy(&pool);
    }
}

typedef struct {
    sh_pool *pool;
    atomic_size_t counts[16];
} nested;

static void inner_loop(void *arg)
{
    nested *n = arg;
    sh_pool_for(n->pool, add_index, n->counts, 16);
}

/* Jobs that loop on their own pool end, even when they fill it. */
static void test_nested_for(void **state)
{
    (void)state;
    enum { OUTER = 12 };
    sh_pool *pool = NULL;
    static nested jobs[OUTER];
    sh_pool_job *handles[OUTER];
    assert_int_equal(sh_pool_create(2, &pool, NULL), SH_OK);
    for (size_t i = 0; i < OUTER; i++) {
        jobs[i].pool = pool;
        handles[i] = sh_pool_submit(pool, inner_loop, &jobs[i]);
        assert_non_null(handles[i]);
    }
    for (size_t i = 0; i < OUTER; i++) {
        sh_pool_wait(pool, &handles[i]);
        for (size_t k = 0; k < 16; k++)
            assert_int_equal(jobs[i].counts[k], 1);
    }
    sh_pool_destroy(&pool);
}

/* Out of memory at every place: an error or fewer helpers, never a lost index or a leak. */
static void test_no_memory(void **state)
{
    (void)state;
    sh_pool *pool = NULL;
    for (size_t n = 1; n <= 2; n++) {
        sh_alloc_fail_after(n);
        assert_int_equal(sh_pool_create(2, &pool, NULL), SH_ERR_NO_MEMORY);
        assert_null(pool);
    }
    sh_alloc_fail_after(0);
    assert_int_equal(sh_pool_create(3, &pool, NULL), SH_OK);
    for (size_t n = 1; n <= 3; n++) {
        atomic_size_t counts[8] = {0};
        sh_alloc_fail_after(n);
        sh_pool_for(pool, add_index, counts, 8);
        sh_alloc_fail_after(0);
        for (size_t i = 0; i < 8; i++)
            assert_int_equal(counts[i], 1);
    }
    sh_alloc_fail_after(1);
    assert_null(sh_pool_submit(pool, inner_loop, NULL));
    sh_alloc_fail_after(0);
    sh_pool_destroy(&pool);
}

static void test_limits(void **state)
{
    (void)state;
    sh_pool *pool = NULL;
    sh_error err = {0};
    sh_pool_job *none = NULL;
    assert_int_equal(sh_pool_create(0, &pool, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_pool_create(100000, &pool, &err), SH_ERR_LIMIT);
    assert_null(pool);
    sh_pool_destroy(&pool); /* takes NULL */
    assert_int_equal(sh_pool_create(1, &pool, &err), SH_OK);
    sh_pool_wait(pool, &none);
    sh_pool_destroy(&pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),     cmocka_unit_test(test_destroy_waits),
        cmocka_unit_test(test_for),       cmocka_unit_test(test_nested_for),
        cmocka_unit_test(test_no_memory), cmocka_unit_test(test_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
