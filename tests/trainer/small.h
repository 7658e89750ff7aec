/*
 * Small models made in memory, without a file, and a plain double-precision forward pass to hold
 * gradients against: written for clarity, it shares no code with the trainer.
 */
#ifndef SH_TESTS_TRAINER_SMALL_H
#define SH_TESTS_TRAINER_SMALL_H

#include "trainer/trainer.h"

/* The weights are F32 and random; `type` other than F32 quantizes the matrices. Sizes that are no
 * multiple of 16 try the ends of the vectorised loops. */
sh_model *small_model(const sh_model_config *config, sh_type type, uint64_t seed);
void small_model_free(sh_model **model);
/* Dimensions of 12 to 20 with two layers; tied or not. */
sh_model_config small_config(bool tied);
/* The same with biases of q, k, v (qwen2) or norms of heads (qwen3), RoPE's pairs a half apart and
 * its angles scaled. */
sh_model_config small_config_of(sh_arch arch);
/* Random A and B in all pairs. Pair i has rank ranks[i % n_ranks]; rank 0 leaves it out. */
sh_adapter *small_adapter(const sh_model_config *config, const uint32_t *ranks, size_t n_ranks,
                          uint64_t seed);
/* Adapters of one shape with the same bits. */
bool same_adapter(const sh_adapter *x, const sh_adapter *y);
/* sh_lora_train with every allocation in turn failing, until it ends well: each failure must be
 * SH_ERR_NO_MEMORY and leave the adapter as it was. Returns how many allocations that took. */
size_t small_train_without_memory(const sh_model *base, sh_adapter *adapter,
                                  const sh_train_data *data, const sh_train_options *options);
/* n random sequences of `length` tokens; with masked, about half of them are targets. Free with
 * small_data_free. */
sh_train_data small_data(const sh_model_config *config, size_t n, uint32_t length, bool masked,
                         uint64_t seed);
void small_data_free(sh_train_data *data);

/* An adapter in double. */
typedef struct {
    const sh_adapter *shape;
    double *const *a, *const *b; /* of pair i; NULL: not adapted */
    const double *scales;        /* of pair i */
    /* What the input of A is multiplied with; NULL: nothing. */
    const float *(*mask)(const void *arg, size_t pair, size_t sequence, size_t position);
    const void *mask_arg;
} reference_lora;

/* All weights in double; tensors in the order of names. */
typedef struct {
    sh_model_config config;
    double *token_embd, *output, *output_norm; /* output == token_embd when tied */
    struct {
        double *attn_norm, *ffn_norm, *m[SH_LAYER_MATRICES];
        double *bias[3], *head_norm[2]; /* of q, k, v; of q and k; NULL: none */
    } layers[8];
    double frequency[64], magnitude; /* of RoPE */
    const reference_lora *beside;    /* NULL: none */
    struct {
        char name[64];
        double *values;
        size_t n;
    } tensors[96];
    size_t n_tensors;
    double *block;
} reference;

void reference_init(reference *r, const sh_model *model);
/* Adds scale * B·A to the weights, or with a mask keeps it beside them (borrowed). */
void reference_adapt(reference *r, const reference_lora *lora);
/* Mean loss over the targets. */
double reference_loss(const reference *r, const sh_train_data *data);
/* The mean of (1 - weight) * cross-entropy + weight * T^2 * KL(teacher's || r's probabilities). */
typedef struct {
    const reference *teacher; /* NULL: cross-entropy alone */
    double weight, temperature;
} reference_mixture;
double reference_mixed_loss(const reference *r, const reference_mixture *mixture,
                            const sh_train_data *data);
void reference_release(reference *r);

#endif
