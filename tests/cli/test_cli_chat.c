/*
 * `shoal model generate` and `shoal model chat`: how answers are chosen, where they end, what of a
 * conversation is run again. Models are made here; argv[1] is the program.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "tests/cli/run.h"
#include "tests/model/util.h"

extern char **environ;

static const char *program;
static char folder[] = "/tmp/shoal-chat-XXXXXX";
static char model_path[64], q8_path[64], packed_path[64], adapter_path[64], long_path[64];

static run_result run(const char *input, const char *const *words)
{
    return run_program(program, words, input, input != NULL ? strlen(input) : 0);
}

#define RUN(input, ...) run(input, (const char *const[]){"model", __VA_ARGS__, NULL})
/* Greedy, 24 tokens. */
#define GENERATE(...) RUN(NULL, "generate", "-p", "the sea", "-n", "24", "--temp", "0", __VA_ARGS__)

static int make_files(void **state)
{
    (void)state;
    assert_non_null(mkdtemp(folder));
    snprintf(model_path, sizeof model_path, "%s/tiny.gguf", folder);
    snprintf(q8_path, sizeof q8_path, "%s/q8.gguf", folder);
    snprintf(packed_path, sizeof packed_path, "%s/q8.gguf.packed", folder);
    snprintf(adapter_path, sizeof adapter_path, "%s/adapter.gguf", folder);
    snprintf(long_path, sizeof long_path, "%s/long.gguf", folder);
    tiny_options o = tiny_defaults(12);
    o.untied = true; /* a tied one says its last token again and again */
    o.context = 256;
    CHECK_OK(tiny_write(&o, model_path, err));
    o.type = SH_TYPE_Q8_0;
    CHECK_OK(tiny_write(&o, q8_path, err));
    o = tiny_defaults(12);
    o.context = SH_CONTEXT_MAX;
    CHECK_OK(tiny_write(&o, long_path, err));
    sh_model *model = NULL;
    CHECK_OK(sh_model_open(model_path, &model, err));
    sh_adapter *adapter = util_adapter(model, 2, 1, 0.2f);
    sh_buf bytes;
    sh_buf_init(&bytes, 16u << 20);
    CHECK_OK(sh_adapter_encode(adapter, &bytes, err));
    CHECK_OK(sh_file_write_atomic(adapter_path, bytes.data, bytes.len, err));
    sh_buf_release(&bytes);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    const char *paths[] = {model_path, q8_path, packed_path, adapter_path, long_path};
    for (size_t i = 0; i < SH_COUNT(paths); i++)
        unlink(paths[i]);
    return rmdir(folder);
}

/* Standard output of a run that must be good and silent on standard error; malloc'ed. */
static char *good(run_result r)
{
    if (r.exit_code != 0 || r.n_err != 0)
        fail_msg("exit code %d, stderr \"%s\"", r.exit_code, r.err);
    char *out = strdup(r.out);
    assert_non_null(out);
    run_release(&r);
    return out;
}

static void same(run_result a, run_result b)
{
    char *x = good(a), *y = good(b);
    assert_string_equal(x, y);
    free(x);
    free(y);
}

static void different(run_result a, run_result b)
{
    char *x = good(a), *y = good(b);
    assert_string_not_equal(x, y);
    free(x);
    free(y);
}

static void refused(run_result r, const char *part)
{
    if (r.exit_code != 2 || strstr(r.err, part) == NULL || r.n_out != 0 ||
        strchr(r.err, '\n') != r.err + r.n_err - 1)
        fail_msg("exit code %d, stdout \"%s\", stderr \"%s\", expected \"%s\" in one line",
                 r.exit_code, r.out, r.err, part);
    run_release(&r);
}

static json_t *json_line(const char *text, size_t line)
{
    for (; line > 0; line--) {
        text = strchr(text, '\n');
        assert_non_null(text);
        text++;
    }
    json_error_t where;
    json_t *value = json_loads(text, JSON_DISABLE_EOF_CHECK, &where);
    if (value == NULL)
        fail_msg("no JSON (%s): \"%s\"", where.text, text);
    return value;
}

static const char *text_of(const json_t *o)
{
    return json_string_value(json_object_get(o, "text"));
}

static void test_how_it_runs(void **state)
{
    (void)state;
    static const char *const models[] = {model_path, q8_path};
    for (size_t i = 0; i < 2; i++) {
        const char *m = models[i];
        same(GENERATE("-m", m), GENERATE("-m", m, "-t", "3"));
        same(GENERATE("-m", m), GENERATE("-m", m, "--pack", "none"));
        same(GENERATE("-m", m), RUN("the sea", "generate", "-m", m, "-p", "-", "-n", "24",
                                    "--top-k", "1", "--seed", "5"));
        same(GENERATE("-m", m, "--kernel", "portable", "--kv", "f32"),
             GENERATE("-m", m, "--kernel", "portable", "--kv", "f32", "-t", "2"));
    }
    same(GENERATE("-m", q8_path), GENERATE("-m", q8_path, "--pack", "file"));
    assert_true(sh_file_exists(packed_path));
    same(GENERATE("-m", q8_path), GENERATE("-m", q8_path, "--pack", "file"));
    refused(GENERATE("-m", q8_path, "--pack", "disk"), "--pack disk");
    refused(GENERATE("-m", q8_path, "--kv", "f8"), "--kv f8");
    refused(GENERATE("-m", q8_path, "--kernel", "sse9"), "sse9");
    refused(GENERATE("-m", q8_path, "-c", "257"), "257");
    refused(GENERATE("-m", q8_path, "-c", "2"), "the prompt has");
    refused(GENERATE("-m", q8_path, "--stop", ""), "--stop");
}

static void test_adapters(void **state)
{
    (void)state;
    char none[80], one[80], half[80], nan[80];
    snprintf(none, sizeof none, "%s=0", adapter_path);
    snprintf(one, sizeof one, "%s=1", adapter_path);
    snprintf(half, sizeof half, "%s=0.5", adapter_path);
    snprintf(nan, sizeof nan, "%s=inf", adapter_path);
    same(GENERATE("-m", model_path), GENERATE("-m", model_path, "--lora", none));
    same(GENERATE("-m", model_path, "--lora", adapter_path),
         GENERATE("-m", model_path, "--lora", one));
    different(GENERATE("-m", model_path), GENERATE("-m", model_path, "--lora", adapter_path));
    refused(GENERATE("-m", model_path, "--lora", nan), "finite");
    refused(GENERATE("-m", model_path, "--lora", "=2"), "--lora =2");
    refused(GENERATE("-m", model_path, "--lora", one, "--lora", one, "--lora", one, "--lora", one,
                     "--lora", one),
            "at most 4");
    refused(GENERATE("-m", model_path, "--lora", "/nowhere/a=b.gguf"), "/nowhere/a=b.gguf");
}

static void test_sampling(void **state)
{
    (void)state;
    different(RUN(NULL, "generate", "-m", model_path, "-p", "the", "--seed", "1"),
              RUN(NULL, "generate", "-m", model_path, "-p", "the", "--seed", "2"));
    same(RUN(NULL, "generate", "-m", model_path, "-p", "the", "--seed", "1"),
         RUN(NULL, "generate", "-m", model_path, "-p", "the", "--seed", "1"));
    same(GENERATE("-m", model_path), GENERATE("-m", model_path, "--temp", "5", "--top-p", "0"));
    same(GENERATE("-m", model_path), GENERATE("-m", model_path, "--temp", "5", "--min-p", "1"));
    different(GENERATE("-m", long_path), GENERATE("-m", long_path, "--repeat-penalty", "100"));
    refused(GENERATE("-m", model_path, "--top-p", "1.5"), "--top-p");
}

/* A warm one: of all tokens alike, by a fixed seed. */
#define WARM(...)                                                                                  \
    RUN(NULL, "generate", "-p", "the sea", "-n", "40", "--temp", "20", "--top-k", "0", "--top-p",  \
        "1", "--min-p", "0", "--seed", "4", __VA_ARGS__)

static void test_stop(void **state)
{
    (void)state;
    char *out = good(WARM("-m", long_path, "--json"));
    json_t *whole = json_line(out, 0);
    const char *text = text_of(whole);
    if (strlen(text) < 8)
        fail_msg("the model says too little for this test: \"%s\"", text);
    assert_true(json_number_value(json_object_get(whole, "prefill_tokens_per_s")) > 0);
    /* Some bytes of ASCII from the middle. */
    char stop[4] = "";
    size_t at = 2;
    while (text[at + 3] != '\0' && ((text[at] | text[at + 1] | text[at + 2]) & 0x80))
        at++;
    memcpy(stop, text + at, 3);
    const size_t first = (size_t)(strstr(text, stop) - text);
    char *cut = good(WARM("-m", long_path, "--json", "--stop", "never there", "--stop", stop));
    json_t *o = json_line(cut, 0);
    assert_string_equal(json_string_value(json_object_get(o, "stop")), "stop");
    assert_int_equal(strlen(text_of(o)), first);
    assert_memory_equal(text_of(o), text, first);
    /* The same as it is printed while it comes: there, bytes that are no UTF-8 stay. */
    run_result all = WARM("-m", long_path), shown = WARM("-m", long_path, "--stop", stop);
    const char *end = memmem(all.out, all.n_out, stop, 3);
    assert_non_null(end);
    assert_int_equal(shown.n_out, (size_t)(end - all.out) + 1);
    assert_memory_equal(shown.out, all.out, shown.n_out - 1);
    assert_int_equal(shown.out[shown.n_out - 1], '\n');
    run_release(&all);
    run_release(&shown);
    json_decref(o);
    json_decref(whole);
    free(cut);
    free(out);
}

#define CHAT(input, ...) RUN(input, "chat", "--temp", "0", __VA_ARGS__)

static void test_chat(void **state)
{
    (void)state;
    run_result r = CHAT("the sea\n\nand the rest", "-m", model_path, "-n", "10", "--json");
    assert_int_equal(r.exit_code, 0);
    assert_string_equal(r.err, "chat: no known template: plain\n");
    json_t *first = json_line(r.out, 0), *second = json_line(r.out, 1);
    /* The first answer is what the prompt that the template makes gives. */
    char *out =
        good(RUN(NULL, "generate", "-m", model_path, "-p", "user: the sea\nassistant:", "-n", "10",
                 "--temp", "0", "--stop", "\nuser:", "--json"));
    json_t *same_prompt = json_line(out, 0);
    assert_true(
        json_equal(json_object_get(first, "tokens"), json_object_get(same_prompt, "tokens")));
    const json_int_t n_first =
        (json_int_t)json_array_size(json_object_get(same_prompt, "prompt_tokens"));
    assert_int_equal(json_integer_value(json_object_get(first, "prompt_tokens")), n_first);
    /* Of the second turn only what is new was run. */
    char prompt[256];
    snprintf(prompt, sizeof prompt, "\nuser: and the rest\nassistant:");
    int32_t *ids = NULL;
    size_t n = 0;
    sh_model *model = NULL;
    CHECK_OK(sh_model_open(model_path, &model, err));
    CHECK_OK(
        sh_tokenize(model->tokenizer, prompt, strlen(prompt), SH_TOKENIZE_CONTINUE, &ids, &n, err));
    /* and the last token of the answer, which was not run before */
    assert_in_range(json_integer_value(json_object_get(second, "prompt_tokens")), n, n + 1);
    free(ids);
    sh_model_close(&model);
    json_decref(first);
    json_decref(second);
    json_decref(same_prompt);
    free(out);
    run_release(&r);
    /* Threads change nothing; a template is taken by its name; a system's message counts. */
    run_result a = CHAT("the sea\n", "-m", model_path, "-n", "10", "--template", "chatml");
    run_result b =
        CHAT("the sea\n", "-m", model_path, "-n", "10", "--template", "chatml", "-t", "2");
    run_result c = CHAT("the sea\n", "-m", model_path, "-n", "10", "--template", "chatml",
                        "--system", "be old");
    assert_non_null(strstr(a.err, "chat: template: chatml\n"));
    assert_string_equal(a.out, b.out);
    assert_string_not_equal(a.out, c.out);
    run_release(&a);
    run_release(&b);
    run_release(&c);
    refused(CHAT("x", "-m", model_path, "--template", "jinja"), "jinja");
    r = CHAT("", "-m", model_path);
    assert_int_equal(r.exit_code, 0);
    assert_int_equal(r.n_out, 0);
    run_release(&r);
}

static void test_full_context(void **state)
{
    (void)state;
    char input[1024] = "";
    for (int i = 0; i < 6; i++)
        strncat(input, "the sea and the rest\n", sizeof input - strlen(input) - 1);
    run_result r = CHAT(input, "-m", model_path, "-n", "12", "-c", "96", "--json");
    assert_int_equal(r.exit_code, 0);
    assert_non_null(strstr(r.err, "forgot the oldest"));
    json_int_t forgotten = 0;
    for (size_t i = 0; i < 6; i++) {
        json_t *o = json_line(r.out, i);
        forgotten += json_integer_value(json_object_get(o, "forgotten_turns"));
        assert_in_range(json_integer_value(json_object_get(o, "prompt_tokens")), 1, 96 - 12);
        json_decref(o);
    }
    assert_in_range(forgotten, 1, 5);
    run_release(&r);
    /* What has no place at all is refused; the conversation goes on. */
    memset(input, 'x', 300);
    snprintf(input + 300, sizeof input - 300, "\nthe sea\n");
    r = CHAT(input, "-m", model_path, "-n", "4", "-c", "96", "--json");
    assert_int_equal(r.exit_code, 0);
    assert_non_null(strstr(r.err, "chat: the message is too long"));
    assert_non_null(strchr(r.out, '\n'));
    assert_string_equal(strchr(r.out, '\n'), "\n"); /* one answer */
    run_release(&r);
}

/* Ctrl-C while an answer comes: it would have 30,000 tokens, of a model that never ends. */
static void test_interrupt(void **state)
{
    (void)state;
    int in[2], out[2];
    char errors[96], text[4096];
    snprintf(errors, sizeof errors, "%s/stderr", folder);
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    assert_int_equal(posix_spawn_file_actions_init(&actions), 0);
    posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, errors, O_WRONLY | O_CREAT | O_TRUNC,
                                     0600);
    const char *words[] = {program, "model", "chat",   "-m", long_path,
                           "-n",    "30000", "--temp", "0",  NULL};
    pid_t child;
    int status = 0;
    assert_int_equal(
        posix_spawn(&child, program, &actions, NULL, (char **)(uintptr_t)words, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    assert_int_equal(write(in[1], "the sea\n", 8), 8);
    assert_true(read(out[0], text, 1) == 1); /* the answer has begun */
    assert_int_equal(kill(child, SIGINT), 0);
    size_t bytes = 1;
    char last = text[0];
    /* The answer's end; the program waits for the next message then. */
    for (ssize_t n; last != '\n' && (n = read(out[0], text, sizeof text)) > 0; bytes += (size_t)n)
        last = text[n - 1];
    assert_int_equal(last, '\n');
    close(in[1]); /* Ctrl-D */
    assert_int_equal(waitpid(child, &status, 0), child);
    close(out[0]);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    uint8_t *said = NULL;
    size_t n_said = 0;
    CHECK_OK(sh_file_read(errors, 4096, &said, &n_said, err));
    assert_non_null(memmem(said, n_said, "chat: stopped\n", 14));
    assert_in_range(bytes, 2, 29999);
    free(said);
    unlink(errors);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_how_it_runs), cmocka_unit_test(test_adapters),
        cmocka_unit_test(test_sampling),    cmocka_unit_test(test_stop),
        cmocka_unit_test(test_chat),        cmocka_unit_test(test_full_context),
        cmocka_unit_test(test_interrupt),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s PROGRAM\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
