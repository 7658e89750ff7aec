/*
 * Peers that cost and give nothing: connections that say nothing, that say their greeting a byte at
 * a time, a node that asks without end and never reads, one whose message has frames without end.
 * The aggregator's memory and descriptors stay within bounds, it ends what leads to nothing by
 * itself, and meanwhile serves others. argv: shoal-aggregator, shoal.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zmq.h>

#include "tests/e2e/aggregator_rig.h"
#include "tests/e2e/probe.h"

#define SILENT      150
#define DRIPPING    50
#define DRIP_MS     1000
#define ASKS        4000 /* that nobody reads the answers of */
#define FRAME_BYTES 65536u
#define FLOOD_BYTES (1024u << 20) /* of one message */
#define PEAK_MAX    (200u << 20)  /* VmHWM, whatever is done to it */

enum { HONEST, NEVER_READS, ENDLESS };

static const char *program, *tool;
static const char *const flags[] = {"--connections-max", "400", NULL};

static int begin(void **state)
{
    agg_rig *r = calloc(1, sizeof *r);
    assert_non_null(r);
    *state = r;
    agg_make(r, program, tool);
    agg_start(r, flags, NULL);
    agg_ready(r);
    for (unsigned i = 0; i < AGG_PEERS; i++)
        agg_enrol(r, i);
    return 0;
}

static int release(void **state)
{
    agg_release(*state);
    free(*state);
    return 0;
}

static unsigned descriptors(const agg_rig *r)
{
    char path[64];
    unsigned n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)r->process.pid);
    DIR *dir = opendir(path);
    assert_non_null(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

/* Others are served: an honest node that dials anew is welcomed. */
static void expect_service(agg_rig *r)
{
    agg_dial(r, HONEST);
    for (uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS; !r->peers[HONEST].welcomed;) {
        if (sh_clock_mono_ms() > end)
            fail_msg("an honest node is not served");
        agg_play(r, 20);
    }
}

static void check_peak(const agg_rig *r, const char *what)
{
    uint64_t peak = probe_peak(r->process.pid);
    print_message("%s: at most %llu MiB, %u descriptors\n", what, (unsigned long long)peak >> 20,
                  descriptors(r));
    if (peak > PEAK_MAX && !probe_is_sanitized())
        fail_msg("%s: the aggregator had %llu MiB", what, (unsigned long long)peak >> 20);
}

/* ---- without a key ---- */

static int connect_raw(const agg_rig *r)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(strrchr(r->endpoint, ':') + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&to, sizeof to), 0);
    return fd;
}

/* What it says is read; true: the aggregator has ended the connection. */
static bool has_ended(int fd)
{
    char bytes[256];
    ssize_t n;
    while ((n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT)) > 0)
        ;
    return n == 0 || errno != EAGAIN;
}

/* ZMTP 3.1's greeting (RFC 37), with CURVE as mechanism. */
static const char greeting[64] = "\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01"
                                 "CURVE";

static void silence_and_drips_end(void **state)
{
    agg_rig *r = *state;
    int fds[SILENT + DRIPPING];
    bool ended[SILENT + DRIPPING] = {0};
    unsigned n_ended = 0;
    expect_service(r);
    unsigned before = descriptors(r);
    for (unsigned i = 0; i < SILENT + DRIPPING; i++)
        fds[i] = connect_raw(r);
    uint64_t begun = sh_clock_mono_ms();
    for (uint64_t next = begun, end = begun + AGG_WAIT_MS; n_ended < SILENT + DRIPPING;) {
        if (sh_clock_mono_ms() > end)
            fail_msg("%u of %d connections were ended", n_ended, SILENT + DRIPPING);
        for (unsigned i = 0; i < SILENT + DRIPPING; i++)
            if (!ended[i] && has_ended(fds[i])) {
                ended[i] = true;
                n_ended++;
            }
        if (sh_clock_mono_ms() >= next) {
            size_t at = (size_t)((next - begun) / DRIP_MS) % sizeof greeting;
            for (unsigned i = SILENT; i < SILENT + DRIPPING; i++)
                if (!ended[i])
                    (void)send(fds[i], greeting + at, 1, MSG_NOSIGNAL);
            next += DRIP_MS;
            expect_service(r);
        }
        agg_play(r, 20);
    }
    for (unsigned i = 0; i < SILENT + DRIPPING; i++)
        close(fds[i]);
    check_peak(r, "silent and slow ones");
    E2E_UNTIL(descriptors(r) <= before + 4, "the descriptors are free again");
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

/* ---- with a key ---- */

typedef struct {
    void *context, *socket;
} peer_socket;

static peer_socket dial(agg_rig *r, unsigned peer, int receive_queue)
{
    const sh_net_keys *keys = &r->peers[peer].keys;
    int none = 0, wait_ms = 2000, small = 4096;
    peer_socket p = {.context = zmq_ctx_new()};
    p.socket = zmq_socket(p.context, ZMQ_DEALER);
    assert_non_null(p.socket);
    zmq_setsockopt(p.socket, ZMQ_LINGER, &none, sizeof none);
    zmq_setsockopt(p.socket, ZMQ_SNDTIMEO, &wait_ms, sizeof wait_ms);
    zmq_setsockopt(p.socket, ZMQ_RCVHWM, &receive_queue, sizeof receive_queue);
    zmq_setsockopt(p.socket, ZMQ_RCVBUF, &small, sizeof small);
    zmq_setsockopt(p.socket, ZMQ_CURVE_PUBLICKEY, keys->public_key.b, 32);
    zmq_setsockopt(p.socket, ZMQ_CURVE_SECRETKEY, keys->secret, 32);
    zmq_setsockopt(p.socket, ZMQ_CURVE_SERVERKEY, r->server_key.b, 32);
    assert_int_equal(zmq_connect(p.socket, r->endpoint), 0);
    return p;
}

static void hang_up(peer_socket *p)
{
    zmq_close(p->socket);
    zmq_ctx_term(p->context);
}

static bool say(peer_socket *p, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    OK(sh_msg_encode(msg, &bytes, err));
    bool sent = zmq_send(p->socket, bytes.data, bytes.len, 0) >= 0;
    sh_buf_release(&bytes);
    return sent;
}

static void one_that_never_reads(void **state)
{
    agg_rig *r = *state;
    peer_socket p = dial(r, NEVER_READS, 1);
    static uint8_t genesis[64u << 20];
    char path[256];
    uint8_t *chunks = NULL;
    sh_blob blob;
    snprintf(path, sizeof path, "%s/bundle/genesis.gguf", r->dir);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(genesis, 1, sizeof genesis, f);
    fclose(f);
    OK(sh_blob_describe(genesis, n, &blob, &chunks, err));
    assert_true(say(&p, &(sh_msg){.version = 2, .type = SH_MSG_ENROL, .enrol.epoch = 1}));
    sh_msg want = {.type = SH_MSG_WANT, .want = {SH_MIN(blob.n_chunks, SH_WIRE_WANT_MAX), chunks}};
    unsigned sent = 0;
    while (sent < ASKS && say(&p, &want))
        if (++sent % 500 == 0)
            expect_service(r);
    free(chunks);
    print_message("%u requests for %u chunks each were sent and no answer was read\n", sent,
                  want.want.n);
    expect_service(r);
    check_peak(r, "one that never reads");
    hang_up(&p);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

/* One message of 16,384 frames, which libzmq puts together in memory before anybody sees the first.
 * The frames share their bytes, so that it costs the sender nothing. */
static void send_frames(peer_socket *p)
{
    static uint8_t frame[FRAME_BYTES];
    for (unsigned left = FLOOD_BYTES / FRAME_BYTES; left > 0; left--) {
        zmq_msg_t msg;
        assert_int_equal(zmq_msg_init_data(&msg, frame, sizeof frame, NULL, NULL), 0);
        assert_true(zmq_msg_send(&msg, p->socket, left > 1 ? ZMQ_SNDMORE : 0) >= 0);
    }
}

static void frames_without_end(void **state)
{
    agg_rig *r = *state;
    peer_socket p = dial(r, ENDLESS, 10);
    bool down = false;
    assert_int_equal(zmq_socket_monitor(p.socket, "inproc://events", ZMQ_EVENT_DISCONNECTED), 0);
    void *monitor = zmq_socket(p.context, ZMQ_PAIR);
    assert_int_equal(zmq_connect(monitor, "inproc://events"), 0);
    expect_service(r);
    send_frames(&p);
    for (uint64_t end = sh_clock_mono_ms() + AGG_WAIT_MS; !down;) {
        zmq_pollitem_t item = {.socket = monitor, .events = ZMQ_POLLIN};
        if (sh_clock_mono_ms() > end)
            fail_msg("a message of %u MiB in frames was taken", FLOOD_BYTES >> 20);
        expect_service(r);
        down = zmq_poll(&item, 1, 0) > 0;
    }
    check_peak(r, "a message without end");
    zmq_close(monitor);
    hang_up(&p);
    assert_int_equal(agg_end(r, SIGTERM), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(silence_and_drips_end, begin, release),
        cmocka_unit_test_setup_teardown(one_that_never_reads, begin, release),
        cmocka_unit_test_setup_teardown(frames_without_end, begin, release),
    };
    if (argc != 3)
        return 2;
    program = argv[1];
    tool = argv[2];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
