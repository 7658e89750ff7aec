/*
 * A small training, of an adapter or of the whole model, for the tests of what happens between its
 * steps.
 */
#ifndef SH_TESTS_TRAINER_MATERIAL_H
#define SH_TESTS_TRAINER_MATERIAL_H

#include "tests/trainer/small.h"
#include "trainer/train.h"

enum { SEQUENCES = 11, HELDOUT = 4, LENGTH = 33, STEPS_MOST = 64 };

extern sh_error err; /* of what is called by tests and helpers */

/* A base, what is trained on it, and what of it is held out. */
typedef struct {
    sh_model_config config;
    sh_model *model;
    sh_adapter *adapter;
    sh_train_data data, heldout;
} material;

material material_make(void);
void material_release(material *m);

/* With warm-up and decay. */
sh_train_options options_of(uint32_t batch, uint32_t steps);
/* Steps that do not depend on how many there are: a shorter training is the beginning of a longer
 * one. */
sh_train_options constant_options(uint32_t steps);
/* So that one text teaches something of another: which tokens there are. */
void fewer_tokens(sh_train_data *data);

/* What a training leaves. */
typedef struct {
    float *params;
    size_t n;
    sh_train_result result;
} outcome;
/* Parameters also of a training that fails. */
sh_status train(const material *m, bool full, const sh_train_options *options, outcome *out);
void outcome_release(outcome *o);
/* |x - y| / |x| */
double distance(const outcome *x, const outcome *y);
void must_be_same(const outcome *x, const outcome *y);

/* What progress was told. */
typedef struct {
    sh_train_progress steps[STEPS_MOST];
    uint32_t n, cancel_at; /* 0: never */
} diary;
bool note_step(void *arg, const sh_train_progress *p);

#endif
