/*
 * Gradients of whole batches, and the training loop that LoRA and full training share. Internal
 * to trainer/.
 *
 * A batch is cut into micro-batches; workers take them in waves and their gradients are added in
 * micro-batch order, so the sum does not depend on the number of workers. How large a micro-batch
 * is, and what of it is kept, is the plan (sh_tile_plan), which depends on the sequence length,
 * the batch and the memory that there is.
 */
#ifndef SH_TRAINER_TRAIN_H
#define SH_TRAINER_TRAIN_H

#include "trainer/network.h"

#define TR_MICRO_ROWS   256 /* positions of a micro-batch, or one sequence if that is longer */
#define TR_LOGIT_FLOATS (16u << 20) /* logits of a micro-batch that are held at a time */
#define TR_LOGIT_ROWS   16          /* at least, if memory is short; the product is slow then */
#define TR_THREADS_MAX  256

typedef enum { TR_LOSS_ONLY, TR_GRAD_LORA, TR_GRAD_FULL } tr_mode;

typedef struct tr_batcher tr_batcher;

typedef struct {
    const tr_net *net;         /* borrowed */
    const sh_train_data *data; /* borrowed */
    tr_mode mode;
    size_t batch; /* sequences a call of tr_batcher_run, at most */
    unsigned threads;
    uint64_t memory_max; /* bytes for what the batcher allocates; 0: no limit */
    tr_teacher teacher;
    /* Borrowed for the call: sums are made as in this plan, whatever the limit; NULL: as it allows
     */
    const sh_tile_plan *like;
} tr_batcher_options;
/* The least memory_max that will do. */
uint64_t tr_batcher_bytes_least(const tr_batcher_options *options);
/* SH_ERR_LIMIT: memory_max is too small, with what it would have to be. */
SH_MUST_USE sh_status tr_batcher_create(const tr_batcher_options *options, tr_batcher **out,
                                        sh_error *err);
void tr_batcher_destroy(tr_batcher **batcher);
sh_tile_plan tr_batcher_plan(const tr_batcher *batcher);
typedef struct {
    double loss_sum;
    uint64_t n_targets;
    double cross_entropy_sum, kl_sum; /* what loss_sum is made of; kl_sum 0: no teacher */
} tr_batch_loss;
/* Loss of sequences index[0, n), and in grad (NULL when TR_LOSS_ONLY) the gradient of its mean. */
tr_batch_loss tr_batcher_run(tr_batcher *batcher, const uint32_t *index, size_t n, float *grad);

/* SH_ERR_INVALID: empty, a token outside the vocabulary, no target at all; SH_ERR_LIMIT: longer
 * than the model's context. */
SH_MUST_USE sh_status tr_data_check(const sh_model_config *config, const sh_train_data *data,
                                    sh_error *err);

/* What of a base may be copied to F32 (tr_net_create) under a limit of memory. */
static inline uint64_t tr_copy_bytes(uint64_t memory_max)
{
    return memory_max == 0 ? TR_COPY_BYTES : SH_MIN(TR_COPY_BYTES, memory_max / 4);
}

/* distill.c: the teacher of options, frozen, its net the caller's to destroy; net NULL: none.
 * SH_ERR_MISMATCH: its vocabulary is not the student's, of config and, unless NULL, the file's
 * keys. SH_ERR_LIMIT: its context is shorter than data's sequences. */
SH_MUST_USE sh_status tr_teacher_open(const sh_train_options *options,
                                      const sh_model_config *student, const sh_gguf *keys,
                                      const sh_train_data *data, tr_net **net, sh_error *err);
/* With the weight and temperature of options. */
static inline tr_teacher tr_teacher_of(const tr_net *net, const sh_train_options *options)
{
    return (tr_teacher){net, options->distill_weight,
                        options->temperature > 0 ? options->temperature : 1.0f};
}

/* Mean loss over all of data; net as it stands. */
SH_MUST_USE sh_status tr_evaluate(const tr_net *net, const sh_train_data *data,
                                  const sh_train_limits *limits, double *mean_nll, sh_error *err);
/* Loss and gradient of all of data as one batch. */
SH_MUST_USE sh_status tr_gradient(const tr_net *net, const sh_train_data *data, tr_mode mode,
                                  float *grad, double *loss, sh_error *err);
/* The loop: params are the flat LoRA vector or net's own weights, and hold the result of the last
 * step also on error. */
typedef struct {
    tr_net *net;
    float *params;
    tr_mode mode;
    tr_teacher teacher;
} tr_trainee;
SH_MUST_USE sh_status tr_train(const tr_trainee *trainee, const sh_train_data *data,
                               const sh_train_options *options, sh_train_result *result,
                               sh_error *err);

#endif
