/* option.h: the command line, YAML, --help and the sample, from one table */
#include "shared/base/file.h"
#include "shared/base/option.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    const char *model, *name, *peers;
    int64_t context, buffer, unset;
    double rate;
    bool json, verbose;
    sh_option_list stops;
} options;

static const sh_option table[] = {
    SH_OPT_STRING(options, model, 'm', "model", "FILE", NULL, "GGUF model to read"),
    SH_OPT_STRING(options, name, 'n', "name", "TEXT", "a \"fish\" \\ two", "what to call it"),
    SH_OPT_STRING(options, peers, 0, "round.peers", "LIST", NULL, "who takes part"),
    SH_OPT_INT(options, context, 'c', "context", "N", 256, 2, 8192, "tokens a chunk"),
    SH_OPT_INT(options, buffer, 0, "round.buffer", "N", 8, 1, 1e18, "updates to wait for"),
    SH_OPT_INT(options, unset, 0, "round.unset", "N", -1, 0, 10, "none when not given"),
    SH_OPT_REAL(options, rate, 'r', "train.deep.rate", "X", 0.1, -1, 1, "learning rate"),
    SH_OPT_FLAG(options, json, 'j', "json", "print one JSON object"),
    SH_OPT_FLAG(options, verbose, 'v', "verbose", "say more"),
    SH_OPT_LIST(options, stops, 's', "round.stop", "TEXT", "where to end"),
};
static const sh_command command = {
    "shoal test",          "-m FILE", table, SH_COUNT(table), "A command to test the table with.",
    "shoal test -m a.gguf"};

enum { WORDS_MAX = 16 };

/* Parses words separated by blanks. */
static sh_status parse(const char *line, options *o, sh_args *args, sh_error *err)
{
    static char copy[512];
    char *argv[WORDS_MAX] = {(char *)(uintptr_t) "shoal"};
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *word = strtok(copy, " "); word && argc < WORDS_MAX; word = strtok(NULL, " "))
        argv[argc++] = word;
    return sh_options_parse(&command, argc, argv, o, args, err);
}

static sh_status parse_yaml(const char *text, options *o, sh_args *args, sh_error *err)
{
    return sh_options_parse_yaml(&command, text, strlen(text), "t.yaml", o, args, err);
}

static void assert_holds(const char *text, const char *part)
{
    if (!strstr(text, part))
        fail_msg("'%s' does not hold '%s'", text, part);
}

static void test_defaults(void **state)
{
    (void)state;
    options o;
    sh_args args = {0};
    memset(&o, 0x55, sizeof o);
    assert_int_equal(parse("", &o, &args, NULL), SH_OK);
    assert_null(o.model);
    assert_string_equal(o.name, "a \"fish\" \\ two");
    assert_int_equal(o.context, 256);
    assert_int_equal(o.unset, -1);
    assert_true(o.rate == 0.1);
    assert_false(o.json);
    assert_int_equal(args.n_positional, 0);
    assert_false(args.help);
    sh_args_release(&args);
}

static void test_every_form_of_a_flag(void **state)
{
    (void)state;
    static const char *const lines[] = {
        "--model a --context 99 --train.deep.rate -0.5 --json --verbose in out",
        "--model=a --context=99 --train.deep.rate=-0.5 --json=true --verbose=yes in out",
        "-m a -c 99 -r -0.5 -j -v in out",
        "-ma -c99 -r-5e-1 -jv in out",
        "in -jvm a out -c 1000 -c 99 -r -.5", /* the last one counts */
        "-jv -m a -c +99 -r -0.5 -- in out",
    };
    for (size_t i = 0; i < SH_COUNT(lines); i++) {
        options o = {0};
        sh_args args = {0};
        sh_error err = {0};
        if (parse(lines[i], &o, &args, &err) != SH_OK)
            fail_msg("%s: %s", lines[i], err.text);
        assert_string_equal(o.model, "a");
        assert_int_equal(o.context, 99);
        assert_true(o.rate == -0.5);
        assert_true(o.json && o.verbose);
        assert_int_equal(args.n_positional, 2);
        assert_string_equal(args.positional[0], "in");
        assert_string_equal(args.positional[1], "out");
        sh_args_release(&args);
    }
}

static void test_positional_words(void **state)
{
    (void)state;
    options o = {0};
    sh_args args = {0};
    assert_int_equal(parse("- -- -j --nonsense --", &o, &args, NULL), SH_OK);
    assert_int_equal(args.n_positional, 4);
    assert_string_equal(args.positional[0], "-");
    assert_string_equal(args.positional[1], "-j");
    assert_string_equal(args.positional[3], "--");
    assert_false(o.json);
    sh_args_release(&args);
    assert_null(args.positional);
    sh_args_release(&args);
}

static void test_wrong_command_lines(void **state)
{
    (void)state;
    static const struct {
        const char *line, *text;
    } cases[] = {
        {"--contxt 9", "unknown option '--contxt': the nearest known one is --context"},
        {"--round.bufer=9", "nearest known one is --round.buffer"},
        {"-buffer 9", "'-buffer': the nearest known one is --"},
        {"-jx", "unknown option '-x'"},
        {"--jason", "--json"},
        {"--model", "--model needs a value: --model FILE"},
        {"-jm", "-m needs a value"},
        {"--context 1", "--context: '1' is not a whole number from 2 to 8192"},
        {"--context 8193", "'8193'"},
        {"--context 12x", "'12x'"},
        {"--context=", "''"},
        {"-c 0x10", "'0x10'"},
        {"-c 1.5", "'1.5'"},
        {"-c 99999999999999999999", "'99999999999999999999'"},
        {"--round.buffer 0", "a whole number from 1 to 1e+18"},
        {"-r nan", "'nan' is not a number from -1 to 1"},
        {"-r 1e999", "'1e999'"},
        {"-r 1.01", "'1.01'"},
        {"--json=maybe", "--json: 'maybe' is not true or false"},
        {"--help=yes", "unknown option"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        options o = {.context = 77};
        sh_args args = {0};
        sh_error err = {0};
        assert_int_equal(parse(cases[i].line, &o, &args, &err), SH_ERR_USAGE);
        assert_int_equal(err.code, SH_ERR_USAGE);
        assert_holds(err.text, cases[i].text);
        assert_int_equal(o.context, 77); /* untouched */
        assert_null(args.positional);
        assert_null(args.owned);
    }
}

static void test_limits_of_a_value(void **state)
{
    (void)state;
    options o = {0};
    sh_args args = {0};
    assert_int_equal(parse("-c 2 -r 1", &o, &args, NULL), SH_OK);
    assert_int_equal(o.context, 2);
    assert_int_equal(parse("-c 8192 -r -1", &o, &args, NULL), SH_OK);
    assert_int_equal(o.context, 8192);
    sh_args_release(&args);

    char *word = calloc(1, 70000);
    assert_non_null(word);
    memset(word, 'w', 69999);
    char *argv[] = {(char *)(uintptr_t) "shoal", (char *)(uintptr_t) "-m", word};
    sh_error err = {0};
    assert_int_equal(sh_options_parse(&command, 3, argv, &o, &args, &err), SH_ERR_USAGE);
    argv[1] = word;
    word[0] = word[1] = '-';
    assert_int_equal(sh_options_parse(&command, 3, argv, &o, &args, &err), SH_ERR_USAGE);
    free(word);
}

static void test_yaml_nests_with_dots(void **state)
{
    (void)state;
    options o = {0};
    sh_args args = {0};
    sh_error err = {0};
    static const char *const texts[] = {
        "model: a b\nround:\n  buffer: 3\n  peers: [x, 'y z', 3]\ntrain:\n  deep:\n    rate: 1e-2\n"
        "json: on\n",
        "{model: 'a b', round.buffer: 3, round: {peers: 'x,y z,3'}, train: {deep.rate: .01}, "
        "json: true}",
        "---\n\"model\": \"a b\"\ntrain: {deep: {rate: 0.01}}\njson: yes\nround:\n  buffer: 3\n"
        "  peers:\n    - x\n    - y z\n    - \"3\"\nname:\n...\n",
    };
    for (size_t i = 0; i < SH_COUNT(texts); i++) {
        if (parse_yaml(texts[i], &o, &args, &err) != SH_OK)
            fail_msg("text %zu: %s", i, err.text);
        assert_string_equal(o.model, "a b");
        assert_string_equal(o.name, table[1].default_string);
        assert_string_equal(o.peers, "x,y z,3");
        assert_int_equal(o.buffer, 3);
        assert_int_equal(o.context, 256);
        assert_true(o.rate == 0.01);
        assert_true(o.json);
        sh_args_release(&args);
    }
    static const char *const empty[] = {"", "# nothing\n", "---\n", "round:\n", "model: ~\n", "{}"};
    for (size_t i = 0; i < SH_COUNT(empty); i++) {
        if (parse_yaml(empty[i], &o, &args, &err) != SH_OK)
            fail_msg("'%s': %s", empty[i], err.text);
        assert_null(o.model);
        assert_int_equal(o.buffer, 8);
    }
    assert_int_equal(parse_yaml("model: ''\nround: {peers: []}", &o, &args, &err), SH_OK);
    assert_string_equal(o.model, "");
    assert_string_equal(o.peers, "");
    sh_args_release(&args);
}

static void test_wrong_yaml(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } cases[] = {
        {"model: a\ncontxt: 9\n",
         "t.yaml:2: unknown key 'contxt': the nearest known one is context"},
        {"round:\n  bufer: 9\n", "t.yaml:2: unknown key 'round.bufer': the nearest known one is "
                                 "round.buffer"},
        {"rond:\n  buffer: 9\n", "t.yaml:1: unknown key 'rond': the nearest known one is round"},
        {"context: 1\n", "t.yaml:1: context: '1' is not a whole number from 2 to 8192"},
        {"round: {buffer: x}", "t.yaml:1: round.buffer: 'x'"},
        {"context: 9\ncontext: 9\n", "t.yaml:2: context is given twice"},
        {"round.buffer: 9\nround: {buffer: 9}\n", "t.yaml:2: round.buffer is given twice"},
        {"round: 7\n", "'round' is a group of keys"},
        {"context: {a: 1}\n", "'context' takes one value"},
        {"context: [3]\n", "'context' does not take a list"},
        {"round: [3]\n", "'round' does not take a list"},
        {"model: [[a]]\n", "'model' takes a list of plain values"},
        {"model: ['a,b']\n", "holds a comma"},
        {"? [a]\n: b\n", "a key is expected"},
        {"- model\n", "'key: value' lines are expected"},
        {"model\n", "'key: value' lines are expected"},
        {"model: &x a\nname: *x\n", "t.yaml:2: tags and aliases"},
        {"model: !!str a\n", "t.yaml:1: tags and aliases"},
        {"model: a\n---\nname: b\n", "t.yaml:2: only one document"},
        {"model: \"a\\0b\"\n", "holds a 0 byte"},
        {"model: 'a\n", "t.yaml:"},
        {"model: a\n\tname: b\n", "t.yaml:2:"},
        {"model: \xff\n", "t.yaml: byte 7"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        options o = {.context = 77};
        sh_args args = {0};
        sh_error err = {0};
        assert_int_equal(parse_yaml(cases[i].text, &o, &args, &err), SH_ERR_USAGE);
        assert_holds(err.text, cases[i].error);
        assert_int_equal(o.context, 77);
        assert_null(args.owned);
    }
}

static void test_yaml_limits(void **state)
{
    (void)state;
    options o = {0};
    sh_args args = {0};
    sh_error err = {0};
    size_t n = (1 << 20) + 1;
    char *text = malloc(n);
    assert_non_null(text);
    memset(text, '#', n);
    assert_int_equal(sh_options_parse_yaml(&command, text, n, "t", &o, &args, &err), SH_ERR_LIMIT);
    assert_int_equal(sh_options_parse_yaml(&command, text, n - 1, "t", &o, &args, &err), SH_OK);
    memset(text, 'k', 1000); /* a key that is too long, then a list that is */
    memcpy(text + 1000, ": 1\n", 4);
    assert_int_equal(sh_options_parse_yaml(&command, text, 1004, "t", &o, &args, &err),
                     SH_ERR_USAGE);
    memcpy(text, "model: [", 8);
    for (size_t i = 8; i < 200000; i += 2)
        memcpy(text + i, "x,", 2);
    text[200000] = ']';
    assert_int_equal(sh_options_parse_yaml(&command, text, 200001, "t", &o, &args, &err),
                     SH_ERR_USAGE);
    assert_holds(err.text, "too long");
    free(text);
}

static void test_flags_override_the_file(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-option-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    const char *text = "context: 64\nmodel: from-file\njson: true\nround:\n  buffer: 5\n";
    assert_int_equal(sh_file_write_atomic(path, text, strlen(text), NULL), SH_OK);
    char *argv[] = {(char *)(uintptr_t) "shoal", (char *)(uintptr_t) "-c",
                    (char *)(uintptr_t) "128",   (char *)(uintptr_t) "--json=false",
                    (char *)(uintptr_t) "word",  (char *)(uintptr_t) "--help"};
    options o = {0};
    sh_args args = {0};
    sh_error err = {0};
    assert_int_equal(sh_options_parse_file(&command, path, 5, argv, &o, &args, &err), SH_OK);
    assert_int_equal(o.context, 128);
    assert_int_equal(o.buffer, 5);
    assert_string_equal(o.model, "from-file");
    assert_false(o.json);
    assert_int_equal(args.n_positional, 1);

    /* A second parse into the same args, as after reading --config: old strings stay good. */
    const char *model = o.model;
    options other = {0};
    assert_int_equal(sh_options_parse_file(&command, path, 5, argv, &other, &args, &err), SH_OK);
    assert_string_equal(model, "from-file");
    assert_int_equal(args.n_positional, 1);
    sh_args_release(&args);

    unlink(path);
    assert_int_equal(sh_options_parse_file(&command, path, 5, argv, &o, &args, &err),
                     SH_ERR_NOT_FOUND);
    assert_holds(err.text, path);
    /* Asking for help works whatever the file is like. */
    assert_int_equal(sh_options_parse_file(&command, path, 6, argv, &o, &args, &err), SH_OK);
    assert_true(args.help);
    sh_args_release(&args);
}

static void test_help(void **state)
{
    (void)state;
    options o = {0};
    sh_args args = {0};
    assert_int_equal(parse("-j --help --contxt", &o, &args, NULL), SH_OK);
    assert_true(args.help);
    sh_args_release(&args);
    assert_int_equal(parse("-jh", &o, &args, NULL), SH_OK);
    assert_true(args.help);
    sh_args_release(&args);

    sh_buf out;
    sh_buf_init(&out, 1 << 16);
    assert_int_equal(sh_options_help(&command, &out), SH_OK);
    assert_int_equal(sh_buf_append(&out, "", 1), SH_OK);
    assert_string_equal(
        (char *)out.data,
        "Usage: shoal test -m FILE\n"
        "\n"
        "A command to test the table with.\n"
        "\n"
        "Options:\n"
        "  -m, --model FILE         GGUF model to read\n"
        "  -n, --name TEXT          what to call it (default a \"fish\" \\ two)\n"
        "      --round.peers LIST   who takes part\n"
        "  -c, --context N          tokens a chunk (2 to 8192; default 256)\n"
        "      --round.buffer N     updates to wait for (1 to 1000000000000000000;\n"
        "                           default 8)\n"
        "      --round.unset N      none when not given (0 to 10)\n"
        "  -r, --train.deep.rate X  learning rate (-1 to 1; default 0.1)\n"
        "  -j, --json               print one JSON object\n"
        "  -v, --verbose            say more\n"
        "  -s, --round.stop TEXT    where to end (may be repeated)\n"
        "  -h, --help               print this text and exit\n"
        "\n"
        "Example:\n"
        "  shoal test -m a.gguf\n");
    sh_buf_release(&out);
    sh_buf_init(&out, 100);
    assert_int_equal(sh_options_help(&command, &out), SH_ERR_LIMIT);
    sh_buf_release(&out);
}

/* The sample is read by the parser and means the defaults, group by group. */
static void test_sample_round_trip(void **state)
{
    (void)state;
    sh_buf out;
    sh_buf_init(&out, 1 << 16);
    assert_int_equal(sh_options_sample(&command, &out), SH_OK);
    options o, defaults;
    sh_args args = {0};
    sh_error err = {0};
    memset(&o, 0x55, sizeof o);
    memset(&defaults, 0x55, sizeof defaults);
    assert_int_equal(parse("", &defaults, &args, &err), SH_OK);
    if (sh_options_parse_yaml(&command, (char *)out.data, out.len, "sample", &o, &args, &err) !=
        SH_OK)
        fail_msg("%s", err.text);
    assert_string_equal(o.name, defaults.name);
    o.name = defaults.name;
    assert_memory_equal(&o, &defaults, sizeof o);
    assert_int_equal(sh_buf_append(&out, "", 1), SH_OK);
    assert_holds((char *)out.data, "\n# model: FILE\n");
    assert_holds((char *)out.data, "\ncontext: 256\n");
    assert_holds((char *)out.data, "\nround:\n  # who takes part\n  # peers: LIST\n  # updates");
    assert_holds((char *)out.data, "\n  buffer: 8\n");
    assert_holds((char *)out.data, "\ntrain:\n  deep:\n    # learning rate");
    assert_null(strstr(strstr((char *)out.data, "round:") + 1, "round:")); /* one group once */
    sh_args_release(&args);
    sh_buf_release(&out);
}

static void test_each_failed_allocation(void **state)
{
    (void)state;
    size_t failures = 0;
    for (size_t n = 1;; n++) {
        options o = {.context = 77};
        sh_args args = {0};
        sh_error err = {0};
        sh_alloc_fail_after(n);
        sh_status first = parse("-m a -n b -c 9 word", &o, &args, &err);
        sh_status second = first != SH_OK
                               ? first
                               : parse_yaml("model: x\nround: {peers: [a, b]}\n", &o, &args, &err);
        sh_alloc_fail_after(0);
        if (second == SH_OK) {
            assert_string_equal(o.peers, "a,b");
            sh_args_release(&args);
            break;
        }
        assert_int_equal(second, SH_ERR_NO_MEMORY);
        assert_int_equal(o.context, first != SH_OK ? 77 : 9); /* whole or untouched */
        sh_args_release(&args);
        failures++;
    }
    assert_true(failures >= 6);
}

static void test_lists(void **state)
{
    (void)state;
    options o;
    sh_args args = {0};
    sh_error err = {0};
    assert_int_equal(parse("", &o, &args, NULL), SH_OK);
    assert_int_equal(o.stops.n, 0);
    assert_int_equal(parse("--round.stop=a,b -s c --round.stop a,b", &o, &args, NULL), SH_OK);
    assert_int_equal(o.stops.n, 3);
    assert_string_equal(o.stops.items[0], "a,b"); /* commas are text */
    assert_string_equal(o.stops.items[1], "c");
    assert_string_equal(o.stops.items[2], "a,b");
    assert_int_equal(parse_yaml("round:\n  stop: [x, 'y,z']\n", &o, &args, NULL), SH_OK);
    assert_int_equal(o.stops.n, 2);
    assert_string_equal(o.stops.items[1], "y,z");
    assert_int_equal(parse_yaml("round:\n  stop: one\n", &o, &args, NULL), SH_OK);
    assert_int_equal(o.stops.n, 1);
    assert_int_equal(parse_yaml("round:\n  stop: [a]\n  stop: [b]\n", &o, &args, &err),
                     SH_ERR_USAGE);
    assert_holds(err.text, "given twice");
    char *argv[2 + SH_OPTION_LIST_MAX] = {(char *)(uintptr_t) "shoal"};
    for (int i = 0; i <= SH_OPTION_LIST_MAX; i++)
        argv[1 + i] = (char *)(uintptr_t) "-sx";
    assert_int_equal(sh_options_parse(&command, 1 + SH_OPTION_LIST_MAX, argv, &o, &args, &err),
                     SH_OK);
    assert_int_equal(o.stops.n, SH_OPTION_LIST_MAX);
    assert_int_equal(sh_options_parse(&command, 2 + SH_OPTION_LIST_MAX, argv, &o, &args, &err),
                     SH_ERR_USAGE);
    assert_holds(err.text, "more than 16 times");

    /* Of a list in both places the command line's is the whole of it. */
    char path[] = "/tmp/shoal-option-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    static const char yaml[] = "round:\n  stop: [file, other]\n";
    assert_int_equal(sh_file_write_atomic(path, yaml, sizeof yaml - 1, &err), SH_OK);
    assert_int_equal(sh_options_parse_file(&command, path, 1, argv, &o, &args, &err), SH_OK);
    assert_int_equal(o.stops.n, 2);
    assert_string_equal(o.stops.items[0], "file");
    assert_int_equal(sh_options_parse_file(&command, path, 3, argv, &o, &args, &err), SH_OK);
    assert_int_equal(o.stops.n, 2);
    assert_string_equal(o.stops.items[0], "x");
    unlink(path);
    sh_args_release(&args);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_every_form_of_a_flag),
        cmocka_unit_test(test_positional_words),
        cmocka_unit_test(test_wrong_command_lines),
        cmocka_unit_test(test_limits_of_a_value),
        cmocka_unit_test(test_yaml_nests_with_dots),
        cmocka_unit_test(test_wrong_yaml),
        cmocka_unit_test(test_yaml_limits),
        cmocka_unit_test(test_flags_override_the_file),
        cmocka_unit_test(test_help),
        cmocka_unit_test(test_sample_round_trip),
        cmocka_unit_test(test_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
