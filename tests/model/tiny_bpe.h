/*
 * A small byte-level BPE vocabulary (tokenizer model gpt2) without weights, for tests that need no
 * data, as GGUF in memory.
 *
 * Token b is the byte b for all 256; then the results of the merges; then "<|endoftext|>"
 * (control), "<|user|>" (user-defined), "<|im_end|>" (normal, so that loading makes it control).
 */
#ifndef SH_TESTS_TINY_BPE_H
#define SH_TESTS_TINY_BPE_H

#include "shared/base/buf.h"

typedef struct {
    const char *pre; /* NULL: no such key */
    bool add_bos, add_eos;
    /* What a test wants wrong: NULL, false or 0 for a sound file. */
    bool skip_merges;  /* no such key */
    const char *merge; /* one more, the last */
    unsigned renamed;  /* this byte's token is called "gone" instead (0: none) */
} tiny_bpe_options;

SH_MUST_USE sh_status tiny_bpe_encode(const tiny_bpe_options *options, sh_buf *out);
/* Ids: of the result of the n-th merge ("in" is 0), and of the three at the end. */
enum { TINY_BPE_IN, TINY_BPE_HE, TINY_BPE_THE, TINY_BPE_SPACE_THE, TINY_BPE_MERGES = 10 };
#define TINY_BPE_MERGED(n) (256 + (n))
#define TINY_BPE_EOS       (256 + TINY_BPE_MERGES)
#define TINY_BPE_USER      (TINY_BPE_EOS + 1)
#define TINY_BPE_IM_END    (TINY_BPE_EOS + 2)
#define TINY_BPE_SIZE      (TINY_BPE_EOS + 3)

#endif
