/*
 * Checkpoints of a training: all that makes a continued training give the bytes of one that was not
 * interrupted. Internal to trainer/.
 *
 * A file names what it belongs to: the options that change a result, one by one, and hashes of the
 * data, of the held-out data, of the shapes, of what the caller names (the base) and of the
 * parameters that the training began with. What differs is refused by its name.
 * Files are written section by section from where the state lies, so that they take no memory.
 *
 * Threads: one.
 */
#ifndef SH_TRAINER_CHECKPOINT_H
#define SH_TRAINER_CHECKPOINT_H

#include "trainer/optimizer.h"
#include "trainer/train.h"

#define TR_AREAS_MAX (3 + TR_MOMENT_AREAS)

/* Numbers of a training's state; how large the vectors are follows from the training itself. */
typedef struct {
    uint32_t step, updates[2];            /* of the optimizer */
    uint64_t pass, order_at;              /* of the order of the data */
    uint32_t micro_sequences, logit_rows; /* of the plan: another one adds in another order */
    uint64_t tokens_seen;
    double seconds, loss_first, loss_last, cross_entropy_last, kl_last;
    double heldout_best, heldout_last; /* NaN: never measured */
    uint32_t heldout_best_step, heldout_since;
} tr_state;

typedef struct {
    const tr_trainee *trainee;
    const sh_train_data *data;
    const sh_train_options *options; /* with its checkpoint */
    uint32_t *order;                 /* [data->n] */
    tr_area moments[TR_MOMENT_AREAS];
    size_t n_moments;
    float *best; /* of as many as there are parameters; in the file after a first measurement */
    sh_hash identity[5]; /* by tr_checkpoint_identify */
} tr_checkpoint;

/* Before the first step; it reads parameters and data through. And removes what a killed process
 * left of a file that it was writing. */
void tr_checkpoint_identify(tr_checkpoint *c);
/* Atomic, mode 0600. On error the file that was there is as it was, and nothing is beside it.
 * SH_ERR_CRASHED: a fail point. */
SH_MUST_USE sh_status tr_checkpoint_save(const tr_checkpoint *c, const tr_state *state,
                                         sh_error *err);
/* Into the parameters, the order, the moments and best; *found is false where there is no file.
 * SH_ERR_INVALID: not a checkpoint; SH_ERR_UNSUPPORTED: another version; SH_ERR_CORRUPT: damaged or
 * cut short; SH_ERR_MISMATCH: of another training, with what differs. Nothing is changed then. */
SH_MUST_USE sh_status tr_checkpoint_load(const tr_checkpoint *c, tr_state *state, bool *found,
                                         sh_error *err);

#endif
