/* Federated evaluation: who is asked, what counts, and who may not decide alone. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/aggregator/rig.h"

#define EPOCH    77
#define CANARY   3600000u
#define CANARIES 8 /* nodes 3 to 10 */

static void set_options(rig *r)
{
    rig_init(r, NULL);
    r->options.canary_nodes_min = 3;
    r->options.canary_tokens_min = 1000;
    r->options.canary_share = 1;
    r->options.canary_ms_max = CANARY;
    r->options.round_ms_max = 10 * CANARY;
}

static rig *boot(rig *r)
{
    rig_boot(r);
    for (unsigned node = 0; node < 3 + CANARIES; node++)
        rig_enrol(r, node);
    return r;
}

static rig *setup(void)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    set_options(r);
    return boot(r);
}

static void finish(rig *r)
{
    rig_check(r, true);
    rig_release(r);
    free(r);
}

static void offer_three(rig *r, uint64_t seq)
{
    for (unsigned node = 0; node < 3; node++) {
        rig_update u = rig_make(r, node, seq);
        assert_true(rig_offer(r, node, &u));
    }
}

/* A candidate that the suites let pass. */
static void to_canary(rig *r, uint64_t seq)
{
    offer_three(r, seq);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    assert_true(rig_status(r).evaluating);
}

static sh_evaluate_plan ask(rig *r, unsigned node)
{
    return rig_checkin(r, node, rig_status(r).version, false).evaluate;
}

static void answer(rig *r, unsigned node, uint64_t seq, double tokens, double parent,
                   double candidate)
{
    sh_evaluate_plan plan = ask(r, node);
    assert_true(plan.candidate != 0);
    assert_true(rig_evaluate(r, node, seq, &plan, (double[3]){tokens, parent, candidate}));
}

static sh_release_row row_of(rig *r, uint64_t candidate)
{
    bool found;
    sh_release_row row = rig_candidate(r, candidate, &found);
    assert_true(found);
    return row;
}

static void test_nodes_let_a_candidate_pass(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    assert_int_equal(r->notes[SH_CNOTE_CANARY_STARTED], 1);
    assert_int_equal(rig_status(r).version, 1);
    assert_int_equal(rig_status(r).candidate, 1);
    sh_evaluate_plan plan = ask(r, 3);
    assert_int_equal(plan.candidate, 1);
    assert_int_equal(plan.parent_version, 1);
    assert_int_equal(plan.model.bytes, RIG_MODEL_BYTES);
    assert_int_equal(rig_checkin(r, 4, 0, false).evaluate.candidate, 0); /* runs another release */
    answer(r, 3, 1, 500, 3.0, 2.8);
    assert_int_equal(rig_status(r).evaluations, 1);
    assert_int_equal(ask(r, 3).candidate, 0);                              /* it has answered */
    assert_true(rig_evaluate(r, 3, 2, &plan, (double[3]){500, 3.0, 9.0})); /* and once is all */
    assert_int_equal(rig_status(r).evaluations, 1);
    answer(r, 4, 1, 0, 0, 0); /* nothing to say: it is no node with data */
    answer(r, 5, 1, 300, 3.0, 2.9);
    rig_reboot(r);
    assert_int_equal(rig_status(r).evaluations, 3);
    assert_true(rig_status(r).evaluating);
    answer(r, 6, 1, 400, 3.0, 2.7);
    sh_coord_status s = rig_status(r);
    assert_false(s.evaluating);
    assert_int_equal(s.version, 2);
    assert_int_equal(s.updates_merged, 3);
    sh_release_row row = row_of(r, 1);
    assert_int_equal(row.canary_nodes, 3);
    assert_int_equal(row.canary_tokens, 1200);
    assert_true(fabs(row.canary_parent - 3.0) < 1e-9);
    assert_true(fabs(row.canary_candidate - (500 * 2.8 + 300 * 2.9 + 400 * 2.7) / 1200) < 1e-9);
    assert_true(row.loss_candidate == 2.9 && row.loss_parent == 3.0);
    assert_string_equal(row.verdict, "released");
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    assert_true(rig_evaluate(r, 7, 1, &plan, (double[3]){500, 3.0, 9.0})); /* late */
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    finish(r);
}

static void test_nodes_refuse(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    for (unsigned node = 3; node < 6; node++)
        answer(r, node, 1, 400, 3.0, 3.1);
    sh_coord_status s = rig_status(r);
    assert_int_equal(s.version, 1);
    assert_int_equal(s.candidates_refused, 1);
    assert_int_equal(s.updates_refused[SH_REASON_GATE], 3);
    assert_string_equal(row_of(r, 1).verdict, "refused: canary loss up by 0.1000, over 0");
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), 3);
    /* At a raised scale the same updates are tried again, as when the suites refuse. */
    assert_true(rig_command(r, SH_COMMAND_SERVER_SCALE, 0, 4, 0));
    to_canary(r, 2);
    for (unsigned node = 3; node < 6; node++)
        answer(r, node, 2, 400, 3.0, 3.1);
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_true(r->job.server_scale == 1);
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    for (unsigned node = 3; node < 6; node++)
        answer(r, node, 3, 400, 3.0, 2.9);
    assert_int_equal(rig_status(r).version, 2);
    finish(r);
}

/* One liar among honest nodes: it can neither refuse a good candidate nor publish a bad one,
 * whatever it claims. */
static void test_a_poisoner_does_not_decide(void **state)
{
    (void)state;
    const struct {
        double honest, liar;
        double tokens;
        uint64_t version;
    } cases[] = {{2.9, 1e6, 300, 2},  {2.9, 49, 4e9, 2}, {3.1, 0, 300, 1},
                 {3.0001, 0, 4e9, 1}, {2.9, 0, 4e9, 2},  {3.1, 1e300, 400, 1}};
    for (size_t i = 0; i < SH_COUNT(cases); i++)
        for (unsigned liar = 3; liar < 7; liar++) {
            rig *r = calloc(1, sizeof *r);
            assert_non_null(r);
            set_options(r);
            r->options.canary_nodes_min = 4;
            boot(r);
            to_canary(r, 1);
            for (unsigned node = 3; node < 7; node++) {
                bool lies = node == liar;
                answer(r, node, 1, lies ? cases[i].tokens : 400 + node, 3.0,
                       lies ? cases[i].liar : cases[i].honest);
            }
            assert_false(rig_status(r).evaluating);
            if (rig_status(r).version != cases[i].version) {
                print_error("case %zu, node %u lies: %s\n", i, liar, row_of(r, 1).verdict);
                fail();
            }
            assert_true(row_of(r, 1).canary_tokens < 4000); /* four times the median, at most */
            finish(r);
        }
}

/* Two of four see a loss that the mean does not forgive. */
static void test_harm_to_some_is_harm(void **state)
{
    (void)state;
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    set_options(r);
    r->options.canary_nodes_min = 4;
    boot(r);
    to_canary(r, 1);
    answer(r, 3, 1, 400, 3.0, 2.9);
    answer(r, 4, 1, 400, 3.0, 2.9);
    answer(r, 5, 1, 400, 3.0, 5.0);
    answer(r, 6, 1, 400, 3.0, 5.0);
    assert_int_equal(rig_status(r).candidates_refused, 1);
    finish(r);
}

static void send_slices(rig *r, unsigned node, uint64_t tokens, double accepted)
{
    sh_evaluate_plan plan = ask(r, node);
    sh_evaluation e = {.candidate = plan.candidate,
                       .parent_version = plan.parent_version,
                       .candidate_sha256 = plan.model.sha256,
                       .n = 2};
    e.slices[0] = (sh_slice_score){SH_SLICE_ACCEPTED, tokens, 3.0 * (double)tokens,
                                   accepted * (double)tokens};
    e.slices[1] = (sh_slice_score){SH_SLICE_CORRECTED, 1000, 3000, 2000};
    assert_true(rig_send_evaluation(r, node, 1, &e));
}

static void test_a_slice_counts_when_it_has_tokens(void **state)
{
    (void)state;
    for (int enough = 0; enough < 2; enough++) {
        rig *r = setup();
        to_canary(r, 1);
        for (unsigned node = 3; node < 6; node++) /* three times 30 is below a tenth of 1,000 */
            send_slices(r, node, enough ? 40 : 30, 3.2);
        assert_int_equal(rig_status(r).version, enough ? 1 : 2);
        if (enough)
            assert_string_equal(row_of(r, 1).verdict,
                                "refused: canary slice 0 up by 0.2000, over 0.05");
        finish(r);
    }
}

static void test_no_data_is_inconclusive(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    answer(r, 3, 1, 120, 3.0, 2.0);
    answer(r, 4, 1, 0, 0, 0);
    assert_int_equal(rig_status(r).version, 1);
    rig_reboot(r); /* the deadline stays where it was */
    assert_true(r->timer_ms != 0 && r->timer_ms <= r->now_ms + CANARY);
    assert_true(rig_timer(r));
    sh_coord_status s = rig_status(r);
    assert_false(s.evaluating);
    assert_int_equal(s.version, 1);
    assert_int_equal(s.candidates_inconclusive, 1);
    assert_int_equal(s.candidates_refused, 0);
    assert_int_equal(s.buffered, 3); /* nothing is decided about the updates */
    assert_int_equal(s.round, 2);
    assert_int_equal(r->notes[SH_CNOTE_INCONCLUSIVE], 1);
    assert_string_equal(row_of(r, 1).verdict, "inconclusive: 1 of 3 nodes, 120 of 1000 tokens");
    assert_int_equal(row_of(r, 1).version, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    assert_int_equal(r->job.id, 0); /* not the same again at once */
    rig_reboot(r);
    assert_int_equal(r->job.id, 0);
    rig_update u = rig_make(r, 3, 1);
    assert_true(rig_offer(r, 3, &u)); /* but with another */
    assert_int_equal(r->job.kind, SH_COORD_MERGE);
    assert_int_equal(r->job.n_inputs, 4);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    assert_true(rig_timer(r)); /* again nobody says anything */
    assert_int_equal(rig_status(r).candidates_inconclusive, 2);
    assert_int_equal(r->job.id, 0);
    assert_true(rig_timer(r)); /* or when the time of a round is over */
    assert_int_equal(r->job.n_inputs, 4);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_end_gate(r, 3.0, 2.9));
    for (unsigned node = 5; node < 8; node++)
        answer(r, node, 1, 400, 3.0, 2.9);
    assert_int_equal(rig_status(r).version, 2);
    assert_int_equal(rig_status(r).updates_merged, 4);
    finish(r);
}

/* An inconclusive candidate must not keep a fleet from closing. */
static void test_close_while_nodes_evaluate(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    assert_true(rig_command(r, SH_COMMAND_CLOSE, 0, 0, 0));
    assert_false(rig_status(r).closed);
    assert_true(rig_timer(r));
    assert_true(rig_status(r).closed);
    assert_int_equal(rig_status(r).updates_refused[SH_REASON_CLOSED], 3);
    finish(r);
}

static void test_what_ends_an_evaluation(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    for (unsigned node = 3; node < 6; node++)
        answer(r, node, 1, 400, 3.0, 2.9);
    assert_int_equal(rig_status(r).version, 2);
    to_canary(r, 2);
    answer(r, 3, 2, 400, 3.0, 2.9);
    answer(r, 4, 2, 400, 3.0, 2.9);
    assert_true(rig_command(r, SH_COMMAND_REVOKE, 0, 0, 4)); /* its answer goes with it */
    assert_int_equal(rig_status(r).evaluations, 1);
    assert_true(rig_status(r).evaluating);
    assert_true(rig_command(r, SH_COMMAND_ROLLBACK, 1, 0, 0));
    assert_false(rig_status(r).evaluating);
    assert_int_equal(rig_status(r).version, 3);
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    finish(r);
}

static void test_switched_off_meanwhile(void **state)
{
    (void)state;
    rig *r = setup();
    to_canary(r, 1);
    r->options.canary_nodes_min = 0;
    rig_reboot(r);
    assert_int_equal(rig_status(r).version, 2);
    finish(r);
}

static void test_who_is_asked(void **state)
{
    (void)state;
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    set_options(r);
    r->options.canary_share = 0.3;
    rig_boot(r);
    for (unsigned node = 0; node < 200; node++)
        rig_enrol(r, node);
    to_canary(r, 1);
    unsigned asked = 0, again = 0, later = 0, old = 0;
    for (unsigned node = 0; node < 200; node++)
        asked += ask(r, node).candidate != 0;
    for (unsigned node = 0; node < 200; node++)
        again += ask(r, node).candidate != 0;
    assert_in_range(asked, 30, 90);
    assert_int_equal(asked, again);
    r->wire = 1; /* a version that has no such plan: it is answered in its own */
    for (unsigned node = 0; node < 200; node++) {
        rig_plan plan = rig_checkin(r, node, 1, false);
        assert_int_equal(plan.wire, 1);
        old += plan.evaluate.candidate != 0;
    }
    assert_int_equal(old, 0);
    r->wire = 0;
    r->now_ms += CANARY / 2; /* too few may have come by: now all may */
    for (unsigned node = 0; node < 200; node++)
        later += ask(r, node).candidate != 0;
    assert_int_equal(later, 200);
    finish(r);
}

static void test_the_candidate_is_served(void **state)
{
    (void)state;
    rig *r = setup();
    static uint8_t bytes[RIG_MODEL_BYTES];
    rig_candidate_bytes(bytes, 1);
    sh_hash chunk = sh_blake2b(bytes + SH_CHUNK_BYTES, SH_CHUNK_BYTES);
    sh_msg want = {.type = SH_MSG_WANT, .want = {.n = 1, .hashes = chunk.b}}, msg;
    offer_three(r, 1);
    assert_true(rig_end_merge(r, NULL));
    assert_true(rig_send(r, 3, &want)); /* not before the suites let it pass */
    assert_true(rig_take(r, 3, &msg));
    assert_int_equal(msg.type, SH_MSG_ERROR);
    assert_true(rig_end_gate(r, 3.0, 2.9));
    assert_true(rig_send(r, 3, &want));
    assert_true(rig_take(r, 3, &msg));
    assert_int_equal(msg.type, SH_MSG_CHUNK);
    assert_true(sh_hash_equal(&msg.chunk.hash, &chunk));
    finish(r);
}

/* Evaluations of other candidates, other bytes, other parents change nothing. */
static void test_evaluations_that_do_not_count(void **state)
{
    (void)state;
    rig *r = setup();
    sh_evaluate_plan early = {.candidate = 1, .parent_version = 1};
    const double good[3] = {400, 3.0, 2.9};
    assert_true(rig_evaluate(r, 3, 1, &early, good)); /* nothing is evaluated */
    to_canary(r, 1);
    sh_evaluate_plan plan = ask(r, 3), other = plan;
    other.candidate = 7;
    assert_true(rig_evaluate(r, 3, 2, &other, good));
    other = plan;
    other.parent_version = 9;
    assert_true(rig_evaluate(r, 3, 3, &other, good));
    other = plan;
    other.model.sha256.b[0] ^= 1;
    assert_true(rig_evaluate(r, 3, 4, &other, good));
    assert_true(rig_evaluate(r, 3, 5, &plan, (double[3]){1e13, 3.0, 2.9})); /* absurd */
    sh_msg_item junk = {.epoch = EPOCH,
                        .cls = SH_CLASS_ALARM,
                        .seq = 6,
                        .last_seq = 6,
                        .kind = SH_ITEM_EVALUATION,
                        .payload = {"junk", 4}};
    assert_true(rig_item(r, 3, &junk));
    rig_drop_mail(r);
    assert_int_equal(rig_status(r).bad_messages, 2);
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    assert_int_equal(rig_status(r).evaluations, 0);
    assert_true(rig_evaluate(r, 3, 7, &plan, good));
    assert_int_equal(rig_status(r).evaluations, 1);
    finish(r);
}

/* A round with an evaluation, crashed around each of its commits. */
typedef struct {
    rig_update updates[3];
    bool acked[3];
} script;

static void pass(rig *r, script *s)
{
    for (unsigned node = 0; node < 6; node++) {
        rig_enrol(r, node);
        sh_evaluate_plan plan = rig_checkin(r, node, 1, false).evaluate;
        if (node < 3 && !s->acked[node])
            s->acked[node] = rig_offer(r, node, &s->updates[node]);
        if (plan.candidate != 0 && node >= 3)
            (void)rig_evaluate(r, node, plan.candidate, &plan, (double[3]){400, 3.0, 2.9});
    }
    rig_check(r, false);
    if (r->job.kind == SH_COORD_MERGE)
        (void)rig_end_merge(r, NULL);
    else if (r->job.kind == SH_COORD_GATE)
        (void)rig_end_gate(r, 3.0, 2.5);
}

static size_t run_round(size_t crash_at, int mode)
{
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    set_options(r);
    rig_boot(r);
    script s = {0};
    for (unsigned node = 0; node < 3; node++)
        s.updates[node] = rig_make(r, node, 1);
    r->commits = 0;
    r->crash_at = crash_at;
    r->crash_mode = mode;
    for (int i = 0; rig_status(r).version < 2 && i < 40; i++)
        pass(r, &s);
    sh_coord_status status = rig_status(r);
    assert_int_equal(status.version, 2);
    assert_int_equal(status.updates_merged, 3);
    assert_int_equal(status.round, 2);
    bool found;
    sh_release_row row = rig_candidate(r, 1, &found);
    assert_true(found && row.canary_nodes == 3 && row.canary_tokens == 1200);
    assert_int_equal(rig_count(r, SH_COORD_T_EVALUATION), 0);
    size_t commits = r->commits;
    finish(r);
    return commits;
}

static void test_a_crash_between_any_two_steps(void **state)
{
    (void)state;
    size_t commits = run_round(0, RIG_SOUND);
    assert_true(commits > 30);
    for (size_t at = 1; at <= commits; at++)
        for (int mode = RIG_CRASH_BEFORE; mode <= RIG_CRASH_AFTER; mode++)
            (void)run_round(at, mode);
}

static void test_memory_that_runs_out(void **state)
{
    (void)state;
    size_t failures = 0;
    for (uint64_t seed = 0; seed < 8; seed++) {
        rig *r = calloc(1, sizeof *r);
        assert_non_null(r);
        set_options(r);
        rig_boot(r);
        script s = {0};
        for (unsigned node = 0; node < 3; node++)
            s.updates[node] = rig_make(r, node, 1);
        sh_rng_init(&r->torture_rng, seed, 0, 4);
        r->torture = true;
        for (int i = 0; rig_status(r).version < 2 && i < 300; i++)
            pass(r, &s);
        assert_int_equal(rig_status(r).version, 2);
        assert_int_equal(rig_status(r).updates_merged, 3);
        failures += r->failures;
        finish(r);
    }
    print_message("%zu steps failed\n", failures);
    assert_true(failures > 50);
}

static void test_options_are_checked(void **state)
{
    (void)state;
    rig *r = setup();
    sh_coord_options bad[5];
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        bad[i] = r->options;
    bad[0].canary_share = 0;
    bad[1].canary_share = NAN;
    bad[2].canary_share = 1.5;
    bad[3].canary_ms_max = 0;
    bad[4].canary_nodes_min = 5000;
    sh_coord_actions *actions = calloc(1, sizeof *actions);
    sh_coord *coord = NULL;
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_rng_init(&rng, 1, 1, 1);
    assert_int_equal(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, NULL), SH_OK);
    for (size_t i = 0; i < SH_COUNT(bad); i++)
        assert_int_equal(sh_coord_create(&bad[i], NULL, 0, &rng, txn, actions, &coord, NULL),
                         SH_ERR_INVALID);
    sh_txn_abort(&txn);
    free(actions);
    finish(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nodes_let_a_candidate_pass),
        cmocka_unit_test(test_nodes_refuse),
        cmocka_unit_test(test_a_poisoner_does_not_decide),
        cmocka_unit_test(test_harm_to_some_is_harm),
        cmocka_unit_test(test_a_slice_counts_when_it_has_tokens),
        cmocka_unit_test(test_no_data_is_inconclusive),
        cmocka_unit_test(test_close_while_nodes_evaluate),
        cmocka_unit_test(test_what_ends_an_evaluation),
        cmocka_unit_test(test_switched_off_meanwhile),
        cmocka_unit_test(test_who_is_asked),
        cmocka_unit_test(test_the_candidate_is_served),
        cmocka_unit_test(test_evaluations_that_do_not_count),
        cmocka_unit_test(test_a_crash_between_any_two_steps),
        cmocka_unit_test(test_memory_that_runs_out),
        cmocka_unit_test(test_options_are_checked),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
