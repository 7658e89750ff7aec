/*
 * Optimizers over a flat vector of parameters: AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101),
 * SGD with momentum (as torch.optim.SGD); clipping of the gradient's norm; a proximal term towards
 * where the training began (FedProx: Li et al. 2020, arXiv:1812.06127); frozen factors. Internal to
 * trainer/.
 *
 * Threads: one.
 */
#ifndef SH_TRAINER_OPTIMIZER_H
#define SH_TRAINER_OPTIMIZER_H

#include "trainer/kernels.h"
#include "trainer/network.h"

/* Moments as codes (kernels.h), and one block of them as floats while it is worked on. */
typedef struct {
    uint8_t *m, *v;           /* [n]; v NULL: SGD */
    float *m_scale, *v_scale; /* [n / TR_BLOCK, rounded up] */
    size_t block;             /* that is open; SIZE_MAX: none */
    float open_m[TR_BLOCK], open_v[TR_BLOCK];
} tr_coded;

typedef struct {
    const tr_net *net; /* borrowed */
    const sh_train_options *options;
    bool full;           /* params are the net's weights; else its LoRA vector */
    size_t n;            /* parameters */
    float *grad;         /* [n], the caller fills it before each step */
    float *m, *v;        /* [n], moments; v NULL: SGD */
    tr_coded *coded;     /* NULL: m and v are floats; else they are here */
    float *start;        /* [n]; NULL: no proximal term */
    uint32_t step;       /* updates made */
    uint32_t updates[2]; /* of them those of all that is trained, or of A; those of B alone */
    double norm;         /* of the last update's gradient, before clipping */
} tr_optimizer;

/* What an optimizer of n parameters holds, the gradient among it. */
uint64_t tr_optimizer_bytes(const sh_train_options *options, size_t n);
/* options and net are borrowed. On error there is nothing to release. */
SH_MUST_USE sh_status tr_optimizer_create(const tr_net *net, bool full,
                                          const sh_train_options *options, const float *params,
                                          tr_optimizer *out, sh_error *err);
void tr_optimizer_release(tr_optimizer *o);
/* One update. false: the gradient's norm is not finite, and nothing was changed. */
bool tr_optimizer_step(tr_optimizer *o, float *params);

/* The memory that moments lie in, of a constant size; returns how many areas there are. */
#define TR_MOMENT_AREAS 4
typedef struct {
    void *bytes;
    size_t n;
} tr_area;
size_t tr_optimizer_moments(const tr_optimizer *o, tr_area out[TR_MOMENT_AREAS]);

/* What is frozen at a step (from 0): in turns with `alternate`. */
sh_freeze tr_freeze(const sh_train_options *options, uint32_t step);
/* Learning rate of a step (from 0): linear warm-up, then the schedule's decay to lr * lr_final. */
double tr_learning_rate(const sh_train_options *options, uint32_t step);

#endif
