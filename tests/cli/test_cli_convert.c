/*
 * `shoal model convert` as a script sees it: a Hugging Face folder and adapters made here, good and
 * bad uses. argv[1] is the program.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/file.h"
#include "tests/cli/run.h"
#include "tests/model/hf_small.h"
#include "tests/model/util.h"

static const char *program;
static char folder[64], model_path[80], adapter_path[80], peft_path[80], again_path[80];

#define RUN(...)                                                                                   \
    run_program(program, (const char *const[]){"model", "convert", __VA_ARGS__, NULL}, NULL, 0)

static int make_files(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/shoal-cli-convert-XXXXXX");
    assert_non_null(mkdtemp(folder));
    snprintf(model_path, sizeof model_path, "%s.gguf", folder);
    snprintf(adapter_path, sizeof adapter_path, "%s-adapter.gguf", folder);
    snprintf(peft_path, sizeof peft_path, "%s-peft", folder);
    snprintf(again_path, sizeof again_path, "%s-again.gguf", folder);
    hf_model *hf = hf_make(folder, &(hf_options){.architecture = "LlamaForCausalLM", .seed = 3});
    hf_destroy(&hf);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    unlink(model_path);
    unlink(adapter_path);
    unlink(again_path);
    hf_remove(peft_path);
    hf_remove(folder);
    return 0;
}

static void expect(run_result r, int exit_code, const char *out, const char *err)
{
    if (r.exit_code != exit_code || strstr(r.out, out) == NULL || strstr(r.err, err) == NULL ||
        (exit_code != 0 && r.n_out != 0))
        fail_msg("exit code %d, expected %d\nstdout \"%s\"\nstderr \"%s\", expected \"%s\"",
                 r.exit_code, exit_code, r.out, r.err, err);
    run_release(&r);
}

static void test_usage(void **state)
{
    (void)state;
    expect(RUN("--help"), 0, "shoal model convert -i SmolLM2-135M", "");
    expect(RUN("-o", "x"), 2, "", "-i PATH is missing");
    expect(RUN("-i", folder), 2, "", "-o OUT is missing");
    expect(RUN("-i", folder, "-o", model_path, "--to", "onnx"), 2, "", "'onnx'");
    expect(RUN("-i", folder, "-o", model_path, "--to", "peft"), 2, "", "not to peft");
    expect(RUN("-i", folder, "-o", model_path, "--type", "Q4_K"), 2, "", "Q4_K");
    expect(RUN("-i", "/nowhere/x", "-o", model_path), 2, "", "/nowhere/x");
    expect(RUN("-i", "/", "-o", model_path), 2, "", "adapter_config.json");
    assert_false(sh_file_exists(model_path));
}

/* A model, then an adapter for it there and back: the same bytes. */
static void test_convert(void **state)
{
    (void)state;
    uint8_t *first = NULL, *second = NULL;
    size_t n_first = 0, n_second = 0;
    sh_model *model = NULL;
    sh_buf bytes;
    sh_buf_init(&bytes, 16u << 20);
    expect(RUN("-i", folder, "-o", model_path, "--type", "F32", "--json"), 0,
           "\"from\":\"huggingface\"", "");
    CHECK_OK(sh_model_open(model_path, &model, err));
    sh_adapter *adapter = util_adapter(model, 2, 1, 0.2f);
    CHECK_OK(sh_adapter_encode(adapter, &bytes, err));
    CHECK_OK(sh_file_write_atomic(adapter_path, bytes.data, bytes.len, err));
    expect(RUN("-i", adapter_path, "-o", peft_path), 2, "", "-m FILE is missing");
    expect(RUN("-i", adapter_path, "-o", peft_path, "-m", model_path), 0, "PEFT", "");
    expect(RUN("-i", peft_path, "-o", again_path, "-m", model_path, "--to", "gguf"), 0, "GGUF", "");
    CHECK_OK(sh_file_read(adapter_path, 16u << 20, &first, &n_first, err));
    CHECK_OK(sh_file_read(again_path, 16u << 20, &second, &n_second, err));
    assert_int_equal(n_first, n_second);
    assert_memory_equal(first, second, n_first);
    expect(RUN("-i", peft_path, "-o", again_path, "-m", model_path, "--type", "F16"), 2, "",
           "--type is for models");
    expect(RUN("-i", model_path, "-o", again_path), 2, "", "shoal model quantize");
    free(first);
    free(second);
    sh_buf_release(&bytes);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_usage),
                                       cmocka_unit_test(test_convert)};
    if (argc != 2) {
        fprintf(stderr, "usage: %s PROGRAM\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
