/* GGUF reader: any bytes end in a status; what opens can be read to its end and written again. */
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/model/gguf.h"

#define TEXT_MAX (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void read_keys(const sh_gguf *g)
{
    sh_buf text;
    sh_buf_init(&text, TEXT_MAX);
    for (size_t i = 0; i < sh_gguf_n_keys(g); i++) {
        sh_buf_clear(&text);
        sh_status status = sh_gguf_key_text(g, i, &text, &text, &text);
        SH_ASSERT(status == SH_OK || status == SH_ERR_LIMIT);
    }
    sh_buf_release(&text);
}

static void read_strings(const sh_gguf *g)
{
    size_t n;
    if (sh_gguf_get_array_count(g, "tokenizer.ggml.tokens", &n, NULL) != SH_OK)
        return;
    const char **texts = sh_calloc(n, sizeof *texts);
    uint32_t *lengths = sh_calloc(n, sizeof *lengths);
    SH_ASSERT(texts != NULL && lengths != NULL);
    volatile char ends = 0; /* read, so that a sanitizer sees bytes outside the file */
    if (sh_gguf_get_strings(g, "tokenizer.ggml.tokens", texts, lengths, n, NULL) == SH_OK)
        for (size_t i = 0; i < n; i++)
            if (lengths[i] > 0)
                ends = (char)(texts[i][0] ^ texts[i][lengths[i] - 1]);
    (void)ends;
    free(texts);
    free(lengths);
}

static void write_again(const sh_gguf *g)
{
    sh_gguf_writer *w = NULL;
    sh_gguf *again = NULL;
    sh_buf out;
    sh_buf_init(&out, SIZE_MAX);
    sh_status status = sh_gguf_writer_create(&w, NULL);
    if (status == SH_OK)
        status = sh_gguf_writer_copy_keys(w, g, NULL, NULL);
    for (size_t i = 0; status == SH_OK && i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(g, i);
        status = sh_gguf_writer_add_tensor(w, t->name, t->type, t->ne, t->n_dims, t->data, NULL);
    }
    if (status == SH_OK)
        status = sh_gguf_writer_encode(w, &out, NULL);
    if (status == SH_OK) { /* a name of 64 bytes can be read but not written */
        status = sh_gguf_open_memory(out.data, out.len, "again", &again, NULL);
        SH_ASSERT(status == SH_OK);
        SH_ASSERT(sh_gguf_n_tensors(again) == sh_gguf_n_tensors(g));
    }
    sh_gguf_close(&again);
    sh_gguf_writer_destroy(&w);
    sh_buf_release(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    sh_gguf *g = NULL;
    sh_error err = {0};
    sh_status status = sh_gguf_open_memory(data, size, "fuzz", &g, &err);
    if (status != SH_OK) {
        SH_ASSERT(g == NULL && err.code == status && err.text[0] != '\0');
        return 0;
    }
    read_keys(g);
    read_strings(g);
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(g, i);
        volatile uint8_t ends = 0; /* read, so that a sanitizer sees bytes outside the file */
        ends = ((const uint8_t *)t->data)[0];
        ends = ((const uint8_t *)t->data)[t->bytes - 1];
        (void)ends;
    }
    write_again(g);
    sh_gguf_close(&g);
    return 0;
}
