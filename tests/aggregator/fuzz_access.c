/*
 * What strangers and nodes send to the door of the aggregator: ENROL with tokens and leases,
 * ROTATE, and anything else. The input is messages, each: whose (one byte), type, length of the
 * body in two bytes (little-endian), body. Nothing that a peer sends ends a step with an error, and
 * what the core counts is what its rows say.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "tests/wire/sample.h"

#define PEERS     4u
#define STEPS_MAX 64u
#define TOKEN     "sixteen bytes of"
#define NOW_MS    UINT64_C(1790000000000)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    sh_store *store;
    sh_coord *coord;
    sh_coord_actions actions;
    uint64_t enrolled;
} bench;

static void must(sh_status status, const sh_error *err)
{
    if (status != SH_OK)
        sh_assert_failed(err->text, __FILE__, __LINE__);
}

static void run(bench *b, sh_coord_event *event)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    must(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err), &err);
    event->now_ms = NOW_MS;
    must(sh_coord_step(b->coord, event, txn, &b->actions, &err), &err);
    must(sh_txn_commit(&txn, &err), &err);
    sh_coord_actions_clear(&b->actions);
}

static sh_hash key_of(unsigned peer)
{
    return (sh_hash){{(uint8_t)(1 + peer)}};
}

static void begin(bench *b)
{
    sh_store_options store = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    sh_coord_options o = {.buffer = 2,
                          .staleness_discount = 1,
                          .server_scale = 1,
                          .checkin_ms = 1000,
                          .chunk_budget = 2,
                          .limit_messages_s = 1};
    sh_genesis genesis = {.model = {"model", 5}, .format = "Q8_0"};
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_rng rng;
    uint8_t seed[32] = {5};
    o.limit_burst_s = 1;
    sh_sign_keypair(seed, &o.release_pk, &o.release_sk);
    sh_rng_init(&rng, 1, 2, 3);
    must(sh_store_open_memory(&store, &b->store, &err), &err);
    must(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err), &err);
    must(sh_coord_create(&o, &genesis, NOW_MS, &rng, txn, &b->actions, &b->coord, &err), &err);
    must(sh_txn_commit(&txn, &err), &err);
    sh_coord_actions_clear(&b->actions);
    run(b, &(sh_coord_event){
               .kind = SH_COORD_COMMAND, .command = SH_COMMAND_ENROL, .node = key_of(0)});
    run(b, &(sh_coord_event){.kind = SH_COORD_COMMAND,
                             .command = SH_COMMAND_TOKEN_ADD,
                             .node = sh_blake2b(TOKEN, strlen(TOKEN)),
                             .number = 2,
                             .until_ms = NOW_MS + 1});
}

static sh_status count_key(void *arg, const sh_hash *key, bool allowed)
{
    (void)key;
    *(uint64_t *)arg += allowed;
    return SH_OK;
}

static sh_status count_node(void *arg, const sh_node_row *row)
{
    *(uint64_t *)arg += !row->revoked;
    return SH_OK;
}

static void end(bench *b)
{
    sh_error err = {0};
    sh_txn *txn = NULL;
    uint64_t nodes = 0, keys = 0;
    sh_coord_status s = sh_coord_get_status(b->coord);
    must(sh_txn_begin(b->store, SH_TXN_READ, &txn, &err), &err);
    must(sh_coord_each_node(txn, count_node, &nodes, &err), &err);
    must(sh_coord_each_key(txn, count_key, &keys, &err), &err);
    SH_ASSERT(nodes == s.enrolled && nodes <= 1 + 2); /* the operator's, and the token's two */
    SH_ASSERT(keys >= nodes && keys <= 2 * nodes);    /* its own, and one to come */
    SH_ASSERT(s.token_enrolments == nodes - 1);
    must(sh_coord_each_audit(txn, NULL, NULL, &err), &err);
    sh_txn_abort(&txn);
    sh_coord_destroy(&b->coord);
    sh_store_close(&b->store);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bench b;
    begin(&b);
    for (size_t at = 0, steps = 0; at + 4 <= size && steps < STEPS_MAX; steps++) {
        size_t n = SH_MIN((size_t)(data[at + 2] | data[at + 3] << 8), size - at - 4);
        sh_buf message;
        sh_buf_init(&message, SH_WIRE_MESSAGE_MAX);
        sample_wrap(SH_WIRE_VERSION, data[at + 1] & 0x7f, data + at + 4, n, &message);
        run(&b, &(sh_coord_event){.kind = SH_COORD_MESSAGE,
                                  .node = key_of(data[at] % PEERS),
                                  .message = {message.data, message.len}});
        sh_buf_release(&message);
        at += 4 + n;
    }
    end(&b);
    return 0;
}
