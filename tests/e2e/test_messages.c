/*
 * What comes over the wire to a running shoal-aggregator: a node of the previous protocol version,
 * and peers that mean harm, with an enrolled key and without one. argv: shoal-aggregator, shoal.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/sync/sync.h"
#include "tests/e2e/aggregator_rig.h"
#include "tests/e2e/probe.h"
#include "tests/wire/sample.h"

#define CORPUS  SHOAL_SOURCE_DIR "/tests/fuzz/corpus/wire_msg/"
#define REFUSED "shoal_aggregator_handshakes_refused_total"
#define HOSTILE 2u          /* the rig's peer whose key the hostile client has */
#define RSS_MAX (96u << 20) /* of the aggregator, whatever is sent to it */

static const char *program, *tool;
static char page[1 << 17];
static uint64_t rss_largest;
static const char *const flags[] = {"--learn.drifting-min",
                                    "1",
                                    "--learn.buffer",
                                    "1",
                                    "--gate.overall-max",
                                    "10",
                                    "--gate.slice-max",
                                    "100",
                                    "--learn.rounds-max",
                                    "2",
                                    "--connections-max",
                                    "64",
                                    NULL};

/* A peer that the test writes byte by byte. */
typedef struct {
    sh_net_client *client;
    bool up, refused;
    unsigned downs, messages, errors;
    sh_buf last;   /* the newest answer; */
    sh_msg answer; /* decoded by raw_ask, valid until the next one */
} raw_peer;

static void raw_dial(raw_peer *p, agg_rig *r, const sh_net_keys *keys)
{
    *p = (raw_peer){0};
    sh_buf_init(&p->last, SH_WIRE_MESSAGE_MAX);
    OK(sh_net_client_create(r->net,
                            &(sh_net_client_options){.endpoint = r->endpoint,
                                                     .server_key = r->server_key,
                                                     .keys = keys,
                                                     .message_max = 2 * SH_WIRE_MESSAGE_MAX,
                                                     .reconnect_min_ms = 20,
                                                     .reconnect_max_ms = 100},
                            &p->client, err));
}

static void raw_release(raw_peer *p)
{
    sh_net_client_destroy(&p->client, 0);
    sh_buf_release(&p->last);
}

static void raw_read(raw_peer *p, int timeout_ms)
{
    sh_net_event event;
    sh_msg msg;
    OK(sh_net_wait(
        &(sh_net_waiting){.clients = &p->client, .n_clients = 1, .timeout_ms = timeout_ms}, err));
    for (;;) {
        OK(sh_net_client_next(p->client, &event, err));
        if (event.kind == SH_NET_NONE)
            return;
        p->up = event.kind == SH_NET_UP || (p->up && event.kind == SH_NET_MESSAGE);
        p->downs += event.kind == SH_NET_DOWN;
        p->refused |= event.kind == SH_NET_REFUSED;
        if (event.kind != SH_NET_MESSAGE)
            continue;
        OK(sh_msg_decode(event.data, event.n, &msg, err));
        p->messages++;
        p->errors += msg.type == SH_MSG_ERROR;
        sh_buf_clear(&p->last);
        assert_int_equal(sh_buf_append(&p->last, event.data, event.n), SH_OK);
    }
}

#define READ_UNTIL(p, condition)                                                                   \
    do {                                                                                           \
        uint64_t read_end_ = sh_clock_mono_ms() + AGG_WAIT_MS;                                     \
        while (!(condition)) {                                                                     \
            if (sh_clock_mono_ms() > read_end_)                                                    \
                fail_msg("this did not come true: %s", #condition);                                \
            raw_read(p, 20);                                                                       \
        }                                                                                          \
    } while (0)

/* Sends when the link is up and has room. */
static void raw_send(raw_peer *p, const void *bytes, size_t n)
{
    sh_error err = {0};
    uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS;
    for (;;) {
        sh_status status = sh_net_client_send(p->client, bytes, n, &err);
        if (status == SH_OK)
            return;
        if (status != SH_ERR_LIMIT || sh_clock_mono_ms() > end)
            fail_msg("send: %s", err.text);
        raw_read(p, 20);
    }
}

/* Sends and waits for the answer-> */
static const sh_msg *raw_ask(raw_peer *p, const void *bytes, size_t n)
{
    unsigned before = p->messages;
    raw_send(p, bytes, n);
    READ_UNTIL(p, p->messages > before);
    OK(sh_msg_decode(p->last.data, p->last.len, &p->answer, err));
    return &p->answer;
}

static const sh_msg *raw_ask_msg(raw_peer *p, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, err));
    const sh_msg *answer = raw_ask(p, bytes.data, bytes.len);
    sh_buf_release(&bytes);
    return answer;
}

static uint64_t count_bad(agg_rig *r)
{
    assert_int_equal(agg_http(r, "/metrics", page, sizeof page), 200);
    double bad = probe_metric(page, "shoal_aggregator_bad_messages_total");
    assert_true(bad >= 0);
    return (uint64_t)bad;
}

/* Others are served: an honest node that dials anew is welcomed. */
static void expect_service(agg_rig *r)
{
    agg_dial(r, 0);
    for (uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS; !r->peers[0].welcomed;) {
        if (sh_clock_mono_ms() > end)
            fail_msg("an honest node is not served");
        agg_play(r, 20);
    }
    uint64_t rss = probe_rss(r->process.pid);
    rss_largest = SH_MAX(rss, rss_largest);
    if (rss > RSS_MAX && !probe_is_sanitized())
        fail_msg("the aggregator has %llu MiB", (unsigned long long)rss >> 20);
}

static raw_peer peer; /* one at a time; released with the rig, also after a failure */

static int begin(void **state)
{
    agg_rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    *state = r;
    agg_make(r, program, tool);
    agg_start(r, flags, NULL);
    agg_ready(r);
    agg_enrol(r, 0);
    agg_enrol(r, 1);
    agg_enrol(r, HOSTILE);
    return 0;
}

static int release(void **state)
{
    raw_release(&peer);
    agg_release(*state); /* kills it */
    free(*state);
    return 0;
}

static void end(agg_rig *r)
{
    print_message("the aggregator had at most %llu MiB\n", (unsigned long long)rss_largest >> 20);
    for (unsigned i = 0; i < AGG_PEERS; i++)
        assert_int_equal(r->peers[i].errors, 0);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

/* ---- the previous version ---- */

static sh_buf recorded(const char *name)
{
    char path[256];
    uint8_t *read = NULL;
    size_t n = 0;
    sh_buf bytes;
    snprintf(path, sizeof path, CORPUS "%s", name);
    OK(sh_file_read(path, SH_WIRE_MESSAGE_MAX, &read, &n, err));
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    assert_int_equal(sh_buf_append(&bytes, read, n), SH_OK);
    free(read);
    return bytes;
}

/* The bytes as program and version 1 wrote them get answers that it can read. */
static void version_1_is_answered_in_version_1(void **state)
{
    static const struct {
        const char *name;
        sh_msg_type answer;
    } cases[] = {{"enrol-0", SH_MSG_WELCOME}, {"checkin-0", SH_MSG_PLAN},
                 {"enrol-1", SH_MSG_WELCOME}, {"checkin-1", SH_MSG_PLAN},
                 {"item-0", SH_MSG_ACK},      {"want-0", SH_MSG_ERROR}};
    agg_rig *r = *state;
    raw_peer *p = &peer;
    raw_dial(p, r, &r->peers[HOSTILE].keys);
    READ_UNTIL(p, p->up);
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_buf bytes = recorded(cases[i].name);
        assert_int_equal(bytes.data[1], 1);
        const sh_msg *answer = raw_ask(p, bytes.data, bytes.len);
        if (answer->version != 1 || answer->type != cases[i].answer)
            fail_msg("%s was answered by %s of version %u", cases[i].name,
                     sh_msg_type_name(answer->type), answer->version);
        sh_buf_release(&bytes);
    }
    /* A whole session: what it is sent in version 1 it may take a release from. */
    sh_msg checkin = {.version = 1, .type = SH_MSG_CHECKIN, .checkin = {.epoch = 5}};
    const sh_msg *plan = raw_ask_msg(p, &checkin);
    assert_int_equal(plan->version, 1);
    assert_true(plan->plan.manifest.n > 0);
    /* The present one stays so beside it, and one that is not known yet is told ours. */
    checkin.version = 2;
    assert_int_equal(raw_ask_msg(p, &checkin)->version, 2);
    sh_buf newer;
    sh_buf_init(&newer, 1024);
    sample_wrap(SH_WIRE_VERSION + 1, SH_MSG_CHECKIN, "\x90", 1, &newer);
    const sh_msg *answer = raw_ask(p, newer.data, newer.len);
    assert_int_equal(answer->version, SH_WIRE_VERSION);
    assert_int_equal(answer->type, SH_MSG_ERROR);
    assert_string_equal(answer->error.code, "unsupported");
    sh_buf_release(&newer);
    end(r);
}

/* ---- an enrolled key ---- */

/* Sends what must be counted as bad and answered by an ERROR. */
static void expect_bad(raw_peer *p, const void *bytes, size_t n, const char *what)
{
    const sh_msg *answer = raw_ask(p, bytes, n);
    if (answer->type != SH_MSG_ERROR)
        fail_msg("%s was answered by %s", what, sh_msg_type_name(answer->type));
}

static unsigned send_noise(raw_peer *p, sh_rng *rng)
{
    static uint8_t noise[SH_WIRE_ITEM_MAX];
    /* A larger one than any that a node may send ends the connection, as net's tests show. */
    static const size_t sizes[] = {1, 2, 17, 1000, 65536, SH_WIRE_ITEM_MAX};
    for (size_t i = 0; i < sizeof noise; i++)
        noise[i] = (uint8_t)sh_rng_u64(rng);
    for (size_t i = 0; i < SH_COUNT(sizes); i++)
        expect_bad(p, noise, sizes[i], "noise");
    return SH_COUNT(sizes);
}

/* A right envelope around bodies that lie. */
static unsigned send_lies(raw_peer *p)
{
    static const struct {
        uint8_t type;
        const char *body;
        size_t n;
    } lies[] = {
        {SH_MSG_CHECKIN, "\xdd\xff\xff\xff\xff", 5},  /* 4,294,967,295 fields */
        {SH_MSG_WANT, "\x91\xc6\xff\xff\xff\xe0", 6}, /* as many bytes of hashes */
        {SH_MSG_ITEM, "\x96\x01\x00\x01\x01\x01\xc6\xff\xff\xff\xff", 11},
        {SH_MSG_CHUNK, "\x92\xc4\x20\xc6\x7f\xff\xff\xff", 8},
        {SH_MSG_ENROL, "\x95\x01\xdb\xff\xff\xff\xff", 7}, /* a text of 4 GiB */
        {SH_MSG_ENROL, "\xc0", 1},
        {SH_MSG_CHECKIN, "", 0},
        {0, "\x90", 1},
        {100, "\x90", 1},
        {SH_MSG_PLAN, "\x94\x01\xc0\xc4\x00\xc0", 6}, /* the aggregator's own to say */
        {SH_MSG_WELCOME, "\x92\xc3\xa2hi", 5},
    };
    sh_buf bytes;
    sh_buf_init(&bytes, 4096);
    for (size_t i = 0; i < SH_COUNT(lies); i++) {
        char what[32];
        snprintf(what, sizeof what, "lie %zu", i);
        sh_buf_clear(&bytes);
        sample_wrap(2, lies[i].type, lies[i].body, lies[i].n, &bytes);
        expect_bad(p, bytes.data, bytes.len, what);
    }
    /* An envelope that is none. */
    expect_bad(p, "\xdd\xff\xff\xff\xff", 5, "an envelope of 4,294,967,295 fields");
    expect_bad(p, "\x94\x02\x03\xc4\x10zzzzzzzzzzzzzzzz\xc6\xff\xff\xff\xff", 25,
               "a body of 4 GiB");
    sh_buf_release(&bytes);
    return SH_COUNT(lies) + 2;
}

/* Every byte of a good message, one after the other, is made another one. */
static unsigned send_damaged(raw_peer *p, sh_rng *rng)
{
    sh_buf good = recorded("item-1");
    unsigned n = 0;
    for (size_t i = 0; i < good.len && n < 200; i += 1 + good.len / 200, n++) {
        uint8_t was = good.data[i];
        good.data[i] ^= (uint8_t)(1 + sh_rng_u64(rng) % 255);
        expect_bad(p, good.data, good.len, "a damaged message");
        good.data[i] = was;
    }
    sh_buf_release(&good);
    return n;
}

/* Messages that can be read and ask for too much. */
static void send_excess(raw_peer *p)
{
    static uint8_t hashes[SH_WIRE_WANT_MAX * 32], bytes[SH_CHUNK_BYTES];
    sh_msg item = {.type = SH_MSG_ITEM,
                   .item = {.epoch = 1,
                            .cls = SH_CLASS_UPDATE,
                            .seq = 1,
                            .last_seq = 1,
                            .kind = SH_ITEM_UPDATE,
                            .payload = {bytes, 100}}};
    /* An update whose payload is nothing: refused as an update, and acknowledged, so that it does
     * not come for ever. */
    assert_int_equal(raw_ask_msg(p, &item)->type, SH_MSG_ACK);
    item.item.payload = (sh_bytes){0};
    item.item.kind = SH_ITEM_TOMBSTONE;
    item.item.seq = 2;
    item.item.last_seq = SH_SEQ_MAX - 1; /* far ahead: not taken, and no harm */
    (void)raw_ask_msg(p, &item);
    /* Chunks that nobody asked for, and ones that nobody has. */
    sh_msg want = {.type = SH_MSG_WANT, .want = {SH_WIRE_WANT_MAX, hashes}};
    assert_int_equal(raw_ask_msg(p, &want)->type, SH_MSG_ERROR);
    /* More stores than a key may have. */
    unsigned refused = 0;
    for (uint64_t epoch = 1; epoch <= 300; epoch++) {
        sh_msg enrol = {.type = SH_MSG_ENROL,
                        .enrol = {.epoch = epoch, .agent = "x", .kernel = "x"}};
        const sh_msg *answer = raw_ask_msg(p, &enrol);
        assert_int_equal(answer->type, SH_MSG_WELCOME);
        refused += !answer->welcome.accepted;
    }
    assert_in_range(refused, 44, 45); /* 256 it may, and it may have had another */
}

static void damage_is_counted_and_answered(void **state)
{
    agg_rig *r = *state;
    raw_peer *p = &peer;
    sh_rng rng;
    sh_rng_init(&rng, 7, 0, 0);
    raw_dial(p, r, &r->peers[HOSTILE].keys);
    READ_UNTIL(p, p->up);
    agg_dial(r, 1);
    unsigned bad = send_noise(p, &rng);
    expect_service(r);
    bad += send_lies(p);
    expect_service(r);
    bad += send_damaged(p, &rng);
    expect_service(r);
    /* From here on the answer may be something else, and the store is asked to keep it. */
    sh_msg enrol = {.type = SH_MSG_ENROL, .enrol = {.epoch = 1, .agent = "x", .kernel = "x"}};
    assert_int_equal(raw_ask_msg(p, &enrol)->type, SH_MSG_WELCOME);
    send_excess(p);
    expect_service(r);
    for (uint64_t until = sh_clock_mono_ms() + AGG_WAIT_MS; count_bad(r) != bad;) {
        if (sh_clock_mono_ms() > until)
            fail_msg("%llu of %u bad messages were counted", (unsigned long long)count_bad(r), bad);
        agg_play(r, 20);
    }
    assert_true(agg_logged(r, "event=bad_message node="));
    /* The rounds went on beside all that. */
    for (uint64_t until = sh_clock_mono_ms() + AGG_WAIT_MS; r->peers[1].version < 2;) {
        assert_true(sh_clock_mono_ms() < until);
        agg_play(r, 20);
    }
    end(r);
}

/* As fast as it can, without reading an answer: checks-in, requests for the whole release, noise.
 */
static void flood(raw_peer *p, agg_rig *r, const sh_buf messages[3], unsigned n)
{
    sh_error err = {0};
    for (unsigned i = 0; i < n; i++) {
        const sh_buf *m = &messages[i % 3];
        if (sh_net_client_send(p->client, m->data, m->len, &err) == SH_ERR_LIMIT)
            agg_play(r, 1); /* its own queue is full */
    }
}

static void a_flood_leaves_room_for_others(void **state)
{
    agg_rig *r = *state;
    raw_peer *p = &peer;
    sh_buf messages[3];
    sh_manifest manifest;
    raw_dial(p, r, &r->peers[HOSTILE].keys);
    READ_UNTIL(p, p->up);
    sh_msg checkin = {.type = SH_MSG_CHECKIN, .checkin = {.epoch = 9}};
    const sh_msg *plan = raw_ask_msg(p, &checkin);
    OK(sh_manifest_verify(plan->plan.manifest.data, plan->plan.manifest.n, &r->release_pk,
                          &manifest, err));
    sh_msg want = {
        .type = SH_MSG_WANT,
        .want = {SH_MIN(manifest.model.n_chunks, SH_WIRE_WANT_MAX), manifest.model.chunk_hashes}};
    for (int i = 0; i < 3; i++)
        sh_buf_init(&messages[i], SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(&checkin, &messages[0], err));
    OK(sh_msg_encode(&want, &messages[1], err));
    assert_int_equal(sh_buf_append(&messages[2], "no message", 10), SH_OK);
    for (int round = 0; round < 10; round++) {
        flood(p, r, messages, 2000);
        expect_service(r);
    }
    /* One that is too large ends the connection, and nothing else. */
    static uint8_t large[SH_WIRE_MESSAGE_MAX + 1];
    raw_send(p, large, sizeof large);
    READ_UNTIL(p, p->downs > 0);
    expect_service(r);
    READ_UNTIL(p, p->up);
    for (int i = 0; i < 3; i++)
        sh_buf_release(&messages[i]);
    end(r);
}

/* ---- no key ---- */

static int connect_raw(const agg_rig *r)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(strrchr(r->endpoint, ':') + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    assert_true(fd >= 0);
    (void)connect(fd, (const struct sockaddr *)&to, sizeof to);
    return fd;
}

static void strangers_get_nothing(void **state)
{
    enum { SOCKETS = 40 };
    agg_rig *r = *state;
    raw_peer *p = &peer;
    sh_net_keys keys;
    int fds[SOCKETS];
    static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    static const char greeting[] = "\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL";
    uint64_t before = count_bad(r);
    OK(sh_net_keys_make(&keys, err));
    raw_dial(p, r, &keys);
    READ_UNTIL(p, p->refused);
    assert_false(p->up);
    assert_int_equal(p->messages, 0);
    /* Connections that say nothing, something else, or the beginning of a handshake. */
    for (int i = 0; i < SOCKETS; i++)
        fds[i] = connect_raw(r);
    expect_service(r);
    for (int i = 0; i < SOCKETS; i++) {
        if (i % 3 == 1)
            (void)send(fds[i], http, sizeof http - 1, MSG_NOSIGNAL);
        if (i % 3 == 2)
            (void)send(fds[i], greeting, sizeof greeting, MSG_NOSIGNAL);
    }
    agg_dial(r, 1);
    expect_service(r);
    for (int i = 0; i < SOCKETS; i++)
        close(fds[i]);
    expect_service(r);
    /* The page is made anew a few times a second. */
    for (uint64_t until = sh_clock_mono_ms() + AGG_WAIT_MS; probe_metric(page, REFUSED) < 1;) {
        assert_true(sh_clock_mono_ms() < until);
        agg_play(r, 20);
        assert_int_equal(count_bad(r), before);
    }
    end(r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(version_1_is_answered_in_version_1, begin, release),
        cmocka_unit_test_setup_teardown(damage_is_counted_and_answered, begin, release),
        cmocka_unit_test_setup_teardown(a_flood_leaves_room_for_others, begin, release),
        cmocka_unit_test_setup_teardown(strangers_get_nothing, begin, release),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
