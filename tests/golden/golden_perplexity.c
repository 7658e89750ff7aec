/*
 * Perplexity under llama-perplexity's protocol against llama.cpp's own figures. Tolerance 0.3 %:
 * llama.cpp and we round activations of quantized models differently; on F32 both agree to 1e-5.
 */
#include <math.h>
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"
#include "tests/golden/golden.h"

#define RELATIVE 3e-3
#define THREADS  2

/* Under a sanitizer a model takes minutes: one is enough there, golden_forward_quantized runs the
 * other types. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MODELS_MAX 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MODELS_MAX 1
#endif
#endif
#ifndef MODELS_MAX
#define MODELS_MAX SIZE_MAX
#endif

static sh_status read_integer(const json_t *expected, const char *key, size_t *out, sh_error *err)
{
    const json_t *value = json_object_get(expected, key);
    if (!json_is_integer(value) || json_integer_value(value) <= 0)
        return sh_fail(err, SH_ERR_INVALID, "the reference has no count '%s'", key);
    *out = (size_t)json_integer_value(value);
    return SH_OK;
}

static sh_status check_model(golden *g, const char *key, const char *path, const char *text_path,
                             const json_t *expected, sh_error *err)
{
    sh_status status;
    sh_model *model = NULL;
    sh_pool *pool = NULL;
    uint8_t *bytes = NULL;
    int32_t *tokens = NULL;
    size_t n_bytes = 0, n = 0, n_tokens = 0, chunks = 0, scored = 0;
    const json_t *perplexity = json_object_get(json_object_get(expected, "perplexity"), key);
    if (!json_is_number(perplexity))
        return sh_fail(err, SH_ERR_INVALID, "the reference has no perplexity of '%s'", key);
    SH_TRY(read_integer(expected, "tokens", &n_tokens, err));
    SH_TRY(read_integer(expected, "chunks", &chunks, err));
    SH_TRY(read_integer(expected, "scored_tokens", &scored, err));
    SH_GOTO(sh_model_open(path, &model, err));
    SH_GOTO(sh_file_read(text_path, SH_TOKENIZE_BYTES_MAX, &bytes, &n_bytes, err));
    if (n_bytes > 0 && bytes[n_bytes - 1] == '\n')
        n_bytes--;
    SH_GOTO(sh_tokenize(model->tokenizer, (const char *)bytes, n_bytes,
                        SH_TOKENIZE_BOS | SH_TOKENIZE_SPECIAL, &tokens, &n, err));
    golden_check(g, n == n_tokens, "%s: %zu tokens, reference %zu", key, n, n_tokens);
    SH_GOTO(sh_pool_create(THREADS, &pool, err));
    /* A chunk of n tokens has n/2 - 1 scored ones. */
    const uint32_t chunk = (uint32_t)(2 * (scored / chunks + 1));
    const sh_loss_text text = {.tokens = tokens, .n_tokens = n, .chunk = chunk, .half = true};
    sh_loss loss = {0};
    SH_GOTO(sh_model_loss_pool(model, &text, pool, &loss, err));
    golden_check(g, loss.n_scored == scored, "%s: %zu tokens scored, reference %zu", key,
                 (size_t)loss.n_scored, scored);
    golden_close_f64(g, key, exp(loss.nll_sum / (double)loss.n_scored),
                     json_number_value(perplexity), 0, RELATIVE);

cleanup:
    sh_pool_destroy(&pool);
    free(tokens);
    free(bytes);
    sh_model_close(&model);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status;
    json_t *expected = NULL, *models = json_object_get(c, "models"), *value;
    const char *path, *text, *key;
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_TRY(golden_file(g, c, "text", &text, err));
    SH_TRY(sh_json_load(path, &expected, err));
    size_t n = 0;
    json_object_foreach(models, key, value)
    {
        if (n++ >= MODELS_MAX) {
            golden_skip(g, "%s: a sanitizer build measures %zu models", key, (size_t)MODELS_MAX);
            continue;
        }
        status = golden_file(g, models, key, &path, err);
        if (status == SH_OK)
            status = check_model(g, key, path, text, expected, err);
        if (status == SH_ERR_UNSUPPORTED || status == SH_ERR_NOT_FOUND)
            golden_skip(g, "%s: %s", key, err->text);
        else if (status != SH_OK)
            goto cleanup;
    }
    status = SH_OK;

cleanup:
    json_decref(expected);
    return status;
}

int main(void)
{
    return golden_main("perplexity", run);
}
