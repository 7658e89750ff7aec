/* Copies of a store that are told apart by where their starts began. What leases alone say is in
 * test_coordinator_store.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "shared/sync/sync.h"
#include "tests/aggregator/rig.h"

/* Whether a window under that name is taken; else its sender is told to enrol. */
static bool takes(rig *r, uint64_t epoch, uint64_t seq, char lease)
{
    uint8_t hash[32] = {(uint8_t)lease};
    sh_msg msg = {.type = SH_MSG_ITEM,
                  .item = {.epoch = epoch,
                           .cls = SH_CLASS_WINDOW,
                           .seq = seq,
                           .last_seq = seq,
                           .kind = SH_ITEM_WINDOW,
                           .payload = {"window", 6},
                           .lease = lease == 0 ? 0 : sh_lease_name(hash)}};
    uint64_t name = msg.item.lease;
    r->connection = (uint8_t)lease;
    assert_true(rig_send(r, 0, &msg));
    assert_true(rig_take(r, 0, &msg));
    if (msg.type == SH_MSG_ERROR) {
        assert_string_equal(msg.error.code, "auth");
        return false;
    }
    assert_int_equal(msg.type, SH_MSG_ACK);
    assert_int_equal(msg.ack.lease, name);
    return true;
}

/* A store is copied while its program goes on. */
/* Each start of node 0 has a connection of its own. */
static bool claims(rig *r, const char *leases, const uint64_t *windows)
{
    r->connection = (uint8_t)leases[0];
    return rig_renews(r, 0, 5, leases, windows);
}

static void test_copies_of_a_store_that_runs(void **state)
{
    (void)state;
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    rig_boot(r);
    rig_enrol(r, 0);
    /* Copied at window 3, and the program has sent that since. */
    assert_false(claims(r, "a", (uint64_t[]){1}));
    assert_true(takes(r, 5, 1, 'a') && takes(r, 5, 3, 'a')); /* 2 is on its way */
    assert_false(takes(r, 5, 2, 'x'));
    assert_true(claims(r, "yxa", (uint64_t[]){4, 3, 1}));
    assert_int_equal(r->common, 2);
    assert_int_equal(r->parted, 0);
    assert_true(takes(r, 5, 2, 'a'));
    /* Copied at window 5, and the program has sent nothing of that. */
    assert_true(takes(r, 5, 4, 'a'));
    assert_false(claims(r, "ba", (uint64_t[]){5, 1}));
    assert_false(takes(r, 5, 5, 'a'));
    assert_true(takes(r, 5, 4, 0)); /* what both have */
    assert_true(takes(r, 5, 5, 'b'));
    assert_true(claims(r, "a", (uint64_t[]){1}));
    assert_int_equal(r->common, 0);
    assert_int_equal(r->parted, 5);
    assert_true(claims(r, "ca", (uint64_t[]){7, 1})); /* it was started anew meanwhile */
    assert_int_equal(r->common, 1);
    assert_int_equal(r->parted, 5);
    /* The copy goes on, and is started anew. */
    assert_false(claims(r, "db", (uint64_t[]){6, 5}));
    assert_true(takes(r, 5, 6, 'd'));
    rig_reboot(r);
    assert_false(takes(r, 5, 7, 'b'));
    assert_true(claims(r, "a", (uint64_t[]){1}));
    assert_int_equal(r->parted, 5);
    /* After a restore what has come says the same of a copy, leases say nothing. */
    sh_store *backup = rig_backup(r);
    rig_restore(r, backup);
    assert_false(takes(r, 5, 7, 'd'));
    assert_true(claims(r, "ed", (uint64_t[]){6, 6}));
    assert_int_equal(r->common, 1);
    assert_false(claims(r, "fd", (uint64_t[]){7, 6}));
    assert_true(takes(r, 5, 7, 'f'));
    sh_store_close(&backup);
    rig_check(r, true);
    rig_release(r);
    free(r);
}

/* An update whose chunks have not come. */
static void offer(rig *r, uint64_t seq, char lease)
{
    uint8_t hash[32] = {(uint8_t)lease}, *hashes = NULL;
    rig_update u = rig_make(r, 0, seq);
    sh_update_meta meta = {.round = 1,
                           .base_version = u.base_version,
                           .base_sha256 = u.base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = 10,
                           .tokens_seen = 10,
                           .heldout_before = 3,
                           .heldout_after = 2};
    sh_error err = {0};
    sh_buf payload;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    assert_int_equal(sh_blob_describe(&u, sizeof u, &meta.blob, &hashes, &err), SH_OK);
    assert_int_equal(sh_update_meta_encode(&meta, &payload, &err), SH_OK);
    sh_msg msg = {.type = SH_MSG_ITEM,
                  .item = {.epoch = 5,
                           .cls = SH_CLASS_UPDATE,
                           .seq = seq,
                           .last_seq = seq,
                           .kind = SH_ITEM_UPDATE,
                           .payload = {payload.data, payload.len},
                           .lease = sh_lease_name(hash)}};
    r->connection = (uint8_t)lease;
    assert_true(rig_send(r, 0, &msg));
    rig_drop_mail(r);
    sh_buf_release(&payload);
    free(hashes);
}

/* What a copy has not made is not waited for when it takes the epoch over. */
static void test_an_update_of_the_other_copy_is_forgotten(void **state)
{
    (void)state;
    rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    rig_init(r, NULL);
    rig_boot(r);
    rig_enrol(r, 0);
    assert_false(claims(r, "a", (uint64_t[]){1}));
    offer(r, 1, 'a');
    offer(r, 2, 'a');
    assert_int_equal(rig_status(r).waiting, 2);
    uint8_t leases[64] = {[0] = 'b', [32] = 'a'}, starts[2 * SH_WIRE_START_BYTES];
    sh_start_put(starts, (uint64_t[SH_CLASSES]){2, 1, 1, 1});
    sh_start_put(starts + SH_WIRE_START_BYTES, (uint64_t[SH_CLASSES]){1, 1, 1, 1});
    sh_msg msg = {.type = SH_MSG_ENROL,
                  .enrol = {.epoch = 5,
                            .agent = "a",
                            .kernel = "k",
                            .device_class = "",
                            .leases = {2, leases},
                            .starts = {starts, sizeof starts}}};
    r->connection = 'b';
    assert_true(rig_send(r, 0, &msg));
    assert_true(rig_take(r, 0, &msg));
    assert_true(msg.welcome.accepted && !msg.welcome.renew);
    assert_int_equal(rig_status(r).waiting, 1); /* the first is in both */
    rig_check(r, true);
    rig_release(r);
    free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_update_of_the_other_copy_is_forgotten),
        cmocka_unit_test(test_copies_of_a_store_that_runs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
