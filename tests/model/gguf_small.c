#include "tests/model/gguf_small.h"

static sh_status add_tensors(sh_gguf_writer *w, sh_error *err)
{
    static float matrix[3 * 64], vector[5] = {1, -2, 3, -4, 5};
    static uint8_t q8_0[2 * 2 * 34], half[8 * 16 * 2];
    const uint64_t ne_matrix[] = {64, 3}, ne_vector[] = {5}, ne_q[] = {64, 2},
                   ne_half[] = {8, 4, 4};
    for (size_t i = 0; i < SH_COUNT(matrix); i++)
        matrix[i] = (float)i * 0.25f - 20;
    sh_row_quantize(SH_TYPE_Q8_0, matrix, q8_0, 2 * 64);
    sh_row_quantize(SH_TYPE_F16, matrix, half, 128);
    SH_TRY(sh_gguf_writer_add_tensor(w, "blk.0.attn_q.weight", SH_TYPE_F32, ne_matrix, 2, matrix,
                                     err));
    SH_TRY(
        sh_gguf_writer_add_tensor(w, "output_norm.weight", SH_TYPE_F32, ne_vector, 1, vector, err));
    SH_TRY(sh_gguf_writer_add_tensor(w, "token_embd.weight", SH_TYPE_Q8_0, ne_q, 2, q8_0, err));
    return sh_gguf_writer_add_tensor(w, "cube", SH_TYPE_F16, ne_half, 3, half, err);
}

sh_status gguf_small(sh_buf *out, sh_error *err)
{
    static const char *const tokens[] = {"<unk>", "", "\xe2\x96\x81the", "a\nb"};
    static const uint32_t lengths[] = {5, 0, 6, 3};
    static const float scores[] = {0, -1.5f, 2, 1e-3f};
    static const int32_t kinds[] = {2, 3, -1, 1};
    sh_status status = SH_OK;
    sh_gguf_writer *w = NULL;
    SH_GOTO(sh_gguf_writer_create(&w, err));
    SH_GOTO(sh_gguf_writer_set_string(w, "general.architecture", "llama"));
    SH_GOTO(sh_gguf_writer_set_u32(w, "llama.block_count", 4));
    SH_GOTO(sh_gguf_writer_set_f32(w, "llama.rope.freq_base", 10000));
    SH_GOTO(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_bos_token", true));
    SH_GOTO(sh_gguf_writer_set_u64(w, "large", UINT64_MAX));
    SH_GOTO(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", tokens, lengths, 4));
    SH_GOTO(sh_gguf_writer_set_f32s(w, "tokenizer.ggml.scores", scores, 4));
    SH_GOTO(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", kinds, 4));
    SH_GOTO(sh_gguf_writer_set_i32s(w, "empty", kinds, 0));
    SH_GOTO(add_tensors(w, err));
    SH_GOTO(sh_gguf_writer_encode(w, out, err));

cleanup:
    sh_gguf_writer_destroy(&w);
    return status;
}
