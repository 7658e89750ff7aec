/*
 * What a user wrote, before and after an erasure: looked for in the bytes of every file of the
 * node's folder. Another user's feedback stays. By the running node, by the tool alone, and while a
 * client reads its stream slowly. argv[1]: the programs' folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/model/model.h"
#include "tests/e2e/harness.h"
#include "tests/e2e/probe.h"
#include "tests/http/client.h"

#define PIECES 8

static const char *bin;

/* Words that nothing else here says, one pair a user: in the prompt and in the correction. */
static const struct {
    const char *name, *prompt, *text;
} alice = {"alice", "zqzq xyxy wvwv", " kkjj ppqq zzyx"}, bob = {"bob", "mnmn bdbd", " ggtt hhuu"};

static const char *const words[] = {"--completions.count-max", "1000", NULL};

static int make(void **state)
{
    e2e_fleet *f = calloc(1, sizeof *f);
    assert_non_null(f);
    *state = f;
    f->bin = bin;
    f->node_words = words;
    e2e_fleet_make(f, 1);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    return 0;
}

static int release(void **state)
{
    e2e_fleet_release(*state);
    free(*state);
    return 0;
}

/* In how many files the tokens of a text lie, as the store keeps them; where, for a message. */
static size_t files_with(e2e_fleet *f, const char *text, char *where, size_t n_where)
{
    char path[SH_PATH_BYTES];
    sh_model *model = NULL;
    int32_t *tokens = NULL;
    size_t n = 0;
    OK(sh_path_join(path, sizeof path, f->nodes[0].dir, "genesis.gguf", err));
    OK(sh_model_open(path, &model, err));
    OK(sh_tokenize(model->tokenizer, text, strlen(text), SH_TOKENIZE_CONTINUE, &tokens, &n, err));
    assert_true(n >= 8);
    /* Not the ends, which may merge with what stands beside them. */
    size_t found =
        probe_files_with(f->nodes[0].dir, tokens + 1, (n - 2) * sizeof *tokens, where, n_where);
    free(tokens);
    sh_model_close(&model);
    return found;
}

static void expect_gone(e2e_fleet *f)
{
    char where[1024];
    if (files_with(f, alice.text, where, sizeof where) != 0)
        fail_msg("what alice corrected is in%s", where);
    if (files_with(f, alice.prompt, where, sizeof where) != 0)
        fail_msg("what alice typed is in%s", where);
    assert_true(files_with(f, bob.text, where, sizeof where) > 0);
}

/* Both write; bob's last completion is not rated yet. */
static void write_something(e2e_fleet *f, char *unrated)
{
    char id[64], where[1024];
    unsigned port = f->nodes[0].port;
    for (int i = 0; i < PIECES; i++) {
        probe_complete(port, alice.prompt, alice.name, id);
        assert_int_equal(probe_feedback(port, id, "edit", alice.text), 200);
        probe_complete(port, bob.prompt, bob.name, id);
        assert_int_equal(probe_feedback(port, id, "edit", bob.text), 200);
    }
    probe_complete(port, bob.prompt, bob.name, unrated);
    probe_complete(port, alice.prompt, alice.name, id); /* never rated: goes, too */
    assert_true(files_with(f, alice.text, where, sizeof where) > 0);
    /* Nothing is ever kept as it was typed. */
    assert_int_equal(probe_files_with(f->nodes[0].dir, "zqzq", 4, where, sizeof where), 0);
    assert_int_equal(probe_files_with(f->nodes[0].dir, "kkjj", 4, where, sizeof where), 0);
}

static void erase_alice(e2e_fleet *f)
{
    unsigned rows = 0;
    run_result r = run_program(
        e2e_program(f, "shoal-node"),
        (const char *const[]){"erase", "--dir", f->nodes[0].dir, "--user", alice.name, NULL}, NULL,
        0);
    if (r.exit_code != 0 || sscanf(r.out, "erased %u rows", &rows) != 1 || rows < 2 * PIECES)
        fail_msg("erase: exit code %d: %s%s", r.exit_code, r.out, r.err);
    run_release(&r);
}

/* What is bob's is as it was: the number of his pieces, and a completion that he rates now. */
static void expect_bob(e2e_fleet *f, const char *unrated, int64_t tokens_before)
{
    int64_t tokens = e2e_node_int(f, 0, "feedback_tokens");
    assert_true(tokens > 0 && tokens < tokens_before);
    assert_int_equal(probe_feedback(f->nodes[0].port, unrated, "edit", bob.text), 200);
    assert_true(e2e_node_int(f, 0, "feedback_tokens") > tokens);
}

static void by_the_running_node(void **state)
{
    e2e_fleet *f = *state;
    char unrated[64];
    write_something(f, unrated);
    int64_t before = e2e_node_int(f, 0, "feedback_tokens");
    erase_alice(f);
    expect_gone(f);
    expect_bob(f, unrated, before);
    assert_true(e2e_logged(&f->nodes[0].process, "event=erased rows="));
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
    expect_gone(f);
}

/* A node that died before: its last records and completions are in the store, or were never. */
static void by_the_tool_alone(void **state)
{
    e2e_fleet *f = *state;
    char unrated[64];
    write_something(f, unrated);
    int64_t before = e2e_node_int(f, 0, "feedback_tokens");
    E2E_UNTIL(probe_feedback(f->nodes[0].port, unrated, "reject", NULL) == 200, "a rating");
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGKILL), 128 + SIGKILL);
    erase_alice(f);
    expect_gone(f);
    e2e_node_start(f, 0, NULL);
    assert_true(e2e_node_ready(f, 0));
    int64_t tokens = e2e_node_int(f, 0, "feedback_tokens");
    assert_true(tokens > 0 && tokens < before);
    char id[64];
    probe_complete(f->nodes[0].port, bob.prompt, bob.name, id);
    assert_int_equal(probe_feedback(f->nodes[0].port, id, "edit", bob.text), 200);
    expect_gone(f);
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
}

/* A client that takes so little at a time that the node cannot finish its stream. */
static int slow_stream(unsigned port)
{
    int small = 1, segment = 88;
    char head[512];
    static const char body[] = "{\"prompt\": \"zqzq xyxy wvwv\", \"max_tokens\": 200, \"user\": "
                               "\"alice\", \"stream\": true}";
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval wait = {.tv_sec = 60};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small), 0);
    assert_int_equal(setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment), 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait), 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    int n = snprintf(head, sizeof head,
                     "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nConnection: close\r\n"
                     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                     port, sizeof body - 1, body);
    assert_true(client_send(fd, head, (size_t)n));
    return fd;
}

static void beside_a_slow_stream(void **state)
{
    e2e_fleet *f = *state;
    e2e_process tool = {0};
    char unrated[64], id[64];
    unsigned port = f->nodes[0].port;
    write_something(f, unrated);
    int64_t before = e2e_node_int(f, 0, "feedback_tokens");
    int fd = slow_stream(port);
    assert_true(client_wait_for(fd, "data: ")); /* it has begun, and cannot end */
    snprintf(tool.log, sizeof tool.log, "%s/erase.log", f->root.path);
    e2e_start(&tool,
              (const char *const[]){e2e_program(f, "shoal-node"), "erase", "--dir", f->nodes[0].dir,
                                    "--user", alice.name, NULL},
              NULL);
    /* The node goes on, whether the erasure has been asked for already or not. */
    for (int i = 0; i < 20; i++) {
        probe_complete(port, bob.prompt, bob.name, id);
        assert_int_equal(probe_feedback(port, id, "edit", bob.text), 200);
        assert_true(e2e_node_int(f, 0, "inferences") >= 0);
    }
    assert_true(e2e_runs(&tool)); /* it waits for the stream, as nothing else does */
    assert_int_equal(e2e_node_int(f, 0, "running"), 1);
    assert_true(client_wait_for(fd, "data: [DONE]")); /* it was not cut */
    close(fd);
    assert_int_equal(e2e_wait(&tool), 0);
    expect_gone(f);
    expect_bob(f, unrated, before + 1000000);
    assert_int_equal(e2e_end(&f->nodes[0].process, SIGTERM), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(by_the_running_node, make, release),
        cmocka_unit_test_setup_teardown(by_the_tool_alone, make, release),
        cmocka_unit_test_setup_teardown(beside_a_slow_stream, make, release),
    };
    if (argc != 2)
        return 2;
    bin = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
