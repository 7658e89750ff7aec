/*
 * Between Hugging Face's files and GGUF.
 *
 * Adapters: PEFT's adapter_config.json + adapter_model.safetensors, and llama.cpp's GGUF. Names
 * `base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight` are
 * `blk.N.attn_q.weight.lora_a`, and so on; `base_model.model.lm_head` is `output`. GGUF's `llama`
 * architecture rotates adjacent rows of a head, Hugging Face's rotates rows a half head apart, so
 * rows of B of q and k are permuted:
 *     B_gguf[h * hd + 2 * j + s] = B_peft[h * hd + s * hd / 2 + j],  s in {0, 1}, j < hd / 2
 * qwen2 and qwen3 keep Hugging Face's order. rsLoRA and a module's own rank and alpha
 * (rank_pattern, alpha_pattern) are taken into the scale; DoRA, modules_to_save, fan_in_fan_out,
 * biases, initializations that change the base are refused by name.
 *
 * Models: a folder with config.json, tokenizer.json (and tokenizer_config.json), model.safetensors
 * or model-*.safetensors with their index, of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM.
 */
#ifndef SH_MODEL_CONVERT_H
#define SH_MODEL_CONVERT_H

#include "shared/model/model.h"

/* Reads an adapter from a PEFT folder or from GGUF, whichever `path` is. SH_ERR_MISMATCH when it is
 * of another base, SH_ERR_UNSUPPORTED names the setting that we do not compute. */
SH_MUST_USE sh_status sh_adapter_open_any(const char *path, const sh_model_config *config,
                                          sh_adapter **out, sh_error *err);
/* Writes adapter_config.json and adapter_model.safetensors (F32) into a folder, which is made.
 * base_name is base_model_name_or_path, may be "". Read again, the values are the same bits. */
SH_MUST_USE sh_status sh_adapter_save_peft(const sh_adapter *adapter, const sh_model_config *config,
                                           const char *folder, const char *base_name,
                                           sh_error *err);

typedef struct {
    sh_type type;    /* of the matrices: F32, F16, BF16, Q8_0, Q4_0 */
    const char *pre; /* name of the pre-tokenizer; NULL: told by its regular expression */
    void (*progress)(void *arg, size_t done, size_t n, const char *tensor); /* may be NULL */
    void *arg;
} sh_convert_options;
/* A Hugging Face folder to a GGUF file, which is there whole or not at all. */
SH_MUST_USE sh_status sh_convert_model(const char *folder, const char *out_path,
                                       const sh_convert_options *options, sh_error *err);

#endif
