/*
 * What the files behind convert.h share. Internal to model, its tests and fuzz targets.
 *
 *   convert_adapter.c    PEFT folders, both ways
 *   convert_json.c       typed keys of a JSON object, with errors that name file and key
 *   convert_config.c     config.json of a model
 *   convert_tokenizer.c  tokenizer.json and tokenizer_config.json
 *   convert_model.c      a whole Hugging Face folder
 */
#ifndef SH_MODEL_CONVERT_INTERNAL_H
#define SH_MODEL_CONVERT_INTERNAL_H

#include "shared/base/json.h"
#include "shared/model/convert.h"
#include "shared/model/safetensors.h"

#define SH_CONVERT_SHARDS_MAX 1024

/* ---- convert_json.c: `file` is the file's name, for errors; `key` in `object`. ---- */

/* A small file of settings, and one with a vocabulary: their limits differ. */
SH_MUST_USE sh_status sh_hf_load_settings(const char *path, json_t **out, sh_error *err);
SH_MUST_USE sh_status sh_hf_load_vocabulary(const char *path, json_t **out, sh_error *err);
extern const sh_json_limits sh_hf_settings_limits, sh_hf_vocabulary_limits;

/* Absent or null: *out stays. SH_ERR_INVALID: another type, out of range. */
SH_MUST_USE sh_status sh_hf_get_u32(const json_t *object, const char *file, const char *key,
                                    uint32_t max, uint32_t *out, sh_error *err);
SH_MUST_USE sh_status sh_hf_get_real(const json_t *object, const char *file, const char *key,
                                     double *out, sh_error *err);
SH_MUST_USE sh_status sh_hf_get_bool(const json_t *object, const char *file, const char *key,
                                     bool *out, sh_error *err);
SH_MUST_USE sh_status sh_hf_get_string(const json_t *object, const char *file, const char *key,
                                       const char **out, sh_error *err);
/* Neither absent nor null. */
bool sh_hf_has(const json_t *object, const char *key);

/* ---- convert_config.c ---- */

typedef struct {
    sh_arch arch;
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn, vocab, context;
    double norm_eps, rope_base;
    bool head_size_stated, tied;
    enum { SH_HF_ROPE_PLAIN, SH_HF_ROPE_LINEAR, SH_HF_ROPE_LLAMA3, SH_HF_ROPE_YARN } rope;
    double rope_factor, low_freq_factor, high_freq_factor; /* the last two: llama3 */
    double attention_factor, beta_fast, beta_slow;         /* yarn; 0: the default */
    uint32_t rope_original; /* context before scaling; llama3, yarn */
} sh_hf_config;

/* What a config.json says, checked; what would change the result and is not known is refused. */
SH_MUST_USE sh_status sh_hf_config_read(const json_t *config, const char *file, sh_hf_config *out,
                                        sh_error *err);
/* The keys <arch>.* of it. */
SH_MUST_USE sh_status sh_hf_config_write(const sh_hf_config *config, sh_gguf_writer *w,
                                         sh_error *err);
/* Llama 3's factors of rope_freqs.weight, [head_size / 2]. */
void sh_hf_rope_factors(const sh_hf_config *config, float *out);

/* ---- convert_tokenizer.c ---- */

typedef struct {
    const json_t *tokenizer; /* tokenizer.json */
    const json_t *settings;  /* tokenizer_config.json, may be NULL */
    const json_t *config;    /* config.json: ids of last resort, may be NULL */
    const char *template;    /* chat_template.jinja, may be NULL */
    const char *folder;      /* for errors */
    const char *pre;         /* NULL: by the regular expression */
    uint32_t vocab;          /* rows of the embedding: tokens are filled up to it */
} sh_hf_tokenizer;
/* Sets the keys tokenizer.*. */
SH_MUST_USE sh_status sh_hf_tokenizer_write(const sh_hf_tokenizer *t, sh_gguf_writer *w,
                                            sh_error *err);

/* ---- convert_adapter.c ---- */

/* An adapter_config.json and the tensors to it. */
SH_MUST_USE sh_status sh_peft_decode(const json_t *settings, const char *settings_name,
                                     const sh_safetensors *tensors, const sh_model_config *config,
                                     sh_adapter **out, sh_error *err);

/* The row of a q or k matrix in Hugging Face's order that is row `row` of llama's GGUF. */
static inline uint32_t sh_hf_row(uint32_t row, uint32_t head_size)
{
    const uint32_t head = row / head_size, at = row % head_size;
    return head * head_size + (at % 2) * (head_size / 2) + at / 2;
}

#endif
