/*
 * The coordinator core under nodes that say anything, at any moment: three keys that are enrolled,
 * one that is not, and a script (tests/fuzz/ops.h) of messages in raw bytes, as bodies in right
 * envelopes and as right messages of all kinds, of time, connections that end, the operator's
 * commands, results of jobs and restarts. Whatever comes, no step fails, what goes out is a
 * message, a stranger is told nothing but that it is one, the buffers stay within their limits, and
 * the store makes the same coordinator again.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "tests/fuzz/ops.h"
#include "tests/wire/sample.h"

#define KEYS        4u  /* the last one is a stranger's */
#define NEXT        32u /* bit of a key's number: the one that it may rotate to */
#define BLOB_BYTES  (SH_CHUNK_BYTES + 100u)
#define MODEL_BYTES 1000u
#define HOURS_MS    (48ull * 3600 * 1000)
#define NOW_MAX     (1ull << 52)

enum {
    OP_RAW, /* key a */
    OP_BODY,
    OP_ENROL,   /* key a, lease and epoch by b */
    OP_CHECKIN, /* key a, version and drift by b */
    OP_WINDOW,  /* key a, sequence b, payload */
    OP_ALARM,
    OP_TOMBSTONE,
    OP_UPDATE, /* key a, sequence b, what is wrong with it by its first byte */
    OP_CHUNK,  /* key a, chunk b */
    OP_WANT,
    OP_EVALUATION,
    OP_TIME,
    OP_GONE,
    OP_COMMAND, /* a: key, b: command, number */
    OP_JOB,     /* a: how it ended */
    OP_RESTART,
    OP_ROTATE, /* key a to the next of key b */
    OP_ERROR,
    OPS
};

typedef struct {
    sh_store *store;
    sh_coord *coord;
    sh_coord_options options;
    sh_coord_actions actions;
    uint64_t now, timer, life;
    sh_coord_job job;
    uint8_t model[MODEL_BYTES], *blob, *hashes;
    sh_blob described;
    uint64_t candidate;
} bench;

static const uint8_t rotation_token[32] = {7};

static sh_hash key_of(unsigned a)
{
    sh_hash key = {{0}};
    key.b[0] = (uint8_t)(1 + a % KEYS);
    key.b[1] = (a & NEXT) != 0;
    key.b[31] = 0x77;
    return key;
}

/* ---- the shell ---- */

static void on_sent(const bench *b, const sh_coord_action *a)
{
    sh_msg msg;
    sh_hash stranger = key_of(KEYS - 1);
    (void)b;
    SH_ASSERT(a->message.len <= SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_decode(a->message.data, a->message.len, &msg, NULL) == SH_OK);
    if (sh_hash_equal(&a->node, &stranger))
        SH_ASSERT(msg.type == SH_MSG_ERROR ||
                  (msg.type == SH_MSG_WELCOME && !msg.welcome.accepted));
    SH_ASSERT(msg.type != SH_MSG_ENROL && msg.type != SH_MSG_CHECKIN && msg.type != SH_MSG_ITEM);
}

static void drop_job(bench *b)
{
    free(b->job.inputs);
    b->job = (sh_coord_job){0};
}

static void carry_out(bench *b)
{
    SH_ASSERT(b->actions.n <= SH_COORD_ACTIONS_MAX);
    for (size_t i = 0; i < b->actions.n; i++) {
        sh_coord_action *a = &b->actions.items[i];
        if (a->kind == SH_COORD_SEND)
            on_sent(b, a);
        if (a->kind == SH_COORD_SET_TIMER)
            b->timer = a->at_ms;
        if (a->kind == SH_COORD_START_JOB) {
            drop_job(b);
            b->job = a->job;
            a->job.inputs = NULL;
        }
    }
    sh_coord_actions_clear(&b->actions);
    sh_coord_status status = sh_coord_get_status(b->coord);
    SH_ASSERT(status.buffered <= SH_COORD_BUFFER_MAX);
    SH_ASSERT(status.enrolled <= KEYS);
}

static void start(bench *b)
{
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_error err = {0};
    sh_genesis genesis = {.model = {b->model, sizeof b->model}, .format = "Q8_0"};
    sh_coord_destroy(&b->coord);
    drop_job(b);
    b->timer = UINT64_MAX;
    sh_rng_init(&rng, 1, b->life++, 3);
    SH_ASSERT(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err) == SH_OK);
    SH_ASSERT(sh_coord_create(&b->options, &genesis, b->now, &rng, txn, &b->actions, &b->coord,
                              &err) == SH_OK);
    SH_ASSERT(sh_txn_commit(&txn, &err) == SH_OK);
    carry_out(b);
}

static void step(bench *b, sh_coord_event *event)
{
    sh_txn *txn = NULL;
    sh_error err = {0};
    event->now_ms = b->now;
    SH_ASSERT(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err) == SH_OK);
    sh_status status = sh_coord_step(b->coord, event, txn, &b->actions, &err);
    SH_ASSERT(status == SH_OK);
    SH_ASSERT(sh_txn_commit(&txn, &err) == SH_OK);
    carry_out(b);
}

static void deliver(bench *b, unsigned key, const void *bytes, size_t n)
{
    step(b,
         &(sh_coord_event){.kind = SH_COORD_MESSAGE, .node = key_of(key), .message = {bytes, n}});
}

static void deliver_msg(bench *b, unsigned key, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_encode(msg, &bytes, NULL) == SH_OK);
    deliver(b, key, bytes.data, bytes.len);
    sh_buf_release(&bytes);
}

static void command(bench *b, unsigned key, sh_coord_command what, uint64_t number)
{
    step(b, &(sh_coord_event){.kind = SH_COORD_COMMAND,
                              .command = what,
                              .node = key_of(key),
                              .number = number,
                              .real = (double)(number % 8),
                              .name = "fuzz"});
}

/* ---- the script ---- */

static void enrol(bench *b, const fuzz_step *s)
{
    uint8_t leases[2 * sizeof(sh_hash)] = {[0] = s->b & 15, [32] = s->b >> 4};
    sh_bytes token = {s->bytes, SH_MIN(s->n, SH_WIRE_TOKEN_MAX)};
    if (s->a & NEXT)
        token = (sh_bytes){rotation_token, sizeof rotation_token};
    uint8_t starts[2 * SH_WIRE_START_BYTES];
    uint64_t next_seq[SH_CLASSES] = {1 + (s->b & 3), 1, 1 + (s->b >> 6), 1};
    sh_start_put(starts, next_seq);
    sh_start_put(starts + SH_WIRE_START_BYTES, (uint64_t[]){1, 1, 1, 1});
    sh_msg msg = {.version = 3 - (s->a >> 6) % 3,
                  .type = SH_MSG_ENROL,
                  .enrol = {.epoch = fuzz_number(s, 1),
                            .agent = "fuzz",
                            .kernel = "none",
                            .cores = 1,
                            .token = token,
                            .leases = {s->b % 3u, leases},
                            .starts = {starts, s->b % 3u * SH_WIRE_START_BYTES}}};
    deliver_msg(b, s->a, &msg);
}

static void checkin(bench *b, const fuzz_step *s)
{
    deliver_msg(b, s->a,
                &(sh_msg){.version = 3 - (s->a >> 6) % 3,
                          .type = SH_MSG_CHECKIN,
                          .checkin = {.epoch = fuzz_number(s, 1),
                                      .active_version = s->b & 3,
                                      .confirmed_version = s->b >> 2 & 3,
                                      .drifting = s->b & 16,
                                      .examples = 100}});
}

static void item(bench *b, const fuzz_step *s, uint8_t cls, uint8_t kind, sh_bytes payload)
{
    uint64_t seq = 1 + s->b % 128u, last = seq;
    if (kind == SH_ITEM_TOMBSTONE)
        last += fuzz_number(s, 0) >> 2; /* up to 2^62 and beyond */
    deliver_msg(b, s->a,
                &(sh_msg){.type = SH_MSG_ITEM,
                          .item = {.epoch = 1 + (s->b >> 7),
                                   .cls = cls,
                                   .seq = seq,
                                   .kind = kind,
                                   .last_seq = last,
                                   .payload = payload}});
}

static void alarm(bench *b, const fuzz_step *s)
{
    sh_buf payload;
    sh_alarm a = {.window = s->b, .release_version = 1, .inferences = 10, .log_evalue = 1};
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    SH_ASSERT(sh_alarm_encode(&a, &payload, NULL) == SH_OK);
    item(b, s, SH_CLASS_ALARM, SH_ITEM_ALARM, (sh_bytes){payload.data, payload.len});
    sh_buf_release(&payload);
}

static void update(bench *b, const fuzz_step *s)
{
    sh_buf payload;
    uint8_t how = s->n > 0 ? s->bytes[0] : 0;
    uint8_t parts[SH_UPDATE_PART_BYTES];
    sh_update_meta meta = {.blob = b->described,
                           .round = 1,
                           .base_version = 1 + (how >> 5 & 1),
                           .base_sha256 = sh_sha256(b->model, sizeof b->model),
                           .rank = 8,
                           .alpha = 16,
                           .samples = how & 1 ? UINT64_MAX : 100,
                           .tokens_seen = 100,
                           .heldout_before = 3,
                           .heldout_after = 2};
    sh_update_part_put(parts, &(sh_update_part){key_of(how), 1, 1 + (how >> 6), meta.samples});
    meta.base_sha256.b[0] ^= how >> 1 & 1;
    if (how & 4)
        meta.parts = (sh_bytes){parts, sizeof parts};
    if (how & 8)
        meta.blob = (sh_blob){.bytes = 0};
    if (how & 16)
        meta.blob = (sh_blob){b->described.sha256, SH_CHUNK_BYTES, 1, b->hashes};
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    SH_ASSERT(sh_update_meta_encode(&meta, &payload, NULL) == SH_OK);
    item(b, s, SH_CLASS_UPDATE, SH_ITEM_UPDATE, (sh_bytes){payload.data, payload.len});
    sh_buf_release(&payload);
}

static void chunk(bench *b, const fuzz_step *s)
{
    uint32_t k = s->b % b->described.n_chunks;
    size_t at = (size_t)k * SH_CHUNK_BYTES;
    sh_msg msg = {.type = SH_MSG_CHUNK};
    memcpy(&msg.chunk.hash, b->hashes + k * sizeof(sh_hash), sizeof(sh_hash));
    msg.chunk.bytes =
        (sh_bytes){b->blob + at, SH_MIN(BLOB_BYTES - at, (size_t)SH_CHUNK_BYTES) - (s->b >> 7)};
    deliver_msg(b, s->a, &msg);
}

static void want(bench *b, const fuzz_step *s)
{
    uint8_t hashes[2 * sizeof(sh_hash)] = {0};
    sh_hash model = sh_blake2b(b->model, sizeof b->model);
    memcpy(hashes, s->b & 1 ? model.b : b->hashes, sizeof model);
    memcpy(hashes + 32, s->bytes, SH_MIN((size_t)s->n, sizeof model));
    deliver_msg(b, s->a, &(sh_msg){.type = SH_MSG_WANT, .want = {1 + (s->b >> 7), hashes}});
}

static void evaluation(bench *b, const fuzz_step *s)
{
    sh_buf payload;
    sh_evaluation e = {.candidate = 1 + s->n % 4u,
                       .parent_version = 1,
                       .n = s->b & 1,
                       .slices = {{SH_SLICE_ACCEPTED, 100, 300, fuzz_number(s, 290) % 1000}}};
    uint8_t bytes[MODEL_BYTES];
    memset(bytes, (int)b->candidate, sizeof bytes);
    e.candidate_sha256 = sh_sha256(bytes, sizeof bytes);
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    SH_ASSERT(sh_evaluation_encode(&e, &payload, NULL) == SH_OK);
    item(b, s, SH_CLASS_ALARM, SH_ITEM_EVALUATION, (sh_bytes){payload.data, payload.len});
    sh_buf_release(&payload);
}

static void end_job(bench *b, const fuzz_step *s)
{
    uint8_t bytes[MODEL_BYTES];
    sh_coord_job job = b->job;
    sh_coord_event event = {.kind = SH_COORD_JOB_DONE};
    sh_coord_job_result *r = &event.result;
    if (job.id == 0)
        return;
    b->job = (sh_coord_job){0};
    b->candidate = job.candidate;
    memset(bytes, (int)job.candidate, sizeof bytes);
    *r = (sh_coord_job_result){.id = job.id,
                               .status = s->a & 1 ? SH_ERR_IO : SH_OK,
                               .text = "",
                               .inputs = job.inputs,
                               .n_inputs = job.n_inputs};
    for (uint32_t i = 0; i < job.n_inputs; i++)
        job.inputs[i].reason = s->b >> (i % 8) & 1 ? SH_REASON_NORM : SH_REASON_NONE;
    if (job.kind == SH_COORD_MERGE) {
        r->new_master = sh_sha256(&job.candidate, sizeof job.candidate);
        r->candidate = (sh_blob){.sha256 = sh_sha256(bytes, sizeof bytes), .bytes = sizeof bytes};
        r->candidate_bytes = (sh_bytes){bytes, sizeof bytes};
        r->format = "Q8_0";
    } else {
        r->suite = sh_sha256("suite", 5);
        r->loss_parent = 3;
        r->loss_candidate = r->loss_adapter_form = s->a & 2 ? 9 : 2;
        r->n_slices = 1;
        r->slice_parent[0] = 3;
        r->slice_candidate[0] = r->loss_candidate;
    }
    step(b, &event);
    free(job.inputs);
}

static void run_command(bench *b, const fuzz_step *s)
{
    static const sh_coord_command commands[] = {
        SH_COMMAND_PAUSE,  SH_COMMAND_RESUME, SH_COMMAND_ROLLBACK, SH_COMMAND_SERVER_SCALE,
        SH_COMMAND_REVOKE, SH_COMMAND_ENROL,  SH_COMMAND_CLOSE};
    /* The stranger stays one. */
    command(b, s->a % (KEYS - 1), commands[s->b % SH_COUNT(commands)], fuzz_number(s, 1));
}

static void rotate(bench *b, const fuzz_step *s)
{
    sh_bytes token = {rotation_token, s->b & 64 ? 3 : sizeof rotation_token};
    deliver_msg(
        b, s->a,
        &(sh_msg){.type = SH_MSG_ROTATE, .rotate = {.key = key_of(s->b | NEXT), .token = token}});
}

static void pass_time(bench *b, const fuzz_step *s)
{
    b->now = SH_MIN(b->now + fuzz_number(s, 1000) % HOURS_MS, NOW_MAX);
    if (s->a & 1 && b->timer != UINT64_MAX)
        b->now = SH_MAX(b->now, SH_MIN(b->timer, NOW_MAX));
    step(b, &(sh_coord_event){.kind = SH_COORD_TIMER});
}

static void run_message(bench *b, const fuzz_step *s)
{
    sh_buf bytes;
    switch (s->op % OPS) {
    case OP_RAW:
        deliver(b, s->a, s->bytes, s->n);
        break;
    case OP_BODY:
        sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
        sample_wrap((s->b >> 4) % 5u, s->b % 16u, s->bytes, s->n, &bytes);
        deliver(b, s->a, bytes.data, bytes.len);
        sh_buf_release(&bytes);
        break;
    case OP_ENROL:
        enrol(b, s);
        break;
    case OP_CHECKIN:
        checkin(b, s);
        break;
    case OP_WINDOW:
        item(b, s, SH_CLASS_WINDOW, SH_ITEM_WINDOW, (sh_bytes){s->bytes, s->n});
        break;
    case OP_ALARM:
        alarm(b, s);
        break;
    case OP_TOMBSTONE:
        item(b, s, s->a >> 4 & 3, SH_ITEM_TOMBSTONE, (sh_bytes){0});
        break;
    case OP_UPDATE:
        update(b, s);
        break;
    case OP_CHUNK:
        chunk(b, s);
        break;
    case OP_WANT:
        want(b, s);
        break;
    case OP_EVALUATION:
        evaluation(b, s);
        break;
    case OP_ROTATE:
        rotate(b, s);
        break;
    case OP_ERROR:
        deliver_msg(b, s->a,
                    &(sh_msg){.type = SH_MSG_ERROR, .error = {.code = "auth", .text = ""}});
        break;
    default:
        break;
    }
}

static void run_step(bench *b, const fuzz_step *s)
{
    switch (s->op % OPS) {
    case OP_TIME:
        pass_time(b, s);
        break;
    case OP_GONE:
        step(b, &(sh_coord_event){.kind = SH_COORD_GONE, .node = key_of(s->a)});
        break;
    case OP_COMMAND:
        run_command(b, s);
        break;
    case OP_JOB:
        end_job(b, s);
        break;
    case OP_RESTART:
        start(b);
        break;
    default:
        run_message(b, s);
        break;
    }
}

static void set_up(bench *b)
{
    static const uint8_t seed[32] = {5};
    sh_error err = {0};
    *b = (bench){.now = 1000};
    b->options = (sh_coord_options){
        .buffer = 2,
        .staleness_max = 1,
        .staleness_discount = 0.5f,
        .server_scale = 1,
        .norm_factor_max = 4,
        .gate_slice_max = 0.05,
        .train =
            {.rank = 8, .alpha = 16, .lr = 0.01f, .batch = 4, .context = 64, .passes_milli = 1000},
        .checkin_ms = 1000,
        .chunk_budget = 2,
        .canary_nodes_min = 1,
        .canary_tokens_min = 10,
        .canary_share = 1,
        .canary_ms_max = 10000,
    };
    sh_sign_keypair(seed, &b->options.release_pk, &b->options.release_sk);
    b->blob = sh_calloc(BLOB_BYTES, 1);
    SH_ASSERT(b->blob != NULL);
    SH_ASSERT(sh_blob_describe(b->blob, BLOB_BYTES, &b->described, &b->hashes, &err) == SH_OK);
    sh_store_options so = {.tables = sh_coord_tables, .n_tables = SH_COORD_TABLES};
    SH_ASSERT(sh_store_open_memory(&so, &b->store, &err) == SH_OK);
    start(b);
    for (unsigned k = 0; k < KEYS - 1; k++)
        command(b, k, SH_COMMAND_ENROL, 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bench b; /* large */
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    set_up(&b);
    fuzz_script script = {.data = data, .left = size};
    for (fuzz_step s; fuzz_next(&script, &s);)
        run_step(&b, &s);
    sh_coord_status before = sh_coord_get_status(b.coord);
    start(&b);
    sh_coord_status after = sh_coord_get_status(b.coord);
    SH_ASSERT(after.version == before.version && after.updates_in == before.updates_in &&
              after.enrolled == before.enrolled);
    sh_coord_actions_clear(&b.actions);
    sh_coord_destroy(&b.coord);
    drop_job(&b);
    sh_store_close(&b.store);
    free(b.blob);
    free(b.hashes);
    return 0;
}
