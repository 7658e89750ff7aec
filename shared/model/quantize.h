/*
 * Whole-file quantization: every matrix whose rows fit the block goes to `type`, norms and other
 * vectors stay F32, keys are copied, general.file_type is set. What we write llama.cpp loads.
 */
#ifndef SH_MODEL_QUANTIZE_H
#define SH_MODEL_QUANTIZE_H

#include "shared/model/gguf.h"

SH_MUST_USE sh_status sh_gguf_quantize(const sh_gguf *src, sh_type type, const char *out_path,
                                       sh_error *err);
/* Into memory, for a candidate that is hashed and stored. */
SH_MUST_USE sh_status sh_gguf_quantize_encode(const sh_gguf *src, sh_type type, sh_buf *out,
                                              sh_error *err);

#endif
