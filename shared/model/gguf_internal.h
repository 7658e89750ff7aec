/*
 * What the reader, the writer and the text form of GGUF share: value types and one parsed key.
 */
#ifndef SH_MODEL_GGUF_INTERNAL_H
#define SH_MODEL_GGUF_INTERNAL_H

#include "shared/model/gguf.h"

#define SH_GGUF_VERSION          3u
#define SH_GGUF_ALIGNMENT        32u /* ours, and the default of a file that does not say */
#define SH_GGUF_ALIGNMENT_MAX    (1u << 16)
#define SH_GGUF_KEY_BYTES_MAX    65535u /* the specification's */
#define SH_GGUF_HEADER_BYTES     24u    /* magic, version, tensor count, key count */
#define SH_GGUF_KEY_BYTES_MIN    13u    /* name length, value type, the least value */
#define SH_GGUF_TENSOR_BYTES_MIN 33u    /* name length, a byte, dimensions, one, type, offset */

typedef enum {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_VALUE_TYPES
} gguf_value_type;

/* A key and where its value lies; everything was bounds-checked when the file was opened. */
typedef struct {
    const char *name;
    uint32_t name_bytes;
    gguf_value_type type, element; /* element: of an array */
    uint64_t n;                    /* elements of an array, else 1 */
    const uint8_t *value;          /* first element; a string is a u64 length and its bytes */
    uint64_t value_bytes;          /* all elements */
} gguf_key;

const gguf_key *sh_gguf_key_at(const sh_gguf *gguf, size_t i);
/* Bytes of a value of a fixed width, 0 for strings and arrays. */
size_t sh_gguf_value_bytes(gguf_value_type type);
const char *sh_gguf_value_type_name(gguf_value_type type);

/* What comes before the tensors' bytes, padded to the alignment. */
SH_MUST_USE sh_status sh_gguf_writer_head(const sh_gguf_writer *w, sh_buf *out);
size_t sh_gguf_writer_n_tensors(const sh_gguf_writer *w);
uint64_t sh_gguf_writer_tensor_bytes(const sh_gguf_writer *w, size_t i);

#endif
