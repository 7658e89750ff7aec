/*
 * JSON Lines: any bytes end in a status, with a line's number if it is not OK. What is taken has no
 * control token but where the format puts one, and is packed with each target once. The first byte
 * chooses the chat's family (% 5 families), BOS (bit 5) and where EOS is put (the highest two
 * bits).
 */
#include <stdlib.h>
#include <string.h>

#include "tests/model/tiny.h"
#include "trainer/dataset_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static sh_tokenizer *load(bool add_bos)
{
    tiny_options o = tiny_defaults(1);
    sh_buf bytes;
    sh_gguf *gguf = NULL;
    sh_tokenizer *tokenizer = NULL;
    o.add_bos = add_bos;
    sh_buf_init(&bytes, 16u << 20);
    if (tiny_encode(&o, &bytes) != SH_OK ||
        sh_gguf_open_memory(bytes.data, bytes.len, "tiny", &gguf, NULL) != SH_OK ||
        sh_tokenizer_load(gguf, &tokenizer, NULL) != SH_OK)
        abort();
    sh_gguf_close(&gguf);
    sh_buf_release(&bytes);
    return tokenizer;
}

static void check_document(const sh_tokenizer *t, const sh_dataset *d, const tr_document *of)
{
    size_t targets = 0;
    SH_ASSERT(of->n >= 2 && of->at + of->n <= d->n_tokens && d->mask[of->at] == 0);
    for (size_t i = 0; i < of->n; i++) {
        const int32_t token = d->tokens[of->at + i];
        targets += d->mask[of->at + i];
        SH_ASSERT(token >= 0 && (uint32_t)token < sh_tokenizer_size(t));
        SH_ASSERT(of->kind == TR_CHAT || !sh_tokenizer_is_special(t, token) || i == 0 ||
                  i + 1 == of->n);
    }
    SH_ASSERT(targets > 0);
}

static void check_packing(const sh_dataset *d)
{
    static const uint32_t contexts[] = {1, 7, 64};
    const sh_dataset_counts counts = sh_dataset_count(d);
    for (size_t i = 0; i < SH_COUNT(contexts); i++) {
        const sh_dataset_packing options = {contexts[i], SH_LONG_SPLIT};
        const sh_dataset_range range = {.seed = i + 1, .first = i, .want = 5};
        sh_dataset_rows rows = {0};
        if (sh_dataset_pack(d, &options, &rows, NULL) != SH_OK)
            abort();
        SH_ASSERT(rows.targets == counts.targets);
        sh_dataset_rows_release(&rows);
        if (sh_dataset_pack_shuffled(d, &options, &range, &rows, NULL) != SH_OK)
            abort();
        SH_ASSERT(rows.data.n == 5);
        sh_dataset_rows_release(&rows);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static sh_tokenizer *tokenizers[2]; /* as long as the process */
    if (size == 0)
        return 0;
    const bool bos = data[0] >> 5 & 1;
    if (tokenizers[bos] == NULL)
        tokenizers[bos] = load(bos);
    const sh_dataset_options options = {.tokenizer = tokenizers[bos],
                                        .chat = (sh_chat_family)(data[0] % SH_CHAT_FAMILIES),
                                        .eos = (sh_dataset_eos)((data[0] >> 6) % 3)};
    sh_error err = {0};
    sh_dataset *d = calloc(1, sizeof *d);
    char **files = calloc(1, sizeof *files);
    if (d == NULL || files == NULL || (files[0] = strdup("fuzz")) == NULL)
        abort();
    d->files = files;
    d->n_files = 1;
    tr_reader reader = {&options, d};
    const sh_status status = tr_dataset_read_lines(&reader, (const char *)data + 1, size - 1, &err);
    if (status != SH_OK)
        SH_ASSERT(strncmp(err.text, "fuzz:", 5) == 0 && err.text[5] >= '1' && err.text[5] <= '9');
    for (size_t i = 0; i < d->n_documents; i++)
        check_document(options.tokenizer, d, &d->documents[i]);
    if (d->n_documents > 0)
        check_packing(d);
    sh_dataset_destroy(&d);
    return 0;
}
