/*
 * Feedback by a completion's id, the rings of completions, records and feedback with their limits
 * by count, bytes and age, and erasure.
 */
#include "tests/node/rig.h"

#include <stdlib.h>
#include <string.h>

#define ACCEPT SH_FEEDBACK_ACCEPT
#define EDIT   SH_FEEDBACK_EDIT
#define REJECT SH_FEEDBACK_REJECT

static rig *open_rig(uint64_t seed)
{
    rig *r = rig_open(seed);
    r->options.completions_max = 1000;
    r->options.feedback_tokens_max = 100000;
    return r;
}

typedef struct {
    sh_feedback rows[64];
    int32_t first[64];
    size_t n;
} rows;

static sh_status keep_row(void *arg, const sh_feedback *row)
{
    rows *all = arg;
    assert_true(all->n < SH_COUNT(all->rows));
    all->first[all->n] = row->tokens[0];
    all->rows[all->n++] = *row;
    return SH_OK;
}

static rows read_rows(rig *r)
{
    rows all = {0};
    sh_txn *txn = NULL;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_node_each_feedback(txn, keep_row, &all, &test_err));
    sh_txn_abort(&txn);
    return all;
}

static bool get(rig *r, uint64_t id, sh_completion_row *out)
{
    sh_txn *txn = NULL;
    sh_buf copy;
    sh_buf_init(&copy, 1 << 20);
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    sh_status status = sh_node_get_completion(txn, id, &copy, out, &test_err);
    sh_txn_abort(&txn);
    sh_buf_release(&copy);
    assert_true(status == SH_OK || status == SH_ERR_NOT_FOUND);
    return status == SH_OK;
}

static sh_record get_record(rig *r, uint64_t seq)
{
    sh_txn *txn = NULL;
    uint8_t key[8];
    sh_slice value;
    sh_record record;
    sh_key_put_u64(key, seq);
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_txn_get(txn, SH_NODE_T_RECORD, key, 8, &value));
    OK(sh_record_decode(value.data, value.n, &record, &test_err));
    sh_txn_abort(&txn);
    return record;
}

static void test_rate(void **state)
{
    (void)state;
    rig *r = open_rig(1);
    rig_start(r);
    for (unsigned i = 0; i < 4; i++)
        rig_infer(r, i, false);
    SAME(rig_status(r).last_completion, 4);
    sh_completion_row row;
    assert_true(get(r, 1, &row));
    SAME(row.record, 1);
    SAME(row.at_ms, r->now);
    SAME(row.rated, SH_FEEDBACK_NONE);
    SAME(row.release_version, 1);
    /* Accepted without text: the proposal is what the author means, after the whole context. */
    rig_rate(r, 1, ACCEPT, 0);
    rows all = read_rows(r);
    SAME(all.n, 2);
    SAME(all.rows[0].target, false);
    SAME(all.rows[0].offset, 0);
    SAME(all.rows[0].n, 6);
    SAME(all.rows[1].target, true);
    SAME(all.rows[1].accepted, true);
    SAME(all.rows[1].offset, 6);
    SAME(all.rows[1].n, 4);
    SAME(all.rows[1].user, 1);
    SAME(all.rows[1].at_ms, r->now);
    SAME(all.first[1], 6);
    /* The next of the session begins one token after that: it lacks one token of context. */
    rig_rate(r, 2, EDIT, 5);
    all = read_rows(r);
    SAME(all.n, 4);
    SAME(all.rows[2].user, 2); /* another user's text does not go on where this one's ended */
    SAME(all.rows[2].n, 6);
    SAME(all.rows[3].offset, 11);
    SAME(all.rows[3].n, 5);
    SAME(all.rows[3].accepted, false);
    SAME(all.first[3], 7000);
    SAME(rig_status(r).feedback_tokens, 9);
    /* A rejection without text teaches nothing, and is counted all the same. */
    rig_rate(r, 3, REJECT, 0);
    SAME(read_rows(r).n, 4);
    SAME(get_record(r, 3).feedback, REJECT);
    SAME(get_record(r, 2).feedback, EDIT);
    SAME(get_record(r, 2).edit_distance, 3);
    SAME(get_record(r, 4).feedback, SH_FEEDBACK_NONE);
    assert_true(get(r, 3, &row));
    SAME(row.rated, REJECT);
    /* The same again changes nothing; another opinion, or an id that is not there, is noted. */
    rig_rate(r, 2, EDIT, 9);
    SAME(read_rows(r).n, 4);
    SAME(r->notes[SH_NOTE_DROPPED], 0);
    rig_rate(r, 2, ACCEPT, 0);
    rig_rate(r, 77, ACCEPT, 0);
    SAME(r->notes[SH_NOTE_DROPPED], 2);
    SAME(r->note_number[SH_NOTE_DROPPED], 77);
    SAME(rig_status(r).feedback_tokens, 9);
    rig_close(&r);
}

/* One user's session, rated in order: each piece adds what the one before did not reach. */
static void test_context_is_kept_once(void **state)
{
    (void)state;
    rig *r = open_rig(2);
    rig_start(r);
    static const uint32_t offsets[] = {10, 14, 30};
    for (uint64_t id = 1; id <= 3; id++) {
        int32_t tokens[12] = {0};
        sh_node_event e = {.kind = SH_NODE_INFERENCE, .record = {.release_version = 1}};
        e.record.prompt_nll = 3;
        e.completion = (sh_completion_row){.id = id,
                                           .session = 5,
                                           .offset = offsets[id - 1],
                                           .n_context = 8,
                                           .n = 4,
                                           .tokens = tokens};
        rig_step(r, &e);
        rig_rate(r, id, ACCEPT, 0);
    }
    rows all = read_rows(r);
    SAME(all.n, 5); /* 8 of context and 4; 4; 8 of context and 4 */
    SAME(all.rows[0].offset, 2);
    SAME(all.rows[2].offset, 14);
    SAME(all.rows[2].target, true);
    SAME(all.rows[3].offset, 22);
    SAME(all.rows[3].n, 8);
    SAME(all.rows[3].target, false);
    rig_close(&r);
}

typedef struct {
    uint64_t feedback[SH_FEEDBACK_KINDS], edit_distance, windows;
} tally;

/* What the windows of the store say about feedback. */
static tally read_windows(rig *r)
{
    tally t = {0};
    sh_txn *txn = NULL;
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    OK(sh_txn_begin(r->store, SH_TXN_READ, &txn, &test_err));
    OK(sh_cursor_open(txn, SH_NODE_T_WINDOW, &cursor, &test_err));
    for (sh_status s = sh_cursor_seek(cursor, NULL, 0, &key, &value); s == SH_OK;
         s = sh_cursor_next(cursor, &key, &value)) {
        sh_window window;
        OK(sh_window_decode(value.data, value.n, &window, &test_err));
        for (int k = 0; k < SH_FEEDBACK_KINDS; k++)
            t.feedback[k] += window.feedback[k];
        t.edit_distance += window.edit_distance;
        t.windows++;
    }
    sh_cursor_close(&cursor);
    sh_txn_abort(&txn);
    return t;
}

static tally rated_story(uint64_t crash_at, rig_crash crash, uint64_t *steps)
{
    rig *r = open_rig(3);
    r->options.windows_max = 100;
    r->crash_at = crash_at;
    r->crash = crash;
    rig_start(r);
    for (unsigned i = 0; i < 100; i++) {
        while (!rig_infer(r, i, false))
            continue;
        if (i >= 5) /* late: the record is in the monitor of the store, or not yet */
            while (!rig_rate(r, i - 4, (sh_feedback_kind)(1 + i % 3), i % 3))
                continue;
    }
    SAME(rig_status(r).inferences, 100);
    tally t = read_windows(r);
    *steps = r->steps;
    rig_close(&r);
    return t;
}

/* Feedback is counted once, whenever the process dies. */
static void test_counted_once(void **state)
{
    (void)state;
    uint64_t steps, again;
    tally want = rated_story(UINT64_MAX, CRASH_NEVER, &steps);
    SAME(want.windows, 3);
    assert_true(want.feedback[ACCEPT] > 20 && want.feedback[EDIT] > 20 &&
                want.feedback[REJECT] > 20);
    for (uint64_t at = 0; at < steps; at += 3)
        for (int how = CRASH_BEFORE_COMMIT; how <= CRASH_AFTER_COMMIT; how++) {
            tally got = rated_story(at, (rig_crash)how, &again);
            if (memcmp(&got, &want, sizeof(got)) != 0)
                fail_msg("crash at step %llu: accepted %llu edited %llu rejected %llu",
                         (unsigned long long)at, (unsigned long long)got.feedback[ACCEPT],
                         (unsigned long long)got.feedback[EDIT],
                         (unsigned long long)got.feedback[REJECT]);
        }
}

static void test_rings(void **state)
{
    (void)state;
    rig *r = open_rig(4);
    r->options.completions_max = 10;
    r->options.records_bytes_max = 40 * 128;
    rig_start(r);
    for (unsigned i = 0; i < 60; i++)
        rig_infer(r, i, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 10);
    SAME(rig_count(r, SH_NODE_T_RECORD), 40);
    sh_completion_row row;
    assert_false(get(r, 50, &row));
    assert_true(get(r, 51, &row));
    r->options.completions_bytes_max = 5 * (8 + 50 + 40);
    rig_restart(r);
    rig_infer(r, 60, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 5);
    /* An id that is there is not kept twice; one older than all of a full ring goes at once. */
    rig_infer(r, 60, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 5);
    SAME(r->notes[SH_NOTE_DROPPED], 1);
    rig_infer(r, 3, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 5);
    assert_false(get(r, 4, &row));
    SAME(r->notes[SH_NOTE_DROPPED], 1);
    SAME(rig_status(r).last_completion, 61);
    /* Requests that run side by side end in another order than they began. */
    rig_infer(r, 70, false);
    rig_infer(r, 69, false);
    assert_true(get(r, 70, &row));
    assert_true(get(r, 71, &row));
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 5);
    SAME(r->notes[SH_NOTE_DROPPED], 1);
    SAME(rig_status(r).last_completion, 71);
    rig_close(&r);
}

static void test_age(void **state)
{
    (void)state;
    rig *r = open_rig(5);
    r->options.completions_age_ms_max = 1000;
    r->options.feedback_age_ms_max = 2000;
    r->options.records_age_ms_max = 3000;
    r->options.records_max = 1000;
    rig_start(r);
    for (unsigned i = 0; i < 200; i++) /* more than a step lets go */
        rig_infer(r, i, false);
    rig_rate(r, 1, ACCEPT, 0);
    rig_run(r, 500, false);
    rig_infer(r, 200, false);
    rig_run(r, 400, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 201);
    rig_run(r, 200, false); /* nothing but timers */
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 1);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 2);
    rig_run(r, 1000, false);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 0);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK), 0);
    SAME(rig_status(r).feedback_tokens, 0);
    SAME(rig_count(r, SH_NODE_T_RECORD), 201);
    rig_run(r, 1000, false);
    SAME(rig_count(r, SH_NODE_T_RECORD), 1);
    rig_restart(r); /* its time is found again */
    rig_run(r, 500, false);
    SAME(rig_count(r, SH_NODE_T_RECORD), 0);
    rig_infer(r, 201, false);
    rig_teach(r, 9, 0, 10, true);
    SAME(rig_status(r).feedback_tokens, 10);
    SAME(rig_status(r).inferences, 202);
    rig_close(&r);
}

/* ---- erasure ---- */

static uint64_t rows_of(rig *r, uint64_t user)
{
    uint64_t n = 0;
    sh_completion_row row;
    rows all = read_rows(r);
    for (size_t i = 0; i < all.n; i++)
        n += all.rows[i].user == user;
    for (uint64_t id = 1; id <= rig_status(r).last_completion; id++)
        n += get(r, id, &row) && row.user == user;
    return n;
}

static void test_erase(void **state)
{
    (void)state;
    rig *r = open_rig(6);
    r->drop_cancelled = true;
    rig_start(r);
    for (unsigned i = 0; i < 12; i++) {
        rig_infer(r, i, false);
        rig_rate(r, i + 1, ACCEPT, 0);
    }
    uint64_t before[3] = {rows_of(r, 1), rows_of(r, 2), rows_of(r, 3)};
    SAME(rig_status(r).feedback_tokens, 48);
    rig_link(r, true);
    r->plan.train = rig_train_plan(r, 1, 1);
    rig_run(r, 100, false);
    assert_true(rig_job_waits(r, SH_JOB_TRAIN));
    rig_erase(r, 2);
    SAME(r->cancelled, 1);
    assert_false(rig_job_waits(r, SH_JOB_TRAIN));
    SAME(r->notes[SH_NOTE_ERASED], 1);
    SAME(r->note_number[SH_NOTE_ERASED], before[1]);
    SAME(rows_of(r, 2), 0);
    SAME(rows_of(r, 1), before[0]);
    SAME(rows_of(r, 3), before[2]);
    SAME(rig_status(r).feedback_tokens, 32);
    rig_run(r, 3000, true); /* the round is trained after all, without them */
    SAME(rig_status(r).updates_made, 1);
    rig_infer(r, 13, false); /* of user 2, after it: this stays */
    rig_rate(r, 14, ACCEPT, 0);
    assert_true(rows_of(r, 2) > 0);
    rig_erase(r, 0);
    SAME(rows_of(r, 1) + rows_of(r, 2) + rows_of(r, 3), 0);
    SAME(rig_status(r).feedback_tokens, 0);
    SAME(rig_count(r, SH_NODE_T_FEEDBACK) + rig_count(r, SH_NODE_T_COMPLETION), 0);
    rig_erase(r, 5); /* nothing to do is said too */
    SAME(r->notes[SH_NOTE_ERASED], 3);
    SAME(r->note_number[SH_NOTE_ERASED], 0);
    rig_close(&r);
}

/* More rows than a step looks at: it goes on by itself, after a crash too, and what comes in
 * meanwhile stays. */
static void erase_many(uint64_t crash_after, rig_crash crash)
{
    rig *r = open_rig(7);
    r->options.completions_max = 10000;
    r->options.records_max = 10000;
    rig_start(r);
    for (unsigned i = 0; i < 2600; i++)
        rig_infer(r, i, false);
    r->crash_at = r->steps + crash_after;
    r->crash = crash;
    while (!rig_erase(r, 1))
        continue;
    while (!rig_infer(r, 2601, false))
        continue;
    SAME(r->notes[SH_NOTE_ERASED], 0);
    rig_run(r, 100, false);
    SAME(r->notes[SH_NOTE_ERASED], 1);
    SAME(r->note_number[SH_NOTE_ERASED], 867);
    uint64_t left = 0;
    sh_completion_row row;
    for (uint64_t id = 1; id <= 2600; id++)
        left += get(r, id, &row) && row.user == 1;
    SAME(left, 0);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 2600 - 867 + 1);
    rig_close(&r);
}

static void test_erase_in_steps(void **state)
{
    (void)state;
    erase_many(1000000, CRASH_NEVER);
    for (uint64_t at = 0; at < 3; at++) {
        erase_many(at, CRASH_BEFORE_COMMIT);
        if (at != 2) /* the step that ends it: the note is lost with the process */
            erase_many(at, CRASH_AFTER_COMMIT);
    }
}

/* A second one while the first is under way. */
static void test_erase_twice(void **state)
{
    (void)state;
    rig *r = open_rig(8);
    r->options.completions_max = r->options.records_max = 10000;
    rig_start(r);
    for (unsigned i = 0; i < 1800; i++)
        rig_infer(r, i, false);
    rig_erase(r, 1);
    rig_erase(r, 2);
    rig_run(r, 100, false);
    SAME(r->notes[SH_NOTE_ERASED], 2);
    SAME(rig_count(r, SH_NODE_T_COMPLETION), 600);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rate),
        cmocka_unit_test(test_context_is_kept_once),
        cmocka_unit_test(test_counted_once),
        cmocka_unit_test(test_rings),
        cmocka_unit_test(test_age),
        cmocka_unit_test(test_erase),
        cmocka_unit_test(test_erase_in_steps),
        cmocka_unit_test(test_erase_twice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
