/*
 * Whole-file quantization, as llama-quantize does it with --pure: one type for every matrix, F16
 * for a matrix whose rows are no whole blocks, F32 for vectors.
 */
#include "shared/model/quantize.h"

#include <stdlib.h>

#include "shared/base/file.h"

#define QUANTIZATION_VERSION 2 /* of the block formats, GGML_QNT_VERSION */

/* general.file_type, llama_ftype of llama.cpp. */
static uint32_t file_type(sh_type type)
{
    switch (type) {
    case SH_TYPE_F32:
        return 0;
    case SH_TYPE_F16:
        return 1;
    case SH_TYPE_Q4_0:
        return 2;
    case SH_TYPE_Q8_0:
        return 7;
    case SH_TYPE_BF16:
    case SH_TYPE_Q4_K:
    case SH_TYPE_Q6_K:
        break;
    }
    SH_ASSERT(!"a writable type");
    return 0;
}

static sh_type type_for(const sh_gguf_tensor *t, sh_type wanted)
{
    if (t->n_dims < 2)
        return SH_TYPE_F32;
    return sh_type_row_bytes(wanted, t->ne[0]) > 0 ? wanted : SH_TYPE_F16;
}

/* The tensor in another type, row by row; *out is malloc'ed. */
static sh_status convert(const sh_gguf_tensor *t, sh_type type, void **out, sh_error *err)
{
    sh_status status = SH_OK;
    size_t row_values = t->ne[0], n_rows = t->ne[1] * t->ne[2] * t->ne[3];
    size_t row_bytes = sh_type_row_bytes(type, row_values), bytes;
    size_t src_row_bytes = sh_type_row_bytes(t->type, row_values);
    uint8_t *rows = NULL;
    float *values = sh_calloc(row_values, sizeof *values);
    if (!__builtin_mul_overflow(row_bytes, n_rows, &bytes))
        rows = sh_alloc_aligned(bytes);
    if (values == NULL || rows == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", t->name);
        goto cleanup;
    }
    for (size_t i = 0; i < n_rows; i++) {
        sh_row_dequantize(t->type, (const uint8_t *)t->data + i * src_row_bytes, values,
                          row_values);
        sh_row_quantize(type, values, rows + i * row_bytes, row_values);
    }
    *out = rows;
    rows = NULL;

cleanup:
    free(values);
    free(rows);
    return status;
}

/* Adds the tensor to w in the type it gets; what had to be made is kept in *made. */
static sh_status add_tensor(sh_gguf_writer *w, const sh_gguf_tensor *t, sh_type wanted, void **made,
                            sh_error *err)
{
    sh_type type = type_for(t, wanted);
    if (type != t->type)
        SH_TRY(convert(t, type, made, err));
    return sh_gguf_writer_add_tensor(w, t->name, type, t->ne, t->n_dims,
                                     *made != NULL ? *made : t->data, err);
}

sh_status sh_gguf_quantize_encode(const sh_gguf *src, sh_type type, sh_buf *out, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_writer *w = NULL;
    size_t n = sh_gguf_n_tensors(src);
    const sh_type_info *info = sh_type_get((uint32_t)type);
    if (info == NULL || !info->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "cannot quantize to %s; F32, F16, Q8_0 and Q4_0 can be written",
                       info == NULL ? "an unknown type" : info->name);
    void **made = sh_calloc(n, sizeof *made);
    if (made == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory to quantize %s", sh_gguf_path(src));
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_copy_keys(w, src, NULL, err));
    SH_GOTO(sh_gguf_writer_set_u32(w, "general.quantization_version", QUANTIZATION_VERSION));
    SH_GOTO(sh_gguf_writer_set_u32(w, "general.file_type", file_type(type)));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(add_tensor(w, sh_gguf_tensor_at(src, i), type, &made[i], err));
    SH_GOTO(sh_gguf_writer_encode(w, out, err));

cleanup:
    for (size_t i = 0; i < n; i++)
        free(made[i]);
    free(made);
    sh_gguf_writer_destroy(&w);
    return status;
}

sh_status sh_gguf_quantize(const sh_gguf *src, sh_type type, const char *out_path, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf bytes;
    sh_buf_init(&bytes, SIZE_MAX);
    SH_GOTO(sh_gguf_quantize_encode(src, type, &bytes, err));
    SH_GOTO(sh_file_write_atomic(out_path, bytes.data, bytes.len, err));

cleanup:
    sh_buf_release(&bytes);
    return status;
}
