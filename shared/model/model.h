/*
 * Llama-family decoders: load from GGUF, forward pass with KV cache, run-time LoRA adapters.
 * RMSNorm, RoPE (adjacent pairs, as GGUF's `llama` arch), grouped-query attention, SwiGLU, tied or
 * untied output. Touvron et al. 2023 (arXiv:2302.13971); RoPE: Su et al. 2021 (arXiv:2104.09864).
 *
 * Threads: an sh_model and an sh_adapter are immutable after load and may be shared by any number
 * of threads; an sh_context (KV cache and scratch) belongs to one thread at a time.
 * Determinism: the same tokens through the same context size give the same bits, however they are
 * split into calls of sh_context_decode on one machine and kernel level.
 */
#ifndef SH_MODEL_MODEL_H
#define SH_MODEL_MODEL_H

#include "shared/base/hash.h"
#include "shared/math/pool.h"
#include "shared/model/gguf.h"
#include "shared/model/tokenizer.h"

#define SH_MODEL_LAYERS_MAX 256
#define SH_CONTEXT_MAX      32768

typedef struct {
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn, vocab, context;
    float rope_base, norm_eps;
    bool tied_output;
} sh_model_config;

/* A weight matrix W [out, in], quantized, in place in the map. */
typedef struct {
    sh_type type;
    uint32_t out, in;
    const void *data;
    const char *name; /* GGUF name without ".weight": "blk.0.attn_q" */
} sh_matrix;

enum {
    SH_ATTN_Q,
    SH_ATTN_K,
    SH_ATTN_V,
    SH_ATTN_OUTPUT,
    SH_FFN_GATE,
    SH_FFN_UP,
    SH_FFN_DOWN,
    SH_LAYER_MATRICES
};
/* "attn_q", ... as in GGUF names. */
extern const char *const sh_layer_matrix_names[SH_LAYER_MATRICES];

typedef struct {
    sh_matrix m[SH_LAYER_MATRICES];
    const float *attn_norm, *ffn_norm; /* [width], F32 */
} sh_layer;

typedef struct sh_model {
    sh_model_config config;
    sh_layer *layers;         /* [n_layers] */
    sh_matrix token_embd;     /* [vocab, width] */
    sh_matrix output;         /* the same matrix when tied */
    const float *output_norm; /* [width] */
    sh_tokenizer *tokenizer;
    sh_hash sha256; /* of the file */
    uint64_t file_bytes;
    sh_gguf *gguf; /* owned; keeps the map */
} sh_model;

/* SH_ERR_UNSUPPORTED names an unknown architecture, tensor type or tokenizer; SH_ERR_INVALID a
 * missing tensor, a wrong shape, a vocabulary without byte tokens. Non-F32 norms are refused. */
SH_MUST_USE sh_status sh_model_open(const char *path, sh_model **out, sh_error *err);
void sh_model_close(sh_model **model);

/* Scale and pair of one matrix: ΔW = scale * B·A. A [rank, in], B [out, rank], row-major. */
typedef struct {
    uint32_t rank, in, out;
    float *a, *b; /* NULL, NULL: this matrix is not adapted */
} sh_lora_pair;

typedef struct sh_adapter {
    uint32_t n_layers, rank; /* rank: the largest of the pairs */
    float alpha;             /* scale of a pair = alpha / its rank */
    sh_lora_pair *pairs;     /* [n_layers * SH_LAYER_MATRICES], owned with their values */
} sh_adapter;

SH_MUST_USE sh_status sh_adapter_create(const sh_model_config *config, uint32_t rank, float alpha,
                                        sh_adapter **out, sh_error *err); /* zeros, all seven */
/* llama.cpp's GGUF LoRA, from a file or bytes. SH_ERR_MISMATCH when shapes are not the model's. */
SH_MUST_USE sh_status sh_adapter_open(const char *path, const sh_model_config *config,
                                      sh_adapter **out, sh_error *err);
SH_MUST_USE sh_status sh_adapter_decode(const void *bytes, size_t n, const char *name,
                                        const sh_model_config *config, sh_adapter **out,
                                        sh_error *err);
SH_MUST_USE sh_status sh_adapter_encode(const sh_adapter *adapter, sh_buf *out, sh_error *err);
void sh_adapter_destroy(sh_adapter **adapter);

typedef struct sh_context sh_context;

typedef struct {
    uint32_t n_tokens_max; /* KV cache length; at most the model's context */
    uint32_t batch_max;    /* tokens a sh_context_decode call, 0: 128 */
} sh_context_options;

SH_MUST_USE sh_status sh_context_create(const sh_model *model, const sh_context_options *options,
                                        sh_context **out, sh_error *err);
void sh_context_destroy(sh_context **context);
/* Adapters applied beside the base from the next decode on; at most SH_ADAPTERS_MAX. Clears the
 * cache, also when the same ones are given again (their values may have changed), unless there are
 * none before and after. Borrowed until changed; B is copied: set again after changing values. */
#define SH_ADAPTERS_MAX 4
SH_MUST_USE sh_status sh_context_set_adapters(sh_context *context,
                                              const sh_adapter *const *adapters, size_t n,
                                              sh_error *err);
uint32_t sh_context_length(const sh_context *context);            /* tokens in the cache */
void sh_context_truncate(sh_context *context, uint32_t n_tokens); /* forget what is after */

enum { SH_LOGITS_NONE, SH_LOGITS_LAST, SH_LOGITS_ALL };
/* Runs n tokens at positions length .. length + n - 1 and appends them to the cache. With
 * SH_LOGITS_ALL logits is [n, vocab] (caller's), with LAST [vocab], with NONE NULL.
 * SH_ERR_LIMIT when the cache is full, SH_ERR_INVALID for a token outside the vocabulary. n may be
 * larger than batch_max. */
SH_MUST_USE sh_status sh_context_decode(sh_context *context, const int32_t *tokens, uint32_t n,
                                        int logits_wanted, float *logits, sh_error *err);

/* -ln softmax(logits)[token], accumulated in double. */
double sh_nll(const float *logits, uint32_t vocab, int32_t token);

/* Loss of a text under the windowed protocol of llama-perplexity when half is true (score the
 * second half of each chunk of n tokens), or of every predicted token when false. */
typedef struct {
    double nll_sum;
    uint64_t n_scored, n_tokens; /* predicted tokens; tokens in chunks */
} sh_loss;
SH_MUST_USE sh_status sh_model_loss(const sh_model *model, const sh_adapter *adapter,
                                    const int32_t *tokens, size_t n_tokens, uint32_t chunk,
                                    bool half, sh_loss *out, sh_error *err);
/* The same with the chunks shared among a pool's workers (NULL: none); equal for any number. With
 * half the first token of a chunk is replaced by BOS if the model adds it, and a last chunk that
 * is not full is dropped, as llama-perplexity does. */
typedef struct {
    const int32_t *tokens;
    size_t n_tokens;
    uint32_t chunk;
    bool half;
} sh_loss_text;
SH_MUST_USE sh_status sh_model_loss_pool(const sh_model *model, const sh_adapter *adapter,
                                         const sh_loss_text *text, sh_pool *pool, sh_loss *out,
                                         sh_error *err);

#endif
