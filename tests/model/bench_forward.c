/*
 * Tokens a second of decode and prefill of a GGUF model, for a look at the forward pass alone:
 *     bench_forward MODEL [THREADS [PROMPT [TOKENS [REPEATS [ADAPTER|- [nopack]]]]]]
 * Medians of the repeats. No test, and not built by default; `shoal model bench` is the one to
 * cite.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/math/kernel.h"
#include "shared/model/model.h"

enum { REPEATS_MAX = 99 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

static void must(sh_status status, const sh_error *err)
{
    if (status == SH_OK)
        return;
    fprintf(stderr, "bench_forward: %s\n", err->text);
    exit(sh_status_exit_code(status));
}

static void bench(sh_context *context, const sh_model *model, int prompt, int n, int repeats)
{
    sh_error err = {0};
    double prefill[REPEATS_MAX], decode[REPEATS_MAX];
    int32_t *tokens = calloc((size_t)prompt + (size_t)n + 1, sizeof *tokens);
    float *logits = calloc(model->config.vocab, sizeof *logits);
    if (tokens == NULL || logits == NULL)
        exit(1);
    for (int i = 0; i < prompt + n; i++)
        tokens[i] = (int32_t)((uint32_t)i * 7919u % model->config.vocab);
    for (int r = -1; r < repeats; r++) { /* the first one warms up */
        sh_context_truncate(context, 0);
        const double start = now();
        if (prompt > 0)
            must(sh_context_decode(context, tokens, (uint32_t)prompt, SH_LOGITS_LAST, logits, &err),
                 &err);
        const double middle = now();
        sh_context_truncate(context, 0);
        for (int i = 0; i < n; i++)
            must(sh_context_decode(context, tokens + i, 1, SH_LOGITS_LAST, logits, &err), &err);
        const double end = now();
        if (r >= 0) {
            prefill[r] = prompt / (middle - start);
            decode[r] = n / (end - middle);
        }
    }
    printf("prefill %d: %.1f tokens/s, decode %d: %.1f tokens/s\n", prompt,
           median(prefill, repeats), n, median(decode, repeats));
    free(tokens);
    free(logits);
}

int main(int argc, char **argv)
{
    int numbers[] = {1, 512, 128, 5}; /* threads, prompt, tokens, repeats */
    sh_error err = {0};
    sh_model *model = NULL;
    sh_team *team = NULL;
    sh_runner *runner = NULL;
    sh_context *context = NULL;
    sh_adapter *adapter = NULL;
    if (argc < 2) {
        fprintf(stderr, "bench_forward MODEL [THREADS [PROMPT [TOKENS [REPEATS [ADAPTER|- "
                        "[nopack]]]]]]\n");
        return 2;
    }
    for (int i = 0; i < 4 && i + 2 < argc; i++)
        numbers[i] = atoi(argv[i + 2]);
    const int repeats = SH_MIN(SH_MAX(numbers[3], 1), REPEATS_MAX);
    must(sh_team_create((unsigned)numbers[0], &team, &err), &err);
    must(sh_model_open(argv[1], &model, &err), &err);
    if (argc < 8) {
        bool cached;
        must(sh_model_pack(model, &(sh_pack_options){.team = team}, &cached, &err), &err);
    }
    must(sh_runner_create(model, &(sh_runner_options){.team = team}, &runner, &err), &err);
    const sh_context_options options = {
        .n_tokens_max = SH_MIN(model->config.context, 1024), .runner = runner, .kv = SH_KV_F16};
    must(sh_context_create(model, &options, &context, &err), &err);
    if (argc > 6 && strcmp(argv[6], "-") != 0) {
        must(sh_adapter_open(argv[6], &model->config, &adapter, &err), &err);
        const sh_adapter *one = adapter;
        must(sh_context_set_adapters(context, &one, NULL, 1, &err), &err);
    }
    printf("%s, %s, %d threads: ", argv[1], sh_kernel_level(), numbers[0]);
    bench(context, model, numbers[1], numbers[2], repeats);
    sh_context_destroy(&context);
    sh_adapter_destroy(&adapter);
    sh_runner_destroy(&runner);
    sh_model_close(&model);
    sh_team_destroy(&team);
    return 0;
}
