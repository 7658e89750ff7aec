/*
 * Runs of shoal-train that are interrupted, killed, refused their disk or stopped early, and what
 * each kind of training writes. Nothing waits for a time: a process is killed once its metrics have
 * so many lines.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "shared/model/model.h"
#include "tests/trainer/program_run.h"

#define DEADLINE_MS 300000 /* for what takes under a second: it ends a test that would hang */
#define LORA        "lora --base model.gguf --data text --rank 4 --batch 4 --context 16 "
#define LONG        LORA "--steps 400 --warmup 2 --heldout text --heldout-every 50 "

typedef struct {
    uint8_t *bytes;
    size_t n;
} content;

static content read_file(const char *name)
{
    content c = {0};
    must_be_ok(sh_file_read(path_of(name), SIZE_MAX, &c.bytes, &c.n, &err));
    return c;
}

static void must_be_same(const char *a, const char *b)
{
    content x = read_file(a), y = read_file(b);
    assert_int_equal(x.n, y.n);
    assert_memory_equal(x.bytes, y.bytes, x.n);
    free(x.bytes);
    free(y.bytes);
}

static void write_text(const char *name, const char *text)
{
    must_be_ok(sh_file_write_atomic(path_of(name), text, strlen(text), &err));
}

static size_t lines_of(const char *name)
{
    uint8_t *bytes = NULL;
    size_t n = 0, lines = 0;
    sh_error none = {0};
    if (sh_file_read(path_of(name), SIZE_MAX, &bytes, &n, &none) != SH_OK)
        return 0;
    for (size_t i = 0; i < n; i++)
        lines += bytes[i] == '\n';
    free(bytes);
    return lines;
}

/* Metrics but for what a clock and the process decide. */
static void must_be_same_metrics(const char *a, const char *b)
{
    content x = read_file(a), y = read_file(b);
    char *at_x = NULL, *at_y = NULL;
    char *line_x = strtok_r((char *)x.bytes, "\n", &at_x);
    char *line_y = strtok_r((char *)y.bytes, "\n", &at_y);
    for (; line_x && line_y;
         line_x = strtok_r(NULL, "\n", &at_x), line_y = strtok_r(NULL, "\n", &at_y)) {
        static const char *const of_time[] = {"seconds", "rss_bytes"};
        json_t *p = json_loads(line_x, 0, NULL), *q = json_loads(line_y, 0, NULL);
        for (size_t i = 0; i < SH_COUNT(of_time); i++) {
            assert_int_equal(json_object_del(p, of_time[i]), 0);
            assert_int_equal(json_object_del(q, of_time[i]), 0);
        }
        if (!json_equal(p, q))
            fail_msg("%s: %s\n%s: %s", a, line_x, b, line_y);
        json_decref(p);
        json_decref(q);
    }
    assert_null(line_x);
    assert_null(line_y);
    free(x.bytes);
    free(y.bytes);
}

/* Starts it, and sends the signal once its metrics have so many lines; its wait status. */
static int stop_at(const char *arguments, const char *metrics, size_t lines, int number)
{
    char command[1024];
    snprintf(command, sizeof command, "cd '%s' && exec '%s' %s >/dev/null 2>stderr", dir, program,
             arguments);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    int status = 0;
    const uint64_t deadline = sh_clock_mono_ms() + DEADLINE_MS;
    while (lines_of(metrics) < lines && sh_clock_mono_ms() < deadline)
        if (waitpid(child, &status, WNOHANG) == child) {
            content said = read_file("stderr");
            fail_msg("'%s' ended before it was seen at line %zu, with %d: %s", arguments, lines,
                     status, (const char *)said.bytes);
        }
    assert_int_equal(kill(child, number), 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void must_have_said(const char *part)
{
    content c = read_file("stderr");
    if (!strstr((const char *)c.bytes, part))
        fail_msg("no '%s' in: %s", part, (const char *)c.bytes);
    free(c.bytes);
}

static void test_model(void **state)
{
    (void)state;
    json_decref(run_json(FULL "--steps 30 --type F32 --out model.gguf --json"));
    json_decref(run_json(FULL "--steps 2 --seed 9 --type F32 --out stranger.gguf --json"));
    json_decref(run_json(LONG "--out whole --json"));
    assert_int_equal(lines_of("whole/metrics.jsonl"), 400);
    assert_false(sh_file_exists(path_of("whole/checkpoint")));
}

static void test_interrupted(void **state)
{
    (void)state;
    int status =
        stop_at(LONG "--out stopped --checkpoint-every 0", "stopped/metrics.jsonl", 7, SIGTERM);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 1);
    must_have_said("--resume");
    assert_true(sh_file_exists(path_of("stopped/checkpoint")));

    /* What would make another result is refused by name, and the file stays. */
    expect_error(LONG "--out stopped", 2, "--resume goes on with it");
    expect_error(LONG "--out stopped --resume --lr 0.001", 2, "lr");
    expect_error(LONG "--out stopped --resume --data model.gguf", 2, "model.gguf");
    write_text("text2", "another text, which is long enough for one of the sequences, or for two");
    expect_error(LONG "--out stopped --resume --data text2", 2, "data");
    expect_error(LONG "--out stopped --resume --base stranger.gguf", 2, "checkpoint");

    status = stop_at(LONG "--out stopped --resume --checkpoint-every 0 --threads 2",
                     "stopped/metrics.jsonl", 60, SIGTERM);
    assert_true(WIFEXITED(status));
    json_t *j = run_json(LONG "--out stopped --resume --json");
    assert_true(number_of(j, "resumed_step") >= 60);
    json_decref(j);
    must_be_same("stopped/adapter.gguf", "whole/adapter.gguf");
    must_be_same_metrics("stopped/metrics.jsonl", "whole/metrics.jsonl");
    assert_false(sh_file_exists(path_of("stopped/checkpoint")));
}

static void test_killed(void **state)
{
    (void)state;
    static const size_t at[] = {1, 5, 40, 90};
    for (size_t i = 0; i < SH_COUNT(at); i++) {
        char arguments[512];
        snprintf(arguments, sizeof arguments,
                 LONG "--out killed --resume --checkpoint-every 0.000001 --threads %zu", 1 + i % 2);
        const int status = stop_at(arguments, "killed/metrics.jsonl", at[i], SIGKILL);
        assert_true(WIFSIGNALED(status));
    }
    json_t *j = run_json(LONG "--out killed --resume --json");
    assert_true(number_of(j, "resumed_step") > 0);
    json_decref(j);
    must_be_same("killed/adapter.gguf", "whole/adapter.gguf");
    must_be_same_metrics("killed/metrics.jsonl", "whole/metrics.jsonl");
}

/* A limit of file sizes stands for a full disk: blocks of 512 bytes in sh. */
static void test_full_disk(void **state)
{
    (void)state;
    char command[1024];
    (void)stop_at(LONG "--out disk --checkpoint-every 0.000001", "disk/metrics.jsonl", 5, SIGTERM);
    content before = read_file("disk/checkpoint");
    snprintf(command, sizeof command,
             "cd '%s' && ulimit -f 8 && '%s' " LONG
             "--out disk --resume --checkpoint-every 0.000001 --metrics m >/dev/null 2>stderr",
             dir, program);
    const int status = system(command);
    assert_true(WIFEXITED(status));
    assert_true(WEXITSTATUS(status) == 1 || WEXITSTATUS(status) == 2);
    must_have_said("disk/checkpoint");
    content after = read_file("disk/checkpoint");
    assert_int_equal(after.n, before.n);
    assert_memory_equal(after.bytes, before.bytes, before.n);
    free(before.bytes);
    free(after.bytes);
    json_decref(run_json(LONG "--out disk --resume --json"));
    must_be_same("disk/adapter.gguf", "whole/adapter.gguf");
}

static void test_samples(void **state)
{
    (void)state;
    write_text("samples.jsonl", "{\"prompt\": \"the quick\", \"completion\": \" fox\"}\n\n"
                                "{\"text\": \"the lazy dog and the cat\"}\n");
    write_text("prompted.jsonl", "{\"prompt\": \"the quick brown\", \"completion\": \" fox\"}\n");
    write_text("texts.jsonl", "{\"text\": \"the quick brown fox\"}\n");
#define SAMPLES "lora --base model.gguf --rank 4 --context 48 --steps 3 --out samples --json "
    json_t *mixed = run_json(SAMPLES "--data samples.jsonl");
    json_t *masked = run_json(SAMPLES "--data prompted.jsonl");
    json_t *open = run_json(SAMPLES "--data texts.jsonl");
    const json_t *counts = json_object_get(mixed, "data");
    must_be_near(number_of(counts, "documents"), 2, 0);
    assert_true(number_of(counts, "padding") > 0);
    counts = json_object_get(masked, "data"); /* the prompt is no target */
    const double targets = number_of(counts, "targets");
    assert_true(targets < number_of(json_object_get(open, "data"), "targets"));
    must_be_near(number_of(masked, "tokens_seen"), 3 * targets, 0);
    json_decref(mixed);
    json_decref(masked);
    json_decref(open);
#undef SAMPLES
    write_text("wrong.jsonl", "{\"text\": \"the cat\"}\n{\"prompt\": \"the\"}\n");
    expect_error(LORA "--data wrong.jsonl --out x.gguf", 2, "wrong.jsonl:2");
}

static void test_heldout(void **state)
{
    (void)state;
    char lines[4096] = "";
    for (int i = 0; i < 40; i++)
        snprintf(lines + strlen(lines), sizeof lines - strlen(lines),
                 "{\"text\": \"the cat number %d sat over the lazy dog\"}\n", i);
    write_text("many.jsonl", lines);
#define MANY "lora --base model.gguf --data many.jsonl --context 48 --batch 4 --rank 4 --json "
    json_t *j = run_json(MANY "--heldout-share 0.25 --steps 6 --out share");
    const double all = number_of(json_object_get(j, "data"), "targets");
    const double out = number_of(json_object_get(j, "data"), "heldout_targets");
    assert_true(out > 0 && out < all / 2);
    assert_true(isfinite(number_of(j, "heldout_loss")));
    json_decref(j);
    /* What is not trained gets no better: it stops after the first and three more. */
    j = run_json(MANY "--heldout-share 0.25 --steps 200 --lr 0 --heldout-every 1 "
                      "--patience 3 --out early");
    const double steps = number_of(j, "steps"), best = number_of(j, "heldout_best_step");
    must_be_near(best, 1, 0);
    must_be_near(steps, 4, 0);
    assert_int_equal(lines_of("early/metrics.jsonl"), (size_t)steps);
    json_decref(j);
#undef MANY
    expect_error(LORA "--heldout-share 0.1 --out x.gguf", 2, "--heldout");
    expect_error(LORA "--patience 2 --out x.gguf", 2, "--patience");
}

static void test_outputs(void **state)
{
    (void)state;
    json_decref(run_json(LORA "--steps 20 --quantize-aware Q8_0 --out qat.gguf "
                              "--merged merged.gguf --peft qat-peft --json"));
    json_t *aware = run_json("eval --model model.gguf --lora qat.gguf --quantize-aware Q8_0 "
                             "--data text --context 16 --json");
    json_t *merged = run_json("eval --model merged.gguf --data text --context 16 --json");
    must_be_near(number_of(merged, "mean_nll"), number_of(aware, "mean_nll"), 1e-5);
    json_decref(aware);
    json_decref(merged);
    expect_error(LORA "--start qat.gguf --base stranger.gguf --out x.gguf", 2, "another base");
    expect_error("eval --model stranger.gguf --lora qat.gguf --data text --context 16", 2,
                 "another base");
    expect_error(LORA "--variant dora --out x.gguf", 2, "dora");
    expect_error(LORA "--targets q,output --out x.gguf", 2, "tied");
    expect_error(LORA "--ranks q=2.5 --out x.gguf", 2, "whole number");
    expect_error(LORA "--targets v --ranks q=2 --out x.gguf", 2, "--targets");
    expect_error(LORA "--out x.gguf --merged x.gguf", 2, "written twice");
    expect_error(LORA "--out x.gguf --peft text", 2, "not a folder");
    expect_error(LORA "--out x.gguf --memory-max 1M", 2, "are needed at least");
    expect_error(FULL "--steps 1 --width 40 --type Q8_0 --out x.gguf", 2, "Q8_0");
    expect_error("eval --model model.gguf --data text word", 2, "'word' is no option");
    assert_false(sh_file_exists(path_of("x.gguf")));
}

static void test_config(void **state)
{
    (void)state;
    write_text("run.yaml", "base: model.gguf\ndata: text\ncontext: 16\nsteps: 5\nbatch: 3\n");
    json_t *j = run_json("lora --config run.yaml --steps 2 --out configured --json");
    must_be_near(number_of(j, "steps"), 2, 0);
    must_be_near(number_of(j, "batch"), 3, 0);
    json_decref(j);
    write_text("wrong.yaml", "base: model.gguf\nstepz: 5\n");
    expect_error("lora --config wrong.yaml --out x.gguf", 2, "wrong.yaml:2: unknown key 'stepz'");
}

static void test_kinds(void **state)
{
    (void)state;
    static const char *const keys[] = {"tokens_per_s", "peak_rss_bytes", "loss_first",
                                       "loss_last",    "heldout_loss",   "threads"};
    json_t *j = run_json(LORA "--steps 6 --heldout text --state-8bit --accumulate 2 --dropout 0.1 "
                              "--alternate 2 --ranks q=2 --alphas down=4 --out kinds --json");
    for (size_t i = 0; i < SH_COUNT(keys); i++)
        (void)number_of(j, keys[i]);
    assert_true(json_is_string(json_object_get(j, "blas_core")));
    json_decref(j);
#define STUDENT                                                                                    \
    "distill --teacher model.gguf --data text --width 16 --layers 1 --heads 2 --kv-heads 1 "       \
    "--ffn 32 --context 16 --batch 4 --warmup 2 --lr 0.01 --distill-weight 1 --type F32 --json "
    json_t *first = run_json(STUDENT "--steps 1 --out student.gguf");
    json_t *last = run_json(STUDENT "--steps 60 --out student.gguf");
    assert_true(number_of(last, "kl_last") < 0.8 * number_of(first, "kl_last"));
    json_t *on = run_json("full --init student.gguf --data text --context 16 --batch 4 --steps 2 "
                          "--warmup 0 --lr 0.0001 --out on.gguf --json");
    must_be_near(number_of(on, "loss_first"), number_of(last, "cross_entropy_last"), 0.5);
    json_decref(first);
    json_decref(last);
    json_decref(on);
#undef STUDENT
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model), /* leaves what others use */
        cmocka_unit_test(test_interrupted), cmocka_unit_test(test_killed),
        cmocka_unit_test(test_full_disk),   cmocka_unit_test(test_samples),
        cmocka_unit_test(test_heldout),     cmocka_unit_test(test_outputs),
        cmocka_unit_test(test_config),      cmocka_unit_test(test_kinds),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s SHOAL-TRAIN\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, prepare, clean);
}
