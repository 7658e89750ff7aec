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

/* An adapter with random values in both factors; zero B leaves the model as it is. */
static inline sh_adapter *util_adapter(const sh_model *model, uint32_t rank, uint64_t seed,
                                       float b_std)
{
    sh_adapter *adapter = NULL;
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 1);
    CHECK_OK(sh_adapter_create(&model->config, rank, 2.0f * (float)rank, &adapter, err));
    for (size_t i = 0; i < (size_t)adapter->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *p = &adapter->pairs[i];
        for (size_t k = 0; k < (size_t)p->rank * p->in; k++)
            p->a[k] = sh_rng_normal(&rng) / 8.0f;
        for (size_t k = 0; k < (size_t)p->rank * p->out; k++)
            p->b[k] = sh_rng_normal(&rng) * b_std;
    }
    return adapter;
}

#endif
