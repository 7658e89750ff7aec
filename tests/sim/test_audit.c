/*
 * The audit program on the stores of a short run: clean as they are, and with losses and duplicates
 * planted in them one by one. It must find exactly what was planted, and name it.
 *
 *     test_sim_audit PROGRAM
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/sim/rig.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "aggregator/coordinator_internal.h"
#include "experiments/audit/audit.h"
#include "shared/sync/link.h"
#include "tests/cli/run.h"
#include "tests/store/util.h"

#define NODES 6

static const char *program;

/* ---- a run, and its stores ---- */

typedef struct {
    temp_dir dir;
    sh_store *store; /* the one being tampered with */
    sh_txn *txn;
} fixture;

static int make_run(void **state)
{
    static const char *const words[] = {
        "--nodes", "6", "--learn.rounds", "5", "--store", "lmdb", "--seed", "3", NULL};
    fixture *f = sh_calloc(1, sizeof *f);
    rig r;
    assert_non_null(f);
    f->dir = temp_dir_make();
    rig_init(&r, words);
    rig_add(&r, "--out", temp_path(&f->dir, "run"));
    rig_create(&r);
    OK(sim_run(r.sim, err));
    rig_release(&r);
    *state = f;
    return 0;
}

static int remove_run(void **state)
{
    fixture *f = *state;
    temp_dir_remove(&f->dir);
    free(f);
    return 0;
}

static void open_aggregator(fixture *f)
{
    const sh_store_options o = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    OK(sh_store_open_lmdb(temp_path(&f->dir, "run/aggregator"), &o, &f->store, err));
    OK(sh_txn_begin(f->store, SH_TXN_WRITE, &f->txn, err));
}

static void open_node(fixture *f, uint32_t node)
{
    const sh_store_options o = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES};
    char name[64];
    snprintf(name, sizeof name, "run/nodes/node-%05u", node);
    OK(sh_store_open_lmdb(temp_path(&f->dir, name), &o, &f->store, err));
    OK(sh_txn_begin(f->store, SH_TXN_WRITE, &f->txn, err));
}

static void close_store(fixture *f)
{
    OK(sh_txn_commit(&f->txn, err));
    sh_store_close(&f->store);
}

/* ---- the audit's answer ---- */

typedef struct {
    uint64_t lost, twice, wrong;
} counts;

static uint64_t number(const json_t *document, const char *key)
{
    const json_t *value = json_object_get(document, key);
    if (!json_is_integer(value))
        fail_msg("the audit's document has no number \"%s\"", key);
    return (uint64_t)json_integer_value(value);
}

/* Runs the program; the document is the caller's. */
static json_t *audit(const fixture *f, counts expected)
{
    const char *const words[] = {"--dir", temp_path(&f->dir, "run"), NULL};
    run_result r = run_program(program, words, NULL, 0);
    json_error_t where;
    json_t *document = json_loads(r.out, 0, &where);
    if (!document)
        fail_msg("exit code %d, no JSON (%s): \"%s\", stderr \"%s\"", r.exit_code, where.text,
                 r.out, r.err);
    counts got = {number(document, "lost"), number(document, "twice"), number(document, "wrong")};
    bool clean = expected.lost + expected.twice + expected.wrong == 0;
    if (memcmp(&got, &expected, sizeof got) != 0 || r.exit_code != !clean || r.n_err != 0)
        fail_msg("lost %llu twice %llu wrong %llu, exit code %d; expected %llu %llu %llu, %d\n%s%s",
                 (unsigned long long)got.lost, (unsigned long long)got.twice,
                 (unsigned long long)got.wrong, r.exit_code, (unsigned long long)expected.lost,
                 (unsigned long long)expected.twice, (unsigned long long)expected.wrong, !clean,
                 r.out, r.err);
    run_release(&r);
    return document;
}

/* One of the findings is this text. */
static void expect_finding(const json_t *document, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void expect_finding(const json_t *document, const char *format, ...)
{
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    const json_t *findings = json_object_get(document, "findings"), *row;
    size_t i;
    json_array_foreach(findings, i, row) if (strcmp(json_string_value(row), text) == 0) return;
    char *all = json_dumps(findings, JSON_INDENT(2));
    fail_msg("no finding \"%s\" among %s", text, all);
}

/* ---- what is tampered with ---- */

typedef struct {
    sh_verdict verdict;
    unsigned skip;
    sh_update_row row;
    bool found;
} search;

static sh_status look(void *arg, const sh_update_row *row)
{
    search *s = arg;
    if (s->found || row->verdict != s->verdict || s->skip-- > 0)
        return SH_OK;
    s->row = *row;
    s->found = true;
    return SH_OK;
}

/* The skip-th update with that verdict; the simulator puts the node's number first in its key. */
static sh_update_id pick(fixture *f, sh_verdict verdict, unsigned skip, uint64_t *version)
{
    search s = {.verdict = verdict, .skip = skip};
    OK(sh_coord_each_update(f->txn, look, &s, err));
    assert_true(s.found);
    if (version)
        *version = s.row.version;
    return s.row.id;
}

static unsigned node_of(const sh_update_id *id)
{
    return id->node.b[3];
}

static void delete_update(fixture *f, const sh_update_id *id)
{
    uint8_t key[COORD_ID_BYTES];
    coord_id_put(key, id);
    OK(sh_txn_del(f->txn, SH_COORD_T_UPDATE, key, sizeof key, err));
}

typedef struct {
    uint64_t version, other, candidate;
} release_search;

static sh_status look_release(void *arg, const sh_release_row *row)
{
    release_search *s = arg;
    bool wanted = s->version ? row->version == s->version
                             : row->n_merged > 0 && row->version && row->version != s->other;
    if (wanted)
        *s = (release_search){row->version, s->other, row->candidate};
    return SH_OK;
}

/* Adds id to a release's list (version 0: any but other), or takes it out; returns the version. */
static uint64_t edit_list(fixture *f, uint64_t version, uint64_t other, const sh_update_id *id,
                          bool add)
{
    release_search s = {.version = version, .other = other};
    sh_release_row row;
    OK(sh_coord_each_candidate(f->txn, look_release, &s, err));
    assert_int_not_equal(s.candidate, 0);
    OK(coord_candidate_row_get(f->txn, s.candidate, &row, err));
    sh_update_id *list = sh_calloc(row.n_merged + 1, sizeof *list);
    assert_non_null(list);
    uint32_t n = 0;
    for (uint32_t i = 0; i < row.n_merged; i++)
        if (add || coord_id_compare(&row.merged[i], id) != 0)
            list[n++] = row.merged[i];
    if (add)
        list[n++] = *id;
    assert_int_not_equal(n, row.n_merged);
    free(row.merged);
    row.merged = list;
    row.n_merged = n;
    OK(coord_candidate_row_put(f->txn, &row, err));
    free(list);
    return s.version;
}

/* ---- tests ---- */

static void test_clean(void **state)
{
    fixture *f = *state;
    json_t *d = audit(f, (counts){0});
    assert_int_equal(number(d, "nodes"), NODES);
    assert_true(number(d, "made") > NODES);
    assert_int_equal(number(d, "acknowledged"), number(d, "made"));
    assert_true(number(d, "merged") > 0 && number(d, "refused") > 0);
    assert_int_equal(number(d, "pending") + number(d, "owed") + number(d, "dropped"), 0);
    assert_int_equal(json_array_size(json_object_get(d, "findings")), 0);
    json_decref(d);
}

/* --out: the same document, in a file. */
static void test_out(void **state)
{
    fixture *f = *state;
    const char *file = temp_path(&f->dir, "audit.json");
    const char *const words[] = {"--dir", temp_path(&f->dir, "run"), "--out", file, NULL};
    json_t *printed = audit(f, (counts){0}), *saved = NULL;
    run_result r = run_program(program, words, NULL, 0);
    assert_int_equal(r.exit_code, 0);
    assert_int_equal(r.n_out + r.n_err, 0);
    run_release(&r);
    OK(sh_json_load(file, &saved, err));
    assert_true(json_equal(printed, saved));
    json_decref(printed);
    json_decref(saved);
}

/* One loss and one duplicate at once: both are found, and nothing else. */
static void test_loss_and_duplicate(void **state)
{
    fixture *f = *state;
    uint64_t version = 0;
    open_aggregator(f);
    sh_update_id lost = pick(f, SH_VERDICT_REFUSED, 0, NULL);
    sh_update_id twice = pick(f, SH_VERDICT_MERGED, 1, &version);
    delete_update(f, &lost);
    uint64_t other = edit_list(f, 0, version, &twice, true);
    close_store(f);
    json_t *d = audit(f, (counts){.lost = 1, .twice = 1});
    assert_int_equal(json_array_size(json_object_get(d, "findings")), 2);
    expect_finding(d, "node-%05u: update %llu was acknowledged, the aggregator does not have it",
                   node_of(&lost), (unsigned long long)lost.seq);
    expect_finding(d, "node-%05u: update %llu is counted 2 times, by releases %llu and %llu",
                   node_of(&twice), (unsigned long long)twice.seq,
                   (unsigned long long)SH_MIN(version, other),
                   (unsigned long long)SH_MAX(version, other));
    json_decref(d);
}

static void test_listed_twice_in_one_release(void **state)
{
    fixture *f = *state;
    uint64_t version = 0;
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_MERGED, 0, &version);
    edit_list(f, version, 0, &id, true);
    close_store(f);
    json_t *d = audit(f, (counts){.twice = 1});
    expect_finding(d, "node-%05u: update %llu is counted 2 times, by releases %llu and %llu",
                   node_of(&id), (unsigned long long)id.seq, (unsigned long long)version,
                   (unsigned long long)version);
    json_decref(d);
}

/* The same bytes under another sequence: merged twice, and once without a maker. */
static void test_same_bytes_again(void **state)
{
    fixture *f = *state;
    uint8_t key[COORD_ID_BYTES];
    uint64_t version = 0;
    sh_slice value;
    sh_buf copy;
    sh_buf_init(&copy, 1u << 20);
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_MERGED, 0, &version), again = id;
    again.seq += 100;
    coord_id_put(key, &id);
    OK(sh_txn_get(f->txn, SH_COORD_T_UPDATE, key, sizeof key, &value));
    OK(sh_buf_append(&copy, value.data, value.n));
    coord_id_put(key, &again);
    OK(sh_txn_put(f->txn, SH_COORD_T_UPDATE, key, sizeof key, copy.data, copy.len, err));
    sh_buf_release(&copy);
    edit_list(f, version, 0, &again, true);
    close_store(f);
    json_t *d = audit(f, (counts){.twice = 1, .wrong = 1});
    expect_finding(d, "node-%05u: updates %llu and %llu are the same bytes, both merged",
                   node_of(&id), (unsigned long long)id.seq, (unsigned long long)again.seq);
    expect_finding(d, "node-%05u: update %llu is stored, and no node made it", node_of(&id),
                   (unsigned long long)again.seq);
    json_decref(d);
}

static void test_merged_but_not_listed(void **state)
{
    fixture *f = *state;
    uint64_t version = 0;
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_MERGED, 0, &version);
    edit_list(f, version, 0, &id, false);
    close_store(f);
    json_t *d = audit(f, (counts){.lost = 1});
    expect_finding(d, "node-%05u: update %llu is marked merged, and no release lists it",
                   node_of(&id), (unsigned long long)id.seq);
    json_decref(d);
}

/* A merged update's row: lost, and a release lists what is not there. */
static void test_listed_but_not_there(void **state)
{
    fixture *f = *state;
    uint64_t version = 0;
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_MERGED, 0, &version);
    delete_update(f, &id);
    close_store(f);
    json_t *d = audit(f, (counts){.lost = 1, .wrong = 1});
    expect_finding(d, "node-%05u: update %llu is listed by release %llu, its row is not there",
                   node_of(&id), (unsigned long long)id.seq, (unsigned long long)version);
    json_decref(d);
}

static void test_refused_but_listed(void **state)
{
    fixture *f = *state;
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_REFUSED, 0, NULL);
    uint64_t version = edit_list(f, 0, 0, &id, true);
    close_store(f);
    json_t *d = audit(f, (counts){.wrong = 1});
    expect_finding(d, "node-%05u: update %llu is listed by release %llu, its row says otherwise",
                   node_of(&id), (unsigned long long)id.seq, (unsigned long long)version);
    json_decref(d);
}

/* A byte of an alarm that arrived. */
static void test_changed_bytes(void **state)
{
    fixture *f = *state;
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    uint8_t name[COORD_ID_BYTES], bytes[512];
    open_aggregator(f);
    OK(sh_cursor_open(f->txn, SH_COORD_T_ALARM, &cursor, err));
    OK(sh_cursor_seek(cursor, NULL, 0, &key, &value));
    assert_int_equal(key.n, sizeof name);
    assert_true(value.n > 0 && value.n <= sizeof bytes);
    size_t n = value.n;
    memcpy(name, key.data, sizeof name);
    memcpy(bytes, value.data, n);
    sh_cursor_close(&cursor);
    bytes[n - 1] ^= 1;
    OK(sh_txn_put(f->txn, SH_COORD_T_ALARM, name, sizeof name, bytes, n, err));
    close_store(f);
    json_t *d = audit(f, (counts){.wrong = 1});
    expect_finding(d, "node-%05u: alarm %llu has other bytes at the aggregator", name[3],
                   (unsigned long long)sh_key_get_u64(name + 40));
    json_decref(d);
}

static void ledger_key(uint8_t key[9], uint8_t cls, uint64_t seq)
{
    key[0] = cls;
    sh_key_put_u64(key + 1, seq);
}

/* Deletes row 1, 2 or the last (0) of a class from the ledger of the first node from `from` on that
 * made at least `least` items of it; returns the node. *seq: the row. */
static uint32_t cut_ledger(fixture *f, uint32_t from, uint64_t least, uint64_t *seq)
{
    const sh_outbox outbox = {.table = SH_NODE_T_OUTBOX, .meta_table = SH_NODE_T_META};
    for (uint32_t node = from; node < NODES; node++) {
        sh_outbox_counts made;
        open_node(f, node);
        OK(sh_outbox_get_counts(&outbox, f->txn, &made, err));
        uint64_t last = made.next_seq[SH_CLASS_UPDATE] - 1;
        if (last >= least) {
            uint8_t key[9];
            *seq = *seq ? *seq : last;
            ledger_key(key, SH_CLASS_UPDATE, *seq);
            OK(sh_txn_del(f->txn, SH_NODE_T_LEDGER, key, sizeof key, err));
            close_store(f);
            return node;
        }
        close_store(f);
    }
    fail_msg("no node from %u on made %llu updates", from, (unsigned long long)least);
    return 0;
}

/* Rows that vanish from a ledger's beginning, middle and end. The items are lost; what the
 * aggregator has of the last two, no node made (of the first, the ledger might have forgotten). */
static void test_ledger_gaps(void **state)
{
    fixture *f = *state;
    uint64_t gone[3] = {1, 2, 0};
    uint32_t node[3] = {0};
    for (int i = 0; i < 3; i++)
        node[i] = cut_ledger(f, i ? node[i - 1] + 1 : 0, i == 1 ? 3 : 2, &gone[i]);
    json_t *d = audit(f, (counts){.lost = 3, .wrong = 2});
    for (int i = 0; i < 3; i++)
        expect_finding(d, "node-%05u: update %llu to %llu missing from the ledger", node[i],
                       (unsigned long long)gone[i], (unsigned long long)gone[i]);
    json_decref(d);
}

/* Owed, but neither in the outbox nor at the aggregator. */
static void test_owed_and_gone(void **state)
{
    fixture *f = *state;
    uint8_t key[9], row[128];
    sh_slice value;
    open_aggregator(f);
    sh_update_id id = pick(f, SH_VERDICT_REFUSED, 0, NULL);
    delete_update(f, &id);
    close_store(f);
    open_node(f, node_of(&id));
    ledger_key(key, SH_CLASS_UPDATE, id.seq);
    OK(sh_txn_get(f->txn, SH_NODE_T_LEDGER, key, sizeof key, &value));
    size_t n = value.n;
    assert_true(n >= 2 && n <= sizeof row);
    memcpy(row, value.data, n);
    assert_int_equal(row[1], SH_LEDGER_ACKED);
    row[1] = SH_LEDGER_OWED;
    OK(sh_txn_put(f->txn, SH_NODE_T_LEDGER, key, sizeof key, row, n, err));
    close_store(f);
    json_t *d = audit(f, (counts){.lost = 1});
    expect_finding(d, "node-%05u: update %llu is owed, and neither side has it", node_of(&id),
                   (unsigned long long)id.seq);
    json_decref(d);
}

/* What cannot be audited is neither clean nor not: exit code 2 and one line. */
static void expect_refusal(const char *const *words, const char *end)
{
    run_result r = run_program(program, words, NULL, 0);
    size_t n = strlen(end);
    const char *newline = strchr(r.err, '\n');
    if (r.exit_code != 2 || r.n_out != 0 || !newline || newline[1] != 0 ||
        strncmp(r.err, "shoal-audit: ", 13) != 0 || r.n_err < n + 1 ||
        memcmp(newline - n, end, n) != 0)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\"; expected 2 and one line that ends "
                 "with \"%s\"",
                 r.exit_code, r.out, r.err, end);
    run_release(&r);
}

static void test_refusals(void **state)
{
    fixture *f = *state;
    static const char garbage[] = "no database";
    char data[128];
    expect_refusal((const char *const[]){"--dir", temp_path(&f->dir, "nothing"), NULL},
                   "No such file or directory");
    expect_refusal((const char *const[]){NULL}, "--dir is needed; see --help");
    expect_refusal((const char *const[]){"--dri", "x", NULL}, "the nearest known one is --dir");
    snprintf(data, sizeof data, "%s", temp_path(&f->dir, "run/nodes/node-00004/data.mdb"));
    OK(sh_file_write_atomic(data, garbage, sizeof garbage - 1, err));
    const char *const words[] = {"--dir", temp_path(&f->dir, "run"), NULL};
    run_result r = run_program(program, words, NULL, 0);
    if (r.exit_code != 2 || r.n_out != 0 || !strstr(r.err, "node-00004") ||
        strchr(r.err, '\n') != r.err + r.n_err - 1)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\"", r.exit_code, r.out, r.err);
    run_release(&r);
}

/* ---- a relay that left an epoch ---- */

#define RELAYED_EPOCH 77u /* of the node below it */

typedef struct {
    sh_store *root, *store;
    sh_link link;
    uint64_t life;
} relay;

static bool may_send(void *arg)
{
    (void)arg;
    return true;
}

static void forget(void *arg, sh_buf *message)
{
    (void)arg;
    sh_buf_release(message);
}

static sh_status fill_checkin(void *arg, sh_msg_checkin *checkin)
{
    (void)arg;
    (void)checkin;
    return SH_OK;
}

static sh_status on_plan(void *arg, const sh_msg_plan *plan)
{
    (void)arg;
    (void)plan;
    return SH_OK;
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    (void)arg;
    (void)item;
    return SH_OK;
}

static sh_status missing(void *arg, uint8_t *hashes, uint32_t max, uint32_t *n)
{
    (void)arg;
    (void)hashes;
    (void)max;
    *n = 0;
    return SH_OK;
}

static sh_status on_chunks(void *arg)
{
    (void)arg;
    return SH_OK;
}

static void on_news(void *arg)
{
    (void)arg;
}

static void on_rejected(void *arg, const char *why)
{
    (void)arg, (void)why;
}

/* One transaction of the relay's link: opened (a start of its own), told `msg`, with `make` more
 * updates put. */
static void relay_step(relay *r, bool open, const sh_msg *msg, unsigned make)
{
    static const sh_link_callbacks callbacks = {.may_send = may_send,
                                                .send = forget,
                                                .fill_checkin = fill_checkin,
                                                .on_plan = on_plan,
                                                .on_acked = on_acked,
                                                .missing = missing,
                                                .on_chunks = on_chunks,
                                                .on_rejected = on_rejected,
                                                .on_renewed = on_news,
                                                .on_refused = on_news};
    sh_link_options options = {
        .callbacks = &callbacks,
        .outbox = {.table = SH_COORD_T_OUTBOX, .meta_table = SH_COORD_T_META},
        .chunk_table = SH_COORD_T_CHUNK,
        .enrol = {.agent = "a", .kernel = "relay", .cores = 1},
        .retry_min_ms = 10,
        .retry_max_ms = 100};
    sh_error problem = {0};
    sh_rng rng;
    sh_txn *txn = NULL;
    sh_buf bytes;
    sh_rng_init(&rng, 5, r->life++, 0);
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    for (int cls = 0; cls < SH_CLASSES; cls++)
        options.outbox.quota_bytes[cls] = UINT64_MAX;
    OK(sh_txn_begin(r->store, SH_TXN_WRITE, &txn, err));
    sh_link_step s = {.link = &r->link, .txn = txn, .now_ms = 1000, .rng = &rng, .err = &problem};
    if (open) {
        OK(sh_link_open(&s, &options));
        sh_link_up(&s);
    }
    if (msg != NULL) {
        OK(sh_msg_encode(msg, &bytes, err));
        OK(sh_link_receive(&s, (sh_bytes){bytes.data, bytes.len}));
    }
    for (unsigned i = 0; i < make; i++)
        OK(sh_link_put(&s, SH_CLASS_UPDATE, SH_ITEM_UPDATE, (sh_bytes){"update", 6}, NULL));
    OK(sh_link_pump(&s));
    OK(sh_txn_commit(&txn, err));
    sh_buf_release(&bytes);
}

static void relay_acked(relay *r, uint64_t epoch, uint64_t high_water)
{
    relay_step(r, false,
               &(sh_msg){.type = SH_MSG_ACK,
                         .ack = {.epoch = epoch,
                                 .cls = SH_CLASS_UPDATE,
                                 .high_water = high_water,
                                 .lease = r->link.lease}},
               0);
}

/* A row of the store: an update, as it came, or one with a part (part 0: none). */
static void put_row(sh_store *store, sh_update_row row, uint64_t part)
{
    uint8_t bytes[SH_UPDATE_PART_BYTES], chunk[sizeof(sh_hash)] = {0};
    sh_update_part p = {.node = {{1}}, .epoch = RELAYED_EPOCH, .seq = part, .samples = 10};
    sh_update_meta meta = {.blob = {.bytes = 10,
                                    .sha256 = {{(uint8_t)row.id.epoch, (uint8_t)row.id.seq}},
                                    .n_chunks = 1,
                                    .chunk_hashes = chunk},
                           .base_version = 1,
                           .rank = 1,
                           .alpha = 1,
                           .samples = 10};
    sh_buf encoded;
    sh_txn *txn = NULL;
    sh_update_part_put(bytes, &p);
    if (part > 0)
        meta.parts = (sh_bytes){bytes, sizeof bytes};
    sh_buf_init(&encoded, 4096);
    OK(sh_update_meta_encode(&meta, &encoded, err));
    OK(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
    OK(coord_update_put(txn, &row, (sh_bytes){encoded.data, encoded.len}, err));
    OK(sh_txn_commit(&txn, err));
    sh_buf_release(&encoded);
}

/* Nothing but that the node below, whose store is not shown, made what it made. */
static uint64_t lost_over(const relay *r, const char *what)
{
    sh_audit *audit = NULL;
    sh_audit_result result;
    json_t *findings;
    size_t others = 0;
    OK(sh_audit_create(&audit, err));
    OK(sh_audit_add_aggregator(audit, r->root, err));
    OK(sh_audit_add_relay(audit, r->store, "relay", err));
    sh_audit_finish(audit, &result, &findings);
    for (size_t i = 0; i < json_array_size(findings); i++) {
        const char *text = json_string_value(json_array_get(findings, i));
        bool below = strncmp(text, "unknown node of epoch 000000000000004d: update ", 47) == 0;
        if ((!below || strstr(text, "no node made it") == NULL) &&
            (what == NULL || strstr(text, what) == NULL))
            fail_msg("%s", text);
        others += strstr(text, "no node made it") == NULL;
    }
    assert_int_equal(others, result.lost);
    assert_int_equal(result.twice, 0);
    json_decref(findings);
    sh_audit_destroy(&audit);
    return result.lost;
}

static void open_store(sh_store **out)
{
    OK(sh_store_open_memory(&(sh_store_options){.tables = sh_coord_tables,
                                                .n_tables = SH_COORD_TABLES,
                                                .bytes_max = 64u << 20},
                            out, err));
}

/* Updates 1 and 2 went up under an epoch that the relay left, 3 under the next one. */
static void test_a_relay_that_left_an_epoch(void **state)
{
    (void)state;
    relay *r = sh_calloc(1, sizeof *r);
    assert_non_null(r);
    open_store(&r->root);
    open_store(&r->store);
    sh_msg welcome = {.type = SH_MSG_WELCOME, .welcome = {.accepted = true, .text = "welcome"}};
    relay_step(r, true, NULL, 2);
    uint64_t old = welcome.welcome.epoch = r->link.epoch;
    relay_step(r, false, &welcome, 0);
    for (uint64_t seq = 1; seq <= 3; seq++)
        put_row(r->store,
                (sh_update_row){.id = {{{1}}, RELAYED_EPOCH, seq},
                                .verdict = SH_VERDICT_RELAYED,
                                .version = seq},
                0);
    put_row(r->root, (sh_update_row){.id = {{{2}}, old, 1}}, 1);
    relay_acked(r, old, 1);
    relay_step(r, true, NULL, 1);
    welcome.welcome.renew = true; /* since this start */
    relay_step(r, false, &welcome, 0);
    uint64_t new = welcome.welcome.epoch = r->link.epoch;
    assert_true(new != old);
    welcome.welcome.renew = false;
    relay_step(r, false, &welcome, 0);
    assert_int_equal(r->link.segments.n, 2);
    assert_int_equal(lost_over(r, NULL), 0); /* 1 is there; 2 and 3 are owed */

    put_row(r->root, (sh_update_row){.id = {{{2}}, old, 2}}, 2);
    relay_acked(r, old, 2);
    relay_acked(r, new, 1);
    assert_int_equal(lost_over(r, "update"), 2); /* the third of the node, and of the relay */
    put_row(r->root, (sh_update_row){.id = {{{2}}, new, 1}}, 3);
    assert_int_equal(lost_over(r, NULL), 0);

    relay_step(r, true, NULL, 0); /* the old epoch is forgotten */
    assert_int_equal(r->link.segments.n, 1);
    assert_int_equal(lost_over(r, NULL), 0);
    sh_store_close(&r->root);
    open_store(&r->root);
    put_row(r->root, (sh_update_row){.id = {{{2}}, old, 1}}, 1);
    put_row(r->root, (sh_update_row){.id = {{{2}}, new, 1}}, 3);
    assert_int_equal(lost_over(r, "update 2 went up in update 2 of relay, which is nowhere"), 1);
    sh_store_close(&r->root);
    sh_store_close(&r->store);
    free(r);
}

int main(int argc, char **argv)
{
#define CASE(test) cmocka_unit_test_setup_teardown(test, make_run, remove_run)
    const struct CMUnitTest tests[] = {
        CASE(test_clean),
        CASE(test_out),
        CASE(test_loss_and_duplicate),
        CASE(test_listed_twice_in_one_release),
        CASE(test_same_bytes_again),
        CASE(test_merged_but_not_listed),
        CASE(test_listed_but_not_there),
        CASE(test_refused_but_listed),
        CASE(test_changed_bytes),
        CASE(test_ledger_gaps),
        CASE(test_owed_and_gone),
        CASE(test_refusals),
        cmocka_unit_test(test_a_relay_that_left_an_epoch),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s PROGRAM\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
