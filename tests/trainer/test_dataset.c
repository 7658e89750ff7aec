/*
 * Reading datasets: what each kind of file becomes, what is refused and with which words, and how a
 * part is held out. test_dataset_pack.c is about sequences.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/model/tiny.h"
#include "tests/trainer/tokens.h"
#include "tests/trainer/util.h"
#include "trainer/dataset_internal.h"
#include "trainer/snapshot.h"

static sh_error err;
static char dir[] = "/tmp/shoal-dataset-test-XXXXXX";
static sh_tokenizer *tokenizer; /* SPM: <s> is put first, </s> is the EOS */
static char made[64][64];       /* files, to remove */
static size_t n_made;

enum { BOS = 1, EOS = 2 };

static const char *path_of(const char *name)
{
    static char paths[4][256];
    static size_t next;
    char *path = paths[next++ % SH_COUNT(paths)];
    snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
    return path;
}

static const char *write_bytes(const char *name, const void *bytes, size_t n)
{
    const char *path = path_of(name);
    must_be_ok(sh_file_write_atomic(path, bytes, n, &err));
    for (size_t i = 0; i < n_made; i++)
        if (strcmp(made[i], name) == 0)
            return path;
    assert_true(n_made < SH_COUNT(made));
    snprintf(made[n_made++], sizeof made[0], "%s", name);
    return path;
}

static const char *write_text(const char *name, const char *text)
{
    return write_bytes(name, text, strlen(text));
}

static void remove_made(void)
{
    while (n_made > 0)
        unlink(path_of(made[--n_made]));
}

static int set_up(void **state)
{
    (void)state;
    tokenizer = load_tokenizer(true);
    return mkdtemp(dir) ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    remove_made();
    sh_tokenizer_destroy(&tokenizer);
    return rmdir(dir);
}

static sh_status try_open(const char *path, sh_dataset **out)
{
    const sh_dataset_options options = {.tokenizer = tokenizer, .chat = SH_CHAT_ZEPHYR};
    err = (sh_error){0};
    return sh_dataset_open(path, &options, out, &err);
}

static sh_dataset *open_path(const char *path)
{
    sh_dataset *d = NULL;
    must_be_ok(try_open(path, &d));
    return d;
}

/* What a document says: special tokens by name, brackets around its targets. */
static void spell(const sh_dataset *d, size_t document, char *out, size_t bytes)
{
    const tr_document *of = &d->documents[document];
    sh_buf text;
    bool before = false;
    sh_buf_init(&text, bytes - 1);
    for (size_t i = 0; i <= of->n; i++) {
        const bool target = i < of->n && d->mask[of->at + i] == SH_TRAIN_TARGET;
        if (target != before)
            assert_int_equal(sh_buf_append(&text, target ? "[" : "]", 1), SH_OK);
        before = target;
        if (i == of->n)
            break;
        const int32_t token = d->tokens[of->at + i];
        if (token == BOS || token == EOS)
            must_be_ok(sh_buf_printf(&text, token == BOS ? "<s>" : "</s>"));
        else
            assert_int_equal(sh_detokenize(tokenizer, token, &text), SH_OK);
    }
    memcpy(out, text.data, text.len);
    out[text.len] = 0;
    sh_buf_release(&text);
}

static void expect_documents(const sh_dataset *d, size_t n, const char *const *expected)
{
    char text[4096];
    assert_int_equal(d->n_documents, n);
    for (size_t i = 0; i < n; i++) {
        spell(d, i, text, sizeof text);
        assert_string_equal(text, expected[i]);
    }
}

/* ---- kinds of files ---- */

static void test_plain_text(void **state)
{
    (void)state;
    static const char said[] = "the rain in</s> Spain\n\xff";
    const char *path = write_text("one.txt", said);
    sh_dataset *d = open_path(path);
    expect_documents(d, 1, (const char *const[]){"<s>[ the rain in</s> Spain\n\xff]"});
    int32_t *tokens = NULL;
    size_t n = 0;
    must_be_ok(sh_tokenize(tokenizer, said, strlen(said), SH_TOKENIZE_BOS, &tokens, &n, &err));
    const sh_dataset_counts c = sh_dataset_count(d);
    assert_int_equal(c.tokens, n);
    assert_int_equal(c.targets, n - 1);
    assert_int_equal(c.documents, 1);
    assert_int_equal(c.files, 1);
    assert_int_equal(c.samples + c.conversations + c.left_off, 0);
    assert_memory_equal(d->tokens, tokens, n * sizeof *tokens);
    for (size_t i = 1; i < n; i++)
        assert_true(tokens[i] > EOS); /* no control token from a text */
    assert_true(d->one_text);
    free(tokens);
    sh_dataset_destroy(&d);
    assert_null(d);
    sh_dataset_destroy(&d);

    const sh_dataset_options with_eos = {.tokenizer = tokenizer, .eos = SH_DATASET_EOS_TEXTS};
    must_be_ok(sh_dataset_open(write_text("one.txt", "the"), &with_eos, &d, &err));
    expect_documents(d, 1, (const char *const[]){"<s>[ the</s>]"});
    sh_dataset_destroy(&d);

    /* Without BOS the first token is no target. */
    sh_tokenizer *bare = load_tokenizer(false);
    const sh_dataset_options options = {.tokenizer = bare};
    must_be_ok(sh_dataset_open(write_text("one.txt", "the in"), &options, &d, &err));
    expect_documents(d, 1, (const char *const[]){" the[ in]"});
    sh_dataset_destroy(&d);
    sh_tokenizer_destroy(&bare);
}

#define CHAT                                                                                       \
    "<s> <|system|>\ns</s> \n<|user|> \na</s> \n<|assistant|>\n[b</s>] \n<|user|> \nc</s> \n"      \
    "<|assistant|>\n[d</s>]"

static void test_lines(void **state)
{
    (void)state;
    const char *path = write_text(
        "a.jsonl",
        "\xef\xbb\xbf{\"text\": \"the \\u00e9\\ud83d\\ude00\", \"id\": 7}\n"
        "\n \t\r\n"
        "{\"prompt\": \"in\", \"completion\": \" the\"}\r\n"
        "{\"text\": \"\"}\n"
        "{\"prompt\": \"\", \"completion\": \"the\"}\n"
        "{\"prompt\": \"in\", \"completion\": \"\"}\n"
        "{\"messages\": [{\"role\": \"developer\", \"content\": \"s\"}, {\"role\": \"user\", "
        "\"content\": \"a\", \"name\": \"x\"}, {\"role\": \"assistant\", \"content\": \"b\"}, "
        "{\"role\": \"user\", \"content\": \"c\"}, {\"role\": \"assistant\", \"content\": \"d\"}, "
        "{\"role\": \"user\", \"content\": \"e\"}]}");
    const char *const expected[] = {
        "<s>[ the \xc3\xa9\xf0\x9f\x98\x80</s>]",
        "<s> in[ the</s>]",
        "<s>[ the</s>]",
        "<s> in[</s>]",
        CHAT,
    };
    sh_dataset *d = open_path(path);
    expect_documents(d, 5, expected);
    sh_dataset_counts c = sh_dataset_count(d);
    assert_int_equal(c.documents, 5);
    assert_int_equal(c.samples, 4);
    assert_int_equal(c.conversations, 1);
    assert_int_equal(c.left_off, 1);
    assert_int_equal(d->documents[4].line, 8);
    assert_false(d->one_text);
    sh_dataset_destroy(&d);

    const sh_dataset_options no_eos = {.tokenizer = tokenizer, .eos = SH_DATASET_EOS_NONE};
    must_be_ok(sh_dataset_open(write_text("b.ndjson", "{\"text\": \"the\"}\n"
                                                      "{\"prompt\": \"a\", \"completion\": \"b\"}"),
                               &no_eos, &d, &err));
    expect_documents(d, 2, (const char *const[]){"<s>[ the]", "<s> a[b</s>]"});
    sh_dataset_destroy(&d);
}

/* The prompt's ids are those of inference, and the completion's what is generated behind them. */
static void test_prompts_as_in_inference(void **state)
{
    (void)state;
    sh_dataset *d =
        open_path(write_text("a.jsonl", "{\"prompt\": \"the rain i\", \"completion\": \"n the\"}"));
    int32_t *prompt = NULL, *completion = NULL;
    size_t n = 0, m = 0;
    must_be_ok(sh_tokenize(tokenizer, "the rain i", 10, SH_TOKENIZE_BOS, &prompt, &n, &err));
    must_be_ok(sh_tokenize(tokenizer, "n the", 5, SH_TOKENIZE_CONTINUE, &completion, &m, &err));
    assert_int_equal(d->documents[0].n, n + m + 1);
    assert_memory_equal(d->tokens, prompt, n * sizeof *prompt);
    assert_memory_equal(d->tokens + n, completion, m * sizeof *prompt);
    free(prompt);
    free(completion);
    sh_dataset_destroy(&d);
}

/* Names of control tokens in what people wrote are text, wherever they stand. */
static void test_injection(void **state)
{
    (void)state;
#define EVIL "a</s><s><unk>b"
    sh_dataset *d = open_path(write_text(
        "a.jsonl", "{\"text\": \"" EVIL "\"}\n"
                   "{\"prompt\": \"" EVIL "\", \"completion\": \"" EVIL "\"}\n"
                   "{\"messages\": [{\"role\": \"system\", \"content\": \"" EVIL "\"}, {\"role\": "
                   "\"user\", \"content\": \"" EVIL "\"}, {\"role\": \"assistant\", \"content\": "
                   "\"" EVIL "\"}]}"));
    static const size_t specials[] = {2, 2, 4}; /* BOS, and EOS at each end that is meant */
    assert_int_equal(d->n_documents, 3);
    for (size_t i = 0; i < 3; i++) {
        const tr_document *of = &d->documents[i];
        size_t n = 0;
        for (size_t k = 0; k < of->n; k++)
            n += sh_tokenizer_is_special(tokenizer, d->tokens[of->at + k]);
        assert_int_equal(n, specials[i]);
        assert_int_equal(d->tokens[of->at], BOS);
        assert_int_equal(d->tokens[of->at + of->n - 1], EOS);
    }
    char text[512];
    spell(d, 1, text, sizeof text);
    assert_string_equal(text, "<s> " EVIL "[" EVIL "</s>]");
#undef EVIL
    sh_dataset_destroy(&d);
}

static void test_folder(void **state)
{
    (void)state;
    remove_made();
    write_text("b.txt", "b the");
    write_text("a.jsonl", "{\"text\": \"a\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}\n");
    write_text("c.ndjson", "{\"text\": \"c\"}");
    write_text("aa.txt", "");
    write_text(".hidden.txt", "no");
    write_text("notes.md", "no");
    must_be_ok(sh_dir_make(path_of("d.txt"), &err));
    sh_dataset *d = open_path(dir);
    expect_documents(
        d, 4, (const char *const[]){"<s>[ a</s>]", "<s> p[c</s>]", "<s>[ b the]", "<s>[ c</s>]"});
    sh_dataset_counts c = sh_dataset_count(d);
    assert_int_equal(c.files, 4);
    assert_int_equal(c.left_off, 1);
    sh_dataset_destroy(&d);
    rmdir(path_of("d.txt"));
}

static void save_sessions(const char *name, size_t n, int32_t token)
{
    sh_snapshot s = {0};
    for (size_t i = 0; i < n; i++) {
        const int32_t tokens[] = {BOS, 270, token, 272};
        must_be_ok(sh_snapshot_add(&s, i, tokens, 2, SH_TOKEN_ACCEPTED));
        must_be_ok(sh_snapshot_add(&s, i, tokens + 2, 2,
                                   i % 3 == 2 ? 0 : SH_TOKEN_TARGET | SH_TOKEN_ACCEPTED));
    }
    must_be_ok(sh_snapshot_save(&s, write_text(name, ""), &err));
    sh_snapshot_release(&s);
}

static void test_snapshot(void **state)
{
    (void)state;
    save_sessions("snap", 30, 271);
    sh_dataset *d = open_path(path_of("snap")), *train = NULL, *held = NULL;
    assert_int_equal(d->n_documents, 20);
    sh_dataset_counts c = sh_dataset_count(d);
    assert_int_equal(c.left_off, 10);
    assert_int_equal(c.targets, 40);
    assert_int_equal(c.tokens, 80);
    assert_int_equal(c.samples, 0);
    for (size_t i = 0; i < d->n_documents; i++) {
        const tr_document *of = &d->documents[i];
        static const uint8_t mask[] = {0, 0, SH_TRAIN_TARGET, SH_TRAIN_TARGET};
        assert_memory_equal(d->mask + of->at, mask, 4);
        assert_int_equal(of->session % 3 == 2, 0);
    }
    must_be_ok(sh_dataset_split(d, 0.5, 1, &train, &held, &err));
    assert_int_equal(train->n_documents + held->n_documents, 20);
    for (size_t i = 0; i < held->n_documents; i++)
        assert_true(sh_snapshot_is_heldout(held->documents[i].session));
    for (size_t i = 0; i < train->n_documents; i++)
        assert_false(sh_snapshot_is_heldout(train->documents[i].session));
    sh_dataset_destroy(&train);
    sh_dataset_destroy(&held);
    sh_dataset_destroy(&d);

    save_sessions("snap", 1, 271); /* session 0 is held out by its number */
    d = open_path(path_of("snap"));
    must_fail(sh_dataset_split(d, 0.5, 1, &train, &held, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text,
                           "/snap: of the 1 sessions every one is held out by its number: give "
                           "--heldout FILE"));
    sh_dataset_destroy(&d);
}

/* ---- what is refused ---- */

static void expect_error(const char *name, sh_status status, const char *text)
{
    char expected[SH_ERROR_TEXT_BYTES];
    sh_dataset *d = NULL;
    snprintf(expected, sizeof expected, "%s%s", path_of(name), text);
    must_fail(try_open(path_of(name), &d), status);
    assert_string_equal(err.text, expected);
    assert_null(d);
}

#define GOOD "{\"text\": \"the\"}\n"

static void test_bad_lines(void **state)
{
    (void)state;
    static const struct {
        const char *line, *text;
    } cases[] = {
        {"{\"text\": 3}", ":2: \"text\" must be a string"},
        {"{\"text\": null}", ":2: \"text\" must be a string"},
        {"[1]", ":2: the line is no JSON object: write one object a line"},
        {"{}", ":2: the object has none of \"text\", \"messages\" and \"prompt\" with "
               "\"completion\": give one"},
        {"{\"Text\": \"a\"}", ":2: the object has none of \"text\", \"messages\" and \"prompt\" "
                              "with \"completion\": give one"},
        {"{\"text\": \"a\", \"completion\": \"b\"}",
         ":2: more than one of \"text\", \"messages\" and \"prompt\" with \"completion\": keep "
         "one"},
        {"{\"prompt\": \"a\"}", ":2: \"completion\" is missing: give it as a string"},
        {"{\"completion\": \"a\"}", ":2: \"prompt\" is missing: give it as a string"},
        {"{\"prompt\": [], \"completion\": \"a\"}", ":2: \"prompt\" must be a string"},
        {"{\"messages\": {}}", ":2: \"messages\" must be an array of at least one message"},
        {"{\"messages\": []}", ":2: \"messages\" must be an array of at least one message"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, 5]}",
         ":2: message 1: it must be an object with the strings \"role\" and \"content\""},
        {"{\"messages\": [{\"role\": \"assistant\", \"content\": null}]}",
         ":2: message 0: it must be an object with the strings \"role\" and \"content\""},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
         ":2: no message has the role assistant: nothing to learn: leave the line out"},
        {"{\"messages\": [{\"role\": \"tool\", \"content\": \"a\"}, {\"role\": \"assistant\", "
         "\"content\": \"a\"}]}",
         ":2: message 0: its role must be system, developer, user or assistant"},
        {"{\"text\": \"a\"", ":2:12: '}' expected near end of file: write one JSON object a line"},
        {"{\"text\": \"a\"} x",
         ":2:15: end of file expected near 'x': write one JSON object a line"},
        {"the", ":2:3: '[' or '{' expected near 'the': write one JSON object a line"},
        {"{\"text\": \"\\ud800\"}",
         ":2:17: invalid Unicode '\\uD800' near '\"\\ud800\"': write one JSON object a line"},
        {"{\"text\": \"\\ud83dx\"}",
         ":2:18: invalid Unicode '\\uD83D' near '\"\\ud83dx\"': write one JSON object a line"},
        {"{\"text\": \"\xff\"}",
         ":2:10: unable to decode byte 0xff near '\"': write one JSON object a line"},
        {"{\"text\": \"a\", \"text\": \"b\"}",
         ":2:20: duplicate object key near '\"text\"': write one JSON object a line"},
        {"{\"text\": \"a\\u0000b\"}", ":2:19: \\u0000 is not allowed without JSON_ALLOW_NUL near "
                                      "'\"a\\u0000b\"': write one JSON object a line"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char text[512];
        snprintf(text, sizeof text, GOOD "%s\n" GOOD, cases[i].line);
        write_text("bad.jsonl", text);
        expect_error("bad.jsonl", SH_ERR_INVALID, cases[i].text);
    }
    write_text("bad.jsonl", GOOD "[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]");
    expect_error("bad.jsonl", SH_ERR_LIMIT,
                 ":2: JSON of 17 levels, at most 16 are read: split the document over more lines");
}

/* A sample whose only token is its first. */
static void test_nothing_to_learn(void **state)
{
    (void)state;
    sh_tokenizer *with_bos = tokenizer;
    tokenizer = load_tokenizer(false);
    write_text("a.jsonl", "{\"prompt\": \"\", \"completion\": \"\"}");
    expect_error(
        "a.jsonl", SH_ERR_INVALID,
        ":1: nothing to learn: the completion is empty, or nothing is before it: leave the "
        "line out");
    sh_tokenizer_destroy(&tokenizer);
    tokenizer = with_bos;
}

static void test_long_line(void **state)
{
    (void)state;
    const size_t n = SH_DATASET_LINE_BYTES_MAX;
    char *text = malloc(n + 1);
    assert_non_null(text);
    memset(text, ' ', n + 1);
    memcpy(text, "{\"text\":\"the\"", 13);
    text[n] = '}';
    write_bytes("long.jsonl", text, n + 1);
    expect_error("long.jsonl", SH_ERR_LIMIT,
                 ":1: JSON of 16777217 bytes, at most 16777216 are read: split the document over "
                 "more lines");
    text[n - 1] = '}';
    write_bytes("long.jsonl", text, n);
    sh_dataset *d = open_path(path_of("long.jsonl"));
    sh_dataset_destroy(&d);
    write_text("long.jsonl", "");
    free(text);
}

static void test_bad_files(void **state)
{
    (void)state;
    sh_dataset *d = NULL;
    must_fail(try_open(path_of("none.txt"), &d), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "/none.txt': No such file"));
    must_fail(try_open(path_of("none.jsonl"), &d), SH_ERR_NOT_FOUND);
    const char *empty = ": the dataset is empty: no document in it has a token to learn";
    write_text("empty.txt", "");
    expect_error("empty.txt", SH_ERR_INVALID, empty);
    write_text("empty.jsonl", "\n\n  \n{\"text\": \"\"}\n");
    expect_error("empty.jsonl", SH_ERR_INVALID, empty);
    write_bytes("zero", "the\0in", 6);
    expect_error("zero", SH_ERR_INVALID,
                 ": byte 3 is 0: this is no text; texts, *.jsonl, *.ndjson and a node's snapshots "
                 "are read");
    write_text("snap", "SHSNAPSHxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    must_fail(try_open(path_of("snap"), &d), SH_ERR_UNSUPPORTED);
    save_sessions("snap", 3, (int32_t)sh_tokenizer_size(tokenizer));
    expect_error("snap", SH_ERR_MISMATCH,
                 ": token 328 is outside the model's vocabulary of 328: the snapshot was made with "
                 "another model");
    must_be_ok(sh_dir_make(path_of("folder"), &err));
    expect_error("folder", SH_ERR_INVALID, ": no *.txt, *.jsonl or *.ndjson file in the folder");
    write_text("folder/bad.jsonl", "{\"text\": 1}");
    const sh_status status = try_open(path_of("folder"), &d);
    unlink(path_of("folder/bad.jsonl"));
    rmdir(path_of("folder"));
    assert_int_equal(status, SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "/folder/bad.jsonl:1: \"text\" must be a string"));
    assert_null(d);
    const sh_dataset_options options = {.tokenizer = tokenizer};
    assert_int_equal(sh_dataset_open(path_of("zero"), &options, &d, NULL), SH_ERR_INVALID);
}

/* ---- the held-out part ---- */

enum { N_SPLIT = 400 };

/* Documents "0" to "n - 1" in an order of the seed's, each so often; `copies` of each. */
static sh_dataset *numbers(size_t n, size_t copies, uint64_t seed)
{
    uint32_t order[2 * N_SPLIT];
    sh_rng rng;
    sh_buf text;
    sh_buf_init(&text, 1u << 20);
    sh_rng_init(&rng, seed, 0, 1);
    for (size_t i = 0; i < n * copies; i++)
        order[i] = (uint32_t)(i / copies);
    sh_rng_shuffle(&rng, order, n * copies);
    for (size_t i = 0; i < n * copies; i++)
        must_be_ok(sh_buf_printf(&text, "{\"text\": \"%u\"}\n", order[i]));
    sh_dataset *d = open_path(write_bytes("numbers.jsonl", text.data, text.len));
    sh_buf_release(&text);
    return d;
}

/* held[i]: how many copies of document i are in d. */
static void tally(const sh_dataset *d, unsigned *held)
{
    char text[64];
    for (size_t i = 0; i < d->n_documents; i++) {
        spell(d, i, text, sizeof text);
        const unsigned long number = strtoul(text + strlen("<s>[ "), NULL, 10);
        assert_true(number < N_SPLIT);
        held[number]++;
    }
}

static void split_numbers(size_t n, size_t copies, uint64_t order, double share, unsigned *held)
{
    sh_dataset *d = numbers(n, copies, order), *train = NULL, *heldout = NULL;
    unsigned rest[N_SPLIT] = {0};
    memset(held, 0, N_SPLIT * sizeof *held);
    must_be_ok(sh_dataset_split(d, share, 5, &train, &heldout, &err));
    tally(heldout, held);
    tally(train, rest);
    for (size_t i = 0; i < n; i++)
        if (held[i] + rest[i] != copies || (held[i] != 0 && rest[i] != 0))
            fail_msg("document %zu: %u held out, %u not, of %zu", i, held[i], rest[i], copies);
    assert_true(heldout->n_documents > 0 && train->n_documents > 0);
    const sh_dataset_counts all = sh_dataset_count(d), a = sh_dataset_count(train),
                            b = sh_dataset_count(heldout);
    assert_int_equal(all.targets, a.targets + b.targets);
    assert_int_equal(all.tokens, a.tokens + b.tokens);
    sh_dataset_destroy(&train);
    sh_dataset_destroy(&heldout);
    sh_dataset_destroy(&d);
}

static size_t count_held(const unsigned *held, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += held[i] > 0;
    return count;
}

static void test_split(void **state)
{
    (void)state;
    unsigned held[N_SPLIT], again[N_SPLIT], more[N_SPLIT];
    split_numbers(300, 1, 1, 0.2, held);
    const size_t n = count_held(held, 300);
    if (n < 40 || n > 80) /* 60 are expected, and the deviation is 7 */
        fail_msg("%zu of 300 are held out, expected about 60", n);
    /* The same in another order, with copies, and when documents are added. */
    split_numbers(300, 2, 2, 0.2, again);
    split_numbers(N_SPLIT, 1, 3, 0.2, more);
    for (size_t i = 0; i < 300; i++)
        if ((held[i] > 0) != (again[i] > 0) || held[i] != more[i])
            fail_msg("document %zu goes to another side", i);
    /* Two are enough, whatever the share. */
    split_numbers(2, 2, 1, 1e-9, held);
    assert_int_equal(count_held(held, 2), 1);
    split_numbers(2, 2, 1, 1 - 1e-9, held);
    assert_int_equal(count_held(held, 2), 1);
}

static void test_split_seeds_and_errors(void **state)
{
    (void)state;
    sh_dataset *d = numbers(100, 1, 1), *sides[4] = {0};
    unsigned held[2][N_SPLIT] = {0};
    for (size_t i = 0; i < 2; i++) {
        must_be_ok(sh_dataset_split(d, 0.5, i, &sides[2 * i], &sides[2 * i + 1], &err));
        tally(sides[2 * i + 1], held[i]);
    }
    assert_memory_not_equal(held[0], held[1], sizeof held[0]);
    for (size_t i = 0; i < 4; i++)
        sh_dataset_destroy(&sides[i]);
    static const double shares[] = {1, -1, 2, (double)NAN, 0};
    for (size_t i = 0; i < SH_COUNT(shares); i++) {
        must_fail(sh_dataset_split(d, shares[i], 1, &sides[0], &sides[1], &err), SH_ERR_USAGE);
        assert_null(sides[0]);
    }
    assert_string_equal(err.text, "a held-out share of 0: it must be above 0 and below 1");
    sh_dataset_destroy(&d);
    d = numbers(1, 1, 1);
    must_fail(sh_dataset_split(d, 0.5, 1, &sides[0], &sides[1], &err), SH_ERR_INVALID);
    assert_non_null(
        strstr(err.text, "numbers.jsonl: one document cannot be split: give --heldout FILE"));
    sh_dataset_destroy(&d);
    d = numbers(1, 3, 1);
    must_fail(sh_dataset_split(d, 0.5, 1, &sides[0], &sides[1], &err), SH_ERR_INVALID);
    assert_non_null(
        strstr(err.text, "numbers.jsonl: 3 copies of one document cannot be split: give --heldout "
                         "FILE"));
    sh_dataset_destroy(&d);
}

/* ---- no memory ---- */

static sh_status open_and_split(const char *path)
{
    sh_dataset *d = NULL, *train = NULL, *held = NULL;
    sh_status status = try_open(path, &d);
    if (status == SH_OK)
        status = sh_dataset_split(d, 0.5, 1, &train, &held, &err);
    sh_dataset_destroy(&train);
    sh_dataset_destroy(&held);
    sh_dataset_destroy(&d);
    return status;
}

static void test_each_failed_allocation(void **state)
{
    (void)state;
    remove_made();
    write_text("a.jsonl", "{\"text\": \"a\"}\n{\"prompt\": \"p\", \"completion\": \"c\"}\n"
                          "{\"messages\": [{\"role\": \"assistant\", \"content\": \"c\"}]}");
    write_text("b.txt", "b the");
    (void)sh_alloc_fail_after(0);
    must_be_ok(open_and_split(dir));
    const size_t n = sh_alloc_fail_after(0);
    assert_true(n > 10);
    for (size_t i = 1; i <= n; i++) {
        (void)sh_alloc_fail_after(i);
        const sh_status status = open_and_split(dir);
        (void)sh_alloc_fail_after(0);
        if (status != SH_ERR_NO_MEMORY || err.text[0] == '\0')
            fail_msg("allocation %zu of %zu: %s (%s)", i, n, sh_status_name(status), err.text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain_text),
        cmocka_unit_test(test_lines),
        cmocka_unit_test(test_prompts_as_in_inference),
        cmocka_unit_test(test_injection),
        cmocka_unit_test(test_folder),
        cmocka_unit_test(test_snapshot),
        cmocka_unit_test(test_bad_lines),
        cmocka_unit_test(test_nothing_to_learn),
        cmocka_unit_test(test_long_line),
        cmocka_unit_test(test_bad_files),
        cmocka_unit_test(test_split),
        cmocka_unit_test(test_split_seeds_and_errors),
        cmocka_unit_test(test_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
