/*
 * A small Hugging Face folder with random weights, written by this file alone, and the forward pass
 * of such a model as transformers computes it (pairs a half head apart), in double: what converted
 * models are held against. Include after cmocka.h.
 */
#ifndef SH_TESTS_MODEL_HF_SMALL_H
#define SH_TESTS_MODEL_HF_SMALL_H

#include "shared/base/json.h"
#include "shared/model/model.h"

#define HF_TENSORS_MAX 64

typedef struct {
    char name[96];
    uint32_t rows, columns; /* rows 0: a vector */
    float *values;
} hf_tensor;

typedef struct {
    const char *architecture;       /* "LlamaForCausalLM" */
    bool tied, sentencepiece, bias; /* bias: of a llama's q, k, v */
    sh_type type;                   /* of the tensors in the files */
    unsigned shards;                /* 0: one file without an index */
    const char *config;             /* one more JSON object, merged into config.json; or NULL */
    const char *tokenizer_config;   /* the file's text, or NULL */
    uint64_t seed;
} hf_options;

typedef struct {
    hf_options o;
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn, vocab;
    json_t *config;
    double rope_base;
    hf_tensor tensors[HF_TENSORS_MAX];
    size_t n;
} hf_model;

/* Makes the weights (as the type rounds them) and writes the folder, which must be there. */
hf_model *hf_make(const char *folder, const hf_options *options);
void hf_destroy(hf_model **model);
const hf_tensor *hf_find(const hf_model *model, const char *name); /* fails the test without it */
/* logits [n, vocab]. */
void hf_forward(const hf_model *model, const int32_t *tokens, uint32_t n, double *logits);
/* Removes the folder and the files in it. */
void hf_remove(const char *folder);

#endif
