/* A relay's core between nodes and a root's core: updates go up once, plans and releases come down,
 * whatever crashes in between. Messages are carried by hand, jobs are played. */
#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "experiments/audit/audit.h"
#include "tests/aggregator/rig.h"

#define RELAY       40 /* number of the first relay among the root's nodes */
#define STACK_BYTES 130000u
#define ROUNDS_MAX  200

typedef struct {
    rig root, relay[2];
    unsigned n_relays;
} tiers;

static void ok(sh_status status, const sh_error *err)
{
    if (status != SH_OK) {
        print_error("%s: %s\n", sh_status_name(status), err->text);
        fail();
    }
}

static void keep_manifest(rig *from, sh_buf *out)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_bytes bytes;
    sh_buf_init(out, SH_WIRE_MESSAGE_MAX);
    ok(sh_txn_begin(from->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_get_manifest(txn, 1, &bytes, &err), &err);
    ok(sh_buf_append(out, bytes.data, bytes.n), &err);
    sh_txn_abort(&txn);
}

static bool event(rig *r, sh_coord_event_kind kind)
{
    sh_coord_event e = {.kind = kind};
    return rig_step(r, &e);
}

static tiers *make(unsigned n_relays)
{
    tiers *t = calloc(1, sizeof *t);
    assert_non_null(t);
    t->n_relays = n_relays;
    rig_init(&t->root, NULL);
    rig_boot(&t->root);
    for (unsigned i = 0; i < n_relays; i++) {
        rig *r = &t->relay[i];
        rig_init(r, NULL);
        r->options.relay = true;
        r->options.relay_wait_ms = 60000;
        r->options.relay_retry_min_ms = 10;
        r->options.relay_retry_max_ms = 1000;
        r->options.agent = "rig";
        memset(&r->options.release_sk, 0, sizeof r->options.release_sk);
        r->jumps = true; /* it may skip a release of its parent's */
        keep_manifest(&t->root, &r->manifest);
        rig_boot(r);
        r->life = 100 * (i + 1);
        rig_enrol(&t->root, RELAY + i);
        assert_true(rig_command(&t->root, SH_COMMAND_RELAY, 1, 0, RELAY + i));
        assert_true(event(r, SH_COORD_PARENT_UP));
    }
    return t;
}

static void finish(tiers *t)
{
    for (unsigned i = 0; i < t->n_relays; i++)
        rig_release(&t->relay[i]);
    rig_release(&t->root);
    free(t);
}

/* The oldest message of r's for the parent. */
static bool take_up(rig *r, sh_buf *out)
{
    if (r->n_up == 0)
        return false;
    *out = r->up[0];
    memmove(&r->up[0], &r->up[1], --r->n_up * sizeof r->up[0]);
    return true;
}

static bool take_down(rig *root, unsigned node, sh_buf *out)
{
    sh_hash key = rig_key(node);
    for (size_t i = 0; i < root->n_mail; i++)
        if (sh_hash_equal(&root->mail[i].to, &key)) {
            *out = root->mail[i].bytes;
            memmove(&root->mail[i], &root->mail[i + 1],
                    (--root->n_mail - i) * sizeof root->mail[0]);
            return true;
        }
    return false;
}

/* One message between the relay and the root; false: there is none. */
static bool carry_one(tiers *t, unsigned i)
{
    rig *r = &t->relay[i];
    sh_buf bytes;
    if (take_up(r, &bytes)) {
        (void)rig_send_bytes(&t->root, RELAY + i, bytes.data, bytes.len);
    } else if (take_down(&t->root, RELAY + i, &bytes)) {
        sh_coord_event e = {.kind = SH_COORD_PARENT_MESSAGE, .message = {bytes.data, bytes.len}};
        (void)rig_step(r, &e);
    } else {
        return false;
    }
    sh_buf_release(&bytes);
    return true;
}

static void carry(tiers *t, unsigned i)
{
    for (unsigned turn = 0; turn < ROUNDS_MAX && carry_one(t, i); turn++)
        ;
}

static bool end_stack(rig *r, sh_status status, const sh_reason *reasons)
{
    static uint8_t bytes[STACK_BYTES];
    assert_int_equal(r->job.kind, SH_COORD_STACK);
    rig_fill(bytes, sizeof bytes, 5000 + r->job.candidate + 100 * r->life);
    for (uint32_t i = 0; i < r->job.n_inputs; i++)
        r->job.inputs[i].reason = reasons == NULL ? SH_REASON_NONE : reasons[i];
    sh_coord_event e = {.kind = SH_COORD_JOB_DONE,
                        .result = {.id = r->job.id,
                                   .status = status,
                                   .inputs = r->job.inputs,
                                   .n_inputs = r->job.n_inputs,
                                   .candidate_bytes = {bytes, sizeof bytes},
                                   .adapter_rank = 24}};
    sh_coord_job job = r->job;
    r->job = (sh_coord_job){0};
    bool done = rig_step(r, &e);
    free(job.inputs);
    return done;
}

/* Every node sends an update of the release that its relay has. */
static void offer(rig *r, unsigned first, unsigned n, uint64_t seq)
{
    for (unsigned node = first; node < first + n; node++) {
        rig_update u = rig_make(r, node, seq);
        u.samples = 100 * (node + 1);
        rig_enrol(r, node);
        assert_true(rig_offer(r, node, &u));
    }
}

typedef struct {
    sh_update_row rows[64];
    size_t n;
    sh_update_part parts[64];
    size_t n_parts;
} listed;

static sh_status list(void *arg, const sh_update_row *row)
{
    listed *l = arg;
    assert_true(l->n < SH_COUNT(l->rows));
    l->rows[l->n++] = *row;
    for (size_t at = 0; at < row->meta.parts.n; at += SH_UPDATE_PART_BYTES)
        if (row->verdict != SH_VERDICT_REFUSED)
            l->parts[l->n_parts++] = sh_update_part_get((const uint8_t *)row->meta.parts.data + at);
    return SH_OK;
}

static listed rows_of(rig *r)
{
    listed l = {0};
    sh_error err = {0};
    sh_txn *txn = NULL;
    ok(sh_txn_begin(r->store, SH_TXN_READ, &txn, &err), &err);
    ok(sh_coord_each_update(txn, list, &l, &err), &err);
    sh_txn_abort(&txn);
    for (size_t i = 0; i < l.n; i++) /* what they point to ended with the transaction */
        l.rows[i].meta.parts = (sh_bytes){NULL, l.rows[i].meta.parts.n};
    return l;
}

/* ---- tests ---- */

static void test_updates_go_up_as_one(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    assert_true(rig_status(r).parent_welcome);
    offer(r, 0, 3, 1);
    assert_int_equal(r->job.kind, SH_COORD_STACK);
    assert_int_equal(r->job.n_inputs, 3);
    const sh_reason reasons[] = {SH_REASON_NONE, SH_REASON_NORM, SH_REASON_NONE};
    assert_true(end_stack(r, SH_OK, reasons));
    carry(t, 0);
    listed below = rows_of(r), above = rows_of(&t->root);
    assert_int_equal(below.n, 3);
    assert_int_equal(below.rows[0].verdict, SH_VERDICT_RELAYED);
    assert_int_equal(below.rows[0].version, 1);
    assert_int_equal(below.rows[1].verdict, SH_VERDICT_REFUSED);
    assert_int_equal(below.rows[1].reason, SH_REASON_NORM);
    assert_int_equal(below.rows[2].verdict, SH_VERDICT_RELAYED);
    assert_int_equal(above.n, 1);
    assert_int_equal(above.rows[0].verdict, SH_VERDICT_PENDING);
    assert_int_equal(above.rows[0].meta.samples, 400); /* of nodes 0 and 2 */
    assert_int_equal(above.rows[0].meta.rank, 24);
    assert_int_equal(above.n_parts, 2);
    sh_hash first = rig_key(0), third = rig_key(2);
    assert_true(sh_hash_equal(&above.parts[0].node, &first));
    assert_int_equal(above.parts[0].samples, 100);
    assert_true(sh_hash_equal(&above.parts[1].node, &third));
    assert_int_equal(above.parts[1].samples, 300);
    /* The parent has it: nothing of it is left here but the rows. */
    assert_int_equal(rig_status(r).relay_owed, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_OUTBOX), 0);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK),
                     (RIG_MODEL_BYTES + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES);
    assert_int_equal(rig_status(&t->root).parts, 2);
    rig_check(&t->root, true);
    finish(t);
}

/* The root weighs a relayed update by what its parts would have counted, and is due when the nodes'
 * updates fill its buffer, not the relays'. */
static void test_parts_count_as_what_they_are(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0], *root = &t->root;
    root->options.buffer = 4;
    rig_reboot(root);
    carry(t, 0);
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    offer(r, 0, 3, 1); /* 100, 200, 300 samples */
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(root->job.id, 0); /* three of four */
    rig_update u = rig_make(root, 9, 1);
    u.samples = 1000000; /* at most 4 times the lower median of 100, 200, 300, 10^6 */
    rig_enrol(root, 9);
    assert_true(rig_offer(root, 9, &u));
    assert_int_equal(root->job.kind, SH_COORD_MERGE);
    assert_int_equal(root->job.n_inputs, 2);
    for (uint32_t i = 0; i < 2; i++) {
        const sh_merge_input *in = &root->job.inputs[i];
        assert_true(in->weight == (in->relayed ? 600 : 800));
    }
    assert_true(rig_end_merge(root, NULL));
    assert_true(rig_end_gate(root, 3, 2.9));
    bool found;
    assert_int_equal(rig_candidate(root, 1, &found).updates, 4);
    rig_check(root, true);
    finish(t);
}

static void test_releases_and_plans_come_down(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0], *root = &t->root;
    root->options.drifting_min = 0;
    carry(t, 0);
    rig_enrol(r, 0);
    rig_plan above = rig_checkin(root, 9, 1, false), below;
    rig_enrol(root, 9);
    above = rig_checkin(root, 9, 1, false);
    below = rig_checkin(r, 0, 1, false);
    assert_true(below.train.train);
    assert_memory_equal(&above.train, &below.train, sizeof above.train);
    offer(r, 0, 3, 1);
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_true(rig_end_merge(root, NULL)); /* its buffer is three nodes' updates */
    assert_true(rig_end_gate(root, 3, 2.9));
    assert_int_equal(rig_status(root).version, 2);
    /* The relay hears of it at its next check-in, and fetches it. */
    assert_int_equal(rig_checkin(r, 0, 1, false).manifest_version, 0);
    for (unsigned i = 0; i < 20 && rig_status(r).version < 2; i++) {
        rig_timer(r);
        carry(t, 0);
    }
    assert_int_equal(rig_status(r).version, 2);
    above = rig_checkin(root, 9, 1, false);
    below = rig_checkin(r, 0, 1, false);
    assert_int_equal(below.manifest_version, 2);
    assert_true(sh_hash_equal(&above.manifest, &below.manifest));
    rig_check(r, true);
    /* A node may train on it now, in the root's round. */
    for (unsigned i = 0; i < 20 && rig_checkin(r, 0, 2, false).train.round < 2; i++) {
        rig_timer(r);
        carry(t, 0);
    }
    above = rig_checkin(root, 9, 2, false);
    below = rig_checkin(r, 0, 2, false);
    assert_memory_equal(&above.train, &below.train, sizeof above.train);
    rig_reboot(r); /* and after a crash, before its parent is heard */
    below = rig_checkin(r, 0, 2, false);
    assert_memory_equal(&above.train, &below.train, sizeof above.train);
    finish(t);
}

static void damage_taken_manifest(rig *r)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_slice value;
    uint8_t copy[8192];
    ok(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &err), &err);
    ok(sh_txn_get(txn, SH_COORD_T_META, "up-take", 7, &value), &err);
    assert_true(value.n <= sizeof copy);
    memcpy(copy, value.data, value.n);
    copy[value.n / 2] ^= 1;
    ok(sh_txn_put(txn, SH_COORD_T_META, "up-take", 7, copy, value.n, &err), &err);
    ok(sh_txn_commit(&txn, &err), &err);
}

/* The manifest of the release that comes is damaged in the store: it comes again. */
static void test_a_damaged_manifest_is_fetched_again(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0], *root = &t->root;
    carry(t, 0);
    offer(r, 0, 3, 1);
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_true(rig_end_merge(root, NULL));
    assert_true(rig_end_gate(root, 3, 2.9));
    uint64_t chunks = rig_count(r, SH_COORD_T_CHUNK);
    /* Until the manifest and one chunk are here. */
    for (unsigned i = 0; i < 2000 && rig_count(r, SH_COORD_T_CHUNK) == chunks; i++)
        if (!carry_one(t, 0))
            rig_timer(r);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks + 1);
    assert_int_equal(rig_status(r).taking, 2);
    damage_taken_manifest(r);
    rig_drop_mail(root);
    rig_reboot(r);
    assert_int_equal(rig_status(r).taking, 0);
    assert_int_equal(rig_count(r, SH_COORD_T_CHUNK), chunks);
    assert_int_equal(r->notes[SH_CNOTE_MANIFEST_LOST], 1);
    event(r, SH_COORD_PARENT_UP);
    for (unsigned i = 0; i < 20 && rig_status(r).version < 2; i++) {
        rig_timer(r);
        carry(t, 0);
    }
    assert_int_equal(rig_status(r).version, 2);
    rig_check(r, true);
    finish(t);
}

static void test_drift_is_summed(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0], *root = &t->root;
    root->options.drifting_min = 2;
    rig_reboot(root);
    rig_command(root, SH_COMMAND_PAUSE, 0, 0, 0);
    for (unsigned node = 0; node < 4; node++) {
        rig_enrol(r, node);
        (void)rig_checkin(r, node, 1, node != 2);
    }
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    assert_int_equal(rig_status(r).drifting, 3);
    assert_int_equal(rig_status(root).drifting, 3);
    rig_reboot(root);
    assert_int_equal(rig_status(root).drifting, 3);
    rig_command(root, SH_COMMAND_RELAY, 0, 0, RELAY); /* a node like others: it drifts or not */
    assert_int_equal(rig_status(root).drifting, 1);
    rig_command(root, SH_COMMAND_REVOKE, 0, 0, RELAY);
    assert_int_equal(rig_status(root).drifting, 0);
    finish(t);
}

/* Three nodes have dropped what they had made: the relay takes what comes after. */
static void pass_over(rig *r, uint64_t first, uint64_t last)
{
    sh_msg_item gap = {.epoch = 77,
                       .cls = SH_CLASS_UPDATE,
                       .seq = first,
                       .kind = SH_ITEM_TOMBSTONE,
                       .last_seq = last};
    for (unsigned node = 0; node < 3; node++)
        assert_true(rig_item(r, node, &gap));
    rig_drop_mail(r);
}

/* One that moved, and sent again what it had no answer to. */
static void test_no_part_counts_twice(void **state)
{
    (void)state;
    tiers *t = make(2);
    rig *root = &t->root;
    root->options.buffer = 100;
    rig_reboot(root);
    for (unsigned i = 0; i < 2; i++) {
        event(&t->relay[i], SH_COORD_PARENT_UP);
        carry(t, i);
        offer(&t->relay[i], 0, 3, 1); /* the same three */
        assert_true(end_stack(&t->relay[i], SH_OK, NULL));
        carry(t, i);
        assert_int_equal(rig_status(&t->relay[i]).relay_owed, 0);
    }
    listed above = rows_of(root);
    assert_int_equal(above.n, 2);
    assert_int_equal(above.n_parts, 3);
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 1);
    /* Straight to the root, after it came by a relay; and the other way round. */
    rig_enrol(root, 0);
    rig_update u = rig_make(root, 0, 1);
    assert_true(rig_offer(root, 0, &u));
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 2);
    u = rig_make(root, 0, 2);
    assert_true(rig_offer(root, 0, &u));
    offer(&t->relay[0], 0, 3, 2);
    assert_true(end_stack(&t->relay[0], SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 3);
    /* What a quota dropped, and was passed over there, is no update. */
    sh_msg_item gap = {
        .epoch = 77, .cls = SH_CLASS_UPDATE, .seq = 3, .kind = SH_ITEM_TOMBSTONE, .last_seq = 4};
    rig_item(root, 0, &gap);
    offer(&t->relay[0], 0, 3, 4);
    assert_true(end_stack(&t->relay[0], SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 3);
    /* Far ahead: marks stay bounded, and what is below them counts as counted. */
    uint64_t marks = rig_count(root, SH_COORD_T_PART);
    pass_over(&t->relay[0], 3, 499999);
    pass_over(&t->relay[1], 2, 499999);
    offer(&t->relay[0], 0, 3, 500000);
    assert_true(end_stack(&t->relay[0], SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 3);
    offer(&t->relay[1], 0, 3, 500000);
    assert_true(end_stack(&t->relay[1], SH_OK, NULL));
    carry(t, 1);
    assert_int_equal(rig_status(root).updates_refused[SH_REASON_TWICE], 4);
    assert_int_equal(rig_count(root, SH_COORD_T_PART), marks);
    rig_check(root, true);
    finish(t);
}

static void test_only_relays_speak_for_others(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    rig_command(&t->root, SH_COMMAND_RELAY, 0, 0, RELAY);
    offer(r, 0, 3, 1);
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rig_status(&t->root).updates_refused[SH_REASON_RELAY], 1);
    assert_int_equal(rig_status(&t->root).parts, 0);
    assert_int_equal(rig_count(&t->root, SH_COORD_T_PART), 0);
    finish(t);
}

/* Bases do not mix; what is left below a full buffer goes up when its time has come. */
static void test_a_stack_is_of_one_base(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    rig_enrol(r, 0);
    rig_update old = rig_make(r, 0, 1);
    old.base_version = 7;
    assert_true(rig_offer(r, 0, &old));
    offer(r, 1, 2, 1);
    assert_int_equal(r->job.id, 0); /* three, but two of them are of one base */
    offer(r, 3, 1, 1);
    assert_int_equal(r->job.n_inputs, 3);
    assert_true(end_stack(r, SH_OK, NULL));
    assert_int_equal(r->job.id, 0);
    assert_int_equal(rig_status(r).buffered, 1);
    r->now_ms += r->options.relay_wait_ms;
    event(r, SH_COORD_TIMER);
    assert_int_equal(r->job.n_inputs, 1);
    assert_true(end_stack(r, SH_OK, NULL));
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    listed above = rows_of(&t->root);
    assert_int_equal(above.n, 2);
    assert_int_equal(rig_status(&t->root).updates_refused[SH_REASON_BASE], 1); /* the root says */
    finish(t);
}

/* The sum of what nodes say of themselves goes up whatever they say. */
static void test_no_loss_holds_a_stack_up(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    for (unsigned node = 0; node < 3; node++) {
        rig_update u = rig_make(r, node, 1);
        u.heldout = node == 0 ? DBL_MAX : node == 1 ? -DBL_MAX : 2;
        u.samples = 100;
        rig_enrol(r, node);
        assert_true(rig_offer(r, node, &u));
    }
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    listed above = rows_of(&t->root);
    assert_int_equal(above.n, 1);
    assert_true(above.rows[0].meta.heldout_before > 0 && above.rows[0].meta.heldout_before < 50);
    finish(t);
}

/* A stack that is too large is made of fewer, and the rest follows at once. */
static void test_too_large_is_halved(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    r->options.buffer = 4;
    rig_reboot(r);
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    offer(r, 0, 4, 1);
    assert_int_equal(r->job.n_inputs, 4);
    (void)end_stack(r, SH_ERR_LIMIT, NULL);
    assert_int_equal(r->job.n_inputs, 2);
    (void)end_stack(r, SH_ERR_LIMIT, NULL);
    assert_int_equal(r->job.n_inputs, 1);
    (void)end_stack(r, SH_ERR_LIMIT, NULL); /* alone, it can never go */
    assert_int_equal(rig_status(r).updates_refused[SH_REASON_BAD_BLOB], 1);
    for (unsigned i = 0; i < 3 && r->job.id != 0; i++)
        assert_true(end_stack(r, SH_OK, NULL));
    assert_int_equal(rig_status(r).buffered, 0);
    assert_int_equal(rig_status(r).updates_merged, 3);
    rig_check(r, false);
    finish(t);
}

/* While the parent is away updates are kept, not dropped: few are owed, then the buffer fills. */
static void test_an_absent_parent_fills_the_buffer(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    event(r, SH_COORD_PARENT_DOWN);
    uint64_t seq = 1;
    while (rig_status(r).relay_owed < 8) {
        offer(r, 0, 3, seq++);
        assert_true(end_stack(r, SH_OK, NULL));
    }
    offer(r, 0, 3, seq++);
    assert_int_equal(r->job.id, 0);
    assert_int_equal(rig_status(r).buffered, 3);
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    assert_int_equal(rig_status(r).relay_owed, 0);
    assert_int_equal(r->job.n_inputs, 3);
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rows_of(&t->root).n_parts, 27);
    finish(t);
}

static void settle(tiers *t, unsigned nodes)
{
    rig *r = &t->relay[0];
    for (unsigned turn = 0; turn < 60; turn++) {
        event(r, SH_COORD_PARENT_UP);
        carry(t, 0);
        for (unsigned node = 0; node < nodes; node++) {
            rig_enrol(r, node);
            rig_update u = rig_make(r, node, 1);
            u.samples = 100 * (node + 1);
            (void)rig_offer(r, node, &u); /* as a node does that has no answer yet */
        }
        if (r->job.id != 0)
            (void)end_stack(r, SH_OK, NULL);
        carry(t, 0);
        if (rows_of(&t->root).n_parts == nodes && rig_status(r).relay_owed == 0)
            return;
    }
    fail_msg("the updates never came up");
}

/* A crash before or after each commit of either side: every update is at the root, once. */
static void test_crashes_lose_nothing_and_double_nothing(void **state)
{
    (void)state;
    for (int side = 0; side < 2; side++)
        for (int mode = RIG_CRASH_BEFORE; mode <= RIG_CRASH_AFTER; mode++)
            for (size_t at = 1; at <= 24; at++) {
                tiers *t = make(1);
                rig *r = side == 0 ? &t->relay[0] : &t->root;
                r->crash_at = r->commits + at;
                r->crash_mode = mode;
                settle(t, 3);
                listed above = rows_of(&t->root), below = rows_of(&t->relay[0]);
                assert_int_equal(above.n_parts, 3);
                assert_int_equal(above.n, 1);
                assert_int_equal(below.n, 3);
                for (size_t i = 0; i < 3; i++)
                    assert_int_equal(below.rows[i].verdict, SH_VERDICT_RELAYED);
                rig_check(&t->root, true);
                rig_check(&t->relay[0], true);
                finish(t);
            }
}

/* What a restored relay sends again, its parent has already. */
static void test_a_restored_relay_counts_nothing_twice(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    offer(r, 0, 3, 1);
    sh_store *backup = rig_backup(r); /* three wait, to be stacked */
    uint64_t epoch = rig_status(r).parent_epoch;
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    rig_restore(r, backup);
    sh_store_close(&backup);
    assert_true(rig_status(r).parent_epoch != epoch);
    event(r, SH_COORD_PARENT_UP);
    assert_true(end_stack(r, SH_OK, NULL));
    carry(t, 0);
    assert_int_equal(rig_status(r).relay_owed, 0);
    assert_int_equal(rows_of(&t->root).n_parts, 3);
    assert_int_equal(rig_status(&t->root).updates_refused[SH_REASON_TWICE], 1);
    finish(t);
}

static sh_audit_result audit(tiers *t)
{
    sh_audit *a = NULL;
    sh_audit_result result;
    json_t *findings = NULL;
    sh_error err = {0};
    ok(sh_audit_create(&a, &err), &err);
    ok(sh_audit_add_aggregator(a, t->root.store, &err), &err);
    ok(sh_audit_add_relay(a, t->relay[0].store, "relay-0", &err), &err);
    sh_audit_finish(a, &result, &findings);
    json_decref(findings);
    sh_audit_destroy(&a);
    return result;
}

static void delete_first_row(rig *r)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    uint8_t copy[64];
    ok(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, &err), &err);
    ok(sh_cursor_open(txn, SH_COORD_T_UPDATE, &cursor, &err), &err);
    ok(sh_cursor_seek(cursor, NULL, 0, &key, &value), &err);
    size_t n = key.n;
    memcpy(copy, key.data, n);
    sh_cursor_close(&cursor);
    ok(sh_txn_del(txn, SH_COORD_T_UPDATE, copy, n, &err), &err);
    ok(sh_txn_commit(&txn, &err), &err);
}

/* What went up is followed: owed, with the parent, in a release; and missed where it is not. No
 * node's ledger is read here, so that every row is one that no node made: that is not looked at. */
static void test_the_audit_follows_parts(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    carry(t, 0);
    event(r, SH_COORD_PARENT_DOWN);
    for (unsigned node = 0; node < 3; node++) {
        rig_enrol(r, node);
        rig_update u = rig_make(r, node, 1);
        u.epoch = 1000 + node; /* what the audit knows a store by */
        assert_true(rig_offer(r, node, &u));
    }
    assert_int_equal(audit(t).pending, 3);
    assert_true(end_stack(r, SH_OK, NULL));
    sh_audit_result owed = audit(t);
    assert_int_equal(owed.owed, 1);
    assert_int_equal(owed.lost + owed.twice, 0);
    event(r, SH_COORD_PARENT_UP);
    carry(t, 0);
    sh_audit_result up = audit(t);
    assert_int_equal(up.owed, 0);
    assert_int_equal(up.pending, 3);
    assert_int_equal(up.lost + up.twice, 0);
    assert_true(rig_end_merge(&t->root, NULL));
    assert_true(rig_end_gate(&t->root, 3, 2.9));
    sh_audit_result merged = audit(t);
    assert_int_equal(merged.merged, 3);
    assert_int_equal(merged.pending, 0);
    assert_int_equal(merged.lost + merged.twice, 0);
    delete_first_row(&t->root); /* the relayed update's: its parts are nowhere now */
    assert_true(audit(t).lost >= 3);
    finish(t);
}

static unsigned items_up(rig *r)
{
    unsigned n = 0;
    for (size_t i = 0; i < r->n_up; i++) {
        sh_msg msg;
        sh_error err = {0};
        ok(sh_msg_decode(r->up[i].data, r->up[i].len, &msg, &err), &err);
        n += msg.type == SH_MSG_ITEM;
    }
    return n;
}

/* It could not read whose updates they are, and would refuse them for good. */
static void test_an_older_parent_gets_no_parts(void **state)
{
    (void)state;
    tiers *t = make(1);
    rig *r = &t->relay[0];
    sh_msg error = {.version = 2,
                    .type = SH_MSG_ERROR,
                    .error = {.code = sh_status_name(SH_ERR_UNSUPPORTED), .text = "version 2"}};
    sh_buf bytes;
    sh_error err = {0};
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    ok(sh_msg_encode(&error, &bytes, &err), &err);
    sh_coord_event e = {.kind = SH_COORD_PARENT_MESSAGE, .message = {bytes.data, bytes.len}};
    (void)rig_step(r, &e);
    offer(r, 0, 3, 1);
    assert_true(end_stack(r, SH_OK, NULL));
    assert_int_equal(items_up(r), 0);
    assert_int_equal(rig_status(r).relay_owed, 1);
    event(r, SH_COORD_PARENT_UP); /* begins with our version */
    carry(t, 0);
    assert_int_equal(rig_status(r).relay_owed, 0);
    assert_int_equal(rows_of(&t->root).n_parts, 3);
    sh_buf_release(&bytes);
    finish(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_updates_go_up_as_one),
        cmocka_unit_test(test_parts_count_as_what_they_are),
        cmocka_unit_test(test_releases_and_plans_come_down),
        cmocka_unit_test(test_a_damaged_manifest_is_fetched_again),
        cmocka_unit_test(test_drift_is_summed),
        cmocka_unit_test(test_no_part_counts_twice),
        cmocka_unit_test(test_only_relays_speak_for_others),
        cmocka_unit_test(test_a_stack_is_of_one_base),
        cmocka_unit_test(test_no_loss_holds_a_stack_up),
        cmocka_unit_test(test_too_large_is_halved),
        cmocka_unit_test(test_an_absent_parent_fills_the_buffer),
        cmocka_unit_test(test_crashes_lose_nothing_and_double_nothing),
        cmocka_unit_test(test_a_restored_relay_counts_nothing_twice),
        cmocka_unit_test(test_an_older_parent_gets_no_parts),
        cmocka_unit_test(test_the_audit_follows_parts),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
