/*
 * Copies of a store: a disk is cloned and both devices run, or a backup is put back. A copy is made
 * of a device that is off, or of one that goes on. Whatever they do, on a network that loses,
 * repeats and reorders, and gives one what is meant for another, with crashes, against one
 * aggregator: what an acknowledgement took out of an outbox is there, nothing is there twice, by
 * content, and in the end no copy owes anything (docs/decisions/0015).
 */
#include "tests/node/rig.h"

#include <stdlib.h>
#include <string.h>

#define COPIES    3u
#define CONTENTS  8192u
#define TURNS     150u
#define ITEMS_MAX 512u

typedef struct {
    sh_hash hash;
    unsigned taken;
} content;

typedef struct {
    rig *r;
    rig_copy copies[COPIES]; /* those that do not run now; store NULL: none */
    sh_store *backup;
    content contents[CONTENTS];
    size_t n;
    sh_hash owed[ITEMS_MAX], before[ITEMS_MAX];
    size_t n_owed, n_before;
    unsigned inferences;
    bool live; /* copies are also made of a device that goes on */
    sh_rng rng;
} world;

static content *find(world *w, const sh_hash *hash)
{
    for (size_t i = 0; i < w->n; i++)
        if (sh_hash_equal(&w->contents[i].hash, hash))
            return &w->contents[i];
    assert_true(w->n < CONTENTS);
    w->contents[w->n] = (content){.hash = *hash};
    return &w->contents[w->n++];
}

static void on_taken(void *arg, const sh_msg_item *item)
{
    sh_hash hash = sh_sha256(item->payload.data, item->payload.n);
    content *c = find(arg, &hash);
    if (c->taken++ > 0)
        fail_msg("seed %llu: class %u sequence %llu of epoch %llx is counted a second time",
                 (unsigned long long)((world *)arg)->r->seed, item->cls,
                 (unsigned long long)item->seq, (unsigned long long)item->epoch);
}

/* They have one key: what goes to one of them may come to another. */
static void on_answer(void *arg, const sh_buf *message)
{
    world *w = arg;
    for (unsigned i = 0; i < COPIES; i++)
        if (w->copies[i].node != NULL && w->r->lose > 0 && sh_rng_below(&w->rng, 20) == 0)
            rig_copy_packet(&w->copies[i], message->data, message->len);
}

static void read_owed(world *w)
{
    const sh_outbox outbox = {.table = SH_NODE_T_OUTBOX, .meta_table = SH_NODE_T_META};
    sh_txn *txn = NULL;
    sh_msg_item item;
    w->n_owed = 0;
    OK(sh_txn_begin(w->r->store, SH_TXN_READ, &txn, &test_err));
    for (unsigned cls = 0; cls < SH_CLASSES; cls++)
        for (uint64_t from = 0; sh_outbox_next(&outbox, txn, (sh_class)cls, from, &item) == SH_OK;
             from = item.last_seq + 1) {
            assert_int_not_equal(item.kind, SH_ITEM_TOMBSTONE); /* the quota is never reached */
            assert_true(w->n_owed < ITEMS_MAX);
            w->owed[w->n_owed++] = sh_sha256(item.payload.data, item.payload.n);
        }
    sh_txn_abort(&txn);
}

/* After anything that the present copy did: what it owes no more, the aggregator has. */
static void check(world *w)
{
    memcpy(w->before, w->owed, sizeof(w->owed));
    w->n_before = w->n_owed;
    read_owed(w);
    for (size_t i = 0; i < w->n_before; i++) {
        bool owed = false;
        for (size_t k = 0; k < w->n_owed && !owed; k++)
            owed = sh_hash_equal(&w->before[i], &w->owed[k]);
        if (!owed && find(w, &w->before[i])->taken == 0)
            fail_msg("seed %llu: an item was acknowledged and is nowhere",
                     (unsigned long long)w->r->seed);
    }
}

static void swap(world *w, unsigned i)
{
    bool first = w->copies[i].node == NULL;
    rig_swap(w->r, &w->copies[i]);
    read_owed(w);
    if (first && sh_rng_below(&w->rng, 2) == 0)
        rig_link(w->r, true);
}

static void restart(world *w)
{
    rig_restart(w->r);
    check(w);
}

/* The disk is copied: the device is off meanwhile, and comes back, or goes on. */
static sh_store *copy(world *w)
{
    sh_store *store = rig_copy_store(w->r);
    if (!w->live || sh_rng_below(&w->rng, 3) == 0)
        restart(w);
    return store;
}

static void put_back(world *w)
{
    rig_copy backup = {.store = w->backup};
    w->backup = NULL;
    rig_swap(w->r, &backup);
    rig_copy_release(&backup);
    read_owed(w);
}

static void turn(world *w)
{
    rig *r = w->r;
    unsigned what = (unsigned)sh_rng_below(&w->rng, 100), i = what % COPIES;
    r->crash_at = UINT64_MAX;
    if (what < 20) {
        r->crash_at = r->steps + sh_rng_below(&w->rng, 40);
        r->crash = sh_rng_below(&w->rng, 2) ? CRASH_BEFORE_COMMIT : CRASH_AFTER_COMMIT;
    } else if (what < 26) {
        restart(w);
    } else if (what < 32) { /* in the place of one that is destroyed, perhaps */
        rig_copy_release(&w->copies[i]);
        w->copies[i] = (rig_copy){.store = copy(w)};
    } else if (what < 50 && w->copies[i].store != NULL) {
        swap(w, i);
    } else if (what < 56 && w->backup == NULL) {
        w->backup = copy(w);
    } else if (what < 60 && w->backup != NULL) {
        put_back(w);
    } else if (what < 72) {
        rig_link(r, !r->link);
    } else if (what < 92) {
        for (unsigned k = (unsigned)sh_rng_below(&w->rng, 60); k > 0; k--)
            (void)rig_infer(r, w->inferences++, false);
    }
    rig_run(r, sh_rng_below(&w->rng, 600), false);
    check(w);
}

/* Faults stop: the copy delivers all that it owes. */
static void settle(world *w)
{
    rig *r = w->r;
    if (!r->link)
        rig_link(r, true);
    for (unsigned i = 0; i < 200 && rig_status(r).outbox_items > 0; i++) {
        rig_run(r, 500, false);
        check(w);
    }
    if (rig_status(r).outbox_items > 0)
        fail_msg("seed %llu: a copy still owes %llu items", (unsigned long long)r->seed,
                 (unsigned long long)rig_status(r).outbox_items);
    SAME(rig_status(r).bad_messages, 0);
}

static unsigned run(uint64_t seed, bool lossy, bool live)
{
    world *w = calloc(1, sizeof(*w));
    assert_non_null(w);
    rig *r = w->r = rig_open(seed);
    sh_rng_init(&w->rng, seed, 0, 81);
    w->live = live;
    r->on_taken = on_taken;
    r->on_answer = on_answer;
    r->arg = w;
    r->lose = lossy ? (unsigned)(seed % 25) : 0;
    r->repeat = r->lose;
    r->reorder = lossy;
    rig_start(r);
    for (unsigned i = 0; i < TURNS; i++)
        turn(w);
    r->crash_at = UINT64_MAX;
    r->lose = r->repeat = 0;
    settle(w);
    for (unsigned i = 0; i < COPIES; i++)
        if (w->copies[i].store != NULL) {
            swap(w, i);
            settle(w);
            rig_copy_release(&w->copies[i]);
        }
    unsigned renewed = r->renewed;
    sh_store_close(&w->backup);
    rig_close(&w->r);
    free(w);
    return renewed;
}

/* Seeds from 1 on. */
static void run_all(uint64_t seeds, bool lossy, bool live)
{
    unsigned renewed = 0;
    for (uint64_t seed = 1; seed <= seeds; seed++)
        renewed += run(seed, lossy, live);
    assert_true(renewed > 100);
}

static void copies_on_a_good_network(void **state)
{
    (void)state;
    run_all(30, false, false);
}

static void copies_on_a_bad_network(void **state)
{
    (void)state;
    run_all(60, true, false);
}

static void copies_of_what_runs_on_a_good_network(void **state)
{
    (void)state;
    run_all(120, false, true);
}

static void copies_of_what_runs_on_a_bad_network(void **state)
{
    (void)state;
    run_all(260, true, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(copies_on_a_good_network),
        cmocka_unit_test(copies_on_a_bad_network),
        cmocka_unit_test(copies_of_what_runs_on_a_good_network),
        cmocka_unit_test(copies_of_what_runs_on_a_bad_network),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
