/*
 * `shoal model …` as a script sees it: standard output, standard error and exit code of good and
 * bad uses. Models are made here; argv[1] is the program.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/file.h"
#include "shared/base/json.h"
#include "tests/cli/run.h"
#include "tests/model/naive.h"
#include "tests/model/util.h"

static const char *program;
static char folder[] = "/tmp/shoal-cli-XXXXXX";
static char model_path[64], q8_path[64], adapter_path[64], foreign_path[64], cut_path[64];
static char text_path[64], out_path[64], wrong_path[64];

static run_result run(const char *input, const char *const *words)
{
    return run_program(program, words, input, input != NULL ? strlen(input) : 0);
}

#define RUN(input, ...) run(input, (const char *const[]){__VA_ARGS__, NULL})

/* Whole texts, with @M and so on for the paths above. */
static void expand(const char *pattern, char *out, size_t bytes)
{
    const struct {
        char letter;
        const char *path;
    } names[] = {{'M', model_path}, {'Q', q8_path},   {'A', adapter_path}, {'F', foreign_path},
                 {'C', cut_path},   {'T', text_path}, {'O', out_path},     {'W', wrong_path}};
    size_t n = 0;
    for (const char *p = pattern; *p != '\0' && n + 1 < bytes; p++) {
        const char *path = NULL;
        for (size_t i = 0; *p == '@' && i < SH_COUNT(names); i++)
            if (p[1] == names[i].letter)
                path = names[i].path;
        if (path == NULL) {
            out[n++] = *p;
            continue;
        }
        n += (size_t)snprintf(out + n, bytes - n, "%s", path);
        p++;
    }
    out[SH_MIN(n, bytes - 1)] = '\0';
}

/* out NULL: anything. */
static void expect(run_result r, int exit_code, const char *out, const char *err)
{
    char expected_out[4096] = "", expected_err[4096];
    expand(out != NULL ? out : "", expected_out, sizeof expected_out);
    expand(err, expected_err, sizeof expected_err);
    if (r.exit_code != exit_code || strcmp(r.err, expected_err) != 0 ||
        (out != NULL && strcmp(r.out, expected_out) != 0))
        fail_msg("exit code %d, expected %d\nstdout \"%s\"\nexpected \"%s\"\nstderr \"%s\"\n"
                 "expected \"%s\"",
                 r.exit_code, exit_code, r.out, out != NULL ? expected_out : "(any)", r.err,
                 expected_err);
    run_release(&r);
}

static void expect_ok(run_result *r)
{
    if (r->exit_code != 0 || r->n_err != 0)
        fail_msg("exit code %d, stderr \"%s\"", r->exit_code, r->err);
}

static json_t *expect_json(run_result r)
{
    expect_ok(&r);
    json_error_t where;
    json_t *value = json_loads(r.out, JSON_DECODE_ANY, &where);
    if (value == NULL)
        fail_msg("no JSON (%s): \"%s\"", where.text, r.out);
    run_release(&r);
    return value;
}

static void path_in(char out[64], const char *name)
{
    snprintf(out, 64, "%s/%s", folder, name);
}

static int make_files(void **state)
{
    (void)state;
    assert_non_null(mkdtemp(folder));
    path_in(model_path, "tiny.gguf");
    path_in(q8_path, "tiny-q8.gguf");
    path_in(adapter_path, "adapter.gguf");
    path_in(foreign_path, "foreign.gguf");
    path_in(cut_path, "cut.gguf");
    path_in(text_path, "text.txt");
    path_in(out_path, "out.gguf");
    path_in(wrong_path, "other-base.gguf");
    tiny_options o = tiny_defaults(12);
    o.untied = true; /* a tied one says its last token again and again */
    CHECK_OK(tiny_write(&o, model_path, err));
    o.architecture = "mamba";
    CHECK_OK(tiny_write(&o, foreign_path, err));
    o = tiny_defaults(12);
    o.ffn = 64;
    CHECK_OK(tiny_write(&o, wrong_path, err));
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
    uint8_t *whole = NULL;
    size_t n = 0;
    CHECK_OK(sh_file_read(model_path, 16u << 20, &whole, &n, err));
    CHECK_OK(sh_file_write_atomic(cut_path, whole, n / 2, err));
    free(whole);
    static const char text[] = "the sea and the other things in it are all that there is of the "
                               "old ones and a few of the rest that we have seen there in winter\n";
    CHECK_OK(sh_file_write_atomic(text_path, text, sizeof text - 1, err));
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    const char *paths[] = {model_path, q8_path,   adapter_path, foreign_path,
                           cut_path,   text_path, out_path,     wrong_path};
    for (size_t i = 0; i < SH_COUNT(paths); i++)
        unlink(paths[i]);
    return rmdir(folder);
}

static void test_usage(void **state)
{
    (void)state;
    run_result r = RUN(NULL, "--help");
    expect_ok(&r);
    assert_non_null(strstr(r.out, "model"));
    run_release(&r);
    r = RUN(NULL, "model", "--help");
    expect_ok(&r);
    assert_non_null(strstr(r.out, "perplexity"));
    run_release(&r);
    static const char *const commands[] = {"inspect", "perplexity", "tokenize", "generate",
                                           "quantize"};
    for (size_t i = 0; i < SH_COUNT(commands); i++) {
        r = RUN(NULL, "model", commands[i], "--help");
        expect_ok(&r);
        assert_non_null(strstr(r.out, "--model FILE"));
        run_release(&r);
        char err[256];
        snprintf(err, sizeof err, "shoal: -m FILE is missing (see shoal model %s --help)\n",
                 commands[i]);
        expect(RUN(NULL, "model", commands[i]), 2, "", err);
    }
    r = RUN(NULL, "--version");
    expect_ok(&r);
    assert_int_equal(strncmp(r.out, "shoal ", 6), 0);
    run_release(&r);
    expect(RUN(NULL, "modle"), 2, "", "shoal: 'modle' is no command of shoal (see shoal --help)\n");
    expect(RUN(NULL, "model", "inspct"), 2, "",
           "shoal: 'inspct' is no command of shoal model (see shoal model --help)\n");
    expect(RUN(NULL, "model", "inspect", "-m", model_path, "more"), 2, "",
           "shoal: 'more' is no option (see shoal model inspect --help)\n");
    r = RUN(NULL, "model");
    assert_int_equal(r.exit_code, 2);
    assert_int_equal(r.n_out, 0);
    run_release(&r);
    r = RUN(NULL, "model", "inspect", "--modle", "x");
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "--model"));
    run_release(&r);
    r = RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c", "3");
    assert_int_equal(r.exit_code, 2);
    run_release(&r);
}

/* Every command that opens a model says the same of a bad one. */
static void test_bad_models(void **state)
{
    (void)state;
    static const char *const commands[] = {"inspect", "perplexity", "generate"};
    for (size_t i = 0; i < SH_COUNT(commands); i++) {
        const char *extra = i == 0 ? "--json" : i == 1 ? "-f" : "-p";
        const char *value = i == 0 ? NULL : text_path;
        expect(RUN(NULL, "model", commands[i], "-m", "/nowhere/x.gguf", extra, value), 2, "",
               "shoal: cannot open '/nowhere/x.gguf': No such file or directory\n");
        expect(RUN(NULL, "model", commands[i], "-m", foreign_path, extra, value), 2,
               i == 0 ? NULL : "",
               "shoal: @F: architecture 'mamba' is not supported (llama, qwen2 and qwen3 are)\n");
        run_result r = RUN(NULL, "model", commands[i], "-m", cut_path, extra, value);
        assert_int_equal(r.exit_code, 2);
        assert_non_null(strstr(r.err, "truncated"));
        assert_int_equal(r.n_out, 0);
        run_release(&r);
        r = RUN(NULL, "model", commands[i], "-m", text_path, extra, value);
        assert_int_equal(r.exit_code, 2);
        assert_non_null(strstr(r.err, text_path));
        run_release(&r);
    }
    expect(RUN(NULL, "model", "generate", "-m", adapter_path, "-p", "x"), 2, "",
           "shoal: @A: it is an adapter, not a model\n");
    run_result r =
        RUN(NULL, "model", "generate", "-m", wrong_path, "-p", "x", "--lora", adapter_path);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, adapter_path));
    assert_int_equal(r.n_out, 0);
    run_release(&r);
}

static void test_inspect(void **state)
{
    (void)state;
    json_t *o = expect_json(RUN(NULL, "model", "inspect", "-m", model_path, "--json"));
    assert_string_equal(json_string_value(json_object_get(o, "kind")), "model");
    assert_true(json_is_true(json_object_get(o, "runs")));
    json_t *config = json_object_get(o, "config");
    assert_int_equal(json_integer_value(json_object_get(config, "kv_heads")), 2);
    json_t *tokenizer = json_object_get(o, "tokenizer");
    assert_string_equal(json_string_value(json_object_get(tokenizer, "kind")), "llama");
    assert_string_equal(json_string_value(json_object_get(tokenizer, "chat")), "plain");
    assert_int_equal(json_integer_value(json_object_get(tokenizer, "tokens")), tiny_vocab());
    assert_int_equal(json_array_size(json_object_get(o, "tensors")), 3 + 2 * 9);
    json_t *first = json_array_get(json_object_get(o, "tensors"), 0);
    assert_string_equal(json_string_value(json_object_get(first, "name")), "token_embd.weight");
    assert_int_equal(json_integer_value(json_array_get(json_object_get(first, "shape"), 0)),
                     tiny_vocab());
    json_decref(o);
    o = expect_json(RUN(NULL, "model", "inspect", "-m", adapter_path, "--json"));
    assert_string_equal(json_string_value(json_object_get(o, "kind")), "adapter");
    assert_null(json_object_get(o, "runs"));
    json_decref(o);
    run_result r = RUN(NULL, "model", "inspect", "-m", model_path, "--tensors");
    expect_ok(&r);
    assert_non_null(strstr(r.out, "2 layers, width 64, 4 heads on 2 of size 16, ffn 96"));
    assert_non_null(strstr(r.out, "general.architecture = llama"));
    assert_non_null(strstr(r.out, "tokenizer   llama, "));
    assert_non_null(strstr(r.out, "chat template: plain"));
    assert_non_null(strstr(r.out, "blk.1.ffn_down.weight  64 x 96"));
    run_release(&r);
}

static void test_tokenize(void **state)
{
    (void)state;
    expect(RUN("the sea", "model", "tokenize", "-m", model_path, "--json"), 0,
           "[270,271,305,301]\n", "");
    expect(RUN("the", "model", "tokenize", "-m", model_path), 0, "270\n", "");
    expect(RUN("", "model", "tokenize", "-m", model_path, "--json"), 0, "[]\n", "");
    expect(RUN("</s>", "model", "tokenize", "-m", model_path, "--json", "--special"), 0, "[2]\n",
           "");
    expect(RUN("\xff", "model", "tokenize", "-m", model_path, "--json"), 0, "[259,258]\n", "");
}

static double perplexity_with(const char *lora, const char *more)
{
    json_t *o =
        expect_json(RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c", "16",
                        "--json", "--lora", lora, more ? "--lora" : NULL, more));
    const double perplexity = json_number_value(json_object_get(o, "perplexity"));
    json_decref(o);
    return perplexity;
}

/* An adapter, and two parts of it. */
static void test_perplexity_of_adapters(void **state)
{
    (void)state;
    char half[SH_PATH_BYTES + 8];
    snprintf(half, sizeof half, "%s=0.5", adapter_path);
    const double whole = perplexity_with(adapter_path, NULL), halves = perplexity_with(half, half);
    if (!(fabs(whole - halves) <= 1e-3 * whole))
        fail_msg("perplexity %.9g with the adapter, %.9g with two halves", whole, halves);
    assert_true(fabs(whole - perplexity_with(half, NULL)) > 1e-6 * whole);
}

static void test_perplexity(void **state)
{
    (void)state;
    json_t *o = expect_json(
        RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c", "16", "--json"));
    const double ours = json_number_value(json_object_get(o, "perplexity"));
    const json_int_t n = json_integer_value(json_object_get(o, "tokens"));
    assert_int_equal(json_integer_value(json_object_get(o, "chunks")), n / 16);
    assert_int_equal(json_integer_value(json_object_get(o, "scored_tokens")), n / 16 * 7);
    json_decref(o);

    /* By the protocol, with the naive forward pass. */
    sh_model *model = NULL;
    uint8_t *text = NULL;
    int32_t *tokens = NULL;
    size_t bytes = 0, n_tokens = 0, scored = 0;
    CHECK_OK(sh_model_open(model_path, &model, err));
    CHECK_OK(sh_file_read(text_path, 1u << 20, &text, &bytes, err));
    CHECK_OK(sh_tokenize(model->tokenizer, (char *)text, bytes - 1, SH_TOKENIZE_SPECIAL, &tokens,
                         &n_tokens, err));
    assert_int_equal(n_tokens, n);
    const uint32_t vocab = model->config.vocab;
    double *logits = calloc(16 * vocab, sizeof *logits), nll = 0;
    assert_non_null(logits);
    for (size_t at = 0; at + 16 <= n_tokens; at += 16) {
        naive_forward(model, NULL, tokens + at, 16, logits);
        for (size_t i = 8; i + 1 < 16; i++, scored++) {
            double sum = 0;
            for (uint32_t v = 0; v < vocab; v++)
                sum += exp(logits[i * vocab + v] - logits[i * vocab + (size_t)tokens[at + i + 1]]);
            nll += log(sum);
        }
    }
    const double expected = exp(nll / (double)scored);
    if (!(fabs(ours - expected) <= 1e-4 * expected))
        fail_msg("perplexity %.9g, expected %.9g", ours, expected);
    free(logits);
    free(tokens);
    free(text);
    sh_model_close(&model);
}

static void test_perplexity_of_threads_and_adapter(void **state)
{
    (void)state;
    run_result one =
        RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c", "8", "--json");
    run_result three = RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c",
                           "8", "--json", "-t", "3");
    run_result adapted = RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c",
                             "8", "--json", "--lora", adapter_path);
    expect_ok(&one);
    expect_ok(&three);
    expect_ok(&adapted);
    assert_string_equal(one.out, three.out);
    assert_string_not_equal(one.out, adapted.out);
    run_release(&one);
    run_release(&three);
    run_release(&adapted);
    expect(RUN("the sea\n", "model", "perplexity", "-m", model_path, "-f", "-", "-c", "64"), 2, "",
           "shoal: -: 4 tokens are too few for one chunk of 64\n");
    run_result r = RUN(NULL, "model", "perplexity", "-m", model_path, "-f", text_path, "-c", "65");
    assert_int_equal(r.exit_code, 2);
    assert_int_equal(r.n_out, 0);
    run_release(&r);
}

static void test_generate(void **state)
{
    (void)state;
    run_result a = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--temp", "0", "--seed", "1");
    run_result b = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--temp", "0", "--seed", "2");
    run_result c = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--seed", "1");
    run_result d = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--seed", "2");
    run_result e = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--seed", "1");
    run_result f = RUN(NULL, "model", "generate", "-m", model_path, "-p", "the sea", "-n", "20",
                       "--temp", "0", "--lora", adapter_path);
    expect_ok(&a);
    expect_ok(&f);
    assert_string_equal(a.out, b.out); /* greedy has no seed */
    assert_string_equal(c.out, e.out);
    assert_string_not_equal(c.out, d.out);
    assert_string_not_equal(a.out, f.out);
    run_result *all[] = {&a, &b, &c, &d, &e, &f};
    for (size_t i = 0; i < SH_COUNT(all); i++)
        run_release(all[i]);
    /* The tied model never says its end token. */
    json_t *o = expect_json(RUN(NULL, "model", "generate", "-m", wrong_path, "-p", "the sea", "-n",
                                "100", "--temp", "0", "--json"));
    /* 4 tokens of prompt; the last token made needs no place: 61 in a context of 64. */
    assert_int_equal(json_array_size(json_object_get(o, "prompt_tokens")), 4);
    assert_string_equal(json_string_value(json_object_get(o, "stop")), "context");
    assert_int_equal(json_array_size(json_object_get(o, "tokens")), 61);
    json_decref(o);
    expect(RUN(NULL, "model", "generate", "-m", model_path, "-p", ""), 2, "",
           "shoal: -p PROMPT is empty and the model adds no BOS\n");
}

static void test_synth(void **state)
{
    (void)state;
    run_result r = RUN(NULL, "model", "synth", "--help");
    expect_ok(&r);
    assert_non_null(strstr(r.out, "--shape SHAPE"));
    run_release(&r);
    json_t *o = expect_json(RUN(NULL, "model", "synth", "--shape", "tiny-qwen3", "--type", "q8_0",
                                "-o", out_path, "--json"));
    assert_string_equal(json_string_value(json_object_get(o, "kind")), "model");
    json_decref(o);
    o = expect_json(RUN(NULL, "model", "inspect", "-m", out_path, "--check", "--json"));
    json_t *config = json_object_get(o, "config"), *memory = json_object_get(o, "memory");
    assert_string_equal(json_string_value(json_object_get(config, "architecture")), "qwen3");
    assert_true(json_integer_value(json_object_get(memory, "packed_bytes")) > 0);
    assert_int_equal(json_integer_value(json_object_get(memory, "kv_f16_bytes_1000_tokens")),
                     1000 * 2 * 2 * 32 * 2 * 2);
    json_decref(o);
    remove(out_path);
    r = RUN(NULL, "model", "synth", "--shape", "2m", "-o", out_path);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "tiny-qwen3"));
    run_release(&r);
    assert_false(sh_file_exists(out_path));
}

/* The rates are numbers of this machine: only that there are some, and what they are of. */
static void test_bench(void **state)
{
    (void)state;
    static const char *const positive[] = {"prefill_tokens_per_s",
                                           "decode_tokens_per_s",
                                           "decode_without_lora_tokens_per_s",
                                           "load_s",
                                           "first_token_s",
                                           "rss_bytes",
                                           "weight_bytes"};
    json_t *o = expect_json(RUN(NULL, "model", "bench", "-m", model_path, "-p", "8", "-n", "4",
                                "-r", "3", "-t", "2", "--lora", adapter_path, "--json"));
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++)
        if (!(json_number_value(json_object_get(o, positive[i])) > 0))
            fail_msg("%s is not above 0", positive[i]);
    assert_int_equal(json_array_size(json_object_get(o, "decode_samples")), 3);
    assert_int_equal(json_integer_value(json_object_get(o, "threads")), 2);
    assert_true(json_is_string(json_object_get(o, "kernel")));
    json_decref(o);
    run_result r = RUN(NULL, "model", "bench", "-m", model_path, "-p", "8", "-n", "4", "--pack",
                       "none", "--kernel", "portable");
    expect_ok(&r);
    assert_non_null(strstr(r.out, "kernel portable, 1 thread, weights in place"));
    run_release(&r);
    r = RUN(NULL, "model", "bench", "-m", model_path, "-n", "4096");
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "over the model's context"));
    run_release(&r);
}

static void test_quantize(void **state)
{
    (void)state;
    json_t *o = expect_json(RUN(NULL, "model", "quantize", "-m", model_path, "--type", "Q8_0", "-o",
                                q8_path, "--json"));
    json_t *losses = json_object_get(o, "tensors");
    assert_int_equal(json_array_size(losses), 3 + 2 * 9);
    const double rms = json_real_value(json_object_get(json_array_get(losses, 0), "rms_error"));
    assert_true(rms > 1e-4 && rms < 0.02); /* of 8 bits: about 0.6 % */
    json_decref(o);
    o = expect_json(RUN(NULL, "model", "inspect", "-m", q8_path, "--json"));
    json_t *first = json_array_get(json_object_get(o, "tensors"), 0);
    assert_string_equal(json_string_value(json_object_get(first, "type")), "Q8_0");
    assert_true(json_is_true(json_object_get(o, "runs")));
    json_decref(o);
    run_result r =
        RUN(NULL, "model", "quantize", "-m", model_path, "--type", "Q9_9", "-o", out_path);
    assert_int_equal(r.exit_code, 2);
    assert_non_null(strstr(r.err, "Q9_9"));
    run_release(&r);
    assert_false(sh_file_exists(out_path));
    r = RUN(NULL, "model", "quantize", "-m", cut_path, "--type", "Q8_0", "-o", out_path);
    assert_int_equal(r.exit_code, 2);
    run_release(&r);
    assert_false(sh_file_exists(out_path));
    r = RUN(NULL, "model", "quantize", "-m", model_path, "--type", "Q8_0", "-o",
            "/nowhere/at/all.gguf");
    assert_int_not_equal(r.exit_code, 0);
    assert_non_null(strstr(r.err, "/nowhere/at/all.gguf"));
    run_release(&r);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_usage),
        cmocka_unit_test(test_bad_models),
        cmocka_unit_test(test_inspect),
        cmocka_unit_test(test_tokenize),
        cmocka_unit_test(test_perplexity),
        cmocka_unit_test(test_perplexity_of_threads_and_adapter),
        cmocka_unit_test(test_perplexity_of_adapters),
        cmocka_unit_test(test_generate),
        cmocka_unit_test(test_quantize),
        cmocka_unit_test(test_synth),
        cmocka_unit_test(test_bench),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s PROGRAM\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
