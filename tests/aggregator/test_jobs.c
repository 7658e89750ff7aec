/* The job bodies on a tiny model: genesis, merge into the master, quantized candidate, adapter
 * form, suites and the gate. Files live in a folder of the test's own. */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "aggregator/jobs.h"
#include "aggregator/merge.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/math/blas.h"
#include "shared/model/quantize.h"
#include "tests/model/tiny.h"

#define UPDATES 5

typedef struct {
    char dir[64];
    sh_hash master, genesis;
    sh_model *model; /* the genesis, quantized */
    sh_adapter *adapters[UPDATES];
    sh_buf blobs[UPDATES];
    sh_bytes bytes[UPDATES];
    sh_merge_input inputs[UPDATES];
    sh_coord_job job;
    sh_suite suite;
} bench;

static void ok(sh_status status, const sh_error *err)
{
    if (status != SH_OK) {
        print_error("%s: %s\n", sh_status_name(status), err->text);
        fail();
    }
}

/* An update: a common direction in B and noise of its own, over a shared A. */
static sh_adapter *make_update(const sh_model_config *config, uint64_t node, uint32_t rank)
{
    sh_adapter *adapter = NULL;
    sh_error err = {0};
    ok(sh_adapter_create(config, rank, 16, &adapter, &err), &err);
    if (!config->tied_output)
        ok(sh_adapter_add_output(adapter, config, rank, &err), &err);
    for (size_t m = 0; m < sh_lora_pair_count(config->n_layers); m++) {
        sh_lora_pair *pair = &adapter->pairs[m];
        sh_rng common, own;
        sh_rng_init(&common, 1, m, 5);
        sh_rng_init(&own, 1, 100 * node + m, 6);
        for (size_t i = 0; i < (size_t)pair->rank * pair->in; i++)
            pair->a[i] = 0.02f * sh_rng_normal(&common);
        for (size_t i = 0; i < (size_t)pair->rank * pair->out; i++)
            pair->b[i] = 0.02f * (sh_rng_normal(&common) + 0.5f * sh_rng_normal(&own));
    }
    return adapter;
}

static void set_update(bench *b, size_t i)
{
    sh_error err = {0};
    sh_buf_clear(&b->blobs[i]);
    ok(sh_adapter_encode(b->adapters[i], &b->blobs[i], &err), &err);
    b->bytes[i] = (sh_bytes){b->blobs[i].data, b->blobs[i].len};
    b->inputs[i] = (sh_merge_input){.id = {.epoch = 1, .seq = i},
                                    .sha256 = sh_sha256(b->blobs[i].data, b->blobs[i].len),
                                    .weight = 100 * (double)(i + 1)};
}

static bench *setup_of(bool untied)
{
    bench *b = calloc(1, sizeof *b);
    sh_error err = {0};
    char base[128], path[SH_PATH_BYTES];
    tiny_options tiny = tiny_defaults(3);
    sh_buf model;
    assert_non_null(b);
    tiny.untied = untied;
    (void)snprintf(b->dir, sizeof b->dir, "/tmp/shoal-jobs-XXXXXX");
    assert_non_null(mkdtemp(b->dir));
    (void)snprintf(base, sizeof base, "%s/base.gguf", b->dir);
    ok(tiny_write(&tiny, base, &err), &err);
    sh_buf_init(&model, 64u << 20);
    ok(sh_job_genesis(base, SH_TYPE_Q8_0, b->dir, &b->master, &model, &err), &err);
    b->genesis = sh_sha256(model.data, model.len);
    sh_buf_release(&model);
    ok(sh_job_path(path, b->dir, &b->genesis, &err), &err);
    ok(sh_model_open(path, &b->model, &err), &err);
    for (size_t i = 0; i < UPDATES; i++) {
        b->adapters[i] = make_update(&b->model->config, i, 4);
        sh_buf_init(&b->blobs[i], 64u << 20);
        set_update(b, i);
    }
    b->job = (sh_coord_job){.id = 1,
                            .kind = SH_COORD_MERGE,
                            .candidate = 1,
                            .parent_model = b->genesis,
                            .master = b->master,
                            .server_scale = 1,
                            .norm_factor_max = 4,
                            .cosine_min = 0,
                            .n_inputs = UPDATES};
    sh_rng rng;
    sh_rng_init(&rng, 8, 0, 7);
    for (int s = 0; s < 3; s++) {
        int32_t tokens[300];
        char name[32];
        for (size_t i = 0; i < SH_COUNT(tokens); i++)
            tokens[i] = (int32_t)sh_rng_below(&rng, tiny_vocab());
        (void)snprintf(name, sizeof name, "slice%d", s);
        ok(sh_suite_add(&b->suite, name, tokens, SH_COUNT(tokens) - 37u * (unsigned)s, &err), &err);
    }
    return b;
}

static bench *setup(void)
{
    return setup_of(false);
}

static void remove_dir(const char *dir)
{
    struct dirent *entry;
    DIR *d = opendir(dir);
    assert_non_null(d);
    while ((entry = readdir(d)) != NULL) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
        (void)unlink(path);
    }
    (void)closedir(d);
    (void)rmdir(dir);
}

static void finish(bench *b)
{
    for (size_t i = 0; i < UPDATES; i++) {
        sh_adapter_destroy(&b->adapters[i]);
        sh_buf_release(&b->blobs[i]);
    }
    sh_model_close(&b->model);
    sh_suite_release(&b->suite);
    remove_dir(b->dir);
    free(b);
}

static sh_merge_job_result merge(bench *b, sh_pool *pool)
{
    sh_merge_job options = {.dir = b->dir,
                            .job = &b->job,
                            .inputs = b->inputs,
                            .blobs = b->bytes,
                            .format = SH_TYPE_Q8_0,
                            .energy = 0.999,
                            .pool = pool};
    sh_merge_job_result result;
    sh_error err = {0};
    ok(sh_job_merge(&options, &result, &err), &err);
    return result;
}

static sh_gguf *open_file(const bench *b, const sh_hash *sha256)
{
    char path[SH_PATH_BYTES];
    sh_gguf *gguf = NULL;
    sh_error err = {0};
    ok(sh_job_path(path, b->dir, sha256, &err), &err);
    ok(sh_gguf_open(path, &gguf, &err), &err);
    return gguf;
}

static sh_coord_job_result gate(bench *b, const sh_hash *candidate, sh_pool *pool)
{
    sh_coord_job job = {
        .kind = SH_COORD_GATE, .parent_model = b->genesis, .candidate_model = *candidate};
    sh_gate_job options = {
        .dir = b->dir, .job = &job, .suite = &b->suite, .chunk = 64, .pool = pool};
    sh_coord_job_result result = {0};
    sh_error err = {0};
    ok(sh_job_gate(&options, &result, &err), &err);
    return result;
}

/* ---- tests ---- */

static void test_genesis_is_the_base_in_f32_and_quantized(void **state)
{
    (void)state;
    bench *b = setup();
    char path[128];
    sh_gguf *master = open_file(b, &b->master), *base = NULL, *quantized = NULL;
    sh_buf bytes;
    sh_error err = {0};
    (void)snprintf(path, sizeof path, "%s/base.gguf", b->dir);
    ok(sh_gguf_open(path, &base, &err), &err);
    assert_int_equal(sh_gguf_n_tensors(base), sh_gguf_n_tensors(master));
    for (size_t t = 0; t < sh_gguf_n_tensors(base); t++) {
        const sh_gguf_tensor *x = sh_gguf_tensor_at(base, t), *y = sh_gguf_tensor_at(master, t);
        assert_string_equal(x->name, y->name);
        assert_int_equal(y->type, SH_TYPE_F32);
        assert_int_equal(x->bytes, y->bytes); /* the tiny base is F32, too */
        assert_memory_equal(x->data, y->data, x->bytes);
    }
    sh_buf_init(&bytes, 64u << 20);
    ok(sh_gguf_quantize_encode(master, SH_TYPE_Q8_0, &bytes, &err), &err);
    sh_hash sha256 = sh_sha256(bytes.data, bytes.len);
    assert_true(sh_hash_equal(&sha256, &b->genesis));
    sh_buf_release(&bytes);
    sh_gguf_close(&quantized);
    sh_gguf_close(&base);
    sh_gguf_close(&master);
    finish(b);
}

/* Every matrix of the new master is W + Σ wᵢ/Σw · ΔWᵢ, untruncated; everything else is as it was.
 * The output matrix is adapted, too, where it is not tied. */
static void check_the_exact_sum(bool untied)
{
    bench *b = setup_of(untied);
    const uint32_t n_layers = b->model->config.n_layers;
    b->job.server_scale = 1.5f;
    sh_merge_job_result result = merge(b, NULL);
    assert_int_equal(result.n_good, UPDATES);
    sh_gguf *before = open_file(b, &b->master), *after = open_file(b, &result.new_master);
    double change = 0, error = 0;
    size_t adapted = 0;
    for (size_t t = 0; t < sh_gguf_n_tensors(before); t++) {
        const sh_gguf_tensor *x = sh_gguf_tensor_at(before, t), *y = sh_gguf_tensor_at(after, t);
        const float *w = x->data, *v = y->data;
        size_t n = (size_t)(x->bytes / sizeof(float)), matrix = SIZE_MAX;
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->bytes, y->bytes);
        for (size_t m = 0; m < sh_lora_pair_count(n_layers); m++) {
            char matrix_name[SH_GGUF_NAME_MAX], name[SH_GGUF_NAME_MAX + 8];
            sh_lora_pair_name(n_layers, m, matrix_name);
            (void)snprintf(name, sizeof name, "%s.weight", matrix_name);
            if (strcmp(name, x->name) == 0)
                matrix = m;
        }
        if (matrix == SIZE_MAX) {
            assert_memory_equal(w, v, x->bytes);
            continue;
        }
        adapted++;
        for (size_t i = 0; i < n; i++) {
            size_t row = i / x->ne[0], col = i % x->ne[0];
            double sum = 0;
            for (size_t u = 0; u < UPDATES; u++) {
                const sh_lora_pair *p = &b->adapters[u]->pairs[matrix];
                double dot = 0;
                for (size_t k = 0; k < p->rank; k++)
                    dot += (double)p->b[row * p->rank + k] * (double)p->a[k * p->in + col];
                sum += b->inputs[u].weight / 1500 * 16 / 4 * dot;
            }
            double theirs = (double)w[i] + 1.5 * sum;
            change += 1.5 * 1.5 * sum * sum;
            error += ((double)v[i] - theirs) * ((double)v[i] - theirs);
        }
    }
    assert_int_equal(adapted, sh_lora_output_pair(n_layers) + untied);
    print_message("relative error of the change: %g\n", sqrt(error / change));
    assert_true(sqrt(error / change) < 1e-5);
    sh_gguf_close(&before);
    sh_gguf_close(&after);
    sh_merge_job_result_release(&result);
    finish(b);
}

static void test_the_master_takes_the_exact_sum(void **state)
{
    (void)state;
    check_the_exact_sum(false);
    check_the_exact_sum(true);
}

static void test_the_candidate_is_the_master_quantized(void **state)
{
    (void)state;
    bench *b = setup();
    sh_merge_job_result result = merge(b, NULL);
    sh_gguf *master = open_file(b, &result.new_master);
    sh_buf bytes;
    sh_error err = {0};
    sh_buf_init(&bytes, 64u << 20);
    ok(sh_gguf_quantize_encode(master, SH_TYPE_Q8_0, &bytes, &err), &err);
    assert_int_equal(bytes.len, result.candidate.len);
    assert_memory_equal(bytes.data, result.candidate.data, bytes.len);
    assert_string_equal(result.format, "Q8_0");
    sh_hash sha256 = sh_sha256(bytes.data, bytes.len);
    assert_true(sh_hash_equal(&sha256, &result.blob.sha256));
    assert_int_equal(result.blob.bytes, bytes.len);
    sh_buf_release(&bytes);
    sh_gguf_close(&master);
    sh_merge_job_result_release(&result);
    finish(b);
}

/* Running it again, with or without threads, writes the same files and says the same. */
static void test_merging_again_gives_the_same_bytes(void **state)
{
    (void)state;
    bench *b = setup();
    sh_pool *pool = NULL;
    sh_error err = {0};
    ok(sh_pool_create(3, &pool, &err), &err);
    sh_merge_job_result one = merge(b, NULL), two = merge(b, pool);
    assert_true(sh_hash_equal(&one.new_master, &two.new_master));
    assert_true(sh_hash_equal(&one.blob.sha256, &two.blob.sha256));
    assert_true(one.discarded == two.discarded);
    sh_coord_job_result x = gate(b, &one.blob.sha256, NULL), y = gate(b, &two.blob.sha256, pool);
    assert_true(x.loss_parent == y.loss_parent && x.loss_candidate == y.loss_candidate &&
                x.loss_adapter_form == y.loss_adapter_form);
    assert_memory_equal(x.slice_candidate, y.slice_candidate, sizeof(double) * x.n_slices);
    sh_merge_job_result_release(&one);
    sh_merge_job_result_release(&two);
    sh_pool_destroy(&pool);
    finish(b);
}

static void test_bad_updates_get_verdicts(void **state)
{
    (void)state;
    bench *b = setup();
    for (size_t m = 0; m < (size_t)b->model->config.n_layers * SH_LAYER_MATRICES; m++) {
        sh_lora_pair *p = &b->adapters[1]->pairs[m], *q = &b->adapters[2]->pairs[m];
        for (size_t i = 0; i < (size_t)p->rank * p->out; i++) {
            p->b[i] *= -100;
            q->b[i] *= -1;
        }
    }
    set_update(b, 1);
    set_update(b, 2);
    b->bytes[0] = (sh_bytes){0}; /* the store could not read it */
    sh_merge_job_result result = merge(b, NULL);
    const sh_reason expected[UPDATES] = {SH_REASON_BAD_BLOB, SH_REASON_NORM, SH_REASON_DIRECTION,
                                         SH_REASON_NONE, SH_REASON_NONE};
    for (size_t i = 0; i < UPDATES; i++)
        if (b->inputs[i].reason != expected[i]) {
            print_error("update %zu: %s, norm %g, cosine %g\n", i,
                        sh_reason_name(b->inputs[i].reason), b->inputs[i].norm,
                        b->inputs[i].cosine);
            fail();
        }
    assert_int_equal(result.n_good, 2);
    assert_true(b->inputs[1].norm > 50 * b->inputs[3].norm);
    assert_true(b->inputs[2].cosine < -0.3);
    sh_merge_job_result_release(&result);
    finish(b);
}

/* Bytes of every kind of wrong are a verdict, and none of them ends the job. */
static void test_hostile_blobs(void **state)
{
    (void)state;
    bench *b = setup();
    sh_rng rng;
    sh_rng_init(&rng, 2, 0, 9);
    for (int round = 0; round < 60; round++) {
        for (size_t i = 0; i < UPDATES; i++)
            set_update(b, i);
        for (size_t i = 0; i < 3; i++) {
            sh_buf *blob = &b->blobs[i];
            if (round % 2 == 0)
                blob->data[sh_rng_below(&rng, SH_MIN(blob->len, (size_t)600))] ^=
                    (uint8_t)(1u << sh_rng_below(&rng, 8));
            else
                blob->len = (size_t)sh_rng_below(&rng, blob->len);
            b->bytes[i] = (sh_bytes){blob->data, blob->len};
            if (round % 3 != 0) /* a liar describes what he really sends */
                b->inputs[i].sha256 = sh_sha256(blob->data, blob->len);
        }
        sh_merge_job_result result = merge(b, NULL);
        assert_true(result.n_good >= 2); /* the honest two */
        assert_int_equal(b->inputs[3].reason, SH_REASON_NONE);
        assert_int_equal(b->inputs[4].reason, SH_REASON_NONE);
        if (round % 3 == 0)
            for (size_t i = 0; i < 3; i++)
                assert_int_equal(b->inputs[i].reason, SH_REASON_BAD_BLOB);
        sh_merge_job_result_release(&result);
    }
    finish(b);
}

static void test_nothing_good_makes_nothing(void **state)
{
    (void)state;
    bench *b = setup();
    for (size_t i = 0; i < UPDATES; i++)
        b->bytes[i] = (sh_bytes){"junk", 4};
    sh_merge_job_result result = merge(b, NULL);
    assert_int_equal(result.n_good, 0);
    assert_int_equal(result.candidate.len, 0);
    sh_merge_job_result_release(&result);
    b->job.n_inputs = 0;
    result = merge(b, NULL);
    assert_int_equal(result.n_good, 0);
    sh_merge_job_result_release(&result);
    finish(b);
}

static void test_a_missing_master_is_an_error(void **state)
{
    (void)state;
    bench *b = setup();
    b->job.master.b[0] ^= 1;
    sh_merge_job options = {.dir = b->dir,
                            .job = &b->job,
                            .inputs = b->inputs,
                            .blobs = b->bytes,
                            .format = SH_TYPE_Q8_0};
    sh_merge_job_result result;
    sh_error err = {0};
    assert_int_not_equal(sh_job_merge(&options, &result, &err), SH_OK);
    assert_true(err.text[0] != '\0');
    finish(b);
}

/* The gate's numbers are those of sh_model_loss on the shipped bytes, and at full rank the adapter
 * form is near the folded one. */
static void test_the_gate_measures_all_three_forms(void **state)
{
    (void)state;
    bench *b = setup();
    sh_merge_job_result merged = merge(b, NULL);
    sh_coord_job_result result = gate(b, &merged.blob.sha256, NULL);
    assert_int_equal(result.n_slices, 3);
    assert_true(sh_hash_equal(&result.suite, &b->suite.sha256));
    sh_model *candidate = NULL;
    sh_error err = {0};
    char path[SH_PATH_BYTES];
    ok(sh_job_path(path, b->dir, &merged.blob.sha256, &err), &err);
    ok(sh_model_open(path, &candidate, &err), &err);
    double parent = 0, child = 0, form = 0;
    uint64_t scored = 0;
    for (uint32_t s = 0; s < b->suite.n; s++) {
        const sh_suite_slice *slice = &b->suite.slices[s];
        sh_loss x, y, z;
        ok(sh_model_loss(b->model, NULL, slice->tokens, slice->n, 64, false, &x, &err), &err);
        ok(sh_model_loss(candidate, NULL, slice->tokens, slice->n, 64, false, &y, &err), &err);
        ok(sh_model_loss(b->model, merged.adapter, slice->tokens, slice->n, 64, false, &z, &err),
           &err);
        assert_true(result.slice_parent[s] == x.nll_sum / (double)x.n_scored);
        assert_true(result.slice_candidate[s] == y.nll_sum / (double)y.n_scored);
        parent += x.nll_sum, child += y.nll_sum, form += z.nll_sum;
        scored += x.n_scored;
    }
    assert_true(result.loss_parent == parent / (double)scored);
    assert_true(result.loss_candidate == child / (double)scored);
    assert_true(fabs(result.loss_adapter_form - form / (double)scored) < 1e-6);
    assert_true(result.loss_candidate != result.loss_parent);
    print_message("loss: parent %.5f, folded %.5f, adapter form %.5f\n", result.loss_parent,
                  result.loss_candidate, result.loss_adapter_form);
    assert_true(fabs(result.loss_adapter_form - result.loss_candidate) < 0.02);
    sh_model_close(&candidate);
    sh_merge_job_result_release(&merged);
    finish(b);
}

static void test_the_gate_needs_its_files_and_a_suite(void **state)
{
    (void)state;
    bench *b = setup();
    sh_coord_job job = {.parent_model = b->genesis, .candidate_model = b->master};
    sh_gate_job options = {.dir = b->dir, .job = &job, .suite = &b->suite};
    sh_coord_job_result result = {0};
    sh_error err = {0};
    assert_int_equal(sh_job_gate(&options, &result, &err), SH_ERR_NOT_FOUND); /* its adapter form */
    job.candidate_model.b[3] ^= 1;
    assert_int_equal(sh_job_gate(&options, &result, &err), SH_ERR_NOT_FOUND);
    sh_suite empty = {0};
    options.suite = &empty;
    assert_int_equal(sh_job_gate(&options, &result, &err), SH_ERR_INVALID);
    finish(b);
}

static void test_suites(void **state)
{
    (void)state;
    bench *b = setup();
    sh_suite suite = {0}, other = {0};
    sh_error err = {0};
    const int32_t x[] = {1, 2, 3}, y[] = {1, 2, 4};
    ok(sh_suite_add(&suite, "a", x, 3, &err), &err);
    ok(sh_suite_add(&other, "a", y, 3, &err), &err);
    assert_false(sh_hash_equal(&suite.sha256, &other.sha256)); /* tokens count */
    sh_suite_release(&other);
    ok(sh_suite_add(&other, "b", x, 3, &err), &err);
    assert_false(sh_hash_equal(&suite.sha256, &other.sha256)); /* names count */
    assert_int_equal(sh_suite_add(&other, "c", x, 1, &err), SH_ERR_INVALID);
    while (suite.n < SH_GATE_SLICES_MAX)
        ok(sh_suite_add(&suite, "more", x, 3, &err), &err);
    assert_int_equal(sh_suite_add(&suite, "too many", x, 3, &err), SH_ERR_LIMIT);
    sh_suite_release(&suite);
    sh_suite_release(&other);
    /* From a folder: the texts in the order of their names. */
    char path[128];
    assert_int_equal(sh_suite_load(b->dir, b->model->tokenizer, &suite, &err), SH_ERR_NOT_FOUND);
    static const char *const texts[][2] = {{"b.txt", "the second text"}, {"a.txt", "the first"}};
    for (size_t i = 0; i < SH_COUNT(texts); i++) {
        (void)snprintf(path, sizeof path, "%s/%s", b->dir, texts[i][0]);
        ok(sh_file_write_atomic(path, texts[i][1], strlen(texts[i][1]), &err), &err);
    }
    ok(sh_suite_load(b->dir, b->model->tokenizer, &suite, &err), &err);
    assert_int_equal(suite.n, 2);
    assert_string_equal(suite.slices[0].name, "a");
    assert_string_equal(suite.slices[1].name, "b");
    ok(sh_suite_load(b->dir, b->model->tokenizer, &other, &err), &err);
    assert_true(sh_hash_equal(&suite.sha256, &other.sha256));
    sh_suite_release(&suite);
    sh_suite_release(&other);
    assert_int_equal(sh_suite_load("/does/not/exist", b->model->tokenizer, &suite, &err),
                     SH_ERR_NOT_FOUND);
    finish(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_genesis_is_the_base_in_f32_and_quantized),
        cmocka_unit_test(test_the_master_takes_the_exact_sum),
        cmocka_unit_test(test_the_candidate_is_the_master_quantized),
        cmocka_unit_test(test_merging_again_gives_the_same_bytes),
        cmocka_unit_test(test_bad_updates_get_verdicts),
        cmocka_unit_test(test_hostile_blobs),
        cmocka_unit_test(test_nothing_good_makes_nothing),
        cmocka_unit_test(test_a_missing_master_is_an_error),
        cmocka_unit_test(test_the_gate_measures_all_three_forms),
        cmocka_unit_test(test_the_gate_needs_its_files_and_a_suite),
        cmocka_unit_test(test_suites),
    };
    sh_error err = {0};
    sh_blas_init();
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
