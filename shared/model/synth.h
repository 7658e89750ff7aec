/*
 * Models with random weights, for measuring and tests: a real GGUF file that llama.cpp loads, too.
 * Weights are normal(0, sigma), biases normal(0, 0.1), norms 1 + normal(0, 0.1); the same options
 * give the same bytes. The vocabulary is made up (byte tokens, then numbered words), of the size of
 * the shape. Values are drawn from a table of 65,536 normals: 1.1 billion of them take seconds.
 */
#ifndef SH_MODEL_SYNTH_H
#define SH_MODEL_SYNTH_H

#include "shared/model/model.h"

#define SH_SYNTH_SIGMA 0.02f

typedef struct {
    const char *name; /* "135m" */
    sh_arch arch;
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn, vocab, context;
    bool tied_output;
    float rope_base;
} sh_synth_shape;
/* 15m (stories15M), 135m (SmolLM2-135M), 1.1b (TinyLlama-1.1B), 0.5b (Qwen2.5-0.5B, qwen2),
 * 0.6b (Qwen3-0.6B, qwen3), tiny-llama, tiny-qwen2, tiny-qwen3 (below a MB, for tests).
 * SH_ERR_USAGE lists the names. */
SH_MUST_USE sh_status sh_synth_find(const char *name, const sh_synth_shape **out, sh_error *err);

typedef struct {
    const sh_synth_shape *shape;
    sh_type type; /* F32, F16, BF16, Q8_0, Q4_0 */
    uint64_t seed;
    float sigma; /* 0: SH_SYNTH_SIGMA; larger ones give logits that differ */
    sh_rope_scaling rope;
    float rope_factor; /* of a scaled RoPE */
    bool rope_freqs;   /* llama: Llama 3's factors of each frequency */
    void (*progress)(void *arg, size_t done, size_t n); /* tensors; may be NULL */
    void *arg;
} sh_synth_options;
SH_MUST_USE sh_status sh_synth_model(const sh_synth_options *options, const char *out_path,
                                     sh_error *err);
/* An adapter of that rank with random factors in llama.cpp's GGUF form, all seven matrices; alpha
 * is twice the rank. */
SH_MUST_USE sh_status sh_synth_adapter(const sh_synth_shape *shape, uint32_t rank, uint64_t seed,
                                       const char *out_path, sh_error *err);

#endif
