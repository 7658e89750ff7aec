/*
 * A model's file: any bytes are opened or refused with a line; what opens is packed, or refused
 * with a line, and a small one runs a token, packed and in place, to the same bits where they are
 * numbers. Its seeds are tiny models, so that damage reaches the keys, shapes and scales.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shared/model/model.h"

#define WORK_BYTES_MAX (64u << 20) /* of a context that is run */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_line(sh_status status, const sh_error *err)
{
    SH_ASSERT(err->code == status && err->text[0] != '\0' && strchr(err->text, '\n') == NULL);
}

/* A file without a folder: memory under a path. */
static int make_file(const uint8_t *data, size_t size, char path[64])
{
    const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    SH_ASSERT(fd >= 0);
    SH_ASSERT(write(fd, data, size) == (ssize_t)size);
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}

/* Logits of the last token, or NULL where the model is too large for a fuzzer. */
static float *run(const sh_model *model)
{
    const sh_context_options options = {.n_tokens_max = SH_MIN(model->config.context, 4u),
                                        .batch_max = 2};
    const int32_t token = (int32_t)(model->config.vocab - 1);
    sh_context *context = NULL;
    sh_error err = {0};
    if (sh_context_bytes(model, &options) > WORK_BYTES_MAX)
        return NULL;
    sh_status status = sh_context_create(model, &options, &context, &err);
    SH_ASSERT(status == SH_OK);
    float *logits = malloc(model->config.vocab * sizeof *logits);
    SH_ASSERT(logits != NULL);
    for (uint32_t i = 0; i < options.n_tokens_max; i++) {
        status = sh_context_decode(context, &token, 1, SH_LOGITS_LAST, logits, &err);
        SH_ASSERT(status == SH_OK);
    }
    status = sh_context_decode(context, &token, 1, SH_LOGITS_LAST, logits, &err);
    SH_ASSERT(status == SH_ERR_LIMIT);
    sh_context_destroy(&context);
    return logits;
}

static void use(sh_model *model)
{
    const sh_pack_options options = {0};
    sh_error err = {0};
    float *before = run(model);
    sh_status status = sh_model_pack(model, &options, NULL, &err);
    if (status == SH_OK) {
        float *after = run(model);
        for (uint32_t i = 0; before != NULL && after != NULL && i < model->config.vocab; i++)
            SH_ASSERT(memcmp(&before[i], &after[i], sizeof *after) == 0 ||
                      (isnan(before[i]) && isnan(after[i])));
        free(after);
    } else {
        check_line(status, &err);
    }
    free(before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[64];
    sh_model *model = NULL;
    sh_error err = {0};
    const int fd = make_file(data, size, path);
    const sh_status status = sh_model_open(path, &model, &err);
    if (status == SH_OK)
        use(model);
    else
        check_line(status, &err);
    SH_ASSERT((status == SH_OK) == (model != NULL));
    sh_model_close(&model);
    close(fd);
    return 0;
}
