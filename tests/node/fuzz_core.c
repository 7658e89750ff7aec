/*
 * The node core under an aggregator that says anything, at any moment: after a real enrolment the
 * input is a script (tests/fuzz/ops.h) of messages, in raw bytes, as bodies in right envelopes, and
 * as right messages of all kinds that answer what the node has sent, of time, links, inferences,
 * results of jobs and restarts. Whatever comes, no step fails, what it sends is a message, the
 * queues stay within their limits, and the store makes the same node again.
 */
#include <stdlib.h>
#include <string.h>

#include "edge-node/node.h"
#include "tests/fuzz/ops.h"
#include "tests/wire/sample.h"

#define QUOTA_BYTES (64u << 10)
#define MODEL_BYTES (SH_CHUNK_BYTES + 1000u)
#define JOBS_MAX    8u
#define DAYS_MS     (8ull * 24 * 3600 * 1000)
#define NOW_MAX     (1ull << 52)

enum {
    OP_RAW,
    OP_BODY, /* type a, version b */
    OP_WELCOME,
    OP_PLAN, /* a: what it has, b: round */
    OP_ACK,  /* class a, high-water mark b, bitmap */
    OP_WANT, /* a: chunks of the update that the node owes, or any */
    OP_CHUNK,
    OP_ERROR,
    OP_TIME,
    OP_LINK,
    OP_INFERENCES,
    OP_FEEDBACK,
    OP_JOB,
    OP_RESTART,
    OP_ROTATE,
    OP_ERASE,
    OPS
};

typedef struct {
    sh_store *store;
    sh_node *node;
    sh_node_options options;
    sh_node_actions actions;
    sh_sign_secret_key sk;
    sh_buf genesis, next; /* signed manifests */
    uint8_t *model, *model_hashes, *genesis_hashes;
    sh_blob described;
    uint64_t now, timer, life;
    uint64_t jobs[JOBS_MAX];
    sh_node_job_kind kinds[JOBS_MAX];
    size_t n_jobs;
    sh_hash asked[SH_WIRE_WANT_MAX]; /* by the node */
    uint32_t n_asked;
    uint64_t epoch; /* that the node named last */
    uint64_t lease; /* name of its start's */
    sh_hash owed;   /* first chunk of the last update that it sent */
    bool enrolled;
} bench;

/* ---- releases ---- */

static void make_manifest(bench *b, uint64_t version, const sh_blob *model, sh_buf *out)
{
    sh_manifest manifest = {
        .version = version, .parent = version - 1, .model = *model, .format = "Q8_0"};
    sh_buf_init(out, SH_WIRE_MANIFEST_MAX);
    SH_ASSERT(sh_manifest_sign(&manifest, &b->sk, out, NULL) == SH_OK);
}

static void make_releases(bench *b)
{
    static const uint8_t seed[32] = {7};
    sh_blob first;
    sh_sign_keypair(seed, &b->options.release_key, &b->sk);
    b->model = sh_calloc(MODEL_BYTES, 1);
    SH_ASSERT(b->model != NULL);
    SH_ASSERT(sh_blob_describe("genesis", 7, &first, &b->genesis_hashes, NULL) == SH_OK);
    SH_ASSERT(sh_blob_describe(b->model, MODEL_BYTES, &b->described, &b->model_hashes, NULL) ==
              SH_OK);
    make_manifest(b, 1, &first, &b->genesis);
    make_manifest(b, 2, &b->described, &b->next);
}

/* ---- the shell ---- */

static void on_sent(bench *b, const sh_buf *bytes)
{
    sh_msg msg;
    sh_update_meta meta;
    SH_ASSERT(bytes->len <= SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_decode(bytes->data, bytes->len, &msg, NULL) == SH_OK);
    switch (msg.type) {
    case SH_MSG_ENROL:
        b->epoch = msg.enrol.epoch;
        b->lease = msg.enrol.leases.n > 0 ? sh_lease_name(msg.enrol.leases.hashes) : 0;
        b->enrolled = true;
        break;
    case SH_MSG_WANT:
        b->n_asked = msg.want.n;
        memcpy(b->asked, msg.want.hashes, msg.want.n * sizeof(sh_hash));
        break;
    case SH_MSG_ITEM:
        b->epoch = msg.item.epoch;
        if (msg.item.kind == SH_ITEM_UPDATE &&
            sh_update_meta_decode(msg.item.payload.data, msg.item.payload.n, &meta, NULL) ==
                SH_OK &&
            meta.blob.n_chunks > 0)
            memcpy(&b->owed, meta.blob.chunk_hashes, sizeof b->owed);
        break;
    default:
        SH_ASSERT(msg.type != SH_MSG_WELCOME && msg.type != SH_MSG_PLAN && msg.type != SH_MSG_ACK);
        break;
    }
}

static void carry_out(bench *b)
{
    SH_ASSERT(b->actions.n <= SH_NODE_ACTIONS_MAX);
    for (size_t i = 0; i < b->actions.n; i++) {
        const sh_node_action *a = &b->actions.items[i];
        if (a->kind == SH_NODE_SEND)
            on_sent(b, &a->message);
        if (a->kind == SH_NODE_SET_TIMER)
            b->timer = a->at_ms;
        if (a->kind == SH_NODE_START_JOB) {
            SH_ASSERT(b->n_jobs < JOBS_MAX);
            b->kinds[b->n_jobs] = a->job.kind;
            b->jobs[b->n_jobs++] = a->job.id;
        }
    }
    sh_node_status status = sh_node_get_status(b->node);
    SH_ASSERT(status.outbox_bytes <= (uint64_t)SH_CLASSES * QUOTA_BYTES);
}

static void start(bench *b)
{
    sh_txn *txn = NULL;
    sh_rng rng;
    sh_error err = {0};
    sh_node_destroy(&b->node);
    b->n_jobs = 0;
    b->timer = UINT64_MAX;
    sh_rng_init(&rng, 1, b->life++, 2);
    SH_ASSERT(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err) == SH_OK);
    SH_ASSERT(sh_node_create(&b->options, (sh_bytes){b->genesis.data, b->genesis.len}, b->now, &rng,
                             txn, &b->actions, &b->node, &err) == SH_OK);
    SH_ASSERT(sh_txn_commit(&txn, &err) == SH_OK);
    carry_out(b);
}

static void step(bench *b, sh_node_event *event)
{
    sh_txn *txn = NULL;
    sh_error err = {0};
    event->now_ms = b->now;
    SH_ASSERT(sh_txn_begin(b->store, SH_TXN_WRITE, &txn, &err) == SH_OK);
    sh_status status = sh_node_step(b->node, event, txn, &b->actions, &err);
    SH_ASSERT(status == SH_OK);
    SH_ASSERT(sh_txn_commit(&txn, &err) == SH_OK);
    carry_out(b);
}

static void simple(bench *b, sh_node_event_kind kind)
{
    step(b, &(sh_node_event){.kind = kind});
}

static void deliver(bench *b, const void *bytes, size_t n)
{
    step(b, &(sh_node_event){.kind = SH_NODE_MESSAGE, .message = {bytes, n}});
}

static void deliver_msg(bench *b, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_encode(msg, &bytes, NULL) == SH_OK);
    deliver(b, bytes.data, bytes.len);
    sh_buf_release(&bytes);
}

/* Bits of how: 1 renew, 2 a copy that parted at low sequences, 4 at any; 8 up: common. */
static void welcome(bench *b, bool accepted, uint8_t how, uint64_t later)
{
    uint64_t next_seq[SH_CLASSES] = {1 + later % 2, 1, 1 + later % 5, 1};
    uint8_t parted[SH_WIRE_START_BYTES];
    if (how & 4)
        next_seq[SH_CLASS_WINDOW] = later;
    sh_start_put(parted, next_seq);
    deliver_msg(b, &(sh_msg){.type = SH_MSG_WELCOME,
                             .welcome = {.accepted = accepted,
                                         .text = "",
                                         .renew = how & 1,
                                         .retry_after_ms = later,
                                         .common = how >> 3,
                                         .parted = {parted, how & 6 ? sizeof parted : 0}}});
}

/* ---- the script ---- */

static void plan(bench *b, const fuzz_step *s)
{
    sh_buf time;
    sh_buf_init(&time, SH_WIRE_TIME_MAX);
    sh_msg msg = {.type = SH_MSG_PLAN, .plan.return_after_ms = fuzz_number(s, 1000)};
    if (s->a & 1)
        msg.plan.train = (sh_train_plan){.train = true,
                                         .round = s->b,
                                         .base_version = s->a & 16 ? 2 : 1,
                                         .base_sha256 = s->a & 16 ? b->described.sha256
                                                                  : sh_sha256("genesis", 7),
                                         .rank = 4,
                                         .alpha = 8,
                                         .lr = 0.01f,
                                         .batch = 1,
                                         .context = 16,
                                         .passes_milli = 1000,
                                         .steps_max = 2};
    if (s->a & 2)
        msg.plan.manifest = (sh_bytes){b->next.data, b->next.len};
    if (s->a & 4)
        msg.plan.evaluate = (sh_evaluate_plan){
            .candidate = 1 + (s->b & 3), .parent_version = 1, .model = b->described};
    if (s->a & 8) {
        SH_ASSERT(sh_time_sign(fuzz_number(s, b->now), &b->sk, &time, NULL) == SH_OK);
        msg.plan.time = (sh_bytes){time.data, time.len};
    }
    if (s->a & 32)
        msg.version = 1 + (s->b & 1);
    deliver_msg(b, &msg);
    sh_buf_release(&time);
}

static void chunk(bench *b, const fuzz_step *s)
{
    sh_msg msg = {.type = SH_MSG_CHUNK};
    uint32_t k = s->a % b->described.n_chunks;
    size_t at = (size_t)k * SH_CHUNK_BYTES;
    memcpy(&msg.chunk.hash, b->model_hashes + k * sizeof(sh_hash), sizeof(sh_hash));
    msg.chunk.bytes =
        (sh_bytes){b->model + at, SH_MIN(MODEL_BYTES - at, (size_t)SH_CHUNK_BYTES) - (s->b & 1)};
    if ((s->b & 2) && b->n_asked > 0)
        msg.chunk.hash = b->asked[s->a % b->n_asked];
    deliver_msg(b, &msg);
}

static void ask_back(bench *b, const fuzz_step *s)
{
    uint8_t hashes[4 * sizeof(sh_hash)] = {0};
    memcpy(hashes, s->bytes, SH_MIN((size_t)s->n, sizeof hashes));
    if (s->a & 1)
        memcpy(hashes, &b->owed, sizeof b->owed);
    deliver_msg(b, &(sh_msg){.type = SH_MSG_WANT, .want = {1 + s->b % 4u, hashes}});
}

static void ack(bench *b, const fuzz_step *s)
{
    deliver_msg(b, &(sh_msg){.type = SH_MSG_ACK,
                             .ack = {.epoch = b->epoch + (s->a >> 7),
                                     .lease = b->lease + (s->a >> 6 & 1),
                                     .cls = s->a % SH_CLASSES,
                                     .high_water = s->b,
                                     .bitmap = {fuzz_number(s, 0)}}});
}

static void error(bench *b, const fuzz_step *s)
{
    static const char *const codes[] = {"auth", "unsupported", "limit", "not-found", "full", ""};
    deliver_msg(b, &(sh_msg){.version = 1 + s->b % 3u,
                             .type = SH_MSG_ERROR,
                             .error = {.code = codes[s->a % SH_COUNT(codes)],
                                       .text = "",
                                       .retry_after_ms = fuzz_number(s, 0)}});
}

static void inferences(bench *b, const fuzz_step *s)
{
    for (unsigned i = 0; i <= s->a % 16u; i++)
        step(b, &(sh_node_event){.kind = SH_NODE_INFERENCE,
                                 .record = {.at_ms = b->now,
                                            .release_version = 1 + (s->b >> 7),
                                            .prompt_tokens = 5,
                                            .output_tokens = 4,
                                            .prompt_nll = (float)(s->b & 15),
                                            .mean_logprob = -1,
                                            .least_logprob = -2}});
}

static void feedback(bench *b, const fuzz_step *s)
{
    int32_t tokens[UINT8_MAX + 1] = {0};
    for (unsigned i = 0; i < s->n; i++)
        tokens[i] = s->bytes[i];
    step(b, &(sh_node_event){.kind = SH_NODE_FEEDBACK,
                             .feedback = {.session = s->a,
                                          .n = SH_MAX(s->n, 1u),
                                          .tokens = tokens,
                                          .target = true,
                                          .accepted = s->b & 1,
                                          .user = s->b}});
}

static void job(bench *b, const fuzz_step *s)
{
    if (b->n_jobs == 0)
        return;
    size_t k = s->a % b->n_jobs;
    sh_node_event event = {.kind = SH_NODE_JOB_DONE};
    sh_node_job_result *r = &event.result;
    *r = (sh_node_job_result){.id = b->jobs[k],
                              .status = s->b & 1 ? SH_ERR_IO : SH_OK,
                              .text = "",
                              .samples = 10,
                              .tokens_seen = 10,
                              .heldout_before = 4,
                              .heldout_after = s->b & 2 ? 5 : 3,
                              .nll = 2,
                              .n_slices = 1,
                              .slices = {{SH_SLICE_ACCEPTED, 10, 20, 19}}};
    if (b->kinds[k] == SH_JOB_TRAIN) /* its size: of a few chunks at most */
        r->update = (sh_bytes){b->model, 1 + fuzz_number(s, 1000) % MODEL_BYTES};
    b->n_jobs--;
    b->jobs[k] = b->jobs[b->n_jobs];
    b->kinds[k] = b->kinds[b->n_jobs];
    step(b, &event);
}

static void pass_time(bench *b, const fuzz_step *s)
{
    b->now = SH_MIN(b->now + fuzz_number(s, 100) % DAYS_MS, NOW_MAX);
    if (s->a & 1 && b->timer != UINT64_MAX)
        b->now = SH_MAX(b->now, SH_MIN(b->timer, NOW_MAX));
    if (b->timer <= b->now)
        simple(b, SH_NODE_TIMER);
}

static void body(bench *b, const fuzz_step *s)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sample_wrap(s->b % 5u, s->a % 16u, s->bytes, s->n, &bytes);
    deliver(b, bytes.data, bytes.len);
    sh_buf_release(&bytes);
}

static void rotate_answer(bench *b, const fuzz_step *s)
{
    sh_msg msg = {.type = SH_MSG_ROTATE};
    memcpy(&msg.rotate.key, s->bytes, SH_MIN((size_t)s->n, sizeof msg.rotate.key));
    deliver_msg(b, &msg);
}

static void run_step(bench *b, const fuzz_step *s)
{
    switch (s->op % OPS) {
    case OP_RAW:
        deliver(b, s->bytes, s->n);
        break;
    case OP_BODY:
        body(b, s);
        break;
    case OP_WELCOME:
        welcome(b, s->a & 1, s->b, fuzz_number(s, 0));
        break;
    case OP_PLAN:
        plan(b, s);
        break;
    case OP_ACK:
        ack(b, s);
        break;
    case OP_WANT:
        ask_back(b, s);
        break;
    case OP_CHUNK:
        chunk(b, s);
        break;
    case OP_ERROR:
        error(b, s);
        break;
    case OP_TIME:
        pass_time(b, s);
        break;
    case OP_LINK:
        simple(b, s->a & 1 ? SH_NODE_LINK_UP : SH_NODE_LINK_DOWN);
        break;
    case OP_INFERENCES:
        inferences(b, s);
        break;
    case OP_FEEDBACK:
        feedback(b, s);
        break;
    case OP_JOB:
        job(b, s);
        break;
    case OP_RESTART:
        start(b);
        simple(b, SH_NODE_LINK_UP);
        break;
    case OP_ROTATE:
        rotate_answer(b, s);
        break;
    case OP_ERASE:
        step(b, &(sh_node_event){.kind = SH_NODE_ERASE, .user = s->b});
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bench b; /* large */
    sh_error err = {0};
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    b = (bench){.now = 1000};
    b.options = (sh_node_options){
        .agent = "fuzz",
        .kernel = "none",
        .cores = 1,
        .monitor = {.window = 32, .reference = 64, .average_run_length = 10000, .samples_min = 16},
        .records_max = 64,
        .feedback_tokens_max = 500,
        .windows_max = 4,
        .outbox_quota_bytes = {QUOTA_BYTES, QUOTA_BYTES, QUOTA_BYTES, QUOTA_BYTES},
        .retry_min_ms = 50,
        .retry_max_ms = 2000,
        .confirm_inferences = 3,
        .send_only_if_better = true,
        .evaluate = true,
        .evaluate_tokens_min = 1,
    };
    make_releases(&b);
    sh_store_options so = {.tables = sh_node_tables, .n_tables = SH_NODE_TABLES};
    SH_ASSERT(sh_store_open_memory(&so, &b.store, &err) == SH_OK);
    start(&b);
    simple(&b, SH_NODE_LINK_UP);
    SH_ASSERT(b.enrolled);
    welcome(&b, true, false, 0);
    fuzz_script script = {.data = data, .left = size};
    for (fuzz_step s; fuzz_next(&script, &s);)
        run_step(&b, &s);
    start(&b); /* the store makes a node again, and that one can be told the same */
    simple(&b, SH_NODE_LINK_UP);
    welcome(&b, true, false, 0);
    sh_node_actions_clear(&b.actions);
    sh_node_destroy(&b.node);
    sh_store_close(&b.store);
    sh_buf_release(&b.genesis);
    sh_buf_release(&b.next);
    free(b.model);
    free(b.model_hashes);
    free(b.genesis_hashes);
    return 0;
}
