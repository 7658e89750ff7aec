/*
 * GGUF files: read (v2, v3; memory-mapped, bounds-checked, weights used in place) and write (v3).
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 *
 * A matrix that computes y = W·x with W [out, in] is stored with ne = {in, out}: rows of `in`
 * values, one after another; a row of a quantized type is a whole number of blocks.
 * Threads: a reader is immutable after open and may be shared. Owner: sh_gguf_close.
 */
#ifndef SH_MODEL_GGUF_H
#define SH_MODEL_GGUF_H

#include "shared/base/buf.h"
#include "shared/base/hash.h"
#include "shared/base/status.h"
#include "shared/math/quant.h"

#define SH_GGUF_DIMS_MAX    4
#define SH_GGUF_TENSORS_MAX 65536
#define SH_GGUF_KEYS_MAX    65536
#define SH_GGUF_NAME_MAX    64
#define SH_GGUF_STRING_MAX  (64u << 20)
#define SH_GGUF_ARRAY_MAX   (16u << 20) /* elements */

typedef struct sh_gguf sh_gguf;

typedef struct {
    const char *name; /* 0-terminated copy */
    sh_type type;
    uint32_t n_dims;
    uint64_t ne[SH_GGUF_DIMS_MAX]; /* ne[0] is the row length; unused are 1 */
    const void *data;              /* in the map; aligned to general.alignment */
    uint64_t bytes;
} sh_gguf_tensor;

/* SH_ERR_INVALID: foreign, truncated, overlapping or out-of-range; SH_ERR_UNSUPPORTED: version or
 * tensor type that we do not know (named). */
SH_MUST_USE sh_status sh_gguf_open(const char *path, sh_gguf **out, sh_error *err);
/* The same over bytes that outlive the reader (fuzzing, adapters in a store). */
SH_MUST_USE sh_status sh_gguf_open_memory(const void *bytes, size_t n, const char *name,
                                          sh_gguf **out, sh_error *err);
void sh_gguf_close(sh_gguf **gguf);

uint32_t sh_gguf_version(const sh_gguf *gguf);
const char *sh_gguf_path(const sh_gguf *gguf); /* or the name of memory; for errors */
/* The file as it is in the map; header_bytes of it (keys, tensor table) come before the data. */
const uint8_t *sh_gguf_bytes(const sh_gguf *gguf, size_t *n);
size_t sh_gguf_header_bytes(const sh_gguf *gguf);
/* Bytes of the map that are not needed soon: whole pages of them leave the process's memory, and
 * come back from the file when they are read. Does nothing for bytes that are not of a file. */
void sh_gguf_forget(const sh_gguf *gguf, const void *bytes, size_t n);
size_t sh_gguf_n_tensors(const sh_gguf *gguf);
const sh_gguf_tensor *sh_gguf_tensor_at(const sh_gguf *gguf, size_t i);
const sh_gguf_tensor *sh_gguf_tensor_find(const sh_gguf *gguf, const char *name); /* or NULL */

/* Metadata. SH_ERR_NOT_FOUND when absent, SH_ERR_INVALID when of another type. Integers of every
 * width are read by get_u64 (negative: invalid), floats of both widths by get_f64. */
SH_MUST_USE sh_status sh_gguf_get_u64(const sh_gguf *gguf, const char *key, uint64_t *out,
                                      sh_error *err);
SH_MUST_USE sh_status sh_gguf_get_f64(const sh_gguf *gguf, const char *key, double *out,
                                      sh_error *err);
SH_MUST_USE sh_status sh_gguf_get_bool(const sh_gguf *gguf, const char *key, bool *out,
                                       sh_error *err);
/* *text points into the file and is not 0-terminated. */
SH_MUST_USE sh_status sh_gguf_get_string(const sh_gguf *gguf, const char *key, const char **text,
                                         size_t *n, sh_error *err);
/* Arrays: *n elements; strings one at a time, numbers copied. */
SH_MUST_USE sh_status sh_gguf_get_array_count(const sh_gguf *gguf, const char *key, size_t *n,
                                              sh_error *err);
SH_MUST_USE sh_status sh_gguf_get_strings(const sh_gguf *gguf, const char *key, const char **texts,
                                          uint32_t *lengths, size_t n, sh_error *err);
SH_MUST_USE sh_status sh_gguf_get_f32s(const sh_gguf *gguf, const char *key, float *out, size_t n,
                                       sh_error *err);
SH_MUST_USE sh_status sh_gguf_get_i32s(const sh_gguf *gguf, const char *key, int32_t *out, size_t n,
                                       sh_error *err);
/* Every key in file order, as text for `inspect` (long arrays shortened). */
size_t sh_gguf_n_keys(const sh_gguf *gguf);
SH_MUST_USE sh_status sh_gguf_key_text(const sh_gguf *gguf, size_t i, sh_buf *key, sh_buf *type,
                                       sh_buf *value);

/* ---- writing: add keys and tensors in order, then save. Data is borrowed until save. A key that
 * is set again keeps its place and gets the new value. general.alignment is ours (32). Data NULL is
 * for sh_gguf_stream only. ---- */
typedef struct sh_gguf_writer sh_gguf_writer;
SH_MUST_USE sh_status sh_gguf_writer_create(sh_gguf_writer **out, sh_error *err);
void sh_gguf_writer_destroy(sh_gguf_writer **writer);
/* Copies every metadata key of src except those named in skip (NULL-terminated, may be NULL). */
SH_MUST_USE sh_status sh_gguf_writer_copy_keys(sh_gguf_writer *w, const sh_gguf *src,
                                               const char *const *skip, sh_error *err);
/* general.file_type and general.quantization_version of a file whose matrices are of a type that
 * can be written. */
SH_MUST_USE sh_status sh_gguf_writer_set_type(sh_gguf_writer *w, sh_type type);
SH_MUST_USE sh_status sh_gguf_writer_set_u32(sh_gguf_writer *w, const char *key, uint32_t v);
SH_MUST_USE sh_status sh_gguf_writer_set_f32(sh_gguf_writer *w, const char *key, float v);
SH_MUST_USE sh_status sh_gguf_writer_set_bool(sh_gguf_writer *w, const char *key, bool v);
SH_MUST_USE sh_status sh_gguf_writer_set_string(sh_gguf_writer *w, const char *key, const char *v);
SH_MUST_USE sh_status sh_gguf_writer_set_u64(sh_gguf_writer *w, const char *key, uint64_t v);
SH_MUST_USE sh_status sh_gguf_writer_set_strings(sh_gguf_writer *w, const char *key,
                                                 const char *const *texts, const uint32_t *lengths,
                                                 size_t n);
SH_MUST_USE sh_status sh_gguf_writer_set_f32s(sh_gguf_writer *w, const char *key, const float *v,
                                              size_t n);
SH_MUST_USE sh_status sh_gguf_writer_set_i32s(sh_gguf_writer *w, const char *key, const int32_t *v,
                                              size_t n);
SH_MUST_USE sh_status sh_gguf_writer_add_tensor(sh_gguf_writer *w, const char *name, sh_type type,
                                                const uint64_t *ne, uint32_t n_dims,
                                                const void *data, sh_error *err);
SH_MUST_USE sh_status sh_gguf_writer_encode(const sh_gguf_writer *w, sh_buf *out, sh_error *err);
SH_MUST_USE sh_status sh_gguf_writer_save(const sh_gguf_writer *w, const char *path,
                                          sh_error *err); /* atomic */

/* ---- writing what is too large for memory: tensors are added with data NULL, then their bytes
 * come one tensor after another in that order, in pieces of any size; zeros between tensors are
 * put by the stream. The file is there whole after finish, or not at all. The writer must outlive
 * the stream and not change. ----
 *     sh_gguf_stream *s = NULL;
 *     SH_GOTO(sh_gguf_stream_begin(writer, path, &s, err));
 *     for (every row of every tensor)
 *         SH_GOTO(sh_gguf_stream_write(s, row, row_bytes, err));
 *     SH_GOTO(sh_gguf_stream_finish(&s, err));
 * cleanup:
 *     sh_gguf_stream_cancel(&s); */
typedef struct sh_gguf_stream sh_gguf_stream;
SH_MUST_USE sh_status sh_gguf_stream_begin(const sh_gguf_writer *w, const char *path,
                                           sh_gguf_stream **out, sh_error *err);
/* n bytes of the tensor that is next, at most what is left of it. */
SH_MUST_USE sh_status sh_gguf_stream_write(sh_gguf_stream *stream, const void *bytes, size_t n,
                                           sh_error *err);
/* Every byte must have come; also on error the stream is gone. */
SH_MUST_USE sh_status sh_gguf_stream_finish(sh_gguf_stream **stream, sh_error *err);
void sh_gguf_stream_cancel(sh_gguf_stream **stream); /* NULL inside is ok */

#endif
