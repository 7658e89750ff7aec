/* The tokenizer of the tiny vocabulary (tests/model/tiny.h). */
#ifndef SH_TESTS_TRAINER_TOKENS_H
#define SH_TESTS_TRAINER_TOKENS_H

#include "shared/model/tokenizer.h"
#include "tests/model/tiny.h"
#include "tests/trainer/util.h"

static inline sh_tokenizer *load_tokenizer(bool add_bos)
{
    sh_error err = {0};
    tiny_options o = tiny_defaults(1);
    sh_buf bytes;
    sh_gguf *gguf = NULL;
    sh_tokenizer *t = NULL;
    o.add_bos = add_bos;
    sh_buf_init(&bytes, 1u << 24);
    must_be_ok(tiny_encode(&o, &bytes));
    must_be_ok(sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, &err));
    must_be_ok(sh_tokenizer_load(gguf, &t, &err));
    sh_gguf_close(&gguf);
    sh_buf_release(&bytes);
    return t;
}

#endif
