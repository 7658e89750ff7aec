/*
 * The trainer of tokenizers: merges worked out by hand, against a naive implementation that counts
 * every pair anew for each merge, the engine's ids for what was trained on, hostile text.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/model/tokenizer.h"
#include "shared/model/tokenizer_unicode.h"
#include "tests/trainer/util.h"
#include "trainer/tokenizer_train.h"
#include "trainer/trainer.h"

#define EOT     "<|endoftext|>"
#define MARK    "\xe2\x96\x81"
#define BYTES   256
#define PURPOSE 0x746f6b74u /* names this use of the generator */

static sh_error err;
static char dir[] = "/tmp/shoal-tokenizer-test-XXXXXX";

static const char *path_of(const char *name)
{
    static char paths[4][128];
    static size_t next;
    char *path = paths[next++ % SH_COUNT(paths)];
    snprintf(path, sizeof paths[0], "%s/%s", dir, name);
    return path;
}

static void *must(void *memory)
{
    assert_non_null(memory);
    return memory;
}

/* ---- a training ---- */

typedef struct {
    const void *text;
    size_t n;
} document;

#define DOCUMENT(text)                                                                             \
    {                                                                                              \
        text, sizeof(text) - 1                                                                     \
    }

static sh_status train_to(const sh_tokenizer_train_options *o, const document *docs, size_t n,
                          sh_tokenizer_train_result *result, const char *path)
{
    sh_status status;
    sh_tokenizer_trainer *t = NULL;
    SH_GOTO(sh_tokenizer_trainer_create(o, &t, &err));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(sh_tokenizer_trainer_add(t, docs[i].text, docs[i].n, &err));
    SH_GOTO(sh_tokenizer_trainer_run(t, result, &err));
    SH_GOTO(sh_tokenizer_trainer_save(t, path, &err));
cleanup:
    sh_tokenizer_trainer_destroy(&t);
    return status;
}

static sh_tokenizer *load(const char *path)
{
    sh_gguf *gguf = NULL;
    sh_tokenizer *t = NULL;
    must_be_ok(sh_gguf_open(path, &gguf, &err));
    must_be_ok(sh_tokenizer_load(gguf, &t, &err));
    sh_gguf_close(&gguf);
    return t;
}

static sh_tokenizer *train(const sh_tokenizer_train_options *o, const document *docs, size_t n,
                           sh_tokenizer_train_result *result)
{
    must_be_ok(train_to(o, docs, n, result, path_of("vocab.gguf")));
    return load(path_of("vocab.gguf"));
}

static void must_spell(const sh_tokenizer *t, int32_t token, const char *text)
{
    size_t n = 0;
    const char *spelt = sh_tokenizer_text(t, token, &n);
    if (spelt == NULL || n != strlen(text) || memcmp(spelt, text, n) != 0)
        fail_msg("token %d is '%.*s', expected '%s'", token, (int)n, spelt ? spelt : "", text);
}

/* The text that the engine gives for the ids that it gives for a text. */
static void round_trip(const sh_tokenizer *t, const void *text, size_t n, sh_buf *out)
{
    int32_t *ids = NULL;
    size_t n_ids = 0;
    must_be_ok(sh_tokenize(t, text, n, SH_TOKENIZE_CONTINUE, &ids, &n_ids, &err));
    sh_buf_clear(out);
    for (size_t i = 0; i < n_ids; i++)
        must_be_ok(sh_detokenize(t, ids[i], out));
    free(ids);
}

static void must_return(const sh_tokenizer *t, const void *text, size_t n)
{
    sh_buf out;
    sh_buf_init(&out, SIZE_MAX);
    round_trip(t, text, n, &out);
    assert_int_equal(out.len, n);
    if (n > 0)
        assert_memory_equal(out.data, text, n);
    sh_buf_release(&out);
}

static size_t count_ids(const sh_tokenizer *t, const document *docs, size_t n)
{
    size_t total = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t *ids = NULL;
        size_t n_ids = 0;
        must_be_ok(sh_tokenize(t, docs[i].text, docs[i].n, 0, &ids, &n_ids, &err));
        total += n_ids;
        free(ids);
    }
    return total;
}

/* ---- by hand ---- */

/* Words "aab", " aab", " ab". ab 3 (aa 2, " a" 2); a+ab 2; then " "+ab and " "+aab, once each: the
 * shorter first. */
static void test_bpe_by_hand(void **state)
{
    (void)state;
    static const char *const tokens[] = {"ab", "aab",
                                         "\xc4\xa0"
                                         "ab",
                                         "\xc4\xa0"
                                         "aab"};
    static const char *const merges[] = {"a b", "a ab", "\xc4\xa0 ab", "\xc4\xa0 aab"};
    const document doc = DOCUMENT("aab aab ab");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 1 + BYTES + 4);
    sh_tokenizer_train_result r;
    sh_tokenizer *t = train(&o, &doc, 1, &r);
    sh_gguf *gguf = NULL;
    const char *texts[4];
    uint32_t lengths[4];
    size_t n = 0;
    assert_int_equal(sh_tokenizer_size(t), o.vocab);
    must_spell(t, 0, EOT);
    must_spell(t, 1 + 'a', "a");
    must_spell(t, 1 + '\n', "\xc4\x8a");
    for (size_t i = 0; i < 4; i++)
        must_spell(t, 1 + BYTES + (int32_t)i, tokens[i]);
    must_be_ok(sh_gguf_open(path_of("vocab.gguf"), &gguf, &err));
    must_be_ok(sh_gguf_get_array_count(gguf, "tokenizer.ggml.merges", &n, &err));
    assert_int_equal(n, 4);
    must_be_ok(sh_gguf_get_strings(gguf, "tokenizer.ggml.merges", texts, lengths, 4, &err));
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(lengths[i], strlen(merges[i]));
        assert_memory_equal(texts[i], merges[i], lengths[i]);
    }
    assert_int_equal(r.words, 3);
    assert_int_equal(r.text_bytes, 10);
    assert_int_equal(r.text_tokens, 3);
    assert_int_equal(count_ids(t, &doc, 1), 3);
    assert_int_equal(sh_tokenizer_bos(t), 0);
    assert_int_equal(sh_tokenizer_eos(t), 0);
    assert_false(sh_tokenizer_adds_bos(t));
    sh_gguf_close(&gguf);
    sh_tokenizer_destroy(&t);
}

/* Words "▁ab" twice, "▁abc". "ab" 3 and "▁a" 3: the shorter; "▁ab" 3; "▁abc" 1. Characters by
 * frequency: a, b, ▁ (3 each), c. */
static void test_spm_by_hand(void **state)
{
    (void)state;
    static const char *const tokens[] = {"ab", MARK "ab", MARK "abc", "a", "b", MARK, "c"};
    const document doc = DOCUMENT("ab ab abc");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_SPM, 3 + BYTES + 7);
    sh_tokenizer_train_result r;
    o.coverage = 1;
    sh_tokenizer *t = train(&o, &doc, 1, &r);
    sh_gguf *gguf = NULL;
    float scores[3 + BYTES + 7];
    int32_t types[3 + BYTES + 7];
    must_spell(t, 0, "<unk>");
    must_spell(t, 1, "<s>");
    must_spell(t, 2, "</s>");
    must_spell(t, 3, "<0x00>");
    must_spell(t, 3 + 255, "<0xFF>");
    must_be_ok(sh_gguf_open(path_of("vocab.gguf"), &gguf, &err));
    must_be_ok(sh_gguf_get_f32s(gguf, "tokenizer.ggml.scores", scores, SH_COUNT(scores), &err));
    must_be_ok(sh_gguf_get_i32s(gguf, "tokenizer.ggml.token_type", types, SH_COUNT(types), &err));
    for (size_t i = 0; i < SH_COUNT(types); i++) /* unknown, control, byte, normal */
        assert_int_equal(types[i], i == 0 ? 2 : i < 3 ? 3 : i < 3 + BYTES ? 6 : 1);
    for (size_t i = 0; i < 7; i++) {
        must_spell(t, 3 + BYTES + (int32_t)i, tokens[i]);
        must_be_near((double)scores[3 + BYTES + i], -(double)i, 0);
    }
    assert_int_equal(r.characters, 4);
    assert_int_equal(r.merges, 3);
    assert_int_equal(r.text_tokens, 3);
    assert_int_equal(count_ids(t, &doc, 1), 3);
    assert_int_equal(sh_tokenizer_bos(t), 1);
    assert_int_equal(sh_tokenizer_eos(t), 2);
    assert_true(sh_tokenizer_adds_bos(t));
    assert_true(sh_tokenizer_is_special(t, 0));
    assert_true(sh_tokenizer_is_byte(t, 3));
    sh_gguf_close(&gguf);
    sh_tokenizer_destroy(&t);
}

static void test_ties(void **state)
{
    (void)state;
    const document docs[] = {DOCUMENT("dc"), DOCUMENT("ba"), DOCUMENT("cbd")};
    const document long_docs[] = {DOCUMENT("abcdefghik"), DOCUMENT("abcdefghij")};
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 1 + BYTES + 4);
    sh_tokenizer_train_result r;
    sh_tokenizer *t = train(&o, docs, 3, &r);
    /* All once: "ba", "bd", "dc" by their bytes ("cb" is gone with "bd"), then what is longer. */
    static const char *const bpe[] = {"ba", "bd", "dc", "cbd"};
    for (size_t i = 0; i < SH_COUNT(bpe); i++)
        must_spell(t, 1 + BYTES + (int32_t)i, bpe[i]);
    sh_tokenizer_destroy(&t);
    /* The common part, then what differs after more than eight bytes. */
    o.vocab = 1 + BYTES + 10;
    t = train(&o, long_docs, 2, &r);
    must_spell(t, 1 + BYTES + 8, "abcdefghij");
    must_spell(t, 1 + BYTES + 9, "abcdefghik");
    sh_tokenizer_destroy(&t);
}

/* Pairs that overlap count, and are merged from the left: aaaaa is aa aa a. */
static void test_overlaps(void **state)
{
    (void)state;
    const document docs[] = {DOCUMENT("aaaaa"), DOCUMENT("xaa")};
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 1 + BYTES + 4);
    sh_tokenizer_train_result r;
    sh_tokenizer *t = train(&o, docs, 2, &r);
    /* aa 5; then aa+a, aa+aa, x+aa once each; "aaa" makes aa|aaa, and "xaa" is as long as it was.
     */
    static const char *const tokens[] = {"aa", "aaa", "xaa", "aaaaa"};
    for (size_t i = 0; i < SH_COUNT(tokens); i++)
        must_spell(t, 1 + BYTES + (int32_t)i, tokens[i]);
    assert_int_equal(r.text_tokens, 2);
    sh_tokenizer_destroy(&t);
}

/* ---- against a naive implementation ---- */

enum { SYMBOLS = 32, TEXT = 72, MERGES = 64, WORDS = 256 };
typedef char text_of[TEXT];
typedef struct {
    text_of s[SYMBOLS];
    size_t n;
} naive_word;
typedef struct {
    bool by_text;
    text_of left[MERGES], right[MERGES]; /* by_text: of the pair that was counted first */
    size_t n;
    text_of tokens[MERGES];
    size_t n_tokens;
    naive_word words[WORDS]; /* as they were at the beginning */
    size_t n_words;
} naive;

static void joined(const text_of a, const text_of b, text_of out)
{
    SH_ASSERT(strlen(a) + strlen(b) < TEXT);
    snprintf(out, TEXT, "%.35s%.35s", a, b);
}

static int naive_rank(const naive *v, const text_of a, const text_of b)
{
    text_of text, other;
    joined(a, b, text);
    for (size_t i = 0; i < v->n; i++) {
        joined(v->left[i], v->right[i], other);
        if (v->by_text ? strcmp(text, other) == 0
                       : strcmp(a, v->left[i]) == 0 && strcmp(b, v->right[i]) == 0)
            return (int)i;
    }
    return -1;
}

/* The merges of the lowest rank first, the leftmost of these. */
static naive_word naive_encode(const naive *v, const naive_word *word)
{
    naive_word w = *word;
    for (;;) {
        int best = -1;
        size_t at = 0;
        for (size_t i = 0; i + 1 < w.n; i++) {
            const int rank = naive_rank(v, w.s[i], w.s[i + 1]);
            if (rank >= 0 && (best < 0 || rank < best)) {
                best = rank;
                at = i;
            }
        }
        if (best < 0)
            return w;
        text_of text;
        joined(w.s[at], w.s[at + 1], text);
        memcpy(w.s[at], text, TEXT);
        memmove(w.s[at + 1], w.s[at + 2], (w.n - at - 2) * TEXT);
        w.n--;
    }
}

static bool naive_allows(const naive *v, const text_of text)
{
    size_t marks = 0;
    if (!v->by_text)
        return true;
    while (strncmp(text + 3 * marks, MARK, 3) == 0)
        marks++;
    return marks <= 1 || text[3 * marks] == '\0';
}

typedef struct {
    text_of left, right, text;
    size_t count;
} naive_pair;

static bool naive_before(const naive_pair *a, const naive_pair *b)
{
    if (a->count != b->count)
        return a->count > b->count;
    if (strlen(a->text) != strlen(b->text))
        return strlen(a->text) < strlen(b->text);
    const int order = strcmp(a->text, b->text);
    return order != 0 ? order < 0 : strlen(a->left) < strlen(b->left);
}

/* Whether there was a pair to merge. */
static bool naive_step(naive *v)
{
    static naive_pair pairs[WORDS * SYMBOLS];
    size_t n = 0, best = 0, known = 0;
    for (size_t k = 0; k < v->n_words; k++) {
        const naive_word w = naive_encode(v, &v->words[k]);
        for (size_t i = 0; i + 1 < w.n; i++) {
            naive_pair p = {.count = 1};
            memcpy(p.left, w.s[i], TEXT);
            memcpy(p.right, w.s[i + 1], TEXT);
            joined(p.left, p.right, p.text);
            if (!naive_allows(v, p.text))
                continue;
            size_t at = 0;
            while (at < n && (strcmp(pairs[at].text, p.text) != 0 ||
                              (!v->by_text && strcmp(pairs[at].left, p.left) != 0)))
                at++;
            if (at == n)
                pairs[n++] = p;
            else
                pairs[at].count++;
        }
    }
    if (n == 0)
        return false;
    for (size_t i = 1; i < n; i++)
        if (naive_before(&pairs[i], &pairs[best]))
            best = i;
    memcpy(v->left[v->n], pairs[best].left, TEXT);
    memcpy(v->right[v->n++], pairs[best].right, TEXT);
    while (known < v->n_tokens && strcmp(v->tokens[known], pairs[best].text) != 0)
        known++;
    if (known == v->n_tokens)
        memcpy(v->tokens[v->n_tokens++], pairs[best].text, TEXT);
    return true;
}

static void naive_add_symbols(const naive *v, naive_word *w, const char *character)
{
    const size_t step = v->by_text ? strlen(character) : 1;
    for (const char *at = character; *at != '\0'; at += step)
        snprintf(w->s[w->n++], TEXT, "%.*s", (int)step, at);
}

/* A random document of letters and spaces, and its words as the kind's rules cut it. */
static void random_document(sh_rng *rng, naive *v, char *out, size_t bytes)
{
    static const char *const letters[] = {"a", "b", "c", "\xc3\xa9", "\xe6\x97\xa5"};
    const size_t n = 3 + sh_rng_below(rng, 20);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const size_t spaces = i == 0 ? 0 : sh_rng_below(rng, 4) == 0 ? 1 + sh_rng_below(rng, 4) : 1;
        naive_word *w = &v->words[v->n_words++];
        *w = (naive_word){0};
        SH_ASSERT(v->n_words + 2 < WORDS);
        if (v->by_text && i == 0)
            naive_add_symbols(v, w, MARK);
        for (size_t k = 0; k < spaces; k++) {
            at += (size_t)snprintf(out + at, bytes - at, " ");
            if (!v->by_text && k == spaces - 1 && spaces > 1) {
                w = &v->words[v->n_words++];
                *w = (naive_word){0};
            }
            naive_add_symbols(v, w, v->by_text ? MARK : " ");
        }
        for (size_t k = 0, length = 1 + sh_rng_below(rng, 5); k < length; k++) {
            const char *letter = letters[sh_rng_below(rng, SH_COUNT(letters))];
            at += (size_t)snprintf(out + at, bytes - at, "%s", letter);
            naive_add_symbols(v, w, letter);
        }
    }
}

/* The engine's ids for the documents are the words' symbols, one after another. */
static void compare_ids(const sh_tokenizer *t, const naive *v, const document *docs, size_t n)
{
    size_t word = 0, symbol = 0;
    naive_word w = naive_encode(v, &v->words[0]);
    for (size_t d = 0; d < n; d++) {
        int32_t *ids = NULL;
        size_t n_ids = 0;
        must_be_ok(sh_tokenize(t, docs[d].text, docs[d].n, 0, &ids, &n_ids, &err));
        for (size_t i = 0; i < n_ids; i++) {
            sh_buf text;
            sh_buf_init(&text, TEXT);
            if (symbol == w.n) {
                w = naive_encode(v, &v->words[++word]);
                symbol = 0;
            }
            if (v->by_text) {
                must_spell(t, ids[i], w.s[symbol++]);
                continue;
            }
            must_be_ok(sh_detokenize(t, ids[i], &text));
            assert_int_equal(text.len, strlen(w.s[symbol]));
            assert_memory_equal(text.data, w.s[symbol++], text.len);
            sh_buf_release(&text);
        }
        free(ids);
    }
    assert_int_equal(word, v->n_words - 1);
    assert_int_equal(symbol, w.n);
}

static void compare_tokens(const sh_tokenizer *t, const naive *v)
{
    const int32_t first = v->by_text ? 3 + BYTES : 1 + BYTES;
    for (size_t i = 0; i < v->n_tokens; i++) {
        sh_buf text;
        if (v->by_text) {
            must_spell(t, first + (int32_t)i, v->tokens[i]);
            continue;
        }
        sh_buf_init(&text, TEXT);
        must_be_ok(sh_detokenize(t, first + (int32_t)i, &text));
        if (text.len != strlen(v->tokens[i]) || memcmp(text.data, v->tokens[i], text.len) != 0)
            fail_msg("merge %zu is '%.*s', naively '%s'", i, (int)text.len, (const char *)text.data,
                     v->tokens[i]);
        sh_buf_release(&text);
    }
}

static void compare_with_naive(sh_tokenizer_kind kind, uint64_t seed)
{
    static naive v;
    static char texts[3][2048];
    document docs[3];
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, PURPOSE);
    v.by_text = kind == SH_TOKENIZER_SPM;
    v.n = v.n_tokens = v.n_words = 0;
    const size_t n = 1 + sh_rng_below(&rng, 3), want = 1 + sh_rng_below(&rng, 40);
    bool seen[5] = {0};
    for (size_t i = 0; i < n; i++) {
        random_document(&rng, &v, texts[i], sizeof texts[i]);
        docs[i] = (document){texts[i], strlen(texts[i])};
        static const char *const letters[] = {"a", "b", "c", "\xc3\xa9", "\xe6\x97\xa5"};
        for (size_t k = 0; k < 5; k++)
            seen[k] = seen[k] || strstr(texts[i], letters[k]) != NULL;
    }
    uint32_t fixed = 1 + BYTES;
    if (v.by_text) {
        fixed = 3 + BYTES + 1;
        for (size_t k = 0; k < 5; k++)
            fixed += seen[k];
    }
    while (v.n < MERGES && v.n_tokens < want && naive_step(&v))
        continue;
    if (v.n == MERGES)
        return;
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(kind, fixed + (uint32_t)want);
    sh_tokenizer_train_result r;
    o.coverage = 1;
    if (v.n_tokens < want) {
        char allowed[32];
        must_fail(train_to(&o, docs, n, &r, path_of("vocab.gguf")), SH_ERR_INVALID);
        snprintf(allowed, sizeof allowed, "allows %zu ", fixed + v.n_tokens);
        must_say(allowed);
        o.vocab = fixed + (uint32_t)v.n_tokens;
    }
    sh_tokenizer *t = train(&o, docs, n, &r);
    compare_tokens(t, &v);
    compare_ids(t, &v, docs, n);
    assert_int_equal(r.text_tokens, count_ids(t, docs, n));
    assert_int_equal(r.merges, v.n);
    sh_tokenizer_destroy(&t);
}

static void test_naive(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        compare_with_naive(SH_TOKENIZER_BPE, seed);
        compare_with_naive(SH_TOKENIZER_SPM, seed);
    }
}

/* ---- properties ---- */

/* Text of made-up words, as much as asked for. */
static char *make_text(uint64_t seed, size_t bytes)
{
    static const char *const syllables[] = {"ka", "lo", "mi",  "ter", "an", "su", "den", "ro",
                                            "pi", "ne", "gal", "oo",  "st", "er", "in",  "7"};
    static const char *const ends[] = {" ", " ", " ", ", ", ". ", "\n", "\n\n", "-", "'s "};
    char *text = must(sh_calloc(bytes + 1, 1));
    sh_rng rng;
    sh_rng_init(&rng, seed, 1, PURPOSE);
    for (size_t at = 0; at + 24 < bytes;) {
        for (size_t k = 0, n = 1 + sh_rng_below(&rng, 4); k < n; k++)
            at += (size_t)snprintf(text + at, bytes - at, "%s",
                                   syllables[sh_rng_below(&rng, sh_rng_below(&rng, 16) + 1)]);
        at +=
            (size_t)snprintf(text + at, bytes - at, "%s", ends[sh_rng_below(&rng, SH_COUNT(ends))]);
    }
    return text;
}

/* The documents' order does not matter; neither does what they are cut into where words end. */
static void test_order(void **state)
{
    (void)state;
    char *texts[3];
    document docs[3], turned[3];
    for (size_t i = 0; i < 3; i++) {
        texts[i] = make_text(i + 1, 3000);
        docs[i] = (document){texts[i], strlen(texts[i])};
        turned[(i + 2) % 3] = docs[i];
    }
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        const sh_tokenizer_train_options o =
            sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, 450);
        sh_tokenizer_train_result r;
        uint8_t *bytes[3] = {0};
        size_t n[3];
        must_be_ok(train_to(&o, docs, 3, &r, path_of("a.gguf")));
        must_be_ok(train_to(&o, turned, 3, &r, path_of("b.gguf")));
        must_be_ok(train_to(&o, docs, 2, &r, path_of("c.gguf")));
        for (size_t i = 0; i < 3; i++)
            must_be_ok(sh_file_read(path_of((const char *const[]){"a.gguf", "b.gguf", "c.gguf"}[i]),
                                    SIZE_MAX, &bytes[i], &n[i], &err));
        assert_int_equal(n[0], n[1]);
        assert_memory_equal(bytes[0], bytes[1], n[0]);
        assert_true(n[0] != n[2] || memcmp(bytes[0], bytes[2], n[0]) != 0);
        for (size_t i = 0; i < 3; i++)
            free(bytes[i]);
    }
    for (size_t i = 0; i < 3; i++)
        free(texts[i]);
}

static size_t random_utf8(sh_rng *rng, uint8_t *out, size_t bytes)
{
    size_t n = 0;
    while (n + 4 <= bytes) {
        static const uint32_t most[] = {0x80, 0x250, 0x3000, 0xD800, SH_CHAR_MAX + 1};
        uint32_t code = (uint32_t)sh_rng_below(rng, most[sh_rng_below(rng, SH_COUNT(most))]);
        if ((code >= 0xD800 && code <= 0xDFFF) || code == 0x2581)
            code = ' ';
        n += sh_char_encode(code, out + n);
    }
    return n;
}

/* Bytes of any value, of which none makes U+2581, and no space comes into an unfinished character:
 * these two do not come back. */
static void fill_noise(sh_rng *rng, uint8_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)sh_rng_below(rng, 256);
        out[i] += out[i] == 0x96 || out[i] == ' ';
    }
}

/* What is encoded comes back: any UTF-8, and of spm bytes that are none, too. */
static void test_round_trips(void **state)
{
    (void)state;
    enum { MOST = 400 };
    char *text = make_text(5, 6000);
    const document doc = {text, strlen(text)};
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        const sh_tokenizer_train_options o =
            sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, 500);
        sh_tokenizer_train_result r;
        uint8_t bytes[MOST];
        sh_tokenizer *t = train(&o, &doc, 1, &r);
        sh_rng rng;
        must_return(t, text, doc.n);
        for (uint64_t seed = 0; seed < 300; seed++) {
            sh_rng_init(&rng, seed, 2, PURPOSE);
            must_return(t, bytes, random_utf8(&rng, bytes, MOST));
            if (kind == SH_TOKENIZER_BPE)
                continue;
            fill_noise(&rng, bytes, MOST);
            must_return(t, bytes, MOST);
        }
        sh_tokenizer_destroy(&t);
    }
    free(text);
}

/* Trains to 420 tokens, or to as many as the error says that there must or can be. */
static void train_within(sh_tokenizer_train_options *o, const document *docs, size_t n,
                         sh_tokenizer_train_result *r)
{
    o->vocab = 420;
    for (int tries = 0; train_to(o, docs, n, r, path_of("vocab.gguf")) != SH_OK; tries++) {
        const char *allows = strstr(err.text, "allows "), *needs = strstr(err.text, "at least ");
        if (tries == 2 || err.code != SH_ERR_INVALID ||
            sscanf(allows  ? allows
                   : needs ? needs
                           : "",
                   "%*[a-z ]%u", &o->vocab) != 1)
            fail_msg("%s", err.text);
    }
}

/* Whatever the text, there is a vocabulary, and its ids are counted as the engine does. */
static void try_hostile(const void *text, size_t n, bool returns)
{
    const document docs[] = {{text, n}, {text, n / 3}, {NULL, 0}};
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        sh_tokenizer_train_options o = sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, 0);
        sh_tokenizer_train_result r;
        train_within(&o, docs, 3, &r);
        sh_tokenizer *t = load(path_of("vocab.gguf"));
        assert_int_equal(sh_tokenizer_size(t), o.vocab);
        assert_int_equal(r.text_tokens, count_ids(t, docs, 3));
        assert_int_equal(r.text_bytes, n + n / 3);
        if (kind == SH_TOKENIZER_SPM && returns)
            must_return(t, text, n);
        sh_tokenizer_destroy(&t);
    }
}

static void test_hostile(void **state)
{
    (void)state;
    enum { MEGABYTE = 1 << 20, SOME = 20000 };
    static const uint8_t parts[] = {0xE2, 0x81, 0xF0, 0xED, 0xA0, 0x80, ' ', 'a', 0xC3, 0xC0, '1'};
    static const char same[] = {'\0', ' ', '\n', '\xff', '9'};
    uint8_t *bytes = must(sh_calloc(MEGABYTE, 1));
    sh_rng rng;
    sh_rng_init(&rng, 9, 3, PURPOSE);
    try_hostile(NULL, 0, true);
    for (size_t i = 0; i < SH_COUNT(same); i++) {
        memset(bytes, same[i], SOME);
        try_hostile(bytes, SOME, true);
    }
    memset(bytes, 'a', 5 * SOME);
    try_hostile(bytes, 5 * SOME, true);
    for (size_t i = 0; i < MEGABYTE; i++)
        bytes[i] = (uint8_t)('a' + sh_rng_below(&rng, 26));
    try_hostile(bytes, MEGABYTE, true);
    fill_noise(&rng, bytes, SOME);
    try_hostile(bytes, SOME, true);
    for (size_t i = 0; i < SOME; i++)
        bytes[i] = parts[sh_rng_below(&rng, SH_COUNT(parts))];
    try_hostile(bytes, SOME, false);
    free(bytes);
}

/* No token is longer than the limit, though the text would have it. */
static void test_long_tokens(void **state)
{
    (void)state;
    char text[5000];
    memset(text, 'a', sizeof text);
    const document doc = {text, sizeof text};
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        sh_tokenizer_train_options o = sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, 3000);
        sh_tokenizer_train_result r;
        unsigned vocab = 0;
        must_fail(train_to(&o, &doc, 1, &r, path_of("vocab.gguf")), SH_ERR_INVALID);
        assert_int_equal(sscanf(strstr(err.text, "allows "), "allows %u", &vocab), 1);
        o.vocab = vocab;
        sh_tokenizer *t = train(&o, &doc, 1, &r);
        size_t most = 0;
        for (uint32_t i = (uint32_t)BYTES + 3; i < o.vocab; i++) {
            size_t n = 0;
            sh_tokenizer_text(t, (int32_t)i, &n);
            most = SH_MAX(most, n);
        }
        assert_int_equal(most, SH_TOKENIZER_TOKEN_BYTES_MAX);
        sh_tokenizer_destroy(&t);
    }
}

/* ---- rules ---- */

/* Whether some token but those of bytes and special ones has a text as a part. */
static bool has_part(const sh_tokenizer *t, const char *part)
{
    for (uint32_t i = 0; i < sh_tokenizer_size(t); i++) {
        size_t n = 0;
        const char *text = sh_tokenizer_text(t, (int32_t)i, &n);
        if (!sh_tokenizer_is_special(t, (int32_t)i) && !sh_tokenizer_is_byte(t, (int32_t)i) &&
            memmem(text, n, part, strlen(part)) != NULL)
            return true;
    }
    return false;
}

static void test_specials(void **state)
{
    (void)state;
    static const char *const specials[] = {"<|im_start|>", "<|im_end|>", "<|im_end|>xy"};
    const document docs[] = {DOCUMENT("<|im_start|>user ab ab<|im_end|>"),
                             DOCUMENT("<|im_start|>user cd<|im_end|><|im_end|>xyab ab")};
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        const bool spm = kind == SH_TOKENIZER_SPM;
        sh_tokenizer_train_options o =
            sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, spm ? 275 : 265);
        sh_tokenizer_train_result r;
        o.specials = specials;
        o.n_specials = SH_COUNT(specials);
        sh_tokenizer *t = train(&o, docs, 2, &r);
        size_t n = 0, n_specials = 0;
        for (size_t i = 0; i < 3; i++) {
            must_spell(t, (spm ? 3 : 1) + (int32_t)i, specials[i]);
            assert_true(sh_tokenizer_is_special(t, (spm ? 3 : 1) + (int32_t)i));
        }
        assert_true(has_part(t, "us"));
        assert_false(has_part(t, "im"));
        assert_false(has_part(t, "en"));
        assert_false(has_part(t, "xy"));
        for (size_t d = 0; d < 2; d++) {
            int32_t *ids = NULL;
            size_t n_ids = 0;
            must_be_ok(
                sh_tokenize(t, docs[d].text, docs[d].n, SH_TOKENIZE_SPECIAL, &ids, &n_ids, &err));
            for (size_t i = 0; i < n_ids; i++)
                n_specials += sh_tokenizer_is_special(t, ids[i]);
            n += n_ids;
            free(ids);
        }
        assert_int_equal(n_specials, 5);
        assert_int_equal(n - n_specials, r.text_tokens);
        sh_tokenizer_destroy(&t);
    }
}

static sh_tokenizer *train_most(sh_tokenizer_train_options *o, const document *doc)
{
    sh_tokenizer_train_result r;
    unsigned vocab = 0;
    o->vocab = 5000;
    must_fail(train_to(o, doc, 1, &r, path_of("vocab.gguf")), SH_ERR_INVALID);
    assert_int_equal(sscanf(strstr(err.text, "allows "), "allows %u", &vocab), 1);
    o->vocab = vocab;
    return train(o, doc, 1, &r);
}

static void test_spm_rules(void **state)
{
    (void)state;
    const document doc = DOCUMENT(
        "ab, 12 12\tab\n\nab    ab (ab) e\xcc\x81 \xe6\x97\xa5\xe3\x80\x80\xe6\x97\xa5 \x01\x01 "
        "\xed\xa0\x80\xed\xa0\x80 \xc1\x81\xc1\x81");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_SPM, 0);
    o.coverage = 1;
    sh_tokenizer *t = train_most(&o, &doc);
    assert_true(has_part(t, MARK "ab"));
    assert_true(has_part(t, MARK "("));
    assert_true(has_part(t, "e\xcc\x81"));
    assert_true(has_part(t, MARK MARK MARK));
    assert_true(has_part(t, "\xe3\x80\x80")); /* U+3000: a character, in no piece */
    assert_false(has_part(t, MARK MARK "a"));
    assert_false(has_part(t, "ab" MARK));
    assert_false(has_part(t, "b,"));
    assert_false(has_part(t, "(a"));
    assert_false(has_part(t, "12"));
    assert_false(has_part(t, MARK "1"));
    assert_false(has_part(t, "\xe6\x97\xa5\xe3\x80\x80"));
    assert_false(has_part(t, "\t"));
    assert_false(has_part(t, "\n"));
    assert_false(has_part(t, "\x01"));
    assert_false(has_part(t, "\xed")); /* a surrogate and an overlong form are no characters */
    assert_false(has_part(t, "\xc1"));
    assert_false(has_part(t, "A"));
    must_return(t, doc.text, doc.n);
    sh_tokenizer_destroy(&t);
    o.split_digits = false;
    t = train_most(&o, &doc);
    assert_true(has_part(t, MARK "12"));
    sh_tokenizer_destroy(&t);

    /* Rare characters have no token; a text need not begin with a space. */
    o.coverage = 0.6;
    o.add_space_prefix = false;
    t = train_most(&o, &doc);
    assert_true(has_part(t, "ab"));
    assert_false(has_part(t, "\xe6\x97\xa5"));
    must_return(t, doc.text, doc.n);
    int32_t *ids = NULL;
    size_t n = 0;
    must_be_ok(sh_tokenize(t, "\xe6\x97\xa5", 3, 0, &ids, &n, &err));
    assert_int_equal(n, 3);
    for (size_t i = 0; i < n; i++)
        assert_true(sh_tokenizer_is_byte(t, ids[i]));
    free(ids);
    sh_tokenizer_destroy(&t);
}

/* "▁" has a token though no text has a space. */
static void test_no_spaces(void **state)
{
    (void)state;
    const document doc = DOCUMENT("abab");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_SPM, 0);
    o.add_space_prefix = false;
    sh_tokenizer *t = train_most(&o, &doc);
    assert_int_equal(o.vocab, 3 + BYTES + 3 + 2);
    must_return(t, " a b ", 5);
    sh_tokenizer_destroy(&t);
}

static void test_bpe_rules(void **state)
{
    (void)state;
    const document doc = DOCUMENT("it's 123 123 x");
    static const struct {
        const char *rule;
        const char *has, *has_not;
    } cases[] = {{"smollm", "'s", "12"},
                 {"gpt-2",
                  "\xc4\xa0"
                  "123",
                  "it'"},
                 {"llama-bpe", "123",
                  "\xc4\xa0"
                  "1"},
                 {"qwen2", "'s", "12"}};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 0);
        o.pre = cases[i].rule;
        sh_tokenizer *t = train_most(&o, &doc);
        assert_true(has_part(t, cases[i].has));
        assert_false(has_part(t, cases[i].has_not));
        must_return(t, doc.text, doc.n);
        sh_tokenizer_destroy(&t);
    }
}

static void test_bos_and_eos(void **state)
{
    (void)state;
    const document doc = DOCUMENT("ab");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, BYTES + 3);
    sh_tokenizer_train_result r;
    o.bos = "<begin>";
    o.eos = "<end>";
    o.add_bos = o.add_eos = true;
    sh_tokenizer *t = train(&o, &doc, 1, &r);
    int32_t *ids = NULL;
    size_t n = 0;
    must_be_ok(sh_tokenize(t, "ab", 2, SH_TOKENIZE_BOS | SH_TOKENIZE_EOS, &ids, &n, &err));
    assert_int_equal(n, 3);
    assert_int_equal(ids[0], 0);
    assert_int_equal(ids[1], BYTES + 2);
    assert_int_equal(ids[2], 1);
    assert_true(sh_tokenizer_is_end(t, 1));
    free(ids);
    sh_tokenizer_destroy(&t);
}

/* ---- errors ---- */

static void test_errors(void **state)
{
    (void)state;
    static const char *const twice[] = {"<x>", "<x>"}, *const empty[] = {""},
                             *const invalid[] = {"\xff"},
                             *const learnt[] = {"\xc4\xa0"
                                                "ab"},
                             *const byte[] = {"<0x41>"};
    const document doc = DOCUMENT("ab ab ab");
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, BYTES);
    sh_tokenizer_train_result r;
#define REFUSED(status, part)                                                                      \
    do {                                                                                           \
        must_fail(train_to(&o, &doc, 1, &r, path_of("x.gguf")), status);                           \
        must_say(part);                                                                            \
        assert_false(sh_file_exists(path_of("x.gguf")));                                           \
    } while (0)
    REFUSED(SH_ERR_INVALID, "at least 257");
    o.vocab = BYTES + 4;
    REFUSED(SH_ERR_INVALID, "allows 259 at most");
    o.vocab = SH_VOCAB_MAX + 1;
    REFUSED(SH_ERR_LIMIT, "1048576");
    o.vocab = BYTES + 3;
    o.pre = "absent";
    REFUSED(SH_ERR_UNSUPPORTED, "absent");
    o.pre = "gpt-2";
    o.n_specials = 2;
    o.specials = twice;
    REFUSED(SH_ERR_INVALID, "'<x>' is there twice");
    o.n_specials = 1;
    o.specials = empty;
    REFUSED(SH_ERR_INVALID, "special token 1");
    o.specials = invalid;
    REFUSED(SH_ERR_INVALID, "special token 1");
    o.vocab = BYTES + 4;
    o.specials = learnt;
    REFUSED(SH_ERR_INVALID, "another spelling");
    o = sh_tokenizer_train_defaults(SH_TOKENIZER_SPM, BYTES + 5);
    REFUSED(SH_ERR_INVALID, "the text's 3 characters");
    REFUSED(SH_ERR_INVALID, "at least 262");
    o.vocab = BYTES + 7;
    o.specials = byte;
    o.n_specials = 1;
    REFUSED(SH_ERR_INVALID, "<0x41>");
    o.n_specials = 0;
    o.coverage = 0;
    REFUSED(SH_ERR_INVALID, "coverage");
#undef REFUSED
}

static bool stop_at_260(void *arg, uint32_t tokens)
{
    uint32_t *calls = arg;
    ++*calls;
    return tokens < 260;
}

static void test_cancelled(void **state)
{
    (void)state;
    char *text = make_text(3, 2000);
    const document doc = {text, strlen(text)};
    uint32_t calls = 0;
    sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 300);
    sh_tokenizer_train_result r;
    o.progress = stop_at_260;
    o.progress_arg = &calls;
    must_fail(train_to(&o, &doc, 1, &r, path_of("x.gguf")), SH_ERR_CANCELLED);
    assert_int_equal(calls, 3);
    free(text);
}

/* Every allocation fails once: an error each time, and then a vocabulary. */
static void test_out_of_memory(void **state)
{
    (void)state;
    char *text = make_text(4, 600);
    const document doc = {text, strlen(text)};
    for (int kind = SH_TOKENIZER_BPE; kind <= SH_TOKENIZER_SPM; kind++) {
        const sh_tokenizer_train_options o =
            sh_tokenizer_train_defaults((sh_tokenizer_kind)kind, 300);
        sh_tokenizer_train_result r;
        sh_status status = SH_ERR_NO_MEMORY;
        size_t n = 0;
        while (status != SH_OK) {
            sh_alloc_fail_after(++n);
            status = train_to(&o, &doc, 1, &r, path_of("vocab.gguf"));
            sh_alloc_fail_after(0);
            if (status != SH_OK && status != SH_ERR_NO_MEMORY)
                fail_msg("allocation %zu: %s (%s)", n, sh_status_name(status), err.text);
        }
        assert_true(n > 20);
    }
    free(text);
}

/* ---- a model ---- */

static void test_model(void **state)
{
    (void)state;
    enum { LENGTH = 17, SEQUENCES = 32 };
    char *text = make_text(7, 40000);
    const document doc = {text, strlen(text)};
    const sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 512);
    sh_tokenizer_train_result r;
    sh_tokenizer *t = train(&o, &doc, 1, &r);
    int32_t *ids = NULL, *again = NULL;
    size_t n = 0, n_again = 0;
    must_be_ok(sh_tokenize(t, text, doc.n, SH_TOKENIZE_BOS, &ids, &n, &err));
    assert_true(n > LENGTH * SEQUENCES);
    const sh_train_data data = {.tokens = ids, .n = SEQUENCES, .length = LENGTH};
    const sh_model_config config = {.n_layers = 1,
                                    .width = 16,
                                    .n_heads = 2,
                                    .n_kv_heads = 1,
                                    .head_size = 8,
                                    .ffn = 32,
                                    .vocab = sh_tokenizer_size(t),
                                    .context = 32,
                                    .rope_base = 10000,
                                    .norm_eps = 1e-5f,
                                    .tied_output = true};
    const sh_train_options options = {.lr = 0.02f, .lr_final = 1, .batch = 8, .steps = 12};
    sh_train_result result;
    sh_full *full = NULL;
    sh_model *model = NULL;
    must_be_ok(sh_full_random(&config, path_of("vocab.gguf"), 1, &full, &err));
    must_be_ok(sh_full_train(full, &data, &options, &result, &err));
    assert_true(result.loss_last < result.loss_first);
    must_be_ok(sh_full_save(full, SH_TYPE_F32, path_of("model.gguf"), &err));
    must_be_ok(sh_model_open(path_of("model.gguf"), &model, &err));
    assert_int_equal(model->config.vocab, 512);
    must_be_ok(sh_tokenize(model->tokenizer, text, doc.n, SH_TOKENIZE_BOS, &again, &n_again, &err));
    assert_int_equal(n, n_again);
    assert_memory_equal(ids, again, n * sizeof *ids);
    free(ids);
    free(again);
    free(text);
    sh_full_destroy(&full);
    sh_model_close(&model);
    sh_tokenizer_destroy(&t);
}

static int prepare(void **state)
{
    (void)state;
    return mkdtemp(dir) == NULL;
}

static int clean(void **state)
{
    (void)state;
    static const char *const files[] = {"vocab.gguf", "a.gguf", "b.gguf", "c.gguf", "model.gguf"};
    for (size_t i = 0; i < SH_COUNT(files); i++)
        unlink(path_of(files[i]));
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bpe_by_hand),   cmocka_unit_test(test_spm_by_hand),
        cmocka_unit_test(test_ties),          cmocka_unit_test(test_overlaps),
        cmocka_unit_test(test_naive),         cmocka_unit_test(test_order),
        cmocka_unit_test(test_round_trips),   cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_long_tokens),   cmocka_unit_test(test_specials),
        cmocka_unit_test(test_spm_rules),     cmocka_unit_test(test_no_spaces),
        cmocka_unit_test(test_bpe_rules),     cmocka_unit_test(test_bos_and_eos),
        cmocka_unit_test(test_errors),        cmocka_unit_test(test_cancelled),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_model),
    };
    return cmocka_run_group_tests(tests, prepare, clean);
}
