/*
 * Llama-family decoders: load from GGUF, forward pass with KV cache, run-time LoRA adapters.
 * RMSNorm, RoPE, grouped-query attention, SwiGLU, tied or untied output (llama: Touvron et al.
 * 2023, arXiv:2302.13971); biases of q, k and v (qwen2: arXiv:2407.10671); RMSNorm of each head's q
 * and k (qwen3: arXiv:2505.09388). RoPE: Su et al. 2021 (arXiv:2104.09864), its pairs adjacent
 * (llama) or a half head apart (qwen2, qwen3), its scaling linear, by factors (Llama 3's
 * rope_freqs) or YaRN (Peng et al. 2023, arXiv:2309.00071).
 *
 * Threads: an sh_model (after sh_model_pack) and an sh_adapter are immutable after load and may be
 * shared by any number of threads; an sh_context (KV cache) and an sh_runner (scratch, threads)
 * belong to one thread at a time.
 * Determinism: the same tokens through a context of the same cache type give the same bits on one
 * machine and kernel level, however they are split into calls, whatever other sequences run beside
 * them, on any number of threads, with the weights packed or not.
 */
#ifndef SH_MODEL_MODEL_H
#define SH_MODEL_MODEL_H

#include "shared/base/hash.h"
#include "shared/math/pool.h"
#include "shared/math/product.h"
#include "shared/math/team.h"
#include "shared/model/gguf.h"
#include "shared/model/tokenizer.h"

#define SH_MODEL_LAYERS_MAX 256
#define SH_CONTEXT_MAX      32768

typedef enum { SH_ARCH_LLAMA, SH_ARCH_QWEN2, SH_ARCH_QWEN3 } sh_arch;
const char *sh_arch_name(sh_arch arch); /* "llama", as general.architecture has it */
bool sh_arch_rope_halves(sh_arch arch); /* sh_model_config's, of any model of it */
typedef enum { SH_ROPE_PLAIN, SH_ROPE_LINEAR, SH_ROPE_YARN } sh_rope_scaling;

typedef struct {
    sh_arch arch;
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn, vocab, context;
    float rope_base, norm_eps;
    bool tied_output;
    sh_rope_scaling rope_scaling;
    bool rope_halves; /* pairs (j, j + head_size / 2); else (2j, 2j + 1) */
} sh_model_config;

/* The keys of a shape in a file that is written: general.architecture, "llama.block_count" and so
 * on. RoPE's scaling is not among them. */
SH_MUST_USE sh_status sh_model_config_write(const sh_model_config *config, sh_gguf_writer *w,
                                            sh_error *err);

/* A weight matrix W [out, in], quantized, in place in the map. */
typedef struct {
    sh_type type;
    uint32_t out, in;
    const void *data;
    const char *name;   /* GGUF name without ".weight": "blk.0.attn_q" */
    const void *packed; /* math/pack.h; NULL before sh_model_pack */
} sh_matrix;
static inline sh_weights sh_matrix_weights(const sh_matrix *m)
{
    return (sh_weights){
        .type = m->type, .out = m->out, .in = m->in, .rows = m->data, .packed = m->packed};
}
/* values[in] of one row, from whichever form is there. */
void sh_matrix_row(const sh_matrix *m, uint32_t row, float *values);

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
    const float *attn_norm, *ffn_norm;    /* [width], F32 */
    const float *bias[SH_LAYER_MATRICES]; /* [out], F32; NULL: none (all but qwen2's q, k, v) */
    const float *q_norm, *k_norm;         /* [head_size], F32; NULL: none (all but qwen3) */
} sh_layer;

typedef struct sh_model {
    sh_model_config config;
    sh_layer *layers;         /* [n_layers] */
    sh_matrix token_embd;     /* [vocab, width] */
    sh_matrix output;         /* the same matrix when tied */
    const float *output_norm; /* [width] */
    /* Angle of pair j at position p: p * rope_frequency[j] [head_size / 2], base, scaling and
     * factors in it; cos and sin are multiplied with rope_magnitude (1 but for YaRN). */
    double *rope_frequency;
    float rope_magnitude;
    bool rope_factors; /* the file has rope_freqs */
    sh_tokenizer *tokenizer;
    uint64_t file_bytes;
    sh_gguf *gguf;          /* owned; keeps the map */
    struct sh_packed *pack; /* owned; NULL before sh_model_pack */
} sh_model;

/* SH_ERR_UNSUPPORTED names an unknown architecture, tensor type or tokenizer; SH_ERR_INVALID a
 * missing tensor, a wrong shape, a vocabulary without byte tokens. Non-F32 norms are refused. */
SH_MUST_USE sh_status sh_model_open(const char *path, sh_model **out, sh_error *err);
void sh_model_close(sh_model **model);
/* SHA-256 of the file's bytes, as they are in the map; it takes time (about 2 s a gigabyte). */
sh_hash sh_model_hash(const sh_model *model);

/* Packs the matrices for speed (math/pack.h); results stay the same bits. To be called once, after
 * open, before the model is shared. The rows' pages are given back, so that one copy of the weights
 * is in memory. With `cache` the packed form is mapped from that file when it was made from this
 * model file (its size, time of change, header and the layout's version are compared), else made
 * and written there for the next time; a cache that cannot be written is no error: *cached says
 * whether the packed form is mapped from a file. */
#define SH_PACK_SUFFIX ".packed" /* of a cache beside its model: what programs use */
typedef struct {
    const char *cache; /* NULL: memory */
    sh_team *team;     /* NULL: the caller alone */
} sh_pack_options;
SH_MUST_USE sh_status sh_model_pack(sh_model *model, const sh_pack_options *options, bool *cached,
                                    sh_error *err);

/* Scale and pair of one matrix: ΔW = scale * B·A. A [rank, in], B [out, rank], row-major. */
typedef struct {
    uint32_t rank, in, out;
    float *a, *b; /* NULL, NULL: this matrix is not adapted */
} sh_lora_pair;

/* The pairs of an adapter, by index: layer * SH_LAYER_MATRICES + SH_ATTN_Q.., and after those of
 * the layers the output matrix's, which is adapted only where it is not tied to the embedding. */
static inline size_t sh_lora_output_pair(uint32_t n_layers)
{
    return (size_t)n_layers * SH_LAYER_MATRICES;
}
static inline size_t sh_lora_pair_count(uint32_t n_layers)
{
    return sh_lora_output_pair(n_layers) + 1;
}
/* "blk.0.attn_q", "output", as in sh_matrix. */
void sh_lora_pair_name(uint32_t n_layers, size_t pair, char out[SH_GGUF_NAME_MAX]);
const sh_matrix *sh_lora_pair_matrix(const sh_model *model, size_t pair);

#define SH_ADAPTER_RANK_MAX 4096

typedef struct sh_adapter {
    sh_arch arch;            /* of the base */
    uint32_t n_layers, rank; /* rank: the largest of the pairs */
    float alpha;             /* scale of a pair = alpha / its rank */
    sh_lora_pair *pairs;     /* [sh_lora_pair_count], owned with their values */
    sh_hash base;            /* SHA-256 of the file that it was trained on; zeros: not known */
} sh_adapter;

SH_MUST_USE sh_status sh_adapter_create(const sh_model_config *config, uint32_t rank, float alpha,
                                        sh_adapter **out, sh_error *err); /* zeros, all seven
                                                                             of each layer */
/* The same without any factors: pairs have their in and out, rank 0. */
SH_MUST_USE sh_status sh_adapter_create_empty(const sh_model_config *config, float alpha,
                                              sh_adapter **out, sh_error *err);
/* A pair of zeros for the output matrix, too. SH_ERR_UNSUPPORTED: it is tied to the embedding;
 * SH_ERR_INVALID: it is adapted already. */
SH_MUST_USE sh_status sh_adapter_add_output(sh_adapter *adapter, const sh_model_config *config,
                                            uint32_t rank, sh_error *err);
/* SH_ERR_MISMATCH: it changes the output matrix, and the model's is tied to the embedding. */
SH_MUST_USE sh_status sh_adapter_check_output(const sh_adapter *adapter,
                                              const sh_model_config *config, sh_error *err);
/* SH_ERR_MISMATCH: it says which base it is of, and the model's file is another. name for errors.
 * Reads the model's file through if the adapter says so. */
SH_MUST_USE sh_status sh_adapter_check_base(const sh_adapter *adapter, const sh_model *model,
                                            const char *name, sh_error *err);
/* llama.cpp's GGUF LoRA, from a file or bytes. SH_ERR_MISMATCH when shapes are not the model's. */
SH_MUST_USE sh_status sh_adapter_open(const char *path, const sh_model_config *config,
                                      sh_adapter **out, sh_error *err);
SH_MUST_USE sh_status sh_adapter_decode(const void *bytes, size_t n, const char *name,
                                        const sh_model_config *config, sh_adapter **out,
                                        sh_error *err);
SH_MUST_USE sh_status sh_adapter_encode(const sh_adapter *adapter, sh_buf *out, sh_error *err);
void sh_adapter_destroy(sh_adapter **adapter);

typedef struct sh_context sh_context;
typedef struct sh_runner sh_runner;

typedef enum { SH_KV_F32, SH_KV_F16 } sh_kv_type;

typedef struct {
    uint32_t n_tokens_max; /* KV cache length; at most the model's context */
    uint32_t batch_max;    /* rows of its own runner, 0: 128; not with `runner` */
    sh_kv_type kv;
    sh_runner *runner; /* borrowed, of the same model; NULL: its own, of one thread */
} sh_context_options;

SH_MUST_USE sh_status sh_context_create(const sh_model *model, const sh_context_options *options,
                                        sh_context **out, sh_error *err);
void sh_context_destroy(sh_context **context);
/* Bytes that a context of these options takes, cache and all; for limits before it is made. */
size_t sh_context_bytes(const sh_model *model, const sh_context_options *options);
/* Adapters applied beside the base from the next decode on; at most SH_ADAPTERS_MAX, each with a
 * scale on top of its own (NULL: 1). Clears the cache, also when the same ones are given again
 * (their values may have changed), unless there are none before and after. Their values are copied
 * in the form that the kernels use (halves; floats where the base is F32). */
#define SH_ADAPTERS_MAX 4
SH_MUST_USE sh_status sh_context_set_adapters(sh_context *context,
                                              const sh_adapter *const *adapters,
                                              const float *scales, size_t n, sh_error *err);
uint32_t sh_context_length(const sh_context *context);            /* tokens in the cache */
void sh_context_truncate(sh_context *context, uint32_t n_tokens); /* forget what is after */
/* Instead of what it holds, the first n tokens of another context of the same model and cache type,
 * which is not run meanwhile. SH_ERR_LIMIT: more than either holds; SH_ERR_MISMATCH: one has
 * adapters. */
SH_MUST_USE sh_status sh_context_copy_prefix(sh_context *context, const sh_context *from,
                                             uint32_t n, sh_error *err);

/* SOME: of a runner's items only. */
enum { SH_LOGITS_NONE, SH_LOGITS_LAST, SH_LOGITS_ALL, SH_LOGITS_SOME };
/* Runs n tokens at positions length .. length + n - 1 and appends them to the cache. With
 * SH_LOGITS_ALL logits is [n, vocab] (caller's), with LAST [vocab], with NONE NULL.
 * SH_ERR_LIMIT when the cache is full, SH_ERR_INVALID for a token outside the vocabulary. n may be
 * larger than batch_max. */
SH_MUST_USE sh_status sh_context_decode(sh_context *context, const int32_t *tokens, uint32_t n,
                                        int logits_wanted, float *logits, sh_error *err);

/* Scratch and threads of forward passes over one model: one pass over the weights serves the rows
 * of several contexts (continuous batching: Yu et al. 2022, "Orca"). */
typedef struct {
    uint32_t rows_max; /* of one pass, 0: 128; more tokens take several passes */
    sh_team *team;     /* borrowed; NULL: the caller alone */
} sh_runner_options;
SH_MUST_USE sh_status sh_runner_create(const sh_model *model, const sh_runner_options *options,
                                       sh_runner **out, sh_error *err);
void sh_runner_destroy(sh_runner **runner); /* after its contexts */
typedef struct {
    sh_context *context; /* each at most once in a call; of the runner's model, any runner's */
    const int32_t *tokens;
    uint32_t n;
    int logits_wanted;
    float *logits;     /* as in sh_context_decode; with SH_LOGITS_SOME those of the tokens of */
    const bool *wants; /* which it is set [n], one after another */
    float *hidden;     /* NULL, or [n, width]: what the output matrix would see of every token */
} sh_run_item;
/* The errors of sh_context_decode, before anything was run. */
SH_MUST_USE sh_status sh_runner_run(sh_runner *runner, const sh_run_item *items, size_t n,
                                    sh_error *err);

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
    const sh_adapter *const *adapters; /* [n_adapters], with scales as sh_context_set_adapters */
    const float *scales;
    size_t n_adapters;
} sh_loss_text;
SH_MUST_USE sh_status sh_model_loss_pool(const sh_model *model, const sh_loss_text *text,
                                         sh_pool *pool, sh_loss *out, sh_error *err);

#endif
