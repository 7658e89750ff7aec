/*
 * Adapters made by others: what llama.cpp's form says is read, written, read again, with the same
 * values bit for bit. PEFT's form is not supported yet, and that is said.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"
#include "tests/golden/golden.h"

/* Every tensor of the file must be in the adapter's place, unchanged. */
static void check_tensors(golden *g, const sh_gguf *file, const sh_gguf *written)
{
    golden_check(g, sh_gguf_n_tensors(written) == sh_gguf_n_tensors(file),
                 "%zu tensors were written, the file has %zu", sh_gguf_n_tensors(written),
                 sh_gguf_n_tensors(file));
    for (size_t i = 0; i < sh_gguf_n_tensors(file); i++) {
        const sh_gguf_tensor *theirs = sh_gguf_tensor_at(file, i);
        const sh_gguf_tensor *ours = sh_gguf_tensor_find(written, theirs->name);
        if (!golden_check(g, ours != NULL, "the tensor '%s' was lost", theirs->name))
            continue;
        golden_check(g, memcmp(ours->ne, theirs->ne, sizeof ours->ne) == 0,
                     "the tensor '%s' has another shape", theirs->name);
        if (theirs->type == SH_TYPE_F32)
            golden_check(g,
                         ours->bytes == theirs->bytes &&
                             memcmp(ours->data, theirs->data, ours->bytes) == 0,
                         "the tensor '%s' has other values", theirs->name);
    }
    golden_note(g, "%zu tensors read and written", sh_gguf_n_tensors(file));
}

static sh_status check_adapter(golden *g, const char *path, const sh_model_config *config,
                               sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *adapter = NULL, *again = NULL;
    sh_gguf *file = NULL, *written = NULL;
    sh_buf first, second;
    double alpha;
    sh_buf_init(&first, SIZE_MAX);
    sh_buf_init(&second, SIZE_MAX);
    SH_GOTO(sh_gguf_open(path, &file, err));
    SH_GOTO(sh_adapter_open(path, config, &adapter, err));
    SH_GOTO(sh_gguf_get_f64(file, "adapter.lora.alpha", &alpha, err));
    golden_check(g, (double)adapter->alpha == alpha, "alpha is %g, the file's is %g",
                 (double)adapter->alpha, alpha);
    SH_GOTO(sh_adapter_encode(adapter, &first, err));
    SH_GOTO(sh_gguf_open_memory(first.data, first.len, "written", &written, err));
    check_tensors(g, file, written);
    SH_GOTO(sh_adapter_decode(first.data, first.len, "written", config, &again, err));
    SH_GOTO(sh_adapter_encode(again, &second, err));
    golden_check(g, first.len == second.len && memcmp(first.data, second.data, first.len) == 0,
                 "written, read and written again, the adapter has other bytes");

cleanup:
    sh_adapter_destroy(&adapter);
    sh_adapter_destroy(&again);
    sh_gguf_close(&written);
    sh_gguf_close(&file);
    sh_buf_release(&first);
    sh_buf_release(&second);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    const char *model_path = NULL, *path = NULL, *peft = NULL;
    sh_model *model = NULL;
    SH_TRY(golden_file(g, c, "model", &model_path, err));
    SH_TRY(golden_file(g, c, "gguf", &path, err));
    SH_TRY(sh_model_open(model_path, &model, err));
    sh_status status = check_adapter(g, path, &model->config, err);
    sh_model_close(&model);
    if (status == SH_OK && golden_file(g, c, "peft", &peft, NULL) == SH_OK)
        golden_skip(g, "%s: PEFT's form (adapter_config.json and safetensors) is not supported yet",
                    peft);
    return status;
}

int main(void)
{
    return golden_main("adapter_pair", run);
}
