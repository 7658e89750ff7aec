/*
 * Adapters made by others: what llama.cpp's form says is read, written, read again, with the same
 * values bit for bit. The same adapter in PEFT's form, by others, is the same values too, and as we
 * write it, the same tensors.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/model/convert.h"
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

static void check_equal(golden *g, const sh_adapter *ours, const sh_adapter *theirs)
{
    golden_check(g, ours->alpha == theirs->alpha && ours->rank == theirs->rank,
                 "alpha %g, rank %u; expected %g, %u", (double)ours->alpha, ours->rank,
                 (double)theirs->alpha, theirs->rank);
    for (size_t i = 0; i < (size_t)theirs->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *x = &ours->pairs[i], *y = &theirs->pairs[i];
        const char *matrix = sh_layer_matrix_names[i % SH_LAYER_MATRICES];
        if (!golden_check(g, (x->a != NULL) == (y->a != NULL) && x->rank == y->rank,
                          "blk.%zu.%s is in one of them, or of another rank", i / SH_LAYER_MATRICES,
                          matrix) ||
            y->a == NULL)
            continue;
        golden_check(g, memcmp(x->a, y->a, (size_t)y->rank * y->in * sizeof *y->a) == 0,
                     "A of blk.%zu.%s has other values", i / SH_LAYER_MATRICES, matrix);
        golden_check(g, memcmp(x->b, y->b, (size_t)y->rank * y->out * sizeof *y->b) == 0,
                     "B of blk.%zu.%s has other values", i / SH_LAYER_MATRICES, matrix);
    }
}

/* Theirs in PEFT's form, by the golden harness's own reader, against what we write of the GGUF. */
static sh_status check_written(golden *g, const char *peft, const char *folder, sh_error *err)
{
    sh_status status = SH_OK;
    safetensors theirs = {0}, ours = {0};
    char path[SH_PATH_BYTES];
    SH_GOTO(sh_path_join(path, sizeof path, peft, "adapter_model.safetensors", err));
    SH_GOTO(safetensors_open(path, &theirs, err));
    SH_GOTO(sh_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    SH_GOTO(safetensors_open(path, &ours, err));
    golden_check(g, ours.n == theirs.n, "%zu tensors were written, expected %zu", ours.n, theirs.n);
    for (size_t i = 0; i < theirs.n; i++) {
        const safetensor *x = safetensors_find(&ours, theirs.tensors[i].name);
        const safetensor *y = &theirs.tensors[i];
        golden_check(g,
                     x != NULL && x->type == y->type && x->n == y->n &&
                         memcmp(x->shape, y->shape, sizeof x->shape) == 0 &&
                         memcmp(x->data, y->data, y->n * sizeof(float)) == 0,
                     "the tensor '%s' is missing, or not the same", y->name);
    }
    golden_note(g, "%zu tensors of PEFT's form are the same", theirs.n);

cleanup:
    safetensors_release(&ours);
    safetensors_release(&theirs);
    return status;
}

static sh_status check_peft(golden *g, const char *path, const char *peft,
                            const sh_model_config *config, sh_error *err)
{
    sh_status status = SH_OK;
    sh_adapter *ours = NULL, *theirs = NULL;
    char folder[] = "/tmp/shoal-peft-XXXXXX", file[SH_PATH_BYTES];
    if (mkdtemp(folder) == NULL)
        return sh_fail(err, SH_ERR_IO, "cannot make a temporary folder");
    SH_GOTO(sh_adapter_open(path, config, &theirs, err));
    SH_GOTO(sh_adapter_open_any(peft, config, &ours, err));
    check_equal(g, ours, theirs);
    SH_GOTO(sh_adapter_save_peft(theirs, config, folder, "", err));
    SH_GOTO(check_written(g, peft, folder, err));

cleanup:
    sh_adapter_destroy(&ours);
    sh_adapter_destroy(&theirs);
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors"};
    for (size_t i = 0; i < SH_COUNT(names); i++)
        if (sh_path_join(file, sizeof file, folder, names[i], NULL) == SH_OK)
            unlink(file);
    rmdir(folder);
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
    if (status == SH_OK && golden_file(g, c, "peft", &peft, NULL) == SH_OK)
        status = check_peft(g, path, peft, &model->config, err);
    sh_model_close(&model);
    return status;
}

int main(void)
{
    return golden_main("adapter_pair", run);
}
