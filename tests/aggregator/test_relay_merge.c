/* Tiers: nodes' updates stacked by relays, relays of relays and the merge into the master, against
 * the same updates merged at once. The real jobs on a tiny model. */
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
#include "tests/model/tiny.h"

#define NODES      12
#define UPDATE_MAX (64u << 20)
#define TOLERANCE  1e-5

typedef struct {
    sh_buf bytes;
    double weight; /* samples of the nodes below */
    bool relayed;
    sh_reason reason; /* after it was judged */
} update;

typedef struct {
    char dir[64];
    sh_hash master, genesis;
    sh_model *model;
    update nodes[NODES];
    float norm_factor_max, cosine_min;
} bench;

static void ok(sh_status status, const sh_error *err)
{
    if (status != SH_OK) {
        print_error("%s: %s\n", sh_status_name(status), err->text);
        fail();
    }
}

/* Random factors over a common direction, so that all are judged good; ranks and alphas differ, and
 * every third adapts only every second matrix. */
static sh_adapter *make_adapter(const sh_model_config *config, uint64_t seed, uint32_t node)
{
    const uint32_t ranks[] = {4, 2, 8, 1, 3};
    sh_adapter *adapter = NULL;
    sh_error err = {0};
    uint32_t rank = ranks[node % SH_COUNT(ranks)];
    ok(sh_adapter_create_empty(config, (float)(2 + node), &adapter, &err), &err);
    for (size_t m = 0; m < sh_lora_pair_count(config->n_layers); m++) {
        sh_lora_pair *pair = &adapter->pairs[m];
        sh_rng common, own;
        bool output = m == sh_lora_output_pair(config->n_layers);
        if ((node % 3 == 2 && m % 2 == 1) || (output && (config->tied_output || node % 2 == 0)))
            continue;
        pair->rank = output ? rank + 1 : rank;
        pair->a = calloc((size_t)pair->rank * pair->in, sizeof *pair->a);
        pair->b = calloc((size_t)pair->rank * pair->out, sizeof *pair->b);
        assert_non_null(pair->a);
        assert_non_null(pair->b);
        adapter->rank = SH_MAX(adapter->rank, pair->rank);
        sh_rng_init(&common, seed, m, 5);
        sh_rng_init(&own, seed, 100 * node + m, 6);
        float scale = 0.1f * (float)pair->rank / adapter->alpha;
        for (uint32_t k = 0; k < pair->rank; k++)
            for (uint32_t i = 0; i < pair->in; i++)
                pair->a[k * pair->in + i] =
                    (k == 0 ? sh_rng_normal(&common) : 0) + 0.3f * sh_rng_normal(&own);
        for (uint32_t i = 0; i < pair->out; i++)
            for (uint32_t k = 0; k < pair->rank; k++)
                pair->b[i * pair->rank + k] =
                    scale * ((k == 0 ? sh_rng_normal(&common) : 0) + 0.3f * sh_rng_normal(&own));
    }
    return adapter;
}

static void scale_b(sh_adapter *adapter, float factor)
{
    for (size_t m = 0; m < sh_lora_pair_count(adapter->n_layers); m++)
        for (size_t i = 0; i < (size_t)adapter->pairs[m].rank * adapter->pairs[m].out; i++)
            adapter->pairs[m].b[i] *= factor;
}

static void set_node(bench *b, uint32_t node, const sh_adapter *adapter, double weight)
{
    sh_error err = {0};
    sh_buf_release(&b->nodes[node].bytes);
    sh_buf_init(&b->nodes[node].bytes, UPDATE_MAX);
    ok(sh_adapter_encode(adapter, &b->nodes[node].bytes, &err), &err);
    b->nodes[node].weight = weight;
}

static bench *setup(bool untied, uint64_t seed)
{
    bench *b = calloc(1, sizeof *b);
    sh_error err = {0};
    char base[128], path[SH_PATH_BYTES];
    tiny_options tiny = tiny_defaults(3);
    sh_buf model;
    sh_rng rng;
    assert_non_null(b);
    tiny.untied = untied;
    (void)snprintf(b->dir, sizeof b->dir, "/tmp/shoal-relay-XXXXXX");
    assert_non_null(mkdtemp(b->dir));
    (void)snprintf(base, sizeof base, "%s/base.gguf", b->dir);
    ok(tiny_write(&tiny, base, &err), &err);
    sh_buf_init(&model, UPDATE_MAX);
    ok(sh_job_genesis(base, SH_TYPE_Q8_0, b->dir, &b->master, &model, &err), &err);
    b->genesis = sh_sha256(model.data, model.len);
    sh_buf_release(&model);
    ok(sh_job_path(path, b->dir, &b->genesis, &err), &err);
    ok(sh_model_open(path, &b->model, &err), &err);
    sh_rng_init(&rng, seed, 0, 7);
    for (uint32_t i = 0; i < NODES; i++) {
        sh_adapter *adapter = make_adapter(&b->model->config, seed, i);
        set_node(b, i, adapter, 1 + (double)sh_rng_below(&rng, 5000));
        sh_adapter_destroy(&adapter);
    }
    b->cosine_min = -2; /* unjudged */
    return b;
}

static void finish(bench *b)
{
    struct dirent *entry;
    DIR *d = opendir(b->dir);
    assert_non_null(d);
    while ((entry = readdir(d)) != NULL) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", b->dir, entry->d_name);
        (void)unlink(path);
    }
    (void)closedir(d);
    (void)rmdir(b->dir);
    for (size_t i = 0; i < NODES; i++)
        sh_buf_release(&b->nodes[i].bytes);
    sh_model_close(&b->model);
    free(b);
}

typedef sh_status (*job_fn)(const sh_merge_job *, sh_merge_job_result *, sh_error *);

/* Runs the job over the updates and writes their verdicts back. */
static sh_merge_job_result run(bench *b, job_fn fn, update *const *updates, size_t n)
{
    sh_merge_input inputs[NODES] = {0};
    sh_bytes blobs[NODES];
    sh_merge_job_result result;
    sh_error err = {0};
    sh_coord_job job = {.id = 1,
                        .kind = SH_COORD_STACK,
                        .parent_model = b->genesis,
                        .master = b->master,
                        .server_scale = 1,
                        .norm_factor_max = b->norm_factor_max,
                        .cosine_min = b->cosine_min,
                        .n_inputs = (uint32_t)n};
    for (size_t i = 0; i < n; i++) {
        const update *u = updates[i];
        blobs[i] = (sh_bytes){u->bytes.data, u->bytes.len};
        inputs[i] = (sh_merge_input){.id = {.epoch = 1, .seq = i + 1},
                                     .sha256 = sh_sha256(u->bytes.data, u->bytes.len),
                                     .weight = u->weight,
                                     .relayed = u->relayed};
    }
    sh_merge_job o = {
        .dir = b->dir, .job = &job, .inputs = inputs, .blobs = blobs, .format = SH_TYPE_Q8_0};
    ok(fn(&o, &result, &err), &err);
    for (size_t i = 0; i < n; i++)
        updates[i]->reason = inputs[i].reason;
    return result;
}

/* What a relay passes up: the good ones' stack, with their weights together. */
static update relay(bench *b, update *const *updates, size_t n)
{
    sh_merge_job_result result = run(b, sh_job_stack, updates, n);
    update up = {.bytes = result.candidate, .relayed = true};
    assert_true(result.n_good > 0);
    result.candidate = (sh_buf){0};
    for (size_t i = 0; i < n; i++)
        up.weight += updates[i]->reason == SH_REASON_NONE ? updates[i]->weight : 0;
    sh_merge_job_result_release(&result);
    return up;
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

/* ‖two − one‖ / ‖one − before‖ over every tensor. */
static double difference(const bench *b, const sh_hash *one, const sh_hash *two)
{
    sh_gguf *before = open_file(b, &b->master), *x = open_file(b, one), *y = open_file(b, two);
    double change = 0, error = 0;
    for (size_t t = 0; t < sh_gguf_n_tensors(before); t++) {
        const float *w = sh_gguf_tensor_at(before, t)->data, *v = sh_gguf_tensor_at(x, t)->data,
                    *u = sh_gguf_tensor_at(y, t)->data;
        size_t n = (size_t)(sh_gguf_tensor_at(before, t)->bytes / sizeof(float));
        for (size_t i = 0; i < n; i++) {
            change += ((double)v[i] - (double)w[i]) * ((double)v[i] - (double)w[i]);
            error += ((double)v[i] - (double)u[i]) * ((double)v[i] - (double)u[i]);
        }
    }
    sh_gguf_close(&before);
    sh_gguf_close(&x);
    sh_gguf_close(&y);
    assert_true(change > 0);
    return sqrt(error / change);
}

/* One tier, and nodes -> relays -> relay -> root with nodes of its own. Returns the verdicts of the
 * single tier in `alone`. */
static double one_against_three(bench *b, sh_reason *alone)
{
    update *all[NODES], *low[3], *high[3];
    for (size_t i = 0; i < NODES; i++)
        all[i] = &b->nodes[i];
    sh_merge_job_result one = run(b, sh_job_merge, all, NODES);
    for (size_t i = 0; i < NODES; i++)
        alone[i] = b->nodes[i].reason;
    update first = relay(b, &all[0], 4), second = relay(b, &all[4], 4), third;
    low[0] = &first;
    low[1] = &second;
    third = relay(b, low, 2);
    update fourth = relay(b, &all[8], 4);
    high[0] = &fourth;
    high[1] = &third;
    sh_merge_job_result three = run(b, sh_job_merge, high, 2);
    assert_int_equal(three.n_good, 2);
    double error = difference(b, &one.new_master, &three.new_master);
    sh_merge_job_result_release(&one);
    sh_merge_job_result_release(&three);
    sh_buf_release(&first.bytes);
    sh_buf_release(&second.bytes);
    sh_buf_release(&third.bytes);
    sh_buf_release(&fourth.bytes);
    return error;
}

static void test_three_tiers_merge_as_one(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        bench *b = setup(seed % 2 == 0, seed);
        sh_reason alone[NODES];
        double error = one_against_three(b, alone);
        print_message("seed %llu: relative difference %g\n", (unsigned long long)seed, error);
        assert_true(error < TOLERANCE);
        finish(b);
    }
}

/* A relay finds among its nodes what one aggregator would have found among all. */
static void test_three_tiers_judge_as_one(void **state)
{
    (void)state;
    for (uint64_t seed = 11; seed <= 13; seed++) {
        bench *b = setup(seed % 2 == 0, seed);
        const sh_model_config *config = &b->model->config;
        sh_reason alone[NODES];
        b->norm_factor_max = 8;
        b->cosine_min = 0;
        sh_adapter *huge = make_adapter(config, seed, 1), *against = make_adapter(config, seed, 9);
        scale_b(huge, 100);
        scale_b(against, -1);
        set_node(b, 1, huge, b->nodes[1].weight);
        set_node(b, 9, against, b->nodes[9].weight);
        double error = one_against_three(b, alone);
        for (size_t i = 0; i < NODES; i++)
            if (b->nodes[i].reason != alone[i])
                fail_msg("node %zu: %s by its relay, %s alone", i,
                         sh_reason_name(b->nodes[i].reason), sh_reason_name(alone[i]));
        assert_int_equal(alone[1], SH_REASON_NORM);
        assert_int_equal(alone[9], SH_REASON_DIRECTION);
        assert_int_equal(alone[0], SH_REASON_NONE);
        print_message("seed %llu: relative difference %g\n", (unsigned long long)seed, error);
        assert_true(error < TOLERANCE);
        sh_adapter_destroy(&huge);
        sh_adapter_destroy(&against);
        finish(b);
    }
}

/* An average is shorter than the updates in it; a node beside relays is not measured by that. */
static void test_a_node_beside_relays_is_not_too_long(void **state)
{
    (void)state;
    bench *b = setup(false, 21);
    b->norm_factor_max = 2;
    update *all[NODES];
    sh_adapter *small = make_adapter(&b->model->config, 21, 0);
    scale_b(small, 0.01f);
    set_node(b, 0, small, 1000);
    set_node(b, 1, small, 1000);
    for (size_t i = 0; i < NODES; i++)
        all[i] = &b->nodes[i];
    b->nodes[0].relayed = b->nodes[1].relayed = true; /* two short averages against one node */
    sh_merge_job_result result = run(b, sh_job_merge, all, 3);
    assert_int_equal(b->nodes[2].reason, SH_REASON_NONE);
    sh_merge_job_result_release(&result);
    b->nodes[0].relayed = b->nodes[1].relayed = false;
    result = run(b, sh_job_merge, all, 3);
    assert_int_equal(b->nodes[2].reason, SH_REASON_NORM);
    sh_merge_job_result_release(&result);
    sh_adapter_destroy(&small);
    finish(b);
}

static void test_too_much_for_one_update_is_said(void **state)
{
    (void)state;
    bench *b = setup(false, 31);
    sh_error err = {0};
    sh_adapter *wide = NULL, *out = NULL;
    ok(sh_adapter_create(&b->model->config, SH_ADAPTER_RANK_MAX / 2 + 1, 1, &wide, &err), &err);
    sh_merge_source sources[] = {{.adapter = wide, .weight = 1}, {.adapter = wide, .weight = 1}};
    assert_int_equal(sh_merge_stack(sources, 2, &b->model->config, &out, &err), SH_ERR_LIMIT);
    sources[1].reason = SH_REASON_NORM;
    ok(sh_merge_stack(sources, 2, &b->model->config, &out, &err), &err);
    assert_int_equal(out->rank, SH_ADAPTER_RANK_MAX / 2 + 1);
    sh_adapter_destroy(&out);
    sources[0].reason = SH_REASON_NORM;
    assert_int_equal(sh_merge_stack(sources, 2, &b->model->config, &out, &err), SH_ERR_INVALID);
    sh_adapter_destroy(&wide);
    finish(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_three_tiers_merge_as_one),
        cmocka_unit_test(test_three_tiers_judge_as_one),
        cmocka_unit_test(test_a_node_beside_relays_is_not_too_long),
        cmocka_unit_test(test_too_much_for_one_update_is_said),
    };
    sh_error err = {0};
    sh_blas_init();
    if (sh_crypto_init(&err) != SH_OK)
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
