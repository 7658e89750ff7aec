/*
 * What is wrong with a command line of `shoal model …` or with the files that it names: an exit
 * code, nothing on standard output, one line on standard error that says what and where; never a
 * crash, and never memory in proportion to what a header claims. Files are made here; argv[1] is
 * the program.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <math.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "tests/cli/run.h"
#include "tests/model/util.h"

#define WORDS_MAX 20
#define BILLION   1000000000u
#define HALF_NAN  0x7e00u
#define BYTES_MAX (64u << 20)

static const char *program;
static char folder[] = "/tmp/shoal-bad-XXXXXX";

/* The files, by the letter that stands for them after '@' in a word. */
typedef enum { MODEL, QUANTIZED, ADAPTER, TEXT, EMPTY, FOLDER, PIPE, OUT, BAD, N_FILES } file_id;
static const char *const file_names[N_FILES] = {
    [MODEL] = "model.gguf", [QUANTIZED] = "q8.gguf", [ADAPTER] = "adapter.gguf",
    [TEXT] = "text.txt",    [EMPTY] = "empty.gguf",  [FOLDER] = "folder",
    [PIPE] = "pipe",        [OUT] = "out.gguf",      [BAD] = "bad.gguf"};
static const char file_letters[N_FILES + 1] = "MQATEDPOB";

static const char *path_of(const char *name)
{
    static char path[128]; /* until the next call */
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_bytes(const char *name, const sh_buf *bytes, size_t n)
{
    CHECK_OK(sh_file_write_atomic(path_of(name), bytes->data, n, err));
}

static void encode_tiny(const tiny_options *options, sh_buf *out)
{
    sh_buf_clear(out);
    CHECK_OK(tiny_encode(options, out));
}

/* ---- running ---- */

static void expand(const char *pattern, char *out, size_t bytes)
{
    const char *letter = pattern[0] == '@' ? strchr(file_letters, pattern[1]) : NULL;
    if (letter != NULL && pattern[1] != '\0')
        snprintf(out, bytes, "%s/%s%s", folder, file_names[letter - file_letters], pattern + 2);
    else
        snprintf(out, bytes, "%s", pattern);
}

/* One line, which names the program and holds `part`. */
static void check(const run_result *r, int exit_code, const char *part, const char *what)
{
    const char *end = strchr(r->err, '\n');
    const bool one_line = end != NULL && end[1] == '\0' && strncmp(r->err, "shoal: ", 7) == 0;
    if (r->exit_code != exit_code || !one_line || r->n_out != 0 || strstr(r->err, part) == NULL)
        fail_msg("%s: exit code %d, expected %d; stderr \"%s\", expected one line with \"%s\"; "
                 "stdout \"%.200s\"",
                 what, r->exit_code, exit_code, r->err, part, r->out);
}

/* line: words with single spaces between, '' is an empty one. */
static run_result run_line(const char *before, const char *line)
{
    char words[WORDS_MAX][256];
    const char *args[WORDS_MAX + 4] = {NULL};
    size_t n_args = 0, n = 0;
    if (before != NULL) {
        args[n_args++] = "-c";
        args[n_args++] = before;
        args[n_args++] = program;
    }
    args[n_args++] = "model";
    for (const char *at = line; *at != '\0'; n++) {
        char word[128];
        const size_t length = strcspn(at, " ");
        assert_true(n < WORDS_MAX && length < sizeof word);
        snprintf(word, sizeof word, "%.*s", (int)length, at);
        expand(strcmp(word, "''") == 0 ? "" : word, words[n], sizeof words[n]);
        args[n_args++] = words[n];
        at += length + (at[length] == ' ');
    }
    return run_program(before != NULL ? "/bin/sh" : program, args, "", 0);
}

static void expect_error(const char *line, int exit_code, const char *part)
{
    run_result r = run_line(NULL, line);
    check(&r, exit_code, part, line);
    run_release(&r);
}

/* ---- files ---- */

static void make_files(void)
{
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    tiny_options o = tiny_defaults(3);
    encode_tiny(&o, &bytes);
    write_bytes(file_names[MODEL], &bytes, bytes.len);
    sh_model *model = util_open(&o);
    sh_adapter *adapter = util_adapter(model, 2, 1, 0.2f);
    sh_buf_clear(&bytes);
    CHECK_OK(sh_adapter_encode(adapter, &bytes, err));
    write_bytes(file_names[ADAPTER], &bytes, bytes.len);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    o.type = SH_TYPE_Q8_0;
    encode_tiny(&o, &bytes);
    write_bytes(file_names[QUANTIZED], &bytes, bytes.len);
    write_bytes(file_names[EMPTY], &bytes, 0);
    sh_buf_clear(&bytes);
    CHECK_OK(sh_buf_append(&bytes, "the sea and the other things\n", 29));
    write_bytes(file_names[TEXT], &bytes, bytes.len);
    assert_int_equal(mkdir(path_of(file_names[FOLDER]), 0700), 0);
    assert_int_equal(mkfifo(path_of(file_names[PIPE]), 0600), 0);
    sh_buf_release(&bytes);
}

static int setup(void **state)
{
    (void)state;
    if (mkdtemp(folder) == NULL)
        return -1;
    make_files();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_FILES; i++)
        if (i != FOLDER)
            unlink(path_of(file_names[i]));
    rmdir(path_of(file_names[FOLDER]));
    return rmdir(folder);
}

/* ---- a model file that is none, in every command that takes one ---- */

static const char *const uses[] = {
    "inspect -m ",
    "tokenize --text x -m ",
    "generate -p x -n 1 -m ",
    "chat -m ",
    "perplexity -f @T -m ",
    "bench -p 4 -n 4 -r 1 -m ",
    "quantize --type F16 -o @O -m ",
    "convert -i @A -o @D/peft -m ",
};

static void expect_of_all(const char *file, int exit_code, const char *part)
{
    for (size_t i = 0; i < SH_COUNT(uses); i++) {
        char line[128];
        snprintf(line, sizeof line, "%s%s", uses[i], file);
        expect_error(line, exit_code, part);
        assert_false(sh_file_exists(path_of(file_names[OUT])));
    }
}

static void test_what_is_no_model_file(void **state)
{
    (void)state;
    expect_of_all("@Mx", 2, "No such file or directory");
    expect_of_all("@D", 1, "Is a directory");
    expect_of_all("@E", 2, "truncated");
    expect_of_all("@T", 2, "not a GGUF file");
}

/* A file of `bytes` under a name of its own goes through every command. */
static void expect_of_bytes(const sh_buf *bytes, size_t n, int exit_code, const char *part)
{
    write_bytes(file_names[BAD], bytes, n);
    expect_of_all("@B", exit_code, part);
    unlink(path_of(file_names[BAD]));
}

static void put_u64(sh_buf *bytes, size_t at, uint64_t v)
{
    assert_true(at + sizeof v <= bytes->len);
    memcpy(bytes->data + at, &v, sizeof v);
}

static void test_headers_that_lie(void **state)
{
    (void)state;
    static const char name[] = "blk.1.ffn_norm.weight";
    const tiny_options o = tiny_defaults(3);
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    encode_tiny(&o, &bytes);
    expect_of_bytes(&bytes, bytes.len / 2, 2, "truncated");
    put_u64(&bytes, 8, BILLION);
    expect_of_bytes(&bytes, bytes.len, 2, "it claims 1000000000 tensors");
    encode_tiny(&o, &bytes);
    put_u64(&bytes, 16, BILLION);
    expect_of_bytes(&bytes, bytes.len, 2, "it claims 1000000000 keys");
    encode_tiny(&o, &bytes);
    /* name, u32 dimensions, u64 ne, u32 type, u64 offset */
    const uint8_t *at = memmem(bytes.data, bytes.len, name, sizeof name - 1);
    assert_non_null(at);
    put_u64(&bytes, (size_t)(at - bytes.data) + sizeof name - 1 + 16, 0);
    expect_of_bytes(&bytes, bytes.len, 2, "overlap");
    sh_buf_release(&bytes);
}

static void expect_of_runs(const sh_buf *bytes, const char *const *lines, size_t n,
                           const char *part)
{
    write_bytes(file_names[BAD], bytes, bytes->len);
    for (size_t i = 0; i < n; i++) {
        char line[256];
        snprintf(line, sizeof line, "%s -m @B", lines[i]);
        expect_error(line, 2, part);
    }
    unlink(path_of(file_names[BAD]));
}

static void test_a_vocabulary_without_byte_tokens(void **state)
{
    (void)state;
    static const char *const lines[] = {"tokenize --text x", "generate -p x", "chat",
                                        "perplexity -f @T", "bench -p 4 -n 4"};
    tiny_options o = tiny_defaults(3);
    o.token_from = "<0x41>";
    o.token_to = "<0xZZ>";
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    encode_tiny(&o, &bytes);
    expect_of_runs(&bytes, lines, SH_COUNT(lines), "byte");
    sh_buf_release(&bytes);
}

static const char *const runs[] = {"generate -p x -n 4", "generate -p x -n 4 --temp 0",
                                   "perplexity -f @T -c 8", "bench -p 4 -n 4 -r 1"};

/* Bytes of the first value of a tensor. */
static uint8_t *find_values(const sh_buf *bytes, const char *name)
{
    sh_gguf *gguf = NULL;
    CHECK_OK(sh_gguf_open_memory(bytes->data, bytes->len, "tiny", &gguf, err));
    const sh_gguf_tensor *t = sh_gguf_tensor_find(gguf, name);
    assert_non_null(t);
    const size_t at = (size_t)((const uint8_t *)t->data - bytes->data);
    sh_gguf_close(&gguf);
    return bytes->data + at;
}

static void test_weights_that_are_no_numbers(void **state)
{
    (void)state;
    static const char *const answers[] = {"generate -p x -n 4", "generate -p x -n 4 --temp 0"};
    static const char *const loss[] = {"perplexity -f @T -c 8"};
    const uint16_t half_nan = HALF_NAN;
    const float nan = NAN;
    tiny_options o = tiny_defaults(3);
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    o.type = SH_TYPE_Q8_0;
    encode_tiny(&o, &bytes); /* the first scale of a matrix */
    memcpy(find_values(&bytes, "blk.1.ffn_down.weight"), &half_nan, sizeof half_nan);
    expect_of_runs(&bytes, runs, SH_COUNT(runs), "tensor blk.1.ffn_down.weight: row 0");
    encode_tiny(&o, &bytes);
    memcpy(find_values(&bytes, "blk.1.ffn_norm.weight"), &nan, sizeof nan);
    expect_of_runs(&bytes, runs, SH_COUNT(runs), "tensor blk.1.ffn_norm.weight holds a NaN");
    o.type = SH_TYPE_F32;
    encode_tiny(&o, &bytes); /* a float matrix is not read before it is used */
    memcpy(find_values(&bytes, "blk.1.ffn_down.weight"), &nan, sizeof nan);
    expect_of_runs(&bytes, answers, SH_COUNT(answers), "logits are no numbers");
    expect_of_runs(&bytes, loss, SH_COUNT(loss), "not a finite number");
    sh_buf_release(&bytes);
}

/* ---- a context longer than memory ---- */

#define WIDE_LAYERS 16u /* each takes 16 GiB of cache in F32 */
#define WIDE_HEAD   65536u
#define WIDE_CACHE  ((uint64_t)WIDE_LAYERS * WIDE_HEAD * 2 * SH_CONTEXT_MAX * sizeof(float))

static void add_tensor(sh_gguf_writer *w, const char *name, uint64_t in, uint64_t out)
{
    const uint64_t ne[2] = {in, out};
    const sh_type type = out == 0 ? SH_TYPE_F32 : SH_TYPE_Q4_0;
    CHECK_OK(sh_gguf_writer_add_tensor(w, name, type, ne, out == 0 ? 1 : 2, NULL, err));
}

static void add_wide_tensors(sh_gguf_writer *w)
{
    add_tensor(w, "token_embd.weight", 32, tiny_vocab());
    add_tensor(w, "output_norm.weight", 32, 0);
    for (unsigned i = 0; i < WIDE_LAYERS; i++) {
        const struct {
            const char *part;
            uint64_t in, out;
        } tensors[] = {
            {"attn_norm", 32, 0},      {"ffn_norm", 32, 0},       {"attn_q", 32, WIDE_HEAD},
            {"attn_k", 32, WIDE_HEAD}, {"attn_v", 32, WIDE_HEAD}, {"attn_output", WIDE_HEAD, 32},
            {"ffn_gate", 32, 32},      {"ffn_up", 32, 32},        {"ffn_down", 32, 32}};
        for (size_t k = 0; k < SH_COUNT(tensors); k++) {
            char name[64];
            snprintf(name, sizeof name, "blk.%u.%s.weight", i, tensors[k].part);
            add_tensor(w, name, tensors[k].in, tensors[k].out);
        }
    }
}

/* Width 32 and one head of 65,536: a small file, a huge cache. */
static void write_wide(const char *path)
{
    static const uint8_t zeros[1u << 16];
    tiny_options o = tiny_defaults(3);
    o.layers = WIDE_LAYERS;
    sh_buf bytes;
    sh_gguf *keys = NULL;
    sh_gguf_writer *w = NULL;
    sh_gguf_stream *stream = NULL;
    sh_buf_init(&bytes, BYTES_MAX);
    encode_tiny(&o, &bytes);
    CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &keys, err));
    CHECK_OK(sh_gguf_writer_create(&w, err));
    CHECK_OK(sh_gguf_writer_copy_keys(w, keys, NULL, err));
    const struct {
        const char *key;
        uint32_t value;
    } changed[] = {
        {"llama.context_length", SH_CONTEXT_MAX},    {"llama.embedding_length", 32},
        {"llama.feed_forward_length", 32},           {"llama.attention.head_count", 1},
        {"llama.attention.head_count_kv", 1},        {"llama.attention.key_length", WIDE_HEAD},
        {"llama.attention.value_length", WIDE_HEAD}, {"llama.rope.dimension_count", WIDE_HEAD}};
    for (size_t i = 0; i < SH_COUNT(changed); i++)
        CHECK_OK(sh_gguf_writer_set_u32(w, changed[i].key, changed[i].value));
    add_wide_tensors(w);
    CHECK_OK(sh_gguf_stream_begin(w, path, &stream, err));
    const uint64_t vector = 32 * sizeof(float), square = 32 * 18, wide = (uint64_t)WIDE_HEAD * 18;
    const uint64_t head[] = {tiny_vocab() * UINT64_C(18), vector};
    const uint64_t layer[] = {vector, vector, wide, wide, wide, wide, square, square, square};
    for (size_t i = 0; i < SH_COUNT(head) + WIDE_LAYERS * SH_COUNT(layer); i++) {
        const uint64_t n = i < SH_COUNT(head) ? head[i] : layer[(i - 2) % SH_COUNT(layer)];
        for (uint64_t at = 0; at < n; at += sizeof zeros)
            CHECK_OK(sh_gguf_stream_write(stream, zeros, SH_MIN(sizeof zeros, n - at), err));
    }
    CHECK_OK(sh_gguf_stream_finish(&stream, err));
    sh_gguf_writer_destroy(&w);
    sh_gguf_close(&keys);
    sh_buf_release(&bytes);
}

static void test_a_context_longer_than_memory(void **state)
{
    (void)state;
    const uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (memory > WIDE_CACHE) {
        print_message("SKIP: a cache of %" PRIu64 " bytes fits this machine\n", WIDE_CACHE);
        skip();
    }
    write_wide(path_of(file_names[BAD]));
    static const char *const lines[] = {"generate -p x", "chat"};
    for (size_t i = 0; i < SH_COUNT(lines); i++) {
        char line[256];
        snprintf(line, sizeof line, "%s --pack none --kv f32 -m @B", lines[i]);
        expect_error(line, 1, "a context of 32768 tokens takes");
    }
    unlink(path_of(file_names[BAD]));
}

/* ---- options ---- */

static void test_options_that_do_not_fit(void **state)
{
    (void)state;
    static const struct {
        const char *line;
        int exit_code;
        const char *part;
    } cases[] = {
        {"generate -m @A -p x", 2, "it is an adapter, not a model"},
        {"chat -m @A", 2, "it is an adapter, not a model"},
        {"perplexity -m @A -f @T", 2, "it is an adapter, not a model"},
        {"bench -m @A", 2, "it is an adapter, not a model"},
        {"generate -m @M -p x --lora @M", 2, "not an adapter"},
        {"generate -m @M -p x --lora @D", 2, "adapter_config.json"},
        {"generate -m @M -p x --lora @Mx", 2, "No such file"},
        {"generate -m @M -p x --lora @T", 2, "not a GGUF file"},
        {"generate -m @M -p x --lora @A=inf", 2, "finite"},
        {"generate -m @M -p x --kernel sse", 2, "'sse'"},
        {"perplexity -m @M -f @T --kernel sse", 2, "'sse'"},
        {"bench -m @M --kernel sse", 2, "'sse'"},
        {"generate -m @M -p x --pack disk", 2, "--pack disk"},
        {"generate -m @M -p x --kv q8", 2, "--kv q8"},
        {"bench -m @M -p 4 -n 4 --kv q8", 2, "--kv q8"},
        {"generate -m @M -p x -c 65", 2, "-c 65 is over the model's context of 64"},
        {"chat -m @M -c 65", 2, "-c 65 is over the model's context of 64"},
        {"bench -m @M -p 65 -n 1", 2, "over the model's context of 64"},
        {"generate -m @M -p x -c 32769", 2, "'32769'"},
        {"generate -m @M -p x -t 0", 2, "'0'"},
        {"generate -m @M -p x -n -1", 2, "'-1'"},
        {"generate -m @M -p x --temp nan", 2, "'nan'"},
        {"generate -m @M -p x --stop ''", 2, "--stop"},
        {"generate -m @M", 2, "-p PROMPT is missing"},
        {"generate -m @M -p ''", 2, "empty"},
        {"chat -m @M --template klingon", 2, "'klingon'"},
        {"perplexity -m @M -f @Tx", 2, "No such file"},
        {"perplexity -m @M -f @D", 1, "Is a directory"},
        {"perplexity -m @M -f @E", 2, "too few"},
        {"quantize -m @M --type Q3 -o @O", 2, "'Q3'"},
        {"quantize -m @M --type Q4_K -o @O", 2, "cannot quantize to Q4_K"},
        {"convert -i @A -o @O", 2, "-m FILE is missing"},
        {"convert -i @A -m @A -o @Dx", 2, "it is an adapter, not a model"},
        {"convert -i @D -o @O", 2, "neither config.json"},
        {"synth --shape 7b -o @O", 2, "'7b'"},
        {"synth --shape tiny-llama --type Q4_K -o @O", 2, "cannot write Q4_K"},
        {"synth --shape tiny-llama --rope yarn:0 -o @O", 2, "not in 1..64"},
        {"synth --shape tiny-llama --rope linear:nan -o @O", 2, "linear:nan"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++)
        expect_error(cases[i].line, cases[i].exit_code, cases[i].part);
    assert_false(sh_file_exists(path_of(file_names[OUT])));
}

/* ---- outputs ---- */

static void test_outputs_that_cannot_be_written(void **state)
{
    (void)state;
    static const char *const writers[] = {"quantize -m @M --type F16 -o ",
                                          "synth --shape tiny-llama -o ",
                                          "synth --shape tiny-llama --lora 2 -o "};
    static const struct {
        const char *out;
        int exit_code;
        const char *part;
    } outs[] = {{"@D", 1, "Is a directory"},
                {"@D/no/such", 2, "No such file or directory"},
                {"@P", 2, "not a regular file"}};
    for (size_t i = 0; i < SH_COUNT(writers); i++)
        for (size_t k = 0; k < SH_COUNT(outs); k++) {
            char line[128];
            snprintf(line, sizeof line, "%s%s", writers[i], outs[k].out);
            expect_error(line, outs[k].exit_code, outs[k].part);
        }
    struct stat info;
    assert_int_equal(stat(path_of(file_names[PIPE]), &info), 0);
    assert_true(S_ISFIFO(info.st_mode)); /* a rename would have put a file there */
    expect_error("convert -i @A -m @M -o @T", 2, "exists and is not a folder");
}

static void test_a_full_standard_output(void **state)
{
    (void)state;
    static const char *const lines[] = {
        "--help",
        "inspect -m @M",
        "inspect -m @M --json",
        "tokenize -m @M --text x",
        "generate -m @M -p x -n 2",
        "generate -m @M -p x -n 2 --json",
        "perplexity -m @M -f @T -c 8",
        "bench -m @M -p 4 -n 4 -r 1",
        "bench -m @M -p 4 -n 4 -r 1 --json",
    };
    struct stat info;
    if (stat("/dev/full", &info) != 0 || !S_ISCHR(info.st_mode)) {
        print_message("SKIP: there is no /dev/full\n");
        skip();
    }
    for (size_t i = 0; i < SH_COUNT(lines); i++) {
        run_result r = run_line("exec \"$0\" \"$@\" >/dev/full", lines[i]);
        check(&r, 1, "standard output: No space left on device", lines[i]);
        run_release(&r);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_no_model_file),
        cmocka_unit_test(test_headers_that_lie),
        cmocka_unit_test(test_a_vocabulary_without_byte_tokens),
        cmocka_unit_test(test_weights_that_are_no_numbers),
        cmocka_unit_test(test_a_context_longer_than_memory),
        cmocka_unit_test(test_options_that_do_not_fit),
        cmocka_unit_test(test_outputs_that_cannot_be_written),
        cmocka_unit_test(test_a_full_standard_output),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s SHOAL\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, setup, teardown);
}
