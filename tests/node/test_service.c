/* The inference service against the model's own forward pass, on a tiny model. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "edge-node/service.h"
#include "shared/base/rng.h"
#include "tests/model/tiny.h"

static sh_error err;

#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), err.text);                   \
    } while (0)
#define NEAR(a, b, tolerance)                                                                      \
    do {                                                                                           \
        double near_a_ = (a), near_b_ = (b);                                                       \
        if (!(fabs(near_a_ - near_b_) <= (tolerance)))                                             \
            fail_msg("%s is %.9g, %s is %.9g", #a, near_a_, #b, near_b_);                          \
    } while (0)

static sh_model *model, *other; /* of two seeds, the second with BOS */
static sh_frozen *frozen;

static sh_model *open_tiny(uint64_t seed, bool bos)
{
    char path[] = "/tmp/shoal-service-XXXXXX";
    tiny_options options = tiny_defaults(seed);
    sh_model *m = NULL;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    options.add_bos = bos;
    OK(tiny_write(&options, path, &err));
    OK(sh_model_open(path, &m, &err));
    unlink(path); /* the map stays */
    return m;
}

static int setup(void **state)
{
    (void)state;
    OK(sh_crypto_init(&err));
    model = open_tiny(1, false);
    other = open_tiny(2, true);
    OK(sh_frozen_create(model, &frozen, &err));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    sh_frozen_destroy(&frozen);
    sh_model_close(&model);
    sh_model_close(&other);
    return 0;
}

static sh_session *new_session(const sh_model *m, uint32_t n_max)
{
    sh_session *s = NULL;
    sh_session_options options = {.n_tokens_max = n_max, .release_version = 7};
    OK(sh_session_create(m, frozen, &options, &s, &err));
    OK(sh_session_begin(s, &err));
    return s;
}

static void random_text(uint64_t seed, int32_t *tokens, size_t n)
{
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 9);
    for (size_t i = 0; i < n; i++)
        tokens[i] = (int32_t)(3 + sh_rng_below(&rng, model->config.vocab - 3));
}

static void same_completion(const sh_completion *a, const sh_completion *b)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->tokens, b->tokens, a->n * sizeof(a->tokens[0]));
    assert_memory_equal(&a->record, &b->record, sizeof(a->record));
}

/* Logits after tokens, by a context of its own. */
static void direct_logits(const sh_model *m, const int32_t *tokens, uint32_t n, float *all)
{
    sh_context *context = NULL;
    sh_context_options options = {.n_tokens_max = m->config.context};
    OK(sh_context_create(m, &options, &context, &err));
    OK(sh_context_decode(context, tokens, n, SH_LOGITS_ALL, all, &err));
    sh_context_destroy(&context);
}

static void measures_what_the_model_says(void **state)
{
    (void)state;
    for (int bos = 0; bos < 2; bos++) {
        const sh_model *m = bos ? other : model;
        int32_t text[41] = {sh_tokenizer_bos(m->tokenizer)};
        random_text(3, text + 1, 40);
        const int32_t *seen = bos ? text : text + 1;
        uint32_t n = bos ? 41 : 40;
        float *logits = calloc((size_t)n * m->config.vocab, sizeof(float));
        assert_non_null(logits);
        direct_logits(m, seen, n, logits);
        double nll = 0;
        uint32_t scored = 0;
        for (uint32_t i = 1; i < n; i++) {
            uint32_t typed = bos ? i - 1 : i;
            if (typed > 32) /* of those after 32 one in 32, by its number */
                continue;
            nll += sh_nll(logits + (size_t)(i - 1) * m->config.vocab, m->config.vocab, seen[i]);
            scored++;
        }
        sh_session *s = new_session(m, 64);
        sh_completion done;
        OK(sh_session_type(s, text + 1, 40, &err));
        OK(sh_session_complete(s, 1, &done, &err));
        NEAR(done.record.prompt_nll, nll / scored, 1e-5);
        const float *last = logits + (size_t)(n - 1) * m->config.vocab;
        assert_int_equal(done.n, 1);
        for (uint32_t t = 0; t < m->config.vocab; t++)
            assert_true(last[t] <= last[done.tokens[0]]);
        NEAR(done.record.mean_logprob, -sh_nll(last, m->config.vocab, done.tokens[0]), 1e-5);
        double entropy = 0;
        for (uint32_t t = 0; t < m->config.vocab; t++) {
            double q = sh_nll(last, m->config.vocab, (int32_t)t);
            entropy += exp(-q) * q;
        }
        NEAR(done.record.mean_entropy, entropy, 1e-4);
        assert_int_equal(done.record.prompt_tokens, 40);
        assert_int_equal(done.record.release_version, 7);
        unsigned counted = 0, bytes = 0;
        for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
            counted += sh_record_bucket(&done.record, b);
        for (int i = 1; i <= 40; i++)
            bytes += sh_tokenizer_is_byte(m->tokenizer, text[i]);
        assert_int_equal(counted, 40);
        NEAR(done.record.byte_fallback, bytes / 40.0, 1e-6);
        assert_true(bytes > 0);
        sh_session_destroy(&s);
        free(logits);
    }
}

static void splits_do_not_matter(void **state)
{
    (void)state;
    int32_t text[200];
    random_text(4, text, 200);
    for (uint64_t seed = 0; seed < 6; seed++) {
        sh_session *whole = new_session(model, 40), *split = new_session(model, 40);
        sh_completion a, b;
        sh_rng rng;
        sh_rng_init(&rng, seed, 1, 9);
        for (size_t at = 0; at < 200;) { /* it slides several times */
            size_t n = SH_MIN((size_t)200 - at, (size_t)50);
            OK(sh_session_type(whole, text + at, n, &err));
            for (size_t k = 0; k < n;) {
                size_t piece = 1 + sh_rng_below(&rng, 20);
                piece = SH_MIN(piece, n - k);
                OK(sh_session_type(split, text + at + k, piece, &err));
                k += piece;
            }
            at += n;
            OK(sh_session_complete(whole, SH_WORD_TOKENS_MAX, &a, &err));
            OK(sh_session_complete(split, SH_WORD_TOKENS_MAX, &b, &err));
            same_completion(&a, &b);
            assert_int_equal(a.record.prompt_tokens, 50);
        }
        sh_session_destroy(&whole);
        sh_session_destroy(&split);
    }
}

static void a_proposal_leaves_no_trace(void **state)
{
    (void)state;
    int32_t text[30];
    random_text(5, text, 30);
    sh_session *asks = new_session(model, 64), *types = new_session(model, 64);
    sh_completion a, b;
    OK(sh_session_type(asks, text, 20, &err));
    for (int i = 0; i < 3; i++) {
        sh_completion again;
        OK(sh_session_complete(asks, SH_WORD_TOKENS_MAX, &again, &err));
        if (i > 0) {
            assert_int_equal(again.n, a.n);
            assert_memory_equal(again.tokens, a.tokens, a.n * sizeof(a.tokens[0]));
            assert_int_equal(again.record.prompt_tokens, 0);
        }
        a = again;
    }
    OK(sh_session_type(asks, text + 20, 10, &err));
    OK(sh_session_complete(asks, SH_WORD_TOKENS_MAX, &a, &err));
    OK(sh_session_type(types, text, 20, &err));
    OK(sh_session_complete(types, 1, &b, &err));
    OK(sh_session_type(types, text + 20, 10, &err));
    OK(sh_session_complete(types, SH_WORD_TOKENS_MAX, &b, &err));
    same_completion(&a, &b);
    sh_session_destroy(&asks);
    sh_session_destroy(&types);
}

static void a_completion_is_one_word(void **state)
{
    (void)state;
    sh_session *s = new_session(model, 64);
    int32_t text[400];
    bool stopped[3] = {false};
    random_text(6, text, 400);
    for (int i = 0; i < 400; i++) {
        sh_completion c;
        OK(sh_session_type(s, text + i, 1, &err));
        OK(sh_session_complete(s, SH_WORD_TOKENS_MAX, &c, &err));
        assert_in_range(c.n, 0, SH_WORD_TOKENS_MAX);
        assert_int_equal(sh_word_length(frozen, c.tokens, c.n, SH_WORD_TOKENS_MAX), c.n);
        assert_int_equal(c.record.output_tokens, c.n);
        assert_true(c.record.least_logprob <= c.record.mean_logprob + 1e-6f);
        assert_true(c.record.repeated_4grams >= 0 && c.record.repeated_4grams <= 1);
        assert_true(c.evaluated >= 1);
        stopped[c.record.stop] = true;
    }
    assert_true(stopped[SH_STOP_WORD]);
    sh_session_destroy(&s);
}

static void words(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        const char *first;
    } cases[] = {
        {"the cat", " the"},
        {"don't go", " don't"},
        {"x, y", " x"},
        {"well-known", " well-known"},
        {"na\xc3\xafve x", " na\xc3\xafve"},
        {"a.b", " a"},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        int32_t *tokens = NULL;
        size_t n;
        sh_buf text;
        sh_buf_init(&text, 100);
        OK(sh_tokenize(model->tokenizer, cases[i].text, strlen(cases[i].text), 0, &tokens, &n,
                       &err));
        uint32_t length = sh_word_length(frozen, tokens, (uint32_t)n, 100);
        for (uint32_t k = 0; k < length; k++)
            OK(sh_detokenize(model->tokenizer, tokens[k], &text));
        if (text.len != strlen(cases[i].first) || memcmp(text.data, cases[i].first, text.len) != 0)
            fail_msg("'%s': first word is '%.*s', not '%s'", cases[i].text, (int)text.len,
                     (const char *)text.data, cases[i].first);
        assert_int_equal(sh_word_length(frozen, tokens, (uint32_t)n, 1), 1);
        assert_int_equal(sh_word_length(frozen, tokens, 0, 5), 0);
        sh_buf_release(&text);
        free(tokens);
    }
}

static void judges_like_a_user(void **state)
{
    (void)state;
    static const struct {
        int32_t author[4];
        uint32_t n;
        sh_feedback_kind kind;
        unsigned distance;
    } cases[] = {
        {{1, 2, 3}, 3, SH_FEEDBACK_ACCEPT, 0},    {{1, 2}, 2, SH_FEEDBACK_EDIT, 1},
        {{1, 2, 3, 4}, 4, SH_FEEDBACK_EDIT, 1},   {{7, 8, 9}, 3, SH_FEEDBACK_REJECT, 3},
        {{7, 8, 9, 6}, 4, SH_FEEDBACK_REJECT, 4}, {{0}, 0, SH_FEEDBACK_REJECT, 3},
        {{2, 3}, 2, SH_FEEDBACK_EDIT, 1},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_completion c = {.n = 3, .tokens = {1, 2, 3}};
        assert_int_equal(sh_completion_judge(&c, cases[i].author, cases[i].n), cases[i].kind);
        assert_int_equal(c.record.feedback, cases[i].kind);
        assert_int_equal(c.record.edit_distance, cases[i].distance);
    }
    int32_t long_word[100] = {0};
    sh_completion c = {.n = 3, .tokens = {1, 2, 3}};
    assert_int_equal(sh_completion_judge(&c, long_word, 100), SH_FEEDBACK_REJECT);
    assert_int_equal(c.record.edit_distance, SH_JUDGED_TOKENS_MAX);
}

static void the_frozen_embedding_stays(void **state)
{
    (void)state;
    sh_frozen *again = NULL, *another = NULL;
    OK(sh_frozen_create(model, &again, &err));
    OK(sh_frozen_create(other, &another, &err));
    sh_hash a = sh_frozen_hash(frozen), b = sh_frozen_hash(again), c = sh_frozen_hash(another);
    assert_true(sh_hash_equal(&a, &b));
    assert_false(sh_hash_equal(&a, &c));
    /* the same text through two releases: the same projection, other likelihoods */
    int32_t text[20];
    random_text(7, text, 20);
    sh_session *one = new_session(model, 64), *two = new_session(other, 64);
    sh_completion x, y;
    OK(sh_session_type(one, text, 20, &err));
    OK(sh_session_type(two, text, 20, &err));
    OK(sh_session_complete(one, 1, &x, &err));
    OK(sh_session_complete(two, 1, &y, &err));
    assert_memory_equal(x.record.projection, y.record.projection, SH_PROJECTIONS);
    assert_memory_equal(x.record.bucket, y.record.bucket, sizeof(x.record.bucket));
    assert_true(x.record.prompt_nll != y.record.prompt_nll);
    int nonzero = 0;
    for (int k = 0; k < SH_PROJECTIONS; k++)
        nonzero += x.record.projection[k] != 0;
    assert_true(nonzero >= 8);
    sh_session_destroy(&one);
    sh_session_destroy(&two);
    sh_frozen_destroy(&again);
    sh_frozen_destroy(&another);
}

static void resumes_and_switches(void **state)
{
    (void)state;
    int32_t text[30];
    random_text(8, text, 30);
    sh_session *typed = new_session(other, 64), *resumed = new_session(other, 64),
               *switched = new_session(model, 64);
    sh_completion a, b;
    OK(sh_session_type(typed, text, 20, &err));
    OK(sh_session_complete(typed, 1, &a, &err));
    OK(sh_session_type(typed, text + 20, 10, &err));
    OK(sh_session_complete(typed, SH_WORD_TOKENS_MAX, &a, &err));
    OK(sh_session_resume(resumed, text, 20, &err));
    OK(sh_session_type(resumed, text + 20, 10, &err));
    OK(sh_session_complete(resumed, SH_WORD_TOKENS_MAX, &b, &err));
    same_completion(&a, &b);
    /* `model` has no BOS, so compare a switch with a text that never had one either */
    OK(sh_session_type(switched, text, 20, &err));
    OK(sh_session_switch(switched, other, 9, &err));
    OK(sh_session_complete(switched, 1, &b, &err));
    assert_int_equal(b.record.release_version, 9);
    float *logits = calloc(20 * (size_t)other->config.vocab, sizeof(float));
    assert_non_null(logits);
    direct_logits(other, text, 20, logits);
    NEAR(b.record.mean_logprob,
         -sh_nll(logits + 19 * (size_t)other->config.vocab, other->config.vocab, b.tokens[0]),
         1e-5);
    free(logits);
    sh_session_destroy(&typed);
    sh_session_destroy(&resumed);
    sh_session_destroy(&switched);
}

static uint32_t propose(sh_session *s, uint32_t max_tokens, uint32_t take, int32_t *tokens,
                        sh_record *record)
{
    sh_proposing how = {.max_tokens = max_tokens, .sampling.top_p = 1};
    sh_proposal proposal;
    uint32_t n = 0;
    bool done = false;
    OK(sh_session_propose(s, &how, &err));
    while (n < take && !done) {
        OK(sh_session_next(s, &tokens[n], &done, &err));
        n += !done;
    }
    sh_session_end(s, &proposal);
    assert_int_equal(proposal.n, n);
    assert_memory_equal(proposal.tokens, tokens, n * sizeof(*tokens));
    *record = proposal.record;
    return n;
}

static void proposes_any_length(void **state)
{
    (void)state;
    enum { PROMPT = 12, LENGTH = 30 };
    const uint32_t vocab = other->config.vocab;
    int32_t seen[1 + PROMPT + LENGTH] = {sh_tokenizer_bos(other->tokenizer)}, tokens[LENGTH + 1];
    float *logits = calloc((size_t)(1 + PROMPT + LENGTH) * vocab, sizeof(float));
    sh_record whole, cut_off, again;
    assert_non_null(logits);
    random_text(9, seen + 1, PROMPT);
    sh_session *s = new_session(other, 64);
    OK(sh_session_type(s, seen + 1, PROMPT, &err));
    /* the user is gone after 5: nothing stays of them, but what was typed is measured */
    assert_int_equal(propose(s, LENGTH, 5, tokens, &cut_off), 5);
    assert_int_equal(cut_off.stop, SH_STOP_CANCELLED);
    assert_int_equal(cut_off.prompt_tokens, PROMPT);
    uint32_t n = propose(s, LENGTH, LENGTH + 1, tokens, &whole);
    assert_int_equal(whole.prompt_tokens, 0);
    assert_int_equal(whole.output_tokens, n);
    assert_true(n > 5);
    assert_int_equal(whole.stop, n == LENGTH ? SH_STOP_LIMIT : SH_STOP_END_OF_TEXT);
    memcpy(seen + 1 + PROMPT, tokens, n * sizeof(int32_t));
    direct_logits(other, seen, 1 + PROMPT + n, logits);
    double nll = 0, most = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float *before = logits + (size_t)(PROMPT + i) * vocab;
        for (uint32_t t = 0; t < vocab; t++)
            assert_true(before[t] <= before[tokens[i]]);
        double one = sh_nll(before, vocab, tokens[i]);
        nll += one;
        most = fmax(most, one);
    }
    NEAR(whole.mean_logprob, -nll / n, 1e-5);
    NEAR(whole.least_logprob, -most, 1e-5);
    /* as much as the session has room for, and no word of it is kept */
    assert_int_equal(propose(s, 64 - 1 - PROMPT, LENGTH, tokens, &again), SH_MIN(n, LENGTH));
    uint32_t length;
    assert_memory_equal(sh_session_text(s, &length), seen + 1, PROMPT * sizeof(int32_t));
    assert_int_equal(length, PROMPT);
    sh_session_destroy(&s);
    free(logits);
}

static void a_cut_text_is_as_if_it_had_ended_there(void **state)
{
    (void)state;
    int32_t text[40], rest[10], tokens[8], wanted[8];
    random_text(10, text, 40);
    random_text(11, rest, 10);
    for (int bos = 0; bos < 2; bos++) {
        for (uint32_t keep = bos ? 0 : 1; keep <= 41; keep++) {
            const sh_model *m = bos ? other : model;
            sh_session *cut = new_session(m, 64), *whole = new_session(m, 64);
            sh_record a, b;
            OK(sh_session_type(cut, text, 40, &err));
            if (keep % 2)
                propose(cut, 3, 3, tokens, &a);
            sh_session_cut(cut, keep);
            OK(sh_session_resume(whole, text, SH_MIN(keep, 31u), &err));
            if (keep > 31)
                OK(sh_session_type(whole, text + 31, SH_MIN(keep, 40u) - 31, &err));
            propose(whole, 1, 1, wanted, &b); /* closes the measurement */
            uint32_t n = keep % 3 ? 10 : 0;   /* nothing typed: a retry */
            OK(sh_session_type(cut, rest, n, &err));
            OK(sh_session_type(whole, rest, n, &err));
            uint32_t proposed = propose(cut, 8, 8, tokens, &a);
            assert_int_equal(proposed, propose(whole, 8, 8, wanted, &b));
            assert_memory_equal(tokens, wanted, proposed * sizeof(int32_t));
            assert_memory_equal(&a, &b, sizeof(a));
            assert_int_equal(a.prompt_tokens, n);
            sh_session_destroy(&cut);
            sh_session_destroy(&whole);
        }
    }
}

static void what_is_wrong_is_refused(void **state)
{
    (void)state;
    sh_session *s = new_session(model, 64), *none = NULL;
    sh_completion c;
    const int32_t bad[] = {5, -1}, huge[] = {(int32_t)model->config.vocab};
    assert_int_equal(sh_session_complete(s, 1, &c, &err), SH_ERR_INVALID); /* no BOS, no text */
    assert_int_equal(sh_session_type(s, bad, 2, &err), SH_ERR_INVALID);
    assert_int_equal(sh_session_type(s, huge, 1, &err), SH_ERR_INVALID);
    assert_int_equal(sh_session_complete(s, 1, &c, &err), SH_ERR_INVALID); /* nothing was taken */
    sh_session_options options = {.n_tokens_max = model->config.context + 1};
    assert_int_equal(sh_session_create(model, frozen, &options, &none, &err), SH_ERR_USAGE);
    options.n_tokens_max = SH_SESSION_TOKENS_MIN - 1;
    assert_int_equal(sh_session_create(model, frozen, &options, &none, &err), SH_ERR_USAGE);
    assert_null(none);
    sh_session_destroy(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(measures_what_the_model_says),
        cmocka_unit_test(splits_do_not_matter),
        cmocka_unit_test(a_proposal_leaves_no_trace),
        cmocka_unit_test(a_completion_is_one_word),
        cmocka_unit_test(words),
        cmocka_unit_test(judges_like_a_user),
        cmocka_unit_test(the_frozen_embedding_stays),
        cmocka_unit_test(resumes_and_switches),
        cmocka_unit_test(proposes_any_length),
        cmocka_unit_test(a_cut_text_is_as_if_it_had_ended_there),
        cmocka_unit_test(what_is_wrong_is_refused),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
