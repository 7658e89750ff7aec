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

#include "trainer/network.h"

typedef struct {
    const tr_net *net; /* borrowed */
    const sh_train_options *options;
    bool full;            /* params are the net's weights; else its LoRA vector */
    size_t n;             /* parameters */
    float *grad;          /* [n], the caller fills it before each step */
    float *m, *v, *start; /* [n]; moments; v NULL: SGD; start NULL: no proximal term */
    uint32_t step;        /* updates made */
} tr_optimizer;

/* Floats that an optimizer holds, the gradient among them. */
size_t tr_optimizer_floats(const sh_train_options *options, size_t n);
/* options and net are borrowed. On error there is nothing to release. */
SH_MUST_USE sh_status tr_optimizer_create(const tr_net *net, bool full,
                                          const sh_train_options *options, const float *params,
                                          tr_optimizer *out, sh_error *err);
void tr_optimizer_release(tr_optimizer *o);
/* One update. false: the gradient's norm is not finite, and nothing was changed. */
bool tr_optimizer_step(tr_optimizer *o, float *params);

/* Learning rate of a step (from 0): linear warm-up, then the schedule's decay to lr * lr_final. */
double tr_learning_rate(const sh_train_options *options, uint32_t step);

#endif
