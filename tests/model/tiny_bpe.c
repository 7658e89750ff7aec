#include "tests/model/tiny_bpe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/gguf.h"

/* "Ġ" is a space, "Ċ" a newline. */
static const char *const merges[TINY_BPE_MERGES] = {
    "i n", "h e", "t he", "Ġ the", "Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "e Ġ", "' s",
};
enum { TEXT_BYTES = 24 };

typedef struct {
    char texts[TINY_BPE_SIZE][TEXT_BYTES];
    const char *pointers[TINY_BPE_SIZE];
    uint32_t lengths[TINY_BPE_SIZE];
    int32_t types[TINY_BPE_SIZE];
} vocabulary;

/* The letters of GPT-2's encoder.py: bytes that do not print get U+0100 and on, in order. */
static void byte_text(unsigned byte, char *out)
{
    unsigned code = byte, others = 0;
    for (unsigned b = 0; b <= byte; b++) {
        const bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        if (b == byte && !prints)
            code = 256 + others;
        others += !prints;
    }
    if (code < 0x80)
        snprintf(out, TEXT_BYTES, "%c", (int)code);
    else
        snprintf(out, TEXT_BYTES, "%c%c", (int)(0xC0 | code >> 6), (int)(0x80 | (code & 0x3F)));
}

static void fill(const tiny_bpe_options *o, vocabulary *v)
{
    static const char *const last[] = {"<|endoftext|>", "<|user|>", "<|im_end|>"};
    for (unsigned i = 0; i < TINY_BPE_SIZE; i++) {
        char *text = v->texts[i];
        v->types[i] = 1;
        if (i < 256 && i == o->renamed && i != 0) {
            snprintf(text, TEXT_BYTES, "gone");
        } else if (i < 256) {
            byte_text(i, text);
        } else if (i < TINY_BPE_EOS) {
            const char *merge = merges[i - 256], *space = strchr(merge, ' ');
            snprintf(text, TEXT_BYTES, "%.*s%s", (int)(space - merge), merge, space + 1);
        } else {
            snprintf(text, TEXT_BYTES, "%s", last[i - TINY_BPE_EOS]);
        }
        v->pointers[i] = text;
        v->lengths[i] = (uint32_t)strlen(text);
    }
    v->types[TINY_BPE_EOS] = 3;
    v->types[TINY_BPE_USER] = 4;
}

static sh_status set_merges(const tiny_bpe_options *o, sh_gguf_writer *w)
{
    const char *texts[TINY_BPE_MERGES + 1];
    uint32_t lengths[TINY_BPE_MERGES + 1];
    size_t n = 0;
    for (; n < TINY_BPE_MERGES; n++)
        texts[n] = merges[n];
    if (o->merge != NULL)
        texts[n++] = o->merge;
    for (size_t i = 0; i < n; i++)
        lengths[i] = (uint32_t)strlen(texts[i]);
    return sh_gguf_writer_set_strings(w, "tokenizer.ggml.merges", texts, lengths, n);
}

sh_status tiny_bpe_encode(const tiny_bpe_options *o, sh_buf *out)
{
    sh_status status;
    sh_gguf_writer *w = NULL;
    vocabulary *v = sh_calloc(1, sizeof *v);
    if (v == NULL)
        return SH_ERR_NO_MEMORY;
    fill(o, v);
    SH_GOTO(sh_gguf_writer_create(&w, NULL));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.architecture", "llama"));
    SH_GOTO(sh_gguf_writer_set_string(w, "tokenizer.ggml.model", "gpt2"));
    if (o->pre != NULL)
        SH_GOTO(sh_gguf_writer_set_string(w, "tokenizer.ggml.pre", o->pre));
    SH_GOTO(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", v->pointers, v->lengths,
                                       TINY_BPE_SIZE));
    SH_GOTO(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", v->types, TINY_BPE_SIZE));
    SH_GOTO(sh_gguf_writer_set_u32(w, "tokenizer.ggml.bos_token_id", TINY_BPE_EOS));
    SH_GOTO(sh_gguf_writer_set_u32(w, "tokenizer.ggml.eos_token_id", TINY_BPE_EOS));
    if (o->add_bos)
        SH_GOTO(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_bos_token", true));
    if (o->add_eos)
        SH_GOTO(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_eos_token", true));
    if (!o->skip_merges)
        SH_GOTO(set_merges(o, w));
    SH_GOTO(sh_gguf_writer_encode(w, out, NULL));

cleanup:
    sh_gguf_writer_destroy(&w);
    free(v);
    return status;
}
