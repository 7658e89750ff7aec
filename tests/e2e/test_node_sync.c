/*
 * shoal-node as a process with an aggregator that this test plays (its inbox and its chunks are the
 * real ones of shared/sync): updates, releases, evaluations, each with the node killed on the way.
 * argv[1] is the program.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/model/model.h"
#include "shared/sync/sync.h"
#include "tests/e2e/node_rig.h"

enum { T_INBOX, T_CHUNK, TABLES };
static const char *const tables[TABLES] = {"inbox", "chunk"};
static const char *program;

typedef struct {
    node_rig rig;
    sh_net *net;
    sh_net_server *server;
    sh_store *store;
    atomic_bool shut; /* no key is let in */
    sh_train_plan train;
    sh_evaluate_plan evaluate;
    uint8_t *evaluate_chunks;
    sh_buf manifest; /* offered; empty: none */
    unsigned enrols, updates, evaluations, duplicates, errors;
    sh_msg_checkin checkin; /* the last one */
    sh_evaluation evaluation;
    sh_buf pending; /* payload of the update on its way */
    sh_msg_item pending_item;
} played;

static bool allow(void *arg, const sh_hash *key)
{
    played *p = arg;
    return !atomic_load(&p->shut) && sh_hash_equal(key, &p->rig.public_key);
}

static int make(void **state)
{
    played *p = calloc(1, sizeof *p);
    assert_non_null(p);
    atomic_store(&p->shut, true); /* the ZAP thread reads the node's key after this is undone */
    OK(sh_crypto_init(err));
    OK(sh_net_keys_make(&p->rig.aggregator, err));
    OK(sh_net_create(&p->net, err));
    sh_net_server_options o = {.endpoint = "tcp://127.0.0.1:*",
                               .keys = &p->rig.aggregator,
                               .allow = allow,
                               .arg = p,
                               .message_max = SH_WIRE_MESSAGE_MAX};
    OK(sh_net_server_create(p->net, &o, &p->server, err));
    sh_store_options so = {.tables = tables, .n_tables = TABLES, .bytes_max = 256u << 20};
    OK(sh_store_open_memory(&so, &p->store, err));
    node_rig_make(&p->rig, program, sh_net_server_endpoint(p->server));
    sh_buf_init(&p->manifest, SH_WIRE_MANIFEST_MAX);
    sh_buf_init(&p->pending, SH_WIRE_ITEM_MAX);
    atomic_store(&p->shut, false);
    *state = p;
    return 0;
}

static int release(void **state)
{
    played *p = *state;
    node_rig_release(&p->rig);
    sh_net_server_destroy(&p->server, 0);
    sh_net_destroy(&p->net);
    sh_store_close(&p->store);
    sh_buf_release(&p->manifest);
    sh_buf_release(&p->pending);
    free(p->evaluate_chunks);
    free(p);
    return 0;
}

static void send_msg(played *p, const sh_hash *to, const sh_msg *msg)
{
    sh_buf bytes;
    sh_error failure = {0};
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, err));
    /* A node that was killed is not there any more: it asks again. */
    sh_status status = sh_net_server_send(p->server, to, bytes.data, bytes.len, &failure);
    assert_true(status == SH_OK || status == SH_ERR_NOT_FOUND || status == SH_ERR_LIMIT);
    sh_buf_release(&bytes);
}

static void acknowledge(played *p, const sh_hash *to, const sh_msg_item *item)
{
    sh_txn *txn = NULL;
    sh_inbox_verdict verdict;
    sh_msg msg = {.type = SH_MSG_ACK};
    OK(sh_txn_begin(p->store, SH_TXN_WRITE, &txn, err));
    OK(sh_inbox_check(txn, T_INBOX, to, item, &verdict, err));
    p->duplicates += verdict == SH_INBOX_DUPLICATE;
    if (verdict == SH_INBOX_NEW) {
        p->updates += item->kind == SH_ITEM_UPDATE;
        if (item->kind == SH_ITEM_EVALUATION) {
            p->evaluations++;
            OK(sh_evaluation_decode(item->payload.data, item->payload.n, &p->evaluation, err));
        }
    }
    OK(sh_inbox_mark(txn, T_INBOX, to, item, &msg.ack, err));
    msg.ack.lease = item->lease;
    OK(sh_txn_commit(&txn, err));
    send_msg(p, to, &msg);
}

/* Asks for what is missing of the pending update, or takes it. */
static void advance_update(played *p, const sh_hash *to)
{
    uint8_t hashes[SH_WIRE_WANT_MAX * sizeof(sh_hash)];
    sh_update_meta meta;
    sh_txn *txn = NULL;
    sh_buf blob;
    uint32_t n = 0;
    if (p->pending.len == 0)
        return;
    OK(sh_update_meta_decode(p->pending.data, p->pending.len, &meta, err));
    OK(sh_txn_begin(p->store, SH_TXN_READ, &txn, err));
    OK(sh_blob_missing(txn, T_CHUNK, &meta.blob, hashes, SH_WIRE_WANT_MAX, &n, err));
    if (n == 0) {
        sh_buf_init(&blob, 64u << 20);
        OK(sh_blob_get(txn, T_CHUNK, &meta.blob, &blob, err)); /* checks its hash */
        sh_buf_release(&blob);
    }
    sh_txn_abort(&txn);
    if (n > 0) {
        send_msg(p, to, &(sh_msg){.type = SH_MSG_WANT, .want = {n, hashes}});
        return;
    }
    p->pending_item.payload = (sh_bytes){p->pending.data, p->pending.len};
    acknowledge(p, to, &p->pending_item);
    sh_buf_clear(&p->pending);
}

static void serve_chunks(played *p, const sh_hash *to, const sh_hash_list *want)
{
    for (uint32_t i = 0; i < want->n; i++) {
        sh_txn *txn = NULL;
        sh_slice bytes;
        sh_msg msg = {.type = SH_MSG_CHUNK};
        memcpy(msg.chunk.hash.b, want->hashes + i * sizeof(sh_hash), sizeof(sh_hash));
        OK(sh_txn_begin(p->store, SH_TXN_READ, &txn, err));
        OK(sh_txn_get(txn, T_CHUNK, msg.chunk.hash.b, sizeof(sh_hash), &bytes));
        msg.chunk.bytes = (sh_bytes){bytes.data, bytes.n};
        send_msg(p, to, &msg);
        sh_txn_abort(&txn);
    }
}

static void take(played *p, const sh_hash *from, const sh_msg *msg)
{
    sh_txn *txn = NULL;
    switch (msg->type) {
    case SH_MSG_ENROL:
        p->enrols++;
        send_msg(p, from, &(sh_msg){.type = SH_MSG_WELCOME, .welcome = {true, "hello"}});
        break;
    case SH_MSG_CHECKIN:
        p->checkin = msg->checkin;
        send_msg(p, from,
                 &(sh_msg){.type = SH_MSG_PLAN,
                           .plan = {.return_after_ms = 200,
                                    .train = p->train,
                                    .evaluate = p->evaluate,
                                    .manifest = {p->manifest.data, p->manifest.len}}});
        break;
    case SH_MSG_ITEM:
        if (msg->item.kind != SH_ITEM_UPDATE) {
            acknowledge(p, from, &msg->item);
            break;
        }
        sh_buf_clear(&p->pending);
        assert_int_equal(sh_buf_append(&p->pending, msg->item.payload.data, msg->item.payload.n),
                         SH_OK);
        p->pending_item = msg->item;
        advance_update(p, from);
        break;
    case SH_MSG_CHUNK:
        OK(sh_txn_begin(p->store, SH_TXN_WRITE, &txn, err));
        OK(sh_chunk_put(txn, T_CHUNK, &msg->chunk, err));
        OK(sh_txn_commit(&txn, err));
        advance_update(p, from);
        break;
    case SH_MSG_WANT:
        serve_chunks(p, from, &msg->want);
        break;
    case SH_MSG_ERROR:
        p->errors++;
        break;
    default:
        fail_msg("the node sent a %s", sh_msg_type_name(msg->type));
    }
}

static void serve(played *p, int timeout_ms)
{
    sh_net_event event;
    static sh_msg msg;
    OK(sh_net_wait(
        &(sh_net_waiting){.servers = &p->server, .n_servers = 1, .timeout_ms = timeout_ms}, err));
    for (;;) {
        OK(sh_net_server_next(p->server, &event, err));
        if (event.kind == SH_NET_NONE)
            return;
        assert_int_equal(event.kind, SH_NET_MESSAGE);
        OK(sh_msg_decode(event.data, event.n, &msg, err));
        sh_hash from = event.key;
        take(p, &from, &msg);
    }
}

/* Serves until the log has it; false: the node ended. */
static bool serve_until(played *p, const char *text)
{
    uint64_t end = sh_clock_mono_ms() + RIG_WAIT_MS;
    while (!node_rig_logged(&p->rig, text)) {
        if (sh_clock_mono_ms() > end)
            return node_rig_saw(&p->rig, text); /* says what the log has */
        if (!e2e_runs(&p->rig.process))
            return false;
        serve(p, 20);
    }
    return true;
}

/* No memory limit: a sanitizer's shadow would not fit into any. */
static const char *const quick[] = {"--train.memory-max",
                                    "0",
                                    "--retry.min-ms",
                                    "50",
                                    "--retry.max-ms",
                                    "500",
                                    "--confirm-inferences",
                                    "3",
                                    "--train.idle=false",
                                    "--evaluate.tokens-min",
                                    "4",
                                    NULL};

static void start(played *p, const char *failpoints)
{
    node_rig_start(&p->rig, quick, failpoints);
    node_rig_ready(&p->rig);
}

/* The node meets the fail point and dies of it. */
static void expect_death(played *p, const char *point)
{
    char text[64];
    snprintf(text, sizeof text, "event=failpoint name=%s", point);
    assert_true(serve_until(p, text));
    assert_int_equal(node_rig_wait(&p->rig), 128 + SIGKILL);
}

/* So many texts that some are held out: one in eight is, by its random number. */
static void teach(played *p)
{
    static const char *const words[] = {"apple", "river", "stone", "cloud",  "table",  "night",
                                        "paper", "green", "horse", "winter", "summer", "bread"};
    char id[64], prompt[64];
    for (size_t i = 0; i < 96; i++) {
        snprintf(prompt, sizeof prompt, "%s%zu and the", words[i % SH_COUNT(words)], i);
        node_rig_complete(&p->rig, prompt, "bob", id);
        assert_int_equal(node_rig_feedback(&p->rig, id, "edit", " old mill by the sea"), 200);
    }
}

static sh_hash genesis_sha256(played *p)
{
    char path[160];
    sh_hash sha256;
    uint64_t n;
    snprintf(path, sizeof path, "%s/genesis.gguf", p->rig.bundle);
    OK(sh_sha256_file(path, &sha256, &n, err));
    return sha256;
}

/* Half-way through its training it dies; the next life trains again, and one update arrives. */
static void test_update(void **state)
{
    played *p = *state;
    start(p, "node.train");
    teach(p);
    p->train = (sh_train_plan){.train = true,
                               .round = 1,
                               .base_version = 1,
                               .base_sha256 = genesis_sha256(p),
                               .a_seed = 5,
                               .rank = 2,
                               .alpha = 4,
                               .lr = 0.01f,
                               .lr_final = 1,
                               .clip = 1,
                               .batch = 1,
                               .context = 16,
                               .passes_milli = 4000,
                               .steps_max = 60,
                               .tokens_min = 16};
    expect_death(p, "node.train");
    assert_int_equal(p->updates, 0);
    start(p, NULL);
    assert_true(serve_until(p, "event=update_acked"));
    assert_int_equal(p->updates, 1);
    assert_true(node_rig_logged(&p->rig, "event=link state=up"));
    assert_true(node_rig_logged(&p->rig, "event=train_started round=1"));
    assert_true(node_rig_logged(&p->rig, "event=train_done round=1 samples="));
    assert_true(node_rig_logged(&p->rig, "event=update_made round=1"));
    assert_int_equal(p->errors, 0);
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
}

static void offer(played *p, uint64_t version, uint64_t seed)
{
    sh_buf model;
    sh_txn *txn = NULL;
    sh_buf_release(&p->manifest);
    node_rig_release_make(&p->rig, version, seed, &model, &p->manifest);
    OK(sh_txn_begin(p->store, SH_TXN_WRITE, &txn, err));
    OK(sh_blob_put(txn, T_CHUNK, model.data, model.len, err));
    OK(sh_txn_commit(&txn, err));
    sh_buf_release(&model);
}

static void confirm(played *p, const char *version)
{
    char id[64], text[64];
    for (int i = 0; i < 4; i++)
        node_rig_complete(&p->rig, "a word or", "bob", id);
    snprintf(text, sizeof text, "event=release_confirmed version=%s", version);
    assert_true(serve_until(p, text));
}

static void expect_release(played *p, const char *version)
{
    char body[] = "{\"prompt\": \"which one\", \"max_tokens\": 2}", answer[8192], text[64];
    int status = node_rig_http(&p->rig, "POST", "/v1/completions", body, answer, sizeof answer);
    snprintf(text, sizeof text, "\"shoal-release-%s\"", version);
    if (status != 200 || !strstr(answer, text))
        fail_msg("status %d, no %s: %s", status, text, answer);
}

/* A release is taken through every fail point; then its file is torn, and it is taken again. */
static void test_release(void **state)
{
    played *p = *state;
    char path[160];
    start(p, "node.install");
    offer(p, 2, 22);
    expect_death(p, "node.install");
    start(p, "node.activate");
    expect_death(p, "node.activate");
    start(p, NULL);
    assert_true(serve_until(p, "version=2")); /* it was decided before the death */
    expect_release(p, "2");
    confirm(p, "2");
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);

    snprintf(path, sizeof path, "%s/models/slot1.gguf", p->rig.node);
    assert_int_equal(truncate(path, 5000), 0);
    start(p, NULL);
    assert_true(node_rig_logged(&p->rig, "event=slot_lost slot=1 version=2"));
    assert_true(serve_until(p, "event=release_active version=2"));
    expect_release(p, "2");
    offer(p, 3, 33);
    confirm(p, "2");
    assert_true(serve_until(p, "event=release_active version=3"));
    expect_release(p, "3");
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
}

/* One signed by somebody else changes nothing. */
static void test_foreign_release(void **state)
{
    played *p = *state;
    uint8_t seed[32] = {99};
    sh_sign_public_key other;
    start(p, NULL);
    sh_sign_keypair(seed, &other, &p->rig.release_key);
    offer(p, 2, 22);
    assert_true(serve_until(p, "event=release_refused"));
    for (uint64_t end = sh_clock_mono_ms() + RIG_WAIT_MS; p->errors == 0;) {
        assert_true(sh_clock_mono_ms() < end);
        serve(p, 20);
    }
    expect_release(p, "1");
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
}

static void test_evaluation(void **state)
{
    played *p = *state;
    sh_buf model, manifest;
    sh_txn *txn = NULL;
    start(p, NULL);
    teach(p);
    node_rig_release_make(&p->rig, 2, 22, &model, &manifest);
    OK(sh_txn_begin(p->store, SH_TXN_WRITE, &txn, err));
    OK(sh_blob_put(txn, T_CHUNK, model.data, model.len, err));
    OK(sh_txn_commit(&txn, err));
    OK(sh_blob_describe(model.data, model.len, &p->evaluate.model, &p->evaluate_chunks, err));
    p->evaluate.candidate = 7;
    p->evaluate.parent_version = 1;
    sh_buf_release(&model);
    sh_buf_release(&manifest);
    assert_true(serve_until(p, "event=evaluated candidate=7"));
    for (uint64_t end = sh_clock_mono_ms() + RIG_WAIT_MS; p->evaluations == 0;) {
        assert_true(sh_clock_mono_ms() < end);
        serve(p, 20);
    }
    assert_int_equal(p->evaluation.candidate, 7);
    assert_true(sh_hash_equal(&p->evaluation.candidate_sha256, &p->evaluate.model.sha256));
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < p->evaluation.n; i++)
        tokens += p->evaluation.slices[i].tokens;
    assert_true(tokens > 0);
    expect_release(p, "1");
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
}

/* Refused, it serves; let in, it goes on by itself. */
static void test_refused(void **state)
{
    played *p = *state;
    char id[64];
    atomic_store(&p->shut, true);
    start(p, NULL);
    assert_true(serve_until(p, "event=link state=refused"));
    node_rig_complete(&p->rig, "all the same", "bob", id);
    assert_int_equal(node_rig_feedback(&p->rig, id, "accept", NULL), 200);
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
    assert_int_equal(p->enrols, 0);
    atomic_store(&p->shut, false);
    start(p, NULL);
    assert_true(serve_until(p, "event=checked_in"));
    assert_true(p->enrols > 0 && p->checkin.inferences == 1);
    assert_int_equal(node_rig_end(&p->rig, SIGTERM), 0);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    program = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_refused, make, release),
        cmocka_unit_test_setup_teardown(test_update, make, release),
        cmocka_unit_test_setup_teardown(test_release, make, release),
        cmocka_unit_test_setup_teardown(test_foreign_release, make, release),
        cmocka_unit_test_setup_teardown(test_evaluation, make, release),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
