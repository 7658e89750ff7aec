/* What the model tests share: a tiny model in a file that is gone after opening, and checks that
 * print what went wrong. Include after cmocka.h. */
#ifndef SH_TESTS_MODEL_UTIL_H
#define SH_TESTS_MODEL_UTIL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/rng.h"
#include "shared/model/model.h"
#include "tests/model/tiny.h"

#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        sh_error check_err_ = {0};                                                                 \
        sh_error *err = &check_err_;                                                               \
        sh_status check_status_ = (call);                                                          \
        if (check_status_ != SH_OK)                                                                \
            fail_msg("%s: %s (%s)", #call, sh_status_name(check_status_), err->text);              \
    } while (0)

/* Writes the tiny model to a file of its own and calls sh_model_open. */
static inline sh_status util_try_open(const tiny_options *options, sh_model **out, sh_error *err)
{
    char path[] = "/tmp/shoal-tiny-XXXXXX";
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    sh_status status = tiny_write(options, path, err);
    if (status == SH_OK)
        status = sh_model_open(path, out, err);
    unlink(path); /* the map keeps the bytes */
    return status;
}

static inline sh_model *util_open(const tiny_options *options)
{
    sh_model *model = NULL;
    CHECK_OK(util_try_open(options, &model, err));
    return model;
}

/* An adapter with random values in both factors, of the output matrix, too, where it is not tied;
 * zero B leaves the model as it is. */
static inline sh_adapter *util_adapter(const sh_model *model, uint32_t rank, uint64_t seed,
                                       float b_std)
{
    sh_adapter *adapter = NULL;
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    CHECK_OK(sh_adapter_create(&model->config, rank, 2.0f * (float)rank, &adapter, err));
    if (!model->config.tied_output)
        CHECK_OK(sh_adapter_add_output(adapter, &model->config, rank, err));
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        sh_lora_pair *p = &adapter->pairs[i];
        for (size_t k = 0; k < (size_t)p->rank * p->in; k++)
            p->a[k] = sh_rng_normal(&rng) / 8.0f;
        for (size_t k = 0; k < (size_t)p->rank * p->out; k++)
            p->b[k] = sh_rng_normal(&rng) * b_std;
    }
    return adapter;
}

/* The ids of a text, printed where they are others. */
static inline void util_expect_ids(const sh_tokenizer *t, const char *text, unsigned flags,
                                   size_t n_expected, const int32_t *expected)
{
    int32_t *ids = NULL;
    size_t n = 0;
    CHECK_OK(sh_tokenize(t, text, strlen(text), flags, &ids, &n, err));
    if (n != n_expected || (expected != NULL && memcmp(ids, expected, n * sizeof *ids) != 0)) {
        for (size_t i = 0; i < SH_MAX(n, n_expected); i++)
            print_message("%zu: %d, expected %d\n", i, i < n ? ids[i] : -1,
                          i < n_expected ? expected[i] : -1);
        fail_msg("\"%s\" with flags %u: %zu ids, expected %zu", text, flags, n, n_expected);
    }
    free(ids);
}

#define EXPECT_IDS(t, text, flags, ...)                                                            \
    do {                                                                                           \
        const int32_t expected_[] = {__VA_ARGS__};                                                 \
        util_expect_ids(t, text, flags, SH_COUNT(expected_), expected_);                           \
    } while (0)

#endif
