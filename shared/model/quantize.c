/*
 * Whole-file quantization, row by row. The file is made either in memory or as a stream.
 */
#include "shared/model/quantize.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/model/blame.h"
#include "shared/model/finite.h"
#include "shared/model/model.h"

#define WRITE_BYTES (256u << 10) /* rows are put together to pieces of about this */

static sh_type type_for(const sh_gguf_tensor *t, sh_type wanted)
{
    if (t->n_dims < 2)
        return SH_TYPE_F32;
    return sh_type_row_bytes(wanted, t->ne[0]) > 0 ? wanted : SH_TYPE_F16;
}

static uint64_t rows_of(const sh_gguf_tensor *t)
{
    return t->ne[1] * t->ne[2] * t->ne[3];
}

/* Sums over the values of a tensor, in doubles. */
typedef struct {
    double squares, error_squares, largest;
} loss_sums;

static void add_loss(loss_sums *sums, const float *before, const float *after, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double x = (double)before[i], e = (double)after[i] - x;
        sums->squares += x * x;
        sums->error_squares += e * e;
        sums->largest = fmax(sums->largest, fabs(e));
    }
}

/* Rows of one tensor on their way into another type. */
typedef struct {
    const sh_gguf_tensor *t;
    sh_type type;
    size_t n, src_row_bytes, row_bytes;
    float *values, *back;     /* [n] */
    const sh_lora_pair *pair; /* to be merged; NULL: none */
    float scale;
} conversion;

static void conversion_release(conversion *c)
{
    free(c->values);
    free(c->back);
    *c = (conversion){0};
}

static sh_status conversion_init(conversion *c, const sh_gguf_tensor *t, sh_type type,
                                 sh_error *err)
{
    *c = (conversion){.t = t, .type = type, .n = t->ne[0]};
    c->src_row_bytes = sh_type_row_bytes(t->type, c->n);
    c->row_bytes = sh_type_row_bytes(type, c->n);
    c->values = sh_calloc(c->n, sizeof *c->values);
    c->back = sh_calloc(c->n, sizeof *c->back);
    if (c->values != NULL && c->back != NULL)
        return SH_OK;
    conversion_release(c);
    return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", t->name);
}

static void merge_row(const conversion *c, uint64_t i)
{
    const sh_lora_pair *p = c->pair;
    for (size_t k = 0; k < p->rank; k++) {
        const float b = c->scale * p->b[i * p->rank + k], *a = p->a + k * p->in;
        for (size_t j = 0; j < c->n; j++)
            c->values[j] += b * a[j];
    }
}

/* Row i into `row`; its loss goes to sums unless NULL. */
static sh_status convert_row(conversion *c, uint64_t i, void *row, loss_sums *sums, sh_error *err)
{
    const uint8_t *src = (const uint8_t *)c->t->data + i * c->src_row_bytes;
    sh_row_dequantize(c->t->type, src, c->values, c->n);
    if (c->pair != NULL)
        merge_row(c, i);
    if (!sh_row_is_finite(SH_TYPE_F32, c->values, c->n))
        return sh_fail(err, SH_ERR_INVALID,
                       "tensor '%s': row %" PRIu64 " holds a NaN or an infinity", c->t->name, i);
    sh_row_quantize(c->type, c->values, row, c->n);
    if (sums != NULL) {
        sh_row_dequantize(c->type, row, c->back, c->n);
        add_loss(sums, c->values, c->back, c->n);
    }
    return SH_OK;
}

static sh_status begin_writer(const sh_gguf *src, sh_type type, sh_gguf_writer **out, sh_error *err)
{
    sh_status status;
    sh_gguf_writer *w = NULL;
    const sh_type_info *info = sh_type_get((uint32_t)type);
    if (info == NULL || !info->can_write)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "cannot quantize to %s; F32, F16, BF16, Q8_0 and Q4_0 can be written",
                       info == NULL ? "an unknown type" : info->name);
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_copy_keys(w, src, NULL, err));
    status = sh_gguf_writer_set_type(w, type);
    if (status != SH_OK)
        sh_fail(err, status, "out of memory to quantize %s", sh_gguf_path(src));
    if (status == SH_OK) {
        *out = w;
        w = NULL;
    }

cleanup:
    sh_gguf_writer_destroy(&w);
    return status;
}

/* ---- in memory ---- */

/* The tensor in another type; *out is malloc'ed. */
static sh_status convert(const sh_gguf_tensor *t, sh_type type, void **out, sh_error *err)
{
    sh_status status;
    size_t bytes;
    uint8_t *rows = NULL;
    conversion c;
    SH_TRY(conversion_init(&c, t, type, err));
    if (!__builtin_mul_overflow(c.row_bytes, rows_of(t), &bytes))
        rows = sh_alloc_aligned(bytes);
    if (rows == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", t->name);
        goto cleanup;
    }
    for (uint64_t i = 0; i < rows_of(t); i++)
        SH_GOTO(convert_row(&c, i, rows + i * c.row_bytes, NULL, err));
    status = SH_OK;
    *out = rows;
    rows = NULL;

cleanup:
    free(rows);
    conversion_release(&c);
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
    sh_status status;
    sh_gguf_writer *w = NULL;
    size_t n = sh_gguf_n_tensors(src);
    void **made = sh_calloc(n, sizeof *made);
    if (made == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory to quantize %s", sh_gguf_path(src));
    SH_GOTO(begin_writer(src, type, &w, err));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(add_tensor(w, sh_gguf_tensor_at(src, i), type, &made[i], err));
    SH_GOTO(sh_gguf_writer_encode(w, out, err));

cleanup:
    for (size_t i = 0; i < n; i++)
        free(made[i]);
    free(made);
    sh_gguf_writer_destroy(&w);
    if (status != SH_OK)
        sh_blame_file(src, err);
    return status;
}

/* ---- to a file ---- */

/* All rows of one tensor, in pieces. */
static sh_status stream_rows(sh_gguf_stream *stream, conversion *c, loss_sums *sums, sh_error *err)
{
    sh_status status = SH_OK;
    const uint64_t n_rows = rows_of(c->t);
    const size_t at_once = SH_MAX(WRITE_BYTES / c->row_bytes, 1);
    uint8_t *rows = sh_alloc_aligned(SH_MIN(at_once, n_rows) * c->row_bytes);
    if (rows == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "out of memory for the tensor '%s'", c->t->name);
    for (uint64_t i = 0; i < n_rows; i += at_once) {
        const uint64_t end = SH_MIN(i + at_once, n_rows);
        for (uint64_t r = i; r < end; r++)
            SH_GOTO(convert_row(c, r, rows + (r - i) * c->row_bytes, sums, err));
        SH_GOTO(sh_gguf_stream_write(stream, rows, (end - i) * c->row_bytes, err));
    }

cleanup:
    free(rows);
    return status;
}

/* The adapter's pair of a tensor; NULL: it is not adapted. */
static const sh_lora_pair *pair_of(const sh_adapter *adapter, const char *tensor)
{
    char name[SH_GGUF_NAME_MAX];
    const size_t n = strlen(tensor), suffix = sizeof ".weight" - 1;
    if (adapter == NULL || n < suffix || strcmp(tensor + n - suffix, ".weight") != 0)
        return NULL;
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        if (adapter->pairs[i].a == NULL)
            continue;
        sh_lora_pair_name(adapter->n_layers, i, name);
        if (strlen(name) == n - suffix && memcmp(name, tensor, n - suffix) == 0)
            return &adapter->pairs[i];
    }
    return NULL;
}

/* That every pair has its matrix. */
static sh_status check_pairs(const sh_gguf *src, const sh_adapter *adapter, sh_error *err)
{
    char name[SH_GGUF_NAME_MAX], tensor[SH_GGUF_NAME_MAX + 8];
    for (size_t i = 0; adapter && i < sh_lora_pair_count(adapter->n_layers); i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        if (p->a == NULL)
            continue;
        sh_lora_pair_name(adapter->n_layers, i, name);
        snprintf(tensor, sizeof tensor, "%s.weight", name);
        const sh_gguf_tensor *t = sh_gguf_tensor_find(src, tensor);
        if (t == NULL || t->n_dims != 2 || t->ne[0] != p->in || t->ne[1] != p->out)
            return sh_fail(err, SH_ERR_MISMATCH,
                           "the adapter is of another base: %s has no %s [%u, %u]",
                           sh_gguf_path(src), tensor, p->out, p->in);
    }
    return SH_OK;
}

static sh_status stream_tensor(sh_gguf_stream *stream, const sh_gguf_tensor *t, sh_type type,
                               const sh_adapter *adapter, sh_quantize_loss *loss, sh_error *err)
{
    const sh_lora_pair *pair = pair_of(adapter, t->name);
    conversion c;
    loss_sums sums = {0};
    *loss = (sh_quantize_loss){.name = t->name,
                               .before = t->type,
                               .after = type,
                               .n_values = t->ne[0] * rows_of(t),
                               .bytes_before = t->bytes,
                               .bytes = sh_type_row_bytes(type, t->ne[0]) * rows_of(t)};
    if (type == t->type && pair == NULL)
        return sh_gguf_stream_write(stream, t->data, t->bytes, err);
    SH_TRY(conversion_init(&c, t, type, err));
    if (pair != NULL) {
        c.pair = pair;
        c.scale = adapter->alpha / (float)pair->rank;
    }
    sh_status status = stream_rows(stream, &c, &sums, err);
    conversion_release(&c);
    loss->rms_error = sums.squares > 0 ? sqrt(sums.error_squares / sums.squares) : 0;
    loss->largest_error = sums.largest;
    return status;
}

sh_status sh_gguf_quantize_file(const sh_gguf *src, sh_type type, const char *out_path,
                                const sh_quantize_report *report, sh_error *err)
{
    return sh_gguf_merge_file(src, NULL, type, out_path, report, err);
}

sh_status sh_gguf_merge_file(const sh_gguf *src, const sh_adapter *adapter, sh_type type,
                             const char *out_path, const sh_quantize_report *report, sh_error *err)
{
    sh_status status;
    sh_gguf_writer *w = NULL;
    sh_gguf_stream *stream = NULL;
    const size_t n = sh_gguf_n_tensors(src);
    SH_TRY(check_pairs(src, adapter, err));
    SH_GOTO(begin_writer(src, type, &w, err));
    for (size_t i = 0; i < n; i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(src, i);
        SH_GOTO(
            sh_gguf_writer_add_tensor(w, t->name, type_for(t, type), t->ne, t->n_dims, NULL, err));
    }
    SH_GOTO(sh_gguf_stream_begin(w, out_path, &stream, err));
    for (size_t i = 0; i < n; i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(src, i);
        sh_quantize_loss loss;
        status = stream_tensor(stream, t, type_for(t, type), adapter, &loss, err);
        if (status == SH_ERR_INVALID)
            sh_blame_file(src, err);
        SH_GOTO(status);
        if (report != NULL)
            report->tensor(report->arg, &loss, i + 1, n);
    }
    SH_GOTO(sh_gguf_stream_finish(&stream, err));

cleanup:
    sh_gguf_stream_cancel(&stream);
    sh_gguf_writer_destroy(&w);
    return status;
}

sh_status sh_gguf_check_tensor(const sh_gguf_tensor *tensor, sh_error *err)
{
    const size_t row_bytes = sh_type_row_bytes(tensor->type, tensor->ne[0]);
    for (uint64_t i = 0; i < rows_of(tensor); i++)
        if (!sh_row_is_finite(tensor->type, (const uint8_t *)tensor->data + i * row_bytes,
                              tensor->ne[0]))
            return sh_fail(err, SH_ERR_INVALID,
                           "tensor '%s': row %" PRIu64 " holds a NaN or an infinity", tensor->name,
                           i);
    return SH_OK;
}
