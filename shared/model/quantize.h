/*
 * Whole-file quantization, as `llama-quantize --pure` does it: every matrix whose rows are whole
 * blocks goes to `type`, one whose rows are not to F16; norms, biases and other vectors are F32;
 * keys are copied, general.file_type is set. What we write llama.cpp loads. The types that can be
 * read are the source's, F32, F16, BF16, Q8_0 and Q4_0 can be written. A value that is no number is
 * refused (SH_ERR_INVALID names its tensor).
 */
#ifndef SH_MODEL_QUANTIZE_H
#define SH_MODEL_QUANTIZE_H

#include "shared/model/gguf.h"

/* Into memory, for a candidate that is hashed and stored. */
SH_MUST_USE sh_status sh_gguf_quantize_encode(const sh_gguf *src, sh_type type, sh_buf *out,
                                              sh_error *err);

/* What became of one tensor. Errors are those of the values written against those read: the square
 * root of the mean square, as a share of the tensor's own; and the largest, as it is. */
typedef struct {
    const char *name;
    sh_type before, after;
    uint64_t n_values, bytes_before, bytes;
    double rms_error, largest_error;
} sh_quantize_loss;
typedef struct {
    void (*tensor)(void *arg, const sh_quantize_loss *loss, size_t done, size_t n);
    void *arg;
} sh_quantize_report;
/* Tensor after tensor to disk: memory is a row. report may be NULL (and saves the time it takes to
 * measure); its function is called after each tensor, in the file's order. */
SH_MUST_USE sh_status sh_gguf_quantize_file(const sh_gguf *src, sh_type type, const char *out_path,
                                            const sh_quantize_report *report, sh_error *err);

/* The same with an adapter merged into the matrices that it adapts: W + scale B·A, then quantized.
 * What is measured is what quantization lost of that. SH_ERR_MISMATCH: a matrix is not there, or of
 * another shape. */
struct sh_adapter;
SH_MUST_USE sh_status sh_gguf_merge_file(const sh_gguf *src, const struct sh_adapter *adapter,
                                         sh_type type, const char *out_path,
                                         const sh_quantize_report *report, sh_error *err);

/* Whether a tensor's numbers are all finite: scales of quantized types, values of the others. The
 * error names the tensor and the row. Reads the whole tensor. */
SH_MUST_USE sh_status sh_gguf_check_tensor(const sh_gguf_tensor *tensor, sh_error *err);

#endif
