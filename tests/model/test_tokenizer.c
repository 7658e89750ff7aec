/*
 * The tokenizer against a naive one (look at every pair, merge the best, begin again), and the
 * flags, special tokens and texts of tokens.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/model/util.h"

#define MARK "\xe2\x96\x81"
#define MAX  512 /* bytes of a random text with its spaces escaped */

typedef struct {
    char text[16];
    size_t n;
    float score;
} entry;

/* The vocabulary as the file has it, read without the tokenizer. */
typedef struct {
    sh_gguf *gguf;
    sh_tokenizer *tokenizer;
    entry *entries;
    size_t n;
} fixture;

static void open_fixture(const tiny_options *o, sh_buf *bytes, fixture *f)
{
    sh_buf_init(bytes, 16u << 20);
    assert_int_equal(tiny_encode(o, bytes), SH_OK);
    CHECK_OK(sh_gguf_open_memory(bytes->data, bytes->len, "tiny", &f->gguf, err));
    CHECK_OK(sh_tokenizer_load(f->gguf, &f->tokenizer, err));
    f->n = tiny_vocab();
    const char **texts = calloc(f->n, sizeof *texts);
    uint32_t *lengths = calloc(f->n, sizeof *lengths);
    float *scores = calloc(f->n, sizeof *scores);
    f->entries = calloc(f->n, sizeof *f->entries);
    CHECK_OK(sh_gguf_get_strings(f->gguf, "tokenizer.ggml.tokens", texts, lengths, f->n, err));
    CHECK_OK(sh_gguf_get_f32s(f->gguf, "tokenizer.ggml.scores", scores, f->n, err));
    for (size_t i = 0; i < f->n; i++) {
        assert_true(lengths[i] < sizeof f->entries[i].text);
        memcpy(f->entries[i].text, texts[i], lengths[i]);
        f->entries[i].n = lengths[i];
        f->entries[i].score = scores[i];
    }
    free(texts);
    free(lengths);
    free(scores);
}

static void close_fixture(fixture *f, sh_buf *bytes)
{
    sh_tokenizer_destroy(&f->tokenizer);
    sh_gguf_close(&f->gguf);
    free(f->entries);
    sh_buf_release(bytes);
}

static int find(const fixture *f, const char *text, size_t n)
{
    for (size_t i = 0; i < f->n; i++)
        if (f->entries[i].n == n && memcmp(f->entries[i].text, text, n) == 0)
            return (int)i;
    return -1;
}

/* ids[] of a text whose spaces are escaped; quadratic and worse, on purpose. */
static size_t naive(const fixture *f, const char *text, size_t bytes, int32_t *ids)
{
    size_t starts[MAX + 1], n = 0, n_ids = 0;
    for (size_t at = 0; at < bytes;) {
        static const size_t lengths[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
        const size_t length = lengths[(uint8_t)text[at] >> 4];
        starts[n++] = at;
        at += SH_MIN(length, bytes - at);
    }
    starts[n] = bytes;
    for (;;) {
        size_t best = n;
        float best_score = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            const int id = find(f, text + starts[i], starts[i + 2] - starts[i]);
            if (id >= 0 && (best == n || f->entries[id].score > best_score)) {
                best = i;
                best_score = f->entries[id].score;
            }
        }
        if (best == n)
            break;
        memmove(&starts[best + 1], &starts[best + 2], (n - best - 1) * sizeof *starts);
        n--;
    }
    for (size_t i = 0; i < n; i++) {
        const int id = find(f, text + starts[i], starts[i + 1] - starts[i]);
        if (id >= 0)
            ids[n_ids++] = id;
        for (size_t b = starts[i]; id < 0 && b < starts[i + 1]; b++)
            ids[n_ids++] = 3 + (uint8_t)text[b];
    }
    return n_ids;
}

static size_t escape(const char *text, size_t bytes, char *out)
{
    size_t n = 3;
    memcpy(out, MARK, 3);
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == ' ') {
            memcpy(out + n, MARK, 3);
            n += 3;
        } else {
            out[n++] = text[i];
        }
    }
    return n;
}

/* Texts from the letters of the pieces, spaces, and now and then any byte. */
static size_t random_text(sh_rng *rng, char *text, size_t bytes_max)
{
    static const char common[] = "theandforitswaisourlve    ";
    const size_t n = sh_rng_below(rng, bytes_max);
    for (size_t i = 0; i < n; i++) {
        const uint64_t kind = sh_rng_below(rng, 40);
        if (kind == 0)
            text[i] = (char)sh_rng_below(rng, 256);
        else if (kind == 1)
            text[i] = MARK[sh_rng_below(rng, 3)];
        else
            text[i] = common[sh_rng_below(rng, sizeof common - 1)];
    }
    return n;
}

static void compare_with_naive(const tiny_options *o, uint64_t seed)
{
    sh_buf bytes;
    fixture f = {0};
    open_fixture(o, &bytes, &f);
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    for (int round = 0; round < 400; round++) {
        char text[MAX / 3 - 1], escaped[MAX];
        int32_t expected[MAX], *ids = NULL;
        size_t n = 0;
        const size_t length = random_text(&rng, text, sizeof text);
        CHECK_OK(sh_tokenize(f.tokenizer, text, length, 0, &ids, &n, err));
        const size_t n_expected =
            length == 0 ? 0 : naive(&f, escaped, escape(text, length, escaped), expected);
        if (n != n_expected || memcmp(ids, expected, n * sizeof *ids) != 0) {
            size_t i = 0;
            while (i < n && i < n_expected && ids[i] == expected[i])
                i++;
            fail_msg("seed %d, round %d: %zu ids, expected %zu; the first difference is at %zu",
                     (int)seed, round, n, n_expected, i);
        }
        free(ids);
    }
    close_fixture(&f, &bytes);
}

static void test_equals_naive(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(1);
    compare_with_naive(&o, 1);
    /* A token that reaches over a word's end: words are no longer apart. "ou" is the longest-lived
     * piece to spare; "s" and the word mark with "a" come together by it. */
    o.token_from = "ou";
    o.token_to = "s" MARK "a";
    compare_with_naive(&o, 2);
}

/* Ids by position in tiny.c: pieces begin at 259. */
enum { MARK_ID = 259, THE_ID = 270, USER_ID_FROM_END = 1 };

static void test_flags_and_specials(void **state)
{
    (void)state;
    tiny_options o = tiny_defaults(1);
    o.add_bos = true;
    sh_buf bytes;
    fixture f = {0};
    open_fixture(&o, &bytes, &f);
    const sh_tokenizer *t = f.tokenizer;
    const int32_t user = (int32_t)tiny_vocab() - USER_ID_FROM_END;
    const int32_t he = find(&f, "he", 2), letter_t = find(&f, "t", 1);
    EXPECT_IDS(t, "the", 0, THE_ID);
    EXPECT_IDS(t, "the", SH_TOKENIZE_BOS, 1, THE_ID);
    EXPECT_IDS(t, "the", SH_TOKENIZE_CONTINUE, letter_t, he);
    EXPECT_IDS(t, " the", SH_TOKENIZE_CONTINUE, THE_ID);
    EXPECT_IDS(t, "", SH_TOKENIZE_BOS, 1);
    util_expect_ids(t, "", 0, 0, NULL);
    /* A user-defined token counts always, and the text after it begins anew; "</s>" only when
     * special tokens are parsed. */
    EXPECT_IDS(t, "the<|user|>the", 0, THE_ID, user, THE_ID);
    EXPECT_IDS(t, "<|user|><|user|>", 0, user, user);
    EXPECT_IDS(t, "the</s>the", SH_TOKENIZE_SPECIAL, THE_ID, 2, THE_ID);
    EXPECT_IDS(t, "</s", SH_TOKENIZE_SPECIAL, MARK_ID, 3 + '<', 3 + '/', find(&f, "s", 1));
    EXPECT_IDS(t, "</s>", 0, MARK_ID, 3 + '<', 3 + '/', find(&f, "s", 1), 3 + '>');
    EXPECT_IDS(t, "\xff", SH_TOKENIZE_CONTINUE, 3 + 0xff);
    EXPECT_IDS(t, "\xe2\x82\xac", SH_TOKENIZE_CONTINUE, 3 + 0xe2, 3 + 0x82, 3 + 0xac);
    assert_int_equal(sh_tokenizer_size(t), tiny_vocab());
    assert_int_equal(sh_tokenizer_bos(t), 1);
    assert_int_equal(sh_tokenizer_eos(t), 2);
    assert_true(sh_tokenizer_is_end(t, 2));
    assert_false(sh_tokenizer_is_end(t, THE_ID));
    assert_true(sh_tokenizer_adds_bos(t));
    assert_true(sh_tokenizer_is_byte(t, 3));
    assert_false(sh_tokenizer_is_byte(t, THE_ID));
    assert_false(sh_tokenizer_is_byte(t, -1));
    assert_true(sh_tokenizer_starts_word(t, THE_ID));
    assert_false(sh_tokenizer_starts_word(t, he));
    assert_false(sh_tokenizer_starts_word(t, (int32_t)tiny_vocab()));
    close_fixture(&f, &bytes);
}

static void test_detokenize(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(1);
    sh_buf bytes, text;
    fixture f = {0};
    open_fixture(&o, &bytes, &f);
    sh_buf_init(&text, 64);
    const int32_t tokens[] = {1, THE_ID, 3 + '!', (int32_t)tiny_vocab() - 1, 2, 0};
    for (size_t i = 0; i < SH_COUNT(tokens); i++)
        assert_int_equal(sh_detokenize(f.tokenizer, tokens[i], &text), SH_OK);
    assert_int_equal(text.len, strlen(" the!<|user|>"));
    assert_memory_equal(text.data, " the!<|user|>", text.len);
    assert_int_equal(sh_detokenize(f.tokenizer, -1, &text), SH_ERR_INVALID);
    assert_int_equal(sh_detokenize(f.tokenizer, (int32_t)tiny_vocab(), &text), SH_ERR_INVALID);
    sh_buf_release(&text);
    close_fixture(&f, &bytes);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    const tiny_options o = tiny_defaults(1);
    sh_buf bytes;
    fixture f = {0};
    open_fixture(&o, &bytes, &f);
    static const char text[] = "the<|user|>and then the other things of the sea";
    size_t n = 1;
    for (;; n++) {
        int32_t *ids = NULL;
        size_t n_ids = 99;
        sh_error err = {0};
        sh_alloc_fail_after(n);
        const sh_status status = sh_tokenize(f.tokenizer, text, sizeof text - 1,
                                             SH_TOKENIZE_SPECIAL, &ids, &n_ids, &err);
        sh_alloc_fail_after(0);
        if (status == SH_OK) {
            free(ids);
            break;
        }
        assert_int_equal(status, SH_ERR_NO_MEMORY);
        assert_null(ids);
        assert_int_equal(n_ids, 99);
    }
    assert_true(n > 5);
    close_fixture(&f, &bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_naive),
        cmocka_unit_test(test_flags_and_specials),
        cmocka_unit_test(test_detokenize),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
