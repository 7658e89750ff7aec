/*
 * Whole files against llama-quantize: the F32 model of a perplexity case ("<name>-f32") is
 * quantized to Q8_0 and Q4_0; every matrix that llama-quantize gave that type ("<name>-Q8_0") must
 * have its very bytes. (In its Q4_0 files it keeps some matrices in another type: those are
 * counted.)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/quantize.h"
#include "tests/golden/golden.h"

#define NAME_BYTES 256

static sh_status check_pair(golden *g, const char *f32_path, const char *path, sh_type type,
                            sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf *source = NULL, *theirs = NULL, *ours = NULL;
    sh_buf bytes;
    size_t n_equal = 0, n_other_type = 0;
    sh_buf_init(&bytes, SIZE_MAX);
    SH_GOTO(sh_gguf_open(f32_path, &source, err));
    SH_GOTO(sh_gguf_open(path, &theirs, err));
    SH_GOTO(sh_gguf_quantize_encode(source, type, &bytes, err));
    SH_GOTO(sh_gguf_open_memory(bytes.data, bytes.len, "ours", &ours, err));
    golden_check(g, sh_gguf_n_tensors(ours) == sh_gguf_n_tensors(theirs), "%zu tensors, not %zu",
                 sh_gguf_n_tensors(ours), sh_gguf_n_tensors(theirs));
    for (size_t i = 0; i < sh_gguf_n_tensors(theirs); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(theirs, i);
        const sh_gguf_tensor *o = sh_gguf_tensor_find(ours, t->name);
        if (!golden_check(g, o != NULL, "the tensor '%s' was lost", t->name))
            continue;
        if (o->type != t->type) {
            n_other_type++;
            continue;
        }
        n_equal += golden_check(g, o->bytes == t->bytes && memcmp(o->data, t->data, t->bytes) == 0,
                                "the tensor '%s' has other bytes", t->name);
    }
    golden_check(g, n_equal > n_other_type, "only %zu tensors have the same type", n_equal);
    golden_note(g, "%s: %zu tensors equal, %zu of another type", sh_type_get((uint32_t)type)->name,
                n_equal, n_other_type);

cleanup:
    sh_gguf_close(&ours);
    sh_gguf_close(&theirs);
    sh_gguf_close(&source);
    sh_buf_release(&bytes);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    json_t *models = json_object_get(c, "models");
    size_t pairs = 0;
    const char *name;
    json_t *value;
    json_object_foreach(models, name, value)
    {
        size_t n = strlen(name);
        const char *f32_path = NULL, *path = NULL;
        if (n < 4 || n >= NAME_BYTES - 8 || strcmp(name + n - 4, "-f32") != 0)
            continue;
        SH_TRY(golden_file(g, models, name, &f32_path, err));
        for (size_t t = 0; t < SH_COUNT(types); t++) {
            char other[NAME_BYTES];
            snprintf(other, sizeof other, "%.*s-%s", (int)(n - 4), name,
                     sh_type_get((uint32_t)types[t])->name);
            if (golden_file(g, models, other, &path, NULL) != SH_OK)
                continue;
            pairs++;
            SH_TRY(check_pair(g, f32_path, path, types[t], err));
        }
    }
    return pairs > 0 ? SH_OK
                     : sh_fail(err, SH_ERR_NOT_FOUND, "no F32 model with its quantized forms");
}

int main(void)
{
    return golden_main("perplexity", run);
}
