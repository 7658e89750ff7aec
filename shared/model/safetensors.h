/*
 * safetensors files: read (memory-mapped, bounds-checked) and write.
 * Format: https://github.com/huggingface/safetensors#format: a little-endian u64 with the length of
 * a JSON header {"name": {"dtype", "shape", "data_offsets"}, "__metadata__": {...}}, then the data.
 * Arrays are row-major: a matrix [out, in] is shape [out, in].
 *
 * Threads: a reader is immutable after open. Owner: sh_safetensors_close.
 */
#ifndef SH_MODEL_SAFETENSORS_H
#define SH_MODEL_SAFETENSORS_H

#include "shared/base/buf.h"
#include "shared/math/quant.h"

#define SH_SAFETENSORS_HEADER_MAX  (100u << 20) /* the format's own limit */
#define SH_SAFETENSORS_TENSORS_MAX 65536
#define SH_SAFETENSORS_DIMS_MAX    4
#define SH_SAFETENSORS_NAME_MAX    256

typedef struct sh_safetensors sh_safetensors;
typedef struct {
    const char *name;
    sh_type type; /* F32, F16, BF16; F64 and integers are refused where they are used */
    bool is_float;
    char dtype[8];
    uint32_t n_dims;
    uint64_t shape[SH_SAFETENSORS_DIMS_MAX]; /* unused are 1 */
    const void *data;                        /* in the map, of any alignment */
    uint64_t bytes;
} sh_safetensor;

/* SH_ERR_INVALID: a header that is longer than the file, no JSON, a shape and offsets that do not
 * agree, offsets that overlap, leave a hole or the file; SH_ERR_UNSUPPORTED: an unknown dtype, more
 * than four dimensions; SH_ERR_LIMIT: a header of too many values. */
SH_MUST_USE sh_status sh_safetensors_open(const char *path, sh_safetensors **out, sh_error *err);
SH_MUST_USE sh_status sh_safetensors_open_memory(const void *bytes, size_t n, const char *name,
                                                 sh_safetensors **out, sh_error *err);
void sh_safetensors_close(sh_safetensors **file);
const char *sh_safetensors_path(const sh_safetensors *file); /* or the name of memory */
size_t sh_safetensors_count(const sh_safetensors *file);
/* In order of their names. */
const sh_safetensor *sh_safetensors_at(const sh_safetensors *file, size_t i);
const sh_safetensor *sh_safetensors_find(const sh_safetensors *file,
                                         const char *name); /* or NULL */
/* F32, F16 or BF16 values as floats, n of them from the first-th on. */
void sh_safetensor_floats(const sh_safetensor *tensor, size_t first, size_t n, float *out);

/* Tensors in the given order (types F32, F16, BF16); written whole or not at all. */
SH_MUST_USE sh_status sh_safetensors_save(const char *path, const sh_safetensor *tensors, size_t n,
                                          sh_error *err);

#endif
