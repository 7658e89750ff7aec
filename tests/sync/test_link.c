/*
 * The sender's end over a fake peer: the test plays the aggregator by hand and looks at every
 * message that goes out, and when. Virtual time.
 */
#include "tests/sync/fixture.h"

#include <stdlib.h>
#include <string.h>

#include "shared/sync/link.h"

#define OUT_MAX   64u
#define RETRY_MIN 50u
#define RETRY_MAX 2000u

typedef struct {
    fixture f;
    sh_link link;
    sh_rng rng;
    uint64_t now;
    sh_buf out[OUT_MAX];
    size_t n_out, room; /* messages that fit in a step */
    unsigned plans, rejected, refused, renewed, whole, acked;
    uint64_t examples;       /* the owner's number in a check-in */
    const sh_blob *fetching; /* NULL: nothing is wanted */
} peer;

#define SAME(a, b) assert_int_equal((uint64_t)(a), (uint64_t)(b))

static bool may_send(void *arg)
{
    return ((peer *)arg)->n_out < ((peer *)arg)->room;
}

static void take(void *arg, sh_buf *message)
{
    peer *p = arg;
    assert_true(p->n_out < OUT_MAX);
    p->out[p->n_out++] = *message;
    *message = (sh_buf){0};
}

static sh_status fill_checkin(void *arg, sh_msg_checkin *checkin)
{
    checkin->examples = ((peer *)arg)->examples;
    return SH_OK;
}

static sh_status on_plan(void *arg, const sh_msg_plan *plan)
{
    (void)plan;
    ((peer *)arg)->plans++;
    return SH_OK;
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    (void)item;
    ((peer *)arg)->acked++;
    return SH_OK;
}

static sh_status missing(void *arg, uint8_t *hashes, uint32_t max, uint32_t *n)
{
    peer *p = arg;
    *n = 0;
    if (p->fetching == NULL)
        return SH_OK;
    return sh_blob_missing(p->f.txn, T_CHUNK, p->fetching, hashes, max, n, &test_err);
}

static sh_status on_chunks(void *arg)
{
    ((peer *)arg)->whole++;
    return SH_OK;
}

static void on_rejected(void *arg, const char *why)
{
    assert_string_equal(why, "who");
    ((peer *)arg)->rejected++;
}

static void on_renewed(void *arg)
{
    ((peer *)arg)->renewed++;
}

static void on_refused(void *arg)
{
    ((peer *)arg)->refused++;
}

static const sh_link_callbacks callbacks = {may_send,   take,    fill_checkin, on_plan,
                                            on_acked,   missing, on_chunks,    on_rejected,
                                            on_renewed, NULL,    on_refused};

static sh_link_step step_of(peer *p)
{
    return (sh_link_step){&p->link, p->f.txn, p->now, &p->rng, p, &test_err};
}

static void clear(peer *p)
{
    for (size_t i = 0; i < p->n_out; i++)
        sh_buf_release(&p->out[i]);
    p->n_out = 0;
}

static void open_link(peer *p)
{
    sh_link_options options = {
        .callbacks = &callbacks,
        .outbox = fixture_outbox(1u << 20),
        .chunk_table = T_CHUNK,
        .enrol = {.agent = "relay", .kernel = "none", .cores = 2},
        .retry_min_ms = RETRY_MIN,
        .retry_max_ms = RETRY_MAX,
    };
    sh_link_step s = step_of(p);
    clear(p);
    OK(sh_link_open(&s, &options));
}

static peer *peer_open(uint64_t seed)
{
    peer *p = calloc(1, sizeof(*p));
    assert_non_null(p);
    p->now = 1000;
    p->room = OUT_MAX;
    sh_rng_init(&p->rng, seed, 0, 1);
    fixture_open(&p->f);
    open_link(p);
    return p;
}

static void peer_close(peer *p)
{
    clear(p);
    fixture_close(&p->f);
    free(p);
}

static void pump(peer *p)
{
    sh_link_step s = step_of(p);
    clear(p);
    OK(sh_link_pump(&s));
    fixture_commit(&p->f);
}

static void receive(peer *p, const sh_msg *msg)
{
    sh_buf bytes;
    sh_link_step s = step_of(p);
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, &test_err));
    clear(p);
    OK(sh_link_receive(&s, (sh_bytes){bytes.data, bytes.len}));
    fixture_commit(&p->f);
    sh_buf_release(&bytes);
}

/* The i-th message that went out, decoded; it points into the sender's bytes. */
static sh_msg sent(const peer *p, size_t i)
{
    sh_msg msg;
    assert_true(i < p->n_out);
    OK(sh_msg_decode(p->out[i].data, p->out[i].len, &msg, &test_err));
    return msg;
}

static unsigned count(const peer *p, sh_msg_type type)
{
    unsigned n = 0;
    for (size_t i = 0; i < p->n_out; i++)
        n += sent(p, i).type == type;
    return n;
}

static sh_msg only(const peer *p, sh_msg_type type)
{
    size_t at = 0;
    SAME(count(p, type), 1);
    while (sent(p, at).type != type)
        at++;
    return sent(p, at);
}

static void come_up(peer *p)
{
    sh_link_step s = step_of(p);
    sh_msg welcome = {.type = SH_MSG_WELCOME, .welcome = {.accepted = true, .text = ""}};
    sh_msg plan = {.type = SH_MSG_PLAN, .plan = {.return_after_ms = 600000}};
    sh_link_up(&s);
    pump(p);
    SAME(count(p, SH_MSG_ENROL), 1);
    receive(p, &welcome);
    pump(p);
    receive(p, &plan);
    SAME(p->link.state, SH_LINK_WELCOME);
}

static void put_windows(peer *p, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        sh_link_step s = step_of(p);
        OK(sh_link_put(&s, SH_CLASS_WINDOW, SH_ITEM_WINDOW, (sh_bytes){"window", 6}, NULL));
    }
    fixture_commit(&p->f);
}

static void ack(peer *p, uint64_t high_water, uint64_t bits)
{
    sh_msg msg = {.type = SH_MSG_ACK,
                  .ack = {.epoch = p->link.epoch,
                          .lease = p->link.lease,
                          .cls = SH_CLASS_WINDOW,
                          .high_water = high_water,
                          .bitmap = {bits}}};
    receive(p, &msg);
}

static void an_epoch_lasts(void **state)
{
    (void)state;
    peer *p = peer_open(1);
    uint64_t epoch = p->link.epoch, stored = 0;
    assert_true(epoch != 0);
    fixture_commit(&p->f);
    OK(sh_link_stored_epoch(p->f.txn, T_META, &stored, &test_err));
    SAME(stored, epoch);
    open_link(p);
    SAME(p->link.epoch, epoch);
    SAME(sh_link_due(&p->link), SH_LINK_NEVER);
    peer_close(p);
}

static void enrols_and_checks_in(void **state)
{
    (void)state;
    peer *p = peer_open(2);
    p->examples = 77;
    sh_link_step s = step_of(p);
    pump(p);
    SAME(p->n_out, 0); /* the link is down */
    sh_link_up(&s);
    pump(p);
    sh_msg enrol = only(p, SH_MSG_ENROL);
    SAME(enrol.enrol.epoch, p->link.epoch);
    assert_string_equal(enrol.text[0], "relay"); /* enrol.agent is the text of a message gone */
    sh_msg welcome = {.type = SH_MSG_WELCOME, .welcome = {.accepted = true, .text = ""}};
    receive(p, &welcome);
    p->now += 3 * RETRY_MAX; /* whether or not it waited for the welcome with its check-in */
    pump(p);
    SAME(count(p, SH_MSG_ENROL), 0);
    sh_msg checkin = only(p, SH_MSG_CHECKIN);
    SAME(checkin.checkin.examples, 77);
    sh_msg plan = {.type = SH_MSG_PLAN, .plan = {.return_after_ms = 5000}};
    receive(p, &plan);
    SAME(p->plans, 1);
    SAME(sh_link_due(&p->link), p->now + 5000);
    p->now += 4999;
    pump(p);
    SAME(p->n_out, 0);
    p->now++;
    pump(p);
    (void)only(p, SH_MSG_CHECKIN);
    peer_close(p);
}

/* A silent peer: intervals grow to the limit, jittered, and never below the least. */
static void retries_back_off(void **state)
{
    (void)state;
    peer *p = peer_open(3);
    sh_link_step s = step_of(p);
    sh_link_up(&s);
    uint64_t last = 0, longest = 0, start = p->now;
    unsigned tries = 0, below_half = 0;
    while (p->now < start + 200000) {
        pump(p);
        if (count(p, SH_MSG_ENROL) == 1) {
            uint64_t wait = p->now - last;
            if (tries > 0)
                assert_true(wait >= RETRY_MIN && wait <= RETRY_MIN + RETRY_MAX);
            if (tries > 8)
                below_half += wait < RETRY_MAX / 2;
            longest = SH_MAX(longest, wait * (tries > 0));
            last = p->now;
            tries++;
        }
        uint64_t due = sh_link_due(&p->link);
        assert_true(due > p->now && due != SH_LINK_NEVER);
        p->now = due;
    }
    assert_in_range(tries, 200000 / (RETRY_MAX + RETRY_MIN), 400);
    assert_true(longest > RETRY_MAX / 2);
    assert_true(below_half > tries / 4); /* full jitter, not half */
    peer_close(p);
}

static void a_rejected_sender_only_enrols(void **state)
{
    (void)state;
    peer *p = peer_open(4);
    come_up(p);
    put_windows(p, 1);
    sh_msg no = {.type = SH_MSG_WELCOME, .welcome = {.accepted = false, .text = "who"}};
    receive(p, &no);
    SAME(p->rejected, 1);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(p->n_out, 1);
    (void)only(p, SH_MSG_ENROL);
    peer_close(p);
}

static void items_stay_until_acknowledged(void **state)
{
    (void)state;
    peer *p = peer_open(5);
    come_up(p);
    put_windows(p, SH_LINK_CLASS_FLIGHT_MAX + 4);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), SH_LINK_CLASS_FLIGHT_MAX); /* and no more */
    pump(p);
    SAME(p->n_out, 0);
    ack(p, 2, 1u << 1); /* 1, 2 and 4 */
    SAME(p->acked, 3);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 3);
    SAME(sent(p, 0).item.seq, SH_LINK_CLASS_FLIGHT_MAX + 1);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(count(p, SH_MSG_ITEM), SH_LINK_CLASS_FLIGHT_MAX); /* again */
    ack(p, SH_LINK_CLASS_FLIGHT_MAX + 4, 0);
    SAME(p->acked, SH_LINK_CLASS_FLIGHT_MAX + 4);
    SAME(p->link.counts.items[SH_CLASS_WINDOW], 0);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 0);
    peer_close(p);
}

static void put_alarm(peer *p)
{
    sh_link_step s = step_of(p);
    OK(sh_link_put(&s, SH_CLASS_ALARM, SH_ITEM_ALARM, (sh_bytes){"alarm", 5}, NULL));
    fixture_commit(&p->f);
}

/* Windows that nobody acknowledges do not keep an alarm waiting. */
static void no_class_takes_every_place(void **state)
{
    (void)state;
    peer *p = peer_open(30);
    come_up(p);
    put_windows(p, 2 * SH_LINK_IN_FLIGHT_MAX);
    pump(p);
    put_alarm(p);
    SAME(sh_link_due(&p->link), 0);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 1);
    SAME(sent(p, 0).item.cls, SH_CLASS_ALARM);
    assert_true(sh_link_due(&p->link) > p->now);
    peer_close(p);
}

/* Nor do those that a policy or a budget holds back after they were sent; they go out again when
 * it does not any more. */
static void a_closed_class_gives_its_places_up(void **state)
{
    (void)state;
    peer *p = peer_open(31);
    come_up(p);
    put_windows(p, SH_LINK_CLASS_FLIGHT_MAX);
    pump(p);
    p->link.closed.items[SH_CLASS_WINDOW] = true;
    for (unsigned i = 0; i < SH_LINK_CLASS_FLIGHT_MAX; i++)
        put_alarm(p);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), SH_LINK_CLASS_FLIGHT_MAX);
    p->link.closed.items[SH_CLASS_WINDOW] = false;
    p->now += 3 * RETRY_MAX;
    pump(p);
    sh_msg alarms = {.type = SH_MSG_ACK,
                     .ack = {.epoch = p->link.epoch,
                             .lease = p->link.lease,
                             .cls = SH_CLASS_ALARM,
                             .high_water = SH_LINK_CLASS_FLIGHT_MAX}};
    receive(p, &alarms);
    SAME(p->acked, SH_LINK_CLASS_FLIGHT_MAX);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(count(p, SH_MSG_ITEM), SH_LINK_CLASS_FLIGHT_MAX);
    ack(p, SH_LINK_CLASS_FLIGHT_MAX, 0);
    SAME(p->acked, 2 * SH_LINK_CLASS_FLIGHT_MAX);
    pump(p);
    SAME(p->link.counts.items[SH_CLASS_WINDOW], 0);
    peer_close(p);
}

static void a_lost_link_sends_all_again(void **state)
{
    (void)state;
    peer *p = peer_open(6);
    come_up(p);
    put_windows(p, 3);
    pump(p);
    sh_link_step s = step_of(p);
    sh_link_down(&s);
    SAME(sh_link_due(&p->link), SH_LINK_NEVER);
    come_up(p);
    pump(p);
    p->now += 1;
    unsigned in_flight = 0;
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++)
        in_flight += p->link.in_flight[i].used;
    SAME(in_flight, 3);
    peer_close(p);
}

static void a_full_list_waits(void **state)
{
    (void)state;
    peer *p = peer_open(7);
    come_up(p);
    put_windows(p, 5);
    p->room = 2;
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 2);
    SAME(sh_link_due(&p->link), 0); /* at once again */
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 2);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 1);
    peer_close(p);
}

/* An aggregator that was restored asks for what is here no more: a tombstone. */
static void buries_what_was_forgotten(void **state)
{
    (void)state;
    peer *p = peer_open(8);
    come_up(p);
    put_windows(p, 6);
    pump(p);
    ack(p, 4, 0);
    ack(p, 1, 0);
    sh_msg tombstone = only(p, SH_MSG_ITEM);
    SAME(tombstone.item.kind, SH_ITEM_TOMBSTONE);
    SAME(tombstone.item.seq, 2);
    SAME(tombstone.item.last_seq, 4);
    ack(p, 1, 0);
    SAME(p->n_out, 0); /* not for every acknowledgement */
    ack(p, 4, 0);
    SAME(p->n_out, 0);
    peer_close(p);
}

static void serves_chunks_a_few_at_a_time(void **state)
{
    (void)state;
    static uint8_t bytes[20 * SH_CHUNK_BYTES];
    peer *p = peer_open(9);
    sh_blob blob;
    uint8_t *hashes = NULL;
    come_up(p);
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i / SH_CHUNK_BYTES);
    OK(sh_blob_describe(bytes, sizeof(bytes), &blob, &hashes, &test_err));
    OK(sh_blob_put(p->f.txn, T_CHUNK, bytes, sizeof(bytes), &test_err));
    sh_msg want = {.type = SH_MSG_WANT, .want = {blob.n_chunks, hashes}};
    receive(p, &want);
    receive(p, &want); /* asked twice, sent once */
    pump(p);
    SAME(count(p, SH_MSG_CHUNK), SH_LINK_SERVE_STEP_MAX);
    SAME(sh_link_due(&p->link), 0);
    pump(p);
    SAME(count(p, SH_MSG_CHUNK), 20 - SH_LINK_SERVE_STEP_MAX);
    assert_memory_equal(sent(p, 3).chunk.hash.b, hashes + 19 * 32, 32);
    pump(p);
    SAME(p->n_out, 0);
    free(hashes);
    peer_close(p);
}

static void give_chunk(peer *p, const uint8_t *bytes, const uint8_t *hash)
{
    sh_msg chunk = {.type = SH_MSG_CHUNK, .chunk = {.bytes = {bytes, SH_CHUNK_BYTES}}};
    memcpy(chunk.chunk.hash.b, hash, 32);
    receive(p, &chunk);
}

static void fetches_what_is_missing(void **state)
{
    (void)state;
    static uint8_t bytes[3 * SH_CHUNK_BYTES];
    peer *p = peer_open(10);
    sh_blob blob;
    uint8_t *hashes = NULL;
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(100 + i / SH_CHUNK_BYTES);
    OK(sh_blob_describe(bytes, sizeof(bytes), &blob, &hashes, &test_err));
    come_up(p);
    p->fetching = &blob;
    sh_link_step s = step_of(p);
    sh_link_want(&s);
    pump(p);
    SAME(only(p, SH_MSG_WANT).want.n, 3);
    give_chunk(p, bytes, hashes);
    SAME(p->whole, 0);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(only(p, SH_MSG_WANT).want.n, 2); /* what came is not asked for again */
    give_chunk(p, bytes, hashes + 32);
    SAME(p->refused, 1); /* not what its name says */
    give_chunk(p, bytes + SH_CHUNK_BYTES, hashes + 32);
    give_chunk(p, bytes + 2 * SH_CHUNK_BYTES, hashes + 64);
    SAME(p->whole, 1);
    pump(p);
    SAME(p->n_out, 0);
    SAME(p->link.want.due_ms, SH_LINK_NEVER);
    free(hashes);
    peer_close(p);
}

static void speaks_what_the_other_speaks(void **state)
{
    (void)state;
    peer *p = peer_open(11);
    sh_msg refusal = {.version = 1, .type = SH_MSG_ERROR, .error = {"unsupported", "version", 0}};
    sh_link_step s = step_of(p);
    sh_link_up(&s);
    pump(p);
    SAME(sent(p, 0).version, SH_WIRE_VERSION);
    receive(p, &refusal);
    pump(p);
    SAME(only(p, SH_MSG_ENROL).version, 1);
    SAME(only(p, SH_MSG_CHECKIN).version, 1);
    sh_link_up(&s);
    pump(p);
    SAME(sent(p, 0).version, SH_WIRE_VERSION); /* the next link tries the newest again */
    peer_close(p);
}

static void is_quiet_when_asked(void **state)
{
    (void)state;
    peer *p = peer_open(12);
    sh_msg later = {.type = SH_MSG_ERROR, .error = {"limit", "later", 1500}};
    come_up(p);
    put_windows(p, 1);
    receive(p, &later);
    pump(p);
    SAME(p->n_out, 0);
    SAME(sh_link_due(&p->link), p->now + 1500);
    p->now += 1500;
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 1);
    later.error.retry_after_ms = UINT64_MAX;
    receive(p, &later);
    assert_true(sh_link_due(&p->link) <= p->now + RETRY_MAX);
    peer_close(p);
}

static void bad_messages_are_answered(void **state)
{
    (void)state;
    peer *p = peer_open(13);
    come_up(p);
    sh_msg foreign = {.type = SH_MSG_ACK, .ack = {.epoch = p->link.epoch ^ 1}};
    foreign.ack.lease = p->link.lease;
    receive(p, &foreign);
    SAME(p->refused, 1);
    (void)only(p, SH_MSG_ERROR);
    sh_link_step s = step_of(p);
    clear(p);
    OK(sh_link_receive(&s, (sh_bytes){"rubbish", 7}));
    SAME(p->refused, 2);
    sh_msg enrol = {.type = SH_MSG_ENROL, .enrol = {.agent = "", .kernel = "", .device_class = ""}};
    receive(p, &enrol);
    SAME(p->refused, 3);
    peer_close(p);
}

static sh_msg enrolment(peer *p)
{
    sh_link_step s = step_of(p);
    sh_link_up(&s);
    pump(p);
    return only(p, SH_MSG_ENROL);
}

static void welcome(peer *p, bool renew, uint32_t common)
{
    sh_msg msg = {.type = SH_MSG_WELCOME,
                  .welcome = {.accepted = true, .text = "", .renew = renew, .common = common}};
    receive(p, &msg);
}

/* Each start has a lease of its own, and tells those before it until one is welcomed. */
static void leases_are_told(void **state)
{
    (void)state;
    peer *p = peer_open(14);
    uint8_t first[32], second[32];
    sh_msg enrol = enrolment(p);
    SAME(enrol.enrol.leases.n, 1);
    memcpy(first, enrol.enrol.leases.hashes, 32);
    open_link(p);
    enrol = enrolment(p);
    SAME(enrol.enrol.leases.n, 2);
    memcpy(second, enrol.enrol.leases.hashes, 32);
    assert_memory_equal(enrol.enrol.leases.hashes + 32, first, 32);
    assert_memory_not_equal(second, first, 32);
    welcome(p, false, 0);
    enrol = enrolment(p);
    SAME(enrol.enrol.leases.n, 1);
    open_link(p);
    enrol = enrolment(p);
    SAME(enrol.enrol.leases.n, 2);
    assert_memory_equal(enrol.enrol.leases.hashes + 32, second, 32);
    for (unsigned i = 0; i < 2 * SH_WIRE_LEASES_MAX; i++) /* the last welcomed one stays */
        open_link(p);
    enrol = enrolment(p);
    SAME(enrol.enrol.leases.n, SH_WIRE_LEASES_MAX);
    assert_memory_equal(enrol.enrol.leases.hashes + (SH_WIRE_LEASES_MAX - 1) * 32, second, 32);
    peer_close(p);
}

static void nothing_goes_before_the_welcome(void **state)
{
    (void)state;
    peer *p = peer_open(15);
    put_windows(p, 1);
    (void)enrolment(p);
    p->now += 3 * RETRY_MAX;
    pump(p);
    SAME(p->n_out, 1);
    (void)only(p, SH_MSG_ENROL);
    welcome(p, false, 0);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 1);
    SAME(count(p, SH_MSG_CHECKIN), 1);
    peer_close(p);
}

/* Three starts that nobody welcomed, two windows in each; told that the second one's lease is the
 * newest that the other copy has: the third one's windows are its own, and those after it. */
static void a_copy_takes_a_new_epoch(void **state)
{
    (void)state;
    peer *p = peer_open(16);
    uint64_t epoch = p->link.epoch;
    for (unsigned i = 0; i < 3; i++) {
        if (i > 0)
            open_link(p);
        put_windows(p, 2);
    }
    (void)enrolment(p);
    welcome(p, true, 1);
    SAME(p->renewed, 1);
    SAME(p->link.renewals, 1);
    assert_true(p->link.epoch != epoch);
    pump(p);
    SAME(p->n_out, 1); /* again, and alone */
    SAME(only(p, SH_MSG_ENROL).enrol.epoch, p->link.epoch);
    SAME(only(p, SH_MSG_ENROL).enrol.leases.n, 1);
    receive(p, &(sh_msg){.type = SH_MSG_WELCOME, /* of the ENROL before */
                         .welcome = {.accepted = true, .text = "", .epoch = epoch}});
    SAME(p->link.state, SH_LINK_TRYING);
    welcome(p, false, 0);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 6);
    for (unsigned i = 0; i < 6; i++) { /* the check-in is the first message */
        sh_msg_item item = sent(p, i + 1).item;
        SAME(item.epoch, i < 4 ? epoch : p->link.epoch);
        SAME(item.seq, i < 4 ? i + 1 : i - 3);
    }
    welcome(p, true, 0); /* an old answer, come twice */
    SAME(p->renewed, 1);
    uint64_t now = p->link.epoch;
    p->link.epoch = epoch; /* ack() names it */
    ack(p, 9, 0);          /* the other copy made more */
    p->link.epoch = now;
    SAME(p->acked, 4);
    SAME(p->refused, 0);
    open_link(p); /* what was settled is forgotten */
    SAME(p->link.segments.n, 1);
    SAME(p->link.epoch, now);
    (void)enrolment(p);
    welcome(p, false, 0);
    ack(p, 2, 0);
    SAME(p->acked, 6);
    peer_close(p);
}

/* A start made four windows; a copy that was made of the store after the second one goes on in the
 * epoch. And what is another copy's, which has the same key, is left alone. */
static void a_copy_parted_while_a_start_went_on(void **state)
{
    (void)state;
    peer *p = peer_open(19);
    uint64_t epoch = p->link.epoch, at[SH_CLASSES] = {1, 1, 3, 1};
    uint8_t starts[SH_WIRE_START_BYTES];
    sh_start_put(starts, at);
    come_up(p);
    put_windows(p, 4);
    pump(p);
    SAME(sent(p, p->n_out - 1).item.lease, p->link.lease);
    clear(p);
    sh_msg other = {.type = SH_MSG_ACK,
                    .ack = {.epoch = epoch, .cls = SH_CLASS_WINDOW, .high_water = 9}};
    receive(p, &other);
    other.ack.lease = p->link.lease ^ 1;
    receive(p, &other);
    SAME(p->acked + p->renewed + p->refused, 0);
    sh_msg msg = {.type = SH_MSG_WELCOME,
                  .welcome = {.accepted = true,
                              .text = "",
                              .renew = true,
                              .epoch = epoch,
                              .lease = p->link.lease ^ 1,
                              .parted = {starts, sizeof(starts)}}};
    (void)enrolment(p);
    receive(p, &msg);
    SAME(p->renewed, 0);
    msg.welcome.lease ^= 1;
    receive(p, &msg);
    SAME(p->renewed, 1);
    pump(p);
    SAME(only(p, SH_MSG_ENROL).enrol.leases.n, 1);
    SAME(only(p, SH_MSG_ENROL).enrol.starts.n, SH_WIRE_START_BYTES);
    sh_start_get(only(p, SH_MSG_ENROL).enrol.starts.data, at);
    SAME(at[SH_CLASS_WINDOW], 1); /* it began before the epoch did */
    welcome(p, false, 0);
    pump(p);
    for (unsigned i = 0; i < 4; i++) { /* the check-in is the first message */
        sh_msg_item item = sent(p, i + 1).item;
        SAME(item.epoch, i < 2 ? epoch : p->link.epoch);
        SAME(item.seq, i < 2 ? i + 1 : i - 1);
        SAME(item.lease, i < 2 ? 0 : p->link.lease);
    }
    other.ack.lease = 0;
    receive(p, &other); /* what copies have in common, whoever sent it */
    SAME(p->acked, 2);
    ack(p, 2, 0);
    SAME(p->acked, 4);
    peer_close(p);
}

static void a_store_that_was_set_back_finds_out(void **state)
{
    (void)state;
    peer *p = peer_open(17);
    uint64_t epoch = p->link.epoch;
    come_up(p);
    put_windows(p, 2);
    pump(p);
    ack(p, 7, 0); /* never made */
    SAME(p->refused, 0);
    SAME(p->renewed, 1);
    assert_true(p->link.epoch != epoch);
    SAME(p->acked, 0);
    pump(p);
    welcome(p, false, 0);
    pump(p);
    SAME(count(p, SH_MSG_ITEM), 2);
    SAME(sent(p, p->n_out - 1).item.epoch, p->link.epoch);
    peer_close(p);
}

/* A quota drops what two epochs have numbered: two tombstones on the wire, one after the other. */
static void a_tombstone_ends_with_its_epoch(void **state)
{
    (void)state;
    peer *p = peer_open(18);
    uint64_t epoch = p->link.epoch;
    put_windows(p, 3);
    open_link(p);
    put_windows(p, 3);
    (void)enrolment(p);
    welcome(p, true, 1);
    p->link.options.outbox.quota_bytes[SH_CLASS_WINDOW] = 45; /* a tombstone and one more */
    put_windows(p, 1);
    SAME(p->link.counts.items[SH_CLASS_WINDOW], 2);
    pump(p);
    welcome(p, false, 0);
    pump(p);
    sh_msg_item first = sent(p, 1).item;
    SAME(first.kind, SH_ITEM_TOMBSTONE);
    SAME(first.epoch, epoch);
    SAME(first.seq, 1);
    SAME(first.last_seq, 3);
    uint64_t now = p->link.epoch;
    p->link.epoch = epoch;
    ack(p, 3, 0);
    p->link.epoch = now;
    pump(p);
    sh_msg_item second = only(p, SH_MSG_ITEM).item;
    SAME(second.kind, SH_ITEM_TOMBSTONE);
    SAME(second.epoch, now);
    SAME(second.seq, 1);
    SAME(second.last_seq, 3);
    ack(p, 4, 0);
    SAME(p->link.counts.items[SH_CLASS_WINDOW], 0);
    SAME(p->link.counts.bytes[SH_CLASS_WINDOW], 0);
    peer_close(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_epoch_lasts),
        cmocka_unit_test(enrols_and_checks_in),
        cmocka_unit_test(retries_back_off),
        cmocka_unit_test(a_rejected_sender_only_enrols),
        cmocka_unit_test(items_stay_until_acknowledged),
        cmocka_unit_test(no_class_takes_every_place),
        cmocka_unit_test(a_closed_class_gives_its_places_up),
        cmocka_unit_test(a_lost_link_sends_all_again),
        cmocka_unit_test(a_full_list_waits),
        cmocka_unit_test(buries_what_was_forgotten),
        cmocka_unit_test(serves_chunks_a_few_at_a_time),
        cmocka_unit_test(fetches_what_is_missing),
        cmocka_unit_test(speaks_what_the_other_speaks),
        cmocka_unit_test(is_quiet_when_asked),
        cmocka_unit_test(bad_messages_are_answered),
        cmocka_unit_test(leases_are_told),
        cmocka_unit_test(nothing_goes_before_the_welcome),
        cmocka_unit_test(a_copy_takes_a_new_epoch),
        cmocka_unit_test(a_copy_parted_while_a_start_went_on),
        cmocka_unit_test(a_store_that_was_set_back_finds_out),
        cmocka_unit_test(a_tombstone_ends_with_its_epoch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
