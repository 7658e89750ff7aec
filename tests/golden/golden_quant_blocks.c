/*
 * Block formats against llama-quantize's bytes: dequantizing is exact but for the order of two
 * roundings; quantizing to Q8_0 and Q4_0 gives the same bytes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/math/quant.h"
#include "tests/golden/golden.h"

/* The products of dequantization are rounded once or twice, in an order that the format does not
 * say: 2 roundings of 2^-24. */
#define RELATIVE 2.4e-7
/* d * q - m of Q4_K cancels: absolute, of values below 1. */
#define ABSOLUTE 6e-8

#define NAME_BYTES 256

/* "<tensor>" of "<tensor>.F32", or false. */
static bool tensor_of(const char *name, char *out)
{
    size_t n = strlen(name), suffix = strlen(".F32");
    if (n <= suffix || n >= NAME_BYTES || strcmp(name + n - suffix, ".F32") != 0)
        return false;
    memcpy(out, name, n - suffix);
    out[n - suffix] = '\0';
    return true;
}

static sh_status check_type(golden *g, const safetensors *file, const char *tensor,
                            const safetensor *x, sh_type type, sh_error *err)
{
    sh_status status = SH_OK;
    char name[2 * NAME_BYTES];
    const safetensor *blocks, *values;
    const sh_type_info *info = sh_type_get((uint32_t)type);
    float *ours = NULL;
    uint8_t *bytes = NULL;
    snprintf(name, sizeof name, "%s.%s.blocks", tensor, info->name);
    if (safetensors_find(file, name) == NULL)
        return SH_OK;
    SH_GOTO(safetensors_need(file, name, SAFE_U8, &blocks, err));
    snprintf(name, sizeof name, "%s.%s.dequantized", tensor, info->name);
    SH_GOTO(safetensors_need(file, name, SAFE_F32, &values, err));
    size_t row_bytes = sh_type_row_bytes(type, x->shape[1]);
    if (row_bytes == 0 || blocks->n != row_bytes * x->shape[0] || values->n != x->n) {
        status = sh_fail(err, SH_ERR_INVALID, "'%s' has another shape than its float form", name);
        goto cleanup;
    }
    ours = sh_calloc(x->n, sizeof *ours);
    bytes = sh_calloc(blocks->n, 1);
    if (ours == NULL || bytes == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory");
        goto cleanup;
    }
    memcpy(bytes, blocks->data, blocks->n); /* U8 of the file need not be aligned as blocks are */
    sh_row_dequantize(type, bytes, ours, x->n);
    golden_close(g, name, ours, values->data, x->n, ABSOLUTE, RELATIVE);
    if (info->can_write) {
        sh_row_quantize(type, x->data, bytes, x->n);
        size_t i = 0;
        while (i < blocks->n && bytes[i] == ((const uint8_t *)blocks->data)[i])
            i++;
        golden_check(g, i == blocks->n, "%s: quantized byte %zu of %zu is %u, expected %u", name, i,
                     blocks->n, i < blocks->n ? bytes[i] : 0,
                     i < blocks->n ? ((const uint8_t *)blocks->data)[i] : 0);
        golden_note(g, "%s %s: %zu bytes quantized", tensor, info->name, blocks->n);
    }

cleanup:
    free(ours);
    free(bytes);
    return status;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0, SH_TYPE_Q4_K, SH_TYPE_Q6_K};
    sh_status status = SH_OK;
    safetensors file = {0};
    const char *path;
    SH_TRY(golden_file(g, c, "file", &path, err));
    SH_TRY(safetensors_open(path, &file, err));
    for (size_t i = 0; i < file.n; i++) {
        char tensor[NAME_BYTES];
        const safetensor *x = &file.tensors[i];
        if (!tensor_of(x->name, tensor) || x->type != SAFE_F32 || x->n_dims != 2)
            continue;
        for (size_t k = 0; k < SH_COUNT(types); k++)
            SH_GOTO(check_type(g, &file, tensor, x, types[k], err));
    }

cleanup:
    safetensors_release(&file);
    return status;
}

int main(void)
{
    return golden_main("quant_blocks", run);
}
