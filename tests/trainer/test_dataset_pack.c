/*
 * Datasets to sequences: each target once, with what is before it in its document and nothing else;
 * one plain text as it was always cut; losses and gradients of packed documents against those of
 * each document alone.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "tests/model/tiny.h"
#include "tests/trainer/small.h"
#include "tests/trainer/tokens.h"
#include "tests/trainer/util.h"
#include "trainer/dataset_internal.h"

static sh_error err;

/* ---- datasets of numbers ---- */

enum { PAD = 1000000, PURPOSE_CHUNKS = 0x63686e6b };

static sh_dataset *dataset_make(void)
{
    sh_dataset *d = calloc(1, sizeof *d);
    assert_non_null(d);
    d->name = strdup("made");
    d->files = calloc(1, sizeof *d->files);
    assert_non_null(d->files);
    d->files[0] = strdup("made.jsonl");
    d->n_files = 1;
    d->pad = PAD;
    return d;
}

/* A document of n tokens, of which token i has the number first + i, or below `vocab` is random.
 * The last `targets` of them are targets. */
typedef struct {
    tr_document_kind kind;
    size_t n, targets;
    int32_t vocab; /* 0: numbers */
} made_document;

static void dataset_add(sh_dataset *d, made_document m, sh_rng *rng)
{
    bool kept = false;
    for (size_t i = 0; i < m.n; i++) {
        const int32_t token =
            m.vocab > 0 ? (int32_t)sh_rng_below(rng, (uint64_t)m.vocab) : (int32_t)d->n_tokens;
        must_be_ok(tr_dataset_put(d, &token, 1, i + m.targets >= m.n ? SH_TRAIN_TARGET : 0));
    }
    must_be_ok(tr_dataset_close(
        d, (tr_document){.kind = m.kind, .line = (uint32_t)d->n_documents + 1}, &kept));
    assert_true(kept);
}

/* Texts and samples of random lengths up to `most`, of numbers, so that a token tells where it is
 * from. Some targets in the middle are none. */
static sh_dataset *random_dataset(uint64_t seed, size_t n_texts, size_t n_samples, size_t most)
{
    sh_dataset *d = dataset_make();
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    while (n_texts + n_samples > 0) {
        const bool sample = sh_rng_below(&rng, n_texts + n_samples) >= n_texts;
        const size_t n = 2 + (size_t)sh_rng_below(&rng, most - 1);
        dataset_add(d,
                    (made_document){.kind = sample ? TR_PROMPT : TR_LINE_TEXT,
                                    .n = n,
                                    .targets = sample ? 1 + (size_t)sh_rng_below(&rng, n) : n},
                    &rng);
        *(sample ? &n_samples : &n_texts) -= 1;
    }
    for (size_t i = 0; i < d->n_tokens; i++)
        if (sh_rng_below(&rng, 10) == 0)
            d->mask[i] = 0;
    for (size_t i = 0; i < d->n_documents; i++) /* but one of each stays */
        d->mask[d->documents[i].at + d->documents[i].n - 1] = SH_TRAIN_TARGET;
    return d;
}

static size_t document_of(const sh_dataset *d, size_t token)
{
    size_t i = 0;
    while (i + 1 < d->n_documents && d->documents[i + 1].at <= token)
        i++;
    return i;
}

/* Checks one sequence, and counts its targets in seen[n_tokens] and its padding. */
static void check_row(const sh_dataset *d, const sh_train_data *data, size_t r, unsigned *seen,
                      uint64_t *padding)
{
    const int32_t *tokens = data->tokens + r * data->length;
    const uint8_t *mask = data->mask + r * data->length;
    for (size_t i = 0; i < data->length; i++) {
        const bool begins = mask[i] & SH_TRAIN_BEGINS, target = mask[i] & SH_TRAIN_TARGET;
        if (tokens[i] == PAD) {
            assert_true(begins && !target);
            (*padding)++;
            continue;
        }
        assert_true(tokens[i] >= 0 && (size_t)tokens[i] < d->n_tokens);
        /* What is seen is what stands before in the document. */
        if (i > 0 && !begins)
            assert_int_equal(tokens[i], tokens[i - 1] + 1);
        if (i > 0 && !begins && target != (d->mask[tokens[i]] != 0))
            fail_msg("sequence %zu: token %d is %s target", r, tokens[i], target ? "a" : "no");
        const bool first = (size_t)tokens[i] == d->documents[document_of(d, (size_t)tokens[i])].at;
        if (first)
            assert_true(begins);
        if (begins || i == 0)
            assert_false(target);
        seen[tokens[i]] += target;
    }
}

/* All sequences [from, from + n) hold each target so often. */
static void check_once(const sh_dataset *d, const sh_dataset_rows *rows, size_t from, size_t n,
                       unsigned times)
{
    unsigned *seen = calloc(d->n_tokens, sizeof *seen);
    uint64_t padding = 0, targets = 0;
    assert_non_null(seen);
    for (size_t r = from; r < from + n; r++)
        check_row(d, &rows->data, r, seen, &padding);
    for (size_t i = 0; i < d->n_tokens; i++) {
        if (seen[i] != (d->mask[i] ? times : 0))
            fail_msg("token %zu, %s target, is %u times one, expected %u", i,
                     d->mask[i] ? "a" : "no", seen[i], times);
        targets += seen[i];
    }
    if (n == rows->data.n) {
        assert_int_equal(rows->padding, padding);
        assert_int_equal(rows->targets, targets);
        must_be_near(sh_dataset_rows_padding(rows),
                     (double)padding / (double)(n * rows->data.length), 1e-12);
    }
    free(seen);
}

/* Sequences that a pass has more than there are in order: the cut of the texts can make one. */
static size_t pass_adds(const sh_dataset *d, size_t context, uint64_t seed, uint64_t pass)
{
    size_t stream = 0;
    sh_rng rng;
    for (size_t i = 0; i < d->n_documents; i++)
        stream += d->documents[i].kind == TR_LINE_TEXT ? d->documents[i].n : 0;
    sh_rng_init(&rng, seed, pass, PURPOSE_CHUNKS);
    const size_t offset = (size_t)sh_rng_below(&rng, context);
    return stream == 0 ? 0 : (offset + stream - 2) / context - (stream - 2) / context;
}

static void test_each_target_once(void **state)
{
    (void)state;
    static const struct {
        size_t n_texts, n_samples, most;
        uint32_t context;
    } cases[] = {{5, 0, 30, 16}, {0, 40, 17, 16},   {7, 50, 17, 16},  {1, 1, 2, 1},
                 {30, 9, 90, 7}, {3, 3, 9, 200},    {2, 300, 65, 64}, {1, 0, 400, 16},
                 {0, 1, 17, 16}, {20, 20, 100, 130}};
    for (size_t i = 0; i < 4 * SH_COUNT(cases); i++) {
        const size_t c = i % SH_COUNT(cases);
        sh_dataset *d = random_dataset(i, cases[c].n_texts, cases[c].n_samples, cases[c].most);
        const sh_dataset_packing options = {cases[c].context, SH_LONG_SPLIT};
        sh_dataset_rows rows = {0}, many = {0};
        must_be_ok(sh_dataset_pack(d, &options, &rows, &err));
        assert_int_equal(rows.data.length, cases[c].context + 1);
        assert_int_equal(rows.skipped, 0);
        check_once(d, &rows, 0, rows.data.n, 1);

        /* Shuffled: so it is in every pass, of which a cut may make one sequence more. */
        must_be_ok(sh_dataset_pack_shuffled(
            d, &options, &(sh_dataset_range){.seed = i, .want = 3 * rows.data.n + 3}, &many, &err));
        for (size_t pass = 0, at = 0; pass < 3; pass++) {
            const size_t n = rows.data.n + pass_adds(d, cases[c].context, i, pass);
            check_once(d, &many, at, n, 1);
            at += n;
        }
        sh_dataset_rows_release(&many);
        sh_dataset_rows_release(&rows);
        assert_null(rows.data.tokens);
        sh_dataset_destroy(&d);
    }
}

/* Each pass cuts a text at places of its own. */
static void test_cuts(void **state)
{
    (void)state;
    enum { CONTEXT = 16, N = 15 * CONTEXT + 2, PASSES = 20 };
    sh_dataset *d = dataset_make();
    sh_dataset_rows rows = {0};
    size_t cuts[CONTEXT] = {0}, n_cuts = 0, at = 0;
    dataset_add(d, (made_document){TR_LINE_TEXT, N, N, 0}, NULL);
    must_be_ok(sh_dataset_pack_shuffled(d, &(sh_dataset_packing){.context = CONTEXT},
                                        &(sh_dataset_range){.seed = 3, .want = 17 * PASSES}, &rows,
                                        &err));
    for (uint64_t pass = 0; pass < PASSES; pass++) {
        const size_t n = 16 + pass_adds(d, CONTEXT, 3, pass);
        sh_rng rng;
        sh_rng_init(&rng, 3, pass, PURPOSE_CHUNKS);
        const int32_t offset = (int32_t)sh_rng_below(&rng, CONTEXT);
        n_cuts += cuts[offset]++ == 0;
        for (size_t r = at; r < at + n; r++) {
            const int32_t *tokens = rows.data.tokens + r * (CONTEXT + 1);
            if (tokens[0] == PAD) /* before the text: as much as it begins late */
                assert_true(tokens[offset - 1] == PAD && tokens[offset] == 0);
            else
                assert_int_equal((tokens[0] + offset) % CONTEXT, 0);
        }
        at += n;
    }
    assert_true(n_cuts > 5);
    sh_dataset_rows_release(&rows);
    sh_dataset_destroy(&d);
}

/* Any piece of the run is that of the whole, and another seed's is another. */
static void test_ranges(void **state)
{
    (void)state;
    sh_dataset *d = random_dataset(3, 9, 40, 17);
    const sh_dataset_packing options = {.context = 16};
    sh_dataset_rows all = {0}, piece = {0};
    must_be_ok(sh_dataset_pack_shuffled(d, &options, &(sh_dataset_range){.seed = 7, .want = 200},
                                        &all, &err));
    for (size_t first = 0; first < 200; first += 13) {
        const size_t want = SH_MIN((size_t)29, 200 - first);
        must_be_ok(sh_dataset_pack_shuffled(d, &options, &(sh_dataset_range){7, first, want},
                                            &piece, &err));
        assert_int_equal(piece.data.n, want);
        assert_memory_equal(piece.data.tokens, all.data.tokens + first * 17,
                            want * 17 * sizeof(int32_t));
        assert_memory_equal(piece.data.mask, all.data.mask + first * 17, want * 17);
        sh_dataset_rows_release(&piece);
    }
    must_be_ok(sh_dataset_pack_shuffled(d, &options, &(sh_dataset_range){.seed = 8, .want = 200},
                                        &piece, &err));
    assert_memory_not_equal(piece.data.tokens, all.data.tokens, 200 * 17 * sizeof(int32_t));
    sh_dataset_rows_release(&piece);
    sh_dataset_rows_release(&all);
    sh_dataset_destroy(&d);
}

/* The best that there is, where first fit in order would leave gaps. */
static void test_best_fit(void **state)
{
    (void)state;
    static const size_t lengths[] = {2, 4, 3, 7, 5, 6, 3}, n_expected = 3;
    sh_dataset *d = dataset_make();
    sh_dataset_rows rows = {0};
    for (size_t i = 0; i < SH_COUNT(lengths); i++)
        dataset_add(d, (made_document){TR_PROMPT, lengths[i], 1, 0}, NULL);
    must_be_ok(sh_dataset_pack(d, &(sh_dataset_packing){.context = 9}, &rows, &err));
    assert_int_equal(rows.data.n, n_expected);
    assert_int_equal(rows.padding, 0);
    must_be_near(sh_dataset_rows_padding(&rows), 0, 0);
    check_once(d, &rows, 0, n_expected, 1);
    sh_dataset_rows_release(&rows);
    sh_dataset_destroy(&d);
}

static void test_long_samples(void **state)
{
    (void)state;
    sh_dataset *d = dataset_make();
    sh_dataset_rows rows = {0};
    dataset_add(d, (made_document){TR_PROMPT, 9, 4, 0}, NULL);
    dataset_add(d, (made_document){TR_CHAT, 10, 4, 0}, NULL);
    dataset_add(d, (made_document){TR_PROMPT, 40, 20, 0}, NULL);
    must_fail(sh_dataset_pack(d, &(sh_dataset_packing){.context = 8}, &rows, &err), SH_ERR_LIMIT);
    assert_string_equal(err.text, "made.jsonl:2: a sample of 10 tokens is longer than the 9 of a "
                                  "sequence with a context of 8: shorten it, raise the context, or "
                                  "have long samples skipped or split");
    assert_null(rows.data.tokens);
    must_fail(sh_dataset_pack_shuffled(d, &(sh_dataset_packing){.context = 8},
                                       &(sh_dataset_range){.want = 1}, &rows, &err),
              SH_ERR_LIMIT);
    must_be_ok(sh_dataset_pack(d, &(sh_dataset_packing){8, SH_LONG_SKIP}, &rows, &err));
    assert_int_equal(rows.skipped, 2);
    assert_int_equal(rows.data.n, 1);
    assert_int_equal(rows.targets, 4);
    sh_dataset_rows_release(&rows);
    must_fail(sh_dataset_pack(d, &(sh_dataset_packing){2, SH_LONG_SKIP}, &rows, &err),
              SH_ERR_INVALID);
    assert_string_equal(err.text, "made: every sample is longer than a sequence of 3 tokens: raise "
                                  "the context");
    must_be_ok(sh_dataset_pack(d, &(sh_dataset_packing){8, SH_LONG_SPLIT}, &rows, &err));
    check_once(d, &rows, 0, rows.data.n, 1);
    /* 9; 9 and 2, whose first token is the last of the 9; of the third, [16, 25), [24, 33) and
     * [32, 40): what is before has no target. */
    assert_int_equal(rows.data.n, 6);
    assert_int_equal(rows.padding, 6 * 9 - (9 + 9 + 2 + 9 + 9 + 8));
    sh_dataset_rows_release(&rows);
    must_be_ok(sh_dataset_pack(d, &(sh_dataset_packing){.context = 39}, &rows, &err));
    sh_dataset_rows_release(&rows);
    sh_dataset_destroy(&d);
}

static void test_bad_options(void **state)
{
    (void)state;
    sh_dataset *d = random_dataset(1, 2, 2, 9);
    sh_dataset_rows rows = {0};
    static const uint32_t contexts[] = {0, SH_CONTEXT_MAX + 1};
    for (size_t i = 0; i < 2; i++) {
        const sh_dataset_packing options = {.context = contexts[i]};
        must_fail(sh_dataset_pack(d, &options, &rows, &err), SH_ERR_USAGE);
        must_fail(
            sh_dataset_pack_shuffled(d, &options, &(sh_dataset_range){.want = 1}, &rows, &err),
            SH_ERR_USAGE);
    }
    const sh_dataset_packing options = {.context = 8};
    must_fail(sh_dataset_pack_shuffled(d, &options, &(sh_dataset_range){0}, &rows, &err),
              SH_ERR_USAGE);
    must_fail(sh_dataset_pack_shuffled(d, &options,
                                       &(sh_dataset_range){.want = SH_DATASET_SEQUENCES_MAX + 1ull},
                                       &rows, &err),
              SH_ERR_LIMIT);
    assert_null(rows.data.tokens);
    sh_dataset_destroy(&d);
}

/* ---- one plain text: as shoal-train cut it before there were datasets ---- */

static size_t old_count(size_t n, size_t offset, size_t context)
{
    return n > offset + context ? (n - offset - 1) / context : 0;
}

static void expect_in_order(const sh_dataset *d, size_t context)
{
    const size_t n = old_count(d->n_tokens, 0, context), length = context + 1;
    sh_dataset_rows rows = {0};
    must_be_ok(
        sh_dataset_pack(d, &(sh_dataset_packing){.context = (uint32_t)context}, &rows, &err));
    assert_int_equal(rows.data.n, n);
    assert_int_equal(rows.data.length, length);
    assert_null(rows.data.mask);
    assert_int_equal(rows.padding, 0);
    assert_int_equal(rows.targets, n * context);
    for (size_t i = 0; i < n; i++)
        assert_memory_equal(rows.data.tokens + i * length, d->tokens + i * context,
                            length * sizeof(int32_t));
    sh_dataset_rows_release(&rows);
}

static void expect_shuffled(const sh_dataset *d, size_t context, size_t want, uint64_t seed)
{
    const size_t length = context + 1;
    sh_dataset_rows rows = {0};
    uint32_t *order = calloc(old_count(d->n_tokens, 0, context), sizeof *order);
    assert_non_null(order);
    must_be_ok(sh_dataset_pack_shuffled(d, &(sh_dataset_packing){.context = (uint32_t)context},
                                        &(sh_dataset_range){.seed = seed, .want = want}, &rows,
                                        &err));
    assert_int_equal(rows.data.n, want);
    assert_null(rows.data.mask);
    for (uint64_t pass = 0, at = 0; at < want; pass++) {
        sh_rng rng;
        sh_rng_init(&rng, seed, pass, PURPOSE_CHUNKS);
        const size_t offset = (size_t)sh_rng_below(&rng, context);
        const size_t n = old_count(d->n_tokens, offset, context);
        for (size_t i = 0; i < n; i++)
            order[i] = (uint32_t)i;
        sh_rng_shuffle(&rng, order, n);
        for (size_t i = 0; i < n && at < want; i++, at++)
            assert_memory_equal(rows.data.tokens + at * length,
                                d->tokens + offset + order[i] * context, length * sizeof(int32_t));
    }
    free(order);
    sh_dataset_rows_release(&rows);
}

static sh_dataset *open_text(const char *text, size_t n)
{
    char path[] = "/tmp/shoal-dataset-test-XXXXXX";
    sh_tokenizer *t = load_tokenizer(true);
    sh_dataset *d = NULL;
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    must_be_ok(sh_file_write_atomic(path, text, n, &err));
    const sh_status status = sh_dataset_open(path, &(sh_dataset_options){.tokenizer = t}, &d, &err);
    unlink(path);
    must_be_ok(status);
    sh_tokenizer_destroy(&t);
    return d;
}

static void test_one_text_as_before(void **state)
{
    (void)state;
    char text[3000];
    sh_rng rng;
    sh_rng_init(&rng, 4, 0, 1);
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (char)('a' + sh_rng_below(&rng, 26));
    sh_dataset *d = open_text(text, sizeof text);
    for (size_t context = 1; context < 200; context = context * 2 + 1) {
        expect_in_order(d, context);
        for (uint64_t seed = 1; seed < 4; seed++)
            expect_shuffled(d, context, 1000 + context, seed);
    }
    const size_t n = d->n_tokens;
    expect_in_order(d, n - 1); /* the longest that fits */
    expect_shuffled(d, n / 2, 9, 1);
    sh_dataset_rows rows = {0};
    char expected[256];
    must_fail(sh_dataset_pack(d, &(sh_dataset_packing){.context = (uint32_t)n}, &rows, &err),
              SH_ERR_INVALID);
    snprintf(expected, sizeof expected,
             "%s: %zu tokens are too few for one sequence of %zu: give a longer text or a shorter "
             "context",
             d->name, n, n);
    assert_string_equal(err.text, expected);
    must_fail(sh_dataset_pack_shuffled(d, &(sh_dataset_packing){.context = (uint32_t)(n - 1)},
                                       &(sh_dataset_range){.want = 1}, &rows, &err),
              SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "too few for shuffled sequences of"));
    sh_dataset_destroy(&d);
}

/* ---- losses ---- */

/* A document as a sequence of its own. */
static sh_train_data alone(const sh_dataset *d, size_t i)
{
    const tr_document *of = &d->documents[i];
    return (sh_train_data){
        .tokens = d->tokens + of->at, .mask = d->mask + of->at, .n = 1, .length = of->n};
}

static size_t targets_of(const sh_train_data *data)
{
    size_t n = 0;
    for (size_t i = 1; i < data->length; i++)
        n += (data->mask[i] & SH_TRAIN_TARGET) != 0;
    return n;
}

static void add_gradient(double *sum, const sh_adapter *grad, double weight)
{
    size_t at = 0;
    for (size_t i = 0; i < (size_t)grad->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *p = &grad->pairs[i];
        for (size_t k = 0; k < (size_t)p->rank * p->in; k++)
            sum[at++] += weight * (double)p->a[k];
        for (size_t k = 0; k < (size_t)p->rank * p->out; k++)
            sum[at++] += weight * (double)p->b[k];
    }
}

enum { GRADIENT_MOST = 1 << 16 };

/* Documents that fit: packed they have the mean loss and gradient that they have each alone. */
static void test_no_document_sees_another(void **state)
{
    (void)state;
    static const uint32_t ranks[] = {3};
    const sh_model_config config = small_config(true);
    sh_model *model = small_model(&config, SH_TYPE_F32, 5);
    sh_adapter *adapter = small_adapter(&config, ranks, 1, 6);
    sh_adapter *grad = small_adapter(&config, ranks, 1, 7);
    double *sums = calloc(2 * GRADIENT_MOST, sizeof *sums), sum = 0, mean = 0, loss = 0;
    size_t n = 0;
    sh_dataset *d = dataset_make();
    sh_dataset_rows rows = {0};
    sh_rng rng;
    assert_non_null(sums);
    sh_rng_init(&rng, 9, 0, 1);
    for (size_t i = 0; i < 60; i++) { /* the texts fill one sequence, where none of them is cut */
        const bool text = i % 20 == 0;
        const size_t size = 2 + (size_t)sh_rng_below(&rng, text ? 28 : 89);
        dataset_add(d,
                    (made_document){text    ? TR_LINE_TEXT
                                    : i % 2 ? TR_PROMPT
                                            : TR_CHAT,
                                    size, 1 + (size_t)sh_rng_below(&rng, size),
                                    (int32_t)config.vocab},
                    &rng);
    }
    d->pad = 0;
    must_be_ok(sh_dataset_pack(d, &(sh_dataset_packing){.context = 90}, &rows, &err));
    assert_true(rows.data.n < 50 && rows.padding > 0);
    for (size_t i = 0; i < d->n_documents; i++) {
        const sh_train_data one = alone(d, i);
        const size_t targets = targets_of(&one);
        must_be_ok(sh_train_evaluate(model, adapter, &one, NULL, &loss, &err));
        sum += loss * (double)targets;
        n += targets;
        must_be_ok(sh_lora_gradient(model, adapter, &one, grad, &loss, &err));
        add_gradient(sums, grad, (double)targets);
    }
    assert_int_equal(n, rows.targets);
    must_be_ok(sh_train_evaluate(model, adapter, &rows.data, NULL, &mean, &err));
    must_be_near(mean, sum / (double)n, 1e-6);
    must_be_ok(sh_lora_gradient(model, adapter, &rows.data, grad, &loss, &err));
    add_gradient(sums + GRADIENT_MOST, grad, (double)n);
    double squares = 0, apart = 0;
    for (size_t i = 0; i < GRADIENT_MOST; i++) {
        const double difference = sums[i] - sums[GRADIENT_MOST + i];
        squares += sums[i] * sums[i];
        apart += difference * difference;
    }
    assert_true(squares > 0);
    must_be_near(apart / squares, 0, 1e-10);
    /* The test can fail: without the borders it is another loss. */
    for (size_t i = 0; i < rows.data.n * rows.data.length; i++)
        ((uint8_t *)(uintptr_t)rows.data.mask)[i] &= SH_TRAIN_TARGET;
    must_be_ok(sh_train_evaluate(model, adapter, &rows.data, NULL, &loss, &err));
    assert_true(loss < mean - 1e-4 || loss > mean + 1e-4);
    sh_dataset_rows_release(&rows);
    sh_dataset_destroy(&d);
    sh_adapter_destroy(&grad);
    sh_adapter_destroy(&adapter);
    small_model_free(&model);
    free(sums);
}

static void test_each_failed_allocation(void **state)
{
    (void)state;
    sh_dataset *d = random_dataset(5, 5, 20, 40);
    const sh_dataset_packing options = {16, SH_LONG_SPLIT};
    const sh_dataset_range range = {.want = 100};
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        size_t n = 0;
        for (size_t i = 0; i <= n; i++) { /* first without a failure, to count */
            sh_dataset_rows rows = {0};
            err = (sh_error){0};
            (void)sh_alloc_fail_after(i);
            const sh_status status =
                shuffled ? sh_dataset_pack_shuffled(d, &options, &range, &rows, &err)
                         : sh_dataset_pack(d, &options, &rows, &err);
            const size_t made = sh_alloc_fail_after(0);
            n = i == 0 ? made : n;
            assert_true(n > 10);
            if (status != (i == 0 ? SH_OK : SH_ERR_NO_MEMORY) || (i > 0 && !err.text[0]))
                fail_msg("allocation %zu of %zu: %s (%s)", i, n, sh_status_name(status), err.text);
            assert_int_equal(rows.data.tokens == NULL, i > 0);
            sh_dataset_rows_release(&rows);
        }
    }
    sh_dataset_destroy(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_target_once),
        cmocka_unit_test(test_cuts),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_best_fit),
        cmocka_unit_test(test_long_samples),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_one_text_as_before),
        cmocka_unit_test(test_no_document_sees_another),
        cmocka_unit_test(test_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
