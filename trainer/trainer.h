/*
 * Training: LoRA on a frozen, quantized base, and full training of small models. Backward pass by
 * hand; GEMMs in OpenBLAS (one thread a caller); loss is token cross-entropy over masked-in
 * targets. LoRA: Hu et al. 2021 (arXiv:2106.09685); AdamW: Loshchilov & Hutter 2019
 * (arXiv:1711.05101).
 *
 *     SH_GOTO(sh_model_open("base.gguf", &model, &err));
 *     SH_GOTO(sh_lora_initialize(&model->config, 1, 8, 16, &adapter, &err));
 *     sh_train_options options = {.lr = 1e-3f, .batch = 8, .steps = 200, .clip = 1,
 *                                 .shuffle_seed = 1, .threads = 4};
 *     SH_GOTO(sh_lora_train(model, adapter, &data, &options, &result, &err));
 *     SH_GOTO(sh_adapter_encode(adapter, &gguf, &err));
 *
 * Data comes from texts and conversations by trainer/dataset.h, or is the caller's own tokens. Of a
 * zeroed sh_train_options only lr, batch and steps have to be set; what is 0 or NULL is off.
 *
 * Errors of all that trains or evaluates: SH_ERR_INVALID: options, data or adapter are not what
 * they must be, or a loss or gradient is not finite (with the tensor and the step).
 * SH_ERR_MISMATCH: an adapter, a teacher or a checkpoint of another model or training.
 * SH_ERR_LIMIT: sequences longer than the model's context, or memory_max, with how much is missing.
 * SH_ERR_CANCELLED: by progress. SH_ERR_NO_MEMORY, SH_ERR_IO. err says what, where and what to do;
 * it may be NULL.
 *
 * Deterministic: same data, options and BLAS core give the same bytes, for any `threads` (the
 * batch is cut into micro-batches that do not depend on it; their gradients are added in order). A
 * memory_max so small that the plan gives way (sh_tile_plan) makes other sums, and by then threads
 * count: only a resumed training keeps its plan under any limit.
 * Threads: independent trainings may run at once. No globals, no exit, no printing.
 */
#ifndef SH_TRAINER_H
#define SH_TRAINER_H

#include "shared/base/failpoint.h"
#include "shared/base/rng.h"
#include "shared/model/model.h"

#define SH_LORA_RANK_MAX           1024
#define SH_DISTILL_TEMPERATURE_MIN 0.01f /* of distillation */
#define SH_DISTILL_TEMPERATURE_MAX 100.0f

/* Bits of a mask. */
enum {
    SH_TRAIN_TARGET = 1, /* its likelihood is learnt */
    SH_TRAIN_BEGINS = 2  /* a document begins here: it and what follows sees nothing before it */
};
/* Sequences of one length T + 1: inputs [0, T), targets [1, T]. tokens and mask are [n, length],
 * length = T + 1, row-major. mask NULL: every token is a target, of one document. */
typedef struct {
    const int32_t *tokens;
    const uint8_t *mask; /* SH_TRAIN_ bits */
    size_t n;
    uint32_t length;
} sh_train_data;

typedef enum { SH_SCHEDULE_LINEAR, SH_SCHEDULE_COSINE, SH_SCHEDULE_CONSTANT } sh_schedule;
typedef enum { SH_ADAMW, SH_SGD } sh_optimizer;
/* Of LoRA: A frozen is FFA-LoRA (Sun et al. 2024, arXiv:2403.12313); one and the other in turns, a
 * round each, RoLoRA (Chen et al. 2024, arXiv:2409.02346). */
typedef enum { SH_FREEZE_NONE, SH_FREEZE_A, SH_FREEZE_B } sh_freeze;

/* Of a step that was made. */
typedef struct {
    uint32_t step, steps; /* from 1; of how many */
    double loss;          /* mean over the step's targets, before its update */
    double heldout_loss;  /* after it; NaN: not measured at this step */
    double lr, grad_norm; /* of the update; the norm before it is clipped */
    uint64_t tokens_seen; /* target tokens since the training began */
    double seconds;       /* since then, those before a resume too */
} sh_train_progress;

/* A file that a training can go on from, with the bytes of one that was not interrupted. It is
 * written at a step's end and replaced as a whole, with mode 0600, and stays when the training is
 * done. If it cannot be written, the training ends with that error, and the file before is whole.
 * (A program ignores SIGXFSZ, or a limit of file sizes kills it.) */
typedef struct {
    const char *path;
    double every_s; /* between two, of wall time; 0: after each step; INFINITY: only when progress
                       cancels, as with any other */
    bool resume;    /* go on from the file, if it is there. SH_ERR_MISMATCH: it is of other options,
                       data, shapes, parameters at the start, or another identity, and which */
    sh_hash identity;          /* of what the library cannot see: the files of base and teacher */
    sh_failpoints *failpoints; /* borrowed, NULL: none. One that is hit ends the training with
                                  SH_ERR_CRASHED and leaves files as a crash would */
} sh_train_checkpoint;

/* What changes the result is compared when a training goes on from a checkpoint (checkpoint.c). */
typedef struct {
    /* The optimizer, and its steps. */
    sh_optimizer optimizer;
    float lr, beta1, beta2, eps, weight_decay; /* 0 for betas, eps: 0.9, 0.999, 1e-8 */
    float momentum;                            /* of SGD */
    uint32_t steps;
    uint32_t warmup;      /* steps of linear warm-up */
    sh_schedule schedule; /* how the learning rate goes from lr to lr * lr_final over the steps */
    float lr_final;
    float clip;     /* global gradient norm; 0: none */
    float proximal; /* weight of half the squared distance to the start (FedProx); 0: none */
    /* The optimizer's moments in blocks of 8-bit numbers, a quarter of their memory (Dettmers et
     * al. 2022, arXiv:2110.02861). */
    bool state_8bit;

    /* The data of a step. */
    uint32_t batch; /* sequences, at most all there are; the data is gone through pass after pass */
    /* Batches whose gradients make one step, that of the mean over all their targets; 0: 1. It
     * takes the memory of one batch and of one more gradient. */
    uint32_t accumulate;
    uint64_t shuffle_seed; /* of each pass's order; 0: the order of the data */

    /* LoRA (full training refuses them): a pair's scale while it is trained is its alpha / rank, or
     * with rslora alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). The adapter keeps its
     * own alpha: what its scale differs by is folded into B when it is taken up and given back. */
    bool rslora;
    float alphas[SH_LAYER_MATRICES]; /* of a matrix, by SH_ATTN_Q..; 0: the adapter's, which that
                                        of the output matrix is always */
    /* The share of A's inputs that a step forgets, the others times 1 / (1 - dropout); in [0, 1),
     * to the nearest 2^-16. Matrices that read the same input share its mask (PEFT draws one for
     * each). A mask hangs on dropout_seed, the step, the sequence's place in the step's batches,
     * layer, input and position alone. */
    float dropout;
    uint64_t dropout_seed;
    sh_freeze freeze;
    /* RoLoRA in one training: steps after which the frozen factor changes, beginning with freeze
     * (SH_FREEZE_A when none); 0: never. */
    uint32_t alternate;

    /* Distillation (Hinton et al. 2015, arXiv:1503.02531): the loss of a target is
     * (1 - w) cross-entropy + w T^2 KL(teacher's || student's probabilities at temperature T). */
    const sh_model *teacher; /* borrowed, frozen; NULL: none. Of the student's vocabulary (sizes and
                                strings are compared, else SH_ERR_MISMATCH); any architecture */
    float distill_weight;    /* w in [0, 1]; above 0 it needs a teacher */
    float temperature; /* T in [SH_DISTILL_TEMPERATURE_MIN, SH_DISTILL_TEMPERATURE_MAX]; 0: 1 */

    /* Numbers in the passes. quantize_aware is SH_TYPE_Q8_0 or SH_TYPE_Q4_0: the forward pass sees
     * every matrix (not the teacher's) as it will be after quantization to this type (with LoRA:
     * Q(W + s B A), as it is merged), and gradients pass through the rounding as if it were not
     * there: the straight-through estimator, Bengio et al. 2013 (arXiv:1308.3432), of weights as in
     * LLM-QAT (Liu et al. 2023, arXiv:2305.17888). SH_TYPE_F32 (0): off. SH_ERR_INVALID names a
     * matrix whose rows are not whole blocks; not together with dropout. */
    sh_type quantize_aware;
    bool bf16; /* products with the weights round their operands (math/bf16.h) */

    /* Every heldout_every steps, and after the last, the mean loss of heldout is measured
     * (borrowed; 0: never), without dropout and teacher. patience: after so many measurements
     * without a new best the training stops, and the parameters of the best one are what remains,
     * however it ends well; 0: it goes on to the end, and the last ones remain. patience takes the
     * memory of one more vector of parameters. */
    const sh_train_data *heldout;
    uint32_t heldout_every;
    uint32_t patience;

    /* What the training may take; another value may be given when it is resumed. */
    unsigned threads;    /* 0: 1 */
    uint64_t memory_max; /* bytes that the training may allocate: weights in F32, adapter,
                            optimizer, activations. Files are not counted, nor data and adapter of
                            the caller, nor what OpenBLAS takes. 0: no limit */

    /* Where SH_ERR_LIMIT leaves the least memory_max that will do, when that is what it is of;
     * NULL: nowhere. */
    uint64_t *memory_least;

    const sh_train_checkpoint *checkpoint; /* borrowed; NULL: none */
    /* Called after each step; a false return cancels (SH_ERR_CANCELLED). May be NULL. */
    bool (*progress)(void *arg, const sh_train_progress *p);
    void *progress_arg;
} sh_train_options;

/* How the batches were worked on. Results are the same bits for any number of threads and kept
 * layers; other numbers of sequences and of logits at a time add in another order (losses agree to
 * 1e-6). */
typedef struct {
    unsigned threads;         /* that worked at once, each on a micro-batch */
    uint32_t micro_sequences; /* sequences of a micro-batch */
    uint32_t kept_layers;     /* the others ran twice (gradient checkpointing) */
    uint32_t logit_rows;      /* positions whose logits were held at a time */
    uint64_t bytes;           /* of activations and of the workers' gradients */
} sh_tile_plan;

typedef struct {
    sh_tile_plan plan;
    double loss_first, loss_last; /* mean over a step's targets, before its update */
    /* What loss_last is made of, unweighted means over its targets; KL in nats at the temperature,
     * 0 without a teacher. */
    double cross_entropy_last, kl_last;
    uint64_t tokens_seen;              /* target tokens */
    double seconds;                    /* of wall time, those before a resume too */
    uint32_t steps;                    /* made; fewer than asked for when it was stopped early */
    double heldout_best, heldout_last; /* NaN: never measured */
    uint32_t heldout_best_step;        /* 0: never measured */
    uint32_t resumed_step;             /* steps that came from a checkpoint */
} sh_train_result;

/* The adapter of a plan before training: A0 from a_seed, B = 0, all seven matrices. */
SH_MUST_USE sh_status sh_lora_initialize(const sh_model_config *config, uint64_t a_seed,
                                         uint32_t rank, float alpha, sh_adapter **out,
                                         sh_error *err);
/* The same with a rank for each matrix (by SH_ATTN_Q..; 0: not adapted). A0 of a matrix depends on
 * a_seed, layer and matrix; its first rows are those of a smaller rank. */
SH_MUST_USE sh_status sh_lora_initialize_ranks(const sh_model_config *config, uint64_t a_seed,
                                               const uint32_t ranks[SH_LAYER_MATRICES], float alpha,
                                               sh_adapter **out, sh_error *err);
/* A pair for the output matrix of that rank beside those that there are, as sh_lora_initialize
 * makes them. SH_ERR_UNSUPPORTED: the output is tied to the embedding. */
SH_MUST_USE sh_status sh_lora_add_output(sh_adapter *adapter, const sh_model_config *config,
                                         uint64_t a_seed, uint32_t rank, sh_error *err);
/* Trains adapter in place; on error it is as before. base of any readable type. */
SH_MUST_USE sh_status sh_lora_train(const sh_model *base, sh_adapter *adapter,
                                    const sh_train_data *data, const sh_train_options *options,
                                    sh_train_result *result, sh_error *err);
typedef struct {
    unsigned threads;    /* 0: 1 */
    uint64_t memory_max; /* as in sh_train_options; of a sh_full without its weights */
    /* The loss of what would be written in this type: Q(W), with an adapter Q(W + scale B A).
     * SH_TYPE_F32: of the weights as they are. Errors as in sh_train_options. */
    sh_type quantize_aware;
} sh_train_limits;
/* Mean NLL over the targets of data by the trainer's forward pass. adapter and limits may be NULL.
 */
SH_MUST_USE sh_status sh_train_evaluate(const sh_model *base, const sh_adapter *adapter,
                                        const sh_train_data *data, const sh_train_limits *limits,
                                        double *mean_nll, sh_error *err);

/* One batch's loss and gradients, for tests and for optimizers of the caller's own:
 * grad has the adapter's shapes, and is overwritten. */
SH_MUST_USE sh_status sh_lora_gradient(const sh_model *base, const sh_adapter *adapter,
                                       const sh_train_data *data, sh_adapter *grad, double *loss,
                                       sh_error *err);

/* ---- full training: every weight, in F32 ---- */
/* Weights and gradients of one model; sh_full_train begins with a fresh optimizer, and what it has
 * trained stays when it fails or is cancelled. sh_full_save may be called from its progress. */
typedef struct sh_full sh_full;
/* From a model (weights dequantized to F32; it must outlive the sh_full, which saves its keys) or
 * at random from a shape (normal, std 0.02, output projections scaled by 1/sqrt(2 * layers)) with
 * the tokenizer and keys of vocab_gguf. */
SH_MUST_USE sh_status sh_full_from_model(const sh_model *model, sh_full **out, sh_error *err);
SH_MUST_USE sh_status sh_full_random(const sh_model_config *config, const char *vocab_gguf,
                                     uint64_t seed, sh_full **out, sh_error *err);
void sh_full_destroy(sh_full **full);
SH_MUST_USE sh_status sh_full_gradient(sh_full *full, const sh_train_data *data, double *loss,
                                       sh_error *err);
/* Gradient of a tensor by the last sh_full_gradient: "blk.0.attn_q.weight"; NULL when it is unknown
 * or there was none. */
const float *sh_full_grad(const sh_full *full, const char *tensor, size_t *n);
SH_MUST_USE sh_status sh_full_train(sh_full *full, const sh_train_data *data,
                                    const sh_train_options *options, sh_train_result *result,
                                    sh_error *err);
/* limits may be NULL. */
SH_MUST_USE sh_status sh_full_evaluate(const sh_full *full, const sh_train_data *data,
                                       const sh_train_limits *limits, double *mean_nll,
                                       sh_error *err);
/* Whether it can be saved so, to be asked before hours of training. SH_ERR_UNSUPPORTED: the type
 * cannot be written; SH_ERR_INVALID names a matrix whose rows are not whole blocks of it. */
SH_MUST_USE sh_status sh_full_check_save(const sh_full *full, sh_type type, sh_error *err);
/* Writes GGUF with matrices of `type` and F32 norms. */
SH_MUST_USE sh_status sh_full_save(const sh_full *full, sh_type type, const char *path,
                                   sh_error *err);

#endif
