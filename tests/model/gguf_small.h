/*
 * A small GGUF of every value type and several tensors, for the tests of the reader.
 */
#ifndef SH_TESTS_GGUF_SMALL_H
#define SH_TESTS_GGUF_SMALL_H

#include "shared/model/gguf.h"

/* Appends the file to out. Its last tensor ends at the end of the file, without padding. */
SH_MUST_USE sh_status gguf_small(sh_buf *out, sh_error *err);

#endif
